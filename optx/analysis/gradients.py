"""Functions that change nothing: they tell what training is doing to a model.

Source of `softmax_collapse` and `nlm_alignment`: Prieto, Barsbey, Mediano, Birdal, "Grokking at the Edge of
Numerical Stability", ICLR 2025, arXiv 2501.04697, sections 3 and 5.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from optx._errors import OptxError, ShapeError
from optx.delta._input_stats import InputStats, input_stats
from optx.inject._handle import Handle

__all__ = ["InputStats", "grad_norms", "input_stats", "nlm_alignment", "softmax_collapse"]


def softmax_collapse(logits: Tensor, target: Tensor, ignore_index: int = -100) -> float:
    """Fraction of samples whose softmax has collapsed: only the true class's term is left in its sum.

    A sample has collapsed when, in the dtype of the logits,
    ``sum_k exp(z_k - max z) == exp(z_y - max z)`` (arXiv 2501.04697, definition 2): its cross-entropy is
    exactly 0 and so is its gradient at the true class. In float32 this takes every other logit being more
    than about 16.6 below, in float16 7.6, in bfloat16 5.5, in float64 36.7. So pass logits in the dtype
    in which the loss sees them (inside autocast `cross_entropy` sees float32).

    Args:
        logits: unnormalised scores, shape (C,), (N, C) or (N, C, d1, ...), any float dtype.
        target: class numbers, any integer dtype, shape (), (N,) or (N, d1, ...).
        ignore_index: samples with this class number are not counted.

    Returns:
        A number in [0, 1]; nan if no sample counts.

    Raises:
        ShapeError: target does not fit the logits.
        OptxError: logits are not floating, or target is not of an integer dtype.
        IndexError: a class number is out of range.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[20.0, 0.0, 0.0], [2.0, 0.0, 0.0]])
        >>> softmax_collapse(logits, torch.tensor([0, 0]))
        0.5
    """
    class_dim = 0 if logits.ndim == 1 else 1
    _check_samples(logits, target, class_dim)
    counts = target != ignore_index
    label = torch.where(counts, target, 0).to(torch.int64)
    if bool(((label < 0) | (label >= logits.shape[class_dim])).any()):
        raise IndexError(
            f"softmax_collapse: target has class numbers from {int(label.min())} to {int(label.max())}; with "
            f"{logits.shape[class_dim]} classes they must be in 0..{logits.shape[class_dim] - 1}, or "
            f"ignore_index={ignore_index}."
        )
    with torch.no_grad():
        # out of autocast: it would compute exp and sum in float32
        with torch.autocast(logits.device.type, enabled=False):
            z = logits.detach()
            terms = (z - z.amax(class_dim, keepdim=True)).exp_()
            own = terms.gather(class_dim, label.unsqueeze(class_dim)).squeeze(class_dim)
            collapsed = (terms.sum(class_dim) == own) & counts
        return float(collapsed.sum() / counts.sum())


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

    Raises:
        OptxError: no parameter has a gradient.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> layer.weight.data = torch.tensor([[3.0, 4.0]])
        >>> layer.weight.grad = torch.tensor([[-3.0, -4.0]])
        >>> nlm_alignment(layer)
        {'weight': 1.0}
    """
    with torch.no_grad():
        found = {
            name: _cosine(p.detach(), -p.grad) for name, p in model.named_parameters() if p.grad is not None
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
        found = [(path, _norm(grad)) for path, grad in gradients if grad is not None]
        if not found:
            raise OptxError(
                "grad_norms: nothing that was attached has a gradient; call it after loss.backward() and "
                "before optimizer.zero_grad()."
            )
        values = torch.stack([norm.to(found[0][1].device) for _, norm in found]).cpu()
    norms: dict[str, list[float]] = {path: [] for path, _ in handle.model.named_modules()}
    for (path, _), value in zip(found, values, strict=True):
        norms[path].append(float(value))
    return {path: math.hypot(*some) for path, some in norms.items() if some}


def _norm(x: Tensor) -> Tensor:
    """L2 norm; a scalar, float32 or 64. Squares of small numbers don't underflow."""
    unit, scale = _unit_scale(x)
    return scale * _whole(unit.square().sum()).sqrt()


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of the angle between two tensors seen as vectors; 0 if either is 0. A scalar, float32 or 64."""
    (a, _), (b, _) = _unit_scale(a), _unit_scale(b)
    dot, aa, bb = (_whole((x * y).sum()) for x, y in ((a, b), (a, a), (b, b)))
    norm = aa.sqrt() * bb.sqrt()
    return torch.where(norm == 0, torch.zeros_like(dot), (dot / norm).clamp(-1.0, 1.0))


def _unit_scale(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` over its largest magnitude, and that magnitude, in float32 or wider.

    Squares of collapsed gradients (1e-25) would underflow.
    """
    if x.layout != torch.strided:
        x = x.to_dense()
    if x.is_complex():
        x = torch.view_as_real(x)
    if x.numel() == 0:
        return torch.zeros((), device=x.device), torch.zeros((), device=x.device)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    largest = _whole(x.abs().amax())
    return x / torch.where(largest == 0, torch.ones_like(largest), largest), largest


def _whole(x: Tensor) -> Tensor:
    """A reduction over a sharded tensor (DTensor), completed over its mesh; other tensors as they are."""
    full = getattr(cast(Any, x), "full_tensor", None)
    return x if full is None else full()


def _check_samples(logits: Tensor, target: Tensor, class_dim: int) -> None:
    if not logits.is_floating_point() or logits.ndim == 0 or logits.shape[class_dim] == 0:
        raise OptxError(
            f"softmax_collapse: logits have shape {tuple(logits.shape)} and dtype {logits.dtype}; they must "
            "be floating, of shape (C,), (N, C) or (N, C, d1, ...), with at least one class."
        )
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise OptxError(
            f"softmax_collapse: target has dtype {target.dtype}; it must hold class numbers, of an integer "
            "dtype."
        )
    wanted = logits.shape[:class_dim] + logits.shape[class_dim + 1 :]
    if target.shape != wanted:
        raise ShapeError(
            f"softmax_collapse: target has shape {tuple(target.shape)}; for logits of shape "
            f"{tuple(logits.shape)} it must be {tuple(wanted)}."
        )
