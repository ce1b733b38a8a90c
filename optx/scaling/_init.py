"""`init_`: a fresh model's first weights, brought to the sizes that width asks for."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optx._errors import OptxError, check_choice
from optx._names import whole
from optx.scaling._parameters import Found, parameters_of
from optx.scaling._rules_of_width import Parametrization, at_first, parametrization_of
from optx.scaling._shapes import Shapes
from optx.scaling._width import Width
from optx.scaling.mu_readout import check_shapes

_DONE = "_optx_first_weights"
_QUERY = re.compile(r"(?:.*\.)?(?:q_proj|query|q_lin|wq|q)\.(?:weight|bias)")
_FUSED_QUERY = re.compile(r"(?:.*\.)?(?:c_attn|qkv_proj|query_key_value|qkv|in_proj_weight|in_proj_bias)\b.*")


@dataclass
class _Draw:
    """How a tensor's first values depend on its module's width.

    Attributes:
        how: ``"fan_in"`` (1 / sqrt(fan-in)), ``"xavier"`` (1 / sqrt(fan-in + fan-out)), ``"fixed"`` or
            ``"constant"``.
        grown: by how much smaller they are than the base model's, for that.
    """

    how: str
    grown: float


def init_(
    model: nn.Module,
    shapes: Shapes,
    parametrization: str | Parametrization = "mup",
    *,
    zero_output: bool = False,
    zero_query: bool = False,
    fresh: str | None = None,
    again: bool = False,
) -> nn.Module:
    """Rescale a freshly made model's weights, once, to what width asks of them.

    A fresh weight is recognised by its module and its values: torch's default and Xavier's depend on width
    already, a fixed ``initializer_range`` (transformers) does not. Gains and zeros stay. On torch's defaults
    this is what the mup package's ``set_base_shapes`` does: the readout's weight and all biases grow by
    sqrt(m). No random numbers are drawn. It comes before training and before a checkpoint is loaded; an
    optimizer of `optx.scaling.mup` warns where it was forgotten.

    Args:
        model: just made, its weights in memory.
        shapes: of it.
        parametrization: as in `optx.scaling.mup`.
        zero_output: begin with a readout of zeros.
        zero_query: begin with attention's queries at zero; not where they share a matrix with keys.
        fresh: ``"fan_in"`` or ``"fixed"`` says how all weights were drawn, and that they are fresh; by
            default they must be recognised.
        again: rescale a model that was before, because its weights were drawn anew.

    Paper values:
        ``zero_output=False``: the package's (the default). The paper recommends zeros in the
        readout and the queries.

    Limits: Draws of other sizes than torch's, Xavier's, ``initializer_range``'s, GPT-2's and T5's are
        refused unless ``fresh=`` says how they depend on width.

    Keywords: muP, initialization, first weights, initializer_range, width.

    Evidence: ``test_first_weights.py``, ``test_mup_peer.py``: equal to the package's; ``optx run transfer``.

    Source: "Tensor Programs V", arXiv 2203.03466, tables 3, 8 and 9, appendix D.2.

    Returns:
        The model.

    Raises:
        OptxError: it was done before, the weights are not recognised as fresh, they come from a checkpoint,
            or the shapes are another model's; nothing is changed.

    Example:
        >>> import torch, optx
        >>> def make(width):
        ...     return torch.nn.Sequential(torch.nn.Linear(8, width), torch.nn.Linear(width, 3))
        >>> model = make(64)
        >>> before = model[1].weight.detach().clone()
        >>> model = optx.scaling.init_(model, optx.scaling.shapes(model, base=make(16)))
        >>> bool((model[1].weight == 2 * before).all())
        True
    """
    check_shapes("init_", shapes)
    rules = parametrization_of("init_", parametrization)
    if fresh is not None:
        check_choice("init_", "fresh", fresh, ("fan_in", "fixed"))
    shapes.check(model)
    _check_new(model, fresh, again)
    found = parameters_of(model, "init_")
    draws = _draws(model, shapes, rules, found, fresh)
    zeros = _zeros(found, shapes, zero_output, zero_query)
    with torch.no_grad():
        for name, one in found.items():
            p = getattr(one.owner, one.leaf)
            if draws[name][1] != 1.0:
                p.mul_(draws[name][1])
            for rows in zeros.get(name, ()):
                p[rows].zero_()
    vars(model)[_DONE] = {name: at_first(rules, shapes[name]).init for name in found}
    return model


def rescaled_for(model: nn.Module) -> dict[str, float] | None:
    """What width made of each first weight, where `init_` was called on this model."""
    return vars(model).get(_DONE)


def is_to_rescale(model: nn.Module, shapes: Shapes, parametrization: Parametrization) -> str | None:
    """A weight that `init_` would change, if all are recognised as fresh; changes nothing."""
    try:
        shapes.check(model)
        _check_new(model, None, False)
        draws = _draws(model, shapes, parametrization, parameters_of(model, "init_"), None)
    except OptxError:
        return None
    # At a ratio of twice the layers, what was rescaled looks like GPT-2's projections as they were drawn.
    told = (name for name, (how, _) in draws.items() if how != "by depth" and len(shapes[name].shape) > 1)
    return next((name for name in told if not math.isclose(draws[name][1], 1.0)), None)


def _draws(
    model: nn.Module,
    shapes: Shapes,
    parametrization: Parametrization,
    found: dict[str, Found],
    fresh: str | None,
) -> dict[str, tuple[str, float]]:
    """How each parameter was drawn, and what it is to be multiplied by."""
    draws: dict[str, tuple[str, float]] = {}
    for name, one in found.items():
        draw = _draw(model, name, one, getattr(one.owner, one.leaf), found, shapes, fresh)
        scale = at_first(parametrization, shapes[name])
        draws[name] = draw.how, 1.0 if draw.how == "constant" else scale.init * draw.grown
    return draws


def _check_new(model: nn.Module, fresh: str | None, again: bool) -> None:
    if vars(model).get(_DONE) and not again:
        raise OptxError(
            "init_: this model's weights were rescaled before, and once more would rescale them twice. "
            "Pass again=True if they have been drawn anew since."
        )
    source = getattr(getattr(model, "config", None), "_name_or_path", "")
    if source and fresh is None:
        raise OptxError(
            f"init_: this model's weights come from {source!r}, and rescaling would spoil what they have "
            "learnt. Make it from its config, or pass fresh= if they are first ones all the same."
        )
    meta = next((name for name, p in model.named_parameters() if p.is_meta), None)
    if meta is not None:
        raise OptxError(
            f"init_: {meta!r} is on the meta device and has no values yet. Give it memory before."
        )


# ---- how a tensor was drawn --------------------------------------------------------------------------


def _draw(
    model: nn.Module,
    name: str,
    one: Found,
    p: Tensor,
    found: dict[str, Found],
    shapes: Shapes,
    fresh: str | None,
) -> _Draw:
    size, rms, largest = p.numel(), *_sizes(p)
    if size == 0 or (size > 1 and _is_constant(p)) or (size == 1 and rms in (0.0, 1.0)):
        return _Draw("constant", 1.0)
    if p.ndim < 2:
        return _of_its_weight(model, name, one, largest, found, shapes, fresh)
    width = shapes[name]
    known = _ways_of_t5(model, name, one, p, shapes)
    ways = known or _ways(model, one, p, width)
    if fresh is not None and known:
        return _Draw(*next((how, grown) for how, (_, grown) in known.items()))
    if fresh is not None:
        return _Draw(fresh, ways[fresh][1] if fresh in ways and not _is_table(one) else 1.0)
    alike = {
        how: grown
        for how, (expected, grown) in ways.items()
        if abs(rms / expected - 1.0) <= 0.01 + 6.0 * math.sqrt(0.5 / size)
        and (how not in _UNIFORM or _is_up_to(largest, math.sqrt(3.0) * expected, p))
    }
    if len(set(alike.values())) == 1:
        return _Draw(*alike.popitem())
    if alike:
        raise OptxError(
            f"init_: {name!r} is too small to tell how it was drawn ({' or '.join(alike)}), which decides "
            "how it is rescaled. Say it: fresh='fan_in' (smaller in a wider model) or 'fixed'."
        )
    usual = next(iter(ways))
    raise OptxError(
        f"init_: {name!r} has values of size {rms:.3g} (rms), which is no first draw that is known here "
        f"(by {usual} it would be {ways[usual][0]:.3g}). If they are fresh, say how they were drawn: "
        "fresh='fan_in' (smaller in a wider model) or 'fixed'; trained weights are not rescaled."
    )


_UNIFORM = ("fan_in", "xavier")


def _is_up_to(largest: float, bound: float, p: Tensor) -> bool:
    """Whether this can be the largest of uniform draws up to a bound: less is as rare as exp(-20)."""
    rounding = torch.finfo(p.dtype).eps
    return 1.0 - 20.0 / p.numel() - rounding <= largest / bound <= 1.0 + rounding


def _ways(model: nn.Module, one: Found, p: Tensor, width: Width) -> dict[str, tuple[float, float]]:
    """By the way of drawing: the size that it gives here, and how it shrinks from the base to this width."""
    fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(p)  # pyright: ignore[reportPrivateUsage]
    base_in, base_out = width.base_fans
    both = (base_in * width.fan_in + base_out * width.fan_out) / max(1, base_in + base_out)
    ways = {
        "fan_in": (1.0 / math.sqrt(3.0 * fan_in), width.fan_in**0.5),
        "xavier": (math.sqrt(2.0 / (fan_in + fan_out)), both**0.5),
    }
    config: Any = getattr(model, "config", None)
    fixed = getattr(config, "initializer_range", None)
    if isinstance(fixed, float):
        ways["fixed"] = (fixed, 1.0)
        layers = getattr(config, "num_hidden_layers", 0)
        if layers:
            ways["by depth"] = (fixed / math.sqrt(2.0 * layers), 1.0)  # GPT-2's projections into the stream
    if _is_table(one):
        ways["normal"] = (1.0, 1.0)
    return ways


def _ways_of_t5(
    model: nn.Module, name: str, one: Found, p: Tensor, shapes: Shapes
) -> dict[str, tuple[float, float]] | None:
    """The one way in T5 and its kin, whose queries' draws hold the scale that their logits don't have."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "d_kv") or not isinstance(
        factor := getattr(config, "initializer_factor", None), float
    ):
        return None
    attention, _, module = name.rpartition(".")[0].rpartition(".")
    queries = f"{attention}.q.weight"
    if module == "relative_attention_bias" and queries in shapes:
        return {"by width": (factor * config.d_model**-0.5, shapes[queries].fan_in ** 0.5)}
    if _is_table(one) or module == "lm_head":
        return {"normal": (factor, 1.0)}
    fan_in, _ = nn.init._calculate_fan_in_and_fan_out(p)  # pyright: ignore[reportPrivateUsage]
    if module == "q":
        head = shapes.heads.get(attention)
        wider = 1.0 if head is None else head.width / head.base_width
        return {"by heads": (factor * (fan_in * config.d_kv) ** -0.5, (shapes[name].fan_in * wider) ** 0.5)}
    return {"by fan_in": (factor * fan_in**-0.5, shapes[name].fan_in ** 0.5)}


