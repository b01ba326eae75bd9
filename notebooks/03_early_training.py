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
# Section 4.1 of Liu et al. (2020) looks at the first mini-batches of adversarial training. The larger eps is, the
# smaller are the gradients of the adversarial loss round the initial point, and the longer training stays on a plateau
# where the network predicts nothing. If eps is too large, it never leaves: it ends as a *constant classifier*, which
# gives every input the same probabilities, the class frequencies, at a loss of log 10 for ten even classes. Where
# training does get under way, the gradients at its end do **not** vanish, and are larger for larger eps (Section 3.2,
# Theorem 2).
#
# What should be seen if this holds:
#
# 1. the gradient norm over the first mini-batches falls with eps, and the robust error stays near 0.9 for longer;
# 2. at large eps all predictions are one class, and the loss is log 10 = 2.303;
# 3. in such a network some layer passes nothing of the input on;
# 4. among the networks that do train, the stochastic gradient at the end of training grows with eps.
#
# The *error* of a classifier is the share of inputs it gets wrong. Its *robust error* at eps is the share of inputs
# for which some input within eps (each pixel moved by at most eps, pixels in [0, 1]) is wrong. Here an attack (PGD)
# looks for that input, so the numbers are lower bounds.

# %% tags=["parameters"]
profile = "quick"
dataset = "mnist5k"
train_images = None  # all
model = "lenet"
width = 4
eps_grid = [0.0, 0.1, 0.2, 0.3, 0.4]
seeds = [0, 1, 2]
epochs = 4
batch_size = 64
num_steps = 3
step_fraction = 0.5  # the attack's step size, as a fraction of eps
optimizer = "adam"
lr = 3e-3
eval_every = 2
eval_images = 500
early_steps = 200  # mini-batches that count as early

# %%
import math
from itertools import pairwise, product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from lib import data, evaluation, runs
from lib.figures import Book

book = Book("03_early_training", globals())
digits = data.load(dataset).first(train_images)
print(digits.source)

# %% [markdown]
# ## The experiment
#
# One network per eps and seed, trained throughout at that eps. The step size of the attack scales with eps, so that
# every attack crosses its ball in equally many steps. Finished runs are kept and found again, here and in the notebooks
# that study the same networks further (4, 5 and 9).

# %%
keys = list(product(eps_grid, seeds))
configs = [runs.configure(book.parameters, eps=eps, seed=seed) for eps, seed in keys]
trained = dict(zip(keys, runs.grid(configs, digits)))
n = f"{len(seeds)} seeds"

# %% [markdown]
# ## 1. The first mini-batches
#
# The norm of the gradient of each mini-batch's adversarial loss, over all parameters, and the robust error on the same
# mini-batch before the step. Lines are means over seeds of a running mean over ten mini-batches; bands run from the
# smallest to the largest seed.

# %%
steps = pd.concat(
    run.steps.assign(train_eps=eps, seed=seed, step=range(1, len(run.steps) + 1))
    for (eps, seed), run in trained.items()
)
smooth = steps.set_index(["train_eps", "seed", "step"])[["gradient_norm", "robust_error"]]
smooth = smooth.groupby(level=[0, 1]).transform(lambda s: s.rolling(10, min_periods=1).mean()).reset_index()
early = smooth[smooth.step <= early_steps]

fig, axes = plt.subplots(1, 2, figsize=(10, 3.8))
labels = {"gradient_norm": "gradient norm", "robust_error": "robust error (mini-batch)"}
for ax, (column, label) in zip(axes, labels.items()):
    sns.lineplot(early, x="step", y=column, hue="train_eps", style="train_eps", palette="viridis",
                 errorbar=("pi", 100), ax=ax)  # fmt: skip
    ax.set(xlabel="mini-batch", ylabel=label)
axes[0].set_yscale("log")
axes[0].get_legend().remove()
sns.move_legend(axes[1], "upper left", bbox_to_anchor=(1, 1), title="eps")
axes[1].axhline(0.9, color="grey", linestyle=":")
book.save(
    fig, "03_first_minibatches", early, source=digits.source, seeds=seeds,
    caption=f"Gradient norm and robust error over the first {early_steps} mini-batches of adversarial training, by "
    f"eps; mean and range over {n}, running mean of ten. Dotted: guessing among ten classes.",
)  # fmt: skip

# %% [markdown]
# How small is the gradient at first? Take the median of the smoothed norm over the first 20 mini-batches: later the
# networks of the smallest eps are through, and their gradients fall because they fit. How long is the plateau? Count
# the mini-batches until the running mean of the robust error first falls below 0.8. A run that never gets there is
# counted as "stays".


# %%
def plateau(group):
    below = group.robust_error.to_numpy()[9:] < 0.8  # from the first full window on
    return 10 + int(below.argmax()) if below.any() else math.inf


