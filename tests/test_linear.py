"""lib/linear.py against brute force, dual programs, finite differences and other packages."""

import itertools
import tracemalloc

import cvxpy as cp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize, minimize_scalar
from scipy.special import logsumexp
from sklearn.linear_model import LogisticRegression

from lib import linear

ORD = {"linf": np.inf, "l2": 2}
DUAL = {"linf": 1, "l2": 2}
EVERY = [(K, norm, bias) for K in (2, 3, 5) for norm in ("linf", "l2") for bias in (False, True)]


def points(K, seed=0, m=2, n=14, spread=2.0):
    """Overlapping classes of unequal sizes: one point in every class, the rest mostly in class 0."""
    rng = np.random.default_rng(seed)
    y = np.concatenate([np.arange(K), rng.choice(K, n - K, p=[0.6] + [0.4 / (K - 1)] * (K - 1))])
    x = rng.normal(size=(n, m)) + spread * rng.normal(size=(K, m))[y] + 0.5
    return x, y


def ball(eps, norm, m):
    """Points of the ball among which a convex function has its largest value: all corners, or (m = 2) a fine circle."""
    if norm == "linf":
        return eps * np.array(list(itertools.product([-1.0, 1.0], repeat=m)))
    assert m == 2
    angle = np.linspace(0, 2 * np.pi, 2_000, endpoint=False)
    return eps * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def brute_loss(W, x, y, eps, norm, b=0.0):
    """Largest cross entropy over `ball`, point by point."""
    out = []
    for point, label in zip(x, y, strict=True):
        logits = (point + ball(eps, norm, x.shape[1])) @ W.T + b
        out.append((logsumexp(logits, axis=1) - logits[:, label]).max())
    return np.array(out)


# -- margins, V and the robust error


@pytest.mark.parametrize("K, norm, bias", EVERY)
def test_margins_against_brute_force(K, norm, bias):
    x, y = points(K)
    rng = np.random.default_rng(1)
    W, b = rng.normal(size=(4, K, 2)), rng.normal(size=(4, K)) * bias
    got = linear.margins(W, x, y, eps=0.4, norm=norm, b=b)
    for i, n in itertools.product(range(4), range(len(y))):
        logits = (x[n] + ball(0.4, norm, 2)) @ W[i].T + b[i]
        others = np.delete(logits, y[n], axis=1).max(1)
        assert got[i, n] == pytest.approx((logits[:, y[n]] - others).min(), abs=1e-12 if norm == "linf" else 1e-5)


def robust_error(W, x, y, **ball):
    return np.mean(linear.margins(W, x, y, **ball) <= 0)


def test_robust_error_counts_ties_and_v_allows_them():
    W, x, y = np.array([[1.0, 0.0], [-1.0, 0.0]]), np.array([[0.5, 0.0], [2.0, 1.0]]), np.array([0, 0])
    assert robust_error(W, x, y, eps=0.5, norm="linf") == 0.5  # the first point just reaches the tie
    assert linear.in_v(W, x, y, eps=0.5, norm="linf")
    assert not linear.in_v(W, x, y, eps=0.5 + 1e-9, norm="linf")
    assert robust_error(0 * W, x, y, eps=0.0, norm="l2") == 1.0  # a constant classifier ties everywhere


def test_error_is_the_robust_error_at_zero():
    x, y = points(5, n=60)
    W = np.random.default_rng(3).normal(size=(5, 2))
    assert robust_error(W, x, y, eps=0, norm="l2") == np.mean((x @ W.T).argmax(1) != y)


@given(
    st.integers(0, 10_000),
    st.floats(0, 2),
    st.floats(0, 2),
    st.sampled_from(["linf", "l2"]),
    st.sampled_from([2, 3, 5]),
)
@settings(max_examples=60)
def test_v_shrinks_and_t_grows(seed, first, second, norm, K):
    x, y = points(K, seed=seed, n=6)
    W = np.random.default_rng(seed).normal(size=(200, K, 2)) + 2 * np.eye(K)[:, :2]
    small, large = sorted((first, second))
    v = [linear.in_v(W, x, y, eps=e, norm=norm) for e in (small, large)]
    t = [linear.in_t(W, x, y, eps=e, norm=norm) for e in (small, large)]
    assert np.all(v[0] | ~v[1])
    assert np.all(t[1] | ~t[0])


