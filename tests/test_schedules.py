"""Budgets against tables made by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.schedules import by_name, constant, cosine, cosine_misread, linear, periodic
from lib.training import TrainConfig

INFINITY = float("inf")
HALF = math.sqrt(0.5)


@pytest.mark.parametrize("schedule, table", [
    (constant(8 / 255), {0: 8 / 255, 3.7: 8 / 255, 1e6: 8 / 255}),
    (linear(0, 0.4, 10), {0: 0, 0.25: 0.01, 5: 0.2, 9.5: 0.38, 10: 0.4, 10.5: 0.4, 1000: 0.4}),
    (linear(0.1, 0.3, 4), {0: 0.1, 1: 0.15, 3.5: 0.275, 4: 0.3, 5: 0.3}),
    (linear(0, 0.3, 2.5), {1: 0.12, 2.5: 0.3}),
    # Values between 0 and 1/255 are budgets like any other: no unit is guessed.
    (linear(0, 2 / 255, 8), {1: 0.25 / 255, 2: 0.5 / 255, 4: 1 / 255, 6: 1.5 / 255}),
    (cosine(0, 1, 4), {0: 0, 1: (1 - HALF) / 2, 2: 0.5, 3: (1 + HALF) / 2, 4: 1, 4.1: 1}),
    (cosine(0, 0.5 / 255, 2), {0.5: (1 - HALF) / 4 / 255, 1: 0.25 / 255, 2: 0.5 / 255}),
    # The paper's: MNIST at 0.4 over 100 epochs, CIFAR-10 at 8/255.
    (linear(0, 0.8, 100, clip=0.4), {0: 0, 1: 0.008, 25: 0.2, 49.5: 0.396, 50: 0.4, 51: 0.4, 100: 0.4, 101: 0.4}),
    (cosine(0, 0.6, 100, clip=0.4), {0: 0, 25: 0.3 * (1 - HALF), 50: 0.3, 60: 0.3927050983, 61: 0.4, 100: 0.4}),
    (linear(0, 16 / 255, 200, clip=8 / 255), {0: 0, 50: 4 / 255, 100: 8 / 255, 150: 8 / 255, 200: 8 / 255}),
    (cosine(0, 16 / 255, 200, clip=8 / 255), {50: 8 * (1 - HALF) / 255, 100: 8 / 255, 101: 8 / 255}),
    (periodic(linear(0, 0.4, 10), [4, 10]), {0: 0, 3.5: 0.14, 4: 0, 6: 0.08, 9.5: 0.22, 10: 0, 15: 0.2, 20: 0.4}),
    (periodic(constant(0.3), []), {0: 0.3, 7: 0.3}),
])  # fmt: skip
def test_table(schedule, table):
    assert {epoch: schedule(epoch) for epoch in table} == pytest.approx(table, abs=1e-9, rel=0)


@pytest.mark.parametrize("stop, clip, table", [
    # 0 to 16 pixels over 100 epochs, clipped at 8. Below one pixel, up to epoch 16.09, pixels are taken for fractions.
    (16 / 255, 8 / 255, {0: 0, 10: 0.3915479, 16: 0.9895468, 17: 8 * (1 - math.cos(0.17 * math.pi)) / 255, 50: 8 / 255,
                         75: 8 / 255}),
    # The values of MNIST are fractions themselves: 0 to 0.6 passes one pixel within the first epochs.
    (0.6, 0.4, {0: 0, 5: 0.9418419, 6: 0.3 * (1 - math.cos(0.06 * math.pi)), 100: 0.4}),
])  # fmt: skip
def test_the_wrong_unit(stop, clip, table):
    schedule = cosine_misread(0, stop, 100, clip=clip)
    assert {epoch: schedule(epoch) for epoch in table} == pytest.approx(table, abs=1e-6, rel=0)


def released(shape, epoch, periods, top):
    """Budget in pixels / 255 and rate as the released code forms them on CIFAR-10: within the period that an epoch lies
    in, the budget rises to 16 pixels over its length and is clipped at 8; the rate falls tenfold at 1/2 and 3/4."""
    begin = max(b for b in [0, *periods] if b <= epoch)
    length = min([b for b in periods if b > epoch], default=200) - begin
    t = (epoch - begin) / length
    rise = {"constant": 8, "linear": top * t, "cosine": top * (1 - math.cos(math.pi * t)) / 2}[shape]
    return min(rise, 8) / 255, 0.1 * 0.1 ** ((t >= 0.5) + (t >= 0.75))


@pytest.mark.parametrize("periods", [[], [100, 150]])
@pytest.mark.parametrize("shape", ["constant", "linear", "cosine"])
def test_budget_and_rate_are_the_released_ones(shape, periods):
    config = TrainConfig(model="vgg16", eps=8 / 255, step_size=2 / 255, num_steps=10, epochs=200, restarts=periods,
                         schedule=shape, schedule_stop=None if shape == "constant" else 16 / 255, lr=0.1,
                         lr_drops=[0.5, 0.75], optimizer="sgd")  # fmt: skip
    for epoch in (0, 1, 24.5, 50, 75, 99.75, 100, 110, 124, 125, 137.5, 149, 150, 151, 175, 187.5, 199.5):
        found = config.budget()(epoch), config.learning_rate(epoch)
        assert found == pytest.approx(released(shape, epoch, periods, 16))
    # By hand, in the plain run: a quarter of the way 16 (1 - cos(pi / 4)) / 2 pixels, and the first rate.
    if shape == "cosine" and not periods:
        assert config.budget()(50) == pytest.approx(2.3431458 / 255) and config.learning_rate(99.9) == 0.1
        assert config.learning_rate(100) == pytest.approx(0.01) and config.learning_rate(150) == pytest.approx(0.001)


@given(st.sampled_from([linear, cosine]), st.floats(0, 1), st.floats(0, 1), st.floats(0.1, 300), st.floats(0, 1),
       st.lists(st.floats(0, 400), min_size=2, max_size=9))  # fmt: skip
def test_never_falls_nor_leaves_its_limits(shape, a, b, epochs, clip, when):
    start, stop = sorted((a, b))
    values = [shape(start, stop, epochs, clip=clip)(epoch) for epoch in sorted(when)]
    assert values == sorted(values)
    assert all(min(start, clip) - 1e-12 <= v <= min(stop, clip) + 1e-12 for v in values)


@pytest.mark.parametrize("name, settings, same", [
    ("constant", {}, constant(0.4)),
    ("linear", {"stop": 0.8}, linear(0, 0.8, 20, clip=0.4)),
    ("cosine", {"stop": 0.6, "start": 0.1}, cosine(0.1, 0.6, 20, clip=0.4)),
    ("linear", {}, linear(0, 0.4, 20)),
])  # fmt: skip
def test_by_name(name, settings, same):
    schedule = by_name(name, 0.4, epochs=20, **settings)
    assert [schedule(e / 3) for e in range(80)] == [same(e / 3) for e in range(80)]


@pytest.mark.parametrize("make, message", [
    (lambda: constant(8), "value is a fraction of the pixel range, so at most 1: write 8/255, not 8"),
    (lambda: constant(float("nan")), "value must be finite and not negative"),
    (lambda: linear(-0.1, 0.3, 5), "start must be finite and not negative, got -0.1"),
    (lambda: linear(0, 16, 5), "stop is a fraction of the pixel range"),
    (lambda: linear(0, 0.3, 5, clip=2), "clip is a fraction of the pixel range"),
    (lambda: linear(0, 5, 3, norm="L-inf"), "unknown norm 'L-inf': choose one of linf, l2"),
    (lambda: cosine(0, INFINITY, 5), "stop must be finite"),
    (lambda: cosine(0.4, 0.1, 5), "runs backwards: it starts at 0.4 and stops at 0.1"),
    (lambda: linear(0, 0.3, 0), "runs backwards: epochs must be positive and finite, got 0"),
    (lambda: linear(0, 0.3, float("nan")), "epochs must be positive and finite, got nan"),
    (lambda: linear(0, 0.3, 5)(-1), "epoch must not be negative or NaN, got -1"),
    (lambda: cosine(0, 0.3, 5)(float("nan")), "epoch must not be negative or NaN, got nan"),
    (lambda: periodic(constant(0.1), [5, 5]), r"restarts must be positive epochs in increasing order, got \[5, 5\]"),
    (lambda: periodic(constant(0.1), [0, 5]), "restarts must be positive epochs"),
    (lambda: periodic(constant(0.1), [6, 5]), "restarts must be positive epochs in increasing order"),
    (lambda: by_name("step", 0.1, epochs=5), "unknown schedule 'step': choose one of constant, linear, cosine"),
    (lambda: periodic([constant(0.1)], [5]), "2 periods need as many schedules, got 1"),
])  # fmt: skip
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
