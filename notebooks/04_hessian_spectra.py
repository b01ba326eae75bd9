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
# Section 4.2 of Liu et al. (2020, Figures 4 and 5 there) looks at networks after adversarial training. It says that the
# loss is *sharper* there the larger eps is: the 20 largest eigenvalues of the Hessian of the training loss grow with
# eps. And it says that gradients are more *scattered*: when the parameters move along a top eigenvector, adversarial
# examples and gradients change more than along a random direction, the more so the larger eps is.
#
# What should be seen if this holds:
#
# 1. the curve of the top 20 eigenvalues lies higher for larger eps, on training and on test images;
# 2. gradients change more along the top eigenvector than along a random direction of the same length;
# 3. the part of that change which the moved adversarial examples make grows with eps, and the perturbations at both
#    sides are less aligned.
#
# The Hessian is that of the mean cross-entropy at adversarial inputs which are made once and then held fixed.
#
# **Reviewer 2** remarked that the Hessian of a ReLU network exists almost everywhere only, and that eigenvalues at a
# point say little of its surroundings. Two answers stand at the end: the same weights with a smooth activation in place
# of ReLU, and a bound of the loss's local Lipschitz constant that holds at *all* weights of a box round the network's.

# %% tags=["parameters"]
profile = "quick"
recipe = "lenet on mnist5k"
changes = {}  # of the recipe: {recipe: {setting: value}}
eps_grid = [0.0, 0.05, 0.1, 0.2]  # those at which a constant budget leaves the plateau (notebook 3)
seeds = [0, 1, 2, 3]
through_below = 1.15  # mean adversarial loss of the last epoch: half of log 10
hessian_images = 200
hessian_steps = 20  # PGD-20, as the paper has at eps 0.1
top_k = 20
density_probes = 3  # random vectors for the density of all eigenvalues, of one network per eps
density_steps = 40  # of Lanczos, from each
distances = [0.003, 0.02, 0.1]  # lengths by which the parameters move, to both sides
scatter_steps = 5  # of PGD
smooth_k = 5  # eigenvalues with softplus in place of ReLU
smooth_seeds = 2  # so many of the networks of an eps
smooth_beta = 50.0  # softplus(beta t) / beta is within log 2 / beta of ReLU
box_radii = [1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3]
box_images = 20
box_samples = 10

# %%
import copy
from functools import partial
from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.ticker import LogLocator
from torch import nn

from lib import certify, curvature, evaluation, inference, landscape, recipes, runs
from lib.attacks import pgd
from lib.compute import device
from lib.differentiate import differentiating
from lib.figures import Book, eps_colours

book = Book("04_hessian_spectra", globals())
settings = book.recipe(recipe)
images, _ = recipes.load(settings)
where, colours = device(), eps_colours(eps_grid)

# %% [markdown]
# ## The networks
#
# Those of notebook 3, and of more seeds: one per eps and seed, all trained alike, with a constant budget. They are at
# the *end of training*, which need not be a minimum: that is measured below. A network is *through* if it has left the
# plateau by far. Only eps at which three networks in four are through say something of the end of training, and only
# seeds whose networks are through at all of these; the others are left out, and named.

# %%
keys = list(product(eps_grid, seeds))
configs = [recipes.configure(settings, schedule="constant", eps=eps, seed=seed) for eps, seed in keys]
trained = dict(zip(keys, runs.grid(configs, images)))
passed = {key: run.last_loss < through_below for key, run in trained.items()}
ended_eps, ended_seeds, out, unless = inference.ended(passed)
print(unless or f"Left out, since a network is not through: {out or 'none'}")
keys = list(product(ended_eps, ended_seeds))
networks = {key: trained[key].model().to(where) for key in keys}
n = f"{len(ended_seeds)} seed{'s' * (len(ended_seeds) > 1)}, {hessian_images} images"
n += f", without {out}" * bool(out)


