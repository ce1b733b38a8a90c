"""StableMax's Triton kernels, compiled ahead of time; `tests/interpreted` runs them."""

from __future__ import annotations

import re

import pytest

triton = pytest.importorskip("triton")


def test_kernels_have_wide_loads_and_check_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from optx.kernels.loss.stablemax_triton import audit_specs

    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # what the environment says is not asked
    specs = [spec for spec in audit_specs() if "smoothed" not in spec.name]
    assert len(specs) == 4
    for spec in specs:
        at = list(spec.signature).index
        constants = {(at(name),): value for name, value in spec.constexprs.items()}
        source = ASTSource(spec.function, spec.signature, constants, spec.attrs)
        options = {"num_warps": spec.num_warps, **spec.options}
        asm = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
        backward = "backward" in spec.name
        wide = [bool(re.search(rf"{x}\.global\.v4\.b32", asm)) for x in ("ld", "st")]
        assert wide == [True, backward], spec.name
        # No assertion on the target in backward: forward has looked at it.
        assert ("__assertfail" in asm) != backward, spec.name
