"""Adapters: small bottlenecks behind or beside a sub-layer.

Source: arXiv 2110.04366, table 1; the sequential adapter is Houlsby's, arXiv 1902.00751.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from optx.inject._hidden_delta_options import Form
from optx.inject.hidden_delta import Choice, HiddenDelta

Position = Literal["ffn", "attention", "both"]


@dataclass(frozen=True)
class Bottleneck(Choice):
    """What all adapters have: f(x W_down + b_down) W_up + b_up."""

    rank: int = 16
    form: Form = "relu"
    norm: Literal["none", "in", "out"] = "none"
    dropout: float = 0.0
    init: Literal["lora", "bert"] = "lora"
    bias: bool = True


@dataclass(frozen=True)
class SequentialAdapter(Bottleneck):
    """A bottleneck behind a sub-layer, on its output h: h + f(h W_down) W_up.

    Args:
        rank: r, the width of the bottleneck.
        position: which sub-layers: ``"both"`` (Houlsby), ``"attention"``, or ``"ffn"``.
        form: f: ``"relu"``, ``"gelu"``, ``"silu"``, ``"tanh"`` or ``"linear"``.
        norm: a LayerNorm on what the adapter reads (``"in"``) or adds (``"out"``), or ``"none"``.
        dropout: of the bottleneck, while training.
        init: ``"lora"``: no output changes at the start; ``"bert"``: weights normal with deviation 0.02, so
            they change a little.
        bias: biases behind W_down and W_up.

    By default it serves the last linear layers of the sub-layers: in BERT and GPT-2 that is before the
    dropout and the residual sum. Pfeiffer's variant LN(z + A(LN(z))) of post-norm models: target the norms,
    ``targets=r".*\\.\\d+\\.output\\.LayerNorm"`` in BERT. Numbers per sub-layer of width d: 2 d r + r + d.

    Paper values:
        ``rank=64``: Houlsby's code, BERT on GLUE (MRPC: lr 3e-4, batches of 32, 5 epochs); weights start
            normal with deviation 0.001 there.
        ``rank=200, init="bert"``: BART-large on XSum, as a baseline of arXiv 2110.04366, lr 5e-5 (authors'
            script).

    Limits: Not linear, so it can't be merged; it runs behind its sub-layer, not beside it.

    Keywords: Houlsby, Pfeiffer, PEFT, adapters, bottleneck, parameter-efficient fine-tuning.

    Evidence: ``test_adapters.py``, ``test_adapter_files.py``; no recipe.

    Raises:
        OptxError: an option out of range.
        TargetError: at attach, a module without linear layers.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 16))
        >>> handle = optx.attach(model, optx.SequentialAdapter(rank=4), targets="2")
        >>> sum(p.numel() for p in handle.parameters())
        148

    Source: arXiv 2110.04366, table 1; arXiv 1902.00751, section 2.1.
    """

    name: ClassVar[str] = "sequential"
    serves: ClassVar[str] = "the last Linear modules of sub-layers, or norms of post-norm models"

    position: Position = "both"

    def delta(self) -> HiddenDelta:
        """Reads the output, adds to it."""
        return self.choose(modifies=self.position, insertion="sequential", compose="add")


@dataclass(frozen=True)
class ParallelAdapter(Bottleneck):
    """A bottleneck beside a sub-layer, on its input x: h + f(x W_down) W_up.

    Args:
        rank: r, the width of the bottleneck.
        position: which sub-layer: ``"ffn"``, ``"attention"``, or ``"both"``.
        form: f: ``"relu"``, ``"gelu"``, ``"silu"``, ``"tanh"`` or ``"linear"``.
        norm: a LayerNorm on what the adapter reads (``"in"``) or adds (``"out"``), or ``"none"``.
        dropout: of the bottleneck, while training.
        init: ``"lora"``: no output changes at the start; ``"bert"``: weights normal with deviation 0.02.
        bias: biases behind W_down and W_up.

    By default it serves whole FFN modules. Where a model has none (BERT), the module that sums: what comes
    out is LN(u + FFN(u) + A(u)). Beside attention it adds to the attention module's output; in BERT that is
    the concatenated heads, before their projection. With ``form="linear"``, ``norm="none"`` and a Linear as
    its target it is LoRA with biases and can be merged.

    Paper values:
        ``norm="none", init="lora", position="ffn"``: the authors' scripts (the defaults). For widths they go
            on with the scaled form: see `optx.ScaledParallelAdapter`.

    Limits: Can be merged only with ``form="linear"`` on one Linear.

    Keywords: PEFT, adapters, bottleneck, parameter-efficient fine-tuning.

    Evidence: ``test_adapters.py``, ``test_adapter_files.py``; no recipe.

    Raises:
        OptxError: an option out of range.
        TargetError: at attach, a module without linear layers.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 16))
        >>> x = torch.randn(2, 16)
        >>> before = model(x)
        >>> handle = optx.attach(model, optx.ParallelAdapter(rank=4), targets="0")
        >>> torch.equal(model(x), before)
        True

    Source: arXiv 2110.04366, section 4.3 and table 1.
    """

    name: ClassVar[str] = "parallel"
    serves: ClassVar[str] = "sub-layers with Linear modules in them, or Linear modules"

    position: Position = "ffn"

    def delta(self) -> HiddenDelta:
        """Reads the input, adds to the output."""
        return self.choose(modifies=self.position, insertion="parallel", compose="add")


@dataclass(frozen=True)
class ScaledParallelAdapter(Bottleneck):
    """A bottleneck beside a sub-layer, scaled: h + s f(x W_down) W_up. The paper's best single method.

    Args:
        rank: r, the width of the bottleneck.
        scale: s; the paper takes 4 for summarisation and translation, 2 for GLUE. ``"learned"``: a parameter
            that starts at 1.
        position: which sub-layer: ``"ffn"``, ``"attention"``, or ``"both"``.
        form: f: ``"relu"``, ``"gelu"``, ``"silu"``, ``"tanh"`` or ``"linear"``.
        norm: a LayerNorm on what the adapter reads (``"in"``) or, before the scale, adds (``"out"``).
        dropout: of the bottleneck, while training.
        init: ``"lora"``: no output changes at the start; ``"bert"``: weights normal with deviation 0.02.
        bias: biases behind W_down and W_up; the scale is theirs too.

    It serves what `optx.ParallelAdapter` serves.

    Paper values:
        ``rank=512, scale=4.0``: BART-large on XSum, lr 5e-5, weight decay 0.01, 100,000 steps (authors'
            script).
        ``rank=16, scale=2.0``: RoBERTa-base on GLUE, within `optx.MAM` (authors' script).

    Limits: As of `optx.ParallelAdapter`. The scale multiplies W_up's gradients too, so it works as a learning
    rate.

    Keywords: PEFT, adapters, bottleneck, parameter-efficient fine-tuning.

    Evidence: ``test_adapters.py``, ``test_adapter_files.py``; within `optx.MAM`, ``optx run adapt``.

    Raises:
        OptxError: an option out of range.
        TargetError: at attach, a module without linear layers.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 16))
        >>> handle = optx.attach(model, optx.ScaledParallelAdapter(rank=4, scale=2.0), targets="0")
        >>> handle.report().rows[0].note
        'bottleneck 4, relu, parallel, scale 2'

    Source: arXiv 2110.04366, sections 4.5 and 4.6, table 1.
    """

    name: ClassVar[str] = "scaled_parallel"
    serves: ClassVar[str] = "sub-layers with Linear modules in them, or Linear modules"

    scale: float | Literal["learned"] = 4.0
    position: Position = "ffn"

    def delta(self) -> HiddenDelta:
        """Reads the input, adds to the output, scaled."""
        return self.choose(modifies=self.position, insertion="parallel", compose="scaled")
