"""Task arithmetic: the weighted sum of what several fine-tunings changed.

Source: Editing Models with Task Arithmetic, arXiv 2212.04089.
"""

from __future__ import annotations

from dataclasses import dataclass

from optx.delta._entrywise import Entrywise
from optx.delta._kept import Kept
from optx.delta._merge_method import ByPieces, Changes, Combine, MergeMethod
from optx.delta._options import PerModel, per_model


@dataclass(frozen=True)
class TaskArithmetic(MergeMethod):
    """Add up what the models changed: base + lam * sum of w_i (model_i - base).

    Args:
        lam: scale of the sum. For several tasks, the paper tunes it on validation data; 0.3 to 0.4 is
            typical of eight (see `optx.search`).
        weights: one number for each model, or one for all.
        normalize: divide by the sum of the weights: with equal weights and ``lam=1``, the plain average.

    Paper values:
        ``lam=0.3``: CLIP ViT-B/32 on eight tasks; ``lam=0.1`` to ``lam=1.0`` are searched (authors' code).
        ``lam=0.8``: CLIP ViT-L/14, MNIST and RESISC45 added (authors' README).
        ``lam=-0.5``: a task forgotten: CLIP ViT-L/14, MNIST (authors' README).

    Limits: Changes that contradict each other cancel; nothing is done about it (see `optx.TIES`, `optx.PCB`).

    Keywords: task vectors, model soup, averaging, merging, unlearning.

    Evidence: ``optx run merge``; ``test_merge.py``, ``test_merge_peers.py``.

    Raises:
        OptxError: at merge, another number of weights than of models.

    Example:
        >>> import torch, optx
        >>> base = {"w": torch.zeros(2)}
        >>> models = [{"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([1.0, 2.0])}]
        >>> optx.merge(base, models, optx.TaskArithmetic(lam=0.5))["w"]
        tensor([1., 1.])

    Source: arXiv 2212.04089, section 2.
    """

    lam: float = 1.0
    weights: PerModel = 1.0
    normalize: bool = False

    def prepare(self, changes: Changes) -> Combine:
        """The weighted sum; needs to know nothing beforehand."""
        weights = per_model("TaskArithmetic", "weights", self.weights, changes.models)
        merged = Entrywise([Kept()] * changes.models, weights, self.normalize, self.lam)
        return ByPieces(lambda _: merged)
