"""The workers of a run: what --workers, --slurm and --scheduler stand for, as the address that notebooks are given."""

import logging
import os
import re
import shlex
import shutil
import signal
import sys
from contextlib import ExitStack, contextmanager
from multiprocessing import forkserver

from execute import CONTEXT, FORKS, PRELOAD

from lib.cluster import MISSING, VARIABLE, ClusterError, connect

# dask has workers give memory back after every operation, which takes a training two fifths more CPU time.
MEMORY = {"MALLOC_TRIM_THRESHOLD_": "1000000000", "MALLOC_MMAP_THRESHOLD_": "33554432"}
# dask gives a worker up for good, job and all, if it is not there 15 seconds after one of its deaths; but a start takes
# longer where torch lies on a slow disk, and one that has just died again is not there either.
STEADY = {"distributed.deploy.lost-worker-timeout": "8760h"}
# Where notebooks are forks of one process that has imported what they need, workers are, too: see execute.py.
START = "distributed.worker.multiprocessing-method"
SETTINGS = {"partition": "queue", "account": "account", "time": "walltime", "mem": "memory", "cpus-per-task": "job_cpu"}
MEMORY_OF = {"mem", "mem-per-cpu", "mem-per-gpu"}  # sbatch takes one of the three
NAMED = re.compile(r"(--)?([a-z][\w-]+)(?:\s*=\s*(\S.*))?")


def environment() -> dict:
    """What a worker is told, wherever it runs: the number of threads is part of what makes a run repeatable."""
    names = ("OMP_NUM_THREADS", "PYTHONPATH", "DATA_DIR", "PRECISION")
    return {name: os.environ[name] for name in names if os.environ.get(name)} | MEMORY | {"PYTHONNOUSERSITE": "1"}


@contextmanager
def in_a_sentence():
    """What keeps workers from being started, as a ClusterError."""
    try:
        yield
    except ClusterError:
        raise
    except ImportError as error:
        raise ClusterError(MISSING) from error
    except (RuntimeError, OSError) as error:
        raise ClusterError(f"no workers: {error.__cause__ or error}") from error


def local(workers: int, per_gpu: int):
    """A scheduler and so many workers on this machine, each in a process of its own; so many of them share a GPU."""
    import torch
    from distributed import Nanny, Scheduler, SpecCluster

    gpus = torch.cuda.device_count()
    if 0 < gpus * per_gpu < workers:
        some = f"there are {gpus} GPUs here, for {per_gpu} workers each"
        raise ClusterError(f"--workers {workers}: {some}; --per-gpu {-(-workers // gpus)} lets more of them share one")
    common = {"nthreads": 1, "memory_limit": 0, "silence_logs": logging.CRITICAL, "host": "127.0.0.1"}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    cards = visible.split(",") if visible else [str(i) for i in range(gpus)]
    own = [environment() | ({"CUDA_VISIBLE_DEVICES": cards[i % gpus]} if gpus else {}) for i in range(workers)]
    spec = {i: {"cls": Nanny, "options": common | {"env": env}} for i, env in enumerate(own)}
    scheduler = {"cls": Scheduler, "options": {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}}
    return SpecCluster(workers=spec, scheduler=scheduler, silence_logs=logging.CRITICAL)


def sbatch(settings: str) -> dict:
    """sbatch's settings by name. What has no name goes on with the value before it (partition=short,long); a flag, the
    value of which is empty, has dashes (--exclusive)."""
    given, last = {}, ""

    def refuse(said):
        form = "it is a list of name=value, such as partition=short,gres=gpu:1, and of flags, such as --exclusive"
        raise ClusterError(f"--slurm {settings!r}: {said or form}")

    for part in filter(None, map(str.strip, settings.split(","))):
        if given.get(last) and not part.startswith("-") and "=" not in part:
            given[last] += f",{part}"
        elif not (found := NAMED.fullmatch(part)) or not (found[1] or found[3]):
            refuse(re.match("-?[A-Za-z] *(=|$)", part) and f"write the name of {part} in full, as partition is for p")
        elif found[2] in given:
            refuse(f"{found[2]} stands twice")
        else:
            given[last := found[2]] = found[3] or ""
    if len(MEMORY_OF & set(given)) > 1:
        refuse(f"it has more than one of {', '.join(sorted(MEMORY_OF))}")
    return given or refuse("")


