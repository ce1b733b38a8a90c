"""VQLogits: an output head that scores a few codes in the place of every token of a vocabulary.

Source: VQ-Logits, arXiv 2505.10202; ``token_bias`` is optx's.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from optx._errors import OptxError, TargetError, check_choice, check_whole, shown
from optx._module_paths import paths_of
from optx.inject import _code_map
from optx.inject._code_handle import VQHandle, others
from optx.inject._code_head import CodeHead
from optx.inject._computes import bias_of, weight_now
from optx.inject._injection import Injection, Site
from optx.inject._low_rank_start import from_file
from optx.inject._part import Part, new_tensor
from optx.inject._served import Served
from optx.inject._trained_whole import Saved


@dataclass(frozen=True)
class VQLogits(Injection):
    """Score K codes in the place of V tokens: a token's logit is its code's, logits = (h C^T)[M].

    C (K, d) is trained, M (V,) says which code a token has and stays (``handle.remap()`` gives each token the
    nearest code again). ``model(...)`` still gives all V logits. ``handle.loss(hidden, labels)`` is their
    cross-entropy without them, from (positions, K): ``with handle.hidden():`` the model gives ``hidden``.
    The head's own weight rests, and ``optx.wrap(optimizer, handle)`` exchanges the two in an optimizer that
    has it. ``handle.materialize()`` is a plain head with the weight C[M].

    Args:
        codes: K. None: a twentieth of V. As many as V: the head as it is, in a codebook.
        init: how tokens are mapped. ``"kmeans"``: by scikit-learn's mini-batch k-means over the head's rows,
            so that only a trained head is worth it; ``"random"``: at random, equally many to a code;
            ``"blocks"``: by their numbers; ``"frequency"``: in blocks of like ``counts`` that occur equally
            often. C begins as the mean row of each code; with ``"random"`` as N(0, 0.02^2), as in the paper.
        token_bias: train a number for each token beside, added to its logit: V more numbers, with which
            tokens of one code are told apart by how frequent they are. It begins as the head's bias, else as
            the log of the token's share of its code by ``counts`` (plus one), else at 0.
        counts: how often each token occurs in what the model is for, (V,): for ``"frequency"``, for the start
            of ``token_bias``, and for what ``handle.report()`` says of the gap. Files don't hold them.
        used: how many of the head's rows are tokens, where the vocabulary is padded; the rest get logits of
            -inf. None: all.
        untie: serve a head whose weight is an embedding's too. The embedding keeps it, so that nothing is
            saved; without this that is an error.
        seed: of k-means and of what is random.

    Serves one nn.Linear. By default: what ``model.get_output_embeddings()`` gives, else the module called
    ``lm_head``. A bias of the head becomes one of each code (the mean), or with ``token_bias`` of each token.

    Paper values:
        ``codes``: about V / 100 for 99 % fewer numbers (the review read is unsure of more).
        ``init="kmeans"``: better than random (the default).

    Limits: All tokens of a code have the same chance, or with ``token_bias`` the same ratios in every
        context. Post hoc, with a head that was trained without it, perplexity rises several-fold until C is
        trained (recipe ``vocab``). The old weight stays in memory while this is attached: what is saved is
        time, gradients, optimizer state, and the file. ``handle.loss`` knows nothing of what a model does to
        its logits after the head (soft caps, scales) and refuses models whose config has that. Greedy
        decoding takes the lowest number of the best code's tokens. Merging needs a head with a bias where
        there is ``token_bias`` or ``used``: use ``materialize()``.

    Keywords: vocabulary, softmax, output layer, LM head, unembedding, compression, vector quantisation,
        k-means, codebook, large vocabulary, cross-entropy memory, tied embeddings.

    Evidence: ``optx run vocab``; ``test_vq_logits.py``, ``test_vq_logits_models.py``.

    Raises:
        OptxError: an option out of range, or counts that are missing.
        TargetError: at attach, several heads, no linear module, a weight that is tied, or more codes than
            tokens.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.Sequential(torch.nn.Embedding(50, 8), torch.nn.Linear(8, 50))
        >>> opt = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> handle = optx.attach(model, optx.VQLogits(codes=10), targets="1")
        >>> opt = optx.wrap(opt, handle)
        >>> [tuple(p.shape) for p in opt.param_groups[0]["params"]]
        [(50, 8), (10, 8), (10,)]
        >>> model(torch.tensor([3, 4])).shape
        torch.Size([2, 50])

    Source: arXiv 2505.10202.
    """

    name: ClassVar[str] = "vq_logits"
    role: ClassVar[str] = ""
    serves: ClassVar[str] = "a Linear output head"
    serves_one: ClassVar[str] = "head"

    codes: int | None = None
    init: _code_map.Kind = "kmeans"
    token_bias: bool = False
    counts: Tensor | Sequence[float] | None = field(default=None, repr=False, compare=False)
    used: int | None = None
    untie: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("codes", "used"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, check_whole("VQLogits", name, getattr(self, name), 1))
        check_choice("VQLogits", "init", self.init, _code_map.KINDS)
        for name in ("token_bias", "untie"):
            check_choice("VQLogits", name, getattr(self, name), (True, False))
        object.__setattr__(self, "seed", check_whole("VQLogits", "seed", self.seed))
        if self.counts is not None:
            object.__setattr__(self, "counts", _counts(self.counts))

    @property
    def needs_weight(self) -> bool:
        """Its rows."""
        return True

    # ---- where --------------------------------------------------------------------------------------

    def places(self, model: nn.Module) -> Collection[str] | None:
        """The output head.

        Raises:
            TargetError: none is known.
        """
        paths = paths_of(model)
        give = getattr(model, "get_output_embeddings", None)
        head = give() if callable(give) else None
        found = [path for path, module in paths.modules.items() if path and module is head]
        found = found or [path for path in paths.modules if path.rpartition(".")[2] == "lm_head"]
        if len(found) != 1:
            raise TargetError(
                f"attach: VQLogits found {len(found) or 'no'} output heads in this {type(model).__name__}, "
                "by get_output_embeddings() and by the name lm_head. Pass targets=, the head's name."
            )
        return {paths.here[found[0]]}

    def companions(self, model: nn.Module, sites: Sequence[Site]) -> list[tuple[Injection, list[Site]]]:
        """None; looks whether the head is tied.

        Raises:
            TargetError: it is, and ``untie`` is not set.
        """
        one = sites[0]
        tied = others(model, one.path, one.module, "weight")
        if tied and not self.untie:
            raise TargetError(
                f"attach: the weight of {one.path!r} is {tied[0]!r} too (tied), which stays, so a codebook "
                "would be in addition and save no memory. VQLogits(untie=True) serves the head alone."
            )
        return []

    # ---- what ---------------------------------------------------------------------------------------

    def part(self, module: nn.Module, path: str) -> Part:
        """The codebook and the mapping of one head."""
        if not isinstance(module, nn.Linear):
            raise TargetError(
                f"attach: VQLogits serves {self.serves}; {path!r} is a {type(module).__name__}."
            )
        V, width = module.out_features, module.in_features
        K, used = self._sizes(V, path)
        part = CodeHead(new_tensor(module, K, width), torch.zeros(V, dtype=torch.int32), used)
        if self.token_bias:
            part.token_bias = nn.Parameter(new_tensor(module, V))
        elif isinstance(module.bias, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            part.code_bias = nn.Parameter(new_tensor(module, K))
        part.to_begin = not from_file()  # which says the values
        return part

    def _sizes(self, V: int, path: str) -> tuple[int, int]:
        used = V if self.used is None else self.used
        K = max(1, used // 20) if self.codes is None else self.codes
        if used > V or used < K:
            wrong, value, most = ("used", used, V) if used > V else ("codes", K, used)
            raise TargetError(
                f"attach: VQLogits has {wrong}={value}, and {path!r} has {most} tokens. Give at most as many."
            )
        if self.counts is not None and len(self.counts) != V:
            raise TargetError(
                f"attach: VQLogits has counts of {len(self.counts)} tokens, and {path!r} has {V} rows."
            )
        if self.init == "frequency" and self.counts is None and not from_file():
            raise TargetError(
                'attach: VQLogits(init="frequency") needs counts=, how often each token occurs.'
            )
        return K, used

    def _begin(self, one: Served, part: CodeHead) -> None:
        """Map the tokens, and the values that follow."""
        rows = weight_now(one.module, one.path).detach()
        counts = None if self.counts is None else torch.as_tensor(self.counts)
        if not bool(rows.isfinite().all()):
            raise TargetError(f"attach: VQLogits can't map the rows of {one.path!r}: they have inf or nan.")
        part.begin(rows, bias_of(one.module), self.init, counts, self.seed)

    def options(self) -> dict[str, Any]:
        """Without counts, which no file holds."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name != "counts"}

    def handle(
        self, model: nn.Module, injection: Any, served: Sequence[Served], saved: Sequence[Saved]
    ) -> VQHandle:
        """What `optx.attach` returns."""
        made = served[0].part
        assert isinstance(made, CodeHead)
        if made.to_begin:  # once it is known that nothing else is in the way: it may take a minute
            self._begin(served[0], made)
            made.to_begin = False
        return VQHandle(model, injection, served, saved)


def _counts(given: Any) -> Any:
    try:
        found = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as e:
        raise OptxError(
            f"VQLogits: counts are {shown(given)}; they must be a row of numbers, one for each token."
        ) from e
    if (
        found.ndim != 1
        or found.is_complex()
        or not bool((found >= 0).all())
        or not bool(found.isfinite().all())
    ):
        raise OptxError(
            f"VQLogits: counts are of shape {tuple(found.shape)}; they must be a row of finite numbers of at "
            "least 0, one for each token."
        )
    if not bool(found.any()):
        raise OptxError("VQLogits: counts are all 0; they say how often each token occurs.")
    return given if isinstance(given, Tensor) else tuple(given)
