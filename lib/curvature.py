"""Curvature of the training loss: products with its Hessian, largest eigenvalues, spectral density, trace.

The loss is the mean cross-entropy over the data as a function of all parameters of the model, in evaluation mode, so
that batch normalisation is a fixed affine map. The inputs are constants: adversarial inputs made beforehand give the
Hessian of the adversarial training loss at fixed adversarial inputs, the one studied in Section 4.2 of Liu et al.
(2020, arXiv:2006.08403). A vector of length P lists the parameters in the order of `model.parameters()`; one that is
reached by two ways is one. A measurement works on a deep copy of the model, which it leaves as it was.
"""

import copy
import math
from contextlib import ExitStack
from functools import partial
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.linalg import eigh_tridiagonal
from scipy.stats import t as student
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.utils import parametrize

from .checks import check_choice, check_count, check_labels, check_targets
from .differentiate import as_module, differentiating, gradient, own
from .evaluation import predict
from .fast import channels_last
from .models import any_layout

MAX_STEPS = 500  # of Lanczos, which keeps a vector (P,) for each
DTYPES = (torch.float32, torch.float64)
FEW, STEPS = 2, (1e-10, 1e-8)  # images, and steps of the differences, by which derivatives are tried


class Hessian:
    """The map v -> H v, H the Hessian of the mean cross-entropy of `model` at (x, y).

    A product is the derivative of the gradient's scalar product with v (Pearlmutter 1994). The gradients of the first
    `kept_batches` batches are kept with their graphs, so that only this derivative is taken at each product; those of
    the other batches are made again. Memory is that of `kept_batches` batches and one more.

    Args:
        model: an nn.Module in evaluation mode, x -> logits (N, classes). It is not changed.
        x: inputs (N, ...), constants. y: labels (N,), int64.
        batch_size: images that are differentiated together.
        kept_batches: batches whose gradient is kept.
        dtype: torch.float32 or torch.float64, the precision of everything.
    Attributes:
        size: P, the number of parameters. dtype, device: those of the vectors.
    Raises:
        ValueError: no data, labels that do not match, a module in training mode, a loss that is not finite, products
            that differ when repeated (with the layer whose output differs, where there is one), and as for `copied`.
    """

    @differentiating(twice=True)
    def __init__(self, model, x, y, *, batch_size=500, kept_batches=4, dtype=torch.float32):
        check_choice("dtype", dtype, DTYPES)
        batch_size, (x, y) = check_count(1, batch_size=batch_size), check(model, x, y)
        kept_batches = check_count(0, kept_batches=kept_batches)
        self.dtype, self.device = dtype, x.device
        own_type = next((p.dtype for p in as_module(model).parameters() if p.is_floating_point()), dtype)
        few = x[:FEW].to(own_type) if x.is_floating_point() else x[:FEW]
        self._model, self._count = copied(model, few, order=2).to(dtype), len(x)
        self.size = sum(p.numel() for p in self._model.parameters())
        x = x.to(dtype) if x.is_floating_point() else x  # names of words, say
        batches = list(zip(x.split(batch_size), y.split(batch_size), strict=True))
        self._check(*batches[0])
        self._kept = [self._gradient(*batch) for batch in batches[:kept_batches]]
        self._others = batches[kept_batches:]

    @differentiating(twice=True)
    def __call__(self, v):
        """H v, a tensor (P,), for v (P,). Raises ValueError for another shape."""
        v = torch.as_tensor(v)
        if tuple(v.shape) != (self.size,):
            raise ValueError(f"v must be ({self.size},), one number for each parameter, got {tuple(v.shape)}")
        v, total = v.to(self.device, self.dtype), torch.zeros(self.size, dtype=self.dtype, device=self.device)
        for g in chain(self._kept, (self._gradient(*batch) for batch in self._others)):
            total += self._product(g, v)
        return _finite(total).div_(self._count)

    def _gradient(self, x, y):
        """Gradient (P,) of the summed loss, with the graph to differentiate it again."""
        return _finite(loss_gradient(self._model, x, y, again=True))

    def _product(self, g, v):
        return _flat(gradient(g, [*self._model.parameters()], v, keep=True))

    def _check(self, x, y):
        # A graph that is kept freezes any noise, so this compares two products made afresh. The vector is random: one
        # that is constant lies in the null space of a last layer's Hessian.
        v = _normal(self, torch.Generator().manual_seed(0))
        g, again = self._gradient(x, y), self._gradient(x, y)
        first, second = self._product(g, v), self._product(again, v)
        eps, square = torch.finfo(self.dtype).eps, first @ first
        if 0 < first.abs().max() < torch.finfo(self.dtype).tiny ** 0.5:  # squares, and so norms, would vanish
            raise ValueError(f"the Hessian is too small for {self.dtype}: {_finer(self.dtype)}")
        difference = ((first - second).norm() / first.norm().clamp_min(torch.finfo(self.dtype).tiny)).item()
        if difference > 1e3 * eps:
            raise ValueError(
                f"the Hessian is not deterministic: two products with one vector differ by {difference:.2g} of their "
                f"norm, because of {self._noisy_layer(x)}. Make that deterministic"
            )
        if abs(v @ self._product(g, first) - square) > max(30 * eps**0.5 * square, torch.finfo(self.dtype).tiny):
            raise ValueError(
                f"the Hessian is not symmetric: some layer's second derivative is wrong (that of weight_norm is, in "
                f"PyTorch), or {self.dtype} does not resolve it: then {_finer(self.dtype)}"
            )

    def _noisy_layer(self, x):
        runs = zip(*(_outputs(self._model, x) for _ in range(2)), strict=True)
        changed = [name for (name, a), (_, b) in runs if not torch.equal(a, b)]
        return changed[0] if changed else "a backward pass that is not repeatable"


