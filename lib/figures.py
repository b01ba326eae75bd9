"""Figures with their provenance: each is saved with the numbers drawn and a record of what made them."""

import hashlib
import io
import json
import subprocess
import time
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from IPython.display import Image as Shown
from IPython.display import Markdown, display
from PIL import Image

from . import claims, compute
from .files import folder_from_environment, read_json, write_bytes, write_json

ROOT = Path(__file__).resolve().parents[1]
DPI = 110
PRODUCTION = (
    "commit",
    "wall_time_s",
)  # say when a figure was first made, and are no reason to write it again


class Book:
    """What one notebook writes: figures, tables, records, ledger rows.

    Args:
        name: the notebook's, such as "03_early_training".
        namespace: `globals()`, right after the parameters cell: what is assigned by then are the parameters.
    """

    def __init__(self, name, namespace):
        self.name = name
        self.parameters = {k: v for k, v in namespace.items() if _is_parameter(k, v)}
        if "profile" not in self.parameters:
            raise ValueError("the parameters cell must assign `profile`")
        self.profile = self.parameters["profile"]
        self.folder = folder_from_environment("FIGURES_DIR", ROOT / "figures" / self.profile)
        self.started = time.monotonic()
        self.rows = []
        compute.fix_threads()
        sns.set_theme(style="whitegrid", palette="colorblind", rc={"figure.constrained_layout.use": True})

    def save(self, fig, stem, table, *, caption, source, seeds=()):
        """Write <stem>.png, .csv and .json into the profile's folder and close the figure.

        Args:
            fig: a matplotlib figure.
            stem: file name without ending; begins with the notebook's number.
            table: DataFrame, the numbers drawn.
            caption: a sentence that lets the figure be read alone, with n and spread.
            source: where the data come from (`Data.source`, or how they were made).
            seeds: the seeds that went in.
        Returns:
            The picture, for the cell to show.
        Raises:
            ValueError: a stem of another notebook, an empty table or caption.
        """
        if not stem.startswith(self.name[:3]):
            raise ValueError(f"the stem {stem!r} must begin with {self.name[:3]!r}, the notebook's number")
        if not isinstance(table, pd.DataFrame) or table.empty or not caption or not source:
            raise ValueError(f"{stem} needs a table of the numbers drawn, a caption and a source")
        content = {"png": _png(fig), "csv": table.to_csv(index=False, lineterminator="\n").encode()}
        record = self._about() | {"stem": stem, "caption": caption, "source": source, "seeds": list(seeds)}
        record["sha256"] = {kind: hashlib.sha256(data).hexdigest() for kind, data in content.items()}
        for kind, data in content.items():
            write_bytes(self.folder / f"{stem}.{kind}", data)
        self._write_record(self.folder / f"{stem}.json", record)
        plt.close(fig)
        return Shown(content["png"], format="png", width=_width(content["png"]))

    def show_other_sizes(self, stem):
        """Show the figure `stem` as the other profiles drew it, each under its record's caption and data.

        Only what stands in figures/ is shown, in the order of the profiles' names; nothing is drawn.
        """
        for path in sorted(ROOT.glob(f"figures/*/{stem}.json")):
            if (profile := path.parent.name) != self.profile:
                record, picture = read_json(path), path.with_suffix(".png").read_bytes()
                display(Markdown(f"**Profile `{profile}`.** {record['caption']} Data: {record['source']}."))
                display(Shown(picture, format="png", width=_width(picture)))

    def claim(self, claim, *, section, measured, holds, n, source):
        """Add a row to the ledger (see `claims.row`); `holds` is computed, and `measured` holds the numbers.

        The same claim again takes the place of the first: its cell was run twice.
        """
        row = claims.row(claim, section=section, measured=measured, holds=holds, n=n, source=source)
        self.rows = [*(r for r in self.rows if r["claim"] != claim), row]

    def close(self):
        """Write the ledger rows and return them as a table. Raises ValueError when there are none."""
        if not self.rows:
            raise ValueError(f"{self.name} records no claim")
        ledger = {
            "notebook": self.name,
            "title": _title(self.name),
            "profile": self.profile,
            "claims": self.rows,
        }
        write_json(self.folder / f"{self.name}.claims.json", ledger)
        table = pd.DataFrame(self.rows)[["claim", "section", "measured", "verdict", "n"]]
        return table.style.hide().set_table_attributes('style="text-align:left"').set_uuid(self.name)

    def _about(self):
        return {
            "notebook": self.name,
            "profile": self.profile,
            "parameters": self.parameters,
            "versions": compute.versions(),
            "hardware": compute.hardware(),
            "commit": _commit(),
            "wall_time_s": round(time.monotonic() - self.started, 1),
        }

    def _write_record(self, path, record):
        """Keep the record that stands if it differs only in when it was made: a repeated run changes no byte."""
        record = json.loads(json.dumps(record))  # tuples become lists, as they will when it is read back
        try:
            old = read_json(path)
        except (OSError, ValueError):
            old = {}  # missing or corrupted: made again here
        if {**old, **dict.fromkeys(PRODUCTION)} != {**record, **dict.fromkeys(PRODUCTION)}:
            write_json(path, record)


def _is_parameter(name, value):
    plain = isinstance(value, (str, int, float, bool, list, tuple, dict, type(None)))
    return plain and not name.startswith("_") and name not in ("In", "Out", "exit", "quit")


def _png(fig):
    """The figure in 256 colours: a third of the size. MAXCOVERAGE keeps rare colours, such as a line in a legend."""
    buffer = io.BytesIO()
    fig.savefig(buffer, dpi=DPI, metadata={"Software": None})
    out = io.BytesIO()
    image = Image.open(buffer).convert("RGB")
    image = image.quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    image.save(out, "png", optimize=True)
    return out.getvalue()


def _width(png):
    return min(Image.open(io.BytesIO(png)).width, 960)


def _title(name):
    source = ROOT / "notebooks" / f"{name}.py"
    lines = source.read_text(encoding="utf-8").splitlines() if source.exists() else []
    return next((line[4:] for line in lines if line.startswith("# # ")), name)


def _commit():
    try:
        git = ["git", "-C", str(ROOT)]
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run([*git, "status", "--porcelain", "lib"], capture_output=True, text=True, check=True)
        return head.stdout.strip() + (" with changes" if dirty.stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
