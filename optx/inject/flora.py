"""FLoRA: an update of a weight of N axes as a small core times one factor per axis (Tucker).

Source: FLoRA, arXiv 2405.14739. Axis order and start are those of its official code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optx._errors import OptxError, TargetError, check_range, warn
from optx.inject._embeddings import peculiar, rows
from optx.inject._injection import Injection, Site
from optx.inject._metrics import product_sq
from optx.inject._part import Part, Weights, hidden_of, new_tensor
from optx.inject._targets import family_of
from optx.inject._weights import add_product, conv_like, is_conv, is_linear, is_transposed, shape_of


class Tucker(Part):
    """W + scale * core x_1 U_1 ... x_N U_N, on linear modules as y + scale ((x U_in) G) U_out^T.

    core: (J_in, J_out, *J_kernel); factors: (in, J_in), (out, J_out), then one (k, J_k) per kernel axis.
    """

    def __init__(self, flora: FLoRA, module: nn.Module, path: str) -> None:
        super().__init__()
        self.transposed = is_transposed(module)
        out, into, *kernel = shape_of(module)
        self.axes = (out, into, *kernel) if self.transposed else (into, out, *kernel)
        self.scale, self.dropout = flora.scale, flora.dropout
        ranks = flora.ranks(self.axes, path)
        self.core = nn.Parameter(new_tensor(module, *ranks))
        factors = [new_tensor(module, length, rank) for length, rank in zip(self.axes, ranks, strict=True)]
        for factor in factors:
            if flora.init == "orthonormal":
                nn.init.orthogonal_(factor)
            else:  # the fan that the official code takes is the rank: no axis is as wide as its layer
                nn.init.normal_(factor, std=(0.5 / factor.shape[1]) ** 0.5)
        self.factors = nn.ParameterList(factors)

    def in_first(self, weight: Tensor) -> Tensor:
        """A weight with its axes as in the core, or the other way round."""
        return weight if self.transposed else weight.transpose(0, 1)

    def spread(self, dtype: torch.dtype) -> Tensor:
        """The core with its kernel axes at full length: (J_in, J_out, *k)."""
        core = self.core.to(dtype)
        for factor in list(self.factors)[2:]:  # each axis goes to the end, so that all turn once around
            core = core.movedim(2, -1) @ factor.to(dtype).t()
        return core

    def delta(self, dtype: torch.dtype) -> Tensor:
        """The change of the weight, in its own shape."""
        U_in, U_out = self.factors[0].to(dtype), self.factors[1].to(dtype)
        change = self.spread(dtype).movedim(1, -1) @ U_out.t()  # (J_in, *k, out)
        change = change.movedim(0, -1) @ U_in.t()  # (*k, out, in)
        return self.in_first(change.movedim((-1, -2), (0, 1))) * self.scale

    def dropped(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The module's input, with dropout while training."""
        x = hidden_of(args, kwargs)
        drops = self.dropout and self.training and x.is_floating_point()
        return F.dropout(x, self.dropout) if drops else x

    def down(self, module: nn.Module, x: Tensor, U: Tensor) -> Tensor:
        """X U_in."""
        return x @ U

    def after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        """Add the update to the module's output; the core goes to U_out, which is smaller than the batch."""
        U_in, U_out = self.factors[0], self.factors[1]
        up = (self.core @ U_out.t()).to(output.dtype)
        low = self.down(module, self.dropped(args, kwargs), U_in.to(output.dtype))
        return self.up(output, low, up, self.owns(module))

    def up(self, output: Tensor, low: Tensor, up: Tensor, owned: bool) -> Tensor:
        """output + scale low up, in one pass over the output."""
        return add_product(output, low, up.t(), self.scale, owned=owned)

    @property
    def adds(self) -> bool:
        """Whether all it does is add: it does."""
        return True

    def fold(self, module: nn.Module, now: Weights, base: Weights) -> Weights:
        """W + scale * core x_1 U_1 ... x_N U_N."""
        return Weights(now.weight + self.delta(now.weight.dtype), now.bias)

    def as_lora(self) -> tuple[Tensor, Tensor, float]:
        """A (r, in * k), B (out, r) and scale of the LoRA that is the same change, r its smaller rank."""
        U_in, U_out = self.factors[0].detach(), self.factors[1].detach()
        core = self.spread(self.core.dtype).detach()
        if core.ndim == 2 and len(core) < core.shape[1]:
            return U_in.t(), U_out @ core.t(), self.scale
        A = (core.movedim(0, -1) @ U_in.t()).movedim(-1, 1)  # (J_out, in, *k)
        return A.flatten(1), U_out, self.scale

    def change_sq(self) -> Tensor | None:
        """That of the LoRA that is the same change."""
        return product_sq(*self.as_lora())

    def note(self) -> str:
        """Ranks and scale."""
        return f"ranks {' x '.join(map(str, self.core.shape))}, scale {self.scale:.4g}"


