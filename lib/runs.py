"""The cache of training runs: the same config on the same data is trained once, by whichever notebook comes first."""

import ast
import hashlib
import json
import os
from dataclasses import asdict, fields
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from .compute import hardware
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
    return Path(os.environ.get("RUNS_DIR") or LIB.parent / "runs")


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


def key(config, data):
    """Hash of all that decides a run's result, 16 hexadecimal digits."""
    deciding = {
        "config": asdict(config),
        "data": data.fingerprint,
        "torch": torch.__version__,
        "hardware": hardware(),
        "code": _code(),
    }
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:16]


def _code():
    h = hashlib.sha256()
    for name in DECIDING:
        tree = ast.parse((LIB / name).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
        h.update(ast.dump(tree).encode())
    return h.hexdigest()
