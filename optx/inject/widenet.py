"""WideNet: all blocks share attention and one mixture of experts, and keep norms of their own.

Source: Go Wider Instead of Deeper, arXiv 2107.11817; official code (TensorFlow) for the constants. The
mixture is in ``_mixture.py``, what is shared in ``_shared_modules.py``, the handle in ``_wide_handle.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from optx._errors import OptxError, TargetError, check_choice, check_range, check_whole
from optx.inject._anatomy import stacks_of
from optx.inject._expert_copies import check_copyable, copies, draw_anew
from optx.inject._injection import Injection, Site
from optx.inject._mixture import Mixture, Routing
from optx.inject._own_loss import Collected
from optx.inject._part import Part
from optx.inject._served import Served
from optx.inject._shared_modules import (
    attributes,
    check_owned,
    check_shared,
    shareable,
    shared_copy,
)
from optx.inject._trained_whole import Saved
from optx.inject._weights import features, is_linear
from optx.inject._wide_handle import Depth, WideHandle


@dataclass(frozen=True)
class WideNet(Injection):
    """Wider instead of deeper: blocks share one attention and one mixture of experts, norms stay their own.

    A block computes what it did, with modules that are the same objects in all blocks; its FFN is a mixture
    of E experts, of which a token has the K with the highest probabilities p = softmax(W_r u), and
    gets sum p_e FFN_e(u). Those of the K are not made to sum to 1. Norms of their own let each depth route
    its tokens otherwise.

    Args:
        experts: E.
        top_k: K.
        capacity: an expert takes int(capacity K M / E) of a call's M tokens at most (at least one), in their
            order, in training; who comes later gets nothing of it. None: all.
        balance: weight of the balance loss E sum_e f_e P_e of each block's call, with f_e the share of
            choices that e had and P_e its mean probability; ``handle.loss()`` has the sum over blocks. 0:
            none.
        share: paths in a block of what is shared beside the FFN. None: the outermost modules that have
            parameters and no norm in them.
        ffn: path in a block of its FFN, one module; None: as in the families that optx knows.
        keep: paths in a block of what stays its own beside norms, where ``share`` is None.
        norms: ``"individual"``, or ``"shared"`` as well (for a comparison).
        init: of what is shared: the ``"first"`` block's, the ``"mean"`` of all, or drawn ``"fresh"``, each
            expert by itself (from scratch).
        jitter: an expert's difference from the others at first, of each matrix's standard deviation; not for
            ``"fresh"``.
        noise: standard deviation of what is added to W_r u in training. None: 1 / E.
        eval_capacity: as ``capacity``, in evaluation mode; None: no token is dropped, so that a sample's
            output doesn't depend on the batch.

    Serves two or more blocks that are alike; by default all layers of a stack, where a model has one stack.

    It changes the model by exchanging modules: keys of what is shared come once for each block, the FFN's are
    ``router`` and ``experts``, and ``handle.model_state_dict()`` has each tensor once (for safetensors); the
    model loads either. ``optx.wrap(optimizer, handle)`` takes the shared parameters in, in the place of all
    that they stand for. No dense FFN is equal, so ``merge()`` raises and ``merge_and_unload(lossy=True)``
    says what it is. ``remove()`` gives each block its own modules back, which wait in memory until then. The
    handle is a `WideHandle`.

    Paper values:
        ``experts=4, top_k=2, capacity=1.2, balance=0.01``: ViT on ImageNet (the defaults), 300 epochs of LAMB
            at 0.01 with decay 0.1 and batches of 4096; experts a third wider than the dense FFN.

    Limits: The official code has GELU behind both linear modules, and a queue shorter by one; here an expert
        is the model's own FFN, and a queue as long as the paper's. Router and probabilities are in float32.
        Counting a queue waits for the device once a block, and ``torch.compile`` breaks the graph there. The
        FFN must be one module that takes one tensor (not the two of BERT or nn.TransformerEncoderLayer).
        Shard the model as a whole (FSDP2), not block by block: a shared module is in all of them. A model of
        before is loaded before attach.

    Keywords: mixture of experts, MoE, parameter sharing, ALBERT, weight tying, top-k routing, load balance,
        vision transformers, ViT.

    Evidence: ``optx run experts``; ``test_widenet.py``, ``test_widenet_models.py``.

    Raises:
        OptxError: an option out of range.
        TargetError: at attach, one block, blocks that differ, or what is tied or attached already.

    Example:
        >>> import torch, optx
        >>> class Block(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.norm, self.mix = torch.nn.LayerNorm(8), torch.nn.Linear(8, 8)
        ...         up, down = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)
        ...         self.mlp = torch.nn.Sequential(up, torch.nn.ReLU(), down)
        ...     def forward(self, x):
        ...         x = x + self.mix(self.norm(x))
        ...         return x + self.mlp(self.norm(x))
        >>> model = torch.nn.Sequential(*(Block() for _ in range(3)))
        >>> handle = optx.attach(model, optx.WideNet(experts=4, ffn="mlp"), targets=Block)
        >>> model[0].mlp is model[2].mlp, model[0].norm is model[2].norm
        (True, False)
        >>> loss = model(torch.randn(2, 5, 8)).square().mean() + handle.loss()
        >>> loss.backward()
        >>> [tuple(load.shape) for load in handle.loads().values()]
        [(4,), (4,), (4,)]

    Source: arXiv 2107.11817; XueFuzhao/WideNet_Code for the constants.
    """

    name: ClassVar[str] = "widenet"
    role: ClassVar[str] = "block"
    serves: ClassVar[str] = "the blocks of a stack"

    experts: int = 4
    top_k: int = 2
    capacity: float | None = 1.2
    balance: float = 0.01
    share: tuple[str, ...] | None = None
    ffn: str | None = None
    keep: tuple[str, ...] = ()
    norms: Literal["individual", "shared"] = "individual"
    init: Literal["first", "mean", "fresh"] = "first"
    jitter: float = 0.01
    noise: float | None = None
    eval_capacity: float | None = None

    def __post_init__(self) -> None:
        check_whole("WideNet", "experts", self.experts, 1, wanted="a whole number of at least 1")
        check_whole("WideNet", "top_k", self.top_k, 1, wanted="a whole number of at least 1")
        check_choice("WideNet", "norms", self.norms, ("individual", "shared"))
        check_choice("WideNet", "init", self.init, ("first", "mean", "fresh"))
        for name in ("balance", "jitter"):
            check_range("WideNet", name, getattr(self, name), 0, 1e6)
        if self.noise is not None:
            check_range("WideNet", "noise", self.noise, 0, 1e6)
        if self.top_k > self.experts:
            raise OptxError(
                f"WideNet: top_k is {self.top_k}, and there are {self.experts} experts; a token has all of "
                "them at most."
            )
        for name in ("capacity", "eval_capacity"):
            value = getattr(self, name)
            if value is not None:
                check_range("WideNet", name, value, 0, 1e6)
                if value == 0:
                    raise OptxError(
                        f"WideNet: {name} is 0, so no expert would take a token. None: any number."
                    )
        if self.share is not None and self.keep:
            raise OptxError(
                f"WideNet: keep={self.keep!r} is for share=None, where all but that is shared. Leave one out."
            )

    # ---- where ------------------------------------------------------------------------------------------

    def part(self, module: nn.Module, path: str) -> Part:
        """Not of one block."""
        return self.parts([Site(path, module)])[0]

    def parts(self, sites: Sequence[Site]) -> list[Part]:
        """One per block; they share what they share."""
        if len(sites) < 2:
            raise TargetError(
                f"attach: WideNet found one block, {sites[0].path!r}, which has nobody to share with. Pass "
                "targets= of two blocks or more (a model whose layers are one module shares them already)."
            )
        ffn = self._ffn(sites)
        keep, norms = self.keep, self.norms == "shared"
        paths = list(self.share) if self.share is not None else shareable(sites[0].module, ffn, keep, norms)
        paths = [path for path in paths if path != ffn]
        check_shared(sites, [*paths, ffn])
        check_copyable("WideNet", sites[0].module.get_submodule(ffn), f"{sites[0].path}.{ffn}")
        return self._made(sites, paths, ffn)

    def _made(self, sites: Sequence[Site], paths: Sequence[str], ffn: str) -> list[Part]:
        originals = [{path: site.module.get_submodule(path) for path in (*paths, ffn)} for site in sites]
        each: dict[str, list[Any]] = {}
        shared: dict[str, nn.Module] = {}
        for path in paths:
            modules = [one[path] for one in originals]
            shared[path] = shared_copy(modules, self.init, f"{sites[0].path}.{path}")
            each[path] = attributes(modules)
        collected = Collected("WideNet", alone=False)
        modules = [one[ffn] for one in originals]
        self._check_alike(sites, ffn, attributes(modules))
        shared[ffn] = self._mixture(modules, f"{sites[0].path}.{ffn}", collected)
        return [
            Depth(
                site.path,
                collected,
                shared,
                originals[i],
                {path: values[i] for path, values in each.items() if values[i]},
                i == 0,
                originals,
            )
            for i, site in enumerate(sites)
        ]

    def _check_alike(self, sites: Sequence[Site], ffn: str, found: Sequence[Mapping[str, Any]]) -> None:
        for path, names in found[0].items():
            where = f"{ffn}.{path}".removesuffix(".")
            raise TargetError(
                f"attach: WideNet makes one mixture of all blocks' {ffn!r}, and {where!r} has "
                f"{', '.join(sorted(names))} of its own in each of {len(sites)} blocks. Set them alike."
            )

    def _mixture(self, modules: Sequence[nn.Module], path: str, collected: Collected) -> Mixture:
        experts = copies(shared_copy(modules, self.init, path), self.experts)
        for expert in experts:
            if self.init == "fresh":
                draw_anew("WideNet", expert, path)
            elif self.jitter:
                _shake(expert, self.jitter)
        like = next(p for p in experts.parameters() if p.is_floating_point())
        half = like.dtype.itemsize < 4
        router = nn.Linear(_width(modules[0], path), self.experts, bias=False, device=like.device)
        router.to(torch.float32 if half else like.dtype)
        nn.init.normal_(router.weight, std=0.02)
        noise = 1 / self.experts if self.noise is None else self.noise
        routing = Routing(self.top_k, self.capacity, self.eval_capacity, noise, self.balance > 0)
        return Mixture(experts, router, routing, collected)

    def _ffn(self, sites: Sequence[Site]) -> str:
        """The path of the FFN in a block."""
        if self.ffn is not None:
            return self.ffn
        modules = {
            f"{site.path}.{path}".removesuffix("."): one
            for site in sites
            for path, one in site.module.named_modules()
        }
        for stack in stacks_of(modules):
            inner = stack.blocks.get(sites[0].path, {})
            found = [path for path in inner if path and re.fullmatch(stack.family.ffn, path)]
            if len(found) == 1 and stack.family.ffn == stack.family.whole_ffn:
                return found[0]
        has = ", ".join(name for name, _ in sites[0].module.named_children())
        raise TargetError(
            f"attach: WideNet does not know which module of {sites[0].path!r} is its FFN; it has {has}. Pass "
            "WideNet(ffn=...), the path in the block of one module that takes and returns one tensor."
        )

    def companions(self, model: nn.Module, sites: Sequence[Site]) -> list[tuple[Injection, list[Site]]]:
        """None; but ties with the rest of the model are seen here."""
        ffn = self._ffn(sites)
        norms = self.norms == "shared"
        paths = self.share if self.share is not None else shareable(sites[0].module, ffn, self.keep, norms)
        check_owned(model, sites, [*dict.fromkeys((*paths, ffn))])
        return []

    # ---- handle -----------------------------------------------------------------------------------------

    def metrics(self, handle: WideHandle) -> dict[str, float | Tensor]:
        """The loss, and what found a full queue."""
        return handle.numbers()

    def handle(
        self, model: nn.Module, injection: Any, served: Sequence[Served], saved: Sequence[Saved]
    ) -> WideHandle:
        """What `optx.attach` returns."""
        return WideHandle(model, injection, served, saved)


def _shake(expert: nn.Module, share: float) -> None:
    with torch.no_grad():
        for p in expert.parameters():
            if p.ndim > 1:
                p.add_(torch.randn_like(p) * (share * p.float().std().nan_to_num()).to(p.dtype))


def _width(ffn: nn.Module, path: str) -> int:
    """Of the tokens that an FFN takes."""
    for _, module in ffn.named_modules():
        if is_linear(module):
            return features(module)[0]
    raise TargetError(
        f"attach: {path!r} is a {type(ffn).__name__} without a linear module, so WideNet can't tell the "
        "width of its tokens."
    )
