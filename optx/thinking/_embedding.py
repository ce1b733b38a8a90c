"""The input embedding of a model, and what lets it take mixtures of tokens where it takes tokens."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optx._errors import OptxError, TargetError
from optx._module_paths import paths_of
from optx.inject._part import Attached, Part, hidden_of, output_of, with_output

_NUMBERS = 1 << 26
"""Looked-up numbers that are held at once: a long record is mixed in pieces."""


def embedding_of(model: nn.Module, doing: str) -> tuple[str, nn.Module]:
    """A model's input embedding: what ``get_input_embeddings()`` gives, else its only nn.Embedding.

    Among several it is the one that soft thinking is attached to.

    Args:
        model: a model, or an embedding itself.
        doing: who asks, for the error.

    Returns:
        Its path as ``model`` has it (empty: it is the model itself), and the module.

    Raises:
        TargetError: there is none, or several.
    """
    give = getattr(model, "get_input_embeddings", None)
    try:
        given = give() if callable(give) else None
    except (NotImplementedError, AttributeError):
        given = None
    paths = paths_of(model)
    known = given if isinstance(given, nn.Module) else None
    found = [
        (path, module)
        for path, module in paths.modules.items()
        if (module is known if known is not None else isinstance(module, nn.Embedding))
    ]
    if len(found) > 1:
        found = [one for one in found if _served(one[1])] or found
    if len(found) != 1:
        raise TargetError(
            f"{doing}: found {len(found) or 'no'} input embeddings in this {type(model).__name__}, by "
            "get_input_embeddings() and among its nn.Embedding modules. Attach optx.SoftThinking with "
            "targets= the one of tokens, or give the model a get_input_embeddings."
        )
    path, module = found[0]
    return paths.here[path], module


def _served(module: nn.Module) -> bool:
    own = getattr(module, "optx", None)
    return isinstance(own, Attached) and any(isinstance(one, MixedEmbedding) for one in own.parts.values())


def mixed(embedding: nn.Module, ids: Tensor, weights: Tensor) -> Tensor:
    """s = sum_k y_k E[t_k], with the weights rounded to the embedding's dtype as its rows are.

    Args:
        embedding: is called with ids, so that its scale and the adapters on it act.
        ids: (..., K) tokens.
        weights: (..., K), which sum to 1.

    Returns:
        (..., d).
    """
    flat, y = ids.reshape(-1, ids.shape[-1]), weights.reshape(-1, ids.shape[-1])
    size = max(1, _NUMBERS // (flat.shape[-1] * getattr(embedding, "embedding_dim", 1024)))
    pieces = [_summed(embedding, *one) for one in zip(flat.split(size), y.split(size), strict=True)]
    found = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return found.view(*ids.shape[:-1], found.shape[-1])


def _summed(embedding: nn.Module, ids: Tensor, weights: Tensor) -> Tensor:
    return _weighed(output_of(embedding(ids)), weights)


def _weighed(rows: Tensor, weights: Tensor) -> Tensor:
    return (rows * weights.to(rows).unsqueeze(-1)).sum(-2)


@dataclass(frozen=True)
class Inputs:
    """What the last places of a model's next calls are made of: S steps of K tokens for each of B rows.

    Attributes:
        ids: (B, S, K).
        weights: (B, S, K).
        soft: (B, S) bool: the others are as the model has them.
    """

    ids: Tensor
    weights: Tensor
    soft: Tensor


class MixedEmbedding(Part):
    """Lets an embedding take ``(ids, weights)`` pairs, and puts mixtures where `feeding` says."""

    comes_last = True  # what it gives are sums of what the embedding gives with all that is attached to it

    def __init__(self) -> None:
        super().__init__()
        self.inputs: Inputs | None = None
        self.pair: Tensor | None = None
        self.fed = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "inputs": None, "pair": None}

    @contextmanager
    def feeding(self, inputs: Inputs) -> Generator[None]:
        """While it lasts, the last S places of what the model is given are these, where they are soft.

        A call of fewer places (one, with a KV cache) gets the last of them.
        """
        before, self.inputs, self.fed = self.inputs, inputs, False
        try:
            yield
        finally:
            self.inputs = before

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Of a pair, the ids go on; the weights wait for what comes back."""
        self.pair = None  # of a call that another hook broke off
        given = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(given, tuple):
            return None
        ids, weights = _pair(given)
        self.pair = weights
        return ((ids, *args[1:]), kwargs) if args else ((ids,), {})

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Sum up a pair's rows, or put mixtures in their places."""
        if self.pair is not None:
            weights, self.pair = self.pair, None
            return with_output(output, _weighed(output_of(output), weights))
        if self.inputs is None:
            return None
        inputs, self.inputs = self.inputs, None  # its own look-ups are ordinary ones
        try:
            return with_output(
                output, self._placed(module, hidden_of(args, kwargs), output_of(output), inputs)
            )
        finally:
            self.inputs = inputs

    def _placed(self, module: nn.Module, tokens: Tensor, output: Tensor, inputs: Inputs) -> Tensor:
        if tokens.ndim != 2 or len(tokens) != len(inputs.ids):
            raise OptxError(
                f"SoftThinking: the embedding was called with ids of shape {tuple(tokens.shape)} while "
                f"mixtures for {len(inputs.ids)} rows wait. Call the model with as many rows, (B, T)."
            )
        self.fed = True
        T = min(tokens.shape[1], inputs.ids.shape[1])
        ids, weights, soft = inputs.ids[:, -T:], inputs.weights[:, -T:], inputs.soft[:, -T:]
        # A row that has ended is given padding, which is no mixture.
        soft = soft & (ids[..., 0] == tokens[:, -T:])
        with torch.no_grad():
            sums = mixed(module, ids, weights)
        last = torch.where(soft.unsqueeze(-1), sums, output[:, -T:])
        return last if output.shape[1] == T else torch.cat([output[:, :-T], last], 1)

    def note(self) -> str:
        """What it is for."""
        return "mixtures of tokens"


def _pair(given: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    if len(given) != 2 or not all(isinstance(one, Tensor) for one in given):
        raise OptxError(
            f"SoftThinking: the embedding was called with a tuple of {len(given)}; it takes ids, or a pair "
            "(ids, weights) of one shape (..., K)."
        )
    ids, weights = given
    if ids.shape != weights.shape or not weights.is_floating_point() or ids.is_floating_point():
        raise OptxError(
            f"SoftThinking: a pair's ids have shape {tuple(ids.shape)} and dtype {ids.dtype}, its weights "
            f"{tuple(weights.shape)} and {weights.dtype}; they must be of one shape, whole and real numbers."
        )
    return ids, weights


def check_tokens(embedding: nn.Module, ids: Tensor, doing: str) -> None:
    """Raise unless all of them are tokens of this embedding."""
    V = getattr(embedding, "num_embeddings", None)
    if V is None or not ids.numel() or ids.is_meta:
        return
    low, high = map(int, ids.aminmax())
    if low < 0 or high >= V:
        raise OptxError(
            f"{doing}: {low if low < 0 else high} is no token; the embedding has {V:,}, 0 to {V - 1:,}."
        )
