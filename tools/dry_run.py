"""What a run would train and what it would find, from the records that earlier runs left (`NAME.uses.json`)."""

from collections import Counter
from pathlib import Path

from jobs import HERE, Job, duration

from lib.files import read_json


def uses(job: Job) -> dict:
    """What the notebook used when its figures were made; empty when that is not known."""
    path = Path(job.env["FIGURES_DIR"]) / f"{job.name}.uses.json"
    return read_json(path) if path.exists() else {}


def state(run: dict, job: Job) -> str:
    """Where a run is: "found" with where and when it was made, "committed", or "to be made"."""
    runs = Path(job.env.get("RUNS_DIR") or HERE / "runs")
    for path in (runs / run["run"] / "run.json", runs / f"{run['run']}.json"):
        if path.exists():
            made = read_json(path).get("made", {})
            return f"found, made on {made.get('device', 'an unknown machine')}, {made.get('date', 'date unknown')}"
    if (Path(job.env["FIGURES_DIR"]) / "cells" / f"{run['run']}.json").exists():
        return "from committed cells"
    return "to be made: no such run in " + (job.env.get("RUNS_DIR") or "runs/")


def table(jobs: list[Job]) -> str:
    """A line per notebook and state, with the seconds that what is missing took where it was made."""
    width, lines = max(len(job.name) for job in jobs), []
    for job in sorted(jobs, key=lambda job: job.name):
        record = uses(job)
        counts, missing = Counter(), 0.0
        for run in record.get("runs", []):
            counts[where := state(run, job)] += 1
            missing += run.get("seconds", 0) if where.startswith("to be made") else 0
        about = f"trains for about {duration(missing)}" if record else "has not run here: all is made, time unknown"
        lines.append(f"{job.name:{width}}  {about}")
        lines += [f"{'':{width}}  {count:4} {where}" for where, count in sorted(counts.items())]
    return "\n".join(lines)
