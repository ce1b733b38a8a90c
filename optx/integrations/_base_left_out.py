"""What a checkpoint of adapters leaves out: the base model's tensors, as long as nobody writes to them.

The script that resumes makes the base model anew, so its frozen tensors need not be saved. That holds only
for tensors that are still what the script made. A checksum of each is taken at set-up: one that has changed
since (a running average, a teacher, a round of half fine-tuning) is saved like what trains. The checksums go
into the checkpoint, and a resumption on another base model is told.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from optx._errors import MergeError, OptxError
from optx.inject._base_marks import Mark, mark, saved_tensors
from optx.inject._handle import Handle


class BaseLeftOut:
    """Which of a model's saved tensors need not be in a checkpoint.

    Args:
        module: whose state dict it is about.
        handles: what is attached in it.
        where: what an error begins with.

    Raises:
        OptxError: no handle, one that was removed, or one of another model.
    """

    def __init__(self, module: nn.Module, handles: Sequence[Handle], where: str) -> None:
        if not handles:
            raise OptxError(
                f"{where}: no handle is given, so nothing would be saved. Pass what optx.attach returned."
            )
        inside = set(map(id, module.modules()))
        for handle in handles:
            if not isinstance(handle, Handle):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise OptxError(f"{where}: {handle!r} is no handle. Pass what optx.attach returned.")
            if handle.removed or not inside.issuperset(id(one.part) for one in handle.served):
                raise OptxError(
                    f"{where}: {handle!r} is not in this {type(module).__name__}, so its checkpoints would "
                    "not have it. Pass the handle of the model that is trained here."
                )
        self.module, self.handles = module, list(handles)
        self._made: dict[str, Mark | None] = {name: mark(t) for name, t in self._frozen()}
        self._loaded: set[str] = set()

    def _frozen(self) -> Iterator[tuple[str, Tensor]]:
        own = adapters_own(self.handles)
        for name, t in saved_tensors(self.module):
            if not t.requires_grad and id(t) not in own:
                yield name, t

    def names(self) -> dict[str, Mark | None]:
        """What may be left out now, with its checksum.

        Raises:
            MergeError: an adapter is merged, so that the base's weights are not the base's.
        """
        for handle in self.handles:
            if handle.merged:
                raise MergeError(
                    f"save: {handle!r} is merged into the weights, which a checkpoint of adapters leaves "
                    "out. Call unmerge() before saving."
                )
        now = {name: mark(t) for name, t in self._frozen()}
        made = self._made  # what was not there at set-up, or trained then, is none of it
        return {name: found for name, found in now.items() if name in made and _as_made(found, made[name])}

    def loaded(self, names: Iterable[str]) -> None:
        """Note what has its values from a checkpoint: it is no longer what the script made."""
        self._loaded.update(names)

    def settle(self) -> None:
        """Take a cast for none of training's changes: what has another dtype now is what the script made."""
        for name, t in self._frozen():
            before = self._made.get(name)
            if before is not None and before[0] != str(t.dtype) and name not in self._loaded:
                self._made[name] = mark(t)


def adapters_own(handles: Sequence[Handle]) -> set[int]:
    """The tensors of handles that are in the model, and of modules that they train whole, by ``id``."""
    own: set[int] = set()
    for handle in handles:
        for module in (*(one.part for one in handle.served), *(kept.module for kept in handle.saved)):
            own.update(id(t) for _, t in saved_tensors(module))
    return own


def is_left_out(key: str, names: Mapping[str, Any]) -> bool:
    """Whether an entry of a state dict is one of these, or belongs to one: ``weight.absmax`` of 4 bits."""
    parts = key.split(".")
    return any(".".join(parts[:count]) in names for count in range(len(parts), 0, -1))


def _as_made(found: Mark | None, made: Mark | None) -> bool:
    """Whether a tensor is what it was at set-up, as far as that can be read."""
    return found is None or made is None or list(found) == list(made)
