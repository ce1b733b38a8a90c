"""The experts recipe's digits, the small vision transformer that reads them, and how well it does."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import optx

from ._handwriting import batches, handwriting
from ._rotated import turned
from ._run import device

BATCH = 100
Data = dict[str, tuple[Tensor, Tensor]]


class FFN(nn.Module):
    """Two linear layers."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to the same."""
        return self.fc2(F.gelu(self.fc1(x)))


class Attention(nn.Module):
    """Of several heads."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) to the same."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Norms come first."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = Attention(width), FFN(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) to the same."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Reads 8 x 8 images as 16 patches of 2 x 2."""

    def __init__(self, hidden: int = 64, width: int = 32, depth: int = 4) -> None:
        super().__init__()
        self.enter, self.place = nn.Linear(4, width), nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.ModuleList(Block(width, hidden) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 1, 8, 8) to logits."""
        x = self.enter(F.unfold(x, 2, stride=2).mT) + self.place
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def load(seed: int, size: int, angle: float) -> Data:
    """``size`` digits to learn and 597 to test, upright; and, turned and paler, half as many to tune on."""
    x, y = handwriting()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    test, learn, tune = order[:597], order[597 : 597 + size], order[597 + size :][: size // 2]
    pale = 0.5 * turned(x, angle)
    parts = {"learn": (x, learn), "test": (x, test), "tune": (pale, tune), "test turned": (pale, test)}
    return {name: (images[i].to(device()), y[i].to(device())) for name, (images, i) in parts.items()}


def pretrained(seed: int, data: Data, steps: int, lr: float) -> Transformer:
    """The dense model, trained on upright digits."""
    torch.manual_seed(seed)
    model = Transformer().to(device())
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for _, (x, y) in zip(range(steps), batches(data["learn"], seed, BATCH), strict=False):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


@torch.no_grad()
def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Share of digits that are read right, in evaluation mode."""
    training = model.training
    model.eval()
    x, y = data
    found = float((model(x).argmax(1) == y).float().mean())
    model.train(training)
    return found


def apart(handle: optx.WideHandle) -> float:
    """How differently blocks load their experts: the mean total variation between two of them."""
    loads = list(handle.loads().values())
    pairs = [(a, b) for i, a in enumerate(loads) for b in loads[:i]]
    return float(torch.stack([(a - b).abs().sum() / 2 for a, b in pairs]).mean())


def ffn_work(model: nn.Module) -> int:
    """Multiply-adds of a token in all FFNs of a transformer, as it is after training."""
    return sum(_work(block.mlp) for block in model.blocks)  # type: ignore[union-attr]


def _work(ffn: nn.Module) -> int:
    experts = getattr(ffn, "experts", None)
    if experts is None:
        return sum(p.numel() for p in ffn.parameters() if p.ndim == 2)
    one = sum(p.numel() for p in experts[0].parameters() if p.ndim == 2)  # type: ignore[union-attr]
    return one * ffn.routing.top_k + ffn.router.weight.numel()  # type: ignore[union-attr]
