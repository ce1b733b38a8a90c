"""A running average of a model's weights, held by a copy of the model that computes with it."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase as BatchNorm  # pyright: ignore[reportPrivateUsage]
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from optx._errors import FileError, OptxError
from optx._names import is_dtensor
from optx._pieces import pieces_of

_Held = dict[str, Tensor | None]
_copy_: Callable[..., None] = getattr(torch, "_foreach_copy_")  # noqa: B009 (public in all but its name)
_lerp_: Callable[..., None] = getattr(torch, "_foreach_lerp_")  # noqa: B009
_HALVES = (torch.float16, torch.bfloat16)


class _Place(NamedTuple):
    """Where a tensor of the model is, by module, as tensors get replaced; and its likeness in the copy."""

    path: str
    tensors: _Held
    likenesses: _Held
    name: str
    trained: bool

    @property
    def live(self) -> Tensor:
        return cast("Tensor", self.tensors[self.name])

    @property
    def likeness(self) -> Tensor:
        return cast("Tensor", self.likenesses[self.name])


class EMACopy:
    """v <- beta v + (1 - beta) theta, once for each optimizer step, beginning with v = theta.

    Parameters that are frozen are the model's own, not copies; tied ones stay tied. Half precision is
    averaged in float32, where small changes are not lost. Running statistics of batch norms are averaged too,
    as the averaged weights give them; all other buffers are copied.

    Args:
        owner: who asks, for messages.
        model: the model that is trained; DDP's and torch.compile's wrappers are looked through.
        beta: the share that stays.
    """

    def __init__(self, owner: str, model: nn.Module, beta: float) -> None:
        self.owner, self.beta, self.steps = owner, beta, 0
        self.live = _unwrapped(model)
        self._refuse()
        self.module = self._copied()
        places = list(self._paired())
        self._averaged = [place for place in places if place.trained or _is_statistic(place, self.live)]
        self._trained = [place.trained for place in self._averaged]
        paths = {place.path for place in self._averaged}
        parameters = {id(p) for p in self.live.parameters()}
        self._buffers = [p for p in places if p.path not in paths and id(p.live) not in parameters]
        self._frozen = [p for p in places if p.path not in paths and id(p.live) in parameters]
        self._names = {name for name, _ in self.live.named_parameters()}
        # Halves have an average of their own; of all others the copy's weights are the average.
        self._apart = {p.path: p.likeness.data.float() for p in self._averaged if p.likeness.dtype in _HALVES}
        self._stepped, self._version, self._swapped, self.told = True, -1, False, False
        _notice_steps(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy, or one out of a pickle, is told of steps too."""
        self.__dict__.update(state)
        _notice_steps(self)

    # ---- making -----------------------------------------------------------------------------------------

    def _refuse(self) -> None:
        for name, p in self.live.named_parameters():
            pieces = pieces_of(p)
            if pieces is not None:
                raise OptxError(
                    f"{self.owner}: {name!r} is {pieces.what}, so no average can be kept of it; train under "
                    "DDP, or use optx.SAF."
                )
            if is_dtensor(p):
                raise OptxError(
                    f"{self.owner}: {name!r} is sharded (FSDP2 or another DTensor), of which no average is "
                    "kept; train under DDP, or use optx.SAF."
                )
        if not any(p.requires_grad for p in self.live.parameters()):
            raise OptxError(
                f"{self.owner}: this {type(self.live).__name__} has no parameter that is trained."
            )

    def _copied(self) -> nn.Module:
        """In eval mode, without gradients, sharing what is frozen."""
        parameters = list(self.live.parameters())
        shared = {id(p): p for p in parameters if not p.requires_grad}
        gradients = [p.grad for p in parameters]
        try:
            for p in parameters:
                p.grad = None  # a copy would have one of its own
            made = copy.deepcopy(self.live, dict(shared))  # type: ignore[arg-type]
        except (RuntimeError, TypeError) as error:
            raise OptxError(
                f"{self.owner}: this {type(self.live).__name__} can't be copied: {error}."
            ) from None
        finally:
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad = gradient
        for p in made.parameters():
            if id(p) not in shared:
                p.requires_grad_(False)
        return made.eval()

    def _paired(self) -> Iterator[_Place]:
        """Every tensor once, the model's beside the copy's."""
        seen: set[int] = set()
        likenesses = dict(self.module.named_modules())
        for path, module in self.live.named_modules():
            other = likenesses[path]
            for held in ("_parameters", "_buffers"):
                mine: _Held = getattr(module, held)
                theirs: _Held = getattr(other, held)
                for name, live in mine.items():
                    if live is not None and id(live) not in seen:
                        seen.add(id(live))
                        yield _Place(f"{path}.{name}".lstrip("."), mine, theirs, name, live.requires_grad)

    # ---- following --------------------------------------------------------------------------------------

    @torch.no_grad()
    def follow(self) -> None:
        """Take the weights as they are into the average, if there was a step since the last time."""
        if self._swapped:
            raise OptxError(
                f"{self.owner}: the model has its averaged weights (swap_ema), which are not trained."
            )
        if self._frozen:
            self._share_again()
        live = self._live
        version = self._counted(live)
        if not self._stepped and version == self._version:
            self._check_unseen(live)
            return
        self._check(live)
        self._stepped, self._version, self.steps = False, version, self.steps + 1
        wide = self._wide
        if self.steps == 1:
            _copy_(wide, live)
        else:
            now = [p if p.dtype == w.dtype else p.to(w.dtype) for p, w in zip(live, wide, strict=True)]
            _lerp_(wide, now, 1 - self.beta)
        if self._apart:
            self._narrow()
        for place in self._buffers:
            if place.likeness.shape != place.live.shape:  # a cache that has grown
                place.likeness.data = place.live.clone()
        if self._buffers:
            live = [place.live for place in self._buffers]
            _copy_([place.likeness for place in self._buffers], live)

    def _share_again(self) -> None:
        """Frozen parameters that were replaced, by ``load_state_dict(assign=True)`` for one."""
        for place in self._frozen:
            if (old := place.likeness) is not place.live:
                for module in self.module.modules():
                    mine: _Held = getattr(module, "_parameters")  # noqa: B009
                    mine.update({name: place.live for name, held in mine.items() if held is old})

    def _check_unseen(self, live: list[Tensor]) -> None:
        """Raise if weights are no longer those that the average began with, and no step was seen."""
        if self.steps == 1 and not self.told:
            began = zip(self._averaged, live, self._wide, strict=True)
            if any(p.trained and not torch.equal(now.to(w.dtype), w) for p, now, w in began):
                raise OptxError(
                    f"{self.owner}: the weights change, but by no optimizer of torch's and past autograd's "
                    f"notice (p.data); call {self.owner.lower()}.stepped() after each step."
                )

    def tell(self) -> None:
        """Say that there was a step, which nothing else notices."""
        self.told = self._stepped = True

    def _counted(self, live: list[Tensor]) -> int:
        """Autograd's count of writes. Kernels and ``.data`` write past it: a hook tells of optimizers."""
        return sum(p._version for p, trained in zip(live, self._trained, strict=True) if trained)

    @property
    def _likenesses(self) -> list[Tensor]:
        return [cast("Tensor", likenesses[name]) for _, _, likenesses, name, _ in self._averaged]

    @property
    def _live(self) -> list[Tensor]:
        """The model's tensors that are averaged."""
        return [cast("Tensor", tensors[name]) for _, tensors, _, name, _ in self._averaged]

    def stepped(self, optimizer: Optimizer) -> None:
        """An optimizer has stepped: does it train this model?"""
        if not self._stepped:
            own = set(map(id, self._live))
            self._stepped = any(id(p) in own for group in optimizer.param_groups for p in group["params"])

    @property
    def _wide(self) -> list[Tensor]:
        if not self._apart:
            return self._likenesses
        return [self._apart.get(place.path, place.likeness) for place in self._averaged]

    def _narrow(self) -> None:
        """Give the copy what was averaged with more bits."""
        for place in self._averaged:
            if place.path in self._apart:
                place.likeness.copy_(self._apart[place.path])

    def _check(self, live: list[Tensor]) -> None:
        self._check_shapes()
        if live[0].device != self._averaged[0].likeness.device:  # after model.to(device)
            self.module.to(live[0].device)
            self._apart = {path: wide.to(live[0].device) for path, wide in self._apart.items()}

    def _check_shapes(self) -> None:
        for place, live, likeness in zip(self._averaged, self._live, self._likenesses, strict=True):
            plain = type(live) in (nn.Parameter, Tensor)
            if (not plain and is_dtensor(live)) or live.shape != likeness.shape:
                raise OptxError(
                    f"{self.owner}: {place.path!r} was sharded or reshaped since {self.owner} was made, so "
                    "no average of it is kept."
                )

    def check_names(self) -> None:
        """Raise if the model has got or lost parameters, was sharded, or trains what was frozen.

        Between a forward and a backward pass it may not show: FSDP2's are whole then.
        """
        self._check_shapes()
        if changed := self._names ^ {name for name, _ in self.live.named_parameters()}:
            raise OptxError(
                f"{self.owner}: the model's parameters changed since {self.owner} was made "
                f"({sorted(changed)[0]!r}); make it after all that is attached, or again."
            )
        if thawed := next((place.path for place in self._frozen if place.live.requires_grad), None):
            raise OptxError(
                f"{self.owner}: {thawed!r} was frozen when {self.owner} was made, so it has no average, and "
                "it is trained now; make it again."
            )

    @contextmanager
    def swapped(self) -> Generator[None]:
        """The model with the averaged weights; its own come back bit for bit."""
        if self._swapped:
            raise OptxError(f"{self.owner}: swap_ema is on already.")
        if not self.steps:
            raise OptxError(f"{self.owner}: there is no average before the first call in training.")
        self._exchange()
        self._swapped = True
        try:
            yield
        finally:
            self._swapped = False
            self._exchange()

    def _exchange(self) -> None:
        for place in self._averaged:
            live, likeness = place.live, place.likeness
            live.data, likeness.data = likeness.data, live.data

    # ---- state ------------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes that are held besides the model's own."""
        kept = [*self._apart.values(), *(place.likeness for place in (*self._averaged, *self._buffers))]
        return sum(t.numel() * t.element_size() for t in kept)

    def state(self) -> dict[str, Any]:
        """The averages by name, copied, buffers too."""
        averages = {place.path: wide.clone() for place, wide in zip(self._averaged, self._wide, strict=True)}
        behind = self._stepped or self._counted(self._live) != self._version
        return {
            "steps": self.steps,
            "behind": behind,
            "tensors": averages | {p.path: p.likeness.clone() for p in self._buffers},
        }

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """Take over averages, all or nothing; the model has its weights already."""
        mine = dict(zip((place.path for place in self._averaged), self._wide, strict=True))
        mine |= {place.path: place.likeness for place in self._buffers}
        given: dict[str, Tensor] = state["tensors"]
        if wrong := sorted(mine.keys() ^ given.keys()):
            raise FileError(
                f"{self.owner}: the state and this model differ in {wrong[0]!r}, which only one of them has."
            )
        for name, tensor in mine.items():
            if given[name].shape != tensor.shape:
                raise FileError(
                    f"{self.owner}: {name!r} has shape {tuple(given[name].shape)} in the state and "
                    f"{tuple(tensor.shape)} here."
                )
        for name, tensor in mine.items():
            tensor.copy_(given[name])
        self._narrow()
        self.steps, self._stepped, self._version = state["steps"], state["behind"], self._counted(self._live)


def _unwrapped(model: Any) -> nn.Module:
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def _is_statistic(place: _Place, model: nn.Module) -> bool:
    path, _, name = place.path.rpartition(".")
    return name in ("running_mean", "running_var") and isinstance(model.get_submodule(path), BatchNorm)


def _notice_steps(ema: EMACopy) -> None:
    """Have it know when an optimizer has stepped, as long as it is there."""
    reference = weakref.ref(ema)

    def tell(optimizer: Optimizer, *_: Any) -> None:
        if (one := reference()) is not None:
            one.stepped(optimizer)

    weakref.finalize(ema, register_optimizer_step_post_hook(tell).remove)
