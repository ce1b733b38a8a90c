"""What a mutant is: cosmic-ray's operators and a few of our own, less what no test could notice."""

from __future__ import annotations

import ast
import difflib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import parso
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator

# Of cosmic-ray's, those that a typing slip or a wrong thought makes: the neighbour, and the opposite.
_BINARY = (
    "Add_Sub Sub_Add Mul_Div Div_Mul Pow_Mul FloorDiv_Mul Mod_Mul LShift_RShift RShift_LShift BitAnd_BitOr "
    "BitOr_BitAnd BitXor_BitAnd"
)
_COMPARISON = "Lt_LtE Lt_GtE LtE_Lt LtE_Gt Gt_GtE Gt_LtE GtE_Gt GtE_Lt Eq_NotEq NotEq_Eq Is_IsNot IsNot_Is"
_UNARY = "Delete_USub Delete_Invert Delete_Not"
_OTHERS = (
    "ReplaceTrueWithFalse ReplaceFalseWithTrue ReplaceAndWithOr ReplaceOrWithAnd AddNot "
    "ReplaceBreakWithContinue ReplaceContinueWithBreak NumberReplacer ZeroIterationForLoop"
)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Calls without which a value is another: x.abs() -> x, abs(x) -> (x).
_METHODS = frozenset(_words(
    "abs sign sqrt rsqrt square exp log neg reciprocal float double half to clamp_min clamp_max clamp t "
    "flatten clone sum mean any all conj"
))  # fmt: skip
_FUNCTIONS = frozenset(_words("abs max min round int float bool wide sqrt sorted reversed sum log exp"))


class DropStatement(Operator):
    """Leaves a statement out that is there for what it does: a call, a += b, a[i] = b, a.b = c."""

    def mutation_positions(self, node: Any) -> Iterator[Any]:
        """Where."""
        if node.type != "simple_stmt":
            return
        what = node.children[0]
        call = what.type == "atom_expr" and what.children[-1].get_code().startswith("(")
        declared = what.type == "expr_stmt" and what.children[1].type == "annassign"
        stored = what.type == "expr_stmt" and not (declared and len(what.children[1].children) == 2) and (
            what.children[0].type in ("atom_expr", "power") or what.children[1].type == "augassign"
            or what.children[1].get_code().strip() in ("+=", "-=", "*=", "/=", "|=", "&=")
        )  # fmt: skip
        if call or stored:
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        """With ``pass`` there."""
        prefix = node.get_first_leaf().prefix
        node.children[0] = parso.parse(f"{prefix}pass")
        return node

    @classmethod
    def examples(cls) -> tuple[Any, ...]:
        """None."""
        return ()


class DropCall(DropStatement):
    """Leaves one call of a chain, or around a value, out."""

    def mutation_positions(self, node: Any) -> Iterator[Any]:
        """Where."""
        if node.type != "atom_expr":
            return
        for i in self._places(node):
            yield node.children[i].start_pos, node.children[i].end_pos

    def _places(self, node: Any) -> Iterator[int]:
        parts = node.children
        for i, part in enumerate(parts[:-1]):
            called = parts[i + 1].get_code().startswith("(")
            if called and part.type == "trailer" and part.get_code()[1:] in _METHODS:
                yield i
        if parts[0].type == "name" and parts[0].value in _FUNCTIONS and len(parts) == 2:
            yield 0

    def mutate(self, node: Any, index: int) -> Any:
        """Without it."""
        i = list(self._places(node))[index]
        prefix, code = node.get_first_leaf().prefix, [part.get_code() for part in node.children]
        if i == 0:  # max(a, b) -> (a, b)[0]
            inner = "[0]" if "," in code[1] and code[0].strip() in ("max", "min") else ""
            return parso.parse(f"{prefix}{code[1]}{inner}")
        return parso.parse("".join(code[:i] + code[i + 2 :]))


class DropContext(DropStatement):
    """``with manager:`` -> with a manager that does nothing."""

    def mutation_positions(self, node: Any) -> Iterator[Any]:
        """Where."""
        if node.type == "with_stmt" and node.children[1].type not in ("with_item", "operator"):
            yield node.children[1].start_pos, node.children[1].end_pos

    def mutate(self, node: Any, index: int) -> Any:
        """With nullcontext."""
        node.children[1] = parso.parse(' __import__("contextlib").nullcontext()')
        return node


class Always(DropStatement):
    """A condition or comparison that is True whatever holds."""

    value = "True"

    def mutation_positions(self, node: Any) -> Iterator[Any]:
        """Where."""
        if node.type in ("comparison", "and_test", "or_test", "not_test") and (
            node.parent is None or node.parent.type not in ("and_test", "or_test", "not_test")
        ):
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        """As a constant."""
        return parso.parse(f"{node.get_first_leaf().prefix}{self.value}")


class Never(Always):
    """The same, False."""

    value = "False"


def operators() -> dict[str, Operator]:
    """All, by name."""
    names = [f"ReplaceBinaryOperator_{n}" for n in _words(_BINARY)]
    names += [f"ReplaceComparisonOperator_{n}" for n in _words(_COMPARISON)]
    names += [f"ReplaceUnaryOperator_{n}" for n in _words(_UNARY)]
    names += _words(_OTHERS)
    ours = (DropStatement, DropCall, DropContext, Always, Never)
    return {n: get_operator(f"core/{n}")() for n in names} | {o.__name__: o() for o in ours}


