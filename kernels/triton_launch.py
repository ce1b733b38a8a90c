"""What Triton kernels have in common that are written by hand: how they are given tensors, and audited."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from optx.kernels.triton_lib import LAUNCH


def shown(tensor: Tensor) -> Tensor:
    """A tensor as kernels take it, which handle bfloat16 as a uint16; see `optx.kernels.triton_lib`."""
    return tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor


@dataclass(frozen=True)
class AuditSpec:
    """A kernel as it is compiled for one use, for `optx.kernels.audit`.

    Args:
        name: what the table calls it.
        function: the kernel.
        types: of arguments that are no constants: ``"*fp32"``, ``"i32"``; others may be among them.
        constexprs: value of each constant argument.
        bytes_per_element: bytes moved.
        num_warps: warps of a program.
        multiples: numbers that are a multiple of 16, as a launch finds them.
        options: of the compiler.
        again: numbers of 32 bits in the main loop that several threads load, each as often as it holds their
            rows or columns; at most so many a thread. They come out of a cache, and count once.
        elements: that one turn of the main loop handles; 0: BLOCK.
        narrowest: bits of the narrowest access allowed in the main loop, but for these numbers.
    """

    name: str
    function: Any
    types: Mapping[str, str]
    constexprs: Mapping[str, Any]
    bytes_per_element: float
    num_warps: int
    multiples: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=lambda: dict(LAUNCH))
    again: int = 0
    elements: int = 0
    narrowest: int = 128

    @property
    def signature(self) -> dict[str, str]:
        """The type of each argument, in their order."""
        names = self.function.arg_names
        return {n: "constexpr" if n in self.constexprs else self.types[n] for n in names}

    @property
    def attrs(self) -> dict[tuple[int, ...], list[list[Any]]]:
        """Arguments known to be divisible by 16, by position: addresses, and numbers that are."""
        signature = self.signature
        known = [n for n, kind in signature.items() if kind[0] == "*" or n in self.multiples]
        return {(list(signature).index(n),): [["tt.divisibility", 16]] for n in known}
