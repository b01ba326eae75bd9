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
# # 9. Curves between minima
#
# Appendix C of Liu et al. (2020) asks whether the minima of adversarial training lie apart, or are connected: two
# networks from different seeds have a barrier of high loss on the straight line between them, but Garipov et al. (2018,
# arXiv:1802.10026) found, for ordinary training, that a simple curve leads round it. The appendix finds such curves
# for adversarial training too.
#
# What should be seen if this holds: along the straight line, loss and error are far above those of both ends; along a
# trained quadratic Bezier curve they stay near them, at eps 0 and at a large eps alike.
#
# The curve has one free point, which starts half-way between the networks. Each training step picks a random place on
# the curve, attacks a mini-batch *there*, and moves the free point against the gradient. The two ends stay what they
# are, bit for bit.

# %% tags=["parameters"]
profile = "quick"
dataset = "mnist5k"
train_images = None  # all
model = "lenet"
width = 4
curve_grid = [0.0, 0.3]
linear_from = 0.3  # budgets from here on rise linearly over the first half of training; smaller ones are constant
pairs = [[0, 1], [1, 2]]  # seeds of the two networks
epochs = 4
batch_size = 64
num_steps = 3
step_fraction = 0.5  # the attack's step size, as a fraction of eps
optimizer = "adam"
lr = 3e-3
lr_drops = []  # fractions of training at which the learning rate falls tenfold
weight_decay = 0.0
augment = False
eval_every = 2
eval_images = 500
curve_kind = "bezier"
curve_epochs = 6
curve_lr = 3e-3
test_steps = 10
test_images = 100
points = 11

# %%
from functools import partial
from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from lib import data, landscape, runs
from lib.attacks import pgd
from lib.compute import device
from lib.figures import Book

book = Book("09_mode_connectivity", globals())
images = data.load(dataset).first(train_images)
where = device()
print(images.source)

# %% [markdown]
# ## The networks
#
# The same runs as in notebook 4. At the large eps the budget rises over the first half of training.


# %%
def config(eps, seed):
    rising = {"schedule": "linear", "schedule_stop": 2 * eps} if eps >= linear_from else {}
    return runs.configure(book.parameters, eps=eps, seed=seed, **rising)


seeds = sorted({seed for pair in pairs for seed in pair})
keys = list(product(curve_grid, seeds))
networks = {k: r.model().to(where) for k, r in zip(keys, runs.grid([config(*k) for k in keys], images))}

# %% [markdown]
# ## Line and curve
#
# The curve is trained at the eps of its ends, from training images. Then loss and error are measured along both ways on
# the first training images and on the first test images, under an attack made anew at each point. (Batch normalisation,
# for networks that have it, takes its statistics from the training images again at each point inside.)

# %%
x, y = images.x_train.to(where), images.y_train.to(where)
parts = {
    "training": (x[:test_images], y[:test_images]),
    "test": (images.x_test[:test_images].to(where), images.y_test[:test_images].to(where)),
}
ticks = np.linspace(0, 1, points)


def attack_of(eps, num_steps, step_fraction):
    if eps == 0:
        return None
    return partial(pgd, eps=eps, step_size=step_fraction * eps, num_steps=num_steps, random_start=False)


rows = []
for eps, (a, b) in product(curve_grid, pairs):
    ends = networks[eps, a], networks[eps, b]
    curve = landscape.connect(
        *ends, x, y, attack=attack_of(eps, num_steps, step_fraction), kind=curve_kind, epochs=curve_epochs,
        lr=curve_lr, batch_size=batch_size,
    )  # fmt: skip
    for (way, path), (part, batch) in product({"line": landscape.Curve(*ends), "curve": curve}.items(), parts.items()):
        attack = attack_of(eps, test_steps, 2.5 / test_steps)
        values = landscape.along(path, ticks, *batch, attack=attack, x_statistics=x[:1000])
        about = {"eps": eps, "pair": f"{a}, {b}", "way": way, "part": part}
        rows += [about | {"t": t, "loss": v, "error": e} for t, v, e in zip(ticks, values.loss, values.error)]
ways = pd.DataFrame(rows)

# %%
n = f"{len(pairs)} pairs of seeds"
fig, axes = plt.subplots(2, len(curve_grid), figsize=(10, 6.4), sharex=True, sharey="row")
for row, column in zip(axes, ("loss", "error")):
    for ax, (eps, group) in zip(row, ways.groupby("eps")):
        sns.lineplot(group, x="t", y=column, hue="way", style="part", units="pair", estimator=None, ax=ax,
                     legend=ax is axes[0, 0])  # fmt: skip
        kind = "robust" if eps else "vanilla"
        ax.set(title=f"eps {eps:g}, {kind} {column}", xlabel="t (0 and 1: the two networks)", ylabel=column)
book.save(
    fig, "09_curves", ways, source=images.source, seeds=seeds,
    caption=f"Loss and error along the straight line and along a trained {curve_kind} curve between two networks from "
    f"different seeds, at the eps of training; {n}, each drawn, {test_images} images, PGD-{test_steps}.",
)  # fmt: skip

# %% [markdown]
# ## Barriers
#
# The *barrier* is how far the values rise above the line that joins those at the two ends. Reproduced if, on the
# training images, the curve leaves at most a tenth of the straight line's barrier in the loss, for every pair; partly
# if at most half. Where the straight line itself has next to no barrier, below 0.1, there is nothing to go round.

# %%
index = ["eps", "pair", "part", "way"]
barriers = pd.DataFrame(
    dict(zip(index, key)) | {c: landscape.barrier(g.t, g[c]) for c in ("loss", "error")}
    for key, g in ways.groupby(index)
)
wide = barriers.pivot(index=["eps", "pair", "part"], columns="way", values=["loss", "error"])
for eps in curve_grid:
    here = wide.loc[eps].xs("training", level="part")
    line, curve, mean = here["loss", "line"], here["loss", "curve"], here.mean()
    book.claim(
        f"Two minima are connected by a curve of low {'robust ' if eps else ''}loss (eps {eps:g})",
        section="Appendix C",
        measured=f"barrier in the loss {mean['loss', 'curve']:.3f} along the curve, {mean['loss', 'line']:.3f} along "
        f"the line; in the error {mean['error', 'curve']:.3f} and {mean['error', 'line']:.3f}",
        holds=None if (line < 0.1).any() else True if (curve <= 0.1 * line).all()
        else "partly" if (curve <= 0.5 * line).all() else False,
        n=f"{n}, {test_images} training images, means",
        source=images.source,
    )  # fmt: skip
wide.round(3)

# %% [markdown]
# ## The ledger

# %%
book.close()
