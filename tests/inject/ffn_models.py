"""Small transformers whose FFN is one module of a block: for experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class FFN(nn.Module):
    def __init__(self, width: int = 6, hidden: int = 10) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(b, t, d))


class Block(nn.Module):
    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = Attention(width, heads), FFN(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Vit(nn.Module):
    """Of the specs: patches of ``patch`` numbers at ``positions`` places, ten classes."""

    def __init__(
        self,
        width: int = 6,
        hidden: int = 10,
        depth: int = 4,
        heads: int = 2,
        patch: int = 4,
        positions: int = 5,
    ) -> None:
        super().__init__()
        self.checkpointed = False
        self.patch = nn.Linear(patch, width)
        self.place = nn.Parameter(0.02 * torch.randn(positions, width))
        self.blocks = nn.ModuleList(Block(width, hidden, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x) + self.place
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.head(self.norm(x).mean(1))


def vit(**sizes: int) -> Vit:
    torch.manual_seed(0)
    return Vit(**sizes)


class Layer(nn.Module):
    """A block whose FFN is one module."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(width), nn.Linear(width, width)
        self.ffn = nn.Sequential(nn.Linear(width, 10), nn.Tanh(), nn.Linear(10, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(x)
        return x + self.ffn(self.norm(x))


def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.Sequential(Layer(7), Layer(7)), nn.Linear(7, 3))


def patches(samples: int = 3, seed: int = 1, positions: int = 5, patch: int = 4) -> Tensor:
    return torch.randn(samples, positions, patch, generator=torch.Generator().manual_seed(seed))
