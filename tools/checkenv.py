#!/usr/bin/env python3
"""Does the Python that runs this file fit the project? It prints what does not, and then exits with 1.

    python tools/checkenv.py [--dev] [--lab] [--site] | --python-only

Standard library only, because it runs before anything is installed.
"""

from __future__ import annotations  # so that an old Python gets a message, not a traceback

import re
import sys
from importlib import metadata, util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENT = re.compile(r"\s*([A-Za-z0-9._-]+)\s*(?:\[[^]]*\])?\s*([^;]*)")
CLAUSE = re.compile(r"\s*(==|~=|!=|<=|>=|<|>)\s*([^\s,]+)\s*")


def release(version: str) -> tuple:
    """Sort key of a version: its release numbers without trailing zeros, and whether it is final.

    Local parts ("+cu130") do not count. Enough of PEP 440 for the plain clauses of pyproject.toml.
    """
    numbers, rest = re.match(r"v?((?:\d+\.)*\d+)(.*)", version.split("+")[0]).groups()
    parts = [int(part) for part in numbers.split(".")]
    while parts and parts[-1] == 0:
        parts.pop()
    return tuple(parts), not re.match(r"[-_.]?(a|b|c|rc|alpha|beta|pre|preview|dev)", rest)


def satisfies(version: str, spec: str) -> bool:
    """Is ``version`` inside a comma-separated ``spec`` such as ">=3.11,<3.14"?"""
    have = release(version)
    for clause in filter(None, (part.strip() for part in spec.split(","))):
        match = CLAUSE.fullmatch(clause)
        if match is None:
            raise ValueError(f"cannot read the version clause {clause!r}: write it as, for example, >=1.2")
        operator, text = match.groups()
        if text.endswith(".*"):
            stem = text[:-2].split(".")
            same = (re.match(r"[\d.]+", version)[0].split(".") + ["0"] * len(stem))[: len(stem)] == stem
            held = same == (operator == "==")
        else:
            want = release(text)
            inside = have[0][: text.count(".")] == want[0][: text.count(".")]
            held = {
                "==": have == want,
                "!=": have != want,
                "<=": have <= want,
                ">=": have >= want,
                "<": have[0] < want[0],  # a pre-release of 2.0 is not below 2.0
                ">": have[0] > want[0],
                "~=": have >= want and inside,
            }[operator]
        if not held:
            return False
    return True


def problems(root: Path = ROOT, *, extras: tuple = (), python_only: bool = False) -> list[str]:
    """What keeps this interpreter from running the project in ``root``; an empty list when nothing does."""
    python = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < (3, 11):  # noqa: UP036 - this file runs before the right Python is found
        return [f"Python {python} is too old: it has no tomllib"]
    import tomllib

    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = project["requires-python"]
    if not satisfies(python, wanted):
        return [f"Python {python} is not {wanted}"]
    if python_only:
        return []
    needs = [*project["dependencies"], *(need for extra in extras for need in project["optional-dependencies"][extra])]
    found = []
    for need in needs:
        name, spec = REQUIREMENT.match(need).groups()
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            found.append(f"{name} is not installed")
            continue
        if not satisfies(version, spec):
            found.append(f"{name} {version} is not {spec.strip()}")
    lib = util.find_spec("lib")
    if lib is None or lib.origin is None or Path(lib.origin).resolve() != (root / "lib/__init__.py").resolve():
        found.append("`import lib` does not lead to this checkout")
    return found


if __name__ == "__main__":
    extras = tuple(extra for extra in ("dev", "lab", "site") if f"--{extra}" in sys.argv)
    found = problems(extras=extras, python_only="--python-only" in sys.argv)
    print("\n".join(found), end="\n" if found else "")
    sys.exit(bool(found))
