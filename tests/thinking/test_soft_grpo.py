"""`optx.SofTGRPO` on a tiny Llama against a loss written out step by step; references and batches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from grpo_models import (
    END,
    PROMPTS,
    REWARDS,
    V,
    llama,
    loss_written_out,
    moved,
    rolled,
    thinking,
    written_out,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import optx
from optx.functional import grpo_advantage


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(named.items(), found, strict=True)
    }


def plain(logp: dict[Any, Tensor]) -> dict[Any, float]:
    return {at: float(one.detach()) for at, one in logp.items()}


def close(one: dict[str, Tensor], other: dict[str, Tensor], **options: Any) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], **options)


# ---- the loss and its gradient --------------------------------------------------------------------------


def test_the_first_loss_is_the_mean_advantage_and_its_gradient_is_reinforce() -> None:
    model = llama()
    rollout = rolled(model)
    assert bool(rollout.soft.any())
    assert bool(rollout.discrete.any())
    objective = optx.SofTGRPO(kl=0.0)
    loss = objective(model, rollout, REWARDS)
    advantages = grpo_advantage(torch.tensor(REWARDS, dtype=torch.float64), 4)
    logp = written_out(model, rollout)
    wanted = sum(-advantages[b] for b, _ in logp) / len(logp)
    torch.testing.assert_close(loss, wanted, rtol=0, atol=1e-7)
    assert objective.report()["ratio"] == objective.report()["ratio_max"] == 1
    reinforce = sum(-advantages[b] * one for (b, _), one in logp.items()) / len(logp)
    close(gradients(model, loss), gradients(model, reinforce), rtol=1e-5, atol=1e-8)  # norms are in float32


@settings(max_examples=8)
@given(data=st.data())
def test_any_update_is_the_loss_written_out(data: st.DataObject) -> None:
    reduce = data.draw(st.sampled_from(["masked_mean", "sum"]))
    clamp = data.draw(st.sampled_from([(-1.5, 3.0), None]))
    frozen, kl = data.draw(st.booleans()), data.draw(st.sampled_from([0.0, 0.5]))
    clip, dual = data.draw(st.sampled_from([(0.2, 3.0), (0.02, 1.05), (0.5, None)]))
    drawn = {
        "noise_factor": data.draw(st.sampled_from([1.0, 0.5])),
        "temperature": data.draw(st.sampled_from([1.0, 0.7])),
        "top_p": data.draw(st.sampled_from([0.95, 0.6, 1.0])),
    }
    seed = data.draw(st.integers(0, 99))
    model = llama()
    rollout = rolled(model, seed=seed, **drawn)
    start = copy.deepcopy(model)
    objective = optx.SofTGRPO(
        kl=kl, clip=clip, dual_clip=dual, reduce=reduce, freeze_mask=frozen, noise_clamp=clamp
    )
    how = {"reduce": reduce, "clamp": clamp, "kappa": drawn["noise_factor"], "T": drawn["temperature"]}
    masks: dict[Any, Any] = {}
    old = plain(written_out(start, rollout, **how, masks=masks))
    kept = masks if frozen else None
    moved(start, by=0.01, seed=seed)  # the reference is another policy
    ref = plain(written_out(start, rollout, **how, masks=kept)) if kl else None
    first = objective(model, rollout, REWARDS, start)
    new = written_out(model, rollout, **how, masks=kept)
    torch.testing.assert_close(
        first,
        loss_written_out(new, old, REWARDS, 4, clip=clip, dual=dual, kl=kl, ref=ref),
        atol=1e-6,
        rtol=1e-6,
    )
    moved(model, seed=seed + 1)
    second = objective(model, rollout, REWARDS, start)
    new = written_out(model, rollout, **how, masks=kept)
    wanted = loss_written_out(new, old, REWARDS, 4, clip=clip, dual=dual, kl=kl, ref=ref)
    torch.testing.assert_close(second, wanted, rtol=1e-6, atol=1e-6)
    close(gradients(model, second), gradients(model, wanted), rtol=1e-5, atol=1e-6)


def test_the_sum_is_the_density_and_noise_at_the_start_is_what_was_drawn() -> None:
    """In float64 the recorded g' less the log shares is Gumbel noise between its rails, to rounding."""
    model = llama()
    rollout = rolled(model, top_p=0.8)
    seen: list[Tensor] = []
    E = model.get_input_embeddings().weight
    for b, t in rollout.soft.nonzero().tolist():
        prompt = rollout.prompts[b][rollout.prompt_mask[b]]
        mixes = (rollout.weights[b, :t, :, None].double() * E[rollout.ids[b, :t]]).sum(1)
        z = model(inputs_embeds=torch.cat([E[prompt], mixes])[None]).logits[0, -1]
        kept = rollout.kept[b, t] > 0
        p = z.softmax(0)[rollout.ids[b, t][kept]]
        seen.append(rollout.gprime[b, t][kept].double() - (p / p.sum() + 1e-6).log())
    noise = torch.cat(seen).detach()
    assert bool(((noise > -1.5 - 1e-5) & (noise < 3 + 1e-5)).all())
    assert abs(float(noise.mean()) - 0.5772) < 0.25


