"""A model's parameters in an optimizer's groups, with the settings that its modules ask for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from torch import nn

from optx._errors import OptxError, check_range, near, shown

DECLARED = "param_options"
"""The attribute in which a module says what its own parameters ask for: settings by parameter."""

_MARK = "_optim"
"""Where state-spaces/s4 keeps the same, on a parameter."""

CAP = "max_lr"


def param_groups(
    model: nn.Module, *, lr: float, weight_decay: float = 0.0, **settings: Any
) -> list[dict[str, Any]]:
    """A model's parameters as groups for any torch optimizer; what asks for settings of its own has them.

    A module asks by an attribute or a property ``param_options``: settings by the name of a parameter of its
    own, such as ``{"log_dt": {"max_lr": 1e-3, "weight_decay": 0.0}}``. They are the optimizer's, and
    ``max_lr``: ``lr``, but this at most. `S4DLayer` asks for its steps and its A and B. Parameters marked
    with a dict ``_optim``, as state-spaces/s4 has them, are understood too.

    Args:
        model: the model, with what is attached to it.
        lr: the rate of all that ask for none.
        weight_decay: likewise.
        settings: others of the optimizer, for all groups (``betas=(0.9, 0.95)``).

    Returns:
        Groups with ``params``, ``lr``, ``weight_decay`` and the settings; every parameter that asks for a
        gradient is in one of them, once. The first has those that ask for nothing.

    Raises:
        OptxError: a number out of range, nothing to train, settings for a parameter that a module has not, or
            two modules that share a parameter and ask for different ones.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), optx.S4DLayer(4, d_state=8))
        >>> opt = torch.optim.AdamW(optx.param_groups(model, lr=0.01, weight_decay=0.1))
        >>> [(len(g["params"]), g["lr"], g["weight_decay"]) for g in opt.param_groups]
        [(6, 0.01, 0.1), (3, 0.001, 0.0)]
    """
    check_range("param_groups", "lr", lr, 0)
    check_range("param_groups", "weight_decay", weight_decay, 0)
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise OptxError(f"param_groups: the model is {shown(model)}; it must be a module.")
    if "params" in settings:
        raise OptxError(
            f"param_groups: params is {shown(settings['params'])}; parameters are the model's. Leave it out."
        )
    asked = declared(model)
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    plain = {"lr": lr, "weight_decay": weight_decay, **settings}
    rows[_key(plain)] = {"params": [], **plain}
    for p in model.parameters():
        if p.requires_grad:
            own = settled(asked.get(p, {}), plain)
            rows.setdefault(_key(own), {"params": [], **own})["params"].append(p)
    found = [row for row in rows.values() if row["params"]]
    if not found:
        raise OptxError(
            f"param_groups: no parameter of this {type(model).__name__} asks for a gradient, so there is "
            "nothing to train."
        )
    return found


def settled(asked: Mapping[str, Any], plain: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a group with what was asked for in the place of those that all have."""
    own = {**plain, **{name: value for name, value in asked.items() if name != CAP}}
    return {**own, "lr": min(own["lr"], asked[CAP])} if CAP in asked else own


def declared(model: nn.Module) -> dict[nn.Parameter, Mapping[str, Any]]:
    """What the parameters of a model ask for, those alone that ask for something.

    Raises:
        OptxError: as of `param_groups`.
    """
    found: dict[nn.Parameter, tuple[str, Mapping[str, Any]]] = {}
    for path, module in model.named_modules():
        for name, p, asked in _of(module, path):
            full = f"{path}.{name}".removeprefix(".")
            _check(full, asked)
            before = found.setdefault(p, (full, asked))
            if dict(before[1]) != dict(asked):
                raise OptxError(
                    f"param_groups: {before[0]!r} and {full!r} are one parameter, and their modules ask for "
                    f"{shown(dict(before[1]))} and {shown(dict(asked))}. Make the two ask for the same."
                )
    return {p: asked for p, (_, asked) in found.items()}


def _of(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Parameter, Mapping[str, Any]]]:
    """One module's own parameters that ask for something."""
    own = dict(module.named_parameters(recurse=False))
    asked = cast("Mapping[str, Any]", getattr(module, DECLARED, {}))
    if not isinstance(asked, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise OptxError(
            f"param_groups: {DECLARED} of {path!r} is {shown(asked)}; it must be settings by the name of a "
            "parameter."
        )
    for name in asked:
        if name not in own:
            raise OptxError(
                f"param_groups: {path!r} ({type(module).__name__}) asks for settings of {name!r}, which is "
                f"no parameter of its own. {near(str(name), own)}"
            )
    for name, p in own.items():
        settings = asked.get(name, getattr(p, _MARK, None))
        if settings is not None:
            yield name, p, settings


def _check(name: str, asked: Mapping[str, Any]) -> None:
    if not isinstance(asked, Mapping) or "params" in asked:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise OptxError(
            f"param_groups: {name!r} asks for {shown(asked)}; it must be settings of an optimizer by name, "
            'such as {"lr": 1e-3, "weight_decay": 0.0}.'
        )
    for setting in ("lr", CAP, "weight_decay"):
        if setting in asked:
            check_range("param_groups", f"{setting} of {name!r}", asked[setting], 0)


def _key(settings: Mapping[str, Any]) -> tuple[Any, ...]:
    """What two groups of the same settings have in common."""
    return tuple(sorted((name, repr(value)) for name, value in settings.items()))
