"""SoftThinking on small real models: equality with greedy decoding, seeds, modes, records, state, errors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from injections import assert_same, bert, llama, snapshot
from torch import Tensor, nn

import optx
from optx.thinking._record import Rollout
from optx.thinking._state import Sequences
from optx.thinking.soft_thinking import SoftThinking

END = 9


def prompts(rows: int = 3, places: int = 5, seed: int = 1) -> Tensor:
    return torch.randint(10, 64, (rows, places), generator=torch.Generator().manual_seed(seed))


def thinking(model: nn.Module | None = None, **options: Any) -> Any:
    return optx.attach(llama() if model is None else model, SoftThinking(**options))


def plain() -> nn.Module:
    """Without a cache, a config or masks."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(64, 8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 64))


# ---- against greedy decoding ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("use_cache", [True, False])
def test_one_token_is_greedy_decoding(use_cache: bool, dtype: torch.dtype) -> None:
    """Property 5, token for token, of transformers' generate with left padding."""
    model: Any = llama().to(dtype)
    ids, mask = prompts(4, 6), torch.ones(4, 6, dtype=torch.int64)
    mask[1, :2] = mask[3, :4] = 0
    wanted = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
    handle = thinking(model, noise=None, max_topk=1)
    made = handle.generate(ids, mask, max_new_tokens=12, use_cache=use_cache)
    assert torch.equal(made.sequences, wanted)
    assert torch.equal(made.weights, torch.ones(4, made.ids.shape[1], 1))
    via = model.generate(
        ids, attention_mask=mask, max_new_tokens=12, pad_token_id=0, custom_generate=handle.custom_generate()
    )
    assert torch.equal(via, wanted)


def test_one_hot_weights_are_the_token() -> None:
    """Property 5, of embeddings and logits, by every way in."""
    model = llama()
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    ids = prompts()
    handle = thinking(model)
    K = torch.stack([ids[:, -1], ids[:, 0], ids[:, 1]], 1)
    one = torch.tensor([1.0, 0.0, 0.0]).expand(3, 3)
    assert torch.equal(embedding((K, one)), embedding(ids[:, -1]))
    with torch.no_grad():
        plain_logits = model(ids).logits
        with handle.mixed(K, one):
            assert torch.equal(model(ids).logits, plain_logits)
        with handle.mixed(K, torch.full((3, 3), 1 / 3)):
            assert not torch.allclose(model(ids).logits[:, -1], plain_logits[:, -1])
        assert torch.equal(model(ids).logits, plain_logits)


def test_a_mixture_is_in_the_hull_of_its_tokens() -> None:
    """Property 6."""
    model = llama()
    handle = thinking(model, top_k=6, max_topk=6)
    made = handle.step(torch.randn(5, 64))
    rows = model.get_input_embeddings().weight[made.ids]  # type: ignore[operator,union-attr]
    assert (made.embeds >= rows.amin(1, keepdim=True) - 1e-6).all()
    assert (made.embeds <= rows.amax(1, keepdim=True) + 1e-6).all()
    assert torch.allclose(made.embeds[:, 0], (made.weights[..., None] * rows).sum(1), atol=1e-7)


# ---- generation -----------------------------------------------------------------------------------------

NOISES = [{"noise": None}, {"noise": "gumbel"}, {"noise": "dirichlet"}]
each_noise = pytest.mark.parametrize("noise", NOISES, ids=lambda one: str(one["noise"]))


@each_noise
def test_with_and_without_a_cache(noise: dict[str, Any]) -> None:
    handle = thinking(end_id=END, top_k=12, **noise)
    one, two = (
        handle.generate(prompts(), max_new_tokens=10, seed=3, use_cache=cache) for cache in (True, False)
    )
    assert torch.equal(one.ids, two.ids)
    assert torch.allclose(one.weights, two.weights, atol=1e-5)
    assert torch.equal(one.soft, two.soft)


