"""What a file of an adapter holds, whoever wrote it, and whether it fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from optx._errors import FileError, near
from optx.inject._injection import Injection


@dataclass
class Stored:
    """What a file holds.

    Attributes:
        injection: the method and its options.
        served: paths in the bare model, by member (``""`` for an injection without members).
        whole: paths of modules that are trained whole.
        tensors: by module path and suffix.
        prefix: what stands before these in the file's keys.
    """

    injection: Injection
    served: dict[str, list[str]]
    whole: list[str]
    tensors: dict[str, Tensor]
    prefix: str = ""


def check_tensors(
    found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: str = "state_dict", prefix: str = ""
) -> None:
    """Raise unless both have the same keys and shapes, and floats in the same places; names the first that
    differs, as the file would."""
    for key, tensor in wanted.items():
        if key not in found:
            like = near(prefix + key, (prefix + one for one in found))
            raise FileError(f"{where}: {prefix + key!r} is missing. {like}")
        if found[key].shape != tensor.shape:
            raise FileError(
                f"{where}: {prefix + key!r} has shape {tuple(found[key].shape)}, the model needs "
                f"{tuple(tensor.shape)}. It was saved for another model, or with other options."
            )
        if found[key].is_floating_point() != tensor.is_floating_point():
            raise FileError(
                f"{where}: {prefix + key!r} is of {found[key].dtype}, the model's of {tensor.dtype}: the "
                "file was written by something else, or changed."
            )
    for key in found:
        if key not in wanted:
            like = near(prefix + key, (prefix + one for one in wanted))
            raise FileError(f"{where}: {prefix + key!r} has no place in this model. {like}")
