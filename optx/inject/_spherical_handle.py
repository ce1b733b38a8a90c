"""The handle of `optx.SphericalHead`: the loss, the step, and the way back to a plain head."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from optx._errors import MergeError, OptxError, ShapeError, TransformError, check_range
from optx.inject._handle import Handle
from optx.inject._served import Served
from optx.inject._spherical_factors import Pending
from optx.inject._spherical_input import plain
from optx.inject._spherical_part import FactoredHead
from optx.inject._trained_whole import Saved
from optx.step.rehearsal import is_rehearsal
from optx.step.transform import Host, Transform

_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class SphericalHandle(Handle):
    """What `optx.attach` returns for `optx.SphericalHead`.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 5000))
        >>> handle = optx.attach(model, optx.SphericalHead(optx.ZLoss(a=0.1, b=20.0), lr=0.1), targets="2")
        >>> optimizer = optx.wrap(torch.optim.AdamW(model.parameters(), lr=1e-3), handle)
        >>> x, y = torch.randn(16, 8), torch.randint(5000, (16,))
        >>> loss = handle.loss(model(x), y)  # in the place of criterion(model(x), y)
        >>> loss.backward()
        >>> optimizer.step()  # steps the head too
        >>> handle.steps, model.eval()(x).shape
        (1, torch.Size([16, 5000]))
        >>> type(handle.materialize()).__name__
        'Linear'
    """

    injection: Any  # `optx.SphericalHead`, which this module does not know

    def __init__(
        self, model: nn.Module, injection: Any, served: Sequence[Served], saved: Sequence[Saved] = ()
    ) -> None:
        super().__init__(model, injection, served, saved)
        self._lr: float = injection.lr

    @property
    def _part(self) -> FactoredHead:
        part = self.served[0].part
        assert isinstance(part, FactoredHead)
        return part

    # ---- training -------------------------------------------------------------------------------------

    def loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """The loss of the head's outputs, of which none is made but the targets'.

        Args:
            hidden: the head's input, (..., d); in training mode it is what the head hands on, so
                ``model(x)`` where the head is the model's last module.
            labels: class numbers, (...).

        Returns:
            As the loss's ``reduction`` says: a scalar, or one number for each label; float32, or float64 for
            such inputs. In training mode its backward pass leaves what `step` needs.

        Raises:
            ShapeError: labels don't fit the inputs, or these the head.
            TypeError: labels that are no whole numbers, or inputs in float16.
            IndexError: a label outside of the classes.
            OptxError: an input is not finite, a scale has overflowed, or there are several processes.
        """
        self._check_alive("loss")
        part, loss = self._part, self._part.loss
        hidden = plain(hidden)
        _check(hidden, labels, part.width)
        x, y = hidden.reshape(-1, part.width), labels.reshape(-1).to(torch.int64)
        counts = y != loss.ignore_index
        bad = counts & ((y < 0) | (y >= part.classes))
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            raise IndexError(
                f"SphericalHead: label {int(y[row])} (number {row} of {len(y)}) is out of range for "
                f"{part.classes} classes; it must be in 0..{part.classes - 1}, or "
                f"ignore_index={loss.ignore_index}."
            )
        all_count = bool(counts.all())
        losses = part.losses(x if all_count else x[counts], y if all_count else y[counts])
        if loss.reduction == "none":
            full = losses if all_count else losses.new_zeros(len(y)).masked_scatter(counts, losses)
            losses = full.view(labels.shape)
        found = loss.reduced(losses, len(losses) if all_count else int(counts.sum()))
        return found if hidden.dtype == torch.float64 else found.float()

    @property
    def steps(self) -> int:
        """How many steps the head has taken, as checkpoints have it."""
        return int(self._part.count)

    @property
    def lr(self) -> float:
        """The head's learning rate, which may be set; with `optx.wrap` it is scheduled besides."""
        return self._lr

    @lr.setter
    def lr(self, value: float) -> None:
        check_range("SphericalHead", "lr", value, 0)
        self._lr = float(value)

    def step(self) -> None:
        """One step of SGD on the head, by all backward passes since the last one.

        ``optx.wrap(optimizer, handle)`` does it after each step that was not skipped. A head that nothing was
        computed with stays as it is.

        Raises:
            OptxError: removed, or a number has overflowed; nothing is changed.
        """
        self._check_alive("step")
        self._part.step(self._lr, self.injection)

    def zero_grad(self) -> None:
        """Drop the backward passes that are not stepped by yet, as an optimizer's does."""
        self._part.pending = []

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load what `state_dict` gave: the run goes on from there bit for bit; see `Handle.load_state_dict`.

        Raises:
            FileError: also where it is of a head of another size; nothing is changed.
        """
        super().load_state_dict(state_dict)
        self.zero_grad()

    # ---- a plain head again ---------------------------------------------------------------------------

    def materialize(self) -> nn.Linear:
        """A plain nn.Linear with the weights of now; the factors stay attached."""
        self._check_alive("materialize")
        module: Any = self.served[0].module
        plain = self._part.plain(module.weight.dtype)
        made = nn.Linear(1, 1, bias=self._part.bias, device="meta")
        made.in_features, made.out_features = self._part.width, self._part.classes
        for name, tensor in plain.items():
            setattr(made, name, nn.Parameter(tensor))
        return made.train(module.training)

    def remove(self) -> None:
        """Leave a plain nn.Linear with the trained weights; the module, its class and its keys are as before.

        (What the weights were at attach is gone: the factors take their place, and nothing keeps a copy.)
        """
        super().remove()

    def merge_and_unload(self, *, untie: bool = False) -> nn.Module:
        """As `remove`, which leaves the trained weights.

        Args:
            untie: of no use here: what is tied was refused at attach.

        Returns:
            The model.
        """
        self._check_alive("merge_and_unload")
        self.remove()
        return self.model

    def merge(self, *, untie: bool = False) -> None:
        """Refused: the factors are the weight.

        Raises:
            MergeError: always.
        """
        raise MergeError(
            "merge: SphericalHead's factors are the weight itself. materialize() gives a plain head beside "
            "them, remove() one in their place."
        )

    def disable(self) -> Any:
        """Refused: there is no other weight to compute with.

        Raises:
            OptxError: always.
        """
        raise OptxError(
            "disable: SphericalHead's factors are the head's only weight. model.eval() computes all outputs; "
            "remove() leaves a plain head."
        )

    def take_pending(self) -> list[Pending]:
        """The backward passes that are not stepped by yet, of which none stays here; for `wrap`."""
        found, self._part.pending = self._part.pending, []
        return found

    def step_by(self, pending: Sequence[Pending], factor: float) -> None:
        """`step` by these, at the rate times a factor; for `wrap`."""
        self._part.pending = [*pending, *self._part.pending]
        self._part.step(self._lr * factor, self.injection)


class HeadStep(Transform):
    """Step a handle's factored head with each step of an optimizer; `optx.SphericalHead` brings it.

    Args:
        handle: of ``optx.attach(model, optx.SphericalHead(...))``.
    """

    def __init__(self, handle: SphericalHandle) -> None:
        object.__setattr__(self, "name", handle.served[0].name)
        self.handle = handle
        self._taken: list[Pending] = []

    def check(self, base: torch.optim.Optimizer) -> None:
        """Raise for a base that evaluates the model several times in a step."""
        if isinstance(base, torch.optim.LBFGS):
            raise TransformError(
                "SphericalHead: LBFGS evaluates the model several times in a step, and each would be added "
                "to the head's. Wrap another optimizer."
            )

    @contextmanager
    def around_step(self, optimizer: Host) -> Generator[None]:
        """Take what this step is made of; a step that is skipped leaves none of it."""
        self._taken = [] if self.handle.removed or is_rehearsal(optimizer) else self.handle.take_pending()
        yield

    def gradients_dropped(self, optimizer: Host) -> None:
        """Drop the head's too: a batch that is skipped this way must leave nothing."""
        self.handle.zero_grad()

    def after_step(self, optimizer: Host) -> None:
        """Step the head, at its rate times what a schedule makes of the optimizer's."""
        taken, self._taken = self._taken, []
        if taken and not self.handle.removed:
            group = optimizer.param_groups[0]
            first = float(group.get("initial_lr", group.get("lr", 1.0)))
            self.handle.step_by(taken, float(group.get("lr", 1.0)) / first if first else 1.0)


