"""The statistics of notebooks 1 to 5, on data for which the answer is known."""

import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from notebook_functions import function
from torch import nn

from lib import curvature, evaluation, linear
from lib.attacks import pgd
from lib.differentiate import differentiating


@pytest.mark.parametrize("errors, length", [
    ([0.9, 0.9, 0.6, 0.9], 2), ([0.5, 0.9], 0), ([0.9] * 5, math.inf), ([0.9, 0.7, 0.69], 2), ([], math.inf),
])  # fmt: skip
def test_a_plateau_ends_at_the_first_batch_below_the_mark_or_never(errors, length):
    assert function("03", "plateau", np=np, math=math, leaves_below=0.7)(errors) == length


def gradients_of(x, y):
    named = {"differentiating": differentiating, "evaluation": evaluation, "curvature": curvature, "np": np,
             "settings": {"batch_size": 2}, "attack_of": None, "x": x, "y": y}  # fmt: skip
    return function("03", "gradients", **named)(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), 0.0, 2)


def test_full_and_mini_batch_gradient_agree_for_equal_batches_and_part_for_opposite_ones():
    torch.manual_seed(0)
    x, y = torch.rand(2, 1, 2, 2), torch.tensor([0, 1])
    alike = gradients_of(torch.cat([x, x]), torch.cat([y, y]))
    assert alike["full"] == pytest.approx(alike["batch"], rel=1e-6) and alike["full"] > 0.01
    x = torch.rand(1, 1, 2, 2).expand(4, 1, 2, 2)  # of one image with every label: the sum nearly cancels
    apart = gradients_of(x, torch.tensor([0, 0, 1, 1]))
    assert apart["full"] < 0.5 * apart["batch"]


def test_the_drop_is_from_the_start_and_never_negative():
    drop = function("05", "drop")
    assert drop(pd.Series([(s - 0.3) ** 2 for s in np.linspace(0, 1, 11)])) == pytest.approx(0.09)
    assert drop(pd.Series([1.0, 2.0, 3.0])) == 0


@pytest.mark.parametrize("rise, level, expected", [
    (lambda s: 2 * s, 1, 0.5), (lambda s: 2 * s, 0.3, 0.15), (lambda s: 2 * s, 2, 1.0),  # straight: between the points
    (lambda s: 0.1 * s, 1, 1.0),  # never: the longest step
    (lambda s: 4 * s * (s < 0.5), 1, 0.25),  # the first crossing counts
])  # fmt: skip
def test_the_reach_is_the_first_step_at_which_the_loss_has_risen(rise, level, expected):
    step = pd.Series(np.linspace(0, 1, 9))
    line = pd.DataFrame({"step": step, "rise": step.map(rise)})
    assert function("05", "reach")(line, level) == pytest.approx(expected)


def pairs_of(model, images, eps):
    names = {"torch": torch, "F": F, "trained": {"a": SimpleNamespace(model=lambda: model)}, "tie_images": len(images),
             "digits": SimpleNamespace(x_test=images, y_test=torch.zeros(len(images), dtype=torch.long)),
             "tie_steps": 20, "attack_of": lambda kind, e, **more: partial(pgd, eps=e, norm=kind, **more)}  # fmt: skip
    return function("02", "maximisers", **names)("a", "linf", eps)


class Even(nn.Module):
    """Logits in which -x and x are equally bad: each of two corners is worst, with gradients of its own."""

    def __init__(self, signs):
        super().__init__()
        self.weights, self.signs = nn.Parameter(torch.ones(2, 4)), signs

    def forward(self, x):
        ends = (x.flatten(1) - 0.5) @ self.weights.T * self.signs
        return torch.stack([torch.zeros(len(x)), 5 * ends.amax(1)], 1)


def test_two_maximisers_have_different_gradients_where_two_units_win_and_one_has_no_rival():
    images = torch.full((40, 1, 2, 2), 0.5)
    two = pairs_of(Even(torch.tensor([1.0, -1.0])), images, 0.2)
    assert len({i for i, _ in two}) > 10 and all(distance > 1 for _, distance in two)
    assert pairs_of(Even(torch.tensor([1.0, 1.0])), images, 0.2) == []  # one worst input: no pair is apart


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_gap_of_the_loss_lies_between_its_bounds_and_not_between_those_of_another_eps_bar(norm):
    gap_bounds = function("01", "gap_bounds", np=np, linear=linear)
    y = np.arange(12) % 2
    x = np.random.default_rng(0).normal(size=(12, 2)) + 2 * y[:, None]
    limit = linear.eps_bar(x, y, norm=norm, bias=False)
    for ratio in (0.5, 0.9):
        best = linear.minimize(x, y, eps=ratio * limit, norm=norm, bias=False)
        gap = np.log(2) - best.loss
        low, high = gap_bounds(best.W, x, y, ratio * limit, limit, norm)
        assert 0 < low <= gap <= high
        assert gap > gap_bounds(best.W, x, y, ratio * limit, (ratio + 0.2 * (1 - ratio)) * limit, norm)[1]
