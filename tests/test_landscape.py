"""Directions, surfaces, scatter and curves against closed forms and the textbook way (a deep copy at each point)."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kinds import LAYOUTS, MODULES, STATES, data, module
from torch import nn
from torch.func import functional_call

from lib.attacks import pgd
from lib.curvature import Hessian, top_eigenpairs
from lib.landscape import (
    Curve,
    along,
    barrier,
    connect,
    descent_direction,
    eigen_directions,
    flat,
    move,
    random_directions,
    scatter,
    surface,
)

ATTACK = partial(pgd, eps=0.1, step_size=0.04, num_steps=3, random_start=False, precision="full")
STEPS = np.linspace(-1, 1, 5)


def network(seed=0, *, batchnorm=False):
    """A small convolutional network in float64, with its data: (model, x, y)."""
    torch.manual_seed(seed)
    norm = [nn.BatchNorm2d(4)] if batchnorm else []
    model = nn.Sequential(nn.Conv2d(1, 4, 3), *norm, nn.Softplus(), nn.Flatten(), nn.Linear(16, 3))
    x, y = torch.rand(31, 1, 4, 4), torch.randint(3, (31,))
    model(x)
    return model.double().eval(), x.double(), y


def textbook(model, theta, x, y):
    """Loss and error at theta, by a copy of the model and one forward pass."""
    moved = copy.deepcopy(model)
    start = 0
    for p in moved.parameters():
        p.data = theta[start : start + p.numel()].view_as(p).clone()
        start += p.numel()
    logits = moved(x)
    return F.cross_entropy(logits, y).item(), (logits.argmax(1) != y).double().mean().item(), moved


def test_each_filter_of_a_direction_has_the_norm_of_the_model_s():
    model, _, _ = network(batchnorm=True)
    for direction in random_directions(model, 3):
        moved = copy.deepcopy(model)
        move(moved, direction)
        for d, p in zip(moved.parameters(), model.parameters(), strict=True):
            if p.dim() < 2:
                assert not d.any()
            else:
                assert torch.allclose(d.flatten(1).norm(dim=1), p.flatten(1).norm(dim=1), rtol=1e-12)


def test_directions_differ_and_follow_the_seed():
    model, _, _ = network()
    a, b = random_directions(model, 2, seed=3)
    assert abs(F.cosine_similarity(a, b, dim=0)) < 0.5
    assert torch.equal(torch.stack([a, b]), random_directions(model, 2, seed=3))
    assert not torch.equal(a, random_directions(model, 1, seed=4)[0])


def test_eigen_directions_are_eigenvectors_of_a_filter_normalised_length():
    model, x, y = network()
    directions = eigen_directions(model, x, y, 2, dtype=torch.float64)
    values, _, _ = top_eigenpairs(model, x, y, 2, dtype=torch.float64)
    operator = Hessian(model, x, y, dtype=torch.float64)
    weights = torch.cat([p.flatten() for p in model.parameters() if p.dim() > 1])
    for value, d in zip(values, directions, strict=True):
        assert torch.allclose(d.norm(), weights.norm(), rtol=1e-9)
        assert (operator(d) - value * d).norm() < 1e-3 * values[0] * d.norm()


def test_descent_direction_is_minus_the_gradient():
    model, x, y = network(batchnorm=True)
    direction = descent_direction(model, x, y, batch_size=7)
    gradient = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    gradient = torch.cat([g.flatten() for g in gradient])
    assert torch.allclose(direction[0] / direction.norm(), -gradient / gradient.norm(), atol=1e-12)
    assert torch.allclose(direction.norm(), random_directions(model, 1)[0].norm(), rtol=1e-12)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("num", [1, 2])
@pytest.mark.parametrize("adversary", ["none", "frozen", "rerun"])
@pytest.mark.parametrize("batchnorm", [False, True])
def test_surface_equals_the_textbook_one(num, adversary, batchnorm):
    model, x, y = network(batchnorm=batchnorm)
    directions = random_directions(model, num)
    attack = None if adversary == "none" else ATTACK
    ours = surface(model, directions, STEPS, x, y, attack=attack, adversary=adversary, batch_size=7)
    assert ours.loss.shape == ours.error.shape == (len(STEPS),) * num
    frozen = ATTACK(model, x, y)
    for i in np.ndindex(ours.loss.shape):
        theta = flat(model) + sum(STEPS[j] * d for j, d in zip(i, directions, strict=True))
        *_, moved = textbook(model, theta, x, y)
        inputs = {"none": x, "frozen": frozen, "rerun": ATTACK(moved, x, y)}[adversary]
        assert np.allclose((ours.loss[i], ours.error[i]), textbook(model, theta, inputs, y)[:2], rtol=1e-12)


def test_curvature_of_a_frozen_line_along_an_eigenvector_is_the_eigenvalue():
    model, x, y = network(batchnorm=True)
    values, vectors, _ = top_eigenpairs(model, ATTACK(model, x, y), y, 1, tolerance=1e-8, dtype=torch.float64)
    h = 1e-3
    line = surface(model, vectors, [-h, 0, h], x, y, attack=ATTACK, adversary="frozen").loss
    assert np.isclose((line[0] - 2 * line[1] + line[2]) / h**2, values[0].item(), rtol=1e-4)


def test_rerun_lies_above_frozen_for_an_exact_attack():
    """For a linear model with two classes the attack is exact, so the adversarial loss is a maximum."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 2)).double().eval()
    x, y = torch.rand(20, 1, 3, 3).double() * 0.6 + 0.2, torch.randint(2, (20,))
    attack = partial(pgd, eps=0.1, step_size=0.1, num_steps=2, random_start=False, precision="full")
    loss = {
        kind: surface(model, random_directions(model, 2), STEPS, x, y, attack=attack, adversary=kind).loss
        for kind in ("frozen", "rerun")
    }
    assert (loss["rerun"] >= loss["frozen"] - 1e-12).all()
    assert (loss["rerun"] - loss["frozen"]).max() > 0.01
    assert np.isclose(loss["rerun"][2, 2], loss["frozen"][2, 2])


