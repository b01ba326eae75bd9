"""The four rules by which verdicts follow from numbers, each printed before its figure.

`trend`, `difference`, `at_most` and `exact` each return a Rule. Shown, it is a sentence, printed before the figure;
called with the data, it gives a Finding, which says what was measured, whether the claim holds, and where that is
undecided, why, and at which n it would be decided, nine times in ten if all is as it was measured. The level is one in
a hundred, so that a verdict is no coin. More of the same data may make a verdict finer ("partly": there, but less than
what matters), and turn none round but by error; but whoever looks k times, each time with more data, errs in up to k of
a hundred. Where a rule, a margin or an n came after data had been seen, or a look before, the notebook says so.
"""

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np
from scipy import stats
from scipy.optimize import brentq

from .checks import as_numbers, check_choice

LEVEL = 0.01
THROUGH = 0.75  # so many of the cases must be such as a claim speaks of; the others are left out
MISSES = 0.1  # how often the n that is asked for does not decide, if all is as it was measured
ALIKE = math.ceil(1 - math.log2(LEVEL))  # seeds that agree exclude chance, a coin each, on both sides: 8


@dataclass(frozen=True)
class Finding:
    """What a rule says of data: outcome, a word or two; holds, of the claim (True, False, "partly", None: undecided);
    measured, the numbers; why, for what is undecided: the cause, and the n that would decide it."""

    outcome: str
    holds: bool | str | None
    measured: str
    why: str = ""

    @property
    def words(self):
        """For an answer: outcome (interval; why, if undecided), without what is said of these networks alone."""
        return f"{self.outcome} ({self.measured.split(' (')[0]}{self.because})"

    @property
    def because(self):
        """To go on with after what was measured: the cause of what is undecided, or nothing."""
        return f"; {self.why}" if self.why else ""

    def _repr_markdown_(self):
        return f"**{self.outcome}**: {self.measured}" + (f" ({self.why})" if self.why else "")


@dataclass(frozen=True)
class Rule:
    """A rule: its text, and the test that takes the data and gives a Finding.

    Called with `unless`, a text that is not empty, it gives undecided for that cause: what was measured does not
    belong to the claim (a network is still on the plateau, say).
    """

    text: str
    test: Callable

    def __call__(self, *data, unless=""):
        found = self.test(*data)
        return replace(found, outcome="undecided", holds=None, why=unless) if unless else found

    def _repr_markdown_(self):
        return f"**Rule.** {self.text}"


def together(findings):
    """One finding of several: what all say, if they agree; "partly" where something holds and something does not, also
    if more is undecided (a "partly" says both); else it is undecided, for the causes of those that are.

    Args:
        findings: a dict of Finding by name, at least one.
    """
    if not findings:
        raise ValueError("no findings to take together")
    holds = {f.holds for f in findings.values()}
    measured = "; ".join(f"{name}: {f.measured}" for name, f in findings.items())
    why = "; ".join(f"{name}: {f.why}" for name, f in findings.items() if f.holds is None)
    verdict = "partly" if {True, "partly"} & holds and {False, "partly"} & holds else None
    if len(holds) == 1:
        (verdict,) = holds
    if verdict is None:
        return Finding("undecided", None, measured, why)
    if verdict == "partly":  # which holds, which does not, and what would decide the rest
        measured = "; ".join(f"{name}: {f.outcome}, {f.measured}{f.because}" for name, f in findings.items())
    return Finding(", ".join(dict.fromkeys(f.outcome for f in findings.values())), verdict, measured)


