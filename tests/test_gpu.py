"""What is captured for a GPU, against the same steps on the CPU; and, where there is a GPU, training on it."""

from dataclasses import replace
from functools import partial

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


@pytest.fixture(autouse=True)
def in_float32(monkeypatch):
    monkeypatch.setenv("PRECISION", "float32")
    for name in ("allow_tf32", "deterministic"):  # put back afterwards
        monkeypatch.setattr(torch.backends.cudnn, name, getattr(torch.backends.cudnn, name))
    compute.fix_arithmetic()


@pytest.mark.parametrize("name", KINDS)
def test_what_is_captured_is_a_step_of_training_bit_for_bit(name, monkeypatch):
    """On the CPU both ways can be gone: with graphs in the place of which the function itself is called."""
    config, images = KINDS[name]
    monkeypatch.setattr(training, "device", lambda: torch.device("cpu"))

    class Uncaptured(captured.Captured):
        def __call__(self, x_adv, y, low, high, step_size):
            return captured.gradients_at_worst(self.model, self.loss_at, self.num_steps, x_adv, y, low, high, step_size)

    plain, other = (training._State(config, images()) for _ in range(2))
    other.captured = Uncaptured(other.model, other.loss_at, config.num_steps)
    for state in (plain, other):
        for _ in range(2):
            state.train_epoch()
    assert plain.steps == other.steps and len(plain.steps) > 6
    tensors = (state.model.state_dict().values() for state in (plain, other))
    assert all(torch.equal(a, b) for a, b in zip(*tensors, strict=True))


def test_only_what_a_graph_can_hold_is_captured(monkeypatch):
    """Not budgets whose projection is computed from eps, not bounds, and nothing on a CPU."""
    monkeypatch.setattr(training, "predict", lambda *_: None)
    changes = ({}, {"eps": 0.0, "schedule": "constant"}, {"norm": "l2"}, {"objective": "interval"})
    for where, expected in (("meta", [True, False, False, False]), ("cpu", [False] * 4)):
        monkeypatch.setattr(training, "device", partial(torch.device, where))
        states = [training._State(replace(CONFIG, **change), stripes()) for change in changes]
        assert [state.captured is not None for state in states] == expected


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
    @pytest.mark.parametrize("name", KINDS)
    def test_a_captured_epoch_is_one_operation_by_operation(self, name):
        config, images = KINDS[name]
        states = [training._State(config, images()) for _ in range(2)]
        states[1].captured = None
        for state in states:
            state.train_epoch()
        whole, single = (torch.tensor(state.steps) for state in states)
        assert whole == pytest.approx(single, rel=2e-3, abs=2e-3)
        assert len({state.model.training for state in states}) == 1

    @pytest.mark.parametrize("name", KINDS)
    def test_two_runs_are_one_bit_for_bit(self, name, tmp_path):
        config, images = KINDS[name]
        for folder in ("a", "b"):
            train(config, images(), folder=tmp_path / folder, quiet=True)
        assert bits(tmp_path / "a") == bits(tmp_path / "b")

    def test_attacks_find_what_they_find_on_a_cpu(self, tmp_path):
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
