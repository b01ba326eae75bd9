"""The rules against simulated data of known effect: they err at the stated rate, and find what they say they can."""

import itertools
import math
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lib.inference import (
    LEVEL,
    Finding,
    _errors,
    _flipped,
    _judge,
    _p,
    at_most,
    by_seed,
    difference,
    ended,
    exact,
    interval,
    least_seen,
    together,
    trend,
)

DRAWS = 2000
# of DRAWS with the stated rate of false verdicts, more are seen once in ten thousand
MOST = stats.binom.isf(1e-4, DRAWS, LEVEL)


def masks(rng, seeds, images, effect, between=0.02, hard=0.2):
    """Errors of two arms on the same images: images of unequal difficulty, networks of unequal quality."""
    difficulty = rng.beta(hard, hard, images)
    quality = rng.normal(0, between, (2, seeds, 1)) + np.array([effect, 0.0])[:, None, None]
    return rng.random((2, seeds, images)) < np.clip(difficulty + quality, 0, 1)


class TestTrend:
    def test_an_infinite_value_counts_in_its_own_direction(self):
        rule, rows = trend("x", expect="rises", margin=10), [[0.0, 0.05, 0.1, 0.15]] * 7
        assert rule([*rows, [0.0, 1.0, 2.0, math.inf]]).holds is True
        assert rule([*rows, [math.inf, 0.0, 1.0, 2.0]]).holds is None
        assert rule([*rows, [math.inf, 1.0, 2.0, math.inf]]).holds is not True
        assert "one seed cannot" in trend("x", expect="rises")([[1.0, 2.0, 3.0]]).why

    @pytest.mark.parametrize("shape", [(3, 5), (3, 3), (8, 2), (5, 4)])
    def test_errs_at_most_at_its_level(self, shape):
        rng, rule = np.random.default_rng(0), trend("noise", expect="rises")
        found = [rule(rng.normal(size=shape)).holds for _ in range(DRAWS)]
        assert found.count(True) <= MOST
        assert found.count(False) <= MOST

    def test_finds_a_trend_of_two_standard_deviations(self):
        rng, rule = np.random.default_rng(1), trend("steps", expect="falls")
        found = [rule(rng.normal(size=(3, 5)) - 2 * np.arange(5)).holds for _ in range(200)]
        assert found.count(True) > 180
        assert False not in found

    def test_the_other_direction_is_not_reproduced(self):
        assert trend("x", expect="falls")(np.arange(15.0).reshape(3, 5)).holds is False

    def test_infinite_values_rank_last(self):
        assert trend("x", expect="rises")([[1, 2, 5, math.inf]] * 3).holds is True

    def test_a_change_below_its_margin_is_none(self):
        values = np.tile([0.0, 0.001, 0.002], (4, 1)) + 1e-5 * np.arange(4)[:, None] * [1, 0, -1]
        found = trend("x", expect="rises", margin=0.1)(values)
        assert (found.outcome, found.holds) == ("rises, by less than 0.1", "partly")
        found = trend("x", expect="rises", margin=0.1)(np.random.default_rng(0).normal(0, 1e-3, (8, 3)))
        assert (found.outcome, found.holds) == ("no change beyond 0.1", False)

    def test_an_order_near_its_margin_asks_for_seeds(self):
        values = np.arange(3) * np.array([0.02, 0.05, 0.04, 0.06])[:, None]
        found = trend("x", expect="rises", margin=0.1)(values)
        assert found.holds is None and re.search(r"too near its margin; about \d+ seeds would decide", found.why)

    @pytest.mark.parametrize("values", [[[1.0, 2, 3]], [[1.0]] * 3, [[1.0, 2.0]] * 3])
    def test_too_little_is_undecided_and_says_what_is_missing(self, values):
        found = trend("x", expect="rises")(values)
        assert found.holds is None
        assert found.why

    def test_the_n_it_asks_for_decides(self):
        found = trend("x", expect="rises")([[1.0, 2.0]] * 3)
        wanted = int(found.why.split("about ")[1].split()[0])
        assert trend("x", expect="rises")([[1.0, 2.0]] * wanted).holds is True
        assert trend("x", expect="rises")([[1.0, 2.0]] * (wanted - 1)).holds is None

    @pytest.mark.parametrize("values", [[1.0, 2.0], [[math.nan, 1, 2]] * 3, [[]]])
    def test_refuses(self, values):
        with pytest.raises(ValueError, match="a trend needs values"):
            trend("x", expect="rises")(values)

    def test_the_n_that_puts_the_change_inside_the_margin(self):
        rule, flat = trend("x", expect="falls", margin=0.1), np.array([[0, 0.09], [0, -0.09], [0, 0.06], [0, -0.06]])
        found = rule(flat)
        assert found.holds is None and found.why.endswith("would decide if the change stays as it is")
        wanted = int(found.why.split("about ")[1].split()[0])
        assert rule(np.tile(flat, (math.ceil(wanted / 4), 1))).outcome == "no change beyond 0.1"

    def test_changes_that_are_alike_have_no_spread_to_go_by(self):
        rule = trend("x", expect="falls", margin=0.1)
        for n in range(1, 12):
            assert rule(np.ones((n, 2))).outcome == ("undecided" if n < 8 else "no change beyond 0.1"), n
        assert "about 8 would decide if the change stays as it is" in rule(np.ones((3, 2))).why

    def test_one_condition_has_no_trend_with_a_margin_either(self):
        found = trend("x", expect="falls", margin=0.1)(np.arange(9.0)[:, None])
        assert found.holds is None and "one condition has no trend" in found.why


