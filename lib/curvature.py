"""Curvature of the training loss: products with its Hessian, largest eigenvalues, spectral density, trace.

The loss is the mean cross-entropy over the data as a function of all parameters of the model, in evaluation mode, so
that batch normalisation is a fixed affine map. The inputs are constants: adversarial inputs made beforehand give the
Hessian of the adversarial training loss at fixed adversarial inputs, the one studied in Section 4.2 of Liu et al.
(2020, arXiv:2006.08403). A vector of length P lists the parameters in the order of `model.parameters()`.
"""

import math
import warnings
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.linalg import eigh, eigh_tridiagonal
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from scipy.stats import t as student
from torch.func import functional_call, grad, jvp, linearize


class Hessian:
    """The map v -> H v, H the Hessian of the mean cross-entropy of `model` at (x, y).

    The gradient is linearised once for each of the first `kept_batches` batches and their intermediate results are
    kept, so that a product costs about a third of one that starts again (Pearlmutter 1994); the other batches are
    differentiated forward over reverse at each product. Memory is that of `kept_batches` batches and one more.

    Args:
        model: an nn.Module in evaluation mode, x -> logits (N, classes). It is not changed.
        x: inputs (N, ...), constants. y: labels (N,), int64.
        batch_size: images that are differentiated together.
        kept_batches: batches whose linearisation is kept.
        dtype: torch.float32 or torch.float64, the precision of everything.
    Attributes:
        size: P, the number of parameters. dtype, device: those of the vectors.
    Raises:
        ValueError: no data, labels that do not match, a module in training mode, a loss that is not finite, products
            that differ when repeated (with the layer whose output differs, where there is one).
    """

    def __init__(self, model, x, y, *, batch_size=500, kept_batches=4, dtype=torch.float32):
        check(model, x, y)
        self.dtype, self.device = dtype, x.device
        self._model, self._count = model, len(x)
        self._parameters = {k: _cast(p, dtype) for k, p in model.named_parameters()}
        self._buffers = {k: _cast(b, dtype) for k, b in model.named_buffers()}
        self.size = sum(p.numel() for p in self._parameters.values())
        batches = list(zip(_cast(x, dtype).split(batch_size), y.split(batch_size), strict=True))
        self._check_repeatable(*batches[0])
        self._products = [self._linearised(*batch) for batch in batches[:kept_batches]]
        self._products += [self._recomputed(*batch) for batch in batches[kept_batches:]]

    def __call__(self, v):
        """H v, a tensor (P,), for v (P,)."""
        tangent, total = (
            self._split(v.to(self.device, self.dtype)),
            torch.zeros(self.size, dtype=self.dtype, device=self.device),
        )
        for product in self._products:
            total += _flat(product(tangent))
        return total.div_(self._count)

    def _gradient(self, x, y):
        def loss(parameters):
            logits = functional_call(self._model, (parameters, self._buffers), (x,))
            return F.cross_entropy(logits, y, reduction="sum")

        return grad(loss)

    def _linearised(self, x, y):
        with warnings.catch_warnings():  # torch warns about its own tracing
            warnings.filterwarnings("ignore", module="torch")
            gradient, product = linearize(self._gradient(x, y), self._parameters)
        _check_finite(gradient)
        return product

    def _recomputed(self, x, y):
        def product(tangent):
            gradient, derivative = jvp(self._gradient(x, y), (self._parameters,), (tangent,))
            _check_finite(gradient)
            _check_finite(derivative)
            return derivative

        return product

    def _split(self, v):
        pieces = v.split([p.numel() for p in self._parameters.values()])
        return {k: v.view_as(p) for (k, p), v in zip(self._parameters.items(), pieces, strict=True)}

    def _check_repeatable(self, x, y):
        # A linearisation freezes any noise, so this compares two products made afresh.
        tangent = self._split(torch.ones(self.size, dtype=self.dtype, device=self.device))
        first, second = (_flat(self._recomputed(x, y)(tangent)) for _ in range(2))
        difference = ((first - second).norm() / first.norm().clamp_min(torch.finfo(self.dtype).tiny)).item()
        if difference > 1e3 * torch.finfo(self.dtype).eps:
            raise ValueError(
                f"the Hessian is not deterministic: two products with one vector differ by {difference:.2g} of their "
                f"norm, because of {self._noisy_layer(x)}. Make that deterministic"
            )

    def _noisy_layer(self, x):
        names, runs = {m: f"layer {k!r} ({type(m).__name__})" for k, m in self._model.named_modules()}, ([], [])
        for run in runs:
            hooks = [m.register_forward_hook(lambda m, _, out, run=run: run.append((names[m], out))) for m in names]
            with torch.no_grad():
                functional_call(self._model, (self._parameters, self._buffers), (x,))
            for hook in hooks:
                hook.remove()
        changed = [name for (name, a), (_, b) in zip(*runs, strict=True) if not torch.equal(a, b)]
        return changed[0] if changed else "a backward pass that is not repeatable"


