"""Train what was attached and nothing else, until it comes off."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from optx._errors import OptxError, near
from optx.inject._handle import Handle
from optx.inject._injection import Targets
from optx.inject._targets import check_each_matches, matcher

if TYPE_CHECKING:
    from typing_extensions import Self


class Frozen:
    """The ``requires_grad`` flags from before `trainable_only`; also a context manager that restores them."""

    def __init__(self, flags: list[tuple[nn.Parameter, bool]], handles: tuple[Handle, ...]) -> None:
        self._flags = flags
        self._waiting = {id(handle) for handle in handles}  # not the handles, which hold this
        for handle in handles:
            handle.on_removal(self._gone)

    def restore(self) -> None:
        """Give every parameter its flag back; doing so twice changes nothing."""
        for p, flag in self._flags:
            p.requires_grad_(flag)
        self._flags.clear()

    def _gone(self, handle: Handle) -> None:
        self._waiting.discard(id(handle))
        if not self._waiting:
            self.restore()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()


def trainable_only(model: nn.Module, *handles: Handle, also: Targets | None = None) -> Frozen:
    """Freeze everything but what the handles added; the flags come back when the last handle is removed.

    Args:
        model: the model that the handles serve.
        *handles: of `optx.attach`.
        also: modules that are trained whole too (a new classifier): a regex over module names, a type, a
            list, or a predicate, as `optx.attach` takes them. Their values stay when the handles come off;
            ``optx.attach(..., modules_to_save=...)`` gives them back and saves them with the adapter.

    Returns:
        An object whose ``restore()`` gives the flags back at once.

    Raises:
        OptxError: no handle is given, one is of another model or removed, or ``also`` matches nothing.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        >>> handle = optx.attach(model, optx.LoRA(rank=2), targets="0")
        >>> frozen = optx.trainable_only(model, handle, also="1")
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['0.optx.lora.A', '0.optx.lora.B', '1.weight', '1.bias']
        >>> handle.remove()
        >>> all(p.requires_grad for p in model.parameters())
        True
    """
    if not handles:
        raise OptxError("trainable_only: no handle is given, so nothing would be trained.")
    own = {id(p) for p in model.parameters()}
    kept: set[int] = set()
    for handle in handles:
        added = [id(p) for p in handle.parameters()]
        if handle.removed or not own.issuperset(added):
            raise OptxError(f"trainable_only: {handle!r} is not attached to this model.")
        kept.update(added)
    if also is not None:
        matches = matcher(also)
        modules = dict(model.named_modules())
        check_each_matches(also, list(modules.items()), "trainable_only: also")
        chosen = [module for path, module in modules.items() if path and matches(path, module)]
        if not chosen:
            raise OptxError(f"trainable_only: also={also!r} matches no module. {near(str(also), modules)}")
        kept.update(id(p) for module in chosen for p in module.parameters())
    resting = {id(p) for handle in handles for p in handle.leaving()}  # whose flags are the handles' affair
    flags = [(p, p.requires_grad) for p in model.parameters() if id(p) not in resting]
    for p, _ in flags:
        p.requires_grad_(id(p) in kept)
    return Frozen(flags, handles)
