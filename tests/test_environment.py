"""The ways to make the environment (run_all.sh, pip or uv, conda) ask for the same packages at the same versions."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import psutil
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import checkenv  # noqa: E402

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NEEDS = [Requirement(text) for text in PROJECT["dependencies"]]
EXTRAS = [Requirement(text) for needs in PROJECT["optional-dependencies"].values() for text in needs]
LOCK = re.sub(r"^#.*\n", "", (ROOT / "requirements.lock").read_text(), flags=re.MULTILINE)
PINS = [Requirement(line.split(" \\\n")[0]) for line in re.split(r"\n(?! )", LOCK.strip())]
MACHINES = [
    {"python_version": python, "python_full_version": f"{python}.5", **machine}
    for python in ("3.11", "3.12", "3.13")
    for machine in (
        {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"},
        {"sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64"},
    )
]


def pins_on(machine):
    """{package: version} that the lock gives on one kind of machine; a package pinned twice there is an error."""
    env = default_environment() | machine
    pins = {}
    for pin in PINS:
        if pin.marker is None or pin.marker.evaluate(env):
            assert canonicalize_name(pin.name) not in pins, f"{pin.name} is pinned twice on {machine}"
            (clause,) = pin.specifier
            pins[canonicalize_name(pin.name)] = clause.version
    return pins


@pytest.mark.parametrize("machine", MACHINES, ids=lambda m: f"{m['sys_platform']}-{m['python_version']}")
def test_every_need_is_pinned_within_its_range(machine):
    pins = pins_on(machine)
    for need in NEEDS + EXTRAS:
        assert need.specifier.contains(pins[canonicalize_name(need.name)], prereleases=True), need
    assert pins["torch"] == "2.11.0" and pins["torchvision"] == "0.26.0"


def test_the_lock_is_plain_and_universal():
    """A version and its hashes for every package; no URL, path, option or local version."""
    pin = r"[a-z0-9._-]+==[A-Za-z0-9.!]+( ; [^\\\n]+)?( \\\n    --hash=sha256:[0-9a-f]{64})+\n"
    assert len(re.findall(pin, LOCK)) == len(PINS) and re.sub(pin, "", LOCK) == ""
    markers = " ".join(str(pin.marker) for pin in PINS if pin.marker)
    assert "linux" in markers and "darwin" in markers and "python_full_version" in markers


def test_conda_brings_what_the_project_needs_at_the_versions_of_the_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["name"] == PROJECT["name"]
    assert environment["channels"] == ["conda-forge", "nodefaults"]
    python, pip, packages = environment["dependencies"]
    version = re.fullmatch(r"python=(3\.\d+)", python)[1]
    assert version in SpecifierSet(PROJECT["requires-python"]) and pip == "pip"
    pins = pins_on(next(machine for machine in MACHINES if machine["python_version"] == version))
    needs = [Requirement(need).name for need in PROJECT["dependencies"]]
    assert packages["pip"] == [f"{name}=={pins[canonicalize_name(name)]}" for name in needs]


def test_binder_and_the_dev_container_make_the_conda_environment():
    """Read, not run: both take environment.yml, then the project without its needs."""
    assert (ROOT / ".binder/environment.yml").resolve() == ROOT / "environment.yml"
    assert (ROOT / ".binder/postBuild").stat().st_mode & 0o111
    container = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text())
    made, then = container["postCreateCommand"].split(" && ")
    assert made == "conda env create -f environment.yml"
    assert then == f"conda run -n {PROJECT['name']} pip install --no-deps -e ."
    assert "\npip install --no-deps -e .\n" in (ROOT / ".binder/postBuild").read_text()
    interpreter = container["customizations"]["vscode"]["settings"]["python.defaultInterpreterPath"]
    assert f"/envs/{PROJECT['name']}/" in interpreter


def test_actions_are_pinned_by_commit():
    uses = [
        line for path in (ROOT / ".github").rglob("*.yml") for line in path.read_text().splitlines() if "uses:" in line
    ]
    assert uses and all(re.search(r"uses: [\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$", line) for line in uses), uses


def test_every_night_the_whole_drill_runs_and_the_locked_versions_are_audited():
    """Read, not run. In YAML 1.1 the key `on` is True."""
    nightly = yaml.safe_load((ROOT / ".github/workflows/nightly.yml").read_text())
    (schedule,) = nightly[True]["schedule"]
    assert re.fullmatch(r"\d+ \d+ \* \* \*", schedule["cron"]) and "workflow_dispatch" in nightly[True]
    runs = {name: [step["run"] for step in job["steps"] if "run" in step] for name, job in nightly["jobs"].items()}
    assert runs["drill"] == ["./run_all.sh --setup", "./run_all.sh --test -m drill tests/test_drill.py"]
    (audit,) = runs["audit"]
    assert re.search(r" pip-audit==[\d.]+ pip-audit .*-r requirements\.lock$", audit)
    pythons = {machine["python_version"] for machine in MACHINES}
    assert set(nightly["jobs"]["audit"]["strategy"]["matrix"]["python"]) == pythons


# ---------------------------------------------------------------- tools/checkenv.py: is this interpreter fit?

versions = st.from_regex(r"[0-9]{1,2}(\.[0-9]{1,2}){0,2}(rc1|\.post1|\+cu130)?", fullmatch=True)
clauses = st.tuples(
    st.sampled_from(["==", "!=", "<=", ">=", "<", ">", "~="]),
    st.from_regex(r"[0-9]{1,2}\.[0-9]{1,2}(\.[0-9]{1,2})?", fullmatch=True),
)


@given(versions, st.lists(clauses, max_size=2))
def test_version_clauses_agree_with_packaging(version, parts):
    spec = ",".join("".join(part) for part in parts)
    if "post" in version or "rc" in version:  # equality with a plain release is all that is claimed for these
        spec = ",".join(part for part in spec.split(",") if part.startswith((">=", "<", "~="))).replace("<=", "<")
    assert checkenv.satisfies(version, spec) == SpecifierSet(spec).contains(Version(version), prereleases=True)


@pytest.mark.parametrize("version, spec, held", [("3.12.4", "==3.12.*", True), ("3.1", "!=3.1.*", False)])
def test_version_wildcards(version, spec, held):
    assert checkenv.satisfies(version, spec) is held is SpecifierSet(spec).contains(version)


def test_an_unreadable_clause_is_an_error():
    with pytest.raises(ValueError, match="cannot read the version clause 'about 3'"):
        checkenv.satisfies("3", ">=2,about 3")


def project(folder, dependencies, python=">=3.11"):
    listed = ", ".join(f'"{need}"' for need in dependencies)
    (folder / "pyproject.toml").write_text(
        f'[project]\nrequires-python = "{python}"\ndependencies = [{listed}]\n[project.optional-dependencies]\n'
        'dev = ["no-such-tool>=1"]\n'
    )
    return folder


def test_this_environment_fits():
    assert checkenv.problems(ROOT, extras=("dev",)) == []


def test_what_does_not_fit_is_named(tmp_path):
    folder = project(tmp_path, ["numpy>=1000", "no-such-package", "pyyaml>=1"])
    found = checkenv.problems(folder, extras=("dev",))
    assert re.fullmatch(r"numpy [\d.]+ is not >=1000", found[0])
    assert found[1:3] == ["no-such-package is not installed", "no-such-tool is not installed"]
    assert found[3:] == ["`import lib` does not lead to this checkout"]  # it leads to ours, not to the folder


def test_an_old_python_is_named(tmp_path):
    found = checkenv.problems(project(tmp_path, [], python=">=3.99"), python_only=True)
    assert re.fullmatch(r"Python 3[\d.]+ is not >=3\.99", *found)


# ---------------------------------------------------------------- run_all.sh


def start(script, *arguments, **options):
    return subprocess.run([script, *arguments], capture_output=True, text=True, timeout=60, **options)


@pytest.fixture
def active():
    """Variables under which this interpreter is the active one."""
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    env.pop("VIRTUAL_ENV", None)
    assert checkenv.problems(ROOT, extras=("dev",)) == []
    return env


def test_run_all_takes_an_active_environment_that_fits(tmp_path, active):
    link = tmp_path / "a link"
    link.symlink_to(ROOT / "run_all.sh")
    look = "import os, sys; print(sys.prefix, os.getcwd(), os.environ['PYTHONHASHSEED'])"
    done = start(link, "--python", "-c", look, cwd=tmp_path, env=active)
    assert done.stdout.split() == [sys.prefix, str(ROOT), "0"], done.stderr


def test_folders_are_where_the_caller_is(tmp_path, active):
    given = {"RUNS_DIR": "my runs", "DATA_DIR": "/data", "FIGURES_DIR": "~/figures"}
    look = "import os; print([os.environ[name] for name in ('RUNS_DIR', 'DATA_DIR', 'FIGURES_DIR')])"
    done = start(ROOT / "run_all.sh", "--python", "-c", look, cwd=tmp_path, env=active | given)
    assert done.stdout.strip() == str([f"{tmp_path}/my runs", "/data", "~/figures"]), done.stderr


def test_run_all_passes_options_and_errors_on(tmp_path, active):
    done = start(ROOT / "run_all.sh", "--profile", "no-such", env=active, cwd=tmp_path)
    assert done.returncode == 2 and "no profile 'no-such'" in done.stderr
    assert "Usage: ./run_all.sh" in start(ROOT / "run_all.sh", "--help").stdout


def test_what_a_shell_sets_for_other_programs_does_not_lead_astray(tmp_path, active):
    """PYTHONSAFEPATH would take a script's own folder from where it finds modules; with CDPATH `cd` speaks."""
    own = {"PYTHONSAFEPATH": "1", "PYTHONWARNINGS": "error", "PYTHON": sys.executable}
    look = "import beside, os; print([name in os.environ for name in os.environ['NAMES'].split()])"
    (tmp_path / "script.py").write_text(look)
    (tmp_path / "beside.py").touch()
    env = active | own | {"NAMES": " ".join(own)}
    done = start(ROOT / "run_all.sh", "--python", tmp_path / "script.py", env=env)
    assert done.stdout.strip() == "[False, False, True]", done.stderr
    relative = os.path.join(ROOT.name, "run_all.sh")
    for mode in ("--help", "--python"):
        done = start("bash", relative, mode, "-V", cwd=ROOT.parent, env=active | {"CDPATH": str(ROOT.parent)})
        assert done.returncode == 0, done.stderr


