"""optx.Perp: what its adapters compute, learn and merge, by the paper's formulas and autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import optx
from optx import Masks, Perp

FORMS = ("mask", "scale")
KINDS = ("linear", "conv1d of transformers", "conv2d", "grouped, same", "reflect")
both_forms = pytest.mark.parametrize("form", FORMS)


def layer(kind: str, bias: bool = True) -> Any:
    from transformers.pytorch_utils import Conv1D

    if kind == "linear":
        return nn.Linear(9, 7, bias=bias)
    if kind == "conv1d of transformers":
        made = Conv1D(7, 9)
        return made
    if kind == "conv2d":
        return nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=bias)
    if kind == "grouped, same":
        return nn.Conv2d(4, 6, (2, 3), padding="same", dilation=2, groups=2, bias=bias)
    return nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", bias=bias)


def batch(kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return (
        torch.randn(2, 3, 9, dtype=dtype)
        if "1d" in kind or kind == "linear"
        else torch.randn(2, 4, 6, 7, dtype=dtype)
    )


def pruned(module: nn.Module, share: float = 0.5) -> Masks:
    masks = Masks.from_bool({"0.weight": torch.rand_like(module.weight) >= share})  # type: ignore[arg-type]
    masks.apply_(nn.Sequential(module))
    return masks


def attached(
    kind: str, form: str, share: float = 0.5, **options: Any
) -> tuple[nn.Sequential, optx.Handle, Masks]:
    model = nn.Sequential(layer(kind, options.pop("biased", True)))
    masks = pruned(model[0], share)
    perp = Perp(adapter=form, rank=options.pop("rank", 4), alpha=6.0, **options)  # type: ignore[arg-type]
    return model, optx.attach(model, perp, masks=masks), masks


def move(handle: optx.Handle) -> None:
    with torch.no_grad():
        for p in handle.parameters():
            p.add_(0.3 * torch.randn_like(p))


def effective(module: Any, mask: Tensor) -> Tensor:
    """The paper's weight, by its own formula."""
    part = module.optx.perp
    low = (part.B @ part.A).view(part.B.shape[0], *part.A.shape[1:])
    low = low.t() if part.transposed else low.view(module.weight.shape)
    return module.weight + part.scale * mask * low if part.scale is not None else module.weight * low


def by_formula(kind: str, module: Any, mask: Tensor, x: Tensor) -> Tensor:
    twin, part = layer(kind), module.optx.perp
    values = {"weight": effective(module, mask)}
    if module.bias is not None:
        values["bias"] = module.bias + (0 if part.bias is None else part.bias)
    return torch.func.functional_call(twin, values, (x,))


@both_forms
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_the_formulas(kind: str, form: str) -> None:
    model, handle, masks = attached(kind, form)
    model.double()
    move(handle)
    mask, x = masks["0.weight"], batch(kind, torch.float64).requires_grad_()
    y, wanted = model(x), by_formula(kind, model[0], mask, x)
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    leaves = [x, *model.parameters()]
    assert len(leaves) == 6
    found = torch.autograd.grad((y * weights).sum(), leaves)
    for leaf, one, other in zip(
        leaves, found, torch.autograd.grad((wanted * weights).sum(), leaves), strict=True
    ):
        assert one.shape == leaf.shape
        if (
            leaf is model[0].weight and form == "scale"
        ):  # a pruned weight has no part in the formula's W (B A)
            one, other = one * mask, other * mask
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@both_forms
def test_a_derivative_of_gradients(form: str) -> None:
    model, handle, masks = attached("linear", form)
    model.double()
    move(handle)
    part: Any = model[0].optx.perp  # type: ignore[union-attr]
    x = batch("linear", torch.float64).requires_grad_()

    def penalty(y: Tensor) -> Tensor:
        first = torch.autograd.grad(y.square().sum(), [x, part.A, part.B], create_graph=True)
        return sum((one.square().sum() for one in first), torch.zeros(()))

    found = torch.autograd.grad(penalty(model(x)), list(model.parameters()))
    wanted = torch.autograd.grad(
        penalty(by_formula("linear", model[0], masks["0.weight"], x)), list(model.parameters())
    )
    names = [name for name, _ in model.named_parameters()]
    for name, one, other in zip(names, found, wanted, strict=True):
        kept = masks["0.weight"] if name == "0.weight" else 1
        torch.testing.assert_close(one * kept, other * kept, rtol=1e-9, atol=1e-9, msg=name)


