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
# # 12. The paper's own networks
#
# The authors have released the networks of Table 1 (Liu et al. 2020). No laptop trains such networks in an evening, but
# any laptop can attack them: the strongest answer to the reviewer who doubted the numbers of Table 1 is to measure them
# again, on the same networks, with other attacks.
#
# **To have them**: clone <https://github.com/liuchen11/AdversaryLossLandscape> into the data folder (`data/`, or
# `DATA_DIR`), with Git LFS, and run this notebook. MNIST and CIFAR-10 should be in that folder, too.
#
# What should be seen if Table 1 holds: under a rising budget the worst-case error is smaller than under a constant one,
# LeNet under a constant budget at 0.4 errs as guessing does, and an attack that sees no gradient does not break more
# than one image in ten that PGD leaves, which would be a sign of *masked* gradients (notebook 8).
#
# Where the files are not there, the page runs on networks of ours, saved in the same layout. It then shows that they
# come back bit by bit, and says nothing about the paper.

# %% tags=["parameters"]
profile = "quick"
folder = "AdversaryLossLandscape"  # of the clone, inside the data folder
recipe = "lenet on few digits"  # of our own networks, where there is no clone
changes = {}
seeds = [0]  # of our own networks
# Each family of networks: the model, its data, eps, and its arms with the epochs of their files; an arm that the clone
# lacks is passed over (a periodic constant one is called `const` or `plain`).
families = {
    "lenet_mnist": {"model": "lenet", "dataset": "mnist", "eps": "0.4",
                    "arms": {"const": [100], "linear": [100], "cosine": [100]}},
    "vgg_cifar10": {"model": "vgg16", "dataset": "cifar10", "eps": "8/255", "arms": {
        "plain_const": [200], "plain_cosine": [200], "plain_linear": [200], "periodic_const": [100, 150, 200],
        "periodic_plain": [100, 150, 200], "periodic_cosine": [100, 150, 200], "periodic_linear": [100, 150, 200]}},
    "resnet_cifar10": {"model": "resnet18", "dataset": "cifar10", "eps": "8/255", "arms": {
        "plain_const": [200], "plain_cosine": [200], "plain_linear": [200], "periodic_const": [100, 150, 200],
        "periodic_plain": [100, 150, 200], "periodic_cosine": [100, 150, 200], "periodic_linear": [100, 150, 200]}},
}  # fmt: skip
images = 200
attacks = {"steps": 20, "step_fraction": 0.1, "strong_steps": 20, "queries": 200}
sharp_images = 200
margin = 0.02
bound = 0.1  # a larger share of the images that show a sign of masking matters
stalled = 0.8  # an arm with a larger clean error guesses

# %%
import hashlib
import tempfile
from fractions import Fraction
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

from lib import audit, cells, curvature, data, inference, models, recipes, runs
from lib.attacks import fgsm, pgd
from lib.evaluation import wrong
from lib.figures import SCHEDULE_COLOURS, Book

book = Book("12_released_networks", globals())
clone = data.data_dir() / folder / "models"
theirs = clone.is_dir()
print(f"the paper's networks, from {folder}" if theirs else f"no {folder} in the data folder: networks of our own")

# %% [markdown]
# ## The layout
#
# A file is a plain `state_dict`: `models/<family>/<arm>/<1, 2 or 3>/..._<epoch>.ckpt`. A periodic arm has three of
# them, whose mean probability is the classifier. Where there is no clone, networks of ours are written so into an empty
# folder: two small LeNets, trained on a few digits under a constant and a cosine budget, and a VGG16 and a ResNet18 as
# they begin. Some programs write `module.` before each name; so do we here, in every second file.


