"""Evidence that travels: what a trained network got wrong, image by image, as a small record that can be committed.

A cell is one run in a table: a recipe at an eps, an arm, a learning rate, a seed. An arm is the name of a schedule of
the budget, with "periodic " before it if it begins again. A cell's masks are of three networks, in the images for
testing and in those set aside for choosing: "end", the last one; "ensemble", where the recipe has periods, the mean of
those at their ends, which of an arm without periods are its own checkpoints at the same epochs; "best", where images
are set aside, of all that the run kept the one with the least robust error on these. Of "end" there may be masks of
more images, too, for a comparison that asks for them. A cell stands in
figures/<profile>/cells/<recipe>-eps<eps>/<arm>-lr<rate>-seed<seed>.json.
"""

import math
import re
from dataclasses import asdict, replace
from decimal import ROUND_HALF_UP, Decimal
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from . import audit, cluster, compute, inference, recipes, runs, training
from .evaluation import wrong
from .files import ROOT, as_json, checksum, read_if_whole, read_json, write_json
from .models import Ensemble

NAMES = {"lenet": "LeNet", "vgg": "VGG16", "vgg16": "VGG16", "resnet": "ResNet18", "resnet18": "ResNet18",
         "mnist": "MNIST", "mnist5k": "MNIST (5,000)", "mnistm": "MNIST-M stand-in", "fashionmnist": "Fashion-MNIST",
         "cifar10": "CIFAR-10", "const": "constant", "cosine_misread": "cosine in the wrong unit",
         "relu": "ReLU", "elu": "ELU"}  # fmt: skip
# What is asked of a row: two (arm, network), the first of which should err less.
QUESTIONS = {
    "periodic ensemble - single run": (("periodic cosine", "ensemble"), ("cosine", "end")),
    "last period alone - single run": (("periodic cosine", "end"), ("cosine", "end")),
    "periodic ensemble - its last network": (("periodic cosine", "ensemble"), ("periodic cosine", "end")),
    "periodic ensemble - single run's checkpoints": (("periodic cosine", "ensemble"), ("cosine", "ensemble")),
    "single run's checkpoints - its end": (("cosine", "ensemble"), ("cosine", "end")),
    "single run's best - its end": (("cosine", "best"), ("cosine", "end")),
    "misread unit - cosine": (("cosine_misread", "end"), ("cosine", "end")),
    "periodic misread unit - periodic": (("periodic cosine_misread", "ensemble"), ("periodic cosine", "ensemble")),
    "periodic constant ensemble - single constant": (("periodic constant", "ensemble"), ("constant", "end")),
    "periodic linear ensemble - single linear": (("periodic linear", "ensemble"), ("linear", "end")),
    "cosine - constant": (("cosine", "end"), ("constant", "end")),
    "linear - constant": (("linear", "end"), ("constant", "end")),
}
PAPER = ("eps 8/255", "eps 0.4")  # how the titles of rows end that the paper has, too
FEWEST = 3  # of fewer seeds no interval is given,
WIDE = 0.1  # and none that decides nothing and reaches further than this to each side
FIGURES = ROOT / "figures"
ARM = ("schedule", "schedule_stop", "restarts", "lr", "seed")  # by these settings the cells of one row may differ


def configure(settings, arm, **changes):
    """The TrainConfig of an arm, such as "cosine" or "periodic cosine", under a recipe's settings."""
    *again, schedule = str(arm).split() or [""]
    if again not in ([], ["periodic"]):
        raise ValueError(f"{arm!r} is no arm: it is the name of a schedule, or 'periodic' and one")
    if again and not settings.get("periods"):
        raise ValueError(f"there is no arm {arm!r}: the recipe has no periods")
    return recipes.configure(settings, schedule=schedule, restarts=settings["periods"] if again else (), **changes)


