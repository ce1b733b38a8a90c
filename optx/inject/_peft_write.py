"""LoRA and IA3 in PEFT's file format: what is written.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors``. Keys are ``base_model.model.``, the
module's path and a suffix; those of `Part.suffixes` are PEFT's. What PEFT would compute in another way is not
written in its format.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from optx._module_paths import Paths, paths_of
from optx._names import whole
from optx.inject import _peft_parameters, _peft_prefix
from optx.inject._injection import Injection
from optx.inject._low_rank import LowRank
from optx.inject._low_rank_start import START, joined
from optx.inject._part import original
from optx.inject._peft_match import any_of, kept_whole, targeted, task_of
from optx.inject._served import OnModel
from optx.inject._weights import in_sum_precision, is_conv, is_transposed
from optx.inject.bitfit import BiasShift
from optx.inject.ia3 import IA3
from optx.inject.lora import LoRA
from optx.inject.prefix import PrefixTuning

PREFIX = "base_model.model."


def config_of(handle: OnModel) -> dict[str, Any] | str:
    """The configuration with which PEFT does the same; or why there is none, empty for other methods."""
    injection, model = handle.injection, handle.model
    if type(injection) is PrefixTuning:
        return _peft_prefix.config_of(handle)
    if type(injection) not in (LoRA, IA3):
        return ""
    paths = paths_of(model)
    every = [one for one in handle.served if one.injection is injection]
    served = {paths.plain[one.path]: one.module for one in every if not one.part.parameter_names}
    inside = [one for one in every if one.part.parameter_names]
    saved = [paths.plain[kept.path] for kept in handle.saved]
    config: dict[str, Any] = {
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "inference_mode": True,
        "modules_to_save": sorted(saved) or None,
        "fan_in_fan_out": any(is_transposed(m) and not isinstance(m, nn.Embedding) for m in served.values()),
        "target_modules": sorted(served),
    }
    if isinstance(injection, LoRA):
        kept = {paths.plain[one.path] for one in handle.served if _keeps_start(one.part)}
        config.update(
            _of_lora(injection, [path for one in every for path in one.paths_as(paths.plain)], kept)
        )
        if inside:
            config["target_parameters"] = [path for one in inside for path in one.paths_as(paths.plain)]
            config["peft_version"] = _peft_parameters.LAYOUT  # older ones have these factors the other way
    elif isinstance(injection, IA3):
        config.update(_of_ia3(injection, served))
    if inside and (why := _peft_parameters.objection(inside, config, paths)):
        return why
    if set(targeted({"target_modules": sorted(served)}, model, paths.modules)) != set(served):
        config["target_modules"] = any_of(served)  # one path is the end of another
    config["task_type"] = task_of(model)
    if set(kept_whole(config, model)) != set(saved):
        config["task_type"] = None  # with it, PEFT would train the task's head
    return _objection(config, model, paths, served, saved) or config


def _of_lora(lora: LoRA, served: Iterable[str], kept: Container[str]) -> dict[str, Any]:
    """LoRA's part of it; what keeps its start is written as a LoRA of twice the rank, with the same scale."""
    ranks = {path: int(lora.rank_at(path)) * (2 if path in kept else 1) for path in served}
    more = 2**0.5 if lora.rslora else 2
    alphas = {path: _shorter(lora.alpha_at(path) * (more if path in kept else 1)) for path in served}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(path)}": r for path, r in sorted(ranks.items()) if r != rank},
        "alpha_pattern": {f"^{re.escape(path)}": a for path, a in sorted(alphas.items()) if a != alpha},
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "bias": lora.bias,
        "lora_bias": lora.lora_bias,
        "init_lora_weights": True,
    }


def _of_ia3(ia3: IA3, served: Mapping[str, nn.Module]) -> dict[str, Any]:
    chosen = sorted(path for path, module in served.items() if ia3.is_feedforward(path, module))
    ambiguous = [path for path in served if path.endswith(tuple(chosen)) and path not in chosen]
    names = any_of(chosen) if ambiguous else chosen
    return {"peft_type": "IA3", "feedforward_modules": names, "init_ia3_weights": True}


