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
# # 9. Curves between networks
#
# Appendix C of Liu et al. (2020) asks whether what adversarial training finds lies apart, or is connected: two networks
# from different seeds have a barrier of high loss on the straight line between them, but Garipov et al. (2018,
# arXiv:1802.10026) found, for ordinary training, that a simple curve leads round it. The appendix finds such curves
# for adversarial training too.
#
# What should be seen if this holds: along the straight line the loss is far above that of both ends; along a trained
# Bezier curve it rises by at most a quarter of that, at eps 0 and at a larger eps alike. (Errors are drawn, too, not
# judged: they are small at the ends, so that a small rise doubles them.)
#
# The curve has three free points, as in the paper, which start on the line. Each training step picks a random place on
# the curve, attacks a mini-batch *there*, and moves the free points against the gradient. The two ends stay what they
# are, bit for bit.

# %% tags=["parameters"]
profile = "quick"
recipe = "lenet on mnist5k"
changes = {}  # of the recipe: {recipe: {setting: value}}
curve_grid = [0.0, 0.1]
seeds = [0, 1, 2, 3, 4, 5]  # two by two: each network is the end of one curve
num_bends = 3
curve_kind = "bezier"
curve_epochs = 4  # no more than the ends were trained
curve_lr = 2e-3
test_steps = 5
test_images = 200
points = 9
least_barrier = 0.1  # of the line, below which there is nothing to go round
dip = 0.02  # so far may a curve lie below its lower end

# %%
from functools import partial
from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from lib import curvature, evaluation, inference, landscape, recipes, runs
from lib.attacks import pgd
from lib.compute import device
from lib.differentiate import differentiating
from lib.figures import Book, eps_colours

book = Book("09_mode_connectivity", globals())
settings = book.recipe(recipe)
if curve_epochs > settings["epochs"]:
    raise ValueError(f"a curve trained for {curve_epochs} epochs is trained longer than its ends: {settings['epochs']}")
images, _ = recipes.load(settings)
where, colours = device(), eps_colours(curve_grid)

# %% [markdown]
# ## The networks
#
# The same runs as in notebook 4 and some more seeds, all with a constant budget. No network is the end of two curves,
# so the pairs are independent. How near the ends are to minima of the loss that is plotted (the adversarial loss on the
# first training images) is printed: the norm of its gradient, at the initial point and at the end. Where it is no
# smaller at the end, the ends are what training ends at, and no minima (notebooks 3 and 4 have more on this).

# %%
pairs = list(zip(seeds[::2], seeds[1::2]))
keys = list(product(curve_grid, [seed for pair in pairs for seed in pair]))
configs = [recipes.configure(settings, schedule="constant", eps=eps, seed=seed) for eps, seed in keys]
trained = dict(zip(keys, runs.grid(configs, images)))
networks = {k: run.model().to(where) for k, run in trained.items()}
n = f"{len(pairs)} pair{'s' * (len(pairs) > 1)} of networks, {test_images} images"
x, y = images.x_train.to(where), images.y_train.to(where)
parts = {
    "training": (x[:test_images], y[:test_images]),
    "test": (images.x_test[:test_images].to(where), images.y_test[:test_images].to(where)),
}


def attack_of(eps, num_steps, step_fraction):
    step = {"eps": eps, "step_size": step_fraction * eps, "num_steps": num_steps}
    return partial(pgd, **step, random_start=False) if eps else None


@differentiating()
def gradient_norm(network, eps):
    few, attack = parts["training"], attack_of(eps, test_steps, 2.5 / test_steps)
    inputs = evaluation.attacked(network, *few, attack) if attack else few[0]
    return curvature.loss_gradient(curvature.copied(network), inputs, few[1]).norm().item() / len(inputs)


