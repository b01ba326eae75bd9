"""The site as a browser shows it, from the first page to the last; and that the index of the paper leads somewhere."""

import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from test_browser import CI, ROOT, page, reader  # noqa: F401 - `page` is a fixture

sys.path.insert(0, str(ROOT / "tools"))
import checkenv

INDEX = ROOT / "docs/paper_index.md"
SCREENSHOTS = ROOT / "build/screenshots"
WIDTHS = {"desktop": 1200, "phone": 390}
PICTURES = (("desktop", "light"), ("phone", "dark"))
TALLEST = 16000  # pixels of a screenshot, about what Chromium can draw in one
SHOWN = "([theme, width]) => document.documentElement.dataset.theme == theme && innerWidth == width"
LOOK = """async () => {
    if (window.MathJax) await MathJax.startup.promise;
    const seen = [], words = document.createTreeWalker(document.querySelector('main'), NodeFilter.SHOW_TEXT);
    while (words.nextNode()) {
        const parent = words.currentNode.parentElement;
        if (!parent.closest('pre, code, script, style, mjx-container') && parent.offsetParent !== null)
            seen.push(words.currentNode.data);
    }
    const all = (what) => [...document.querySelectorAll(what)];
    return {
        raw: seen.filter((text) => /\\$|\\\\begin|\\\\\\(|\\]\\(/.test(text)),
        untypeset: all('.math').filter((math) => !math.querySelector('mjx-container')).map((math) => math.textContent),
        wrong: all('mjx-merror').map((error) => error.textContent),
        unloaded: all('img').filter((image) => !image.complete || !image.naturalWidth).map((image) => image.src),
        nameless: all('img').filter((image) => !/^[^/]*[a-z]{3}[^/.]*/i.test(image.alt) || /\\.png$/.test(image.alt))
            .map((image) => image.alt + ' ' + image.src.slice(0, 99)),
        run: all('.provenance').map((line) => line.innerText).join(),
        ids: all('[id]').map((element) => element.id),
        links: all('a[href]').map((link) => link.href),
    }
}"""


def targets():
    """{link of the index: (notebook, id of its section)}"""
    links = re.findall(r"\]\(\.\./notebooks/(\w+)\.ipynb#([^)]*)\)", INDEX.read_text(encoding="utf-8"))
    assert len(links) == INDEX.read_text(encoding="utf-8").count("](../notebooks/")  # each names a section
    return links


def test_each_line_of_the_index_leads_to_a_section():
    make_id = pytest.importorskip("docutils.nodes").make_id
    lines = [line for line in INDEX.read_text(encoding="utf-8").splitlines() if re.match(r"\| (?!---)", line)]
    heads = sum("| here |" in line for line in lines)
    assert heads == 3 and sum("](../notebooks/" in line for line in lines) == len(lines) - heads
    for name, section in targets():
        source = (ROOT / f"notebooks/{name}.py").read_text(encoding="utf-8")
        headings = {make_id(heading) for heading in re.findall(r"^# ##+ (.*)$", source, flags=re.M)}
        assert section in headings, (name, section)


def test_the_index_covers_the_questions_of_the_ledger():
    """As many lines for a reviewer by name as the ledger has names of reviewers, and none that it does not have."""
    ledger = (ROOT / "figures/README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\| (Reviewers? \d(?: and \d)?)(?:,[^|]*)? \|", ledger))
    assert named == set(re.findall(r"^\| (Reviewers? \d(?: and \d)?)", INDEX.read_text(encoding="utf-8"), flags=re.M))


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "figures/README.md", "docs/paper_index.md"])
def test_no_link_of_the_repository_is_dead(name):
    links = re.findall(r"\]\((?!https://)([^)#]+)[^)]*\)", (ROOT / name).read_text(encoding="utf-8"))
    assert all((ROOT / name).parent.joinpath(link).exists() for link in links), links
    assert links or name == "CONTRIBUTING.md"


