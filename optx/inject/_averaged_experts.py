"""One module as several experts that are drawn together: dealt tokens in training, their mean otherwise.

Source: EWA, arXiv 2308.06093. The module's own parameters hold the mean, so that its keys in a checkpoint are
those of the model that all this ends as.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from optx._errors import OptxError, warn
from optx._pieces import pieces_of
from optx.inject._expert_copies import local, mean_of
from optx.inject._part import RESERVED, Part, hidden_of
from optx.inject._token_split import Partition, call_of, dealt

Stamp = tuple[tuple[int, int], ...]

_PATIENCE = 4  # steps of an optimizer without an averaging, after which there is a word about it


class Own(NamedTuple):
    """A parameter of the module, and what it was at attach.

    Attributes:
        value: a copy.
    """

    name: str
    value: Tensor


class Reminder:
    """What one handle says of averaging that is forgotten; once.

    Args:
        wanted: whether it is to say anything (with a rate of 0 nobody need average).
    """

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted
        self._seen: Stamp | None = None
        self._missed = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_seen": None}

    def look(self, path: str, p: Tensor) -> None:
        """At a forward in training: has an optimizer moved a parameter of an expert, and again and again?"""
        stamp = _stamp([p])
        if self._seen is not None and stamp != self._seen:
            self._missed += 1
        self._seen = stamp
        if self._missed >= _PATIENCE:
            self.wanted = False
            warn(
                f"EWA: the experts of {path!r} were trained for {_PATIENCE} steps and not averaged, so they "
                "drift apart and their mean means little. Use optx.wrap(optimizer, handle), or call "
                "handle.step() after each optimizer.step()."
            )


class AveragedExperts(Part):
    """Experts in the place of one module, and how many times they have been averaged.

    Args:
        path: of the module, for messages.
        module: it.
        experts: modules of its kind.
        partition: which the modules of one FFN share.
        member: which of these it is.
        scale: of the gradients of experts' parameters.
        reminder: which all modules of the handle share.
    """

    replaces = True

    def __init__(
        self,
        path: str,
        module: nn.Module,
        experts: nn.ModuleList,
        partition: Partition,
        member: int,
        scale: float,
        reminder: Reminder,
    ) -> None:
        super().__init__()
        self.path, self.partition, self.member, self.scale = path, partition, member, scale
        self.experts = experts
        self.steps: Tensor
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._served = weakref.ref(module)
        self.own = [Own(name, p.detach().clone()) for name, p in module.named_parameters()]
        self._fresh: Stamp | None = None  # experts and mean as they were when the mean was taken
        self._checked = False
        self.reminder = reminder
        self._count: tuple[int, int, int] = (-1, -1, 0)
        self.register_state_dict_pre_hook(_with_fresh_mean)

    def __getstate__(self) -> dict[str, Any]:
        known = {"_fresh": None, "_count": (-1, -1, 0)}
        return {**self.__dict__, **known, "_served": self._served()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_served": weakref.ref(state["_served"])})

    # ---- its parameters -------------------------------------------------------------------------------

    def _means(self) -> dict[str, nn.Parameter]:
        """The module's own parameters, which hold the mean."""
        module = self._served()
        assert module is not None
        return {name: p for name, p in module.named_parameters() if not name.startswith(f"{RESERVED}.")}

    def groups(self) -> dict[str, list[Tensor]]:
        """Each parameter of all experts, by its name in the module."""
        every = [dict(expert.named_parameters()) for expert in self.experts]
        return {one.name: [expert[one.name] for expert in every] for one in self.own}

    def retired(self, module: nn.Module) -> list[nn.Parameter]:
        """The module's own: they hold the mean, and don't learn."""
        return [*self._means().values()]

    def settings_of(self, name: str) -> Sequence[Tensor]:
        """The module's own parameter of the same name."""
        return [self._means()[name.split(".", 2)[2]]]

    @torch.no_grad()
    def values_back(self) -> None:
        """What the module was before attach, or what a checkpoint of the bare model has made of it since."""
        means = self._means()
        for one in self.own:
            means[one.name].copy_(one.value)

    def _every(self) -> list[Tensor]:
        """What holds the mean, and all experts'."""
        return [*self._means().values(), *self.experts.parameters()]

    def is_fresh(self) -> bool:
        """Whether nobody has written anything since the mean was taken, as far as versions say."""
        return self._fresh is not None and self._fresh == _stamp(self._every())

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the module's own parameters up to the mean of the experts."""
        every = self._every()
        if self.merged or self.is_fresh() or any(p.is_meta for p in every):
            return
        self.check_whole()
        groups = self.groups()
        for name, own in self._means().items():
            local(own).copy_(mean_of([local(p) for p in groups[name]]))
        self._fresh = _stamp(every)

    def check_whole(self) -> None:
        """Raise where a process has another piece of each expert.

        Raises:
            OptxError: names the engine.
        """
        for name, group in self.groups().items():
            pieces = next(filter(None, map(pieces_of, group)), None)
            if pieces is not None:
                raise OptxError(
                    f"EWA: {name!r} of the experts of {self.path!r} is {pieces.what}, so they can't be "
                    f"averaged. {pieces.way_out}."
                )
            if len({str(getattr(p, "placements", "")) for p in group}) > 1:
                raise OptxError(
                    f"EWA: the experts of {self.path!r} have {name!r} sharded in different ways, so they "
                    "can't be averaged. Shard the module that they are in, or all of them alike."
                )

    def train(self, mode: bool = True) -> AveragedExperts:
        """As a module's; the mean is ready when training ends."""
        super().train(mode)
        if not mode:
            self._fresh = None  # an optimizer that writes into ``p.data`` leaves no version
            self.refresh()
        return self

    # ---- a call -----------------------------------------------------------------------------------------

    def around(
        self, call: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """In training experts compute an equal share of the tokens each; else their mean computes all."""
        if not self.training:
            if torch.is_grad_enabled() or torch.compiler.is_compiling():
                means = {name: mean_of(group).to(group[0].dtype) for name, group in self.groups().items()}
                return functional_call(self.experts[0], means, args, kwargs)
            self.refresh()
            return call(*args, **kwargs)
        x = hidden_of(args, kwargs)
        made = call_of(self.path, x, args, kwargs)
        order = self.partition.draw(self.member, x.shape[:-1].numel(), x.device)
        if not torch.compiler.is_compiling():
            if not self._checked and x.shape[:-1].numel() > 1:
                self._check_token_wise(x, args, kwargs)
                self._checked = True
            if self.reminder.wanted and self.member == 0 and torch.is_grad_enabled():
                self.reminder.look(self.path, next(self.experts[0].parameters()))
        return dealt(made, x, order, [*self.experts], self.scale)

    @torch.no_grad()
    def _check_token_wise(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise if what a token becomes depends on the others: dealt out, it would be another module.

        Raises:
            OptxError: it does.
        """
        expert: Callable[..., Any] = self.experts[0]
        states = [(inner, inner.training) for inner in self.experts[0].modules()]
        count = x.shape[:-1].numel()
        some = torch.arange(count - 1, -1, -2, device=x.device)

        def alone(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            rows = value.reshape(count, -1)[some]
            return rows.view(*(1,) * (x.ndim - 2), *rows.shape)

        try:
            self.experts[0].eval()
            whole = expert(*args, **kwargs)
            part = expert(*map(alone, args), **{name: alone(value) for name, value in kwargs.items()})
        finally:
            for inner, training in states:
                inner.training = training
        if not isinstance(whole, Tensor) or not isinstance(part, Tensor):
            return  # which is told where it is put together
        want = whole.reshape(count, -1)[some].float() if whole.shape[:-1] == x.shape[:-1] else None
        off = None if want is None else (part.reshape(want.shape).float() - want).norm()
        if want is None or off is None or bool(off > 0.02 * want.norm() + 1e-6):
            raise OptxError(
                f"EWA: what {self.path!r} makes of a token depends on the other tokens, so these can't be "
                "dealt out to experts. Leave that module out of targets: EWA serves feed-forward modules."
            )

    # ---- averaging --------------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        """How many steps have been taken; asks a device for it only if someone else wrote it."""
        place = self.steps.data_ptr(), self.steps._version  # pyright: ignore[reportPrivateUsage]
        if self._count[:2] != place:
            self._count = (*place, int(self.steps))
        return self._count[2]

    @torch.no_grad()
    def average(self, pull: float) -> None:
        """Count a step, and draw each expert towards the mean by this share of its distance.

        All of them are read before any is written; a pull of 0 writes into none. The module's own get the
        mean, so that who reads parameters has it; it is taken anew where it computes or is saved, as a
        resumed run takes it.
        """
        count = self.count + 1
        self.steps.fill_(count)
        self._count = (self.steps.data_ptr(), self.steps._version, count)  # pyright: ignore[reportPrivateUsage]
        self.reminder.wanted = False
        means = self._means()
        for name, group in self.groups().items():
            here = [local(p) for p in group]
            mean = mean_of(here)
            local(means[name]).copy_(mean)
            for p in here if pull else ():
                p.copy_(torch.lerp(p.to(mean.dtype), mean, pull))
        self._fresh = None

    def spread(self) -> Tensor:
        """The mean over experts of their distance from the mean, as a share of its norm."""
        groups = self.groups()
        means = {name: mean_of(group) for name, group in groups.items()}
        size = _norm(list(means.values()))
        off = [
            _norm([group[i].to(means[name].dtype) - means[name] for name, group in groups.items()])
            for i in range(len(self.experts))
        ]
        return torch.stack(off).mean() / size.clamp_min(torch.finfo(size.dtype).tiny)

    # ---- files and words --------------------------------------------------------------------------------

    def absent(self, prefix: str) -> dict[str, Any]:
        """A checkpoint of the bare model that has this module makes copies of it of all experts."""
        groups, means = self.groups(), self._means()
        if self._fresh is not None and self._fresh[: len(means)] == _stamp([*means.values()]):
            values: dict[str, Any] = groups
        else:
            values = {name: [p] * len(self.experts) for name, p in means.items()}
            self.own = [one._replace(value=means[one.name].detach().clone()) for one in self.own]
        found: dict[str, Any] = {
            f"{prefix}experts.{i}.{name}": p for name, group in values.items() for i, p in enumerate(group)
        }
        return {**found, f"{prefix}steps": self.steps}

    def note(self) -> str:
        """How many there are, and how often they have been averaged."""
        return f"{len(self.experts)} experts, averaged {self.count} times"


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([t.detach().norm() for t in tensors]).norm()


def _stamp(tensors: Sequence[Tensor]) -> Stamp:
    """What changes when someone writes into tensors, or moves them."""
    here = [local(t) for t in tensors]
    return tuple((t.data_ptr(), -1 if t.is_inference() else t._version) for t in here)  # pyright: ignore[reportPrivateUsage]


def _with_fresh_mean(part: nn.Module, prefix: str, keep_vars: bool) -> None:
    assert isinstance(part, AveragedExperts)
    part.refresh()
