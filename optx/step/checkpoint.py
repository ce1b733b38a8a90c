"""State dicts that carry the transforms' state exactly, between wrapped and unwrapped optimizers.

torch's ``load_state_dict`` casts every tensor of a parameter's state to the weight's dtype; ours pass by it.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from optx._errors import OptxError, ShapeError
from optx._files import written_aside
from optx._names import is_dtensor, parameter_names
from optx.step import bits
from optx.step.bases import base_rules
from optx.step.checks import TORCH_KEYS, check_count, check_group
from optx.step.convert import check_formats, convert_state, with_codes
from optx.step.declared import Slot
from optx.step.formats import CODED
from optx.step.kept import MASTER, STATE
from optx.step.moments import as_saved
from optx.step.slots import KAHAN
from optx.step.state import PENDING, REST, SCALE, is_ours, saved_slots, without_ours
from optx.step.transform import Host


def _slot_keys(wrapped: Host) -> dict[str, Slot]:
    """Every slot key of the optimizer's transforms, with its `Slot`."""
    return {f"optx.{t.name}.{name}": slot for t in wrapped.transforms for name, slot in t.slots.items()}


def _keyed(wrapped: Host, state_dict: dict[str, Any]) -> dict[Any, Tensor]:
    """Parameters by the key a state dict gives them: torch's are numbers, distributed checkpoint's names."""
    keys = (key for group in state_dict["param_groups"] for key in group["params"])
    params = (p for group in wrapped.param_groups for p in group["params"])
    return dict(zip(keys, params, strict=False))  # the base itself refuses another number of parameters


def pack(wrapped: Host) -> dict[str, Any]:
    """The base's state dict; slots of parameters that have not stepped yet in an entry of their own."""
    packed = wrapped.base.state_dict()
    unsaved = {key for key, slot in _slot_keys(wrapped).items() if not slot.saved}
    if unsaved:
        packed["state"] = {
            n: {k: v for k, v in entry.items() if k not in unsaved} if isinstance(entry, dict) else entry
            for n, entry in packed["state"].items()
        }
    store = wrapped.slot_store
    store.tidy()
    pending: dict[Any, dict[str, Tensor]] = {}
    for key, p in _keyed(wrapped, packed).items():
        # Looked up in what is saved: ZeroRedundancyOptimizer's entries are not those of ``base.state``.
        shown = packed["state"].get(key) or ()
        slots = {k: v for k, v in store.of(p).items() if k not in unsaved and k not in shown}
        if slots:
            pending[key] = slots
    entries = packed["state"].values()
    if packed["state"] and all(isinstance(e, dict) and all(map(is_ours, e)) for e in entries):
        # The base keeps nothing (plain SGD), but ours is there: then torch's distributed checkpoint asks for
        # an entry of every trainable parameter, also of one that has never stepped.
        keys = [key for key, p in _keyed(wrapped, packed).items() if p.requires_grad]
        shown = {key: {**packed["state"].get(key, {}), **pending.pop(key, {})} for key in keys}
        packed["state"] = {**packed["state"], **shown}
    packed["state"] = {n: as_saved(e) if isinstance(e, dict) else e for n, e in packed["state"].items()}
    if pending:
        packed[PENDING] = {n: as_saved(slots) for n, slots in pending.items()}
    return packed


