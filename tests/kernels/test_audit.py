"""The audit passes on what is there, and fails on each fault it is for."""

from __future__ import annotations

import json
import os
import pkgutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("triton")

import optx.transforms
from optx import _audit as audit_cases
from optx import cli
from optx._audit import Case
from optx.kernels.audit import assembly as audit_asm
from optx.kernels.audit import report as audit
from optx.kernels.audit.kernels import attention_kernels
from optx.kernels.step import emit_triton
from optx.kernels.step.layout import Layout
from optx.kernels.step.program import Program
from optx.step.transform import Transform

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled under the interpreter"
)
SM90, GFX942 = audit.QUICK


@pytest.fixture
def adamw() -> Case:
    return audit_cases.make("AdamW", lambda p: torch.optim.AdamW(p))


def update(case: Case, target: audit.Target) -> audit.Row:
    kernel = next(k for k in audit.kernels(case, target) if k.name == "update")
    return audit.measure(kernel, target)


def test_the_command_passes_and_writes_its_rows(tmp_path: Path) -> None:
    file = tmp_path / "audit.json"
    command = ["audit", "--quick", "--only", "^PerpGrad . AdamW$", "--json", str(file)]
    run = CliRunner().invoke(cli.app, command)
    assert run.exit_code == 0, run.output
    rows = json.loads(file.read_text())["rows"]
    assert {r["target"] for r in rows} == {"sm_90", "gfx942"}
    assert {r["kernel"] for r in rows} == {"reduce_0", "scalars_0", "update", "commit", "fold_chunks"}
    moved = {(r["target"], r["kernel"]): r["bytes"] for r in rows}
    assert [moved["sm_90", k] for k in ("reduce_0", "update", "commit")] == [8.0, 28.0, 0.0]
    assert [moved["gfx942", k] for k in ("reduce_0", "update", "commit")] == [8.0, 28.0, 0.0]
    assert all(r["machine"]["registers"] > 0 and r["machine"]["spills"] == 0 for r in rows)
    assert "10.7" in run.output  # 36 bytes at 3.35 TB/s, in ms per billion parameters


def test_it_refuses_the_interpreter_and_an_empty_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    interpreted = CliRunner().invoke(cli.app, ["audit"])
    assert interpreted.exit_code == 2
    assert "TRITON_INTERPRET=1" in interpreted.output
    monkeypatch.delenv("TRITON_INTERPRET")
    assert audit_cases.main(["--quick", "--only", "no such program"]) == 1


@pytest.mark.parametrize("target", [SM90, GFX942], ids=str)
@pytest.mark.parametrize(
    ("dtype", "rounding", "moved"), [(torch.float32, "nearest", 28.0), (torch.bfloat16, "kahan", 18.0)]
)
def test_bytes(dtype: torch.dtype, rounding: str, moved: float, target: audit.Target) -> None:
    case = audit_cases.make("AdamW", lambda p: torch.optim.AdamW(p), w=dtype, rounding=rounding)
    row = update(case, target)
    assert row.problems == []
    assert row.bytes == row.implied == moved
    assert row.loads == row.stores == [128]


FAULTS = {
    "hint on the offset": ("tl.multiple_of(tl.load(row + 1), 16)", "tl.load(row + 1)", "by 32 bits"),
    "hint on one pointer": (
        "stream(tensor + 1, tl.float32, start, ALIGNED)",
        "stream(tensor + 1, tl.float32, start, False)",
        "by 32 bits",
    ),
    "unmasked blocks": ("lane, None)", "lane, at + lane < n)", "by 32 bits"),
    "each once": (
        "g = read(g_p + lane, mask, tl.float32)",
        "g = read(g_p + lane, mask, tl.float32) + tl.load(g_p + lane + 4096, mask)",
        "moves 32.00 bytes per element where its roles imply 28.00",
    ),
}


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    """The emitter with one fault; gives the problem that the audit must report."""
    before, after, problem = FAULTS[request.param]
    emit = emit_triton.emit

    def faulty(program: Program, layout: Layout) -> str:
        text = emit(program, layout)
        assert before in text
        return text.replace(before, after)

    monkeypatch.setattr(emit_triton, "emit", faulty)
    emit_triton.compiled.cache_clear()
    yield problem
    emit_triton.compiled.cache_clear()


@pytest.mark.parametrize("broken", FAULTS, indirect=True)
@pytest.mark.parametrize("target", [SM90, GFX942], ids=str)
def test_faults_are_found(broken: str, target: audit.Target, adamw: Case) -> None:
    assert broken in "; ".join(update(adamw, target).problems)


