"""A model is read into systems, layer by layer, each by what is known of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from optx._errors import OptxError
from optx.analysis.bounds import _linear, _slopes
from optx.analysis.bounds._graph import Graph
from optx.analysis.bounds._refusals import advice, check_finite, check_hooks, is_torchs, named, where
from optx.analysis.bounds._system import Builder, Slopes, System, Terms, Value
from optx.lipschitz._slopes import own_type
from optx.lipschitz.implicit import Implicit


@dataclass(frozen=True)
class Read:
    """A model, read.

    Attributes:
        systems: one after the other, as it was cut.
        product: the product of norms.
    """

    systems: list[System]
    product: float


def read(
    model: nn.Module,
    shape: tuple[int, ...],
    norm: str,
    split: int | None,
    declared: dict[type[nn.Module], tuple[float, float]],
) -> Read:
    """Read a model for inputs of a shape (without the batch).

    Args:
        model: left as it is, also after an error.
        shape: of one input.
        norm: ``"l2"`` or ``"linf"``, of the product.
        split: cut where so many activations have passed, and one value is all that goes on.
        declared: slopes of the user's own activations.
    """
    for path, module in model.named_modules():
        check_hooks(module, path)
    with torch.no_grad(), _parametrizations_at_rest(model):
        reader = _Reader(norm, split, declared)
        reader.begin(torch.Size(shape).numel())
        value = reader.module(model, "", Value(reader.builder.start(), shape, 1.0), can_cut=True)
        reader.end(value)
    return Read(reader.systems, value.gain)


@contextmanager
def _parametrizations_at_rest(model: nn.Module) -> Generator[None]:
    """Reading a weight runs its parametrization; that of a spectral norm moves its vectors in training
    mode."""
    lists = [one for one in model.modules() if isinstance(one, parametrize.ParametrizationList)]
    modes = [(one, one.training) for each in lists for one in each.modules()]
    try:
        for one, _ in modes:
            one.training = False
        yield
    finally:
        for one, mode in modes:
            one.training = mode


class _Tracer(fx.Tracer):
    """Traces down to what is known."""

    def __init__(self, is_known: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self._is_known = is_known

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self._is_known(m) or super().is_leaf_module(m, module_qualified_name)


class _Reader:
    """What is read so far, and what a layer makes of a value."""

    def __init__(
        self, norm: str, split: int | None, declared: dict[type[nn.Module], tuple[float, float]]
    ) -> None:
        self.norm, self.split, self.declared = norm, split, declared
        self.systems = list[System]()

    def begin(self, inputs: int) -> None:
        self.builder = Builder(inputs)

    def end(self, value: Value) -> None:
        self.systems.append(System(self.builder.inputs, self.builder.blocks, value.terms))

    # ---- modules -------------------------------------------------------------------------------------------

    def module(self, module: nn.Module, path: str, value: Value, can_cut: bool = False) -> Value:
        """What a module makes of a value."""
        with named(path, module):
            if _slopes.is_activation(module, self.declared):
                return self.activation(module, path, value)
            if _linear.is_linear(module):
                check_finite(module)
                return self.linear(_linear.linear_call(module), [value], own_type(module, _linear.RESHAPES))
            if isinstance(module, Implicit):
                return self.implicit(module, path, value)
            if form := getattr(module, "lipschitz_form", None):
                return self.form(form(), path, value)
            if is_torchs(module):
                raise OptxError(f"{type(module).__name__} has no quadratic constraint{advice(module)}")
        return self.graph(module, path, value, can_cut)

    def form(self, form: Any, path: str, value: Value) -> Value:
        """What a module says that it is."""
        if not isinstance(form, nn.Module):
            raise OptxError(f"lipschitz_form() returned a {type(form).__name__}; it must be a module")
        return self.module(form, path, value)

    def activation(self, module: nn.Module, path: str, value: Value) -> Value:
        known = _slopes.activation(module, value.shape, self.declared)
        name = path or type(module).__name__
        if isinstance(known, Slopes):
            if not bool(
                (known.low <= known.high).all() & known.low.isfinite().all() & known.high.isfinite().all()
            ):
                raise OptxError(f"{type(module).__name__} has slopes that are no interval of finite numbers")
            gain = float(torch.maximum(known.low.abs(), known.high.abs()).max())
            terms = self.builder.slopes(name, value.terms, known)
        else:
            gain = known.max_gain if self.norm == "linf" else 1.0
            terms = self.builder.groups(name, value.terms, known)
        return Value(terms, value.shape, value.gain * gain)

    def implicit(self, module: Implicit, path: str, value: Value) -> Value:
        """A fixed point of units that are given themselves."""
        if len(value.shape) != 1:
            raise OptxError(f"it is given a value of shape {value.shape}; it must be flat")
        W, U, C = (one.detach().to("cpu", torch.float64) for one in (module.W, module.U, module.C))
        if not all(bool(one.isfinite().all()) for one in (W, U, C)):
            raise OptxError("its weights are not finite everywhere")
        known = _slopes.activation(module.activation, (len(W),), self.declared)
        if not isinstance(known, Slopes):
            raise OptxError(
                f"{type(module.activation).__name__} acts on groups, and no activation that does is read "
                "there"
            )
        steepest = float(torch.maximum(known.low.abs(), known.high.abs()).max())
        given = {block: U @ old for block, old in value.terms.items()}
        terms = self.builder.implicit(path or type(module).__name__, given, W, known)
        own = steepest * norm_of(W, self.norm)
        gain = steepest * norm_of(U, self.norm) * norm_of(C, self.norm) / (1 - own) if own < 1 else math.inf
        return Value({block: C @ one for block, one in terms.items()}, (len(C),), value.gain * gain)

    def linear(self, call: Callable[..., Any], values: list[Value], what: Any) -> Value:
        """A linear map of values."""
        if what in _linear.RESHAPES:
            value = values[0]
            shape = call(torch.zeros(1, *value.shape, dtype=torch.float64)).shape
            if shape[0] != 1:
                raise OptxError("it mixes the batch with other dimensions")
            return Value(value.terms, tuple(shape[1:]), value.gain)
        made, shape = _linear.matrices(call, [value.shape for value in values])
        terms: Terms = {}
        for matrix, value in zip(made, values, strict=True):
            for block, old in value.terms.items():
                terms[block] = terms[block] + matrix @ old if block in terms else matrix @ old
        gain = sum(
            norm_of(matrix, self.norm) * value.gain for matrix, value in zip(made, values, strict=True)
        )
        if not math.isfinite(gain):
            raise OptxError("its weights are not finite everywhere, or their norms overflow")
        return Value(terms, shape, float(gain))

    # ---- graphs --------------------------------------------------------------------------------------------

    def graph(self, module: nn.Module, path: str, value: Value, can_cut: bool) -> Value:
        """What a module of the user's own, or a chain, makes of a value."""
        tracer = _Tracer(self.is_leaf)
        try:
            nodes = list(tracer.trace(module).nodes)
        except OptxError:
            raise
        except Exception as error:  # whatever a forward does with what has no numbers
            raise OptxError(
                f"lipschitz: {where(path, module)} cannot be read by torch.fx: {error} Its forward must be "
                "free of decisions by its input; or give the class a method lipschitz_form() that returns a "
                "module which can be read."
            ) from error
        return Graph(self, module, path, nodes, can_cut).run(value)

    def is_leaf(self, module: nn.Module) -> bool:
        known = _slopes.is_activation(module, self.declared) or _linear.is_linear(module)
        return known or isinstance(module, Implicit) or hasattr(module, "lipschitz_form")

    def cut(self, value: Value) -> Value:
        """End a system with a value, and begin the next one with it."""
        self.end(value)
        self.begin(torch.Size(value.shape).numel())
        return Value(self.builder.start(), value.shape, value.gain)


def norm_of(matrix: Tensor, norm: str) -> float:
    """Its operator norm, l2 to l2 or l_inf to l_inf, and a rounding error more."""
    if not matrix.numel():
        return 0.0
    found = matrix.abs().sum(1).max() if norm == "linf" else torch.linalg.matrix_norm(matrix, 2)
    return float(found) * (1 + 1e-13)
