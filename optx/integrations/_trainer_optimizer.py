"""What makes a wrapped optimizer out of a Trainer's arguments and model, as often as the Trainer asks."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import nn
from torch.optim import Optimizer
from transformers import Trainer

from optx._errors import OptxError, TransformError, shown
from optx.integrations._clipped_twice import tell_clipped_twice
from optx.step.following import Followed
from optx.step.transform import Transform
from optx.step.wrap import wrap
from optx.step.wrapped import Wrapped

_GIVEN = (Transform, Followed)
Makes = Transform | Followed | Callable[[Any], Transform | Followed]
_WHERE = "optx.integrations.transformers.optimizer"


def trainer_around(*, having: Any = None) -> Any:
    """The Trainer whose method is running; it tells callbacks and optimizers everything but itself.

    Args:
        having: a callback that it must have.
    """
    frame = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, Trainer) and (
            having is None or any(one is having for one in cast("Any", found).callback_handler.callbacks)
        ):
            return found
        frame = frame.f_back
    return None


class Maker:
    """Makes the optimizer; of transformers 4 the Trainer passes groups, of 5 it asks for a factory first."""

    def __init__(
        self,
        base_class: Callable[..., Optimizer],
        transforms: Sequence[Makes],
        settings: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> None:
        self.base_class, self.transforms = base_class, tuple(transforms)
        self.settings, self.options = dict(settings), dict(options)
        self._last: weakref.ref[Wrapped] | None = None
        if not callable(base_class):
            raise OptxError(
                f"{_WHERE}: base_class is {shown(base_class)}; it must be a class such as torch.optim.AdamW, "
                "which is made when the Trainer asks for it."
            )
        for name, value in self.options.items():
            if name in inspect.signature(wrap).parameters and not _takes(base_class, name):
                raise OptxError(
                    f"{_WHERE}: {name} is an option of optx.wrap and none of {_name(base_class)}; give "
                    f"wrap={{{name!r}: {value!r}}}."
                )
        for one in cast("tuple[Any, ...]", self.transforms):
            if not isinstance(one, _GIVEN) and (isinstance(one, type) or not callable(one)):
                raise TransformError(
                    f"{_WHERE}: {shown(one)} is neither a transform, a handle nor a function of the model "
                    "that makes one; give optx.PerpGrad(), or lambda model: optx.HFT(model)."
                )

    def __call__(self, *given: Any) -> Any:
        """Transformers 5 calls twice, first with nothing; 4 calls once, with groups that have no names."""
        if not given:
            return self
        trainer = trainer_around()
        if trainer is None:
            raise OptxError(
                f"{_WHERE}: nothing but a Trainer can make an optimizer of this; elsewhere call "
                "its .on(model, args), which returns the optimizer."
            )
        model = given[0] if isinstance(given[0], nn.Module) else trainer.model
        return self.make(model, trainer.args, trainer)

    def make(self, model: nn.Module, args: Any, trainer: Any) -> Wrapped:
        """The optimizer of a model; what can't work is refused before anything is made."""
        _check_engine(args, trainer)
        _check_arguments(args, self.base_class)
        self._check_again()
        options = {**_defaults(self.base_class, args), **self.options}
        decay = options.pop("weight_decay", None)
        groups = _groups(model, trainer, options, self._decay(args, decay))
        transforms = [self._made(one, model) for one in self.transforms]
        made = wrap(self.base_class(groups, **options), *transforms, **self.settings)
        tell_clipped_twice(_WHERE, [made], "max_grad_norm", args.max_grad_norm, "it to 0")
        self._last = weakref.ref(made)
        return made

    def _decay(self, args: Any, given: float | None) -> float | None:
        """What matrices decay by; None where the base knows no decay."""
        decay = args.weight_decay if given is None else given
        if _takes(self.base_class, "weight_decay"):
            return decay
        if decay:
            raise OptxError(
                f"{_WHERE}: weight_decay is {decay} and {_name(self.base_class)} has none; leave it 0."
            )
        return None

    def _made(self, one: Makes, model: nn.Module) -> Transform | Followed:
        made: Any = one if isinstance(one, _GIVEN) else one(model)
        if not isinstance(made, _GIVEN):
            raise TransformError(
                f"{_WHERE}: a function of the model returned {shown(made)}; it must return a transform, as "
                "lambda model: optx.HFT(model) does."
            )
        return made

    def _check_again(self) -> None:
        """A transform serves one optimizer; a Trainer with ``model_init`` makes a new one each time."""
        last = None if self._last is None else self._last()
        if self._last is None or (last is not None and last.removed):
            return
        for one in self.transforms:
            if isinstance(one, _GIVEN):
                makes = f"optx.{type(one).__name__}(...)" if isinstance(one, Transform) else "the handle"
                raise TransformError(
                    f"{_WHERE}: the Trainer makes a second optimizer (model_init, hyperparameter_search), "
                    f"and {one!r} serves the first. Give a function that makes it: lambda model: {makes}."
                )


