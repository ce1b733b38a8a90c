"""The order of a chain and what lies between its layers, by what the model computes."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from optx._errors import OptxError, TargetError
from optx.inject._conv_trace import Op, operations
from optx.inject._injection import Site
from optx.inject._weights import is_conv
from optx.lipschitz import _ldlt_slopes as slopes_of
from optx.lipschitz._ldlt_slopes import Slopes
from optx.lipschitz._ldlt_weights import Link

Form = Literal["sequential", "residual", "identity"]

_SAME = frozenset(("contiguous", "clone", "to", "float", "identity"))
_FLAT = frozenset(("flatten", "view", "reshape"))
_ASKS = frozenset(("size", "getattr", "dim"))
_ADDS = frozenset(("add", "iadd"))


@dataclass(frozen=True)
class Order:
    """Sites in the order of the chain, their links, and the form; B and A of a residual chain come last."""

    sites: list[Site]
    links: list[Link]
    form: Form


@dataclass
class _Way:
    """What is on the way from one layer to the next."""

    slopes: Slopes = (1.0, 1.0)
    gain: float = 1.0
    flat: bool = False


def order_of(model: nn.Module, sites: Sequence[Site], residual: bool, declared: Slopes | None) -> Order:
    """How the served layers are connected.

    Args:
        model: whose they are.
        sites: in the model's order.
        residual: whether what goes in is added to what comes out.
        declared: the activations' slopes, as a person says; None: they are looked for.

    Raises:
        TargetError: they are no chain, or there is something between them that voids the certificate.
    """
    if len(sites) == 1 and not residual:
        return Order([*sites], _links([*sites], [], declared), "sequential")
    outer = _outer(sites)
    around = model.get_submodule(outer) if outer else model
    try:
        ops = operations(around)
    except OptxError:
        ops = []
    by_path = {op.path: op for op in ops if op.module is not None}
    start = f"{outer}." if outer else ""
    here = {site.path: by_path.get(site.path.removeprefix(start)) for site in sites}
    if missing := next((path for path, op in here.items() if op is None), None):
        return _as_registered(sites, residual, declared, type(around).__name__, missing)
    calls = Counter(op.path for op in ops if op.module is not None)
    for site in sites:
        if calls[site.path.removeprefix(start)] > 1:
            raise TargetError(f"attach: LDLT: {site.path!r} is called more than once in a forward pass.")
    return _traced([*ops], sites, {id(op): path for path, op in here.items()}, residual, declared)


def _outer(sites: Sequence[Site]) -> str:
    """The path of the innermost module that all sites are in."""
    parts = [site.path.split(".")[:-1] for site in sites]
    common: list[str] = []
    for names in zip(*parts, strict=False):
        if len(set(names)) > 1:
            break
        common.append(names[0])
    return ".".join(common)


def _as_registered(
    sites: Sequence[Site], residual: bool, declared: Slopes | None, kind: str, missing: str
) -> Order:
    """A sequential chain in the model's order, with the slopes that a person declared."""
    if residual or declared is None or any(is_conv(site.module) for site in sites):
        raise TargetError(
            f"attach: LDLT can't see how its layers are connected: torch.fx can't trace this {kind}, or does "
            f"find {missing!r} in it. Serve layers of an nn.Sequential, or, for Linear layers one behind the "
            'other in the model\'s order, say what lies between them: LDLT(activation="relu").'
        )
    links = _links([*sites], [_Way(slopes=declared) for _ in sites[1:]], declared)
    return Order([*sites], links, "sequential")


# ---- by what the model computes --------------------------------------------------------------------------


def _traced(
    ops: Sequence[Op], sites: Sequence[Site], served: dict[int, str], residual: bool, declared: Slopes | None
) -> Order:
    by_path = {site.path: site for site in sites}
    mine = [op for op in ops if id(op) in served]
    skip = _skip(mine, served) if residual else None
    chain = [op for op in mine if op is not skip]
    ways: list[_Way] = []
    for before, after in itertools.pairwise(chain):
        ways.append(_walk(before, after, served))
    order = [by_path[served[id(op)]] for op in chain]
    links = _links(order, ways, declared)
    if not residual:
        return Order(order, links, "sequential")
    if skip is None:
        return Order(order, links, "identity")
    site = by_path[served[id(skip)]]
    return Order([*order, site], [*links, Link(site.path)], "residual")


