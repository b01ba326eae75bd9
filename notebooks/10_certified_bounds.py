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
# # 10. Certified bounds: what can be proved about these networks
#
# Every robust error of Liu et al. (2020) is that of an attack, and an attack can only show that a network is *not*
# robust: its error is a **lower** bound of the true robust error. One of the
# [reviewers](https://papers.nips.cc/paper_files/paper/2020/file/f56d8183992b6c54c92c16a8519a6e2b-Review.html) asked for
# the other side: guarantees, a local Lipschitz constant, by interval bounds or a convex relaxation. Here they are for
# the input; notebook 4 has them for the parameters, where the paper's Hessian lives.
#
# The ball round an image, cut to the pixels' range, is a box; interval arithmetic carries it through the network
# (interval bound propagation, IBP, Gowal et al. 2018, arXiv:1810.12715), and if no other logit can exceed that of the
# label anywhere in the resulting box, the image is *proved* robust. The share of images that are not proved is the
# *certified error*, an **upper** bound of the true robust error. Backwards through the network, the same arithmetic
# bounds each derivative, hence the local Lipschitz constant.
#
# What should be seen:
#
# 1. no image that is proved robust is ever broken by the attack;
# 2. intervals forget how units depend on one another, so for networks that were trained against an attack nothing is
#    proved at the eps of their training;
# 3. a network that is trained by the bound itself makes it useful, at a price in clean error;
# 4. the certified local Lipschitz constant lies above every gradient that is found.

# %% tags=["parameters"]
profile = "quick"
recipe = "lenet on mnist5k"
changes = {}
networks = {
    "no attack": {"eps": 0.0},
    "PGD, constant": {"eps": 0.1},
    "PGD, cosine": {"eps": 0.4, "schedule": "cosine"},
    "interval": {"eps": 0.1, "schedule": "cosine", "objective": "interval"},
}
seeds = [0, 1, 2]
eps_grid = [0.0, 0.002, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4]
test_images = 120
test_steps = 10
few = 0.05  # a bound that proves at most this share of the digits is vacuous
margin = 0.05  # a smaller difference of certified errors does not matter
lipschitz_eps = [0.001, 0.01, 0.03, 0.1]
lipschitz_images = 8
lipschitz_points = 5  # in each ball, where gradients are looked at

# %%
import copy
from functools import partial
from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

from lib import certify, evaluation, inference, recipes, runs
from lib.attacks import pgd
from lib.compute import device
from lib.figures import Book

book = Book("10_certified_bounds", globals())
settings = book.recipe(recipe)
digits, _ = recipes.load(settings)

# %% [markdown]
# ## The networks
#
# One trained without an attack, one against PGD at a constant budget, one at a budget that rises along the cosine
# (Section 5 of the paper), and one by interval bounds. The loss of the last is that of the clean images mixed with that
# of the worst margins that the bounds allow: $\kappa\,\ell(f(x)) + (1 - \kappa)\,\ell(\text{worst margins})$, with
# $\kappa$ falling from 1 to 1/2 while the budget rises, as in Gowal et al. (2018).

# %%
keys = list(product(networks, seeds))
configs = [recipes.configure(settings, **networks[name], seed=seed) for name, seed in keys]
trained = dict(zip(keys, runs.grid(configs, digits)))
nets = {key: run.model().to(device()).requires_grad_(False) for key, run in trained.items()}
home = {name: change["eps"] for name, change in networks.items()}  # the eps of training
x, y = digits.x_test[:test_images].to(device()), digits.y_test[:test_images].to(device())
many_seeds = f"{len(seeds)} seed" + "s" * (len(seeds) > 1)
n = f"{many_seeds}, {len(x):,} test digits"


def facts(key, **more):
    return {"run": trained[key].folder.name, "images": digits.fingerprint, "seed": key[1]} | more


