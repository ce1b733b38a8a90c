"""Where LoRA's factors start: at random and at zero, or as a part of the weight itself (PiSSA, OLoRA).

A start that is a part of the weight would change the model, so it is taken off again: PiSSA's authors, and
PEFT, take it off the weight, W - s B0 A0. Here the weight is left alone and the factors' start is kept beside
them, W x + s (B A - B0 A0) x. That is the same function of A and B, with the same gradients, and W x exactly
while they are where they started.

Source: PiSSA, arXiv 2404.02948, section 3; OLoRA, arXiv 2406.01775, section 3; as PEFT 0.21 computes them.
"""

# A, B, W and those of an SVD are the papers' letters.
# pyright: reportConstantRedefinition=false

from __future__ import annotations

import math
import re
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from optx._errors import OptxError, TargetError

_FAST = re.compile(r"pissa_niter_(\d+)")
_KINDS = ("kaiming", "gaussian", "pissa", "olora")

# Whether the factors that are made now will be read from a file, with their start.
_FROM_FILE: ContextVar[bool] = ContextVar("factors come from a file", default=False)


def check_init(init: object) -> None:
    """Raise unless a start is one of those that there are."""
    if init not in _KINDS and not (isinstance(init, str) and _FAST.fullmatch(init)):
        wanted = ", ".join(map(repr, _KINDS))
        raise OptxError(
            f"LoRA: init is {init!r}; it must be one of {wanted}, or 'pissa_niter_16' (or another number of "
            "iterations)."
        )


def is_of_weight(init: str) -> bool:
    """Whether a start is a part of the weight."""
    return init.startswith(("pissa", "olora"))


@contextmanager
def read_from_file() -> Generator[None]:
    """While it lasts, no start is computed: a file will say what it was."""
    token = _FROM_FILE.set(True)
    try:
        yield
    finally:
        _FROM_FILE.reset(token)


def from_file() -> bool:
    """Whether what is made now will be read from a file."""
    return _FROM_FILE.get()


def begin(init: str, A: Tensor, B: Tensor, scale: float, path: str, weight: Callable[[], Tensor]) -> bool:
    """Fill factors that are zero.

    Args:
        init: an option of LoRA.
        A: (rank, ...), as many numbers a row as the weight's matrix has columns.
        B: (out, rank, ...).
        scale: that their product is multiplied by.
        path: the served module's, for errors.
        weight: the weight as (out, in), in the precision of sums; not asked for a random start.

    Returns:
        Whether they start as a part of the weight.

    Raises:
        TargetError: the weight has no such part.
    """
    if init == "gaussian":
        nn.init.normal_(A, std=1 / len(A))
    if init == "kaiming":
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    if not is_of_weight(init):
        return False
    if not _FROM_FILE.get():
        first, second = factors_of(init, weight(), len(A), scale, path)
        with torch.no_grad():
            A.copy_(first.view(A.shape))
            B.copy_(second.view(B.shape))
    return True


def factors_of(init: str, W: Tensor, rank: int, scale: float, path: str) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) of a weight (out, in), in its precision.

    Raises:
        TargetError: the rank is above the matrix's, or a scale of 0 makes the factors infinite.
    """
    if rank > min(W.shape):
        raise TargetError(
            f"attach: LoRA's init={init!r} is a part of the weight of {path!r}, {tuple(W.shape)}, and rank "
            f"{rank} is above its own. Use at most {min(W.shape)}."
        )
    if not scale and init != "olora":
        raise TargetError(
            f"attach: LoRA's init={init!r} at {path!r} divides by the scale; alpha=0 leaves none."
        )
    with torch.no_grad(), torch.autocast(W.device.type, enabled=False):
        if init == "olora":
            Q, R = torch.linalg.qr(W)
            return R[:rank], Q[:, :rank]
        fast = _FAST.fullmatch(init)
        if fast:
            U, S, V = torch.svd_lowrank(W, rank, niter=int(fast[1]))
            Vh = V.t()
        else:
            U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        root = (S[:rank] / scale).sqrt()
        return root[:, None] * Vh[:rank], U[:, :rank] * root


# ---- files ------------------------------------------------------------------------------------------

_A, _B = ".lora_A.weight", ".lora_B.weight"
START = {_A: ".lora_A.start", _B: ".lora_B.start"}
"""What follows a module's path where its factors' start is, by what does where the factors are."""


def joined(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Factors and their start as the factors of one LoRA: [A; A0] and [B, -B0], of twice the rank."""
    found = dict(tensors)
    for key in tensors:
        stem = key.removesuffix(START[_A])
        if stem == key:
            continue
        A0, B0 = (found.pop(stem + START[end]) for end in (_A, _B))
        found[stem + _A] = torch.cat([found[stem + _A], A0.to(found[stem + _A])])
        found[stem + _B] = torch.cat([found[stem + _B], -B0.to(found[stem + _B])], dim=1)
    return found


def split(tensors: Mapping[str, Tensor], ranks: Mapping[str, int]) -> dict[str, Tensor]:
    """What `joined` made one, as it was.

    Args:
        tensors: by module path and suffix.
        ranks: of the factors without their start, by module path.
    """
    found = dict(tensors)
    for path, rank in ranks.items():
        A, B = found.get(path + _A), found.get(path + _B)
        if A is not None and B is not None and A.shape[:1] == (2 * rank,) and B.shape[1:2] == (2 * rank,):
            found[path + _A], found[path + START[_A]] = A[:rank], A[rank:]
            found[path + _B], found[path + START[_B]] = B[:, :rank], -B[:, rank:]
    return found
