# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 7. Table 1: schedules, architectures, attacks
#
# Table 1 of Liu et al. (2020) compares budgets over training (*constant*, *linear*, *cosine*) on LeNet (MNIST, eps
# 0.4), VGG16 and ResNet18 (CIFAR-10, eps 8/255), by the clean error and the robust error under PGD, APGD on two losses
# (cross entropy and DLR) and Square, which sees no gradient. LeNet has single runs only. The other two have single and
# *periodic* runs of equally many epochs; in a periodic one budget and learning rate begin again after half and after
# three quarters of the epochs, and the networks at the ends of the periods form an ensemble.
#
# A reviewer's question belongs here: is the gain, "1 to 2 percentage points", more than noise? (Whether a constant
# budget does as well at a learning rate of its own is asked in notebook 6, of the same cells.)
#
# What should be seen if the claims hold: LeNet under a constant budget of 0.4 stays at the error of guessing (the
# *plateau* of notebook 3), and a rising one leaves it; on CIFAR-10 the rising budget ends with smaller errors; the
# ensemble of a periodic run is better than a single run.
#
# The table is put together from *cells*. A cell is one run: its errors, image by image, in a small file in
# `figures/<profile>/cells`. This page makes the cells of its own profile, and shows all that are there: whatever
# machine made them, each row says so.

# %% tags=["parameters"]
profile = "quick"
changes = {}  # of recipes: {recipe: {setting: value}}
seeds = [0, 1, 2]
# What is made here, in this order: each recipe at an eps and a learning rate, its arms, and how many of the seeds.
# more: on how many images that no run of the recipe has learned from or chosen by (`recipes.more`) PGD sees the last
# network, too (and the other attacks on their share): for differences that the images, not the seeds, leave undecided.
todo = [
    {
        "recipe": "lenet on few digits",
        "eps": "0.4",
        "lr": 1e-2,
        "arms": ["constant", "linear", "cosine"],
        "seeds": 3,
        "more": 0,
    },
]
keep_cells = False  # True: a cell that stands there with just these settings is taken, whatever machine made it
minutes = None  # begin no new cell after this long; the table says what is there, and the next run goes on
leaves = 0.2  # a difference in clean error that is an escape
margin = 0.01  # a difference in robust error that matters
# by notebooks 6 and 8: shown here, and not counted again
judged_elsewhere = ["lenet on few digits", "lenet on mnist5k", "lenet on mnist5k in l2",
                    "lenet by the challenge loop on mnist5k", "lenet by fast training on mnist5k"]  # fmt: skip

# %%
import time
from dataclasses import replace
from fractions import Fraction
from functools import partial
from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import Markdown, display
from tqdm import tqdm

from lib import cells, inference, recipes
from lib.figures import SCHEDULE_COLOURS, Book, intervals
from lib.files import write_bytes

pd.set_option("display.max_colwidth", None)  # whatever machine made a cell is to be read
book = Book("07_table1", globals())
settings = {name: book.recipe(name) for name in dict.fromkeys(item["recipe"] for item in todo)}
folder = book.folder / "cells"

# %% [markdown]
# ## Making the cells
#
# One after the other, in the order of `todo` and seed by seed, so that whatever is there when the time is up can be
# compared. A cell is written as soon as its network is trained and attacked. Runs and attacks are kept, so that what
# was broken off goes on. The learning rate is chosen on training images that were set aside, never on test images.

# %%
data = {name: recipes.load(chosen) for name, chosen in settings.items()}
more = {(item["recipe"], n): recipes.more(settings[item["recipe"]], n) for item in todo if (n := item.get("more"))}
wanted = [
    (item["recipe"], settings[item["recipe"]], arm,
     {"eps": float(Fraction(item["eps"])), "lr": item["lr"], "seed": seed},
     more.get((item["recipe"], item.get("more"))))
    for item in todo for seed in seeds[: item["seeds"]] for arm in item["arms"]
]  # fmt: skip
for _, chosen, arm, which, _ in wanted:
    cells.configure(chosen, arm, **which)  # what cannot be trained is refused before anything is
missing = [(*job, which, beside) for *job, which, beside in wanted
           if not (keep_cells and cells.stands(folder, *job, data[job[0]][0], more=beside, **which))]  # fmt: skip
