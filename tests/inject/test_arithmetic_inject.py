"""What injections compute, number by number: faults of one line that other tests let pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import attached
from safetensors.torch import load_file
from torch import Tensor, nn

import optx

BF16 = torch.bfloat16


# ---- autocast -------------------------------------------------------------------------------------------


def test_doras_norm_is_float32_under_autocast() -> None:
    """W = P - s B A with small P: products in bfloat16 give a norm that is off by its own size."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32, bias=False))
    handle = attached(model, optx.LoRA(rank=4, dora=True), targets="0")
    part: Any = handle.served[0].part
    beside = torch.linalg.svd(part.A.detach()).Vh[4:5]  # orthogonal to A's rows
    with torch.no_grad():
        update = part.scale * part.B @ part.A
        model[0].weight.copy_(update.norm(dim=1, keepdim=True) / 30 * beside - update)  # type: ignore[operator]
        part.magnitude.fill_(1.0)
    with torch.no_grad():
        wanted = model(beside)
        with torch.autocast("cpu", BF16):
            got = model(beside)
    assert got.dtype == BF16
    assert float((got / wanted - 1).abs().mean()) < 0.15


METHODS = {
    "lora": optx.LoRA(rank=2),
    "dora": optx.LoRA(rank=2, dora=True),
    "svfit": optx.SVFit(rank=3),
    "flora": optx.FLoRA(rank=2),
    "ia3": optx.IA3(),
}


@pytest.mark.parametrize("method", METHODS)
def test_merging_under_autocast_is_merging(method: str) -> None:
    """What is folded stays: products in bfloat16 would be in the weights for good."""

    def weight(autocast: bool) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 12))
        handle = attached(model, METHODS[method], targets="0")
        before = model[0].weight.clone()  # type: ignore[operator]
        with torch.autocast("cpu", BF16, enabled=autocast):
            handle.merge()
        made = model[0].weight.clone()  # type: ignore[operator]
        assert not torch.equal(made, before)
        return made

    assert torch.equal(weight(True), weight(False))


def test_exports_and_deltas_under_autocast_are_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    handle = attached(nn.Sequential(nn.Linear(20, 12)), optx.FLoRA(rank=3), targets="0")

    def export(name: str, autocast: bool) -> list[Tensor]:
        with torch.autocast("cpu", BF16, enabled=autocast):
            optx.export_lora(handle, tmp_path / name)
            delta = optx.Delta.lora(tmp_path / name)
            product = delta["0.weight"]
        return [*load_file(tmp_path / name / "adapter_model.safetensors").values(), product]

    for one, other in zip(export("under", True), export("plain", False), strict=True):
        assert torch.equal(one, other)


# ---- merging beside hooks -------------------------------------------------------------------------------

LINEAR: dict[str, Any] = {"form": "linear", "modifies": "projections"}
ADDING = {
    "lora": optx.LoRA(rank=2),
    "dora": optx.LoRA(rank=2, dora=True),
    "svfit": optx.SVFit(rank=3),
    "flora": optx.FLoRA(rank=2),
    "parallel": optx.HiddenDelta(rank=2, **LINEAR),
    "bitfit": optx.BitFit(),
}


@pytest.mark.parametrize("first", ADDING)
@pytest.mark.parametrize("second", ADDING)
def test_of_two_changes_that_add_either_may_be_merged_alone(first: str, second: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5)).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    handles = [attached(model, ADDING[n], targets="0", name=f"{n}{i}") for i, n in enumerate((first, second))]
    both = model(x)
    for handle in handles:
        handle.merge()
        torch.testing.assert_close(model(x), both, rtol=0, atol=1e-12)
        handle.unmerge()
        assert torch.equal(model(x), both)


def test_an_output_that_is_a_leaf_is_not_written_to() -> None:
    """Where a backward pass is to end at a module, as with a forward that someone has set on it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5))
    own = model[0].forward
    model[0].forward = lambda x: own(x).detach().requires_grad_()  # type: ignore[assignment]
    handle = attached(model, optx.LoRA(rank=2), targets="0")
    x = torch.randn(2, 3, 6)
    part: Any = handle.served[0].part
    wanted = x @ (model[0].weight + part.scale * part.B @ part.A).T + model[0].bias  # type: ignore[operator]
    made = model(x)
    torch.testing.assert_close(made, wanted)
    made.sum().backward()
    assert part.B.grad is not None


def test_a_second_merge_does_not_undo_what_a_step_did_to_the_merged_weight() -> None:
    """It would start from the copy that the first merge has kept."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5))
    first, second = (attached(model, optx.LoRA(rank=2), targets="0", name=n) for n in ("first", "second"))
    first.merge()
    with torch.no_grad():
        model[0].weight.add_(1.0)  # type: ignore[operator]
    before = model[0].weight.clone()  # type: ignore[operator]
    with pytest.raises(optx.MergeError, match=r"0\.weight was changed after the merge"):
        second.merge()
    assert torch.equal(model[0].weight, before)  # type: ignore[arg-type]
    assert not second.merged
