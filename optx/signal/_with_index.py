"""A dataset whose items tell their own index, for losses that keep a record of each sample."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch.utils.data import Dataset, IterableDataset

from optx._errors import OptxError


def with_index(dataset: Any, key: str = "index") -> Dataset[Any]:
    """The same dataset, with each item's index as the last element of the item.

    ``(x, y)`` becomes ``(x, y, index)``; a dict (of a Hugging Face dataset, say) gets an entry ``"index"``;
    any other item becomes ``(item, index)``. The index is the item's place in what is given here, whatever
    the order in which a sampler asks: ``Subset(with_index(data), part)`` counts in the whole,
    ``with_index(Subset(data, part))`` in the part. Length and attributes are the dataset's own.

    transformers' Trainer drops columns that the model's call does not name: give its arguments
    ``remove_unused_columns=False``, and take the index out of the batch before the model gets it, in a
    ``compute_loss`` of a subclass: its ``compute_loss_func`` sees outputs and labels alone.

    Args:
        dataset: anything with a length and items by number: a map-style `torch.utils.data.Dataset`,
            ``Subset``, ``ConcatDataset``, a Hugging Face dataset, a list.
        key: under which dicts have it.

    Returns:
        A map-style dataset, for a ``DataLoader`` with any sampler and number of workers.

    Raises:
        OptxError: the dataset has no length or no items by number; when an item is read: it has the key
            already, or is a named tuple.

    Keywords: dataset index, sample id, DataLoader.

    Example:
        >>> import torch, optx
        >>> data = torch.utils.data.TensorDataset(torch.zeros(8, 3), torch.arange(8))
        >>> x, y, index = next(iter(torch.utils.data.DataLoader(optx.with_index(data), batch_size=4)))
        >>> index
        tensor([0, 1, 2, 3])
    """
    if isinstance(dataset, _Indexed):
        raise OptxError("with_index: this dataset gives its indices already.")
    if isinstance(dataset, Mapping):
        raise OptxError(
            f"with_index: a {type(dataset).__name__} has datasets by name (splits?); give one of them."
        )
    if isinstance(dataset, IterableDataset) or not (
        hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    ):
        raise OptxError(
            f"with_index: a {type(dataset).__name__} has no items by number, so none has an index that is "
            "the same in each epoch; give a map-style dataset, with __getitem__ and __len__."
        )
    return _Indexed(dataset, key)


class _Indexed(Dataset[Any]):
    def __init__(self, dataset: Any, key: str) -> None:
        self._dataset, self._key = dataset, key

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: Any) -> Any:
        place = self._place(index)
        return self._told(self._dataset[place], place)

    def __getitems__(self, indices: Sequence[Any]) -> list[Any]:
        """A batch at once, as torch's loader asks for where it can; the dataset's own would have no index."""
        places = [self._place(index) for index in indices]
        together = getattr(self._dataset, "__getitems__", None)
        items = together(places) if together else [self._dataset[place] for place in places]
        return [self._told(item, place) for item, place in zip(items, places, strict=True)]

    def __getattr__(self, name: str) -> Any:
        if name in ("_dataset", "_key") or (
            name.startswith("__") and name.endswith("__")
        ):  # a copy that is not filled yet
            raise AttributeError(name)
        return getattr(self._dataset, name)

    def __repr__(self) -> str:
        return f"with_index({self._dataset!r})"

    def _place(self, index: Any) -> int:
        try:
            place = operator.index(index)
        except TypeError:
            raise OptxError(f"with_index: items are read by whole numbers, not by {index!r:.60}.") from None
        if not -len(self) <= place < len(self):
            raise IndexError(f"with_index: item {place} of a dataset of {len(self)}.")
        return place % len(self)

    def _told(self, item: Any, place: int) -> Any:
        if isinstance(item, Mapping):
            entries = cast("Mapping[Any, Any]", item)
            if self._key in entries:
                raise OptxError(
                    f"with_index: item {place} has an entry {self._key!r} already; give with_index another "
                    "key=."
                )
            return {**entries, self._key: place}
        if hasattr(item, "_fields"):
            raise OptxError(
                f"with_index: item {place} is a {type(item).__name__}, whose fields are fixed; have the "
                "dataset give plain tuples or dicts."
            )
        if isinstance(item, list):
            return [*cast("list[Any]", item), place]
        return (*cast("tuple[Any, ...]", item), place) if isinstance(item, tuple) else (item, place)
