"""An implicit network, in the form in which its Lipschitz constant can be bounded.

Source: El Ghaoui, Gu, Travacca, Askari, Tsai, "Implicit deep learning", SIAM J. Math. Data Sci. 2021, arXiv
1908.06315; the bound: arXiv 2401.14033, section 5.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from optx._errors import OptxError, ShapeError


class Implicit(nn.Module):
    """y = C z with z = phi(W z + U x + b): a layer of any depth, whose output is a fixed point.

    What `optx.analysis.lipschitz` reads; it also computes, by Newton steps, with gradients of the fixed
    point by the implicit function theorem. A network of your own that finds its fixed point in another way
    is bounded as well if its class has a method ``lipschitz_form()`` that returns this, of its weights.

    Args:
        W: (n, n).
        U: (n, inputs).
        C: (outputs, n).
        b: (n,); None: zeros.
        activation: an elementwise module; None: ReLU.

    Paper values:
        None to set.

    Limits: That there is one fixed point for each input is not checked here; where `optx.analysis.lipschitz`
        bounds it, there is.

    Keywords: deep equilibrium, DEQ, implicit layer, fixed point, monotone operator.

    Evidence: ``test_lipschitz_forms.py``; no recipe.

    Source: arXiv 1908.06315, equation 1.1.

    Raises:
        ShapeError: shapes that do not fit.
        OptxError: Newton's method finds no fixed point.

    Example:
        >>> import torch, optx
        >>> net = optx.Implicit(torch.tensor([[0.5]]), torch.tensor([[1.0]]), torch.tensor([[1.0]]))
        >>> net(torch.tensor([[3.0]])), round(optx.analysis.lipschitz(net, 1).bound, 3)
        (tensor([[6.]], grad_fn=<MmBackward0>), 2.0)
    """

    def __init__(
        self, W: Tensor, U: Tensor, C: Tensor, b: Tensor | None = None, activation: nn.Module | None = None
    ) -> None:
        super().__init__()
        n = len(W)
        b = W.new_zeros(n) if b is None else b
        shapes = {"W": (W, (n, n)), "U": (U, (n, *U.shape[1:2])), "C": (C, (*C.shape[:1], n)), "b": (b, (n,))}
        for name, (given, wanted) in shapes.items():
            if tuple(given.shape) != wanted or given.ndim != len(wanted):
                raise ShapeError(
                    f"Implicit: {name} has shape {tuple(given.shape)}; of {n} units it must be {wanted}."
                )
        self.W, self.U, self.C, self.b = (_kept(one) for one in (W, U, C, b))
        self.activation = nn.ReLU() if activation is None else activation

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of ``x`` (B, inputs)."""
        drive = x @ self.U.T + self.b
        with torch.no_grad():
            z = self._fixed_point(drive)
        # One step from the fixed point moves nothing, and has its gradient.
        _, step = self._newton(z, drive)
        return (z + step) @ self.C.T

    def _fixed_point(self, drive: Tensor) -> Tensor:
        z = torch.zeros_like(drive)
        left = float("inf")
        for _ in range(100):
            gap, step = self._newton(z, drive)
            size = gap.abs().amax(1)
            left = float((size / (1 + z.abs().amax(1))).max()) if len(size) else 0.0
            if left <= 8 * torch.finfo(z.dtype).eps:
                return z
            z = self._nearer(z, drive, step, size)
        raise OptxError(f"Implicit: no fixed point was found in 100 Newton steps; {left:.2g} is left.")

    def _newton(self, z: Tensor, drive: Tensor) -> tuple[Tensor, Tensor]:
        """How far z is from its image, and the step to where a linear phi would have its fixed point."""
        given = z.detach() @ self.W.T + drive
        with torch.enable_grad():
            at = given.detach().requires_grad_()
            (slopes,) = torch.autograd.grad(self.activation(at).sum(), at)
        gap = self.activation(given) - z
        eye = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
        return gap, torch.linalg.solve(eye - slopes[:, :, None] * self.W, gap[:, :, None])[:, :, 0]

    def _nearer(self, z: Tensor, drive: Tensor, step: Tensor, size: Tensor) -> Tensor:
        """Each row as far along its step as brings it nearer: the whole way, or a half, a quarter ..."""
        share = torch.ones_like(size)
        for _ in range(20):
            new = z + share[:, None] * step
            worse = (self.activation(new @ self.W.T + drive) - new).abs().amax(1) > (1 - share / 4) * size
            if not bool(worse.any()):
                break
            share = torch.where(worse, share / 2, share)
        return z + share[:, None] * step


def _kept(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)
