"""Functions that one notebook alone needs stand there; here they are taken out of its source, to be tested."""

import ast
from pathlib import Path

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


def function(number, name, **names):
    """A function of a notebook's source, such as function("05", "reach"), with the names that it uses."""
    (path,) = NOTEBOOKS.glob(f"{number}_*.py")
    nodes = {node.name: node for node in ast.parse(path.read_text("utf-8")).body if isinstance(node, ast.FunctionDef)}
    exec(compile(ast.Module([nodes[name]], []), path.name, "exec"), names)
    return names[name]