@each_noise
def test_seeds_and_rows(noise: dict[str, Any]) -> None:
    """Property 8: a row's noise is its own, in any batch and order."""
    handle = thinking(top_k=12, temperature=2.0, **noise)
    ids = prompts(4)
    made = handle.generate(ids, max_new_tokens=8, seed=[5, 6, 7, 8], stop_ids=())
    again = handle.generate(ids, max_new_tokens=8, seed=[5, 6, 7, 8], stop_ids=())
    assert torch.equal(made.weights, again.weights)
    order = [2, 0]
    some = handle.generate(ids[order], max_new_tokens=8, seed=[7, 5], stop_ids=())
    assert torch.equal(some.ids, made.ids[order])
    assert torch.allclose(some.weights, made.weights[order], atol=1e-5)
    other = handle.generate(ids, max_new_tokens=8, seed=[1, 2, 3, 4], stop_ids=())
    assert torch.equal(other.weights, made.weights) == (noise["noise"] is None)
    series = handle.generate(ids, max_new_tokens=8, seed=1, stop_ids=())
    shorter = handle.generate(ids[:2], max_new_tokens=8, seed=1, stop_ids=())
    assert torch.equal(shorter.ids, series.ids[:2])


def test_seeds_in_their_forms() -> None:
    handle = thinking()
    runs = [
        handle.generate(prompts(), max_new_tokens=4, seed=seed).weights
        for seed in (
            [torch.Generator().manual_seed(i) for i in (1, 2, 3)],
            [1, 2, 3],
            torch.Generator().manual_seed(9),
            torch.Generator().manual_seed(9),
            9,
        )
    ]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[2], runs[3])
    assert torch.equal(runs[3], runs[4])
    assert not torch.equal(runs[0], runs[4])


def test_generation_draws_nothing_of_the_global_generator() -> None:
    handle, before = thinking(), torch.get_rng_state()
    handle.generate(prompts(), max_new_tokens=3)
    assert torch.equal(torch.get_rng_state(), before)


def scripted(tokens: Sequence[Sequence[int]], V: int = 12) -> Callable[[int], Tensor]:
    """Logits by which step i of row r has a certain token."""

    def logits(step: int) -> Tensor:
        return torch.stack(
            [torch.full((V,), -30.0).index_fill(0, torch.tensor(row[step]), 30.0) for row in tokens]
        )

    return logits


def test_rows_have_modes_of_their_own() -> None:
    """Step 9 and 10: the end of thinking is fed alone, and then each row samples; the stop token ends it."""
    options = SoftThinking(end_id=7, top_k=4, max_topk=3)
    rows = Sequences(
        [torch.Generator().manual_seed(i) for i in range(3)], torch.tensor([True, True, False]), (2,)
    )
    logits = scripted([[5, 7, 4, 2, 5], [5, 5, 5, 5, 2], [4, 4, 7, 5, 5]])
    steps = [rows.step(logits(i), options) for i in range(5)]
    soft = torch.stack([one.soft for one in steps], 1)
    mask = torch.stack([one.mask for one in steps], 1)
    assert soft.tolist() == [[1, 0, 0, 0, 0], [1, 1, 1, 1, 0], [0] * 5]
    assert mask.tolist() == [[1, 1, 1, 1, 0], [1] * 5, [1] * 5]
    assert rows.running.tolist() == [False, False, True]
    assert rows.thinking.tolist() == [False, True, False]
    tokens = torch.stack([one.ids[:, 0] for one in steps], 1)
    assert tokens.tolist() == [[5, 7, 4, 2, 0], [5, 5, 5, 5, 2], [4, 4, 7, 5, 5]]
    for one in steps:
        single = ~one.soft
        assert (one.weights[single] == torch.tensor([1.0, 0, 0])).all()
        assert not one.ids[single][:, 1:].any()
        assert (one.gprime[single] == torch.tensor([0, -torch.inf, -torch.inf])).all()
        assert one.gprime[one.soft][:, 0].isfinite().all()


def test_the_cold_stop_counts() -> None:
    """Property 7, second half: low, low, high, low, low, low stops at step 6."""
    for nats, low, high in ((False, 0.09, 0.12), (True, 0.2, 0.3)):
        options = SoftThinking(
            noise=None,
            end_id=7,
            cold_stop=3,
            cold_entropy=0.1 if not nats else 0.25,
            nats=nats,
            temperature=1.0,
        )
        rows = Sequences([torch.Generator()], torch.tensor([True]))
        forced = list[bool]()
        for H in (low, low, high, low, low, low):
            step = rows.step(_with_entropy(H * (1 if nats else torch.tensor(12.0).log().item())), options)
            assert float(step.entropy) == pytest.approx(H, rel=1e-3)
            forced.append(bool(step.forced))
        assert forced == [False] * 5 + [True]
        assert step.ids[0, 0] == 7
        assert not step.soft[0]
        assert not step.kept[0].any()  # nothing was drawn
        assert not rows.thinking[0]


