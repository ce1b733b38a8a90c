"""`optx.SofTGRPO` in TRL's GRPOTrainer: its loss of a batch of tokens, and a model that thinks softly."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import optx

pytest.importorskip("trl")

from trainer_runs import adapted, tokenizer
from trl import GRPOConfig, GRPOTrainer
from trl_runs import config, texts

from optx.functional import grpo_advantage
from optx.thinking._recorded import Recorded

pytestmark = pytest.mark.usefixtures("one_thread")
TENSORS = [one.name for one in fields(optx.Rollout) if one.name not in ("group", "policy", "options")]
END = 9


def words(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(text.split()))) for text in completions]


class SoftTrainer(GRPOTrainer):
    """TRL's trainer, whose rollouts are `optx.SoftThinking`'s and whose loss is `optx.SofTGRPO`.

    TRL repeats prompts, decodes, rewards, makes advantages, shuffles and splits batches as ever. A
    ``rollout_func`` would not do: what it returns besides tokens goes to the rewards alone, not to the loss.
    """

    def __init__(self, thinking: Any, objective: optx.SofTGRPO, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.thinking, self.objective = thinking, objective

    def _generate_single_turn(self, prompt_ids: Any, *_: Any, **__: Any) -> tuple[list[list[int]], None]:
        made = self.thinking.generate(prompt_ids, max_new_tokens=self.max_completion_length, seed=self._step)
        self.rolled = replace(made, group=self.num_generations)
        return [row[there].tolist() for row, there in zip(made.tokens, made.mask, strict=True)], None

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        known = self.objective.record(self.model, self.rolled)
        more = {f"optx.{name}": getattr(self.rolled, name) for name in TENSORS}
        found = {"optx.logp": known.logp, "optx.counted": known.mask, "optx.reference": known.reference}
        return output | more | {name: one for name, one in found.items() if one is not None}

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        rollout = replace(self.rolled, group=1, **{name: inputs[f"optx.{name}"] for name in TENSORS})
        known = Recorded(
            rollout, inputs["optx.logp"], inputs["optx.counted"], inputs.get("optx.reference"), 1
        )
        loss = self.objective(model, known, advantages=inputs["advantages"])
        self._metrics["train"]["kl"].append(self.objective.report()["kl"])
        return loss / self.current_gradient_accumulation_steps


def trainer(kind: Any, folder: Path, *before: Any, model: Any, **options: Any) -> Any:
    given = {"num_generations": 2, "max_completion_length": 6, "save_strategy": "no", **options}
    return kind(
        *before,
        model=model,
        reward_funcs=words,
        args=config(GRPOConfig, folder, **given),
        train_dataset=texts(8, prompt=None),
        processing_class=tokenizer(),
    )


@pytest.mark.parametrize("kl", [0.0, 0.3])
@pytest.mark.parametrize("apart", [0.0, 0.05])
def test_of_tokens_it_is_trls_loss(apart: float, kl: float, tmp_path: Path) -> None:
    """With loss_type="bnpo" (the mean over steps) and delta=3 (its second clip); gradients too."""
    model, handle = adapted()
    optx.trainable_only(model, handle)
    plain = {"use_bias_correction_kl": False}
    made = trainer(GRPOTrainer, tmp_path, model=model, loss_type="bnpo", beta=0.0, delta=3.0, **plain)
    made.beta, made.current_gradient_accumulation_steps = kl, 1  # by an argument it would look for a hub
    model = made.model.eval()
    prompts = [[5, 6, 7, 8], [9, 10]]
    with optx.attach(model, optx.SoftThinking(record=True, tau=0.1, temperature=1.0, top_k=0)) as thinking:
        rollout = thinking.rollout(prompts, 4, max_new_tokens=6, thinking=False)
    objective = optx.SofTGRPO(kl=kl)
    known = objective.record(model, rollout)
    with torch.no_grad():
        for p in handle.parameters():
            p += apart * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    rewards = torch.arange(8.0) % 3
    loss = objective(model, known, rewards)
    inputs: dict[str, Any] = {
        "prompt_ids": rollout.prompts,
        "prompt_mask": rollout.prompt_mask.long(),
        "completion_ids": rollout.tokens,
        "completion_mask": rollout.mask.long(),
        "advantages": grpo_advantage(rewards, 4),
        "old_per_token_logps": known.logp,
        "num_items_in_batch": rollout.mask.sum(),
    }
    if kl:
        inputs["ref_per_token_logps"] = known.reference
    theirs = made._compute_loss(model, inputs)
    torch.testing.assert_close(loss, theirs, rtol=1e-5, atol=1e-6)
    own = list(handle.parameters())
    for one, other in zip(torch.autograd.grad(loss, own), torch.autograd.grad(theirs, own), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_trl_trains_a_model_that_thinks_softly(tmp_path: Path) -> None:
    model, handle = adapted()
    optx.trainable_only(model, handle)
    options = optx.SoftThinking(record=True, tau=0.1, temperature=1.0, top_k=5, max_topk=5, end_id=END)
    before = [p.detach().clone() for p in handle.parameters()]
    with optx.attach(model, options) as thinking:
        made = trainer(
            SoftTrainer,
            tmp_path,
            thinking,
            optx.SofTGRPO(kl=1e-3),
            model=model,
            beta=0.0,
            num_iterations=2,
            gradient_accumulation_steps=2,
        )
        made.train()
        assert bool(made.rolled.soft.any())
    rows = [row for row in made.state.log_history if "loss" in row]
    assert len(rows) == 4
    assert [row["reward"] > 0 for row in rows if "reward" in row] == [
        True,
        True,
    ]  # each rollout serves two steps
    assert all(row["kl"] > 0 for row in rows[1:])
    assert any(not torch.equal(p, q) for p, q in zip(handle.parameters(), before, strict=True))
