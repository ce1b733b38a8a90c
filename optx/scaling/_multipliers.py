"""An optimizer's param groups, split by what width makes of their numbers, and held to it from then on.

The factors are recorded in each group (``optx.mu.lr`` and others), so that they go wherever its numbers go,
into checkpoints too, and nothing is multiplied twice.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from optx._errors import OptxError, near
from optx._names import has_names, parameter_names, plain_name
from optx.scaling._families import Kind, coupling_of, kind_of
from optx.scaling._readouts import look_at_model
from optx.scaling._rules_of_width import Decay, Parametrization
from optx.scaling._shapes import Shapes
from optx.scaling._width import Width
from optx.step.numbers import as_number
from optx.step.state import OF_WIDTH as PREFIX
from optx.step.transform import Group

NUMBERS = ("lr", "weight_decay", "eps")
"""What is multiplied in a param group."""

Factors = tuple[float, float, float]
"""Of lr, weight decay and eps."""

Eps = Literal["scale", "keep"]


@dataclass(frozen=True)
class Rules:
    """What is asked for.

    Attributes:
        owner: whose messages these are.
        shapes: the widths by name.
        parametrization: gives each width its factors.
        decay: the rule of weight decay.
        eps: whether Adam's eps follows the gradients.
        optimizer: what the optimizer is said to be; None: what its class is known as.
    """

    owner: str
    shapes: Shapes
    parametrization: Parametrization
    decay: Decay
    eps: Eps
    optimizer: str | None = None

    def width(self, name: str, p: Tensor) -> Width:
        """A parameter's width.

        Raises:
            OptxError: the shapes have none of that name, or one of another shape.
        """
        if name not in self.shapes:
            raise OptxError(
                f"{self.owner}: the shapes have no parameter {name!r}. {near(name, self.shapes)} Make them "
                "of the model that is trained; what has no width (an adapter) goes into a param group with "
                "mu=False."
            )
        width = self.shapes[name]
        if tuple(p.shape) != width.shape:
            raise OptxError(
                f"{self.owner}: these shapes are another model's: {name!r} is {tuple(p.shape)}, and they "
                f"have it as {width.shape}. Make them for this one (optx.scaling.shapes)."
            )
        return width

    def factors(self, width: Width, kind: Kind, group: Mapping[str, Any]) -> Factors:
        """What a parameter's numbers are multiplied by."""
        scale = self.parametrization.scale(width, kind.family, self.decay)
        coupling = coupling_of(kind, dict(group))
        decay = scale.lr * scale.weight_decay if coupling == "alone" else scale.weight_decay
        if self._has_no_rule(kind, coupling == "gradient"):
            decay = 0.0  # there is none, see `check_decay`, and none may come later
        return scale.lr, decay, scale.eps if self.eps == "scale" and as_number(group.get("eps")) else 1.0

    def _has_no_rule(self, kind: Kind, in_gradient: bool) -> bool:
        decays = getattr(self.parametrization, "decays", True)
        return decays and self.decay not in ("linear", "none") and (in_gradient or kind.family == "sgd")

    def check_decay(self, kind: Kind, group: Mapping[str, Any], what: str) -> None:
        """Raise where weight decay is asked for that the rule is not made for."""
        decays = as_number(group.get("weight_decay", 0.0))
        if decays and self._has_no_rule(kind, coupling_of(kind, dict(group)) == "gradient"):
            raise OptxError(
                f"{self.owner}: decay={self.decay!r} is a rule for decay that is apart from the gradient "
                f"and times lr (AdamW's), and {what} adds weight_decay={decays} * w to the gradient. Pass "
                "decay='linear' (as the mup package has it) or 'none', or take AdamW."
            )


def times(number: Any, factor: float) -> Any:
    """A number of a group times a factor; where that is 1 / m, the number / m, rounded once."""
    if factor == 1.0:
        return number
    inverse = round(64.0 / factor) / 64.0 if 0.0 < factor < 1.0 else 0.0
    return number / inverse if inverse and 1.0 / inverse == factor else number * factor


