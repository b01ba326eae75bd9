"""Attacks against closed forms, brute force, foolbox, and their promises about the model."""

import copy
import itertools
import sys
from functools import partial

import foolbox
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lib import attacks, compute, models
from lib.attacks import autoattack, fgsm, pgd, project, simba
from lib.evaluation import predict, robust_error
from lib.fast import channels_last

CLOSE = {"atol": 1e-6, "rtol": 0}


def linear_model(w, b=0.0):
    """Two classes with logits (0, <w, x> + b): the loss of class 0 grows along w, that of class 1 along -w."""
    layer = nn.Linear(w.numel(), 2)
    layer.weight.data = torch.stack([torch.zeros_like(w), w])
    layer.bias.data = torch.tensor([0.0, b])
    return nn.Sequential(nn.Flatten(), layer)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def cross_entropy(model, x, y):
    return F.cross_entropy(predict(model, x), y, reduction="none")


@pytest.fixture
def batch(digits):
    return digits.x_test[:64], digits.y_test[:64]


class TestClosedForm:
    @pytest.fixture
    def problem(self):
        g = generator(3)
        w = torch.randn(12, generator=g)
        x = 0.4 + 0.2 * torch.rand(20, 1, 3, 4, generator=g)  # the box is further away than any eps below
        y = torch.arange(20) % 2
        sign = torch.where(y == 0, 1.0, -1.0).view(-1, 1, 1, 1)  # the direction that hurts
        return linear_model(w, b=0.3), x, y, w.view(1, 1, 3, 4), sign

    @pytest.mark.parametrize("precision", ["auto", "full"])
    @pytest.mark.parametrize("loss", ["ce", "margin"])
    @pytest.mark.parametrize("random_start", [True, False])
    @pytest.mark.parametrize("norm", ["linf", "l2"])
    def test_reaches_the_worst_case(self, problem, norm, random_start, loss, precision):
        model, x, y, w, sign = problem
        eps = 0.2
        direction = w.sign() if norm == "linf" else w / w.norm()
        worst = x + eps * sign * direction
        found = pgd(model, x, y, eps=eps, step_size=0.05, num_steps=60, norm=norm, random_start=random_start,
                    loss=loss, precision=precision, generator=generator())  # fmt: skip
        # bfloat16 rounds the direction of the L2 gradient to 3 digits; a sign it cannot change.
        atol = 2e-3 if (norm, precision) == ("l2", "auto") else 1e-4 if norm == "l2" else 1e-6
        torch.testing.assert_close(found, worst, atol=atol, rtol=0)
        margin = sign.flatten() * ((x * w).sum((1, 2, 3)) + 0.3) + eps * (w.abs().sum() if norm == "linf" else w.norm())
        torch.testing.assert_close(cross_entropy(model, found, y), F.softplus(margin), atol=1e-4, rtol=0)

    @pytest.mark.parametrize("norm", ["linf", "l2"])
    def test_fgsm_is_exact_in_one_step(self, problem, norm):
        model, x, y, w, sign = problem
        direction = w.sign() if norm == "linf" else w / w.norm()
        found = fgsm(model.double(), x.double(), y, eps=0.2, norm=norm)
        torch.testing.assert_close(found, (x + 0.2 * sign * direction).double(), atol=1e-7, rtol=0)

    def test_linf_in_the_box_against_all_vertices(self):
        g = generator(5)
        w = torch.randn(5, generator=g)
        model = linear_model(w)
        x = torch.rand(12, 1, 1, 5, generator=g).round(decimals=1)  # many coordinates within eps of the box
        y = torch.arange(12) % 2
        eps = 0.35
        corners = torch.tensor(list(itertools.product((-eps, eps), repeat=5))).view(-1, 1, 1, 1, 5)
        candidates = (x + corners).clamp(0, 1)
        brute = torch.stack([cross_entropy(model, c, y) for c in candidates]).amax(0)
        found = pgd(model, x, y, eps=eps, step_size=0.1, num_steps=20, generator=generator())
        torch.testing.assert_close(cross_entropy(model, found, y), brute, **CLOSE)

    def test_l2_in_the_box_against_a_fine_search(self):
        # Two pixels: the worst case over ball and box is found on a fine net of directions.
        model = linear_model(torch.tensor([1.0, 0.5]))
        x = torch.tensor([[0.95, 0.5], [0.5, 0.97], [0.02, 0.5]]).view(3, 1, 1, 2)
        y = torch.tensor([0, 0, 1])
        eps = 0.25
        angles = torch.linspace(0, 2 * np.pi, 20001)
        net = torch.stack([angles.cos(), angles.sin()], 1).view(-1, 1, 1, 1, 2)
        net = torch.cat([net * r for r in (0.25, 0.5, 0.75, 1.0)]) * eps
        loss = [
            cross_entropy(model, (a + net[:, 0]).clamp(0, 1), b.expand(len(net))).amax()
            for a, b in zip(x, y, strict=True)
        ]
        found = pgd(
            model, x, y, eps=eps, step_size=0.02, num_steps=200, norm="l2", precision="full", random_start=False
        )
        # Clamping after projecting is not the projection on the intersection, so L2 stops up to 0.0015 short here.
        assert (cross_entropy(model, found, y) >= torch.stack(loss) - 2e-3).all()

    def test_margin_loss_is_the_largest_other_logit_minus_the_true_one(self):
        logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, -1.0]])
        assert attacks.LOSSES["margin"](logits, torch.tensor([0, 2])).tolist() == [-1.0, 6.0]

    @pytest.mark.parametrize("gap", [1, 15, 30, 60, 300])
    @pytest.mark.parametrize("norm", ["linf", "l2"])
    def test_sure_networks_are_attacked_as_in_twice_the_digits(self, norm, gap):
        """Of logits this far apart a cross entropy in floating point has a gradient of other signs, or none at all."""
        g = generator(1)
        layer = nn.Linear(50, 7)
        layer.weight.data = torch.randn(7, 50, generator=g) * gap / 30
        layer.bias.data = torch.zeros(7).index_fill(0, torch.tensor(2), float(gap))
        model, x = nn.Sequential(nn.Flatten(), layer), torch.full((1, 1, 5, 10), 0.5)
        y, step = torch.tensor([2]), {"eps": 0.01, "norm": norm}
        logits = copy.deepcopy(model).double()(x.double())[0]  # its gradient is (p_j), minus their sum for the label
        others = torch.tensor([0, 1, 3, 4, 5, 6])
        slope = logits[others].softmax(0) @ layer.weight[others].double() - layer.weight[2].double()
        direction = (slope.sign() if norm == "linf" else slope / slope.norm()).view_as(x)
        torch.testing.assert_close(fgsm(model, x, y, **step), (x + 0.01 * direction).float(), **CLOSE)

    def test_steps_ascend_the_loss_that_is_reported(self):
        logits = torch.randn(40, 5, generator=generator(), dtype=torch.double).requires_grad_()
        y = torch.arange(40) % 5
        of_loss, ours = F.cross_entropy(logits, y, reduction="none"), attacks.LOSSES["ce"](logits, y)
        assert torch.allclose(of_loss, F.softplus(ours)) and of_loss.argsort().equal(ours.argsort())
        slopes = [torch.autograd.grad(t.sum(), logits)[0] for t in (of_loss, ours)]
        assert torch.allclose(*map(F.normalize, slopes), rtol=1e-9)

    def test_simba_sees_changes_of_a_sure_network(self):
        model = linear_model(torch.full((12,), 20.0), b=-200.0)  # its probability of class 0 is 1 in float32, and stays
        x, y = torch.full((1, 1, 3, 4), 0.1), torch.tensor([0])
        found = simba(model, x, y, eps=0.05, num_queries=40, generator=generator())
        torch.testing.assert_close(found, x + 0.05, **CLOSE)

    @pytest.mark.parametrize("size", [1e-44, 1e-40, 1e-20, 1.0, 1e30])
    def test_a_step_is_whole_whatever_the_gradients_size(self, size):
        unit = attacks._unit(torch.tensor([3.0, 4.0]).mul(size).view(1, 1, 1, 2))
        assert torch.allclose(unit.flatten(), torch.tensor([0.6, 0.8]), atol=0.05 if size < 1e-41 else 1e-5)

    def test_tiny_l2_gradients_still_give_a_whole_step(self):
        # The probability of the wrong class is about exp(-60), and the square of such a gradient underflows.
        model = linear_model(torch.tensor([3.0, 4.0]), b=-60.0)
        x = torch.full((1, 1, 1, 2), 0.5)
        found = pgd(model, x, torch.tensor([0]), eps=0.3, step_size=0.1, num_steps=1, norm="l2", random_start=False,
                    precision="full")  # fmt: skip
        torch.testing.assert_close(found.flatten(), torch.tensor([0.56, 0.58]), **CLOSE)


