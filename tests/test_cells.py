"""Cells against hand-made ones: whatever comes in whatever order, and what does not belong is named."""

import json
import shutil
import sys
from fractions import Fraction
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from lib import cells, inference, recipes, training
from lib.attacks import pgd
from lib.cells import (
    budget,
    compare,
    masks,
    mistakes,
    notation,
    pair,
    path_of,
    places,
    rates,
    read,
    stuck,
    table,
    write,
)
from lib.evaluation import error, predict, robust_error
from lib.files import write_json
from lib.models import Ensemble
from lib.runs import run
from lib.training import TrainConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import dry_run
import profiles
from layout import Layout


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


class Bright(nn.Module):
    """Class 1 where the mean pixel is above a half, else 0."""

    def forward(self, x):
        z = x.flatten(1).mean(1) - 0.5
        return torch.stack([-z, z], 1)


def test_masks_by_hand():
    x = torch.tensor([0.2, 0.45, 0.55, 0.8]).view(4, 1, 1, 1).expand(4, 1, 2, 2).contiguous()
    y = torch.tensor([0, 0, 1, 0])  # the last one is wrong as it is
    seen = []

    def up(model, x, y):
        seen.append(len(x))
        return x + 0.1  # turns the second

    found = mistakes(Bright(), x, y, {"up": up, "down": lambda model, x, y: x - 0.1})
    assert {k: v.tolist() for k, v in found.items()} == {
        "clean": [False, False, False, True],
        "up": [False, True, False, True],
        "down": [False, False, True, True],
    }
    assert seen == [3]  # no attack on what is wrong already
    found = mistakes(Bright(), x, (x.mean((1, 2, 3)) < 0.5).long(), {"up": up})  # nothing left to attack
    assert found["up"].all() and seen == [3]


def test_masks_are_those_of_evaluation():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    x, y = torch.rand(40, 1, 4, 4), torch.randint(3, (40,))
    attack = partial(pgd, eps=0.1, step_size=0.05, num_steps=5, random_start=False)
    found = mistakes(net, x, y, {"pgd": attack})
    assert found["clean"].mean() == error(net, x, y)
    # A wrong image may be attacked back to its class: the definition counts it, for x itself is in the ball.
    assert found["pgd"].mean() >= robust_error(net, x, y, attack)


PLAN = {"steps": 1, "step_fraction": 0.5, "pgd_images": 8, "strong_steps": 1, "queries": 2, "strong_images": 4}
CONFIG = TrainConfig(eps=0.4, step_size=0.2, num_steps=1, epochs=4, lr=0.1)


def cell(arm="cosine", seed=0, lr=0.1, data="digits", wrong_images=(0, 3), **changes):
    """A cell as `make` would return it, with masks of 12 images."""
    config = {**training.asdict(CONFIG), "schedule": arm.split()[-1], "seed": seed, "lr": lr}
    mask = np.isin(np.arange(12), wrong_images)
    entry = {"n": 12, "wrong": np.packbits(mask).tobytes().hex()}
    entries = [
        entry | {"network": network, "part": part, "epochs": [4], "attack": attack}
        for network, part in (("end", "test"), ("epoch 4", "aside"))
        for attack in ("clean", "PGD-1")
    ]
    made = {"device": "a machine", "precision": "float32"}
    about = {"recipe": "lenet on mnist", "arm": arm, "version": training.VERSION, "data": data, "fingerprint": data,
             "plan": PLAN, "periods": [2, 3], "stops": {"cosine": 1.5}, "masks": entries,
             "made": {"training": made, "attacks": made}}  # fmt: skip
    return json.loads(json.dumps({**about, "config": config, **changes}))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "FIGURES", tmp_path / "figures")
    return tmp_path / "figures" / "overnight" / "cells"


def as_bytes(rows):
    return rows.assign(wrong=[w.tolist() for w in rows["wrong"]]).to_csv().encode()