def test_embeddings_learn_nothing_as_inputs_and_tied_heads_do_as_heads() -> None:
    model = llama()
    objective = optx.SofTGRPO(kl=0.0)
    objective(model, rolled(model), REWARDS).backward()
    assert model.model.embed_tokens.weight.grad is None
    assert all(p.grad is not None for n, p in model.named_parameters() if "embed" not in n)
    tied = llama()
    tied.lm_head.weight = tied.model.embed_tokens.weight
    rollout = rolled(tied)
    found = gradients(tied, objective(tied, rollout, REWARDS))["model.embed_tokens.weight"]
    apart = copy.deepcopy(tied)
    apart.lm_head.weight = nn.Parameter(tied.model.embed_tokens.weight.detach().clone())
    fresh = optx.SofTGRPO(kl=0.0)
    known = fresh.record(tied, rollout)
    wanted = gradients(apart, fresh(apart, known, REWARDS))
    torch.testing.assert_close(found, wanted["lm_head.weight"])


def test_small_tau_feeds_the_heaviest_token() -> None:
    model = llama()
    rollout = rolled(model, tau=1e-4)
    fed = rollout.inputs(model)
    assert torch.allclose(fed, model.get_input_embeddings()(rollout.sequences), atol=1e-6)


def test_discrete_rollouts_make_ordinary_grpo() -> None:
    """Token log-probabilities by one ordinary call of the model with ids."""
    model = llama()
    with thinking(model) as handle:
        rollout = handle.rollout(PROMPTS, 4, max_new_tokens=6, thinking=False)
    assert not bool(rollout.soft.any())
    objective = optx.SofTGRPO(kl=0.0)
    objective(model, rollout, REWARDS)
    moved(model, 0.05)
    found = objective(model, rollout, REWARDS)
    P = rollout.prompts.shape[1]
    out = model(rollout.sequences, attention_mask=rollout.attention_mask, position_ids=rollout.position_ids)
    logp = out.logits[:, P - 1 : -1].log_softmax(-1).gather(-1, rollout.tokens[..., None])[..., 0]
    old = objective._known[rollout].logp
    ratio = (logp - old).exp()
    A = grpo_advantage(torch.tensor(REWARDS, dtype=torch.float64), 4)[:, None]
    each = -torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A)
    wanted = each[rollout.mask].mean()
    torch.testing.assert_close(found, wanted, atol=1e-7, rtol=1e-6)
    E = model.get_input_embeddings().weight
    E.requires_grad_(False)  # by ids it is trained as an input too
    close(gradients(model, found), gradients(model, wanted), rtol=1e-5, atol=1e-8)


# ---- batches --------------------------------------------------------------------------------------------


def test_padding_changes_nothing() -> None:
    model = llama()
    rollout = rolled(model)
    objective = optx.SofTGRPO(kl=0.0)
    known = objective.record(model, rollout)
    short = rollout.rows(slice(4, 8))
    cut = int((~short.prompt_mask[0]).sum())
    from dataclasses import replace

    narrow = replace(short, prompts=short.prompts[:, cut:], prompt_mask=short.prompt_mask[:, cut:])
    alone = objective.record(model, narrow)
    at = narrow.actions
    torch.testing.assert_close(alone.logp[at], known.logp[4:][at], rtol=0, atol=1e-10)


