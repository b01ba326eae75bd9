"""What an epoch of adversarial training costs on a GPU: step by step and captured as one graph, in either format, as a
share of the card's own rate for matrix products; whether two runs are equal bit for bit; several networks at once.

    python benchmarks/bench_gpu.py

PGD-10 on random pixels in the shape of CIFAR-10 or MNIST, batch 128, augmentation for the photographs: what is timed is
`lib.training`'s own epoch, by the clock. The result goes to gpu.json and, as tables, into README.md.
"""

import argparse
import hashlib
import multiprocessing
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from contextlib import contextmanager
from functools import partial
from unittest import mock

import torch
from networks import NETWORKS, forward_operations, network
from readme import HERE, write_part

from lib import compute, training
from lib.data import Data
from lib.files import read_json, write_json
from lib.training import TrainConfig

JSON = HERE / "gpu.json"
STEPS, BATCH, BATCHES, TURNS = 10, 128, 20, 3
IMAGES = {1: 60_000, 3: 50_000}  # of MNIST and CIFAR-10
NAMES = ("resnet18 w=8", "vgg16 w=8", "vgg16 w=2", "lenet w=16")
WAYS = (("float32", False), ("float32", True), ("bfloat16", False), ("bfloat16", True))  # format, captured
AT_ONCE = 12


def state_of(name, batches=BATCHES):
    """What `train` works on, for so many mini-batches an epoch."""
    model, width, channels, side = NETWORKS[name]
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(batches * BATCH, channels, side, side, generator=generator)
    y = torch.randint(10, (len(x),), generator=generator)
    y[:10] = torch.arange(10)
    config = TrainConfig(
        model=model, width=width, eps=8 / 255, step_size=2 / 255, num_steps=STEPS, schedule="cosine", epochs=1000,
        optimizer="sgd", lr=1e-2, weight_decay=1e-3, augment=channels == 3, eval_every=1000,
    )  # fmt: skip
    return training._State(config, Data(x, y, x[:10], y[:10], "random pixels"))


def epochs(state, captured, turns=TURNS, deterministic=True):
    """Seconds of each of so many epochs, after one in which everything is set up."""
    if not captured:
        state.captured = None
    seconds = []
    with compute.exact_products():
        torch.backends.cudnn.deterministic = deterministic  # the context puts it back
        state.train_epoch()
        for _ in range(turns):
            torch.cuda.synchronize()
            start = time.perf_counter()
            state.train_epoch()  # it ends by reading what it did
            seconds.append(time.perf_counter() - start)
    return seconds


