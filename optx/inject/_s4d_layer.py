"""S4D as a layer: one diagonal state space per channel, as a long convolution or step by step.

Source: arXiv 2206.11893; state-spaces/s4 for the block around it (GELU, dropout, a gated linear layer).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optx._errors import OptxError, ShapeError, check_choice, check_range, check_whole
from optx.inject._s4d_kernel import (
    DISCS,
    Disc,
    Discrete,
    as_complex,
    convolve,
    discretise,
    kernel,
    last_state,
)
from optx.inject._s4d_start import INITS, Init, spectrum

Output = Literal["glu", "linear", "none"]
OUTPUTS = ("glu", "linear", "none")


class Stepped(NamedTuple):
    """What a call with ``return_state=True`` gives.

    Attributes:
        output: as without it.
        state: complex, (batch, width, d_state / 2), for the next call.
    """

    output: Tensor
    state: Tensor


class S4DLayer(nn.Module):
    """A sequence layer of diagonal state spaces, one per channel: x' = A x + B u, y = 2 Re(C x) + D u.

    In a call it is a convolution as long as the sequence, by FFT; `step` is the same as a recurrence, with a
    state that does not grow. Behind it, as in the authors' block, come GELU, dropout and a gated linear layer
    that mixes the channels; residual and norm are the model's.

    Args:
        width: channels.
        d_state: N, real size of a channel's state: N / 2 conjugate pairs.
        init: of A: ``"legs"``, ``"inv"``, ``"inv2"``, ``"lin"`` (the method's); ``"real"`` (no oscillation)
            and ``"random"`` frequencies, for comparisons. ``"legs"`` brings input weights of its own.
        disc: ``"zoh"`` (zero-order hold) or ``"bilinear"``.
        dt_min: least step that a channel begins with, and
        dt_max: largest; drawn evenly on a logarithmic scale.
        train_B: the input weights are trained too.
        bidirectional: what comes later is seen too, through a C of its own; no states then.
        output: ``"glu"``, ``"linear"``, or ``"none"``: y itself.
        dropout: behind GELU, while training.
        max_lr: the learning rate of dt, A and B at most; `param_groups` gives it to them, without decay.
        transposed: sequences are (batch, width, L), not (batch, L, width).

    dt, A, B, C and D stay float32 (or float64) when the model is cast to a half precision: a step that is
    rounded to three digits is another frequency. Kernel and FFT are in float32 then too, also under autocast,
    and the output has the input's dtype. Under torch.compile its kernel is one operation.

    ``S4D`` puts one in the place of attention, and has the paper's values and what is known of limits.

    Raises:
        OptxError: an option out of range; at a call, a length whose last angle even float64 can't tell.
        ShapeError: at a call, an input, mask or state of another shape.

    Example:
        >>> import torch, optx
        >>> layer = optx.S4DLayer(4, d_state=8)
        >>> u = torch.randn(2, 10, 4)
        >>> y = layer(u)
        >>> state, outputs = layer.initial_state(2), []
        >>> for t in range(10):
        ...     y_t, state = layer.step(u[:, t], state)
        ...     outputs.append(y_t)
        >>> torch.allclose(torch.stack(outputs, 1), y, atol=1e-5)
        True
        >>> opt = torch.optim.AdamW(optx.param_groups(layer, lr=0.01, weight_decay=0.05))
        >>> [(group["lr"], group["weight_decay"]) for group in opt.param_groups]
        [(0.01, 0.05), (0.001, 0.0)]
    """

    B: Tensor
    A_imag: Tensor
    init: Init
    disc: Disc

    def __init__(
        self,
        width: int,
        d_state: int = 64,
        *,
        init: Init = "legs",
        disc: Disc = "zoh",
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        train_B: bool = False,
        bidirectional: bool = False,
        output: Output = "glu",
        dropout: float = 0.0,
        max_lr: float = 1e-3,
        transposed: bool = False,
    ) -> None:
        check_whole("S4DLayer", "width", width, 1)
        check_options("S4DLayer", d_state, init, disc, dt_min, dt_max, output, dropout, max_lr)
        super().__init__()
        self.width, self.d_state, self.init, self.disc = width, d_state, init, disc
        self.bidirectional, self.transposed = bidirectional, transposed
        self.output, self.dropout, self.max_lr = output, dropout, max_lr
        self._begin(dt_min, dt_max, train_B)
        wide = {"glu": 2 * width, "linear": width}.get(output)
        self.out = None if wide is None else nn.Linear(width, wide)

    def _begin(self, dt_min: float, dt_max: float, train_B: bool) -> None:
        modes = self.d_state // 2
        start = spectrum(self.init, self.d_state, self.width)
        low, high = math.log(dt_min), math.log(dt_max)
        self.log_dt = nn.Parameter(torch.rand(self.width) * (high - low) + low)
        decay = start.decay.expand(self.width, modes)
        self.log_A_real = nn.Parameter(decay.log().to(self.log_dt.dtype))
        frequency = start.frequency.expand(self.width, modes).to(self.log_dt.dtype).clone()
        if self.init == "real":
            self.register_buffer("A_imag", frequency)  # not trained, or it would not stay real
        else:
            self.A_imag = nn.Parameter(frequency)
        weight = torch.stack([start.weight, torch.zeros_like(start.weight)], dim=-1).to(self.log_dt.dtype)
        if train_B:
            self.register_parameter("B", nn.Parameter(weight.expand(self.width, modes, 2).clone()))
        else:
            self.register_buffer("B", weight)
        directions = (2,) if self.bidirectional else ()
        # Of unit variance as a complex number.
        self.C = nn.Parameter(torch.randn(*directions, self.width, modes, 2) * 0.5**0.5)
        self.D = nn.Parameter(torch.randn(self.width))

    @property
    def param_options(self) -> Mapping[str, Mapping[str, Any]]:
        """What its parameters ask of an optimizer, for `param_groups`."""
        own = dict(self.named_parameters(recurse=False))
        slow = {"max_lr": self.max_lr, "weight_decay": 0.0}
        return {name: slow for name in ("log_dt", "log_A_real", "A_imag", "B") if name in own}

    def discrete(self, rate: float = 1.0) -> Discrete:
        """A and B of a step, complex128, (width, modes).

        Args:
            rate: of the samples, compared with those that it was trained at: 2 where every second is left.
        """
        return discretise(self.log_dt, self.log_A_real, self.A_imag, self.B, self.disc, rate)

    def kernel(self, length: int, *, rate: float = 1.0) -> Tensor:
        """The convolution's kernel, (width, length); of a bidirectional layer (2, width, length).

        Args:
            length: how far it goes.
            rate: as in `discrete`.
        """
        return self._kernel(self.discrete(rate), length, self._wide(self.C))

    def forward(
        self,
        u: Tensor,
        *,
        mask: Tensor | None = None,
        state: Tensor | None = None,
        return_state: bool = False,
    ) -> Any:
        """The layer's output for whole sequences.

        Args:
            u: (batch, L, width), or (L, width); with ``transposed`` width before L.
            mask: bool, (batch, L), True where a sequence has a token: others leave no trace, in front or
                behind. None: all. Not with ``state``: padding would stand within a sequence.
            state: of an earlier part of the sequences, as `initial_state` and calls give them.
            return_state: give the state behind the last token of each sequence too.

        Returns:
            As ``u``; or a `Stepped` of output and state.
        """
        x = self._channels_first(u)
        if self.bidirectional and (state is not None or return_state):
            raise OptxError(
                "S4DLayer: a bidirectional layer has no state to go on from, as it needs what is still to "
                "come. Make it with bidirectional=False."
            )
        if mask is not None:
            if state is not None:
                raise OptxError(
                    "S4DLayer: mask and state were both given, and padding would stand within a sequence. "
                    "Pass the mask with the first part alone."
                )
            x = x.masked_fill(~self._real(mask, x), 0)
        with torch.autocast(u.device.type, enabled=False):
            y = self._mixed(x.to(self._wide(u)), state)
        y = self._leave(y.mT.to(u.dtype))
        y = y.mT if self.transposed else y
        return Stepped(y, self.state_after(u, mask=mask, state=state)) if return_state else y

    def state_after(self, u: Tensor, *, mask: Tensor | None = None, state: Tensor | None = None) -> Tensor:
        """The state behind the last token of each sequence, alone.

        Args:
            u: as in a call, and
            mask: so, and
            state: so.
        """
        x = self._channels_first(u)
        if mask is not None:
            x = _ending_together(x.masked_fill(~self._real(mask, x), 0), mask)
        if state is not None:
            self._check_state(state, x.shape[:-1])
        with torch.autocast(u.device.type, enabled=False):
            return last_state(self.discrete(), x.to(self._wide(u)), state)

    def _mixed(self, x: Tensor, state: Tensor | None) -> Tensor:
        """The state spaces themselves: (..., width, L) in float32 or float64."""
        length = x.shape[-1]
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            from optx.inject._s4d_ops import kernel_in_graph

            weights = (self.log_dt, self.log_A_real, self.A_imag, self.B, self.C)
            kernels = kernel_in_graph(weights, self.disc, length, x.dtype)
        else:
            kernels = self._kernel(self.discrete(), length, x.dtype)
        one_way, back = (kernels[0], kernels[1]) if self.bidirectional else (kernels, None)
        y = convolve(x, one_way, back) + self.D.to(x.dtype).unsqueeze(-1) * x
        if state is None:
            return y
        self._check_state(state, x.shape[:-1])
        discrete = self.discrete()
        return y + kernel(discrete, as_complex(self.C) * discrete.A * state, length, x.dtype)

    def _kernel(self, discrete: Discrete, length: int, dtype: torch.dtype) -> Tensor:
        return kernel(discrete, as_complex(self.C) * discrete.B, length, dtype)

    def step(self, u: Tensor, state: Tensor) -> Stepped:
        """One token of each sequence, with what was before it in ``state``.

        Args:
            u: (batch, width), or (width,).
            state: of `initial_state`, a call or a step.

        Returns:
            The output, as ``u``, and the new state.
        """
        if self.bidirectional:
            raise OptxError(
                "S4DLayer: a bidirectional layer can't go step by step, as it needs what is still to come. "
                "Make it with bidirectional=False."
            )
        if u.shape[-1] != self.width or u.ndim not in (1, 2):
            raise ShapeError(
                f"S4DLayer.step: u has shape {tuple(u.shape)}; it must be (batch, {self.width}), one token."
            )
        self._check_state(state, u.shape)
        wide = self._wide(u)
        with torch.autocast(u.device.type, enabled=False):
            discrete, x = self.discrete(), u.to(wide)
            kind = torch.complex64 if wide == torch.float32 else torch.complex128
            new = discrete.A.to(kind) * state.to(kind) + discrete.B.to(kind) * x.unsqueeze(-1)
            y = 2 * (as_complex(self.C).to(kind) * new).sum(-1).real + self.D.to(wide) * x
        return Stepped(self._leave(y.to(u.dtype)), new)

    def initial_state(self, *batch: int) -> Tensor:
        """Zeros: the state before the first token, (*batch, width, d_state / 2)."""
        kind = torch.complex128 if self.C.dtype == torch.float64 else torch.complex64
        return torch.zeros(*batch, self.width, self.d_state // 2, dtype=kind, device=self.C.device)

    # ---- pieces -------------------------------------------------------------------------------------------

    def _leave(self, y: Tensor) -> Tensor:
        """What follows the state spaces: (..., width), in the dtype of the activations."""
        if self.out is None:
            return y
        y = F.dropout(F.gelu(y), self.dropout, self.training)
        y = F.linear(y, self.out.weight.to(y.dtype), self.out.bias.to(y.dtype))
        return F.glu(y, -1) if self.output == "glu" else y

    def _wide(self, u: Tensor) -> torch.dtype:
        """What is computed in."""
        double = torch.float64 in (u.dtype, self.C.dtype)
        return torch.float64 if double else torch.float32

    def _channels_first(self, u: Tensor) -> Tensor:
        axis = -2 if self.transposed else -1
        if u.ndim not in (2, 3) or u.shape[axis] != self.width or not u.is_floating_point():
            wanted = f"(batch, {self.width}, L)" if self.transposed else f"(batch, L, {self.width})"
            raise ShapeError(
                f"S4DLayer: the input has shape {tuple(u.shape)} and dtype {u.dtype}; it must be {wanted}, "
                "in floating point."
            )
        if not u.shape[-1 if self.transposed else -2]:
            raise ShapeError(f"S4DLayer: the input has shape {tuple(u.shape)}, sequences of no token.")
        return u if self.transposed else u.mT

    def _real(self, mask: Tensor, x: Tensor) -> Tensor:
        wanted = (*x.shape[:-2], x.shape[-1])
        if mask.dtype != torch.bool or tuple(mask.shape) != wanted:
            raise ShapeError(
                f"S4DLayer: mask has shape {tuple(mask.shape)} and dtype {mask.dtype}; it must be bool, "
                f"{wanted}, True where there is a token."
            )
        return mask.unsqueeze(-2)

    def _check_state(self, state: Tensor, batch: torch.Size) -> None:
        wanted = (*batch, self.d_state // 2)
        if not state.is_complex() or tuple(state.shape) != wanted:
            raise ShapeError(
                f"S4DLayer: the state has shape {tuple(state.shape)} and dtype {state.dtype}; it must be "
                f"complex, {wanted}, as initial_state({', '.join(map(str, batch[:-1]))}) makes it."
            )

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> S4DLayer:
        def kept(t: Tensor) -> Tensor:
            new = fn(t)
            half = new.is_floating_point() and new.dtype.itemsize < 4
            return t.to(new.device) if half else new

        if recurse:
            for child in self.children():
                child._apply(fn)  # pyright: ignore
        super()._apply(kept, recurse=False)  # pyright: ignore[reportUnknownMemberType]
        return self

    def extra_repr(self) -> str:
        """The options that name it."""
        return f"{self.width}, d_state={self.d_state}, init={self.init!r}, disc={self.disc!r}"


def _ending_together(x: Tensor, mask: Tensor) -> Tensor:
    """Inputs (..., width, L) that are 0 where there is no token, with each sequence's last token at the end.

    So no time passes behind it.
    """
    length = x.shape[-1]
    here = torch.arange(length, device=x.device)
    behind = length - 1 - torch.where(mask, here, -1).amax(-1, keepdim=True).clamp_min(0)
    return x.gather(-1, ((here - behind) % length).unsqueeze(-2).expand_as(x))


def check_options(
    who: str,
    d_state: int,
    init: str,
    disc: str,
    dt_min: float,
    dt_max: float,
    output: str,
    dropout: float,
    max_lr: float,
) -> None:
    """Raise unless these are options of a layer; ``who`` is whose they are."""
    check_whole(who, "d_state", d_state, 2)
    if d_state % 2:
        raise OptxError(f"{who}: d_state is {d_state}; modes come in pairs, so it must be even.")
    check_choice(who, "init", init, INITS)
    check_choice(who, "disc", disc, DISCS)
    check_choice(who, "output", output, OUTPUTS)
    check_range(who, "dt_min", dt_min, 1e-30, 1e3)
    check_range(who, "dt_max", dt_max, 1e-30, 1e3)
    if dt_max < dt_min:
        raise OptxError(f"{who}: dt_max={dt_max} is below dt_min={dt_min}; steps are drawn between the two.")
    check_range(who, "dropout", dropout, 0, 1)
    check_range(who, "max_lr", max_lr, 0)
