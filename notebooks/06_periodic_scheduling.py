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
# # 6. Adversarial scheduling: raise the budget while training
#
# Section 5 of Liu et al. (2020) proposes a remedy for the plateau of Section 4.1 (notebook 3): begin with a small
# budget eps, where the loss is still easy, and raise it during training. Here it meets the hardest case of the paper's
# Table 1: LeNet on MNIST digits at eps 0.4, where a constant budget ends as a constant classifier.
#
# What should be seen if the claim holds: under the *constant* budget all networks stay at an error of about 0.9, while
# the *linear* and the *cosine* schedule end with networks that classify, clean and attacked digits alike.
#
# This is the first half of the section: single runs without restarts.

# %% tags=["parameters"]
profile = "quick"
dataset = "mnist5k"
train_images = None  # all
model = "lenet"
width = 4
eps = 0.4
schedule_stops = {
    "constant": None,
    "linear": 0.8,
    "cosine": 0.6,
}  # where the rise would end, were it not clipped at eps
seeds = [0, 1, 2]
epochs = 10
num_steps = 4
step_fraction = 0.4  # the attack's step size, as a fraction of the budget
optimizer = "adam"
lr = 3e-3
eval_every = 2
eval_images = 500
test_steps = 20  # the attack of the final evaluation
test_step_size = 0.04
test_restarts = 2
test_images = 500

# %%
from functools import partial
from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch

from lib import data, evaluation, runs
from lib.attacks import pgd
from lib.figures import Book
from lib.training import TrainConfig

book = Book("06_periodic_scheduling", globals())
digits = data.load(dataset).first(train_images)
print(digits.source)

# %% [markdown]
# ## The schedules
#
# The budget as a function of the epoch. Both rises aim beyond eps and are clipped there, so that the last part of
# training is spent at the full budget. (In the paper: 0 to 0.8 along the line, 0 to 0.6 along the cosine, clipped at
# 0.4.) The step size of the attack scales with the budget.


# %%
def config(schedule, seed):
    return TrainConfig(
        model=model, width=width, eps=eps, step_size=step_fraction * eps, num_steps=num_steps, epochs=epochs,
        schedule=schedule, schedule_stop=schedule_stops[schedule],
        optimizer=optimizer, lr=lr, eval_every=eval_every, eval_images=eval_images, seed=seed,
    )  # fmt: skip


time = np.linspace(0, epochs, 200)
budgets = pd.DataFrame(
    {"schedule": s, "epoch": t, "eps": config(s, 0).budget()(t)} for s in schedule_stops for t in time
)
fig, ax = plt.subplots(figsize=(6, 3))
sns.lineplot(budgets, x="epoch", y="eps", hue="schedule", style="schedule", ax=ax)
ax.set(ylabel="budget eps")
book.save(fig, "06_schedules", budgets, source="lib.schedules", caption=f"The three budgets over {epochs} epochs.")

# %% [markdown]
# ## Training
#
# Same networks, same order of the digits, same optimiser; only the budget differs. The curves show the error on the
# first test digits, clean and attacked at the *full* eps by the attack of the training; lines are means over seeds,
# bands run from the best to the worst seed.

# %%
keys = list(product(schedule_stops, seeds))
trained = dict(zip(keys, runs.grid([config(*k) for k in keys], digits)))
n = f"{len(seeds)} seeds"
curves = pd.concat(run.history.assign(schedule=s, seed=seed) for (s, seed), run in trained.items())

fig, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True)
for ax, column in zip(axes, ("clean_error", "robust_error")):
    sns.lineplot(curves, x="epoch", y=column, hue="schedule", style="schedule", markers=True, dashes=False,
                 errorbar=("pi", 100), ax=ax)  # fmt: skip
    ax.axhline(0.9, color="grey", linestyle=":")
    ax.set(title=column.replace("_", " "), ylabel="error on test digits", ylim=(0, 1.03))
axes[1].get_legend().remove()
book.save(
    fig, "06_learning_curves", curves, source=digits.source, seeds=seeds,
    caption=f"Clean and robust error (PGD-{num_steps}, eps {eps:g}) on test digits during training under the three "
    f"budgets; mean and range over {n}. Dotted: guessing among ten classes.",
)  # fmt: skip

