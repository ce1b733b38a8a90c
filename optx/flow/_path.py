"""The Gumbel-softmax path: its temperature, interpolant, velocities and score, by the paper's letters.

A token k is the vertex e_k of the simplex. At time t it is a Concrete (Gumbel-softmax) variable

    x_t = softmax((b e_k + g) / T),   g_i standard Gumbel draws,

of which two readings are offered. The paper's, ``"sharpened"``: T = beta tau(t) and b = beta, so that
x_t = softmax((e_k + g / beta) / tau(t)), whose noise grows sharp together with the target. And ``"fixed"``:
T = beta tau(0) and b = beta (tau(0) / tau(t) - 1), so that x_t = softmax(e_k (1/tau(t) - 1/tau(0)) + g / T),
whose noise stays as it was drawn. The velocity that the paper samples by moves exactly this second path.

Source: arXiv 2503.17361, sections 3 and 4; the Concrete density, arXiv 1611.00712, appendix C.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optx._errors import OptxError, ShapeError, check_above_0, check_choice, check_range, check_whole, shown

NOISES = ("sharpened", "fixed")


@dataclass(frozen=True)
class GumbelPath:
    """What `optx.GumbelFlow` computes with; its options are explained there."""

    vocab: int
    tau_max: float = 10.0
    decay: float = 3.0
    beta: float = 2.0
    noise: str = "sharpened"
    invalid: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        who = type(self).__name__
        check_whole(who, "vocab", self.vocab, 2)
        for name in ("tau_max", "decay", "beta"):
            check_above_0(who, name, getattr(self, name))
        check_choice(who, "noise", self.noise, NOISES)
        object.__setattr__(self, "invalid", self._read_invalid(who))
        if self.decay > 80:
            raise OptxError(
                f"{who}: decay is {self.decay}; from tau_max={self.tau_max} the temperature would fall to "
                "less than float32 tells from 0. Give at most 80; the paper's range is 3 to 10."
            )
        rise, first = math.exp(self.decay), self.beta * self.tau_max
        last = min(self.tau_max, first) / rise
        if last < 1e-35 or max(first, self.beta * rise) > 1e37:
            raise OptxError(
                f"{who}: tau_max={self.tau_max}, decay={self.decay} and beta={self.beta} make numbers that "
                "float32 does not hold. The paper's are 10, 3 and 2."
            )

    def _read_invalid(self, who: str) -> tuple[int, ...]:
        given: Any = self.invalid
        if not isinstance(given, int) and not hasattr(given, "__iter__"):
            raise OptxError(f"{who}: invalid is {shown(given)}; it must be numbers of tokens.")
        found = tuple(
            check_whole(who, "invalid", one, 0, "numbers of tokens")
            for one in ([given] if isinstance(given, int) else given)
        )
        for one in found:
            check_range(who, "invalid", one, 0, self.vocab - 1)
        if self.vocab - len(set(found)) < 2:
            raise OptxError(f"{who}: invalid is {shown(given)}; of {self.vocab} tokens two must be left.")
        return tuple(sorted(set(found)))

    @property
    def valid(self) -> int:
        """How many tokens a sequence may have."""
        return self.vocab - len(self.invalid)

    # ---- the schedule -----------------------------------------------------------------------------------

    def temperature(self, t: Any) -> Any:
        """tau(t) = tau_max exp(-decay t), of a number or of a tensor of times between 0 and 1."""
        check_time(type(self).__name__, t)
        fell = torch.exp(-self.decay * t) if isinstance(t, Tensor) else math.exp(-self.decay * t)
        return self.tau_max * fell

    def rate(self, t: Any) -> Any:
        """lambda / tau(t), by which the velocity goes."""
        return self.decay / self.temperature(t)

    def concrete(self, t: Any) -> tuple[Any, Any]:
        """T and b: the Concrete variable's temperature, and the target's logit over the others'."""
        if self.noise == "sharpened":
            return self.beta * self.temperature(t), self.beta + 0 * t
        rise = torch.expm1(self.decay * t) if isinstance(t, Tensor) else math.expm1(self.decay * t)
        return self.beta * self.tau_max + 0 * t, self.beta * rise

    # ---- points of the path -----------------------------------------------------------------------------

    def forbid(self, logits: Tensor) -> Tensor:
        """Logits with -inf where no sequence has a token."""
        return logits.index_fill(-1, self.invalid_index(logits), -torch.inf) if self.invalid else logits

    def log_point(self, tokens: Tensor, t: Tensor, g: Tensor) -> Tensor:
        """y_t = ln x_t of tokens (B, L), times (B,) and Gumbel draws (B, L, V)."""
        temperature, b = (_over(one, g) for one in self.concrete(t))
        target = torch.zeros_like(g).scatter(-1, tokens[..., None], 1)
        return torch.log_softmax(self.forbid((b * target + g) / temperature), -1)

    def log_base(self, g: Tensor) -> Tensor:
        """y_0 = ln softmax(g / (beta tau_max)): where sampling starts, without a target."""
        return torch.log_softmax(self.forbid(g / (self.beta * self.tau_max)), -1)

    # ---- velocities -------------------------------------------------------------------------------------

    def own_velocity(self, x: Tensor) -> Tensor:
        """dx_t/dt of the sharpened path at its noise: lambda x (ln x - <x, ln x>). It asks for no target."""
        log = x.clamp_min(torch.finfo(x.dtype).tiny).log()
        return self.decay * x * (log - (x * log).sum(-1, keepdim=True))

    def velocity(self, x: Tensor, posterior: Tensor, t: Any) -> Tensor:
        """u(x) = lambda/tau(t) x (p - <p, x>), the mean over targets k ~ p of lambda/tau x_k (e_k - x)."""
        mean = (posterior * x).sum(-1, keepdim=True)
        return _over(self.rate(t), x) * x * (posterior - mean)

    # ---- the score --------------------------------------------------------------------------------------

    def log_odds(self, y: Tensor, t: Any) -> tuple[Tensor, Tensor, Tensor]:
        """ln w, b and D of points y = ln x: w = softmax(-T y), and D_k = ln(1 + (e^b - 1) w_k).

        With them p(y | k) is a constant in k times exp(-V D_k), and no exponential overflows.
        """
        temperature, b = (_over(one, y) for one in self.concrete(t))
        log_w = torch.log_softmax(self.forbid(-temperature * self._finite(y)), -1)
        eps = torch.finfo(y.dtype).eps  # of the largest w its rest to 1 may round to 0
        rest = torch.log((-torch.expm1(log_w)).clamp_min(eps * eps))
        return log_w, torch.as_tensor(b, dtype=y.dtype, device=y.device), torch.logaddexp(log_w + b, rest)

    def log_likelihood(self, y: Tensor, t: Any) -> Tensor:
        """ln p_t(y | k) for every token k, up to a constant: -V D_k, shaped as y."""
        return self.forbid(-self.valid * self.log_odds(y, t)[2])

    def score_term(self, y: Tensor, posterior: Tensor, t: Any) -> Tensor:
        """f(y) = sum_k p_k softmax(b e_k - T y): what the score T (V f - 1) knows of the data."""
        log_w, b, odds = self.log_odds(y, t)
        q = posterior * torch.exp(-odds)
        others = (q.sum(-1, keepdim=True) - q).clamp_min(0)
        return log_w.exp() * others + posterior * torch.exp((b + log_w - odds).clamp_max(0))

    def score(self, y: Tensor, posterior: Tensor, t: Any) -> Tensor:
        """d ln p_t(y) / dy = T (V f - 1) of y = ln x, which sums to 0; 0 for tokens that there are not."""
        temperature = _over(self.concrete(t)[0], y)
        found = temperature * (self.valid * self.score_term(y, posterior, t) - 1)
        return found.index_fill(-1, self.invalid_index(found), 0.0) if self.invalid else found

    def invalid_index(self, like: Tensor) -> Tensor:
        """The tokens that there are not, on a tensor's device."""
        return torch.tensor(self.invalid, device=like.device, dtype=torch.long)

    def _finite(self, y: Tensor) -> Tensor:
        """Log-probabilities of 0 as the least that the type has: times T they stay below infinity."""
        return y.clamp_min(-0.01 * torch.finfo(y.dtype).max ** 0.5)


