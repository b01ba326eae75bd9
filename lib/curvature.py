"""Curvature of the training loss: products with its Hessian, largest eigenvalues, spectral density, trace.

The loss is the mean cross-entropy over the data as a function of all parameters of the model, in evaluation mode, so
that batch normalisation is a fixed affine map. The inputs are constants: adversarial inputs made beforehand give the
Hessian of the adversarial training loss at fixed adversarial inputs, the one studied in Section 4.2 of Liu et al.
(2020, arXiv:2006.08403). A vector of length P lists the parameters in the order of `model.parameters()`; one that is
reached by two ways is one. A measurement works on a deep copy of the model, which it leaves as it was.
"""

import math
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.linalg import eigh_tridiagonal
from scipy.stats import t as student
from torch.nn.utils import parametrize

from .checks import check_choice, check_count, check_labels, check_parameters, check_statistics, check_targets
from .compute import exact_products
from .copies import copied, joined, outputs_of
from .differentiate import as_module, differentiating, gradient, own
from .fast import channels_last
from .models import any_layout

MAX_STEPS = 500  # of Lanczos, which keeps a vector (P,) for each
DTYPES = (torch.float32, torch.float64)


CONTAINERS = torch.nn.ModuleDict, torch.nn.ModuleList, parametrize.ParametrizationList  # their mode means nothing


@contextmanager
def measuring(**how):
    """`differentiating`, and with `exact_products`: rounded ones make a Hessian that is not symmetric, and steps on a
    surface that are not the ones asked for."""
    with differentiating(**how), exact_products():
        yield


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

    @measuring(twice=True)
    def __init__(self, model, x, y, *, batch_size=500, kept_batches=4, dtype=torch.float32):
        check_choice("dtype", dtype, DTYPES)
        batch_size, (x, y) = check_count(1, batch_size=batch_size), check(model, x, y)
        kept_batches = check_count(0, kept_batches=kept_batches)
        self.dtype, self.device = dtype, x.device
        own_type = next(as_module(model).parameters()).dtype
        few = x[:2].to(own_type) if x.is_floating_point() else x[:2]
        self._model, self._count = _in_type(copied(model, few, order=2), dtype), len(x)
        self.size = sum(p.numel() for p in self._model.parameters())
        x = x.to(dtype) if x.is_floating_point() else x  # names of words, say
        batches = list(zip(x.split(batch_size), y.split(batch_size), strict=True))
        try:
            self._check(*batches[0])
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or "type" not in str(error):
                raise
            raise ValueError(f"the model casts by itself, and cannot be computed in {dtype}: {error}") from error
        self._kept = [self._gradient(*batch) for batch in batches[:kept_batches]]
        self._others = batches[kept_batches:]

    @measuring(twice=True)
    def __call__(self, v):
        """H v, a tensor (P,), for v (P,). Raises ValueError for another shape."""
        v = torch.as_tensor(v, device=self.device)
        if tuple(v.shape) != (self.size,):
            raise ValueError(f"v must be ({self.size},), one number for each parameter, got {tuple(v.shape)}")
        v, total = v.to(self.dtype), torch.zeros(self.size, dtype=self.dtype, device=self.device)
        for g in chain(self._kept, (self._gradient(*batch) for batch in self._others)):
            total += self._product(g, v)
        return _finite(total).div_(self._count)

    def _gradient(self, x, y):
        """Gradient (P,) of the summed loss, with the graph to differentiate it again."""
        return _finite(loss_gradient(self._model, x, y, again=True))

    def _product(self, g, v):
        return joined(gradient(g, [*self._model.parameters()], v, keep=True))

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
        runs = zip(*(outputs_of(self._model, x) for _ in range(2)), strict=True)
        changed = [name for (name, a), (_, b) in runs if not torch.equal(a, b)]
        return changed[0] if changed else "a backward pass that is not repeatable"


def _in_type(model, dtype):
    """The model in this floating type; complex buffers in the complex one of its length, since `to` would leave them
    their real parts alone."""
    return model._apply(lambda t: t.to(dtype.to_complex() if t.is_complex() else dtype)
                        if t.is_complex() or t.is_floating_point() else t)  # fmt: skip


class Eigenpairs(NamedTuple):
    """values (k,), descending; vectors (k, P), orthonormal rows; residuals (k,), ||H v - value v|| / max |value|."""

    values: torch.Tensor
    vectors: torch.Tensor
    residuals: torch.Tensor


@measuring()
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
    if not tolerance > 0:
        raise ValueError(f"tolerance must be above 0, got {tolerance}")
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


@measuring()
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
    width = width or 0.01 * (np.ptp(nodes) or 1.0)
    if grid is None:
        grid = np.linspace(nodes.min() - 4 * width, nodes.max() + 4 * width, 1000)
    grid = np.asarray(grid, float)
    with np.errstate(under="ignore"):  # far from a node, also where the caller has NumPy raise
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


@measuring()
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

    Raises ValueError for no data, bytes in place of pixels, labels that do not match, no parameters or others than
    `check_parameters` takes, and a model whose loss is no function of the parameters alone: in training mode, or with
    batch normalisation by the statistics of the batch.
    """
    check_targets(x, y)
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"x must be a tensor, got {type(x).__name__}, on disk: x[torch.arange(n)] holds n of them")
    if x.dtype == torch.uint8:
        raise ValueError("x holds bytes: divide them by 255 first")
    check_parameters(model)
    if not any(p.numel() for p in as_module(model).parameters()):
        raise ValueError("the model has no parameters, of which its loss would be a function: give one that has some")
    for name, m in as_module(model).named_modules():
        if m.training and not isinstance(m, CONTAINERS):
            raise ValueError(f"the model is in training mode (module {name or type(m).__name__!r}): call model.eval()")
    check_statistics(model)
    return own(x).contiguous(), own(y).contiguous()


def loss_gradient(model, x, y, *, again=False):
    """Gradient (P,) of the summed cross-entropy at (x, y), for a `copied` model, inside `differentiating()`.

    again: keep the graph, to differentiate it again. Raises ValueError for what are no logits, or not finite.
    """
    plain = any_layout(model) or not x.is_floating_point()
    # Others' models are asked for the gradient of x as well: where they make activations again in the backward pass
    # (torch.utils.checkpoint, reentrant) that of the parameters alone is zero, without a word.
    x, more = (channels_last(x), []) if plain else (leaf := x.detach().requires_grad_(), [leaf])
    logits = model(x.clone() if more else x)  # some models write to what they get
    check_labels(logits, y)
    pieces = gradient(F.cross_entropy(logits, y, reduction="sum"), [*model.parameters(), *more], again=again)
    return joined(pieces[: len(pieces) - len(more)])


def _finite(v):
    if not torch.isfinite(v).all():
        raise ValueError("the loss or its gradient is NaN or infinite: check the model's parameters and inputs")
    return v
