"""Weights that are used without a call of their module: nothing attached to it would act, and nobody would
see.

Two looks. Before anything is attached, at the source of what a module is in: a forward that reads
``self.conv.weight`` and nowhere has ``self.conv`` for anything else never calls it (Mamba's convolution). And
at the first call, where the operations themselves show it: of fused paths, aliases and helpers the source
says too little.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sys
import textwrap
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from optx._errors import TargetError, warn
from optx.inject._part import RESERVED, attached

_OWN = ("weight", "bias")
# What forwards ask of a weight without computing with it.
_ABOUT = frozenset(
    re.findall(
        r"\w+",
        """dtype device shape ndim size numel dim is_cuda is_meta requires_grad element_size itemsize data_ptr
        grad stride type quant_state is_sparse is_contiguous""",
    )
)


# ---- by the source
# -------------------------------------------------------------------------------------------


class _Facts(NamedTuple):
    """What a class's forward and the methods it calls do with submodules, by regexes of their paths."""

    read: frozenset[str]
    named: frozenset[str]


def reader_of(model: nn.Module, path: str) -> str | None:
    """The class of what a module is in that uses its weight and never calls it; None: none is known."""
    names = path.split(".")
    for depth in range(len(names)):
        owner = model.get_submodule(".".join(names[:depth]))
        if type(owner).__module__.startswith("torch.nn."):
            continue
        facts, rest = _facts(type(owner)), ".".join(names[depth:])
        if _has(facts.read, rest) and not _has(facts.named, rest):
            return type(owner).__name__
    return None


def _has(patterns: Iterable[str], path: str) -> bool:
    return any(re.fullmatch(pattern, path) for pattern in patterns)


@functools.cache
def _facts(kind: type[nn.Module]) -> _Facts:
    read, named = set[str](), set[str]()
    todo, seen = ["forward"], set[str]()
    while todo:
        name = todo.pop()
        tree = None if name in seen else _tree(getattr(kind, name, None))
        seen.add(name)
        if tree is None:
            continue
        parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        for node in ast.walk(tree):
            chain = _chain(node)
            if chain is None or isinstance(parents.get(node), ast.Attribute):
                continue
            called = isinstance(call := parents.get(node), ast.Call) and call.func is node
            if called and len(chain) == 1:
                todo.append(chain[0])
            place = next((i for i, part in enumerate(chain) if i and part in (*_OWN, "forward")), None)
            if place is None:
                named.add(_pattern(chain))
                if called:
                    named.add(_pattern(chain[:-1]))  # a method of it, which may call it
            elif called if chain[place] == "forward" else _computes(chain[place + 1 :], node, parents):
                read.add(_pattern(chain[:place]))
    return _Facts(frozenset(read), frozenset(named))


def _tree(method: Any) -> ast.AST | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(method))))
    except (OSError, TypeError, SyntaxError, ValueError):
        return None


def _chain(node: ast.AST | None) -> list[str] | None:
    """The names behind ``self``, with ``*`` for an index; None of anything else."""
    if isinstance(node, ast.Name):
        return [] if node.id == "self" else None
    if isinstance(node, ast.Attribute):
        before = _chain(node.value)
        return None if before is None else [*before, node.attr]
    if isinstance(node, ast.Subscript):
        before = _chain(node.value)
        return [*before, "*"] if before else None
    return None


def _pattern(chain: Sequence[str]) -> str:
    return r"\.".join("[^.]+" if part == "*" else re.escape(part) for part in chain)


def _computes(after: Sequence[str], node: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    """Whether a weight that is mentioned goes into a computation."""
    parent = parents.get(node)
    if (after and after[0] in _ABOUT) or isinstance(getattr(node, "ctx", None), ast.Store | ast.Del):
        return False
    if isinstance(parent, ast.Compare):
        return not any(isinstance(one, ast.Constant) and one.value is None for one in parent.comparators)
    asks = ("isinstance", "hasattr", "getattr", "len", "type", "id")
    return not (isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name) and parent.func.id in asks)


# ---- by the first call
# ---------------------------------------------------------------------------------------


