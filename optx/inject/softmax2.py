"""Softmax2: modules that call softmax get it in two passes over a row.

Source: "The Two-Pass Softmax Algorithm", arXiv 2001.04438.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from optx._errors import TargetError, check_whole
from optx._module_paths import paths_of
from optx.functional import softmax2
from optx.inject._attention import Heads, heads_of
from optx.inject._injection import Injection
from optx.inject._part import Part
from optx.inject._weights import is_conv, is_linear

# Modules that compute with exponentials of their own, out of reach.
_OTHERS = (
    nn.MultiheadAttention,
    nn.LogSoftmax,
    nn.Softmin,
    nn.CrossEntropyLoss,
    nn.AdaptiveLogSoftmaxWithLoss,
)
_CLOSED = {
    F.scaled_dot_product_attention: "scaled_dot_product_attention",
    F.multi_head_attention_forward: "multi_head_attention_forward",
}


class _Call(NamedTuple):
    """What is asked of softmax, by torch's names."""

    input: Tensor
    dim: int
    dtype: torch.dtype | None


def _of_module(input: Tensor, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> tuple[Any, ...]:
    return input, dim, dtype


def _of_torch(input: Tensor, dim: Any, dtype: Any = None, out: Any = None) -> tuple[Any, ...]:
    return input, None if out is not None else dim, dtype


_FORMS: dict[Any, Callable[..., tuple[Any, ...]]] = {
    F.softmax: _of_module,
    torch.softmax: _of_torch,
    torch.Tensor.softmax: _of_torch,
}


class _Calls(TorchFunctionMode):
    """While it is entered, calls of softmax are answered in two passes."""

    def __init__(self, min_row: int) -> None:
        super().__init__()
        self.min_row, self.seen = min_row, 0
        self.closed = ""

    def __torch_function__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """One call of a function of torch."""
        kwargs = kwargs or {}
        if func in _FORMS:
            call = _Call(*_FORMS[func](*args, **kwargs))
            if type(call.dim) is int:  # no name, no choice of torch's, and nothing to write into
                self.seen += 1
                if call.input.ndim and call.input.shape[call.dim] >= self.min_row:
                    return softmax2(*call)
        elif func in _CLOSED:
            self.closed = _CLOSED[func]
        return func(*args, **kwargs)


class TwoPasses(Part):
    """The calls of softmax within a module's call."""

    def __init__(self, path: str, min_row: int) -> None:
        super().__init__()
        self.path, self.min_row = path, min_row

    def around(
        self, call: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The module's call."""
        mode = _Calls(self.min_row)
        with mode:
            output = call(*args, **kwargs)
        if mode.closed:
            raise TargetError(
                f"Softmax2 can't serve {self.path!r} ({type(module).__name__}): its call reaches torch's "
                f"{mode.closed}, whose softmax is its own. {_EAGER}"
            )
        if not mode.seen:
            raise TargetError(
                f"Softmax2 on {self.path!r} ({type(module).__name__}) did nothing: its call did not reach "
                "torch's softmax with a dimension. Target the modules that call it."
            )
        return output

    def note(self) -> str:
        """Which rows."""
        return f"rows of {self.min_row} or more" if self.min_row > 1 else ""


_EAGER = "Load the model with attn_implementation='eager', or target the modules that call torch.softmax."


@dataclass(frozen=True)
class Softmax2(Injection):
    """Softmax by two reads and one write of each row, in the modules that call it.

    Within a served module's call, `torch.softmax`, ``torch.nn.functional.softmax`` and ``Tensor.softmax`` are
    `optx.functional.softmax2`: nn.Softmax modules, and attention that is written out (``eager`` in
    transformers), also in training. It adds no parameter; ``remove()`` gives back what was, bit for bit.

    Serves any module whose call reaches softmax. By default: the model's nn.Softmax modules; name others.

    Args:
        min_row: shorter rows are left to torch. 1: all are served.

    Paper values:
        None to set. Rows out of the caches gain; ``min_row=65536`` leaves the others as they were.

    Limits: Attention by scaled_dot_product_attention or torch's MultiheadAttention has a softmax of its own,
    which can't be reached; it is told at attach or at the first call, by the class's name. There is no
    ``merge()``, as no weight changes.

    Keywords: two-pass softmax, long rows, attention, memory bandwidth, overflow.

    Evidence: no recipe, but ``optx bench softmax``; ``test_softmax2.py``, ``test_softmax2_attach.py``.

    Raises:
        OptxError: ``min_row`` is no whole number above 0.
        TargetError: at attach, a module that is known to be out of reach, or no nn.Softmax by default; at the
            first call, one whose call reaches no softmax.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Softmax(dim=-1))
        >>> handle = optx.attach(model, optx.Softmax2())
        >>> bool((model(torch.randn(2, 4)).sum(-1) - 1).abs().max() < 1e-6)
        True

    Source: arXiv 2001.04438.
    """

    name: ClassVar[str] = "softmax2"
    role: ClassVar[str] = ""
    serves: ClassVar[str] = "modules that call softmax"

    min_row: int = 1

    def __post_init__(self) -> None:
        check_whole("Softmax2", "min_row", self.min_row, 1)

    def places(self, model: nn.Module) -> Collection[str]:
        """Modules that are a softmax.

        Raises:
            TargetError: there are none.
        """
        kinds: tuple[type[nn.Module], ...] = (nn.Softmax, nn.Softmax2d)
        paths = paths_of(model)
        found = [paths.here[path] for path, module in paths.modules.items() if isinstance(module, kinds)]
        if not found:
            raise TargetError(
                f"attach: Softmax2 serves nn.Softmax modules by default; {type(model).__name__} has none. "
                "Name the modules that call the function: attach(model, optx.Softmax2(), targets=...)."
            )
        return found

    def part(self, module: nn.Module, path: str) -> Part:
        """The calls of one module."""
        if is_linear(module) or is_conv(module):
            raise TargetError(
                f"attach: Softmax2 serves {self.serves}; {path!r} is a {type(module).__name__}, which "
                "does not."
            )
        if isinstance(module, _OTHERS):
            raise TargetError(
                f"attach: Softmax2 serves {self.serves}; {path!r} is a {type(module).__name__}, whose "
                f"softmax is its own. {_EAGER}"
            )
        chosen = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if isinstance(chosen, str) and chosen != "eager" and isinstance(heads_of(module, None, None), Heads):
            raise TargetError(
                f"attach: Softmax2 serves {self.serves}; {path!r} is a {type(module).__name__} with "
                f"attn_implementation={chosen!r}, whose softmax is its own. {_EAGER}"
            )
        return TwoPasses(path, self.min_row)
