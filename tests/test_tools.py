"""The tools, on small projects made in temporary folders."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jupytext
import psutil
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

TOOLS = Path(__file__).resolve().parents[1] / "tools"
sys.path.insert(0, str(TOOLS))

import check_pairs  # noqa: E402
import dry_run  # noqa: E402
import execute  # noqa: E402
import gallery  # noqa: E402
import jobs  # noqa: E402
import nbclean  # noqa: E402
import profiles  # noqa: E402
import run as runner  # noqa: E402
import stability  # noqa: E402
from layout import Layout  # noqa: E402

from lib import cells, figures, recipes, runs  # noqa: E402
from lib.files import checksum, write_json  # noqa: E402

HEADER = """\
# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

"""
PICTURE = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
CAPTION = {"image/png": {"alt": "what is seen"}}
SHOW = f'from IPython.display import display\ndisplay({{"image/png": "{PICTURE}"}}, raw=True, metadata={CAPTION})'


def source(title, *cells, parameters='profile = "quick"\nsteps = 3\nrate = 0.1'):
    """A notebook in the percent format."""
    parts = [f"# %% [markdown]\n# # {title}", f'# %% tags=["parameters"]\n{parameters}']
    return HEADER + "\n\n".join(parts + [f"# %%\n{cell}" for cell in cells]) + "\n"


@pytest.fixture
def toy(tmp_path):
    """An empty project whose path has a space."""
    layout = Layout(tmp_path / "a project")
    layout.profiles.mkdir(parents=True)
    shutil.copy(Layout().notebooks / "jupytext.toml", layout.notebooks)
    return layout


def add(layout, name, *cells, **options):
    (layout.notebooks / f"{name}.py").write_text(source(name, *cells, **options))


def run(layout, *arguments, **options):
    command = [sys.executable, str(TOOLS / "run.py"), "--root", str(layout.root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


# ---------------------------------------------------------------- one notebook, executed and cleaned by hand


def stream(name, text):
    return {"output_type": "stream", "name": name, "text": text}


def shown(**data):
    return {"output_type": "display_data", "data": {k.replace("_", "/"): v for k, v in data.items()},
            "metadata": CAPTION}  # fmt: skip


def executed(*outputs, tags=(), count=7):
    """A raw notebook with one markdown, one parameters and one code cell that has these outputs."""
    cell = {"cell_type": "code", "id": "random", "metadata": {"papermill": {"duration": 1.5}}, "source": ["x\n", "y"]}
    parameters = {**cell, "metadata": {"tags": ["parameters"]}, "source": 'profile = "quick"', "outputs": []}
    injected = {**cell, "metadata": {"tags": ["injected-parameters"]}, "source": "profile = 1", "outputs": []}
    words = {"cell_type": "markdown", "id": "m", "metadata": {}, "source": "# Title"}
    code = {**cell, "outputs": list(outputs), "execution_count": count}
    cells = [words, {**parameters, "execution_count": 5}, {**injected, "execution_count": 6}, code]
    return {"cells": cells, "metadata": {"papermill": {}, "widgets": {}}, "nbformat": 4, "nbformat_minor": 5}


def test_nbclean_takes_out_what_changes_between_runs():
    widget = {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "bar"}
    outputs = [
        stream("stdout", "one\n"),
        stream("stderr", "50%|#####"),
        stream("stdout", "two\n"),
        {"output_type": "display_data", "data": widget, "metadata": {}},
        {"output_type": "execute_result", "data": {"text/plain": "<f at 0x7f00aa11bb>"}, "execution_count": 7},
        shown(image_png=PICTURE + "\n", text_html=f"<i>{nbclean.HERE}/lib</i>"),
    ]
    cleaned = nbclean.clean(executed(*outputs))
    assert [cell["cell_type"] for cell in cleaned["cells"]] == ["markdown", "code", "code"]
    assert [cell["execution_count"] for cell in cleaned["cells"][1:]] == [1, 2]
    first, second, third = cleaned["cells"][2]["outputs"]
    assert first == {"output_type": "stream", "name": "stdout", "text": ["one\n", "two\n"]}
    assert second["data"] == {"text/plain": ["<f at 0x...>"]} and "execution_count" not in second
    assert third["data"] == {"image/png": PICTURE, "text/html": ["<i><repo>/lib</i>"]}
    assert set(cleaned["metadata"]) == {"kernelspec", "language_info"}
    assert not re.search(r"random|duration|papermill", nbclean.dumps(cleaned))


def test_nbclean_is_idempotent_and_gives_distinct_ids():
    notebook = executed(stream("stdout", "a\nb"))
    notebook["cells"].append(notebook["cells"][-1] | {"execution_count": 8})
    once = nbclean.clean(notebook)
    assert nbclean.dumps(nbclean.clean(once)) == nbclean.dumps(once)
    assert len({cell["id"] for cell in once["cells"]}) == 4


def test_nbclean_keeps_the_pictures_of_a_cell_of_words():
    notebook = executed()
    notebook["cells"][0] |= {"source": "![a](attachment:a.png)", "attachments": {"a.png": {"image/png": PICTURE}}}
    cleaned = nbclean.clean(notebook)
    assert cleaned["cells"][0]["attachments"] == notebook["cells"][0]["attachments"]
    assert all("attachments" not in cell for cell in cleaned["cells"][1:])


def test_nbclean_does_not_hide_cells_run_out_of_order():
    cleaned = nbclean.clean(executed(count=2))
    assert [cell["execution_count"] for cell in cleaned["cells"][1:]] == [5, 2]


def test_nbclean_command_line(tmp_path):
    (tmp_path / "a.ipynb").write_text(json.dumps(executed(stream("stderr", "bar"))))
    subprocess.run([sys.executable, TOOLS / "nbclean.py", tmp_path / "a.ipynb"], check=True)
    assert (tmp_path / "a.ipynb").read_text() == nbclean.dumps(nbclean.clean(executed()))


# ---------------------------------------------------------------- pairs


@pytest.fixture
def pair(toy):
    """A good pair, and functions to spoil either side of it."""
    (toy.notebooks / "01_a.py").write_text(
        HEADER + '# %% [markdown]\n# # Title\n\n# %% tags=["parameters"]\nprofile = "quick"\n\n# %%\nx\ny\n'
    )
    rendering = nbclean.clean(executed(shown(image_png=PICTURE)))
    (toy.notebooks / "01_a.ipynb").write_text(nbclean.dumps(rendering))
    define(toy)
    return toy


def define(layout):
    (layout.profiles / "quick.json").write_text(json.dumps(profiles.definition(layout)))


def spoil_source(layout, old, new):
    path = layout.notebooks / "01_a.py"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def spoil_rendering(layout, change):
    path = layout.notebooks / "01_a.ipynb"
    notebook = json.loads(path.read_text())
    change(notebook["cells"])
    path.write_text(nbclean.dumps(notebook))


def verdict(layout, capsys):
    status = check_pairs.main(layout)
    return status, capsys.readouterr().out


def test_a_good_pair_passes(pair, capsys):
    assert verdict(pair, capsys) == (0, "1 pairs agree\n")


def test_no_notebook_is_not_a_pass(toy, capsys):
    status, words = verdict(toy, capsys)
    assert status == 1 and "nothing was checked" in words


@pytest.mark.parametrize("suffix", [".py", ".ipynb"])
def test_half_a_pair_is_found(pair, capsys, suffix):
    (pair.notebooks / f"01_a{suffix}").unlink()
    define(pair)
    assert verdict(pair, capsys) == (1, f"01_a: {suffix} is missing\n")


SPOILT_SOURCES = {
    "edited": ("x\ny", "x\nz", "differ from cell 3"),
    "cell added": ("# %%\nx", "# %%\nnew\n\n# %%\nx", "differ from cell 3"),
    "words edited": ("# # Title", "# # Other", "differ from cell 1"),
    "no format name": ("#       format_name: percent\n", "", "no format_name"),
    "no kernelspec": ("#   kernelspec:\n", "", "no kernelspec"),
    "no parameters": (' tags=["parameters"]', "", "0 cells are tagged `parameters`"),
    "no profile": ('profile = "quick"', "steps = 1", "does not set `profile`"),
}


@pytest.mark.parametrize("case", SPOILT_SOURCES)
def test_a_spoilt_source_is_found(pair, capsys, case):
    old, new, message = SPOILT_SOURCES[case]
    spoil_source(pair, old, new)
    status, words = verdict(pair, capsys)
    assert status == 1 and message in words


def set_in_last(**fields):
    return lambda cells: cells[-1].update(fields)


PATH_SHOWN = [shown(image_png=PICTURE, text_plain=["/home/me/data"])]
SPOILT_RENDERINGS = {
    "edited": (set_in_last(source=["z"]), "differ from cell 3"),
    "cell removed": (lambda cells: cells.pop(), "differ from cell 3"),
    "outputs lost": (set_in_last(outputs=[]), "shows no figure"),
    "not run": (set_in_last(execution_count=None), "not run top to bottom"),
    "out of order": (set_in_last(execution_count=9), "not run top to bottom"),
    "error": (
        set_in_last(outputs=[{"output_type": "error", "ename": "E", "evalue": "", "traceback": []}]),
        "holds an error",
    ),
    "stderr": (set_in_last(outputs=[stream("stderr", ["bar"]), shown(image_png=PICTURE)]), "holds stderr"),
    "not clean": (set_in_last(metadata={"scrolled": True}), "is not clean"),
    "long cell": (set_in_last(source=["x\n"] * 31), "cell 3 has more than 30 lines"),
    "no caption": (set_in_last(outputs=[shown(image_png=PICTURE) | {"metadata": {}}]), "without its caption"),
    "machine path": (set_in_last(outputs=PATH_SHOWN), "cell 3 names a path of one machine: /home/me/data"),
    "too big": (set_in_last(outputs=[shown(image_png="A" * 1_500_000)]), "at most 1,500,000"),
    "not a notebook": (lambda cells: cells.append({}), "cannot be read"),
}


@pytest.mark.parametrize("case", SPOILT_RENDERINGS)
def test_a_spoilt_rendering_is_found(pair, capsys, case):
    change, message = SPOILT_RENDERINGS[case]
    spoil_rendering(pair, change)
    status, words = verdict(pair, capsys)
    assert status == 1 and message in words


def test_jupyterlab_would_write_the_source_back_as_it_is(pair, capsys):
    text = (pair.notebooks / "01_a.py").read_text() + "\n\n# %%\ndef f():\n    pass\n\n# %%\nx\n"
    (pair.notebooks / "01_a.py").write_text(text)
    notebook = json.loads(jupytext.writes(profiles.source(pair.notebooks / "01_a.py"), "ipynb"))
    for cell in notebook["cells"]:
        cell["metadata"].pop("lines_to_next_cell", None)
    (pair.notebooks / "01_a.ipynb").write_text(nbclean.dumps(nbclean.clean(notebook)))
    assert ".py would change when JupyterLab saves it" in verdict(pair, capsys)[1]


def test_a_changed_parameters_cell_is_no_longer_the_profile(pair, capsys):
    spoil_source(pair, 'profile = "quick"', 'profile = "quick"\nx = 1')
    assert "quick.json: the parameters cells or lib/recipes.py say something else" in verdict(pair, capsys)[1]


def commit(layout):
    for arguments in (("init", "-q"), ("add", "-A"), ("commit", "-q", "-m", "x")):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=layout.root, check=True)


@pytest.mark.parametrize("memory", ["git", "last run", "clock"])
def test_an_edit_in_the_ipynb_alone_is_not_overwritten(pair, capsys, memory):
    source, rendering = pair.notebooks / "01_a.py", pair.notebooks / "01_a.ipynb"
    if memory == "git":
        commit(pair)
    if memory == "last run":
        (pair.build / "quick").mkdir(parents=True)
        shutil.copy(source, pair.build / "quick")
    as_run = pair.build / "quick" / "01_a.py"
    assert not check_pairs.edited(source, rendering, as_run)
    spoil_source(pair, "x\ny", "x\nz")  # the usual way: the .py is edited, and the run makes the .ipynb
    os.utime(source, (2e9, 2e9))
    assert not check_pairs.edited(source, rendering, as_run)
    spoil_source(pair, "x\nz", "x\ny")
    spoil_rendering(pair, set_in_last(source=["an_edit"]))
    os.utime(source, (1e9, 1e9))
    before = rendering.read_bytes()
    assert refuses(pair, capsys, [], "01_a.ipynb was edited by itself") and rendering.read_bytes() == before
    if memory != "clock":
        spoil_source(pair, "x\ny", "another_edit")
        os.utime(source, (2e9, 2e9))
        assert refuses(pair, capsys, [], "01_a.ipynb was edited by itself") and rendering.read_bytes() == before


def test_git_is_asked_about_this_project_whatever_the_environment_names(pair, tmp_path, monkeypatch):
    source, rendering = pair.notebooks / "01_a.py", pair.notebooks / "01_a.ipynb"
    commit(pair)
    subprocess.run(["git", "init", "-q", "other"], cwd=tmp_path, check=True)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other/.git"))
    spoil_rendering(pair, set_in_last(source=["an_edit"]))
    os.utime(rendering, (1e9, 1e9))
    assert check_pairs.edited(source, rendering, pair.build / "quick" / "01_a.py")


@pytest.mark.parametrize("kept", [".ipynb", ".py"])
def test_both_ways_out_of_an_edit_in_the_ipynb(pair, capsys, kept):
    source, rendering = pair.notebooks / "01_a.py", pair.notebooks / "01_a.ipynb"
    commit(pair)
    spoil_rendering(pair, set_in_last(source=["an_edit"]))
    assert refuses(pair, capsys, [], "was edited by itself")
    lines = runner.EDITED.format(name="01_a").splitlines()
    (line,) = (line for line in lines if f"what is in the {kept}:" in line)
    command = line.partition("--python ")[2].split()
    subprocess.run([sys.executable, *command], cwd=pair.root, check=True, capture_output=True)
    assert ("an_edit" in source.read_text()) == ("an_edit" in rendering.read_text()) == (kept == ".ipynb")
    assert source.read_text().startswith(HEADER)
    problems = check_pairs.pair_problems(source, rendering)
    assert problems == [f".ipynb is not clean ({check_pairs.AGAIN})"] * (kept == ".ipynb")  # what the next run mends


# ---------------------------------------------------------------- profiles: everything is checked before anything runs


def test_a_profile_holds_the_notebooks_it_names(toy):
    add(toy, "01_a")
    add(toy, "02_b")
    (toy.profiles / "big.yaml").write_text("02_b:\n  steps: 30\n  rate: 1\n")
    assert profiles.read_profile(toy, "big") == {"02_b": {"steps": 30, "rate": 1}}
    assert profiles.read_profile(toy, "quick") == {"01_a": {}, "02_b": {}}
    (toy.profiles / "big.yaml").write_text("# nothing yet\n")
    assert profiles.read_profile(toy, "big") == {}


PARAMETERS = """profile = "quick"
steps = 3
rate = 0.1
seeds = [0, 1]
augment = False
arms = [{"eps": "8/255", "lr": 0.1}, {"eps": "0.4"}]
recipe = "lenet on mnist5k"
changes = {}"""
BAD_PROFILES = {
    "01_b: {steps: 1}": "no notebook '01_b': sections may be recipes, 01_a",
    "01_a: {step: 1}": "section 01_a: no parameter 'step': the notebook has steps, rate",
    "01_a: {profile: gpu}": "no parameter 'profile'",
    "01_a: {rate: a lot}": "01_a: rate is 'a lot', but should be a number; write numbers plainly",
    "01_a: {steps: '10,000'}": "01_a: steps is '10,000', but should be a number; write numbers plainly, such as 10000",
    "01_a: {steps: 010}": "010 is no plain number",
    "01_a: {steps: 1:30}": "1:30 is no plain number",
    "01_a: {rate: 1.0e+400}": "1.0e+400 is no plain number",
    f"01_a: {{rate: 1{'0' * 400}}}": "00 is no plain number",
    "01_a: {augment: !!bool '3'}": "big.yaml: '3' is no bool",
    "01_a: {steps: 2020-02-31}": "big.yaml: '2020-02-31' is no timestamp",
    "01_a: {arms: [{1: x}]}": "big.yaml: the key 1 is no text: quote it",
    "01_a: {off: x}": "the key False is no text: quote it",
    "01_a: {rate: 1/0}": "rate is '1/0', but should be a number",
    "01_a: {rate: 1/2/3}": "rate is '1/2/3', but should be a number",
    "01_a: {steps: true}": "steps is True, but should be a number",
    "01_a: {augment: 1}": "augment is 1, but should be a bool",
    "01_a: {recipe: off}": "recipe is False, but should be a text; quote it: YAML reads off",
    "01_a: {seeds: 1}": "seeds is 1, but should be a list",
    "01_a: {seeds: []}": "seeds is empty",
    "01_a: {seeds: [0, 3, 0.0]}": "seeds has a number twice: [0, 3, 0.0]",
    "01_a: {seeds: [0, null]}": "seeds, item 2 is None, but should be a number",
    "01_a: {seeds: [0.5]}": "seeds, item 1 is 0.5, but should be a whole number",
    "01_a: {steps: 5/2}": "steps is 2.5, but should be a whole number",
    "01_a: {arms: [{eps: 1/4}, {lr: 1}]}": "arms, item 2 has no 'eps'",
    "01_a: {arms: [{lr: null}]}": "arms, item 1: lr is None, but should be a number",
    "recipes: {lenet on mnist: {plan: {steps: 2.5}}}": "plan: steps is 2.5, but should be a whole number",
    "recipes: {lenet on mnist: {plan: {pgd_images: 0}}}": "mnist': pgd_images is 0, but should be above 0",
    "recipes: {lenet on mnist5k: {plan: {queries: -1}}}": "queries is -1, but should be above 0",
    "01_a: {changes: {lenet on mnist: {plan: {queries: 0}}}}": "queries is 0, but should be above 0",
    "recipes: {lenet on mnist5k: {set_aside: -1}}": "set_aside of 'lenet on mnist5k' is -1, but should",
    "recipes: {lenet on mnist5k: {dataset: nowhere}}": "is 'nowhere', but should be one of mnist5k, mnist",
    "01_a: {changes: {lenet on mnist5k: {images: [5]}}}": "is [5], but should be two whole numbers",
    "01_a: {seeds: [0, one]}": "seeds, item 2 is 'one', but should be a number",
    "01_a: {arms: [{lrr: 1}]}": "arms, item 1: no name 'lrr': there are eps, lr",
    "01_a: {arms: [{lr: [1]}]}": "arms, item 1: lr is [1], but should be a number",
    "01_a: {recipe: lenet}": "section 01_a: no recipe 'lenet': there are lenet on mnist5k",
    "01_a: {changes: {lenet: {lr: 1}}}": "section 01_a: changes: no recipe 'lenet'",
    "01_a: {changes: [1]}": "changes holds a list, not recipes",
    "recipes: {lenet on mnist5k: {rate: 1}}": "recipes: lenet on mnist5k: no name 'rate': there are dataset",
    "recipes: {lenet on mnist5k: {lr: fast}}": "recipes: lenet on mnist5k: lr is 'fast', but should be a number",
    "recipes: {lenet on mnist5k: {optimizer: adamm}}": "recipes: lenet on mnist5k: unknown optimizer 'adamm'",
    "recipes: {lenet on mnist5k: {epochs: 0}}": "recipes: lenet on mnist5k: epochs",
    "01_a: {changes: {lenet on mnist5k: {lr: -1}}}": "section 01_a: changes: lenet on mnist5k: lr",
    "recipes: {lenet on mnist5k: {stops: {cosine: [1]}}}": "stops: cosine is [1], but should be a number",
    "01_a: 3": "section 01_a holds a int",
    "01_a:": "section 01_a holds a NoneType",
    "- 01_a": "a list, not sections named by notebooks",
    "01_a: {steps: 1, steps: 2}": "the key 'steps' stands twice",
    "01_a: {": "big.yaml: while parsing",
    "# ü": "big.yaml: 'utf-8' codec can't decode byte 0xfc in position 2: invalid start byte: save it in UTF-8",
}


@pytest.mark.parametrize("text", BAD_PROFILES)
def test_a_bad_profile_is_refused(toy, text):
    add(toy, "01_a", parameters=PARAMETERS)
    (toy.profiles / "big.yaml").write_text(text, encoding="latin-1")
    with pytest.raises(profiles.ProfileError, match=re.escape(BAD_PROFILES[text])):
        profiles.read_profile(toy, "big")


@pytest.mark.parametrize("values", [
    {"recipe": "nope"}, {"recipes": ["lenet on mnist5k", "nope"]}, {"todo": [{"lr": 1}, {"recipe": "nope"}]},
    {"a": {"b": [{"recipes": {"nope": 1}}]}},
])  # fmt: skip
def test_a_recipe_that_does_not_exist_is_refused_at_any_depth(values):
    with pytest.raises(profiles.ProfileError, match="here: no recipe 'nope': there are lenet on mnist5k"):
        profiles.check_names("here", values)
    known = json.loads(json.dumps(values).replace("nope", "lenet on mnist"))
    assert "lenet on mnist" in profiles.check_names("here", known)


def test_what_a_profile_may_write_otherwise_than_the_notebook(toy):
    """Whole numbers for fractions, fractions that are whole, sections by `<<`, null for all images, as many twice."""
    add(toy, "01_a", parameters=PARAMETERS)
    add(toy, "02_b", parameters=PARAMETERS.replace("seeds = [0, 1]", "seeds = [None, 0.5, 1]"))
    (toy.profiles / "big.yaml").write_text(
        "01_a: &a {steps: 10.0, rate: 1, seeds: [2.0, 5]}\n02_b: {<<: *a, steps: 4, seeds: [null, 2]}\n"
    )
    first, second = profiles.read_profile(toy, "big").values()
    assert str(first) == "{'steps': 10, 'rate': 1, 'seeds': [2, 5], 'changes': {}}"
    assert {k: second[k] for k in ("rate", "steps", "seeds")} == {"rate": 1, "steps": 4, "seeds": [None, 2]}
    for images in ([None, None], [500, 500]):
        known = {"images": [11000, 5000], "lr_drops": [0.5, 0.75]}
        value = {"images": images, "lr_drops": [0.5, 0.5]}
        assert profiles.fit("here", value, known) == value
    with pytest.raises(profiles.ProfileError, match="twice"):  # a word of where it stands is no name of a setting
        profiles.fit("the images of mine: seeds", [0, 0], [0, 1], "seeds")


@given(st.integers(1, 9999), st.integers(1, 9999), st.integers(-9, 9))
def test_a_number_is_read_however_yaml_takes_it(a, b, e):
    """As YAML text: 1e-4, 8/255 and 1.0e-4 are one number wherever one stands, at any depth."""
    for text, number in ((f"{a}e{e}", float(f"{a}e{e}")), (f"{a}/{b}", a / b), (f"{a}.0e{e:+d}", float(f"{a}e{e}"))):
        like, value = {"x": [0.5], "y": "8/255", "z": 3}, yaml.safe_load(f"{{x: [{text}], y: '{text}', z: {a}e0}}")
        assert profiles.fit("here", value, like) == {"x": [number], "y": text, "z": a}


def test_recipes_of_a_profile_reach_the_notebooks_that_name_them(toy):
    add(toy, "01_a", parameters=PARAMETERS)
    add(toy, "02_b", parameters='profile = "quick"\nnets = [{"recipe": "vgg16 on cifar10"}]\nchanges = {}')
    add(toy, "03_c", parameters='profile = "quick"')
    text = "recipes: {lenet on mnist5k: {lr: 1e-4, width: 16}, vgg16 on cifar10: {width: 8}}\n"
    (toy.profiles / "big.yaml").write_text(
        text + "01_a: {changes: {lenet on mnist5k: {width: 8}}}\n02_b: {}\n03_c: {}\n"
    )
    assert profiles.read_profile(toy, "big") == {
        "01_a": {"changes": {"lenet on mnist5k": {"lr": 1e-4, "width": 8}}},  # the section's own word goes first
        "02_b": {"changes": {"vgg16 on cifar10": {"width": 8}}},
        "03_c": {},
    }


@pytest.mark.parametrize("setting", ["plan", "stops"])
def test_a_section_leaves_what_it_does_not_name_of_a_recipe_to_the_profile(toy, setting):
    """Of settings that hold names of their own, too."""
    add(toy, "01_a", parameters=PARAMETERS)
    old = recipes.RECIPES["lenet on mnist5k"][setting]
    everywhere, own = ({setting: {key: old[key] * 3}} for key in list(old)[:2])
    sections = {"recipes": {"lenet on mnist5k": everywhere}, "01_a": {"changes": {"lenet on mnist5k": own}}}
    (toy.profiles / "big.yaml").write_text(yaml.safe_dump(sections))
    changes = profiles.read_profile(toy, "big")["01_a"]["changes"]
    assert recipes.get("lenet on mnist5k", changes)[setting] == old | everywhere[setting] | own[setting]


@pytest.mark.parametrize("name", profiles.profile_names(Layout()))
def test_the_profiles_of_this_project_fit_its_notebooks(name):
    assert set(profiles.read_profile(Layout(), name)) <= set(Layout().names())


def test_an_unknown_profile_is_refused(toy):
    (toy.profiles / "gpu.yaml").touch()
    with pytest.raises(profiles.ProfileError, match="no profile 'gpuu': choose one of quick, gpu"):
        profiles.read_profile(toy, "gpuu")
    for name in ("gpu", "mine", "site", "stability"):  # folders of build/ that something else writes
        own = toy.root / f"{name}.yaml"
        own.touch()
        with pytest.raises(profiles.ProfileError, match=f"the name {name} is taken: rename the file"):
            profiles.read_profile(toy, str(own))


def test_a_profile_is_one_whatever_it_is_called_by(toy, tmp_path, monkeypatch):
    add(toy, "01_a")
    link, timeouts = tmp_path / "a link.yaml", []
    monkeypatch.setattr(runner, "make_jobs", lambda layout, sections, timeout, scratch: timeouts.append(timeout))
    monkeypatch.setattr(runner.dry_run, "table", lambda jobs: "")
    for name in ("gpu", "tiny"):
        own = toy.profiles / f"{name}.yaml"
        own.write_text("01_a: {steps: 4}")
        link.unlink(missing_ok=True)
        link.symlink_to(own)
        for folder, asked in ((toy.root, f"notebooks/profiles/{name}.yaml"), (toy.profiles, f"./{name}.yaml"),
                              (tmp_path, "a link.yaml"), (tmp_path, str(own)), (tmp_path, name)):  # fmt: skip
            monkeypatch.chdir(folder)
            assert profiles.find(toy, asked) == (name, own)
            assert runner.selected(toy, asked, []) == {"01_a": (name, name == "tiny", {"steps": 4})}
            assert runner.main(["--root", str(toy.root), "--dry-run", "--profile", asked]) == 0
    assert timeouts == [runner.LONG_TIMEOUT] * 5 + [runner.TIMEOUTS["tiny"]] * 5


BAD_CELLS = {
    "# rm -rf figures": "01_a.py, cell 3: `# rm -rf figures` looks like a command",
    "if x:\n    # !ls\n    pass": "cell 3: `    # !ls` looks like a command",
    "# %cd /tmp # escape": "cell 3: `# %cd /tmp # escape` looks like a command",
    "%matplotlib inline": "01_a.py, cell 3, line 1: invalid syntax: `%matplotlib inline`",
    "x = (1": "01_a.py, cell 3, line 1: '(' was never closed",
}


@pytest.mark.parametrize("cell", BAD_CELLS)
def test_a_source_that_is_not_plain_python_is_refused(toy, capsys, cell):
    add(toy, "01_a", cell)
    assert refuses(toy, capsys, [], BAD_CELLS[cell])
    assert not toy.build.exists()


PLAY = {
    "steps = 3": ("steps = 4", None),
    "rate = 0.1": ("rate = '0.1'", "01_a.py, parameters cell: rate is '0.1': write numbers without quotes"),
    "seeds = [0, 1]": ("seeds = []", "parameters cell: seeds is empty"),
    "augment = False": ("augment = 'no'", "augment is 'no', but should be a bool"),
    'recipe = "lenet on mnist5k"': ('recipe = "lenet"', "parameters cell: no recipe 'lenet'"),
    "changes = {}": ("changes = {'lenet on mnist5k': {'lrr': 1}}", "lenet on mnist5k: no name 'lrr'"),
    "profile": (
        "extra = 1\nprofile",
        "'extra' is new; if that is meant: ./run_all.sh --python tools/profiles.py --define",
    ),
    "steps": ("stepps", "'stepps' is new"),
    "arms = [": ("arms = [1, ", "arms, item"),
}


@pytest.mark.parametrize("old", PLAY)
def test_play_is_told_from_the_profile_and_checked(toy, old):
    add(toy, "01_a", parameters=PARAMETERS)
    define(toy)
    assert profiles.played(toy, ["01_a"]) == {}
    new, trouble = PLAY[old]
    add(toy, "01_a", parameters=PARAMETERS.replace(old, new, 1))
    if trouble is None:
        assert profiles.played(toy, ["01_a"]) == {"01_a": "steps"}
        return
    with pytest.raises(profiles.ProfileError, match=re.escape(trouble)):
        profiles.played(toy, ["01_a"])


@pytest.mark.parametrize("git", ["none", "committed", "of another project"])
def test_a_changed_recipe_is_play_whatever_git_says(toy, monkeypatch, git):
    add(toy, "01_a", parameters=PARAMETERS)
    define(toy)
    if git == "none":
        monkeypatch.setenv("PATH", "")
    else:
        (toy.root / "lib").mkdir()
        shutil.copy(TOOLS.parent / "lib/recipes.py", toy.root / "lib")
        commit(toy if git == "committed" else SimpleNamespace(root=toy.root.parent))
    assert profiles.played(toy, ["01_a"]) == {}
    monkeypatch.setitem(recipes.RECIPES, "lenet on mnist5k", recipes.get("lenet on mnist5k") | {"width": 8})
    assert profiles.played(toy, ["01_a"]) == {"01_a": "other recipes"}


def test_what_is_hidden_beside_the_notebooks_is_passed_over(toy, capsys):
    """A lock of Emacs is a link to nowhere, a file of macOS no text."""
    add(toy, "01_a")
    (toy.notebooks / ".#01_a.py").symlink_to("me@host.1234:1")
    for name in ("notebooks/._01_a.py", "notebooks/._01_a.ipynb", "notebooks/profiles/._big.yaml"):
        (toy.root / name).write_bytes(b"\0\5\26\7\xb0\xff")
    assert toy.names() == ["01_a"] and profiles.profile_names(toy) == ["quick"]
    assert verdict(toy, capsys)[1].splitlines()[0] == "01_a: .ipynb is missing"


@pytest.mark.parametrize("line", ["x = len('abc')", "a, b = 1, 2", "import os", "steps += 1"])
def test_parameters_are_plain_literals(toy, line):
    add(toy, "01_a", parameters=f'profile = "quick"\n{line}')
    with pytest.raises(profiles.ProfileError, match=r"01_a\.py.*write NAME = plain literal"):
        profiles.read_profile(toy, "quick")


def test_notebooks_are_chosen_by_their_beginnings():
    names = ["03_a", "03_b", "10_c"]
    assert profiles.choose(["3", "1"], ["01_x", "03_a", "10_c"]) == ["01_x", "03_a"]
    assert profiles.choose(["10", "notebooks/03_a.py", "03_b.ipynb"], names) == names
    with pytest.raises(profiles.ProfileError, match="'03' fits more than one notebook: choose from 03_a, 03_b"):
        profiles.choose(["03"], names)
    with pytest.raises(profiles.ProfileError, match="'04' fits no notebook: choose from 03_a, 03_b, 10_c"):
        profiles.choose(["04"], names)


def refuses(layout, capsys, arguments, message):
    try:
        status = runner.main(["--root", str(layout.root), *arguments])
    except SystemExit as stop:  # argparse's own way
        status = stop.code
    return status == 2 and message in capsys.readouterr().err


def test_the_runner_refuses_before_it_runs(toy, capsys):
    add(toy, "01_a")
    add(toy, "02_b", parameters="steps = 1")
    (toy.profiles / "gpu.yaml").touch()
    for arguments, message in [
        ((), "does not set `profile`"),
        (("--profile", "no"), "no profile 'no'"),
        (("-j", "0"), "--jobs 0: it must be at least 1"),
        (("--timeout", "-5"), "--timeout -5: it must be at least 1"),
    ]:
        assert refuses(toy, capsys, arguments, message), arguments
    add(toy, "02_b")
    for arguments, message in [
        (("3",), "'3' fits no notebook"),
        (("--profile", "gpu"), "profile gpu holds no notebook"),
        (("--profile", "gpu", "01"), "profile gpu has no section for 01_a"),
    ]:
        assert refuses(toy, capsys, arguments, message), arguments
    assert not toy.build.exists()


def test_a_stray_file_stops_nothing_but_itself(toy, capsys):
    add(toy, "01_a")
    (toy.notebooks / "scratch.py").write_text("print(1)\n")
    (toy.profiles / "gpu.yaml").write_text("01_a: {steps: 4}\n")
    assert runner.selected(toy, "quick", ["1"]) == {"01_a": ("quick", False, {})}
    assert runner.selected(toy, "gpu", []) == {"01_a": ("gpu", False, {"steps": 4})}
    assert refuses(toy, capsys, [], "scratch.py: 0 cells are tagged `parameters`")


def test_what_cannot_be_read_is_said_in_a_sentence(toy, capsys, monkeypatch):
    add(toy, "01_a")
    define(toy)
    assert refuses(toy, capsys, ["--profile", "~no-such-user/x.yaml"], "no profile '~no-such-user/x.yaml'")
    monkeypatch.setenv("FIGURES_DIR", "~no-such-user/f")
    for more in ([], ["--dry-run"]):
        assert refuses(toy, capsys, more, "FIGURES_DIR=~no-such-user/f: there is no such home folder")
    monkeypatch.delenv("FIGURES_DIR")
    quick = toy.profiles / "quick.json"
    quick.write_text(f"<<<<<<< HEAD\n{quick.read_text()}")
    assert refuses(toy, capsys, [], "`git checkout notebooks/profiles/quick.json` brings it back")
    assert not list(toy.notebooks.glob("*.ipynb"))


# ---------------------------------------------------------------- the runner


def test_the_longest_notebook_comes_first(toy, tmp_path):
    for name in ("01_a", "02_b", "03_c", "04_d"):
        add(toy, name)
    records = toy.figures / "quick"
    records.mkdir(parents=True)
    for name, seconds, used in (("01_a", 5, []), ("02_b", 1, [29, 30]), ("03_c", 20, [])):
        runs = [{"run": f"lenet-{k}", "seconds": k} for k in used]
        write_json(records / f"{name}.uses.json", {"notebook": name, "seconds": seconds, "runs": runs})
    (records / "05_half.uses.json").write_text("{")

    def order():
        sections = {name: ("quick", False, {}) for name in toy.names()}
        return [job.name for job in jobs.make_jobs(toy, sections, 60, tmp_path)]

    assert order() == ["04_d", "02_b", "03_c", "01_a"]  # what nobody knows goes first
    (toy.build / "quick").mkdir(parents=True)
    (toy.build / "quick" / "times.json").write_text(json.dumps({"01_a": 70, "04_d": 1}))
    assert order() == ["01_a", "02_b", "03_c", "04_d"]


def test_a_failing_notebook_does_not_stop_the_others(toy):
    add(toy, "01_bad", "print('before')", "1 / 0", "print('after')")
    add(toy, "02_good", "print(profile, steps)", SHOW)
    add(toy, "03_exit", "import sys\nsys.exit(0)", "print('after')")
    env = os.environ | {"FIGURES_DIR": str(toy.root / "elsewhere")}
    first = run(toy, env=env)
    assert first.returncode == 1
    assert re.search(r"^01_bad +\d+ s +FAILED$", first.stdout, re.M)
    assert re.search(r"^02_good +\d+ s +- +-$", first.stdout, re.M)
    assert re.search(r"^03_exit +\d+ s +FAILED$", first.stdout, re.M)
    assert "FAILED 01_bad, at cell 5 of 6" in first.stdout and "ZeroDivisionError" in first.stdout
    assert "ended the notebook before its last cell" in first.stdout  # sys.exit(0) is no success
    assert str(toy.build / "quick" / "01_bad.log") in first.stdout
    assert sorted(path.name for path in toy.notebooks.glob("*.ipynb")) == ["02_good.ipynb"]
    built = {path.name for path in (toy.build / "quick").iterdir()}
    assert {"01_bad.failed.ipynb", "01_bad.log", "times.json"} <= built
    assert not any("part" in name for name in built)
    assert check_pairs.pair_problems(toy.notebooks / "02_good.py", toy.notebooks / "02_good.ipynb") == []


@pytest.mark.parametrize("line", [
    "Executing Cell ", "Executing Cell two", "Executing Cell 2", "Executing Cell 2---", f"Executing Cell {'2²':-<40}",
    f"Executing Cell {2:-<40} and more", f"Executing Cell {'9' * 5000}", f"Executing Cell {'':-<40}",
])  # fmt: skip
def test_whatever_a_notebook_prints_is_no_word_of_papermills(toy, tmp_path, line):
    add(toy, "01_a")
    (job,) = jobs.make_jobs(toy, {"01_a": ("quick", False, {})}, 60, tmp_path)
    job.log = tmp_path / "log"
    job.log.write_bytes(f"Executing Cell {12:-<40}\n{line}\n".encode())
    with job.log.open(encoding="utf-8", errors="replace", newline="") as job.reader:
        job.follow()
    assert (job.cell, job.said) == (12, line.strip())


@pytest.mark.parametrize("options", [(), ("--workers", "1")])
def test_a_folder_for_temporary_files_may_be_far_down(toy, tmp_path, options):
    """The name of a socket there would be too long."""
    if options:
        pytest.importorskip("distributed")
    (far := tmp_path / ("x" * 90)).mkdir()
    add(toy, "01_a", "import tempfile\nprint(tempfile.gettempdir())")
    done = run(toy, *options, env=os.environ | {"TMPDIR": str(far)})
    assert done.returncode == 0, done.stdout + done.stderr
    assert far.name in (toy.notebooks / "01_a.ipynb").read_text()


def test_a_profile_goes_to_its_own_folders_with_stdin_closed(toy):
    look = "import os, sys\nprint(profile, steps, rate)\nprint(os.environ['FIGURES_DIR'], os.environ['RUNS_DIR'])"
    look += "\nprint(os.getcwd())\nprint(sys.executable, os.environ['OMP_NUM_THREADS'], os.environ['PYTHONHASHSEED'])"
    add(toy, "01_a", look)
    (toy.profiles / "tiny.yaml").write_text("01_a:\n  steps: 1\n")
    env = {k: v for k, v in os.environ.items() if k not in ("FIGURES_DIR", "OMP_NUM_THREADS")} | {"RUNS_DIR": "mine"}
    shell = ["sh", "-c", '"$0" "$@" <&-', sys.executable, str(TOOLS / "run.py"), "--root", str(toy.root)]
    done = subprocess.run([*shell, "--profile", "tiny"], env=env, cwd=toy.root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    notebook = json.loads((toy.build / "tiny" / "01_a.ipynb").read_text())
    printed = nbclean.text(notebook["cells"][-1]["outputs"][0]["text"]).splitlines()
    tiny = toy.build / "tiny"
    python = sys.executable.replace(str(nbclean.HERE), "<repo>")  # as in a clean notebook
    assert printed == ["tiny 1 0.1", f"{tiny}/figures {toy.root}/mine", str(toy.notebooks), f"{python} 1 0"]
    assert not list(toy.notebooks.glob("*.ipynb")) and not toy.figures.exists()


def test_a_cell_that_takes_too_long_fails(toy):
    add(toy, "01_a", "import time\ntime.sleep(60)")
    done = run(toy, "--timeout", "2")
    assert done.returncode == 1
    (words,) = done.stdout.partition("01_a.log:\n")[2].strip().splitlines()  # one sentence
    assert words == (
        "Stopped: the cell (it begins with `import time`) took more than 2 s. Networks trained by then are kept: "
        "run it again, or give it longer by --timeout."
    )


LEAKS = {
    "PYTHONSTARTUP": "shadow.py", "PYTHONPATH": ".", "PYTHONOPTIMIZE": "1", "PYTHONWARNINGS": "error", "LC_ALL": "C",
    "LANG": "de_DE.ISO-8859-1", "MPLBACKEND": "pdf", "MATPLOTLIBRC": "matplotlibrc", "OPENBLAS_NUM_THREADS": "7",
    "MKL_NUM_THREADS": "7", "JUPYTER_CONFIG_DIR": "conf", "IPYTHONDIR": "conf", "OMP_NUM_THREADS": "",
}  # fmt: skip


def test_the_readers_machine_does_not_leak_in(toy):
    """The same notebook, byte by byte, with and without what a reader may have set up for other programs."""
    look = "import locale, os, sys\nimport lib, matplotlib.pyplot as plt"
    look += "\nprint(plt.rcParams['lines.linewidth'], plt.get_backend(), lib.__file__, locale.getpreferredencoding())"
    names = sorted(set(LEAKS) - {"JUPYTER_CONFIG_DIR", "IPYTHONDIR"})  # both ours, under a name made up each time
    look += f"\nprint([os.environ.get(name) for name in {names}], sys.flags.optimize, 'started' in globals())"
    add(toy, "01_a", look, "print(in_profile if 'in_profile' in globals() else 'plain')", SHOW)
    home = toy.root / "home"
    (home / "lib").mkdir(parents=True)
    (home / "lib" / "__init__.py").write_text("raise RuntimeError('this is not our lib')")
    (home / "shadow.py").write_text("started = True")
    (home / "matplotlibrc").write_text("lines.linewidth: 9\n")
    for folder in ("conf/profile_default", ".ipython/profile_default", ".config/matplotlib", ".jupyter"):
        (home / folder).mkdir(parents=True)
    for folder in ("conf", ".ipython"):
        (home / folder / "profile_default/ipython_kernel_config.py").write_text(
            "c.InteractiveShellApp.exec_lines = ['in_profile = 1']"
        )
    shutil.copy(home / "matplotlibrc", home / ".config/matplotlib")
    made = []
    for more in ({}, LEAKS | {"HOME": str(home)}):
        env = {k: v for k, v in os.environ.items() if k not in LEAKS} | {"PYTHONPATH": str(TOOLS.parent)} | more
        if more:  # as run_all.sh starts it: the runner itself is not to be led astray either
            env["PYTHONPATH"] = str(TOOLS.parent)
        done = run(toy, env=env, cwd=home)
        assert done.returncode == 0, done.stdout + done.stderr
        made.append((toy.notebooks / "01_a.ipynb").read_bytes())
    assert made[0] == made[1] and b"plain" in made[0] and b"<repo>/lib/__init__.py" in made[0]


def test_a_journal_of_the_readers_is_left_alone(toy, tmp_path, monkeypatch):
    for name in ("JOURNAL", "RUN_ALL_JOURNAL"):
        monkeypatch.setenv(name, str(tmp_path / "diary"))
    add(toy, "01_a")
    (job,) = jobs.make_jobs(toy, {"01_a": ("quick", False, {})}, 60, tmp_path)
    assert job.env["RUN_ALL_JOURNAL"] == str(toy.build / "quick/01_a.runs.json")
    assert "RUN_ALL_JOURNAL" not in jobs.clean_environment()
    (tmp_path / "diary").write_text("Dear diary")
    for name, value in (("FIGURES_DIR", tmp_path / "figures"), ("RUN_ALL_JOURNAL", tmp_path / "ours")):
        monkeypatch.setenv(name, str(value))
    monkeypatch.chdir(toy.notebooks)
    book = figures.Book("01_a", {"profile": "mine", "steps": 3, "rate": 0.1})
    book.check("sums", holds=True, measured="0")
    book.close()
    assert (tmp_path / "diary").read_text() == "Dear diary" and (tmp_path / "ours").exists()


def test_play_goes_to_a_folder_of_its_own(toy):
    cell = "import os\nprint(profile, steps, os.environ['PROFILE'], os.environ['FIGURES_DIR'])"
    add(toy, "01_a", cell, SHOW)
    add(toy, "02_b", cell, SHOW)
    define(toy)
    add(toy, "01_a", cell, SHOW, parameters='profile = "quick"\nsteps = 4\nrate = 0.1')
    done = run(toy)
    assert "01_a differs from the quick profile (steps): all of it goes to build/mine/" in done.stdout
    assert not (toy.notebooks / "01_a.ipynb").exists() and (toy.notebooks / "02_b.ipynb").exists()
    assert f"quick 4 mine {toy.build}/mine/figures" in (toy.build / "mine/01_a.ipynb").read_text()
    assert f"quick 3 quick {toy.figures}/quick" in (toy.notebooks / "02_b.ipynb").read_text()
    own = toy.root / "some where" / "small.yaml"
    own.parent.mkdir()
    own.write_text("01_a: {steps: 5}")
    assert run(toy, "--profile", str(own)).returncode == 0
    assert f"small 5 small {toy.build}/small/figures" in (toy.build / "small/01_a.ipynb").read_text()
    assert not list(toy.figures.glob("*/*"))


def test_a_profile_of_ours_is_not_what_differs_from_the_quick_one_it_builds_on(toy, capsys):
    for name in ("01_a", "02_b"):
        add(toy, name, SHOW)
    define(toy)
    add(toy, "01_a", SHOW, parameters='profile = "quick"\nsteps = 4\nrate = 0.1')
    for name in ("gpu", "tiny"):
        (toy.profiles / f"{name}.yaml").write_text("01_a: {rate: 0.2}\n02_b: {rate: 0.2}")
    shutil.copy(toy.profiles / "gpu.yaml", own := toy.root / "my.yaml")
    said = "01_a differs from the quick profile (steps), so that this is not gpu: take it back, or copy gpu.yaml"
    assert refuses(toy, capsys, ["--profile", "gpu"], said)
    for asked, name in (("gpu", "02_b"), ("tiny", "01_a"), (str(own), "01_a")):
        assert list(runner.selected(toy, asked, [name])) == [name]


def test_a_dry_run_says_what_would_be_trained(toy):
    add(toy, "01_a", SHOW)
    add(toy, "02_b", SHOW + "\nif False:\n    cells.read()")
    runs, figures = toy.root / "runs", toy.figures / "quick"
    made = {"made": {"device": "a machine", "date": "2026-01-02", "seconds": 3}}
    for name, record in (("lenet-1/run.json", {}), ("lenet-1/made.json", made["made"]), ("attacks/2.json", made)):
        (runs / name).parent.mkdir(parents=True, exist_ok=True)
        (runs / name).write_text(json.dumps(record))
    figures.mkdir(parents=True)
    used = [{"run": name, "what": "lenet", "seconds": 100.0} for name in ("lenet-1", "attacks/2", "lenet-3", "lenet-4")]
    (figures / "01_a.uses.json").write_text(json.dumps({"notebook": "01_a", "profile": "quick", "runs": used}))
    cell = toy.figures / "overnight/cells/lenet-eps0.1/cosine.json"
    cell.parent.mkdir(parents=True)
    cell.write_text(json.dumps({"made": {"training": made["made"]}}))
    for n, other in enumerate(({}, {"rows": 1}, {"made": None}, {"made": {"device": "a machine"}}, [1])):  # no cells
        cell.with_stem(f"other-{n}").write_text(json.dumps(other))
    done = run(toy, "--dry-run", env=os.environ | {"RUNS_DIR": str(runs)})
    assert done.stdout.splitlines() == [
        "01_a  trains for about 3 min 20 s",
        "         2 found, made on a machine, 2026-01-02",
        f"         2 to be made: no such run in {runs}",
        "02_b  has not run here: it makes what is missing, in a time that is not known",
        "         1 committed cells of the profile overnight, made on a machine, 2026-01-02",
    ]
    assert not toy.build.exists()


def test_a_dry_run_counts_what_a_readers_own_settings_keep(toy):
    keeps = 'profile = "quick"\nkeep_cells = {0}\nkeep_masks = {0}'
    add(toy, "01_a", SHOW + "\nif False:\n    cells.read()", parameters=keeps.format(False))
    define(toy)
    made = {"device": "a machine", "date": "2026-01-02"}
    for place in ("figures/overnight/cells/a/b.json", "build/mine/figures/cells/a/b.json"):
        write_json(toy.root / place, {"made": {"training": made}})
    write_json(toy.build / "mine/figures/other-data/c.json", {"made": made})
    before = "         1 committed cells of the profile overnight, made on a machine, 2026-01-02"
    assert run(toy, "--dry-run").stdout.splitlines()[1:] == [before]
    add(toy, "01_a", SHOW + "\nif False:\n    cells.read()", parameters=keeps.format(True))
    mine = [before.replace("overnight", "mine"), before]
    mine.append("         1 committed masks of networks, made on a machine, 2026-01-02")
    assert run(toy, "--dry-run").stdout.splitlines()[2:] == mine


def test_a_dry_run_takes_what_is_damaged_for_what_is_to_be_made(toy, tmp_path):
    add(toy, "01_a", SHOW + "\nif False:\n    cells.read()")
    (toy.profiles / "long.yaml").write_text("01_a: {}")
    used = [{"run": name, "what": "lenet", "seconds": 100.0} for name in ("lenet-1", "lenet-2", "attacks/3")]
    cell = "figures/other/cells/lenet-eps0.1/a.json"
    for name, text in (
        ("runs/lenet-1/run.json", "{}"), ("runs/lenet-2/run.json", "{}"), ("runs/lenet-2/made.json", '{"dev'),
        ("runs/attacks/3.json", "[]"), (cell, '{"made": {'), (cell.replace("/a", "/._b"), "\0"),
        ("figures/long/01_a.uses.json", json.dumps({"runs": used})), ("build/long/times.json", "[1]"),
    ):  # fmt: skip
        (toy.root / name).parent.mkdir(parents=True, exist_ok=True)
        (toy.root / name).write_text(text)
    done = run(toy, "--profile", "long", "--dry-run", env=os.environ | {"RUNS_DIR": str(toy.root / "runs")})
    said = ["01_a  trains for about 5 min 00 s", f"         3 to be made: no such run in {toy.root}/runs"]
    assert done.stdout.splitlines() == said, done.stderr
    assert dry_run.speeds(toy.figures, "lenet", recipes.get("lenet on mnist")) == {}


def test_a_dry_run_says_what_has_changed_since_the_last_run(toy):
    add(toy, "01_a", SHOW, parameters='profile = "quick"\nsteps = 3\nchanges = {}')
    path, settings = toy.figures / "quick" / "01_a.uses.json", recipes.get("lenet on mnist")
    asked = {"parameters": checksum({"profile": "quick", "steps": 3, "changes": {}}), "version": runs.VERSION}
    asked["lenet on mnist"], used = checksum(settings), [{"run": "lenet-1", "what": "lenet", "seconds": 100.0}]
    path.parent.mkdir(parents=True)
    other = {"parameters": "its parameters", "version": "the version of training", "lenet on mnist": "the recipe lenet "
             "on mnist", "gone": "the recipe gone"}  # fmt: skip
    for key, said in {"": "", **other}.items():
        change, known = {key: "0"} if key else {}, "01_a  trains for about 100 s"
        write_json(path, {"notebook": "01_a", "profile": "quick", "asked": asked | change, "runs": used})
        unknown = f"01_a  trains for a time that is not known: {said} changed since its last run, which used"
        assert run(toy, "--dry-run").stdout.splitlines()[0] == (unknown if said else known)


def test_a_dry_run_says_which_cells_are_missing(toy):
    changes = {"resnet18 on cifar10": {"images": [22000, 5000], "width": 4, "epochs": 64, "num_steps": 12}}
    arms = ["constant", "cosine", "linear"]
    todo = [{"recipe": "vgg16 on cifar10", "eps": "8/255", "lr": 0.1, "arms": arms, "seeds": 2},
            {"recipe": "resnet18 on cifar10", "eps": "8/255", "lr": 0.1, "arms": ["periodic cosine"], "seeds": 3},
            {"recipe": "lenet on mnist", "eps": "0.4", "lr": 1e-3, "arms": ["cosine"], "seeds": 1},
            {"recipe": "vgg16 on cifar10", "eps": "8/255", "lr": 0.3, "arms": arms[:1], "seeds": 1,
             "more": 20000}]  # fmt: skip
    own = f"{changes=}\n{todo=}\nseeds = [4, 5, 6]\nkeep_cells = True"
    add(toy, "07_a", SHOW, parameters=f'profile = "quick"\n{own}')
    (toy.profiles / "long.yaml").write_text("07_a: {}")

    def made(profile, recipe, arm, seed, training, attacks, images="11,000", more=None, **settings):
        data = SimpleNamespace(source=f"CIFAR-10 (50,000 + 10,000), the first {images} + 5,000", fingerprint="a")
        chosen = recipes.get(recipe, {recipe: settings})
        config = cells.configure(chosen, arm, eps=8 / 255, lr=0.1, seed=seed)
        cell = cells._asked(recipe, arm, config, data, chosen)
        place = {"device": profile, "precision": "float32", "date": "2026-01-02"}
        cell["made"] = {"training": place | {"seconds": training}, "attacks": place | {"seconds": attacks}}
        cell["masks"] = [{"part": "test", "n": 5000}]
        if more:
            cell["masks"] += [{"part": "more", "n": more}]
            cell["made"]["more"] = place | {"seconds": 50}
        cells.write(toy.figures / profile / "cells", cell)

    for arm in arms:
        made("long", "vgg16 on cifar10", arm, 4, 1000, 100)
    made("long", "vgg16 on cifar10", "constant", 5, 500, 100, epochs=16)  # each takes 1100 seconds, as they are wanted
    made("long", "vgg16 on cifar10", "cosine", 5, 500, 100, images="5,500")
    made("long", "vgg16 on cifar10", "linear", 5, 1000, 100, more=10000)  # with 20,000 more it takes 100 seconds more
    for seed, seconds in enumerate((30, 30, 900)):  # each takes 1440 + 4 * 15 seconds, but the last
        made("other", "resnet18 on cifar10", "cosine", seed, seconds, 15)
    assert run(toy, "--profile", "long", "--dry-run").stdout.splitlines() == [
        "07_a  has not run here: it makes what is missing",
        "         7 of 11 cells are missing, by their settings (pixels are not compared here)",
        "         1 missing, 1 there: vgg16 on cifar10, eps 8/255, lr 0.1, constant: 18 min [1]",
        "         1 missing, 1 there: vgg16 on cifar10, eps 8/255, lr 0.1, cosine: 18 min [1]",
        "         3 missing, 0 there: resnet18 on cifar10, eps 8/255, lr 0.1, periodic cosine: 75 min [2]",
        "         1 missing, 0 there: lenet on mnist, eps 0.4, lr 0.001, cosine: in a time that is not known",
        "         1 missing, 0 there: vgg16 on cifar10, eps 8/255, lr 0.3, constant: 20 min [1]",
        "         3 of these 7: 57 min one by one on [1] long, float32",
        "         3 of these 7: 75 min one by one on [2] other, float32",
        "           by cells made there, as docs/scaling.md counts; what wider networks take on a GPU stands there",
    ]


@pytest.fixture
def long_run(toy):
    """A running runner with two kernels, both inside their long cell."""
    for name in ("01_a", "02_b"):
        add(toy, name, f"import os, time\nopen('{name}.pid', 'w').write(str(os.getpid()))\ntime.sleep(100)")
    old = b"as it was"
    (toy.notebooks / "01_a.ipynb").write_bytes(old)
    command = [sys.executable, str(TOOLS / "run.py"), "--root", str(toy.root)]
    with (toy.root / "errors").open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, stdin=subprocess.DEVNULL, text=True)
    marks = [toy.notebooks / f"{name}.pid" for name in ("01_a", "02_b")]
    deadline = time.monotonic() + 60
    family = []
    try:
        while not all(mark.exists() and mark.read_text() for mark in marks):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        family += psutil.Process(process.pid).children(recursive=True)
        assert {int(mark.read_text()) for mark in marks} <= {member.pid for member in family}
        yield toy, process, family
    finally:
        process.kill()
        process.communicate()
        for member in filter(psutil.Process.is_running, family):
            member.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_no_kernel_and_no_half_file(long_run, number):
    layout, process, family = long_run
    process.send_signal(number)
    words, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    assert re.search(r"interrupted: 01_a cell 4/4, \d+ s; 02_b cell 4/4, \d+ s", words)
    assert "is kept: the same command goes on from there" in words
    assert not psutil.wait_procs(family, timeout=5)[1]  # the server of processes ends when it sees that we have
    assert not list(layout.build.rglob("*.ipynb"))
    assert (layout.notebooks / "01_a.ipynb").read_bytes() == b"as it was"
    assert not (layout.notebooks / "02_b.ipynb").exists()


def test_an_interrupt_while_the_runner_is_imported_shows_no_traceback(toy, tmp_path):
    (tmp_path / "jupytext.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)")
    done = run(toy, env=os.environ | {"PYTHONPATH": f"{tmp_path}:{TOOLS.parent}"})
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_when_nobody_reads_any_more(long_run, number):
    """As of `| tee`, which Ctrl-C ends, too."""
    layout, process, family = long_run
    process.stdout.close()
    process.stdout = None
    process.send_signal(number)
    assert process.wait(20) == 130
    assert not psutil.wait_procs(family, timeout=5)[1] and (layout.root / "errors").read_text() == ""


@pytest.mark.parametrize("options", [(), ("--list",), ("--dry-run",)])
def test_a_reader_that_has_enough_ends_the_run(toy, options):
    add(toy, "01_a", "import pathlib, time\ntime.sleep(20)\npathlib.Path('done').touch()")
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, str(TOOLS / "run.py"), "--root", str(toy.root), *options]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "") and not (toy.notebooks / "done").exists()


@pytest.mark.parametrize("place", ["build", "notebooks/01_a.ipynb"])
def test_a_disk_that_takes_no_files_is_named(toy, place):
    add(toy, "01_a")
    path = toy.root / place
    path.mkdir() if path.suffix else path.touch()  # as unwritable to root as a read-only disk
    done = run(toy)
    assert done.returncode == 1 and re.fullmatch(rf"\nrun_all.sh: .*{path}.*\n", done.stderr), done.stderr


def test_two_runners_of_one_notebook_at_once_both_end_well(toy):
    """Each waits for the other to be inside the notebook; the last one's stands."""
    add(toy, "01_a", "import os, pathlib, time\npathlib.Path(f'{os.getpid()}.pid').touch()"
        "\nwhile len(list(pathlib.Path().glob('*.pid'))) < 2:\n    time.sleep(0.05)\nprint('both')")  # fmt: skip
    command = [sys.executable, str(TOOLS / "run.py"), "--root", str(toy.root)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    words = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], words
    assert "both" in (toy.notebooks / "01_a.ipynb").read_text()
    assert not list(toy.build.rglob("*.ipynb"))


