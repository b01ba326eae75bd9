#!/usr/bin/env python3
"""Make an executed notebook reproducible, so that a run that computes the same writes the same bytes.

    python tools/nbclean.py NOTEBOOK.ipynb [OUT.ipynb]

Taken out: stderr (progress bars and warnings belong in the log), widgets, the injected parameters cell,
run times, random cell ids, memory addresses, the path of the checkout.
"""

import hashlib
import json
import re
import sys
from pathlib import Path

from layout import HERE

from lib.files import write_bytes

KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
KEPT = ("lines_to_next_cell", "tags")  # the first is jupytext's: how many blank lines the .py has there
INJECTED = {"injected-parameters", "papermill-error-cell-tag"}
ADDRESS = re.compile(r"(?<= at )0x[0-9a-f]{6,}")
WIDGET = "application/vnd.jupyter.widget"


def text(value: str | list) -> str:
    """A multi-line field of a notebook as one string."""
    return "".join(value) if isinstance(value, list) else value


def _lines(value: str | list) -> list[str]:
    return text(value).splitlines(keepends=True)


def _scrub(value: str | list) -> list[str]:
    return _lines(ADDRESS.sub("0x...", text(value)).replace(str(HERE), "<repo>"))


def clean_output(output: dict) -> dict | None:
    """One output without what changes between runs; None when nothing of it should stay."""
    kind = output["output_type"]
    if kind == "stream":
        return None if output["name"] == "stderr" else {**output, "text": _scrub(output["text"])}
    if kind == "error":
        return {**output, "traceback": [text(_scrub(line)) for line in output["traceback"]]}
    if any(key.startswith(WIDGET) for key in output["data"]):
        return None  # dead on a static page
    data = {}
    for key, value in output["data"].items():
        if key.startswith("text/"):
            value = _scrub(value)
        elif key.startswith("image/") and isinstance(value, str) and "svg" not in key:
            value = value.strip()
        data[key] = value
    return {"output_type": "display_data", "data": data, "metadata": output.get("metadata", {})}


def _merge_streams(outputs: list[dict]) -> list[dict]:
    """Join neighbouring pieces of stdout: where the kernel cuts them depends on timing."""
    merged = []
    for output in outputs:
        if merged and output["output_type"] == "stream" == merged[-1]["output_type"]:
            output = {**output, "text": _lines(text(merged.pop()["text"]) + text(output["text"]))}
        merged.append(output)
    return merged


def clean(notebook: dict) -> dict:
    """The notebook (nbformat 4, as JSON) without what changes between runs. Cleaning twice changes nothing.

    Cells that ran in order are numbered from 1; otherwise their numbers stay, for the pair check to find.
    """
    counts = [cell.get("execution_count") for cell in notebook["cells"]]
    counts = [count for count in counts if count is not None]
    in_order = counts == sorted(set(counts))
    cells, seen, number = [], {}, 0
    for cell in notebook["cells"]:
        tags = cell["metadata"].get("tags", [])
        if INJECTED & set(tags):
            continue
        source = text(cell["source"])
        digest = hashlib.sha256((cell["cell_type"] + source).encode()).hexdigest()[:8]
        seen[digest] = seen.get(digest, 0) + 1
        new = {
            "cell_type": cell["cell_type"],
            "id": digest if seen[digest] == 1 else f"{digest}-{seen[digest]}",
            "metadata": {key: cell["metadata"][key] for key in KEPT if cell["metadata"].get(key)},
            "source": _lines(source),
        }
        if cell.get("attachments"):  # pictures dropped into a cell of words, which names them
            new["attachments"] = cell["attachments"]
        if cell["cell_type"] == "code":
            count = cell.get("execution_count")
            number += count is not None
            new["execution_count"] = number if in_order and count is not None else count
            new["outputs"] = _merge_streams([o for o in map(clean_output, cell["outputs"]) if o is not None])
        cells.append(new)
    metadata = {"kernelspec": KERNEL, "language_info": {"file_extension": ".py", "name": "python"}}
    if jupytext := notebook["metadata"].get("jupytext"):  # what stands in jupytext.toml, as JupyterLab writes it too
        metadata["jupytext"] = {key: value for key, value in jupytext.items() if key != "text_representation"}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def dumps(notebook: dict) -> str:
    """A notebook as the text that is committed."""
    return json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def main(argv: list[str]) -> None:
    if not 1 <= len(argv) <= 2:
        sys.exit(__doc__)
    source, target = Path(argv[0]), Path(argv[-1])
    write_bytes(target, dumps(clean(json.loads(source.read_text(encoding="utf-8")))).encode())


if __name__ == "__main__":
    main(sys.argv[1:])
