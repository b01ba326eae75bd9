"""Figures with their provenance, and the ledger."""

import hashlib
import io
import json
import math
import re
from pathlib import Path

import jupytext
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import seaborn as sns
import torch
from IPython.core.interactiveshell import InteractiveShell
from PIL import Image

from lib import claims, figures, inference, runs
from lib.figures import Book
from lib.files import read_json
from lib.settings import SettingError

TABLE = pd.DataFrame({"epoch": [1, 2, 3], "error": [0.1, 1 / 3, 0.25]})
PARAMETERS = {"profile": "quick", "seeds": [0, 1], "eps": 0.4, "restarts": (1, 2), "settings": {"a": None}}
NAMES = ["03_error.csv", "03_error.json", "03_error.png"]
SOURCE = """# %% [markdown]
# # 3. A title

# %% tags=["parameters"]
profile = "quick"
seeds, eps = [0, 1], 0.4
restarts = [n for n in (1, 2)]
settings = {"a": None}

# %% [markdown]
# ## The experiment

# %%
trained = 1
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FIGURES_DIR", str(tmp_path / "figures"))
    monkeypatch.setattr(figures.compute, "commit", lambda: "0123456789ab")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "03_toy.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path / "work")
    plt.close("all")
    figures._cells.cache_clear(), figures._assigned_in.cache_clear()
    (tmp_path / "figures").mkdir()
    return tmp_path / "figures"


def book(**more):
    return Book("03_toy", PARAMETERS | {"In": [], "Out": {}, "leftover": 1, "np": np, "__name__": "x"} | more)


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
        save(book(), fig=fig, seeds=(0, 1))
        files = contents(folder)
        assert sorted(files) == NAMES
        assert pd.read_csv(folder / "03_error.csv").equals(TABLE)  # to the last digit
        assert Image.open(io.BytesIO(files["03_error.png"])).size == (800, 600)
        assert not plt.fignum_exists(fig.number)
        record = json.loads(files["03_error.json"])
        assert record["parameters"] == json.loads(json.dumps(PARAMETERS))
        assert record["sha256"] == {k: hashlib.sha256(files[f"03_error.{k}"]).hexdigest() for k in ("png", "csv")}
        assert set(record) == {"stem", "notebook", "profile", "caption", "parameters", "seeds", "source", "versions",
                               "hardware", "commit", "seconds", "sha256", "made", "checksum"}  # fmt: skip
        assert (record["seeds"], record["source"], record["commit"]) == ([0, 1], "noise", "0123456789ab")

    def test_the_same_again_changes_no_byte(self, folder, monkeypatch):
        save(book())
        before = contents(folder)
        monkeypatch.setattr(figures.compute, "commit", lambda: "another")
        monkeypatch.setattr(figures.compute, "clock", lambda: 1e9)
        save(book())
        assert contents(folder) == before

    @pytest.mark.parametrize("change, files", [
        ({"table": TABLE * 2}, {"03_error.csv", "03_error.json"}),
        ({"caption": "Another."}, {"03_error.json"}),
        ({"seeds": [7]}, {"03_error.json"}),
        ({"factor": 2}, {"03_error.png", "03_error.json"}),
        ({"eps": 0.3}, {"03_error.json"}),
    ])  # fmt: skip
    def test_what_changed_is_written_again(self, folder, monkeypatch, change, files):
        save(book())
        before = contents(folder)
        monkeypatch.setattr(figures.compute, "commit", lambda: "another")
        change = dict(change)
        fig, eps = draw(change.pop("factor", 1)), change.pop("eps", 0.4)
        save(book(eps=eps), fig=fig, **change)
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
                k: v for k, v in json.loads(record["03_error.json"]).items() if k not in ("seconds", "checksum")
            }
        assert after == before

    @pytest.mark.parametrize("change, message", [
        ({"stem": "04_error"}, "the stem '04_error' must begin with '03_'"),
        ({"stem": "error"}, "the stem 'error' must begin with '03_'"),
        ({"table": TABLE[:0]}, "03_error needs a table of the numbers drawn, a caption and a source"),
        ({"table": TABLE.describe()}, r"the index \['count', 'mean', 'std'\] would not be written"),
        ({"table": TABLE.set_axis([0.1, 0.2, 0.4])}, r"the index \[0.1, 0.2, 0.4\] would not be written"),
        ({"table": pd.concat({"a": TABLE})}, r"the index \[\('a', 0\), \('a', 1\), \('a', 2\)\] would not be written"),
        ({"table": [1, 2]}, "03_error needs a table"),
        ({"caption": ""}, "03_error needs a table of the numbers drawn, a caption and a source"),
        ({"source": ""}, "03_error needs a table of the numbers drawn, a caption and a source"),
        ({"seeds": [math.nan]}, "not JSON compliant"),
        ({"seeds": 3}, "03_error: seeds is a number, not a list"),
        ({"fig": "a line"}, "03_error: str is no figure"),
        ({"stem": "03_a/b"}, "must begin with '03_', the notebook's number, and name no folder"),
        ({"stem": "03_a\\b"}, "must begin with '03_', the notebook's number, and name no folder"),
    ])  # fmt: skip
    def test_refuses(self, folder, change, message):
        with pytest.raises(ValueError, match=message):
            save(book(), **change)
        assert not contents(folder)

    @pytest.mark.parametrize("drawn", [
        lambda: sns.relplot(TABLE, x="epoch", y="error", height=3),
        lambda: sns.jointplot(TABLE, x="epoch", y="error", height=3),
        lambda: sns.lineplot(TABLE, x="epoch", y="error", ax=plt.subplots(figsize=(4, 3))[1]),
    ])  # fmt: skip
    def test_takes_what_seaborn_returns(self, folder, drawn):
        save(book(), fig=drawn())
        assert sorted(contents(folder)) == NAMES

    def test_refuses_a_figure_that_is_too_wide_to_be_read(self):
        with pytest.raises(ValueError, match="03_error is 9 inches wide"):
            save(book(), fig=plt.subplots(figsize=(9, 3))[0])

    def test_the_default_place_is_the_profiles_folder(self, monkeypatch):
        monkeypatch.delenv("FIGURES_DIR")
        assert book().folder == figures.ROOT / "figures" / "quick"


class TestParameters:
    def test_they_are_those_of_the_tagged_cell_whatever_else_there_is(self):
        assert book(start=False, more=[1]).parameters == PARAMETERS

    def test_one_that_is_not_set_is_named(self):
        with pytest.raises(ValueError, match=r"(eps|seeds) is not set: run the parameters cell first"):
            Book("03_toy", {k: v for k, v in PARAMETERS.items() if k not in ("eps", "seeds")})

    @pytest.mark.parametrize("source", ["# %%\nx = 1\n", SOURCE.replace('profile = "quick"', "")])
    def test_a_notebook_without_them_is_refused(self, source):
        with open("03_toy.py", "w") as file:
            file.write(source)
        with pytest.raises(ValueError, match="03_toy needs one cell tagged `parameters`, which assigns `profile`"):
            book()

    @pytest.mark.parametrize("use", [save, lambda b: b.recipe("lenet on mnist5k"), lambda b: b.close(),
                                     lambda b: b.check("x", holds=True, measured="1")])  # fmt: skip
    def test_one_that_changed_since_is_an_error_before_anything_is_written(self, folder, use):
        namespace = dict(PARAMETERS)
        opened = Book("03_toy", namespace)
        namespace["eps"] = 0.3
        with pytest.raises(ValueError, match="eps changed since the book was opened"):
            use(opened)
        assert not contents(folder)

    def test_other_ones_than_the_profiles_are_the_readers_own(self, tmp_path, monkeypatch):
        monkeypatch.setattr(figures, "ROOT", tmp_path)
        quick = tmp_path / "notebooks" / "profiles" / "quick.json"
        quick.parent.mkdir(parents=True)
        quick.write_text(json.dumps({"03_toy": PARAMETERS, "recipes": figures.recipes.RECIPES}))
        monkeypatch.setenv("FIGURES_DIR", str(tmp_path / "figures" / "quick"))
        assert (book().profile, book().folder) == ("quick", tmp_path / "figures" / "quick")
        for other in ({"eps": 0.3}, {"profile": "gpu"}):
            assert (book(**other).profile, book(**other).folder) == ("mine", tmp_path / "build" / "mine" / "figures")
        monkeypatch.setenv("PROFILE", "gpu")
        assert book(profile="gpu", eps=0.3).profile == "gpu"

    @pytest.mark.parametrize("change, said", [
        ({"seeds": []}, "parameters cell: seeds is empty"),
        ({"eps": [0.3]}, "parameters cell: eps is [0.3], but should be a number"),
        ({"eps": "0.3"}, "parameters cell: eps is '0.3': write numbers without quotes"),
    ])  # fmt: skip
    def test_what_cannot_be_used_is_one_sentence_in_the_cell(self, tmp_path, monkeypatch, change, said):
        monkeypatch.setattr(figures, "ROOT", tmp_path)
        quick = tmp_path / "notebooks" / "profiles" / "quick.json"
        quick.parent.mkdir(parents=True)
        quick.write_text(json.dumps({"03_toy": PARAMETERS, "recipes": figures.recipes.RECIPES}))
        with pytest.raises(SettingError, match=f"^{re.escape(said)}") as caught:
            book(**change)
        shell = InteractiveShell.instance()
        shown = []
        monkeypatch.setattr(shell, "_showtraceback", lambda _kind, _error, lines: shown.extend(lines))
        shell.showtraceback((caught.type, caught.value, caught.tb))
        assert shown == [str(caught.value)]

    def test_a_name_that_is_new_or_gone_is_named_and_a_damaged_definition_too(self, tmp_path, monkeypatch):
        monkeypatch.setattr(figures, "ROOT", tmp_path)
        quick = tmp_path / "notebooks" / "profiles" / "quick.json"
        quick.parent.mkdir(parents=True)
        quick.write_text(json.dumps({"03_toy": PARAMETERS | {"old": 1}, "recipes": figures.recipes.RECIPES}))
        with pytest.raises(SettingError, match="'old' is gone"):
            book()
        quick.write_text(f"<<<<<<< HEAD\n{quick.read_text()}")
        with pytest.raises(SettingError, match=r"quick\.json is damaged: `git checkout` of it brings it back"):
            book()

    def test_changes_reach_a_recipe_by_name(self, monkeypatch):
        monkeypatch.setitem(PARAMETERS, "changes", {"lenet on mnist5k": {"width": 1}})
        with open("03_toy.py", "a") as file:
            file.write('\n# %% tags=["other"]\n')
        opened = book()
        opened.parameters["changes"] = PARAMETERS["changes"]
        assert opened.recipe("lenet on mnist5k")["width"] == 1


def test_the_section_that_makes_a_name_is_known():
    assert figures._assigned_in("03_toy") == {
        "profile": "3. A title", "seeds": "3. A title", "eps": "3. A title", "restarts": "3. A title",
        "settings": "3. A title", "trained": "The experiment",
    }  # fmt: skip


def test_colours_of_equal_eps_are_equal_and_dark_enough():
    assert figures.eps_colours([0.0, 0.1])[0.1] == figures.eps_colours([0.1, 0.2, 0.4])[0.1]
    for red, green, blue, _ in figures.eps_colours([0, 0.1, 0.2, 0.3, 0.4]).values():
        assert 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.75


def test_few_colours_never_change_one():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8))

    class Drawn:
        def savefig(self, buffer, **_settings):
            noise.save(buffer, "png")

    shown = Image.open(io.BytesIO(figures._png(Drawn()))).convert("RGB")
    assert abs(np.asarray(noise).astype(int) - np.asarray(shown).astype(int)).max() <= 24


class TestLedgers:
    def add(self, opened, **more):
        facts = {"section": "4.1", "n": "3 seeds", "source": "digits"}
        opened.claim("It falls", **facts | {"holds": inference.exact("x", tolerance=1)(0.5)} | more)
        opened.answer("Is it so?", "Yes.", reviewer="Reviewer 1", n="3", source="digits")
        opened.check("sums", holds=True, measured="0")

    def test_three_of_them_are_written(self, folder):
        opened = book()
        save(opened)
        self.add(opened, holds=False, measured="1")
        self.add(opened)  # its cells were run twice: the rows take the place of the first
        opened.close()
        ledgers = json.loads((folder / "03_toy.claims.json").read_text())
        assert [len(ledgers[name]) for name in ("claims", "answers", "checks")] == [1, 1, 1]
        (row,) = ledgers["claims"]
        assert (row["verdict"], row["figure"]) == ("reproduced", "03_error")
        assert row["measured"] == "largest error 0.5 of 1, 1 allowed"
        assert ledgers["title"] == "3. A title"
        assert json.loads((folder / "03_toy.uses.json").read_text())["runs"] == []

    def test_the_time_is_that_of_the_notebook_alone_beside_that_of_what_it_uses(self, folder, monkeypatch, tmp_path):
        """So the sum is the time from nothing, whether the values were made now or found."""
        monkeypatch.setenv("RUNS_DIR", str(tmp_path / "runs"))
        monkeypatch.setenv("RUN_ALL_JOURNAL", str(tmp_path / "journal"))
        now = [0.0]
        monkeypatch.setattr(figures.compute, "clock", lambda: now[0])

        def wait(seconds):
            now[0] += seconds
            return 1

        for state in ("measured", "remembered"):
            with_value = book()
            for _ in range(2):  # what is asked for twice was made no less
                runs.remember("values", {"of": 1}, lambda: wait(10))
            wait(3)
            with_value.answer("Why?", "So.", reviewer="Reviewer 1", n="1", source="none")
            with_value.close()
            use = read_json(folder / "03_toy.uses.json")
            assert (use["seconds"], [run["seconds"] for run in use["runs"]]) == (3, [10]), state
            assert read_json(tmp_path / "journal").get(state) == 1, state
            (folder / "03_toy.uses.json").unlink()

    def test_what_is_committed_counts_as_used_only_where_it_is_asked_for_again(self, folder, monkeypatch, tmp_path):
        """So the run that makes it and the next one write the same."""
        monkeypatch.setenv("RUNS_DIR", str(tmp_path / "runs"))
        monkeypatch.setenv("RUN_ALL_JOURNAL", str(tmp_path / "journal"))
        told = []
        for _ in range(2):
            opened = book()
            for of in (1, 2):
                runs.remember("values", {"of": of}, lambda: 0, committed=folder)
            runs.remember("values", {"of": 2}, lambda: 0)
            opened.check("sums", holds=True, measured="0")
            opened.close()
            told.append(read_json(folder / "03_toy.uses.json")["runs"])
            (folder / "03_toy.uses.json").unlink()
            told.append(read_json(tmp_path / "journal"))
        first, made, second, found = told
        assert first == second and len(first) == 1 and (made, found) == ({"measured": 2}, {"remembered": 1})

    def test_undecided_says_why(self, folder):
        opened = book()
        self.add(opened, holds=inference.trend("x", expect="rises")([[1, 2, 3]]))
        opened.close()
        (row,) = json.loads((folder / "03_toy.claims.json").read_text())["claims"]
        assert row["verdict"] == "undecided" and "seed" in row["why"]

    @pytest.mark.parametrize(("here", "there", "told"), [(None, True, True), (True, False, False), (None, None, False)])
    def test_a_claim_undecided_here_says_how_another_profile_has_judged_it(
        self, monkeypatch, tmp_path, here, there, told
    ):
        monkeypatch.setattr(figures, "ROOT", tmp_path)
        for profile, holds in (("large", there), ("quick", False)):  # its own of before is not another's
            monkeypatch.setenv("FIGURES_DIR", str(tmp_path / "figures" / profile))
            monkeypatch.setattr(figures, "_profile", lambda *_, profile=profile: (profile, ""))
            self.add(opened := book(), holds=holds, measured="1", n="9 seeds")
            opened.close()
        (tmp_path / "figures" / "other").mkdir()
        (tmp_path / "figures" / "other" / "03_toy.claims.json").write_text("{")
        pages = []
        monkeypatch.setattr(figures, "Markdown", lambda text: pages.append(text) or text)
        self.add(opened := book(), holds=here, measured="1")
        opened.close()
        said = "In the profile `large`: **reproduced** (n: 9 seeds)"
        assert [said in page for page in pages if "It falls" in page] == [told, told]
        assert any(f"- **Undecided**: It falls. {said}." in page for page in pages) == told

    def test_an_empty_book_is_an_error(self):
        with pytest.raises(ValueError, match="03_toy records no claim"):
            book().close()

    @pytest.mark.parametrize("change", [{"n": ""}, {"section": " "}, {"holds": 0.3, "measured": "1"}, {"measured": 1}])
    def test_refuses(self, change):
        with pytest.raises(ValueError, match=r"must be a text|compare the number first"):
            self.add(book(), **change)

    @pytest.mark.parametrize(
        "holds, verdict",
        [(True, "reproduced"), (np.False_, "not reproduced"), (None, "undecided"), ("partly", "partly")],
    )
    def test_verdicts(self, holds, verdict):
        assert claims.verdict(holds) == verdict


def test_a_stepper_stands_alone_and_repeats():
    def made():
        figs = [plt.figure(figsize=(2, 1)) for _ in range(3)]
        for i, fig in enumerate(figs):
            fig.gca().plot([0, i])
        return figures.stepper(figs, ["a", "b", "c < d"], what='the "ball"').data

    page = made()
    assert page == made() and not plt.get_fignums()
    assert page.count("<img") == page.count("alt=") == 3 and page.count("display:block") == 1
    assert "http" not in page and "c &lt; d" in page and "&quot;ball&quot;" in page
    with pytest.raises(ValueError):
        figures.stepper([plt.figure()], ["a", "b"], what="ball")


@pytest.mark.parametrize("path", sorted((figures.ROOT / "notebooks").glob("*.py")), ids=lambda path: path.stem)
def test_cells_are_those_that_jupytext_reads(path):
    """The library reads notebooks without jupytext, because importing it takes a kernel seconds."""
    read = jupytext.read(path, fmt={"extension": ".py", "comment_magics": False}).cells
    wanted = [(cell.cell_type, cell.metadata.get("tags", []), cell.source.strip()) for cell in read]
    assert [(kind, tags, source.strip()) for kind, tags, source in figures._cells(path.stem)] == wanted


@pytest.mark.parametrize("mark", ["# %%", "#%%", "#  %%", "  #%%", "#\t%%"])
def test_a_cell_begins_as_jupytext_takes_it(mark):
    end = f"trained = 1\n#%%x is none\n#%%%%\n{mark}\n{mark} end\nx"
    Path("03_toy.py").write_text(text := SOURCE.replace("# %%", mark).replace("trained = 1", end))
    form = {"extension": ".py", "format_name": "percent", "comment_magics": False}
    wanted = [(cell.cell_type, cell.source.strip()) for cell in jupytext.reads(text, form).cells]
    assert [(kind, source.strip()) for kind, _, source in figures._cells("03_toy")] == wanted and len(wanted) == 6
    assert figures._parameter_names("03_toy") == ["profile", "seeds", "eps", "restarts", "settings"]


def test_a_check_takes_numpys_truth_and_nothing_else():
    assert claims.check("c", holds=np.bool_(True), measured="1")["passed"] is True
    assert claims.check("c", holds=np.bool_(False), measured="1")["passed"] is False
    for holds in (1, "partly", None, [True]):
        with pytest.raises(ValueError, match=r"holds|passes"):
            claims.check("c", holds=holds, measured="1")


@pytest.mark.parametrize("channels", [1, 3])
def test_an_attacked_image_is_drawn_beside_what_was_changed(channels):
    image = torch.full((channels, 4, 4), 0.5)
    attacked = image.clone()
    attacked[:, 0, 0] += 0.1
    fig, pair = plt.subplots(1, 2)
    assert figures.draw_attacked(pair, image, attacked, 0.2, "3 called 5", wrong=True) == pytest.approx(0.1)
    drawn = pair[1].images[0]
    shades = drawn.norm(drawn.get_array()) if channels == 1 else drawn.get_array()
    assert np.allclose(shades[0, 0], 0.75) and np.allclose(shades[1:], 0.5)  # no change: grey or white
    assert pair[0].get_title() == "3 called 5" and pair[0].title.get_color() == "C3"
    assert figures.draw_attacked(pair, image, image, 0.0, "3 called 3") == 0 and pair[0].title.get_color() == "black"
    plt.close(fig)