def test_each_direction_may_have_its_own_steps():
    model, x, y = network()
    directions, steps = random_directions(model, 2), (np.linspace(0, 2, 3), [-1.0, 0.1])
    ours = surface(model, directions, steps, x, y)
    assert ours.loss.shape == (3, 2)
    for i, j in np.ndindex(3, 2):
        theta = flat(model) + steps[0][i] * directions[0] + steps[1][j] * directions[1]
        assert np.isclose(ours.loss[i, j], textbook(model, theta, x, y)[0], rtol=1e-12)
    single = surface(model, directions[:1].float(), np.float32([0.5]), x, y)  # other types do no harm
    assert np.isclose(single.loss[0], textbook(model, flat(model) + 0.5 * directions[0], x, y)[0], rtol=1e-6)


@pytest.mark.parametrize("kind", MODULES)
def test_every_kind_of_module(kind):
    """Whatever a module does with its parameters, a moved copy of it is what the moved module would be."""
    model, (x, y) = module(kind), data()
    before = [(p.clone(), p.stride()) for p in model.parameters()]
    line = surface(model, random_directions(model, 1), [0, 0.5], x, y, attack=lambda m, x, y: x, adversary="rerun")
    down, theta = descent_direction(model, x, y)[0], flat(model)
    moved = theta + 0.5 * random_directions(model, 1)[0]
    for p, (value, stride) in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, value) and p.stride() == stride
    plain = module("views" if kind in ("compiled", "made in inference mode") else kind)
    parameters = list(plain.parameters())
    pieces = torch.autograd.grad(F.cross_entropy(plain(x), y), parameters, materialize_grads=True)
    gradient = torch.cat([g.flatten() for g in pieces])
    assert torch.allclose(down / down.norm(), -gradient / gradient.norm(), atol=1e-12)
    for i, point in enumerate((theta, moved)):
        for p, piece in zip(parameters, point.split([p.numel() for p in parameters]), strict=True):
            p.data.copy_(piece.view_as(p))
        assert np.isclose(line.loss[i], F.cross_entropy(plain(x), y).item(), rtol=1e-12)


