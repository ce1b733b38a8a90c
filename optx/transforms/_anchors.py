"""Anchors: the weights a transform pulls towards, from wherever the person has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from optx._errors import ShapeError, TransformError, near
from optx._names import has_names, parameter_names, placed_like, plain_name

if TYPE_CHECKING:
    from optx._wrap import Wrapped

AnchorSource = nn.Module | Mapping[str, Tensor] | str | PathLike[str] | Literal["zero"] | None


class Anchors:
    """Finds the anchor of each parameter of an optimizer.

    Args:
        owner: who asks, for messages.
        source: None for the weights as they are when `bind` is called; another model, a state dict, or a
            safetensors file (memory-mapped: anchors stay in the file until they are read).
        model: gives the parameters' names, if the optimizer was not built from ``named_parameters()``.
    """

    def __init__(self, owner: str, source: AnchorSource, model: nn.Module | None) -> None:
        self.owner, self.source, self.model = owner, source, model
        self._names: dict[int, str] = {}

    def bind(self, optimizer: Wrapped, parameters: list[Tensor]) -> dict[Tensor, Tensor]:
        """The anchor of every parameter; raises before anything is changed."""
        self._names = parameter_names(optimizer.base, self.model)
        tensors = self._tensors(optimizer, parameters)
        if tensors is None:
            return {p: p.detach().clone(memory_format=torch.preserve_format) for p in parameters}
        return {p: self._checked(p, tensors) for p in parameters}

    def of(self, p: Tensor, optimizer: Wrapped) -> Tensor:
        """The anchor of a parameter that came later (`add_param_group`)."""
        return self.bind(optimizer, [p])[p]

    def _checked(self, p: Tensor, tensors: Callable[[Tensor, str], Tensor | list[str]]) -> Tensor:
        name = self._names[id(p)]
        anchor = tensors(p, name)
        if isinstance(anchor, list):
            raise TransformError(
                f"{self.owner}: no anchor for {name!r}. {near(name, anchor)} For a parameter that the "
                "pretrained model does not have, put it in a param group of its own with adamr=False."
            )
        if anchor.shape != p.shape:
            raise ShapeError(
                f"{self.owner}: anchor for {name!r} has shape {tuple(anchor.shape)}, the weight has "
                f"{tuple(p.shape)}. Pass anchor=model.state_dict() of the same model."
            )
        anchor = placed_like(anchor.detach(), p)
        # Elementwise kernels walk both in memory order.
        return (
            anchor if anchor.stride() == p.stride() else torch.empty_like(p, dtype=anchor.dtype).copy_(anchor)
        )

    def _tensors(
        self, optimizer: Wrapped, parameters: list[Tensor]
    ) -> Callable[[Tensor, str], Tensor | list[str]] | None:
        """A look-up by name; it gives the list of all names where there is none of that name."""
        source = self.source
        if source is None:
            return None
        if isinstance(source, nn.Module):
            if not self._named(optimizer):
                return self._by_position(source, optimizer)
            source = {plain_name(n): t for n, t in (*source.named_parameters(), *source.named_buffers())}
        elif isinstance(source, str | PathLike):
            source = _MappedFile(self.owner, fspath(source))
        if not self._named(optimizer):
            raise TransformError(
                f"{self.owner}: anchors are found by name, and the optimizer does not know its parameters' "
                "names. Build it from model.named_parameters(), or pass model=model."
            )
        table: Mapping[str, Tensor] = source
        return lambda _p, name: table[name] if name in table else list(table)

    def _named(self, optimizer: Wrapped) -> bool:
        return self.model is not None or has_names(optimizer.base)

    def _by_position(
        self, source: nn.Module, optimizer: Wrapped
    ) -> Callable[[Tensor, str], Tensor | list[str]]:
        """Without names, another model's parameters pair up only if all of them do, in order."""
        ours = [p for group in optimizer.base.param_groups for p in group["params"]]
        theirs = list(source.parameters())
        if [p.shape for p in ours] != [p.shape for p in theirs]:
            raise TransformError(
                f"{self.owner}: the anchor model's parameters do not pair up in order with the optimizer's, "
                "which has no names. Build it from model.named_parameters(), or pass model=model."
            )
        table = {id(p): t for p, t in zip(ours, theirs, strict=True)}
        return lambda p, _name: table[id(p)]


class _MappedFile(Mapping[str, Tensor]):
    """Tensors of a safetensors file, each a view of the mapped file."""

    def __init__(self, owner: str, path: str) -> None:
        from safetensors import safe_open

        try:
            self._file: Any = safe_open(path, framework="pt")
        except Exception as error:  # safetensors raises types of its own, and FileNotFoundError
            raise TransformError(
                f"{owner}: cannot read anchor={path!r} as a safetensors file ({error})."
            ) from error
        self._keys = set(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        return self._file.get_tensor(name)

    def __iter__(self) -> Any:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, name: object) -> bool:
        return name in self._keys