# -- T and its slope


@pytest.mark.parametrize("K, norm", [(K, norm) for K in (2, 3, 5) for norm in ("linf", "l2")])
def test_slope_against_finite_differences(K, norm):
    x, y = points(K, seed=2)
    W = np.random.default_rng(4).normal(size=(K, 2))
    step = 1e-6
    numerical = (brute_loss(step * W, x, y, 0.7, norm).mean() - np.log(K)) / step
    assert linear.slope(W, x, y, eps=0.7, norm=norm) == pytest.approx(numerical, abs=2e-5)


@pytest.mark.parametrize("K, norm", [(2, "linf"), (2, "l2"), (3, "linf"), (5, "linf")])
def test_t_is_where_no_positive_multiple_helps(K, norm):
    x, y = points(K, seed=5, n=8)
    directions = np.random.default_rng(6).normal(size=(40, K, 2))
    got = linear.in_t(directions, x, y, eps=0.6, norm=norm)
    for W, useless in zip(directions, got, strict=True):
        best = minimize_scalar(
            lambda g, W=W: brute_loss(g * W, x, y, 0.6, norm).mean(), bounds=(0, 3), method="bounded"
        )
        assert useless == (best.fun >= np.log(K) - 1e-9)
    assert 0 < got.sum() < len(got)


def test_v_and_t_are_complements_for_one_point_of_two_classes():
    W = np.random.default_rng(0).normal(size=(5_000, 2, 3))
    x, y = np.array([[1.0, -0.5, 2.0]]), np.array([1])
    for norm, eps in itertools.product(("linf", "l2"), (0.0, 0.5, 1.5)):
        inside = linear.margins(W, x, y, eps=eps, norm=norm)[:, 0] > 0
        assert np.array_equal(linear.in_t(W, x, y, eps=eps, norm=norm), ~inside)


@pytest.mark.parametrize(
    "W, x, y",
    [
        ([[0.0], [1.0]], [[3.0], [1.0]], [1, 0]),  # two points
        ([[1.0], [1.5], [-3.0]], [[1.0]], [0]),  # three classes
    ],
)
def test_directions_in_neither_set(W, x, y):
    W, x, y = np.array(W), np.array(x), np.array(y)
    assert not linear.in_v(W, x, y, eps=0, norm="l2")
    assert not linear.in_t(W, x, y, eps=0, norm="l2")


@pytest.mark.parametrize("eps", [0.0, 0.3, 0.7, 0.95])
def test_fraction_of_robust_directions(eps):
    """One point in the plane, two classes, Euclidean: the angle arccos(eps / ||x||) on either side of x."""
    angle = 2 * np.pi * (np.arange(40_000) + 0.5) / 40_000
    w = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    W = np.stack([w, -w], axis=1)
    x, y = np.array([[0.6, 0.8]]), np.array([0])
    assert linear.in_v(W, x, y, eps=eps, norm="l2").mean() == pytest.approx(np.arccos(eps) / np.pi, abs=1e-4)


# -- eps_bar


def largest_ratio(x, y, K, norm, bias):
    """sup of sum_k c_k.u_k over sum_k r_k ||u_k||_* <= 1, sum_k u_k = 0: the dual, as its own program."""
    counts = np.bincount(y)
    means = np.array([x[y == k].mean(0) for k in range(K)])
    r = np.ones(K) if bias else counts / len(y)
    c, m = means * r[:, None], x.shape[1]
    if norm == "linf":  # u = p - q, p, q >= 0: a linear program for HiGHS
        cost = -np.concatenate([c.ravel(), -c.ravel()])
        sums = np.hstack([np.tile(np.eye(m), K), -np.tile(np.eye(m), K)])
        sizes = np.tile(np.repeat(r, m), 2)[None]
        return -linprog(cost, A_ub=sizes, b_ub=[1], A_eq=sums, b_eq=np.zeros(m)).fun
    u = cp.Variable((K, m))
    size = cp.sum(cp.multiply(r, cp.norm(u, 2, axis=1)))
    return cp.Problem(cp.Maximize(cp.sum(cp.multiply(c, u))), [size <= 1, cp.sum(u, axis=0) == 0]).solve(
        solver="CLARABEL"
    )


