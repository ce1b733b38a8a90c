"""What `optx.attach` returns: everything that was added, and every way to be rid of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from optx._errors import MergeError, OptxError
from optx._names import placed_like, whole
from optx.inject import _folder, _followed, _merge, _offload
from optx.inject._injection import Injection
from optx.inject._install import uninstall
from optx.inject._metrics import collect
from optx.inject._param_groups import param_groups
from optx.inject._part import Part, attached
from optx.inject._quantised import Rounding, numbers, warn_of_rounding
from optx.inject._report import Report, Row
from optx.inject._served import Served
from optx.inject._stored import check_tensors
from optx.inject._trained_whole import Saved, act, rest
from optx.inject._watch import Watch, check_there, gone
from optx.step.following import Followed, Joining
from optx.step.transform import Transform

if TYPE_CHECKING:
    from typing_extensions import Self


class Handle(Followed):
    """What was attached to a model: trains, saves, merges, rests, and comes off without a trace.

    As a context manager it removes itself at the end, also after an exception.

    Attributes:
        model: the model that is served.
        injection: what was attached.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> with optx.attach(model, optx.LoRA(rank=2), targets="0") as handle:
        ...     sum(p.numel() for p in handle.parameters())
        16
        >>> list(model.state_dict())
        ['0.weight', '0.bias']
    """

    def __init__(
        self, model: nn.Module, injection: Injection, served: Sequence[Served], saved: Sequence[Saved] = ()
    ) -> None:
        self.model = model
        self.injection = injection
        self.served = list(served)
        self.saved = list(saved)
        self._on_removal: list[Callable[[Handle], None]] = []
        self._removed = False
        self._lost: dict[str, Rounding] | None = None  # by a merge for good
        self._watch = Watch(model, self.served)
        self.served[0].hooks.append(self._watch)  # they go with the parts

    # ---- life ---------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Take everything off: weights, buffers, hooks, flags and keys are what they were before.

        Modules that were trained whole (``modules_to_save``) get their old values back. Other handles on the
        same modules keep working. Removing twice does nothing.

        Raises:
            MergeError: merged weights were changed since; nothing is removed.
        """
        if self._removed:
            return
        self._unfold([one for one in self.served if one.part.merged])
        self._take_off(restore=True)

    def _take_off(self, *, restore: bool) -> None:
        uninstall(self.served, self.saved, restore=restore)
        self._removed = True
        for notify in self._on_removal:
            notify(self)

    @property
    def removed(self) -> bool:
        """Whether it has been taken off."""
        return self._removed

    def enable(self) -> None:
        """Let it act again after `disable`."""
        for one in self.served:
            one.part.enabled = True
        for kept in self.saved:
            act(kept.module, kept.values)

    def disable(self) -> _Disabled:
        """Let the model compute as without it, until `enable` or the end of a ``with handle.disable():``.

        Modules trained whole have their own values for that time. What is merged stays merged.
        """
        states = [(one.part, one.part.enabled) for one in self.served]
        for one in self.served:
            one.part.enabled = False
        acting = [kept for kept in self.saved if kept.values.resting is None and rest(kept.module)]
        return _Disabled(states, acting)

    # ---- weights ------------------------------------------------------------------------------------

    @property
    def merged(self) -> bool:
        """Whether it is in the weights now."""
        return any(one.part.merged for one in self.served)

    def merge(self, *, untie: bool = False) -> None:
        """Fold everything into the served weights, which then compute the same without hooks.

        Sums are taken in float32 (float64 for such weights) and rounded once. A copy of each served weight
        and bias is kept until `unmerge`: as many bytes as they have.

        Weights that are codes (bitsandbytes, torchao) are read, added to and rounded to such codes again. A
        warning says what that cost, and `rounding` has it by module, as long as it is merged; `unmerge`
        gives the old codes back.

        Args:
            untie: a served weight that other modules share (a head that is the embedding) gets a copy of
                its own, which `unmerge` gives up again. Without it such a merge is refused, for it would
                change the other modules too.

        Raises:
            MergeError: the method has no equal in weights, a weight is tied, or it is none that can be
            written
                (derived, sharded, offloaded, codes of an unknown kind); nothing is changed.
        """
        self._check_alive("merge")
        check_there(self.model, self.served, "merge")
        self._watch.look(self.model)
        todo = [one for one in self.served if not one.part.merged and not one.part.weightless]
        for one in todo:
            _container(one).check_filled("merge")
            _merge.check_mergeable(one.module, one.part, one.path, type(one.injection).__name__)
        self._untie(todo, allowed=untie)
        done: list[Served] = []
        try:
            for one in todo:
                _merge.merge(one.module, _container(one), one.part, one.path)
                done.append(one)
        except BaseException:
            for one in reversed(done):
                _merge.unmerge(one.module, _container(one), one.part, one.path)
            self._retie()
            raise
        warn_of_rounding(self.rounding)

    @property
    def rounding(self) -> dict[str, Rounding]:
        """What merging has cost each quantised weight, by module: its codes had to be rounded again.

        Each has ``kind`` (the codes), ``relative`` and ``of_change`` (the error's norm as a share of the
        merged weight's and of the change's) and ``largest`` (of one element). It is empty before `merge` and
        after `unmerge` and `remove`, which undo it; after `merge_and_unload` it stays.
        Without that loss: ``model.dequantize()`` (transformers), attach the saved folder to that, merge.
        """
        if self._lost is not None:
            return dict(self._lost)
        return {
            one.path: found.rounding
            for one in self.served
            if one.part.merged and (found := _container(one).requantised) is not None
        }

    def unmerge(self) -> None:
        """Give the weights back, bit-identical to before `merge`, and let the hooks act again.

        Raises:
            MergeError: a merged weight was changed since, or another handle is merged on top of this one and
                doesn't commute with it; nothing is changed.
        """
        merged = [one for one in self.served if one.part.merged]
        leaving = {one.part for one in merged}
        for one in merged:
            _merge.check_last(_container(one), one.part, one.path, leaving)
        self._unfold(merged)

    def _unfold(self, merged: Sequence[Served]) -> None:
        for one in merged:
            _merge.check_untouched(one.module, _container(one), one.path)
        for one in merged:
            _merge.unmerge(one.module, _container(one), one.part, one.path)
        self._retie()

    def merge_and_unload(self, *, untie: bool = False) -> nn.Module:
        """Merge for good and take everything off: the bare model with the new weights.

        What it cost quantised weights is in a warning, and in `rounding`.

        Raises:
            MergeError: as `merge`, or something else is merged into the same module.
        """
        self._check_alive("merge_and_unload")
        own = {one.part for one in self.served}
        for one in self.served:
            if any(part.merged and part not in own for part in _container(one).parts.values()):
                raise MergeError(
                    f"merge_and_unload: something else is merged into {one.path!r}. Unmerge it first."
                )
        self.merge(untie=untie)
        self._lost = self.rounding
        for one in self.served:
            _merge.forget(_container(one), one.part)
        for kept in self.saved:
            act(kept.module, kept.values)
        self._take_off(restore=False)
        return self.model

    def _untie(self, served: Sequence[Served], *, allowed: bool) -> None:
        owners: dict[int, list[str]] = {}
        for name, p in self.model.named_parameters(remove_duplicate=False):
            owners.setdefault(id(p), []).append(name)
        tied = [
            (one, name, shared)
            for one in served
            for name in ("weight", "bias")
            if isinstance(shared := getattr(one.module, name, None), nn.Parameter)
            and len(owners.get(id(shared), [])) > 1
        ]
        if tied and not allowed:
            one, name, shared = tied[0]
            raise MergeError(
                f"merge: {one.path}.{name} is tied: {', '.join(owners[id(shared)])} are one tensor, and "
                f"a merge would change them all. Pass untie=True to give this module a {name} of its own."
            )
        for one, name, _ in tied:
            _merge.untie(one.module, _container(one), name)

    def _retie(self) -> None:
        for one in self.served:
            _merge.retie(one.module, _container(one))

    # ---- tensors ------------------------------------------------------------------------------------

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What there is to train, by its name in the model."""
        for one in self.served:
            for name, p in one.part.named_parameters():
                yield f"{one.part_path}.{name}", p
        for kept in self.saved:
            for name, p in kept.module.named_parameters():
                yield f"{kept.path}.{name}", p

    def parameters(self) -> list[nn.Parameter]:
        """What there is to train, for an optimizer.

        Example:
            >>> import torch, optx
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
            >>> handle = optx.attach(model, optx.LoRA(rank=2), targets="0")
            >>> opt = torch.optim.AdamW(handle.parameters(), lr=1e-3)
        """
        return [p for _, p in self.named_parameters()]

    def param_groups(
        self,
        *,
        lr: float,
        ratio: float | None = None,
        weight_decay: float = 0.0,
        embedding_lr: float | None = None,
    ) -> list[dict[str, Any]]:
        """What there is to train, as groups for an optimizer; with ``ratio``, those of LoRA+.

        LoRA+ (arXiv 2402.12354) lets B learn faster than A. Trainers that have it recommend ``ratio=16``; its
        authors' README says to take more for harder tasks, with half of LoRA's usual ``lr``.

        Args:
            lr: the rate, of A in LoRA+.
            ratio: LoRA+: B learns at ``lr`` times this, and so do biases, DoRA's magnitudes and other
                vectors; A, and the matrices of modules trained whole, at ``lr``. None: one rate for all.
            weight_decay: of matrices, and in LoRA+ of magnitudes; biases and other vectors have none.
            embedding_lr: of both factors of embeddings. None: 1e-6 in LoRA+ (as the authors and PEFT have
                it), else ``lr``.

        Returns:
            Groups with ``params``, ``lr`` and ``weight_decay``; every parameter is in one.

        Raises:
            OptxError: a number out of range, or ``ratio`` where there is no LoRA.

        Example:
            >>> import torch, optx
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
            >>> handle = optx.attach(model, optx.LoRA(rank=2), targets="0")
            >>> opt = torch.optim.AdamW(handle.param_groups(lr=1e-4, ratio=16))
            >>> [group["lr"] for group in opt.param_groups]
            [0.0001, 0.0016]
        """
        return param_groups(
            self,
            lr=lr,
            ratio=ratio,
            weight_decay=weight_decay,
            embedding_lr=embedding_lr,
        )

    def whole(self) -> list[nn.Parameter]:
        """All parameters of the model, with what was attached; for `wrap`."""
        return list(self.model.parameters())

    def joining(self) -> list[Joining]:
        """What there is to train, with the parameters whose param groups it belongs to; for `wrap`."""
        return _followed.joining(self)

    def leaving(self) -> list[nn.Parameter]:
        """The parameters of served modules that take no part while this is attached; for `wrap`."""
        return _followed.leaving(self)

    def transforms(self) -> list[Transform]:
        """New ones of what the method does in a step or after it; ``optx.wrap(optimizer, handle)`` asks."""
        return list(self.injection.transforms(self))

    def _tensors(self) -> dict[str, Tensor]:
        check_there(self.model, [*self.served, *self.saved], "state_dict")
        found: dict[str, Tensor] = {}
        for one in self.served:
            suffixes = one.part.suffixes()
            for name, tensor in one.part.tensors().items():
                found[f"{one.path}.{suffixes.get(name, f'{one.name}.{name}')}"] = tensor
        for kept in self.saved:
            for name, tensor in kept.tensors().items():
                found[f"{kept.path}.{name}"] = tensor
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """Only what was added (and modules trained whole), by the served module's path.

        LoRA's keys are PEFT's without its ``base_model.model.``: ``layers.0.q_proj.lora_A.weight``. Of a
        sharded model (FSDP2) the tensors are whole, so that every process must call it, as `save`.
        """
        return {key: whole(tensor.detach()) for key, tensor in self._tensors().items()}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load what `state_dict` gave; every key and shape is checked before anything changes.

        Raises:
            FileError: a key is missing or unknown, or a shape differs; names it.
            MergeError: it is merged: the weights would no longer be those of the adapter.
        """
        if self.merged:
            raise MergeError("load_state_dict: the adapter is merged into the weights. Call unmerge() first.")
        own = self._tensors()
        for one in self.served:
            _offload.check_writable(one.part, one.path)
        check_tensors(state_dict, own)
        with torch.no_grad():
            for key, tensor in own.items():
                tensor.copy_(placed_like(state_dict[key], tensor))

    def save(self, path: str | PathLike[str]) -> None:
        """Write a folder that `optx.attach(model, path)` reads, and PEFT too where it knows the method.

        LoRA, DoRA, IA3 and prefix tuning of causal language models are written as PEFT's
        ``adapter_config.json`` and ``adapter_model.safetensors``; everything else as
        ``optx_adapter.safetensors``. A README.md with base, method, options and figures goes along, as the
        Hub's model card. The folder appears as a whole, or takes the place of an earlier save as a whole; in
        one that holds other files too, which stay, each file does. A README.md of your own is not replaced.

        Raises:
            OptxError: ``path`` is a file.
            OSError: nothing can be written there, or the disk is full; what was there is as it was.
        """
        self._check_alive("save")
        check_there(self.model, [*self.served, *self.saved], "save")
        for one in self.served:
            _container(one).check_filled("save")
        _folder.save(self, path)

    def load(self, path: str | PathLike[str]) -> None:
        """Load tensors that `save` wrote for the same injection and targets.

        Raises:
            FileError: the file is damaged, or for another model or injection; nothing is changed.
        """
        _folder.load(self, path)

    # ---- words --------------------------------------------------------------------------------------

    def report(self) -> Report:
        """What was added where, and how many numbers it trains; prints as a table.

        A module that is not in the model any more is said to be gone: what was added to it acts nowhere.
        """
        lost = {id(one) for one in gone(self.model, [*self.served, *self.saved])}
        rows = [
            Row(
                one.path,
                str(one.injection),
                one.part.note() + (", gone from the model" if id(one) in lost else ""),
                one.part.trainable(),
                _count(one.part),
            )
            for one in self.served
        ]
        for kept in self.saved:
            count = sum(numbers(p) for p in kept.module.parameters())
            what = type(kept.module).__name__ + (", gone from the model" if id(kept) in lost else "")
            rows.append(Row(kept.path, "trained whole", what, count, count))
        return Report(rows, sum(numbers(p) for p in self.model.parameters()))

    def metrics(self) -> dict[str, float]:
        """Plain numbers for a log; names begin with the adapter's (``lora/``, or `attach`'s ``name``).

        They are as things are now; what there has been no call for yet is not among them. Nothing is
        communicated: norms of what is sharded (DTensor) are left out. On a GPU it waits for it, once.

        ========================== ===========================================================================
        name                       what it is
        ========================== ===========================================================================
        ``<adapter>/trainable``    how many numbers an optimizer can move
        ``<adapter>/merged``       1 while it is in the weights, else 0
        ``<adapter>/norm``         l2 norm of what is trained
        ``<adapter>/change_norm``  l2 norm of what is added to weights or biases: LoRA (not DoRA), FLoRA,
                                   SVFit, BitFit, Perp's plain LoRA; of all its modules together
        ``<adapter>/kept``         FTWT, WindowPrune: share of filters or windows that the last call kept
        ``<adapter>/loss``         FTWT, WindowPrune, WideNet: the handle's own loss as last taken
        ``<adapter>/agreement``    FTWT: share of the last training call's filters predicted right
        ``<adapter>/beta``         EWA: the share rate of the last averaging
        ``<adapter>/spread``       EWA: experts' distance from their mean, as a share of its norm
        ``<adapter>/dropped``      WideNet: share of choices in the last training call that found a full queue
        ``<adapter>/value/<name>`` STN: a hyperparameter's value now
        ``<adapter>/sigma/<name>`` STN: the scale of its perturbations
        ========================== ===========================================================================

        Raises:
            OptxError: it has been removed.

        Example:
            >>> import torch, optx
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
            >>> handle = optx.attach(model, optx.LoRA(rank=2), targets="0")
            >>> {name: handle.metrics()[name] for name in ("lora/trainable", "lora/change_norm")}
            {'lora/trainable': 16.0, 'lora/change_norm': 0.0}
        """
        self._check_alive("metrics")
        return collect(self)

    def __len__(self) -> int:
        return len(self.served)

    def __repr__(self) -> str:
        state = "removed" if self._removed else "merged" if self.merged else "attached"
        return f"<{self.injection} on {len(self.served)} modules, {state}>"

    def _check_alive(self, doing: str) -> None:
        if self._removed:
            raise OptxError(f"{doing}: this handle has been removed from its model. Attach again.")

    def on_removal(self, notify: Callable[[Handle], None]) -> None:
        """Call ``notify(handle)`` once it has been taken off."""
        self._on_removal.append(notify)


class _Disabled:
    """Gives back at the end of a ``with`` what `Handle.disable` switched off."""

    def __init__(self, states: Sequence[tuple[Part, bool]], acting: Sequence[Saved]) -> None:
        self._states, self._acting = states, acting

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        for part, enabled in self._states:
            part.enabled = enabled
        for kept in self._acting:
            act(kept.module, kept.values)


def _container(one: Served) -> Any:
    return attached(one.module)


def _count(part: Part) -> int:
    return sum(t.numel() for t in part.tensors().values())
