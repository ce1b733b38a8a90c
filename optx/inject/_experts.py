"""LoRA on parameters that no Linear holds: experts in one 3-D tensor, and their router's matrix.

While the module computes, the parameter's name on it means the sum of the parameter and the low-rank
update; the parameter itself, its place and its name stay. Factors have the shapes that PEFT's files have for
its ``target_parameters``.
"""

# A, B and W are the papers' letters.
# pyright: reportConstantRedefinition=false

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from optx._errors import TargetError
from optx.inject._lora_options import Options
from optx.inject._low_rank_sum import LowRankSum, made
from optx.inject._metrics import product_sq
from optx.inject._part import Part, Weights, new_tensor
from optx.inject._stand_in import called_with

# Forwards of transformers' experts that index and multiply their weights, and do nothing else with them.
_PLAIN = (None, "eager", "batched_mm", "grouped_mm")


class Pair(nn.Module):
    """The update s B_e A_e of every matrix e of one parameter (experts, rows, columns), or of one matrix.

    A: (experts * rank, in), expert by expert; B: (out, rank * experts), rank by rank, both as PEFT has them.
    Columns are inputs unless the module says ``is_transposed``.
    """

    def __init__(self, lora: Options, module: nn.Module, name: str, path: str) -> None:
        super().__init__()
        weight: Tensor = getattr(module, name)
        rows, columns = weight.shape[-2:]
        self.experts = len(weight) if weight.ndim == 3 else 1
        self.flat = weight.ndim == 2
        self.transposed = not self.flat and bool(getattr(module, "is_transposed", False))
        self.rank = lora.checked_rank(path, rows, columns)
        self.scale = lora.scale_at(path, self.rank)
        into, out = (rows, columns) if self.transposed else (columns, rows)
        A = new_tensor(module, self.experts * self.rank, into)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(new_tensor(module, out, self.rank * self.experts))

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """L (experts, rows, rank) and R (experts, rank, columns) with the scale in L."""
        A, B = self.A.to(dtype), self.B.to(dtype) * self.scale
        right = A.view(self.experts, self.rank, -1)
        left = B.view(len(B), self.rank, self.experts).permute(2, 0, 1).contiguous()
        if self.transposed:
            left, right = right.mT, left.mT
        return (left[0], right[0]) if self.flat else (left, right)


class ParameterLoRA(Part):
    """W + s B A in the place of W, for one or more parameters of a module, while it computes."""

    inside = True

    def __init__(self, lora: Options, module: nn.Module, path: str, names: tuple[str, ...]) -> None:
        super().__init__()
        _check_options(lora, module, f"{path}.{names[0]}")
        self.pairs = nn.ModuleDict({name: Pair(lora, module, name, f"{path}.{name}") for name in names})

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """The parameters that are served, in the module's order."""
        return tuple(self.pairs)

    def around(
        self, call: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The module's call, in which each of these names means a sum."""

        def sums() -> dict[str, Any]:
            apart = not torch.compiler.is_compiling() and _multiplies(module)
            return {name: self._sum(name, getattr(module, name), apart) for name in self.pairs}

        return called_with(sums, call, module, args, kwargs)

    def _sum(self, name: str, weight: Any, apart: bool) -> Any:
        left, right = self._pair(name).factors(weight.dtype)
        if isinstance(weight, LowRankSum):
            return weight.plus(left, right)
        return LowRankSum(weight, left, right) if apart else made(weight, left, right)

    def _pair(self, name: str) -> Pair:
        pair = self.pairs[name]
        assert isinstance(pair, Pair)
        return pair

    def change_sq(self) -> Tensor | None:
        """Of all matrices together."""
        pairs = [self._pair(name).factors(torch.float64) for name in self.pairs]
        return torch.stack([product_sq(right, left, 1.0) for left, right in pairs]).sum()

    def fold(self, module: nn.Module, now: Weights, base: Weights) -> Weights:
        """W + s B A."""
        folded = {}
        for name in self.pairs:
            weight = now.of(name)
            folded[name] = made(weight, *self._pair(name).factors(weight.dtype))
        return now.having(folded)

    def suffixes(self) -> dict[str, str]:
        """PEFT's keys: it wraps a module once for each parameter, in its order, the last outermost."""
        names = self.parameter_names
        return {
            f"pairs.{name}.{factor}": f"{'base_layer.' * (len(names) - 1 - i)}lora_{factor}.weight"
            for i, name in enumerate(names)
            for factor in "AB"
        }

    def note(self) -> str:
        """The parameters, with ranks and scales."""
        told: list[str] = []
        for name in self.pairs:
            pair = self._pair(name)
            experts = "" if pair.flat else f"{pair.experts} experts, "
            told.append(f"{name}: {experts}rank {pair.rank}, scale {pair.scale:.4g}")
        return "; ".join(told)


def _check_options(lora: Options, module: nn.Module, path: str) -> None:
    """Raise for options that have no meaning where the update is one of a tensor, not of a linear module."""
    for option in ("dropout", "dora", "lora_bias"):
        value = getattr(lora, option)
        if value:
            raise TargetError(
                f"attach: LoRA's {option}={value!r} is not for parameters such as {path!r}, as in PEFT. "
                "Leave it out, or attach another LoRA to those."
            )
    if lora.init != "kaiming":
        raise TargetError(
            f"attach: LoRA's init={lora.init!r} is not for parameters such as {path!r}. Leave it out, or "
            "attach another LoRA to those."
        )
    biases = [name for name, _ in module.named_parameters(recurse=False) if "bias" in name]
    if lora.bias == "all" and biases:
        raise TargetError(
            f"attach: LoRA's bias='all' would leave out {path.rpartition('.')[0]}.{biases[0]}, a bias of "
            "experts. Use bias='none'."
        )


def _multiplies(module: nn.Module) -> bool:
    """Whether the module is one of transformers' experts, and computes with products that are known here."""
    known = type(module).__module__.startswith("transformers.models.") and hasattr(module, "is_transposed")
    return known and getattr(getattr(module, "config", None), "_experts_implementation", "") in _PLAIN
