"""The gradients of several domains in one step: their mean in ``p.grad``, and how far they lie apart.

Welford's recurrence, so that no domain's gradient is kept: one mean and one spread per weight, however many
domains there are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from optx._errors import OptxError, as_whole
from optx._names import is_dtensor

SpreadOf = Callable[[Tensor], Tensor | None]
"""Where a parameter's spread is kept; None where nobody asks for it."""


class DomainGradients:
    """Collects one step's gradients, domain by domain.

    Between two domains, and after the last, ``p.grad`` is the mean of what there is so far: clipping,
    unscaling and logging see the step's gradient there. While a domain is open ``p.grad`` is its own.

    Args:
        owner: who asks, for messages.
        labels: the domains that each step has.
        unbiased: divide by one less than the number of domains.

    Attributes:
        seen: the domains whose gradients are in, in order.
        open: whether a domain is open.
        unscaled: whether the spreads have been freed of a GradScaler's scale.
    """

    _often = "once"
    _belongs = "its loss's backward() belongs into the block."

    def __init__(self, owner: str, labels: Sequence[Hashable], unbiased: bool) -> None:
        self.owner, self.labels, self.unbiased = owner, labels, unbiased
        self.open = False
        self.clear()

    def clear(self) -> None:
        """Begin anew: the step was taken, or what was collected is dropped."""
        self.seen: list[Hashable] = []
        self.unscaled = False
        self._means: dict[Tensor, Tensor] = {}
        # What was left in p.grad, and how often that had been changed in place.
        self._left: dict[Tensor, tuple[Tensor, int]] = {}

    def missing(self) -> list[Hashable]:
        """The domains that this step has not had."""
        return [label for label in self.labels if label not in self.seen]

    def has(self, p: Tensor) -> bool:
        """Whether a parameter had a gradient in any domain."""
        return p in self._means

    # ---- one domain ----------------------------------------------------------------------------------

    def enter(self, label: Hashable, parameters: Iterable[Tensor]) -> None:
        """Make room for a domain's gradient; or raise, and change nothing."""
        if self.open:
            raise OptxError(
                f"{self.owner}: domain({label!r}) was entered while another domain is open; leave that "
                "first, as a gradient belongs to one domain."
            )
        self._check_label(label)
        present = [p for p in parameters if p.grad is not None]
        if self.seen and not self._as_left(present):
            if _any_nonzero(present):
                raise OptxError(
                    f"{self.owner}: the gradients were changed between domain({self.seen[-1]!r}) and "
                    f"domain({label!r}); clip, unscale or add to them after the last domain, when p.grad is "
                    "the mean over all."
                )
            self.clear()  # zero_grad(): the step is given up
        self._check_again(label)
        if not self.seen and _any_nonzero(present):
            raise OptxError(
                f"{self.owner}: there are gradients already before domain({label!r}), which belong to none; "
                "call zero_grad() first (what belongs to no domain is added after the last one)."
            )
        for p in present:
            p.grad = None
        self.open = True

    def give_up(self, parameters: Iterable[Tensor]) -> None:
        """An error left the block: drop what this domain has, and keep the others."""
        self.open = False
        for p in parameters:
            p.grad = self._left[p][0] if p in self._left else None

    def check_step(self, has_gradients: bool) -> None:
        """Raise if a step can't be taken on what there is: gradients of every domain, or none at all."""
        if self.open:
            raise OptxError(
                f"{self.owner}: step() was called inside a domain's block; leave the block first."
            )
        if not self.seen and has_gradients:
            raise OptxError(
                f"{self.owner}: step() came without domains; put each domain's backward() into "
                "`with opt.dsp_reg.domain(label):`."
            )
        if self.seen and (missing := self.missing()):
            raise OptxError(
                f"{self.owner}: step() came before domain({missing[0]!r}) ({len(missing)} of "
                f"{len(self.labels)} are missing); every step needs each domain {self._often}, and "
                "zero_grad() between two of them drops what came before."
            )

    @torch.no_grad()
    def take(self, label: Hashable, parameters: Sequence[Tensor], spread_of: SpreadOf) -> None:
        """Take a domain's gradients in; ``p.grad`` is the mean of all so far then."""
        grads: dict[Tensor, Tensor] = {p: p.grad for p in parameters if p.grad is not None}
        self._check_gradients(label, grads)
        dtypes = {p: left.dtype for p, (left, _) in self._left.items()}
        dtypes.update({p: g.dtype for p, g in grads.items()})
        self._fold(len(self.seen) + 1, grads, spread_of)
        self._leave(dtypes)
        self.seen.append(label)
        self.open = False

    def _fold(self, number: int, grads: dict[Tensor, Tensor], spread_of: SpreadOf) -> None:
        """Take the ``number``-th domain's gradients into means and spreads; they are overwritten."""
        if number == 1:
            self._means = {p: g.to(wide(g.dtype), copy=True) for p, g in grads.items()}
            return
        for p in [p for p in grads if p not in self._means]:  # the earlier domains' gradients of it are 0
            self._means[p] = torch.zeros_like(grads[p], dtype=wide(grads[p].dtype))
            if (spread := spread_of(p)) is not None:
                spread.zero_()
        self._spread_out(number, grads, spread_of)

    def _leave(self, dtypes: Mapping[Tensor, torch.dtype]) -> None:
        """Put the means into ``p.grad``, and remember them."""
        for p, mean in self._means.items():
            p.grad = left = mean.to(dtypes[p])
            self._left[p] = left, left._version

    def _spread_out(self, number: int, grads: dict[Tensor, Tensor], spread_of: SpreadOf) -> None:
        every = list(self._means)
        # A launch serves all tensors where launches cost; a tensor stays in the cache where memory does.
        batches = [[p] for p in every] if all(p.device.type == "cpu" for p in every) else [every]
        for batch in batches:
            means = [local(self._means[p]) for p in batch]
            now = [
                local(grads[p]).to(m.dtype) if p in grads else torch.zeros_like(m)
                for p, m in zip(batch, means, strict=True)
            ]
            spreads = [spread_of(p) for p in batch]
            update(number, now, means, [s if s is None else local(s) for s in spreads], self.unbiased)

    # ---- checks --------------------------------------------------------------------------------------

    def _check_label(self, label: Hashable) -> None:
        try:
            known = label in self.labels
        except (TypeError, ValueError, RuntimeError):  # an array of several
            known = False
        if not known or isinstance(label, Tensor):
            hint = " A tensor equals no label: give label.item()." if isinstance(label, Tensor) else ""
            raise OptxError(
                f"{self.owner}: domain({label!r}) was never declared; the domains are "
                f"{', '.join(map(repr, self.labels))}.{hint}"
            )

    def _check_again(self, label: Hashable) -> None:
        if label in self.seen:
            raise OptxError(
                f"{self.owner}: domain({label!r}) came a second time before step(); put all its "
                "micro-batches into one block, where their gradients add up, or give accumulate=True, or "
                "call zero_grad() to begin anew."
            )

    def check_losses(self, losses: Any) -> None:
        """Raise before the first backward pass if a later one could not be taken in."""
        if not isinstance(losses, Mapping) or not losses:
            raise OptxError(
                f"{self.owner}: backward() was given {type(losses).__name__}, and takes a dict of each "
                f"domain's loss by its label; the domains are {', '.join(map(repr, self.labels))}."
            )
        for label, loss in cast(Mapping[Any, Any], losses).items():
            self._check_label(label)
            if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
                what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
                raise OptxError(
                    f"{self.owner}: the loss of {label!r} has {what}; it must be a tensor of one number that "
                    "has a gradient."
                )

    def _check_gradients(self, label: Hashable, grads: dict[Tensor, Tensor]) -> None:
        if not grads:
            raise OptxError(f"{self.owner}: domain({label!r}) left no gradient; {self._belongs}")
        for p, g in grads.items():
            if g.layout != torch.strided:
                raise OptxError(
                    f"{self.owner}: domain({label!r}) left a sparse gradient for a parameter of shape "
                    f"{tuple(p.shape)}; use sparse=False in the embedding."
                )

    def _as_left(self, present: Sequence[Tensor]) -> bool:
        """Whether the gradients are the means that were put there."""
        if len(present) != len(self._left):
            return False
        for p in present:
            left, version = self._left.get(p, (None, 0))
            if left is None or p.grad is not left or left._version != version:
                return False
        return True


