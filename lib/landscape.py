"""The shape of the loss over the parameters: lines and planes, how far gradients and attacks move, connecting curves.

A point of parameter space is a flat vector (P,) in the order of `model.parameters()`. The loss is the mean
cross-entropy, the error the share of wrong labels. An attack is a function (model, x, y) -> x_adv, for instance
`functools.partial(pgd, eps=.1, step_size=.02, num_steps=10, random_start=False)`; to make a surface smooth in the
attack's random start, let it seed its own generator at each call.

Batch normalisation: everywhere but in curves the statistics stay those of the given model, so a surface is that of one
function of the parameters, the one whose Hessian `curvature` takes. Inside a curve they belong to no given model, and
are measured again (Garipov et al. 2018), at the ends too, so that all points are compared alike.
"""

import math
from contextlib import contextmanager
from itertools import chain, zip_longest
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import comb
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.utils.parametrize import type_before_parametrizations

from .checks import check_choice, check_count, check_data, check_labels, check_parameters
from .copies import copied, differ
from .curvature import DTYPES, check, loss_gradient, measuring, seeded, top_eigenpairs
from .differentiate import alike, as_module, differentiating, own
from .evaluation import attacked, predict, share


@differentiating()
def random_directions(model, num, *, seed=0):
    """Filter-normalised Gaussian directions (Li et al. 2018, arXiv:1712.09913).

    Each filter (a row of a weight of two or more dimensions) gets the norm of the model's own; biases and the
    parameters of batch normalisation get 0.

    Returns:
        (num, P). Step 1 along it changes each filter by its own length.
    """
    num, generator = check_count(1, num=num), seeded(seed)
    check_parameters(model)
    return torch.stack([_filter_normalised(model, generator) for _ in range(num)])


def _filter_normalised(model, generator):
    pieces = []
    for p in model.parameters():
        d = torch.randn(p.shape, generator=generator, dtype=p.dtype, device="cpu").to(p.device)
        if p.dim() < 2:
            d.zero_()
        else:
            rows, own = d.flatten(1), p.detach().flatten(1)  # views of d, also where it has no numbers
            rows *= own.norm(dim=1, keepdim=True) / rows.norm(dim=1, keepdim=True)
        pieces.append(d.reshape(-1))
    return torch.cat(pieces)


def eigen_directions(model, x, y, num, **settings):
    """The top `num` eigenvectors of the Hessian at (x, y), made as long as a filter-normalised direction.

    Arguments, errors: as for `curvature.top_eigenpairs`. Returns (num, P).
    """
    vectors = top_eigenpairs(model, x, y, num, **settings).vectors
    return vectors * _length(model)


@measuring()
def descent_direction(model, x, y, *, batch_size=500):
    """Minus the gradient of the mean loss at (x, y), made as long as a filter-normalised direction. Returns (1, P).

    Raises ValueError as `surface`, and where the gradient is zero or not finite.
    """
    x, y = check(model, x, y)
    gradient = _gradient(copied(model, x, order=1), x, y, check_count(1, batch_size=batch_size))
    if not 0 < gradient.norm() < math.inf:
        raise ValueError(f"the gradient has length {gradient.norm().item()}: no direction is steepest")
    return (-gradient / gradient.norm() * _length(model))[None]


def _length(model):
    """That of a filter-normalised direction. Raises ValueError where it is 0: every filter is, or there are none."""
    length = random_directions(model, 1)[0].norm()
    if not length:
        raise ValueError("the model has no filter that is not zero: there is no length to measure directions by")
    return length


class Surface(NamedTuple):
    """loss (nats) and error (share), arrays of one shape: a value for each point."""

    loss: np.ndarray
    error: np.ndarray