def _objection(
    config: Mapping[str, Any],
    model: nn.Module,
    paths: Paths,
    served: Mapping[str, nn.Module],
    saved: Iterable[str],
) -> str:
    """Why PEFT would not do the same with this configuration."""
    for path in sorted(set(kept_whole(config, model)) - set(saved)):
        return f"it takes modules_to_save by the ends of their paths, so it would train {path!r} whole too"
    for path in sorted(set(served) - set(targeted(config, model, paths.modules))):
        return f"what is inside modules_to_save is not adapted, and it would take {path!r} for that"
    for path in saved:
        other = tied_to(model, paths.here[path])
        if other:
            return f"it would untie {path!r} from {other!r}"
    for path, module in served.items():
        if config["peft_type"] == "IA3" and isinstance(module, nn.Conv1d):
            return f"its IA3 does not serve nn.Conv1d, and {path!r} is one"
        if config["peft_type"] == "LORA" and is_conv(module) and _bent(module):
            return f"its LoRA has no dilation and no padding mode, and {path!r} has"
    return ""


def tensors_of(handle: OnModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A handle's tensors by PEFT's keys, and those that PEFT has in another form.

    Biases are trained here as differences to the model's; PEFT has them whole. Prefixes are one tensor there.
    What PEFT has another form of is in the file twice: it ignores ours, and from its own ours would not come
    back bit for bit.
    """
    if any(_keeps_start(one.part) for one in handle.served):
        # Sharded factors and their start, which is not, have no common form but the whole.
        ends = tuple(end for pair in START.items() for end in pair)
        tensors = joined({key: whole(t) if key.endswith(ends) else t for key, t in tensors.items()})
    found = {f"{PREFIX}{key}": tensor for key, tensor in tensors.items()}
    if isinstance(handle.injection, PrefixTuning):
        found[_peft_prefix.PROMPT] = _peft_prefix.prompt_of(handle)
    plain = paths_of(handle.model).plain
    for one in handle.served:
        delta, key = None, f"{plain[one.path]}.bias"
        if isinstance(one.part, LowRank):
            delta, key = one.part.bias, f"{plain[one.path]}.base_layer.bias"
        elif isinstance(one.part, BiasShift):
            delta = one.part.delta
        if delta is not None:
            base = in_sum_precision(own_tensor(one.module, "bias"))
            found[f"{PREFIX}{key}"] = base + whole(delta.detach()).to(base.dtype)
    return found


def _keeps_start(part: object) -> bool:
    return isinstance(part, LowRank) and part.A_start is not None


def tied_to(model: nn.Module, path: str) -> str:
    """A parameter outside a module that is one with one of the module's, or nothing."""
    own = {id(p) for p in model.get_submodule(path).parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return next((name for name, p in every if id(p) in own and not name.startswith(f"{path}.")), "")


def own_tensor(module: nn.Module, name: str) -> Tensor:
    """A module's own tensor, without what is merged into it; all of it, if it is sharded."""
    return whole(original(module, name).detach())


def _bent(module: Any) -> bool:
    return any(step != 1 for step in module.dilation) or module.padding_mode != "zeros"


def _shorter(number: float) -> float:
    return int(number) if number == int(number) else number


def spelled_out(injection: Injection, handle: OnModel) -> dict[str, Any]:
    """The options of an injection, by module where they are patterns over module names."""
    options = injection.options()
    served = [one for one in handle.served if one.injection is handle.injection]
    if isinstance(injection, LoRA):
        del options["rank_pattern"], options["alpha_pattern"]
        paths = [path for one in served for path in one.paths_as({one.path: one.path})]
        options["rank"] = {path: injection.rank_at(path) for path in paths}
        options["alpha"] = {path: injection.alpha_at(path) for path in paths}
    if isinstance(injection, IA3):
        options["feedforward"] = [
            one.path for one in served if injection.is_feedforward(one.path, one.module)
        ]
    return options
