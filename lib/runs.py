"""The cache of training runs and of what is measured on them: each is made once, by whichever notebook comes first."""

import ast
import hashlib
import json
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from .compute import hardware
from .files import folder_from_environment, read_json, write_json
from .training import TrainConfig, train

LIB = Path(__file__).resolve().parent
DECIDING = (
    "attacks.py",
    "certify.py",
    "compute.py",
    "evaluation.py",
    "models.py",
    "schedules.py",
    "training.py",
)


def runs_dir():
    """Where the runs are: RUNS_DIR, by default runs/ beside lib/."""
    return folder_from_environment("RUNS_DIR", LIB.parent / "runs")


def configure(settings, **changes):
    """The TrainConfig of a notebook: its parameters, or a row of its table, with what differs in this run.

    Args:
        settings: a dict; what in it is no field of TrainConfig is passed over, and "step_fraction" is the step size of
            the attack as a fraction of eps.
        changes: fields of TrainConfig; they go before settings.
    Returns:
        TrainConfig; errors as for it.
    """
    names = {field.name for field in fields(TrainConfig)}
    chosen = {name: value for name, value in settings.items() if name in names} | changes
    if "step_fraction" in settings and "step_size" not in changes:
        chosen["step_size"] = settings["step_fraction"] * chosen["eps"]
    return TrainConfig(**chosen)


def run(config, data, *, wait=True):
    """The finished run of this config on this data: found, resumed or trained.

    Its folder is named by a hash of all that decides the result: config, pixels, PyTorch, processor, thread count
    and the code (comments and docstrings apart). A second process that wants the same run waits for the first, or
    gets None at once if not `wait`. Arguments and errors as for `training.train`.
    """
    folder = runs_dir() / f"{config.model}-{config.schedule}-{key(config, data)}"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=-1 if wait else 0):
            return train(config, data, folder=folder)
    except Timeout:
        return None


def grid(configs, data):
    """The finished runs of all configs, in their order. What was finished before a kill is found again.

    Two processes with one grid share the work: a run that the other is training is left for the end.
    """
    configs, done = list(configs), {}
    with tqdm(total=len(configs), desc="runs", disable=len(configs) < 2) as bar:
        for wait in (False, True):
            for config in configs:
                if config not in done and (found := run(config, data, wait=wait)):
                    done[config] = found
                    bar.update()
    return [done[config] for config in configs]


def remember(kind, facts, compute, *, code=()):
    """What compute() returns, a JSON value: computed once for the same facts, and read again from then on.

    Args:
        kind: the folder, inside that of the runs; a plain name, such as "attacks".
        facts: a JSON dict of all that decides the value, apart from PyTorch, processor, thread count and the code that
            decides runs. A run is named by `run.folder.name`.
        compute: a function without arguments. It should be repeatable.
        code: names of more files of lib that decide the value, such as "curvature.py".
    Returns:
        The value as JSON gives it back (tuples are lists), whether computed or read.
    Raises:
        ValueError: a corrupted file, or NaN in the value.
    """
    path = runs_dir() / kind / f"{_hash(facts, (*DECIDING, *code))}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            write_json(path, {"facts": facts, "value": compute()})
    return read_json(path)["value"]


def key(config, data):
    """Hash of all that decides a run's result, 16 hexadecimal digits."""
    return _hash({"config": asdict(config), "data": data.fingerprint}, DECIDING)


def _hash(facts, code):
    deciding = {"facts": facts, "torch": torch.__version__, "hardware": hardware(), "code": _code(code)}
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:16]


def _code(names=DECIDING):
    h = hashlib.sha256()
    for name in names:
        h.update(_without_words((LIB / name).read_text(encoding="utf-8")))
    return h.hexdigest()


@cache  # a notebook asks for hundreds of values, and parsing the code takes longer than reading one
def _without_words(source):
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree).encode()
