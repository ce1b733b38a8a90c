"""A module whose own state dict has the adapters in the place of the whole: for trainers that ask only it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optx._errors import FileError, OptxError
from optx._names import is_dtensor
from optx.inject._base_marks import as_text, from_text, saved_tensors, tell_of_another
from optx.inject._handle import Handle
from optx.integrations import _adapter_folders
from optx.integrations._base_left_out import BaseLeftOut, adapters_own, is_left_out

MARK = "optx_adapters_only"
_KEEPER = "_optx_adapters_only"  # on the module


class AdaptersOnly:
    """What `optx.integrations.lightning.adapters_only` returns; ``remove()`` undoes it.

    Attributes:
        handles: whose adapters the module's state dict holds.
        acting: whether it does so now.
    """

    def __init__(self, module: nn.Module, handles: Sequence[Handle]) -> None:
        before = keeper_of(module)
        if before is not None:
            raise OptxError(
                f"adapters_only: it has been called for this {type(module).__name__} already, and a module "
                "has one state dict. Pass all handles in one call: adapters_only(module, first, second)."
            )
        self._base = BaseLeftOut(module, handles, "adapters_only")
        self._module, self.handles = module, list(handles)
        self.acting = True
        self._beside: dict[str, Tensor] = {}
        self._hooks = [
            # torch marks the first hook as its own, and a bound method takes no marks.
            module.register_state_dict_post_hook(lambda *given: self._leave_out(*given)),  # type: ignore[no-untyped-call]
            module.register_load_state_dict_pre_hook(self._fill_in),  # type: ignore[no-untyped-call]
            module.register_load_state_dict_post_hook(self._then_beside),  # pyright: ignore[reportUnknownMemberType]
        ]
        object.__setattr__(module, _KEEPER, self)

    def remove(self) -> None:
        """Have the state dict be the whole module's again. Removing twice does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        vars(self._module).pop(_KEEPER, None)

    def save_folder(self, folder: Path, writes: bool) -> None:
        """Write what `optx.attach` reads: the adapters, and what else of the module trained or changed.

        Args:
            folder: of the adapters.
            writes: whether this rank does; every rank has to call where tensors are sharded.
        """
        _adapter_folders.save_trained(self._base, folder, writes)

    def settle(self) -> None:
        """Take the module as it is now for what the script made, where it was cast since."""
        self._base.settle()

    def _leave_out(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
        if not self.acting:
            return
        left_out = self._base.names()
        sharded = False
        for key in [key for key in state_dict if key.startswith(prefix)]:
            sharded = sharded or is_dtensor(state_dict[key])
            if is_left_out(key.removeprefix(prefix), left_out):
                del state_dict[key]
        if sharded:  # torch's distributed checkpoint takes no key that the module has no tensor for
            return
        text = bytearray(as_text(left_out).encode())
        state_dict[f"{prefix}{MARK}"] = torch.frombuffer(text, dtype=torch.uint8)
        for key, t in _adapter_folders.beside_the_parts(self.handles).items():
            state_dict[f"{prefix}{MARK}.{key}"] = t

    def _fill_in(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        if not self.acting:
            return
        mark = state_dict.pop(f"{prefix}{MARK}", None)
        here = dict(saved_tensors(module))
        self._base.loaded(name for name in here if prefix + name in state_dict)
        if mark is None and not any(map(is_dtensor, here.values())):
            return  # a whole checkpoint
        left_out = self._base.names() if mark is None else from_text(bytes(mark.tolist()).decode())
        own = adapters_own(self.handles)
        for name, t in here.items():
            if id(t) in own and prefix + name not in state_dict:
                raise FileError(
                    f"load_state_dict: {name!r} is missing. The checkpoint is of other adapters than those "
                    "that are attached here."
                )
        tell_of_another(here, left_out, "resuming")
        start = f"{prefix}{MARK}."
        beside = [key for key in state_dict if key.startswith(start)]
        self._beside = {key.removeprefix(start): state_dict.pop(key) for key in beside}
        # What was left out stays what it is here; what belongs to it (codes' scales) is not in `here`.
        for name in left_out:
            if name in here:
                state_dict.setdefault(prefix + name, here[name])

    def _then_beside(self, *_: Any) -> None:
        _adapter_folders.load_beside(self.handles, self._beside)
        self._beside.clear()


def keeper_of(module: nn.Module) -> AdaptersOnly | None:
    """What keeps a module's state dict small, if something does."""
    return vars(module).get(_KEEPER)
