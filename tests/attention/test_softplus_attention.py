"""`optx.functional.lssa_attention` and `lssar_attention`: the paper's numbers, derivatives, memory."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.softplus_attention import weights as by_loops
from torch import Tensor

import optx
from optx._softplus_attention import attend, attend_with_weights
from optx.kernels.attention import softplus_blocks, softplus_rows
from optx.kernels.attention.softplus_ops import OPERATIONS

Q = torch.tensor([[1.0, 0], [0, 1], [1, 1], [3, -4]], dtype=torch.float64)[None]
K = torch.tensor([[2.0, 0], [0, 5], [-1, 1], [1, -1]], dtype=torch.float64)[None]
LSSA = 0.0


def weights_of(q: Tensor, k: Tensor, power: float, **how: Any) -> Tensor:
    """The weights, as what attention gives for values that are unit vectors."""
    eye = torch.eye(k.shape[-2], dtype=k.dtype).expand(*k.shape[:-1], -1)
    return attend(q, k, eye, how.get("mask"), power, how.get("causal", False), 0.0)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(3)]


def small_blocks(monkeypatch: pytest.MonkeyPatch, numbers: int) -> None:
    """So that a small call has many blocks."""
    monkeypatch.setattr(softplus_blocks, "NUMBERS", numbers)


# ---- the paper's numbers (the spec's properties 1 to 8) -------------------------------------------------


@pytest.mark.parametrize(
    ("power", "row", "wanted"),
    [
        (LSSA, 3, [0.339921, 0.126639, 0.108588, 0.424851]),
        (1.0, 3, [0.339617, 0, 0, 0.660383]),
        (3.0, 3, [0.119728, 0, 0, 0.880272]),
        (3.0, 1, [0.272262, 0.727738, 0, 0]),
        (LSSA, 0, [1, 0, 0, 0]),
        (15.0, 0, [1, 0, 0, 0]),
    ],
)
def test_the_specs_rows(power: float, row: int, wanted: list[float]) -> None:
    found = weights_of(Q, K, power, causal=True)[0, row]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=6e-7)


def test_the_second_row_of_lssa_by_hand() -> None:
    first, second = (math.log1p(math.exp(math.log(2) * math.log(2) * c)) for c in (0.0, 1.0))
    found = weights_of(Q, K, LSSA, causal=True)[0, 1, :2]
    assert found.tolist() == pytest.approx([first / (first + second), second / (first + second)], abs=1e-12)


MASKS: dict[str, Any] = {
    "all": None,
    "padding": torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 1]]).bool()[:, None, None],
    "window": (torch.ones(7, 7).tril() - torch.ones(7, 7).tril(-3)).bool(),
    "packed": torch.block_diag(torch.ones(3, 3).tril(), torch.ones(4, 4).tril()).bool(),
    "by head": torch.rand(1, 4, 7, 7, generator=torch.Generator().manual_seed(3)) > 0.4,
    "some see nothing": torch.rand(2, 1, 7, 7, generator=torch.Generator().manual_seed(4)) > 0.8,
}


@pytest.mark.parametrize("causal", [False, True], ids=["both ways", "causal"])
@pytest.mark.parametrize("mask", MASKS)
def test_weights_are_those_of_loops(mask: str, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch, 30)
    q, k, _ = drawn(2, 4, 7, 6)
    k = k[:, :2]  # heads share keys
    own = MASKS[mask]
    for power in (LSSA, 1.0, 3.0, 15.0, 2.5):
        found = weights_of(q, k, power, mask=own, causal=causal)
        slow = attend_with_weights(q, k, k, own, power, causal, 0.0)[1]
        seen = torch.ones(2, 4, 7, 7).bool() if own is None else own.expand(2, 4, 7, 7)
        seen = seen.tril() if causal else seen
        for b in range(2):
            for h in range(4):
                wanted = by_loops(q[b, h], k[b, h // 2], seen[b, h], power or None)
                torch.testing.assert_close(found[b, h], wanted, rtol=1e-10, atol=1e-12)
                torch.testing.assert_close(slow[b, h], wanted, rtol=1e-10, atol=1e-12)
        sums = found.sum(-1)
        torch.testing.assert_close(sums, seen.any(-1).double(), rtol=0, atol=1e-12)
        assert not found[~seen].any()


def test_lengths_of_queries_and_keys_do_not_count() -> None:
    q, k, v = drawn(1, 2, 9, 4)
    longer = torch.linspace(0.01, 300, 9, dtype=torch.float64)[:, None]
    for power in (LSSA, 3.0):
        plain = attend(q, k, v, None, power, True, 0.0)
        torch.testing.assert_close(attend(q * longer, k * longer.flip(0), v, None, power, True, 0.0), plain)
        twice = attend(q, k, 2 * v + 1, None, power, True, 0.0)
        torch.testing.assert_close(twice, 2 * plain + 1)


def test_power_1_without_offset_is_lssa_and_a_high_one_is_the_largest() -> None:
    q, k, _ = drawn(3, 3, 4, seed=1)  # three keys: O is 0
    torch.testing.assert_close(weights_of(q, k, 1.0), weights_of(q, k, LSSA), rtol=0, atol=1e-12)
    q, k, _ = drawn(1, 50, 6, 16, seed=2)
    soft, sharp = weights_of(q, k, LSSA), weights_of(q, k, 200.0)
    top = soft.topk(2, dim=-1)
    leads = top.values[..., 0] > 1.1 * top.values[..., 1]
    hot = torch.nn.functional.one_hot(top.indices[..., 0], 6).double()
    assert leads.sum() > 50
    torch.testing.assert_close(sharp[leads], hot[leads], rtol=0, atol=1e-6)


def test_the_mean_of_n_a_over_what_is_seen_is_1() -> None:
    q, k, _ = drawn(2, 40, 8)
    n = torch.arange(1, 41, dtype=torch.float64)[:, None]
    means = (n * weights_of(q, k, LSSA, causal=True)).sum(-1, keepdim=True) / n
    torch.testing.assert_close(means, torch.ones_like(means), rtol=0, atol=1e-12)


@pytest.mark.parametrize("power", [LSSA, 15.0])
def test_later_tokens_change_nothing_and_one_at_a_time_is_the_same(power: float) -> None:
    q, k, v = drawn(1, 2, 12, 8)
    whole = attend(q, k, v, None, power, True, 0.0)
    other = [torch.cat([x[:, :, :7], torch.randn(1, 2, 5, 8, dtype=x.dtype)], dim=2) for x in (q, k, v)]
    changed = attend(*other, None, power, True, 0.0)
    torch.testing.assert_close(changed[:, :, :7], whole[:, :, :7], rtol=0, atol=1e-12)
    rows = [
        attend(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], None, power, False, 0.0)
        for i in range(12)
    ]
    torch.testing.assert_close(torch.cat(rows, dim=2), whole, rtol=0, atol=1e-12)


# ---- derivatives ---------------------------------------------------------------------------------------


def gradients(run: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    own = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = run(*own)
    wave = torch.arange(out.numel(), dtype=torch.float64).sin().view(out.shape).to(out.dtype)
    return (out.detach(), *torch.autograd.grad(out, own, wave))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    power=st.sampled_from([LSSA, 1.0, 1.5, 2.0, 3.0, 15.0]),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    rows=st.integers(1, 9),
    keys=st.integers(1, 9),
    causal=st.booleans(),
    hidden=st.sampled_from([0.0, 0.3, 0.9]),
    numbers=st.sampled_from([1, 40, 1 << 19]),
)
def test_both_ways_are_those_of_the_plain_form(
    seed: int,
    power: float,
    heads: tuple[int, int],
    rows: int,
    keys: int,
    causal: bool,
    hidden: float,
    numbers: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, heads[0], rows, 4, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(2, heads[1], keys, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(2, 1, rows, keys, generator=generator) >= hidden if hidden else None
    with pytest.MonkeyPatch.context() as patch:
        small_blocks(patch, numbers)
        found = gradients(lambda *x: attend(*x, mask, power, causal, 0.0), q, k, v)
    wanted = gradients(lambda *x: attend_with_weights(*x, mask, power, causal, 0.0)[0], q, k, v)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9 * (1 + float(other.abs().max())))


def test_the_way_back_is_the_difference_of_two_calls() -> None:
    q, k, v = (x.requires_grad_() for x in drawn(1, 2, 6, 4, seed=5))
    for power in (LSSA, 3.0):
        torch.autograd.gradcheck(lambda *x: attend(*x, None, power, True, 0.0), (q, k, v))  # noqa: B023


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("power", [LSSA, 15.0])
def test_as_close_to_float64_as_the_issue_asks(dtype: torch.dtype, power: float) -> None:
    q, k, v = drawn(1, 2, 300, 32, dtype=dtype)
    run = lambda *x: attend(*x, None, power, True, 0.0)  # noqa: E731
    found, wanted = gradients(run, q, k, v), gradients(run, q.double(), k.double(), v.double())
    limits = (1e-5, 1e-4, 1e-4, 1e-4) if dtype == torch.float32 else (2e-2, 5e-2, 5e-2, 5e-2)
    for one, other, limit in zip(found, wanted, limits, strict=True):
        assert one.dtype == dtype
        assert float((one.double() - other).abs().max()) <= limit * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("power", [LSSA, 1.0, 15.0])
def test_rows_that_are_equal_or_zero_have_numbers(dtype: torch.dtype, power: float) -> None:
    """Identical keys leave rounding alone to the second sum; zeros have no length."""
    q, k, v = drawn(1, 1, 40, 8, dtype=dtype)
    q[:, :, 3:5] = 0
    for keys in (k[:, :, :1].expand_as(k), torch.zeros_like(k), k):
        out, *grads = gradients(lambda *x: attend(*x, None, power, True, 0.0), q, keys, v)
        assert all(bool(x.isfinite().all()) for x in (out, *grads))
        assert not grads[0][:, :, 3:5].any()
        if keys is not k:
            means = v.double().cumsum(2) / torch.arange(1, 41)[:, None]
            assert float((out.double() - means).abs().max()) < (1e-5 if dtype == torch.float32 else 2e-2)
    one = [x[:, :, :1] for x in (q, k, v)]
    torch.testing.assert_close(attend(*one, None, power, True, 0.0), one[2])


def test_a_row_of_8192_keys_at_power_15_has_numbers() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = drawn(1, 1, 8192, 16, dtype=dtype)
        q = q[:, :, -2:]
        found = gradients(lambda *x: attend(*x, None, 15.0, False, 0.0), q, k, v)
        assert all(bool(x.isfinite().all()) for x in found)


@pytest.mark.parametrize("power", [0.0, 3.0, 15.0])
def test_second_and_third_derivatives_are_those_of_the_plain_form(power: float) -> None:
    q, k, v = (x.double().requires_grad_() for x in drawn(1, 2, 6, 4))
    torch.autograd.gradgradcheck(lambda *x: attend(*x, None, power, True, 0.0), (q, k, v))
    with torch.no_grad():
        q[0, 0, 2] = 0.0
    found: list[list[Tensor]] = []
    for call in (attend, lambda *x: attend_with_weights(*x)[0]):
        value, derivatives = call(q, k, v, None, power, True, 0.0).square().sum(), []
        for _ in range(3):
            derivatives.append(torch.autograd.grad(value, q, create_graph=True)[0])
            value = derivatives[-1].square().sum()
        found.append(derivatives)
    for mine, theirs in zip(*found, strict=True):
        assert theirs.any()
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9 * float(theirs.detach().abs().max()))


def test_second_derivatives_with_dropout_are_refused() -> None:
    q, k, v = (x.requires_grad_() for x in drawn(1, 2, 6, 4))
    first = torch.autograd.grad(attend(q, k, v, None, 3.0, True, 0.5).sum(), q, create_graph=True)[0]
    with pytest.raises(
        NotImplementedError, match=r"second derivatives .*dropout, which is 0\.5; set it to 0"
    ):
        first.sum().backward()


# ---- dropout, compile, memory --------------------------------------------------------------------------


def test_dropout_drops_its_share_and_goes_back_the_same_way() -> None:
    q, k, v = drawn(1, 4, 64, 8)
    torch.manual_seed(0)
    ones = attend(q, k, torch.ones_like(v), None, LSSA, False, 0.25)
    assert float(ones.mean()) == pytest.approx(1, abs=0.01)
    assert float(ones.std()) > 0.01
    torch.manual_seed(0)
    assert torch.equal(attend(q, k, torch.ones_like(v), None, LSSA, False, 0.25), ones)
    inputs = [x[:, :1, :5].requires_grad_() for x in (q, k, v)]

    def again(*x: Tensor) -> Tensor:
        torch.manual_seed(1)
        return attend(*x, None, 3.0, True, 0.3)

    torch.autograd.gradcheck(again, inputs)
    assert not attend(q, k, v, None, 3.0, True, 1.0).any()


def test_it_is_one_operation_for_the_compiler() -> None:
    q, k, v = (x.requires_grad_() for x in drawn(1, 2, 6, 4))
    torch.library.opcheck(OPERATIONS.softplus_attention.default, (q, k, v, None, None, 3.0, True, 0.0))


MEMORY = """
import resource, sys, torch
torch.set_num_threads(1)
import optx
from optx.functional import lssar_attention
L = int(sys.argv[1])
q, k, v = (torch.randn(1, 1, L, 64).requires_grad_() for _ in range(3))
lssar_attention(*(x[:, :, :64] for x in (q, k, v)), is_causal=True).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
lssar_attention(q, k, v, is_causal=True).sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.long
def test_memory_grows_with_the_length_and_not_with_its_square() -> None:
    """8,192 x 8,192 numbers are 256 MiB."""
    sizes = (2048, 8192)
    small, large = (
        float(
            subprocess.run(
                [sys.executable, "-c", MEMORY, str(n)], capture_output=True, check=True, text=True
            ).stdout
        )
        for n in sizes
    )
    assert large < 60, (small, large)
    assert large < 4 * small + 20, (small, large)