def attack_of(eps, num_steps):
    # No random start and full precision: the attack is then a function of the parameters and of nothing else.
    step_size = 2.5 * eps / num_steps
    return partial(pgd, eps=eps, step_size=step_size, num_steps=num_steps, random_start=False, precision="full")


def attacked_images(network, eps, part="train"):
    x, y = (getattr(images, f"{name}_{part}")[:hessian_images].to(where) for name in "xy")
    return x, evaluation.attacked(network, x, y, attack_of(eps, hessian_steps)) if eps else x, y


# %% [markdown]
# ## What is measured
#
# On the first training and the first test images, attacked at the network's own eps: the top eigenvalues and the
# smallest one, by Lanczos with a checked residual, and the gradient. On the training images also what happens when the
# parameters move along the top eigenvector v or along a random direction: everything at $\theta+av$ is compared with
# the same at $\theta-av$, as in the paper. All of it is kept beside the networks and found again.


# %%
def measure(network, eps, seed, part, k=top_k):
    x, attacked, y = attacked_images(network, eps, part)
    whole = part == "train" and k == top_k
    found = curvature.top_eigenpairs(network, attacked, y, k, num_smallest=int(whole), tolerance=5e-3)
    result = {"top": found.values[:k].tolist(), "residual": found.residuals.max().item()}
    if whole:
        result |= {"smallest": found.values[k].item(), "gradient": gradient_norm(network, attacked, y),
                   "squared_norm": landscape.flat(network).square().sum().item(),
                   "moves": moves(network, eps, seed, x, y, found.vectors[0])}  # fmt: skip
    return result


@differentiating()
def gradient_norm(network, x, y):
    return curvature.loss_gradient(curvature.copied(network), x, y).norm().item() / len(x)


def moves(network, eps, seed, x, y, eigenvector):
    random = torch.randn(len(eigenvector), generator=torch.Generator().manual_seed(seed)).to(where)
    attack, rows = attack_of(eps, scatter_steps) if eps else lambda model, x, y: x, []
    for kind, v in (("top eigenvector", eigenvector), ("random", random)):
        s = landscape.scatter(network, v, distances, x, y, attack, symmetric=True)
        ends = [landscape.surface(network, (v / v.norm())[None], [-a, a], x, y).error.max() for a in distances]
        cosines = np.nan_to_num(s.cosine, nan=1.0).tolist()  # where the attack moves no image (a dead layer): alike
        rows += [{"direction": kind, "distance": a, "gradient": g / (2 * a), "scattering": j / (2 * a), "error": e,
                  "cosine": c if eps else None}
                 for a, g, j, c, e in zip(distances, s.gradient, s.scattering, cosines, ends)]  # fmt: skip
    return rows


# %%
about = {"data": images.fingerprint, "images": hessian_images, "attack": hessian_steps, "k": top_k}
moved_by = {"distances": distances, "steps": scatter_steps, "random": "a direction for each seed"}
spectra = {
    (*key, part): runs.remember(
        "spectra",
        about | {"run": trained[key].folder.name, "part": part} | (moved_by if part == "train" else {}),
        partial(measure, networks[key], *key, part),
    )
    for key, part in product(keys, ("train", "test"))
}

# %% [markdown]
# ## 1. The top eigenvalues
#
# One number per network is judged, stated beforehand: the *sum* of the top eigenvalues, that is, the height of the
# whole curve. How many single eigenvalues follow the same rule stands beside it.

# %%
rule_sum = inference.trend(f"sum of the top {top_k} eigenvalues, along eps", expect="rises")
rule_sum

# %%
names = {"train": "training", "test": "test"}
curve = pd.DataFrame(
    {"eps": eps, "seed": seed, "part": names[part], "index": i + 1, "eigenvalue": value}
    for (eps, seed, part), s in spectra.items()
    for i, value in enumerate(s["top"])
)
fig, axes = plt.subplots(1, 2, figsize=(7, 3), sharey=True)
for ax, (part, group) in zip(axes, curve.groupby("part", sort=False)):
    sns.lineplot(group, x="index", y="eigenvalue", hue="eps", palette=colours, marker="o", markersize=4,
                 errorbar=("pi", 100), err_kws={"alpha": 0.15}, ax=ax, legend=part == "test")  # fmt: skip
    ax.set(title=f"{part} images", xlabel="index of the eigenvalue", yscale="log", xticks=range(1, top_k + 1, 3))