class Watch:
    """Looks at the first calls of what served modules are in, and is gone after them.

    It holds no module: hooks are given theirs, so that copies of a model have one of their own.
    """

    def __init__(self) -> None:
        self.hooks: list[RemovableHandle] = []
        self.depth = 0
        self.thread = 0
        self.uses: _Uses | None = None

    def on(self, model: nn.Module, served: Sequence[tuple[str, nn.Module]]) -> None:
        """Look at the next call of the model, and of whatever calls a served module."""
        callers = {id(model): model} | {id(one): one for one in _callers(model, served)}
        for caller in callers.values():
            self.hooks.append(caller.register_forward_pre_hook(self._enter))
            self.hooks.append(caller.register_forward_hook(self._leave, always_call=True))
        for _, module in served:
            self.hooks.append(module.register_forward_pre_hook(self._begin))
            self.hooks.append(module.register_forward_hook(self._end, always_call=True))

    def remove(self) -> None:
        """Look no more."""
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()

    def _enter(self, caller: nn.Module, args: Any) -> None:
        of_c: Any = torch._C  # pyright: ignore[reportPrivateUsage]
        if (
            torch.compiler.is_compiling() or of_c._get_tracing_state() is not None
        ):  # a trace compares two calls
            return
        if self.depth == 0:
            self.thread, self.uses = threading.get_ident(), _Uses(caller)
            self.uses.__enter__()
        if self.thread == threading.get_ident():
            self.depth += 1

    def _leave(self, caller: nn.Module, args: Any, output: Any) -> None:
        uses = self.uses
        if torch.compiler.is_compiling() or uses is None or self.thread != threading.get_ident():
            return
        self.depth -= 1
        if self.depth == 0:
            uses.__exit__(None, None, None)
            self.uses = None
            if sys.exc_info()[0] is None:
                self._judge(uses, caller)

    def _judge(self, uses: _Uses, caller: nn.Module) -> None:
        """Raise where something attached has not acted at all; warn where it has acted at one of two uses."""
        kind = type(caller).__name__
        for key, path in uses.past.items():
            names = ", ".join(uses.parts[key])
            if key not in uses.called:
                raise TargetError(
                    f"{names} on {path!r} did not act: in this call of a {kind} its weight was used without "
                    "a call of the module. Remove the handle, and leave that module out of targets."
                )
            warn(
                f"{names} on {path!r} acts where the module is called, but this call of a {kind} has used "
                "its weight besides, past the module. There it does not act, and a merged one would."
            )
        if uses.called:
            self.remove()

    def _begin(self, module: nn.Module, args: Any) -> None:
        if self.uses is not None and not torch.compiler.is_compiling():
            self.uses.inside.append(id(module))
            self.uses.called.add(id(module))

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.uses is not None and not torch.compiler.is_compiling() and self.uses.inside:
            self.uses.inside.pop()


def watch(model: nn.Module) -> Watch | None:
    """Look at the first calls of a model, unless looking would change what they do.

    One look serves all handles: its hooks come after those of every part, whose own uses are none.
    """
    served = [
        (path, module)
        for path, module in model.named_modules()
        if attached(module) is not None and any(name in module._parameters for name in _OWN)  # pyright: ignore[reportPrivateUsage]
    ]
    for module in model.modules():
        for hook in list(module._forward_hooks.values()):  # pyright: ignore[reportPrivateUsage]
            earlier = getattr(hook, "__self__", None)
            if isinstance(earlier, Watch):
                earlier.remove()
    for module in model.modules():
        # torch's own fast paths are left while anything looks; its modules are known without that. And what
        # is compiled would be traced with the look in it.
        if isinstance(module, nn.MultiheadAttention) or module._compiled_call_impl is not None:  # pyright: ignore[reportPrivateUsage]
            return None
        if type(module).__name__ == "OptimizedModule":
            return None
    if not served:
        return None
    made = Watch()
    made.on(model, served)
    return made


def _callers(model: nn.Module, served: Sequence[tuple[str, nn.Module]]) -> Iterator[nn.Module]:
    """What calls each served module: the nearest module above it that is no list or dict."""
    for path, _ in served:
        while path:
            path = path.rpartition(".")[0]
            above = model.get_submodule(path)
            if not isinstance(above, nn.ModuleList | nn.ModuleDict | nn.ParameterList):
                yield above
                break


class _Uses(TorchFunctionMode):
    """Which weights of served modules go into operations outside of their module's call."""

    def __init__(self, caller: nn.Module) -> None:
        super().__init__()
        self.past: dict[int, str] = {}
        self.called: set[int] = set()
        self.inside: list[int] = []
        self.parts: dict[int, list[str]] = {}
        self.owners: dict[int, tuple[int, str]] = {}
        self.held: list[Tensor] = []  # or another tensor may get the id of one that was exchanged in the call
        seen: dict[int, int] = {}
        for path, module in caller.named_modules():
            if RESERVED in path.split("."):
                continue
            container = attached(module)
            for name in _OWN:
                tensor = module._parameters.get(name)  # pyright: ignore[reportPrivateUsage]
                if tensor is None:
                    continue
                seen[id(tensor)] = seen.get(id(tensor), 0) + 1
                self.held.append(tensor)
                acting = [key for key, part in container.parts.items() if part.active] if container else []
                if acting:
                    self.parts[id(module)] = acting
                    self.owners[id(tensor)] = (id(module), path)
        for tensor, count in seen.items():  # a tied weight is used by the call of another module
            if count > 1:
                self.owners.pop(tensor, None)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """One operation."""
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        made = output if isinstance(output, tuple | list) else (output,)
        if self.inside or not any(isinstance(one, Tensor) for one in made):
            return output
        name: str = getattr(func, "__name__", "")
        if name.startswith("new_") or name.endswith("_like") or func == _GRAD:  # a new wrapper each time
            return output
        for value in (*args, *kwargs.values()):
            for tensor in value if isinstance(value, tuple | list) else (value,):
                owner = self.owners.get(id(tensor))
                if owner is not None:
                    self.past[owner[0]] = owner[1]
        return output


_GRAD: Any = Tensor.grad.__get__  # pyright: ignore
