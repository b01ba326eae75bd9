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
# The paper trains LeNet on MNIST and VGG16 and ResNet18 on CIFAR-10. The rising budget of its Section 5 matters most
# for the first of these, and a reviewer asked for more data sets on *one* architecture: with the data, the network
# changes too, so the table of the paper cannot say which of the two the effect comes from.
#
# Here one network, ResNet18, is trained on every set at hand, under a constant and under a cosine budget; and on the
# digits LeNet is trained beside it.
#
# 1. If the gain comes from the *data*, ResNet18 should gain on the digits and not on the photographs.
# 2. If it comes from the *network*, ResNet18 and LeNet should gain differently on the same digits.
#
# Both may hold. The last section takes the same code to a folder of images at 224 x 224, the shape of ImageNet, that
# is read from disk batch by batch.
#
# **To use images of your own**, add a row with the path of a folder `{train,test}/<class>/*.png|jpg` as its dataset,
# and set `cut` if they differ in size.

# %% tags=["parameters"]
profile = "quick"
# A row is an experiment. Beside dataset and eps it may hold any setting of a run; the others are those below.
rows = [
    {"dataset": "mnist5k", "eps": "0.3"},
    {"dataset": "cifar10", "eps": "8/255"},
    {"dataset": "mnistm", "eps": "8/255"},
    {"dataset": "fashionmnist", "eps": "0.1"},
    {"dataset": "mnist5k", "eps": "0.3", "model": "lenet", "width": 4, "epochs": 16},
]
cut = None  # images of a folder are cut to this size
train_images = 500
model = "resnet18"
width = 2
stop_factor = 1.5  # the cosine aims at this multiple of eps and is clipped at eps
seeds = [0, 1]
epochs = 4
batch_size = 32
num_steps = 2
step_fraction = 0.6  # the attack's step size, as a fraction of eps
optimizer = "adam"
lr = 3e-3
eval_every = 4
eval_images = 50
test_steps = 10  # the attack of the final evaluation
test_step_fraction = 0.25
test_images = 200
folder_images = 6  # of each class, in the generated folder
folder_size = 224

# %%
import tempfile
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from PIL import Image

from lib import data, evaluation, runs
from lib.attacks import pgd
from lib.figures import Book
from lib.training import train

book = Book("11_other_data", globals())

# %% [markdown]
# ## The data
#
# All sets come as colour images: digits get three equal channels and a black border up to 32 x 32, so that one network
# fits them all. What is neither in the data folder nor to be downloaded is left out, with a line that says so.
#
# The budgets are chosen by set. On digits it is 0.3, the budget of the MNIST challenge: black and white pixels survive
# it. On photographs it is the usual 8/255, also for the stand-in, so that the two can be compared. On clothes it is
# 0.1, since their grey tones would not survive 0.3.


# %%
def find(name):
    folder = Path(name).is_dir()
    found = data.image_folder(name, size=cut) if folder else data.load(name).rgb()
    return found.first(min(train_images, len(found.y_train)), min(test_images, len(found.y_test)))


sets = {}
for name in dict.fromkeys(row["dataset"] for row in rows):
    try:
        sets[name] = find(name)
        print(f"{name}: {sets[name].source}")
    except data.DataNotFound:
        print(f"{name}: left out, it is neither in the data folder nor to be downloaded")
present = [row for row in rows if row["dataset"] in sets]

# %%
fig, axes = plt.subplots(len(sets), 8, figsize=(8, 1.05 * len(sets) + 0.1), squeeze=False)
drawn = []
for line, (name, found) in zip(axes, sets.items()):
    for i, ax in enumerate(line):
        ax.imshow(found.x_train[i].permute(1, 2, 0))
        ax.set(xticks=[], yticks=[])
        drawn.append({"dataset": name, "image": i, "label": found.y_train[i].item()})
    line[0].set_ylabel(name, rotation=0, ha="right", va="center")
book.save(
    fig, "11_images", pd.DataFrame(drawn), source="; ".join(found.source for found in sets.values()),
    caption="The first eight training images of each set.",
)  # fmt: skip

