"""Every notebook runs at a tiny size, by the command that users type, and leaves its figures, records and claims."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NAMES = sorted(path.stem for path in (ROOT / "notebooks").glob("*.py"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of figures and the runner's output, after one run of all notebooks."""
    folder = tmp_path_factory.mktemp("tiny")
    env = os.environ | {
        "FIGURES_DIR": str(folder / "figures"),
        "RUNS_DIR": str(folder / "runs"),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(ROOT / "tools" / "run.py"), "--profile", "tiny", "-j", "1"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "figures", done.stdout


def test_there_are_notebooks():
    assert NAMES


@pytest.mark.parametrize("name", NAMES)
def test_notebook_leaves_figures_and_claims(tiny, name):
    figures, output = tiny
    claims = json.loads((figures / f"{name}.claims.json").read_text())
    assert any(claims[ledger] for ledger in ("claims", "answers", "checks")) and claims["profile"] == "tiny"
    assert f"ok    {name}" in output
    pictures = sorted(figures.glob(f"{name[:3]}*.png"))
    assert pictures
    for picture in pictures:
        record = json.loads(picture.with_suffix(".json").read_text())
        assert picture.with_suffix(".csv").exists()
        assert record["notebook"] == name and record["parameters"]["profile"] == "tiny"
