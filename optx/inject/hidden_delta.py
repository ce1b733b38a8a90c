"""The unified view: adapter-like methods as choices of where and how a hidden vector is changed.

Source: Towards a Unified View of Parameter-Efficient Transfer Learning, arXiv 2110.04366, section 3, table 1.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, get_args

from torch import nn

from optx._errors import OptxError, TargetError, check_choice, check_range
from optx.inject._attention import heads_of, kernel_of
from optx.inject._bottleneck import adapter_part
from optx.inject._heads import HeadAdapter, Prefix
from optx.inject._hidden_delta_options import Compose, Form, HiddenDeltaOptions, Insertion, Modifies
from optx.inject._injection import Injection, Site, values_of
from optx.inject._part import Part

# Where a hidden vector comes out of a module, and, in parallel, its x goes in; roles of `_targets.py`.
_ROLES = {
    ("ffn", "parallel"): "ffn",
    ("ffn", "sequential"): "ffn_out",
    ("attention", "parallel"): "attention",
    ("attention", "sequential"): "attention_out",
    ("both", "parallel"): "branches",
    ("both", "sequential"): "sublayers",
    ("projections", "parallel"): "query_value",
    ("projections", "sequential"): "query_value",
    ("heads", "parallel"): "attention",
}


@dataclass(frozen=True)
class HiddenDelta(HiddenDeltaOptions, Injection):
    """Change hidden vectors by Δ = f(x W_down) W_up: any point of the unified view's design space.

    Four choices make a method. `optx.LoRA` is the one row that has code of its own, for PEFT's options; the
    other classes are choices of these, and this class serves for what has no name:

    | method                   | form    | modifies    | insertion  | compose |
    |--------------------------|---------|-------------|------------|---------|
    | PrefixTuning             | softmax | heads       | parallel   | gated   |
    | SequentialAdapter        | relu    | both or ffn | sequential | add     |
    | LoRA                     | linear  | projections | parallel   | scaled  |
    | ParallelAdapter          | relu    | ffn         | parallel   | add     |
    | MultiHeadParallelAdapter | relu    | heads       | parallel   | add     |
    | ScaledParallelAdapter    | relu    | ffn         | parallel   | scaled  |

    Args:
        form: f: ``"relu"``, ``"gelu"``, ``"silu"``, ``"tanh"``, ``"linear"`` or, at the heads, ``"softmax"``.
        modifies: h: the output of the ``"ffn"`` or ``"attention"`` sub-layer, of ``"both"``, of the query and
            value ``"projections"``, or of each of attention's ``"heads"``. It decides which modules are
            served by default; ``"heads"`` also how.
        insertion: x is the input of what computes h (``"parallel"``), or h (``"sequential"``).
        compose: ``"add"`` h + Δ, ``"scaled"`` h + scale Δ, or ``"gated"`` (1 - λ) h + λ Δ with λ(x) the share
            of Δ's softmax in the sum of both.
        rank: r, the columns of W_down: bottleneck, or prefix length.
        scale: s, a number, or ``"learned"``: a parameter that starts at 1.
        bias: biases behind W_down and W_up; there are none at the heads.
        norm: a LayerNorm of x (``"in"``) or of Δ before the scale (``"out"``).
        dropout: of f(x W_down), while training.
        init: ``"lora"``: W_down uniform in ±1/sqrt(in), W_up and biases zero, so that no output changes
            (unless gated); ``"bert"``: both normal with deviation ``std``, biases zero.
        std: see ``init``.
        mlp: width of an MLP that makes a gated Δ's W_down and W_up; see `optx.PrefixTuning`.
        kv_heads: heads of keys and values, if an attention module does not say.
        head_dim: their width, likewise.
        method: what errors call it.

    Paper values:
        ``form="relu", modifies="ffn", compose="scaled", rank=512, scale=4.0``: the paper's best single
            choice, BART-large on XSum (authors' script). The rows of the table have theirs in their own
            classes.

    Limits: Only ``form="linear"`` on one Linear can be merged; ``"gated"`` is for attention heads.

    Keywords: PEFT, adapters, unified view, parameter-efficient fine-tuning.

    Evidence: ``test_adapters.py``, ``test_prefix.py``; no recipe of its own.

    Raises:
        OptxError: an option out of range, or choices that don't go together.
        TargetError: at attach, a module that has no such hidden vector.

    Example:
        >>> import torch, optx
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 8))
        >>> delta = optx.HiddenDelta(form="gelu", compose="scaled", scale="learned", rank=4)
        >>> handle = optx.attach(mlp, delta, targets="2")
        >>> [tuple(p.shape) for p in handle.parameters()]
        [(4, 32), (8, 4), (4,), (8,), ()]

    Source: arXiv 2110.04366, section 3, table 1.
    """

    name: ClassVar[str] = "hidden_delta"
    role: ClassVar[str] = "ffn"
    serves: ClassVar[str] = (
        "Linear modules, sub-layers with Linear modules in them, and attention modules that call "
        "scaled_dot_product_attention"
    )

    def __post_init__(self) -> None:
        given = values_of(self)
        for option, allowed in _CHOICES.items():
            check_choice(self.method, option, given[option], allowed)
        check_range(self.method, "rank", self.rank, 1)
        check_range(self.method, "dropout", self.dropout, 0, 1)
        check_range(self.method, "std", self.std, 0)
        for option in ("mlp", "kv_heads", "head_dim"):
            if given[option] is not None:
                check_range(self.method, option, given[option], 1)
        if self.scale != "learned":
            check_range(self.method, "scale", self.scale, float("-inf"))
        for wrong, why in self._contradictions():
            if wrong:
                raise OptxError(f"{self.method}: {why}.")

    def _contradictions(self) -> list[tuple[bool, str]]:
        heads, gated = self.modifies == "heads", self.compose == "gated"
        return [
            (
                heads and self.insertion == "sequential",
                "modifies='heads' and insertion='sequential' don't go together: a head's change is computed "
                "from the query, which is its input; use insertion='parallel'",
            ),
            (
                self.form == "softmax" and not heads,
                f"form='softmax' and modifies={self.modifies!r} don't go together: the softmax is over "
                "products with a head's query; use modifies='heads'",
            ),
            (
                gated and self.form != "softmax",
                f"compose='gated' and form={self.form!r} don't go together: the gate is a share of a "
                "softmax's sum; use form='softmax'",
            ),
            (
                self.compose != "scaled" and self.scale != 1,
                f"scale={self.scale!r} has no place in compose={self.compose!r}; use compose='scaled'",
            ),
            (heads and self.norm != "none", f"norm={self.norm!r} has no place at the heads; use norm='none'"),
            (
                gated and self.dropout > 0,
                f"dropout={self.dropout!r} has no place in compose='gated': attention's own acts there",
            ),
            (
                not heads and not (self.kv_heads is None and self.head_dim is None),
                "kv_heads and head_dim have no place but at the heads; use modifies='heads'",
            ),
            (
                self.mlp is not None and not gated,
                f"mlp={self.mlp!r} makes keys and values of a prefix; use it with compose='gated'",
            ),
        ]

    def role_in(self, model: nn.Module) -> str:
        """Where this hidden vector is computed."""
        if self.modifies == "heads" and getattr(model, "_supports_sdpa", True) is False:
            raise TargetError(
                f"attach: {self.method} acts in torch's scaled_dot_product_attention, and transformers' "
                f"{type(model).__name__} computes attention in a way of its own. Attach an injection that "
                "acts on linear modules, or pass targets= if its code calls it nevertheless."
            )
        return _ROLES[self.modifies, self.insertion]

    def part(self, module: nn.Module, path: str) -> Part:
        """One module's change."""
        if self.modifies == "heads":
            return self._head_part(module, path)
        made = adapter_part(self, module)
        if isinstance(made, str):
            raise TargetError(
                f"attach: {self.method} serves Linear modules and sub-layers with Linear modules in them; "
                f"{path!r} is {made}."
            )
        return made

    def _head_part(self, module: nn.Module, path: str) -> Part:
        kind = type(module).__name__
        key, value = (getattr(module, name, None) for name in ("qk_head_dim", "v_head_dim"))
        if key != value:  # DeepSeek's
            raise TargetError(
                f"attach: {self.method} has keys and values of one width, and those of {path!r}, a {kind}, "
                f"are {key} and {value} wide. Attach an injection that acts on linear modules, as optx.LoRA."
            )
        heads = heads_of(module, self.kv_heads, self.head_dim or key)
        if isinstance(heads, str):
            raise TargetError(
                f"attach: {self.method} serves attention modules, which know their heads; {path!r} is a "
                f"{kind} and {heads}. Target attention modules, or pass kv_heads= and head_dim=."
            )
        if kernel := kernel_of(module):
            raise TargetError(
                f"attach: {self.method} acts in torch's scaled_dot_product_attention, and {path!r} has "
                f"{kernel}. Load the model with attn_implementation='sdpa'."
            )
        return (Prefix if self.compose == "gated" else HeadAdapter)(self, module, path, heads)

    def parts(self, sites: Sequence[Site]) -> list[Part]:
        """One per site; at the heads, none inside another, which would then act twice."""
        made = super().parts(sites)
        paths = [site.path for site in sites] if self.modifies == "heads" else []
        for outer in paths:
            inner = next((path for path in paths if path.startswith(f"{outer}.")), None)
            if inner is not None:
                raise TargetError(
                    f"attach: {inner!r} is inside {outer!r}, and {self.method} would act twice on its "
                    "attention. Target one of them."
                )
        return made


