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
# # 5. Loss surfaces round the initial point and round the minimum
#
# A reviewer of Liu et al. (2020) asked to see the surfaces themselves, in the style of Li et al. (2018,
# arXiv:1712.09913): the loss along random directions in which each filter is scaled to the length of the network's own
# filter, so that a step of 1 means the same for every network. Two statements of the paper can be seen there.
#
# What should be seen if they hold:
#
# 1. round the *initial point* (Section 4.1) there is a plateau near log 10 = 2.303, the loss of a classifier that knows
#    nothing of ten classes: with larger eps, the adversarial loss has less relief, and falls less far below log 10
#    even along its steepest descent;
# 2. round the *minimum* (Section 4.2) the adversarial loss rises faster the larger eps is.
#
# Three losses are drawn, and told apart by name. *Vanilla*: clean images. *Frozen*: the adversarial images of the
# network in the centre, kept everywhere; its second derivative is the Hessian of notebook 4. *Adversarial*: the attack
# is made anew at each point; this is the loss that adversarial training descends. (LeNet has no batch normalisation; in
# networks that have it, the statistics stay those of the centre.)

# %% tags=["parameters"]
profile = "quick"
dataset = "mnist5k"
train_images = None  # all
model = "lenet"
width = 4
eps_grid = [0.0, 0.1, 0.2, 0.3]
linear_from = 0.3  # budgets from here on rise linearly over the first half of training; smaller ones are constant
seeds = [0, 1, 2]
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
surface_images = 50
attack_steps = 5
line_points = 9  # odd, so that the centre is one of them
radii = {"random": 1.0, "steepest descent": 0.3, "top eigenvector": 0.05}  # of the lines
plane_points = 11
plane_radius = 0.8
plane_grid = [0.0, 0.1, 0.3]
ceiling = 4.0  # losses above it are cut in the pictures of planes
eigen_images = 100

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

book = Book("05_loss_surfaces", globals())
images = data.load(dataset).first(train_images)
where = device()
x, y = images.x_train[:surface_images].to(where), images.y_train[:surface_images].to(where)
chance = np.log(images.num_classes)  # the loss of even probabilities
print(images.source)

# %% [markdown]
# ## The networks
#
# The same runs as in notebook 4: one network per eps and seed, and of each the initial point and the end of training.


# %%
def config(eps, seed):
    rising = {"schedule": "linear", "schedule_stop": 2 * eps} if eps >= linear_from else {}
    return runs.configure(book.parameters, eps=eps, seed=seed, **rising)


def attack_of(eps):
    # No random start: the adversarial loss is then a function of the parameters and of nothing else.
    return partial(pgd, eps=eps, step_size=2.5 * eps / attack_steps, num_steps=attack_steps, random_start=False)


def surface(network, directions, steps, loss, eps):
    """The named loss of a network trained at eps."""
    adversary = {"vanilla": "none", "frozen": "frozen", "adversarial": "rerun"}[loss]
    attack = None if adversary == "none" else attack_of(eps)
    return landscape.surface(network, directions, steps, x, y, attack=attack, adversary=adversary)


keys = list(product(eps_grid, seeds))
trained = dict(zip(keys, runs.grid([config(*k) for k in keys], images)))
minima = {key: run.model().to(where) for key, run in trained.items()}
starts = {key: run.model(0).to(where) for key, run in trained.items()}
n = f"{len(seeds)} seeds"

# %% [markdown]
# ## 1. Lines
#
# Through the initial point, along one filter-normalised random direction per seed and along the steepest descent of the
# network's own loss; through the minimum, along a random direction and along the top Hessian eigenvector. All are made
# equally long, but looked at on different scales: along an eigenvector the loss explodes.

# %%
many = images.x_train[:eigen_images].to(where), images.y_train[:eigen_images].to(where)
rows = []


def add_line(place, direction, network, vector, eps, seed):
    steps = radii[direction] * np.linspace(-1, 1, line_points)
    for loss in ("vanilla", "frozen", "adversarial") if eps else ("vanilla",):
        line = surface(network, vector, steps, loss, eps)
        about = {"place": place, "direction": direction, "loss": loss, "eps": eps, "seed": seed}
        rows.extend(about | {"step": a, "value": v, "error": e} for a, v, e in zip(steps, line.loss, line.error))


