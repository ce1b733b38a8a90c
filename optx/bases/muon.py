"""torch's Muon, which has no rules: its update is made of products of whole matrices."""

from __future__ import annotations

from typing import Any

import torch

from optx.step.bases import register_base
from optx.step.transform import Group


def muon(group: Group, base: Any) -> str:
    """Why there are none."""
    return "Muon's update multiplies whole matrices, which no rule per element can say; its own step does it"


register_base(torch.optim.Muon, muon)
