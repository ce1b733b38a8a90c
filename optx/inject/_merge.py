"""Folding parts into their module's weights, and giving the weights back bit for bit.

While anything is merged into a module, a copy of its own weight and bias is kept (that is what exactness
costs: the bytes of the served weights once more). Every merge starts from that copy and folds what is
merged in the order of the call, so the order in which merges come and go leaves no trace.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from optx._errors import MergeError
from optx.inject import _quantised
from optx.inject._computes import check_weights
from optx.inject._part import Attached, Part, Requantised, Weights
from optx.inject._quantised import Rounding
from optx.inject._weights import in_sum_precision

_TENSORS = ("weight", "bias")


def check_mergeable(module: nn.Module, part: Part, path: str, what: str) -> None:
    """Raise if a part has no equal in the module's weights, or the weights are none that can be written."""
    if not part.overrides("fold"):
        raise MergeError(
            f"merge: {what} at {path!r} is not a change of the module's weights, so it can't be merged into "
            "them. Keep it attached, or remove it."
        )
    check_weights(module, part, path)


def merge(module: nn.Module, attached: Attached, part: Part, path: str) -> None:
    """Fold one more part into the module's weights; its hooks rest.

    Raises:
        MergeError: a part that is still a hook acts before this one, and the two don't commute.
    """
    parts = list(attached.parts.items())
    place = [p for _, p in parts].index(part)
    for i, (name, other) in enumerate(parts):
        if other is not part and not other.merged and _comes_first(other, part, earlier=i < place):
            raise MergeError(
                f"merge: {name!r} acts on {path!r} too and is not merged, and the result depends on their "
                "order. Merge that one first, or remove it."
            )
    _refold(module, attached, path, [*_merged(attached), part])
    part.merged = True


def _comes_first(other: Part, part: Part, earlier: bool) -> bool:
    """Whether a merge of one part would change what another does that is still a hook."""
    if other.in_place:
        return True  # it does not see the weight that this would be merged into
    # What goes around the call is inside of all hooks, whenever it was attached.
    earlier = earlier or other.overrides("around")
    return not other.folds_input and (earlier or part.folds_input) and not _commute(part, other)


def _commute(one: Part, other: Part) -> bool:
    if one.inside or other.inside:
        return True
    return (one.adds and other.adds) or (one.folds_input and other.folds_input)


def check_last(attached: Attached, part: Part, path: str, leaving: Collection[Part]) -> None:
    """Raise if a merged part that stays, and that does not commute with this one, acts after it."""
    parts = list(attached.parts.items())
    place = [p for _, p in parts].index(part)
    for i, (name, other) in enumerate(parts):
        behind = other.folds_input or (i > place and not part.folds_input)
        lost = part.in_place or (behind and not _commute(part, other))
        if other is not part and other.merged and other not in leaving and lost:
            raise MergeError(
                f"unmerge: {name!r} is merged into {path!r} too and acts after it, and the result depends on "
                "their order. Unmerge that one first."
            )


def unmerge(module: nn.Module, attached: Attached, part: Part, path: str) -> None:
    """Take one part out again; with the last one, the weights are bit-identical to before."""
    part.merged = False
    try:
        _refold(module, attached, path, _merged(attached))
    except BaseException:
        part.merged = True
        raise


def untie(module: nn.Module, attached: Attached, name: str) -> None:
    """Give a module whose weight or bias others share one of its own, until nothing is merged into it."""
    if name == "weight" and _quantised.kind_of(module):
        return  # its parameter is exchanged by a merge, which leaves that of the others alone
    shared = getattr(module, name)
    assert isinstance(shared, nn.Parameter)
    attached.tied[name] = shared
    setattr(module, name, nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad))


def retie(module: nn.Module, attached: Attached) -> None:
    """The shared tensors again, if nothing is merged any more."""
    if attached.tied and not _merged(attached):
        for name, shared in attached.tied.items():
            setattr(module, name, shared)
        attached.tied.clear()


def forget(attached: Attached, part: Part) -> None:
    """Leave what is merged in the weights for good."""
    part.merged = False
    attached.originals.clear()
    attached.versions.clear()
    attached.tied.clear()
    attached.requantised = None


def _merged(attached: Attached) -> list[Part]:
    return [part for part in attached.parts.values() if part.merged]