def unpack(wrapped: Host, state_dict: dict[str, Any], convert: bool = False) -> None:
    """Load into the base, and the slots beside it, as they were saved; or raise, and change nothing.

    Args:
        wrapped: the optimizer.
        state_dict: what was saved.
        convert: bring it into the formats that this optimizer keeps.
    """
    store = wrapped.slot_store
    base = wrapped.base
    lacking = [key for key in ("state", "param_groups") if key not in state_dict]
    if lacking:
        raise OptxError(
            f"load_state_dict: this has no {lacking[0]!r}, so it is no optimizer's state dict (its keys: "
            f"{', '.join(map(repr, list(state_dict)[:3]))})."
        )
    if convert:
        state_dict = convert_state(state_dict, wrapped)  # pyright: ignore[reportArgumentType]
    state_dict = with_codes(state_dict, wrapped)
    check_formats(wrapped, state_dict)
    store.tidy()
    known = _slot_keys(wrapped)
    ours = saved_slots(state_dict)
    keyed = _keyed(wrapped, state_dict)
    _check_shapes(wrapped, keyed, state_dict["state"], ours, known)
    before = {p: store.of(p) for p in keyed.values()}
    kahan = KAHAN if wrapped.rounding == "kahan" else None  # carried on unused, it would go stale
    numbers = [{k: v for k, v in group.items() if _is_number(wrapped, k)} for group in wrapped.param_groups]
    old = base.state, base.param_groups, store.pending
    store.pending = {}
    try:
        _tell_differences(wrapped, state_dict, ours, known)
        try:
            base.load_state_dict(state_dict=without_ours(state_dict))
        except KeyError as error:  # torch's own looks for what it keeps itself
            raise OptxError(
                f"load_state_dict: {type(base).__name__} finds no {error} in this checkpoint. {_ANOTHER}"
            ) from error
        _check_groups(base, old[1])
        store.tidy()
        _restore_dtypes(wrapped, keyed, state_dict["state"])
        for group, kept in zip(wrapped.param_groups, numbers, strict=True):
            for key in (STATE, MASTER):  # this optimizer's, not the checkpoint's
                group.pop(key, None)
            for key, value in kept.items():
                group.setdefault(key, value)
            check_group(group, wrapped.transforms, base)
        for key, p in keyed.items():
            slots = {k: v for k, v in before[p].items() if k in known and not known[k].derived}
            loaded = {k: v for k, v in ours.get(key, {}).items() if k in known or k == kahan or _beside(k)}
            slots.update(
                {k: _as_declared(v, known.get(k), p).to(p.device, copy=True) for k, v in loaded.items()}
            )
            if slots:
                store.pending[p] = slots
        # Not those that were pending when saved: their base state is still to come.
        store.settle(p for key, p in keyed.items() if key in state_dict["state"] and p in base.state)
    except BaseException:
        base.state, base.param_groups, store.pending = old
        raise
    for transform in wrapped.transforms:
        transform.adopt(numbers, wrapped.param_groups)
    for p, slots in store.lasting.items():
        slots.update({k: v for k, v in store.of(p).items() if k in slots})
    store.derived.forget(keyed.values())  # they are looked at before the next step


def _check_shapes(
    wrapped: Host,
    keyed: dict[Any, Tensor],
    saved: Any,
    ours: dict[Any, dict[str, Tensor]],
    known: dict[str, Any],
) -> None:
    """Raise where a saved tensor has another shape than the weight that it is for."""
    names = parameter_names(wrapped.base)
    for group in wrapped.param_groups:
        rules = base_rules(wrapped.base, group)
        keeps_shapes = all(t.keeps_shapes for t in wrapped.transforms if t.serves(group))
        of_base = frozenset(rules.elements) if rules and keeps_shapes else frozenset[str]()
        members = set(map(id, group["params"]))
        for key, p in keyed.items():
            if id(p) not in members:
                continue
            entry = saved.get(key)
            if rules and rules.counts_states and isinstance(entry, dict) and "step" in entry:
                check_count(entry["step"], wrapped.base, p)
            tensors = {k: v for k, v in entry.items() if k in of_base} if isinstance(entry, dict) else {}
            slots: dict[str, Any] = {**ours.get(key, {})}
            for name, slot in slots.items():
                if name in known and not isinstance(slot, Tensor):
                    raise OptxError(
                        f"load_state_dict: the {name!r} that was saved for parameter {names[id(p)]!r} is a "
                        f"{type(slot).__name__}; it must be a tensor."
                    )
                if name in known:
                    tensors[name] = slot if not known[name].scalar or slot.numel() != 1 else None
            for name, t in tensors.items():
                packed = name in known and known[name].packed
                if isinstance(t, Tensor) and (not bits.fits(t.shape, p) if packed else t.shape != p.shape):
                    raise ShapeError(
                        f"load_state_dict: parameter {names[id(p)]!r} has shape {tuple(p.shape)}, the "
                        f"{name!r} that was saved for it has {tuple(t.shape)}. Give the optimizer its "
                        "parameters in the order and groups of the one that was saved."
                    )


