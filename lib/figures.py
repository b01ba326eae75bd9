"""What a notebook leaves: figures with the numbers drawn and their provenance, and rows of the ledgers."""

import base64
import copy
import dis
import hashlib
import html
import io
import json
import os
import re
from collections import Counter
from functools import cache
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from IPython import get_ipython
from IPython.display import HTML, Markdown, display
from IPython.display import Image as Shown
from matplotlib.figure import Figure
from PIL import Image, ImageChops

from . import claims, compute, recipes, runs
from .files import ROOT, as_json, checksum, folder_from_environment, read_if_whole, read_json, write_bytes, write_json
from .settings import SettingError, differing

WIDTH, DPI = 7, 200  # inches at most, pixels per inch
SCHEDULE_COLOURS = dict(zip(("constant", "linear", "cosine", "cosine_misread"),
                            (sns.color_palette("colorblind")[i] for i in (0, 1, 2, 4)), strict=True))  # fmt: skip


def eps_colours(grid):
    """{eps: colour}: on one scale for all figures, from dark at 0 to light (but no yellow) at 0.4 and above.

    The root of eps, since most of what is compared is small.
    """
    return {eps: mpl.colormaps["viridis"](0.8 * min(eps / 0.4, 1) ** 0.5) for eps in grid}


class Book:
    """What one notebook writes: figures, tables, records, rows of the ledgers. Says them on the page, too.

    Args:
        name: the notebook's, such as "03_early_training".
        namespace: `globals()`. Of it, the parameters are what the cell tagged so in the notebook assigns, by name.

    Where the parameters are not those of the profile, it is named "mine", and all is written into build/mine/figures.
    """

    def __init__(self, name, namespace):
        self.name, self.namespace = name, namespace
        self.names = _parameter_names(name)
        self.parameters = copy.deepcopy(self._now())
        self.profile, own = _profile(name, self.parameters)
        self.folder = folder_from_environment("FIGURES_DIR", ROOT / "figures" / self.profile)
        if own and self.folder.resolve().is_relative_to(ROOT / "figures"):
            self.folder = ROOT / "build" / "mine" / "figures"
        self.started, self.last = compute.clock(), ""
        self.asked = {"parameters": checksum(self.parameters), "version": runs.VERSION}  # of training; and recipes
        self.rows = {"claims": [], "answers": [], "checks": []}
        compute.fix_threads()
        runs.journal.clear()
        mpl.rcdefaults()  # not what the reader's matplotlibrc says, nor a font that only some have
        sns.set_theme("paper", "whitegrid", "colorblind", rc={"figure.constrained_layout.use": True,
                                                              "font.sans-serif": ["DejaVu Sans"]})  # fmt: skip
        if shell := get_ipython():
            explain(shell, name)
        self.box = display(Markdown("*The answers stand here when all of it has run.*"), display_id=f"answers-{name}")
        if own:
            display(Markdown(f"**Your own settings** ({own}): what is written goes to `build/mine/figures`, and the "
                             "committed figures stay as they are."))  # fmt: skip

    def _now(self):
        if missing := [name for name in self.names if name not in self.namespace]:
            raise SettingError(f"{', '.join(missing)} is not set: run the parameters cell first")
        return {name: self.namespace[name] for name in self.names}

    def _fresh(self):
        now = self._now()
        if changed := [name for name in self.names if repr(now[name]) != repr(self.parameters[name])]:
            raise SettingError(
                f"{', '.join(changed)} changed since the book was opened: run the notebook again "
                f"from the cell with Book({self.name!r}, ...) on, so that all of it has one setting"
            )

    def recipe(self, name):
        """The settings of a recipe (`recipes.get`), with this notebook's `changes`; shown, too."""
        self._fresh()
        settings = recipes.get(name, self.parameters.get("changes"))
        self.asked[name] = checksum(settings)
        text = ", ".join(f"{k} {_short(v)}" for k, v in settings.items())
        changed = ", ".join(self.parameters.get("changes", {}).get(name, {}))
        display(Markdown(f"**Recipe *{name}*:** {text}{f' (changed: {changed})' if changed else ''}."))
        return settings

    def save(self, fig, stem, table, *, caption, source, seeds=()):
        """Write <stem>.png, .csv and .json into the profile's folder; show picture and caption; close the figure.

        Args:
            fig: a matplotlib figure, at most 7 inches wide, or what has one (axes, a grid of seaborn).
            stem: file name without ending; begins with the notebook's number.
            table: DataFrame, the numbers drawn.
            caption: a sentence that lets the figure be read alone, with n and spread.
            source: where the data come from (`Data.source`, or how they were made).
            seeds: the seeds that went in.
        Raises:
            ValueError: no figure, a stem of another notebook or with a folder, an empty table or caption, a figure too
                wide, seeds that are no list, parameters changed since the book was opened. Nothing is written then.
        """
        self._fresh()
        if not stem.startswith(self.name[:3]) or "/" in stem or "\\" in stem:
            rule = f"begin with {self.name[:3]!r}, the notebook's number, and name no folder"
            raise ValueError(f"the stem {stem!r} must {rule}")
        fig = getattr(fig, "figure", fig)
        if not isinstance(fig, Figure) or isinstance(seeds, int):
            what = "seeds is a number, not a list" if isinstance(seeds, int) else f"{type(fig).__name__} is no figure"
            raise ValueError(f"{stem}: {what}")
        if not isinstance(table, pd.DataFrame) or table.empty or not caption or not source:
            raise ValueError(f"{stem} needs a table of the numbers drawn, a caption and a source")
        names = [name for name in table.index.names if name is not None]
        if names or not pd.api.types.is_integer_dtype(table.index.dtype):  # whole numbers are those of the rows
            said = names or table.index[:3].tolist()
            raise ValueError(f"{stem}: the index {said} would not be written: table.reset_index() keeps it")
        if fig.get_figwidth() > WIDTH:
            raise ValueError(f"{stem} is {fig.get_figwidth():g} inches wide: beyond {WIDTH}, its text gets too small")
        content = {"png": _png(fig), "csv": table.to_csv(index=False, lineterminator="\n").encode()}
        record = self._about() | {"stem": stem, "caption": caption, "source": source, "seeds": list(seeds)}
        record["sha256"] = {kind: hashlib.sha256(data).hexdigest() for kind, data in content.items()}
        record = as_json(record)  # what cannot be written is refused before anything is
        for kind, data in content.items():
            write_bytes(self.folder / f"{stem}.{kind}", data)
        _write_record(self.folder / f"{stem}.json", record)
        plt.close(fig)
        self.last = stem
        display(Shown(content["png"], format="png", width=round(96 * fig.get_figwidth()), alt=caption))
        display(Markdown(f"*{caption}* Data: {source}."))

    def claim(self, claim, **facts):
        """Add a row to the paper's ledger and show its verdict (`claims.claim`: section, holds, n, source, ...).

        `figure` is the last one saved unless it is given. The same claim again takes the place of the first.
        """
        row = self._add("claims", claims.claim(claim, **{"figure": self.last} | facts))
        measured = row["measured"] + (f" ({row['why']})" if row["why"] else "")
        where = row["section"] if row["section"].startswith("Appendix") else f"Section {row['section']}"
        paper = f" The paper ({where}): {row['paper']}." if row["paper"] else ""
        paper = f" (Ours.){paper}" if row.get("ours") else paper
        verdict, elsewhere = row["verdict"].capitalize(), "".join(f" {text}." for text in self._elsewhere(row))
        display(Markdown(f"**{verdict}**: {claim}.{paper} Measured: {measured}. n: {row['n']}.{elsewhere}"))

    def _elsewhere(self, row):
        """How other profiles have judged a claim that is undecided here, by the figures that stand."""
        ledgers = map(read_if_whole, sorted((ROOT / "figures").glob(f"*/{self.name}.claims.json")))
        return [f"In the profile `{ledger['profile']}`: **{other['verdict']}** (n: {other['n']})"
                for ledger in ledgers if row["verdict"] == "undecided" and ledger.get("profile") != self.profile
                for other in ledger.get("claims", [])
                if other["claim"] == row["claim"] and other["verdict"] != "undecided"]  # fmt: skip

    def answer(self, question, answer, **facts):
        """Add a row to the reviewers' ledger and show it (`claims.answer`: reviewer, n, source, figure)."""
        row = self._add("answers", claims.answer(question, answer, **{"figure": self.last} | facts))
        asked = f"{row['reviewer']} asked" if row["reviewer"].startswith("Reviewer") else row["reviewer"]
        display(Markdown(f"**{asked}:** {question} **Answer:** {answer} n: {row['n']}."))

    def check(self, what, **facts):
        """Add a row to the self-checks and show it (`claims.check`: holds, measured, figure)."""
        row = self._add("checks", claims.check(what, **{"figure": self.last} | facts))
        display(Markdown(f"**{'Pass' if row['passed'] else 'FAIL'}**: {what}. Measured: {row['measured']}."))

    def _add(self, ledger, row):
        self._fresh()
        title = next(iter(row))  # the first key: claim, question or check
        self.rows[ledger] = [*(r for r in self.rows[ledger] if r[title] != row[title]), row]
        return row

    def close(self):
        """Write the ledgers and what the notebook used, and fill the box of answers under its title.

        Raises ValueError when there is nothing to write.
        """
        self._fresh()
        if not any(self.rows.values()):
            raise ValueError(f"{self.name} records no claim")
        about = {"notebook": self.name, "title": _title(self.name), "profile": self.profile}
        write_json(self.folder / f"{self.name}.claims.json", about | self.rows)
        # As each was first: what was made here is so, though it was found again later. Used is what is not committed by
        # now, so that the next run, which finds it committed, writes the same.
        first = {entry["run"]: entry for entry in reversed(runs.journal) if entry["state"] != "committed"}
        last = {entry["run"]: entry["state"] for entry in runs.journal}
        used = {run: entry for run, entry in first.items() if last[run] != "committed"}
        uses = [{"run": k, "what": e["what"], "seconds": e["made"]["seconds"]} for k, e in sorted(used.items())]
        own = compute.clock() - self.started
        own -= sum(e["made"]["seconds"] for e in first.values() if e["state"] in ("trained", "measured"))
        path = self.folder / f"{self.name}.uses.json"
        _write_record(path, about | {"asked": self.asked, "runs": uses, "seconds": round(max(0, own), 1)})
        if journal := os.environ.get("RUN_ALL_JOURNAL"):  # for the runner's closing table
            write_json(journal, Counter(entry["state"] for entry in first.values()))
        if self.box:
            record = read_json(path)
            seconds = record["seconds"] + sum(run["seconds"] for run in record["runs"])
            self.box.update(Markdown(self._answers(seconds, used.values())))

    def _answers(self, seconds, used):
        lines = [". ".join([f"**{row['verdict'].capitalize()}**: {row['claim']}", *self._elsewhere(row)])
                 for row in self.rows["claims"]]  # fmt: skip
        lines += [f"**{row['reviewer']}**: {row['question']} *Answer*: {row['answer']}" for row in self.rows["answers"]]
        failed = [row["check"] for row in self.rows["checks"] if not row["passed"]]
        if self.rows["checks"]:
            n = len(self.rows["checks"])
            lines.append(f"Self-checks: {n - len(failed)} of {n} pass" + "".join(f"; FAILS: {text}" for text in failed))
        where = sorted({f"{m['device']}, {m['precision']}" for m in _made(used)} or {compute.hardware()["device"]})
        foot = (f"Profile `{self.profile}`; {seconds:.0f} s of computing from nothing, with the networks that are made "
                f"here (committed cells are not counted), on {'; '.join(where)}.")  # fmt: skip
        return "\n".join(["**Answers**", "", *(f"- {line.rstrip('.')}." for line in lines), "", foot])

    def _about(self):
        return {
            "notebook": self.name,
            "profile": self.profile,
            "parameters": self.parameters,
            "versions": compute.versions(),
            "hardware": compute.hardware(),
            "made": _made(runs.journal),
            "commit": compute.commit(),
            "seconds": round(compute.clock() - self.started, 1),
        }


