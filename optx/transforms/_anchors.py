"""Anchors: the weights a transform pulls towards, from wherever the person has them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from optx._errors import FileError, OptxError, ShapeError, TransformError, near
from optx._names import is_dtensor, parameter_names, placed_like, plain_name
from optx.step.transform import Host

if TYPE_CHECKING:
    from optx.transforms._anchor_files import AnchorFiles, Stamp

AnchorSource = nn.Module | Mapping[str, Any] | str | PathLike[str] | Sequence[str | PathLike[str]] | None

# Narrower ones keep their scales elsewhere, and integers are codes: as weights they would be wrong.
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Anchors:
    """Finds the anchor of each parameter of an optimizer, in memory that nothing else writes to.

    Args:
        owner: who asks, for messages.
        source: None for the weights as they are when `bind` is called; another model, a state dict, or files
            (see `AnchorFiles`), which stay mapped where the parameters are on the CPU.
        model: gives the parameters' names, if the optimizer was not built from ``named_parameters()``.

    Raises:
        OptxError: an argument is none of these.
    """

    def __init__(self, owner: str, source: AnchorSource, model: nn.Module | None) -> None:
        _check_arguments(owner, source, model)
        self.owner, self.source, self.model = owner, source, model
        self._stamps: dict[str, Stamp] = {}
        self._mapped: set[int] = set()  # addresses of anchors that lie in mapped files

    def bind(self, optimizer: Host, parameters: list[Tensor]) -> tuple[dict[Tensor, Tensor], list[Tensor]]:
        """The anchor of every parameter, and those whose anchor is a copy of themselves."""
        if self.source is None:
            return {p: _copy(p) for p in parameters}, parameters
        found = self._find(optimizer, parameters)
        labels = parameter_names(optimizer.base, self.model)
        anchors = {p: self._checked(p, labels[id(p)], t) for p, t in found.items()}
        return anchors, [p for p, t in found.items() if _same_memory(p, t)]

    def of(self, p: Tensor, optimizer: Host) -> Tensor:
        """The anchor of a parameter that came later (`add_param_group`)."""
        return self.bind(optimizer, [p])[0][p]

    def check_files(self, anchors: Iterable[Tensor]) -> None:
        """Raise if a file that anchors are mapped from was written to: they are no longer what they were."""
        if not self._mapped:
            return
        from optx.transforms._anchor_files import overwritten

        changed = next((path for path, stamp in self._stamps.items() if overwritten(path, stamp)), None)
        if changed is None:
            return
        if not any(_address(a) in self._mapped for a in anchors):  # a checkpoint brought others
            self._stamps, self._mapped = {}, set()
            return
        raise TransformError(
            f"{self.owner}: the file {changed!r} was written to while the anchors are read from it (it is "
            "memory-mapped). Save to another path, or pass the tensors: anchor=safetensors.torch.load_file("
            "path)."
        )

    # ---- which tensor is whose ----------------------------------------------------------------------

    def _find(self, optimizer: Host, parameters: list[Tensor]) -> dict[Tensor, Tensor]:
        """What the source has for each parameter; paired by name, or because it is the parameter itself."""
        source = self.source
        if isinstance(source, nn.Module):
            own = {id(t): t for t in source.parameters()}
            table: Mapping[str, Any] = {
                **dict(source.named_parameters(remove_duplicate=False)),
                **dict(source.named_buffers(remove_duplicate=False)),
            }
        else:
            own = dict[int, Tensor]()
            table = source if isinstance(source, Mapping) else self._open(source)
        names = _Names(optimizer, self.model, table)
        found: dict[Tensor, Tensor] = {}
        for p in parameters:
            if id(p) in own:
                found[p] = own[id(p)]
            elif (key := names.key(p)) is not None:
                found[p] = self._tensor(key, table[key])
            else:
                raise TransformError(self._missing(names, p, optimizer, table))
        return found

    def _open(self, source: Any) -> AnchorFiles:
        from optx.transforms._anchor_files import AnchorFiles

        try:
            files = AnchorFiles(source)
        except FileError as error:
            said = fspath(source) if isinstance(source, str | PathLike) else [fspath(s) for s in source]
            raise TransformError(
                f"{self.owner}: cannot read anchor={said!r} as a safetensors file, a folder of them, or a "
                f"torch file ({str(error).rstrip('.')})."
            ) from error
        self._stamps.update(files.stamps)
        return files

    def _missing(self, names: _Names, p: Tensor, optimizer: Host, table: Mapping[str, Any]) -> str:
        """Why there is no anchor for a parameter, and the way out."""
        if not names.of(p):
            if self.model is not None:
                return (
                    f"{self.owner}: model= has no such parameter as "
                    f"{parameter_names(optimizer.base)[id(p)]} of the optimizer. Pass the model that the "
                    "optimizer trains, or put that parameter in a param group of its own with adamr=False."
                )
            return (
                f"{self.owner}: anchors are found by name, and the optimizer does not know its parameters' "
                "names (two models' parameters do not pair up in order with certainty). Build it from "
                "model.named_parameters(), or pass model=model."
            )
        name = names.of(p)[0]
        if names.doubtful(p):
            return (
                f"{self.owner}: two parameters of the optimizer are called {name!r}, and anchors are found "
                "by name. Pass model=, a module that has both, whose names tell them apart."
            )
        holders = [k for k, v in table.items() if isinstance(v, Mapping)] if _is_plain(table) else []
        if holders:
            best = next((k for k in holders if any(n in table[k] for n in names.of(p))), holders[0])
            what = "anchor" if isinstance(self.source, Mapping) else "torch.load(path, weights_only=True)"
            return (
                f"{self.owner}: no anchor for {name!r}: the anchor is a checkpoint of several parts ("
                f"{', '.join(map(repr, list(table)[:5]))}), not a state dict. Pass anchor={what}[{best!r}]."
            )
        known = [k for k in table if isinstance(k, str)]  # pyright: ignore[reportUnnecessaryIsInstance]
        prefixed = [k for k in known if k.endswith(f".{name}") or name.endswith(f".{k}")]
        rename = f" If {prefixed[0]!r} is meant, rename the keys of a state dict." if prefixed else ""
        return (
            f"{self.owner}: no anchor for {name!r}. {near(name, known)}{rename} For a parameter that the "
            "pretrained model does not have, put it in a param group of its own with adamr=False."
        )

    def _tensor(self, key: str, value: Any) -> Tensor:
        """What the source has under a key, as a tensor of a dtype that weights have."""
        if isinstance(value, np.ndarray | np.generic):
            try:
                value = torch.tensor(value)
            except TypeError as error:
                raise TransformError(f"{self.owner}: anchor {key!r} is no tensor ({error}).") from None
        if not isinstance(value, Tensor):
            raise TransformError(
                f"{self.owner}: anchor {key!r} is a {type(value).__name__}; it must be a tensor."
            )
        if value.dtype not in _DTYPES or value.layout != torch.strided:
            what = value.dtype if value.dtype not in _DTYPES else value.layout
            raise TransformError(
                f"{self.owner}: anchor {key!r} is {what}; it must be a dense tensor in float16, bfloat16, "
                "float32 or float64. Dequantize it, or put the parameter in a param group of its own with "
                "adamr=False."
            )
        return value

    # ---- making it an anchor ------------------------------------------------------------------------

    def _checked(self, p: Tensor, name: str, found: Tensor) -> Tensor:
        if found.shape != p.shape:
            raise ShapeError(
                f"{self.owner}: anchor for {name!r} has shape {tuple(found.shape)}, the weight has "
                f"{tuple(p.shape)}. {_way_out(tuple(found.shape), tuple(p.shape))}"
            )
        if found.is_meta and not p.is_meta:
            raise TransformError(
                f"{self.owner}: anchor for {name!r} is on the meta device and has no numbers. Load its "
                "weights first."
            )
        in_memory = isinstance(self.source, nn.Module | Mapping)
        t = found.detach()
        if is_dtensor(p) or is_dtensor(t):
            # Placing a tensor over a mesh may write to it.
            t = placed_like(_over_mesh(_copy(t), p), p)
            in_memory = False
        anchor = t.to(p.device)
        if anchor.stride() != p.stride():  # elementwise kernels walk both in memory order
            return torch.empty_like(p, dtype=anchor.dtype, requires_grad=False).copy_(anchor)
        if anchor is not t:
            return anchor
        if in_memory:
            return _copy(t)
        self._mapped |= {_address(anchor)} - {0}
        return anchor


class _Names:
    """The keys under which a source may have each parameter of an optimizer.

    A key is a parameter's if it is its very name, or, but for what DDP, FSDP and compile put into names, the
    only one like the name of one parameter.
    """

    def __init__(self, optimizer: Host, model: nn.Module | None, table: Mapping[str, Any]) -> None:
        self._table = table
        self._names: dict[int, list[str]] = {}
        if model is not None:
            for name, p in model.named_parameters(remove_duplicate=False):  # of a tied one, every name
                self._names.setdefault(id(p), []).append(name)
        self._certain = set(self._names)  # one model's names differ; those of a group may be of two models
        for group in optimizer.base.param_groups:
            for p, name in zip(group["params"], group.get("param_names", ()), strict=False):
                self._names.setdefault(id(p), [name])
        self._exact = Counter(name for names in self._names.values() for name in names)
        plain = ({plain_name(name) for name in names} for names in self._names.values())
        self._plain = Counter(name for names in plain for name in names)
        self._theirs: dict[str, list[str]] = {}
        for key in table:
            if isinstance(key, str):  # pyright: ignore[reportUnnecessaryIsInstance]
                self._theirs.setdefault(plain_name(key), []).append(key)

    def of(self, p: Tensor) -> list[str]:
        """A parameter's names; the one for messages first."""
        return self._names.get(id(p), [])

    def doubtful(self, p: Tensor) -> bool:
        """Whether another parameter has the same name."""
        return id(p) not in self._certain and any(self._exact[name] > 1 for name in self.of(p))

    def key(self, p: Tensor) -> str | None:
        """The source's key, or None where none is certain."""
        if self.doubtful(p):
            return None
        for name in self.of(p):
            if name in self._table:
                return name
        for name in map(plain_name, self.of(p)):
            keys = self._theirs.get(name, [])
            if len(keys) == 1 and self._plain[name] == 1 and keys[0] not in self._exact:
                return keys[0]
        return None