sns.move_legend(axes[1], "upper left", bbox_to_anchor=(1, 1), title="eps", frameon=False)
book.save(
    fig, "04_top_eigenvalues", curve, source=images.source, seeds=ended_seeds,
    caption=f"Top {top_k} eigenvalues of the Hessian at adversarial inputs of the eps of training; mean and range of "
    f"{n}, PGD-{hessian_steps}.",
)  # fmt: skip

# %%
for part, name in names.items():
    tops = {(eps, seed): spectra[eps, seed, part]["top"] for eps, seed in keys}
    single = [rule_sum(inference.by_seed({k: v[i] for k, v in tops.items()})).holds for i in range(top_k)]
    found = rule_sum(inference.by_seed({k: sum(v) for k, v in tops.items()}), unless=unless)
    book.claim(
        f"The curve of the top eigenvalues lies higher for larger eps: their sum, {name} images",
        section="4.2, Figure 4",
        paper="the larger eps, the larger the top 20 eigenvalues of the Hessian",
        holds=found,
        measured=f"{found.measured}; of the {top_k} single ones {single.count(True)} rise by the same rule, "
        f"{single.count(False)} fall",
        n=n,
        source=images.source,
        believe=part == "train",
    )

# %% [markdown]
# **The whole spectrum**, of one network per eps: the density of all eigenvalues by stochastic Lanczos quadrature, with
# a 95 % band over its random vectors. Nearly all lie next to zero. The bumps to the right are the outliers above,
# spread by a Gaussian; one eigenvalue of so many is too little for the height of its bump to be known, and there the
# band is wide, often down to nothing. The table has the trace, estimated apart, and its standard error.


# %%
def whole(network, eps):
    inputs = attacked_images(network, eps)[1:]
    d = curvature.spectral_density(network, *inputs, num_probes=density_probes, num_steps=density_steps)
    total, error = curvature.trace(network, *inputs, num_probes=5 * density_probes)
    near = (d.weights * (np.abs(d.nodes) < 0.01 * d.nodes.max())).sum(1).mean()
    lines = {"eigenvalue": d.grid, "density": d.density, "low": d.low, "high": d.high}
    return {"trace": total, "error": error, "near": near, "lines": {k: v[::3].tolist() for k, v in lines.items()}}


facts = {k: v for k, v in about.items() if k != "k"} | {"probes": density_probes, "steps": density_steps}
spectrum = {eps: runs.remember("density", facts | {"run": trained[eps, ended_seeds[0]].folder.name},
                               partial(whole, networks[eps, ended_seeds[0]], eps)) for eps in ended_eps}  # fmt: skip
densities = pd.concat([pd.DataFrame(s["lines"]).assign(eps=eps) for eps, s in spectrum.items()], ignore_index=True)
densities = densities.map("{:.5g}".format).astype(float)

# %%
fig, axes = plt.subplots(1, len(spectrum), figsize=(7, 2.5), sharey=True, squeeze=False)
for ax, (eps, d) in zip(axes[0], densities.groupby("eps")):
    ax.fill_between(d.eigenvalue, d.low.clip(1e-12), d.high, color=colours[eps], alpha=0.3, linewidth=0)
    ax.plot(d.eigenvalue, d.density, color=colours[eps], linewidth=1)
    ax.set(yscale="log", ylim=(1e-7, 20), title=f"eps {eps:g}", xlabel="eigenvalue")
