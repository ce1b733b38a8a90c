"""A block of a window transformer by what it is made of, found by its structure and proved by its output.

Which modules are the norms, the attention and the MLP shows in their names; in which order they are put
together (norm before or after, padding before or after the roll) shows only in what the block computes. So
each order is tried on a copy of the block with random weights, and one that gives what the block's own
forward gives is taken; without any the block is refused.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from optx._errors import OptxError, TargetError
from optx.inject._part import bare_forward
from optx.inject._window_compute import residual
from optx.inject._window_cost import macs
from optx.inject._window_grid import Grid, Pair

Tokens: TypeAlias = Callable[[Tensor], Tensor]

_NORMS = (("layernorm_before", "layernorm_after"), ("norm1", "norm2"))
_ATTENTIONS = ("attention", "attn")
_PATHS = ("drop_path", "drop_path1", "drop_path2")


@dataclass(frozen=True)
class WindowBlock:
    """What a block of a window transformer is made of, for `optx.WindowPrune`.

    Args:
        norm1: the norm of the attention, on (..., C).
        attn: attention within windows, ``attn(windows, mask)`` on (n, w², C); the mask is None or (m, w²,
            w²), added to scores, where n is a multiple of m. Its output, or a tuple that begins with it.
        norm2: the norm of the MLP, on (..., C).
        mlp: of one window each, on (n, w², C): pointwise, or mixing tokens of a window alone.
        window: its height and width in tokens; a number for both.
        shift: by how much the image is rolled; a number for both axes.
        size: height and width of the image in tokens, where the block is given (B, H*W, C) without them.
        dim: C; None: as ``norm1`` has it.
        drop_path: stochastic depth of either branch, on (B, ..., C).
        post_norm: norms come after attention and MLP (Swin V2). None: found by trying.
        roll_first: the image is padded after it was rolled. None: found by trying.
    """

    norm1: Tokens
    attn: Callable[..., Any]
    norm2: Tokens
    mlp: Tokens
    window: int | Pair
    shift: int | Pair = 0
    size: Pair | None = None
    dim: int | None = None
    drop_path: tuple[Tokens | None, Tokens | None] | None = None
    post_norm: bool | None = None
    roll_first: bool | None = None

    def grid(self, height: int, width: int) -> Grid:
        """Its windows on an image of this size."""
        return Grid(height, width, pair(self.window), pair(self.shift), bool(self.roll_first))


Blocks: TypeAlias = Callable[[nn.Module], Any]
"""What makes a `WindowBlock` of a module, or (norm1, attn, norm2, mlp); None for one that is no block."""


@dataclass(frozen=True)
class Form:
    """What was found out about a block when it was attached to.

    Attributes:
        arguments: the names of its forward's arguments, in order.
        outputs: how many it hands out in a tuple; 0: a tensor.
        post_norm: see `WindowBlock`.
        roll_first: see `WindowBlock`.
        paths: which branches stochastic depth is on: attention's, and the MLP's (not in transformers' Swin).
        window_macs: multiply-adds of attention and MLP, a window.
        call_macs: what a call with any window costs besides (Swin V2's position bias).
    """

    arguments: tuple[str, ...]
    outputs: int
    post_norm: bool
    roll_first: bool
    paths: tuple[bool, bool]
    window_macs: int
    call_macs: int

    def order(self, block: WindowBlock) -> WindowBlock:
        """The block with what was found out."""
        paths = tuple(
            path if on else None for path, on in zip(block.drop_path or (None, None), self.paths, strict=True)
        )
        return replace(block, post_norm=self.post_norm, roll_first=self.roll_first, drop_path=paths)


def pair(value: Any) -> Pair:
    """A size of both axes."""
    if isinstance(value, tuple | list):
        high, wide = cast("tuple[Any, Any]", tuple(cast("Any", value)))
        return int(high), int(wide)
    return int(value), int(value)


# ---- by structure -----------------------------------------------------------------------------------------


def is_block(module: nn.Module) -> bool:
    """Whether it has all that a Swin-like block has."""
    return not _missing(module)


def _missing(module: nn.Module) -> str:
    own = module._modules  # pyright: ignore[reportPrivateUsage]
    if not any(first in own and second in own for first, second in _NORMS):
        return "two norms (norm1 and norm2, or layernorm_before and layernorm_after)"
    if not any(name in own for name in _ATTENTIONS):
        return "an attention or attn"
    if "mlp" not in own and not ("intermediate" in own and "output" in own):
        return "an mlp, or an intermediate and an output"
    if not hasattr(module, "window_size") or not hasattr(module, "shift_size"):
        return "a window_size and a shift_size"
    return ""


def structure(module: Any, extra: Mapping[str, Any] | None = None) -> WindowBlock:
    """A Swin-like block's parts, under the names that transformers and timm give them.

    Args:
        module: one that `is_block`.
        extra: further arguments that its forward passes on to its attention.
    """
    own, extra = module._modules, dict(extra or {})
    first, second = next(names for names in _NORMS if names[0] in own)
    attention = own[next(name for name in _ATTENTIONS if name in own)]
    dropout = own.get("dropout")
    mlp = own["mlp"] if "mlp" in own else nn.Sequential(own["intermediate"], own["output"])

    def attn(windows: Tensor, mask: Tensor | None) -> Any:
        out = attention(windows, mask, **extra)
        if dropout is None:
            return out
        return (dropout(out[0]), *out[1:]) if isinstance(out, tuple) else dropout(out)

    both = own.get("drop_path")
    paths = (both, both) if both is not None else (own.get("drop_path1"), own.get("drop_path2"))
    return WindowBlock(
        norm1=own[first],
        attn=attn,
        norm2=own[second],
        mlp=mlp if dropout is None else lambda x: dropout(mlp(x)),
        window=pair(module.window_size),
        shift=pair(module.shift_size),
        drop_path=paths,
    )


def made_by(blocks: Blocks | None, window: int | None, module: nn.Module, path: str) -> WindowBlock:
    """A module's parts, as the user's function or its structure says.

    Raises:
        TargetError: it is no block, or has another window.
    """
    where = f"attach: WindowPrune can't serve {path!r}, a {type(module).__name__}: "
    if blocks is None:
        if lacks := _missing(module):
            raise TargetError(
                f"{where}it has no {lacks}. Pass blocks=, a function of a module that gives an "
                "optx.WindowBlock; a saved folder holds no such function: attach with it and call "
                "handle.load."
            )
        block = structure(module)
    else:
        made: Any = blocks(module)
        if isinstance(made, tuple) and len(cast("tuple[Any, ...]", made)) == 4 and window is not None:
            shift: Any = getattr(module, "shift_size", 0)
            made = WindowBlock(*cast("Any", made), window=window, shift=shift)
        if not isinstance(made, WindowBlock):
            raise TargetError(
                f"{where}blocks gave {type(made).__name__} for it; it must give an optx.WindowBlock, or with "
                "window= the four callables (norm1, attn, norm2, mlp)."
            )
        block = made
    if window is not None and pair(block.window) != pair(window):
        raise TargetError(f"{where}its window is {pair(block.window)}, and window={window} was given.")
    return block


def width(block: WindowBlock, path: str) -> int:
    """C of a block.

    Raises:
        TargetError: nothing says it.
    """
    if block.dim is not None:
        return block.dim
    weight: Any = getattr(block.norm1, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 1:
        raise TargetError(f"attach: WindowPrune can't see the width of {path!r} by its norm1. Pass dim=.")
    return len(weight)


# ---- by trying --------------------------------------------------------------------------------------------


def form_of(module: nn.Module, path: str, make: Callable[[nn.Module], WindowBlock]) -> Form:
    """In which order a block is put together, by what it computes; the module is not touched.

    Raises:
        TargetError: no order gives what its own forward gives, or it can't be tried.
    """
    if any(p.is_meta for p in module.parameters()):
        raise TargetError(
            f"attach: WindowPrune computes {path!r} once to see how it is built, and its weights are on the "
            "meta device. Load them first, and attach then."
        )
    twin = _stirred(module)
    if is_block(twin):
        for name in set(_PATHS) & set(twin._modules):  # pyright: ignore[reportPrivateUsage]
            setattr(twin, name, _Half())
    block = make(twin)
    _check_local(block, path, twin)
    arguments = tuple(inspect.signature(type(module).forward).parameters)[1:]
    dim = width(block, path)
    seen = list(_looks(twin, block, dim, arguments, path))
    costs = _costs(twin, block, dim)
    shared = isinstance(twin._modules.get("drop_path"), _Half)  # pyright: ignore[reportPrivateUsage]
    placed = ((True, True), (True, False), (False, True)) if shared else ((True, True),)
    orders = itertools.product(_choices(block.post_norm), _choices(block.roll_first), placed)
    for post_norm, roll_first, paths in orders:
        form = Form(arguments, seen[0][3], post_norm, roll_first, paths, *costs)
        if all(_gives(form.order(block), x, size, want) for x, size, want, _ in seen):
            return form
    raise TargetError(_why_not(block, path, dim, twin))


@torch.no_grad()
def _costs(twin: nn.Module, block: WindowBlock, dim: int) -> Pair:
    """Multiply-adds of a window and of a call, by those of one window and of two."""
    (high, wide), like = pair(block.window), next(twin.parameters())
    with torch.autocast(like.device.type, enabled=False):
        one, two = (
            macs(lambda x: (block.attn(x, None), block.mlp(x)), like.new_zeros(n, high * wide, dim))
            for n in (1, 2)
        )
    return two - one, 2 * one - two


class _Half(nn.Module):
    """In the place of stochastic depth, which shows nothing in evaluation mode."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x


def _choices(given: bool | None) -> tuple[bool, ...]:
    return (False, True) if given is None else (given,)


def _stirred(module: nn.Module) -> nn.Module:
    """A copy in evaluation mode whose weights are none that hide an order (gains or last layers of 0)."""
    twin = copy.deepcopy(module).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in twin.parameters():
            if p.is_floating_point():
                noise = (
                    torch.randn(p.shape, generator=generator)
                    / max(1, p[0].numel() if p.ndim > 1 else 16) ** 0.5
                )
                p.add_(noise.to(p))
    return twin


def _numbers(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(like)


def _looks(
    twin: nn.Module, block: WindowBlock, dim: int, arguments: tuple[str, ...], path: str
) -> Iterator[tuple[Tensor, Pair, Tensor, int]]:
    """Inputs of the sizes that the block takes, one of them padded where it can be, and what it makes of
    them."""
    high, wide = pair(block.window)
    sizes = [block.size] if block.size else [(2 * high, 2 * wide), (2 * high + 1, 3 * wide - 1)]
    own: Any = getattr(twin, "input_resolution", None)
    last: list[Any] = [] if own is None or block.size else [pair(own)]
    like = next(twin.parameters())
    found, error = 0, None
    for size in [*sizes, *last]:
        if found and size in last:
            return
        x = _numbers((2, *size, dim), like)
        for shape in (x, x.flatten(1, 2)):
            if shape.ndim == 3 and block.size is None and len(arguments) < 2:
                continue
            try:
                with torch.no_grad(), torch.autocast(like.device.type, enabled=False):
                    out: Any = bare_forward(twin)(
                        shape, *([size] if shape.ndim == 3 and not block.size else [])
                    )
            except Exception as failed:
                error = failed
                continue
            first = out[0] if isinstance(out, tuple) else out
            found += 1
            yield x, size, first.reshape(x.shape), len(out) if isinstance(out, tuple) else 0
            break
    if not found:
        raise TargetError(
            f"attach: WindowPrune computes {path!r} once to see how it is built, and its forward takes "
            f"none of {sizes + last} tokens ({type(error).__name__}: {error})."
        )


@torch.no_grad()
def _gives(block: WindowBlock, x: Tensor, size: Pair, want: Tensor) -> bool:
    grid = block.grid(*size)
    with torch.autocast(x.device.type, enabled=False):
        got = grid.join(residual(block, grid.split(x), grid, len(x))[0])
    off = 1e-3 if x.dtype.itemsize >= 4 else 0.05
    return bool((got - want).double().norm() <= off * (want - x).double().norm())


def _same(got: Tensor, want: Tensor) -> bool:
    off = 1e-3 if got.dtype.itemsize >= 4 else 0.05
    return got.shape == want.shape and bool((got - want).double().norm() <= off * want.double().norm())


@torch.no_grad()
def _check_local(block: WindowBlock, path: str, twin: nn.Module) -> None:
    """Raise if attention or MLP of one window depends on what other windows are computed with it."""
    high, wide = pair(block.window)
    windows = _numbers((3, high * wide, width(block, path)), next(twin.parameters()))

    def attn(x: Tensor) -> Tensor:
        out = block.attn(x, None)
        return out[0] if isinstance(out, tuple) else out

    for what, call in (("attention", attn), ("MLP", block.mlp)):
        try:
            with torch.autocast(windows.device.type, enabled=False):
                whole, single = call(windows), torch.cat([call(one[None]) for one in windows])
        except Exception as error:
            raise TargetError(
                f"attach: WindowPrune can't serve {path!r}, a {type(twin).__name__}: its {what} can't be "
                f"computed on windows alone ({type(error).__name__}: {error})."
            ) from error
        if not _same(single, whole):
            raise TargetError(
                f"attach: WindowPrune can't serve {path!r}, a {type(twin).__name__}: its {what} mixes "
                "windows, so that what is computed of some of them is not what is computed of all."
            )


@torch.no_grad()
def _why_not(block: WindowBlock, path: str, dim: int, twin: nn.Module) -> str:
    """What is wrong with a block that no order explains."""
    (high, wide), like = pair(block.window), next(twin.parameters())
    tokens = _numbers((1, 4 * high * wide, dim), like)
    turned = torch.arange(tokens.shape[1] - 1, -1, -1, device=like.device)
    where = f"attach: WindowPrune can't serve {path!r}, a {type(twin).__name__}: "
    try:
        pointwise = _same(block.mlp(tokens[:, turned]), block.mlp(tokens)[:, turned])
    except Exception:
        pointwise = False
    if not pointwise:
        return (
            f"{where}its MLP mixes tokens, and computed window by window it is not what the block's own "
            "forward gives. An MLP over the whole image (a convolution) would let dropped windows change "
            "kept ones; only pointwise ones and such within a window can be served."
        )
    return (
        f"{where}norms, attention and MLP put together as in Swin or Swin V2 don't give what its own forward "
        "gives. Pass blocks=, a function of a module that gives an optx.WindowBlock with what is missing."
    )


def check_blocks(blocks: object) -> None:
    """Raise unless it can be asked what a module is made of."""
    if blocks is not None and not callable(blocks):
        raise OptxError(
            f"WindowPrune: blocks is {blocks!r}; it must be a function of a module that gives an "
            "optx.WindowBlock, or None for what is built as Swin. Which blocks are served is for targets=."
        )