def test_any_order_gives_equal_bytes(folder, tmp_path):
    made = [cell(arm, seed, lr) for arm in ("constant", "cosine") for seed in (0, 1) for lr in (0.1, 0.03)]
    for one in made:
        write(folder, one)
    first, notes = read()
    assert not notes and len(first) == 8 * 4
    files = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.json")}
    shutil.rmtree(folder)
    for one in reversed(made):
        write(folder, one)
    assert as_bytes(read()[0]) == as_bytes(first) == as_bytes(table(made[3:] + made[:3], "overnight"))
    assert {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.json")} == files
    assert masks(first, "cosine", 0.1)[1].tolist() == [i in (0, 3) for i in range(12)]


def test_a_cell_made_again_elsewhere_stays_as_it_is(folder):
    path = write(folder, cell())
    before = path.read_bytes()
    write(folder, cell(made={"training": {"device": "another", "precision": "bfloat16"}}))
    assert path.read_bytes() == before
    write(folder, cell(wrong_images=(1,)))
    assert path.read_bytes() != before


def test_what_does_not_belong_is_named_and_left_out(folder):
    good = write(folder, cell(seed=0))
    write(folder, cell(seed=1, version=training.VERSION + 1))
    write(folder, cell(seed=2)).write_text("{")
    shutil.copy(good, good.with_name("constant-lr0.1-seed0.json"))
    write(folder, {k: v for k, v in cell(seed=3).items() if k != "masks"})
    short = cell(seed=4)
    short["masks"][-1]["wrong"] = short["masks"][-1]["wrong"][:2]  # the last of its masks: none of the others stays
    write(folder, short)
    good.with_name("cosine-lr0.1-seed5.json").symlink_to("nowhere")
    good.with_name("cosine-lr0.1-seed6.json").mkdir()
    rows, notes = read()
    assert set(rows["seed"]) == {0} and set(rows["arm"]) == {"cosine"}
    causes = ("constant-lr0.1-seed0 is left out: its name is another cell's",
              f"cosine-lr0.1-seed1 is left out: it is of version {training.VERSION + 1}, and this is ",
              "cosine-lr0.1-seed2 is left out: ", "cosine-lr0.1-seed3 is left out: 'masks'",
              "cosine-lr0.1-seed4 is left out: a mask of 12 images has 1 bytes", "cosine-lr0.1-seed5 is left out: ",
              "cosine-lr0.1-seed6 is left out: ")  # fmt: skip
    assert len(notes) == len(causes) and all(c in note for c, note in zip(causes, notes, strict=True)), notes


@pytest.mark.parametrize("changes", [
    {"data": "digits, copied"}, {"plan": PLAN | {"steps": 2}},
    {"config": training.asdict(CONFIG) | {"schedule": "cosine", "seed": 1, "epochs": 8}},
])  # fmt: skip
def test_unlike_cells_are_rows_apart(folder, changes):
    write(folder, cell(seed=0))
    write(folder, cell(seed=2))
    write(folder, cell(seed=1, **changes))
    rows, notes = read()
    assert sorted(part["seed"].nunique() for _, part in rows.groupby("row")) == [1, 2]
    assert len(notes) == 1 and "are kept apart" in notes[0] and changes.get("data", "digits") in notes[0]


def test_profiles_are_rows_apart_and_two_masks_of_a_seed_are_refused(folder):
    write(folder, cell())
    other = folder.parents[1] / "gpu" / "cells"
    write(other, cell(wrong_images=(5,)))
    rows, notes = read()
    assert rows["row"].nunique() == 2
    where = "of 1 runs gpu and overnight have cells that differ, made on a machine, float32; each profile is judged by"
    assert len(notes) == 1 and where in notes[0]
    write(other, cell())  # of the same networks: nothing to be said
    assert not read()[1]
    write(other, cell(wrong_images=(5,)))
    with pytest.raises(ValueError, match="two masks of one seed: the cells are of more than one row"):
        masks(rows, "cosine", 0.1)


def test_comparisons_by_hand():
    rows = table([cell("cosine", s, wrong_images=(0,)) for s in (0, 1, 2)]
                 + [cell("constant", s, wrong_images=range(12)) for s in (1, 2, 3)]
                 + [cell("constant", 1, lr=0.03, wrong_images=(1, 2))])  # fmt: skip
    a, b, seeds = pair(masks(rows, "cosine", 0.1), masks(rows, "constant", 0.1))
    assert seeds == [1, 2] and a.shape == b.shape == (2, 12) and a.sum() == 2 and b.all()
    rule = inference.difference("error", margin=0.1)
    assert compare(rule, rows, ("cosine", 0.1), ("constant", 0.1)) == cells.judge(rule, a, b)
    assert cells.counted(rows, ("cosine", 0.1), ("constant", 0.1)) == (2, "2 seeds, 12 images")
    assert compare(rule, rows, ("cosine", 0.1), ("linear", 0.1)).why == "no cells of a common seed yet"
    assert stuck(rows, "constant", 0.1) == [1, 2, 3] and not stuck(rows, "constant", 0.03) + stuck(rows, "cosine", 0.1)
    assert rates(rows, "constant") == {0.03: {1: 2 / 12}, 0.1: {1: 1.0, 2: 1.0, 3: 1.0}}


def test_an_unknown_arm():
    with pytest.raises(ValueError, match="'cyclic cosine' is no arm"):
        cells.configure(recipes.get("lenet on few digits"), "cyclic cosine", eps=0.4, seed=0)
    for name in ("", None):
        with pytest.raises(ValueError, match=f"unknown schedule '{name or ''}"):
            cells.configure(recipes.get("lenet on few digits"), name, eps=0.4, seed=0)
    with pytest.raises(ValueError, match="there is no arm 'periodic cosine': the recipe has no periods"):
        cells.configure(recipes.get("lenet on mnist5k"), "periodic cosine", eps=0.4, seed=0)
    config = cells.configure(recipes.get("lenet on few digits"), "periodic cosine", eps=0.4, seed=0)
    assert config.restarts == (2, 3) and config.schedule_stop == 0.6


def test_a_cell_holds_what_its_networks_do(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "runs"))
    changes = {"width": 1, "images": [100, 20], "set_aside": 20, "epochs": 3, "periods": [1, 2], "num_steps": 1,
               "plan": PLAN}  # fmt: skip
    settings = recipes.get("lenet on few digits") | changes
    data, aside = recipes.load(settings)
    args = "lenet on few digits", settings, "periodic cosine", data, aside
    made = cells.make(*args, eps=0.4, seed=1)
    assert not cells.stands(folder, *args[:4], eps=0.4, seed=1)
    path = write(folder, made)
    assert path == path_of(folder, made) and path.stem == "periodic-cosine-lr0.01-seed1"
    assert cells.stands(folder, *args[:4], eps=0.4, seed=1)
    assert not cells.stands(folder, *args[:4], eps=0.3, seed=1)
    assert {**cells.make(*args, eps=0.4, seed=1), "made": 0} == {**made, "made": 0}
    trained = run(cells.configure(settings, "periodic cosine", eps=0.4, seed=1), data)
    rows = table([made])
    for network, epochs in (("end", [3]), ("ensemble", [1, 2, 3])):
        expected = predict(Ensemble([trained.model(e) for e in epochs]), data.x_test[:8]).argmax(1) != data.y_test[:8]
        assert masks(rows, "periodic cosine", 0.01, network, kind="clean")[1].tolist() == expected.tolist()
    best = rows[(rows.part == "aside") & (rows.kind == "PGD")]
    errors = {e[0]: w.mean() for e, w in zip(best["epochs"], best["wrong"], strict=True)}
    assert set(errors) == {1, 2, 3} and rates(rows, "periodic cosine") == {0.01: {1: errors[3]}}
    chosen = rows[(rows.network == "best") & (rows.kind == "PGD")]["epochs"].iloc[0]
    assert errors[chosen[0]] == min(errors.values())
    assert set(rows[rows.part == "strong"]["kind"]) == {"clean", "APGD CE", "APGD DLR", "Square"}
    more = recipes.more(settings, 1050)
    longer = cells.make(*args, more=more, eps=0.4, seed=1)
    assert longer["masks"][:-6] == made["masks"] and {e["network"] for e in longer["masks"][-6:]} == {"end"}
    assert longer["made"].keys() == {"training", "attacks", "more"} and longer["made"]["more"]["seconds"] > 0
    assert [e["n"] for e in longer["masks"][-6:]] == [1050] * 2 + [525] * 4  # half of PGD's images, as in the plan
    assert [e["part"] for e in longer["masks"][-6:]] == ["more"] * 2 + ["more strong"] * 4
    mask = masks(table([longer]), "periodic cosine", 0.01, part="more", kind="clean")[1]
    assert mask.tolist() == (predict(trained.model(3), more.x_test).argmax(1) != more.y_test).tolist()
    assert not cells.stands(folder, *args[:4], more=more, eps=0.4, seed=1)
    write(folder, longer)
    assert cells.stands(folder, *args[:4], eps=0.4, seed=1)
    assert cells.stands(folder, *args[:4], more=more, eps=0.4, seed=1)
    assert not cells.stands(folder, *args[:4], more=recipes.more(settings, 1049), eps=0.4, seed=1)
    which = {"eps": 0.4, "lr": 0.01, "seed": 1}
    assert [dry_run.stands(folder, *args[:3], which, n) for n in (None, 1050, 1049)] == [True, True, False]