# %% [markdown]
# ## Training
#
# In each row two networks per seed, which begin with the same weights and see the images in the same order; only the
# budget differs. The cosine begins at 0 and aims beyond eps, where it is clipped, as in the paper.


# %%
def config(row, schedule, seed):
    settings = book.parameters | row
    eps = float(Fraction(row["eps"]))
    stop = settings["stop_factor"] * eps if schedule == "cosine" else None
    return runs.configure(settings, eps=eps, schedule=schedule, schedule_stop=stop, seed=seed)


def errors(run, found):
    """Clean and robust error on the test images, the attack stronger than that of the training."""
    net, x, y = run.model(), found.x_test, found.y_test
    attack = partial(pgd, eps=run.config.eps, step_size=test_step_fraction * run.config.eps, num_steps=test_steps,
                     generator=torch.Generator().manual_seed(run.config.seed))  # fmt: skip
    size = run.config.batch_size
    return {"clean": evaluation.error(net, x, y, batch_size=size),
            "robust": evaluation.robust_error(net, x, y, attack, batch_size=size)}  # fmt: skip


# %%
measured = []
for row in present:
    found = sets[row["dataset"]]
    network = row.get("model", model)
    label = f"{network}\n{Path(row['dataset']).name}\neps {row['eps']}"
    for schedule in ("constant", "cosine"):
        for run in runs.grid([config(row, schedule, seed) for seed in seeds], found):
            facts = {"run": run.folder.name, "attack": [test_steps, test_step_fraction], "data": found.fingerprint}
            values = runs.remember("other_data", facts, partial(errors, run, found))
            about = {"row": label, "network": network, "dataset": row["dataset"], "schedule": schedule}
            measured.append(about | {"seed": run.config.seed, "images": len(found.y_test)} | values)
measured = pd.DataFrame(measured)
sources = "; ".join(sets[name].source for name in measured["dataset"].unique())
n = f"{len(seeds)} seeds"

# %%
fig, axes = plt.subplots(1, 2, figsize=(5.5 + 1.1 * len(present), 3.8), sharey=True)
for ax, column in zip(axes, ("clean", "robust")):
    sns.swarmplot(measured, x="row", y=column, hue="schedule", dodge=True, size=5, ax=ax)
    sns.pointplot(measured, x="row", y=column, hue="schedule", dodge=0.4, errorbar=None, linestyle="none", marker="_",
                  markersize=18, legend=False, ax=ax)  # fmt: skip
    ax.set(title=f"{column} error", xlabel="", ylabel="error on test images", ylim=(0, 1.03))
    ax.tick_params(axis="x", labelsize=8)
axes[0].get_legend().remove()
sns.move_legend(axes[1], "upper left", bbox_to_anchor=(1, 1))
book.save(
    fig, "11_errors", measured, source=sources, seeds=seeds,
    caption=f"Clean and robust error (PGD-{test_steps}) under both budgets, by network, data set and eps, on up to "
    f"{test_images} test images; a point per seed ({n}), bars: means.",
)  # fmt: skip

# %%
table = measured.groupby(["network", "dataset", "schedule"], sort=False)[["clean", "robust"]].agg(["mean", "std"])
table.round(3)

# %% [markdown]
# ## What the rising budget gains
#
# The gain of a pair of networks is the error under the constant budget less that under the cosine, for clean images and
# for attacked ones. Its interval is for the choice of the test images: 1.96 standard errors, as if the two networks
# failed independently of each other, which is on the safe side, since mostly they fail at the same images. How much the
# seed matters is seen from the points themselves. A gain counts only if the intervals of *all* seeds lie on one side of
# zero, and two rows differ only if all intervals of one lie above all of the other.

# %%
long = measured.melt(["row", "images", "schedule", "seed"], ["clean", "robust"], var_name="kind", value_name="error")
pairs = long.pivot(index=["kind", "row", "images", "seed"], columns="schedule", values="error")
spread = 1.96 * ((pairs * (1 - pairs)).sum(axis=1) / pairs.index.get_level_values("images")) ** 0.5
gain = pairs["constant"] - pairs["cosine"]
gains = pd.DataFrame({"gain": gain, "low": gain - spread, "high": gain + spread}).reset_index()
labels = list(measured["row"].unique())

