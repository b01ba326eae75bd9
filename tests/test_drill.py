"""The drill: what a machine does to work in progress, done on purpose. After it the next run ends as an undisturbed
one, to the bit, or the fault is named; nothing is lost and nothing damaged is used.

A few of each run with the other tests; `./run_all.sh --test -n 0 -m "drill or not drill" tests/test_drill.py` runs all
and writes build/drill.md, the table in benchmarks/drill.md.
"""

import contextlib
import ctypes
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lib import data, runs, training
from lib.files import read_json, write_json
from lib.training import TrainConfig, train

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "tools"
sys.path.insert(0, str(TOOLS))

import gallery  # noqa: E402
from layout import Layout  # noqa: E402

CONFIG = TrainConfig(width=1, eps=0.1, step_size=0.05, num_steps=1, epochs=4, batch_size=20, eval_images=10, lr=1e-3,
                     restarts=(2,), keep_every=3)  # fmt: skip
CONTEXT = multiprocessing.get_context("fork")  # a kill hits the work, not seconds of imports
DONE = {}  # {drill: [how often tried, how often it ended well]}
drill = pytest.mark.drill


@contextlib.contextmanager
def tried(what):
    """Count a try, and its good end."""
    DONE.setdefault(what, [0, 0])[0] += 1
    yield
    DONE[what][1] += 1


@pytest.fixture(scope="module", autouse=True)
def table():
    yield
    record = ROOT / "build" / "drill.json"
    every = (read_json(record) if record.exists() else {}) | DONE  # of each drill the last time that it was run
    write_json(record, every)
    rows = [f"| {what} | {n} | {well} | {n - well} |" for what, (n, well) in sorted(every.items())]
    head = "| drill | tried | ended as an undisturbed run, or named | lost, or used unnoticed |\n|---|---|---|---|\n"
    (ROOT / "build" / "drill.md").write_text(head + "\n".join(rows) + "\n")


