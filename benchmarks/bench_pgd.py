"""How much faster `lib.attacks.pgd` is than a textbook loop, foolbox, torchattacks and ART, and is it as strong?

    python benchmarks/bench_pgd.py [--threads 1] [--repeats 3] [--models "lenet w=4" ...]

All take turns in one process, on one trained model and one batch, so that what else the machine does falls on all of
them; a ratio is taken within each turn, of CPU seconds. "full" is `pgd` with precision="full": "auto", the default,
must never be slower. The result goes to pgd.json and, as a table, into README.md; models that are not asked for keep
their rows, if these were made on such a machine with such versions.
"""

import argparse
import tempfile
from dataclasses import replace
from functools import partial
from importlib.metadata import version

import foolbox
import torch
import torch.nn.functional as F
from peers import PEERS, art_classifier, peer
from ratios import in_turns, spread
from readme import GUESSES, HERE, guesses, write_part

from lib import compute, data
from lib.attacks import pgd
from lib.evaluation import error, robust_error
from lib.files import read_json, write_json
from lib.training import TrainConfig, train

BATCH, STEPS = 128, 10
DIGITS = {"model": "lenet", "data": "mnist5k", "eps": 0.2, "images": 2000, "epochs": 2, "batch": BATCH, "attacked": 256}
COLOURS = {"data": "mnistm", "eps": 8 / 255, "images": 4000, "epochs": 6, "batch": BATCH, "attacked": 256}
WIDE = COLOURS | {"width": 8, "images": 500, "epochs": 2, "batch": 32, "attacked": 64}  # they take 16 times as long
SETTINGS = {  # the data, the attack, a short training against a weaker attack, images timed, images for the errors
    "lenet w=4": DIGITS | {"width": 4, "aim": 2.7},
    "lenet w=16": DIGITS | {"width": 16, "aim": 2.2},
    "vgg16 w=2": COLOURS | {"model": "vgg16", "width": 2, "aim": 2.3},
    "resnet18 w=2": COLOURS | {"model": "resnet18", "width": 2, "aim": 2.0},
    "vgg16 w=8": WIDE | {"model": "vgg16", "aim": 1.75},
    "resnet18 w=8": WIDE | {"model": "resnet18", "aim": 1.75},
}
AGAINST = ("textbook", "foolbox", "torchattacks", "ART", "full")


def textbook(model, x, y, *, eps, step_size):
    """PGD as tutorials write it: float32, default layout, gradients of the parameters too."""
    model.eval()
    x_adv = (x + torch.empty_like(x).uniform_(-step_size, step_size)).clamp(0, 1)
    for _ in range(STEPS):
        x_adv = x_adv.detach().requires_grad_(True)
        loss = F.cross_entropy(model(x_adv), y)
        model.zero_grad()
        loss.backward()
        x_adv = x_adv + step_size * x_adv.grad.sign()
        x_adv = torch.min(torch.max(x_adv, x - eps), x + eps).clamp(0, 1)
    return x_adv.detach()


