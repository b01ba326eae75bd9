"""What a reader does, in a real browser: clone, open, run, change a number, run again, interrupt, save, close."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CI = os.environ.get("CI") == "true"
NAMES = sorted(path.stem for path in (ROOT / "notebooks").glob("*.py"))
PLAYED = "03_early_training"
TINY = {"images": [192, 50], "width": 1, "epochs": 1, "num_steps": 1, "eval_every": 1, "eval_images": 50}
PATIENCE = 300  # seconds for one step, most of them spent importing torch on a busy machine

try:
    from playwright.sync_api import sync_playwright
except ImportError:
    sync_playwright = None


def browser_path(playwright):
    """Debian's Chromium, a Chrome, or playwright's own."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    places = [*map(shutil.which, names), "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
              playwright.chromium.executable_path]  # fmt: skip
    return next((place for place in places if place and Path(place).exists()), None)


def git(folder, *arguments):
    command = ["git", "-c", "user.name=reader", "-c", "user.email=reader@example.org", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


def tool(folder, *arguments):
    """A command of the project, with what it prints."""
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, env=reader(folder))
    return done.stdout + done.stderr


def reader(folder):
    """The environment of a reader whose active Python is this one, and whose `lib` is that of the clone."""
    env = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "FIGURES_DIR", "RUNS_DIR", "PROFILE")}
    own = {f"JUPYTER_{name}_DIR": str(folder.parent / "jupyter") for name in ("CONFIG", "DATA", "RUNTIME")}
    return env | own | {"PATH": f"{Path(sys.executable).parent}:{env['PATH']}", "PYTHONPATH": str(folder)}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A browser's page, or the reason why there is none. In CI there is no such reason."""
    if sync_playwright is None:
        assert not CI, "playwright is not installed"
        pytest.skip("playwright is not installed (the extra `browser`)")
    with sync_playwright() as playwright:
        path = browser_path(playwright)
        if path is None:
            assert not CI, "no browser"
            pytest.skip("no Chromium, Chrome or browser of playwright's")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(PATIENCE * 1000)
        yield page
        browser.close()


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reader") / "a clone"
    git(ROOT, "clone", "-q", ".", folder)
    return folder


@pytest.fixture(scope="module")
def lab(page, clone):
    """JupyterLab as `./run_all.sh --lab` starts it, in the browser."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--no-browser", "--allow-root", f"--port={port}", "--IdentityProvider.token=", "--expose-app-in-browser"]
    with (clone.parent / "lab.log").open("w") as log:
        process = subprocess.Popen([clone / "run_all.sh", "--lab", *options], env=reader(clone), stdout=log, stderr=log)
    address, deadline = f"http://127.0.0.1:{port}/lab", time.monotonic() + PATIENCE
    while True:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            break
        except OSError:
            words = (clone.parent / "lab.log").read_text()
            assert process.poll() is None and time.monotonic() < deadline, words
            time.sleep(0.5)
    page.goto(address)
    page.wait_for_selector(".jp-DirListing-item")
    yield Lab(page, clone)
    process.terminate()
    process.wait(30)


class Lab:
    """What hands do in JupyterLab."""

    def __init__(self, page, folder):
        self.page, self.folder = page, folder

    def do(self, command, **arguments):
        """A command of its menus; returns when it is done. A question in a dialog is an error."""
        script = """([name, args, seconds]) => Promise.race([
            window.jupyterapp.commands.execute(name, args).then(() => null),
            new Promise((_, no) => setInterval(() => {
                const dialog = document.querySelector('.jp-Dialog');
                if (dialog) no(new Error(dialog.innerText));
            }, 200)),
            new Promise((_, no) => setTimeout(() => no(new Error('nothing happens')), 1000 * seconds))])"""
        self.page.evaluate(script, [command, arguments, PATIENCE])
        assert not (said := self.page.locator(".jp-Dialog").all_inner_texts()), said

    def open(self, name, **how):
        """Open a file and wait until its content is there: JupyterLab calls "read-only" what it has not yet read."""
        self.do("docmanager:open", path=name, **how)
        self.page.wait_for_selector(f".lm-TabBar-tab.lm-mod-current:has-text('{name}')")
        self.current("panel.revealed.then(() => panel.sessionContext?.ready).then(() => panel.context.ready)")

    def current(self, expression):
        return self.page.evaluate(
            f"() => {{ const panel = window.jupyterapp.shell.currentWidget; return {expression}; }}"
        )

    def save_and_close(self):
        self.do("docmanager:save")
        self.current("panel.sessionContext.shutdown()")
        self.do("application:close")

    def cells(self):
        return self.current("panel.content.model.toJSON().cells")

    def run_all(self):
        """Run all cells; returns the text that they show and the names of errors.

        After an error a kernel gives up what still waits in its queue, for as long as it takes; what is run meanwhile
        is given up in silence, too. So ask for nothing at all first, until that is done."""
        kernel = "panel.sessionContext.session.kernel"
        self.current(f"""(async () => {{
            const empty = () => {kernel}.requestExecute({{code: '', silent: true}}).done;
            while ((await empty()).content.status !== 'ok');
            return null; }})()""")
        self.do("notebook:run-all-cells")
        outputs = [output for cell in self.cells() for output in cell.get("outputs", [])]
        return json.dumps(outputs), [output["ename"] for output in outputs if output["output_type"] == "error"]

    def restart(self):
        self.current("panel.sessionContext.session.kernel.restart()")

    def write(self, number, text):
        """Put text in place of a cell's, by the keyboard."""
        self.current(f"(panel.content.deselectAll(), panel.content.activeCellIndex = {number}, null)")
        self.do("notebook:enter-edit-mode")
        self.current("(panel.content.activeCell.editor.focus(), null)")
        self.page.keyboard.press("ControlOrMeta+a")
        self.page.keyboard.insert_text(text)
        self.page.keyboard.press("Escape")
        assert "".join(self.cells()[number]["source"]) == text


