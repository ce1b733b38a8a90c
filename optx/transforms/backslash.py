"""BackSlash: weights shrunk along the gradient of their own code length, fitted anew in each step.

Source: "BackSlash: Rate Constrained Optimized Training of Large Language Models", arXiv 2504.16968; "It Takes
a Good Model to Train a Good Model", arXiv 2506.00486, and its authors' code (backslash.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from optx._errors import OptxError, TransformError, warn
from optx._generalised_gaussian import fit_shape
from optx._names import whole
from optx._rules import rule
from optx.ops import abs as size
from optx.ops import fast_power, log, maximum, minimum, sign, sqrt, where
from optx.step.declared import Slot, counter, per_tensor
from optx.step.numbers import as_float
from optx.step.step_moments import Moments
from optx.step.transform import Group, Host, Transform

_CENTRE, _LOW, _HIGH = 1.25, 0.3, 2.25


@rule(writes="shape")
def nearest_shape(absolute: Any, square: Any, numel: Any) -> Any:
    """What `optx._generalised_gaussian.fit_shape` finds in its grid, without the grid.

    1 / nu as a polynomial of sqrt(log(3/4 ratio)), which is about linear in it, through the points midway
    between two ratios of the grid: there the rounding to hundredths changes from one shape to the next.
    """
    mean = absolute / numel
    ratio = square / numel / maximum(mean * mean, 1e-300)
    near = sqrt(log(maximum(0.75 * ratio, 1.0)))
    u = minimum(maximum(near, _LOW), _HIGH) - _CENTRE
    x = -0.000163552453175 + u * 0.00296304655898
    x = 0.0048864315162 + u * (-0.00629897483685 + u * x)
    x = 0.0030220225264 + u * (-0.00969615909954 + u * x)
    x = -0.00142400403576 + u * (-0.0386231154065 + u * x)
    x = 3.24323525604 + u * (4.79349119 + u * (1.86793553606 + u * x))
    hundredths = 100.0 / x + 0.5
    return minimum(maximum(hundredths - hundredths % 1.0, 10.0), 299.0) / 100.0


@rule(writes=("sum_abs", "sum_sq"))
def sizes(w: Any) -> Any:
    """Summed, of the new weight: |w| and w^2."""
    return size(w), w * w


@rule(writes=("held_abs", "held_sq"))
def sizes_held(w: Any) -> Any:
    """Summed, and kept for the next step."""
    return size(w), w * w


@rule(writes=("sum_abs", "sum_sq"))
def known_sizes(held_abs: Any, held_sq: Any) -> Any:
    """The sums of the weights as they lie before the step, which the last one took."""
    return held_abs * 1.0, held_sq * 1.0


@rule(writes=("shape", "rate"))
def fit(total_sum_abs: Any, total_sum_sq: Any, total_numel: Any, kappa: Any, lr: Any) -> Any:
    """nu, and kappa nu / N; 0 where the learning rate is, since such a step moves nothing."""
    nu = nearest_shape(total_sum_abs, total_sum_sq, total_numel)
    return nu, where(lr == 0.0, 0.0 * nu, kappa * nu / total_numel)


@rule(writes=("shape", "rate"))
def fit_until(
    total_sum_abs: Any, total_sum_sq: Any, total_numel: Any, kappa: Any, lr: Any, steps: Any, until: Any
) -> Any:
    """The same, and a rate of 0 after so many steps."""
    nu = nearest_shape(total_sum_abs, total_sum_sq, total_numel)
    rate = where(lr == 0.0, 0.0 * nu, kappa * nu / total_numel)
    return nu, where(steps > until, 0.0 * nu, rate)


@rule(writes="w")
def shrink(w: Any, shape: Any, rate: Any, clip: Any) -> Any:
    """Towards 0, and past it where the weight is smaller than the step."""
    return w - rate * sign(w) * fast_power(size(w) + clip, shape - 1.0)


@rule(writes="w")
def shrink_to_zero(w: Any, shape: Any, rate: Any, clip: Any) -> Any:
    """Towards 0, and never past it."""
    return w - sign(w) * minimum(size(w), rate * fast_power(size(w) + clip, shape - 1.0))


class BackSlash(Transform):
    """Shrink weights along the gradient of their code length, so that a model takes fewer bits (BackSlash).

    After the base's update w becomes w - kappa nu / N sign(w) (|w| + clip)^(nu - 1): a step down the gradient
    of kappa / N sum |w|^nu, which is what N weights of a generalised Gaussian of shape nu take in bits, but
    for constants. nu is fitted in each step to all the numbers that the optimizer trains, whatever tensors
    they are in: 0.10 to 2.99 by hundredths. 2 is the normal distribution's; under the shrink it falls below
    1, as what the loss does not hold up gathers near 0.

    Train so for the greater part of a run, then without it, to win back what was lost (``until``).

    Source: "BackSlash: Rate Constrained Optimized Training of Large Language Models", arXiv 2504.16968; the
    fit and the softened gradient are those of arXiv 2506.00486's code.

    Args:
        kappa: strength, at least 0. A weight moves by about kappa nu / N in a step, whatever the learning
            rate is. 0 does nothing. A schedule sets ``opt.backslash.kappa``.
        clip: what softens the gradient near 0, above 0. At 1, beside which most weights are small, the
            shrink is nearly the same for all of them.
        until: after so many steps it ends, and the base goes on alone; None: never. A share of
            ``total_steps`` (0.75) where that is given.
        total_steps: of the whole run.
        prox: stop at 0. False, as in the authors' code, lets a weight that is smaller than its step come out
            on the other side.
        exact: fit nu to what the base's update has made of the weights, as the authors do, in a pass that
            reads what the update reads. False fits it to the weights as they lay before that update: the
            step before has summed them as it wrote them, so that no pass is added.

    Group keys:
        ``backslash=False`` leaves a param group out: it is neither shrunk nor counted; so does
        ``backslash_kappa=0``. ``backslash_kappa``, ``backslash_clip``, ``backslash_until`` override.

    Paper values:
        ``kappa=2e3, clip=1.0``: the authors' code, on a GPT-2 of 124 M numbers: 1.6e-5 nu in a step. Biases,
            norms and embeddings are shrunk and counted like the rest. 3 of 11 epochs with it, in one script.

    Limits: kappa goes with the number of weights: what fits 124 M moves 85,000 past 0, which is refused
    (there 5 to 20 do well: kappa times steps / N, which with nu is how far a weight comes that nothing holds,
    is 0.04 to 0.16 in 690 steps). A step at a learning rate of 0 shrinks nothing, as checkpoints take one. A
    weight without a gradient in a step is neither shrunk nor counted in it. Each
    optimizer has a nu of its own. ``exact=True`` adds a pass: 11 numbers are moved for each weight of AdamW
    instead of 7. ``exact=False`` moves 7, keeps two numbers for each tensor, and its nu is one update behind:
    0.02 at most on digits once the first steps are over, with as many bits in the end; 0.3 where the learning
    rate is so high that a step moves weights by their own size. On a CPU the power takes more time than all
    the rest of AdamW: on two cores its step takes 2.1 to 3.5 times as long, without the pass 1.5 to 2.7.

    Keywords: compression, rate-distortion, entropy, regularisation, sparsity, L1, generalised Gaussian,
    generalized Gaussian, GGD, quantisation, quantization, Exp-Golomb.

    Evidence: ``optx run compress``; ``test_backslash.py``.

    Raises:
        TransformError: an option out of range, or a step moves a typical weight past 0 and ``prox`` is False.
        OptxError: another argument out of range.

    Example:
        >>> import torch, optx
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -1.0, 0.5, -0.5, 0.1, -0.1, 0.1, -0.1]))
        >>> opt = optx.wrap(torch.optim.SGD([w], lr=0.1), optx.BackSlash(kappa=0.08))
        >>> w.grad = torch.zeros(8)
        >>> opt.step()
        >>> w.detach()[::2]  # nu is 1.35
        tensor([0.9828, 0.4844, 0.0860, 0.0860])
    """

    name = "backslash"
    looks_at_gradients = False
    limits: ClassVar[Mapping[str, tuple[float, float]]] = {
        **{"kappa": (0.0, math.inf), "clip": (1e-30, math.inf), "until": (0.0, math.inf)},
    }

    def __init__(
        self,
        kappa: float,
        clip: float = 1.0,
        until: float | None = None,
        total_steps: int | None = None,
        prox: bool = False,
        exact: bool = True,
    ) -> None:
        for argument, value in (("prox", prox), ("exact", exact)):
            if not isinstance(value, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise OptxError(f"BackSlash: {argument} is {value!r}; it must be True or False.")
        options = {"kappa": kappa, "clip": clip}
        if until is None:
            self.until = None
        else:
            options["until"] = _steps(until, total_steps)
        if until is None and total_steps is not None:
            raise OptxError(
                f"BackSlash: total_steps is {total_steps!r} and until is None; until is the share of it "
                "after which the shrinking ends, as until=0.75."
            )
        for option, value in options.items():
            self.check_option(option, value, f"BackSlash: {option} is {value!r}")
        self.options = options
        self.prox, self.exact = prox, exact
        slots: dict[str, Slot] = {} if until is None else {"steps": counter()}
        if not exact:
            slots |= {"held_abs": per_tensor(torch.float64), "held_sq": per_tensor(torch.float64)}
        self.slots = slots
        self._unseen = False  # whether there are weights whose numbers were not there yet
        self._typical: float | None = None  # the mean of |w|, as it was at wrap time
        self._count = 0  # N
        self._checked: set[float] = set()

    def arguments(self) -> dict[str, Any]:
        """With ``until`` in steps."""
        return {**super().arguments(), "total_steps": None}

    def moments(self, group: Group, base: torch.optim.Optimizer) -> Moments:
        """The fit and the shrink; nothing where kappa is 0."""
        kappa = group.get("backslash_kappa", self.options["kappa"])
        if not isinstance(kappa, Tensor) and kappa == 0:
            return Moments()
        finish = fit_until if "until" in self.options else fit
        after = shrink_to_zero if self.prox else shrink
        totals = ("sum_abs", "sum_sq", "numel")
        if self.exact:
            return Moments(after_sums=sizes, after_totals=totals, after_finish=finish, after=after)
        return Moments(scalars=known_sizes, totals=totals, finish=finish, after=after, observe=sizes_held)

    def init_slot(self, name: str, p: Tensor, optimizer: Host) -> Tensor:
        """The sums of the weights as they lie before the first step."""
        if name == "steps":
            return super().init_slot(name, p, optimizer)
        order = 1 if name == "held_abs" else 2
        return (_norm(p, order) ** order).to(p.device)

    def bind(self, optimizer: Host) -> None:
        """Refuse a strength that throws weights about."""
        self._measure(optimizer)
        self._check_strength(optimizer)

    def groups_changed(self, optimizer: Host) -> None:
        """The same with the weights that there are now."""
        self._measure(optimizer)
        self._check_strength(optimizer)

    def before_step(self, optimizer: Host) -> None:
        """A schedule may have set another strength; weights may have got their memory since."""
        if self._unseen:
            self._measure(optimizer)
        self._check_strength(optimizer)

    def metrics(self, optimizer: Host) -> dict[str, float]:
        """The shape that was fitted, and kappa nu / N."""
        measured, served = optimizer.measured, optimizer.served(self)
        found = {what: measured.first(f"{self.name}.{what}", served) for what in ("shape", "rate")}
        return {what: value for what, value in found.items() if value is not None}

    def _measure(self, optimizer: Host) -> None:
        """The mean of |w|, of which strengths are told; None where there are no numbers yet."""
        weights = [p.detach() for p in optimizer.served(self) if p.requires_grad]
        self._count = sum(p.numel() for p in weights)
        self._typical, self._checked = None, set()
        self._unseen = not self.prox and any(p.is_meta for p in weights)
        if self.prox or self._unseen or not self._count:
            return
        absolute, square = (_total(weights, order) for order in (1, 2))
        if not (math.isfinite(absolute) and math.isfinite(square)):
            return  # a mistake of another kind, which the step's own numbers show
        self._typical, self._shape = absolute / self._count, fit_shape(absolute, square, self._count)

    def _check_strength(self, optimizer: Host) -> None:
        if not self._typical:
            return
        for number, group in enumerate(optimizer.param_groups):
            kappa, clip = (group.get(f"backslash_{key}", self.options[key]) for key in ("kappa", "clip"))
            if not self.serves(group) or any(isinstance(v, Tensor) for v in (kappa, clip)):
                continue
            if kappa not in self._checked:
                self._checked.add(kappa)
                self._check_one(number, float(kappa), float(clip))

    def _check_one(self, number: int, kappa: float, clip: float) -> None:
        assert self._typical is not None
        step = kappa * self._shape / self._count * (self._typical + clip) ** (self._shape - 1)
        if step < self._typical / 10:
            return
        says = (
            f"BackSlash: kappa={kappa:g} (param group {number}) moves a weight by {step:.3g} in each step, "
            f"and the {self._count} weights were {self._typical:.3g} large on average"
        )
        least = kappa * self._typical / step
        if step >= self._typical:
            raise TransformError(
                f"{says}: it overshoots 0. Give a kappa well below {least:.2g}, or prox=True, which stops "
                "at 0."
            )
        warn(f"{says}: most will be at 0 within {math.ceil(self._typical / step)} steps.")


def _total(weights: Iterable[Tensor], order: int) -> float:
    """The sum of |w| or of w^2, over what lies elsewhere too."""
    return sum(float(_norm(w, order)) ** order for w in weights)


def _norm(p: Tensor, order: int) -> Tensor:
    return whole(torch.linalg.vector_norm(p.detach(), order, dtype=torch.float64))  # pyright: ignore


def _steps(until: Any, total_steps: Any) -> float:
    """How many steps that is."""
    share = as_float(until)
    if total_steps is None:
        if share is not None and 0.0 < share < 1.0:
            raise OptxError(
                f"BackSlash: until is {until!r}, which is less than a step; with total_steps it is a share "
                "of them."
            )
        return until
    if as_float(total_steps) is None or not total_steps >= 1:
        raise OptxError(f"BackSlash: total_steps is {total_steps!r}; it must be a number of at least 1.")
    if share is None or not 0.0 <= share <= 1.0:
        raise OptxError(
            f"BackSlash: until is {until!r}; with total_steps it is a share of them, between 0 and 1."
        )
    return round(share * total_steps)
