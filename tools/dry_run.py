"""What a run would train and what it would find, from the records that earlier runs left (`NAME.uses.json`, cells)."""

import re
from collections import Counter, defaultdict
from fractions import Fraction
from pathlib import Path
from statistics import median
from types import SimpleNamespace

from jobs import HERE, Job, duration
from profiles import parameters

from lib.files import checksum, read_if_whole


def uses(job: Job) -> dict:
    """What the notebook used when its figures were made; empty when that is not known."""
    return read_if_whole(Path(job.env["FIGURES_DIR"]) / f"{job.name}.uses.json")


def changed(record: dict, job: Job) -> list[str]:
    """What is asked for otherwise than when that record was made: its runs are not those that would be needed now."""
    if "asked" not in record:
        return []
    from lib import recipes, runs  # takes seconds: only where there is something to compare

    asked = parameters(Path(job.spec["source"])) | job.spec["parameters"]
    now = {"parameters": checksum(asked), "version": runs.VERSION}
    now |= {name: checksum(recipes.get(name, asked.get("changes"))) for name in recipes.RECIPES}
    words = {"parameters": "its parameters", "version": "the version of training"}
    return [words.get(key, f"the recipe {key}") for key, value in record["asked"].items() if now.get(key) != value]


def state(run: dict, job: Job) -> str:
    """Where a run is: "found" with where and when it was made, or "to be made"."""
    runs = Path(job.env.get("RUNS_DIR") or HERE / "runs")
    trained, remembered = runs / run["run"] / "run.json", runs / f"{run['run']}.json"
    made = read_if_whole(trained.with_name("made.json")) if trained.exists() else {}
    if made := read_if_whole(remembered).get("made") or made:
        return f"found, made on {made['device']}, {made['date']}"
    return "to be made: no such run in " + (job.env.get("RUNS_DIR") or "runs/")


def whole(paths, within: str) -> list[dict]:
    """The records in these files, those that say where they were made, and have this within; the rest is passed over,
    since a notebook that reads it says what is wrong with it."""
    return [record for record in map(read_if_whole, paths)
            if isinstance(made := record.get("made"), dict) and within in made]  # fmt: skip


def committed(job: Job) -> Counter:
    """Cells and masks that stand and are not made again, of this profile or of others, by profile and machine."""
    source, own, found = Path(job.spec["source"]), Path(job.env["FIGURES_DIR"]), Counter()
    asked = parameters(source) | job.spec["parameters"]
    if "cells.read(" in source.read_text(encoding="utf-8"):  # which reads those in figures/ wherever its own go
        folders = {path.parent.name: path for path in source.parents[1].glob("figures/*/cells")}
        folders[job.env["PROFILE"]] = own / "cells"
        if not asked.get("keep_cells"):
            del folders[job.env["PROFILE"]]  # made again, as one is that was cut
        for profile, folder in folders.items():
            for cell in whole(folder.glob("[!.]*/[!.]*.json"), "training"):
                made = cell["made"]["training"]
                found[f"committed cells of the profile {profile}, made on {made['device']}, {made['date']}"] += 1
    if asked.get("keep_masks"):
        for value in whole(own.glob("other-data/[!.]*.json"), "device"):
            found["committed masks of networks, made on {device}, {date}".format(**value["made"])] += 1
    return found


def images(settings: dict, source: str) -> tuple[int, int]:
    """How many training images a recipe asks for, and how many a cell had, as its words on its data say."""
    counts = [int(count.replace(",", "")) for count in re.findall(r"([\d,]+) \+ [\d,]+", source)]
    return min(settings["images"][0] or counts[0], counts[0]), counts[-1]


def stands(folder: Path, recipe: str, settings: dict, arm: str, which: dict, more: int = 0) -> bool:
    """As `cells.stands`, of as many images (`more`: beside the recipe's), whatever their pixels: to load those would
    take longer than all else."""
    from lib import cells  # takes seconds, as `recipes` does: only where cells are asked for

    there = read_if_whole(cells.path_of(folder, {"recipe": recipe, "arm": arm, "config": which}))
    if not there:
        return False
    asked, had = images(settings, there["data"])
    data = SimpleNamespace(source=there["data"], fingerprint=there["fingerprint"])
    beside = {entry["n"] for entry in there.get("masks", []) if entry["part"] == "more"}
    return (
        asked == had and (not more or beside == {more}) and cells.stands(folder, recipe, settings, arm, data, **which)
    )