@pytest.mark.parametrize("norm, largest", [("linf", 0.3), ("l2", 3.0)])
def test_all_attacks_of_a_cell_are_in_the_norm_of_its_training(digits, norm, largest):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    x = digits.x_test[:8]
    y = net(x).argmax(1)  # so that none is broken as it is
    plan = {"steps": 5, "step_fraction": 0.5, "strong_steps": 5, "queries": 50}
    order = {"linf": torch.inf, "l2": 2}[norm]
    for name, attack in cells.attacks(largest, 0, norm=norm, **plan).items():
        moved = (attack(net, x, y) - x).flatten(1)
        assert (moved.norm(dim=1, p=order) <= largest + 1e-5).all(), name  # an attack in linf goes beyond it in l2
        assert norm == "l2" or moved.norm(dim=1).amax() > largest, name  # and one in l2 stays within it


def test_a_recipe_without_periods_or_images_set_aside_has_a_last_network_only(tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "runs"))
    settings = recipes.get("lenet on mnist5k in l2") | {"width": 1, "images": [64, 12], "epochs": 1, "num_steps": 1,
                                                        "eval_images": 12, "eval_every": 1, "plan": PLAN}  # fmt: skip
    data, aside = recipes.load(settings)
    made = cells.make("lenet on mnist5k in l2", settings, "cosine", data, aside, eps=3.0, lr=3e-3, seed=0)
    assert made["config"]["norm"] == "l2" and {e["network"] for e in made["masks"]} == {"end"}
    by, first = cells.by_attack(table([made]))
    assert first.keys() == {"clean", "PGD", "APGD CE", "APGD DLR", "Square", "worst"} and len(by["PGD"]) == 8
    assert all((first["worst"] >= mask).all() and len(mask) == 4 for mask in first.values())


