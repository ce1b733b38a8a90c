"""Optimizer state from one format into another: ours, and those of torchao, bitsandbytes and FlashOptim."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from optx._errors import OptxError, ShapeError
from optx._names import parameter_names
from optx.kernels.step.layout import GROUP
from optx.step.bases import base_rules
from optx.step.checks import TORCH_KEYS
from optx.step.formats import CODED, CODES, in_groups, out_of_groups
from optx.step.kept import MASTER, MASTERS, STATE, moments_of, state_words
from optx.step.moments import FLOATS, as_kept, decoded, encoded, fits, float_of, scale_key, takes_codes
from optx.step.state import PENDING, REST, SCALE, is_ours
from optx.step.transform import Group, Host

StateDict = dict[str, Any]


def convert_state(state_dict: StateDict, optimizer: Optimizer | None = None) -> StateDict:
    """An optimizer's state dict in another format, for trainers that load it themselves.

    ``load_state_dict(state_dict, convert=True)`` of a wrapped optimizer does the same, and so does
    ``optx.load_optimizer(optimizer, path, convert=True)``. Codes of 8 bits are saved with a dimension of 1
    behind their weight's, so that nothing takes them for moments: an optimizer that is not wrapped fails in
    its next step (give it what this returns), and torch's distributed checkpoint, which copies into what an
    optimizer has, finds another size. There, sharded biases and rows that are no multiple of 32 numbers have
    no codes: between one process and shards go by ``StateDictOptions(full_state_dict=True)``. A Trainer
    resumes from the file ``checkpoint-500/optimizer.pt``: load it, convert, and save it there.

    Args:
        state_dict: of an optimizer, wrapped or not; of torchao's or bitsandbytes' 8-bit Adams; or of
            FlashOptim's optimizers. It is not changed.
        optimizer: what is to load it, with the same parameters; None for float32 moments, as any optimizer
            takes them. Of a wrapped one the formats are taken that its groups have.

    Returns:
        A new state dict. Moments of 8 bits are decoded exactly, into float32; in 8 bits each number is the
        nearest that a code stands for. What a bfloat16 weight keeps beside (``master="split"``) is left out
        unless the optimizer has it too, for it belongs to the weight.

    Raises:
        OptxError: the state dict is none of an optimizer, or bitsandbytes' of one that keeps other moments.

    Example:
        >>> import torch, optx
        >>> w = torch.nn.Parameter(torch.ones(64))
        >>> old = torch.optim.AdamW([w])
        >>> w.grad = torch.ones(64)
        >>> old.step()
        >>> new = optx.wrap(torch.optim.AdamW([w]), state="8bit")
        >>> new.load_state_dict(optx.convert_state(old.state_dict(), new))
        >>> new.state[w]["exp_avg"].dtype
        torch.int8
    """
    given: Any = state_dict if isinstance(state_dict, dict) else {}  # pyright: ignore
    if not isinstance(given.get("state"), dict) or "param_groups" not in given:
        raise OptxError(
            "convert_state: this has no 'state' and 'param_groups', so it is no optimizer's state."
        )
    state_dict = with_codes(state_dict, optimizer)
    groups = [{k: v for k, v in g.items() if k not in (STATE, MASTER)} for g in state_dict["param_groups"]]
    converted: StateDict = {**state_dict, "param_groups": groups}
    for part in ("state", PENDING):
        if part in state_dict:
            converted[part] = {n: _plain(entry) for n, entry in state_dict[part].items()}
    if optimizer is not None:
        _fit(converted, optimizer, state_dict)
    rests = any(g.get(MASTER) for g in converted["param_groups"])
    if not rests:
        for entry in (*converted["state"].values(), *converted.get(PENDING, {}).values()):
            if hasattr(entry, "pop"):  # ZeroRedundancyOptimizer has None for what others keep
                entry.pop(REST, None)
    return converted


def with_codes(state_dict: StateDict, optimizer: Any = None) -> StateDict:
    """A state dict with codes in their weights' shapes."""
    given: list[Group] = optimizer.param_groups if optimizer is not None else []
    shapes: dict[Any, torch.Size] = {}
    for saved, group in zip(state_dict["param_groups"], given, strict=False):
        shapes |= {n: p.shape for n, p in zip(saved["params"], group["params"], strict=False)}
    kept = dict(state_dict)
    for part in ("state", PENDING):
        if part in kept:
            kept[part] = {n: _in_shape(entry, shapes.get(n)) for n, entry in kept[part].items()}
    return kept


