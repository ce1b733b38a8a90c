"""Bits of a machine word, for compiled loops: how many are set, and where."""

# Numba's functions have no types that a checker could follow.
# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import hashlib
from typing import Any

from llvmlite import ir
from numba.extending import intrinsic

from optx.kernels import cpu
from optx.kernels.generated import source

_FALSE = ir.Constant(ir.IntType(1), 0)


@intrinsic
def count_ones(_context: Any, word: Any) -> Any:
    """How many bits of an integer are set."""

    def codegen(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        return builder.ctpop(values[0])

    return word(word), codegen


@intrinsic
def first_one(_context: Any, word: Any) -> Any:
    """The position of an integer's lowest bit that is set; its width if none is."""

    def codegen(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        return builder.cttz(values[0], _FALSE)

    return word(word), codegen


@intrinsic
def last_one(_context: Any, word: Any) -> Any:
    """The position of an integer's highest bit that is set; one must be."""

    def codegen(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        before = builder.ctlz(values[0], _FALSE)
        return builder.sub(ir.Constant(before.type, word.bitwidth - 1), before)

    return word(word), codegen


def digest() -> str:
    """Of this text and of `optx.kernels.cpu`: what the names of modules that use both depend on."""
    return hashlib.sha256((cpu.digest() + source("optx.kernels", "words.py")).encode()).hexdigest()[:12]
