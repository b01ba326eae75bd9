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
# robust: its error is a **lower** bound of the true robust error. A reviewer asked for the other side: *guarantees for
# a local Lipschitz constant, by interval bounds or a convex relaxation*.
#
# Here are interval bounds. The ball round an image, cut to the pixels' range, is a box; interval arithmetic carries it
# through the network (interval bound propagation, IBP, Gowal et al. 2018, arXiv:1810.12715), and if no other logit can
# exceed that of the label anywhere in the resulting box, the image is *proved* robust. The share of images that are not
# proved is the *certified error*, an **upper** bound of the true robust error. Backwards through the network, the same
# arithmetic bounds each derivative, hence the local Lipschitz constant.
#
# What should be seen:
#
# 1. no image that is proved robust is ever broken by the attack;
# 2. intervals forget how units depend on one another, so for networks that were trained against an attack the bound is
#    *vacuous* (nothing is proved) long before the eps of their training;
# 3. a network that is trained by the bound itself makes it useful, at a price in clean error;
# 4. the certified local Lipschitz constant lies above every gradient that is found, and is loose in the same places.

# %% tags=["parameters"]
profile = "quick"
dataset = "mnist5k"
train_images = None  # all
model = "lenet"
width = 4
networks = {  # the first two are those of notebook 3
    "no attack": {"eps": 0.0},
    "PGD, constant": {"eps": 0.1},
    "PGD, cosine": {"eps": 0.4, "schedule": "cosine", "schedule_stop": 0.6},
    "interval": {"eps": 0.1, "schedule": "cosine", "schedule_stop": 0.15, "objective": "interval"},
}
seeds = [0, 1]
epochs = 4
batch_size = 64
num_steps = 3
step_fraction = 0.5  # the attack's step size, as a fraction of the budget
optimizer = "adam"
lr = 3e-3
eval_every = 2
eval_images = 500
eps_grid = [0.0, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4]
test_images = 150
test_steps = 10
lipschitz_eps = [0.001, 0.003, 0.01, 0.03, 0.1]
lipschitz_images = 20
lipschitz_points = 6  # in each ball, where gradients are looked at

# %%
import copy
from functools import partial
from itertools import product

import matplotlib.pyplot as plt
import pandas as pd
import torch

from lib import certify, data, evaluation, runs
from lib.attacks import pgd
from lib.compute import device
from lib.figures import Book

book = Book("10_certified_bounds", globals())
digits = data.load(dataset).first(train_images)
print(digits.source)

# %% [markdown]
# ## The networks
#
# One LeNet without an attack, one trained against PGD at a constant budget, one at a budget that rises along the cosine
# (Section 5 of the paper), and one by interval bounds. The loss of the last is that of the clean images mixed with that
# of the worst margins that the bounds allow: $\kappa\,\ell(f(x)) + (1 - \kappa)\,\ell(\text{worst margins})$, with
# $\kappa$ falling from 1 to 1/2 while the budget rises, as in Gowal et al. (2018).

# %%
keys = list(product(networks, seeds))
configs = [runs.configure(book.parameters | networks[name], seed=seed) for name, seed in keys]
nets = {key: run.model().to(device()).requires_grad_(False) for key, run in zip(keys, runs.grid(configs, digits))}
trained_at = {name: settings["eps"] for name, settings in networks.items()}
x, y = digits.x_test[:test_images].to(device()), digits.y_test[:test_images].to(device())
n = f"{len(seeds)} seeds, {len(x):,} test digits"


def by_network(frame, column, eps):
    """The values of a column at one eps: a row per network, a column per seed."""
    return frame[frame.eps == eps].pivot(index="network", columns="seed", values=column).loc[list(networks)]


def spread(values):
    return f"{min(values):.3f} to {max(values):.3f}"


def panels():
    """A figure with a panel per network."""
    fig, axes = plt.subplots(1, len(networks), figsize=(3 * len(networks), 3.4), sharey=True)
    fig.get_layout_engine().set(wspace=0.05)
    for ax, name in zip(axes, networks):
        ax.set(title=f"{name}, eps {trained_at[name]:g}" if trained_at[name] else name, xlabel="eps of the ball")
    return fig, axes


# %% [markdown]
# ## 1. Between attack and proof
#
# For each image and eps: does PGD find a wrong answer in the ball, and is it proved that there is none? The balls are
# nested, so an image that was broken in a smaller ball counts as broken in all larger ones.