def test_a_killed_runner_takes_its_kernels_along(long_run):
    _, process, family = long_run
    kernel = next(member for member in family if member.pid == int((long_run[0].notebooks / "01_a.pid").read_text()))
    sockets = [connection.laddr for connection in kernel.net_connections("unix") if "/nb" in connection.laddr]
    scratch = Path(sockets[0]).parents[1]
    assert scratch.exists()
    process.kill()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive
    assert not scratch.exists()


@pytest.mark.skipif(not execute.FORKS, reason="kernels are forked on Linux only")
def test_a_kernel_that_is_never_called_ends_with_its_notebook():
    theirs, ours = multiprocessing.Pipe(duplex=False)
    kernel = multiprocessing.get_context("fork").Process(target=execute._kernel, args=[theirs, ours])
    kernel.start()
    theirs.close(), ours.close()
    kernel.join(20)
    assert kernel.exitcode == 0


def test_a_kernel_is_as_a_new_process(toy):
    """Nothing of the runner is in it, its random numbers are its own, and what it leaves for its end is done."""
    look = "import atexit, pathlib, sys\nimport numpy as np"
    look += "\natexit.register(pathlib.Path(__name__ + NAME).touch)"
    look += "\npathlib.Path(NAME).write_text(str(np.random.rand()))"
    look += "\nprint([m for m in ('execute', 'jobs', 'profiles', 'gallery') if m in sys.modules],"
    look += " [p for p in sys.path if p.endswith('tools')])"
    for name in ("01_a", "02_b", "03_c"):
        add(toy, name, f"NAME = {name!r}", look)
    assert run(toy).returncode == 0
    assert all("[] []" in (toy.notebooks / f"{name}.ipynb").read_text() for name in toy.names())
    assert len({(toy.notebooks / name).read_text() for name in toy.names()}) == 3
    assert len(list(toy.notebooks.glob("__main__*"))) == 3