def parameters(cells, **changes):
    """Number and text of the parameters cell with other values in it."""
    number = next(i for i, cell in enumerate(cells) if "parameters" in cell["metadata"].get("tags", []))
    text = "".join(cells[number]["source"])
    for name, value in changes.items():
        text, found = re.subn(rf"^{name} = .*$", f"{name} = {value!r}", text, flags=re.M)
        assert found == 1, name
    return number, text


def test_to_open_and_save_changes_nothing(lab):
    assert git(lab.folder, "status", "--porcelain") == ""
    lab.page.locator(".jp-DirListing-item", has_text=f"{PLAYED}.py").dblclick()  # as a notebook, not as text
    lab.page.wait_for_selector(".jp-Notebook h1:has-text('Early training'):visible")
    lab.do("application:close")
    for name in NAMES:
        for suffix in (".ipynb", ".py"):
            lab.open(name + suffix)
            assert len(lab.cells()) > 5
            lab.save_and_close()
            assert git(lab.folder, "status", "--porcelain") == "", name + suffix


def test_the_text_editor_raises_no_false_alarm(lab):
    lab.open(f"{PLAYED}.ipynb")
    lab.open(f"{PLAYED}.py", factory="Editor")
    editor = lab.page.locator(".jp-FileEditor:visible .cm-content")
    for key in ("#", "Backspace"):
        editor.press(key)
        lab.do("docmanager:save")
    lab.do("application:close")
    lab.do("application:close")
    assert git(lab.folder, "status", "--porcelain") == ""


