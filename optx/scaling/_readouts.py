"""Whether a model does in its forward pass what muP's learning rates count on."""

from __future__ import annotations

from torch import nn

from optx._errors import warn
from optx.inject._part import RESERVED
from optx.scaling._parameters import parameters_of
from optx.scaling._rules_of_width import Parametrization, at_first
from optx.scaling._shapes import Shapes


def look_for_readouts(
    owner: str, shapes: Shapes, parametrization: Parametrization, model: nn.Module | None
) -> None:
    """Warn where a readout lacks the factor that its learning rate is made for.

    Args:
        owner: whose message it is.
        shapes: of the model.
        parametrization: asks for the factor.
        model: the model; None: that which the shapes were made of, if it is there.
    """
    model = model or shapes.model
    if model is None:
        return
    for name, one in parameters_of(model, owner).items():
        width = shapes.get(name)
        if width is None or width.kind != "output":
            continue
        factor = at_first(parametrization, width).forward
        parts = getattr(one.owner, RESERVED, None)
        # The peer package's own layer multiplies itself.
        if factor == 1.0 or hasattr(parts, "mu_readout") or "Readout" in type(one.owner).__name__:
            continue
        warn(
            f"{owner}: {name!r} reads out, and its learning rate is for an output that is multiplied by "
            f"{factor:g}, which no optx.MuReadout does here. Call optx.attach(model, "
            "optx.MuReadout(shapes)) before training, or take parametrization='mup-table3'. Ignore this if "
            "the model does it itself."
        )
        return