if minutes is None:
    cells.ahead([job for *job, _ in missing], data)  # all at once, where a cluster is at hand
began, left = time.monotonic(), []
for name, chosen, arm, which, beside in tqdm(missing, desc="cells", mininterval=1):
    if minutes is not None and time.monotonic() - began > 60 * minutes:
        left.append(f"{name} {arm} lr {which['lr']:g} seed {which['seed']}")
        continue
    cells.write(folder, cells.make(name, chosen, arm, *data[name], more=beside, **which))
there = len(wanted) - len(left)
print(f"{there} of {len(wanted)} cells of this profile are there; not made:", ", ".join(left) or "none")

# %% [markdown]
# ## What is there
#
# All cells, of this profile and of the others in `figures/`. Cells are compared only where network, data, attack and
# everything else but arm, learning rate and seed are the same; what does not fit is named and left out.

# %%
found, notes = cells.read({book.profile: folder})
display(Markdown("\n".join(f"- {note}." for note in notes) or "No cell had to be left out."))
found["error"] = [wrong.mean() for wrong in found["wrong"]]
of = dict(sorted(found.groupby("row"), key=lambda item: cells.title(item[1])))  # {row: its lines}
names = {row: f"{cells.title(part)} ({part['profile'].iloc[0]})" for row, part in of.items()}
if len(set(names.values())) < len(names):  # cells of one profile that do not belong together
    names = {row: f"{name} [{row[-6:]}]" for row, name in names.items()}


# %%
def trained(part):
    """How the networks of a row were trained, as their cells say."""
    aside = part[part["part"] == "aside"]["n"].max()
    return part["trained"].iloc[0] + (f", without {aside:,.0f} images set aside" if aside > 0 else "")


shares = pd.DataFrame(
    {"row": names[row], "trained": trained(part), "data": part["source"].iloc[0], "made on": place,
     "cells": cells_there.groupby(["arm", "lr", "seed"]).ngroups, "seeds": cells_there["seed"].nunique()}
    for row, part in of.items() for place, cells_there in part.groupby("device")
)  # fmt: skip
shares

# %% [markdown]
# ## The table
#
# Errors in per cent, mean over the seeds; in brackets the standard deviation in units of the last digit, so that
# 1.23(4) means 1.23 +- 0.04, and 12.30(125) means 12.30 +- 1.25. *Worst* counts the images that any of the attacks
# turns. Clean and PGD are of n images, the others of the first m; *PGD of m* is what they compare with. An image that
# is misclassified as it is counts under every attack. A periodic row is its ensemble, attacked as a whole.

# %%
kinds = ["clean", "PGD", "APGD CE", "APGD DLR", "Square"]
lines, worst = [], {}  # worst: masks of the images that all attacks have seen, by part, row, arm, rate and seed
for (row, arm, lr, seed), cell in found.groupby(["row", "arm", "lr", "seed"]):
    cell = cell[cell.network == ("ensemble" if arm.startswith("periodic") else "end")]
    by, first = cells.by_attack(cell)
    worst["test", row, arm, lr, seed] = first
    if (cell.part == "more strong").any():
        worst["more", row, arm, lr, seed] = cells.by_attack(cell, "more", "more strong")[1]
    errors = {kind: by[kind].mean() for kind in kinds} | {f"{kind} of m": first[kind].mean() for kind in kinds[:2]}
    lines.append(
        {"network": names[row], "arm": arm, "lr": lr, "seed": seed, "n": len(by["PGD"]), "m": len(first["PGD"])}
        | errors
        | {"worst": first["worst"].mean(), "made on": cell["device"].iloc[0]}
    )
table = pd.DataFrame(lines).sort_values(["network", "arm", "lr", "seed"], ignore_index=True)

# %%
keys, columns = ["network", "arm", "lr"], ["clean", "PGD", "PGD of m", *kinds[2:], "worst"]
spelt = table.assign(arm=table["arm"].map(cells.spelt))
printed = spelt.groupby(keys)[columns].agg(cells.notation)
printed[["seeds", "n", "m"]] = spelt.groupby(keys).agg({"seed": "size", "n": "min", "m": "min"})
printed["made on"] = spelt.groupby(keys)["made on"].agg(lambda places: "; ".join(sorted(set(places))))
sources = "; ".join(dict.fromkeys(found["source"]))
latex = printed.reset_index().to_latex(index=False, escape=True)
write_bytes(book.folder / "07_table1.tex", f"% {sources}\n{latex}".encode())
with pd.option_context("display.max_rows", None):
    display(printed)

