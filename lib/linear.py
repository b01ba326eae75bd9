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
from scipy.special import logsumexp, softmax

DUAL = {"linf": 1, "l2": 2}
ARC = 1024  # pieces of the arc in which the worst Euclidean perturbation of three classes is sought


def margins(W, x, y, *, eps, norm, b=None):
    """Robust margin of every point: min over j != y of -d_j.x + b_y - b_j - eps ||d_j||_*.

    Args:
        W: weights (..., K, m); leading dimensions are many classifiers at once.
        x: points (N, m). y: labels (N,) in 0..K-1.
        eps: radius, >= 0. norm: "linf" or "l2". b: biases (..., K).
    Returns:
        (..., N). Positive: no perturbation changes the prediction.
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


def robust_error(W, x, y, *, eps, norm, b=None):
    """Share of the points that some x' with ||x' - x|| <= eps makes an error, exactly, for any number of classes.

    A point is an error when another class reaches the score of its own, so a tie is one. eps=0 gives the error.
    Arguments and errors as for `margins`; the result has W's leading dimensions.
    """
    return (margins(W, x, y, eps=eps, norm=norm, b=b) <= 0).mean(-1)


def in_v(W, x, y, *, eps, norm, b=None):
    """Whether W is in the version space V_eps: every point keeps its label in its whole ball, ties allowed.

    Arguments and errors as for `margins`; boolean, of the shape of W's leading dimensions.
    """
    return (margins(W, x, y, eps=eps, norm=norm, b=b) >= 0).all(-1)


def slope(W, x, y, *, eps, norm, bias=False):
    """One-sided derivative of gamma -> L_eps(gamma W) at gamma = 0: sum_k pi_k (eps ||a_k||_* - a_k.m_k).

    Here pi_k and m_k are frequency and mean of class k and a_k = w_k - sum_j rho_j w_j, with rho_j = 1/K; or, with a
    bias, rho_j = pi_j: then the derivative is taken at the best classifier without weights, b = log pi.
    Arguments, result and errors as for `margins`.
    """
    W, x, y, _ = _classifier(W, x, y, eps, norm, None)
    pi, means = _moments(x, y, W.shape[-2])
    rho = pi if bias else np.full(len(pi), 1 / len(pi))
    a = W - np.einsum("k,...km->...m", rho, W)[..., None, :]
    sizes = np.linalg.norm(a, ord=DUAL[norm], axis=-1)
    return (pi * (eps * sizes - (a * means).sum(-1))).sum(-1)


def in_t(W, x, y, *, eps, norm):
    """Whether W is in T_eps: no positive multiple of W has a smaller robust loss than the origin.

    L_eps is convex, so the sign of `slope` decides. Arguments, result and errors as for `margins`.
    """
    return slope(W, x, y, eps=eps, norm=norm) >= 0


def eps_bar(x, y, *, norm, bias=False, num_classes=None):
    """The budget from which on a constant classifier is optimal (Theorem 1).

    It is min_v max_k ||c_k - v|| / r_k, where without a bias c_k = pi_k m_k and r_k = pi_k, and with a bias c_k = m_k
    and r_k = 1 (the smallest ball round the class means). Two classes: ||c_0 - c_1|| / (r_0 + r_1). Max norm: the
    largest such number over all pairs. Else a convex program.

    Args:
        x: points (N, m). y: labels (N,) in 0..K-1. norm: "linf" or "l2".
        bias: whether the classifier has a bias, which the attack cannot touch.
        num_classes: K; by default every class must have points. A class without points counts (it can be predicted).
    Returns:
        float, in the units of x.
    Raises:
        ValueError: one class only, labels that skip a class (unless num_classes is given), unknown norm, shapes that
            do not match, values that are not finite.
    """
    _check_norm(norm)
    x, y, K = _data(x, y, num_classes)
    pi, means = _moments(x, y, K)
    if bias:  # a class without points is shut out by its bias
        centres, radii = means[pi > 0], np.ones(np.count_nonzero(pi))
    else:
        centres, radii = means * pi[:, None], pi
    if len(radii) == 1:
        return 0.0
    if norm == "linf" or len(radii) == 2:
        rows, columns = np.triu_indices(len(radii), 1)
        some = radii[rows] + radii[columns] > 0
        rows, columns = rows[some], columns[some]
        distances = np.linalg.norm(centres[rows] - centres[columns], ord=_ORD[norm], axis=1)
        return float((distances / (radii[rows] + radii[columns])).max())
    if radii.min() == 0:  # then v = 0
        return float(np.linalg.norm(means, axis=1).max())
    return _smallest_ball(centres, radii)


_ORD = {"linf": np.inf, "l2": 2}


def _smallest_ball(centres, radii):
    """min_v max_k ||c_k - v||_2 / r_k. The best v is an affine combination of the centres, so few variables do."""
    offsets = centres[1:] - centres[0]
    scale = np.abs(offsets).max()
    if scale == 0:
        return 0.0
    points = np.vstack([np.zeros(len(offsets)), np.linalg.qr((offsets / scale).T, mode="r").T])
    v, t = cp.Variable(points.shape[1]), cp.Variable()
    balls = [cp.norm(p - v) <= t * r for p, r in zip(points, radii / radii.max(), strict=True)]
    _solve(cp.Problem(cp.Minimize(t), balls))
    return float(scale * (np.linalg.norm(points - v.value, axis=1) / radii).max())
