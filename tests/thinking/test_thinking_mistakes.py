"""SoftThinking in hands that interrupt it, mix its records up, or name the wrong things."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from grpo_models import PROMPTS, REWARDS, V, llama, rolled, thinking
from torch import Tensor, nn

import optx
from optx.thinking._record import fingerprint
from optx.thinking.soft_grpo import SofTGRPO
from optx.thinking.soft_thinking import SoftThinking

IDS = torch.tensor([[7, 8, 9], [10, 11, 12]])


def test_a_look_up_that_fails_leaves_nothing_behind() -> None:
    model = llama()
    thinking(model)
    embedding: Any = model.get_input_embeddings()
    wanted = embedding(torch.tensor([1, 2]))
    with pytest.raises(IndexError):
        embedding((torch.tensor([[1, V]]), torch.tensor([[0.5, 0.5]])))
    assert torch.equal(embedding(torch.tensor([1, 2])), wanted)


def test_inference_mode() -> None:
    """What is made in it is trained on outside of it, and rows that begin in it go on outside."""
    model = llama()
    wanted = SofTGRPO(kl=0.0)(model, rolled(model), REWARDS)
    objective = SofTGRPO(kl=0.0, freeze_mask=True)
    with torch.inference_mode():
        rollout = rolled(model)
        known = objective.record(model, rollout.rows(slice(0, 8)))
        advantages = optx.functional.grpo_advantage(torch.tensor(REWARDS), 4)
    assert torch.equal(SofTGRPO(kl=0.0)(model, rollout, REWARDS), wanted)
    objective(model, known, advantages=advantages).backward()
    handle = thinking(model)
    with torch.inference_mode():
        handle.begin(2)
        handle.step(torch.randn(2, V))
    handle.step(torch.randn(2, V))


def test_a_rollout_goes_on_where_its_handle_stands() -> None:
    model = llama()
    handle = thinking(model, end_id=None)
    start = handle.rollout(IDS, 2, max_new_tokens=3, stop_ids=())
    state = handle.state_dict()
    assert torch.equal(handle.generate(start, max_new_tokens=2).ids[:, :3], start.ids)
    for given in ({"seed": 1}, {"thinking": False}, {"stop_ids": ()}, {"attention_mask": IDS}):
        with pytest.raises(optx.OptxError, match="goes on with its own"):
            handle.generate(start, max_new_tokens=2, **given)
    for elsewhere in (lambda: handle.rollout(IDS.flip(0), 2, max_new_tokens=3, stop_ids=()), lambda: None):
        elsewhere()
        with pytest.raises(optx.OptxError, match="does not stand at the end of this rollout"):
            handle.generate(start, max_new_tokens=2)
    handle.load_state_dict(state)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    more = handle.generate(start, max_new_tokens=2)
    with pytest.raises(optx.OptxError, match="made by other weights"):
        SofTGRPO(kl=0.0)(model, more, [1.0, 0, 1, 0])
    handle.remove()
    other = thinking(model, end_id=None, max_topk=3)
    other.load_state_dict(state)
    with pytest.raises(optx.OptxError, match="max_topk is 3, and the earlier steps were made with 5"):
        other.generate(start, max_new_tokens=2)


def test_joined_records_are_of_one_policy() -> None:
    model = llama()
    one = rolled(model, end_id=None)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    both = one.followed_by(rolled(model, end_id=None))
    with pytest.raises(optx.OptxError, match="made by other weights"):
        SofTGRPO(kl=0.0)(model, both, REWARDS)
    with pytest.raises(
        optx.OptxError, match=r"temperature is 0\.7, and the earlier steps were made with 1\.0"
    ):
        one.followed_by(rolled(model, end_id=None, temperature=0.7))


@pytest.mark.parametrize("how", ["sign", "rows", "constant"])
def test_fingerprints_of_changes_that_cancel(how: str) -> None:
    model: Any = nn.Sequential(nn.Embedding(6, 4), nn.LayerNorm(4), nn.Linear(4, 6, bias=False))
    before = fingerprint(model)
    with torch.no_grad():
        if how == "sign":
            model[2].weight.neg_()
        elif how == "rows":
            model[2].weight.copy_(model[2].weight.flip(0))
        else:
            model[1].weight.add_(0.5)
    assert fingerprint(model) != before


class Positions(nn.Module):
    """With two embeddings, as most models of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places, self.out = nn.Embedding(V, 8), nn.Embedding(32, 8), nn.Linear(8, V)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(torch.tanh(self.tokens(ids) + self.places(torch.arange(ids.shape[1]))))


