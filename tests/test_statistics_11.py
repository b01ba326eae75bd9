"""What notebook 11 reads off its networks, and the worst case of notebook 12, on small data with known answers."""

from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
from notebook_functions import function

from lib import cells, inference

SEEDS = [3, 5, 7]
GRID = [8 / 255, 0.4]
TABLE = Path(__file__).resolve().parents[1] / "figures/quick/12_networks.csv"


def table(**errors):
    """A line per network on the set "A" or "B": a keyword "A_constant" holds, by eps, the clean errors of the seeds. Of
    ten images the last ones are misclassified."""
    lines = []
    for (name, arm), of_eps in ((key.split("_"), errors[key]) for key in errors):
        for eps, row in zip(GRID, of_eps, strict=True):
            for seed, clean in zip(SEEDS, row, strict=True):
                lines.append({"network": "LeNet", "dataset": name, "arm": arm, "eps": eps, "seed": seed, "clean": clean,
                              "wrong": np.arange(10) >= 10 - round(10 * clean)})  # fmt: skip
    return pd.DataFrame(lines).sample(frac=1, random_state=0)  # in no order


def of(lines, **more):
    """Functions of the notebook, by name, each with those that it calls."""
    common = {"lines": lines, "stalled": 0.8, "cells": cells, "np": np, "inference": inference, "sets": ["A", "B"],
              "seeds_of": {("LeNet", name): SEEDS for name in "AB"}, "arms": ("constant", "cosine")} | more  # fmt: skip
    for name in ("those", "stalls_at", "guessing", "all_budgets", "judged", "at_each"):
        common[name] = function("11", name, **common)
    return common


@cache
def two_sets():
    return of(table(A_constant=[[0.1, 0.1, 0.8], [0.9, 0.9, 0.9]], A_cosine=[[0.1, 0.1, 0.1], [0.7, 0.2, 0.2]],
                    B_constant=[[0.1, 0.1, 0.1], [0.1, 0.2, 0.7]], B_cosine=[[0.1, 0.1, 0.1], [0.9, 0.1, 0.1]]),
              at_one=inference.difference("x", margin=0.05, over="seeds"))  # fmt: skip


def test_networks_that_guess_are_counted_at_each_eps():
    guessing, stalls_at = two_sets()["guessing"], two_sets()["stalls_at"]
    assert guessing("LeNet", "A", "constant") == "1 of 3 at 8/255, 3 of 3 at 0.4"  # 0.8 itself is guessing
    assert guessing("LeNet", "A", "cosine") == guessing("LeNet", "B", "constant") == "none"
    assert guessing("LeNet", "B", "cosine") == "1 of 3 at 0.4"
    assert stalls_at("LeNet", "A", "constant").sum(axis=1).to_dict() == {3: 1, 5: 1, 7: 2}


def test_of_each_image_the_share_of_the_budgets_at_which_it_is_wrong():
    shares = two_sets()["all_budgets"]("LeNet", "A", "constant")
    assert shares.shape == (3, 10)
    assert shares[0].tolist() == [0] + 8 * [0.5] + [1] and shares[2].tolist() == [0, 0.5] + 8 * [1]
    assert np.allclose(shares.mean(1), [0.5, 0.5, 0.85])  # the mean of the clean errors


def test_sets_are_chosen_by_the_constant_arm():
    assert two_sets()["judged"]("LeNet") == (["A"], "")  # on B but one of the cosine arm guesses
    nowhere = of(table(A_constant=[[0.1] * 3] * 2, B_constant=[[0.7] * 3] * 2, A_cosine=[[0.9] * 3] * 2))
    assert nowhere["judged"]("LeNet") == (["A", "B"], "a constant budget stalls nowhere on the grid")


def test_one_eps_is_asked_where_three_in_four_of_the_constant_arm_guess():
    (eps, found), *others = two_sets()["at_each"]("LeNet", "A").items()
    assert eps == 0.4 and not others  # at 8/255 one of three does
    assert found == inference.difference("x", margin=0.05, over="seeds")([0.7, 0.2, 0.2], [0.9, 0.9, 0.9])
    assert two_sets()["at_each"]("LeNet", "B") == {}


def test_the_grid_may_gain_what_an_eps_at_which_both_arms_stall_does_not():
    both = of(table(A_constant=[[0.6, 0.7, 0.5], [0.9] * 3], A_cosine=[[0.1, 0.2, 0.1], [0.9] * 3]),
              at_one=inference.difference("x", margin=0.05, over="seeds"))  # fmt: skip
    found = both["at_each"]("LeNet", "A")[0.4]
    assert found.holds is None and found.measured == "+0"
    grid = [both["all_budgets"]("LeNet", "A", arm).mean() for arm in ("cosine", "constant")]
    assert np.allclose(grid, [(0.4 / 3 + 0.9) / 2, 0.75])


def test_the_worst_case_of_the_committed_networks_is_no_better_than_any_attack():
    errors = pd.read_csv(TABLE).drop(columns=["family", "arm", "number"])
    attacks = errors.drop(columns="worst")
    assert len(attacks.columns) >= 4 and (errors["worst"] >= attacks.max(axis=1)).all()
    assert (errors["worst"] <= attacks.sum(axis=1)).all()


def test_readings_without_one_seed_tell_a_verdict_that_hangs_on_one():
    def rule(a, b, *, unless):
        return inference.Finding("", bool(a.mean() < b.mean()), unless)

    without_one = function("11", "without_one", cells=cells, pd=pd, rule=rule)
    cosine, constant = np.zeros((3, 2)), np.array([[-1.0, -1], [-1, -1], [3, 3]])
    assert without_one(cosine, constant, "") == "2 of 3 (1 turn it round)"
    assert without_one(cosine, constant + 2, "") == "3 of 3"