# %%
fig, axes = plt.subplots(1, 2, figsize=(5.5 + 1.1 * len(labels), 3.8), sharey=True)
for ax, (kind, panel) in zip(axes, gains.groupby("kind")):
    for k, (seed, part) in enumerate(panel.groupby("seed")):
        part = part.set_index("row").loc[labels]
        place = np.arange(len(labels)) + 0.15 * (k - (len(seeds) - 1) / 2)
        ax.errorbar(place, part["gain"], [part["gain"] - part["low"], part["high"] - part["gain"]], fmt="o",
                    capsize=3, label=f"seed {seed}")  # fmt: skip
    ax.axhline(0, color="grey", linestyle=":")
    ax.set(title=f"{kind} error", xticks=range(len(labels)), xlim=(-0.5, len(labels) - 0.5))
    ax.set_xticklabels(labels, fontsize=8)
axes[0].set_ylabel("gain: constant less cosine")
axes[1].legend(loc="upper left", bbox_to_anchor=(1, 1))
book.save(
    fig, "11_gains", gains, source=sources, seeds=seeds,
    caption=f"Clean and robust error (PGD-{test_steps}) under the constant budget less that under the cosine, of "
    f"networks with the same seed; above zero the cosine is better. Bars: 95 % intervals for the choice of the test "
    f"images, of which there are up to {test_images}; {n}.",
)  # fmt: skip

# %% [markdown]
# ## Verdicts
#
# A claim is reproduced if both kinds of error show it, and partly if one does. If neither does, it cannot be told at
# this size: intervals that overlap do not show that two gains are equal.

# %%
spans = gains.groupby(["kind", "row"]).agg(low=("low", "min"), high=("high", "max"), gain=("gain", "mean"))
ours = [label for label in labels if label.startswith(f"{model}\n")]
others = [label for label in labels if label not in ours]


def apart(kind, a, b):
    """Whether all intervals of one row lie above all of the other."""
    a, b = spans.loc[kind, a], spans.loc[kind, b]
    return bool(a.low > b.high or b.low > a.high)


def told(kind, chosen):
    return f"{kind}: " + ", ".join(f"{spans.gain[kind, a]:+.3f} ({' '.join(a.splitlines())})" for a in chosen)


def shown(per_kind):
    """The verdict from {kind of error: whether it shows the claim}."""
    return True if all(per_kind.values()) else "partly" if any(per_kind.values()) else None


# %%
kinds = ("clean", "robust")
better = {kind: [a for a in ours if spans.low[kind, a] > 0] for kind in kinds}
worse = {kind: [a for a in ours if spans.high[kind, a] < 0] for kind in kinds}
some = "partly" if any(better.values()) else None
book.claim(
    f"A rising budget lowers the errors of one network ({model}) on every data set",
    section="5, a reviewer's question",
    measured="; ".join(
        f"mean gain, {told(kind, ours)}, clear for every seed in {len(better[kind])} of {len(ours)} rows, a clear loss "
        f"in {len(worse[kind])}"
        for kind in kinds
    ),
    holds=False if any(worse.values()) else shown({k: b == ours != [] for k, b in better.items()}) or some,
    n=f"{n}, paired, up to {test_images} test images a set",
    source=sources,
)
candidates = [(a, b) for i, a in enumerate(ours) for b in ours[i + 1 :]]
differ = {kind: [pair for pair in candidates if apart(kind, *pair)] for kind in kinds}
book.claim(
    f"The gain depends on the data ({model} throughout)",
    section="5, a reviewer's question",
    measured="; ".join(f"{kind}: {len(differ[kind])} of {len(candidates)} pairs of rows differ" for kind in kinds),
    holds=shown(differ),
    n=f"{n}, up to {test_images} test images a set",
    source=sources,
)

# %% [markdown]
# The same images at the same eps, two networks:

