"""StableMax's Triton kernels without a GPU: interpreted, and compiled ahead of time."""

import os
import subprocess
import sys
import textwrap

import pytest


def run_python(code, **environment):
    """Run code in a fresh process: Triton reads TRITON_INTERPRET when kernels are defined."""
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**clean, "TRITON_DEFAULT_FP_FUSION": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    return found.stdout


def test_triton_kernels_equal_the_reference_in_the_interpreter():
    pytest.importorskip("triton")
    out = run_python(
        """
        import torch
        from optx.kernels.loss import stablemax_triton as kernels
        from optx.kernels.loss import stablemax_rows as reference
        from optx.kernels.loss.stablemax_rows import Options

        kernels._MAX_BLOCK = 256  # 1023 classes: three full blocks and a masked one
        torch.manual_seed(0)
        tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3}

        def check(classes, dtype, options, soft=False):
            band = torch.full((4, classes + 9), float("nan"), dtype=dtype)  # unaligned rows between guards
            logits = band[:, 5 : 5 + classes].copy_(torch.randn(4, classes) * 4)
            target = torch.randint(classes, (4,))
            target[2] = options.ignore_index
            target = torch.rand(4, classes).softmax(1) if soft else target
            grad = torch.rand(4, dtype=reference.math_dtype(dtype))
            wanted, found = (m.forward(logits, target, options) for m in (reference, kernels))
            results = [
                b(grad, logits, target, wanted.rest, wanted.mass, options)
                for b in (reference.backward, kernels.backward)
            ]
            ignored = torch.full((4,), False) if soft else target == options.ignore_index
            for a, b in (*zip(wanted, found), results):
                assert (a is None) == (b is None)
                if a is not None:
                    assert a.dtype == b.dtype
                    a, b = a[~ignored], b[~ignored]
                    bound = tolerance[dtype] * max([1.0, *a.abs().flatten().tolist()])
                    assert ((a - b).abs() <= bound).all(), (classes, dtype, options, soft)
            assert (found.loss[ignored] == 0).all() and (results[1][ignored] == 0).all()

        for classes in (1, 7, 113, 1023, 1025):
            weight = torch.rand(classes)
            check(classes, torch.float32, Options())
            check(classes, torch.float32, Options(weight, 0, 0.1))
            check(classes, torch.float32, Options(weight), soft=True)
        for dtype in (torch.float64, torch.bfloat16):
            check(513, dtype, Options(smoothing=0.1))
        big = torch.tensor([[1e9, 0.0, 0.0]])
        sums = kernels.forward(big, torch.tensor([0]), Options())
        assert abs(sums.loss.item() / 2e-9 - 1) < 1e-5  # no collapse
        print("equal")
        """,
        TRITON_INTERPRET="1",
    )
    assert out.strip() == "equal"


def test_triton_kernels_compile_to_wide_loads_and_check_targets():
    pytest.importorskip("triton")
    out = run_python(
        """
        import re
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from optx.kernels.loss.stablemax_triton import audit_specs

        for spec in audit_specs():
            if "smoothed" in spec.name:
                continue
            at = list(spec.signature).index
            constants = {(at(name),): value for name, value in spec.constexprs.items()}
            source = ASTSource(spec.function, spec.signature, constants, spec.attrs)
            options = {"num_warps": spec.num_warps, **spec.options}
            asm = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
            backward = "backward" in spec.name
            wide = [bool(re.search(rf"{x}\\.global\\.v4\\.b32", asm)) for x in ("ld", "st")]
            # No assertion on the target in backward: forward has looked at it.
            print(spec.name, wide == [True, backward], ("__assertfail" in asm) != backward, sep=",")
        """
    )
    lines = [line.split(",") for line in out.split("\n") if line]
    assert len(lines) == 4
    assert all(line[1:3] == ["True", "True"] for line in lines), out
