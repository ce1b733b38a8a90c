"""A loss that an injection has of its own: parts collect in a forward what a training loop adds to its loss.

There is one `Collected` per handle, which its parts share. Values are of one forward: the next one that
trains begins anew, and warns, once, if nobody took what the last one had collected.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from optx._errors import OptxError, warn
from optx.inject._handle import Handle
from optx.inject._part import Part
from optx.inject._served import Served
from optx.inject._trained_whole import Saved


class Collected:
    """What the parts of one handle have collected in the last forward that trained, by their paths.

    A forward begins at the model's own call. Where someone calls a module inside of it instead, it begins
    with the first part that is called again. What activation checkpointing computes again in a backward pass
    is no new value, and neither is anything in evaluation mode (where parts don't collect) or without
    gradients.

    Args:
        method: what errors call it.
        alone: whether what learns by this loss learns by it alone, and not by the task's too.
    """

    def __init__(self, method: str, *, alone: bool = True) -> None:
        self.method, self.alone = method, alone
        self.values: dict[str, list[Tensor]] = {}
        self._waiting = False  # for tracing, which must not look at another graph's tensors
        self._new, self._inside, self._learning, self._told = True, False, False, False
        self._called: set[str] = set()
        self._wrapper: weakref.ref[Any] | None = None
        self._stale: weakref.ref[Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For a copy of the model, which has computed nothing: a graph can't be copied."""
        fresh = {"values": {}, "_waiting": False, "_new": True, "_inside": False, "_called": set[str]()}
        return {**self.__dict__, **fresh, "_wrapper": None, "_stale": None}

    def begin(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        """Before the model's call.

        Raises:
            OptxError: DistributedDataParallel waits for gradients of what has been frozen since.
        """
        if (ddp := _ddp()) is not None:
            if self._stale is not None and self._stale() is ddp and not ddp.find_unused_parameters:
                raise OptxError(
                    f"{self.method}: DistributedDataParallel waits for gradients of what handle.freeze() has "
                    "frozen since it wrapped the model, and averages nothing. Wrap the model again then."
                )
            self._wrapper = weakref.ref(ddp)
        self._new, self._inside, self._learning = True, True, torch.is_grad_enabled()
        if not torch.compiler.is_compiling():
            self._called.clear()

    def first_call(self, path: str) -> bool:
        """Whether a module is called for the first time in this forward; ask once a call."""
        again = self._inside and path in self._called
        self._called.add(path)
        return not again

    def freeze(self) -> None:
        """Nothing learns from now on: who waits for its gradients, waits in vain."""
        self.take()
        self._stale = self._wrapper

    def end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After it."""
        self._inside = False

    def add(self, path: str, value: Tensor) -> None:
        """Keep one part's value, with its graph.

        Raises:
            OptxError: the model is computed with gradients, and this part of it without; or a wrapper would
                take what learns here for unused.
        """
        if not torch.is_grad_enabled():
            self._check_without_gradients(path)
            return
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:  # pyright: ignore[reportPrivateUsage]
            return  # computed again by a checkpoint; a compiled graph does that within itself
        ddp = _ddp()
        if self.alone and ddp is not None and ddp.find_unused_parameters and not ddp.static_graph:
            raise OptxError(
                f"{self.method}: DistributedDataParallel(find_unused_parameters=True) takes what only the "
                "own loss uses for unused. Leave that out, or pass static_graph=True."
            )
        if self._new or (not self._inside and path in self.values):
            if self._waiting and not self._told:
                self._told = True
                _tell(self.method)
            self.values, self._new, self._waiting = {}, False, True
        self.values.setdefault(path, []).append(value)

    def _check_without_gradients(self, path: str) -> None:
        if self._inside and self._learning:
            raise OptxError(
                f"{self.method}: {path!r} is in training mode and computed without gradients, in a model "
                "that has them, so its own loss would teach nothing. If that is a checkpoint, pass "
                "use_reentrant=False; if it is torch.no_grad(), put that module in evaluation mode."
            )

    def take(self) -> dict[str, list[Tensor]]:
        """All of it, of which nothing stays here."""
        values, self.values = self.values, {}
        self._new, self._inside, self._waiting = True, False, False
        return values


def _tell(method: str) -> None:
    warn(
        f"{method}: the last forward in training mode collected a loss that nobody took, so what was "
        "attached does not learn by it. Add handle.loss() to the loss after each forward, call "
        "handle.freeze() once it has learnt, or model.eval() where nothing is trained."
    )


# While torch.compile traces it is called, as by `torch.compiler.assume_constant_result`, which would load
# Dynamo here; a graph has no warnings.
_tell._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def _ddp() -> Any:
    """The DistributedDataParallel that the model is called by now, if one calls it."""
    if torch.compiler.is_compiling() or not dist.is_available() or not dist.is_initialized():
        return None
    return nn.parallel.DistributedDataParallel._get_active_ddp_module()  # pyright: ignore[reportPrivateUsage]


class LossPart(Part):
    """A part that has something to say about the loss.

    Attributes:
        path: of its module, by which the value is known.
        collected: shared by all parts of a handle.
    """

    def __init__(self, path: str, collected: Collected) -> None:
        super().__init__()
        self.path, self.collected = path, collected

    @property
    def learning(self) -> bool:
        """Whether it is to collect: in training mode, and not frozen."""
        return self.training and any(p.requires_grad for p in self.parameters())

    def collect(self, value: Tensor) -> None:
        """Give a value to the handle's loss; for use where `learning`. Compute it whatever comes of it.

        Raises:
            OptxError: the model is computed with gradients, and this part of it without.
        """
        self.collected.add(self.path, value)


_PATIENCE = 200  # losses taken while nothing was learnt; no one accumulates over as many


class LossHandle(Handle):
    """A handle whose injection has a loss of its own. A subclass has ``loss()``, from `_take`."""

    group: ClassVar[Mapping[str, float]] = {}
    """The settings of an optimizer's group that the method's source gives what is added: lr, weight_decay."""

    def __init__(
        self, model: nn.Module, injection: Any, served: Sequence[Served], saved: Sequence[Saved] = ()
    ) -> None:
        super().__init__(model, injection, served, saved)
        self.collected = next(one.part.collected for one in served if isinstance(one.part, LossPart))
        self._taken, self._written = 0, list[int]()
        self.last_loss: Tensor | None = None
        self.served[0].hooks += [
            model.register_forward_pre_hook(self.collected.begin),
            model.register_forward_hook(self.collected.end),
        ]

    def _take_off(self, *, restore: bool) -> None:
        super()._take_off(restore=restore)
        self.collected.take()

    @property
    def frozen(self) -> bool:
        """Whether nothing that was added learns any more: none of it requires a gradient."""
        return not any(p.requires_grad for p in self.parameters())

    def freeze(self) -> None:
        """Let what was added stay as it is; its loss is 0 from now on. Call it between two steps.

        Nothing of it requires a gradient or has one, so no momentum moves it on. A resumed run freezes again:
        files don't say so. Under DistributedDataParallel wrap the model again after it.
        """
        self._check_alive("freeze")
        for p in self.parameters():
            p.requires_grad_(False)
            p.grad = None
        self.collected.freeze()

    def param_groups(
        self,
        *,
        lr: float | None = None,
        ratio: float | None = None,
        weight_decay: float | None = None,
        embedding_lr: float | None = None,
    ) -> list[dict[str, Any]]:
        """What was added, as groups for an optimizer, with the settings that the method's source gives it.

        `base_parameters` is the rest of the model. To an optimizer that was made before attach, add each by
        ``optimizer.add_param_group(group)``.

        Args:
            lr: its rate; None: the source's.
            ratio: LoRA+'s; refused here.
            weight_decay: of its matrices; None: the source's.
            embedding_lr: of embeddings that were added, of which there are none.

        Returns:
            Groups with ``params``, ``lr`` and ``weight_decay``; every parameter is in one.

        Raises:
            OptxError: a number out of range, or ``ratio``.
        """
        rate = self.group["lr"] if lr is None else lr
        decay = self.group["weight_decay"] if weight_decay is None else weight_decay
        return super().param_groups(lr=rate, ratio=ratio, weight_decay=decay, embedding_lr=embedding_lr)

    def base_parameters(self) -> list[nn.Parameter]:
        """The model's parameters without what this handle added, for a group of their own."""
        own = {id(p) for p in self.parameters()}
        return [p for p in self.model.parameters() if id(p) not in own]

    def _take(self) -> dict[str, list[Tensor]]:
        """What the last forward collected, each module's values in the order of its calls; once.

        It is empty if nothing can be collected: all is frozen or disabled.

        Raises:
            OptxError: no forward that trains has been since it was taken last, or the handle is removed.
        """
        self._check_alive("loss")
        values = self.collected.take()
        idle = self.frozen or not any(one.part.active for one in self.served)
        if not values and not idle:
            raise OptxError(
                "loss: nothing has been collected since it was taken last. Call the model in training mode "
                "first, with gradients, and loss() once after each forward; keep it in a variable to use it "
                "twice."
            )
        if values and not idle:
            self._look_for_learning()
        return {} if idle else values

    def _look_for_learning(self) -> None:
        """Tell, once, of predictors that no optimizer has: their loss is taken, and they stay as they are."""
        if self._taken > _PATIENCE:
            return
        written = [p._version for p in self.parameters()]
        if self._taken == 0:
            self._written = written
        self._taken = _PATIENCE + 1 if written != self._written else self._taken + 1
        if self._taken == _PATIENCE:
            warn(
                f"{self.collected.method}: its loss was taken {_PATIENCE} times, and nothing that was "
                "attached has changed since, so no optimizer has it. Give it handle.param_groups(), by "
                "optimizer.add_param_group for one that was made before."
            )

    def _mean(self, values: Mapping[str, Sequence[Tensor]]) -> Tensor:
        """The mean over modules of the scalars that each collected, averaged over its calls; else 0."""
        where = next(iter(self.parameters())).device
        means = [torch.stack(list(some)).mean().to(where) for some in values.values()]
        loss = torch.stack(means).mean() if means else torch.zeros((), device=where)
        self.last_loss = loss.detach()
        return loss