@pytest.mark.parametrize("K, norm, bias", EVERY)
@pytest.mark.parametrize("m", [1, 2, 7])
def test_eps_bar_against_its_dual(K, norm, bias, m):
    for seed in range(3):
        x, y = points(K, seed=seed, m=m)
        expected = largest_ratio(x, y, K, norm, bias)
        assert linear.eps_bar(x, y, norm=norm, bias=bias) == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_eps_bar_for_more_dimensions_than_classes_and_large_numbers():
    x, y = points(5, m=40)
    for norm, bias in itertools.product(("linf", "l2"), (False, True)):
        value = linear.eps_bar(x, y, norm=norm, bias=bias)
        assert linear.eps_bar(1e6 * x, y, norm=norm, bias=bias) == pytest.approx(1e6 * value, rel=1e-7)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_eps_bar_of_one_point_and_its_mirror_image_is_its_norm(norm):
    x = np.array([[3.0, -4.0, 1.0]])
    got = linear.eps_bar(np.vstack([x, -x]), np.array([0, 1]), norm=norm)
    assert got == pytest.approx(np.linalg.norm(x[0], ORD[norm]), rel=1e-12)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_with_a_bias_eps_bar_ignores_translation_and_class_sizes(norm):
    x, y = points(3, seed=4)
    value = linear.eps_bar(x, y, norm=norm, bias=True)
    assert linear.eps_bar(x + 100.0, y, norm=norm, bias=True) == pytest.approx(value, rel=1e-7)
    again = np.concatenate([x, x[y == 1], x[y == 1]]), np.concatenate([y, y[y == 1], y[y == 1]])
    assert linear.eps_bar(*again, norm=norm, bias=True) == pytest.approx(value, rel=1e-7)


@pytest.mark.parametrize("m", [1, 2, 6])
@pytest.mark.parametrize("bias", [False, True])
def test_euclidean_eps_bar_lies_between_the_pair_bounds(m, bias):
    for seed in range(10):
        x, y = points(5, seed=seed, m=m)
        counts = np.bincount(y)
        means = np.array([x[y == k].mean(0) for k in range(5)])
        r = np.ones(5) if bias else counts / len(y)
        c = means * r[:, None]
        pair = max(np.linalg.norm(c[k] - c[j]) / (r[k] + r[j]) for k, j in itertools.combinations(range(5), 2))
        few = min(5, m + 1)
        value = linear.eps_bar(x, y, norm="l2", bias=bias)
        assert pair * (1 - 1e-7) <= value <= pair * np.sqrt(2 * (few - 1) / few) * (1 + 1e-7)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_equal_points(norm):
    x, y = np.full((6, 2), 2.0), np.array([0, 0, 0, 1, 1, 2])
    assert linear.eps_bar(x, y, norm=norm, bias=True) == pytest.approx(0, abs=1e-8)
    assert linear.eps_bar(x, y, norm=norm) == pytest.approx(largest_ratio(x, y, 3, norm, False), rel=1e-6)
    assert linear.eps_bar(0 * x, y, norm=norm) == 0.0
    best = linear.minimize(x, y, eps=0.0, norm=norm, bias=True)
    assert best.loss == pytest.approx(-np.log([1 / 2, 1 / 3, 1 / 6]) @ [1 / 2, 1 / 3, 1 / 6], abs=1e-7)


# -- worst case


@pytest.mark.parametrize("K, norm, bias", EVERY)
def test_robust_loss_against_brute_force(K, norm, bias):
    rng = np.random.default_rng(7)
    for scale in (0.1, 1.0, 10.0):
        x, y = points(K, seed=8, n=30)
        W, b = scale * rng.normal(size=(K, 2)), bias * rng.normal(size=K)
        lower, upper = linear.robust_loss(W, x, y, eps=0.5, norm=norm, b=b)
        brute = brute_loss(W, x, y, 0.5, norm, b)
        circle = 0.5 * 1.3e-6 * np.ptp(W, axis=0).sum() if norm == "l2" else 1e-12  # what the fine circle can miss
        assert np.all(lower <= brute + circle + 1e-12) and np.all(brute <= upper + 1e-12)
        if K <= 3:
            assert np.all(upper - lower <= (2e-6 * scale * 3 if (K, norm) == (3, "l2") else 1e-12))