@measuring()
def surface(model, directions, steps, x, y, *, attack=None, adversary="none", batch_size=500):
    """Loss and error at theta + sum_i a_i d_i, for all a_i in `steps`: a line for one direction, a plane for two.

    Args:
        model: an nn.Module in evaluation mode; theta is its parameters. It is not changed.
        directions: (1 or 2, P). steps: (S,) numbers for each direction, or a pair of such, one for each.
        x, y: images (N, ...) and labels (N,).
        adversary: "none": clean images. "frozen": the attack of the model itself, kept at all points (the function
            that the Hessian at fixed adversarial inputs belongs to). "rerun": the attack made anew at every point
            (the adversarial loss).
        attack: needed for "frozen" and "rerun".
    Returns:
        Surface, of shape (S,) or (S, S'); the first index goes with the first direction.
    Raises:
        ValueError: unknown adversary, an attack missing or superfluous, directions that do not fit, a model in
            training mode, no data, a loss that is not finite.
    """
    x, y = check(model, x, y)
    check_choice("adversary", adversary, ("none", "frozen", "rerun"))
    if (attack is None) != (adversary == "none"):
        raise ValueError(f"adversary {adversary!r} {'needs an' if attack is None else 'takes no'} attack")
    theta = flat(model)
    directions = torch.as_tensor(directions, device=theta.device)
    if directions.dim() != 2 or len(directions) not in (1, 2) or directions.shape[1] != len(theta):
        raise ValueError(f"directions must be (1 or 2, {len(theta)}), got {tuple(directions.shape)}")
    steps = list(steps) if np.iterable(steps) else []
    steps = steps if len(steps) and np.ndim(steps[0]) else [steps] * len(directions)
    if any(np.ndim(s) != 1 or not len(s) for s in steps):
        raise ValueError("steps must be a list of numbers, at least one, or such a list for each direction")
    if len(steps) != len(directions):
        raise ValueError(f"steps must be one list, or one for each direction, got {len(steps)} for {len(directions)}")
    grid = torch.meshgrid([torch.as_tensor(s, dtype=theta.dtype, device="cpu") for s in steps], indexing="ij")
    offsets, moved = torch.stack(grid, -1).to(theta), copied(model, x)
    if adversary == "frozen":
        x, attack = attacked(model, x, y, attack, batch_size=batch_size), None
    values = np.empty((2, *grid[0].shape))
    for i in np.ndindex(grid[0].shape):
        move(moved, theta + offsets[i] @ directions.to(theta))
        values[(slice(None), *i)] = _loss_and_error(moved, x, y, attack, batch_size)
    return Surface(*values)


def _loss_and_error(model, x, y, attack, batch_size):
    if attack is not None:
        x = attacked(model, x, y, attack, batch_size=batch_size)
    logits = predict(model, x, batch_size=batch_size)
    check_labels(logits, y)
    return F.cross_entropy(logits.double(), y).item(), share(logits.argmax(1) != y)


def flat(model):
    """A copy of the parameters as one vector (P,)."""
    return torch.cat([own(p).clone().reshape(-1) for p in model.parameters()])  # no views of what inference mode made


@differentiating()
def move(model, theta):
    """Put the model at the point theta (P,): its own parameters get these numbers, and keep their type and layout.

    Raises ValueError for parameters of a type that rounds the steps of a surface or of training away.
    """
    parameters = list(model.parameters())
    if coarse := [p.dtype for p in parameters if p.dtype not in DTYPES]:
        raise ValueError(f"parameters of {coarse[0]} do not move by less than their rounding: convert model and images "
                         "to float32 or float64")  # fmt: skip
    for p, piece in zip(parameters, own(theta).split([p.numel() for p in parameters]), strict=True):
        p.data.copy_(piece.view_as(p))


class Scatter(NamedTuple):
    """For each distance, arrays (D,): how far the gradient of the adversarial loss and the attacks have moved.

    gradient: ||grad L(theta + a v) - grad L(theta)||, each with its own attacks. fixed: the same with the attacks of
    theta in both, the smooth part that the Hessian describes. scattering: ||difference of the gradients at theta + a v
    under the attacks of theta + a v and of theta||, the rest. cosine: mean over the images of the cosine between the
    two perturbations. (With `symmetric`, read theta - a v for theta.)
    """

    gradient: np.ndarray
    fixed: np.ndarray
    scattering: np.ndarray
    cosine: np.ndarray


