"""One notebook of a run: its process, its files and how far it is."""

import contextlib
import importlib.util
import json
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import execute
import jupytext
import nbformat
import profiles
from layout import HERE, Layout
from nbclean import clean, dumps

from lib.files import folder_from_environment, read_if_whole, read_json, write_bytes

TINY = "tiny"
INLINE = "module://matplotlib_inline.backend_inline"  # what a kernel would set, after matplotlib is imported here
# What a reader's machine may set for other programs, and would change results or pictures here.
LEAKS = ("PYTHON", "IPYTHON", "JUPYTER", "MPLBACKEND", "MATPLOTLIBRC", "LC_", "LANG", "OPENBLAS_", "MKL_", "PROFILE",
         "RUN_ALL_JOURNAL")  # fmt: skip


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    whole = round(seconds)
    return f"{whole} s" if whole < 120 else f"{whole // 60} min {whole % 60:02d} s"


@dataclass
class Job:
    """One notebook of a run: where it goes, and how far it is."""

    name: str
    final: Path  # the clean executed notebook, written only when all of it ran
    part: Path  # what papermill writes while it runs, in a folder of this run alone: another may run the same notebook
    log: Path
    spec: dict  # what tools/execute.py is told
    env: dict
    cells: int
    cell: int = 0
    said: str = ""  # the last line of its log
    process: execute.CONTEXT.Process | None = None
    alive: object = field(default=None, repr=False)  # the process ends when this closes: with us, whatever ends us
    started: float = 0.0
    seconds: float = 0.0
    ok: bool = False
    reader: object = field(default=None, repr=False)

    def start(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.failed.unlink(missing_ok=True)
        Path(self.env["RUN_ALL_JOURNAL"]).unlink(missing_ok=True)
        Path(self.spec["scratch"]).mkdir()
        self.started = time.monotonic()
        self.log.write_bytes(b"")
        theirs, self.alive = execute.CONTEXT.Pipe(duplex=False)
        process = execute.CONTEXT.Process(target=execute.main, args=[self.spec, self.log, self.env, theirs])
        process.start()
        theirs.close()
        self.process = process
        self.reader = self.log.open(encoding="utf-8", errors="replace", newline="")

    @property
    def failed(self) -> Path:
        """Where a notebook that failed is kept, for a look at it."""
        return self.log.with_name(f"{self.name}.failed.ipynb")

    def follow(self) -> None:
        """Read what the log has gained: the cell it is at, and its last line (progress bars included)."""
        if self.reader is None or self.reader.closed:  # interrupted while it started, or at its end
            return
        self.seconds = time.monotonic() - self.started
        for line in execute.ANSI.sub("", self.reader.read()).replace("\r", "\n").split("\n"):
            if at := execute.AT_CELL.match(line):
                self.cell, self.said = int(at[1]), ""
            elif line.strip() and not line.startswith("Ending Cell "):
                self.said = line.strip()

    def finish(self) -> None:
        """Put the result of an ended process where it belongs."""
        self.follow()
        self.reader.close()
        self.alive.close()
        self.ok = self.process.exitcode == 0
        if self.ok:
            notebook = dumps(clean(json.loads(self.part.read_text(encoding="utf-8"))))
            as_run = jupytext.writes(nbformat.reads(notebook, as_version=4), "py:percent")
            write_bytes(self.final, notebook.encode())
            write_bytes(self.log.with_suffix(".py"), as_run.encode())  # for check_pairs.edited
        elif self.part.exists():
            shutil.move(self.part, self.failed)

    def stop(self) -> None:
        """Kill it with all its descendants; nothing half-written stays."""
        if self.process.is_alive():  # its number may be another's by now
            execute.kill_tree(self.process.pid)
        self.process.join()
        self.follow()

    def state(self) -> str:
        return f"{self.name} cell {self.cell}/{self.cells}, {duration(self.seconds)}"


def clean_environment() -> dict:
    """The reader's environment without what would change results or pictures: the same on every machine."""
    rc = Path(importlib.util.find_spec("matplotlib").origin).parent / "mpl-data/matplotlibrc"
    env = {name: value for name, value in os.environ.items() if not name.startswith(LEAKS)}
    env |= {"PYTHONHASHSEED": "0", "PYTHONNOUSERSITE": "1", "PYTHONPATH": str(HERE), "PYTHONUTF8": "1",
            "LC_ALL": "C.UTF-8", "MATPLOTLIBRC": str(rc), "MPLBACKEND": INLINE}  # fmt: skip
    env["OMP_NUM_THREADS"] = env.get("OMP_NUM_THREADS") or "1"  # another number changes the last digits
    return env


def environment(layout: Layout, profile: str, *, private: bool = False) -> dict:
    """The environment of a notebook: the clean one, and the variables that are ours.

    Folders that the caller gives win; they are taken from where the caller is.

    Args:
        private: figures go to build/, not to figures/.
    """
    build = layout.build / profile
    folders = {"FIGURES_DIR": build / "figures" if private else layout.figures / profile}
    folders |= {"RUNS_DIR": build / "runs" if profile == TINY else None, "DATA_DIR": None}
    env = clean_environment() | {"PROFILE": profile}
    for name, folder in folders.items():
        if folder or env.get(name):
            env[name] = os.path.abspath(folder_from_environment(name, folder))
    return env


def make_jobs(layout: Layout, sections: dict, timeout: int, scratch: Path) -> list[Job]:
    """A job per notebook, the longest of the last run first, so that none is left to run alone at the end.

    Args:
        sections: {notebook: (profile, private, parameters to change)}
    """
    profile_of = {name: profile for name, (profile, _, _) in sections.items()}
    times = {profile: recorded_times(layout, profile) | read_times(layout, profile) for profile in profile_of.values()}
    jobs = []
    for name in sorted(sections, key=lambda name: (-times[profile_of[name]].get(name, float("inf")), name)):
        profile, private, parameters = sections[name]
        build, asked = layout.build / profile, profiles.QUICK if profile == profiles.MINE else profile
        source, own = layout.notebooks / f"{name}.py", scratch / str(len(jobs))
        part = own / f"{name}.ipynb"
        spec = {
            "source": str(source), "output": str(part), "cwd": str(layout.notebooks), "timeout": timeout,
            "parameters": {**parameters, "profile": asked}, "scratch": str(own),
        }  # fmt: skip
        final = (layout.notebooks if profile == profiles.QUICK else build) / f"{name}.ipynb"
        cells = len(jupytext.read(source).cells) + 1  # papermill adds one with the parameters
        env = environment(layout, profile, private=private) | {"RUN_ALL_JOURNAL": str(build / f"{name}.runs.json")}
        jobs.append(Job(name, final, part, build / f"{name}.log", spec, env, cells))
    return jobs


def read_times(layout: Layout, profile: str) -> dict[str, float]:
    """Seconds that each notebook took last time; empty when that is not known."""
    return read_if_whole(layout.build / profile / "times.json")


def recorded_times(layout: Layout, profile: str) -> dict[str, float]:
    """Seconds of computing of each notebook from nothing, with all that it uses, where its figures were made."""
    return {name: use["seconds"] + sum(run["seconds"] for run in use["runs"])
            for name, use in records_of_use(layout, profile).items()}  # fmt: skip


def records_of_use(layout: Layout, profile: str) -> dict[str, dict]:
    """What each notebook used when its figures were made, and how long that took (`NAME.uses.json`)."""
    found = {}
    for path in sorted((layout.figures / profile).glob("[!.]*.uses.json")):
        with contextlib.suppress(OSError, ValueError):  # cut, or not to be read: a time is not worth a failure
            found[path.name.removesuffix(".uses.json")] = {"seconds": 0, "runs": []} | read_json(path)
    return found
