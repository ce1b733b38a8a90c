"""What linear layers are given: the statistics that importance pruning and the choice of q are made from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optx._errors import OptxError
from optx._no_trace import evaluating


@dataclass(frozen=True)
class InputStats:
    """Of the inputs of one linear layer.

    Attributes:
        mean: (d_in,) float32, signed: the mean over each sequence's tokens, then over sequences.
        norm: (d_in,) float32, L2 norm over all tokens.
        tokens: how many there were.
        axis: the weight's dimension that runs over inputs: 1, or 0 in transformers' Conv1D.
    """

    mean: Tensor
    norm: Tensor
    tokens: int
    axis: int = 1


class _Sums:
    """What is summed up at one layer, in float64: a long calibration must not lose small inputs."""

    def __init__(self, axis: int) -> None:
        self.axis, self.tokens, self.sequences = axis, 0, 0
        self.mean: Tensor | None = None
        self.square: Tensor | None = None

    def add(self, x: Tensor) -> None:
        x = x.detach().to(torch.float64) if x.device.type != "mps" else x.detach().float()
        if x.numel() == 0:
            return
        width = x.shape[-1]
        # (sequences, tokens, d_in); two dimensions are samples, each a sequence of one.
        x = x.reshape(x.shape[0] if x.ndim > 1 else 1, -1, width)
        mean, square = x.mean(1).sum(0), x.square().sum((0, 1))
        self.mean = mean if self.mean is None else self.mean + mean
        self.square = square if self.square is None else self.square + square
        self.sequences += x.shape[0]
        self.tokens += x.shape[0] * x.shape[1]


def input_stats(model: nn.Module, batches: Iterable[Any]) -> dict[str, InputStats]:
    """Mean and norm of what each linear layer of a model is given.

    The model runs once over each batch, in eval mode and without gradients; its mode is put back and the
    hooks are taken off, also after an error. Layers: `torch.nn.Linear` and transformers' ``Conv1D``.

    Args:
        model: the fine-tuned model.
        batches: each one a mapping (passed as keyword arguments), a tuple or list (as positional ones), or
            a tensor. Without padding: padded positions would count.

    Returns:
        By the name of the layer's weight. Layers that were not called are left out.

    Paper values:
        DAREx: 50 sequences of 128 tokens of WikiText-2 (authors' code).

    Limits: Linear layers only, and what they are given in these batches.

    Keywords: Wanda, activations, calibration, importance.

    Evidence: ``optx run merge``; ``test_prune.py``.

    Raises:
        OptxError: there is no batch, or no linear layer was called.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2, bias=False))
        >>> found = optx.analysis.input_stats(model, [torch.tensor([[1.0, 4.0, 0.5], [2.0, 3.0, 0.5]])])
        >>> found["0.weight"].norm
        tensor([2.2361, 5.0000, 0.7071])

    Source: Wanda, arXiv 2306.11695, section 3; the signed mean: DAREx-q's official code (arXiv 2410.09344).
    """
    sums: dict[str, _Sums] = {}
    hooks: list[Any] = []
    try:
        for name, axis in linear_axes(model).items():
            module = model.get_submodule(name.removesuffix("weight").removesuffix("."))
            sums[name] = _Sums(axis)
            hooks.append(module.register_forward_pre_hook(_watch(sums[name]), with_kwargs=True))
        with evaluating(model), torch.no_grad():
            count = sum(1 for batch in batches if (call(model, batch), True))
    finally:
        for hook in hooks:
            hook.remove()
    if not count:
        raise OptxError("input_stats: batches is empty.")
    found = {name: _finished(one) for name, one in sums.items() if one.tokens}
    if not found:
        raise OptxError("input_stats: no torch.nn.Linear (or transformers Conv1D) of the model was called.")
    return found


def linear_axes(model: nn.Module) -> dict[str, int]:
    """By the name of its weight, the dimension that runs over a linear layer's inputs.

    It is 1 in `torch.nn.Linear`, and 0 in transformers' ``Conv1D``.
    """
    found: dict[str, int] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            found[f"{path}.weight" if path else "weight"] = int(isinstance(module, nn.Linear))
    return found


def call(model: Callable[..., Any], batch: Any) -> Any:
    """The model's output on a batch: keyword arguments, positional ones, or a tensor."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def _watch(sums: _Sums) -> Any:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sums.add(args[0] if args else next(iter(kwargs.values())))

    return hook


def _finished(sums: _Sums) -> InputStats:
    assert sums.mean is not None
    assert sums.square is not None
    mean, norm = sums.mean / sums.sequences, sums.square.sqrt()
    return InputStats(mean.float(), norm.float(), sums.tokens, sums.axis)
