"""LoRA: a trainable low-rank update beside each served weight; rank-stabilised, weight-decomposed (DoRA).

Source: LoRA, arXiv 2106.09685, section 4.1; rsLoRA, arXiv 2312.03732; DoRA, arXiv 2402.09353, equation 5.
The formulas are those of PEFT 0.21, whose files it reads and writes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from torch import nn

from optx._errors import OptxError, TargetError, check_range, warn
from optx._module_paths import bare_path
from optx.inject._embeddings import peculiar
from optx.inject._experts import ParameterLoRA
from optx.inject._file_patterns import full_match
from optx.inject._injection import Injection, Site
from optx.inject._low_rank import ConvLoRA, EmbeddingLoRA, LinearLoRA
from optx.inject._low_rank_start import check_init, is_of_weight
from optx.inject._own_call import adds_bias
from optx.inject._parameters import parameter_paths
from optx.inject._part import RESERVED, Part
from optx.inject._weights import is_conv, is_linear
from optx.inject.bitfit import BitFit


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

    Evidence: ``optx run adapt``, ``optx run qlora``, ``optx run sara``, ``optx run meta``; ``test_lora.py``,
    ``test_lora_start.py``, ``test_peft_io.py``, ``test_peft_read.py``, ``test_experts_peft.py``.

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
