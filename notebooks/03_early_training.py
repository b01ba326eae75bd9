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
# # 3. Early training: the plateau, and the constant classifier
#
# Section 4.1 of Liu et al. (2020, Figures 2 and 3 there) looks at the beginning of adversarial training. With a larger
# eps the gradients of the adversarial loss are smaller, and training stays longer on a plateau, where the network
# predicts nothing. If eps is too large, it never leaves: it ends as a *constant classifier*, which gives every input
# the same answer, at probabilities near the class frequencies and a loss of log 10 for ten even classes. Where training
# gets under way, the paper expects larger gradients at its end for larger eps (Section 3.2).
#
# **What Theorem 2 says of that, and what it does not.** It bounds from *above* how small the gradient gets under SGD,
# by a term that grows with eps. A bound that grows forbids no small gradient. That the gradient itself grows is an
# expectation beside the theorem, tested below as such.
#
# What should be seen if the paper is right:
#
# 1. at one and the same initial point, and over the first mini-batches, the gradient is smaller for larger eps;
# 2. the plateau lasts longer, and at the largest eps for ever;
# 3. networks that stay there give all inputs one class, at a loss of log 10, and have dead or degenerate layers;
# 4. networks that are through have larger gradients at the end of training, the larger eps is.
#
# The *error* of a classifier is the share of inputs that it gets wrong. Its *robust error* at eps is the share for
# which some input within eps (each pixel moved by at most eps, pixels in [0, 1]) is wrong. Here an attack (PGD) looks
# for that input, so the numbers are lower bounds.

# %% tags=["parameters"]
profile = "quick"
recipe = "lenet on mnist5k"
changes = {}  # of the recipe: {recipe: {setting: value}}
eps_grid = [0.0, 0.05, 0.1, 0.2, 0.4]
seeds = [0, 1, 2]
starts_per_seed = 1  # initial points whose gradients are compared
gradient_images = None  # first training images, on which whole gradients are taken (None: all)
first_steps = 20  # mini-batches that count as the first
shown_steps = 200  # mini-batches that are drawn
leaves_below = 0.7  # a mini-batch's robust error below this ends the plateau
through_below = 1.15  # mean adversarial loss of the last epoch: half of log 10

# %%
import math
from functools import partial
from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import PowerNorm
from matplotlib.ticker import LogLocator

from lib import curvature, evaluation, inference, models, recipes, runs
from lib.attacks import pgd
from lib.compute import device
from lib.differentiate import differentiating
from lib.figures import Book, draw_attacked, eps_colours

book = Book("03_early_training", globals())
settings = book.recipe(recipe)
digits, _ = recipes.load(settings)
where, colours = device(), eps_colours(eps_grid)
x, y = (t[:gradient_images].to(where) for t in (digits.x_train, digits.y_train))

# %% [markdown]
# ## The networks
#
# One network per eps and seed, trained throughout at that eps. The step size of the attack scales with eps, so that
# every attack crosses its ball in equally many steps. Notebooks 2, 4, 5, 8, 9 and 10 study some of the same networks.

# %%
keys = list(product(eps_grid, seeds))
configs = {k: recipes.configure(settings, schedule="constant", eps=k[0], seed=k[1]) for k in keys}
trained = dict(zip(keys, runs.grid(configs.values(), digits)))
n = f"{len(seeds)} seed{'s' * (len(seeds) > 1)}"


def listing(values, decimals=3):
    """The medians over the seeds at each eps, in words."""
    medians = np.median(values, axis=0)
    return ", ".join(f"{'never' if math.isinf(m) else f'{m:.{decimals}f}'} at {e:g}" for e, m in zip(eps_grid, medians))


# %% [markdown]
# ## 1. What the networks are trained on
#
# A digit as it is, and attacked at each eps by the network trained there. Beside it one attacked without having been
# trained for it. The perturbation has a scale of its own: from -eps (blue) to eps (red).


# %%
def attack_of(eps, num_steps=settings["num_steps"]):
    # Without a random start, in full precision: a function of the parameters and of nothing else.
    step = max(settings["step_fraction"], 1 / num_steps) * eps
    return partial(pgd, eps=eps, step_size=step, num_steps=num_steps, random_start=False, precision="full")


shown = [int((digits.y_test == k).nonzero()[0]) for k in (3, 7) if (digits.y_test == k).any()] or [0]
few = digits.x_test[shown].to(where), digits.y_test[shown].to(where)
pairs = [(eps_grid[0], e) for e in sorted(eps_grid)[-2:-1]] + [(e, e) for e in eps_grid]  # trained at, attacked at

