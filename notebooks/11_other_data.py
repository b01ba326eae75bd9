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
# # 11. Other data: is it the data or the network?
#
# Liu et al. (2020) train LeNet on MNIST, VGG16 and ResNet18 on CIFAR-10. The rising budget of their Section 5 matters
# most for the first of these, and a reviewer asked for more data sets on *one* architecture: where the data change, the
# network changes too, so Table 1 cannot say which of the two the effect comes from.
#
# So here one network, LeNet in colour, is trained on several sets with equally many steps, over a grid of budgets eps
# which is the same for all; the profile overnight does it once more with ResNet18. Two things are read off: at which
# eps a *constant* budget stalls, that is, ends as a network that guesses, and for how many seeds; and whether a
# *rising* one moves that point.
#
# If the effect comes from the digits alone, a constant budget should stall nowhere on other pictures, or a rising one
# should not help there. If it comes from the network, it should do so on every set, at an eps of each set's own. The
# two sets that every clone has show the same digits, on black and on photographs: of other pictures they say nothing
# yet, which the profile overnight does (CIFAR-10, and Fashion-MNIST where it is found): its figure is
# `figures/overnight/11_stalls.png`.
#
# **To use images of your own**, add the path of a folder `{train,test}/<class>/*.png|jpg` to `datasets`.

# %% tags=["parameters"]
profile = "quick"
networks = [{"recipe": "lenet on few digits", "seeds": 4}]  # and how many of the seeds each is trained with
changes = {"lenet on few digits": {"images": [2000, 400], "set_aside": 0, "lr": 3e-3, "epochs": 6, "keep_every": 0,
                                   "eval_every": 6}}  # fmt: skip
datasets = ["mnist5k", "mnistm"]  # those that every clone has; other profiles add mnist, cifar10 and fashionmnist
eps_grid = [0.1, 0.4]
seeds = [0, 1, 2, 3]
stalled = 0.8  # a network with a larger clean error guesses
attack_steps = 10
margin = 0.05  # a difference in clean error that matters
folder_size = 224  # of the images of the last section

# %%
import tempfile
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from PIL import Image

from lib import cells, data, inference, recipes, runs
from lib.attacks import pgd
from lib.figures import SCHEDULE_COLOURS, Book
from lib.training import train

book = Book("11_other_data", globals())
recipe_of, seeds_of = {}, {}
for item in networks:
    settings = book.recipe(item["recipe"])
    network = cells.spelt(settings["model"])
    recipe_of[network], seeds_of[network] = settings, seeds[: item["seeds"]]
    if settings["images"] != (images := next(iter(recipe_of.values()))["images"]):
        raise ValueError(f"{item['recipe']!r} has {settings['images']} images: all networks need as many, {images}")
n = ", ".join(f"{network} {len(own)} seed{'s' * (len(own) > 1)}" for network, own in seeds_of.items())

# %% [markdown]
# ## The data
#
# All sets come as colour images: digits get three equal channels and a black border up to 32 x 32, so that one network
# fits them all. Equally many of each are taken, so that equal epochs are equal steps. MNIST-M is made here from digits
# and two photographs. What is neither in the data folder nor to be downloaded is left out, with a line that says so.

# %%
sets = {}
for name in datasets:
    try:
        found = recipes.load(settings | {"dataset": name})[0].rgb()
    except data.DataNotFound:
        print(f"{name}: left out, it is neither in the data folder nor to be downloaded")
        continue
    sets[cells.spelt(Path(name).name)] = found
    print(f"{name}: {found.source}")

# %%
fig, axes = plt.subplots(len(sets), 8, figsize=(7, 0.95 * len(sets)), squeeze=False)
drawn = []
for line, (name, found) in zip(axes, sets.items()):
    for i, ax in enumerate(line):
        ax.imshow(found.x_train[i].permute(1, 2, 0))
        ax.set(xticks=[], yticks=[])
        drawn.append({"dataset": name, "image": i, "label": found.y_train[i].item()})
    line[0].set_ylabel(name.replace(" ", "\n"), fontsize=8)
sources = "; ".join(found.source for found in sets.values())
book.save(fig, "11_images", pd.DataFrame(drawn), source=sources, caption="The first eight training images of each set.")

# %% [markdown]
# ## At which eps does a constant budget stall?
#
# Everything but the budget is equal in the two arms: weights at the start, order of the images, steps. The cosine
# begins at 0, aims beyond eps, and is clipped there. The rule takes all budgets of the grid together, image by image;
# it is asked on each set on which at least one network with a constant budget guesses, and of each network by itself.
# (Both were added with ResNet18: the first after one pair of its networks, on MNIST, had not stalled; the second after
# three of its seeds had left CIFAR-10 undecided, which asked for a fourth.)

# %%
rule = inference.difference("clean error over the budgets of the grid, cosine minus constant", margin=margin)
rule