# %%
def save_as_released(network, path, prefix=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({prefix + name: tensor for name, tensor in network.state_dict().items()}, path)


def our_own(where):
    """Networks of ours in that layout: {file: (the network, its model, its width)}."""
    settings, saved = book.recipe(recipe), {}
    digits = recipes.load(settings)[0]
    for arm, name in (("const", "constant"), ("cosine", "cosine")):
        for seed in seeds:
            run = runs.run(cells.configure(settings, name, eps=0.4, seed=seed), digits)
            path = where / "lenet_mnist" / arm / str(seed + 1) / f"ours_{run.config.epochs}.ckpt"
            saved[path] = run.model(), "lenet", run.config.width
    for family, model in (("vgg_cifar10", "vgg16"), ("resnet_cifar10", "resnet18")):
        for epoch in (1, 2, 3):
            path = where / family / "periodic_cosine" / "1" / f"ours_{epoch}.ckpt"
            saved[path] = models.build(model, seed=epoch, width=1), model, 1
    for i, (path, (network, *_)) in enumerate(saved.items()):
        save_as_released(network, path, "module." * (i % 2))
    return saved, digits


# %% [markdown]
# ## Do they come back?

# %%
exactly = inference.exact("differences in any tensor or logit, of networks written in the layout and read", tolerance=0)
exactly

# %%
scratch = None if theirs else tempfile.TemporaryDirectory()
root = clone if theirs else Path(scratch.name)
if not theirs:
    saved, digits = our_own(root)
    worst, ensembles = [], {}
    for path, (network, model, width) in saved.items():
        back = models.released(path, model, width=width)
        pairs = zip(network.state_dict().values(), back.state_dict().values(), strict=True)
        worst += [(a.double() - b.double()).abs().max().item() for a, b in pairs]
        ensembles.setdefault(path.parent, []).append((network.eval(), back))
    for path, members in ensembles.items():
        x = torch.rand(4, 1 if "lenet" in str(path) else 3, *[28 if "lenet" in str(path) else 32] * 2,
                       generator=torch.Generator().manual_seed(0))  # fmt: skip
        with torch.no_grad():
            a, b = (models.Ensemble(side)(x) for side in zip(*members, strict=True))
        worst.append((a - b).abs().max().item())
    book.check("Networks saved in the released layout, and their ensembles, come back bit by bit", holds=exactly(worst))

# %% [markdown]
# ## Table 1 by our attacks
#
# The same kinds of attack as in notebook 7, on the first test images. The paper's own numbers are in its Table 1; here
# are ours, with the spread over the three networks of each arm.


# %%
def load_all():
    """One item per network: family, arm, number, eps, the network and its test images."""
    sets, width = {}, None if theirs else recipes.get(recipe, changes)["width"]
    for family, about in families.items():
        try:
            sets[about["dataset"]] = sets.get(about["dataset"]) or (data.load(about["dataset"]) if theirs else digits)
        except data.DataNotFound as error:
            print(f"{family} is left out: {error}")
            continue
        if not theirs and family != "lenet_mnist":
            continue  # they are not trained
        for arm, epochs in about["arms"].items():
            for number in sorted(path for path in (root / family / arm).glob("*") if path.is_dir()):
                files = [next(iter(sorted(number.glob(f"*_{epoch}.ckpt"))), None) for epoch in epochs]
                files = files if theirs else sorted(number.glob("*.ckpt"))
                if not all(files):
                    print(f"{family}, {arm}, {number.name} is left out: it has no file of epochs {epochs}")
                    continue
                network = models.released(files if len(files) > 1 else files[0], about["model"], width=width)
                yield family, arm, int(number.name), float(Fraction(about["eps"])), network, sets[about["dataset"]]


# %%
def signs_of_masking(network, x, y, eps, found):
    """Of notebook 8: {sign: mask of the images that show it}, given the masks of `cells.mistakes`."""

    def under(attack):
        return wrong(network, x, y, attack).cpu().numpy()

    first = {e: next(iter(cells.attacks(e, 0, **attacks).values())) for e in (eps / 2, 2 * eps, 1.0)}
    curve = {e: under(pgd_there) for e, pgd_there in first.items()}  # as at eps itself
    by = {kind.split("-")[0]: mask for kind, mask in found.items()}
    weak = {"Square": by["Square"], "one step": under(partial(fgsm, eps=eps))}
    return audit.signs(by["PGD"], weak, {**curve, eps: by["PGD"]}, np.array(audit.flat(network, x, y)))


# %%
def label(family, arm=""):
    """What a family, or else our own recipe, and an arm of it are called: "LeNet, MNIST, constant"."""
    parts = [*(family.split("_") if theirs else recipe.split(" on ")), *([arm.replace("_", " ")] if arm else [])]
    return ", ".join(cells.spelt(part) for part in parts)


# %%
def measure(network, x, y, eps):
    """Masks of the attacks and of the signs of masking, and the largest eigenvalue of the Hessian."""
    found = cells.mistakes(network, x, y, cells.attacks(eps, 0, **attacks))
    shown = signs_of_masking(network, x, y, eps, found)
    value = {"masks": [(kind, mask.tolist()) for kind, mask in found.items()],  # pairs, since JSON orders names anew
             "signs": [(kind, np.asarray(mask).tolist()) for kind, mask in shown.items()]}  # fmt: skip
    if isinstance(network, models.Ensemble):
        return value | {"eigenvalue": None}
    near = pgd(network, x[:sharp_images], y[:sharp_images], eps=eps, step_size=eps / 4, num_steps=10,
               random_start=False, precision="full")  # fmt: skip
    return value | {"eigenvalue": float(curvature.top_eigenpairs(network, near, y[:sharp_images], 1).values[0])}


def measured(network, pictures, eps):
    """The same, remembered by the network's weights: there are many released networks, and attacks are dear."""
    x, y = pictures.x_test[:images], pictures.y_test[:images]
    weights = hashlib.sha256(b"".join(t.numpy().tobytes() for t in network.state_dict().values()))
    facts = {"weights": weights.hexdigest(), "data": pictures.fingerprint, "images": images, "eps": eps,
             "sharp_images": sharp_images, "attacks": attacks}  # fmt: skip
    return runs.remember("released", facts, lambda: measure(network, x, y, eps), version=3)


# %%
lines, masks, sharp, signs = [], {}, [], {}
for family, arm, number, eps, network, pictures in load_all():
    found = measured(network, pictures, eps)
    signs[family, arm, number] = {kind: np.array(mask) for kind, mask in found["signs"]}
    here = {kind: np.array(mask) for kind, mask in found["masks"]}
    here["worst"] = audit.worst_case(here)
    masks |= {(family, arm, number, kind.split("-")[0]): mask for kind, mask in here.items()}
    lines.append({"family": family, "arm": arm, "number": number} | {kind: mask.mean() for kind, mask in here.items()})
    if found["eigenvalue"] is not None:
        sharp.append({"family": family, "arm": arm, "number": number, "eigenvalue": found["eigenvalue"]})
table, sharp = pd.DataFrame(lines), pd.DataFrame(sharp)
source = pictures.source if not theirs else f"the released networks ({folder}), {pictures.source}"
kinds = [column for column in table if column not in ("family", "arm", "number")]
names = [label(*pair) for pair in zip(table["family"], table["arm"])]
table[kinds].groupby(pd.Index(names, name="network"), sort=False).agg(cells.notation)

# %%
arms = table[["family", "arm"]].drop_duplicates()
fig, axes = plt.subplots(1, 2, figsize=(7, 0.3 * len(arms) + 1), sharey=True)
for i, (family, arm) in enumerate(arms.values):
    here = table[(table.family == family) & (table.arm == arm)]
    name = {"const": "constant", "plain": "constant"}.get(arm.split("_")[-1], arm.split("_")[-1])
    colour = SCHEDULE_COLOURS.get(name, "black")
    axes[0].plot(100 * here["clean"], [i] * len(here), "o", color=colour, mfc="none")
    axes[0].plot(100 * here["worst"], [i] * len(here), "o", color=colour)
    values = sharp[(sharp.family == family) & (sharp.arm == arm)]["eigenvalue"]
    axes[1].plot(values, [i] * len(values), "o", color=colour)
axes[0].set(xlabel="error, %", xlim=(0, 101), yticks=range(len(arms)), ylim=(len(arms) - 0.5, -0.5),
            yticklabels=[label(*pair) for pair in arms.values])  # fmt: skip
axes[0].axvline(90, color="grey", linestyle=":")
axes[1].set(xlabel="largest eigenvalue of the Hessian")
book.save(
    fig, "12_networks", table, source=source, seeds=[] if theirs else seeds,
    caption=f"{'The released networks' if theirs else 'Networks of our own in the released layout'}: errors on "
    f"{images} test images (clean hollow, worst case over {', '.join(kinds[1:-1])} filled, over the hollow "
    "one where they are equal; dotted: guessing) and the "
    f"largest eigenvalue of the Hessian at {sharp_images} attacked test images; a point per network.",
)  # fmt: skip

# %% [markdown]
# ## The audit
#
# The signs of gradient masking of notebook 8: of the images that PGD leaves, an attack that should be weaker (Square,
# which sees no gradient, or a single step) breaks many; an image falls at one eps and stands at a larger one; it stands
# at eps 1, where the ball holds every image there is; its gradient is exactly zero. Each network is judged, since those
# of an arm see the same images; an arm that guesses has nothing to mask.

# %%
better = inference.difference("worst-case error, cosine minus constant", margin=margin)
sign = inference.at_most("the share of images that show a sign of masking", bound=bound)
better

# %%
sign

# %%
rows, guesses = [], table.groupby(["family", "arm"])["clean"].mean() > stalled
for family, arm in arms.values:
    if guesses[family, arm]:
        print(f"{label(family, arm)}: it guesses, so there is nothing to mask")
        continue
    of = {str(number): shown for (f, a, number), shown in signs.items() if (f, a) == (family, arm)}
    for kind in next(iter(of.values())):
        each = {number: sign(shown[kind].sum(), len(shown[kind])) for number, shown in of.items()}
        rows.append({"network": label(family, arm), "sign": kind, "finding": inference.together(each)})
rows = pd.DataFrame(rows, columns=["network", "sign", "finding"])  # none, where all arms guess
rows.assign(finding=[f"{f.outcome}: {f.measured}{f.because}" for f in rows["finding"]]).pivot(
    index="network", columns="sign", values="finding")  # fmt: skip


# %%
def stack(family, arm, kind):
    return {number: mask for (f, a, number, k), mask in masks.items() if (f, a) == (family, arm) and k == kind}


# %%
def counted(networks):
    return f"{len(networks)} network{'s' * (len(networks) > 1)} an arm, {images} test images"


if theirs:
    for family in arms["family"].unique():
        const, rising = (next(a for a in families[family]["arms"] if word in a) for word in ("const", "cosine"))
        a, b, common = cells.pair(stack(family, rising, "worst"), stack(family, const, "worst"))
        if common:
            book.claim(f"In the released networks a rising budget has the smaller worst-case error: {label(family)}",
                       section="5, Table 1", holds=better(a, b), n=counted(common), source=source,
                       believe=True)  # fmt: skip
    seen = [f"{row.network}: {row.sign}" for row in rows.itertuples() if row.finding.holds in (False, "partly")]
    open_ = [f"{row.network}, {row.sign}: {row.finding.why}" for row in rows.itertuples() if row.finding.holds is None]
    book.answer("Are the robust errors of Table 1 real, or are gradients masked?",
                f"Signs of masking in more than {bound:.0%} of the images: {'; '.join(seen) or 'none'}"
                + f". It cannot be told of {'; of '.join(open_)}" * bool(open_) + ".",
                reviewer="Reviewer 1", n=counted(table["number"].unique()), source=source)  # fmt: skip
else:
    print("The paper's networks are not here, so nothing is said about them.")
    scratch.cleanup()

# %% [markdown]
# ## Change this, expect that
#
# - Put one checkpoint that Git LFS has not fetched into the layout: the error names the file and says `git lfs pull`.
# - `images = 200` to `1000`: of an interval only the part that comes from the images shrinks, to less than half; what
#   comes from the spread of the networks stays.

# %%
book.close()