# ---- what is left out -------------------------------------------------------------------------------

_SPOKEN = _words("__repr__ __str__ note report plan extra_repr")
_TALK = _words("warn warnings logger log print progress")
_TYPES = _words("cast Callable Literal TypeVar dict list tuple")
_NOWHERE = _words("import_name import_from raise_stmt assert_stmt decorator fstring global_stmt")


def unseen(node: Any) -> bool:
    """Whether what a node says is for readers only: types, texts, messages, logging."""
    child, parent = node, node.parent
    while parent is not None:
        kind = parent.type
        if kind in _NOWHERE:
            return True
        if kind == "annassign" and (child is parent.children[1] or len(parent.children) == 2):
            return True
        if kind == "argument" and parent.children[0].get_code().strip() == "strict":
            return True  # zip's own check of what holds
        if kind == "parameters" and node.type == "operator":
            return True  # the * and / of a signature
        if kind == "param" and child.type != "operator" and _is_annotation(child, parent):
            return True
        if kind == "funcdef" and (parent.name.value in _SPOKEN or child is parent.annotation):
            return True
        if kind == "if_stmt" and parent.children[1].get_code().strip() == "TYPE_CHECKING":
            return True
        if kind in ("atom_expr", "simple_stmt") and parent.get_first_leaf().value in _TALK:
            return True
        if kind == "atom_expr" and parent.children[0].get_code().strip() in _TYPES and _is_index(child):
            return True
        child, parent = parent, parent.parent
    return _is_alias(node)


def _is_index(trailer: Any) -> bool:
    return trailer.type == "trailer" and trailer.children[0].value == "["


def _is_annotation(child: Any, param: Any) -> bool:
    return param.annotation is not None and child is not param.default and child is not param.name


def _is_alias(node: Any) -> bool:
    """``Name = int | None`` at a module's top."""
    return (
        node.type == "operator"
        and node.value == "|"
        and node.parent is not None
        and node.parent.parent is not None
        and node.parent.parent.type == "expr_stmt"
        and node.parent.parent.parent.parent is not None
        and node.parent.parent.parent.parent.type == "file_input"
    )


# ---- sampling -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mutant:
    """One change of one module."""

    module: str
    line: int
    operator: str
    occurrence: int
    code: str
    diff: str

    @property
    def key(self) -> str:
        """The same for the same change, wherever the line has moved to."""
        changed = [l for l in self.diff.splitlines() if l[:1] in "+-" and l[:3] not in ("+++", "---")]
        return self.module + "\n" + "\n".join(changed)


def candidates(code: str) -> dict[int, list[tuple[str, int]]]:
    """Line -> the operators that have a place there, and the number of each place."""
    found: dict[int, list[tuple[str, int]]] = {}
    nodes = list(ast_nodes(get_ast(code)))
    for name, operator in operators().items():
        occurrence = 0
        for node in nodes:
            for start, _ in operator.mutation_positions(node):
                if not unseen(node):
                    found.setdefault(start[0], []).append((name, occurrence))
                occurrence += 1
    return found


def mutant(module: str, code: str, line: int, operator: str, occurrence: int) -> Mutant | None:
    """The changed module; None if it is no Python, or the same to Python."""
    changed = mutate_code(code, operators()[operator], occurrence)
    if changed is None:
        return None
    try:
        if ast.dump(ast.parse(changed)) == ast.dump(ast.parse(code)):
            return None
        compile(changed, module, "exec")
    except (SyntaxError, ValueError):
        return None
    before, after = (c.splitlines(keepends=True) for c in (code, changed))
    diff = "".join(difflib.unified_diff(before, after, module, module, n=2))
    return Mutant(module, line, operator, occurrence, changed, diff)


def sample(sources: dict[str, str], number: int, seed: int) -> list[Mutant]:
    """So many mutants, each of another line, drawn from all lines alike."""
    random_ = random.Random(seed)
    places: list[tuple[str, int, str, int]] = []
    for module, code in sorted(sources.items()):
        for line, choices in sorted(candidates(code).items()):
            places += [(module, line, *random_.choice(choices))]
    random_.shuffle(places)
    found: list[Mutant] = []
    for module, line, operator, occurrence in places:
        if len(found) == number:
            break
        one = mutant(module, sources[module], line, operator, occurrence)
        if one is not None:
            found.append(one)
    return found


def planted(code: str, known: dict[str, Any]) -> Mutant | None:
    """A mutant of before in the module as it is now; None if its place is gone, or there are several."""
    lines = [line for line in known["diff"].splitlines(keepends=True)[2:] if line[:2] != "@@"]
    before = "".join(line[1:] for line in lines if line[0] in " -")
    after = "".join(line[1:] for line in lines if line[0] in " +")
    if code.count(before) != 1:
        return None
    changed = code.replace(before, after)
    diff = "".join(
        difflib.unified_diff(
            *(c.splitlines(keepends=True) for c in (code, changed)), known["module"], known["module"], n=2
        )
    )
    line = code[: code.index(before)].count("\n") + 1
    return Mutant(known["module"], line, known["operator"], -1, changed, diff)
