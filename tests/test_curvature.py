"""Curvature against the dense Hessian of small networks in float64, closed forms, and curvlinops."""

import curvlinops
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kinds import LAYOUTS, MODULES, STATES, data, module
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import nn
from torch.func import functional_call, hessian

from lib import copies, curvature, models
from lib.curvature import Hessian, spectral_density, top_eigenpairs, trace

DOUBLE = {"dtype": torch.float64}


def network(kind, seed=0):
    """A small network in float64 with its data: (model, x, y)."""
    torch.manual_seed(seed)
    model = {
        "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 7), nn.ReLU(), nn.Linear(7, 3)),
        "conv": lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.MaxPool2d(2), nn.Softplus(), nn.Flatten(), nn.Linear(3, 3)
        ),
        "batchnorm": lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ELU(), nn.Flatten(), nn.Linear(12, 3)
        ),
    }[kind]()
    x, y = torch.rand(23, 1, 4, 4), torch.randint(3, (23,))
    model(x)  # batch normalisation gets statistics that are not 0 and 1
    return model.double().eval(), x.double(), y


def dense(model, x, y):
    """The whole Hessian of the mean loss, (P, P), float64."""
    parameters = {k: p.detach() for k, p in model.named_parameters()}
    blocks = hessian(lambda p: F.cross_entropy(functional_call(model, p, (x,)), y))(parameters)
    rows = [torch.cat([blocks[a][b].reshape(p.numel(), -1) for b in parameters], 1) for a, p in parameters.items()]
    return torch.cat(rows)


class Quadratic(nn.Module):
    """Its cross-entropy for label 1 is exactly (1/2) theta' A theta + 1: the logits are (log(exp(q) - 1), 0)."""

    def __init__(self, matrix):
        super().__init__()
        self.register_buffer("matrix", matrix)
        self.theta = nn.Parameter(torch.full((len(matrix),), 0.01, dtype=matrix.dtype))

    def forward(self, x):
        q = 1 + 0.5 * self.theta @ self.matrix @ self.theta
        first = torch.log(torch.expm1(q)).expand(len(x), 1)
        return torch.cat([first, torch.zeros_like(first)], 1)


