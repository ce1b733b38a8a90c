"""What a kernel may be pointed at: tensors whose memory holds what their shape and dtype say.

A kernel gets bare addresses. Whatever could make one lead elsewhere is asked of the tensor when its address
is taken: once in full words (`why_not_plain`, `why_not_dense`), and in every later step by comparing it with
what it was then (`Likeness`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optx._names import is_dtensor

# The dtypes of elements that kernels load and store.
DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


def why_not_plain(t: Tensor) -> str | None:
    """Why a tensor's address does not lead to its elements, as ``is a TwoTensor, ...``; None if it does."""
    if is_dtensor(t):
        return "is a DTensor"
    if answers_itself(type(t)):
        return f"is a {type(t).__name__}, which answers torch's functions in its own way"
    if t.layout != torch.strided:
        return f"is sparse ({t.layout})"
    if t.is_meta:
        return "is on the meta device, without memory"
    if t.is_conj() or t.is_neg():
        return "is a lazy conjugate or negation (see Tensor.resolve_neg)"
    if t._is_zerotensor() or torch._C._functorch.is_functorch_wrapped_tensor(t):  # pyright: ignore
        return "has no memory of its own"
    if torch._is_functional_tensor(t):  # pyright: ignore
        return "is a functional tensor, without memory of its own"
    return LOST if _lost(t) else None


LOST = "has lost its memory (its storage was freed or shrunk)"


def lost_memory(t: Tensor) -> bool:
    """Whether the storage behind a tensor was freed or shrunk; torch's own operations crash on such a one.

    False for what never has plain memory (subclasses, meta): torch knows what to do with it, or says so.
    """
    if answers_itself(type(t)) or t.layout != torch.strided or t.is_meta or not t.numel():
        return False
    if t._is_zerotensor() or torch._C._functorch.is_functorch_wrapped_tensor(t):  # pyright: ignore
        return False
    return not torch._is_functional_tensor(t) and _lost(t)  # pyright: ignore


def writes_overlap(t: Tensor) -> bool:
    """Whether elements share memory (an expanded tensor), so that torch refuses to write it in place."""
    return t.layout == torch.strided and any(
        n > 1 and stride == 0 for n, stride in zip(t.shape, t.stride(), strict=True)
    )


def _lost(t: Tensor) -> bool:
    needed = extent(t)
    if not needed:
        return False
    storage = t.untyped_storage()
    return storage.data_ptr() == 0 or storage.nbytes() < t.storage_offset() * t.element_size() + needed


def why_not_dense(t: Tensor) -> str | None:
    """Why a tensor's elements don't fill one stretch of memory, each once, in whatever order."""
    if t.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(t):
        return None
    return f"of shape {tuple(t.shape)} has gaps in memory (strides {t.stride()})"


class Extents:
    """The stretches of memory that some tensors lie in.

    Args:
        starts: addresses of their first elements, 0 where there are none.
        sizes: in bytes.
    """

    def __init__(self, starts: Sequence[int], sizes: Sequence[int]) -> None:
        spans = sorted((a, a + size) for a, size in zip(starts, sizes, strict=True) if a and size)
        self._starts = np.array([a for a, _ in spans], np.int64)
        self._ends = np.array([0, *(b for _, b in spans)], np.int64)
        self.overlap = bool((self._ends[1:-1] > self._starts[1:]).any())

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Extents:
        """Of tensors with plain memory."""
        return cls([t.data_ptr() for t in tensors], [extent(t) for t in tensors])

    def meet(
        self, starts: Sequence[int] | np.ndarray[Any, Any], sizes: Sequence[int] | np.ndarray[Any, Any]
    ) -> bool:
        """Whether other tensors lie partly in there; these do not overlap each other."""
        first = np.asarray(starts, np.int64)
        # The last stretch that begins before the end: of those before it none reaches as far.
        before = np.searchsorted(self._starts, first + np.asarray(sizes, np.int64))
        return bool(((self._ends[before] > first) & (first > 0)).any())


def extent(t: Tensor) -> int:
    """Bytes from a tensor's first element to its last."""
    if t.is_contiguous() or not t.numel():
        return t.numel() * t.element_size()
    return (
        1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
    ) * t.element_size()


@functools.cache
def answers_itself(kind: type) -> bool:
    """Whether a tensor type computes in its own way (torchao's weights, FakeTensor): it may lack memory."""
    function = kind.__torch_function__  # type: ignore[attr-defined]
    usual = (Tensor.__torch_function__.__func__, torch._C._disabled_torch_function_impl)  # type: ignore[attr-defined]
    dispatch = torch._C._disabled_torch_dispatch_impl  # pyright: ignore
    return getattr(function, "__func__", function) not in usual or kind.__torch_dispatch__ is not dispatch  # type: ignore[attr-defined]


class _Compared:
    """Compares tensors with others by what can be asked of them from Python."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._seen = [_features(t) for t in tensors]

    def check(self, *tensors: Tensor) -> bool:
        """Whether each is as its counterpart was."""
        return [_features(t) for t in tensors] == self._seen


def _features(t: Tensor) -> tuple[Any, ...]:
    flags = (t.requires_grad, t.is_neg(), t.is_conj(), t._is_zerotensor())  # pyright: ignore
    return (type(t), t.dtype, t.device, t.layout, t.shape, t.stride(), *flags)


class Likeness:
    """Whether tensors are like those that were looked at: type, dtype, device, shape, strides, lazy bits.

    Not their addresses. One comparison in C++ serves all tensors of a column; asked from Python it would cost
    a small model's step a quarter of its time.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._count = len(tensors)
        self._guards: Any = _native(tensors) or _Compared(tensors)

    def __call__(self, tensors: Sequence[Tensor]) -> bool:
        """Whether each is like its counterpart."""
        return len(tensors) == self._count and self._guards.check(*tensors)


def _native(tensors: Sequence[Tensor]) -> Any:
    """torch's own guards, as torch.compile uses them; None where this torch has others."""
    try:
        from torch._C._dynamo.guards import TensorGuards

        guards = TensorGuards(
            *tensors,
            dynamic_dims_sizes=[list(t.shape) for t in tensors],  # type: ignore[arg-type]
            dynamic_dims_strides=[list(t.stride()) for t in tensors],  # type: ignore[arg-type]
        )
        # They take the same tensor twice for a mistake.
        return guards if guards.check(*tensors) else None
    except (ImportError, TypeError, RuntimeError, ValueError):
        return None