def _check_groups(base: torch.optim.Optimizer, before: list[dict[str, Any]]) -> None:
    """Raise where loaded groups lack what the base reads: they are another optimizer's."""
    for group, old in zip(base.param_groups, before, strict=True):
        missing = [k for k, v in base.defaults.items() if _is_setting(v) and k in old and k not in group]
        foreign = [key for key in group if key not in old and key not in TORCH_KEYS and not is_ours(key)]
        if missing and foreign:
            raise OptxError(
                f"load_state_dict: the checkpoint's param groups have no {missing[0]!r}, which "
                f"{type(base).__name__} reads, but {foreign[0]!r}. {_ANOTHER}"
            )


def _is_setting(value: Any) -> bool:
    """Whether a default is a number that an update reads; HeavyBall keeps much else there."""
    return isinstance(value, int | float | tuple | Tensor) and not isinstance(value, bool)


_ANOTHER = "It was saved by another optimizer; load it into one of that class."


def _beside(key: str) -> bool:
    """Whether a key goes with a weight or another key; what it may be is looked at by `check_formats`."""
    return key == REST or key.startswith(SCALE)


def _as_declared(value: Tensor, slot: Slot | None, p: Tensor) -> Tensor:
    """A slot in its own dtype: on the way through an unwrapped optimizer torch cast it to the weight's."""
    if slot is not None and slot.packed:
        return bits.settled(value, p)
    if slot is None or slot.dtype is None or (slot.moment and value.dtype in _KEPT):
        return value
    return value.to(slot.dtype)


_KEPT = (torch.float32, torch.bfloat16, *CODED)  # what a moment may be in


def _restore_dtypes(wrapped: Host, keyed: dict[Any, Tensor], saved: Any) -> None:
    """Undo torch's cast of state to the weight's dtype where that is not how it was kept.

    Single numbers (NAdam's ``mu_product``); and moments of fewer bits than the weight's. Moments of more bits
    than the weight's only where our kernels serve them: another base may not.
    """
    served = {p for group in wrapped.param_groups if base_rules(wrapped.base, group) for p in group["params"]}
    for owner, p in keyed.items():
        entry, state = saved.get(owner), wrapped.base.state.get(p, {})
        for key, value in entry.items() if isinstance(entry, dict) else ():
            now = state.get(key)
            if not (isinstance(value, Tensor) and isinstance(now, Tensor)) or value.dtype == now.dtype:
                continue
            fewer = value.dtype.itemsize < now.dtype.itemsize
            if value.ndim == now.ndim == 0 or fewer or p in served:
                state[key] = value.to(now.device, copy=True)


def _is_number(wrapped: Host, key: str) -> bool:
    names = {k for t in wrapped.transforms for k in t.group_keys()}
    return key in names or is_ours(key)


def _tell_differences(
    wrapped: Host, state_dict: dict[str, Any], ours: dict[Any, dict[str, Tensor]], known: dict[str, Any]
) -> None:
    """Warn of what one side has and the other lacks."""
    saved = {key for slots in ours.values() for key in slots if key.count(".") == 2 and not _beside(key)}
    foreign = sorted({key.split(".")[1] for key in saved - set(known)})
    if foreign:
        warnings.warn(
            f"optx: the checkpoint has state of {', '.join(foreign)}, which this optimizer does not have; it "
            "was left out.",
            stacklevel=4,
        )
    wanted = {key for key, slot in known.items() if slot.saved and not slot.derived}
    lacking = sorted(wanted - saved)
    if lacking:
        warnings.warn(
            f"optx: the checkpoint has no {', '.join(lacking)}; what was there stays (an anchor: the weights "
            "at wrap time). It was saved by an optimizer without that transform.",
            stacklevel=4,
        )


