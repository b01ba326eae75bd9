"""Training runs and what is measured on them: each is made once, by whichever notebook comes first, and found again.

A run is named by what was asked for: config, pixels and the version of what training means. Where, when and with what
it was made is recorded in it (`made`), and appears in the records of the figures drawn from it. So a run made on one
machine is found on another. `journal` says what was found and what was made since it was last cleared.
"""

from contextlib import contextmanager
from dataclasses import fields
from itertools import count
from pathlib import Path

from filelock import Timeout
from tqdm import tqdm

from . import cluster, compute
from .files import ROOT, checksum, folder_from_environment, locked, read_json, write_json
from .training import VERSION, damage, train

# Dicts: run (its name), what, state ("found", "trained", "remembered", "measured", "committed"), made.
journal = []

_handed = set()  # names of runs that a cluster has trained for this process, until they are asked for


def runs_dir():
    """Where the runs are: RUNS_DIR, by default runs/ beside lib/."""
    return folder_from_environment("RUNS_DIR", ROOT / "runs")


def shared_dir():
    """The folder of the runs as workers are told it: made, and its whole path as a text."""
    runs_dir().mkdir(parents=True, exist_ok=True)
    return str(runs_dir().absolute())


def run(config, data, *, wait=True, quiet=False):
    """The finished run of this config on this data: found, resumed or trained.

    A second process that wants the same run waits for the first, or gets None at once if not `wait`. One whose files
    are damaged is kept beside its place and trained anew. Other arguments and errors as for `training.train`.
    """
    folder = runs_dir() / name(config, data)
    try:
        if damage(folder, config):
            _put_aside(folder, config, wait)
        with _once(folder / "run.json", folder / ".lock", wait) as there:
            found = train(config, data, folder=folder, quiet=quiet)
    except Timeout:
        return None
    note(folder.name, config.describe(), "found" if there and folder.name not in _handed else "trained", found.made)
    _handed.discard(folder.name)
    return found


def _put_aside(folder, config, wait):
    """Move what is in the folder of a damaged run to a new one beside it, and say so.

    Asked again under the lock: another process may have done it. The lock stays in its place, where others wait for it.
    In the order of their names, so that after a kill on the way what is left is damaged, too: made.json goes before
    models, run.json last.
    """
    try:
        with locked(folder / ".lock", "RUNS_DIR", wait):
            if why := damage(folder, config):
                names = (f"{folder.name}.damaged{f'-{i}' if i > 1 else ''}" for i in count(1))
                aside = next(path for path in map(folder.with_name, names) if not path.exists())
                aside.mkdir()
                for path in sorted(folder.iterdir()):
                    if path.name != ".lock":
                        path.rename(aside / path.name)
                tqdm.write(f"{folder}: {why}; it is kept as {aside.name}, and the run is trained anew")
    except Timeout:
        raise
    except OSError as error:
        raise ValueError(f"{folder} is damaged and cannot be moved ({error}): rename it, and run again") from error


def note(name, what, state, made):
    """Add to the journal."""
    journal.append({"run": name, "what": what, "state": state, "made": made})


def grid(configs, data):
    """The finished runs of all configs, in their order. What was finished before a kill is found again.

    Two processes with one grid share the work: a run that the other is training is left for the end.
    """
    configs, done = list(configs), {}
    ahead(configs, data)
    several = len(configs) > 1  # one line of progress at a time: that of the grid, or that of its only run
    with tqdm(total=len({*configs}), desc="runs", disable=not several, mininterval=1) as bar:
        for wait in (False, True):
            for config in configs:
                bar.set_postfix_str(config.describe(), refresh=False)
                if config not in done and (found := run(config, data, wait=wait, quiet=several)):
                    done[config] = found
                    bar.update()
    return [done[config] for config in configs]


def ahead(configs, data):
    """Have the workers of a cluster, where there is one (`cluster`), train those of the configs that are not finished.

    Data travel by their name, and each worker loads them; what was not loaded by name is left to whoever needs it."""
    if cluster.address() and data.origin:
        shared = shared_dir()
        names = {name(config, data): config for config in configs}
        tasks = {f"train {shared}/{run}": (shared, config, data.origin, data.fingerprint, VERSION)
                 for run, config in names.items() if not (runs_dir() / run / "run.json").exists()}  # fmt: skip
        cluster.each(_train_there, tasks, "runs")
        _handed.update(task.rpartition("/")[2] for task in tasks)


def _train_there(folder, config, *named):
    run(config, cluster.on_worker(folder, *named), quiet=True)


def name(config, data):
    """What the run of this config on this data is called, whether there is one or not."""
    return f"{config.model}-{config.schedule}-{key(config, data)}"


def remember(kind, facts, compute_value, *, version=1, committed=None):
    """What compute_value() returns, a JSON value: computed once for the same facts, and read again from then on.

    Args:
        kind: the folder, inside that of the runs; a plain name, such as "attacks".
        facts: a JSON dict of all that was asked for. A run is named by `name`.
        compute_value: a function without arguments. It should be repeatable.
        version: raised by hand when the same facts come to mean another value.
        committed: None, or the folder of a profile's figures: what stands there is read from it, wherever it was made,
            and what does not is written into it, too.
    Returns:
        The value as JSON gives it back (tuples are lists), whether computed or read.
    Raises:
        ValueError: a corrupted file, or NaN in the value.
    """
    if Path(kind).name != kind or kind in ("", ".."):
        raise ValueError(f"kind must be a plain name, got {kind!r}")
    if stands(committed, kind, facts, version=version):
        path, state = _value(committed, kind, facts, version), "committed"
    else:
        path = _value(runs_dir(), kind, facts, version)
        with _once(path, path.with_suffix(".lock")) as there:
            if not there:
                start = compute.clock()
                value = compute_value()
                write_json(path, {"facts": facts, "value": value, "made": compute.made(compute.clock() - start)})
        state = "remembered" if there else "measured"
    record = read_json(path)
    if not isinstance(record, dict) or not {"value", "made"} <= record.keys():
        raise ValueError(f"{path} holds no remembered value: delete it, and it is computed again")
    note(f"{kind}/{path.stem}", kind, state, record["made"])
    if committed and state != "committed":
        write_json(_value(committed, kind, facts, version), record)
        note(f"{kind}/{path.stem}", kind, "committed", record["made"])
    return record["value"]


def stands(folder, kind, facts, *, version=1):
    """Whether what is to be remembered is among the committed values in a folder (None: there are none)."""
    return folder is not None and _value(folder, kind, facts, version).exists()


def _value(folder, kind, facts, version):
    return Path(folder) / kind / f"{checksum([facts, version])}.json"


@contextmanager
def _once(path, lock, wait=True):
    """Is the file there, which is written last? If not, the lock is held in which to make it.

    What is there needs neither lock nor the right to write: runs of another user are found, and on a read-only disk.
    """
    if path.exists():
        yield True
        return
    with locked(lock, "RUNS_DIR", wait):
        yield path.exists()


def key(config, data):
    """Hash of what was asked for, 16 hexadecimal digits. Settings at their default are left out: a new one renames no
    run."""
    asked = {f.name: getattr(config, f.name) for f in fields(config) if getattr(config, f.name) != f.default}
    return checksum([{"config": asked, "data": data.fingerprint}, VERSION])
