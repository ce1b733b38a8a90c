"""What `optx.PMOEHead` puts on a policy's output: K primitives, and the weights that route between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optx.inject._part import Part, hidden_of, new_tensor
from optx.policy._mixture import ActionMixture


class Primitives(Part):
    """Heads for means, log-deviations and routing, on what the served Linear is given.

    Attributes:
        mean_weight: (K n, d), with mean_bias (K n,).
        log_std_weight: (K n, d), with log_std_bias.
        mixing_weight: (K, d), with mixing_bias.
        low: (n,), the least action, and ``high``, the greatest; None without bounds.
    """

    alone: ClassVar[bool] = True
    low: Tensor | None
    high: Tensor | None

    def __init__(
        self,
        module: nn.Linear,
        k: int,
        actions: int,
        bounds: tuple[Sequence[float], Sequence[float]] | None,
        squash: bool,
        log_std: tuple[float, float],
        detach: bool,
    ) -> None:
        super().__init__()
        width = module.in_features
        self.k, self.actions, self.squash, self.log_std, self.detach = k, actions, squash, log_std, detach
        for name, rows in (("mean", k * actions), ("log_std", k * actions), ("mixing", k)):
            self.register_parameter(f"{name}_weight", nn.Parameter(new_tensor(module, rows, width)))
            self.register_parameter(f"{name}_bias", nn.Parameter(new_tensor(module, rows)))
        for name, values in zip(("low", "high"), bounds or (None, None), strict=True):
            like = new_tensor(module, actions)
            self.register_buffer(name, None if values is None else like + like.new_tensor(values))

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> Primitives:
        """As in nn.Module, but that half precision, in which a bound is another number, leaves them alone."""
        bounds = {"low": self.low, "high": self.high}
        super()._apply(fn, recurse)  # pyright: ignore[reportUnknownMemberType]
        for name, before in bounds.items():
            now = getattr(self, name)
            if before is not None and now.dtype.itemsize < 4 and not before.is_meta:
                setattr(self, name, before.to(now.device))
        return self

    @torch.no_grad()
    def begin(self, spread: float) -> None:
        """Means and log-deviations U(-spread, spread); routing as nn.Linear begins, for K near 1/K each."""
        mixing: Any = self.mixing_weight
        reach = 1 / math.sqrt(mixing.shape[1])
        for name, p in self.named_parameters(recurse=False):
            limit = reach if name.startswith("mixing") else spread
            p.uniform_(-limit, limit)

    def around(
        self, call: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> ActionMixture:
        """The mixture for each state, in float32 (float64 for such a policy), also under autocast."""
        x = hidden_of(args, kwargs)
        with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
            shape = (*x.shape[:-1], self.k, self.actions)
            means = self._head("mean", x).reshape(shape)
            log_stds = self._head("log_std", x).clamp(*self.log_std).reshape(shape)
            logits = self._head("mixing", x.detach() if self.detach else x)
        low, high = (None if one is None else one.to(means.dtype) for one in (self.low, self.high))
        return ActionMixture(means, log_stds, logits, low, high, self.squash)

    def _head(self, name: str, x: Tensor) -> Tensor:
        weight, bias = getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias")
        dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
        return F.linear(x.to(dtype), weight.to(dtype), bias.to(dtype))

    def retired(self, module: nn.Module) -> list[nn.Parameter]:
        """The Linear's own weight and bias."""
        return list(module.parameters(recurse=False))

    def note(self) -> str:
        """How many, of how many actions."""
        return f"{self.k} primitives of {self.actions} action{'s' * (self.actions > 1)}"

    def rows(self, primitive: int, with_log_std: bool) -> tuple[Tensor, Tensor]:
        """Weight and bias of one primitive's mean, and below them those of its log-deviation."""
        here = slice(primitive * self.actions, (primitive + 1) * self.actions)
        names = ("mean", "log_std") if with_log_std else ("mean",)
        weights: list[Tensor] = [getattr(self, f"{name}_weight").detach()[here] for name in names]
        biases: list[Tensor] = [getattr(self, f"{name}_bias").detach()[here] for name in names]
        return torch.cat(weights), torch.cat(biases)