def _check(hidden: Tensor, labels: Tensor, width: int) -> None:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise OptxError(
            "SphericalHead: it steps by what its own process has seen, so several processes would have "
            "several heads. Train in one."
        )
    if hidden.ndim == 0 or hidden.shape[-1] != width:
        raise ShapeError(
            f"SphericalHead: hidden has shape {tuple(hidden.shape)}; it is the head's input, (..., {width}), "
            "which a model hands on in training mode with gradients. Outputs, as evaluation mode gives them, "
            "go to the optx.ZLoss itself."
        )
    if not hidden.is_floating_point() or hidden.dtype == torch.float16:
        raise TypeError(
            f"SphericalHead: hidden has dtype {hidden.dtype}; use bfloat16, float32 or float64 (float16 "
            "needs a GradScaler, whose scale the head's step can't undo)."
        )
    if labels.dtype not in _WHOLE:
        raise TypeError(f"SphericalHead: labels have dtype {labels.dtype}; they are class numbers, as int64.")
    if labels.shape != hidden.shape[:-1]:
        raise ShapeError(
            f"SphericalHead: labels have shape {tuple(labels.shape)}; for inputs of shape "
            f"{tuple(hidden.shape)} it must be {tuple(hidden.shape[:-1])}."
        )
    if labels.device != hidden.device:
        raise OptxError(
            f"SphericalHead: labels are on {labels.device} and hidden is on {hidden.device}; move them."
        )
