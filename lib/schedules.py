"""Budgets over training: functions of the fractional epoch, in the one unit used everywhere (fraction of the pixels).

The paper's schedules (Section 5): the budget begins at 0 or a small value and rises to the eps of interest, along a
line or a half cosine that would go on to a larger value and is clipped. A schedule that takes values below 1/255 is
as good as any other: nothing is guessed from the size of a number.
"""

import math
from bisect import bisect_right
from collections.abc import Iterable
from itertools import pairwise
from numbers import Real

from .checks import check_choice, check_eps


def constant(value, *, norm="linf"):
    """The same budget throughout. Raises ValueError for a value outside [0, 1] (L2: negative)."""
    value = check_eps(value, name="value", norm=norm)
    return lambda epoch: value


def linear(start, stop, epochs, *, clip=None, norm="linf"):
    """From start at epoch 0 to stop at `epochs`, never above clip; stop (or clip) from then on.

    Args:
        start, stop: budgets in [0, 1], start <= stop.
        epochs: length of the rise, > 0, may be fractional.
        clip: largest value given, None for no limit.
        norm: of the ball; with "l2" budgets may be larger than 1.
    Returns:
        A function epoch -> eps, epoch a float >= 0.
    Raises:
        ValueError: a value outside [0, 1], a schedule that runs backwards (stop < start or epochs <= 0).
    """
    return _rise(start, stop, epochs, clip, norm, lambda t: t)


def cosine(start, stop, epochs, *, clip=None, norm="linf"):
    """As `linear`, but along half a cosine: slow at both ends."""
    return _rise(start, stop, epochs, clip, norm, lambda t: (1 - math.cos(math.pi * t)) / 2)


def cosine_misread(start, stop, epochs, *, clip=None, norm="linf"):
    """`cosine`, read in the wrong unit while it is small: what is below 1 in pixels is taken for a fraction.

    The authors' code keeps budgets in pixels and takes every number below 1 for a fraction of the range, so that a
    cosine from 0 to 16 pixels passes through budgets of up to 255/255 first. Here to measure whether that matters.
    """
    right = cosine(start, stop, epochs, clip=clip, norm=norm)

    def eps(epoch):
        pixels = 255 * right(epoch)
        return pixels if pixels < 1 else right(epoch)

    return eps


def _rise(start, stop, epochs, clip, norm, shape):
    limits = {"start": start, "stop": stop, "clip": stop if clip is None else clip}
    start, stop, clip = (check_eps(value, name=name, norm=norm) for name, value in limits.items())
    if stop < start:
        raise ValueError(f"the schedule runs backwards: it starts at {start} and stops at {stop}")
    if not isinstance(epochs, Real) or not 0 < epochs < math.inf:
        raise ValueError(f"the schedule runs backwards: epochs must be positive and finite, got {epochs}")

    def eps(epoch):
        if not epoch >= 0:
            raise ValueError(f"epoch must not be negative or NaN, got {epoch}")
        return min(start + (stop - start) * shape(min(epoch / epochs, 1.0)), clip)

    return eps


def periodic(schedule, restarts):
    """A schedule begun anew at each of the epochs in restarts.

    Args:
        schedule: a function of the epoch, or a list of them, one for each of the len(restarts) + 1 periods.
        restarts: epochs, positive and increasing.
    Returns:
        A function of the epoch; inside a period its schedule gets the epochs since the period began.
    Raises:
        ValueError: restarts out of order, or another number of schedules than of periods.
    """
    begins = check_restarts(restarts)
    parts = list(schedule) if isinstance(schedule, (list, tuple)) else [schedule] * len(begins)
    if len(parts) != len(begins):
        raise ValueError(f"{len(begins)} periods need as many schedules, got {len(parts)}")

    def value(epoch):
        k = max(bisect_right(begins, epoch) - 1, 0)
        return parts[k](epoch - begins[k])

    return value


def check_restarts(restarts):
    """The epochs at which periods begin, 0 included. Raises ValueError for restarts out of order."""
    begins = [0, *restarts] if isinstance(restarts, Iterable) else []
    if not begins or any(not a < b for a, b in pairwise(begins)):
        raise ValueError(f"restarts must be positive epochs in increasing order, got {restarts}")
    return begins


SCHEDULES = {"constant": constant, "linear": linear, "cosine": cosine, "cosine_misread": cosine_misread}


def by_name(name, eps, *, start=0.0, stop=None, epochs, norm="linf"):
    """The schedule `name` of SCHEDULES for training against eps: constant at eps, or rising from start towards stop
    (eps when None) over `epochs`, clipped at eps. Raises ValueError for an unknown name."""
    check_choice("schedule", name, SCHEDULES)
    if name == "constant":
        if start != 0 or stop is not None:
            raise ValueError(f"a constant budget has neither start nor stop, got {start!r} and {stop!r}")
        return constant(eps, norm=norm)
    return SCHEDULES[name](start, eps if stop is None else stop, epochs, clip=eps, norm=norm)
