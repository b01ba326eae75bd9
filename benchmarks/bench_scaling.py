"""What a step of the attack costs: against the processor's own rate, by width, batch, steps and side of the images, and
in memory; what the top eigenpairs cost by images and eigenvalues; and what the paper's protocol would cost on larger
machines.

    python benchmarks/bench_scaling.py [--repeats 3] [--only images eigenvalues]

All of it on the machine at hand, one thread, CPU seconds; the rate of its matrix products is measured in turns with the
networks. Operations are counted by PyTorch (an addition and a multiplication are two). The result goes to scaling.json
and, as tables, into docs/scaling.md. With --only just these rows of the eigenpairs are measured (minutes) and put into
the record, with the machine's name; its other parts stay.
"""

import argparse
import heapq
import math
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchvision
import yaml
from bench_pgd import SETTINGS, textbook, trained
from networks import NETWORKS, forward_operations, network
from ratios import seconds
from readme import HERE, write_part
from torch.utils.flop_counter import FlopCounterMode

from lib import cells, compute, data, recipes
from lib.attacks import pgd
from lib.curvature import top_eigenpairs
from lib.files import read_json, write_json

ROOT = HERE.parent
EPS, STEPS, BATCH = 0.1, 4, 64
MATRIX = 1024
GROWTH = {  # by what: (values, the exponent that counting gives)
    "width": ([2, 4, 8, 16], 2), "batch": ([32, 64, 128, 256], 1), "steps": ([2, 4, 8, 16], 1),
    "side of the images": ([32, 48, 64, 96], 2),
}  # fmt: skip
EIGENPAIRS = {  # the same for the top eigenpairs
    # A product passes over each image once, and how many products are needed does not depend on the images' number.
    "images": ([100, 200, 400, 800], 1),
    # Lanczos makes at least 2 k + 20 products for k pairs, so that few pairs cost more than their share; and more than
    # that where the eigenvalues crowd, as they do deep in the spectrum, so that many do, too.
    "eigenvalues": ([5, 10, 20, 40], 1),
}
BASE = {"images": 200, "eigenvalues": 10}  # what the one that does not change is


def attack(net, x, y, steps=STEPS):
    return pgd(net, x, y, eps=EPS, step_size=EPS / 4, num_steps=steps)


def rates(repeats):
    """Operations per second of the attack on each network, beside those of a product of matrices, turn by turn."""
    a = torch.rand(MATRIX, MATRIX)
    rows = []
    for name, settings in NETWORKS.items():
        net, x, y = network(*settings)
        # A step: forward, and the gradient at the input, which costs as much again.
        count = 2 * STEPS * BATCH * forward_operations(net, x)
        attack(net, x[:4], y[:4], 1), a @ a
        turns = [(seconds(lambda: a @ a)[0], seconds(partial(attack, net, x, y))[0]) for _ in range(repeats)]
        shares = [(count / t) / (2 * MATRIX**3 / m) for m, t in turns]
        rows.append({
            "network": name, "operations": count / (2 * STEPS * BATCH), "per_second": count / min(t for _, t in turns),
            "matrix_per_second": 2 * MATRIX**3 / min(m for m, _ in turns),
            "share": statistics.median(shares), "share_min": min(shares), "share_max": max(shares),
        })  # fmt: skip
    return rows


