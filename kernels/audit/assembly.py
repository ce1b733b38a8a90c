"""What a compiled kernel does, read from its machine code: SASS of a cubin, or AMDGCN assembly."""
# Triton's compiler has no types that a checker could follow.
# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SASS_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")
_SASS_TARGET = re.compile(r"0x([0-9a-f]+)\s*$")
_SASS_BYTES = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
_PTX_LINE = re.compile(r"^\s+(@!?%p\d+\s+)?([a-z][\w.:]*)\s*([^;]*);")
_PTX_ACCESS = re.compile(r"^(ld|st)\b.*\.global\b.*?(?:\.v(\d))?\.[bfsu](\d+)$")
_GCN_LINE = re.compile(r"^([a-z]+_[a-z]\w*)\s*([^;]*)")
_GCN_ACCESS = re.compile(r"^(?:global|buffer|flat)_(load|store)_(\w+)$")
_GCN_BYTES = {
    "dwordx4": 16,
    "dwordx3": 12,
    "dwordx2": 8,
    "dword": 4,
    "ushort": 2,
    "sshort": 2,
    "short": 2,
} | {
    "short_d16": 2,
    "short_d16_hi": 2,
    "ubyte": 1,
    "sbyte": 1,
    "byte": 1,
}


@dataclass(frozen=True)
class Access:
    """A load from device memory, or a store to it."""

    bytes: int  # per thread
    store: bool


@dataclass(frozen=True)
class Machine:
    """A kernel as compiled for one target.

    Attributes:
        registers: per thread (vector registers on AMD).
        spills: bytes per thread (NVIDIA), vector registers or bytes (AMD) that went to memory.
        shared: bytes per program.
        loop: memory accesses of the main loop, as the processor does them; empty if there is no loop.
        instructions: how many the main loop has.
        turns: of the kernel's loop in one turn of the processor's (ptxas unrolls short loops).
    """

    registers: int
    spills: int
    shared: int
    loop: tuple[Access, ...]
    instructions: int
    turns: int = 1

    @property
    def bytes(self) -> float:
        """Moved per thread in one turn of the kernel's loop."""
        return _total(self.loop) / self.turns


def inspect(compiled: Any) -> Machine:
    """Read what Triton compiled."""
    shared = int(compiled.metadata.shared)
    if "cubin" in compiled.asm:
        return _of_sass(_disassemble(compiled.asm["cubin"]), compiled.asm["ptx"], shared)
    return _of_amdgcn(compiled.asm["amdgcn"], shared)


# ---- loops ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Instruction:
    name: str
    access: Access | None = None
    target: int | None = None  # where it may jump, as a position in the code
    falls: bool = True  # whether the next instruction may follow


def _main_loop(code: Sequence[_Instruction]) -> tuple[tuple[Access, ...], int]:
    """Memory accesses and length of the longest loop that has any.

    A loop is what a jump and its target both reach: blocks may lie in any order in memory, so that a
    backward jump alone is none, and the instructions between its ends need not belong to it.
    """
    follow: list[list[int]] = [[] for _ in code]
    precede: list[list[int]] = [[] for _ in code]
    for i, instruction in enumerate(code):
        after = [i + 1] if instruction.falls and i + 1 < len(code) else []
        for j in (*after, *([instruction.target] if instruction.target is not None else [])):
            follow[i].append(j)
            precede[j].append(i)
    best: tuple[tuple[Access, ...], int] = ((), 0)
    seen: set[int] = set()
    for i, instruction in enumerate(code):
        if instruction.target is None or i in seen:
            continue
        loop = _reach(follow, i) & _reach(precede, i)
        seen |= loop
        accesses = tuple(a for j in sorted(loop) if (a := code[j].access) is not None)
        if accesses and len(loop) > best[1]:
            best = accesses, len(loop)
    return best


def _reach(edges: list[list[int]], start: int) -> set[int]:
    """What can be reached from ``start`` in one move or more."""
    found: set[int] = set()
    todo = [start]
    while todo:
        new = set(edges[todo.pop()]) - found
        found |= new
        todo += new
    return found


# ---- NVIDIA -----------------------------------------------------------------------------------------


@functools.cache
def _cuobjdump() -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(path) if path.exists() else "cuobjdump"