MEASURES = {
    "surface": lambda m, x, y: surface(m, random_directions(m, 1), [0, 0.5], x, y, attack=ATTACK, adversary="rerun"),
    "descent": lambda m, x, y: descent_direction(m, x, y),
    "scatter": lambda m, x, y: scatter(m, flat(m), [0.1], x, y, ATTACK),
    "curve": lambda m, x, y: along(connect(m, module("views", 1), x, y, epochs=1), [0, 0.5, 1], x, y, attack=ATTACK),
}


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("state", STATES)
def test_neither_layout_nor_state_of_autograd_matters(measure, layout, state):
    model, (x, y) = module("views"), data()
    expected = measure(model, LAYOUTS[layout](x).detach().contiguous(), y)
    with STATES[state]():
        given = LAYOUTS[layout](x.clone())  # in inference mode, a tensor made there
        found = measure(model, given, y.clone())
    for a, b, c in zip(expected, found, measure(model, given, y), strict=True):
        assert np.array_equal(a, b) and np.array_equal(a, c)


@pytest.mark.parametrize("measure", ["surface", "scatter", "curve"])
def test_models_are_left_alone(measure):
    model, x, y = network(batchnorm=True)
    other, _, _ = network(1, batchnorm=True)
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy((model.state_dict(), other.state_dict()))
    direction = random_directions(model, 1)
    if measure == "surface":
        surface(model, direction, STEPS, x, y, attack=ATTACK, adversary="rerun")
    elif measure == "scatter":
        scatter(model, direction[0], [0.1], x, y, ATTACK)
    else:
        along(connect(model, other, x, y, attack=ATTACK, epochs=2), [0, 0.5, 1], x, y, x_statistics=x)
    for state, old in zip((model.state_dict(), other.state_dict()), before, strict=True):
        assert all(torch.equal(v, old[k]) for k, v in state.items())
    assert not model.training
    assert not model[0].weight.requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_scatter_with_attacks_that_do_not_move_is_the_hessian_term():
    model, x, y = network()
    v = random_directions(model, 1)[0]
    distances = np.array([1e-4, 1e-3])
    result = scatter(model, v, distances, x, y, lambda model, x, y: 0.9 * x + 0.1, batch_size=7)
    curvature = (Hessian(model, 0.9 * x + 0.1, y, dtype=torch.float64)(v).norm() / v.norm()).item()
    assert np.allclose(result.gradient, distances * curvature, rtol=1e-2)
    assert np.array_equal(result.gradient, result.fixed)
    assert not result.scattering.any()
    assert np.allclose(result.cosine, 1)