def test_a_process_that_ends_by_itself_does_not_stop_the_killing(monkeypatch):
    root = subprocess.Popen(["sh", "-c", "sleep 60 & sleep 60 & sleep 60; true"])
    while len(sleepers := psutil.Process(root.pid).children()) < 3:
        time.sleep(0.05)
    kill = psutil.Process.kill

    def late(process):
        kill(process)
        if process == sleepers[0]:
            raise psutil.NoSuchProcess(process.pid)

    monkeypatch.setattr(psutil.Process, "kill", late)
    execute.kill_tree(root.pid)
    root.wait(10)
    assert not psutil.wait_procs(sleepers, timeout=10)[1]


# ---------------------------------------------------------------- gallery


def figure(layout, profile, stem, **changes):
    """A figure's three files, as the notebooks write them."""
    folder = layout.figures / profile
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.png").write_bytes(changes.pop("png", b"png of " + profile.encode()))
    (folder / f"{stem}.csv").write_text("a\n1\n")
    digests = {
        kind: gallery.hashlib.sha256((folder / f"{stem}.{kind}").read_bytes()).hexdigest() for kind in ("png", "csv")
    }
    record = {
        "stem": stem,
        "notebook": "01_a",
        "profile": profile,
        "caption": "Slope *2* at [0, 1].",
        "sha256": digests,
    }
    record |= {"source": "5,000 digits", "seeds": [0, 1], "parameters": {}, "seconds": 12.3}
    (folder / f"{stem}.json").write_text(json.dumps(record | changes))


