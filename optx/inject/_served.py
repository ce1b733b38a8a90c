"""What an injection has put on a model, module by module, and what its files need to know of the handle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from optx._names import RESERVED
from optx.inject._injection import Injection
from optx.inject._part import Part
from optx.inject._trained_whole import Saved


class Removable(Protocol):
    """Something that was put on a module and can be taken off."""

    def remove(self) -> None:
        """Take it off."""
        ...


@dataclass(eq=False)
class Served:
    """One module, and the part that one injection added to it."""

    path: str
    module: nn.Module
    part: Part
    injection: Injection
    name: str
    hooks: list[Removable] = field(default_factory=list["Removable"])

    @property
    def part_path(self) -> str:
        """The part's own path in the model."""
        return f"{self.path}.{RESERVED}.{self.name}"

    def paths_as(self, plain: Mapping[str, str]) -> list[str]:
        """What is served, by the module's path in another model: the module, or some of its parameters."""
        path = plain[self.path]
        return [f"{path}.{name}" for name in self.part.parameter_names] or [path]


class OnModel(Protocol):
    """An injection on a model, as files see it; `optx.Handle` is one, and forwards its saving to them."""

    model: nn.Module
    injection: Injection
    served: list[Served]
    saved: list[Saved]

    @property
    def removed(self) -> bool:
        """Whether it has been taken off."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """What was added, by the served module's path."""
        ...

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load what `state_dict` gave; raises before anything changes."""
        ...