def intervals(ax, gaps, labels, *, margin):
    """Draw differences of errors with their intervals, in percentage points, a row each; filled: decided.

    gaps: DataFrame with mean, half (NaN: no interval), outcome; margin is shaded.
    """
    reach = min(100, 2 + 100 * (gaps["mean"].abs() + gaps["half"].astype(float).fillna(0)).max())
    for i, gap in enumerate(gaps.itertuples()):
        decided = gap.outcome != "undecided"
        colour = "black" if decided else "grey"
        if gap.half is not None and gap.half < float("inf"):
            ax.plot([100 * (gap.mean - gap.half), 100 * (gap.mean + gap.half)], [i, i], color=colour)
        ax.plot(100 * gap.mean, i, "o", color=colour, mfc=colour if decided else "none")
    ax.axvspan(-100 * margin, 100 * margin, color="grey", alpha=0.2, linewidth=0)
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set(yticks=range(len(gaps)), yticklabels=labels, ylim=(len(gaps) - 0.4, -0.6), xlim=(-reach, reach))


def explain(shell, name):
    """Let a notebook's kernel say which section comes first where a name is missing, and what an interrupt keeps."""

    def handle(shell, kind, error, trace, tb_offset=None):
        if issubclass(kind, KeyboardInterrupt):
            print("Interrupted. What was trained and measured is kept: run this cell again, and it goes on from there.")
            return
        shell.showtraceback((kind, error, trace), tb_offset=tb_offset)
        try:
            where = _assigned_in(name).get(error.name)
        except (ValueError, SyntaxError):  # a console has no notebook, and a scratch one may hold magics
            return
        if where:
            print(f"`{error.name}` comes from the section {where!r}: run the cells from the top to there first.")

    shell.set_custom_exc((NameError, KeyboardInterrupt), handle)


