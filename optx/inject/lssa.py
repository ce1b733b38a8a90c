"""LSSA and LSSAR: attention by softplus, sharpened, in the place of softmax.

Source: "Softplus Attention with Re-weighting Boosts Length Extrapolation in Large Language Models", arXiv
2501.13428.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from optx._errors import OptxError, TargetError, check_above_0
from optx._module_paths import paths_of
from optx.inject._anatomy import attentions_of
from optx.inject._attention import adds_position_bias, kernel_of
from optx.inject._attention_routes import home_of
from optx.inject._injection import Injection, Site
from optx.inject._part import Part, attached
from optx.inject._served import Served
from optx.inject._softplus_part import Powers, SoftplusHandle, SoftplusPart, softplus_part
from optx.inject._trained_whole import Saved
from optx.inject._weights import is_conv, is_linear


class SoftplusAttention(Injection):
    """What LSSA and LSSAR have in common."""

    role: ClassVar[str] = "attention"
    serves: ClassVar[str] = "attention modules"

    @abstractmethod
    def powers(self) -> Powers:
        """p in training and in evaluation."""

    def places(self, model: nn.Module) -> Collection[str]:
        """All attention."""
        paths = paths_of(model)
        return {paths.here[path] for path in attentions_of(paths.modules)}

    def part(self, module: nn.Module, path: str) -> Part:
        """One module's attention."""
        return self._part(module, path, self.powers())

    def parts(self, sites: Sequence[Site]) -> list[Part]:
        """One per site, none inside another; all with the same powers."""
        powers = self.powers()
        made: list[Part] = [self._part(site.module, site.path, powers) for site in sites]
        paths = [site.path for site in sites]
        for outer in paths:
            inner = next((path for path in paths if path.startswith(f"{outer}.")), None)
            if inner is not None:
                raise TargetError(
                    f"attach: {inner!r} is inside {outer!r}, and attention can't be replaced twice. Target "
                    "one of them."
                )
        return made

    def handle(
        self, model: nn.Module, injection: Any, served: Sequence[Served], saved: Sequence[Saved]
    ) -> SoftplusHandle:
        """A handle that can change p."""
        return SoftplusHandle(model, injection, served, saved)

    def _part(self, module: nn.Module, path: str, powers: Powers) -> Part:
        method, kind = type(self).__name__, type(module).__name__
        if is_linear(module) or is_conv(module):
            raise TargetError(f"attach: {method} serves {self.serves}; {path!r} is a {kind}.")
        if adds_position_bias(module):
            raise TargetError(
                f"attach: {path!r}, a {kind}, adds a bias by position to its scores (position_bias=), which "
                f"{method} has no place for. Leave it out of targets."
            )
        container = attached(module)
        for name, part in container.parts.items() if container is not None else ():
            if isinstance(part, SoftplusPart):
                raise TargetError(
                    f"attach: {path!r} has attention of this kind already, {name!r}. Remove that first."
                )
            if part.replaces:
                raise TargetError(
                    f"attach: {name!r} computes in the place of {path!r}, whose attention would not be "
                    "called. Remove that first, or leave the module out."
                )
        own = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if home_of(module) and own not in (None, "eager", "sdpa"):
            raise TargetError(
                f"attach: {method} reads masks as eager attention and sdpa have them, and {path!r}, a "
                f"{kind}, has attn_implementation={own!r}. Load the model with attn_implementation='sdpa'."
            )
        if not home_of(module) and (kernel := kernel_of(module)):
            raise TargetError(
                f"attach: {method} can't be routed into {path!r}, a {kind}: it has {kernel}, and does not "
                "look its attention up in transformers' registry. Load the model with "
                "attn_implementation='sdpa', or leave it out of targets."
            )
        return softplus_part(module, path, powers)


