"""LoRA: a trainable low-rank update beside each served weight; rank-stabilised, weight-decomposed (DoRA).

Source: LoRA, arXiv 2106.09685, section 4.1; rsLoRA, arXiv 2312.03732; DoRA, arXiv 2402.09353, equation 5.
The formulas are those of PEFT 0.21, whose files it reads and writes.
"""

# A, B and W are the papers' letters.
# pyright: reportConstantRedefinition=false

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optx._errors import MergeError, OptxError, TargetError, check_range, warn
from optx.inject._computes import bias_of, weight_now, weight_of
from optx.inject._embeddings import peculiar, rows
from optx.inject._experts import ParameterLoRA
from optx.inject._file_patterns import full_match
from optx.inject._injection import Injection, Site
from optx.inject._low_rank_start import begin, check_init, is_of_weight
from optx.inject._module_paths import bare_path
from optx.inject._own_call import adds_bias
from optx.inject._parameters import parameter_paths
from optx.inject._part import RESERVED, Part, Weights, attached, hidden_of, new_tensor
from optx.inject._weights import (
    add_product,
    conv_like,
    features,
    in_sum_precision,
    is_conv,
    is_linear,
    is_transposed,
)
from optx.inject.bitfit import BitFit


class LowRank(Part):
    """y + s B A x, for a weight seen as a matrix W of (out, in): shared by linear, conv and embedding.

    A: (rank, in), B: (out, rank), in the shapes that PEFT's files have.
    """

    def __init__(self, lora: LoRA, path: str, out: int, into: int) -> None:
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

    def finish(self, lora: LoRA, module: nn.Module, path: str, A: Tensor, B: Tensor) -> None:
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

    def starts(self, lora: LoRA, module: nn.Module, path: str, A: Tensor, B: Tensor) -> bool:
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

    def __init__(self, lora: LoRA, module: nn.Module, path: str) -> None:
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

    def __init__(self, lora: LoRA, module: Any, path: str) -> None:
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

    def __init__(self, lora: LoRA, module: nn.Embedding, path: str) -> None:
        if lora.lora_bias:
            raise TargetError(f"attach: LoRA's lora_bias=True is not for embeddings, and {path!r} is one.")
        super().__init__(lora, module, path)
        self.padding_idx = module.padding_idx

    def starts(self, lora: LoRA, module: nn.Module, path: str, A: Tensor, B: Tensor) -> bool:
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


