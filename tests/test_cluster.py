"""Trainings on workers: the same bits as without, whatever dies; and what is wrong is said in a sentence."""

import errno
import os
import re
import resource
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from argparse import Namespace
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from safetensors import safe_open

from lib import cells, cluster, compute, data, recipes, runs
from lib.training import TrainConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import cluster as clusters

if os.environ.get("CI") != "true":
    pytest.importorskip("distributed")

ROOT = Path(__file__).resolve().parents[1]
CONFIG = TrainConfig(width=1, eps=0.1, step_size=0.05, num_steps=5, epochs=16, batch_size=20, eval_images=10)
CONFIGS = [replace(CONFIG, seed=seed) for seed in range(4)]
PATIENCE = 240


@pytest.fixture(scope="module")
def digits():
    return data.load("mnist5k").first(300, 50)


@pytest.fixture(scope="module")
def alone(digits, tmp_path_factory):
    """The weights of all runs, trained in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUNS_DIR", str(tmp_path_factory.mktemp("alone")))
        patch.setenv("OMP_NUM_THREADS", "1")  # as the workers have
        compute.fix_threads()
        return [weights(run) for run in runs.grid(CONFIGS, digits)]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "runs"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv(clusters.VARIABLE, raising=False)
    runs.journal.clear()
    return tmp_path / "runs"


def weights(run):
    return torch.cat([tensor.flatten() for tensor in run.model().state_dict().values()])


def asked(**options):
    return Namespace(**{"workers": None, "per_gpu": None, "slurm": None, "scheduler": None} | options)


class Watched:
    """A grid in a thread, and how far its runs are: no run ever goes back by an epoch, or is trained again."""

    def __init__(self, configs, digits):
        self.found, self.thread = None, threading.Thread(target=self.work, args=(configs, digits), daemon=True)
        self.epochs, self.finished = {}, {}
        self.thread.start()

    def work(self, configs, digits):
        self.found = runs.grid(configs, digits)

    def look(self):
        for path in runs.runs_dir().glob("*/checkpoint.safetensors"):
            try:
                with safe_open(path, framework="pt") as file:
                    epoch = int(re.search(r'"epoch": (\d+)', file.metadata()["about"]).group(1))
            except (OSError, RuntimeError):  # safetensors raises either
                assert not path.exists(), f"{path} cannot be read"
                continue  # it has just been finished
            assert epoch >= self.epochs.get(path, 0), f"{path} went back"
            self.epochs[path] = epoch
        for path in runs.runs_dir().glob("*/run.json"):
            assert self.finished.setdefault(path, path.stat().st_mtime_ns) == path.stat().st_mtime_ns, "trained twice"
        return sum(self.epochs.values())

    def wait_for(self, what):
        deadline = time.monotonic() + PATIENCE
        while not what():
            assert time.monotonic() < deadline, "nothing happens"
            time.sleep(0.05)

    def more(self):
        """Wait for another epoch, or for the end."""
        before = self.look()
        self.wait_for(lambda: self.look() > before or not self.thread.is_alive())

    def end(self):
        self.wait_for(lambda: self.look() >= 0 and not self.thread.is_alive())
        assert self.found is not None, "the grid has failed"
        return self.found


def workers_here():
    """The processes that are workers of a cluster in this one, less those that are dying."""

    def lives(process):
        """A fork of the process that forks, or, where there is none, a process begun anew."""
        try:
            own, above = (" ".join(one.cmdline()) for one in (process, process.parent() or process))
        except psutil.NoSuchProcess:  # psutil's zombies too
            return False
        return "spawn_main" in own or ("multiprocessing.forkserver" in own and own == above)

    return [p for p in psutil.Process().children(recursive=True) if lives(p)]


def test_workers_train_what_is_missing_with_the_same_bits(digits, alone):
    first = runs.run(CONFIGS[0], digits)
    with clusters.started(asked(workers=2)):
        found = runs.grid(CONFIGS, digits)
        jobs = [("lenet on few digits", SMALL, "cosine", {"eps": 0.1, "lr": 0.01, "seed": seed}) for seed in (0, 1)]
        loaded = {"lenet on few digits": recipes.load(SMALL)}
        cells.ahead(jobs, loaded)
    assert [torch.equal(weights(run), other) for run, other in zip(found, alone, strict=True)] == [True] * 4
    assert found[0].made == first.made
    assert [entry["state"] for entry in runs.journal] == ["trained", "found", "trained", "trained", "trained"]
    runs.journal.clear()
    recipe, settings, arm, changes = jobs[0]
    there = cells.make(recipe, settings, arm, *loaded[recipe], **changes)
    assert {entry["state"] for entry in runs.journal} == {"found", "remembered"}
    os.environ["RUNS_DIR"] += "-again"
    again = cells.make(recipe, settings, arm, *loaded[recipe], **changes)
    assert again | {"made": None} == there | {"made": None}


SMALL = recipes.get("lenet on few digits") | {
    "images": [200, 40], "set_aside": 50, "width": 1, "num_steps": 1,
    "plan": dict(steps=2, step_fraction=0.5, pgd_images=20, strong_steps=2, queries=5, strong_images=10),
}  # fmt: skip


def test_ten_workers_killed(digits, alone):
    with clusters.started(asked(workers=2)):
        watched, killed = Watched(CONFIGS, digits), 0
        while killed < 10 and watched.thread.is_alive():
            watched.more()
            if there := workers_here():
                os.kill(there[killed % len(there)].pid, signal.SIGKILL)
                killed += 1
        found = watched.end()
    assert killed == 10
    assert [torch.equal(weights(run), other) for run, other in zip(found, alone, strict=True)] == [True] * 4


def test_workers_that_take_long_to_come_back():
    """Longer than dask waits for them, which is half a second here (by default 15, a start of torch on a slow disk)."""
    import dask
    from distributed import Client

    short = dask.config.set({"distributed.deploy.lost-worker-timeout": "0.5s"})
    with short, clusters.started(asked(workers=2)):
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            for process in workers_here():
                process.kill()
            time.sleep(0.05)
        with Client(os.environ[clusters.VARIABLE], set_as_default=False) as client:
            assert client.submit(abs, -1).result(timeout=PATIENCE) == 1


@contextmanager
def scheduler(port, workers=2):
    """One started by hand, and its workers, which call themselves machines of another name."""
    dask = [sys.executable, "-m", "distributed.cli.dask_"]
    where = f"tcp://127.0.0.1:{port}"
    commands = [["scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard"]]
    commands += [["worker", where, "--nthreads", "1", "--no-dashboard", "--name", f"node{i}"] for i in range(workers)]
    started = [
        subprocess.Popen([*dask[:2], dask[2] + name, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                         cwd=ROOT, start_new_session=True) for name, *options in commands
    ]  # fmt: skip
    try:
        yield where, started
    finally:
        for process in started:
            with suppress(ProcessLookupError):  # nothing of it is left
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_the_scheduler_killed_and_started_again(digits, alone, monkeypatch):
    port = free_port()
    with scheduler(port) as (where, _):
        monkeypatch.setenv(clusters.VARIABLE, where)
        cluster.connect(PATIENCE).close()  # it has started, which may take longer than a grid waits for an answer
        watched = Watched(CONFIGS, digits)
        watched.more()
    with scheduler(port):
        found = watched.end()
    assert [torch.equal(weights(run), other) for run, other in zip(found, alone, strict=True)] == [True] * 4


def test_the_scheduler_alone_killed(digits, alone, monkeypatch):
    """Its workers end with it and do not come back: another one is started with workers of its own."""
    port = free_port()
    with scheduler(port) as (where, (first, *workers)):
        monkeypatch.setenv(clusters.VARIABLE, where)
        cluster.connect(PATIENCE).close()  # it has started, which may take longer than a grid waits for an answer
        watched = Watched(CONFIGS, digits)
        watched.more()
        first.kill()
        with scheduler(port, workers=0):
            watched.wait_for(lambda: watched.look() >= 0 and all(worker.poll() is not None for worker in workers))
        assert watched.thread.is_alive(), "done before it was to wait"
    with scheduler(port):
        found = watched.end()
    assert [torch.equal(weights(run), other) for run, other in zip(found, alone, strict=True)] == [True] * 4


def test_two_grids_at_once_on_one_folder(digits, alone):
    with clusters.started(asked(workers=2)):
        assert cluster.address()
        one, other = Watched(CONFIGS, digits), Watched(CONFIGS[::-1], digits)
        pairs = [*zip(one.end(), alone, strict=True), *zip(other.end(), alone[::-1], strict=True)]
    assert [torch.equal(weights(run), expected) for run, expected in pairs] == [True] * 8
    assert len(list(runs.runs_dir().glob("*/run.json"))) == 4
    assert not cluster.address(), "what comes after asks a scheduler that is gone"


def test_what_is_there_is_found_without_a_scheduler(digits, monkeypatch):
    """One that has ended since, say, with its allotted time."""
    few = replace(CONFIG, epochs=1, num_steps=1)
    made = runs.run(few, digits)
    monkeypatch.setenv(clusters.VARIABLE, f"tcp://127.0.0.1:{free_port()}")
    assert torch.equal(weights(runs.grid([few], digits)[0]), weights(made))
    cells.ahead([], {})


def test_what_goes_to_another_folder_or_comes_of_other_pixels_is_another_task(digits, monkeypatch, tmp_path):
    """Of one name a scheduler has one task, whatever its arguments: who asks second would find nothing."""
    names, job = [], ("lenet on few digits", recipes.get("lenet on few digits"), "cosine", {"eps": 0.1, "seed": 0})
    monkeypatch.setenv(clusters.VARIABLE, "tcp://127.0.0.1:1")
    monkeypatch.setattr(cluster, "each", lambda _function, tasks, _desc: names.extend(tasks))
    for folder, pixels in (("a", digits), ("b", digits), ("a", replace(digits, x_train=1 - digits.x_train))):
        monkeypatch.setenv("RUNS_DIR", str(tmp_path / folder))
        runs.ahead(CONFIGS[:1], pixels)
        cells.ahead([job], {job[0]: (pixels, None)})
    assert len(set(names)) == len(names) == 6


@pytest.fixture(scope="module")
def two():
    """A cluster of two workers, for tests that kill none; its address."""
    with clusters.started(asked(workers=2)):
        yield os.environ[clusters.VARIABLE]


def test_what_workers_cannot_do_is_said_in_a_sentence(two, digits, folder, monkeypatch, tmp_path):
    monkeypatch.setenv(clusters.VARIABLE, two)
    other = replace(digits, x_train=1 - digits.x_train)  # under the same name
    with pytest.raises(cluster.ClusterError, match=r"has other pixels of MNIST .* give all workers the same DATA_DIR"):
        runs.grid(CONFIGS, other)
    gone = replace(digits, origin=(str(tmp_path / "photographs"),))
    with pytest.raises(data.DataNotFound, match="photographs"):
        runs.grid(CONFIGS, gone)
    with pytest.raises(cluster.ClusterError, match=r"sees no .*elsewhere: RUNS_DIR has to be a folder that all"):
        cluster.each(cluster.on_worker, {"a": (str(tmp_path / "elsewhere"), digits.origin, None, None)}, "runs")
    assert not list(folder.glob("*/run.json"))


def test_a_worker_of_another_version_of_training_is_refused(two, digits, folder, monkeypatch):
    from distributed import Client

    monkeypatch.setenv(clusters.VARIABLE, two)
    said = rf"tcp://\S+ trains by version {runs.VERSION + 1}, and this is {runs.VERSION}: give all .* the same commit"
    with Client(two, set_as_default=False) as client:
        client.run(setattr, runs, "VERSION", runs.VERSION + 1)
        try:
            with pytest.raises(cluster.ClusterError, match=said):
                runs.grid([CONFIG], digits)
            job = ("lenet on few digits", SMALL, "cosine", {"eps": 0.1, "lr": 0.01, "seed": 0})
            with pytest.raises(cluster.ClusterError, match=said):
                cells.ahead([job], {"lenet on few digits": recipes.load(SMALL)})
        finally:
            client.run(setattr, runs, "VERSION", runs.VERSION)
    assert not list(folder.glob("*/run.json"))


def test_an_interrupt_while_another_scheduler_is_waited_for_is_an_interrupt(monkeypatch):
    dask = pytest.importorskip("distributed")

    class Gone:
        dashboard_link, status = "", "running"

        def submit(self, *_args, **_options):
            raise dask.comm.CommClosedError

        def cancel(self, _futures):
            raise dask.client.ClosedClientError  # as a closed one does

        def close(self):
            self.status = "closed"

    def connect(patience=0):
        if patience:
            raise KeyboardInterrupt
        return Gone()

    monkeypatch.setattr(cluster, "connect", connect)
    with pytest.raises(KeyboardInterrupt):
        cluster.each(len, {"a": ("b",)}, "tasks")


def test_what_fails_on_one_worker_is_tried_on_another(two, tmp_path, monkeypatch):
    monkeypatch.setenv(clusters.VARIABLE, two)
    asked = {"once": (str(tmp_path / "once"), 1, errno.EIO), "full": (str(tmp_path / "full"), 1, errno.ENOSPC)}
    there = cluster.each(fails_first, asked, "tasks")
    assert [len(where) for where in there.values()] == [2, 2]
    assert len(set(there["full"])) == 2, "tried again on the worker the disk of which is full"
    said = r"tcp://127\.0\.0\.1:\d+: \[Errno 28\] No space left on device\. Free space in its RUNS_DIR and run again"
    with pytest.raises(cluster.ClusterError, match=said):
        cluster.each(fails_first, {"always": (str(tmp_path / "always"), 10, errno.ENOSPC)}, "tasks")
    assert len((tmp_path / "always").read_text().split()) == cluster.TRIES
    with pytest.raises(OSError, match=r"^\[Errno 5\] Input/output error$"):
        cluster.each(fails_first, {"other": (str(tmp_path / "other"), 10, errno.EIO)}, "tasks")


def fails_first(mark, times, number):
    """With an error of this number, so many times; then the workers on which it was called."""
    from distributed import get_worker

    with open(mark, "a+") as file:
        file.write(f"{get_worker().address}\n")
        file.seek(0)
        if len(calls := file.read().split()) <= times:
            raise OSError(number, os.strerror(number))
    return calls


def test_a_scheduler_that_dies_while_it_hands_over_a_result_is_asked_again(two, monkeypatch):
    from distributed import Future
    from distributed.comm import CommClosedError

    monkeypatch.setenv(clusters.VARIABLE, two)
    result, asked_for = Future.result, []

    def dies_once(future, *arguments):
        asked_for.append(future.key)
        if len(asked_for) == 1:
            raise CommClosedError("connection reset by peer")
        return result(future, *arguments)

    monkeypatch.setattr(Future, "result", dies_once)
    assert cluster.each(abs, {"one": (-1,), "two": (-2,)}, "tasks") == {"one": 1, "two": 2}
    assert len(asked_for) == 3


def test_data_without_a_name_are_trained_here(digits, monkeypatch):
    monkeypatch.setenv(clusters.VARIABLE, "tcp://127.0.0.1:1")  # nobody is asked
    run = runs.run(CONFIG, digits)
    assert torch.equal(weights(runs.grid([CONFIG], replace(digits, origin=()))[0]), weights(run))


def test_a_worker_with_several_threads_is_refused(two, digits, folder, monkeypatch):
    import distributed

    folder.mkdir()
    with distributed.LocalCluster(1, threads_per_worker=2, processes=False, dashboard_address=None) as made:
        monkeypatch.setenv(clusters.VARIABLE, made.scheduler_address)
        with pytest.raises(cluster.ClusterError, match="does 2 things at once: start it with --nthreads 1"):
            runs.grid([CONFIG], digits)


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator is that of Linux")
def test_a_worker_keeps_its_memory(two):
    from distributed import Client

    def faults(times):
        """Pages of 4 kB that the system gives for so many tensors of 8 MB: few if the first one's are used again."""
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(times):
            torch.zeros(2**21)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    with Client(two, set_as_default=False) as client:
        assert client.submit(faults, 50).result() < 10 * 2048


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "tcp://192.0.2.1:8786", "nonsense", "tcp://localhost:port"])
def test_an_address_nobody_answers_is_said_within_ten_seconds(address, capsys):
    from run import main

    start = time.monotonic()
    with pytest.raises(clusters.ClusterError, match="no scheduler answers"), clusters.started(asked(scheduler=address)):
        pass
    assert time.monotonic() - start < 10
    assert main(["--scheduler", address, "01"]) == 2
    assert f"no scheduler answers at {address}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(scheduler="tcp://a:1", workers=2), "or --scheduler ADDRESS"),
        (dict(slurm="partition=short"), "--slurm SETTINGS --workers N"),
        (dict(slurm="short", workers=2), "list of name=value"),
        (dict(slurm="partition=", workers=2), "list of name=value"),
        (dict(slurm="exclusive,partition=short", workers=2), "and of flags, such as --exclusive"),
        (dict(slurm="p=short", workers=2), "write the name of p=short in full, as partition is for p"),
        (dict(slurm="mem=16GB,mem-per-cpu=4G", workers=2), "more than one of mem, mem-per-cpu, mem-per-gpu"),
        (dict(slurm="time=1,partition=a, time = 2", workers=2), "time stands twice"),
        (dict(workers=2), "there are 1 GPUs here, for 1 workers each; --per-gpu 2 lets"),
        (dict(slurm="partition=short", workers=2, per_gpu=2), "--per-gpu is for --workers of this machine"),
        (dict(workers=5, per_gpu=3), "there are 1 GPUs here, for 3 workers each; --per-gpu 5 lets"),
    ],
)
def test_what_was_asked_for_is_refused(options, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(clusters.ClusterError, match=said), clusters.started(asked(**options)):
        pass


@pytest.mark.parametrize(("gpus", "per_gpu", "visible", "seen"), [
    (0, 1, None, [None] * 3), (3, 1, None, ["0", "1", "2"]), (2, 2, None, ["0", "1", "0"]),
    (2, 2, "5,3", ["5", "3", "5"]),
])  # fmt: skip
def test_each_worker_is_given_a_gpu_or_its_part_of_one(gpus, per_gpu, visible, seen, monkeypatch):
    import distributed

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(distributed, "SpecCluster", lambda workers, **_: workers)
    spec = clusters.local(3, per_gpu)
    assert [spec[i]["options"]["env"].get("CUDA_VISIBLE_DEVICES") for i in range(3)] == seen


def test_workers_find_their_gpu_in_their_environment(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with clusters.started(asked(workers=2)), cluster.connect() as client:
        client.wait_for_workers(2)
        assert sorted(client.run(os.getenv, "CUDA_VISIBLE_DEVICES").values()) == ["0", "1"]


def test_the_settings_of_dask_outlive_a_cluster():
    """In a process that has not met dask before."""
    code = """if __name__ == "__main__":
        from argparse import Namespace
        import cluster
        with cluster.started(Namespace(workers=1, per_gpu=None, slurm=None, scheduler=None)):
            pass
        import dask
        print(*(dask.config.get(f"distributed.{key}") for key in ("deploy.lost-worker-timeout", "comm.retry.count")))
    """
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tools'}"}
    said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[-1] == "15s 0"


def test_workers_that_cannot_be_started_are_named(monkeypatch):
    import distributed

    async def start(nanny):
        raise OSError("no room for it")

    monkeypatch.setattr(distributed.Nanny, "start_unsafe", start)
    with pytest.raises(clusters.ClusterError, match="no workers: no room for it"), clusters.started(asked(workers=2)):
        pass


def test_a_run_on_slurm_is_interrupted_as_any_other():
    """In a process that has not met dask-jobqueue before, which changes what an interrupt does. With a handler of its
    own: what a shell starts in the background ignores interrupts from the start."""
    code = ("import cluster, signal\nsignal.signal(signal.SIGINT, print)\ntry:\n    cluster.slurm('', 0)\n"
            "except cluster.ClusterError:\n    print(signal.getsignal(signal.SIGINT) is print)")  # fmt: skip
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tools'}"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.split() == ["True"], done.stderr


def test_without_dask(monkeypatch, digits):
    monkeypatch.setitem(sys.modules, "distributed", None)
    missing = re.escape("pip install -e '.[cluster]'")
    monkeypatch.setitem(sys.modules, "dask_jobqueue", None)
    for options in (dict(workers=2), dict(workers=2, slurm="partition=short")):
        with pytest.raises(clusters.ClusterError, match=missing), clusters.started(asked(**options)):
            pass
    with pytest.raises(clusters.ClusterError, match=missing):  # as for --dry-run
        clusters.slurm("partition=short", 0)
    monkeypatch.setenv(clusters.VARIABLE, "tcp://127.0.0.1:1")
    with pytest.raises(cluster.ClusterError, match=missing):
        runs.grid([CONFIG], digits)


def test_the_script_that_slurm_gets():
    with clusters.slurm("partition=short,gres=gpu:1,time=02:00:00,mem=16GB", 0) as made:
        lines = made.job_script().splitlines()
    assert lines[0].startswith("#!")
    for line in ("#SBATCH -p short", "#SBATCH --gres=gpu:1", "#SBATCH -t 02:00:00", "#SBATCH --cpus-per-task=1",
                 "export OMP_NUM_THREADS=1", "export MALLOC_TRIM_THRESHOLD_=1000000000",
                 f"export PYTHONPATH={shlex.quote(str(ROOT))}"):  # fmt: skip
        assert line in lines
    assert "#SBATCH --mem=15G" in lines  # 16 GB in units of 2**30 bytes
    assert (
        lines[-1].startswith(f"{sys.executable} -m distributed.cli.dask_worker tcp://") and "--nthreads 1" in lines[-1]
    )


def test_slurm_gets_memory_as_it_takes_it_and_folders_as_they_are_called(monkeypatch):
    def lines(settings):
        with clusters.slurm(settings, 0) as made:
            return made.job_script().splitlines()

    def memory(settings):
        return [line.removeprefix("#SBATCH ") for line in lines(settings) if line.startswith("#SBATCH --mem")]

    assert memory("mem=8000") == ["--mem=8G"]  # to Slurm a number is one of megabytes
    for asked in ("16G", "1G", "100M", "2048K", "250G"):  # its own units are what it is to get
        assert memory(f"mem={asked}") == memory(f"mem={asked.lower()}") == [f"--mem={asked.replace('2048K', '2M')}"]
    assert memory("mem-per-cpu=4G") == ["--mem-per-cpu=4G"] and memory("partition=short") == ["--mem=8G"]
    for bad in ("mem=0", "mem=lots", "cpus-per-task=x", "cpus-per-task=0"):
        with pytest.raises(clusters.ClusterError, match=f"'{bad}': cpus-per-task is a number of at least 1, mem"):
            lines(bad)
    folder = """/it's $HOME, "a\\b" é"""
    monkeypatch.setenv("DATA_DIR", folder)
    (export,) = (line for line in lines("partition=short") if line.startswith("export DATA_DIR="))
    said = subprocess.check_output(["bash", "-c", f'{export}\nprintf %s "$DATA_DIR"'], text=True)
    assert said == folder


@pytest.mark.parametrize(("settings", "lines"), [
    ("partition = short", ["-p short"]), ("partition=short,long", ["-p short,long"]),
    ("mail-type=BEGIN, END, exclude=n1,n2", ["--mail-type=BEGIN,END", "--exclude=n1,n2"]),
    ("nodelist=n[1-3,5],time=90", ["--nodelist=n[1-3,5]", "-t 90"]),
    ("--exclusive, partition=short,--requeue", ["--exclusive", "-p short", "--requeue"]),
    ("--gres=gpu:1,mem-per-gpu=4G", ["--gres=gpu:1", "--mem-per-gpu=4G"]),
])  # fmt: skip
def test_slurm_gets_what_is_meant(settings, lines):
    with clusters.slurm(settings, 0) as made:
        assert set(lines) <= {line.removeprefix("#SBATCH ") for line in made.job_script().splitlines()}


WORDS = "sbatch: error: invalid partition specified: short"


@pytest.mark.parametrize(("command", "said"), [
    (None, "there is no sbatch here: start it on a machine that hands jobs to Slurm"),
    (f"echo '{WORDS}' >&2; echo 'sbatch: error: failed' >&2; exit 1", f"no workers: {WORDS}; sbatch: error: failed$"),
    (f"mkdir first 2>&- && echo Submitted batch job 7 || {{ echo '{WORDS}' >&2; exit 1; }}", f"no workers: {WORDS}$"),
    ("echo nothing", "no workers: Could not parse job id"),
])  # fmt: skip
def test_what_slurm_refuses_is_said_and_nothing_is_left_in_its_queue(tmp_path, monkeypatch, caplog, command, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin" if command else str(tmp_path))
    for name, does in (("sbatch", command), ("scancel", "echo $* >>cancelled")):
        if does:
            (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
            (tmp_path / name).chmod(0o755)
    begun = time.monotonic()
    with pytest.raises(clusters.ClusterError, match=said), clusters.started(asked(workers=3, slurm="partition=short")):
        pass
    assert time.monotonic() - begun < 20 and "never retrieved" not in caplog.text
    cancelled = tmp_path / "cancelled"
    assert (cancelled.read_text() == "7\n") if (tmp_path / "first").exists() else not cancelled.exists()


def test_every_recipe_comes_back_by_name():
    for settings in (recipes.RECIPES["lenet on few digits"], recipes.RECIPES["lenet on mnist5k"]):
        for part in filter(None, recipes.load(settings)):
            assert data.again(part.origin).fingerprint == part.fingerprint
    grey = data.load("mnist5k").first(20, 10).rgb()
    assert data.again(grey.origin).fingerprint == grey.fingerprint