def between(values):
    low, high = min(values), max(values)
    return f"{low:.3f}" if f"{low:.3f}" == f"{high:.3f}" else f"{low:.3f} to {high:.3f}"


def panels():
    """A figure with a panel per network."""
    fig, axes = plt.subplots(1, len(networks), figsize=(7, 2.8), sharey=True, squeeze=False)
    for ax, name in zip(axes[0], networks):
        ax.set_title(f"{name}\ntrained at {home[name]:g}" if home[name] else name, fontsize=9)
        ax.set_xlabel("eps of the ball")
    return fig, axes[0]


# %% [markdown]
# ## 1. Between attack and proof
#
# For each image and eps: does PGD find a wrong answer in the ball, and is it proved that there is none? The balls are
# nested, so an image that was broken in a smaller ball counts as broken in all larger ones.
#
# A bound that an attack contradicts is no bound, so every image, network and eps is checked. The bounds are computed in
# float64, rounded to nearest; they hold for the network as a function of real numbers, up to that rounding.

# %%
sound = inference.exact("images that are proved robust and broken all the same", tolerance=0)
sound


# %%
def bracket(key):
    """For each eps the masks of images that are broken, and of images that are not proved."""
    net, generator, broken = nets[key], torch.Generator(x.device).manual_seed(key[1]), torch.zeros_like(y).bool()
    found = []
    for eps in eps_grid:
        attack = partial(pgd, eps=eps, step_size=eps / 4, num_steps=test_steps, generator=generator, stop_early=True)
        broken = broken | evaluation.wrong(net, x, y, attack)
        margins = certify.margin_bounds(net, x, y, eps=eps)
        found.append([broken.tolist(), (~certify.proved(margins, y)).tolist()])
    return found


asked = {"eps": eps_grid, "count": len(x), "steps": test_steps}
masks = np.array([runs.remember("certified", facts(key, **asked), partial(bracket, key)) for key in keys])
masks = masks.reshape(len(networks), len(seeds), len(eps_grid), 2, len(x))
attacked, unproved = (dict(zip(networks, masks[:, :, :, i])) for i in (0, 1))  # name: (seeds, eps, images)
errors = pd.DataFrame(
    {"network": name, "seed": seed, "eps": eps, "attack": attacked[name][i, j].mean(),
     "certified": unproved[name][i, j].mean(), "contradictions": (attacked[name] & ~unproved[name])[i, j].sum()}
    for name in networks for i, seed in enumerate(seeds) for j, eps in enumerate(eps_grid)
)  # fmt: skip

# %%
fig, axes = panels()
for ax, (name, group) in zip(axes, errors.groupby("network", sort=False)):
    mean = group.groupby("eps")[["attack", "certified"]].mean()
    ax.fill_between(mean.index, mean.attack, mean.certified, color="C0", alpha=0.15)
    for column, color, text in (("certified", "C0", "not proved"), ("attack", "C3", "broken by PGD")):
        ax.plot(mean[column], color=color, label=text)
        ax.plot(group.eps, group[column], ".", ms=4, color=color)
    ax.axvline(home[name], color="grey", linestyle=":", label="eps of training")
    ax.set_xscale("symlog", linthresh=sorted(eps_grid)[1], linscale=0.5)
    ax.set(xlim=(-eps_grid[1] / 5, 1.1 * eps_grid[-1]), ylim=(-0.02, 1.03))
    ax.set_xticks([0, 0.01, 0.1], ["0", "0.01", "0.1"])
axes[0].set_ylabel("share of test digits")
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
book.save(
    fig, "10_certified_error", errors, source=digits.source, seeds=seeds,
    caption=f"Robust error from below (PGD-{test_steps}) and from above (interval bounds); the truth lies in the "
    f"shaded band. A point per network, lines: means of {many_seeds}; {len(x):,} test digits; eps is linear to "
    f"{eps_grid[1]:g}, then logarithmic.",
)  # fmt: skip