@pytest.mark.parametrize("K, norm", [(K, norm) for K in (2, 3, 5) for norm in ("linf", "l2")])
def test_worst_case_is_in_the_ball_and_attains_the_lower_value(K, norm):
    x, y = points(K, m=6, n=20)
    W = np.random.default_rng(9).normal(size=(K, 6))
    x_adv = linear.worst_case(W, x, y, eps=0.3, norm=norm)
    assert np.linalg.norm(x_adv - x, ORD[norm], axis=1).max() <= 0.3 * (1 + 1e-12)
    logits = x_adv @ W.T
    loss = logsumexp(logits, axis=1) - logits[np.arange(20), y]
    assert np.allclose(loss, linear.robust_loss(W, x, y, eps=0.3, norm=norm)[0], rtol=1e-13)


@pytest.mark.parametrize("K", [2, 3, 4, 5])
@pytest.mark.parametrize("scale", [1e-200, 1.0, 150.0, 235.0, 1e150])
def test_no_size_of_the_weights_leaves_the_ball(K, scale):
    """Where a classifier is sure, the gradient of its loss is so small that its square is 0 in float64."""
    x_adv = linear.worst_case(scale * np.eye(K), 3 * np.eye(K), np.arange(K), eps=0.1, norm="l2")
    assert np.linalg.norm(x_adv - 3 * np.eye(K), axis=1).max() <= 0.1 * (1 + 1e-9)


@given(st.integers(0, 10_000), st.integers(1, 6), st.floats(0.1, 3), st.sampled_from([1e-3, 1.0, 100.0]))
@settings(max_examples=60)
def test_rows_on_one_line_leave_the_ball_no_more_than_others(seed, m, share, scale):
    """Opposite differences of rows span no plane: what rounding leaves of one need not be orthogonal to the other."""
    rng = np.random.default_rng(seed)
    w, x = rng.normal(size=m), rng.normal(size=(1, m))
    W, y = scale * np.stack([w, 0 * w, -share * w]), np.array([1])
    x_adv = linear.worst_case(W, x, y, eps=0.7, norm="l2")
    assert np.linalg.norm(x_adv - x) <= 0.7 * (1 + 1e-9)
    ends = x + 0.7 * np.array([[1], [-1]]) * w / np.linalg.norm(w)
    exact = (logsumexp(ends @ W.T, axis=1) - ends @ W[1]).max()
    assert np.allclose(linear.robust_loss(W, x, y, eps=0.7, norm="l2"), exact, rtol=2e-6, atol=1e-12)


