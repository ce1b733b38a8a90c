"""The forms that act on hidden vectors, f(x W_down + b_down) W_up + b_up, and where they are put in.

Source: arXiv 2110.04366, section 3.1, table 1 and figure 1.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from optx._errors import ShapeError
from optx.inject._hidden_delta_options import FORMS, HiddenDeltaOptions, draw
from optx.inject._part import (
    RESERVED,
    Arguments,
    Part,
    Weights,
    hidden_of,
    new_tensor,
    output_of,
    with_output,
)
from optx.inject._weights import features, is_linear, is_transposed


class Adapter(Part):
    """s (f(x W_down' + b_down) W_up' + b_up), with W_down (r, in) and W_up (out, r); without its place."""

    def __init__(self, options: HiddenDeltaOptions, module: nn.Module, into: int, out: int) -> None:
        super().__init__()
        self.form, self.dropout, self.norm = options.form, options.dropout, options.norm
        self.insertion = options.insertion
        down, up = new_tensor(module, options.rank, into), new_tensor(module, out, options.rank)
        draw(down, up, options)
        self.W_down, self.W_up = nn.Parameter(down), nn.Parameter(up)
        self.b_down = nn.Parameter(new_tensor(module, options.rank)) if options.bias else None
        self.b_up = nn.Parameter(new_tensor(module, out)) if options.bias else None
        learned = options.scale == "learned"
        self.scale = nn.Parameter(new_tensor(module) + 1) if learned else float(options.scale)
        normed = {"none": 0, "in": into, "out": out}[options.norm]
        self.norm_weight = nn.Parameter(new_tensor(module, normed) + 1) if normed else None
        self.norm_bias = nn.Parameter(new_tensor(module, normed)) if normed else None

    def added(self, h: Tensor, x: Tensor) -> Tensor:
        """h + s A(x). The factor goes into W_up and b_up, which are smaller than activations."""
        if (h.shape[-1], x.shape[-1]) != (len(self.W_up), self.W_down.shape[1]):
            raise ShapeError(
                f"an adapter for vectors of width {self.W_down.shape[1]} and outputs of {len(self.W_up)} got "
                f"{x.shape[-1]} and {h.shape[-1]}: the module's first and last linear layers are not where "
                "its hidden vectors come in and go out. Target one whose are, or the linear layers."
            )
        x = self._normed(x, "in")
        hidden = F.linear(x, _cast(self.W_down, x), _cast(self.b_down, x))
        hidden = F.dropout(FORMS[self.form](hidden), self.dropout, self.training)
        if self.norm == "out":
            change = (
                self._normed(F.linear(hidden, _cast(self.W_up, x), _cast(self.b_up, x)), "out") * self.scale
            )
        else:
            bias = None if self.b_up is None else self.b_up * self.scale
            change = F.linear(hidden, _cast(self.W_up * self.scale, x), _cast(bias, x))
        return (h + change).to(h.dtype)

    def _normed(self, x: Tensor, where: str) -> Tensor:
        if self.norm != where:
            return x
        return F.layer_norm(x, x.shape[-1:], _cast(self.norm_weight, x), _cast(self.norm_bias, x))

    def note(self) -> str:
        """Form, size and insertion."""
        scale = "learned" if isinstance(self.scale, Tensor) else f"{self.scale:.4g}"
        return f"bottleneck {len(self.W_down)}, {self.form}, {self.insertion}, scale {scale}"


class Parallel(Adapter):
    """Reads the module's input, adds to its output."""

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Of an output of several items, the first is the hidden vectors."""
        return with_output(output, self.added(output_of(output), hidden_of(args, kwargs)))


class Sequential(Adapter):
    """Reads the module's output, adds to it."""

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Of an output of several items, the first is the hidden vectors."""
        h = output_of(output)
        return with_output(output, self.added(h, h))


class Residual(Adapter):
    """BERT's LN(o + u): adds to u, which is what its sub-layer read, so LN(o + u + s A(u)).

    Where the last linear layer, the residual sum and the norm are one module, there is no other place in it
    that comes after the dropout. Of two such parts, the second reads what the first has added.
    """

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """The second argument of the module is the residual."""
        if _RESIDUAL in kwargs:
            u = kwargs[_RESIDUAL]
            return args, {**kwargs, _RESIDUAL: self.added(u, u)}
        hidden, u, *others = args
        return (hidden, self.added(u, u), *others), kwargs


class SecondNorm(Adapter):
    """Pfeiffer's place in a post-norm block: LN(z + s A(LN(z))), with the same norm both times."""

    def around(
        self, call: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The norm's call, twice."""
        return call(self.added(hidden_of(args, kwargs), call(*args, **kwargs)))


class LinearParallel(Parallel):
    """The linear form beside a linear module is LoRA with biases, and has an equal in weights."""

    @property
    def adds(self) -> bool:
        """Whether all it does is add: it does."""
        return True

    def fold(self, module: nn.Module, now: Weights, base: Weights) -> Weights:
        """W + M and b + c, where A(x) = M x + c."""
        W = _rows(module, now.weight)
        product, shift = _matrix(self, W)
        return Weights(_rows(module, W + product), _sum(now.bias, shift))


class LinearSequential(Sequential):
    """The linear form behind a linear module."""

    def fold(self, module: nn.Module, now: Weights, base: Weights) -> Weights:
        """W + M W and b + M b + c, where A(h) = M h + c."""
        W = _rows(module, now.weight)
        product, shift = _matrix(self, W)
        bias = None if now.bias is None else now.bias + product @ now.bias
        return Weights(_rows(module, W + product @ W), _sum(bias, shift))


def adapter_part(options: HiddenDeltaOptions, module: nn.Module) -> Adapter | str:
    """The part for a hidden vector of one module; else what the module is instead, in words."""
    kind = type(module).__name__
    if options.insertion == "sequential" and kind.endswith("Norm") and not isinstance(module, nn.GroupNorm):
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 1:
            return f"a {kind} without a weight, so its width is not known"
        return SecondNorm(options, module, len(weight), len(weight))
    widths = _widths(module)
    if widths is None:
        return f"a {kind}"
    into, out = widths
    if _adds_residual(module):
        if options.insertion == "sequential":
            return f"a {kind}, whose output is normalised already; target its linear layer, or its norm"
        return Residual(options, module, out, out)
    folds = options.form == "linear" and options.norm == "none" and is_linear(module)
    if options.insertion == "sequential":
        return (LinearSequential if folds else Sequential)(options, module, out, out)
    return (LinearParallel if folds else Parallel)(options, module, into, out)


def _widths(module: nn.Module) -> tuple[int, int] | None:
    """How wide the vectors are that come into a module and go out of it; None if it does not say."""
    own = [(name, one) for name, one in module.named_modules() if RESERVED not in name.split(".")]
    router = _router(own) if any(name.rpartition(".")[2] == "experts" for name, _ in own) else None
    if router is not None:  # of a mixture of experts: what is routed is what comes out
        return router, router
    linear = [one for _, one in own if is_linear(one)]
    return (features(linear[0])[0], features(linear[-1])[1]) if linear else None


def _router(modules: Sequence[tuple[str, nn.Module]]) -> int | None:
    """The width of the vectors that a router, a matrix of (experts, width), is called with."""
    count = next((len(p) for _, one in modules for p in one.parameters(recurse=False) if p.ndim == 3), None)
    lists = (len(one) for name, one in modules if name == "experts" and isinstance(one, nn.ModuleList))
    count = count or next(lists, None)
    weights = (getattr(one, "weight", None) for name, one in modules if "experts" not in name.split("."))
    matrices = (w for w in weights if isinstance(w, Tensor) and w.ndim == 2)
    return next((w.shape[1] for w in matrices if len(w) == count), None)


_RESIDUAL = "input_tensor"


def _adds_residual(module: nn.Module) -> bool:
    """Whether the module ends a post-norm sub-layer, as BERT's forward(hidden_states, input_tensor)."""
    named = _RESIDUAL in inspect.signature(type(module).forward).parameters
    return named and any(type(child).__name__.endswith("LayerNorm") for child in module.children())


def _cast(tensor: Any, like: Tensor) -> Any:
    return tensor if tensor is None or tensor.dtype == like.dtype else tensor.to(like.dtype)


def _rows(module: nn.Module, weight: Tensor) -> Tensor:
    """A weight as (out, in), and back."""
    return weight.t() if is_transposed(module) else weight


def _matrix(adapter: Adapter, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """M and c of the linear form, in the precision of the sum."""
    up, down = adapter.W_up.to(like.dtype) * adapter.scale, adapter.W_down.to(like.dtype)
    if adapter.b_down is None or adapter.b_up is None:
        return up @ down, None
    return up @ down, up @ adapter.b_down.to(like.dtype) + adapter.b_up.to(like.dtype) * adapter.scale


def _sum(bias: Tensor | None, shift: Tensor | None) -> Tensor | None:
    return bias if shift is None else shift if bias is None else bias + shift
