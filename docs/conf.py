"""The site: `./run_all.sh --site` builds it in build/site, and it needs no network to be read.

Its sources are the executed notebooks, the pages of this folder, and the parts of README.md and figures/README.md that
these include. Nothing is run.
"""

import json
import re
import subprocess
from pathlib import Path

from lib.files import git

ROOT = Path(__file__).resolve().parents[1]

project = "On the Loss Landscape of Adversarial Training: a companion"
html_title = "Loss landscape of adversarial training"
author = "The maintainers of adversarial-landscape"
copyright = "the maintainers of adversarial-landscape, MIT licence"
extensions = ["myst_nb", "sphinx.ext.mathjax", "sphinx-mathjax-offline"]
root_doc = "docs/index"
include_patterns = ["docs/*.md", "notebooks/*.ipynb", "benchmarks/README.md"]
exclude_patterns = [".*", "build", "data", "runs", "figures", "lib", "tests", "tools"]  # not searched
suppress_warnings = ["myst.header"]  # an included part begins at the level that it has in its file

nb_execution_mode = "off"
nb_render_markdown_format = "myst"
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"
myst_enable_extensions = ["dollarmath", "amsmath", "attrs_block", "attrs_inline"]
myst_dmath_double_inline = True  # display formulas within a paragraph
myst_heading_anchors = 3

html_theme = "sphinx_book_theme"
html_theme_options = {
    "home_page_in_toc": True,
    "show_navbar_depth": 1,
    "use_fullscreen_button": False,
    "use_download_button": False,  # notebooks name theirs
    "footer_content_items": ["copyright.html"],
}
html_context = {"default_mode": "auto"}  # light or dark as the reader's system is
html_static_path = ["static"]
html_css_files = ["site.css"]
html_extra_path = ["root"]
html_copy_source = False


def _day(commit):
    """The day of a commit, or nothing where git or the commit is not there."""
    try:
        return git(ROOT, "show", "-s", "--format=%cs", commit.split()[0]).strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _distinct(values):
    return "; ".join(dict.fromkeys(value for value in values if value))


def provenance(name):
    """Where a notebook's outputs come from, in one line, out of its figures' records."""
    records = [json.loads(path.read_text("utf-8")) for path in sorted(ROOT.glob("figures/quick/*.json"))]
    records = [record for record in records if record["notebook"] == name and "hardware" in record]
    commits = _distinct(f"{record['commit']} {_day(record['commit'])}".strip() for record in records)
    machines = _distinct(f"{record['hardware']['device']}, {record['hardware']['precision']}" for record in records)
    profiles = _distinct(f"`{record['profile']}`" for record in records)
    data = _distinct(part for record in records for part in record["source"].split("; "))
    return (
        f"**This run.** Profile: {profiles}. Data: {data}. Machine: {machines}. Commit and day: {commits}. "
        f"Files: [{name}.py]({name}.py), {{download}}`{name}.ipynb`."
    )


def dress_notebook(app, docname, source):
    """Say where a notebook's outputs come from, fold its code, and give each picture its caption as alt text."""
    if not docname.startswith("notebooks/"):
        return
    notebook = json.loads(source[0])
    words = {"cell_type": "markdown", "id": "provenance", "metadata": {}}
    words["source"] = "{.provenance}\n" + provenance(docname.removeprefix("notebooks/"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["metadata"].setdefault("tags", []).append("hide-input")
            alt = [output["metadata"].get("image/png", {}).get("alt", "") for output in cell["outputs"]
                   if "image/png" in output.get("data", {})]  # fmt: skip
            cell["metadata"]["mystnb"] = {"image": {"alt": " ".join(alt)}}
    notebook["cells"].insert(1, words)
    source[0] = json.dumps(notebook)


def _as_drawn(match):
    """A picture's address, with the width at which it was drawn: it has 200 dots per inch, a page has 96."""
    width = int.from_bytes((ROOT / "figures" / match[1]).read_bytes()[16:20], "big")
    return f"{match[0]}{{width={round(width * 96 / 200)}px}}"


def move_links(app, path, docname, source):
    """Links of an included part, from its own folder to this one; a link to a picture leads to it in the gallery."""
    text = source[0]
    if Path(path).parts[0] == "figures":
        text = re.sub(r"(?<!!)\[\w+\]\(([\w-]+)/(\w+)\.png\)", r"[\2](#\1-\2)", text)
        text = re.sub(r"^(?=!\[.*\]\(([\w-]+)/(\w+)\.png\)$)", r"(\1-\2)=\n", text, flags=re.M)
        text = re.sub(r"\]\(([\w-]+/\w+\.png)\)$", _as_drawn, text, flags=re.M)
        text = re.sub(r"\]\((?=[\w-]+/)", "](../figures/", text)
    else:
        text = re.sub(r"\]\((?!https?:|#)", "](../", text).replace("../figures/README.md", "claims.md")
    source[0] = text


def setup(app):
    app.connect("source-read", dress_notebook)
    app.connect("include-read", move_links)