@pytest.mark.parametrize("broken", ["hint on the offset"], indirect=True)
def test_a_fault_is_the_exit_code(broken: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert audit_cases.main(["--quick", "--only", "^SGD$"]) == 1
    assert "SGD, update on sm_90: accesses memory" in capsys.readouterr().out


def test_spills_are_found(adamw: Case) -> None:
    """Too many elements per thread for the registers."""
    kernel = next(k for k in audit.kernels(adamw, SM90) if k.name == "update")
    huge = replace(kernel, constexprs={k: 16384 if v == 1024 else v for k, v in kernel.constexprs.items()})
    tight = replace(huge, elements=16384, options={**huge.options, "maxnreg": 64})
    row = audit.measure(tight, SM90)
    assert row.machine.spills > 0
    assert any("spills" in p for p in row.problems)


def test_sums_over_rows_are_counted_once_a_row() -> None:
    """4 bytes of a gradient, and 8 of a row's sum for the 128 columns that a program sees of it."""
    case = next(case for case in audit_cases.all_cases() if case.name == "rows clipped + AdamW")
    kernel = next(k for k in audit.kernels(case, SM90) if k.name == "reduce_0")
    row = audit.measure(kernel, SM90)
    assert row.problems == []
    assert row.bytes == row.implied == 4 + 8 / 128
    assert (row.loads, row.stores, row.machine.spills) == ([128], [64], 0)
    more = audit.measure(replace(kernel, rows=(0, 0)), SM90)
    assert any("accesses memory by 64 bits" in problem for problem in more.problems)


def test_what_several_threads_load_counts_once_up_to_what_it_may_be() -> None:
    """A key's scale is loaded by each thread that has its scores; a second read of the tiles is a fault."""
    kernel = next(k for k in attention_kernels(SM90) if k.name == "softplus forward bf16")
    row = audit.measure(kernel, SM90)
    assert (row.problems, row.machine.spills) == ([], 0)
    assert row.bytes == row.implied == 2 + 4 / 128
    for fault, said in (({"again": 0}, "accesses memory by 64 bits"), ({"again": 4}, "moves 2.50")):
        more = audit.measure(replace(kernel, **fault), SM90)
        assert any(said in problem for problem in more.problems)


def test_no_transform_is_forgotten() -> None:
    """Every transform with rules is compiled; found here by its subclasses, there by its modules."""
    for module in pkgutil.iter_modules(optx.transforms.__path__, "optx.transforms."):
        __import__(module.name)
    classes = [c for c in Transform.__subclasses__() if c.__module__.startswith("optx.transforms.")]
    with_rules = {c.__name__ for c in classes if c.rules or c.moments is not Transform.moments}
    assert {"AdamR", "PerpGrad"} <= with_rules == set(audit_cases.transform_examples())
    names = {case.name for case in audit_cases.all_cases()}
    assert {f"{name} + AdamW" for name in with_rules} <= names


# ---- reading machine code ---------------------------------------------------------------------------

ROTATED = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   BRA 0x60 ;
        /*0020*/                   LDG.E.U16 R4, [R2.64] ;
        /*0030*/                   STG.E.U16 [R2.64], R4 ;
        /*0040*/                   LDG.E.U16 R4, [R2.64+0x2] ;
        /*0050*/                   EXIT ;
        /*0060*/                   LDG.E.128 R4, [R2.64] ;
        /*0070*/                   IADD3 R2, R2, 0x10, RZ ;
        /*0080*/              @!P0 BRA 0x60 ;
        /*0090*/               @P1 EXIT ;
        /*00a0*/                   BRA 0x20 ;
        /*00b0*/                   BRA 0xb0;
"""


def test_blocks_out_of_order_are_no_loop() -> None:
    """A tail laid out before the loop is jumped back to, and so is the padding: neither is a loop."""
    machine = audit_asm._of_sass("REG:8 STACK:0 SHARED:0 LOCAL:0\n" + ROTATED, "", 0)
    assert machine.loop == (audit_asm.Access(16, store=False),)
    assert machine.instructions == 3


def test_a_uniform_jump_out_of_a_loop_is_conditional() -> None:
    """sm_100's loops may end with BRA.U, whose predicate is an operand: what follows it is the loop."""
    text = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   BRA.U UP0, 0x50 ;
        /*0020*/                   LDG.E.128 R4, [R2.64] ;
        /*0030*/                   IADD3 R2, R2, 0x10, RZ ;
        /*0040*/                   BRA 0x10 ;
        /*0050*/                   EXIT ;
    """
    machine = audit_asm._of_sass("REG:8 STACK:0 SHARED:0 LOCAL:0\n" + text, "", 0)
    assert machine.loop == (audit_asm.Access(16, store=False),)


def test_unrolled_loops_count_once() -> None:
    """SGD's loop is short enough for ptxas to unroll it."""
    row = update(audit_cases.make("SGD", lambda p: torch.optim.SGD(p, 0.1)), SM90)
    assert row.machine.turns > 1
    assert row.bytes == 12.0
