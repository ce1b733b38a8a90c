"""A module's own weight while it reads another: left where it is, put into a file, or given up."""

from __future__ import annotations

import tempfile
from typing import Any, Literal

import torch
from torch import Tensor, nn

from optx.inject._served import Served
from optx.inject._shared_part import SharedWeight

Keep = Literal["memory", "file", "none"]


class _Filed:
    """Values in a file without a name, mapped: memory holds them only while they are read."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.dtype = tensor.shape, tensor.dtype
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        with tempfile.NamedTemporaryFile(prefix="optx_weight_") as file:
            raw.numpy().tofile(file)  # pyright: ignore[reportArgumentType]
            file.flush()
            # Mapped, it outlasts its name; the space is free again when this is dropped.
            self._raw = torch.from_file(file.name, shared=False, size=raw.numel(), dtype=torch.uint8)

    def read(self) -> Tensor:
        """A copy, in memory."""
        return self._raw.clone().view(self.dtype).view(self.shape)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Filed:
        return self  # nobody writes to it

    def __reduce__(self) -> Any:
        return _Filed, (self.read(),)


class Kept:
    """The weights of one handle's modules."""

    def __init__(self, served: list[Served], keep: Keep) -> None:
        self.keep: Keep = keep
        self._filed: list[tuple[nn.Parameter, _Filed]] = []
        if keep != "memory":
            self.away(served)

    @torch.no_grad()
    def away(self, served: list[Served]) -> None:
        """Free the weights' memory."""
        for p in _own(served):
            if self.keep == "file" and self._values(p) is None and p.numel():
                self._filed.append((p, _Filed(p)))
            p.data = p.data.new_empty(0)
        for one in served:
            if isinstance(one.part, SharedWeight):
                one.part.__dict__["kept"] = one.module._parameters["weight"]  # pyright: ignore
                one.module._parameters["weight"] = None  # pyright: ignore[reportPrivateUsage]

    @torch.no_grad()
    def back(self, served: list[Served]) -> None:
        """Give the modules their weights: the old values, or where none were kept, the shared ones."""
        for one in served:
            part = one.part
            if not isinstance(part, SharedWeight) or part.kept is None:
                continue
            p = part.kept
            if not p.numel():
                filed, psi = self._values(p), part.array
                now = part.weight(p.dtype) if filed is None else filed.read()
                p.data = now.detach().to(device=psi.device, dtype=p.dtype)
            one.module._parameters["weight"] = p  # pyright: ignore[reportPrivateUsage]
            part.__dict__["kept"] = None

    def _values(self, p: nn.Parameter) -> _Filed | None:
        return next((filed for owner, filed in self._filed if owner is p), None)


def _own(served: list[Served]) -> list[nn.Parameter]:
    every = (p for one in served if isinstance(one.part, SharedWeight) for p in one.part.retired(one.module))
    return list({id(p): p for p in every}.values())