axes[0, 0].set_ylabel("density")
book.save(
    fig, "04_whole_spectrum", densities, source=images.source, seeds=ended_seeds[:1],
    caption=f"Density of all eigenvalues of the Hessian at adversarial inputs, {hessian_images} training images, one "
    f"network per eps, each on a scale of its own; {density_probes} random vectors, {density_steps} steps of Lanczos "
    "from each; band: 95 % over them.",
)  # fmt: skip
pd.DataFrame([{"eps": eps, "trace": s["trace"], "standard error": s["error"],
               f"share of the top {top_k} in it": sum(spectra[eps, ended_seeds[0], "train"]["top"]) / s["trace"],
               "eigenvalues of size below 1 % of the largest": f"{s['near']:.2%}"}
              for eps, s in spectrum.items()]).round(2)  # fmt: skip

# %% [markdown]
# ## 2. Is it a minimum, and is it the scale of the weights?
#
# Left: the smallest eigenvalue, as a share of the largest one. At a minimum it is not negative, and the gradient (in
# the middle) is 0. Both are of the loss of these images, while training went down that of all: that one's gradient is
# in notebook 3; that of a sample need not vanish where that of the whole does. Right: the sum of the top eigenvalues
# times the squared norm of the parameters. The Hessian changes with the scale of the weights although the function may
# not (Dinh et al. 2017, arXiv:1703.04933); the product is the curvature for steps measured relative to the weights.

# %%
rule_relative = inference.trend("sum of the top eigenvalues times squared norm of the parameters, along eps",
                                expect="rises")  # fmt: skip
rule_relative

# %%
ends = pd.DataFrame(
    {"eps": e, "seed": s, "smallest": v["smallest"], "share": v["smallest"] / v["top"][0], "gradient": v["gradient"],
     "relative": sum(v["top"]) * v["squared_norm"]}
    for (e, s, part), v in spectra.items() if part == "train"
)  # fmt: skip
titles = {"share": "smallest / largest eigenvalue", "gradient": "gradient norm, these images",
          "relative": "sum x squared norm"}  # fmt: skip
fig, axes = plt.subplots(1, 3, figsize=(7, 2.6))
for ax, (column, title) in zip(axes, titles.items()):
    ax.scatter(ends.eps, ends[column], color=[colours[e] for e in ends.eps], clip_on=False)
    ax.plot(ends.groupby("eps")[column].mean(), color="0.6", zorder=0)
    ax.set(xlabel="eps of training", ylabel=title)
    ax.axhline(0, color="grey", linewidth=0.8)
book.save(
    fig, "04_end_of_training", ends, source=images.source, seeds=ended_seeds,
    caption=f"How far the end of training is from a minimum of the loss of {hessian_images} training images, and the "
    f"sharpness for steps relative to the weights; a point per network, line: mean over {len(ended_seeds)} seeds.",
)  # fmt: skip

# %%
book.claim(
    "For steps relative to the weights, too, the sum of the top eigenvalues is larger for larger eps: training images",
    section="4.2",
    ours=True,
    paper="the larger eps, the larger the top 20 eigenvalues of the Hessian",
    holds=rule_relative(ends.pivot(index="seed", columns="eps", values="relative").to_numpy(), unless=unless),
    n=n,
    source=images.source,
)
largest = max(s["residual"] for s in spectra.values())
book.check(
    "Eigenpairs: the largest relative residual of all networks",
    holds=inference.exact("residual", tolerance=5e-3)(largest),
)
least = ", ".join(f"{value:.2f} at eps {eps:g}" for eps, value in ends.groupby("eps").smallest.mean().items())
print(
    f"Smallest eigenvalue, mean: {least}; none is negative in {(ends.smallest >= 0).sum()} of {len(ends)} networks. "
    f"Smallest norm of a gradient, of the loss of these images: {ends.gradient.min():.2g}."
)

# %% [markdown]
# ## 3. Scattered gradients
#
# Left: how far the gradient of the adversarial loss is apart at $\theta+av$ and $\theta-av$, by distance. Middle: its
# scattering part, the difference that the moved adversarial examples make at one and the same parameters (the rest is
# what the Hessian describes). Right: the mean cosine between the perturbations at the two sides. Whether the network
# still works so far away is printed: its largest error at the two sides.

