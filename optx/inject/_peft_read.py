"""LoRA and IA3 in PEFT's file format: what is read, strictly where PEFT would only warn."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from optx._errors import FileError, near, warn
from optx._module_paths import Paths, bare_path, paths_of
from optx.inject import _peft_parameters, _peft_prefix
from optx.inject._injection import Injection, Site
from optx.inject._low_rank_start import is_of_weight
from optx.inject._parameters import parameter_paths
from optx.inject._part import RESERVED
from optx.inject._peft_match import any_of, is_feedforward, kept_whole, targeted
from optx.inject._peft_start import init_of, starts_of
from optx.inject._peft_write import PREFIX, own_tensor, tied_to
from optx.inject._stored import Stored
from optx.inject._weights import in_sum_precision, is_biased
from optx.inject.ia3 import IA3
from optx.inject.lora import LoRA

# What follows a module's path in the keys of a method.
_SUFFIXES: dict[type[Injection], tuple[str, ...]] = {
    LoRA: (
        "lora_A.weight",
        "lora_B.weight",
        "lora_B.bias",
        "lora_embedding_A",
        "lora_embedding_B",
        "lora_magnitude_vector",
    ),
    IA3: ("ia3_l",),
}

# Options under which PEFT computes something else than LoRA; their defaults are all empty.
_FOREIGN = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "megatron_config",
    "monteclora_config",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)

# Options that are read, or that change nothing of what a trained adapter computes.
_KNOWN = (
    *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "eva_config"),
    *("exclude_modules", "fan_in_fan_out", "feedforward_modules", "inference_mode", "init_ia3_weights"),
    *(
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_bias",
    ),
    *("lora_dropout", "lora_ga_config", "megatron_core", "modules_to_save", "peft_type", "peft_version"),
    *("qalora_group_size", "r", "rank_pattern", "revision", "target_modules", "target_parameters"),
    *("task_type", "use_dora"),
    *("use_rslora", "ensure_weight_tying", "merge_weights"),
)

# What follows a module's path where its bias is: of served modules and of others, by optx and by PEFT.
_BIASES = (".lora_bias_delta", ".bitfit.delta", ".base_layer.bias", ".bias")


def read(config: dict[str, Any], tensors: Mapping[str, Tensor], model: nn.Module, where: str) -> Stored:
    """What a PEFT file holds, for this model.

    Raises:
        FileError: a method or an option that optx does not have, or keys that are not what the
            configuration means in this model; names it.
    """
    if config.get("peft_type") == "PREFIX_TUNING":
        return _peft_prefix.read(config, tensors, model, where)
    kind = _kind(config, where)
    file = _File(config, model, where, paths_of(model))
    named, rest = _by_module(tensors, _SUFFIXES[kind], where)
    sites = _peft_parameters.meant(config, file.paths, where)
    named, inside_of = _peft_parameters.collect(config, named, sites, where)
    file.check_modules(named, inside_of)
    whole = [path for path in kept_whole(config, model) if path in file.paths.here]
    every = {**named, **inside_of}
    found = {f"{path}.{suffix}": t for path, own in every.items() for suffix, t in own.items()}
    inside, rest = _split(rest, whole)
    if config.get("bias", "none") != "none":
        rest = file.take_biases(rest, found, named)
    more = file.more_wholes(file.without_bases(rest))
    found.update(inside)
    found.update(_split(rest, more)[0])
    file.check_untied([*whole, *more])

    injection = (
        lora_from(config, named, where, sites) if kind is LoRA else _ia3_from(config, file.paths, named)
    )
    if isinstance(injection, LoRA) and is_of_weight(injection.init):
        found.update(starts_of(injection, found, file.paths.modules, where))
    served = [path for site in sites for path in parameter_paths(site.path, site.parameters)]
    return Stored(injection, {"": [*named, *served]}, [*whole, *more], found, PREFIX)


def _kind(config: dict[str, Any], where: str) -> type[Injection]:
    """The method; raises if it, or an option of it, is none of optx's."""
    name = config.get("peft_type")
    kinds: dict[Any, type[Injection]] = {"LORA": LoRA, "IA3": IA3}
    if name not in kinds:
        raise FileError(f"{where} is of PEFT's type {name}; optx reads LORA, IA3 and PREFIX_TUNING.")
    check_options(config, where)
    return kinds[name]