def recorded(group: Mapping[str, Any]) -> Factors | None:
    """The factors that are in a group's numbers already; None if it was never looked at."""
    if PREFIX + "lr" not in group:
        return None
    return (group[PREFIX + "lr"], group[PREFIX + "weight_decay"], group[PREFIX + "eps"])


def split(
    group: Group, names: Sequence[str], factors: Sequence[Factors], origin: int
) -> list[tuple[Group, list[int]]]:
    """A group's parts, each with its parameters' places, in order of appearance; changes nothing."""
    places: dict[Factors, list[int]] = {}
    for i, one in enumerate(factors):
        places.setdefault(one, []).append(i)
    parts: list[tuple[Group, list[int]]] = []
    for one, here in places.items():
        part = {**group, "params": [group["params"][i] for i in here]}
        if "param_names" in group:
            part["param_names"] = [group["param_names"][i] for i in here]
        for key, factor in zip(NUMBERS, one, strict=True):
            number = group.get(key)
            if as_number(number) is not None:
                new = times(number, factor)
                # A scheduler fills a tensor in place: each part has its own.
                part[key] = new.clone() if isinstance(new, Tensor) and new is number and parts else new
                part[f"{PREFIX}base_{key}"] = float(number)  # type: ignore[arg-type]
            part[PREFIX + key] = factor
        part[PREFIX + "part"] = origin
        part[PREFIX + "members"] = zlib.crc32("\n".join(names[i] for i in here).encode())
        parts.append((part, here))
    return parts


