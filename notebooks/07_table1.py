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
# Table 1 of Liu et al. (2020) compares three budgets over training (*constant*, *linear*, *cosine*), each as a single
# run and as a periodic run whose checkpoints form an ensemble, on LeNet (MNIST, eps 0.4), VGG16 and ResNet18 (CIFAR-10,
# eps 8/255), by the clean error and the robust error under PGD, APGD on two losses (cross entropy and DLR) and Square,
# which sees no gradient. Single and periodic runs take equally many epochs. Notebook 6 looks at the LeNet rows from
# nearby.
#
# What should be seen if the claims hold: in each row the worst-case error of *linear* and *cosine* lies below that of
# *constant*, and that of the periodic ensemble below that of the single run, by more than the seeds differ.
#
# A smaller profile shrinks networks, data, epochs and attacks, never the rows. How small this one is, the parameters
# say; the paper trains CIFAR-10 for 200 epochs on 50,000 images at four times the width.

# %% tags=["parameters"]
profile = "quick"
tasks = {
    "MNIST": {
        "dataset": "mnist5k", "images": [None, None], "test_images": 200, "seeds": [0, 1, 2],
        "epochs": 8, "restarts": [4, 6], "batch_size": 64, "optimizer": "adam", "lr": 3e-3,
        "num_steps": 3, "step_fraction": 0.5, "test_step_fraction": 0.2, "eval_every": 1, "eval_images": 500,
        "stops": {"constant": None, "linear": 2.0, "cosine": 1.5},
    },
    "CIFAR-10": {
        "dataset": "cifar10", "images": [500, 100], "test_images": 100, "seeds": [0, 1],
        "epochs": 4, "restarts": [2, 3], "batch_size": 32, "optimizer": "adam", "lr": 3e-3,
        "num_steps": 2, "step_fraction": 0.5, "test_step_fraction": 0.2, "eval_every": 4, "eval_images": 100,
        "stops": {"constant": None, "linear": 2.0, "cosine": 2.0},
    },
}  # fmt: skip
networks = [
    {"task": "MNIST", "model": "lenet", "width": 4, "eps": "0.4"},
    {"task": "CIFAR-10", "model": "vgg16", "width": 2, "eps": "8/255"},
    {"task": "CIFAR-10", "model": "resnet18", "width": 2, "eps": "8/255"},
]
steps = 10  # of PGD and APGD; APGD chooses its own step size, PGD's is the task's test_step_fraction of eps
apgd_restarts = 1
square_queries = 50
attack_batch = 250  # AutoAttack's result depends on it
minutes = None  # begin no new cell after this long; the table then says what is missing, and the next run goes on

# %%
import time
from fractions import Fraction
from functools import partial
from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from lib import data, runs, tables
from lib.attacks import autoattack, pgd
from lib.compute import device
from lib.figures import Book
from lib.files import write_bytes
from lib.models import Ensemble

book = Book("07_table1", globals())
used = {network["task"] for network in networks}
sets = {name: data.load(task["dataset"], fallback="mnistm" if task["dataset"] == "cifar10" else None)
        .first(*task["images"])
        for name, task in tasks.items() if name in used}  # fmt: skip
source = "; ".join(f"{name}: {sets[name].source}" for name in sets)
print(source.replace("; ", "\n"))

# %% [markdown]
# Where no CIFAR-10 is found and none can be downloaded, its rows are made from a stand-in. The lines above then name
# it, and so do the rows themselves, the figures and the ledger.
#
# ## The cells
#
# A cell of the table is a network, a schedule, single run or periodic ensemble, and a seed. Its runs and its errors are
# kept one by one, so an interrupted table goes on where it was, and the LeNet runs are those of notebook 6. An image
# that is misclassified as it is counts as an error under every attack; *worst* counts the images that any of the
# attacks turns. The ensemble is attacked as a whole.


# %%
def config(network, schedule, kind, seed):
    task, eps = tasks[network["task"]], float(Fraction(network["eps"]))
    stop = task["stops"][schedule]
    return runs.configure(
        task | network, eps=eps, schedule=schedule, schedule_stop=stop and stop * eps, seed=seed,
        restarts=task["restarts"] if kind == "periodic" else [],
    )  # fmt: skip


def attacks(eps, step_size, seed):
    generator = torch.Generator(device()).manual_seed(seed)
    common = {"eps": eps, "num_steps": steps, "num_restarts": apgd_restarts, "num_queries": square_queries,
              "seed": seed, "batch_size": attack_batch}  # fmt: skip
    return {
        f"PGD-{steps}": partial(pgd, eps=eps, step_size=step_size, num_steps=steps, generator=generator),
        f"APGD-{steps} CE": partial(autoattack, attacks=("apgd-ce",), **common),
        f"APGD-{steps} DLR": partial(autoattack, attacks=("apgd-dlr",), **common),
        f"Square-{square_queries}": partial(autoattack, attacks=("square",), **common),
    }


