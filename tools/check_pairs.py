#!/usr/bin/env python3
"""Fail when a notebook's source and its rendering disagree, or the rendering is not fit to be committed.

    python tools/check_pairs.py

For every notebooks/NN_name.py with its NN_name.ipynb. jupytext's own checks pass on a drifted pair.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
from jupytext.config import load_jupytext_config
from layout import Layout
from nbclean import clean, dumps, text
from profiles import ProfileError, defined, definition, parameters

from lib.files import git

MAX_LINES = 30
MAX_BYTES = 1_500_000
MACHINE_PATH = re.compile(r"(?<![\w.])/(home|root|Users|tmp|mnt|var|private)/[\w./~-]+")
HEADER = re.compile(r"\A# ---\n(?:#.*\n)*?# ---\n")
UNDEFINED = """quick.json: the parameters cells or lib/recipes.py say something else; if that is meant,
    ./run_all.sh --python tools/profiles.py --define"""
AGAIN = "run ./run_all.sh on it"


def header_problems(source: str) -> list[str]:
    """What the header of the .py lacks. Without it a pair is skipped, or has no language, in silence."""
    header = HEADER.match(source)
    wanted = {"format_name: percent": "format_name", "kernelspec:": "kernelspec"}
    return [f".py: its header has no {name}" for line, name in wanted.items() if not header or line not in header[0]]


def _key(cell: dict) -> tuple:
    return cell["cell_type"], text(cell["source"]).strip(), cell["metadata"].get("tags", [])


def _cells(source: str) -> list[tuple]:
    form = {"extension": ".py", "format_name": "percent", "comment_magics": False}
    return [_key(cell) for cell in jupytext.reads(source, form).cells]


def edited(source: Path, rendering: Path, as_run: Path) -> bool:
    """Has the .ipynb been edited since the two last agreed: in the source ``as_run``, or when git last saw it?

    Where neither is there, the younger one is taken for the edited one.
    """
    try:
        cells = [_key(cell) for cell in json.loads(rendering.read_text(encoding="utf-8"))["cells"]]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    commit = _git(source.parent, "log", "-1", "--format=%H", "--", rendering.name).strip()
    known = [as_run.read_text(encoding="utf-8") if as_run.exists() else ""]
    known += [_git(source.parent, "show", f"{commit}:./{source.name}") if commit else ""]
    if cells in map(_cells, [source.read_text(encoding="utf-8"), *filter(None, known)]):
        return False
    return any(known) or rendering.stat().st_mtime > source.stat().st_mtime


def _git(folder: Path, *arguments: str) -> str:
    try:
        return git(folder, *arguments)
    except (OSError, subprocess.CalledProcessError):  # no git here, or it knows of no such thing
        return ""


def _texts(cell: dict):
    """The readable text of a cell: its source and its outputs without images."""
    yield text(cell["source"])
    for output in cell.get("outputs", []):
        yield text(output.get("text", ""))
        yield from map(text, output.get("traceback", []))
        yield from (text(value) for key, value in output.get("data", {}).items() if key.startswith("text/"))


def rendering_problems(notebook: dict) -> list[str]:
    """What is wrong with an executed notebook, taken by itself."""
    found = []
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code" and text(cell["source"]).strip()]
    outputs = [output for cell in code for output in cell["outputs"]]
    if [cell["execution_count"] for cell in code] != list(range(1, len(code) + 1)):
        found.append(f".ipynb was not run top to bottom ({AGAIN})")
    if any(output["output_type"] == "error" for output in outputs):
        found.append(".ipynb holds an error")
    if any(output.get("name") == "stderr" for output in outputs):
        found.append(".ipynb holds stderr (progress bars and warnings belong in the log)")
    if not any(key.startswith("image/") for output in outputs for key in output.get("data", {})):
        found.append(".ipynb shows no figure")
    for number, cell in enumerate(notebook["cells"], 1):
        listing = "parameters" in cell["metadata"].get("tags", [])  # a value a line: long, but nothing to follow
        if cell["cell_type"] == "code" and not listing and len(text(cell["source"]).splitlines()) > MAX_LINES:
            found.append(f"cell {number} has more than {MAX_LINES} lines: split it, or move a part to lib/")
        path = next(filter(None, map(MACHINE_PATH.search, _texts(cell))), None)
        if path:
            found.append(f"cell {number} names a path of one machine: {path[0]}")
        pictures = [output for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
        if any(not output["metadata"].get("image/png", {}).get("alt") for output in pictures):
            found.append(f"cell {number} shows a figure without its caption: draw and save a figure in one cell")
    return found


def pair_problems(source: Path, rendering: Path) -> list[str]:
    """What is wrong with one pair; an empty list when nothing is."""
    missing = [f"{path.suffix} is missing" for path in (source, rendering) if not path.exists()]
    if missing:
        return missing
    found = header_problems(source.read_text(encoding="utf-8"))
    try:
        parameters(source)
    except ProfileError as error:
        found.append(str(error))
    raw = rendering.read_text(encoding="utf-8")
    try:
        notebook = json.loads(raw)
        cleaned = dumps(clean(notebook))
        cells = [_key(cell) for cell in notebook["cells"]]
    except (ValueError, KeyError, TypeError) as error:
        return [*found, f".ipynb cannot be read ({type(error).__name__}: {error})"]
    wanted, config = _cells(source.read_text(encoding="utf-8")), load_jupytext_config(str(source.resolve()))
    written = jupytext.writes(nbformat.reads(cleaned, as_version=4), "py:percent", config=config)
    if cells != wanted:
        same = [a == b for a, b in zip(cells, wanted, strict=False)]
        first = same.index(False) if False in same else len(same)
        found.append(f".py and .ipynb differ from cell {first + 1} on (edit the .py, then {AGAIN})")
    elif written != source.read_text(encoding="utf-8"):
        found.append(f".py would change when JupyterLab saves it ({AGAIN})")
    if raw != cleaned:
        found.append(f".ipynb is not clean ({AGAIN})")
    if len(raw.encode()) > MAX_BYTES:
        found.append(f".ipynb has {len(raw.encode()):,} bytes; at most {MAX_BYTES:,}")
    return found + rendering_problems(notebook)


def main(layout: Layout) -> int:
    stems = sorted({*layout.names(), *(path.stem for path in layout.notebooks.glob("[!.]*.ipynb"))})
    found = []
    for stem in stems:
        pair = layout.notebooks / f"{stem}.py", layout.notebooks / f"{stem}.ipynb"
        found += [f"{stem}: {problem}" for problem in pair_problems(*pair)]
    try:
        if defined(layout) != definition(layout):
            found.append(UNDEFINED)
    except (ProfileError, ValueError) as error:
        found.append(str(error))
    if not stems:
        found = [f"no notebook in {layout.notebooks}: nothing was checked"]
    print("\n".join(found) or f"{len(stems)} pairs agree")
    return int(bool(found))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(__doc__)
    sys.exit(main(Layout()))