# %%
def measured(run, found):
    """Masks on the test images, clean and attacked, in hexadecimal digits."""

    def compute():
        eps = run.config.eps
        attack = partial(pgd, eps=eps, step_size=eps / 4, num_steps=attack_steps, random_start="ball",
                         generator=torch.Generator().manual_seed(run.config.seed))  # fmt: skip
        masks = cells.mistakes(run.model(), found.x_test, found.y_test, {"robust": attack})
        return {kind: np.packbits(mask).tobytes().hex() for kind, mask in masks.items()}

    facts = {"run": run.folder.name, "attack": ["pgd", attack_steps, 0.25]}
    kept = runs.remember("other data", facts, compute)
    return {kind: np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8), count=len(found.y_test)).astype(bool)
            for kind, text in kept.items()}  # fmt: skip


lines, arms = [], ("constant", "cosine")
for (network, settings), (name, found) in product(recipe_of.items(), sets.items()):
    keys = list(product(arms, eps_grid, seeds_of[network]))
    for (arm, eps, seed), run in zip(keys, runs.grid(
        [cells.configure(settings, arm, eps=eps, seed=seed) for arm, eps, seed in keys], found
    )):  # fmt: skip
        masks = measured(run, found)
        lines.append({"network": network, "dataset": name, "arm": arm, "eps": eps, "seed": seed,
                      **{kind: mask.mean() for kind, mask in masks.items()}, "wrong": masks["clean"]})  # fmt: skip
lines = pd.DataFrame(lines)

# %%
fig, axes = plt.subplots(len(recipe_of), len(sets), figsize=(7, 0.6 + 2.4 * len(recipe_of)), sharex=True, sharey=True,
                         squeeze=False)  # fmt: skip
for (row, network), (column, name) in product(enumerate(recipe_of), enumerate(sets)):
    ax, panel = axes[row, column], lines[(lines.network == network) & (lines.dataset == name)]
    for arm, shift in zip(arms, (0.97, 1.03)):  # side by side, and hollow round filled, where the errors are equal
        here = panel[panel.arm == arm].groupby("eps")
        for kind, style in (("clean", {"ls": "--", "mfc": "none", "ms": 8}), ("robust", {"ls": "-", "ms": 4})):
            mean, places = here[kind].mean(), shift * here[kind].mean().index
            ax.fill_between(places, here[kind].min(), here[kind].max(), color=SCHEDULE_COLOURS[arm], alpha=0.15,
                            linewidth=0)  # fmt: skip
            ax.plot(places, mean, "o", color=SCHEDULE_COLOURS[arm], label=f"{arm}, {kind}", **style)
    ax.axhline(stalled, color="grey", linestyle=":")
    ax.set(xscale="log", ylim=(0, 1.03))
    ax.set_xticks(eps_grid, [cells.budget(eps) for eps in eps_grid])
    ax.minorticks_off()
for ax, name in zip(axes[0], sets):
    ax.set_title(name)
for ax in axes[-1]:
    ax.set_xlabel("eps")
for ax, network in zip(axes[:, 0], recipe_of):
    ax.set_ylabel(f"{network}: test error")
fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
book.save(
    fig, "11_stalls", lines.drop(columns="wrong"), source=sources, seeds=seeds,
    caption=f"Clean (dashed, hollow) and robust error (PGD-{attack_steps}, solid) by the budget of the training, on "
    f"{images[1]} test images; mean and range over seeds ({n}), the two arms of an eps side by side. A network whose "
    "clean error is above the dotted line guesses.",
)  # fmt: skip


# %%
def those(network, name, arm):
    return lines[(lines.network == network) & (lines.dataset == name) & (lines.arm == arm)]


def guessing(network, name, arm):
    """At which eps of the grid how many of the networks guess, as a text. (A mean over seeds would mislead: a network
    leaves the plateau or it does not.)"""
    here = those(network, name, arm)
    counts = (here["clean"] >= stalled).groupby(here["eps"]).sum()
    own = len(seeds_of[network])
    return ", ".join(f"{k} of {own} at {cells.budget(eps)}" for eps, k in counts.items() if k) or "none"


def all_budgets(network, name, arm):
    """Of each image, at how large a share of the budgets it is misclassified: (seeds, images)."""
    here = those(network, name, arm)
    return np.array([np.mean(list(here[here.seed == s]["wrong"]), axis=0) for s in seeds_of[network]])


DIGITS = {cells.spelt(name) for name in ("mnist5k", "mnist", "mnistm")}
places = {(network, name): f"{network} on {name}" for network, name in product(recipe_of, sets)}
stalls = {place: {arm: guessing(*place, arm) for arm in arms} for place in places}

# %%
findings = {network: {} for network in recipe_of}
for (network, name), text in places.items():
    every = [stalls[network, other]["constant"] for other in sets]
    nothing = "" if set(every) != {"none"} else "a constant budget stalls nowhere on the grid"
    if nothing or stalls[network, name]["constant"] != "none":
        both = (all_budgets(network, name, arm) for arm in ("cosine", "constant"))
        findings[network][text] = rule(*both, unless=nothing)