@dataclass(frozen=True)
class LSSA(SoftplusAttention):
    """Attention by softplus of cosines in the place of softmax of products: LSSA.

    Row i weighs key j by softplus(ln d ln N cos(q_i, k_j)), divided by the row's sum; d is the width of a
    head and N how many keys the row sees. The module's own scale has no part in it. See
    ``optx.functional.lssa_attention``, by which no matrix of all rows and keys is made.

    Serves attention modules, by default all of the model's: those that look their function up in
    transformers' registry (``"sdpa"`` and ``"eager"``, which gives weights for ``output_attentions``), and
    any that calls torch's scaled_dot_product_attention (timm, nn.MultiheadAttention,
    nn.TransformerEncoderLayer, one's own).

    Paper values:
        GPT-2 of 124M parameters with rotary positions, trained from scratch at 1,024 tokens on 10B.

    Limits: A model that was trained with softmax computes something else with it: train with it, from the
        start or on. It has no parameters, and can't be merged.

    Keywords: length extrapolation, long context, softplus attention, softmax-free, length-scaled attention.

    Evidence: ``optx run lengths``; ``test_softplus_attention.py``, ``test_lssa.py``.

    Raises:
        TargetError: at attach, a module whose attention can't be routed; at a call, one that did not reach
            it, or that caps scores or adds to them.
        OptxError: at a call, a mask that adds numbers to scores.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.ModuleDict({"attn": torch.nn.MultiheadAttention(8, 2)})
        >>> handle = optx.attach(model, optx.LSSA())
        >>> handle.report().rows[0].note
        'no re-weighting'

    Source: arXiv 2501.13428.
    """

    name: ClassVar[str] = "lssa"

    def powers(self) -> Powers:
        """None."""
        return Powers(0.0, 0.0)


@dataclass(frozen=True)
class LSSAR(SoftplusAttention):
    """LSSA whose weights are sharpened, so that a row attends to few keys however many it sees: LSSAR.

    With a the weights of `LSSA`, they are relu(N a - 1)^p, over their sum: of N keys only those above the
    mean weigh, and the more the larger p. Rows that see up to three keys keep all of them. A row of equal
    weights keeps these. See ``optx.functional.lssar_attention``; what it serves, and how, is `LSSA`'s.

    Args:
        p: the power.
        train_p: in training mode; None: ``p``, 0: no re-weighting, as LSSA.
        eval_p: in evaluation mode; likewise.

    Paper values:
        ``p=15``: GPT-2 of 124M parameters with rotary positions, trained at 1,024 tokens on 10B: its loss
            rises from 3.19 to 3.32 at 8,192 tokens, softmax's to 6.28 (the default).
        ``p=3``: best at the length of training, 3.18, from where it rises as softmax's does.
        ``train_p=0, eval_p=15``: re-weighting without training, of the first versions.

    Limits: A model that was trained with softmax computes something else with it: train with it, from the
        start or on. It has no parameters, and can't be merged.

    Keywords: length extrapolation, long context, softplus attention, re-weighting, sparse attention,
        softmax-free.

    Evidence: ``optx run lengths``; ``test_softplus_attention.py``, ``test_lssa.py``.

    Raises:
        OptxError: p not above 0; at a call, a mask that adds numbers to scores.
        TargetError: at attach, a module whose attention can't be routed; at a call, one that did not reach
            it, or that caps scores or adds to them.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.ModuleDict({"attn": torch.nn.MultiheadAttention(8, 2)})
        >>> handle = optx.attach(model, optx.LSSAR(train_p=3, eval_p=15))
        >>> handle.report().rows[0].note
        'p=3 in training, p=15 in evaluation'
        >>> handle.set(p=5)

    Source: arXiv 2501.13428.
    """

    name: ClassVar[str] = "lssar"

    p: float = 15.0
    train_p: float | None = None
    eval_p: float | None = None

    def __post_init__(self) -> None:
        check_above_0("LSSAR", "p", self.p)
        for name, value in (("train_p", self.train_p), ("eval_p", self.eval_p)):
            if value is None or (type(value) in (int, float) and value == 0):
                continue
            try:
                check_above_0("LSSAR", name, value)
            except OptxError as e:
                raise OptxError(f"{str(e)[:-1]}, or 0 for no re-weighting.") from None

    def powers(self) -> Powers:
        """In training and in evaluation."""
        train, evaluate = (self.p if one is None else one for one in (self.train_p, self.eval_p))
        return Powers(float(train), float(evaluate))