def claims(layout, profile, verdict="reproduced"):
    common = {"n": "3 seeds", "source": "5,000 digits", "figure": "01_slope"}
    claim = {"claim": "V shrinks | T grows", "section": "3.1", "measured": "|W| = 0.5", "verdict": verdict}
    claim |= {"paper": "it does", "why": "few seeds" if verdict == "undecided" else "", "believe": True}
    answer = {"question": "Is it so?", "reviewer": "Reviewer 1", "answer": "It is."}
    check = {"check": "sums", "measured": "0", "passed": True, "figure": ""}
    record = {"notebook": "01_a", "title": "1. Linear models", "profile": profile, "claims": [claim | common]}
    record |= {"answers": [answer | common], "checks": [check]}
    (layout.figures / profile / "01_a.claims.json").write_text(json.dumps(record))
    (layout.figures / profile / "01_a.uses.json").write_text("{}")


@pytest.fixture
def shelf(toy):
    add(toy, "01_a")
    for profile, verdict in (("gpu", "undecided"), ("quick", "reproduced")):
        figure(toy, profile, "01_slope")
        claims(toy, profile, verdict)
    return toy


def test_what_is_hidden_beside_figures_and_cells_is_passed_over(shelf, monkeypatch):
    """What macOS leaves beside a file, and the copies that Jupyter keeps of what was edited in it (looks.json, say)."""
    before, known = gallery.page(shelf), stability.verdicts(shelf.figures / "quick")
    monkeypatch.setattr(cells, "FIGURES", shelf.figures)
    for place in (
        "{}x.json",
        "quick/{}x.json",
        "quick/{}x.claims.json",
        "quick/cells/{}x.json",
        "quick/cells/a/{}x.json",
    ):
        for hidden in ("._", ".ipynb_checkpoints/"):
            path = shelf.figures / place.format(hidden)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"\0\5\26\7\xb0\xff" if hidden == "._" else b'{"VGG16": {}}')
    (source := shelf.notebooks / "01_a.py").write_text(source.read_text() + "\n# cells.read(")
    env = {"FIGURES_DIR": str(shelf.figures / "quick"), "PROFILE": "quick"}
    job = SimpleNamespace(spec={"source": str(source), "parameters": {"keep_cells": True}}, env=env)
    assert not dry_run.committed(job) and cells.read()[1] == []
    assert gallery.page(shelf) == before and stability.verdicts(shelf.figures / "quick") == known


