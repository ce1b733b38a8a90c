"""The Trainer of transformers (4.56 to 5), and TRL's trainers, which are made of it.

    >>> import torch, optx
    >>> made = optx.integrations.transformers.optimizer(torch.optim.AdamW, optx.PerpGrad(), optx.AdamR())
    >>> callback = optx.integrations.transformers.OptxCallback()

``Trainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=made, callbacks=[callback])`` is all: the
optimizer has the Trainer's groups, rate and schedule, and the callback's logs say what optx does. With an
adapter, ``OptxCallback(handle)`` has checkpoints hold the adapter alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback

from optx._errors import MergeError, OptxError, TransformError, check_choice, shown, warn
from optx.inject._handle import Handle
from optx.integrations._clipped_twice import tell_clipped_twice
from optx.integrations._metrics import begin, wrapped_in
from optx.integrations._trainer_hooks import WHERE, TrainerHooks
from optx.integrations._trainer_losses import Loss, TrainerLoss, check_smoothing, is_ours, losses_of
from optx.integrations._trainer_optimizer import Maker, Makes, trainer_around
from optx.signal.loss_reweight import LossReweight
from optx.step.wrapped import Wrapped
from optx.transforms.hft import HFT

Handles = Handle | Iterable[Handle] | Callable[[Any], Handle | Iterable[Handle]] | None


class TrainerOptimizer(tuple[Any, dict[str, Any]]):
    """What `optimizer` returns: the pair that a Trainer takes as ``optimizer_cls_and_kwargs``."""

    __slots__ = ()

    def on(self, model: nn.Module, args: Any) -> Wrapped:
        """The optimizer itself, for ``optimizers=(made.on(model, args), None)`` or a ``create_optimizer``.

        Args:
            model: what is trained.
            args: the Trainer's TrainingArguments.

        Example:
            >>> import tempfile, torch, optx
            >>> from optx.integrations.transformers import optimizer
            >>> from transformers import TrainingArguments
            >>> args = TrainingArguments(tempfile.mkdtemp(), learning_rate=1e-3, use_cpu=True, report_to=[])
            >>> made = optimizer(torch.optim.SGD, optx.PerpGrad(), momentum=0.9)
            >>> opt = made.on(torch.nn.Linear(4, 4), args)
            >>> opt.param_groups[0]["lr"], opt.param_groups[0]["momentum"]
            (0.001, 0.9)
        """
        return self[0].make(model, args, trainer_around())


def optimizer(
    base_class: Callable[..., Optimizer],
    *transforms: Makes,
    wrap: Mapping[str, Any] | None = None,
    **base_options: Any,
) -> TrainerOptimizer:
    """A wrapped optimizer for a Trainer: ``Trainer(..., optimizer_cls_and_kwargs=optimizer(...))``.

    It is made when training begins, with the Trainer's two groups (biases and norms don't decay), named
    parameters, and what TrainingArguments say: ``learning_rate``, ``weight_decay``, and Adam's betas and eps
    where the base has them. Schedules, clipping, accumulation and checkpoints are the Trainer's own.

    Args:
        base_class: of the optimizer, as ``torch.optim.AdamW``.
        transforms: applied in this order: ``optx.PerpGrad()``, or a function of the model that makes one
            (``lambda model: optx.HFT(model)``), which a Trainer with ``model_init`` needs, as it makes a new
            model and optimizer each time. A handle, too, as for `optx.wrap`.
        wrap: `optx.wrap`'s own options: ``{"state": "8bit", "master": "split"}``.
        base_options: of the base, in the place of what TrainingArguments say.

    Returns:
        The pair that a Trainer takes; its ``on(model, args)`` is the optimizer, for ``optimizers=`` or an
        overridden ``create_optimizer``.

    Raises:
        TransformError: something given is no transform. When it is made: DeepSpeed, FSDP1, a transform that
            serves another optimizer.
        OptxError: when it is made: an argument that would be without effect (``optim=``).

    Example:
        >>> import tempfile, torch, optx
        >>> from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16,
        ...     num_hidden_layers=1, num_attention_heads=2))
        >>> args = TrainingArguments(tempfile.mkdtemp(), max_steps=2, learning_rate=1e-3, use_cpu=True,
        ...     disable_tqdm=True, report_to=[], save_strategy="no", logging_strategy="no")
        >>> data = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 16
        >>> trainer = Trainer(model, args, train_dataset=data,
        ...     optimizer_cls_and_kwargs=optx.integrations.transformers.optimizer(
        ...         torch.optim.AdamW, optx.PerpGrad(), lambda model: optx.HFT(model)))
        >>> trainer.train().global_step  # doctest: +ELLIPSIS
        {...}
        2
    """
    return TrainerOptimizer((Maker(base_class, transforms, wrap or {}, base_options), {}))


def loss(
    loss: Loss,
    index: str = "index",
) -> TrainerLoss:
    """A loss of optx for a Trainer: ``Trainer(..., compute_loss_func=loss(optx.StableMaxCrossEntropy()))``.

    `optx.StableMaxCrossEntropy`, `optx.ZLoss` and `optx.LossReweight` take the place of the model's loss;
    `optx.SAF` and `optx.MESA` are added to the cross-entropy, and need ``callbacks=[OptxCallback()]``, which
    tells them the batch and the epoch. Batches that are accumulated count by their labels
    (``num_items_in_batch``), so that a step is that of one large batch. The callback saves a loss's state
    with the checkpoints.

    Args:
        loss: made by you.
        index: for SAF: where a batch has the samples' places, as `optx.with_index` puts them there; with
            ``remove_unused_columns=False``.

    Raises:
        OptxError: it is no loss of optx, or has an option that a Trainer would not honour.

    Example:
        >>> import torch, optx
        >>> from transformers.modeling_outputs import CausalLMOutput
        >>> function = optx.integrations.transformers.loss(optx.StableMaxCrossEntropy())
        >>> logits, labels = torch.zeros(1, 4, 10), torch.tensor([[3, 1, 2, -100]])
        >>> function(CausalLMOutput(logits=logits), labels)  # log 10
        tensor(2.3026)
        >>> function(CausalLMOutput(logits=logits), labels, num_items_in_batch=4)  # 2 of 4 in this batch
        tensor(1.1513)
    """
    return TrainerLoss(loss, index)


class OptxCallback(TrainerCallback):
    """For a Trainer's ``callbacks``: logs what optx does, and has checkpoints hold adapters alone.

    With a handle, checkpoints, ``trainer.save_model()`` and the best model are what `Handle.save` writes
    (PEFT's two files where PEFT knows the method; several handles each in a folder of its name), and what
    else of the model trains or has changed; the base model is left out. `optx.attach` gives all of that
    back; PEFT reads the adapters alone.
    ``resume_from_checkpoint``, ``save_total_limit`` and ``load_best_model_at_end`` work as ever: make the
    same base model, attach as before, give the same callback. Without it, the Trainer refuses such a
    checkpoint. Once all handles are off (``merge_and_unload``), the model is saved whole again.

    Nothing is put on the model; methods of the Trainers that have it are replaced until `remove`.

    Args:
        handle: of `optx.attach`; several; or a function of the model that returns them, for ``model_init``.
        losses: whose state goes along with checkpoints and whose ``set_epoch`` is called, where they are not
            the Trainer's ``compute_loss_func``.
        hft_rounds: begin a new round of `optx.HFT` with each ``"epoch"``, or with each ``"train"`` (a stage:
            every ``trainer.train()`` after the first). None leaves it to HFT's own ``rounds_every``.
        adapters_only: False has checkpoints hold the whole model, as without the callback.
        optimizer: whose numbers are logged, where it is not the Trainer's.

    Raises:
        OptxError: an argument that is none of these. When training begins: a handle that was removed or is of
            another model; FSDP or DeepSpeed, which write the whole model in their own way.
        MergeError: when training begins, or at a save: a handle is merged.

    Example:
        >>> import os, tempfile, torch, optx
        >>> from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16,
        ...     num_hidden_layers=1, num_attention_heads=2))
        >>> handle = optx.attach(model, optx.LoRA(rank=2))
        >>> frozen = optx.trainable_only(model, handle)
        >>> args = TrainingArguments(tempfile.mkdtemp(), max_steps=2, save_steps=2, use_cpu=True,
        ...     disable_tqdm=True, report_to=[], logging_strategy="no")
        >>> data = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 16
        >>> trainer = Trainer(model, args, train_dataset=data,
        ...     callbacks=[optx.integrations.transformers.OptxCallback(handle)])
        >>> trainer.train().global_step  # doctest: +ELLIPSIS
        {...}
        2
        >>> checkpoint = os.path.join(args.output_dir, "checkpoint-2")
        >>> sorted(name for name in os.listdir(checkpoint) if "adapter" in name)
        ['adapter_config.json', 'adapter_model.safetensors']
        >>> handle.remove()
        >>> again = optx.attach(model, checkpoint)
    """

    def __init__(
        self,
        handle: Handles = None,
        *,
        losses: Any = (),
        hft_rounds: Literal["epoch", "train"] | None = None,
        adapters_only: bool = True,
        optimizer: Optimizer | None = None,
    ) -> None:
        if hft_rounds is not None:
            check_choice(WHERE, "hft_rounds", hft_rounds, ("epoch", "train"))
        several = isinstance(handle, Iterable)
        self._given: Any = list(handle) if several else handle  # an iterator ends
        self._hft_rounds = hft_rounds
        self._adapters_only, self._optimizer = adapters_only, optimizer
        self._losses: list[Any] = [*losses] if isinstance(losses, list | tuple) else [losses]  # pyright: ignore[reportUnknownMemberType]
        for one in self._losses:
            if not callable(getattr(one, "state_dict", None)):
                raise OptxError(
                    f"{WHERE}: losses has {shown(one)}, which has no state to save. Leave it out."
                )
        if not callable(handle):
            self._handles_of(None)
        self._hooks: TrainerHooks | None = None  # of the Trainer that trains, or was made last
        self._every: weakref.WeakSet[TrainerHooks] = weakref.WeakSet()  # Trainers hold them
        self._stepped = False  # in any training, of which a next one is another stage
        self._first_epoch = self._resumed_inside = False

    # ---- the Trainer -----------------------------------------------------------------------------------

    def serve(self, trainer: Any) -> None:
        """Begin to serve a Trainer, for one that has been made already: after ``trainer.add_callback``.

        A Trainer that gets the callback in its ``callbacks`` is served by itself.

        Args:
            trainer: a `transformers.Trainer`, TRL's among them.
        """
        known = next((one for one in self._every if one.trainer is trainer), None)
        if known is not None:
            self._hooks = known
            return
        if any(
            isinstance(one, OptxCallback) and one is not self for one in trainer.callback_handler.callbacks
        ):
            raise OptxError(
                f"{WHERE}: the Trainer has two of them. Give one all handles: OptxCallback([a, b])."
            )
        function, args = trainer.compute_loss_func, trainer.args
        if is_ours(function):
            check_smoothing(trainer)
        losses = self._losses + [one for one in losses_of(function) if one not in self._losses]
        for one in losses:
            if isinstance(one, LossReweight) and one.accumulate != args.gradient_accumulation_steps:
                warn(
                    f"{WHERE}: LossReweight has accumulate={one.accumulate}, and the Trainer accumulates "
                    f"{args.gradient_accumulation_steps} batches: its steps (warmup, anneal) are not the "
                    f"optimizer's. Give accumulate={args.gradient_accumulation_steps}."
                )
        hooks = TrainerHooks(trainer, self._handles_of, losses, self._adapters_only, self._optimizer)
        try:
            hooks.checkpoint()  # what the script made, before anything trains or is loaded
        except BaseException:
            hooks.remove()
            raise
        self._hooks = hooks
        self._every.add(hooks)

    def remove(self) -> None:
        """Give its Trainers their own methods back; a removed callback does nothing until `serve`."""
        for hooks in self._every:
            hooks.remove()
        self._every.clear()
        self._hooks = None

    def _handles_of(self, model: Any) -> list[Handle]:
        given: Any = self._given
        if callable(given) and not isinstance(given, Handle):
            given = given(model)
        found: list[Any] = [] if given is None else [given] if isinstance(given, Handle) else list(given)
        for one in found:
            if not isinstance(one, Handle):
                raise OptxError(f"{WHERE}: {shown(one)} is no handle. Pass what optx.attach returned.")
        return found

    # ---- events ------------------------------------------------------------------------------------------

    def on_init_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Serve the Trainer that is being made."""
        trainer = trainer_around(having=self)
        if trainer is not None:
            self.serve(trainer)

    def on_train_begin(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        """Look at what can't be right, begin to measure, and begin HFT's stage."""
        if (trainer := trainer_around(having=self)) is not None:
            self.serve(trainer)  # it came by add_callback, or another Trainer has the callback too
        hooks = self._hooks
        if hooks is None:
            raise OptxError(f"{WHERE}: no Trainer is found around it. Call callback.serve(trainer) once.")
        given, handles = self._handles_of(hooks.trainer.model), hooks.handles()
        if len(handles) < len(given):
            raise OptxError(
                f"{WHERE}: a handle was removed from its model, so nothing of it trains. Attach again."
            )
        for one in handles:
            if one.merged:
                raise MergeError(
                    f"{WHERE}: {one!r} is merged, so nothing of it trains. Call unmerge() first."
                )
        hooks.checkpoint()
        optimizers = [self._optimizer or options.get("optimizer")]
        begin(optimizers)
        tell_clipped_twice(WHERE, optimizers, "max_grad_norm", args.max_grad_norm, "it to 0")
        self._first_epoch = True
        resumed = state.global_step > 0
        self._resumed_inside = resumed and not float(state.epoch or 0).is_integer()
        if self._hft_rounds == "train" and not resumed and self._stepped:
            self._hft(options).next_round()
        elif self._hft_rounds is not None:
            self._hft(options)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        """Tell losses the epoch, and begin HFT's round."""
        hooks, resumed = self._hooks, state.global_step > 0
        for one in () if hooks is None else hooks.losses:
            if callable(tell := getattr(one, "set_epoch", None)):
                tell(int((state.epoch or 0) + 1e-6))  # a whole number but after a resumption
        first, self._first_epoch = self._first_epoch, False
        goes_on = self._resumed_inside if resumed else not self._stepped
        if self._hft_rounds == "epoch" and not (first and goes_on):
            self._hft(options).next_round()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A training that took no step (it ran out of memory, and begins again) is no stage."""
        self._stepped = True

    def _hft(self, options: Mapping[str, Any]) -> HFT:
        wrapped = wrapped_in(options.get("optimizer"))
        found = next((one for one in wrapped.transforms if isinstance(one, HFT)), None) if wrapped else None
        if found is None:
            raise TransformError(
                f"{WHERE}: hft_rounds={self._hft_rounds!r}, and the Trainer's optimizer has no optx.HFT."
            )
        return found
