"""torch.nn.TransformerEncoder with something attached inside.

In eval mode and with a padding mask it hands its layers a nested tensor, which only a layer's fast path
takes; and a layer with hooks in it takes none. So the encoder is kept from nesting, and gives zeros for
padding as before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_MARK = "_optx_plain"


class Plain:
    """An encoder that does not nest, while anything is attached in it."""

    def __init__(self, encoder: nn.TransformerEncoder) -> None:
        self.users = 0
        self.padding: list[Tensor | None] = []
        last = encoder.layers[-1]
        self.hooks = [
            encoder.register_forward_pre_hook(self._begin, with_kwargs=True),
            last.register_forward_hook(self._clear),
            encoder.register_forward_hook(self._end, always_call=True),
        ]

    def _begin(self, encoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():
            self.padding.append(_padding(encoder, *args, **kwargs))

    def _clear(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """What a nested tensor has no place for comes out of the last layer as zero."""
        if torch.compiler.is_compiling() or not self.padding or self.padding[-1] is None:
            return None
        return output.masked_fill(self.padding[-1][..., None], 0)

    def _end(self, encoder: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not torch.compiler.is_compiling() and self.padding:
            self.padding.pop()


class Use:
    """One handle's use of an encoder; removing the last of them lets it nest again."""

    def __init__(self, encoder: nn.TransformerEncoder) -> None:
        self.encoder = encoder
        plain = encoder.__dict__.get(_MARK)
        if plain is None:
            plain = encoder.__dict__[_MARK] = Plain(encoder)
            encoder.use_nested_tensor = False
        plain.users += 1

    def remove(self) -> None:
        """Undo it."""
        plain: Plain | None = self.encoder.__dict__.get(_MARK)
        if plain is None:
            return
        plain.users -= 1
        if plain.users == 0:
            for hook in plain.hooks:
                hook.remove()
            del self.encoder.__dict__[_MARK]
            self.encoder.use_nested_tensor = True


def nesting(model: nn.Module, path: str) -> list[nn.TransformerEncoder]:
    """The encoders around a module that would nest."""
    names = path.split(".")
    above = (model.get_submodule(".".join(names[:depth])) for depth in range(len(names)))
    return [
        one
        for one in above
        if isinstance(one, nn.TransformerEncoder)
        and (getattr(one, "use_nested_tensor", False) or _MARK in one.__dict__)
    ]


def _padding(
    encoder: Any,
    src: Tensor,
    mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool | None = None,
) -> Tensor | None:
    """True where the encoder by itself would give zeros; None if it would not nest. Its own conditions."""
    first, hidden = encoder.layers[0], src_key_padding_mask
    if hidden is None or mask is not None or first.training or src.dim() != 3:
        return None
    if not torch.backends.mha.get_fastpath_enabled() or torch.is_autocast_enabled():
        return None
    own = (p for name, p in first.named_parameters() if "optx" not in name.split("."))
    if torch.is_grad_enabled() and any(p.requires_grad for p in own):
        return None
    if hidden.dtype != torch.bool:
        hidden = hidden != 0
    aligned = torch._nested_tensor_from_mask_left_aligned  # pyright: ignore
    if not aligned(src, ~hidden):
        return None
    return hidden
