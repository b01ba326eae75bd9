"""Notebooks 6 and 7: what their own functions say of made-up cells with a known answer."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from notebook_functions import NOTEBOOKS, function

from lib import cells, inference

BOTH = ("constant", "cosine")
BEST = inference.difference("robust error", margin=0.01)


def rows(errors, images=100):
    """A row of cells: {(arm, lr): an error for each seed}, in the images for testing and in those set aside alike."""
    return pd.DataFrame([
        {"row": "a", "recipe": "lenet on mnist", "eps": 0.4, "arm": arm, "lr": lr, "seed": seed, "network": "end",
         "part": part, "kind": kind, "epochs": [4], "n": images, "wrong": np.arange(images) < round(error * images)}
        for (arm, lr), seeds in errors.items() for seed, error in enumerate(seeds)
        for part in ("test", "aside") for kind in ("clean", "PGD")
    ])  # fmt: skip


def at_best(errors):
    part = function("06", "at_best", cells=cells, both=BOTH, margin=0.01, better=0.89, best_rule=BEST, replace=replace)
    return part(rows(errors))


def test_arms_are_compared_at_the_best_rate_of_each():
    grid = {("constant", lr): [e, e + 0.01, e + 0.02] * 3 for lr, e in ((0.1, 0.6), (0.3, 0.5), (1.0, 0.7))}
    rising = {("cosine", lr): [e, e + 0.01, e + 0.02] * 3 for lr, e in ((0.1, 0.6), (0.3, 0.5), (1.0, 0.4), (3.0, 0.6))}
    measured, found, idle, counted, at = at_best(grid | rising)
    assert at == {"constant": 0.3, "cosine": 1.0} and not idle and counted == (9, "9 seeds, 100 images")
    assert found.holds is True and measured.startswith("best rates: constant 0.3, cosine 1; -0.1 ")
    _, found, _, _, at = at_best(grid | {("cosine", lr): of for (_, lr), of in grid.items()})
    assert found.holds is not True and at == dict.fromkeys(BOTH, 0.3)
    _, found, _, _, at = at_best(grid | {key: of for key, of in rising.items() if key[1] < 3})  # 1 is the last rate now
    assert at["cosine"] == 1 and found.holds is None and "it needs cosine at 3, 3 seeds" in found.why


def test_an_arm_that_guesses_has_no_best_rate():
    guesses = {("constant", lr): [0.9] * 9 for lr in (0.1, 0.3, 1.0)}
    rising = {("cosine", lr): [e, e + 0.01, e + 0.02] * 3 for lr, e in ((0.1, 0.6), (0.3, 0.5), (1.0, 0.7))}
    measured, _, idle, _, at = at_best(guesses | rising)
    assert (
        idle == ["constant"] and at == dict.fromkeys(BOTH, 0.3) and "constant none, it guesses, cosine 0.3" in measured
    )


def test_a_grid_is_of_the_rates_and_seeds_that_both_arms_have():
    over_grid = function("06", "over_grid", cells=cells, both=BOTH, np=np)
    part = rows({("constant", 0.1): [0.5, 0.6], ("constant", 0.3): [0.4, 0.2, 0.1], ("cosine", 0.3): [0.3, 0.7, 0.8],
                 ("cosine", 0.1): [0.2, 0.9, 0.9], ("cosine", 1.0): [0.1]})  # fmt: skip
    rates, common, errors = over_grid(part)
    assert rates == [0.1, 0.3] and common == [0, 1]
    np.testing.assert_allclose(errors["constant"], [[0.5, 0.4], [0.6, 0.2]])
    np.testing.assert_allclose(errors["cosine"], [[0.2, 0.3], [0.9, 0.7]])
    assert over_grid(rows({("constant", 0.1): [0.5], ("cosine", 0.3): [0.5]}))[:2] == ([], [])


def test_a_rate_is_in_range_near_the_best_one_under_the_same_seed_and_better_than_guessing():
    in_range = function("06", "in_range", np=np, better=0.89)
    errors = np.array([[0.50, 0.54, 0.56], [0.60, 0.54, 0.56], [0.86, 0.88, 0.90], [0.9, 0.9, 0.9]])
    assert in_range(errors, 0.05).tolist() == [2, 2, 2, 0]  # the best one under any seed, 0.5, would leave 2, 1, 0, 0
    assert in_range(errors, 0.01).tolist() == [1, 1, 1, 0] and in_range(errors, 0.1).tolist() == [3, 3, 2, 0]


def test_a_grid_is_too_narrow_where_all_of_it_is_in_range_or_it_has_two_rates():
    too_narrow = function("06", "too_narrow", np=np, inference=inference)
    assert too_narrow([0.1, 0.3, 1.0], np.array([3.0, 3.0]), np.array([3.0, 2.0])) == ""
    assert "it needs 0.03 and 3, and 8 seeds" in too_narrow([0.1, 0.3, 1.0], np.array([3.0]), np.array([3.0]))
    assert "too narrow" in too_narrow([0.1, 0.3], np.array([1.0]), np.array([2.0]))


def cell(wrong, part="test", strong="strong"):
    """The lines of a network's cell: {kind: which images it gets wrong}; the stronger attacks see the first four."""
    see = {kind: (6, part) if kind in ("clean", "PGD") else (4, strong) for kind in wrong}
    lines = [(where, kind, np.isin(np.arange(n), wrong[kind])) for kind, (n, where) in see.items()]
    lines.append((strong, "clean", np.ones(4, bool)))  # which is passed over
    return pd.DataFrame(lines, columns=["part", "kind", "wrong"]).assign(attack=lambda of: of["kind"])