@measuring()
def scatter(model, direction, distances, x, y, attack, *, symmetric=False, batch_size=500):
    """How far adversarial gradients and perturbations move with the parameters (Liu et al. 2020, Section 4.2).

    Args:
        model: in evaluation mode; not changed.
        direction: (P,), made a unit vector v here. distances: (D,), lengths a of the moves.
        attack: (model, x, y) -> x_adv. It should be repeatable, else its own noise is in all four numbers.
        symmetric: compare theta + a v with theta - a v, as the paper does, in place of theta.
    Returns:
        Scatter. Images whose perturbation is zero at either point are left out of the cosine; NaN if all are.
    Raises:
        ValueError: as for `surface`; a direction of length 0.
    """
    x, y = check(model, x, y)
    theta, moved, distances = flat(model), copied(model, x, order=1), np.atleast_1d(distances).tolist()
    direction = torch.as_tensor(direction, device=theta.device).to(theta)
    if not 0 < direction.norm() < math.inf or direction.numel() != len(theta):
        raise ValueError(f"direction must be ({len(theta)},) of positive, finite length, got {tuple(direction.shape)}")
    batch_size, _ = check_count(1, batch_size=batch_size, distances=len(distances))
    v = direction.reshape(-1) / direction.norm()

    def look(a):
        move(moved, theta + a * v)
        x_adv = attacked(moved, x, y, attack, batch_size=batch_size)
        return x_adv, _gradient(moved, x_adv, y, batch_size)

    centre, rows = None if symmetric else look(0), []
    for a in distances:
        x_here, here = look(-a) if symmetric else centre
        x_there, there = look(a)
        fixed = _gradient(moved, x_here, y, batch_size)
        norms = [(there - here).norm(), (fixed - here).norm(), (there - fixed).norm()]
        rows.append([n.item() for n in norms] + [_mean_cosine(x_there - x, x_here - x)])
    return Scatter(*np.array(rows).T)


def _gradient(model, x, y, batch_size):
    """Gradient (P,) of the mean loss, in evaluation mode."""
    batches = zip(x.split(batch_size), y.split(batch_size), strict=True)
    return sum(loss_gradient(model, *batch) for batch in batches) / len(x)


def _mean_cosine(a, b):
    a, b = a.flatten(1), b.flatten(1)
    moved = (a.norm(dim=1) > 0) & (b.norm(dim=1) > 0)
    return F.cosine_similarity(a[moved], b[moved]).mean().item()


