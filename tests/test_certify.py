"""Interval bounds against closed forms, brute force, attacks and samples, and their promises about the model."""

import itertools
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from kinds import LAYOUTS, STATES, check_rounding, data
from torch import nn

from lib import certify, models, training
from lib.attacks import pgd
from lib.data import Data
from lib.evaluation import error, predict, robust_error
from lib.training import TrainConfig, train

QUICK = (Phase.explicit, Phase.reuse, Phase.generate)  # to make a failing network smaller takes minutes
ROUNDING = {"atol": 1e-12, "rtol": 1e-12}
CONFIG = TrainConfig(
    model="lenet", width=1, objective="interval", eps=0.1, step_size=0.05, num_steps=2, schedule="linear", epochs=3,
    batch_size=50, lr=1e-2, eval_images=40,
)  # fmt: skip


def network(seed, activation="relu"):
    """Every kind of layer that has a rule, with weights and statistics that are not the initial ones."""
    torch.manual_seed(seed)
    act = models.ACTIVATIONS[activation]
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.MaxPool2d(3, 2, padding=1), act(),
        models.BasicBlock(3, 4, 2, activation), models.BasicBlock(4, 4, 1, activation), nn.AvgPool2d(2, 1, padding=1),
        nn.AdaptiveAvgPool2d(2), nn.Identity(), nn.Flatten(), nn.Linear(16, 6), nn.BatchNorm1d(6), nn.Dropout(), act(),
        nn.Linear(6, 3),
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            for t, low, high in ((module.weight, -1, 1), (module.bias, -1, 1), (module.running_mean, -1, 1),
                                 (module.running_var, 0.1, 2)):  # fmt: skip
                t.data.uniform_(low, high)
    return model.double().eval()


def problem(seed, n=4):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 2, 8, 8, generator=g, dtype=torch.float64)
    x[0] = x[0].round()  # an image at the edges of the box
    return x, torch.arange(n) % 3


def inside(x, eps, seed=0, count=40):
    """Points (count, N, ...) of the ball and the box: uniform ones and corners."""
    g = torch.Generator().manual_seed(seed)
    move = torch.empty(count, *x.shape, dtype=x.dtype).uniform_(-1, 1, generator=g)
    move[::2] = move[::2].sign()
    return (x + eps * move).clamp(0, 1)


def margins(model, points, y):
    z = model(points.flatten(0, -4)).unflatten(0, points.shape[:-3])
    return z - z.gather(-1, y.expand(z.shape[:-1])[..., None])


def gradient_norms(model, x, y):
    """l1 norms (N, classes) of the gradients of the margins, one backward pass each."""
    x = x.clone().requires_grad_()
    m = margins(model, x, y)
    rows = [torch.autograd.grad(m[:, j].sum(), x, retain_graph=True)[0] for j in range(m.shape[1])]
    return torch.stack([r.abs().flatten(1).sum(1) for r in rows], 1)


def linear(seed=0, pixels=6, classes=4):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, classes)).double()


class TestSound:
    @settings(max_examples=12, phases=QUICK)
    @given(
        seed=st.integers(0, 10**6),
        activation=st.sampled_from(sorted(models.ACTIVATIONS)),
        eps=st.floats(0, 1),
        loss=st.sampled_from(["ce", "margin"]),
    )
    def test_bounds_contain_every_point(self, seed, activation, eps, loss):
        model, (x, y) = network(seed, activation), problem(seed)
        low, high = certify.bounds(model, x, eps=eps)
        upper = certify.margin_bounds(model, x, y, eps=eps)
        attacked = pgd(model, x, y, eps=eps, step_size=eps / 3, num_steps=5, loss=loss)
        points = torch.cat([inside(x, eps, seed), attacked[None]])
        with torch.no_grad():
            z = model(points.flatten(0, 1)).unflatten(0, points.shape[:2])
            assert (z >= low - 1e-12).all() and (z <= high + 1e-12).all()
            assert (margins(model, points, y) <= upper + 1e-12).all()
        # Merging the last layer never loosens.
        assert (upper <= high - low.gather(1, y[:, None]) + 1e-12).all()

    @settings(max_examples=12, phases=QUICK)
    @given(
        seed=st.integers(0, 10**6),
        activation=st.sampled_from(sorted(models.ACTIVATIONS)),
        eps=st.sampled_from([0.0, 1e-6, 1e-3, 0.01, 0.1, 1.0]),
    )
    def test_lipschitz_bound_is_above_every_slope(self, seed, activation, eps):
        model, (x, y) = network(seed, activation), problem(seed)
        bound = certify.local_lipschitz(model, x, y, eps=eps)
        points = inside(x, eps, seed, count=10)
        for p in points:
            assert (gradient_norms(model, p, y) <= bound * (1 + 1e-9)).all()
        with torch.no_grad():
            m = margins(model, points, y)
        distance = (points[1:] - points[:-1]).flatten(2).abs().amax(2)[..., None]
        assert ((m[1:] - m[:-1]).abs() <= bound * distance + 1e-12).all()

    def test_the_project_s_networks(self, trained, digits):
        """LeNet, and the two with batch normalisation: certified error above PGD's, image by image."""
        x, y = digits.x_test[:100], digits.y_test[:100]
        for eps in (0.0, 0.003, 0.01):
            attack = pgd(trained, x, y, eps=eps, step_size=eps / 4, num_steps=10)
            broken = predict(trained, attack).argmax(1) != y
            upper = certify.margin_bounds(trained, x, y, eps=eps).scatter(1, y[:, None], -torch.inf).amax(1)
            assert not (broken & (upper < 0)).any()
            certified = certify.certified_error(trained, x, y, eps=eps)
            assert certified == pytest.approx((upper >= 0).double().mean().item())
            assert 0 < broken.double().mean() <= certified < 1
        colours = torch.rand(3, 3, 32, 32)
        for name in ("vgg16", "resnet18"):
            model = models.build(name, seed=0, width=1).eval()
            low, high = certify.bounds(model, colours, eps=1e-3)
            points = inside(colours.double(), 1e-3, count=5)
            z = model.double()(points.flatten(0, 1)).unflatten(0, (5, 3))
            assert (z >= low).all() and (z <= high).all()
            assert torch.isfinite(certify.local_lipschitz(model, colours, torch.tensor([0, 1, 2]), eps=1e-3)).all()


