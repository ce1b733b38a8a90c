"""A step over the selected entries alone: gradients gathered as they come, moments of so many numbers.

Between two steps the param groups hold the model's weights, each with a `CompactGradient` as ``p.grad`` and
moments of one number per selected entry in ``state[p]``. During a step a vector of the selected entries
stands in for each weight, so that the base's update and its kernels run on those as on any parameter.

Source: SaRA's "unstructural backpropagation", arXiv 2409.06633, which makes the vector the leaf; a hook that
takes each layer's gradient as it is made needs the same memory, and leaves the model as it is.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from optx.step.state import is_ours
from optx.step.transform import Group, Host
from optx.transforms._compact_gradient import CompactGradient
from optx.transforms._gather import Selection

SelectionOf = Callable[[Tensor], Selection]
"""Which of a weight's entries are selected now."""


class CompactStep:
    """The hooks and the vectors of one optimizer's served weights.

    Args:
        selection_of: asked at each gradient and step.
    """

    def __init__(self, selection_of: SelectionOf) -> None:
        self._selection_of = selection_of
        self._hooks: dict[Tensor, Any] = {}
        self._vectors: dict[Tensor, nn.Parameter] = {}

    # ---- gradients -------------------------------------------------------------------------------------

    def watch(self, weights: Iterable[Tensor]) -> None:
        """Gather the gradients of these as autograd makes them, and of no others any more."""
        wanted = {p: None for p in weights if p.requires_grad and p.is_leaf}
        for p in [p for p in self._hooks if p not in wanted]:
            self._hooks.pop(p).remove()
            self._vectors.pop(p, None)
        for p in wanted:
            if p not in self._hooks:
                self._hooks[p] = p.register_post_accumulate_grad_hook(_Gather(weakref.ref(self)))

    def gather(self, p: Tensor) -> None:
        """Keep of a weight's gradient what its mask has now."""
        g = p.grad
        if g is None or g.layout != torch.strided:
            return  # sparse ones are refused where the step sees them
        selection = self._selection_of(p)
        if isinstance(g, CompactGradient):
            if g.goes_with(selection):
                return
            g = g.dense()  # the selection is another since
        p.grad = CompactGradient(selection.gathered(g), selection)

    # ---- state -----------------------------------------------------------------------------------------

    def condense(self, optimizer: Host, p: Tensor) -> None:
        """Keep of a base's state that has the weight's shape what its mask has."""
        selection = self._selection_of(p)
        for state in _base_states(optimizer, p):
            for key, t in state.items():
                if isinstance(t, Tensor) and _not_ours(key) and t.shape == p.shape and t.ndim:
                    state[key] = selection.gathered(t)

    def spread(self, optimizer: Host, p: Tensor) -> None:
        """Give a base's state the weight's shape again, zeros where nothing was kept."""
        selection = self._selection_of(p)
        count = selection.count()
        for state in _base_states(optimizer, p):
            for key, t in state.items():
                if isinstance(t, Tensor) and _not_ours(key) and t.shape == (count,) and key != "step":
                    full = torch.zeros(p.shape, dtype=t.dtype, device=t.device)
                    state[key] = selection.put(full, t)

    def shrink(self, optimizer: Host, p: Tensor, old: Tensor, new: Tensor) -> None:
        """Of the state that went with an old mask, keep what goes with a new one within it."""
        staying = new[old]
        for state in _base_states(optimizer, p):
            for key, t in state.items():
                if isinstance(t, Tensor) and _not_ours(key) and t.shape == staying.shape and key != "step":
                    state[key] = t[staying]

    # ---- a step ----------------------------------------------------------------------------------------

    @contextmanager
    def standing_in(self, optimizer: Host, groups: Iterable[Group]) -> Generator[None]:
        """Inside, the groups hold vectors of selected entries; afterwards the weights have what they are."""
        swapped: list[tuple[Tensor, nn.Parameter, Selection]] = []
        held: list[tuple[Group, list[Tensor]]] = []
        try:
            for group in groups:
                weights: list[Tensor] = group["params"]
                vectors = [self._vector(p, swapped) for p in weights]
                held.append((group, weights))
                group["params"] = vectors
            for p, vector, _ in swapped:
                optimizer.slot_store.follow(p, vector)
            yield
            for p, vector, selection in swapped:
                if vector.grad is not None:
                    selection.put(p.detach(), vector.detach())
        finally:
            for p, vector, _ in swapped:
                optimizer.slot_store.follow(vector, p)
                vector.grad = None
                vector.data = vector.data.new_empty(0)
            for group, weights in held:
                group["params"] = weights

    def _vector(self, p: Tensor, swapped: list[Any]) -> Tensor:
        """What stands in for a weight: its selected entries and their gradients, where it has a gradient."""
        vector = self._vectors.get(p)
        if vector is None or vector.dtype != p.dtype or vector.device != p.device:
            vector = self._vectors[p] = nn.Parameter(p.detach().new_empty(0), requires_grad=p.requires_grad)
        vector.requires_grad_(p.requires_grad)
        selection = self._selection_of(p)
        if p.grad is not None:
            g: Any = p.grad
            vector.data = selection.gathered(p)
            vector.grad = g.kept if isinstance(g, CompactGradient) else selection.gathered(g.to_dense())
        swapped.append((p, vector, selection))
        return vector

    def release(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()
        self._vectors.clear()


class _Gather:
    """The hook on a weight; it does not keep the optimizer alive, and goes when that has gone."""

    def __init__(self, compact: weakref.ref[CompactStep]) -> None:
        self._compact = compact

    def __call__(self, p: Tensor) -> None:
        """A gradient has been added to ``p.grad``."""
        compact = self._compact()
        if compact is not None:
            with torch.no_grad():
                compact.gather(p)

    def __reduce__(self) -> Any:
        return (_Gather, (_nobody,))  # a copied weight is hooked by its own optimizer


def _nobody() -> None:
    return None


def _not_ours(key: object) -> bool:
    return not is_ours(key) or key == "optx.kahan"


def _base_states(optimizer: Host, p: Tensor) -> Iterable[dict[str, Any]]:
    """Where there is anything of a weight: in ``state``, and what is pending there."""
    store = optimizer.slot_store
    for where in (optimizer.base.state, store.pending):
        if p in where:
            yield where[p]
