"""Turns a rule's source into the text of one compiler's dialect."""

from __future__ import annotations

import ast
import copy
import hashlib
from collections.abc import Callable, Iterable

from optx._rules import Rule
from optx.kernels.step.program import Ref


class _Literals(ast.NodeTransformer):
    """Rewrites numbers, and names of constants and helper rules, as one compiler wants them."""

    def __init__(self, number: Callable[[float], str], names: dict[str, str]) -> None:
        self.number, self.names = number, names

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, int | float) and not isinstance(node.value, bool):
            return ast.parse(self.number(node.value), mode="eval").body
        return node

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if isinstance(node.ctx, ast.Load) and node.id in self.names:
            return ast.parse(self.names[node.id], mode="eval").body
        return node


def rule_text(
    rules: Iterable[Rule], suffix: str, decorator: str, number: Callable[[float], str]
) -> list[str]:
    """The functions of some rules and their helpers, each once, helpers first.

    Args:
        rules: what to define.
        suffix: added to each function's name, so that float32 and float64 versions can stand side by side.
        decorator: the compiler's.
        number: how the compiler wants a literal: Numba widens ``float32 * 1.0`` to float64.
    """
    done: set[str] = set()
    text: list[str] = []

    def define(rule: Rule) -> str:
        name = rule_name(rule, suffix)
        if name in done:
            return name
        done.add(name)
        source = rule.source
        names = {n: number(v) for n, v in source.constants.items() if not isinstance(v, bool)}
        names |= {n: str(v) for n, v in source.constants.items() if isinstance(v, bool)}
        names |= {n: define(helper) for n, helper in source.helpers.items()}
        definition = copy.deepcopy(source.definition)
        _Literals(number, names).visit(definition)
        definition.name = name
        text.extend(["", "", decorator, *ast.unparse(ast.fix_missing_locations(definition)).split("\n")])
        return name

    for rule in rules:
        define(rule)
    return text


def rule_name(rule: Rule, suffix: str) -> str:
    """A name for a rule that no other rule of another source shares."""
    source = rule.source
    helpers = {name: rule_name(helper, "") for name, helper in source.helpers.items()}
    everything = (ast.unparse(source.definition), sorted(source.constants.items()), sorted(helpers.items()))
    digest = hashlib.sha256(repr(everything).encode()).hexdigest()[:6]
    return f"{rule.name}_{digest}{suffix}"


def variable(ref: Ref) -> str:
    """The local variable that holds a reference's value in generated code."""
    return _PREFIXES[ref.kind] + ref.name.replace(".", "_")


_PREFIXES = {
    **{"reg": "", "local": "l_", "slot": "s_", "cell": "m_"},
    **{"col": "c_", "hyper": "h_", "total": "t_"},
}


def indent(lines: Iterable[str], depth: int) -> list[str]:
    """The lines, so many levels deeper."""
    return [("    " * depth + line) if line else line for line in lines]
