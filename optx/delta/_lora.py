"""A LoRA adapter's files as a delta: of the weights that it changes, or of its own factors.

Source: LoRA, arXiv 2106.09685, section 4.1; the files are PEFT's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from optx._errors import FileError, OptxError, ShapeError, near
from optx._safetensors import Entry, read_json
from optx.delta._checkpoint_source import Checkpoint, Files, Source, open_source
from optx.delta._difference import Difference
from optx.delta._float32_sums import difference_dtype
from optx.inject._file_bounds import check_config
from optx.inject._low_rank_start import is_of_weight
from optx.inject._peft_read import check_options, lora_from
from optx.inject._peft_start import start_of
from optx.inject._peft_write import PREFIX
from optx.inject._weights import in_sum_precision
from optx.inject.lora import LoRA

D = TypeVar("D", bound=Difference)
_A, _B = ".lora_A.weight", ".lora_B.weight"


_CONV1D = ("c_attn", "c_proj", "c_fc", "q_attn")
"""What transformers' Conv1D, whose weights are (in, out), are named in the families that have it."""


def lora_difference(
    kind: type[D], folder: Path, target: str, base: Checkpoint | Source | None, *, offered: bool = False
) -> D:
    """See `optx.Delta.lora`; an ``offered`` base may be one that is not needed."""
    if target not in ("product", "factors"):
        raise OptxError(f"Delta.lora: target is {target!r}; it must be 'product' or 'factors'.")
    try:
        config = read_json(folder / "adapter_config.json", 100_000_000)
    except FileError as error:
        raise FileError(
            f"Delta.lora: {str(folder)!r} has no adapter_config.json that can be read ({error})"
        ) from None
    if not isinstance(config, dict):
        raise FileError(f"Delta.lora: the adapter_config.json of {str(folder)!r} is no table.")
    check_config(config, f"Delta.lora: {str(folder / 'adapter_config.json')!r}")
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        what = "DORA" if config.get("use_dora") else config.get("peft_type")
        raise OptxError(f"Delta.lora: {str(folder)!r} is an adapter of kind {what!r}; it must be LORA.")
    where = f"Delta.lora: {str(folder)!r}"
    check_options(config, where)
    lora, source = lora_from(config, {}, where), Files(folder)
    pairs = {name.removesuffix(_A): name for name in source.entries if name.endswith(_A)}
    mixed = _mixed(pairs) if target == "product" else ""
    if offered and not mixed and not is_of_weight(lora.init):
        base = None
    origin = _origin(lora, target, base, mixed, where)
    for name, entry in source.entries.items():
        stem = name.removesuffix(_A).removesuffix(_B)
        if stem == name or stem not in pairs or stem + _B not in source.entries or len(entry.shape) != 2:
            raise OptxError(
                f"Delta.lora: {name!r} is no factor of a linear layer's LoRA. Merge the adapter into its "
                "model (handle.merge()), and take Delta.between(base, merged)."
            )
        if not name.startswith(PREFIX):
            raise FileError(
                f"{where} has the key {name!r}; keys must begin with {PREFIX!r}. PEFT would ignore it."
            )
    recipe = ("lora", target, source.label, source.state)
    if origin is not None:
        recipe = (*recipe, origin.label, origin.state)
    if target == "factors":
        entries = {n: Entry(e.shape, difference_dtype(e.dtype)) for n, e in source.entries.items()}
        return kind(
            entries,
            lambda name: source.read(name).to(entries[name].dtype),
            recipe=recipe,
            piece=lambda name, begin, end: source.piece(name, begin, end).to(entries[name].dtype),
        )
    for stem in pairs:
        _check_factors(lora, stem, source.entries, str(folder), config.get("target_parameters"))
    stems = {f"{stem.removeprefix(PREFIX)}.weight": stem for stem in pairs}
    turned = _turned(stems, lora, bool(config.get("fan_in_fan_out")), origin if mixed else None, mixed, where)

    def shape(name: str) -> tuple[int, ...]:
        outputs, inputs = source.entries[stems[name] + _B].shape[0], source.entries[stems[name] + _A].shape[1]
        return (inputs, outputs) if turned[name] else (outputs, inputs)

    def read(name: str) -> Tensor:
        a, b = (source.read(stems[name] + end).to(torch.float32) for end in (_A, _B))
        with torch.autocast(a.device.type, enabled=False):
            product = b @ a
            if origin is not None and is_of_weight(lora.init):
                product -= _taken_off(origin, name, lora, turned[name], product, where)
        product.mul_(lora.scale_at(name.removesuffix(".weight"), len(a)))
        return product.t().contiguous() if turned[name] else product

    return kind({n: Entry(shape(n), torch.float32) for n in stems}, read, recipe=recipe)


def _leaf(stem: str) -> str:
    return stem.rpartition(".")[2]


