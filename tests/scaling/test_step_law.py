"""The published step law in numbers, and the parameters that it counts."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from family_models import BY_LABEL
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from optx._errors import OptxError
from optx.scaling import non_embedding_params, step_law

sizes = st.floats(2.2e8, 2.1e9)
amounts = st.floats(2.1e9, 9e10)


def quietly(*args, **kwargs):
    """Beyond the fitted range too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return step_law(*args, **kwargs)


# ---- numbers of the paper -------------------------------------------------------------------------------


def test_a_billion_parameters_on_a_hundred_billion_tokens():
    r = step_law(1e9, 1e11)
    assert r.lr == pytest.approx(1.632499e-3, rel=1e-5)
    assert r.batch_tokens == pytest.approx(1.107715e6, rel=1e-5)
    assert r.batch_sequences == pytest.approx(540.876, rel=1e-5)
    assert r.steps == pytest.approx(90275.9, rel=1e-5)
    assert (r.final_lr, r.outside) == (1e-5, ())


def test_seven_billion_parameters():
    r = quietly(7e9, 1.4e12)
    assert r.lr == pytest.approx(9.165569e-4, rel=1e-5)
    assert r.batch_tokens == pytest.approx(4.998815e6, rel=1e-5)


def test_the_batch_depends_on_tokens_alone():
    r = step_law(214663680, 1e11)
    assert r.lr == pytest.approx(4.890004e-3, rel=1e-5)
    assert r.batch_tokens == step_law(1e9, 1e11).batch_tokens


@given(sizes, amounts)
def test_doubling(n, d):
    one, more_params, more_tokens = quietly(n, d), quietly(2 * n, d), quietly(n, 2 * d)
    assert more_params.lr / one.lr == pytest.approx(0.610050, rel=1e-5)
    assert more_tokens.lr / one.lr == pytest.approx(1.237132, rel=1e-5)
    assert more_tokens.batch_tokens / one.batch_tokens == pytest.approx(1.485553, rel=1e-5)


@given(sizes, st.floats(1.5, 20))
def test_at_a_fixed_number_of_tokens_a_parameter(n, factor):
    change = quietly(factor * n, 20 * factor * n).lr / quietly(n, 20 * n).lr
    assert math.log(change) / math.log(factor) == pytest.approx(-0.406, abs=1e-6)


@pytest.mark.parametrize(
    ("n", "d", "lr", "batch"),
    [  # percentiles 5 and 95 over the thousand released resamples
        (1e9, 1e11, (1.545351e-3, 1.785898e-3), (1.028718e6, 1.186905e6)),
        (2.15e8, 1e11, (4.571414e-3, 5.394871e-3), (1.028718e6, 1.186905e6)),
        (1e9, 2e10, (9.55598e-4, 1.072032e-3), (4.248829e5, 4.593702e5)),
        (5e8, 5e10, (2.090344e-3, 2.320336e-3), (7.050232e5, 7.853601e5)),
    ],
)
def test_the_interval_is_that_of_the_released_resamples(n, d, lr, batch):
    found = step_law(n, d).interval
    assert found.lr == pytest.approx(lr, rel=0.01)
    assert found.batch_tokens == pytest.approx(batch, rel=0.01)


@given(sizes, amounts)
def test_the_interval_is_about_the_value(n, d):
    r = step_law(n, d)
    assert math.sqrt(math.prod(r.interval.lr)) == pytest.approx(r.lr, rel=0.03)
    assert r.interval.lr[0] < r.lr < r.interval.lr[1]
    assert r.interval.batch_tokens[0] < r.batch_tokens < r.interval.batch_tokens[1]


# ---- rounding, ranges, errors ---------------------------------------------------------------------------


@given(sizes, amounts, st.integers(1, 64), st.sampled_from([512, 2048, 4096]))
def test_rounded_sequences(n, d, multiple, seq_len):
    exact, whole = step_law(n, d, seq_len=seq_len), step_law(n, d, seq_len=seq_len, multiple_of=multiple)
    assert whole.batch_sequences % multiple == 0
    assert abs(whole.batch_sequences - exact.batch_sequences) <= max(
        multiple / 2, multiple - exact.batch_sequences
    )
    assert whole.batch_tokens == whole.batch_sequences * seq_len
    assert isinstance(whole.steps, int)
    assert whole.steps == round(d / whole.batch_tokens)
    assert whole.lr == exact.lr
    assert exact.batch_sequences * seq_len == pytest.approx(exact.batch_tokens)


@pytest.mark.parametrize(
    ("n", "d", "told"),
    [
        (1e8, 5e10, ["1e+08 parameters"]),
        (7e9, 9e10, ["7e+09 parameters"]),
        (1e9, 1e9, ["1e+09 tokens"]),
        (135e6, 2e12, ["1.35e+08 parameters", "2e+12 tokens", "1.48e+04 tokens a parameter"]),
        (1e14, 1e9, ["1e+14 parameters", "1e+09 tokens", "not above the final one"]),
    ],
)
def test_one_warning_names_all_that_is_beyond_the_fitted_range(n, d, told):
    with pytest.warns(UserWarning, match="beyond what the law was fitted to") as caught:
        r = step_law(n, d)
    assert len(caught) == 1
    assert len(r.outside) == len(told)
    assert all(part in str(caught[0].message) for part in told)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("bad", [0, -1e9, math.nan, math.inf, "1e9", True, None])
@pytest.mark.parametrize("argument", ["params", "tokens"])
def test_what_is_no_number_above_zero_is_refused(argument, bad):
    with pytest.raises(OptxError, match=f"step_law: {argument} is"):
        step_law(**{"params": 1e9, "tokens": 1e10, argument: bad})