class Eigenpairs(NamedTuple):
    """values (k,), descending; vectors (k, P), orthonormal rows; residuals (k,), ||H v - value v|| / max |value|."""

    values: torch.Tensor
    vectors: torch.Tensor
    residuals: torch.Tensor


def top_eigenpairs(model, x, y, k=20, *, tolerance=1e-3, seed=0, **operator):
    """The k algebraically largest eigenvalues of the Hessian and their eigenvectors, by restarted Lanczos (ARPACK).

    Args:
        model, x, y, operator: as for `Hessian`.
        tolerance: largest residual ||H v - value v||, as a fraction of the largest |value|.
        seed: of the vector from which Lanczos starts.
    Returns:
        Eigenpairs, on the device of x. The sign of a vector is arbitrary, so is the basis of a multiple eigenvalue.
    Raises:
        ValueError: as for `Hessian`; k not in 1..P.
        RuntimeError: a residual above the tolerance (float32 cannot resolve it: use dtype=torch.float64).
    """
    hessian = Hessian(model, x, y, **operator)
    if not 1 <= k <= hessian.size:
        raise ValueError(f"k must lie in 1..{hessian.size}, the number of parameters, got {k}")
    values, vectors = _dense(hessian, k) if 3 * k >= hessian.size else _lanczos(hessian, k, tolerance, seed)
    values = torch.as_tensor(values.copy(), dtype=hessian.dtype, device=hessian.device)
    vectors = torch.as_tensor(vectors.T.copy(), dtype=hessian.dtype, device=hessian.device)
    residuals = torch.stack([(hessian(v) - value * v).norm() for value, v in zip(values, vectors, strict=True)])
    residuals /= values.abs().max().clamp_min(torch.finfo(hessian.dtype).tiny)
    if not residuals.max() <= tolerance:
        raise RuntimeError(f"the largest residual is {residuals.max():.2g}, above the tolerance {tolerance:.2g}")
    return Eigenpairs(values, vectors, residuals)


def _lanczos(hessian, k, tolerance, seed):
    def product(v):
        return hessian(torch.as_tensor(v.ravel())).cpu().numpy()

    dtype = torch.empty(0, dtype=hessian.dtype).numpy().dtype
    start = np.random.default_rng(seed).standard_normal(hessian.size).astype(dtype)
    operator = LinearOperator((hessian.size,) * 2, matvec=product, dtype=dtype)
    try:
        values, vectors = eigsh(operator, k=k, which="LA", v0=start, tol=tolerance / 10)
    except ArpackNoConvergence as error:
        raise RuntimeError(f"Lanczos did not reach the tolerance {tolerance:.2g}: {error}") from error
    return values[::-1], vectors[:, ::-1]


def _dense(hessian, k):
    """All P products: for a handful of parameters, where Lanczos has no room."""
    identity = torch.eye(hessian.size, dtype=hessian.dtype)
    matrix = torch.stack([hessian(e).cpu() for e in identity]).double().numpy()
    values, vectors = eigh((matrix + matrix.T) / 2)
    return values[::-1][:k], vectors[:, ::-1][:, :k]


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


