"""Where gradients point, and how much of them arrives where.

Source of `nlm_alignment`: Prieto, Barsbey, Mediano, Birdal, "Grokking at the Edge of Numerical Stability",
ICLR 2025, arXiv 2501.04697, sections 3 and 5.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from optx._errors import OptxError
from optx.analysis._directions import cosine, norm
from optx.inject._handle import Handle


def nlm_alignment(model: nn.Module) -> dict[str, float]:
    """How far each parameter's descent direction merely scales the parameter: cos(w, -g).

    Once all samples are classified correctly, a loss can still be lowered by scaling up the logits, which
    changes no prediction: "naive loss minimisation" (arXiv 2501.04697, section 3; the paper sees up to 0.9
    in the last layer). A step along -g then points along w. Call it after ``backward()`` and before the
    gradients are cleared.

    Args:
        model: a module whose parameters have gradients; those without are left out.

    Returns:
        By parameter name, ``-<w, g> / (|w| |g|)`` in [-1, 1], over the whole tensor: 1 means that the step
        only grows the weights, -1 that it only shrinks them. It is 0 where weight or gradient is all zeros
        (or empty): a zero vector has no direction. It is nan where either holds inf or nan.

    Paper values:
        There is nothing to set. The paper sees up to 0.9 in the last layer, after overfitting.

    Limits: It reads gradients as they are: after clipping or a transform they are no longer the loss's.

    Keywords: naive loss minimisation, grokking, overfitting, diagnostics.

    Evidence: ``optx run grokking``; ``test_analysis.py``.

    Source: "Grokking at the Edge of Numerical Stability", arXiv 2501.04697, section 3.

    Raises:
        OptxError: no parameter has a gradient.

    Example:
        >>> import torch, optx
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> layer.weight.data = torch.tensor([[3.0, 4.0]])
        >>> layer.weight.grad = torch.tensor([[-3.0, -4.0]])
        >>> optx.analysis.nlm_alignment(layer)
        {'weight': 1.0}
    """
    with torch.no_grad():
        found = {
            name: cosine(p.detach(), -p.grad) for name, p in model.named_parameters() if p.grad is not None
        }
        if not found:
            raise OptxError(
                "nlm_alignment: no parameter of the model has a gradient; call it after loss.backward() and "
                "before optimizer.zero_grad()."
            )
        # Gathered first, so that a device is waited for once and not once a parameter.
        device = next(iter(found.values())).device
        values = torch.stack([v.to(device) for v in found.values()]).cpu()
    return {name: float(value) for name, value in zip(found, values, strict=True)}


def grad_norms(handle: Handle) -> dict[str, float]:
    """How much gradient reaches what was attached, module by module through the depth of the model.

    Adapters inside frozen layers get theirs through all layers above, which damp it or blow it up; those
    alongside (`optx.Aside`) get it whole. Call it in the first steps, after ``backward()`` and before the
    gradients are cleared.

    Source: Inside and Alongside Adapters, arXiv 2208.09847.

    Args:
        handle: of `optx.attach`.

    Returns:
        By the path of the served module, in the model's order, the L2 norm over all gradients of what was
        added to it: float, in units of loss per weight. Modules without a gradient are left out; modules
        that are trained whole (``modules_to_save``) don't count. It is nan where a gradient holds inf or nan.

    Paper values:
        There is nothing to set.

    Limits: One step's gradients: look at several.

    Keywords: vanishing gradients, depth, diagnostics.

    Evidence: ``test_analysis.py``; no recipe.

    Raises:
        OptxError: the handle was removed, or nothing that it added has a gradient.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
        >>> handle = optx.attach(model, optx.LoRA(rank=2), targets="0|1")
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> list(optx.analysis.grad_norms(handle))
        ['0', '1']
    """
    if handle.removed:
        raise OptxError("grad_norms: this handle has been removed from its model; attach again.")
    gradients = [(one.path, p.grad) for one in handle.served for p in one.part.parameters()]
    with torch.no_grad():
        found = [(path, norm(grad)) for path, grad in gradients if grad is not None]
        if not found:
            raise OptxError(
                "grad_norms: nothing that was attached has a gradient; call it after loss.backward() and "
                "before optimizer.zero_grad()."
            )
        values = torch.stack([length.to(found[0][1].device) for _, length in found]).cpu()
    norms: dict[str, list[float]] = {path: [] for path, _ in handle.model.named_modules()}
    for (path, _), value in zip(found, values, strict=True):
        norms[path].append(float(value))
    return {path: math.hypot(*some) for path, some in norms.items() if some}
