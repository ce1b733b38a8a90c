"""Whether a rule is elementwise, as far as its source tells: the same for every element, one at a time.

What asks whether a value holds (``if``, ``and``, a chain of comparisons) can't be asked of many elements at
once, and what looks at several of them (``g[0]``, ``g.mean()``) sees whatever part of a weight a path has at
hand. Neither means the same on every path, so both are refused when an optimizer is wrapped.
"""

from __future__ import annotations

import ast
import functools
import math
from collections.abc import Collection, Sequence
from typing import Any

from optx._rules import Rule, RuleSourceError

_ASKS = (
    "which asks many elements for one answer; use optx.ops.where(condition, a, b), with & and | (each "
    "comparison in parentheses) between conditions"
)
_MIXES = (
    "which looks at several elements, and a rule sees one at a time; sum in the moment `sums` and read the "
    "sum in a later rule"
)
# Of a tensor, but the same for all of its elements.
_ABOUT = {"shape", "dtype", "device", "ndim", "dim", "is_floating_point", "is_complex", "is_cuda"}
_ABOUT_CALLS = (isinstance, hasattr, callable, type)
# What makes fewer values of many; such a result would be spread over all elements.
_MIXING = {
    "sum",
    "mean",
    "norm",
    "std",
    "var",
    "prod",
    "amax",
    "amin",
    "argmax",
    "argmin",
    "median",
    "any",
    "all",
    "item",
    "logsumexp",
    "dot",
}
_ONE_ANSWER = (bool, int, float, any, all, sorted, max, min)


def why_not_elementwise(rule: Rule, values: Collection[str]) -> str | None:
    """Why a rule is not elementwise, in words; None if nothing in its source shows it.

    Args:
        rule: the rule.
        values: the arguments that differ from element to element, or from tensor to tensor.
    """
    return _why_not(rule, frozenset(values))


@functools.lru_cache(maxsize=512)
def _why_not(rule: Rule, values: frozenset[str]) -> str | None:
    # Kept, since every param group binds the same rules.
    try:
        definition, known = rule.parsed()
    except RuleSourceError:
        return None  # a lambda, or without source
    look = _Look(known, values)
    nodes = list(ast.walk(definition))
    count = -1
    while count < len(look.values):  # until no further name gets such a value
        count = len(look.values)
        for node in nodes:
            look.follow(node)
    return next((why for node in nodes if (why := look.refused(node))), None)


class _Look:
    """Follows values through a function's names."""

    def __init__(self, known: dict[str, Any], values: Collection[str]) -> None:
        self.known, self.values = known, set(values)
        self.tuples: set[str] = set()  # names of several values, which may be taken apart

    def follow(self, node: ast.AST) -> None:
        """A name that is given a value becomes one."""
        match node:
            case ast.Assign(targets=[*targets], value=value):
                pass
            case ast.AugAssign(target=target, value=value) | ast.NamedExpr(target=target, value=value):
                targets = [target]
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                targets = [target]
            case _:
                return
        if self.varies(value):
            names = {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
            self.values |= names
            self.tuples |= names if self._several(value) and isinstance(targets[0], ast.Name) else set()

    def varies(self, node: ast.AST) -> bool:
        """Whether an expression differs from element to element."""
        match node:
            case ast.Name(id=name):
                return name in self.values
            case ast.Attribute(attr=name) | ast.Call(func=ast.Attribute(attr=name)) if name in _ABOUT:
                return False
            case ast.Call(func=function) if self._value(function) in _ABOUT_CALLS:
                return False
            case ast.Compare(ops=ops) if all(isinstance(op, ast.Is | ast.IsNot) for op in ops):
                return False
            case _:
                return any(map(self.varies, ast.iter_child_nodes(node)))

    def refused(self, node: ast.AST) -> str | None:
        """What can't be done with such values, in words."""
        asked: Sequence[ast.expr] = []
        match node:
            case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test) | ast.Assert(test=test):
                asked, what = [test], "while" if isinstance(node, ast.While) else "if"
                what = "assert" if isinstance(node, ast.Assert) else what
            case ast.comprehension(iter=over, ifs=tests):
                asked, what = [over, *tests], "for"
            case ast.For(iter=over):
                asked, what = [over], "for"
            case ast.Match(subject=subject):
                asked, what = [subject], "match"
            case ast.BoolOp(values=operands, op=op):
                asked, what = operands, "and" if isinstance(op, ast.And) else "or"
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                asked, what = [operand], "not"
            case ast.Compare(ops=ops) if any(isinstance(op, ast.In | ast.NotIn) for op in ops):
                asked, what = [node], "in"
            case ast.Compare(ops=[_, _, *_]):
                asked, what = [node], "a < b < c"
            case ast.Subscript(value=value) if self.varies(value) and not self._several(value):
                return f"has {ast.unparse(node)!r}, {_MIXES}"
            case ast.Call():
                return self._refused_call(node)
            case _:
                return None
        return (
            f"has {what!r} of a value per element or tensor, {_ASKS}"
            if any(map(self.varies, asked))
            else None
        )

    def _refused_call(self, node: ast.Call) -> str | None:
        function, called = node.func, self._value(node.func)
        given = [*node.args, *(k.value for k in node.keywords)]
        if isinstance(called, Rule):
            named = dict(zip(called.reads, node.args, strict=False)) | {
                k.arg or "": k.value for k in node.keywords
            }
            return why_not_elementwise(called, [name for name, arg in named.items() if self.varies(arg)])
        if any(map(self.varies, given)) and (
            called in _ONE_ANSWER or getattr(called, "__module__", "") == math.__name__
        ):
            return f"calls {ast.unparse(function)!r} of a value per element or tensor, {_ASKS}"
        if isinstance(function, ast.Attribute) and self.varies(node):
            method = self.varies(function.value)
            single = function.attr in ("max", "min") and len(given) == (0 if method else 1)
            if function.attr in _MIXING or single:
                return f"calls {function.attr!r}, {_MIXES}"
        return None

    def _value(self, node: ast.AST) -> Any:
        """What a name of the rule's module stands for."""
        if isinstance(node, ast.Attribute):
            return getattr(self._value(node.value), node.attr, None)
        return self.known.get(node.id) if isinstance(node, ast.Name) else None

    def _several(self, node: ast.AST) -> bool:
        """Whether an expression is several values, as a helper rule that writes two returns."""
        match node:
            case ast.Tuple() | ast.List():
                return True
            case ast.Name(id=name):
                return name in self.tuples
            case ast.Call(func=function):
                called = self._value(function)
                return isinstance(called, Rule) and len(called.writes) > 1
            case _:
                return False
