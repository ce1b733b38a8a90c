"""Accelerate's ``save_state`` and ``load_state`` with adapters in the place of whole models."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from optx._errors import OptxError
from optx.inject._handle import Handle
from optx.integrations._accelerate_sharded import ShardedAdapters, place_in
from optx.integrations._adapter_checkpoint import REST, AdapterCheckpoint

WHERE = "adapters_only"
_REFUSED = {
    "FSDP": "FSDP1, whose flat parameters optx does not serve. Pass "
    "FullyShardedDataParallelPlugin(fsdp_version=2)",
    "DEEPSPEED": "DeepSpeed, whose checkpoints are written before its hooks are asked. Leave adapters_only "
    "out and call handle.save(folder), or use DDP or FullyShardedDataParallelPlugin(fsdp_version=2)",
    "MEGATRON_LM": "Megatron-LM, whose checkpoints are written before its hooks are asked. Leave "
    "adapters_only out: accelerator.save_state() saves the whole, and handle.save(folder) the adapter",
}


class AdaptersOnly:
    """What `optx.integrations.accelerate.adapters_only` returns; ``remove()`` undoes it.

    Attributes:
        handles: whose adapters the checkpoints hold.
        place: 0 in a checkpoint's own folder; of further models 1, 2, ... in ``model_1``, ``model_2``, ...
    """

    def __init__(self, accelerator: Any, handles: Sequence[Handle]) -> None:
        self.handles = list(handles)
        self._accelerator = accelerator
        self._model = prepared_model(accelerator, handles)
        self._checkpoint = AdapterCheckpoint(accelerator.unwrap_model(self._model), handles, WHERE)
        self.place = _free_place(accelerator)
        if accelerator.is_fsdp2:
            self._hooks: list[Any] = [ShardedAdapters(accelerator, self._model, handles, self.place)]
            return
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

    def _save(self, models: Sequence[nn.Module], weights: list[dict[str, Tensor]], output_dir: str) -> None:
        """Accelerate's hook: what stays in ``weights`` it writes itself."""
        accelerator = self._accelerator
        del weights[self._at(weights)]
        on_each = accelerator.project_configuration.save_on_each_node
        if accelerator.is_local_main_process if on_each else accelerator.is_main_process:
            self._checkpoint.save(place_in(output_dir, self.place))
        accelerator.wait_for_everyone()

    def _load(self, models: list[nn.Module], input_dir: str) -> None:
        """Accelerate's hook: what stays in ``models`` it loads itself; so it does with a whole checkpoint."""
        folder = place_in(input_dir, self.place)
        if (folder / REST).exists():
            models.remove(self._model)
            self._checkpoint.load(folder)

    def _at(self, weights: Sequence[dict[str, Tensor]]) -> int:
        """Which of the state dicts is the model's: the one that has its adapters' memory."""
        own = {p.data_ptr() for handle in self.handles for p in handle.parameters() if not p.is_meta}
        for place, state in enumerate(weights):
            if any(isinstance(t, Tensor) and not t.is_meta and t.data_ptr() in own for t in state.values()):  # pyright: ignore[reportUnnecessaryIsInstance]
                return place
        raise OptxError(
            "save_state: the model that adapters_only was called for is not among those that the Accelerator "
            "saves any more. Call remove() on what adapters_only returned, and adapters_only again."
        )


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


def _free_place(accelerator: Any) -> int:
    """The first that none of the Accelerator's other models has."""
    hooks = accelerator._save_model_state_pre_hook.values()
    taken = {getattr(getattr(hook, "__self__", None), "place", None) for hook in hooks}
    return next(place for place in itertools.count() if place not in taken)


def _check_kind(accelerator: Any) -> None:
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind in _REFUSED and not accelerator.is_fsdp2:
        raise OptxError(f"{WHERE}: this Accelerator saves with {_REFUSED[kind]}.")


def _check_new(accelerator: Any, model: nn.Module) -> None:
    for hook in accelerator._save_model_state_pre_hook.values():
        before = getattr(hook, "__self__", None)
        if isinstance(before, AdaptersOnly) and before.serves(model):
            raise OptxError(
                f"{WHERE}: it has been called for this model already, and a model has one checkpoint. Pass "
                "all handles in one call: adapters_only(accelerator, first, second)."
            )
