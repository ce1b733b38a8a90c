"""What PERP adds to one module: factors under the mask of a pruned weight, or shifts of biases and norms.

Source: PERP, arXiv 2312.15230, MaskLoRA and ScaleLoRA. The formulas are those of the authors' code.
"""

# A, B and W are the paper's letters.
# pyright: reportConstantRedefinition=false

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optx._errors import MergeError
from optx._mask_bits import ones, unpack
from optx.inject._lora_options import Options
from optx.inject._low_rank import ConvLoRA, LinearLoRA
from optx.inject._low_rank_start import begin
from optx.inject._own_call import has_own_call
from optx.inject._part import Part, Weights, attached, new_tensor
from optx.inject._perp_product import Shape, change, product, summed
from optx.inject._stand_in import called_with
from optx.inject._weights import in_sum_precision, is_conv, is_transposed, shape_of


class Masked:
    """A part of a pruned weight, with its mask as saved bits."""

    mask: Tensor

    def masked_share(self) -> float:
        """How much of the weight is pruned."""
        return 1 - ones(self.mask) / max(math.prod(self.weight_shape), 1)

    weight_shape: torch.Size

    def check_base(self, base: Tensor, doing: str, path: str, error: type[Exception]) -> None:
        """Raise if the weight has numbers where its mask has none."""
        if base.is_meta:
            return
        wrong = int(
            (base.detach() != 0).masked_fill_(unpack(self.mask.to(base.device), base.shape), False).sum()
        )
        if wrong:
            raise error(
                f"{doing}: {path}.weight has {wrong} numbers that are not 0 where its mask has pruned them: "
                "the mask is another model's, or it was not applied. Call masks.apply_(model) first."
            )


