"""Stacks of layers, and small real models, for the tests of what stands beside layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapter_models import gpt2
from injections import bert, llama, move, run, tokens
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import optx
from optx import Aside

VARIANTS = ("highway", "layerwise", "bottleneck")
STREAMS = ("highway", "bottleneck")
each_variant = pytest.mark.parametrize("variant", VARIANTS)
each_stream = pytest.mark.parametrize("variant", STREAMS)
LAYERS = r"layers\.\d+"
Caller = Callable[[nn.Module, Tensor], Tensor]


class Layer(nn.Module):
    """x + W_2 tanh(W_1 x)."""

    def __init__(self, d: int = 8) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(d, d), nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(self.one(x).tanh())


class Net(nn.Module):
    """A stack of layers, and how it calls them."""

    def __init__(
        self, depth: int = 4, d: int = 8, kind: Callable[[int], nn.Module] = Layer, seed: int = 0
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(kind(d) for _ in range(depth))
        self.call: Caller = call

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.call(layer, x)
        return x


def call(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


def checkpointed(layer: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(layer, x, use_reentrant=False)  # hooks are inside


def reentrant(layer: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(layer, x, use_reentrant=True)


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
    )
    return ViTForImageClassification(config).eval()


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=64,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    return T5ForConditionalGeneration(config).eval()


def logits(model: nn.Module) -> Tensor:
    """On a batch of tokens, or of images."""
    name = type(model).__name__
    if name.startswith("ViT"):
        return model(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))).logits
    if name.startswith("T5"):
        return model(input_ids=tokens(), decoder_input_ids=tokens()[:, :4]).logits
    return run(model)


MODELS = [llama, bert, gpt2, vit, t5]
each_model = pytest.mark.parametrize("model", MODELS, ids=lambda make: make.__name__)


def attached(
    variant: str = "highway", depth: int = 4, d: int = 8, moved: bool = True, **options: Any
) -> tuple[Net, optx.Handle]:
    net = Net(depth, d)
    handle = optx.attach(net, Aside(**{"rank": 3, "variant": variant, **options}), LAYERS)
    if moved:
        move(handle)
    return net, handle


def batch(*shape: int, seed: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*(shape or (5, 8)), generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradients(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    loss().square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], atol: float) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=atol, msg=name)


def parts(net: Net, name: str = "aside") -> list[Any]:
    return [getattr(layer.optx, name) for layer in net.layers]


def links(net: Net) -> int:
    """How many tensors the stream holds something for."""
    return sum(len(found) for found in parts(net)[0].stream._links)