def spectral_density(model, x, y, *, num_probes=5, num_steps=60, width=None, grid=None, seed=0, **operator):
    """The density of all P eigenvalues, by stochastic Lanczos quadrature (Ghorbani et al. 2019, arXiv:1901.10159).

    Each random probe gives num_steps nodes and weights, and each node is spread as a Gaussian. The Lanczos vectors are
    orthogonalised against all before them, twice: without that, an outlying eigenvalue appears several times.

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
        ValueError: as for `Hessian`; num_probes below 2, num_steps not in 1..P.
    """
    hessian = Hessian(model, x, y, **operator)
    if num_probes < 2:
        raise ValueError(f"num_probes must be at least 2, for the spread between them, got {num_probes}")
    if not 1 <= num_steps <= hessian.size:
        raise ValueError(f"num_steps must lie in 1..{hessian.size}, the number of parameters, got {num_steps}")
    probes = _probes(hessian, num_probes, seed)
    nodes, weights = map(np.stack, zip(*[_quadrature(hessian, v, num_steps) for v in probes], strict=True))
    spread = nodes.max() - nodes.min() or 1.0
    width = width or 0.01 * spread
    if grid is None:
        grid = np.linspace(nodes.min() - 4 * width, nodes.max() + 4 * width, 1000)
    kernel = np.exp(-0.5 * ((grid[:, None, None] - nodes) / width) ** 2) / (width * math.sqrt(2 * math.pi))
    density, half = _mean_and_half_width((kernel * weights).sum(-1))
    return Density(grid, density, np.maximum(density - half, 0), density + half, nodes, weights)


def _quadrature(hessian, start, num_steps):
    """Nodes and weights (num_steps,) of the Gauss rule for start' f(H) start / start' start, by Lanczos."""
    basis = torch.zeros(num_steps, hessian.size, dtype=hessian.dtype, device=hessian.device)
    diagonal, off_diagonal = np.zeros(num_steps), np.zeros(num_steps)
    basis[0] = start / start.norm()
    for i in range(num_steps):
        w = hessian(basis[i])
        diagonal[i] = (basis[i] @ w).item()
        for _ in range(2):
            w -= basis[: i + 1].T @ (basis[: i + 1] @ w)
        off_diagonal[i] = w.norm().item()
        # The space is exhausted: what is left of w is rounding, and the rest of the rule has weight zero.
        if off_diagonal[i] <= 10 * torch.finfo(hessian.dtype).eps * np.abs(diagonal).max():
            off_diagonal[i:] = 0
            diagonal[i + 1 :] = diagonal[i]
            break
        if i + 1 < num_steps:
            basis[i + 1] = w / off_diagonal[i]
    nodes, vectors = eigh_tridiagonal(diagonal, off_diagonal[:-1])
    return nodes, vectors[0] ** 2


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
    if num_probes < 2:
        raise ValueError(f"num_probes must be at least 2, for the standard error, got {num_probes}")
    forms = np.array([(v @ hessian(v)).item() for v in _probes(hessian, num_probes, seed)])
    return float(forms.mean()), float(forms.std(ddof=1) / math.sqrt(num_probes))


def _probes(hessian, num, seed):
    """Vectors of random signs, made on the CPU so that every device has the same."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num):
        signs = torch.randint(2, (hessian.size,), generator=generator) * 2 - 1
        yield signs.to(hessian.device, hessian.dtype)


def _mean_and_half_width(samples):
    """Mean over the last axis and half the width of its 95 % confidence interval (Student)."""
    num = samples.shape[-1]
    half = student.ppf(0.975, num - 1) * samples.std(-1, ddof=1) / math.sqrt(num)
    return samples.mean(-1), half


def check(model, x, y):
    """Raise ValueError for no data, labels that do not match, or a model in training mode."""
    if len(x) == 0:
        raise ValueError("no data: the mean loss of 0 inputs is undefined")
    if y.dtype != torch.int64 or y.shape != x.shape[:1]:
        raise ValueError(f"y must be int64 labels of shape ({len(x)},), got {y.dtype} {tuple(y.shape)}")
    training = [name or type(model).__name__ for name, m in model.named_modules() if m.training]
    if training:
        raise ValueError(f"the model is in training mode (module {training[0]!r}): call model.eval() first")


def _check_finite(gradient):
    if not all(torch.isfinite(g).all() for g in gradient.values()):
        raise ValueError("the loss or its gradient is NaN or infinite: check the model's parameters and inputs")


def _cast(t, dtype):
    t = t.detach()
    return t.to(dtype) if t.is_floating_point() else t


def _flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors.values()])