# %% [markdown]
# ## Does a rising budget leave the plateau?
#
# A network is *on the plateau* if it errs on four images in five, and PGD turns at most one in fifty more: it gives
# nearly all images one class. To leave the plateau is to classify at all, so it is judged by the clean error. If few
# constant runs stay there, there was nothing to leave, and a smaller error is no escape (how many are few was set after
# the runs had been seen). The paper has a plateau for LeNet at 0.4 only; of the networks for CIFAR-10 at 8/255 it says
# that both budgets train, and which ends better. It is asked at one learning rate, the recipe's: 0.1 for CIFAR-10, as
# in the paper, and 0.001 for LeNet, ten times the paper's, in a tenth of its epochs. At a smaller one fewer of the
# constant runs stay (the table; notebook 6).
#
# Rows of the profile `overnight` grow seed by seed, and are judged again each time they have grown. Each look errs once
# in a hundred, and the errors of several looks add up: a verdict that came late is weaker than its interval says. Each
# row says with how many seeds it had been read before.


# %%
escape = cells.escape(leaves)
better = inference.difference("clean error, cosine minus constant, at one learning rate", margin=margin)
display(escape, better)

# %%
# The row in which a claim is judged: the one with the most cells, and of equal ones this profile's own.
sizes = found.groupby(["recipe", "eps", "row"]).size().reset_index(name="size")
sizes["own"] = sizes["row"].str.startswith(f"{book.profile}-")
sizes = sizes.sort_values(["size", "own"]).groupby(["recipe", "eps"])["row"].last()
judged = {cells.title(of[row]): row for row in sizes}
claimed = {name: row for name, row in judged.items() if of[row]["recipe"].iloc[0] not in judged_elsewhere}
shown = claimed or judged  # what notebook 6 draws is not drawn again, unless there is nothing else
shown_table = table[table["network"].isin(names[row] for row in shown.values())]
usual = {what: recipes.get(of[row]["recipe"].iloc[0], changes)["lr"] for what, row in judged.items()}


def counted(row, first, second):
    """How many seeds two arms of a row, as for `cells.both`, are compared by; and a text: these, the images, the row,
    and where the two were made if not in one place."""
    seeds, said = cells.counted(of[row], first, second)
    places = cells.places(of[row], first[:2], second[:2])
    return seeds, f"{said}, {names[row]}{f'; {places}' * bool(places)}"


# %%
arms_there = shown_table[["network", "arm", "lr"]].drop_duplicates()
heights = arms_there.groupby("network", sort=False).size()
fig, axes = plt.subplots(len(heights), figsize=(7, 0.7 * len(heights) + 0.26 * heights.sum() + 0.3), squeeze=False,
                         sharex=True, height_ratios=heights + 0.6)  # fmt: skip
for ax, (network, of_network) in zip(axes[:, 0], shown_table.groupby("network", sort=False)):
    labels = []
    for i, ((arm, lr), part) in enumerate(of_network.groupby(["arm", "lr"])):
        colour = SCHEDULE_COLOURS[arm.split()[-1]]
        ax.plot(100 * part["worst"], [i] * len(part), "o", color=colour)
        ax.plot(100 * part["clean of m"], [i] * len(part), "o", color=colour, mfc="none")
        labels.append(f"{cells.spelt(arm)}, {lr:g}")
    ax.axvline(90, color="grey", linestyle=":")
    ax.set(title=network, yticks=range(len(labels)), yticklabels=labels, ylim=(len(labels) - 0.4, -0.6), xlim=(0, 101))
axes[-1, 0].set_xlabel("error, %")


def extent(part, images):
    """Seeds and images of the networks in a part of the table, as a text."""
    return "; ".join(f"{network}: at most {of['seed'].nunique()} seed{'s' * (of['seed'].nunique() > 1)} an arm, "
                     f"{of[images].min():,} images" for network, of in part.groupby("network"))  # fmt: skip


