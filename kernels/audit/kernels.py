"""What the audit compiles: kernels of programs, of losses, and of what else there is, as launched."""
# Triton's compiler has no types that a checker could follow.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from optx.kernels.audit.traffic import call_bytes, fill_bytes, row_bytes, row_numbers
from optx.kernels.step.device_tiles import across
from optx.kernels.step.emit_triton import FOLD_LANES, compiled
from optx.kernels.step.layout import EIGHT, Layout, partials_per_chunk
from optx.kernels.step.program import Call, Program, Ref
from optx.kernels.step.triton import CHUNK_WARPS, TENSOR_WARPS, block_size, compiler_options
from optx.kernels.triton_launch import AuditSpec
from optx.kernels.triton_lib import LAUNCH, fold_chunks

ACCESS = 128  # bits: the widest access, and the narrowest allowed in a main loop
_ARGUMENTS = {
    **dict.fromkeys(("chunks", "tensors", "first", "random", "skip"), "*i64"),
    **dict.fromkeys(("row_lines", "column_lines", "row_first", "column_first"), "*i64"),
    **dict.fromkeys(("cols", "hypers", "partials", "sums", "totals", "line_partials"), "*fp64"),
    "count": "i32",
}


@dataclass(frozen=True)
class Case:
    """A program, and how its tensors are stored."""

    name: str
    program: Program
    layout: Layout


@dataclass(frozen=True)
class Target:
    """What to compile for."""

    backend: str
    arch: int | str
    wave: int

    def __str__(self) -> str:
        return f"sm_{self.arch}" if self.backend == "cuda" else str(self.arch)


@dataclass(frozen=True)
class Kernel:
    """A kernel as it is launched in one program.

    Args:
        program: what it belongs to.
        name: of the kernel.
        function: the jitted function.
        signature: the type of every argument.
        constexprs: values of constant arguments, by position.
        attrs: hints by position, as a launch would infer them.
        warps: per program.
        elements: that one turn of the main loop handles; 0 for a kernel that handles a few numbers.
        bytes: per element that its roles imply.
        options: of the compiler.
        narrowest: bits of the narrowest access allowed in the main loop.
        octets: how many roles are packed bits, of which a thread loads a byte for every eight elements.
        scales: how many roles are moments of 8 bits, whose scales of 16 bits serve the elements of several
            threads; these load it from one address, and one of them stores it.
        rows: how many numbers per row are loaded, and how many sums stored: for a row's elements once, by all
            of its threads from one address, and by one of them.
        across: columns that a program sees of each row.
        again: numbers of 32 bits that a thread loads at most besides, as `AuditSpec` has them.
    """

    program: str
    name: str
    function: Any
    signature: dict[str, str]
    constexprs: dict[Any, Any]
    attrs: dict[Any, Any]
    warps: int
    elements: int = 0
    bytes: float = 0.0
    options: dict[str, Any] = field(default_factory=lambda: dict(LAUNCH))
    narrowest: int = ACCESS
    octets: int = 0
    scales: int = 0
    rows: tuple[int, int] = (0, 0)
    across: int = 0
    again: int = 0


def kernels(case: Case, target: Target) -> Iterator[Kernel]:
    """All kernels of a program, those that walk over elements first."""
    module = compiled(case.program, case.layout)
    program = case.program
    sums = {f"reduce_{i}": v.element_calls for i, v in enumerate(program.levels) if v.sums}
    block = block_size(target.wave)
    blocks: dict[str, Any] = {"BLOCK": block, "ALIGNED": True}
    blocks |= {"WIDTH": across(block)} if program.tiled else {}
    roles = zip(program.slots, case.layout.dtypes[2:], strict=True)
    kept = {Ref("slot", name): dtype for name, dtype in roles}
    packed = {ref for ref, dtype in kept.items() if dtype == "bits"}
    eight = {ref for ref, dtype in kept.items() if dtype in EIGHT}

    def over_elements(name: str, calls: tuple[Call, ...], stores: bool) -> Kernel:
        moved = call_bytes(program, case.layout, calls, stores=stores)
        octets, scales = (len(some & program.reads(calls)) for some in (packed, eight))
        # A thread's eight elements are 64 bits of codes, or of a weight's rest.
        low = 64 if scales or case.layout.rounding == "split8" else ACCESS
        rows = row_numbers(calls) if program.tiled else (0, 0)
        if program.tiled:
            moved += row_bytes(case.layout, calls, across(block))
        kernel = _kernel(case.name, vars(module)[name], blocks, moved, octets)
        options = compiler_options(program, case.layout, name, target.backend == "cuda")
        kernel = replace(kernel, narrowest=low, scales=scales, options=options)
        return replace(kernel, rows=rows, across=blocks.get("WIDTH", 0))

    for i, level in enumerate(program.levels):
        for k, fill in enumerate(level.fills):
            kernel = over_elements(f"fill_{i}_{k}", fill.calls, stores=False)
            yield replace(kernel, bytes=fill_bytes(program, case.layout, fill))
    for name, calls in sums.items():
        yield over_elements(name, calls, stores=False)
    yield over_elements("update", (*program.update, *program.observe), stores=True)
    for name in vars(module):
        if re.fullmatch(r"(scalars|totals|finish)_[\d_]+|commit\w*", name):
            yield _kernel(case.name, vars(module)[name], {})
    if width := partials_per_chunk(program):  # of shards
        yield _kernel(case.name, fold_chunks, {"WIDTH": width, "LANES": FOLD_LANES})