def trend(what, *, expect, margin=0.0):
    """Do values rise or fall along ordered conditions, in every seed? Page's test.

    Args:
        what: of what, along what: "the gradient norm along eps".
        expect: "rises" or "falls".
        margin: the mean change from the first condition to the last that matters, in the unit of the values.
    Returns:
        A Rule for values (seeds, conditions), infinite ones allowed, no NaN. It holds if the p value in the expected
        direction is at most LEVEL and the mean measured change at least the margin; it does not if the p value of the
        other direction is at most LEVEL. Where Student's interval for the change lies inside the margin, it holds in
        part if the order is there, and not at all if it is not.
    """
    check_choice("expect", expect, ("rises", "falls"))
    if not 0 <= margin < math.inf:
        raise ValueError(f"the margin must be finite and not negative, got {margin}")
    sign = 1 if expect == "rises" else -1
    beyond = f", and the mean change measured from first to last is at least {margin:g}" if margin else ""
    none = "; where the change is surely below that, in part if the order is there, else not" if margin else ""
    text = (f"{_upper(what)} {expect}: Page's test over the seeds, one-sided, p at most {LEVEL:g}{beyond}. It does not "
            f"if the test says so of the other direction{none}.")  # fmt: skip

    def test(values):
        v = _settled(values)
        if v.ndim != 2 or not v.size or np.isnan(v).any():
            raise ValueError(f"a trend needs values (seeds, conditions) without NaN, got shape {v.shape}: {values}")
        seeds, k = v.shape
        with np.errstate(invalid="ignore"):  # opposite infinities have no mean, and a NaN is not beyond the margin
            means = ", ".join("never" if m == math.inf else f"{m:.3g}" for m in v.mean(0))
        p, against, *order = (1.0, 1.0, 0.0, 0.0) if min(seeds, k) < 2 else _page(sign * v)
        measured = f"means {means}; p = {_p(min(p, against))}{'' if p <= against else ' for the other direction'}"
        equal = v[:, -1] == v[:, 0]  # two infinite ones, too
        change = np.subtract(v[:, -1], v[:, 0], out=np.zeros(seeds), where=~equal)
        with np.errstate(invalid="ignore"):
            mean = change.mean()
        if p <= LEVEL and sign * mean >= margin:
            return Finding(expect, True, measured)
        if against <= LEVEL:
            return Finding("falls" if sign > 0 else "rises", False, measured)
        inside = math.inf  # how many seeds would put the interval of the change inside the margin
        if margin and seeds > 1 and k > 1 and np.isfinite(change).all():
            _, *errors = _errors(change[:, None])
            left, ordered = margin - abs(mean), p <= LEVEL
            if _half((seeds, 1), *errors) < left:
                small = f"{expect}, by less than {margin:g}" if ordered else f"no change beyond {margin:g}"
                return Finding(small, "partly" if ordered else False, measured)
            if left > 0:
                inside = ALIKE if math.isinf(errors[0]) else _enough(seeds, lambda n: _later(n, seeds, errors) < left)
        return Finding("undecided", None, measured, _why_no_trend(v.shape, *order, p, sign * mean >= margin, inside))

    return Rule(text, test)


def ended(through):
    """Which ends of training to judge by: a network that never left the plateau says nothing of one.

    At a large eps it is a matter of luck whether a run leaves it; among seeds enough some do not, and these must not
    keep the others from being judged.

    Args:
        through: {(eps, seed): whether the network is through}.
    Returns:
        The eps at which at least `THROUGH` of the networks are through; the seeds whose networks are through at all of
        these; which are left out, as a text; and "". Where less than two eps or no seed would be left: all of them, and
        last a text on why nothing follows, for a rule's `unless`.
    """
    every, seeds = (sorted({key[i] for key in through}) for i in (0, 1))
    kept = [e for e in every if np.mean([through[e, s] for s in seeds]) >= THROUGH]
    whole = [s for s in seeds if all(through[e, s] for e in kept)]
    if not whole or len(kept) < min(2, len(every)):
        return every, seeds, "", f"{sum(not t for t in through.values())} of {len(through)} networks are not through"
    out = [str(s) for s in seeds if s not in whole]
    named = [f"eps {e:g}" for e in every if e not in kept]
    named += [f"seed{'s' * (len(out) > 1)} {', '.join(out)}"] * bool(out)
    return kept, whole, ", ".join(named), ""


def by_seed(values):
    """{(condition, seed): value} as an array (seeds, conditions), both in their order, as `trend` takes it."""
    conditions, seeds = (sorted({key[i] for key in values}) for i in (0, 1))
    return np.array([[values[condition, seed] for condition in conditions] for seed in seeds], float)


def _settled(values):
    """Values to twelve digits, so that those that are equal up to rounding are equal, and have one rank."""
    return np.vectorize(lambda x: float(f"{x:.12g}"), otypes=[float])(as_numbers(values))


