"""Adapters of a run in a folder: what `optx.attach` and PEFT read, and what only the run itself needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from optx._names import is_dtensor
from optx.inject._handle import Handle


def folders(handles: Sequence[Handle], folder: Path) -> list[Path]:
    """Where each handle is saved: one in the folder itself, several in folders by their names.

    A name that comes again has its number after it: ``lora``, ``lora_2``.
    """
    if len(handles) == 1:
        return [folder]
    found: list[Path] = []
    for handle in handles:
        name = next((one.part.adapter for one in handle.served), "") or handle.injection.name
        count = 1
        while (path := folder / (name if count == 1 else f"{name}_{count}")) in found:
            count += 1
        found.append(path)
    return found


def save(handles: Sequence[Handle], folder: Path, writes: bool) -> None:
    """Save each handle; sharded ones are gathered, for which every rank has to call.

    Args:
        handles: in the order in which they are loaded.
        folder: which has them, or whose folders have.
        writes: whether this rank writes what is whole on all of them.
    """
    for handle, path in zip(handles, folders(handles, folder), strict=True):
        if writes or any(map(is_dtensor, handle.parameters())):
            handle.save(path)


def load(handles: Sequence[Handle], folder: Path) -> None:
    """Load what `save` wrote.

    Raises:
        FileError: a folder is damaged, or of another model or injection.
    """
    for handle, path in zip(handles, folders(handles, folder), strict=True):
        handle.load(path)


def beside_the_parts(handle: Handle) -> dict[str, Tensor]:
    """What a handle needs to go on bit for bit and a folder doesn't hold: STN's schedule and its Adam."""
    own = Handle.state_dict(handle)
    return {key: t for key, t in handle.state_dict().items() if key not in own}


def load_beside(handle: Handle, state: Mapping[str, Tensor]) -> None:
    """Give a handle that is loaded what `beside_the_parts` gave."""
    if state:
        handle.load_state_dict({**handle.state_dict(), **state})