# %%
counterparts = [(a, b) for a in ours for b in others if a.split("\n")[1:] == b.split("\n")[1:]]
differ = {kind: [pair for pair in counterparts if apart(kind, *pair)] for kind in kinds}
book.claim(
    "The gain depends on the network (on the same images at the same eps)",
    section="5, a reviewer's question",
    measured="; ".join(f"mean gain, {told(kind, pair)}" for kind in kinds for pair in counterparts) or "not compared",
    holds=shown(differ),
    n=f"{n}, up to {test_images} test images",
    source=sources,
)

# %% [markdown]
# ## The same at 224 x 224, from disk
#
# A folder in the layout of ImageNet is made from seeds: four kinds of texture, as JPEG files of different sizes. They
# are far too few to say anything about robustness. What they show is that nothing in the code above changes: the images
# are cut by ImageNet's usual evaluation crop, training and evaluation take them as they take any others, and only one
# batch of them is in memory at any time. (A folder is read in this way when its images take more than
# `data.HELD_BYTES`; here the limit is set to 0.) Unreadable files are counted and named: what is wrong with a header
# when the folder is opened, what is wrong further on when the image is decoded.


# %%
def texture(kind, rng):
    """A uint8 image (h, w, 3) of waves, of random size, colours, direction and length."""
    h, w = rng.integers(folder_size, 1.5 * folder_size, 2)
    down, right = np.mgrid[:h, :w] * rng.uniform(20, 60) / folder_size
    angle = rng.uniform(0, np.pi)
    along, across = down * np.cos(angle) + right * np.sin(angle), right * np.cos(angle) - down * np.sin(angle)
    dots = np.sin(along) * np.sin(across)
    rings = np.sin(np.hypot(along - 10, across - 5))
    wave = {"stripes": np.sin(along), "checks": np.sign(dots), "dots": dots, "rings": rings}[kind]
    dark, light = rng.uniform(0, 255, (2, 3))
    return (dark + (light - dark) * (wave[..., None] + 1) / 2).astype(np.uint8)


def make_folder(path):
    rng = np.random.default_rng(0)
    for part, count in (("train", folder_images), ("test", (folder_images + 1) // 2)):
        for kind in ("stripes", "checks", "dots", "rings"):
            (path / part / kind).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(texture(kind, rng)).save(path / part / kind / f"{kind}{i}.jpg", quality=90)


# %%
decoded = []


class Watched(data.Images):
    """Images on disk that note, in bytes, what is decoded at one time."""

    def __getitem__(self, which):
        images = super().__getitem__(which)
        if isinstance(images, torch.Tensor):
            decoded.append(images.nbytes)
        return images


# %%
with tempfile.TemporaryDirectory() as folder:
    make_folder(Path(folder, "textures"))
    found = data.image_folder(Path(folder, "textures"), title="generated textures", size=folder_size, held_bytes=0)
    x_train, x_test = (Watched(x.files, x.size) for x in (found.x_train, found.x_test))
    found = replace(found, x_train=x_train, x_test=x_test)
    small = {"eps": "8/255", "epochs": 1, "eval_every": 1, "batch_size": 8, "num_steps": 1}
    run = train(config(small, "cosine", 0), found, folder=Path(folder, "run"))
    values = errors(run, found)
    image = 4 * x_train.shape[1:].numel()  # bytes as float32
needed = image * (len(x_train) + len(x_test))
print(found.source)
print(f"{len(run.steps)} steps of {run.config.batch_size} images, {len(decoded)} batches decoded in all")
print(f"decoded at one time: at most {max(decoded) / 2**20:.1f} MiB; all images: {needed / 2**20:.1f} MiB")
print(f"error on the test images: {values['clean']:.3f} clean, {values['robust']:.3f} attacked")

# %%
book.claim(
    f"A folder of {folder_size} x {folder_size} images is trained on and evaluated without being held in memory",
    section="the companion's own code",
    measured=f"at most {max(decoded) / needed:.3f} of the {needed / 2**20:.1f} MiB that its images take are "
    f"decoded at one time, a batch of {run.config.batch_size}",
    holds=max(decoded) <= run.config.batch_size * image < needed,
    n=f"{len(x_train)} + {len(x_test)} images, 1 epoch",
    source=found.source,
)

# %% [markdown]
# ## The ledger

# %%
book.close()
