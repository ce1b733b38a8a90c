"""A layer whose weights respond to hyperparameters: a second set of weights, gated for each example.

Source: STN, arXiv 1903.03088, section 3.1 and appendix; the scale c is of the official code alone. Delta-STN,
arXiv 2010.13514, section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optx._errors import OptxError, warn
from optx._names import is_dtensor
from optx.inject._computes import weight_of
from optx.inject._draw import ORDER
from optx.inject._hparams import HParams
from optx.inject._part import Part, Weights, hidden_of, new_tensor
from optx.inject._served import Served
from optx.inject._weights import conv_like, is_transposed, shape_of


class BestResponse(Part):
    """c (W x + b) + s_w * (W_h x) + s_b * b_h, where [s_w | s_b] = V gate, for each example.

    V: (2 out, H), or (out, H) where there is no bias; W_h and b_h: as the module's weight and bias; c: one
    number. The module computes W x + b itself, with its own weights.
    """

    def __init__(
        self, module: nn.Module, path: str, hparams: HParams, *, centred: bool, scaled: bool
    ) -> None:
        super().__init__()
        self.path, self.hparams, self.centred = path, hparams, centred
        self.transposed, shape = is_transposed(module), shape_of(module)
        self.kernel = len(shape) - 2
        self.out: int = shape[1] if self.transposed else shape[0]
        biased = getattr(module, "bias", None) is not None
        self.V = nn.Parameter(new_tensor(module, self.out * (1 + biased), len(hparams)))
        self.W_h = nn.Parameter(new_tensor(module, *shape))
        self.b_h = nn.Parameter(new_tensor(module, self.out)) if biased else None
        self.c = nn.Parameter(new_tensor(module) + 1) if scaled else None
        bound = (self.W_h.numel() / max(self.out, 1)) ** -0.5  # as torch starts W: U(+-1 / sqrt(fan_in))
        with torch.no_grad():
            for p in (self.W_h, self.b_h):
                _ = p if p is None else p.uniform_(-bound, bound)
            if not centred:
                self.V.normal_(std=0.01)

    def after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        """Add the response to what the module computed; summed in the wider precision, rounded once."""
        if module.training and self.hparams.draw is None:
            self.hparams.calls.stray()
        gate = self.hparams.gate(self.centred)
        if gate is None:
            return None if self.c is None else (output * self.c).to(output.dtype)
        x = hidden_of(args, kwargs)
        axis = self.axis_in(x)
        s_w, s_b = self.gated(gate, x.device)
        total = output if self.c is None else output * self.c
        total = total + self.along(s_w, x, axis) * self.response(module, x)
        if s_b is not None and self.b_h is not None:
            total = total + self.along(s_b * self.b_h, x, axis)
        return total.to(output.dtype)

    def gated(self, gate: Tensor, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """s_w and s_b, (B, out) or (1, out); autocast would round the hyperparameters."""
        with torch.autocast(device.type, enabled=False):
            s = F.linear(gate.to(self.V), self.V)
        return s[:, : self.out], s[:, self.out :] if self.b_h is not None else None

    def response(self, module: nn.Module, x: Tensor) -> Tensor:
        """W_h x, as the module computes W x."""
        W = self.W_h.to(x.dtype)
        if self.kernel:
            return conv_like(module, x, W, module.groups)  # pyright: ignore[reportArgumentType]
        return F.linear(x, W.t() if self.transposed else W)

    def along(self, s: Tensor, x: Tensor, axis: int) -> Tensor:
        """(B, out) as it is multiplied with the output of x: channels first in convolutions, else last."""
        if self.kernel:
            ones = (1,) * self.kernel
            return s.view(len(s), -1, *ones) if x.ndim == self.kernel + 2 else s.view(-1, *ones)
        if x.ndim == 1:
            return s.view(-1)
        return s.view(*(1,) * axis, len(s), *(1,) * (x.ndim - 2 - axis), -1)

    def axis_in(self, x: Tensor) -> int:
        """The axis of the batch's examples; raise unless there is one with a row for each."""
        rows = self.hparams.rows
        batched = x.ndim == self.kernel + 2 if self.kernel else x.ndim > 1
        axis = 0 if self.kernel else self.hparams.axis(x, repr(self.path))
        if rows is not None and not (batched and x.shape[axis] == rows):
            raise OptxError(
                f"STN: the input of {self.path!r} has shape {tuple(x.shape)}, and the batch has {rows} "
                f"examples, each with hyperparameters of its own, along the {ORDER[axis]} axis. Leave this "
                "module out of targets, or give all examples the same with optx.STN(..., shared=True)."
            )
        return axis

    @property
    def adds(self) -> bool:
        """Whether all it does is add: unless c scales what was there."""
        return self.c is None

    def fold(self, module: nn.Module, now: Weights, base: Weights) -> Weights:
        """W = c W + diag(s_w) W_h and b = c b + s_b * b_h, at the values in force."""
        c = 1 if self.c is None else self.c.to(now.weight)
        weight, bias = now.weight * c, None if now.bias is None else now.bias * c
        gate = self.hparams.gate(self.centred)
        if gate is None:
            return Weights(weight, bias)
        s_w, s_b = self.gated(gate, now.weight.device)
        weight = weight + self.rows(s_w).to(weight) * self.W_h.to(weight)
        if bias is not None and s_b is not None and self.b_h is not None:
            bias = bias + (s_b[0] * self.b_h).to(bias)
        return Weights(weight, bias)

    def rows(self, s: Tensor) -> Tensor:
        """(1, out) as it is multiplied with a weight."""
        return s.view(-1) if self.transposed else s.view(-1, 1, *(1,) * self.kernel)

    def squares(self, module: nn.Module) -> Tensor:
        """Squared norms of the weights that examples are computed with, (B,) or (1,); none is formed."""
        matrices = (weight_of(module, self.path).to(self.W_h), self.W_h)
        W, W_h = (w if self.transposed else w.flatten(1).t() for w in matrices)  # (in, out)
        c = 1 if self.c is None else self.c
        own = (W.square().sum(0) * c**2)[None]
        gate = self.hparams.gate(self.centred)
        if gate is None:
            return own.sum(1)
        s_w, _ = self.gated(gate, W.device)
        return (own + 2 * c * s_w * (W * W_h).sum(0) + s_w.square() * W_h.square().sum(0)).sum(1)

    def note(self) -> str:
        """How many hyperparameters it responds to."""
        return f"responds to {', '.join(self.hparams)}"


