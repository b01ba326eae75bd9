"""Budgets over training: functions of the fractional epoch, in the one unit used everywhere (fraction of the pixels).

The paper's schedules (Section 5): the budget begins at 0 or a small value and rises to the eps of interest, along a
line or a half cosine that would go on to a larger value and is clipped. A schedule that takes values below 1/255 is
as good as any other: nothing is guessed from the size of a number.
"""

import math

from .attacks import check_eps


def constant(value):
    """The same budget throughout. Raises ValueError for a value outside [0, 1]."""
    check_eps(value, name="value")
    return lambda epoch: float(value)


def linear(start, stop, epochs, *, clip=None):
    """From start at epoch 0 to stop at `epochs`, never above clip; stop (or clip) from then on.

    Args:
        start, stop: budgets in [0, 1], start <= stop.
        epochs: length of the rise, > 0, may be fractional.
        clip: largest value given, None for no limit.
    Returns:
        A function epoch -> eps, epoch a float >= 0.
    Raises:
        ValueError: a value outside [0, 1], a schedule that runs backwards (stop < start or epochs <= 0).
    """
    return _rise(start, stop, epochs, clip, lambda t: t)


def cosine(start, stop, epochs, *, clip=None):
    """As `linear`, but along half a cosine: slow at both ends."""
    return _rise(start, stop, epochs, clip, lambda t: (1 - math.cos(math.pi * t)) / 2)


def _rise(start, stop, epochs, clip, shape):
    check_eps(start, name="start")
    check_eps(stop, name="stop")
    if stop < start:
        raise ValueError(f"the schedule runs backwards: it starts at {start} and stops at {stop}")
    if not epochs > 0:
        raise ValueError(f"the schedule runs backwards: epochs must be positive, got {epochs}")
    if clip is None:
        clip = stop
    check_eps(clip, name="clip")

    def eps(epoch):
        if not epoch >= 0:
            raise ValueError(f"epoch must not be negative or NaN, got {epoch}")
        return min(start + (stop - start) * shape(min(epoch / epochs, 1.0)), clip)

    return eps


def periodic(schedule, restarts):
    """The schedule, begun anew at each of the epochs in restarts.

    Raises ValueError for restarts that are not positive and increasing.
    """
    restarts = list(restarts)
    if any(b <= a for a, b in zip([0, *restarts], restarts, strict=False)):
        raise ValueError(f"restarts must be positive epochs in increasing order, got {restarts}")
    return lambda epoch: schedule(epoch - max((r for r in restarts if r <= epoch), default=0))


SCHEDULES = {"constant": constant, "linear": linear, "cosine": cosine}


def by_name(name, eps, *, start=0.0, stop=None, epochs):
    """The schedule `name` of SCHEDULES for training against eps: constant at eps, or rising from start towards stop
    (eps when None) over `epochs`, clipped at eps. Raises ValueError for an unknown name or a stop below eps."""
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}: choose one of {', '.join(SCHEDULES)}")
    if name == "constant":
        return constant(eps)
    stop = eps if stop is None else stop
    if stop < eps:
        raise ValueError(f"the schedule never reaches eps={eps}: it stops at {stop}")
    return SCHEDULES[name](start, stop, epochs, clip=eps)