def _mixed(stems: Iterable[str]) -> str:
    """Names of Conv1D beside a head's, for messages; empty if there is but one kind.

    PEFT's fan_in_fan_out is one value for a file, that of the module it came to last: in a file with both
    kinds it is wrong for one of them, and no square weight shows which.
    """
    stems = list(stems)
    conv1d = [stem for stem in stems if _leaf(stem) in _CONV1D]
    heads = [stem for stem in stems if stem not in conv1d and not any(p.isdigit() for p in stem.split("."))]
    if not conv1d or not heads:
        return ""
    return f"{conv1d[0].removeprefix(PREFIX)!r} beside {heads[0].removeprefix(PREFIX)!r}"


def _turned(
    stems: Mapping[str, str], lora: LoRA, flag: bool, base: Source | None, mixed: str, where: str
) -> dict[str, bool]:
    """Whether each weight is (in, out): as PEFT's flag says, or as the base shows where that can't."""
    if base is None:
        turned = dict.fromkeys(stems, flag)
    else:
        of_conv1d = _is_turned(base, mixed, where)
        turned = {name: of_conv1d and _leaf(stem) in _CONV1D for name, stem in stems.items()}
    if lora.init == "olora" and any(turned.values()):
        raise OptxError(
            f"{where} was trained with init_lora_weights='olora', which took a part off the base that is not "
            "its factors' where weights are (in, out). Merge it in PEFT."
        )
    return turned


def _is_turned(base: Source, mixed: str, where: str) -> bool:
    """Whether the base's layers with Conv1D's names have weights of (in, out), as their biases tell."""
    for name, entry in base.entries.items():
        stem = name.removesuffix(".weight")
        bias = base.entries.get(f"{stem}.bias")
        if _leaf(stem) in _CONV1D and stem != name and len(entry.shape) == 2 and bias is not None:
            rows, columns = entry.shape
            if rows != columns:
                return bias.shape == (columns,)
    raise OptxError(
        f"{where} has factors of {mixed}, and no weight of base tells whether those are (in, out). Merge the "
        "adapter into its model (handle.merge()), and take Delta.between(base, merged)."
    )


def _origin(
    lora: LoRA, target: str, base: Checkpoint | Source | None, mixed: str, where: str
) -> Source | None:
    """The base, if it is needed to know what the adapter changed: where its start was taken off it.

    Or where PEFT's one fan_in_fan_out can't say which weights are (in, out).

    Raises:
        OptxError: it is needed and not given, or the other way round.
    """
    if not is_of_weight(lora.init):
        if mixed:
            if base is None:
                raise OptxError(
                    f"{where} has factors of {mixed}, and PEFT's one fan_in_fan_out can't say which weights "
                    "are (in, out). Pass base=, the checkpoint that it was trained from."
                )
            return open_source(base, "base")
        if base is not None:
            raise OptxError(f"{where} is a plain LoRA, whose change needs no base. Leave base out.")
        return None
    trained = f"{where} was trained with init_lora_weights={lora.init!r}, which took a part off the base"
    if target == "factors":
        raise OptxError(f"{trained}: its factors are no change of it by themselves. Pass target='product'.")
    if base is None:
        raise OptxError(f"{trained}. Pass base=, the checkpoint that it was trained from.")
    return open_source(base, "base")


def _taken_off(origin: Source, name: str, lora: LoRA, turned: bool, product: Tensor, where: str) -> Tensor:
    """B0 A0 of one weight (out, in), as PEFT took it off the base, without the scale."""
    if name not in origin.entries:
        raise OptxError(f"{where} has factors of {name!r}, which base lacks. {near(name, origin.entries)}")
    weight = in_sum_precision(origin.read(name))
    W = weight.t() if turned else weight
    if W.shape != product.shape:
        raise ShapeError(
            f"{where} changes {name!r} by {tuple(product.shape)}, and the weight in base is {tuple(W.shape)}."
        )
    A, B = start_of(lora, W, name.removesuffix(".weight"), where)
    return (B @ A).to(product)


def _check_factors(lora: LoRA, stem: str, entries: Mapping[str, Entry], folder: str, inside: object) -> None:
    """Raise unless two factors go together, and their rank is the configuration's."""
    a, b = entries[stem + _A], entries[stem + _B]
    rank = lora.rank_at(stem.removeprefix(PREFIX))
    if inside and a.shape[0] == b.shape[1] != rank:
        raise OptxError(
            f"Delta.lora: {folder!r} has target_parameters={inside!r}, and the factors of {stem!r} are those "
            "of a stack of experts. Merge the adapter into its model (handle.merge()), and take "
            "Delta.between(base, merged)."
        )
    if a.shape[0] != b.shape[1] or a.shape[0] != rank:
        raise FileError(
            f"Delta.lora: {folder!r} has factors of shapes {a.shape} and {b.shape} for {stem!r}, and its "
            f"configuration says rank {rank}."
        )
    if not (a.dtype.is_floating_point and b.dtype.is_floating_point):
        raise FileError(
            f"Delta.lora: {folder!r} has factors of {a.dtype} and {b.dtype} for {stem!r}: no floats."
        )