class TestDifference:
    def test_networks_that_are_often_the_same_one_are_not_called_so_too_soon(self):
        """By a coin both are one network, else the first errs less on five images in a hundred."""
        for n in range(2, 12):
            wrong, same = np.zeros((n, 1000), bool), np.zeros((n, 1000), bool)
            wrong[:, :50] = same[:, :50] = True
            found = difference("x", margin=0.01)(wrong, same)
            assert found.outcome == ("undecided" if n < 8 else "no difference beyond 0.01"), n
        assert "8 alike would decide" in difference("x", margin=0.01)(wrong[:3], same[:3]).why

    @pytest.mark.parametrize("shift", [1.0, 0.1, 1e6 + 0.1])
    def test_seeds_that_are_alike_up_to_rounding_have_no_spread_to_go_by(self, shift):
        rule = difference("x", margin=0.05)
        for n in range(2, 12):
            first = np.arange(1.0, n + 1)
            assert rule(first + shift, first).outcome == ("undecided" if n < 8 else "larger"), n
        assert "8 alike would decide" in rule(np.ones(7), np.zeros(7)).why

    @pytest.mark.parametrize("seeds, images", [(2, 2), (3, 3), (2, 5), (3, 8)])
    def test_few_images_keep_the_level(self, seeds, images):
        """A coin for each image, the same in all seeds: every outcome of the coins is tried."""
        wrong = 0
        for coins in itertools.product((False, True), repeat=images):
            a = np.tile(coins, (seeds, 1))
            wrong += difference("x", margin=0.05)(a, ~a).outcome in ("smaller", "larger")
        assert wrong / 2**images <= 0.01

    @pytest.mark.parametrize(
        ("seeds", "images", "between"), [(3, 300, 0.03), (3, 300, 0.0), (4, 1000, 0.01), (8, 100, 0.1)]
    )
    def test_errs_at_most_at_its_level(self, seeds, images, between):
        rng, rule = np.random.default_rng(seeds), difference("noise", margin=1e-9)
        found = [rule(*masks(rng, seeds, images, 0.0, between)).holds for _ in range(DRAWS)]
        assert DRAWS - found.count(None) <= MOST

    @pytest.mark.parametrize("expect, sign", [("smaller", -1), ("larger", 1)])
    def test_a_gain_as_large_as_the_margin_is_seldom_denied(self, expect, sign):
        rng, rule = np.random.default_rng(7), difference("x", margin=0.5, expect=expect, over="seeds")
        draws = sign * rng.normal(0.5, 0.3, (DRAWS, 5))
        assert sum(rule(d, np.zeros(5)).holds is False for d in draws) <= MOST

    def test_what_excludes_the_gain_denies_the_claim(self):
        d = np.array([0.3, 0.9, 0.4, 0.7, 0.1, -0.1])
        mean, half = interval(d, np.zeros(6))
        assert mean < half and half - mean < 0.6  # 0 inside, -0.6 not
        found = difference("x", margin=0.6, over="seeds")(d, np.zeros(6))
        assert (found.outcome, found.holds) == ("not smaller beyond 0.6", False)
        assert difference("x", margin=0.6, expect="larger", over="seeds")(d, np.zeros(6)).holds is None
        assert difference("x", margin=0.6, over="seeds")(-d, np.zeros(6)).holds is None

    def test_finds_what_is_there(self):
        rng, rule = np.random.default_rng(2), difference("better", margin=0.01)
        found = [rule(*masks(rng, 4, 1000, -0.25, 0.01)).outcome for _ in range(100)]
        assert found.count("smaller") > 95

    @pytest.mark.parametrize("images", [1, 400])
    def test_the_least_difference_is_seen_nine_times_in_ten(self, images):
        rng, rule, seen = np.random.default_rng(8), difference("x", margin=1e-9), []
        spread = [(8, 1), (1, images)]  # of seeds, and of images that are alike in all seeds
        draw = [
            sum(rng.normal(0, 0.05, shape) for shape in spread) + rng.normal(0, 0.5, (8, images)) for _ in range(600)
        ]
        size = np.median([least_seen(d, 0 * d) for d in draw])
        seen = [rule(d - size, 0 * d).outcome == "smaller" for d in draw]
        assert 0.85 < np.mean(seen) < 0.99

    def test_no_difference_is_a_finding(self):
        rng = np.random.default_rng(3)
        found = difference("same", margin=0.2, expect="no difference")(*masks(rng, 6, 2000, 0.0, 0.01))
        assert found.holds is True

    def test_the_error_against_its_closed_form_for_gaussian_data(self):
        """Var(mean) = s^2/S + i^2/N + r^2/(S N) for effects of seeds, images and a rest; the bootstrap agrees."""
        rng, (seeds, images) = np.random.default_rng(4), (200, 400)
        d = rng.normal(0, 0.3, (seeds, 1)) + rng.normal(0, 0.5, (1, images)) + rng.normal(0, 1, (seeds, images))
        _, from_seeds, from_images = _errors(d)
        closed = 0.09 / seeds + 0.25 / images + 1 / (seeds * images)
        assert from_seeds**2 + from_images**2 == pytest.approx(closed, rel=0.15)
        rows, columns = rng.integers(seeds, size=(500, seeds)), rng.integers(images, size=(500, images))
        bootstrap = np.var([d[np.ix_(r, c)].mean() for r, c in zip(rows, columns, strict=True)])
        assert from_seeds**2 + from_images**2 == pytest.approx(bootstrap, rel=0.25)

    @pytest.mark.parametrize("copies", [1, 2, 5])
    def test_the_p_of_these_networks_is_of_images_however_often_a_network_is_repeated(self, copies):
        """Networks on one set of images are no independent samples of images: copies of one add nothing."""
        a, b = np.zeros((2, 40), bool)
        a[:9], b[9:12] = True, True
        p = stats.binomtest(9, 12).pvalue
        found = difference("x", margin=0.01)(*(np.tile(v, (copies, 1)) for v in (a, b))).measured
        assert f"more errors on 9 images, fewer on 3 of 40, p = {p:.2g})" in found

    def test_the_p_of_these_networks_keeps_its_level_where_images_decide(self):
        rng = np.random.default_rng(0)
        below = 0
        for _ in range(DRAWS):
            side = rng.choice([-1, 0, 1], 60, p=[0.2, 0.6, 0.2])  # of an image, for all seeds alike: no true difference
            low = [np.tile(side == sign, (4, 1)) & (rng.random((4, 60)) < 0.8) for sign in (1, -1)]
            d = low[0].astype(int) - low[1]
            more, less = (int((s * d.sum(0) > 0).sum()) for s in (1, -1))
            found = difference("x", margin=0.01)(*low).measured
            assert f"more errors on {more} images, fewer on {less}" in found
            below += stats.binomtest(more, more + less).pvalue <= LEVEL
        assert below <= MOST

    def test_values_of_seeds_are_students_test(self):
        a, b = np.array([1.0, 2, 4, 3]), np.array([0.5, 1, 3.4, 2])
        low, high = stats.ttest_rel(a, b).confidence_interval(1 - LEVEL)
        assert f"[{low:+.4g}, {high:+.4g}]" in difference("x", margin=0.1)(a, b).measured

    def test_shares_of_images_differ_by_one_at_most(self):
        a = np.zeros((2, 100), bool)
        found = difference("x", margin=0.1)(a, np.stack([~a[0], np.arange(100) < 30]))
        assert found.measured.startswith("-0.65 [-1, +1] (") and found.why.startswith("half-width 22 at 2 seeds")
        assert difference("x", margin=0.1)(np.array([3.0, 9.0]), np.zeros(2)).measured.startswith("+6 [-18")

    def test_one_seed_is_undecided(self):
        found = difference("x", margin=0.1)([[True, False]], [[False, False]])
        assert found.holds is None
        assert "one seed" in found.why

    def test_values_alike_in_few_seeds_may_be_chance(self):
        few = difference("x", margin=0.5)(np.zeros(7), np.ones(7))
        assert few.holds is None and "8 alike would decide" in few.why
        assert difference("x", margin=0.5)(np.zeros(8), np.ones(8)).holds is True

    @pytest.mark.parametrize("often", [0.1, 0.3, 0.6, 1.0])
    @pytest.mark.parametrize("seeds", [7, 8, 10, 20])
    def test_counts_keep_the_level_where_students_interval_does_not(self, seeds, often):
        values = np.random.default_rng(seeds).choice([-1.0, 0, 1], (seeds, DRAWS), p=[often / 2, 1 - often, often / 2])
        low, high = _flipped(values)
        assert (low > 0).sum() + (high < 0).sum() <= MOST
        assert seeds > 7 or np.isinf(low).all()  # 2**-7 on each side is more than the level

    @pytest.mark.parametrize("seeds", [8, 9, 10, 14])
    def test_counts_are_judged_as_by_a_peer(self, seeds):
        values = np.random.default_rng(seeds).choice([-1.0, 0, 1, 2], (seeds, 20), p=[0.05, 0.2, 0.5, 0.25])
        for d, low, high in zip(values.T, *_flipped(values), strict=True):
            peer = stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=2**14).pvalue
            if abs(peer - LEVEL) > 0.004:  # beyond ten seeds 1,023 parts stand for all
                assert (low > 0 or high < 0) == (peer <= LEVEL), (d, peer)

    def test_counts_that_agree_more_are_never_judged_less(self):
        rule = difference("x", margin=0.5, expect="larger", over="seeds", counts=True)
        for n in (7, 8, 12):
            found = [rule(np.repeat([1.0, 0.0], [k, n - k]), np.zeros(n)).holds is True for k in range(n + 1)]
            assert found == sorted(found) and found[-1] == (n >= 8)
        assert rule(np.zeros(8), np.zeros(8)).holds is False
        assert "5 above 0 and 0 below; about" in rule(np.array([0.0, 1, 1, 1, 1, 1, 0]), np.zeros(7)).why
        with pytest.raises(ValueError, match="one per seed"):
            rule(np.ones((8, 3), bool), np.zeros((8, 3), bool))

    @given(st.lists(st.floats(-2, 2), min_size=4, max_size=4), st.sampled_from(["smaller", "larger", "no difference"]))
    def test_a_narrower_interval_turns_no_verdict_round(self, ends, expect):
        low, lower, upper, high = sorted(ends)
        wide, narrow = (_judge(*pair, margin=1.0, expect=expect)[1] for pair in ((low, high), (lower, upper)))
        assert narrow in {None: (None, True, False, "partly"), "partly": ("partly",)}.get(wide, (wide, "partly"))

    def test_what_is_there_but_less_than_the_margin_holds_in_part(self):
        d = np.random.default_rng(1).normal(-0.5, 0.1, 20)
        found = difference("x", margin=1.0, over="seeds")(d, 0 * d)
        assert (found.outcome, found.holds) == ("smaller, by less than 1", "partly")
        assert difference("x", margin=1.0, expect="larger", over="seeds")(d, 0 * d).holds is False
        assert difference("x", margin=1.0, expect="no difference", over="seeds")(d, 0 * d).holds is True
        open_ = difference("x", margin=0.5, expect="no difference", over="seeds")(d, 0 * d)
        assert (open_.outcome, open_.holds) == ("smaller", None)
        assert re.fullmatch(r"whether beyond 0.5 is open: half-width .* seeds; .* seeds would decide", open_.why)
        assert difference("x", margin=0.3, expect="no difference", over="seeds")(d, 0 * d).holds is False

    def test_no_image_that_differs_is_no_proof_of_equality_on_few(self):
        same = np.zeros((8, 20), bool)
        assert difference("x", margin=0.01, expect="no difference")(same, same).holds is None
        same = np.zeros((8, 2000), bool)
        assert difference("x", margin=0.01, expect="no difference")(same, same).holds is True

    def test_the_n_it_asks_for_is_near(self):
        rng, rule = np.random.default_rng(5), difference("x", margin=0.001)
        values = rng.normal(-1, 1, 4)
        wanted = int(rule(values, 0 * values).why.split("about ")[1].split()[0])
        more = np.tile(values, 50)[:wanted]
        more = values.mean() + (more - more.mean()) / more.std(ddof=1) * values.std(ddof=1)
        assert rule(more, 0 * more).holds is True

    @pytest.mark.parametrize("pair", [([1.0], [1.0, 2]), ([], []), ([math.nan, 1], [0, 1])])
    def test_refuses(self, pair):
        with pytest.raises(ValueError, match="pairs need"):
            difference("x", margin=0.1)(*pair)