class TestExact:
    def test_a_linear_network_in_closed_form(self):
        model, eps = linear(), 0.3
        w, b = model[1].weight, model[1].bias
        g = torch.Generator().manual_seed(1)
        x = torch.rand(5, 1, 2, 3, generator=g, dtype=torch.float64)
        y = torch.tensor([0, 1, 2, 3, 0])
        low, high = (x - eps).clamp(0, 1).flatten(1), (x + eps).clamp(0, 1).flatten(1)

        def largest(rows, offset):
            """max of <rows, x'> + offset over the box: each pixel at the end that its weight's sign asks for."""
            return torch.where(rows > 0, rows * high[:, None], rows * low[:, None]).sum(2) + offset

        lower, upper = certify.bounds(model, x, eps=eps)
        torch.testing.assert_close(upper, largest(w.expand(5, -1, -1), b), **ROUNDING)
        torch.testing.assert_close(lower, -largest(-w.expand(5, -1, -1), -b), **ROUNDING)
        rows, offset = w - w[y][:, None], b - b[y][:, None]
        torch.testing.assert_close(certify.margin_bounds(model, x, y, eps=eps), largest(rows, offset), **ROUNDING)
        norms = rows.abs().sum(2)
        torch.testing.assert_close(certify.local_lipschitz(model, x, y, eps=eps), norms, **ROUNDING)
        plain = nn.Sequential(nn.Flatten(), nn.Linear(6, 4, bias=False)).double()
        plain[1].weight = model[1].weight
        torch.testing.assert_close(certify.margin_bounds(plain, x, y, eps=eps), largest(rows, 0), **ROUNDING)

    @pytest.mark.parametrize(
        "activation", [nn.ReLU(), nn.ReLU(inplace=True), nn.Softplus(), nn.Softplus(2.0), nn.ELU(0.5)]
    )
    def test_a_unit_s_range_by_brute_force(self, activation):
        """One hidden layer: each unit alone reaches its bounds at a corner, so they are tight."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), activation).double()
        x, eps = torch.rand(3, 1, 2, 3, dtype=torch.float64), 0.25
        low, high = (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)
        pick = torch.tensor(list(itertools.product([0.0, 1.0], repeat=6)), dtype=torch.float64).view(-1, 1, 1, 2, 3)
        corners = low + pick * (high - low)
        values = model(corners.flatten(0, 1)).unflatten(0, corners.shape[:2])
        lower, upper = certify.bounds(model, x, eps=eps)
        torch.testing.assert_close(lower, values.amin(0), **ROUNDING)
        torch.testing.assert_close(upper, values.amax(0), **ROUNDING)

    @pytest.mark.parametrize("pool", [
        nn.MaxPool2d(2), nn.MaxPool2d(3, 1, 1), nn.MaxPool2d((2, 1), (1, 2)), nn.MaxPool2d(2, 1, dilation=2),
        nn.MaxPool2d((3, 2), 2, (1, 0)),
    ])  # fmt: skip
    @pytest.mark.parametrize("eps", [0.0, 0.02, 0.1, 0.3])
    def test_pooling_against_loops(self, pool, eps):
        """A place's derivative adds up the weights of the windows whose largest value it can, or must, hold."""
        g = torch.Generator().manual_seed(2)
        x = torch.rand(1, 1, 5, 5, generator=g, dtype=torch.float64)
        model = nn.Sequential(pool, nn.Flatten(), nn.Linear(pool(x).numel(), 2)).double()
        weights = (model[2].weight[1] - model[2].weight[0]).tolist()
        low, high = ((x - eps).clamp(0, 1)[0, 0], (x + eps).clamp(0, 1)[0, 0])
        lower, upper = torch.zeros(5, 5), torch.zeros(5, 5)
        for weight, places in zip(weights, self.windows(pool), strict=True):
            floor = max(low[p].item() for p in places)
            may = [p for p in places if high[p] >= floor]
            for p in may:
                sure = len(may) == 1
                lower[p] += weight if sure else min(weight, 0)
                upper[p] += weight if sure else max(weight, 0)
        expected = torch.maximum(lower.abs(), upper.abs()).sum().item()
        y = torch.zeros(1, dtype=torch.int64)
        assert certify.local_lipschitz(model, x, y, eps=eps)[0, 1].item() == pytest.approx(expected, rel=1e-5)
        found = gradient_norms(model, inside(x, eps, count=200).flatten(0, 1), y.expand(200)).amax()
        assert found <= expected * (1 + 1e-5)

    @staticmethod
    def windows(pool):
        """The places that each window of the 5 x 5 image looks at."""

        def pair(value):
            return value if isinstance(value, tuple) else (value, value)

        kernel, stride, padding, dilation = map(pair, (pool.kernel_size, pool.stride, pool.padding, pool.dilation))
        axes = zip(kernel, stride, padding, dilation, strict=True)
        for top, left in itertools.product(*(range(-p, 5 + p - d * (k - 1), s) for k, s, p, d in axes)):
            rows, columns = (
                [a + d * i for i in range(k) if 0 <= a + d * i < 5]
                for a, k, d in zip((top, left), kernel, dilation, strict=True)
            )
            yield list(itertools.product(rows, columns))

    def test_eps_0_is_the_network_itself(self, trained, digits):
        x, y = digits.x_test[:200], digits.y_test[:200]
        low, high = certify.bounds(trained, x, eps=0)
        assert torch.equal(low, high)
        check_rounding(low, trained, x)
        assert certify.certified_error(trained, x, y, eps=0) == error(trained, x, y)
        model, (x, y) = network(3), problem(3)
        moved = inside(x, 1e-3, count=1)[0]  # off the ties of flat images
        torch.testing.assert_close(
            certify.local_lipschitz(model, moved, y, eps=0), gradient_norms(model, moved, y), **ROUNDING
        )

    def test_a_tie_is_not_proved(self):
        model = linear()
        nn.init.zeros_(model[1].weight)
        nn.init.zeros_(model[1].bias)
        x, y = torch.rand(3, 1, 2, 3), torch.zeros(3, dtype=torch.int64)
        assert certify.certified_error(model, x, y, eps=0.1) == 1.0
        model[1].bias.data[0] = 0.01  # a constant classifier: right for class 0, whatever the ball
        assert certify.certified_error(model, x, y, eps=1.0) == 0.0
        assert certify.certified_error(model, x, y + 1, eps=1.0) == 1.0