UV = """\
#!/bin/sh
# Stands in for uv: makes a bare environment and links lib into it, without the network.
case $* in *--require-hashes*-r*) echo lock ;; *--no-deps*) echo project ;; *) echo "$1" ;; esac >>calls
case $1 in
  venv) exec {python} -m venv --without-pip .venv ;;
  pip) [ -e broken ] && echo "no such wheel" && exit 1
       [ -e slow ] && sleep 60
       pwd >"$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/here.pth" ;;
esac
"""


INSTALLS = ["lock", "project"]


class Checkout:
    """A small project with run_all.sh, whose set-up needs no network."""

    def __init__(self, folder, tools):
        self.folder = folder
        for name in ("run_all.sh", "tools/checkenv.py"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
        (folder / "lib").mkdir()
        (folder / "lib" / "__init__.py").touch()
        (folder / "requirements.lock").touch()
        text = '[project]\nrequires-python = ">=3.11"\ndependencies = []\noptional-dependencies = {dev = []}\n'
        (folder / "pyproject.toml").write_text(text)
        tools.mkdir(exist_ok=True)
        (tools / "uv").write_text(UV.format(python=sys.executable))
        (tools / "uv").chmod(0o755)
        self.env = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"}

    def where(self, **options):
        """Where a started Python finds lib, and what the set-up did for it."""
        (self.folder / "calls").write_text("")
        script = [self.folder / "run_all.sh", "--python", "-c", "import lib; print(lib.__file__)"]
        done = start(*script, env=self.env, cwd="/", **options)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip(), (self.folder / "calls").read_text().split()


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path / "a project", tmp_path / "bin")