class TestAtMost:
    @pytest.mark.parametrize("count, n", [(0.3, 1000), (2.9, 200), (1, 10.5), (math.nan, 10)])
    def test_a_share_is_no_count(self, count, n):
        with pytest.raises(ValueError, match="whole count"):
            at_most("x", bound=0.1)(count, n)

    @given(st.integers(1, 400), st.floats(0.01, 0.3), st.data())
    def test_is_clopper_and_pearson(self, n, bound, draw):
        k = draw.draw(st.integers(0, n))
        high = stats.binomtest(k, n, alternative="less").proportion_ci(1 - LEVEL).high
        low = stats.binomtest(k, n, alternative="greater").proportion_ci(1 - LEVEL).low
        if min(abs(high - bound), abs(low - bound)) > 1e-9:
            assert at_most("x", bound=bound)(k, n).holds is (True if high <= bound else False if low > bound else None)

    def test_the_n_of_its_text_is_the_least_that_can_pass(self):
        rule = at_most("x", bound=0.05)
        least = int(rule.text.split("at least ")[1].split()[0])
        assert rule(0, least).holds is True
        assert rule(0, least - 1).holds is None

    def test_the_n_it_asks_for_decides(self):
        found = at_most("x", bound=0.05)(1, 60)
        wanted = int(found.why.split("about ")[1].split()[0].replace(",", ""))
        assert at_most("x", bound=0.05)(math.ceil(wanted / 60), wanted).holds is True
        above = at_most("x", bound=0.1)(6, 50)  # the share lies above the bound, and may not
        wanted = int(above.why.split("about ")[1].split()[0].replace(",", ""))
        assert above.holds is None and at_most("x", bound=0.1)(round(0.12 * wanted), wanted).holds is False
        near = at_most("x", bound=0.1)(6, 60)  # no n decides, if it is the bound itself
        assert "more than 60,000 would decide" in near.why

    def test_without_a_case_nothing_is_decided(self):
        found = at_most("x", bound=0.1)(0, 0)
        assert found.holds is None and found.why == "there is no case to count; 44 at least"

    @pytest.mark.parametrize("case", [(3, 2), (-1, 5), (0.5, 5)])
    def test_refuses(self, case):
        with pytest.raises(ValueError, match="a share needs"):
            at_most("x", bound=0.1)(*case)


