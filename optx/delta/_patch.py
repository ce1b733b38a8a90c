"""`optx.patch`: changes laid over a live model's weights, which can be scaled and taken off again."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from optx._errors import MergeError, OptxError, ShapeError, check_choice, near
from optx.delta._float32_sums import wide
from optx.delta._options import PerModel, per_model

Change = Mapping[str, Tensor]


class Patch:
    """Changes on a model's weights: scale them, take them off, or keep them for good. `optx.patch` makes one.

    As a context manager it takes itself off at the end.

    Attributes:
        skipped: names that the model lacks or has in another shape, where ``strict=False`` let them pass.
    """

    def __init__(
        self, model: nn.Module, changes: Sequence[Change], factors: Sequence[float], strict: bool, repo: bool
    ) -> None:
        for i, change in enumerate(changes):
            if not isinstance(change, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise OptxError(f"patch: signatures[{i}] is a {type(change).__name__}; it is no signature.")
        self._changes, self._repo = list(changes), repo
        self._alpha = list(factors)
        self._overlay = _Overlay.of(model)
        self.skipped: list[str] = []
        # For each change: the tensor's name in the model -> its name in the change.
        self._places = [self._fit(change, i, strict) for i, change in enumerate(self._changes)]
        self._norms: dict[nn.Module, dict[str, Tensor]] = {}
        self._overlay.lay(self)

    @property
    def alpha(self) -> list[float]:
        """The scale of each change."""
        return list(self._alpha)

    @property
    def names(self) -> set[str]:
        """The model's tensors that are patched."""
        return {name for places in self._places for name in places}

    def set_alpha(self, index: int, value: float) -> None:
        """Give one change another scale; 0 takes it off, bit for bit if it is the only one.

        Raises:
            OptxError: there is no such change, or the patch is off.
            MergeError: the weights were changed since they were patched.
        """
        self._check_on("set_alpha")
        if not 0 <= index < len(self._alpha):
            raise OptxError(
                f"patch: set_alpha({index}, ...): there are {len(self._alpha)} changes, from 0 on."
            )
        old, self._alpha[index] = self._alpha[index], float(value)
        try:
            self._overlay.refresh(set(self._places[index]))
        except MergeError:
            self._alpha[index] = old
            raise

    def remove(self) -> None:
        """Take the patch off: without others, the weights are bit for bit what they were. Twice does nothing.

        Raises:
            MergeError: the weights were changed since they were patched (a step, a load, another dtype).
        """
        if self._overlay.takes_off(self):
            for norm, kept in self._norms.items():
                for name, value in kept.items():
                    _buffer(norm, name).copy_(value)

    def merge(self) -> None:
        """Leave the change in the weights for good, and forget what they were."""
        self._check_on("merge")
        self._overlay.bake(self)
        self._norms.clear()

    def recalibrate(self, batches: Iterable[Any], alpha: float = 1.0) -> None:
        """Estimate the running statistics of batch norms anew, by one pass; `remove` undoes it.

        Args:
            batches: inputs of the model, corrupted as what it shall be robust against.
            alpha: share of the new statistics; the rest is the old ones'.

        Raises:
            OptxError: the patch is off, the model has no batch norm with statistics, or there is no batch.
        """
        self._check_on("recalibrate")
        model = self._overlay.model
        kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
        norms = [m for m in model.modules() if isinstance(m, kinds) and m.track_running_stats]
        if not norms:
            raise OptxError("patch: recalibrate: the model has no batch norm with running statistics.")
        before = {norm: {n: b.clone() for n, b in norm.named_buffers()} for norm in norms}
        modes = {module: module.training for module in model.modules()}
        momenta = {norm: norm.momentum for norm in norms}
        try:
            model.eval()
            for norm in norms:
                norm.reset_running_stats()
                norm.train().momentum = None  # a cumulative average
            count = 0
            with torch.no_grad():
                for count, batch in enumerate(batches, 1):  # noqa: B007
                    model(batch)
            if not count:
                raise OptxError("patch: recalibrate: batches is empty.")
            for norm, old in before.items():
                for name in ("running_mean", "running_var"):
                    _buffer(norm, name).mul_(alpha).add_(old[name], alpha=1 - alpha)
                _buffer(norm, "num_batches_tracked").copy_(old["num_batches_tracked"])
        except BaseException:
            for norm, old in before.items():
                for name, value in old.items():
                    _buffer(norm, name).copy_(value)
            raise
        finally:
            for norm in norms:
                norm.momentum = momenta[norm]
            for module, mode in modes.items():
                module.training = mode
        for norm, old in before.items():
            self._norms.setdefault(norm, old)

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def terms(self, name: str) -> list[tuple[float, Tensor]]:
        """What is added to one tensor of the model: factors and changes."""
        n = len(self._changes)
        found: list[tuple[float, Tensor]] = []
        for alpha, change, places in zip(self._alpha, self._changes, self._places, strict=True):
            if name in places and alpha:
                found.append(((alpha / n) ** 2 if self._repo else alpha, change[places[name]]))
        return found

    def _fit(self, change: Change, index: int, strict: bool) -> dict[str, str]:
        own, found = self._overlay.tensors(), dict[str, str]()
        for name in change:
            if name not in own:
                if strict:
                    raise OptxError(
                        f"patch: signatures[{index}] has {name!r}, which the model lacks. {near(name, own)} "
                        "strict=False leaves such tensors out."
                    )
            elif (shape := tuple(change[name].shape)) != tuple(own[name].shape):
                if strict:
                    raise ShapeError(
                        f"patch: {name!r} has shape {shape} in signatures[{index}] and "
                        f"{tuple(own[name].shape)} in the model. strict=False leaves such tensors out."
                    )
            else:
                found[self._overlay.first_name(name)] = name
                continue
            self.skipped.append(name)
        if not found:
            raise OptxError(f"patch: no tensor of signatures[{index}] fits the model by name and shape.")
        return found

    def _check_on(self, what: str) -> None:
        if self not in self._overlay.patches:
            raise OptxError(f"patch: {what}: the patch was taken off or merged.")