# %%
pairs = len(errors) * len(x)
book.check(
    f"None of the images that interval bounds prove robust is broken by PGD ({len(nets)} networks, {pairs:,} pairs of "
    f"an image and an eps, {((1 - errors.certified) * len(x)).sum():,.0f} of them proved)",
    holds=sound(errors.contradictions),
)  # fmt: skip
table = errors.pivot_table(index="eps", columns="network", values=["attack", "certified"])
table.reindex(columns=list(networks), level="network").round(3)

# %% [markdown]
# ## 2. Vacuous and useful
#
# The networks trained by PGD are asked at the eps of their training, in the seed in which most is proved. (One with a
# clean error above 0.8 is a constant classifier or nearly so, and is not asked.)
#
# Interval training is asked at its own eps, against the network that was trained there by PGD.

# %%
vacuous = inference.at_most("the share of digits that intervals prove at the eps of training", bound=few)
vacuous

# %%
useful = inference.difference("certified error, interval training minus PGD, at the same eps", margin=margin)
useful

# %%
at_home = {name: eps_grid.index(min(eps_grid, key=lambda e, name=name: abs(e - home[name]))) for name in networks}
clean = {name: evaluation_masks[:, 0] for name, evaluation_masks in attacked.items()}
by_pgd = [name for name in networks if home[name] and "objective" not in networks[name]]
proved = {name: ~unproved[name][clean[name].mean(1) <= 0.8] for name in by_pgd}  # of the networks that are asked
found = inference.together({
    name: vacuous(those[:, at_home[name]].sum(1).max(initial=0), len(x),
                  unless="" if len(those) else "all seeds are on the plateau")
    for name, those in proved.items()
})  # fmt: skip
idle = sum(len(clean[name]) - len(those) for name, those in proved.items())
reach = {name: max((e for j, e in enumerate(eps_grid) if those[:, j].sum() > few * those[:, j].size), default=0.0)
         for name, those in proved.items()}  # fmt: skip
said = {True: "Not at the eps of training", False: "Yes", "partly": "For some", None: "It cannot be told"}[found.holds]
book.answer(
    "Can the robustness of these networks be proved, by interval bounds?",
    f"{said}. Proved there: {found.measured}. PGD breaks "
    + ", ".join(f"{between(attacked[k][:, at_home[k]].mean(1))} ({k})" for k in by_pgd)
    + f" of the digits; the truth lies between. The largest eps tried at which more than {few:.0%} are proved: "
    + ", ".join(f"{e:g} ({k})" for k, e in reach.items()) + "." + (f" Undecided: {found.why}." if found.why else "")
    + f" On the plateau, and not asked: {idle}." * bool(idle),
    reviewer="Reviewer 2", n=n, source=digits.source,
)  # fmt: skip

# %%
for name in (name for name in networks if networks[name].get("objective") == "interval"):
    rival = next((k for k in by_pgd if home[k] == home[name]), by_pgd[0])
    j = at_home[name]
    found = useful(unproved[name][:, j], unproved[rival][:, j])
    said = {True: "Yes", "partly": "A little", False: "No", None: "It cannot be told"}[found.holds]
    book.answer(
        "Does training by the bound itself make it useful?",
        f"{said}: at eps {home[name]:g} it leaves {between(unproved[name][:, j].mean(1))} of the digits unproved, "
        f"{rival} {between(unproved[rival][:, j].mean(1))}; the difference is {found.measured}. PGD breaks "
        f"{between(attacked[name][:, j].mean(1))} and {between(attacked[rival][:, j].mean(1))}; without an attack "
        f"{between(clean[name].mean(1))} and {between(clean[rival].mean(1))} are wrong."
        + (f" Undecided: {found.why}." if found.why else ""),
        reviewer="Reviewer 2", n=n, source=digits.source,
    )  # fmt: skip

