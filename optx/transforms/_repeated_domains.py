"""Domains that come several times in a step: their gradients add up, and tell how much of them is noise."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from optx._errors import OptxError
from optx.transforms._domain_gradients import DomainGradients, SpreadOf, local, processes, update, wide

Measure = Literal["variance", "denoised", "disparity"]


class RepeatedDomains(DomainGradients):
    """Collects a step's gradients from any number of rounds, in each of which every domain has one block.

    While a block is open ``p.grad`` is its domain's sum so far, so that a backward pass adds to it, and DDP
    exchanges the whole sum in the round that it is told to. After a block it is that domain's sum, and the
    mean over the domains where all of them have had equally many blocks.

    Args:
        owner: who asks, for messages.
        labels: the domains that each round has.
        unbiased: divide by one less than the number of domains.
        measure: what the spreads are: ``"variance"`` of the domains' gradients; ``"denoised"``: less what of
            it the blocks of a domain say is noise, and then maybe below 0; ``"disparity"``: the variance over
            the domains of the variance of a domain's blocks.
    """

    _often = "equally often"

    def __init__(self, owner: str, labels: Sequence[Hashable], unbiased: bool, measure: Measure) -> None:
        self.measure = measure
        super().__init__(owner, labels, unbiased)

    def clear(self) -> None:
        """Begin anew."""
        super().clear()
        self._sums: dict[Hashable, dict[Tensor, Tensor]] = {}
        self._given: dict[Tensor, tuple[Tensor, int]] = {}  # as a block found it
        self._scatter: dict[Hashable, dict[Tensor, Tensor]] = {}  # sum of squares about the blocks' mean

    def missing(self) -> list[Hashable]:
        """The domains that have had fewer blocks than another, or none."""
        most = max(map(self.seen.count, self.labels))
        return [label for label in self.labels if self.seen.count(label) < max(1, most)]

    def enter(self, label: Hashable, parameters: Iterable[Tensor]) -> None:
        """Put a domain's sum so far where a backward pass adds to it; or raise, and change nothing."""
        super().enter(label, parameters)
        self._given = {}
        for p, g in self._sums.get(label, {}).items():
            p.grad = given = g.clone()  # an error in the block leaves the sum as it was
            self._given[p] = given, given._version

    def check_step(self, has_gradients: bool) -> None:
        """Raise for what is missing, and if the blocks do not tell what is measured."""
        super().check_step(has_gradients)
        if self.seen and self.measure != "variance" and self.seen.count(self.labels[0]) < 2:
            raise OptxError(
                f"{self.owner}: step() came after one block of each domain, and measure={self.measure!r} "
                "compares a domain's blocks; give each domain two or more, of different samples."
            )

    def _check_again(self, label: Hashable) -> None:
        """It may come as often as it likes."""

    @torch.no_grad()
    def take(self, label: Hashable, parameters: Sequence[Tensor], spread_of: SpreadOf) -> None:
        """Take a block's gradients in."""
        sums: dict[Tensor, Tensor] = {p: p.grad for p in parameters if p.grad is not None}
        before = self._sums.get(label, {})
        self._check_gradients(label, sums)
        if before and all(self._is_as_given(p, g) for p, g in sums.items()):
            raise OptxError(f"{self.owner}: domain({label!r}) left no gradient; {self._belongs}")
        if self.measure != "variance":
            self._scatter_out(label, before, sums, spread_of)
        if processes() > 1:  # DDP may have left views of a buffer that it will write the next block's into
            sums = {p: g.clone() for p, g in sums.items()}
            for p, g in sums.items():
                p.grad = g
        self._sums[label] = sums
        self.seen.append(label)
        self._left = {p: (g, g._version) for p, g in sums.items()}
        if not self.missing():
            self._finish_round(spread_of)
        self.open = False

    def _is_as_given(self, p: Tensor, g: Tensor) -> bool:
        given, version = self._given.get(p, (None, 0))
        return g is given and g._version == version

    def _scatter_out(
        self,
        label: Hashable,
        before: dict[Tensor, Tensor],
        sums: dict[Tensor, Tensor],
        spread_of: SpreadOf,
    ) -> None:
        """Add the a-th block to the sum of squares: ((a - 1) / a) (block - mean of those before)^2."""
        done = self.seen.count(label)
        kept = self._scatter.setdefault(label if self.measure == "disparity" else None, {})
        for p, total in sums.items():
            if not done or spread_of(p) is None:
                continue
            now = local(total).to(wide(total.dtype))
            if p in before:
                known = local(before[p]).to(now.dtype)
                now = now.sub(known).sub_(known, alpha=1 / done)
            squares = kept.setdefault(p, torch.zeros_like(now))
            squares.addcmul_(now, now, value=done / (done + 1))

    def _finish_round(self, spread_of: SpreadOf) -> None:
        """The mean over the domains into ``p.grad``, and the spreads."""
        rounds = self.seen.count(self.labels[0])
        dtypes = {p: g.dtype for sums in self._sums.values() for p, g in sums.items()}
        self._means = {}
        for number, label in enumerate(self.labels, 1):
            copies = {p: g.to(wide(g.dtype), copy=True) for p, g in self._sums[label].items()}
            self._fold(number, copies, spread_of)
        if rounds > 1 and self.measure == "denoised":
            self._take_noise_off(rounds, spread_of)
        if rounds > 1 and self.measure == "disparity":
            self._spread_scatter(rounds, spread_of)
        self._leave(dtypes)

    def _take_noise_off(self, rounds: int, spread_of: SpreadOf) -> None:
        """A sum of a blocks has a / (a - 1) times their squares for variance; it is in that of the means."""
        domains = len(self.labels)
        part = 1 / domains if self.unbiased else (domains - 1) / domains**2
        for p, squares in self._scatter.get(None, {}).items():
            if (spread := spread_of(p)) is not None:
                local(spread).sub_(squares.to(spread.dtype), alpha=part * rounds / (rounds - 1))

    def _spread_scatter(self, rounds: int, spread_of: SpreadOf) -> None:
        for p in self._means:
            if (spread := spread_of(p)) is None:
                continue
            every = [self._scatter.get(label, {}).get(p) for label in self.labels]
            zeros = torch.zeros_like(local(spread))
            found = [
                zeros.clone() if squares is None else squares.to(zeros.dtype) * (rounds / (rounds - 1))
                for squares in every
            ]
            local(spread).zero_()
            mean = found[0]
            for number, one in enumerate(found[1:], 2):
                update(number, [one], [mean], [local(spread)], self.unbiased)
