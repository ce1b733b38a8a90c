"""How a recipe measures what a model was: answers, divergence, the share of tokens still chosen."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from optx.recipes import _drift

VOCABULARY, END = 23, 2


class Letters:
    """A tokenizer of small numbers, with a chat template of two tokens if asked for."""

    pad_token_id = END

    def __init__(self, template: str | None = None) -> None:
        self.chat_template = template

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(letter) % (VOCABULARY - 3) for letter in text]}

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> str:
        assert options == {"tokenize": False, "add_generation_prompt": True}
        return f"[{messages[0]['content']}]"

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return " ".join(str(t) for t in tokens if not (skip_special_tokens and t == END))


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=END,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config)


ASKED = ("a", "a longer question", "and one")


def greedy(model: Any, prompt: list[int], longest: int) -> list[int]:
    """Token by token, without padding or cache."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + longest and (tokens == prompt or tokens[-1] != END):
        tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("template", [None, "some"])
@torch.no_grad()
def test_answers_are_greedy(model: Any, template: str | None) -> None:
    tokenizer = Letters(template)
    found = _drift.answers(model, tokenizer, ASKED, longest=12)
    for row, mask, answered, text, prompt in zip(*found, ASKED, strict=True):
        asked = tokenizer(f"[{prompt}]" if template else prompt)["input_ids"]
        reply = greedy(model, asked, 12)
        assert row[mask].tolist() == asked + reply
        assert row[answered].tolist() == reply
        assert text == tokenizer.decode(reply, skip_special_tokens=True)
    assert model.training  # as it was


@torch.no_grad()
def test_drift_is_the_divergence(model: Any) -> None:
    general = torch.randint(VOCABULARY, (5, 8), generator=torch.Generator().manual_seed(0))
    own = _drift.answers(model, Letters(), ASKED, longest=12)
    drift = _drift.Drift(model, general, own)
    same = drift.measure(model)
    assert same["drift_general"] == pytest.approx(0, abs=1e-6)
    assert same["drift_answers"] == pytest.approx(0, abs=1e-6)
    assert same["same_tokens"] == 1

    other = copy.deepcopy(model)
    for p in other.parameters():
        p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    found = drift.measure(other)

    def probabilities(of: Any, tokens: torch.Tensor) -> torch.Tensor:
        return of(input_ids=tokens[None]).logits[0].double().softmax(-1)

    def over_all(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
        p, q = map(torch.cat, zip(*pairs, strict=True))
        return float((p * (p / q).log()).sum(-1).mean())

    # The last three quarters of a block of 8 are positions 2 to 7, foretold at 1 to 6.
    pairs = [(probabilities(model, row)[1:7], probabilities(other, row)[1:7]) for row in general]
    assert found["drift_general"] == pytest.approx(over_all(pairs), rel=1e-4)
    right = torch.cat([q.gather(1, row[2:, None]) for (_, q), row in zip(pairs, general, strict=True)])
    assert found["general"] == pytest.approx(float(-right.log().mean()), rel=1e-5)

    each, same_tokens = [], []
    for row, mask, answered in zip(own.tokens, own.mask, own.answered, strict=True):
        at = answered[mask].nonzero()[:, 0] - 1
        p, q = (probabilities(of, row[mask])[at] for of in (model, other))
        each.append((p, q))
        same_tokens += (q.argmax(-1) == row[answered]).tolist()
    assert found["drift_answers"] == pytest.approx(over_all(each), rel=1e-4)
    assert found["same_tokens"] == sum(same_tokens) / len(same_tokens)
    assert 0 < found["same_tokens"] < 1


@torch.no_grad()
def test_answers_are_greedy_whatever_the_model_wishes(model: Any) -> None:
    own = model.generation_config
    expected = _drift.answers(model, Letters(), ASKED, longest=12)
    wishes = {"num_beams": 3, "repetition_penalty": 2.0, "min_new_tokens": 9, "suppress_tokens": [4, 5, 6]}
    model.generation_config = wishing = GenerationConfig(eos_token_id=END, **wishes)
    try:
        assert _drift.answers(model, Letters(), ASKED, longest=12).texts == expected.texts
        assert model.generation_config is wishing
    finally:
        model.generation_config = own


def test_prompts(tmp_path: Path) -> None:
    assert len(_drift.prompts(None)) >= 10
    (tmp_path / "mine.txt").write_text("one?\n\n two? \n")
    assert _drift.prompts(tmp_path / "mine.txt") == ["one?", "two?"]
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(SystemExit, match=r"empty\.txt: it is empty"):
        _drift.prompts(tmp_path / "empty.txt")
    with pytest.raises(SystemExit, match="No such file"):
        _drift.prompts(tmp_path / "none.txt")
