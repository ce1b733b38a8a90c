"""What `optx.SphericalHead` adds to an output head: its weight in factors, and the loss that steps them.

Source: arXiv 1412.7091 and arXiv 1604.08859; the arithmetic is in ``_spherical_factors.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from optx._errors import OptxError, warn
from optx._names import RESERVED
from optx._spherical import SphericalLoss
from optx.inject._part import Part, hidden_of
from optx.inject._spherical_factors import Batch, Factors, Pending, Sums, joined, pieces_of
from optx.inject._spherical_input import HandedOn

_PATIENCE = 32  # backward passes without a step, after which there is a word about it
_SCALED = 4096.0  # a loss that was multiplied by more than this was multiplied by a GradScaler
_DRIFT = (
    1.0  # how far U's singular values may have moved (a difference of logarithms) before they are looked at
)


class FactoredHead(Part):
    """The head's weight (and its bias, as the weight of a constant 1) as V U + 1 omega^T.

    Attributes:
        V: float32 (float64 for a head in float64), (D, d).
        U: float64 (d, d), as are ``inverse`` and ``Q``, W^T W.
        omega: float64 (d,), as is ``columns``, W^T 1.
        count: int64, steps taken.
        drift: float64, see `Factors.step`.
        pending: backward passes that are not stepped by yet.
    """

    alone: ClassVar[bool] = True

    V: Tensor
    U: Tensor
    inverse: Tensor
    omega: Tensor
    Q: Tensor
    columns: Tensor
    count: Tensor
    drift: Tensor

    def __init__(self, module: nn.Linear, path: str, loss: SphericalLoss) -> None:
        super().__init__()
        bias: Any = module.bias
        self.path, self.bias, self.width = path, bias is not None, module.in_features
        self.__dict__["_loss"] = loss  # no submodule: it has no tensors, and may be another's
        self.pending: list[Pending] = []
        self._waiting = self._told = False
        d = self.width + self.bias
        wide: dict[str, Any] = {"dtype": torch.float64, "device": module.weight.device}
        kind = torch.float64 if module.weight.dtype == torch.float64 else torch.float32
        self.register_buffer("V", module.weight.new_empty(module.out_features, d, dtype=kind))
        for name in ("U", "inverse", "Q"):
            self.register_buffer(name, torch.eye(d, **wide))
        for name in ("omega", "columns"):
            self.register_buffer(name, torch.zeros(d, **wide))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64, device=module.weight.device))
        self.register_buffer("drift", torch.zeros((), **wide))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "pending": [], "_waiting": False}  # a copy has computed nothing

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> FactoredHead:
        for name, tensor in self._buffers.items():
            assert tensor is not None
            moved = fn(tensor)  # to another device, but in the precision that its numbers need
            self._buffers[name] = moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
        return self

    @property
    def factors(self) -> Factors:
        """The six of them."""
        return Factors(self.V, self.U, self.inverse, self.omega, self.Q, self.columns)

    @property
    def loss(self) -> SphericalLoss:
        """What it is trained by."""
        return self.__dict__["_loss"]

    @property
    def classes(self) -> int:
        """D."""
        return len(self.V)

    def retired(self, module: nn.Module) -> list[nn.Parameter]:
        """The module's own weight and bias."""
        return list(module.parameters(recurse=False))

    def note(self) -> str:
        """Its size."""
        return f"{self.classes:,} classes of width {self.width}, in factors"

    # ---- the module's own tensors ---------------------------------------------------------------------

    @torch.no_grad()
    def fill(self, weight: Tensor, bias: Tensor | None) -> None:
        """Take a plain weight over."""
        self.V[:, : self.width].copy_(weight)
        if bias is not None:
            self.V[:, self.width].copy_(bias)
        factors = self.factors
        factors.U.copy_(torch.eye(len(self.U)))
        factors.inverse.copy_(factors.U)
        factors.omega.zero_()
        factors.recompute()
        self.drift.zero_()
        self.pending = []

    @torch.no_grad()
    def plain(self, like: torch.dtype) -> dict[str, Tensor]:
        """Weight and bias, as a plain module has them."""
        whole = torch.empty(self.V.shape, dtype=like, device=self.V.device)
        for piece, own in zip(pieces_of(whole), self.factors.pieces(), strict=True):
            piece.copy_(own)
        found = {"weight": whole[:, : self.width].contiguous()}
        return {**found, "bias": whole[:, self.width].contiguous()} if self.bias else found

    # ---- the call -------------------------------------------------------------------------------------

    def around(
        self, call: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """In training the module's input, for the handle's loss; else the outputs of all classes."""
        x = hidden_of(args, kwargs)
        if self.training and torch.is_grad_enabled():
            if not torch.compiler.is_compiling():
                self._look()
            return HandedOn.of(x)
        flat = self.augmented(x.reshape(-1, x.shape[-1]), x.dtype)
        return self.factors.outputs(flat).view(*x.shape[:-1], self.classes)

    def _look(self) -> None:
        if torch._C._current_graph_task_id() != -1:  # pyright: ignore[reportPrivateUsage]
            return  # computed again by a checkpoint
        if self._waiting and not self._told:
            self._told = True
            warn(
                f"SphericalHead: in training mode {self.path!r} hands on its input, for handle.loss(output, "
                "labels) to make the loss of, and the last forward's was not used. Another loss of it means "
                "nothing, and the head does not learn."
            )
        self._waiting = True

    def augmented(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of inputs, with a 1 for the bias."""
        x = x.to(dtype)
        return torch.cat([x, x.new_ones(len(x), 1)], 1) if self.bias else x

    # ---- loss and step --------------------------------------------------------------------------------

    def losses(self, x: Tensor, labels: Tensor) -> Tensor:
        """The loss of each row of inputs; their backward pass leaves what `step` needs.

        Args:
            x: (m, width).
            labels: int64 (m,), in range.
        """
        self._waiting = False
        anchor = torch.zeros((), requires_grad=True, device=x.device)  # the inputs may need no gradient
        return cast(Tensor, _HeadLoss.apply(x, anchor, labels, self))  # pyright: ignore[reportUnknownMemberType]

    def forward_sums(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Batch, Sums]:
        """Losses of rows, and the derivatives of each by its own three sums.

        Raises:
            OptxError: a sum is not finite.
        """
        X = self.augmented(x, torch.float64)
        batch, sums = self.factors.forward(X, labels)
        D = self.classes
        mean = sums.total / D
        variance, above = sums.squares / D - mean.square(), sums.target - mean
        floor = 64 * torch.finfo(X.dtype).eps * mean.square()  # what the subtraction leaves of equal outputs
        found = self.loss.slopes(mean, variance, above, D, floor)
        if not bool(found.losses.isfinite().all()):
            self._tell_of_overflow(sums, found.losses)
        squares = found.by_variance / D
        total = (found.by_mean - found.by_above) / D - 2 * mean * squares
        return found.losses, batch, Sums(total, squares, found.by_above)

    def _tell_of_overflow(self, sums: Sums, losses: Tensor) -> None:
        row = int((~losses.isfinite()).nonzero()[0])
        raise OptxError(
            f"SphericalHead: the loss of example {row} is {float(losses[row])}: the squares of its outputs "
            f"add up to {float(sums.squares[row])}. Its input is not finite, or the weights' scale has "
            "overflowed: lower lr, or add weight_decay, which holds the scale."
        )

    @torch.no_grad()
    def step(self, lr: float, options: Any) -> None:
        """One step of SGD by all that is pending.

        Raises:
            OptxError: a number has overflowed; nothing is changed.
        """
        if not self.pending:
            return
        moved = self.factors.step(joined(self.pending), lr, options.weight_decay)
        self.pending = []
        self.count += 1
        self.drift += moved
        count = int(self.count)
        if count % options.stabilize_every == 0 or float(self.drift) > _DRIFT:
            self.factors.stabilise()
            self.drift.zero_()
        if count % options.recompute_every == 0:
            self.factors.recompute()

    def keep(self, pending: Pending) -> None:
        """Add a backward pass to what the next step is made of."""
        self.pending.append(pending)
        if len(self.pending) == _PATIENCE and not self._told:
            self._told = True
            warn(
                f"SphericalHead: {_PATIENCE} backward passes and no step: {self.path!r} does not learn. Use "
                "optx.wrap(optimizer, handle), or call handle.step() after each optimizer.step()."
            )


class _HeadLoss(torch.autograd.Function):
    """Rows of inputs to rows of loss; ``anchor`` is a number that needs a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, labels: Tensor, part: FactoredHead) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        losses, batch, grads = part.forward_sums(x, labels)
        ctx.part, ctx.batch, ctx.grads, ctx.dtype = part, batch, grads, x.dtype
        ctx.learning, ctx.count = part.training, int(part.count)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        part: FactoredHead = ctx.part
        if int(part.count) != ctx.count:
            raise OptxError(
                f"SphericalHead: {part.path!r} was stepped between this loss and its backward pass, so the "
                "weights that it was computed with are gone. Call backward() before the step."
            )
        _check_scale(part.loss, grad)
        grads = Sums(*(each * grad for each in ctx.grads))
        if ctx.learning:
            part.keep(Pending(ctx.batch, grads))
        found = part.factors.input_grad(ctx.batch, grads)[:, : part.width].to(ctx.dtype)
        return found, None, None, None


def _check_scale(loss: SphericalLoss, grad: Tensor) -> None:
    if not len(grad):
        return
    size = float(grad.abs().sum() if loss.reduction == "mean" else grad.abs().max())
    if not size <= _SCALED:
        raise OptxError(
            f"SphericalHead: the loss was multiplied by {size:g} before its backward pass. A GradScaler's "
            "scale can't be undone in the head's step: train in bfloat16 or float32, without one."
        )


class Released:
    """A module's own weight and bias, given up until `remove` fills them from the factors.

    The module's keys, and what it saves and loads, stay as they are.
    """

    def __init__(self, part: FactoredHead, module: nn.Linear) -> None:
        self._part, self._own = part, dict(module.named_parameters(recurse=False))
        part.fill(module.weight.detach(), self._own["bias"].detach() if "bias" in self._own else None)
        served: Any = module
        self._hooks = [
            served.register_state_dict_post_hook(partial(_tell, part)),
            served.register_load_state_dict_pre_hook(partial(_take, part)),
        ]
        for p in self._own.values():
            p.data = p.data.new_empty(0)
            p.grad = None

    def remove(self) -> None:
        """A plain weight again: what was trained."""
        for hook in self._hooks:
            hook.remove()
        plain = self._part.plain(self._own["weight"].dtype)
        for name, p in self._own.items():
            p.data = plain[name].to(p.dtype)
        self._part.pending = []


def _tell(part: FactoredHead, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """What a state dict has in the place of the plain tensors."""
    weight: Any = module.weight
    state_dict.update({f"{prefix}{name}": tensor for name, tensor in part.plain(weight.dtype).items()})


def _take(part: FactoredHead, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Factors that are loaded go on bit for bit; a plain checkpoint's weight is factored anew."""
    own = f"{prefix}{RESERVED}.{part.adapter}."
    names = ["weight", "bias"] if part.bias else ["weight"]
    if not all(f"{prefix}{name}" in state_dict for name in names):
        return
    given: dict[str, Tensor] = {name: state_dict[f"{prefix}{name}"] for name in names}
    if given["weight"].shape != (part.classes, part.width):
        return  # torch says which shapes differ
    if f"{own}V" not in state_dict:
        part.fill(given["weight"], given.get("bias"))
    part.pending = []
    for name in names:
        p: Any = getattr(module, name)
        state_dict[f"{prefix}{name}"] = p.data
