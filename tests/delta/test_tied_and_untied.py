"""A head that is the embedding in one model and by itself in the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import llama
from delta_cases import normal
from safetensors.torch import load_file, save_file

import optx
from optx import Delta, OptxError

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def tuned_of(model: Any, seed: int = 3) -> Any:
    with torch.no_grad():
        for number, p in enumerate(model.parameters()):
            p.add_(0.1 * normal(*p.shape, seed=seed + number))
    return model


def forms(model: Any, folder: Path) -> list[Any]:
    """A module, a dict and a folder."""
    model.save_pretrained(folder)
    return [model, model.state_dict(), folder]


@pytest.mark.parametrize("form", [0, 1, 2])
def test_a_tied_one_on_an_untied_base(form: int, tmp_path: Path) -> None:
    """The result's head is the tuned model's embedding, not the base's old head."""
    base = forms(llama(tie_word_embeddings=False), tmp_path / "base")[form]
    tuned = tuned_of(llama(tie_word_embeddings=True))
    wanted = tuned.model.embed_tokens.weight.detach()
    delta = Delta.between(base, forms(tuned, tmp_path / "tuned")[form])
    assert HEAD in delta.entries
    made = delta.apply(base, *([tmp_path / "out"] if form == 2 else []))
    state: Any = load_file(tmp_path / "out" / "model.safetensors") if form == 2 else made
    assert torch.equal(state[HEAD], wanted)
    assert torch.equal(state[EMBEDDING], wanted)
    merged = optx.merge(
        base, [forms(tuned, tmp_path / "again")[form]], optx.TaskArithmetic(), *_out(form, tmp_path)
    )
    state = load_file(tmp_path / "merged" / "model.safetensors") if form == 2 else merged
    torch.testing.assert_close(state[HEAD], wanted)


def _out(form: int, folder: Path) -> list[Path]:
    return [folder / "merged"] if form == 2 else []


@pytest.mark.parametrize("form", [0, 1, 2])
@pytest.mark.parametrize("equal", [True, False])
def test_an_untied_one_on_a_tied_base(equal: bool, form: int, tmp_path: Path) -> None:
    """Two equal tensors are one; two that differ have no place in the base, and are refused by name."""
    base = forms(llama(tie_word_embeddings=True), tmp_path / "base")[form]
    tuned = tuned_of(llama(tie_word_embeddings=False))
    if equal:
        tuned.lm_head.weight.data = tuned.model.embed_tokens.weight.data.clone()
    other = forms(tuned, tmp_path / "tuned")[form]
    if not equal:
        for call in (Delta.between, lambda a, b: optx.merge(a, [b], optx.TaskArithmetic(), tmp_path / "m")):
            with pytest.raises(
                OptxError, match=r"'lm_head.weight' is tied to .* in base, and has values of its"
            ):
                call(base, other)
        return
    made = Delta.between(base, other).apply(base, *([tmp_path / "out"] if form == 2 else []))
    state: Any = load_file(tmp_path / "out" / "model.safetensors") if form == 2 else made
    assert torch.equal(state[EMBEDDING], tuned.model.embed_tokens.weight)
    assert (HEAD in state) == (form != 2)


def test_a_base_that_stores_its_tied_head_twice(tmp_path: Path) -> None:
    """Files say nothing of ties: equal numbers do."""
    shared = normal(8, 4)
    base = {EMBEDDING: shared, HEAD: shared.clone()}
    tuned = {EMBEDDING: shared + 1}
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    delta = Delta.between(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors")
    delta.apply(tmp_path / "base.safetensors", tmp_path / "out.safetensors")
    made = load_file(tmp_path / "out.safetensors")
    assert torch.equal(made[HEAD], shared + 1)
    assert torch.equal(made[EMBEDDING], shared + 1)


def test_what_only_looks_equal_is_no_tie() -> None:
    """Fresh biases and norms are all equal, and no head is an embedding's copy by its shape alone."""
    base = {"a.bias": torch.zeros(4), "b.bias": torch.zeros(4), "w": normal(4, 4), "v": normal(4, 4)}
    with pytest.raises(OptxError, match=r"base has 'b.bias', which tuned lacks"):
        Delta.between(base, {n: t for n, t in base.items() if n != "b.bias"})
    with pytest.raises(OptxError, match="tuned has 'x', which base lacks"):
        Delta.between(base, {**base, "x": base["w"].clone()})


def test_a_delta_of_an_untied_base_on_a_tied_one() -> None:
    """Its head changes by itself: the tied base has no place for that."""
    untied = llama(tie_word_embeddings=False)
    untied.lm_head.weight.data = untied.model.embed_tokens.weight.data.clone()
    tied = llama(tie_word_embeddings=True)
    tied.load_state_dict(untied.state_dict())
    alike = {n: t.clone() for n, t in untied.state_dict().items()}
    alike[EMBEDDING] += 1
    alike[HEAD] += 1
    made: Any = Delta.between(untied, alike).apply(tied)
    assert torch.equal(made[HEAD], alike[HEAD])
    alike[HEAD] += 1
    with pytest.raises(OptxError, match=r"Delta.apply: 'lm_head.weight' is tied to .* and changes by itself"):
        Delta.between(untied, alike).apply(tied)