def noise(n=80):
    x = torch.rand(n, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    return data.Data(x[20:], torch.arange(n)[20:] % 10, x[:20], torch.arange(20) % 10, "noise")


def train_in(folder):
    torch.set_num_threads(1)
    train(CONFIG, noise(), folder=folder)


def content(folder):
    """All that a finished run holds, but for when and how fast it was made."""
    models = {path.name: path.read_bytes() for path in folder.glob("model-*.safetensors")}
    assert not (folder / "checkpoint.safetensors").exists()
    assert read_json(folder / "made.json").keys() >= {"seconds", "device"}
    return models, read_json(folder / "run.json")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run that nothing disturbs: folder, content, and the seconds that it takes in a process of its own."""
    folder, start = tmp_path_factory.mktemp("undisturbed") / "run", time.monotonic()
    process = CONTEXT.Process(target=train_in, args=[folder])
    process.start()
    process.join()
    assert process.exitcode == 0 and len(content(folder)[0]) == 4  # after 0, 2, 3 and 4 epochs
    return folder, content(folder), time.monotonic() - start


def goes_on(folder, undisturbed):
    """The next run completes, and equals the undisturbed one."""
    train_in(folder)
    assert content(folder) == undisturbed[1]


def cut_off(folder, epochs=3):
    """A run that was interrupted after so many epochs."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        whole = training._State.train_epoch

        def train_epoch(state):
            if state.epoch == epochs:
                raise KeyboardInterrupt
            whole(state)

        patch.setattr(training._State, "train_epoch", train_epoch)
        train_in(folder)


# ---------------------------------------------------------------- kill -9


@pytest.mark.parametrize("times", [3, pytest.param(20, marks=drill)])
def test_a_training_run_is_killed_at_random_moments(tmp_path, undisturbed, times):
    moments, alive = random.Random(times), 0
    for i in range(times):
        with tried("kill -9 of a training run"):
            process = CONTEXT.Process(target=train_in, args=[tmp_path / str(i)])
            process.start()
            process.join(moments.uniform(0, undisturbed[2]))
            alive += process.is_alive()
            process.kill()
            process.join()
            goes_on(tmp_path / str(i), undisturbed)
    assert alive


def test_a_run_is_killed_again_and_again(tmp_path, undisturbed):
    with tried("kill -9 of one training run, until it is through"):
        for _ in range(40):
            process = CONTEXT.Process(target=train_in, args=[tmp_path / "run"])
            process.start()
            process.join(undisturbed[2] / 2)
            process.kill()
            process.join()
            if process.exitcode == 0:
                break
        goes_on(tmp_path / "run", undisturbed)


NOTEBOOK = """\
# %% [markdown]
# # Toy

# %% tags=["parameters"]
profile = "quick"
seed = 1

# %%
import torch
from lib import data, runs
from lib.training import TrainConfig

# %%
x = torch.rand(300, 1, 28, 28, generator=torch.Generator().manual_seed(0))
images = data.Data(x, torch.arange(300) % 10, x[:20], torch.arange(20) % 10, "noise")
config = TrainConfig(width=1, eps=0.1, step_size=0.05, num_steps=2, epochs=6, batch_size=20, eval_images=20, seed=seed)
run = runs.run(config, images)

# %%
print(runs.remember("looks", {"run": run.folder.name}, lambda: run.steps["loss"].tolist()))
"""


def project(root):
    """A project with one small notebook, which trains and remembers."""
    layout = Layout(root)
    layout.profiles.mkdir(parents=True)
    shutil.copy(ROOT / "notebooks" / "jupytext.toml", layout.notebooks)
    head = (ROOT / "notebooks" / "01_linear_models.py").read_text(encoding="utf-8").split("# %%")[0]
    (layout.notebooks / "01_toy.py").write_text(head + NOTEBOOK)
    (layout.profiles / "tiny.yaml").write_text("01_toy:\n  seed: 2\n")
    return layout


def start(layout, *before):
    command = [*before, sys.executable, str(TOOLS / "run.py"), "--root", str(layout.root), "--profile", "tiny"]
    env = {name: value for name, value in os.environ.items() if name not in ("RUNS_DIR", "FIGURES_DIR")}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
    words, _ = process.communicate(timeout=300)
    assert process.returncode == 0, words


def left(layout):
    """What a whole run leaves: the notebook with its outputs, and the run and value that it is made of."""
    cache = layout.build / "tiny" / "runs"
    (run,) = (path for path in cache.iterdir() if path.name.startswith("lenet"))
    values = [read_json(path)["value"] for path in cache.glob("looks/*.json")]
    return (layout.build / "tiny" / "01_toy.ipynb").read_bytes(), content(run), values


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    layout = project(tmp_path_factory.mktemp("whole") / "project")
    begin = time.monotonic()
    finish(start(layout))
    return left(layout), time.monotonic() - begin


def family(process):
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(process.pid).children(recursive=True)
    return []


def kernels_of(process):
    """The runner has a server, which forks notebooks, which fork their kernels."""
    servers = [psutil.Process(process.pid)]
    with contextlib.suppress(psutil.NoSuchProcess):
        for _ in range(3):
            servers = [child for server in servers for child in server.children()]
    return servers


@drill
def test_the_runner_is_killed_at_random_moments(tmp_path, whole):
    moments = random.Random(1)
    for i in range(5):
        with tried("kill -9 of the runner of the notebooks"):
            layout = project(tmp_path / str(i))
            process = start(layout)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(moments.uniform(0, whole[1]))
            members = family(process)
            process.kill()
            process.communicate()
            assert not psutil.wait_procs(members, timeout=30)[1]  # nothing is left running
            finish(start(layout))
            assert left(layout) == whole[0]


@drill
def test_a_kernel_is_killed(tmp_path, whole):
    for i in range(3):
        with tried("kill -9 of a notebook's kernel"):
            layout = project(tmp_path / str(i))
            process = start(layout)
            while not (kernels := kernels_of(process)):
                time.sleep(0.05)
            time.sleep(random.Random(i).uniform(0, whole[1] / 3))
            with contextlib.suppress(psutil.NoSuchProcess):
                kernels[0].kill()
            process.communicate(timeout=300)
            finish(start(layout))
            assert left(layout) == whole[0]


# ---------------------------------------------------------------- a byte flipped, a file cut


def flip(at):
    def harm(content):
        i = int(at * (len(content) - 1))
        return content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :]

    return harm


