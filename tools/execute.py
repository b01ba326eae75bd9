"""Run one notebook's source in a process of its own; tools/run.py starts it.

The first line of stdin is the job as JSON: source, output, scratch (a short path of an empty folder), cwd,
parameters, timeout. After it stdin stays open as long as the runner lives. When it closes, this process ends and
takes its kernel along.
"""

import contextlib
import json
import logging
import os
import re
import shutil
import sys
import threading
from pathlib import Path

import psutil

ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
STOPPED = "Stopped: "  # a line of the log that says all there is to say


def kill_tree(pid: int, *, itself: bool = True) -> None:
    """Kill a process with all that descend from it. Kernels sit in sessions of their own, so signals miss them."""
    try:
        root = psutil.Process(pid)
        while left := root.children(recursive=True):
            for process in left:
                process.kill()
            psutil.wait_procs(left, timeout=5)
        if itself:
            root.kill()
    except psutil.NoSuchProcess:
        pass


def _end_with_the_runner(scratch: Path) -> None:
    os.read(0, 1)
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
    (spec / "kernel.json").write_text(json.dumps(record))
    for name in ("JUPYTER_PATH", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
        os.environ[name] = str(scratch)
    connection = {"transport": "ipc", "connection_file": str(scratch / "k.json"), "ip": str(scratch / "k")}
    return {"KernelManager": connection}


def execute(job: dict) -> None:
    """Run the notebook and write it with its outputs.

    Raises:
        Exception: whatever papermill raises for a cell that fails, dies or takes too long.
        RuntimeError: a cell ended the notebook by sys.exit(), which papermill lets pass as a success.
    """
    # jsonschema builds a grammar of URLs with it, for two seconds, and goes without where it is not there.
    sys.modules.setdefault("rfc3987_syntax", None)
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


def main() -> None:
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_the_runner, args=[Path(job["scratch"])], daemon=True).start()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        execute(job)
    except Exception as error:
        words = ANSI.sub("", str(error)).strip()
        if type(error).__name__ == "CellTimeoutError":
            line = re.search(r"-{5,}\n(.*)", words)
            cell = f" (it begins with `{line[1]}`)" if line else ""
            sys.exit(f"{STOPPED}the cell{cell} took more than {job['timeout']} s. Networks trained by then are kept: "
                     "run it again, or give it longer by --timeout.")  # fmt: skip
        sys.exit(f"{type(error).__name__}: {words}")


if __name__ == "__main__":
    main()
