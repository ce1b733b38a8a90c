"""What `SofTGRPO` refuses, warns of, and forgets."""

from __future__ import annotations

import gc
import warnings
from typing import Any

import pytest
import torch
from grpo_models import REWARDS, V, llama, moved, rolled
from torch import nn

import optx


def test_a_rollout_of_other_weights() -> None:
    model = llama()
    rollout = rolled(model)
    moved(model)
    objective = optx.SofTGRPO(kl=0.0)
    for call in (lambda: objective(model, rollout, REWARDS), lambda: objective.record(model, rollout)):
        with pytest.raises(optx.OptxError, match=r"made by other weights.*objective.record"):
            call()


def test_a_rollout_is_forgotten_with_its_last_reference() -> None:
    model = llama()
    objective = optx.SofTGRPO(kl=0.0)
    rollout = rolled(model)
    objective(model, rollout, REWARDS)
    assert len(objective._known) == 1
    del rollout
    gc.collect()
    assert len(objective._known) == 0


def test_a_model_of_fewer_tokens() -> None:
    rollout = rolled(llama())
    object.__setattr__(rollout, "policy", "")
    rollout.ids[0, 0, 0] = V
    with pytest.raises((optx.OptxError, IndexError), match=r"of another model|out of range"):
        optx.SofTGRPO(kl=0.0)(llama(), rollout, REWARDS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 0.25}, "tau is 0.25, and the rollout was made with tau=0.1"),
        ({"rewards": REWARDS[:4]}, r"rewards have shape \(4,\); the rollout has 8 rows"),
        ({"rewards": [*REWARDS[:7], float("nan")]}, r"rewards\[7\] is nan"),
        ({"rewards": None}, "give rewards or advantages"),
        ({"advantages": torch.zeros(8)}, "give rewards or advantages"),
        ({"rewards": None, "advantages": torch.zeros(3)}, r"advantages have shape \(3,\)"),
        ({"rewards": None, "advantages": torch.full((8,), torch.inf)}, "must be finite"),
    ],
)
def test_mistakes_of_a_call(options: dict[str, Any], message: str) -> None:
    model = llama()
    rollout = rolled(model)
    objective = optx.SofTGRPO(tau=options.pop("tau", 0.1), kl=0.0)
    given = {"rewards": REWARDS, **options}
    with pytest.raises(optx.OptxError, match=message):
        objective(model, rollout, **given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 0.0}, "tau is 0.0"),
        ({"clip": -0.1}, "clip is -0.1"),
        ({"kl": -1.0}, "kl is -1.0"),
        ({"reduce": "mean"}, "reduce is 'mean'"),
        ({"dual_clip": 0.5}, "dual_clip is 0.5"),
        ({"freeze_mask": "yes"}, "freeze_mask is 'yes'"),
        ({"noise_clamp": (1.0, 3.0)}, "noise_clamp is"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(optx.OptxError, match=message):
        optx.SofTGRPO(**options)


def test_noise_without_a_density_frozen_models_and_padding_without_a_mask() -> None:
    model = llama()
    rollout = rolled(model, noise="dirichlet", record=False)
    with pytest.raises(optx.OptxError, match="noise='dirichlet', which has no such density"):
        optx.SofTGRPO(kl=0.0)(model, rollout, REWARDS)
    model.requires_grad_(False)
    with pytest.raises(optx.OptxError, match="no gradient leads"):
        optx.SofTGRPO(kl=0.0)(model, rolled(model), REWARDS)
    bare = nn.Sequential(nn.Embedding(V, 8), nn.Linear(8, V))
    with pytest.raises(optx.OptxError, match="has no attention_mask"):
        optx.SofTGRPO(kl=0.0)(bare, _unmarked(rolled(model)), REWARDS)


def _unmarked(rollout: optx.Rollout) -> optx.Rollout:
    object.__setattr__(rollout, "policy", "")
    return rollout


def test_what_teaches_nothing_is_told_once() -> None:
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    rollout = rolled(model, top_k=30, max_topk=30, top_p=1.0, end_id=None)
    objective = optx.SofTGRPO(kl=0.0)
    with pytest.warns(UserWarning, match="no token has a share above"):
        objective(model, rollout, REWARDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        objective(model, rollout, REWARDS)
    assert objective.report()["empty"] == 1
    single = rolled(model, group=1)
    with pytest.warns(UserWarning, match="group is 1"):
        optx.SofTGRPO(kl=0.0)(model, single, [1.0, 0.0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "handle"}, r"model is a ThinkingHandle; it must be the policy"),
        ({"rollout": torch.zeros(8, 2)}, "rollout is a Tensor; it must be what"),
        ({"rewards": ["a"] * 8}, r"rewards are .* they must be numbers"),
        ({"rewards": [None] * 8}, r"rewards are .* they must be numbers"),
        ({"rewards": None, "advantages": "no"}, "advantages are 'no'; they must be numbers"),
        ({"ref_model": "policy"}, "ref_model is the policy itself"),
        ({"ref_model": 3}, "ref_model is 3; it must be a model"),
    ],
)
def test_arguments_of_another_kind(change: dict[str, Any], message: str) -> None:
    model = llama()
    given: dict[str, Any] = {"model": model, "rollout": rolled(model), "rewards": REWARDS, **change}
    if given["model"] == "handle":
        given["model"] = optx.attach(model, optx.SoftThinking())
    if given.get("ref_model") == "policy":
        given["ref_model"] = model
    with pytest.raises(optx.OptxError, match=message):
        optx.SofTGRPO(kl=1.0)(**given)


def test_rows_of_records() -> None:
    model = llama()
    rollout, objective = rolled(model), optx.SofTGRPO(kl=0.0)
    known = objective.record(model, rollout)
    advantages = torch.arange(8.0).tolist()
    wanted = objective(model, known.rows(slice(3, 4)), advantages=advantages[3:4])
    for one in (3, [3], -5, torch.tensor([i == 3 for i in range(8)])):
        assert torch.equal(objective(model, known.rows(one), advantages=advantages[3:4]), wanted)
    for wrong in (8, [0.5], [[1]], [True] * 7):
        with pytest.raises(optx.OptxError, match="rows: index"):
            known.rows(wrong)
    with pytest.raises(optx.OptxError, match="the rollout has no steps"):
        objective(model, rollout.rows([]), [])
    with pytest.raises(optx.OptxError, match="ref_model was given with a record"):
        objective(model, known, REWARDS, llama())
    for size in (0, 0.5):
        with pytest.raises(optx.OptxError, match="record: batch_size is 0"):
            objective.record(model, rollout, batch_size=size)


def test_numbers_that_are_none_are_seen_and_large_rewards_keep_their_digits() -> None:
    gprime = torch.tensor([[1.0, torch.nan, 2.0]])
    assert optx.functional.soft_logprob(torch.zeros(1, 5), torch.arange(3)[None], gprime).isnan().all()
    found = optx.functional.grpo_advantage(torch.tensor([1e8 + 8, 1e8, 1e8, 1e8]), 4)
    torch.testing.assert_close(found, torch.tensor([1.5, -0.5, -0.5, -0.5]))
