"""What kind of step an optimizer takes, as far as width is concerned, and what it does with weight decay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch.optim import Optimizer

from optx._errors import OptxError
from optx.scaling._rules_of_width import Family

Coupling = Literal["lr", "alone", "gradient"]
"""A step decays by lr * weight_decay * w, by weight_decay * w, or adds weight_decay * w to the gradient."""


@dataclass(frozen=True)
class Kind:
    """An optimizer's steps.

    Attributes:
        family: how the size of an update follows the gradient's.
        coupling: what its weight decay does; None where that is to be read from a param group.
        eps: what torch gives it as ``eps``; None where it has none.
    """

    family: Family
    coupling: Coupling | None = None
    eps: float | None = None


_ENTRYWISE = Kind("adam", eps=1e-8)
_KNOWN: dict[str, Kind] = {
    "Adam": _ENTRYWISE,
    "AdamW": Kind("adam", "lr", 1e-8),
    "RAdam": _ENTRYWISE,
    "NAdam": _ENTRYWISE,
    "Adamax": _ENTRYWISE,
    "RMSprop": _ENTRYWISE,
    "Adagrad": Kind("adam", eps=1e-10),
    "SparseAdam": _ENTRYWISE,
    "Lion": Kind("adam", "lr"),
    "StableAdamW": Kind("adam", "lr", 1e-8),
    "AdamWScheduleFree": Kind("adam", "lr", 1e-8),
    "RAdamScheduleFree": Kind("adam", "lr", 1e-8),
    "AdamW8bit": Kind("adam", "lr", 1e-8),
    "PagedAdamW": Kind("adam", "lr", 1e-8),
    "PagedAdamW8bit": Kind("adam", "lr", 1e-8),
    "SGD": Kind("sgd"),
    "ASGD": Kind("sgd"),
    "SGDScheduleFree": Kind("sgd", "gradient"),
}
# What a person may say in ``optimizer=``.
NAMED: dict[str, Kind] = {
    "adamw": Kind("adam", "lr", 1e-8),
    "adam": Kind("adam", "gradient", 1e-8),
    "lion": Kind("adam", "lr"),
    "sgd": Kind("sgd", "gradient"),
}
# Whose steps no rule here is right for, and why.
_OTHERS = {
    "Adafactor": "multiplies lr by the size of each weight, which changes with width itself",
    "Muon": "makes every update orthogonal, so that its size follows the matrix's shape",
    "Rprop": "adapts a step size for each weight that lr is only the first value of",
    "Adadelta": "takes the size of its updates from those before",
    "LBFGS": "has one step size for all weights, in one param group",
    "Lamb": "scales each update to the size of its weight, which changes with width itself",
    "LAMB": "scales each update to the size of its weight, which changes with width itself",
    "DeMo": "steps by signs of a compressed momentum, though it inherits from SGD",
    "LARS": "scales each update to the size of its weight, which changes with width itself",
}


def kind_of(owner: str, optimizer: Optimizer | type[Optimizer], asked: str | None) -> Kind:
    """What steps an optimizer takes, by its class's name, that of a class it inherits from, or as one says.

    Raises:
        OptxError: it is not known, or known to need other rules, and nobody says what it is.
    """
    kind = optimizer if isinstance(optimizer, type) else type(optimizer)
    if asked is not None:
        return named(owner, asked)
    for parent in kind.__mro__:
        if parent.__name__ == "Adafactor" and _is_plain_adafactor(optimizer):
            return Kind("adam", "lr")
        if parent.__name__ in _OTHERS:
            raise OptxError(
                f"{owner}: {kind.__name__} {_OTHERS[parent.__name__]}, and muP's rules for Adam and SGD are "
                "wrong for it. Take AdamW, or say what it behaves like: optimizer='adamw', 'adam', 'lion' "
                "or 'sgd'."
            )
        if parent.__name__ == "ASGD" and not parent.__module__.startswith("torch."):
            raise OptxError(
                f"{owner}: this {kind.__name__} estimates its step size from the curvature, and is not "
                "torch's averaged SGD, whose rule is wrong for it. Take AdamW or SGD."
            )
        if parent.__name__ in _KNOWN:
            return _KNOWN[parent.__name__]
    raise OptxError(
        f"{owner}: {kind.__name__} is not known. Say how it steps: optimizer='adamw' (updates as large as "
        "lr, decay by lr * weight_decay * w), 'adam' (weight_decay * w goes into the gradient), 'lion' (as "
        "'adamw', without eps) or 'sgd' (updates as large as lr * gradient)."
    )


def named(owner: str, asked: Any) -> Kind:
    """What a person calls an optimizer."""
    if isinstance(asked, type) and issubclass(asked, Optimizer):
        return kind_of(owner, asked, None)
    if not isinstance(asked, str) or asked.lower() not in NAMED:
        names = ", ".join(map(repr, NAMED))
        raise OptxError(f"{owner}: optimizer is {asked!r}; it must be one of {names}.")
    return NAMED[asked.lower()]


def _is_plain_adafactor(optimizer: Any) -> bool:
    """transformers' has switches for what makes it special."""
    groups: list[dict[str, Any]] = getattr(optimizer, "param_groups", [])
    switches = ("scale_parameter", "relative_step")
    return bool(groups) and all(group.get(key, True) is False for group in groups for key in switches)


def coupling_of(kind: Kind, group: dict[str, Any]) -> Coupling:
    """What weight decay does in a param group; libraries have several names for the same switch."""
    if group.get("fixed_decay") is True:
        return "alone"
    if group.get("decouple_lr") is True:  # optimi: by lr / max_lr * weight_decay, and max_lr stays as it is
        return "lr"
    for switch in ("decoupled_weight_decay", "weight_decouple", "decouple_wd"):
        if switch in group:
            return "lr" if group[switch] else "gradient"
    return kind.coupling or "gradient"
