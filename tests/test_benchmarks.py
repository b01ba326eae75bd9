"""The tables of the benchmarks are what their scripts make of the records beside them."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks"
TABLES = {"pgd": FOLDER / "README.md", "training": FOLDER / "README.md", "queries": FOLDER / "README.md",
          "curvature": FOLDER / "README.md", "scaling": ROOT / "docs/scaling.md"}  # fmt: skip


@pytest.fixture(autouse=True)
def path(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(FOLDER) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def scaling():
    pytest.importorskip("foolbox")
    return importlib.import_module("bench_scaling")


@pytest.mark.parametrize("name", TABLES)
def test_a_table_says_what_its_record_says(name):
    pytest.importorskip("foolbox")
    pytest.importorskip("curvlinops")
    record = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    table = importlib.import_module(f"bench_{name}").tables(record)
    assert f"bench_{name}.py -->\n{table}\n<!-- end of {name}" in TABLES[name].read_text(encoding="utf-8")


def test_the_readme_has_all_ratios():
    bench = importlib.import_module("bench_all")
    found = bench.collect()
    assert {name for name in bench.SCRIPTS if name != "scaling"} <= {p.stem for p in FOLDER.glob("*.json")}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"bench_all.py -->\n{bench.table(found)}\n<!-- end of all" in readme
    spreads = [row for _, row, *_ in found if "ratio_min" in row]
    assert all(row["ratio_min"] <= row["ratio_median"] <= row["ratio_max"] for row in spreads)


def test_a_row_says_its_spread_and_whether_its_aim_was_met():
    bench = importlib.import_module("bench_all")
    assert bench.ratio({"ratio_median": 1.966}) == "1.97 (one run)"
    assert bench.ratio({"ratio_median": 9.5, "ratio_min": 9.25, "ratio_max": 11.04}) == "9.50 (9.25 to 11.0)"
    assert [bench.aim(row) for row in ({}, {"aim": 2.0, "ratio_median": 1.97}, {"aim": 2, "ratio_median": 2.0})] == [
        "", "2.0, missed", "2, met",
    ]  # fmt: skip


def test_a_network_that_guesses_is_named():
    readme, bench = importlib.import_module("readme"), importlib.import_module("bench_all")
    assert [readme.guesses(error) for error in (0.21, 0.79, 0.8, 0.875)] == ["", "", *[" (guesses)"] * 2]
    error = {"textbook": {"clean": [0.1, 0.2], "robust": [0.9, 0.9]}, "ours": {"clean": [0.7, 0.9], "robust": [1, 0.9]}}
    ((_, _, reached),) = bench.rows("training", {"rows": [{"what": "toy", "error": error}]})
    assert reached == "PGD-20 error 90.0%, ours 95.0% (guesses)"


def test_a_peer_is_compared_with_what_is_as_exact():
    ratios, record = importlib.import_module("ratios"), json.loads((FOLDER / "curvature.json").read_text())
    words = [ratios.exactness(ours, 1.0) for ours in (0.9, 0.92, 1.0, 1.09, 1.11)]
    assert [word.split(",")[0] for word in words] == ["more exact", *["equally exact"] * 3, "less exact"]
    ours = {"coarse": 4e-3, "fine": 9e-4}
    assert [ratios.as_exact(ours, theirs) for theirs in (3e-2, 3.7e-3, 3e-3, 8.4e-4, 1e-5)] == [
        "coarse", "coarse", "fine", "fine", "fine",
    ]  # fmt: skip
    ours = {row["against"]: row["residual"] for row in record["eigenpairs"] if row["against"].startswith("ours")}
    assert all(row["ours"] == ratios.as_exact(ours, row["residual"]) for row in record["eigenpairs"])


def test_runs_of_the_paper_and_ours_besides_are_those_of_its_profile(scaling):
    cost, recipes = json.loads((FOLDER / "scaling.json").read_text())["cost"], scaling.PROTOCOL.values()
    runs = [list(scaling.runs_of_paper(recipe).items()) for _, recipe, *_ in recipes if recipe]
    assert [(row["whose"], row["runs"]) for row in cost if row["whose"]] == [pair for row in runs for pair in row]
    assert [sum(n for whose, n in row if whose == scaling.PAPERS) for row in runs] == [9, 18, 18]
    for page in ("README.md", "docs/scaling.md"):
        (workers,) = re.findall(r"--slurm .* --workers (\d+)", (ROOT / page).read_text(encoding="utf-8"))
        assert int(workers) == sum(n for row in runs for _, n in row)


def test_runs_go_side_by_side(scaling):
    assert [scaling.together([3.0] * 5, machines) for machines in (1, 2, 64)] == [15, 9, 3]
    assert scaling.together([1, 2, 3, 4], 2) == 5


def test_a_fit_recovers_an_exponent(scaling):
    row = scaling.fitted("size", [1, 2, 4, 8], [3 * v**1.5 for v in (1, 2, 4, 8)], 1)
    assert row["slope"] == pytest.approx(1.5) and row["last_slope"] == pytest.approx(1.5)
    steeper = scaling.fitted("size", [1, 2, 4], [1, 2, 8], 1)
    assert steeper["slope"] == pytest.approx(1.5) and steeper["last_slope"] == pytest.approx(2)


def test_eigenpairs_are_timed_by_images_and_by_eigenvalues(monkeypatch, scaling):
    """At toy size, by a clock that counts images times squared eigenvalues. One row at a time, and another machine's
    rows do not stay."""
    record = json.loads((FOLDER / "scaling.json").read_text())
    work = []
    monkeypatch.setattr(scaling, "EIGENPAIRS", {"images": ([8, 16, 32], 1), "eigenvalues": ([1, 2, 3], 1)})
    monkeypatch.setattr(scaling, "BASE", {"images": 8, "eigenvalues": 2})
    monkeypatch.setattr(scaling, "seconds", lambda call: (len(call.args[1]) * call.args[3] ** 2, work.append(call())))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(9, 3)).eval()
    x, y = torch.rand(32, 1, 3, 3), torch.arange(32) % 3
    (first,) = scaling.spectra(model, x, y, ["images"], 1)
    (both,) = scaling.spectra(model, x, y, ["eigenvalues"], 1, first)
    assert [(row["by"], row["slope"]) for row in both["rows"]] == [
        ("images", pytest.approx(1)), ("eigenvalues", pytest.approx(2)),
    ]  # fmt: skip
    assert [len(pairs.values) for pairs in work] == [2, 2, 2, 1, 2, 3]
    (other,) = scaling.spectra(model, x, y, ["eigenvalues"], 1, first | {"hardware": {"device": "another"}})
    assert [row["by"] for row in other["rows"]] == ["eigenvalues"]
    assert "| eigenvalues | 1, 2, 3 | 1 | 2.00 | 2.00 |" in scaling.tables(record | {"eigenpairs": both})
    record.pop("eigenpairs", None)
    assert "igenvalues" not in scaling.tables(record)


def test_turns_are_compared_with_their_own():
    ratios = importlib.import_module("ratios")
    turns = [{"ours": 1.0, "peer": 2.0}, {"ours": 10.0, "peer": 40.0}, {"ours": 2.0, "peer": 6.0}]
    assert ratios.spread(turns, "peer") == {
        "ratio_median": 3.0, "ratio_min": 2.0, "ratio_max": 4.0, "seconds_peer": 2.0, "seconds_ours": 1.0, "repeats": 3,
    }  # fmt: skip
    found, turns = ratios.in_turns({"a": lambda: 1, "b": lambda: 2}, 2)
    assert found == {"a": 1, "b": 2}
    assert [set(turn) for turn in turns] == [{"a", "b"}] * 2
