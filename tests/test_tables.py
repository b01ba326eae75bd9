"""Tables against hand-computed values, textbook numbers, and the notebooks that share their networks."""

import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import nn

from lib.attacks import pgd
from lib.evaluation import error, robust_error
from lib.tables import assemble, attack_errors, conclude, conclude_all, notation, paired

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import profiles  # noqa: E402
from layout import Layout  # noqa: E402


@pytest.mark.parametrize("values, text", [
    ([0.0119, 0.0123, 0.0127], "1.23(4)"),  # 1.23 +- 0.04
    ([0.5, 0.5, 0.5], "50.00(0)"),
    ([0.1], "10.00"),
    ([], ""),
    ([0.0, 0.01], "0.50(71)"),  # a spread larger than the value: 0.5 +- 0.7071
    ([0.0, 1.0], "50.00(7071)"),
    ([0.11, 0.1230, 0.136], "12.30(130)"),
    ([0.01225], "1.23"),  # a half, away from zero
    ([0.01235], "1.24"),
    ([0.1, 0.2, 0.7], "33.33(3215)"),
    ([0.29, 0.29, 0.29], "29.00(0)"),  # 100 * 0.29 is below 29 in binary
    ([1.0, 1.0], "100.00(0)"),
])  # fmt: skip
def test_notation(values, text):
    assert notation(values) == text == notation(pd.Series(values, dtype=float))


def test_paired_is_the_textbooks_interval():
    # Differences -1, 0, -2: mean -1, standard error 1 / sqrt 3, quantile of t with 2 degrees 4.302653.
    found = paired([1, 2, 3], [2, 2, 5])
    half = 4.302653 / math.sqrt(3)
    assert found == pytest.approx({"mean": -1, "low": -1 - half, "high": -1 + half, "n": 3}, rel=1e-6)


def test_paired_is_scipys_and_sees_the_pairs():
    generator = np.random.default_rng(0)
    base = generator.normal(size=5)
    a, b = base - 0.1 + generator.normal(scale=0.01, size=5), base
    found, theirs = paired(a, b), stats.ttest_rel(a, b).confidence_interval()
    assert (found["low"], found["high"]) == pytest.approx((theirs.low, theirs.high))
    assert conclude(found) is True and conclude(paired(b, a)) is False
    assert conclude(paired(a, b[::-1])) is None  # the same values, other pairs


def test_one_pair_and_equal_pairs():
    assert paired([1], [2]) == {"mean": -1, "low": -math.inf, "high": math.inf, "n": 1}
    assert conclude(paired([1], [2])) is None
    assert paired([1, 2], [1, 2]) == {"mean": 0, "low": -math.inf, "high": math.inf, "n": 2}
    # 0.02 - 0.01 and 0.03 - 0.02 differ in the last bit: two seeds, one image each, and nothing is known.
    assert 0.02 - 0.01 != 0.03 - 0.02 and conclude(paired([0.02, 0.03], [0.01, 0.02])) is None


def test_conclude_all():
    yes, no, open_ = ({"low": low, "high": high} for low, high in ((-2, -1), (1, 2), (-1, 1)))
    for intervals, expected in (([yes, yes], True), ([no, no], False), ([open_, open_], None), ([yes, open_], "partly"),
                                ([yes, no], "partly"), ([no, open_], False)):  # fmt: skip
        assert conclude_all(intervals) == expected


@pytest.mark.parametrize("a, b", [([1, 2], [1]), ([], []), ([1, math.nan], [1, 2])])
def test_pairs_that_are_none(a, b):
    with pytest.raises(ValueError, match="pairs need"):
        paired(a, b)


KEYS, EXPECTED = ["network", "seed"], [("lenet", 0), ("lenet", 1), ("vgg16", 0)]


def test_a_partial_table_says_what_is_missing():
    cells = {("vgg16", 0): {"clean": 0.3}, ("lenet", 0): {"clean": 0.1}}
    table, missing = assemble(cells, KEYS, EXPECTED)
    assert table.to_dict("records") == [{"network": "lenet", "seed": 0, "clean": 0.1},
                                        {"network": "vgg16", "seed": 0, "clean": 0.3}]  # fmt: skip
    assert missing == "1 of 3 cells are missing: lenet/1"
    table, missing = assemble(cells | {("lenet", 1): {"clean": 0.2}}, KEYS, EXPECTED)
    assert list(table.clean) == [0.1, 0.2, 0.3] and missing == "complete: 3 cells"
    table, missing = assemble({}, KEYS, EXPECTED)
    assert table.empty and list(table) == KEYS
    assert missing == "3 of 3 cells are missing: lenet/0, lenet/1, vgg16/0"
    with pytest.raises(ValueError, match=r"no place for \('resnet18', 0\)"):
        assemble({("resnet18", 0): {}}, KEYS, EXPECTED)


class Bright(nn.Module):
    """Class 1 where the mean pixel is above a half, else 0."""

    def forward(self, x):
        z = x.flatten(1).mean(1) - 0.5
        return torch.stack([-z, z], 1)


def test_attack_errors_by_hand():
    x = torch.tensor([0.2, 0.45, 0.55, 0.8]).view(4, 1, 1, 1).expand(4, 1, 2, 2).contiguous()
    y = torch.tensor([0, 0, 1, 0])  # the last one is wrong as it is
    seen = []

    def up(model, x, y):
        seen.append(len(x))
        return x + 0.1  # turns the second

    attacks = {"up": up, "down": lambda model, x, y: x - 0.1, "none": lambda model, x, y: x}
    found = attack_errors(Bright(), x, y, attacks)
    assert found == {"clean": 0.25, "up": 0.5, "down": 0.5, "none": 0.25, "worst": 0.75}
    assert seen == [3]  # no attack on what is wrong already
    assert attack_errors(Bright(), x, 1 - (x.mean((1, 2, 3)) > 0.5).long(), {"up": up}) == dict.fromkeys(
        ("clean", "up", "worst"), 1.0
    )
    assert seen == [3]


def test_attack_errors_are_those_of_evaluation():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    x, y = torch.rand(40, 1, 4, 4), torch.randint(3, (40,))
    attack = partial(pgd, eps=0.1, step_size=0.05, num_steps=5, random_start=False)
    found = attack_errors(net, x, y, {"pgd": attack}, batch_size=7)
    assert found["clean"] == error(net, x, y)
    # A wrong image may be attacked back to its class: the definition counts it, for x itself is in the ball.
    assert found["worst"] == found["pgd"] >= robust_error(net, x, y, attack)


SHARED = ("dataset", "width", "epochs", "restarts", "batch_size", "optimizer", "lr", "num_steps", "step_fraction",
          "eval_every", "eval_images", "seeds")  # fmt: skip


@pytest.mark.parametrize("profile", ["quick", "gpu", "paper"])
def test_notebooks_6_and_7_share_their_lenets(profile):
    changes = profiles.read_profile(Layout(), profile)
    six, seven = (profiles.parameters(ROOT / "notebooks" / f"{name}.py") | changes.get(name, {})
                  for name in ("06_periodic_scheduling", "07_table1"))  # fmt: skip
    (network,) = [c for c in seven["networks"] if c["model"] == six["model"]]
    task = seven["tasks"][network["task"]]
    both = task | network
    assert {key: both[key] for key in SHARED} == {key: six[key] for key in SHARED}
    assert float(network["eps"]) == six["eps"] and task["stops"] == six["schedule_stops"]
    assert task["images"] == [six["train_images"], None]
