"""SimBA and Square, black-box attacks, against those of ART: how much faster, and what errors both find.

    python benchmarks/bench_queries.py [--repeats 3]

In turns on one trained LeNet, one thread, CPU seconds. Both SimBAs take single pixels in random order and spend the
same queries, too few to come to a pixel twice: so both stay in the ball of eps, though ART's knows no ball. Both
Squares have one start. The result goes to queries.json and, as a table, into README.md.
"""

import argparse
from functools import partial

import torch
from bench_pgd import SETTINGS, trained
from peers import PEERS, art_classifier, peer
from ratios import in_turns, spread
from readme import HERE, write_part

from lib import compute, data
from lib.attacks import autoattack, simba
from lib.evaluation import error
from lib.files import write_json

EPS, QUERIES = {"SimBA": 0.3, "Square": 0.15}, {"SimBA": 500, "Square": 200}


def attacks(model, x, y):
    """{attack: {whose: function of no argument that gives x_adv}}"""
    evasion = peer("art", "art.attacks.evasion")
    probabilities = torch.nn.Sequential(model, torch.nn.Softmax(1)).eval()
    images, labels = x.numpy(), torch.nn.functional.one_hot(y).numpy()
    one_pixel = evasion.SimBA(
        art_classifier(probabilities, x, y),
        attack="px",
        max_iter=QUERIES["SimBA"] // 2,
        epsilon=EPS["SimBA"],
        verbose=False,
    )
    square = evasion.SquareAttack(
        art_classifier(model, x, y), eps=EPS["Square"], max_iter=QUERIES["Square"], batch_size=len(x), verbose=False
    )
    return {
        "SimBA": {
            "ART": lambda: torch.from_numpy(one_pixel.generate(images, labels)),
            "ours": partial(simba, model, x, y, eps=EPS["SimBA"], num_queries=QUERIES["SimBA"]),
        },
        "Square": {
            "ART": lambda: torch.from_numpy(square.generate(images, labels)),
            "ours": partial(
                autoattack, model, x, y, eps=EPS["Square"], attacks=["square"], num_queries=QUERIES["Square"]
            ),
        },
    }


def measure(repeats, images):
    digits = data.load("mnist5k")
    model = trained(SETTINGS["lenet w=4"], digits).eval()
    x, y = digits.x_test[:images], digits.y_test[:images]
    rows = []
    for name, pair in attacks(model, x, y).items():
        found, turns = in_turns(pair, repeats)
        errors = {whose: error(model, x_adv, y) for whose, x_adv in found.items()}
        rows.append(
            {
                "what": name,
                "eps": EPS[name],
                "queries": QUERIES[name],
                "against": "ART",
                **spread(turns, "ART"),
                "error": errors,
            }
        )
    return {"images": images, "clean_error": error(model, x, y), "rows": rows}


def tables(record):
    machine = record["hardware"]
    lines = [
        f"{machine['device']}, {machine['vector_unit']}, one thread, PyTorch {record['versions']['torch']}, "
        f"{PEERS['art']}; {record['images']} digits, clean error {record['clean_error']:.1%}.", "",
        "| attack | eps | queries | ART / ours: median (min to max) | error found by ART | by ours |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    lines += [
        "| {what} | {eps} | {queries} | {ratio_median:.1f} ({ratio_min:.1f} to {ratio_max:.1f}) ".format(**r)
        + "| {ART:.1%} | {ours:.1%} |".format(**r["error"])
        for r in record["rows"]
    ]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--images", type=int, default=100)
    given = parser.parse_args()
    compute.fix_threads()
    torch.manual_seed(0)
    record = {"hardware": compute.hardware(), "versions": compute.versions(), "repeats": given.repeats}
    record |= measure(given.repeats, given.images)
    write_json(HERE / "queries.json", record)
    write_part("queries", tables(record))
    print(tables(record))


if __name__ == "__main__":
    main()