def _in_shape(entry: Any, shape: Sequence[int] | None) -> Any:
    return as_kept(entry, shape) if hasattr(entry, "items") else entry


# ---- into floats ----------------------------------------------------------------------------------------


def _plain(entry: Any) -> Any:
    """One parameter's state with float moments, whoever kept it."""
    return _decoded(entry) if hasattr(entry, "items") else entry


def _decoded(entry: dict[Any, Any]) -> dict[Any, Any]:
    plain = {k: v for k, v in entry.items() if k != _NESTED} | entry.get(_NESTED, {})
    if "state1" in plain:
        plain = _bitsandbytes(plain)
    for key in list(plain):
        value = plain.get(key)  # scales go with their codes
        if not isinstance(key, str):  # HeavyBall's count of its own
            continue
        if key.endswith("::quantized"):
            name = key.removesuffix("::quantized")
            plain[name] = _flashoptim(plain.pop(key), plain.pop(f"{name}::scales"))
        elif not isinstance(value, Tensor):
            continue
        elif hasattr(value, "dequantize") and hasattr(value, "codes"):  # torchao's state
            plain[key] = value.dequantize()  # type: ignore[operator]
        elif value.dtype in CODED and scale_key(key) in plain:
            plain[key] = decoded(value, plain.pop(scale_key(key)))
    plain.pop("error_bits", None)  # FlashOptim's, of the weight
    return plain


def _flashoptim(codes: Tensor, scales: Tensor) -> Tensor:
    """FlashOptim's formulas, sections 3.2 and 3.3."""
    q = in_groups(codes)
    s = scales.reshape(-1, 1).float()
    if codes.dtype == torch.uint8:
        values = (q / 255.0 * s).square()
    else:
        values = q / 127.0 / (2.0 - q.abs() / 127.0) * s
    return out_of_groups(values, codes.shape)


_NESTED = "__bnb_optimizer_quant_state__"  # where newer files of bitsandbytes have all that is coded
_BNB = {"state1": "exp_avg", "state2": "exp_avg_sq"}