def _kernel(
    program: str, function: Any, constexprs: Mapping[str, Any], moved: float = 0.0, octets: int = 0
) -> Kernel:
    name, names, block = function.__name__, list(function.arg_names), constexprs.get("BLOCK", 0)
    signature = {n: "constexpr" if n in constexprs else _ARGUMENTS[n] for n in names}
    attrs = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n][0] == "*"}
    positions = {(names.index(n),): value for n, value in constexprs.items()}
    wide = block or name.startswith("totals") or any(n.endswith("_lines") for n in names)
    warps = CHUNK_WARPS if wide else TENSOR_WARPS
    return Kernel(program, name, function, signature, positions, attrs, warps, block, moved, octets=octets)


def loss_kernels(target: Target) -> Iterator[Kernel]:
    """Those of the losses, for any target."""
    from optx.kernels.loss.stablemax_triton import audit_specs

    for s in audit_specs():
        yield _by_spec("loss", s, s.constexprs["BLOCK"], narrowest=ACCESS)


def ternary_kernels(target: Target) -> Iterator[Kernel]:
    """Those that decode compressed deltas. A mask word is 32 bits: one per thread, 128 bytes per warp."""
    from optx.kernels.ternary import dense_triton as ternary

    for s in ternary.audit_specs(shared=target.backend == "cuda"):
        yield _by_spec("ternary", s, s.constexprs["BLOCK"], narrowest=32)


def shared_kernels(target: Target) -> Iterator[Kernel]:
    """Those of shared weights. A rotation by any number leaves 32 bits to an access on one side."""
    from optx.kernels.shared import gather_triton as shared

    for s in shared.audit_specs():
        yield _by_spec("shared", s, s.constexprs["BLOCK"], narrowest=16)


def rf8_kernels(target: Target) -> Iterator[Kernel]:
    """Those of RF8. A thread's bytes are those of the numbers that it has in 128 bits, or more."""
    from optx.kernels.rf8 import codes_triton, product_triton

    for s in codes_triton.audit_specs():
        yield _by_spec("rf8", s, s.constexprs["BLOCK"], narrowest=32)
    for s in product_triton.audit_specs():
        elements = s.constexprs["ROWS"] * s.constexprs["COLUMNS"]
        yield _by_spec("rf8", s, elements, narrowest=32)


def softmax_kernels(target: Target) -> Iterator[Kernel]:
    """Those of softmax in two passes; a row that fits a program is read without a loop."""
    from optx.kernels.softmax import pairs_triton

    for s in pairs_triton.audit_specs():
        elements = 0 if s.constexprs["BLOCK"] > pairs_triton.BLOCK else s.constexprs["BLOCK"]
        yield _by_spec("softmax", s, elements, narrowest=ACCESS)


def attention_kernels(target: Target) -> Iterator[Kernel]:
    """Those of softplus attention. A mask's byte is one of a few that a thread has of a tile."""
    from optx.kernels.attention import softplus_triton

    for s in softplus_triton.audit_specs(cuda=target.backend == "cuda", wave=target.wave):
        yield replace(_by_spec("attention", s, s.elements, s.narrowest), again=s.again)


def _by_spec(program: str, s: AuditSpec, elements: int, narrowest: int) -> Kernel:
    constexprs = {(s.function.arg_names.index(k),): v for k, v in s.constexprs.items()}
    return Kernel(
        program,
        s.name,
        s.function,
        s.signature,
        constexprs,
        s.attrs,
        s.num_warps,
        elements,
        s.bytes_per_element,
        {"num_stages": LAUNCH["num_stages"], **s.options},
        narrowest,
    )


OTHERS: dict[str, Callable[[Target], Iterator[Kernel]]] = {
    "loss": loss_kernels,
    "ternary": ternary_kernels,
    "shared": shared_kernels,
    "rf8": rf8_kernels,
    "softmax": softmax_kernels,
    "attention": attention_kernels,
}
"""Kernels that belong to no program, by their kind."""
