"""Section 3.1 in closed form: linear classifiers x -> W x + b against an attack in a max-norm or Euclidean ball.

Notation: W (K, m) has a row per class, d_j = w_j - w_y for a point of class y, ||.|| is the norm of the ball and
||.||_* its dual (L1 for "linf", L2 for "l2"). The robust loss of a point is the largest cross entropy in the ball, in
nats, and L_eps(W) is its mean over the points. Inputs are rows in any units, eps is in the same units, and there is no
box of allowed values round the inputs, as in the paper's section. All in float64.
"""

import warnings
from typing import NamedTuple

import cvxpy as cp
import numpy as np
from scipy.special import entr, logsumexp, softmax

from .checks import as_numbers, check_choice, check_eps

DUAL = {"linf": 1, "l2": 2}
ARC = 1024  # pieces of the arc in which the worst Euclidean perturbation of three classes is sought


def margins(W, x, y, *, eps, norm, b=None):
    """Robust margin of every point: min over j != y of -d_j.x + b_y - b_j - eps ||d_j||_*.

    Args:
        W: weights (..., K, m); leading dimensions are many classifiers at once.
        x: points (N, m). y: labels (N,) in 0..K-1.
        eps: radius, >= 0. norm: "linf" or "l2". b: biases (..., K).
    Returns:
        (..., N). Positive: no perturbation changes the prediction; so the share of the others is the robust error, a
        tie counted as an error.
    Raises:
        ValueError: shapes that do not match, values that are not finite, labels outside 0..K-1, unknown norm.
    """
    W, x, y, b = _classifier(W, x, y, eps, norm, b)
    K = W.shape[-2]
    logits = np.einsum("...km,nm->...nk", W, x) + b[..., None, :]
    sizes = np.linalg.norm(W[..., :, None, :] - W[..., None, :, :], ord=DUAL[norm], axis=-1)  # (..., K, K)
    own = np.take_along_axis(logits, np.broadcast_to(y[:, None], (*logits.shape[:-1], 1)), -1)
    gaps = own - logits - eps * sizes[..., y, :]
    return np.where(np.arange(K) == y[:, None], np.inf, gaps).min(-1)


def in_v(W, x, y, *, eps, norm, b=None):
    """Whether W is in the version space V_eps: every point keeps its label in its whole ball, ties allowed.

    Arguments and errors as for `margins`; boolean, of the shape of W's leading dimensions.
    """
    return (margins(W, x, y, eps=eps, norm=norm, b=b) >= 0).all(-1)


def slope(W, x, y, *, eps, norm):
    """One-sided derivative of gamma -> L_eps(gamma W) at gamma = 0: sum_k pi_k (eps ||a_k||_* - a_k.m_k).

    Here pi_k and m_k are frequency and mean of class k, and a_k = w_k less the mean row. Arguments and errors as for
    `margins`; floats, of the shape of W's leading dimensions.
    """
    W, x, y, _ = _classifier(W, x, y, eps, norm, None)
    pi, means = _moments(x, y, W.shape[-2])
    equal = (W[..., :1, :] == W).all(-2, keepdims=True)  # a mean of equal numbers is rounded
    a = np.where(equal, 0, W - W.mean(-2, keepdims=True))
    sizes = np.linalg.norm(a, ord=DUAL[norm], axis=-1)
    return (pi * (eps * sizes - (a * means).sum(-1))).sum(-1)


def in_t(W, x, y, *, eps, norm):
    """Whether W is in T_eps: no positive multiple of W has a smaller robust loss than the origin.

    L_eps is convex, so the sign of `slope` decides. Arguments and errors as for `margins`; boolean, of the shape of W's
    leading dimensions.
    """
    return slope(W, x, y, eps=eps, norm=norm) >= 0