# %%
rule_along = inference.difference("log of the scattering part (mean over eps > 0 and distances), top eigenvector minus "
                                  "random direction", margin=0.5, expect="larger", over="seeds")  # fmt: skip
rule_along

# %%
rule_scattering = inference.trend("scattering part along the top eigenvector (mean log over the distances), along eps",
                                  expect="rises")  # fmt: skip
rule_scattering

# %%
rule_cosine = inference.trend("cosine of the perturbations along the top eigenvector (mean over the distances), along "
                              "eps", expect="falls")  # fmt: skip
rule_cosine

# %%
scatter = pd.DataFrame({"eps": e, "seed": s} | row for e, s in keys for row in spectra[e, s, "train"]["moves"])
fig, axes = plt.subplots(1, 3, figsize=(7, 3.2))
labels = {"gradient": "change of the gradient / 2a", "scattering": "its scattering part / 2a",
          "cosine": "cosine of the perturbations"}  # fmt: skip
for ax, (column, label) in zip(axes, labels.items()):
    shown = scatter if column == "gradient" else scatter[scatter.eps > 0]
    sns.lineplot(shown, x="distance", y=column, hue="eps", style="direction", palette=colours, marker="o",
                 markersize=4, errorbar=("pi", 100), err_kws={"alpha": 0.12}, ax=ax,
                 legend="full" if column == "gradient" else False)  # fmt: skip
    ax.set(xscale="log", yscale="linear" if column == "cosine" else "log", xlabel="distance a to either side",
           ylabel=label)  # fmt: skip
handles, texts = axes[0].get_legend_handles_labels()
axes[0].get_legend().remove()
fig.legend(handles, texts, loc="outside lower center", ncols=8, fontsize=7, frameon=False)
book.save(
    fig, "04_gradient_scatter", scatter, source=images.source, seeds=ended_seeds,
    caption=f"Gradients and perturbations at both sides of the end of training, along the top eigenvector and along a "
    f"random direction; mean and range of {n}. Without an attack (eps 0) nothing scatters: it is on the left only.",
)  # fmt: skip
broken = scatter.groupby(["distance", "direction"]).error.max().unstack().round(2)
broken.rename_axis(columns="largest error on clean images")

# %%
logs = scatter.assign(scattering=np.log(scatter.scattering.clip(1e-12)))
logs = logs[logs.eps > 0]  # without an attack nothing scatters
by_direction = logs.pivot_table(index="seed", columns="direction", values="scattering")
book.claim(
    "Gradients are more scattered along the top eigenvector than along a random direction of the same length",
    section="4.2, Figure 5",
    paper="gradients are scattered along the top eigenvectors",
    holds=rule_along(by_direction["top eigenvector"], by_direction["random"], unless=unless),
    n=f"{n}, {logs.eps.nunique()} eps, {len(distances)} distances",
    source=images.source,
)
moved = logs[logs.direction == "top eigenvector"]
for claim, paper, rule, column in (
    ("Gradients are more scattered at larger eps: change due to the moved examples",
     "gradients are more scattered under larger budgets", rule_scattering, "scattering"),
    ("The perturbations at both sides are less aligned at larger eps",
     "the adversarial examples of nearby parameters are less alike for larger eps", rule_cosine, "cosine"),
):  # fmt: skip
    found = rule(moved.pivot_table(index="seed", columns="eps", values=column).to_numpy(), unless=unless)
    book.claim(
        claim,
        section="4.2, Figure 5",
        paper=paper,
        holds=found,
        measured="logs: " * (column == "scattering") + found.measured,
        n=f"{n}, {len(distances)} distances",
        source=images.source,
    )