class Eigenpairs(NamedTuple):
    """values (k,), descending; vectors (k, P), orthonormal rows; residuals (k,), ||H v - value v|| / max |value|."""

    values: torch.Tensor
    vectors: torch.Tensor
    residuals: torch.Tensor


@differentiating()
def top_eigenpairs(model, x, y, k=20, *, num_smallest=0, tolerance=5e-4, seed=0, **operator):
    """The k algebraically largest eigenvalues of the Hessian and their eigenvectors, by Lanczos.

    Not by scipy's `eigsh`: that made as many products (64, here 61, for the top 20 of a LeNet of 207,000 parameters)
    in twice the time, and measures each residual against its own eigenvalue, so that it does not end where some of the
    k vanish beside the largest.

    Args:
        model, x, y, operator: as for `Hessian`.
        num_smallest: how many of the algebraically smallest come after them, from the same products.
        tolerance: largest residual ||H v - value v||, as a fraction of the largest |value|.
        seed: of the vector from which Lanczos starts.
    Returns:
        Eigenpairs (k + num_smallest), on the device of x. The sign of a vector is arbitrary. As with every method that
        starts from one vector, copies of an exactly multiple eigenvalue can be missed as long as fewer than P steps
        are made.
    Raises:
        ValueError: as for `Hessian`; k or k + num_smallest not in 1..P.
        RuntimeError: tolerance not reached in MAX_STEPS steps, or below what the dtype resolves.
    """
    hessian = Hessian(model, x, y, **operator)
    k, num_smallest = check_count(-(2**63), k=k, num_smallest=num_smallest)
    if not 1 <= k <= k + num_smallest <= hessian.size:
        raise ValueError(f"k must lie in 1..{hessian.size}, the number of parameters, got {k} + {num_smallest}")
    generator = seeded(seed)
    # A small residual is no sign that an eigenvalue has not been missed; where 1 % is enough, fewer steps are.
    fewest = (1 if tolerance >= 1e-2 else 2) * (k + num_smallest) + 20
    for basis, diagonal, off_diagonal in _lanczos(hessian, _normal(hessian, generator), generator):
        steps = len(basis)
        if steps < min(fewest, hessian.size) or (steps % 5 and steps < hessian.size):
            continue
        wanted = np.r_[-1 : -k - 1 : -1, num_smallest - 1 : -1 : -1]
        values, mixing = (a[..., wanted] for a in eigh_tridiagonal(diagonal, off_diagonal[:-1]))
        scale = max(abs(values).max(), torch.finfo(hessian.dtype).tiny)  # all may vanish
        residuals = abs(off_diagonal[-1] * mixing[-1]) / scale  # exact, by the recurrence
        if residuals.max() <= 0.9 * tolerance or steps == hessian.size:
            break
        if steps >= MAX_STEPS:
            raise RuntimeError(
                f"residual {residuals.max():.2g} after {steps} steps, above the tolerance {tolerance:.2g}"
            )
    as_tensor = partial(torch.tensor, dtype=hessian.dtype, device=hessian.device)
    pairs = Eigenpairs(as_tensor(values), as_tensor(mixing.T) @ basis, as_tensor(residuals))
    i = int(residuals.argmax())  # the pair that is least converged: one more product, as rounding is in no recurrence
    measured = ((hessian(pairs.vectors[i]) - pairs.values[i] * pairs.vectors[i]).norm() / scale).item()
    if not measured <= tolerance:
        raise RuntimeError(
            f"the residual of eigenpair {i + 1} is {measured:.2g}, above the tolerance {tolerance:.2g}: raise it, or "
            f"{_finer(hessian.dtype)}"
        )
    return pairs


