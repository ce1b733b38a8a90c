"""A handle of `optx.Perp` with plain LoRA as one of `optx.LoRA`, whose files PEFT reads.

What PERP trains beside it has its place there too: biases as ``bias="all"``, norms as ``modules_to_save``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from optx._errors import OptxError
from optx.inject._injection import Injection, Site
from optx.inject._low_rank import LowRank
from optx.inject._own_call import adds_bias
from optx.inject._part import RESERVED, Part
from optx.inject._perp_handle import PerpHandle
from optx.inject._perp_parts import Shift, shifted
from optx.inject._served import Served
from optx.inject._trained_whole import Saved, Values
from optx.inject.bitfit import BiasShift, BitFit
from optx.inject.lora import LoRA
from optx.inject.perp import Perp


@dataclass
class Twin:
    """What files see of a handle: LoRA's parts, and norms as modules that were trained whole."""

    model: nn.Module
    injection: Injection
    served: list[Served]
    saved: list[Saved]
    removed: bool = False

    def state_dict(self) -> dict[str, Tensor]:
        """By the served module's path, as `Handle.state_dict`."""
        found: dict[str, Tensor] = {}
        for one in self.served:
            names = one.part.suffixes()
            for name, tensor in one.part.tensors().items():
                found[f"{one.path}.{names.get(name, f'{one.name}.{name}')}"] = tensor.detach()
        for kept in self.saved:
            found.update({f"{kept.path}.{name}": t.detach() for name, t in kept.tensors().items()})
        return found

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Not asked: it is for writing."""
        raise NotImplementedError


def as_lora(handle: PerpHandle) -> Twin:
    """The LoRA that does the same.

    Raises:
        OptxError: its adapter is no plain LoRA, or some biases are trained and others not, for which PEFT has
            no word.
    """
    perp = handle.injection
    assert isinstance(perp, Perp)
    if perp.adapter != "lora":
        raise OptxError(
            f"export_lora: Perp's adapter={perp.adapter!r} is no plain LoRA, which is all that PEFT has. "
            "merge_and_unload() and the model's save_pretrained write a pruned model that anyone loads."
        )
    lora = LoRA(rank=perp.rank, alpha=perp.alpha, dropout=perp.dropout, bias="all" if perp.bias else "none")
    twin, bitfit = Twin(handle.model, lora, [], list(handle.saved)), BitFit()
    cuda = {p.device.index for p in handle.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices=cuda), torch.no_grad():  # LoRA's start draws; an export must not
        for one in handle.served:
            if isinstance(one.part, LowRank):
                twin.served.append(Served(one.path, one.module, _plain(lora, one), lora, lora.name))
            elif isinstance(one.part, Shift) and "weight" in one.part._parameters:  # pyright: ignore[reportPrivateUsage]
                twin.saved.append(_whole(one, one.part))
            else:
                twin.served.append(Served(one.path, one.module, _bias(one), bitfit, lora.name))
    _check_biases(twin, lora)
    return twin


def _plain(lora: LoRA, one: Served) -> Part:
    """The same factors in LoRA's own part."""
    part = lora.part(one.module, one.path)
    for name, p in part.named_parameters():
        p.copy_(one.part.get_parameter(name))
    return part


def _bias(one: Served) -> Part:
    if isinstance(one.part, BiasShift):
        return one.part
    if not adds_bias(one.module):
        raise OptxError(f"export_lora: the bias of {one.path!r} is none that PEFT's bias='all' trains.")
    made = BiasShift(one.module)
    made.delta.copy_(one.part.get_parameter("bias"))
    return made


def _whole(one: Served, part: Shift) -> Saved:
    """A norm with the values that it has with its shifts."""
    bare = copy.copy(one.module)
    bare._modules = {name: m for name, m in one.module._modules.items() if name != RESERVED}  # pyright: ignore[reportPrivateUsage]
    values = dict(bare.state_dict())
    values.update({name: shifted(values[name], by) for name, by in part.named_parameters()})
    return Saved(one.path, bare, Values("", resting=values))


def _check_biases(twin: Twin, lora: LoRA) -> None:
    """Raise unless the biases are all those that ``bias="all"`` means."""
    sites = [Site(one.path, one.module) for one in twin.served if one.injection is lora]
    whole = tuple(f"{kept.path}." for kept in twin.saved)
    others = {
        site.path
        for _, some in lora.companions(twin.model, sites)
        for site in some
        if not f"{site.path}.".startswith(whole)
    }
    trained = {one.path for one in twin.served if one.injection is not lora}
    if others != trained:
        left = sorted(others ^ trained)[0]
        raise OptxError(
            f"export_lora: PEFT trains all biases or none, and that of {left!r} is trained either here or "
            "there alone. Attach Perp without targets=, or with bias=False."
        )