def by_foolbox(model, x, y, *, eps, step_size):
    attack = foolbox.attacks.LinfPGD(abs_stepsize=step_size, steps=STEPS, random_start=True)
    return attack.run(foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu"), x, y, epsilon=eps)


def by_torchattacks(model, x, y, *, eps, step_size):
    return peer("torchattacks").PGD(model, eps=eps, alpha=step_size, steps=STEPS, random_start=True)(x, y)


def by_art(model, x, y, *, eps, step_size):
    kind = peer("art", "art.attacks.evasion").ProjectedGradientDescentPyTorch
    settings = {"eps": eps, "eps_step": step_size, "max_iter": STEPS, "num_random_init": 1, "batch_size": len(x)}
    attack = kind(art_classifier(model, x, y), **settings, verbose=False)
    return torch.from_numpy(attack.generate(x.numpy(), y.numpy()))


def trained(settings, digits):
    """The model after a short adversarial training with half the budget."""
    eps = settings["eps"] / 2
    digits = replace(digits, x_train=digits.x_train[: settings["images"]], y_train=digits.y_train[: settings["images"]])
    config = TrainConfig(
        model=settings["model"], width=settings["width"], eps=eps, step_size=eps, num_steps=1, schedule="linear",
        epochs=settings["epochs"], lr=1e-3, eval_images=100, eval_every=settings["epochs"],
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        return train(config, digits, folder=folder).model()


def compare_speed(model, batch, attacks, threads, repeats):
    """CPU seconds of each attack, turn by turn, after one step of each to warm up."""
    torch.set_num_threads(threads)
    for attack in attacks.values():
        attack(model, *(t[:8] for t in batch))
    _, turns = in_turns({name: partial(attack, model, *batch) for name, attack in attacks.items()}, repeats)
    return [{"against": name, "threads": threads, **spread(turns, name)} for name in AGAINST]


def compare_strength(model, x, y, attacks, batch):
    found = {name: robust_error(model, x, y, attack, batch_size=batch) for name, attack in attacks.items()}
    return {"clean_error": error(model, x, y), "robust_error": found, "n": len(x)}


def measure(name, threads, repeats):
    torch.set_num_threads(max(threads))
    settings = SETTINGS[name]
    images, size = settings["attacked"], settings["batch"]
    digits = data.load(settings["data"])
    model = trained(settings, digits)
    budget = {"eps": settings["eps"], "step_size": settings["eps"] / 4}
    torch.manual_seed(0)
    ours = partial(pgd, num_steps=STEPS, **budget)
    attacks = {
        "textbook": partial(textbook, **budget),
        "foolbox": partial(by_foolbox, **budget),
        "torchattacks": partial(by_torchattacks, **budget),
        "ART": partial(by_art, **budget),
        "full": partial(ours, precision="full"),
        "ours": ours,
    }
    batch = digits.x_test[:size], digits.y_test[:size]
    speed = [row for t in threads for row in compare_speed(model, batch, attacks, t, repeats)]
    torch.set_num_threads(max(threads))
    attacks["stop_early"] = partial(ours, stop_early=True)
    strength = compare_strength(model, digits.x_test[:images], digits.y_test[:images], attacks, size)
    asked = {"model": name, "aim": settings["aim"], "batch": size, **budget, "source": digits.source}
    return {**asked, "speed": speed, **strength}


def tables(record):
    """The record as two Markdown tables."""
    machine = record["hardware"]
    lines = [
        f"{machine['device']}, {machine['vector_unit']}, attack in {machine['precision']}, "
        f"PyTorch {record['versions']['torch']}, foolbox {record['versions']['foolbox']}, {PEERS['torchattacks']}, "
        f"{PEERS['art']}; {record['steps']} steps.",
        "",
        "| model | batch | threads | aim | textbook / ours: median (min to max) | foolbox / ours | torchattacks / ours "
        "| ART / ours | full / auto | repeats |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for m in record["models"]:
        for threads in sorted({s["threads"] for s in m["speed"]}):
            row = {s["against"]: s for s in m["speed"] if s["threads"] == threads}
            repeats = row["full"]["repeats"]
            ratios = {
                k: f"{s['ratio_median']:.2f} ({s['ratio_min']:.2f} to {s['ratio_max']:.2f})" for k, s in row.items()
            }
            columns = (m["model"], m["batch"], threads, m["aim"], *(ratios[other] for other in AGAINST), repeats)
            lines.append(f"| {' | '.join(map(str, columns))} |")
    kinds = (*AGAINST, "ours", "stop_early")
    lines += [
        "",
        f"| model | eps | n | clean error | robust error: {' | '.join(kinds)} |",
        "|---|---|---|---" + "|---" * len(kinds) + "|",
    ]
    for m in record["models"]:
        errors = " | ".join(f"{100 * m['robust_error'][k]:.1f} %" for k in kinds)
        clean = f"{100 * m['clean_error']:.1f} %{guesses(m['clean_error'])}"
        lines.append(f"| {m['model']} | {m['eps']:.3g} | {m['n']:,} | {clean} | {errors} |")
    return "\n".join([*lines, "", GUESSES])


def write(record):
    write_json(HERE / "pgd.json", record)
    write_part("pgd", tables(record))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    given = parser.parse_args()
    record = {
        "steps": STEPS,
        "hardware": {k: v for k, v in compute.hardware().items() if k != "threads"},
        "versions": compute.versions() | {"foolbox": version("foolbox")},
    }  # fmt: skip
    last = read_json(HERE / "pgd.json") if (HERE / "pgd.json").exists() else {}
    alike = {k: last.get(k) for k in record} == record  # rows of another machine do not stand beside this one's
    rows = {row["model"]: row for row in last["models"]} if alike else {}
    for name in given.models:
        rows[name] = measure(name, given.threads, given.repeats)
        write(record | {"models": [rows[known] for known in SETTINGS if known in rows]})


if __name__ == "__main__":
    main()