# %%
def bracket(net, seed):
    """A row per eps: attack error, certified error, and images that are both proved and broken."""
    generator, broken = torch.Generator(x.device).manual_seed(seed), torch.zeros_like(y, dtype=torch.bool)
    for eps in eps_grid:
        attack = partial(pgd, eps=eps, step_size=eps / 4, num_steps=test_steps, generator=generator)
        broken |= evaluation.predict(net, evaluation.attacked(net, x, y, attack)).argmax(1) != y
        margins = certify.margin_bounds(net, x, y, eps=eps).scatter(1, y[:, None], -torch.inf)
        proved = margins.amax(1) < 0
        yield {"eps": eps, "attack": broken.double().mean().item(), "certified": (~proved).double().mean().item(),
               "contradictions": (proved & broken).sum().item()}  # fmt: skip


errors = pd.DataFrame(
    {"network": name, "seed": seed} | row for (name, seed), net in nets.items() for row in bracket(net, seed)
)

# %%
fig, axes = panels()
for ax, (name, group) in zip(axes, errors.groupby("network", sort=False)):
    mean = group.groupby("eps")[["attack", "certified"]].mean()
    ax.fill_between(mean.index, mean.attack, mean.certified, color="C0", alpha=0.15)
    for column, color, label in (("certified", "C0", "not proved"), ("attack", "C3", "broken by PGD")):
        ax.plot(mean[column], color=color, label=label)
        ax.plot(group.eps, group[column], ".", color=color)
    ax.axvline(trained_at[name], color="grey", linestyle=":", label="eps of training")
    ax.set_xscale("symlog", linthresh=eps_grid[1], linscale=0.5)
    ax.set(xlim=(-eps_grid[1] / 5, 1.1 * eps_grid[-1]), ylim=(-0.02, 1.03))
    ax.set_xticks([0, 0.01, 0.1], ["0", "0.01", "0.1"])
axes[0].set_ylabel("share of test digits")
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
book.save(
    fig, "10_certified_error", errors, source=digits.source, seeds=seeds,
    caption=f"Robust error from below (PGD-{test_steps}) and from above (interval bounds); the truth lies in the "
    f"shaded band. A point per network, lines: means of {len(seeds)} seeds; {len(x):,} test digits; eps is linear to "
    f"{eps_grid[1]:g}, then logarithmic.",
)  # fmt: skip

# %% [markdown]
# A bound that an attack contradicts is no bound: the first claim counts every image, network and eps. The bounds are
# computed in float64, rounded to nearest; they hold for the network as a function of real numbers, up to that rounding.
# The attack runs in float32, whose inputs can leave the ball by half a unit in the last place. Neither has shown.

# %%
pairs = len(errors) * len(x)
book.claim(
    "No image that interval bounds prove robust is broken by PGD",
    section="a reviewer's question",
    measured=f"{errors.contradictions.sum()} contradictions in {pairs:,} pairs of an image and an eps, of which "
    f"{((1 - errors.certified) * len(x)).sum():,.0f} proved and {(errors.attack * len(x)).sum():,.0f} broken",
    holds=bool(errors.contradictions.sum() == 0),
    n=f"{len(nets)} networks, {len(x):,} test digits, {len(eps_grid)} eps",
    source=digits.source,
)
table = errors.pivot_table(index="eps", columns="network", values=["attack", "certified"])
table.reindex(columns=list(networks), level="network").round(3)

# %% [markdown]
# ## 2. Vacuous and useful
#
# A bound is called *vacuous* where the certified error is above 0.9: a constant classifier does as well. The networks
# trained by PGD are asked at the eps of their training. (Where one of them has a clean error above 0.8, it is a
# constant classifier or nearly so, and the question is not testable.)

# %%
attacked_names = [name for name in networks if trained_at[name] > 0 and name != "interval"]
at_home = {name: by_network(errors, "certified", trained_at[name]).loc[name] for name in attacked_names}
found = {name: by_network(errors, "attack", trained_at[name]).loc[name] for name in attacked_names}
clean = by_network(errors, "attack", 0.0)
certified = errors.groupby(["network", "eps"], sort=False).certified.max()
last = {name: max((e for e in eps_grid if certified[name, e] < 0.9), default=0.0) for name in networks}
book.claim(
    "Interval bounds are vacuous for PGD-trained networks at the eps of their training",
    section="a reviewer's question",
    measured="; ".join(
        f"{name}, eps {trained_at[name]:g}: certified error {spread(at_home[name])}, PGD error {spread(found[name])}; "
        f"the bound is vacuous beyond eps {last[name]:g}" for name in attacked_names
    ),
    holds=None if (clean.loc[attacked_names] > 0.8).any(axis=None) else all((v > 0.9).all() for v in at_home.values()),
    n=n,
    source=digits.source,
)  # fmt: skip
pd.Series(last, name="largest eps where no seed is above 0.9").to_frame().T