book.save(
    fig, "07_table1", table, source=sources, seeds=sorted(table["seed"].unique().tolist()),
    caption="Errors by arm and learning rate, a point per seed: filled, the worst case over PGD, APGD (CE, DLR) and "
    f"Square; hollow, clean, of the same images (covered by the filled one where both are equal). Dotted: guessing "
    "among ten classes; a network that gives one answer errs on all images but those of that class, which are not just "
    f"a tenth. A periodic arm is its ensemble. {extent(shown_table, 'm')}. The numbers hold all rows of the table.",
)  # fmt: skip


# %%
def as_elsewhere():
    """How many seeds decided the same question in the row of the few digits: a guess for rows without cells."""
    for name, row in judged.items():
        if of[row]["recipe"].iloc[0] in judged_elsewhere:
            two = [(arm, usual[name]) for arm in ("cosine", "constant")]
            seeds = cells.both(of[row], *two, kind="clean")[2]
            first = {k: of[row][of[row]["seed"].isin(seeds[:k])] for k in range(cells.FEWEST, len(seeds) + 1)}
            return next((k for k, part in first.items() if escape(part, *two).holds is not None), None)


guess = f"with a spread as of the few digits {as_elsewhere() or 'more'} seeds would decide"

# %%
steady = {}  # of verdicts: how many readings without one of its seeds keep each
for name, row in claimed.items():
    lr, plateau, asked = usual[name], name.startswith("LeNet"), name.endswith("eps 8/255")
    two = [(arm, lr) for arm in ("cosine", "constant")]
    of_arm = {arm: cells.masks(of[row], arm, lr, kind="clean") for arm in ("constant", "cosine")}
    judge = escape if plateau else partial(cells.compare, better, kind="clean")
    finding = judge(of[row], *two)
    if not all(of_arm.values()):
        finding = replace(finding, why=f"{finding.why}; {guess}")
    stay = ", ".join(f"{len(cells.stuck(of[row], arm, lr))} of {len(runs)} {arm}" for arm, runs in of_arm.items())
    measured = f"at learning rate {lr:g}, on the plateau: {stay}; {finding.measured}"
    number, count = counted(row, *two)
    about = {"n": count + cells.looked(of[row], number, "clean"), "source": of[row]["source"].iloc[0]}
    if plateau or asked:
        book.claim(
            f"A rising budget leaves the plateau on which a constant one stays: {name}" if plateau
            else f"At one learning rate a rising budget ends in the smaller clean error: {name}", section="5, Table 1",
            paper="under a constant budget LeNet at 0.4 does not train; under a rising one it does" if plateau
            else "both train, and the rising one ends better", measured=measured, holds=finding, believe=True, **about,
        )  # fmt: skip
        common, what = cells.both(of[row], *two, kind="clean")[2], "escape" if plateau else "cosine - constant"
        steady[f"clean error, {what}, {name}"] = cells.without_one(judge, of[row], *two, seeds=common)
    else:
        book.answer(f"Does a rising budget end in the smaller clean error, at one learning rate? {name}",
                    f"{finding.outcome.capitalize()}, {measured}{finding.because}.",
                    reviewer="Our own question", **about)  # fmt: skip


# %%
if (name := "LeNet, MNIST, eps 0.4") not in judged:
    why = f"none is made yet; {guess}"
    book.claim(f"A rising budget leaves the plateau on which a constant one stays: {name}", section="5, Table 1",
               holds=inference.Finding("undecided", None, "no cell", why), n="0 seeds", source=sources)  # fmt: skip

# %% [markdown]
# ## Periods and the ensemble
#
# Equal epochs throughout. The ensemble of a *single* run's own checkpoints, at the epochs at which the periods would
# end, is the control: if it gains as much, it is the averaging that helps and not the periods. For VGG16 and ResNet18
# this is the paper's table; LeNet has no periods there, and its periodic rows are our extension, in which only the
# budget begins again, since its rate does not fall. (That a gain of a point is excluded, which the rule calls *not
# smaller beyond the margin*, became an outcome of its own when ResNet18's ensemble had been undecided at six seeds: it
# decided that row, and the worst case of VGG16 at 0.1, which seven seeds had left undecided. The ensemble of the
# periods against its own last network was added when all others had been seen.)
#
# Of fewer than three seeds no interval is given and nothing is decided; and what an interval of more than ten points to
# each side leaves undecided is called *no result*, without the interval. (Set when all of these had been seen.)