# %% [markdown]
# *Change this, expect that:* with `seeds = [0]` the second answer cannot be told, since the spread between seeds is
# unknown, and the figures lose nothing but their scatter.
#
# ## 3. The local Lipschitz constant
#
# For the margins $m_j$ = logit $j$ minus the label's logit, over the ball of radius eps round an image:
# $|m_j(a) - m_j(b)| \le L_j \|a - b\|_\infty$. The smallest such $L_j$ is the largest $\ell_1$ norm of the gradient of
# $m_j$ in the ball. Intervals give an upper bound of it. Gradients at points of the ball give lower bounds: at uniform
# random points, at random corners, and at points that PGD finds. Per image the largest over $j$ is compared.

# %%
above = inference.exact("gradient found / certified constant - 1, where positive", tolerance=1e-9)
above


# %%
def gradient_norms(net, points, labels):
    """l1 norms (N, classes) of the gradients of the margins."""
    jacobian = torch.vmap(torch.func.jacrev(lambda p: net(p[None])[0]))(points)
    return (jacobian - jacobian[range(len(labels)), labels][:, None]).abs().flatten(2).sum(2)


def look(net, inputs, labels, eps, generator):
    """Points of the balls: as many random ones as corners, and one by PGD."""
    for i in range(lipschitz_points - 1):
        move = torch.empty_like(inputs).uniform_(-1, 1, generator=generator)
        yield (inputs + eps * (move if i % 2 else move.sign())).clamp(0, 1)
    yield pgd(net, inputs, labels, eps=eps, step_size=eps / 4, num_steps=test_steps, generator=generator)


# %%
def lipschitz(key):
    """For each eps and image: the bound, the largest gradient found, the excess of gradients over their bounds, and
    whether the margins' intervals, and the Lipschitz constant, prove the image."""
    net, inputs, labels = copy.deepcopy(nets[key]).double(), x[:lipschitz_images].double(), y[:lipschitz_images]
    generator = torch.Generator(x.device).manual_seed(key[1])
    margins, rows = certify.margin_bounds(net, inputs, labels, eps=0), []
    for eps in lipschitz_eps:
        bound = certify.local_lipschitz(net, inputs, labels, eps=eps)
        found = torch.stack([gradient_norms(net, p, labels) for p in look(net, inputs, labels, eps, generator)]).amax(0)
        excess = (found / bound.clamp_min(1e-300) - 1).clamp_min(0).where(found > 0, 0.0)
        proofs = [certify.proved(m, labels)
                  for m in (certify.margin_bounds(net, inputs, labels, eps=eps), margins + eps * bound)]  # fmt: skip
        columns = [bound.amax(1), found.amax(1), excess.amax(1), *proofs]
        rows += zip([eps] * len(labels), *(c.tolist() for c in columns))
    return rows


# %%
asked = {"eps": lipschitz_eps, "count": lipschitz_images, "points": lipschitz_points, "steps": test_steps}
columns = ["eps", "bound", "found", "excess", "by intervals", "by Lipschitz constant"]
constants = pd.concat(
    pd.DataFrame(runs.remember("lipschitz", facts(key, **asked), partial(lipschitz, key)), columns=columns)
    .assign(network=key[0], seed=key[1]) for key in keys
)  # fmt: skip
constants["ratio"] = constants.bound / constants.found
fig, axes = panels()
for ax, (_, group) in zip(axes, constants.groupby("network", sort=False)):
    for column, color, text in (("bound", "C0", "certified bound"), ("found", "C3", "largest gradient found")):
        quantiles = group.groupby("eps")[column].quantile([0.1, 0.5, 0.9]).unstack()
        ax.plot(quantiles[0.5], "o-", ms=4, color=color, label=text)
        ax.fill_between(quantiles.index, quantiles[0.1], quantiles[0.9], color=color, alpha=0.15)
    ax.set(xscale="log", yscale="log")
