"""Work handed to other processes and machines by dask.distributed, where DASK_SCHEDULER_ADDRESS says where.

Nothing else changes: workers leave what they make in the folder of the runs, which all of them share, and whoever asked
finds it there. A task is named by what it makes and where, so that two notebooks that want the same get it made once. A
worker that dies is replaced by another; a scheduler that dies is waited for, and what it had not finished is handed in
again.
"""

import errno
import os
import time
from pathlib import Path

from tqdm import tqdm

VARIABLE = "DASK_SCHEDULER_ADDRESS"
ANSWER = 6  # seconds in which a scheduler should answer
PATIENCE = 300  # seconds that one which has died is waited for
TRIES = 3  # of a task that raises an error, finds a full disk, or the workers of which die, four each
MISSING = "workers need dask, which is not installed: pip install -e '.[cluster]'"


class ClusterError(RuntimeError):
    """What is wrong with the cluster and what to do, in a sentence."""


class FullDisk(ClusterError):
    """A worker's disk is full. Its arguments are the worker's address and what the system said."""

    def __str__(self):
        return "{}: {}. Free space in its RUNS_DIR and run again: what is finished is found".format(*self.args)


def address():
    """The scheduler's address, or None."""
    return os.environ.get(VARIABLE) or None


def connect(patience=0):
    """A client of the scheduler. Raises ClusterError if it does not answer, asked again for so many seconds."""
    try:
        from distributed import Client
    except ImportError as error:
        raise ClusterError(MISSING) from error
    deadline = time.monotonic() + patience
    while True:
        try:
            return Client(address(), timeout=ANSWER, set_as_default=False)
        except (OSError, ValueError) as error:
            if time.monotonic() > deadline:
                raise ClusterError(f"no scheduler answers at {address()}: does it run, at this address?") from error
            time.sleep(1)


def each(function, tasks, desc):
    """What the function gives for each task, made by the workers.

    Args:
        function: of a module that the workers can import; what it returns is small.
        tasks: {name: arguments}; equal names are one task, whoever hands it in.
        desc: of the line of progress, which a worker that has died makes no shorter.
    Returns:
        {name: value}.
    Raises:
        what the function raised, when it did so TRIES times; ClusterError, FullDisk.
    """
    if not tasks:  # nor need a scheduler be there
        return {}
    found, failed, full, futures, client = {}, [], set(), [], connect()
    from distributed import CancelledError, KilledWorker, as_completed
    from distributed.comm import CommClosedError

    with tqdm(total=len(tasks), desc=desc, mininterval=1) as bar:
        bar.set_postfix_str(f"on {client.dashboard_link}", refresh=False)
        try:
            while rest := {name: arguments for name, arguments in tasks.items() if name not in found}:
                try:
                    others = [worker for worker in client.nthreads() if worker not in full] if full else []
                    where = {"workers": others, "allow_other_workers": True} if others else {}
                    futures = [client.submit(_unless_full, function, *a, key=n, pure=False, retries=TRIES - 1, **where)
                               for n, a in rest.items()]  # fmt: skip
                    for future in as_completed(futures, loop=client.loop):
                        try:
                            value = future.result()
                        except KilledWorker as error:  # several workers in a row
                            value = ClusterError(f"{error} It may need more memory than a worker has.")
                        if isinstance(value, ClusterError):
                            failed.append(future.key)
                            if failed.count(future.key) == TRIES:
                                raise value
                            if isinstance(value, FullDisk):
                                full.add(value.args[0])
                            future.release()  # it goes on from its checkpoint, when the others are done
                        else:
                            found[future.key] = value
                            bar.update()
                except (CancelledError, CommClosedError):  # the scheduler is gone, and another one knows of nothing
                    client.close()
                    client = connect(PATIENCE)
        except KeyboardInterrupt:
            if client.status != "closed":  # as it is while another scheduler is waited for
                client.cancel(futures)
            raise
        finally:
            client.close()
    return found


def _unless_full(function, *arguments):
    """What the function gives, or FullDisk: given and not raised, as dask would try it again on the same worker."""
    from distributed import get_worker

    try:
        return function(*arguments)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return FullDisk(get_worker().address, str(error))


def on_worker(folder, origin, fingerprint, version):
    """What a task finds on its worker: the data of this origin. RUNS_DIR is from now on the folder of whoever asked.

    Raises ClusterError for a worker that does several things at once, does not see the folder, has other pixels, or
    another version of training, under which nobody would find what it makes.
    """
    from distributed import get_worker

    from . import compute, data, runs  # here, so that the runner of the notebooks need not import torch

    worker = get_worker()
    if worker.state.nthreads != 1:
        raise ClusterError(f"{worker.address} does {worker.state.nthreads} things at once: start it with --nthreads 1")
    if not Path(folder).is_dir():
        raise ClusterError(f"{worker.address} sees no {folder}: RUNS_DIR has to be a folder that all workers share")
    if version != runs.VERSION:
        theirs = f"{worker.address} trains by version {runs.VERSION}, and this is {version}"
        raise ClusterError(f"{theirs}: give all workers the same commit")
    os.environ["RUNS_DIR"] = folder
    compute.fix_threads()  # of this very thread
    found = data.again(origin)
    if found.fingerprint != fingerprint:
        raise ClusterError(f"{worker.address} has other pixels of {found.source}: give all workers the same DATA_DIR")
    return found
