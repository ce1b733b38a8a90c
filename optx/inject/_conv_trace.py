"""What a model computes with its convolutions, as a graph of operations: by torch.fx, else by a call of it.

Both see the same leaves: modules of torch.nn, convolutions and norms of any library, and functions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from optx._errors import OptxError
from optx._no_trace import evaluating
from optx.inject._nested import tensors_in
from optx.inject._part import Attached

_SIZES = (64, 224, 32)
"""Widths of the images that are tried where a model has to be called."""


@dataclass(eq=False)
class Op:
    """One operation.

    Attributes:
        module: the leaf module that computes it; None: a function.
        path: of the module, or the function's name.
        inputs: what it computes from.
        users: what computes from it.
        call: a function with its other arguments, applied to one tensor, which is not written to.
        options: those of the function, by name.
    """

    path: str
    module: nn.Module | None = None
    inputs: list[Op] = field(default_factory=list["Op"])
    users: list[Op] = field(default_factory=list["Op"])
    call: Callable[[Tensor], Tensor] | None = None
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def reads(self, inputs: Sequence[Op]) -> Op:
        """Compute from these, each once."""
        for one in dict.fromkeys(inputs):
            self.inputs.append(one)
            one.users.append(self)
        return self


OUTPUT = "output"
"""The path of what the model returns."""


def is_norm(module: nn.Module) -> bool:
    """Whether it is a batch norm: one mean and variance per channel, whatever its class."""
    mean, variance = (getattr(module, name, None) for name in ("running_mean", "running_var"))
    if isinstance(module, nn.modules.batchnorm._BatchNorm):  # pyright: ignore[reportPrivateUsage]
        return mean is not None
    return isinstance(mean, Tensor) and isinstance(variance, Tensor) and mean.ndim == 1


def operations(model: nn.Module, shape: Sequence[int] | None = None) -> list[Op]:
    """All operations, in the order in which they are computed; the model is as it was.

    Args:
        model: what is traced.
        shape: of a batch to call it with; None: by torch.fx, and if that can't, with images of some sizes.

    Raises:
        OptxError: torch.fx can't trace the model, and neither can it be called with images.
    """
    if shape is None:
        with contextlib.suppress(Exception), evaluating(model):  # whatever a forward may do to a proxy
            return _by_fx(model)
    return _by_call(model, shape)


def _is_leaf(module: nn.Module) -> bool:
    own = type(module).__module__
    inner = own.startswith("torch.nn.") and not isinstance(
        module, nn.Sequential | nn.ModuleList | nn.ModuleDict
    )
    activation = own.startswith("optx.") and next(module.children(), None) is None
    return inner or activation or is_norm(module) or isinstance(module, nn.Conv2d)


class _Function:
    """A function with its other arguments, applied to a copy of one tensor; it can be pickled."""

    def __init__(self, function: Any, rest: Sequence[Any], options: Mapping[str, Any]) -> None:
        self.function, self.rest, self.options = function, tuple(rest), dict(options)

    def __call__(self, t: Tensor) -> Tensor:
        if isinstance(self.function, str):
            return getattr(t.clone(), self.function)(*self.rest, **self.options)
        return self.function(t.clone(), *self.rest, **self.options)


def _name(function: Any) -> str:
    for known in ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d"):
        if function is getattr(nn.functional, known):
            return known  # some of them are made by torch and have names of their makers
    return function if isinstance(function, str) else getattr(function, "__name__", str(function)).lstrip("_")


# ---- symbolically -------------------------------------------------------------------------------------


def _by_fx(model: nn.Module) -> list[Op]:
    from torch import fx

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return _is_leaf(m)

    ops: dict[fx.Node, Op] = {}
    for node in Tracer().trace(model).nodes:
        inputs = [ops[one] for one in node.all_input_nodes]
        path, module, call, options = _name(node.target), None, None, dict(node.kwargs)
        if node.op == "call_module":
            path, module = str(node.target), model.get_submodule(str(node.target))
        elif (
            node.op in ("call_function", "call_method")
            and len(inputs) == 1
            and node.args[:1] == (*node.all_input_nodes,)
        ):
            call = _Function(node.target, node.args[1:], options)
        elif node.op == "output":
            path = OUTPUT
        ops[node] = Op(path, module, call=call, options=options).reads(inputs)
    return list(ops.values())


# ---- by a call ----------------------------------------------------------------------------------------


class _Followed(TorchFunctionMode):
    """Notes each function that computes tensors from tensors, and each leaf module as one operation."""

    def __init__(self) -> None:
        super().__init__()
        self.ops = [Op("input")]
        self.made: dict[int, Op] = {}
        self.alive: list[Tensor] = []  # so that no address is given twice
        self.within = 0

    def note(self, op: Op, given: Any, result: Any) -> None:
        op.reads([self.made.get(id(t), self.ops[0]) for t in tensors_in(given)])
        self.ops.append(op)
        for t in tensors_in(result):
            self.made[id(t)] = op
            self.alive.append(t)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        result = func(*args, **options)
        if (
            not self.within
            and any(True for _ in tensors_in(result))
            and any(True for _ in tensors_in((args, options)))
        ):
            one = isinstance(args[0] if args else None, Tensor)
            call = _Function(func, args[1:], options) if one else None
            self.note(Op(_name(func), call=call, options=options), (args, options), result)
        return result

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.within += 1

    def leave(self, path: str, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        self.within -= 1
        if not self.within:
            self.note(Op(path, module), (args, kwargs), result)


@contextmanager
def _watched(model: nn.Module, seen: _Followed) -> Generator[None]:
    hooks: list[Any] = []
    leaves = [(path, one) for path, one in model.named_modules() if path and _is_leaf(one)]
    try:
        for path, one in leaves:
            if isinstance(one, Attached):
                continue
            hooks.append(one.register_forward_pre_hook(seen.enter, prepend=True, with_kwargs=True))

            def leave(module: nn.Module, args: Any, kwargs: Any, result: Any, path: str = path) -> None:
                seen.leave(path, module, args, kwargs, result)

            hooks.append(one.register_forward_hook(leave, with_kwargs=True))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _shapes(model: nn.Module, channels: int) -> list[Sequence[int]]:
    size = getattr(getattr(model, "config", None), "image_size", None)
    sizes = [size, *_SIZES] if isinstance(size, int) else _SIZES
    return [(1, channels, width, width) for width in dict.fromkeys(sizes)]


def _by_call(model: nn.Module, shape: Sequence[int] | None) -> list[Op]:
    first = next((one for one in model.modules() if isinstance(one, nn.Conv2d)), None)
    if first is None:
        return []
    why: Exception | None = None
    for size in _shapes(model, first.in_channels) if shape is None else [shape]:
        seen, x = _Followed(), torch.zeros(*size, dtype=first.weight.dtype, device=first.weight.device)
        try:
            with torch.no_grad(), evaluating(model), _watched(model, seen), seen:
                result = model(x)
        except Exception as error:
            why = why or error
            continue
        seen.note(Op(OUTPUT), dict(result) if isinstance(result, Mapping) else result, None)  # pyright: ignore[reportUnknownArgumentType]
        return seen.ops
    raise OptxError(
        f"attach: how the convolutions of this {type(model).__name__} are connected can't be traced by "
        f"torch.fx nor by calling it with zeros ({why}). Pass shape=, of a batch that the model takes."
    )
