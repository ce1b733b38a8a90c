"""Modules whose weights are changed, an input for each, and whole models of them."""

from __future__ import annotations

from typing import Any

import torch
from adapter_models import move
from torch import Tensor, nn
from torch.nn import functional as F

import optx
from optx import FLoRA


def serve(module: nn.Module, injection: FLoRA, scale: float = 0.0) -> tuple[Any, optx.Handle]:
    model = nn.Sequential(module)
    handle = optx.attach(model, injection, targets="0")
    if scale:
        move(handle, scale)
    return model, handle


def resnet() -> nn.Module:
    """Named as torchvision's and timm's are: layer<i>.<j>.conv<k>, downsample.0."""

    class Block(nn.Module):
        def __init__(self, width: int, out: int) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(width, out, 3, stride=2, padding=1, bias=False)
            self.bn1 = nn.BatchNorm2d(out)
            self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
            self.bn2 = nn.BatchNorm2d(out)
            self.downsample = nn.Sequential(nn.Conv2d(width, out, 1, stride=2), nn.BatchNorm2d(out))

        def forward(self, x: Tensor) -> Tensor:
            inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
            return F.relu(inner + self.downsample(x))

    class ResNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
            self.layer1 = nn.Sequential(Block(8, 8))
            self.layer2 = nn.Sequential(Block(8, 16))
            self.fc = nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.layer2(self.layer1(self.conv1(x))).mean((2, 3)))

    torch.manual_seed(0)
    return ResNet().eval()


TOKENS = torch.arange(24).view(2, 12) % 64
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(2, 4, 9, 8, generator=torch.Generator().manual_seed(3))


def conv(kind: Any, **more: Any) -> Any:
    return lambda: kind(4, 6, 3, **more)


MODULES: dict[str, tuple[Any, Tensor]] = {
    "linear": (lambda: nn.Linear(4, 6), IMAGES.movedim(1, -1)),
    "linear without bias": (lambda: nn.Linear(4, 6, bias=False), IMAGES.movedim(1, -1)),
    "conv1d": (conv(nn.Conv1d, stride=2, padding=1), IMAGES[0].movedim(1, 0)),
    "conv2d": (conv(nn.Conv2d, stride=2, padding=1, dilation=2), IMAGES),
    "conv2d without a batch": (conv(nn.Conv2d), IMAGES[0]),
    "conv2d circular": (conv(nn.Conv2d, padding=2, padding_mode="circular"), IMAGES),
    "conv2d same reflect": (conv(nn.Conv2d, padding="same", padding_mode="reflect"), IMAGES),
    "conv2d in groups": (conv(nn.Conv2d, groups=2, padding=1, padding_mode="replicate"), IMAGES),
    "conv2d 3 x 2": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2)), IMAGES),
    "conv3d": (conv(nn.Conv3d, padding=1), IMAGES[..., None]),
    "embedding": (lambda: nn.Embedding(64, 6, padding_idx=3), TOKENS),
}
