"""A tiny Llama, rollouts of it, and a SofT-GRPO loss written out row by row and step by step."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn

import optx

END, EOS, V = 5, 2, 40
REWARDS = [1.0, 0, 0, 1, 0, 0, 0.5, 0]
PROMPTS = [[7, 8, 9, 10], [11, 12]]  # the second is padded on the left


@functools.cache
def _weights() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(config(LlamaConfig)).eval()


def config(kind: Any, **more: Any) -> Any:
    return kind(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        tie_word_embeddings=False,
        eos_token_id=EOS,
        bos_token_id=None,
        pad_token_id=0,
        **more,
    )


def llama(dtype: torch.dtype = torch.float64) -> Any:
    import copy

    return copy.deepcopy(_weights()).to(dtype)


def thinking(model: nn.Module, **options: Any) -> Any:
    given = {"record": True, "tau": 0.1, "temperature": 1.0, "top_k": 5, "max_topk": 5, "end_id": END}
    return optx.attach(model, optx.SoftThinking(**{**given, **options}))


def rolled(model: nn.Module, group: int = 4, steps: int = 6, seed: int = 0, **options: Any) -> optx.Rollout:
    """A rollout, and the model without the hook that made it."""
    with thinking(model, **options) as handle:
        return handle.rollout(PROMPTS, group, max_new_tokens=steps, seed=seed)


def written_out(
    model: Any,
    rollout: optx.Rollout,
    *,
    reduce: str = "masked_mean",
    clamp: tuple[float, float] | None = (-1.5, 3.0),
    masks: dict[tuple[int, int], list[bool]] | None = None,
    kappa: float = 1.0,
    T: float = 1.0,
) -> dict[tuple[int, int], Tensor]:
    """The log-probability of each step that counts, without padding, masks of attention or batches."""
    E = model.get_input_embeddings().weight.detach()
    found: dict[tuple[int, int], Tensor] = {}
    for b in range(len(rollout)):
        prompt = rollout.prompts[b][rollout.prompt_mask[b]]
        count = int(rollout.mask[b].sum())
        rows = [E[prompt]]
        for t in range(count):
            y = rollout.weights[b, t].to(E.dtype)
            rows.append((y[:, None] * E[rollout.ids[b, t]]).sum(0, keepdim=True))
        z = model(inputs_embeds=torch.cat(rows)[None]).logits[0]
        for t in range(count):
            if bool(rollout.forced[b, t]):
                continue
            here = z[len(prompt) - 1 + t] / T
            if not bool(rollout.soft[b, t]):
                found[b, t] = here.log_softmax(0)[rollout.ids[b, t, 0]]
                continue
            kept = [k for k in range(rollout.ids.shape[2]) if float(rollout.kept[b, t, k]) > 0]
            p = here.softmax(0)[rollout.ids[b, t][kept]]
            share = (p / p.sum() + 1e-6).log()
            e = (rollout.gprime[b, t][kept].to(E.dtype) - share) / kappa
            if clamp:
                e = e.clamp(*clamp)
            f = -e - (-e).exp()
            if masks is not None and (b, t) not in masks:
                masks[b, t] = (share > -3).tolist()
            counts = torch.tensor(masks[b, t] if masks is not None else (share > -3).tolist())
            if reduce == "sum":
                found[b, t] = f.sum()
            else:
                found[b, t] = f[counts].mean() if bool(counts.any()) else 0 * f.sum()
    return found


def loss_written_out(
    new: dict[tuple[int, int], Tensor],
    old: dict[tuple[int, int], float],
    rewards: list[float],
    group: int,
    *,
    clip: float = 0.2,
    dual: float | None = 3.0,
    kl: float = 0.0,
    ref: dict[tuple[int, int], float] | None = None,
) -> Tensor:
    total: Any = 0.0
    for (b, t), logp in new.items():
        some = rewards[b - b % group : b - b % group + group]
        mean = sum(some) / group
        spread = math.sqrt(sum((r - mean) ** 2 for r in some) / (group - 1)) + 1e-6
        A = (rewards[b] - mean) / spread
        ratio = torch.exp(logp - old[b, t])
        bound = min(max(float(ratio.detach()), 1 - clip), 1 + clip)
        loss = -ratio * A if float(ratio.detach()) * A <= bound * A else torch.tensor(-bound * A)
        if A < 0 and dual is not None and float(loss.detach()) > -dual * A:
            loss = torch.tensor(-dual * A)
        if kl and ref is not None:
            d = ref[b, t] - logp
            loss = loss + kl * (torch.exp(d) - d - 1).clamp(max=10)
        total = total + loss
    return total / len(new)


def moved(model: nn.Module, by: float = 0.02, seed: int = 1) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += by * torch.randn(p.shape, generator=draw, dtype=p.dtype)
