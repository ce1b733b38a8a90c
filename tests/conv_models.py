"""Small convolutional networks in the forms that large ones have: what chains of convolutions look like."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Basic(nn.Module):
    """A residual block as torchvision's: one ReLU module, in place, for both places."""

    def __init__(self, into: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(into, out, 3, stride, 1, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(out), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample: nn.Module | None = None
        if stride != 1 or into != out:
            self.downsample = nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += shortcut
        return self.relu(out)


class Bottleneck(nn.Module):
    """The same with three convolutions, and functions for activations."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(into, out, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.conv3, self.bn3 = nn.Conv2d(out, into, 1, bias=False), nn.BatchNorm2d(into)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + x)


class PreActivation(nn.Module):
    """Norm and activation come before the convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        return self.conv2(F.relu(self.bn2(out))) + x


class Inverted(nn.Module):
    """MobileNetV2's block: wide, depthwise, and a linear end."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(width, 3 * width, 1, bias=False),
            nn.BatchNorm2d(3 * width),
            nn.ReLU6(inplace=True),
            nn.Conv2d(3 * width, 3 * width, 3, padding=1, groups=3 * width, bias=False),
            nn.BatchNorm2d(3 * width),
            nn.ReLU6(inplace=True),
            nn.Conv2d(3 * width, width, 1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Controlled(nn.Module):
    """What torch.fx can't trace: it looks at numbers."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.shape[1] == 3 and float(x.sum()) < 1e30 else self.inner(x[:, :3])


def head(width: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5)]


def stem(out: int) -> list[nn.Module]:
    return [nn.Conv2d(3, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]


def vgg(norm: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = []
    for into, out, pool in ((3, 8, False), (8, 12, True), (12, 16, False)):
        layers += [nn.Conv2d(into, out, 3, padding=1)]
        layers += [nn.BatchNorm2d(out)] if norm else []
        layers += [nn.ReLU(inplace=True)]
        layers += [nn.MaxPool2d(2)] if pool else []
    return nn.Sequential(*layers, *head(16))


def resnet() -> nn.Sequential:
    return nn.Sequential(*stem(8), Basic(8, 8), Basic(8, 12, 2), Basic(12, 12), *head(12))


def bottleneck() -> nn.Sequential:
    return nn.Sequential(*stem(8), Bottleneck(8, 4), Bottleneck(8, 4), *head(8))


def preactivation() -> nn.Sequential:
    return nn.Sequential(*stem(8), PreActivation(8), PreActivation(8), *head(8))


def mobilenet() -> nn.Sequential:
    """Version 1: depthwise, then pointwise."""
    layers = stem(8)
    for into, out in ((8, 12), (12, 16)):
        layers += [
            nn.Conv2d(into, into, 3, padding=1, groups=into, bias=False),
            nn.BatchNorm2d(into),
            nn.ReLU(),
        ]
        layers += [nn.Conv2d(into, out, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
    return nn.Sequential(*layers, *head(16))


def inverted() -> nn.Sequential:
    return nn.Sequential(*stem(4), Inverted(4), Inverted(4), *head(4))


MODELS: dict[str, Any] = {
    "vgg": vgg,
    "vgg, no norm": lambda: vgg(norm=False),
    "resnet": resnet,
    "bottleneck": bottleneck,
    "preactivation": preactivation,
    "mobilenet": mobilenet,
    "inverted": inverted,
}


def trained(kind: str, seed: int = 0) -> nn.Module:
    """One with statistics and weights of its norms that are not those of the start."""
    torch.manual_seed(seed)
    model = MODELS[kind]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for t, low, high in ((module.running_mean, -0.3, 0.3), (module.running_var, 0.5, 1.5)):
                t.uniform_(low, high)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.5)
    return model.eval()


def images(rows: int = 3, size: int = 8, seed: int = 1) -> Tensor:
    return torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(seed))
