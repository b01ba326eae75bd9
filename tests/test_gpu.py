"""What is captured for a GPU, against the same steps on the CPU; and, where there is a GPU, training on it."""

import weakref
from dataclasses import replace

import pytest
import torch
from test_training import bits, stripes

from lib import attacks, captured, compute, data, models, training
from lib.curvature import top_eigenpairs
from lib.evaluation import evaluate
from lib.training import TrainConfig, train

CONFIG = TrainConfig(width=1, eps=0.2, step_size=0.1, num_steps=3, epochs=3, batch_size=48, optimizer="sgd", lr=0.05,
                     schedule="cosine", eval_images=40)  # fmt: skip
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def photographs(n=200):
    g = torch.Generator().manual_seed(1)
    y = torch.arange(n) % 3
    x = 0.5 * torch.rand(n, 3, 32, 32, generator=g)
    for k in range(3):
        x[y == k, k] += 0.4
    return data.Data(x[:-40], y[:-40], x[-40:], y[-40:], "three colours")


KINDS = {"lenet": (CONFIG, stripes), "vgg16": (replace(CONFIG, model="vgg16", augment=True), photographs),
         "resnet18": (replace(CONFIG, model="resnet18", augment=True), photographs)}  # fmt: skip


class Uncaptured(captured.Captured):
    """What a graph replays, without one: on the CPU too."""

    def __call__(self, x_adv, y, low, high, step_size):
        return captured.gradients_at_worst(self.model, self.num_steps, x_adv, y, low, high, step_size)