def eps_bar(x, y, *, norm, bias=False):
    """The budget from which on a constant classifier is optimal (Theorem 1).

    It is min_v max_k ||c_k - v|| / r_k, where without a bias c_k = pi_k m_k and r_k = pi_k, and with a bias c_k = m_k
    and r_k = 1 (the smallest ball round the class means). Two classes: ||c_0 - c_1|| / (r_0 + r_1). Max norm: the
    largest such number over all pairs. Else a convex program.

    Args:
        x: points (N, m). y: labels (N,) in 0..K-1, every class among them. norm: "linf" or "l2".
        bias: whether the classifier has a bias, which the attack cannot touch.
    Returns:
        float, in the units of x.
    Raises:
        ValueError: one class only, labels that skip a class, unknown norm, shapes that do not match, values that are
            not finite.
    """
    x, y, K = _data(x, y, norm)
    radii, means = _moments(x, y, K)
    if bias:
        radii = np.ones(K)
    centres = means * radii[:, None]
    if norm == "l2" and K > 2:
        return _smallest_ball(centres, radii)
    i, j = np.triu_indices(K, 1)
    distances = np.linalg.norm(centres[i] - centres[j], ord={"linf": np.inf, "l2": 2}[norm], axis=1)
    return float((distances / (radii[i] + radii[j])).max())


def _smallest_ball(centres, radii):
    """min_v max_k ||c_k - v||_2 / r_k."""
    points = centres - centres[0]
    scale = np.abs(points).max() or 1.0
    v, t = cp.Variable(points.shape[1]), cp.Variable()
    balls = [cp.norm(p - v) <= t * r for p, r in zip(points / scale, radii / radii.max(), strict=True)]
    _solve(cp.Problem(cp.Minimize(t), balls))
    return float((np.linalg.norm(points - scale * v.value, axis=1) / radii).max())


def eps_sep(x, y, *, norm, bias=False):
    """The largest budget against which some classifier of two classes is right at every point: the largest margin.

    Below it the robust loss has infimum 0 and no minimiser. A float in the units of x, 0 if no classifier separates
    the points. Arguments and errors as for `eps_bar`; also ValueError for more than two classes, and for points of such
    unequal sizes that the margin found and the dual's bound of it are apart.
    """
    x, y, K = _data(x, y, norm)
    if K != 2:
        raise ValueError(f"eps_sep is for two classes, got {K}")
    x, _ = _centred(x, bias)
    scale = np.abs(x).max() or 1.0
    # The solver's tolerances are absolute: first at the scale of the largest point, where its t has more digits than
    # the bound that is proved for its w; if bounds are apart there, at each point's own, where that bound is taken.
    own = np.linalg.norm(x, axis=1)
    own = np.maximum(own, np.median(own))
    best, spread = 0.0, np.median(np.abs(x - np.median(x, axis=0)).max(1)) or np.median(own)
    spread = spread or own.min(where=own > 0, initial=scale)  # where most points are one, and that is the origin
    for size in (np.full(len(y), scale), np.where(own > 0, own, scale)):
        t, low, high = _margin(x, y, norm, bias, size)
        best = max(best, low)
        if high - best <= max(1e-5 * high, 1e-6 * spread):
            return max(0.0, t) if size[0] == scale else best
    raise ValueError(
        f"the largest margin lies between {best:.3g} and {high:.3g}, and float64 does not tell where: shift and scale "
        "the points so that they are of one size"
    )


def _margin(x, y, norm, bias, size):
    """The largest margin as the solver has it, and bounds of it, where the rows of its program are divided by size.

    The lower bound is the margin of the solver's w; the upper one, the distance that its multipliers make of the dual.
    """
    sign, unit = 2.0 * y - 1, np.median(size)
    w, b, t = cp.Variable(x.shape[1]), cp.Variable() if bias else 0.0, cp.Variable()
    ratio = unit / size
    rows = cp.multiply(sign, (x / size[:, None]) @ w + cp.multiply(ratio, b)) >= cp.multiply(ratio, t)
    _solve(cp.Problem(cp.Maximize(t), [rows, cp.norm(w, DUAL[norm]) <= 1]))
    scores = sign * (x @ w.value)
    least = (scores[y == 0].min() + scores[y == 1].min()) / 2 if bias else scores.min()
    weights = np.maximum(rows.dual_value, 0) * ratio
    weights /= np.array([weights[y == k].sum() * 2 for k in (0, 1)])[y] if bias else weights.sum()
    high = np.linalg.norm((weights * sign) @ x, ord={"linf": np.inf, "l2": 2}[norm])
    return unit * float(t.value), least / max(np.linalg.norm(w.value, DUAL[norm]), 1.0), high


