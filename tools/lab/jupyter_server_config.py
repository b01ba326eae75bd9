"""JupyterLab for the pairs: to open, look and close changes no file, because a notebook is cleaned as it is saved."""

import sys
from pathlib import Path

import nbformat
from ipykernel.ipkernel import IPythonKernel
from jupytext import AsyncTextFileContentsManager

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nbclean import clean, dumps


class Contents(AsyncTextFileContentsManager):
    """Jupytext's pairs, written as they are committed."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.texts = set()  # sources that are open in a text editor

    async def save(self, model, path=""):
        if model["type"] == "notebook" and model["content"]["nbformat"] == 4:
            model["content"] = nbformat.reads(dumps(clean(model["content"])), as_version=4)
        return await super().save(model, path)

    async def get(self, path, content=True, type=None, **options):
        """An editor of the .py asks whether *it* has changed; jupytext would answer for the pair: a false alarm."""
        if content:
            (self.texts.add if type == "file" else self.texts.discard)(path)
        elif type is None and path in self.texts:
            type = "file"
        model = await super().get(path, content=content, type=type, **options)
        if content and model["type"] == "notebook":  # else JupyterLab adds it, and asks whether to save that
            model["content"]["metadata"]["language_info"] = dict(IPythonKernel.language_info)
        return model


c.ServerApp.contents_manager_class = Contents  # noqa: F821 - `c` is Jupyter's
