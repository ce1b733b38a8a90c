"""Whether a model is, and does in its forward pass, what muP's learning rates count on."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import nn

from optx._errors import warn
from optx._module_paths import paths_of
from optx.inject._part import attached
from optx.scaling._init import is_to_rescale, rescaled_for
from optx.scaling._own_scales import scale_of
from optx.scaling._parameters import parameters_of
from optx.scaling._rules_of_width import Parametrization, at_first
from optx.scaling._shapes import Shapes
from optx.scaling.mu_attention import Scaled
from optx.scaling.mu_readout import Multiplier


def look_at_model(
    owner: str, shapes: Shapes, parametrization: Parametrization, model: nn.Module | None, untrained: bool
) -> None:
    """Warn of what was forgotten beside the optimizer: the first of each kind.

    Args:
        owner: whose message it is.
        shapes: of the model.
        parametrization: asks for it.
        model: the model; None: that which the shapes were made of, if it is there.
        untrained: whether the weights may be the first ones still.
    """
    model = model or shapes.model
    if model is None:
        return
    looks = [_factors(owner, shapes, parametrization, model), _attention(shapes, parametrization, model)]
    if untrained:
        looks.append(_first_weights(shapes, parametrization, model))
    lacking = [found for found in (next(look, None) for look in looks) if found is not None]
    if lacking:
        warn(f"{owner}: {' '.join(lacking)} Ignore this if the model does it itself.")


def _factors(owner: str, shapes: Shapes, parametrization: Parametrization, model: nn.Module) -> Iterator[str]:
    """Weights, by the modules that use them, whose factor is not that which the learning rate is for."""
    for first, one in parameters_of(model, owner).items():
        for name, module in {first: one.owner, **one.tied}.items():
            width = shapes.get(first)
            # The peer package's own layer multiplies itself.
            if width is None or one.leaf == "bias" or "Readout" in type(module).__name__:
                continue
            if width.is_table and width.tied and not isinstance(module, nn.Embedding):
                width = width.read_out()
            container = attached(module)
            parts = [] if container is None else list(container.parts.values())
            has = next((part.of_width for part in parts if isinstance(part, Multiplier)), None)
            wanted = at_first(parametrization, width).forward
            if has is not None and not math.isclose(has, wanted):
                yield (
                    f"{name!r} is multiplied by {has:g}, and its learning rate is for {wanted:g}. Give "
                    "optx.MuReadout the shapes and the parametrization that the optimizer has."
                )
            if has is None and not math.isclose(wanted, 1.0):
                yield _no_factor(name, width.kind, wanted, parametrization.name, bool(width.tied))


def _no_factor(name: str, kind: str, wanted: float, called: str, tied: bool) -> str:
    reads_out = kind == "output"
    said = "" if called == "mup" else ", parametrization=..."
    other = ", or take parametrization='mup-table3'" if called == "mup" and not tied else ""
    return (
        f"{name!r} {'reads out' if reads_out else f'is of kind {kind!r}'}, and its learning rate is for an "
        f"output that is multiplied by {wanted:g}, which no optx.MuReadout does here. Call "
        f"optx.attach(model, optx.MuReadout(shapes{said})) before training{other}."
    )


def _attention(shapes: Shapes, parametrization: Parametrization, model: nn.Module) -> Iterator[str]:
    """Attention whose logits are scaled by the square root of a head's width, or from another base."""
    modules = paths_of(model).modules
    for path, head in shapes.heads.items():
        module = modules.get(path)
        # muP alone has a rule for it, and only for heads that are not as wide as the base's.
        if module is None or head.width == head.base_width or not parametrization.name.startswith("mup"):
            continue
        container = attached(module)
        parts = [] if container is None else list(container.parts.values())
        scales = [part.scale for part in parts if isinstance(part, Scaled)]
        own = scale_of(module)
        if any(math.isclose(scale, head.scale) for scale in (scales or ([] if own is None else [own]))):
            continue
        yield (
            f"{path!r} has heads {head.width} wide, {head.base_width} in the base, and no optx.MuAttention "
            "of these shapes, so that its logits grow with width. Call optx.attach(model, "
            "optx.MuAttention(shapes)) before training."
        )


def _first_weights(shapes: Shapes, parametrization: Parametrization, model: nn.Module) -> Iterator[str]:
    """Fresh weights that were not rescaled, or for other shapes."""
    done = rescaled_for(model)
    if done is None:
        name = is_to_rescale(model, shapes, parametrization)
        if name is not None:
            yield (
                f"{name!r} has the size that the model was made with, which is another at this width. Call "
                "optx.scaling.init_(model, shapes) before training."
            )
        return
    for name, init in done.items():
        wanted = at_first(parametrization, shapes[name]).init if name in shapes else init
        if not math.isclose(wanted, init):
            yield (
                f"The first values of {name!r} were multiplied by {init:g} for width, and these shapes and "
                f"this parametrization ask for {wanted:g}. Give optx.scaling.init_ those of the optimizer."
            )
