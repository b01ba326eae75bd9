#!/usr/bin/env python3
"""Build the site in build/site from the executed notebooks and figures/README.md. It needs no network to be read.

    python tools/build_site.py

Formulas become MathML here, pictures are inside the pages or beside them, and there is no script at all.
"""

import html
import json
import re
import shutil
import sys
from pathlib import Path

import nbformat
from latex2mathml.converter import convert
from layout import Layout
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from pygments.formatters import HtmlFormatter

from lib.files import write_bytes

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><link rel="stylesheet" href="style.css"></head>
<body><nav>{nav}</nav><main>{body}</main></body></html>
"""
STYLE = """
body { font: 17px/1.55 Georgia, serif; color: #222; margin: 0; }
nav { font: 14px/1.9 system-ui, sans-serif; padding: .6em 1.2em; background: #f3f3f1; border-bottom: 1px solid #ddd; }
nav a, nav b { margin-right: 1.1em; white-space: nowrap; }
main { max-width: 54em; margin: 0 auto; padding: 1em 1.2em 4em; }
h1, h2, h3 { font-family: system-ui, sans-serif; line-height: 1.25; }
a { color: #0b5394; text-decoration: none; } a:hover { text-decoration: underline; }
.anchor-link { display: none; }
img { max-width: 100%; height: auto; }
pre, code { font: 13px/1.45 ui-monospace, Menlo, Consolas, monospace; }
pre { overflow-x: auto; margin: 0; }
.highlight { background: #f7f7f5; border-left: 3px solid #ccd; padding: .5em .8em; margin: .8em 0 .4em; }
.jp-OutputArea-output { overflow-x: auto; margin: .4em 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font: 13px/1.4 system-ui, sans-serif; margin: 1em 0; }
th, td { border: 1px solid #ddd; padding: .3em .55em; text-align: left; vertical-align: top; }
th { background: #f3f3f1; }
[mathvariant="bold"] { font-weight: bold; }
mtd[columnalign="right"] { text-align: right; padding-right: .1em; }
mtd[columnalign="left"] { text-align: left; padding-left: .1em; }
.formula { overflow: auto hidden; padding: .5em 0; }
"""
REMOTE = re.compile(
    r"<script\b|<(?:link|img|iframe|source)\b[^>]*(?:src|href)=[\"']?(?:https?:)?//|@import|url\(\s*[\"']?https?:"
)


SPELLINGS = {"{aligned}": "{align*}", r"\arg": r"\operatorname{arg}"}  # what the converter knows by another name


class SiteError(ValueError):
    """Something that would not show, or would need the network."""


def mathml(tex: str, display: str) -> str:
    """A formula as MathML.

    Raises:
        SiteError: a command that the converter does not know; it would stand on the page as raw TeX.
    """
    for written, known in SPELLINGS.items():
        tex = re.sub(re.escape(written) + r"(?![A-Za-z])", lambda _, known=known: known, tex)
    try:
        made = convert(tex.strip(), display=display)
    except Exception as error:
        raise SiteError(f"cannot convert the formula {tex.strip()!r}: {type(error).__name__} {error}") from None
    if left := re.search(r"\\[A-Za-z]+|&(?!#?\w+;)", made):
        raise SiteError(f"cannot convert {left[0]} in the formula {tex.strip()!r}")
    return made


class Renderer(IPythonRenderer):
    """Markdown to HTML, formulas to MathML."""

    def inline_math(self, body: str) -> str:
        return mathml(body, "inline")

    def block_math(self, body: str) -> str:
        return f'<div class="formula">{mathml(body, "block")}</div>'

    def latex_environment(self, name: str, body: str) -> str:
        return self.block_math(rf"\begin{{{name}}}{body}\end{{{name}}}")


def markdown(source: str) -> str:
    return MarkdownWithMath(renderer=Renderer(escape=False)).render(source)


def site_links(body: str) -> str:
    """Turn links to notebooks and figures of the repository into links inside the site."""
    body = re.sub(r'href="(?:\.\./notebooks/)?([\w.-]+)\.ipynb(#[^"]*)?"', r'href="\1.html\2"', body)
    return re.sub(r'(src|href)="\.\./figures/', r'\1="figures/', body)


def notebook_body(path: Path, exporter: HTMLExporter) -> tuple[str, str]:
    """Title and HTML of one executed notebook."""
    notebook = nbformat.read(path, as_version=4)
    titles = [re.match(r"#+\s*(.+)", cell.source) for cell in notebook.cells if cell.cell_type == "markdown"]
    title = re.sub(r"[$\\]", "", next((match[1] for match in titles if match), path.stem))
    try:
        body, _ = exporter.from_notebook_node(notebook, {"metadata": {"path": str(path.parent)}})
    except SiteError as error:
        raise SiteError(f"{path.name}: {error}") from None
    return title, site_links(re.sub(r"<script\b.*?</script>", "", body, flags=re.S))


def index_body(layout: Layout, pages: list[tuple[str, str]]) -> str:
    """The contents, then figures/README.md with its links turned to the site's files."""
    text = (layout.figures / "README.md").read_text(encoding="utf-8")
    body = site_links(markdown(text))
    body = re.sub(r'(src|href)="(?!figures/)([\w-]+/[\w.-]+\.(?:png|csv|json))"', r'\1="figures/\2"', body)
    body = re.sub(r"<table>.*?</table>", r'<div class="scroll">\g<0></div>', body, flags=re.S)
    items = "".join(f'<li><a href="{name}.html">{html.escape(title)}</a></li>' for name, title in pages)
    return f"<h1>Notebooks</h1><ul>{items}</ul>{body}"


def build(layout: Layout) -> Path:
    """Build the whole site anew and return its folder.

    Raises:
        SiteError: no notebook, a formula that cannot be shown, or a part that would come from the network.
    """
    exporter = HTMLExporter(template_name="basic", embed_images=True)
    exporter.exclude_output_prompt = exporter.exclude_input_prompt = True
    exporter.register_filter("markdown2html", lambda source, **_: markdown(source))
    bodies = {path.stem: notebook_body(path, exporter) for path in sorted(layout.notebooks.glob("*.ipynb"))}
    if not bodies:
        raise SiteError(f"no executed notebook in {layout.notebooks}")
    pages = [(name, title) for name, (title, _) in bodies.items()]
    everything = {"index": ("Contents", index_body(layout, pages)), **bodies}
    site = layout.build / "site"
    shutil.rmtree(site, ignore_errors=True)
    for name, (title, body) in everything.items():
        nav = "".join(
            f"<b>{html.escape(text)}</b>" if other == name else f'<a href="{other}.html">{html.escape(text)}</a>'
            for other, text in [("index", "Contents"), *pages]
        )
        page = PAGE.format(title=html.escape(title), nav=nav, body=body)
        if found := REMOTE.search(page):
            raise SiteError(f"{name}: the page would need {found[0]!r}, which an offline reader does not have")
        write_bytes(site / f"{name}.html", page.encode())
    style = STYLE + HtmlFormatter(style="friendly").get_style_defs(".highlight") + "\n"
    write_bytes(site / "style.css", style.encode())
    for kind in ("png", "csv", "json"):
        for file in layout.figures.glob(f"*/*.{kind}"):
            target = site / "figures" / file.parent.name / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    return site


if __name__ == "__main__":
    try:
        print(build(Layout()))
    except (SiteError, OSError, json.JSONDecodeError) as error:
        sys.exit(f"build_site.py: {error}")