class TestProject:
    deltas = st.lists(st.floats(-3, 3, width=32), min_size=6, max_size=6)

    @given(deltas, st.floats(0, 2), st.sampled_from(["linf", "l2"]), st.integers(0, 1000))
    @settings(max_examples=100)
    def test_is_the_nearest_point_and_idempotent(self, values, eps, norm, seed):
        delta = torch.tensor(values, dtype=torch.float64).view(2, 1, 1, 3)
        out = project(delta, eps=eps, norm=norm)
        order = {"linf": float("inf"), "l2": 2}[norm]
        size = torch.linalg.vector_norm(out.flatten(1), order, dim=1)
        assert (size <= eps + 1e-12).all()
        torch.testing.assert_close(project(out, eps=eps, norm=norm), out, atol=1e-12, rtol=0)
        # Nearest in the Euclidean sense: <delta - out, z - out> <= 0 for every z of the ball.
        z = torch.randn(200, 2, 3, generator=generator(seed), dtype=torch.float64)
        z = z / torch.linalg.vector_norm(z, order, dim=2, keepdim=True) * eps
        inner = ((delta - out).flatten(1) * (z - out.flatten(1))).sum(2)
        assert (inner <= 1e-9).all()
        inside = torch.linalg.vector_norm(delta.flatten(1), order, dim=1) <= eps
        torch.testing.assert_close(out[inside], delta[inside], atol=1e-12, rtol=0)

    @pytest.mark.parametrize("norm", ["linf", "l2"])
    def test_zero_radius_and_zero_perturbation(self, norm):
        assert project(torch.ones(2, 1, 2, 2), eps=0.0, norm=norm).abs().max() == 0
        assert project(torch.zeros(2, 1, 2, 2), eps=0.1, norm=norm).abs().max() == 0

    @pytest.mark.parametrize("eps", [-0.1, float("nan")])
    def test_refuses_a_wrong_radius(self, eps):
        with pytest.raises(ValueError, match="eps must be finite and not negative"):
            project(torch.zeros(1, 1, 1, 1), eps=eps)


