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
# # 4. Hessian spectra and scattered gradients
#
# Section 4.2 of Liu et al. (2020) looks at networks after adversarial training. It says that the minima found at a
# larger eps are *sharper*: the largest eigenvalues of the Hessian of the training loss grow with eps. And it says that
# gradients are more *scattered*: when the parameters move along a top eigenvector, adversarial examples and gradients
# change more than along a random direction, and the perturbations are less aligned the larger eps is.
#
# What should be seen if this holds:
#
# 1. the curve of the top 20 eigenvalues lies higher for larger eps, on training and on test images;
# 2. for moves of one length, the gradient changes more along a top eigenvector than along random directions;
# 3. the cosine similarity of the perturbations before and after a move falls faster for larger eps.
#
# The Hessian is that of the mean cross-entropy at adversarial inputs which are made once and then held fixed. The
# paper's own code computes eigenvalues by power iteration with deflation; here it is Lanczos, with checked residuals.
# A ReLU network has a Hessian almost everywhere only, so the question is asked again with softplus at the end.

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
hessian_images = 100
hessian_steps = 20  # PGD-20, as in the paper
top_k = 20
quadrature = {"num_probes": 3, "num_steps": 30, "width": 0.3}  # width of the smoothing, in units of the eigenvalues
distances = [0.01, 0.1, 1.0]
scatter_images = 50
random_moves = 2
softplus_grid = [0.0, 0.025, 0.05]
softplus_seeds = [0, 1]
softplus_changes = {"width": 2, "epochs": 5, "lr": 1e-2, "lr_drops": [0.6], "num_steps": 2, "step_fraction": 0.75}

# %%
from functools import partial
from itertools import product

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import torch

from lib import curvature, data, landscape, runs
from lib.attacks import pgd
from lib.compute import device
from lib.figures import Book

book = Book("04_hessian_spectra", globals())
images = data.load(dataset).first(train_images)
print(images.source)

# %% [markdown]
# ## The networks
#
# One network per eps and seed; those with a constant budget are the networks of notebook 3. At the largest eps a
# constant budget ends in a constant classifier (notebook 3), which tells nothing of minima; there the budget rises
# linearly to eps over the first half of training. That is a difference in protocol between the largest eps and the
# others, so the verdicts on sharpness are made from the constant budgets.


# %%
def config(eps, seed, linear_from=linear_from, **changes):
    rising = {"schedule": "linear", "schedule_stop": 2 * eps} if eps >= linear_from else {}
    return runs.configure(book.parameters | changes, eps=eps, seed=seed, **rising)


keys = list(product(eps_grid, seeds))
trained = dict(zip(keys, runs.grid([config(*k) for k in keys], images)))
ends = pd.DataFrame(
    {"eps": eps, "seed": seed} | run.history.iloc[-1][["clean_error", "robust_error", "robust_loss"]].to_dict()
    for (eps, seed), run in trained.items()
)
ends.groupby("eps").mean().drop(columns="seed").round(3)

# %% [markdown]
# ## 1. The top eigenvalues
#
# The largest eigenvalues on the first training images and on the first test images, at PGD inputs for the network's own
# eps (at eps 0, the clean images). The largest relative residual, over all eigenpairs of all networks, is printed: it
# bounds the error of each eigenvalue, as a fraction of the largest one.

# %%
where = device()
parts = {
    "training": (images.x_train[:hessian_images].to(where), images.y_train[:hessian_images].to(where)),
    "test": (images.x_test[:hessian_images].to(where), images.y_test[:hessian_images].to(where)),
}


def attack_of(eps, num_steps=hessian_steps):
    # No random start and full precision: the attack is then a function of the parameters and of nothing else.
    step_size = 2.5 * eps / num_steps
    return partial(pgd, eps=eps, step_size=step_size, num_steps=num_steps, random_start=False, precision="full")


def top(network, eps, part):
    x, y = parts[part]
    return curvature.top_eigenpairs(network, attack_of(eps)(network, x, y), y, top_k)


networks = {key: run.model().to(where) for key, run in trained.items()}
pairs = {(*key, part): top(networks[key], key[0], part) for key in keys for part in parts}
print(f"largest relative residual: {max(p.residuals.max().item() for p in pairs.values()):.1e}")

# %%
spectra = pd.DataFrame(
    {"eps": eps, "seed": seed, "part": part, "index": i + 1, "eigenvalue": value}
    for (eps, seed, part), p in pairs.items()
    for i, value in enumerate(p.values.tolist())
)
fig, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True)
for ax, (part, group) in zip(axes, spectra.groupby("part", sort=False)):
    sns.lineplot(group, x="index", y="eigenvalue", hue="eps", style="eps", palette="viridis", markers=True,
                 dashes=False, errorbar=("pi", 100), ax=ax, legend=part == "test")  # fmt: skip
    ax.set(title=f"{part} images", xlabel="index of the eigenvalue", yscale="log", xticks=range(1, top_k + 1, 3))