def test_scatter_sees_an_attack_that_jumps():
    """Softmax regression with K=2: the perturbation flips when the weight difference changes sign."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False)).double().eval()
    move(model, torch.tensor([0.5, -0.5], dtype=torch.float64) * 1e-3)
    x, y = torch.full((4, 1, 1, 1), 0.5, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
    attack = partial(pgd, eps=0.1, step_size=0.1, num_steps=2, random_start=False, precision="full")
    direction = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    result = scatter(model, direction, [1e-4, 2e-3], x, y, attack)
    assert np.allclose(result.cosine, [1, -1])
    # The gradient is -(1 - p) x'(1, -1); with p = 1/2 the jump of x' by 2 eps gives 0.5 * 0.2 * sqrt(2).
    assert result.scattering[0] == 0
    assert np.isclose(result.scattering[1], 0.1 * np.sqrt(2), rtol=1e-2)


def test_symmetric_scatter_compares_both_sides():
    model, x, y = network()
    v = random_directions(model, 1)[0]
    both = scatter(model, v, [0.2, 0.05], x, y, ATTACK, symmetric=True)
    for i, a in enumerate((0.2, 0.05)):
        *_, side = textbook(model, flat(model) - a * v / v.norm(), x, y)
        one = scatter(side, v, [2 * a], x, y, ATTACK)
        assert np.allclose([column[i] for column in both], [column[0] for column in one], rtol=1e-9)


def test_scatter_at_distance_zero_is_zero():
    model, x, y = network()
    result = scatter(model, random_directions(model, 1)[0], [0.0], x, y, ATTACK)
    assert (*result.gradient, *result.fixed, *result.scattering) == (0, 0, 0)
    assert np.isclose(result.cosine[0], 1)


def test_cosine_without_any_perturbation_is_nan():
    model, x, y = network()
    assert np.isnan(scatter(model, random_directions(model, 1)[0], [0.1], x, y, lambda m, x, y: x).cosine[0])


@pytest.mark.parametrize("kind", ["bezier", "polygon"])
@pytest.mark.parametrize("num_bends", [1, 3])
def test_the_ends_of_a_trained_curve_are_the_given_models(kind, num_bends):
    start, x, y = network(0, batchnorm=True)
    end, _, _ = network(1, batchnorm=True)
    curve = connect(start, end, x, y, kind=kind, num_bends=num_bends, epochs=2)
    for t, given in ((0, start), (1, end), (0.0, start), (1.0, end)):
        state = curve.model(t).state_dict()
        assert all(torch.equal(v, state[k]) for k, v in given.state_dict().items())


def test_points_of_the_curves():
    (start, *_), (end, *_) = network(0), network(1)
    a, b, c = flat(start), flat(network(2)[0]), flat(end)
    for t in (0.1, 0.5, 0.8):
        bezier = (1 - t) ** 2 * a + 2 * t * (1 - t) * b + t**2 * c
        polygon = a + 2 * t * (b - a) if t <= 0.5 else b + (2 * t - 1) * (c - b)
        assert torch.allclose(flat(Curve(start, end, [b], "bezier").model(t)), bezier, rtol=1e-12, atol=1e-15)
        assert torch.allclose(flat(Curve(start, end, [b], "polygon").model(t)), polygon, rtol=1e-12, atol=1e-15)
        assert torch.allclose(flat(Curve(start, end).model(t)), a + t * (c - a), rtol=1e-12, atol=1e-15)


def test_training_follows_the_gradient_of_the_loss_on_the_curve():
    """The first two Adam steps against autograd through the curve itself."""
    start, x, y = network(0)
    end, _, _ = network(1)
    curve = connect(start, end, x, y, kind="bezier", num_bends=2, epochs=2, batch_size=len(x), lr=0.01, seed=5)
    a, b = flat(start), flat(end)
    bends = nn.Parameter(torch.stack([a + (b - a) / 3, a + (b - a) * 2 / 3]))
    optimizer, generator = torch.optim.Adam([bends], 0.01), torch.Generator().manual_seed(5)
    sizes = [p.numel() for p in start.parameters()]
    for _ in range(2):
        torch.randperm(len(x), generator=generator)
        t = torch.rand((), generator=generator).item()
        theta = (1 - t) ** 3 * a + 3 * t * (1 - t) ** 2 * bends[0] + 3 * t**2 * (1 - t) * bends[1] + t**3 * b
        pieces = {k: v.view_as(p) for (k, p), v in zip(start.named_parameters(), theta.split(sizes), strict=True)}
        optimizer.zero_grad()
        F.cross_entropy(functional_call(start, pieces, (x,)), y).backward()
        optimizer.step()
    assert torch.allclose(curve.points[1:-1], bends.detach(), rtol=1e-6)


def test_a_trained_curve_goes_round_a_barrier():
    """Two copies of one trained network with permuted units: equal functions, a barrier between, a way round it."""
    torch.manual_seed(0)
    x = torch.rand(200, 2)
    y = ((x[:, 0] > 0.5) ^ (x[:, 1] > 0.5)).long()
    start = nn.Sequential(nn.Linear(2, 24), nn.ReLU(), nn.Linear(24, 2))
    optimizer = torch.optim.Adam(start.parameters(), 0.02)
    for _ in range(300):
        optimizer.zero_grad()
        F.cross_entropy(start(x), y).backward()
        optimizer.step()
    start.eval()
    end, order = copy.deepcopy(start), torch.randperm(24)
    for p, rows in ((end[0].weight, True), (end[0].bias, True), (end[2].weight, False)):
        p.data = p.data[order] if rows else p.data[:, order]
    steps = np.linspace(0, 1, 11)
    line = along(Curve(start, end), steps, x, y).loss
    curve = along(connect(start, end, x, y, epochs=150, lr=0.02, batch_size=200), steps, x, y).loss
    assert np.isclose(line[0], line[-1])
    assert barrier(steps, line) > 0.2
    assert barrier(steps, curve) < 0.25 * barrier(steps, line)


def test_batchnorm_inside_a_curve_is_measured_on_the_given_images():
    (start, x, y), (end, *_) = network(0, batchnorm=True), network(1, batchnorm=True)
    curve = Curve(start, end)
    with pytest.raises(ValueError, match=r"at t = 0.5 the statistics .* give x_statistics"):
        curve.model(0.5)
    model = curve.model(0.5, x)
    features = model[0](x)
    assert torch.allclose(model[1].running_mean, features.mean((0, 2, 3)))
    assert torch.allclose(model[1].running_var, features.var((0, 2, 3)))
    assert not model.training
    # The ends are measured like all other points: `start` has the statistics of a moving average.
    for t, given in ((0, start), (1, end)):
        reference = copy.deepcopy(given)
        reference[1].momentum = 1.0
        reference.train()(x)
        values = along(curve, [t], x, y, x_statistics=x)
        assert np.isclose(values.loss[0], F.cross_entropy(reference.eval()(x), y).item(), rtol=1e-12)
        assert not np.isclose(values.loss[0], F.cross_entropy(given(x), y).item(), rtol=1e-3)


@pytest.mark.parametrize("n", [1, 2, 499, 500, 501, 999, 1001, 1503])
def test_statistics_count_each_image_once(n):
    """Whatever the last part holds; dropout stays off, and the momentum of the given model is kept."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Dropout(), nn.BatchNorm2d(1, momentum=0.3), nn.Flatten(), nn.Linear(16, 3))
    layers[1].running_mean += float("nan")  # what was there before does not matter
    x = torch.rand(n, 1, 4, 4, dtype=torch.float64) + torch.linspace(0, 5, n, dtype=torch.float64)[:, None, None, None]
    model = Curve(layers.double().eval(), layers).model(0.5, x)
    assert torch.allclose(model[1].running_mean, x.mean()[None], rtol=1e-12)
    # Sorted images: parts in their order would miss three quarters of the variance of two thousand.
    assert torch.allclose(model[1].running_var, x.var()[None], rtol=1e-12 if n <= 500 else 0.01)
    assert model[1].momentum == 0.3 and not any(m.training for m in model.modules())