def test_the_lines_of_the_readme_run(digits, capsys):
    (lines,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)
    names = {}
    exec(lines, names)
    model, x, y, attack = (names[name] for name in ("model", "x", "y", "attack"))
    x_adv = attack(model, x, y)
    assert torch.equal(x, digits.x_test[:100]) and 0.09 < (x_adv - x).abs().max() <= 0.1 + 1e-6
    error, values = capsys.readouterr().out.split(" ", 1)
    assert (model(x).argmax(1) != y).double().mean() <= float(error) <= 1
    assert values.startswith("tensor([") and values.count(",") == 2


@pytest.fixture(scope="module")
def site():
    lacking = checkenv.problems(ROOT, extras=("site",))
    if lacking:
        assert not CI, lacking
        pytest.skip(f"the extra `site`: {lacking[0]}")
    done = subprocess.run([ROOT / "run_all.sh", "--site"], capture_output=True, text=True, env=reader(ROOT))
    assert done.returncode == 0, done.stderr[-3000:]
    return ROOT / "build/site"


def file_of(link):
    return Path(unquote(urlsplit(link).path))


def states(page, name):  # noqa: F811
    """The page at both widths, light and dark: no sideways scrolling. Two of the four are kept as pictures."""
    for theme in ("light", "dark"):
        page.emulate_media(color_scheme=theme)
        for device, width in WIDTHS.items():
            page.set_viewport_size({"width": width, "height": 900})
            page.wait_for_function(SHOWN, arg=[theme, width])  # the page hears of both a moment later
            wide, tall = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.scrollHeight]")
            assert wide <= width, (name, device, wide)
            if (device, theme) in PICTURES:
                clip = {"x": 0, "y": 0, "width": width, "height": min(tall, TALLEST)}
                path = SCREENSHOTS / f"{name}-{device}-{theme}.jpg"
                page.screenshot(path=path, type="jpeg", quality=60, full_page=True, clip=clip, animations="disabled")


def test_walk_the_site(page, site):  # noqa: F811
    said, asked, found = [], [], {}
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.goto((site / "index.html").as_uri())
    page.wait_for_url("**/docs/index.html")  # where the root leads
    waiting = [page.url]
    while waiting:
        page.goto(waiting.pop())
        seen = page.evaluate(LOOK)
        here = file_of(page.url)
        for trouble in ("raw", "untypeset", "wrong", "unloaded", "nameless"):
            assert not seen[trouble], (here, trouble, seen[trouble])
        ran = r"This run\. Profile: \w+\. Data: .+\. Machine: .+\. Commit and day: \w{7,}.*\. Files: .+\.py, .+\.ipynb."
        assert re.fullmatch(ran, seen["run"]) or here.parent.name != "notebooks", (here, seen["run"])
        found[here] = seen
        states(page, here.relative_to(site).with_suffix("").as_posix().replace("/", "-"))
        inside = {link.partition("#")[0] for link in seen["links"] if link.startswith("file:")}
        waiting = [link for link in {*waiting, *inside} if link.endswith(".html") and file_of(link) not in found]
    assert not said and not [url for url in asked if not url.startswith((site.as_uri(), "data:", "blob:"))], said
    assert_complete(found, site)


def assert_complete(found, site):
    """All pages were reached, no link is dead, and the index is one click away from everywhere."""
    pages = {path for folder in ("docs", "notebooks", "benchmarks") for path in site.glob(f"{folder}/*.html")}
    assert pages <= set(found) and len(pages) > 15
    for here, seen in found.items():
        assert (site / "docs/paper_index.html").as_uri() in [link.partition("#")[0] for link in seen["links"]], here
        for link in seen["links"]:
            if link.startswith("file:"):
                assert file_of(link).exists(), (here, link)
                anchor = unquote(urlsplit(link).fragment)
                assert not anchor or anchor in found[file_of(link)]["ids"], (here, link)
