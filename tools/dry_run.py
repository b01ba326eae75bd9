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
    """Where a run is: "found" with where and when it was made, or "to be made"."""
    runs = Path(job.env.get("RUNS_DIR") or HERE / "runs")
    trained, remembered = runs / run["run"] / "run.json", runs / f"{run['run']}.json"
    if trained.exists() or remembered.exists():
        made = read_json(remembered)["made"] if remembered.exists() else read_json(trained.with_name("made.json"))
        return f"found, made on {made['device']}, {made['date']}"
    return "to be made: no such run in " + (job.env.get("RUNS_DIR") or "runs/")


def committed(job: Job) -> Counter:
    """Cells that stand and are not made again, of this profile or of others, by profile and machine."""
    own, found = Path(job.env["FIGURES_DIR"]), Counter()
    if "cells.read(" in Path(job.spec["source"]).read_text(encoding="utf-8"):
        for path in own.parent.glob("*/cells/*/*.json"):
            if not path.is_relative_to(own) or job.spec["parameters"].get("keep_cells"):
                made = read_json(path)["made"]["training"]
                profile = path.relative_to(own.parent).parts[0]
                found[f"committed cells of the profile {profile}, made on {made['device']}, {made['date']}"] += 1
    return found


def table(jobs: list[Job]) -> str:
    """A line per notebook and state, with the seconds that what is missing took where it was made."""
    width, lines = max(len(job.name) for job in jobs), []
    for job in sorted(jobs, key=lambda job: job.name):
        record = uses(job)
        counts, missing = committed(job), 0.0
        for run in record.get("runs", []):
            counts[where := state(run, job)] += 1
            missing += run.get("seconds", 0) if where.startswith("to be made") else 0
        about = (
            f"trains for about {duration(missing)}"
            if record
            else "has not run here: it makes what is missing, in a time that is not known"
        )
        lines.append(f"{job.name:{width}}  {about}")
        lines += [f"{'':{width}}  {count:4} {where}" for where, count in sorted(counts.items())]
    return "\n".join(lines)