def _centred(x, bias):
    """x less a centre, and that: the median if there is a bias and it is far away, lest differences lose digits."""
    centre = np.median(x, axis=0)
    far = bias and np.abs(centre).max() > 1e3 * np.median(np.abs(x - centre).max(1))
    return (x - centre, centre) if far else (x, np.zeros(x.shape[1]))


def worst_case(W, x, y, *, eps, norm, b=None):
    """The perturbed points x' (N, m) of largest loss; see `robust_loss` for how exact that is."""
    W, x, y, b = _classifier(W, x, y, eps, norm, b)
    return _worst(W, x, y, eps, norm, b)[0]


def robust_loss(W, x, y, *, eps, norm, b=None):
    """Robust loss of each point, from below and from above.

    Exact for two classes (x' = x - y eps sign(w), or along w) and for three under the max norm, where the largest
    loss is at one of m + 1 corners; three under the Euclidean norm: an arc cut in pieces, apart by a relative 1e-6.
    From four classes on a convex function is to be maximised over a ball with many corners: the lower value is the
    best of K - 1 searches of five Frank-Wolfe steps, each from the point that is worst for one class; the upper one is
    log(1 + sum_j exp(d_j.x + eps ||d_j||_*)).

    Args:
        W: weights (K, m), one classifier; otherwise as for `margins`.
    Returns:
        (lower, upper), each (N,), lower attained at `worst_case`.
    Raises:
        ValueError: as for `margins`.
    """
    W, x, y, b = _classifier(W, x, y, eps, norm, b)
    x_adv, upper = _worst(W, x, y, eps, norm, b)
    lower = _loss(W, x_adv, y, b)
    return lower, np.maximum(upper, lower)