class Gates:
    """What V and W were when training began, to tell who has an optimizer that does not know of one."""

    ENOUGH = 32
    """Training batches after which an optimizer must have stepped, whatever it accumulates."""

    def __init__(self, served: Sequence[Served]) -> None:
        parts = [(one.part, one.module) for one in served if isinstance(one.part, BestResponse)]
        self.known = [(part, part.V.detach().clone()) for part, _ in parts]
        own = [W for _, module in parts if isinstance(W := getattr(module, "weight", None), nn.Parameter)]
        self.own = [(W, _some(W)) for W in own if not is_dtensor(W) and W.numel()]

    def check(self, batches: int) -> None:
        """Warn, once, if after so many training batches no response has changed."""
        if batches < self.ENOUGH or not self.known:
            return
        moved = (is_dtensor(part.V) or not torch.equal(part.V, V.to(part.V)) for part, V in self.known)
        if not any(moved):
            warn(
                f"STN: in {batches} training batches nothing has changed how weights respond, so the "
                "hyperparameters follow a response that is not learnt. Make the optimizer from "
                "model.parameters() after optx.attach()."
            )
        trained = [(W, before) for W, before in self.own if W.requires_grad and W.numel()]
        if trained and all(torch.equal(_some(W), before.to(W)) for W, before in trained):
            warn(
                f"STN: in {batches} training batches no weight of a served module has changed. Make the "
                "optimizer from model.parameters(): handle.parameters() are the responses alone. Of a base "
                "that is to stay, say so by requires_grad_(False)."
            )
        self.known, self.own = [], []


def _some(W: Tensor) -> Tensor:
    """A few of its numbers, from all over."""
    return W.detach().flatten()[:: max(1, W.numel() // 256)].clone()