axes[0].set_ylabel("Lipschitz constant of a margin")
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
book.save(
    fig, "10_lipschitz", constants, source=digits.source, seeds=seeds,
    caption="Local Lipschitz constant of the steepest margin (l-infinity in the input) in the ball of radius eps: "
    f"bounded by intervals, and the largest gradient norm at {lipschitz_points} points. Median and 10 % to 90 % over "
    f"{lipschitz_images} test digits and {many_seeds}.",
)  # fmt: skip

# %% [markdown]
# How loose is the bound? The ratio certified bound / largest gradient found: its median over images and seeds, and the
# range of all of them. Part of it is the bound's looseness, part are gradients that were not found: a few points in 784
# dimensions are no search. The ratio is therefore an upper bound of the looseness.

# %%
book.check("No gradient that was found is above its certified Lipschitz constant", holds=above(constants.excess))
ratios = constants.groupby(["network", "eps"], sort=False).ratio.agg(["median", "min", "max"])


def ratio(name, eps):
    median, low, high = (f"{v:,.0f}" if v >= 100 else f"{v:.3g}" for v in ratios.loc[(name, eps)])
    return f"{median} ({low} to {high})"


largest = {k: max(e for e in lipschitz_eps if e <= max(home[k], lipschitz_eps[0])) for k in networks if home[k]}
book.answer(
    "Can a local Lipschitz constant be guaranteed, and how tightly?",
    "Yes, by intervals: it is "
    + "; ".join(f"{ratio(k, e)} times the largest gradient found at eps {e:g}, {ratio(k, lipschitz_eps[0])} times at "
                f"{lipschitz_eps[0]:g} ({k})" for k, e in largest.items()) + ". Medians, and the range of digits.",
    reviewer="Reviewer 2", n=f"{many_seeds}, {lipschitz_images} test digits, {lipschitz_points} points each",
    source=digits.source,
)  # fmt: skip
ratios["median"].unstack("eps").round(2)

# %% [markdown]
# **Robustness from the Lipschitz constant.** If $m_j(x) + \epsilon L_j < 0$ for all $j$, the image is proved robust.
# This is a second certificate, beside that of the margins' own intervals. Neither contains the other: where nearly all
# units keep their sign in the ball, the derivative's bound is nearly exact while intervals already add up what would
# cancel; where many units switch, the derivative's bound grows fastest, and it uses the whole radius in every pixel.
# The shares of the same digits that are *not* proved by each, and how many digits only one of them proves:

# %%
proofs = constants[columns[-2:]].astype(bool)
only = {"intervals only": proofs[columns[-2]] & ~proofs[columns[-1]],
        "Lipschitz constant only": ~proofs[columns[-2]] & proofs[columns[-1]]}  # fmt: skip
print(", ".join(f"{k}: {v.sum()}" for k, v in only.items()), f"of {len(constants):,} pairs of a digit and an eps")
(1 - constants.groupby(["network", "eps"], sort=False)[columns[-2:]].mean()).unstack("eps").round(3)

# %% [markdown]
# ## What stronger relaxations would give
#
# Intervals are the cheapest sound bound, about two forward passes. Linear relaxations keep how each unit depends on the
# input: CROWN (Zhang et al. 2018, arXiv:1811.00866) and the dual of Wong & Kolter (2018, arXiv:1711.00851) are tighter
# on networks that were not trained for them, and with branch and bound (beta-CROWN, Wang et al. 2021,
# arXiv:2103.06624) they can be made exact for small networks, at the price of a search. For the local Lipschitz
# constant there are linear bounds (Shi et al. 2022, arXiv:2210.07394) and an exact mixed-integer program
# (Jordan & Dimakis 2020, arXiv:2003.01219). They are not here. They would narrow the shaded bands of the first figure
# from above; how far is not known from this notebook. That interval bounds are vacuous for the paper's networks says
# nothing against the networks: the true robust error lies anywhere in the band.

# %%
book.close()
