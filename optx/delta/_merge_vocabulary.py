"""Models of several vocabularies: equal tokens are put into equal rows before they are merged.

As mergekit 0.1.5 does it: a token that a model lacks gets the row of the only model that has it, of the
base, or the mean of those that have it. Only, models are taken in the file's order, where mergekit takes them
in the order of a Python set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from optx._errors import OptxError, near
from optx.delta._merge_file import ModelRef, known, model_of, table_of
from optx.delta._merge_settings import Table, count, shown, truth


@dataclass(frozen=True)
class Wish:
    """Where the row of one token is to come from.

    Attributes:
        source: a model's own row for it; another row, of a model; zeros; None: as for the other tokens.
        token: the other row's: a token, or its number.
        force: for all models, also those that have the token.
    """

    source: ModelRef | Literal["zero"] | None
    token: str | int | None
    force: bool


@dataclass(frozen=True)
class Vocabulary:
    """The vocabulary of a result, and where its rows are in each model.

    Attributes:
        tokenizer: transformers' object, which has it.
        is_new: whether the base's own tokenizer has not.
        ids: of the result's tokens.
        size: rows of the result's embeddings: as many, or padded.
        places: for each model, the row of each of the result's tokens; -1 where it has none.
        own: for each model, the number of each of its tokens.
        wishes: for tokens with a wish of their own.
    """

    tokenizer: Any
    is_new: bool
    ids: Mapping[str, int]
    size: int
    places: Mapping[ModelRef, Tensor]
    own: Mapping[ModelRef, Mapping[str, int]]
    wishes: Mapping[str, Wish]

    @property
    def mark(self) -> tuple[Any, ...]:
        """All that rows depend on."""
        return self.size, tuple(self.ids.items()), tuple(self.wishes.items())

    def is_plain(self, model: ModelRef, rows: int) -> bool:
        """Whether a model's rows are the result's already."""
        places, wishes = self.places[model], self.wishes.values()
        same = rows == self.size == len(places) and torch.equal(places, torch.arange(len(places)))
        return same and not any(wish.force for wish in wishes)

    def aligned(
        self, name: str, models: Sequence[ModelRef], tensors: Sequence[Tensor], base: ModelRef | None
    ) -> list[Tensor]:
        """Each model's rows in the result's order, what lacks filled in.

        Args:
            name: of the tensor, for messages.
            models: whose tensors they are.
            tensors: one row, or number, for each of the model's tokens; all of one dtype.
            base: whose row is preferred.
        """
        count_ = len(self.ids)
        found = torch.stack([self.places[model] for model in models])
        forced = torch.zeros(count_, dtype=torch.bool)
        for token, wish in self.wishes.items():
            if token in self.ids:
                forced[self.ids[token]] = wish.force
        fill = self._fill(name, models, tensors, base, found, forced)
        made = list[Tensor]()
        for tensor, places in zip(tensors, found, strict=True):
            rows = fill.clone()
            have = (places >= 0) & ~forced
            rows[have] = tensor[places[have]]
            if self.size > count_:
                rows = torch.cat(
                    [rows, rows.mean(dim=0, keepdim=True).expand(self.size - count_, *rows.shape[1:])]
                )
            made.append(rows)
        return made

    def _fill(
        self,
        name: str,
        models: Sequence[ModelRef],
        tensors: Sequence[Tensor],
        base: ModelRef | None,
        found: Tensor,
        forced: Tensor,
    ) -> Tensor:
        """Rows for those that lack a token: only those that somebody needs are set."""
        fill = tensors[0].new_zeros((len(self.ids), *tensors[0].shape[1:]))
        needed = (found < 0).any(dim=0) | forced
        have = found >= 0
        number = have.sum(dim=0)
        free = needed.clone()
        for token, wish in self.wishes.items():
            row = self.ids.get(token)
            if row is None:
                continue
            free[row] = False
            if bool(needed[row]):
                fill[row] = self._wished(name, token, wish, models, tensors)
        of_base = torch.zeros_like(free)
        if base in models:
            of_base = free & have[models.index(base)] & (number > 1)
            fill[of_base] = tensors[models.index(base)][found[models.index(base)][of_base]]
        rest = free & ~of_base & (number > 0)
        for tensor, places in zip(tensors, found, strict=True):
            mine = rest & (places >= 0)
            fill[mine] = fill[mine] + tensor[places[mine]]
        shape = (-1, *([1] * (fill.ndim - 1)))
        fill[rest] /= number[rest].to(fill.dtype).view(shape)
        return fill

    def _wished(
        self, name: str, token: str, wish: Wish, models: Sequence[ModelRef], tensors: Sequence[Tensor]
    ) -> Tensor:
        if wish.source == "zero":
            return torch.zeros_like(tensors[0][0])
        if wish.source is None:
            raise OptxError(f"config: token {token!r} is in not every model, and has no source.")
        if wish.source not in models:
            raise OptxError(f"config: the source {wish.source.text!r} of token {token!r} has no {name!r}.")
        row: int | None = None
        if isinstance(wish.token, str):
            row = self.own[wish.source].get(wish.token)
        elif isinstance(wish.token, int):
            row = wish.token
        else:
            row = int(self.places[wish.source][self.ids[token]])
        rows = tensors[models.index(wish.source)]
        if row is None or not 0 <= row < len(rows):
            raise OptxError(
                f"config: the source {wish.source.text!r} of token {token!r} has no "
                f"{token if wish.token is None else wish.token!r} among its {len(rows)} rows."
            )
        return rows[row]


def wishes_of(table: Table) -> dict[str, Wish]:
    """The table ``tokens`` of a file's ``tokenizer``, and that the rest of it is known.

    Raises:
        OptxError: something in it is not mergekit's format; names it.
    """
    known(table, ("source", "tokens", "pad_to_multiple_of"), "config: a tokenizer has no")
    found = dict[str, Wish]()
    for token, wish in table_of(table.get("tokens"), "tokens").items():
        own = table_of(wish, f"token {token!r}")
        known(own, ("source", "force"), f"config: token {token!r} has no")
        source, other = _source(str(token), own.get("source"))
        found[str(token)] = Wish(source, other, truth("force", own.get("force", False)))
    return found


def _source(token: str, value: Any) -> tuple[ModelRef | Literal["zero"] | None, str | int | None]:
    kind = table_of(value, "source").get("kind") if isinstance(value, Mapping) else None
    if value is None or kind is None:
        return (None if value is None else model_of(value, f"source of token {token!r}")), None
    own = table_of(value, "source")
    if kind == "zero":
        return "zero", None
    if kind != "model_token":
        raise OptxError(
            f"config: kind of token {token!r} is {shown(kind)}. {near(str(kind), ('zero', 'model_token'))}"
        )
    known(own, ("kind", "model", "token", "token_id"), f"config: the source of token {token!r} has no")
    number, word = own.get("token_id"), own.get("token")
    if (number is None) == (word is None):
        raise OptxError(f"config: the source of token {token!r} must have either 'token' or 'token_id'.")
    model = model_of(own.get("model"), f"source of token {token!r}")
    return model, str(word) if number is None else count("token_id", number)
