"""The comparison of verdicts: which seeds are moved, and what counts as a change."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import stability

from lib.files import write_json


def test_seeds_move_at_any_depth_and_nothing_else_does():
    values = {
        "seeds": [0, 1],
        "eps": 1,
        "tasks": {"a": {"seeds": [2], "n": 3}},
        "p": [{"seeds": [[4, 5]]}, {"seeds": 2}],
    }
    moved = {
        "seeds": [100, 101],
        "eps": 1,
        "tasks": {"a": {"seeds": [102], "n": 3}},
        "p": [{"seeds": [[104, 105]]}, {"seeds": 2}],
    }
    assert stability.shifted(values) == moved


def test_changes_are_counted_and_named():
    before = {("01", "a"): "reproduced", ("01", "b"): "undecided", ("02", "c"): "partly", ("02", "gone"): "partly"}
    after = {("01", "a"): "not reproduced", ("01", "b"): "reproduced", ("02", "c"): "partly", ("03", "new"): "partly"}
    before = {key: (verdict, "p = 0.1") for key, verdict in before.items()}
    after = {key: (verdict, "p = 0.1" if key[1] == "c" else "p = 0.2") for key, verdict in after.items()}
    text = stability.compare(before, after, "other seeds", [])
    assert (
        "2 of 3 verdicts change; 1 between reproduced and not reproduced.\n\n1 came out with the same numbers." in text
    )
    assert "| 01 | a | reproduced | not reproduced |" in text and "partly" not in text
    assert "1 of figures/quick are not in that run: 02, gone." in text and "committed" not in text
    text = stability.compare(before, before, "the same", ["02", "05"])
    assert "0 of 4 verdicts change; 0 between reproduced and not reproduced." in text
    assert "2 could not change, and this run says nothing of them: 2 of 02 judge committed cells" in text
    assert "2 came out with the same numbers" in text
    assert "same numbers" not in stability.compare(after, dict.fromkeys(after, ("partly", "")), "all new", ["01"])


def test_notebooks_that_judge_committed_cells_are_known_by_what_they_call():
    assert stability.judging_cells(stability.Layout()) == ["06_periodic_scheduling", "07_table1"]


@pytest.mark.parametrize("ran", [("seeds",), ("seeds", "avx2", "bfloat16"), ()])
def test_variants_that_were_not_run_are_named(ran, tmp_path, monkeypatch):
    layout = stability.Layout(tmp_path)
    for folder in (layout.notebooks, layout.figures):
        folder.mkdir()
    found = {layout.build / "stability" / variant / "figures": {("01", "a"): ("partly", "1")} for variant in ran}
    monkeypatch.setattr(stability, "Layout", lambda: layout)
    monkeypatch.setattr(stability, "verdicts", lambda folder: found.get(folder, {}))
    for folder, precision in ((layout.figures / "quick", "bfloat16"), *((folder, "float32") for folder in found)):
        hardware = {"device": "A", "vector_unit": "AVX2", "precision": precision}
        for name in ("1", "2"):
            write_json(folder / f"{name}.json", {"hardware": hardware})
    stability.main(["compare"])
    text = (layout.figures / "stability.md").read_text()
    line = "\n\nMade on: A, AVX2, float32. `figures/quick` then: A, AVX2, bfloat16.\n"
    assert text.count(line) == len(ran)
    assert ("`figures/quick` itself was made on: A, AVX2, bfloat16." in text) == (len(ran) < 3)
    missing = [variant for variant in stability.VARIANTS if variant not in ran]
    assert text.count("## ") == len(ran) + bool(missing) and ("## Not run" in text) == bool(missing)
    assert all(f"`{variant}`" in text.partition("## Not run")[2] for variant in missing)
    found.clear()  # another machine, or an emptied build folder: what was found before stays
    stability.main(["compare"])
    assert (layout.figures / "stability.md").read_text() == text


@pytest.mark.parametrize("status", [1, 130])
def test_a_variant_that_did_not_end_well_is_not_compared(status, tmp_path, monkeypatch):
    asked, layout = [], stability.Layout(tmp_path)
    monkeypatch.setattr(stability, "Layout", lambda: layout)
    monkeypatch.setattr(stability, "definition", lambda layout: {"01_a": {"seeds": [0], "eps": 1}, "recipes": {}})
    monkeypatch.setattr(stability.signal, "signal", lambda *_: None)
    monkeypatch.setattr(
        stability.subprocess,
        "run",
        lambda command, **_: asked.append(command[-1]) or SimpleNamespace(returncode=status),
    )
    with pytest.raises(SystemExit) as caught:
        stability.main(["seeds", "avx2"])
    assert caught.value.code == status and not (tmp_path / "figures").exists()
    assert [path.read_text() for path in asked] == ["01_a:\n  seeds:\n  - 100\n"]