@both_forms
def test_vmap_over_adapters(form: str) -> None:
    """An ensemble over one pruned base in one call, and its gradients."""
    model, handle, _ = attached("linear", form)
    stacked = {name: torch.randn(3, *p.shape) for name, p in handle.named_parameters()}
    x = batch("linear")

    def loss(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, values, (x,)).square().sum()

    together = torch.vmap(torch.func.grad(loss))(stacked)
    for i in range(3):
        values = {name: t[i].clone().requires_grad_() for name, t in stacked.items()}
        wanted = torch.autograd.grad(loss(values), list(values.values()))
        for name, gradient in zip(values, wanted, strict=True):
            torch.testing.assert_close(together[name][i], gradient, rtol=1e-4, atol=1e-3)


# ---- the paper's properties -------------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 19)),
    share=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    form=st.sampled_from(["mask", "scale", "lora_prune"]),
    size=st.sampled_from([1e-3, 1.0, 1e30]),
    seed=st.integers(0, 9),
)
def test_a_merge_has_every_zero_of_the_mask(
    shape: tuple[int, int], share: float, dtype: torch.dtype, form: Any, size: float, seed: int
) -> None:
    """Property 1: for any A and B, also such that overflow."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(*shape)).to(dtype)
    masks = pruned(model[0], share)
    rank = min(3, *shape)
    handle = optx.attach(model, Perp(adapter=form, rank=rank), masks=masks)
    before = model[0].weight.clone()  # type: ignore[operator]
    with torch.no_grad():
        for p in handle.parameters():
            p.add_(torch.randn_like(p), alpha=size)
    assert {p.dtype for p in handle.parameters()} == {torch.promote_types(dtype, torch.float32)}
    handle.merge()
    masks.verify(model)
    merged: Any = model[0].weight
    assert bool((merged == 0)[~masks["0.weight"]].all())
    if size >= 1 and masks["0.weight"].any():  # less may be rounded away
        assert not torch.equal(merged, before)
    handle.remove()
    assert torch.equal(model[0].weight, before)  # type: ignore[arg-type]


def test_without_a_mask_it_is_lora_and_with_nothing_kept_nothing() -> None:
    """Property 2."""
    model, handle, _ = attached("linear", "mask", share=0.0)
    twin = nn.Sequential(nn.Linear(9, 7))
    twin.load_state_dict({key: t for key, t in model.state_dict().items() if "optx" not in key})
    move(handle)
    lora = optx.attach(twin, optx.LoRA(rank=4, alpha=6, bias="all"), "0")
    values = dict(zip(("A", "B", "bias"), handle.parameters(), strict=True))
    with torch.no_grad():
        for name, p in lora.named_parameters():
            p.copy_(values[name.rpartition(".")[2]])
    x = batch("linear")
    torch.testing.assert_close(model(x), twin(x), rtol=1e-6, atol=1e-6)
    for one in (model, twin):
        one(x).square().sum().backward()
    for one, other in zip(handle.parameters(), lora.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-4)
    model, handle, _ = attached("linear", "mask", share=1.0)
    move(handle)
    y = model(x)
    assert torch.equal(y, (model[0].bias + handle.parameters()[2]).expand_as(y))  # type: ignore[operator]
    y.square().sum().backward()
    A, B, bias = (p.grad for p in handle.parameters())
    assert A is not None
    assert B is not None
    assert bias is not None
    assert not A.any()
    assert not B.any()
    assert bias.any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["mask", "scale", "scale, equal"])
def test_the_start_changes_nothing(kind: str, form: str) -> None:
    """Property 3; ScaleLoRA to the bit where 1 / sqrt(r) is a binary number."""
    for rank in (1, 3, 4):
        torch.manual_seed(rank)
        model = nn.Sequential(layer(kind))
        masks, x = pruned(model[0]), batch(kind)
        before = model(x)
        perp = Perp(adapter=form.partition(",")[0], rank=rank, equal_start="equal" in form)  # type: ignore[arg-type]
        optx.attach(model, perp, masks=masks)
        if rank == 3 and form != "mask":
            torch.testing.assert_close(model(x), before, rtol=2e-6, atol=1e-6)
        else:
            assert torch.equal(model(x), before)


@both_forms
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merge_is_the_output_of_before_to_the_bit(kind: str, form: str, dtype: torch.dtype) -> None:
    """Property 4: what is trained in half precision is the weight that the merge writes."""
    model = nn.Sequential(layer(kind)).to(dtype)
    masks, x = pruned(model[0]), batch(kind, dtype)
    before = model(x)
    handle = optx.attach(model, Perp(adapter=form, rank=4), masks=masks)  # type: ignore[arg-type]
    move(handle)
    y = model(x)
    assert y.dtype == dtype
    handle.merge()
    assert torch.equal(model(x), y)
    assert not torch.equal(y, before)
    handle.unmerge()
    assert torch.equal(model(x), y)
    handle.remove()
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_several_on_one_weight_add_up(kind: str) -> None:
    """Each scales the weight that is the module's own, whatever is beside it and is merged first."""
    model = nn.Sequential(layer(kind)).double()
    masks, x = pruned(model[0]), batch(kind, torch.float64)
    before, handles = model(x), list[optx.Handle]()
    for form in ("scale", "mask", "scale"):
        perp = Perp(adapter=form, rank=2)  # type: ignore[arg-type]
        handles.append(optx.attach(model, perp, masks=masks, name=f"number{len(handles)}"))
        move(handles[-1])
    y = model(x)
    for order in ((0, 1, 2), (2, 0, 1)):
        for i in order:
            handles[i].merge()
            torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)
        masks.verify(model)
        for i in order:
            handles[i].unmerge()
            torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)
    for handle in handles:
        handle.remove()
    assert torch.equal(model(x), before)


