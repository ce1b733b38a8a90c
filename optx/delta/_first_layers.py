"""Which layers of a model come first."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from optx._errors import OptxError, check_range

_LAYERS = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)  # pyright: ignore[reportPrivateUsage]


def shallowest(model: nn.Module, count: int) -> list[str]:
    """Names of the parameters of a model's first layers, in the order of its state dict.

    A layer is a convolution, a linear module or a run of embeddings, with the norm after it; or a whole
    block: a module of a list or of a sequence that has several layers in it, such as a ResNet's bottleneck.

    Args:
        model: any module.
        count: how many layers; at least 1.

    Paper values:
        ``count=7``: VGG16 (authors' code). In ResNet50 the stem is one, and each bottleneck block is one.

    Limits: It goes by the order of the state dict, which is not always the order of the computation.

    Keywords: RWS, robustness, first layers.

    Evidence: ``optx run merge``; ``test_rws.py``.

    Raises:
        OptxError: the model has fewer layers.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> optx.shallowest(model, 1)
        ['0.weight', '0.bias']

    Source: arXiv 2302.12480, section 4.
    """
    check_range("shallowest", "count", count, 1)
    units = list(_units(model))
    if count > len(units):
        raise OptxError(f"shallowest: count is {count}, and the model has {len(units)} layers.")
    return list(dict.fromkeys(name for unit in units[:count] for name in unit))


def _units(model: nn.Module) -> Iterator[list[str]]:
    unit: list[str] = []
    begun = embedding = False
    for path, module, block in _walk(model, ""):
        layer = block or isinstance(module, _LAYERS)
        run = embedding and isinstance(module, nn.Embedding)
        if layer and begun and not run:
            yield unit
            unit = []
        begun, embedding = begun or layer, isinstance(module, nn.Embedding) or (embedding and not layer)
        own = module.named_parameters(recurse=layer)
        unit += [f"{path}.{name}" if path else name for name, _ in own]
    if begun:
        yield unit


def _walk(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module, bool]]:
    """Modules in order, blocks whole."""
    yield path, module, False
    if isinstance(module, _LAYERS):
        return
    for name, child in module.named_children():
        full = f"{path}.{name}" if path else name
        listed = isinstance(module, nn.Sequential | nn.ModuleList)
        if listed and not isinstance(child, nn.Sequential | nn.ModuleList) and _several(child):
            yield full, child, True
        else:
            yield from _walk(child, full)


def _several(module: nn.Module) -> bool:
    return sum(isinstance(part, _LAYERS) for part in module.modules()) > 1
