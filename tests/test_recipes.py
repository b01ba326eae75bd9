"""Recipes: what is asked for by name, and what is refused before anything runs."""

import pytest
import torch

from lib import data, recipes
from lib.settings import SettingError
from lib.training import TrainConfig


def test_every_recipe_makes_a_config():
    for name in recipes.RECIPES:
        config = recipes.configure(recipes.get(name), eps=0.1, schedule="cosine", seed=3)
        assert (config.eps, config.seed, config.step_size) == (0.1, 3, 0.1 * recipes.get(name)["step_fraction"])
        assert config.schedule_stop == pytest.approx(0.1 * recipes.get(name)["stops"]["cosine"])


def test_changes_go_before_the_recipe_and_leave_it_alone():
    changes = {"lenet on mnist5k": {"width": 1, "step_fraction": 0.25}}
    settings = recipes.get("lenet on mnist5k", changes)
    config = recipes.configure(settings, eps=0.2, epochs=2, step_size=0.01)
    assert (config.width, config.step_size, config.epochs) == (1, 0.01, 2)
    assert recipes.configure(settings, eps=0.2).step_size == pytest.approx(0.05)
    assert recipes.get("lenet on mnist5k")["width"] != 1
    settings["width"] = 99
    assert recipes.get("lenet on mnist5k", changes)["width"] == 1


def test_a_step_size_of_a_recipe_goes_before_its_fraction_of_eps():
    settings = recipes.get("lenet on mnist5k", {"lenet on mnist5k": {"step_size": 0.01}})
    assert recipes.configure(settings, eps=0.4).step_size == 0.01
    for nothing in (0, None):
        settings = recipes.get("lenet on mnist5k") | {"step_fraction": nothing}
        with pytest.raises(ValueError, match="neither a step_fraction above 0 nor a step_size"):
            recipes.configure(settings, eps=0.4)


def test_what_a_change_does_not_name_stays():
    changes = {"lenet on few digits": {"stops": {"cosine": 1.0}, "plan": {"queries": 50}}}
    settings, before = recipes.get("lenet on few digits", changes), recipes.get("lenet on few digits")
    assert settings["stops"] == before["stops"] | {"cosine": 1.0} and before["stops"]["cosine"] == 1.5
    assert settings["plan"] == before["plan"] | {"queries": 50}


def test_computed_and_written_numbers_name_one_run():
    settings = recipes.get("lenet on mnist5k")
    computed = recipes.configure(settings, eps=0.4, schedule="cosine")
    assert computed == recipes.configure(settings, eps=0.4, schedule="cosine", schedule_stop=0.6)


@pytest.mark.parametrize("name, changes, message", [
    ("lenet", None, "no recipe 'lenet': there are lenet on mnist5k"),
    ("lenet on mnist5k", {"vgg": {}}, "no recipe 'vgg'"),
    ("lenet on mnist5k", {"lenet on mnist5k": {"epoch": 3}}, "has no setting 'epoch': there are"),
    ("lenet on mnist5k", {"lenet on mnist5k": {"lr": "1e-4"}}, "lr of 'lenet on mnist5k' is '1e-4': write numbers"),
    ("lenet on mnist5k", {"lenet on mnist5k": {"lr": float("nan")}}, "is nan, but should be a number; write numbers"),
    ("lenet on mnist5k", {"lenet on mnist5k": None}, "changes of 'lenet on mnist5k' are None, but should be {setting"),
    ("lenet on mnist5k", {"lenet on mnist5k": {"images": 100}}, "images of 'lenet on mnist5k' is 100"),
    ("lenet on mnist5k", {"lenet on mnist5k": {"images": ["1e3", 500]}}, "two whole numbers of at least 1, or"),
    ("lenet on mnist5k", {"lenet on mnist5k": {"images": [1e3, 500]}}, "two whole numbers of at least 1, or"),
    ("lenet on mnist5k", {"lenet on mnist5k": {"eps": 0.1}}, "eps of 'lenet on mnist5k' is the notebook's"),
    ("lenet on mnist5k", {"lenet on mnist5k": {"seed": 1}}, "seed of 'lenet on mnist5k' is the notebook's"),
    ("lenet on mnist5k", {"lenet on mnist5k": {"schedule": "linear"}}, "schedule of .* is the arm's: no recipe"),
    ("lenet on mnist5k", {"lenet on mnist5k": {"restarts": [2]}}, "restarts of .* are the arm's, by periods"),
    ("lenet on mnist5k", {"lenet on mnist5k": {"schedule_stop": 1.0}}, "schedule_stop .* follows from stops and eps"),
])  # fmt: skip
def test_refused(name, changes, message):
    with pytest.raises(ValueError, match=message):
        recipes.get(name, changes)