@given(
    eps=st.one_of(st.just(0.0), st.floats(1e-4, 1)), step_size=st.floats(0, 1), num_steps=st.integers(0, 4),
    num_restarts=st.integers(1, 3), norm=st.sampled_from(["linf", "l2"]), loss=st.sampled_from(["ce", "margin"]),
    corners=st.booleans(), random_start=st.booleans(), seed=st.integers(0, 100),
)  # fmt: skip
@settings(max_examples=60)
def test_pgd_and_fgsm_stay_in_ball_and_box(
    eps, step_size, num_steps, num_restarts, norm, loss, corners, random_start, seed
):
    g = generator(seed)
    x = torch.rand(4, 1, 4, 4, generator=g)
    x = x.round() if corners else x
    y = torch.randint(3, (4,), generator=g)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    before = x.clone()
    outs = [
        pgd(model, x, y, eps=eps, step_size=step_size, num_steps=num_steps, num_restarts=num_restarts, norm=norm,
            loss=loss, random_start=random_start, generator=g),
        fgsm(model, x, y, eps=eps, norm=norm),
    ]  # fmt: skip
    assert torch.equal(x, before)
    for out in outs:
        assert out.shape == x.shape and out.dtype == x.dtype and not out.requires_grad
        assert out.min() >= 0 and out.max() <= 1
        order = {"linf": float("inf"), "l2": 2}[norm]
        assert torch.linalg.vector_norm((out.double() - x.double()).flatten(1), order, dim=1).max() <= eps


class TestPeer:
    """foolbox at equal steps from the same start."""

    @pytest.fixture
    def peer(self, trained):
        return foolbox.PyTorchModel(trained, bounds=(0, 1), device="cpu")

    @pytest.mark.parametrize("eps, step_size", [(0.1, 0.02), (0.3, 0.05)])
    def test_linf_pgd(self, batch, eps, step_size):
        """To the last digit, in double precision on a net without max-pooling: among equal values, as in a digit's
        black border, the memory layout decides which one max-pooling gives the gradient to, and the steps add up."""
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 4, 5, stride=2), nn.Softplus(), nn.Conv2d(4, 8, 5, stride=2), nn.Softplus()]
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 10)).double().eval()
        x, y = batch[0].double(), batch[1]
        attack = foolbox.attacks.LinfPGD(abs_stepsize=step_size, steps=10, random_start=False)
        theirs = attack.run(foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu"), x, y, epsilon=eps)
        ours = pgd(model, x, y, eps=eps, step_size=step_size, num_steps=10, random_start=False)
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)

    def test_fgsm(self, trained, peer, batch):
        x, y = batch
        theirs = foolbox.attacks.FGSM(random_start=False).run(peer, x, y, epsilon=0.2)
        ours = fgsm(trained.double(), x.double(), y, eps=0.2).float()
        trained.float()
        assert ((ours - theirs).abs() > 1e-5).double().mean() < 1e-3

    def test_l2_pgd(self, trained, peer, batch):
        x, y = batch
        attack = foolbox.attacks.L2PGD(abs_stepsize=0.3, steps=10, random_start=False)
        theirs = attack.run(peer, x, y, epsilon=1.5)
        ours = pgd(trained, x, y, eps=1.5, step_size=0.3, num_steps=10, norm="l2", random_start=False, precision="full")
        # foolbox's perturbation and ours leave the box differently; what counts is the loss reached.
        mine, others = cross_entropy(trained, ours, y), cross_entropy(trained, theirs, y)
        assert (mine.mean() - others.mean()).abs() < 0.02 * others.mean()

    @pytest.mark.parametrize("norm, eps, step_size", [("linf", 0.1, 0.02), ("l2", 1.5, 0.3)])
    def test_robust_error_of_the_fast_attack(self, trained, peer, digits, norm, eps, step_size):
        x, y = digits.x_test[:500], digits.y_test[:500]
        kind = {"linf": foolbox.attacks.LinfPGD, "l2": foolbox.attacks.L2PGD}[norm]
        theirs = kind(abs_stepsize=step_size, steps=10, random_start=False).run(peer, x, y, epsilon=eps)
        theirs = (predict(trained, theirs).argmax(1) != y).double().mean().item()
        fast = partial(pgd, eps=eps, step_size=step_size, num_steps=10, norm=norm, random_start=False)
        assert 0.1 < theirs < 0.97  # else the comparison says nothing
        assert abs(robust_error(trained, x, y, fast) - theirs) <= 0.01