# ---- what is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize("empty", ["batch", "rows", "keys"])
def test_nothing_to_attend_is_no_error(empty: str) -> None:
    """As of torch's function; the gradients are there, for other processes."""
    x = torch.randn(2, 2, 5, 4)
    none = x[:0] if empty == "batch" else x[:, :, :0]
    q, k = (x if empty == "keys" else none), (x if empty == "rows" else none)
    given = [one.clone().requires_grad_() for one in (q, k, k)]
    out = optx.functional.lssar_attention(*given, torch.ones(q.shape[2], k.shape[2], dtype=torch.bool))
    assert out.shape == q.shape
    assert not out.any()
    out.sum().backward()
    assert all(one.grad is not None for one in given)


@pytest.mark.parametrize("p", [0, -1.0, math.nan, math.inf, "3"])
def test_p_must_be_above_0(p: Any) -> None:
    with pytest.raises(optx.OptxError, match=r"p is .*; it must be a finite number above 0"):
        optx.functional.lssar_attention(Q, K, K, p=p)
    with pytest.raises(optx.OptxError, match=r"LSSAR: p is .*; it must be a finite number above 0"):
        optx.LSSAR(p=p)
    if p != 0:
        with pytest.raises(optx.OptxError, match="LSSAR: eval_p is"):
            optx.LSSAR(eval_p=p)