def _check_arguments(owner: str, source: Any, model: Any) -> None:
    wanted = "None, 'zero', a model, a state dict, a path, or a list of paths"
    if isinstance(source, list | tuple):
        if not source or not all(isinstance(s, str | PathLike) for s in source):
            raise OptxError(
                f"{owner}: anchor is a {type(source).__name__} of something else than paths; it must be "
                f"{wanted}. Pass dict(model.named_parameters()) rather than a list."
            )
    elif not (source is None or isinstance(source, nn.Module | Mapping | str | PathLike)):
        raise OptxError(f"{owner}: anchor is a {type(source).__name__}; it must be {wanted}.")
    if not (model is None or isinstance(model, nn.Module)):
        raise OptxError(f"{owner}: model is a {type(model).__name__}; it must be the model that is trained.")


def _way_out(anchor: tuple[int, ...], weight: tuple[int, ...]) -> str:
    """What to do about two shapes: a grown vocabulary, a new head, or another model."""
    apart = "put it in a param group of its own with adamr=False"
    if anchor and weight and anchor[1:] == weight[1:]:
        if weight[0] > anchor[0]:
            return (
                f"If rows were added (a grown vocabulary), add the {weight[0] - anchor[0]} to the anchor "
                f"too; if this layer is new (another head), {apart}."
            )
        return f"If this layer is new (another head), {apart}."
    return f"Pass anchor=model.state_dict() of the same model; if this layer is new, {apart}."


def _is_plain(table: Mapping[str, Any]) -> bool:
    """Whether looking at every value costs nothing: not so in safetensors files."""
    from optx.transforms._anchor_files import AnchorFiles

    return isinstance(table, dict) or (isinstance(table, AnchorFiles) and table.loaded)


def _copy(t: Tensor) -> Tensor:
    return t.detach().clone(memory_format=torch.preserve_format)


def _over_mesh(t: Tensor, p: Tensor) -> Any:
    """A sharded tensor as its parameter is placed, or whole."""
    if not is_dtensor(t):
        return t
    sharded: Any = t
    weight: Any = p
    if is_dtensor(p) and sharded.device_mesh == weight.device_mesh:
        return sharded.redistribute(placements=weight.placements)
    return sharded.full_tensor()


def _same_memory(p: Tensor, t: Tensor) -> bool:
    """Whether a tensor is the parameter, or its numbers under another object."""
    return t is p or (p.device == t.device and _address(p) == _address(t) != 0)


def _address(t: Tensor) -> int:
    """Where a tensor's numbers lie; 0 for one that has none of its own."""
    try:
        return t.data_ptr()
    except RuntimeError:
        return 0