class _Overlay:
    """What lies on one model: the patches, and the weights under them."""

    _known: ClassVar[weakref.WeakKeyDictionary[nn.Module, _Overlay]] = weakref.WeakKeyDictionary()

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self.patches: list[Patch] = []
        self._under: dict[str, Tensor] = {}
        self._stamps: dict[str, tuple[int, int]] = {}

    @classmethod
    def of(cls, model: nn.Module) -> _Overlay:
        if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise OptxError(
                f"patch: model is a {type(model).__name__}; it must be a module. For a checkpoint on disk, "
                "use signature.delta().apply(checkpoint, out)."
            )
        return cls._known.setdefault(model, cls(model))

    @property
    def model(self) -> nn.Module:
        """The patched model; a patch does not keep it alive."""
        model = self._model()
        if model is None:
            raise OptxError("patch: the model is gone.")
        return model

    def tensors(self) -> dict[str, Tensor]:
        """The model's floating tensors, tied ones under each of their names."""
        return {n: t for n, t in self.model.state_dict(keep_vars=True).items() if t.is_floating_point()}

    def first_name(self, name: str) -> str:
        """The first of a tied tensor's names."""
        tensors = self.tensors()
        return next(other for other, tensor in tensors.items() if tensor is tensors[name])

    def lay(self, patch: Patch) -> None:
        """Put one more on top."""
        self.patches.append(patch)
        try:
            self.refresh(patch.names)
        except BaseException:
            self.patches.remove(patch)
            raise

    def takes_off(self, patch: Patch) -> bool:
        """Take one away, wherever it lies; whether it was there."""
        if patch not in self.patches:
            return False
        place = self.patches.index(patch)
        self.patches.remove(patch)
        try:
            self.refresh(patch.names)
        except BaseException:
            self.patches.insert(place, patch)
            raise
        return True

    def bake(self, patch: Patch) -> None:
        """Make one part of what lies under the others."""
        names, tensors = patch.names, self.tensors()
        self._check_untouched(names, tensors)
        self.patches.remove(patch)
        for name in names:
            self._under[name] = _sum(self._under[name], patch.terms(name))
        self.refresh(names)

    @torch.no_grad()
    def refresh(self, names: set[str]) -> None:
        """Compute some tensors anew from what lies under them; those without a patch are let go."""
        tensors = self.tensors()
        self._check_untouched(names, tensors)
        covered = {name for patch in self.patches for name in patch.names}
        for name in names:
            tensor = tensors[name]
            under = self._under.setdefault(name, tensor.detach().clone())
            tensor.copy_(_sum(under, [term for patch in self.patches for term in patch.terms(name)]))
            self._stamps[name] = _stamp(tensor)
            if name not in covered:
                del self._under[name], self._stamps[name]

    def _check_untouched(self, names: set[str], tensors: Mapping[str, Tensor]) -> None:
        for name in names & self._stamps.keys():
            if name not in tensors or _stamp(tensors[name]) != self._stamps[name]:
                raise MergeError(
                    f"patch: {name!r} was changed since it was patched (a step, a load, or a move to another "
                    "device or dtype), so the kept copy is not what it should go back to. Take patches off "
                    "before the weights are changed."
                )


