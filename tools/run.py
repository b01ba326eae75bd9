#!/usr/bin/env python3
"""Run the notebooks, several side by side, each in a process of its own.

The profile "quick" rewrites notebooks/NAME.ipynb and figures/quick/; a notebook whose parameters are not as quick.json
defines them is run as the profile "mine". Any other profile, which no such notebook is run in, writes
build/PROFILE/NAME.ipynb and figures/PROFILE/; but "mine", "tiny" (the tests' size) and a reader's own file, which take
any, write all of it under build/PROFILE/, where the logs are, too.
FIGURES_DIR and RUNS_DIR (trained models) in the environment replace those folders; DATA_DIR is that of the data.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C ends the imports, which take seconds, in silence; from then on it is ours
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import cluster
import dry_run
import gallery
import profiles
from check_pairs import edited
from execute import ANSI, CONTEXT, PRELOAD, STOPPED, short_sockets
from jobs import TINY, Job, clean_environment, duration, make_jobs, read_times
from layout import Layout

from lib.files import read_json, write_json

TIMEOUTS = {profiles.QUICK: 3600, TINY: 600}  # seconds per cell
LONG_TIMEOUT = 7 * 24 * 3600  # a cell of the large profiles may train many models
REPORT_EVERY = 15  # seconds between the lines about a running notebook when there is no terminal
EDITED = """{name}.ipynb was edited by itself: its cells are not those of {name}.py. Nothing was run.
  to keep what is in the .ipynb:  ./run_all.sh --python -m jupytext --to py:percent notebooks/{name}.ipynb
  to keep what is in the .py:     ./run_all.sh --python -m jupytext --to ipynb --update notebooks/{name}.py"""
TAIL = 20  # lines of a failed notebook's log to show


class Screen:
    """Progress: one live line on a terminal, a line now and then elsewhere."""

    def __init__(self):
        self.live = sys.stdout.isatty()
        self.reported = {}

    def say(self, line: str) -> None:
        print(("\r\x1b[K" if self.live else "") + line, flush=True)

    def show(self, running: list[Job]) -> None:
        if self.live:
            states = [job.state() + (f" ({job.said[-40:]})" if job.said else "") for job in running]
            width = shutil.get_terminal_size().columns - 1
            print("\r\x1b[K" + " | ".join(states)[:width], end="", flush=True)
            return
        for job in running:
            if job.seconds - self.reported.get(job.name, 0) >= REPORT_EVERY:
                self.reported[job.name] = job.seconds
                self.say(f"      {job.state()}" + (f": {job.said[-80:]}" if job.said else ""))


def run(jobs: list[Job], at_once: int, screen: Screen) -> bool:
    """Run all jobs, ``at_once`` side by side. False when it was interrupted."""
    waiting, running = list(jobs), []
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append(waiting.pop(0))
                screen.say(f"start {running[-1].name}")
                running[-1].start()
            time.sleep(0.2)
            for job in list(running):
                job.follow()
                if not job.process.is_alive():
                    job.finish()
                    running.remove(job)
                    screen.say(f"{'ok   ' if job.ok else 'FAIL '} {job.name}  {duration(job.seconds)}")
            screen.show(running)
    except KeyboardInterrupt:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not leave half of them alive
        for job in running:
            job.follow()
        screen.say("interrupted: " + ("; ".join(job.state() for job in running) or "between two notebooks"))
        screen.say("What was trained and measured is kept: the same command goes on from there.")
        if waiting:
            screen.say("not started: " + ", ".join(job.name for job in waiting))
        return False
    finally:
        for job in running:
            if job.process:
                job.stop()
    return True


def report(jobs: list[Job]) -> None:
    """The closing table, then the end of each failed notebook's log."""
    width = max(len(job.name) for job in jobs)
    print(f"\n{'notebook':{width}}  {'time':>12}  {'networks':24}  verdicts")
    for job in sorted(jobs, key=lambda job: job.name):
        path = Path(job.env["FIGURES_DIR"]) / f"{job.name}.claims.json"
        counts = Counter(row["verdict"] for row in gallery.read_claims(path)["claims"]) if path.exists() else {}
        verdicts = ", ".join(f"{counts[verdict]} {verdict}" for verdict in gallery.VERDICTS if counts.get(verdict))
        made = read_json(journal) if (journal := Path(job.env["RUN_ALL_JOURNAL"])).exists() else {}
        networks = ", ".join(f"{made[state]} {state}" for state in ("trained", "found") if made.get(state))
        row = f"{networks or '-':24}  {verdicts or '-'}" if job.ok else "FAILED"
        print(f"{job.name:{width}}  {duration(job.seconds):>12}  {row}")
    for job in jobs:
        if not job.ok:
            lines = ANSI.sub("", job.log.read_text(encoding="utf-8", errors="replace")).splitlines()
            lines = [line for line in lines if line.strip() and not line.startswith("Ending Cell ")]
            lines = [line for line in lines if line.startswith(STOPPED)] or lines
            print(f"\nFAILED {job.name}, at cell {job.cell} of {job.cells}. The end of {job.log}:")
            print("\n".join(f"    {line}" for line in lines[-TAIL:]))


