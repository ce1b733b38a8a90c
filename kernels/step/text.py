"""Turns a rule's source into the text of one compiler's dialect."""

from __future__ import annotations

import ast
import copy
import hashlib
from collections.abc import Callable, Collection, Iterable, Sequence

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


class _Inverted(ast.NodeTransformer):
    """Writes divisions by some variables as products: ``x / c`` as ``x * (1.0 / c)``."""

    def __init__(self, names: Collection[str]) -> None:
        self.names = names

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        node = ast.BinOp(self.visit(node.left), node.op, self.visit(node.right))
        if isinstance(node.op, ast.Div) and isinstance(node.right, ast.Name) and node.right.id in self.names:
            return ast.BinOp(node.left, ast.Mult(), ast.BinOp(ast.Constant(1.0), ast.Div(), node.right))
        return node


def rule_text(
    rules: Iterable[Rule],
    suffix: str,
    decorator: str,
    number: Callable[[float], str],
    inverted: Callable[[Rule], Collection[str]] = lambda _rule: (),
) -> list[str]:
    """The functions of some rules and their helpers, each once, helpers first.

    Args:
        rules: what to define.
        suffix: added to each function's name, so that float32 and float64 versions can stand side by side.
        decorator: the compiler's.
        number: how the compiler wants a literal: Numba widens ``float32 * 1.0`` to float64.
        inverted: which of a rule's arguments are the same for all elements, and may be divided by once.
    """
    done: set[str] = set()
    text: list[str] = []

    def define(rule: Rule) -> str:
        name = rule_name(rule, suffix)
        if name in done:
            return name
        done.add(name)
        helpers = {n: define(h) for n, h in rule.source.helpers.items()}
        definition = _definition(rule, number, helpers, inverted(rule))
        definition.name = name
        text.extend(["", "", decorator, *ast.unparse(ast.fix_missing_locations(definition)).split("\n")])
        return name

    for rule in rules:
        define(rule)
    return text


def _definition(
    rule: Rule, number: Callable[[float], str], helpers: dict[str, str], inverted: Collection[str] = ()
) -> ast.FunctionDef:
    """A rule's own, in a compiler's words."""
    constants = rule.source.constants.items()
    names = {n: str(v) if isinstance(v, bool) else number(v) for n, v in constants} | helpers
    definition = copy.deepcopy(rule.source.definition)
    stored = {n.id for n in ast.walk(definition) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return _Literals(number, names).visit(_Inverted(set(inverted) - stored).visit(definition))


class _Renamed(ast.NodeTransformer):
    def __init__(self, names: dict[str, str]) -> None:
        self.names = names

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Name(self.names.get(node.id, node.id), node.ctx)


def rule_lines(
    rule: Rule,
    given: Sequence[str],
    targets: Sequence[str],
    suffix: str,
    number: Callable[[float], str],
    inverted: Collection[str] = (),
) -> list[str]:
    """A rule's statements in place of a call: each function more is a tenth of a second to Numba.

    Args:
        rule: its helpers are called, and have to be defined by `rule_text`.
        given: variables that it reads.
        targets: variables that it writes.
        suffix: of the helpers' names.
        number: as for `rule_text`.
        inverted: as for `rule_text`, of this rule.
    """
    helpers = {n: rule_name(helper, suffix) for n, helper in rule.source.helpers.items()}
    definition = _definition(rule, number, helpers, inverted)
    nodes = ast.walk(definition)
    own = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names = {n: f"r_{rule.name}_{n}" for n in own}  # no other variable begins so
    lines = [f"{names[n]} = {value}" for n, value in zip(rule.reads, given, strict=True) if n in own]
    names = dict(zip(rule.reads, given, strict=True)) | names
    *before, last = _Renamed(names).visit(definition).body
    lines += [
        line for one in before if not isinstance(one, ast.Expr) for line in ast.unparse(one).split("\n")
    ]
    return [*lines, f"{', '.join(targets)} = {ast.unparse(last.value)}"]


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
    **{"row": "r_", "column": "v_", "rows": "rs_", "columns": "vs_"},
}


def indent(lines: Iterable[str], depth: int) -> list[str]:
    """The lines, so many levels deeper."""
    return [("    " * depth + line) if line else line for line in lines]
