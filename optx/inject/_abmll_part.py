"""What ABMLL adds to one linear module: normal weights beside its own, drawn anew at every call of a task.

Source: ABMLL, arXiv 2508.14285, section 3. Outputs are drawn and not weights (local reparameterisation,
arXiv 1506.02557, section 2.3): the same distribution of each output, with less noise in the gradient.
"""

# A and B are LoRA's letters.
# pyright: reportConstantRedefinition=false

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optx._errors import OptxError, TargetError, warn
from optx.inject._abmll_terms import FLOOR, Factors, output_deviation
from optx.inject._computes import weight_now
from optx.inject._metrics import product_sq
from optx.inject._part import Part, Weights, hidden_of, new_tensor
from optx.inject._weights import add_product, features, in_sum_precision, is_transposed


class Shared:
    """What the parts of one handle compute with now.

    Attributes:
        phi: a task's factors by path; None: outside of a task.
        adapting: whether these are learning; else what learns by them is theta.
        sampling: whether weights are drawn; else they are the means.
        folds_phi: whether a merge takes the task's means.
        called: whether a served module was called since a task began, or since it was asked last.
    """

    MANY = 256
    """Calls of served modules, in training and outside of any task, after which there is a word about it."""

    def __init__(self) -> None:
        self.phi: Mapping[str, Factors] | None = None
        self.adapting = self.sampling = self.folds_phi = self.called = False
        self.outside = 0  # such calls since the last task; -1: it has been told
        self.left = False  # whether the last call was a task's

    def __getstate__(self) -> dict[str, Any]:
        """For a copy of the model, which is in no task."""
        return {**Shared().__dict__, "outside": self.outside}

    def look(self, training: bool) -> None:
        """Note a call.

        Raises:
            OptxError: activation checkpointing makes it again where the task that it was in is over.
        """
        if self.phi is not None:
            self.called = True
        if torch.compiler.is_compiling():
            return
        again = torch._C._current_graph_task_id() != -1  # pyright: ignore[reportPrivateUsage]
        if again and self.left and self.phi is None:
            raise OptxError(
                "ABMLL: backward computes the model again (activation checkpointing) outside of the task "
                "that it was computed in, whose weights are gone. Call t.outer(loss).backward() within "
                "`with ab.task() as t:`."
            )
        if not again:
            self.left = self.phi is not None
            self._stray(training)

    def _stray(self, training: bool) -> None:
        if self.phi is not None:
            self.outside = min(self.outside, 0)
        elif training and self.outside >= 0 and torch.is_grad_enabled():
            self.outside += 1
            if self.outside == self.MANY:
                self.outside = -1
                warn(
                    f"ABMLL: served modules have been called {self.MANY} times in training mode outside of "
                    "any task, where weights are their means: those are trained as a LoRA, deviations are "
                    "not. Train within `with ab.task() as t:`, by t.adapt(...) and t.outer(loss).backward()."
                )