asked = {text: found for of_sets in findings.values() for text, found in of_sets.items()}
pd.DataFrame([{"network": place[0], "dataset": place[1], **stalls[place],
               "cosine - constant": asked[text].measured if text in asked else "not asked: nothing stalls"}
              for place, text in places.items()])  # fmt: skip

# %%
count = f"{len(eps_grid)} budgets, {images[1]} test images"
for network, found in findings.items():
    book.claim(
        f"{network}, other data: a rising budget ends in the smaller clean error where a constant one stalls",
        section="5", paper="the rising budget is shown for one network on each set", ours=True,
        holds=inference.together(found), source=sources,
        n=f"{len(seeds_of[network])} seeds, {count}, {len(found)} of {len(sets)} sets are judged",
    )  # fmt: skip

# %%
outcomes = {text: "less" if f.holds is True else "not clearly less" for text, f in asked.items()}
largest = max(eps_grid)
robust = lines[lines.eps == largest].groupby(["network", "dataset", "arm"])["robust"].mean()
gains = [text for place, text in places.items() if robust[*place, "constant"] - robust[*place, "cosine"] > margin]
same = " These sets show the same digits: of other pictures they say nothing." * bool(set(sets) <= DIGITS)
book.answer(
    "Does the effect come from the data or from the network?",
    "With equal steps, these networks guess: "
    + "; ".join(f"{text}, under a constant budget {stalls[place]['constant']}, under a cosine {stalls[place]['cosine']}"
                for place, text in places.items())
    + ". In clean error over the grid a rising budget errs "
    + "; ".join(f"{word} with {', '.join(text for text, found in outcomes.items() if found == word)}"
                for word in dict.fromkeys(outcomes.values()))
    + f". Under attack, at eps {cells.budget(largest)}, its mean robust error is smaller by more than {margin:g} with "
    f"{', '.join(gains) or 'none of them'} (cosine and constant: "
    + "; ".join(f"{robust[*place, 'cosine']:.3f} and {robust[*place, 'constant']:.3f}, {text}"
                for place, text in places.items())
    + ")." + same,
    reviewer="Reviewer 3", n=f"{n}, {count}, {len(sets)} sets", source=sources,
)  # fmt: skip

# %% [markdown]
# ## The same at 224 x 224, from disk
#
# The shape of ImageNet, and images that do not fit into memory: a folder is read batch by batch, by the same code. Here
# it holds a few textures made from seeds, far too few to say anything about robustness.


# %%
def texture(kind, rng):
    """A uint8 image (h, w, 3) of waves, of random size, colours, direction and length."""
    h, w = rng.integers(folder_size, 1.5 * folder_size, 2)
    down, right = np.mgrid[:h, :w] * rng.uniform(20, 60) / folder_size
    wave = {"stripes": np.sin(down + right), "rings": np.sin(np.hypot(down - 10, right - 5))}[kind]
    dark, light = rng.uniform(0, 255, (2, 3))
    return (dark + (light - dark) * (wave[..., None] + 1) / 2).astype(np.uint8)


with tempfile.TemporaryDirectory() as scratch:
    rng = np.random.default_rng(0)
    for part, kind, i in product(("train", "test"), ("stripes", "rings"), range(3)):
        path = Path(scratch, "textures", part, kind, f"{kind}{i}.jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(texture(kind, rng)).save(path, quality=90)
    streamed = data.image_folder(Path(scratch, "textures"), title="generated textures", size=folder_size, held_bytes=0)
    small = replace(cells.configure(next(iter(recipe_of.values())), "cosine", eps=8 / 255, seed=0), model="resnet18",
                    width=1, epochs=1, batch_size=4, num_steps=1, eval_every=1)  # fmt: skip
    run = train(small, streamed, folder=Path(scratch, "run"))
    print(f"{streamed.source}: {len(run.steps)} steps, held in memory: {isinstance(streamed.x_train, torch.Tensor)}")
book.check("A folder of large images is trained on from disk", figure="",
           measured=f"{len(run.steps)} steps at {folder_size} x {folder_size}",
           holds=isinstance(streamed.x_train, data.Images) and len(run.steps) == 2)  # fmt: skip

# %% [markdown]
# ## Change this, expect that
#
# - `changes`: a `lr` of `1e-2`: a rate at which many networks never leave the plateau on photographs, whatever the arm.
# - `seeds = [0]`: the same picture, but the spread between seeds is unknown then, and the verdict says so.
# - `networks`: with `{"recipe": "resnet18 on cifar10", "seeds": 3}` in it the same is asked of ResNet18, for
#   hours rather than minutes; `changes` should give it as many images and steps.

# %%
book.close()
