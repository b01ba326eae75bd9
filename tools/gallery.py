#!/usr/bin/env python3
"""Write figures/README.md: the ledger of claims and the gallery, from the records that the notebooks leave.

    python tools/gallery.py

Every number and every word of it comes out of figures/PROFILE/*.json. No dates: the same records give the same bytes.
"""

import hashlib
import re
import sys
from collections import Counter
from pathlib import Path

from layout import Layout

from lib.claims import VERDICTS
from lib.files import read_json, write_bytes

PROFILES = ("quick", "gpu", "paper")  # their order; others follow by name
RECORD_KEYS = {"stem", "notebook", "profile", "caption", "source", "seeds", "sha256"}
CLAIM_KEYS = {"claim", "section", "measured", "verdict", "n", "source"}
INTRO = """\
# Claims and figures

Each notebook writes its figures here, one folder per profile: the picture, the numbers drawn (`.csv`) and a record
(`.json`) with parameters, seeds, data, versions and hardware. Below are the paper's claims with what the runs
measured, then the figures. The profile is the size of the run: `quick` is minutes on a laptop, the others are larger.
A verdict is computed by the notebook from its run; "not testable at this size" means that the run is too small to
tell. This page is written by `tools/gallery.py`: change the notebooks, not the page.
"""


class RecordError(ValueError):
    """A record that cannot be read or does not belong to the files beside it."""


def _read(path: Path, keys: set[str]) -> dict:
    try:
        record = read_json(path)
    except ValueError as error:
        raise RecordError(str(error)) from None
    missing = keys - set(record) if isinstance(record, dict) else keys
    if missing:
        raise RecordError(f"{path}: this record lacks {', '.join(sorted(missing))}; run its notebook again")
    return record


def read_claims(path: Path) -> dict:
    """One notebook's rows of the ledger.

    Raises:
        RecordError: not JSON, a key is missing, or a verdict that does not exist.
    """
    record = _read(path, {"notebook", "title", "profile", "claims"})
    for row in record["claims"]:
        missing = CLAIM_KEYS - set(row)
        if missing or row["verdict"] not in VERDICTS:
            trouble = f"lacks {', '.join(sorted(missing))}" if missing else f"has the verdict {row['verdict']!r}"
            raise RecordError(f"{path}: a claim {trouble}; run its notebook again")
    return record


def read_figure(path: Path) -> dict:
    """One figure's record, checked against the picture and the table beside it.

    Raises:
        RecordError: not JSON, a key is missing, a file is missing or is not the one that was recorded.
    """
    record = _read(path, RECORD_KEYS)
    for kind in ("png", "csv"):
        file = path.with_suffix(f".{kind}")
        if not file.exists():
            raise RecordError(f"{path}: {file.name} is missing; run its notebook again")
        if hashlib.sha256(file.read_bytes()).hexdigest() != record["sha256"].get(kind):
            raise RecordError(f"{path}: {file.name} is not the file of this record; run its notebook again")
    return record


def collect(layout: Layout) -> tuple[list[dict], list[dict]]:
    """All records of claims and of figures, in the order of the page: notebook, then profile."""
    claims, figures = [], []
    for path in sorted(layout.figures.glob("*/*.json")):
        record = read_claims(path) if path.name.endswith(".claims.json") else read_figure(path)
        if record["profile"] != path.parent.name:
            raise RecordError(f"{path}: it is of profile {record['profile']}; move it or run its notebook again")
        if record["notebook"] not in layout.names():
            raise RecordError(f"{path}: there is no notebook {record['notebook']}; delete what it left")
        (claims if "claims" in record else figures).append(record)
    claims.sort(key=lambda record: (record["notebook"], _rank(record)))
    figures.sort(key=lambda record: (record["notebook"], record["stem"], _rank(record)))
    return claims, figures


def _rank(record: dict) -> tuple:
    profile = record["profile"]
    return (PROFILES.index(profile) if profile in PROFILES else len(PROFILES), profile)


def _words(value) -> str:
    """A text on one line, without accidental Markdown outside its formulas."""
    parts = re.split(r"(\$[^$]+\$|`[^`]+`)", " ".join(str(value).split()))
    return "".join(part if i % 2 else re.sub(r"([*<\[\]])", r"\\\1", part) for i, part in enumerate(parts))


def _cell(value) -> str:
    """A value inside a table: no pipe that would open a new column."""
    return str(value).replace("\\|", "\\Vert ").replace("|", "\\|")


def _table(header: list[str], rows: list[list]) -> str:
    lines = [header, ["---"] * len(header), *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _heading(notebook: str, titles: dict[str, str]) -> str:
    return f"### [{titles.get(notebook, notebook)}](../notebooks/{notebook}.ipynb)\n"


def _row(row: dict, profile: str) -> list[str]:
    verdict = f"**{row['verdict']}**"
    claim, section, measured, n, source = (_words(row[key]) for key in ("claim", "section", "measured", "n", "source"))
    return [claim, section, measured, verdict, f"`{profile}`", n, source]


def _ledger(claims: list[dict], titles: dict[str, str]) -> list[str]:
    counts = Counter((record["profile"], row["verdict"]) for record in claims for row in record["claims"])
    parts = ["## The paper's claims\n"]
    by_profile = sorted({(_rank(record), record["profile"]) for record in claims})
    rows = [[f"`{name}`", *(counts[name, verdict] for verdict in VERDICTS)] for _, name in by_profile]
    parts.append(_table(["profile", *VERDICTS], rows))
    for notebook in sorted({record["notebook"] for record in claims}):
        own = [record for record in claims if record["notebook"] == notebook]
        order = list(dict.fromkeys(row["claim"] for record in own for row in record["claims"]))
        rows = [(row, record["profile"]) for record in own for row in record["claims"]]
        rows.sort(key=lambda pair: order.index(pair[0]["claim"]))  # a claim's profiles stand together
        parts.append(_heading(notebook, titles))
        header = ["claim", "section", "measured", "verdict", "profile", "n", "data"]
        parts.append(_table(header, [_row(row, profile) for row, profile in rows]))
    return parts


def _figure(record: dict) -> str:
    place = f"{record['profile']}/{record['stem']}"
    seeds = ", ".join(map(str, record["seeds"])) or "none drawn"
    return (
        f"![{record['stem']}]({place}.png)\n\n{_words(record['caption'])}\n\nProfile `{record['profile']}`."
        f" Data: {_words(record['source'])}. Seeds: {seeds}. [Numbers]({place}.csv), [record]({place}.json).\n"
    )


def page(layout: Layout) -> str:
    """The text of figures/README.md."""
    claims, figures = collect(layout)
    titles = {record["notebook"]: " ".join(record["title"].split()) for record in claims}
    parts = [INTRO]
    if claims:
        parts += _ledger(claims, titles)
    if figures:
        parts.append("## Figures\n")
    for notebook in sorted({record["notebook"] for record in figures}):
        parts.append(_heading(notebook, titles))
        parts += [_figure(record) for record in figures if record["notebook"] == notebook]
    if not claims and not figures:
        parts.append("No notebook has run yet: `./run_all.sh` fills this page.\n")
    return "\n".join(parts)


def write(layout: Layout) -> None:
    """Write figures/README.md anew."""
    write_bytes(layout.figures / "README.md", page(layout).encode())


if __name__ == "__main__":
    try:
        write(Layout())
    except RecordError as error:
        sys.exit(str(error))