# %%
norms = pd.DataFrame(
    {"eps": e, "initial point": gradient_norm(trained[e, s].model(0).to(where), e), "end": gradient_norm(m, e),
     "loss in training, last epoch": trained[e, s].steps.loss[-len(y) // settings["batch_size"] :].mean()}
    for (e, s), m in networks.items()
)  # fmt: skip
for eps, group in norms.groupby("eps"):
    grown = (group["end"] >= group["initial point"]).sum()
    print(f"eps {eps:g}: at {grown} of {len(group)} ends the gradient is no smaller than at the initial point.")
norms.groupby("eps").mean().round(3)

# %% [markdown]
# ## Line and curve
#
# The curve is trained at the eps of its ends, from training images, no longer than they were. Then loss and error are
# measured along both ways, under an attack made anew at each point, on the first training images and on the first test
# images. (Batch normalisation, for networks that have it, takes its statistics from the same training images at every
# point, the ends included.)
#
# The *barrier* is how far the values rise above the straight line that joins those at the two ends; the one along the
# curve is compared with that along the line, pair by pair. Where fewer than three in four of the lines have a barrier
# of 0.1, there is next to nothing to compare, and it is undecided.

# %%
rule = inference.exact("barrier in the loss along the curve, as a share of the line's (training and test images; the "
                       "largest of all lines that have one)", tolerance=0.25)  # fmt: skip
rule


# %%
def judged(lines, curves):
    """The rule applied to the barriers of lines and curves, and which lines have one: the others ask nothing."""
    high = lines >= least_barrier
    few = "straight lines have next to no barrier" if high.mean() < inference.THROUGH else ""
    return rule(curves[high] / lines[high], unless=few), high


# %%
ticks = np.linspace(0, 1, points)


def measure(eps, pair):
    ends = [networks[eps, seed] for seed in pair]
    curve = landscape.connect(
        *ends, x, y, attack=attack_of(eps, settings["num_steps"], settings["step_fraction"]), kind=curve_kind,
        num_bends=num_bends, epochs=curve_epochs, lr=curve_lr, batch_size=settings["batch_size"],
    )  # fmt: skip
    attack, rows = attack_of(eps, test_steps, 2.5 / test_steps), []
    for (way, path), (part, batch) in product({"line": landscape.Curve(*ends), "curve": curve}.items(), parts.items()):
        values = landscape.along(path, ticks, *batch, attack=attack, x_statistics=x[:1000])
        rows.append({"way": way, "part": part, "loss": values.loss.tolist(), "error": values.error.tolist()})
    return rows


facts = {"kind": curve_kind, "bends": num_bends, "epochs": curve_epochs, "lr": curve_lr, "points": points,
         "images": test_images, "attack": test_steps}  # fmt: skip
ways = pd.DataFrame(
    {"eps": eps, "pair": f"{pair[0]}, {pair[1]}", "way": w["way"], "part": w["part"], "t": t, "loss": v, "error": e}
    for eps, pair in product(curve_grid, pairs)
    for w in runs.remember("curves", facts | {"runs": [trained[eps, s].folder.name for s in pair]},
                           partial(measure, eps, pair))
    for t, v, e in zip(ticks, w["loss"], w["error"])
)  # fmt: skip

# %%
fig, axes = plt.subplots(2, len(curve_grid), figsize=(7, 5), sharex=True, sharey="row", squeeze=False)
for row, column in zip(axes, ("loss", "error")):
    for ax, (eps, group) in zip(row, ways.groupby("eps")):
        for (way, part, _), line in group.groupby(["way", "part", "pair"]):
            ax.plot(line.t, line[column], "-" if part == "training" else "--", linewidth=1,
                    color=colours[eps] if way == "curve" else "0.6")  # fmt: skip
        ax.set(title=f"eps {eps:g}", xlabel="t (0 and 1: the two networks)")
    row[0].set_ylabel(f"{column} (adversarial at eps > 0)")
styles = [plt.Line2D([], [], color="0.6", label="straight line"),
          *(plt.Line2D([], [], color=colours[e], label=f"trained curve, eps {e:g}") for e in curve_grid),
          *(plt.Line2D([], [], color="k", linestyle=s, label=f"{p} images") for s, p in (("-", "training"),
                                                                                        ("--", "test")))]  # fmt: skip
fig.legend(handles=styles, loc="outside lower center", ncols=3, frameon=False)
book.save(
    fig, "09_curves", ways, source=images.source, seeds=seeds,
    caption=f"Loss and error along the straight line and along a trained {curve_kind.capitalize()} curve with "
    f"{num_bends} free points between two networks, at the eps of training; {n}, each drawn, PGD-{test_steps}.",
)  # fmt: skip

# %%
index = ["eps", "pair", "part", "way"]
barriers = pd.DataFrame(
    dict(zip(index, key)) | {c: landscape.barrier(g.t, g[c]) for c in ("loss", "error")}
    for key, g in ways.groupby(index)
)
wide = barriers.pivot(index=["eps", "part", "pair"], columns="way", values=["loss", "error"])
for eps in curve_grid:
    here, shown = wide.loc[eps], [("loss", "training"), ("loss", "test"), ("error", "test")]
    lines, curves = (here["loss", way].to_numpy() for way in ("line", "curve"))
    finding, high = judged(lines, curves)
    texts = [f"{c} on {p} images {here[c, 'curve'][p].mean():.3f} against {here[c, 'line'][p].mean():.3f}"
             for c, p in shown]  # fmt: skip
    book.claim(
        f"Between two networks the {'adversarial ' if eps else ''}loss rises along a trained curve by at most a "
        f"quarter of what it rises along the straight line (eps {eps:g})",
        section="Appendix C",
        paper="networks from adversarial training are connected by curves of low loss (the quarter is ours)"
        if eps else "Garipov et al., whom the appendix follows, found such curves in ordinary training",
        measured=f"mean barriers, curve against line: {'; '.join(texts)}; "
        f"largest share {max(curves[high] / lines[high], default=np.nan):.3f}",
        holds=finding, ours=not eps,
        n=n + f", {(~high).sum()} of {len(high)} lines without a barrier" * (not high.all()),
        source=images.source,
    )  # fmt: skip
wide.round(3)

# %% [markdown]
# The barrier is measured from the ends. It says little where training has stopped far above what the curve finds.

# %%
inside = ways[ways["way"] == "curve"].sort_values("t").groupby(["eps", "pair", "part"]).loss
below = inside.agg(lambda v: max(0.0, min(v.iloc[0], v.iloc[-1]) - v.iloc[1:-1].min()))
book.check(f"No point of a curve has a loss more than {dip:g} below that of its lower end",
           holds=inference.exact("loss below the lower end", tolerance=dip)(below))  # fmt: skip

# %% [markdown]
# ## Change this, expect that
#
# - `num_bends = 1`: Garipov's curve has one free point, a quadratic; it goes round the barrier less well.
# - `curve_epochs = 1`: a curve that is hardly trained keeps part of the line's barrier.

# %%
book.close()