def _made(entries):
    """Where the networks and values of a journal were made, each kind of place once."""
    parts = ("device", "precision", "vector_unit", "threads")
    places = {(*(e["made"][k] for k in parts), e["made"]["versions"]["torch"]) for e in entries}
    return [dict(zip((*parts, "torch"), place, strict=True)) for place in sorted(places, key=str)]


def _profile(name, parameters):
    """The profile these parameters are of, and (for "mine") how they differ from the one that they name."""
    profile = parameters["profile"]
    if profile != "quick":
        return (profile, "") if os.environ.get("PROFILE") == profile else ("mine", f"profile = {profile!r}")
    path = ROOT / "notebooks" / "profiles" / "quick.json"
    try:
        defined = read_json(path) if path.exists() else {}
    except ValueError as error:  # without it all of the reader's play would count as quick: not to be deleted
        raise SettingError(f"{path} is damaged: `git checkout` of it brings it back ({error.__cause__})") from error
    names = differing("parameters cell", parameters, defined[name]) if name in defined else []
    different = [f"{key} = {_short(parameters[key])}" for key in names]
    if name in defined and json.loads(json.dumps(recipes.RECIPES)) != defined["recipes"]:
        different.append("other recipes")
    return ("mine", ", ".join(different)) if different else ("quick", "")