def test_a_loss_without_gradient_has_no_steepest_descent():
    layer = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval()
    layer[1].weight.data.mul_(1e4)
    x = torch.randn(5, 1, 2, 2)
    with pytest.raises(ValueError, match="no direction is steepest"):
        descent_direction(layer, x, layer(x).argmax(1))


def test_a_last_batch_of_one_is_no_batch():
    def one_dimensional(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double().eval()

    x, y = data(n=17)
    curve = connect(one_dimensional(0), one_dimensional(1), x, y, epochs=2, batch_size=8)
    assert np.isfinite(along(curve, [0, 0.4], x, y, x_statistics=x).loss).all()


def test_along_attacks_each_point():
    (start, x, y), (end, *_) = network(0), network(1)
    curve = Curve(start, end)
    ours = along(curve, [0, 0.3], x, y, attack=ATTACK)
    for t, loss, error in zip([0, 0.3], *ours, strict=True):
        model = curve.model(t)
        assert np.allclose((loss, error), textbook(model, flat(model), ATTACK(model, x, y), y)[:2], rtol=1e-12)


def test_barrier_in_closed_form():
    steps = np.linspace(0, 1, 101)
    assert np.isclose(barrier(steps, 2 + 3 * steps + 4 * steps * (1 - steps)), 1)
    assert barrier(steps, 1 + steps - steps * (1 - steps)) == 0
    with pytest.raises(ValueError, match="from 0 to 1, ends included"):
        barrier(steps[1:], steps[1:])


def test_bad_input_to_surface():
    model, x, y = network()
    directions = random_directions(model, 2)
    cases = (
        ({"adversary": "rerum"}, "unknown adversary 'rerum'"),
        ({"adversary": "rerun"}, "'rerun' needs an attack"),
        ({"attack": ATTACK}, "'none' takes no attack"),
        ({"directions": directions[:, 1:]}, "directions must be"),
        ({"directions": directions[0]}, "directions must be"),
        ({"x": x[:0], "y": y[:0]}, "no data"),
        ({"y": y[1:]}, "y must be int64 labels of shape"),
        ({"steps": [STEPS] * 3}, "steps must be one list, or one for each direction, got 3 for 2"),
    )
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            surface(**({"model": model, "directions": directions, "steps": STEPS, "x": x, "y": y} | change))


def test_a_loss_that_is_not_finite():
    (model, x, y), (other, *_) = network(), network(1)
    with torch.no_grad():
        other[0].weight[0, 0] = float("inf")
    v = random_directions(model, 1)
    for call in (
        lambda: surface(model, v, [0, float("inf")], x, y),
        lambda: surface(other, v * 0, [0], x, y),
        lambda: connect(model, other, x, y),
        lambda: along(Curve(model, other), [0, 0.5, 1], x, y),
    ):
        with pytest.raises(ValueError, match="NaN or infinite logits"):
            call()


def test_a_model_in_training_mode():
    model, x, y = network()
    v = random_directions(model, 1)
    model.train()
    for call in (
        lambda: surface(model, v, STEPS, x, y),
        lambda: scatter(model, v[0], [1], x, y, ATTACK),
        lambda: connect(model, model, x, y),
    ):
        with pytest.raises(ValueError, match="training mode"):
            call()


def test_one_step_is_a_list_of_one():
    model, x, y = network()
    direction = random_directions(model, 1)[0]
    for one, several in (
        (scatter(model, direction, 0.1, x, y, ATTACK), scatter(model, direction, [0.1], x, y, ATTACK)),
        (along(Curve(model, model), 0.5, x, y), along(Curve(model, model), np.array([0.5]), x, y)),
    ):
        assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(one, several, strict=True))