@pytest.mark.parametrize("argument", ["seq_len", "multiple_of"])
@pytest.mark.parametrize("bad", [0, -8, 2.5, True])
def test_sequences_are_whole(argument, bad):
    with pytest.raises(OptxError, match=f"step_law: {argument} is"):
        step_law(1e9, 1e10, **{argument: bad})


def test_less_than_a_step_is_refused():
    with pytest.raises(OptxError, match="less than one step"):
        step_law(1e9, 0.1)
    with pytest.raises(OptxError, match="less than one step: a batch is 16384 tokens"):
        step_law(1e9, 10_000, multiple_of=8)


def test_numbers_of_numpy():
    assert step_law(np.float32(1e9), np.int64(10**11)).lr == pytest.approx(1.632499e-3, rel=1e-5)


# ---- non_embedding_params -------------------------------------------------------------------------------


def sizes_of(module: nn.Module) -> int:
    return sum(p.numel() for p in {id(p): p for p in module.parameters()}.values())


@pytest.mark.parametrize("tied", [False, True])
def test_a_llama_is_its_blocks_and_its_last_norm(tied):
    model = BY_LABEL["Llama"].make(tie_word_embeddings=tied)
    assert non_embedding_params(model) == sizes_of(model.model.layers) + sizes_of(model.model.norm)


def test_on_the_meta_device_at_a_size_of_its_own():
    import transformers

    config = transformers.LlamaConfig(num_hidden_layers=3, tie_word_embeddings=True)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    block = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    assert non_embedding_params(model) == 3 * block + 4096
    assert step_law(model, 1e10).params == 3 * block + 4096


def test_gpt2_without_positions_and_bert_without_its_decoder():
    import transformers

    gpt = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50))
    assert non_embedding_params(gpt) == sizes_of(gpt.transformer.h) + sizes_of(gpt.transformer.ln_f)
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=50
    )
    bert = transformers.BertForMaskedLM(config)
    kept = (bert.bert.encoder, bert.bert.embeddings.LayerNorm, bert.cls.predictions.transform)
    assert non_embedding_params(bert) == sum(map(sizes_of, kept))


def test_pictures_without_positions_and_classifier():
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.ViTConfig(**sizes, image_size=8, patch_size=4)
    vit = transformers.ViTForImageClassification(config)
    left_out = sizes_of(vit.classifier) + vit.vit.embeddings.position_embeddings.numel()
    assert non_embedding_params(vit) == sizes_of(vit) - left_out


@pytest.mark.parametrize(
    ("label", "outer"),
    [
        ("OPT", ["model.decoder.embed_tokens", "model.decoder.embed_positions", "lm_head"]),
        ("T5", ["shared", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias", "lm_head"]),
        ("RoBERTa", ["roberta.embeddings.word_embeddings", "classifier.out_proj"]),
        ("DeepSeek-V3", ["model.embed_tokens", "lm_head"]),
        ("Mamba", ["backbone.embeddings", "lm_head"]),
    ],
)
def test_what_is_left_out_by_family(label, outer):
    """Of each family the named modules, and no weight that is not an embedding's or the head's."""
    model = BY_LABEL[label].make()
    modules = dict(model.named_modules())
    without = [one for one in modules.values() if isinstance(one, nn.Embedding)] + [modules[outer[-1]]]
    assert all(modules[path] in without for path in outer)
    left_out = {id(p): p.numel() for one in without for p in one.parameters()}
    assert non_embedding_params(model) == sizes_of(model) - sum(left_out.values())


def test_all_experts_count():
    model = BY_LABEL["Mixtral"].make()
    left_out = sizes_of(model.model.embed_tokens) + sizes_of(model.lm_head)
    assert non_embedding_params(model) == sizes_of(model) - left_out
    more = BY_LABEL["Mixtral"].make(num_local_experts=16)
    blocks = model.model.layers
    assert non_embedding_params(more) > non_embedding_params(model) + sizes_of(blocks)


class Plain(nn.Module):
    def __init__(self, tied=False, name="to_tokens", out=50):
        super().__init__()
        self.tokens, self.pos_emb = nn.Embedding(50, 8), nn.Parameter(torch.zeros(1, 5, 8))
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.add_module(name, nn.Linear(8, out, bias=False))
        if tied:
            getattr(self, name).weight = self.tokens.weight


@pytest.mark.parametrize("made", [Plain(), Plain(tied=True), Plain(name="lm_head", out=3), Plain(out=52)])
def test_a_models_own_head_is_found(made):
    assert non_embedding_params(made) == 3 * 72


def test_a_head_by_its_path():
    odd = Plain(out=7)
    assert non_embedding_params(odd) == 3 * 72 + 56
    assert non_embedding_params(odd, head="to_tokens") == 3 * 72
    with pytest.raises(OptxError, match=r"head is 'to_token', no module\. Near: 'to_tokens'"):
        non_embedding_params(odd, head="to_token")


def test_two_that_may_be_the_head():
    model = Plain()
    model.second = nn.Linear(8, 50)
    with pytest.raises(OptxError, match="'to_tokens', 'second' may be the output head"):
        non_embedding_params(model)


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(OptxError, match="no parameters besides"):
        non_embedding_params(nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 50)))
    with pytest.raises(OptxError, match="'1' has no weights yet"):
        non_embedding_params(nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(4)))
    packed = nn.Linear(4, 4)
    packed.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(OptxError, match="'0' holds its weights packed"):
        non_embedding_params(nn.Sequential(packed))
