"""Masks on a model: finding its weights by name, setting what is masked to 0, and looking whether it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from optx._errors import OptxError, ShapeError, near
from optx._mask_bits import unpack
from optx._module_paths import bare_path, paths_of
from optx._names import is_dtensor
from optx._pieces import pieces_of

Bits = Mapping[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    """A model's parameters under every name that they have in the bare model.

    Neither what wrappers put into names, nor what optx or PEFT added, nor PEFT's names for what was there.
    """
    modules = paths_of(model).modules
    found: dict[str, nn.Parameter] = {}
    for path, module in modules.items():
        bare = _without_peft(path, modules)
        if bare is not None:
            for name, p in module._parameters.items():  # pyright: ignore[reportPrivateUsage]
                if p is not None:
                    found[f"{bare}.{name}".removeprefix(".")] = p
    return found


_PEFT = {"base_model", "model", "base_layer", "original_module"}
"""What PEFT's classes call the modules that they wrap."""


def _without_peft(path: str, modules: Mapping[str, nn.Module]) -> str | None:
    """A path without what PEFT put into it; None for what it added."""
    bare: list[str] = []
    here = ""
    for leaf in path.split(".") if path else ():
        if not type(modules[here]).__module__.startswith("peft."):
            bare.append(leaf)
        elif leaf not in _PEFT:
            return None
        here = f"{here}.{leaf}".removeprefix(".")
    return ".".join(bare)


