"""Masks and weights against those that llmcompressor gave the same layers; see record_llmcompressor.py."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from record_llmcompressor import BLOCK, DAMPING, FILE, case

import optx

ROWS: list[dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))["rows"]


@pytest.mark.parametrize("row", ROWS, ids=lambda r: f"{r['layer']}-{r['method']}-{r['pattern']}")
def test_layers_are_pruned_as_llmcompressor_prunes_them(row: dict[str, Any]) -> None:
    module, batches = case(row["layer"])
    method: Any = optx.Wanda(row["sparsity"], row["pattern"])
    if row["method"] == "sparsegpt":
        method = optx.SparseGPT(row["sparsity"], row["pattern"], damping=DAMPING, block=BLOCK)
    masks = optx.prune(module, method, batches)
    theirs = torch.tensor(row["weight"]).view(module.weight.shape)
    differ = int((masks["weight"] != (theirs != 0)).sum())
    if row["method"] == "sparsegpt" and row["pattern"] is None:
        blocks = 32 // BLOCK
        assert int((theirs == 0).sum()) == int((~masks["weight"]).sum()) + blocks  # one too many in each
        assert differ <= 3 * blocks
    else:
        assert differ == 0
        torch.testing.assert_close(module.weight.detach(), theirs, rtol=0, atol=1e-4)