@in_a_sentence()
def slurm(settings: str, workers: int):
    """Workers that Slurm starts, one thread and one job each: settings are sbatch's, "partition=short,gres=gpu:1"."""
    handler = signal.getsignal(signal.SIGINT)
    from dask.utils import parse_bytes
    from dask_jobqueue import SLURMCluster

    signal.signal(signal.SIGINT, handler)  # it has set one that ends in silence
    given = sbatch(settings)
    if workers and not shutil.which("sbatch"):
        raise ClusterError("--slurm: there is no sbatch here: start it on a machine that hands jobs to Slurm")
    known = {SETTINGS[key]: value for key, value in given.items() if key in SETTINGS}
    memory, cpus = known.get("memory", "8GB"), known.get("job_cpu", "1")
    memory += "MiB" * memory.isdecimal()  # to Slurm they are megabytes, to dask bytes;
    memory += "iB" * memory.upper().endswith(("K", "M", "G", "T"))  # and its units are of 1024, to dask of 1000
    try:
        if min(int(cpus), parse_bytes(memory)) < 1:
            raise ValueError
    except ValueError:
        said = "cpus-per-task is a number of at least 1, mem a size such as 8000 (MB) or 16GB"
        raise ClusterError(f"--slurm {settings!r}: {said}") from None
    known |= {"job_cpu": int(cpus), "memory": memory, "walltime": known.get("walltime", "24:00:00")}
    return _submitted(
        SLURMCluster, cores=1, processes=1, n_workers=workers, python=sys.executable, **known,
        job_extra_directives=[f"--{key}{value and '='}{value}" for key, value in given.items() if key not in SETTINGS],
        job_directives_skip=["--mem="] if MEMORY_OF & set(given) - {"mem"} else None,
        job_script_prologue=[f"export {name}={shlex.quote(value)}" for name, value in environment().items()],
        worker_extra_args=["--no-dashboard"], scheduler_options={"dashboard_address": ":0"},
    )  # fmt: skip


def _submitted(cluster, **options):
    """A cluster of jobs, all of them submitted. Raises ClusterError with the words of a refusal, which would stay in a
    task of dask's that nobody waits for."""
    from distributed.deploy.spec import ProcessInterface

    refused = []

    class Job(cluster.job_cls):
        async def start(self):
            try:
                await super().start()
            except (OSError, RuntimeError, ValueError) as error:
                said = f"{error}".partition("stderr:\n")[2] or f"{error}"  # of dask's words those of the command
                refused.append("; ".join(said.split("\n")).strip("; "))
                await ProcessInterface.start(self)  # started or not: no more than that

    async def all_of_them():
        await made

    made = type(cluster.__name__, (cluster,), {"job_cls": Job})(**options)
    made.sync(all_of_them)
    if refused:
        made.close()
        raise ClusterError(f"no workers: {refused[0]}")
    return made


@contextmanager
def _named(address):
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = address
    try:
        yield
    finally:
        os.environ.pop(VARIABLE, None)
        if before is not None:
            os.environ[VARIABLE] = before


@contextmanager
def started(args):
    """What was asked for, while it is needed; so long the environment names it. Raises ClusterError."""
    if not (args.workers or args.slurm or args.scheduler):
        yield
        return
    if (args.scheduler and (args.workers or args.slurm)) or (args.slurm and not args.workers):
        raise ClusterError("--workers N, or --slurm SETTINGS --workers N, or --scheduler ADDRESS")
    if args.per_gpu and (args.scheduler or args.slurm):
        raise ClusterError("--per-gpu is for --workers of this machine")
    if args.scheduler:
        with _named(args.scheduler):
            connect().close()  # that it answers
            yield
        return
    with ExitStack() as stack:
        with in_a_sentence():
            if FORKS and not args.slurm:  # first of all: that process imports them beside this one
                CONTEXT.set_forkserver_preload([*PRELOAD, "distributed"])
                forkserver.ensure_running()
            import dask
            import distributed  # noqa: F401 - its settings come with it, and would end with ours if these were first

            stack.enter_context(dask.config.set(STEADY | {START: "forkserver" if FORKS else "spawn"}))
            stack.enter_context(dask.config.set({"distributed.nanny.pre-spawn-environ": environment()}))
            made = stack.enter_context(
                slurm(args.slurm, args.workers) if args.slurm else local(args.workers, args.per_gpu or 1)
            )
        stack.enter_context(_named(made.scheduler_address))
        print(f"workers: {args.workers}, at {made.scheduler_address}; their page: {made.dashboard_link}", flush=True)
        yield