def test_exact():
    rule = exact("x", tolerance=1e-6)
    assert rule([1e-7, -2e-7]).holds is True
    assert rule(2e-6).holds is False
    assert rule(math.nan).holds is False
    assert rule([]).holds is None


RULES = {
    "trend": lambda v: trend("x", expect="rises")(v),
    "difference": lambda v: difference("x", margin=0.1)(v, np.zeros(v.shape)),
    "difference, second": lambda v: difference("x", margin=0.1)(np.zeros(v.shape), v),
    "interval": lambda v: interval(v, np.zeros(v.shape)),
    "exact": lambda v: exact("x", tolerance=1.0)(v),
}


@pytest.mark.parametrize("name", ["difference", "difference, second", "interval"])
def test_pairs_of_pandas_are_made_where_their_names_agree(name):
    def rule(a, b):
        return difference("x", margin=0.1)(a, b) if name.startswith("difference") else interval(a, b)

    values = np.random.default_rng(0).random((8, 3))
    a, b = pd.DataFrame(values), pd.DataFrame(values[::-1])
    assert rule(a, b) == rule(a, b.to_numpy()) == rule(a.to_numpy(), b)
    for other in (b[::-1], b[[2, 1, 0]], b.rename(columns={0: "zero"})):
        with pytest.raises(ValueError, match="made by place"):
            rule(a, other)
    with pytest.raises(ValueError, match="made by place"):
        rule(a[0], b[0].sort_index(ascending=False))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.filterwarnings("error")
