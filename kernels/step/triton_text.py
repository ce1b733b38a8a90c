"""Text of generated Triton modules: rules in Triton's dialect, indentation, line breaks."""

from __future__ import annotations

import ast
from collections.abc import Callable, Collection, Iterable

from optx._rules import Rule
from optx.kernels.step.text import rule_text

JIT = "@triton.jit"


def dialect(
    rules: Iterable[Rule],
    suffix: str,
    math: str,
    inverted: Callable[[Rule], Collection[str]] = lambda _rule: (),
) -> list[str]:
    """The functions of some rules.

    Args:
        rules: what to define.
        suffix: added to each function's name.
        math: the dtype that they compute in: ``tl.float32`` or ``tl.float64``.
        inverted: as for `rule_text`.
    """
    tree = ast.parse("\n".join(rule_text(rules, suffix, JIT, lambda v: repr(float(v)), inverted)))
    lines: list[str] = []
    for definition in tree.body:
        text = ast.unparse(ast.fix_missing_locations(_Dialect(math).visit(definition)))
        lines += ["", "", *text.split("\n")]
    return lines


class _Dialect(ast.NodeTransformer):
    """Makes a rule's text mean in Triton what it means on tensors.

    Triton gives a bare literal the dtype of the other operand of an operator, but takes it for float32 where
    it stands alone, as an argument or a result; and it has no ``**``.
    """

    def __init__(self, math: str) -> None:
        self.math = math

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        return (
            ast.parse(f"tl.full((), {node.value!r}, {self.math})", mode="eval").body
            if _is_float(node)
            else node
        )

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        if isinstance(node.op, ast.Pow):
            return self._power(self.visit(node.left), node.right)
        if not (_is_float(node.left) and _is_float(node.right)):
            node.left, node.right = self._operand(node.left), self._operand(node.right)
            return node
        return self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        node.left = self._operand(node.left)
        node.comparators = [self._operand(c) for c in node.comparators]
        return node

    def _operand(self, node: ast.expr) -> ast.expr:
        return node if _is_float(node) else self.visit(node)

    def _power(self, x: ast.expr, exponent: ast.expr) -> ast.AST:
        match exponent:
            case ast.Constant(value=0.5):
                return ast.Call(ast.Name("sqrt"), [x], [])
            case ast.Constant(value=2.0) if isinstance(x, ast.Name):
                return ast.BinOp(x, ast.Mult(), x)
            case _:
                return ast.Call(ast.Name("power"), [x, self.visit(exponent)], [])


def _is_float(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, float)


def wrapped(line: str, width: int = 110) -> str:
    """The line, broken after commas inside brackets where it is too long to read."""
    hanging = " " * (len(line) - len(line.lstrip()) + 8)
    parts: list[str] = []
    start, depth, comma = 0, 0, 0
    for i, letter in enumerate(line):
        depth += (letter in "([") - (letter in ")]")
        if i - start + (len(hanging) if parts else 0) >= width and comma > start:
            parts.append(line[start:comma])
            start = comma
        if letter == "," and depth:
            comma = i + 1
    first, *rest = [*parts, line[start:]]
    return f"\n{hanging}".join([first, *(part.strip() for part in rest)])
