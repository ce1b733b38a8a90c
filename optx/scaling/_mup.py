"""`mup`: an optimizer's param groups as muP wants them, for any base optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from torch import Tensor, nn
from torch.optim import Optimizer

from optx._errors import OptxError, check_choice, check_range
from optx._names import plain_name
from optx.scaling._families import Kind, named
from optx.scaling._multipliers import (
    PREFIX,
    Eps,
    Multipliers,
    Rules,
    recorded,
    split,
    times,
)
from optx.scaling._rules_of_width import Decay, Parametrization, check_decay, parametrization_of
from optx.scaling._shapes import Shapes
from optx.scaling._watch import watch, watched_by
from optx.step.numbers import as_float
from optx.step.transform import Group

Named = Iterable[tuple[str, Tensor]]


def mup(
    target: Optimizer | nn.Module | Named,
    shapes: Shapes,
    *,
    lr: float | None = None,
    weight_decay: float | None = None,
    optimizer: str | type[Optimizer] | None = None,
    parametrization: str | Parametrization = "mup",
    decay: str = "sqrt",
    decay_exponent: float | None = None,
    eps: str | float = "scale",
    model: nn.Module | None = None,
) -> Any:
    """Learning rates, weight decays and eps that hold at any width (muP), for any base optimizer.

    Tuned on the narrow model that ``shapes`` compares with, they are the wide model's. An optimizer's groups
    are split in place by what they are multiplied by; other options, the order within a group, and the state
    of an optimizer that has stepped stay. The factors are recorded in the groups and saved with them, so a
    checkpoint is never multiplied twice. Before each step the ratios are looked at: what has destroyed them
    (OneCycleLR with one ``max_lr``, CosineAnnealingLR's ``eta_min``) is an error. Groups that come later are
    multiplied at the next step. Make learning rate schedulers afterwards.

    The readout must be multiplied in the forward pass too (``optx.attach(model, optx.MuReadout(shapes))``),
    logits of attention (``optx.MuAttention(shapes)``), and first weights be of the right size
    (`optx.scaling.init_`): a warning at the first step names what is missing.
    ``parametrization="mup-table3"`` needs no multiplier of the readout, and has no tied heads.

    Args:
        target: an optimizer, wrapped or not; or a model, or pairs of name and parameter, to make groups of.
        shapes: of the model (`optx.scaling.shapes`).
        lr: for groups to be made: the base model's.
        weight_decay: the same.
        optimizer: how the optimizer steps, where its class is not known: ``"adamw"``, ``"adam"``, ``"lion"``,
            ``"sgd"``; for groups to be made, always (or its class).
        parametrization: ``"mup"`` (table 8, as the peer package has it), ``"mup-table3"``, ``"mup-table9"``,
            ``"standard"`` (nothing is multiplied), ``"ntk"``, ``"mean_field"``, or what ``optx.scaling.abc``
            returns, made for this family of optimizers.
        decay: ``"sqrt"``: matrices decay by the square root of their fan-in's ratio, all else not at all;
            ``"linear"``: lr * weight_decay stays (the peer's); ``"none"``: weight_decay stays.
        decay_exponent: another exponent than the square root's 0.5.
        eps: ``"scale"``: as the gradient's entries, by 1 / m where these fall so; ``"keep"``: as it is. For
            groups to be made, a number is the base model's (else 1e-8).
        model: where the optimizer was not made of ``named_parameters()``: whose parameters these are.

    Paper values:
        ``parametrization="mup"``: tables 8 and the authors' package (the default).
        ``decay="sqrt"``: arXiv 2510.15262 (the default), tuned at width 256 and used up to 2048.
        ``decay="linear"``: the authors' package of muP.

    Limits: Adafactor, Muon, LAMB, LARS, Rprop, Adadelta and LBFGS need rules of their own and are refused.
    ``"sqrt"`` is a rule for AdamW's decay, and refused for one within the gradient (SGD, Adam). Learning
    rates in GPU tensors are multiplied, but not looked at before steps. A deepcopy of an optimizer that is
    not wrapped is looked after again once `mup` is called on it.

    Keywords: muP, maximal update parametrization, muTransfer, width, hyperparameter transfer, weight decay
    scaling, per-layer learning rate, param groups.

    Evidence: ``test_mup_groups.py``, ``test_mup_peer.py``, ``test_rules_of_width.py``;
        ``optx run transfer``.

    Source: "Tensor Programs V", arXiv 2203.03466, tables 3, 8 and 9; "Robust Layerwise Scaling Rules by
    Proper Weight Decay Tuning", arXiv 2510.15262.

    Returns:
        The optimizer itself; or a list of param groups.

    Raises:
        OptxError: a parameter that the shapes lack or have in another shape, an optimizer that is not known
            or was multiplied already, a scheduler made before, an argument out of range; nothing is changed.

    Example:
        >>> import torch, optx
        >>> def make(width):
        ...     sizes = (8, width), (width, width), (width, 3)
        ...     return torch.nn.Sequential(*(torch.nn.Linear(*size) for size in sizes))
        >>> model = make(64)
        >>> shapes = optx.scaling.shapes(model, base=make(16))
        >>> opt = torch.optim.AdamW(model.named_parameters(), lr=3e-3, weight_decay=0.1)
        >>> opt = optx.scaling.mup(opt, shapes)
        >>> [(group["lr"], group["weight_decay"], len(group["params"])) for group in opt.param_groups]
        [(0.003, 0.0, 4), (0.00075, 0.2, 1), (0.003, 0.0, 1)]
    """
    rules = make_rules("mup", shapes, parametrization, decay, decay_exponent, eps, optimizer)
    if isinstance(target, Optimizer):
        given = {"lr": lr, "weight_decay": weight_decay, "eps": None if isinstance(eps, str) else eps}
        extra = next((key for key, value in given.items() if value is not None), None)
        if extra is not None:
            raise OptxError(f"mup: {extra} is {given[extra]!r}, and the optimizer has its own. Leave it out.")
        base = cast(Optimizer, getattr(target, "base", target))
        begin(base, Multipliers(rules, model))
        return target
    pairs = target.named_parameters() if isinstance(target, nn.Module) else target
    return _groups(rules, pairs, lr, weight_decay, optimizer, eps)


def make_rules(
    owner: str,
    shapes: Any,
    parametrization: str | Parametrization,
    decay: Any,
    decay_exponent: float | None,
    eps: Any,
    optimizer: Any,
) -> Rules:
    """What is asked for, looked at."""
    if not isinstance(shapes, Shapes):
        raise OptxError(
            f"{owner}: shapes is a {type(shapes).__name__}; it must be what optx.scaling.shapes(model, "
            "base=...) returns."
        )
    check_choice(owner, "decay", decay, ("sqrt", "linear", "none"))
    wanted: Decay = decay
    if decay_exponent is not None:
        if decay != "sqrt":
            raise OptxError(
                f"{owner}: decay={decay!r} and decay_exponent={decay_exponent!r} are two rules; give one of "
                "them."
            )
        check_decay(owner, decay_exponent)
        wanted = float(decay_exponent)
    if isinstance(eps, str) or eps is None:
        check_choice(owner, "eps", eps, ("scale", "keep"))
    how: Eps = "keep" if eps == "keep" else "scale"
    said = optimizer if optimizer is None or isinstance(optimizer, str) else None
    if optimizer is not None:
        named(owner, optimizer)
    return Rules(owner, shapes, parametrization_of(owner, parametrization), wanted, how, said)


def begin(base: Optimizer, multipliers: Multipliers) -> None:
    """Multiply an optimizer's groups, and look after them from now on."""
    if watched_by(base) is not None:
        owner = multipliers.rules.owner
        raise OptxError(
            f"{owner}: the multipliers of width are on this {type(base).__name__} already, and once more "
            "would multiply twice. One of optx.scaling.mup and optx.MuAdamW is enough."
        )
    multipliers.apply(base)
    watch(base, multipliers)


def _groups(rules: Rules, pairs: Named, lr: Any, weight_decay: Any, optimizer: Any, eps: Any) -> list[Group]:
    """Param groups for an optimizer that is still to be made."""
    if optimizer is None:
        raise OptxError("mup: for groups of a model's parameters say what they are for: optimizer='adamw'.")
    kind = named("mup", optimizer)
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if value is None:
            raise OptxError(f"mup: groups are made with {name}, the base model's; pass {name}=.")
        check_range("mup", name, value, 0.0)
    group: Group = {**_numbers(kind, eps), "lr": lr, "weight_decay": weight_decay}
    try:
        named_tensors = {plain_name(name): p for name, p in pairs}
    except (TypeError, ValueError, AttributeError):
        raise OptxError(
            "mup: target must be an optimizer, a model, or pairs of name and parameter (named_parameters())."
        ) from None
    if not named_tensors:
        raise OptxError("mup: target has no parameters.")
    names, params = list(named_tensors), list(named_tensors.values())
    rules.check_decay(kind, group, f"{optimizer}")
    factors = [rules.factors(rules.width(n, p), kind, group) for n, p in zip(names, params, strict=True)]
    whole = {**group, "params": params, "param_names": names}
    return [part for part, _ in split(whole, names, factors, 0)]


def _numbers(kind: Kind, eps: Any) -> Group:
    if isinstance(eps, str):
        return {} if kind.eps is None else {"eps": kind.eps}
    check_range("mup", "eps", eps, 0.0)
    if kind.eps is None:
        raise OptxError(f"mup: eps is {eps!r}, and this optimizer has none. Leave it out.")
    return {"eps": eps}


def group_lrs(optimizer: Optimizer, lr: float) -> list[float]:
    """One learning rate for each param group, in muP's ratios: for schedulers that set them absolutely.

    Args:
        optimizer: whose groups `mup` or `optx.MuAdamW` has split.
        lr: what the base model would have.

    Raises:
        OptxError: the groups were not split, or lr is no number.

    Example:
        >>> import torch, optx
        >>> def make(width):
        ...     return torch.nn.Sequential(torch.nn.Linear(8, width), torch.nn.Linear(width, 3))
        >>> model = make(64)
        >>> opt = torch.optim.SGD(model.named_parameters(), lr=0.1)
        >>> opt = optx.scaling.mup(opt, optx.scaling.shapes(model, base=make(16)))
        >>> optx.scaling.group_lrs(opt, 0.5)
        [2.0, 0.5]
        >>> lrs = optx.scaling.group_lrs(opt, 0.5)
        >>> schedule = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=lrs, total_steps=10)
    """
    number = as_float(lr)
    if number is None:
        raise OptxError(f"group_lrs: lr is {lr!r}; it must be one number.")
    if all(recorded(group) is None for group in optimizer.param_groups):
        raise OptxError(
            "group_lrs: this optimizer's groups have no multipliers; call optx.scaling.mup on it first."
        )
    return [times(number, group.get(PREFIX + "lr", 1.0)) for group in optimizer.param_groups]
