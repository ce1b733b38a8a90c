"""Adapters of a run in a folder: what `optx.attach` and PEFT read, and what only the run itself needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

from torch import Tensor, nn

from optx._names import is_dtensor
from optx.inject._base_marks import saved_tensors
from optx.inject._handle import Handle
from optx.inject._rest import Rest, digest
from optx.integrations._base_left_out import BaseLeftOut, adapters_own, is_left_out


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


def beside_the_parts(handles: Sequence[Handle]) -> dict[str, Tensor]:
    """What handles need to go on bit for bit and folders don't hold: STN's schedule and its Adam.

    Keys begin with the handle's number.
    """
    found: dict[str, Tensor] = {}
    for number, handle in enumerate(handles):
        own = Handle.state_dict(handle)
        found |= {f"{number}.{key}": t for key, t in handle.state_dict().items() if key not in own}
    return found


def load_beside(handles: Sequence[Handle], state: Mapping[str, Tensor]) -> None:
    """Give handles that are loaded what `beside_the_parts` gave."""
    for number, handle in enumerate(handles):
        start = f"{number}."
        mine = {key.removeprefix(start): t for key, t in state.items() if key.startswith(start)}
        if mine:
            handle.load_state_dict({**handle.state_dict(), **mine})


def save_trained(base: BaseLeftOut, folder: Path, writes: bool) -> None:
    """Save a model's handles, and beside them what else of it has trained or changed.

    Args:
        base: of the model and its handles.
        folder: as for `save`.
        writes: whether this rank writes; every rank has to call where tensors are sharded.

    Raises:
        MergeError: an adapter is merged.
    """
    handles, left_out, own = base.handles, base.names(), adapters_own(base.handles)
    save(handles, folder, writes)
    model = {
        name: t
        for name, t in saved_tensors(base.module)
        if id(t) not in own and not is_left_out(name, left_out)
    }
    every = cast("Iterator[tuple[str, nn.Module]]", base.module.named_modules())
    paths = {id(one): path for path, one in every}
    found = {key_of(at, folder): at for at in folders(handles, folder)}
    places = {key: paths.get(id(handle.model)) for key, handle in zip(found, handles, strict=True)}
    adapters = {key: digest(at) for key, at in found.items()} if writes else {}
    Rest(model, beside_the_parts(handles), left_out, places, adapters).write(folder, writes)


def key_of(at: Path, folder: Path) -> str:
    """What a checkpoint calls an adapter's folder; ``""`` is its own."""
    return str(at.relative_to(folder)).removeprefix(".")


def check_adapters(rest: Rest, handles: Sequence[Handle], folder: Path, where: str) -> None:
    """Raise where an adapter was saved over since the rest of its checkpoint was.

    Raises:
        FileError: the two are not of one save.
    """
    for at in folders(handles, folder):
        rest.check_adapter(at, key_of(at, folder), where)
