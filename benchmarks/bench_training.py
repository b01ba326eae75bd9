"""Adversarial training by `lib.training.train` against the textbook's loop: how much faster, and with what errors.

    python benchmarks/bench_training.py [--repeats 3]

In turns, one thread, CPU seconds of the whole training: ours with the checkpoint after each epoch, its records and the
evaluation of a few images. Each turn has its seed; in it both begin at the same parameters and see batches of the same
size in their own random order. Errors are means over the turns, with the least and the largest, on the same test
images. The result goes to training.json and, as a table, into README.md.
"""

import argparse
import statistics
import tempfile
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from bench_pgd import BATCH, COLOURS, DIGITS, textbook
from ratios import in_turns, spread
from readme import GUESSES, HERE, guesses, write_part

from lib import compute, data, models
from lib.attacks import pgd
from lib.evaluation import error, robust_error
from lib.files import write_json
from lib.training import TrainConfig, train

STEPS, TEST = 10, 500
SETTINGS = {  # the plain budget; digits are learned in so many epochs, photographs only timed
    "lenet w=4": DIGITS | {"width": 4, "images": 4000, "epochs": 4, "eps": 0.1},
    "lenet w=16": DIGITS | {"width": 16, "images": 2000, "epochs": 3, "eps": 0.1},
    "vgg16 w=2": COLOURS | {"model": "vgg16", "width": 2, "images": 1000, "epochs": 1},
    "resnet18 w=2": COLOURS | {"model": "resnet18", "width": 2, "images": 500, "epochs": 1},
}
LR = 1e-3


def by_textbook(model, x, y, epochs, seed, **budget):
    """The network after so many epochs of a loop as tutorials write it."""
    optimizer, generator = torch.optim.Adam(model.parameters(), LR), torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for i in torch.randperm(len(y), generator=generator).split(BATCH):
            x_adv = textbook(model, x[i], y[i], **budget)
            model.train()
            optimizer.zero_grad()
            F.cross_entropy(model(x_adv), y[i]).backward()
            optimizer.step()
    return model.eval()


def by_train(config, digits):
    with tempfile.TemporaryDirectory() as folder:
        return train(config, digits, folder=folder, quiet=True).model()


def measure(name, repeats):
    settings = SETTINGS[name]
    digits, images, eps = data.load(settings["data"]), settings["images"], settings["eps"]
    digits = replace(digits, x_train=digits.x_train[:images], y_train=digits.y_train[:images])
    budget = {"eps": eps, "step_size": eps / 4}
    config = TrainConfig(
        model=settings["model"], width=settings["width"], **budget, num_steps=STEPS, epochs=settings["epochs"],
        lr=LR, batch_size=BATCH, eval_images=16, eval_every=settings["epochs"],
    )  # fmt: skip

    def by_loop(seed):
        model = models.build(config.model, seed=seed, **config.model_settings(in_channels=digits.x_train.shape[1]))
        return by_textbook(model, digits.x_train, digits.y_train, config.epochs, seed, **budget)

    turns, errors = [], {whose: {"clean": [], "robust": []} for whose in ("textbook", "ours")}
    x, y, attack = digits.x_test[:TEST], digits.y_test[:TEST], partial(pgd, num_steps=20, **budget)
    for seed in range(repeats):
        pair = {"textbook": partial(by_loop, seed), "ours": partial(by_train, replace(config, seed=seed), digits)}
        found, (turn,) = in_turns(pair, 1)
        turns.append(turn)
        for whose, model in found.items():
            errors[whose]["clean"].append(error(model, x, y))
            errors[whose]["robust"].append(robust_error(model, x, y, attack))
    return {"what": name, "against": "textbook", "images": images, "epochs": config.epochs, "eps": eps,
            **spread(turns, "textbook"), "error": errors}  # fmt: skip


def percent(error, kind):
    """The mean over the turns of a kind of error, with the least and the largest."""
    values, word = error[kind], guesses(statistics.mean(error["clean"]), "; guesses")
    return f"{statistics.mean(values):.1%} ({min(values):.1%} to {max(values):.1%}{word})"


def tables(record):
    machine = record["hardware"]
    lines = [
        f"{machine['device']}, {machine['vector_unit']}, {machine['precision']}, one thread, PyTorch "
        f"{record['versions']['torch']}; PGD-{STEPS}, batch {BATCH}.", "",
        "| network | images x epochs | textbook / ours: median (min to max) | clean error, textbook | ours "
        f"| PGD-20 error on {TEST} images, textbook | ours |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for r in record["rows"]:
        errors = [percent(r["error"][whose], kind) for kind in ("clean", "robust") for whose in ("textbook", "ours")]
        ratio = f"{r['ratio_median']:.2f} ({r['ratio_min']:.2f} to {r['ratio_max']:.2f})"
        lines.append(f"| {r['what']} | {r['images']:,} x {r['epochs']} | {ratio} | {' | '.join(errors)} |")
    return "\n".join([*lines, "", GUESSES])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="turns, each with a seed of its own")
    parser.add_argument("--models", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    given = parser.parse_args()
    compute.fix_threads()
    torch.manual_seed(0)
    record = {"hardware": compute.hardware(), "versions": compute.versions(), "repeats": given.repeats, "rows": []}
    for name in given.models:
        record["rows"].append(measure(name, given.repeats))
        write_json(HERE / "training.json", record)
        write_part("training", tables(record))
    print(tables(record))


if __name__ == "__main__":
    main()