def matrix_rate(dtype, size=8192, repeats=5):
    """Operations per second of a product of random matrices: the best of so many."""
    a, b = (torch.rand(size, size, device="cuda").to(dtype) for _ in range(2))
    times = []
    for _ in range(repeats + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        a @ b
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def speeds():
    matrix = {form: matrix_rate(getattr(torch, form)) for form in ("float32", "bfloat16")}
    for name in NAMES:
        net, x, _ = network(*NETWORKS[name])
        per_image = (2 * STEPS + 3) * forward_operations(net, x)
        for form, captured in WAYS:
            with mock.patch.dict(os.environ, PRECISION=form):
                times = epochs(state_of(name), captured)
            rate = BATCHES * BATCH * per_image / statistics.median(times)
            whole = [t * IMAGES[NETWORKS[name][2]] / (BATCHES * BATCH) for t in times]
            yield {"network": name, "precision": form, "captured": captured, "seconds": sorted(whole),
                   "per_second": rate, "share": rate / matrix[form], "matrix": matrix[form]}  # fmt: skip


def bits(state):
    """Hash of all parameters and buffers."""
    h = hashlib.sha256()
    for t in state.model.state_dict().values():
        h.update(t.cpu().contiguous().numpy().tobytes())
    return h.hexdigest()


def repeated():
    """Whether two runs end in the same bits, with cuDNN free to choose and held to its deterministic algorithms."""
    for name in ("resnet18 w=8", "vgg16 w=8", "lenet w=16"):
        for deterministic in (False, True):
            states = [state_of(name) for _ in range(2)]
            times = [statistics.median(epochs(state, True, deterministic=deterministic)) for state in states]
            yield {"network": name, "deterministic": deterministic, "equal": len(set(map(bits, states))) == 1,
                   "seconds": min(times)}  # fmt: skip


def _busy(name, pipe, ready, results, seconds):
    if pipe:
        os.environ["CUDA_MPS_PIPE_DIRECTORY"] = pipe
    compute.fix_threads()
    state = state_of(name, batches=10)
    state.train_epoch()
    ready.wait()
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        state.train_epoch()
        done += 10
    results.put(done / (time.perf_counter() - start))


@contextmanager
def multi_process_service():
    """The folder by which processes find NVIDIA's service that runs kernels of several at a time; None without it."""
    with tempfile.TemporaryDirectory() as folder:
        places = os.environ | {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        control = shutil.which("nvidia-cuda-mps-control")
        there = control and subprocess.run([control, "-d"], env=places, check=False).returncode == 0
        try:
            yield folder if there else None
        finally:
            if there:
                subprocess.run([control], input="quit\n", text=True, env=places, check=False)


def at_once(name, seconds=3):
    """Mini-batches per second of so many processes on the one card, all together: in turns, or by the service."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lib.training"])
    with multi_process_service() as pipe:
        for count, service in ((1, None), (AT_ONCE, None), *([(AT_ONCE, pipe)] if pipe else [])):
            ready, results = context.Barrier(count), context.Queue()
            arguments = (name, service, ready, results, seconds)
            processes = [context.Process(target=_busy, args=arguments, daemon=True) for _ in range(count)]
            for process in processes:
                process.start()
            rates = [results.get(timeout=60) for _ in processes]
            for process in processes:
                process.join()
            yield {"network": name, "processes": count, "service": service is not None, "per_second": sum(rates)}


def tables(record):
    machine, rate = record["hardware"], {r["precision"]: r["matrix"] / 1e12 for r in record["rows"]}
    lines = [
        f"{machine['device']}, PyTorch {record['versions']['torch']}; PGD-{STEPS}, batch {BATCH}, by the clock, "
        f"{TURNS} epochs of {BATCHES} mini-batches. Its products of matrices run at {rate['float32']:.0f} x 10^12 "
        f"operations a second in float32 and {rate['bfloat16']:.0f} in bfloat16.", "",
        "| network | format | seconds an epoch, operation by operation | captured | share of the matrix rate then |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    rows = {(r["network"], r["precision"], r["captured"]): r for r in record["rows"]}
    for name, form in dict.fromkeys((r["network"], r["precision"]) for r in record["rows"]):
        single, whole = (rows[name, form, captured] for captured in (False, True))
        times = " | ".join(f"{r['seconds'][len(r['seconds']) // 2]:.1f}" for r in (single, whole))
        lines.append(f"| {name} | {form} | {times} | {whole['share']:.1%} |")
    lines += ["", "| network | cuDNN held to deterministic algorithms | two runs equal, bit for bit | time |",
              "|---|---|---|---|"]  # fmt: skip
    for r in record["repeated"]:
        free = next(o for o in record["repeated"] if o["network"] == r["network"] and not o["deterministic"])
        words = ["yes" if flag else "no" for flag in (r["deterministic"], r["equal"])]
        lines.append(f"| {r['network']} | {' | '.join(words)} | {r['seconds'] / free['seconds']:.2f} |")
    lines += ["", "| network | processes on the card | mini-batches a second, all together |", "|---|---|---|"]
    for r in record["at_once"]:
        how = ", by the multi-process service" if r["service"] else ", in turns" if r["processes"] > 1 else ""
        lines.append(f"| {r['network']} | {r['processes']}{how} | {r['per_second']:.0f} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"rows": speeds, "repeated": repeated, "at_once": partial(at_once, "vgg16 w=2")}
    parser.add_argument("--parts", nargs="*", choices=parts, default=list(parts), help="measured anew (default: all)")
    record = read_json(JSON) if JSON.exists() else {}
    if chosen := parser.parse_args().parts:
        if not torch.cuda.is_available():
            raise SystemExit("there is no GPU here that PyTorch can use")
        compute.fix_threads()
        here = {"hardware": compute.hardware(), "versions": compute.versions()}
        if set(chosen) != set(parts) and any(record.get(key) != value for key, value in here.items()):
            raise SystemExit(f"the other parts of {JSON.name} were measured elsewhere: measure all")
        record |= here
    for part in chosen:
        record[part] = []
        for row in parts[part]():
            print(row, flush=True)
            record[part].append(row)
        write_json(JSON, record)
    write_part("gpu", tables(record))


if __name__ == "__main__":
    main()
