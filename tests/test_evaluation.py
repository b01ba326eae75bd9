"""Error, robust error and layer activity against counting by hand."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from kinds import check_rounding
from torch import nn

from lib import audit
from lib.attacks import pgd
from lib.evaluation import attacked, error, evaluate, predict, robust_error, unit_activity, wrong


def linear_model(w):
    layer = nn.Linear(len(w), 2)
    layer.weight.data = torch.stack([torch.zeros(len(w)), torch.tensor(w)])
    layer.bias.data = torch.tensor([0.0, -0.5])
    return nn.Sequential(nn.Flatten(), layer)


@pytest.fixture
def one_pixel():
    """Class 1 above 0.5: an image is at risk exactly when it is within eps of 0.5."""
    x = torch.tensor([0.1, 0.3, 0.45, 0.55, 0.7, 0.9, 0.2, 0.8]).view(-1, 1, 1, 1)
    y = torch.tensor([0, 0, 0, 1, 1, 1, 1, 0])  # the last two are labelled wrongly
    return linear_model([1.0]), x, y


@pytest.mark.parametrize(
    "eps, expected", [(0.0, 2 / 8), (0.04, 2 / 8), (0.06, 4 / 8), (0.19, 4 / 8), (0.21, 6 / 8), (0.41, 1.0)]
)
@pytest.mark.parametrize("batch_size", [3, 8, 500])
def test_robust_error_of_thresholds(one_pixel, eps, expected, batch_size):
    attack = partial(pgd, eps=eps, step_size=0.05, num_steps=15, precision="full")
    assert error(*one_pixel, batch_size=batch_size) == 2 / 8
    assert robust_error(*one_pixel, attack, batch_size=batch_size) == expected


def test_evaluate_agrees_with_its_parts(trained, digits):
    x, y = digits.x_test[:90], digits.y_test[:90]
    found = evaluate(trained, x, y, eps=0.1, step_size=0.03, num_steps=4, seed=5, batch_size=40)
    attack = partial(pgd, eps=0.1, step_size=0.03, num_steps=4, generator=torch.Generator().manual_seed(5))
    x_adv = attacked(trained, x, y, attack, batch_size=40)
    with torch.no_grad():
        clean, adversarial = trained(x), trained(x_adv)
    assert found == {
        "clean_error": sum((clean.argmax(1) != y).tolist()) / 90,
        "robust_error": sum((adversarial.argmax(1) != y).tolist()) / 90,
        "robust_loss": pytest.approx(F.cross_entropy(adversarial, y).item(), rel=1e-5),
    }
    assert evaluate(trained, x, y, eps=0.1, step_size=0.03, num_steps=4, seed=5, batch_size=40) == found
    assert found["robust_error"] > found["clean_error"]


def test_no_attack_is_no_robust_error(one_pixel):
    with pytest.raises(ValueError, match=r"attack must be a function .* got None; `error` is without one"):
        robust_error(*one_pixel, None)


@pytest.mark.parametrize("value", [1.01, -1e-3, float("nan"), float("inf")])
def test_an_attack_that_leaves_the_box_breaks_nothing(one_pixel, value):
    with pytest.raises(ValueError, match=r"an attack must stay in \[0, 1\], got values from"):
        robust_error(*one_pixel, lambda m, x, y: torch.full_like(x, value))


class Tosses(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x.flatten(1)[:, :4].repeat(1, 3), 0.5)  # also in evaluation mode


class Remembers(nn.Module):
    def __init__(self):
        super().__init__()
        self.before = [0]

    def forward(self, x):
        self.before.append(0.5 * self.before[-1] + x.mean())
        return x.flatten(1)[:, :4] + self.before[-1]


class Flips(nn.Module):
    """One coin a batch: it answers alike every other time."""

    def forward(self, x):
        return (x.flip(-1) if torch.rand(()) < 0.5 else x).flatten(1)[:, 300:304].cumsum(1)


class Hides(Tosses):
    """Most of its classes are masked by numbers that are far larger than the others."""

    def forward(self, x):
        return super().forward(x).masked_fill(torch.arange(12) > 4, -1e9)


@pytest.mark.parametrize("kind", [Tosses, Remembers, Flips, Hides])
def test_models_that_change_their_answers_are_refused(kind, digits):
    x, y = digits.x_test[:20].clamp_min(0.3), torch.zeros(20, dtype=torch.int64)
    attack = partial(pgd, eps=1e-6, step_size=1e-6, num_steps=1)
    for function in (robust_error, wrong, audit.first_falls):
        with pytest.raises(ValueError, match="answers the same images differently when it is asked again"):
            function(kind(), x, y, attack)


class ByPlace(nn.Module):
    """The same noise in each batch: what an image is answered depends on its place."""

    def forward(self, x):
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        return (x + 0.5 * noise).flatten(1)[:, :4]


class ByCompany(nn.Module):
    def forward(self, x):
        return (x - x.mean(0)).flatten(1)[:, 300:304]


@pytest.mark.parametrize("kind", [ByPlace, ByCompany])
def test_models_that_do_not_judge_each_image_by_itself_are_refused(kind, digits):
    """An attack that does nothing would break some: the images that are attacked stand in another batch."""
    x, y = digits.x_test[:40], torch.zeros(40, dtype=torch.int64)
    for function in (robust_error, wrong, audit.first_falls):
        with pytest.raises(ValueError, match="hangs on its place in the batch, or on the other images"):
            function(kind(), x, y, lambda m, x, y: x)
        unknown = torch.nn.Sequential(torch.nn.BatchNorm2d(1, track_running_stats=False), torch.nn.Flatten())
        with pytest.raises(ValueError, match=r"module '0' \(BatchNorm2d\) has no running statistics"):
            function(unknown, x, y, lambda m, x, y: x)


@pytest.mark.parametrize("draws", [True, False])
def test_models_that_seed_the_generator_are_refused(draws, digits):
    """Of an attack's restarts all but the first were the same. One that puts the generator back is like any other."""

    class Seeds(nn.Module):
        def forward(self, x):
            torch.manual_seed(3)
            return (x + 0.1 * torch.randn(x.shape[1:]) * draws).flatten(1)[:, 300:304].cumsum(1)

    class Forks(Seeds):
        def forward(self, x):
            with torch.random.fork_rng():
                return super().forward(x)

    x, y, state = digits.x_test[:20], torch.zeros(20, dtype=torch.int64), torch.get_rng_state()
    for function in (robust_error, wrong, audit.first_falls):
        with pytest.raises(ValueError, match="the model seeds PyTorch's generator, from which attacks draw, too"):
            function(Seeds(), x, y, lambda m, x, y: x)
        assert function(Forks(), x, y, lambda m, x, y: x) is not None
    torch.set_rng_state(state)
    wrong(Forks(), x, y, lambda m, x, y: x)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16])
