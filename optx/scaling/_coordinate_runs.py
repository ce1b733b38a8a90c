"""One training run of a coordinate check: a model of some width with its optimizer, as asked for."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from optx._errors import OptxError, near
from optx._no_trace import model_kept
from optx.inject._part import RESERVED
from optx.scaling._coordinate_scaled import Parametrized
from optx.scaling._rules_of_width import Parametrization

Made = nn.Module | tuple[nn.Module, Optimizer]
Maker = Callable[[Any], Made]
OptimizerMaker = Callable[[nn.Module], Optimizer]

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"adamw": AdamW, "adam": Adam, "sgd": SGD}


class Run(NamedTuple):
    """A model and what trains it."""

    model: nn.Module
    optimizer: Optimizer


@dataclass
class Runs:
    """Makes the runs.

    Attributes:
        make: the user's.
        optimizer: a name, a function of the model, or None if ``make`` gives one.
        lr: for a name.
        parametrized: what is made of a model beyond what ``make`` does; None: nothing.
    """

    make: Maker
    optimizer: str | OptimizerMaker | None
    lr: float
    parametrized: Parametrized | None = None
    _names: list[str] | None = None
    _seen: weakref.WeakSet[nn.Module] = field(default_factory=weakref.WeakSet[nn.Module])

    @contextmanager
    def start(self, width: Any) -> Generator[Run]:
        """A run of a width; at the end the model has its weights again, should it be somebody's."""
        model, optimizer = self.build(width)
        with model_kept(model):
            if self.parametrized is None:
                yield Run(model, optimizer if optimizer is not None else self._plain(model))
            else:
                with self.parametrized.applied(model, self._plain) as scaled:
                    yield Run(model, scaled)

    def build(self, width: Any) -> tuple[nn.Module, Optimizer | None]:
        """What ``make`` gives, looked at."""
        try:
            made = self.make(width)
        except Exception as error:
            raise OptxError(
                f"coordinate_check: make({width!r}) raised {type(error).__name__}: {error}. Choose widths "
                "that the model can be built with."
            ) from error
        model, optimizer = made if isinstance(made, tuple) else (made, None)
        if not isinstance(cast(Any, model), nn.Module) or not isinstance(
            cast(Any, optimizer), Optimizer | None
        ):
            raise OptxError(
                f"coordinate_check: make({width!r}) gave {type(made).__name__}; it must give a "
                "torch.nn.Module, or a module and a torch.optim.Optimizer."
            )
        self._check_optimizer(width, optimizer)
        if model in self._seen:
            raise OptxError(
                f"coordinate_check: make({width!r}) gave a model that it had given before; each run trains "
                "its own, so make a new one in each call."
            )
        self._seen.add(model)
        self._check_names(width, model)
        return model, optimizer

    def _check_optimizer(self, width: Any, optimizer: Optimizer | None) -> None:
        if optimizer is None and self.optimizer is None:
            raise OptxError(
                f"coordinate_check: make({width!r}) gave a model alone; give optimizer='adamw' (or a "
                "function of the model), or let make return the model and its optimizer."
            )
        if optimizer is not None and self.optimizer is not None:
            raise OptxError(
                f"coordinate_check: make({width!r}) gave an optimizer, and optimizer={self.optimizer!r} is "
                "given too; one of them must go."
            )

    def _check_names(self, width: Any, model: nn.Module) -> None:
        names = [*dict(model.named_modules()), *(f"{n} (parameter)" for n, _ in model.named_parameters())]
        # A multiplier of width has nothing to do at the base's.
        names = [name for name in names if RESERVED not in name.split(".")]
        if self._names is None:
            self._names = names
        elif only := sorted(set(names) ^ set(self._names)):
            raise OptxError(
                f"coordinate_check: the model of width {width!r} and the first have different modules or "
                f"parameters: {only[0]!r} is in one of them only. They may differ in width, not in depth."
            )

    def _plain(self, model: nn.Module) -> Optimizer:
        if isinstance(self.optimizer, str):
            return OPTIMIZERS[self.optimizer](_trainable(model), lr=self.lr, weight_decay=0.0)
        assert self.optimizer is not None
        made: Any = self.optimizer(model)
        if not isinstance(made, Optimizer):
            raise OptxError(
                f"coordinate_check: optimizer(model) gave a {type(made).__name__}; it must give a "
                "torch.optim.Optimizer."
            )
        return made


def prepare(
    make: Maker,
    widths: Sequence[Any],
    optimizer: str | OptimizerMaker | None,
    lr: float,
    parametrization: str | Parametrization | None,
) -> Runs:
    """Check the options against each other, and make what all runs share."""
    if isinstance(optimizer, str) and optimizer not in OPTIMIZERS:
        raise OptxError(
            f"coordinate_check: optimizer is {optimizer!r}; it must be 'adamw', 'adam' or 'sgd', or a "
            f"function that makes one for a model. {near(optimizer, OPTIMIZERS)}"
        )
    known = optimizer is None or isinstance(optimizer, str) or callable(optimizer)
    if isinstance(optimizer, type) or not known:
        raise OptxError(
            f"coordinate_check: optimizer is {optimizer!r}; it must be a function of a model: lambda model: "
            "torch.optim.SGD(model.parameters(), lr=0.1)."
        )
    runs = Runs(make, optimizer, lr)
    if parametrization is not None:
        if optimizer is None:
            raise OptxError(
                "coordinate_check: with a parametrization, the optimizer is made here; give "
                "optimizer='adamw' (or a function of the model), and let make return the model alone."
            )
        base, wide = (runs.build(width)[0] for width in (widths[0], widths[-1]))
        runs.parametrized = Parametrized(parametrization, base, wide)
    return runs


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    found = [p for p in model.parameters() if p.requires_grad]
    if not found:
        raise OptxError("coordinate_check: the model has no parameter that requires a gradient.")
    return found