class TestRestarts:
    @pytest.mark.parametrize("precision", ["auto", "full"])
    @pytest.mark.parametrize("loss", ["ce", "margin"])
    def test_more_restarts_never_weaken_any_image(self, trained, batch, loss, precision):
        x, y = batch
        losses, wrong = [], []
        for n in (1, 2, 4):
            out = pgd(trained, x, y, eps=0.06, step_size=0.03, num_steps=3, num_restarts=n, loss=loss,
                      precision=precision, generator=generator())  # fmt: skip
            logits = predict(trained, out)
            wrong.append(logits.argmax(1) != y)
            losses.append(attacks.LOSSES[loss](logits, y))
        for few, many in ((0, 1), (1, 2)):
            assert (wrong[many] | ~wrong[few]).all()
            same = wrong[many] == wrong[few]
            assert (losses[many] >= losses[few] - 1e-6)[same].all()
        assert 0 < wrong[0].sum() < len(y) and (losses[2] > losses[0]).any()

    def test_misclassified_beats_a_larger_loss(self):
        x = torch.arange(3.0).view(3, 1, 1, 1)
        old = (x, torch.tensor([True, False, False]), torch.tensor([1.0, 9.0, 1.0]))
        new = (x + 10, torch.tensor([False, True, False]), torch.tensor([9.0, 1.0, 2.0]))
        picked, wrong, loss = attacks._stronger(old, new)
        assert picked.flatten().tolist() == [0.0, 11.0, 12.0]
        assert wrong.tolist() == [True, True, False] and loss.tolist() == [1.0, 1.0, 2.0]

    def test_one_restart_is_the_plain_call(self, trained, batch):
        run = partial(pgd, trained, *batch, eps=0.1, step_size=0.05, num_steps=2)
        assert torch.equal(run(generator=generator(4)), run(generator=generator(4), num_restarts=1))


class TestRandomness:
    @pytest.mark.parametrize("norm", ["linf", "l2"])
    def test_generator_decides_and_the_global_one_is_untouched(self, trained, batch, norm):
        state = torch.get_rng_state()
        run = partial(pgd, trained, *batch, eps=0.1, step_size=0.05, num_steps=1, norm=norm)
        a, b, c = run(generator=generator(1)), run(generator=generator(1)), run(generator=generator(2))
        assert torch.equal(a, b) and not torch.equal(a, c)
        assert torch.equal(torch.get_rng_state(), state)
        run()
        assert not torch.equal(torch.get_rng_state(), state)

    def test_starts_are_uniform_in_the_ball_of_one_step(self, trained):
        x = torch.full((2000, 1, 28, 28), 0.5)
        y = torch.zeros(2000, dtype=torch.int64)
        g = generator()
        linf = pgd(trained, x, y, eps=0.3, step_size=0.1, num_steps=0, generator=g) - x
        assert linf.abs().max() <= 0.1 + 1e-6
        assert linf.abs().mean().item() == pytest.approx(0.05, rel=0.01)
        # L2, in 4 dimensions: the share within half the radius is 1/16.
        small = attacks._start(torch.zeros(20000, 1, 2, 2), 1.0, "l2", g).flatten(1).norm(dim=1)
        assert small.max() <= 1 + 1e-6
        assert (small < 0.5).double().mean().item() == pytest.approx(1 / 16, rel=0.1)


class Moody(nn.Module):
    """Batch normalisation and dropout in a mixture of modes; raises at the given call."""

    def __init__(self, raise_at=None):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(4 * 36, 3))
        self.raise_at, self.calls = raise_at, 0

    def forward(self, x):
        self.calls += 1
        if self.calls == self.raise_at:
            raise RuntimeError("in the middle")
        return self.head(self.features(x))