def test_bad_input_to_scatter_and_curves():
    model, x, y = network()
    other = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).double().eval()
    for call, message in (
        (lambda: scatter(model, torch.zeros_like(flat(model)), [1], x, y, ATTACK), "positive, finite length"),
        (lambda: scatter(model, flat(model) * float("nan"), [1], x, y, ATTACK), "positive, finite length"),
        (lambda: Curve(model, other), "of one architecture"),
        (lambda: Curve(model, model, kind="spline"), "unknown kind 'spline'"),
        (lambda: Curve(model, model).weights(1.5), r"t must lie in \[0, 1\], got 1.5"),
        (lambda: connect(model, model, x, y, num_bends=0), "num_bends must be an integer >= 1"),
        (lambda: connect(model, model, x[:0], y[:0]), "no data"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_curve_between_unequal_buffers_is_refused():
    def make(seed):
        torch.manual_seed(seed)
        return torch.nn.utils.spectral_norm(torch.nn.Linear(3, 2)).eval()

    with pytest.raises(ValueError, match="buffer 'weight_u'"):
        Curve(make(0), make(1))


def test_connect_repeats_with_dropout():
    def make(seed):
        torch.manual_seed(seed)
        return torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(4, 8), torch.nn.Dropout(), torch.nn.Linear(8, 2)
        ).eval()

    a, b, x, y = make(0), make(1), torch.rand(6, 1, 2, 2), torch.tensor([0, 1] * 3)
    first, state = connect(a, b, x, y, epochs=2, batch_size=3), torch.get_rng_state()
    assert torch.equal(first.points, connect(a, b, x, y, epochs=2, batch_size=3).points)
    assert torch.equal(state, torch.get_rng_state())


def test_scatter_takes_the_shape_that_descent_direction_gives():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2)).eval()
    x, y, v = torch.rand(6, 1, 2, 2), torch.tensor([0, 1] * 3), torch.ones(1, 10)
    one, flat_ = (scatter(model, d, [0.1], x, y, lambda m, x, y: x) for d in (v, v[0]))
    assert one.gradient == flat_.gradient
    with pytest.raises(ValueError, match=r"must be \(10,\)"):
        scatter(model, v[0, :9], [0.1], x, y, lambda m, x, y: x)


def test_curves_need_one_architecture_to_the_last_setting():
    relu, elu = (nn.Sequential(nn.Flatten(), nn.Linear(4, 3), f(), nn.Linear(3, 2)).eval() for f in (nn.ReLU, nn.ELU))
    other = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ELU(0.5), nn.Linear(3, 2)).eval()
    for a, b in ((relu, elu), (elu, other)):
        with pytest.raises(ValueError, match="one architecture: module '2' is"):
            Curve(a, b)


