"""The comparison of verdicts: which seeds are moved, and what counts as a change."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import stability


def test_seeds_move_at_any_depth_and_nothing_else_does():
    values = {"seeds": [0, 1], "eps": 1, "tasks": {"a": {"seeds": [2], "n": 3}}, "p": [{"seeds": [[4, 5]]}]}
    moved = {"seeds": [100, 101], "eps": 1, "tasks": {"a": {"seeds": [102], "n": 3}}, "p": [{"seeds": [[104, 105]]}]}
    assert stability.shifted(values) == moved


def test_changes_are_counted_and_named():
    before = {("01", "a"): "reproduced", ("01", "b"): "undecided", ("02", "c"): "partly", ("02", "gone"): "partly"}
    after = {("01", "a"): "not reproduced", ("01", "b"): "reproduced", ("02", "c"): "partly", ("03", "new"): "partly"}
    before = {key: (verdict, "p = 0.1") for key, verdict in before.items()}
    after = {key: (verdict, "p = 0.1" if key[1] == "c" else "p = 0.2") for key, verdict in after.items()}
    text = stability.compare(before, after, "other seeds")
    assert "2 of 3 verdicts change; 1 between reproduced and not reproduced. 1 rest on the same numbers" in text
    assert "| 01 | a | reproduced | not reproduced |" in text and "partly" not in text
    assert "1 of figures/quick are not in that run: 02, gone." in text
    assert "0 of 4 verdicts change; 0 between reproduced and not reproduced. 4 rest" in stability.compare(
        before, before, "the same"
    )
