"""Which modules a PEFT configuration means: the rules of PEFT 0.21, which its files rely on.

Paths are those of the bare model, as PEFT sees it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from optx._module_paths import paths_of
from optx.inject._file_patterns import full_match
from optx.inject._part import RESERVED
from optx.inject._weights import is_linear

# Modules that PEFT trains whole without being asked, by task.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def targeted(config: Mapping[str, Any], model: nn.Module, paths: Iterable[str]) -> list[str]:
    """The modules that a configuration adapts."""
    wanted: Any = config["target_modules"]
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        wanted = _all_linear(config, model)
    return [p for p in paths if p and not _excluded(config, p) and _is_target(config, wanted, p)]


def kept_whole(config: Mapping[str, Any], model: nn.Module) -> list[str]:
    """The modules that a configuration trains whole: any whose path ends with one of the names."""
    plain, names = paths_of(model).plain, whole_names(config)
    every = (path for path, _ in model.named_modules(remove_duplicate=False))
    shorter = (plain.get(path, path) for path in every if RESERVED not in path.split("."))
    return [path for path in dict.fromkeys(shorter) if path.endswith(names)]


def whole_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """``modules_to_save``, and the heads that PEFT adds to it for a task."""
    return (*(config.get("modules_to_save") or ()), *_HEADS.get(config.get("task_type") or "", ()))


def is_feedforward(config: Mapping[str, Any], path: str) -> bool:
    """Whether IA3 scales the input: names are compared with the end of the path, dot or not."""
    names: Any = config.get("feedforward_modules") or ()
    if isinstance(names, str):
        return full_match(names, path, "load: feedforward_modules")
    return path.endswith(tuple(names))


def task_of(model: nn.Module) -> str | None:
    """PEFT's name for what the model is for, from its class name."""
    name, config = type(model).__name__, getattr(model, "config", None)
    if config is None or getattr(model, "main_input_name", None) != "input_ids":
        return None
    if "inputs_embeds" not in inspect.signature(model.forward).parameters:
        return None  # PEFT's classes for tasks pass it on; CLIP's models don't take it
    tasks = {
        "ForCausalLM": "CAUSAL_LM",
        "LMHeadModel": "CAUSAL_LM",
        "ForSequenceClassification": "SEQ_CLS",
        "ForTokenClassification": "TOKEN_CLS",
        "ForQuestionAnswering": "QUESTION_ANS",
        "Model": "FEATURE_EXTRACTION",
    }
    if getattr(config, "is_encoder_decoder", False):
        tasks = {"ForConditionalGeneration": "SEQ_2_SEQ_LM"}
    return next((task for end, task in tasks.items() if name.endswith(end)), None)


def any_of(paths: Iterable[str]) -> str:
    """A regex that matches these paths and no other."""
    return "|".join(re.escape(path) for path in sorted(paths))


def _excluded(config: Mapping[str, Any], path: str) -> bool:
    excluded: Any = config.get("exclude_modules") or ()
    by_pattern = isinstance(excluded, str) and excluded != ""
    if full_match(excluded, path, "load: exclude_modules") if by_pattern else _named(excluded, path):
        return True
    who = "load: modules_to_save"
    return any(full_match(rf"(^|.*\.){name}($|\..*)", path, who) for name in whole_names(config))


def _is_target(config: Mapping[str, Any], wanted: Any, path: str) -> bool:
    if isinstance(wanted, str):
        return full_match(wanted, path, "load: target_modules")
    if path in wanted:
        return True
    layers: Any = config.get("layers_to_transform")
    if not _named(wanted, path):
        return False
    return (
        layers is None
        or layers == []
        or _layer(config, path) in ([layers] if isinstance(layers, int) else layers)
    )


def _named(names: Iterable[str], path: str) -> bool:
    return path in names or path.endswith(tuple(f".{name}" for name in names))


def _layer(config: Mapping[str, Any], path: str) -> int | None:
    """The first number in a path that follows a stack's name."""
    stacks: Any = config.get("layers_pattern") or (r"[^.]*",)
    anchor = r"(?:^|.*?\.)" if config.get("layers_pattern") else r".*?\."
    for stack in (stacks,) if isinstance(stacks, str) else stacks:
        found = re.match(rf"{anchor}{stack}\.(\d+)\.", path)
        if found:
            return int(found[1])
    return None


def _all_linear(config: Mapping[str, Any], model: nn.Module) -> list[str]:
    """Linear modules, without a transformers model's output head."""
    paths = paths_of(model)
    heads: list[Any] = []
    if any(kind.__name__ == "PreTrainedModel" for kind in type(model).__mro__):
        heads = [model.get_output_embeddings()]  # type: ignore[operator]
        if heads == [None] and config.get("task_type") == "SEQ_CLS":
            found = (getattr(model, name, None) for name in ("score", "classifier"))
            heads = [next((head for head in found if head is not None), None)]
    return [p for p, module in paths.modules.items() if is_linear(module) and module not in heads]