# %% [markdown]
# Interval training is asked at its own eps. It counts as useful if, in every seed, more than half of the images are
# proved there, while the bound is vacuous for all other networks.

# %%
home = trained_at["interval"]
proof, broken = by_network(errors, "certified", home), by_network(errors, "attack", home)
others = proof.drop(index="interval")
useful = bool((proof.loc["interval"] < 0.5).all() and others.min(axis=None) > 0.9)
book.claim(
    "Interval training makes the bound useful",
    section="a reviewer's question",
    measured=f"at eps {home:g}: certified error {spread(proof.loc['interval'])}, the other networks "
    f"{spread(others.to_numpy().ravel())}; PGD error {spread(broken.loc['interval'])}, of networks trained by PGD at "
    f"that eps {spread(broken.loc['PGD, constant'])}; clean error {spread(clean.loc['interval'])} against "
    f"{spread(clean.loc['PGD, constant'])}",
    holds=useful or ("partly" if (proof.loc["interval"] < others.min()).all() else False),
    n=n,
    source=digits.source,
)
pd.concat({"clean": clean, f"PGD, eps {home:g}": broken, f"certified, eps {home:g}": proof}, axis=1).round(3)

# %% [markdown]
# **The last layer.** The margin of two logits is a linear function of the last hidden layer, so its bound can be taken
# there directly, without bounding each logit first. All numbers above do so. What it gains:

# %%
gains = []
for (name, seed), net in nets.items():
    low, high = certify.bounds(net, x, eps=home)
    apart = (high - low.gather(1, y[:, None])).scatter(1, y[:, None], -torch.inf).amax(1) >= 0
    gains.append({"network": name, "seed": seed, "logits one by one": apart.double().mean().item(),
                  "margins": certify.certified_error(net, x, y, eps=home)})  # fmt: skip
pd.DataFrame(gains).pivot(index="network", columns="seed").loc[list(networks)].round(3)

# %% [markdown]
# ## 3. The local Lipschitz constant
#
# For the margins $m_j$ = logit $j$ minus the label's logit, over the ball of radius eps round an image:
# $|m_j(a) - m_j(b)| \le L_j \|a - b\|_\infty$. The smallest such $L_j$ is the largest $\ell_1$ norm of the gradient of
# $m_j$ in the ball. Intervals give an upper bound of it. Gradients at points of the ball give lower bounds: at uniform
# random points, at random corners, and at points that PGD finds. Per image the largest over $j$ is compared.


# %%
def gradient_norms(net, points, y):
    """l1 norms (N, classes) of the gradients of the margins."""
    jacobian = torch.vmap(torch.func.jacrev(lambda p: net(p[None])[0]))(points)
    return (jacobian - jacobian[range(len(y)), y][:, None]).abs().flatten(2).sum(2)


def look(net, x, y, eps, generator):
    """Points of the balls: as many random ones as corners, and one by PGD."""
    for i in range(lipschitz_points - 1):
        move = torch.empty_like(x).uniform_(-1, 1, generator=generator)
        yield (x + eps * (move if i % 2 else move.sign())).clamp(0, 1)
    yield pgd(net, x, y, eps=eps, step_size=eps / 4, num_steps=test_steps, generator=generator)


# %%
def lipschitz(net, seed):
    """A row per eps and image: the bound, the largest gradient found, and whether either certificate proves it."""
    net, inputs, labels = copy.deepcopy(net).double(), x[:lipschitz_images].double(), y[:lipschitz_images]
    generator = torch.Generator(x.device).manual_seed(seed)
    margins = certify.margin_bounds(net, inputs, labels, eps=0)
    for eps in lipschitz_eps:
        bound = certify.local_lipschitz(net, inputs, labels, eps=eps)
        points = look(net, inputs, labels, eps, generator)
        found = torch.stack([gradient_norms(net, p, labels) for p in points]).amax(0)
        by = {"interval": certify.margin_bounds(net, inputs, labels, eps=eps), "lipschitz": margins + eps * bound}
        by = {k: v.scatter(1, labels[:, None], -torch.inf).amax(1) < 0 for k, v in by.items()}
        columns = {"bound": bound.amax(1), "found": found.amax(1), **by, "sound": (found <= bound * (1 + 1e-9)).all(1)}
        yield pd.DataFrame({k: v.cpu() for k, v in columns.items()}).assign(eps=eps)


