"""Steps each tensor in the backward pass, as soon as its gradient is complete, and frees the gradient."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from optx._errors import OptxError, warn
from optx._names import is_dtensor, parameter_names
from optx.step.base_step import Guard
from optx.step.fusable import SHARED, Unfusable
from optx.step.interrupts import Held
from optx.step.measured import Measured
from optx.step.memory import Extents
from optx.step.metrics import rates
from optx.step.numbers import as_float
from optx.step.paths import GroupPath
from optx.step.releasable import why_not_released
from optx.step.sharded import here
from optx.step.single import Single
from optx.step.stepper import Stepper
from optx.step.transform import Host

_WHERE = "release"


class Owner(Host, Protocol):
    """The wrapped optimizer, as this sees it."""

    @property
    def stepper(self) -> Stepper:
        """Its machinery."""
        ...

    @property
    def step_hooks(self) -> bool:
        """Whether hooks run before its step."""
        ...

    @property
    def evaluating(self) -> bool:
        """Whether its step evaluates a closure now."""
        ...


class Released:
    """What `Wrapped.release` returns: ``with released:`` around a backward pass has it take the step.

    Inside, each parameter is stepped when its gradient is complete (a tied weight's after its last use), and
    the gradient is freed. ``opt.step()`` afterwards closes the step. Outside of the block, backward passes
    add up gradients as ever, so micro-batches before the last one stay outside.

    An error in the midst of such a backward pass leaves the parameters that were reached stepped and the
    others not; the next block and the next ``step()`` say so, until a checkpoint is loaded or `discard` is
    called.
    """

    def __init__(self, wrapped: Owner, model: nn.Module) -> None:
        self._wrapped = weakref.ref(wrapped)
        self._model = model
        self._hooks: dict[int, tuple[Tensor, Any]] = {}
        self._paths: list[GroupPath] = []  # that the following are of
        self._places: dict[int, tuple[GroupPath, int]] = {}
        self._runners: dict[int, Single] = {}
        self._stepped: dict[int, Tensor] = {}  # since the block was entered
        self._armed = self._open = self._looked = self._told = False
        self._failed = ""
        self._lock = threading.Lock()  # backward has a thread for each device
        self._check_model()
        self._ready()

    @property
    def removed(self) -> bool:
        """Whether `remove` was called, or the optimizer is gone."""
        return self._wrapped() is None

    def remove(self) -> None:
        """Take the hooks off: from now on ``opt.step()`` takes steps as ever."""
        self._check_closed("remove()")
        for _, hook in self._hooks.values():
            hook.remove()
        wrapped = self._wrapped()
        if wrapped is not None and vars(wrapped).get("released") is self:
            vars(wrapped)["released"] = None
        self._hooks, self._runners, self._wrapped = {}, {}, _nobody

    def discard(self) -> None:
        """Drop what an error left of a step: go on from the weights as they are, without its gradients."""
        for p in self._parameters():
            p.grad = None
        self.forget()

    def forget(self) -> None:
        """No step is open: a checkpoint was loaded, say."""
        self._stepped, self._failed, self._open, self._armed = {}, "", False, False
        self._paths = []

    # ---- the block -----------------------------------------------------------------------------------

    def __enter__(self) -> Released:
        wrapped = self._alive()
        if wrapped.evaluating:
            raise OptxError(
                f"{_WHERE}: the block was entered in a closure, while opt.step(closure) waits for gradients. "
                "Run backward in the block without a closure, and opt.step() after it."
            )
        if self._open:
            raise OptxError(
                self._failed
                or "release: a backward pass has taken the step, and opt.step(), which closes it, was not "
                "called since. Call it after each block; micro-batches before the last stay outside."
            )
        self._ready()
        wrapped.closure_pending = True  # gradients are still to come
        for transform in wrapped.transforms:
            transform.before_step(wrapped)
        self._armed = self._open = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._armed = False
        if error is not None and not self._stepped:
            self._open = False
        elif error is not None:
            total = len(self._places)
            self._failed = (
                f"release: an error ended the last backward pass when {len(self._stepped)} of {total} "
                "parameters had been stepped, and the others not. Load a checkpoint, or go on from these "
                "weights by discard() of what opt.release returned."
            )

    def close(self, given: object) -> bool:
        """End the step that backward has taken; False where it took none, and the step is an ordinary one.

        Args:
            given: the closure.
        """
        if self._failed:
            raise OptxError(self._failed)
        if not self._open:
            self._tell_unused(given)
            return False
        if given is not None:
            raise OptxError(f"{_WHERE}: step(closure) can't close a step that backward has taken.")
        if self._armed:
            raise OptxError(f"{_WHERE}: opt.step() was called inside the block; call it after it.")
        # Those that only earlier micro-batches have reached.
        for p in [p for p in self._parameters() if p.grad is not None]:
            self._take(p)
        self._conclude()
        return True

    def stepped_any(self) -> bool:
        """Whether the step that is open has moved anything, or will where it is closed."""
        return bool(self._stepped) or any(p.grad is not None for p in self._parameters())

    def check_saved(self) -> None:
        """Refuse to save half a step."""
        self._check_closed("state_dict()")

    def refuse_scaler(self) -> None:
        """A GradScaler decides whether to step when all gradients are there."""
        raise OptxError(_SCALER)

    # ---- one tensor ----------------------------------------------------------------------------------

    def _arrived(self, p: Tensor) -> None:
        """A gradient is complete: the hook."""
        if self._wrapped() is None or not (self._armed or self._stepped):
            return
        with self._lock:
            if self._armed or id(p) in self._stepped:
                self._take(p)

    def _take(self, p: Tensor) -> None:
        if torch.is_grad_enabled():  # in backward it seldom is
            with torch.no_grad():
                return self._take(p)
        if id(p) in self._stepped:
            raise OptxError(
                f"{_WHERE}: {self._name(p)} got another gradient after it was stepped. Call opt.step() "
                "before the next backward pass (reentrant checkpointing runs several: pass "
                "use_reentrant=False)."
            )
        runner = self._runners.get(id(p)) or self._runner(p)
        stepper = self._alive().stepper
        with Held():
            try:
                runner.prepare(stepper.key)
            except BaseException as error:
                runner.undo()
                if isinstance(error, Unfusable):
                    raise OptxError(
                        f"{_WHERE}: {self._name(p)} can't be stepped in backward: {error}."
                    ) from None
                raise
            self._stepped[id(p)] = p
            runner.step()
            torch.autograd.graph.increment_version(runner.written)
            if stepper.slots.store.pending:
                stepper.slots.store.settle([p])
        p.grad = None

    def _runner(self, p: Tensor) -> Single:
        """The tables of one tensor, made once."""
        path, number = self._places[id(p)]
        assert path.fused is not None
        runner = Single(path.fused, path.group, number)
        self._runners[id(p)] = runner
        return runner

    def _conclude(self) -> None:
        wrapped, stepped = self._alive(), self._stepped
        for group in wrapped.param_groups:
            if "optx.step" in group:
                group["optx.step"] += 1
        for fused in {id(path.fused): path.fused for path in self._paths}.values():
            assert fused is not None
            fused.count_groups()
        tables = [t for key in stepped for t in self._runners[key].computed()]
        wrapped.stepper.measured = measured = Measured(tables, True, rates(wrapped.param_groups))
        if wrapped.metering:
            measured.keep()
        wrapped.base._opt_called = True  # type: ignore[attr-defined]  # schedulers made on the base look at it
        self._stepped, self._open = {}, False

    # ---- checks --------------------------------------------------------------------------------------

    def _ready(self) -> None:
        """Look at all that may have changed since the last block, before anything is stepped."""
        wrapped = self._alive()
        wrapped.follow_parameters()
        if not self._looked and self._hooks:
            self._looked = True
            if _scaler_in_use():
                raise OptxError(_SCALER)
        if wrapped.step_hooks or _has_hooks(wrapped.base):
            raise OptxError(
                f"{_WHERE}: a step pre-hook is registered on the optimizer, which would run after backward "
                "has stepped. Do in the loop, before backward, what it does."
            )
        paths = wrapped.stepper.paths.groups()
        if len(paths) != len(self._paths) or any(a is not b for a, b in zip(paths, self._paths, strict=True)):
            self._take_on(paths)
        found = [p for p in self._parameters() if p.requires_grad]
        if len(found) != len(self._hooks) or any(id(p) not in self._hooks for p in found):
            self._hook(found)

    def _take_on(self, paths: list[GroupPath]) -> None:
        wrapped = self._alive()
        for number, path in enumerate(paths):
            if reason := why_not_released(wrapped, path):
                raise OptxError(f"{_WHERE}: param group {number} can't be stepped in backward: {reason}")
        places = {id(p): (path, i) for path in paths for i, p in enumerate(path.group["params"])}
        weights: list[Any] = [here(p) for path in paths for p in path.group["params"]]
        if Extents.of(weights).overlap:
            raise OptxError(f"{_WHERE}: param groups can't be stepped in backward: {SHARED}.")
        self._paths, self._places, self._runners = list(paths), places, {}

    def _hook(self, parameters: list[Tensor]) -> None:
        """Hooks on these and no others; all or none."""
        kept = {id(p): self._hooks.pop(id(p)) for p in parameters if id(p) in self._hooks}
        for _, hook in self._hooks.values():
            hook.remove()
        self._hooks = kept
        for p in parameters:
            if id(p) not in kept:
                hook: Any = p.register_post_accumulate_grad_hook(self._arrived)  # pyright: ignore
                kept[id(p)] = (p, hook)

    def _check_model(self) -> None:
        if not isinstance(self._model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise OptxError(f"{_WHERE}: model is a {type(self._model).__name__}; it must be the nn.Module.")
        wrapped = self._alive()
        own, every = set(map(id, self._model.parameters())), list(self._parameters())
        if strange := [p for p in every if id(p) not in own]:
            raise OptxError(
                f"{_WHERE}: {self._name(strange[0])} of the optimizer is no parameter of the model that was "
                "given. Pass the model that it trains."
            )
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        plain = [p for p in every if not is_dtensor(p)]
        if any(isinstance(m, DistributedDataParallel) for m in self._model.modules()) or (several and plain):
            raise OptxError(
                f"{_WHERE}: DistributedDataParallel averages gradients after backward has brought them, so "
                "each process would step by its own. Shard the model by torch.distributed.fsdp.fully_shard "
                "(FSDP2), whose gradients are whole by then; here are "
                f"{len(plain)} parameters that are no DTensors."
            )
        if wrapped.skip_nonfinite:
            raise OptxError(
                f"{_WHERE}: skip_nonfinite=True looks at all gradients before any weight moves. Leave it out."
            )

    def _check_closed(self, what: str) -> None:
        if self._open:
            raise OptxError(
                self._failed
                or f"{_WHERE}: {what} was called while a step is open that backward has taken. Call "
                "opt.step() first."
            )

    def _tell_unused(self, closure: object) -> None:
        """Gradients are there that no block has stepped: the step is taken, but saves nothing."""
        if self._told or closure is not None or not any(p.grad is not None for p in self._parameters()):
            return
        groups = self._alive().param_groups
        if any(as_float(group.get("lr", 1.0)) != 0.0 for group in groups):  # a checkpoint's rehearsal
            self._told = True
            warn(
                f"{_WHERE}: step() found gradients and no backward pass was run in `with released:`, so all "
                "of them were held at once. Run the last backward pass before a step inside the block, or "
                "call remove()."
            )

    def _alive(self) -> Owner:
        wrapped = self._wrapped()
        if wrapped is None:
            raise OptxError(f"{_WHERE}: it was removed, or its optimizer is gone. Call opt.release(model).")
        return wrapped

    def _parameters(self) -> Iterator[Tensor]:
        for group in self._alive().param_groups:
            yield from group["params"]

    def _name(self, p: Tensor) -> str:
        return repr(parameter_names(self._alive().base, self._model).get(id(p), "a parameter"))


_SCALER = (
    f"{_WHERE}: a GradScaler is in use, which decides whether to step when all gradients are there, and "
    "unscales them; by then they are gone. Train in bfloat16 without one, or call remove() of what "
    "opt.release returned."
)


def _nobody() -> None:
    return None


def _has_hooks(base: Optimizer) -> bool:
    hooks = base._optimizer_step_pre_hooks  # pyright: ignore[reportPrivateUsage]
    return any(not isinstance(hook, Guard) for hook in hooks.values())


def _scaler_in_use() -> bool:
    """Whether there is a GradScaler: nothing else tells that a loss was scaled."""
    scalers: list[Any] = [o for o in gc.get_objects() if issubclass(type(o), torch.amp.GradScaler)]
    return any(scaler.is_enabled() for scaler in scalers)


def asked_by_scaler() -> bool:
    """Whether a GradScaler's method is two calls up."""
    return isinstance(sys._getframe(2).f_locals.get("self"), torch.amp.GradScaler)  # pyright: ignore
