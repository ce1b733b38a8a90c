"""Writes llmcompressor.json: what llmcompressor makes of a few layers. Needs ``pip install llmcompressor``.

    python tests/pruning/record_llmcompressor.py

The package pins older releases of what optx is tested with, so it is not among the test requirements; its
numbers are. Of an unstructured SparseGPT it takes one weight too many in each block of columns, which optx
doesn't: it prunes all that is at most the first score that should stay.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

FILE = Path(__file__).with_name("llmcompressor.json")
BLOCK, DAMPING = 16, 0.01
CASES = [("wanda", 0.5, None), ("wanda", 0.5, "2:4"), ("sparsegpt", 0.5, None), ("sparsegpt", 0.5, "2:4")]
LAYERS = ("linear", "conv1d", "conv2d")


def case(layer: str) -> tuple[Any, list[torch.Tensor]]:
    """A layer and batches of its inputs, by NumPy's oldest generator, which never changes."""
    draw = np.random.RandomState(len(layer))
    mixed = draw.randn(32, 32) / np.arange(1, 33)
    tokens = [torch.tensor(draw.randn(3, 9, 32) @ mixed, dtype=torch.float32) for _ in range(3)]
    weight = torch.tensor(draw.randn(12, 32), dtype=torch.float32)
    if layer == "linear":
        module: Any = nn.Linear(32, 12, bias=False)
    elif layer == "conv1d":
        from transformers.pytorch_utils import Conv1D

        module, weight = Conv1D(12, 32), weight.t().contiguous()
    else:
        module, weight = nn.Conv2d(8, 12, 2, stride=2, padding=1, bias=False), weight.view(12, 8, 2, 2)
        tokens = [batch.reshape(3, 8, 6, 6) for batch in tokens]
    module.weight.data = weight
    return module, tokens


def theirs(layer: str, method: str, sparsity: float, pattern: str | None) -> torch.Tensor:
    """The weight as llmcompressor prunes it."""
    from llmcompressor.modifiers.pruning.sparsegpt import sgpt_sparsify
    from llmcompressor.modifiers.pruning.wanda import wanda_sparsify

    module, batches = case(layer)
    n, m = map(int, pattern.split(":")) if pattern else (0, 0)
    width, count = math.prod(module.weight.shape) // 12, 0
    if method == "wanda":
        total = torch.zeros(width)
        for batch in batches:
            total, count = wanda_sparsify.accumulate_row_scalars(batch, module, total, count)
        return wanda_sparsify.sparsify_weight(module, {module: total}, sparsity, n, m)
    total = torch.zeros(width, width)
    for batch in batches:
        total, count = sgpt_sparsify.accumulate_hessian(batch, module, total, count)
    _, new = sgpt_sparsify.sparsify_weight(module, {module: total}, sparsity, n, m, BLOCK, DAMPING, False)
    return new


if __name__ == "__main__":
    rows = [
        {"layer": layer, "method": method, "sparsity": sparsity, "pattern": pattern, "weight": weight}
        for layer in LAYERS
        for method, sparsity, pattern in CASES
        for weight in [[round(x, 5) for x in theirs(layer, method, sparsity, pattern).flatten().tolist()]]
    ]
    lines = ",\n".join(map(json.dumps, rows))
    version = importlib.metadata.version("llmcompressor")
    FILE.write_text(f'{{"llmcompressor": "{version}", "rows": [\n{lines}\n]}}\n')