def _page(v):
    """One-sided p values for a rise and for a fall, of values (seeds, conditions); then the statistic, standardised,
    and its standard deviation over the seeds, in units of that without any order."""
    seeds, k = v.shape
    ranks = stats.rankdata(v, axis=1)
    if k == 2:  # Page's test begins at three conditions; with two it is the sign test
        each, spread = np.sign(ranks[:, 1] - ranks[:, 0]), 1.0
        up, down = int((each > 0).sum()), int((each < 0).sum())
        p, against = (stats.binom.sf(n - 1, up + down, 0.5) if up + down else 1.0 for n in (up, down))
    else:
        each, spread = ranks @ np.arange(1, k + 1) - k * (k + 1) ** 2 / 4, k * (k + 1) * math.sqrt(k - 1) / 12
        p, against = (stats.page_trend_test(r, ranked=True).pvalue for r in (ranks, k + 1 - ranks))
    return p, against, each.mean() * math.sqrt(seeds) / spread, each.std(ddof=1) / spread


def _why_no_trend(shape, z, own, p, large, inside):
    seeds, k = shape
    if seeds < 2:
        return "one seed cannot decide"
    if k < 2:
        return "one condition has no trend: two at least, better three"
    least = max(2, math.ceil(math.log(LEVEL) / -math.log(math.factorial(k))))
    if p <= LEVEL:
        enough = f"; about {inside} seeds would decide if it stays as it is" if math.isfinite(inside) else ""
        return f"the order is there, but the change is too near its margin{enough}"
    reach = stats.norm.isf(LEVEL) + stats.norm.isf(MISSES) * own
    ordered = max(least, math.ceil(seeds * (reach / z) ** 2), seeds + 1) if large and z > 0 else math.inf
    if math.isinf(min(ordered, inside)):
        return f"{'too small a change' if z > 0 else 'no rank order'} seen in {seeds} seed{'s' * (seeds > 1)}"
    stays = "order" if ordered <= inside else "change"
    return f"too few seeds: {seeds}; about {min(ordered, inside)} would decide if the {stays} stays as it is"


def difference(what, *, margin, expect="smaller", over="seeds and images", counts=False):
    """Does the first arm err less than the second? Paired by seed and image; Student's interval on two levels.

    The seeds' spread and the images' spread enter as two independent errors (a crossed design: every seed's network
    sees the same images), joined as in Zou & Donner's method of variance estimates recovery. A percentile bootstrap
    over three or four seeds does not keep its level; this does (tests/test_inference.py simulates it). Values that are
    alike in all seeds have no spread to go by: they decide only if there are so many seeds that chance, a coin each, is
    excluded at the level (8 at one in a hundred). Student's interval does not keep its level for small whole numbers;
    these are judged by flips of their signs, exactly. Nor does it quite at three seeds, where each is one of two things
    (it stalls or it does not): three in a hundred, simulated; from four seeds on it does.

    Args:
        what: of what: "robust error, cosine minus constant".
        margin: the smallest difference that matters, in the unit of the values; > 0.
        expect: "smaller", "larger" or "no difference" (beyond the margin), whichever the claim says of the first arm.
        over: what the data hold, for the text: "seeds" where they are values and not masks.
        counts: whether the values (seeds,) are small whole numbers.
    Returns:
        A Rule for two arrays of equal shape: masks (seeds, images), True where the network errs, or values (seeds,). It
        does not hold, either, where the interval excludes that the first arm is better by as much as the margin.
    """
    check_choice("expect", expect, ("smaller", "larger", "no difference"))
    if not 0 < margin < math.inf:
        raise ValueError(f"the margin must be positive and finite, got {margin}")
    worth = {"smaller": f"*not smaller beyond the margin* if it lies above -{margin:g}; ",
             "larger": f"*not larger beyond the margin* if it lies below {margin:g}; "}.get(expect, "")  # fmt: skip
    how = ", from flips of the signs" if counts else ""
    less = "which holds" if expect == "no difference" else "which is in part"
    text = (f"{_upper(what)}: {expect}, by the {1 - LEVEL:.0%} interval over {over}, paired{how}. *Smaller* or "
            f"*larger* if it leaves out 0, and *by less than the margin*, {less}, if it lies within "
            f"±{margin:g}, too; *no difference beyond the margin* if it lies there and holds 0; {worth}else "
            "undecided.")  # fmt: skip
    judge = partial(_judge, margin=margin, expect=expect)

    def test(a, b):
        d = _differences(a, b)
        if counts and d.shape[1] > 1:
            raise ValueError(f"counts are one per seed, got shape {d.shape}")
        mean, *errors = _errors(d)
        half = _half(d.shape, *errors)
        low, high = _flipped(d)[:, 0] if counts else (mean - half, mean + half)
        shares = d.shape[1] > 1 and np.min([a, b]) >= 0 and np.max([a, b]) <= 1
        most = 1.0 if shares else math.inf  # that shares of images can differ by
        ends = f" [{max(low, -most):+.4g}, {min(high, most):+.4g}]" if math.isfinite(high - low) else ""
        measured = f"{mean:+.4g}{ends}"
        if d.shape[1] > 1:
            measured += f" ({_mcnemar(d)})"
        outcome, holds = judge(low, high)
        why = ""
        if holds is None:
            gain = {"smaller": -mean, "larger": mean}.get(expect, math.inf)
            goal = max(abs(mean), margin - min(abs(mean), gain))  # the shortest way out
            if expect == "no difference":  # which is not that 0 is left out
                goal = abs(margin - abs(mean))
            why = f"whether beyond {margin:g} is open: " * (outcome != "undecided")
            why += _why_no_count(d, judge) if counts else _why_no_difference(d, goal, half, errors)
        return Finding(outcome, holds, measured, why)

    return Rule(text, test)