# %%
fig, axes = plt.subplots(2 * len(shown), len(pairs), figsize=(7, 2.5 * len(shown)), squeeze=False)
rows = []
for column, (at, eps) in zip(axes.T, pairs):
    network = trained[at, seeds[0]].model().to(where)
    attacked = attack_of(eps, 10)(network, *few) if eps else few[0]
    given = evaluation.predict(network, attacked).argmax(1).tolist()
    for i, (clean, label) in enumerate(zip(few[0], few[1].tolist())):
        pair, title = column[2 * i : 2 * i + 2], f"trained at {at:g}\n{label} called {given[i]}"
        largest = draw_attacked(pair, clean, attacked[i], eps, title, wrong=given[i] != label)
        pair[1].set_title(f"$\\pm${eps:g}" if eps else "no change", fontsize=8)
        rows.append((at, eps, label, given[i], largest))
book.save(
    fig, "03_attacked_digits", pd.DataFrame(rows, columns=["trained at", "eps", "label", "given", "largest change"]),
    source=digits.source, seeds=seeds[:1],
    caption="Test digits attacked (PGD-10), first by a network that was trained at another eps, then at the eps of "
    "training; below each the perturbation on a scale of its own. The title gives the digit and the network's answer, "
    "orange if wrong.",
)  # fmt: skip

# %% [markdown]
# ## 2. The gradient at the initial point
#
# The gradient of the adversarial loss of the same images at the same parameters: only eps differs. So nothing is
# confounded by where training has got to.

# %%
rule_start = inference.trend("norm of the gradient at one and the same initial point, along eps", expect="falls")
rule_start


# %%
@differentiating()
def gradients(network, eps, batch=settings["batch_size"]):
    """Norm of the gradient of the adversarial loss over all the images, and the mean norm over its mini-batches."""
    attacked = evaluation.attacked(network, x, y, attack_of(eps)) if eps else x
    batches, model = zip(attacked.split(batch), y.split(batch)), curvature.copied(network)
    pieces = [curvature.loss_gradient(model, *part) for part in batches]  # of the summed loss
    sizes = [len(part) for part in y.split(batch)]
    return {
        "full": sum(pieces).norm().item() / len(x),
        "batch": float(np.mean([g.norm().item() / k for g, k in zip(pieces, sizes)])),
    }


def at_start(seed):
    shape = {"in_channels": x.shape[1], "num_classes": digits.num_classes, "image_size": x.shape[2]}
    start = models.build(settings["model"], seed=seed, width=settings["width"], **shape).to(where).eval()
    return [gradients(start, eps) for eps in eps_grid]


about = {"data": digits.fingerprint, "images": len(x), "eps": eps_grid, "steps": settings["num_steps"],
         "fraction": settings["step_fraction"], "batch": settings["batch_size"]}  # fmt: skip
shape = {k: settings[k] for k in ("model", "width")}
origins = [1000 * seed + i for seed in seeds for i in range(starts_per_seed)]
starts = pd.DataFrame(
    {"eps": eps, "start": origin} | row
    for origin in origins
    for eps, row in zip(eps_grid, runs.remember("starts", about | shape | {"seed": origin}, partial(at_start, origin)))
)

# %%
fig, ax = plt.subplots(figsize=(4.5, 3))
for _, group in starts.groupby("start"):
    ax.plot(group.eps, group.full, color="0.6", linewidth=1)
ax.scatter(starts.eps, starts.full, color=[colours[e] for e in starts.eps], zorder=2, clip_on=False)
ax.set(xlabel="eps of the attack", ylabel="norm of the gradient", ylim=(0, None))
many = f"{len(origins)} initial point{'s' * (len(origins) > 1)}"
book.save(
    fig, "03_gradient_at_the_start", starts, source=digits.source, seeds=origins,
    caption=f"Norm of the gradient of the adversarial loss at initial points of the network, over {len(x):,} training "
    f"images at once; a line per initial point ({many}).",
)  # fmt: skip

# %%
values = starts.pivot(index="start", columns="eps", values="full").to_numpy()
book.claim(
    "At one and the same initial point the gradient of the adversarial loss is smaller for larger eps",
    section="4.1",
    paper="gradients are smaller at the beginning of training if eps is larger (ours is the stricter reading)",
    holds=rule_start(values),
    ours=True,
    n=f"{many}, {len(x):,} training images, PGD-{settings['num_steps']} without a random start",
    source=digits.source,
    believe=True,
)

