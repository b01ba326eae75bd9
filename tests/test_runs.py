"""The cache: what names a run, and that nothing is trained twice."""

import contextlib
import errno
import fcntl
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from lib import compute, runs, training
from lib.data import Data
from lib.training import TrainConfig

CONFIG = TrainConfig(width=1, eps=0.1, step_size=0.05, num_steps=1, epochs=2, batch_size=20, eval_images=10)


def noise(seed=0):
    x = torch.rand(60, 1, 28, 28, generator=torch.Generator().manual_seed(seed))
    y = torch.arange(60) % 3
    return Data(x[:50], y[:50], x[50:], y[50:], "noise")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def trained(monkeypatch):
    """The runs that are really trained, epoch by epoch."""
    seen, whole = [], training._State.train_epoch
    monkeypatch.setattr(training._State, "train_epoch", lambda s: (seen.append((s.config.seed, s.epoch)), whole(s)))
    return seen


def test_found_again_without_training(folder, trained):
    first = runs.run(CONFIG, noise())
    assert trained == [(0, 0), (0, 1)]
    again = runs.run(replace(CONFIG), noise())
    assert trained == [(0, 0), (0, 1)]
    assert first.history.equals(again.history) and first.steps.equals(again.steps)
    assert torch.equal(first.model()[0].weight, again.model()[0].weight)
    assert [p.name for p in folder.iterdir()] == [f"lenet-constant-{runs.key(CONFIG, noise())}"]


def test_grid_keeps_the_order_and_goes_on_after_an_interruption(trained, monkeypatch):
    configs = [replace(CONFIG, seed=s) for s in (2, 0, 1)]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        whole = training._State.train_epoch

        def cut(state):
            if (state.config.seed, state.epoch) == (0, 1):
                raise KeyboardInterrupt
            whole(state)

        patch.setattr(training._State, "train_epoch", cut)
        runs.grid(configs, noise())
    assert trained == [(2, 0), (2, 1), (0, 0)]
    found = runs.grid(iter(configs), noise())
    assert trained == [(2, 0), (2, 1), (0, 0), (0, 1), (1, 0), (1, 1)]
    assert [r.config.seed for r in found] == [2, 0, 1]


def test_there_is_one_line_of_progress_at_a_time(capsys):
    runs.grid([replace(CONFIG, seed=s) for s in (0, 1)], noise())
    shown = capsys.readouterr().err
    assert "runs: " in shown and "seed 0: " not in shown and "seed 1: " not in shown
    runs.grid([replace(CONFIG, seed=2)], noise())
    shown = capsys.readouterr().err
    assert "runs: " not in shown and "seed 2: " in shown


def test_the_key_is_of_what_was_asked_for(monkeypatch):
    key = runs.key(CONFIG, noise())
    assert key == runs.key(replace(CONFIG), noise())
    others = [replace(CONFIG, seed=1), replace(CONFIG, lr=1e-3), replace(CONFIG, restarts=(1,))]
    keys = {key, *(runs.key(c, noise()) for c in others), runs.key(CONFIG, noise(1))}
    pixel, label = noise(), noise()
    pixel.x_test[0, 0, 0, 0] += 1e-3
    label.y_train[0] = 2
    keys |= {runs.key(CONFIG, pixel), runs.key(CONFIG, label)}
    monkeypatch.setattr(runs, "VERSION", 2)
    keys.add(runs.key(CONFIG, noise()))
    assert len(keys) == 8


def test_a_run_made_elsewhere_is_found_and_says_where(trained, monkeypatch):
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(compute, "hardware", lambda: {"device": "another", "threads": 64})
        runs.run(CONFIG, noise())
    assert runs.run(CONFIG, noise()).made["device"] == "another"
    assert len(trained) == 2


def test_the_journal_says_what_was_trained_and_what_was_found(folder):
    runs.journal.clear()
    runs.run(CONFIG, noise()), runs.run(CONFIG, noise())
    runs.remember("looks", {"a": 1}, lambda: 1), runs.remember("looks", {"a": 1}, lambda: 1)
    assert [entry["state"] for entry in runs.journal] == ["trained", "found", "measured", "remembered"]
    assert runs.journal[0]["made"]["threads"] == 1


def train_and_log(folder, number, start):
    """In a process of its own: want the same run as another process, and note the epochs trained here."""
    import os

    os.environ["RUNS_DIR"] = str(folder / "cache")
    seen, whole = [], training._State.train_epoch

    def slow(state):
        seen.append(state.epoch)
        time.sleep(0.3)
        whole(state)

    training._State.train_epoch = slow
    start.wait()
    run = runs.run(CONFIG, noise())
    (folder / f"{number}.json").write_text(json.dumps([seen, run.steps["loss"].tolist()]))