def _walk(op: Op, goal: Op, served: dict[int, str]) -> _Way:
    """What is on the way between two layers that follow each other."""
    way, now, start = _Way(), op, served[id(op)]
    while True:
        users = [user for user in now.users if user.path not in _ASKS or user.module is not None]
        if len(users) != 1:
            raise TargetError(
                f"attach: LDLT: what comes from {start!r} goes to {len(users)} places, so "
                f"{served[id(goal)]!r} is not all that is behind it, and the layers are no chain. For a "
                "skip from the first layer's input to the last's output there is LDLT(residual=True); else "
                "serve the parts by themselves."
            )
        now = users[0]
        if now is goal:
            return way
        if id(now) in served:
            raise TargetError(
                f"attach: LDLT: {served[id(now)]!r} follows {start!r}, where {served[id(goal)]!r} was "
                "called next: the layers are no chain."
            )
        _pass(now, way, start)


def _pass(op: Op, way: _Way, start: str) -> None:
    """Take one operation into account."""
    try:
        slopes = slopes_of.of(op)
    except OptxError as error:
        raise TargetError(f"attach: LDLT: behind {start!r}: {error}") from error
    if slopes is not None:
        way.slopes = slopes_of.product(way.slopes, slopes)
    elif isinstance(op.module, nn.Dropout | nn.Dropout1d | nn.Dropout2d | nn.Dropout3d):
        way.gain *= _gain(op.module.p, start)
    elif op.module is None and op.path == "dropout":
        way.gain *= _functional_gain(op, start)
    elif isinstance(op.module, nn.Flatten):
        way.flat = way.flat or op.module.start_dim == 1
    elif op.module is None and op.path in _FLAT:
        way.flat = way.flat or _keeps_batch(op)
    elif not (isinstance(op.module, nn.Identity) or (op.module is None and op.path in _SAME)):
        what = op.path if op.module is None else f"a {type(op.module).__name__} ({op.path!r})"
        raise TargetError(
            f"attach: LDLT: behind {start!r} is {what}, which is no elementwise function of slopes that "
            "LDLT knows, so there is no certificate of a chain across it. Leave out the layers on one side "
            "of it, or exchange it; ReLU, LeakyReLU, ELU, tanh, sigmoid and softplus are served."
        )


def _gain(p: float, start: str) -> float:
    if not p < 1.0:
        raise TargetError(f"attach: LDLT: behind {start!r} is a dropout of p={p}, which leaves nothing.")
    return 1.0 / (1.0 - p)


def _functional_gain(op: Op, start: str) -> float:
    rest: Sequence[Any] = getattr(op.call, "rest", ())
    p = op.options.get("p", rest[0] if rest else 0.5)
    acts = op.options.get("training", rest[1] if len(rest) > 1 else True)
    if acts is not False:
        raise TargetError(
            f"attach: LDLT: behind {start!r} is a dropout that acts in eval mode too; pass it "
            "training=self.training."
        )
    return _gain(float(p), start)


def _keeps_batch(op: Op) -> bool:
    """Whether a reshape is one of all but the batch."""
    rest: Sequence[Any] = getattr(op.call, "rest", ())
    if op.path == "flatten":
        return (op.options.get("start_dim", rest[0] if rest else 0)) == 1
    return op.call is None or (len(rest) == 2 and rest[1] == -1)


