"""Rows of the three ledgers: what the paper claims, what its reviewers asked, and what checks this companion itself."""

from .inference import Finding


def verdict(holds):
    """The verdict for a computed outcome: True, False, "partly" or None (undecided).

    Raises ValueError for anything else; numbers are not verdicts.
    """
    if isinstance(holds, bool) or type(holds).__name__ == "bool":  # numpy's own bool too
        return "reproduced" if holds else "not reproduced"
    if holds is None or holds == "partly":
        return holds or "undecided"
    raise ValueError(f"a claim holds or it does not, got {holds!r}: compare the number first")


def claim(claim, *, section, holds, n, source, measured=None, paper="", figure="", believe=False, ours=False):
    """A row of the paper's ledger. holds: a Finding, or (then with measured) True, False, "partly" or None.

    believe: whether it belongs to the summary. ours: whether the paper does not say it in this form: a stricter reading
    of what it says, or a further claim.
    """
    why = ""
    if isinstance(holds, Finding):
        measured, why, holds = measured or holds.measured, holds.why, holds.holds
    row = _texts(claim=claim, section=section, measured=measured, n=n, source=source)
    row |= {"verdict": verdict(holds), "why": why, "paper": paper, "figure": figure, "believe": bool(believe)}
    return row | ({"ours": True} if ours else {})


def answer(question, answer, *, reviewer, n, source, figure=""):
    """A row of the reviewers' ledger: the question in our words, the answer in words that the run has filled in."""
    return _texts(question=question, answer=answer, reviewer=reviewer, n=n, source=source) | {"figure": figure}


def check(what, *, holds, measured=None, figure=""):
    """A row of the self-checks. holds: a Finding, which passes if it holds, or (then with measured) True or False."""
    if isinstance(holds, Finding):
        measured, holds = measured or holds.measured, holds.holds is True
    if verdict(holds) not in ("reproduced", "not reproduced"):
        raise ValueError(f"a check passes or it does not, got {holds!r}")
    return _texts(check=what, measured=measured) | {"passed": bool(holds), "figure": figure}


def _texts(**texts):
    for name, value in texts.items():
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{name} must be a text, got {value!r}")
    return texts
