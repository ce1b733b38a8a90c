"""A rule: one elementwise function, written once, read by three compilers.

The function object is called on torch tensors (the reference and the ``foreach`` path). Its *source* is
pasted, with its helpers, into the generated Triton and Numba kernels (`optx.kernels`): pasting keeps the
disk caches of both compilers valid from one process to the next, which a closure over compiled functions
does not.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, overload

from optx import ops
from optx._errors import TransformError


class Rule:
    """An elementwise function and what it writes. Made by `rule`."""

    def __init__(self, function: Callable[..., Any], writes: tuple[str, ...]) -> None:
        self.function = function
        self.writes = writes
        self.name = function.__name__
        # Now, while the file is what was just imported: it may be edited before the first step.
        self.text = _source_text(function)
        parameters = inspect.signature(function).parameters.values()
        bad = [
            p.name for p in parameters if p.kind is not p.POSITIONAL_OR_KEYWORD or p.default is not p.empty
        ]
        if bad:
            raise TypeError(
                f"rule {self.name!r}: argument {bad[0]!r} has a default or is variadic; a rule takes plain "
                "positional arguments only, so that every compiler reads it alike."
            )
        self.reads = tuple(p.name for p in parameters)
        given: tuple[Any, ...] = writes
        for write in given:
            if not isinstance(write, str) or not write.isidentifier() or writes.count(write) > 1:
                raise TypeError(
                    f"rule {self.name!r}: writes is {writes!r}; it must be a name or a tuple of different "
                    'names, as ("w", "seen").'
                )
        if not writes:
            raise TypeError(f"rule {self.name!r}: writes is empty; name what the function returns.")
        functools.update_wrapper(self, function)

    def __call__(self, *args: Any) -> Any:
        """Run the rule on torch tensors (or numbers)."""
        return self.function(*args)

    def values(self, *args: Any) -> tuple[Any, ...]:
        """Run the rule and give its results as a tuple, also when there is one."""
        result = self.function(*args)
        results: Any = result if isinstance(result, tuple | list) else (result,)
        count = 0 if result is None else len(results)
        if wrong := self.wrong_results(count):
            raise TransformError(f"rule {self.name!r} {wrong}.")
        return tuple(results)

    @functools.cached_property
    def results(self) -> int | None:
        """How many values the function returns, as far as its source tells."""
        try:
            counts = _result_counts(_parse(self), _known(self.function))
        except (ValueError, SyntaxError):
            return None
        if not counts:
            return 0
        return next((c for c in counts if c is not None and c != len(self.writes)), None)

    def wrong_results(self, count: int | None) -> str:
        """What is wrong with so many results, in words; empty if nothing is, or None is known."""
        if count in (None, len(self.writes)):
            return ""
        many = f"{count} value{'s' * (count != 1)}"
        return f"returns {many}; it must return one per name that it writes ({', '.join(self.writes)})"

    def parsed(self) -> tuple[ast.FunctionDef, dict[str, Any]]:
        """Its definition, and what the names in it that are not its own stand for."""
        return _parse(self), _known(self.function)

    def __repr__(self) -> str:
        return f"<rule {self.name}({', '.join(self.reads)}) -> {', '.join(self.writes)}>"

    def __reduce__(self) -> Any:
        # A rule decorates a module-level name; unpickle it as that name, as functions are.
        return self.function.__qualname__

    @functools.cached_property
    def source(self) -> RuleSource:
        """The rule's source and all it refers to; raises `RuleSourceError` where a compiler can't follow."""
        return RuleSource.of(self)


class RuleSourceError(ValueError):
    """A rule that only the foreach path can run; the message says why."""


class RuleSource:
    """A rule's function definition (an AST without decorators), its constants and its helper rules."""

    def __init__(
        self, definition: ast.FunctionDef, constants: dict[str, float | int | bool], helpers: dict[str, Rule]
    ) -> None:
        self.definition = definition
        self.constants = constants
        self.helpers = helpers

    @classmethod
    def of(cls, rule: Rule) -> RuleSource:
        """Read the source of a rule, and check that all in it has a meaning in every compiler."""
        definition = _parse(rule)
        known = _known(rule.function)
        definition = _PlainNames(known).visit(definition)
        own = {argument.arg for argument in definition.args.args}
        own |= {
            n.id for n in ast.walk(definition) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
        }
        for name in sorted(own & _RESERVED):
            raise RuleSourceError(
                f"rule {rule.name!r} names something {name!r}, as kernels call a library; rename it"
            )
        *before, last = definition.body
        # What is forbidden is named below.
        plain = all(isinstance(one, (*_STATEMENTS, *_FORBIDDEN)) for one in before)
        if not plain or not isinstance(last, (ast.Return, *_FORBIDDEN)):
            raise RuleSourceError(f"rule {rule.name!r} is more than assignments and a return at its end")
        constants: dict[str, float | int | bool] = {}
        helpers: dict[str, Rule] = {}
        for node in ast.walk(definition):
            if isinstance(node, ast.Compare) and len(node.ops) > 1:
                raise RuleSourceError(
                    f"rule {rule.name!r} has a chain of comparisons; write each with & between"
                )
            if isinstance(node, _FORBIDDEN):
                raise RuleSourceError(_unknown(rule, _called(node, own)))
            if not isinstance(node, ast.Name) or node.id in own or node.id in ops.__all__:
                continue
            value = known.get(node.id)
            if isinstance(value, bool | int | float):
                constants[node.id] = value
            elif isinstance(value, Rule):
                helpers[node.id] = value
            else:
                raise RuleSourceError(_unknown(rule, node.id))
        if len(rule.writes) > 1 and None in _result_counts(definition, known):
            raise RuleSourceError(
                f"rule {rule.name!r} returns what can't be told to be {len(rule.writes)} values; write them "
                "after return, with commas"
            )
        return cls(definition, constants, helpers)


