"""FTWT: dynamic filter pruning, by predictors that learn from what the filters gave.

Source: Fire Together Wire Together, arXiv 2110.08232. Chains are found in ``_conv_chains.py``, a layer's call
is in ``_ftwt_layer.py``, its target in ``_ftwt_targets.py``.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from optx._errors import OptxError, TargetError, check_choice, check_range, check_whole
from optx.inject._conv_chains import Chain, chains_of
from optx.inject._filter_pruning import FilterPruning
from optx.inject._ftwt_parts import Ends, Predictor, Wholes
from optx.inject._ftwt_targets import mass_target, uniform_target
from optx.inject._injection import Injection, Site
from optx.inject._own_loss import Collected
from optx.inject._part import Part
from optx.inject._served import Served
from optx.inject._trained_whole import Saved


@dataclass(frozen=True)
class FTWT(Injection):
    """Dynamic filter pruning: a convolution computes only the filters that a predictor picks for a sample.

    Before a convolution z = W softmax(mean of x over positions) + b; filter c is kept where z_c > 0, and
    behind batch norm the others' channels are 0. Predictors learn, by ``handle.loss()``, to tell which
    filters had most of the activations' mass, sample by sample; the task's loss doesn't reach them, nor
    theirs the model.

    Args:
        r: of criterion ``"mass"``: the share of a sample's mass, the sum over filters of max |y_c|, that the
            strongest filters have together. 1: all but dead ones.
        criterion: ``"mass"``, or ``"uniform"``: all but the ``ratio`` lowest of every layer, and dead ones.
        ratio: of criterion ``"uniform"``.
        mode: ``"decoupled"``: predictors don't teach the model; ``"joint"``: their loss reaches it by their
            inputs.
        crossing: what becomes of the filter with which the mass gets past r: ``"drop"`` it, as the official
            code does, or ``"keep"`` it. With ``"drop"`` a sample in which one filter has more than r keeps
            none at all (which is warned of).
        embedding: numbers that a predictor sees, about: it pools to dim x dim positions with dim the root of
            embedding / C_in, rounded. -1: one number per channel.
        inference: in evaluation mode filters that are not kept are skipped (``"gather"``), sample by sample;
            or computed and masked (``"mask"``); ``"auto"``: skipped in batches of one.
        shape: of a batch, as (1, 3, 64, 64), for a model that torch.fx can't trace and that takes no images
            of 64, 224 or 32 positions: it is called with zeros at attach.

    Serves nn.Conv2d. By default every chain of a convolution, batch norm (if there is one) and activation
    that the model computes, found by torch.fx, or else by one call with zeros; not shortcuts,
    squeeze-and-excite and classifiers, which ``targets=`` may name. What is not served is in
    ``handle.report()``. In a residual block it is the branch that is masked, before the addition, and its
    target is taken there.

    The handle is a `FilterPruning`: ``loss()``, ``freeze()``, ``flops()``, ``agreement()``, ``masks()``,
    ``force("all" | "random")``, ``param_groups()`` and ``base_parameters()``. At first all filters are kept:
    the model computes what it did, to the bit. Start from a trained one.

    Paper values:
        ``r=0.8`` to ``1.0``: CIFAR-10, 200 epochs of SGD with 0.01 for the model, and 0.1 without decay and
            without a schedule for predictors (``handle.param_groups()``).
        ``r=0.91`` to ``0.97``: ImageNet. ``handle.freeze()`` after half of the epochs in both.

    Limits: Predictors see numbers of about 1 / C_in, so that their weights learn slowly: at the paper's rate
        a run of a few hundred steps has the same filters for all samples (and none where fewer than half of
        the samples want each); there a rate of 5 to 20 is better. It skips work in evaluation mode alone;
        training computes every filter. Gathered, a convolution with groups that is not depthwise, one with a
        forward of its own and one that has another injection are computed whole and masked; and a hook on a
        convolution sees what is normed already. Modules that a forward calls twice, and convolutions followed
        by a norm that mixes channels or an activation that is not 0 at 0, are not served. The official code
        counts groups by a division without rest, so that depthwise layers cost it nothing; here every kept
        pair counts.

    Keywords: dynamic pruning, channel gating, conditional computation, filter pruning, skip, FLOPs, sparse
        inference, self-supervised masks.

    Evidence: ``optx run skip``; ``test_ftwt.py``, ``test_ftwt_chains.py``, ``test_ftwt_inference.py``.

    Raises:
        OptxError: an option out of range; at attach, a model that can't be traced.
        TargetError: at attach, nothing can be served, or a target can't.

    Example:
        >>> import torch, optx
        >>> from torch import nn
        >>> conv = lambda a, b: (nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU())
        >>> model = nn.Sequential(*conv(3, 8), *conv(8, 8), nn.Flatten(), nn.Linear(8 * 36, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        >>> handle = optx.attach(model, optx.FTWT(r=0.95))
        >>> for group in handle.param_groups():
        ...     optimizer.add_param_group(group)
        >>> x = torch.randn(4, 3, 6, 6)
        >>> (model(x).square().mean() + handle.loss()).backward()
        >>> optimizer.step()
        >>> _ = model.eval()(x)
        >>> handle.flops().total
        28512

    Source: arXiv 2110.08232, sections 3.1 to 3.3; official code for the criteria's constants.
    """

    name: ClassVar[str] = "ftwt"
    role: ClassVar[str] = "convolutions"
    serves: ClassVar[str] = "Conv2d modules"

    r: float = 0.95
    criterion: Literal["mass", "uniform"] = "mass"
    ratio: float = 0.5
    mode: Literal["decoupled", "joint"] = "decoupled"
    crossing: Literal["drop", "keep"] = "drop"
    embedding: int = -1
    inference: Literal["auto", "gather", "mask"] = "auto"
    shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_choice("FTWT", "criterion", self.criterion, ("mass", "uniform"))
        check_choice("FTWT", "mode", self.mode, ("decoupled", "joint"))
        check_choice("FTWT", "crossing", self.crossing, ("drop", "keep"))
        check_choice("FTWT", "inference", self.inference, ("auto", "gather", "mask"))
        check_range("FTWT", "r", self.r, 1e-6, 1)
        check_range("FTWT", "ratio", self.ratio, 0, 1)
        check_whole("FTWT", "embedding", self.embedding, -1)
        if self.ratio == 1:
            raise OptxError("FTWT: ratio is 1, which leaves no filter; it must be below 1.")

    def target(self, scores: Tensor) -> Tensor:
        """(B, C) bool from a layer's scores, (B, C)."""
        if self.criterion == "uniform":
            return uniform_target(scores, self.ratio)
        return mass_target(scores, self.r, self.crossing)

    def part(self, module: nn.Module, path: str) -> Part:
        """One module's predictor."""
        return self._part(module, path, Collected("FTWT"))

    def _part(self, module: nn.Module, path: str, collected: Collected) -> Part:
        if not isinstance(module, nn.Conv2d):
            raise TargetError(f"attach: FTWT serves {self.serves}; {path!r} is a {type(module).__name__}.")
        return Predictor(module, path, collected, self)

    def parts(self, sites: Sequence[Site]) -> list[Part]:
        """One per site; what they collect is one loss."""
        collected = Collected("FTWT")
        return [self._part(site.module, site.path, collected) for site in sites]

    def places(self, model: nn.Module) -> Collection[str]:
        """The convolutions of chains."""
        chains = chains_of(model, self.shape)
        found = [path for path, chain in chains.items() if not (chain.refused or chain.left)]
        if not found:
            why = "; ".join(f"{path!r}: {one.refused or one.left}" for path, one in [*chains.items()][:3])
            raise TargetError(
                f"attach: FTWT serves nn.Conv2d modules with batch norm and activation, and this "
                f"{type(model).__name__} has none that it can serve ({why or 'it has no convolution'})."
            )
        return found

    def companions(self, model: nn.Module, sites: Sequence[Site]) -> list[tuple[Injection, list[Site]]]:
        """The norms at the ends of chains, and convolutions that are not served."""
        chains, modules = chains_of(model, self.shape), dict(model.named_modules())
        own = {site.path for site in sites}
        for path in own:
            why = chains[path].refused if path in chains else "the model does not call it in evaluation mode"
            if why:
                raise TargetError(f"attach: FTWT can't serve {path!r}: {why}. Leave it out by exclude=.")
        ends = [one.end for path, one in chains.items() if path in own and one.end != path]
        rest = {p: one.refused or one.left or "not asked for" for p, one in chains.items() if p not in own}
        found: list[tuple[Injection, list[Site]]] = []
        if ends:
            found.append((Ends(), [Site(path, modules[path]) for path in ends]))
        if rest:
            found.append((Wholes(tuple(rest.items())), [Site(path, modules[path]) for path in rest]))
        return found

    def metrics(self, handle: FilterPruning) -> dict[str, float | Tensor]:
        """The share of filters that the last call kept, of all samples; the loss; the agreement."""
        return handle.numbers()

    def handle(
        self, model: nn.Module, injection: Any, served: Sequence[Served], saved: Sequence[Saved]
    ) -> FilterPruning:
        """What `optx.attach` returns."""
        chains: dict[str, Chain] = chains_of(model, self.shape)
        return FilterPruning(model, injection, served, saved, chains)