@cache
def _cells(name):
    places = [folder / f"{name}{kind}" for folder in (Path.cwd(), ROOT / "notebooks") for kind in (".py", ".ipynb")]
    source = next((path for path in places if path.exists()), None)
    if source is None:
        raise ValueError(f"no notebook {name} here or in {ROOT / 'notebooks'}")
    text = source.read_text(encoding="utf-8")
    if source.suffix == ".ipynb":
        return [(cell["cell_type"], cell["metadata"].get("tags", []), "".join(cell["source"]))
                for cell in json.loads(text)["cells"]]  # fmt: skip
    # Not by jupytext, the import of which takes a third of a kernel's start: the format is no more than this, and
    # tools/check_pairs.py, which has it, holds all sources to it.
    parts = re.split(r"^[ \t]*#[ \t]*%%(?:%*[ \t](.*))?\n", text, flags=re.M)[1:]
    return [
        ("markdown", [], re.sub(r"^# ?", "", body, flags=re.M)) if "[markdown]" in head
        else ("code", re.findall(r'"(\w+)"', head), body)
        for head, body in zip((head or "" for head in parts[::2]), parts[1::2], strict=True)
    ]  # fmt: skip


def _parameter_names(name):
    cells = [source for _, tags, source in _cells(name) if "parameters" in tags]
    names = _assigned(cells[0]) if len(cells) == 1 else []
    if "profile" not in names:
        raise ValueError(f"{name} needs one cell tagged `parameters`, which assigns `profile`")
    return names


@cache
def _assigned_in(name):
    """{variable: the heading of the first section whose code assigns it}."""
    heading, where = "the beginning", {}
    for kind, _, source in _cells(name):
        if kind == "markdown":
            heading = next((line.lstrip("# ") for line in source.splitlines() if line.startswith("#")), heading)
        elif kind == "code":
            where = dict.fromkeys(_assigned(source), heading) | where
    return where