def _with_entropy(wanted: float) -> Tensor:
    low, high = 0.0, 30.0
    for _ in range(60):
        middle = (low + high) / 2
        logits = torch.zeros(1, 12).double()
        logits[0, 3] = middle
        H = torch.special.entr(logits.softmax(-1)).sum()
        low, high = (middle, high) if wanted < H else (low, middle)
    return logits.float()


def test_what_comes_after_has_its_own_limits() -> None:
    handle = thinking(end_id=END, after_top_k=1, temperature=3.0)
    made = handle.generate(prompts(2), max_new_tokens=6, thinking=torch.tensor([True, False]))
    assert made.soft[0].any()
    assert not made.soft[1].any()
    wanted = handle.model.generate(prompts(2)[1:], max_new_tokens=6, do_sample=False)
    assert torch.equal(made.sequences[1:], wanted)


def test_a_model_of_ones_own() -> None:
    """Without a cache, a config or masks; what it makes of a pair is what it was fed."""
    model = plain()
    handle = thinking(model, top_k=5, temperature=1.0, top_p=1.0, noise=None)
    with pytest.raises(optx.OptxError, match="prompts are padded, and the forward of Sequential"):
        handle.generate([[3, 4], [5]], max_new_tokens=4)
    with pytest.raises(optx.OptxError, match="use_cache is True, and the forward of Sequential"):
        handle.generate([[3, 4]], max_new_tokens=4, use_cache=True)
    made = handle.generate([[3, 4], [5, 6]], max_new_tokens=4)
    assert made.soft.all()
    for t in range(3):
        wanted = model((made.ids[:, t], made.weights[:, t])).topk(5).values.softmax(-1)
        assert torch.allclose(made.weights[:, t + 1], wanted, atol=1e-6)


# ---- records --------------------------------------------------------------------------------------------


def test_a_record_replays(tmp_path: Path) -> None:
    """The logits of the training forward are those by which the next steps were drawn."""
    model: Any = llama()
    handle = thinking(model, record=True, tau=0.1, top_k=5, max_topk=5, end_id=END, temperature=1.0)
    ids = [[11, 12, 13], [14, 15]]
    made = handle.rollout(ids, group=3, max_new_tokens=9, seed=2)
    assert (len(made), made.group) == (6, 3)
    assert made.prompts[:3].tolist() == [[11, 12, 13]] * 3
    assert made.prompt_mask[3:, 0].tolist() == [False] * 3
    logits = model(
        inputs_embeds=made.inputs(model), attention_mask=made.attention_mask, position_ids=made.position_ids
    ).logits[:, 2:-1]
    p = logits.softmax(-1).gather(-1, made.ids)
    pi = p / p.sum(-1, keepdim=True)
    there = made.soft.unsqueeze(-1) & (made.kept > 0)
    assert torch.allclose(pi[there], made.kept[there], atol=2e-2)  # top_p's share is in the record's
    noise = (made.gprime - (made.kept + 1e-6).log())[made.soft]
    assert float(noise.min()) >= -1.5 - 1e-5
    assert float(noise.max()) <= 3 + 1e-5
    assert torch.allclose((made.gprime / 0.1).softmax(-1), made.weights, atol=1e-5)
    assert (made.gprime.diff(dim=-1)[made.soft] <= 0).all()
    assert not made.inputs(model).requires_grad
    with handle.mixed(made.ids, made.weights, made.soft):
        fed = model(made.sequences, attention_mask=made.attention_mask, position_ids=made.position_ids).logits
    assert torch.allclose(fed[:, 2:-1][made.mask], logits[made.mask], atol=1e-5)

    made.save(tmp_path / "rollout.safetensors")
    again = Rollout.load(tmp_path / "rollout.safetensors")
    for name, tensor in made.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert again.options == made.options
    assert again.policy == made.policy == handle.rollout(ids, max_new_tokens=2).policy
    assert again.rows([3, 4, 5]).group == 3
    assert again.rows([1, 2, 3]).group == 1
    with torch.no_grad():
        model.lm_head.weight[3, 3] += 1e-3
    assert handle.rollout(ids, max_new_tokens=2).policy != made.policy


