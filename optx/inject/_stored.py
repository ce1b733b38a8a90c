"""What a file of an adapter holds, whoever wrote it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from optx.inject._injection import Injection


@dataclass
class Stored:
    """What a file holds.

    Attributes:
        injection: the method and its options.
        served: paths in the bare model, by member (``""`` for an injection without members).
        whole: paths of modules that are trained whole.
        tensors: by module path and suffix.
    """

    injection: Injection
    served: dict[str, list[str]]
    whole: list[str]
    tensors: dict[str, Tensor]
