"""What a Trainer does otherwise for optx: methods of the one object, by attributes that come off again.

A Trainer's callbacks are asked after a checkpoint was written and after the logs have gone out, and not at
all when one is read. So what writes, reads and logs is replaced on the object; its class, the model and
transformers' modules stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from optx._errors import FileError, OptxError, warn
from optx._files import written_aside
from optx.inject._handle import Handle
from optx.integrations._adapter_checkpoint import REST, AdapterCheckpoint
from optx.integrations._metrics import collect
from optx.integrations._trainer_losses import TrainerLoss

WHERE = "OptxCallback"
LOSSES = "optx_losses"


class TrainerHooks:
    """Serves one Trainer, until `remove`.

    Args:
        trainer: whose methods are replaced.
        handles: what is attached now, in a model.
        losses: whose state goes along with checkpoints.
        adapters_only: whether checkpoints leave the base model out.
        optimizer: whose numbers are logged; None: the Trainer's.
    """

    def __init__(
        self,
        trainer: Any,
        handles: Callable[[Any], list[Handle]],
        losses: Sequence[Any],
        adapters_only: bool,
        optimizer: Any,
    ) -> None:
        self.optimizer = optimizer
        self.trainer, self.losses, self.adapters_only = trainer, list(losses), adapters_only
        self._handles = handles
        self._checkpoint: AdapterCheckpoint | None = None
        self._before: dict[str, Any] = {}
        self._replace("log", self._log)
        self._replace("_load_from_checkpoint", self._load)
        self._replace("_load_best_model", self._load_best)
        self._replace("_save", self._save)
        self._replace("_save_rng_state", self._save_losses)
        function = trainer.compute_loss_func
        if isinstance(function, TrainerLoss):
            function.average_tokens_across_devices = trainer.args.average_tokens_across_devices
            if function.needs_batch:
                self._replace("compute_loss", self._compute_loss)

    def _replace(self, name: str, ours: Callable[..., Any]) -> None:
        before = getattr(self.trainer, name, None)
        if not callable(before):
            self.remove()
            raise OptxError(
                f"{WHERE}: {type(self.trainer).__name__} of this transformers has no {name}(); transformers "
                "4.56 to 5 have it."
            )
        self._before[name] = before
        setattr(self.trainer, name, ours)

    def remove(self) -> None:
        """Give the Trainer its own methods back."""
        own: dict[str, Any] = vars(self.trainer)
        for name in self._before:
            own.pop(name, None)
        self._before.clear()

    def handles(self) -> list[Handle]:
        """Those that are attached; none once all were removed, as after ``merge_and_unload``."""
        return [one for one in self._handles(self.trainer.model) if not one.removed]

    def checkpoint(self) -> AdapterCheckpoint | None:
        """What saves and loads the adapters of the model as it is now; None if there is none to leave out.

        Raises:
            OptxError: a handle is of another model, or the Trainer writes the model shard by shard.
        """
        handles = self.handles() if self.adapters_only else []
        if not handles:
            return None
        trainer, known = self.trainer, self._checkpoint
        if known is None or known.handles != handles:
            self._check_engine()
            model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
            self._checkpoint = known = AdapterCheckpoint(model, handles, WHERE)
        return known

    def _check_engine(self) -> None:
        for name, engine in (("is_deepspeed_enabled", "DeepSpeed"), ("is_fsdp_enabled", "FSDP")):
            if getattr(self.trainer, name, False):
                raise OptxError(
                    f"{WHERE}: with {engine} the Trainer writes the whole model shard by shard, and adapters "
                    "can't be saved in its place. Give adapters_only=False, and use handle.save(folder)."
                )

    # ---- what replaces the Trainer's methods ---------------------------------------------------------

    def _log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        if "loss" in logs:  # of a training step, not of an evaluation
            logs = {**logs, **collect(self.optimizer or self.trainer.optimizer, self.handles())}
        self._before["log"](logs, *args, **options)

    def _compute_loss(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        function: TrainerLoss = self.trainer.compute_loss_func
        function.batch = dict(inputs)
        inputs.pop(function.index, None)
        try:
            return self._before["compute_loss"](model, inputs, *args, **options)
        finally:
            function.batch = None

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        checkpoint = self.checkpoint()
        if checkpoint is None:
            self._before["_save"](output_dir, state_dict=state_dict)
            return
        trainer, args = self.trainer, self.trainer.args
        if not args.should_save:
            return
        folder = Path(args.output_dir if output_dir is None else output_dir)
        model: Any = checkpoint.module
        if not isinstance(model, PreTrainedModel):  # whose state dict the Trainer would write itself
            checkpoint.save(folder)
            if (processing := trainer.processing_class) is not None:
                processing.save_pretrained(folder)
            torch.save(args, folder / "training_args.bin")
            return

        def save_pretrained(to: Any, **_: Any) -> None:
            checkpoint.save(Path(to))

        vars(model)["save_pretrained"] = save_pretrained
        try:
            self._before["_save"](str(folder), state_dict={})
        finally:
            vars(model).pop("save_pretrained", None)

    def _load(self, folder: str, model: Any = None) -> None:
        path = Path(folder)
        self._check_whole(path)
        self._load_weights(path, lambda: self._before["_load_from_checkpoint"](folder, model))
        if not (path / "optimizer.pt").exists() and self._resumes_alone():
            warn(
                f"{WHERE}: {folder!r} has no optimizer.pt (save_only_model=True), so this run goes on with "
                "new moments, anchors and rounds: anchors are the weights as they are in the checkpoint."
            )
        self._load_losses(path)

    def _load_best(self) -> None:
        best = Path(self.trainer.state.best_model_checkpoint)
        self._load_weights(best, self._before["_load_best_model"])

    def _load_weights(self, folder: Path, whole: Callable[[], None]) -> None:
        checkpoint = self.checkpoint()
        if checkpoint is not None and checkpoint.is_in(folder):
            for handle in checkpoint.handles:
                handle._check_alive("load")  # pyright: ignore[reportPrivateUsage]
            checkpoint.load(folder)
        elif (folder / REST).exists():
            raise OptxError(
                f"{WHERE}: {str(folder)!r} holds adapters and no base model, and there is no handle to load "
                "them into. Attach as in the run that saved it, and give OptxCallback(handle)."
            )
        else:
            whole()

    def _resumes_alone(self) -> bool:
        trainer = self.trainer
        return not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled)

    def _check_whole(self, folder: Path) -> None:
        """A kill in mid-save leaves a checkpoint without its last file."""
        if (folder / "trainer_state.json").exists() or not folder.exists():
            return
        others = folder.parent.glob("checkpoint-*/trainer_state.json")
        steps = {int(file.parent.name.rpartition("-")[2]): file.parent for file in others}
        hint = f"Resume from {str(steps[max(steps)])!r}." if steps else "There is no whole one beside it."
        raise FileError(
            f"{WHERE}: {str(folder)!r} has no trainer_state.json, which is written last: a run was killed "
            f"while it wrote this checkpoint. {hint}"
        )

    # ---- states of losses ----------------------------------------------------------------------------

    def _file(self, folder: Path) -> Path:
        args = self.trainer.args
        return folder / (f"{LOSSES}_{args.process_index}.pt" if args.world_size > 1 else f"{LOSSES}.pt")

    def _save_losses(self, output_dir: str) -> None:
        self._before["_save_rng_state"](output_dir)
        if self.losses:
            states = [{"loss": type(one).__name__, "state": one.state_dict()} for one in self.losses]
            with written_aside(self._file(Path(output_dir))) as aside:
                torch.save(states, aside)

    def _load_losses(self, folder: Path) -> None:
        if not self.losses:
            return
        file = self._file(folder)
        if not file.exists():
            names = ", ".join(type(one).__name__ for one in self.losses)
            raise FileError(
                f"{WHERE}: {str(folder)!r} has no {file.name}, the state of {names}: it was saved without "
                f"{WHERE}, with save_only_model=True, or by another number of processes."
            )
        states = torch.load(file, map_location="cpu", weights_only=True)
        saved, here = [one["loss"] for one in states], [type(one).__name__ for one in self.losses]
        if saved != here:
            raise FileError(f"{WHERE}: {str(file)!r} has the states of {saved}, and here are {here}.")
        for one, state in zip(self.losses, states, strict=True):
            one.load_state_dict(state["state"])
