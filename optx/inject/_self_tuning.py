"""The handle of `optx.STN`: batches, the alternating schedule, steps of hyperparameters, and all their state.

Source: STN, arXiv 1903.03088, algorithm 1; Delta-STN, arXiv 2010.13514, algorithm 1 and section 4.2.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from optx._errors import FileError, MergeError, OptxError, warn
from optx._no_trace import evaluating
from optx.inject import _folder
from optx.inject._best_response import BestResponse, Gates
from optx.inject._draw import Draw
from optx.inject._handle import Handle
from optx.inject._hparams import HParams
from optx.inject._report import Report, Row
from optx.inject._served import Served
from optx.inject._trained_whole import Saved
from optx.inject._tuned_dropout import TunedDropout, dropout
from optx.inject._tuning_batch import averaged, noise, resting, rows_of
from optx.inject._tuning_state import LONG, PREFIX, Progress, check_state, history, restore, state_of


class SelfTuning(Handle):
    """What `optx.attach` returns for `optx.STN`: a handle that also tunes hyperparameters.

    Attributes:
        hparams: as given to `optx.STN`.
        optimizer: Adam over the raw hyperparameters and, unless ``sigma_lr`` is 0, their raw scales.
        progress: how many batches and steps there have been, and where the schedule is.
    """

    injection: Any  # `optx.STN`, which this module does not know

    def __init__(
        self, model: nn.Module, injection: Any, served: Sequence[Served], saved: Sequence[Saved] = ()
    ) -> None:
        super().__init__(model, injection, served, saved)
        self.hparams: HParams = injection.hparams
        self.progress = Progress()
        self._looked = False
        self.hparams.bind(self, next(one.part.V for one in self.served if isinstance(one.part, BestResponse)))
        self.hparams.read.update(part.tuned for _, part in self._tuned_dropouts())
        self.on_removal(_release)
        rates = [(self.hparams.raw, injection.lr), (self.hparams.raw_sigma, injection.sigma_lr)]
        groups = [{"params": [p], "lr": lr} for p, lr in rates if lr]
        self.optimizer = torch.optim.Adam(groups, weight_decay=0.0)
        self.progress.note(self.hparams)
        self._batches, self._gates = 0, Gates(self.served)

    def _tuned_dropouts(self) -> Iterator[tuple[Served, TunedDropout]]:
        return ((one, one.part) for one in self.served if isinstance(one.part, TunedDropout))

    @property
    def due(self) -> int:
        """Validation batches that the schedule asks for now.

        0 in the warm-up, then ``valid_steps`` after each ``train_steps`` training batches, and one less after
        each step of the hyperparameters.
        """
        return self.progress.due

    # ---- batches ------------------------------------------------------------------------------------

    @contextmanager
    def train_batch(
        self, batch: Any = None, *, learn: Literal["all", "general", "response"] = "all"
    ) -> Generator[None]:
        """A batch of which weights learn: within it the hyperparameters are perturbed for each example.

        Args:
            batch: how many examples it has, or the batch (a tensor, or what holds tensors: the length of
                their first axis). None: only with ``shared=True``, where all have the same.
            learn: ``"all"``. Delta-STN's two steps are ``"general"``, where nothing is perturbed and
                responses rest, and ``"response"``, where all other weights have no gradient.

        Raises:
            OptxError: within another batch; no batch where its size is needed; or a tuned dropout that is not
                in training mode. MergeError: it is merged.
        """
        self._check_ready("train_batch")
        stn = self.injection
        if learn not in ("all", "general", "response") or (learn != "all" and not stn.delta):
            raise OptxError(
                f"train_batch: learn is {learn!r}; it must be 'all', or with optx.STN(..., delta=True) "
                "'general' or 'response'."
            )
        for one, _ in self._tuned_dropouts():
            if not one.module.training:
                raise OptxError(
                    f"train_batch: the dropout {one.path!r} is in evaluation mode, so its tuned rate would "
                    "do nothing. Call model.train() first."
                )
        draw = self._draw(batch, valid=False) if learn != "general" else Draw(False, None, None, None)
        added = {id(p) for p in self.parameters()} if learn == "response" else set[int]()
        others = [p for p in self.model.parameters() if id(p) not in added] if added else []
        with resting(others), self._drawn(draw):
            yield
        if learn != "response":
            self._count()

    @contextmanager
    def valid_batch(self, batch: Any = None) -> Generator[None]:
        """A validation batch: backward within it reaches the hyperparameters, by the gates, and no weight.

        The model is in evaluation mode for that time. Within DistributedDataParallel call the module itself,
        not its wrapper: `step_hparams` averages the gradients.

        Args:
            batch: as of `train_batch`; not needed with ``sigma_lr=0``, where nothing is perturbed.

        Raises:
            OptxError: as `train_batch`.
        """
        self._check_ready("valid_batch")
        draw = self._draw(batch, valid=True)
        with resting(list(self.model.parameters())), evaluating(self.model), self._drawn(draw):
            yield

    def step_hparams(self, scaler: Any = None) -> None:
        """One step of the hyperparameters by the gradients of validation batches since the last one.

        The entropy term is added here: - tau * sum of log(sigma). With torch.distributed initialised the
        gradients are averaged over all processes, in one collective.

        Args:
            scaler: the GradScaler that the loss was scaled with; ``scaler.update()`` remains to be called.

        Raises:
            OptxError: no gradient has arrived, or one is not finite (without an enabled scaler, which
                leaves such a step out); or a hyperparameter was never asked for in a training batch.
                Nothing is changed.
        """
        self._check_ready("step_hparams")
        self._check_learnt()
        self._prepare_gradients(scaler)
        (self.optimizer.step if scaler is None else lambda: scaler.step(self.optimizer))()
        self.hparams.raw.grad = self.hparams.raw_sigma.grad = None
        self.progress.steps += 1
        self.progress.due = max(0, self.progress.due - 1)
        self.progress.note(self.hparams)

    @torch.no_grad()
    def _prepare_gradients(self, scaler: Any) -> None:
        """Of all processes, unscaled, and of the entropy."""
        raw, scales, tuned = self.hparams.raw, self.hparams.raw_sigma, self.hparams.tuned
        learnt = [p for group in self.optimizer.param_groups for p in group["params"]]
        grads = averaged(
            torch.stack([torch.zeros_like(p) if p.grad is None else p.grad * tuned for p in learnt])
        )
        if raw.grad is None:
            raise OptxError(
                "step_hparams: no gradient has reached the hyperparameters. Call the model and "
                "loss.backward() within stn.valid_batch()."
            )
        if scaler is None or not scaler.is_enabled():
            self._check_finite(grads)
        for p, grad in zip(learnt, grads, strict=True):
            p.grad = grad.clone()
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        if len(learnt) > 1 and scales.grad is not None:
            slope = torch.sigmoid(scales) / F.softplus(scales)  # of log(softplus(s))
            scales.grad -= self.injection.tau * slope * tuned

    # ---- what a loop may use besides ----------------------------------------------------------------

    def dropout(self, x: Tensor, name: str, training: bool = True) -> Tensor:
        """Dropout of x (B, ...) at the rate of a hyperparameter, for a model that calls F.dropout itself.

        Args:
            x: activations, the examples along the first axis.
            name: of the hyperparameter.
            training: as of `torch.nn.functional.dropout`; in a validation batch nothing is dropped.
        """
        draw = self.hparams.draw
        dropping = training and not (draw is not None and draw.valid)
        if not dropping:
            return x
        if self.hparams.perturbed(self.hparams.place(name)) is not None:
            self.hparams.read.add(name)
        return dropout(x, self.hparams, name, f"stn.dropout(x, {name!r})")

    def weight_decay(self, name: str) -> Tensor:
        """A loss term: half the squared norm of the served weights times a hyperparameter; 0 when validating.

        Its gradient is what torch's ``weight_decay`` adds to that of a weight. Of each example it is
        the weights that it is computed with, at its own rate; returned is their mean. Biases don't decay.
        """
        index, draw = self.hparams.place(name), self.hparams.draw
        rate = self.hparams[name].value
        if draw is not None and draw.valid:
            return torch.zeros((), device=rate.device)
        if self.hparams.perturbed(index) is None and not self.hparams.specs[name].tuned:
            rate = torch.full_like(rate, self.hparams.specs[name].value)
        total: Any = sum(
            one.part.squares(one.module) for one in self.served if isinstance(one.part, BestResponse)
        )
        return 0.5 * (rate.to(total) * total).mean()

    def linearised(self, *args: Any, **kwargs: Any) -> Any:
        """What the model computes, linear in the perturbations: f(0) + its derivative along them (Delta-STN).

        For use within `train_batch` in place of ``model(...)``: responses learn the slope at the values in
        force and nothing of the curvature behind it. It costs a forward-mode derivative, which
        every operation of the model must have.

        Raises:
            OptxError: not within a perturbed training batch of ``delta=True``.
        """
        draw = self.hparams.draw
        if draw is None or draw.valid or draw.shift is None or not self.injection.delta:
            raise OptxError(
                "linearised: it is for stn.train_batch() of optx.STN(..., delta=True), where there are "
                "perturbations to be linear in."
            )

        def along(one: Any) -> Any:
            if not isinstance(one, Tensor) or not one.is_floating_point():
                return one
            value, tangent = forward_ad.unpack_dual(one)
            return value if tangent is None else value + tangent

        with forward_ad.dual_level():
            shift = draw.shift * self.hparams.tuned
            draw.dual = forward_ad.make_dual(torch.zeros_like(shift), shift)
            try:
                return tree_map(along, self.model(*args, **kwargs))
            finally:
                draw.dual = None

    # ---- what has become of them --------------------------------------------------------------------

    @property
    def history(self) -> dict[str, list[float]]:
        """The schedule that was discovered: each value from before the first step to after the last.

        ``"batches"`` is how many training batches there had been; the values are by the hyperparameter's
        name, and their scales by ``"sigma <name>"``.
        """
        return history(self.hparams, self.progress)

    def report(self) -> Report:
        """As of every handle, and a row of the hyperparameters with the values that are in force."""
        found = super().report()
        values = ", ".join(f"{name}={value:.4g}" for name, value in self.hparams.values().items())
        own = sum(t.numel() for t in self._own_state().values())
        steps = f"{self.progress.steps} steps"
        return Report([*found.rows, Row("(hyperparameters)", steps, values, 0, own)], found.total)

    def merge_and_unload(self, *, untie: bool = False) -> nn.Module:
        """As of every handle, at the values in force; tuned dropout modules keep theirs as their ``p``."""
        model = super().merge_and_unload(untie=untie)
        values = self.hparams.values()
        for one, part in self._tuned_dropouts():
            module: Any = one.module
            module.p = values[part.tuned]
        return model

    # ---- state --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """What was added, and all that a run needs to go on bit for bit: values, scales, steps, schedule."""
        return {**super().state_dict(), **self._own_state()}

    def _own_state(self) -> dict[str, Tensor]:
        return state_of(self.hparams, self.progress, self.optimizer)

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """As of every handle.

        Raises:
            FileError: a key is missing or unknown, a shape differs, or it is of other hyperparameters.
        """
        own = {key: t for key, t in state_dict.items() if key.startswith(PREFIX)}
        check_state(own, self._own_state())
        super().load_state_dict({key: t for key, t in state_dict.items() if key not in own})
        restore(own, self.hparams, self.progress, self.optimizer)
        self._batches, self._gates = 0, Gates(self.served)

    def load(self, path: str | PathLike[str]) -> None:
        """As of every handle: tensors that `save` wrote, and the values of hyperparameters with them.

        A folder holds what a model needs to compute; what a run needs to go on is in `state_dict`.
        """
        stored = _folder.read(path, self.model).injection
        theirs = getattr(stored, "hparams", None)
        if isinstance(theirs, HParams) and theirs.specs != self.hparams.specs:
            raise FileError(f"load: {str(path)!r} is of {theirs}, and this handle of {self.hparams}.")
        super().load(path)
        if isinstance(theirs, HParams) and theirs.description() != self.hparams.description():
            with torch.no_grad():
                self.hparams.raw.copy_(theirs.raw)
                self.hparams.raw_sigma.copy_(theirs.raw_sigma)
            self.progress.note(self.hparams)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if not self.removed:
            self.hparams.belong(self)  # a copy's are the copy's

    # ---- within -------------------------------------------------------------------------------------

    def _draw(self, batch: Any, *, valid: bool) -> Draw:
        """Perturbations of a batch; the same whoever asks, and whatever else draws random numbers."""
        stn, hparams = self.injection, self.hparams
        if not hparams.any_tuned or (valid and not stn.sigma_lr):
            return Draw(valid, None, None, None)
        rows = (
            None if stn.shared else rows_of(batch, stn.batch_axis, "valid_batch" if valid else "train_batch")
        )
        self.progress.draws += 1
        common = [spec.shared for spec in hparams.specs.values()]
        drawn = noise(stn.seed, self.progress.draws, rows, common).to(hparams.raw)
        return Draw(valid, rows, drawn, hparams.sigma().detach() * drawn, stn.batch_axis)

    def _count(self) -> None:
        """One training batch more."""
        stn, now = self.injection, self.progress
        now.batches += 1
        self._batches += 1
        now.tell_of_none(stn.warmup + LONG * stn.train_steps)
        if now.batches > stn.warmup:
            now.since += 1
            if now.since >= stn.train_steps:
                now.since, now.due = 0, stn.valid_steps

    @contextmanager
    def _drawn(self, draw: Draw) -> Generator[None]:
        self.hparams.draw = draw
        try:
            yield
        finally:
            self.hparams.draw = None
            self.hparams.calls.leave(draw)

    def _check_ready(self, doing: str) -> None:
        self._check_alive(doing)
        draw = self.hparams.draw
        if draw is not None and doing != "step_hparams":
            raise OptxError(f"{doing}: it is within another batch of this handle. Leave that first.")
        if draw is not None and not draw.valid:
            raise OptxError(f"{doing}: it is within a training batch. Leave that first.")
        if self.merged:
            raise MergeError(f"{doing}: the responses are merged at fixed values. Call unmerge() first.")

    def _check_learnt(self) -> None:
        """Raise if a step would follow gates that could not learn what they should say."""
        if not self.hparams.any_tuned:
            raise OptxError(
                "step_hparams: every hyperparameter has sigma=0 and is held; there is none to tune."
            )
        if not self.progress.batches:
            raise OptxError(
                "step_hparams: no training batch has been within stn.train_batch() yet, so the weights' "
                "response to the hyperparameters is not learnt."
            )
        for name, spec in self.hparams.specs.items():
            if spec.tuned and name not in self.hparams.read:
                raise OptxError(
                    f"step_hparams: nothing has asked for {name!r} in a training batch yet, so there is no "
                    f"response. Use hparams[{name!r}].value in stn.train_batch(), or leave {name!r} out."
                )
        self._gates.check(self._batches)
        if self._batches and not self._looked:
            self._looked = True
            idle = [one.path for one, part in self._tuned_dropouts() if not part.called]
            if idle:
                more = f" and {len(idle) - 1} more" if len(idle) > 1 else ""
                warn(
                    f"STN: the dropout {idle[0]!r}{more} was not called in any training batch. If its p is "
                    "read elsewhere (as by fused attention), that drops at its own rate, not at a tuned one."
                )

    def _check_finite(self, grads: Tensor) -> None:
        good = grads.isfinite().all(0).tolist()
        bad = [name for name, one in zip(self.hparams, good, strict=True) if not one]
        if bad:
            raise OptxError(
                f"step_hparams: the gradient of {bad[0]!r} is not finite. Set its gradients to None and "
                "leave this batch out, as with stn.optimizer.zero_grad()."
            )


def _release(handle: Any) -> None:
    handle.hparams.release()
