"""Turns a rule's source into the text of one compiler's dialect, and runs generated modules."""

from __future__ import annotations

import ast
import copy
import hashlib
import linecache
import os
import pkgutil
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

from optx._cache import UnsafeCacheError, kernel_folder
from optx._errors import warn
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
    return _PREFIXES[ref.kind] + ref.name.replace(".", "_")


_PREFIXES = {
    **{"reg": "", "local": "l_", "slot": "s_", "cell": "m_"},
    **{"col": "c_", "hyper": "h_", "total": "t_"},
}


def indent(lines: Iterable[str], depth: int) -> list[str]:
    """The lines, so many levels deeper."""
    return [("    " * depth + line) if line else line for line in lines]


def cache_folder() -> Path | None:
    """Where compiled kernels are kept, made and tried; None where nothing can be kept."""
    try:
        folder = kernel_folder()
        folder.probe()
    except OSError:  # a read-only home is normal in containers and on clusters
        return None
    return folder.path


def source(package: str, file: str) -> str:
    """The text of a package's file, as its loader has it: packages may lie in an archive."""
    content = pkgutil.get_data(package, file)
    if content is None:
        raise FileNotFoundError(f"{package} has no {file}")
    return content.decode()


_loading = threading.RLock()


def _after_fork() -> None:
    global _loading  # another thread of the parent may have held it
    _loading = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def load_module(kind: str, text: str) -> ModuleType:
    """Run generated text as a module. Its name is its content's, so equal text is one module.

    The text is in memory only: a file could be another's by the time that it is read. Tracebacks, profilers
    and Triton find it through `linecache`.
    """
    name = f"{kind}_{hashlib.sha256(text.encode()).hexdigest()[:20]}"
    with _loading:  # a second thread must not find a module that is half executed
        if name in sys.modules:
            return sys.modules[name]
        _warn_of_unsafe_cache()
        file = f"<optx {name}>"
        linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
        module = ModuleType(name)
        sys.modules[name] = module
        try:
            exec(compile(text, file, "exec", dont_inherit=True), module.__dict__)
        except BaseException:
            del sys.modules[name]
            raise
        return module


_warned: set[str] = set()


def _warn_of_unsafe_cache() -> None:
    """Say, once, that there is a cache that isn't used. One that is merely absent is no news."""
    try:
        kernel_folder().check()
    except UnsafeCacheError as error:
        if str(error) not in _warned:
            _warned.add(str(error))
            warn(
                f"optx: {error}, so the compiled kernels in it are not used, and compiling is done anew in "
                "each process. Remove the folder, or set OPTX_CACHE_DIR to one of your own."
            )
    except OSError:
        pass