class Multipliers:
    """Multiplies the numbers of one optimizer's groups, and sees to it before every step that they stay so.

    Args:
        rules: what is asked for.
        model: whose parameters' names the shapes have, where the optimizer has no names.
    """

    def __init__(self, rules: Rules, model: nn.Module | None = None) -> None:
        self.rules = rules
        self.model = model
        self._looked = False  # whether the model is what these rules count on
        self._places: dict[int, list[list[int]]] = {}  # of each part's parameters in the group it came from

    # ---- apply -------------------------------------------------------------------------------------

    def apply(self, base: Optimizer) -> None:
        """Split the groups that were not yet, in place; take over those that were, as a checkpoint has them.

        Raises:
            OptxError: before anything is changed.
        """
        kind = kind_of(self.rules.owner, base, self.rules.optimizer)
        groups = [group for group in base.param_groups if group.get("mu", True)]
        fresh = [group for group in groups if recorded(group) is None]
        known = [group for group in groups if recorded(group) is not None]
        names = self._names(base) if groups else {}
        for group in known:
            self._take_over(group, kind, names)
        origin = 1 + max((group[PREFIX + "part"] for group in known), default=-1)
        parts: dict[int, list[tuple[Group, list[int]]]] = {}
        for group in fresh:
            parts[id(group)] = self._parts(group, kind, names, origin)
            origin += 1
        new: list[Group] = []
        for group in base.param_groups:
            if id(group) not in parts:
                new.append(group)
                continue
            first, *others = (part for part, _ in parts[id(group)])
            self._places[first[PREFIX + "part"]] = [here for _, here in parts[id(group)]]
            group.update(first)  # the same object: others hold it
            new += [group, *others]
        base.param_groups[:] = new

    def _parts(
        self, group: Group, kind: Kind, names: Mapping[int, str], origin: int
    ) -> list[tuple[Group, list[int]]]:
        rules = self.rules
        rules.check_decay(kind, group, "this optimizer")
        called = [names[id(p)] for p in group["params"]]
        factors = [
            rules.factors(rules.width(n, p), kind, group)
            for n, p in zip(called, group["params"], strict=True)
        ]
        changes = len(set(factors)) > 1 or any(one[0] != 1.0 for one in factors)
        if changes and "initial_lr" in group:
            raise OptxError(
                f"{rules.owner}: a learning rate scheduler was made on this optimizer already, and "
                "remembers its learning rates as they were. Make the scheduler afterwards. (If it is gone, "
                "delete 'initial_lr' from the param groups.)"
            )
        if not factors:
            factors = [(1.0, 1.0, 1.0)]
            return [(split({**group, "params": [None]}, [""], factors, origin)[0][0] | {"params": []}, [])]
        return split(group, called, factors, origin)

    def _take_over(self, group: Group, kind: Kind, names: Mapping[int, str]) -> None:
        """Raise unless a group's numbers have the factors that these rules ask for."""
        rules, has = self.rules, recorded(group)
        for p in group["params"]:
            name = names[id(p)]
            wanted = rules.factors(rules.width(name, p), kind, group)
            if wanted != has:
                raise OptxError(
                    f"{rules.owner}: the param group of {name!r} has been multiplied already, by "
                    f"{_said(has)}, and now it would be by {_said(wanted)}. Give it the shapes and options "
                    "of the run that it comes from, or make a new optimizer."
                )

    def _names(self, base: Optimizer) -> dict[int, str]:
        """Of all parameters, by id."""
        model = self.model or self.rules.shapes.model
        if model is None and not has_names(base):
            raise OptxError(
                f"{self.rules.owner}: this optimizer's parameters have no names to be found by in the "
                f"shapes. Make it of model.named_parameters(), or pass {self.rules.owner}(..., model=model)."
            )
        names = {i: plain_name(n) for i, n in parameter_names(base).items()}
        of_model = {} if model is None else {id(p): plain_name(n) for n, p in model.named_parameters()}
        foreign = [i for i in names if i not in of_model] if model is not None else []
        if foreign and not has_names(base):
            raise OptxError(
                f"{self.rules.owner}: {names[foreign[0]]} of the optimizer is not a parameter of the model "
                f"({len(foreign)} in all). Give it the model that the optimizer trains."
            )
        return {**names, **{i: n for i, n in of_model.items() if i in names}}

    # ---- watch -------------------------------------------------------------------------------------

    def follow(self, base: Optimizer) -> None:
        """Before a step: multiply the numbers of groups that came, and look whether those of the others hold.

        Raises:
            OptxError: something has set them by absolute value.
        """
        if any(recorded(group) is None and group.get("mu", True) for group in base.param_groups):
            self.apply(base)
        if not self._looked:
            self._looked = True
            rules, untrained = self.rules, not any(base.state.values())
            look_at_model(rules.owner, rules.shapes, rules.parametrization, self.model, untrained)
        first: dict[tuple[int, str], tuple[int, float]] = {}
        for i, group in enumerate(base.param_groups):
            factors = recorded(group)
            if factors is None:
                continue
            for key, factor in zip(NUMBERS, factors, strict=True):
                number = group.get(key)
                start = group.get(f"{PREFIX}base_{key}")
                if start is None or (isinstance(number, Tensor) and number.device.type != "cpu"):
                    continue  # read from a device it would wait for it
                now = float(number)  # type: ignore[arg-type]
                if factor == 0.0:
                    if now != 0.0:
                        raise OptxError(_off(self.rules.owner, base, key, i, i))
                    continue
                before, unscaled = first.setdefault((group[PREFIX + "part"], key), (i, now / factor))
                # Where a schedule ends at 0, what is left there is rounding.
                if abs(now / factor - unscaled) > 1e-6 * max(abs(start), abs(unscaled)):
                    raise OptxError(_off(self.rules.owner, base, key, before, i))

    def check_load(self, base: Optimizer, state_dict: Mapping[str, Any]) -> None:
        """Raise where a checkpoint's groups are not multiplied as these are."""
        owner, saved = self.rules.owner, state_dict.get("param_groups", [])
        if len(saved) != len(base.param_groups):
            raise OptxError(
                f"{owner}: the checkpoint has {len(saved)} param groups and this optimizer "
                f"{len(base.param_groups)}, split by width. It was saved before that, or with other shapes "
                "or options."
            )
        for i, (group, other) in enumerate(zip(base.param_groups, saved, strict=True)):
            has, wanted = recorded(other), recorded(group)
            if has != wanted:
                raise OptxError(
                    f"{owner}: in the checkpoint param group {i} is multiplied by {_said(has)}, and here by "
                    f"{_said(wanted)}. Load it into an optimizer with the shapes and options that it was "
                    "saved with."
                )
            if has and other.get(PREFIX + "members") != group[PREFIX + "members"]:
                raise OptxError(
                    f"{owner}: in the checkpoint param group {i} has other parameters, or in another order, "
                    "than here. Give the optimizer its parameters as in the run that saved it."
                )

    # ---- undo --------------------------------------------------------------------------------------

    def undo(self, base: Optimizer) -> None:
        """Put the parts of each group together again, with its numbers as they would be now."""
        together: dict[int, list[Group]] = {}
        new: list[Group] = []
        for group in base.param_groups:
            if recorded(group) is None:
                new.append(group)
                continue
            parts = together.setdefault(group[PREFIX + "part"], [])
            if not parts:
                new.append(group)
            parts.append(group)
        for origin, parts in together.items():
            self._join(parts, self._places.pop(origin, []))
        base.param_groups[:] = new

    def _join(self, parts: list[Group], places: list[list[int]]) -> None:
        whole = parts[0]
        order = [i for here in places for i in here]
        if [len(here) for here in places] != [len(part["params"]) for part in parts]:
            order = list(range(sum(len(part["params"]) for part in parts)))
        for key in ("params", "param_names"):
            if key in whole:
                members = [one for part in parts for one in part[key]]
                whole[key] = [
                    one for _, one in sorted(zip(order, members, strict=True), key=lambda at: at[0])
                ]
        for key in NUMBERS:
            number, factor = whole.get(key), whole[PREFIX + key]
            start = whole.get(f"{PREFIX}base_{key}")
            if start is None:
                continue
            same = factor == 0.0 or float(number) == float(times(start, factor))  # type: ignore[arg-type]
            plain = start if same else number / factor  # type: ignore[operator]
            if isinstance(number, Tensor):
                number.fill_(plain)
            else:
                whole[key] = plain
            if key == "lr" and "initial_lr" in whole:
                whole["initial_lr"] = whole["initial_lr"] / factor
        for key in [key for key in whole if key.startswith(PREFIX)]:
            del whole[key]


