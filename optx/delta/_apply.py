"""A change laid onto a base: what gives each tensor of the result, whole or by pieces."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from optx.delta._checkpoint_source import Source
from optx.delta._content import Verified, dtype_of, same_source
from optx.delta._difference import Difference
from optx.delta._float32_sums import add, check_overflow, finite

_NOT_THE_BASE = (
    "Delta.apply: this is not the base that the delta was taken from: {} differs. To apply it to another "
    "model all the same, use delta.unbound()."
)


class Onto:
    """Base plus scale times the change.

    Args:
        delta: the change.
        source: the base.
        scale: of the change.
    """

    def __init__(self, delta: Difference, source: Source, scale: float) -> None:
        self._delta, self._scale, self._entries = delta, scale, source.entries
        olds = [*delta.bases, *([delta.one_pass.old] if delta.one_pass else [])]
        self._own = any(same_source(old, source) for old in olds)
        self._base = source if self._own else verified(delta, source, _NOT_THE_BASE)
        self._one_pass = delta.one_pass if scale == 1.0 else None

    def whole(self, name: str) -> Tensor:
        """One tensor of the result."""
        delta = self._delta
        if name in delta.whole:
            return delta[name].clone()
        if name not in delta.entries:
            return self._base.read(name).clone()
        entry = self._entries[name]
        if not entry.dtype.is_floating_point:
            tensor = self._base.read(name)
            return delta[name].to(tensor.device, tensor.dtype, copy=True)
        if self._one_pass is not None:
            base = None if self._own else self._base
            return self._one_pass.onto(base, name, 0, entry.numel).view(entry.shape)
        return self._sum(name, self._base.read(name), delta[name])

    def pieces(self, name: str) -> Callable[[int, int], Tensor] | None:
        """What gives one by pieces, if anything does."""
        delta, base, one_pass = self._delta, self._base, self._one_pass
        if name not in delta.entries:
            return lambda begin, end: base.piece(name, begin, end)
        if name in delta.whole:
            return delta.reader(name) if delta.by_pieces else None
        if not self._entries[name].dtype.is_floating_point:
            return None
        if one_pass is not None:
            onto = None if self._own else base
            return lambda begin, end: one_pass.onto(onto, name, begin, end)
        if delta.by_pieces:
            change = delta.reader(name)
            return lambda begin, end: self._sum(name, base.piece(name, begin, end), change(begin, end))
        return None

    def _sum(self, name: str, base: Tensor, change: Tensor) -> Tensor:
        made = add(base, change, self._scale)
        if not finite(made):
            check_overflow("Delta.apply", name, made, base, change)
        return made


def verified(delta: Difference, source: Source, complaint: str) -> Source:
    """A base that is compared, while it is read, with the one that a delta was taken from.

    Args:
        delta: the delta.
        source: the base.
        complaint: the error's message, with the name's place in braces.
    """
    dtypes = dict[str, torch.dtype]()
    for name in delta.floating:
        if name in source.entries:
            own = next((base.entries[name].dtype for base in delta.bases if name in base.entries), None)
            known = dtype_of(delta.contents.get(name, "")) or own
            if known is not None:
                dtypes[name] = known
    if not dtypes:
        return source
    for base in delta.bases:
        base.watch()
    return Verified(source, delta.content, dtypes, complaint)
