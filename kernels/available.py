"""Whether a compiler can be used here. It may be absent, broken, or switched off."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import pkgutil
import sys

from optx._errors import OptxError

# A version whose insides are others than optx knows can't be used either.
_USED = {"numba": ("optx.kernels.step.emit_cpu", "optx.kernels.jit"), "triton": ("optx.kernels.step.triton",)}


def why_unavailable(package: str) -> str | None:
    """Why kernels of a package can't be compiled here, in words; None if they can.

    Args:
        package: ``"numba"`` or ``"triton"``.
    """
    failed = _why_not_imported(package)
    if failed is None and package == "numba" and sys.modules["numba"].config.DISABLE_JIT:
        return "Numba's compiler is switched off (NUMBA_DISABLE_JIT)"
    return failed


def demand(package: str, what: str) -> None:
    """Raise unless kernels of a package can be compiled here.

    Args:
        package: see `why_unavailable`.
        what: needs them, in the plural; the beginning of the sentence.
    """
    if (reason := why_unavailable(package)) is not None:
        raise OptxError(f"{what} need compiled kernels, and {reason}; there is no other way to compute them.")


@functools.cache  # a second try at a broken package fails in other ways, or half succeeds
def _why_not_imported(package: str) -> str | None:
    try:
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    except ValueError:  # it was put into sys.modules without a specification, or as None
        pass
    for module in (package, *_USED[package]):
        try:
            importlib.import_module(module)
            pkgutil.get_data("optx.kernels", "cpu.py")  # kernels are made of text, which frozen programs lack
        except Exception as error:  # ImportError, OSError, SystemError, AttributeError: all were seen
            if isinstance(error, ModuleNotFoundError) and error.name == package:
                return f"{package} is not installed"
            said = str(error).strip().partition("\n")[0]
            return f"{package} can't be imported ({type(error).__name__}: {said})"
    return None
