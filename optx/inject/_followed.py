"""What a handle changed of the model, as an optimizer that follows it sees it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from optx._names import RESERVED
from optx._param_groups import declared
from optx.inject._part import attached
from optx.inject._served import OnModel, Served
from optx.step.following import Joining


def joining(handle: OnModel) -> list[Joining]:
    """The parameters that were added, each with those in whose group it belongs."""
    found: list[Joining] = []
    for one in handle.served:
        own = declared(one.part)
        for name, p in one.part.named_parameters():
            asked = one.part.settings_of(name)
            like = [asked] if asked else list(_like(one, p))
            full = f"{one.part_path}.{name}"
            found.append(Joining(full, p, like, agreed=bool(asked), asks=own.get(p, {})))
    found += [
        Joining(f"{kept.path}.{name}", p)
        for kept in handle.saved
        for name, p in kept.module.named_parameters()
    ]
    return found


def leaving(handle: OnModel) -> list[nn.Parameter]:
    """The parameters of served modules that take no part."""
    return [p for one in handle.served for p in one.part.retired(one.module)]


def replaced(model: nn.Module) -> dict[nn.Parameter, str]:
    """The parameters that take no part because others were added in their place, with the adding part's name.

    Not those that rest while buffers are computed with, which are the same weights in another form, nor those
    that a merge leaves as they are: the bare module computes with them. An array may be one module's and take
    the place of others' weights too, so that parts of one name go together.
    """
    every = [
        (name, part, module)
        for module in model.modules()
        if (container := attached(module)) is not None
        for name, part in container.parts.items()
        if part.active and part.overrides("fold")
    ]
    adding = {name for name, part, _ in every if any(True for _ in part.parameters())}
    return {p: name for name, part, module in every if name in adding for p in part.retired(module)}


class Resting:
    """While parameters take no part: they ask for no gradient, which DDP would wait for."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._trained = [p for p in parameters if p.requires_grad]
        for p in self._trained:
            p.requires_grad_(False)

    def remove(self) -> None:
        """They take part again."""
        for p in self._trained:
            p.requires_grad_(True)


def _like(one: Served, p: nn.Parameter) -> Iterator[Sequence[Tensor]]:
    """What was put out of work, then the module's own, then those below it; matrices for matrices first.

    So that a vector is not decayed where vectors are not.
    """
    below = [q for name, q in one.module.named_parameters() if RESERVED not in name.split(".")]
    for among in (one.part.retired(one.module), list(one.module.parameters(recurse=False)), below):
        yield [q for q in among if (q.ndim > 1) == (p.ndim > 1)]
        yield among
