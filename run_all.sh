#!/usr/bin/env bash
# Makes the environment if need be, then hands over to tools/run.py. See --help.
set -euo pipefail
unset CDPATH # with it `cd` says where it goes, or goes elsewhere

usage() {
  cat <<'TEXT'
Usage: ./run_all.sh [NOTEBOOK ...] [--profile NAME] [-j N] [--timeout S] [--list] [--dry-run]
       ... [--workers N [--per-gpu K | --slurm SETTINGS] | --scheduler ADDRESS]
       ./run_all.sh --lab [arguments]        JupyterLab on the notebooks
       ./run_all.sh --site                   the site, in build/site
       ./run_all.sh --test [pytest arguments]
       ./run_all.sh --python ARGUMENTS       any other command, such as benchmarks/bench_curvature.py
       ./run_all.sh --setup                  only make the environment

  NOTEBOOK    name, number or beginning of a name, such as 3 (default: all)
  --profile   size of the experiments: quick, overnight, gpu, gpu-cifar, paper, tiny (default: quick, which rewrites
              notebooks/*.ipynb and figures/quick/; the others write build/PROFILE/*.ipynb and figures/PROFILE/, tiny
              only build/tiny/); or a file of your own, my.yaml, which writes only build/my/
  -j N        notebooks side by side (default: 2)
  --workers N networks are trained by N processes of their own (dask), with a GPU each where there are GPUs (with
              --per-gpu K, K of them share one); with --slurm "partition=short,gres=gpu:1,--exclusive" they are
              Slurm's jobs
  --scheduler ADDRESS  ... by the workers of this dask scheduler, tcp://host:8786
  --timeout S seconds that a cell may take
  --dry-run   say what would be trained and what would be found, and run nothing
  --list      name the notebooks and the profiles

The environment is the active one if it fits pyproject.toml, else .venv, made by uv or by Python 3.11 to 3.13.
Variables: PYTHON (makes .venv), OMP_NUM_THREADS (default 1), PRECISION (float32 or bfloat16 where the processor would
decide), FIGURES_DIR, RUNS_DIR, DATA_DIR (other folders).
TEXT
}

die() { echo "run_all.sh: $1" >&2; exit 1; }
fail() { tail -n 15 "$log" >&2; die "the set-up failed; all of it is in $log"; }

# Run a step of the set-up with its words in the log. It runs in the background, so that `wait` hears a signal at once.
step() {
  echo "+ $*" >>"$log"
  "$@" </dev/null >>"$log" 2>&1 &
  wait $!
}

find_python() {
  local candidate
  if [ -n "${PYTHON-}" ]; then set -- "$PYTHON"; else set -- python3.11 python3.12 python3.13 python3 python; fi
  for candidate; do
    if "$candidate" tools/checkenv.py --python-only >/dev/null 2>&1; then python=$candidate; return; fi
  done
  [ -z "${PYTHON-}" ] || die "PYTHON=$PYTHON starts no Python $range: correct it or unset it"
  die "needs Python $range: set PYTHON=/path/to/python3.x, or install uv"
}

new_venv() {
  if [ -d .venv ] && [ ! -e .venv/made-by-run_all ] && [ ! -e build/venv-begun ]; then # the reader's own
    local kept=build/venv-before n=1
    while [ -e "$kept" ]; do kept=build/venv-before-$((++n)); done
    mv .venv "$kept"
    echo "run_all.sh: .venv was not made by run_all.sh, and does not fit or is not active: it is $kept now" >&2
  fi
  touch build/venv-begun
  rm -rf .venv
  if command -v uv >/dev/null && step uv venv --seed --python "${PYTHON:-$range}" .venv; then return; fi
  find_python
  rm -rf .venv
  step "$python" -m venv .venv || fail
}

# Nothing without its hash: every package by the lock (the builder of this project is one), then the project alone.
# uv is several times as fast as pip, and itself takes a few seconds to get.
install() {
  local uv=uv
  if ! command -v uv >/dev/null; then
    uv=.venv/bin/uv
    sed -n '/^uv==/,/[^\\]$/p' requirements.lock >build/uv.lock
    [ -x "$uv" ] || step "$python" -m pip install --require-hashes -r build/uv.lock || true
  fi
  install_by "$uv" pip install --python "$python" || install_by "$python" -m pip install
}

install_by() {
  step "$@" --require-hashes -r requirements.lock && step "$@" --no-deps --no-build-isolation -e .
}

# The stamp is written last: without it .venv is half made, with another first line it belongs to another checkout.
make_venv() {
  local stamp=.venv/made-by-run_all want
  want=$(printf '%s\n' "$root" "$(cat pyproject.toml requirements.lock | cksum)")
  python=$root/.venv/bin/python
  local usable=no held=
  if [ "$(head -n 1 "$stamp" 2>/dev/null)" = "$root" ] && "$python" tools/checkenv.py --python-only >/dev/null 2>&1; then
    if [ "$(cat "$stamp")" = "$want" ] && "$python" tools/checkenv.py --dev >/dev/null 2>&1; then return; fi
    usable=yes
  fi
  trap 'kill $(jobs -p) 2>/dev/null || true; wait; exit 130' INT TERM HUP # a background step does not hear Ctrl-C
  mkdir -p build
  exec 9>build/setup.lock
  flock -n 9 2>/dev/null || held=$? # 1: by another; else there is no such command, or a disk that refuses locks
  if [ "$held" = 1 ]; then
    echo "run_all.sh: another run_all.sh makes .venv; waiting for it" >&2
    flock 9
    exec 9>&-
    make_venv
    return
  fi
  : >"$log"
  if [ $usable = yes ]; then
    echo "run_all.sh: bringing .venv up to date (details: $log)" >&2
    rm -f "$stamp"
  else
    echo "run_all.sh: making .venv, about 5 GB; half a minute to three minutes, once (details: $log)" >&2
    new_venv
  fi
  python=$root/.venv/bin/python
  install && step "$python" tools/checkenv.py --dev || fail
  echo "$want" >"$stamp"
  rm -f build/venv-begun
  exec 9>&-
  trap - INT TERM HUP
}

# Sets `python`: the active one if it fits, else that of .venv, made if need be. Arguments go to checkenv.py.
choose_python() {
  local reason=''
  if [ "${VIRTUAL_ENV-}" != "$root/.venv" ] || ! [ -e .venv/made-by-run_all ] && ! [ -e build/venv-begun ]; then
    if reason=$(python tools/checkenv.py "$@" 2>/dev/null); then
      python=$(python -c 'import sys; print(sys.executable)') # not a shim, which may choose by folder
      return
    fi
    if [ -n "${VIRTUAL_ENV-}${CONDA_PREFIX-}" ]; then
      echo "run_all.sh: the active environment does not fit (${reason%%$'\n'*}); .venv is used" >&2
    fi
  fi
  make_venv
}

{ true <&0; } 2>/dev/null || exec </dev/null # started with stdin closed
script=${BASH_SOURCE[0]}
while [ -L "$script" ]; do
  target=$(readlink "$script")
  case $target in /*) script=$target ;; *) script=$(dirname "$script")/$target ;; esac
done
root=$(cd -P "$(dirname "$script")" && pwd)
range=$(sed -n 's/^requires-python = "\(.*\)"$/\1/p' "$root/pyproject.toml")
log=build/setup.log

# Whatever the reader's shell sets for other programs, `lib` is ours and packages are the environment's.
case ${PYTHONPATH-}: in "$root:"*) PYTHONPATH=$root ;; *) unset PYTHONPATH ;; esac
for name in "${!PYTHON@}"; do
  case $name in PYTHON | PYTHON_* | PYTHONPATH) ;; *) unset "$name" ;; esac
done
export PYTHONNOUSERSITE=1

mode=run dev=
case ${1-} in
  -h | --help) usage; exit ;;
  --setup | --test | --python) mode=${1#--} dev=--dev; shift ;;
  --lab | --site) mode=${1#--} dev=$1; shift ;;
esac
here=$PWD
for name in FIGURES_DIR RUNS_DIR DATA_DIR; do # from here, wherever notebooks and tests stand
  case ${!name-} in '' | /* | '~'*) ;; *) export "$name=$here/${!name}" ;; esac
done
case ${PYTHON-} in /* | '~'*) ;; */*) export PYTHON="$here/$PYTHON" ;; esac # but a name without / is looked up
cd "$root"
choose_python $dev
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONHASHSEED=0 PYTHONPATH=$root
case $mode in
  lab)
    export PYTHONSTARTUP=$root/tools/lab/startup.py
    export JUPYTER_CONFIG_PATH="$root/tools/lab${JUPYTER_CONFIG_PATH:+:$JUPYTER_CONFIG_PATH}"
    exec "$python" -m jupyterlab --ServerApp.root_dir="$root/notebooks" "$@"
    ;;
  site)
    rm -rf build/site
    "$python" -m sphinx -q -W --keep-going -E -c docs -d build/doctrees . build/site "$@"
    echo "site: build/site/index.html"
    ;;
  setup) echo "environment: $python" ;;
  test) exec "$python" -m pytest -n 2 --dist loadfile "$@" ;;
  python) exec "$python" "$@" ;;
  run) cd "$here"; exec "$python" "$root/tools/run.py" "$@" ;;
esac
