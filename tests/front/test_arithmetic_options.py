"""Options of all methods: what they are if nothing is said, and the last value that is taken."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

import pytest
import torch
from torch import nn

import optx

NONE: dict[str, Any] = {}
ADAPTER = {"rank": 16, "form": "relu", "norm": "none", "dropout": 0.0, "init": "lora", "bias": True}
DARE = {"p": 0.9, "lam": 1.0, "weights": 1.0, "seed": 0, "rescale": None, "normalize": False}
PAPER = {"convention": "paper"}
HEADS = {"kv_heads": None, "head_dim": None}

# The values that the papers, PEFT, or the docstrings give; a change is one that users must be told.
DEFAULTS: dict[type, dict[str, Any]] = {
    optx.Aside: {"rank": 16, "variant": "highway", "form": "relu", "dropout": 0.0, "width": None},
    optx.BitFit: NONE,
    optx.DARELinear: DARE | PAPER,
    optx.DARETIES: DARE | PAPER,
    optx.FLoRA: {
        "rank": 8,
        "kernel_rank": None,
        "in_rank": None,
        "out_rank": None,
        "scale": 1.0,
        "dropout": 0.0,
        "init": "kaiming_rank",
    },
    optx.HiddenDelta: ADAPTER
    | HEADS
    | {"modifies": "ffn", "insertion": "parallel", "compose": "add", "scale": 1.0, "std": 0.02, "mlp": None}
    | {"method": "HiddenDelta"},
    optx.IA3: {"feedforward": None},
    optx.IAA: {"rank": 16, "aside": 16, "variant": "highway", "form": "relu", "dropout": 0.0},
    optx.LoRA: {
        "rank": 8,
        "alpha": 16.0,
        "dropout": 0.0,
        "rslora": False,
        "dora": False,
        "bias": "none",
        "lora_bias": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "init": "kaiming",
    },
    optx.MAM: {"prefix": 16, "rank": 16, "scale": 2.0, "mlp": None, "dropout": 0.0},
    optx.MultiHeadParallelAdapter: {"rank": 16, "form": "relu", "dropout": 0.0, "init": "lora"} | HEADS,
    optx.PCB: {"ratio": 0.1, "lam": 1.0, "score": "code", "inter": "sum", "clip": 1e-4, "scope": "global"},
    optx.ParallelAdapter: ADAPTER | {"position": "ffn"},
    optx.PrefixTuning: {"length": 16, "mlp": None, "std": 0.02} | HEADS,
    optx.SVFit: {"rank": None, "energy": None},
    optx.ScaledParallelAdapter: ADAPTER | {"scale": 4.0, "position": "ffn"},
    optx.SequentialAdapter: ADAPTER | {"position": "both"},
    optx.TIES: {"density": 0.2, "lam": 1.0, "weights": 1.0, "scope": None, "normalize": True} | PAPER,
    optx.TaskArithmetic: {"lam": 1.0, "weights": 1.0, "normalize": False},
}


@pytest.mark.parametrize("kind", DEFAULTS, ids=lambda kind: kind.__name__)
def test_defaults(kind: Any) -> None:
    there = {
        f.name: f.default if f.default is not MISSING else f.default_factory()  # type: ignore[misc]
        for f in fields(kind)
    }
    assert there == DEFAULTS[kind]


SCALED = {"compose": "scaled"}
GATED = {"compose": "gated", "form": "softmax", "modifies": "heads"}
SHARE, COUNT, POSITIVE = (0.0, 1.0), (1, None), (0.0, None)

# Method, option, the first and the last value that are taken (None: any), and what it needs beside it.
RANGES: list[tuple[Any, str, tuple[Any, Any], dict[str, Any]]] = [
    (optx.LoRA, "rank", COUNT, NONE),
    (optx.LoRA, "alpha", POSITIVE, NONE),
    (optx.LoRA, "dropout", SHARE, NONE),
    (lambda number: optx.LoRA(rank_pattern={"x": number}), "number", COUNT, NONE),
    (lambda number: optx.LoRA(alpha_pattern={"x": number}), "number", POSITIVE, NONE),
    (optx.FLoRA, "rank", COUNT, NONE),
    (optx.FLoRA, "in_rank", COUNT, NONE),
    (optx.FLoRA, "out_rank", COUNT, NONE),
    (optx.FLoRA, "kernel_rank", COUNT, NONE),
    (optx.FLoRA, "scale", POSITIVE, NONE),
    (optx.FLoRA, "dropout", SHARE, NONE),
    (optx.SVFit, "rank", COUNT, NONE),
    (optx.SVFit, "energy", SHARE, NONE),
    (optx.MAM, "prefix", COUNT, NONE),
    (optx.Aside, "rank", COUNT, NONE),
    (optx.Aside, "dropout", SHARE, {"variant": "layerwise"}),
    (optx.Aside, "width", COUNT, NONE),
    (optx.IAA, "aside", COUNT, NONE),
    (optx.PrefixTuning, "length", COUNT, NONE),
    (optx.HiddenDelta, "rank", COUNT, NONE),
    (optx.HiddenDelta, "dropout", SHARE, NONE),
    (optx.HiddenDelta, "std", POSITIVE, {"init": "bert"}),
    (optx.HiddenDelta, "mlp", COUNT, GATED),
    (optx.HiddenDelta, "kv_heads", COUNT, {"modifies": "heads"}),
    (optx.HiddenDelta, "head_dim", COUNT, {"modifies": "heads"}),
    (optx.TIES, "density", SHARE, NONE),
    (optx.DARELinear, "p", (0.0, 1.0 - 1e-9), NONE),
    (optx.PCB, "ratio", (1e-12, 1), NONE),
    (optx.PCB, "clip", (0, 0.49), NONE),
    (optx.ComPEFT, "density", (1e-9, 1.0), NONE),
    (optx.ComPEFT, "alpha", POSITIVE, NONE),
    (optx.AdamR, "weight", POSITIVE, NONE),
    (optx.LDLT, "L", (1e-30, None), NONE),
    (optx.PSDFactor, "rank", COUNT, NONE),
    (optx.Softmax2, "min_row", COUNT, NONE),
    (optx.PSDFactor, "alpha", (1e-30, None), NONE),
    *((optx.SoftThinking, one, (1e-30, None), NONE) for one in ("tau", "alpha", "temperature")),
    *((optx.SoftThinking, one, (1e-30, 1.0), NONE) for one in ("top_p", "after_top_p")),
    *((optx.SoftThinking, one, SHARE, NONE) for one in ("min_p", "after_min_p")),
    *((optx.SoftThinking, one, POSITIVE, NONE) for one in ("noise_factor", "floor", "cold_entropy")),
    *((optx.SoftThinking, one, (0, None), NONE) for one in ("top_k", "after_top_k", "end_id")),
    *((optx.SoftThinking, one, COUNT, {"end_id": 3}) for one in ("max_topk", "cold_stop")),
    (optx.SubGM, "eta0", (1e-30, None), NONE),
    (optx.SubGM, "rho", (1e-30, 1.0), NONE),
    (optx.DSPReg, "weight", POSITIVE, {"domains": 2}),
    (optx.DSPReg, "ema", SHARE, {"domains": 2}),
    (optx.DSPReg, "warmup", POSITIVE, {"domains": 2}),
    (optx.DSPReg, "eps", (1e-30, None), {"domains": 2}),
    (optx.DSPReg, "domains", COUNT, NONE),
    (lambda number: optx.DSPReg(2, min_dim=number), "number", (0, None), NONE),
]


@pytest.mark.parametrize(
    ("method", "option", "ends", "beside"),
    RANGES,
    ids=[f"{getattr(r[0], '__name__', '')}-{r[1]}" for r in RANGES],
)
def test_the_ends_of_a_range_are_taken_and_no_more(
    method: Any, option: str, ends: tuple[Any, Any], beside: dict[str, Any]
) -> None:
    low, high = ends
    method(**{option: low}, **beside)
    for refused in (low - 1, low - 1e-3 if isinstance(low, float) else low - 1):
        with pytest.raises(optx.OptxError):
            method(**{option: refused}, **beside)
    if high is not None:
        method(**{option: high}, **beside)
        with pytest.raises(optx.OptxError):
            method(**{option: high + 1e-3}, **beside)
    else:
        method(**{option: 10**6}, **beside)


def test_smoothing_is_a_share() -> None:
    z, y = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)
    for smoothing in (0.0, 1.0):
        optx.stablemax_cross_entropy(z, y, label_smoothing=smoothing)
    for smoothing in (-1e-3, 1.001):
        with pytest.raises(optx.OptxError, match="label_smoothing"):
            optx.stablemax_cross_entropy(z, y, label_smoothing=smoothing)


def test_counts_that_functions_take() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)))
    assert optx.shallowest(model, 1) == ["0.weight", "0.bias"]
    with pytest.raises(optx.OptxError, match="count"):
        optx.shallowest(model, 0)
