"""Which modules an injection serves: what the user names, or what its paper serves in a known family."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from optx._errors import TargetError, near
from optx.inject._injection import Injection, Site, Targets
from optx.inject._part import RESERVED, Attached
from optx.inject._weights import is_biased, is_conv


@dataclass(frozen=True)
class Family:
    """Where the parts of one kind of model are, as regexes over module paths; empty where it has none.

    Attributes:
        name: for messages.
        block: one layer of the stack. The other patterns follow it after a dot.
        query_value: projections that LoRA's paper adapts.
        key_value: projections whose outputs IA3 scales, and
        ffn_out: the module whose input it scales in the FFN, its last linear one.
        attention: the module that calls scaled_dot_product_attention.
        ffn: the FFN sub-layer as one module, or the module that adds its output to the residual.
        attention_out: the last linear module of attention.
        linears: every linear module of a block.
        convolutions: every convolution of a block.
    """

    name: str
    block: str
    query_value: str = ""
    key_value: str = ""
    ffn_out: str = ""
    attention: str = ""
    ffn: str = ""
    attention_out: str = ""
    linears: str = ""
    convolutions: str = ""

    @property
    def parts(self) -> dict[str, str]:
        """Every pattern but the block's, by name."""
        return {
            "query_value": self.query_value,
            "key_value": self.key_value,
            "ffn_out": self.ffn_out,
            "attention": self.attention,
            "ffn": self.ffn,
            "attention_out": self.attention_out,
            "linears": self.linears,
            "convolutions": self.convolutions,
        }

    def pattern(self, role: str) -> str:
        """The regex of a role's modules, empty if the family has none."""
        if role == "block":
            return self.block
        names = [self.parts[part] for part in _ROLES[role]]
        if not all(names):
            return ""
        return rf"{self.block}\.({'|'.join(names)})"

    def found(self, paths: Sequence[str]) -> int:
        """How many of its parts a model has; 0 without the one that it is known by."""
        sign = "attention" if self.attention else "convolutions"
        if not _any_matches(self.pattern(sign), paths):
            return 0
        return sum(_any_matches(self.pattern(part), paths) for part, own in self.parts.items() if own)


# What each injection serves by default, in terms of a family's parts.
_ROLES: dict[str, tuple[str, ...]] = {
    "query_value": ("query_value",),
    "key_value": ("key_value",),
    "ia3": ("key_value", "ffn_out"),
    "attention": ("attention",),
    "ffn": ("ffn",),
    "ffn_out": ("ffn_out",),
    "attention_out": ("attention_out",),
    "branches": ("attention", "ffn"),
    "sublayers": ("attention_out", "ffn_out"),
    "linears": ("linears",),
    "convolutions": ("convolutions",),
    "block": (),
}