def _refold(module: nn.Module, attached: Attached, path: str, parts: Iterable[Part]) -> None:
    """The original weights with these parts folded in, or as they were if there are none."""
    names = (*_TENSORS, *(name for part in attached.parts.values() for name in part.parameter_names))
    own = {name: p for name in names if isinstance(p := getattr(module, name, None), Tensor)}
    check_untouched(module, attached, path)
    quantised = attached.requantised is not None or bool(_quantised.kind_of(module))
    originals = attached.originals or {
        name: p if quantised and name == "weight" else p.detach().clone() for name, p in own.items()
    }
    ordered = _in_order_of_call(attached, parts)
    results = _folded(module, originals, ordered, path) if ordered else originals
    with torch.no_grad():
        if quantised:
            _requantise(
                module, attached, own.pop("weight"), originals["weight"], results["weight"], bool(ordered)
            )
        for name, p in own.items():
            p.copy_(results[name])
    attached.originals = originals if ordered else {}
    attached.versions = {name: _stamp(module, name) for name in originals} if ordered else {}


def _folded(
    module: nn.Module, originals: Mapping[str, Tensor], ordered: Iterable[Part], path: str
) -> dict[str, Tensor]:
    """The weights with parts in them, in the precision of sums."""
    own = dict(originals)
    if _quantised.kind_of(module):
        own["weight"] = _quantised.read(module, own["weight"], path)
    own = {name: in_sum_precision(tensor) for name, tensor in own.items()}
    others = {name: tensor for name, tensor in own.items() if name not in _TENSORS}
    base = Weights(own.get("weight", torch.empty(0)), own.get("bias"), others)
    now = Weights(base.weight, base.bias, others)
    # A product that autocast took to bfloat16 would be in the weights for good.
    with torch.no_grad(), torch.autocast(next(iter(own.values())).device.type, enabled=False):
        for part in ordered:
            folded = part.fold(module, now, base)
            now = folded if folded.others else folded.having(now.others)
    if now.bias is None:
        return {**now.others, "weight": now.weight}
    if "bias" not in own:
        raise MergeError(
            f"merge: {path!r} has no bias to merge the adapter's bias into. Build the model with one, or "
            "use an adapter without."
        )
    return {**now.others, "weight": now.weight, "bias": now.bias}


def _requantise(
    module: nn.Module, attached: Attached, now: Tensor, original: Tensor, new: Tensor, merging: bool
) -> None:
    """Codes of the merged weight, or the module's own again: the parameter is exchanged, not written to."""
    if attached.requantised is not None:
        attached.requantised.undo()
        attached.requantised = None
    if not merging:
        return
    kind = _quantised.kind_of(module)
    exact = _quantised.read(module, original, "")
    undo = _quantised.write(module, original, new)
    if undo is None:
        raise MergeError(f"merge: {kind} can't be written with these blocks. Keep the adapter attached.")
    off = _quantised.read(module, module.weight, "") - new
    tiny = torch.finfo(new.dtype).tiny
    attached.requantised = Requantised(
        undo,
        Rounding(
            kind,
            float(off.norm() / new.norm().clamp_min(tiny)),
            float(off.norm() / (new - exact).norm().clamp_min(tiny)),
            float(off.abs().max()),
        ),
    )


def _in_order_of_call(attached: Attached, parts: Iterable[Part]) -> list[Part]:
    """Attach order; but first what is inside of the call, and last what scales the input, before all else."""
    wanted = set(parts)
    ordered = [part for part in attached.parts.values() if part in wanted]
    return sorted(ordered, key=lambda part: (part.folds_input, not part.inside))


def check_untouched(module: nn.Module, attached: Attached, path: str) -> None:
    """Raise if a merged weight is not what the merge left."""
    for name, stamp in attached.versions.items():
        if _stamp(module, name) != stamp:
            raise MergeError(
                f"unmerge: {path}.{name} was changed after the merge (a step, a load, or a move to another "
                "device or dtype), so the kept copy is not what it should go back to. Keep the merged "
                "weights with handle.merge_and_unload()."
            )


def _stamp(module: nn.Module, name: str) -> tuple[int, int]:
    p = getattr(module, name, None)
    if not isinstance(p, Tensor):
        return -1, -1
    if name == "weight" and _quantised.kind_of(module):
        return id(p), -1  # bitsandbytes repacks it in place, and a subclass may have no memory of its own
    return p.data_ptr(), p._version  # pyright: ignore[reportPrivateUsage]
