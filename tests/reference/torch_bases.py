"""SGD, Adam and AdamW for one tensor, from the algorithm boxes of torch's documentation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Numbers = dict[str, Any]
State = dict[str, Any]


def sgd(w: Tensor, g: Tensor, state: State, n: Numbers) -> Tensor:
    """The new weight; ``state`` is changed."""
    if n.get("maximize"):
        g = -g
    g = g + n.get("weight_decay", 0.0) * w
    momentum = n.get("momentum", 0.0)
    if momentum:
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = g.clone()
        else:
            state["momentum_buffer"] = momentum * state["momentum_buffer"] + (1 - n.get("dampening", 0.0)) * g
        g = g + momentum * state["momentum_buffer"] if n.get("nesterov") else state["momentum_buffer"]
    return w - n["lr"] * g


def adam_moments(w: Tensor, g: Tensor, state: State, n: Numbers) -> Tensor:
    """Update the moments and the count; give v-hat (amsgrad: of the largest v so far)."""
    beta1, beta2 = n.get("betas", (0.9, 0.999))
    if n.get("maximize"):
        g = -g
    if not n.get("decoupled"):
        g = g + n.get("weight_decay", 0.0) * w
    for name in ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if n.get("amsgrad") else [])):
        state.setdefault(name, torch.zeros_like(w))
    state["step"] = float(state.get("step", 0.0)) + 1.0
    state["exp_avg"] = beta1 * state["exp_avg"] + (1 - beta1) * g
    state["exp_avg_sq"] = beta2 * state["exp_avg_sq"] + (1 - beta2) * g * g
    v = state["exp_avg_sq"]
    if n.get("amsgrad"):
        v = state["max_exp_avg_sq"] = torch.maximum(state["max_exp_avg_sq"], v)
    return v / (1 - beta2 ** state["step"])


def adam_move(w: Tensor, v_hat: Tensor, state: State, n: Numbers) -> Tensor:
    """The new weight, after AdamW's decay if it is AdamW."""
    beta1, _ = n.get("betas", (0.9, 0.999))
    if n.get("decoupled"):
        w = w - n["lr"] * n.get("weight_decay", 0.0) * w
    m_hat = state["exp_avg"] / (1 - beta1 ** state["step"])
    return w - n["lr"] * m_hat / (v_hat.sqrt() + n.get("eps", 1e-8))