def test_a_mask_that_adds_is_refused_and_one_that_hides_is_read() -> None:
    run = optx.functional.lssa_attention
    bias = torch.linspace(-1, 0, 4, dtype=torch.float64)
    with pytest.raises(optx.OptxError, match="attn_mask adds numbers to scores"):
        run(Q, K, K, bias)
    with pytest.raises(optx.OptxError, match=r"attn_mask has dtype torch\.int64"):
        run(Q, K, K, torch.ones(4, dtype=torch.int64))
    with pytest.raises(
        optx.ShapeError, match=r"attn_mask has shape \(5,\); it must broadcast to \(1, 4, 4\)"
    ):
        run(Q, K, K, torch.ones(5, dtype=torch.bool))
    seen = torch.tensor([True, False, True, True])
    for hidden in (-torch.inf, torch.finfo(torch.float32).min, -10_000.0):
        assert torch.equal(run(Q, K, K, torch.zeros(4).masked_fill(~seen, hidden)), run(Q, K, K, seen))


def test_shapes_and_dtypes_that_do_not_fit_are_refused() -> None:
    run = optx.functional.lssa_attention
    q, k, v = drawn(2, 4, 5, 6)
    with pytest.raises(optx.ShapeError, match="heads a divisor of the query's"):
        run(q, k[:, :3], v[:, :3])
    with pytest.raises(optx.ShapeError, match="keys and values equally long"):
        run(q, k, v[:, :, :4])
    with pytest.raises(optx.ShapeError, match=r"must be \(..., heads, length, width\)"):
        run(q[0, 0], k[0, 0], v[0, 0])
    with pytest.raises(optx.ShapeError, match="heads are 1 wide"):
        run(q[..., :1], k[..., :1], v)
    with pytest.raises(optx.OptxError, match="they must be one floating dtype"):
        run(q, k.float(), v)
    with pytest.raises(optx.OptxError, match="dropout_p is 2"):
        run(q, k, v, dropout_p=2)


def test_blocks_see_the_whole_of_each_row() -> None:
    """Every row is in one block, with all keys that it may see."""
    q, k, v = drawn(3, 2, 70, 4)
    call = softplus_blocks.Call.of(q, k, v, None, softplus_rows.Options(3.0, True))
    met = torch.zeros(6, 70)
    for block in call.blocks():
        met[block.heads, block.rows] += 1
        assert block.keys == block.rows.stop
    assert (met == 1).all()