@dataclass(frozen=True)
class LoRA(Injection):
    """Low-rank adaptation: y = W x + scale B A x, with A and B trained and W left alone.

    Args:
        rank: r, of A (rank, in) and B (out, rank).
        alpha: scale = alpha / rank.
        dropout: on the update's input, while training.
        rslora: scale = alpha / sqrt(rank).
        dora: weight-decomposed: a trained magnitude per output times the direction of W + scale B A.
        bias: ``"none"``; ``"lora_only"`` trains the served modules' biases too; ``"all"`` every bias of the
            model. What is trained is the difference to the bias, so that removal is exact.
        lora_bias: a bias on B.
        rank_pattern: other ranks, by regex over the ends of module names; the first that matches counts.
        alpha_pattern: other alphas, likewise.
        init: where A and B start. ``"kaiming"``: A is uniform and B zero (LoRA's own); ``"gaussian"``: A is
            normal with deviation 1 / rank. ``"pissa"``: the weight's largest singular values and vectors;
            ``"pissa_niter_16"``: by 16 iterations of a randomised SVD, for large weights; ``"olora"``: the
            first rows and columns of its QR decomposition. These three are a part of the weight, which is
            left alone: the start is kept beside A and B and taken off their product, so the model's output
            is the same to the bit, as with the others. It is written to files as a LoRA of twice the rank,
            which PEFT reads. Embeddings start as ever, as in PEFT.

    Serves nn.Linear, transformers' Conv1D, nn.Conv1d/2d/3d and nn.Embedding. By default: query and value
    projections (LoRA, section 4.2). Half-precision weights get float32 adapters, computed in the
    activations' dtype.

    Experts that are one 3-D parameter (transformers 5) get an A and a B each: name the parameters
    (``["experts.gate_up_proj", "experts.down_proj"]``, or a regex over ``module.parameter``) or their module
    (``["experts"]``), which is all of them; patterns match the parameter's path. In PEFT's files these are
    ``target_parameters``. Routers (``["gate"]``) are served too. Neither takes dropout, dora or lora_bias.

    QLoRA is this on a model that was loaded in codes (bitsandbytes' 4 and 8 bits, torchao): A and B are
    float32, the codes stay. ``handle.merge()`` rounds to codes again, and ``handle.rounding`` says by module
    what that cost.

    A folder that PEFT saved after a PiSSA or OLoRA start is attached to the base as it was before PEFT: the
    start is made again from its weights, which therefore must be those of the training.

    Paper values:
        ``rank=8, alpha=16``: RoBERTa-base on MNLI, queries and values, lr 5e-4, weight decay 0.1, 30 epochs
            (authors' script) (the defaults).
        ``rank=4, alpha=32, dropout=0.1``: GPT-2 Medium on E2E, lr 2e-4, label smoothing 0.1, 5 epochs
            (authors' README).
        ``rank=16, alpha=32, dropout=0.1``: BART-large on XSum, in arXiv 2110.04366 (authors' script).
        ``rslora=True``: for large ranks; the paper recommends a scale, not a rank.
        ``dora=True, rank=32, alpha=64``: Llama 2 7B on common sense, queries, keys, values, up and down
            projections, lr 2e-4, 3 epochs; Llama 3 8B: 1e-4 (authors' README).
        ``init="pissa", rank=128, alpha=128``: Llama 2 7B on MetaMathQA, all linear modules of a block, lr
            2e-5, batches of 128, 1 epoch (PiSSA, authors' script).
        ``handle.param_groups(lr=1e-4, ratio=16)``: LoRA+, B's rate 16 times A's (arXiv 2402.12354; the ratio
            that trainers recommend).

    Limits: DoRA is computed from the whole weight at every call, so it takes longer than LoRA. Tied weights
    are merged only with ``untie=True``. PiSSA and OLoRA keep their start, as many numbers as A and B, and are
    not for experts. Under ``torch.compile``, and with implementations of experts other than transformers'
    eager, batched_mm and grouped_mm, W + s B A of a layer's experts is made at every call, as in PEFT; else
    the factors act on the tokens that go to an expert.

    Keywords: rsLoRA, DoRA, PiSSA, OLoRA, LoRA+, QLoRA, PEFT, low rank, memory, parameter-efficient
    fine-tuning, mixture of experts, MoE, Mixtral, quantised, quantized, 4-bit, bitsandbytes, torchao.

    Evidence: ``optx run adapt``, ``optx run qlora``; ``test_lora.py``, ``test_lora_start.py``,
    ``test_peft_io.py``, ``test_peft_read.py``, ``test_experts_peft.py``.

    Raises:
        OptxError: an option out of range.
        TargetError: at attach, a rank larger than the weight.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16))
        >>> handle = optx.attach(model, optx.LoRA(rank=4, alpha=8), targets="0")
        >>> model[0].optx.lora.scale
        2.0

    Source: arXiv 2106.09685, section 4.1; arXiv 2312.03732; arXiv 2402.09353, equation 5; PiSSA, arXiv
    2404.02948, section 3; OLoRA, arXiv 2406.01775, section 3.
    """

    name: ClassVar[str] = "lora"
    role: ClassVar[str] = "query_value"
    serves: ClassVar[str] = "Linear, Conv1D, Conv1d/2d/3d or Embedding modules"
    serves_parameters: ClassVar[bool] = True

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    bias: Literal["none", "lora_only", "all"] = "none"
    lora_bias: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict[str, int])
    alpha_pattern: Mapping[str, float] = field(default_factory=dict[str, float])
    init: str = "kaiming"

    def __post_init__(self) -> None:
        check_init(self.init)
        check_range("LoRA", "dropout", self.dropout, 0, 1)
        for name, rank in {"rank": self.rank, **_entries("rank_pattern", self.rank_pattern)}.items():
            check_range("LoRA", name, rank, 1)
            if rank % 1:
                raise OptxError(f"LoRA: {name} is {rank!r}; it must be a whole number.")
        for name, alpha in {"alpha": self.alpha, **_entries("alpha_pattern", self.alpha_pattern)}.items():
            check_range("LoRA", name, alpha, 0)
        if self.bias not in ("none", "lora_only", "all"):
            raise OptxError(f"LoRA: bias is {self.bias!r}; it must be 'none', 'lora_only' or 'all'.")
        if self.dora and self.lora_bias:
            raise OptxError("LoRA: dora=True and lora_bias=True don't go together. Choose one.")

    @property
    def needs_weight(self) -> bool:
        """DoRA takes the norm of its rows, PiSSA and OLoRA start from its factors."""
        return self.dora or is_of_weight(self.init)

    def rank_at(self, path: str) -> int:
        """The rank of one module."""
        return self.rank_pattern.get(_pattern_of(self.rank_pattern, path) or "", self.rank)

    def checked_rank(self, path: str, out: int, into: int) -> int:
        """The rank of one (out, in) matrix; raises if it is above the matrix's and no pattern names it."""
        rank = self.rank_at(path)
        if rank > min(out, into) and _pattern_of(self.rank_pattern, path) is None:
            raise TargetError(
                f"attach: LoRA's rank={rank} is larger than the weight of {path!r}, ({out}, {into}). "
                f"Use at most {min(out, into)}, or a rank_pattern that names this module if you mean it."
            )
        return rank

    def alpha_at(self, path: str) -> float:
        """The alpha of one module."""
        return self.alpha_pattern.get(_pattern_of(self.alpha_pattern, path) or "", self.alpha)

    def scale_at(self, path: str, rank: int) -> float:
        """What one module's product is multiplied by: alpha over the rank, or over its root (rsLoRA)."""
        return self.alpha_at(path) / (math.sqrt(rank) if self.rslora else rank)

    def part(self, module: nn.Module, path: str) -> Part:
        """One module's A and B."""
        if is_linear(module):
            return LinearLoRA(self, module, path)
        if is_conv(module):
            return ConvLoRA(self, module, path)
        if isinstance(module, nn.Embedding) and not peculiar(module):
            return EmbeddingLoRA(self, module, path)
        raise TargetError(
            f"attach: LoRA serves {self.serves}; {path!r} is a {type(module).__name__}{peculiar(module)}."
        )

    def parts(self, sites: Sequence[Site]) -> list[Part]:
        """One per site; warns of patterns that name none of them."""
        paths = [path for site in sites for path in parameter_paths(site.path, site.parameters)]
        given: dict[str, Mapping[str, Any]]
        given = {"rank_pattern": self.rank_pattern, "alpha_pattern": self.alpha_pattern}
        for option, patterns in given.items():
            unused = [p for p in patterns if not any(_pattern_of({p: 0}, path) for path in paths)]
            if unused:
                warn(
                    f"LoRA: {option} has {', '.join(map(repr, unused))}, which matches none of the served "
                    "modules."
                )
        narrow = {
            f"^{re.escape(bare_path(path))}": self.rank_at(path)
            for site in sites
            if site.swept
            for path in parameter_paths(site.path, site.parameters)
        }
        lora = replace(
            self, rank_pattern={**self.rank_pattern, **narrow}
        )  # PEFT's rank, also on a gate of one row
        return [
            ParameterLoRA(lora, site.module, site.path, site.parameters)
            if site.parameters
            else lora.part(site.module, site.path)
            for site in sites
        ]

    def companions(self, model: nn.Module, sites: Sequence[Site]) -> list[tuple[Injection, list[Site]]]:
        """``bias="all"``: the biases of modules that have no update of their own."""
        if self.bias != "all":
            return []
        own = {site.path for site in sites}
        biased = [
            Site(path, module)
            for path, module in model.named_modules()
            if adds_bias(module) and path not in own and RESERVED not in path.split(".")
        ]
        return [(BitFit(), biased)]


def _by_row(B: Tensor, gain: Tensor) -> Tensor:
    """Each row of B times its output's gain."""
    return (B.flatten(1) * gain.to(B.dtype)[:, None]).view_as(B)


def _entries(option: str, patterns: Mapping[str, float]) -> dict[str, float]:
    """The entries of a pattern option, named for messages; raises if one is not a regex."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise OptxError(f"LoRA: {option} has {pattern!r}, not a regular expression ({error}).") from None
    return {f"{option}[{pattern!r}]": value for pattern, value in patterns.items()}


def _pattern_of(patterns: Mapping[str, Any], path: str) -> str | None:
    """PEFT's rule: the first key that matches the end of the path."""
    bare = bare_path(path)
    return next((key for key in patterns if full_match(rf"(.*\.)?({key})", bare, "LoRA: a pattern")), None)
