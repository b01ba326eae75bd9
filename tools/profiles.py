"""Profiles: which notebooks run at which size.

"quick" is the notebooks' own `parameters` cells. Any other profile is a file notebooks/profiles/NAME.yaml with
one section per notebook and, in it, the parameters to change. A notebook without a section is not part of that
profile, so that no result carries the name of a size it did not have; an empty section ({}) takes it in as it is.
"""

import ast
from pathlib import Path

import jupytext
import yaml
from layout import Layout

QUICK = "quick"


class ProfileError(ValueError):
    """A profile, a notebook's name or a `parameters` cell that cannot be used."""


class _Loader(yaml.SafeLoader):
    """YAML where the same key twice is an error: the plain loader keeps the last one in silence."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ProfileError(f"the key {key!r} stands twice in one section")
        return super().construct_mapping(node, deep)


def profile_names(layout: Layout) -> list[str]:
    """The profiles that can be asked for, "quick" first."""
    return [QUICK, *sorted(path.stem for path in layout.profiles.glob("*.yaml") if path.stem != QUICK)]


def parameters(path: Path) -> dict:
    """Names and values set in the `parameters` cell of a notebook's source.

    Raises:
        ProfileError: not exactly one such cell, a value that is no plain literal, or no parameter `profile`.
    """
    cells = [cell for cell in jupytext.read(path).cells if "parameters" in cell.metadata.get("tags", [])]
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


def _kind(value) -> str:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return "number" if number else type(value).__name__


def read_profile(layout: Layout, profile: str) -> dict[str, dict]:
    """{notebook: parameters to change} of a profile, checked against the notebooks.

    Raises:
        ProfileError: unknown profile, section or key, a section that is no mapping, a value of another type.
    """
    if profile not in profile_names(layout):
        raise ProfileError(f"no profile {profile!r}: choose one of {', '.join(profile_names(layout))}")
    names = layout.names()
    known = {name: parameters(layout.notebooks / f"{name}.py") for name in names}
    if profile == QUICK:
        return {name: {} for name in names}
    path = layout.profiles / f"{profile}.yaml"
    try:
        sections = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (ProfileError, yaml.YAMLError) as error:
        raise ProfileError(f"{path.name}: {error}") from None
    sections = {} if sections is None else sections
    if not isinstance(sections, dict):
        raise ProfileError(f"{path.name}: it holds a {type(sections).__name__}, not sections named by notebooks")
    for name, changes in sections.items():
        if name not in known:
            raise ProfileError(f"{path.name}: no notebook {name!r}: the sections may be {', '.join(names)}")
        if not isinstance(changes, dict):
            raise ProfileError(f"{path.name}: section {name} holds a {type(changes).__name__}, not `key: value` lines")
        _check_section(f"{path.name}: section {name}", changes, known[name])
    return {name: sections[name] for name in names if name in sections}


def _check_section(where: str, changes: dict, known: dict) -> None:
    allowed = [key for key in known if key != "profile"]
    for key, value in changes.items():
        if key not in allowed:
            raise ProfileError(f"{where}: no parameter {key!r}: the notebook has {', '.join(allowed) or 'none'}")
        if known[key] is not None and _kind(value) != _kind(known[key]):
            hint = "; YAML reads 1e-4 as text, write 1.0e-4" if _kind(known[key]) == "number" else ""
            raise ProfileError(f"{where}: {key} is {value!r}, but the notebook has a {_kind(known[key])}{hint}")


def choose(asked: list[str], names: list[str]) -> list[str]:
    """Full names of the notebooks asked for by beginning, file name or path.

    Raises:
        ProfileError: a beginning that fits no notebook, or more than one.
    """
    chosen = []
    for text in asked:
        stem = Path(text).name.removesuffix(".py").removesuffix(".ipynb")
        fits = [stem] if stem in names else [name for name in names if stem and name.startswith(stem)]
        if len(fits) != 1:
            trouble = "fits more than one notebook" if fits else "fits no notebook"
            raise ProfileError(f"{text!r} {trouble}: choose from {', '.join(fits or names) or '(there are none)'}")
        chosen += fits
    return sorted(set(chosen))