FLIPS = {f"flip at {at}": flip(at) for at in (0, 0.001, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1)}
CUTS = {f"cut to {part}": lambda c, part=part: c[: int(part * len(c))] for part in (0, 0.001, 0.5, 0.9)}
HARMS = FLIPS | CUTS | {"one byte less": lambda c: c[:-1], "one byte more": lambda c: c + b"\1"}
QUICK = ("flip at 0.01", "flip at 0.5", "flip at 0.99", "cut to 0.5")
harms = pytest.mark.parametrize("harm", [harm if harm in QUICK else pytest.param(harm, marks=drill) for harm in HARMS])


def spoil(path, harm):
    path.write_bytes(HARMS[harm](path.read_bytes()))


def named_or_equal(path, read, expected):
    """Reading it names the file, or gives what was written."""
    try:
        found = read()
    except ValueError as error:
        assert path.name in str(error)
    else:
        assert found == expected


def everything(folder):
    run = train(CONFIG, noise(), folder=folder)
    states = [[(k, v.tolist()) for k, v in run.model(epoch).state_dict().items()] for epoch in (0, 3, 4)]
    return run.history.values.tolist(), run.steps.values.tolist(), run.made["seconds"], states


@harms
@pytest.mark.parametrize("name", ["model-3.safetensors", "run.json", "made.json"])
def test_a_file_of_a_finished_run(tmp_path, monkeypatch, undisturbed, name, harm):
    monkeypatch.setenv("RUNS_DIR", str(tmp_path))
    folder = tmp_path / f"lenet-constant-{runs.key(CONFIG, noise())}"
    with tried(f"a byte or a cut in {name.replace('model-3', 'a model').replace('.safetensors', '')}"):
        shutil.copytree(undisturbed[0], folder)
        expected = everything(folder)
        spoil(folder / name, harm)
        named_or_equal(folder / name, lambda: everything(folder), expected)
        runs.run(CONFIG, noise())  # found, or put aside and made anew
        *whole, _seconds, states = everything(folder)
        assert [*whole, states] == [*expected[:2], expected[3]]


@harms
def test_a_checkpoint(tmp_path, undisturbed, harm):
    with tried("a byte or a cut in a checkpoint"):
        cut_off(tmp_path / "run")
        spoil(tmp_path / "run" / "checkpoint.safetensors", harm)
        with pytest.warns(UserWarning, match="the run begins again"):
            goes_on(tmp_path / "run", undisturbed)


@harms
def test_a_remembered_value(tmp_path, monkeypatch, harm):
    with tried("a byte or a cut in a remembered value"):
        monkeypatch.setenv("RUNS_DIR", str(tmp_path))
        value = runs.remember("looks", {"a": 1}, lambda: [0.125, {"b": "é"}])
        (path,) = tmp_path.glob("looks/*.json")
        spoil(path, harm)
        named_or_equal(path, lambda: runs.remember("looks", {"a": 1}, lambda: None), value)


@harms
@pytest.mark.parametrize("kind", ["png", "csv", "json", "claims.json"])
def test_a_figure_a_table_a_record_a_ledger(tmp_path, kind, harm):
    from test_tools import add, claims, figure

    layout = Layout(tmp_path)
    layout.profiles.mkdir(parents=True)
    add(layout, "01_a")
    figure(layout, "quick", "01_slope")
    claims(layout, "quick")
    for path in layout.figures.rglob("*.json"):
        write_json(path, json.loads(path.read_text()))  # as the notebooks write them
    path = layout.figures / "quick" / ("01_a.claims.json" if "claims" in kind else f"01_slope.{kind}")
    expected = gallery.page(layout)
    with tried(f"a byte or a cut in a figure's {kind}" if "claims" not in kind else "a byte or a cut in a ledger"):
        spoil(path, harm)
        named_or_equal(path, lambda: gallery.page(layout), expected)


@harms
@pytest.mark.parametrize("kind", ["png", "jpg", "bmp"])
def test_an_image(tmp_path, kind, harm):
    """A format without a checksum cannot tell a flipped bit from another picture: then it is another data set."""
    for place in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / place).mkdir(parents=True)
        pixels = np.random.default_rng(len(place)).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / place / f"0.{kind}")
    before = data.image_folder(tmp_path)
    path = tmp_path / "train" / "a" / f"0.{kind}"
    with tried("a byte or a cut in an image: named, or another data set"):
        spoil(path, harm)
        try:
            after = data.image_folder(tmp_path)
        except data.DataCorrupted as error:
            assert f"0.{kind}" in str(error) or "differ in size" in str(error)
        else:
            same = torch.equal(before.x_train, after.x_train)
            assert (after.fingerprint == before.fingerprint) == same


