"""Ablation in a basis: a layer's output with its first features alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from optx._errors import OptxError, TargetError
from optx.inject._injection import Injection
from optx.inject._part import Part, output_of, with_output


class Kept(Part):
    """f -> mean + (f - mean) C C_pinv, with the columns that are kept."""

    C: Tensor
    C_pinv: Tensor
    mean: Tensor

    def __init__(self, module: nn.Module, C: Tensor, C_pinv: Tensor, mean: Tensor) -> None:
        super().__init__()
        own = next((t for t in (*module.parameters(), *module.buffers())), None)
        for name, value in (("C", C), ("C_pinv", C_pinv), ("mean", mean)):
            self.register_buffer(name, value.clone() if own is None else value.to(own.device, copy=True))

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The output's part in the span of what is kept."""
        f = output_of(output)
        if f.shape[-1] != len(self.mean):
            raise OptxError(
                f"project: this {type(module).__name__} gives {f.shape[-1]} features, and the basis is of "
                f"{len(self.mean)}."
            )
        kind = torch.promote_types(f.dtype, torch.float32)
        C, C_pinv, mean = (t.to(f.device, kind) for t in (self.C, self.C_pinv, self.mean))
        return with_output(output, (mean + (f.to(kind) - mean) @ C @ C_pinv).to(f.dtype))

    def note(self) -> str:
        """How many."""
        return f"{self.C.shape[1]} of {len(self.C)} directions"


@dataclass(frozen=True)
class Projection(Injection):
    """What `InteractionBasis.project` gives; `optx.attach` puts it on its layer.

    Attributes:
        layer: the path of the module that it serves.
        keep: how many features.
        C: (d, keep) float64.
        C_pinv: (keep, d) float64.
        mean: (d,) float64.
    """

    name: ClassVar[str] = "projection"
    role: ClassVar[str] = ""
    serves: ClassVar[str] = "the layer that the basis is of"
    serves_one: ClassVar[str] = "layer"

    layer: str
    keep: int
    C: Tensor = field(repr=False, compare=False)
    C_pinv: Tensor = field(repr=False, compare=False)
    mean: Tensor = field(repr=False, compare=False)

    def places(self, model: nn.Module) -> Collection[str]:
        """The layer.

        Raises:
            TargetError: this model has none of that path.
        """
        if self.layer not in dict(model.named_modules()):
            raise TargetError(f"attach: the basis is of {self.layer!r}, and this model has no such module.")
        return {self.layer}

    def part(self, module: nn.Module, path: str) -> Part:
        """Of one layer."""
        return Kept(module, self.C, self.C_pinv, self.mean)

    def options(self) -> dict[str, Any]:
        """Without the matrices, which are tensors of its part."""
        return {"layer": self.layer, "keep": self.keep}

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Projection:
        """Not made from options.

        Raises:
            OptxError: always.
        """
        raise OptxError("a projection is of a basis, which no file has: make it again by ib.project")
