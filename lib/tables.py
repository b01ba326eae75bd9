"""Tables of errors over seeds: cells, the notation "1.23(4)", paired intervals, and what is missing.

A table is long: one row per cell, the columns `keys` say which cell it is.
"""

from decimal import ROUND_HALF_UP, Decimal

import numpy as np
import pandas as pd
from scipy import stats

from .evaluation import predict


def attack_errors(model, x, y, attacks, *, batch_size=250):
    """Shares of images that are wrong clean ("clean"), under each attack, and under any of them ("worst").

    An image that is misclassified as it is counts as wrong under every attack, and no attack is spent on it.

    Args:
        x, y: images (N, C, H, W) and labels (N,).
        attacks: {column: a function (model, x, y) -> x_adv}.
    Returns:
        A dict of floats in [0, 1].
    """
    right = predict(model, x, batch_size=batch_size).argmax(1) == y
    wrong = {"clean": ~right}
    for column, attack in attacks.items():
        wrong[column] = ~right
        if right.any():
            x_adv = attack(model, x[right], y[right])
            wrong[column][right] = predict(model, x_adv, batch_size=batch_size).argmax(1) != y[right]
    wrong["worst"] = sum(wrong.values()) > 0
    return {column: w.double().mean().item() for column, w in wrong.items()}


def notation(values):
    """Mean and standard deviation of errors in per cent, as the paper's Table 1 has them: 1.23(4) is 1.23 +- 0.04.

    Both have two decimals, and the bracket counts hundredths, however many: 12.30(125) is 12.30 +- 1.25. Halves are
    rounded away from zero, as by hand. A single value has no standard deviation: 1.23. No value: an empty text.

    Args:
        values: shares in [0, 1], one per seed.
    """
    values = 100 * np.asarray(list(values), float)
    if len(values) == 0:
        return ""
    mean = _round(values.mean())
    return f"{mean}({_round(values.std(ddof=1)) * 100:.0f})" if len(values) > 1 else f"{mean}"


def _round(value):
    # Ten decimals first: what the sum of floats has lost must not decide a half.
    exact = Decimal(f"{value:.10f}")
    return exact.quantize(Decimal("0.01"), ROUND_HALF_UP)


def paired(a, b, *, level=0.95):
    """Student's t interval for the mean of a - b, where a and b were measured on the same seeds, in the same order.

    Returns:
        {"mean", "low", "high", "n"}. Where no spread was measured, because there is one pair or because all differences
        are equal (few seeds and few images make that likely), the interval is the whole line.
    Raises:
        ValueError: unequal lengths, no values, or NaN.
    """
    a, b = np.asarray(list(a), float), np.asarray(list(b), float)
    if a.shape != b.shape or not len(a) or np.isnan(a - b).any():
        raise ValueError(f"pairs need equally many values, at least one, and no NaN: got {a} and {b}")
    d = np.round(a - b, 12) + 0.0  # shares of images: what floats add would count as a spread
    spread = len(d) > 1 and np.ptp(d) > 0
    half = stats.t.ppf((1 + level) / 2, len(d) - 1) * stats.sem(d) if spread else np.inf
    return {"mean": d.mean(), "low": d.mean() - half, "high": d.mean() + half, "n": len(d)}


def conclude(interval):
    """What a paired interval says of "a is smaller than b": True, False, or None where it holds zero."""
    return True if interval["high"] < 0 else False if interval["low"] > 0 else None


def conclude_all(intervals):
    """Of several: what they all say; "partly" if only some say True; else False if some say that; else None."""
    found = [conclude(interval) for interval in intervals]
    return found[0] if len(set(found)) == 1 else "partly" if True in found else False if False in found else None


def assemble(cells, keys, expected):
    """The table of the finished cells, and a sentence on those that are missing.

    Args:
        cells: {cell: its values as a dict}; a cell is a tuple with a value for each of keys.
        keys: names of the columns that say which cell it is.
        expected: all cells of the table, in its order.
    Returns:
        table: DataFrame, a row per finished cell, in the order of expected.
        missing: a text; "complete: 24 cells" or "3 of 24 cells are missing: ...", each named.
    Raises:
        ValueError: a cell that is not expected.
    """
    expected = list(expected)
    if strange := [cell for cell in cells if cell not in expected]:
        raise ValueError(f"the table has no place for {strange[0]}")
    rows = [dict(zip(keys, cell, strict=True)) | cells[cell] for cell in expected if cell in cells]
    gone = ["/".join(map(str, cell)) for cell in expected if cell not in cells]
    text = f"{len(gone)} of {len(expected)} cells are missing: {', '.join(gone)}" if gone else ""
    return pd.DataFrame(rows, columns=None if rows else list(keys)), text or f"complete: {len(expected)} cells"