def test_the_gallery_shows_ledger_and_figures(shelf):
    gallery.write(shelf)
    text = (shelf.figures / "README.md").read_text()
    row = r"| V shrinks \| T grows | it does | \|W\| = 0.5 | {} | 3 seeds | 5,000 digits | 3.1 | {} |"
    quick = row.format("**reproduced**", "`quick`, [01_slope](quick/01_slope.png)")
    gpu = row.format("**undecided**: few seeds", "`gpu`, [01_slope](gpu/01_slope.png)")
    assert f"{quick}\n{gpu}\n" in text
    assert "| `quick` | the paper's | 1 | 0 | 0 | 0 |\n| `gpu` | the paper's | 0 | 0 | 0 | 1 |" in text
    assert text.count("### [1. Linear models](../notebooks/01_a.ipynb)") == 4  # three ledgers, and the figures
    assert "## What to believe\n\n- **undecided**: few seeds. V shrinks | T grows: |W| = 0.5 (`gpu`, [01_slope]" in text
    assert text.count("| Is it so? | Reviewer 1 | It is. |") == 1  # the same answer from two profiles: once
    assert text.count("| sums | 0 | pass | `quick` |") == 1
    assert r"Slope \*2\* at \[0, 1\]." in text
    assert "Profile `quick`. Data: 5,000 digits. Seeds: 0, 1. [Numbers](quick/01_slope.csv)" in text
    assert text.index("![01_slope](quick/01_slope.png)") < text.index("![01_slope](gpu/01_slope.png)")
    assert "12.3" not in text  # no times: the same results give the same page
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (shelf.figures / link).exists() or link == "../notebooks/01_a.ipynb"
    gallery.write(shelf)
    assert (shelf.figures / "README.md").read_text() == text
    figure(shelf, "gpu", "01_slope", png=b"png of quick")
    text = gallery.page(shelf)
    assert text.count("![01_slope]") == 1  # one picture under two profiles: once, and rows of both lead to it
    assert "`gpu`, [01_slope](quick/01_slope.png)" in text and "(gpu/01_slope.png)" not in text


