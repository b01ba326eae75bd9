"""Figures with their provenance, and the ledger."""

import hashlib
import io
import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from lib import claims, figures
from lib.figures import Book

TABLE = pd.DataFrame({"epoch": [1, 2, 3], "error": [0.1, 1 / 3, 0.25]})
PARAMETERS = {"profile": "quick", "seeds": [0, 1], "eps": 0.4, "restarts": (1, 2), "settings": {"a": None}}
NAMES = ["03_error.csv", "03_error.json", "03_error.png"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FIGURES_DIR", str(tmp_path))
    monkeypatch.setattr(figures, "_commit", lambda: "0123456789ab")
    return tmp_path


def book(**more):
    return Book("03_early_training", PARAMETERS | {"In": [], "Out": {}, "_hidden": 1, "np": np, "__name__": "x"} | more)


def draw(factor=1):
    fig, ax = plt.subplots(figsize=(4, 3))
    ax.plot(TABLE["epoch"], factor * TABLE["error"])
    return fig


def save(book, *, fig=None, stem="03_error", table=TABLE, caption="Error by epoch, n=3.", source="noise", **more):
    return book.save(fig or draw(), stem, table, caption=caption, source=source, **more)


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


class TestSave:
    def test_writes_picture_numbers_and_record(self, folder):
        fig = draw()
        shown = save(book(), fig=fig, seeds=(0, 1))
        files = contents(folder)
        assert sorted(files) == NAMES and shown.data == files["03_error.png"]
        assert pd.read_csv(folder / "03_error.csv").equals(TABLE)  # to the last digit
        assert Image.open(io.BytesIO(files["03_error.png"])).size == (440, 330)
        assert not plt.fignum_exists(fig.number)
        record = json.loads(files["03_error.json"])
        assert record["parameters"] == json.loads(json.dumps(PARAMETERS))
        assert record["sha256"] == {k: hashlib.sha256(files[f"03_error.{k}"]).hexdigest() for k in ("png", "csv")}
        assert set(record) == {"stem", "notebook", "profile", "caption", "parameters", "seeds", "source", "versions",
                               "hardware", "commit", "wall_time_s", "sha256"}  # fmt: skip
        assert (record["seeds"], record["source"], record["commit"]) == ([0, 1], "noise", "0123456789ab")

    def test_the_same_again_changes_no_byte(self, folder, monkeypatch):
        save(book())
        before = contents(folder)
        monkeypatch.setattr(figures, "_commit", lambda: "another")
        monkeypatch.setattr(figures.time, "monotonic", lambda: 1e9)
        save(book())
        assert contents(folder) == before

    @pytest.mark.parametrize("change, files", [
        ({"table": TABLE * 2}, {"03_error.csv", "03_error.json"}),
        ({"caption": "Another."}, {"03_error.json"}),
        ({"seeds": [7]}, {"03_error.json"}),
        ({"factor": 2}, {"03_error.png", "03_error.json"}),
        ({"parameter": 1}, {"03_error.json"}),
    ])  # fmt: skip
    def test_what_changed_is_written_again(self, folder, monkeypatch, change, files):
        save(book())
        before = contents(folder)
        monkeypatch.setattr(figures, "_commit", lambda: "another")
        change = dict(change)
        fig, parameter = draw(change.pop("factor", 1)), change.pop("parameter", None)
        save(book(**({"new": parameter} if parameter else {})), fig=fig, **change)
        after = contents(folder)
        assert {k for k in before if before[k] != after[k]} == files
        assert json.loads(after["03_error.json"])["commit"] == "another"

    def test_a_corrupted_record_is_made_again(self, folder):
        save(book())
        before = contents(folder)
        (folder / "03_error.json").write_text('{"stem": ')
        save(book())
        after = contents(folder)
        for record in (before, after):
            record["03_error.json"] = {
                k: v for k, v in json.loads(record["03_error.json"]).items() if k != "wall_time_s"
            }
        assert after == before

    @pytest.mark.parametrize("change, message", [
        ({"stem": "04_error"}, "the stem '04_error' must begin with '03_'"),
        ({"stem": "error"}, "the stem 'error' must begin with '03_'"),
        ({"table": TABLE[:0]}, "03_error needs a table of the numbers drawn, a caption and a source"),
        ({"table": [1, 2]}, "03_error needs a table"),
        ({"caption": ""}, "03_error needs a table of the numbers drawn, a caption and a source"),
        ({"source": ""}, "03_error needs a table of the numbers drawn, a caption and a source"),
    ])  # fmt: skip
    def test_refuses(self, folder, change, message):
        with pytest.raises(ValueError, match=message):
            save(book(), **change)
        assert not contents(folder)

    def test_needs_a_profile(self):
        with pytest.raises(ValueError, match="the parameters cell must assign `profile`"):
            Book("03_early_training", {"eps": 0.4})

    def test_the_default_place_is_the_profiles_folder(self, monkeypatch):
        monkeypatch.delenv("FIGURES_DIR")
        assert book().folder == figures.ROOT / "figures" / "quick"


ROW = {"section": "5", "measured": "11 % against 90 %", "holds": True, "n": "3 seeds", "source": "noise"}


class TestOtherSizes:
    def test_shows_what_other_profiles_drew_and_says_which(self, tmp_path, monkeypatch):
        monkeypatch.setattr(figures, "ROOT", tmp_path)
        shown = []
        monkeypatch.setattr(figures, "display", lambda thing: shown.append(thing.data))
        for profile in ("quick", "paper", "gpu"):
            monkeypatch.setenv("FIGURES_DIR", str(tmp_path / "figures" / profile))
            save(book(profile=profile), caption=f"A {profile} caption.")
        book().show_other_sizes("03_error")
        pictures = [(tmp_path / "figures" / profile / "03_error.png").read_bytes() for profile in ("gpu", "paper")]
        assert shown[1::2] == pictures
        assert [words.split()[1] for words in shown[::2]] == ["`gpu`.**", "`paper`.**"]
        assert shown[0] == "**Profile `gpu`.** A gpu caption. Data: noise."
        book().show_other_sizes("03_missing")
        assert len(shown) == 4


class TestLedger:
    def test_close_writes_the_rows(self, folder):
        b = book()
        b.claim("cosine is better", **ROW)
        b.claim("linear is better", **ROW | {"holds": None})
        table = b.close().data
        ledger = json.loads((folder / "03_early_training.claims.json").read_text())
        assert (ledger["notebook"], ledger["profile"]) == ("03_early_training", "quick")
        assert [r["verdict"] for r in ledger["claims"]] == ["reproduced", "not testable at this size"]
        assert ledger["claims"][0] == {"claim": "cosine is better", "verdict": "reproduced"} | {
            k: ROW[k] for k in ("section", "measured", "n", "source")
        }
        assert table["claim"].tolist() == ["cosine is better", "linear is better"]

    def test_a_cell_run_twice_replaces_its_row(self):
        b = book()
        for claim, holds in (("a", True), ("b", True), ("a", False)):
            b.claim(claim, **ROW | {"holds": holds})
        assert [(r["claim"], r["verdict"]) for r in b.rows] == [("b", "reproduced"), ("a", "not reproduced")]

    def test_no_claims(self):
        with pytest.raises(ValueError, match="03_early_training records no claim"):
            book().close()

    @pytest.mark.parametrize("name", ["claim", "section", "measured", "n", "source"])
    @pytest.mark.parametrize("value", ["", "  ", None, 3])
    def test_every_text_is_needed(self, name, value):
        with pytest.raises(ValueError, match=f"{name} must be a text, got"):
            claims.row(**({"claim": "a"} | ROW | {name: value}))

    @pytest.mark.parametrize("holds, verdict", [
        (True, "reproduced"), (False, "not reproduced"), (None, "not testable at this size"),
        (np.True_, "reproduced"), (np.False_, "not reproduced"), (np.float64(1) > 2, "not reproduced"),
        (TABLE["error"].max() > 0.3, "reproduced"), *((v, v) for v in claims.VERDICTS),
    ])  # fmt: skip
    def test_verdict(self, holds, verdict):
        assert claims.verdict(holds) == verdict

    @pytest.mark.parametrize(
        "holds", [1, 0, 0.3, np.float64(1), float("nan"), [], torch.tensor(True), np.array([True])]
    )
    def test_numbers_are_no_verdicts(self, holds):
        with pytest.raises(ValueError, match="a claim holds or it does not"):
            claims.verdict(holds)

    def test_unknown_verdict(self):
        with pytest.raises(ValueError, match="unknown verdict 'yes': choose one of reproduced, partly"):
            claims.verdict("yes")