@pytest.mark.parametrize("change, message", [
    ({"plan": {"strong_images": -1}}, "plan of .*: strong_images is -1, but should be above 0"),
    ({"plan": {"queries": 0}}, "queries is 0, but should be above 0"),
    ({"plan": {"step_fraction": float("inf")}}, "step_fraction is inf, but should be above 0"),
    ({"plan": {"pgd_images": 8.5}}, "pgd_images is 8.5, but should be a whole number"),
    ({"plan": {"width": 3}}, "plan of .*: no name 'width': there are steps"),
    ({"stops": {"cosine": 0}}, "stops of .*: cosine is 0, but should be above 0"),
    ({"stops": {"epochs": 3}}, "stops of .*: no name 'epochs': there are linear, cosine"),
    ({"set_aside": -1}, "set_aside of .* is -1, but should be a whole number of at least 0"),
    ({"set_aside": 0.5}, "set_aside of .* is 0.5, but should be a whole number"),
    ({"periods": [0, 2]}, r"periods of .* is \[0, 2\], but should be whole numbers of at least 1"),
    ({"images": [5]}, r"images of .* is \[5\], but should be two whole numbers of at least 1, or null"),
    ({"images": [5, 6, 7]}, "but should be two whole numbers"),
    ({"images": [0, None]}, "but should be two whole numbers"),
    ({"dataset": "nowhere"}, "dataset of .* is 'nowhere', but should be one of mnist5k, .*, or the path of a folder"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["lenet on mnist5k", "lenet on few digits"])
def test_what_nothing_can_be_made_of_is_refused(name, change, message):
    for asked in (name, "vgg16 on cifar10"):
        with pytest.raises(SettingError, match=message):
            recipes.get(asked, {name: change})


def test_whole_fractions_are_whole_numbers_or_refused(tmp_path, monkeypatch):
    name = "lenet on few digits"
    change = {"plan": {"pgd_images": 8.0}, "set_aside": 10.0, "periods": (1.0, 2), "epochs": 5.0}
    settings = recipes.get(name, {name: change})
    found = settings["plan"]["pgd_images"], settings["set_aside"], *settings["periods"], settings["epochs"]
    assert found == (8, 10, 1, 2, 5) and {type(value) for value in found} == {int}
    with pytest.raises(SettingError, match=r"is \[1.0\], but should be whole numbers"):  # it has none to go by
        recipes.get("lenet on mnist5k", {"lenet on mnist5k": {"periods": [1.0]}})
    (tmp_path / "photographs").mkdir()
    monkeypatch.chdir(tmp_path)
    for folder in ("photographs", "./photographs", "/of/another/machine"):
        assert recipes.get(name, {name: {"dataset": folder}})["dataset"] == folder


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_the_misread_cosine_differs_from_the_cosine_in_its_unit_alone(name):
    right, misread = (recipes.configure(recipes.get(name), schedule=schedule, eps=0.3).budget()
                      for schedule in ("cosine", "cosine_misread"))  # fmt: skip
    assert all(misread(t / 9) == (right(t / 9) if 255 * right(t / 9) >= 1 else 255 * right(t / 9)) for t in range(99))


def test_configure_refuses_names_it_does_not_know():
    with pytest.raises(ValueError, match="unknown setting epoch: there are"):
        recipes.configure(recipes.get("lenet on mnist5k"), eps=0.1, epoch=3)


def test_images_set_aside_are_training_images_that_are_not_trained_on(digits):
    whole, none = recipes.load({"dataset": "mnist5k", "images": [100, 50]})
    assert none is None and len(whole.y_train) == 100
    rest, aside = recipes.load({"dataset": "mnist5k", "images": [100, 50], "set_aside": 30})
    assert torch.equal(rest.x_train, digits.x_train[:70]) and torch.equal(rest.x_test, digits.x_test[:50])
    assert torch.equal(aside.x_test, digits.x_train[70:100]) and torch.equal(aside.x_train, rest.x_train)
    assert "30 training images set aside" in aside.source


@pytest.mark.parametrize("images, first", [([100, 50], 100), ([None, 50], 4000)])
def test_more_images_are_none_that_a_run_learns_from_or_chooses_by(digits, images, first):
    settings = {"dataset": "mnist5k", "images": images, "set_aside": 30}
    seen = {x.numpy().tobytes() for part in recipes.load(settings) for x in part.x_train}
    seen |= {x.numpy().tobytes() for x in recipes.load(settings)[1].x_test}
    more = recipes.more(settings, n := 5000 - first)
    assert len(more.y_test) == n and not seen & {x.numpy().tobytes() for x in more.x_test}
    assert data.again(more.origin).fingerprint == more.fingerprint
    with pytest.raises(ValueError, match=f"cannot take {n + 1} of 1000 test images and {n - 1000} training images"):
        recipes.more(settings, n + 1)


def test_what_stands_beside_a_config_is_no_field_of_it():
    assert not recipes.BESIDE & set(TrainConfig.__dataclass_fields__)


def test_a_tuple_is_a_list():
    assert recipes.get("vgg16 on cifar10", {"vgg16 on cifar10": {"periods": (8, 16)}})["periods"] == [8, 16]
