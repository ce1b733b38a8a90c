"""Small models as folders, merged as a YAML text says: by optx, and by mergekit itself."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from optx.delta._mergekit import read_config

yaml: Any = pytest.importorskip("yaml")
LAYERS = 4


def causal(kind: str, seed: int, **changes: Any) -> nn.Module:
    """A small model of a family, every parameter random."""
    import transformers

    sizes: dict[str, Any] = {
        "vocab_size": 37,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32,
        "tie_word_embeddings": False,
    }
    if kind == "GPT2":
        sizes = {"vocab_size": 37, "n_embd": 16, "n_layer": LAYERS, "n_head": 2, "n_positions": 32}
    name = {"GPT2": "GPT2LMHeadModel", "Bert": "BertForSequenceClassification"}.get(
        kind, f"{kind}ForCausalLM"
    )
    model = getattr(transformers, name)(getattr(transformers, f"{kind}Config")(**(sizes | changes)))
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=draws))
    return model


def folders(place: Path, kind: str, names: str = "base a b", **changes: Any) -> Path:
    """Models of one family; all but the first are near it."""
    first: dict[str, Tensor] = {}
    dtype = changes.pop("dtype", torch.float32)
    for seed, name in enumerate(names.split(" ")):
        model = causal(kind, seed, **changes)
        with torch.no_grad():
            if first:
                for key, parameter in model.named_parameters():
                    parameter.mul_(0.3).add_(first[key])
            else:
                first = {key: parameter.clone() for key, parameter in model.named_parameters()}
        model.to(dtype)
        model.save_pretrained(place / name)  # type: ignore[operator]
    return place


def tensors(folder: Path) -> dict[str, Tensor]:
    """All of a folder's, whatever its shards."""
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


def ours(text: str, out: Path, seed: int = 0) -> dict[str, Tensor]:
    """Merge by optx, in the folder one is in."""
    Path("merge.yaml").write_text(text)
    read_config("merge.yaml", seed).run(out, lambda names: names)
    return tensors(out)


def theirs(text: str, out: Path, tokenizer: bool = False) -> dict[str, Tensor]:
    """Merge by mergekit."""
    config = pytest.importorskip("mergekit.config")
    merge = pytest.importorskip("mergekit.merge")
    options = pytest.importorskip("mergekit.options")
    wanted = options.MergeOptions(
        copy_tokenizer=tokenizer, quiet=True, write_model_card=False, device="cpu", lora_merge_cache="loras"
    )
    tasks = pytest.importorskip("mergekit.io.tasks")
    tasks.LoaderCache.loaders.clear()  # it goes by the path as it is written, whatever folder one is in
    logging.disable(logging.ERROR)
    try:
        merge.run_merge(config.MergeConfiguration.model_validate(yaml.safe_load(text)), str(out), wanted)
    finally:
        logging.disable(logging.NOTSET)
    return tensors(out)


def differences(
    text: str, out: Path, near: Callable[[Tensor, Tensor], bool] = torch.equal
) -> tuple[dict[str, Tensor], list[str]]:
    """What optx makes, and the names of what mergekit makes otherwise."""
    mine, other = ours(text, out / "ours"), theirs(text, out / "theirs")
    assert set(mine) == set(other)
    wrong = [name for name, tensor in other.items() if mine[name].dtype != tensor.dtype]
    wrong += [name for name, tensor in other.items() if mine[name].shape != tensor.shape]
    return mine, wrong or [name for name, tensor in other.items() if not near(mine[name], tensor)]


def within_ulps(count: int) -> Callable[[Tensor, Tensor], bool]:
    """Whether no two numbers are further apart than the last digits of the tensor's largest."""

    def near(one: Tensor, other: Tensor) -> bool:
        room = count * torch.finfo(other.dtype).eps * float(other.abs().max())
        return bool((one - other).abs().max() <= room)

    return near
