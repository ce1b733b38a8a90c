"""Hyperparameters that are tuned while a model is trained: ranges, perturbations, and what a loop reads.

Source: STN, arXiv 1903.03088, section 3 and appendix; the maps are those of its official code, with a stable
inverse softplus, and with the whole numbers of a range all within reach.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optx._errors import OptxError, check_choice, near
from optx._expression import expression
from optx.inject._draw import Axes, Calls, Draw


def inverse_softplus(value: float) -> float:
    """The number whose softplus is ``value`` > 0, for the smallest and the largest alike."""
    return value + math.log(-math.expm1(-value))


@dataclass(frozen=True)
class HParam:
    """What `optx.hp` describes; ``low`` and ``high`` are None where there is no bound."""

    value: float
    low: float | None = None
    high: float | None = None
    sigma: float = 0.5
    discrete: bool = False
    shared: bool = False

    def arguments(self) -> dict[str, Any]:
        """What `optx.hp` takes to make it."""
        bounds = None if self.low is None and self.high is None else (self.low, self.high)
        kept = {"sigma": self.sigma, "discrete": self.discrete, "shared": self.shared}
        return {"value": self.value, "range": bounds, **kept}

    def __repr__(self) -> str:
        return expression(hp, self.arguments())

    @property
    def tuned(self) -> bool:
        """Whether it is perturbed and tuned, and not held at its value."""
        return self.sigma > 0

    @property
    def _top(self) -> float | None:
        """The upper end of the map: the largest whole number has a cell of its own too."""
        return self.high if self.high is None or not self.discrete else self.high + 1

    def constrained(self, raw: Tensor) -> Tensor:
        """The value of an unconstrained number: float, or int64 if it is discrete."""
        low, top = self.low, self._top
        if low is not None and top is not None:
            value = low + (top - low) * torch.sigmoid(raw)
        elif low is not None:
            value = low + F.softplus(raw)
        elif top is not None:
            value = top - F.softplus(raw)
        else:
            value = raw
        if not self.discrete:
            return value
        return (
            value.floor().clamp(low, self.high).long() if (low, top) != (None, None) else value.floor().long()
        )

    def raw(self) -> float:
        """The unconstrained number of ``value``; of a whole number, the middle of its cell."""
        value = self.value + 0.5 if self.discrete else self.value
        low, top = self.low, self._top
        if low is not None and top is not None:
            share = (value - low) / (top - low)
            return math.log(share) - math.log1p(-share)
        if low is not None:
            return inverse_softplus(value - low)
        return inverse_softplus(top - value) if top is not None else value


def hp(
    value: float,
    range: tuple[float | None, float | None] | None = None,
    *,
    sigma: float = 0.5,
    discrete: bool = False,
    shared: bool = False,
) -> HParam:
    """One hyperparameter of `optx.HParams`.

    Args:
        value: where it starts.
        range: its lower and upper bound, None for an end without one: (0, 0.9) for a rate, (0, None) for a
            weight decay; None alone: any number. A continuous value lies strictly inside, a discrete one may
            be a bound.
        sigma: the standard deviation of its perturbations, before the map to its range. 0: it is held,
            neither perturbed nor tuned.
        discrete: whole numbers.
        shared: all examples of a batch have one perturbation: for what can't differ among them.

    Raises:
        OptxError: a value outside of its range, or a range that has no inside.
    """
    low, high = _bounds(range)
    if not _is_number(value):
        raise OptxError(f"hp: value is {value!r}; it must be a finite number.")
    if not _is_number(sigma) or sigma < 0:
        raise OptxError(f"hp: sigma is {sigma!r}; it must be a finite number of at least 0.")
    if 0 < sigma < 1e-30:  # its softplus would be 0 in float32, and the entropy's slope no number
        raise OptxError(f"hp: sigma is {sigma!r}; it must be 0 or at least 1e-30.")
    check_choice("hp", "discrete", discrete, (True, False))
    check_choice("hp", "shared", shared, (True, False))
    if discrete and any(one is not None and one != int(one) for one in (value, low, high)):
        raise OptxError(f"hp: value={value!r} and range={range!r} must be whole numbers if discrete=True.")
    inside = (low is None or low < value) and (high is None or value < high)
    if not inside and not (discrete and value in (low, high)):
        between = f"{'-inf' if low is None else low} and {'inf' if high is None else high}"
        how = "from {} to {}".format(*between.split(" and ")) if discrete else f"strictly between {between}"
        raise OptxError(f"hp: value is {value!r}; it must lie {how}, its range.")
    return HParam(float(value), low, high, float(sigma), bool(discrete), bool(shared))


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)  # NumPy's too


def _bounds(given: Any) -> tuple[float | None, float | None]:
    if given is None:
        return None, None
    pair = isinstance(given, tuple | list) and len(given) == 2  # pyright: ignore[reportUnknownArgumentType]
    if not pair or any(one is not None and not _is_number(one) for one in given):
        raise OptxError(
            f"hp: range is {given!r}; it must be (low, high), with None for an end without bound."
        )
    low, high = (None if one is None else float(one) for one in given)
    if low is not None and high is not None and low >= high:
        raise OptxError(f"hp: range is {given!r}; its low must be below its high.")
    return low, high


class HParams:
    """The hyperparameters that `optx.STN` tunes, by name; a loop reads them as ``hparams["drop"].value``.

    Within ``stn.train_batch`` a value is a tensor (B,), perturbed for each example, else a single number: the
    one that is in force. They are no parameters of the model, so no optimizer of weights gets or decays them.

    Args:
        **specs: each by `optx.hp`.

    Attributes:
        raw: the unconstrained numbers, (H,) (the paper's lambda).
        raw_sigma: of the scales, (H,): sigma is its softplus; 0 where a hyperparameter is held.
        tuned: which are not held, (H,).

    Raises:
        OptxError: none is given, or one is not made by `optx.hp`.

    Example:
        >>> import optx
        >>> hparams = optx.HParams(drop=optx.hp(0.05, (0, 0.9)), cut=optx.hp(4, (0, 24), discrete=True))
        >>> hparams["cut"].value
        tensor(4)
    """

    def __init__(self, **specs: HParam) -> None:
        if not specs:
            raise OptxError("HParams: none is given; pass some by name, as drop=optx.hp(0.05, (0, 0.9)).")
        for name, spec in specs.items():
            if not isinstance(spec, HParam):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise OptxError(f"HParams: {name} is {spec!r}; it must be made by optx.hp.")
            if name == "batches" or name.removeprefix("sigma ") in set(specs) - {name}:
                raise OptxError(f"HParams: {name!r} is what stn.history calls something else; rename it.")
        self.specs = dict(specs)
        self._place = {name: i for i, name in enumerate(specs)}
        each = list(specs.values())
        # In float64 until `bind` knows the model: what is rounded once stays what it was.
        self.raw = nn.Parameter(torch.tensor([one.raw() for one in each], dtype=torch.float64))
        sigmas = [inverse_softplus(one.sigma) if one.tuned else 0.0 for one in each]
        self.raw_sigma = nn.Parameter(torch.tensor(sigmas, dtype=torch.float64))
        self.tuned = torch.tensor([one.tuned for one in each])
        self.draw: Draw | None = None
        self.calls, self.axes = Calls(), Axes()
        self.read: set[str] = set()
        """Those whose perturbed values something has asked for: the others can't be tuned."""
        self._user: weakref.ref[Any] | None = None

    # ---- what a loop reads --------------------------------------------------------------------------

    def __getitem__(self, name: str) -> Tunable:
        return Tunable(self, name, self.place(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def place(self, name: str) -> int:
        """Its column.

        Raises:
            OptxError: there is none of this name.
        """
        if name not in self._place:
            raise OptxError(f"HParams: no hyperparameter is called {name!r}. {near(str(name), self._place)}")
        return self._place[name]

    def values(self) -> dict[str, float]:
        """The values in force, without perturbations, as plain numbers."""
        raw = self.raw.detach()
        return {name: spec.constrained(raw[i]).item() for i, (name, spec) in enumerate(self.specs.items())}

    # ---- what modules and the driver read -----------------------------------------------------------

    @property
    def any_tuned(self) -> bool:
        """Whether at least one is not held."""
        return any(spec.tuned for spec in self.specs.values())

    def sigma(self) -> Tensor:
        """Scales of the perturbations, (H,), with their gradient; 0 where one is held."""
        return F.softplus(self.raw_sigma) * self.tuned.to(self.raw_sigma)

    def gate(self, centred: bool) -> Tensor | None:
        """What gates are linear in, (B, H) or (1, H); None where it is exactly 0.

        Args:
            centred: Delta-STN's: without the values in force, which keep their gradient.

        Raises:
            OptxError: a backward pass computes again, outside of the batch, what was computed within it.
        """
        draw, now = self.draw, self.raw.detach()
        if not self.any_tuned:
            return None
        self.calls.look(draw)
        if draw is not None and draw.dual is not None:
            return draw.dual
        if draw is not None and draw.valid:  # made anew at each call: every backward has a graph of its own
            gate = (self.raw - now if centred else self.raw)[None]
            gate = gate if draw.noise is None else gate + self.sigma() * draw.noise
        elif draw is not None and draw.shift is not None:
            gate = draw.shift if centred else now + draw.shift
        elif centred:
            return None
        else:
            gate = now[None]
        return gate * self.tuned.to(gate)

    @property
    def rows(self) -> int | None:
        """How many examples have hyperparameters of their own now; None: all share theirs."""
        return None if self.draw is None or self.draw.noise is None else self.draw.rows

    def axis(self, x: Tensor, where: str) -> int:
        """That of the examples in an input; ``where`` says of what, in an error."""
        return 0 if self.draw is None else self.axes.of(x, self.draw, where)

    def perturbed(self, index: int) -> Tensor | None:
        """The values of the batch, (B,) or (1,); None where they are the one in force; raises as `gate`."""
        draw, spec = self.draw, list(self.specs.values())[index]
        if spec.tuned:
            self.calls.look(draw)
        if draw is None or draw.valid or draw.shift is None or not spec.tuned:
            return None
        column = self.raw.detach()[index] + draw.shift[:, index]
        return spec.constrained(column[:1] if spec.shared else column)

    # ---- life ---------------------------------------------------------------------------------------

    def bind(self, user: object, like: Tensor) -> None:
        """Belong to one handle, and lie where its model does, in float32 or its own wider precision."""
        self.check_free()
        self.belong(user)
        dtype = torch.promote_types(like.dtype, torch.float32)
        for p in (self.raw, self.raw_sigma):
            p.data = p.data.to(like.device, dtype)
        self.tuned = self.tuned.to(like.device)

    def belong(self, user: object) -> None:
        """To one handle, as long as there is that."""
        self._user = weakref.ref(user)

    def release(self) -> None:
        """Be free for another handle; the values stay."""
        self._user = None

    def check_free(self) -> None:
        """Raise if they belong to a handle."""
        if self._user is not None and self._user() is not None:
            raise OptxError(
                "STN: these HParams are tuned on another model already; make new ones, or remove that handle."
            )

    def description(self) -> dict[str, dict[str, Any]]:
        """All of it as plain data; `from_description` reads it."""
        raw, scales = self.raw.tolist(), self.raw_sigma.tolist()
        return {
            name: {**asdict(spec), "raw": raw[i], "raw_sigma": scales[i]}
            for i, (name, spec) in enumerate(self.specs.items())
        }

    @classmethod
    def from_description(cls, given: Mapping[str, Mapping[str, Any]]) -> HParams:
        """What `description` described."""
        made: dict[str, HParam] = {}
        for name, one in given.items():
            bounds = None if one["low"] is None and one["high"] is None else (one["low"], one["high"])
            made[name] = hp(
                one["value"], bounds, sigma=one["sigma"], discrete=one["discrete"], shared=one["shared"]
            )
        hparams = cls(**made)
        for key, p in (("raw", hparams.raw), ("raw_sigma", hparams.raw_sigma)):
            p.data = torch.tensor([float(one[key]) for one in given.values()], dtype=torch.float64)
        return hparams

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_user": None}  # its own copy takes it, if there is one

    def arguments(self) -> dict[str, HParam]:
        """Each with the value and the scale in force, as `hp` takes them."""
        sigmas, values = self.sigma().tolist(), self.values()
        found: dict[str, HParam] = {}
        for i, (name, spec) in enumerate(self.specs.items()):
            start = torch.tensor(spec.raw(), dtype=torch.float64).to(self.raw.dtype)
            width = torch.tensor(inverse_softplus(spec.sigma) if spec.tuned else 0.0, dtype=torch.float64)
            value = spec.value if self.raw[i] == start else values[name]
            sigma = spec.sigma if self.raw_sigma[i] == width.to(self.raw_sigma.dtype) else sigmas[i]
            found[name] = replace(spec, value=value, sigma=sigma)
        return found

    def __repr__(self) -> str:
        return expression(type(self), self.arguments())


@dataclass(frozen=True)
class Tunable:
    """One hyperparameter, to be read at every batch."""

    hparams: HParams
    name: str
    index: int

    @property
    def spec(self) -> HParam:
        """Its range, and where it started."""
        return self.hparams.specs[self.name]

    @property
    def value(self) -> Tensor:
        """(B,) within ``stn.train_batch``, one for each example; else, and if it is shared, a single number.

        float, or int64 if it is discrete. It has no gradient: that reaches the hyperparameters by the gates.
        """
        found = self.hparams.perturbed(self.index)
        if found is None:
            return self.spec.constrained(self.hparams.raw.detach()[self.index])
        self.hparams.read.add(self.name)
        draw = self.hparams.draw
        return found[0] if self.spec.shared or (draw is not None and draw.rows is None) else found

    @property
    def sigma(self) -> float:
        """The scale of its perturbations now."""
        return float(self.hparams.sigma().detach()[self.index])