class _At(torch.autograd.Function):
    """phi's value, theta's gradient: the steps between them count as the identity (first order)."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, phi: Tensor) -> Tensor:
        return phi.view_as(phi)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad, None


class NormalLoRA(Part):
    """y + B_mean A_mean x, and in a task noise of the deviation that normal weights have in the output.

    A_mean and A_std: (rank, in); B_mean and B_std: (out, rank); c: the deviation of weights at the start. The
    first part of a handle also has how many tasks there were, which the model's state is to have.
    """

    def __init__(self, options: Any, module: nn.Module, path: str, shared: Shared) -> None:
        super().__init__()
        into, out = features(module)
        rank = options.rank
        if rank > min(into, out):
            raise TargetError(
                f"attach: ABMLL's rank={rank} is larger than the weight of {path!r}, ({out}, {into}). Use at "
                f"most {min(into, out)}."
            )
        self.path, self.shared, self.kind = path, shared, options.sigma_param
        self.rank, self.transposed = rank, is_transposed(module)
        self.A_mean, self.A_std = (nn.Parameter(new_tensor(module, rank, into)) for _ in range(2))
        self.B_mean, self.B_std = (nn.Parameter(new_tensor(module, out, rank)) for _ in range(2))
        for A in (self.A_mean, self.A_std):
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        self.c: Tensor
        self.register_buffer("c", self._deviation(options.c, module, path))

    def _deviation(self, c: float | None, module: nn.Module, path: str) -> Tensor:
        """The deviation at the start, as given or 1 % of that of the module's own weights."""
        dtype = torch.promote_types(self.A_mean.dtype, torch.float32)
        if c is not None:
            return torch.full((), c, dtype=dtype, device=self.A_mean.device)
        own = 0.01 * in_sum_precision(weight_now(module, path).detach()).std().to(self.A_mean.device, dtype)
        least = FLOOR if self.kind == "abs" else 0.0
        if not own.is_meta and not (own > least and own.isfinite()):
            raise TargetError(
                f"attach: ABMLL's c is 1 % of the deviation of {path}.weight, {float(own):.3g}; it must be "
                f"finite and above {least:g}. Pass optx.ABMLL(c=1e-3), or leave this module out of targets."
            )
        return own

    def count_tasks(self) -> None:
        """Be the one that has their number."""
        self.tasks_begun: Tensor
        count = torch.zeros((), dtype=torch.int64, device=self.A_mean.device)
        self.register_buffer("tasks_begun", count)

    def tensors(self) -> dict[str, Tensor]:
        """The factors and c: how many tasks there were is the run's, and no adapter's."""
        return {name: t for name, t in super().tensors().items() if name != "tasks_begun"}

    def theta(self) -> Factors:
        """What is registered and trained."""
        return Factors(self.A_mean, self.B_mean, self.A_std, self.B_std)

    def factors(self) -> Factors:
        """What is computed with: the task's, which hand their gradients on to theta once it has adapted."""
        phi, theta = self.shared.phi, self.theta()
        if phi is None:
            return theta
        own = phi[self.path]
        if self.shared.adapting or not torch.is_grad_enabled():
            return own
        return Factors(*(_At.apply(t, p) for t, p in zip(theta, own, strict=True)))  # pyright: ignore

    def after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        """Add the mean update, and noise where weights are drawn."""
        self.shared.look(self.training)
        x, factors = hidden_of(args, kwargs), self.factors()
        low = F.linear(x, factors.A_mean.to(output.dtype))
        output = add_product(output, low, factors.B_mean.to(output.dtype), owned=self.owns(module))
        if not self.shared.sampling:
            return output
        std = output_deviation(x, factors, self.c, self.kind)
        return output + (std * torch.randn_like(std)).to(output.dtype)

    @property
    def adds(self) -> bool:
        """Whether all it does is add something that depends on the module's input."""
        return True

    def _mean(self) -> Factors:
        """Of the factors whose means are to be written: theta's, or the task's."""
        phi = self.shared.phi
        return phi[self.path] if self.shared.folds_phi and phi is not None else self.theta()

    def fold(self, module: nn.Module, now: Weights, base: Weights) -> Weights:
        """W + B_mean A_mean; deviations have no equal in weights."""
        A, B = (t.to(now.weight.dtype) for t in self._mean()[:2])
        product = B @ A
        return Weights(now.weight + (product.t() if self.transposed else product), now.bias)

    def as_lora(self) -> tuple[Tensor, Tensor, float]:
        """A, B and scale of the means."""
        return self.A_mean, self.B_mean, 1.0

    def change_sq(self) -> Tensor:
        """|B_mean A_mean|^2."""
        return product_sq(self.A_mean, self.B_mean, 1.0)

    def note(self) -> str:
        """Rank and the deviation at the start."""
        return f"rank {self.rank}, c {'unknown' if self.c.is_meta else f'{float(self.c):.3g}'}"