def test_the_second_start_uses_the_environment_of_the_first(checkout):
    ours = str(checkout.folder / "lib" / "__init__.py")
    assert checkout.where() == (ours, ["venv", *INSTALLS])
    assert checkout.where() == (ours, [])
    (checkout.folder / "requirements.lock").write_text("numpy==2.0\n")
    assert checkout.where() == (ours, INSTALLS)  # the lock changed: brought up to date


@pytest.mark.parametrize("damage", ["no stamp", "no python", "empty folder", "a file"])
def test_a_half_made_environment_is_made_again(checkout, damage):
    venv = checkout.folder / ".venv"
    if damage in ("no stamp", "no python"):
        ours, _ = checkout.where()
        shutil.rmtree(venv / "bin") if damage == "no python" else (venv / "made-by-run_all").unlink()
    else:
        ours = str(checkout.folder / "lib" / "__init__.py")
        venv.mkdir() if damage == "empty folder" else venv.touch()
    assert checkout.where() == (ours, ["venv", *INSTALLS])


@pytest.mark.parametrize("fits", [True, False])
def test_the_readers_own_environment_is_used_if_it_is_active_and_fits_and_else_it_is_kept(checkout, fits):
    ours, _ = checkout.where()
    venv = checkout.folder / ".venv"
    (venv / "made-by-run_all").unlink()
    (venv / "mine").touch()
    checkout.env |= {"VIRTUAL_ENV": str(venv), "PATH": f"{venv / 'bin'}:{checkout.env['PATH']}"}
    if not fits:
        next(venv.rglob("here.pth")).unlink()
    assert checkout.where() == (ours, [] if fits else ["venv", *INSTALLS])
    assert (venv / "mine").exists() == fits and (checkout.folder / "build/venv-before/mine").exists() != fits
    assert checkout.where() == (ours, [])


