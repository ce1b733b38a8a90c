"""Lightning: ``configure_optimizers`` returns what ``optx.wrap`` made, and a callback does the rest.

    >>> import torch, optx
    >>> from lightning.pytorch import LightningModule, Trainer
    >>> class Module(LightningModule):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 1))
    ...         self.handle = optx.attach(self.net, optx.LoRA(rank=2), targets="0")
    ...         optx.trainable_only(self.net, self.handle)
    ...     def configure_optimizers(self):
    ...         return optx.wrap(torch.optim.AdamW(self.handle.parameters(), lr=1e-3), optx.PerpGrad())
    ...     def training_step(self, batch, index):
    ...         return self.net(batch).square().mean()
    >>> module = Module()
    >>> callback = optx.integrations.lightning.OptxCallback(module.handle)
    >>> trainer = Trainer(callbacks=[callback], max_steps=2, accelerator="cpu", logger=False,
    ...                   enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    >>> trainer.fit(module, torch.randn(4, 2, 4))

``.ckpt`` files hold the adapter in the place of the whole model, ``fit(ckpt_path=...)`` goes on exactly from
them, and the logger gets ``optx/lr``, ``optx/grad_norm`` and what each transform and adapter tells.

The callback is one of ``lightning.pytorch`` or of ``pytorch_lightning``: of what is imported by the time that
this module is, of both if both are.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from optx._errors import OptxError
from optx.inject._handle import Handle
from optx.integrations import _random_state
from optx.integrations._beside_checkpoints import BesideCheckpoints
from optx.integrations._clipped_twice import tell_clipped_twice
from optx.integrations._metrics import begin, collect_all
from optx.integrations._module_checkpoints import AdaptersOnly as AdaptersOnly
from optx.integrations._module_checkpoints import keeper_of

_RANDOM = "optx_random_states"
_NAMESPACES = ("lightning.pytorch", "pytorch_lightning")


def _loaded_callbacks() -> tuple[type, ...]:
    """``Callback`` of each namespace that is imported already, or else of the first that is installed."""
    loaded = [name for name in _NAMESPACES if name in sys.modules]
    for name in loaded or _NAMESPACES:
        try:
            importlib.import_module(name)
        except ImportError:
            continue
        loaded = loaded or [name]
        break
    if not loaded:
        raise ImportError("optx.integrations.lightning needs Lightning: pip install lightning")
    return tuple(importlib.import_module(f"{name}.callbacks").Callback for name in loaded)


if TYPE_CHECKING:
    from lightning.pytorch import Callback
else:
    _CALLBACKS = _loaded_callbacks()
    Callback = _CALLBACKS[0] if len(_CALLBACKS) == 1 else type("Callback", _CALLBACKS, {})


def adapters_only(module: nn.Module, *handles: Handle) -> AdaptersOnly:
    """Have a LightningModule's state dict hold adapters in the place of the whole model.

    `OptxCallback` calls this where the module hasn't. Called at the end of the module's ``__init__`` it
    serves ``load_from_checkpoint`` too, which knows no callbacks. What the module's state dict has is what
    trains or has changed since this call, and the adapters; that of the model in it
    (``module.net.state_dict()``) stays whole. Loading fills in the rest from the model that is here, and
    warns if that is another than the one that was trained; whole checkpoints load as they did.

    Args:
        module: the LightningModule.
        *handles: of what is attached to models in it.

    Returns:
        An object whose ``remove()`` undoes it.

    Raises:
        OptxError: a handle is not of a model in this module, or it has been called for it already.

    Example:
        >>> import torch, optx
        >>> from lightning.pytorch import LightningModule
        >>> class Module(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 1))
        ...         self.handle = optx.attach(self.net, optx.LoRA(rank=2), targets="0")
        ...         optx.trainable_only(self.net, self.handle)
        ...         optx.integrations.lightning.adapters_only(self, self.handle)
        >>> [name for name in Module().state_dict() if name.startswith("net")]
        ['net.0.optx.lora.A', 'net.0.optx.lora.B']
    """
    return AdaptersOnly(module, handles)


class OptxCallback(Callback):
    """Logs what optx knows, has checkpoints hold the adapters alone, and runs go on from them bit for bit.

    Lightning's checkpoints lack the random state, so dropout and shuffling would go on with other draws; the
    callback adds it, of every process. What is resumed has to be the end of an epoch, or a loader with a
    ``state_dict`` of its own: Lightning begins others anew in the middle of an epoch, and says so.

    Args:
        handle: of `optx.attach`, or several: ``.ckpt`` files hold these adapters, what else trains and what
            has changed, and no frozen weights (see `adapters_only`). A string names the module's attribute
            that has them, for configuration files. None: checkpoints are the whole model's.
        folders: write a folder beside each ``.ckpt`` too (``last.adapter`` beside ``last.ckpt``), which
            `optx.attach` (with what else trained) and PEFT read; it goes when the checkpoint goes.

    Raises:
        OptxError: at the start of a run, if a handle is not in the module; the strategy is FSDP1 or
            DeepSpeed; or the Trainer is of the other of Lightning's two namespaces.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> handle = optx.attach(model, optx.LoRA(rank=2), targets="0")
        >>> callback = optx.integrations.lightning.OptxCallback(handle, folders=True)
    """

    def __init__(
        self, handle: Handle | Iterable[Handle] | str | None = None, *, folders: bool = False
    ) -> None:
        super().__init__()
        if folders and handle is None:
            raise OptxError(
                "OptxCallback: folders=True is for adapters, and no handle is given. Pass what optx.attach "
                "returned."
            )
        # Every run asks again, and an iterator ends.
        self._given = handle if handle is None or isinstance(handle, Handle | str) else list(handle)
        self._folders = folders
        self._handles: list[Handle] = []
        self._keeper: AdaptersOnly | None = None
        self._logged = -1
        self._random: dict[str, Any] | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check that trainer, strategy and module are served, and have checkpoints hold the adapters."""
        _check_namespace(self, trainer)
        self._handles = _handles_of(self._given, pl_module)
        _check_strategy(trainer.strategy, self._handles)
        if not self._handles:
            return
        keeper = keeper_of(pl_module)
        if keeper is None:
            keeper = self._keeper = adapters_only(pl_module, *self._handles)
        elif list(map(id, keeper.handles)) != list(map(id, self._handles)):
            raise OptxError(
                "OptxCallback: adapters_only was called for this module with other handles. Pass the same, "
                "or leave handle out."
            )
        files = trainer.strategy.checkpoint_io
        files = files.inner if isinstance(files, BesideCheckpoints) else files  # of an earlier fit's module
        trainer.strategy.checkpoint_io = BesideCheckpoints(files, keeper) if self._folders else files

    def remove(self) -> None:
        """Have the module's state dict be whole again, if it was this callback that changed it."""
        if self._keeper is not None:
            self._keeper.remove()
            self._keeper = None

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Add the random state of every process."""
        checkpoint[_RANDOM] = _random_state.of_all_ranks()

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Keep it until the run begins, unless the number of processes is another."""
        saved: list[dict[str, Any]] = checkpoint.get(_RANDOM) or []
        self._random = saved[trainer.global_rank] if len(saved) == trainer.world_size else None
        self.on_fit_start(trainer, pl_module)  # which comes before this where models are sharded

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Go on with the draws of the checkpoint: of a new epoch's order too."""
        keeper = keeper_of(pl_module)
        if keeper is not None:
            keeper.settle()  # ``precision="bf16-true"`` has cast it by now
        if self._random is not None:
            _random_state.put(self._random)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """In the middle of an epoch no order was drawn when the run went on, so what was drawn is undone."""
        if self._random is not None and batch_idx > 0:
            _random_state.put(self._random)
        self._random = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Have every rank's steps measure what is logged."""
        begin(trainer.optimizers)
        limit = trainer.gradient_clip_val
        tell_clipped_twice("OptxCallback", trainer.optimizers, "gradient_clip_val", limit, "it to None")
        if not collect_all(trainer.optimizers, self._handles):
            raise OptxError(
                "OptxCallback: none of the module's optimizers was made by optx.wrap, and no handle is "
                "given, so there is nothing to log or to save. Return optx.wrap(...) from "
                "configure_optimizers, or pass handle=."
            )

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log when Lightning does: every ``log_every_n_steps`` steps of the optimizer."""
        if trainer.global_step != self._logged and trainer._logger_connector.should_update_logs:
            self._logged = trainer.global_step
            pl_module.log_dict(collect_all(trainer.optimizers, self._handles), on_step=True, on_epoch=False)


def _handles_of(given: Handle | Iterable[Handle] | str | None, module: Any) -> list[Handle]:
    if isinstance(given, str):
        found: Any = getattr(module, given, None)
        if found is None:
            raise OptxError(
                f"OptxCallback: handle={given!r}, and this {type(module).__name__} has no such attribute. "
                "Name the one that it keeps the handle of optx.attach in."
            )
        given = found
    return [] if given is None else [given] if isinstance(given, Handle) else list(given)  # type: ignore[arg-type]


def _namespaces(thing: object) -> set[str]:
    return {
        name for one in type(thing).__mro__ for name in _NAMESPACES if one.__module__.startswith(f"{name}.")
    }


def _check_namespace(callback: Callback, trainer: Any) -> None:
    own, theirs = _namespaces(callback), _namespaces(trainer)
    if not own & theirs:
        other = next(iter(theirs), "neither namespace")
        raise OptxError(
            f"OptxCallback: it is a callback of {' and '.join(sorted(own))}, and this Trainer is of {other}. "
            f"Import {other} before optx.integrations.lightning, and have one namespace in a program."
        )


def _check_strategy(strategy: Any, handles: list[Handle]) -> None:
    names = {kind.__name__ for kind in type(strategy).__mro__}
    if "FSDPStrategy" in names:
        raise OptxError(
            "OptxCallback: FSDPStrategy is FSDP1, whose flat parameters optx does not serve. Use "
            "ModelParallelStrategy with fully_shard in configure_model (FSDP2), or strategy='ddp'."
        )
    if handles and not getattr(strategy, "_save_distributed_checkpoint", True):
        raise OptxError(
            "OptxCallback: ModelParallelStrategy(save_distributed_checkpoint=False) reads whole models "
            "alone. Leave save_distributed_checkpoint out (the default is True)."
        )
    if "DeepSpeedStrategy" in names and (handles or strategy.zero_stage_3):
        why = (
            "with ZeRO-3 partitions parameters, which optx does not serve"
            if strategy.zero_stage_3
            else "writes the whole model itself, so checkpoints can't hold the adapters alone"
        )
        raise OptxError(
            f"OptxCallback: DeepSpeedStrategy {why}. Use strategy='ddp', or ModelParallelStrategy (FSDP2)."
        )
