"""What width does to each parameter: its multiplier, first size, learning rate, weight decay and eps.

Source: "Tensor Programs V", arXiv 2203.03466, tables 3, 8 and 9 (muP); "Robust Layerwise Scaling Rules by
Proper Weight Decay Tuning", arXiv 2510.15262 (decay proportional to the square root of width).

Everything is relative to the base width: at ratio 1 every factor is exactly 1 (but vectors do not decay under
``"sqrt"``, at any width).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from optx._errors import OptxError, check_choice, check_range, near
from optx.scaling._width import Width

Family = Literal["adam", "sgd"]
"""``"adam"``: an update's entries are as large as lr, whatever the gradient; ``"sgd"``: as lr * gradient."""

Decay = str | float
"""``"sqrt"``, ``"linear"`` or ``"none"``, or the exponent to use in place of ``"sqrt"``'s 1/2."""

DECAYS = ("sqrt", "linear", "none")
Powers = tuple[float, float]
"""Exponents of the ratios of fan-in and fan-out."""

_NOTHING: Powers = (0.0, 0.0)


@dataclass(frozen=True)
class Scale:
    """The factors of one parameter, each relative to the base width.

    Attributes:
        forward: what its weight is multiplied by in the forward pass.
        init: of the standard deviation that it begins with.
        lr: of the learning rate.
        weight_decay: of the weight decay, where the decay of a step is lr * weight_decay * w.
        eps: of Adam's eps: how its gradient's entries grow with width.
    """

    forward: float = 1.0
    init: float = 1.0
    lr: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0


@runtime_checkable
class Parametrization(Protocol):
    """What gives every parameter its `Scale`."""

    @property
    def name(self) -> str:
        """How messages call it."""
        ...

    def scale(self, width: Width, family: Family, decay: Decay) -> Scale:
        """The factors of one parameter under a family of optimizers."""
        ...


@dataclass(frozen=True)
class Row:
    """One kind of parameter in a table: powers of (fan-in, fan-out) for each factor of `Scale`."""

    forward: Powers = _NOTHING
    init: Powers = _NOTHING
    adam: Powers = _NOTHING
    sgd: Powers = _NOTHING
    eps: Powers = _NOTHING


@dataclass(frozen=True)
class Table:
    """A parametrization given by powers of width.

    Args:
        name: how messages call it.
        rows: by `Width.kind`; a kind without one has factors 1.
        decays: False leaves every weight decay as it is.
    """

    name: str
    rows: Mapping[str, Row]
    decays: bool = True

    def scale(self, width: Width, family: Family, decay: Decay) -> Scale:
        """The factors of one parameter."""
        check_choice(self.name, "family", family, ("adam", "sgd"))
        row = self.rows.get(width.kind, Row())
        lr = row.adam if family == "adam" else row.sgd
        return Scale(
            forward=_power(width, row.forward),
            init=_power(width, row.init),
            lr=_power(width, lr),
            weight_decay=decay_factor(width, lr, decay) if self.decays else 1.0,
            eps=_power(width, row.eps) if family == "adam" else 1.0,
        )


def at_first(parametrization: Parametrization, width: Width) -> Scale:
    """The factors of a parameter that no optimizer has a part in: ``forward`` and ``init``, all others 1.

    For initialisation and multipliers: `optx.scaling.abc`'s exponents are for one family of optimizers and
    refuse to speak for another.
    """
    family: Family = getattr(parametrization, "optimizer", "adam")
    scale = parametrization.scale(width, family, "none")
    return Scale(forward=scale.forward, init=scale.init)


def decay_factor(width: Width, lr: Powers, decay: Decay) -> float:
    """The factor of the weight decay, where the decay of a step is lr * weight_decay * w.

    Args:
        width: of the parameter.
        lr: the powers of width in its learning rate.
        decay: ``"linear"`` keeps lr * weight_decay as it is at the base width (the ``mup`` package's rule),
            ``"none"`` the weight decay itself. ``"sqrt"`` has lr * weight_decay fall with the square root of
            fan-in, a number with its power 1 - number, in matrices; all else does not decay (2510.15262).
    """
    check_decay("decay_factor", decay)
    if decay == "none":
        return 1.0
    if decay == "linear":
        return _power(width, (-lr[0], -lr[1]))
    if width.kind != "matrix":
        return 0.0
    exponent = 0.5 if isinstance(decay, str) else float(decay)
    return _power(width, (exponent - 1.0 - lr[0], -lr[1]))


