"""How the paths get at the transforms' state: by key, made on first use, made anew where it is stale."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from optx._errors import TransformError
from optx._names import parameter_names
from optx.kernels.step.program import Program
from optx.step import bits
from optx.step.checks import check_has_memory
from optx.step.declared import Slot
from optx.step.state import REST, SCALE, SlotStore, close_enough
from optx.step.transform import Group, Host, Transform

KAHAN = "optx.kahan"


class Slots:
    """The transforms' state of one wrapped optimizer, which it does not keep alive."""

    def __init__(self, wrapped: Host) -> None:
        self._wrapped = weakref.ref(wrapped)
        self.store: SlotStore = wrapped.slot_store

    @property
    def transforms(self) -> tuple[Transform, ...]:
        """Whose state it is."""
        return self._owner().transforms

    def _owner(self) -> Host:
        wrapped = self._wrapped()
        assert wrapped is not None  # it is what runs this step
        return wrapped

    def _declared(self, key: str) -> tuple[Transform, str, Slot]:
        _, transform, name = key.split(".", 2)
        owner = next(t for t in self._owner().transforms if t.name == transform)
        return owner, name, owner.slots[name]

    def get(self, p: Tensor, key: str) -> Tensor:
        """``state[p][key]``, made if it is not there."""
        if key == KAHAN:
            return self.store.get(p, key, lambda: torch.zeros_like(p, requires_grad=False))
        if key == REST or key.startswith(SCALE):
            found = self.store.present([p], key)[0]  # made with what it belongs to
            assert found is not None
            return found
        transform, name, _ = self._declared(key)
        return self._owner().slot(p, transform, name)

    def shape(self, p: Tensor, key: str) -> tuple[int, ...]:
        """The shape that a slot is declared to have."""
        return self._declared(key)[2].shape(p)

    def packed(self, p: Tensor, key: str) -> Tensor:
        """A packed slot in the form that its weight asks for now; kept so from then on.

        Raises:
            ShapeError: it has another weight's shape.
        """
        kept = self.get(p, key)
        now = bits.settled(kept, p)
        if now is not kept:  # the weight was laid out or sharded anew, or somebody put another form there
            self.store.put(p, key, now)
            now = self.get(p, key)
        return now

    def refresh(self, parameters: Sequence[Tensor], key: str, sources: Sequence[Any]) -> None:
        """Take numbers anew whose source in the base's state is not what it was when they were taken.

        Args:
            parameters: whose numbers.
            key: under which they are kept.
            sources: what they are taken from, parameter by parameter; None where the base has nothing yet.
        """
        stale = self.store.derived.stale(key, parameters, sources, self.store.present(parameters, key))
        for i in stale:
            p, source = parameters[i], sources[i]
            transform, name, slot = self._declared(key)
            if isinstance(source, Tensor):
                check_has_memory(self.store.base, p, f"its state {slot.derived!r}", source)
            elif source is not None:
                continue  # what makes nothing of it says so, see FusedGroup
            kept, anew = self.get(p, key), first_value(self._owner(), transform, name, p)
            if close_enough(kept, anew):
                continue
            if kept.dtype == anew.dtype and kept.numel() == 1:
                kept.copy_(anew)  # in place: a kernel may be pointed at it
            else:
                self.store.put(p, key, anew)
        if stale:
            self.took(parameters, key, sources)

    def took(self, parameters: Sequence[Tensor], key: str, sources: Sequence[Any]) -> None:
        """The numbers have just been taken from these."""
        self.store.derived.took(key, parameters, sources, self.store.present(parameters, key))


def make_slots(wrapped: Host, programs: Iterable[tuple[Group, Program]], all_of_them: bool = False) -> None:
    """Make the slots that no rule asks for (only a transform's hooks do), or all of new groups.

    And those that a transform makes in a way of its own, so that a mistake in it is told at wrap.
    """
    for group, program in programs:
        ruled = {f"optx.{name}" for name in (*program.slots, *program.cells)}
        for transform in wrapped.transforms:
            own = type(transform).init_slot is not Transform.init_slot  # what it makes is looked at now
            for name, slot in transform.slots.items() if transform.serves(group) else ():
                key = f"optx.{transform.name}.{name}"
                if not slot.derived and (all_of_them or own or key not in ruled):
                    for p in group["params"]:
                        if p.requires_grad:
                            wrapped.slot(p, transform, name)


def first_value(wrapped: Host, transform: Transform, name: str, p: Tensor) -> Tensor:
    """What a transform's `init_slot` makes of a slot; raises where that is no tensor of the slot's shape."""
    value: Any = transform.init_slot(name, p, wrapped)
    scalar, shape = transform.slots[name].scalar, transform.slots[name].shape(p)
    if transform.slots[name].packed and isinstance(value, Tensor) and bits.fits(value.shape, p):
        return bits.settled(value, p)
    if isinstance(value, Tensor) and (value.numel() == 1 if scalar else value.shape == shape):
        return value.reshape(()) if scalar and value.ndim else value
    got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
    of = (
        f"one number per {transform.slots[name].axis}" if transform.slots[name].axis else "the weight's shape"
    )
    wanted = "one number" if scalar else f"{of}, {shape}"
    owner = parameter_names(wrapped.base).get(id(p), "of no group")
    raise TransformError(
        f"{type(transform).__name__}: init_slot({name!r}) returned {got} for parameter {owner!r}; it must "
        f"return a tensor of {wanted}."
    )