def test_mini_batches_of_a_record() -> None:
    """Their losses, weighted by their steps, are the whole batch's; parts of groups take advantages."""
    model = llama()
    rollout = rolled(model)
    objective = optx.SofTGRPO(kl=0.0)
    known = objective.record(model, rollout, batch_size=3)
    moved(model)
    whole = objective(model, known, REWARDS)
    halves = [slice(0, 4), slice(4, 8)]
    parts = [objective(model, known.rows(i), REWARDS[i]) for i in halves]
    counts = [int(rollout.actions[i].sum()) for i in halves]
    both = sum(loss * n for loss, n in zip(parts, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(both, whole)
    advantages = grpo_advantage(torch.tensor(REWARDS, dtype=torch.float64), 4)
    odd = [objective(model, known.rows([i]), advantages=advantages[[i]]) for i in range(8)]
    counts = rollout.actions.sum(1).tolist()
    torch.testing.assert_close(sum(a * n for a, n in zip(odd, counts, strict=True)) / sum(counts), whole)
    wide = advantages[:, None].expand(rollout.mask.shape)
    torch.testing.assert_close(objective(model, known, advantages=wide), whole)
    with pytest.raises(optx.OptxError, match=r"not whole groups of 4.*advantages="):
        objective(model, known.rows([0, 1]), [1.0, 0.0])


def test_forced_ends_are_no_actions() -> None:
    model = llama()
    rollout = rolled(model, cold_stop=2, cold_entropy=1.0)
    assert bool(rollout.forced.any())
    objective = optx.SofTGRPO(kl=0.0)
    loss = objective(model, rollout, REWARDS)
    logp = written_out(model, rollout)
    assert len(logp) == int(rollout.actions.sum()) < int(rollout.mask.sum())
    torch.testing.assert_close(loss, loss_written_out(logp, plain(logp), REWARDS, 4), atol=1e-6, rtol=1e-6)


def test_a_temperature_of_its_own_after_thinking() -> None:
    model = llama()
    rollout = rolled(model, after_temperature=0.5, steps=8)
    known = optx.SofTGRPO(kl=0.0).record(model, rollout)
    warm, cool = (written_out(model, rollout, T=T) for T in (1.0, 0.5))
    seen = set()
    for b, t in warm:
        first = (
            bool(rollout.soft[b, t])
            or int(rollout.tokens[b, t]) == END
            or (t and bool(rollout.soft[b, t - 1]))
        )
        seen.add((bool(rollout.soft[b, t]), bool(first)))
        wanted = (warm if first else cool)[b, t]
        assert float(known.logp[b, t]) == pytest.approx(float(wanted.detach()), abs=1e-6)
    assert seen == {(True, True), (False, True), (False, False)}


def test_a_row_that_thinking_ends_at_once() -> None:
    """Its only step was drawn while it thought, though no mixture says so."""
    model = llama()
    with thinking(model, after_temperature=0.5) as handle:
        rollout = handle.generate(PROMPTS[:1], max_new_tokens=1, stop_ids=[n for n in range(V) if n != END])
    assert not bool(rollout.soft.any())
    assert bool(rollout.thought.all())
    [logp] = optx.SofTGRPO(kl=0.0).record(model, rollout).logp.flatten().tolist()
    wanted = model(torch.tensor(PROMPTS[:1])).logits[0, -1].log_softmax(-1)[rollout.tokens[0, 0]]
    assert logp == pytest.approx(float(wanted.detach()), abs=1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model = llama()
    rollout = rolled(model)
    model.train()
    wanted = gradients(model, optx.SofTGRPO(kl=0.0)(model, rollout, REWARDS))
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    model.zero_grad()
    optx.SofTGRPO(kl=0.0)(model, rollout, REWARDS).backward()
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    close(found, wanted)


@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_half_precision(how: str) -> None:
    exact = llama(torch.float32)
    model = llama(torch.bfloat16 if how == "bfloat16" else torch.float32)
    rollout = rolled(exact)
    object.__setattr__(rollout, "policy", "")
    objective = optx.SofTGRPO(kl=0.0)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        loss = objective(model, rollout, REWARDS)
    assert loss.dtype == torch.float32
    assert objective.report()["ratio_max"] == 1
    wanted = gradients(exact, optx.SofTGRPO(kl=0.0)(exact, rollout, REWARDS))
    found = gradients(model, loss)
    cosine = torch.cosine_similarity(
        torch.cat([g.float().flatten() for g in found.values()]),
        torch.cat([g.flatten() for g in wanted.values()]),
        dim=0,
    )
    assert float(cosine) > 0.97


# ---- references -----------------------------------------------------------------------------------------


def adapted(model: nn.Module) -> Any:
    torch.manual_seed(3)
    handle = optx.attach(model, optx.LoRA(rank=2), r".*\.(q|v)_proj")
    optx.trainable_only(model, handle)
    moved(model)
    return handle


@pytest.mark.parametrize("given", ["handle", "nothing", "copy"])
def test_the_reference_is_the_model_without_its_adapters(given: str) -> None:
    model = llama()
    before = copy.deepcopy(model)
    handle = adapted(model)
    rollout = rolled(model)
    objective = optx.SofTGRPO(kl=1.0)
    reference = {"handle": handle, "nothing": None, "copy": before}[given]
    flags = [(n, m.training) for n, m in model.named_modules()]
    loss = objective(model, rollout, REWARDS, reference)
    assert flags == [(n, m.training) for n, m in model.named_modules()]
    assert all(one.part.enabled for one in handle.served)
    logp, ref = written_out(model, rollout), plain(written_out(before, rollout))
    wanted = loss_written_out(logp, plain(logp), REWARDS, 4, kl=1.0, ref=ref)
    torch.testing.assert_close(loss, wanted, atol=1e-6, rtol=1e-6)
    close(gradients(model, loss), gradients(model, wanted), rtol=1e-5, atol=1e-7)
    assert objective.report()["kl"] > 0


def test_peft_adapters_are_disabled_for_the_reference() -> None:
    peft = pytest.importorskip("peft")
    model = llama(torch.float32)
    before = copy.deepcopy(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    moved(wrapped, 0.1)
    rollout = rolled(wrapped)
    objective = optx.SofTGRPO(kl=1.0)
    objective(wrapped, rollout, REWARDS).backward()
    ref = written_out(before, rollout)
    for (b, t), one in ref.items():
        known = objective._known[rollout].reference
        assert known is not None
        assert float(known[b, t]) == pytest.approx(float(one.detach()), abs=1e-4)


def test_modules_trained_whole_have_their_own_values_in_the_reference() -> None:
    model = llama()
    before = copy.deepcopy(model)
    handle = optx.attach(model, optx.LoRA(rank=2), r".*\.q_proj", modules_to_save=["lm_head"])
    optx.trainable_only(model, handle)
    moved(model, 0.1)
    now = model.lm_head.weight.detach().clone()
    rollout = rolled(model)
    objective = optx.SofTGRPO(kl=1.0)
    objective(model, rollout, REWARDS)
    known = objective._known[rollout].reference
    assert known is not None
    for (b, t), one in written_out(before, rollout).items():
        assert float(known[b, t]) == pytest.approx(float(one.detach()), abs=1e-9)
    assert torch.equal(model.lm_head.weight, now)


def test_no_reference_is_told() -> None:
    model = llama()
    rollout = rolled(model)
    with pytest.raises(optx.OptxError, match=r"kl is above 0.*no trained adapter.*ref_model"):
        optx.SofTGRPO()(model, rollout, REWARDS)
    handle = optx.attach(model, optx.LoRA(rank=2), r".*\.q_proj")
    rollout = rolled(model)
    with pytest.raises(optx.OptxError, match=r"'model.embed_tokens.weight' is trained besides"):
        optx.SofTGRPO()(model, rollout, REWARDS)
    with pytest.raises(optx.OptxError, match=r"is trained besides"):
        optx.SofTGRPO()(model, rollout, REWARDS, handle)
    optx.trainable_only(model, handle)
    handle.merge()
    object.__setattr__(rollout, "policy", "")
    with pytest.raises(optx.OptxError, match="its adapters merged"):
        optx.SofTGRPO()(model, rollout, REWARDS)


def test_with_wrap_and_lora_rewards_rise() -> None:
    """Sequences that begin with even tokens are paid for."""
    model = llama(torch.float32)
    handle = optx.attach(model, optx.LoRA(rank=4), r".*\.(q|k|v|o|gate|up|down)_proj")
    optx.trainable_only(model, handle)
    opt = optx.wrap(torch.optim.AdamW(handle.parameters(), lr=2e-2), optx.AdamR(weight=1e-4))
    objective = optx.SofTGRPO(kl=1e-3)
    told: list[float] = []
    with thinking(model, end_id=None) as think:
        for step in range(12):
            rollout = think.rollout(PROMPTS, 8, max_new_tokens=4, seed=step, stop_ids=())
            even = (rollout.weights * (rollout.ids % 2 == 0)).sum(-1)
            rewards = even.mean(1)
            told.append(float(rewards.mean()))
            loss = objective(model, rollout, rewards)
            opt.zero_grad()
            loss.backward()
            opt.step()
    assert sum(told[-3:]) / 3 > sum(told[:3]) / 3 + 0.1


def test_a_model_that_takes_ids_alone() -> None:
    """Its embedding is replaced for the call; the result is that of the layers behind it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(V, 8), nn.Linear(8, V)).double()
    with thinking(model) as handle:
        rollout = handle.rollout(torch.tensor([[3, 4], [5, 6]]), 4, max_new_tokens=5, stop_ids=())
    objective = optx.SofTGRPO(kl=0.0)
    loss = objective(model, rollout, REWARDS)
    loss.backward()
    assert model[0].weight.grad is None
    assert not model[0]._forward_hooks
    y, ids = rollout.weights[..., None].double(), rollout.ids
    fed = torch.cat([model[0](rollout.prompts)[:, -1:], (y * model[0](ids)).sum(2)[:, :-1]], 1)
    known = objective._known[rollout].logp
    for b, t in rollout.discrete.nonzero().tolist():
        wanted = model[1](fed[b, t]).log_softmax(0)[ids[b, t, 0]]
        assert float(known[b, t]) == pytest.approx(float(wanted.detach()), abs=1e-6)
