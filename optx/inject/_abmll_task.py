"""A task of ABMLL: a copy of theta's factors that adapts to it, and the loss by which theta learns of it.

Source: ABMLL, arXiv 2508.14285, section 3; first order as in MAML, arXiv 1703.03400, section 5.2.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from optx._errors import OptxError
from optx.inject._abmll_part import NormalLoRA, Shared
from optx.inject._abmll_terms import Factors, divergence, surprise
from optx.inject._tuning_batch import key_of, world
from optx.inject._weights import in_sum_precision

if TYPE_CHECKING:
    from typing_extensions import Self


@contextmanager
def stream(seed: int, number: int, devices: Sequence[torch.device]) -> Generator[None]:
    """torch's random numbers are of a seed and a number for that time; before and after it, what they were.

    Activation checkpointing gives torch's own streams back, and no others.
    """
    key = key_of(seed, number)
    cuda = sorted({device.index for device in devices if device.type == "cuda"})
    with torch.random.fork_rng(devices=cuda):  # pyright: ignore[reportUnknownMemberType]
        torch.default_generator.manual_seed(key)
        for index in cuda:
            torch.cuda.default_generators[index].manual_seed(key)
        yield


class Learner(Protocol):
    """What a task is of; `optx.ABMLLHandle` is one."""

    shared: Shared
    injection: Any
    last: dict[str, Tensor]

    @property
    def tasks_begun(self) -> int:
        """How many there have been."""
        ...

    @tasks_begun.setter
    def tasks_begun(self, count: int) -> None: ...

    def normal_parts(self) -> list[NormalLoRA]:
        """Its parts."""
        ...

    def check_task(self) -> None:
        """Raise unless a task can begin."""
        ...


class ABMLLTask:
    """What ``with ab.task() as t:`` gives: a posterior that starts at theta and is gone when it ends.

    Args:
        of: the handle.
        inner_steps: of `adapt`.
        inner_lr: their learning rate.
        tasks: how many a meta-step has in this process.
        sample: whether weights are drawn; else they are their means.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 2))
        >>> ab = optx.attach(model, optx.ABMLL(rank=2), targets="0")
        >>> x, y = torch.randn(16, 8), torch.randint(2, (16,))
        >>> nll = lambda rows: torch.nn.functional.cross_entropy(model(x[rows]), y[rows])
        >>> with ab.task(inner_steps=2) as t:
        ...     losses = t.adapt(lambda: nll(slice(8)))
        ...     t.outer(nll(slice(8, 16))).backward()
        >>> len(losses)
        2
    """

    def __init__(self, of: Learner, *, inner_steps: int, inner_lr: float, tasks: int, sample: bool) -> None:
        self._of, self.inner_steps, self.inner_lr = of, inner_steps, inner_lr
        self.tasks, self.sample = tasks, sample
        self._adapted = self._done = False
        self._open: ExitStack | None = None

    def __enter__(self) -> Self:
        if self._open is not None:
            raise OptxError("task: this task has been entered before. Ask the handle for a new one.")
        of, parts = self._of, self._of.normal_parts()
        of.check_task()
        ranks, rank = world()
        with ExitStack() as stack:
            devices = [part.A_mean.device for part in parts]
            stack.enter_context(stream(of.injection.seed, of.tasks_begun + rank, devices))
            of.shared.phi = {part.path: _copy(part.theta()) for part in parts}
            of.shared.sampling, of.shared.called = self.sample, False
            self._open = stack.pop_all()
        of.tasks_begun += ranks
        return self

    def __exit__(self, *_: object) -> None:
        shared = self._of.shared
        shared.phi, shared.sampling = None, False
        assert self._open is not None
        self._open.close()

    def adapt(self, loss: Callable[[], Tensor]) -> list[float]:
        """``inner_steps`` steps of SGD on phi: of the loss on the support set, plus beta KL(phi || theta).

        theta, the model's weights and every ``.grad`` stay as they are. Called again, it goes on.

        Args:
            loss: computes the support set's mean loss with the model, anew at each call. In several processes
                call the model itself, not what DistributedDataParallel made of it.

        Returns:
            The support loss before each step, without the divergence.

        Raises:
            OptxError: the loss is no finite scalar, or is computed without the adapted modules; or `outer`
                has been called.
        """
        shared = self._inside("adapt")
        if self._done:
            raise OptxError("adapt: outer() has been called in this task. Begin another task.")
        if not callable(loss):
            raise OptxError(
                f"adapt: loss is a {type(loss).__name__}; it must be a function that computes it anew, as "
                "task.adapt(lambda: criterion(model(x), y))."
            )
        losses: list[float] = []
        shared.adapting = True
        try:
            for step in range(self.inner_steps):
                losses.append(self._step(loss, step))
        finally:
            shared.adapting = shared.called = False
        self._adapted = True
        return losses

    def _step(self, closure: Callable[[], Tensor], step: int) -> float:
        of = self._of
        assert of.shared.phi is not None
        of.shared.called = False
        with torch.enable_grad():
            loss = self._checked(closure(), f"adapt: the loss of inner step {step}")
            total = self._total(loss, 0.0)
        learning = [t for factors in of.shared.phi.values() for t in factors]
        grads = iter(torch.autograd.grad(total, learning, allow_unused=True))
        of.shared.phi = {
            path: Factors(*(_stepped(t, next(grads), self.inner_lr) for t in factors))
            for path, factors in of.shared.phi.items()
        }
        return float(loss.detach())

    def outer(self, loss: Tensor) -> Tensor:
        """The meta-loss by which theta learns; call ``backward()`` on it within the task.

        It is (loss + beta KL(phi || theta) + gamma / tasks * -log p(theta)) / tasks, in float32. Backward
        adds to theta's ``.grad`` what the loss's gradient is at the adapted phi, as if the steps to it were
        the identity (first order), and the gradient of the other terms. Over the tasks of a meta-step that
        makes the mean. In several processes DistributedDataParallel averages, where it computed the loss; or
        average ``.grad`` yourself.

        Args:
            loss: mean loss on the query set, computed with the model after `adapt`.

        Raises:
            OptxError: before `adapt` (unless ``inner_steps=0``), called twice, or the loss is no finite
                scalar that was computed with the adapted modules since.
        """
        self._inside("outer")
        if not self._adapted and self.inner_steps:
            raise OptxError(
                "outer: the task has not adapted. Call t.adapt(...) first, or ask for ab.task(inner_steps=0)."
            )
        if self._done:
            raise OptxError("outer: it has been called in this task. Take the query set's loss in one piece.")
        loss = self._checked(loss, "outer: the query loss")
        self._done = True
        ranks, _ = world()
        total = self._total(loss, self._of.injection.gamma_or_beta / (self.tasks * ranks))
        self._of.last["loss"] = total.detach()
        return total / self.tasks

    def _total(self, loss: Tensor, gamma: float) -> Tensor:
        """Loss, divergence and prior in one sum, of float32 at least: beta times a large sum is small."""
        of, total = self._of, in_sum_precision(loss)
        beta = of.injection.beta
        for part in of.normal_parts():
            prior = part.theta()
            posterior = part.factors()
            if of.shared.adapting:
                prior = Factors(*(t.detach() for t in prior))
            if beta:
                total = total + beta * divergence(posterior, prior, part.c, part.kind).to(total)
            if gamma:
                a0, b0 = of.injection.a0, of.injection.b0
                total = total + gamma * surprise(prior, part.c, part.kind, a0, b0).to(total)
        return total

    def _inside(self, doing: str) -> Shared:
        if self._open is None or self._of.shared.phi is None:
            raise OptxError(f"{doing}: it is not within its task. Use `with ab.task() as t:`.")
        return self._of.shared

    def _checked(self, loss: Any, what: str) -> Tensor:
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
            shape = f"of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            raise OptxError(f"{what} is {shape}; it must be a tensor of one number.")
        if not loss.requires_grad or not self._of.shared.called:
            raise OptxError(
                f"{what} was not computed with what ABMLL is attached to, as it is now. Call the model "
                "within the task (for outer: after adapt), with gradients, and leave some of theta trainable."
            )
        if not bool(loss.detach().isfinite()):
            raise OptxError(f"{what} is {float(loss.detach())}. Theta is as it was; try a smaller inner_lr.")
        return loss.reshape(())


def _copy(theta: Factors) -> Factors:
    return Factors(*(t.detach().clone().requires_grad_() for t in theta))


def _stepped(t: Tensor, grad: Tensor | None, lr: float) -> Tensor:
    """A new tensor: what was computed with the old one may still need it."""
    return (t.detach() if grad is None else t.detach() - lr * grad).requires_grad_()
