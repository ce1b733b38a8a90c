"""Small real models with random weights, and what the tests of adapters do with them."""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import optx


def llama(**changes: Any) -> Any:
    """Two layers with grouped queries: keys and values have half the width of queries."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32,
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()


def bert(kind: str = "BertForSequenceClassification") -> Any:
    """Two layers; biases and norms that are not what they start as."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    return scramble(getattr(transformers, kind)(config)).eval()


def gpt2() -> Any:
    """Conv1D everywhere, whose weights are (in, out)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2, initializer_range=0.2)
    return scramble(GPT2LMHeadModel(config)).eval()


def scramble(model: nn.Module) -> nn.Module:
    """Biases that matter."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.add_(0.1 * torch.randn_like(p))
    return model


def cache_name(model: nn.Module) -> str:
    """What this version of transformers calls the keys and values of earlier tokens."""
    named = inspect.signature(model.forward).parameters
    return "cache" if "cache" in named else "past_key_values"


class Plain(nn.Module):
    """No transformer: an embedding, convolutions, linear modules; one path is the end of another."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(12, 6, padding_idx=0)
        self.conv1 = nn.Conv1d(6, 8, 3, stride=2, padding=1)
        self.conv = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.one = nn.Conv2d(4, 6, 1, bias=False)
        self.fc = nn.Linear(6, 5)
        self.block = nn.ModuleDict({"fc": nn.Linear(5, 5), "norm": nn.LayerNorm(5)})
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.emb(x).transpose(1, 2)  # (batch, 6, length)
        h = self.conv1(h)[:, None]  # (batch, 1, 8, length / 2)
        h = self.one(self.conv(h)).mean((2, 3))
        h = self.block["norm"](self.block["fc"](self.fc(h).tanh()))
        return self.head(h)


def plain() -> Plain:
    torch.manual_seed(0)
    return Plain().eval()


def ids() -> Tensor:
    """A batch of tokens that every model here has."""
    return torch.randint(0, 12, (2, 7), generator=torch.Generator().manual_seed(1))


def outputs(model: Any, x: Tensor | None = None) -> Tensor:
    """Logits, or the last hidden state."""
    with torch.no_grad():
        out = model(ids() if x is None else x)
    if isinstance(out, Tensor):
        return out
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def part_of(handle: optx.Handle, index: int = 0) -> Any:
    return handle.served[index].part


def only(handle: optx.Handle) -> Any:
    """The part of a handle that has one."""
    [one] = handle.served
    return one.part


def move(handle: optx.Handle, scale: float = 0.3, seed: int = 5) -> None:
    """Away from its start."""
    shake(handle.parameters(), seed, scale)


def moved(model: Any, injection: optx.Injection, targets: Any = None, by: float = 0.3) -> optx.Handle:
    """Attached, and away from its start."""
    handle = optx.attach(model, injection, targets)
    shake(handle.parameters(), by=by)
    return handle


def shake(tensors: Any, seed: int = 3, by: float = 0.1) -> None:
    """As after training: every tensor moves."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in tensors:
            p.add_(by * torch.randn(p.shape, generator=generator).to(p.dtype))


@contextmanager
def peft_talk() -> Generator[None]:
    """PEFT warns of what it does; here that is no error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def in_peft(model: Any, folder: Path) -> Any:
    """A model with a folder's adapter, loaded by PEFT."""
    from peft import PeftModel

    with peft_talk():
        return PeftModel.from_pretrained(model, folder).eval()


def by_peft(model: Any, config: Any, folder: Path, train: Callable[[Any], None] | None = None) -> Any:
    """A model that PEFT adapted; moved as if trained, and saved."""
    from peft import get_peft_model

    with peft_talk():
        adapted = get_peft_model(model, config).eval()
        if train is None:
            shake(p for p in adapted.parameters() if p.requires_grad)
        else:
            train(adapted)
        adapted.save_pretrained(folder)
    return adapted


def attached(model: Any, injection: optx.Injection, **more: Any) -> optx.Handle:
    """Attached, and moved as if trained."""
    handle = optx.attach(model, injection, **more)
    shake(handle.parameters())
    return handle


def config_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def edit_config(folder: Path, **changes: Any) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({**config_in(folder), **changes}))


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def rewrite(folder: Path, tensors: dict[str, Tensor]) -> None:
    """As another library would write the file: without what optx says about it."""
    from safetensors.torch import save_file

    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def assert_close(a: Tensor, b: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def assert_refused(folder: Path, match: str, model: Any = None) -> None:
    """And nothing is changed."""
    model = llama() if model is None else model
    before = {key: t.clone() for key, t in model.state_dict().items()}
    with pytest.raises(optx.FileError, match=match):
        optx.attach(model, folder)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