def _disassemble(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_cuobjdump(), "-sass", "-res-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _of_sass(text: str, ptx: str, shared: int) -> Machine:
    lines = [m for line in text.splitlines() if (m := _SASS_LINE.match(line))]
    position = {int(m[1], 16): i for i, m in enumerate(lines)}
    code = [_sass(m[3], conditional=m[2] is not None, rest=m[4], position=position) for m in lines]
    usage = {key: int(number) for key, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    local = sum(i.name in ("STL", "LDL") for i in code)
    spills = max(usage["STACK"], usage["LOCAL"], 4 * local)
    loop, instructions = _main_loop(code)
    once, _ = _main_loop(_ptx(ptx))
    # What ptxas unrolled is a whole number of turns; anything else counts in full.
    turns, rest = divmod(_total(loop), _total(once) or 1)
    return Machine(usage["REG"], spills, shared, loop, instructions, turns if rest == 0 and turns else 1)


def _total(accesses: Iterable[Access]) -> int:
    return sum(a.bytes for a in accesses)


def _ptx(text: str) -> list[_Instruction]:
    """The code before ptxas, in which a loop's body stands once."""
    labels: dict[str, int] = {}
    lines: list[re.Match[str]] = []
    for line in text.splitlines():
        if match := re.match(r"^(\$L\w+):", line):
            labels[match[1]] = len(lines)
        elif match := _PTX_LINE.match(line):
            lines.append(match)
    code: list[_Instruction] = []
    for predicate, name, rest in (m.groups() for m in lines):
        access = None
        if match := _PTX_ACCESS.match(name):
            access = Access(int(match[2] or 1) * int(match[3]) // 8, match[1] == "st")
        target = labels.get(rest) if name.startswith("bra") else None
        code.append(
            _Instruction(name, access, target, predicate is not None or name[:3] not in ("bra", "ret"))
        )
    return code


def _sass(text: str, conditional: bool, rest: str, position: dict[int, int]) -> _Instruction:
    name, *modifiers = text.split(".")
    target = None
    if name in ("BRA", "CALL", "JMP") and (match := _SASS_TARGET.search(rest)):
        target = position.get(int(match[1], 16))
    access = None
    if name in ("LDG", "STG", "LD", "ST"):
        width = next((_SASS_BYTES[m] for m in modifiers if m in _SASS_BYTES), 4)
        access = Access(width, name.startswith("ST"))
    # BRA.U jumps by a uniform predicate, BRA.DIV where threads diverge: theirs is an operand, not a guard.
    conditional = conditional or not {"U", "DIV", "CONV"}.isdisjoint(modifiers)
    return _Instruction(name, access, target, conditional or name not in ("BRA", "JMP", "EXIT", "RET"))


# ---- AMD --------------------------------------------------------------------------------------------


def _of_amdgcn(text: str, shared: int) -> Machine:
    labels: dict[str, int] = {}
    lines: list[tuple[str, str]] = []
    for line in map(str.strip, text.splitlines()):
        if match := re.match(r"^(\.LBB\w+):", line):
            labels[match[1]] = len(lines)
        elif match := _GCN_LINE.match(line):
            lines.append((match[1], match[2].strip()))
    code = [_gcn(name, rest, labels) for name, rest in lines]
    # Scalar registers that did not fit go into lanes of a vector register. Only where there is none left do
    # they go to memory, and then the private segment says so.
    keys = ("vgpr_spill_count", "private_segment_fixed_size")
    spills = sum(_gcn_number(text, key) for key in keys)
    return Machine(_gcn_number(text, "vgpr_count"), spills, shared, *_main_loop(code))


def _gcn_number(text: str, key: str) -> int:
    match = re.search(rf"^\s*\.{key}:\s+(\d+)", text, re.MULTILINE)
    if match is None:
        raise ValueError(f"the assembly does not tell its {key}")
    return int(match[1])


def _gcn(name: str, rest: str, labels: dict[str, int]) -> _Instruction:
    access = None
    if match := _GCN_ACCESS.match(name):
        access = Access(_GCN_BYTES[match[2]], match[1] == "store")
    target = labels.get(rest) if name.startswith(("s_branch", "s_cbranch")) else None
    return _Instruction(name, access, target, name not in ("s_branch", "s_endpgm", "s_setpc_b64"))


def widths(accesses: Iterable[Access], store: bool) -> list[int]:
    """The widths in bits that occur among loads, or stores, narrowest first."""
    return sorted({8 * a.bytes for a in accesses if a.store == store})