# %% [markdown]
# ## 3. The first mini-batches
#
# The norm of each mini-batch's gradient, and the robust error on the same mini-batch before the step. Two numbers are
# taken from these curves as they are, without smoothing: the *median norm over the first mini-batches*, and the
# *length of the plateau*, the mini-batches before the first one whose robust error is below a mark that guessing
# does not reach (for mini-batches of 64 it lies five standard deviations below guessing). A run that never gets there
# is counted as infinitely long.

# %%
rule_first = inference.trend(f"median gradient norm over the first {first_steps} mini-batches, along eps",
                             expect="falls")  # fmt: skip
rule_first

# %%
rule_plateau = inference.trend("length of the plateau, along eps", expect="rises")
rule_plateau

# %%
steps = pd.concat(
    run.steps[["gradient_norm", "robust_error"]].assign(train_eps=eps, seed=seed, step=range(1, len(run.steps) + 1))
    for (eps, seed), run in trained.items()
)
early = steps[steps.step <= shown_steps]
smooth = early.set_index(["train_eps", "seed", "step"]).groupby(level=[0, 1])
smooth = smooth.transform(lambda s: s.rolling(10, min_periods=1).mean()).reset_index()
fig, axes = plt.subplots(1, 2, figsize=(7, 3))
labels = {"gradient_norm": "gradient norm", "robust_error": "robust error of the mini-batch"}
for ax, (column, label) in zip(axes, labels.items()):
    sns.lineplot(smooth, x="step", y=column, hue="train_eps", palette=colours, errorbar=("pi", 100), ax=ax,
                 err_kws={"alpha": 0.15}, legend=column == "robust_error")  # fmt: skip
    ax.set(xlabel="mini-batch", ylabel=label)
axes[0].set_yscale("log")
axes[0].axvline(first_steps, color="grey", linestyle="--")
axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 3)))
axes[0].yaxis.set_major_formatter("{x:g}")
axes[1].axhline(leaves_below, color="grey", linestyle=":")
sns.move_legend(axes[1], "upper left", bbox_to_anchor=(1, 1), title="eps", frameon=False)
book.save(
    fig, "03_first_minibatches", early, source=digits.source, seeds=seeds,
    caption=f"Gradient norm and robust error over the first {shown_steps} mini-batches, by eps: mean and range of {n}; "
    f"drawn as the mean of the last ten, judged without. Dashed: the end of the first {first_steps}. Dotted: the "
    "plateau ends.",
)  # fmt: skip


# %%
def plateau(errors):
    below = np.asarray(errors) < leaves_below
    return float(below.argmax()) if below.any() else math.inf


first = inference.by_seed({k: run.steps.gradient_norm[:first_steps].median() for k, run in trained.items()})
lengths = inference.by_seed({k: plateau(run.steps.robust_error) for k, run in trained.items()})
book.claim(
    "Over the first mini-batches the gradient is smaller for larger eps",
    section="4.1, Figure 2",
    paper="gradients are smaller at the beginning of training if eps is larger",
    holds=rule_first(first),
    n=f"{n}, {first_steps} mini-batches each",
    source=digits.source,
)
book.claim(
    "Early training stalls for longer at larger eps",
    section="4.1, Figure 2",
    paper="training with a large eps stays longer where the loss does not fall",
    holds=rule_plateau(lengths),
    n=n,
    source=digits.source,
    believe=True,
)
print("Median length of the plateau in mini-batches:", listing(lengths, 0))

# %% [markdown]
# The two claims on the gradient differ, because the first one compares equal parameters and the second one networks
# that are not: some are already under way, and among those that are not yet, what is small is the gradient *on the
# plateau*, where the network has learnt to give every input the same answer, rather than that of the loss at the start.
#
# ## 4. The constant classifier
#
# What the networks answer to clean test digits in the end. Left: the share of each class among the answers, one column
# per network. A constant classifier is a single dark cell. Right: the adversarial loss on test digits.

# %%
high = max(eps_grid)
rule_class = inference.exact(f"share of the digits that get another answer than most, eps {high:g}, in any seed",
                             tolerance=0.01)  # fmt: skip
rule_class

# %%
rule_loss = inference.exact(f"adversarial loss at eps {high:g} minus the log of the number of classes", tolerance=0.02)
rule_loss

# %%
x_test = digits.x_test
answers = {k: evaluation.predict(run.model().to(where), x_test.to(where)).argmax(1) for k, run in trained.items()}
shares = {k: np.bincount(a.cpu(), minlength=digits.num_classes) / len(x_test) for k, a in answers.items()}
losses = {k: run.history.iloc[-1].robust_loss for k, run in trained.items()}
rows = [{"eps": k[0], "seed": k[1], "class": i, "share": v, "robust_loss": losses[k]}
        for k in keys for i, v in enumerate(shares[k])]  # fmt: skip