def test_models_that_compute_in_a_coarse_type_are_not(low, trained, digits):
    class Coarse(nn.Module):
        def forward(self, x):
            with torch.autocast("cpu", low):
                return trained(x)

    assert robust_error(Coarse(), digits.x_test[:40], digits.y_test[:40], lambda m, x, y: x) <= 1


def test_rounding_out_of_the_box_is_taken_back(trained, digits):
    x, y = digits.x_test[:20], digits.y_test[:20]
    found = attacked(trained, x, y, lambda m, x, y: (x - 0.5) * (1 + 4e-7) + 0.5)
    assert found.min() == 0 and found.max() == 1 and torch.allclose(found, x, atol=1e-6)


def test_all_images_are_looked_at_before_the_first_is_attacked(trained, digits):
    seen = []
    for bad in (1.5, float("nan")):
        x = digits.x_test[:60].clone()
        x[59, 0, 3, 3] = bad
        for function in (robust_error, attacked, audit.first_falls):
            with pytest.raises(ValueError, match=r"x must lie in \[0, 1\]"):
                function(trained, x, digits.y_test[:60], lambda m, a, b: seen.append(a) or a, batch_size=20)
    assert not seen


def test_predict_is_the_model_in_evaluation_mode_in_batches():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Dropout(), nn.Flatten(), nn.Linear(48, 4)).train()
    x = torch.rand(10, 1, 6, 6)
    logits = predict(model, x, batch_size=3)
    assert model.training and not logits.requires_grad
    check_rounding(logits, model, x)


def test_unit_activity():
    # Unit 0 is dead, unit 1 is constant, unit 2 moves; the logits are all constant.
    first, last = nn.Linear(1, 3), nn.Linear(3, 2)
    first.weight.data, first.bias.data = torch.tensor([[-1.0], [0.0], [1.0]]), torch.tensor([0.0, 2.0, 0.0])
    last.weight.data.zero_()
    model = nn.Sequential(nn.Flatten(), first, nn.ReLU(), last)
    hidden, logits = unit_activity(model, torch.linspace(0.1, 1, 7).view(-1, 1, 1, 1), batch_size=2)
    assert hidden == {"layer": "2", "units": 3, "dead": pytest.approx(1 / 3), "constant": pytest.approx(2 / 3)}
    assert (logits["layer"], logits["units"], logits["constant"]) == ("logits", 2, 1.0)
    assert not model[2]._forward_hooks and not model._forward_hooks


@pytest.mark.parametrize("call, message", [
    (lambda m, x, y: predict(m, x[:0]), "not a single input"),
    (lambda m, x, y: attacked(m, x[:0], y[:0], None), "no data"),
    (lambda m, x, y: error(m, x, y[:3]), r"y must be int64 labels of shape \(8,\), got torch.int64 \(3,\)"),
    (lambda m, x, y: wrong(m, x, y[:, None]), r"y must be int64 labels of shape \(8,\), .* \(8, 1\)"),
    (lambda m, x, y: evaluate(m, x, y, eps=8, step_size=0.1, num_steps=1), "write 8/255, not 8"),
])  # fmt: skip
def test_bad_input(one_pixel, call, message):
    with pytest.raises(ValueError, match=message):
        call(*one_pixel)


class Prepares(nn.Module):
    """A linear layer behind some preparation of the images."""

    def __init__(self, prepare):
        super().__init__()
        self.prepare, self.layer = prepare, nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(self.prepare(x).flatten(1))


def test_a_model_that_works_in_place_leaves_the_images():
    x = torch.rand(5, 1, 2, 2)
    before = x.clone()
    predict(Prepares(lambda x: x.sub_(0.5)), x)
    assert torch.equal(x, before)


def test_integer_images_keep_logits_as_they_are():
    x = torch.randint(0, 256, (5, 1, 2, 2), dtype=torch.uint8)
    model = Prepares(lambda x: x.float() / 255)
    assert torch.equal(predict(model, x), model(x).detach())