def test_transformers_loop_gives_the_same_record() -> None:
    model: Any = llama()
    handle = thinking(model, end_id=END, top_k=12)
    ids = prompts(4, 6)
    mask = torch.ones_like(ids)
    mask[2, :3] = 0
    wanted = handle.generate(ids, mask, max_new_tokens=9, seed=4)
    for options in ({}, {"use_cache": False}, {"do_sample": True, "temperature": 5.0, "top_k": 2}):
        made = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=9,
            custom_generate=handle.custom_generate(seed=4),
            pad_token_id=0,
            return_dict_in_generate=True,
            **options,
        )
        assert torch.equal(made.sequences, wanted.sequences)
        assert torch.allclose(handle.last.weights, wanted.weights, atol=1e-5)
        assert torch.equal(handle.last.soft, wanted.soft)
        assert handle.part.inputs is None
    with pytest.raises(optx.OptxError, match="num_beams is 2"):
        model.generate(ids, max_new_tokens=2, num_beams=2, custom_generate=handle.custom_generate())


# ---- state ----------------------------------------------------------------------------------------------


def test_state_goes_on_bit_for_bit() -> None:
    model = llama()
    handle = thinking(model, end_id=END, cold_stop=4, temperature=2.0)
    whole = handle.generate(prompts(), max_new_tokens=10, seed=5, use_cache=False)
    half = handle.generate(prompts(), max_new_tokens=4, seed=5, use_cache=False)
    state = copy.deepcopy(handle.state_dict())
    handle.generate(prompts(), max_new_tokens=3, seed=6)
    other = thinking(llama(), end_id=END, cold_stop=4, temperature=2.0)
    other.load_state_dict(state)
    more = other.generate(half, max_new_tokens=6, use_cache=False)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(more.state_dict()[name], tensor), name
    cached = other.load_state_dict(state) or other.generate(half, max_new_tokens=6)
    assert torch.equal(cached.ids, whole.ids)
    with pytest.raises(optx.OptxError, match="does not stand at the end of this rollout"):
        thinking().generate(half, max_new_tokens=6)


def test_steps_go_on_bit_for_bit() -> None:
    logits = torch.randn(12, 3, 64, generator=torch.Generator().manual_seed(0))
    one, two = thinking(end_id=END), thinking(end_id=END)
    one.begin(3, seed=1)
    steps = [one.step(each) for each in logits]
    two.begin(3, seed=1)
    for each in logits[:5]:
        two.step(each)
    three = thinking(end_id=END)
    three.load_state_dict(two.state_dict())
    for each, wanted in zip(logits[5:], steps[5:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(three.step(each), wanted, strict=True))


def test_a_saved_handle_is_attached_again(tmp_path: Path) -> None:
    handle = thinking(end_id=END, tau=0.3, noise_clamp=(-1, 2))
    handle.save(tmp_path / "thinking")
    again: Any = optx.attach(llama(), tmp_path / "thinking")
    assert again.injection == handle.injection
    one, two = (each.generate(prompts(), max_new_tokens=4, seed=1) for each in (handle, again))
    assert torch.equal(one.weights, two.weights)


def test_remove_leaves_no_trace() -> None:
    model = llama()
    before = snapshot(model)
    with thinking(model) as handle:
        handle.generate(prompts(), max_new_tokens=3)
        assert not handle.parameters()
    assert_same(model, before)
    with pytest.raises(optx.OptxError, match="generate: this handle has been removed"):
        handle.generate(prompts(), max_new_tokens=3)


# ---- errors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"noise": "gauss"}, "noise is 'gauss'"),
        ({"tau": 0}, "tau is 0"),
        ({"alpha": -1.0}, r"alpha is -1\.0"),
        ({"temperature": 0.0}, r"temperature is 0\.0"),
        ({"top_p": 0.0}, r"top_p is 0\.0"),
        ({"top_p": 1.5}, r"top_p is 1\.5; it must be between 0 and 1"),
        ({"after_top_p": 0.0}, r"after_top_p is 0\.0"),
        ({"min_p": 2}, "min_p is 2"),
        ({"top_k": -1}, "top_k is -1"),
        ({"max_topk": 0}, "max_topk is 0"),
        ({"end_id": -2}, "end_id is -2"),
        ({"noise_clamp": (3, -1)}, r"noise_clamp is \(3, -1\)"),
        ({"cold_stop": 3}, "cold_stop is 3 and end_id None"),
        ({"record": True, "noise": None}, "record is True and noise None"),
        ({"record": True, "max_topk": 1}, "a mixture has one token"),
    ],
    ids=lambda one: str(one)[:30],
)
def test_wrong_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(optx.OptxError, match=words):
        SoftThinking(**options)


