"""A mixture of experts that several blocks share: router, experts, queues of limited length, balance.

Source: WideNet, arXiv 2107.11817, section 3; the balance loss is Switch Transformer's, arXiv 2101.03961.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optx._errors import OptxError
from optx.inject._own_loss import Collected


@dataclass(frozen=True)
class Routing:
    """How tokens find their experts.

    Attributes:
        top_k: experts of a token.
        capacity: an expert takes at most this times its even share of a call's tokens; None: all that come.
        eval_capacity: the same in evaluation mode.
        noise: standard deviation of what is added to the router's scores in training.
        balanced: whether calls in training collect how unevenly experts are used.
    """

    top_k: int
    capacity: float | None
    eval_capacity: float | None
    noise: float
    balanced: bool

    def limit(self, tokens: int, experts: int, training: bool) -> int | None:
        """How many tokens an expert takes of a call, at least one; None: any number."""
        capacity = self.capacity if training else self.eval_capacity
        return None if capacity is None else max(int(capacity * self.top_k * tokens / experts), 1)


class Queues(NamedTuple):
    """Which tokens each expert takes.

    Attributes:
        picks: (n,) of the choices, token by token and K of each, those that were taken: expert by expert, in
            the order of tokens.
        places: (tokens * K,) where each choice is among these; n if it was dropped.
        sizes: how many each expert takes.
    """

    picks: Tensor
    places: Tensor
    sizes: list[int]


def queued(chosen: Tensor, experts: int, limit: int | None) -> Queues:
    """The queues of a call.

    Args:
        chosen: (tokens, K), each token's experts.
        experts: how many there are.
        limit: of a queue; who comes later is dropped.
    """
    flat = chosen.flatten()
    picks = flat.argsort(stable=True)
    counts = flat.bincount(minlength=experts)
    if limit is not None:
        starts = counts.cumsum(0) - counts
        turn = torch.arange(len(flat), device=flat.device) - starts[flat[picks]]
        picks = picks[turn < limit]
        counts = counts.clamp(max=limit)
    places = torch.full_like(flat, len(picks))
    places[picks] = torch.arange(len(picks), device=flat.device)
    return Queues(picks, places, counts.tolist())


class _Moved(torch.autograd.Function):
    """Rows of tokens to the queues (``out``), or from the queues to the sum over a token's K choices.

    Each is the other's gradient, so that neither direction adds rows in an order that changes.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, picks: Tensor, places: Tensor, k: int, out: bool) -> Tensor:
        if out:
            return rows.index_select(0, picks // k)
        if len(picks) < len(places):  # the dropped ones' is 0
            rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
        each = places.view(-1, k).unbind(1)
        total = rows.index_select(0, each[0])
        for one in each[1:]:
            total += rows.index_select(0, one)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, picks, places, ctx.k, ctx.out = inputs
        ctx.save_for_backward(picks, places)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        picks, places = ctx.saved_tensors
        return _Moved.apply(grads[0], picks, places, ctx.k, not ctx.out), None, None, None, None


def evenness(chosen: Tensor, chances: Tensor) -> tuple[Tensor, Tensor]:
    """The balance loss without its weight, and the load of each expert.

    Args:
        chosen: (tokens, K), each token's experts.
        chances: (tokens, E), what the router gave.

    Returns:
        E sum_e f_e P_e, a scalar whose gradient is P's alone; f, (E,): the shares of all choices.
    """
    experts = chances.shape[1]
    load = chosen.flatten().bincount(minlength=experts).to(chances.dtype) / max(chosen.numel(), 1)
    mean = chances.sum(0) / max(len(chances), 1)  # of an empty batch 0
    return experts * (load * mean).sum(), load


class Mixture(nn.Module):
    """Takes a feed-forward module's place in every block.

    Args:
        experts: modules of its kind.
        router: from a token to the experts' scores.
        routing: how tokens find them.
        collected: what a handle's parts share.

    Attributes:
        depth: the block that calls it now.
        loads: the share of choices that each expert had in the last call in training, by block.
        dropped: the share of choices that found a full queue in it.
    """

    def __init__(
        self, experts: nn.ModuleList, router: nn.Linear, routing: Routing, collected: Collected
    ) -> None:
        super().__init__()
        self.router, self.experts = router, experts
        self.routing, self.collected = routing, collected
        self.depth = ""
        self.loads: dict[str, Tensor] = {}
        self.dropped: dict[str, float] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "loads": {}, "dropped": {}}

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What a token's experts make of it, times the router's chances, which are not made to sum to 1.

        Args:
            x: (..., width).
            *args: none; and
            **kwargs: none: an expert would have to know which of their rows are its own.

        Raises:
            OptxError: there are any, or an expert returns no tensor.
        """
        if any(value is not None for value in (*args, *kwargs.values())):
            raise OptxError(
                f"WideNet: the FFN of {self.depth!r} is called with more than its tokens, which the experts "
                "can't have. Leave these blocks out of targets."
            )
        tokens = x.reshape(-1, x.shape[-1])
        chances = self._chances(tokens)
        gates, chosen = chances.topk(self.routing.top_k, dim=-1)
        limit = self.routing.limit(len(tokens), len(self.experts), self.training)
        queues = queued(chosen, len(self.experts), limit)
        if self.training:
            self._note(chosen, chances, queues)
        return self._mixed(x, tokens, gates, queues)

    def _chances(self, tokens: Tensor) -> Tensor:
        with torch.autocast(tokens.device.type, enabled=False):
            wide = torch.promote_types(tokens.dtype, torch.float32)
            scores = F.linear(tokens.to(wide), self.router.weight.to(wide))
            if self.training and self.routing.noise:
                scores = scores + self.routing.noise * torch.randn_like(scores)
            return scores.softmax(-1)

    def _note(self, chosen: Tensor, chances: Tensor, queues: Queues) -> None:
        value, load = evenness(chosen, chances)
        self.loads[self.depth] = load.detach()
        self.dropped[self.depth] = 1 - len(queues.picks) / max(chosen.numel(), 1)
        if self.routing.balanced:
            self.collected.add(self.depth, value)

    def _mixed(self, x: Tensor, tokens: Tensor, gates: Tensor, queues: Queues) -> Tensor:
        k, lead = self.routing.top_k, (1,) * (x.ndim - 2)
        picks, places, sizes = queues
        rows = _Moved.apply(tokens, picks, places, k, True)
        made: list[Tensor] = []
        for expert, piece in zip(self.experts, rows.split(sizes), strict=True):  # type: ignore[union-attr]
            one = expert(piece.view(*lead, *piece.shape))
            if not isinstance(one, Tensor):
                raise OptxError(
                    f"WideNet: the FFN of {self.depth!r} returns a {type(one).__name__} and no tensor. Leave "
                    "these blocks out of targets."
                )
            made.append(one.reshape(-1, one.shape[-1]))
        together = torch.cat(made)
        together = together * gates.flatten().index_select(0, picks).to(together.dtype).unsqueeze(1)
        y: Any = _Moved.apply(together, picks, places, k, False)
        return y.view(*x.shape[:-1], together.shape[-1])