# %% [markdown]
# ## 4. Reviewer 2, first answer: the same weights with a smooth activation
#
# Softplus with a large beta is within log 2 / beta of ReLU, and smooth, so the Hessian exists at every point. The
# weights stay what they are; the images are attacked anew, through the smooth network. If the eigenvalues hung on the
# kinks, they would change.


# %%
def smoothed(network):
    smooth = copy.deepcopy(network)
    for i, layer in enumerate(smooth):
        if isinstance(layer, nn.ReLU):
            smooth[i] = nn.Softplus(beta=smooth_beta)
    return smooth.eval()


# %%
soft_about = about | {"k": smooth_k, "beta": smooth_beta, "part": "train"}
soft = {
    key: runs.remember("spectra", soft_about | {"run": trained[key].folder.name},
                       partial(measure, smoothed(networks[key]), *key, "train", smooth_k))
    for key in keys if key[1] in ended_seeds[:smooth_seeds]
}  # fmt: skip
both = pd.DataFrame(
    {"eps": e, "seed": s, "relu": sum(spectra[e, s, "train"]["top"][:smooth_k]), "softplus": sum(soft[e, s]["top"])}
    for e, s in soft
)
fig, ax = plt.subplots(figsize=(3.6, 3.2))
ax.scatter(both.relu, both.softplus, color=[colours[e] for e in both.eps], clip_on=False)
for eps, group in both.groupby("eps"):
    ax.annotate(f"eps {eps:g}", (group.relu.mean(), group.softplus.mean()), xytext=(-9, 5), textcoords="offset points",
                ha="right", color=colours[eps], fontsize=8)  # fmt: skip
ends_of = both[["relu", "softplus"]].to_numpy()
ax.plot([ends_of.min(), ends_of.max()], [ends_of.min(), ends_of.max()], color="0.7", zorder=0)
ax.set(xlabel="sum of eigenvalues, ReLU", ylabel=f"the same, softplus of beta {smooth_beta:g}", xscale="log",
       yscale="log")  # fmt: skip
ax.margins(x=0.2)
for axis in (ax.xaxis, ax.yaxis):
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
ax.minorticks_off()
book.save(
    fig, "04_softplus", both, source=images.source, seeds=ended_seeds[:smooth_seeds],
    caption=f"Sum of the top {smooth_k} Hessian eigenvalues of the same weights with ReLU and with softplus, at images "
    f"attacked through each; a point per network ({len(both)} of them, {hessian_images} training images), grey: equal.",
)  # fmt: skip

# %%
ratio, ranks = both.softplus / both.relu, both.relu.corr(both.softplus, method="spearman")
book.answer(
    "Does the order of the eigenvalues hang on ReLU, whose Hessian does not exist everywhere?",
    f"With softplus in place of ReLU the sum of the top {smooth_k} is {ratio.min():.2f} to {ratio.max():.2f} times "
    f"that of ReLU, where that differs between networks by a factor of {both.relu.max() / both.relu.min():.1f}; the "
    f"rank correlation is {ranks:.3f}.",
    reviewer="Reviewer 2",
    n=f"{len(both)} network{'s' * (len(both) > 1)}, {hessian_images} images",
    source=images.source,
)

# %% [markdown]
# ## 5. Reviewer 2, second answer: a bound over a box of weights
#
# Let every single weight move by at most r, on its own. Interval arithmetic bounds the norm of the loss's gradient at
# all these weights at once, hence the local Lipschitz constant of the loss in its *parameters*: no point is missed.
# Below the bound: the largest gradient norm that was found in the box, at random corners and at the two corners that
# the top eigenvector points to. And what the Hessian at the centre alone would say: the gradient's norm there, plus the
# largest eigenvalue times the half diagonal of the box.