# ---- safetensors ------------------------------------------------------------------------------------


def save_optimizer(optimizer: torch.optim.Optimizer, path: str | PathLike[str]) -> None:
    """Save an optimizer's whole state as a safetensors file: no pickle, and exact.

    Args:
        optimizer: wrapped or not.
        path: written beside and renamed, so that a kill leaves the old file whole.

    Raises:
        OptxError: the state holds something that is neither a whole tensor nor plain data.

    Example:
        >>> import torch, optx, tempfile, os
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> opt = optx.wrap(torch.optim.Adam([w]), optx.AdamR())
        >>> file = os.path.join(tempfile.mkdtemp(), "optimizer.safetensors")
        >>> optx.save_optimizer(opt, file)
        >>> optx.load_optimizer(opt, file)
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}

    def flatten(value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            if is_dtensor(value):
                raise OptxError(
                    f"save_optimizer: {name} is sharded over a device mesh, and a safetensors file holds "
                    "whole tensors. Save get_optimizer_state_dict(model, optimizer) with "
                    "torch.distributed.checkpoint.save."
                )
            # Its own storage: a slot may be a view of another file, and two names may share one tensor.
            tensors[name] = value.detach().clone(memory_format=torch.contiguous_format)
            return {"tensor": name}
        if isinstance(value, dict):
            pairs: list[Any] = [[k, flatten(v, f"{name}.{k}")] for k, v in value.items()]
            return {"dict": pairs}
        if isinstance(value, list | tuple):
            kind = "tuple" if isinstance(value, tuple) else "list"
            return {kind: [flatten(v, f"{name}.{i}") for i, v in enumerate(value)]}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise OptxError(f"save_optimizer: {name} is a {type(value).__name__}, which safetensors cannot hold.")

    tree = flatten(optimizer.state_dict(), "optimizer")
    with written_aside(path) as aside:
        save_file(tensors, aside, metadata={"optx": json.dumps(tree)})


def load_optimizer(
    optimizer: torch.optim.Optimizer, path: str | PathLike[str], convert: bool = False
) -> None:
    """Load what `save_optimizer` saved.

    Args:
        optimizer: wrapped or not.
        path: the file.
        convert: bring moments into the format that this optimizer keeps, see `convert_state`.

    Raises:
        FileNotFoundError: there is no such file.
        OptxError: the file is damaged, or not one of `save_optimizer`'s, or keeps moments in another format,
            and ``convert`` is False; nothing is changed.
    """
    from safetensors import SafetensorError, safe_open

    path = os.fspath(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if "optx" not in metadata:
                raise OptxError(f"load_optimizer: {path!r} was not written by save_optimizer.")
            state_dict = _restore(json.loads(metadata["optx"]), file.get_tensor)
            if not {"state", "param_groups"} <= set(state_dict):
                raise TypeError("it holds no optimizer")
    except (SafetensorError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, OptxError):
            raise
        raise OptxError(
            f"load_optimizer: {path!r} is damaged, or was not written by save_optimizer ({error})."
        ) from error
    if convert:
        state_dict = convert_state(state_dict, optimizer)
    elif not hasattr(optimizer, "transforms") and any(g.get(STATE) == 8 for g in state_dict["param_groups"]):
        raise OptxError(
            f"load_optimizer: {path!r} has moments in 8 bits (state='8bit'), and {type(optimizer).__name__}, "
            "which is not wrapped, would take the codes for numbers. Pass convert=True."
        )
    optimizer.load_state_dict(state_dict)


def _restore(node: Any, tensor: Callable[[str], Tensor]) -> Any:
    """The part of a state dict that a node of `save_optimizer`'s tree stands for."""
    if not isinstance(node, dict):
        return node
    ((kind, content),) = node.items()
    if kind == "tensor":
        return tensor(content)
    if kind == "dict":
        return {k: _restore(v, tensor) for k, v in content}
    values = [_restore(v, tensor) for v in content]
    return tuple(values) if kind == "tuple" else values