def moody(raise_at=None):
    """With mixed modes, mixed flags and half of the .grad fields filled."""
    model = Moody(raise_at)
    model.train()
    model.features[1].eval()
    model.head.eval()
    model.features[0].weight.requires_grad_(False)
    for p in list(model.parameters())[::2]:
        p.grad = torch.full_like(p, 7.0)
    return model


def condition(model):
    grads = {k: None if p.grad is None else p.grad.clone() for k, p in model.named_parameters()}
    flags = {k: (p.requires_grad, id(p)) for k, p in model.named_parameters()}
    modes = {k: m.training for k, m in model.named_modules()}
    return grads, flags, modes, {k: v.clone() for k, v in model.state_dict().items()}


def assert_same(a, b):
    assert a[1:3] == b[1:3]
    for old, new in ((a[0], b[0]), (a[3], b[3])):
        assert old.keys() == new.keys()
        for k in old:
            assert (old[k] is None and new[k] is None) or torch.equal(old[k], new[k]), k


class TestModelIsLeftAlone:
    x, y = torch.rand(6, 1, 8, 8, generator=generator()), torch.arange(6) % 3
    run = staticmethod(partial(pgd, eps=0.1, step_size=0.03, num_steps=3, num_restarts=2))

    @pytest.mark.parametrize("precision", ["auto", "full"])
    def test_after_an_attack(self, precision):
        model = moody()
        before = condition(model)
        self.run(model, self.x, self.y, precision=precision)
        fgsm(model, self.x, self.y, eps=0.1)
        predict(model, self.x)
        assert_same(before, condition(model))

    @pytest.mark.parametrize("raise_at", [1, 2, 4, 5])
    def test_when_the_model_raises_in_the_middle(self, raise_at):
        model = moody(raise_at)
        before = condition(model)
        with pytest.raises(RuntimeError, match="in the middle"):
            self.run(model, self.x, self.y)
        assert_same(before, condition(model))

    def test_evaluation_mode_is_used(self):
        # Dropout would make two runs differ, and batch statistics would make images depend on their neighbours.
        model = moody()
        run = partial(pgd, eps=0.1, step_size=0.03, num_steps=3, random_start=False, precision="full")
        whole = run(model, self.x, self.y)
        assert torch.equal(whole, run(model, self.x, self.y))
        parts = torch.cat([run(model, a[None], b[None]) for a, b in zip(self.x, self.y, strict=True)])
        torch.testing.assert_close(whole, parts, **CLOSE)


class TestPrecision:
    def test_auto_is_full_without_hardware_support(self, trained, batch, monkeypatch):
        monkeypatch.setattr(attacks, "fast_dtype", lambda _device: None)
        run = partial(pgd, trained, *batch, eps=0.1, step_size=0.02, num_steps=3, random_start=False)
        assert torch.equal(run(precision="auto"), run(precision="full"))

    def test_auto_uses_the_low_type_when_there_is_one(self, trained, batch, monkeypatch):
        monkeypatch.setattr(attacks, "fast_dtype", lambda _device: torch.bfloat16)
        with attacks.frozen(trained, batch[0]) as fast, attacks.frozen(trained, batch[0], "full") as exact:
            a, b = fast(batch[0]), exact(batch[0])
        assert a.dtype == b.dtype == torch.float32
        assert not torch.equal(a, b)
        torch.testing.assert_close(a, b, atol=0.03 * b.abs().max().item(), rtol=0)
        assert torch.equal(b, predict(trained, batch[0]))

    @pytest.mark.parametrize("capabilities, vendor, gains", [
        ({}, "GenuineIntel", False), ({"neon": True, "bf16": True}, "", False),
        ({"avx512_bf16": True}, "GenuineIntel", False), ({"avx512_bf16": True}, "AuthenticAMD", True),
        ({"amx_bf16": True, "avx512_bf16": True}, "GenuineIntel", True),
    ])  # fmt: skip
    def test_which_processors_gain_by_it(self, monkeypatch, capabilities, vendor, gains):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
        monkeypatch.setattr(compute, "_cpuinfo", lambda _field: vendor)
        assert compute.fast_dtype(torch.device("cpu")) == (torch.bfloat16 if gains else None)
        assert compute.fast_dtype(torch.device("mps")) is None

    def test_the_environment_decides_before_the_processor(self, monkeypatch):
        for asked, dtype in (("float32", None), ("bfloat16", torch.bfloat16)):
            monkeypatch.setenv("PRECISION", asked)
            assert compute.fast_dtype(torch.device("cpu")) == dtype
        monkeypatch.setenv("PRECISION", "half")
        with pytest.raises(ValueError, match="unknown PRECISION 'half': choose one of auto, float32, bfloat16"):
            compute.fast_dtype(torch.device("cpu"))

    @pytest.mark.parametrize("channels", [1, 3])
    def test_layers_after_the_first_get_their_channels_last(self, channels, monkeypatch):
        # With one channel PyTorch cannot tell the layouts apart, and the wrong one makes pooling several times slower.
        seen, pool = [], F.max_pool2d
        monkeypatch.setattr(F, "max_pool2d", lambda t, *rest, **more: seen.append(t) or pool(t, *rest, **more))
        model = nn.Sequential(nn.Conv2d(channels, 8, 5, padding=2), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 3))
        x = torch.rand(6, channels, 8, 8)
        pgd(model, x, torch.arange(6) % 3, eps=0.1, step_size=0.1, num_steps=2, random_start=False)
        assert len(seen) == 2 and all(t.is_contiguous(memory_format=torch.channels_last) for t in seen)
        assert torch.equal(channels_last(x), x)

    @pytest.mark.parametrize("name, shape", [("vgg16", (4, 3, 32, 32)), ("resnet18", (4, 3, 32, 32))])
    def test_every_architecture_can_be_attacked(self, name, shape):
        model = models.build(name, seed=0, width=1)
        x = torch.rand(shape, generator=generator())
        out = fgsm(model, x, torch.arange(4), eps=0.1)
        assert (out - x).abs().max() == pytest.approx(0.1, abs=1e-6)