class Curve:
    """A curve theta(t), 0 <= t <= 1, between the parameters of two models (Garipov et al. 2018, arXiv:1802.10026).

    Args:
        start, end: models of one architecture, in evaluation mode.
        bends: (m, P), m >= 0; with none, the curve is the straight line.
        kind: "bezier" (start, bends, end are its control points) or "polygon" (it passes through them all, at equal
            steps of t).
    """

    def __init__(self, start, end, bends=(), kind="bezier"):
        check_choice("kind", kind, KINDS)
        _check_alike(as_module(start), as_module(end))
        self.given, self.ends, self.kind = (start, end), (copied(start).eval(), copied(end).eval()), kind
        for (name, a), (_, b) in zip(*(model.named_buffers() for model in self.ends), strict=True):
            owner = self.ends[0].get_submodule(name.rpartition(".")[0])
            if not isinstance(owner, BatchNorm) and not alike(a, b):
                raise ValueError(f"start and end differ in the buffer {name!r}: no curve leads from one to the other")
        first = flat(start)
        bends = [torch.as_tensor(b, device=first.device) for b in bends]
        if any(b.shape != first.shape for b in bends):
            raise ValueError(f"bends must be (m, {len(first)}), got {[tuple(b.shape) for b in bends]}")
        self.points = torch.stack([first, *(b.to(first) for b in bends), flat(end)])

    def weights(self, t):
        """The weights (m + 2,) with theta(t) = weights @ points: exactly 0 and 1 at the ends."""
        if not 0 <= t <= 1:
            raise ValueError(f"t must lie in [0, 1], got {t}")
        return self.points.new_tensor(KINDS[self.kind](float(t), len(self.points) - 1))

    @measuring()
    def check(self, x):
        """Raise ValueError, naming a setting that differs, unless the start with the numbers of the end is the end."""
        (a, b), (start, end) = self.ends, (copied(m) for m in self.ends)
        _check_alike(a, b, leaves=False)  # only now, so that what cannot be copied is refused as that
        move(start, flat(end))
        for one, other in zip(start.buffers(), end.buffers(), strict=True):
            one.data.copy_(other)
        given, again, moved = (predict(m, x[:20]) for m in (end, end, start))
        if differ(given, moved, again):
            pairs = zip(a.named_modules(), b.modules(), strict=True)
            found = [f": {type(m).__name__} {name!r} has {k} = {v!r} and {vars(n).get(k)!r}" for (name, m), n in pairs
                     for k, v in vars(m).items() if isinstance(v, PLAIN) and v != vars(n).get(k)]  # fmt: skip
            raise ValueError(
                "start and end must be of one architecture, but compute differently with the same parameters"
                + "".join(found[:1])
            )

    @measuring()
    def model(self, t, x_statistics=None):
        """The model at t, in evaluation mode.

        x_statistics: images on which the statistics of batch normalisation are measured, for a model that has it,
        whatever t; without them, the ends keep those of the given models.
        """
        moved = copied(self.ends[int(t == 1)])
        move(moved, self.weights(t) @ self.points)
        if any(isinstance(m, BatchNorm) for m in moved.modules()):
            if x_statistics is not None:
                _measure(moved, x_statistics)
            elif 0 < t < 1:
                raise ValueError(f"at t = {t} the statistics of batch normalisation are unknown: give x_statistics")
        return moved


PLAIN = (bool, int, float, str, tuple)


def _check_alike(start, end, *, leaves=True):
    """Raise ValueError, naming the module, unless modules are the same, and names and shapes of the tensors.

    leaves: of modules that have parts, only these are compared."""
    for (name, a), (other, b) in zip_longest(start.named_modules(), end.named_modules(), fillvalue=("(none)", None)):
        if name != other or _kind(a, leaves) != _kind(b, leaves):
            one, two = (str(m).splitlines()[0].removesuffix("(") for m in (a, b))
            raise ValueError(f"start and end must be of one architecture: module {name!r} is {one}, and in the other "
                             f"{other!r} is {two}")  # fmt: skip
    first, second = ([(k, t.shape) for k, t in chain(m.named_parameters(), m.named_buffers())] for m in (start, end))
    if first != second:
        raise ValueError("start and end must be of one architecture: names or shapes of their tensors differ")


def _kind(module, leaves):
    if module is None or (leaves and any(True for _ in module.children())):
        return None
    return type_before_parametrizations(module), module.extra_repr()