# %% [markdown]
# ## The end of training, under a stronger attack
#
# An attack as weak as the one of the training could flatter the networks. So the final robust error is measured with
# more and smaller steps, from several starts, keeping for each digit the worst.

# %%
x, y = digits.x_test[:test_images], digits.y_test[:test_images]
rows = []
for (schedule, seed), run in trained.items():
    net, generator = run.model(), torch.Generator().manual_seed(seed)
    attack = partial(pgd, eps=eps, step_size=test_step_size, num_steps=test_steps, num_restarts=test_restarts,
                     generator=generator)  # fmt: skip
    largest = evaluation.predict(net, x).argmax(1).bincount().max().item() / len(x)
    rows.append({"schedule": schedule, "seed": seed, "clean": evaluation.error(net, x, y),
                 "robust": evaluation.robust_error(net, x, y, attack), "largest class": largest})  # fmt: skip
final = pd.DataFrame(rows)

# %%
long = final.melt(["schedule", "seed"], ["clean", "robust"], var_name="error on", value_name="error")
fig, ax = plt.subplots(figsize=(6.5, 3.6))
sns.swarmplot(long, x="schedule", y="error", hue="error on", dodge=True, size=6, ax=ax)
sns.pointplot(long, x="schedule", y="error", hue="error on", dodge=0.4, errorbar=None, linestyle="none", marker="_",
              markersize=22, legend=False, ax=ax)  # fmt: skip
ax.axhline(0.9, color="grey", linestyle=":")
ax.set(xlabel="", ylim=(0, 1.03))
book.save(
    fig, "06_final_errors", final, source=digits.source, seeds=seeds,
    caption=f"Clean and robust error (PGD-{test_steps}, {test_restarts} starts, eps {eps:g}) of the final networks on "
    f"{len(x):,} test digits; a point per seed ({n}), bars: means.",
)  # fmt: skip

# %%
table = final.groupby("schedule", sort=False)[["clean", "robust", "largest class"]].agg(["mean", "std"])
table.round(3)

# %% [markdown]
# ## Verdicts
#
# Schedules are compared seed by seed: the difference of the robust errors of two networks that began with the same
# weights and saw the digits in the same order. With few seeds no interval is drawn; a claim counts as reproduced only
# if every single seed shows it.
#
# Note for the second claim that, with the paper's end points, the line reaches the full budget earlier than the cosine
# (first figure): in a short training it spends more of it at the eps that is tested.

# %%
robust = final.pivot(index="seed", columns="schedule", values="robust")
stuck = final[final["largest class"] == 1].groupby("schedule").size().reindex(list(schedule_stops), fill_value=0)
gains = {s: robust["constant"] - robust[s] for s in ("linear", "cosine")}
escapes = {s: bool((g > 0).all() and stuck[s] == 0) for s, g in gains.items()}
book.claim(
    "Warming the budget up escapes what a constant budget does not",
    section="5",
    measured=f"of {len(seeds)} networks each, {', '.join(f'{v} ({k})' for k, v in stuck.items())} are constant "
    f"classifiers; robust error {', '.join(f'{robust[s].mean():.3f} ({s})' for s in schedule_stops)}",
    holds=None if stuck["constant"] == 0 else True if stuck["constant"] == len(seeds) and all(escapes.values())
    else "partly" if any((g > 0).all() for g in gains.values()) else False,
    n=f"{n}, {len(x):,} test digits",
    source=digits.source,
)  # fmt: skip
advantage = robust["linear"] - robust["cosine"]
book.claim(
    "The cosine schedule is better than the linear one",
    section="5",
    measured=f"linear minus cosine in robust error: {advantage.mean():+.3f} (from {advantage.min():+.3f} to "
    f"{advantage.max():+.3f})",
    holds=True if (advantage > 0).all() else False if (advantage < 0).all() else None,
    n=f"{n}, paired, {len(x):,} test digits",
    source=digits.source,
)

# %% [markdown]
# ## The ledger

# %%
book.close()