def _bitsandbytes(entry: Mapping[Any, Any]) -> dict[Any, Any]:
    """Their names in torch's; a code is a place in a table, in blocks of 256 (older files: 2048)."""
    used = ("qmap1", "qmap2", "absmax1", "absmax2", "gnorm_vec", "new_max1", "new_max2", "max1", "max2")
    plain = {k: v for k, v in entry.items() if k not in (*_BNB, *used)}
    for i, (theirs, name) in enumerate(_BNB.items(), start=1):
        codes = entry.get(theirs)
        if not isinstance(codes, Tensor):
            continue
        plain[name] = codes
        if f"qmap{i}" in entry:
            largest, flat = entry[f"absmax{i}"], codes.reshape(-1)
            block = 256 if -(-flat.numel() // 256) == largest.numel() else 2048
            values = entry[f"qmap{i}"][flat.long()]
            values = values * largest.repeat_interleave(block)[: flat.numel()]
            plain[name] = values.view(codes.shape)
    return plain


# ---- into what an optimizer keeps -------------------------------------------------------------------------


def _fit(state_dict: StateDict, optimizer: Any, given: StateDict) -> None:
    """Give groups what this optimizer's have, and moments its formats."""
    parts = [(state_dict[part], given[part]) for part in ("state", PENDING) if part in state_dict]
    for saved, group in zip(state_dict["param_groups"], optimizer.param_groups, strict=False):
        foreign = [k for k in saved if k not in group and k not in TORCH_KEYS and not is_ours(k)]
        if any(k not in saved for k in optimizer.defaults):  # another library's
            for key in foreign:
                del saved[key]
            saved.update({k: v for k, v in group.items() if k not in saved})
        saved.update({k: group[k] for k in (STATE, MASTER) if k in group})
        transforms = getattr(optimizer, "transforms", ())
        base = getattr(optimizer, "base", optimizer)
        rules = base_rules(base, group)
        kept = moments_of(rules, transforms, group)
        for number, p in zip(saved["params"], group["params"], strict=False):
            for entry, old in ((part[number], was[number]) for part, was in parts if part.get(number)):
                if rules and ("state1" in old or _NESTED in old):
                    _rename(entry, rules.elements, type(base).__name__)
                _encode(entry, p, kept, group.get(STATE), old)


def _rename(entry: dict[str, Any], elements: Sequence[str], base: str) -> None:
    """Give what bitsandbytes kept the name that this base has for it, where there is one of each."""
    found = [name for name in _BNB.values() if name in entry]
    if all(name in elements for name in found):
        return
    if len(found) != 1 or len(elements) != 1:
        raise OptxError(
            f"convert_state: bitsandbytes kept {' and '.join(found)} in this checkpoint, and {base} keeps "
            f"{' and '.join(elements) or 'nothing'}. Load it into an optimizer of that class."
        )
    entry[elements[0]] = entry.pop(found[0])


def _encode(
    entry: dict[str, Any], p: Tensor, kept: Mapping[str, str], bits: int | None, old: Mapping[Any, Any]
) -> None:
    for key, moment in kept.items():
        x, codes, scale = entry.get(key), old.get(key), old.get(scale_key(key))
        if not isinstance(x, Tensor):
            continue
        if bits == 8 and takes_codes(p):
            if isinstance(codes, Tensor) and codes.dtype == CODES[moment] and fits(codes, scale, p):
                entry[key], entry[scale_key(key)] = codes, scale  # encoded again they would move
                continue
            entry[key], entry[scale_key(key)] = encoded(x, p, moment)
        else:
            entry[key] = x.to(float_of(p, bits) or p.dtype)


# ---- checks -----------------------------------------------------------------------------------------------


def check_formats(wrapped: Host, state_dict: StateDict) -> None:
    """Raise for a checkpoint in another format than the optimizer's."""
    names, state = parameter_names(wrapped.base), state_dict["state"]
    pairs = zip(state_dict["param_groups"], wrapped.param_groups, strict=False)
    for index, (saved, group) in enumerate(pairs):
        kept = moments_of(base_rules(wrapped.base, group), wrapped.transforms, group)
        entries = [
            # HeavyBall counts under a number.
            ({key: value for key, value in state[number].items() if isinstance(key, str)}, p)
            for number, p in zip(saved["params"], group["params"], strict=False)
            if isinstance(state.get(number), dict)
        ]
        if any(_foreign(entry) for entry, _ in entries):
            raise OptxError(f"load_state_dict: another library kept this state in 8 bits. {_WAY_OUT}")
        had, has = saved.get(STATE), group.get(STATE)
        moments = [(entry[k], p) for entry, p in entries for k in kept if isinstance(entry.get(k), Tensor)]
        if had != has and not all(_same(had, has, t.dtype, p.dtype) for t, p in moments):
            raise OptxError(
                f"load_state_dict: in param group {index} the checkpoint keeps moments as state="
                f"{state_words(had)}, this optimizer as state={state_words(has)}. {_WAY_OUT}"
            )
        if entries and saved.get(MASTER) != group.get(MASTER):
            words = {n: repr(word) for word, n in MASTERS.items()}
            was, now = words.get(saved.get(MASTER, 0)), words.get(group.get(MASTER, 0))
            raise OptxError(
                f"load_state_dict: in param group {index} the checkpoint has master={was}, this optimizer "
                f"master={now}. {_WAY_OUT}"
            )
        for entry, p in entries:
            _check_scales(entry, names[id(p)], kept)


def _check_scales(entry: dict[str, Any], name: str, kept: Mapping[str, str]) -> None:
    for key, codes in entry.items():
        if key in kept and isinstance(codes, Tensor) and codes.dtype in CODED and scale_key(key) not in entry:
            raise OptxError(
                f"load_state_dict: {key!r} of parameter {name!r} is {codes.numel():,} codes of 8 bits, and "
                f"{scale_key(key)!r}, their scales, is missing. Load the checkpoint as it was saved."
            )
        scale = None if key.startswith(SCALE) else entry.get(scale_key(key))
        if isinstance(codes, Tensor) and isinstance(scale, Tensor):
            wanted = -(-codes.numel() // GROUP)
            if scale.numel() != wanted:
                raise ShapeError(
                    f"load_state_dict: {key!r} of parameter {name!r} has {codes.numel():,} codes, which take "
                    f"{wanted:,} scales, and {scale.numel():,} were saved."
                )


def _foreign(entry: Mapping[str, Any]) -> bool:
    return any(
        k in ("state1", _NESTED)
        or k.endswith("::quantized")
        or (hasattr(v, "dequantize") and hasattr(v, "codes"))
        for k, v in entry.items()
    )


def _same(had: int | None, has: int | None, kept: torch.dtype, weight: torch.dtype) -> bool:
    """Whether a moment in a dtype is in both formats, one of which goes by the weight's dtype."""
    given = had if has is None else has if had is None else 0
    return kept == weight == FLOATS.get(given or 0)


_WAY_OUT = (
    "Pass convert=True, or, where a trainer loads it, give it optx.convert_state(state_dict, optimizer)."
)
