"""`shapes`: which dimensions of a model are width, found by comparing it with a narrower one.

Source: Tensor Programs V, arXiv 2203.03466, appendix B; a dimension is width if it differs between two
models of one family, as in the authors' package mup.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike

from torch import nn

from optx._errors import OptxError
from optx.scaling._fans import Fans, fans_of, is_lookup, is_transposed_conv
from optx.scaling._on_meta import Source, build
from optx.scaling._own_scales import head_widths, heads_again, readout_factors
from optx.scaling._parameters import Found, parameters_of
from optx.scaling._shapes import Shapes
from optx.scaling._width import Width

Models = Mapping[str, Mapping[str, Found]]
"""The parameters of each argument: model, base, and delta if there is one."""

Twins = Mapping[str, Found]
"""One parameter in each of them."""

Sizes = tuple[int, ...]
"""One size in each of them."""


def shapes(model: Source, base: Source | Shapes | str | PathLike[str], delta: Source | None = None) -> Shapes:
    """Which dimensions of a model's parameters are width, and how much wider they are than a base model's.

    Args:
        model: the model to train: a module, a transformers config or a callable that returns a module. What
            is no module yet is built on the meta device and takes no memory.
        base: the narrow model whose learning rate and weight decay are known, in any of these forms; or
            shapes made before with that base, or the file that they were saved to.
        delta: a model of yet another width, if the model may have the base's. A dimension is width if base
            and delta differ in it; without delta, if model and base do.

    Paper values:
        There is nothing to set; the paper's proxy of GPT-3 is 256 wide for a target of 4096.

    Limits: Fan-in and fan-out are known from the module that has a parameter: Linear, Conv1D, convolutions,
        embeddings, recurrent and attention modules, experts in one tensor; others are read as torch's
        (out, in), and what has one dimension of width as fan-out, unless ``set`` says otherwise. Keys and
        values of a fixed number of heads, as in Llama's larger models, have a fan-out that doesn't grow and
        count as ``"output"``: let their heads grow, or say ``shapes.set(matrix=r".*\\.[kv]_proj\\.weight")``.

    Keywords: muP, muTransfer, base shapes, infinite dimensions, width multiplier, hyperparameter transfer.

    Evidence: ``test_shapes.py``, ``test_shapes_families.py``: nine families of transformers' models, timm's
        ViT and ResNet, the package mup; ``optx run transfer``.

    Returns:
        `Shapes`: a mapping from names to `Width`, to look at, correct and save.

    Raises:
        OptxError: the models are not of one family (depth, number of dimensions, what is tied), nothing in
            them differs, or a dimension differs that delta leaves as it is or that can't be width (a kernel,
            the number of experts); names the first.

    Example:
        >>> import torch, optx
        >>> def make(width):
        ...     return torch.nn.Sequential(torch.nn.Linear(8, width), torch.nn.Linear(width, 3))
        >>> shapes = optx.scaling.shapes(make(64), base=make(16))
        >>> shapes["0.weight"].kind, shapes["0.weight"].m
        ('input', 4.0)

    Source: Tensor Programs V, arXiv 2203.03466, appendix B.
    """
    if isinstance(base, str | PathLike):
        base = Shapes.load(base)
    given = {"model": model, "base": base, "delta": delta}
    if isinstance(base, Shapes):
        if delta is not None:
            raise OptxError(
                "shapes: base= has shapes made before, which say what is width; leave delta= out."
            )
        return _from_saved(build(model, "model", []), base).made_of(model)
    built = {
        name: build(one, name, [other for other in given.values() if other is not one])
        for name, one in given.items()
        if one is not None or name != "delta"
    }
    there = {name: parameters_of(one, f"shapes: {name}") for name, one in built.items()}
    for called in ("model", *(["delta"] if "delta" in there else [])):
        _check_one_family(there["base"], there[called], called)
    widths = _widths(there)
    heads = head_widths(built["model"], built["base"])
    return Shapes(widths, heads, readout_factors(built["model"], widths)).made_of(model)


def _check_one_family(base: Mapping[str, Found], other: Mapping[str, Found], called: str) -> None:
    """Raise unless every parameter of one is in the other, with as many dimensions, tied alike."""
    for lacks, has, where, there in ((base, other, "base", called), (other, base, called, "base")):
        known = {name for one in lacks.values() for name in (one.name, *one.tied)}
        missing = next((name for name in has if name not in known), None)
        if missing is not None:
            raise OptxError(
                f"shapes: {where} has no parameter {missing!r}, and {there} has. They must be one "
                "architecture in two widths, of the same depth."
            )
    for name, one in base.items():
        twin = other.get(name, one)  # under another of its names: tied otherwise
        if len(one.shape) != len(twin.shape):
            raise OptxError(
                f"shapes: {name!r} has {len(one.shape)} dimensions in base and {len(twin.shape)} in "
                f"{called}: {one.shape} and {twin.shape}. They must be one architecture in two widths."
            )
    ties = [{(name, odd) for name, one in models.items() for odd in one.tied} for models in (base, other)]
    if ties[0] != ties[1]:
        name, odd = min(ties[0] ^ ties[1])
        one, two = ("base", called) if (name, odd) in ties[0] else (called, "base")
        raise OptxError(
            f"shapes: {name!r} and {odd!r} are one tensor in {one} and two in {two}. Tie them in both or in "
            "neither."
        )


def _widths(there: Models) -> list[Width]:
    wide = "delta" if "delta" in there else "model"
    free = _vocabularies(there)
    every = [{which: models[name] for which, models in there.items()} for name in there["model"]]
    if not any(_differing(twins, wide, free) for twins in every):
        more = (
            "a delta= of another width" if wide == "delta" else "delta=, a model of another width than base"
        )
        raise OptxError(
            f"shapes: base and {wide} have the same shapes, so it can't be told what is width. Pass {more}."
        )
    return [_width(twins, wide, free) for twins in every]


def _width(every: Twins, wide: str, free: Sequence[Sizes]) -> Width:
    """One parameter, in each of the models."""
    model, base = every["model"], every["base"]
    grown = _differing(every, wide, free)
    check_grown(base, every[wide], grown, wide)
    for axis in _differing(every, "model", free):
        if axis not in grown:
            raise OptxError(
                f"shapes: {model.name!r} is {model.shape} in model and {base.shape} in base, and delta "
                f"leaves dimension {axis} as it is in base. Let delta differ in all that grows with width."
            )
    fans = {which: _fans(one, base.shape, grown) for which, one in every.items()}
    grows_in, grows_out = (fans[wide][side] != fans["base"][side] for side in (0, 1))
    return Width(
        model.name,
        model.shape,
        base.shape,
        kind_of(grows_in, grows_out, len(model.shape)),
        fans["model"][0] / fans["base"][0] if grows_in else 1.0,
        fans["model"][1] / fans["base"][1] if grows_out else 1.0,
        tuple(model.tied),
        fans["base"],
    )


def kind_of(grows_in: bool, grows_out: bool, dimensions: int) -> str:
    """What a parameter is whose fan-in or fan-out grows with width."""
    if grows_in:
        return "matrix" if grows_out else "output"
    if grows_out:
        return "vector" if dimensions == 1 else "input"
    return "scalar"


def _fans(one: Found, base: tuple[int, ...], grown: Sequence[int]) -> Fans:
    """Of a parameter, as if all that is no width were as in base."""
    shape = tuple(size if axis in grown else base[axis] for axis, size in enumerate(one.shape))
    return fans_of(replace(one, shape=shape), grown)


def check_grown(base: Found, wide: Found, grown: Sequence[int], called: str) -> None:
    """Raise unless each dimension that differs is one of fan-in or fan-out."""
    shapes = f"{base.shape} in base and {wide.shape} in {called}"
    if len(grown) > 2:
        raise OptxError(
            f"shapes: {base.name!r} differs in {len(grown)} dimensions, {shapes}; only fan-in and fan-out "
            "can grow with width. Keep the others (kernel size, number of experts) as they are in base."
        )
    for axis in grown:
        alone = tuple(wide.shape[i] if i == axis else size for i, size in enumerate(base.shape))
        if fans_of(replace(wide, shape=alone), grown) == fans_of(base, grown):
            raise OptxError(
                f"shapes: {base.name!r} differs in dimension {axis}, {shapes}, which is neither its fan-in "
                "nor its fan-out and so can't grow with width. Keep it as it is in base."
            )


# ---- against shapes made before ----------------------------------------------------------------------


def _from_saved(model: nn.Module, saved: Shapes) -> Shapes:
    """Another target of the same base, whose dimensions are width as they were said to be then."""
    there = parameters_of(model, "shapes: model")
    base = {name: _as_it_was(width, there.get(name)) for name, width in saved.items()}
    _check_one_family(base, there, "model")
    free = _vocabularies({"model": there, "base": base})
    pairs = {name: {"model": one, "base": base[name]} for name, one in there.items()}
    widths = [_again(pair, saved[name], free) for name, pair in pairs.items()]
    return Shapes(widths, heads_again(model, saved.heads), readout_factors(model, widths))


def _as_it_was(width: Width, now: Found | None) -> Found:
    if now is None:
        return Found(width.name, width.base_shape, nn.Module(), "", {})
    tied = {name: now.tied.get(name, now.owner) for name in width.tied}
    return Found(width.name, width.base_shape, now.owner, now.leaf, tied, now.makes)


def _again(every: Twins, saved: Width, free: Sequence[Sizes]) -> Width:
    model, base = every["model"], every["base"]
    grown = _differing(every, "model", free)
    check_grown(base, model, grown, "model")
    axes = sorted({*grown, *(axis for axis in range(len(base.shape)) if _grew(saved, axis))})
    old, new = (_fans(one, base.shape, axes) for one in (base, model))
    if saved.base_fans == old[::-1] != old:  # the user turned it
        old, new = old[::-1], new[::-1]
    if is_transposed_conv((model.makes or (model.owner,))[0]):  # whose fans depend on the base's groups
        old = saved.base_fans
    grows = (saved.kind in ("matrix", "output"), saved.kind in ("matrix", "input", "vector"))
    for side in (0, 1):
        if new[side] != old[side] and not grows[side] and not all(_grew(saved, axis) for axis in grown):
            raise OptxError(
                f"shapes: {model.name!r} is {model.shape} in model and {base.shape} in base, and by the "
                f"shapes made before its {('fan-in', 'fan-out')[side]} is no width. Make them with a model "
                "in which all differs that grows with width."
            )
    fan_in, fan_out = (new[side] / old[side] if grows[side] else 1.0 for side in (0, 1))
    return replace(saved, shape=model.shape, fan_in=fan_in, fan_out=fan_out)


def _grew(saved: Width, axis: int) -> bool:
    return saved.shape[axis] != saved.base_shape[axis]


# ---- what is never width: rows that are looked up ----------------------------------------------------


def _vocabularies(there: Models) -> list[Sizes]:
    """How many rows are looked up in each model, where that differs; heads have as many outputs."""
    tables = [
        [models[name].shape for models in there.values()]
        for name, one in there["model"].items()
        if is_lookup(one)
    ]
    dims = [tuple(shape[1] for shape in shapes) for shapes in tables]
    rows = (tuple(shape[0] for shape in shapes) for shapes in tables)
    return [one for one in rows if len(set(one)) > 1 and one not in dims]


def _differing(every: Twins, wide: str, free: Sequence[Sizes]) -> list[int]:
    """The dimensions in which a model differs from base, without those that are never width."""
    base, other = every["base"], every[wide]
    return [
        axis
        for axis, size in enumerate(base.shape)
        if size != other.shape[axis]
        and not (axis == 0 and is_lookup(base))
        and tuple(one.shape[axis] for one in every.values()) not in free
    ]
