"""How the networks of the notebooks are trained: each recipe stands here once, and notebooks name it.

A recipe holds settings of `TrainConfig` and, beside them: dataset; images, how many of the first training and test
images; set_aside, how many of the last training images are kept apart for choosing a learning rate; step_fraction, the
attack's step size as a fraction of eps; stops, the value that a rising schedule goes towards, as a multiple of eps (it
is clipped at eps; cosine_misread has cosine's, unless it has one of its own); periods, the epochs at which a periodic
arm begins again; plan, how networks are attacked for a table (what `cells.attacks` takes, and how many test images PGD
and the others see). A notebook changes a recipe by its parameter `changes`, a profile by its section `recipes`.
"""

import math
import os
from dataclasses import fields, replace

from . import data
from .checks import check_eps
from .files import as_path
from .settings import OWN, SettingError, exactly
from .training import TrainConfig

PAPER_STOPS = {"linear": 2.0, "cosine": 2.0, "cosine_misread": 2.0}
CIFAR10 = dict(
    dataset="cifar10", images=[11000, 5000], set_aside=1000, width=2, step_fraction=0.5, num_steps=3, stops=PAPER_STOPS,
    epochs=32, batch_size=128, optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=1e-3, lr_drops=[0.5, 0.75],
    augment=True, eval_every=8, eval_images=500, keep_every=4, periods=[16, 24],
    plan=dict(steps=10, step_fraction=0.25, pgd_images=5000, strong_steps=30, queries=300, strong_images=500),
)  # fmt: skip
MNIST5K = dict(
    dataset="mnist5k", images=[None, None], set_aside=0, model="lenet", width=4, step_fraction=0.5, num_steps=3,
    stops={"linear": 2.0, "cosine": 1.5}, epochs=5, batch_size=64, optimizer="adam", lr=3e-3, lr_drops=[0.8],
    eval_every=5, eval_images=500, keep_every=0, periods=[],
    plan=dict(steps=20, step_fraction=0.4, pgd_images=1000, strong_steps=20, queries=200, strong_images=500),
)  # fmt: skip
RECIPES = {
    "lenet on mnist5k": MNIST5K,
    "lenet on mnist5k in l2": MNIST5K | {"norm": "l2"},
    # Madry et al. (2018), with fewer steps, and Wong et al. (2020):
    "lenet by the challenge loop on mnist5k": MNIST5K | dict(start="ball", num_steps=5, step_fraction=0.25),
    "lenet by fast training on mnist5k": MNIST5K | dict(
        start="ball", num_steps=1, step_fraction=1.25, plan=MNIST5K["plan"] | {"one_step": True}
    ),
    "lenet on few digits": dict(
        dataset="mnist5k", images=[None, None], set_aside=500, model="lenet", width=4, step_fraction=0.5, num_steps=3,
        stops={"linear": 2.0, "cosine": 1.5, "cosine_misread": 1.5}, epochs=4, batch_size=64, optimizer="adam", lr=1e-2,
        eval_every=1, eval_images=200, keep_every=1, periods=[2, 3],
        plan=dict(steps=10, step_fraction=0.2, pgd_images=400, strong_steps=10, queries=100, strong_images=100),
    ),
    "lenet on mnist": dict(
        dataset="mnist", images=[None, None], set_aside=1000, model="lenet", width=4, step_fraction=0.3, num_steps=5,
        stops={"linear": 2.0, "cosine": 1.5}, epochs=10, batch_size=128, optimizer="adam", lr=1e-3, eval_every=5,
        eval_images=500, keep_every=2, periods=[6, 8],
        plan=dict(steps=40, step_fraction=0.05, pgd_images=2000, strong_steps=40, queries=500, strong_images=1000),
    ),
    "vgg16 on cifar10": dict(model="vgg16", **CIFAR10),
    "resnet18 on cifar10": dict(model="resnet18", **CIFAR10),
}  # fmt: skip
# Settings that are no fields of TrainConfig, and fields that no recipe sets:
BESIDE = {"dataset", "images", "set_aside", "step_fraction", "stops", "periods", "plan"}
PER_RUN = {"eps": "is the notebook's", "seed": "is the notebook's", "schedule": "is the arm's",
           "schedule_stop": "follows from stops and eps", "restarts": "are the arm's, by periods"}  # fmt: skip
KNOWN = BESIDE | {field.name for field in fields(TrainConfig)}


def _count(value, least=1):
    return type(value) is int and value >= least