def _finer(dtype):
    """What helps where products are mostly rounding."""
    if dtype == torch.float64:
        return "look at the network: a loss of nearly 0 has a Hessian that float64 does not resolve either"
    return "use dtype=torch.float64"


def _lanczos(hessian, start, generator):
    """Lanczos with full re-orthogonalisation: yields (basis (m, P), diagonal (m,), off-diagonal (m,)) at m = 1, 2, ...

    basis @ H @ basis.T is the tridiagonal matrix of diagonal and off_diagonal[:-1]; off_diagonal[-1] is the norm of
    what H takes out of the basis. Without re-orthogonalisation an outlying eigenvalue appears several times. Where
    the start vector's space is exhausted, a random vector goes on, uncoupled (off-diagonal 0). At most P steps.
    """
    basis, diagonal, off_diagonal, v = start.new_empty(0, hessian.size), [], [], start
    while True:
        m = len(diagonal)
        if m == len(basis):  # doubled when full
            basis = torch.cat([basis, v.new_empty(max(m, 32), hessian.size)])
        basis[m] = v / v.norm()
        w = hessian(basis[m])
        diagonal.append((basis[m] @ w).item())
        w -= diagonal[m] * basis[m]
        if m:
            w -= off_diagonal[m - 1] * basis[m - 1]
        w = _orthogonal(w, basis[: m + 1])
        norm = w.norm().item()
        if norm <= 100 * torch.finfo(w.dtype).eps * np.abs(diagonal).max():
            norm, w = 0.0, _orthogonal(_normal(hessian, generator), basis[: m + 1])
        off_diagonal.append(norm)
        yield basis[: m + 1], np.array(diagonal), np.array(off_diagonal)
        v = w


def _orthogonal(w, basis):
    """w without its components along the rows of basis; twice where cancellation leaves little of it."""
    before = w.norm()
    w = w - basis.T @ (basis @ w)
    return w if w.norm() > before / 2 else w - basis.T @ (basis @ w)


def _normal(hessian, generator):
    """A Gaussian vector (P,), made on the CPU so that every device has the same."""
    normal = torch.randn(hessian.size, generator=generator, device="cpu", dtype=torch.float32)
    return normal.to(hessian.device, hessian.dtype)