# %%
rules = {what: inference.difference(f"robust error under PGD, {what}", margin=margin) for what in cells.QUESTIONS}
rules["periodic ensemble - single run"]

# %%
differences = pd.DataFrame(
    {"row": names[row]} | line
    for row in shown.values()
    for lr in sorted(of[row]["lr"].unique())
    for line in cells.differences(of[row], rules, dict.fromkeys(of[row]["arm"], lr))
)
usual_of = {names[row]: usual[name] for name, row in judged.items()}
at_usual = differences[differences["lr"] == differences["row"].map(usual_of)]  # the recipe's rate of each row
differences.round(4)

# %%
shown_sources = "; ".join(dict.fromkeys(of[row]["source"].iloc[0] for row in shown.values()))
shown_count = extent(shown_table, "n")
heights = at_usual.groupby("row", sort=False).size()
fig, axes = plt.subplots(len(heights), figsize=(7, 0.7 * len(heights) + 0.24 * heights.sum() + 0.3),
                         squeeze=False, height_ratios=heights + 0.6)  # fmt: skip
for ax, (row, part) in zip(axes[:, 0], at_usual.groupby("row", sort=False)):
    labels = [f"{line.difference}{'*' * bool(line.places)} (n = {line.seeds})" for line in part.itertuples()]
    intervals(ax, part, labels, margin=margin)  # on a scale of its own
    ax.set_title(f"{row}, learning rate {usual_of[row]:g}", loc="right")
axes[-1, 0].set_xlabel("difference in robust error (PGD), percentage points", loc="right")
book.save(
    fig, "07_differences", differences, source=shown_sources, seeds=sorted(shown_table["seed"].unique().tolist()),
    caption="Differences in robust error under PGD, first minus second (negative: the first is better), at the "
    "recipe's learning rate (the numbers hold the other rates, too), with 99 % intervals over seeds and images. "
    "Filled: decided. Without a bar: fewer "
    f"than {cells.FEWEST} seeds, or undecided and more than {100 * cells.WIDE:g} points to each side. Grey band: the "
    f"margin of {100 * margin:g} point. Star: for some seed the two were made on unlike machines or in unlike number "
    f"formats. {shown_count} (more, where the numbers say so).",
)  # fmt: skip

# %%
# What the paper says of its rows is judged; the rest are questions.
claims = {
    "cosine - constant": ("At one learning rate a rising budget ends in the smaller robust error",
                          "it has the smaller robust error in each row"),
    "periodic ensemble - single run": ("The ensemble of a periodic run is better than a single run of as many "
                                             "epochs", "the ensemble of the periods is best in each row"),
    "last period alone - single run": ("The last network of a periodic run is better than a single run of as "
                                             "many epochs", ""),
}  # fmt: skip
for name, row in claimed.items():
    for what, (text, paper) in claims.items():
        (arm, network), (other, end) = cells.QUESTIONS[what]
        two = (arm, usual[name], network), (other, usual[name], end)
        finding, (number, count) = cells.compare(rules[what], of[row], *two), counted(row, *two)
        read = cells.looked(of[row], number, "robust" if what == "cosine - constant" else "periods")
        about = {"n": count + read, "source": of[row]["source"].iloc[0]}
        if finding.measured != "nothing" and paper and name.endswith(cells.PAPER):
            book.claim(f"{text}: {name}", section="5, Table 1", paper=paper, holds=finding,
                       believe=what.startswith("periodic"), **about)  # fmt: skip
            judge, common = partial(cells.compare, rules[what]), cells.both(of[row], *two)[2]
            steady[f"robust error, {what}, {name}"] = cells.without_one(judge, of[row], *two, seeds=common)
        elif finding.measured != "nothing":
            book.answer(f"Is it so? {text}: {name}", f"Robust error under PGD, {what}: {finding.words}.",
                        reviewer="Our own question" if paper else "Reviewer 4", **about)  # fmt: skip