def test_values_that_numpy_would_change_are_not_taken(rule):
    values = np.arange(24.0).reshape(8, 3) / 24
    rule(values)
    assert rule(values) == rule(np.ma.array(values)) == rule(np.ma.array(values, mask=False))
    with pytest.raises(ValueError, match="complex"):
        rule(values + 1j)
    for dtype in (float, int, bool):
        hidden = np.ma.array(values.astype(dtype), mask=values == 0.5)
        if rule is RULES["exact"]:
            assert rule(hidden).holds is False  # as for NaN
        else:
            with pytest.raises(ValueError, match="NaN"):
                rule(hidden)


def test_together():
    yes, no, open_ = Finding("a", True, "1"), Finding("b", False, "2"), Finding("undecided", None, "3", "few")
    part = Finding("a, by less", "partly", "4")
    assert together({"x": yes, "y": yes}).holds is True
    assert together({"x": no, "y": no}).holds is False
    assert together({"x": yes, "y": no}).holds == "partly"
    assert together({"x": yes, "y": open_}).holds is None
    assert together({"x": yes, "y": open_}).why == "y: few"
    assert together({"x": no, "y": open_}).holds is None  # it may yet hold in part
    assert together({"x": yes, "y": part}).holds == together({"x": part, "y": open_}).holds == "partly"
    assert together({"x": yes, "y": no, "z": open_}).measured == "x: a, 1; y: b, 2; z: undecided, 3; few"
    with pytest.raises(ValueError, match="no findings"):
        together({})