for (eps, seed), end in minima.items():
    start = starts[eps, seed]
    down = landscape.descent_direction(start, attack_of(eps)(start, x, y), y)
    eigenvector = landscape.eigen_directions(end, attack_of(eps)(end, *many), many[1], 1)
    add_line("initial point", "random", start, landscape.random_directions(start, 1, seed=seed), eps, seed)
    add_line("initial point", "steepest descent", start, down, eps, seed)
    add_line("minimum", "random", end, landscape.random_directions(end, 1, seed=seed), eps, seed)
    add_line("minimum", "top eigenvector", end, eigenvector, eps, seed)
lines = pd.DataFrame(rows)

# %%
cases = lines[["place", "direction"]].drop_duplicates().values.tolist()
fig, axes = plt.subplots(len(cases), len(eps_grid), figsize=(11, 10), sharex="row", sharey="row", squeeze=False)
for row, (place, direction) in zip(axes, cases):
    chosen = lines[(lines.place == place) & (lines.direction == direction)]
    for ax, (eps, group) in zip(row, chosen.groupby("eps")):
        sns.lineplot(group, x="step", y="value", hue="loss", style="loss", errorbar=("pi", 100), ax=ax,
                     hue_order=["vanilla", "frozen", "adversarial"], legend=ax is axes[0, -1])  # fmt: skip
        ax.axhline(chance, color="grey", linestyle=":", linewidth=1)
        ax.set(xlabel="step", ylabel="loss")
        ax.set_title(f"eps {eps:g}, {place},\n{direction}", fontsize=9)
    if place == "initial point":
        row[0].set_ylim(chance - 0.2, chance + 0.3)  # uphill, the loss goes on rising
sns.move_legend(axes[0, -1], "upper left", bbox_to_anchor=(1, 1))
book.save(
    fig, "05_lines", lines, source=images.source, seeds=seeds,
    caption=f"Loss along lines through the initial point (cut) and the minimum, by the eps of training and "
    f"of the attack; mean and range over {n}, {surface_images} training images, one scale per row. Dotted: log 10.",
)  # fmt: skip

# %% [markdown]
# How to read the first row: at an initial point, moving at random makes no class likelier, so the vanilla loss hardly
# changes, but it does change what an attack can gain. Where the dotted curve is a bowl, every random direction leads
# up; where the dashed one falls, the attack made in the centre has gone stale.
#
# Four numbers from each network's own loss (adversarial; at eps 0, vanilla). *Relief*: its standard deviation along the
# random line through the initial point. *Depth*: how far below log 10 it gets along the steepest descent. *Rise*: its
# mean at the two ends of a line through the minimum, less its value in the centre.

# %%
own = lines[(lines.loss == "adversarial") | (lines.eps == 0)]


def table(place, direction, measure):
    """measure(values along the line) for each network: a row per seed, a column per eps."""
    chosen = own[(own.place == place) & (own.direction == direction)]
    return chosen.groupby(["seed", "eps"]).value.agg(lambda values: measure(values.to_numpy())).unstack("eps")