# %% [markdown]
# PGD alone may flatter one budget. So the same question for the column *worst* of the table, on the images that all
# attacks have seen, at the recipe's learning rate and at that at which the rising budget is best. Square sees no
# gradient: if it turns many of the images that PGD leaves, gradients may be *masked*, and the worst case is the number
# to go by. A network is taken for masked as in notebook 8, by the second rule; of one on the plateau, which answers all
# images alike, nothing can be turned, and it is left out of that.

# %%
stronger = inference.difference("robust error in the worst case over all attacks, cosine - constant", margin=margin)
masked = inference.at_most("of the images that PGD leaves, the share that Square turns", bound=0.1)
display(stronger, masked)


# %%
def masks_at(row, lr):
    """{arm: {seed: {attack: mask}}} of the two arms, on the images that all attacks have seen, as in `cells.both`."""
    more, test = ({arm: {key[-1]: masks for key, masks in worst.items() if key[:-1] == (part, row, arm, lr)}
                   for arm in ("cosine", "constant")} for part in ("more", "test"))  # fmt: skip
    return more if cells.as_many(*(set.intersection(*map(set, arms.values())) for arms in (more, test))) else test


def turned(row, lr, runs_of):
    """Which share of the images that PGD leaves Square turns, of each arm, as a text."""
    said = []
    for arm, of_arm in runs_of.items():
        stuck = {*cells.stuck(of[row], arm, lr)} & {*of_arm}
        counts = [((by["Square"] & ~by["PGD"]).sum(), (~by["PGD"]).sum())
                  for seed, by in of_arm.items() if seed not in stuck]  # fmt: skip
        broken, left = np.sum(counts, axis=0) if counts else (0, 0)
        share = f"{broken / left:.1%}" if left else "none"
        surely = sum(masked(*count).holds is False for count in counts)
        about = f"surely more than a tenth in {surely} of {len(counts)} networks" if counts else "no network"
        said.append(f"{share} ({arm}; {about}" + f", {len(stuck)} on the plateau left out" * bool(stuck) + ")")
    return " and ".join(said)


# %%
for (name, row), best in product(claimed.items(), (False, True)):
    errors = cells.means(of[row], "cosine")
    lr = cells.best_rate(errors, margin / 2) if best else usual[name]
    runs_of = masks_at(row, lr)
    pairs = {kind: cells.pair(*({seed: by[kind] for seed, by in of_arm.items()} for of_arm in runs_of.values()))
             for kind in ("worst", "PGD")}  # fmt: skip
    both = pairs["worst"][2]
    if not both or (best and lr == usual[name]):
        continue
    finding, pgd_alone = (cells.judge(stronger, *pairs[kind][:2]) for kind in ("worst", "PGD"))
    book.answer(
        f"Is the robust error smaller in the worst case over all attacks, too? {name}, learning rate {lr:g}",
        f"Cosine minus constant, PGD, APGD (CE, DLR) and Square together: {finding.outcome}, {finding.measured}"
        f"{finding.because}. By PGD alone on the same images: {pgd_alone.measured.split(' (')[0]}. "
        f"Of the images that PGD leaves Square turns {turned(row, lr, runs_of)}.",
        reviewer="Reviewer 1", source=of[row]["source"].iloc[0], figure="07_table1",
        n=f"{len(both)} seeds, {pairs['worst'][0].shape[1]:,} images"
        + cells.looked(of[row], len(both), f"worst at {lr:g}"),
    )  # fmt: skip

# %% [markdown]
# ## Is it the periods, or the averaging?
#
# Reviewer 2's question (notebook 6 asks it of few digits), of the paper's networks, at the recipe's learning rate.


# %%
def said_of(line):
    """A line of the differences, in words."""
    half = f" ± {100 * line.half:.1f}" if pd.notna(line.half) else ""
    why = f"; {line.why}" * bool(line.why)
    return f"{line.difference}: {line.outcome}, {100 * line.mean:+.1f} points{half} (n = {line.seeds}{why})"