def test_figures_stand_as_their_notebook_draws_them(shelf):
    lines = ["# The profile's picture is `gpu/01_slope.png`.", 'book.save(fig, "01_z")', 'book.save(fig, "01_slope")',
             'book.claim("so", figure="01_z")', 'book.save(fig, "01_b")']  # fmt: skip
    (shelf.notebooks / "01_a.py").write_text("\n".join(lines))
    for stem in ("01_b", "01_other", "01_z"):
        figure(shelf, "quick", stem)
    figure(shelf, "gpu", "01_z")
    shown = [(record["stem"], record["profile"]) for record in gallery.collect(shelf)[1]]
    assert shown == [("01_z", "quick"), ("01_z", "gpu"), ("01_slope", "quick"), ("01_slope", "gpu"), ("01_b", "quick"),
                     ("01_other", "quick")]  # fmt: skip


def test_our_own_claims_are_counted_apart(shelf):
    path = shelf.figures / "quick/01_a.claims.json"
    record = json.loads(path.read_text())
    record["claims"] += [record["claims"][0] | {"claim": "more", "verdict": "partly", "ours": True}]
    path.write_text(json.dumps(record))
    text = gallery.page(shelf)
    assert "| `quick` | the paper's | 1 | 0 | 0 | 0 |\n| `quick` | ours | 0 | 1 | 0 | 0 |" in text
    assert "| more *(ours)* | it does |" in text
    assert "| 1 undecided; ours: 1 partly; 1 answered |" in gallery.notebooks(shelf)