def list_all(layout: Layout) -> None:
    """What can be run."""
    held = {name: set(profiles.read_profile(layout, name)) for name in profiles.profile_names(layout)}
    for notebook in layout.names():
        print(f"{notebook}  ({', '.join(name for name in held if notebook in held[name])})")
    print(f"profiles: {', '.join(held)}")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="run_all.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("notebooks", nargs="*", metavar="NOTEBOOK", help="name or beginning, such as 03")
    parser.add_argument("--profile", default=profiles.QUICK, help="size of the experiments (default: quick), or a file")
    parser.add_argument("-j", "--jobs", type=int, default=2, metavar="N", help="notebooks side by side (default: 2)")
    parser.add_argument("--workers", type=int, metavar="N", help="train on N workers of this machine (or of --slurm)")
    parser.add_argument("--per-gpu", type=int, metavar="K", help="how many of them share a GPU (default: 1)")
    parser.add_argument("--slurm", metavar="SETTINGS", help="the workers are jobs of Slurm: partition=short,gres=gpu:1")
    parser.add_argument("--scheduler", metavar="ADDRESS", help="train on the workers of this dask scheduler")
    parser.add_argument("--timeout", type=int, metavar="S", help="seconds a cell may take")
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be trained and what is there, run nothing"
    )
    parser.add_argument("--list", action="store_true", help="name the notebooks and the profiles, run nothing")
    parser.add_argument("--root", type=Path, default=Layout().root, help=argparse.SUPPRESS)  # for the tests
    args = parser.parse_args(argv)
    for option in ("jobs", "timeout", "workers", "per_gpu"):
        if (value := getattr(args, option)) is not None and value < 1:
            parser.error(f"--{option.replace('_', '-')} {value}: it must be at least 1")
    if args.per_gpu and not args.workers:
        parser.error("--per-gpu says how --workers share GPUs: say how many there are")
    return args