def quadratic(eigenvalues, *, rotate=True):
    """(model, x, y, matrix) with a Hessian of these eigenvalues."""
    n = len(eigenvalues)
    generator = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q if rotate else torch.eye(n)
    matrix = (basis.double() * torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.double().T
    return Quadratic(matrix).eval(), torch.zeros(2, 1, dtype=torch.float64), torch.ones(2, dtype=torch.int64), matrix


KINDS = ("mlp", "conv", "batchnorm")


@pytest.mark.parametrize("kind", KINDS)
def test_products_equal_the_dense_hessian(kind):
    model, x, y = network(kind)
    exact = dense(model, x, y)
    operator = Hessian(model, x, y, **DOUBLE)
    product = torch.stack([operator(e) for e in torch.eye(operator.size, **DOUBLE)])
    assert operator.size == len(exact)
    assert (product - exact).abs().max() < 1e-12 * exact.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size, kept_batches", [(5, 2), (7, 0), (1, 1)])
def test_batches_change_rounding_only(kind, batch_size, kept_batches):
    model, x, y = network(kind)
    v = torch.randn(sum(p.numel() for p in model.parameters()), **DOUBLE)
    whole = Hessian(model, x, y, **DOUBLE)(v)
    parts = Hessian(model, x, y, batch_size=batch_size, kept_batches=kept_batches, **DOUBLE)(v)
    assert (whole - parts).norm() < 1e-13 * whole.norm()


def test_product_equals_curvlinops():
    model, x, y = network("batchnorm")
    peer = curvlinops.HessianLinearOperator(model, nn.CrossEntropyLoss(), list(model.parameters()), [(x, y)])
    operator = Hessian(model, x, y, **DOUBLE)
    v = torch.randn(operator.size, **DOUBLE)
    assert torch.allclose(operator(v), peer @ v, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_top_eigenpairs_equal_the_dense_ones(kind):
    model, x, y = network(kind)
    exact = dense(model, x, y)
    values, vectors, residuals = top_eigenpairs(model, x, y, 5, tolerance=1e-9, **DOUBLE)
    assert torch.allclose(values, torch.linalg.eigvalsh(exact).flip(0)[:5], rtol=1e-9)
    assert torch.allclose(vectors @ vectors.T, torch.eye(5, **DOUBLE), atol=1e-10)
    own = ((vectors @ exact - values[:, None] * vectors).norm(dim=1) / values[0]).numpy()
    assert own.max() < 1e-9
    assert np.allclose(residuals.numpy(), own, atol=1e-13)


def test_float32_by_default_and_close_to_float64():
    model, x, y = network("conv")
    exact = torch.linalg.eigvalsh(dense(model, x, y)).flip(0)[:5]
    values, vectors, residuals = top_eigenpairs(model, x, y, 5)
    assert values.dtype == vectors.dtype == residuals.dtype == torch.float32
    assert (values - exact).abs().max() < 1e-5 * exact[0]
    assert residuals.max() < 1e-3


def test_quadratic_with_a_known_spectrum():
    spectrum = np.r_[np.linspace(-9, 1, 197), 5.0, 8.0, 20.0]
    model, x, y, matrix = quadratic(spectrum)
    assert torch.allclose(Hessian(model, x, y, **DOUBLE)(matrix[0]), matrix @ matrix[0], rtol=1e-10, atol=1e-12)
    values, vectors, _ = top_eigenpairs(model, x, y, 4, tolerance=1e-10, **DOUBLE)
    assert np.allclose(values, [20, 8, 5, 1], rtol=1e-9)  # the largest, not the largest in absolute value
    assert torch.allclose(vectors @ matrix, values[:, None] * vectors, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k, num_smallest", [(1, 1), (5, 3), (100, 5)])
def test_the_smallest_come_after_the_largest(kind, k, num_smallest):
    model, x, y = network(kind)
    exact = torch.linalg.eigvalsh(dense(model, x, y)).flip(0)
    k = min(k, len(exact) - num_smallest)
    settings = {"num_smallest": num_smallest, "tolerance": 1e-9} | DOUBLE
    values, vectors, residuals = top_eigenpairs(model, x, y, k, **settings)
    assert torch.allclose(values, torch.cat([exact[:k], exact[len(exact) - num_smallest :]]), atol=1e-9 * exact[0])
    own = (vectors @ dense(model, x, y) - values[:, None] * vectors).norm(dim=1) / values.abs().max()
    assert own.max() < 1e-9 and residuals.shape == (k + num_smallest,)


@pytest.mark.parametrize("k", [1, 10, 29, 30])
def test_multiple_eigenvalues_of_a_few_parameters(k):
    spectrum = np.sort(np.repeat([-2.0, 0, 0, 1, 7], 6))
    model, x, y, matrix = quadratic(spectrum)
    values, vectors, _ = top_eigenpairs(model, x, y, k, tolerance=1e-8, **DOUBLE)
    assert np.allclose(values, spectrum[::-1][:k], atol=1e-8)
    assert torch.allclose(vectors @ vectors.T, torch.eye(k, **DOUBLE), atol=1e-10)
    assert torch.allclose(vectors @ matrix, values[:, None] * vectors, atol=1e-7)


def test_eigenvalues_that_vanish_beside_the_largest_do_not_stop_it():
    """A constant classifier has such a Hessian. (ARPACK measures each residual against its own eigenvalue.)"""
    spectrum = np.r_[np.linspace(-1e-5, 1e-5, 296), 1, 2, 3, 9.0]
    model, x, y, _ = quadratic(spectrum)
    values = top_eigenpairs(model, x, y, 20, tolerance=1e-4, **DOUBLE).values
    assert np.allclose(values, spectrum[::-1][:20], atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_eigenvalues_equal_those_of_arpack(kind):
    model, x, y = network(kind)
    operator = Hessian(model, x, y, **DOUBLE)
    peer = LinearOperator((operator.size,) * 2, lambda v: operator(torch.tensor(v.ravel())).numpy(), dtype=float)
    values = top_eigenpairs(model, x, y, 6, tolerance=1e-10, **DOUBLE).values
    assert np.allclose(values, eigsh(peer, 6, which="LA", return_eigenvectors=False)[::-1], rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_quadrature_is_exact_for_the_powers_that_lanczos_guarantees(kind):
    model, x, y = network(kind)
    exact, steps = dense(model, x, y), 8
    density = spectral_density(model, x, y, num_probes=3, num_steps=steps, seed=4, **DOUBLE)
    generator = torch.Generator().manual_seed(4)
    top = torch.linalg.eigvalsh(exact).abs().max().item()
    for nodes, weights in zip(density.nodes, density.weights, strict=True):
        v = (torch.randint(2, (len(exact),), generator=generator) * 2 - 1).double()
        power = v / v.norm()
        for p in range(2 * steps):
            assert np.isclose((weights * nodes**p).sum(), (v / v.norm() @ power).item(), atol=1e-9 * top**p)
            power = exact @ power


@pytest.mark.parametrize("kind", KINDS)
def test_density_moments_lie_within_their_error_of_the_dense_ones(kind):
    model, x, y = network(kind)
    exact = dense(model, x, y)
    density = spectral_density(model, x, y, num_probes=40, num_steps=20, **DOUBLE)
    for p in (1, 2, 3):
        samples = (density.weights * density.nodes**p).sum(1)
        moment = torch.linalg.matrix_power(exact, p).trace().item() / len(exact)
        assert abs(samples.mean() - moment) < 3.5 * samples.std(ddof=1) / np.sqrt(40)
    assert np.isclose(np.trapezoid(density.density, density.grid), 1, atol=1e-3)


def test_band_covers_the_true_smoothed_density():
    model, x, y = network("mlp")
    spectrum = torch.linalg.eigvalsh(dense(model, x, y)).numpy()
    grid, width = np.linspace(spectrum[0], spectrum[-1], 200), 0.05
    kernel = np.exp(-0.5 * ((grid[:, None] - spectrum) / width) ** 2) / (width * np.sqrt(2 * np.pi))
    d = spectral_density(model, x, y, num_probes=12, num_steps=60, width=width, grid=grid, **DOUBLE)
    true = kernel.mean(1)
    assert ((d.low <= true) & (true <= d.high)).mean() > 0.85  # 0.95 in expectation, over correlated points
    assert abs(d.density - true).max() < 0.1 * true.max()


def test_no_ghosts_of_an_outlying_eigenvalue_in_float32():
    model, x, y, _ = quadratic(np.r_[np.linspace(0, 1, 199), 100.0])
    nodes = spectral_density(model.float(), x.float(), y, num_probes=3, num_steps=80).nodes
    assert ((nodes > 50).sum(1) == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_saturated_network_has_a_hessian_of_zero(dtype):
    model = nn.Sequential(nn.Linear(4, 3)).to(dtype).eval()
    model[0].weight.data.mul_(1e8)  # no second class is above the least number: at 1e4 one may be, by rounding alone
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    pairs = top_eigenpairs(model, x, model(x).argmax(1), 2, dtype=dtype)
    assert pairs.values.abs().max() < 1e-30 and torch.isfinite(pairs.vectors).all()


def test_lanczos_stops_where_its_space_is_exhausted():
    model, x, y, _ = quadratic(np.repeat([1.0, 4.0], 10))
    density = spectral_density(model, x, y, num_probes=2, num_steps=20, **DOUBLE)
    for nodes, weights in zip(density.nodes, density.weights, strict=True):
        at = {value: weights[np.isclose(nodes, value)].sum() for value in (1.0, 4.0)}
        assert np.isclose(sum(at.values()), 1)
        assert min(at.values()) > 0.05


def test_trace_of_a_diagonal_hessian_is_exact():
    model, x, y, matrix = quadratic(np.linspace(-1, 3, 12), rotate=False)
    estimate, error = trace(model, x, y, num_probes=4, **DOUBLE)
    assert np.isclose(estimate, matrix.trace().item(), rtol=1e-12)
    assert error < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_trace_and_its_standard_error(kind):
    model, x, y = network(kind)
    exact = dense(model, x, y)
    estimate, error = trace(model, x, y, num_probes=200, **DOUBLE)
    off_diagonal = exact - exact.diag().diag()
    assert abs(estimate - exact.trace().item()) < 3.5 * error
    assert np.isclose(error, np.sqrt(2 * (off_diagonal**2).sum().item() / 200), rtol=0.25)  # known variance


def test_repeats_bit_for_bit_and_leaves_the_model_alone():
    model, x, y = network("batchnorm")
    model[0].weight.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first, second = top_eigenpairs(model, x, y, 4), top_eigenpairs(model, x, y, 4)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert trace(model, x, y) == trace(model, x, y)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not model.training
    assert not model[0].weight.requires_grad
    assert all(p.grad is None for p in model.parameters())


def gradient_at(model, theta, x, y):
    """The gradient (P,) by plain autograd, where the model's own parameters really hold theta."""
    parameters, start = list(model.parameters()), 0
    for p in parameters:
        p.data.copy_(theta[start : start + p.numel()].view_as(p))
        start += p.numel()
    pieces = torch.autograd.grad(F.cross_entropy(model(x), y), parameters, materialize_grads=True)
    return torch.cat([g.flatten() for g in pieces])


@pytest.mark.parametrize("kind", MODULES)
def test_every_kind_of_module(kind):
    """Whatever a module does with its parameters, the Hessian is that of the loss, and the module is left alone."""
    model, (x, y) = module(kind), data()
    before = [(p.clone(), p.stride(), p.requires_grad) for p in model.parameters()]
    try:
        operator = Hessian(model, x, y, batch_size=4, kept_batches=1, **DOUBLE)
    except ValueError as error:  # PyTorch leaves the norm's own derivative out of the second one
        assert kind in (
            "old weight_norm",
            "two old weight_norms",
            "parametrised",
        ) and "second derivative of layer" in str(error)
        return
    plain = module("views" if kind in ("compiled", "made in inference mode") else kind)
    theta = torch.cat([p.detach().flatten() for p in plain.parameters()])
    for v in torch.randn(3, operator.size, generator=torch.Generator().manual_seed(1), **DOUBLE):
        ends = [gradient_at(plain, theta + h * v, x, y) for h in (1e-5, -1e-5)]
        expected = (ends[0] - ends[1]) / 2e-5
        assert (operator(v) - expected).norm() < 1e-6 * expected.norm()
    for p, (value, stride, flag) in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, value) and p.stride() == stride and p.requires_grad == flag and p.grad is None


@pytest.mark.parametrize("measure", [top_eigenpairs, spectral_density, trace])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("state", STATES)
def test_neither_layout_nor_state_of_autograd_matters(measure, layout, state):
    model, (x, y) = module("views"), data()
    settings = ({"k": np.int64(2)} if measure is top_eigenpairs else {"num_probes": np.int64(2)}) | DOUBLE
    if measure is spectral_density:
        settings["num_steps"] = 5
    expected = measure(model, LAYOUTS[layout](x).detach().contiguous(), y, **settings)
    with STATES[state]():
        given = LAYOUTS[layout](x.clone())  # in inference mode, a tensor made there
        found = measure(model, given, y.clone(), **settings)
    again = measure(model, given, y, **settings)
    for a, b, c in zip(expected, found, again, strict=True):
        assert np.array_equal(a, b) and np.array_equal(a, c)


@pytest.mark.parametrize("seed", range(5))
def test_softmax_regression_in_float32_is_symmetric_enough(seed):
    """Its Hessian takes every vector that adds one number to all logits to zero, where only rounding is left."""
    torch.manual_seed(seed)
    model, (x, y) = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval(), data(seed)
    values, _, _ = top_eigenpairs(model, x.float(), y, 3)
    exact = torch.linalg.eigvalsh(dense(model.double(), x, y)).flip(0)[:3]
    assert torch.allclose(values.double(), exact, rtol=1e-4)


def test_a_loss_that_depends_on_the_batch_is_refused():
    model, (x, y) = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, track_running_stats=False)), data()
    with pytest.raises(ValueError, match=r"module '1' \(BatchNorm2d\) has no running statistics"):
        trace(model.eval(), x, y)


def test_what_cannot_be_copied_is_named():
    class Holds(nn.Module):
        def __init__(self):
            super().__init__()
            self.lines = (line for line in "ab")  # as a generator, an open file or a lock would

        def forward(self, x):
            return x

    model, (x, y) = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(16, 3), Holds())).double().eval(), data()
    with pytest.raises(ValueError, match=r"module '1' \(Holds\) cannot be copied: .*generator"):
        trace(model, x, y)


@pytest.mark.parametrize("output", [lambda z: (z, z), lambda z: {"logits": z}, lambda z: z[:, None], lambda z: z[:-1]])
def test_an_output_that_is_no_logits(output):
    class Wraps(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module("views")

        def forward(self, x):
            return output(self.inner(x))

    with pytest.raises(ValueError, match=r"the model must return logits \(2, classes\)"):
        trace(Wraps().eval(), *data(), **DOUBLE)


@pytest.mark.parametrize("k", [0, -1, 145])
def test_k_outside_the_parameters(k):
    model, x, y = network("mlp")
    with pytest.raises(ValueError, match=f"k must lie in 1..143, the number of parameters, got {k}"):
        top_eigenpairs(model, x, y, k)
    with pytest.raises(ValueError, match=r"k must lie in 1..143, the number of parameters, got 1 \+ 143"):
        top_eigenpairs(model, x, y, 1, num_smallest=143)
    with pytest.raises(ValueError, match=f"k must lie in 1..143, the number of parameters, got {k}"):
        top_eigenpairs(model, x, y, k)


@pytest.mark.parametrize("tolerance", [0, -1, float("nan")])
def test_a_tolerance_that_nothing_reaches(tolerance):
    with pytest.raises(ValueError, match=f"tolerance must be above 0, got {tolerance}"):
        top_eigenpairs(*network("mlp"), tolerance=tolerance)


@pytest.mark.parametrize("measure", [top_eigenpairs, spectral_density, trace])
def test_no_data(measure):
    model, x, y = network("mlp")
    with pytest.raises(ValueError, match="no data"):
        measure(model, x[:0], y[:0])


def test_labels_that_do_not_match():
    model, x, y = network("mlp")
    for labels in (y[:-1], y.float()):
        with pytest.raises(ValueError, match="y must be int64 labels of shape"):
            trace(model, x, labels)


def test_a_loss_that_is_not_finite():
    model, x, y = network("mlp")
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        trace(model, x, y)
    model, x, y = network("mlp")
    x[-1] = float("inf")  # in the second batch only, recomputed or kept
    for kept in (1, 2):
        with pytest.raises(ValueError, match="NaN or infinite"):
            trace(model, x, y, batch_size=20, kept_batches=kept)


def test_training_mode_is_named():
    model, x, y = network("batchnorm")
    model[1].train()
    with pytest.raises(ValueError, match=r"training mode \(module '1'\): call model.eval"):
        trace(model, x, y)


class Noise(nn.Module):
    def forward(self, x):
        return x + 0.01 * torch.randn_like(x)


class UnsureBackward(torch.autograd.Function):
    """Right value, random gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x * 1.0

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return g * torch.rand(())

    @staticmethod
    def jvp(ctx, g):
        return g * torch.rand(())


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.last = nn.Embedding(6, 2), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.table(x)).flatten(1))


def test_inputs_may_be_whole_numbers():
    torch.manual_seed(0)
    model, x, y = Words().double().eval(), torch.randint(6, (9, 4)), torch.randint(3, (9,))
    hessian = Hessian(model, x, y, **DOUBLE)
    theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    def loss(theta):
        pieces = theta.split([p.numel() for p in model.parameters()])
        named = {k: t.view_as(p) for (k, p), t in zip(model.named_parameters(), pieces, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, named, x), y)

    exact = torch.autograd.functional.hessian(loss, theta)
    v = torch.linspace(-1, 1, len(theta), dtype=torch.float64)
    torch.testing.assert_close(hessian(v), exact @ v)


def test_an_operator_that_is_not_deterministic_is_named():
    model, x, y = network("mlp")
    noisy = nn.Sequential(*model[:2], Noise(), *model[2:]).eval()
    with pytest.raises(ValueError, match=r"not deterministic: .* layer '2' \(Noise\)"):
        trace(noisy, x, y)


def test_a_backward_pass_that_is_not_deterministic_is_named():
    model, x, y = network("mlp")

    class Unsure(nn.Module):
        def forward(self, x):
            return UnsureBackward.apply(x)

    with pytest.raises(ValueError, match=r"not deterministic: .* a backward pass that is not repeatable"):
        trace(nn.Sequential(*model[:2], Unsure(), *model[2:]).eval(), x, y)


def test_unreached_tolerance_is_an_error(monkeypatch):
    model, x, y = network("mlp")
    with pytest.raises(RuntimeError, match=r"above the tolerance 1e-12: raise it, or use dtype=torch.float64"):
        top_eigenpairs(model, x, y, 3, tolerance=1e-12)
    with pytest.raises(RuntimeError, match=r"above the tolerance 1e-20: raise it, or look at the network"):
        top_eigenpairs(model, x, y, 3, tolerance=1e-20, dtype=torch.float64)
    monkeypatch.setattr(curvature, "MAX_STEPS", 25)
    with pytest.raises(RuntimeError, match="after 30 steps, above the tolerance 1e-12"):
        top_eigenpairs(model, x, y, 3, tolerance=1e-12)


def test_the_width_is_positive_and_the_grid_a_list():
    model, x, y, _ = quadratic(np.linspace(0, 1, 20))
    with pytest.raises(ValueError, match="width must be a positive number"):
        spectral_density(model, x, y, width=-1.0, num_steps=5, **DOUBLE)
    assert spectral_density(model, x, y, grid=[0.2, 0.5], num_steps=5, **DOUBLE).density.shape == (2,)


def test_probes_and_steps_out_of_range():
    model, x, y = network("mlp")
    for settings, message in (
        ({"num_probes": 1}, "num_probes must be an integer >= 2"),
        ({"num_steps": 0}, "num_steps must lie in 1..143"),
        ({"num_steps": 144}, "num_steps must lie in 1..143"),
    ):
        with pytest.raises(ValueError, match=message):
            spectral_density(model, x, y, **settings)
    for measure, settings, message in (
        (trace, {"num_probes": 1}, "num_probes must be an integer >= 2"),
        (trace, {"num_probes": 2.5}, "num_probes must be"),
        (trace, {"kept_batches": 1.5}, "kept_batches must be"),
        (trace, {"kept_batches": -1}, "kept_batches must be"),
        (trace, {"dtype": torch.bfloat16}, "unknown dtype torch.bfloat16"),
        (trace, {"seed": 3.0}, "seed must be"),
        (spectral_density, {"num_steps": 2.5}, "num_steps must be"),
    ):
        with pytest.raises(ValueError, match=message):
            measure(model, x, y, **settings)


@pytest.mark.parametrize("measure", [top_eigenpairs, spectral_density, trace])
@np.errstate(all="raise")
def test_a_caller_may_have_numpy_raise(measure):
    model, x, y = network("mlp")
    measure(model, x, y, **({"k": 3} if measure is top_eigenpairs else {"num_probes": 2}))


@pytest.mark.parametrize("measure", [top_eigenpairs, spectral_density, trace])
def test_seeds_of_numpy_are_numbers(measure):
    model, x, y = network("mlp")
    settings = ({"k": 1} if measure is top_eigenpairs else {"num_probes": 2}) | DOUBLE
    one, other = (measure(model, x, y, seed=seed, **settings) for seed in (3, np.int64(3)))
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", ["views", "mlp"])
def test_images_of_another_type_than_the_model(kind):
    model, x, y = (module("views"), *data()) if kind == "views" else network("mlp")
    one, other = (trace(m, t, y, num_probes=2) for m, t in ((model, x), (model.float(), x)))
    assert one == other  # all in float32 here
    with pytest.raises(ValueError, match=r"a model of torch.float32 on cpu does not take images of torch.int64"):
        trace(model, (255 * x).long(), y)


def test_a_model_without_parameters_is_refused():
    with pytest.raises(ValueError, match="the model has no parameters, of which its loss would be a function"):
        top_eigenpairs(torch.nn.Flatten().eval(), torch.zeros(3, 1, 2, 2), torch.tensor([0, 1, 0]), 1)


def test_bytes_and_complex_parameters_are_refused():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2)).eval()
    x, y = torch.zeros(3, 1, 2, 2), torch.tensor([0, 1, 0])
    with pytest.raises(ValueError, match="divide them by 255"):
        trace(model, x.byte(), y)
    model[1].weight = torch.nn.Parameter(model[1].weight.to(torch.complex64))
    with pytest.raises(ValueError, match=r"'1.weight' is complex"):
        trace(model, x, y)


@pytest.mark.parametrize("gap", [5.0, 60.0, 80.0])
def test_what_float32_cannot_hold_the_squares_of_is_refused(gap):
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval()
    x, y = torch.rand(12, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(12, dtype=torch.int64)
    with torch.no_grad():
        net[1].weight.mul_(0.1)
        net[1].bias.copy_(torch.tensor([gap, 0, 0]))
    if gap < 10:
        exact = top_eigenpairs(net, x, y, 1, dtype=torch.float64).values
        torch.testing.assert_close(top_eigenpairs(net, x, y, 1).values.double(), exact, rtol=1e-3, atol=0)
        return
    for function in (lambda: top_eigenpairs(net, x, y, 1), lambda: spectral_density(net, x, y)):
        with pytest.raises(ValueError, match=r"too small for torch\.float32"):
            function()


def test_numbers_of_eigenvalues_are_whole():
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval()
    x, y = torch.rand(6, 1, 4, 4), torch.arange(6) % 3
    for wrong in ({"k": 2.5}, {"k": 1, "num_smallest": 0.5}, {"k": True}):
        with pytest.raises(ValueError, match="must be an integer"):
            curvature.top_eigenpairs(net, x, y, **wrong)
    assert curvature.top_eigenpairs(net, x, y, np.int64(2)).values.shape == (2,)


def test_images_on_disk_are_no_tensor():
    class Images(list):
        shape = (2, 1, 4, 4)

        def split(self, n):
            return [self]

    with pytest.raises(ValueError, match="x must be a tensor, got Images, on disk"):
        curvature.trace(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval(), Images([0, 0]), torch.zeros(2).long())


def test_sparse_gradients_of_embeddings():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.out = nn.Embedding(5, 4, sparse=True), nn.Linear(4, 3)

        def forward(self, x):
            return self.out(self.words(x).mean(1))

    x, y = torch.randint(5, (6, 3)), torch.arange(6) % 3
    sparse, dense = Words().eval(), Words().eval()
    dense.words.sparse = False
    dense.load_state_dict(sparse.state_dict())
    one, other = (curvature.trace(net, x, y) for net in (sparse, dense))
    assert one == other


class Softplus(torch.autograd.Function):
    """Its backward takes what the forward saved for a constant: right values and gradients, a wrong second derivative.

    The others do the same in other ways."""

    @staticmethod
    def forward(ctx, t):
        ctx.save_for_backward(torch.sigmoid(t))
        return F.softplus(t)

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0]


class Kept(Softplus):
    @staticmethod
    def forward(ctx, t):
        ctx.kept = torch.sigmoid(t)
        return F.softplus(t)

    @staticmethod
    def backward(ctx, g):
        return g * ctx.kept


class Once(Softplus):
    backward = staticmethod(torch.autograd.function.once_differentiable(Softplus.backward))


class Numpy(Softplus):
    @staticmethod
    def backward(ctx, g):
        return torch.from_numpy(g.detach().numpy() * ctx.saved_tensors[0].numpy())


class Layer(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def frozen(part):
    def forward(x):
        with torch.no_grad():
            return part(x)

    return forward


WRONG = {
    "saved": (Softplus.apply, "second"), "kept": (Kept.apply, "second"), "once": (Once.apply, "second"),
    "numpy": (Numpy.apply, "second"), "no_grad": (frozen(F.softplus), "first"), "detach": (torch.detach, "first"),
    "half detached": (lambda t: F.softplus(t) + t.detach(), "first"),
    "rounded": (lambda t: F.softplus(t) + (t.round() - t).detach(), "first"),
}  # fmt: skip


@pytest.mark.parametrize("function, which", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("place", ["hidden", "logits"])
@pytest.mark.parametrize("dtype", curvature.DTYPES)
def test_derivatives_that_are_not_those_of_the_values_are_refused(function, which, place, dtype):
    torch.manual_seed(0)
    ends = [nn.Linear(6, 6), nn.Softplus(), nn.Linear(6, 3)] if place == "hidden" else [nn.Linear(6, 3)]
    layers = [nn.Linear(16, 6), Layer(function), *ends] if place == "hidden" else [nn.Linear(16, 3), Layer(function)]
    model, (x, y) = nn.Sequential(nn.Flatten(), *layers).to(dtype).eval(), data()
    with pytest.raises(ValueError, match=rf"{which} derivative of layer '2' \(Layer\) is not that of its values"):
        trace(model, x.to(dtype), y, dtype=dtype)


@pytest.mark.parametrize("activation", models.ACTIVATIONS)
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("dtype", curvature.DTYPES)
def test_derivatives_that_are_right_are_not_refused(activation, zero, dtype):
    """Not where kinks are many, and images and weights lie on them; whatever type the model is given in."""
    model = models.build("lenet", seed=0, width=1, activation=activation, image_size=8).to(dtype).eval()
    for name, p in model.named_parameters():
        if zero and name.endswith("bias"):
            nn.init.zeros_(p)
    x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[:, :, :5] = 0
    double = copies.copied(model).double()
    assert copies._deviation(double, (x.double(),), {}, 2) is None
    torch.manual_seed(0)
    model = nn.Sequential(Layer(lambda t: 1 * t), *model).eval()  # not of our layers alone
    assert np.isfinite(trace(model, x, torch.tensor([0, 1]), num_probes=2, dtype=dtype)).all()


class Mixes(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how, self.last = how, nn.Linear(16, 3)
        if how == "attention":
            self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=False)

    def forward(self, x):
        h = x.squeeze(1)
        if self.how == "attention":
            h = self.layer(h)
        elif self.how == "ghost":
            h = torch.cat([(p - p.mean(0)) / (p.var(0, correction=0) + 0.1) for p in h.chunk(2)])
        else:
            h = h - h.mean(0) if self.how == "mean" else h / len(h)
        return self.last(h.flatten(1))


@pytest.mark.parametrize("how", ["attention", "ghost", "mean", "size"])
def test_models_that_mix_the_images_of_a_batch_are_refused(how):
    torch.manual_seed(0)
    model, (x, y) = Mixes(how).double().eval(), data()
    named = r"layer 'layer.self_attn' \(MultiheadAttention\)" if how == "attention" else r"layer 'last' \(Linear\)"
    with pytest.raises(ValueError, match=f"{named} mixes the images of a batch"):
        trace(model, x, y, **DOUBLE)


class Filter(nn.Module):
    """A filter in frequency space, a complex buffer, before a linear layer."""

    def __init__(self, dtype):
        super().__init__()
        self.linear = nn.Linear(16, 3)
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("filter", torch.randn(4, 3, dtype=torch.complex128, generator=generator).to(dtype))

    def forward(self, x):
        return self.linear(torch.fft.irfft2(torch.fft.rfft2(x.squeeze(1)) * self.filter).flatten(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("own, complex_type", [
    (torch.float32, torch.complex64), (torch.float64, torch.complex64), (torch.float64, torch.complex128),
])  # fmt: skip
def test_complex_buffers_keep_their_imaginary_parts(dtype, own, complex_type):
    model, (x, y) = Filter(complex_type), data()
    model, x = (model.double() if own == torch.float64 else model).eval(), x.to(own)
    exact = torch.linalg.eigvalsh(dense(model, x, y)).flip(0)[:3].to(dtype)
    found = top_eigenpairs(model, x, y, 3, dtype=dtype).values
    torch.testing.assert_close(found, exact, rtol=2e-4, atol=1e-5)
    assert model.filter.dtype == complex_type