class UnderMask(Part, Masked):
    """y = (W + D) x + b, with D = s M * (B A), or D = M * W * (B A - 1), which is ScaleLoRA's W * (B A).

    A: (rank, in), or (rank, in / groups * kernel); B: (out, rank). W + D is made anew in every forward and
    backward.
    """

    def __init__(self, module: nn.Module, path: str, rank: int, scale: float | None, bits: Tensor) -> None:
        super().__init__()
        self.path, self.rank, self.scale = path, rank, scale
        self.weight_shape = shape_of(module)
        self.transposed, self.known = is_transposed(module), not has_own_call(module)
        size = self.weight_shape
        out, into = (size[1], size[0]) if self.transposed else (size[0], math.prod(size[1:]))
        self.A = nn.Parameter(new_tensor(module, rank, into))
        self.B = nn.Parameter(new_tensor(module, out, rank))
        self.bias: nn.Parameter | None = None
        self.register_buffer("mask", bits.to(self.A.device))

    def start_at_zero(self) -> None:
        """LoRA's start: A is uniform and B zero."""
        begin("kaiming", self.A.data, self.B.data, 1.0, self.path, lambda: self.A)

    def start_at_one(self, *, equal: bool) -> None:
        """Factors whose product is 1 everywhere: all alike, or with rows of A that differ.

        Differences add up to 0 in each column, and are whole multiples of a power of 2, so that the product
        is as exact as without.
        """
        with torch.no_grad():
            self.A.fill_(self.rank**-0.5)
            self.B.fill_(self.rank**-0.5)
            if equal or self.rank == 1:
                return
            step = 2.0 ** (round(math.log2(self.rank**-0.5)) - 10)
            noise = torch.randn_like(self.A).mul_(self.rank**-0.5 / step).round_().clamp_(-4096, 4096)
            noise[-1] = -noise[:-1].sum(0)
            self.A.add_(noise, alpha=step)

    def train_bias(self, module: nn.Module) -> None:
        """Train what the bias has moved by, too."""
        self.bias = nn.Parameter(new_tensor(module, *module.bias.shape))  # pyright: ignore

    # ---- the call -----------------------------------------------------------------------------------

    def around(
        self, call: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The module's call with other weights."""
        if self._is_plain(module) and not kwargs and len(args) == 1:
            return self._computed(module, args[0])

        def make() -> dict[str, Tensor]:
            own: Any = module
            W = summed(own.weight, own_weight(module), self.A, self.B, self.mask, self._shape(module))
            return {"weight": W} if self.bias is None else {"weight": W, "bias": shifted(own.bias, self.bias)}

        return called_with(make, call, module, args, kwargs)

    def _is_plain(self, module: nn.Module) -> bool:
        """Whether the call is the class's own and nothing else goes around it."""
        container = attached(module)
        if container is None or container._forward is not None:  # pyright: ignore[reportPrivateUsage]
            return False
        others = (part for part in container.parts.values() if part is not self)
        return self.known and not any(part.overrides("around") and part.active for part in others)

    def _computed(self, module: Any, x: Tensor) -> Tensor:
        bias = module.bias if self.bias is None else shifted(module.bias, self.bias)
        shape = self._shape(module)
        if shape.groups and (isinstance(module.padding, str) or module.padding_mode != "zeros"):
            mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
            x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
        W, base = module.weight, own_weight(module)
        return product(x, W, bias, (self.A, self.B), self.mask, shape, None if base is W else base)

    def _shape(self, module: Any) -> Shape:
        if not is_conv(module):
            return Shape(self.scale, self.transposed)
        apart = isinstance(module.padding, str) or module.padding_mode != "zeros"
        padding: Any = tuple(0 for _ in module.kernel_size) if apart else module.padding
        return Shape(self.scale, False, module.stride, padding, module.dilation, module.groups)

    # ---- the rest -----------------------------------------------------------------------------------

    @property
    def adds(self) -> bool:
        """D x is added to W x, whatever else is."""
        return True

    def fold(self, module: nn.Module, now: Weights, base: Weights) -> Weights:
        """W + D, which has the zeros that W has."""
        self.check_base(base.weight, "merge", self.path, MergeError)
        W = change(base.weight, self.A, self.B, self.mask, self._shape(module)).add_(now.weight)
        if self.bias is None or now.bias is None:
            return Weights(W, now.bias)
        return Weights(W, now.bias + self.bias.to(now.bias.dtype))

    def note(self) -> str:
        """Rank, and how much is pruned."""
        scale = "" if self.scale is None else f", scale {self.scale:.4g}"
        return f"rank {self.rank}{scale}, {self.masked_share():.1%} pruned"


def own_weight(module: nn.Module) -> Any:
    """W without what is merged into it, or stands in for it during another part's call."""
    container = attached(module)
    merged = container.originals.get("weight") if container is not None else None
    return module._parameters["weight"] if merged is None else merged  # pyright: ignore[reportPrivateUsage]


def shifted(tensor: Tensor, by: Tensor) -> Tensor:
    """A parameter and its shift in the precision of sums, rounded once to the parameter's own."""
    return (in_sum_precision(tensor) + by).to(tensor.dtype)


class MaskedLinearLoRA(LinearLoRA, Masked):
    """Plain LoRA beside a pruned weight, and what is left of it at the merge: all, or what the mask keeps."""

    def __init__(self, lora: Options, module: nn.Module, path: str, bits: Tensor, prunes: bool) -> None:
        super().__init__(lora, module, path)
        self.path, self.prunes, self.weight_shape = path, prunes, shape_of(module)
        self.register_buffer("mask", bits.to(self.A.device))

    def change_sq(self) -> Tensor | None:
        """Of all; of what the mask keeps it is not had without the product."""
        return None if self.prunes else super().change_sq()

    def fold(self, module: nn.Module, now: Weights, base: Weights) -> Weights:
        """W + s B A, or W + s M * (B A)."""
        return _pruned_fold(self, super().fold(module, now, base), now, base)


class MaskedConvLoRA(ConvLoRA, Masked):
    """The same on a convolution."""

    def __init__(self, lora: Options, module: nn.Module, path: str, bits: Tensor, prunes: bool) -> None:
        super().__init__(lora, module, path)
        self.path, self.prunes, self.weight_shape = path, prunes, shape_of(module)
        self.register_buffer("mask", bits.to(self.A.device))

    def change_sq(self) -> Tensor | None:
        """Of all; of what the mask keeps it is not had without the product."""
        return None if self.prunes else super().change_sq()

    def fold(self, module: nn.Module, now: Weights, base: Weights) -> Weights:
        """W + s B A, or W + s M * (B A)."""
        return _pruned_fold(self, super().fold(module, now, base), now, base)


def _pruned_fold(part: Any, folded: Weights, now: Weights, base: Weights) -> Weights:
    if not part.prunes:
        return folded
    part.check_base(base.weight, "merge", part.path, MergeError)
    kept = unpack(part.mask, now.weight.shape)
    return Weights(torch.where(kept, folded.weight, now.weight), folded.bias)


class Shift(Part):
    """A module's own weight or bias plus what it has moved by, while the module computes: of norms.

    The sum is rounded once to the parameter's own precision, as a merge would write it.
    """

    inside = True

    def __init__(self, module: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        for name in names:
            own: Any = getattr(module, name)
            self.register_parameter(name, nn.Parameter(new_tensor(module, *own.shape)))

    def around(
        self, call: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The module's call, in which these names mean sums."""

        def make() -> dict[str, Tensor]:
            return {name: shifted(getattr(module, name), by) for name, by in self.named_parameters()}

        return called_with(make, call, module, args, kwargs)

    def fold(self, module: nn.Module, now: Weights, base: Weights) -> Weights:
        """The same sums."""
        return now.having({name: now.of(name) + by.to(now.of(name)) for name, by in self.named_parameters()})

    def note(self) -> str:
        """Which."""
        return " and ".join(name for name, _ in self.named_parameters())
