#!/usr/bin/env python3
"""Run the quick size again with other seeds, or as another processor would, and say which verdicts change.

    python tools/stability.py [seeds] [avx2] [bfloat16] [compare]        (default: seeds and avx2)

seeds: every list called `seeds`, at any depth, has 100 added to its numbers: no network is one of the first run.
avx2: the same seeds without the instructions and number formats of newer processors, trained anew. bfloat16: in that
number format.
compare: run nothing. All of it goes to build/stability; the comparison of all that is there with figures/quick to
figures/stability.md, where the section of a variant that is not there stays as it was.
"""

import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import gallery
import yaml
from layout import Layout
from profiles import definition

from lib.files import read_if_whole, write_bytes

SHIFT = 100
OTHER_PROCESSOR = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "PRECISION": "float32"}
VARIANTS = {  # name: what it is, environment
    "seeds": ("a disjoint set of seeds", {}),
    "avx2": ("the same seeds, trained and measured with AVX2 only, in float32", OTHER_PROCESSOR),
    "bfloat16": ("the same seeds, in bfloat16", {"PRECISION": "bfloat16"}),
}
INTRO = """\
# Do the verdicts hold?

The quick size was run again by `./run_all.sh --python tools/stability.py`, and its verdicts are compared with those of
`figures/quick`. Undecided is no verdict: a change from or to it is a change of what can be told, not of what is told.
A section is of the ledger as it stood when it was run: claims that were changed or added since are not in it.
"""


def shifted(value, key=""):
    """A parameter with other seeds: whole numbers in a list called `seeds`, at any depth, moved by SHIFT. (Outside of a
    list one says how many seeds there are.)"""
    if isinstance(value, dict):
        return {k: shifted(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [v + SHIFT if key == "seeds" and type(v) is int else shifted(v, key) for v in value]
    return value


def run(layout: Layout, variant: str) -> int:
    """Run all notebooks as the variant says; the exit status of that, which has said why if it is not 0."""
    folder, notebooks = layout.build / "stability" / variant, definition(layout)
    del notebooks["recipes"]
    sections = {
        name: {k: shifted(v, k) for k, v in values.items() if variant == "seeds" and shifted(v, k) != v}
        for name, values in notebooks.items()
    }
    profile = folder / f"stability-{variant}.yaml"
    write_bytes(profile, yaml.safe_dump(sections).encode())
    env = os.environ | VARIANTS[variant][1] | {"FIGURES_DIR": str(folder / "figures"), "RUNS_DIR": str(folder / "runs")}
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the runner hears Ctrl-C, too, and says what is kept
    return subprocess.run([sys.executable, layout.root / "tools" / "run.py", "--profile", profile], env=env).returncode


def verdicts(folder: Path) -> dict[tuple[str, str], tuple[str, str]]:
    """{(notebook, claim): (verdict, what was measured)} of a folder of figures."""
    ledgers = map(gallery.read_claims, sorted(folder.glob("[!.]*.claims.json")))
    return {
        (ledger["notebook"], row["claim"]): (row["verdict"], row["measured"])
        for ledger in ledgers for row in ledger["claims"]
    }  # fmt: skip


def machines(folder: Path) -> str:
    """The processors and number formats in which the figures of a folder were made."""
    records = [read_if_whole(path).get("hardware", {}) for path in sorted(folder.glob("*.json"))]
    kinds = {", ".join(str(r[key]) for key in ("device", "vector_unit", "precision")) for r in records if r}
    return "; ".join(sorted(kinds)) or "unknown"


def judging_cells(layout: Layout) -> list[str]:
    """The notebooks whose claims are of committed cells, which no variant makes again."""
    return [name for name in layout.names()
            if "cells.compare" in (layout.notebooks / f"{name}.py").read_text(encoding="utf-8")]  # fmt: skip


def sections(page: Path) -> dict[str, str]:
    """{title: text} of the sections of a page that was written before; of none, if there is no page."""
    texts = page.read_text(encoding="utf-8").split("\n## ")[1:] if page.exists() else []
    return {text.split("\n")[0]: f"## {text}" for text in texts}


def compare(before: dict, after: dict, title: str, committed: list[str]) -> str:
    """The section of one variant: how many verdicts change, and which. committed: the notebooks of `judging_cells`."""
    both = sorted(before.keys() & after.keys())
    changed = [(*key, before[key][0], after[key][0]) for key in both if before[key][0] != after[key][0]]
    flips = sum({old, new} == {"reproduced", "not reproduced"} for *_, old, new in changed)
    same = Counter(notebook if notebook in committed else "" for notebook, claim in both
                   if before[notebook, claim][1] == after[notebook, claim][1])  # fmt: skip
    alike = same.pop("", 0)
    lines = [f"## {title}\n", f"{len(changed)} of {len(both)} verdicts change; {flips} between "
             "reproduced and not reproduced.\n"]  # fmt: skip
    if same:
        whose = " and ".join(f"{n} of {notebook}" for notebook, n in same.items())
        lines.append(f"{same.total()} could not change, and this run says nothing of them: {whose} judge committed "
                     "cells, which were not made again.\n")  # fmt: skip
    if alike:
        lines.append(f"{alike} came out with the same numbers.\n")
    if gone := sorted(before.keys() - after.keys()):
        lines.append(f"{len(gone)} of figures/quick are not in that run: "
                     + "; ".join(f"{notebook}, {claim}" for notebook, claim in gone) + ".\n")  # fmt: skip
    if changed:
        lines.append(gallery.table(["notebook", "claim", "figures/quick", "here"], [list(row) for row in changed]))
    return "\n".join(lines)


def main(asked: list[str]) -> None:
    if unknown := set(asked) - set(VARIANTS) - {"compare"}:
        sys.exit(f"unknown: {', '.join(sorted(unknown))}\n\n{__doc__}")
    layout = Layout()
    for variant in asked or ["seeds", "avx2"]:
        if variant != "compare" and (status := run(layout, variant)):
            sys.exit(status)
    page = layout.figures / "stability.md"
    parts, here, left, known = [INTRO], verdicts(layout.figures / "quick"), [], sections(page)
    for variant, (what, _) in VARIANTS.items():
        title = what[0].upper() + what[1:]
        if found := verdicts(ran := layout.build / "stability" / variant / "figures"):
            where = f"\n\nMade on: {machines(ran)}. `figures/quick` then: {machines(layout.figures / 'quick')}.\n"
            parts.append(compare(here, found, title, judging_cells(layout)).rstrip() + where)
        elif title in known:
            parts.append(known[title])
        else:
            left.append(f"`{variant}` ({what})")
    if left:
        now = machines(layout.figures / "quick")
        parts.append(f"## Not run\n\n{'; '.join(left)}. `figures/quick` itself was made on: {now}.\n")
    print("\n".join(parts))
    write_bytes(page, "\n".join(parts).encode())


if __name__ == "__main__":
    main(sys.argv[1:])