def patch(
    model: nn.Module,
    signatures: Sequence[Change],
    alpha: PerModel = 1.0,
    *,
    strict: bool = True,
    compat: Literal["repo"] | None = None,
) -> Patch:
    """Add signatures to a model's weights, in place: weight + sum of alpha_c * signature_c.

    The handle scales them, takes them off again bit for bit, or keeps them for good. It keeps a copy of the
    tensors that it changes; where several patches lie on one model, they come off in any order.

    Args:
        model: the clean model, or a later one of the same architecture.
        signatures: one or several, as from `optx.rws.extract`; any mapping of name to change will do.
        alpha: the scale of each, or one for all.
        strict: False leaves out tensors that the model lacks or has in another shape (a new classifier), and
            lists them in ``handle.skipped``.
        compat: ``"repo"`` scales as the authors' code does, which divides alpha by the number of signatures
            and applies it twice: (alpha / n)^2.

    Paper values:
        ``alpha=1.0``: one corruption, and the code's setting for several (the default).
        ``compat="repo"``: the scales that its code has in truth.

    Limits: Clean accuracy falls as the corrupted one rises. A network with batch norms needs
    `Patch.recalibrate`.

    Keywords: RWS, robustness, corruptions, weight signatures.

    Evidence: ``optx run merge``; ``test_rws.py``.

    Raises:
        OptxError: a name that the model lacks, or nothing fits.
        ShapeError: a tensor has another shape; names it.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> before = model.weight.detach().clone()
        >>> handle = optx.patch(model, [{"weight": torch.ones(1, 2)}], alpha=0.5)
        >>> model.weight.detach() - before
        tensor([[0.5000, 0.5000]])
        >>> handle.remove()
        >>> torch.equal(model.weight, before)
        True

    Source: arXiv 2302.12480, section 3.
    """
    check_choice("patch", "compat", compat, ("repo", None))
    if isinstance(signatures, Mapping) or not len(signatures):
        raise OptxError("patch: signatures must be a list of at least one signature.")
    factors = per_model("patch", "alpha", alpha, len(signatures), "signatures")
    return Patch(model, signatures, factors, strict, compat == "repo")


def _sum(under: Tensor, terms: Sequence[tuple[float, Tensor]]) -> Tensor:
    """Under + factor * change + ..., rounded once; without changes, every bit of it."""
    if not terms:
        return under
    summed = under.to(wide(under.dtype), copy=True)
    for factor, change in terms:
        summed.add_(change.to(summed.device, summed.dtype), alpha=factor)
    return summed.to(under.dtype)


def _stamp(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor._version  # pyright: ignore[reportPrivateUsage]


def _buffer(module: nn.Module, name: str) -> Tensor:
    return cast(Tensor, getattr(module, name))