n = f"{len(seeds)} seeds"
book.save(
    fig, "04_top_eigenvalues", spectra, source=images.source, seeds=seeds,
    caption=f"Top {top_k} eigenvalues of the Hessian at adversarial inputs of the eps of training; mean and range over "
    f"{n}, {hessian_images} images, PGD-{hessian_steps}.",
)  # fmt: skip

# %% [markdown]
# ## 2. Sharpness against eps
#
# The largest eigenvalue of each network, and beside it the same number times the squared norm of the parameters. The
# Hessian changes with the scale of the weights although the function may not (Dinh et al. 2017, arXiv:1703.04933); the
# product is the curvature for steps measured relative to the weights.

# %%
sharpness = spectra[spectra["index"] == 1].drop(columns="index").rename(columns={"eigenvalue": "sharpness"})
squares = {key: landscape.flat(network).square().sum().item() for key, network in networks.items()}
sharpness["relative"] = [s * squares[e, seed] for e, seed, s in sharpness[["eps", "seed", "sharpness"]].values]
fig, axes = plt.subplots(1, 2, figsize=(10, 3.6))
labels = {"sharpness": "largest eigenvalue", "relative": "eigenvalue x squared norm"}
for ax, (column, label) in zip(axes, labels.items()):
    sns.pointplot(sharpness, x="eps", y=column, hue="part", markers=["o", "X"], dodge=0.2, errorbar=("pi", 100), ax=ax)
    ax.set(xlabel="eps of training", ylabel=label, ylim=(0, None))
    sns.move_legend(ax, "lower right")
book.save(
    fig, "04_sharpness", sharpness, source=images.source, seeds=seeds,
    caption=f"Largest Hessian eigenvalue against the eps of training, plain and times the squared norm of the "
    f"parameters; mean and range over {n}, {hessian_images} images.",
)  # fmt: skip

# %% [markdown]
# The verdict: reproduced if, over the constant budgets, the largest eigenvalue rises at each step of eps in every seed;
# partly if only the mean over the seeds rises from the smallest of these eps to the largest. The networks whose budget
# rose are listed too. They may well be flatter than those of a smaller but constant budget: the early part of their
# training, which decides where they settle, was at a small eps.


# %%
def rises(table):
    """table: a row per seed, a column per eps in order."""
    if (table.diff(axis=1).iloc[:, 1:] > 0).all(axis=None):
        return True
    return "partly" if table.mean().iloc[-1] > table.mean().iloc[0] else False


def listing(table, decimals=1):
    return ", ".join(f"{m:.{decimals}f} ({lo:.{decimals}f} to {hi:.{decimals}f}) at {e:g}"
                     for e, m, lo, hi in zip(table, table.mean(), table.min(), table.max()))  # fmt: skip


constant = [eps for eps in eps_grid if eps < linear_from]
sizes = f"{n} x {hessian_images} images, mean (range); verdict from eps {', '.join(f'{e:g}' for e in constant)}"
for part in parts:
    table = sharpness[sharpness.part == part].pivot(index="seed", columns="eps", values="sharpness")
    book.claim(
        f"Minima are sharper at larger eps: largest Hessian eigenvalue, {part} images",
        section="4.2", measured=listing(table), holds=rises(table[constant]), n=sizes, source=images.source,
    )  # fmt: skip
table.round(2)

# %% [markdown]
# And with the scale of the parameters taken out:

# %%
table = sharpness[sharpness.part == "training"].pivot(index="seed", columns="eps", values="relative")
book.claim(
    "The same holds for steps relative to the weights (eigenvalue x squared parameter norm, training images)",
    section="4.2, our addition", measured=listing(table, 0), holds=rises(table[constant]), n=sizes,
    source=images.source,
)  # fmt: skip
table.round(0)

# %% [markdown]
# ## 3. The whole spectrum
#
# The density of all eigenvalues by stochastic Lanczos quadrature, for the first seed, with a 95 % band over the probes.
# Nearly all eigenvalues are near zero; the bumps on the right are the outliers of the first figure, smoothed by a
# Gaussian. A band that reaches down to zero says that a bump's height, a few eigenvalues out of all, is not resolved.
# The trace is estimated on its own (Hutchinson), with its standard error.

