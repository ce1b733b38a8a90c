"""Write a method whose change of a weight has a low rank as a LoRA that PEFT reads."""

from __future__ import annotations

import re
from collections import Counter
from os import PathLike
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from optx._errors import OptxError
from optx.inject import _folder, _peft_write
from optx.inject._handle import Handle
from optx.inject._low_rank import LowRank
from optx.inject._peft_match import paths_of
from optx.inject._perp_export import Twin, as_lora
from optx.inject._perp_handle import PerpHandle
from optx.inject._served import Served
from optx.inject._watch import check_there
from optx.inject._weights import is_conv
from optx.inject.lora import LoRA


@runtime_checkable
class LowRankChange(Protocol):
    """A part that is the same as a LoRA."""

    def as_lora(self) -> tuple[Tensor, Tensor, float]:
        """A (r, in), B (out, r) and scale; the weight changes by scale B A."""
        ...


def export_lora(handle: Handle, path: str | PathLike[str]) -> None:
    """Write SVFit, FLoRA, or Perp with plain LoRA, as a LoRA folder, which PEFT, vLLM, others and optx read.

    What is written is the change of each weight as B A; trained further as a LoRA, it is another method. It
    cannot be loaded back as what it was: `Handle.save` is for that.

    Args:
        handle: of SVFit or FLoRA, on linear modules, embeddings, or convolutions without groups; or of Perp.
        path: the folder, which is written as `Handle.save` writes it.

    Raises:
        OptxError: a part is no such change, PEFT has no LoRA for a module, or ``path`` is a file; nothing
            is written.

    Example:
        >>> import os, tempfile, torch, optx
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> handle = optx.attach(model, optx.SVFit(rank=2), targets="0")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     optx.export_lora(handle, folder)
        ...     print(sorted(os.listdir(folder)))
        ['README.md', 'adapter_config.json', 'adapter_model.safetensors']
    """
    if handle.removed:
        raise OptxError("export_lora: this handle has been removed from its model. Attach again.")
    check_there(handle.model, [*handle.served, *handle.saved], "export_lora")
    twin = as_lora(handle) if isinstance(handle, PerpHandle) else _as_lora_handle(handle)
    config = _peft_write.config_of(twin)
    if isinstance(config, str):
        raise OptxError(f"export_lora: PEFT can't read this adapter, as {config}.")
    _folder.save(twin, path)


def _as_lora_handle(handle: Handle) -> Twin:
    """The LoRA that does the same, with parts that are not installed on the model."""
    plain = paths_of(handle.model).plain
    changes = {plain[one.path]: _change(one) for one in handle.served}
    ranks = {path: len(A) for path, (A, _) in changes.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {f"^{re.escape(path)}": r for path, r in ranks.items() if r != rank}
    lora = LoRA(rank=rank, alpha=rank, rank_pattern=others, alpha_pattern=dict[str, float](others))
    served: list[Served] = []
    cuda = {p.device.index for p in handle.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices=cuda), torch.no_grad():  # a LoRA's start draws; an export must not
        for one, (path, (A, B)) in zip(handle.served, changes.items(), strict=True):
            part = lora.part(one.module, path)
            assert isinstance(part, LowRank)
            part.A.copy_(A.view_as(part.A))
            part.B.copy_(B.view_as(part.B))
            served.append(Served(one.path, one.module, part, lora, lora.name))
    return Twin(handle.model, lora, served, handle.saved)


def _change(one: Served) -> tuple[Tensor, Tensor]:
    """A and B with the scale in it."""
    if not isinstance(one.part, LowRankChange):
        raise OptxError(
            f"export_lora: {type(one.injection).__name__} at {one.path!r} is not a LoRA in another form; "
            "SVFit and FLoRA are. handle.save(path) writes LoRA's own files."
        )
    if is_conv(one.module) and one.module.groups != 1:
        raise OptxError(
            f"export_lora: {one.path!r} has {one.module.groups} groups, and a LoRA mixes channels of "
            "different groups. Leave it out of targets, or use handle.merge_and_unload()."
        )
    device = next(one.part.parameters()).device.type
    with torch.autocast(device, enabled=False):
        A, B, scale = one.part.as_lora()
    return A, B * scale
