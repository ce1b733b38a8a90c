"""The interaction basis of real transformers models: all positions, padding, tied heads, estimates."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from injections import assert_same, snapshot

import optx
from optx.analysis import degeneracy, interaction_basis


def gpt2(vocab: int = 12) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocab,
        n_embd=8,
        n_layer=2,
        n_head=2,
        n_positions=16,
        activation_function="relu",
        bos_token_id=None,
        eos_token_id=None,
    )
    model = GPT2LMHeadModel(config).double()
    for p in model.parameters():
        p.data.mul_(5 if p.ndim > 1 else 1)  # as drawn its blocks add next to nothing
    return model.eval()


def ids(rows: int = 6, length: int = 5, vocab: int = 12) -> Tensor:
    return torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(1))


LAYERS = ["transformer.h.0", "transformer.h.1"]


def tail_of_block(model: Any, f: Tensor) -> Tensor:
    out = model.transformer.h[1](f[None])
    return (out[0] if isinstance(out, tuple) else out)[0]


def test_a_transformer_over_all_positions() -> None:
    """Against torch.func's Jacobians of the next block, one sample after the other."""
    model, x = gpt2(), ids()
    ib = interaction_basis(model, [{"input_ids": x[:4]}, {"input_ids": x[4:]}], LAYERS, eps=1e-12)
    here, later = (ib[layer] for layer in LAYERS)
    assert here.rows == 30
    hidden = model(x, output_hidden_states=True).hidden_states[1].detach()
    fhat = here.features(hidden).flatten(0, 1)
    torch.testing.assert_close(fhat.T @ fhat / 30, here.Lambda.diag(), rtol=0, atol=1e-9)
    moment = torch.zeros(here.dim, here.dim).double()
    for f in hidden:
        J = torch.autograd.functional.jacobian(lambda z: tail_of_block(model, z), f)  # (t, o, s, d)
        Jhat = torch.einsum("oi,tosd,jd->tisj", later.C, J, here.C_pinv)
        moment += torch.einsum("tisj,tisk->jk", Jhat, Jhat) / 30
    torch.testing.assert_close(moment, torch.eye(here.dim).double(), rtol=0, atol=1e-8)


@pytest.mark.parametrize("kind", ["local", "global"])
def test_padding_does_not_count(kind: Any) -> None:
    model, x = gpt2(), ids(8)
    plain = interaction_basis(model, [{"input_ids": x}], LAYERS, kind)
    padded = {
        "input_ids": torch.cat([x, torch.zeros(8, 3, dtype=torch.long)], 1),
        "attention_mask": torch.cat([torch.ones(8, 5), torch.zeros(8, 3)], 1).long(),
    }
    other = interaction_basis(model, [padded], LAYERS, kind)
    for layer in LAYERS:
        assert other[layer].rows == 40
        torch.testing.assert_close(other[layer].Lambda, plain[layer].Lambda, rtol=1e-8, atol=1e-12)
    edges = plain.edges(nodes=2)[tuple(LAYERS)]  # type: ignore[index]
    torch.testing.assert_close(other.edges(nodes=2)[tuple(LAYERS)], edges, rtol=1e-5, atol=1e-9)  # type: ignore[index]
    counted = degeneracy(model, [{"input_ids": x}])
    assert {k: v.free for k, v in degeneracy(model, [padded]).items()} == {
        k: v.free for k, v in counted.items()
    }


def test_the_stream_without_its_mean() -> None:
    """LayerNorm takes the mean off: one direction of the stream never matters, and dim says so."""
    model = gpt2()
    ib = interaction_basis(model, [{"input_ids": ids(40)}], LAYERS, eps=1e-10)
    assert [(one.rank_gram, one.rank_jacobian, one.dim) for one in ib.values()] == [(8, 7, 7)] * 2
    before = model(ids()).logits.detach()
    with optx.attach(model, ib.project(LAYERS[0])):
        torch.testing.assert_close(
            model(ids()).logits.detach(), before, rtol=0, atol=1e-5 * float(before.abs().max())
        )
    assert torch.equal(model(ids()).logits, before)


