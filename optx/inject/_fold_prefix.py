"""`optx.fold_prefix`: after the training, a prefix without the MLP that made it."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from optx._errors import OptxError
from optx._names import is_dtensor
from optx.inject._handle import Handle
from optx.inject._heads import Prefix


def fold_prefix(handle: Handle) -> None:
    """Replace the MLPs that make prefixes by what they make; outputs stay the same.

    For after the training: an optimizer that was made before moves tensors which are no longer used. The
    handle then saves and loads like one of ``PrefixTuning(mlp=None)``.

    Args:
        handle: of `optx.PrefixTuning`, `optx.MAM`, or any injection with a prefix that has an MLP.

    Raises:
        OptxError: the handle has no such prefix, or has been removed.

    Example:
        >>> import torch, optx
        >>> attention = torch.nn.ModuleDict({"attn": torch.nn.MultiheadAttention(8, 2)})
        >>> handle = optx.attach(attention, optx.PrefixTuning(length=3, mlp=16), targets="attn")
        >>> optx.fold_prefix(handle)
        >>> sorted(handle.state_dict())
        ['attn.prefix.key', 'attn.prefix.value']
    """
    if handle.removed:
        raise OptxError("fold_prefix: this handle has been removed from its model.")
    todo = [one for one in handle.served if isinstance(one.part, Prefix) and one.part.mlp is not None]
    if not todo:
        raise OptxError(f"fold_prefix: {handle!r} has no prefix that is made by an MLP, so nothing to fold.")
    for one in todo:
        if any(is_dtensor(p) for p in one.part.parameters()):
            raise OptxError(
                f"fold_prefix: what is attached to {one.path!r} is sharded over a device mesh. Save it with "
                "handle.save(), attach that to the model where it is whole, and fold it there."
            )
    known: dict[int, Any] = {}
    for one in todo:
        assert isinstance(one.part, Prefix)
        one.part.drop_mlp()
        one.injection = known.setdefault(id(one.injection), replace(one.injection, mlp=None))  # pyright: ignore[reportCallIssue]
    whole: Any = handle.injection
    if id(whole) in known:
        handle.injection = known[id(whole)]
    elif any(option.name == "mlp" for option in fields(whole)):
        # A composite makes its members from an option of its own.
        handle.injection = replace(whole, mlp=None)