def uncaptured(name, monkeypatch, **change):
    """The state of a training that goes the way of graphs."""
    config, images = KINDS[name]
    monkeypatch.setattr(training, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(training, "Captured", Uncaptured)
    monkeypatch.setattr(training, "capturable", lambda *_: True)
    return training._State(config, replace(images(), **change))


@pytest.mark.parametrize("name", KINDS)
def test_what_is_captured_is_a_step_of_training_bit_for_bit(name, monkeypatch):
    """On the CPU both ways can be gone: with graphs in the place of which the function itself is called."""
    other = uncaptured(name, monkeypatch)
    plain = uncaptured(name, monkeypatch)
    plain.captured = None
    for state in (plain, other):
        for _ in range(2):
            state.train_epoch()
    assert plain.steps == other.steps and len(plain.steps) > 6
    tensors = (state.model.state_dict().values() for state in (plain, other))
    assert all(torch.equal(a, b) for a, b in zip(*tensors, strict=True))


def test_only_what_a_graph_can_hold_is_captured():
    """Not budgets whose projection is computed from eps, not bounds, not training without attack; nothing on a CPU."""
    changes = ({}, {"eps": 0.0, "schedule": "constant"}, {"norm": "l2"}, {"objective": "interval"})
    for where, expected in (("cuda", [True, False, False, False]), ("cpu", [False] * 4)):
        asked = [training.capturable(replace(CONFIG, **change), torch.device(where)) for change in changes]
        assert asked == expected


def test_what_a_graph_cannot_refuse_is_refused_before_or_after(monkeypatch):
    images = stripes()
    for change, message in (({"x_train": images.x_train * 255}, r"x must lie in \[0, 1\]"),
                            ({"y_train": images.y_train - 1}, "labels run from -1, below 0")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            uncaptured("lenet", monkeypatch, **change)

    def blind(logits_of, x_adv, y, loss):  # as while a graph is captured
        leaf = x_adv.detach().requires_grad_()
        return torch.autograd.grad(loss(logits_of(leaf), y).sum(), leaf)[0], None

    monkeypatch.setattr(captured, "input_gradient", blind)
    state = uncaptured("vgg16", monkeypatch)
    state.model[1].running_var.fill_(float("nan"))  # of evaluation mode alone, in which the attack sees the network
    with pytest.raises(ValueError, match="it diverged: loss nan"):
        state.train_epoch()


def test_a_state_is_gone_with_its_last_reference(monkeypatch):
    """And its graphs with it: one that is collected later may die inside the capture of another."""
    state = weakref.ref(uncaptured("lenet", monkeypatch))
    assert state() is None


@pytest.fixture
def convolutions():
    """cuDNN's settings, to be changed."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark, cudnn.conv.fp32_precision
    yield cudnn
    cudnn.deterministic, cudnn.benchmark, cudnn.conv.fp32_precision = before


@pytest.mark.parametrize("mine", ["none", "ieee", "tf32"])
def test_the_callers_settings_of_convolutions_are_put_back(mine, convolutions):
    def settings():
        return convolutions.deterministic, convolutions.benchmark, convolutions.conv.fp32_precision

    seen = []
    # By the new names, which PyTorch's own context refuses to read together with the old ones.
    convolutions.benchmark, convolutions.conv.fp32_precision = True, mine
    with pytest.raises(KeyboardInterrupt), compute.exact_products():
        compute.exact_products()(lambda: seen.append(settings()))()
        seen.append(settings())
        raise KeyboardInterrupt
    assert seen == [(True, False, "ieee")] * 2 and settings() == (False, True, mine)


WAYS = [("cpu", "cpu"), *(pytest.param(*way, marks=needs_gpu) for way in (("cpu", "cuda"), ("cuda", "cpu")))]


@pytest.mark.parametrize(("first", "then"), WAYS)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_run_goes_on_where_there_is_another_device(first, then, optimizer, tmp_path, monkeypatch):
    config, whole, seen = replace(CONFIG, optimizer=optimizer, lr=1e-2), training._State.train_epoch, []

    def watched(state):
        moments = [t for s in state.optimizer.state_dict()["state"].values() for _, t in sorted(s.items())]
        seen.append([t.detach().cpu().clone() for t in (*state.model.state_dict().values(), *moments)])
        if len(seen) == 3:
            raise KeyboardInterrupt
        whole(state)

    monkeypatch.setattr(training._State, "train_epoch", watched)
    monkeypatch.setattr(training, "device", lambda: torch.device(first))
    with pytest.raises(KeyboardInterrupt):
        train(config, stripes(), folder=tmp_path, quiet=True)
    monkeypatch.setattr(training, "device", lambda: torch.device(then))
    run = train(config, stripes(), folder=tmp_path, quiet=True)
    assert [len(seen), len(run.history), len(run.steps)] == [4, 3, 3 * 5]
    before, after = seen[2:]  # weights and moments, bit for bit
    assert len(before) == len(after) and all(map(torch.equal, before, after))


@needs_gpu
class TestOnAGpu:
    @pytest.mark.parametrize(("precision", "near"), [("float32", 1e-5), ("bfloat16", 1e-2)])
    @pytest.mark.parametrize("name", KINDS)
    def test_a_captured_epoch_is_one_operation_by_operation(self, name, precision, near, monkeypatch):
        monkeypatch.setenv("PRECISION", precision)
        config, images = KINDS[name]
        states = [training._State(config, images()) for _ in range(2)]
        states[1].captured = None
        with compute.exact_products():
            for state in states:
                state.train_epoch()
        assert len(states[0].captured.graphs) == 2  # one for the last mini-batch, which is smaller
        whole, single = (torch.tensor(state.steps) for state in states)
        assert whole == pytest.approx(single, rel=near, abs=near)
        tensors = (state.model.state_dict().values() for state in states)
        assert all(torch.allclose(a.float(), b.float(), rtol=near, atol=near) for a, b in zip(*tensors, strict=True))

    @pytest.mark.parametrize("name", KINDS)
    def test_two_runs_are_one_bit_for_bit(self, name, tmp_path, monkeypatch):
        monkeypatch.setenv("PRECISION", "float32")
        config, images = KINDS[name]
        for folder in ("a", "b"):
            train(config, images(), folder=tmp_path / folder, quiet=True)
        assert bits(tmp_path / "a") == bits(tmp_path / "b")

    def test_attacks_find_what_they_find_on_a_cpu(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PRECISION", "float32")
        images = stripes()
        run = train(CONFIG, images, folder=tmp_path, quiet=True)
        found = []
        for where in ("cpu", "cuda"):
            model, x, y = run.model().to(where), images.x_test.to(where), images.y_test.to(where)
            settings = {"eps": 0.2, "step_size": 0.05, "num_steps": 10, "random_start": False}
            x_adv = attacks.pgd(model, x, y, **settings)
            other = attacks.autoattack(model, x, y, eps=0.2, num_steps=10, num_queries=50)
            assert x_adv.device.type == other.device.type == where
            errors = evaluate(model, x, y, eps=0.2, step_size=0.05, num_steps=10)
            some = images.x_train[:50].to(where), images.y_train[:50].to(where)
            found.append((x_adv.cpu(), errors["clean_error"], top_eigenpairs(model, *some, k=3).values.cpu()))
        (a, clean, values), (b, other_clean, other_values) = found
        assert ((a - b).abs() < 1e-5).double().mean() > 0.97 and clean == other_clean
        assert torch.allclose(values, other_values, rtol=1e-3)

    def test_bfloat16_does_not_weaken_the_attack(self, tmp_path, monkeypatch):
        images = stripes()
        run = train(CONFIG, images, folder=tmp_path, quiet=True)
        model, x, y = run.model().cuda(), images.x_test.cuda(), images.y_test.cuda()
        monkeypatch.setenv("PRECISION", "bfloat16")
        settings = {"eps": 0.2, "step_size": 0.05, "num_steps": 10, "random_start": False}
        wrong = [
            (models.Ensemble([model])(attacks.pgd(model, x, y, precision=p, **settings)).argmax(1) != y).double().mean()
            for p in ("auto", "full")
        ]
        assert wrong[0] >= wrong[1] - 0.05