class Density(NamedTuple):
    """grid (G,); density, low, high (G,): mean over the probes and its 95 % confidence band, per unit of eigenvalue.

    nodes, weights (probes, steps): the Gauss quadrature behind it. Sum over a row of weights * nodes**p estimates the
    mean p-th power of the eigenvalues, tr(H^p) / P.
    """

    grid: np.ndarray
    density: np.ndarray
    low: np.ndarray
    high: np.ndarray
    nodes: np.ndarray
    weights: np.ndarray


@differentiating()
def spectral_density(model, x, y, *, num_probes=5, num_steps=60, width=None, grid=None, seed=0, **operator):
    """The density of all P eigenvalues, by stochastic Lanczos quadrature (Ghorbani et al. 2019, arXiv:1901.10159).

    Each random probe gives num_steps nodes and weights, and each node is spread as a Gaussian.

    Args:
        model, x, y, operator: as for `Hessian`.
        num_probes: random vectors, at least 2 (their spread is the band).
        num_steps: Lanczos steps from each, at most P.
        width: standard deviation of the Gaussian; default 1 % of the range of the nodes.
        grid: where the density is computed; default 1,000 points that cover the nodes.
        seed: of the probes.
    Returns:
        Density. It integrates to 1. The band covers the choice of probes, not the smoothing.
    Raises:
        ValueError: as for `Hessian`; num_probes below 2, num_steps not in 1..P, a width that is not positive.
    """
    hessian = Hessian(model, x, y, **operator)
    num_probes, num_steps = check_count(2, num_probes=num_probes), check_count(0, num_steps=num_steps)
    if width is not None and not 0 < width < math.inf:
        raise ValueError(f"width must be a positive number, got {width}")
    if not 1 <= num_steps <= hessian.size:
        raise ValueError(f"num_steps must lie in 1..{hessian.size}, the number of parameters, got {num_steps}")
    generator = seeded(seed)
    probes = [_signs(hessian, generator) for _ in range(num_probes)]
    rules = [_quadrature(hessian, v, num_steps, generator) for v in probes]
    nodes, weights = map(np.stack, zip(*rules, strict=True))
    spread = nodes.max() - nodes.min() or 1.0
    width = width or 0.01 * spread
    if grid is None:
        grid = np.linspace(nodes.min() - 4 * width, nodes.max() + 4 * width, 1000)
    grid = np.asarray(grid, float)
    kernel = np.exp(-0.5 * ((grid[:, None, None] - nodes) / width) ** 2) / (width * math.sqrt(2 * math.pi))
    each = (kernel * weights).sum(-1)
    density = each.mean(-1)
    half = student.ppf(0.975, num_probes - 1) * each.std(-1, ddof=1) / math.sqrt(num_probes)
    return Density(grid, density, np.maximum(density - half, 0), density + half, nodes, weights)


def _quadrature(hessian, start, num_steps, generator):
    """Nodes and weights (num_steps,) of the Gauss rule for start' f(H) start / start' start."""
    _, diagonal, off_diagonal = next(islice(_lanczos(hessian, start, generator), num_steps - 1, None))
    nodes, vectors = eigh_tridiagonal(diagonal, off_diagonal[:-1])
    return nodes, vectors[0] ** 2


@differentiating()
def trace(model, x, y, *, num_probes=30, seed=0, **operator):
    """The trace of the Hessian and the standard error of the estimate (Hutchinson 1990): mean of v'Hv over signs v.

    Args:
        model, x, y, operator: as for `Hessian`.
        num_probes: random sign vectors, at least 2.
    Returns:
        (trace, standard error), floats.
    Raises:
        ValueError: as for `Hessian`; num_probes below 2.
    """
    hessian = Hessian(model, x, y, **operator)
    num_probes = check_count(2, num_probes=num_probes)
    generator = seeded(seed)
    probes = (_signs(hessian, generator) for _ in range(num_probes))
    forms = np.array([(v @ hessian(v)).item() for v in probes])
    return float(forms.mean()), float(forms.std(ddof=1) / math.sqrt(num_probes))