fig, axes = plt.subplots(1, 2, figsize=(7, 3), width_ratios=[3, 2])
names = [f"{e:g}" if s == seeds[len(seeds) // 2] else "" for e, s in keys]
sns.heatmap(np.array([shares[k] for k in keys]).T, cmap="Blues", norm=PowerNorm(0.5, 0, 1), ax=axes[0],
            xticklabels=names, cbar_kws={"label": "share of the answers", "ticks": [0, 0.1, 0.3, 0.6, 1]})  # fmt: skip
for i in range(1, len(eps_grid)):
    axes[0].axvline(i * len(seeds), color="white", linewidth=3)
sns.despine(ax=axes[0], top=False, right=False)
axes[0].set(xlabel=f"eps ({n} each)", ylabel="class")
axes[0].tick_params(rotation=0)
places, shades = [eps_grid.index(e) for e, _ in keys], [colours[e] for e, _ in keys]
axes[1].scatter(places, [losses[k] for k in keys], c=shades, clip_on=False)
axes[1].axhline(math.log(digits.num_classes), color="grey", linestyle=":")
axes[1].text(0, math.log(digits.num_classes) - 0.05, f"log {digits.num_classes}", va="top", color="grey")
axes[1].set(xlabel="eps", ylabel="adversarial loss on test digits", ylim=(0, None),
            xticks=range(len(eps_grid)), xticklabels=[f"{e:g}" for e in eps_grid])  # fmt: skip
book.save(
    fig, "03_constant_classifier", pd.DataFrame(rows), source=digits.source, seeds=seeds,
    caption=f"Answers to {len(x_test):,} clean test digits (white: none; the scale is of roots) and adversarial loss "
    f"of the first {settings['eval_images']}, after {settings['epochs']} epochs; each column or point is a network, "
    f"{n} per eps.",
)  # fmt: skip

# %%
most = inference.by_seed({k: v.max() for k, v in shares.items()})
constant = {eps: sum(shares[eps, s].max() == 1 for s in seeds) for eps in eps_grid}
book.claim(
    "At the largest eps training ends in a constant classifier, at a loss of log 10",
    section="4.1, Figure 3",
    paper="for too large an eps the network becomes a constant classifier",
    holds=inference.together({
        "one answer": rule_class(1 - most[:, -1]),
        "loss": rule_loss([losses[high, s] - math.log(digits.num_classes) for s in seeds]),
    }),
    n=f"{n}, {len(x_test):,} test digits ({settings['eval_images']} for the loss)",
    source=digits.source,
)  # fmt: skip
print("Networks that give one answer to all digits:", ", ".join(f"{v} of {n} at {e:g}" for e, v in constant.items()))

# %% [markdown]
# ## 5. Where the input gets lost
#
# A unit is *dead* if it is 0 for every test digit, and *constant* if it has the same value for all of them (to 1e-6).
# Nothing of the input gets past a layer of constant units only: it is *degenerate*. The logits are constant units, too,
# where the network ignores its input.

# %%
rule_dead = inference.trend("share of dead units in the deadest layer, along eps", expect="rises")
rule_dead

# %%
activity = pd.DataFrame(
    {"eps": k[0], "seed": k[1], "number": i} | row
    for k, run in trained.items()
    for i, row in enumerate(evaluation.unit_activity(run.model().to(where), x_test.to(where)))
)
hidden = activity[activity.layer != "logits"]
grid = hidden.pivot(index="number", columns=["eps", "seed"], values="dead")[keys]
fig, ax = plt.subplots(figsize=(7, 2.2))
sns.heatmap(grid, annot=grid.map(lambda v: f"{int(100 * v)}"), fmt="", cmap="rocket_r", vmin=0, vmax=1, ax=ax,
            annot_kws={"fontsize": 7}, xticklabels=names, cbar_kws={"label": "share of dead units"},
            yticklabels=[f"layer {i + 1}" for i in grid.index])  # fmt: skip
for i in range(1, len(eps_grid)):
    ax.axvline(i * len(seeds), color="white", linewidth=3)
ax.set(xlabel=f"eps ({n} each)", ylabel="")
ax.tick_params(rotation=0)
book.save(
    fig, "03_dead_layers", activity, source=digits.source, seeds=seeds,
    caption=f"Dead units in per cent, rounded down, by layer, over {len(x_test):,} test digits: a column for each "
    "network.",
)  # fmt: skip

# %%
degenerate_in = set(hidden[hidden.constant == 1][["eps", "seed"]].itertuples(index=False, name=None))
one_answer = {key for key, share in shares.items() if share.max() == 1}
deadest = inference.by_seed(hidden.groupby(["eps", "seed"]).dead.max().to_dict())
degenerate = hidden[hidden.constant == 1].groupby("eps").seed.nunique().reindex(eps_grid, fill_value=0)
found = rule_dead(deadest)
book.claim(
    "The larger eps, the more dead units the deadest layer has",
    section="4.1, Figure 3",
    paper="constant classifiers come with dead or degenerate layers (counted here; the trend is what is judged)",
    ours=True,
    measured=f"{found.measured}; a degenerate layer in {len(degenerate_in & one_answer)} of {len(one_answer)} networks "
    "that give one answer to all digits",
    holds=found,
    n=f"{n}, {len(x_test):,} test digits",
    source=digits.source,
)
print("Networks with a degenerate hidden layer:", ", ".join(f"{v} at {e:g}" for e, v in degenerate.items()))

# %% [markdown]
# ## 6. The end of training
#
# A network is *through* if the mean adversarial loss of the last epoch's mini-batches is below the mark in the
# parameters, half of log 10. Only eps at which three networks in four are through say something of the end of training,
# and only seeds whose networks are through at all of these; the others are left out, and named. There, the gradient of
# the adversarial loss over all images at once (*full*) and the mean norm over its mini-batches (*batch*) at the same,
# last parameters. The full gradient tells how far from a stationary point training ended, the mini-batches' how noisy
# the next step would be.

# %%
rule_full = inference.trend("full gradient norm at the end of training, along the eps that are through", expect="rises")
rule_full

# %%
rule_batch = inference.trend("mini-batch gradient norm at the end, along the eps that are through", expect="rises")
rule_batch

# %%
passed = {(e, s): trained[e, s].last_loss < through_below for e, s in product(eps_grid, seeds)}
ended_eps, ended_seeds, out, unless = inference.ended(passed)
rows = []
for eps, seed in product(ended_eps, ended_seeds):
    run = trained[eps, seed]
    facts = {k: v for k, v in about.items() if k != "eps"} | {"run": run.folder.name}
    norms = runs.remember("ends", facts, partial(gradients, run.model().to(where), eps))
    rows.append({"eps": eps, "seed": seed, "last_loss": run.last_loss} | norms)
print(unless or f"Left out, since a network is not through: {out or 'none'}")

# %%
ends = pd.DataFrame(rows, columns=["eps", "seed", "last_loss", "full", "batch"])
fig, axes = plt.subplots(1, 2, figsize=(7, 3))
for ax, column, title in zip(axes, ("full", "batch"), (f"all {len(x):,} images", f"{settings['batch_size']} images")):
    ax.scatter(ends.eps, ends[column], color=[colours[e] for e in ends.eps], clip_on=False)
    ax.plot(ends.groupby("eps")[column].mean(), color="0.6", zorder=0)
    ax.set(xlabel="eps of training", ylabel=f"gradient norm, {title}", ylim=(0, None))
count = f"{len(ended_seeds)} seed{'s' * (len(ended_seeds) > 1)}"
book.save(
    fig, "03_final_gradient", ends, source=digits.source, seeds=ended_seeds,
    caption=f"Norm of the gradient of the adversarial loss at the end of training, over all images and over "
    f"mini-batches; {f'left out: {out}; ' * bool(out)}a point per network ({count}), line: mean.",
)  # fmt: skip

# %%
for name, column, rule in (("full", "full", rule_full), ("mini-batch", "batch", rule_batch)):
    values = ends.pivot(index="seed", columns="eps", values=column).to_numpy()
    book.claim(
        f"At the end of training the {name} gradient is larger for larger eps",
        section="3.2, 4.1, Figure 2",
        paper="gradients do not vanish at the end of training, the less so the larger eps is",
        holds=rule(values, unless=unless),
        n=f"{count}, {len(ended_eps)} eps, {len(x):,} images{f', without {out}' * bool(out)}",
        source=digits.source,
    )

# %% [markdown]
# ## Change this, expect that
#
# - `first_steps = 1`: at the very first mini-batch nobody has moved, and the second claim turns round like the first.
# - `leaves_below = 0.9`: the noise of a mini-batch passes for learning, and every plateau ends within a few
#   mini-batches, even at the largest eps.
# - `eps_grid = [0.0, 0.3]` with `changes = {"lenet on mnist5k": {"lr": 1e-3, "batch_size": 32}}`: at a lower rate the
#   plateau is left at eps 0.3; with the recipe's own rate it is not.

# %%
book.close()