@pytest.mark.parametrize("damaged", [False, True])
def test_two_processes_that_want_one_run_train_it_once(tmp_path, damaged):
    if damaged:
        cut(runs.run(CONFIG, noise()).folder / "run.json")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lib.runs", "pytest"])
    start = context.Barrier(2)
    processes = [context.Process(target=train_and_log, args=(tmp_path, i, start)) for i in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    (a, losses), (b, same) = (json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2))
    assert sorted([a, b]) == [[], [0, 1]] and losses == same
    assert len(list((tmp_path / "cache").iterdir())) == 1 + damaged


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def held(folder, *but):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name not in (".lock", *but)}


@pytest.mark.parametrize("name, how", [
    (name, how) for name in ("run.json", "made.json", "model-0.safetensors", "model-2.safetensors")
    for how in (cut, Path.unlink, partial(Path.write_text, data="{}"))
    if (name, how) != ("run.json", Path.unlink)  # without its record it is not finished
])  # fmt: skip
def test_a_damaged_run_is_kept_aside_and_trained_anew(folder, trained, capsys, name, how):
    place = runs.run(CONFIG, noise()).folder
    whole = held(place, "made.json")
    words = f"{name} is missing; " if how is Path.unlink else f"{name} is "
    runs.journal.clear()
    for aside in (f"{place.name}.damaged", f"{place.name}.damaged-2"):
        how(place / name)
        left = held(place)
        capsys.readouterr()
        runs.run(CONFIG, noise(), quiet=True)
        (said,) = capsys.readouterr().out.splitlines()
        assert said.startswith(f"{place}: {words}")
        assert said.endswith(f"it is kept as {aside}, and the run is trained anew")
        assert held(folder / aside) == left and held(place, "made.json") == whole
    assert runs.run(CONFIG, noise()) and capsys.readouterr().out == ""
    assert [entry["state"] for entry in runs.journal] == ["trained", "trained", "found"]
    assert trained == 3 * [(0, 0), (0, 1)] and len(list(folder.iterdir())) == 3


def test_a_kill_while_a_damaged_run_is_moved_loses_nothing(folder, monkeypatch):
    place = runs.run(CONFIG, noise()).folder
    cut(place / "model-0.safetensors")
    (place / "checkpoint.safetensors").write_bytes(b"of a kill at the very end")
    before, rename = held(place), Path.rename
    for _ in before:  # killed after each file but the last
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            moved = []

            def once(path, target, moved=moved):
                if moved:
                    raise KeyboardInterrupt
                moved.append(rename(path, target))

            patch.setattr(Path, "rename", once)
            runs.run(CONFIG, noise())
    found = {}
    for aside in folder.glob("*.damaged*"):
        found |= held(aside)
    assert found == before and "checkpoint.safetensors" not in held(place)


def test_a_damaged_run_that_cannot_be_moved_is_named(folder, trained):
    place = runs.run(CONFIG, noise()).folder
    cut(place / "run.json")
    (place / ".lock").unlink(missing_ok=True)
    (place / ".lock").mkdir()  # as unwritable to root as a read-only disk
    with pytest.raises(ValueError, match=r"is damaged and cannot be moved \(.*\): rename it, and run again"):
        runs.run(CONFIG, noise())
    assert len(trained) == 2 and [path.name for path in folder.iterdir()] == [place.name]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EIO])
def test_a_disk_that_refuses_locks_is_named(folder, trained, monkeypatch, number):
    def refuse(*_args):
        raise OSError(number, os.strerror(number))

    place = runs.run(CONFIG, noise()).folder
    monkeypatch.setattr(fcntl, "flock", refuse)
    assert runs.run(CONFIG, noise()).folder == place  # what is there needs none
    words = rf"takes no files or no locks \({os.strerror(number)}\): set RUNS_DIR to a folder on another disk"
    with pytest.raises(OSError, match=f"{folder}/lenet-.* {words}") as caught:
        runs.run(replace(CONFIG, seed=1), noise())
    with pytest.raises(OSError, match=f"{folder}/looks {words}"):
        runs.remember("looks", {"a": 1}, lambda: 1)
    assert caught.value.errno == number
    cut(place / "run.json")
    with pytest.raises(ValueError, match=f"is damaged and cannot be moved .*{words}"):
        runs.run(CONFIG, noise())
    assert len(trained) == 2


@pytest.mark.parametrize("where", ["", "looks"])
def test_a_file_in_the_place_of_a_folder_is_named(folder, where):
    (folder / where).parent.mkdir(exist_ok=True)
    (folder / where).write_text("a file")
    with pytest.raises(OSError, match=f"{folder}/looks takes no files .*: set RUNS_DIR"):
        runs.remember("looks", {"a": 1}, lambda: 1)


