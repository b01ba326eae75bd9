"""Peers whose own pins do not fit this project's: each is unpacked into a folder of its own, without its needs, of
which torch, numpy and scipy are here. advertorch 0.2.3 is none: it imports what PyTorch took away in version 1.9."""

import importlib
import subprocess
import sys

from readme import HERE

from lib.files import write_bytes

PEERS = {
    "torchattacks": "torchattacks==3.5.1",
    "art": "adversarial-robustness-toolbox==1.20.1",
    "pyhessian": "PyHessian==0.1",
}


def peer(name, module=None):
    """The peer's module, by default the one of its own name; installed into build/peers when it is not there yet."""
    folder = HERE.parent / "build/peers" / name
    if not (folder / "complete").exists():
        pip = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--quiet",
            "--no-deps",
            "--upgrade",
            "--target",
            folder,
        ]
        subprocess.run([*pip, PEERS[name]], check=True)
        write_bytes(folder / "complete", b"")
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # last: it must not hide a package of the environment
    return importlib.import_module(module or name)


def art_classifier(model, x, y):
    """The model as ART's estimator of logits."""
    import torch

    kind = peer("art", "art.estimators.classification").PyTorchClassifier
    return kind(
        model, torch.nn.CrossEntropyLoss(), x.shape[1:], int(y.max()) + 1, clip_values=(0, 1), device_type="cpu"
    )
