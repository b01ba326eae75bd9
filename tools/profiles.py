#!/usr/bin/env python3
"""Profiles: which notebooks run at which size.

    python tools/profiles.py --define     write notebooks/profiles/quick.json

"quick" is the notebooks' own `parameters` cells and the recipes of lib, both as quick.json defines them: what differs
from it is the reader's play, and counts as the profile "mine". Any other profile is a file NAME.yaml, ours in
notebooks/profiles or the reader's anywhere, with one section per notebook and, in it, the parameters to change; its
section `recipes` changes recipes in all notebooks that name them. A notebook without a section is not part of that
profile, so that no result carries the name of a size it did not have; an empty section ({}) takes it in as it is.
"""

import ast
import json
import math
import sys
from pathlib import Path

import jupytext
import yaml
from jupytext.config import load_jupytext_config
from layout import Layout

from lib.files import as_path, read_json, write_json
from lib.settings import PLAIN, differing, fit, kind
from lib.settings import SettingError as ProfileError

QUICK, MINE = "quick", "mine"
DAMAGED = """notebooks/profiles/quick.json is damaged: `git checkout notebooks/profiles/quick.json` brings it back,
    or, if the notebooks are meant as they are, ./run_all.sh --python tools/profiles.py --define"""
TAKEN = (MINE, "site", "doctrees", "stability")  # folders in build/ that are no profile of a file


class _Loader(yaml.SafeLoader):
    """YAML where the same key twice is an error (the plain loader keeps the last one), and so are 010 (it reads 8) and
    keys that are no text (a notebook would be given texts)."""

    def construct_object(self, node, deep=False):
        try:
            return super().construct_object(node, deep)
        except (AttributeError, KeyError, ValueError) as error:  # what !!bool and !!timestamp raise
            if isinstance(error, ProfileError):
                raise
            raise ProfileError(f"{node.value!r} is no {node.tag.rpartition(':')[2]}") from None

    def construct_mapping(self, node, deep=False):
        own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]  # `<<: *a`, which they may change
        keys = [self.construct_object(key, deep=True) for key in own]
        for key in keys:
            if not isinstance(key, str):
                raise ProfileError(f"the key {key!r} is no text: quote it")
            if keys.count(key) > 1:
                raise ProfileError(f"the key {key!r} stands twice in one section")
        return super().construct_mapping(node, deep)

    def construct_number(self, node):
        try:
            if math.isfinite(number := ast.literal_eval(node.value)):
                return number
            raise ValueError
        except (OverflowError, SyntaxError, TypeError, ValueError):
            raise ProfileError(f"{node.value} is no plain number: {PLAIN}") from None


for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.construct_number)


def source(path: Path):
    """A notebook's source as jupytext reads it for us: comments are left alone.

    Raises:
        ProfileError: a comment that jupytext takes for a command elsewhere, or a cell that is not plain Python.
    """
    text, config = path.read_text(encoding="utf-8"), load_jupytext_config(str(path.resolve()))
    form = {"extension": ".py", "format_name": "percent"}
    notebook, elsewhere = (jupytext.reads(text, form | {"comment_magics": on}, config=config) for on in (False, True))
    for number, (cell, other) in enumerate(zip(notebook.cells, elsewhere.cells, strict=True), 1):
        where = f"{path.name}, cell {number}"
        if cell.source != other.source:
            lines = zip(cell.source.splitlines(), other.source.splitlines(), strict=True)
            line = next(line for line, read in lines if line != read)
            raise ProfileError(f"{where}: `{line}` looks like a command, and some tools would run it: reword it")
        if cell.cell_type == "code":
            try:
                ast.parse(cell.source)
            except SyntaxError as error:
                line = (error.text or "").strip()
                raise ProfileError(f"{where}, line {error.lineno}: {error.msg}: `{line}`") from None
    return notebook


def parameters(path: Path) -> dict:
    """Names and values set in the `parameters` cell of a notebook's source.

    Raises:
        ProfileError: as for `source`; not exactly one such cell, a value that is no plain literal, or no `profile`.
    """
    cells = [cell for cell in source(path).cells if "parameters" in cell.metadata.get("tags", [])]
    if len(cells) != 1:
        raise ProfileError(f"{path.name}: {len(cells)} cells are tagged `parameters`; it needs exactly one")
    values = {}
    for node in ast.parse(cells[0].source).body:
        try:
            if not isinstance(node, ast.Assign) or len(node.targets) != 1:
                raise ValueError
            values[node.targets[0].id] = ast.literal_eval(node.value)
        except (ValueError, AttributeError):
            raise ProfileError(
                f"{path.name}: `{ast.unparse(node)}` in the parameters cell: write NAME = plain literal"
            ) from None
    if "profile" not in values:
        raise ProfileError(f"{path.name}: its parameters cell does not set `profile`")
    return values


