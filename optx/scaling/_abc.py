"""Parametrisations of a network's width, told apart by three exponents a layer.

Source: Yang, Hu, "Feature Learning in Infinite-Width Neural Networks" (Tensor Programs IV), arXiv 2011.14522,
section 3; for Adam the same argument with updates of entries of size 1 (arXiv 2308.01814).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from numbers import Rational, Real
from typing import Any

from optx._errors import OptxError, check_choice, check_whole
from optx.scaling._rules_of_width import Decay, Family, Powers, Row, Scale, Table
from optx.scaling._width import Width

Exponent = int | float | str | Fraction
TOLERANCE = Fraction(1, 10**9)
_DENOMINATORS = 1000  # a float this near to such a fraction is meant to be it
OPTIMIZERS: tuple[Family, ...] = ("sgd", "adam")
NAMES = ("standard", "ntk", "mup", "mean_field")


@dataclass(frozen=True)
class Classification:
    """What becomes of a network in a parametrisation, as it grows wide; by `ABC.classify`.

    Attributes:
        stable: neither features nor outputs blow up, at the start or in training.
        trivial: stable, and the function doesn't change in training.
        regime: ``"features"`` (hidden features change), ``"kernel"`` (only the function does: it is trained
            as by a fixed kernel), ``"trivial"`` or ``"unstable"``.
        r: features change in a step by width^-r; exact.
        reasons: the conditions of stability that fail, in words; empty if it is stable.
    """

    stable: bool
    trivial: bool
    regime: str
    r: Fraction
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class ABC:
    """A parametrisation: layer l has weights ``width^-a w``, ``w ~ N(0, width^-2b)``, rate ``lr width^-c``.

    Made by `optx.scaling.abc` or `ABC.named`. The first exponents are those of input weights, the last those
    of the readout, what is between is hidden.

    Attributes:
        a: of the multiplier, by layer; exact fractions, as all others.
        b: of the standard deviation at the start.
        c: of the learning rate with which w (not the product) is trained.
        optimizer: ``"sgd"`` or ``"adam"``: which one the exponents c are for.
        name: what it is called.
    """

    a: tuple[Fraction, ...]
    b: tuple[Fraction, ...]
    c: tuple[Fraction, ...]
    optimizer: Family = "sgd"
    name: str = "abc"

    def __str__(self) -> str:
        """Its rows of exponents."""
        rows = (("a", self.a), ("b", self.b), ("c", self.c))
        texts = (f"{letter} = ({', '.join(map(str, row))})" for letter, row in rows)
        return f"{self.name}, {self.optimizer}: {', '.join(texts)}"

    @property
    def hidden(self) -> int:
        """L: how many hidden layers of neurons there are, one less than weights."""
        return len(self.a) - 1

    @classmethod
    def named(cls, name: str, hidden: int = 2, optimizer: Family = "sgd") -> ABC:
        """A known parametrisation at any depth.

        Args:
            name: ``"standard"`` (no multipliers, initial weights over sqrt(fan-in), one rate for all widths:
                blows up), ``"ntk"`` (the kernel regime), ``"mup"`` (features, the maximal update) or
                ``"mean_field"`` (muP in the form with initial weights of size 1; for one hidden layer the
                readout over the width and a rate times the width).
            hidden: L, at least 1.
            optimizer: for Adam all but ``"standard"`` have a rate of its own in each layer.

        Raises:
            OptxError: an argument is none of these.
        """
        check_choice("ABC.named", "name", name, NAMES)
        check_whole("ABC.named", "hidden", hidden, 1)
        check_choice("ABC.named", "optimizer", optimizer, OPTIMIZERS)
        half, zero, inner = Fraction(1, 2), Fraction(0), hidden - 1
        within = lambda first, between, last: (first, *[between] * inner, last)  # noqa: E731
        if name == "standard":
            a, b, c = within(zero, zero, zero), within(zero, half, half), within(zero, zero, zero)
            return cls(a, b, c, optimizer, name)
        # Adam's steps don't shrink with gradients: a rate over a layer's multiplier, and over its fan-in.
        c = within(zero, zero, zero) if optimizer == "sgd" else within(half, Fraction(1), half)
        if name == "ntk":
            return cls(within(zero, half, half), within(zero, zero, zero), c, optimizer, name)
        mup = cls(within(-half, zero, half), within(half, half, half), c, optimizer, "mup")
        return mup if name == "mup" else replace(mup.shift(half), name=name)

    def shift(self, theta: Exponent) -> ABC:
        """The same training of the same function in other words: theta from the weights to the multipliers.

        ``(a, b, c)`` becomes ``(a + theta, b - theta, c - 2 theta)``; with Adam, whose steps don't grow with
        the gradient, ``c - theta``.
        """
        by = _exact("shift", "theta", theta)
        rate = 2 * by if self.optimizer == "sgd" else by
        a, b, c = (
            tuple(x + change for x in exponents)
            for exponents, change in ((self.a, by), (self.b, -by), (self.c, -rate))
        )
        return replace(self, a=a, b=b, c=c)

    def classify(self) -> Classification:
        """Whether it is stable, trivial, of the kernel regime or learns features, and at which rate r."""
        r = self._r()
        out = self.a[-1] + self.b[-1]
        moved = self._readout_moves()
        first = self.a[0] + self.b[0]
        between = [x + y for x, y in zip(self.a[1:-1], self.b[1:-1], strict=True)]
        conditions = {
            f"a + b of the first layer is {first}, not 0": _is(first, 0),
            "a + b of each hidden layer is 1/2": all(_is(x, Fraction(1, 2)) for x in between),
            f"a + b of the readout is {out}, less than 1/2": out >= Fraction(1, 2) - TOLERANCE,
            f"r is {r}, less than 0: features blow up": r >= -TOLERANCE,
            f"the readout's steps change the output by width^{1 - moved}": moved >= 1 - TOLERANCE,
            f"the features' change changes the output by width^{1 - out - r}": out + r >= 1 - TOLERANCE,
        }
        failed = tuple(
            text.replace("is 1/2", f"is {', '.join(map(str, between))}, not 1/2")
            for text, holds in conditions.items()
            if not holds
        )
        if failed:
            return Classification(False, False, "unstable", r, failed)
        if not (_is(out + r, 1) or _is(moved, 1)):
            return Classification(True, True, "trivial", r)
        return Classification(True, False, "features" if _is(r, 0) else "kernel", r)

    def scale(self, width: Width, family: Family, decay: Decay) -> Scale:
        """The factors of one parameter, for `optx.scaling.mup` and the rest of it.

        Raises:
            OptxError: the exponents are for the other family of optimizers, or for a network without such a
                parameter, or there are several hidden layers' that it may be of.
        """
        if family != self.optimizer:
            raise OptxError(
                f"{self.name}: these exponents are for {self.optimizer}, and the optimizer is of the family "
                f"of {family}. Make them with optimizer={family!r}."
            )
        if width.kind == "matrix" and len(set(self._layers()[1:-1])) != 1:
            several = f"{self.hidden - 1} such layers, not all alike" if self.hidden > 1 else "no such layer"
            raise OptxError(
                f"{self.name}: {width.name!r} is a hidden layer's weight, and the exponents are those of "
                f"{several}. Give those of one."
            )
        return self._table().scale(width, family, decay)

    def _table(self) -> Table:
        """Powers of width for each kind of parameter; its width is the fan-in's, else the fan-out's.

        Weight decay follows its rules where features are learnt, for which they were made.
        """
        gradient = self.a[-1] + min(self.b[-1], self.c[-1])  # of the last features; what Adam's eps follows
        layers = self._layers()
        a, _, c = layers[0]
        rate = (
            c + (2 if self.optimizer == "sgd" else 1) * a
        )  # the first layer's, shifted to a multiplier of 1
        rows = {
            "input": _row(layers[0], (0.0, float(-a - gradient)), of_fan_in=False),
            "vector": _row((Fraction(0), Fraction(0), rate), (0.0, float(-gradient)), of_fan_in=False),
            "output": _row(layers[-1], (float(-self.a[-1]), 0.0), of_fan_in=True),
        }
        for layer in layers[1:-1]:
            rows["matrix"] = _row(layer, (float(-layer[0]), float(-gradient)), of_fan_in=True)
        return Table(self.name, rows, decays=self.classify().regime == "features")

    def _layers(self) -> list[tuple[Fraction, Fraction, Fraction]]:
        return list(zip(self.a, self.b, self.c, strict=True))

    def _r(self) -> Fraction:
        """Section 3.2: the least over the layers of how their own steps change their features."""
        if self.optimizer == "adam":  # a gradient's size has no effect
            return min(a + c - (layer > 0) for layer, a, c in self._hidden_layers())
        gradient = min(self.a[-1] + self.b[-1], 2 * self.a[-1] + self.c[-1])
        return gradient - 1 + min(2 * a + c + (layer == 0) for layer, a, c in self._hidden_layers())

    def _readout_moves(self) -> Fraction:
        """2 a + c of the readout: its steps change the output by width^(1 - this)."""
        return (2 if self.optimizer == "sgd" else 1) * self.a[-1] + self.c[-1]

    def _hidden_layers(self) -> Iterable[tuple[int, Fraction, Fraction]]:
        return zip(range(self.hidden), self.a[:-1], self.c[:-1], strict=True)


def abc(
    a: Sequence[Exponent],
    b: Sequence[Exponent],
    c: Exponent | Sequence[Exponent],
    *,
    optimizer: Family = "sgd",
) -> ABC:
    """A parametrisation of width by its exponents, which say whether it is stable and learns features.

    Layer l of a network of width n has weights ``n^-a_l w``, ``w ~ N(0, n^-2 b_l)``, and trains w at a rate
    ``lr n^-c``. `ABC.classify` says what becomes of it as n grows, `ABC.shift` gives its equals,
    ``ABC.named("mup", hidden=3)`` the known ones. `optx.scaling.mup`, `optx.scaling.init_` and
    `optx.MuReadout` take it, or its name, as ``parametrization=``.

    Args:
        a: exponents of the multipliers, first layer to readout; whole numbers, fractions, strings such as
            ``"1/2"``, or floats (one within 1e-9 of a fraction of up to 1000 is that fraction).
        b: those of the initial standard deviation; as many.
        c: that of the learning rate, one for all layers or one a layer.
        optimizer: ``"sgd"`` or ``"adam"``: which one it is for.

    Returns:
        An `ABC`; equal ones compare equal.

    Paper values:
        SGD, L hidden layers. Standard: a = 0, b = (0, 1/2, ..., 1/2), c = 0, unstable; c = 1 is a kernel.
        NTK: a = (0, 1/2, ..., 1/2), b = 0, c = 0. Maximal update: a = (-1/2, 0, ..., 0, 1/2), b = 1/2, c = 0.
        Mean field, for L = 1: a = (0, 1), b = 0, c = -1, which is the maximal update's ``shift("1/2")``; that
        shift is what ``ABC.named("mean_field")`` is at any depth, where 1/n in every layer would be trivial.

    Limits: It says nothing of biases and norms: in `optx.scaling.mup` they are trained as input weights whose
        multiplier is 1 and keep what they start with. All hidden layers must have one exponent there. For
        Adam, the conditions are those of steps of entries of size 1, with betas and eps out of the way.

    Keywords: muP, maximal update, NTK, neural tangent kernel, mean field, infinite width, feature learning.

    Evidence: ``test_abc.py``, ``test_abc_networks.py``; no recipe.

    Source: "Feature Learning in Infinite-Width Neural Networks", Tensor Programs IV, arXiv 2011.14522.

    Raises:
        OptxError: the lengths differ or are below 2, an exponent is no number, the optimizer is another.

    Example:
        >>> import optx
        >>> ntk = optx.scaling.abc([0, 1 / 2, 1 / 2], [0, 0, 0], 0)
        >>> ntk.classify().regime, str(ntk.classify().r)
        ('kernel', '1/2')
    """
    check_choice("abc", "optimizer", optimizer, OPTIMIZERS)
    first, second = _exponents("a", a), _exponents("b", b)
    rates = _exponents("c", c if _is_row(c) else [c] * len(first))
    if not len(first) == len(second) == len(rates) or len(first) < 2:
        raise OptxError(
            f"abc: a, b and c have {len(first)}, {len(second)} and {len(rates)} exponents; they need one for "
            "each layer of weights, the first and the readout at least."
        )
    return ABC(first, second, rates, optimizer)


def _row(exponents: tuple[Fraction, Fraction, Fraction], eps: Powers, *, of_fan_in: bool) -> Row:
    a, b, c = ((float(-x), 0.0) if of_fan_in else (0.0, float(-x)) for x in exponents)
    return Row(forward=a, init=b, adam=c, sgd=c, eps=eps)


def _is_row(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str)


def _exponents(argument: str, values: Any) -> tuple[Fraction, ...]:
    if not _is_row(values):
        raise OptxError(
            f"abc: {argument} is {values!r}; it must be a row of exponents, one a layer of weights."
        )
    return tuple(_exact("abc", argument, value) for value in values)


def _exact(owner: str, argument: str, value: Any) -> Fraction:
    """As a fraction; a float that is nearly one with a small denominator is that."""
    try:
        if not isinstance(value, bool) and isinstance(value, Rational | str):
            return Fraction(value)
        if not isinstance(value, bool) and isinstance(value, Real):
            exact = Fraction(float(value))
            plain = exact.limit_denominator(_DENOMINATORS)
            return plain if abs(plain - exact) <= TOLERANCE else exact
    except (ValueError, OverflowError, ZeroDivisionError):  # "half", nan, inf, "1/0"
        pass
    raise OptxError(
        f"{owner}: {argument} holds {value!r}; exponents are numbers, or fractions such as '1/2'."
    )


def _is(value: Fraction, wanted: int | Fraction) -> bool:
    return abs(value - wanted) <= TOLERANCE
