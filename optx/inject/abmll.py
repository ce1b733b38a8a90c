"""ABMLL: low-rank updates as normal distributions over tasks, of which one is adapted from few examples.

Source: Amortized Bayesian Meta-Learning for Low-Rank Adaptation, arXiv 2508.14285; no code of its authors is
public. Its parent is ABML (Ravi & Beatson, ICLR 2019).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from optx._errors import OptxError, TargetError, check_choice, check_range, check_whole, shown
from optx.inject._abmll_handle import ABMLLHandle
from optx.inject._abmll_part import NormalLoRA, Shared
from optx.inject._abmll_terms import FLOOR
from optx.inject._injection import Injection, Site
from optx.inject._part import Part
from optx.inject._served import Served
from optx.inject._trained_whole import Saved
from optx.inject._weights import is_linear


@dataclass(frozen=True)
class ABMLL(Injection):
    """Meta-learn a normal prior over LoRA updates, from which a few steps adapt a task, with uncertainty.

    Weights are W + B_mean A_mean plus noise of deviation sigma = softplus(B_std A_std + softplus^-1(c)).
    theta, the two pairs of the prior, is what is registered and trained; a task adapts a copy of it, phi, by
    SGD on its support set's loss + beta KL(phi || theta), and theta learns from the loss at phi on its query
    set (first order: as if the steps in between were the identity). One copy is there at a time, however
    many tasks a meta-step has::

        for task in tasks:
            with ab.task(inner_steps=5, inner_lr=1e-3, tasks=len(tasks)) as t:
                t.adapt(lambda: nll(model, task.support))
                t.outer(nll(model, task.query)).backward()
        outer_opt.step()

    To use it: ``t.adapt(...)`` in a task, then ``ab.predict(lambda: model(x))``, the mean over drawn weights.

    Args:
        rank: r of both pairs: each A (r, in), uniform at the start, and B (out, r), zero.
        c: deviation of every weight at the start. None: 1 % of that of the module's own weights.
        beta: weight of the KL divergence, a sum over all weights, beside a loss that is a mean.
        gamma: weight of the hyper-prior -log p(theta) in the outer loss. None: beta.
        sigma_param: ``"softplus"``, or ``"abs"``: sigma = abs(B_std A_std + c), at least 1e-6.
        a0: hyper-prior: shape of the Gamma distribution of precisions sigma^-2. Means are N(0, 1).
        b0: its rate. None: a0 c^2, a mean precision of c^-2. ABML's 0.01 expects deviations of 0.1, and has
            a slope of 2 b0 / sigma^3.
        seed: of the draws in tasks.

    Serves nn.Linear and transformers' Conv1D. By default: query and value projections. Outputs are drawn,
    not weights (local reparameterisation): each output of each example, and each position of a sequence, has
    noise of its own, which has the right distribution one by one. That costs a second product, in float32.
    Outside of a task and of ``predict`` the model computes with theta's means, in training mode too.
    Half-precision weights get float32 factors; divergence and hyper-prior are float32 sums, a block of rows
    at a time. ``merge`` and `optx.export_lora` write the mean; ``handle.draws`` has raw outputs, for a
    regression's intervals. A task within another, ``outer`` before ``adapt``, and a loss that is not finite
    are refused, and theta is then as it was.

    Paper values:
        ``beta=1e-7``: Llama 3 8B on CrossFit and Unified-QA, batches of 2, as a reviewer reports it (the
            default). Rank, c, rates and the number of steps are not known to us.
        ``a0=1, b0=0.01``: ABML's hyper-prior.

    Limits: Files of ``handle.save`` have no number of tasks, by which noise is drawn: resume by the model's
        state or the handle's. Four factors are trained where LoRA has two. The
        divergence grows with (change / c)^2: steps overshoot once inner_lr * beta / c^2 is above about 1, so
        a small c takes a small beta. In a task the deviations of a layer are made, a block of rows at a time,
        in every forward and backward pass. Not for embeddings and convolutions. Under FSDP a task is refused;
        in DistributedDataParallel adapt by the model itself, and call the wrapper for the outer loss alone.
        Random numbers drawn within a task by anything else are of the task's stream. On accelerators other
        than CUDA noise is of the device's own stream, which no seed here sets. Backward passes through
        activation checkpoints belong within the task.

    Keywords: Bayesian LoRA, meta-learning, MAML, Reptile, ABML, few-shot, uncertainty, calibration,
        variational, hierarchical Bayes, PEFT.

    Evidence: ``optx run meta``; ``test_abmll.py``, ``test_abmll_terms.py``, ``test_abmll_tasks.py``.

    Raises:
        OptxError: an option out of range.
        TargetError: at attach, a rank larger than the weight, a module that is not linear, or weights whose
            deviation is 0 where no c is given.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        >>> ab = optx.attach(model, optx.ABMLL(rank=2), targets="0|2")
        >>> outer = torch.optim.Adam(ab.parameters(), lr=1e-3)
        >>> nll = lambda x, y: torch.nn.functional.cross_entropy(model(x), y)
        >>> for number in range(2):
        ...     x, y = torch.randn(20, 8), torch.randint(2, (20,))
        ...     with ab.task(inner_steps=3, inner_lr=1e-2, tasks=2) as t:
        ...         losses = t.adapt(lambda: nll(x[:10], y[:10]))
        ...         t.outer(nll(x[10:], y[10:])).backward()
        >>> outer.step()
        >>> ab.predict(lambda: model(x), samples=4).shape
        torch.Size([20, 2])

    Source: arXiv 2508.14285, section 3; ABML, openreview.net/forum?id=rkgpy3C5tX.
    """

    name: ClassVar[str] = "abmll"
    role: ClassVar[str] = "query_value"
    serves: ClassVar[str] = "Linear or Conv1D modules"

    rank: int = 8
    c: float | None = None
    beta: float = 1e-7
    gamma: float | None = None
    sigma_param: Literal["softplus", "abs"] = "softplus"
    a0: float = 1.0
    b0: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", check_whole("ABMLL", "rank", self.rank, 1))
        object.__setattr__(self, "seed", check_whole("ABMLL", "seed", self.seed, 0))
        check_choice("ABMLL", "sigma_param", self.sigma_param, ("softplus", "abs"))
        given: dict[str, Any] = {option: getattr(self, option) for option in ("beta", "a0")}
        given |= {one: value for one in ("gamma", "c", "b0") if (value := getattr(self, one)) is not None}
        for option, value in given.items():
            above = option in ("c", "a0", "b0")
            check_range("ABMLL", option, value, 0)
            if isinstance(value, bool) or math.isinf(value) or (above and not value):
                wanted = "a finite number above 0" if above else "a finite number, 0 or more"
                raise OptxError(f"ABMLL: {option} is {shown(value)}; it must be {wanted}.")
            object.__setattr__(self, option, float(value))  # NumPy's would not be saved
        if self.sigma_param == "abs" and self.c is not None and self.c <= FLOOR:
            raise OptxError(
                f"ABMLL: c is {self.c:g} with sigma_param='abs', whose deviations are at least {FLOOR:g}. "
                "Use a larger one, or 'softplus'."
            )

    @property
    def gamma_or_beta(self) -> float:
        """The hyper-prior's weight."""
        return self.beta if self.gamma is None else self.gamma

    @property
    def needs_weight(self) -> bool:
        """c is of the weights' deviation, if it is not given."""
        return self.c is None

    def part(self, module: nn.Module, path: str) -> Part:
        """One module's pairs."""
        return self.parts([Site(path, module)])[0]

    def parts(self, sites: Sequence[Site]) -> list[Part]:
        """One per site; all are in one task at a time, and the first has the number of tasks."""
        for site in sites:
            if not is_linear(site.module):
                what = type(site.module).__name__
                raise TargetError(f"attach: ABMLL serves {self.serves}; {site.path!r} is a {what}.")
        shared = Shared()
        made = [NormalLoRA(self, site.module, site.path, shared) for site in sites]
        made[0].count_tasks()
        return [*made]

    def metrics(self, handle: ABMLLHandle) -> Mapping[str, float | Tensor]:
        """The last outer loss."""
        return handle.last

    def handle(
        self, model: nn.Module, injection: ABMLL, served: Sequence[Served], saved: Sequence[Saved]
    ) -> ABMLLHandle:
        """What `optx.attach` returns."""
        return ABMLLHandle(model, injection, served, saved)
