"""Datasets that tell their items' indices, through real loaders and wrappers."""

from __future__ import annotations

import pickle
from collections import namedtuple
from typing import Any

import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import optx
from optx._errors import OptxError


class Squares(Dataset[Any]):
    classes = ("a", "b")

    def __len__(self) -> int:
        return 7

    def __getitem__(self, i: int) -> tuple[float, int]:
        return float(i * i), i % 2


@pytest.mark.parametrize("workers", [0, 2])
def test_each_item_has_its_own_index_in_any_order(workers: int) -> None:
    loader = DataLoader(optx.with_index(Squares()), batch_size=3, shuffle=True, num_workers=workers)
    seen = []
    for x, y, index in loader:
        assert torch.equal(x, index.double() ** 2)
        assert torch.equal(y, index % 2)
        seen += index.tolist()
    assert sorted(seen) == list(range(7))


def test_length_attributes_and_pickles_are_the_datasets() -> None:
    data = optx.with_index(Squares())
    assert len(data) == 7  # type: ignore[arg-type]
    assert data.classes == ("a", "b")  # type: ignore[attr-defined]
    assert pickle.loads(pickle.dumps(data))[3] == (9.0, 1, 3)
    assert data[-1] == (36.0, 0, 6)
    assert data[torch.tensor(2)] == (4.0, 0, 2)
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = data.nothing_of_the_kind  # type: ignore[attr-defined]
    with pytest.raises(IndexError, match="item 7 of a dataset of 7"):
        data[7]
    with pytest.raises(OptxError, match="read by whole numbers, not by slice"):
        data[1:3]


def test_parts_and_sums_of_datasets() -> None:
    part = [5, 1, 3]
    assert [item[-1] for item in Subset(optx.with_index(Squares()), part)] == part  # type: ignore[attr-defined]
    inside = optx.with_index(Subset(Squares(), part))
    assert [inside[i] for i in range(3)] == [(25.0, 1, 0), (1.0, 1, 1), (9.0, 1, 2)]
    batch = next(iter(DataLoader(inside, batch_size=3)))  # Subset fetches whole batches of its own
    assert batch[2].tolist() == [0, 1, 2]
    assert batch[0].tolist() == [25.0, 1.0, 9.0]
    both = optx.with_index(ConcatDataset([Squares(), Squares()]))
    assert both[9] == (4.0, 0, 9)


def test_items_of_every_form() -> None:
    assert optx.with_index([[1, 2], [3, 4]])[1] == [3, 4, 1]
    assert optx.with_index(["text"])[0] == ("text", 0)
    assert optx.with_index([{"x": 5}])[0] == {"x": 5, "index": 0}
    assert optx.with_index([{"index": 5}], key="row")[0] == {"index": 5, "row": 0}
    assert optx.with_index(TensorDataset(torch.ones(2)))[1] == (torch.tensor(1.0), 1)
    with pytest.raises(OptxError, match="item 0 has an entry 'index' already; give with_index another key"):
        optx.with_index([{"index": 5}])[0]
    with pytest.raises(OptxError, match="item 0 is a Pair, whose fields are fixed"):
        optx.with_index([namedtuple("Pair", "x y")(1, 2)])[0]


def test_hugging_face_datasets() -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"x": [float(i) for i in range(6)]}).with_format("torch")
    data = optx.with_index(rows)
    assert data.column_names == ["x"]  # type: ignore[attr-defined]
    for batch in DataLoader(data, batch_size=4, shuffle=True):
        assert torch.equal(batch["x"], batch["index"].float())
    with pytest.raises(OptxError, match=r"an? IterableDataset has no items by number"):
        optx.with_index(rows.to_iterable_dataset())


def test_streams_are_refused() -> None:
    class Stream(IterableDataset[int]):
        def __iter__(self) -> Any:
            return iter(range(3))

    for stream in (Stream(), iter([1]), Dataset()):
        with pytest.raises(OptxError, match="has no items by number, so none has an index that is the same"):
            optx.with_index(stream)
