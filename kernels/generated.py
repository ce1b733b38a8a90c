"""Runs generated text as modules, and knows where what was compiled of them is kept."""

from __future__ import annotations

import hashlib
import linecache
import os
import pkgutil
import sys
import threading
from pathlib import Path
from types import ModuleType

from optx._cache import UnsafeCacheError, kernel_folder
from optx._errors import warn
from optx.kernels.turns import turn


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
            with turn(name):
                exec(compile(text, file, "exec", dont_inherit=True), module.__dict__)
        except BaseException:
            del sys.modules[name]
            raise
        return module


def load_loops(kind: str, package: str, file: str, imported: str, **dtypes: str) -> ModuleType:
    """Run a copy of a package's file of loops, compiled, from the disk cache where it was compiled before.

    Args:
        kind: as for `load_module`.
        package: that has the file.
        file: its name. It is not to be imported itself: what is compiled is kept by the text.
        imported: the texts of what it imports, or their digests, on which that has to depend too.
        dtypes: values of its constants, each of which is ``"float32"`` there.
    """
    text = source(package, file)
    for name, dtype in dtypes.items():
        default = f'{name} = "float32"\n'
        assert text.count(default) == 1
        text = text.replace(default, f'{name} = "{dtype}"\n')
    return load_module(kind, f"{text}# imports {hashlib.sha256(imported.encode()).hexdigest()}\n")


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
