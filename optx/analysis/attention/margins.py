"""How far a trained head has come on the way to a support vector machine.

Source: arXiv 2308.16898; that its measures are taken of heads of whole models is ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optx._errors import OptxError, check_whole
from optx.analysis.attention._algebra import length, span
from optx.analysis.attention._capture import attention_module, captured
from optx.analysis.attention._head import Head, head_of, spectrum
from optx.analysis.attention.svm import AttentionSVM, attention_svm, corr

F64 = torch.float64
SATURATED = 0.99


@dataclass(frozen=True, eq=False)
class AttentionMargins:
    """What `attention_margins` found of one head; tensors are float64, on the CPU.

    A *row* is a query whose softmax is over two tokens at least; its chosen token has the largest weight.

    Attributes:
        path: of the attention module.
        head: which of its heads.
        rows: how many.
        minimum: the least margin (x_chosen - x_t)ᵀ W z over all rows and their other tokens: how much larger
            the chosen token's score is, as softmax is given them. 0 where two tokens are equal.
        median: of the same.
        saturated: the share of rows whose largest softmax weight is above 0.99.
        corr: of W with the SVM's on the sample, exact; nan where the sample is infeasible. It can't be above
            ``reach``.
        corr_within: the same of what the sample can see of W: its part between the spans of the sample's
            differences and queries.
        reach: the norm of that part over W's.
        effective_rank: (sum of singular values)² over the sum of their squares, of W without the column of
            the bias: from 1 to the head's width.
        nuclear_ratio: W's nuclear norm over its Frobenius norm, the root of ``effective_rank``.
        duplicates: tokens of the sample equal to their row's chosen one, which were left out of the SVM.
        W: (d, e), or (d, e + 1) where queries have a bias: W_Kᵀ W_Q times the scale, and W_Kᵀ b_Q times it.
        X: the sample's tokens, a tensor (T_i, d) a row: those that its softmax is over.
        z: the sample's queries, (n, e), or (n, e + 1) with a last number of 1.
        chosen: (n,).
        svm: the SVM of the sample.
    """

    path: str
    head: int
    rows: int
    minimum: float
    median: float
    saturated: float
    corr: float
    corr_within: float
    reach: float
    effective_rank: float
    nuclear_ratio: float
    duplicates: int
    W: Tensor
    X: list[Tensor]
    z: Tensor
    chosen: Tensor
    svm: AttentionSVM

    def __str__(self) -> str:
        within = "infeasible" if not self.svm.feasible else f"{self.corr_within:.3f} ({self.corr:.3f} of all)"
        return (
            f"{self.path} head {self.head}: {self.rows} rows, margins {self.minimum:.3g} (least) and "
            f"{self.median:.3g} (median), {self.saturated:.1%} saturated; corr to the SVM of {len(self.z)} "
            f"rows {within}; effective rank {self.effective_rank:.1f}"
        )


def attention_margins(
    model: nn.Module, batch: Any, layer: int | str, head: int, *, sample: int = 16
) -> AttentionMargins:
    """Margins, saturation and the max-margin direction of one head of a trained model.

    The model is called once with the batch, in eval mode and without gradients, by temporary hooks; after it
    all is as before, also after an error. Of what softmax was given, scores are taken apart: with q = W_Q z +
    b_Q and k = W_K x + b_K, a score is s (xᵀ W_Kᵀ W_Q z + xᵀ W_Kᵀ b_Q) plus what all tokens of a row share,
    which softmax takes out (all of b_K). So a query's bias is one column more of W, for a last number 1 of z,
    and a key's bias is nothing; s is the module's scale, 1 / sqrt(head_dim) for most. Heads that share keys
    (grouped queries) have those of their group. Weights are found by comparing numbers, in whatever layout.

    Args:
        model: a transformers model with attn_implementation "sdpa", timm's, torch's, or one's own that
            calls scaled_dot_product_attention.
        batch: a mapping (passed as keyword arguments), a tuple or list (as positional ones), or a tensor.
            Rows that a 2-dimensional ``attention_mask`` in it calls padding don't count.
        layer: number of the attention module in the model's order, or its path.
        head: number of the (query) head.
        sample: how many rows the SVM is made of, evenly drawn from those there are; time grows with the
            cube of the tokens that turn out its support.

    Returns:
        The measures, and the sample to go on with: ``attention_svm(found.X, found.z, found.chosen, "nuc")``.

    Paper values:
        None of whole models: its claims are of one layer with a fixed head.

    Limits: Heads whose scores are x W z alone: with rotary positions (Llama, Qwen, Mistral) W differs from
    token to token of a row, so that no W has these margins, and it is refused; so are norms of queries and
    keys, and biases by position (T5, ALiBi). A correlation near 0 is no fault: few heads of real models are
    trained to saturation.

    Keywords: attention entropy, saturation, max-margin, token selection, diagnostics, implicit bias.

    Evidence: no recipe; ``test_attention_margins.py``.

    Raises:
        TargetError: no such layer or head; attention that can't be seen, or is no bilinear form.
        OptxError: no row has two tokens, or ``sample`` is below 1.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> found = optx.analysis.attention_margins(model, torch.randn(3, 5, 8), layer="self_attn", head=1)
        >>> found.rows, found.W.shape
        (15, torch.Size([8, 9]))

    Source: arXiv 2308.16898.
    """
    wanted = check_whole("attention_margins", "sample", sample, 1)
    path, module = attention_module(model, layer)
    found = head_of(captured(model, batch, path, module), head)
    seen = found.seen & _unpadded(batch, found)[..., None]
    usable = seen.sum(-1) > 1
    if not bool(usable.any()):
        raise OptxError(
            f"attention_margins: no query of {path!r} sees two tokens in this batch; there is nothing to "
            "choose."
        )
    scores = found.scores().masked_fill(~seen, -torch.inf)
    best = scores.amax(-1, keepdim=True)
    chosen = scores.argmax(-1)
    others = seen & usable[..., None]
    others = others.scatter(-1, chosen[..., None], False)
    margins = (best - scores)[others].cpu()
    largest = scores[usable].softmax(-1).amax(-1)
    sampled = _Sample.of(found, seen, usable, chosen, wanted)
    W = sampled.form(found)
    svm = attention_svm(sampled.X, sampled.z, sampled.chosen)
    S = spectrum(found)
    ratio = float(S.sum() / S.square().sum().sqrt()) if float(S.sum()) else 0.0
    within = _within(W, svm, sampled)
    return AttentionMargins(
        path=path,
        head=head,
        rows=int(usable.sum()),
        minimum=float(margins.min()),
        median=float(margins.median()),
        saturated=float((largest > SATURATED).double().mean()),
        corr=corr(W, svm.W),
        corr_within=corr(within, svm.W) if svm.feasible else math.nan,
        reach=length(within) / length(W) if length(W) else 0.0,
        effective_rank=ratio**2,
        nuclear_ratio=ratio,
        duplicates=sampled.duplicates,
        W=W,
        X=sampled.X,
        z=sampled.z,
        chosen=sampled.chosen,
        svm=svm,
    )


@dataclass(frozen=True, eq=False)
class _Sample:
    """Some rows: their tokens without copies of the chosen one, queries and choices."""

    X: list[Tensor]
    z: Tensor
    chosen: Tensor
    duplicates: int

    @classmethod
    def of(cls, head: Head, seen: Tensor, usable: Tensor, chosen: Tensor, count: int) -> _Sample:
        places = usable.nonzero()
        some = places[_evenly(len(places), count)]
        X, index, duplicates = list[Tensor](), list[int](), 0
        for b, t in some.tolist():  # pyright: ignore
            own = int(chosen[b, t])
            keep = seen[b, t] & (head.tokens[b] != head.tokens[b, own]).any(-1)
            keep[own] = True
            duplicates += int(seen[b, t].sum()) - int(keep.sum())
            X.append(head.tokens[b, keep].cpu())
            index.append(int(keep[:own].sum()))
        z = head.queries[some[:, 0], some[:, 1]].cpu()
        if head.biased:
            z = torch.cat([z, torch.ones(len(z), 1, dtype=F64)], 1)
        return cls(X, z, torch.tensor(index), duplicates)

    def form(self, head: Head) -> Tensor:
        """W, with the bias's column where queries have a 1 for it."""
        W = head.W if self.z.shape[1] == head.W.shape[1] else torch.cat([head.W, head.column[:, None]], 1)
        return W.cpu()


def _evenly(total: int, count: int) -> list[int]:
    """So many of the numbers below a total, the first and the last among them; or all."""
    if count >= total:
        return list(range(total))
    return [round(k * (total - 1) / max(count - 1, 1)) for k in range(count)]


def _within(W: Tensor, svm: AttentionSVM, sampled: _Sample) -> Tensor:
    """The part of W that has a part in the sample's margins, as far as their spans are not everything."""
    pairs = zip(svm.sequence, svm.token, strict=True)
    tokens = torch.stack([sampled.X[int(i)][sampled.chosen[i]] - sampled.X[int(i)][t] for i, t in pairs])
    left, right = span(tokens), span(sampled.z)
    return left @ (left.T @ W @ right) @ right.T


def _unpadded(batch: Any, head: Head) -> Tensor:
    """(B, T): queries that are no padding, as far as the batch says so."""
    given: Any = batch.get("attention_mask") if isinstance(batch, Mapping) else None  # pyright: ignore
    shape = head.queries.shape[:2]
    if isinstance(given, Tensor) and given.shape == shape:
        return given.to(head.queries.device) != 0
    return torch.ones(shape, dtype=torch.bool, device=head.queries.device)