def seeded(seed):
    """A generator on the CPU with this seed, an integer of any kind. Raises ValueError for anything else."""
    return torch.Generator().manual_seed(check_count(-(2**63), seed=seed))


def _signs(hessian, generator):
    """A vector of random signs (P,), made on the CPU so that every device has the same."""
    signs = torch.randint(2, (hessian.size,), generator=generator, device="cpu") * 2 - 1
    return signs.to(hessian.device, hessian.dtype)


def check(model, x, y):
    """x and y as constants of ours, contiguous.

    Raises ValueError for no data, bytes in place of pixels, labels that do not match, no parameters or complex ones,
    and a model whose loss is no function of the parameters alone: in training mode, or with batch normalisation by the
    statistics of the batch.
    """
    check_targets(x, y)
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"x must be a tensor, got {type(x).__name__}, on disk: x[torch.arange(n)] holds n of them")
    if x.dtype == torch.uint8:
        raise ValueError("x holds bytes: divide them by 255 first")
    if not any(p.numel() for p in as_module(model).parameters()):
        raise ValueError("the model has no parameters, of which its loss would be a function: give one that has some")
    for name, p in as_module(model).named_parameters():
        if p.is_complex():
            raise ValueError(f"parameter {name!r} is complex: the Hessian here is that of real ones")
    for name, m in as_module(model).named_modules():
        if m.training:
            raise ValueError(f"the model is in training mode (module {name or type(m).__name__!r}): call model.eval()")
        if isinstance(m, BatchNorm) and m.running_mean is None:
            raise ValueError(f"module {name!r} ({type(m).__name__}) has no running statistics: the loss of one image "
                             "depends on the others")  # fmt: skip
    return own(x).contiguous(), own(y).contiguous()


def copied(model, x=None, name="the model", *, order=0):
    """A deep copy of the model, ready to be differentiated, with its channels last where that is free (`any_layout`).

    Tensors that it keeps with a graph (an activation, a normalised weight) are cut off from it. torch.compile's
    wrapper is left out. Raises ValueError, naming the module, for what cannot be copied; and, where x (inputs) are
    given to try it, for inputs of another type than the model, and a copy that computes with something else than its
    own parameters, that mixes the inputs of a batch, or whose derivatives up to this order (1 or 2) are not autograd's.
    """
    model = as_module(model)
    if parametrize._cache_enabled:
        raise ValueError("leave parametrize.cached(): parametrised weights would not follow their parameters")
    kept = {f"{inner}.{name}".lstrip("."): t for inner, m in model.named_modules() for name, t in vars(m).items()
            if isinstance(t, torch.Tensor) and not t.is_leaf}  # fmt: skip
    cut = {id(t): t.detach().clone() for t in kept.values()}
    with torch.inference_mode(False):
        try:
            result = copy.deepcopy(model, dict(cut)).requires_grad_(True)
        except Exception as error:
            for inner, child in model.named_children():
                copied(child, name=f"module {inner!r}")  # the innermost speaks
            raise ValueError(f"{name} ({type(model).__name__}) cannot be copied: {error}") from error
        if any_layout(result):
            for p in result.parameters():
                p.data = channels_last(p.data)
        if x is not None:
            predict(result, x[:2])  # for its refusal of inputs of another type
        if x is not None and not any_layout(result):  # our layers need no more
            made = {name: cut[id(t)] for name, t in kept.items() if t.is_floating_point()}
            _check_copy(result, dict(model.named_parameters()) | made, x[:2])
            _check_mixing(result, x[:2])
            _check_derivatives(result, x[:FEW], order)
    return result