# ---- groups and arguments ---------------------------------------------------------------------------------


def _groups(
    model: nn.Module, trainer: Any, options: Mapping[str, Any], decay: float | None
) -> list[dict[str, Any]]:
    """What trains, in the Trainer's two groups, with names: those that decay, then biases and norms."""
    found = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not found:
        raise OptxError(f"{_WHERE}: the model has no trainable parameter (requires_grad is False for all).")
    if decay is None:
        return [{"params": found}]
    asked: Any = Trainer.get_decay_parameter_names if trainer is None else None
    names = set(asked(None, model) if trainer is None else trainer.get_decay_parameter_names(model))
    split = (
        {"params": [pair for pair in found if pair[0] in names], "weight_decay": decay},
        {"params": [pair for pair in found if pair[0] not in names], "weight_decay": 0.0},
    )
    return [group for group in split if group["params"]]


def _defaults(base_class: Any, args: Any) -> dict[str, Any]:
    """What TrainingArguments say, as far as the base takes it."""
    found: dict[str, Any] = {"lr": args.learning_rate} if _takes(base_class, "lr") else {}
    if _takes(base_class, "betas"):
        found["betas"] = (args.adam_beta1, args.adam_beta2)
        if _takes(base_class, "eps"):
            found["eps"] = args.adam_epsilon
    return found


def _takes(base_class: Any, name: str) -> bool:
    try:
        known = inspect.signature(base_class).parameters
    except (TypeError, ValueError):
        return name == "lr"
    return name in known or (
        name in ("lr", "weight_decay") and any(p.kind is p.VAR_KEYWORD for p in known.values())
    )


def _name(base_class: Any) -> str:
    return getattr(base_class, "__name__", shown(base_class))


def _check_arguments(args: Any, base_class: Any) -> None:
    """An argument that would be without effect is refused."""
    fields = {one.name: one.default for one in dataclasses.fields(args)}
    silent = ["optim", "optim_args", "optim_target_modules"]
    if not _takes(base_class, "betas"):
        silent += ["adam_beta1", "adam_beta2", "adam_epsilon"]
    for name in silent:
        value = getattr(args, name, None)
        plain = getattr(value, "value", value)
        if name in fields and plain != getattr(fields[name], "value", fields[name]):
            raise OptxError(
                f"{_WHERE}: TrainingArguments have {name}={plain!r}, which would be without effect, as the "
                f"optimizer is {_name(base_class)}. Leave it out."
            )


def _check_engine(args: Any, trainer: Any) -> None:
    """Engines whose optimizers see other tensors than the model's parameters."""
    if getattr(args, "deepspeed", None) or getattr(trainer, "is_deepspeed_enabled", False):
        raise TransformError(
            f"{_WHERE}: DeepSpeed steps flat pieces of all weights at once, in which a transform can't tell "
            "one weight from another. Use fsdp=True (FSDP2), which keeps them apart."
        )
    if trainer is None:
        return
    if getattr(trainer, "is_fsdp_xla_enabled", False):
        raise TransformError(f"{_WHERE}: XLA's FSDP gives flat pieces of weights; it can't be served.")
    if getattr(trainer, "is_fsdp_enabled", False):
        plugin: Any = trainer.accelerator.state.fsdp_plugin
        if getattr(plugin, "fsdp_version", 1) != 2:
            raise TransformError(
                f"{_WHERE}: FSDP1 (fsdp_version 1) flattens weights into pieces, in which a transform can't "
                'tell one from another. Set fsdp_config={"version": 2}.'
            )
