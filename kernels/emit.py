"""Turns a rule's source into the text of one compiler's dialect, and keeps generated files."""

from __future__ import annotations

import ast
import copy
import hashlib
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

from optx._cache import cache_root
from optx._files import written_aside
from optx._rules import Rule
from optx.kernels.program import Ref


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
    prefix = {"reg": "", "slot": "s_", "cell": "m_", "col": "c_", "hyper": "h_", "total": "t_"}[ref.kind]
    return prefix + ref.name.replace(".", "_")


def indent(lines: Iterable[str], depth: int) -> list[str]:
    """The lines, so many levels deeper."""
    return [("    " * depth + line) if line else line for line in lines]


def cache_folder() -> Path:
    """Where generated kernels live: in optx's cache folder, or where that can't be written a private one.

    A read-only home is normal in containers and on clusters: then a folder of this process is used.
    """
    kernels = cache_root() / "kernels"
    try:
        kernels.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=kernels):
            return kernels
    except OSError:
        return Path(_private_folder())


_private: list[str] = []


def _private_folder() -> str:
    if not _private:
        _private.append(tempfile.mkdtemp(prefix="optx-kernels-"))
    return _private[0]


def load_module(kind: str, text: str) -> ModuleType:
    """Import generated text as a module from a file named after its content.

    The compilers key their disk caches by file, so equal text must always be the same untouched file.
    """
    name = f"{kind}_{hashlib.sha256(text.encode()).hexdigest()[:20]}"
    if name in sys.modules:
        return sys.modules[name]
    path = cache_folder() / f"{name}.py"
    if not path.exists() or path.read_text() != text:
        with written_aside(path) as aside:
            aside.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