@differentiating()
def _check_copy(result, others, x):
    """Raise ValueError if logits of a copy depend on other tensors than its own parameters: a function that was put
    into the model (a lambda) still has the given one, and what was made from a parameter beforehand stays as it is."""
    changing = {name: t for name, t in others.items() if not t.is_inference()}
    with ExitStack() as afterwards:
        for t in changing.values():
            afterwards.callback(t.requires_grad_, t.requires_grad)
            t.requires_grad_(True)
        logits = result(x.detach().requires_grad_(x.is_floating_point()))
        names, seen = {id(t): name for name, t in changing.items()}, {None}
        todo = [logits.grad_fn] if isinstance(logits, torch.Tensor) else []  # what is no tensor is refused elsewhere
        while todo:
            if (node := todo.pop()) in seen:
                continue
            seen.add(node)
            if (found := names.get(id(getattr(node, "variable", None)))) is not None:
                raise ValueError(
                    f"a copy of the model still computes with {found} of the given one: a lambda or closure in it, or "
                    "a tensor that it keeps beside its parameters, cannot follow them"
                )
            todo += [following for following, _ in node.next_functions]


def _named(model):
    return {m: f"layer {k!r} ({type(m).__name__})" if k else f"the model itself ({type(m).__name__})"
            for k, m in model.named_modules()}  # fmt: skip


def _outputs(model, x):
    """A list (name, output) of what the modules return, a tensor or the first of several, the innermost first."""
    names, run = _named(model), []
    with ExitStack() as hooks:
        for m in names:
            hooks.enter_context(m.register_forward_hook(lambda m, _, out: run.append((names[m], out))))
        model(x.clone())
    run = [(name, out[0] if isinstance(out, tuple) and out else out) for name, out in run]
    return [(name, out.detach().clone()) for name, out in run if isinstance(out, torch.Tensor)]


def differ(a, b, again):
    """Whether a and b differ by more than rounding, where a does not differ from itself, made again."""
    noise, scale = (a - again).abs().max(), 1e-3 * a.abs().max()
    return bool(noise <= scale and (a - b).abs().max() > scale)


@differentiating()
def _check_mixing(model, x):
    """Raise ValueError if logits depend on the other inputs of a batch. Pairs, since some take no batch of one."""
    if len(x) < 2:
        return
    order, mixed = [0, 1, 1, 0], [None]
    runs = [_outputs(model, x[list(rows)]) for rows in (order, order, (0, 0), (1, 1))]
    for (name, a), (_, again), (_, first), (_, second) in zip(*runs, strict=False):
        whole = a.is_floating_point() and a.shape == again.shape and len(a) == 4 and len(first) == len(second) == 2
        mixed.append(name if whole and differ(a, torch.cat([first, second])[[0, 2, 3, 1]], again) else None)
    if mixed[-1]:  # the logits, after which nothing comes
        raise ValueError(
            f"{next(filter(None, mixed))} mixes the images of a batch, so the loss of one depends on the others: let "
            "each stand for itself (for attention, batch_first=True; for a normalisation, fixed statistics)"
        )


@differentiating()
def _check_derivatives(model, x, order):
    """Raise ValueError, naming the module, if autograd's derivatives of this order and below are not those of the
    model's values. In float64; a model that does not compute in that type is not checked."""
    if not order:
        return
    double, x = copied(model).double(), x.double() if x.is_floating_point() else x
    try:
        found = _deviation(double, (x,), {}, order)
    except RuntimeError:
        return
    if not found:
        return
    names, calls, where = _named(double), {}, None
    with ExitStack() as hooks:
        for m in names:
            note = lambda m, args, kwargs: calls.setdefault(m, (args, kwargs))  # noqa: E731
            hooks.enter_context(m.register_forward_pre_hook(note, with_kwargs=True))
        double(x)
    for m in reversed(names):  # the innermost first
        try:
            inner = _deviation(m, *calls[m], order) if m in calls else None
        except (RuntimeError, ValueError):
            continue
        if inner:
            found, where = inner, names[m]
            break
    advice = {
        "first": "it has a no_grad, a detach or a backward of its own. Write it with PyTorch's functions alone; of a "
        "frozen part, give the rest as the model and that part's output as x",
        "second": "its backward uses what it saved, or cannot be differentiated. Write it with PyTorch's functions "
        "alone, and take weight_norm off, whose second derivative PyTorch has wrong",
    }
    where = where or "the model"
    raise ValueError(f"autograd's {found} derivative of {where} is not that of its values: {advice[found]}")


