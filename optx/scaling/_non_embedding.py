"""How many parameters a model has besides embeddings and output head: the N of scaling laws."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from optx._errors import OptxError, near
from optx.inject._weights import is_linear

_POSITIONS = re.compile(r"(^|[._])pos(ition|itional)?_?(embed|emb|enc)", re.IGNORECASE)
# What linear modules that make logits are called; those in a numbered stack are none.
_HEADS = (
    *("lm_head", "embed_out", "unembed", "head", "output", "score", "classifier", "logits"),
    *("qa_outputs", "logits_proj", "proj_out", "output_projection"),
)
_IN_A_STACK = re.compile(r"(^|\.)\d+(\.|$)")


def non_embedding_params(model: nn.Module, *, head: str | None = None) -> int:
    """Parameters of a model besides embeddings and output head: the N of `optx.scaling.step_law`.

    Left out are all embedding modules (of tokens, positions, segments), parameters named as position
    embeddings, and the head: what ``get_output_embeddings()`` of a transformers' model returns, else a linear
    module whose weight is an embedding's, else linear modules outside of the blocks that are called
    ``lm_head``, ``head``, ``classifier``, ``score`` or the like, else the one that makes as many numbers as
    there are tokens. A tensor that has several names counts once; experts all count, used or not.

    Args:
        model: any module, on the meta device too.
        head: path of the output head, where the model's own isn't found.

    Returns:
        A whole number. Biases and norms count, as do their parameters outside of the blocks.

    Raises:
        OptxError: ``head`` is no module, several modules may be the head, parameters are packed or not yet
            made, or nothing is left.

    Example:
        >>> import optx
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8), nn.Linear(8, 50))
        >>> optx.scaling.non_embedding_params(model)
        72
    """
    modules = dict(model.named_modules())
    embeddings = {path: one for path, one in modules.items() if _is_embedding(one)}
    left_out = [weight for one in embeddings.values() for weight in one.parameters(recurse=False)]
    left_out += [p for one in _heads(model, modules, embeddings, head) for p in one.parameters()]
    left_out += [p for name, p in model.named_parameters() if _POSITIONS.search(name)]
    without = {id(p) for p in left_out}
    _check_stored(modules)
    counted = [p for p in model.parameters() if id(p) not in without]
    if not counted:
        raise OptxError("non_embedding_params: the model has no parameters besides embeddings and head.")
    return sum(p.numel() for p in counted)


def _check_stored(modules: dict[str, nn.Module]) -> None:
    """Raise where numbers of the model are not those of its tensors."""
    for path, one in modules.items():
        held: list[Any] = list(one.parameters(recurse=False))
        if any(isinstance(p, nn.UninitializedParameter) for p in held):
            raise OptxError(
                f"non_embedding_params: {path!r} has no weights yet, so they can't be counted. Call the "
                "model once before."
            )
        packed = is_linear(one) and not isinstance(getattr(one, "weight", None), nn.Parameter)
        if packed or any(not (p.is_floating_point() or p.is_complex()) for p in held):
            raise OptxError(
                f"non_embedding_params: {path!r} holds its weights packed, so they can't be counted. Make "
                "the model unquantised, on the meta device."
            )


def _is_embedding(module: nn.Module) -> bool:
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return True
    weight = getattr(module, "weight", None)  # sharded ones and others' own
    return (
        type(module).__name__.endswith("Embedding") and isinstance(weight, nn.Parameter) and weight.ndim == 2
    )


def _heads(
    model: nn.Module, modules: dict[str, nn.Module], embeddings: dict[str, nn.Module], head: str | None
) -> list[nn.Module]:
    if head is not None:
        if head not in modules or not head:
            raise OptxError(
                f"non_embedding_params: head is {head!r}, no module. {near(head, filter(None, modules))}"
            )
        return [modules[head]]
    getter: Any = getattr(model, "get_output_embeddings", None)
    found = getter() if callable(getter) else None
    if isinstance(found, nn.Module):
        return [found]
    tables = {id(one.weight): one.weight for one in embeddings.values()}
    tied = [one for one in modules.values() if is_linear(one) and id(one.weight) in tables]
    outer = {path: one for path, one in modules.items() if is_linear(one) and not _in_a_block(path, model)}
    named = [
        one for path, one in outer.items() if path.removesuffix(".out_proj").rpartition(".")[2] in _HEADS
    ]
    return tied or named or _by_size(outer, list(tables.values()))


def _in_a_block(path: str, model: nn.Module) -> bool:
    """In a block of a stack; the numbers of an `nn.Sequential` at the top are no blocks."""
    return (
        _IN_A_STACK.search(path.partition(".")[2] if isinstance(model, nn.Sequential) else path) is not None
    )


def _by_size(outer: dict[str, nn.Module], tables: list[Any]) -> list[nn.Module]:
    """The linear module that makes a number for each token (or some more: vocabularies are padded)."""
    if not tables:
        return []
    tokens, width = max(tuple(table.shape) for table in tables)
    shapes: dict[str, Any] = {path: getattr(one, "weight", None) for path, one in outer.items()}
    alike = [
        path
        for path, weight in shapes.items()
        if weight is not None
        and 0.95 * tokens <= weight.shape[0] <= 1.1 * tokens
        and weight.shape[1] == width
    ]
    if len(alike) > 1:
        raise OptxError(
            f"non_embedding_params: each of {', '.join(map(repr, alike))} may be the output head; pass head= "
            "with its path."
        )
    return [outer[path] for path in alike]