def check_time(owner: str, t: Any) -> None:
    """Raise unless all times are between 0 and 1; on a GPU they are not looked at: it would have to wait."""
    if not isinstance(t, Tensor):
        check_range(owner, "t", t, 0, 1)
    elif t.device.type == "cpu" and not bool(((t >= 0) & (t <= 1)).all()):
        raise OptxError(f"{owner}: t is {shown(t)}; times are between 0 and 1.")


def check_tokens(owner: str, name: str, tokens: Any, vocab: int, where: Tensor | None = None) -> None:
    """Raise unless these are token numbers below ``vocab``, (B, L), where they count."""
    if not isinstance(tokens, Tensor) or tokens.is_floating_point() or tokens.is_complex():
        kind = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise OptxError(f"{owner}: {name} is of {kind}; it must be a tensor of token numbers.")
    if tokens.ndim != 2 or tokens.dtype == torch.bool:
        raise ShapeError(
            f"{owner}: {name} has shape {tuple(tokens.shape)} and dtype {tokens.dtype}; it must be token "
            "numbers of shape (batch, length)."
        )
    if tokens.device.type != "cpu":
        return
    outside = (tokens < 0) | (tokens >= vocab)
    if where is not None:
        outside &= where
    if bool(outside.any()):
        raise OptxError(
            f"{owner}: {name} has {int(tokens[outside][0])}, which is no token of a vocabulary of {vocab}. "
            "Padding is marked by mask=, or by -100."
        )


def _over(value: Any, like: Tensor) -> Any:
    """A number as it is; one for each row of a batch, shaped to multiply it."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    return value.reshape(-1, *(1,) * (like.ndim - 1))
