"""All benchmarks, one after the other, and their ratios as a table and a picture in the project's README.

    ./run_all.sh --python benchmarks/bench_all.py [--only pgd training ...]

An hour on one core. What is not run again stands as its last record says; the table names the machine of each.
"""

import argparse
import statistics
import subprocess
import sys

import matplotlib as mpl
import matplotlib.pyplot as plt
import seaborn as sns
from ratios import AIMS, exactness
from readme import GUESSES, HERE, guesses, write_part

from lib import cells
from lib.files import read_json

SCRIPTS = ("pgd", "training", "curvature", "queries", "scaling")


def rows(name, record):
    """(what, row with a ratio, what both reached) of a script's record; a row has its aim, where there is one."""
    if name == "pgd":
        for model in record["models"]:
            error = model["robust_error"]
            for row in model["speed"]:
                if row["against"] != "full":
                    reached = f"robust error {error[row['against']]:.1%}, ours {error['ours']:.1%}"
                    reached += guesses(model["clean_error"])
                    aim = {"aim": model["aim"]} if row["against"] == "textbook" else {}
                    yield "PGD, " + model["model"], row | aim, reached
    elif name == "training":
        for row in record["rows"]:
            textbook, ours = (row["error"][whose] for whose in ("textbook", "ours"))
            reached = f"PGD-20 error {robust(**textbook)}, ours {robust(**ours)}"
            yield "Training, " + row["what"], row, reached
    elif name == "curvature":
        residual = {row["against"]: row["residual"] for row in record["eigenpairs"]}
        for row in record["eigenpairs"]:
            if not row["against"].startswith("ours"):
                mine, fine = residual[row["ours"]], residual["ours"]
                reached = f"residual {row['residual']:.1e}, ours {mine:.1e}: {exactness(mine, row['residual'])}"
                reached += f"; {row['ratio_fine']:.1f} times as fast at {fine:.1e}" if mine != fine else ""
                aim = {"aim": AIMS[row["against"]]} if row["against"] in AIMS else {}
                yield "Top 20 eigenpairs", row | aim, reached
        for row in record["plane"][1:]:  # after the textbook's own
            kind = record["hardware"]["precision"] if row["method"] == "ours, auto" else "float32"
            timed = {"against": "textbook", "ratio_median": row["ratio"], "aim": AIMS["plane"]}
            what = "Surface, {points} x {points}, {kind}".format(**record, kind=kind)
            yield what, timed, f"losses within {row['difference']:.0e}"
    elif name == "queries":
        for row in record["rows"]:
            yield row["what"], row, "error {ART:.1%}, ours {ours:.1%}".format(**row["error"])


def robust(clean, robust):
    """The mean robust error of networks, and whether their clean errors are those of guessing."""
    return f"{statistics.mean(robust):.1%}{guesses(statistics.mean(clean))}"


def collect():
    """[(what, row, reached, machine)] of all records that are there."""
    found = []
    for name in SCRIPTS:
        if (path := HERE / f"{name}.json").exists():
            record = read_json(path)
            machine = "{device}, {vector_unit}, {precision}".format(**record["hardware"])
            found += [(cells.spelt(what), *row, machine) for what, *row in rows(name, record)]
    return found


def table(found):
    machines = list(dict.fromkeys(machine for *_, machine in found))
    lines = ["| what | against | times as fast: median (min to max) | aim | reached |", "|---|---|---|---|---|"]
    for what, row, reached, machine in found:
        mark = "" if len(machines) == 1 else f" [{machines.index(machine) + 1}]"
        lines.append(f"| {what}{mark} | {row['against']} | {ratio(row)} | {aim(row)} | {reached} |")
    where = "; ".join(f"{'' if len(machines) == 1 else f'[{i}] '}{m}" for i, m in enumerate(machines, 1))
    how = "CPU seconds, in turns; where it says one run, one after the other and once. An aim is met by the median."
    return "\n".join([*lines, "", f"One thread of {where}; {how}", "", GUESSES, "", costs()])


def ratio(row):
    """With its spread; in hundredths below ten, where a tenth would hide which side of an aim it is on."""
    shown = [f"{row[k]:.{1 + (row[k] < 10)}f}" for k in ("ratio_median", "ratio_min", "ratio_max") if k in row]
    return "{} ({} to {})".format(*shown) if len(shown) == 3 else f"{shown[0]} (one run)"


def aim(row):
    if "aim" not in row:
        return ""
    return f"{row['aim']}, {'met' if row['ratio_median'] >= row['aim'] else 'missed'}"


def costs():
    """Memory and the share of the machine's rate, in a line; their tables stand beside what larger runs would cost."""
    record = read_json(HERE / "scaling.json")
    memory = sorted(row["pgd"] / row["textbook"] for row in record["memory"])
    share = {cells.spelt(row["network"]): row["share"] for row in record["rates"]}
    reached = [name for name, value in share.items() if value >= AIMS["matrix rate"]]
    return (
        f"PGD adds {memory[0]:.0%} to {memory[-1]:.0%} of the memory that the textbook's adds, and runs at "
        f"{min(share.values()):.0%} to {max(share.values()):.0%} of the processor's own rate for products of matrices "
        f"(aim {AIMS['matrix rate']:.0%}, met by {', '.join(reached) or 'none'}): network by network in "
        "[docs/scaling.md](docs/scaling.md)."
    )


def picture(found):
    """The ratios, a dot for each peer, on a logarithmic axis."""
    names = list(dict.fromkeys(what for what, *_ in found))
    peers = list(dict.fromkeys(row["against"] for _, row, *_ in found))
    colours = dict(zip(peers, sns.color_palette("colorblind", len(peers)), strict=True))
    mpl.rcdefaults()  # not what the reader's matplotlibrc says
    sns.set_theme("paper", "whitegrid", "colorblind")
    fig, ax = plt.subplots(figsize=(6, 0.32 * len(names) + 1))
    for what, row, *_ in found:
        middle = row["ratio_median"]  # of one run there is no more
        low, high = middle - row.get("ratio_min", middle), row.get("ratio_max", middle) - middle
        ax.errorbar(middle, names.index(what), xerr=[[low], [high]], fmt="o", ms=5,
                    color=colours[row["against"]], label=row["against"])  # fmt: skip
        if "aim" in row:
            ax.plot(row["aim"], names.index(what), "|", ms=12, color="0.2", label="aim")
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.set_xscale("log")
    ax.set_xticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    ax.minorticks_off()
    ax.axvline(1, color="0.6", lw=1)
    ax.set_xlabel("times as fast as the peer (CPU seconds)")
    once = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    ax.legend(once.values(), once.keys(), loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    fig.savefig(HERE / "ratios.png", dpi=150, bbox_inches="tight", metadata={"Software": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=SCRIPTS, default=SCRIPTS, help="none: only the table")
    given = parser.parse_args()
    for name in given.only:
        print(f"bench_{name}.py", flush=True)
        subprocess.run([sys.executable, HERE / f"bench_{name}.py"], check=False)  # 1: a goal is missed, and says so
    found = collect()
    write_part("all", table(found), HERE.parent / "README.md")
    picture(found)
    print(table(found))


if __name__ == "__main__":
    main()