def test_a_model_of_two_embeddings() -> None:
    torch.manual_seed(0)
    model = Positions().double()
    with pytest.raises(optx.TargetError, match="found 2 input embeddings"):
        thinking(model)
    options = {"record": True, "tau": 0.1, "temperature": 1.0, "top_k": 5}
    handle: Any = optx.attach(model, SoftThinking(**options), targets="tokens")  # type: ignore[arg-type]
    rollout = handle.rollout(IDS, 4, max_new_tokens=4)
    objective = SofTGRPO(kl=0.0)
    objective(model, rollout, REWARDS).backward()
    assert model.tokens.weight.grad is None
    assert model.out.weight.grad is not None
    fed = rollout.inputs(model)[:, 3:]
    wanted = (rollout.weights.double().unsqueeze(-1) * model.tokens(rollout.ids)).sum(-2)
    assert torch.allclose(fed, wanted)


@pytest.mark.parametrize("target", ["transformer.wpe", "transformer.h.0.attn.c_attn"])
def test_targets_that_are_not_the_input_embedding(target: str) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=8, n_layer=1, n_head=1, n_positions=32))
    with pytest.raises(optx.TargetError, match=r"transformer\.(wpe|h\.0\.attn\.c_attn)'"):
        optx.attach(model, SoftThinking(), targets=target)
    assert optx.attach(model, SoftThinking(), targets="transformer.wte").served


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"noise": None, "noise_clamp": (-1, 1)}, r"noise_clamp is \(-1\.0, 1\.0\) and noise None"),
        ({"noise": "dirichlet", "floor": 0.1}, r"floor is 0\.1 and noise 'dirichlet'"),
        ({"record": True, "noise_factor": 0.0}, "noise_factor 0"),
    ],
)
def test_options_that_would_be_ignored(options: dict[str, Any], words: str) -> None:
    with pytest.raises(optx.OptxError, match=words):
        SoftThinking(**options)


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ([[3, V]], {}, "generate: 40 is no token; the embedding has 40, 0 to 39"),
        ([[3, -100]], {}, "-100 is no token"),
        ([True, False], {}, "must be token ids"),
        (PROMPTS, {"stop_ids": V}, "stop_ids: 40 is no token"),
        (PROMPTS, {"stop_ids": 3.0}, r"stop_ids is 3\.0"),
        (PROMPTS, {"thinking": None}, "thinking is None"),
        (PROMPTS, {"thinking": "yes"}, "thinking is 'yes'"),
        (PROMPTS, {"seed": torch.tensor(1.5)}, r"seed is tensor\(1\.5"),
    ],
)
def test_arguments_of_a_call(prompts: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(optx.OptxError, match=words):
        thinking(llama()).generate(prompts, max_new_tokens=2, **options)


def test_numbers_as_numpy_and_tensors_have_them() -> None:
    import numpy as np

    handle = thinking(llama(), end_id=None)
    wanted = handle.generate(PROMPTS, max_new_tokens=5, seed=3, stop_ids=4)
    for one in (np.int64, torch.tensor):
        found = handle.generate(PROMPTS, max_new_tokens=5, seed=one(3), stop_ids=one(4))
        assert torch.equal(found.weights, wanted.weights)


def test_states_that_are_damaged() -> None:
    handle = thinking(llama())
    handle.begin(2)
    state = handle.state_dict()
    key = next(key for key in state if "generators" in key)
    for wrong, words in ((state[key].float(), "has dtype"), (torch.zeros_like(state[key]), "is damaged")):
        with pytest.raises(optx.FileError, match=f"'generators' of the state {words}"):
            handle.load_state_dict({**state, key: wrong})
    assert all(torch.equal(one, state[name]) for name, one in handle.state_dict().items())


def test_mixtures_that_do_not_fit() -> None:
    handle = thinking(llama())
    y = torch.full((2, 3), 1 / 3)
    with pytest.raises(optx.OptxError, match=r"soft has shape \(5,\)"):
        handle.mixed(IDS, y, torch.ones(5, dtype=torch.bool)).__enter__()
    with pytest.raises(optx.OptxError, match="mixed: 43 is no token"):
        handle.mixed(IDS + 31, y).__enter__()
    with pytest.raises(optx.OptxError, match=r"weights of row 0 .* sum"):
        handle.mixed(IDS, 3 * y).__enter__()


def test_an_encoder_is_told_that_it_cannot_generate() -> None:
    config = transformers.BertConfig(vocab_size=V, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    handle = optx.attach(transformers.BertModel(config).eval(), SoftThinking())
    with pytest.raises(
        optx.OptxError, match=r"BertModel gave no cache.* An encoder \(BERT\) has none either"
    ):
        handle.generate(IDS, max_new_tokens=2)