# %%
def measure(network, schedule, kind, seed):
    """The errors in one cell of the table."""
    task, c = tasks[network["task"]], config(network, schedule, kind, seed)
    pictures, images = sets[network["task"]], task["test_images"]
    run, kept, step_size = runs.run(c, pictures), [*c.restarts, c.epochs], task["test_step_fraction"] * c.eps

    def compute():
        members = [run.model(epoch) for epoch in kept]
        net = Ensemble(members) if len(members) > 1 else members[0]
        x, y = pictures.x_test[:images].to(device()), pictures.y_test[:images].to(device())
        return tables.attack_errors(net.to(device()), x, y, attacks(c.eps, step_size, seed))

    facts = {"run": run.folder.name, "epochs": kept, "images": images, "seed": seed, "steps": steps,
             "step_size": step_size, "apgd_restarts": apgd_restarts, "queries": square_queries,
             "batch_size": attack_batch}  # fmt: skip
    return runs.remember("table1", facts, compute, code=("tables.py",))


# %%
titles = {"lenet": "LeNet", "vgg16": "VGG16", "resnet18": "ResNet18"}
names = {f"{titles[c['model']]}, {sets[c['task']].source.split(' (')[0]}, eps {c['eps']}": c for c in networks}
kinds = ["single", "periodic"]
keys = ["network", "schedule", "kind", "seed"]
expected = [(name, s, kind, seed) for name, c in names.items() for s in tasks[c["task"]]["stops"] for kind in kinds
            for seed in tasks[c["task"]]["seeds"]]  # fmt: skip
began, cells = time.monotonic(), {}
# Seed by seed and row by row: what is there when the time is up can be compared.
for cell in tqdm(sorted(expected, key=lambda cell: (cell[3], list(names).index(cell[0]))), desc="cells"):
    if minutes is None or time.monotonic() - began < 60 * minutes:
        cells[cell] = measure(names[cell[0]], *cell[1:])
table, missing = tables.assemble(cells, keys, expected)
columns = ["clean", *attacks(0.0, 0.0, 0), "worst"]
table = table[keys + columns]
print(missing)

# %% [markdown]
# ## The table
#
# Errors in per cent, mean over the seeds; in brackets the standard deviation in units of the last digit, so that
# 1.23(4) means 1.23 +- 0.04, and 12.30(125) means 12.30 +- 1.25. The same as
# [CSV](../figures/quick/07_table1.csv) (every seed) and as [LaTeX](../figures/quick/07_table1.tex).

# %%
shown = table.groupby(keys[:3], sort=False)[columns].agg(tables.notation)
shown["seeds"] = table.groupby(keys[:3], sort=False).size()
latex = shown.reset_index().to_latex(index=False, escape=True)
write_bytes(book.folder / "07_table1.tex", f"% {source}; {missing}\n{latex}".encode())
shown

# %%
fig, axes = plt.subplots(1, len(names), figsize=(4 * len(names), 3.6), sharey=True, squeeze=False)
schedules = [s for s in ("constant", "linear", "cosine") if any(s in tasks[task]["stops"] for task in used)]
combos = list(product(schedules, kinds))
for ax, name in zip(axes[0], names):
    for i, (schedule, kind) in enumerate(combos):
        rows = table[(table.network == name) & (table.schedule == schedule) & (table.kind == kind)]
        filled = {} if kind == "periodic" else {"mfc": "none"}
        ax.plot(100 * rows.worst, [i] * len(rows), "o", color=f"C{i // 2}", **filled)
        ax.plot(100 * rows.clean, [i] * len(rows), "|", color="grey", markersize=11)
    ax.set(title=name, xlabel="error, %", xlim=(0, 101), yticks=range(len(combos)))
    ax.axvline(90, color="grey", linestyle=":")
axes[0, 0].set(yticklabels=[f"{s}, {k}" for s, k in combos])
axes[0, 0].invert_yaxis()
n = "; ".join(f"{name}: {len(task['seeds'])} seeds, {task['test_images']:,} images" for name, task in tasks.items()
              if name in used)  # fmt: skip
book.save(
    fig, "07_table1", table, source=source, seeds=sorted({cell[3] for cell in expected}),
    caption=f"Worst-case robust error over PGD-{steps}, APGD-{steps} (CE, DLR) and Square-{square_queries}: a point "
    f"per seed ({n}), hollow for single runs, filled for periodic ensembles. Grey bars: clean errors. Dotted: "
    f"guessing. Cells: {missing}.",
)  # fmt: skip

