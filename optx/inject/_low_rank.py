"""What LoRA adds to one module: A and B beside a linear one, a convolution or an embedding.

Source: LoRA, arXiv 2106.09685, section 4.1; rsLoRA, arXiv 2312.03732; DoRA, arXiv 2402.09353, equation 5.
The formulas are those of PEFT 0.21.
"""

# A, B and W are the papers' letters.
# pyright: reportConstantRedefinition=false

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optx._errors import MergeError, TargetError
from optx.inject._computes import bias_of, weight_now, weight_of
from optx.inject._embeddings import rows
from optx.inject._lora_options import Options
from optx.inject._low_rank_start import begin, is_of_weight
from optx.inject._metrics import product_sq
from optx.inject._part import Part, Weights, attached, hidden_of, new_tensor
from optx.inject._weights import (
    add_product,
    conv_like,
    features,
    in_sum_precision,
    is_transposed,
)


class LowRank(Part):
    """y + s B A x, for a weight seen as a matrix W of (out, in): shared by linear, conv and embedding.

    A: (rank, in), B: (out, rank), in the shapes that PEFT's files have.
    """

    def __init__(self, lora: Options, path: str, out: int, into: int) -> None:
        super().__init__()
        self.rank = lora.checked_rank(path, out, into)
        self.scale = lora.scale_at(path, self.rank)
        self.dropout = lora.dropout
        self.A: nn.Parameter
        self.B: nn.Parameter
        self.B_bias: nn.Parameter | None
        self.magnitude: nn.Parameter | None
        self.bias: nn.Parameter | None
        self.A_start: Tensor | None
        self.B_start: Tensor | None

    def finish(self, lora: Options, module: nn.Module, path: str, A: Tensor, B: Tensor) -> None:
        """Fill the tensors, zeros, and register them, once their shapes are known."""
        kept = self.starts(lora, module, path, A, B)
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.register_buffer("A_start", A.clone() if kept else None)
        self.register_buffer("B_start", B.clone() if kept else None)
        out, *ones = self.channels(torch.empty(B.shape[0], device="meta")).shape
        bias = getattr(module, "bias", None)
        self.B_bias = nn.Parameter(new_tensor(module, out)) if lora.lora_bias else None
        trains_bias = lora.bias != "none" and bias is not None
        self.bias = nn.Parameter(new_tensor(module, out)) if trains_bias else None
        self.magnitude = None
        if lora.dora:
            norm = self.norm(in_sum_precision(weight_now(module, path))).to(A.dtype)
            self.magnitude = nn.Parameter(norm.view(1, out, *ones) if ones else norm)

    def starts(self, lora: Options, module: nn.Module, path: str, A: Tensor, B: Tensor) -> bool:
        """Fill A and B; whether they start as a part of the weight, which `after` takes off again."""
        weight = lambda: self.matrix(in_sum_precision(weight_now(module, path).detach()))  # noqa: E731
        return begin(lora.init, A, B, self.scale, path, weight)

    # ---- what linear, conv and embedding do in their own way -----------------------------------------

    def matrix(self, weight: Tensor) -> Tensor:
        """A weight as (out, in)."""
        raise NotImplementedError

    def down(self, module: nn.Module, x: Tensor, A: Tensor) -> Tensor:
        """A x."""
        raise NotImplementedError

    def up(self, output: Tensor, low: Tensor, B: Tensor, owned: bool) -> Tensor:
        """output + s B low."""
        raise NotImplementedError

    def bare(self, module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        """W x, without bias."""
        raise NotImplementedError

    def channels(self, v: Tensor) -> Tensor:
        """(out,) so that it broadcasts over the output."""
        return v

    # ---- the method ---------------------------------------------------------------------------------

    def factors(self) -> tuple[Tensor, Tensor]:
        """(rank, in) and (out, rank) whose product changes the weight, the start taken off it."""
        A, B = self.A.flatten(1), self.B.flatten(1)
        if self.A_start is None or self.B_start is None:
            return A, B
        return torch.cat([A, self.A_start.flatten(1)]), torch.cat([B, -self.B_start.flatten(1)], dim=1)

    def norm(self, weight: Tensor) -> Tensor:
        """(out,) row norms of W + s B A, without ever making B A."""
        W, A, B = self.matrix(weight), *(in_sum_precision(t) for t in self.factors())
        with torch.autocast(weight.device.type, enabled=False):
            cross = ((W @ A.t()) * B).sum(1)
            square = ((B @ (A @ A.t())) * B).sum(1)
            total = W.square().sum(1) + 2 * self.scale * cross + self.scale**2 * square
            return total.clamp_min(0).sqrt()

    def gain(self, weight: Tensor) -> Tensor:
        """(out,) DoRA's m / |W + s B A|; the norm counts as a constant (section 4.3)."""
        assert self.magnitude is not None
        with torch.no_grad():
            norm = self.norm(in_sum_precision(weight)).to(self.magnitude.dtype)
            norm.clamp_min_(torch.finfo(norm.dtype).tiny)  # a row of zeros has magnitude 0 too: 0, not NaN
        return self.magnitude.flatten() / norm

    def after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        """Add the update to the module's output."""
        x = hidden_of(args, kwargs)
        drops = self.dropout and self.training and x.is_floating_point()
        dropped = F.dropout(x, self.dropout) if drops else x
        low, B = self.down(module, dropped, self.A.to(output.dtype)), self.B.to(output.dtype)
        gain: Tensor | None = None
        if self.magnitude is not None:
            weight = weight_of(module)
            gain = self.gain(weight)
            if drops or not self.is_first(module):
                bare = self.bare(module, dropped, weight.to(output.dtype))
                output = output + (self.channels(gain.to(output.dtype)) - 1) * bare
            else:
                output = self.scaled(module, output, self.channels(gain.to(output.dtype)))
            B = _by_row(B, gain)
        if self.A_start is not None:
            return self.with_biases(output + self.moved(module, (x, dropped), low, B, gain, output))
        # What DoRA made is new; a linear module's output is, if no other hook has seen it.
        return self.with_biases(self.up(output, low, B, self.magnitude is not None or self.owns(module)))

    def moved(
        self,
        module: nn.Module,
        inputs: tuple[Tensor, Tensor],
        low: Tensor,
        B: Tensor,
        gain: Tensor | None,
        output: Tensor,
    ) -> Tensor:
        """s (B A - B0 A0) x, exactly 0 while the factors are where they started.

        B0 A0 is a part of the weight, so no dropout acts on its input; DoRA's gain acts on both as on it.
        """
        assert self.A_start is not None
        assert self.B_start is not None
        nothing, (x, dropped) = torch.zeros_like(output), inputs
        A0, B0 = self.A_start.to(output.dtype), self.B_start.to(output.dtype)
        change = self.up(nothing, low, B, False)
        if gain is None:
            return change - self.up(nothing, self.down(module, x, A0), B0, False)
        change = change - self.up(nothing, self.down(module, dropped, A0), _by_row(B0, gain), False)
        if dropped is not x:
            more = self.down(module, x, A0) - self.down(module, dropped, A0)
            change = change - self.up(nothing, more, B0, False)
        return change

    def with_biases(self, output: Tensor) -> Tensor:
        """The output with what is added to the bias."""
        if self.B_bias is not None:
            output = output + self.channels(self.B_bias.to(output.dtype) * self.scale)
        return output if self.bias is None else output + self.channels(self.bias.to(output.dtype))

    @property
    def adds(self) -> bool:
        """Whether all it does is add: DoRA too changes the base's share of the output alone."""
        return True

    def is_first(self, module: nn.Module) -> bool:
        """Whether the output is still the module's own, W x + b."""
        container = attached(module)
        if container is None:
            return True
        parts = container.parts.values()
        earlier = itertools.takewhile(lambda part: part is not self, parts)
        changed = any(p.active and p.overrides("after") for p in earlier)
        inside = any(p.active and p.overrides("around") for p in parts)  # whenever they were attached
        return not (container.originals or changed or inside)

    def scaled(self, module: nn.Module, output: Tensor, gain: Tensor) -> Tensor:
        """gain W x + b from W x + b."""
        bias = bias_of(module)
        return (
            output * gain
            if bias is None
            else output * gain + self.channels(bias.to(output.dtype)) * (1 - gain)
        )

    def fold(self, module: nn.Module, now: Weights, base: Weights) -> Weights:
        """W + s B A, or DoRA's m (W + s B A) / |W + s B A|; a change of the base, whatever else is there."""
        W, bias = self.matrix(now.weight), now.bias
        A, B = (t.to(W.dtype) for t in self.factors())
        delta = self.scale * (B @ A)
        if self.magnitude is not None:
            own = self.matrix(base.weight)
            W, delta = W - own, self.gain(base.weight).to(W.dtype)[:, None] * (own + delta)
        if self.B_bias is not None:
            bias = (0 if bias is None else bias) + self.scale * self.B_bias.to(W.dtype)
        if self.bias is not None:
            bias = (0 if bias is None else bias) + self.bias.to(W.dtype)
        return Weights(self.unmatrix(W + delta, now.weight), bias)

    def unmatrix(self, matrix: Tensor, weight: Tensor) -> Tensor:
        """(out, in) in the weight's own shape."""
        return matrix.view(weight.shape)

    def change_sq(self) -> Tensor | None:
        """|s B A|^2; DoRA's change is had from the weight alone."""
        return None if self.magnitude is not None else product_sq(*self.factors(), self.scale)

    def suffixes(self) -> dict[str, str]:
        """PEFT's keys."""
        return {
            "A": "lora_A.weight",
            "B": "lora_B.weight",
            "A_start": "lora_A.start",
            "B_start": "lora_B.start",
            "B_bias": "lora_B.bias",
            "magnitude": "lora_magnitude_vector",
            "bias": "lora_bias_delta",
        }

    def note(self) -> str:
        """Rank and scale."""
        return f"rank {self.rank}, scale {self.scale:.4g}"


class LinearLoRA(LowRank):
    """On nn.Linear, and on transformers' Conv1D, whose weight is (in, out)."""

    def __init__(self, lora: Options, module: nn.Module, path: str) -> None:
        into, out = features(module)
        super().__init__(lora, path, out, into)
        self.transposed = is_transposed(module)
        A, B = new_tensor(module, self.rank, into), new_tensor(module, out, self.rank)
        self.finish(lora, module, path, A, B)

    def matrix(self, weight: Tensor) -> Tensor:
        """A weight as (out, in)."""
        return weight.t() if self.transposed else weight

    def unmatrix(self, matrix: Tensor, weight: Tensor) -> Tensor:
        """(out, in) in the weight's own shape."""
        return self.matrix(matrix)

    def down(self, module: nn.Module, x: Tensor, A: Tensor) -> Tensor:
        """A x."""
        return F.linear(x, A)

    def up(self, output: Tensor, low: Tensor, B: Tensor, owned: bool) -> Tensor:
        """output + s B low, in one pass over the output."""
        return add_product(output, low, B, self.scale, owned=owned)

    def bare(self, module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        """W x."""
        return F.linear(x, self.matrix(weight))


class ConvLoRA(LowRank):
    """On convolutions: A is one of the same geometry to rank channels, B is 1 x 1."""

    def __init__(self, lora: Options, module: Any, path: str) -> None:
        out, kernel = module.out_channels, module.kernel_size
        super().__init__(lora, path, out, module.in_channels * math.prod(kernel))
        if self.rank % module.groups or (lora.dora and module.groups > 1):
            why = "DoRA has no norm for it" if lora.dora else f"LoRA's rank={self.rank} must be a multiple"
            raise TargetError(f"attach: {path!r} is a convolution with groups={module.groups}; {why}.")
        self.groups = module.groups
        if is_of_weight(lora.init) and module.groups > 1:
            raise TargetError(
                f"attach: {path!r} is a convolution with groups={module.groups}, whose weight has no part "
                f"for LoRA's init={lora.init!r}. Leave it out, or use init='kaiming'."
            )
        A = new_tensor(module, self.rank, module.in_channels, *kernel)
        B = new_tensor(module, out, self.rank // self.groups, *(1 for _ in kernel))
        self.finish(lora, module, path, A, B)

    def matrix(self, weight: Tensor) -> Tensor:
        """A weight as (out, in * kernel)."""
        return weight.flatten(1)

    def channels(self, v: Tensor) -> Tensor:
        """(out,) as (out, 1, 1)."""
        return v.view(-1, *(1 for _ in self.A.shape[2:]))

    def down(self, module: nn.Module, x: Tensor, A: Tensor) -> Tensor:
        """A * x, with the module's stride, padding and dilation."""
        return conv_like(module, x, A, groups=1)

    def up(self, output: Tensor, low: Tensor, B: Tensor, owned: bool) -> Tensor:
        """output + s B low."""
        conv = (F.conv1d, F.conv2d, F.conv3d)[B.ndim - 3]
        return output + conv(low, B * self.scale, groups=self.groups)

    def bare(self, module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        """W * x."""
        return conv_like(module, x, weight, groups=self.groups)

    def change_sq(self) -> Tensor | None:
        """As LowRank; a grouped convolution has no weight for it."""
        return None if self.groups > 1 else super().change_sq()

    def fold(self, module: nn.Module, now: Weights, base: Weights) -> Weights:
        """As LowRank; a grouped convolution has no weight for an update across its groups."""
        if self.groups > 1:
            raise MergeError(
                f"merge: LoRA on a convolution with groups={self.groups} mixes channels of different "
                "groups, for which its weight has no place. Keep it attached."
            )
        return super().fold(module, now, base)


class EmbeddingLoRA(LinearLoRA):
    """On nn.Embedding, whose weight (V, d) is the transpose of a linear one of V inputs."""

    def __init__(self, lora: Options, module: nn.Embedding, path: str) -> None:
        if lora.lora_bias:
            raise TargetError(f"attach: LoRA's lora_bias=True is not for embeddings, and {path!r} is one.")
        super().__init__(lora, module, path)
        self.padding_idx = module.padding_idx

    def starts(self, lora: Options, module: nn.Module, path: str, A: Tensor, B: Tensor) -> bool:
        """PEFT's start, whatever the others': the other factor is the random one."""
        begin("kaiming", A, B, self.scale, path, lambda: A)  # drawn before, too
        A.zero_()
        B.normal_()
        return False

    def down(self, module: nn.Module, x: Tensor, A: Tensor) -> Tensor:
        """Columns of A."""
        return rows(module, x, A.t(), self.padding_idx)

    def bare(self, module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        """Rows of W."""
        return rows(module, x, weight, self.padding_idx)

    def up(self, output: Tensor, low: Tensor, B: Tensor, owned: bool) -> Tensor:
        """output + s B low, in the output's precision also under autocast, which leaves embeddings alone."""
        return output + self.scale * (low @ B.t()).to(output.dtype)

    def suffixes(self) -> dict[str, str]:
        """PEFT's keys, which are others for embeddings."""
        return {**super().suffixes(), "A": "lora_embedding_A", "B": "lora_embedding_B"}


def _by_row(B: Tensor, gain: Tensor) -> Tensor:
    """Each row of B times its output's gain."""
    return (B.flatten(1) * gain.to(B.dtype)[:, None]).view_as(B)
