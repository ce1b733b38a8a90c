"""PERP: retrain a pruned model by its biases, norms and low-rank changes that keep the zeros.

Source: PERP, arXiv 2312.15230. What each part computes is in ``_perp_parts.py``.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from os import PathLike
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn

from optx._errors import (
    FileError,
    OptxError,
    TargetError,
    check_choice,
    check_range,
    check_whole,
    near,
    warn,
)
from optx._masks import Masks
from optx._module_paths import bare_path, paths_of
from optx.inject._computes import derived, weight_of
from optx.inject._injection import Injection, Site
from optx.inject._own_call import adds_bias
from optx.inject._part import RESERVED, Part
from optx.inject._perp_handle import PerpHandle
from optx.inject._perp_norms import is_norm
from optx.inject._perp_parts import MaskedConvLoRA, MaskedLinearLoRA, Shift, UnderMask
from optx.inject._perp_places import acts, found_bits, given_bits, has_bias, head_of, masked_parameters
from optx.inject._quantised import kind_of
from optx.inject._served import Served
from optx.inject._trained_whole import Saved
from optx.inject._weights import is_conv, is_linear, shape_of
from optx.inject.bitfit import BiasShift
from optx.inject.lora import LoRA

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class Perp(Injection):
    """Retrain a pruned model by few parameters: biases, norms, the head, and adapters that keep its zeros.

    Args:
        bias: every module's bias, LayerNorm's too.
        norm: weights and biases of norms: LayerNorm, RMSNorm, BatchNorm and GroupNorm, and what computes as
            one (transformers' classes).
        head: a plain LoRA on the output head, which is not pruned; True finds transformers' output
            embeddings, another module is named by its path. Tied to the embedding, it trains all the same and
            merges only with ``untie=True``.
        adapter: on the pruned linear modules and convolutions. ``"none"``; ``"mask"``, MaskLoRA:
            y = x (W + s M * (B A))^T; ``"scale"``, ScaleLoRA: y = x (W * (B A))^T; ``"lora"``: plain LoRA,
            which fills zeros in when it is merged, so that a merge has to be asked for (``dense=True``);
            ``"lora_prune"``: plain LoRA in training and W + s M * (B A) once merged, where the model's
            output jumps. M is 0 where the weight is pruned, and * is elementwise.
        rank: r, of A (r, in) and B (out, r).
        alpha: s = alpha / rank; ScaleLoRA has none.
        dropout: on the input of plain LoRA, while training; the forms under a mask have none.
        equal_start: ScaleLoRA as it is published: A and B start at 1 / sqrt(r) throughout, so all r
            components get one gradient and B A stays of rank 1. False: rows of A start apart, with the same
            product, 1 everywhere, and the rank is r.
        masks: as `attach`'s ``masks=``, which takes its place.

    Masks are given by ``optx.attach(model, optx.Perp(...), masks=masks)``, `optx.Masks` or bool tensors by
    parameter name, True where a weight is kept; without them what is 0 at attach counts as pruned, in weights
    of which 1 % is. They are kept as bits, an eighth of a byte a weight, with what is saved; a weight that is
    kept and happens to be 0 goes on learning. Pruned weights have to be 0: ``masks.apply_(model)``.

    What is trained is the difference to a bias, norm or weight: ``remove()`` gives the pruned model back, bit
    for bit. ``merge()`` has the zeros of the mask exactly, and in float32 and half precision the outputs of
    before, but for ``"lora"`` and ``"lora_prune"``. Factors and differences are float32 beside half-precision
    weights. By default everything in the model is served that the options name; targets, ``layers=`` and
    ``exclude=`` narrow that. ``optx.trainable_only(model, handle)`` freezes the rest. ``handle.masks`` are
    those of the modules with adapters; ``optx.export_lora(handle, path)`` writes ``"lora"`` for PEFT.

    Paper values:
        ``rank=16, alpha=32``: the authors' configuration (the defaults), without dropout and weight decay.
        ``bias=True, norm=True, adapter="mask"``: AdamW at lr 5e-4 with 10 % of warm-up and linear decay (the
            authors' sample configuration).
        ``equal_start=True``: ScaleLoRA as published.

    Limits: B A is made at every call of a module and once more in backward, an array of the weight's size for
        that time; nothing of that size is kept in between, but by ``torch.compile``, if its partition of the
        graph says so. Weights that are codes (bitsandbytes, torchao) take ``adapter="lora"`` alone. Under
        FSDP2 masks are whole on each process. What BatchNorm has counted in training stays after
        ``remove()``.

    Keywords: pruning, pruned, sparse, sparsity, retraining, MaskLoRA, ScaleLoRA, LoRA-Prune, PERP, recovery,
        BIAS, LayerNorm tuning, 2:4.

    Evidence: ``optx run prune``; ``test_perp.py``, ``test_perp_masks.py``, ``test_perp_models.py``.

    Raises:
        OptxError: an option out of range.
        TargetError: at attach, the model has no trainable parameter of what the options name, no pruned
            weight for the adapter, a weight that is not 0 where its mask is, or no head; the model is
            untouched.
        ShapeError: at attach, a mask has another shape than its weight.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.LayerNorm(16))
        >>> masks = optx.Masks.from_bool({"0.weight": model[0].weight.abs() > 0.1})
        >>> masks.apply_(model)
        >>> handle = optx.attach(model, optx.Perp(adapter="mask", rank=4, alpha=8), masks=masks)
        >>> optimizer = torch.optim.AdamW(handle.parameters(), lr=5e-4)
        >>> model = handle.merge_and_unload()
        >>> masks.verify(model)

    Source: arXiv 2312.15230, sections 3 and 4.
    """

    name: ClassVar[str] = "perp"
    role: ClassVar[str] = "weighted"
    serves: ClassVar[str] = "norms, modules with a bias, and pruned Linear, Conv1D and Conv1d/2d/3d modules"

    bias: bool = True
    norm: bool = True
    head: bool | str = False
    adapter: Literal["none", "mask", "scale", "lora", "lora_prune"] = "none"
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    equal_start: bool = False
    masks: Masks | Mapping[str, Tensor] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        for option in ("bias", "norm", "equal_start"):
            if not isinstance(getattr(self, option), bool):
                raise OptxError(f"Perp: {option} is {getattr(self, option)!r}; it must be True or False.")
        if not isinstance(self.head, bool | str) or self.head == "":  # pyright: ignore[reportUnnecessaryIsInstance]
            raise OptxError(f"Perp: head is {self.head!r}; it must be True, False or a module's path.")
        check_choice("Perp", "adapter", self.adapter, ("none", "mask", "scale", "lora", "lora_prune"))
        object.__setattr__(self, "rank", check_whole("Perp", "rank", self.rank, 1))
        check_range("Perp", "alpha", self.alpha, 0)
        check_range("Perp", "dropout", self.dropout, 0, 1)
        if self.dropout and self.adapter in ("mask", "scale"):
            raise OptxError(
                f"Perp: dropout={self.dropout} is of plain LoRA, and adapter={self.adapter!r} changes the "
                "weight itself. Leave it out."
            )
        if self.masks is not None and not isinstance(self.masks, Masks):
            given: Any = self.masks
            if not isinstance(given, Mapping):
                hint = " Of a file: optx.Masks.load(path)." if isinstance(given, str | PathLike) else ""
                raise OptxError(f"Perp: masks is a {type(given).__name__}; it must be optx.Masks.{hint}")
            object.__setattr__(self, "masks", Masks.from_bool(self.masks))
        if not (self.bias or self.norm or self.head or self.adapter != "none"):
            raise OptxError(
                "Perp: bias, norm, head and adapter are all off, so there is no trainable parameter."
            )

    def having(self, masks: Masks | Mapping[str, Tensor]) -> Self:
        """The same with these masks."""
        if self.masks is not None:
            raise OptxError("attach: masks are given twice, in Perp and as masks=. Leave one out.")
        return replace(self, masks=masks)

    @property
    def needs_weight(self) -> bool:
        """Masks are of the weight's own numbers."""
        return self.adapter in ("mask", "scale", "lora_prune")

    @property
    def trains_biases(self) -> bool:
        """What ``bias`` says."""
        return self.bias

    # ---- where ------------------------------------------------------------------------------------------

    def places(self, model: nn.Module) -> Collection[str]:
        """All that the options name and that acts when something is attached to it."""
        head = head_of(model, self.head)
        self._masked(model)
        modules = {
            path: module
            for path, module in model.named_modules()
            if path not in ("", head) and RESERVED not in path.split(".")
        }
        with warnings.catch_warnings():  # of layers that are 0 throughout: `parts` says it
            warnings.simplefilter("ignore")
            pruned = self._bits({path: m for path, m in modules.items() if is_linear(m) or is_conv(m)})
        found = [path for path, module in modules.items() if path in pruned or self._trains(module)]
        found = [path for path in found if acts(Site(path, modules[path]), model)]
        self._tell_left(found)
        if not found and not self.head:
            raise TargetError(
                f"attach: {self} leaves no trainable parameter in this {type(model).__name__}{self._why()}."
            )
        return found or [head]

    def _tell_left(self, found: Sequence[str]) -> None:
        """Warn of masks whose weights get no adapter, as those of embeddings."""
        served = {bare_path(f"{path}.weight") for path in found}
        matrices = [name for name in self.masks or () if self.masks is not None and self.masks[name].ndim > 1]
        left = [name for name in matrices if name not in served]
        if left and self.adapter != "none":
            warn(
                f"attach: Perp has no adapter for {len(left)} of the masked weights, which stay as they are: "
                f"{', '.join(map(repr, left[:3]))}{', ...' if len(left) > 3 else ''}."
            )

    def _why(self) -> str:
        asked = [what for what, on in (("bias", self.bias), ("norm", self.norm)) if on]
        return f": it has no {' and no '.join(asked)}" if asked else ""

    def _trains(self, module: nn.Module) -> bool:
        """Whether there is a bias or norm in it to train."""
        return (self.norm and is_norm(module)) or (self.bias and has_bias(module))

    # ---- what -------------------------------------------------------------------------------------------

    def _bits(self, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        """The packed masks of what has an adapter, by module."""
        if self.adapter == "none" or not modules:
            return {}
        if isinstance(self.masks, Masks):
            return given_bits(self.masks, modules)
        return found_bits(modules, f"Perp's adapter={self.adapter!r}")

    def parts(self, sites: Sequence[Site]) -> list[Part]:
        """One per site: an adapter, a norm's shift or a bias's."""
        modules = {site.path: site.module for site in sites if is_linear(site.module) or is_conv(site.module)}
        pruned = self._bits(modules)
        if self.adapter != "none" and not pruned:
            raise TargetError(
                f"attach: Perp's adapter={self.adapter!r} is for pruned weights, and masks have none of the "
                f"targets. {near(sites[0].path, map(str, self.masks or ()))}"
            )
        return [self._part(site.module, site.path, pruned.get(site.path)) for site in sites]

    def part(self, module: nn.Module, path: str) -> Part:
        """The part of one module."""
        return self.parts([Site(path, module)])[0]

    def _part(self, module: nn.Module, path: str, bits: Tensor | None) -> Part:
        if bits is not None:
            return self._adapter(module, path, bits)
        if is_norm(module) and (self.norm or self.bias):
            names = ("weight", "bias") if self.norm else ("bias",)
            names = tuple(name for name in names if isinstance(getattr(module, name, None), nn.Parameter))
            if names:
                return Shift(module, names)
        if self.bias and has_bias(module):
            return BiasShift(module) if adds_bias(module) else Shift(module, ("bias",))
        if self.head and is_linear(
            module
        ):  # nothing else is served; `companions` sees to it that it is the head
            return self._head_lora().part(module, path)
        raise self._not_served(module, path)

    def _not_served(self, module: nn.Module, path: str) -> TargetError:
        return TargetError(
            f"attach: {self} serves {self.serves}; {path!r}, a {type(module).__name__}, is not one, or its "
            "options leave it out."
        )

    def _adapter(self, module: Any, path: str, bits: Tensor) -> Part:
        shape = shape_of(module)
        self._check_weight(module, path)
        into_out = (shape[0], shape[1:].numel())
        if self.rank > min(into_out):
            raise TargetError(
                f"attach: Perp's rank={self.rank} is larger than the weight of {path!r}, {into_out}. Use at "
                f"most {min(into_out)}, or leave that module out by exclude=."
            )
        if self.adapter == "lora_prune" and getattr(module, "groups", 1) > 1:
            raise TargetError(
                f"attach: {path!r} is a convolution with groups={module.groups}, into whose weight LoRA "
                "does not merge, and 'lora_prune' is LoRA. Use adapter='mask', or leave it out by exclude=."
            )
        biased = self.bias and isinstance(module.bias, nn.Parameter)
        if self.adapter in ("lora", "lora_prune"):
            kind = MaskedConvLoRA if is_conv(module) else MaskedLinearLoRA
            made = kind(self._lora(biased), module, path, bits, self.adapter == "lora_prune")
        else:
            scaled = self.adapter == "scale"
            made = UnderMask(module, path, self.rank, None if scaled else self.alpha / self.rank, bits)
            made.start_at_one(equal=self.equal_start) if scaled else made.start_at_zero()
            if biased:
                made.train_bias(module)
        made.check_base(weight_of(module, path), "attach", path, TargetError)
        return made

    def _check_weight(self, module: nn.Module, path: str) -> None:
        """Raise if the weight is none whose zeros can be kept."""
        if self.adapter != "lora" and (kind := kind_of(module)):
            raise TargetError(
                f"attach: the weight of {path!r} is {kind}, and a merge would round zeros to codes again. "
                f"For adapter={self.adapter!r} take the model as it was before, or use adapter='lora'."
            )
        if by := derived(module):
            raise TargetError(
                f"attach: the weight of {path!r} is made by {by} at every call, so it has no zeros of its "
                "own. Make it a parameter first (as torch.nn.utils.prune.remove does)."
            )

    def _lora(self, biased: bool) -> LoRA:
        bias = "lora_only" if biased else "none"
        return LoRA(rank=self.rank, alpha=self.alpha, dropout=self.dropout, bias=bias)

    def _masked(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The model's parameters that have a mask; raises if one is of another model."""
        return masked_parameters(self.masks, model) if isinstance(self.masks, Masks) else {}

    def companions(self, model: nn.Module, sites: Sequence[Site]) -> list[tuple[Injection, list[Site]]]:
        """The head's LoRA; and whether masks are this model's."""
        masked = self._masked(model)
        for site in sites:
            for name, p in site.module.named_parameters(recurse=False):
                if any(p is one for one in masked.values()) and (name == "bias" or is_norm(site.module)):
                    raise TargetError(
                        f"attach: masks have '{site.path}.{name}', a bias or norm, which Perp trains without "
                        "one. Pass masks of matrices alone, or leave that module out by exclude=."
                    )
        path = head_of(model, self.head)
        if not path:
            return []
        module = model.get_submodule(path)
        linear = {site.path: site.module for site in sites if is_linear(site.module)}
        others = {at: m for at, m in linear.items() if at not in self._bits(linear) and not self._trains(m)}
        for at, other in others.items():
            if at != path:
                raise self._not_served(other, at)
        if any(site.path == path for site in sites) and path not in others:
            raise TargetError(f"attach: Perp's head {path!r} is a target too. Leave it out of targets.")
        if any(module.weight is one for one in masked.values()):
            raise TargetError(
                f"attach: Perp's head {path!r} is pruned, and a LoRA would fill it in. Leave head= out: with "
                "an adapter it is served as the other pruned modules are."
            )
        return [] if any(site.path == path for site in sites) else [(self._head_lora(), [Site(path, module)])]

    def _head_lora(self) -> LoRA:
        return replace(self._lora(self.bias), dropout=0.0)

    # ---- handle and files -------------------------------------------------------------------------------

    def handle(
        self, model: nn.Module, injection: Any, served: Sequence[Served], saved: Sequence[Saved]
    ) -> PerpHandle:
        """What `optx.attach` returns."""
        return PerpHandle(model, injection, served, saved)

    def options(self) -> dict[str, Any]:
        """Without masks, which are among the tensors of a file."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name != "masks"}

    def as_stored(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> Self:
        """With the masks that a file's tensors have."""
        end = f".{self.name}.mask"
        here = paths_of(model)
        bits = {f"{key.removesuffix(end)}.weight": t for key, t in tensors.items() if key.endswith(end)}
        if not bits:
            return self
        modules = {name: here.modules.get(name.removesuffix(".weight")) for name in bits}
        shapes = {name: shape_of(module) for name, module in modules.items() if module is not None}
        try:
            return replace(self, masks=Masks(bits, shapes))
        except OptxError as error:
            raise FileError(f"load: the masks of the file are of another model ({error})") from None
