"""Where and in which number format the work is done, and how the records describe it."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch

PACKAGES = ("torch", "torchvision", "numpy", "scipy", "matplotlib", "seaborn", "pandas")


def device():
    """The first GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fast_dtype(where):
    """torch.bfloat16 where this processor multiplies it in hardware, else None: without that, it is slower, not faster.

    Args:
        where: a torch.device.
    """
    if where.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(where) >= (8, 0) else None
    can = torch.cpu.get_capabilities()
    native = where.type == "cpu" and (can.get("avx512_bf16") or can.get("amx_bf16"))
    return torch.bfloat16 if native else None


def fix_threads():
    """One thread unless OMP_NUM_THREADS says otherwise.

    One thread and two give sums that differ in the eighth digit, and training amplifies that; so the number is part
    of what makes a run repeatable, and the records hold it.
    """
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def versions():
    """Versions of Python and of the packages that results depend on."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def hardware():
    """Processor or GPU, threads and the attack's number format: what results may differ by at equal versions."""
    here = device()
    name = torch.cuda.get_device_name(here) if here.type == "cuda" else _processor()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "vector_unit": torch.backends.cpu.get_cpu_capability(),
        "attack_precision": "bfloat16" if fast_dtype(here) else "float32",
    }


def _processor():
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
