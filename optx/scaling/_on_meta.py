"""Models built without memory: from configs and callables, on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parameter import UninitializedParameter

from optx._errors import OptxError
from optx.scaling._parameters import check_nothing_attached

Source = nn.Module | Callable[[], nn.Module] | Any
"""A module, a transformers config, or a callable that returns a module."""


def build(source: Source, argument: str, others: Sequence[Source]) -> nn.Module:
    """The model that an argument stands for; a config is built as the class that another argument has.

    Raises:
        OptxError: it stands for none.
    """
    if isinstance(source, nn.Module):
        check_nothing_attached(source, argument)
        return source
    if _is_config(source):
        kind = _class_of(source, argument, others)
        return _without_memory(lambda: kind(source), argument)
    if not callable(source):
        raise OptxError(
            f"shapes: {argument} is {source!r}; it must be a module, a transformers config or a callable "
            "that returns a module."
        )
    made: Any = _without_memory(source, argument)
    if not isinstance(made, nn.Module):
        raise OptxError(f"shapes: {argument}() returned {made!r}; it must return a module.")
    return made


def _without_memory(make: Callable[[], Any], argument: str) -> Any:
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            return make()
    except (NotImplementedError, RuntimeError):  # reads a number of a tensor while it builds
        pass
    try:
        with torch.random.fork_rng(devices=[]), _Parameters():
            return make()
    except (NotImplementedError, RuntimeError) as error:
        raise OptxError(
            f"shapes: {argument} can't be built on the meta device ({error}). Pass the module itself."
        ) from error


class _Parameters:
    """While it is entered, parameters lose their memory as modules get them; other tensors are real."""

    def __enter__(self) -> None:
        hook: Any = _to_meta  # torch's types know of no hook that returns another parameter
        self.handle = register_module_parameter_registration_hook(hook)

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


def _to_meta(module: nn.Module, name: str, p: nn.Parameter | None) -> nn.Parameter | None:
    if p is None or p.is_meta or isinstance(p, UninitializedParameter):
        return None
    return nn.Parameter(p.to("meta"), requires_grad=p.requires_grad)


def _is_config(source: Any) -> bool:
    # By name, so that transformers need not be imported.
    return any(kind.__name__ in ("PretrainedConfig", "PreTrainedConfig") for kind in type(source).__mro__)


def _class_of(config: Any, argument: str, others: Sequence[Source]) -> Any:
    """The model's class: another argument's, the one that the config names, or the only one of its family."""
    import transformers

    for other in others:
        if isinstance(other, nn.Module) and isinstance(
            config, getattr(type(other), "config_class", ()) or ()
        ):
            return type(other)
    for one in (config, *filter(_is_config, others)):
        for name in getattr(one, "architectures", None) or ():
            if type(one) is type(config) and hasattr(transformers, name):
                return getattr(transformers, name)
    for mapping in ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING", "MODEL_FOR_CAUSAL_LM_MAPPING"):
        known = getattr(transformers, mapping)
        if type(config) in known and type(config) not in transformers.MODEL_FOR_MASKED_LM_MAPPING:
            return known[type(config)]
    raise OptxError(
        f"shapes: {argument}={type(config).__name__} doesn't say which model it is of. Set its "
        "architectures, or pass a callable: lambda: transformers.BertForMaskedLM(config)."
    )