def test_lora_prune_jumps_where_it_would_fill_in() -> None:
    """Property 4, second half."""
    for share in (0.5, 0.0):
        model, handle, masks = attached("linear", "lora_prune", share)
        move(handle)
        x = batch("linear")
        y = model(x)
        handle.merge()
        assert (float((model(x) - y).detach().abs().max()) > 1e-2) == (share > 0)
        masks.verify(model)


def test_rank_of_scale_lora_with_both_starts() -> None:
    """Property 8: alike, components stay alike and B A has rank 1; apart, it gets the rank that it has."""
    ranks: dict[bool, int] = {}
    for equal in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 20))
        masks = pruned(model[0])
        handle = optx.attach(model, Perp(adapter="scale", rank=4, bias=False, equal_start=equal), masks=masks)
        optimizer = torch.optim.Adam(handle.parameters(), lr=0.02)
        x, y = torch.randn(64, 24), torch.randn(64, 20)
        for _ in range(20):
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
        A, B = (p.detach().double() for p in handle.parameters())
        alike = all(torch.equal(B[:, 0], B[:, k]) for k in range(4))
        assert alike == equal
        values = torch.linalg.svdvals(B @ A)
        ranks[equal] = int((values > 1e-3 * values[0]).sum())
    assert ranks == {True: 1, False: 4}


# ---- memory -----------------------------------------------------------------------------------------------


class Dense(TorchDispatchMode):
    """Counts tensors of a weight's size that are alive."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.most, self.alive = size, 0, list[StorageWeakRef]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.numel() >= self.size and made.is_floating_point():
            self.alive.append(StorageWeakRef(made.untyped_storage()))
        self.most = max(self.most, self.now())
        return made

    def now(self) -> int:
        self.alive = [one for one in self.alive if not one.expired()]
        return len({one.cdata for one in self.alive})


@both_forms
def test_no_dense_product_outlives_its_layer(form: str) -> None:
    most = set[int]()
    for layers in (2, 6):
        model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(layers)))
        masks = Masks.from_bool({f"{i}.weight": torch.rand(64, 64) > 0.5 for i in range(layers)})
        masks.apply_(model)
        handle = optx.attach(model, Perp(adapter=form, rank=4), masks=masks)  # type: ignore[arg-type]
        optx.trainable_only(model, handle)
        x = torch.randn(3, 64)
        model(x).sum().backward()  # the first call is looked at
        with Dense(64 * 64) as dense:
            y = model(x)
            assert dense.now() == 0
            y.sum().backward()
            assert dense.now() == 0
        most.add(dense.most)
    assert most <= {1, 2, 3}
