"""Prefix tuning in PEFT's file format, for causal language models with rotary positions.

PEFT keeps all layers' keys and values in one tensor ``prompt_embeddings`` and hands them to the model as a
cache. So there the real tokens stand behind the prefix, at positions from l on; here they stay where they
are. With rotary positions only distances count: turning the prefix's keys by l gives the same attention.
Other positions (GPT-2's) have no such turn, and so no file.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from optx._errors import FileError, TargetError, warn
from optx._module_paths import paths_of
from optx.inject._attention import heads_of
from optx.inject._heads import Prefix
from optx.inject._peft_match import task_of
from optx.inject._served import OnModel, Served
from optx.inject._sharding import whole
from optx.inject._stored import Stored
from optx.inject._targets import resolve
from optx.inject.prefix import PrefixTuning

PROMPT = "prompt_embeddings"

# Options that are read, or that change nothing of what a trained prefix computes.
_KNOWN = (
    *("auto_mapping", "base_model_name_or_path", "encoder_hidden_size", "inference_mode", "init_weights"),
    *("modules_to_save", "num_attention_heads", "num_layers", "num_transformer_submodules"),
    *("num_virtual_tokens", "peft_type", "peft_version", "prefix_projection", "revision", "task_type"),
    "token_dim",
)

Turn = Callable[[Tensor, int], Tensor]
"""Keys (heads, l, width) as if they stood at another position."""


def config_of(handle: OnModel) -> dict[str, Any] | str:
    """The configuration with which PEFT does the same, or why there is none."""
    injection, model = handle.injection, handle.model
    assert isinstance(injection, PrefixTuning)
    if injection.mlp is not None:
        return "its keys and values are made by an MLP (optx.fold_prefix drops it)"
    if handle.saved:
        return "its prefix tuning has no modules_to_save"
    served = _by_layer(handle.served)
    turn = _turn(model, [one.module for one in served])
    if isinstance(turn, str):
        return turn
    heads, length, width = _pair(served[0])[0].shape
    return {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": getattr(model.config, "_name_or_path", None) or None,
        "inference_mode": True,
        "num_virtual_tokens": length,
        "num_layers": len(served),
        "num_attention_heads": heads,
        "token_dim": heads * width,
        "encoder_hidden_size": heads * width,
        "num_transformer_submodules": 1,
        "prefix_projection": False,
    }


def prompt_of(handle: OnModel) -> Tensor:
    """(l, layers * 2 * heads * width): for each position, each layer's keys, then its values."""
    served = _by_layer(handle.served)
    turn = _turn(handle.model, [one.module for one in served])
    assert not isinstance(turn, str)
    flat: list[Tensor] = []
    for one in served:
        key, value = _pair(one)
        flat += [t.transpose(0, 1).flatten(1) for t in (turn(key, key.shape[1]), value)]
    return torch.cat(flat, dim=1)


def read(config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module, where: str) -> Stored:
    """What a PEFT file holds, for this model."""
    if config.get("task_type") != "CAUSAL_LM" or PROMPT not in tensors:
        what = f"is for {config.get('task_type')}" if PROMPT in tensors else f"has no {PROMPT!r}"
        raise FileError(f"{where} {what}; optx reads prefix tuning of causal language models.")
    prompt = tensors[PROMPT]
    _check_rest(config, tensors, where)
    try:
        sites = resolve(model, PrefixTuning(), None)
    except TargetError as error:  # its advice is not for a file
        why = str(error).removeprefix("attach: ").partition(" Pass targets=")[0]
        raise FileError(f"{where} can't be read for this model: {why}") from None
    turn = _turn(model, [site.module for site in sites])
    if isinstance(turn, str):
        raise FileError(f"{where} can't be read for this model: {turn}.")
    length, heads = config["num_virtual_tokens"], config["num_attention_heads"]
    width, layers = config["token_dim"] // heads, len(sites)
    if prompt.shape != (length, layers * 2 * heads * width):
        raise FileError(
            f"{where}: {PROMPT!r} has shape {tuple(prompt.shape)}, the model needs "
            f"{(length, layers * 2 * heads * width)}: {layers} layers of keys and values. It was saved for "
            "another model."
        )
    wanted = _width(sites[0].module) or width
    if width != wanted:
        raise FileError(
            f"{where}: token_dim={config['token_dim']} and num_attention_heads={heads} make heads of width "
            f"{width}, the model's have {wanted}. PEFT 0.17 saves so where head_dim is not hidden_size / "
            "num_attention_heads, and can't use it either; train the prefix with a newer PEFT."
        )
    both = prompt.view(length, layers, 2, heads, width).permute(1, 2, 3, 0, 4)
    plain = paths_of(model).plain
    found: dict[str, Tensor] = {}
    for site, (key, value) in zip(sites, both, strict=True):
        name = f"{plain[site.path]}.{PrefixTuning.name}"
        exact = {end: tensors.get(f"base_model.model.{name}.{end}") for end in ("key", "value")}
        found[f"{name}.key"] = turn(key, -length) if exact["key"] is None else exact["key"]
        found[f"{name}.value"] = value if exact["value"] is None else exact["value"]
    injection = PrefixTuning(length=length)
    return Stored(injection, {"": [plain[site.path] for site in sites]}, [], found)