def test_three_classes_max_norm_is_exact_in_many_dimensions():
    rng = np.random.default_rng(10)
    x, y = points(3, m=10, n=40)
    W = rng.normal(size=(3, 10))
    W[:, 0] = W[0, 0]  # a coordinate that no class looks at
    W[1, 1] = W[0, 1]  # and one that two of them do not
    lower, upper = linear.robust_loss(W, x, y, eps=0.2, norm="linf")
    assert np.allclose(lower, brute_loss(W, x, y, 0.2, "linf"), rtol=0, atol=1e-12)
    assert np.array_equal(lower, upper) or np.allclose(lower, upper, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm, m", [("linf", 200), ("l2", 20)])
def test_three_classes_take_no_memory_by_the_number_of_points(norm, m):
    """And the values are those of the points one by one."""
    x, y = points(3, m=m, n=400)
    W = np.random.default_rng(12).normal(size=(3, m))
    tracemalloc.start()
    lower, upper = linear.robust_loss(W, x, y, eps=0.2, norm=norm)
    assert tracemalloc.get_traced_memory()[1] < 150e6
    tracemalloc.stop()
    some = [linear.robust_loss(W, x[i : i + 1], y[i : i + 1], eps=0.2, norm=norm) for i in range(0, 400, 9)]
    np.testing.assert_allclose(np.hstack(some), [lower[::9], upper[::9]], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("K", [4, 5, 10])
def test_more_classes_fall_short_rarely_and_by_little(K):
    short = []
    for seed, scale in itertools.product(range(3), (0.1, 1.0, 3.0)):
        x, y = points(K, seed=seed, m=8, n=40)
        W = scale * np.random.default_rng(seed).normal(size=(K, 8))
        brute = brute_loss(W, x, y, 0.3, "linf")
        short.append((brute - linear.robust_loss(W, x, y, eps=0.3, norm="linf")[0]) / brute)
    short = np.concatenate(short)
    assert short.min() >= -1e-12
    assert short.mean() < 1e-3 and np.mean(short < 1e-9) > 0.98


# -- minimisation


@pytest.mark.parametrize("K, norm, bias", EVERY)
def test_the_minimiser_is_constant_above_eps_bar_only(K, norm, bias):
    x, y = points(K, seed=11)
    bar = linear.eps_bar(x, y, norm=norm, bias=bias)
    pi = np.bincount(y) / len(y)
    constant = -(pi * np.log(pi)).sum() if bias else np.log(K)
    above = linear.minimize(x, y, eps=1.02 * bar, norm=norm, bias=bias, max_gap=1e-7)
    assert above.loss == pytest.approx(constant, abs=2e-6)
    # L(W) - L(constant) >= slope >= (eps - eps_bar) sum_k pi_k ||a_k||_*, so a small gap forces small weights:
    assert 0 <= above.gap < 5e-6
    assert np.abs(above.W).max() < 2e-4
    below = linear.minimize(x, y, eps=0.8 * bar, norm=norm, bias=bias, max_gap=1e-4)
    assert below.loss < constant - 1e-4
    assert np.linalg.norm(below.W) > 1e-2


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("bias", [False, True])
def test_two_classes_against_the_direct_convex_program(norm, bias):
    x, y = points(2, seed=12, n=20)
    bar = linear.eps_bar(x, y, norm=norm, bias=bias)
    sign = 2 * y - 1
    for share in (0.5, 0.9, 0.99, 1.05):
        w, b = cp.Variable(2), cp.Variable() if bias else 0
        z = -cp.multiply(sign, x @ w + b) + share * bar * cp.norm(w, DUAL[norm])
        value = cp.Problem(cp.Minimize(cp.sum(cp.logistic(z)) / len(y))).solve(solver="CLARABEL")
        got = linear.minimize(x, y, eps=share * bar, norm=norm, bias=bias)
        assert got.loss == pytest.approx(value, abs=5e-7)
        assert got.loss - got.gap <= value + 1e-9  # the certificate
        assert np.allclose(got.W[1] - got.W[0], w.value, atol=1e-3)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_three_classes_against_a_direct_search(norm):
    x, y = points(3, seed=13)
    eps = 0.7 * linear.eps_bar(x, y, norm=norm)
    got = linear.minimize(x, y, eps=eps, norm=norm)
    assert got.gap < 1e-6
    assert brute_loss(got.W, x, y, eps, norm).mean() == pytest.approx(got.loss, abs=1e-6)
    start = got.W + 0.1 * np.random.default_rng(0).normal(size=(3, 2))

    def loss(w):
        return linear.robust_loss(w.reshape(3, 2), x, y, eps=eps, norm=norm)[1].mean()

    found = minimize(
        loss, start.ravel(), method="Nelder-Mead", options={"maxiter": 3000, "fatol": 1e-10, "xatol": 1e-8}
    )
    assert got.loss - got.gap <= found.fun
    assert found.fun == pytest.approx(got.loss, abs=1e-4)


def test_without_an_attack_it_is_logistic_regression():
    x, y = points(3, seed=14, n=60, spread=0.5)
    got = linear.minimize(x, y, eps=0.0, norm="l2", bias=True)
    peer = LogisticRegression(C=np.inf, tol=1e-10, max_iter=10_000).fit(x, y)
    assert got.gap < 1e-7
    W = peer.coef_ - peer.coef_.mean(0)
    assert np.allclose(got.W, W, atol=1e-4)
    assert np.allclose(got.b, peer.intercept_ - peer.intercept_.mean(), atol=1e-4)


def test_the_lower_bound_holds_whatever_the_solver_says():
    """Cuts, weights and W that are off: the bound gets worse, never wrong."""
    x, y = points(3, seed=15)
    eps = 0.6 * linear.eps_bar(x, y, norm="linf")
    least = linear.minimize(x, y, eps=eps, norm="linf").loss
    cuts = np.vstack([x + c for c in ball(eps, "linf", 2)])
    owner = np.tile(np.arange(len(y)), 4)
    W, b, _, weights = linear._solve_cuts(cuts, y[owner], owner, 3, False)
    assert linear._floor(cuts, y[owner], owner, W, b, weights) == pytest.approx(least, abs=1e-7)
    rng = np.random.default_rng(0)
    floors = []
    for off in np.repeat([0.01, 0.1, 0.3], 20):
        near = W + off * rng.normal(size=(3, 2)), b, (weights + off / 100) * rng.uniform(1 - off, 1 + off, len(cuts))
        floors.append(linear._floor(cuts, y[owner], owner, *near))
    assert max(floors) <= least + 1e-9
    assert np.isfinite(floors).sum() > 20


@pytest.mark.parametrize("m", [1, 2, 20])
def test_there_is_no_positive_lower_bound_where_the_infimum_is_zero(m):
    rng = np.random.default_rng(0)
    y = np.arange(6) % 2
    x = rng.uniform(0.5, 1.5, (6, m)) * (2 * y - 1)[:, None]
    for scale in (0.0, 0.1, 1.0, 10.0):
        W = scale * rng.normal(size=(2, m))
        assert linear._floor(x, y, np.arange(6), W, np.zeros(2), np.ones(6)) <= 0


@pytest.mark.parametrize("K, norm, rel", [(2, "linf", 5e-4), (2, "l2", 5e-4), (3, "linf", 5e-3), (3, "l2", 5e-3)])
@pytest.mark.parametrize("bias", [False, True])
def test_the_norm_of_the_minimiser_reaches_zero_at_eps_bar(K, norm, rel, bias):
    x, y = points(K, seed=16)
    bar = linear.eps_bar(x, y, norm=norm, bias=bias)
    eps = bar * np.array([0.96, 0.97, 0.98, 0.99])
    sizes = [np.linalg.norm(linear.minimize(x, y, eps=e, norm=norm, bias=bias).W) for e in eps]
    root = np.polynomial.Polynomial.fit(sizes, eps, 2)(0.0)
    assert root == pytest.approx(bar, rel=rel)


@pytest.mark.parametrize("K, norm", [(2, "linf"), (2, "l2"), (3, "linf")])
def test_the_loss_gap_is_at_least_quadratic(K, norm):
    """log K - min L_eps >= 2 (eps_bar - eps)^2 / mean_n r_n^2, r_n the largest range of logits in the ball under the
    direction U that attains eps_bar, sum_k pi_k ||u_k||_* = 1."""
    x, y = points(K, seed=17)
    bar = linear.eps_bar(x, y, norm=norm)
    U = linear.minimize(x, y, eps=0.999 * bar, norm=norm).W  # nearly that direction
    pi = np.bincount(y) / len(y)
    U = U / (pi * np.linalg.norm(U, DUAL[norm], axis=1)).sum()
    for eps in bar * np.array([0.5, 0.8, 0.95]):
        decline = -linear.slope(U, x, y, eps=eps, norm=norm)
        assert decline == pytest.approx(bar - eps, rel=0.05)
        logits = [(p + ball(eps, norm, 2)) @ U.T for p in x]
        ranges = np.array([np.ptp(z, axis=1).max() for z in logits])
        gap = np.log(K) - linear.minimize(x, y, eps=eps, norm=norm).loss
        assert gap >= 2 * decline**2 / np.mean(ranges**2)


# -- separability


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("bias", [False, True])
def test_eps_sep_is_half_the_distance_of_the_hulls(norm, bias):
    """The dual: with a bias half the distance of the two hulls, without one that of the hull of the y_i x_i from 0."""
    rng = np.random.default_rng(18)
    x = rng.normal(size=(12, 3)) + 3 * np.repeat([[1.0, 0, 0], [-1.0, 0.3, 0]], 6, axis=0)
    y = np.repeat([1, 0], 6)
    a = cp.Variable(12, nonneg=True)
    sums = [cp.sum(a[:6]) == 0.5, cp.sum(a[6:]) == 0.5] if bias else [cp.sum(a) == 1]
    nearest = cp.multiply(a, 2 * y - 1) @ x
    hull = cp.Problem(cp.Minimize(cp.norm(nearest, ORD[norm])), sums)
    expected = hull.solve(solver="CLARABEL")
    got = linear.eps_sep(x, y, norm=norm, bias=bias)
    assert got == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="no minimiser"):
        linear.minimize(x, y, eps=0.99 * got, norm=norm, bias=bias)
    assert got < linear.eps_bar(x, y, norm=norm, bias=bias)
    assert linear.minimize(x, y, eps=1.05 * got, norm=norm, bias=bias).gap < 1e-5


@pytest.mark.parametrize("kind", [np.uint8, np.uint64])
def test_labels_without_a_sign_are_labels(kind):
    x, y = np.array([[3.0, 3.0], [2.0, 4.0], [-3.0, -3.0]]), np.array([1, 1, 0])
    got = [f(x, y.astype(kind)) for f in (
        lambda x, y: linear.eps_sep(x, y, norm="l2"), lambda x, y: linear.eps_sep(x, y, norm="linf", bias=True),
        lambda x, y: linear.robust_loss(np.eye(2), x, y, eps=0.1, norm="l2")[0][0],
        lambda x, y: linear.minimize(x, y, eps=9.0, norm="l2").loss,
    )]  # fmt: skip
    assert got == pytest.approx([18**0.5, 3, np.logaddexp(0, 0.1 * 2**0.5), np.log(2)])


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("offset", [1e3, 1e6, 1e9])
def test_eps_sep_far_from_the_origin(norm, offset):
    x, y = np.array([[0.0, 0], [1, 0], [0, 1], [1, 1]]), np.array([0, 1, 0, 1])
    assert linear.eps_sep(x + offset, y, norm=norm, bias=True) == pytest.approx(0.5, rel=1e-5)
    with pytest.raises(ValueError, match="no minimiser"):
        linear.minimize(x + offset, y, eps=0.49, norm=norm, bias=True)
    best = linear.minimize(x + offset, y, eps=0.51, norm=norm, bias=True)
    assert best.loss == pytest.approx(np.log(2), abs=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("far", [[1e4, 0], [1e8, 0], [1e8, 1e8], [1, 1e8], [1e12, 0]])
@pytest.mark.parametrize("bias", [False, True])
def test_eps_sep_with_one_point_far_away(norm, far, bias):
    x, y = np.array([[0.0, 0], [1, 0], [0, 1], [1, 1], far]), np.array([0, 1, 0, 1, 1])
    x[:, 0] -= 0.5
    assert linear.eps_sep(x, y, norm=norm, bias=bias) == pytest.approx(0.5, rel=2e-5)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [1e-8, 1.0, 100.0, 1e8])
def test_eps_sep_where_most_points_are_the_origin(norm, bias, size):
    x = size * np.array([[-1.0], [-2.0], [1.0], [0.0], [0.0], [0.0], [0.0]])
    assert linear.eps_sep(x, np.array([0, 1, 1, 0, 0, 0, 1]), norm=norm, bias=bias) == pytest.approx(0, abs=1e-5 * size)
    apart = linear.eps_sep(abs(x), np.array([1, 1, 1, 0, 0, 0, 0]), norm=norm, bias=bias)
    assert apart == pytest.approx(0.5 * size if bias else 0, rel=1e-5, abs=1e-5 * size)


def test_eps_sep_that_float64_does_not_tell_is_refused():
    x, y = np.array([[0.0, 0], [1, 0], [0, 1], [1, 1]]), np.array([0, 1, 0, 1])
    with pytest.raises(ValueError, match="float64 does not tell"):
        linear.eps_sep(x + np.array([0, 1e9]), y, norm="l2")  # without a bias


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("share", [0.99, 1 - 1e-6, 1 - 1e-7])
def test_there_is_no_minimiser_up_to_the_margin(norm, share):
    x, y = np.array([[0.0, 0], [1, 0], [0, 1], [1, 1]]), np.array([0, 1, 0, 1])
    for size in (1e-3, 1, 1e3):
        with pytest.raises(ValueError, match="no minimiser"):
            linear.minimize(size * x, y, eps=0.5 * size * share, norm=norm, bias=True)


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_constant_classifiers_are_in_t(eps):
    x, y = points(3)
    rows = np.random.default_rng(0).normal(size=(200, 1, 2)).repeat(3, axis=1)
    assert linear.in_t(rows, x, y, eps=eps, norm="l2").all()


def test_eps_sep_of_mixed_points_is_zero():
    x, y = np.array([[1.0], [-1.0], [0.5], [-0.5]]), np.array([0, 0, 1, 1])
    assert linear.eps_sep(x, y, norm="l2", bias=True) == pytest.approx(0, abs=1e-8)


def test_one_class_apart_is_enough_to_have_no_minimiser():
    """Classes 0 and 1 mix, class 2 is far away: the infimum is not 0 and yet not attained."""
    x = np.array([[0.0, 1.0], [0.0, -1.0], [0.1, 0.5], [0.1, -0.5], [9.0, 0.0], [9.0, 1.0]])
    y = np.array([0, 0, 1, 1, 2, 2])
    with pytest.raises(ValueError, match="no minimiser"):
        linear.minimize(x, y, eps=0.1, norm="l2", bias=True)


# -- bad input

X, Y = points(3)
W3 = np.ones((3, 2))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: linear.eps_bar(X, 0 * Y, norm="l2"), "one class only"),
        (lambda: linear.eps_bar(X, 2 * Y, norm="l2"), "labels skip class 1"),
        (lambda: linear.eps_bar(X, Y, norm="l1"), "unknown norm 'l1'"),
        (lambda: linear.eps_bar(np.where(X > 0, X, np.nan), Y, norm="linf"), "NaN or infinite"),
        (lambda: linear.eps_bar(X, Y[:-1], norm="linf"), "y must be 14 integer labels"),
        (lambda: linear.eps_bar(X, Y - 1, norm="linf"), "y must be 14 integer labels"),
        (lambda: linear.eps_bar(X, Y + 0.5, norm="linf"), "y must be 14 integer labels"),
        (lambda: linear.eps_bar(X[:, :, None], Y, norm="linf"), "flatten images first"),
        (lambda: linear.eps_bar(X[:0], Y[:0], norm="linf"), r"points \(N, m\)"),
        (lambda: linear.eps_sep(X, Y, norm="linf"), "two classes, got 3"),
        (lambda: linear.eps_sep(X, np.minimum(Y, 1), norm="lp"), "unknown norm"),
        (lambda: linear.minimize(X, Y, eps=-1.0, norm="l2"), "eps must be finite and not negative"),
        (lambda: linear.minimize(X, Y, eps=1.0, norm="l3"), "unknown norm"),
        (lambda: linear.margins(W3[:2], X, Y, eps=0, norm="l2"), "label 2 has no row in W"),
        (lambda: linear.margins(W3[:, :1], X, Y, eps=0, norm="l2"), r"W must be weights \(..., K, 2\)"),
        (lambda: linear.margins(W3 * np.inf, X, Y, eps=0, norm="l2"), "W or b holds NaN"),
        (lambda: linear.margins(W3, X, Y, eps=0, norm="l2", b=np.ones(2)), "b must have shape"),
        (lambda: linear.margins(W3, X, Y, eps=np.nan, norm="l2"), "eps must be finite"),
        (lambda: linear.slope(W3, X, Y, eps=0, norm="L2"), "unknown norm 'L2'"),
        (lambda: linear.robust_loss(W3[None], X, Y, eps=0, norm="l2"), "one classifier"),
        (lambda: linear.eps_bar(np.ma.masked_less(X, 0), Y, norm="l2"), "x holds NaN"),
        (lambda: linear.eps_bar(X, np.ma.masked_equal(Y, 1), norm="l2"), "y must be 14 integer labels"),
        (lambda: linear.margins(np.ma.masked_equal(W3, 1), X, Y, eps=0, norm="l2"), "W or b holds NaN"),
        (lambda: linear.margins(W3, X, Y, eps=0, norm="l2", b=np.ma.masked_equal([1, 0, 0], 1)), "W or b holds NaN"),
        (lambda: linear.eps_bar(X * 1j, Y, norm="l2"), "values must be real"),
        (lambda: linear.margins(W3 * 1j, X, Y, eps=0, norm="l2"), "values must be real"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