def _is_table(one: Found) -> bool:
    return isinstance(one.owner, nn.Embedding | nn.EmbeddingBag)


def _of_its_weight(
    model: nn.Module,
    name: str,
    one: Found,
    largest: float,
    found: dict[str, Found],
    shapes: Shapes,
    fresh: str | None,
) -> _Draw:
    """torch draws a bias by its weight's fan-in."""
    beside = f"{name.rpartition('.')[0]}.weight".removeprefix(".")
    weight = getattr(one.owner, "weight", None)
    if beside in found and isinstance(weight, Tensor) and weight.ndim >= 2 and one.leaf == "bias":
        grown = shapes[beside].fan_in ** 0.5
        fan_in, _ = nn.init._calculate_fan_in_and_fan_out(weight)  # pyright: ignore[reportPrivateUsage]
        if fresh == "fan_in" or (fresh is None and largest <= 1.001 / math.sqrt(fan_in)):
            return _Draw("fan_in", grown)
    if fresh is not None:
        return _Draw("fixed", 1.0)
    raise OptxError(
        f"init_: {name!r} has values up to {largest:.3g}, which is no first draw that is known here. If "
        "they are fresh, say how they were drawn: fresh='fan_in' or 'fixed'; trained weights are not "
        "rescaled."
    )


