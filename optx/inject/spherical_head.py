"""SphericalHead: an output head whose loss, gradient and step cost the same for any number of classes.

Source: "Efficient Exact Gradient Update for training Deep Networks with Very Large Sparse Targets",
arXiv 1412.7091; for the Z-loss and its kin, arXiv 1604.08859.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

from torch import nn

from optx._errors import OptxError, TargetError, check_above_0, check_range, check_whole, shown
from optx._spherical import SphericalLoss
from optx.inject._injection import Injection, Site
from optx.inject._part import Part
from optx.inject._served import Served
from optx.inject._spherical_handle import HeadStep, SphericalHandle
from optx.inject._spherical_part import FactoredHead, Released
from optx.inject._trained_whole import Saved
from optx.step.transform import Transform

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class SphericalHead(Injection):
    """Train an output head of very many classes by exact steps of SGD in O(d^2) an example, whatever D is.

    A loss that knows of the outputs o = W x their sum, their squares' sum and the target's (`optx.ZLoss`, in
    all its forms) needs no output but that one: the sums are x^T W^T W x and x^T W^T 1. W (D, d) is kept as
    V U + 1 omega^T, and W^T W and W^T 1 beside it, so that a step of SGD on all of W changes U, omega and the
    target's rows of V. Nothing is approximated: the step is that of plain SGD, without momentum.

    In training mode, with gradients, the head hands on its input, and ``handle.loss(model(x), labels)`` takes
    the place of ``criterion(model(x), labels)``; or give it the head's input, however it was had. What is
    handed on may be moved, cut and cast; any other use of it, as a loss that the model makes of ``labels=``,
    raises. In evaluation mode, or without gradients, the head computes all outputs, as before.
    ``optx.wrap(optimizer, handle)`` steps the head with each step of the optimizer, which steps the rest, and
    leaves it the head's weight no longer; without it call ``handle.step()`` after each step. Gradients of
    several backward passes add up until the step.

    Args:
        loss: an `optx.ZLoss`; None: ``optx.ZLoss()``.
        lr: the head's rate. Where `optx.wrap` steps it, it is scheduled as the optimizer's first param group
            is: times what the group's ``lr`` has become of its ``initial_lr``. ``handle.lr`` may be set.
        weight_decay: as torch.optim.SGD has it. Under the Z-loss it holds the weights' scale, which grows
            without it and makes steps smaller.
        stabilize_every: steps after which U's singular values are brought back to where they lose no digits
            (earlier if they may have gone far); it changes no weight.
        recompute_every: steps after which W^T W is computed anew, O(D d^2), as V's rounding in float32 adds
            up in it.

    Serves one plain nn.Linear; by default what ``get_output_embeddings()`` of the model gives. A bias is
    trained too, as the weight of a constant input 1. U, W^T W and their like are float64 whatever the model
    is, V float32 (float64 for a head in float64); all in all D d + 4 d^2 numbers. The model's keys stay: its
    ``state_dict()`` has the plain weight, and the factors beside it, from which a run goes on bit for bit; a
    plain checkpoint that is loaded is factored anew. ``remove()`` leaves a plain nn.Linear with what was
    trained, and ``handle.materialize()`` makes one.

    Paper values:
        ``lr=0.01``: the authors' timing run, with ZLoss(a=1, b=0), batches of 200, d 512 and D 793,471.
        ``stabilize_every=100``: there (the default).

    Limits: Plain SGD on the head alone: no momentum and no Adam. Gradient clipping, `optx.Clip` and
    GradScaler know nothing of the head. All outputs, for evaluation, cost O(D d) as ever. One process, one
    head, not tied, not quantised, and nothing else attached to it. A checkpoint has the head twice. On
    batches far smaller than d, gathers and small products dominate; from D of a few thousand on it pays.
    A head whose rows are all equal has no gradient under the Z-loss, and is refused.

    Keywords: large vocabulary, extreme classification, output layer, softmax alternative, sampled softmax,
        hierarchical softmax, factored output layer, language model, word prediction.

    Evidence: ``optx run vocab``, ``optx bench head``; ``test_spherical_head.py``, ``test_spherical_step.py``.

    Raises:
        OptxError: an option out of range, or a loss that is none of the family.
        TargetError: at attach, a head that is tied, no plain nn.Linear, or constant; or more than one.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.Sequential(torch.nn.Embedding(50, 8), torch.nn.Linear(8, 20_000))
        >>> handle = optx.attach(model, optx.SphericalHead(optx.ZLoss(a=0.1, b=20.0), lr=1.0), targets="1")
        >>> optimizer = optx.wrap(torch.optim.SGD(model.parameters(), lr=0.1), handle)
        >>> words = torch.randint(50, (2, 33))
        >>> loss = handle.loss(model(words[:, :-1]), words[:, 1:])
        >>> loss.backward()
        >>> optimizer.step()
        >>> handle.remove()
        >>> model[1].weight.shape
        torch.Size([20000, 8])

    Source: arXiv 1412.7091 (the step), arXiv 1604.08859 (the Z-loss).
    """

    name: ClassVar[str] = "spherical_head"
    role: ClassVar[str] = "head"
    serves: ClassVar[str] = "one plain nn.Linear, the output head"
    serves_one: ClassVar[str] = "head"

    loss: SphericalLoss | None = None
    lr: float = 0.1
    weight_decay: float = 0.0
    stabilize_every: int = 100
    recompute_every: int = 5000

    def __post_init__(self) -> None:
        def put(option: str, value: Any) -> None:
            object.__setattr__(self, option, value)

        if self.loss is not None and not isinstance(self.loss, SphericalLoss):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise OptxError(
                f"SphericalHead: loss is {shown(self.loss)}; it must be an optx.ZLoss, in one of its forms: "
                "no other loss can do without the outputs."
            )
        put("lr", check_above_0("SphericalHead", "lr", self.lr))
        check_range("SphericalHead", "weight_decay", self.weight_decay, 0.0)
        if self.lr * self.weight_decay >= 1:
            raise OptxError(
                f"SphericalHead: lr * weight_decay is {self.lr * self.weight_decay:g}, with which a step "
                "leaves nothing of the weights; it must be below 1."
            )
        for name in ("stabilize_every", "recompute_every"):
            put(name, check_whole("SphericalHead", name, getattr(self, name), 1))

    def options(self) -> dict[str, Any]:
        """The options as plain data; the loss by its arguments."""
        loss = None if self.loss is None else self.loss.arguments()
        return {**{name: value for name, value in self.arguments().items() if name != "loss"}, "loss": loss}

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """What `options` described."""
        loss = options.get("loss")
        made = SphericalLoss(**cast("dict[str, Any]", loss)) if isinstance(loss, Mapping) else loss
        return super().from_options({**options, "loss": made})

    @property
    def needs_weight(self) -> bool:
        """It takes its place."""
        return True

    def places(self, model: nn.Module) -> Collection[str]:
        """The output head that the model tells of.

        Raises:
            TargetError: it tells of none.
        """
        getter: Any = getattr(model, "get_output_embeddings", lambda: None)
        found: Any = getter()
        for path, module in model.named_modules():
            if module is found and path:
                return [path]
        raise TargetError(
            f"attach: this {type(model).__name__} says of no module that it is its output head. Name it: "
            'attach(model, optx.SphericalHead(...), targets="head").'
        )

    def companions(self, model: nn.Module, sites: Sequence[Site]) -> list[tuple[Injection, list[Site]]]:
        """None; but ties are seen here."""
        for site in sites:
            own = {id(p) for p in site.module.parameters(recurse=False)}
            names = [name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in own]
            if len(names) > len(own):
                raise TargetError(
                    f"attach: the head {site.path!r} is tied ({', '.join(names)} are one tensor), and "
                    "factors of the head could not be read as an embedding. Untie it first, as with "
                    "tie_word_embeddings=False."
                )
        return []

    def part(self, module: nn.Module, path: str) -> Part:
        """The factors of one head, not filled yet."""
        weight: Any = getattr(module, "weight", None)
        if type(module) is not nn.Linear or type(weight) is not nn.Parameter:
            what = type(module).__name__
            if type(module) is nn.Linear:
                what += f" with a weight of {type(weight).__name__}"
            raise TargetError(f"attach: SphericalHead serves {self.serves}; {path!r} is a {what}.")
        if not bool(weight.isfinite().all()):
            raise TargetError(f"attach: SphericalHead can't factor {path!r}: its weight has inf or nan.")
        loss = SphericalLoss() if self.loss is None else self.loss
        if loss.form == "z" and bool((weight == weight[:1]).all()):
            raise TargetError(
                f"attach: all rows of the weight of {path!r} are equal, so all outputs are, and the Z-loss "
                "has no gradient there: the head would stay as it is. Give it random weights first."
            )
        return FactoredHead(module, path, loss)

    def transforms(self, handle: SphericalHandle) -> Sequence[Transform]:
        """The head's step, for `optx.wrap(optimizer, handle)`."""
        return [HeadStep(handle)]

    def handle(
        self, model: nn.Module, injection: Any, served: Sequence[Served], saved: Sequence[Saved]
    ) -> SphericalHandle:
        """What `optx.attach` returns."""
        for one in served:
            if isinstance(one.part, FactoredHead) and isinstance(one.module, nn.Linear):
                one.hooks.append(Released(one.part, one.module))
        return SphericalHandle(model, injection, served, saved)
