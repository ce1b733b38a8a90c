"""``optx_checkpoint.safetensors``: what of a trainer's model trained or changed beside the adapters.

Keys are ``model.`` and a name in the trained model, or ``handle.``, a number and a key of that handle's own
state. The metadata has the checksums of what was left out, and where in the trained model each folder's
adapter was attached.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from optx._errors import FileError, warn
from optx._files import written_aside
from optx._names import placed_like, whole
from optx._safetensors import brief, parsed
from optx.inject._base_marks import Mark, as_text, check_marks, saved_tensors, tell_of_another
from optx.inject._folder import OWN, TENSORS
from optx.inject._stored import check_tensors

T = TypeVar("T")

REST = "optx_checkpoint.safetensors"
_MODEL, _HANDLE = "model.", "handle."
_LEFT_OUT, _PLACES, _ADAPTERS = "optx_left_out", "optx_places", "optx_adapters"


@dataclass
class Rest:
    """What is beside the adapters of a checkpoint.

    Attributes:
        model: tensors by their names in the trained model.
        handles: tensors by a handle's number and a key of its own state.
        left_out: the base's other tensors.
        places: by an adapter's folder (``""``: this one), where in the trained model it was attached; None
            where that isn't in it.
        adapters: by the same, the digest of the adapter's file.
    """

    model: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    handles: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    left_out: Mapping[str, Mark | None] = field(default_factory=dict[str, Any])
    places: Mapping[str, str | None] = field(default_factory=dict[str, Any])
    adapters: Mapping[str, str] = field(default_factory=dict[str, str])

    def write(self, folder: Path, writes: bool = True) -> None:
        """Write the file; sharded tensors are gathered, for which every rank has to call."""
        from safetensors.torch import save_file

        every = {_MODEL + name: t for name, t in self.model.items()}
        every |= {_HANDLE + key: t for key, t in self.handles.items()}
        # Copies: safetensors takes no two names of one storage.
        copies = {key: whole(t.detach()).cpu().clone().contiguous() for key, t in every.items()}
        if not writes:
            return
        with written_aside(folder / REST) as aside:
            metadata = {
                _LEFT_OUT: as_text(self.left_out),
                _PLACES: json.dumps(self.places),
                _ADAPTERS: json.dumps(self.adapters),
            }
            save_file(copies, aside, metadata=metadata)

    def check(self, here: Mapping[str, Tensor], where: str) -> None:
        """Raise unless a model's tensors have a place for every one of these."""
        mine = {name: here[name] for name in self.model if name in here}
        check_tensors(self.model, mine, where)
        if empty := next((name for name, t in mine.items() if t.is_meta), None):
            raise FileError(
                f"{where}: {empty!r} has no values here: it is on the meta device, or offloaded. Give the "
                "model its values first, and offload it afterwards."
            )
        self._check_ties(here, where)

    def _check_ties(self, here: Mapping[str, Tensor], where: str) -> None:
        """Raise where one tensor would get the values of two."""
        shared: dict[int, list[str]] = {}
        for name, t in here.items():
            shared.setdefault(id(t), []).append(name)
        for names in shared.values():
            first, *more = [name for name in names if name in self.model] or [""]
            other = next(
                (name for name in more if not torch.equal(self.model[first], self.model[name])), None
            )
            other = other or next((name for name in names if first and name in self.left_out), None)
            if other:
                raise FileError(
                    f"{where}: {first!r} and {other!r} are one tensor in this model, and were two where it "
                    "was saved. Untie them first."
                )

    def put(self, model: nn.Module) -> Callable[[], None]:
        """Give the model the tensors that it had when this was saved: all of them, or, if one fails, none.

        Returns:
            What gives it back those that it had here.
        """
        here = dict(saved_tensors(model))
        placed = [(here[name], placed_like(t, here[name])) for name, t in self.model.items()]
        before = [(t, t.detach().clone()) for t, _ in placed]
        try:
            _copy(placed)
        except BaseException:
            _copy(before)
            raise
        return lambda: _copy(before)

    def check_adapter(self, folder: Path, place: str, where: str) -> None:
        """Raise where a folder's adapter isn't the one that this was saved with.

        Args:
            folder: of the adapter.
            place: its key in ``adapters``.
            where: what the error begins with.
        """
        saved = self.adapters.get(place)
        if saved is not None and saved != digest(folder):
            raise FileError(
                f"{where}: the adapter in {str(folder)!r} was saved over since {REST} was, which holds what "
                "trained beside the earlier one. Save the adapter to a folder of its own, and attach that."
            )

    def inside(self, place: str) -> Rest:
        """The same as a part of the trained model sees it; tensors of other parts are left out."""
        start = f"{place}." if place else ""
        return Rest(_under(start, self.model), left_out=_under(start, self.left_out))