# Of the families whose parts are found, a model is of the one with most of them: the first, among equals.
FAMILIES = (
    Family(
        "Llama",
        block=r"(?:.*\.)?layers\.\d+",
        query_value=r"self_attn\.(?:q|v)_proj",
        key_value=r"self_attn\.(?:k|v)_proj",
        ffn_out=r"mlp\.down_proj",
        attention=r"self_attn",
        ffn=r"mlp",
        attention_out=r"self_attn\.o_proj",
        linears=r"(?:self_attn|mlp)\.\w+_proj",
    ),
    Family(
        "BERT",
        block=r"(?:.*\.)?encoder\.layer\.\d+",
        query_value=r"(?:cross)?attention\.self\.(?:query|value)",
        key_value=r"(?:cross)?attention\.self\.(?:key|value)",
        ffn_out=r"output\.dense",
        attention=r"(?:cross)?attention\.self",
        ffn=r"output",  # LayerNorm(dense(h) + u): it gets the FFN's input u as its second argument
        attention_out=r"(?:cross)?attention\.output\.dense",
        linears=r"(?:cross)?attention\.self\.(?:query|key|value)"
        r"|(?:(?:cross)?attention\.output|intermediate|output)\.dense",
    ),
    Family(
        "GPT-2",
        block=r"(?:.*\.)?h\.\d+",
        query_value=r"attn\.c_attn",
        key_value=r"attn\.c_attn",
        ffn_out=r"mlp\.c_proj",
        attention=r"attn|crossattention",
        ffn=r"mlp",
        attention_out=r"(?:attn|crossattention)\.c_proj",
        linears=r"(?:attn|crossattention)\.(?:c|q)_\w+|mlp\.c_\w+",
    ),
    Family(
        "ViT (timm)",
        block=r"(?:.*\.)?blocks\.\d+",
        query_value=r"attn\.qkv",
        key_value=r"attn\.qkv",
        ffn_out=r"mlp\.fc2",
        attention=r"attn",
        ffn=r"mlp",
        attention_out=r"attn\.proj",
        linears=r"attn\.(?:qkv|proj)|mlp\.fc[12]",
    ),
    Family(
        "ViT",
        block=r"(?:.*\.)?layers\.\d+",
        query_value=r"attention\.(?:q|v)_proj",
        key_value=r"attention\.(?:k|v)_proj",
        ffn_out=r"mlp\.fc2",
        attention=r"attention",
        ffn=r"mlp",
        attention_out=r"attention\.o_proj",
        linears=r"attention\.[qkvo]_proj|mlp\.fc[12]",
    ),
    Family(
        "ViT (transformers 4)",
        block=r"(?:.*\.)?encoder\.layer\.\d+",
        query_value=r"attention\.attention\.(?:query|value)",
        key_value=r"attention\.attention\.(?:key|value)",
        ffn_out=r"output\.dense",
        attention=r"attention\.attention",
        attention_out=r"attention\.output\.dense",
        linears=r"attention\.attention\.(?:query|key|value)|(?:attention\.output|intermediate|output)\.dense",
    ),
    Family(
        "ViT (torchvision)",
        block=r"(?:.*\.)?layers\.encoder_layer_\d+",
        ffn_out=r"mlp\.3",
        attention=r"self_attention",
        linears=r"mlp\.[03]",
    ),
    Family(
        "torch.nn.Transformer",
        block=r"(?:.*\.)?layers\.\d+",
        ffn_out=r"linear2",
        attention=r"self_attn|multihead_attn",
        linears=r"linear[12]",
    ),
    Family(
        "CLIP",
        block=r"(?:.*\.)?layers\.\d+",
        query_value=r"self_attn\.(?:q|v)_proj",
        key_value=r"self_attn\.(?:k|v)_proj",
        ffn_out=r"mlp\.fc2",
        attention=r"self_attn",
        ffn=r"mlp",
        attention_out=r"self_attn\.out_proj",
        linears=r"self_attn\.\w+_proj|mlp\.fc[12]",
    ),
    Family(
        "BART and OPT",  # and Whisper; their FFN is two linear modules of the block, and no module by itself
        block=r"(?:.*\.)?layers\.\d+",
        query_value=r"(?:self|encoder)_attn\.(?:q|v)_proj",
        key_value=r"(?:self|encoder)_attn\.(?:k|v)_proj",
        ffn_out=r"fc2",
        attention=r"(?:self|encoder)_attn",
        attention_out=r"(?:self|encoder)_attn\.out_proj",
        linears=r"(?:self|encoder)_attn\.\w+_proj|fc[12]",
    ),
    Family(
        "DistilBERT",
        block=r"(?:.*\.)?transformer\.layer\.\d+",
        query_value=r"attention\.(?:q|v)_lin",
        key_value=r"attention\.(?:k|v)_lin",
        ffn_out=r"ffn\.lin2",
        attention=r"attention",
        ffn=r"ffn",
        attention_out=r"attention\.out_lin",
        linears=r"attention\.\w+_lin|ffn\.lin[12]",
    ),
    Family(
        "T5",
        block=r"(?:.*\.)?block\.\d+",
        query_value=r"layer\.\d+\.(?:SelfAttention|EncDecAttention)\.[qv]",
        key_value=r"layer\.\d+\.(?:SelfAttention|EncDecAttention)\.[kv]",
        ffn_out=r"layer\.\d+\.DenseReluDense\.wo",
        attention=r"layer\.\d+\.(?:SelfAttention|EncDecAttention)",
        ffn=r"layer\.\d+\.DenseReluDense",
        attention_out=r"layer\.\d+\.(?:SelfAttention|EncDecAttention)\.o",
        linears=r"layer\.\d+\.(?:(?:SelfAttention|EncDecAttention)\.[qkvo]|DenseReluDense\.w\w+)",
    ),
    Family(
        "ResNet",  # torchvision's and timm's
        block=r"(?:.*\.)?layer\d+\.\d+",
        convolutions=r"conv\d+|downsample\.\d+",
    ),
    Family(
        "ResNet (transformers)",
        block=r"(?:.*\.)?stages\.\d+\.layers\.\d+",
        convolutions=r"layer\.\d+\.convolution|shortcut\.convolution",
    ),
)