def plain_mlp(seed, activation, bias=True):
    torch.manual_seed(seed)
    act = models.ACTIVATIONS[activation]
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 5, bias=bias), act(), nn.Linear(5, 4), act(), nn.Linear(4, 3))


def plain_cnn(seed, activation, bias=True):
    torch.manual_seed(seed)
    act = models.ACTIVATIONS[activation]
    return nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, bias=bias), nn.MaxPool2d(2), act(), nn.Dropout(),
                         nn.Conv2d(2, 3, 2, stride=2), nn.Flatten(), nn.Linear(3, 3))  # fmt: skip


def loss_and_gradient(model, x, y):
    logits = model(x)
    loss = F.cross_entropy(logits, y)
    pieces = torch.autograd.grad(loss, list(model.parameters()))
    return logits.detach(), loss.item(), torch.cat([g.flatten() for g in pieces])


class TestWeightBox:
    @settings(max_examples=20, phases=QUICK)
    @given(
        seed=st.integers(0, 10**6),
        build=st.sampled_from([plain_mlp, plain_cnn]),
        activation=st.sampled_from(sorted(models.ACTIVATIONS)),
        bias=st.booleans(),
        radius=st.floats(0, 0.5),
    )
    def test_it_contains_every_point(self, seed, build, activation, bias, radius):
        """Uniform points, corners, and ascents of the loss and of the gradient's norm inside the box."""
        model, (x, y) = build(seed, activation, bias).double().eval(), data(seed)
        box = certify.weight_box(model, x, y, radius=radius)
        centre = [p.detach().clone() for p in model.parameters()]
        generator = torch.Generator().manual_seed(seed)
        points, split = [], centre
        for i in range(24):
            move = [torch.empty_like(c).uniform_(-1, 1, generator=generator) for c in centre]
            if i % 4 == 3:  # the corner that the last gradient points to, or away from
                sign = 1 if i % 8 == 3 else -1
                move = [sign * g.view_as(c).sign() for g, c in zip(split, centre, strict=True)]
            elif i % 2:
                move = [m.sign() for m in move]
            for p, c, m in zip(model.parameters(), centre, move, strict=True):
                p.data = c + radius * m
            logits, loss, gradient = loss_and_gradient(model, x, y)
            split = gradient.split([c.numel() for c in centre])
            assert (box.logits_low - 1e-12 <= logits).all() and (logits <= box.logits_high + 1e-12).all()
            assert box.loss_low - 1e-12 <= loss <= box.loss_high + 1e-12
            assert gradient.norm() <= box.gradient * (1 + 1e-9)
            points.append((torch.cat([p.detach().flatten() for p in model.parameters()]), loss))
        for (a, loss_a), (b, loss_b) in itertools.pairwise(points):
            assert abs(loss_a - loss_b) <= box.gradient * (a - b).norm() + 1e-12

    @pytest.mark.parametrize("build", [plain_mlp, plain_cnn])
    @pytest.mark.parametrize("activation", models.ACTIVATIONS)
    def test_radius_0_is_the_network_itself(self, build, activation):
        model, (x, y) = build(1, activation).double().eval(), data(1)
        logits, loss, gradient = loss_and_gradient(model, x, y)
        box = certify.weight_box(model, x, y, radius=0)
        for bound in (box.logits_low, box.logits_high):
            torch.testing.assert_close(bound, logits, **ROUNDING)
        assert (box.loss_low, box.loss_high, box.gradient) == pytest.approx((loss, loss, gradient.norm().item()))

    def test_a_linear_network_in_closed_form(self):
        """Pixels are not negative, so each logit is largest at the upper corner of its weights, and is reached."""
        model, (x, y) = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).double(), data(2)
        box, r = certify.weight_box(model, x, y, radius=0.1), 0.1
        move = r * (x.flatten(1).sum(1, keepdim=True) + 1)
        torch.testing.assert_close(box.logits_high, model(x) + move, **ROUNDING)
        torch.testing.assert_close(box.logits_low, model(x) - move, **ROUNDING)
        worst = model(x) + move * (1 - 2 * F.one_hot(y, 3))
        assert box.loss_high == pytest.approx(F.cross_entropy(worst, y).item(), rel=1e-12)

    def test_it_widens_with_the_radius(self):
        model, (x, y) = plain_cnn(3, "relu"), data(3)
        boxes = [certify.weight_box(model, x, y, radius=r) for r in (0, 1e-4, 0.01, 0.1, 1)]
        for a, b in itertools.pairwise(boxes):
            assert (b.logits_low <= a.logits_low).all() and (a.logits_high <= b.logits_high).all()
            assert b.loss_low <= a.loss_low and a.loss_high <= b.loss_high and a.gradient <= b.gradient

    @pytest.mark.parametrize("change, message", [
        (lambda m: m.insert(2, nn.BatchNorm1d(5)), "not nested, that share no parameter"),
        (lambda m: m.insert(2, nn.Sequential(nn.Linear(5, 5))), "not nested, that share no parameter"),
        (lambda m: m.insert(4, m[3]).insert(2, nn.Sequential(nn.Linear(5, 5))), "not nested, that share no parameter"),
        (lambda m: m.insert(4, m[3]), "not nested, that share no parameter"),
        (lambda m: m.insert(3, nn.Sigmoid()), "no interval bounds for layer Sigmoid"),
        (lambda m: m.append(nn.ReLU()), "ends in nn.Linear"),
    ])  # fmt: skip
    def test_what_it_refuses(self, change, message):
        model, (x, y) = plain_mlp(0, "relu").double().eval(), data()
        change(model)
        with pytest.raises(ValueError, match=message):
            certify.weight_box(model, x, y, radius=0.1)

    @pytest.mark.parametrize("radius", [-1, float("nan"), float("inf"), "1", True])
    def test_bad_radius(self, radius):
        with pytest.raises(ValueError, match="radius must be"):
            certify.weight_box(plain_mlp(0, "relu"), *data(), radius=radius)