@torch.no_grad()
def _copy(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    for t, value in pairs:
        t.copy_(value)


def _under(start: str, named: Mapping[str, T]) -> dict[str, T]:
    return {name.removeprefix(start): one for name, one in named.items() if name.startswith(start)}


def read(file: Path) -> Rest:
    """What `Rest.write` wrote.

    Raises:
        FileError: it is damaged, or no such file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as given:
            opened: Any = given
            metadata: dict[str, str] = opened.metadata() or {}
            left_out, places, adapters = (parsed(metadata[key]) for key in (_LEFT_OUT, _PLACES, _ADAPTERS))
            tensors: dict[str, Tensor] = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        check_marks(left_out)
        if not isinstance(places, dict) or not isinstance(adapters, dict):
            raise ValueError(f"{_PLACES} or {_ADAPTERS} is no table")
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise FileError(f"{str(file)!r} is damaged ({brief(str(error), quote=False)}).") from error
    found = Rest(left_out=left_out, places=places, adapters=adapters)
    for key, t in tensors.items():
        kind = found.model if key.startswith(_MODEL) else found.handles
        kind[key.removeprefix(_MODEL if kind is found.model else _HANDLE)] = t
    return found


def digest(folder: Path) -> str:
    """Of an adapter's tensors in its folder; nothing where there are none."""
    file = next((folder / name for name in (OWN, TENSORS) if (folder / name).exists()), None)
    if file is None:
        return ""
    found = hashlib.sha256()
    with file.open("rb") as given:
        while part := given.read(1 << 20):
            found.update(part)
    return found.hexdigest()


def beside(folder: Path, model: nn.Module) -> Rest:
    """What a model that gets the adapter of a folder has to be given with it; nothing if no file says so.

    Args:
        folder: of the adapter; the file is in it, or above it where a checkpoint has several.
        model: what is attached to; it is not touched.

    Raises:
        FileError: the file is damaged, was saved with another adapter, or has a tensor for which the model
            has no place.
    """
    folder = folder.resolve()  # "." has no parent by its letters
    file = next((one / REST for one in (folder, folder.parent) if (one / REST).exists()), None)
    if file is None:
        return Rest()
    every = read(file)
    key = "" if file.parent == folder else folder.name
    if key and key not in every.places:  # an adapter of something else, below a checkpoint's folder
        return Rest()
    every.check_adapter(folder, key, "attach")
    place = every.places.get(key)
    found = Rest() if place is None else every.inside(place)
    left = [name for name in every.model if place is None or (place and not name.startswith(f"{place}."))]
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        warn(
            f"attach: {str(folder)!r} is of a run that changed more than the model that this adapter was "
            f"attached to: {left[0]}{more}. It is in {str(file)!r}; the trainer that saved it restores it "
            "when it resumes."
        )
    here = dict(saved_tensors(model))
    try:
        found.check(here, f"attach: {str(file)!r}")
    except FileError as error:
        raise FileError(
            f"{error} What trained beside the adapter goes into the model with it; to have the adapter "
            f"alone, attach a copy of its folder without {REST}."
        ) from None
    tell_of_another(here, found.left_out, "attaching")
    return found