def _check_rest(config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise if there is more in a file than prefixes, or its configuration asks for more."""
    own = tuple(f".{PrefixTuning.name}.{end}" for end in ("key", "value"))  # of files of optx's
    for key in tensors:
        if key != PROMPT and not (key.startswith("base_model.model.") and key.endswith(own)):
            raise FileError(f"{where} has {key!r} beside {PROMPT!r}, for which prefix tuning has no place.")
    for option, value in config.items():
        if option == "modules_to_save" and value:
            raise FileError(f"{where} was trained with modules_to_save={value!r}; optx reads prefixes alone.")
        if value and option not in _KNOWN:
            warn(
                f"{where} has PEFT's option {option}={value!r}, which this version of optx does not know and "
                "leaves out. Compare outputs with PEFT's."
            )


def _width(attention: nn.Module) -> int | None:
    """How wide the heads of an attention module are, if that can be told."""
    heads = heads_of(attention, None, None)
    return None if isinstance(heads, str) else heads.width


def _by_layer(served: list[Served]) -> list[Served]:
    return sorted(served, key=lambda one: getattr(one.module, "layer_idx", 0))


def _pair(one: Served) -> tuple[Tensor, Tensor]:
    assert isinstance(one.part, Prefix)
    own = one.part.tensors()
    return whole(own["key"].detach()), whole(own["value"].detach())


def _turn(model: nn.Module, attentions: list[nn.Module]) -> Turn | str:
    """How to move keys to another position in this model; or why its prefixes are not PEFT's."""
    config: Any = getattr(model, "config", None)
    if task_of(model) != "CAUSAL_LM":
        return "only its prefix tuning of causal language models means the same"
    if len(attentions) != config.num_hidden_layers:
        return f"it has a prefix in each of the {config.num_hidden_layers} layers"
    kinds: list[str] = getattr(config, "layer_types", None) or []
    if getattr(config, "sliding_window", None) is not None or set(kinds) - {"full_attention"}:
        return "a sliding window hides its prefix from later tokens"
    if getattr(config, "alibi", False):  # Falcon's, which has a rotary module all the same
        return "its positions are ALiBi's, which know nothing of a prefix here"
    rotary: list[Any] = [m for m in model.modules() if isinstance(getattr(m, "inv_freq", None), Tensor)]
    apply: Any = getattr(sys.modules[type(attentions[0]).__module__], "apply_rotary_pos_emb", None)
    fixed = len(rotary) == 1 and getattr(rotary[0], "rope_type", "") not in ("dynamic", "longrope")
    if apply is None or not fixed or not all(getattr(one, "use_rope", True) for one in attentions):
        return "it moves the real tokens behind the prefix, which only rotary positions can make up for"

    def turn(key: Tensor, by: int) -> Tensor:
        at: list[Tensor] = rotary[0](key.float(), torch.tensor([[by]], device=key.device))
        cos, sin = (one.to(key.device) for one in at)  # an offloaded module answers from where it computes
        # Some modules turn the first numbers of a head only; GPT-NeoX's function does so by itself.
        partial = getattr(attentions[0], "rotary_ndims", None) == cos.shape[-1]
        first, rest = (
            key.split([cos.shape[-1], key.shape[-1] - cos.shape[-1]], -1) if partial else (key, None)
        )
        turned = apply(first[None], first[None], cos, sin)[1][0]
        turned = turned / getattr(rotary[0], "attention_scaling", 1.0)
        return turned if rest is None else torch.cat([turned, rest], dim=-1)

    return turn if _only_distance_counts(turn, attentions[0]) else "its positions are not purely rotary"


def _only_distance_counts(turn: Turn, attention: Any) -> bool:
    """Whether products of turned queries and keys depend on nothing else: some models turn a part of each."""
    generator = torch.Generator().manual_seed(0)
    width = _width(attention)
    if width is None:
        return False
    q, k = torch.randn(2, 1, 1, width, generator=generator, dtype=torch.float32)
    try:
        products = [float((turn(q, 3 + by) * turn(k, by)).sum()) for by in (0, 7)]
    except RuntimeError:  # shapes that don't go together
        return False
    return abs(products[0] - products[1]) < 1e-4
