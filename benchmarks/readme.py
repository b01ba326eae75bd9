"""The tables in README.md and docs/scaling.md: each script rewrites the part between its own two markers."""

from pathlib import Path

from lib.files import write_bytes

HERE = Path(__file__).resolve().parent
GUESSING = 0.8  # of ten classes guessing errs on 0.9, and 64 images leave less than 0.1 of that to chance
GUESSES = (
    f"*Guesses*: the network errs on {GUESSING:.0%} or more of the clean images, where guessing among ten classes errs "
    "on 90%; so that row compares speed alone, not strength."
)


def guesses(clean_error, word=" (guesses)"):
    """The word to put beside an error, if the network's clean error is that of guessing."""
    return word if clean_error >= GUESSING else ""


def write_part(name, text, readme=HERE / "README.md"):
    """Put text (Markdown) in the place of what stands between the markers of bench_<name>.py."""
    begin, end = f"<!-- {name}: written by bench_{name}.py -->\n", f"\n<!-- end of {name} -->"
    before, rest = readme.read_text(encoding="utf-8").split(begin)
    after = rest.split(end)[1]
    write_bytes(readme, f"{before}{begin}{text}{end}{after}".encode())