constants = pd.concat(
    frame.assign(network=name, seed=seed) for (name, seed), net in nets.items() for frame in lipschitz(net, seed)
)
constants["ratio"] = constants.bound / constants.found

# %%
fig, axes = panels()
for ax, (_, group) in zip(axes, constants.groupby("network", sort=False)):
    for column, color, label in (("bound", "C0", "certified bound"), ("found", "C3", "largest gradient found")):
        quantiles = group.groupby("eps")[column].quantile([0.1, 0.5, 0.9]).unstack()
        ax.plot(quantiles[0.5], "o-", ms=4, color=color, label=label)
        ax.fill_between(quantiles.index, quantiles[0.1], quantiles[0.9], color=color, alpha=0.15)
    ax.set(xscale="log", yscale="log")
axes[0].set_ylabel("Lipschitz constant of a margin")
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
book.save(
    fig, "10_lipschitz", constants, source=digits.source, seeds=seeds,
    caption="Local Lipschitz constant of the steepest margin (l-infinity in the input) in the ball of radius eps: "
    f"bounded by intervals, and the largest gradient norm at {lipschitz_points} points. Median and 10 % to 90 % over "
    f"{lipschitz_images} test digits and {len(seeds)} seeds.",
)  # fmt: skip

# %% [markdown]
# How loose is the bound? The median over images of certified bound / largest gradient found. Part of this is the
# bound's looseness, part are gradients that were not found: a few points in 784 dimensions are no search. The ratio is
# therefore an upper bound of the looseness.

# %%
ratios = constants.groupby(["network", "eps"], sort=False).ratio.median().unstack("eps")
ratios.map("{:.3g}".format)

# %% [markdown]
# The verdict asks whether the guarantee says something: at the eps of training, is the certified constant within ten
# times a gradient that was found? (At the largest eps here, where that of training is larger.)


# %%
def tight(name):
    eps = max(e for e in lipschitz_eps if e <= max(trained_at[name], lipschitz_eps[0]))
    return eps, constants[(constants.network == name) & (constants.eps == eps)].groupby("seed").ratio.median()


for kind, names in (("PGD-trained", attacked_names), ("interval-trained", ["interval"])):
    asked = {name: tight(name) for name in names}
    sound = constants[constants.network.isin(names)].sound
    book.claim(
        f"Interval bounds give a useful guarantee for the local Lipschitz constant of {kind} networks",
        section="a reviewer's question",
        measured="; ".join(f"{name}: certified constant {v.min():,.3g} to {v.max():,.3g} times the largest gradient "
                           f"found at eps {eps:g}, {ratios.loc[name].iloc[0]:.3g} times at eps {lipschitz_eps[0]:g}"
                           for name, (eps, v) in asked.items())
        + f"; {(~sound).sum()} gradients above their bound",
        holds=bool(sound.all() and all((v < 10).all() for _, v in asked.values())),
        n=f"{len(seeds)} seeds, {lipschitz_images} test digits, {lipschitz_points} points each",
        source=digits.source,
    )  # fmt: skip

# %% [markdown]
# **Robustness from the Lipschitz constant.** If $m_j(x) + \epsilon L_j < 0$ for all $j$, the image is proved robust.
# This is a second certificate, beside that of the margins' own intervals. Neither contains the other: where nearly all
# units keep their sign in the ball, the derivative's bound is nearly exact while intervals already add up what would
# cancel; where many units switch, the derivative's bound grows fastest, and it uses the whole radius in every pixel.
# The shares of the same digits that are *not* proved by each, and how many digits only one of them proves:

# %%
routes = 1 - constants.groupby(["network", "eps"], sort=False)[["interval", "lipschitz"]].mean()
routes = routes.rename(columns={"interval": "by intervals", "lipschitz": "by Lipschitz constant"}).unstack("eps")
only = {"intervals only": constants.interval > constants.lipschitz,
        "Lipschitz constant only": constants.interval < constants.lipschitz}  # fmt: skip
print(", ".join(f"{k}: {v.sum()}" for k, v in only.items()), f"of {len(constants):,} pairs of a digit and an eps")
routes.round(3)

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
#
# ## The ledger

# %%
book.close()