def _said(factors: Factors | None) -> str:
    if factors is None:
        return "nothing"
    return ", ".join(f"{key} x {factor:g}" for key, factor in zip(NUMBERS, factors, strict=True))


def describe(group: Mapping[str, Any]) -> str:
    """The factors that are in a group's numbers, for a plan."""
    return _said(recorded(group))


_WAYS = {
    "lr": "Schedulers that multiply keep it (LambdaLR, LinearLR, transformers' schedules); OneCycleLR and "
    "CyclicLR take max_lr=optx.scaling.group_lrs(optimizer, max_lr), ReduceLROnPlateau the same as min_lr, "
    "and CosineAnnealingLR keeps it with eta_min=0",
    "weight_decay": "Multiply what is in each group instead, or make the optimizer with it",
    "eps": "Multiply what is in each group instead, or make the optimizer with it",
}


def _off(owner: str, base: Optimizer, key: str, first: int, other: int) -> str:
    a, b = base.param_groups[first], base.param_groups[other]
    if first == other:
        return (
            f"{owner}: param group {first} has {key}={float(a[key]):g}; by its rule of width it has none. "
            f"{_WAYS[key]}."
        )
    return (
        f"{owner}: param groups {first} and {other} have {key} {float(a[key]):g} and {float(b[key]):g}; by "
        f"their widths the second is {b[PREFIX + key] / a[PREFIX + key]:g} times the first. Something has "
        f"set them by absolute value. {_WAYS[key]}."
    )