def test_of_more_images_is_judged_where_as_many_seeds_have_them():
    def rows(*seeds):
        of = [cell(arm, s, wrong_images=(s,)) for arm in ("cosine", "constant") for s in (0, 1)]
        for made in of:
            if made["config"]["seed"] in seeds:
                made["masks"].append(next(m for m in made["masks"] if m["network"] == "end") | {
                    "part": "more", "attack": "PGD-10", "n": 24, "wrong": "ff0000"})  # fmt: skip
        return table(of)

    for seeds, images in (((), 12), ((0,), 12), ((0, 1), 24)):
        a, b, common = cells.both(rows(*seeds), ("cosine", 0.1), ("constant", 0.1))
        assert common == [0, 1] and a.shape == b.shape == (2, images) and (images == 12 or a[:, :8].all())
        said = "2 seeds, 24 images, 12 of them not of the recipe" if images > 12 else "2 seeds, 12 images"
        assert cells.counted(rows(*seeds), ("cosine", 0.1), ("constant", 0.1)) == (2, said)
    assert cells.both(rows(0, 1), ("cosine", 0.1), ("constant", 0.1), kind="clean")[0].shape == (2, 12)
    assert cells.both(rows(0, 1), ("cosine", 0.1, "ensemble"), ("constant", 0.1))[0].shape[1] != 24


@pytest.mark.parametrize("change", [{"stops": {"cosine": 0.1}}, {"periods": [1, 2]}])
def test_cells_whose_budgets_go_elsewhere_or_begin_again_elsewhere_are_another_row(folder, change):
    for seed in range(4):
        write(folder, cell(seed=seed, **(change if seed > 1 else {})))
    rows, notes = read()
    assert rows.groupby("row")["seed"].agg(set).tolist() in ([{0, 1}, {2, 3}], [{2, 3}, {0, 1}])
    assert len(notes) == 1 and "differ in data or settings, and are kept apart" in notes[0]


@pytest.mark.parametrize("change", [{"periods": [3, 2]}, {"periods": [2, 4]}, {"periods": [2, 2]}, {"epochs": 3},
                                    {"keep_every": 2}])  # fmt: skip