def test_a_cause_makes_it_undecided():
    found = exact("x", tolerance=1)(0.0, unless="still on the plateau")
    assert (found.holds, found.why) == (None, "still on the plateau")


def test_values_by_seed():
    values = {(eps, seed): 10 * eps + seed for eps in (0.1, 0.0) for seed in (2, 1, 0)}
    np.testing.assert_array_equal(by_seed(values), [[0, 1], [1, 2], [2, 3]])
    with pytest.raises(KeyError):
        by_seed({(0, 0): 1.0, (1, 1): 2.0})  # a hole


def test_ends_of_training_that_did_not_begin_are_left_out_and_named():
    def through(stuck, every=(0.0, 0.1, 0.4), seeds=range(4)):
        return {(e, s): (e, s) not in stuck for e in every for s in seeds}

    every, seeds = [0.0, 0.1, 0.4], [0, 1, 2, 3]
    assert ended(through([])) == (every, seeds, "", "")
    assert ended(through([(0.4, 2)])) == (every, [0, 1, 3], "seed 2", "")
    assert ended(through([(0.4, 2), (0.4, 1)])) == ([0.0, 0.1], seeds, "eps 0.4", "")
    assert ended(through([(0.1, 0), (0.4, 2), (0.4, 1)])) == ([0.0, 0.1], [1, 2, 3], "eps 0.4, seed 0", "")
    two = through([(0.1, 0), (0.4, 2)])
    assert ended(two) == (every, [1, 3], "seeds 0, 2", "")
    few = through([(0.1, 0), (0.1, 1), (0.4, 2), (0.4, 1)])  # one eps would be left, of which nothing follows
    assert ended(few) == (every, seeds, "", "4 of 12 networks are not through")
    assert ended(through([], every=[0.1])) == ([0.1], seeds, "", "")
    each = through([(0.0, 0), (0.1, 1), (0.4, 2)], seeds=range(3))  # every seed fails somewhere
    assert ended(each) == (every, [0, 1, 2], "", "3 of 9 networks are not through")
    each = through([(0.0, 0), (0.1, 1), (0.3, 2), (0.4, 3)], every=[0.0, 0.1, 0.3, 0.4])
    assert ended(each) == ([0.0, 0.1, 0.3, 0.4], seeds, "", "4 of 16 networks are not through")


