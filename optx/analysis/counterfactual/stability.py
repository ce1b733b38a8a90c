"""How likely a decision outlives the model: T-Rex's Stability.

Source: Hamman, Noorani, Mishra, Magazzeni, Dutta, "Robust Counterfactual Explanations for Neural Networks
With Probabilistic Guarantees", ICML 2023, arXiv 2305.11997.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from optx._errors import OptxError, check_above_0, check_choice, check_range, check_whole, shown
from optx.analysis.counterfactual._classifier import Classifier, Output
from optx.analysis.counterfactual._noise import drawn, generator_of
from optx.analysis.counterfactual._rows import length, rows_of

Gamma = float | Tensor | Literal["sampled"]


def stability(
    model: Any,
    x: Any,
    target: Any = 1,
    *,
    k: int = 1000,
    sigma: float = 0.1,
    generator: torch.Generator | int = 0,
    output: Output = "auto",
    measure: Literal["relaxed", "lipschitz"] = "relaxed",
    gamma: Gamma | None = None,
    chunk: int = 8192,
) -> Tensor:
    """How sure a model is of a class in all of a point's neighbourhood: high where retrained models agree.

    With x_i = x + N(0, sigma^2 I) and m the probability of the class, it is the mean over k samples of
    m(x_i) - |m(x) - m(x_i)| (relaxed), or of m(x_i) - gamma ||x - x_i|| (lipschitz): no more than m(x) nor
    than the mean of m(x_i), from -1 to 1. All rows have the same noise: a batch is its rows one by one.

    The model's mode, flags, gradients and random numbers stay as they are: a module is called in eval mode.

    Args:
        model: a module or another callable that gives (N, K), or for two classes (N,) or (N, 1); or an
            estimator of scikit-learn, by ``predict_proba``.
        x: (N, features...), a floating-point tensor or an array; sigma is in its units.
        target: the class that shall persist: its column, or of an estimator one of ``classes_``.
        k: samples.
        sigma: their deviation.
        generator: of the noise, or a seed for a new one.
        output: what the model gives; ``"auto"``: probabilities if rows sum to 1, else logits.
        measure: the relaxed one needs nothing; the other is what the guarantee is about.
        gamma: for ``"lipschitz"``: a Lipschitz constant of m near x, a number or (N,); or ``"sampled"``, the
            steepest slope between any two of x and its samples: an estimate, never above the true one.
        chunk: rows that the model is called with at a time, at most.

    Returns:
        (N,), float32 or wider.

    Paper values:
        ``k=1000, sigma=0.1``: the code's function, of features scaled to [0, 1] (the defaults).
        ``k=1000, sigma=0.05``: its command line.

    Limits: With k=1000 its standard error is 0.02, up to 0.03, the same for all rows, as their noise is. The
        relaxed measure certifies nothing: it orders points, no better than the model's own probability did
        in the recipe. The sampled gamma takes k^2 operations a row, and memory for all samples at once.
        What is guaranteed, of which models: see `optx.analysis.stability_bound`.

    Keywords: counterfactual explanation, recourse, robustness, model multiplicity, Rashomon, T-Rex,
        explainability, XAI, retraining.

    Evidence: ``optx run counterfactuals``; ``test_stability.py``.

    Source: arXiv 2305.11997, section 3 and its code's ``attack_methods.py``.

    Raises:
        OptxError: an argument out of range, numbers that are not finite, outputs that are no probabilities
            where these were said, or one number a row that may be either.
        ShapeError: x has no rows.

    Example:
        >>> import torch, optx
        >>> model = lambda x: (x.sum(1) / 4).clamp(0, 1)  # (N,): of the second class
        >>> x = torch.tensor([[1.0, 1.0], [1.9, 1.9]])
        >>> optx.analysis.stability(model, x, target=1, output="probabilities").round(decimals=2)
        tensor([0.4700, 0.9200])
    """
    who = "stability"
    k = check_whole(who, "k", k, 1)
    sigma = check_above_0(who, "sigma", sigma)
    check_choice(who, "measure", measure, ("relaxed", "lipschitz"))
    draws = generator_of(who, generator)
    x = rows_of(who, "x", x, model)
    gamma = _gamma_of(gamma, measure, x)
    classifier = Classifier(who, model, target, output, chunk, x)
    with classifier.in_use():
        noise = drawn(draws, k, sigma, x)
        if measure == "relaxed":
            return relaxed(classifier, x, noise)
        if isinstance(gamma, Tensor):
            return _lipschitz(classifier, x, noise, gamma)
        return _with_sampled_gamma(classifier, x, torch.cat(list(noise)))


def stability_bound(
    epsilon: float, gamma: float, gamma_new: float | None = None, *, k: int = 1000, sigma: float = 0.1
) -> float:
    """At least how probable it is that a changed model M has M(x) >= R - epsilon, R being the Stability of x.

    1 - exp(-k epsilon^2 / (2 (gamma + gamma_new)^2 sigma^2)): so R >= 1/2 + epsilon certifies the class with
    this probability. R is ``stability(..., measure="lipschitz", gamma=...)`` with a gamma that holds for M.

    The exponent has 2 where the paper has 8: given M, the mean of M(x_i) - m(x_i) is a function of k d
    Gaussians with Lipschitz constant (gamma + gamma_new) / sqrt(k), for which 2 is proven and cannot be
    less: linear models have that rate. 8 gives a weaker bound.

    Args:
        epsilon: how far below R it may fall.
        gamma: a Lipschitz constant of the model that there is.
        gamma_new: of changed ones; None: the same.
        k: samples of R.
        sigma: their deviation.

    Returns:
        A probability; 0 where nothing is known.

    Paper values:
        ``k=1000, sigma=0.1``: as `optx.analysis.stability` has them (the defaults).

    Limits: It is of the noise of R. M has to agree with the model on average over x's neighbourhood: a change
        of all probabilities there by one number is outside of what is bounded, however probable it is.

    Keywords: counterfactual explanation, certificate, concentration, Lipschitz, T-Rex.

    Evidence: ``test_stability.py``; no recipe.

    Source: arXiv 2305.11997, theorem 1; the constant: the Gaussian concentration of Tsirelson, Ibragimov and
        Sudakov.

    Raises:
        OptxError: an argument out of range.

    Example:
        >>> import optx
        >>> round(optx.analysis.stability_bound(0.01, gamma=1.0), 3)
        0.713
    """
    who = "stability_bound"
    check_range(who, "epsilon", epsilon, 0)
    check_range(who, "gamma", gamma, 0)
    if gamma_new is not None:
        check_range(who, "gamma_new", gamma_new, 0)
    steep = (gamma + (gamma if gamma_new is None else gamma_new)) * check_above_0(who, "sigma", sigma)
    k = check_whole(who, "k", k, 1)
    if steep == 0:
        return float(epsilon > 0)
    return -math.expm1(-k * epsilon**2 / (2 * steep**2))


# ---- the measures ---------------------------------------------------------------------------------------


def relaxed(classifier: Classifier, x: Tensor, noise: Iterable[Tensor]) -> Tensor:
    """The mean of m(x_i) - |m(x) - m(x_i)|, (N,)."""
    centre = classifier.scores(x)
    total, k = torch.zeros_like(centre, dtype=torch.float64), 0
    for block in noise:
        k += len(block)
        for rows, _, points in classifier.around(x, block):
            m = classifier.score(points).view(len(x[rows]), -1)
            total[rows] += (m - (centre[rows, None] - m).abs()).sum(1, dtype=torch.float64)
    return (total / k).to(centre.dtype)


def relaxed_gradient(classifier: Classifier, x: Tensor, noise: Iterable[Tensor]) -> Tensor:
    """Of the same with respect to x, through m(x_i) and m(x): as x, in float32 or wider."""
    centre = classifier.scores(x)
    wide = torch.promote_types(x.dtype, torch.float32)
    slope, of_centre, k = torch.zeros_like(x, dtype=wide), torch.zeros_like(centre), 0
    with torch.enable_grad():
        for block in noise:
            k += len(block)
            for rows, these, _ in classifier.around(x, block):
                here, c = x[rows].clone().requires_grad_(), centre[rows].clone().requires_grad_()
                m = classifier.score((here[:, None] + block[these]).flatten(0, 1)).view(len(here), -1)
                found = classifier.gradient(m - (c[:, None] - m).abs(), (here, c))
                slope[rows] += found[0]
                of_centre[rows] += found[1]
        # m(x) is in every sample's term: what they all ask of it goes back through the model once.
        start = 0
        for part in classifier.pieces(x):
            rows = slice(start, start := start + len(part))
            here = part.clone().requires_grad_()
            slope[rows] += classifier.gradient(classifier.score(here) * of_centre[rows], (here,))[0]
    return slope / k


def _lipschitz(classifier: Classifier, x: Tensor, noise: Iterable[Tensor], gamma: Tensor) -> Tensor:
    """The mean of m(x_i) - gamma ||x - x_i||, (N,)."""
    total, far, k = torch.zeros(len(x), dtype=torch.float64, device=x.device), 0.0, 0
    wide = torch.promote_types(x.dtype, torch.float32)
    for block in noise:
        k += len(block)
        far = far + length(block).sum()
        for rows, _, points in classifier.around(x, block):
            total[rows] += classifier.score(points).view(len(x[rows]), -1).sum(1, dtype=torch.float64)
    return ((total - gamma.double() * far) / k).to(wide)


def _with_sampled_gamma(classifier: Classifier, x: Tensor, noise: Tensor) -> Tensor:
    """The same, with the steepest slope between any two of x and its samples."""
    places = torch.cat([torch.zeros_like(noise[:1]), noise]).flatten(1).double()  # relative to x, of all rows
    values = torch.zeros(len(x), len(places), dtype=torch.float64, device=x.device)
    values[:, 0] = classifier.scores(x).double()
    for rows, these, points in classifier.around(x, noise):
        columns = slice(these.start + 1, these.stop + 1)
        values[rows, columns] = classifier.score(points).view(len(x[rows]), -1).double()
    gamma = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for i in range(len(places) - 1):
        apart = length(places[i + 1 :] - places[i])
        slopes = (values[:, i + 1 :] - values[:, i, None]).abs() / apart
        gamma = torch.maximum(gamma, slopes.nan_to_num(0.0, posinf=0.0).amax(1))
    far = length(places[1:]).mean()
    return (values[:, 1:].mean(1) - gamma * far).to(torch.promote_types(x.dtype, torch.float32))


def _gamma_of(gamma: Any, measure: str, x: Tensor) -> Tensor | None:
    """A number for each row; None: to be sampled, or not needed."""
    if measure == "relaxed":
        if gamma is not None:
            raise OptxError("stability: gamma has no use in measure='relaxed'; pass measure='lipschitz'.")
        return None
    if isinstance(gamma, str) and gamma == "sampled":
        return None
    if isinstance(gamma, Tensor) and gamma.shape in ((), (len(x),)) and not gamma.is_complex():
        given = gamma.detach().to(x.device, torch.float64)
    else:
        plain = isinstance(gamma, int | float) and not isinstance(gamma, bool)
        given = torch.tensor(gamma if plain else torch.nan, dtype=torch.float64, device=x.device)
    if not bool(((given >= 0) & given.isfinite()).all()):
        raise OptxError(
            f"stability: gamma is {shown(gamma)}; for measure='lipschitz' it must be 'sampled' or a "
            f"Lipschitz constant from 0 on, one number or one of each of the {len(x)} rows."
        )
    return given