# %%
rows, traces = [], []
for eps in eps_grid:
    x, y = parts["training"]
    inputs = attack_of(eps)(networks[eps, seeds[0]], x, y), y
    density = curvature.spectral_density(networks[eps, seeds[0]], *inputs, **quadrature)
    rows += [{"eps": eps, "eigenvalue": g, "density": d, "low": lo, "high": hi}
             for g, d, lo, hi in zip(density.grid, density.density, density.low, density.high)]  # fmt: skip
    total, error = curvature.trace(networks[eps, seeds[0]], *inputs, num_probes=5 * quadrature["num_probes"])
    share = pairs[eps, seeds[0], "training"].values.sum().item() / total
    traces.append({"eps": eps, "trace": total, "standard error": error, f"share of the top {top_k}": share})
densities = pd.DataFrame(rows)
pd.DataFrame(traces).round(2)

# %%
fig, axes = plt.subplots(1, len(eps_grid), figsize=(10, 3.2), sharey=True, sharex=True)
for ax, (eps, group) in zip(axes, densities.groupby("eps")):
    ax.fill_between(group.eigenvalue, group.low.clip(1e-9), group.high, alpha=0.3, linewidth=0)
    ax.plot(group.eigenvalue, group.density, linewidth=1)
    ax.set(yscale="log", ylim=(1e-7, 10), title=f"eps {eps:g}", xlabel="eigenvalue")
axes[0].set_ylabel("density")
book.save(
    fig, "04_spectral_density", densities, source=images.source, seeds=seeds[:1],
    caption=f"Density of all Hessian eigenvalues at adversarial inputs, {hessian_images} training images, one seed; "
    f"{quadrature['num_probes']} probes of {quadrature['num_steps']} Lanczos steps, 95 % band over the probes.",
)  # fmt: skip

# %% [markdown]
# ## 4. Scattered gradients
#
# Move the parameters by a given length along the top eigenvector or along random directions, attack again, and compare.
# Left: how far the gradient of the adversarial loss moves, as a fraction of the move. Middle: its scattering part, the
# difference that the new adversarial examples make at the moved parameters (the rest is what the Hessian describes).
# Right: the mean cosine similarity between the perturbations before and after the move; at eps 0 there are
# no perturbations.


# %%
def moves(eps, seed):
    p = pairs[eps, seed, "training"]
    generator = torch.Generator().manual_seed(seed)
    yield "top eigenvector", p.vectors[0]
    for _ in range(random_moves):
        yield "random", torch.randn(p.vectors.shape[1], generator=generator).to(where)


rows = []
for eps, seed in keys:
    few = [t[:scatter_images] for t in parts["training"]]
    for kind, direction in moves(eps, seed):
        s = landscape.scatter(networks[eps, seed], direction, distances, *few, attack_of(eps))
        for a, gradient, scattering, cosine in zip(distances, s.gradient, s.scattering, s.cosine):
            rows.append({"eps": eps, "seed": seed, "direction": kind, "distance": a, "gradient": gradient / a,
                         "scattering": scattering / a, "cosine": cosine})  # fmt: skip
scatter = pd.DataFrame(rows)

# %%
fig, axes = plt.subplots(1, 3, figsize=(12, 3.8))
labels = {"gradient": "change of the gradient / distance", "scattering": "its scattering part / distance",
          "cosine": "cosine of the perturbations"}  # fmt: skip
for ax, (column, label) in zip(axes, labels.items()):
    shown = scatter if column == "gradient" else scatter[scatter.eps > 0]
    sns.lineplot(shown, x="distance", y=column, hue="eps", style="direction", palette="viridis", markers=True,
                 hue_norm=(min(eps_grid), max(eps_grid)), errorbar=("pi", 100), err_kws={"alpha": 0.12},
                 ax=ax, legend="full" if column == "gradient" else False)  # fmt: skip
    ax.set(xscale="log", xlabel="distance moved", ylabel=label, yscale="linear" if column == "cosine" else "log")
handles, names = axes[0].get_legend_handles_labels()
axes[0].get_legend().remove()
fig.legend(handles, names, loc="outside right upper", fontsize=9)
book.save(
    fig, "04_gradient_scatter", scatter, source=images.source, seeds=seeds,
    caption=f"How far gradients and perturbations move with the parameters, along the top eigenvector and along "
    f"{random_moves} random directions; mean and range over {n}, {scatter_images} training images.",
)  # fmt: skip

# %% [markdown]
# Three claims. Along the top eigenvector the gradient changes more than along any random direction, at every eps, seed
# and distance. The scattering part, at the smallest distance, rises with eps. And the perturbations are less aligned at
# larger eps: at every distance the cosine along the top eigenvector falls from each eps to the next (partly: from the
# smallest eps to the largest, at most distances).