MEASURES = {
    "bounds": lambda m, x, y: certify.bounds(m, x, eps=0.05),
    "margins": lambda m, x, y: certify.margin_bounds(m, x, y, eps=0.05),
    "lipschitz": lambda m, x, y: certify.local_lipschitz(m, x, y, eps=0.05),
    "weights": lambda m, x, y: certify.weight_box(m, x, y, radius=0.01),
}


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("state", STATES)
def test_neither_layout_nor_state_of_autograd_matters(measure, layout, state):
    model, (x, y) = plain_cnn(0, "relu"), data()
    expected = measure(model, LAYOUTS[layout](x).detach().contiguous(), y)
    with STATES[state]():
        given = LAYOUTS[layout](x.clone())  # in inference mode, a tensor made there
        found = measure(model, given, y.clone())
    for a, b, c in zip(expected, found, measure(model, given, y), strict=True):
        for other in (b, c):
            torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(other), rtol=0, atol=0)


class TestBall:
    def test_bounds_widen_with_eps(self):
        model, (x, y) = network(5), problem(5)
        grid = [0.0, 1e-4, 0.01, 0.1, 0.5, 1.0]
        for a, b in itertools.pairwise(grid):
            (low_a, high_a), (low_b, high_b) = (certify.bounds(model, x, eps=e) for e in (a, b))
            assert (low_b <= low_a + 1e-12).all() and (high_a <= high_b + 1e-12).all()
            for bound in (certify.margin_bounds, certify.local_lipschitz):
                assert (bound(model, x, y, eps=a) <= bound(model, x, y, eps=b) + 1e-9).all()

    def test_at_eps_1_the_ball_is_the_box(self):
        model, (x, y) = network(6), problem(6)
        others = torch.rand_like(x)
        for a, b in zip(certify.bounds(model, x, eps=1), certify.bounds(model, others, eps=1), strict=True):
            torch.testing.assert_close(a, b, **ROUNDING)
            torch.testing.assert_close(a, a[:1].expand_as(a), **ROUNDING)
        for bound in (certify.margin_bounds, certify.local_lipschitz):
            torch.testing.assert_close(bound(model, x, y, eps=1.0), bound(model, others, y, eps=1), **ROUNDING)

    def test_batches_change_nothing(self):
        model, (x, y) = network(7), problem(7, n=7)
        for bound in (certify.margin_bounds, certify.local_lipschitz):
            torch.testing.assert_close(
                bound(model, x, y, eps=0.05, batch_size=3), bound(model, x, y, eps=0.05, batch_size=100), **ROUNDING
            )