def test_no_filter_no_length():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval()
    for p in model.parameters():
        nn.init.zeros_(p)
    x, y = torch.rand(5, 1, 2, 2), torch.tensor([0, 1, 2, 0, 0])
    for directions in (descent_direction, lambda *data: eigen_directions(*data, 1)):
        with pytest.raises(ValueError, match="no filter that is not zero"):
            directions(model, x, y)


def test_counts_and_lengths_are_asked_for_before_anything_is_computed():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval()
    x, y = torch.rand(5, 1, 2, 2), torch.tensor([0, 1, 2, 0, 0])
    curve, v = Curve(model, model), torch.ones(15)
    for call, name in (
        (lambda: connect(model, model, x, y, batch_size=0), "batch_size must be"),
        (lambda: connect(model, model, x, y, epochs=-1), "epochs must be"),
        (lambda: along(curve, [], x, y), "steps must be"),
        (lambda: scatter(model, v, [], x, y, lambda m, x, y: x), "distances must be"),
        (lambda: barrier([0, 0.5, 1], [2.0]), "with a value for each"),
        (lambda: barrier([0, 0.7, 0.5, 1], [1, 2, 3, 4]), "steps must increase"),
        (lambda: barrier([0, float("nan"), 1], [1, 5, 2]), "steps must increase"),
    ):
        with pytest.raises(ValueError, match=name):
            call()


class Scaled(nn.Module):
    def __init__(self, scale=1.0, residual=False):
        super().__init__()
        self.hidden, self.last, self.scale, self.residual = nn.Linear(16, 16), nn.Linear(16, 3), scale, residual

    def forward(self, x):
        h = self.hidden(x.flatten(1))
        return self.last(torch.relu(h) + (x.flatten(1) if self.residual else 0)) / self.scale

    def get_extra_state(self):
        return {"seen": 1}

    def set_extra_state(self, state):
        pass


class Other(Scaled):
    def forward(self, x):
        return -super().forward(x)


@pytest.mark.parametrize("measure", ["along", "connect"])
def test_ends_that_are_two_architectures_are_refused(measure):
    (x, y), flat_layers = data(), [nn.Flatten(), nn.Linear(16, 3)]
    cases = (
        (nn.Sequential(*flat_layers), nn.Sequential(*flat_layers, nn.Softmax(1)), r"'2' is Softmax\(dim=1\)"),
        (nn.Sequential(*flat_layers, nn.Softmax(1)), nn.Sequential(*flat_layers), r"'\(none\)' is nothing|'2' is Soft"),
        (Scaled(), Other(), "module '' is Scaled, and in the other '' is Other"),
        (Scaled(), Scaled(0.05), "Scaled '' has scale = 1.0 and 0.05"),
        (Scaled(), Scaled(residual=True), "Scaled '' has residual = False and True"),
    )
    for *ends, message in cases:
        a, b = (m.double().eval() for m in ends)
        with pytest.raises(ValueError, match=f"of one architecture.*({message})"):
            along(Curve(a, b), [0, 1], x, y) if measure == "along" else connect(a, b, x, y, epochs=1)


def test_ends_of_one_architecture_may_have_a_state_of_their_own():
    (x, y), (a, b) = data(), (Scaled(2.0).double().eval() for _ in range(2))
    assert np.isfinite(along(connect(a, b, x, y, epochs=1), torch.linspace(0, 1, 3), x, y).loss).all()
    a, b = (nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(16, 3))).double().eval()
            for _ in range(2))  # fmt: skip
    points = [0.0, 0.25, 1.0]
    assert np.array_equal(along(Curve(a, b), torch.tensor(points), x, y), along(Curve(a, b), points, x, y))


def test_gradients_that_are_not_the_loss_s_are_refused():
    class Frozen(Scaled):
        def forward(self, x):
            with torch.no_grad():
                h = torch.relu(self.hidden(x.flatten(1)))
            return self.last(h)

    model, other, (x, y) = Frozen().double().eval(), Frozen().double().eval(), data()
    for call in (
        lambda: descent_direction(model, x, y),
        lambda: scatter(model, flat(model), [0.1], x, y, lambda m, x, y: x),
        lambda: connect(model, other, x, y, epochs=1),
    ):
        with pytest.raises(ValueError, match=r"first derivative of the model itself \(Frozen\) is not that"):
            call()