def check_options(config: Mapping[str, Any], where: str) -> None:
    """Raise if a configuration asks for what optx does not compute; warn of what it does not know."""
    for option in _FOREIGN:
        if config.get(option):
            raise FileError(
                f"{where} was trained with PEFT's {option}={config[option]!r}, which optx does not have. "
                "Merge it in PEFT (merge_and_unload) to use it here."
            )
    for option, value in config.items():
        if value and option not in _KNOWN and option not in _FOREIGN:
            warn(
                f"{where} has PEFT's option {option}={value!r}, which this version of optx does not know and "
                "leaves out. Compare outputs with PEFT's."
            )


def _by_module(
    tensors: Mapping[str, Tensor], suffixes: Iterable[str], where: str
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The method's tensors by module path and suffix, and all others by key."""
    named: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if not key.startswith(PREFIX):
            raise FileError(
                f"{where} has the key {key!r}; keys must begin with {PREFIX!r}. PEFT would ignore it."
            )
        short = key.removeprefix(PREFIX)
        if short.endswith(".lora_magnitude_vector.weight"):  # as older versions of PEFT wrote it
            short = short.removesuffix(".weight")
        suffix = next((s for s in suffixes if short.endswith(f".{s}")), None)
        if suffix is None:
            rest[short] = tensor
        else:
            named.setdefault(short.removesuffix(f".{suffix}"), {})[suffix] = tensor
    return named, rest


def _split(
    tensors: Mapping[str, Tensor], whole: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Those of modules that are trained whole, and all others.

    With ``bias="all"`` PEFT saves the biases of such a module two more times, by the names in its wrapper.
    """
    inside, rest, copies = dict[str, Tensor](), dict[str, Tensor](), ("original_module.", "modules_to_save.")
    for key, tensor in tensors.items():
        path = next((path for path in whole if key.startswith(f"{path}.")), None)
        if path is None:
            rest[key] = tensor
        elif not key.removeprefix(f"{path}.").startswith(copies):
            inside[key] = tensor
    return inside, rest


@dataclass(frozen=True)
class _File:
    """What every check needs to know."""

    config: Mapping[str, Any]
    model: nn.Module
    where: str
    paths: Paths

    def near(self, path: str) -> str:
        """Modules with paths like this one."""
        return near(path, filter(None, self.paths.modules))

    def check_modules(self, named: Mapping[str, Mapping[str, Tensor]], inside: Mapping[str, Any]) -> None:
        """Raise unless the modules with tensors are those that the configuration means."""
        for path, own in named.items():
            if path not in self.paths.modules:
                raise FileError(
                    f"{self.where} has {f'{PREFIX}{path}.{next(iter(own))}'!r}, and the model has no module "
                    f"{path!r}: it was saved for another model. {self.near(path)}"
                )
        if not named and not inside:
            raise FileError(f"{self.where} has no tensor of the method {self.config['peft_type']}.")
        wanted = self.config.get("target_modules")
        meant = list(named) if wanted is None else targeted(self.config, self.model, self.paths.modules)
        for path in meant:
            if path not in named:
                raise FileError(
                    f"{self.where} has no tensors for {path!r}, which target_modules={wanted!r} means."
                )
        for path in named:
            if path not in meant:
                raise FileError(
                    f"{self.where} has tensors for {path!r}, which target_modules={wanted!r} does not mean."
                )

    def take_biases(
        self, rest: Mapping[str, Tensor], found: dict[str, Tensor], named: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Move biases to ``found``, as differences to the model's; exactly so if optx wrote the file."""
        left: dict[str, Tensor] = {}
        for key, tensor in rest.items():
            endings = (end for end in _BIASES if key.endswith(end))
            path = key.removesuffix(next(endings, ""))
            module = self.paths.modules.get(path)
            if path == key or module is None or not is_biased(module):
                left[key] = tensor
                continue
            name = f"{path}{_BIASES[0] if path in named else _BIASES[1]}"
            if key == name:
                found[name] = tensor
            elif name not in rest:
                base = in_sum_precision(own_tensor(module, "bias"))
                if base.shape != tensor.shape:
                    raise FileError(
                        f"{self.where}: {PREFIX + key!r} has shape {tuple(tensor.shape)}, the model's bias "
                        f"{tuple(base.shape)}. It was saved for another model."
                    )
                found[name] = tensor.to(base) - base
        return left

    def without_bases(self, rest: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Leave out the base weights that PEFT saves with a served embedding or head."""
        for key, tensor in rest.items():
            path, _, name = key.rpartition(".base_layer.")
            module = self.paths.modules.get(path)
            if path and module is not None and not _same(own_tensor(module, name), tensor):
                warn(
                    f"{self.where} was trained with another {path}.{name} than this model has (a resized "
                    "vocabulary?). The model's own stays; PEFT would take the file's."
                )
        return {key: t for key, t in rest.items() if ".base_layer." not in key}

    def more_wholes(self, rest: Mapping[str, Tensor]) -> list[str]:
        """Modules that are in the file with all their tensors: embeddings of a resized vocabulary."""
        more: list[str] = []
        for key, tensor in rest.items():
            path, _, name = key.rpartition(".")
            module = self.paths.modules.get(path)
            own = {k: t for k, t in module.state_dict().items() if RESERVED not in k} if module else {}
            if name not in own:
                raise FileError(
                    f"{self.where} has {PREFIX + key!r}, for which this model has no place: it was saved for "
                    f"another model, or by another version. {self.near(path)}"
                )
            if path in more or _same(own[name], tensor):
                continue
            if not all(f"{path}.{other}" in rest for other in own):
                raise FileError(
                    f"{self.where} has {PREFIX + key!r}, a weight of the base model with other values."
                )
            more.append(path)
        return more

    def check_untied(self, whole: Iterable[str]) -> None:
        """PEFT trains a copy of a tied module, optx would train both."""
        for path in whole:
            other = tied_to(self.model, self.paths.here[path])
            if other:
                raise FileError(
                    f"{self.where} has a {path!r} of its own, which in this model is tied to {other!r}. "
                    f"Untie it first: model.{path}.weight = torch.nn.Parameter(model.{path}.weight.clone())."
                )


def lora_from(
    config: dict[str, Any], named: Mapping[str, dict[str, Tensor]], where: str, sites: Sequence[Site] = ()
) -> LoRA:
    """The options that PEFT's configuration names; ``named``: each module's tensors in the file, by path."""
    lora = LoRA(
        rank=config.get("r", 8),
        alpha=config.get("lora_alpha", 8),
        dropout=config.get("lora_dropout", 0.0),
        rslora=config.get("use_rslora", False),
        dora=config.get("use_dora", False),
        bias=config.get("bias", "none"),
        lora_bias=config.get("lora_bias", False),
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern=config.get("alpha_pattern") or {},
        init=init_of(config, where),
    )
    above = _peft_parameters.ranks_above(sites, lora.rank_at)
    # PEFT allows ranks above the matrix's; LoRA does where they are named
    for path, own in named.items():
        A, B = (own.get(f"lora_{x}.weight", own.get(f"lora_embedding_{x}")) for x in "AB")
        if A is not None and B is not None and lora.rank_at(path) > min(len(B), A[0].numel()):
            above[f"^{re.escape(path)}"] = lora.rank_at(path)
    return replace(lora, rank_pattern={**above, **lora.rank_pattern})


def _ia3_from(config: dict[str, Any], paths: Paths, named: Iterable[str]) -> IA3:
    chosen = [bare_path(paths.here[path]) for path in named if is_feedforward(config, path)]
    return IA3(feedforward=any_of(chosen) if chosen else ())


def _same(own: Tensor, saved: Tensor) -> bool:
    """Equal in the less precise of both dtypes."""
    if own.shape != saved.shape:
        return False
    lesser = min(own.dtype, saved.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(own.to(lesser), saved.to(own.device, lesser))