# %% [markdown]
# ## Differences, paired by seed
#
# In the worst-case error, in per cent: the first minus the second, for networks that began with the same weights and
# saw the images in the same order, with Student's 95 % interval over the seeds. With two or three seeds it is wide: for
# two, the quantile alone is 12.7. Where all differences are equal, no spread was measured, and the interval is the
# whole line. Where the interval holds zero, the seeds do not tell the two apart.


# %%
def differ(name, a, b):
    """Worst-case error of cell a minus that of cell b, over the seeds that both have; None if there are none."""
    by_seed = table[table.network == name].set_index(["schedule", "kind", "seed"]).worst
    seeds = [s for s in tasks[names[name]["task"]]["seeds"] if (*a, s) in by_seed.index and (*b, s) in by_seed.index]
    return tables.paired([by_seed[(*a, s)] for s in seeds], [by_seed[(*b, s)] for s in seeds]) if seeds else None


warm = [s for s in schedules if s != "constant"]
questions = {
    "periodic ensemble - constant, single": [((s, "periodic"), ("constant", "single")) for s in warm],
    "single - constant, single": [((s, "single"), ("constant", "single")) for s in warm],
    "periodic ensemble - single run": [((s, "periodic"), (s, "single")) for s in warm],
}
differences = pd.DataFrame(
    {"network": name, "difference": f"{a[0]}: {question}", "question": question, "holds": tables.conclude(d)} | d
    for question, pairs in questions.items() for name in names for a, b in pairs if (d := differ(name, a, b))
)  # fmt: skip
view = differences.drop(columns="question").assign(**{c: 100 * differences[c] for c in ("mean", "low", "high")})
view.round(1)

# %%
fig, axes = plt.subplots(1, len(names), figsize=(2.6 + 3.4 * len(names), 3.4), sharey=True, squeeze=False)
labels = list(differences.difference.unique())
for ax, name in zip(axes[0], names):
    for _, row in differences[differences.network == name].iterrows():
        i = labels.index(row.difference)
        ax.plot([max(100 * row.low, -200), min(100 * row.high, 200)], [i, i], color="C0" if row.holds else "grey")
        ax.plot(100 * row["mean"], i, "o", color="C0" if row.holds else "grey")
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_title(name, fontsize=10)
    ax.set(xlabel="difference, percentage points", xlim=(-105, 105), yticks=range(len(labels)))
axes[0, 0].set(yticklabels=labels)
axes[0, 0].invert_yaxis()
book.save(
    fig, "07_differences", differences, source=source, seeds=sorted({cell[3] for cell in expected}),
    caption=f"Differences in worst-case robust error, paired by seed, with Student's 95 % interval ({n}); negative is "
    "better for the first. Blue: the interval lies below zero. Intervals may reach beyond the picture.",
)  # fmt: skip

# %% [markdown]
# ## At other sizes
#
# A size is part of a result. So here are the same two figures as other profiles drew them: `laptop` trains LeNet twelve
# times as long on the same digits, and VGG16 on ten times as many photographs, at twice the eps. The ledger has their
# verdicts beside these.

# %%
book.show_other_sizes("07_table1")

# %%
book.show_other_sizes("07_differences")

# %% [markdown]
# ## Verdicts
#
# One row of the ledger per claim and network. A claim is reproduced if both schedules show it, that is if their
# intervals lie below zero, not reproduced if both lie above, and not testable at this size if neither tells.

# %%
claims = dict(zip(questions, (
    "Periodic scheduling with the ensemble has a smaller robust error than a constant budget",
    "Without periods and ensemble, a schedule still has a smaller robust error than a constant budget",
    "The periodic ensemble has a smaller robust error than a single run of equally many epochs",
)))  # fmt: skip


def interval(row):
    return f"[{row.low:+.3f}, {row.high:+.3f}]" if np.isfinite(row.high) else "[no spread measured]"


for (question, group), (name, network) in product(differences.groupby("question", sort=False), names.items()):
    rows = group[group.network == name]
    if len(rows):
        text = ", ".join(f"{r['mean']:+.3f} {interval(r)} ({r.difference.split(':')[0]})" for _, r in rows.iterrows())
        book.claim(
            f"{claims[question]}: {name}",
            section="5, Table 1",
            measured=f"difference in worst-case error: {text}",
            holds=tables.conclude_all(rows.to_dict("records")),
            n=f"{min(rows.n)} seeds, paired, {tasks[network['task']]['test_images']:,} test images",
            source=sets[network["task"]].source,
        )

# %% [markdown]
# ## The ledger

# %%
book.close()