def growth(repeats):
    """How the attack's time grows: the slope of log time over log size beside the counted one; least of the repeats."""
    rows = []
    for what, (values, expected) in GROWTH.items():
        times = []
        for value in values:
            width, batch, steps, side = (value if what == name else base for name, base in
                                         zip(GROWTH, (4, BATCH, STEPS, 32), strict=True))  # fmt: skip
            net, x, y = network("resnet18", width, 3, side)
            x, y = x.repeat(batch // 32, 1, 1, 1)[:batch], y.repeat(batch // 32)[:batch]
            attack(net, x[:4], y[:4], 1)
            times.append(min(seconds(partial(attack, net, x, y, steps))[0] for _ in range(repeats)))
        rows.append(fitted(what, values, times, expected))
    return rows


def fitted(what, values, times, expected):
    """A row: the slope of log time over log size, of all values and between the last two, beside the counted one."""
    logs = np.log(values), np.log(times)
    slope, last = float(np.polyfit(*logs, 1)[0]), float(np.diff(logs[1])[-1] / np.diff(logs[0])[-1])
    return {"by": what, "values": values, "seconds": times, "expected": expected, "slope": slope, "last_slope": last}


def spectra(model, x, y, asked, repeats, last=None):
    """The record of the rows of EIGENPAIRS after each that is asked for; of the last record those that are not asked
    for stay, if they were made alike."""
    how = {"hardware": compute.hardware(), "versions": compute.versions(), "repeats": repeats, "base": BASE}
    alike = last and all(last[k] == v for k, v in how.items())
    rows = {row["by"]: row for row in last["rows"]} if alike else {}
    top_eigenpairs(model, x[:8], y[:8], 1)
    for what in asked:
        values, expected = EIGENPAIRS[what]
        sizes = [BASE | {what: value} for value in values]
        calls = [partial(top_eigenpairs, model, x[: s["images"]], y[: s["images"]], s["eigenvalues"]) for s in sizes]
        times = [min(seconds(call)[0] for _ in range(repeats)) for call in calls]
        rows[what] = fitted(what, values, times, expected)
        yield how | {"rows": [rows[known] for known in EIGENPAIRS if known in rows]}


def added(name, kind):
    """MiB that an attack takes at its largest, beyond what the process holds (Linux), once both have been called."""
    net, x, y = network(*NETWORKS[name])
    for function in ATTACKS.values():
        function(net, x[:1], y[:1])
    Path("/proc/self/clear_refs").write_text("5")  # the largest so far is what there is now
    before = _status("VmRSS")
    ATTACKS[kind](net, x, y)
    return (_status("VmHWM") - before) / 1024


def _status(field):
    """In KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field)))


def peak(name, kind):
    """The same, in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--added", name, kind], capture_output=True, text=True, check=True)
    return float(done.stdout)


ATTACKS = {"pgd": attack, "textbook": partial(textbook, eps=EPS, step_size=EPS / 4)}


def memory():
    return [{"network": name, **{kind: peak(name, kind) for kind in ATTACKS}} for name in NETWORKS]


# What is to be trained: (network, recipe whose cells are counted, images, epochs, steps of the attack). The first three
# are the paper's (profile "paper"); ImageNet with ResNet-50 stands for the usual 90 epochs.
PROTOCOL = {
    "LeNet w=16, MNIST, PGD-50, 100 epochs": ("lenet w=16", "lenet on mnist", 60000, 100, 50),
    "VGG16 w=8, CIFAR-10, PGD-10, 200 epochs": ("vgg16 w=8", "vgg16 on cifar10", 50000, 200, 10),
    "ResNet18 w=8, CIFAR-10, PGD-10, 200 epochs": ("resnet18 w=8", "resnet18 on cifar10", 50000, 200, 10),
    "ResNet-50, ImageNet at 224 x 224, PGD-10, 90 epochs": ("resnet50", None, 1281167, 90, 10),
}
PAPERS = "the paper's own"


def runs_of_paper(recipe):
    """{whose: number of networks} of a recipe that notebook 07 trains in the profile "paper": what is at the recipe's
    learning rate and no misread schedule is the paper's own, the rest is named as ours."""
    profile = yaml.safe_load((ROOT / "notebooks/profiles/paper.yaml").read_text(encoding="utf-8"))["07_table1"]
    rate, count, ours = recipes.get(recipe, profile["changes"])["lr"], {PAPERS: 0, None: 0}, []
    for item in (item for item in profile["todo"] if item["recipe"] == recipe):
        for arm in item["arms"]:
            others = [f"rate {item['lr']:g}"] * (item["lr"] != rate) + [cells.spelt(arm)] * arm.endswith("_misread")
            count[None if others else PAPERS] += item["seeds"]
            ours += others
    return {whose or f"ours besides: {', '.join(dict.fromkeys(ours))}": n for whose, n in count.items() if n}


def cost(rows):
    """Operations and core hours of each line: a step of the attack is two passes, the step of the weights three."""
    of = {row["network"]: row for row in rows}
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        torchvision.models.resnet50().eval()(torch.zeros(1, 3, 224, 224))
    of["resnet50"] = {"operations": counter.get_total_flops(), "per_second": of["resnet18 w=8"]["per_second"]}
    found = []
    for what, (name, recipe, images, epochs, steps) in PROTOCOL.items():
        for whose, runs in (runs_of_paper(recipe) if recipe else {"": 1}).items():
            count = of[name]["operations"] * images * epochs * (2 * steps + 3) * runs
            found.append({"what": what, "whose": whose, "runs": runs, "operations": count,
                          "core_hours": count / of[name]["per_second"] / 3600})  # fmt: skip
    return found


def gpu():
    """The GPU that bench_gpu.py measured, and the operations per second of networks there, captured and in bfloat16."""
    record = read_json(HERE / "gpu.json")
    rate = {r["network"]: r["per_second"] for r in record["rows"] if r["captured"] and r["precision"] == "bfloat16"}
    return record["hardware"]["device"], rate | {"resnet50": rate["resnet18 w=8"]}


def tables(record):
    machine, (card, rate) = record["hardware"], gpu()
    lines = [
        f"{machine['device']}, {machine['vector_unit']}, {machine['precision']}, one thread, PyTorch "
        f"{record['versions']['torch']}; batch {BATCH}; CPU seconds, {record['repeats']} turns.", "",
        "| network | million operations forward, an image | 10^9 operations a second | share of the matrix product's "
        "rate: median (min to max) |", "|---|---|---|---|",
    ]  # fmt: skip
    lines += [
        f"| {r['network']} | {r['operations'] / 1e6:.1f} | {r['per_second'] / 1e9:.0f} of "
        f"{r['matrix_per_second'] / 1e9:.0f} | {r['share']:.0%} ({r['share_min']:.0%} to {r['share_max']:.0%}) |"
        for r in record["rates"]
    ]
    lines += ["", "| ResNet18, time against | values | exponent counted | measured | between the last two |",
              "|---|---|---|---|---|"]  # fmt: skip
    lines += map(growth_line, record["growth"])
    lines += eigenpair_lines(**record["eigenpairs"]) if "eigenpairs" in record else []
    lines += ["", "| memory that the attack adds, MiB | `pgd` | textbook |", "|---|---|---|"]
    lines += [f"| {r['network']} | {r['pgd']:.0f} | {r['textbook']:.0f} |" for r in record["memory"]]
    lines += ["", f"| what | whose | runs | operations | 2 cores | 64 cores | 1 {card} | 8 of them |",
              "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    return "\n".join(lines + [cost_line(what, whose, rows, rate) for what, whose, rows in groups(record["cost"])])


def growth_line(r):
    values = ", ".join(map(str, r["values"]))
    return f"| {r['by']} | {values} | {r['expected']} | {r['slope']:.2f} | {r['last_slope']:.2f} |"


def eigenpair_lines(rows, hardware, versions, repeats, base):
    """Their table, with the machine, which may be another than that of the other tables."""
    return [
        "", f"Top eigenpairs of a trained LeNet w=4; {base['images']} images and {base['eigenvalues']} eigenvalues, "
        f"but for what changes. {hardware['device']}, {hardware['vector_unit']}, float32, one thread, PyTorch "
        f"{versions['torch']}; CPU seconds, {repeats} turns.", "",
        "| time against | values | exponent counted | measured | between the last two |", "|---|---|---|---|---|",
        *map(growth_line, rows), "",
        "Counted are products of the Hessian with a vector, two for each pair. Deep in the spectrum eigenvalues lie "
        "close together, and Lanczos needs more products to tell them apart: so the last slope is steeper.",
    ]  # fmt: skip


def groups(rows):
    """(what, whose, rows of the cost) of each line: those of Table 1, their two totals, and what is not the paper's."""
    table1, others = ([r for r in rows if (PROTOCOL[r["what"]][1] is not None) == known] for known in (True, False))
    yield from ((r["what"], r["whose"], [r]) for r in table1)
    yield "**Table 1**", PAPERS, [r for r in table1 if r["whose"] == PAPERS]
    yield '**Table 1, profile "paper"**', "the paper's and ours", table1
    yield from ((r["what"], r["whose"], [r]) for r in others)


def cost_line(what, whose, rows, rate):
    """A line of the table: a run takes one core, or one card, and the only run of a line is spread over the cards."""
    cores = [r["core_hours"] / r["runs"] for r in rows for _ in range(r["runs"])]
    cards = [r["operations"] / rate[PROTOCOL[r["what"]][0]] / 3600 / r["runs"] for r in rows for _ in range(r["runs"])]
    times = [together(cores, 2), together(cores, 64), sum(cards)]
    times.append(together(cards, 8) if len(cards) > 1 else cards[0] / 8)
    count = sum(r["operations"] for r in rows)
    return f"| {what} | {whose} | {len(cores)} | {count:.1e} | {' | '.join(map(words, times))} |"


def together(hours, machines):
    """Hours that runs take on so many machines, each on one, the longest first: equal ones come in rounds."""
    busy = [0.0] * machines
    for run in sorted(hours, reverse=True):
        heapq.heapreplace(busy, busy[0] + run)
    return max(busy)


def words(hours):
    """A time as people say it."""
    for unit, size in (("years", 8766), ("days", 24), ("h", 1), ("min", 1 / 60)):
        if hours >= 2 * size or unit == "min":
            return f"{float(f'{hours / size:.2g}'):g} {unit}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tables", action="store_true", help="measure nothing: count and write the tables again")
    parser.add_argument("--only", nargs="+", choices=EIGENPAIRS, help="measure these rows, and keep the others")
    parser.add_argument("--added", nargs=2, help=argparse.SUPPRESS)  # for `peak`
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.added:
        print(added(*given.added))
        return
    if given.tables or given.only:
        record = read_json(HERE / "scaling.json")
    else:
        measured = rates(given.repeats)
        assert all(math.isfinite(row["share"]) for row in measured)
        record = {
            "hardware": compute.hardware(), "versions": compute.versions(), "repeats": given.repeats,
            "rates": measured, "growth": growth(given.repeats), "memory": memory(),
        }  # fmt: skip
    record["cost"] = cost(record["rates"])  # counted from rates and from the profile, which may have changed since
    write(record)
    if not given.tables:
        digits, last = data.load("mnist5k"), record.get("eigenpairs")
        model = trained(SETTINGS["lenet w=4"], digits).eval()
        for found in spectra(model, digits.x_train, digits.y_train, given.only or EIGENPAIRS, given.repeats, last):
            record["eigenpairs"] = found
            write(record)
    print(tables(record))


def write(record):
    write_json(HERE / "scaling.json", record)
    write_part("scaling", tables(record), ROOT / "docs/scaling.md")


if __name__ == "__main__":
    main()