def _worst(W, x, y, eps, norm, b):
    """x' and an upper bound of the loss. Classes are renumbered from the point's own: z_j = d_j.x + b_j - b_y."""
    if W.ndim != 2:
        raise ValueError(f"W must be one classifier (K, m), got shape {W.shape}")
    K = len(W)
    others = (y[:, None] + np.arange(1, K)) % K
    d = W[others] - W[y][:, None]  # (N, K - 1, m)
    z = np.einsum("njm,nm->nj", d, x) + b[others] - b[y][:, None]
    bound = np.logaddexp(0, logsumexp(z + eps * np.linalg.norm(d, ord=DUAL[norm], axis=-1), axis=1))
    if K == 2:
        return x + eps * _towards(d[:, 0], norm), bound
    if K == 3:  # so many points at a time that some hundred MB are enough
        rows = max(1, 2**22 // (x.shape[1] * (x.shape[1] + 1 if norm == "linf" else 2 * ARC + 1)))
        parts = zip(*(np.split(t, range(rows, len(t), rows)) for t in (x, d, z)), strict=True)
        return tuple(map(np.concatenate, zip(*(_three(*part, eps, norm) for part in parts), strict=True)))
    delta = eps * _towards(d, norm)  # (N, K - 1, m): the worst for each other class alone
    for _ in range(5):  # each step maximises the linearised loss, which lies below the convex loss: never a step down
        delta = eps * _towards(_others(z[:, None] + delta @ d.mT) @ d, norm)
    best = logsumexp(z[:, None] + delta @ d.mT, axis=2).argmax(1)
    return x + delta[np.arange(len(x)), best], bound


def _towards(g, norm):
    """argmax of g.u over the unit ball."""
    if norm == "linf":
        return np.sign(g)
    g = np.ldexp(g, -np.frexp(np.abs(g).max(-1, keepdims=True))[1])  # else the squares of small ones would be 0
    return g / np.maximum(np.linalg.norm(g, axis=-1, keepdims=True), np.finfo(float).tiny)


def _three(x, d, z, eps, norm):
    """K = 3. The loss is convex and grows with both d_1.x' and d_2.x', so a largest one is at an extreme point of the
    ball between the one farthest along d_1 and the one farthest along d_2. Max norm: these are the corners
    sign(t d_1 + (1 - t) d_2), m + 1 at most. Euclidean norm: they are an arc, whose points give a lower bound, and the
    corners of the polygon round it, where the radius is above 1, an upper one."""
    if norm == "linf":
        first, second = d[:, 0], d[:, 1]
        flips = first * second < 0  # coordinates that change sign on the way, at t = second / (second - first)
        t = np.where(flips, second, 0) / np.where(flips, second - first, 1)
        t = np.sort(np.pad(t, ((0, 0), (1, 1)), constant_values=((0, 0), (0, 1))), axis=1)
        t = (t[:, 1:, None] + t[:, :-1, None]) / 2  # between two changes
        u, radius = np.sign(t * d[:, :1] + (1 - t) * d[:, 1:]), np.ones(t.shape[:2])
    else:
        e1 = _towards(d[:, 0], "l2")
        along = np.einsum("nm,nm->n", e1, d[:, 1])
        rest = d[:, 1] - along[:, None] * e1
        angle = np.arctan2(np.linalg.norm(rest, axis=1), along)[:, None]
        theta = angle * np.linspace(0, 1, 2 * ARC + 1)  # ends of the pieces and, between them, their middles
        radius = np.where(np.arange(2 * ARC + 1) % 2, 1 / np.cos(angle / (2 * ARC)), 1)
        side = _towards(rest, "l2")
        lean = np.einsum("nm,nm->n", e1, side)[:, None]  # of opposite d mere rounding is left, which may lie along them
        side = side - np.where(np.abs(lean) > 1e-9, lean, 0) * e1
        u = np.cos(theta)[..., None] * e1[:, None] + np.sin(theta)[..., None] * side[:, None]
    loss = np.logaddexp(0, logsumexp(z[:, None] + eps * radius[..., None] * (u @ d.mT), axis=2))
    best = np.where(radius == 1, loss, -np.inf).argmax(1)
    return x + eps * u[np.arange(len(x)), best], loss.max(1)


class Minimum(NamedTuple):
    """A classifier W (K, m), rows summing to zero, and b (K,); its robust loss, as found by `worst_case`; and a
    certified `gap`: its true robust loss exceeds the least one of all classifiers by no more."""

    W: np.ndarray
    b: np.ndarray
    loss: float
    gap: float


def minimize(x, y, *, eps, norm, bias=False, max_gap=1e-8):
    """Minimise the mean robust loss over all linear classifiers, with a certificate.

    Each round solves the convex program "mean of the largest loss among the perturbed points found so far" and adds
    the worst points for its solution. That program lies below L_eps, and a dual point of it bounds the minimum from
    below without trust in the solver (`_floor`).

    Args:
        x, y, norm, bias: as for `eps_bar`. eps: radius, >= 0.
        max_gap: the rounds end when the gap is below this (nats), when they no longer help, or after 30.
    Returns:
        Minimum. With four or more classes the gap contains the distance between the values of `robust_loss`.
    Raises:
        ValueError: the loss has no minimiser, since some direction lowers it for ever (as when the points can be
            separated by more than eps). Otherwise as for `eps_bar`.
    """
    x, y, K = _data(x, y, norm, eps)
    x, centre = _centred(x, bias)
    if _falls_for_ever(x, y, K, eps, norm, bias):
        raise ValueError(
            f"at eps={eps} some weights keep every point right with room to spare, so the robust loss falls along "
            "their multiples and has no minimiser: choose a larger eps"
        )
    scale = np.abs(x).max() or 1.0  # the solver's tolerances are absolute
    x, eps = x / scale, eps / scale
    cuts, owner = x, np.arange(len(y))
    best, ceiling, floor = Minimum(None, None, np.inf, np.inf), np.inf, -np.inf
    for _ in range(30):
        X = np.hstack([cuts, np.ones((len(cuts), 1))]) if bias else cuts
        try:
            W, b, values, weights = _solve_cuts(X, y[owner], owner, K, bias)
        except cp.SolverError:  # near the limits of double precision; what was reached is in the gap
            break
        x_adv, upper = _worst(W, x, y, eps, norm, b)
        losses = _loss(W, x_adv, y, b)
        if losses.mean() < best.loss:
            best = Minimum(W / scale, b - W @ centre / scale, float(losses.mean()), np.inf)
            ceiling = max(best.loss, float(upper.mean()))
        floor = max(floor, _floor(X, y[owner], owner, W, b, weights))
        new = losses > values + max_gap / 10
        if ceiling - floor <= max_gap or not new.any():
            break
        cuts, owner = np.vstack([cuts, x_adv[new]]), np.concatenate([owner, np.flatnonzero(new)])
    return best._replace(gap=ceiling - floor)


def _falls_for_ever(x, y, K, eps, norm, bias):
    """Whether some W has no negative robust margin and a positive one: then L_eps falls along its multiples."""
    scale = np.abs(x).max() or 1.0
    W, b = cp.Variable((K, x.shape[1])), cp.Variable(K) if bias else np.zeros(K)
    gaps = cp.hstack([
        x[y == k] / scale @ (W[k] - W[j]) + b[k] - b[j] - eps / scale * cp.norm(W[k] - W[j], DUAL[norm])
        for k in range(K) for j in range(K) if j != k
    ])  # fmt: skip
    problem = cp.Problem(cp.Maximize(cp.sum(gaps)), [gaps >= 0, cp.abs(W) <= 1])
    _solve(problem)  # bounded, since gaps >= 0 bounds the differences of b
    if problem.value > 1e-6:
        return True
    # The solver's own error is hardly less; but margins that are all positive, in float64, are proof enough.
    W, b = W.value, b.value * scale if bias else None
    return margins(W, x, y, eps=eps, norm=norm, b=b).min() > 1e-14 * scale * np.abs(W).max()


def _solve_cuts(X, y, owner, K, bias):
    """Minimise mean_n max_{c of n} loss(W, X_c): W, b, the maxima (N,) and the multipliers of the cuts c."""
    n = owner.max() + 1
    theta, t = cp.Variable((X.shape[1], K - 1)), cp.Variable(n)  # the last class is the reference
    logits = cp.hstack([X @ theta, np.zeros((len(X), 1))])
    own = cp.sum(cp.multiply(np.eye(K)[y], logits), axis=1)
    below = cp.log_sum_exp(logits, axis=1) - own <= t[owner]
    _solve(cp.Problem(cp.Minimize(cp.sum(t) / n), [below]))
    full = np.hstack([theta.value, np.zeros((X.shape[1], 1))])
    full = (full - full.mean(1, keepdims=True)).T
    W, b = (full[:, :-1], full[:, -1]) if bias else (full, np.zeros(K))
    return W, b, t.value, np.maximum(below.dual_value, 1e-12)


def _floor(X, y, owner, W, b, weights):
    """A lower bound of the minimum of the cuts' program, whatever W and weights are; tight at the optimum.

    With weights v_c >= 0 that sum to 1/N over the cuts of a point and any probabilities p_c,
    L_eps(W') >= sum_c v_c loss(W', X_c) >= sum_c v_c entropy(p_c) + <S, W'>, S = sum_{c, j} v_c p_cj X_c (e_j - e_y).
    So the entropy is a bound over all W' once S = 0, and the least relative change of p_c = softmax that makes it so
    is a least-squares problem.
    """
    K = len(W)
    weights = weights / np.bincount(owner, weights)[owner] / (owner.max() + 1)
    others = (y[:, None] + np.arange(1, K)) % K
    theta = np.hstack([W, b[:, None]])[:, : X.shape[1]]
    p = np.take_along_axis(softmax(X @ theta.T, axis=1), others, 1)
    moves = np.eye(K)[others] - np.eye(K)[y][:, None]  # (cuts, K - 1, K)
    A = np.einsum("c,ci,cm,cik->mkci", weights, p, X, moves).reshape(X.shape[1] * K, -1)
    p = p * (1 + np.linalg.lstsq(A, -A.sum(1), rcond=None)[0].reshape(p.shape))
    S = np.einsum("c,ci,cm,cik->mk", weights, p, X, moves)
    p = np.hstack([1 - p.sum(1, keepdims=True), p])
    if np.abs(S).max() > 1e-13 * np.abs(X).max():
        return -np.inf
    return float(weights @ entr(p).sum(1))  # entr is -inf where p is negative


def _solve(problem):
    with warnings.catch_warnings():  # what accuracy was reached is judged by the caller, not by the solver
        warnings.simplefilter("ignore")
        problem.solve(solver=cp.CLARABEL)


def _others(z):
    """Probabilities (..., K - 1) of the other classes, from their scores z when the own class has 0."""
    return np.exp(z - np.logaddexp(0, logsumexp(z, axis=-1, keepdims=True)))


def _loss(W, x, y, b):
    logits = x @ W.T + b
    return logsumexp(logits, axis=1) - logits[np.arange(len(y)), y]


def _moments(x, y, K):
    """Frequencies (K,) and means (K, m) of the classes; the mean of a class without points is 0."""
    counts = np.bincount(y, minlength=K)
    return counts / len(y), (np.eye(K)[y].T @ x) / np.maximum(counts, 1)[:, None]


def _points(x, y, norm, eps):
    """Checked points and labels; norm and eps are checked as well."""
    check_choice("norm", norm, DUAL)
    check_eps(eps, norm="l2")  # points have no range
    x, y = as_numbers(x), as_numbers(y) if np.ma.is_masked(y) else np.asarray(y)
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"x must be points (N, m), got shape {x.shape}: flatten images first")
    if y.shape != x.shape[:1] or not np.issubdtype(y.dtype, np.integer) or y.astype(np.int64).min() < 0:
        raise ValueError(f"y must be {len(x)} integer labels from 0 on, got {y.dtype} of shape {y.shape}")
    if not np.isfinite(x).all():
        raise ValueError("x holds NaN or infinite values")
    return x, y.astype(np.int64)  # 2 y - 1 of an unsigned type would wrap