PILOTS = {
    "order": (trend("x", expect="rises"), lambda rng: rng.normal(size=(4, 4)) + 0.35 * np.arange(4)),
    "change": (trend("x", expect="rises", margin=0.6), lambda rng: rng.normal(0, 0.5, (6, 3))),
    "change, few seeds": (trend("x", expect="rises", margin=0.4), lambda rng: rng.normal(0, 0.5, (4, 3))),
    "counts": (
        lambda d: difference("x", margin=0.2, expect="larger", counts=True)(d, 0 * d),
        lambda rng: rng.choice([0.0, 1.0], 7, p=[0.3, 0.7]),
    ),
    "seeds": (lambda d: difference("x", margin=0.01)(d, 0 * d), lambda rng: rng.normal(-0.5, 0.8, 8)),
    "margin": (lambda d: difference("x", margin=0.6)(d, 0 * d), lambda rng: rng.normal(0, 0.8, 8)),
    "none": (
        lambda d: difference("x", margin=0.5, expect="no difference")(d, 0 * d),
        lambda rng: rng.normal(0.1, 0.6, 6),
    ),
    "none, beyond": (
        lambda d: difference("x", margin=0.5, expect="no difference")(d, 0 * d),
        lambda rng: rng.normal(-0.9, 0.9, 8),
    ),
    "share": (lambda d: at_most("x", bound=0.2)(d.sum(), len(d)), lambda rng: np.arange(40) < 4 + rng.integers(3)),
}


@pytest.mark.parametrize(
    "pair", [(0.3, 0.1 + 0.2), (np.mean([0.7] * 3), np.mean([0.7] * 6)), (1e-9 / 3, 1e-9 * (1 / 3))]
)
def test_what_is_equal_up_to_rounding_has_no_order(pair):
    for values in ([pair] * 9, [[*pair, pair[0]]] * 9):
        assert trend("x", expect="rises")(values).holds is None
        assert trend("x", expect="falls")(values).holds is None


@pytest.mark.parametrize("unit", [1e-13, 1e-6, 1.0, 1e9])
def test_the_unit_changes_no_verdict(unit):
    a = np.array([1, 1.1, 0.9, 1.05, 0.95] * 2) * unit
    for expect in ("smaller", "larger", "no difference"):
        for b in (a, 1.02 * a + 0.001 * unit * np.arange(10), 3 * a):
            plain = difference("x", margin=0.1, expect=expect, over="seeds")(a / unit, b / unit)
            found = difference("x", margin=0.1 * unit, expect=expect, over="seeds")(a, b)
            words = [re.sub("[0-9.e+-]+$", "", f.outcome) for f in (found, plain)]
            assert found.holds == plain.holds and words[0] == words[1]