def rise(values):
    return values[[0, -1]].mean() - values[len(values) // 2]


def ordered(table, sign):
    """True if the numbers rise (sign 1) or fall (-1) with eps in every seed, "partly" if only the end means do."""
    if (sign * table.diff(axis=1).iloc[:, 1:] > 0).all(axis=None):
        return True
    return "partly" if sign * (table.mean().iloc[-1] - table.mean().iloc[0]) > 0 else False


# %%
claims = {
    "Round the initial point the adversarial loss has less relief at larger eps, along random directions":
        ("4.1, our reading", -1, table("initial point", "random", np.std)),
    "Steepest descent from the initial point leads less far below log 10 at larger eps":
        ("4.1, our reading", -1, table("initial point", "steepest descent", lambda v: chance - v.min())),
    "Round the minimum the adversarial loss rises faster at larger eps, along random directions":
        ("4.2, a reviewer's question", 1, table("minimum", "random", rise)),
    "Round the minimum the adversarial loss rises faster at larger eps, along the top eigenvector":
        ("4.2, a reviewer's question", 1, table("minimum", "top eigenvector", rise)),
}  # fmt: skip
for claim, (section, sign, numbers) in claims.items():
    measured = ", ".join(f"{m:.3f} ({lo:.3f} to {hi:.3f}) at {e:g}" for e, m, lo, hi in
                         zip(numbers, numbers.mean(), numbers.min(), numbers.max()))  # fmt: skip
    book.claim(
        claim, section=section, measured=measured, holds=ordered(numbers, sign),
        n=f"{n} x {surface_images} images, mean (range)", source=images.source,
    )  # fmt: skip
pd.concat({claim: numbers for claim, (_, _, numbers) in claims.items()}).round(3)

# %% [markdown]
# ## 2. Planes
#
# The first seed, in the plane of two filter-normalised random directions. Top: the adversarial loss round the initial
# point, the same network in all columns. Middle: the adversarial loss round the minimum of training at that eps. Below:
# the vanilla loss round the same minimum. All panels have one scale.

# %%
seed, ticks = seeds[0], np.linspace(-plane_radius, plane_radius, plane_points)
places = {"initial point, adversarial": (starts, "adversarial"), "minimum, adversarial": (minima, "adversarial"),
          "minimum, vanilla": (minima, "vanilla")}  # fmt: skip
planes, rows = {}, []
for eps, (title, (networks, loss)) in product(plane_grid, places.items()):
    network = networks[eps, seed]
    directions = landscape.random_directions(network, 2, seed=seed)
    planes[title, eps] = surface(network, directions, ticks, loss if eps else "vanilla", eps).loss
    rows += [{"panel": title, "eps": eps, "step_1": a, "step_2": b, "value": planes[title, eps][i, j]}
             for (i, a), (j, b) in product(enumerate(ticks), enumerate(ticks))]  # fmt: skip
plane_table = pd.DataFrame(rows)

# %%
levels = np.linspace(0, ceiling, 21)
fig, axes = plt.subplots(len(places), len(plane_grid), figsize=(9, 8.2), sharex=True, sharey=True)
for (title, row), (column, eps) in product(zip(places, axes), enumerate(plane_grid)):
    ax, values = row[column], planes[title, eps].T
    filled = ax.contourf(ticks, ticks, values, levels=levels, cmap="viridis", extend="max")
    ax.contour(ticks, ticks, values, levels=[chance], colors="white", linestyles=":", linewidths=1)
    ax.plot(0, 0, "+", color="white")
    ax.set_title(f"{title}, eps {eps:g}", fontsize=9)
fig.supxlabel("step along direction 1")
fig.supylabel("step along direction 2")
fig.colorbar(filled, ax=axes, label="loss", shrink=0.6, ticks=levels[::5])
book.save(
    fig, "05_contours", plane_table, source=images.source, seeds=[seed],
    caption=f"Loss over the plane of two filter-normalised random directions, one seed, {surface_images} training "
    f"images, one scale for all (values above the colour bar are cut). White dots: log 10; +: the centre.",
)  # fmt: skip

# %%
fig = plt.figure(figsize=(10, 6.4))
for i, (title, eps) in enumerate(product(list(places)[:2], plane_grid)):
    ax = fig.add_subplot(2, len(plane_grid), i + 1, projection="3d")
    ax.plot_surface(*np.meshgrid(ticks, ticks), planes[title, eps].T.clip(max=ceiling), cmap="viridis", vmin=0,
                    vmax=ceiling, linewidth=0.2, edgecolor="white", rstride=1, cstride=1)  # fmt: skip
    ax.set(zlim=(0, ceiling), xticks=[-plane_radius, 0, plane_radius], yticks=[-plane_radius, 0, plane_radius])
    ax.set_title(f"{title}, eps {eps:g}", fontsize=9)
    ax.tick_params(labelsize=7, pad=-2)
    ax.view_init(28, -60)
book.save(
    fig, "05_surfaces", plane_table[plane_table.panel.isin(list(places)[:2])], source=images.source, seeds=[seed],
    caption=f"The adversarial loss of the contour figure as a surface, cut at {ceiling:g}: round the initial point "
    "(top) and round the minimum (below), one scale for all.",
)  # fmt: skip

# %% [markdown]
# ## The ledger

# %%
book.close()