# ---------------------------------------------------------------- two at once, other users, other folders, other clocks


def grid_in(folder, seeds):
    os.environ["RUNS_DIR"] = str(folder)
    torch.set_num_threads(1)
    found = runs.grid([replace(CONFIG, seed=seed) for seed in seeds], noise())
    runs.remember("looks", {"runs": [run.folder.name for run in found]}, lambda: [run.made["seconds"] for run in found])


def test_two_whole_runs_at_once_in_one_folder(tmp_path):
    with tried("two whole runs at once in one folder"):
        seeds = [0, 1, 2]
        processes = [CONTEXT.Process(target=grid_in, args=[tmp_path / "both", order]) for order in (seeds, seeds[::-1])]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        grid_in(tmp_path / "alone", seeds)
        assert [process.exitcode for process in processes] == [0, 0]
        names = sorted(path.name for path in (tmp_path / "alone").glob("lenet*"))
        assert names == sorted(path.name for path in (tmp_path / "both").glob("lenet*")) and len(names) == 3
        assert all(content(tmp_path / "alone" / name) == content(tmp_path / "both" / name) for name in names)


@drill
def test_two_runners_at_once_in_one_project(tmp_path, whole):
    with tried("two runners of the notebooks at once in one project"):
        layout = project(tmp_path / "project")
        words = [process.communicate(timeout=300)[0] for process in [start(layout), start(layout)]]
        assert left(layout) == whole[0], words


def as_somebody_else(folder, ours, result):
    """Without root's right to write anywhere: files of another user may be read, and not written."""
    os.environ["RUNS_DIR"] = str(folder)
    torch.set_num_threads(1)
    noise().fingerprint, train_in(ours)  # all is imported by now
    os.setegid(65534)
    os.seteuid(65534)
    found = runs.run(CONFIG, noise())
    value = runs.remember("looks", {"a": 1}, lambda: "measured again")
    try:
        runs.run(replace(CONFIG, seed=5), noise())
        words = "trained"
    except OSError as error:
        words = str(error)
    os.seteuid(0)
    result.put((found.steps["loss"].tolist(), value, words))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_files_of_another_user_are_used_and_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    with (
        tried("files owned by another user, in a folder that cannot be written"),
        tempfile.TemporaryDirectory() as place,
    ):
        os.chmod(place, 0o755)
        monkeypatch.setenv("RUNS_DIR", place)
        run = runs.run(CONFIG, noise())
        runs.remember("looks", {"a": 1}, lambda: "measured")
        result = CONTEXT.SimpleQueue()
        process = CONTEXT.Process(target=as_somebody_else, args=[place, tmp_path / "mine", result])
        process.start()
        process.join()
        assert process.exitcode == 0
        losses, value, words = result.get()
        assert losses == run.steps["loss"].tolist() and value == "measured" and "Permission denied" in words
        assert place in words


@contextlib.contextmanager
def small_disk(folder, megabytes=8):
    """A file system of its own, or a reason to skip."""
    folder.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={megabytes}m".encode()):
        pytest.skip(f"no file system can be mounted here ({os.strerror(ctypes.get_errno())})")
    try:
        yield folder
    finally:
        libc.umount2(os.fsencode(folder), 2)