def test_play(lab):
    """Run, change, run again in the same kernel and after a restart, a section alone, an interrupt: nothing is lost."""
    page_before, pairs = (lab.folder / "figures/README.md").read_bytes(), tool(lab.folder, "tools/check_pairs.py")
    lab.open(f"{PLAYED}.py")
    small = {"eps_grid": [0.0, 0.4], "seeds": [0], "changes": {"lenet on mnist5k": TINY}}
    lab.write(*parameters(lab.cells(), **small))
    shown, errors = lab.run_all()
    assert not errors and "Your own settings" in shown, shown
    lab.write(*parameters(lab.cells(), seeds=[]))
    shown, errors = lab.run_all()
    assert errors and '"traceback": ["parameters cell: seeds is empty"]' in shown, shown
    lab.page.screenshot(path=lab.folder.parent / "refused.png")
    lab.write(*parameters(lab.cells(), eps_grid=[0.0, 0.3], seeds=[1, 2]))
    shown, errors = lab.run_all()  # in the same kernel
    assert not errors and "seeds = [1, 2]" in shown, shown
    lab.restart()
    assert lab.run_all()[1] == []
    lab.page.screenshot(path=lab.folder.parent / "played.png")

    lab.restart()
    cells = lab.cells()
    alone = next(i for i, cell in enumerate(cells) if "runs.grid" in "".join(cell["source"]))
    lab.current(f"(panel.content.deselectAll(), panel.content.activeCellIndex = {alone}, null)")
    lab.do("notebook:run-cell")
    said = json.dumps(lab.cells()[alone]["outputs"])
    assert "NameError" in said and re.search(r"comes from the section .*: run the cells from the top", said), said

    lab.write(
        *parameters(cells, seeds=[3, 4, 5], changes={"lenet on mnist5k": TINY | {"images": [4000, 50], "epochs": 40}})
    )
    lab.current("(panel.context.__running = window.jupyterapp.commands.execute('notebook:run-all-cells'), null)")
    deadline = time.monotonic() + PATIENCE
    while not any("runs:" in json.dumps(cell.get("outputs")) for cell in lab.cells()):
        assert time.monotonic() < deadline
        lab.page.wait_for_timeout(200)
    lab.page.wait_for_timeout(2000)
    lab.current("panel.sessionContext.session.kernel.interrupt()")
    lab.current("panel.context.__running.then(() => null, () => null)")
    said = json.dumps(lab.cells()[alone]["outputs"])
    assert "Interrupted. What was trained and measured is kept" in said and "Traceback" not in said, said
    lab.current(f"(panel.content.activeCellIndex = {alone}, panel.content.scrollToItem({alone}), null)")
    lab.page.screenshot(path=lab.folder.parent / "interrupted.png")
    lab.write(*parameters(lab.cells(), seeds=[1, 2], changes={"lenet on mnist5k": TINY}))
    assert lab.run_all()[1] == []
    lab.save_and_close()

    names = sorted(line[3:] for line in git(lab.folder, "status", "--porcelain").splitlines())
    assert names == [f"notebooks/{PLAYED}.ipynb", f"notebooks/{PLAYED}.py"]
    assert (lab.folder / "build/mine/figures").exists()
    tool(lab.folder, "tools/gallery.py")
    assert (lab.folder / "figures/README.md").read_bytes() == page_before
    said = tool(lab.folder, "tools/check_pairs.py")  # that the parameters are others, and nothing else
    assert set(said.splitlines()) - set(pairs.splitlines()) <= set(said.splitlines()[-2:]) and "quick.json" in said, (
        said
    )


COMMANDS = {
    "jupyter execute": ["-m", "jupyter", "execute", f"notebooks/{PLAYED}.ipynb"],
    "nbconvert": [
        "-m",
        "nbconvert",
        "--execute",
        "--to",
        "notebook",
        "--output-dir=../out",
        f"notebooks/{PLAYED}.ipynb",
    ],
    "papermill": ["-m", "papermill", f"notebooks/{PLAYED}.ipynb", "../out.ipynb", "-y", "seeds: [2]", "-k", "python3"],
    "sync of the .ipynb": ["-m", "jupytext", "--sync", f"notebooks/{PLAYED}.ipynb"],
    "sync of the .py": ["-m", "jupytext", "--sync", f"notebooks/{PLAYED}.py"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_other_tools_leave_what_is_committed(lab, command):
    """On the notebook as the reader left it."""
    paths = [path for folder in ("notebooks", "figures") for path in lab.folder.glob(f"{folder}/*") if path.is_file()]
    before = {path: path.read_bytes() for path in paths}
    os.utime(lab.folder / COMMANDS[command][-1]) if "sync" in command else None
    done = subprocess.run(
        [sys.executable, *COMMANDS[command]], cwd=lab.folder, env=reader(lab.folder), capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert all(path.read_bytes() == content for path, content in before.items())
    assert all(PLAYED in line for line in git(lab.folder, "status", "--porcelain").splitlines())


def test_what_was_played_with_comes_back(lab):
    git(lab.folder, "checkout", "--", "notebooks")
    assert git(lab.folder, "status", "--porcelain") == ""
    assert tool(lab.folder, "tools/check_pairs.py") == f"{len(NAMES)} pairs agree\n"