# %%
index = ["eps", "seed", "distance"]
change = scatter.pivot_table(index=index, columns="direction", values="gradient", aggfunc="max")
ratio = change["top eigenvector"] / change["random"]
book.claim(
    "Gradients change more along the top eigenvector than along random directions of the same length",
    section="4.2",
    measured=f"{(ratio > 1).mean():.0%} of the cases; median ratio {ratio.median():.0f}, smallest {ratio.min():.1f}",
    holds=bool((ratio > 1).all()) or ("partly" if ratio.median() > 1 else False),
    n=f"{len(eps_grid)} eps x {n} x {len(distances)} distances, largest of {random_moves} random directions",
    source=images.source,
)
moved = scatter[(scatter.eps > 0) & (scatter.direction == "top eigenvector")]
table = moved[moved.distance == distances[0]].pivot(index="seed", columns="eps", values="scattering")
book.claim(
    "Gradients are more scattered at larger eps: change due to moved examples, per distance, along the top eigenvector",
    section="4.2", measured=listing(table), holds=rises(table),
    n=f"{n} x {scatter_images} images, distance {distances[0]:g}, mean (range)", source=images.source,
)  # fmt: skip

# %%
cosine = moved.pivot_table(index="distance", columns="eps", values="cosine")
ordered, ends_apart = (cosine.diff(axis=1).iloc[:, 1:] < 0).all(axis=1), cosine.iloc[:, -1] < cosine.iloc[:, 0]
book.claim(
    "Perturbations are less aligned at larger eps when the parameters move along the top eigenvector",
    section="4.2",
    measured="; ".join(f"{', '.join(f'{v:.2f}' for v in row)} at distance {a:g}" for a, row in cosine.iterrows()),
    holds=bool(ordered.all()) or ("partly" if ends_apart.mean() > 0.5 else False),
    n=f"{n} x {scatter_images} images, mean cosine at eps {', '.join(f'{e:g}' for e in cosine)}",
    source=images.source,
)
cosine.round(3)

# %% [markdown]
# ## 5. Does the ordering survive softplus?
#
# Softplus is smooth, so its Hessian exists everywhere. But networks with it stay on the plateau for longer: they get a
# rising budget at every eps, some changes in training (see the parameters), and a grid that ends where they still
# learn. Nothing is concluded if a network has not learnt (a robust error above one half), or if the seeds' ranges at
# the smallest and the largest eps overlap.

# %%
soft_keys = list(product(softplus_grid, softplus_seeds))
soft_runs = runs.grid(
    [config(*k, linear_from=0, activation="softplus", **softplus_changes) for k in soft_keys], images
)
rows = []
for (eps, seed), run in zip(soft_keys, soft_runs):
    values = top(run.model().to(where), eps, "training").values.tolist()
    about = {"eps": eps, "seed": seed, "robust_error": run.history.iloc[-1].robust_error}
    rows += [about | {"index": i + 1, "eigenvalue": value} for i, value in enumerate(values)]
soft = pd.DataFrame(rows)
fig, ax = plt.subplots(figsize=(6, 3.8))
sns.lineplot(soft, x="index", y="eigenvalue", hue="eps", style="eps", palette="viridis", markers=True, dashes=False,
             errorbar=("pi", 100), ax=ax)  # fmt: skip
ax.set(yscale="log", xlabel="index of the eigenvalue", title="softplus, training images", xticks=range(1, top_k + 1, 3))
book.save(
    fig, "04_softplus", soft, source=images.source, seeds=softplus_seeds,
    caption=f"Top {top_k} Hessian eigenvalues of softplus networks; mean and range over {len(softplus_seeds)} seeds, "
    f"{hessian_images} training images, PGD-{hessian_steps}.",
)  # fmt: skip

# %%
first = soft[soft["index"] == 1]
table = first.pivot(index="seed", columns="eps", values="eigenvalue")
low, high = table.iloc[:, 0], table.iloc[:, -1]
apart = high.min() > low.max() or high.max() < low.min()
book.claim(
    "The ordering of the largest eigenvalue by eps is the same with softplus",
    section="4.2, a reviewer's question",
    measured=listing(table),
    holds=rises(table) if apart and (first.robust_error < 0.5).all() else None,
    n=f"{len(softplus_seeds)} seeds x {hessian_images} images, mean (range)",
    source=images.source,
)
first.pivot(index="seed", columns="eps", values="robust_error").round(2)

# %% [markdown]
# ## The ledger

# %%
book.close()
