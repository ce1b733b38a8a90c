"""How far a language model has gone from what it was: on plain English, and in its own answers.

Its loss on a text can stay where it was while it becomes another model. Drift is the Kullback-Leibler
divergence KL(pretrained || tuned) of the next token's distribution, in nats a token; 0 for the same model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._run import SettingsError, device
from ._text import context, evaluated

PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Explain to a child why the sky is blue.",
    "Write a short email to my boss asking for a day off on Friday.",
    "How do I boil an egg?",
    "Give me three tips for sleeping better.",
    "What is the difference between a virus and a bacterium?",
    "Write a Python function that adds two numbers.",
    "Summarise in one sentence what photosynthesis does.",
    "If I have 12 apples and give away 5, how many are left?",
    "Suggest a name for a small bakery and say why.",
    "What should I pack for a weekend in the mountains?",
    "Who wrote the novel Frankenstein, and what is it about?",
)
"""What people ask such models; none is about what the recipe trains on."""


class Answers(NamedTuple):
    """Prompts with answers, as padded rows of tokens.

    Attributes:
        tokens: prompt, answer, padding on the right; (count, length).
        mask: where prompt and answer are.
        answered: where the answer is.
        texts: the answers.
    """

    tokens: Tensor
    mask: Tensor
    answered: Tensor
    texts: list[str]


def prompts(file: Path | None) -> Sequence[str]:
    """The prompts of a file, one a line, or those above.

    Raises:
        SettingsError: there is no such file, or nothing in it.
    """
    if file is None:
        return PROMPTS
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise SettingsError(f"--prompts {file}: {error.strerror}; it must be a text file.") from error
    if not (found := [line for line in lines if line]):
        raise SettingsError(f"--prompts {file}: it is empty; it must have a prompt a line.")
    return found


@torch.no_grad()
def answers(model: Any, tokenizer: Any, asked: Sequence[str], longest: int) -> Answers:
    """The model's greedy answers of at most `longest` tokens, in the chat template if there is one."""
    rows = [_tokens(tokenizer, prompt) for prompt in asked]
    width = max(map(len, rows))
    padding = tokenizer.pad_token_id or 0
    left = torch.tensor([[padding] * (width - len(row)) + row for row in rows]).to(device())
    seen = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]).to(device())
    with evaluated(model), _greedy(model, longest, padding):
        made = model.generate(left, attention_mask=seen)[:, width:]
    replies = [_ended(row, _ends(model)) for row in made.tolist()]
    texts = [tokenizer.decode(reply, skip_special_tokens=True).strip() for reply in replies]
    whole = [row + reply for row, reply in zip(rows, replies, strict=True)]
    length = max(map(len, whole))
    place = torch.arange(length)
    begins, stops = torch.tensor([list(map(len, rows)), list(map(len, whole))])[..., None]
    tokens = torch.tensor([row + [padding] * (length - len(row)) for row in whole])
    mask = place < stops
    return Answers(*(t.to(device()) for t in (tokens, mask, mask & (place >= begins))), texts)


def _tokens(tokenizer: Any, prompt: str) -> list[int]:
    if tokenizer.chat_template is None:
        return tokenizer(prompt)["input_ids"]
    message = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # the template has them


@contextmanager
def _greedy(model: Any, longest: int, padding: int) -> Iterator[None]:
    """The model without its own wishes for generation (beams, penalties), which are no greedy choice.

    What is passed to `generate` would only be joined with them.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    end = own.eos_token_id
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=longest, pad_token_id=padding, eos_token_id=end
    )
    try:
        yield
    finally:
        model.generation_config = own


def _ends(model: Any) -> set[int]:
    end = model.generation_config.eos_token_id
    return set(end) if isinstance(end, list) else {end}


def _ended(reply: list[int], ends: set[int]) -> list[int]:
    """Up to its end token, which belongs to the answer; what follows is padding."""
    stop = next((i + 1 for i, token in enumerate(reply) if token in ends), len(reply))
    return reply[:stop]


class Drift:
    """The pretrained model's probabilities, to measure others against.

    They are kept in float32, since what is measured is small: 4 bytes a word of the vocabulary and token
    (SmolLM2: 0.2 MB a token).

    Args:
        model: the pretrained model.
        general: blocks of tokens of general English, (count, length).
        own: its answers.
    """

    def __init__(self, model: nn.Module, general: Tensor, own: Answers) -> None:
        self._general, self._own = general.to(device()), own
        _, self._in_general = self._general_logits(model)
        self._in_answers = self._answer_logits(model)

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Loss on general English; drift there and in the answers; the share of their tokens still chosen."""
        loss, general = self._general_logits(model)
        answered = self._answer_logits(model)
        chosen = self._own.tokens[self._own.answered]
        return {
            "general": loss,
            "drift_general": _divergence(self._in_general, general),
            "drift_answers": _divergence(self._in_answers, answered),
            "same_tokens": float((answered.argmax(-1) == chosen).double().mean()),
        }

    @torch.no_grad()
    def _general_logits(self, model: nn.Module) -> tuple[float, Tensor]:
        """Loss and log-probabilities of the last three quarters of each block; see `_text.context`."""
        skipped = context(self._general)
        with evaluated(model):
            found = [model(input_ids=rows).logits[:, skipped - 1 : -1] for rows in self._general.split(4)]
        logits = torch.cat(found).flatten(0, 1).float().log_softmax(-1)
        return float(F.nll_loss(logits, self._general[:, skipped:].flatten())), logits

    @torch.no_grad()
    def _answer_logits(self, model: nn.Module) -> Tensor:
        """Log-probabilities of each answer's tokens, given the prompt and the answer so far."""
        tokens, mask, answered, _ = self._own
        with evaluated(model):
            logits = model(input_ids=tokens, attention_mask=mask.long()).logits[:, :-1]
        return logits[answered[:, 1:]].float().log_softmax(-1)


def _divergence(before: Tensor, after: Tensor) -> float:
    """Mean KL(before || after), from log-probabilities of shape (tokens, vocabulary)."""
    # A few tokens at a time: the terms take as much memory as the probabilities.
    pairs = zip(before.split(256), after.split(256), strict=True)
    return sum(float(F.kl_div(a, b, reduction="sum", log_target=True)) for b, a in pairs) / len(before)
