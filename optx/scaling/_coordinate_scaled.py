"""A model under a parametrization, in one step: its first weights, its multipliers and its param groups."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager

from torch import nn
from torch.optim import Optimizer

from optx.inject._attach import attach
from optx.scaling._compare import shapes
from optx.scaling._init import init_
from optx.scaling._mup import mup
from optx.scaling._rules_of_width import Parametrization, at_first, parametrization_of
from optx.scaling._shapes import Shapes
from optx.scaling.mu_attention import MuAttention
from optx.scaling.mu_readout import MuReadout


class Parametrized:
    """What runs of all widths share.

    Args:
        parametrization: as `optx.scaling.mup` takes it.
        base: the model of the smallest width, whose learning rate is given.
        wide: one of another width.
    """

    def __init__(self, parametrization: str | Parametrization, base: nn.Module, wide: nn.Module) -> None:
        self.rules = parametrization_of("coordinate_check", parametrization)
        self.base: Shapes = shapes(wide, base=base)

    @contextmanager
    def applied(
        self, model: nn.Module, make_optimizer: Callable[[nn.Module], Optimizer]
    ) -> Generator[Optimizer]:
        """The model's optimizer; what was attached to the model is taken off at the end."""
        own = shapes(model, base=self.base)
        init_(model, own, self.rules)
        with ExitStack() as attached:
            if _has_factors(own, self.rules):
                attached.enter_context(attach(model, MuReadout(own, parametrization=self.rules)))
            # Heads that are as wide as the base's keep their scale; muP alone has a rule for others.
            if self.rules.name.startswith("mup") and any(h.width != h.base_width for h in own.heads.values()):
                attached.enter_context(attach(model, MuAttention(own)))
            optimizer = make_optimizer(model)
            mup(optimizer, own, parametrization=self.rules, model=model)
            yield optimizer


def _has_factors(own: Shapes, rules: Parametrization) -> bool:
    """Whether anything is multiplied in the forward pass: at the base's width nothing is."""
    used = [*own.values(), *(w.read_out() for w in own.values() if w.is_table and w.tied)]
    return any(at_first(rules, width).forward != 1.0 for width in used)