def _judge(low, high, *, margin, expect):
    """Outcome of an interval, and whether the claim holds. What more data make of it is finer, or an error."""
    inside = -margin < low and high < margin
    if low <= 0 <= high:
        if inside:
            return f"no difference beyond {margin:g}", expect == "no difference"
        none = low > -margin if expect == "smaller" else high < margin and expect == "larger"
        return (f"not {expect} beyond {margin:g}", False) if none else ("undecided", None)
    outcome = "smaller" if high < 0 else "larger"
    if expect == "no difference":
        holds = True if inside else False if low >= margin or high <= -margin else None
    else:
        holds = outcome == expect and ("partly" if inside else True)
    return f"{outcome}, by less than {margin:g}" if inside else outcome, holds


def _flipped(d):
    """Low and high ends (2, columns) of the intervals for the centres of values (seeds, columns) that lie symmetrically
    round them: means of parts of the seeds, all or 1,023 of them (Hartigan 1969), which flips of the signs allow."""
    s = len(d)
    if s <= 10:
        parts = np.arange(1, 2**s)[:, None] >> np.arange(s) & 1
    else:
        parts = np.random.default_rng(0).integers(0, 2, (1023, s))
        parts = parts[parts.any(1)]  # none of them has no mean
    means = np.sort(parts @ d / parts.sum(1, keepdims=True), axis=0)
    left_out = int((len(means) + 1) * LEVEL / 2)
    return means[[left_out - 1, -left_out]] if left_out else np.array([[-math.inf], [math.inf]]).repeat(d.shape[1], 1)


def least_seen(a, b):
    """The least difference that would be told from none nine times in ten, with these seeds, images and spreads."""
    d = _differences(a, b)
    return _seen(d.shape, *_errors(d)[1:])


def interval(a, b):
    """Mean of a - b and half the width of its interval, as in `difference` (infinite for one seed)."""
    d = _differences(a, b)
    mean, *errors = _errors(d)
    return mean, _half(d.shape, *errors)


def _differences(a, b):
    named = [getattr(v, "axes", []) for v in (a, b)]  # of pandas
    if not all(p.equals(q) for p, q in zip(*named, strict=False)):
        raise ValueError("the index or the columns of the two differ, and pairs are made by place: align them")
    a, b = (as_numbers(v) for v in (a, b))
    if a.shape != b.shape or not a.size or a.ndim not in (1, 2):
        raise ValueError(f"pairs need two arrays (seeds, images) or (seeds,) of one shape, got {a.shape} and {b.shape}")
    if not np.isfinite([a, b]).all():
        raise ValueError("pairs need finite values: there are NaN or infinite ones")
    scale = np.abs([a, b]).max() or 1.0
    d = np.round((a - b) / scale, 12) * scale + 0.0  # what is equal up to rounding is equal
    return d.reshape(len(d), -1)


