"""The coordinate check leaves no trace on models and training, and reads odd modules."""

from __future__ import annotations

import gc
import random
from typing import Any

import numpy as np
import pytest
import torch
from mup_by_hand import batch
from torch import Tensor, nn

from optx.scaling import coordinate_check

pytestmark = pytest.mark.usefixtures("one_thread")  # tiny tensors


class Odd(nn.Module):
    """Shared and uncalled modules, running statistics, dropout, a tuple of outputs, a part in eval mode."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(8, width)
        self.shared = nn.Linear(width, width)
        self.again = self.shared
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)  # whose out_proj is never called
        self.batch_norm, self.drop = nn.BatchNorm1d(width), nn.Dropout(0.3)
        self.unused = nn.Linear(width, width)
        self.still = nn.BatchNorm1d(width).eval()
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        x = self.drop(self.batch_norm(self.again(self.shared(self.first(x)).relu())))
        x = x + self.attention(x[None], x[None], x[None])[0][0]
        return self.head(self.still(x)), {"hidden": x}


@pytest.mark.parametrize("fails", [False, True])
def test_it_leaves_no_trace(fails):
    made: list[Odd] = []

    def make(width: int) -> nn.Module:
        made.append(Odd(width))
        made[-1].head.weight.grad = torch.ones(3, width)
        kept.append({k: v.clone() for k, v in made[-1].state_dict().items()})
        random.random()
        np.random.rand()
        return made[-1]

    def loss(output: Any, pair: Any) -> Tensor:
        if fails and len(made) > 1:
            raise KeyError("mine")
        return nn.functional.cross_entropy(output[0], pair[1])

    kept: list[dict[str, Tensor]] = []
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    with torch.no_grad():
        if fails:
            with pytest.raises(KeyError, match="mine"):
                coordinate_check(make, [8, 16], batch(), optimizer="adam", loss_fn=loss, seeds=1)
        else:
            coordinate_check(make, [8, 16], batch(), optimizer="adam", loss_fn=loss, seeds=1)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])
    assert len(made) == 2
    for model, state in zip(made, kept, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))
        assert model.first.weight.grad is None
        assert model.training
        assert not model.still.training
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_odd_modules_are_read():
    check = coordinate_check(
        Odd,
        [8, 16, 32],
        batch(),
        optimizer="adam",
        loss_fn=lambda out, pair: nn.functional.cross_entropy(out[0], pair[1]),
        seeds=1,
    )
    assert {"first", "shared", "attention", "batch_norm", "still", "head", ""} == {
        name for name, layer in check.layers.items() if layer.has_weights
    }  # the model itself for `unused`, attention for its out_proj
    assert "unused" not in check.layers
    assert "attention.out_proj" not in check.layers
    assert np.all(check.layers[""].update == 0)  # what is not used has no effect
    assert np.all(check.layers["attention"].update[..., 1:] > 0)
    assert np.all(check.layers["batch_norm"].update[..., 1:] > 0)
    assert check.layers["head"].finite_output


def test_training_is_what_it_is_without_the_check():
    """Readings between the steps use up no random numbers and move no running statistics."""
    seen: list[list[float]] = [[], []]

    def loss(which: int, output: Any, pair: Any) -> Tensor:
        value = nn.functional.cross_entropy(output[0], pair[1])
        seen[which].append(value.item())
        return value

    coordinate_check(
        Odd, [8, 16], batch(), optimizer="sgd", lr=0.1, loss_fn=lambda o, p: loss(0, o, p), seeds=1, steps=4
    )
    for width in (8, 16):
        torch.manual_seed(0)
        model = Odd(width)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(4):
            optimizer.zero_grad()
            loss(1, model(batch()[0]), batch()).backward()
            optimizer.step()
    assert seen[0] == seen[1]


def test_batches_are_taken_in_turn_and_read_on_the_first():
    rows: list[int] = []

    class Net(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, width), nn.Linear(width, 3)

        def forward(self, x: Tensor) -> Tensor:
            rows.append(len(x))
            return self.b(self.a(x))

    x, y = batch()
    several = [(x[:4], y[:4]), (x[:5], y[:5])]
    coordinate_check(Net, [8, 16], several, optimizer="sgd", seeds=1, steps=3)
    assert rows[: len(rows) // 2] == [4, 4, 4, 5, 4, 4, 4]  # read, train, read, train, ...


def held() -> int:
    """How many tensors as long as a batch there are."""
    gc.collect()
    return len([t for t in gc.get_objects() if type(t) is Tensor and t.shape[:1] == (4096,)])


@pytest.mark.long
def test_no_activation_is_kept() -> None:
    """The largest tensor that outlives a pass is no larger than the sample."""
    sizes: list[int] = []
    others = held()

    def loss(output: Tensor, pair: Any) -> Tensor:
        del output
        sizes.append(held() - others)
        return model[-1][2].weight.sum()

    model: list[Any] = []

    def make(width: int) -> nn.Module:
        model.append(nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 3)))
        return model[-1]

    x = torch.randn(4096, 8)
    coordinate_check(make, [8, 16], (x, None), optimizer="sgd", loss_fn=loss, seeds=1, sample=16)
    assert 1 <= min(sizes) <= max(sizes) <= 2 + 1  # the batch, as given and as moved; the step's own output
