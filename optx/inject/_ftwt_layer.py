"""What is known of one convolution under FTWT, from the predictor's call to the end of its chain.

Source: FTWT, arXiv 2110.08232, sections 3.1 to 3.3; multiply-adds as its official code counts them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optx._errors import OptxError
from optx.inject._conv_chains import Chain
from optx.inject._ftwt_targets import channel_scores
from optx.inject._gathered_conv import can_fold, can_gather, normed, rows_of, spread
from optx.inject._own_loss import Collected


class Layer:
    """One convolution, from its predictor's call to the end of its chain.

    Attributes:
        path: of the convolution.
        activation: what follows, of one tensor; None: nothing does.
        source: the layer whose masked channels are those of its input.
        mask: (B, C) bool, the filters kept in the last call; None: all, always.
        area: positions of the last input.
        force: None: as predicted; else ``"all"``, or ``"random"``: as many, any of them.
        agreement: share of the last training batch's bits that were predicted right.
        all_zero: whether a sample of it had a target without any filter.
        samples, total: of calls in evaluation mode, and the multiply-adds of all their filters.
    """

    def __init__(
        self, chain: Chain, conv: nn.Conv2d, norm: nn.Module | None, collected: Collected, target: Any
    ) -> None:
        self.path, self.activation, self.collected = chain.path, chain.activation, collected
        self.target: Callable[[Tensor], Tensor] = target
        self.out, self.into, self.groups = conv.out_channels, conv.in_channels, conv.groups
        self.window = conv.kernel_size[0] * conv.kernel_size[1]
        self.source: Layer | None = None
        self.mask: Tensor | None = None
        self.area = 0
        self.force: str | None = None
        self.agreement: Tensor | None = None
        self.all_zero: Tensor | None = None
        self._training = False
        self._norm = None if norm is None else weakref.ref(norm)  # which holds this, by its part
        self._logits: Tensor | None = None
        self._finished: Tensor | None = None
        self.forget()

    def __getstate__(self) -> dict[str, Any]:
        """For a copy of the model, which has computed nothing."""
        calls = {"mask": None, "agreement": None, "all_zero": None, "_logits": None, "_finished": None}
        return {**self.__dict__, **calls, "_norm": self._norm and self._norm()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        norm = state["_norm"]
        self.__dict__.update(state, _norm=None if norm is None else weakref.ref(norm))

    def forget(self) -> None:
        """Count anew."""
        self.samples, self.total = 0, 0
        self._kept: Any = 0
        self._waiting: list[_Call] = []

    # ---- a call -----------------------------------------------------------------------------------------

    def begin(self, z: Tensor, *, training: bool, learning: bool) -> None:
        """A call begins.

        Args:
            z: (B, C), the predictor's logits.
            training: whether the convolution is in training mode; norms may be frozen.
            learning: whether the layer has a loss in this call.
        """
        self._training = training
        self._logits, self._finished = z if learning else None, None
        self.mask = self._decided(z.detach())

    def _decided(self, z: Tensor) -> Tensor:
        mask = ~(z <= 0)  # what is no number hides nothing
        if self.force == "all":
            return torch.ones_like(mask)
        if self.force == "random":
            places = torch.rand_like(z).argsort(1).argsort(1)
            return places < mask.sum(1, keepdim=True)
        return mask

    def end(self, y: Tensor, x: Tensor, *, own: bool = True) -> Tensor:
        """What comes out of the chain, masked; its loss is collected or its work counted.

        Args:
            y: (B, C, H', W'), or (C, H', W') of one sample; before the activation, which keeps zeros.
            x: what it was computed from.
            own: whether nobody else has y.
        """
        z, self._logits = self._logits, None
        if self.mask is None:  # the convolution was not called
            return y
        batch = y if y.ndim == 4 else y[None]
        if z is not None:
            self.collected.add(self.path, self.own_loss(z, batch))
        if not self._training:
            self.count(batch)
        mask = self.mask[:, :, None, None].to(y.dtype)
        if not own or torch.is_grad_enabled() or y is x or torch.compiler.is_compiling():
            batch = batch * mask
        else:
            batch.mul_(mask)
        return batch if y.ndim == 4 else batch[0]

    def own_loss(self, z: Tensor, y: Tensor) -> Tensor:
        """Binary cross-entropy of the logits and the target: mean over the batch, sum over channels."""
        with torch.no_grad():
            y = y.detach()
            target = self.target(channel_scores(y if self.activation is None else self.activation(y)))
            self.agreement = ((z > 0) == target).float().mean()
            self.all_zero = ~target.any(1).all()
        return F.binary_cross_entropy_with_logits(z, target.to(z.dtype), reduction="sum") / len(z)

    # ---- of some filters alone ----------------------------------------------------------------------------

    def gathered(self, conv: Any, x: Tensor, pooled: Tensor) -> Tensor | None:
        """The convolution's output by the kept filters alone, and the norm's where that is possible.

        Args:
            conv: the module, in evaluation mode.
            x: (B, C_in, H, W).
            pooled: (B, C_in, ...), the input averaged, which tells whether a masked channel is 0 indeed.

        Returns:
            (B, C, H', W') with zeros in the other channels; None: every filter is kept, or the module's own
            call has to compute them.
        """
        assert self.mask is not None
        if not bool(pooled.isfinite().all()):
            return None
        norm = None if self._norm is None else self._norm()
        if not can_gather(conv) or (norm is not None and norm.training):
            return None
        into = self.inputs(len(x))
        if into is not None and bool((pooled.flatten(2).any(2) & ~into).any()):
            into = None  # another way led here
        if bool(self.mask.all()) and (into is None or bool(into.all())):
            return None
        folds = norm is not None and can_fold(norm)
        rows: list[Tensor] = []
        pairs = 0
        for i in range(len(x)):
            out, channels = _numbers(self.mask[i]), None if into is None else _numbers(into[i])
            y = rows_of(conv, x[i : i + 1], out, channels)
            rows.append(spread(normed(norm, y, out) if folds and len(out) else y, out, self.out))
            pairs += len(out) * (self.into if channels is None else len(channels))
        whole = rows[0] if len(rows) == 1 else torch.cat(rows)
        if folds or norm is None:
            self.count(whole, pairs if self.groups == 1 else None)
            self._finished = whole
        return whole

    def finished(self, x: Tensor) -> bool:
        """Whether x is what `gathered` has already taken to the end of the chain.

        Raises:
            OptxError: that was changed on its way to the norm.
        """
        done, self._finished = self._finished, None
        if done is not None and x is not done:
            raise OptxError(
                f"FTWT: the output of {self.path!r} was changed before its norm, in evaluation mode, where "
                "it is normed already. Pass optx.FTWT(..., inference='mask'), or remove that hook."
            )
        return done is not None

    # ---- work --------------------------------------------------------------------------------------------

    def inputs(self, rows: int) -> Tensor | None:
        """(B, C_in) bool: which channels of the input are not masked; None: all may have something."""
        mask = None if self.source is None else self.source.mask
        return mask if mask is not None and mask.shape == (rows, self.into) else None

    def size(self, positions: int) -> int:
        """Multiply-adds of a sample whose output has so many positions, by all filters."""
        return positions * self.window * self.out * self.into // self.groups

    def count(self, y: Tensor, kept: int | None = None) -> None:
        """Count a call's work.

        Args:
            y: (B, C, H', W').
            kept: pairs of a filter and a channel that were computed at each position, if that is known.
        """
        if torch.compiler.is_compiling():
            return
        rows, positions = len(y), y.shape[-2] * y.shape[-1]
        if self.collected.first_call(self.path):  # a later one is of the same samples
            self.samples += rows
        self.total += rows * self.size(positions)
        if kept is not None:
            self._kept += kept * positions * self.window
            return
        self._waiting.append(_Call(positions * self.window, rows, self.mask, self.inputs(rows)))
        if len(self._waiting) >= _MANY:
            self._settle()

    def _settle(self) -> None:
        """Of each group, kept filters times kept channels of the input."""
        for call in self._waiting:
            each = (call.rows, self.groups, -1)
            filters: Any = self.out // self.groups if call.out is None else call.out.view(each).sum(2)
            channels: Any = self.into // self.groups if call.into is None else call.into.view(each).sum(2)
            pairs = filters * channels
            every = pairs.sum() if isinstance(pairs, Tensor) else pairs * call.rows * self.groups
            self._kept = self._kept + call.each * every
        self._waiting = []

    @property
    def kept(self) -> int:
        """Multiply-adds of the kept filters from the kept channels, in all calls."""
        self._settle()
        return int(self._kept)


def _numbers(mask: Tensor) -> Tensor:
    return mask.nonzero().view(-1)


_MANY = 64
"""Calls whose masks wait to be counted: that takes longer than a small convolution."""


class _Call(NamedTuple):
    """A call that is to be counted: multiply-adds of a pair, samples, and the filters and channels kept."""

    each: int
    rows: int
    out: Tensor | None
    into: Tensor | None