class TestBadInput:
    x, y = torch.rand(4, 1, 4, 4, generator=generator()), torch.arange(4) % 3
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))

    @pytest.mark.parametrize("change, message", [
        ({"eps": -0.1}, "eps must be finite and not negative, got -0.1"),
        ({"eps": float("nan")}, "eps must be finite and not negative, got nan"),
        ({"eps": float("inf")}, "eps must be finite and not negative, got inf"),
        ({"eps": 10**400}, "eps must be finite and not negative, got 1000"),
        ({"eps": 8}, "write 8/255, not 8"),
        ({"eps": True}, "eps must be a number, got bool"),
        ({"eps": "8/255"}, "eps must be a number, got str"),
        ({"eps": -1.0, "norm": "l2"}, "eps must be finite and not negative"),
        ({"step_size": -0.1}, "step_size must be finite and not negative, got -0.1"),
        ({"step_size": float("nan")}, "step_size must be finite and not negative"),
        ({"step_size": 2}, "step_size is a fraction .* write 8/255, not 8"),
        ({"step_size": True}, "step_size must be a number, got bool"),
        ({"num_steps": -1}, "num_steps must be an integer >= 0, got -1"),
        ({"num_steps": 2.0}, "num_steps must be an integer >= 0, got 2.0"),
        ({"num_steps": True}, "num_steps must be an integer >= 0, got True"),
        ({"num_restarts": 0}, "num_restarts must be an integer >= 1, got 0"),
        ({"num_restarts": 1.5}, "num_restarts must be an integer >= 1, got 1.5"),
        ({"norm": "l1"}, "unknown norm 'l1': choose one of linf, l2"),
        ({"loss": "dlr"}, "unknown loss 'dlr': choose one of ce, margin"),
        ({"precision": "half"}, "unknown precision 'half': choose one of auto, full"),
        ({"precision": "half", "eps": 0.0}, "unknown precision 'half'"),
        ({"model": torch.relu}, "model must be an nn.Module, got builtin_function_or_method"),
        ({"x": x + 1}, r"x must lie in \[0, 1\], got values from"),
        ({"x": x - 0.5}, r"x must lie in \[0, 1\]"),
        ({"x": x.where(x < 0.9, float("nan"))}, r"x must lie in \[0, 1\], got values from nan to nan"),
        ({"x": (x * 255).to(torch.uint8)}, "x must be float32 or float64 .* got torch.uint8: divide by 255"),
        ({"x": x[:, 0]}, r"x must be a tensor \(B, C, H, W\)"),
        ({"x": x[:0]}, "with B >= 1"),
        ({"x": x.numpy()}, r"x must be a tensor \(B, C, H, W\)"),
        ({"y": y.float()}, r"y must be int64 labels of shape \(4,\), got torch.float32"),
        ({"y": y.int()}, "y must be int64 labels"),
        ({"y": y[:3]}, r"y must be int64 labels of shape \(4,\), got torch.int64 \(3,\)"),
        ({"y": y[:, None]}, "y must be int64 labels"),
        ({"y": [0, 1, 2, 0]}, "y must be int64 labels .* got list"),
        ({"y": y - 1}, "labels run from -1 to 1, but the model has 3 classes"),
        ({"y": y + 1}, "labels run from 1 to 3, but the model has 3 classes"),
    ])  # fmt: skip
    def test_arguments(self, change, message):
        arguments = {"model": self.model, "x": self.x, "y": self.y, "eps": 0.1, "step_size": 0.1, "num_steps": 2}
        with pytest.raises(ValueError, match=message):
            pgd(**(arguments | change))

    @pytest.mark.parametrize("change", [{"eps": 2}, {"norm": "l1"}, {"x": x + 1}, {"y": y + 1}, {"model": None}])
    def test_fgsm_checks_the_same(self, change):
        with pytest.raises(ValueError):
            fgsm(**({"model": self.model, "x": self.x, "y": self.y, "eps": 0.1} | change))

    @pytest.mark.parametrize("head, message", [
        (lambda out: out * float("nan"), "the model returned NaN or infinite logits"),
        (lambda out: out / 0, "the model returned NaN or infinite logits"),
        (lambda out: out[:, :2], "labels run from 0 to 2, but the model has 2 classes"),
        (lambda out: out[:2], r"the model must return logits \(4, classes\), got \(2, 3\)"),
        (lambda out: out[:, :, None], r"the model must return logits \(4, classes\), got \(4, 3, 1\)"),
        (lambda out: out[:, 0], r"the model must return logits \(4, classes\), got \(4,\)"),
        (lambda out: (out - out.detach()).sqrt(), "the gradient of the model's loss is NaN or infinite"),
    ])  # fmt: skip
    def test_models(self, head, message):
        class Wrong(nn.Module):
            def __init__(self, model):
                super().__init__()
                self.model = model

            def forward(self, x):
                return head(self.model(x))

        with pytest.raises(ValueError, match=message):
            pgd(Wrong(self.model), self.x, self.y, eps=0.1, step_size=0.1, num_steps=1)

    @pytest.mark.parametrize("change", [{"num_steps": 0, "num_restarts": 2}, {"num_steps": 0}, {"eps": 0}])
    def test_labels_are_checked_where_nothing_moves(self, change):
        settings = {"eps": 0.1, "step_size": 0.1, "num_steps": 1} | change
        with pytest.raises(ValueError, match="labels run from"):
            pgd(self.model, self.x, self.y + 1, **settings)


