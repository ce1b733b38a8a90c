"""Numbers at the entries of a mask: those of indexing, for every form of mask, width and order in memory."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sara_runs import adamw, loss, net
from torch import nn

import optx
from optx._mask_bits import pack
from optx.kernels.entries import cpu
from optx.step import bits
from optx.transforms._gather import SMALLEST, Selection

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIZES = st.one_of(
    st.integers(0, 200),
    st.integers(1, 3).flatmap(lambda k: st.integers(-1, 1).map(lambda d: k * 64 * cpu.WORDS + d)),
)


@settings(max_examples=40, deadline=None)
@given(SIZES, st.sampled_from([0.0, 0.02, 0.2, 0.9, 1.0]), st.sampled_from(DTYPES), st.booleans())
def test_the_kernel_is_indexing(numel: int, share: float, dtype: torch.dtype, packed: bool) -> None:
    random = torch.Generator().manual_seed(numel)
    t = torch.randn(numel + 3, generator=random).to(dtype)[3:]  # begins where no vector does
    mask = torch.rand(numel, generator=random) < share
    held = pack(mask.view(1, -1)) if packed else mask
    got = cpu.gather(t, held)
    assert torch.equal(got, t[mask])
    values = torch.randn(got.numel(), generator=random).to(dtype)
    wanted = t.clone()
    wanted[mask] = values
    cpu.scatter(t, held, values)
    assert torch.equal(t, wanted)
    with pytest.raises(optx.ShapeError, match=f"{got.numel() + 1} numbers for the {got.numel()} entries"):
        cpu.scatter(t, held, torch.zeros(got.numel() + 1, dtype=dtype))
    assert torch.equal(t, wanted)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_split_over_threads_does_not_show(threads: int) -> None:
    t, mask = torch.randn(20 * 64 * cpu.WORDS + 8), torch.rand(20 * 64 * cpu.WORDS + 8) < 0.3
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(cpu.gather(t, pack(mask.view(1, -1))), t[mask])
    finally:
        torch.set_num_threads(before)


SHAPES = [(64, 64), (65, 63), (SMALLEST + 1,), (2, 64, 8, 8), (64, 3), (5,), ()]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("order", ["rows", "columns", "gaps"])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_a_selection_is_indexing_in_any_order_in_memory(
    shape: tuple[int, ...], order: str, dtype: torch.dtype
) -> None:
    t = torch.randn(shape).to(dtype)
    if order == "columns":
        t = (
            t.to(memory_format=torch.channels_last)
            if t.ndim == 4
            else t.mT.contiguous().mT
            if t.ndim == 2
            else t
        )
    elif order == "gaps" and t.ndim:
        t = torch.stack([t, t], -1)[..., 0]
    mask = torch.rand(shape) < 0.4
    weight = torch.empty(shape)
    for kept in (mask, bits.settled(mask, weight), bits.settled(mask, t)):
        selection = Selection(kept, t.shape)
        assert torch.equal(selection.mask(), mask)
        assert selection.count() == int(mask.sum())
        got = selection.gathered(t)
        assert torch.equal(got, t[mask])
        version, wanted = t._version, t.clone()
        wanted[mask] = -got
        assert selection.put(t, -got) is t
        assert torch.equal(t, wanted)
        assert t._version > version or not got.numel()  # autograd learns of it
        with pytest.raises(optx.ShapeError, match="numbers for the"):
            selection.put(t, torch.zeros(got.numel() + 1, dtype=dtype))
    every = Selection(bits.every_bit(weight), t.shape)
    assert torch.equal(every.gathered(t), t.reshape(-1))
    assert every.count() == t.numel()


def test_a_gradient_does_not_keep_its_weight_alive() -> None:
    model = net()
    opt = optx.wrap(adamw(model), optx.SaRA(fraction=0.2, compact=True), fused=False)
    loss(model).backward()
    weight = weakref.ref(model[0].weight)
    del model, opt
    gc.collect()
    assert weight() is None


def test_two_threads_at_once() -> None:
    t, mask = torch.randn(6 * 64 * cpu.WORDS), torch.rand(6 * 64 * cpu.WORDS) < 0.5
    wrong: list[int] = []

    def work() -> None:
        wrong.extend(i for i in range(20) if not torch.equal(cpu.gather(t, mask), t[mask]))

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def test_a_weight_of_the_kernels_size_is_trained_as_the_dense_one() -> None:
    ran: list[nn.Module] = []
    for compact in (False, True):
        model = net(width=SMALLEST // 16)
        opt = optx.wrap(adamw(model), optx.SaRA(fraction=0.2, compact=compact), fused=False)
        for step in range(2):
            opt.zero_grad()
            loss(model, step).backward()
            opt.step()
        ran.append(model)
    for p, q in zip(ran[0].parameters(), ran[1].parameters(), strict=True):
        assert (p - q).abs().max() <= 1e-7
