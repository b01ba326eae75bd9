"""Where and in which number format the work is done, and how the records describe it."""

import os
import platform
import subprocess
import time
from contextlib import ExitStack, contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

from .checks import check_choice
from .files import ROOT, git

PACKAGES = ("torch", "torchvision", "numpy", "scipy", "matplotlib", "seaborn", "pandas")
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}


def device():
    """The first GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def clock():
    """Seconds of CPU time, which other programs on the machine do not lengthen; by the clock where a GPU computes."""
    return time.process_time() if device().type == "cpu" else time.monotonic()


def fast_dtype(where):
    """The type in which models are run where full precision is not asked for: torch.bfloat16 or None (float32).

    The environment variable PRECISION (float32 or bfloat16) decides; without it, bfloat16 is taken on GPUs that have
    it and on CPUs that gain by it: those that multiply it by tiles (AMX), and AMD's with avx512_bf16 (measured on
    Zen 4: 1.6 to 2 times as fast). Intel's avx512_bf16 without AMX was measured to be half as fast as float32.

    Args:
        where: a torch.device.
    Raises:
        ValueError: another value of PRECISION.
    """
    asked = os.environ.get("PRECISION") or "auto"
    check_choice("PRECISION", asked, ("auto", *PRECISIONS))
    if asked != "auto":
        return PRECISIONS[asked]
    if where.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(where) >= (8, 0) else None
    can = torch.cpu.get_capabilities() if where.type == "cpu" else {}
    gains = can.get("amx_bf16") or (can.get("avx512_bf16") and _cpuinfo("vendor_id") == "AuthenticAMD")
    return torch.bfloat16 if gains else None


def fix_threads():
    """One thread unless OMP_NUM_THREADS says otherwise ("4,1", as OpenMP takes it for nested loops, is 4).

    One thread and two give sums that differ in the eighth digit, and training amplifies that; so the number is part
    of what makes a run repeatable, and the records hold it.
    """
    first = (os.environ.get("OMP_NUM_THREADS") or "1").split(",")[0].strip()
    if not first.isdecimal() or int(first) < 1:
        raise ValueError(f"OMP_NUM_THREADS is {os.environ['OMP_NUM_THREADS']!r}: it should be a number of threads")
    torch.set_num_threads(int(first))


@contextmanager
def exact_products():
    """A context, or a decorator, in which float32 convolutions and products of matrices are float32, whatever
    `torch.set_float32_matmul_precision` was told (and PyTorch by itself takes 10 of the 23 bits for a GPU's
    convolutions), and cuDNN keeps to algorithms that give the same bits twice. The caller's settings are put back."""
    cudnn, cuda, cpu = torch.backends.cudnn, torch.backends.cuda, torch.backends.mkldnn
    wanted = [(kind, "fp32_precision", "ieee") for kind in (cudnn.conv, cuda.matmul, cpu.conv, cpu.matmul)]
    wanted += [(cudnn, "deterministic", True), (cudnn, "benchmark", False)]
    with ExitStack() as afterwards:
        for where, setting, value in wanted:
            afterwards.callback(setattr, where, setting, getattr(where, setting))
            setattr(where, setting, value)
        yield


def versions():
    """Versions of Python and of the packages that results depend on."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def hardware():
    """Processor or GPU, threads and number format: what results may differ by at equal versions."""
    here = device()
    processor = _cpuinfo("model name") or platform.processor() or platform.machine()
    return {
        "device": torch.cuda.get_device_name(here) if here.type == "cuda" else processor,
        "threads": torch.get_num_threads(),
        "vector_unit": torch.backends.cpu.get_cpu_capability(),
        "precision": "bfloat16" if fast_dtype(here) else "float32",
    }


def made(seconds):
    """Where, when and with what something was made: for records, not for names."""
    return {**hardware(), "versions": versions(), "commit": commit(), "seconds": round(seconds, 1),
            "date": time.strftime("%Y-%m-%d", time.gmtime())}  # fmt: skip


@cache
def commit():
    """The commit of this checkout, "with changes" if lib has any; "unknown" without git."""
    ours = ROOT, "--git-dir=.git"  # of a copy without .git, no repository around it
    try:
        head, changes = git(*ours, "rev-parse", "--short=12", "HEAD"), git(*ours, "status", "--porcelain", "lib")
        return head.strip() + (" with changes" if changes.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@cache
def _cpuinfo(field):
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(field)), "")