def test_the_ball_start_is_anywhere_in_the_ball():
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(784, 3)), torch.full((50, 1, 28, 28), 0.5)
    settings = {"eps": 0.2, "step_size": 0.01, "num_steps": 0}
    y, g = torch.zeros(50, dtype=torch.int64), generator()
    near = (pgd(model, x, y, **settings, random_start="step", generator=g) - x).abs().max()
    far = (pgd(model, x, y, **settings, random_start="ball", generator=g) - x).abs().max()
    assert near <= 0.01 + 1e-6 and 0.19 < far <= 0.2 + 1e-6
    with pytest.raises(ValueError, match="unknown random_start 'corner'"):
        pgd(model, x, y, **settings, random_start="corner")


def robust(model, x, y):
    return (model(x).argmax(1) == y).double().mean().item()


class TestSimba:
    @pytest.mark.parametrize("norm, eps", [("linf", 0.2), ("l2", 1.5)])
    def test_never_leaves_and_never_weakens(self, digits, trained, norm, eps):
        x, y = digits.x_test[:40], digits.y_test[:40]
        before = trained(x).log_softmax(1).gather(1, y[:, None])
        for num_queries in (1, 2, 50, 400):
            g = generator()
            x_adv = simba(trained, x, y, eps=eps, num_queries=num_queries, norm=norm, generator=g)
            delta = (x_adv - x).flatten(1)
            size = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
            assert size.max() <= eps + 1e-6 and x_adv.min() >= 0 and x_adv.max() <= 1
            after = trained(x_adv).log_softmax(1).gather(1, y[:, None])
            right = trained(x_adv).argmax(1) == y
            assert (after <= before + 1e-6).all()
            before = after
        assert torch.equal(x_adv[trained(x).argmax(1) != y], x[trained(x).argmax(1) != y])
        assert right.double().mean() < robust(trained, x, y)

    def test_finds_the_worst_corner_of_a_linear_model(self):
        """Two classes: the log probability falls along each coordinate on its own, so one pass finds the corner."""
        model, x = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), torch.full((3, 1, 4, 4), 0.5)
        with torch.no_grad():
            model[1].bias += torch.tensor([2.0, -2.0])  # no image is ever misclassified, so none stops early
        y = torch.zeros(3, dtype=torch.int64)
        found = simba(model, x, y, eps=0.1, num_queries=33, generator=generator())
        worst = 0.5 + 0.1 * (model[1].weight[1] - model[1].weight[0]).sign().view(1, 1, 4, 4)
        torch.testing.assert_close(found, worst.expand(3, 1, 4, 4).detach())

    def test_counts_its_queries(self, digits, trained):
        seen, x, y = [], digits.x_test[:10], digits.y_test[:10]
        handle = trained.register_forward_hook(lambda _m, inputs, _o: seen.append(len(inputs[0])))
        simba(trained, x, y, eps=0.01, num_queries=20, generator=generator())
        handle.remove()
        assert len(seen) <= 20 and max(seen) <= 10

    def test_bad_input(self, digits, trained):
        x, y = digits.x_test[:4], digits.y_test[:4]
        assert torch.equal(simba(trained, x, y, eps=0, num_queries=5), x)
        with pytest.raises(ValueError, match="num_queries must be an integer >= 1, got 0"):
            simba(trained, x, y, eps=0.1, num_queries=0)
        with pytest.raises(ValueError, match="labels run from"):
            simba(trained, x, y + 10, eps=0.1, num_queries=5)