def _data(x, y, norm, eps=0.0):
    """Checked points, labels and the number of classes."""
    x, y = _points(x, y, norm, eps)
    K = int(y.max()) + 1
    if missing := set(range(K)) - set(y.tolist()):
        raise ValueError(f"labels skip class {min(missing)}: renumber them")
    if K < 2:
        raise ValueError("one class only: any constant classifier is perfect")
    return x, y, K


def _classifier(W, x, y, eps, norm, b):
    """Checked arguments of a function of classifiers; b is zeros if it is None."""
    x, y = _points(x, y, norm, eps)
    W = as_numbers(W)
    if W.ndim < 2 or W.shape[-2] < 2 or W.shape[-1] != x.shape[1]:
        raise ValueError(f"W must be weights (..., K, {x.shape[1]}) with K >= 2, got shape {W.shape}")
    if y.max() >= W.shape[-2]:
        raise ValueError(f"label {y.max()} has no row in W, which has {W.shape[-2]}")
    b = np.zeros(W.shape[:-1]) if b is None else as_numbers(b)
    if b.shape != W.shape[:-1]:
        raise ValueError(f"b must have shape {W.shape[:-1]}, got {b.shape}")
    if not (np.isfinite(W).all() and np.isfinite(b).all()):
        raise ValueError("W or b holds NaN or infinite values")
    return W, x, y, b
