"""The tables in README.md and docs/scaling.md: each script rewrites the part between its own two markers."""

from pathlib import Path

from lib.files import write_bytes

HERE = Path(__file__).resolve().parent


def write_part(name, text, readme=HERE / "README.md"):
    """Put text (Markdown) in the place of what stands between the markers of bench_<name>.py."""
    begin, end = f"<!-- {name}: written by bench_{name}.py -->\n", f"\n<!-- end of {name} -->"
    before, rest = readme.read_text(encoding="utf-8").split(begin)
    after = rest.split(end)[1]
    write_bytes(readme, f"{before}{begin}{text}{end}{after}".encode())