def _errors(d):
    """Mean of differences (seeds, images), and the standard errors that come from the seeds and from the images."""
    s, n = d.shape
    seeds, images, mean = d.mean(1), d.mean(0), d.mean()
    unseen = s < ALIKE and not np.ptp(d, axis=0).any()  # too few seeds, all alike: no spread seen is not no spread
    if min(s, n) == 1:
        spread = seeds.std(ddof=1) if np.ptp(seeds) else 0.0  # not what rounding makes of equal values
        return mean, math.inf if unseen else spread / math.sqrt(s), 0.0
    both = ((d - seeds[:, None] - images + mean) ** 2).sum() / ((s - 1) * (n - 1))  # mean squares of a crossed design
    from_seeds = math.inf if unseen else max(n * seeds.var(ddof=1), both) / (s * n)
    from_images = max(s * images.var(ddof=1) - both, 0) / (s * n)
    least = 0.0
    if np.ptp(d) == 0:  # the rule of three, from so many images on that chance is excluded
        least = math.inf if n < ALIKE else -math.log(LEVEL) / n / stats.t.isf(LEVEL / 2, n - 1)
    return mean, math.sqrt(from_seeds), max(math.sqrt(from_images), least)


def _half(shape, seed_error, image_error):
    parts = zip(shape, (seed_error, image_error), strict=True)
    return math.hypot(*(stats.t.isf(LEVEL / 2, n - 1) * e if n > 1 else e for n, e in parts))


def _seen(shape, *errors):
    """How large a difference must be for its interval to leave out 0 nine times in ten."""
    beyond = (_beyond(n - 1) * e for n, e in zip(shape, errors, strict=True) if n > 1)
    return _half(shape, *errors) + math.hypot(*beyond)


@cache
def _beyond(freedom):
    """How many standard errors beyond Student's bound a mean must lie, so that a test finds it but in MISSES cases."""
    if freedom > 200:
        return stats.norm.isf(MISSES)
    bound = stats.t.isf(LEVEL / 2, freedom)
    found = partial(stats.nct.sf, bound, freedom)  # at so many standard errors from 0: noncentral t
    return brentq(lambda mean: found(mean) - 1 + MISSES, bound, 20 * bound) - bound


def _mcnemar(d):
    """For these very networks: the exact sign test over the images, on each of which their differences add up."""
    more, less = (int((sign * d.sum(0) > 0).sum()) for sign in (1, -1))
    p = stats.binomtest(more, more + less).pvalue if more + less else 1.0
    return f"these networks: more errors on {more:,} images, fewer on {less:,} of {d.shape[1]:,}, p = {_p(p)}"


def _why_no_difference(d, goal, half, errors):
    (s, n), (seed_error, image_error) = d.shape, errors
    if s == 1:
        return "one seed: the spread between seeds is unknown; three at least"
    if goal == 0:
        return "the mean is the margin itself; no n would decide if it stays there"
    if math.isinf(image_error):
        return f"too few images: {n}, all alike; {ALIKE} alike would decide"
    if math.isinf(seed_error):
        return f"too few seeds: {s}, all alike, so that their spread is unknown; {ALIKE} alike would decide"
    more_images = max(1.0, 2 * ((stats.norm.isf(LEVEL / 2) + stats.norm.isf(MISSES)) * image_error / goal) ** 2)
    left = seed_error, image_error / math.sqrt(more_images)
    enough = _enough(s, lambda k: _later(k, s, left, n) < goal)
    images = f" and {math.ceil(n * more_images / 100) * 100:,} images" if more_images > 1 else ""
    at = f"{s} seeds{f', {n:,} images' if n > 1 else ''}"
    return f"half-width {half:.2g} at {at}; {_about(enough)}{images} would decide"


def _why_no_count(d, judge):
    s, values = len(d), np.unique(d)
    if len(values) < 2:
        return f"too few seeds: {s}, all alike; {ALIKE} alike would decide"
    rng = np.random.default_rng(0)

    def decides(k):  # seeds drawn from those that were seen
        low, high = _flipped(rng.choice(d[:, 0], (k, 500)))
        return np.mean([judge(*ends)[1] is not None for ends in zip(low, high, strict=True)]) >= 1 - MISSES

    enough = _enough(max(s, ALIKE - 1), decides, most=200)
    return f"too few seeds: {s}, {len(d[d > 0])} above 0 and {len(d[d < 0])} below; {_about(enough, 200)} would decide"