def seconds(cell: dict, settings: dict, more: int = 0) -> float:
    """What a cell would take where it was made, under other settings, as docs/scaling.md counts.

    Its attacks see neither the training images nor the epochs, and cost more in a wider network alone.
    """
    had, (asked, there) = cell["config"], images(settings, cell["data"])
    longer = asked * settings["epochs"] * (settings["num_steps"] + 1.5)
    longer /= there * had["epochs"] * (had["num_steps"] + 1.5)
    took = {part: made["seconds"] for part, made in cell["made"].items()}
    beside = next((more / entry["n"] for entry in cell["masks"] if more and entry["part"] == "more"), 0)
    each = longer * took["training"] + took["attacks"] + beside * took.get("more", 0)
    return (settings["width"] / had["width"]) ** 2 * each


def speeds(folder: Path, recipe: str, settings: dict, more: int = 0) -> dict[str, float]:
    """{machine: median seconds of a cell of this recipe}, by the cells of all profiles; with masks of `more` images, by
    those that have some."""
    found = defaultdict(list)
    paths = folder.glob(f"*/cells/{recipe.replace(' ', '-')}-eps*/[!.]*.json")
    for cell in whole(paths, "training"):
        made = cell["made"]["training"]
        # What a wider network takes on a GPU cannot be told from a narrow one, which leaves most of it idle.
        alike = "NVIDIA" not in made["device"] or cell["config"]["width"] == settings["width"]
        if alike and (not more or "more" in cell["made"]):
            found[f"{made['device']}, {made['precision']}"].append(seconds(cell, settings, more))
    return {machine: median(times) for machine, times in found.items()}


def missing_cells(job: Job):
    """(seeds missing, seeds there, title, {machine: seconds of those missing}) of each item of `todo` and arm."""
    source, own = Path(job.spec["source"]), Path(job.env["FIGURES_DIR"]) / "cells"
    asked, known = parameters(source) | job.spec["parameters"], {}
    if not asked.get("keep_cells"):  # all are made again, and the record of uses knows of them
        return
    from lib import cells, recipes

    for item in asked.get("todo", []):
        recipe, lr, seeds, more = item["recipe"], item["lr"], asked["seeds"][: item["seeds"]], item.get("more", 0)
        settings, eps = recipes.get(recipe, asked.get("changes")), float(Fraction(item["eps"]))
        if (recipe, more) not in known:
            known[recipe, more] = speeds(source.parents[1] / "figures", recipe, settings, more)
        for arm in item["arms"]:
            there = sum(stands(own, recipe, settings, arm, {"eps": eps, "lr": lr, "seed": seed}, more)
                        for seed in seeds)  # fmt: skip
            title, count = f"{recipe}, eps {cells.budget(eps)}, lr {lr:g}, {arm}", len(seeds) - there
            yield count, there, title, {machine: count * each for machine, each in known[recipe, more].items()}


def rough(time: float) -> str:
    """Seconds as one says them of what is only expected."""
    unit, size = next((pair for pair in (("days", 86400), ("h", 3600), ("min", 60)) if time >= 2 * pair[1]), ("s", 1))
    return f"{time / size:.0f} {unit}"


def cell_lines(job: Job) -> list[str]:
    """Lines on the cells that are missing, and on all of them together, by the machines that made such cells."""
    every, totals, known = list(missing_cells(job)), Counter(), Counter()
    rows = [row for row in every if row[0]]
    for count, _, _, times in rows:
        totals.update(times)
        known.update(dict.fromkeys(times, count))
    number, left = {machine: i for i, machine in enumerate(sorted(totals), 1)}, sum(row[0] for row in rows)
    lines = [f"{left:4} of {left + sum(row[1] for row in every)} cells are missing, by their settings (pixels are not "
             "compared here)"] if every else []  # fmt: skip
    for count, there, title, times in rows:
        said = ", ".join(f"{rough(times[machine])} [{i}]" for machine, i in number.items() if machine in times)
        lines.append(f"{count:4} missing, {there} there: {title}: {said or 'in a time that is not known'}")
    for machine, i in number.items():
        lines.append(f"{known[machine]:4} of these {left}: {rough(totals[machine])} one by one on [{i}] {machine}")
    note = "     by cells made there, as docs/scaling.md counts; what wider networks take on a GPU stands there"
    return lines + [note] * bool(number)


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
        if of_cells := cell_lines(job):
            about = about.removesuffix(", in a time that is not known")
        if other := changed(record, job):
            about = f"trains for a time that is not known: {', '.join(other)} changed since its last run, which used"
        lines.append(f"{job.name:{width}}  {about}")
        lines += [f"{'':{width}}  {count:4} {where}" for where, count in sorted(counts.items())]
        lines += [f"{'':{width}}  {line}" for line in of_cells]
    return "\n".join(lines)