def attacks(eps, seed, *, norm="linf", steps, step_fraction, strong_steps, queries, one_step=False):
    """PGD from a point of the ball, and the stronger ones, FGSM if asked: {name: a function (model, x, y) -> x_adv}."""
    named = partial(audit.attack_by_name, seed=seed, device=compute.device(), eps=eps, norm=norm)
    first = named("pgd", step_size=step_fraction * eps, num_steps=steps, random_start="ball", stop_early=True)
    apgd = f"APGD-{strong_steps}"
    names = {f"{apgd} CE": "apgd-ce", f"{apgd} DLR": "apgd-dlr", f"Square-{queries}": "square"}
    spent = {"num_steps": strong_steps, "num_restarts": 1, "num_queries": queries}
    strong = {label: named(name, **spent) for label, name in names.items()}
    return {f"PGD-{steps}": first} | strong | ({"FGSM": named("fgsm")} if one_step else {})


def mistakes(model, x, y, attacks):
    """{"clean" and each attack: a mask (N,)}: as of `evaluation.wrong`, so that no attack is spent on what is wrong."""
    return {name: wrong(model, x, y, attack).cpu().numpy() for name, attack in ({"clean": None} | attacks).items()}


def make(recipe, settings, arm, data, aside, *, more=None, **changes):
    """Train, or find, a run, and measure its cell; both are found again (`runs`).

    Args:
        recipe, settings: a recipe's name and its settings, with plan and periods.
        arm: as for `configure`.
        data, aside: of `recipes.load`.
        more: None, or Data of `recipes.more`, in whose test part the attacks see the last network, too: PGD in all of
            it, the others in the first of it, as large a share as in the plan.
        changes: of the settings: eps, lr, seed.
    Returns:
        A dict, for `write`.
    Raises:
        ValueError: periods that the run will not keep; nothing is trained then.
    """
    config, plan, periods = configure(settings, arm, **changes), settings["plan"], settings["periods"]
    if sorted({*periods}) != list(periods) or not {*periods} <= {*config.kept[1:-1]}:
        raise ValueError(f"periods {list(periods)} of {recipe!r} must increase, end before epoch {config.epochs}, be "
                         f"multiples of keep_every ({config.keep_every}): their networks are needed")  # fmt: skip
    run = runs.run(config, data)
    facts = {"run": run.folder.name, "aside": aside and aside.fingerprint, "plan": plan, "periods": periods}
    measured = runs.remember("cells", facts, lambda: _measure(run, data, aside, periods, **plan), version=2)
    masks, made = measured["masks"], {"training": run.made, "attacks": measured["made"]}
    if more:
        facts = {"run": run.folder.name, "more": more.fingerprint, "plan": plan}
        beside = runs.remember("cells", facts, lambda: _measure_more(run, more, **plan), version=3)
        masks, made = masks + beside["masks"], made | {"more": beside["made"]}
    return _asked(recipe, arm, run.config, data, settings, more) | {"masks": masks, "made": made}


def ahead(jobs, data):
    """Have the workers of a cluster, where there is one (`cluster`), make these cells, for `make` to find.

    Args:
        jobs: (recipe, settings, arm, changes) of each, as for `make`.
        data: {recipe: (data, aside)}.
    """
    if cluster.address():
        folder = runs.shared_dir()
        named = {recipe: [d and (d.origin, d.fingerprint, runs.VERSION) for d in of] for recipe, of in data.items()}
        tasks = {f"cell {checksum([folder, job, named[job[0]]])}": (folder, *job, *named[job[0]]) for job in jobs}
        cluster.each(_make_there, tasks, "cells on workers")


def _make_there(folder, recipe, settings, arm, changes, *named):
    make(recipe, settings, arm, *(d and cluster.on_worker(folder, *d) for d in named), **changes)


def _asked(recipe, arm, config, data, settings, more=None):
    asked = {"recipe": recipe, "arm": arm, "config": asdict(config), "version": training.VERSION,
             "data": data.source, "fingerprint": data.fingerprint,
             **{name: settings[name] for name in ("plan", "periods", "stops")}}  # fmt: skip
    return as_json(asked | ({"more": more.fingerprint} if more else {}))


