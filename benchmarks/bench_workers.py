"""What handing the training to workers costs or gains on one machine: notebooks from nothing, with and without.

    python benchmarks/bench_workers.py [--repeats 2] [--workers 2]

By the clock, in turns, on an idle machine: the runner with all that it starts, as a reader starts it. Notebooks run two
side by side, without workers and with them; with them the workers train, and what is measured afterwards stays with the
notebook. The result goes to workers.json and, as a table, into docs/scaling.md. Apart from bench_all.py: it needs every
core, half an hour a turn.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from ratios import spread
from readme import HERE, write_part

from lib import compute
from lib.files import write_json

ROOT = HERE.parent
SLOWER = 0.95  # as "auto" beside "full" in bench_pgd.py: what is nearer to 1 is the noise of the measurement
WAYS = ("none", "workers")
ROWS = {
    "03_early_training": ["03_early_training"],
    "03_early_training and 10_certified_bounds": ["03_early_training", "10_certified_bounds"],
    "all of them": sorted(path.stem for path in ROOT.glob("notebooks/*.py")),
}


def clocked(notebooks, *options):
    """Seconds by the clock of the runner in an empty folder, at the quick size."""
    with tempfile.TemporaryDirectory() as folder:
        profile = Path(folder) / "workers.yaml"
        profile.write_text("".join(f"{name}: {{}}\n" for name in notebooks))
        env = os.environ | {"RUNS_DIR": f"{folder}/runs", "FIGURES_DIR": f"{folder}/figures"}
        command = [sys.executable, ROOT / "tools/run.py", "--profile", profile, *options]
        start = time.monotonic()
        subprocess.run(command, cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL)
        return time.monotonic() - start


def turns(notebooks, workers, repeats):
    ways = [partial(clocked, notebooks), partial(clocked, notebooks, "--workers", str(workers))]
    return [{name: way() for name, way in zip(WAYS, ways, strict=True)} for _ in range(repeats)]


def table(record):
    machine = record["hardware"]
    lines = [f"{machine['device']}, {record['cores']} cores, {machine['precision']}; by the clock, start of the "
             f"workers included; turns: {record['repeats']}. Aim: no slower, "
             f"which is a median of {SLOWER:g} or more.", "",
             f"| notebooks from nothing | seconds without workers | with {record['workers']} | times as fast: median "
             "(min to max) | aim |", "|---|---|---|---|---|"]  # fmt: skip
    lines += [
        f"| {r['notebooks']} | "
        f"{r['seconds_peer']:.0f} | {r['seconds_ours']:.0f} | "
        f"{r['ratio_median']:.2f} ({r['ratio_min']:.2f} to {r['ratio_max']:.2f}) | "
        f"{'met' if r['ratio_median'] >= SLOWER else 'missed'} |"
        for r in record["rows"]
    ]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    record = {"hardware": compute.hardware(), "versions": compute.versions(), "cores": os.cpu_count(), **vars(given)}
    record["rows"] = [{"notebooks": row, **spread(turns(names, given.workers, given.repeats), *WAYS)}
                      for row, names in ROWS.items()]  # fmt: skip
    write_json(HERE / "workers.json", record)
    write_part("workers", table(record), ROOT / "docs/scaling.md")
    print(table(record))


if __name__ == "__main__":
    main()