def _later(k, s, errors, n=1):
    """What would be seen (`_seen`) with k seeds instead of s, of standard errors as they are now."""
    return _seen((k, n), errors[0] * math.sqrt(s / k), errors[1])


def _enough(s, decides, most=1000):
    """The least number of seeds, more than s, at which `decides` is true and stays so; infinite beyond `most`."""
    numbers = range(s + 1, most + 1)
    at = bisect_left(numbers, True, key=decides)
    return numbers[at] if at < len(numbers) else math.inf


def _about(seeds, most=1000):
    return f"about {seeds} seeds" if math.isfinite(seeds) else f"more than {most:,} seeds"


def at_most(what, *, bound):
    """Is a share at most `bound`? Clopper and Pearson's one-sided bounds.

    Returns:
        A Rule for (count, n), whole numbers. It holds if the upper bound of the share is at most `bound`, and does not
        if the lower one is above it. Of no cases at all it is undecided.
    """
    if not 0 < bound < 1:
        raise ValueError(f"the bound of a share lies between 0 and 1, got {bound}")
    least = math.ceil(math.log(LEVEL) / math.log1p(-bound))
    text = (f"{_upper(what)}: at most {bound:g}, by Clopper and Pearson's {1 - LEVEL:.0%} bound. That needs at least "
            f"{least} cases, if none of them counts.")  # fmt: skip

    def upper(k, n):
        return stats.beta.isf(LEVEL, k + 1, n - k) if k < n else 1.0

    def lower(k, n):
        return stats.beta.ppf(LEVEL, k, n - k + 1) if k else 0.0

    def decides(share, n):  # at this share, but for one time in ten (MISSES)
        if share < bound:
            return upper(stats.binom.isf(MISSES, n, share), n) <= bound
        return lower(stats.binom.ppf(MISSES, n, share), n) > bound

    def test(count, n):
        if not (float(count).is_integer() and float(n).is_integer() and 0 <= count <= n):
            raise ValueError(f"a share needs a whole count between 0 and n: got {count} of {n}")
        k, n = int(count), int(n)
        if n == 0:
            return Finding("undecided", None, "0 of 0", f"there is no case to count; {least} at least")
        high, low = upper(k, n), lower(k, n)
        measured = f"{k} of {n:,}, that is {low:.3g} to {high:.3g}"
        if high <= bound:
            return Finding(f"at most {bound:g}", True, measured)
        if low > bound:
            return Finding(f"more than {bound:g}", False, measured)
        grid = (_two_digits(n * 1.1**i) for i in range(1, 73))
        wanted = next((f"about {m:,}" for m in grid if decides(k / n, m)), f"more than {1000 * n:,}")
        why = f"too few cases: {n}; {wanted} would decide if the share stays as it is"
        return Finding("undecided", None, measured, why)

    return Rule(text, test)


def _two_digits(n):
    """The least whole number of two digits and zeros that is not below n."""
    unit = 10 ** max(0, math.floor(math.log10(n)) - 1)
    return math.ceil(n / unit) * unit


def exact(what, *, tolerance):
    """For theorems and identities: is an error at most `tolerance`?

    Returns:
        A Rule for an error, or an array of errors, of which the largest counts. NaN does not pass.
    """
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"the tolerance must be finite and not negative, got {tolerance}")
    text = f"{_upper(what)}: at most {tolerance:g}."

    def test(error):
        if np.size(error) == 0:
            return Finding("undecided", None, "nothing", "there was nothing to compare")
        worst = float(np.max(np.abs(as_numbers(error))))
        return Finding("holds" if worst <= tolerance else "fails", worst <= tolerance,
                       f"largest error {worst:.3g} of {np.size(error):,}, {tolerance:g} allowed")  # fmt: skip

    return Rule(text, test)


def _upper(what):
    return what[:1].upper() + what[1:]


def _p(p):
    if p < 1e-6:
        return "below 1e-6"
    digits = (f"{p:.{n}g}" for n in range(2, 18))  # two, or as many as show on which side of the level it is
    return next(text for text in digits if (float(text) <= LEVEL) == (p <= LEVEL))
