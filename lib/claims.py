"""The ledger: what the paper claims, what this run measured, and the verdict that follows from the numbers."""

VERDICTS = ("reproduced", "partly", "not reproduced", "not testable at this size")


def verdict(holds):
    """The verdict for a computed outcome.

    Args:
        holds: True, False, None (the run is too small to tell), or one of VERDICTS.
    Returns:
        One of VERDICTS.
    Raises:
        ValueError: anything else; numbers are not verdicts.
    """
    if holds is None:
        return "not testable at this size"
    if isinstance(holds, str):
        if holds not in VERDICTS:
            raise ValueError(f"unknown verdict {holds!r}: choose one of {', '.join(VERDICTS)}")
        return holds
    if isinstance(holds, bool) or type(holds).__name__ == "bool":  # numpy's own bool too
        return "reproduced" if holds else "not reproduced"
    raise ValueError(f"a claim holds or it does not, got {holds!r}: compare the number first")


def row(claim, *, section, measured, holds, n, source):
    """One row of the ledger, a dict. Raises ValueError for an empty text or an unknown verdict."""
    texts = {"claim": claim, "section": section, "measured": measured, "n": n, "source": source}
    for name, value in texts.items():
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{name} must be a text, got {value!r}")
    return texts | {"verdict": verdict(holds)}
