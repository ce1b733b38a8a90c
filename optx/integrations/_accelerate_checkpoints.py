"""Accelerate's ``save_state`` and ``load_state`` with adapters in the place of whole models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optx._errors import FileError, OptxError
from optx._files import written_aside
from optx._names import placed_like
from optx.inject._handle import Handle
from optx.inject._stored import check_tensors
from optx.integrations import _adapter_folders
from optx.integrations._base_left_out import (
    BaseLeftOut,
    adapters_own,
    as_text,
    from_text,
    is_left_out,
    saved_tensors,
)

REST = "optx_checkpoint.safetensors"
WHERE = "adapters_only"
_MODEL, _HANDLE = "model.", "handle."


class AdaptersOnly:
    """What `optx.integrations.accelerate.adapters_only` returns; ``remove()`` undoes it.

    Attributes:
        handles: whose adapters the checkpoints hold.
    """

    def __init__(self, accelerator: Any, handles: Sequence[Handle]) -> None:
        self.handles = list(handles)
        self._accelerator = accelerator
        self._model = prepared_model(accelerator, handles)
        self._bare: nn.Module = accelerator.unwrap_model(self._model)
        self._base = BaseLeftOut(self._bare, handles, WHERE)
        every: list[tuple[str, nn.Module]] = list(self._model.named_modules())
        self._prefix = next(f"{path}." if path else "" for path, one in every if one is self._bare)
        self._hooks = [
            accelerator.register_save_state_pre_hook(self._save),
            accelerator.register_load_state_pre_hook(self._load),
        ]

    def remove(self) -> None:
        """Have checkpoints hold the whole model again. Removing twice does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def serves(self, model: nn.Module) -> bool:
        """Whether checkpoints of this prepared model are its business."""
        return bool(self._hooks) and model is self._model

    # ---- saving -------------------------------------------------------------------------------------

    def _save(self, models: Sequence[nn.Module], weights: list[dict[str, Tensor]], output_dir: str) -> None:
        """Accelerate's hook: what stays in ``weights`` it writes itself."""
        accelerator, folder = self._accelerator, Path(output_dir)
        left_out = self._base.names()
        state = weights.pop(self._place(weights))
        on_each = accelerator.project_configuration.save_on_each_node
        writes = accelerator.is_local_main_process if on_each else accelerator.is_main_process
        _adapter_folders.save(self.handles, folder, writes)
        if writes:
            _write(folder / REST, self._rest(state, left_out), as_text(left_out))
        accelerator.wait_for_everyone()

    def _place(self, weights: Sequence[dict[str, Tensor]]) -> int:
        """Which of the state dicts is the model's: the one that has its adapters' memory."""
        own = {p.data_ptr() for handle in self.handles for p in handle.parameters() if not p.is_meta}
        for place, state in enumerate(weights):
            if any(isinstance(t, Tensor) and not t.is_meta and t.data_ptr() in own for t in state.values()):  # pyright: ignore[reportUnnecessaryIsInstance]
                return place
        raise OptxError(
            "save_state: the model that adapters_only was called for is not among those that the Accelerator "
            "saves any more. Call remove() on what adapters_only returned, and adapters_only again."
        )

    def _rest(self, state: dict[str, Tensor], left_out: Any) -> dict[str, Tensor]:
        """What trains or has changed beside the adapters, and what runs need beside their folders."""
        own = adapters_own(self.handles)
        adapters = {name for name, t in saved_tensors(self._bare) if id(t) in own}
        rest = {
            f"{_MODEL}{name}": t
            for key, t in state.items()
            if (name := key.removeprefix(self._prefix)) not in adapters and not is_left_out(name, left_out)
        }
        for number, handle in enumerate(self.handles):
            for key, t in _adapter_folders.beside_the_parts(handle).items():
                rest[f"{_HANDLE}{number}.{key}"] = t
        return rest

    # ---- loading ------------------------------------------------------------------------------------

    def _load(self, models: list[nn.Module], input_dir: str) -> None:
        """Accelerate's hook: what stays in ``models`` it loads itself; so it does with a whole checkpoint."""
        folder = Path(input_dir)
        if not (folder / REST).exists():
            return
        models.remove(self._model)
        rest, left_out = _read(folder / REST)
        self._base.tell_of_another(left_out)
        here = dict(saved_tensors(self._bare))
        found = {key.removeprefix(_MODEL): t for key, t in rest.items() if key.startswith(_MODEL)}
        check_tensors(found, {name: here[name] for name in found if name in here}, f"load_state: {REST!r}")
        _adapter_folders.load(self.handles, folder)
        for number, handle in enumerate(self.handles):
            start = f"{_HANDLE}{number}."
            beside = {key.removeprefix(start): t for key, t in rest.items() if key.startswith(start)}
            _adapter_folders.load_beside(handle, beside)
        with torch.no_grad():
            for name, t in found.items():
                here[name].copy_(placed_like(t, here[name]))


def prepared_model(accelerator: Any, handles: Sequence[Handle]) -> nn.Module:
    """The model of an Accelerator that handles are attached to.

    Raises:
        OptxError: there is none, or it is sharded in a way that checkpoints of adapters are not made of.
    """
    if not hasattr(accelerator, "register_save_state_pre_hook"):
        raise OptxError(f"{WHERE}: {accelerator!r} is no accelerate.Accelerator.")
    for handle in handles:
        for model in accelerator._models:
            if any(one is handle.model for one in model.modules()):
                _check_kind(accelerator)
                _check_new(accelerator, model)
                return model
    what = ", ".join(map(repr, handles)) or "a handle"
    raise OptxError(
        f"{WHERE}: no model that this Accelerator has prepared has {what} in it. Call "
        "accelerator.prepare(model, ...) first, with the model that optx.attach was given."
    )


def _check_kind(accelerator: Any) -> None:
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        what = {
            "FSDP": "FSDP2"
            if accelerator.is_fsdp2
            else "FSDP1, which optx does not serve: set fsdp_version=2",
            "DEEPSPEED": "DeepSpeed",
            "MEGATRON_LM": "Megatron-LM",
        }[kind]
        raise OptxError(
            f"{WHERE}: this Accelerator saves with {what}, whose checkpoints are written before its hooks "
            "are asked. Use accelerator.save_state() for the whole, and handle.save(folder) for the adapter."
        )


def _check_new(accelerator: Any, model: nn.Module) -> None:
    for hook in accelerator._save_model_state_pre_hook.values():
        before = getattr(hook, "__self__", None)
        if isinstance(before, AdaptersOnly) and before.serves(model):
            raise OptxError(
                f"{WHERE}: it has been called for this model already, and a model has one checkpoint. Pass "
                "all handles in one call: adapters_only(accelerator, first, second)."
            )


def _write(file: Path, tensors: dict[str, Tensor], left_out: str) -> None:
    from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]

    # Copies: safetensors takes no two names of one storage.
    copies = {key: t.detach().cpu().clone().contiguous() for key, t in tensors.items()}
    with written_aside(file) as aside:
        save_file(copies, aside, metadata={"optx_left_out": left_out})


def _read(file: Path) -> tuple[dict[str, Tensor], Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as given:
            opened: Any = given
            left_out = from_text((opened.metadata() or {})["optx_left_out"])
            return {key: opened.get_tensor(key) for key in opened.keys()}, left_out  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError) as error:
        raise FileError(f"load_state: {str(file)!r} is damaged ({error}).") from error
