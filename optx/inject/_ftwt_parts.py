"""FTWT on a model: a predictor on each convolution, and the mask where its chain ends.

Source: FTWT, arXiv 2110.08232, section 3.1; the softmax of the pooled input is of the official code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optx.inject._ftwt_layer import Layer
from optx.inject._gathered_conv import output_size
from optx.inject._injection import Injection
from optx.inject._own_loss import Collected, LossPart
from optx.inject._part import Part, attached, hidden_of, new_tensor

_START = 1.0
"""What a predictor's bias starts at: above what its weights can take away, so that all filters are kept."""


_WORTHWHILE = 4_000_000
"""Multiply-adds of a sample below which choosing takes as long as computing, on a core of a CPU."""


class Ending(Part):
    """What may be at the end of a chain, where the mask is: behind all else that acts on the module."""

    comes_last: ClassVar[bool] = True

    layer: Layer | None
    ends: bool

    def later(self, module: nn.Module) -> bool:
        """Whether another part still adds to the module's output, so that it can't be masked before."""
        container = attached(module)
        others = () if container is None else (part for part in container.parts.values() if part is not self)
        return any(part.overrides("after") and part.active for part in others)

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Mask what others have added to."""
        if self.layer is None or not self.ends or not self.later(module):
            return None
        return self.layer.end(output, hidden_of(args, kwargs), own=False)


class Predictor(LossPart, Ending):
    """z = W softmax(pool(x)) + b, from the input of a convolution; filter c is computed where z_c > 0.

    weight: (C, C_in dim^2); bias: (C,).
    """

    def __init__(self, module: Any, path: str, collected: Collected, options: Any) -> None:
        super().__init__(path, collected)
        self.inference, self.joint, embedding = options.inference, options.mode == "joint", options.embedding
        self.dim = max(1, round((embedding / module.in_channels) ** 0.5)) if embedding > 0 else 1
        width = module.in_channels * self.dim**2
        self.weight = nn.Parameter(new_tensor(module, module.out_channels, width))
        self.bias = nn.Parameter(new_tensor(module, module.out_channels) + _START)
        with torch.no_grad():
            self.weight.uniform_(-(width**-0.5), width**-0.5)
        self.layer: Layer | None = None
        self.ends = False

    def around(
        self, call: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Predict; compute all filters, or in evaluation mode those that are kept."""
        layer, x = self.layer, hidden_of(args, kwargs)
        if layer is None:  # being attached
            return call(*args, **kwargs)
        batch = x if x.ndim == 4 else x[None]
        pooled = self.pooled(batch if self.joint else batch.detach())
        layer.area = x.shape[-2] * x.shape[-1]
        layer.begin(self.logits(pooled.flatten(1)), training=self.training, learning=self.learning)
        y = layer.gathered(module, x, pooled) if self.gathers(module, x) else None
        if y is None:
            y = call(*args, **kwargs)
        if not self.ends or self.later(module) or layer.finished(y):
            return y
        return layer.end(y, x)

    def pooled(self, x: Tensor) -> Tensor:
        """(B, C_in, dim, dim) in the precision of sums."""
        wide = torch.promote_types(x.dtype, torch.float32)
        if self.dim == 1:
            return x.mean((-2, -1), keepdim=True, dtype=wide)
        return F.adaptive_avg_pool2d(x.to(wide), self.dim)

    def logits(self, pooled: Tensor) -> Tensor:
        """(B, C) from the pooled input, (B, C_in dim^2); autocast would round them."""
        kind = pooled.device.type
        if not torch.is_autocast_enabled(kind):
            return F.linear(pooled.to(self.weight.dtype).softmax(1), self.weight, self.bias)
        with torch.autocast(kind, enabled=False):
            return F.linear(pooled.to(self.weight.dtype).softmax(1), self.weight, self.bias)

    def gathers(self, conv: Any, x: Tensor) -> bool:
        """Whether a call computes some filters alone."""
        if self.training or self.inference == "mask" or x.ndim != 4 or torch.compiler.is_compiling():
            return False
        if self.inference == "gather" or self.layer is None:
            return True
        if conv.groups > 1 or (x.device.type != "cpu" and len(x) > 1):
            return False
        height, width = output_size(conv, x.shape[-2:])
        return self.layer.size(height * width) >= _WORTHWHILE

    def work(self) -> int:
        """Multiply-adds of its product, and one addition per number of the last input, which is pooled."""
        pooled = 0 if self.layer is None else self.layer.area
        return self.weight.numel() + self.weight.shape[1] // self.dim**2 * pooled

    def note(self) -> str:
        """What it predicts from what."""
        return f"{self.weight.shape[0]} filters from {self.weight.shape[1]} numbers"


class End(Ending):
    """On the norm behind a convolution: the mask is on its output, which an activation of 0 leaves 0."""

    weightless: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self.layer: Layer | None = None
        self.ends = True

    def around(
        self, call: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Norm what is not yet, and mask it."""
        layer, x = self.layer, hidden_of(args, kwargs)
        if layer is None:
            return call(*args, **kwargs)
        if layer.finished(x):
            return x
        y = call(*args, **kwargs)
        return y if self.later(module) else layer.end(y, x)

    def note(self) -> str:
        """Whose end it is."""
        return f"masks {self.layer.path}" if self.layer else ""


class Whole(Part):
    """On a convolution without a predictor: counts its work."""

    weightless: ClassVar[bool] = True

    def __init__(self, reason: str) -> None:
        super().__init__()
        self.reason = reason
        self.layer: Layer | None = None

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        """Count."""
        if self.layer is not None and not self.training:
            self.layer.count(output if output.ndim == 4 else output[None])

    def note(self) -> str:
        """Why it has none."""
        return f"not served: {self.reason}"


@dataclass(frozen=True)
class Ends(Injection):
    """The norms at the ends of chains; `optx.FTWT` brings it along."""

    name: ClassVar[str] = "ftwt_end"
    role: ClassVar[str] = ""
    serves: ClassVar[str] = "batch norms"

    def part(self, module: nn.Module, path: str) -> Part:
        """One norm's."""
        return End()

    def __str__(self) -> str:
        return "FTWT"


@dataclass(frozen=True)
class Wholes(Injection):
    """The convolutions that are not served; `optx.FTWT` brings it along."""

    name: ClassVar[str] = "ftwt_whole"
    role: ClassVar[str] = ""
    serves: ClassVar[str] = "Conv2d modules"

    reasons: tuple[tuple[str, str], ...]

    def part(self, module: nn.Module, path: str) -> Part:
        """One convolution's."""
        return Whole(dict(self.reasons)[path])

    def __str__(self) -> str:
        return "FTWT"
