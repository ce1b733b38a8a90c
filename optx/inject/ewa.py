"""EWA: feed-forward modules are several experts in training, and the mean of them afterwards.

Source: Experts Weights Averaging, arXiv 2308.06093. Experts' calls are in ``_averaged_experts.py``, the
handle and the averaging in ``_expert_handle.py``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from optx._errors import OptxError, TargetError, check_choice, check_range, check_whole
from optx._module_paths import paths_of
from optx.inject._anatomy import Wanted, of_role, stacks_of
from optx.inject._averaged_experts import AveragedExperts, Reminder
from optx.inject._expert_copies import check_copyable, check_untied, copies, draw_anew
from optx.inject._expert_handle import ExpertAveraging, ExpertHandle
from optx.inject._injection import Injection, Site
from optx.inject._part import Part
from optx.inject._served import Served
from optx.inject._token_split import Partition
from optx.inject._trained_whole import Saved
from optx.step.transform import Transform


@dataclass(frozen=True)
class EWA(Injection):
    """Experts Weights Averaging: train several copies of a feed-forward module, and keep the mean of them.

    In training a module's tokens are dealt out to N experts of its kind, evenly and at random, anew in every
    forward: there is no router, and it costs what the module alone does. After each step of the optimizer the
    experts are drawn together. In evaluation mode their mean computes, which is what a merge leaves: the
    model of before, with its class, keys and speed.

    Args:
        experts: N.
        beta: the share rate, at its end. An expert W_i becomes, of what all were after the step,
            (1 - beta) W_i + beta / (N - 1) times the sum of the others.
        rule: ``"others"``: that; ``"mean"``: (1 - beta) W_i + beta times the mean of all.
        schedule: ``"linear"``: beta grows from 0 to its value at ``total_steps``, and stays there;
            ``"constant"``. None: linear where ``total_steps`` is given.
        total_steps: steps of the optimizer in the run, for ``"linear"``.
        every: of the default targets, each so many-th block's, that one first; None: 2. Where you name
            targets yourself, leave it out.
        init: ``"copy"``: all experts are the module as it is (fine-tuning); ``"fresh"``: each is drawn anew
            by ``reset_parameters``.
        grad_scale: of experts' gradients. Each has 1 / N of the tokens, so with a loss that is a mean its
            gradient is about 1 / N of the module's, which Adam doesn't see and SGD does: N undoes it.

    Serves modules that compute each token by itself: a linear module, or anything made of them. By default
    the FFNs of every second block in the families that optx knows; where a block has its FFN as two modules
    (BERT, OPT), both, which deal out tokens alike, as modules of one block or one ``nn.Sequential`` do.

    The module's own parameters hold the mean (as of the last evaluation, ``state_dict`` or merge), and don't
    learn; so a checkpoint has the plain model under its plain keys, and one of the plain model that is loaded
    makes copies of it of all experts. Use ``optx.wrap(optimizer, handle)``: it takes the experts in, leaves
    their originals out, and averages after each step that was not skipped; moments are not averaged. Without
    it call ``handle.step()`` after each step. The handle is an `ExpertHandle`: ``merge_and_unload()`` keeps
    the mean, ``remove()`` gives the model of before back.

    Paper values:
        Its tables were not at hand. ``experts=4`` (the default) and 0.1 to 0.5 for ``beta`` are from
        memory, and so are the rule and the linear schedule; ``every=2``: some of the FFNs.

    Limits: An expert has the gradient of 1 / N of the tokens: from scratch it was no more than a seed's
        difference ahead of the plain model here, and level with it in tuning (``optx run experts``). N times
        the module's parameters, gradients and optimizer state while it trains. Permutations are of torch's
        own random stream, as dropout's, and in half precision experts nearer than a rounding are not drawn
        together. Each module that is served costs a gather and a scatter of its tokens, so name a whole FFN
        where there is one. Averages of weights (EMA) should be taken after the step. Not for batch norm,
        attention, offloaded or quantised modules.

    Keywords: mixture of experts, MoE, weight averaging, model soup, vision transformers, ViT, random uniform
        partition, RUP, upcycling.

    Evidence: ``optx run experts``; ``test_ewa.py``, ``test_ewa_models.py``, ``test_ewa_training.py``.

    Raises:
        OptxError: an option out of range, or a rate so large that experts would pass each other; at a call,
            a module that does not compute each token by itself.
        TargetError: at attach, a module that experts can't be copies of, tied, or inside of another target.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.TransformerEncoder(
        ...     torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> handle = optx.attach(model, optx.EWA(beta=0.5, total_steps=100))
        >>> optimizer = optx.wrap(optimizer, handle)
        >>> model(torch.randn(2, 5, 8)).square().mean().backward()
        >>> optimizer.step()
        >>> handle.steps, handle.beta
        (1, 0.005)
        >>> [row.module for row in handle.report().rows]
        ['layers.1.linear1', 'layers.1.linear2']

    Source: arXiv 2308.06093.
    """

    name: ClassVar[str] = "ewa"
    role: ClassVar[str] = "whole_ffn"
    serves: ClassVar[str] = "modules that compute each token by itself"

    experts: int = 4
    beta: float = 0.3
    rule: Literal["others", "mean"] = "others"
    schedule: Literal["linear", "constant"] | None = None
    total_steps: int | None = None
    every: int | None = None
    init: Literal["copy", "fresh"] = "copy"
    grad_scale: float = 1.0

    def __post_init__(self) -> None:
        check_whole("EWA", "experts", self.experts, 2, wanted="a whole number of at least 2")
        check_choice("EWA", "rule", self.rule, ("others", "mean"))
        check_choice("EWA", "schedule", self.schedule, ("linear", "constant", None))
        check_choice("EWA", "init", self.init, ("copy", "fresh"))
        check_range("EWA", "beta", self.beta, 0, 1)
        check_range("EWA", "grad_scale", self.grad_scale, 1e-6, 1e6)
        most = (self.experts - 1) / self.experts
        if self.rule == "others" and self.beta > most * (1 + 1e-9):
            raise OptxError(
                f"EWA: beta is {self.beta}; with {self.experts} experts it must be at most {most:.6g} "
                "((N - 1) / N, where all become the mean): above it experts pass each other. Lower it, or "
                "use rule='mean', whose bound is 1."
            )
        if self.schedule == "linear" and self.total_steps is None:
            raise OptxError(
                "EWA: schedule='linear' needs total_steps=, the steps of the optimizer in the whole run; or "
                "use schedule='constant'."
            )
        if self.total_steps is not None:
            wanted = "a whole number of steps, at least 1"
            check_whole("EWA", "total_steps", self.total_steps, 1, wanted=wanted)
            if self.schedule == "constant":
                raise OptxError(
                    f"EWA: total_steps is {self.total_steps!r}, and schedule='constant' has no use for it. "
                    "Leave one of them out."
                )
        if self.every is not None:
            check_whole("EWA", "every", self.every, 1, wanted="a whole number of blocks, at least 1")

    # ---- rates ------------------------------------------------------------------------------------------

    def beta_at(self, step: int) -> float:
        """The share rate of an averaging; the first is 1."""
        return self.beta * min(step / self.total_steps, 1.0) if self.total_steps else self.beta

    def pull_at(self, step: int) -> float:
        """Which share of its distance from the mean an expert loses in an averaging."""
        beta = self.beta_at(step)
        # (1 - b) W_i + b / (N - 1) (N mean - W_i) = W_i + b N / (N - 1) (mean - W_i)
        return min(beta * self.experts / (self.experts - 1), 1.0) if self.rule == "others" else beta

    # ---- where ------------------------------------------------------------------------------------------

    def places(self, model: nn.Module) -> Collection[str]:
        """The FFNs of every so many-th block of each stack."""
        paths, every = paths_of(model), self.every or 2
        wanted = Wanted("EWA", self.serves, type(model).__name__, self.role)
        chosen = of_role(paths.modules, wanted)
        blocks = [b for stack in stacks_of(paths.modules) for b in [*stack.blocks][every - 1 :: every]]
        found = [path for path in chosen if path.startswith(tuple(f"{block}." for block in blocks))]
        if not found:
            raise TargetError(
                f"attach: EWA serves each {every}. block by default, and no stack of this "
                f"{type(model).__name__} has as many. Pass EWA(every=1), or targets=."
            )
        return [paths.here[path] for path in found]

    def expanded(self, sites: Sequence[Site]) -> list[Site]:
        """Members with parameters in the place of an nn.Sequential, which something attached would be in."""
        found: list[Site] = []
        for site in sites:
            if type(site.module).forward is not nn.Sequential.forward:
                found.append(site)
                continue
            members = [Site(f"{site.path}.{name}", one) for name, one in site.module.named_children()]
            found += self.expanded([one for one in members if any(True for _ in one.module.parameters())])
        return list({site.path: site for site in found}.values())

    def companions(self, model: nn.Module, sites: Sequence[Site]) -> list[tuple[Injection, list[Site]]]:
        """None; but ties, and an ``every`` that has no meaning, are seen here."""
        check_untied("EWA", model, [(site.path, site.module) for site in sites])
        if self.every is not None:
            try:
                known = {
                    one.path
                    for one in self.expanded(
                        [Site(path, model.get_submodule(path)) for path in self.places(model)]
                    )
                }
            except TargetError:
                known = set[str]()
            if other := [site.path for site in sites if site.path not in known]:
                raise TargetError(
                    f"attach: EWA's every={self.every} is of its default targets, and {other[0]!r} is none "
                    "of them. Leave every= out, and name the modules by targets= and layers=."
                )
        return []

    # ---- what -------------------------------------------------------------------------------------------

    def parts(self, sites: Sequence[Site]) -> list[Part]:
        """One per site; the modules of one FFN deal out their tokens alike."""
        for site in sites:
            outer = next((one.path for one in sites if site.path.startswith(f"{one.path}.")), None)
            if outer is not None:
                raise TargetError(
                    f"attach: EWA has the targets {outer!r} and {site.path!r}, which is inside it and would "
                    "not be called. Leave one of them out."
                )
            check_copyable("EWA", site.module, site.path)
        partitions: dict[str, Partition] = {}
        reminder = Reminder(self.beta > 0)
        made: list[Part] = []
        for member, site in enumerate(sites):
            experts = copies(site.module, self.experts)
            if self.init == "fresh":
                for expert in experts:
                    draw_anew("EWA", expert, site.path)
            partition = partitions.setdefault(_ffn_of(site), Partition())
            scale = float(self.grad_scale)
            made.append(AveragedExperts(site.path, site.module, experts, partition, member, scale, reminder))
        return made

    def part(self, module: nn.Module, path: str) -> Part:
        """The experts of one module."""
        return self.parts([Site(path, module)])[0]

    def transforms(self, handle: ExpertHandle) -> Sequence[Transform]:
        """The averaging."""
        return [ExpertAveraging(handle)]

    def metrics(self, handle: ExpertHandle) -> dict[str, float | Tensor]:
        """The share rate, and how far experts are from their mean."""
        return handle.numbers()

    def handle(
        self, model: nn.Module, injection: Any, served: Sequence[Served], saved: Sequence[Saved]
    ) -> ExpertHandle:
        """What `optx.attach` returns."""
        return ExpertHandle(model, injection, served, saved)


def _ffn_of(site: Site) -> str:
    """The FFN that a module is, or is a piece of: then what the pieces' paths have in common.

    Pieces have one matrix each: members of an nn.Sequential, or modules of one block.
    """
    matrices = [p for p in site.module.parameters() if p.ndim > 1]
    if len(matrices) > 1:
        return site.path
    owner, _, name = site.path.rpartition(".")
    if name.isdigit():
        return owner
    block = re.match(r"(?:.*\.)?\d+(?=\.)", site.path)
    return block.group() if block else owner
