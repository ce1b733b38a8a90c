"""single_threadedness: its numbers against calls that are written out, and that it leaves no trace."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from injections import assert_same, llama, snapshot
from torch import Tensor

import optx
from optx.analysis.single_threaded import divergence, single_threadedness


def prompts() -> Tensor:
    return torch.randint(10, 64, (3, 5), generator=torch.Generator().manual_seed(1))


def made(**options: Any) -> Any:
    model = llama()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(6)
    return optx.attach(model, optx.SoftThinking(**options))


@pytest.mark.parametrize("use_cache", [True, False])
def test_against_calls_written_out(use_cache: bool) -> None:
    handle = made(top_k=6, temperature=1.0, top_p=1.0)
    found = single_threadedness(handle, prompts(), steps=4, seed=3, use_cache=use_cache)
    record = handle.generate(prompts(), max_new_tokens=4, seed=3)
    assert torch.equal(found.tokens, record.tokens)
    embedding, model = handle.model.get_input_embeddings(), handle.model
    embeds = record.inputs(model)
    for t in range(4):
        past, P = embeds[:, : 5 + t], list[Tensor]()
        for last in (embeds[:, 5 + t], embedding(record.ids[:, t, 0]), embedding(record.ids[:, t, 1])):
            logits = model(inputs_embeds=torch.cat([past, last[:, None]], 1)).logits[:, -1]
            P.append(logits.double().softmax(-1))
        for name, (a, b) in {"soft_top1": (0, 1), "soft_top2": (0, 2), "top1_top2": (1, 2)}.items():
            M = (P[a] + P[b]) / 2
            wanted = sum((X * (X / M).log()).sum(-1) for X in (P[a], P[b])) / 2
            assert torch.allclose(getattr(found, name)[:, t], wanted, rtol=1e-3, atol=1e-7)
    y, pi = record.weights.double(), record.kept.double()
    assert torch.allclose(found.noise, divergence(y, pi))
    assert torch.allclose(found.entropy, -(y * y.log()).sum(-1))
    assert torch.allclose(found.top, y[..., 0])


def test_what_noise_does_to_weights() -> None:
    """The scaled-down experiment's (c): Gumbel beyond Dirichlet(4) beyond vanilla, which is 0."""
    means = {
        noise: single_threadedness(made(noise=noise, top_k=15), prompts(), steps=20, seed=1).mean()
        for noise in ("gumbel", "dirichlet", None)
    }
    assert means["gumbel"]["noise"] > means["dirichlet"]["noise"] > means[None]["noise"] == 0
    assert 0 < means["gumbel"]["entropy"] < math.log(15)


def test_steps_of_one_token_are_nan() -> None:
    handle = made(end_id=9, top_k=64, temperature=5.0)
    found = single_threadedness(handle, prompts(), steps=30, seed=0)
    single = found.top.isnan()
    assert single.any()
    assert torch.equal(single, found.noise.isnan())
    assert found.soft_top2[single].isnan().all()
    assert found.mean()["steps"] <= float((~single).sum())
    assert found.mean(0.4, 0.6)["steps"] == float(((found.top >= 0.4) & (found.top <= 0.6)).sum())


def test_no_trace() -> None:
    handle = made(end_id=9)
    handle.generate(prompts(), max_new_tokens=3)
    before, state, last = snapshot(handle.model), handle.state_dict(), handle.last
    rng = torch.get_rng_state()
    single_threadedness(handle, prompts(), steps=3)
    assert_same(handle.model, before)
    assert torch.equal(torch.get_rng_state(), rng)
    assert handle.last is last
    assert all(torch.equal(tensor, state[name]) for name, tensor in handle.state_dict().items())
    assert handle.part.inputs is None


def test_wrong_arguments() -> None:
    with pytest.raises(optx.OptxError, match="handle is a LlamaForCausalLM"):
        single_threadedness(llama(), prompts())  # type: ignore[arg-type]
    with pytest.raises(optx.OptxError, match="a mixture has one token"):
        single_threadedness(made(max_topk=1), prompts())
    with pytest.raises(optx.OptxError, match="steps is 0"):
        single_threadedness(made(), prompts(), steps=0)
    with pytest.raises(optx.OptxError, match=r"high is 0\.2"):
        single_threadedness(made(), prompts(), steps=1).mean(0.5, 0.2)


def test_it_prints_as_one_line() -> None:
    found = single_threadedness(made(top_k=6), prompts(), steps=2)
    said, mean = repr(found), found.mean()
    assert said.startswith(f"SingleThreaded(3 rows of 2 steps, {mean['steps']:.0f} of them soft; ")
    assert f"mixture and second {mean['soft_top2']:.3g}, " in said
    assert "\n" not in said


@given(st.integers(2, 20), st.integers(0, 10_000), st.floats(0.01, 20))
def test_the_divergence_is_a_divergence(n: int, seed: int, scale: float) -> None:
    p, q = (torch.randn(2, n, generator=torch.Generator().manual_seed(seed)).double() * scale).softmax(-1)
    found = float(divergence(p, q))
    assert 0 <= found <= math.log(2) + 1e-12
    assert found == pytest.approx(float(divergence(q, p)), abs=1e-12)
    assert float(divergence(p, p)) == 0
    one, other = torch.eye(2, dtype=torch.float64)
    assert float(divergence(one, other)) == pytest.approx(math.log(2))
