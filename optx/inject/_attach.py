"""`optx.attach`: add an injection to the modules of a model that someone else wrote."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, TypeVar, overload, runtime_checkable

from torch import Tensor, nn

from optx._errors import OptxError
from optx._masks import Masks
from optx._module_paths import paths_of
from optx.inject import _folder, _rest
from optx.inject._handle import Handle
from optx.inject._injection import Composite, Injection, Targets
from optx.inject._install import check_model, install, uninstall
from optx.inject._low_rank_start import read_from_file
from optx.inject._narrow import Layers
from optx.inject._parameters import Exactly
from optx.inject._served import Served
from optx.inject._trained_whole import Saved

OwnHandle = TypeVar("OwnHandle", bound=Handle, covariant=True)


@runtime_checkable
class WithHandle(Protocol[OwnHandle]):
    """An injection whose handle can do more than others."""

    def handle(
        self, model: nn.Module, injection: Any, served: Sequence[Served], saved: Sequence[Saved]
    ) -> OwnHandle:
        """What `attach` returns."""
        ...


@runtime_checkable
class WithMasks(Protocol):
    """An injection that serves pruned weights."""

    def having(self, masks: Masks | Mapping[str, Tensor]) -> Injection:
        """The same with these masks."""
        ...


@overload
def attach(
    model: nn.Module,
    injection: WithHandle[OwnHandle],
    targets: Targets | Mapping[str, Targets] | None = None,
    *,
    name: str | None = None,
    modules_to_save: Sequence[str] | None = None,
    layers: Layers | None = None,
    exclude: Targets | None = None,
    masks: Masks | Mapping[str, Tensor] | None = None,
) -> OwnHandle: ...


@overload
def attach(
    model: nn.Module,
    injection: Injection | str | PathLike[str],
    targets: Targets | Mapping[str, Targets] | None = None,
    *,
    name: str | None = None,
    modules_to_save: Sequence[str] | None = None,
    layers: Layers | None = None,
    exclude: Targets | None = None,
    masks: Masks | Mapping[str, Tensor] | None = None,
) -> Handle: ...


def attach(
    model: nn.Module,
    injection: Any,
    targets: Targets | Mapping[str, Targets] | None = None,
    *,
    name: str | None = None,
    modules_to_save: Sequence[str] | None = None,
    layers: Layers | None = None,
    exclude: Targets | None = None,
    masks: Masks | Mapping[str, Tensor] | None = None,
) -> Handle:
    """Attach a method to modules of a model; its weights, names and class stay as they are.

    Args:
        model: any module. Attach before ``torch.compile``, DDP or ``fully_shard`` see it: what is added
            later is in none of their buckets, and is refused.
        injection: what to add, as ``optx.LoRA(rank=8)``; or a folder that a handle or PEFT saved. A folder
            that a trainer saved (`optx.integrations`) may have more: norms, heads or averages of the model
            that trained or changed beside the adapter. They go into the model too, and stay there at
            ``remove()``, as in the run; `Handle.save` doesn't write them.
        targets: a regex that a whole module name must match, a module type, a list of names (whole, or the
            last parts of a path, as in PEFT: ``["0"]`` is ``layers.0`` too) and types, each of which must
            match something, a function of (name, module), or ``"all-linear"`` (every linear module but the
            output head, as in PEFT; not an entry of a list). For LoRA a name may be a parameter's
            (``["experts.down_proj"]``): experts that are one parameter (Mixtral, Qwen2-MoE, Qwen3-MoE,
            DeepSeek) are no linear modules, so ``"all-linear"`` leaves them out, and ``[nn.Linear,
            "experts"]`` with ``exclude=["lm_head"]`` is both. Modules that share a weight are served each by
            itself. None: what the method's paper serves, in the families of the table "Families and methods"
            in recipes/README.md (Llama to Mamba, with why a pair is refused) and in models built as they are;
            all of it, in every layer, or an error that says what was not found. For an injection of several
            members (`optx.MAM`), a dict by member.
        name: under which it lives on each module, if the same method is attached there twice; what
            `optx.set_adapter` switches by. Files don't hold it: give it again when a folder is attached.
        modules_to_save: paths of modules that are trained whole beside it (a classifier) and saved with it;
            ``remove()`` gives them their old values back. Nothing in them is served. PEFT's name. None: the
            head of a model ``...ForSequenceClassification``, ``...ForTokenClassification`` or
            ``...ForQuestionAnswering``, which is new there (PEFT's ``classifier``, ``score`` and
            ``qa_outputs``), unless something in it is targeted; ``handle.report()`` shows it. ``()``: none.
        layers: only what is in these layers, of what is targeted: a number, a range or a list of them, each
            of which must have something. A module's layer is the first whole number in its path; -1 is the
            last of its stack. As PEFT's ``layers_to_transform``. A folder says itself what it serves.
        exclude: what is left out of what is targeted, in any form of ``targets``
            (``["down_proj"]``; a string is a regex that a whole name must match); all of it, and each entry
            of a list, must leave something out. As PEFT's ``exclude_modules``.
        masks: for `optx.Perp`: which weights of a pruned model are kept.

    Keywords: PEFT, adapters, checkpoints, DDP, FSDP, FSDP2, fully_shard, quantised, metrics.

    Returns:
        A `Handle`; ``handle.parameters()`` are for the optimizer, ``handle.remove()`` undoes everything.

    Raises:
        TargetError: nothing matches, one of a list matches nothing, or a matched module can't be served, as
            one that is sharded already; the model is untouched.
        OptxError: the name is taken on a module, or the model is wrapped already.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(3, 8)
        >>> before = model(x)
        >>> handle = optx.attach(model, optx.LoRA(rank=2), targets="0|2")
        >>> torch.equal(model(x), before)  # LoRA starts as the identity
        True
        >>> handle.remove()
        >>> handle = optx.attach(model, optx.LoRA(rank=2), torch.nn.Linear, exclude="2")
        >>> handle.report().rows[0].module
        '0'
    """
    if isinstance(injection, str | PathLike):
        if layers is not None or exclude is not None:
            raise OptxError(
                "attach: a saved adapter says itself which modules it serves; leave layers and exclude out."
            )
        if modules_to_save:
            raise OptxError(
                f"attach: modules_to_save={list(modules_to_save)!r} can't be added to what "
                f"{str(injection)!r} has saved. Leave it out, or pass the injection instead of the folder."
            )
        if targets is not None:
            raise OptxError("attach: a saved adapter says itself which modules it serves; leave targets out.")
        if masks is not None:
            raise OptxError("attach: a saved adapter has its masks with it; leave masks out.")
        return attach_saved(model, injection, name)[0]
    check_model(model)
    if not isinstance(injection, Injection):  # pyright: ignore[reportUnnecessaryIsInstance]
        given: Any = injection
        wraps = f"; {type(given).__name__} goes around an optimizer: optx.wrap(optimizer, ...)"
        raise OptxError(
            f"attach: injection is {given!r}; it must be one such as optx.LoRA(rank=8), or a folder"
            f"{wraps if callable(getattr(given, 'bind', None)) else ''}."
        )
    if masks is not None:
        if not isinstance(injection, WithMasks):
            raise OptxError(
                f"attach: masks= is for optx.Perp; {type(injection).__name__} has no use for them."
            )
        injection = injection.having(masks)
    served, saved = install(model, injection, targets, name, modules_to_save, layers, exclude)
    return _handle_of(model, injection, served, saved)


def _handle_of(
    model: nn.Module, injection: Injection, served: Sequence[Served], saved: Sequence[Saved]
) -> Handle:
    """A plain handle, or one of the injection's own, which can do more."""
    make = injection.handle if isinstance(injection, WithHandle) else Handle
    try:
        return make(model, injection, served, saved)
    except BaseException:
        uninstall(served, saved, restore=True)
        raise


def attach_saved(
    model: nn.Module, path: str | PathLike[str], name: str | None
) -> tuple[Handle, Callable[[], None]]:
    """Attach what a folder holds, to the modules it was saved for, and load its tensors and the model's.

    Returns:
        The handle, and what takes back all of it: removing the handle leaves the model what trained beside.
    """
    check_model(model)
    stored = _folder.read(path, model)
    beside = _rest.beside(Path(path), model)
    here = paths_of(model)
    stored.injection = stored.injection.as_stored(model, stored.tensors)
    exact = {member: Exactly(filter(None, map(here.find, one))) for member, one in stored.served.items()}
    targets = exact if isinstance(stored.injection, Composite) else exact[""]
    with read_from_file():
        whole = [here.here[one] for one in stored.whole]
        served, saved = install(model, stored.injection, targets, name, whole)
    handle = _handle_of(model, stored.injection, served, saved)
    try:
        _folder.fill(handle, stored, os.fspath(path))
        put_back = beside.put(model)
    except BaseException:
        handle.remove()
        raise

    def undo() -> None:
        handle.remove()
        put_back()

    return handle, undo