def family_of(model: nn.Module) -> Family | None:
    """The known family a model belongs to, by the names of its modules."""
    paths = [path for path, _ in model.named_modules() if RESERVED not in path.split(".")]
    best = max(FAMILIES, key=lambda family: family.found(paths))
    return best if best.found(paths) else None


def _any_matches(pattern: str, paths: Sequence[str]) -> bool:
    matches = re.compile(pattern).fullmatch
    return any(matches(path) for path in paths)


def resolve(model: nn.Module, injection: Injection, targets: Targets | None) -> list[Site]:
    """The modules to serve, in the model's order, each once and each weight once.

    Raises:
        TargetError: nothing matches, or one of a list doesn't (names near misses), or there are no defaults
            for this model.
    """
    modules = [
        (path, module)
        for path, module in model.named_modules()
        if not isinstance(module, Attached) and RESERVED not in path.split(".")
    ]
    chosen = default_targets(model, injection) if targets is None else targets
    matches = matcher(chosen)
    check_each_matches(chosen, modules)
    sites = [Site(path, module) for path, module in modules if path and matches(path, module)]
    if not sites:
        own = targets is not None
        raise TargetError(_none(chosen, modules) if own else _none_by_default(model, injection, modules))
    return _each_weight_once(sites)


def _none(targets: Targets, modules: Sequence[tuple[str, nn.Module]]) -> str:
    """Why nothing is served where a person said what."""
    if isinstance(targets, str):
        known = _near_paths(targets, [path for path, _ in modules if path])
        return f"attach: no module matches targets={targets!r}. {known}"
    if isinstance(targets, type | Sequence):
        return f"attach: no module matches targets={targets!r}. The model has {_types(modules)}."
    return f"attach: targets is a function that no module passes. The model has {_types(modules)}."


def _none_by_default(model: nn.Module, injection: Injection, modules: Sequence[tuple[str, nn.Module]]) -> str:
    """Why nothing is served where a person left it to the injection."""
    method, kind, family = type(injection).__name__, type(model).__name__, family_of(model)
    of_family = f", as in {family.name} models" if family else ""
    why = f"found nothing to serve by default in this {kind}{f', a {family.name} model' if family else ''}"
    if injection.role_in(model) == "biased":
        why = f"trains biases, and no Linear, convolution or norm of this {kind} has one{of_family}"
    return (
        f"attach: {method} {why}. It has {_types(modules)}. Pass targets=, a regex over module names of "
        f"{injection.serves}, or attach another injection."
    )


def _near_paths(pattern: str, paths: Sequence[str]) -> str:
    """Modules whose last name is like the last word of a regex."""
    words = re.findall(r"\w+", pattern)
    leaves = {path.rpartition(".")[2] for path in paths}
    like = difflib.get_close_matches(words[-1], leaves, n=3, cutoff=0.5) if words else []
    return near(pattern, [path for path in paths if path.rpartition(".")[2] in like] or paths)