def test_each_environment_of_the_reader_is_kept_beside_those_before(checkout):
    for n in ("1", "2", "3"):
        checkout.where()
        shutil.rmtree(venv := checkout.folder / ".venv")
        venv.mkdir()
        (venv / n).touch()
    checkout.where()
    kept = {f"build/venv-before{end}/{n}" for end, n in (("", "1"), ("-2", "2"), ("-3", "3"))}
    assert {str(p.relative_to(checkout.folder)) for p in (checkout.folder / "build").glob("venv-before*/?")} == kept


def test_a_package_that_was_removed_is_installed_again(checkout):
    ours, _ = checkout.where()
    (link,) = (checkout.folder / ".venv").rglob("here.pth")
    link.unlink()
    assert checkout.where() == (ours, INSTALLS)


def test_an_environment_copied_from_another_checkout_is_not_used(checkout, tmp_path):
    checkout.where()
    other = Checkout(tmp_path / "other", tmp_path / "bin")
    shutil.copytree(checkout.folder / ".venv", other.folder / ".venv", symlinks=True)
    assert other.where() == (str(other.folder / "lib" / "__init__.py"), ["venv", *INSTALLS])


def test_another_lib_in_the_way_is_not_taken(checkout, tmp_path):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "__init__.py").write_text("raise RuntimeError('not ours')")
    (tmp_path / "start.py").write_text("raise RuntimeError('not ours')")
    checkout.env |= {"PYTHONPATH": str(tmp_path), "PYTHONSTARTUP": str(tmp_path / "start.py"), "PYTHONOPTIMIZE": "2"}
    ours = str(checkout.folder / "lib" / "__init__.py")
    look = "import lib, os, sys; print(lib.__file__, sys.flags.optimize, os.environ.get('PYTHONSTARTUP'))"
    done = start(checkout.folder / "run_all.sh", "--python", "-c", look, env=checkout.env, cwd=tmp_path)
    assert done.stdout.split() == [*ours.split(), "0", "None"], done.stderr


def test_a_failed_set_up_shows_its_words_and_the_next_start_mends_it(checkout):
    (checkout.folder / "broken").touch()
    done = start(checkout.folder / "run_all.sh", "--setup", env=checkout.env)
    assert done.returncode == 1 and "no such wheel" in done.stderr and "build/setup.log" in done.stderr
    (checkout.folder / "broken").unlink()
    assert checkout.where()[1] == ["venv", *INSTALLS]