def encoder_decoder() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )


@pytest.mark.parametrize(
    ("build", "options", "words"),
    [
        (lambda: nn.Linear(3, 3), {}, "no input embeddings in this Linear"),
        (lambda: nn.Sequential(nn.Embedding(3, 3), nn.Embedding(3, 3)), {}, "found 2 input embeddings"),
        (encoder_decoder, {}, "T5ForConditionalGeneration is an encoder-decoder"),
        (llama, {"end_id": 64}, "end_id=64, and 'model.embed_tokens' has 64 tokens, 0 to 63"),
    ],
)
def test_models_that_are_not_served(
    build: Callable[[], nn.Module], options: dict[str, Any], words: str
) -> None:
    model = build()
    before = snapshot(model)
    with pytest.raises(optx.TargetError, match=words):
        thinking(model, **options)
    assert_same(model, before)


def test_wrong_calls() -> None:
    handle = thinking()
    ids = prompts()
    right = torch.ones_like(ids)
    right[1, -1] = 0
    with pytest.raises(
        optx.OptxError, match=r"row 1 of the attention mask has a 0 behind a 1.*Pad on the left"
    ):
        handle.generate(ids, right, max_new_tokens=2)
    with pytest.raises(optx.OptxError, match="max_new_tokens is 0"):
        handle.generate(ids, max_new_tokens=0)
    with pytest.raises(optx.OptxError, match=r"attention_mask has shape \(3, 4\)"):
        handle.generate(ids, right[:, 1:], max_new_tokens=2)
    with pytest.raises(optx.OptxError, match="seed has 2 entries, and there are 3 rows"):
        handle.generate(ids, max_new_tokens=2, seed=[1, 2])
    with pytest.raises(optx.OptxError, match="thinking is 1"):
        handle.generate(ids, max_new_tokens=2, thinking=1)
    with pytest.raises(optx.OptxError, match="must be token ids"):
        handle.generate([], max_new_tokens=2)
    handle.begin(2)
    with pytest.raises(optx.OptxError, match=r"logits have shape \(3, 64\), and 2 rows have begun"):
        handle.step(torch.zeros(3, 64))
    with pytest.raises(optx.OptxError, match="logits of row 1 have nan"):
        handle.step(torch.zeros(2, 64).index_fill_(0, torch.tensor(1), torch.nan))
    with handle.disable(), pytest.raises(optx.OptxError, match=r"switched off. Call enable"):
        handle.generate(ids, max_new_tokens=2)
    with pytest.raises(optx.FileError, match="'generators' is missing"):
        handle.load_state_dict({k: v for k, v in handle.state_dict().items() if "generators" not in k})
    model: Any = handle.model
    model.generation_config.pad_token_id = 5
    with pytest.raises(optx.OptxError, match="prompts begin or end with 5, the model's padding"):
        handle.generate(torch.tensor([[5, 12, 13]]), max_new_tokens=2)
    K, y = torch.zeros(3, 2, dtype=torch.int64), torch.full((3, 2), 0.5)
    with (
        pytest.raises(optx.OptxError, match="was not called with tokens"),
        handle.mixed(K, y),
    ):
        pass
    with (
        pytest.raises(optx.OptxError, match="mixtures for 3 rows wait"),
        handle.mixed(K, y),
    ):
        model(ids[:2])
    with pytest.raises(optx.OptxError, match="BertForSequenceClassification gives logits of shape"):
        thinking(bert()).generate(ids, max_new_tokens=1)