def _deviation(module, args, kwargs, order):
    """Which derivatives of a module, by its parameters and inputs, are wrong: "first", "second" or None.

    Derivatives of a smooth function of its output along a random direction are compared with differences. These are
    believed only where two steps, a hundredfold apart, give the same: so neither a kink between them nor rounding to a
    coarser type inside is taken for a fault. All numbers are moved a little beforehand, off the kinks that lie where
    weights or pixels are zero.
    """
    generator, (near, far) = torch.Generator().manual_seed(0), STEPS
    args = [t.detach().clone().requires_grad_() if _real(t) else t for t in args]
    tensors = [*module.parameters(), *filter(_real, args)]
    before, sizes = [t.detach().clone() for t in tensors], [t.detach().square().mean().sqrt() or 1 for t in tensors]
    v, off = ([s * _normal_like(t, generator) for s, t in zip(sizes, tensors, strict=True)] for _ in range(2))

    def look(step, again=False):
        for t, *parts in zip(tensors, before, v, off, strict=True):
            t.data.copy_(parts[0] + step * parts[1] + 1e-3 * parts[2])
        out = module(*(t.clone() if _real(t) else t for t in args), **kwargs)
        out = out[0] if isinstance(out, tuple) else out
        if out.dtype != torch.float64:
            raise RuntimeError("it rounds to a coarser type")
        scale.append(out.detach().abs().max() or 1)
        weights = _normal_like(out, torch.Generator().manual_seed(1))
        value = (weights * torch.tanh(out / scale[0])).sum()
        return value.detach(), _flat(gradient(value, tensors, again=again))

    scale, direction = [], _flat(v)
    _, g = look(0, again=order == 2)
    product = _flat(gradient(g, tensors, direction)) if order == 2 else None
    if (look(0)[1] - g).norm() > 1e-6 * g.norm():  # it draws numbers
        return None
    ends = [[(a - b) / (2 * h) for a, b in zip(look(h), look(-h), strict=True)] for h in (near, far)]
    for t, numbers in zip(tensors, before, strict=True):
        t.data.copy_(numbers)
    slopes, bends = zip(*ends, strict=True)
    if _wrong(g @ direction, *slopes, (g * direction).norm()):
        return "first"
    return "second" if order == 2 and _wrong(product, *bends, product.norm()) else None


def _wrong(given, near, far, size):
    error = (far - given).norm()
    return bool(error > 1e-3 * torch.maximum(size, far.norm()) and (near - far).norm() < 0.1 * error)


def _real(t):
    return isinstance(t, torch.Tensor) and t.dtype == torch.float64


def _normal_like(t, generator):
    return torch.randn(t.shape, generator=generator, dtype=torch.float64, device="cpu").to(t.device)


def loss_gradient(model, x, y, *, again=False):
    """Gradient (P,) of the summed cross-entropy at (x, y), for a `copied` model, inside `differentiating()`.

    again: keep the graph, to differentiate it again. Raises ValueError for what are no logits, or not finite.
    """
    plain = any_layout(model) or not x.is_floating_point()
    # Others' models are asked for the gradient of x as well: where they make activations again in the backward pass
    # (torch.utils.checkpoint, reentrant) that of the parameters alone is zero, without a word.
    x, more = (channels_last(x), []) if plain else (leaf := x.detach().requires_grad_(), [leaf])
    logits = model(x)
    check_labels(logits, y)
    pieces = gradient(F.cross_entropy(logits, y, reduction="sum"), [*model.parameters(), *more], again=again)
    return _flat(pieces[: len(pieces) - len(more)])


def _finite(v):
    if not torch.isfinite(v).all():
        raise ValueError("the loss or its gradient is NaN or infinite: check the model's parameters and inputs")
    return v


def _flat(pieces):
    return torch.cat([t.to_dense().reshape(-1) for t in pieces])  # of embeddings they may be sparse
