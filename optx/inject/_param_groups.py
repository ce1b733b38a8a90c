"""What a handle trains as an optimizer's groups, each with the settings that its method gives it.

Source: LoRA+, arXiv 2402.12354: B learns faster than A, by the same ratio everywhere. The groups are those of
the authors' code and of PEFT's ``create_loraplus_optimizer``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from optx._errors import OptxError, check_range
from optx._param_groups import declared, settled
from optx.inject._experts import ParameterLoRA
from optx.inject._low_rank import EmbeddingLoRA, LowRank
from optx.inject._perp_parts import UnderMask
from optx.inject._served import OnModel
from optx.inject.bitfit import BiasShift

_FACTORS = (LowRank, ParameterLoRA, UnderMask)
"""Parts with an A and a B, or one of each for every parameter."""


def param_groups(
    handle: OnModel,
    *,
    lr: float,
    ratio: float | None,
    weight_decay: float,
    embedding_lr: float | None,
) -> list[dict[str, Any]]:
    """See `Handle.param_groups`."""
    check_range("param_groups", "lr", lr, 0)
    check_range("param_groups", "weight_decay", weight_decay, 0)
    if ratio is not None:
        check_range("param_groups", "ratio", ratio, 1)
        if not any(isinstance(one.part, _FACTORS) for one in handle.served):
            raise OptxError(
                f"param_groups: ratio={ratio} is LoRA+'s, of the rates of LoRA's B and A, and this handle is "
                f"of {type(handle.injection).__name__}. Leave ratio out."
            )
    if embedding_lr is not None:
        check_range("param_groups", "embedding_lr", embedding_lr, 0)
    asked = {p: own for one in handle.served for p, own in declared(one.part).items()}
    rows: dict[tuple[tuple[str, Any], ...], list[nn.Parameter]] = {}
    for kind, decays, p in _kinds(handle, plus=ratio is not None):
        faster = lr if ratio is None else lr * ratio
        slow = 1e-6 if ratio is not None else lr
        rate = {"A": lr, "B": faster, "embedding": slow if embedding_lr is None else embedding_lr}[kind]
        plain = {"lr": rate, "weight_decay": weight_decay if decays else 0.0}
        rows.setdefault(tuple(settled(asked.get(p, {}), plain).items()), []).append(p)
    return [{"params": params, **dict(settings)} for settings, params in rows.items()]


def _kinds(handle: OnModel, *, plus: bool) -> Iterator[tuple[str, bool, nn.Parameter]]:
    """Each parameter with its kind, and whether it decays."""
    for one in handle.served:
        for name, p in one.part.named_parameters():
            if isinstance(one.part, EmbeddingLoRA) and name in ("A", "B"):
                yield "embedding", True, p
            elif isinstance(one.part, _FACTORS) and name.rpartition(".")[2] == "B":
                yield "B", True, p
            elif p.ndim > 1:
                yield "A", True, p
            else:
                bias = isinstance(one.part, BiasShift) or name in ("bias", "B_bias")
                yield "B", plus and not bias, p
    for kept in handle.saved:
        for module in kept.module.modules():
            for name, p in module.named_parameters(recurse=False):
                decays = p.ndim > 1 or (plus and "bias" not in name and not isinstance(module, nn.LayerNorm))
                yield "A" if p.ndim > 1 else "B", decays, p