def test_it_leaves_no_trace_in_a_model_with_labels_and_dropout() -> None:
    model = gpt2().train()
    before, state = snapshot(model), torch.get_rng_state()
    batch = {"input_ids": ids(), "labels": ids()}
    ib = interaction_basis(model, [batch], LAYERS, sources=3)
    ib.modularity(ib.edges(keep=3))
    assert_same(model, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_layers_of_a_transformer_that_are_refused() -> None:
    model = gpt2()
    with pytest.raises(optx.OptxError, match=r"'transformer' \(GPT2Model\) gives a "):
        interaction_basis(model, [{"input_ids": ids()}], ["transformer"])
    with pytest.raises(optx.OptxError, match="in the order in which the model calls them"):
        interaction_basis(model, [{"input_ids": ids()}], LAYERS[::-1])


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:interaction_basis. .* has 576 features:UserWarning")
def test_smollm2() -> None:
    """Two blocks of a language model by random signs: a basis that reconstructs, and a projection undone."""
    from optx.recipes import _assets

    model, tokenizer = _assets.language_model(None)
    text = "The interaction basis of a language model, read off a few sentences of plain English text."
    batch = tokenizer([text, text.upper(), text[::-1]], return_tensors="pt", padding=True)
    layers = ["model.layers.10", "model.layers.11"]
    before = model(**batch).logits
    ib = interaction_basis(model, [batch], layers, sources=16)
    rows = int(batch["attention_mask"].sum())
    for layer in layers:
        one = ib[layer]
        assert one.rows == rows
        assert 0 < one.dim <= one.rank_gram < rows
    E = ib.edges(keep=3)[layers[0], layers[1]]
    assert E.shape == (3, 3)
    assert bool((E > 0).all())
    handle = optx.attach(model, ib.project(layers[0], keep=1))
    assert not torch.equal(model(**batch).logits, before)
    handle.remove()
    assert torch.equal(model(**batch).logits, before)


@pytest.mark.parametrize("left", [False, True])
def test_padding_that_counts_is_told(left: bool) -> None:
    model, x, mask = gpt2(), ids(), torch.ones(6, 5).long()
    mask[2, 3:], mask[4, 2:] = 0, 0
    mask = mask.flip(1) if left else mask
    for pair in ((x, mask), (x, mask.bool())):
        with pytest.warns(UserWarning, match="second tensor looks like an attention mask"):
            found = interaction_basis(model, [pair], LAYERS[:1], "pca")
        assert found[LAYERS[0]].rows == 30
        with pytest.warns(UserWarning, match="degeneracy: a batch is a pair whose second tensor looks"):
            degeneracy(model, [pair], ["transformer.h.0.attn.c_proj"], sources=1)
    square = (mask[:, None, None, :] * torch.ones(5, 5).long().tril()).bool()
    with pytest.warns(UserWarning, match=r"attention_mask has shape \(6, 1, 5, 5\)"):
        interaction_basis(model, [{"input_ids": x, "attention_mask": square}], LAYERS[:1], "pca")


@pytest.mark.parametrize("second", [torch.ones(6, 5).long(), torch.zeros(6, 5).long(), ids(), torch.ones(6)])
def test_other_targets_are_no_mask(second: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        interaction_basis(gpt2(), [(ids(), second)], LAYERS[:1], "pca")


def test_a_loader_of_padding_alone_has_no_sample() -> None:
    padding = {"input_ids": ids(), "attention_mask": torch.zeros(6, 5).long()}
    with pytest.raises(optx.OptxError, match="interaction_basis: the loader's batches have no sample"):
        interaction_basis(gpt2(), [padding], LAYERS, "pca")
    with pytest.raises(optx.OptxError, match="degeneracy: the loader's batches have no sample"):
        degeneracy(gpt2(), [padding], ["transformer.h.0.attn.c_proj"], sources=1)