lengths = smooth.groupby(["train_eps", "seed"])[["robust_error"]].apply(plateau).unstack("seed")
first = early[early.step <= 20].groupby(["train_eps", "seed"]).gradient_norm.median().unstack("seed")
summary = pd.DataFrame({"plateau, median": lengths.median(axis=1), "stays": np.isinf(lengths).sum(axis=1),
                        "gradient norm, first 20": first.median(axis=1)})  # fmt: skip
summary.replace(math.inf, "never leaves").round(3)

# %% [markdown]
# The first claim counts as reproduced if, from each eps to the next larger one, the norm falls in every seed, or the
# seeds' ranges overlap (two runs that both sit on the plateau differ by noise only), and the largest eps lies below the
# smallest one in every seed.

# %%
norms, lows, highs = first.median(axis=1), first.min(axis=1), first.max(axis=1)
no_rise = (lows.to_numpy()[1:] <= highs.to_numpy()[:-1]).all()
falls = highs.iloc[-1] < lows.iloc[0]
book.claim(
    "The gradient of the adversarial loss is smaller at the start the larger eps is",
    section="4.1",
    measured=", ".join(f"{v:.3f}" for v in norms) + f" at eps {', '.join(f'{e:g}' for e in norms.index)}",
    holds=bool(no_rise and falls) or ("partly" if falls else False),
    n=f"{n}, median norm over the first 20 mini-batches",
    source=digits.source,
)
median = lengths.median(axis=1)
ordered = all(a <= b for a, b in pairwise(median)) and median.iloc[-1] > median.iloc[0]
book.claim(
    "Early training stalls for longer at larger eps",
    section="4.1",
    measured=", ".join("never" if math.isinf(v) else f"{v:.0f}" for v in median) + " mini-batches on the plateau",
    holds=True if ordered else "partly" if median.iloc[-1] > median.iloc[0] else False,
    n=f"{n}, medians at eps {', '.join(f'{e:g}' for e in median.index)}",
    source=digits.source,
)

# %% [markdown]
# ## 2. The constant classifier
#
# What the networks predict for clean test digits at the end. Left: the share of each class among the predictions, one
# column per network. A constant classifier is a single dark cell. Right: the adversarial loss on test digits against
# log 10, the loss of a classifier that answers with even probabilities whatever it is shown.

# %%
x, y = digits.x_test, digits.y_test
rows = []
for (eps, seed), run in trained.items():
    counts = np.bincount(evaluation.predict(run.model(), x).argmax(1), minlength=10) / len(x)
    last = run.history.iloc[-1]
    rows += [{"eps": eps, "seed": seed, "class": k, "share": share, "robust_loss": last.robust_loss}
             for k, share in enumerate(counts)]  # fmt: skip
predictions = pd.DataFrame(rows)
ends = predictions.groupby(["eps", "seed"]).agg(largest=("share", "max"), robust_loss=("robust_loss", "first"))
ends = ends.reset_index()

# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 3.8), width_ratios=[3, 2])
grid = predictions.pivot_table(index="class", columns=["eps", "seed"], values="share")
names = [f"{e:g}" if s == seeds[len(seeds) // 2] else "" for e, s in grid.columns]
sns.heatmap(
    grid, cmap="mako_r", vmin=0, vmax=1, ax=axes[0], xticklabels=names, cbar_kws={"label": "share of predictions"}
)
axes[0].set(xlabel=f"eps ({n} each)", ylabel="predicted class")
sns.swarmplot(ends, x="eps", y="robust_loss", hue="eps", palette="viridis", legend=False, size=6, ax=axes[1])
axes[1].axhline(math.log(10), color="grey", linestyle=":", label="log 10")
axes[1].set(xlabel="eps", ylabel="adversarial loss on test digits", ylim=(0, None))
axes[1].legend(loc="lower right")
book.save(
    fig, "03_constant_classifier", predictions, source=digits.source, seeds=seeds,
    caption=f"Predicted classes and adversarial loss after {epochs} epochs, by the eps of training; each column or "
    f"point is one of {n}. One dark cell and a loss of log 10 mark a constant classifier.",
)  # fmt: skip

# %%
top = ends[ends.eps == max(eps_grid)]
constant = ends.assign(is_constant=ends.largest == 1).groupby("eps").is_constant.sum()
book.claim(
    "At large eps training ends in a constant classifier, at a loss of log 10",
    section="4.1",
    measured=f"one class for every input in {constant.iloc[-1]} of {len(top)} networks at eps {max(eps_grid):g} and in "
    f"{constant.iloc[0]} at eps {min(eps_grid):g}; loss {top.robust_loss.mean():.4f} against {math.log(10):.4f}",
    holds=bool(
        (top.largest == 1).all() and (top.robust_loss - math.log(10)).abs().max() < 0.01 and constant.iloc[0] == 0
    )
    or ("partly" if constant.iloc[-1] > constant.iloc[0] else False),
    n=f"{n}, {len(x):,} test digits",
    source=digits.source,
)
constant.to_frame("constant classifiers").T

# %% [markdown]
# ## 3. Where the input gets lost
#
# A unit is *dead* if it is 0 for every test digit, and *constant* if it has the same value for all of them (to 1e-6).
# A layer of constant units only is *degenerate*: nothing of the input gets past it, and a network that has one is a
# constant classifier in the strict sense. One that predicts a single class without such a layer answers with nearly,
# but not exactly, equal probabilities: then the claim counts as "partly", provided that the deadest layer of every such
# network has more dead units than that of any other.

# %%
activity = pd.DataFrame(
    {"eps": eps, "seed": seed} | row
    for (eps, seed), run in trained.items()
    for row in evaluation.unit_activity(run.model(), x)
)
layers = {name: f"layer {i + 1}" for i, name in enumerate(activity.layer.unique()[:-1])} | {"logits": "logits"}
activity["layer"] = activity.layer.map(layers)
means = activity.groupby(["eps", "layer"])[["dead", "constant"]].mean()
fig, axes = plt.subplots(1, 2, figsize=(10, 3.4), sharey=True)
for ax, column in zip(axes, ("dead", "constant")):
    sns.heatmap(means[column].unstack("layer"), annot=True, fmt=".2f", cmap="rocket_r", vmin=0, vmax=1, ax=ax,
                cbar=column == "constant")  # fmt: skip
    ax.set(title=f"share of {column} units", xlabel="", ylabel="eps" if column == "dead" else "")
book.save(
    fig, "03_dead_layers", activity, source=digits.source, seeds=seeds,
    caption=f"Share of dead and of constant units by layer and eps, over {len(x):,} test digits, mean of {n}.",
)  # fmt: skip

# %%
degenerate = activity[activity.constant == 1].groupby(["eps", "seed"]).size().reindex(keys, fill_value=0) > 0
one_class = ends.set_index(["eps", "seed"]).largest.reindex(keys) == 1
dead = activity[activity.layer != "logits"].groupby(["eps", "seed"]).dead.max().reindex(keys)
book.claim(
    "The constant classifier comes with dead or degenerate layers",
    section="4.1",
    measured=f"{(degenerate & one_class).sum()} of {one_class.sum()} one-class networks have a degenerate layer; the "
    f"deadest layer has {dead[one_class].mean():.0%} dead units in them, {dead[~one_class].mean():.0%} in the others",
    holds=None if not one_class.any() else True if degenerate[one_class].all() and not degenerate[~one_class].any()
    else "partly" if dead[one_class].min() > dead[~one_class].max() else False,
    n=f"{len(keys)} networks, {len(x):,} test digits",
    source=digits.source,
)  # fmt: skip

# %% [markdown]
# ## 4. The end of training
#
# The mean norm of the stochastic gradient over the last epoch. Networks that were still on the plateau when that epoch
# began, constant classifiers among them, are drawn hollow: they say nothing about the end of training. Theorem 2
# predicts that among the others the gradient does not vanish, and less so with larger eps.

# %%
per_epoch = len(steps[(steps.train_eps == eps_grid[0]) & (steps.seed == seeds[0])]) // epochs
last = (epochs - 1) * per_epoch
final = steps[steps.step > last].groupby(["train_eps", "seed"]).gradient_norm.mean().to_frame()
final = final.assign(stalled=lengths.stack() > last).reset_index()
fig, ax = plt.subplots(figsize=(6, 3.8))
for stuck, group in final.groupby("stalled"):
    ax.plot(group.train_eps, group.gradient_norm, "o", mfc="none" if stuck else None, color=f"C{int(stuck)}",
            label="still on the plateau" if stuck else "trained")  # fmt: skip
ax.plot(final[~final.stalled].groupby("train_eps").gradient_norm.mean(), color="C0", alpha=0.6)
ax.set(xlabel="eps of training", ylabel="mean gradient norm, last epoch", ylim=(0, None))
ax.legend()
book.save(
    fig, "03_final_gradient", final, source=digits.source, seeds=seeds,
    caption=f"Mean norm of the mini-batch gradient in the last of {epochs} epochs; a point per network, {n}, line: "
    "mean of those that trained. Hollow: still on the plateau as that epoch began.",
)  # fmt: skip

# %%
norms = final[~final.stalled].groupby("train_eps").gradient_norm.agg(["mean", "min", "max"])
book.claim(
    "At the end of training the stochastic gradient is larger for larger eps",
    section="3.2, 4.1",
    measured=", ".join(f"{v:.2f} at {e:g}" for e, v in norms["mean"].items()) + " (networks that trained)",
    holds=None if len(norms) < 2 else True if (norms["min"].iloc[1:].values > norms["max"].iloc[:-1].values).all()
    else "partly" if norms["mean"].iloc[-1] > norms["mean"].iloc[0] else False,
    n=f"{(~final.stalled).sum()} of {len(final)} networks, {n}",
    source=digits.source,
)  # fmt: skip
final.pivot(index="train_eps", columns="seed", values="gradient_norm").round(3)

# %% [markdown]
# ## The ledger

# %%
book.close()
