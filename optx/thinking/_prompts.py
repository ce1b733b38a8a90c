"""Prompts in the forms in which people have them, checked, and the seeds of their rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from optx._errors import OptxError, check_whole, shown

Seeds: TypeAlias = "int | Sequence[int] | torch.Generator | Sequence[torch.Generator]"


def prompts_of(model: nn.Module, given: Any, mask: Any, doing: str) -> tuple[Tensor, Tensor]:
    """Token ids (B, P), padded on the left, and where they are something (B, P) bool.

    Args:
        model: says which token pads, and where the ids go.
        given: (B, P) ids, what a tokenizer returns, or lists of ids of any lengths.
        mask: (B, P), 0 at padding.
        doing: who asks, for errors.

    Raises:
        OptxError: no such ids, padding on the right or in between, padding without a mask, an empty row.
    """
    if isinstance(given, Mapping):
        named = cast("Mapping[str, Any]", given)
        if "input_ids" not in named:
            raise OptxError(f"{doing}: the prompts have no 'input_ids' among {', '.join(map(repr, named))}.")
        given, mask = named["input_ids"], named.get("attention_mask", mask)
    if not isinstance(given, Tensor):
        given, own = _padded(given, doing)
        mask = own if mask is None else mask
    ids = given[None] if given.ndim == 1 else given
    if ids.ndim != 2 or not ids.numel() or ids.is_floating_point() or ids.dtype == torch.bool:
        raise OptxError(
            f"{doing}: prompts have shape {tuple(ids.shape)} and dtype {ids.dtype}; they must be token ids, "
            "(rows, places)."
        )
    mask = _unmasked(model, ids, doing) if mask is None else torch.as_tensor(mask)
    mask = mask[None] if mask.ndim == 1 else mask
    if mask.shape != ids.shape:
        raise OptxError(
            f"{doing}: attention_mask has shape {tuple(mask.shape)}, the prompts {tuple(ids.shape)}."
        )
    there = mask != 0
    if bool((there[:, :-1] & ~there[:, 1:]).any()) or not bool(there[:, -1].all()):
        row = int((~there[:, -1] | (there[:, :-1] & ~there[:, 1:]).any(1)).nonzero()[0])
        raise OptxError(
            f"{doing}: row {row} of the attention mask has a 0 behind a 1, or nothing but 0. Pad on the "
            "left: tokenizer.padding_side = 'left'."
        )
    device = next((p.device for p in model.parameters()), ids.device)
    if device.type == "meta":
        raise OptxError(f"{doing}: this {type(model).__name__} is on the meta device, without values.")
    return ids.to(device, torch.int64), there.to(device)


def _padded(rows: Any, doing: str) -> tuple[Tensor, Tensor]:
    try:
        tensors = [torch.as_tensor(row) for row in rows] if len(rows) else []
    except (TypeError, ValueError, RuntimeError):
        tensors = []
    if tensors and all(one.ndim == 0 for one in tensors):
        tensors = [torch.stack(tensors)]
    if not tensors or any(
        one.ndim != 1 or not len(one) or one.is_floating_point() or one.dtype == torch.bool for one in tensors
    ):
        raise OptxError(
            f"{doing}: prompts are {shown(rows)}; they must be token ids: a tensor (rows, places), lists of "
            "ids, or what a tokenizer returns."
        )
    P = max(map(len, tensors))
    ids, mask = (
        torch.zeros(len(tensors), P, dtype=torch.int64),
        torch.zeros(len(tensors), P, dtype=torch.bool),
    )
    for i, one in enumerate(tensors):
        ids[i, P - len(one) :], mask[i, P - len(one) :] = one, True
    return ids, mask


def _unmasked(model: nn.Module, ids: Tensor, doing: str) -> Tensor:
    """All of it, unless the first places are padding by the look of it."""
    settings = (getattr(model, "generation_config", None), getattr(model, "config", None))
    pad = next((found for one in settings if (found := getattr(one, "pad_token_id", None)) is not None), None)
    others = {*stop_ids_of(model), *(getattr(one, "bos_token_id", None) for one in settings)}
    if pad is not None and pad not in others and bool((ids[:, [0, -1]] == pad).any()):
        raise OptxError(
            f"{doing}: prompts begin or end with {pad}, the model's padding. Pass attention_mask=, as the "
            "tokenizer returns it, with padding on the left."
        )
    return torch.ones_like(ids)


def stop_ids_of(model: nn.Module) -> tuple[int, ...]:
    """The tokens at which the model's own settings say that a sequence ends."""
    for one in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        found = getattr(one, "eos_token_id", None)
        if found is not None:
            return tuple(found) if isinstance(found, list | tuple) else (int(found),)
    return ()


def generators_of(seed: Any, rows: int, doing: str) -> list[torch.Generator]:
    """One generator for each row, on the CPU.

    Args:
        seed: a number, of which row i has the i-th of a series that it begins; each row's own number; a
            generator that such numbers are drawn from; each row's own generator, which is used itself.
        rows: how many.
        doing: who asks, for errors.
    """
    if isinstance(seed, torch.Generator):
        seed = torch.randint(2**62, (rows,), generator=seed, device=seed.device).tolist()
    if not isinstance(seed, Sequence | Tensor) or (isinstance(seed, Tensor) and not seed.ndim):
        start = torch.Generator().manual_seed(check_whole(doing, "seed", seed) % 2**63)
        seed = torch.randint(2**62, (rows,), generator=start).tolist()
    if len(seed) != rows:
        raise OptxError(f"{doing}: seed has {len(seed)} entries, and there are {rows} rows.")
    return [_generator(one, doing) for one in cast("Sequence[Any]", seed)]


def _generator(one: Any, doing: str) -> torch.Generator:
    if not isinstance(one, torch.Generator):
        return torch.Generator().manual_seed(check_whole(doing, "seed", one) % 2**63)
    if one.device.type != "cpu":
        raise OptxError(
            f"{doing}: a row's generator is on {one.device}; it must be on the CPU, where the noise is drawn."
        )
    return one


def thinking_of(given: Any, rows: int, doing: str) -> Tensor:
    """Which rows begin by thinking, (B,) bool."""
    try:
        found = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        found = torch.zeros(())  # nothing that a tensor can be of
    if found.dtype != torch.bool or found.shape not in ((), (rows,)):
        raise OptxError(
            f"{doing}: thinking is {shown(given)}; it must be True, False or one of them for each of "
            f"{rows} rows."
        )
    return found.expand(rows)