def test_only_shares_differ_by_one_at_most():
    rng = np.random.default_rng(0)
    losses = difference("loss", margin=0.1)(rng.normal(6, 1, (4, 50)), rng.normal(3, 1, (4, 50)))
    low, high = map(float, re.search(r"\[(.*), (.*)\]", losses.measured).groups())
    assert low < 3 < high
    few = difference("error", margin=0.1)(rng.random((3, 12)) < 0.9, rng.random((3, 12)) < 0.1)
    assert few.measured.split("[")[1].split("]")[0].endswith("+1")


@pytest.mark.parametrize("margin", [-1, float("nan"), float("inf")])
def test_a_margin_of_a_trend(margin):
    with pytest.raises(ValueError, match="the margin must be finite and not negative"):
        trend("x", expect="rises", margin=margin)
    with pytest.raises(ValueError, match="the margin must be positive and finite"):
        difference("x", margin=margin)
    with pytest.raises(ValueError, match="the tolerance must be finite and not negative"):
        exact("x", tolerance=margin)


def test_a_mean_that_is_the_margin_itself():
    """No n would decide if it stayed there; and the interval goes round it."""
    a = np.zeros((3, 20))
    a[:, 0] = a[0, 1] = 1
    b = np.eye(3, 20)[:, [1, 0, *range(2, 20)]] * 0
    b[1, 2] = 1
    for second in (b, np.zeros((3, 20))):
        found = difference("x", margin=(a - second).mean(), expect="no difference")(a, second)
        assert found.holds is None and found.why.endswith("no n would decide if it stays there")


@pytest.mark.filterwarnings("error")
def test_a_mean_that_is_infinite_is_never_only_above():
    assert trend("x", expect="rises")([[-np.inf, 1, np.inf]] * 3).measured.startswith("means -inf, 1, never; ")
    assert "means nan" in trend("x", expect="rises")([[-np.inf, 1, 2], [np.inf, 1, 2], [0, 1, 2]]).measured


@pytest.mark.parametrize("kind", PILOTS)
def test_the_n_it_asks_for_decides_nine_times_in_ten(kind):
    """If all is as it was measured: so what was measured is the population, and samples of the n are drawn from it."""
    rng, (rule, draw) = np.random.default_rng(6), PILOTS[kind]
    decided = []
    while len(decided) < 600:
        pilot = draw(rng)
        found = rule(pilot)
        wanted = re.search(r"about ([\d,]+)(?: seeds)? would decide", found.why)
        if found.holds is None and wanted:
            n = int(wanted[1].replace(",", ""))
            decided += [rule(pilot[rng.integers(len(pilot), size=n)]).holds is not None for _ in range(20)]
    assert 0.85 < np.mean(decided) < 0.99


@pytest.mark.parametrize("expect", ["smaller", "larger", "no difference"])
def test_the_text_says_what_a_difference_within_the_margin_is(expect):
    """What holds of a claim of no difference is in part of one of a difference, and the printed rule says so."""
    rule = difference("x", margin=0.5, expect=expect, over="seeds")
    a = {"larger": 0.1, "smaller": -0.1, "no difference": 0.1}[expect] + np.array([0.0, 0.001, 0.002, 0.003])
    found = rule(a, np.zeros(4))
    assert found.outcome.endswith("by less than 0.5")
    assert {True: "which holds", "partly": "which is in part"}[found.holds] in rule.text


@given(st.floats(1e-6, 1))
def test_a_printed_p_lies_on_the_side_of_the_level_that_the_verdict_is_on(p):
    """One digit made 0.0103 a p of 0.01, under a rule that asks for at most 0.01."""
    assert (float(_p(p)) <= LEVEL) == (p <= LEVEL)