QUICK = {"eps": 0.1, "num_steps": 10, "num_restarts": 1, "num_queries": 50}


class TestAutoattack:
    @pytest.mark.parametrize("norm, eps", [("linf", 0.1), ("l2", 1.5)])
    @pytest.mark.parametrize("attack", ["apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square"])
    def test_stays_inside_repeats_and_leaves_all_else_alone(self, digits, trained, attack, norm, eps):
        x, y = digits.x_test[:16], digits.y_test[:16]
        run = partial(autoattack, trained, x, y, **QUICK | {"eps": eps}, norm=norm, attacks=(attack,))
        state, whole = torch.get_rng_state(), copy.deepcopy(trained)
        for p, q in zip(trained.parameters(), whole.parameters(), strict=True):
            p.grad, q.grad = torch.ones_like(p), torch.ones_like(p)
        calls = []
        before = sys.gettrace()
        sys.settrace(lambda *_: calls.append(1))
        try:
            first = run()
            assert sys.gettrace() is not None
        finally:
            sys.settrace(before)
        assert torch.equal(torch.get_rng_state(), state)
        assert not trained.training
        for p, q in zip(trained.parameters(), whole.parameters(), strict=True):
            assert torch.equal(p, q) and torch.equal(p.grad, q.grad) and p.requires_grad
        assert torch.equal(run(), first)
        delta = (first - x).flatten(1)
        size = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
        assert size.max() <= eps + 1e-6 and first.min() >= 0 and first.max() <= 1
        assert robust(trained, first, y) < robust(trained, x, y)

    def test_no_weaker_than_pgd_with_the_same_steps(self, digits, trained):
        x, y = digits.x_test[:100], digits.y_test[:100]
        for eps in (0.05, 0.1):
            ours = pgd(trained, x, y, eps=eps, step_size=eps / 4, num_steps=10, generator=generator())
            apgd = autoattack(trained, x, y, **QUICK | {"eps": eps}, attacks=("apgd-ce",))
            assert robust(trained, apgd, y) <= robust(trained, ours, y)

    def test_one_attack_may_be_named_alone(self, digits, trained):
        x, y = digits.x_test[:20], digits.y_test[:20]
        alone, listed = (autoattack(trained, x, y, **QUICK | {"attacks": a}) for a in ("apgd-ce", ("apgd-ce",)))
        assert torch.equal(alone, listed) and not torch.equal(alone, x)

    def test_quiet(self, digits, trained, capfd):
        autoattack(trained, digits.x_test[:8], digits.y_test[:8], **QUICK)
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize("change, message", [
        ({"attacks": ("pgd",)}, r"unknown attack \['pgd'\]: choose some of apgd-ce, apgd-dlr"),
        ({"attacks": "pgd"}, r"unknown attack \['pgd'\]: choose some of apgd-ce, apgd-dlr"),
        ({"attacks": ()}, "unknown attack"),
        ({"num_queries": 0}, "num_queries must be an integer >= 1, got 0"),
        ({"num_restarts": 0}, "num_restarts must be an integer >= 1, got 0"),
        ({"eps": 8}, "eps is a fraction of the pixel range"),
        ({"norm": "l1"}, "unknown norm 'l1'"),
    ])  # fmt: skip
    def test_bad_input(self, digits, trained, change, message):
        with pytest.raises(ValueError, match=message):
            autoattack(trained, digits.x_test[:4], digits.y_test[:4], **QUICK | change)

    @pytest.mark.parametrize("attack, classes", [("apgd-dlr", 2), ("apgd-t", 3)])
    def test_too_few_classes(self, attack, classes):
        model, x = nn.Sequential(nn.Flatten(), nn.Linear(16, classes)), torch.rand(4, 1, 4, 4)
        with pytest.raises(ValueError, match=f"{attack} needs at least {classes + 1} classes, the model has {classes}"):
            autoattack(model, x, torch.zeros(4, dtype=torch.int64), eps=0.1, attacks=(attack,))

    def test_eps_zero_and_two_classes(self):
        model, x = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), torch.rand(4, 1, 4, 4)
        y = torch.zeros(4, dtype=torch.int64)
        assert torch.equal(autoattack(model, x, y, **QUICK | {"eps": 0.0}, attacks=("apgd-ce",)), x)
        autoattack(model, x, y, **QUICK, attacks=("apgd-ce", "fab-t", "square"))
