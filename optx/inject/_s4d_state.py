"""A layer of transformers' cache that keeps a state in the place of keys and values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from optx._errors import OptxError
from optx.inject._s4d_layer import S4DLayer


class Unmade(NamedTuple):
    """A state that is not computed yet, by what it will be computed from."""

    layer: S4DLayer
    hidden: Tensor
    real: Tensor | None
    before: Tensor | None
    graph: bool

    def made(self) -> Tensor:
        """It, with autograd's graph if the call had one."""
        with torch.set_grad_enabled(self.graph):
            return self.layer.state_after(self.hidden, mask=self.real, state=self.before)


class StateLayer(DynamicLayer):
    """A state that does not grow, and how many tokens went into it."""

    is_croppable = False

    def __init__(self, path: str, mixer: str) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self.path, self.mixer, self.seen = path, mixer, 0
        self._state: Tensor | Unmade | None = None

    def put(self, state: Tensor, tokens: int) -> None:
        """Keep what was behind so many tokens more."""
        self._state, self.seen = state, self.seen + tokens

    def put_off(self, layer: S4DLayer, hidden: Tensor, real: Tensor | None, before: Tensor | None) -> None:
        """Keep what to compute the state of: it is, once it is asked for, which in training it never is."""
        self._state = Unmade(layer, hidden, real, before, torch.is_grad_enabled())
        self.seen += hidden.shape[1]

    @property
    def state(self) -> Tensor | None:
        """What all tokens so far left; None before the first."""
        if isinstance(self._state, Unmade):
            self._state = self._state.made()
        return self._state

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_state": self.state}  # a copy has no use for a copy of the mixer

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.state is not None:
            self._state = change(self.state)

    def update(self, *_: Any, **__: Any) -> Any:
        """Nothing has keys and values here."""
        raise OptxError(
            f"S4D on {self.path!r}: attention wrote to the cache where the mixer keeps its state. Begin "
            "with an empty cache once S4D was switched off."
        )

    def get_seq_length(self) -> int:
        """How many tokens it has seen."""
        return self.seen

    def reset(self) -> None:
        """As before the first token."""
        self._state, self.seen = None, 0

    def crop(self, tokens_to_remove: int) -> None:
        """A recurrence can't go back."""
        if tokens_to_remove:
            raise OptxError(
                f"S4D on {self.path!r}: the cache was to forget {abs(tokens_to_remove)} tokens, as "
                "assisted generation does, and a state can't go back. Generate without an assistant."
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beams that go on."""
        self._change(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence several times."""
        self._change(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Some sequences."""
        self._change(lambda state: state[indices])

    def offload(self) -> None:
        """It is small, and stays."""

    def prefetch(self) -> None:
        """It is there."""