@pytest.fixture
def slow(checkout):
    """A set-up that has begun to install."""
    (checkout.folder / "slow").touch()
    process = subprocess.Popen([checkout.folder / "run_all.sh", "--setup"], env=checkout.env, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    calls = checkout.folder / "calls"
    while not (calls.exists() and "lock" in calls.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


def end(checkout, process):
    family = psutil.Process(process.pid).children(recursive=True)
    (checkout.folder / "slow").unlink()
    process.terminate()
    assert process.wait(timeout=10) == 130
    assert not family[0].is_running()
    for member in filter(psutil.Process.is_running, family):
        member.kill()  # the stand-in's own sleep


def test_a_killed_set_up_leaves_nothing_running_and_the_next_start_mends_it(checkout, slow):
    end(checkout, slow)
    assert checkout.where()[1] == ["venv", *INSTALLS]


@pytest.mark.skipif(not shutil.which("flock"), reason="there is nothing to lock with")
def test_two_set_ups_at_once_do_not_delete_each_others_files(checkout, slow):
    script = [checkout.folder / "run_all.sh", "--setup"]
    with subprocess.Popen(script, env=checkout.env, stderr=subprocess.PIPE, text=True) as second:
        assert second.stderr.readline() == "run_all.sh: another run_all.sh makes .venv; waiting for it\n"
        assert (checkout.folder / "calls").read_text().split() == ["venv", "lock"]
        end(checkout, slow)
        assert "making .venv" in second.stderr.read()
    assert second.returncode == 0 and checkout.where()[1] == []


def test_set_up_with_stdin_closed(checkout):
    done = start("sh", "-c", '"$0" --setup <&-', checkout.folder / "run_all.sh", env=checkout.env)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"environment: {checkout.folder}/.venv/bin/python\n"
    assert done.stderr.count("\n") == 1  # one line: what is being made and about how long


def test_an_active_environment_that_does_not_fit_is_named(checkout):
    checkout.env["VIRTUAL_ENV"] = "/somewhere"
    done = start(checkout.folder / "run_all.sh", "--setup", env=checkout.env)
    assert "the active environment does not fit (`import lib` does not lead to this checkout)" in done.stderr


def test_without_a_python_that_fits_the_message_says_what_to_do(checkout):
    text = (checkout.folder / "pyproject.toml").read_text()
    (checkout.folder / "pyproject.toml").write_text(text.replace(">=3.11", ">=3.99"))
    (checkout.folder.parent / "bin" / "uv").write_text("#!/bin/sh\nexit 1\n")
    done = start(checkout.folder / "run_all.sh", "--setup", env=checkout.env)
    assert done.returncode == 1 and "needs Python >=3.99: set PYTHON=/path/to/python3.x, or install uv" in done.stderr


@pytest.fixture
def without_uv(checkout):
    """Where uv makes no environment, and the Python of this one leaves a mark in the caller's folder."""
    uv = checkout.folder.parent / "bin" / "uv"
    uv.write_text(uv.read_text().replace("exec ", "exit 1; "))
    (here := checkout.folder.parent / "some where" / "the caller's").mkdir(parents=True)
    own = here / "own-python"
    own.write_text(f"#!/bin/sh\ntouch '{checkout.folder}/used'\nexec {sys.executable} \"$@\"\n")
    own.chmod(0o755)
    return checkout, here


@pytest.mark.parametrize("python", ["./own-python", "../the caller's/own-python", "own-python", "{here}/own-python"])
def test_python_is_taken_from_where_the_caller_is(without_uv, python):
    checkout, here = without_uv
    more = {"PYTHON": python.format(here=here), "PATH": f"{checkout.env['PATH']}:{here}"}
    done = start(checkout.folder / "run_all.sh", "--setup", env=checkout.env | more, cwd=here)
    assert done.returncode == 0, done.stderr
    assert (checkout.folder / "used").exists()


@pytest.mark.parametrize("python", ["/no/such/python3.12", "./no-such", "no-such-python", "/bin/true/x", "~/python"])
def test_a_python_that_cannot_be_used_is_not_passed_over(without_uv, python):
    checkout, here = without_uv
    done = start(checkout.folder / "run_all.sh", "--setup", env=checkout.env | {"PYTHON": python}, cwd=here)
    said = f"PYTHON={python.replace('./', f'{here}/./')} starts no Python >=3.11: correct it or unset it"
    assert done.returncode == 1 and said in done.stderr
