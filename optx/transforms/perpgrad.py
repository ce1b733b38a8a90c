"""perpGrad: gradients orthogonal to their own weights.

Source: "Grokking at the Edge of Numerical Stability", arXiv 2501.04697, definition 7, equation 12; the
rescaling to the old norm is the official code's.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from optx._errors import OptxError
from optx._rules import rule
from optx.ops import sqrt, where
from optx.step.transform import Host, Transform


@rule(writes=("wg", "ww"))
def inner_products(w: Any, g: Any) -> Any:
    """Summed: <w, g> and <w, w>."""
    return w * g, w * w


@rule(writes=("coefficient", "scale", "grad_sq", "removed", "given"))
def projection(wg: Any, ww: Any, grad_sq: Any, numel: Any, rescale: Any) -> Any:
    """c = <w, g> / <w, w>, the factor ||g|| / ||g - c w||, and the squared norm of the result.

    And those of what was taken out, and of what there was.
    """
    # A single number has no orthogonal direction: the formula would freeze it at rounding noise.
    c = where(numel > 1.0, wg / (ww + 1e-30), 0.0 * wg)
    left = grad_sq - c * wg
    # Nearly parallel: what is left is rounding error, and rescaling would blow it up to the full norm.
    # 1e-8 is how well the sums are known (optx.kernels.step.emit_cpu).
    # A float64 gradient whose square is infinite is projected, but not rescaled.
    left = where(left - left == 0.0, left, 0.0 * numel)
    usable = left > 1e-8 * grad_sq
    left = where(usable, left, 0.0 * left)
    ratio = sqrt(grad_sq / where(usable, left, 1.0 + 0.0 * left))
    scale = where(usable, rescale * ratio + (1.0 - rescale), 1.0 + 0.0 * left)
    return c, scale, left * scale * scale, c * wg, grad_sq


@rule(writes="g")
def project_out(w: Any, g: Any, coefficient: Any, scale: Any) -> Any:
    """Remove the part of g along w."""
    return (g - coefficient * w) * scale


class PerpGrad(Transform):
    """Remove from every gradient its component along the weight itself (perpGrad).

    g becomes g - (<w, g> / <w, w>) w, with the norm it had.

    Stops "naive loss minimisation", the growth of logits along the weight direction after the training
    set is fitted. Acts per tensor, on the gradient that the base optimizer sees; decoupled weight decay is
    untouched. Two departures from the official code: a one-element tensor is left alone (it would be
    frozen); and a gradient that is parallel to its weight, but for a ten-thousandth of its length or less, is
    not scaled up to its old norm again: that rest is rounding error.

    Source: "Grokking at the Edge of Numerical Stability", arXiv 2501.04697, eq. 12.

    Args:
        rescale: give the projected gradient the norm it had before (the official code); False leaves it
            as projected (the paper's equation).

    Group keys:
        ``perp_grad=False`` leaves a param group out; ``perp_grad_rescale`` overrides ``rescale``.

    Paper values:
        ``rescale=True``: the authors' code (the default). Modular addition, an MLP without biases: AdamW, lr
            0.01 or 0.005, betas (0.9, 0.99), no weight decay, full batch (figures 1 and 6); a transformer: lr
            1e-3.
        ``rescale=False``: definition 7, equation 12.

    Limits: Weight decay that is part of the gradient (`torch.optim.Adam`, SGD) comes after the projection and
    points along the weight again: use AdamW's, or none. Without a fused form of the base, a step is slow on a
    CPU.

    Keywords: ⊥Grad, grokking, overfitting, generalisation, gradient projection, orthogonal gradient, softmax
    collapse.

    Evidence: ``optx run grokking``; ``test_perpgrad.py``, ``test_paper_values.py``.

    Example:
        >>> import torch, optx
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> opt = optx.wrap(torch.optim.SGD([w], lr=1.0), optx.PerpGrad(rescale=False))
        >>> w.grad = torch.tensor([3.0, 1.0])
        >>> opt.step()
        >>> w.detach()  # the step was (2, -1), orthogonal to (1, 2)
        tensor([-1.,  3.])
    """

    name = "perp_grad"
    limits: ClassVar = {"rescale": (0.0, 1.0)}
    rules: ClassVar = {"sums": inner_products, "scalars": projection, "gradient": project_out}

    def __init__(self, rescale: bool = True) -> None:
        if not isinstance(rescale, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise OptxError(f"PerpGrad: rescale is {rescale!r}; it must be True or False.")
        self.options = {"rescale": rescale}

    def metrics(self, optimizer: Host) -> dict[str, float]:
        """Which share of the gradients' norm lay along the weights and was taken out."""
        removed, given = (optimizer.measured.sum(f"{self.name}.{what}") for what in ("removed", "given"))
        if removed is None or not given:
            return {}
        return {"removed": math.sqrt(min(max(removed / given, 0.0), 1.0))}
