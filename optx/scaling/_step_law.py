"""Learning rate and batch size of a pretraining run, from the model's size and the number of tokens.

Source: Li et al., "Predictable Scale: Part I, Optimal Hyperparameter Scaling Law in Large Language Model
Pretraining" (Step Law), arXiv 2503.04715; coefficients and their 1000 resamples as released with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

from torch import nn

from optx._errors import OptxError, check_whole, warn
from optx.scaling._non_embedding import non_embedding_params

FINAL_LR = 1e-5  # where the cosine of every run of the paper ends, whatever its peak
MOST_TOKENS_A_PARAMETER = 1000.0  # ours: the paper's runs have up to 466
_QUANTILE = 1.6448536269514722  # 95 % of a normal distribution are below it

Numbers = tuple[float, ...]
Range = tuple[float, float]


@dataclass(frozen=True)
class StepLaw:
    """A law ``lr = exp(k) N^p D^q``, ``batch tokens = exp(k) D^q``, as it was fitted.

    Attributes:
        lr: k, p and q of the learning rate.
        batch: k and q of the batch, in tokens.
        lr_covariance: of the three, over resamples of the runs that it was fitted to; rows.
        batch_covariance: of the two.
        params: smallest and largest N (parameters without embeddings and head) among those runs.
        tokens: smallest and largest D among them.
        rows: numbers of the runs that were kept, where `optx.scaling.fit_step_law` made it.
        means: what ``lr`` and ``batch`` are over the resamples, where they themselves are rounded.
    """

    lr: Numbers
    batch: Numbers
    lr_covariance: tuple[Numbers, ...]
    batch_covariance: tuple[Numbers, ...]
    params: Range
    tokens: Range
    rows: tuple[int, ...] = ()
    means: tuple[Numbers, Numbers] | None = None

    def at(
        self, params: float, tokens: float, *, seq_len: int = 2048, multiple_of: int | None = None
    ) -> StepLawResult:
        """What the law says for a run; arguments, errors and warnings are those of `step_law`."""
        n, d = _positive("params", params), _positive("tokens", tokens)
        check_whole("step_law", "seq_len", seq_len, 1)
        if multiple_of is not None:
            check_whole("step_law", "multiple_of", multiple_of, 1)
        of_lr, of_batch = (1.0, math.log(n), math.log(d)), (1.0, math.log(d))
        lr, batch = math.exp(_dot(self.lr, of_lr)), math.exp(_dot(self.batch, of_batch))
        mean_lr, mean_batch = self.means or (self.lr, self.batch)
        sequences = batch / seq_len
        if multiple_of is not None:
            sequences = max(1, round(sequences / multiple_of)) * multiple_of
        used = sequences * seq_len if multiple_of is not None else batch
        if d < used:
            raise OptxError(
                f"step_law: tokens is {tokens!r}, less than one step: a batch is {used:g} tokens. Take more "
                "of them, or a smaller multiple_of or seq_len."
            )
        found = StepLawResult(
            lr=lr,
            batch_tokens=used,
            batch_sequences=sequences,
            steps=d / used if multiple_of is None else round(d / used),
            interval=Interval(
                _interval(mean_lr, self.lr_covariance, of_lr),
                _interval(mean_batch, self.batch_covariance, of_batch),
            ),
            params=n,
            tokens=d,
            seq_len=int(seq_len),
            outside=self._outside(n, d, lr),
        )
        if found.outside:
            warn(f"step_law: beyond what the law was fitted to: {'; '.join(found.outside)}.")
        return found

    def _outside(self, n: float, d: float, lr: float) -> tuple[str, ...]:
        told = [
            f"{value:.3g} {what}, fitted to {low:.3g} to {high:.3g}"
            for value, what, (low, high) in ((n, "parameters", self.params), (d, "tokens", self.tokens))
            if not low * (1 - 1e-9) <= value <= high * (1 + 1e-9)
        ]
        if d / n > MOST_TOKENS_A_PARAMETER:
            told.append(f"{d / n:.3g} tokens a parameter, more than {MOST_TOKENS_A_PARAMETER:g}")
        if lr <= FINAL_LR:
            told.append(f"a peak learning rate of {lr:.3g}, not above the final one of {FINAL_LR:g}")
        return tuple(told)


@dataclass(frozen=True)
class Interval:
    """5 to 95 % of what the law says, as the runs that it was fitted to are resampled.

    Attributes:
        lr: of the learning rate.
        batch_tokens: of the batch, in tokens.
    """

    lr: Range
    batch_tokens: Range


@dataclass(frozen=True)
class StepLawResult:
    """What `step_law` says.

    Attributes:
        lr: peak learning rate.
        batch_tokens: tokens in a batch; sequences times ``seq_len`` where those were rounded.
        batch_sequences: sequences in a batch; whole only with ``multiple_of``.
        steps: optimizer steps; whole only with ``multiple_of``.
        interval: 5 to 95 % of rate and batch; `Interval`.
        params: N, as it was used.
        tokens: D.
        seq_len: tokens in a sequence.
        outside: what lies beyond the runs that the law was fitted to; empty if nothing does.
        final_lr: where the cosine ends, as in all runs that the law was fitted to.
    """

    lr: float
    batch_tokens: float
    batch_sequences: float
    steps: float
    interval: Interval
    params: float
    tokens: float
    seq_len: int
    outside: tuple[str, ...]
    final_lr: float = FINAL_LR


# The formula as it is printed; means and covariances of the 1000 released resamples. Ranges: dense runs of
# 215 M to 1.07 B parameters and mixtures of experts of 2.16 B, on 2 B to 100 B tokens.
PUBLISHED = StepLaw(
    lr=(math.log(1.79), -0.713, 0.307),
    batch=(math.log(0.58), 0.571),
    lr_covariance=(
        (3.8906211149e-01, -1.3558938971e-02, -5.1324935321e-03),
        (-1.3558938971e-02, 8.9148573725e-04, -1.7433178853e-04),
        (-5.1324935321e-03, -1.7433178853e-04, 3.6631184290e-04),
    ),
    batch_covariance=((1.9117963587e-01, -8.1515722480e-03), (-8.1515722480e-03, 3.4851793950e-04)),
    params=(214_663_680, 2_156_188_672),
    tokens=(2e9, 1e11),
    means=((0.58630779, -0.71292229, 0.30749095), (-0.54354217, 0.57094436)),
)


def step_law(
    params: float | nn.Module,
    tokens: float,
    *,
    seq_len: int = 2048,
    multiple_of: int | None = None,
    law: StepLaw | None = None,
) -> StepLawResult:
    """Learning rate and batch size for pretraining a language model, from its size and its tokens.

    ``lr = 1.79 N^-0.713 D^0.307`` and ``batch = 0.58 D^0.571`` tokens, for AdamW. N counts parameters without
    embeddings and output head, all experts included; D counts training tokens.

    Args:
        params: N, or a model (on the meta device too), which `optx.scaling.non_embedding_params` counts.
        tokens: D, above 0.
        seq_len: tokens in a sequence, for ``batch_sequences``; the law knows nothing of it.
        multiple_of: round the sequences of a batch to the nearest multiple, at least one of it; batch and
            steps are whole numbers then.
        law: another law, of `optx.scaling.fit_step_law`; None: the paper's.

    Returns:
        A `StepLawResult`: ``lr``, ``batch_tokens``, ``batch_sequences``, ``steps``, ``final_lr``,
        ``outside``, and ``interval``, 5 to 95 % of rate and batch over 1000 resamples of the paper's kept
        runs: ``exp(m' x -+ 1.645 sqrt(x' C x))``, x being (1, log N, log D), and m and C mean and covariance
        of the coefficients over the released resamples, whose own percentiles it meets within 1 %. The
        printed formula is rounded, so the rate lies 1 to 3 % below its middle.

    Paper values:
        ``seq_len=2048``: in all runs (the default).
        AdamW, betas (0.9, 0.95), eps 1e-8, weight decay 0.1; 2000 steps of warm-up, then a cosine to 1e-5,
        whatever the peak is. With a tenth of the peak as its end the best rate is lower.

    Limits: One warning outside the runs that it was fitted to (N from 2.1e8 to 2.2e9, D from 2e9 to 1e11) and
        above 1000 tokens a parameter. The interval holds scatter of the kept runs alone, not the choice of
        grid or the law's form: by the same fit, the 1,911 dense runs that were released have exponents
        -0.767 and 0.196, 0.613 for the batch; within the range that is 11 % less learning rate for 1e9
        parameters and 1e11 tokens, for 7e9 and 1.4e12 it is 40 % less.

    Keywords: learning rate, batch size, hyperparameters, pretraining, scaling law, Chinchilla, MoE.

    Evidence: ``test_step_law.py``, the paper's numbers; no recipe.

    Source: "Predictable Scale: Part I", Step Law, arXiv 2503.04715, equation 1.

    Raises:
        OptxError: an argument is out of its range, or the tokens are less than one batch.

    Example:
        >>> import optx
        >>> r = optx.scaling.step_law(1e9, 1e11, multiple_of=8)
        >>> f"{r.lr:.6f}", r.batch_sequences, r.steps, r.final_lr
        ('0.001632', 544, 89758, 1e-05)
    """
    if not isinstance(law, StepLaw | None):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise OptxError(f"step_law: law is a {type(law).__name__}; it must be what fit_step_law returned.")
    count: float = non_embedding_params(params) if isinstance(params, nn.Module) else params
    return (PUBLISHED if law is None else law).at(count, tokens, seq_len=seq_len, multiple_of=multiple_of)


def _positive(argument: str, value: Any) -> float:
    if not isinstance(value, bool) and isinstance(value, Real) and 0 < float(value) < math.inf:
        return float(value)
    raise OptxError(f"step_law: {argument} is {value!r}; it must be a number above 0.")


def _dot(a: Numbers, b: Numbers) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def _interval(law: Numbers, covariance: tuple[Numbers, ...], x: Numbers) -> Range:
    """The coefficients are strongly correlated: their variances alone would make it many times wider."""
    variance = _dot(x, tuple(_dot(row, x) for row in covariance))
    middle, half = _dot(law, x), _QUANTILE * math.sqrt(max(variance, 0.0))
    return math.exp(middle - half), math.exp(middle + half)