for name, row in claimed.items():
    here = at_usual[at_usual["row"] == names[row]]
    asked = here[here["difference"].str.contains("checkpoints|best|its last|^periodic constant|^periodic linear")]
    if not asked["difference"].str.contains("periodic").any():
        continue
    book.answer(f"Is it the periods that help, or the averaging? {name}",
                "; ".join(map(said_of, asked.itertuples())) + ".",
                reviewer="Reviewer 2", n=f"learning rate {usual[name]:g}, {here.images.max():,} test images",
                source=of[row]["source"].iloc[0])  # fmt: skip

# %% [markdown]
# And what does it cost to read small budgets in the wrong unit (notebook 6)? On CIFAR-10 budgets are kept in pixels in
# the authors' code, and so may have been read so.

# %%
for name, row in claimed.items():
    misread = differences[(differences["row"] == names[row]) & differences["difference"].str.contains("misread")]
    if len(misread):
        book.answer(f"Does it matter if small budgets are read in the wrong unit? {name}",
                    "; ".join(f"at {line.lr:g}, {said_of(line)}" for line in misread.itertuples()) + ".",
                    reviewer="Our own question", n=f"{misread['images'].max():,} test images",
                    source=of[row]["source"].iloc[0])  # fmt: skip

# %% [markdown]
# ## The table again, each arm at a learning rate of its own
#
# One rate for all may suit one arm more than another. So here each arm stands at the rate at which its last network has
# the least robust error on the images set aside, by the rule of notebook 6, which judges constant against cosine so.
# An arm that was trained at fewer than three rates is left out. At an end of its grid a better rate may lie beyond it,
# and a rate with few seeds may be called best or worse by chance: both are named. Where both arms are best at the
# recipe's rate, the difference is one of those above, and is not said again. An answer and no claim: it was added when
# most of these cells had been seen.


# %%
def own_rates(row):
    """{arm: (its best learning rate, what makes that unsure)} of a row."""
    grids = {arm: cells.rates(of[row], arm) for arm in of[row]["arm"].unique()}
    grids = {arm: grid for arm, grid in grids.items() if len(grid) > 2}
    best = {arm: cells.best_rate(cells.means(of[row], arm), margin / 2) for arm in grids}
    few = {arm: ", ".join(f"{rate:g}" for rate, errors in sorted(grid.items()) if len(errors) < 3)
           for arm, grid in grids.items()}  # fmt: skip
    return {arm: (lr, ["at an end of its grid"] * (lr in (min(grids[arm]), max(grids[arm])))
                  + [f"fewer than three seeds at {few[arm]}"] * bool(few[arm]))
            for arm, lr in best.items()}  # fmt: skip


fair_rules = {what: inference.difference(f"robust error under PGD, {what}, each at its own best rate", margin=margin)
              for what in cells.QUESTIONS if what != "cosine - constant"}  # fmt: skip
chosen = {name: own_rates(row) for name, row in claimed.items()}
best_lines = [(names[claimed[name]], cells.spelt(arm), lr)
              for name, arms in chosen.items() for arm, (lr, _) in arms.items()]  # fmt: skip
display(fair_rules["periodic ensemble - single run"], printed.loc[best_lines])

# %%
for name, arms in chosen.items():
    row, at = claimed[name], {arm: lr for arm, (lr, _) in arms.items()}
    fair = pd.DataFrame(cells.differences(of[row], fair_rules, at))
    if at.keys() <= {"constant", "cosine"} or fair.empty:
        continue
    other = fair[(fair["lr"] != usual[name]) | (fair["second_lr"] != usual[name])]
    said = "; ".join(f"{said_of(line)}, at {line.lr:g} and {line.second_lr:g}" for line in other.itertuples())
    unsure = [f"{cells.spelt(arm)} ({lr:g}: {' and '.join(why)})" for arm, (lr, why) in arms.items() if why]
    book.answer(
        f"What remains of the differences with each arm at its own best learning rate? {name}",
        (said or f"{', '.join(map(cells.spelt, arms))}: {usual[name]:g} is the best rate of each, and all remain")
        + (f". Unsure of their best rate: {', '.join(unsure)}" if unsure else "") + ".",
        reviewer="Our own question", n=f"{fair['images'].max():,} test images", source=of[row]["source"].iloc[0],
    )  # fmt: skip

