"""Notebooks 8 and 9: what their own functions say of data with a known answer."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from notebook_functions import function

from lib import audit, cells, inference

MORE = inference.at_most("of the digits left", bound=0.1)
LOWER = inference.difference("robust error", margin=0.02)
QUARTER = inference.exact("share", tolerance=0.25)


def first(count, n=400):
    return np.arange(n) < count


@pytest.mark.parametrize("counts, stalled, holds", [
    ({"a": 0, "b": 2}, {}, True),
    ({"a": 90, "b": 60}, {}, False),
    ({"a": 0, "b": 60}, {}, "partly"),
    ({"a": 0, "b": 18}, {}, None),  # near the bound
    ({"a": 0, "b": 2}, {"a": "hardly classifies"}, None),
    ({"a": 90, "b": 60}, {"b": "hardly classifies"}, None),
])  # fmt: skip
def test_shares_are_of_the_digits_that_were_left(counts, stalled, holds):
    judged = function("08", "judged", inference=inference, stalled=stalled)
    left = {name: ~first(200) for name in counts}  # what lies outside was broken before, and counts nowhere
    broken = {name: first(200) ^ first(200 + count) | first(100) for name, count in counts.items()}
    found = judged(MORE, broken, left)
    assert found.holds is holds or found.holds == holds
    assert all(f"{name}: " in found.measured and f"{count} of 200" in found.measured for name, count in counts.items())


def errors(rate, seeds=8, images=400):
    """Masks of seeds that differ a little, with this rate of errors."""
    return np.array([np.roll(first(round(rate * images) + seed % 3, images), 7 * seed) for seed in range(seeds)])


@pytest.mark.parametrize("gaps, outcomes, answer", [
    ([-0.2, -0.1], {"smaller"}, "No"),
    ([0.2, 0.1], {"larger"}, "No"),
    ([0.0, 0.0], {"no difference beyond 0.02"}, "No"),
    ([-0.2, 0.2], {"smaller", "larger"}, "Yes"),
    ([-0.2, 0.0], {"smaller", "no difference beyond 0.02"}, "Yes"),  # as masking would have it
    ([0.2, 0.0], {"larger", "no difference beyond 0.02"}, "Yes"),
])  # fmt: skip
def test_the_order_of_budgets_depends_on_the_attack(gaps, outcomes, answer):
    findings = {gap: LOWER(errors(0.4 + gap), errors(0.4)) for gap in gaps}
    assert {found.outcome for found in findings.values()} == outcomes
    assert function("08", "depends")(findings) == answer


@pytest.mark.parametrize("outcomes, answer", [
    (["smaller", "undecided"], "Cannot be told"),
    (["undecided", "undecided"], "Cannot be told"),
    (["smaller", "larger", "undecided"], "Yes"),
    (["smaller", "not smaller beyond 0.02", "undecided"], "Yes"),
    (["smaller", "smaller, by less than 0.02"], "No"),
    (["smaller", "larger, by less than 0.02"], "Yes"),
    (["smaller, by less than 0.02", "no difference beyond 0.02"], "Cannot be told"),
    (["no difference beyond 0.02", "not smaller beyond 0.02"], "Cannot be told"),
])  # fmt: skip
def test_what_is_open_about_the_order_stays_open(outcomes, answer):
    findings = {i: inference.Finding(outcome, None, "") for i, outcome in enumerate(outcomes)}
    assert function("08", "depends")(findings) == answer


def test_budgets_are_compared_on_common_seeds_and_images_and_in_the_worst_case():
    kinds = ("clean", "PGD", "APGD CE", "APGD DLR", "Square")
    row = pd.DataFrame([
        {"arm": arm, "seed": seed, "network": network, "part": "test" if kind in ("clean", "PGD") else "strong",
         "kind": kind, "attack": kind, "wrong": np.arange(6 if kind in ("clean", "PGD") else 4) == i}
        for arm, seeds in (("constant", (0, 1, 2)), ("cosine", (1, 2, 3)), ("linear", (1,))) for seed in seeds
        for network in ("end", "ensemble") for i, kind in enumerate(kinds)
        if network == "end" or kind in ("clean", "PGD")
    ])  # fmt: skip
    masks_of = function("08", "masks_of", cells=cells)
    of = {arm: masks_of(row, arm) for arm in ("constant", "cosine")}
    assert list(of["constant"]) == [0, 1, 2] and list(of["cosine"]) == [1, 2, 3]
    arms, seeds = function("08", "over_seeds", np=np)(of)
    assert seeds == [1, 2] and list(arms) == ["constant", "cosine"]
    for of in arms.values():
        assert list(of) == [*kinds, "worst"] and all(masks.shape == (2, 4) for masks in of.values())
        assert of["worst"].all() and of["PGD"].sum() == 2 and not of["Square"].any()  # Square's is the fifth image


def test_cells_are_found_by_recipe_and_eps_and_else_it_says_what_there_is():
    committed = pd.DataFrame([("a", 0.1 + 0.2, "x", 0, 0.1), ("a", 0.3, "y", 0, 0.1), ("a", 0.3, "y", 1, 0.1),
                              ("a", 0.3, "y", 1, 0.5), ("b", 3.0, "z", 0, 0.1)],
                             columns=["recipe", "eps", "row", "seed", "lr"])  # fmt: skip
    asked = SimpleNamespace(get=lambda _recipe: {"lr": 0.1})
    row_of = function("08", "row_of", committed=committed, np=np, recipes=asked)
    assert set(row_of("a", 0.3)["lr"]) == {0.1}  # the recipe's own
    assert set(row_of("a", 0.3)["row"]) == {"y"} and len(row_of("b", 3)) == 1  # the row with the most seeds
    with pytest.raises(ValueError, match=r"no cells of b at eps 0.3: there are a at 0.3; .*b at 3"):
        row_of("b", 0.3)


@pytest.mark.parametrize("one_step, pgd, overfit", [(0.3, 0.95, True), (0.6, 0.95, False), (0.3, 0.8, False)])
def test_overfitting_is_one_step_that_breaks_at_most_half_of_what_pgd_does(one_step, pgd, overfit):
    assert function("08", "overfits")(errors(one_step)[0], errors(pgd)[0]) is overfit


@pytest.mark.parametrize("weak, why", [(0, ""), (1, ""), (2, "2 of 4 networks of it hardly classify"), (4, "4 of 4")])
def test_a_recipe_of_which_more_than_a_quarter_hardly_classify_is_no_rival(weak, why):
    no_rival = function("08", "no_rival", inference=inference, hardly=function("08", "hardly"))
    said = no_rival("it", np.array([first(300 if i < weak else 20) for i in range(4)]))
    assert said.startswith(why) and bool(said) == bool(why)


def test_a_network_that_errs_on_more_than_half_hardly_classifies():
    hardly = function("08", "hardly")
    assert hardly(first(318)) == "hardly classifies: 79.5% wrong without an attack" and not hardly(first(200))


def test_the_worst_case_takes_in_all_that_lies_in_the_ball():
    a, b, c, d, e, out = np.eye(6, dtype=bool)
    everything = function(
        "08", "all_but_restarts", tried={"net": {"PGD": a, "Square": b}}, tuned={"net": {"steps": {1: a, 50: c}}},
        curves={"net": {0.1: d, 0.2: a, 0.4: out}}, eps_of={"net": 0.2},
        queried={"net": (b | e, np.array([2, 2, 2, 2, 1, 2]))},
    )  # fmt: skip
    assert audit.worst_case(everything("net")).tolist() == [True] * 5 + [False]


@pytest.mark.parametrize("most, tried", [(2, [1, 3]), (9, [1, 3, 4]), (0, [])])
def test_restarts_are_spent_on_the_first_digits_that_are_left(most, tried):
    def on_trial(_run, left):
        return SimpleNamespace(falls=lambda restarts, eps: (np.flatnonzero(left) * 10 + restarts).tolist())

    on_left = function("08", "on_left", np=np, on_trial=on_trial)
    where, falls = on_left(None, np.array([False, True, False, True, True]), most, restarts=3, eps=0.1)
    assert np.flatnonzero(where).tolist() == tried
    assert falls.tolist() == [10 * i + 3 if i in tried else 4 for i in range(5)]


@pytest.mark.parametrize("lines, curves, holds, with_barrier", [
    ([1.0, 2.0, 1.5, 1.0], [0.2, 0.5, 0.1, 0.0], True, 4),
    ([1.0, 2.0, 1.5, 1.0], [0.2, 0.6, 0.1, 0.0], False, 4),  # one of four
    ([1.0, 2.0, 1.5, 0.05], [0.2, 0.5, 0.1, 0.05], True, 3),  # a line without a barrier asks nothing
    ([1.0, 2.0, 0.0, 0.05], [0.2, 0.5, 0.0, 0.05], None, 2),
])  # fmt: skip
def test_a_curve_rises_by_at_most_a_quarter_of_the_line(lines, curves, holds, with_barrier):
    judged = function("09", "judged", least_barrier=0.1, inference=inference, rule=QUARTER)
    found, high = judged(np.array(lines), np.array(curves))
    assert found.holds is holds and high.sum() == with_barrier
