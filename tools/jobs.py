"""One notebook of a run: its process, its files and how far it is."""

import contextlib
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import jupytext
import profiles
from execute import ANSI, kill_tree
from layout import Layout
from nbclean import clean, dumps

from lib.files import write_bytes

TINY = "tiny"


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    whole = round(seconds)
    return f"{whole} s" if whole < 120 else f"{whole // 60} min {whole % 60:02d} s"


@dataclass
class Job:
    """One notebook of a run: where it goes, and how far it is."""

    name: str
    final: Path  # the clean executed notebook, written only when all of it ran
    part: Path  # what papermill writes while it runs
    log: Path
    spec: dict  # what tools/execute.py is told
    cells: int
    cell: int = 0
    said: str = ""  # the last line of its log
    process: subprocess.Popen | None = None
    started: float = 0.0
    seconds: float = 0.0
    ok: bool = False
    reader: object = field(default=None, repr=False)

    def start(self, env: dict) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.failed.unlink(missing_ok=True)
        Path(self.spec["scratch"]).mkdir()
        self.started = time.monotonic()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("execute.py"))],
                stdin=subprocess.PIPE, stdout=log, stderr=log, env=env, start_new_session=True,
            )  # fmt: skip
        with contextlib.suppress(BrokenPipeError):  # it died at once; its log says why
            self.process.stdin.write(json.dumps(self.spec).encode() + b"\n")
            self.process.stdin.flush()  # and stays open: its end would tell the child that we are gone
        self.reader = self.log.open(encoding="utf-8", errors="replace", newline="")

    @property
    def failed(self) -> Path:
        """Where a notebook that failed is kept, for a look at it."""
        return self.part.with_name(f"{self.name}.failed.ipynb")

    def follow(self) -> None:
        """Read what the log has gained: the cell it is at, and its last line (progress bars included)."""
        if self.reader is None:  # interrupted while it started
            return
        self.seconds = time.monotonic() - self.started
        for line in ANSI.sub("", self.reader.read()).replace("\r", "\n").split("\n"):
            if line.startswith("Executing Cell "):
                self.cell, self.said = int(line.removeprefix("Executing Cell ").rstrip("-")), ""
            elif line.strip() and not line.startswith("Ending Cell "):
                self.said = line.strip()

    def finish(self) -> None:
        """Put the result of an ended process where it belongs."""
        self.follow()
        self.reader.close()
        self.process.stdin.close()
        self.ok = self.process.returncode == 0
        if self.ok:
            notebook = json.loads(self.part.read_text(encoding="utf-8"))
            write_bytes(self.final, dumps(clean(notebook)).encode())
            self.part.unlink()
        elif self.part.exists():
            os.replace(self.part, self.failed)

    def stop(self) -> None:
        """Kill it with all its descendants; nothing half-written stays."""
        kill_tree(self.process.pid)
        self.process.wait()
        self.follow()
        self.part.unlink(missing_ok=True)

    def state(self) -> str:
        return f"{self.name} cell {self.cell}/{self.cells}, {duration(self.seconds)}"


def environment(layout: Layout, profile: str) -> dict:
    """The environment of the notebooks. Folders that the caller gives win; they are taken from where the caller is."""
    small = layout.build / TINY
    folders = {"FIGURES_DIR": layout.figures / profile, "RUNS_DIR": None, "DATA_DIR": None}
    if profile == TINY:
        folders |= {"FIGURES_DIR": small / "figures", "RUNS_DIR": small / "runs"}
    env = {**os.environ, "PYTHONHASHSEED": "0"}
    env.setdefault("OMP_NUM_THREADS", "1")  # one and two threads differ in the last digits, and training amplifies it
    for name, folder in folders.items():
        if folder := env.get(name) or folder:
            env[name] = os.path.abspath(folder)
    return env


def make_jobs(layout: Layout, profile: str, sections: dict, timeout: int, scratch: Path) -> list[Job]:
    """A job per notebook, the longest of the last run first, so that none is left to run alone at the end."""
    build = layout.build / profile
    times = recorded_times(layout, profile) | read_times(layout, profile)
    jobs = []
    for name in sorted(sections, key=lambda name: (-times.get(name, float("inf")), name)):
        source, part = layout.notebooks / f"{name}.py", build / f"{name}.part.ipynb"
        spec = {
            "source": str(source), "output": str(part), "cwd": str(layout.notebooks), "timeout": timeout,
            "parameters": {**sections[name], "profile": profile}, "scratch": str(scratch / str(len(jobs))),
        }  # fmt: skip
        final = (layout.notebooks if profile == profiles.QUICK else build) / f"{name}.ipynb"
        cells = len(jupytext.read(source).cells) + 1  # papermill adds one with the parameters
        jobs.append(Job(name, final, part, build / f"{name}.log", spec, cells))
    return jobs


def read_times(layout: Layout, profile: str) -> dict[str, float]:
    """Seconds that each notebook took last time; empty when that is not known."""
    try:
        return json.loads((layout.build / profile / "times.json").read_text())
    except (OSError, ValueError):
        return {}


def recorded_times(layout: Layout, profile: str) -> dict[str, float]:
    """Seconds that each notebook took where its figures were made: a guess for a checkout where nothing ran yet."""
    times: dict[str, float] = {}
    for path in (layout.figures / profile).glob("*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            record = json.loads(path.read_text(encoding="utf-8"))
            times[record["notebook"]] = max(times.get(record["notebook"], 0.0), record["wall_time_s"])
    return times
