"""What `optx.LSSA` and `optx.LSSAR` put on an attention module, and their handle.

Source: arXiv 2501.13428.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from optx._errors import OptxError
from optx._softplus_attention import attend, attend_with_weights
from optx.inject._attention import Attention, AttentionPart, Heads, Intercepted
from optx.inject._attention_routes import Route, Routed, home_of
from optx.inject._handle import Handle
from optx.inject._served import Served
from optx.inject._trained_whole import Saved


class Powers:
    """p in training and in evaluation, 0 for LSSA; one for all parts of a handle."""

    def __init__(self, train: float, evaluate: float) -> None:
        self.train, self.evaluate = train, evaluate


class SoftplusPart:
    """What both kinds of parts have in common."""

    training: bool
    powers: Powers

    @property
    def power(self) -> float:
        """p as things are now."""
        return self.powers.train if self.training else self.powers.evaluate

    def note(self) -> str:
        """The power, in training and evaluation."""
        train, evaluate = (f"p={p:g}" if p else "no re-weighting" for p in vars(self.powers).values())
        return train if train == evaluate else f"{train} in training, {evaluate} in evaluation"


class RegisteredSoftplus(SoftplusPart, Routed):
    """Where transformers' registry is asked for an attention function."""

    def __init__(self, path: str, powers: Powers) -> None:
        super().__init__()
        self.path, self.powers = path, powers

    def attended(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, causal: bool
    ) -> Tensor:
        """What attention gives."""
        return attend(query, key, value, mask, self.power, causal, dropout)

    def with_weights(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, causal: bool
    ) -> tuple[Tensor, Tensor]:
        """The same, and its weights."""
        return attend_with_weights(query, key, value, mask, self.power, causal, dropout)


class CalledSoftplus(SoftplusPart, AttentionPart):
    """Where a module calls torch's ``scaled_dot_product_attention``."""

    what: ClassVar[str] = "softplus attention"

    def __init__(self, path: str, powers: Powers) -> None:
        super().__init__(path, Heads(0, 0))
        self.powers = powers

    def attend(self, call: Attention) -> Tensor:
        """What attention gives; the scale has no part in it."""
        return attend(*call[:4], self.power, call.is_causal, call.dropout_p)


class MultiheadSoftplus(CalledSoftplus):
    """torch's nn.MultiheadAttention, which may be asked for its weights."""

    def around(
        self, call: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The module's call; of softmax's weights, which it makes if it is asked, those of softplus."""
        calls: list[Attention] = []

        def attended(given: Attention) -> Tensor:
            calls.append(given)
            return self.attend(given)

        with Intercepted(attended):
            output = call(*args, **kwargs)
        if not calls:
            raise self.unreached(module)
        out, shares = output
        if shares is None:
            return output
        weights = attend_with_weights(*calls[0][:4], self.power, calls[0].is_causal, 0.0)[1]
        return out, (weights if weights.numel() == shares.numel() else weights.mean(1)).view_as(shares)


class SoftplusHandle(Handle):
    """What `optx.attach` returns for `optx.LSSA` and `optx.LSSAR`."""

    def __init__(
        self, model: nn.Module, injection: Any, served: Sequence[Served], saved: Sequence[Saved] = ()
    ) -> None:
        super().__init__(model, injection, served, saved)
        for one in served:
            if isinstance(one.part, Routed):
                one.hooks.append(Route(one.module, one.part))

    def set(
        self, *, p: float | None = None, train_p: float | None = None, eval_p: float | None = None
    ) -> None:
        """Other powers for calls from now on. Checkpoints don't say them; `save` does.

        Args:
            p: above 0, in training and evaluation, but where one of the next two is given; None: as it is.
            train_p: in training; 0: no re-weighting. None: ``p`` if that is given, else as it is.
            eval_p: in evaluation; likewise.

        Raises:
            OptxError: a number out of range, no number, LSSA's handle, or a handle that is removed.
        """
        self._check_alive("set")
        if "p" not in self.injection.arguments():
            raise OptxError("set: LSSA has no power. Remove it, and attach optx.LSSAR(p=...).")
        given = {"p": p, "train_p": train_p, "eval_p": eval_p}
        if p is None:
            given = {name: value for name, value in given.items() if value is not None}
        if not given:
            raise OptxError("set: no power is given; pass p=, train_p= or eval_p=.")
        changed: Any = dataclasses.replace(self.injection, **given)
        self.injection, powers = changed, cast(Powers, changed.powers())
        for one in self.served:
            one.injection = self.injection
            if isinstance(one.part, SoftplusPart):
                one.part.powers.train, one.part.powers.evaluate = powers.train, powers.evaluate


def softplus_part(module: nn.Module, path: str, powers: Powers) -> RegisteredSoftplus | CalledSoftplus:
    """The part for a module, by how it comes to its attention."""
    if home_of(module):
        return RegisteredSoftplus(path, powers)
    return (MultiheadSoftplus if isinstance(module, nn.MultiheadAttention) else CalledSoftplus)(path, powers)