def test_remember(folder):
    calls = []

    def look(**more):
        facts = {"run": "a", "attack": {"eps": 0.1}} | more.pop("facts", {})
        return runs.remember("looks", facts, lambda: (calls.append(1), (1.5, "x"))[1], **more)

    assert look() == look() == [1.5, "x"] and len(calls) == 1
    look(facts={"attack": {"eps": 0.2}})
    look(version=2)
    assert len(calls) == 3
    one = next((folder / "looks").glob("*.json"))
    one.write_text(one.read_text()[:-10])
    with pytest.raises(ValueError, match="is truncated or corrupted"):
        [look(), look(facts={"attack": {"eps": 0.2}}), look(version=2)]


def test_committed_values_are_read_wherever_they_were_made_and_new_ones_are_written_beside_them(folder, tmp_path):
    facts, figures, calls = {"run": "a"}, tmp_path / "figures", []

    def look(**more):
        return runs.remember("looks", facts, lambda: calls.append(1) or len(calls), **more)

    assert not runs.stands(None, "looks", facts) and not runs.stands(figures, "looks", facts)
    assert look() == look(committed=figures) == 1 and runs.stands(figures, "looks", facts)
    shutil.rmtree(folder)  # another machine
    assert look(committed=figures) == 1 and not folder.exists()
    assert [entry["state"] for entry in runs.journal[-4:]] == ["measured", "remembered", "committed", "committed"]
    assert not runs.stands(figures, "looks", facts, version=2) and not runs.stands(figures, "looks", {"run": "b"})
    assert look() == 2 and look(committed=figures) == 1  # each by its own
    next((figures / "looks").glob("*.json")).write_text("{")
    with pytest.raises(ValueError, match="is truncated or corrupted"):
        look(committed=figures)


def test_a_run_has_its_name_before_it_is_there(folder):
    name = runs.name(CONFIG, noise())
    assert not (folder / name).exists() and runs.run(CONFIG, noise()).folder == folder / name


def test_what_cannot_be_remembered_is_said_before_it_is_computed(folder):
    def never():
        raise AssertionError

    with pytest.raises(ValueError, match="JSON"):
        runs.remember("values", {"x": math.nan}, never)
    for kind in ("../values", "..", "", "."):
        with pytest.raises(ValueError, match="plain name"):
            runs.remember(kind, {"x": 1}, never)
    runs.remember("values", {"x": 1}, lambda: 2)
    (path,) = (folder / "values").glob("*.json")
    for text in ("[]", "{}"):
        path.write_text(text)
        with pytest.raises(ValueError):
            runs.remember("values", {"x": 1}, never)


def test_a_grid_trains_what_nobody_else_is_training_first(trained):
    configs = [replace(CONFIG, seed=s) for s in (0, 1)]
    place = runs.runs_dir() / f"lenet-constant-{runs.key(configs[0], noise())}"
    place.mkdir(parents=True)
    held = threading.Event()

    def hold():
        with FileLock(place / ".lock"):
            held.set()
            time.sleep(3)

    threading.Thread(target=hold).start()
    held.wait()
    assert runs.run(configs[0], noise(), wait=False) is None
    found = runs.grid(configs, noise())
    assert [r.config.seed for r in found] == [0, 1]
    assert [seed for seed, _ in trained] == [1, 1, 0, 0]


def test_a_record_names_the_commit_of_this_project_alone(tmp_path, monkeypatch):
    def commit(folder):
        (folder / "lib").mkdir(parents=True, exist_ok=True)
        for arguments in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
            subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=folder, check=True)
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=folder, capture_output=True, text=True)
        return head.stdout.strip()

    def said(folder):
        monkeypatch.setattr(compute, "ROOT", folder)
        return compute.commit.__wrapped__()

    own = commit(tmp_path / "project")
    commit(tmp_path / "other")
    copy = tmp_path / "other" / "a copy"
    (copy / "lib").mkdir(parents=True)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other" / ".git"))
    assert said(tmp_path / "project") == own and said(copy) == "unknown"
    (tmp_path / "project/lib/new.py").touch()
    assert said(tmp_path / "project") == f"{own} with changes"
    monkeypatch.setenv("PATH", "")
    assert said(tmp_path / "project") == "unknown"


def test_the_default_place_is_beside_lib(monkeypatch):
    monkeypatch.delenv("RUNS_DIR")
    assert runs.runs_dir() == Path(runs.__file__).parents[1] / "runs"