def selected(layout: Layout, asked: str, notebooks: list[str]) -> dict[str, tuple]:
    """{notebook: (profile, private, parameters)} of what was asked for.

    Raises:
        ProfileError: something that cannot be run was asked for; nothing has run yet.
    """
    names = profiles.choose(notebooks, layout.names()) if notebooks else None
    sections = profiles.read_profile(layout, asked, names)
    profile, _ = profiles.find(layout, asked)
    names = list(sections) if names is None else names
    missing = [name for name in names if name not in sections]
    if missing:
        raise profiles.ProfileError(f"profile {profile} has no section for {', '.join(missing)}")
    if not names:
        raise profiles.ProfileError(f"profile {profile} holds no notebook")
    for name in names:
        pair = layout.notebooks / f"{name}.py", layout.notebooks / f"{name}.ipynb"
        if edited(*pair, layout.build / profiles.QUICK / f"{name}.py"):
            raise profiles.ProfileError(EDITED.format(name=name))
    private = profile == TINY or profile not in profiles.profile_names(layout)
    played = {} if private else profiles.played(layout, names)
    for name, changes in played.items():
        differs = f"{name} differs from the quick profile ({changes})"
        if profile != profiles.QUICK:  # which takes what it does not name from there
            raise profiles.ProfileError(f"{differs}, so that this is not {profile}: take it back, or copy "
                                        f"{profile}.yaml to a profile of your own, my.yaml, and run that")  # fmt: skip
        print(f"{differs}: all of it goes to build/{profiles.MINE}/")
    return {name: (profiles.MINE, True, {}) if name in played else (profile, private, sections[name]) for name in names}


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    layout = Layout(args.root.resolve())
    try:
        if args.list:
            list_all(layout)
            return 0
        sections = selected(layout, args.profile, args.notebooks)
    except profiles.ProfileError as error:
        print(f"run_all.sh: {error}", file=sys.stderr)
        return 2
    timeout = args.timeout or TIMEOUTS.get(profiles.find(layout, args.profile)[0], LONG_TIMEOUT)
    short_sockets()
    with tempfile.TemporaryDirectory(prefix="nb", dir="/tmp") as scratch:  # for a short path, as there
        try:
            if args.dry_run:
                print(dry_run.table(make_jobs(layout, sections, timeout, Path(scratch))))
                if args.slurm:
                    print(f"\nEach worker is a job:\n\n{cluster.slurm(args.slurm, 0).job_script()}")
                return 0
            with cluster.started(args):
                jobs = make_jobs(layout, sections, timeout, Path(scratch))
                if len(jobs) > 2:  # for fewer it does not pay
                    CONTEXT.set_forkserver_preload(PRELOAD)
                if not run(jobs, args.jobs, Screen()):
                    return 130
        except (cluster.ClusterError, profiles.ProfileError) as error:
            print(f"run_all.sh: {error}", file=sys.stderr)
            return 2
    for profile in {profile for profile, _, _ in sections.values()}:
        times = {job.name: round(job.seconds, 1) for job in jobs if job.ok and job.env["PROFILE"] == profile}
        write_json(layout.build / profile / "times.json", read_times(layout, profile) | times)
    try:
        report(jobs)
        if any(not private for _, private, _ in sections.values()):
            gallery.write(layout)
    except (gallery.RecordError, ValueError) as error:
        print(f"run_all.sh: {error}", file=sys.stderr)
        return 1
    return int(not all(job.ok for job in jobs))


def _interrupt(*_):
    raise KeyboardInterrupt


def status() -> int:
    """That of `main`; or 130 where it was interrupted, and 141, as of any program, where its words went to a pipe that
    nobody reads any more: `| head` has enough, or Ctrl-C has ended `| tee` first."""
    code = 0
    try:
        try:
            code = main()
        except KeyboardInterrupt:  # before the first notebook, or after the last
            code = 130
        except BrokenPipeError:
            raise
        except OSError as error:  # a disk that is full, or takes no files
            print(f"\nrun_all.sh: {error}", file=sys.stderr)
            code = 1
        sys.stdout.flush()
    except BrokenPipeError as error:
        try:
            print(flush=True)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else what is left would be tried again at the end
            return 130 if isinstance(error.__context__, KeyboardInterrupt) else code or 141
        raise  # that was another pipe
    return code


if __name__ == "__main__":
    # Begin again in the notebooks' environment: processes for them inherit it, and this one's flags (PYTHONOPTIMIZE).
    if not os.environ.pop("RUN_ALL_CLEAN", ""):
        # Python would tell who stops it of the locks that killed workers leave, and then cleans them up itself.
        quiet = {"RUN_ALL_CLEAN": "1", "PYTHONWARNINGS": "ignore:resource_tracker"}
        os.execve(sys.executable, [sys.executable, *sys.argv], clean_environment() | quiet)
    try:
        os.fstat(0)
    except OSError:  # started with stdin closed: without this a log or a pipe would become file 0
        os.open(os.devnull, os.O_RDONLY)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:  # nohup stays nohup
            signal.signal(number, _interrupt)
    sys.exit(status())