def test_the_table_of_notebooks_is_filled_from_the_records(shelf):
    path = shelf.root / "README.md"
    path.write_text("above\n<!-- notebooks: by whom -->\nold\n<!-- /notebooks -->\nbelow\n")
    (shelf.figures / "quick/01_a.uses.json").write_text('{"seconds": 130}')
    gallery.write(shelf)
    above, head, rule, row, total, below = re.sub(r"<!--.*-->\n", "", path.read_text()).splitlines()
    assert (above, below) == ("above", "below") and head.count("|") == rule.count("|") == 5
    link = "[1. Linear models](notebooks/01_a.ipynb)"
    said = r"V shrinks \| T grows: **undecided**"  # of the larger profile
    assert row == f"| {link} | {said} | 1 undecided; 1 answered | 2 min |"
    what = "together, two side by side (half of the sum, what notebooks share counted once)"
    assert total == f"| {what} |  | 1 undecided; 1 answered | 1 min |"
    text = path.read_text()
    gallery.write(shelf)
    assert path.read_text() == text


def test_the_committed_pages_are_those_of_the_committed_records():
    layout = Layout()
    assert (layout.figures / "README.md").read_text(encoding="utf-8") == gallery.page(layout)
    assert (layout.root / "README.md").read_text(encoding="utf-8") == gallery.readme(layout)


