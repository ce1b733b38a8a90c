"""What a head of `optx.SphericalHead` gives in training: its input, which is no output and says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from optx._errors import OptxError

# What models do between their head and their end, and what looks at a tensor without computing with it.
_MOVES = (
    *(
        "view",
        "reshape",
        "flatten",
        "unflatten",
        "contiguous",
        "squeeze",
        "unsqueeze",
        "transpose",
        "permute",
    ),
)
_PIECES = (
    *("__getitem__", "__iter__", "narrow", "select", "split", "chunk", "unbind", "cat", "stack"),
    "index_select",
)
_CASTS = ("to", "float", "double", "bfloat16", "type", "cpu", "cuda", "clone", "detach", "as_subclass")
_LOOKS = (
    *(
        "__get__",
        "__set__",
        "__len__",
        "__repr__",
        "__hash__",
        "__deepcopy__",
        "__reduce_ex__",
        "size",
        "dim",
    ),
    *("numel", "stride", "is_contiguous", "is_floating_point", "is_complex", "data_ptr", "get_device"),
    *("requires_grad_", "retain_grad", "register_hook", "untyped_storage", "element_size", "storage_offset"),
)
_ALLOWED = frozenset((*_MOVES, *_PIECES, *_CASTS, *_LOOKS))


class HandedOn(Tensor):
    """A head's input in the place of its outputs.

    It may be moved, cut and cast, and `SphericalHandle.loss` takes it. Anything else would compute with it as
    if it had a column for each class, which where there are as many classes as the head has inputs nobody
    would notice.
    """

    @classmethod
    def of(cls, x: Tensor) -> HandedOn:
        """This tensor, of this type."""
        return x.as_subclass(cls)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", str(func))
        if name not in _ALLOWED:
            raise OptxError(
                f"SphericalHead: {name}() was called with what the head gives in training mode, which is its "
                "input and not its outputs. Give it to handle.loss(model(x), labels), in the place of every "
                "other loss; call a model that makes a loss of its own without labels; and for outputs, use "
                "model.eval() or torch.no_grad()."
            )
        own: Any = super()
        return own.__torch_function__(func, types, args, kwargs or {})


def plain(hidden: Tensor) -> Tensor:
    """The tensor that was handed on."""
    return hidden.as_subclass(Tensor) if isinstance(hidden, HandedOn) else hidden
