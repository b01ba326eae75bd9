"""Times in turns, and their ratios: what else the machine does falls on all that take a turn."""

import statistics
import time

AIMS = {"power iteration": 15, "plane": 3, "matrix rate": 0.6}  # those of the attacks stand in bench_pgd.py


ALIKE = 1.1  # residuals that differ by less than a tenth of the smaller are called equal


def exactness(ours, theirs):
    """How a residual of ours stands to a peer's, in words."""
    words = {"more exact": ours * ALIKE < theirs, "less exact": ours > theirs * ALIKE}
    return next((word for word, true in words.items() if true), f"equally exact, within {ALIKE - 1:.0%}")


def as_exact(ours, theirs):
    """The first of ours {name: residual}, the quickest, that is not less exact than a peer; the last if none is."""
    return next((name for name, mine in ours.items() if exactness(mine, theirs) != "less exact"), list(ours)[-1])


def seconds(function, *arguments):
    """CPU seconds of a call, and what it gives."""
    start = time.process_time()
    found = function(*arguments)
    return time.process_time() - start, found


def in_turns(functions, repeats):
    """What each function of {name: function} gave the last time, and {name: CPU seconds} for each turn."""
    turns = []
    for _ in range(repeats):
        done = {name: seconds(function) for name, function in functions.items()}
        turns.append({name: time for name, (time, _) in done.items()})
    return {name: found for name, (_, found) in done.items()}, turns


def spread(turns, peer, ours="ours"):
    """The ratio of a peer's time to ours, turn by turn."""
    ratios = [turn[peer] / turn[ours] for turn in turns]
    return {
        "ratio_median": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios),
        "seconds_peer": min(turn[peer] for turn in turns), "seconds_ours": min(turn[ours] for turn in turns),
        "repeats": len(turns),
    }  # fmt: skip