def test_periods_whose_networks_are_not_kept_are_refused_before_training(monkeypatch, digits, change):
    monkeypatch.setattr(cells.runs, "run", lambda *_: pytest.fail("it trains"))
    settings = recipes.get("lenet on few digits") | change
    with pytest.raises(ValueError, match=r"periods .* of 'lenet on few digits' must increase"):
        cells.make("lenet on few digits", settings, "cosine", digits, None, eps=0.4, seed=0)


def test_a_budget_is_written_as_people_write_it():
    assert [budget(e) for e in (8 / 255, 0.0313725490196, 16 / 255, 0.1, 0.4, 51 / 255, 0.0, 2.0, 1e-6)] == [
        "8/255", "8/255", "16/255", "0.1", "0.4", "0.2", "0", "2", "1e-06",
    ]  # fmt: skip


def test_where_two_arms_were_made_is_said_unless_each_seed_was_in_one_place():
    def rows(**devices):
        return pd.DataFrame([{"arm": arm, "lr": 0.1, "seed": seed, "device": device}
                             for arm, row in devices.items() for seed, device in enumerate(row) if device])  # fmt: skip

    asked = ("cosine", 0.1), ("constant", 0.1)
    assert places(rows(cosine="AB", constant="AB"), *asked) == ""
    assert places(rows(cosine="AA", constant="AB"), *asked) == "cosine on A; constant on A and B"
    assert places(rows(cosine="AB", constant="BA"), *asked) == "cosine on A and B; constant on A and B"
    assert places(rows(cosine=["A", "B"], constant=["A", None]), *asked) == ""  # there is no second pair


@pytest.mark.parametrize("means, best", [
    ({}, None), ({0.1: 0.5}, 0.1), ({0.1: 0.5, 0.3: 0.4}, 0.3), ({0.3: 0.5, 0.1: 0.504, 1.0: 0.7}, 0.3),
    ({0.1: 0.5, 0.3: 0.504, 1.0: 0.7}, 0.3), ({0.1: 0.5, 0.3: 0.506, 1.0: 0.7}, 0.1),
    ({1.0: 0.5, 0.3: 0.7, 3.0: 0.4}, 3.0),
])  # fmt: skip
def test_a_best_rate_inside_the_grid_goes_before_one_at_its_end_that_is_as_good(means, best):
    assert cells.best_rate(means, 0.005) == best


def test_the_differences_are_of_the_rates_that_each_arm_is_given():
    """The second arm errs on as many of four images as its rate says."""
    rows = pd.DataFrame([
        {"row": "a", "arm": arm, "lr": lr, "seed": seed, "network": network, "part": "test", "kind": "PGD",
         "wrong": np.arange(4) < lr, "device": "A"}
        for arm in ("cosine", "constant") for lr in (1, 2, 3) for seed in (0, 1) for network in ("end", "ensemble")
    ])  # fmt: skip
    rules = dict.fromkeys(cells.QUESTIONS, inference.difference("x", margin=0.01))
    found = {line["difference"]: line for line in cells.differences(rows, rules, {"cosine": 1, "constant": 3})}
    assert found.keys() == {"cosine - constant", "single run's checkpoints - its end"}  # the others' arms have no rate
    line = found["cosine - constant"]
    assert (line["lr"], line["second_lr"], line["mean"], line["seeds"]) == (1, 3, -0.5, 2)
    assert line["half"] is line["least"] is None and line["outcome"] == "undecided"  # of two seeds
    assert found["single run's checkpoints - its end"]["mean"] == 0
    assert list(cells.differences(rows, rules, {})) == []


def test_every_cell_that_the_overnight_profile_asks_for_is_committed():
    """So that its rows are shown whole to who has not the night."""
    asked = profiles.read_profile(Layout(), "overnight")["07_table1"]
    for item in asked["todo"]:
        for arm, seed in product(item["arms"], asked["seeds"][: item["seeds"]]):
            which = {"eps": float(Fraction(item["eps"])), "lr": item["lr"], "seed": seed}
            job = item["recipe"], recipes.get(item["recipe"]), arm, which, item.get("more")
            assert dry_run.stands(cells.FIGURES / "overnight/cells", *job), job


def test_a_cell_does_not_take_the_place_of_anothers(tmp_path):
    one = cell()
    path = write(tmp_path, one)
    before = path.read_bytes()
    for name in ("eps", "lr"):
        other = {**one, "config": one["config"] | {name: one["config"][name] * (1 + 1e-9)}}
        with pytest.raises(ValueError, match="another eps or learning rate"):
            write(tmp_path, other)
    assert path.read_bytes() == before


