"""What a kernel of `./run_all.sh --lab` starts with: errors are explained even before the notebook opens its Book."""

import os
from pathlib import Path

from IPython import get_ipython


def _explain(shell, kind, error, trace, tb_offset=None):
    from lib import figures  # takes seconds, which no kernel should spend as it starts

    figures.explain(shell, Path(os.environ.get("JPY_SESSION_NAME", "")).stem)
    return shell.CustomTB(kind, error, trace, tb_offset)


if get_ipython():
    get_ipython().set_custom_exc((NameError, KeyboardInterrupt), _explain)
