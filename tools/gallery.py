#!/usr/bin/env python3
"""Write figures/README.md, the ledger of claims and the gallery, and the table of notebooks in README.md.

    python tools/gallery.py        (and all pictures on one, build/contact_sheet.png)

Every number and every word of them comes out of figures/PROFILE/*.json. No dates: the same records give the same bytes.
"""

import hashlib
import re
import sys
from collections import Counter
from pathlib import Path

from jobs import recorded_times, records_of_use
from layout import Layout
from PIL import Image

from lib.files import read_json, write_bytes

VERDICTS = ("reproduced", "partly", "not reproduced", "undecided")
PROFILES = ("quick", "overnight", "gpu", "paper")  # their order; others follow by name
RECORD_KEYS = {"stem", "notebook", "profile", "caption", "source", "seeds", "sha256"}
LEDGERS = {  # ledger: its heading, and its columns: key of a row -> head
    "claims": ("What the paper claims", {"claim": "claim", "paper": "the paper says", "measured": "measured",
               "verdict": "verdict", "n": "n", "source": "data", "section": "section"}),
    "answers": ("What its reviewers asked", {"question": "question", "reviewer": "asked by", "answer": "answer",
                "n": "n", "source": "data"}),
    "checks": ("What checks this companion itself", {"check": "check", "measured": "measured", "passed": "result"}),
}  # fmt: skip
BELIEVED = 10
NOTHING = "nothing is judged in this run: its data are not there"
NOTEBOOKS = re.compile(r"(<!-- notebooks: .*? -->\n).*(<!-- /notebooks -->)", re.S)
INTRO = """\
# Claims and figures

Each notebook writes its figures here, one folder per profile: the picture, the numbers drawn (`.csv`) and a record
(`.json`) with parameters, seeds, data, versions and hardware. Below: what to believe; three ledgers (what the paper
claims, what its reviewers asked, what checks this companion itself); the figures. *Ours* is a claim that the paper does
not make in this form: a stricter reading of what it says, or a further one. A verdict is computed by the notebook from
its run, by a rule stated before its figure, at the level of one in a hundred (where an error is held against a
tolerance, there is no such level: of trained networks that speaks of these alone); "undecided" says why, and which n
would decide, nine times in ten if all is as it was measured. Where a first look left a question open, n was raised: a
row, or its notebook, says with how many seeds it had been read before, and a verdict of the k-th look errs in up to k
of a hundred. The profile is that of the run that judged: `quick` is minutes on two cores, but notebooks 6 and 7, and
8 where it compares budgets, norms and rivals, judge committed cells of `overnight` there, which took nights. A claim
that was judged in two profiles stands in both, and is counted once in the project's README. This page is written by
`tools/gallery.py`: change the notebooks, not the page.
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
    """One notebook's rows of the three ledgers.

    Raises:
        RecordError: not JSON, a key is missing, or a verdict that does not exist.
    """
    record = _read(path, {"notebook", "title", "profile", *LEDGERS})
    for ledger, (_, columns) in LEDGERS.items():
        for row in record[ledger]:
            missing = set(columns) - set(row)
            if missing or row.get("verdict", VERDICTS[0]) not in VERDICTS:
                trouble = f"lacks {', '.join(sorted(missing))}" if missing else f"has the verdict {row['verdict']!r}"
                raise RecordError(f"{path}: a row of its {ledger} {trouble}; run its notebook again")
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
    """All records of claims and of figures, in the order of the page: notebook, place in it, then profile."""
    claims, figures, drawn = [], [], _drawn(layout)
    for path in sorted(layout.figures.glob("[!.]*/[!.]*.json")):
        if path.name.endswith(".uses.json"):
            continue
        record = read_claims(path) if path.name.endswith(".claims.json") else read_figure(path)
        if record["profile"] != path.parent.name:
            raise RecordError(f"{path}: it is of profile {record['profile']}; move it or run its notebook again")
        if record["notebook"] not in layout.names():
            raise RecordError(f"{path}: there is no notebook {record['notebook']}; delete what it left")
        (claims if "claims" in record else figures).append(record)
    claims.sort(key=lambda record: (record["notebook"], _rank(record)))
    figures.sort(key=lambda record: (*drawn.get(record["stem"], (record["notebook"], len(drawn))), record["stem"],
                                     _rank(record)))  # fmt: skip
    return claims, figures


def _drawn(layout: Layout) -> dict[str, tuple[str, int]]:
    """{what is named like a figure in a notebook's source: the notebook, and which one it is there}."""
    found = {}
    for name in layout.names():
        source = (layout.notebooks / f"{name}.py").read_text(encoding="utf-8")
        for stem in re.findall(rf'"({re.escape(name[:3])}\w+)"', source):
            found.setdefault(stem, (name, len(found)))
    return found


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


def table(header: list[str], rows: list[list]) -> str:
    lines = [header, ["---"] * len(header), *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _heading(notebook: str, titles: dict[str, str]) -> str:
    return f"### [{titles.get(notebook, notebook)}](../notebooks/{notebook}.ipynb)\n"


def _place(figures: Path, row: dict, profile: str) -> str:
    """Where a row comes from: its profile, and its figure if there is one; of equal pictures the one that is shown."""
    own = figures / profile / f"{row.get('figure')}.png"
    if not own.exists():
        return f"`{profile}`"
    others = (figures / name / own.name for name in (*PROFILES, profile))
    shown = next(path for path in others if path.exists() and path.read_bytes() == own.read_bytes())
    return f"`{profile}`, [{own.stem}]({shown.parent.name}/{own.name})"


def _value(row: dict, key: str) -> str:
    if key == "claim" and row.get("ours"):
        return f"{_words(row[key])} *(ours)*"
    if key == "passed":
        return "pass" if row[key] else "**FAIL**"
    text = f"**{row[key]}**" if key == "verdict" else _words(row[key])
    return text + (f": {_words(row['why'])}" if key == "verdict" and row.get("why") else "")


def _rows(records: list[dict], ledger: str) -> list[tuple[dict, str]]:
    """The rows of a ledger with their profiles; the profiles of one row together, and no evidence twice."""
    rows, title = [], next(iter(LEDGERS[ledger][1]))
    for record in records:
        for row in record[ledger]:
            if row not in [old for old, _ in rows]:
                rows.append((row, record["profile"]))
    order = list(dict.fromkeys(row[title] for row, _ in rows))
    return sorted(rows, key=lambda pair: order.index(pair[0][title]))


def _believed(claims: list[dict], figures: Path) -> list[str]:
    """The summary: of each claim that its notebook marks, the verdict of the largest profile."""
    last = {row["claim"]: (row, profile) for row, profile in _rows(claims, "claims") if row.get("believe")}
    lines = [f"- {_value(row, 'verdict')}. {_words(row['claim'])}: {_words(row['measured'])} "
             f"({_place(figures, row, profile)})" for row, profile in last.values()]  # fmt: skip
    return ["## What to believe\n", "\n".join(lines[:BELIEVED]) + "\n"] if lines else []


def _ledger(ledger: str, claims: list[dict], titles: dict[str, str], figures: Path) -> list[str]:
    heading, columns = LEDGERS[ledger]
    parts = [f"## {heading}\n"]
    if ledger == "claims":
        counts = Counter((p, bool(row.get("ours")), row["verdict"]) for row, p in _rows(claims, ledger))
        kinds = sorted({key[:2] for key in counts}, key=lambda key: (_rank({"profile": key[0]}), key[1]))
        rows = [[f"`{p}`", "ours" if own else "the paper's", *(counts[p, own, verdict] for verdict in VERDICTS)]
                for p, own in kinds]  # fmt: skip
        parts.append(table(["profile", "whose claims", *VERDICTS], rows))
    for notebook in sorted(titles):
        rows = _rows([record for record in claims if record["notebook"] == notebook], ledger)
        if rows:
            lines = [[*(_value(row, key) for key in columns), _place(figures, row, p)] for row, p in rows]
            parts += [_heading(notebook, titles), table([*columns.values(), "from"], lines)]
    return parts if len(parts) > 1 else []


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
    parts += _believed(claims, layout.figures)
    for ledger in LEDGERS:
        parts += _ledger(ledger, claims, titles, layout.figures)
    if figures:
        parts.append("## Figures\n")
    for notebook in sorted({record["notebook"] for record in figures}):
        own = {record["sha256"]["png"]: record for record in reversed(figures) if record["notebook"] == notebook}
        parts += [_heading(notebook, titles), *map(_figure, reversed(own.values()))]  # a picture that two drew: once
    if not claims and not figures:
        parts.append("No notebook has run yet: `./run_all.sh` fills this page.\n")
    return "\n".join(parts)


def _latest(records: list[dict]) -> list[dict]:
    """A row for each claim: that of the largest profile."""
    return list({row["claim"]: row for row, _ in _rows(records, "claims")}.values())


def _counts(records: list[dict]) -> str:
    """How many of the claims have which verdict, and how many questions an answer."""
    counts = Counter((bool(row.get("ours")), row["verdict"]) for row in _latest(records))
    answered = len({row["question"] for row, _ in _rows(records, "answers")})
    whose = [", ".join(f"{counts[own, verdict]} {verdict}" for verdict in VERDICTS if counts[own, verdict])
             for own in (False, True)]  # fmt: skip
    said = [whose[0], f"ours: {whose[1]}" * bool(whose[1]), f"{answered} answered" * bool(answered)]
    return "; ".join(filter(None, said)) or "-"


def _notebook(records: list[dict], seconds: float) -> list[str]:
    """A notebook's line in README.md: the claims that it marks, else its first one, the paper's before ours; else its
    first question."""
    rows = sorted(_latest(records), key=lambda row: bool(row.get("ours")))
    shown = [row for row in rows if row.get("believe")] or rows[:1]
    lines = [f"{_words(row['claim'])}: **{row['verdict']}**" for row in shown]
    lines = lines or [_words(row["question"]) for row, _ in _rows(records, "answers")[:1]] or [NOTHING]
    name, title = records[0]["notebook"], " ".join(records[0]["title"].split())
    return [f"[{title}](notebooks/{name}.ipynb)", "<br>".join(lines), _counts(records), _minutes(seconds)]


def _minutes(seconds: float) -> str:
    return f"{max(1, round(seconds / 60))} min" if seconds else "-"


def notebooks(layout: Layout) -> str:
    """The table of notebooks: what is asked, what came out, and how long it took to compute from nothing."""
    claims, _ = collect(layout)
    times, uses = recorded_times(layout, PROFILES[0]), records_of_use(layout, PROFILES[0]).values()
    shared = {run["run"]: run["seconds"] for use in uses for run in use["runs"]}  # each once
    together = sum(shared.values()) + sum(use["seconds"] for use in uses)
    groups = {name: [record for record in claims if record["notebook"] == name] for name in layout.names()}
    rows = [_notebook(records, times.get(name, 0)) for name, records in groups.items() if records]
    all_of_them = "together, two side by side (half of the sum, what notebooks share counted once)"
    rows.append([all_of_them, "", _counts(claims), _minutes(together / 2)])
    heads = ["notebook", "a claim of the paper, or a question of its reviewers", "all verdicts", "time from nothing"]
    return table(heads, rows)


def readme(layout: Layout) -> str:
    """The text of README.md with the table of notebooks as the records have it."""
    text = (layout.root / "README.md").read_text(encoding="utf-8")
    return NOTEBOOKS.sub(lambda match: f"{match[1]}{notebooks(layout)}{match[2]}", text)


def write(layout: Layout) -> None:
    """Write figures/README.md anew, and the table in README.md if there is one."""
    write_bytes(layout.figures / "README.md", page(layout).encode())
    if (layout.root / "README.md").exists():
        write_bytes(layout.root / "README.md", readme(layout).encode())


def contact_sheet(layout: Layout, columns: int = 5, side: int = 420) -> Path:
    """All pictures of figures/quick on one, for a look at their style: build/contact_sheet.png."""
    paths = sorted((layout.figures / "quick").glob("[!.]*.png"))
    sheet = Image.new("RGB", (columns * side, -(-len(paths) // columns) * side), "white")
    for i, path in enumerate(paths):
        picture = Image.open(path).convert("RGB")
        picture.thumbnail((side - 12, side - 12))
        sheet.paste(picture, (i % columns * side, i // columns * side))
    layout.build.mkdir(exist_ok=True)
    sheet.save(layout.build / "contact_sheet.png")
    return layout.build / "contact_sheet.png"


if __name__ == "__main__":
    try:
        write(Layout())
        print("All pictures on one:", contact_sheet(Layout()))
    except RecordError as error:
        sys.exit(str(error))