# ---------------------------------------------------------------- quick, as it is defined, and the reader's play


def definition(layout: Layout) -> dict:
    """The quick profile as the sources have it: {notebook: parameters}, and all recipes under "recipes"."""
    from lib.recipes import RECIPES

    found = {name: parameters(layout.notebooks / f"{name}.py") for name in layout.names()}
    return json.loads(json.dumps({**found, "recipes": RECIPES}))  # tuples become lists, as they are read back


def defined(layout: Layout) -> dict:
    """The quick profile as notebooks/profiles/quick.json has it; empty when there is no such file."""
    path = layout.profiles / "quick.json"
    try:
        return read_json(path) if path.exists() else {}
    except ValueError as error:
        raise ProfileError(f"{DAMAGED} ({error.__cause__})") from None


def played(layout: Layout, names: list[str]) -> dict[str, str]:
    """{notebook: what in it differs from the quick profile as it is defined}, of those where something does.

    Raises:
        ProfileError: a parameter that is new or gone, a value of another type, an empty list, an unknown recipe.
    """
    known, found = defined(layout), {}
    other = bool(known) and _other_recipes(known.get("recipes"))
    for name in filter(known.get, names):
        where = f"{name}.py, parameters cell"
        values, old = parameters(layout.notebooks / f"{name}.py"), known[name]
        differ = differing(where, values, old)
        if "changes" in differ:
            _recipes(f"{where}: changes", values["changes"])
        if differ and "changes" in values:
            check_names(where, values)
        if differ or other:
            found[name] = ", ".join(differ + ["other recipes"] * other)
    return found


def _other_recipes(known: dict) -> bool:
    """Are lib's recipes not those of quick.json? Importing lib takes seconds, but git's word would not do: a changed
    recipe may be committed, or the project lie in another repository."""
    from lib.recipes import RECIPES

    return json.loads(json.dumps(RECIPES)) != known


# ---------------------------------------------------------------- the other profiles


def profile_names(layout: Layout) -> list[str]:
    """The profiles that can be asked for, "quick" first."""
    return [QUICK, *sorted(path.stem for path in layout.profiles.glob("[!.]*.yaml") if path.stem != QUICK)]


def find(layout: Layout, asked: str) -> tuple[str, Path]:
    """Name and file of a profile that is asked for by its name or by the path of a reader's file.

    Raises:
        ProfileError: neither, or a file with the name of another profile.
    """
    names, path = profile_names(layout), as_path(asked)
    ours = {name: layout.profiles / f"{name}.yaml" for name in names}
    if asked in names:
        return asked, ours[asked]
    if path.suffix != ".yaml" or not path.is_file():
        raise ProfileError(f"no profile {asked!r}: choose one of {', '.join(names)}, or a file NAME.yaml of your own")
    for name, one in ours.items():
        if one.exists() and path.samefile(one):  # whatever it is called by
            return name, one
    if path.stem in (*names, *TAKEN):
        raise ProfileError(f"{asked}: the name {path.stem} is taken: rename the file")
    return path.stem, path


def read_profile(layout: Layout, asked: str, wanted: list[str] | None = None) -> dict[str, dict]:
    """{notebook: parameters to change} of a profile, checked against the notebooks and the recipes.

    Args:
        wanted: notebooks; of others nothing is read. By default all.
    Raises:
        ProfileError: unknown profile, section, parameter, recipe or setting (at any depth), a value of another type,
            a list that is empty where the notebook's is not.
    """
    profile, path = find(layout, asked)
    names = layout.names()
    wanted = names if wanted is None else wanted
    if profile == QUICK:
        return {name: {} for name in wanted if parameters(layout.notebooks / f"{name}.py")}
    try:
        sections = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, ProfileError, UnicodeDecodeError, yaml.YAMLError) as error:
        hint = ": save it in UTF-8" if isinstance(error, UnicodeDecodeError) else ""
        raise ProfileError(f"{path.name}: {error}{hint}") from None
    sections = {} if sections is None else sections
    if not isinstance(sections, dict):
        raise ProfileError(f"{path.name}: it holds a {type(sections).__name__}, not sections named by notebooks")
    for name, section in sections.items():
        if name not in (*names, "recipes"):
            raise ProfileError(f"{path.name}: no notebook {name!r}: sections may be recipes, {', '.join(names)}")
        if not isinstance(section, dict):
            raise ProfileError(f"{path.name}: section {name} holds a {type(section).__name__}, not `key: value` lines")
    everywhere = _recipes(f"{path.name}: section recipes", sections.pop("recipes", {}))
    sources = {name: layout.notebooks / f"{name}.py" for name in wanted if name in sections}
    return {
        name: _section(f"{path.name}: section {name}", sections[name], parameters(its_source), everywhere)
        for name, its_source in sources.items()
    }


