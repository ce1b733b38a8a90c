"""`wrap`: takes transforms on, on a plain optimizer or on one that has some."""

from __future__ import annotations

from torch.optim import Optimizer

from optx._errors import TransformError
from optx.step.base_step import owner_of
from optx.step.following import Followed
from optx.step.transform import Fused, Master, Rounding, StateFormat, Transform
from optx.step.wrapped import Settings, Wrapped, class_for


def wrap(
    optimizer: Optimizer,
    *transforms: Transform | Followed,
    fused: Fused | None = None,
    skip_nonfinite: bool | None = None,
    rounding: Rounding | None = None,
    metrics: bool | None = None,
    state: StateFormat | None = None,
    master: Master | None = None,
) -> Wrapped:
    """Add transforms to an optimizer that a training loop already has.

    The result is a ``torch.optim.Optimizer`` that shares the base's ``param_groups``, ``state`` and
    ``defaults``; schedulers, GradScaler, checkpoints and Accelerate see one optimizer. Where the base's step
    is known as rules and every rule is elementwise, the whole step is one fused kernel (`Wrapped.plan`
    tells). `register_base` has a table of those that are, and takes a person's own.

    Args:
        optimizer: any torch optimizer, stepped before or not. One that is wrapped already takes the new
            transforms on, before those it has, keeps its settings where none are given anew, and is returned
            itself.
        transforms: applied in this order. All gradient rules run before any weight changes. A handle of
            `attach` among them makes the optimizer follow the model: what was attached joins the param group
            of what it serves (its settings and schedule), what takes no part any more leaves with its state,
            and what the method does in or after a step comes first of the transforms. When the handle is
            taken off, the optimizer goes back. To resume, do the same in the same order, then load.
        fused: ``"auto"`` (the default) takes a fused path where it can; True demands one and raises with the
            reason otherwise; ``"cpu"`` and ``"triton"`` demand that one; False runs the base as it is.
        skip_nonfinite: skip a step with an inf or nan gradient (``skipped_last`` tells, ``skipped_steps``
            counts), and leave everything as it was. Leave it False (the default) under a GradScaler, which
            does that itself.
        rounding: how a bfloat16 weight is written after a float32 update: ``"stochastic"`` (unbiased),
            ``"kahan"`` (compensated; two more bytes per parameter) or ``"nearest"`` (torch's; loses
            updates below half a unit in the last place). By default stochastic, but where a group is not
            fused the base writes its weights itself, to nearest; there the other two are refused.
        metrics: have every step measure what `Wrapped.metrics` tells. By default steps do so from its first
            call on. Sharded parameters (DTensors, FSDP2) need it, given on all ranks: their sums take an
            all-reduce, which no rank can begin alone. The callbacks of `optx.integrations` see to it.
        state: how moments are kept, of the base and of transforms: ``"float32"``; ``"bfloat16"``, rounded
            stochastically; or ``"8bit"``: a code of 8 bits each and a scale in bfloat16 per 32 of them, 2.1
            bytes for Adam's two where float32 takes 8 (FlashOptim, https://arxiv.org/abs/2602.23349; 8-bit
            moments where a weight can't have them, see `Wrapped.plan`, are float32). Arithmetic stays in
            float32. By default the base's: the weight's dtype. Anchors, masks and counts stay as they are. In
            a param group, ``"optx.state"`` says otherwise. A checkpoint in another format is refused unless
            it is converted (`Wrapped.load_state_dict`, `convert_state`: before a base that is not wrapped
            loads it, too).
        master: ``"split"`` keeps 8 of the 16 bits that a bfloat16 weight loses, ``"split16"`` all of them:
            the arithmetic sees, and keeps, a float32 weight of which the model has the upper half. In a param
            group: ``"optx.master"``.

    Keywords: bf16, bfloat16, stochastic rounding, Kahan, fused kernels, DDP, FSDP, FSDP2, HSDP, DTensor,
    torchrun, distributed, metrics, logging, 8-bit optimizer, low-bit state, quantised
    moments, master weights.

    Returns:
        The wrapped optimizer.

    Raises:
        TransformError: no trainable parameter, a transform given twice, a base or parameter that a
            transform can't serve, an optimizer that is wrapped already (pass what wrap returned), a handle
            that was taken off, or of which it is not known which group its parameters belong to.
        FusedError: ``fused`` demands a path that can't be taken.
        OptxError: an argument out of range, or a rounding, state or master that can't be honoured.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> opt = optx.wrap(torch.optim.AdamW(model.parameters(), lr=1e-3), optx.PerpGrad())
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> opt.step()

        Parameters that come later:

        >>> handle = optx.attach(model, optx.LoRA(rank=2), targets="0")
        >>> opt = optx.wrap(opt, handle)
        >>> len(opt.param_groups[0]["params"])
        4
        >>> handle.remove()
        >>> len(opt.param_groups[0]["params"])
        2
    """
    handles = [one for one in transforms if isinstance(one, Followed)]
    own = [one for one in transforms if not isinstance(one, Followed)]
    given = {"fused": fused, "skip_nonfinite": skip_nonfinite, "rounding": rounding, "metrics_asked": metrics}
    given |= {"state_format": state, "master": master}
    settings: Settings = {key: value for key, value in given.items() if value is not None}
    if isinstance(optimizer, Wrapped):
        optimizer._check_alive("wrap")  # pyright: ignore[reportPrivateUsage]
        # Not a second layer: schedulers and hooks on the one that is there stay in force.
        optimizer.take_on(own, settings, handles)
        return optimizer
    if isinstance(optimizer, Optimizer) and owner_of(optimizer) is not None:  # pyright: ignore
        raise TransformError(
            f"wrap: this {type(optimizer).__name__} is wrapped already, and two wrappers would each step it. "
            "Pass what wrap returned, which takes more transforms on; opt.remove() takes them off."
        )
    return class_for(optimizer)(optimizer, own, settings, handles)
