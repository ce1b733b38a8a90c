"""MESA: SAF without a table; what the model said before is asked of a running average of its weights.

Source: Du, Zhou, Feng, Tan, Zhou, "Sharpness-Aware Training for Free", NeurIPS 2022, arXiv 2205.14083,
section 4.3 and equation 12.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from optx._errors import FileError, OptxError, ShapeError, check_range, shown, warn
from optx.signal._ema_copy import EMACopy
from optx.signal._trajectory import Trajectory, check_logits, check_where, mean_loss, no_loss


class MESA(Trajectory):
    """A loss that keeps outputs near those of a running average of the weights, for flatter minima.

    It is weight tau^2 KL(softmax(reference / tau) || softmax(logits / tau)), averaged over the batch, the
    reference being a forward pass of the averaged weights on the same inputs, in eval mode and without
    gradients. The average takes the present weights in before that, once for each optimizer step (not each
    call, under gradient accumulation), from the first call on. No random numbers are drawn. Without gradients
    a call gives 0 and changes nothing.

    Args:
        model: the model that is trained. Its frozen parameters are shared, all others copied once. Make MESA
            after what is attached to the model; DDP and torch.compile may come before or after.
        weight: lambda; at 0 the average is kept and nothing else done. An attribute that may be set at any
            time.
        tau: the temperature.
        beta: the share of the average that stays at a step; 1 / (1 - beta) steps are a few epochs, at best.
        start_epoch: the loss begins after this epoch, the average with the first one.
        end_epoch: the first epoch without the loss again.
        dtype: in which the average computes, by autocast: ``torch.bfloat16`` costs half as much where there
            is hardware for it; None: as the call is.
        output: takes the logits out of what the model returns; None: a tensor itself, or its ``logits``.

    Paper values:
        ``weight=0.8, tau=5.0, start_epoch=5``: all tasks (the defaults).
        ``beta=0.9998``: ImageNet in its script, 90 epochs of 1251 steps; the paper says between 0.9 and 1.

    In transformers' Trainer a ``compute_loss_func`` sees no inputs: override ``compute_loss``, and add
    ``mesa(outputs.logits, **inputs)`` there; let a ``TrainerCallback`` call
    ``set_epoch(int(state.epoch + 1e-6))`` in ``on_epoch_begin``, and keep `state_dict` beside the Trainer's
    checkpoints.

    Limits: `set_epoch` must be called each epoch. A call costs a forward pass, a third of a step or less.
    Sharded parameters (FSDP2) are refused, and a forward that draws random numbers in eval mode, or reaches
    the model's own weights past the copy. Untested on a GPU.

    Keywords: MESA, SAM, sharpness-aware, flat minima, mean teacher, EMA, self-distillation, label noise.

    Evidence: ``optx run flatness``; ``test_mesa.py``.

    Source: "Sharpness-Aware Training for Free", arXiv 2205.14083, section 4.3 and equation 12; the factor
    tau^2 and the average's order from the authors' code.

    Raises:
        OptxError: an option out of range, a model that can't be served, no epoch set, logits without a
            gradient.
        ShapeError: the reference's logits are of another shape.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.Linear(3, 8)
        >>> mesa, opt = optx.MESA(model, beta=0.9, start_epoch=0), torch.optim.SGD(model.parameters(), lr=0.1)
        >>> for epoch in range(3):
        ...     mesa.set_epoch(epoch)
        ...     x, y = torch.randn(4, 3), torch.arange(4)
        ...     logits = model(x)
        ...     loss = torch.nn.functional.cross_entropy(logits, y) + mesa(logits, x)
        ...     opt.zero_grad()
        ...     loss.backward()
        ...     opt.step()
        >>> with mesa.swap_ema():  # the model with the averaged weights
        ...     accuracy = (model(x).argmax(1) == y).float().mean()
        >>> mesa.nbytes
        128
    """

    _owner = "MESA"

    def __init__(
        self,
        model: nn.Module,
        weight: float = 0.8,
        tau: float = 5.0,
        beta: float = 0.999,
        start_epoch: int = 5,
        end_epoch: int | None = None,
        dtype: torch.dtype | None = None,
        output: Callable[[Any], Tensor] | None = None,
    ) -> None:
        super().__init__(weight, tau, start_epoch, end_epoch)
        given: Any = model  # of any type, whatever is asked for
        if not isinstance(given, nn.Module):
            raise OptxError(f"MESA: model is {shown(given)}; it must be the model itself.")
        if not (output is None or callable(output)):
            raise OptxError(
                f"MESA: output is {shown(output)}; it must be a function that takes the logits out of what "
                "the model returns, or None."
            )
        check_range("MESA", "beta", beta, 0.0, 1.0)
        if dtype not in (None, torch.bfloat16, torch.float16):
            raise OptxError(f"MESA: dtype is {dtype}; it must be torch.bfloat16, torch.float16 or None.")
        self.dtype, self.output = dtype, output
        self._ema = EMACopy("MESA", model, beta)
        self._trusted = self._told = False

    @torch._disable_dynamo  # pyright: ignore  # torch.compiler.disable would load the compiler with optx
    def __call__(
        self, logits: Tensor, /, *inputs: Any, where: Tensor | None = None, **keywords: Any
    ) -> Tensor:
        """The loss to add, weight included.

        Args:
            logits: (B, C), or (B, T, V) of sequences, as the model gave them, any float dtype.
            inputs: what the model was called with.
            where: which positions count, bool in logits' shape without the last dimension: not padding. The
                mean is over these.
            keywords: what the model was called with by name.

        Returns:
            A scalar in float32 (float64 for such logits); exactly 0 while the loss is off.
        """
        nothing = no_loss("MESA", logits)
        if not torch.is_grad_enabled():
            return nothing
        check_logits("MESA", logits)
        if where is not None:
            check_where("MESA", where, logits)
        self._check_scores(logits)
        self._check_begun(self._now())
        self._ema.follow()
        if not self.active:
            if self.weight and not self._trusted:  # inputs that do not fit show now, not epochs later
                with torch.no_grad():
                    self._reference(logits, inputs, keywords)
            return nothing
        with torch.no_grad():
            past = self._reference(logits, inputs, keywords)
        return mean_loss(logits, logits.detach(), past, self.tau, None, where, self.weight)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch begins, counted from 0; call it at the start of each, as for a sampler.

        If only the first one is told, the loss stays 0: `active` says whether it is on.
        """
        super().set_epoch(epoch)
        self._ema.check_names()

    @property
    def ema(self) -> nn.Module:
        """The copy with the averaged weights, in eval mode; what is frozen in it is the model's own."""
        return self._ema.module

    @property
    def nbytes(self) -> int:
        """Bytes held besides the model's own."""
        return self._ema.nbytes

    def swap_ema(self) -> AbstractContextManager[None]:
        """The model itself with the averaged weights, to evaluate or save it; then its own, bit for bit."""
        return self._ema.swapped()

    def stepped(self) -> None:
        """Say that the weights took a step, in a loop without a torch optimizer that writes ``p.data``."""
        self._ema.tell()

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers, copied: epoch, steps, averages."""
        return {"epoch": self.epoch, **self._ema.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state; load the model's own weights before.

        Raises:
            FileError: it is none of MESA's, or of another model; nothing has changed then.
        """
        known: Any = state_dict  # of any type, if it comes from elsewhere
        if not isinstance(known, dict) or not {"epoch", "steps", "behind", "tensors"} <= known.keys():
            raise FileError("MESA: this state is none of MESA's; give what state_dict() gave.")
        self._ema.load(state_dict)
        self.epoch = state_dict["epoch"]

    def _check_begun(self, epoch: int) -> None:
        """Warn of a late first call, counted from 0 or 1: a resumed run whose state was forgotten has one."""
        if epoch > 1 and not self._ema.steps and not self._told:
            self._told = True
            warn(
                f"MESA: the average begins in epoch {epoch}, with the weights as they are. In a resumed run "
                "give the state that was saved to load_state_dict."
            )

    # ---- the reference ----------------------------------------------------------------------------------

    def _reference(self, logits: Tensor, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
        kind = logits.device.type
        autocast = nullcontext() if self.dtype is None else torch.autocast(kind, self.dtype)
        with autocast:
            past = (
                self._logits_of(self.ema(*inputs, **keywords))
                if self._trusted
                else self._first(kind, inputs, keywords)
            )
        if past.shape != logits.shape:
            raise ShapeError(
                f"MESA: logits have shape {tuple(logits.shape)} and the averaged model gave "
                f"{tuple(past.shape)}; give mesa the inputs that these logits are of."
            )
        return past

    def _first(self, kind: str, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
        """With gradients on and random states compared: what the copy must not do shows once, or never."""
        inputs, keywords = tree_map_only(Tensor, Tensor.detach, (inputs, keywords))
        before = _random_state(kind)
        with torch.enable_grad():
            past = self._logits_of(self.ema(*inputs, **keywords))
        if past.requires_grad:
            raise OptxError(
                "MESA: the averaged copy computes with weights of the model itself, which a hook or a "
                "function in it holds; such a model can't be averaged by a copy."
            )
        if not torch.equal(before, _random_state(kind)):
            raise OptxError(
                "MESA: the averaged model draws random numbers in eval mode (a dropout that is always on?), "
                "which would change the course of the training; let it draw in training mode only."
            )
        self._trusted = True
        return past

    def _logits_of(self, made: Any) -> Tensor:
        if self.output is not None:
            return self.output(made)
        found = cast(
            "Any",
            made["logits"]
            if isinstance(made, Mapping) and "logits" in made
            else getattr(made, "logits", made),
        )
        if not isinstance(found, Tensor):
            raise OptxError(
                f"MESA: the model returns a {type(made).__name__} without logits; give output=, a function "
                "that takes them out of it."
            )
        return found


def _random_state(kind: str) -> Tensor:
    return torch.get_rng_state() if kind == "cpu" else torch.get_device_module(kind).get_rng_state()
