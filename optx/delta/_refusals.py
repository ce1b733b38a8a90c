"""Tensors that have no difference: codes of quantised weights, and what is no plain tensor in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from optx._errors import OptxError
from optx._quantised_entries import quantised
from optx._safetensors import Entry


def check_not_quantised(
    who: str, entries: Mapping[str, Entry], where: str, keep: Callable[[str], bool]
) -> None:
    """Raise if weights are codes, or floats of 8 bits with scales beside them.

    A difference of codes is none of weights; and codes taken whole beside scales that are merged, or the
    other way round, make a model of noise.

    Args:
        who: the function, for messages.
        entries: of a checkpoint.
        where: what it is.
        keep: which names count.
    """
    for name in filter(keep, entries):
        kind = quantised(name, entries)
        if kind:
            raise OptxError(
                f"{who}: {name!r} in {where} belongs to {kind} quantised weights: codes and scales, which "
                "have no difference. Dequantise the model (in transformers: model.dequantize()), save it, "
                "and take that one."
            )


def check_numbers(who: str, name: str, entry: Entry, where: str) -> None:
    """Raise if a tensor's numbers have no difference that is one of weights."""
    if entry.dtype.is_complex:
        raise OptxError(
            f"{who}: {name!r} is {entry.dtype} in {where}; there is no difference of complex numbers here. "
            "Leave it out with exclude=."
        )


def plain_tensor(label: str, name: str, tensor: Tensor) -> Tensor:
    """The tensor, if its memory holds the numbers that it shows.

    Raises:
        OptxError: it is a wrapper's, quantised, sparse, or without numbers (meta); says the way out.
    """
    kind = type(tensor)
    who = f"{label}: {name!r} is a {kind.__name__}"
    if kind.__name__ == "DTensor" or any(base.__name__ == "DTensor" for base in kind.__mro__):
        raise OptxError(
            f"{who}, of which each process holds a part (FSDP2, tensor parallel). Gather the model first: "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
            "options=StateDictOptions(full_state_dict=True)), and pass what rank 0 gets."
        )
    if is_traceable_wrapper_subclass(tensor) or kind.__module__.startswith(("bitsandbytes", "torchao")):
        raise OptxError(
            f"{who}, a quantised or wrapped weight that has no plain numbers. Dequantise the model first, or "
            "pass the checkpoint that it was made of."
        )
    if tensor.is_meta:
        raise OptxError(
            f"{label}: {name!r} is on the meta device, without numbers (offloaded?). Pass the checkpoint's "
            "folder."
        )
    if tensor.layout != torch.strided or tensor.is_quantized:
        what = "quantised" if tensor.is_quantized else str(tensor.layout).removeprefix("torch.")
        raise OptxError(
            f"{label}: {name!r} is a {what} tensor; it must be a plain one (dequantize, to_dense)."
        )
    return tensor


def whole_names(names: Iterable[str], limit: int = 3) -> str:
    """Some names in a message, in an order that does not depend on hashes."""
    every = sorted(names)
    return ", ".join(map(repr, every[:limit])) + (", ..." if len(every) > limit else "")
