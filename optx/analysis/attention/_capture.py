"""What one attention module is given and hands to softmax in a call of its model; hooks go with the call."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from optx._errors import OptxError, TargetError, near
from optx._module_paths import paths_of
from optx._no_trace import evaluating
from optx.delta._input_stats import call
from optx.inject._anatomy import attentions_of
from optx.inject._attention import Attention, Intercepted, kernel_of
from optx.inject._weights import is_linear, is_transposed


@dataclass(frozen=True, eq=False)
class Projection:
    """One linear map of an attention module's call.

    Attributes:
        input: (B, T, d).
        output: (B, T, out), as it was computed.
        weight: (out, d).
        bias: (out,), or None.
    """

    input: Tensor
    output: Tensor
    weight: Tensor
    bias: Tensor | None


@dataclass(eq=False)
class Captured:
    """A call: its linear maps, and what attention was computed from."""

    path: str
    projections: list[Projection] = field(default_factory=list[Projection])
    call: Attention | None = None


def attention_module(model: nn.Module, layer: int | str) -> tuple[str, nn.Module]:
    """The path of an attention module, by its number in the model's order or by its path, and it.

    Raises:
        TargetError: there is none of this number or path.
    """
    found = attentions_of(paths_of(model).modules)
    if not found:
        raise TargetError(
            f"attention_margins: {type(model).__name__} has no attention module that optx knows."
        )
    if isinstance(layer, str):
        if layer not in found:
            raise TargetError(
                f"attention_margins: layer is {layer!r}, which is no attention module of this model. "
                f"{near(layer, found)}"
            )
        return layer, found[layer]
    whole = type(layer) is int
    if not whole or not -len(found) <= layer < len(found):
        raise TargetError(
            f"attention_margins: layer is {layer!r}; it must be the path of an attention module or a whole "
            f"number between 0 and {len(found) - 1}. {near('', found)}"
        )
    path = list(found)[layer]
    return path, found[path]


def captured(model: nn.Module, batch: Any, path: str, module: nn.Module) -> Captured:
    """Call the model once, in eval mode and without gradients; modes and hooks are as before, in errors too.

    Raises:
        TargetError: the module was not called, or does not call ``scaled_dot_product_attention``.
    """
    kernel = kernel_of(module)
    if kernel:
        raise TargetError(
            f"attention_margins: {path!r} computes attention by {kernel}. Load the model with "
            "attn_implementation='sdpa' (timm: fused_attn=True), so that what softmax is given can be seen."
        )
    found = Captured(path)
    with _watched(found, module) as intercepted, evaluating(model), torch.no_grad(), intercepted:
        call(model, batch)
    if found.call is None:
        raise TargetError(
            f"attention_margins: {path!r} ({type(module).__name__}) was not called with this batch, or its "
            "call did not reach torch's scaled_dot_product_attention. Load the model with "
            "attn_implementation='sdpa'."
        )
    return found


@contextmanager
def _watched(found: Captured, module: nn.Module) -> Generator[Intercepted]:
    """Hooks on an attention module and its linear ones, and what is to be entered around the model's call."""
    inside, hooks = [False], list[Any]()

    def attend(given: Attention) -> Tensor:
        if inside[0]:
            if found.call is not None:
                raise OptxError(
                    f"attention_margins: {found.path!r} computes attention several times in one call of the "
                    "model; it must be once."
                )
            found.call = given
        return given.run()

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inside[0] = True
        if isinstance(module, nn.MultiheadAttention):
            found.projections += _of_multihead(module, args, kwargs)

    def leave(*_: Any) -> None:
        inside[0] = False

    def project(linear: Any) -> Any:
        def seen(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if inside[0] and args and isinstance(output, Tensor) and output.ndim == 3:
                weight = linear.weight.T if is_transposed(linear) else linear.weight
                found.projections.append(Projection(args[0], output, weight, linear.bias))

        return seen

    try:
        hooks.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        hooks.append(module.register_forward_hook(leave, always_call=True))
        for one in module.modules():
            if is_linear(one) and isinstance(getattr(one, "weight", None), Tensor):
                hooks.append(one.register_forward_hook(project(one)))
        yield Intercepted(attend)
    finally:
        for hook in hooks:
            hook.remove()


def _of_multihead(
    module: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[Projection]:
    """torch's own, which uses its weights without calling a module."""
    names = ("query", "key")
    given = {**dict(zip(names, args, strict=False)), **{k: v for k, v in kwargs.items() if k in names}}
    packed: Any = module.in_proj_weight, module.in_proj_bias
    alone = module.q_proj_weight, module.k_proj_weight
    weights: Any = alone if packed[0] is None else packed[0].chunk(3)[:2]
    biases: Any = (None, None) if packed[1] is None else packed[1].chunk(3)[:2]
    found = list[Projection]()
    for name, weight, bias in zip(names, weights, biases, strict=True):
        x: Tensor = given[name]
        x = x if module.batch_first or x.ndim < 3 else x.transpose(0, 1)
        x = x if x.ndim == 3 else x[None]
        found.append(Projection(x, nn.functional.linear(x, weight, bias), weight, bias))
    return found
