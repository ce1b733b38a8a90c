"""Numba's ``cfunc`` and ``njit`` with a disk cache of our own, for generated modules.

Numba's own cache runs what lies in its folder, whoever put it there, stops at a file that was cut short,
takes one function's code for another's where files were exchanged, and knows a function by its own bytecode:
what it calls may have changed. Here a file has one function for one signature and processor, its name is a
digest of all that the code depends on, and it begins with a digest of that and of its content: any other file
is not looked at, and written anew. The folder is the user's alone (`optx._cache.PrivateFolder`).

``NUMBA_DISABLE_JIT`` counts where a path is chosen (`optx.kernels.available`), not here: it may change
between that and the first step, or between two functions of one module.
"""
# Numba's insides have no types that a checker could follow.
# pyright: reportMissingTypeStubs=false, reportPrivateUsage=false, reportAttributeAccessIssue=false
# pyright: reportUntypedBaseClass=false

from __future__ import annotations

import hashlib
import pickle
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from typing import Any

import llvmlite
import numba
from numba.core import config, sigutils
from numba.core.caching import NullCache
from numba.core.ccallback import CFunc
from numba.core.compiler import Compiler, CompileResult
from numba.core.dispatcher import _FunctionCompiler
from numba.core.registry import CPUDispatcher
from numba.core.serialize import dumps

from optx._cache import kernel_folder
from optx.kernels import turns

Decorator = Callable[[Callable[..., Any]], Any]


def cfunc(signature: Any, cache: bool = False, **options: Any) -> Decorator:
    """`numba.cfunc`; compiled at once."""

    def decorate(function: Callable[..., Any]) -> Any:
        made = CFunc(function, sigutils.normalize_signature(signature), {}, options)
        if cache:
            made._cache = _Cache(function)
        with _switched_on():
            made.compile()
        return made

    return decorate


def njit(cache: bool = False, **options: Any) -> Decorator:
    """`numba.njit`; compiled when called."""

    def decorate(function: Callable[..., Any]) -> Any:
        targetoptions = {"nopython": True, "boundscheck": None, **options}
        made = CPUDispatcher(function, {}, targetoptions)
        if cache:
            made._cache = _Cache(function)
        return made

    return decorate


def part(**options: Any) -> Decorator:
    """`numba.njit` for what compiled functions alone call.

    It gets no wrapper for Python and no machine code of its own: of two dozen small functions to a kernel,
    these took half of the time that it is compiled in.
    """
    return lambda function: _Part(function, {"nopython": True, "boundscheck": None, **options})


class _Part(CPUDispatcher):
    def __init__(self, function: Callable[..., Any], options: dict[str, Any]) -> None:
        super().__init__(function, {}, options)
        self._compiler = _PartCompiler(function, self.targetdescr, options, {}, Compiler)

    def add_overload(self, cres: Any) -> None:
        self.overloads[tuple(cres.signature.args)] = cres  # and nothing that a call from Python would find


class _PartCompiler(_FunctionCompiler):
    def _customize_flags(self, flags: Any) -> Any:
        flags.no_cpython_wrapper = flags.no_cfunc_wrapper = flags.no_compile = True
        return flags

    def _compile_core(self, args: Any, return_type: Any) -> Any:
        made = super()._compile_core(args, return_type)
        name = object()  # callers look a function up by its entry point, which here is none
        made.target_context.insert_user_function(name, made.fndesc, [made.library])
        return made._replace(entry_point=name)


@contextmanager
def _switched_on() -> Generator[None]:
    """Numba's own library compiles nothing, and fails, where its compiler was switched off since."""
    if not (off := config.DISABLE_JIT):
        yield
        return
    config.DISABLE_JIT = 0
    try:
        yield
    finally:
        config.DISABLE_JIT = off


class _Cache(NullCache):
    """What Numba asks for compiled code, and gives it to."""

    def __init__(self, function: Any) -> None:
        self._function = function

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The code of a signature, or None."""
        target_context.refresh()
        kept = self._kept(sig, target_context)
        return self._kept(sig, target_context) if kept is None and turns.wait() else kept

    def _kept(self, sig: Any, target_context: Any) -> Any:
        # Whatever is wrong with a file, compiling is the remedy.
        with suppress(Exception):
            key = self._key(sig, target_context.codegen())
            content = kernel_folder().read(self._name(key))
            if content[: len(_MAGIC) + 32] == _head(key, payload := content[len(_MAGIC) + 32 :]):
                return CompileResult._rebuild(target_context, *pickle.loads(payload))
        return None

    def save_overload(self, sig: Any, cres: Any) -> None:
        """Keep the code of a signature, where there is room for it."""
        if cres.library.has_dynamic_globals or any(not part.can_cache for part in cres.lifted):
            return
        key = self._key(sig, cres.codegen)
        payload = dumps(cres._reduce())
        with suppress(OSError):  # no home, a folder that can't be written, a full disk
            kernel_folder().write(self._name(key), _head(key, payload) + payload)

    def _key(self, sig: Any, codegen: Any) -> bytes:
        """All that compiled code depends on. A generated module's name has the digest of its text."""
        where = (self._function.__module__, self._function.__qualname__, str(sig))
        versions = (numba.__version__, llvmlite.__version__, sys.version)
        settings = tuple(str(getattr(config, name, None)) for name in _SETTINGS)
        return repr((where, versions, codegen.magic_tuple(), settings)).encode()

    def _name(self, key: bytes) -> str:
        function = self._function
        return f"{function.__module__}.{function.__qualname__}-{hashlib.sha256(key).hexdigest()[:20]}.nbc"


_MAGIC = b"optx kernel 1\n"
_SETTINGS = (
    "OPT",
    "LOOP_VECTORIZE",
    "SLP_VECTORIZE",
    "BOUNDSCHECK",
    "DISABLE_INTEL_SVML",
    "DEBUGINFO_DEFAULT",
)


def _head(key: bytes, payload: bytes) -> bytes:
    return _MAGIC + hashlib.sha256(key + b"\n" + payload).digest()