# What some compiler lacks, or what means another thing on tensors than on numbers.
_FORBIDDEN = (ast.Attribute, ast.Subscript, ast.If, ast.IfExp, ast.For, ast.While, ast.BoolOp, ast.Lambda)

# A kernel has a rule's statements in its own loop.
_STATEMENTS = (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Expr)

# Names that generated code gives to what it is made of.
_RESERVED = {"F", "np", "tl"}


def _known(function: Callable[..., Any]) -> dict[str, Any]:
    """What the names in a function that are not its own stand for."""
    scope = inspect.getclosurevars(function)
    return {**scope.builtins, **scope.globals, **scope.nonlocals}


def _result_counts(definition: ast.FunctionDef, known: dict[str, Any]) -> list[int | None]:
    """How many values each return statement gives; None where that can't be seen."""
    returns: list[ast.Return] = []
    local: dict[str, ast.expr | None] = {a.arg: ast.Constant(0) for a in definition.args.args}
    nodes: list[ast.AST] = list(definition.body)
    while nodes:
        node = nodes.pop(0)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            continue
        if isinstance(node, ast.Return):
            returns.append(node)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            local[name] = None if name in local else node.value  # assigned twice: anything
        nodes.extend(ast.iter_child_nodes(node))
    return [_results(node.value, known, local) for node in returns]


def _results(value: ast.expr | None, known: dict[str, Any], local: dict[str, ast.expr | None]) -> int | None:
    match value:
        case None | ast.Constant(value=None):
            return 0
        case ast.Tuple() | ast.List():
            return None if any(isinstance(e, ast.Starred) for e in value.elts) else len(value.elts)
        case ast.Name(id=name) if local.get(name) is not None:
            return _results(local[name], known, {**local, name: None})
        case ast.Call(func=ast.Name(id=name)) if isinstance(known.get(name), Rule):
            return len(known[name].writes)
        case ast.Call(func=ast.Name(id=name)) if getattr(known.get(name), "__name__", "") in vars(ops):
            return 1
        case ast.Call() | ast.Name() | ast.Attribute() | ast.Subscript() | ast.IfExp() | ast.Await():
            return None
        case _:
            return 1


