"""``import optx`` costs little more than ``import torch``, which whoever imports it has paid already."""

from __future__ import annotations

import import_time

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