def default_targets(model: nn.Module, injection: Injection) -> Targets:
    """What the injection serves in this model if the user names nothing."""
    role = injection.role_in(model)
    if role in _ANY_MODEL:
        return _ANY_MODEL[role]
    family = family_of(model)
    pattern = family.pattern(role) if family else ""
    if not pattern:
        known = ", ".join(f.name for f in FAMILIES if f.pattern(role))
        raise TargetError(
            f"attach: {type(injection).__name__} has default targets for {known}, and "
            f"{type(model).__name__} {f'is a {family.name}' if family else 'is none of them'}. "
            f"Pass targets=, a regex over module names of {injection.serves}."
        )
    if role == "convolutions":  # names such as downsample.1 are a norm's too
        return lambda path, module: is_conv(module) and re.fullmatch(pattern, path) is not None
    return pattern


# Roles that need no family.
_ANY_MODEL: dict[str, Targets] = {"biased": lambda path, module: is_biased(module)}


def matcher(targets: Targets) -> Callable[[str, nn.Module], bool]:
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise TargetError(f"attach: targets={targets!r} is not a regular expression ({error}).") from None
        return lambda path, module: pattern.fullmatch(path) is not None
    if isinstance(targets, type):
        return lambda path, module: isinstance(module, targets)
    if isinstance(targets, Sequence):
        return _any_of(targets)
    if callable(targets):
        return targets
    raise TargetError(
        f"attach: targets is a {type(targets).__name__}; it must be a regex, a module type, a list of names "
        "or types, or a function of (name, module)."
    )


def _any_of(targets: Sequence[Any]) -> Callable[[str, nn.Module], bool]:
    """A list: types, and names that match a whole path or its end, as in PEFT's ``target_modules``."""
    for target in targets:
        if not isinstance(target, str | type):
            raise TargetError(
                f"attach: targets has {target!r} in its list; it must hold names or module types."
            )
    names = [target for target in targets if isinstance(target, str)]
    types = tuple(target for target in targets if isinstance(target, type))
    whole, ends = frozenset(names), tuple(f".{name}" for name in names)
    return lambda path, module: path in whole or path.endswith(ends) or isinstance(module, types)


def check_each_matches(
    targets: Targets, modules: Sequence[tuple[str, nn.Module]], owner: str = "attach: targets"
) -> None:
    """Raise if one of a list matches no module: what it was meant for would be left out in silence.

    Raises:
        TargetError: names what matches nothing, and what is like it.
    """
    if isinstance(targets, str) or not isinstance(targets, Sequence):
        return
    for target in dict.fromkeys(targets):
        matches = _any_of([target])
        if any(path and matches(path, module) for path, module in modules):
            continue
        if isinstance(target, type):
            continue  # alternatives: all linear and convolution layers, whichever there are
        pattern = not set("*+?()[]{}|^$\\").isdisjoint(target)
        hint = " A list holds names; pass a regex as a string by itself." if pattern else ""
        known = _near_paths(target, [path for path, _ in modules if path])
        raise TargetError(f"{owner} has {target!r} in its list, which matches no module. {known}{hint}")


def _each_weight_once(sites: Sequence[Site]) -> list[Site]:
    """Tied weights (an output head that is the embedding) are served where they come first."""
    seen: set[int] = set()
    once: list[Site] = []
    for site in sites:
        weight = getattr(site.module, "weight", None)
        key = id(weight if isinstance(weight, nn.Parameter) else site.module)
        if key not in seen:
            once.append(site)
        seen.add(key)
    return once


def _types(modules: Sequence[tuple[str, nn.Module]]) -> str:
    names = sorted({type(module).__name__ for path, module in modules if path})
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")


def check_servable(site: Site, model: nn.Module) -> None:
    """Raise if what is added to this module would never run, or would run by accident."""
    parent_path, _, _ = site.path.rpartition(".")
    parent = model.get_submodule(parent_path)
    if isinstance(parent, nn.MultiheadAttention):
        raise TargetError(
            f"attach: {site.path!r} is inside an nn.MultiheadAttention, which uses its weight without "
            "calling it, so nothing attached to it would act. Target the attention module, or the FFN."
        )
    if isinstance(site.module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        raise TargetError(
            f"attach: {site.path!r} is a {type(site.module).__name__}, whose members are its computation; "
            "what is added would become one of them. Target the members."
        )