class _PlainNames(ast.NodeTransformer):
    """Gives the functions of `optx.ops` their plain names, however the person's module spells them."""

    def __init__(self, known: dict[str, Any]) -> None:
        self.known = known

    def _value(self, node: ast.AST) -> Any:
        if isinstance(node, ast.Name):
            return self.known.get(node.id)
        return getattr(self._value(node.value), node.attr, None) if isinstance(node, ast.Attribute) else None

    def _plain(self, node: ast.expr) -> ast.AST:
        value = self._value(node)
        name = getattr(value, "__name__", None)
        if name in ops.__all__ and value in (vars(ops)[name], abs):
            return ast.copy_location(ast.Name(name, ast.Load()), node)
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        """``optx.ops.sqrt``."""
        return self._plain(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        """``from optx.ops import sqrt as root``."""
        return self._plain(node) if isinstance(node.ctx, ast.Load) else node


def _called(node: ast.AST, own: set[str]) -> str:
    """What a person would call a forbidden thing: ``torch.relu`` as it is, ``clamp`` in ``g.clamp``."""
    if not isinstance(node, ast.Attribute):
        return type(node).__name__.lower()
    root: ast.AST = node
    while isinstance(root, ast.Attribute):
        root = root.value
    return ast.unparse(node) if isinstance(root, ast.Name) and root.id not in own else node.attr


def _unknown(rule: Rule, what: str) -> str:
    return (
        f"rule {rule.name!r} uses {what!r}, which no kernel compiler knows; use numbers, other rules, or the "
        f"functions of optx.ops ({', '.join(ops.__all__)})"
    )


def _source_text(function: Callable[..., Any]) -> str | None:
    try:
        return textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        return None


def _parse(rule: Rule) -> ast.FunctionDef:
    if rule.text is None:
        raise RuleSourceError(
            f"rule {rule.name!r} has no source file to compile (defined in an interactive session?)"
        )
    if rule.function.__name__ == "<lambda>":
        raise RuleSourceError("the rule is a lambda; write it with def")
    tree = ast.parse(rule.text)
    definition = next((n for n in tree.body if isinstance(n, ast.FunctionDef)), None)
    if definition is None:
        raise RuleSourceError(f"rule {rule.name!r} is a lambda; write it with def")
    definition.decorator_list = []
    definition.returns = None
    for argument in definition.args.args:
        argument.annotation = None
    if definition.body and isinstance(definition.body[0], ast.Expr):
        first = definition.body[0].value
        if isinstance(first, ast.Constant) and isinstance(first.value, str):
            definition.body = definition.body[1:]  # the docstring
    return definition


@overload
def rule(*, writes: str | Sequence[str]) -> Callable[[Callable[..., Any]], Rule]: ...
@overload
def rule(function: Callable[..., Any], *, writes: str | Sequence[str]) -> Rule: ...
def rule(
    function: Callable[..., Any] | None = None, *, writes: str | Sequence[str]
) -> Rule | Callable[[Callable[..., Any]], Rule]:
    """Mark a plain elementwise function as a rule.

    The names of its arguments say what they are: ``w`` the weight, ``g`` the gradient, ``w0`` the weight as
    it was when the step began, a slot of the transform (one tensor per weight), or else a number (an option
    of the param group, or what the transform's ``scalars`` computed); `Moments` has a table, and `BaseRules`
    says it for a base's. It may use ``+ - * / **``, ``%`` (of numbers that are not negative), comparisons
    with ``& | ~`` between them, local variables, numbers, other rules and the functions of `optx.ops`; no
    loops, no tensor methods. In a transform `wrap` refuses what asks many elements for one answer (``if``,
    ``and``, ``a < b < c``: use ``optx.ops.where``) and what looks at several (``g[0]``, ``g.mean()``); what
    else no kernel can be made of (``torch.sign(g)``) runs as it is, unfused, as `Wrapped.plan` then says.

    Args:
        function: the function; it returns the new value of each name in ``writes``, in that order.
        writes: what it returns: ``"g"``, ``"w"``, a slot, or, for sums, the names of the sums; `Moments` says
            what each moment may write.

    Returns:
        A `Rule`, which can still be called on tensors.

    Raises:
        TypeError: an argument has a default or is variadic, or ``writes`` is no name or tuple of names.

    Example:
        >>> import torch, optx
        >>> @optx.rule(writes="g")
        ... def clip(g, limit):
        ...     return optx.ops.maximum(optx.ops.minimum(g, limit), -limit)
        >>> clip(torch.tensor([-3.0, 0.5]), 1.0)
        tensor([-1.0000,  0.5000])
    """
    names = (writes,) if isinstance(writes, str) else tuple(writes)
    if function is None:
        return lambda f: Rule(f, names)
    return Rule(function, names)