def test_images_of_another_type_than_the_model():
    a, b = (nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.BatchNorm1d(3)).eval() for _ in range(2))
    x, y = data()
    for images in (x, (255 * x).long()):
        for call in (
            lambda images: descent_direction(a, images, y),
            lambda images: scatter(a, flat(a), [0.1], images, y, lambda m, x, y: x),
            lambda images: connect(a, b, images, y, epochs=1),
            lambda images: Curve(a, b).model(0.5, images),
            lambda images: surface(a, random_directions(a, 1), [0], images, y),
        ):
            with pytest.raises(
                ValueError, match=f"a model of torch.float32 on cpu does not take images of {images.dtype}"
            ):
                call(images)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("which", [slice(None), slice(2, None)])
def test_parameters_that_do_not_move_by_small_steps_are_refused(dtype, which):
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList([nn.Linear(16, 4), nn.Linear(4, 4), nn.Linear(4, 3)])

        def forward(self, x):
            x = x.flatten(1)
            for part in self.parts:
                x = part(x.to(part.weight.dtype))
            return x.float()

    model, (x, y) = Part().eval(), data()
    for part in model.parts[which]:
        part.to(dtype)
    x = x.to(model.parts[0].weight.dtype)
    for call in (
        lambda: surface(model, random_directions(model, 1), [0, 1e-3], x, y),
        lambda: scatter(model, flat(model), [1e-3], x, y, lambda m, x, y: x),
        lambda: connect(model, model, x, y, epochs=1),
        lambda: Curve(model, model).model(0.5),
    ):
        with pytest.raises(ValueError, match=f"parameters of {dtype} do not move by less than their rounding"):
            call()


def test_one_image_has_no_variance():
    a, b = (nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.BatchNorm1d(3)).double().eval() for _ in range(2))
    x, y = data()
    for call in (
        lambda: along(Curve(a, b), [0.5], x, y, x_statistics=x[:1]),
        lambda: connect(a, b, x[:1], y[:1], epochs=1),
        lambda: connect(a, b, x, y, epochs=1, batch_size=1),
    ):
        with pytest.raises(ValueError, match="no variance over a single image"):
            call()
    with pytest.raises(ValueError, match="no data"):
        along(Curve(a, b), [0.5], x, y, x_statistics=x[:0])


def test_directions_steps_and_bends_in_other_forms():
    model, x, y = network()
    d = random_directions(model, 1, seed=np.int64(3))
    assert torch.equal(d, random_directions(model, np.int64(1), seed=3))
    expected = surface(model, d, [0, 0.5], x, y)
    for directions, steps in ((d.numpy(), [0, 0.5]), (d, (s for s in (0, 0.5))), (d, torch.tensor([0, 0.5]))):
        assert np.array_equal(surface(model, directions, steps, x, y), expected)
    given, plain = (scatter(model, v, [0.1], x, y, ATTACK) for v in (d[0].numpy(), d[0]))
    assert np.array_equal(given, plain)
    bend = flat(model) + 1
    assert torch.equal(Curve(model, model, bend.numpy()[None]).points, Curve(model, model, [bend]).points)
    one, other = (connect(model, model, x, y, epochs=1, seed=seed).points for seed in (3, np.int64(3)))
    assert torch.equal(one, other)
    for call, message in (
        (lambda: random_directions(model, 0), "num must be"),
        (lambda: random_directions(model, 2.5), "num must be"),
        (lambda: surface(model, d, [], x, y), "steps must be a list of numbers"),
        (lambda: surface(model, d, 0.5, x, y), "steps must be a list of numbers"),
        (lambda: surface(model, d.repeat(2, 1), [[1.0], []], x, y), "steps must be a list of numbers"),
        (lambda: Curve(model, model, [bend[1:]]), "bends must be"),
        (lambda: descent_direction(model, x, y, batch_size=2.5), "batch_size must be"),
        (lambda: barrier([0, 0.5, 1], [1, float("nan"), 1]), "values must be finite"),
        (lambda: barrier([0, 0.5, 1], [float("inf"), 1, 1]), "values must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
