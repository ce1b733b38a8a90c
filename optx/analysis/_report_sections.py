"""The diagnostics of a report: each a function that gives a section, or raises with the reason why not."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from optx._errors import OptxError
from optx._module_paths import paths_of
from optx.analysis._directions import norm
from optx.analysis._report_page import Section
from optx.analysis._report_pass import Pass, inputs_of
from optx.analysis.attention.margins import attention_margins
from optx.analysis.bounds.lipschitz import lipschitz
from optx.analysis.gradients import nlm_alignment
from optx.analysis.interaction.degeneracy import degeneracy
from optx.analysis.softmax import softmax_collapse
from optx.inject._anatomy import attentions_of
from optx.scaling._sublayer_gain import sublayer_gain

MOST = 12  # rows of a table; the rest is in `Section.values`
_SOURCES = 8  # random signs a sample that degeneracy's outputs are summed by
_FREE = "Free: directions that change nothing on this data, to first order; outputs' ranks by random signs."
_HEADS = 6  # attention modules that are looked at


class NotHere(OptxError):
    """A diagnostic that does not apply; the message says why."""


@dataclass(frozen=True, eq=False)
class Material:
    """What diagnostics are made of.

    Attributes:
        model: in eval mode.
        batches: as they were given, with labels.
        seen: the passes of all batches; gradients are the last one's.
    """

    model: nn.Module
    batches: Sequence[Any]
    seen: Sequence[Pass]

    def gradients(self) -> dict[str, Tensor]:
        """By parameter's name.

        Raises:
            NotHere: there is no loss.
        """
        if self.seen[-1].loss is None:
            raise NotHere(self.seen[-1].no_loss)
        return {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}


def collapse(material: Material) -> Section:
    """Softmax collapse, over all batches."""
    passes = [one for one in material.seen if one.logits is not None and one.target is not None]
    if not passes:
        raise NotHere(material.seen[-1].no_logits)
    counts = [len(one.target) for one in passes if one.target is not None]
    shares = list[tuple[float, float]]()
    for one in passes:
        assert one.logits is not None
        assert one.target is not None
        right = float((one.logits.argmax(-1) == one.target).double().mean())
        shares.append((softmax_collapse(one.logits, one.target), right))
    total = sum(counts)
    collapsed, right = (sum(s[i] * n for s, n in zip(shares, counts, strict=True)) / total for i in (0, 1))
    losses = [one.loss for one in passes if one.loss is not None]
    loss = f"{sum(losses) / len(losses):.4g}" if losses else "-"
    dtype = str(passes[0].logits.dtype).removeprefix("torch.") if passes[0].logits is not None else ""
    return Section(
        "Softmax collapse",
        ("samples", "collapsed", "right", "loss"),
        [(f"{total:,}", f"{collapsed:.1%}", f"{right:.1%}", loss)],
        f"Collapsed: only the true class is left in softmax's sum, in {dtype}; exact, on these batches.",
        {"collapsed": collapsed, "right": right},
        "share",
    )


def alignment(material: Material) -> Section:
    """NLM alignment."""
    material.gradients()
    found = nlm_alignment(material.model)
    return Section(
        "NLM alignment",
        ("parameter", "cos(w, -g)"),
        [(name, f"{value:+.3f}") for name, value in _largest(found)],
        _told(found, "1: a step only scales the weights up. Exact, of the last batch, in eval mode."),
        found,
        "cosine of weight and step",
    )


def gradients(material: Material) -> Section:
    """Norms of gradients."""
    grads = material.gradients()
    found = {name: float(norm(grad)) for name, grad in grads.items()}
    trained = {name: p for name, p in material.model.named_parameters() if p.requires_grad}
    none = [name for name in trained if name not in found]
    total = math.hypot(*found.values())
    zero = sum(value == 0.0 for value in found.values())
    bad = sum(not math.isfinite(value) for value in found.values())
    said = f"All together {total:.4g}; {zero} are zeros, {bad} not finite, {len(none)} parameters have none. "
    sizes = {name: float(norm(p.detach())) for name, p in trained.items()}
    rows = [
        (name, f"{value:.3g}", f"{value / sizes[name]:.2g}" if sizes[name] else "-")
        for name, value in _largest(found)
    ]
    told = _told(found, f"{said}Exact, of the last batch, in eval mode.")
    return Section("Gradient norms", ("parameter", "norm", "over the weight's"), rows, told, found, "norm")


def singular_values(material: Material) -> Section:
    """Top singular values."""
    found = sublayer_gain(material.model)
    values = {name: one.value for name, one in found.top.items()}
    rows = [
        (name, f"{one.shape[0]} x {one.shape[1]}", f"{one.value:.4g}", f"{one.residual:.0e}")
        for name, one in ((name, found.top[name]) for name, _ in _largest(values))
    ]
    left = f" {len(found.left_out)} parameters left out ({'; '.join(sorted({*found.left_out.values()}))})."
    return Section(
        "Top singular values",
        ("matrix", "shape", "value", "residual"),
        rows,
        _told(values, f"Estimates from below, by power iteration.{left if found.left_out else ''}"),
        values,
        "singular value",
    )


def bound(material: Material) -> Section:
    """Lipschitz bounds, of small networks on one tensor of floating numbers."""
    x = inputs_of(material.seen[-1].batch)
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2:
        what = f"a tensor of {x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise NotHere(f"inputs are {what}; bounds are of one floating tensor with the batch first")
    # A multiplier for each layer: within a percent or so of one for each unit, in a fraction of the time.
    found = lipschitz(material.model, tuple(x.shape[1:]), method="layer", data=x[:64].detach())
    certified = "certified" if found.certified else "if the declared slopes are right"
    values = {"found": found.lower_bound, "LipSDP": found.bound, "product": found.product_bound}
    return Section(
        "Lipschitz bounds",
        ("what", "bound", "is"),
        [
            ("largest change found", f"{found.lower_bound:.4g}", "an estimate from below"),
            (f"LipSDP ({found.solver})", f"{found.bound:.4g}", certified),
            ("product of norms", f"{found.product_bound:.4g}", certified),
        ],
        "How far apart two inputs can be mapped, in l2, per unit of their distance.",
        values,
        "l2 bound",
    )


def free_weights(material: Material) -> Section:
    """Degeneracy."""
    found = degeneracy(material.model, list(material.batches), sources=_SOURCES)
    shares = {path: one.free / (one.outputs * one.inputs) for path, one in found.items()}
    rows = [
        (
            path,
            f"{one.outputs} x {one.inputs}",
            str(one.rank_gram),
            str(one.rank_jacobian),
            f"{shares[path]:.0%}",
            str(one.dead) if one.relu else "-",
        )
        for path, one in ((path, found[path]) for path, _ in _largest(shares))
    ]
    left = "".join(f" {path} left out: {why}." for path, why in list(found.left_out.items())[:MOST])
    return Section(
        "Degeneracy",
        ("linear layer", "weights", "inputs' rank", "outputs' rank", "free", "dead ReLUs"),
        rows,
        _told(shares, f"{_FREE}{left}"),
        shares,
        "share of free directions",
    )


def heads(material: Material) -> Section:
    """Margins of attention heads: the first one of each of the first modules."""
    every = list(attentions_of(paths_of(material.model).modules))
    if not every:
        raise NotHere("the model has no attention module that optx knows")
    batch = inputs_of(material.seen[-1].batch)
    rows, shares, why = list[tuple[str, ...]](), dict[str, float](), dict[str, str]()
    for path in every[:_HEADS]:
        try:
            one = attention_margins(material.model, batch, path, 0, sample=8)
        except OptxError as error:
            why[path] = str(error).removeprefix("attention_margins: ")
            continue
        within = f"{one.corr_within:.2f}" if one.svm.feasible else "infeasible"
        cells = (f"{one.median:.3g}", f"{one.saturated:.1%}", within, f"{one.effective_rank:.1f}")
        rows.append((path, *cells))
        shares[path] = one.saturated
    if not rows:
        raise NotHere(next(iter(why.values())))
    left = "".join(f" {path} left out: {reason}" for path, reason in why.items())
    more = f" {len(every) - _HEADS} modules more were not looked at." if len(every) > _HEADS else ""
    return Section(
        "Attention margins",
        ("head 0 of", "median margin", "saturated", "corr to its SVM", "effective rank"),
        rows,
        f"Saturated: rows whose largest weight is above 0.99. Corr: on 8 rows of the last batch.{more}{left}",
        shares,
        "share of saturated rows",
    )


SECTIONS: dict[str, Callable[[Material], Section]] = {
    "Softmax collapse": collapse,
    "NLM alignment": alignment,
    "Gradient norms": gradients,
    "Top singular values": singular_values,
    "Lipschitz bounds": bound,
    "Degeneracy": free_weights,
    "Attention margins": heads,
}


def _largest(values: dict[str, float]) -> list[tuple[str, float]]:
    """Those that are largest in magnitude, nan before all, in the model's order."""
    sizes = {name: math.inf if math.isnan(value) else abs(value) for name, value in values.items()}
    chosen = set(sorted(sizes, key=lambda name: -sizes[name])[:MOST])
    return [(name, value) for name, value in values.items() if name in chosen]


def _told(values: dict[str, float], note: str) -> str:
    """A note, with how many there are where a table has not all."""
    return f"The {MOST} largest of {len(values)}. {note}" if len(values) > MOST else note