class EmbeddingTucker(Tucker):
    """On nn.Embedding, whose weight (V, d) is the transpose of a linear one of V inputs."""

    def __init__(self, flora: FLoRA, module: nn.Embedding, path: str) -> None:
        super().__init__(flora, module, path)
        self.padding_idx = module.padding_idx
        if self.padding_idx is not None:  # and it gets no gradient, so padding stays what it is
            with torch.no_grad():
                self.factors[0][self.padding_idx] = 0

    def down(self, module: nn.Module, x: Tensor, U: Tensor) -> Tensor:
        """Rows of U_in."""
        return rows(module, x, U, self.padding_idx)

    def up(self, output: Tensor, low: Tensor, up: Tensor, owned: bool) -> Tensor:
        """output + scale low up, in the output's precision: autocast leaves embeddings alone."""
        return output + self.scale * (low @ up).to(output.dtype)


class ConvTucker(Tucker):
    """On convolutions: 1 x 1 to J_in channels, the core as a kernel like the module's, 1 x 1 from J_out."""

    def after(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Add the update to the module's output."""
        x, dtype = self.dropped(args, kwargs), output.dtype
        if module.groups > 1:
            # A 1 x 1 per group would make J_in channels of each; W's own shape is the cheaper way.
            change = self.delta(self.core.dtype).to(dtype)
            return output + conv_like(module, x, change, module.groups)
        U_in, U_out = self.factors[0].to(dtype), self.factors[1]
        ones = (1,) * (self.core.ndim - 2)
        conv = (F.conv1d, F.conv2d, F.conv3d)[len(ones) - 1]
        low = conv(x, U_in.t().view(-1, len(U_in), *ones))
        mid = conv_like(module, low, self.spread(self.core.dtype).transpose(0, 1).to(dtype), 1)
        return output + conv(mid, (U_out * self.scale).to(dtype).view(*U_out.shape, *ones))


@dataclass(frozen=True)
class FLoRA(Injection):
    """Tucker adaptation: dW = scale * G x_1 U_in x_2 U_out x_3 U_k..., a core with one factor per axis of W.

    A convolution's kernel keeps its axes; on a matrix it is scale * U_out G^T U_in^T.

    Args:
        rank: J_in and J_out, along the weight's input and output axis.
        kernel_rank: along each kernel axis, one for all or a tuple. None: the kernel's size.
        in_rank: J_in, if another than ``rank``.
        out_rank: J_out, if another.
        scale: of the update. The paper tunes it between 0.04 and 4.
        dropout: on the update's input, while training.
        init: of the factors; the core starts at 0. ``"kaiming_rank"``: N(0, 0.5 / J), the official start;
            ``"orthonormal"``: orthonormal columns, so that |dW| = scale * |G|.

    Serves nn.Conv1d/2d/3d, nn.Linear, transformers' Conv1D and nn.Embedding. By default: the convolutions of
    a ResNet's blocks, else all linear modules of the blocks (one warning where nn.MultiheadAttention has some
    that it doesn't call; blocks whose experts are no modules are refused). Kernel ranks above the kernel's
    size, and input ranks above the input channels of a convolution's group, are lowered to it with one
    warning.

    A module gets ``core``, (J_in, J_out, *J_kernel), and ``factors``: (in / groups, J_in), (out, J_out) and
    (k, J_k) for each kernel axis. Half-precision weights get float32 ones.

    Paper values:
        ``scale=1.0, init="kaiming_rank"``: the authors' code (the defaults). Ranks and scales of the paper's
            models are in tables that could not be checked.

    Limits: On a matrix it reaches the same updates as a LoRA of rank J; only how they are trained differs.

    Keywords: PEFT, Tucker, tensor decomposition, convolutions, low rank, parameter-efficient fine-tuning.

    Evidence: ``optx run adapt``; ``test_flora.py``.

    Raises:
        OptxError: an option out of range.
        TargetError: at attach, a rank larger than the weight.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(64, 128, 3))
        >>> handle = optx.attach(model, optx.FLoRA(rank=8), targets="0")
        >>> print(model[0].optx.flora.note(), handle.report().trainable)
        ranks 8 x 8 x 3 x 3, scale 1 2130

    Source: arXiv 2405.14739.
    """

    name: ClassVar[str] = "flora"
    role: ClassVar[str] = "linears"
    serves: ClassVar[str] = "Conv1d/2d/3d, Linear, Conv1D or Embedding modules"

    rank: int = 8
    kernel_rank: int | tuple[int, ...] | None = None
    in_rank: int | None = None
    out_rank: int | None = None
    scale: float = 1.0
    dropout: float = 0.0
    init: Literal["kaiming_rank", "orthonormal"] = "kaiming_rank"

    def __post_init__(self) -> None:
        given = self.kernel_rank
        for rank in given if isinstance(given, tuple) else () if given is None else (given,):
            check_range("FLoRA", "kernel_rank", rank, 1)
        check_range("FLoRA", "rank", self.rank, 1)
        for name, rank in (("in_rank", self.in_rank), ("out_rank", self.out_rank)):
            if rank is not None:
                check_range("FLoRA", name, rank, 1)
        check_range("FLoRA", "scale", self.scale, 0)
        check_range("FLoRA", "dropout", self.dropout, 0, 1)
        if self.init not in ("kaiming_rank", "orthonormal"):
            raise OptxError(f"FLoRA: init is {self.init!r}; it must be 'kaiming_rank' or 'orthonormal'.")

    def role_in(self, model: nn.Module) -> str:
        """Convolutions where a known family has them."""
        family = family_of(model)
        return "convolutions" if family is not None and family.convolutions else self.role

    def part(self, module: nn.Module, path: str) -> Part:
        """One module's core and factors."""
        if is_conv(module):
            return ConvTucker(self, module, path)
        if is_linear(module):
            return Tucker(self, module, path)
        if isinstance(module, nn.Embedding) and not peculiar(module):
            return EmbeddingTucker(self, module, path)
        raise TargetError(
            f"attach: FLoRA serves {self.serves}; {path!r} is a {type(module).__name__}{peculiar(module)}."
        )

    def parts(self, sites: Sequence[Site]) -> list[Part]:
        """As `part`; ranks that were lowered are said once for all."""
        parts = super().parts(sites)
        lowered = [
            f"{site.path!r} {tuple(part.core.shape)}"
            for site, part in zip(sites, parts, strict=True)
            if isinstance(part, Tucker) and part.core.shape != self.wanted(part.axes)
        ]
        if lowered:
            more = f" and {len(lowered) - 3} more" if len(lowered) > 3 else ""
            warn(
                f"{self}: an axis that is shorter than its rank takes its length: ranks are now "
                f"{', '.join(lowered[:3])}{more}."
            )
        return parts

    def wanted(self, axes: Sequence[int]) -> tuple[int, ...]:
        """The rank asked for along each axis (in, out, *k)."""
        kernel = axes[2:] if self.kernel_rank is None else self.kernel_rank
        kernel = (kernel,) * len(axes[2:]) if isinstance(kernel, int) else kernel
        return (self.in_rank or self.rank, self.out_rank or self.rank, *kernel)

    def ranks(self, axes: Sequence[int], path: str) -> tuple[int, ...]:
        """The rank along each axis (in, out, *k), none above what the weight can use."""
        wanted, numel = self.wanted(axes), math.prod(axes)
        if len(wanted) != len(axes):
            raise TargetError(
                f"attach: FLoRA's kernel_rank={self.kernel_rank} has {len(wanted) - 2} axes, the kernel of "
                f"{path!r} has {len(axes) - 2}."
            )
        limits = [min(n, numel // n) for n in axes[:2]] + list(axes[2:])
        ranks = [min(rank, limit) for rank, limit in zip(wanted, limits, strict=True)]
        for axis, (which, own) in enumerate((("in", self.in_rank), ("out", self.out_rank))):
            grows_short = which == "in" and len(axes) > 2  # one channel per group, three of an image
            if ranks[axis] < wanted[axis] and not grows_short:
                given = f"{which}_rank" if own else "rank"
                raise TargetError(
                    f"attach: FLoRA's {given}={wanted[axis]} is larger than the rank of {path!r} along its "
                    f"{which}put axis, {limits[axis]}. Use at most that."
                )
        return tuple(ranks)
