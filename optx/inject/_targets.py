"""Which modules an injection serves: what the user names, or what its paper serves in a known family."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from optx._errors import TargetError, near
from optx.inject._injection import Injection, Site, Targets
from optx.inject._part import RESERVED, Attached
from optx.inject._weights import is_biased


@dataclass(frozen=True)
class Family:
    """Where the parts of one kind of model are, as regexes over module paths.

    Attributes:
        name: for messages.
        block: one layer of the stack. The other patterns follow it after a dot.
        query_value: projections that LoRA's paper adapts.
        key_value: projections whose outputs IA3 scales, and
        ffn_out: the module whose input it scales in the FFN.
        attention: the module that calls scaled_dot_product_attention.
        ffn: the FFN sub-layer as one module, or the module that adds its output to the residual.
        attention_out: the last linear module of attention.
        linears: every linear module of a block.
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

    def pattern(self, role: str) -> str:
        """The regex of a role's modules, empty if the family has none."""
        if role == "block":
            return self.block
        names = [getattr(self, part) for part in _ROLES[role]]
        if not all(names):
            return ""
        return rf"{self.block}\.({'|'.join(names)})"


# What each injection serves by default, in terms of a family's parts.
_ROLES: dict[str, tuple[str, ...]] = {
    "query_value": ("query_value",),
    "ia3": ("key_value", "ffn_out"),
    "attention": ("attention",),
    "ffn": ("ffn",),
    "ffn_out": ("ffn_out",),
    "attention_out": ("attention_out",),
    "sublayers": ("attention_out", "ffn_out"),
    "linears": ("linears",),
    "convolutions": ("convolutions",),
    "block": (),
}

# The first family whose blocks and query projections are found is the model's.
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
        query_value=r"attention\.self\.(?:query|value)",
        key_value=r"attention\.self\.(?:key|value)",
        ffn_out=r"output\.dense",
        attention=r"attention\.self",
        ffn=r"output",  # LayerNorm(dense(h) + u): it gets the FFN's input u as its second argument
        attention_out=r"attention\.output\.dense",
        linears=r"attention\.self\.(?:query|key|value)|(?:attention\.output|intermediate|output)\.dense",
    ),
    Family(
        "GPT-2",
        block=r"(?:.*\.)?h\.\d+",
        query_value=r"attn\.c_attn",
        key_value=r"attn\.c_attn",
        ffn_out=r"mlp\.c_proj",
        attention=r"attn",
        ffn=r"mlp",
        attention_out=r"attn\.c_proj",
        linears=r"(?:attn|mlp)\.c_\w+",
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
        "ResNet",
        block=r"(?:.*\.)?layer\d+\.\d+",
        convolutions=r"conv\d+|downsample\.0",
    ),
)


def family_of(model: nn.Module) -> Family | None:
    """The known family a model belongs to, by the names of its modules."""
    paths = [path for path, _ in model.named_modules()]
    for family in FAMILIES:
        sign = family.pattern("query_value") or family.pattern("convolutions")
        if any(re.fullmatch(sign, path) for path in paths):
            return family
    return None


def resolve(model: nn.Module, injection: Injection, targets: Targets | None) -> list[Site]:
    """The modules to serve, in the model's order, each once and each weight once.

    Raises:
        TargetError: nothing matches (names near misses), or there are no defaults for this model.
    """
    modules = [
        (path, module)
        for path, module in model.named_modules()
        if not isinstance(module, Attached) and RESERVED not in path.split(".")
    ]
    chosen = default_targets(model, injection) if targets is None else targets
    matches = matcher(chosen)
    sites = [Site(path, module) for path, module in modules if path and matches(path, module)]
    if not sites:
        what = chosen if isinstance(chosen, str) else f"targets={chosen!r}"
        raise TargetError(
            f"attach: no module matches {what!r}. {near(str(chosen), [path for path, _ in modules if path])}"
            if isinstance(chosen, str)
            else f"attach: no module matches {what}. The model has {_types(modules)}."
        )
    return _each_weight_once(sites)


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