class TestPromises:
    def test_the_model_is_left_as_it_was(self):
        model, (x, y) = network(8).float(), problem(8)
        x = x.float()
        model[0].weight.requires_grad_(False)
        expected = [certify.margin_bounds(model, x, y, eps=0.05), certify.local_lipschitz(model, x, y, eps=0.05)]
        model.train()
        model[4].eval()  # a mixture of modes
        modes = [m.training for m in model.modules()]
        before = {k: v.clone() for k, v in model.state_dict().items()}
        got = [certify.margin_bounds(model, x, y, eps=0.05), certify.local_lipschitz(model, x, y, eps=0.05)]
        certify.bounds(model, x, eps=0.05)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))  # evaluation mode, whatever it was
        assert modes == [m.training for m in model.modules()]
        assert all(torch.equal(v, before[k]) and v.dtype == before[k].dtype for k, v in model.state_dict().items())
        assert [p.requires_grad for p in model.parameters()].count(False) == 1
        assert all(p.grad is None for p in model.parameters()) and not any(t.requires_grad for t in got)

    def test_worst_margins_can_be_differentiated(self):
        model, (x, y) = network(9), problem(9)
        worst = certify.worst_margins(model, x, y, eps=0.05)
        torch.testing.assert_close(worst, certify.margin_bounds(model, x, y, eps=0.05), **ROUNDING)
        (g,) = torch.autograd.grad(worst.sum(), model[0].weight)
        step = 1e-6 * torch.randn(g.shape, generator=torch.Generator().manual_seed(0), dtype=g.dtype)
        with torch.no_grad():
            model[0].weight += step
            up = certify.worst_margins(model, x, y, eps=0.05).sum()
            model[0].weight -= 2 * step
            down = certify.worst_margins(model, x, y, eps=0.05).sum()
        assert ((up - down) / 2).item() == pytest.approx((g * step).sum().item(), rel=1e-4)


