"""The policy that a trained one must stay near: another model, or the same without its adapters."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, cast

from torch import nn

from optx._errors import OptxError, shown
from optx.inject._handle import Handle
from optx.inject._part import Attached, Part
from optx.inject._trained_whole import act, rest, whole_of
from optx.thinking._scored import unwrapped


@contextmanager
def reference(model: nn.Module, given: nn.Module | Handle | None) -> Generator[nn.Module]:
    """The reference policy, for the time of the block.

    Args:
        model: the policy, unwrapped.
        given: a model; a handle of adapters on ``model``, which are off for that time; None: all adapters on
            it are, optx's and PEFT's.

    Raises:
        OptxError: there is no adapter to switch off, or weights besides it are trained.
    """
    if isinstance(given, nn.Module):
        if unwrapped(given) is model:
            raise OptxError(
                "SofTGRPO: ref_model is the policy itself, from which it does not differ. Pass a copy from "
                "before the training, the handle of its adapters, or kl=0.0."
            )
        yield given
        return
    other: Any = given
    if other is not None and not isinstance(other, Handle):
        raise OptxError(
            f"SofTGRPO: ref_model is {shown(given)}; it must be a model, a handle of adapters or None."
        )
    with ExitStack() as stack:
        if given is not None:
            _check_others_rest(model, [one.part for one in given.served])
            stack.enter_context(given.disable())
        else:
            _without_adapters(model, stack)
        yield model


def _without_adapters(model: nn.Module, stack: ExitStack) -> None:
    parts = [part for part in _parts(model) if any(p.requires_grad for p in part.parameters())]
    peft: Any = getattr(model, "disable_adapter", None)
    if parts:
        _check_others_rest(model, parts)
        if any(part.merged for part in parts):
            raise OptxError(
                "SofTGRPO: kl needs the policy without its adapters, and they are merged into the weights. "
                "Call handle.unmerge()."
            )
        stack.enter_context(_off(model, parts))
    elif callable(peft):
        stack.enter_context(cast(AbstractContextManager[None], peft()))
    else:
        raise OptxError(
            f"SofTGRPO: kl is above 0, and this {type(model).__name__} has no trained adapter without which "
            "it would be the reference. Pass ref_model=, a copy from before the training, or kl=0.0."
        )


def _parts(model: nn.Module) -> list[Part]:
    return [p for module in model.modules() if isinstance(module, Attached) for p in module.parts.values()]


def _check_others_rest(model: nn.Module, parts: list[Part]) -> None:
    """Weights that are trained besides are not as they were at the start, adapters or not."""
    own = {id(p) for part in parts for p in part.parameters()}
    own |= {id(p) for module in model.modules() if whole_of(module) for p in module.parameters()}
    for name, p in model.named_parameters():
        if p.requires_grad and id(p) not in own:
            raise OptxError(
                f"SofTGRPO: {name!r} is trained besides the adapters, so the model without them is not the "
                "reference. Freeze it (optx.trainable_only(handle)), or pass ref_model=, a copy from before."
            )


@contextmanager
def _off(model: nn.Module, parts: list[Part]) -> Generator[None]:
    acted = [part for part in parts if part.enabled]
    whole = [(module, kept.acting) for module in model.modules() if (kept := whole_of(module)) is not None]
    try:
        for part in acted:
            part.enabled = False
        for module, _ in whole:
            rest(module)
        yield
    finally:
        for part in acted:
            part.enabled = True
        for module, values in whole:
            if values is not None:
                act(module, values)