# What those have to be that no TrainConfig looks at:
FITTING = {
    "dataset": (lambda name: name in data.LOADERS or os.sep in name or as_path(name).is_dir(),
                f"one of {', '.join(data.LOADERS)}, or the path of a folder, such as ./photographs"),
    "images": (lambda pair: len(pair) == 2 and all(n is None or _count(n) for n in pair),
               "two whole numbers of at least 1, or null for all"),
    "set_aside": (lambda n: _count(n, 0), "a whole number of at least 0"),
    "periods": (lambda epochs: all(map(_count, epochs)), "whole numbers of at least 1"),
}  # fmt: skip


def get(name, changes=None):
    """The settings of a recipe, with changes.

    Args:
        name: one of RECIPES.
        changes: {recipe: {setting: value}}; what it says of other recipes is passed over.
    Returns:
        A dict of settings, new each time.
    Raises:
        SettingError: a recipe or setting that does not exist, here or in changes, another type of value, or one that
            nothing can be made of.
    """
    new = {}
    for recipe, settings in {name: {}, **(changes or {})}.items():
        if recipe not in RECIPES:
            raise SettingError(f"no recipe {recipe!r}: there are {', '.join(RECIPES)}")
        if not isinstance(settings, dict):
            raise SettingError(f"changes of {recipe!r} are {settings!r}, but should be {{setting: value}}")
        for setting, value in settings.items():
            if setting not in KNOWN:
                there = ", ".join(sorted(KNOWN - set(PER_RUN)))
                raise SettingError(f"{recipe!r} has no setting {setting!r}: there are {there}")
            if setting in PER_RUN:
                raise SettingError(f"{setting} of {recipe!r} {PER_RUN[setting]}: no recipe sets it")
            value = _fitting(f"{setting} of {recipe!r}", value, RECIPES[recipe].get(setting), setting)
            if recipe == name:
                new[setting] = value
    return merged(RECIPES[name], new)


def merged(old, new):
    """Settings with changes, a dict; what a change of a dict in it (plan, stops) does not name stays."""
    return old | {key: old[key] | value if isinstance(old.get(key), dict) else value for key, value in new.items()}


def _fitting(where, value, like, setting):
    """What `exactly` gives. Raises SettingError also for what TrainConfig would not see, as no field of it."""
    value = exactly(where, value, like, setting)
    fits, wanted = FITTING.get(setting, (lambda _: True, ""))
    if not fits(value):
        raise SettingError(f"{where} is {value!r}, but should be {wanted}")
    for key, one in value.items() if setting in OWN else ():
        if one is not False and not 0 < one < math.inf:
            raise SettingError(f"{where}: {key} is {one}, but should be above 0")
    return value


def load(settings):
    """The images of a recipe: Data whose test part is the recipe's, and Data whose test part was set aside (or None).

    Both have the same training images; the learning rate is chosen on the second one.
    """
    found, n = data.load(settings["dataset"]).first(*settings["images"]), settings.get("set_aside", 0)
    if not n:
        return found, None
    rest = found.first(len(found.y_train) - n, len(found.y_test))
    return replace(rest, source=found.source), found.set_aside(n)


def more(settings, n):
    """Data whose test part are n images that no run of a recipe learns from or chooses by, beyond its own test part:
    all test images, then the training images that the recipe leaves. Raises ValueError where there are fewer."""
    whole = data.load(settings["dataset"])
    return whole.more(settings["images"][0] or len(whole.y_train), n)


def configure(settings, **changes):
    """The TrainConfig of a recipe's settings, with what differs in this run.

    Args:
        settings: of a recipe.
        changes: fields of TrainConfig, or settings of a recipe; they go before settings.
    Raises:
        SettingError: a name that is neither. ValueError: as for TrainConfig.
    """
    if unknown := (set(settings) | set(changes)) - KNOWN:
        raise SettingError(f"unknown setting {', '.join(sorted(unknown))}: there are {', '.join(sorted(KNOWN))}")
    chosen = settings | changes
    beside = {name: chosen.pop(name, None) for name in BESIDE}
    if "step_size" not in chosen:
        if not beside["step_fraction"]:
            raise SettingError("there is neither a step_fraction above 0 nor a step_size")
        chosen["step_size"] = beside["step_fraction"] * check_eps(chosen.get("eps"), norm=chosen.get("norm", "linf"))
    stops, schedule = beside["stops"] or {}, chosen.get("schedule")
    stop = stops.get("cosine" if schedule == "cosine_misread" and schedule not in stops else schedule)
    if stop and "schedule_stop" not in chosen:
        chosen["schedule_stop"] = stop * chosen["eps"]
    return TrainConfig(**chosen)
