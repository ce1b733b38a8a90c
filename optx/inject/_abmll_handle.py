"""The handle of `optx.ABMLL`: tasks, predictions of the posterior, merges of its mean, and its state."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from optx._errors import FileError, MergeError, OptxError, check_choice, check_range, check_whole
from optx._names import is_dtensor
from optx._no_trace import evaluating
from optx.inject._abmll_part import NormalLoRA, Shared
from optx.inject._abmll_task import ABMLLTask, stream
from optx.inject._handle import Handle
from optx.inject._report import Report, Row
from optx.inject._served import Served
from optx.inject._stored import check_tensors
from optx.inject._trained_whole import Saved

PREFIX = "optx.abmll."
"""What keys of the state beside theta begin with; no module's path can."""


class ABMLLHandle(Handle):
    """What `optx.attach` returns for `optx.ABMLL`.

    Outside of a task the model computes with theta's means, in training too, and nothing is drawn.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> ab = optx.attach(model, optx.ABMLL(rank=2), targets="0")
        >>> with ab.task(inner_steps=2, inner_lr=1e-2) as t:
        ...     losses = t.adapt(lambda: model(torch.ones(5, 8)).square().mean())
        ...     probs = ab.predict(lambda: model(torch.ones(1, 8)), samples=4)
        >>> probs.shape, ab.tasks_begun
        (torch.Size([1, 4]), 1)
    """

    injection: Any  # `optx.ABMLL`, which this module does not know

    def __init__(
        self, model: nn.Module, injection: Any, served: Sequence[Served], saved: Sequence[Saved] = ()
    ) -> None:
        super().__init__(model, injection, served, saved)
        self.shared: Shared = self.normal_parts()[0].shared
        self.last: dict[str, Tensor] = {}

    def normal_parts(self) -> list[NormalLoRA]:
        """What was added, module by module."""
        return [one.part for one in self.served if isinstance(one.part, NormalLoRA)]

    # ---- tasks --------------------------------------------------------------------------------------

    @property
    def tasks_begun(self) -> int:
        """How many tasks there have been, in all processes together; the model's state has it too."""
        count = self.normal_parts()[0].tasks_begun
        return 0 if count.is_meta else int(count)

    @tasks_begun.setter
    def tasks_begun(self, count: int) -> None:
        self.normal_parts()[0].tasks_begun.fill_(count)

    def task(
        self, *, inner_steps: int = 5, inner_lr: float = 1e-3, tasks: int = 1, sample: bool = True
    ) -> ABMLLTask:
        """A task, for a ``with``: within it the model computes with a posterior phi that starts at theta.

        Within it every call draws weights (`predict` gives means and averages), and torch's random numbers
        are those of the seed and of the task's number alone; after it they go on as if it had not been. Of
        several processes each has a task of its own: one process that takes the same tasks in turn (the
        first process's, the second's, ...) does the same.

        Args:
            inner_steps: steps of adaptation, 0 or more.
            inner_lr: their learning rate (SGD).
            tasks: how many a meta-step has in this process: each one's loss is divided by it.
            sample: False computes with means alone, in adaptation and outer loss.

        Raises:
            OptxError: a number out of range; and when it is entered, within another task, merged, disabled,
                or sharded over processes (FSDP).
        """
        inner_steps = check_whole("task", "inner_steps", inner_steps, 0)
        tasks = check_whole("task", "tasks", tasks, 1)
        check_range("task", "inner_lr", inner_lr, 0, 3e38)
        check_choice("task", "sample", sample, (True, False))
        return ABMLLTask(self, inner_steps=inner_steps, inner_lr=float(inner_lr), tasks=tasks, sample=sample)

    def check_task(self) -> None:
        """Raise unless a task can begin."""
        self._check_alive("task")
        if self.shared.phi is not None:
            raise OptxError("task: it is within another task of this handle. Leave that first.")
        if self.merged:
            raise MergeError("task: the means are merged at fixed values. Call unmerge() first.")
        for one in self.served:
            if not one.part.enabled:
                raise OptxError(f"task: what was attached to {one.path!r} is disabled. Call enable() first.")
            for name, p in one.part.named_parameters():
                what = "on the meta device, without values" if p.is_meta else ""
                what = "a piece of a flat parameter (FSDP1)" if p.ndim != 2 else what
                what = "sharded (a DTensor)" if is_dtensor(p) else what
                if what:
                    raise OptxError(
                        f"task: {name!r} of {one.path!r} is {what}, and a task adapts a copy of it. Use "
                        "DistributedDataParallel, or keep what is attached whole."
                    )

    # ---- predictions --------------------------------------------------------------------------------

    def predict(self, call: Callable[[], Any], samples: int = 8, *, dim: int = -1, seed: int = 0) -> Tensor:
        """Class probabilities: the mean over drawn weights of the softmax of what ``call`` gives.

        Within a task the weights are the task's, else theta's. The model is in evaluation mode and without
        gradients for that time, and no stream of random numbers has moved after it.

        Args:
            call: computes logits, or an output that has ``logits``.
            samples: how many times weights are drawn; 0: the means, once.
            dim: the axis of classes.
            seed: of the draws: the same again gives the same.

        Returns:
            Probabilities of the logits' shape, float32 at least.

        Raises:
            OptxError: a negative number, or no logits.
        """
        total: Tensor | None = None
        for number, logits in enumerate(self._drawn(call, samples, seed)):
            wide = torch.promote_types(logits.dtype, torch.float32)
            found = logits.softmax(dim, dtype=wide)
            total = found if total is None else total + (found - total) / (number + 1)
        assert total is not None
        return total

    def draws(self, call: Callable[[], Any], samples: int = 8, *, seed: int = 0) -> Tensor:
        """What ``call`` gives for each of some drawn weights, (samples, ...): for intervals of a regression.

        Arguments and the rest are as of `predict`, but of the softmax.
        """
        return torch.stack(list(self._drawn(call, samples, seed)))

    def _drawn(self, call: Callable[[], Any], samples: int, seed: int) -> Generator[Tensor]:
        self._check_alive("predict")
        samples = check_whole("predict", "samples", samples, 0)
        seed = check_whole("predict", "seed", seed)
        if self.merged and samples:
            raise MergeError(
                "predict: the means are merged, so no weights can be drawn. Call unmerge() first."
            )
        devices = [part.A_mean.device for part in self.normal_parts()]
        for number in range(max(1, samples)):
            with (
                torch.no_grad(),
                evaluating(self.model),
                self._sampling(samples > 0),
                stream(~seed, number, devices),  # no task's: those are of seeds that are not negative
            ):
                found: Any = call()
            found = getattr(found, "logits", found)
            if not isinstance(found, Tensor) or not found.is_floating_point():
                raise OptxError(
                    f"predict: call gives a {type(found).__name__}; it must give a floating tensor, or an "
                    "output with logits."
                )
            yield found

    @contextmanager
    def _sampling(self, on: bool) -> Generator[None]:
        shared = self.shared
        was = shared.sampling, shared.called
        shared.sampling = on
        try:
            yield
        finally:
            shared.sampling, shared.called = was

    # ---- weights ------------------------------------------------------------------------------------

    def merge(self, *, untie: bool = False, which: Literal["theta", "phi"] = "theta") -> None:
        """Fold the mean B A into the weights; see `Handle.merge`. Deviations have no equal in weights.

        Args:
            untie: a served weight that other modules share gets a copy of its own.
            which: ``"theta"``, or within a task ``"phi"``, what it has adapted to; that stays in the weights
                after the task, until `unmerge`.

        Raises:
            MergeError: ``"phi"`` outside of a task, or as `Handle.merge`; nothing is changed.
        """
        check_choice("merge", "which", which, ("theta", "phi"))
        if which == "phi" and self.shared.phi is None:
            raise MergeError("merge: which='phi' is for use within a task; there is none now.")
        self.shared.folds_phi = which == "phi"
        try:
            super().merge(untie=untie)
        finally:
            self.shared.folds_phi = False

    # ---- state --------------------------------------------------------------------------------------

    def report(self) -> Report:
        """As of every handle, and a row of what the state has besides theta."""
        found, own = super().report(), sum(t.numel() for t in self._own_state().values())
        return Report([*found.rows, Row("(tasks)", f"{self.tasks_begun} so far", "", 0, own)], found.total)

    def state_dict(self) -> dict[str, Tensor]:
        """theta's pairs and c by module, how many tasks there were, and options that noise depends on.

        A run goes on bit for bit by this, or by the model's own state, and the optimizer's.
        """
        return {**super().state_dict(), **self._own_state()}

    def _own_state(self) -> dict[str, Tensor]:
        kept = json.dumps({"sigma_param": self.injection.sigma_param, "seed": self.injection.seed}).encode()
        return {
            PREFIX + "tasks": torch.tensor(self.tasks_begun),
            PREFIX + "options": torch.frombuffer(bytearray(kept), dtype=torch.uint8),
        }

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """As of every handle.

        Raises:
            FileError: a key is missing or unknown, a shape differs, or ``sigma_param`` or seed does.
            OptxError: within a task.
        """
        if self.shared.phi is not None:
            raise OptxError("load_state_dict: it is within a task. Leave that first.")
        wanted = self._own_state()
        own = {key: t for key, t in state_dict.items() if key.startswith(PREFIX)}
        theirs = own.get(PREFIX + "options")
        if theirs is not None and not torch.equal(theirs.cpu(), wanted[PREFIX + "options"]):
            said, here = map(_words, (theirs, wanted[PREFIX + "options"]))
            raise FileError(f"state_dict: it is of {said}, and this handle of {here}.")
        check_tensors(own, wanted)
        super().load_state_dict({key: t for key, t in state_dict.items() if key not in own})
        self.tasks_begun = int(own[PREFIX + "tasks"])


def _words(t: Tensor) -> str:
    return t.cpu().numpy().tobytes().decode(errors="replace")