def check_decay(owner: str, decay: Any) -> None:
    """Raise unless it is one of `Decay`."""
    if isinstance(decay, str):
        check_choice(owner, "decay", decay, DECAYS)
    elif isinstance(decay, bool):
        raise OptxError(f"{owner}: decay is {decay!r}; it must be one of {', '.join(map(repr, DECAYS))}.")
    else:
        check_range(owner, "decay_exponent", decay, 0.0, 2.0)


def _power(width: Width, powers: Powers) -> float:
    # 49 ** -1.0 need not be 1 / 49, and the peer package divides.
    fans = (width.fan_in, width.fan_out)
    return math.prod(1.0 / x if p == -1.0 else x**p for x, p in zip(fans, powers, strict=True))


# The gradient of a pre-activation falls as 1 / width where the readout does, so that of every weight before
# the readout does; the readout's own, as it is in the function that all tables share, is of size 1. A
# weight that is multiplied by M in the forward pass has M times the gradient, and Adam's eps follows it.
_HIDDEN = Row(init=(-0.5, 0.0), adam=(-1.0, 0.0), sgd=(-1.0, 1.0), eps=(0.0, -1.0))
_INPUT = Row(sgd=(0.0, 1.0), eps=(0.0, -1.0))

MUP = Table(
    "mup",
    {
        "matrix": _HIDDEN,
        "input": _INPUT,
        "vector": _INPUT,
        "output": Row(forward=(-1.0, 0.0), sgd=(1.0, 0.0), eps=(-1.0, 0.0)),
    },
)
MUP_TABLE_3 = Table(
    "mup-table3",
    {
        "matrix": _HIDDEN,
        "input": _INPUT,
        "vector": _INPUT,
        "output": Row(init=(-1.0, 0.0), adam=(-1.0, 0.0), sgd=(-1.0, 0.0)),
    },
)
# Biases and gains stay as in table 8: a parameter's own multiplier changes nothing that is learnt (lemma
# J.1),
# and a bias can't be multiplied apart from its layer's output.
MUP_TABLE_9 = Table(
    "mup-table9",
    {
        "matrix": _HIDDEN,
        "input": Row(forward=(0.0, 0.5), init=(0.0, -0.5), adam=(0.0, -0.5), eps=(0.0, -0.5)),
        "vector": _INPUT,
        "output": Row(forward=(-0.5, 0.0), init=(-0.5, 0.0), adam=(-0.5, 0.0), eps=(-0.5, 0.0)),
    },
)
_FAN_IN = Row(init=(-0.5, 0.0))
STANDARD = Table("standard", {"matrix": _FAN_IN, "output": _FAN_IN}, decays=False)

# `optx.scaling.ABC.named` has where these two come from. Neither has a rule of weight decay of its own, but
# the mean field's is another form of muP.
NTK = Table(
    "ntk",
    {
        "matrix": Row(forward=(-0.5, 0.0), adam=(-1.0, 0.0), eps=(-0.5, -0.5)),
        "input": Row(adam=(0.0, -0.5), eps=(0.0, -0.5)),
        "vector": Row(adam=(0.0, -0.5), eps=(0.0, -0.5)),
        "output": Row(forward=(-0.5, 0.0), adam=(-0.5, 0.0), eps=(-0.5, 0.0)),
    },
    decays=False,
)
MEAN_FIELD = Table(
    "mean_field",
    {
        "matrix": Row(forward=(-0.5, 0.0), adam=(-0.5, 0.0), sgd=(1.0, 0.0), eps=(-0.5, -1.0)),
        "input": _INPUT,
        "vector": _INPUT,
        "output": Row(forward=(-1.0, 0.0), sgd=(1.0, 0.0), eps=(-1.0, 0.0)),
    },
)

_TABLES = (MUP, MUP_TABLE_3, MUP_TABLE_9, STANDARD, NTK, MEAN_FIELD)
NAMED: dict[str, Parametrization] = {table.name: table for table in _TABLES}


def parametrization_of(owner: str, given: str | Parametrization) -> Parametrization:
    """A parametrization by its name, or itself.

    Raises:
        OptxError: no parametrization has that name.
    """
    if isinstance(given, str):
        if given not in NAMED:
            raise OptxError(f"{owner}: parametrization is {given!r}, which is none. {near(given, NAMED)}")
        return NAMED[given]
    if not isinstance(given, Parametrization):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise OptxError(
            f"{owner}: parametrization is a {type(given).__name__}; it must be what optx.scaling.abc "
            f"returns, or a name: {', '.join(NAMED)}."
        )
    return given