@pytest.mark.parametrize("part", [("test", "strong"), ("more", "more strong")])
def test_the_worst_case_is_over_all_attacks_on_the_images_that_all_have_seen(part):
    by, first = cells.by_attack(cell({"clean": [0], "PGD": [0, 5], "Square": [0, 2], "APGD CE": [0, 1]}, *part), *part)
    assert np.flatnonzero(by["PGD"]).tolist() == [0, 5] and {len(mask) for mask in first.values()} == {4}
    assert np.flatnonzero(first["worst"]).tolist() == [0, 1, 2] and np.flatnonzero(first["PGD"]).tolist() == [0]
    _, first = cells.by_attack(cell({"clean": [0], "PGD": [0], "Square": [0]}, *part), *part)
    assert np.flatnonzero(first["worst"]).tolist() == [0]  # nothing beyond
    two = pd.concat([cell({"PGD": [0]}, *part), cell({"PGD": [1]}, *part)])
    with pytest.raises(ValueError, match="two masks of one attack: the lines are of more than one network"):
        cells.by_attack(two, *part)


def test_masks_of_more_images_are_taken_where_as_many_seeds_of_both_arms_have_them():
    def asked(**more):
        worst = {(part, "a", arm, 0.1, seed): part for arm in BOTH for seed in range(2) for part in ("test", "more")
                 if part == "test" or seed < more[arm]}  # fmt: skip
        worst["more", "b", "cosine", 0.1, 5] = worst["more", "a", "cosine", 0.3, 6] = "another"
        return function("07", "masks_at", worst=worst, cells=cells)("a", 0.1)

    for constant, part in ((2, "more"), (1, "test")):
        assert asked(cosine=2, constant=constant) == {arm: {0: part, 1: part} for arm in BOTH}


def test_in_the_committed_table_no_attack_goes_beyond_the_worst_case():
    table = pd.read_csv(NOTEBOOKS.parent / "figures" / "quick" / "07_table1.csv")
    attacks = ["clean of m", "PGD of m", "APGD CE", "APGD DLR", "Square"]
    assert len(table) > 700 and (table["m"] <= table["n"]).all()
    assert (table[attacks].max(axis=1) <= table["worst"] + 1e-12).all()
    assert (table["worst"] <= table[attacks].sum(axis=1) + 1e-12).all() and (table["worst"] > table["PGD of m"]).any()