def _assigned(source):
    """Names that a cell leaves behind: not those inside its functions and comprehensions."""
    return [step.argval for step in dis.get_instructions(source) if step.opname == "STORE_NAME"]


def _write_record(path, record):
    """Keep the record that stands if it differs only in when and how fast it was made: repeating changes no byte."""
    if _timeless(read_if_whole(path)) != _timeless(record):
        write_json(path, record)


def _timeless(value):
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items() if k not in ("commit", "seconds")}
    return [_timeless(v) for v in value] if isinstance(value, list) else value


def _png(fig):
    """The figure in 256 colours, a third of the size, unless that changes any colour visibly."""
    buffer = io.BytesIO()
    fig.savefig(buffer, dpi=DPI, metadata={"Software": None})
    whole = Image.open(buffer).convert("RGB")
    few = whole.quantize(256, method=Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE)
    furthest = max(high for _, high in ImageChops.difference(whole, few.convert("RGB")).getextrema())
    out = io.BytesIO()
    (few if furthest <= 24 else whole).save(out, "png", optimize=True)
    return out.getvalue()


def _short(value):
    return json.dumps(value, default=repr) if isinstance(value, (dict, list, tuple)) else f"{value!r}".strip("'")


def _title(name):
    first = next((source for kind, _, source in _cells(name) if kind == "markdown"), name)
    return first.splitlines()[0].lstrip("# ")


def draw_attacked(pair, image, attacked, eps, title, *, wrong=False):
    """An attacked image, and the perturbation on a scale of its own, from -eps (blue) to eps (red); of an image in
    colour each colour by itself, and grey is none.

    Args:
        pair: two axes. image, attacked: tensors (1 or 3, H, W) in [0, 1]. title: of the first, in colour where wrong.
    Returns:
        The largest change of a pixel.
    """
    picture, change = attacked.cpu(), (attacked - image).cpu()
    if len(picture) == 1:
        pair[0].imshow(picture[0].numpy(), cmap="gray", vmin=0, vmax=1)
        pair[1].imshow(change[0].numpy(), cmap="bwr", vmin=-(eps or 1), vmax=eps or 1)
    else:
        pair[0].imshow(picture.permute(1, 2, 0).numpy())
        pair[1].imshow((change / (2 * (eps or 1)) + 0.5).permute(1, 2, 0).clamp(0, 1).numpy())
    for ax in pair:
        ax.set(xticks=[], yticks=[])
        ax.grid(False)
    pair[0].set_title(title, fontsize=8, color="C3" if wrong else "black")
    return change.abs().max().item()


def stepper(figs, labels, *, what):
    """Pictures to step through with a slider: lives on a static page and in JupyterLab, and repeats byte for byte.

    Args:
        figs: matplotlib figures of one size, at most 7 inches wide; closed here.
        labels: what is shown beside the slider, one text per figure.
        what: the alternative text.
    Returns:
        An HTML object, to end a cell with. The first picture is what is seen without JavaScript.
    """
    pictures, places = [], []
    for fig, label in zip(figs, labels, strict=True):
        buffer, small = io.BytesIO(), io.BytesIO()
        if places:  # laid out as the first one is, so that nothing jumps
            fig.set_layout_engine("none")
        for ax, place in zip(fig.axes, places, strict=bool(places)):
            ax.set_position(place)
        fig.savefig(buffer, dpi=100, metadata={"Software": None})
        places = places or [ax.get_position(original=True) for ax in fig.axes]
        plt.close(fig)
        few = Image.open(buffer).convert("RGB").quantize(64, dither=Image.Dither.NONE)
        few.save(small, "png", optimize=True)
        pictures.append(
            f'<figure style="margin:0;display:{"none" if pictures else "block"}">'
            f"<figcaption>{html.escape(label)}</figcaption>"
            f'<img alt="{html.escape(f"{what}, {label}")}" width="{few.width * 96 // 100}" style="max-width:100%" '
            f'src="data:image/png;base64,{base64.b64encode(small.getvalue()).decode()}"></figure>'
        )
    show = "(f, i) => f.style.display = i == this.value ? 'block' : 'none'"
    return HTML(
        f'<div><input type="range" min="0" max="{len(pictures) - 1}" value="0" style="width:60%" '
        f'aria-label="{html.escape(what)}" oninput="this.parentNode.querySelectorAll(\'figure\').forEach({show})">'
        f"{''.join(pictures)}</div>"
    )
