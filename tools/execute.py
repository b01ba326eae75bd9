"""Run one notebook's source in a process of its own, which tools/run.py starts.

On Linux that process and its kernel are forks of one that has imported what notebooks import (`CONTEXT`), so that
twelve notebooks do not import it twenty-four times. Elsewhere a fork with these libraries in it is not safe, and both
begin anew.
"""

import atexit
import contextlib
import json
import logging
import multiprocessing
import multiprocessing.util
import os
import re
import shutil
import sys
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

import psutil

# jsonschema builds a grammar of URLs with it, for two seconds, and goes without where it is not there.
sys.modules.setdefault("rfc3987_syntax", None)
FORKS = sys.platform == "linux"
CONTEXT = multiprocessing.get_context("forkserver" if FORKS else "spawn")
# Not pyplot and pandas: they ask at their import whether they are in a kernel.
PRELOAD = ["tools.execute", "papermill", "jupytext", "ipykernel.kernelapp", "torch", "scipy.stats", "scipy.sparse",
           "matplotlib.figure", "matplotlib.backends.backend_agg"]  # fmt: skip

ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
FORKED = "forked"  # the name of our kernel provisioner
AT_CELL = re.compile(r"Executing Cell (?=.{40}$)([0-9]{1,9})-+$")  # a line of papermill's, in its own form
STOPPED = "Stopped: "  # a line of the log that says all there is to say


def short_sockets() -> None:
    """Have multiprocessing put its sockets into /tmp: where TMPDIR is far down, their names, of which about 100
    characters may be, are too long."""
    before, tempfile.tempdir = tempfile.tempdir, "/tmp"
    multiprocessing.util.get_temp_dir()  # which it makes once, for all processes that descend from this one
    tempfile.tempdir = before


def kill_tree(pid: int, *, itself: bool = True) -> None:
    """Kill a process with all that descend from it. Kernels sit in sessions of their own, so signals miss them."""
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        while left := root.children(recursive=True):
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):  # it ended by itself: the others are still to be killed
                    process.kill()
            psutil.wait_procs(left, timeout=5)
        if itself:
            root.kill()


def _end_with_the_runner(alive, scratch: Path) -> None:
    alive.poll(None)  # nothing is ever sent: it is at its end when the runner is
    kill_tree(os.getpid(), itself=False)
    shutil.rmtree(scratch, ignore_errors=True)
    with contextlib.suppress(OSError):  # the last one takes the folder of the whole run along
        scratch.parent.rmdir()
    os._exit(1)