# %%
def in_a_box(network, eps):
    x, y = images.x_train[:box_images].to(where), images.y_train[:box_images].to(where)
    x = evaluation.attacked(network, x, y, attack_of(eps, hessian_steps)) if eps else x
    pair = curvature.top_eigenpairs(network, x, y, 1, tolerance=5e-3)
    theta, moved, rows = landscape.flat(network), copy.deepcopy(network), []
    generator = torch.Generator().manual_seed(0)
    signs = [torch.randn(len(theta), generator=generator).sign().to(where) for _ in range(box_samples)]
    signs += [pair.vectors[0].sign(), -pair.vectors[0].sign()]
    for r in box_radii:
        found = [gradient_norm(network, x, y)]
        for sign in signs:
            landscape.move(moved, theta + r * sign)
            found.append(gradient_norm(moved, x, y))
        bound = certify.weight_box(network, x, y, radius=r).gradient
        by_hessian = found[0] + pair.values[0].item() * r * len(theta) ** 0.5
        rows.append({"radius": r, "bound": bound, "found": max(found), "by the Hessian": by_hessian})
    return rows


box_about = {"data": images.fingerprint, "images": box_images, "attack": hessian_steps, "radii": box_radii,
             "samples": box_samples}  # fmt: skip
boxes = pd.DataFrame(
    {"eps": e, "seed": ended_seeds[0]} | row
    for e in ended_eps
    for row in runs.remember("weight-boxes", box_about | {"run": trained[e, ended_seeds[0]].folder.name},
                             partial(in_a_box, networks[e, ended_seeds[0]], e))
)  # fmt: skip

# %%
fig, ax = plt.subplots(figsize=(5.5, 3.4))
for column, style in (("bound", "-"), ("by the Hessian", ":"), ("found", "--")):
    for eps, group in boxes.groupby("eps"):
        ax.plot(group.radius, group[column], style, color=colours[eps], label=f"eps {eps:g}" if style == "-" else None)
styles = [plt.Line2D([], [], color="0.3", linestyle=s, label=t)
          for t, s in (("bound, all weights of the box", "-"), ("by the Hessian at the centre", ":"),
                       ("largest found", "--"))]  # fmt: skip
ax.set(xscale="log", yscale="log", xlabel="radius of the box, per weight", ylabel="gradient norm")
fig.legend(handles=[*ax.get_legend_handles_labels()[0], *styles], loc="outside right upper", frameon=False, fontsize=7)
book.save(
    fig, "04_weight_box", boxes, source=images.source, seeds=ended_seeds[:1],
    caption=f"Local Lipschitz constant of the loss in the parameters, by the radius of a box of weights: proved bound, "
    f"largest value found, and what the Hessian expects (dotted), {box_images} adversarial training images, one "
    "network per eps.",
)  # fmt: skip

# %%
factor = boxes.bound / boxes.found
tight = boxes[factor < 2].groupby("eps").radius.max()
loose = boxes.assign(factor=factor).groupby("radius").factor.max()
book.check(
    "The bound over a box of weights lies above every gradient found in it",
    holds=inference.exact("bound undercut, as a share", tolerance=1e-4)((boxes.found / boxes.bound - 1).clip(lower=0)),
)
book.answer(
    "What holds round the point, not only at it?",
    f"The local Lipschitz constant of the loss in its parameters is proved to within a factor of 2 of what is found "
    f"for boxes of radius up to {', '.join(f'{tight[e]:g} (eps {e:g})' for e in tight.index) or 'none of those tried'}"
    + "".join(f", at none tried for eps {e:g}" for e in ended_eps if e not in tight.index)
    + f". Beyond, the bound loosens quickly (a factor of up to {loose.max():,.0f}, at radius {loose.idxmax():g}), "
    "and only eigenvalues and samples remain.",
    reviewer="Reviewer 2",
    n=f"{len(ended_eps)} networks of {len(landscape.flat(networks[keys[0]])):,} parameters, {box_images} images",
    source=images.source,
)

# %% [markdown]
# ## Change this, expect that
#
# - `seeds = [0]`: the figures stay much the same, but one seed decides nothing; every verdict says so.
# - `eps_grid = [0.0, 0.4]`: the networks of the larger eps sit on the plateau, and the verdicts say so instead of
#   comparing what cannot be compared.

# %%
book.close()
