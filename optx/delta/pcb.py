"""PCB-Merging: each entry of each model competes for its place by importance and agreement.

Source: Parameter Competition Balancing for Model Merging, arXiv 2410.02396, and the authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations_with_replacement
from typing import Literal

import torch
from torch import Tensor

from optx._errors import check_choice, check_range
from optx.delta._combine import steady_rows, total
from optx.delta._merge_method import ByPieces, Changes, Combine, MergeMethod, OfPiece
from optx.delta._options import SCOPES, PerModel, Scope, per_model
from optx.delta._order_statistics import order_statistics

Range = tuple[float, float]
Scores = Callable[[Sequence[Tensor]], list[Tensor]]
Weigh = Callable[[Sequence[Tensor]], tuple[list[Tensor], list[Tensor]]]
"""From the changes of one tensor, one per model: the weights of their entries, and what is averaged."""


@dataclass(frozen=True)
class PCB(MergeMethod):
    """Average changes entry by entry, weighted by a score: importance in its model times agreement.

    base + lam * sum of s_i c_i / sum of s_i, with s_i the scores and c_i the changes, their
    outliers clamped.

    Scores below the top ``ratio`` count as 0. An entry that one model alone keeps has that model's change in
    full: it is averaged only where several are kept.

    Args:
        ratio: share of each model's entries that score, in (0, 1]; the paper's are 0.05 to 0.2.
        lam: scale of the merged change, or one for each model; the paper tunes 0.8 to 2.2.
        score: ``"code"``, the authors' code, which made the published numbers; or ``"paper"``, the
            equations, with softmaxes over the whole model.
        inter: how the code form measures agreement: with the sum of the changes (``"sum"``), with the sum of
            their signed normalised sizes (``"normsum"``), or with each model in turn (``"pairwise"``, nearest
            to the paper).
        clip: share of the smallest and of the largest magnitudes that the code form clamps; 0.01 in the
            authors' vision scripts.
        scope: ``"global"`` ranks entries over the whole model, as the paper does (four passes over the
            files); ``"tensor"`` within each tensor, which gives another result.

    Paper values:
        ``ratio=0.1, lam=1.0``: where there is no validation data (the defaults).
        ``ratio=0.05, lam=1.2, clip=0.01``: CLIP ViT on eight tasks (authors' scripts).
        ``ratio=0.05`` to ``ratio=0.2``, ``lam=0.8`` to ``lam=2.2``: searched for T5-base; T5-large lam 1.5 to
            2.2.
        ``ratio=0.2, lam=1.0``: (IA)³ (authors' scripts).

    Limits: Its sums over the whole model take four passes over the files. On tasks that contradict each other
    much, plain task arithmetic may do better.

    Keywords: PCB-Merging, merging, parameter competition, interference.

    Evidence: ``optx run merge``; ``test_pcb.py``.

    Raises:
        OptxError: an option out of range; at merge, another number of ``lam`` than of models.

    Example:
        >>> import torch, optx
        >>> base = {"w": torch.zeros(6)}
        >>> models = [{"w": torch.tensor([3.0, 2.0, 0.1, 0.2, 0.1, 0.3])},
        ...           {"w": torch.tensor([0.1, 2.0, 0.2, 0.1, 3.0, -0.3])}]
        >>> optx.merge(base, models, optx.PCB(ratio=0.5, clip=0.0))["w"]
        tensor([3., 2., 0., 0., 3., 0.])

    Source: arXiv 2410.02396, section 3.2.
    """

    ratio: float = 0.1
    lam: PerModel = 1.0
    score: Literal["code", "paper"] = "code"
    inter: Literal["sum", "normsum", "pairwise"] = "sum"
    clip: float = 1e-4
    scope: Scope = "global"

    def __post_init__(self) -> None:
        check_range("PCB", "ratio", self.ratio, 1e-12, 1)
        check_range("PCB", "clip", self.clip, 0, 0.49)
        check_choice("PCB", "score", self.score, ("code", "paper"))
        check_choice("PCB", "inter", self.inter, ("sum", "normsum", "pairwise"))
        check_choice("PCB", "scope", self.scope, SCOPES)

    @property
    def passes(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Two for the scores' constants, two for the threshold."""
        return 4 if self.scope == "global" else 0

    def prepare(self, changes: Changes) -> Combine:
        """Find the constants of the scores and what each model's must exceed."""
        lams = per_model("PCB", "lam", self.lam, changes.models)
        prepared = _code_form if self.score == "code" else _paper_form
        weigh = prepared(self, changes) if self.scope == "global" else None

        def of(name: str) -> OfPiece:
            now = weigh or prepared(self, changes.only(name))

            def piece(tensors: Sequence[Tensor], _begin: int) -> Tensor:
                weights, values = now(tensors)
                mass = total(weights).clamp_(min=1e-12)
                merged = torch.zeros_like(mass)
                for weight, value, lam in zip(weights, values, lams, strict=True):
                    merged.addcmul_(weight, value, value=lam)
                return merged.div_(mass)

            return piece

        return ByPieces(of)


# ---- the authors' code -------------------------------------------------------------------------------


def _code_form(pcb: PCB, changes: Changes) -> Weigh:
    n = changes.numel
    if not n:
        return lambda tensors: (list(tensors), list(tensors))
    last = n - 1
    low, high = int(n * pcb.clip), min(max(int(n * (1 - pcb.clip) - 1), 0), last)
    ranges = _ranges(changes, lambda ts: [t.abs() for t in ts], low, high)
    scores = partial(_code_scores, pcb=pcb, ranges=ranges)
    # Everything at or below this place counts 0, so one entry fewer than ratio * n is left.
    floor = min(int(n * (1 - pcb.ratio)), last)
    bounds = _ranges(changes, scores, floor, last)

    def weigh(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        weights = [_unit(score, bound) for score, bound in zip(scores(tensors), bounds, strict=True)]
        clamped = [t.sign().mul_(t.abs().clamp_(*r)) for t, r in zip(tensors, ranges, strict=True)]
        return weights, clamped

    return weigh


def _code_scores(tensors: Sequence[Tensor], pcb: PCB, ranges: Sequence[Range]) -> list[Tensor]:
    """exp(n a^2) tanh(agreement), with a the magnitude from 0 to 1; negative where a model disagrees."""
    sizes = [_unit(t.abs(), r) for t, r in zip(tensors, ranges, strict=True)]
    if pcb.inter == "sum":
        whole = total(tensors)
        agreement = [torch.tanh(t * whole) for t in tensors]
    else:
        signed = [size * t.sign() for size, t in zip(sizes, tensors, strict=True)]
        if pcb.inter == "normsum":
            whole = total(signed)
            agreement = [torch.tanh(t * whole) for t in tensors]
        else:
            agreement = [total([torch.tanh(z * other) for other in signed]) for z in signed]
    models = len(tensors)
    return [a.mul_(s.square_().mul_(models).exp_()) for a, s in zip(agreement, sizes, strict=True)]


def _ranges(changes: Changes, of: Scores, low: int, high: int) -> list[Range]:
    """For each model, the numbers at two places of its sorted row."""
    found = order_statistics(
        lambda: (of(ts) for _, _, ts in changes.pieces()), [[low, high]] * changes.models, changes.numel
    )
    return [(a, b) for a, b in found]


def _unit(tensor: Tensor, bounds: Range) -> Tensor:
    """From 0 at the lower bound to 1 at the upper, clamped; 0 if they are the same."""
    low, high = bounds
    if not high > low:
        return torch.zeros_like(tensor)
    return ((tensor - low) / (high - low)).clamp_(0, 1)


# ---- the paper's equations ---------------------------------------------------------------------------


def _paper_form(pcb: PCB, changes: Changes) -> Weigh:
    n, models = changes.numel, changes.models
    if not n:
        return lambda tensors: (list(tensors), list(tensors))
    pairs = list(combinations_with_replacement(range(models), 2))
    bounds = dict.fromkeys(pairs, (math.inf, -math.inf))
    for _, _, tensors in changes.pieces():
        for i, j in pairs:
            least, most = (tensors[i] * tensors[j]).aminmax()
            bounds[i, j] = min(bounds[i, j][0], float(least)), max(bounds[i, j][1], float(most))

    def raised(tensors: Sequence[Tensor], i: int, j: int, times: int = 1) -> Tensor:
        """The numerator of a softmax over the model."""
        pair = (i, j) if i <= j else (j, i)
        return _unit(tensors[i] * tensors[j], bounds[pair]).mul_(times).exp_()

    rows = {
        (i, j, times): dict[str, list[float]]() for i, j in pairs for times in {1, models if i == j else 1}
    }
    for name, _, tensors in changes.pieces():
        for key, by_name in rows.items():
            by_name.setdefault(name, []).extend(steady_rows(raised(tensors, *key)))
    # Means, not sums: a softmax of n numbers is of the size 1/n, and its square small for a float32.
    mean = {key: math.fsum(map(math.fsum, by_name.values())) / n for key, by_name in rows.items()}

    def scores(tensors: Sequence[Tensor]) -> list[Tensor]:
        found: list[Tensor] = []
        for i in range(models):
            agreement = [raised(tensors, i, j).div_(mean[min(i, j), max(i, j), 1]) for j in range(models)]
            found.append(total(agreement).mul_(raised(tensors, i, i, models)).div_(mean[i, i, models]))
        return found

    place = n - max(1, int(n * pcb.ratio))
    bars = [bar for bar, _ in _ranges(changes, scores, place, place)]

    def weigh(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        kept = [torch.where(s.float() >= bar, s, 0.0) for s, bar in zip(scores(tensors), bars, strict=True)]
        return kept, list(tensors)

    return weigh