def test_a_row_says_with_how_many_seeds_it_was_read_before(folder):
    rows = cells.table([cell()])
    assert cells.looked(rows, 8, "best") == ""  # nothing is known of it
    write_json(folder / "looks.json", {cells.title(rows): {"best": [4, 6, 8, 10]}})
    assert cells.looked(rows, 8, "best") == "; read before with 4, 6"
    assert cells.looked(rows, 4, "best") == cells.looked(rows, 9, "range") == ""
    (folder / "looks.json").write_text("{")
    with pytest.raises(ValueError, match=r"looks\.json is truncated or corrupted"):
        cells.looked(rows, 8, "best")


def test_an_interval_that_says_nothing_is_left_away():
    """Of two seeds; and of three that differ so much that nothing is decided."""
    rule, never = inference.difference("error", margin=0.01), np.zeros((4, 1000))
    some = np.arange(1000) < 1000 * np.array([[0.1], [0.101], [0.102], [0.103]])
    assert rule(some[:2], never[:2]).holds is not None and "[" in rule(some[:2], never[:2]).measured
    found = cells.judge(rule, some[:2], never[:2])
    assert (found.outcome, found.holds, found.why) == ("undecided", None, "no interval is given below 3 seeds")
    assert found.measured.startswith("+0.1005 (these networks: ")
    assert cells.judge(rule, some[:1], never[:1]).why == found.why
    for n in (3, 4):
        assert cells.judge(rule, some[:n], never[:n]) == rule(some[:n], never[:n])  # decided, or narrow: as it is
    wide = np.arange(1000) < 1000 * np.array([[0.1], [0.3], [0.0]])
    found, whole = cells.judge(rule, wide, never[:3]), rule(wide, never[:3])
    assert whole.outcome == found.outcome == "undecided" and found.why == f"no result: {whole.why}"
    assert "[" in whole.measured and found.measured == whole.measured.replace(" [-0.742, +1]", "")


def rows_of(**of_arms):
    """The rows of two arms: of each a network per seed, which errs on 1 of 12 images ("."), on 11 ("x"), or on all."""
    wrong = {".": [3], "x": range(11), "X": range(12)}
    return table([cell(arm, seed, wrong_images=wrong[kind])
                  for arm, seeds in of_arms.items() for seed, kind in enumerate(seeds)])  # fmt: skip


@pytest.mark.parametrize("constant, cosine, holds, why", [
    ("xxxxxxxx", "........", True, ""),
    ("xxxxxx..", "........", True, ""),  # three in four
    ("xxxxx...", "........", None, "5 of 8 constant runs are on the plateau"),
    ("........", "........", None, "0 of 8 constant runs are on the plateau"),  # there was nothing to leave
    ("xxxxxxxx", "......xx", True, ""),
    ("xxxxxxxxxxxx", "........xxxx", None, "4 of 12 cosine runs are on the plateau"),  # though the mean is smaller
    ("xxxxxxxx", "XXXXXXXX", False, ""),  # none escapes
])  # fmt: skip
def test_an_escape_needs_a_plateau_on_which_most_constant_runs_stay_and_few_others(constant, cosine, holds, why):
    asked = ("cosine", 0.1), ("constant", 0.1)
    found = cells.escape(0.2)(rows_of(constant=constant, cosine=cosine), *asked)
    assert found.holds is holds and found.why == why
    assert "fewer than 75%" in cells.escape(0.2).text and "more than 25%" in cells.escape(0.2).text


def test_how_many_readings_without_one_seed_keep_a_verdict():
    rows, asked = rows_of(constant="x" * 12, cosine="." * 12), (("cosine", 0.1), ("constant", 0.1))
    assert cells.without_one(cells.escape(0.2), rows, *asked, seeds=range(12)) == "12 of 12"
    edge = rows_of(constant="xxxxxxxxx...", cosine="." * 12)  # without one of the nine fewer than three in four stay
    assert cells.without_one(cells.escape(0.2), edge, *asked, seeds=range(12)) == "3 of 12"

    def reading(rows):
        return inference.Finding("x", {0, 1} <= set(rows["seed"]), "")

    assert cells.without_one(reading, rows, seeds=range(12)) == "10 of 12 (2 turn it round)"
    assert cells.without_one(lambda rows: inference.Finding("undecided", None, ""), rows, seeds=range(12)) == ""
