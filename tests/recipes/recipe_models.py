"""Tiny pretrained models on the disk, for recipes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch


def encoder(folder: Path, words: Iterable[str], layers: int = 1, spread: float = 0.02) -> Path:
    """A folder with a random BERT and a tokenizer of whole words.

    Args:
        folder: where to.
        words: that the tokenizer knows.
        layers: of the encoder.
        spread: standard deviation of its weights.
    """
    from transformers import BertConfig, BertModel, BertTokenizer

    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(words))]
    (folder / "vocab.txt").write_text("\n".join(known))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(known),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=16,
        initializer_range=spread,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    return folder


def causal(folder: Path) -> Path:
    """A folder with a Llama of one layer, wide enough for blocks of 64 codes, and a tokenizer of bytes."""
    wide = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_key_value_heads": 4}
    return _llama(folder, num_attention_heads=4, max_position_embeddings=64, **wide)


def llama(folder: Path, dropout: float = 0.0) -> Path:
    """A folder with a Llama of two narrow layers and a tokenizer of bytes."""
    narrow = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_key_value_heads": 2}
    return _llama(folder, num_attention_heads=4, attention_dropout=dropout, **narrow)


def _llama(folder: Path, **config: Any) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bytewise).save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(alphabet), **config)).save_pretrained(folder)
    return folder


def texts(folder: Path) -> list[str]:
    """Options that name a text to learn and one that is known."""
    words = "the king is dead and the crown lies upon the ground while a cold wind blows from the sea " * 80
    data, general = folder / "data.txt", folder / "general.txt"
    data.write_text(words.strip())
    general.write_text(words.strip()[::-1])
    return ["--data", str(data), "--general", str(general)]