@pytest.mark.parametrize("pages", [0, 30, 60, *(pytest.param(n, marks=drill) for n in range(4, 100, 8))])
def test_a_full_disk(tmp_path, undisturbed, pages):
    """So many pages of 4 KiB are free: it fills at the first model, at a checkpoint or at the record."""
    with small_disk(tmp_path / "disk") as disk, tried("a full disk"):
        filler = disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb") as file:
            while True:
                file.write(b"x" * 4096)
                file.flush()
        os.truncate(filler, max(filler.stat().st_size - 4096 * pages, 0))
        try:
            train_in(disk / "run")
        except OSError as error:
            assert str(disk / "run") in str(error) and "No space left" in str(error)
        else:
            assert pages > 60
        filler.unlink()
        goes_on(disk / "run", undisturbed)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_a_read_only_disk(tmp_path, undisturbed):
    """What is finished is found there; what would be written is refused by name."""
    with small_disk(tmp_path / "disk") as disk, tried("a read-only disk"), pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUNS_DIR", str(disk))
        losses = runs.run(CONFIG, noise()).steps["loss"].tolist()
        runs.remember("looks", {"a": 1}, lambda: "measured")
        damaged = runs.run(replace(CONFIG, seed=6), noise()).folder / "run.json"
        damaged.write_bytes(damaged.read_bytes()[:-20])
        assert ctypes.CDLL(None).mount(b"", os.fsencode(disk), b"", 32 | 1, None) == 0  # again, read-only
        assert runs.run(CONFIG, noise()).steps["loss"].tolist() == losses
        assert runs.remember("looks", {"a": 1}, lambda: "measured again") == "measured"
        with pytest.raises(OSError, match=r"Read-only file system.*disk"):
            runs.run(replace(CONFIG, seed=5), noise())
        with pytest.raises(ValueError, match=r"is damaged and cannot be moved .*Read-only file system"):
            runs.run(replace(CONFIG, seed=6), noise())


@drill
def test_no_network(tmp_path, whole):
    if subprocess.run(["unshare", "-n", "true"], capture_output=True, check=False).returncode:
        pytest.skip("networks cannot be taken away here")
    with tried("no network, not even to this machine"):
        layout = project(tmp_path / "project")
        finish(start(layout, "unshare", "-n"))
        assert left(layout) == whole[0]


@pytest.mark.parametrize("stamp", [0, 2**31])
def test_the_clock_is_set_back(tmp_path, monkeypatch, undisturbed, stamp):
    with tried("the clock set back, or far ahead"):
        cut_off(tmp_path / "run")
        for path in (tmp_path / "run").iterdir():
            os.utime(path, (stamp, stamp))
        monkeypatch.setattr(time, "time", lambda: float(stamp))
        goes_on(tmp_path / "run", undisturbed)


PATHS = [
    "a b",
    "é ü 数",
    "100%",
    "%(x)s %s",
    "a:b",
    "#1",
    "it's",
    '"q"',
    "{x}",
    "[a]*?",
    "~x",
    "$HOME",
    "-x",
    "a\\b",
]


@pytest.mark.parametrize("name", ["é ü 100% #1 a:b", "a\nb", *(pytest.param(path, marks=drill) for path in PATHS)])
def test_a_folder_with_a_hard_name(tmp_path, monkeypatch, undisturbed, name):
    with tried("folders with spaces, accents, %, : and the like"):
        monkeypatch.setenv("RUNS_DIR", str(tmp_path / name))
        cut_off(runs.runs_dir() / f"lenet-constant-{runs.key(CONFIG, noise())}")
        run = runs.run(CONFIG, noise())
        assert content(run.folder) == undisturbed[1] and run.folder.parent == tmp_path / name
        assert load_file(run.folder / "model-4.safetensors").keys() == run.model().state_dict().keys()
        assert runs.remember("looks", {"a": 1}, lambda: 1) == runs.remember("looks", {"a": 1}, lambda: 2) == 1
        for place in ("train/a", "train/b", "test/a", "test/b"):
            (tmp_path / name / "images" / place).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / name / "images" / place / f"{name}.png")
        assert len(data.load(str(tmp_path / name / "images")).y_train) == 2


@drill
@pytest.mark.parametrize("name", ["é ü 100% #1 a:b", "it's {x} [a]*? $HOME"])
def test_a_project_with_a_hard_name(tmp_path, whole, name):
    with tried("a project in a folder with quotes, braces, $, % or accents"):
        layout = project(tmp_path / name)
        finish(start(layout))
        assert left(layout) == whole[0]


@drill
@pytest.mark.parametrize("turn", range(10))
def test_a_cluster_killed_ten_times_in_a_row(turn):
    """In a process of its own each time: what one turn leaves behind is not to help the next."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "tests/test_cluster.py"]
    chosen = ["-k", "killed or long_to_come_back or two_grids"]
    done = subprocess.run(command + chosen, cwd=ROOT, capture_output=True, text=True, timeout=600)
    with tried("tests of a cluster whose workers or scheduler are killed, and of two grids at once, all five in a row"):
        assert done.returncode == 0, done.stdout  # 5 where no test has these names