def _sizes(p: Tensor) -> tuple[float, float]:
    """Root mean square and largest size."""
    if p.numel() == 0:
        return 0.0, 0.0
    wide = p.detach().to(torch.promote_types(p.dtype, torch.float32))
    return float(whole((wide * wide).mean())) ** 0.5, float(whole(wide.abs().max()))


def _is_constant(p: Tensor) -> bool:
    return float(whole(p.detach().max())) == float(whole(p.detach().min()))


# ---- zeros -------------------------------------------------------------------------------------------


def _zeros(found: dict[str, Found], shapes: Shapes, output: bool, query: bool) -> dict[str, list[Any]]:
    """Which rows of which parameters begin as zeros."""
    zeros: dict[str, list[Any]] = {}
    if output:
        heads = [name for name in found if shapes[name].kind == "output"]
        if not heads:
            raise OptxError(
                "init_: zero_output=True, and no parameter is an output; a head that is tied to the "
                "embedding can't begin at zero."
            )
        zeros.update({name: [slice(None)] for name in heads})
    if query:
        named = {name: [slice(None)] for name in found if _QUERY.fullmatch(name)}
        fused = [name for name in found if _FUSED_QUERY.fullmatch(name)]
        if fused:
            raise OptxError(
                f"init_: zero_query=True, and {fused[0]!r} holds queries, keys and values in one. Zero its "
                "queries by hand."
            )
        if not named:
            raise OptxError(
                "init_: zero_query=True, and no parameter is named as queries are (q_proj, query)."
            )
        zeros.update(named)
    return zeros
