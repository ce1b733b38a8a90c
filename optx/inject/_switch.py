"""`optx.set_adapter`: of several adapters on one model, let some act and the others rest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from optx._errors import MergeError, OptxError, near
from optx.inject._part import Attached, Part
from optx.inject._trained_whole import act, rest, whole_of


def set_adapter(model: nn.Module, names: str | Sequence[str] | None, *, inference_mode: bool = False) -> None:
    """Let the adapters of these names act, and switch every other one on the model off.

    A name is what `attach` was given as ``name``, or its injection's own (``"lora"``); several handles may
    have one name. As in PEFT, what acts is trained and what rests is not: ``requires_grad`` of their
    parameters says so from then on, and no old gradient of what rests is left for an optimizer. A module that
    they train whole gets the values of the one that acts, or its own if none does. All other parameters of
    the model, and their flags, are as they were: freeze them by `optx.trainable_only` before the first
    switch, since that call lets all of its handles train again.

    Args:
        model: what they are attached to, or a part of it.
        names: one name, a list of them, whose adapters act together, or None: the model as without any.
        inference_mode: what acts is not trained either.

    Raises:
        OptxError: no adapter has such a name; or two of them train one module whole (``modules_to_save``),
            which can have the values of one. Nothing is changed.
        MergeError: one that would rest is merged into the weights. Nothing is changed.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> one = optx.attach(model, optx.LoRA(rank=2), "0", name="poems")
        >>> two = optx.attach(model, optx.LoRA(rank=2), "0", name="news")
        >>> optx.set_adapter(model, "news")
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['0.weight', '0.bias', '0.optx.news.A', '0.optx.news.B']
    """
    parts = [
        (f"{path}.{key}", part)
        for path, module in model.named_modules()
        if isinstance(module, Attached)
        for key, part in module.parts.items()
    ]
    known = dict.fromkeys(part.adapter for _, part in parts)
    if not isinstance(names, str | Iterable | None):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise OptxError(f"set_adapter: names is {names!r}; it must be a name, a list of names, or None.")
    wanted = [names] if isinstance(names, str) else list(names or ())
    for name in wanted:
        if name not in known:
            raise OptxError(f"set_adapter: no adapter is called {name!r}. {near(str(name), known)}")
    _check_rest(model, parts, wanted)
    for _, part in parts:
        part.enabled = part.adapter in wanted
        trains = part.enabled and not inference_mode
        for p in part.parameters():
            p.requires_grad_(trains)
            if not trains:
                p.grad = None
    for module in model.modules():
        _switch_whole(module, wanted, inference_mode)


def _switch_whole(module: nn.Module, wanted: Sequence[str], inference_mode: bool) -> None:
    """The same for a module that is trained whole; its parameters are the same whoever's values they have."""
    whole = whole_of(module)
    if whole is None:
        return
    own = next((values for values in whole.users if values.adapter in wanted), None)
    changed = rest(module) if own is None else act(module, own)
    for p in module.parameters():
        p.requires_grad_(own is not None and not inference_mode)
        if changed or not p.requires_grad:
            p.grad = None


def _check_rest(model: nn.Module, parts: list[tuple[str, Part]], wanted: Sequence[str]) -> None:
    """Raise if one that would rest can't."""
    for path, part in parts:
        if part.merged and part.adapter not in wanted:
            raise MergeError(
                f"set_adapter: {part.adapter!r} is merged into the weights at {path!r}, so it can't be "
                "switched off. Call its unmerge() first."
            )
    for path, module in model.named_modules():
        whole = whole_of(module)
        users = [values.adapter for values in whole.users if values.adapter in wanted] if whole else []
        if len(users) > 1:
            raise OptxError(
                f"set_adapter: {path!r} is trained whole with each of {users}, and can have the values of "
                "one. Pass one of them."
            )