def update(
    number: int,
    grads: list[Tensor],
    means: list[Tensor],
    spreads: Sequence[Tensor | None],
    unbiased: bool,
) -> None:
    """Take the gradients of the ``number``-th domain, from the second on, into means and variances.

    With d = g - mean: mean += d / k, and the variance V of k numbers is ((k - 1) / k) V + ((k - 1) / k^2)
    d^2, or unbiased ((k - 2) / (k - 1)) V + d^2 / k. What two equal gradients add is 0 to the bit.

    Args:
        number: k.
        grads: overwritten by d.
        means: written in place, in float32 or float64.
        spreads: the variances, in float32; None where there is none. What they are before the second domain
            does not count.
        unbiased: divide by k - 1.
    """
    k, lists = float(number), cast(Any, torch)  # its functions on lists are private by name only
    keep, add = ((k - 2) / (k - 1), 1 / k) if unbiased else ((k - 1) / k, (k - 1) / k**2)
    lists._foreach_sub_(grads, means)
    lists._foreach_add_(means, grads, alpha=1 / k)
    pairs = [(d.to(s.dtype), s) for d, s in zip(grads, spreads, strict=True) if s is not None]
    if not pairs:
        return
    away, kept = [d for d, _ in pairs], [s for _, s in pairs]
    if number == 2:
        lists._foreach_zero_(kept)  # not by a factor: an inf of the last step would stay
    else:
        lists._foreach_mul_(kept, keep)
    lists._foreach_addcmul_(kept, away, away, value=add)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What gradients of a dtype are added up in."""
    return torch.promote_types(dtype, torch.float32)


def local(t: Any) -> Tensor:
    """What of a tensor lies in this process; writing to it writes to the tensor."""
    return t.to_local() if is_dtensor(t) else t


def _any_nonzero(parameters: Sequence[Tensor]) -> bool:
    """Whether a gradient holds anything here; asks the device once, and only where there are gradients."""
    found = [local(p.grad).any() for p in parameters if p.grad is not None]
    return bool(found) and bool(torch.stack([f.to(found[0].device) for f in found]).any())


def processes() -> int:
    """How many there are; 1 without torch.distributed."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def declared(owner: str, domains: Any) -> list[Hashable]:
    """The labels of all domains, each once."""
    if (count := as_whole(domains)) is not None and count >= 1:
        return list(range(count))
    if isinstance(domains, Sequence) and not isinstance(domains, str | bytes) and domains:
        try:
            if len(set(domains)) == len(domains):
                return list(domains)
        except TypeError:
            pass  # a label that can't be hashed
    raise OptxError(
        f"{owner}: domains is {domains!r}; it must be how many there are (at least 1), or a list of their "
        "labels, each once."
    )


def loss_scale() -> float:
    """What this step's losses were multiplied by: the scale of the GradScaler that calls step(), or 1.

    A GradScaler unscales ``p.grad`` and tells the optimizer nothing, so it is looked for among the callers.
    """
    frame = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    while frame is not None:
        if frame.f_code.co_name == "step" and frame.f_code.co_varnames[:1] == ("self",):
            scaler = frame.f_locals.get("self")
            if isinstance(scaler, torch.amp.GradScaler):
                return scaler.get_scale() if scaler.is_enabled() else 1.0
        frame = frame.f_back
    return 1.0
