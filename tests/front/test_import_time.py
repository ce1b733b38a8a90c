"""``import optx`` costs little more than ``import torch``, which whoever imports it has paid already."""

from __future__ import annotations

import ast
import inspect

import import_time

import optx

# Third-party packages that a part of optx uses; each is loaded where that part begins its work.
HEAVY = {
    *("numba", "llvmlite", "triton", "transformers", "rich", "typer", "click", "yaml", "peft", "accelerate"),
    *("mergekit", "sklearn", "scipy", "matplotlib", "gguf", "hypothesis", "pytest", "pip", "sympy"),
}


def test_nothing_heavy_is_loaded() -> None:
    _, _, modules = import_time.imported()
    brought = {name.partition(".")[0] for name in modules}
    assert not brought & HEAVY
    others = [name for name in modules if name.partition(".")[0] in ("torch", "safetensors", "numpy")]
    assert len(others) < 20, others  # parts of torch that `import torch` leaves out take seconds, too


def test_the_time() -> None:
    found = import_time.ratio()
    assert found <= import_time.ALLOWED, f"import optx takes {found:.2f} times import torch"


def test_what_is_loaded_later_is_what_type_checkers_read() -> None:
    body = ast.parse(inspect.getsource(optx)).body
    (read,) = (one for one in body if isinstance(one, ast.If))
    imports = {
        name.name: node.module
        for node in read.body
        if isinstance(node, ast.ImportFrom)
        for name in node.names
    }
    later = {name: where.partition(":")[0] for name, where in optx._LATER.items()}
    modules = {name for name, where in optx._LATER.items() if ":" not in where}
    assert later == {name: f"{where}.{name}" if name in modules else where for name, where in imports.items()}
    _, _, loaded = import_time.imported()
    assert not {where for where in later.values() if where in loaded}
