"""A model's graph, node by node: which calls are linear, which are activations, and what is refused."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils._pytree import tree_flatten, tree_unflatten

from optx._errors import OptxError
from optx.analysis.bounds import _linear
from optx.analysis.bounds._refusals import named_node, target_of, where
from optx.analysis.bounds._system import Builder, Value
from optx.lipschitz._slopes import FUNCTIONS

_SHAPES = {"size", "dim", "ndimension"}  # methods that ask for no numbers


class Layers(Protocol):
    """What a graph asks of the reader."""

    builder: Builder
    split: int | None

    def module(self, module: nn.Module, path: str, value: Value) -> Value:
        """What a module makes of a value."""
        ...

    def activation(self, module: nn.Module, path: str, value: Value) -> Value:
        """What an activation makes of it."""
        ...

    def linear(self, call: Callable[..., Any], values: list[Value], what: Any) -> Value:
        """A linear map of values."""
        ...

    def cut(self, value: Value) -> Value:
        """End a system with a value, and begin the next one with it."""
        ...


class Graph:
    """One run through a graph."""

    def __init__(
        self, reader: Layers, root: nn.Module, path: str, nodes: list[fx.Node], can_cut: bool
    ) -> None:
        self.reader, self.root, self.path, self.nodes = reader, root, path, nodes
        self.can_cut = can_cut
        self.order = {node: place for place, node in enumerate(nodes)}
        self.env: dict[fx.Node, Any] = {}

    def run(self, value: Value) -> Value:
        inputs = [node for node in self.nodes if node.op == "placeholder"]
        if not inputs or any(not node.args for node in inputs[1:]):
            raise OptxError(
                f"lipschitz: {where(self.path, self.root)} takes {len(inputs)} inputs; it must take one."
            )
        for node in self.nodes:
            if node.op == "placeholder":
                self.env[node] = value if node is inputs[0] else node.args[0]
            elif node.op == "output":
                return self.output(node)
            else:
                self.env[node] = self.node(node)
                self.maybe_cut(node)
        raise OptxError(f"lipschitz: {where(self.path, self.root)} returns nothing.")

    def output(self, node: fx.Node) -> Value:
        out = self.look(node.args[0])
        if not isinstance(out, Value):
            raise OptxError(
                f"lipschitz: {where(self.path, self.root)} must return one tensor that depends on its input."
            )
        return out

    def look(self, argument: Any) -> Any:
        return map_arg(argument, lambda node: self.env[node])

    def node(self, node: fx.Node) -> Any:
        args, kwargs = self.look(node.args), self.look(node.kwargs)
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self.root)
        what = f"node {node.name!r} ({target_of(node.target)})"
        if node.op == "call_module":
            path = f"{self.path}.{node.target}".lstrip(".")
            module = self.root.get_submodule(str(node.target))
            if not any(isinstance(leaf, Value) for leaf in tree_flatten((args, kwargs))[0]):
                return module(*args, **kwargs)
            if len(args) != 1 or kwargs or not isinstance(args[0], Value):
                raise OptxError(f"lipschitz: {where(path, module)} is called with other than one value.")
            if getattr(module, "inplace", False):
                self.check_in_place(node, what)
            return self.reader.module(module, path, args[0])
        leaves, spec = tree_flatten((args, kwargs))
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Value)]
        if not places:
            return _called(node, args, kwargs)
        if node.target in _SHAPES or node.target is getattr:
            blank = [torch.empty(1, *one.shape) if isinstance(one, Value) else one for one in leaves]
            return _called(node, *tree_unflatten(blank, spec))
        with named_node(what):
            return self.call(node, leaves, spec, places, what)

    def call(self, node: fx.Node, leaves: list[Any], spec: Any, places: list[int], what: str) -> Value:
        """A function or method of values and constants."""
        target: Any = node.target
        values = [leaves[place] for place in places]
        if target in FUNCTIONS:
            args, kwargs = tree_unflatten(leaves, spec)
            module = FUNCTIONS[target](*args[1:], **kwargs)
            if getattr(module, "inplace", False):
                self.check_in_place(node, what)
            return self.reader.activation(module, node.name, values[0])
        if target in _linear.IN_PLACE:
            self.check_in_place(node, what)
        alone = len(places) == 1
        if not (
            target in _linear.JOINTLY
            or (target in _linear.SEPARATELY and alone)
            or (target in _linear.FIRST and places == [0])
        ):
            raise OptxError(
                "branches may be added, subtracted and joined, and single values multiplied by constants; "
                "this is none of it, and has no quadratic constraint"
            )
        constants = [
            leaf.detach().to("cpu", torch.float64)
            if isinstance(leaf, Tensor) and leaf.is_floating_point()
            else leaf
            for leaf in leaves
        ]

        def call(*xs: Tensor) -> Any:
            filled = list(constants)
            for place, x in zip(places, xs, strict=True):
                filled[place] = x
            args, kwargs = tree_unflatten(filled, spec)
            return _called(node, args, kwargs, _linear.IN_PLACE.get(target, target))

        return self.reader.linear(call, values, target)

    def check_in_place(self, node: fx.Node, what: str) -> None:
        """What is written in place must not be read again: not it, nor what it is a view of."""
        todo, seen = list(node.all_input_nodes[:1]), set[fx.Node]()
        while todo:
            one = todo.pop()
            if one in seen:
                continue
            seen.add(one)
            if any(self.order[user] > self.order[node] for user in one.users):
                raise OptxError(
                    f"lipschitz: {what} writes in place what {one.name!r} gave, which is read again later; "
                    "what it then has is not what the graph says. Use inplace=False."
                )
            if one.op in ("call_module", "call_method", "call_function"):
                todo += one.all_input_nodes[:1]

    def maybe_cut(self, node: fx.Node) -> None:
        split = self.reader.split
        if not (self.can_cut and split and len(self.reader.builder.blocks) >= split):
            return
        here = self.order[node]
        live = [one for one in self.nodes[: here + 1] if any(self.order[user] > here for user in one.users)]
        bends = any(self.is_bend(one) for one in self.nodes[here + 1 :])
        if bends and [one for one in live if isinstance(self.env.get(one), Value)] == [node]:
            self.env[node] = self.reader.cut(self.env[node])

    def is_bend(self, node: fx.Node) -> bool:
        """Whether an activation is computed there."""
        if node.op != "call_module":
            return node.target in FUNCTIONS
        module = self.root.get_submodule(str(node.target))
        return not _linear.is_linear(module)


def _called(node: fx.Node, args: Any, kwargs: Any, target: Any = None) -> Any:
    target = node.target if target is None else target
    return (
        getattr(args[0], target)(*args[1:], **kwargs) if isinstance(target, str) else target(*args, **kwargs)
    )
