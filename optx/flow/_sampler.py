"""From Gumbel noise to tokens: Euler steps along the flow, or Langevin steps along the score.

Source: arXiv 2503.17361, algorithm 2 (flow); of the score form the paper leaves the step open.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from optx._errors import OptxError, ShapeError
from optx.flow._draws import Draws
from optx.flow._network import Network
from optx.flow._path import GumbelPath

Guide = Callable[[Tensor, Tensor, Draws], Tensor | None]
"""Of x (B, L, V), the posterior p (B, L, V) and draws: a velocity to add, or None."""

Step = Callable[[Tensor, Tensor, float, float], Tensor]
"""From ln x, the posterior, t and the next time to the next ln x."""

Bar = Callable[[Iterable[int]], Iterable[int]]
"""What wraps steps to show how far they are, as ``tqdm.tqdm`` does."""

SOLVERS = ("euler", "exponential")


def euler(path: GumbelPath, y: Tensor, p: Tensor, t: float, end: float) -> Tensor:
    """x + h u(x), clamped to the simplex; y is ln x."""
    x = y.exp()
    return projected(x + (end - t) * path.velocity(x, p, t))


def exponential(path: GumbelPath, y: Tensor, p: Tensor, t: float, end: float) -> Tensor:
    """Exact for a posterior that stays as it is: x exp((1/tau(end) - 1/tau(t)) p), normalised."""
    rise = 1 / path.temperature(end) - 1 / path.temperature(t)
    return torch.log_softmax(y + rise * p, -1)


def langevin(path: GumbelPath, y: Tensor, p: Tensor, t: float, end: float, size: float, n: Tensor) -> Tensor:
    """A Langevin step in p_t, and the way to the time ``end``.

    In z = T y, of which one number for all is free, the Concrete law has one shape at all temperatures. There
    the score is V f - 1 and a step is z + size (V f - 1) + sqrt(2 size) n, n normal without its mean, which
    leaves p_t as it is for small sizes. Then z moves as the targets do, by (b(end) - b(t)) p, which is
    nothing where the noise is sharpened with them.
    """
    (temperature, b), (new_temperature, new_b) = path.concrete(t), path.concrete(end)
    z = temperature * y
    if path.invalid:  # their coordinates are not there
        z, n = z.index_fill(-1, path.invalid_index(z), 0.0), n.index_fill(-1, path.invalid_index(z), 0.0)
    n = n - n.sum(-1, keepdim=True) / path.valid
    drift = path.score(y, p, t) / temperature
    z = z + size * drift + math.sqrt(2 * size) * n + (new_b - b) * p
    return torch.log_softmax(path.forbid(z / new_temperature), -1)


def projected(x: Tensor) -> Tensor:
    """ln of points that steps may have put beside the simplex: negative parts to 0, sums to 1."""
    x = x.clamp_min(0)
    return (x / x.sum(-1, keepdim=True)).log()


@dataclass
class Held:
    """Positions that are not drawn: given tokens along their own path, and padding, whose x is 0.

    Attributes:
        keep: where tokens are given, (B, L); None: nowhere.
        tokens: them, (B, L).
        g: their noise, (B, L, V).
        mask: where there are positions at all; None: everywhere.
    """

    keep: Tensor | None = None
    tokens: Tensor | None = None
    g: Tensor | None = None
    mask: Tensor | None = None

    def put(self, path: GumbelPath, y: Tensor, t: float) -> Tensor:
        """Points with the given ones in their places."""
        if self.keep is not None and self.tokens is not None and self.g is not None:
            when = torch.full((len(y),), t, dtype=y.dtype, device=y.device)
            y = torch.where(self.keep[..., None], path.log_point(self.tokens, when, self.g), y)
        return y if self.mask is None else y.masked_fill(~self.mask[..., None], -torch.inf)

    def known(self, p: Tensor) -> Tensor:
        """A posterior that is certain of the given tokens."""
        if self.keep is None or self.tokens is None:
            return p
        certain = torch.zeros_like(p).scatter(-1, self.tokens[..., None], 1)
        return torch.where(self.keep[..., None], certain, p)


@dataclass
class Sampler:
    """One run from t = 0 to t = 1.

    Attributes:
        path: the Gumbel-softmax path.
        net: the model.
        step: Euler's, or another.
        guide: adds velocities; None: nothing.
        held: what is given.
        draws: all that is random.
    """

    path: GumbelPath
    net: Network
    step: Step
    guide: Guide | None
    held: Held
    draws: Draws

    def run(
        self, y: Tensor, steps: int, each: Callable[[Tensor], None], title: str, progress: bool | Bar
    ) -> Tensor:
        """The last ln x; ``each`` is shown every point on the way."""
        y = self.held.put(self.path, y, 0.0)
        each(y)
        for n in bar(range(steps), title, progress):
            t, end = n / steps, (n + 1) / steps
            p = self.posterior(y, t)
            ahead = self.step(y, p, t, end)
            push = self.guide(y.exp(), p, self.draws) if self.guide is not None else None
            if push is not None:
                if push.shape != y.shape:
                    raise ShapeError(
                        f"GumbelFlow.sample: the guide gave a velocity of shape {tuple(push.shape)}; it must "
                        f"be {tuple(y.shape)}, that of x."
                    )
                ahead = projected(ahead.exp() + (end - t) * push)
            y = self.held.put(self.path, ahead, end)
            if n + 1 == steps or y.device.type == "cpu":  # a look at a GPU would hold each step up
                self._check_numbers(y, p, end)
            each(y)
        return y

    def decided(self, y: Tensor) -> Tensor:
        """Draws from the model's distribution at the last point."""
        p = self.posterior(y, 1.0)
        self._check_numbers(y, p, 1.0)
        return (p.log() + self.draws.gumbel(*y.shape)).argmax(-1)

    def _check_numbers(self, y: Tensor, p: Tensor, t: float) -> None:
        """Raise if a point is nan: argmax takes nan for the largest, which would make tokens 0 in silence."""
        real = p if self.held.mask is None else p.masked_fill(~self.held.mask[..., None], 0)
        wrong = bool(real.isnan().any())
        if wrong or bool(y.isnan().any()):
            who = "the model's logits are nan, or infinite," if wrong else "the guide's velocity is nan"
            raise OptxError(
                f"GumbelFlow.sample: {who} on the way to t = {t:g}. Look at its weights and its precision."
            )

    def posterior(self, y: Tensor, t: float) -> Tensor:
        """The model's distribution of the token that a point goes to."""
        when = torch.full((len(y),), t, dtype=y.dtype, device=y.device)
        return self.held.known(torch.softmax(self.path.forbid(self.net.logits(y.exp(), when)), -1))


def check_steps(owner: str, path: GumbelPath, steps: int) -> None:
    """Raise unless Euler's steps keep probabilities positive: h lambda / tau(1) < 1."""
    rate, coldest = path.rate(1.0), path.temperature(1.0)
    if steps <= rate:
        least = math.floor(rate) + 1
        raise OptxError(
            f"{owner}: steps is {steps}; where the temperature has fallen to tau(1) = {coldest:.3g} an Euler "
            f"step keeps probabilities above 0 from {least} steps on. Give steps={least} or more, or "
            "solver='exponential', which takes any number."
        )


def bar(steps: range, title: str, progress: bool | Bar) -> Iterable[int]:
    """Steps under a bar: on a terminal if True, never if False, else as the caller wraps them."""
    if not isinstance(progress, bool):
        if not callable(progress):
            raise OptxError(
                f"GumbelFlow.sample: progress is a {type(progress).__name__}; it must be True, False, or "
                "what wraps the steps, as tqdm.tqdm."
            )
        return progress(steps)
    if not progress or not sys.stderr.isatty():
        return steps
    from rich.console import Console
    from rich.progress import track

    return track(steps, title, console=Console(stderr=True), transient=True)