# %% [markdown]
# ## Could "1 to 2 percentage points" be seen?
#
# With these seeds and images, which difference between two arms would be told from none nine times in ten? It has to
# exceed the half-width of the interval by one and a half standard errors or so. So one can say, before arguing about
# the gains of Table 1, from which size on this table could tell. It is asked at the recipe's learning rate. Where a
# verdict asks for more images than a test set has (10,000 for MNIST and CIFAR-10), there are training images that no
# run has seen (`more` in the parameters; notebook 6).

# %%
between = at_usual[at_usual["difference"].isin(["cosine - constant", "periodic ensemble - single run"])
                   & at_usual["least"].notna()]  # fmt: skip
least = between["least"].clip(upper=1)  # no two shares differ by more
seen = [f"{line.row}: {100 * size:.1f} points ({line.difference}) with {line.seeds} seeds and {line.images:,} images"
        for line, size in zip(between.itertuples(), least)]  # fmt: skip
book.answer(
    "Is a gain of 1 to 2 percentage points more than noise?",
    "The least difference between two arms that would be seen here, nine times in ten: "
    f"{'; '.join(seen) or f'none yet, with fewer than {cells.FEWEST} seeds'}. So would a gain of 1 point in "
    f"{(least < 0.01).sum()} of {len(least)} comparisons, one of 2 points in {(least < 0.02).sum()}.",
    reviewer="Reviewers 1 and 4", n=shown_count, source=shown_sources,
)  # fmt: skip

# %% [markdown]
# ## Does a verdict hang on one seed?
#
# As in notebook 6, each decided verdict of this page is read again without one of its seeds, each seed in turn.

# %%
book.answer(
    "Does a verdict of notebook 7 hang on one seed?",
    "Of the readings without one seed so many keep it, and none turns it round unless that is said: "
    f"{'; '.join(f'{verdict}, {kept}' for verdict, kept in steady.items() if kept) or 'nothing is decided'}.",
    reviewer="Our own question", n="as many readings as seeds", source=shown_sources,
)  # fmt: skip

# %% [markdown]
# ## Does it matter where a cell was made?
#
# Cells of a row come from processors, in float32 or bfloat16, and from a GPU, in bfloat16; they are named by what was
# asked for and not by where it was done. Where the two arms of a comparison were not made in one place, the ledger says
# so, and a star in the figure. Cells made in both places, with the same weights at the start (each place draws its own
# mini-batches), say how much that may be.

# %%
same = inference.difference("robust error under PGD, GPU minus processor", margin=margin, expect="no difference")
same

# %%
twins, _ = cells.read({"twins": cells.FIGURES / "overnight" / "twins"})
twins = twins[twins["profile"] == "twins"]
print(f"Cells made in both places: {twins.groupby(['row', 'arm', 'lr', 'seed']).ngroups}")
for (row, arm, lr), part in twins.groupby(["row", "arm", "lr"]):
    here = of.get(f"overnight-{row[-6:]}", found[:0])
    on_gpu = "NVIDIA" in part["device"].iloc[0]
    a, b, both = cells.pair(*(cells.masks(rows, arm, lr) for rows in ((part, here) if on_gpu else (here, part))))
    if both:
        finding = cells.judge(same, a, b)
        book.answer(
            "Do a GPU in bfloat16 and a processor in float32 make the same networks? "
            f"{cells.title(part)}, {cells.spelt(arm)}, learning rate {lr:g}",
            f"Robust error, the former minus the latter: {finding.outcome}, {finding.measured}{finding.because}.",
            reviewer="Our own question", n=f"{len(both)} seed{'s' * (len(both) > 1)}, {a.shape[1]:,} test images",
            source=part["source"].iloc[0],
        )  # fmt: skip

# %% [markdown]
# ## Change this, expect that
#
# - `"lr": 1e-2` in `todo` to `1e-3`: one constant run of three begins to leave the plateau, and the networks of the
#   cosine classify, but PGD breaks nearly all digits.
# - `"eps": "0.4"` to `"0.1"`: some constant runs leave the plateau by themselves, and some stay.
# - `./run_all.sh --profile overnight 07`: makes what is missing of CIFAR-10 and MNIST; stop it when you like, what is
#   finished stands and is shown here.

# %%
book.close()