def test_an_empty_gallery_says_so(toy):
    gallery.write(toy)
    assert "No notebook has run yet" in (toy.figures / "README.md").read_text()


SPOILT_RECORDS = {
    "half a file": ("01_slope.json", lambda text: text[:40], "01_slope.json is truncated or corrupted"),
    "key missing": (
        "01_slope.json",
        lambda text: text.replace("caption", "c"),
        "01_slope.json: this record lacks caption",
    ),
    "not a record": ("01_slope.json", lambda text: "[]", "01_slope.json: this record lacks"),
    "other picture": ("01_slope.png", lambda text: "x", "01_slope.json: 01_slope.png is not the file of this record"),
    "other numbers": ("01_slope.csv", lambda text: "x", "01_slope.json: 01_slope.csv is not the file of this record"),
    "other profile": (
        "01_slope.json",
        lambda text: text.replace("quick", "gpu"),
        "01_slope.json: it is of profile gpu",
    ),
    "other notebook": ("01_slope.json", lambda text: text.replace("01_a", "09_z"), "there is no notebook 09_z"),
    "unknown verdict": ("01_a.claims.json", lambda text: text.replace("reproduced", "fine"), "has the verdict 'fine'"),
    "claim key missing": (
        "01_a.claims.json",
        lambda text: text.replace("measured", "m"),
        "a row of its claims lacks measured",
    ),
}


@pytest.mark.parametrize("case", SPOILT_RECORDS)
def test_a_spoilt_record_is_an_error_that_names_it(shelf, case):
    name, change, message = SPOILT_RECORDS[case]
    path = shelf.figures / "quick" / name
    path.write_text(change(path.read_bytes().decode()))
    with pytest.raises(gallery.RecordError, match=re.escape(message)):
        gallery.page(shelf)


def test_a_figure_without_its_picture_is_an_error(shelf):
    (shelf.figures / "quick" / "01_slope.png").unlink()
    with pytest.raises(gallery.RecordError, match=r"01_slope\.json: 01_slope\.png is missing"):
        gallery.page(shelf)


def test_the_contact_sheet_holds_every_picture(tmp_path):
    layout = Layout(tmp_path)
    (layout.figures / "quick").mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (100 * (i + 1), 50), (200, 10 * i, 0)).save(layout.figures / "quick" / f"{i}.png")
    sheet = Image.open(gallery.contact_sheet(layout, columns=2, side=80))
    assert sheet.size == (160, 160)
    assert [sheet.getpixel(at) for at in ((5, 5), (85, 5), (5, 85))] == [(200, 10 * i, 0) for i in range(3)]