@contextmanager
def _at_least_two():
    """Say of one image that it is one, where the statistics of batch normalisation are taken over a batch."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ValueError(
            "batch normalisation has no variance over a single image: two at least in x_statistics, or in a mini-batch"
        ) from error


@_at_least_two()
def _measure(model, x):
    """Give batch normalisation the mean and variance over x, each image counted once, all else in evaluation mode.

    In parts, whose variances are averaged: so they are drawn at random, lest the order of the images count.
    """
    check_data(x)
    predict(model, x[:2])  # for its refusal of inputs of another type
    norms = [m.train() for m in model.modules() if isinstance(m, BatchNorm)]
    for m in norms:
        m.reset_running_stats()
    momenta, seen = [m.momentum for m in norms], 0
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0), device="cpu").to(x.device)
    for part in _parts(own(x)[order].contiguous(), 500):
        seen += len(part)
        for m in norms:
            m.momentum = len(part) / seen
        model(part)
    for m, momentum in zip(norms, momenta, strict=True):
        m.eval().momentum = momentum


def _parts(t, most):
    """t in parts of `most` and fewer, as equal as can be: batch normalisation cannot take a last part of one."""
    return t.tensor_split(math.ceil(len(t) / most))


def _bezier(t, n):
    i = np.arange(n + 1)
    return comb(n, i) * t**i * (1.0 - t) ** (n - i)


def _polygon(t, n):
    return np.maximum(0, 1 - abs(n * t - np.arange(n + 1)))


KINDS = {"bezier": _bezier, "polygon": _polygon}


@measuring()
@_at_least_two()
def connect(start, end, x, y, *, attack=None, kind="bezier", num_bends=1, epochs=10, lr=1e-3, batch_size=128, seed=0):
    """Train the bends of a curve between two models so that the expected loss along it is small.

    Each step draws one t uniformly, attacks the mini-batch there, and moves the bends (Adam) by the gradient of the
    loss at theta(t). The bends begin on the straight line.

    Args:
        start, end, kind: as for `Curve`. x, y: training images and labels.
        attack: (model, x, y) -> x_adv; without it, ordinary training.
        num_bends: free points. epochs, lr, batch_size, seed: of the training.
    Returns:
        Curve, whose ends are the given models.
    Raises:
        ValueError: as for `Curve`, no data, num_bends below 1, a loss that is not finite.
    """
    check(start, x, y)
    x, y = check(end, x, y)
    num_bends, epochs, batch_size = check_count(1, num_bends=num_bends, epochs=epochs, batch_size=batch_size)
    seed = check_count(-(2**63), seed=seed)
    a, b = flat(start), flat(end)
    curve = Curve(start, end, [a + i / (num_bends + 1) * (b - a) for i in range(1, num_bends + 1)], kind)
    bends = torch.nn.Parameter(curve.points[1:-1])  # of the same memory: a step of the optimizer moves the curve
    optimizer = torch.optim.Adam([bends], lr)
    moved, generator = copied(start, x, order=1).train(), seeded(seed)
    curve.check(x)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):  # all are seeded
        torch.manual_seed(seed)  # of Dropout
        orders = (torch.randperm(len(x), generator=generator, device="cpu").to(x.device) for _ in range(epochs))
        for batch in chain.from_iterable(_parts(order, batch_size) for order in orders):
            weights = curve.weights(torch.rand((), generator=generator, device="cpu", dtype=torch.float32).item())
            inputs, labels = x[batch], y[batch]
            move(moved, weights @ curve.points)
            if attack is not None:
                inputs = attacked(moved, inputs, labels, attack, batch_size=len(inputs))
            bends.grad = torch.outer(weights[1:-1], loss_gradient(moved, inputs, labels) / len(labels))
            optimizer.step()
    return curve


@measuring()
def along(curve, steps, x, y, *, attack=None, x_statistics=None, batch_size=500):
    """Loss and error at the points t of `steps` of a curve, under an attack made anew at each point if one is given.

    Arguments as for `surface` and `Curve.model`. Returns Surface, of shape (S,).
    """
    (x, y), steps = check(curve.ends[0], x, y), np.atleast_1d(steps).tolist()
    check_count(1, steps=len(steps))
    for model in curve.given:
        copied(model, x)  # for its errors
    curve.check(x)
    points = [_loss_and_error(curve.model(t, x_statistics), x, y, attack, batch_size) for t in steps]
    return Surface(*np.array(points).T)


def barrier(steps, values):
    """How far `values` (S,) at `steps` (S,), from 0 to 1, rise above the line between the end values; 0 if nowhere.

    (Frankle et al. 2020, arXiv:1912.05671, with the line in place of the mean of the ends.)
    """
    steps, values = np.asarray(steps, float), np.asarray(values, float)
    if len(steps) < 2 or steps[0] != 0 or steps[-1] != 1:
        raise ValueError(f"steps must run from 0 to 1, ends included, got {steps[:1]} to {steps[-1:]}")
    if not np.isfinite(values).all():
        raise ValueError(f"values must be finite, got {values}")
    if steps.shape != values.shape or not (np.diff(steps) > 0).all():
        raise ValueError(f"steps must increase, with a value for each, got {steps} and {values}")
    return float((values - (1 - steps) * values[0] - steps * values[-1]).max())