def _settle(scratch: Path) -> dict:
    """Kernel settings that depend on nothing in the reader's home folder: this interpreter, no start-up files.

    Returns the configuration of the kernel manager. Sockets instead of ports: two kernels cannot meet on one.
    """
    spec = scratch / "kernels" / "python3"
    spec.mkdir(parents=True)
    argv = [sys.executable, "-Xfrozen_modules=off", "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    record = {"argv": argv, "display_name": "Python 3 (ipykernel)", "language": "python"}
    record |= {"metadata": {"kernel_provisioner": {"provisioner_name": FORKED}}} if FORKS else {}
    (spec / "kernel.json").write_text(json.dumps(record))
    for name in ("JUPYTER_PATH", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
        os.environ[name] = str(scratch)
    connection = {"transport": "ipc", "connection_file": str(scratch / "k.json"), "ip": str(scratch / "k")}
    return {"KernelManager": connection}


def _kernel(calls, others_end) -> None:
    """Wait to be told how, then be the notebook's kernel: what `python -m ipykernel_launcher` is in a new process."""
    os.setsid()
    others_end.close()  # so that the end of the other process is the end of the waiting
    try:
        command, folder, environment = calls.recv()
    except EOFError:
        return
    from ipykernel.kernelapp import launch_new_instance

    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    _forget_the_runner()
    sys.argv = command[command.index("-m") + 1 :]
    try:
        launch_new_instance()
    finally:
        atexit._run_exitfuncs()  # before 3.13 a fork ends without


def _forget_the_runner() -> None:
    """Take its folder, its modules, what it does at its end and its random numbers out of a fork of it."""
    tools = str(Path(__file__).parent)
    sys.path[:] = [entry for entry in sys.path if entry != tools]
    for name, module in list(sys.modules.items()):
        if name != "__main__" and str(getattr(module, "__file__", "")).startswith(tools):
            del sys.modules[name]
    atexit._clear()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()


def _provisioner(kernel, calls):
    """A kernel provisioner (jupyter_client's word) that lets the waiting process be the kernel."""
    from jupyter_client.provisioning import LocalProvisioner

    def wait():
        kernel.join()
        return kernel.exitcode

    class Forked(LocalProvisioner):
        async def launch_kernel(self, cmd, **kwargs):
            calls.send((cmd, os.getcwd(), {**kwargs["env"], "JPY_PARENT_PID": str(os.getpid())}))
            self.pid, self.process = kernel.pid, SimpleNamespace(
                pid=kernel.pid, poll=lambda: kernel.exitcode, wait=wait, kill=kernel.kill, terminate=kernel.terminate,
                send_signal=lambda number: os.kill(kernel.pid, number), stdin=None, stdout=None, stderr=None,
            )  # fmt: skip
            return self.connection_info

    return Forked


def _fork_kernel() -> None:
    """Fork the kernel that is to be, before this process has threads, and tell jupyter_client where it is."""
    theirs, ours = multiprocessing.Pipe(duplex=False)
    kernel = multiprocessing.get_context("fork").Process(target=_kernel, args=[theirs, ours])
    kernel.start()
    theirs.close()
    from jupyter_client.provisioning import KernelProvisionerFactory

    KernelProvisionerFactory.instance().provisioners[FORKED] = SimpleNamespace(load=lambda: _provisioner(kernel, ours))


def execute(job: dict) -> None:
    """Run the notebook and write it with its outputs.

    Raises:
        Exception: whatever papermill raises for a cell that fails, dies or takes too long.
        RuntimeError: a cell ended the notebook by sys.exit(), which papermill lets pass as a success.
    """
    import papermill
    from profiles import source
    from traitlets.config import Config

    notebook = papermill.execute_notebook(
        source(Path(job["source"])),
        job["output"].replace("{", "{{").replace("}", "}}"),  # papermill fills in braces of a path
        job["parameters"],
        kernel_name="python3",
        cwd=job["cwd"],
        config=Config(_settle(Path(job["scratch"]))),
        execution_timeout=job["timeout"],
        start_timeout=300,
        progress_bar=False,
        log_output=True,
    )
    for number, cell in enumerate(notebook.cells, 1):
        ran = cell.cell_type != "code" or not cell.source.strip() or cell.execution_count is not None
        if not ran or any(output.output_type == "error" for output in cell.get("outputs", [])):
            raise RuntimeError(f"cell {number} ended the notebook before its last cell")


def main(job: dict, log: Path, environment: dict, alive) -> None:
    """The process of one notebook.

    Args:
        job: source, output, scratch (a short path of an empty folder), cwd, parameters, timeout.
        log: the file that takes what this process and its kernel print.
        environment: the variables of both.
        alive: a connection that closes when the runner ends; then this process does, and takes its kernel along.
    """
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.environ.clear()
    os.environ.update(environment)
    try:
        if FORKS:
            _fork_kernel()
        threading.Thread(target=_end_with_the_runner, args=[alive, Path(job["scratch"])], daemon=True).start()
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        execute(job)
    except Exception as error:
        words = ANSI.sub("", str(error)).strip()
        if type(error).__name__ == "CellTimeoutError":
            line = re.search(r"-{5,}\n(.*)", words)
            cell = f" (it begins with `{line[1]}`)" if line else ""
            sys.exit(f"{STOPPED}the cell{cell} took more than {job['timeout']} s. Networks trained by then are kept: "
                     "run it again, or give it longer by --timeout.")  # fmt: skip
        sys.exit(f"{type(error).__name__}: {words}")
    finally:
        kill_tree(os.getpid(), itself=False)