_CHOICES: dict[str, tuple[Any, ...]] = {
    "form": get_args(Form),
    "modifies": get_args(Modifies),
    "insertion": get_args(Insertion),
    "compose": get_args(Compose),
    "norm": ("none", "in", "out"),
    "init": ("lora", "bert"),
}


@dataclass(frozen=True)
class Choice(Injection):
    """A named method of the unified view: options of its own, and what they choose."""

    role: ClassVar[str] = ""

    @abstractmethod
    def delta(self) -> HiddenDelta:
        """The choices."""

    def choose(self, **choices: Any) -> HiddenDelta:
        """These, and this method's own options of the same names."""
        known = {field.name for field in fields(HiddenDelta)}
        own = {name: value for name, value in values_of(self).items() if name in known}
        return HiddenDelta(**(own | choices), method=type(self).__name__)

    def __post_init__(self) -> None:
        self.delta()  # which checks them

    def part(self, module: nn.Module, path: str) -> Part:
        """One module's change."""
        return self.delta().part(module, path)

    def parts(self, sites: Sequence[Site]) -> list[Part]:
        """One per site."""
        return self.delta().parts(sites)

    def role_in(self, model: nn.Module) -> str:
        """Where the chosen hidden vector is computed."""
        return self.delta().role_in(model)