def hooked():
    """Its weight is made from two others before each call: the rule for a convolution would be wrong."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(nn.Conv2d(1, 1, 1))


class Twice(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class TestBadInput:
    @pytest.mark.parametrize("layer, name", [
        (nn.Sigmoid(), "Sigmoid"), (nn.ELU(2.0), r"ELU\(alpha=2.0"), (nn.Softplus(threshold=0.5), "Softplus"),
        (nn.Softplus(beta=-1.0), "Softplus"), (nn.Softplus(beta=1e-6), "Softplus"),
        (nn.AvgPool2d(2, divisor_override=-16), "AvgPool2d.*negative divisor_override"),
        (nn.MaxPool2d(2, ceil_mode=True), "MaxPool2d.*ceil_mode"), (nn.Sequential(nn.Tanh()), "Tanh"),
        (nn.BatchNorm2d(1, track_running_stats=False), "BatchNorm2d"), (hooked(), r"Conv2d.* \(1\): hooks"),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 1, 1)), "ParametrizedConv2d"),
    ])  # fmt: skip
    def test_an_unsupported_layer_is_named(self, layer, name):
        model = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), layer, nn.Flatten(), nn.LazyLinear(2))
        x, y = torch.rand(2, 1, 4, 4), torch.tensor([0, 1])
        model(x)
        for call in (lambda: certify.bounds(model, x, eps=0.1), lambda: certify.margin_bounds(model, x, y, eps=0.1),
                     lambda: certify.local_lipschitz(model, x, y, eps=0.1)):  # fmt: skip
            with pytest.raises(ValueError, match=f"no interval bounds for (layer )?{name}"):
                call()

    def test_where_softplus_becomes_linear_it_falls_by_no_more_than_rounding(self):
        model = nn.Sequential(nn.Flatten(), nn.Linear(1, 1), nn.Softplus(beta=1e-6, threshold=36)).double()
        model[1].weight.data.fill_(2e6), model[1].bias.data.fill_(35e6)  # 36e6 at x = 0.5
        x = torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64)
        low, high = certify.bounds(model, x, eps=1e-9)
        values = model(inside(x, 1e-9, count=400).flatten(0, 1))
        assert low - 1e-8 <= values.min() and values.max() <= high + 1e-8  # 1e-8 is one unit in the last place

    def test_backward_hooks_are_refused_where_gradients_are_bounded(self):
        x, y = torch.rand(2, 1, 2, 3), torch.tensor([0, 1])
        model, plain = (nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)) for _ in range(2))
        plain.load_state_dict(model.state_dict())
        model[3].register_full_backward_hook(lambda *_: None)  # the last layer is not differentiated
        bound = certify.local_lipschitz(plain, x, y, eps=0.1)
        assert torch.equal(certify.local_lipschitz(model, x, y, eps=0.1), bound)
        for register in ("register_full_backward_hook", "register_full_backward_pre_hook"):
            handle = getattr(model[1], register)(lambda *_: None)
            assert torch.equal(certify.bounds(model, x, eps=0.1)[0], certify.bounds(plain, x, eps=0.1)[0])
            for call in (lambda: certify.local_lipschitz(model, x, y, eps=0.1),
                         lambda: certify.weight_box(model, x, y, radius=0.1)):  # fmt: skip
                with pytest.raises(ValueError, match=r"no interval bounds for layer Linear.* \(1\): .*backward hooks"):
                    call()
            handle.remove()

    @pytest.mark.parametrize("first", [nn.Flatten(0, 1), nn.Flatten(2)])
    def test_what_are_no_logits_of_the_images_is_refused(self, first):
        model = nn.Sequential(first, nn.Flatten() if first.start_dim == 0 else nn.Identity(), nn.Linear(16, 3))
        x, y = torch.rand(4, 2, 4, 4), torch.arange(4) % 3
        for call in (lambda: certify.bounds(model, x, eps=0.1), lambda: certify.margin_bounds(model, x, y, eps=0.1)):
            with pytest.raises(ValueError, match=r"the model must return logits \([14], classes\), got \("):
                call()

    def test_what_has_no_bound_is_not_proved(self):
        """An infinite weight behind a ReLU: the logits are finite, the labels wrong, and the bounds NaN."""
        model = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        model[1].weight.data[0, 0] = -torch.inf
        x = torch.rand(3, 1, 2, 2) / 2 + 0.3
        y = 1 - model(x).argmax(1)
        assert certify.certified_error(model, x, y, eps=0.1) == 1.0
        (low, high), margins = certify.bounds(model, x, eps=0.1), certify.margin_bounds(model, x, y, eps=0.1)
        assert (low <= model(x)).all() and (model(x) <= high).all() and not high.isfinite().any()
        rows = torch.arange(len(y))
        assert (margins[rows, 1 - y] == torch.inf).all() and certify.local_lipschitz(model, x, y, eps=0.1).max() > 1e300

    def test_training_mode_is_refused_where_it_matters(self):
        x, y = torch.rand(2, 1, 4, 4), torch.tensor([0, 1])
        for layer, reason in (
            (nn.Dropout(), "in training mode it is random"),
            (nn.BatchNorm1d(16), "mixes the inputs"),
        ):
            model = nn.Sequential(nn.Flatten(), layer, nn.Linear(16, 2))
            assert torch.isfinite(certify.worst_margins(model.eval(), x, y, eps=0.1)).all()
            with pytest.raises(ValueError, match=rf"layer {type(layer).__name__}.* \(1\): .*{reason}"):
                certify.worst_margins(model.train(), x, y, eps=0.1)

    @pytest.mark.parametrize("eps", [-0.1, float("nan"), 1.5])
    def test_margins_for_training_are_of_a_ball_of_pixels(self, eps):
        model, x, y = nn.Sequential(nn.Flatten(), nn.Linear(6, 2)), torch.rand(2, 1, 2, 3), torch.tensor([0, 1])
        with pytest.raises(ValueError, match="eps "):
            certify.worst_margins(model, x, y, eps=eps)
        for wrong in (x - 1, 255 * x, x * float("nan")):
            with pytest.raises(ValueError, match=r"x must lie in \[0, 1\]"):
                certify.worst_margins(model, wrong, y, eps=0.1)

    def test_weights_that_are_nan(self):
        model, x, y = nn.Sequential(nn.Flatten(), nn.Linear(6, 2)), torch.rand(2, 1, 2, 3), torch.tensor([0, 1])
        model[1].weight.data[0, 0] = float("nan")
        for call in (lambda: certify.bounds(model, x, eps=0.1), lambda: certify.certified_error(model, x, y, eps=0.1)):
            with pytest.raises(ValueError, match="the model returned NaN"):
                call()

    @pytest.mark.parametrize("batch_size", [0, 2.5, -1])
    def test_batches_are_counted(self, batch_size):
        model, x, y = nn.Sequential(nn.Flatten(), nn.Linear(6, 2)), torch.rand(2, 1, 2, 3), torch.tensor([0, 1])
        for call in (
            lambda: certify.bounds(model, x, eps=0.1, batch_size=batch_size),
            lambda: certify.margin_bounds(model, x, y, eps=0.1, batch_size=batch_size),
            lambda: certify.local_lipschitz(model, x, y, eps=0.1, batch_size=batch_size),
        ):
            with pytest.raises(ValueError, match="batch_size must be an integer >= 1"):
                call()

    def test_a_subclass_may_compute_something_else(self):
        with pytest.raises(ValueError, match="no interval bounds for layer Twice"):
            certify.bounds(nn.Sequential(nn.Flatten(), Twice(6, 2)), torch.rand(1, 1, 2, 3), eps=0.1)

    @pytest.mark.parametrize("model", [models.lenet(1)[:-1], nn.Sequential(), nn.Linear(3, 2)])
    def test_margins_need_a_linear_layer_at_the_end(self, model):
        with pytest.raises(ValueError, match=r"must be an nn\.Sequential that ends in nn\.Linear"):
            certify.worst_margins(model, torch.rand(2, 1, 28, 28), torch.tensor([0, 1]), eps=0.1)

    @pytest.mark.parametrize("eps, message", [
        (-0.1, "eps must be finite and not negative"), (float("nan"), "eps must be finite"), (8, "write 8/255, not 8"),
        ("0.1", "eps must be a number, got str"),
    ])  # fmt: skip
    def test_bad_eps(self, eps, message):
        x, y = torch.rand(2, 1, 2, 3), torch.tensor([0, 1])
        with pytest.raises(ValueError, match=message):
            certify.bounds(linear(), x, eps=eps)
        for function in (certify.margin_bounds, certify.certified_error, certify.local_lipschitz):
            with pytest.raises(ValueError, match=message):
                function(linear(), x, y, eps=eps)

    @pytest.mark.parametrize("x, y, message", [
        (torch.rand(2, 1, 2, 3) + 1, [0, 1], r"x must lie in \[0, 1\]"),
        (torch.rand(2, 6), [0, 1], r"x must be a tensor \(B, C, H, W\)"),
        (torch.ones(2, 1, 2, 3, dtype=torch.uint8), [0, 1], "x must be float"),
        (torch.rand(2, 1, 2, 3), [0, 4], "labels run from 0 to 4, but the model has 4 classes"),
        (torch.rand(2, 1, 2, 3), [-1, 0], "labels run from -1 to 0"),
        (torch.rand(2, 1, 2, 3), [0, 1, 2], "y must be int64 labels of shape"),
        (torch.rand(2, 1, 2, 3), [0.0, 1.0], "y must be int64 labels"),
    ])  # fmt: skip
    def test_bad_inputs_and_labels(self, x, y, message):
        for function in (certify.margin_bounds, certify.certified_error, certify.local_lipschitz):
            with pytest.raises(ValueError, match=message):
                function(linear(), x, torch.tensor(y), eps=0.1)

    def test_a_broken_model(self):
        model, x, y = linear(), torch.rand(2, 1, 2, 3), torch.tensor([0, 1])
        with pytest.raises(ValueError, match=r"model must be an nn\.Module, got function"):
            certify.margin_bounds(lambda x: x, x, y, eps=0.1)
        model[1].weight.data[0, 0] = float("nan")
        with pytest.raises(ValueError, match="NaN or infinite logits"):
            certify.certified_error(model, x, y, eps=0.1)


class TestTraining:
    @pytest.fixture(scope="class")
    def data(self):
        """Noise with a bright band at a place that depends on the class."""
        g = torch.Generator().manual_seed(0)
        y = torch.arange(240) % 3
        x = 0.5 * torch.rand(240, 1, 28, 28, generator=g)
        for k in range(3):
            x[y == k, :, 8 * k + 2 : 8 * k + 6] += 0.4
        return Data(x[:200], y[:200], x[200:], y[200:], "stripes")

    def test_a_step_is_the_mixture(self, data, tmp_path, monkeypatch):
        """The first step at a budget of half of eps against autograd on the formula written out."""
        monkeypatch.setenv("PRECISION", "float32")
        config = replace(CONFIG, schedule_start=0.05, optimizer="sgd", momentum=0.0, epochs=1, batch_size=200)
        run = train(config, data, folder=tmp_path)
        model = run.model(0)
        x, y = data.x_train, data.y_train
        worst = certify.worst_margins(model, x, y, eps=0.05)
        loss = 0.75 * F.cross_entropy(model(x), y) + 0.25 * F.cross_entropy(worst, y)
        loss.backward()
        eps, measured, wrong, norm = run.steps.iloc[0]
        assert (eps, measured) == pytest.approx((0.05, loss.item()), rel=1e-5)
        assert wrong == pytest.approx(certify.certified_error(model, x, y, eps=0.05), abs=1e-9)
        assert norm == pytest.approx(torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item(), rel=1e-4)
        for before, after in zip(model.parameters(), run.model().parameters(), strict=True):
            torch.testing.assert_close(after, before - config.lr * before.grad, atol=1e-6, rtol=1e-5)

    def test_a_run_that_is_cut_off_ends_in_the_same_bits(self, data, tmp_path, monkeypatch):
        train(CONFIG, data, folder=tmp_path / "whole")
        epoch = training._State.train_epoch

        def stop(state):
            if state.epoch == 2:
                raise KeyboardInterrupt
            epoch(state)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(training._State, "train_epoch", stop)
            train(CONFIG, data, folder=tmp_path / "cut")
        assert (tmp_path / "cut" / "checkpoint.safetensors").exists()
        train(CONFIG, data, folder=tmp_path / "cut")
        for path in set((tmp_path / "whole").iterdir()) - {tmp_path / "whole" / "made.json"}:  # that says when
            assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes(), path.name

    def test_it_proves_what_other_training_does_not(self, data, tmp_path):
        config, (x, y) = replace(CONFIG, eps=0.05, epochs=8, batch_size=20), (data.x_test, data.y_test)
        net = train(config, data, folder=tmp_path / "interval").model()
        plain = train(replace(config, objective="attack"), data, folder=tmp_path / "attack").model()
        proved, other = (certify.certified_error(m, x, y, eps=0.05) for m in (net, plain))
        attack = robust_error(net, x, y, lambda *b: pgd(*b, eps=0.05, step_size=0.02, num_steps=10))
        assert attack <= proved < 0.5 < other

    @pytest.mark.parametrize("change, message", [
        ({"objective": "crown"}, "unknown objective 'crown': choose one of attack, interval"),
        ({"norm": "l2"}, "interval training is for a linf ball of eps > 0, got l2"),
        ({"eps": 0.0, "schedule": "constant"}, "interval training is for a linf ball of eps > 0, got linf and eps 0.0"),
    ])  # fmt: skip
    def test_bad_config(self, change, message):
        with pytest.raises(ValueError, match=message):
            replace(CONFIG, **change)

    def test_batch_normalisation_is_refused_before_anything_runs(self):
        with pytest.raises(ValueError, match="batch normalisation mixes the inputs of resnet18"):
            replace(CONFIG, model="resnet18")
