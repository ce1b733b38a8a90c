"""What cannot be read is named: where it is, what it is, and what would help."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from torch import nn

from optx._errors import OptxError
from optx.inject import _uncalled, _watch
from optx.inject._part import Part


def where(path: str, module: nn.Module) -> str:
    """A module, in words."""
    return f"{path!r} ({type(module).__name__})" if path else f"the model ({type(module).__name__})"


@contextmanager
def named(path: str, module: nn.Module) -> Generator[None]:
    """An error within, that does not say where it is, does."""
    with _at(f"at {where(path, module)}"):
        yield


@contextmanager
def named_node(node: str) -> Generator[None]:
    """The same of a node of the graph."""
    with _at(f"at {node}"):
        yield


@contextmanager
def _at(place: str) -> Generator[None]:
    try:
        yield
    except OptxError as error:
        if str(error).startswith("lipschitz: "):
            raise
        raise type(error)(f"lipschitz: {place}: {str(error).removesuffix('.')}.") from error


def target_of(target: Any) -> str:
    """What a node calls."""
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def check_hooks(module: nn.Module, path: str) -> None:
    """A forward hook may change what a module computes, and nothing tells how."""
    kinds = ("_forward_pre_hooks", "_forward_hooks")
    hooks = [hook for kind in kinds for hook in vars(module)[kind].values() if not _changes_nothing(hook)]
    if hooks:
        name = getattr(hooks[0], "__qualname__", type(hooks[0]).__name__)
        raise OptxError(
            f"lipschitz: {where(path, module)} has a forward hook ({name}), which may change what it "
            "computes. Remove it; of what optx attached, handle.merge_and_unload(). Instead of "
            "torch.nn.utils.weight_norm and spectral_norm use those of torch.nn.utils.parametrizations."
        )
    if "forward" in vars(module):
        raise OptxError(
            f"lipschitz: {where(path, module)} has been given another forward than its class has. Take it "
            "off; of what optx attached, handle.merge_and_unload()."
        )


def _changes_nothing(hook: Any) -> bool:
    """Of optx's own: what is merged into weights or switched off, and what looks on."""
    owner = getattr(hook, "__self__", None)
    return isinstance(owner, _watch.Watch | _uncalled.Watch) or (isinstance(owner, Part) and not owner.active)


def check_finite(module: nn.Module) -> None:
    """Raise where a weight is not finite."""
    for name in ("weight", "running_mean", "running_var"):
        tensor = getattr(module, name, None)
        if tensor is not None and not bool(tensor.isfinite().all()):
            raise OptxError(f"its {name} is not finite everywhere")


def is_torchs(module: nn.Module) -> bool:
    """Whether it is torch's own, and no chain: a layer that nobody can look into."""
    return type(module).__module__.startswith("torch.nn.") and type(module) is not nn.Sequential


_ATTENTION = "Dot-product attention is not Lipschitz on all inputs."
_ADVICE = {
    "MaxPool": "Use AvgPool or strides.",
    "Norm": "It divides by the sample's own deviation; BatchNorm in eval mode can be read.",
    "Attention": _ATTENTION,
    "Transformer": _ATTENTION,
    "Parallel": "Pass its .module.",
    "Softmax": "Bound the logits.",
}


def advice(module: nn.Module) -> str:
    """What to do instead."""
    kind = type(module).__name__
    found = next((text for word, text in _ADVICE.items() if word in kind), None)
    slopes = f"If it acts on each number by itself, declare its slopes: slopes={{{kind}: (low, high)}}."
    return f". {found or slopes}"