def _measure(run, data, aside, periods, *, pgd_images, strong_images, **plan):
    config, began, entries, look = run.config, compute.clock(), [], partial(_look, run)
    (name, first), *others = attacks(config.eps, config.seed, norm=config.norm, **plan).items()
    ends = [*periods, config.epochs]
    networks = {"end": ends[-1:]} | ({"ensemble": ends} if periods else {})
    if aside:
        for epoch in config.kept[1:]:
            entries += look(f"epoch {epoch}", [epoch], "aside", aside, None, {name: first})
        robust = [entry for entry in entries if entry["attack"] == name]
        networks["best"] = min(robust, key=lambda entry: _bits(entry).mean())["epochs"]
    for network, epochs in networks.items():
        entries += look(network, epochs, "test", data, pgd_images, {name: first})
    row = "ensemble" if config.restarts else "end"  # the network that stands in the paper's Table 1
    entries += look(row, networks[row], "strong", data, strong_images, dict(others))
    return {"masks": entries, "made": compute.made(compute.clock() - began)}


def _measure_more(run, more, *, pgd_images, strong_images, **plan):
    """Random points are drawn anew from the seed, so that a test image has other ones than in `_measure`."""
    began, config = compute.clock(), run.config
    (name, first), *others = attacks(config.eps, config.seed, norm=config.norm, **plan).items()
    n = max(1, len(more.y_test) * strong_images // pgd_images)
    end = run, "end", [config.epochs]
    entries = _look(*end, "more", more, None, {name: first})
    entries += _look(*end, "more strong", more, n, dict(others))
    return {"masks": entries, "made": compute.made(compute.clock() - began)}


def _look(run, network, epochs, part, data, n, chosen):
    """The masks of the network at an epoch of a run, or of the ensemble of several, without attack and under each; in
    the first n test images of data, or in all (None)."""
    members = [run.model(epoch) for epoch in epochs]
    net = (Ensemble(members) if len(members) > 1 else members[0]).to(compute.device())
    masks = mistakes(net, *(t[:n].to(compute.device()) for t in (data.x_test, data.y_test)), chosen)
    return [{"network": network, "part": part, "epochs": epochs, "attack": attack, "n": len(mask),
             "wrong": np.packbits(mask).tobytes().hex()} for attack, mask in masks.items()]  # fmt: skip


def _bits(entry):
    """The mask (n,) of an entry of a cell. Raises ValueError where it is none of n images."""
    mask, n = bytes.fromhex(entry["wrong"]), entry["n"]
    if n < 1 or len(mask) != -(-n // 8):
        raise ValueError(f"a mask of {n} images has {len(mask)} bytes")
    return np.unpackbits(np.frombuffer(mask, np.uint8), count=n).astype(bool)


def path_of(folder, cell):
    """Where a cell stands in the folder `cells` of a profile."""
    config = cell["config"]
    row = f"{cell['recipe']}-eps{config['eps']:.3g}".replace(" ", "-")
    name = f"{cell['arm'].replace(' ', '-')}-lr{config['lr']:g}-seed{config['seed']}.json"
    return Path(folder) / row / name


def write(folder, cell):
    """Write a cell; one that stands there and differs only in where it was made stays as it is. Returns its path.

    Raises ValueError where another's stands there: names have a few digits of eps and learning rate only.
    """
    path = path_of(folder, cell)
    there = read_if_whole(path)
    if "config" in there and any(there["config"][name] != cell["config"][name] for name in ("eps", "lr")):
        raise ValueError(f"{path} is of another eps or learning rate: choose ones that differ by more")
    if {**there, "made": None} != {**cell, "made": None}:
        write_json(path, cell)
    return path


def stands(folder, recipe, settings, arm, data, *, more=None, **changes):
    """Whether the folder has a cell of just this config, data and plan, wherever it was made (as for `make`)."""
    asked = _asked(recipe, arm, configure(settings, arm, **changes), data, settings, more)
    there = read_if_whole(path_of(folder, asked))
    return {key: there.get(key) for key in asked} == asked


def read(folders=None):
    """All cells as one table, and what was left out of it.

    Args:
        folders: {profile: its folder of cells}; those in figures/ always come along.
    Returns:
        rows: DataFrame, a line per mask, in an order that the files decide and not the order in which they came:
            profile, recipe, row (cells are compared and averaged within one only: all but arm, learning rate and seed
            is equal there), arm, lr, seed, network, part ("test", "aside", "more"; "strong", "more strong": other
            attacks), kind ("clean", "PGD", ...), attack, epochs, n, wrong (the mask), eps, source, device.
        notes: sentences that name the cells left out (of another version, unreadable, or not what their name says),
            and those that are there twice with unlike masks.
    """
    folders = {path.parent.name: path for path in sorted(FIGURES.glob("*/cells"))} | (folders or {})
    found, notes = [], []
    for profile, folder in sorted(folders.items()):
        for path in sorted(Path(folder).glob("[!.]*/[!.]*.json")):
            where = f"{profile}/{path.parent.name}/{path.stem}"
            try:
                cell = read_json(path)
                if cell["version"] != training.VERSION:
                    raise ValueError(f"it is of version {cell['version']}, and this is {training.VERSION}")
                if path_of(folder, cell) != path:
                    raise ValueError("its name is another cell's")
                found += list(_lines(profile, cell))  # all of them, or none
                runs.note(where, "a cell", "committed", cell["made"]["training"])
            except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
                notes.append(f"{where} is left out: {error}")
    rows = _sorted(found)
    return rows, notes + _mixed(rows) + _unlike(rows)


def table(cells, profile="here"):
    """The rows, as of `read`, of cells that were just made."""
    return _sorted([line for cell in cells for line in _lines(profile, cell)])


def _sorted(lines):
    return pd.DataFrame(lines, columns=COLUMNS).sort_values(COLUMNS[:9], ignore_index=True)


COLUMNS = ["profile", "recipe", "row", "arm", "lr", "seed", "network", "part", "kind", "attack", "epochs", "n", "wrong",
           "eps", "source", "device", "trained"]  # fmt: skip


def _lines(profile, cell):
    """The lines of a cell: what its row has in common is hashed, so that nothing unlike is averaged. Where budgets go
    and when periods begin differ by arm in one row, and so the recipe's `stops` and `periods` stand for them."""
    config = cell["config"]
    common = {key: value for key, value in config.items() if key not in ARM}
    row = checksum([common, *(cell[name] for name in ("fingerprint", "plan", "periods", "stops"))])
    made = cell["made"]["training"]
    about = {"profile": profile, "recipe": cell["recipe"], "row": f"{profile}-{row[:6]}", "arm": cell["arm"],
             "lr": config["lr"], "seed": config["seed"], "eps": config["eps"], "source": cell["data"],
             "device": f"{made['device']}, {made['precision']}",
             "trained": "w={width}, {epochs} epochs, PGD-{num_steps}".format(**config)}  # fmt: skip
    for entry in cell["masks"]:
        kind = re.sub(r"-\d+", "", entry["attack"])  # PGD-10 and PGD-40 are of one kind
        yield about | entry | {"kind": kind, "wrong": _bits(entry)}


def _mixed(rows):
    """A sentence for each recipe and eps of a profile whose cells are not of one kind, and so make several rows."""
    kinds = rows.groupby(["profile", "recipe", "eps"])
    return [f"{profile}: the cells of {recipe} at eps {eps:.3g} differ in data or settings, and are kept apart: "
            + "; ".join(f"{row}: {part.groupby(['arm', 'lr', 'seed']).ngroups} cells, {part['source'].iloc[0]}"
                        for row, part in group.groupby("row"))
            for (profile, recipe, eps), group in kinds if group["row"].nunique() > 1]  # fmt: skip


def _unlike(rows):
    """A sentence for each kind of cells that two profiles have of the same runs, and with other masks."""
    same = rows.assign(like=rows["row"].str[-6:], bits=[wrong.tobytes() for wrong in rows["wrong"]])
    of_one = same.groupby(["like", "arm", "lr", "seed", "network", "part", "attack"])
    same["masks"] = of_one["bits"].transform("nunique")
    return [f"{recipe} at eps {eps:.3g}: of {part.groupby(['arm', 'lr', 'seed']).ngroups} runs "
            f"{' and '.join(sorted(set(part['profile'])))} have cells that differ, made on "
            f"{' and '.join(sorted(set(part['device'])))}; each profile is judged by its own"
            for (recipe, eps, _), part in same[same["masks"] > 1].groupby(["recipe", "eps", "like"])]  # fmt: skip


def spelt(text):
    """A text with the names of networks, data and schedules as a reader meets them, such as an arm's."""
    return re.sub(r"\w+", lambda word: NAMES.get(word[0], word[0]), text)


def title(rows):
    """What a row of cells is called: "VGG16, CIFAR-10, eps 8/255"."""
    recipe, eps = rows[["recipe", "eps"]].iloc[0]
    return f"{spelt(recipe.replace(' on ', ', '))}, eps {budget(eps)}"


def budget(eps):
    """An eps as it is written: "8/255" where it is so many of 255 shades, else "0.1"."""
    shades = 255 * eps
    return f"{round(shades)}/255" if 0.5 < shades < 51 and abs(shades - round(shades)) < 1e-3 else f"{eps:g}"


def masks(rows, arm, lr, network="end", part="test", kind="PGD"):
    """{seed: mask} of an arm at a learning rate. rows: of one row. Raises ValueError where a seed has two."""
    asked = {"arm": arm, "lr": lr, "network": network, "part": part, "kind": kind}
    chosen = rows[np.logical_and.reduce([rows[column] == value for column, value in asked.items()])]
    if chosen["seed"].duplicated().any():
        raise ValueError(f"two masks of one seed: the cells are of more than one row ({', '.join(set(chosen['row']))})")
    return dict(zip(chosen["seed"].tolist(), chosen["wrong"], strict=True))


def by_attack(cell, part="test", strong="strong"):
    """{attack: mask} of one network, on all images of it; and on those that all have seen, the worst case beside it.

    cell: the lines of one network of a cell, or of its `part` and `strong`. Raises ValueError for those of several.
    """
    if cell[["part", "kind"]].duplicated().any():
        raise ValueError("two masks of one attack: the lines are of more than one network")
    by = {kind: of_kind["wrong"].iloc[0] for kind, of_kind in cell[cell["part"] == part].groupby("kind")}
    others = cell[(cell["part"] == strong) & (cell["attack"] != "clean")]
    by |= dict(zip(others["kind"], others["wrong"], strict=True))
    first = {kind: mask[: min(map(len, by.values()))] for kind, mask in by.items()}
    return by, first | {"worst": audit.worst_case(first)}


def pair(first, second):
    """Of two dicts {seed: mask}: two arrays (seeds, images) of what both have, for `inference`, and the seeds."""
    seeds = sorted(first.keys() & second.keys())
    n = min([len(m[s]) for m in (first, second) for s in seeds], default=0)
    return *(np.array([m[s][:n] for s in seeds]).reshape(len(seeds), n) for m in (first, second)), seeds


def both(rows, first, second, kind="PGD"):
    """What `pair` has of two arms of a row, each as (arm, lr) or (arm, lr, network): of more images where `as_many`
    seeds have these, else of the test images."""
    more, test = (pair(*(masks(rows, *asked, part=part, kind=kind) for asked in (first, second)))
                  for part in ("more", "test"))  # fmt: skip
    return more if as_many(more[-1], test[-1]) else test


def as_many(more, test):
    """Whether more images are judged by: of the seeds of both arms as many have these as have the test images."""
    return len(more) >= max(1, len(test))


def counted(rows, first, second):
    """How many seeds two arms, as for `both`, are compared by; and these and the images, as a text."""
    masks, _, seeds = both(rows, first, second)
    beside = masks.shape[1] - rows[rows["part"] == "test"]["n"].max()
    said = f", {beside:,} of them not of the recipe" if beside > 0 else ""
    return len(seeds), f"{len(seeds)} seed{'s' * (len(seeds) != 1)}, {masks.shape[1]:,} images{said}"


def looked(rows, seeds, *questions):
    """With how many seeds, fewer than these, the verdict on a question of a row (or of what is called so), or on others
    of the same numbers, had been read before, as a text to go on with; figures/overnight/cells/looks.json has them."""
    path = FIGURES / "overnight" / "cells" / "looks.json"
    name = rows if isinstance(rows, str) else title(rows)
    known = read_json(path).get(name, {}) if path.exists() else {}
    before = [str(n) for n in sorted({n for question in questions for n in known.get(question, [])}) if n < seeds]
    return f"; read before with {', '.join(before)}" if before else ""


def judge(rule, a, b):
    """What a rule of `inference.difference` finds of shares of errors; an interval that says nothing is left away: of
    fewer than `FEWEST` seeds, which decide nothing, and an undecided one that reaches further than `WIDE`."""
    found = rule(a, b)
    if not (why := _no_interval(found, a, b)):
        return found
    measured = re.sub(r" \[.*?\]", "", found.measured, count=1)
    return replace(found, outcome="undecided", holds=None, measured=measured, why=why)


def _no_interval(found, a, b):
    """Why no interval is given, or an empty text."""
    if len(a) < FEWEST:
        return f"no interval is given below {FEWEST} seeds"
    wide = found.outcome == "undecided" and WIDE < inference.interval(a, b)[1] < math.inf
    return f"no result: {found.why}" if wide else ""


def compare(rule, rows, first, second, *, kind="PGD"):
    """What a rule finds (`judge`) of two arms, as of `both`."""
    a, b, seeds = both(rows, first, second, kind)
    none = inference.Finding("undecided", None, "nothing", "no cells of a common seed yet")
    return judge(rule, a, b) if seeds else none


def escape(margin):
    """Does an arm leave the plateau on which another stays? A Rule for rows and two arms, the second of which stays,
    each as (arm, lr)."""
    rule = inference.difference("clean error at one learning rate, cosine minus constant", margin=margin)
    text = (f"{rule.text} An escape needs a plateau: undecided, too, where fewer than {inference.THROUGH:.0%} of the "
            f"constant runs are on it; and where more than {1 - inference.THROUGH:.0%} of the cosine runs are, though "
            "their mean be smaller.")  # fmt: skip

    def test(rows, rising, constant):
        found, (*_, seeds) = (of(rows, rising, constant, kind="clean") for of in (partial(compare, rule), both))
        for arm, stays in ((constant, True), (rising, False)):
            on = len({*seeds} & {*stuck(rows, *arm)})
            if (stays or found.holds) and (on if stays else len(seeds) - on) < inference.THROUGH * len(seeds):
                why = f"{on} of {len(seeds)} {spelt(arm[0])} runs are on the plateau"
                return replace(found, outcome="undecided", holds=None, why=why)
        return found

    return inference.Rule(text, test)


def without_one(reading, rows, *arms, seeds):
    """How many readings of rows that leave out one of these seeds keep the verdict, and how many turn it round, as a
    text; empty where nothing is decided. reading: a function (rows, *arms), gives a Finding."""
    if (whole := reading(rows, *arms).holds) is None:
        return ""
    others = [reading(rows[rows["seed"] != seed], *arms).holds for seed in seeds]
    turned = sum({whole, other} == {True, False} for other in others)
    return f"{sum(o == whole for o in others)} of {len(others)}" + f" ({turned} turn it round)" * bool(turned)


def places(rows, first, second):
    """Where two arms of a row, each as (arm, lr), were made, as a text; empty if each seed's two were in one place."""
    made = [rows[(rows["arm"] == arm) & (rows["lr"] == lr)].groupby("seed")["device"].first().to_dict()
            for arm, lr in (first, second)]  # fmt: skip
    common = made[0].keys() & made[1].keys()
    if all(made[0][seed] == made[1][seed] for seed in common):
        return ""
    where = [" and ".join(sorted({of_arm[seed] for seed in common})) for of_arm in made]
    return "; ".join(f"{spelt(arm)} on {there}" for (arm, _), there in zip((first, second), where, strict=True))


def differences(rows, rules, at):
    """A line for each question of `QUESTIONS` that has a rule and cells: mean, half (None where `judge` leaves the
    interval away), the least difference that would be seen (`inference.least_seen`; None of fewer than `FEWEST` seeds),
    n, outcome, why that is undecided, and where the two were made if not in one place.

    at: {arm: its learning rate}; a question about an arm that has none is passed over.
    """
    for what, rule in rules.items():
        (arm, network), (other, end) = QUESTIONS[what]
        lr, than = at.get(arm), at.get(other)
        a, b, seeds = both(rows, (arm, lr, network), (other, than, end))
        if seeds:
            (mean, half), least, found = inference.interval(a, b), inference.least_seen(a, b), judge(rule, a, b)
            half = half if math.isfinite(half) and not _no_interval(found, a, b) else None
            least = least if math.isfinite(least) and len(seeds) >= FEWEST else None
            yield {"difference": what, "lr": lr, "second_lr": than, "mean": mean, "half": half, "least": least,
                   "seeds": len(seeds), "images": a.shape[1], "outcome": found.outcome, "why": found.why,
                   "places": places(rows, (arm, lr), (other, than))}  # fmt: skip


def rates(rows, arm):
    """{learning rate: {seed: robust error of the arm's last network on the images set aside}}."""
    part = rows[(rows["arm"] == arm) & (rows["part"] == "aside") & (rows["kind"] == "PGD")]
    part = part.loc[part["epochs"].map(max).sort_values(kind="stable").index].groupby(["lr", "seed"])["wrong"].last()
    return {lr: {s: float(part[lr, s].mean()) for s in part[lr].index} for lr in part.index.unique("lr")}


def means(rows, arm):
    """{learning rate: mean of its `rates` over the seeds}, for `best_rate`."""
    return {lr: float(np.mean(list(errors.values()))) for lr, errors in rates(rows, arm).items()}


def best_rate(means, tie):
    """The rate of the least mean; one inside the grid where that is worse by less than `tie`. None of none."""
    least = min(means, key=means.get, default=None)
    inner = min(sorted(means)[1:-1], key=means.get, default=least)
    return inner if means and means[inner] - means[least] < tie else least


def stuck(rows, arm, lr):
    """Seeds whose run of an arm is on the plateau: it errs on four images in five, and PGD turns at most one in
    fifty more."""
    clean, attacked = (masks(rows, arm, lr, kind=kind) for kind in ("clean", "PGD"))
    return [s for s in clean if clean[s].mean() >= 0.8 and attacked[s].mean() - clean[s].mean() <= 0.02]


def notation(values):
    """Mean and standard deviation of errors in per cent, as the paper's Table 1 has them: 1.23(4) is 1.23 +- 0.04.

    Both have two decimals, and the bracket counts hundredths, however many: 12.30(125) is 12.30 +- 1.25. Halves are
    rounded away from zero, as by hand. A single value has no standard deviation: 1.23. No value: an empty text.

    Args:
        values: shares in [0, 1], one per seed.
    """
    values = 100 * np.asarray(list(values), float)
    if len(values) == 0:
        return ""
    mean = _round(values.mean())
    return f"{mean}({_round(values.std(ddof=1)) * 100:.0f})" if len(values) > 1 else f"{mean}"


def _round(value):
    # Ten decimals first: what the sum of floats has lost must not decide a half.
    exact = Decimal(f"{value:.10f}")
    return exact.quantize(Decimal("0.01"), ROUND_HALF_UP)