def parameters_of(who: str, shapes: Shapes, model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that masks are for, by the masks' names.

    Raises:
        OptxError: the model lacks one, or it has no numbers that can be looked at and set; names it.
        ShapeError: one has another shape; names it.
    """
    there = named(model)
    rename = _prefix(shapes, there, model)
    found: dict[str, nn.Parameter] = {}
    for name, shape in shapes.items():
        p = there.get(rename(name))
        if p is None:
            raise OptxError(f"{who}: {_missing(name, there, model)}")
        why = without_numbers(p)
        if why:
            raise OptxError(f"{who}: {name!r} {why}")
        if tuple(p.shape) != shape:
            raise ShapeError(
                f"{who}: {name!r} has shape {tuple(p.shape)}, and its mask is of {shape}: these are masks of "
                "another model."
            )
        found[name] = p
    return found


def _missing(name: str, there: Mapping[str, Any], model: nn.Module) -> str:
    """Why a model has no parameter of this name."""
    return pruned_by_torch(f"{name}_orig", there, model) or (
        f"these are masks of another model: this one, a {type(model).__name__}, has no parameter {name!r}. "
        f"{near(name, there)}"
    )


def _prefix(shapes: Shapes, there: Mapping[str, Any], model: nn.Module) -> Callable[[str], str]:
    """A checkpoint's names as they are here.

    With a head, transformers' models have a prefix before them; DDP and torch.compile put theirs into the
    names of a state dict.
    """
    base = next((one for m in model.modules() if (one := getattr(m, "base_model_prefix", None))), None)
    stem = f"{base}." if isinstance(base, str) else ""
    for unwrap in (str, bare_path, lambda name: bare_path(name).removeprefix("module.")):
        for rename in (
            unwrap,
            lambda name, unwrap=unwrap: f"{stem}{unwrap(name)}",
            lambda name, unwrap=unwrap: unwrap(name).removeprefix(stem),
        ):
            if all(rename(name) in there for name in shapes):
                return rename
    return str


def pruned_by_torch(name: str, there: Mapping[str, Any], model: nn.Module) -> str:
    """What to do about a weight that torch.nn.utils.prune has in its hands; empty if it has not."""
    stem = name.removesuffix("_orig")
    if stem == name or not any(
        f"{path}.{buffer}".removeprefix(".") == f"{stem}_mask"
        for path, module in paths_of(model).modules.items()
        for buffer in module._buffers  # pyright: ignore[reportPrivateUsage]
    ):
        return ""
    leaf = stem.rpartition(".")[2]
    return (
        f"{stem!r} is pruned by torch.nn.utils.prune, which keeps what it prunes in {name!r} and masks it in "
        f"every call. Make it plain first: torch.nn.utils.prune.remove(module, {leaf!r})."
    )


def without_numbers(p: Tensor) -> str:
    """Why a weight can't be looked at, number by number, and set to 0; empty if it can."""
    if p.is_meta:
        return (
            "is on the meta device, without numbers (offloaded, or not loaded yet). Load it first, or take "
            "off accelerate's hooks (accelerate.hooks.remove_hook_from_submodules)."
        )
    if (pieces := pieces_of(p)) is not None:
        return f"is {pieces.what}. Prune before that; to train it, shard it with fully_shard (FSDP2)."
    kind = type(p)
    wrapped = is_traceable_wrapper_subclass(p) and not is_dtensor(p)
    if wrapped or kind.__module__.startswith(("bitsandbytes", "torchao")):
        return f"is a {kind.__name__}, quantised or wrapped: it has no plain numbers. Prune before that."
    if not p.is_floating_point() or p.dtype.itemsize == 1:
        return f"is {p.dtype}, codes and not plain numbers. Prune before it is quantised."
    if p.layout != torch.strided:
        return f"is {str(p.layout).removeprefix('torch.')}; it must be dense, with zeros (to_dense)."
    return ""


def local_mask(p: Tensor, bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The part of a mask that belongs to this process's part of a weight, on the weight's device."""
    if not is_dtensor(p):
        return unpack(bits.to(p.device), shape)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    spread: Any = p
    sizes, offsets = compute_local_shape_and_global_offset(p.shape, spread.device_mesh, spread.placements)
    rows = bits[offsets[0] : offsets[0] + sizes[0]] if shape else bits
    part = unpack(rows.to(spread.to_local().device), (*sizes[:1], *shape[1:]))
    for axis, (begin, size) in enumerate(zip(offsets, sizes, strict=True)):
        if axis:
            part = part.narrow(axis, begin, size)
    return part


def local(p: Tensor) -> Tensor:
    """This process's part of a weight, in the weight's own memory."""
    own: Any = p.detach()
    return own.to_local() if is_dtensor(p) else own


def in_all(p: Tensor, count: Tensor) -> Tensor:
    """A count over a weight's part as one over the whole weight."""
    if not is_dtensor(p):
        return count
    from torch.distributed.tensor import DTensor, Partial, Replicate

    spread: Any = p
    parts = [Partial("sum") if one.is_shard() else Replicate() for one in spread.placements]
    return DTensor.from_local(count, spread.device_mesh, parts, run_check=False).full_tensor()


def apply_(bits: Bits, shapes: Shapes, model: nn.Module) -> None:
    """Set what is masked to 0."""
    found = parameters_of("Masks.apply_", shapes, model)
    with torch.no_grad():
        for name, p in _once("Masks.apply_", bits, found):
            local(p).masked_fill_(~local_mask(p, bits[name], shapes[name]), 0)


def _once(who: str, bits: Bits, found: Mapping[str, nn.Parameter]) -> list[tuple[str, nn.Parameter]]:
    """Each parameter with one of its names, which are several where weights are tied.

    Raises:
        OptxError: two masks of one parameter are not the same.
    """
    first: dict[int, str] = {}
    for name, p in found.items():
        other = first.setdefault(id(p), name)
        if not torch.equal(bits[name], bits[other]):
            raise OptxError(f"{who}: {other!r} and {name!r} are one weight here, and their masks are two.")
    return [(name, found[name]) for name in first.values()]


def regrown(bits: Bits, shapes: Shapes, found: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, int, int]]:
    """Of each weight that is not 0 where it is masked: its name, how many aren't, and how many are masked."""
    for name, p in found.items():
        off = ~local_mask(p, bits[name], shapes[name])
        both = torch.stack([((local(p) != 0) & off).sum(), off.sum()])
        wrong, masked = in_all(p, both).tolist()
        if wrong:
            yield name, wrong, masked


def verify(bits: Bits, shapes: Shapes, model: nn.Module) -> None:
    """Raise unless all that is masked is 0."""
    found = parameters_of("Masks.verify", shapes, model)
    wrong = list(regrown(bits, shapes, found))
    if wrong:
        count = sum(one for _, one, _ in wrong)
        raise OptxError(
            f"Masks.verify: {count:,} masked weights are not 0, in {len(wrong)} of {len(bits)}: "
            f"{told(wrong)}. masks.apply_(model) sets them to 0; optx.KeepMask(masks) keeps "
            "them so in training."
        )


def told(wrong: list[tuple[str, int, int]], most: int = 3) -> str:
    """The first of what `regrown` gives, in words."""
    first = [f"{name!r} ({count:,} of {masked:,})" for name, count, masked in wrong[:most]]
    return ", ".join(first) + (", ..." if len(wrong) > most else "")
