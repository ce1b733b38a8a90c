"""A window transformer of one's own, as a user of `optx.WindowPrune` might have it, and small real ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import optx


class Attention(nn.Module):
    """One head over the tokens of a window, with a learned embedding (LMD-ViT's modulator)."""

    def __init__(self, dim: int, window: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.modulator = nn.Parameter(0.1 * torch.randn(window * window, dim))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x + self.modulator).chunk(3, -1)
        scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
        if mask is not None:
            scores = (scores.reshape(-1, *mask.shape) + mask).reshape(scores.shape)
        return self.out(scores.softmax(-1) @ v)


class LeFF(nn.Module):
    """A depthwise convolution between two linear layers, over the square that its tokens make."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.conv = nn.Conv2d(2 * dim, 2 * dim, 3, groups=2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        side = int(x.shape[1] ** 0.5)
        h = F.gelu(self.up(x)).transpose(1, 2).unflatten(2, (side, side))
        h = self.conv(F.pad(h, (1, 1, 1, 1), mode="reflect"))
        return self.down(F.gelu(h).flatten(2).transpose(1, 2))


class DropPath(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        keep = torch.rand(len(x), *(1 for _ in x.shape[1:])) >= self.p
        return x * keep / (1 - self.p)


class Block(nn.Module):
    """Rolls first and pads then, and its MLP is of one window: neither is as in transformers."""

    def __init__(
        self, dim: int = 8, window: int = 4, shift: int = 0, drop: float = 0.0, whole: bool = False
    ) -> None:
        super().__init__()
        self.one, self.two = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attend, self.feed, self.path = Attention(dim, window), LeFF(dim), DropPath(drop)
        self.size, self.shift, self.whole = window, shift, whole

    def forward(self, x: Tensor) -> Tensor:
        (_, h, w, _), n = x.shape, self.size
        a = self.one(x).roll((-self.shift, -self.shift), (1, 2))
        a = F.pad(a, (0, 0, 0, -w % n, 0, -h % n))
        high, wide = a.shape[1:3]
        a = self._cut(self.attend(self._cut(a), self._mask(high, wide, x)), (high, wide))
        x = x + self.path(a[:, :h, :w].roll((self.shift, self.shift), (1, 2)))
        if self.whole:
            return x + self.feed(self.two(x).flatten(1, 2)).reshape(x.shape)
        m = F.pad(self.two(x).roll((-self.shift, -self.shift), (1, 2)), (0, 0, 0, -w % n, 0, -h % n))
        y = F.pad(x.roll((-self.shift, -self.shift), (1, 2)), (0, 0, 0, -w % n, 0, -h % n))
        m = self._cut(self.feed(self.two(self._cut(y))), m.shape[1:3])
        return x + self.path(m[:, :h, :w].roll((self.shift, self.shift), (1, 2)))

    def _cut(self, x: Tensor, back: Any = None) -> Tensor:
        n, c = self.size, x.shape[-1]
        if back:
            cut = x.reshape(-1, back[0] // n, back[1] // n, n, n, c).transpose(2, 3)
            return cut.reshape(-1, *back, c)
        cut = x.reshape(len(x), x.shape[1] // n, n, x.shape[2] // n, n, c).transpose(2, 3)
        return cut.reshape(-1, n * n, c)

    def _mask(self, high: int, wide: int, like: Tensor) -> Tensor | None:
        """By the definition: two tokens see each other if no edge of the rolled image lies between them."""
        if not self.shift:
            return None
        n, s, image = self.size, self.shift, like.new_zeros(1, high, wide, 1)
        for i, rows in enumerate((slice(0, high - n), slice(high - n, high - s), slice(high - s, high))):
            for j, columns in enumerate(
                (slice(0, wide - n), slice(wide - n, wide - s), slice(wide - s, wide))
            ):
                image[:, rows, columns] = 3 * i + j
        ids = self._cut(image).squeeze(-1)
        return (ids[:, None] != ids[:, :, None]).to(like) * -100.0


def blocks(module: nn.Module) -> optx.WindowBlock | None:
    if not isinstance(module, Block):
        return None
    return optx.WindowBlock(
        module.one,
        module.attend,
        module.two,
        module.feed,
        window=module.size,
        shift=module.shift,
        drop_path=(module.path, module.path),
    )


def own(depth: int = 4, drop: float = 0.0, seed: int = 0) -> nn.Sequential:
    """Blocks of which every second is shifted."""
    torch.manual_seed(seed)
    return nn.Sequential(*[Block(shift=2 * (i % 2), drop=drop) for i in range(depth)])


def image(batch: int = 3, height: int = 12, width: int = 8, seed: int = 1) -> Tensor:
    return torch.randn(batch, height, width, 8, generator=torch.Generator().manual_seed(seed))


def real(kind: str, size: int = 32, **options: Any) -> nn.Module:
    """A small transformer of transformers' with random weights, 4 x 4 windows."""
    import transformers

    small = dict(embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4, drop_path_rate=0.0, **options)
    torch.manual_seed(0)
    if kind == "Swin2SR":
        config = transformers.Swin2SRConfig(image_size=16, patch_size=1, num_channels=3, upscale=1, **small)
        model: Any = transformers.Swin2SRModel(config)
    else:
        config = getattr(transformers, f"{kind}Config")(image_size=size, patch_size=2, **small)
        model = getattr(transformers, f"{kind}Model")(config)
    with torch.no_grad():  # norms of 1 and 0 hide in which order things are done
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return model.eval()


def move(handle: optx.Handle, seed: int = 3) -> None:
    """Predictors that drop some windows and keep others."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in handle.parameters():
            p.add_(0.5 * torch.randn(p.shape, generator=generator))