def _skip(mine: Sequence[Op], served: dict[int, str]) -> Op | None:
    """The layer on the skip of a residual chain; None: the skip is the identity.

    Raises:
        TargetError: nothing is added to what comes out, or something else.
    """
    for last in reversed(mine):
        users = [user for user in last.users if user.path not in _ASKS]
        if len(users) == 1 and users[0].module is None and users[0].path.strip("_") in _ADDS:
            others = [one for one in users[0].inputs if one is not last]
            if len(others) != 1:
                break
            other = _behind_same(others[0])
            first = next(one for one in mine if one not in (last, other))
            if other is first.inputs[0]:
                return None
            if id(other) in served and other.inputs == first.inputs:
                return _on_skip(last, other, first)
    raise TargetError(
        "attach: LDLT(residual=True) serves y = A x + B w + b: the last layer's output plus the first "
        "layer's input, or plus a served Linear of that; found no such sum behind "
        f"{served[id(mine[-1])]!r}. Name the skip's Linear among targets too, or leave residual out."
    )


def _behind_same(op: Op) -> Op:
    """What it comes from, if nothing is done to that."""
    while isinstance(op.module, nn.Identity) or (op.module is None and op.path in _SAME):
        op = op.inputs[0]
    return op


def _on_skip(last: Op, other: Op, first: Op) -> Op:
    """Which of the two summands is the skip: the one that the chain's first layer does not lead to."""
    leads = {id(first)}
    todo = list(first.users)
    while todo:
        op = todo.pop()
        if id(op) not in leads:
            leads.add(id(op))
            todo.extend(op.users)
    return other if id(last) in leads else last


def _links(order: Sequence[Site], ways: Sequence[_Way], declared: Slopes | None) -> list[Link]:
    """Of layers in their order, with what is on the ways between them.

    Raises:
        TargetError: a width does not fit the layer before, or a slope leaves what is served.
    """
    found: list[Link] = []
    for k, site in enumerate(order):
        module: Any = site.module
        link = Link(site.path)
        if is_conv(module):
            step = tuple(module.stride) if all(one == 1 for one in module.dilation) else ()
            link = replace(link, groups=module.groups, step=step)
        if k > 0:
            before, into = order[k - 1], ways[k - 1]
            link = replace(link, positions=_positions(site, before, into), gain=into.gain)
        if k < len(ways):
            low, high = _checked(ways[k].slopes, site.path, declared)
            link = replace(link, low=low, high=high)
        found.append(link)
    return found


def _checked(slopes: Slopes, path: str, declared: Slopes | None) -> Slopes:
    """The range to count with: of an activation that is known, widened to [0, 1] where there is none."""
    if declared is not None:
        if not slopes_of.within(slopes, declared):
            raise TargetError(
                f"attach: LDLT: activation says slopes in {list(declared)}, and what is behind {path!r} has "
                f"slopes in {list(slopes)}."
            )
        return declared
    if slopes[0] < 0.0:
        raise TargetError(
            f"attach: LDLT: the activation behind {path!r} (such as GELU or SiLU) has slopes in "
            f"{list(slopes)}, outside of [0, 1]. Exchange it, or say that you mean it: "
            f"LDLT(activation={slopes})."
        )
    return slopes if slopes[0] < slopes[1] else (0.0, max(1.0, slopes[1]))


def _positions(site: Site, before: Site, way: _Way) -> int:
    """How many inputs of a layer one output of the layer before stands for."""
    module: Any = site.module
    earlier: Any = before.module
    if is_conv(module):
        if not is_conv(earlier) or way.flat or module.in_channels != earlier.out_channels:
            raise TargetError(
                f"attach: LDLT: {site.path!r} is a convolution of {module.in_channels} channels behind "
                f"{before.path!r}, which does not give it an image of so many."
            )
        return 1
    outputs = earlier.out_channels if is_conv(earlier) else earlier.out_features
    fits = module.in_features == outputs
    if is_conv(earlier):
        fits = way.flat and module.in_features % outputs == 0
    if not fits:
        raise TargetError(
            f"attach: LDLT: {site.path!r} has {module.in_features} inputs and {before.path!r} before it "
            f"{outputs} outputs{', which nothing flattens' if is_conv(earlier) and not way.flat else ''}: "
            "they are not neighbours in a chain. Name every layer of it, in a model that calls them in its "
            "order."
        )
    return module.in_features // outputs