def _section(where: str, section: dict, known: dict, everywhere: dict) -> dict:
    """A section's parameters, checked, with what the profile's recipes change in this notebook."""
    allowed = {key: value for key, value in known.items() if key != "profile"}
    for key in section:
        if key not in allowed:
            raise ProfileError(f"{where}: no parameter {key!r}: the notebook has {', '.join(allowed) or 'none'}")
    found = {key: fit(f"{where}: {key}", value, known[key], key) for key, value in section.items() if key != "changes"}
    own = _recipes(f"{where}: changes", section.get("changes", known.get("changes", {})))
    if "changes" in known:
        from lib.recipes import merged

        named = check_names(where, known | found)
        changes = {name: merged(everywhere.get(name, {}), own.get(name, {})) for name in dict.fromkeys([*named, *own])}
        found["changes"] = {name: settings for name, settings in changes.items() if settings}
    return found


def _recipes(where: str, changes: dict) -> dict:
    """{recipe: {setting: value}}, checked."""
    if kind(changes) != "dict":
        raise ProfileError(f"{where} holds a {kind(changes)}, not recipes")
    found = {}
    for name, settings in changes.items():
        from lib import recipes  # takes seconds: only where it is needed

        try:
            known = recipes.get(name)
        except ProfileError as error:
            raise ProfileError(f"{where}: {error}") from None
        found[name] = fit(f"{where}: {name}", settings, known)
        try:
            recipes.configure(recipes.get(name, {name: found[name]}), eps=0.1)
        except ValueError as error:
            raise ProfileError(f"{where}: {name}: {error}") from None
    return found


def check_names(where: str, values: dict) -> list[str]:
    """The recipes that a notebook's parameters name, at any depth.

    Raises:
        ProfileError: a parameter `recipe` or `recipes` names one that does not exist.
    """
    from lib.recipes import RECIPES

    asked = [name for value in _under({"recipe", "recipes"}, values) for name in _texts(value)]
    if unknown := [name for name in asked if name not in RECIPES]:
        raise ProfileError(f"{where}: no recipe {unknown[0]!r}: there are {', '.join(RECIPES)}")
    return [name for name in RECIPES if name in _texts(values)]


def _under(keys: set, value) -> list:
    """What stands under these keys, at any depth."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if kind(value) == "list" else []
    return [found for key, one in inner for found in ([one] if key in keys else _under(keys, one))]


def _texts(value) -> list[str]:
    """All texts in a value, at any depth."""
    if isinstance(value, str):
        return [value]
    inner = [*value, *value.values()] if isinstance(value, dict) else value if kind(value) == "list" else []
    return [text for one in inner for text in _texts(one)]


def choose(asked: list[str], names: list[str]) -> list[str]:
    """Full names of the notebooks asked for by number, beginning, file name or path.

    Raises:
        ProfileError: a beginning that fits no notebook, or more than one.
    """
    chosen = []
    for text in asked:
        stem = Path(text).name.removesuffix(".py").removesuffix(".ipynb")
        stem = stem.zfill(2) if stem.isdecimal() else stem
        fits = [stem] if stem in names else [name for name in names if stem and name.startswith(stem)]
        if len(fits) != 1:
            trouble = "fits more than one notebook" if fits else "fits no notebook"
            raise ProfileError(f"{text!r} {trouble}: choose from {', '.join(fits or names) or '(there are none)'}")
        chosen += fits
    return sorted(set(chosen))


if __name__ == "__main__":
    if sys.argv[1:] != ["--define"]:
        sys.exit(__doc__)
    try:
        write_json(Layout().profiles / "quick.json", definition(Layout()))
    except ProfileError as error:
        sys.exit(f"{error}")
