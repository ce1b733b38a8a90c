"""Softmax in two passes on CPU: the numbers of its specification, and torch's own on all kinds of rows."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llvmlite import binding, ir
from numba.core import cgutils, config
from torch import Tensor
from torch.nn import functional as F

from optx import _softmax_rows
from optx._errors import OptxError, ShapeError
from optx.functional import cross_entropy2, logsumexp2, softmax2
from optx.kernels.softmax import cpu
from optx.kernels.softmax import rows as torch_rows
from optx.kernels.softmax.vectors import Row, lanes, walk

INF, NAN = math.inf, math.nan
APART = {torch.float64: 1e-14, torch.float32: 3e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def pairs(*x: float) -> list[list[float]]:
    """The pair of each number."""
    return cpu.fold(torch.tensor(x, dtype=torch.float32)[:, None])[:, :2].tolist()


def add(one: Tensor, other: Tensor) -> Tensor:
    """The sum of two pairs, in float64."""
    n = torch.maximum(one[1], other[1])
    return torch.stack([one[0] * 2.0 ** (one[1] - n) + other[0] * 2.0 ** (other[1] - n), n])


def same(found: Tensor, wanted: Tensor, apart: float) -> None:
    """Where both are finite, as shares of the largest; nan and inf are where they are."""
    assert found.shape == wanted.shape
    scale = wanted[wanted.isfinite()].abs().max() if wanted.isfinite().any() else 1.0
    torch.testing.assert_close(found.double() / scale, wanted / scale, rtol=0, atol=apart, equal_nan=True)


# ---- the specification's numbers ------------------------------------------------------------------------


def test_exponentials_as_pairs() -> None:
    wanted = [
        [1, 0],
        [1.3591410, 1],
        [0.7357590, -1],
        [1.2053933, 144],
        [0.8094651, 1443],
        [1.2353836, -1443],
    ]
    found = pairs(0, 1, -1, 100, 1000, -1000)
    for (m, n), (m0, n0) in zip(found, wanted, strict=True):
        assert (m, n) == (pytest.approx(m0, rel=1e-6), n0)
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * 300
    m, n, shift = cpu.fold(x[:, None]).double().unbind(1)
    assert (m.min() >= 0.7071, m.max() <= 1.41422, bool((n == n.round()).all())) == (True, True, True)
    assert not shift.any()
    exact = torch.exp(x.double() - n * math.log(2))
    assert ((m / exact - 1).abs() < 2e-7).all()


def test_rows_that_overflow_elsewhere() -> None:
    x = torch.tensor([[1000.0, 1001.0, 1002.0], [-1000.0, -1001.0, -1002.0]])
    wanted = torch.tensor([[0.0900306, 0.2447285, 0.6652410], [0.6652410, 0.2447285, 0.0900306]])
    torch.testing.assert_close(softmax2(x), wanted, rtol=0, atol=5e-7)
    torch.testing.assert_close(logsumexp2(x), torch.tensor([1002.4076, -999.59239]), rtol=0, atol=5e-5)
    sums = cpu.fold(x)
    torch.testing.assert_close(sums[:, 0], torch.tensor([1.1238754, 1.8570468]), rtol=2e-7, atol=0)
    assert sums[:, 1].tolist() == [1446, -1443]
    assert cpu.fold(torch.zeros(1, 8)).tolist() == [[8, 0, 0]]
    assert softmax2(torch.zeros(8)).tolist() == [0.125] * 8


def test_a_long_row() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(100_003, generator=generator) * 50
    exact, y = torch.softmax(x.double(), 0), softmax2(x)
    assert (y - exact).abs().max() <= 3e-7 * exact.max()
    assert abs(y.double().sum() - 1) <= 1e-5
    order = torch.randperm(len(x), generator=generator)
    same(softmax2(x[order]), y[order].double(), 1e-6)
    for shift in (-500.0, 3.7, 500.0):
        same(softmax2(x + shift), y.double(), 2e-5 * 2)
    whole = cpu.fold(x[None])[0, :2].double()
    for at in (1, 31, 32, 1000, 65_536, 100_002):  # any split has the sum of the whole
        parts = [cpu.fold(part[None])[0, :2].double() for part in (x[:at], x[at:])]
        joined = add(*parts)
        assert joined[1] == whole[1]
        assert joined[0] == pytest.approx(whole[0].item(), rel=1e-6)


def test_what_is_masked_is_as_if_absent() -> None:
    x = torch.randn(2, 300, generator=torch.Generator().manual_seed(2))
    hidden = torch.rand(300, generator=torch.Generator().manual_seed(3)) < 0.5
    for fill in (-INF, torch.finfo(torch.float32).min):
        y = softmax2(x.masked_fill(hidden, fill))
        assert not y[:, hidden].any()
        same(y[:, ~hidden], torch.softmax(x[:, ~hidden].double(), -1), 3e-7)


ODD = [
    *([-INF, -INF], [INF, 1.0], [NAN, 1.0], [-INF, 3.0], [INF, NAN], [-INF, NAN], [INF, INF], [-INF, INF]),
    *([1e30, 1e30], [-3.4e38, -3.4e38], [1e38, -1e38], [5e6, 5e6 + 1.5], [-1e30, -INF], [7e4, 7e4 + 0.5]),
]


@pytest.mark.parametrize("repeats", [1, 40])
def test_odd_rows_are_torchs(repeats: int) -> None:
    x = torch.tensor(ODD).repeat_interleave(repeats, 1)
    wanted = torch.softmax(x, -1).double()
    found = softmax2(x)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(logsumexp2(x), torch.logsumexp(x, -1), rtol=1e-6, atol=0, equal_nan=True)
    for label in (0, -1):
        target = torch.full((len(x),), label % x.shape[1])
        mine, theirs = (f(x, target, reduction="none") for f in (cross_entropy2, F.cross_entropy))
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6, equal_nan=True)


ENTRIES = st.sampled_from([-INF, INF, NAN, -88.0, -1.0, 0.0, 2.5, 7e4])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5).flatmap(lambda n: st.lists(st.lists(ENTRIES, min_size=n, max_size=n), min_size=1)),
    st.sampled_from([1, 40]),
    st.sampled_from([0.0, 0.1]),
    st.sampled_from(["compiled", "torch"]),
)
def test_gradients_of_odd_rows_are_torchs(
    rows: list[list[float]], repeats: int, smoothing: float, computed: str
) -> None:
    """Beside an inf a finite entry has no part in the log of a sum; in a loss all of the row is nan."""
    x = torch.tensor(rows).repeat_interleave(repeats, 1)
    target = torch.arange(len(x)) % x.shape[1]
    options: Any = {"reduction": "none", "label_smoothing": smoothing}
    apart = 2e-6 + 2e-7 * x[x.isfinite()].abs().sum().item()
    path = {"torch": lambda _: torch_rows}.get(computed, _softmax_rows.kernels)
    for mine, theirs in (
        (softmax2, lambda z: torch.softmax(z, -1)),
        (logsumexp2, lambda z: torch.logsumexp(z, -1)),
        (lambda z: cross_entropy2(z, target, **options), lambda z: F.cross_entropy(z, target, **options)),
    ):
        own, other = x.clone().requires_grad_(), x.double().requires_grad_()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_softmax_rows, "kernels", path)
            found = mine(own)
            grad = torch.linspace(0.5, 2.0, found.numel()).view(found.shape)
            found.backward(grad)
        wanted = theirs(other)
        wanted.backward(grad.double())
        assert other.grad is not None
        torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=apart, equal_nan=True)
        torch.testing.assert_close(own.grad, other.grad.float(), rtol=2e-6, atol=2e-6, equal_nan=True)


# ---- torch's functions ----------------------------------------------------------------------------------


@pytest.fixture(params=["compiled", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to compute: the CPU kernel, and torch operations."""
    if request.param == "torch":
        monkeypatch.setattr(_softmax_rows, "kernels", lambda _: torch_rows)


def against(mine: Callable[..., Tensor], theirs: Callable[..., Tensor], x: Tensor, apart: float) -> None:
    """Values and gradients, of which torch's are in float64."""
    own, exact = x.detach().clone().requires_grad_(), x.detach().double().requires_grad_()
    found, wanted = mine(own), theirs(exact)
    assert found.dtype == x.dtype
    generator = torch.Generator().manual_seed(4)
    grad = torch.randn(wanted.shape, generator=generator, dtype=torch.float64).to(x.dtype)
    found.backward(grad)
    wanted.backward(grad.double())
    assert own.grad is not None
    assert exact.grad is not None
    same(found.detach(), wanted.detach(), apart)
    same(own.grad, exact.grad, 4 * apart)


@pytest.mark.long(keep=3)
@pytest.mark.parametrize("dtype", APART, ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    for shape in ((3, 32), (5, 131)):
        x = (torch.randn(shape, generator=generator) * 2).to(dtype)
        target = torch.randint(shape[1], shape[:1], generator=generator)
        against(softmax2, lambda x: torch.softmax(x, -1), x, APART[dtype])
        against(logsumexp2, lambda x: torch.logsumexp(x, -1), x, APART[dtype])
        against(
            lambda x, t=target: cross_entropy2(x, t),
            lambda x, t=target: F.cross_entropy(x, t),
            x,
            APART[dtype],
        )


def test_shapes_dims_and_strides(path: None) -> None:
    x = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    for some in (x, x.transpose(1, 3), x[:, ::2], x.expand(2, 5, 3, 4)[..., :1], x[0, :, 0], x[0, 0, 0, 0]):
        for dim in range(-max(some.ndim, 1), max(some.ndim, 1)):
            found = softmax2(some, dim)
            assert found.is_contiguous()
            same(found, torch.softmax(some, dim), 1e-14)
            for keep in (False, True):
                same(logsumexp2(some, dim, keep), torch.logsumexp(some, dim, keep), 1e-14)
    same(logsumexp2(x, (0, -1), True), torch.logsumexp(x, (0, -1), True), 1e-14)
    against(lambda x: softmax2(x, 1), lambda x: torch.softmax(x, 1), x, 1e-14)
    for empty in (torch.empty(0, 3), torch.empty(3, 0)):
        assert softmax2(empty).shape == empty.shape
        assert torch.equal(logsumexp2(empty), torch.logsumexp(empty, -1))
    assert softmax2(x.half(), 1, torch.float32).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert cross_entropy2(x[0, 0].bfloat16(), torch.tensor([0, 1, 2])).dtype == torch.float32


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_has_torchs_options(smoothing: float, reduction: str, path: None) -> None:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64)
    weight = torch.rand(5, generator=generator, dtype=torch.float64)
    target = torch.randint(5, (3, 4), generator=generator)
    target[1, 2] = 4
    for own in (None, weight):
        options: Any = {
            "weight": own,
            "ignore_index": 4,
            "reduction": reduction,
            "label_smoothing": smoothing,
        }
        against(
            lambda x, o=options: cross_entropy2(x, target, **o),
            lambda x, o=options: F.cross_entropy(x, target, **o),
            x,
            1e-14,
        )


def test_an_ignored_row_may_be_anything() -> None:
    x = torch.tensor([[NAN, INF], [0.0, 0.0]], requires_grad=True)
    loss = cross_entropy2(x, torch.tensor([-100, 1]))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert x.grad is not None
    assert x.grad.tolist() == [[0, 0], [0.5, -0.5]]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_mean_over_no_sample_is_nan_and_has_no_gradient(smoothing: float) -> None:
    """As torch's: a batch of nothing but prompts must not fill the weights with nan."""
    x = torch.zeros(2, 3, requires_grad=True)
    loss = cross_entropy2(x, torch.tensor([-100, -100]), label_smoothing=smoothing)
    assert loss.isnan()
    loss.backward()
    assert x.grad is not None
    assert not x.grad.any()


def test_a_small_loss_keeps_its_digits() -> None:
    """The log of the sum and the label's logit are both 1000, and their difference 2e-6."""
    x = torch.tensor([[1013.0, 1000.0]])
    assert cross_entropy2(x, torch.tensor([0])).item() == pytest.approx(math.log1p(math.exp(-13)), abs=1.5e-7)
    same(cross_entropy2(x, torch.tensor([1])).double(), torch.tensor(13.0).double(), 1e-6)


def test_derivatives() -> None:
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    target, weight = torch.tensor([[0, 1, 2, 0], [2, 2, -100, 1]]), torch.tensor([0.5, 1.0, 2.0]).double()
    with torch.no_grad():
        hidden = x.clone()
        hidden[0, 0, 1] = -INF
    for function in (
        lambda x: softmax2(x, 1),
        logsumexp2,
        lambda x: cross_entropy2(x, target, reduction="none"),
        lambda x: cross_entropy2(x, target, weight, label_smoothing=0.1),
    ):
        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(function, x)
    assert torch.autograd.gradcheck(lambda x: softmax2(x.masked_fill(hidden.isinf(), -INF)), x)


# ---- many rows, few long ones, threads ------------------------------------------------------------------


def test_neither_threads_nor_other_rows_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces are summed in one order, whoever takes them; a few long rows are split over threads."""
    monkeypatch.setattr(cpu, "_CHUNK", 1 << 10)
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(3, 150_001, generator=generator) * 3
    x[1] += 1e6  # beyond the range: a third read
    x[2, 5:] = -INF
    grad, scale = torch.randn(x.shape, generator=generator), torch.rand(3, generator=generator)
    labels = torch.tensor([70_000, 0, 4])
    threads = torch.get_num_threads()
    found: list[list[Tensor]] = []
    try:
        for few in (64, 0):
            for count in (1, 2):
                monkeypatch.setattr(cpu, "_FEW", few)
                torch.set_num_threads(count)
                y, sums = cpu.softmax(x), cpu.fold(x)
                found.append([y, sums, cpu.backward(grad, y), cpu.spread(x, sums, scale, labels, scale)])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    y, _, back, spread = found[0]
    exact = torch.softmax(x.double(), -1)
    same(y, exact, 3e-7)
    same(back, exact * (grad - (exact * grad).sum(-1, keepdim=True)), 1e-6)
    wanted = scale[:, None] * exact
    wanted[torch.arange(3), labels] -= scale
    same(spread, wanted, 1e-6)


# ---- torch.compile, torch.func --------------------------------------------------------------------------


def test_compiled_and_mapped() -> None:
    generator = torch.Generator().manual_seed(10)
    x = torch.randn(3, 5, 4, generator=generator)
    target = torch.randint(5, (3, 4), generator=generator)

    def total(x: Tensor) -> Tensor:
        return softmax2(2 * x, 1).square().sum() + cross_entropy2(x, target) + logsumexp2(x).sum()

    own, other = (x.clone().requires_grad_() for _ in range(2))
    found = torch.compile(total, fullgraph=True, backend="aot_eager")(own)
    found.backward()
    wanted = total(other)
    wanted.backward()
    assert torch.equal(found, wanted)
    assert own.grad is not None
    assert other.grad is not None
    torch.testing.assert_close(own.grad, other.grad)
    mapped = torch.vmap(lambda x: softmax2(x, 0), in_dims=1, out_dims=1)(x)
    torch.testing.assert_close(mapped, torch.softmax(x, 0))
    grads = [
        torch.func.vmap(torch.func.grad(lambda x, t, f=f: f(x, t, label_smoothing=0.1)))(x.mT, target)
        for f in (cross_entropy2, F.cross_entropy)
    ]
    torch.testing.assert_close(*grads)
    with pytest.raises(IndexError, match="target 5 "):
        torch.vmap(cross_entropy2)(x.mT, torch.full((3, 4), 5))


# ---- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda z, t: cross_entropy2(z, t + 3), IndexError, r"target 4 \(sample 1 of 3\).*4 classes.*0..3"),
        (lambda z, t: cross_entropy2(z, t - 1), IndexError, r"target -1 \(sample 0 of 3\)"),
        (lambda z, t: cross_entropy2(z, z), TypeError, "target has dtype torch.float32.*class numbers"),
        (lambda z, t: cross_entropy2(z.int(), t), TypeError, "logits have dtype torch.int32"),
        (lambda z, t: cross_entropy2(z, t[:2]), ShapeError, r"target has shape \(2,\).*must be \(3,\)"),
        (lambda z, t: cross_entropy2(z[None], t[None]), ShapeError, r"must be \(1, 4\).*movedim\(-1, 1\)"),
        (lambda z, t: cross_entropy2(z[:, :0], t), ShapeError, r"\(3, 0\) have no class"),
        (lambda z, t: cross_entropy2(z, t, z[0, :2]), ShapeError, r"weight has shape \(2,\).*\(4,\)"),
        (lambda z, t: cross_entropy2(z, t, reduction="avg"), OptxError, "reduction is 'avg'.*'mean', 'sum'"),
        (lambda z, t: cross_entropy2(z, t, label_smoothing=1.5), OptxError, "label_smoothing is 1.5"),
        (lambda z, t: cross_entropy2(z, t.to("meta")), OptxError, "target is on meta and logits are on cpu"),
        (lambda z, t: softmax2(z.int()), TypeError, "softmax2: x has dtype torch.int32"),
        (lambda z, t: logsumexp2(z.cfloat()), TypeError, "logsumexp2: x has dtype torch.complex64"),
        (lambda z, t: softmax2(z, 2), IndexError, "Dimension out of range"),
        (lambda z, t: softmax2(z.tolist()), TypeError, "softmax2: x is of type list; it must be a tensor"),
        (lambda z, t: cross_entropy2(z, t.tolist()), TypeError, "cross_entropy2: target is of type list"),
        (lambda z, t: cross_entropy2(z, t, [1.0]), TypeError, "cross_entropy2: weight is of type list"),
    ],
)
def test_refused(call: Callable[..., Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call(torch.zeros(3, 4), torch.tensor([0, 1, 2]))


UNFIT = {
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    "sparse_coo": lambda: torch.ones(2, 3).to_sparse(),
    "sparse_csr": lambda: torch.ones(2, 3).to_sparse_csr(),
    "_mkldnn": lambda: torch.ones(2, 3).to_mkldnn(),
}


@pytest.mark.filterwarnings("ignore:.*(nested|Sparse).*:UserWarning")
@pytest.mark.parametrize("kind", UNFIT)
def test_only_dense_tensors(kind: str) -> None:
    x, said = UNFIT[kind](), {"jagged": "nested"}.get(kind, kind)
    for call, name in (
        (softmax2, "softmax2: x"),
        (logsumexp2, "logsumexp2: x"),
        (lambda x: cross_entropy2(x, torch.zeros(2, dtype=torch.int64)), "cross_entropy2: logits"),
        (lambda x: cross_entropy2(torch.ones(2, 3), x), "cross_entropy2: target"),
    ):
        with pytest.raises(TypeError, match=rf"^{name} is {said}; it must be dense: use .*(dense|unbind)"):
            call(x)


def assembly(name: str, features: str) -> str:
    """What the loops of the two passes become on a processor."""
    integers, numbers, own = [ir.IntType(64)] * 3, [ir.FloatType()] * 2, lanes("float32")
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    module = ir.Module()
    module.triple = "x86_64-unknown-linux-gnu"
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [*integers, *numbers]), "both")
    b = ir.IRBuilder(function.append_basic_block())
    x, y, count, scale, n = function.args
    held = [cgutils.alloca_once_value(b, own.all(start)) for start in (0.0, -1e5)]

    def fold(some: Any) -> None:
        for place, value in zip(
            held, own.add(b, (b.load(held[0]), b.load(held[1])), own.pair(b, some)), strict=True
        ):
            b.store(value, place)

    row, to = Row(b, x, "float32"), Row(b, y, "float32")
    walk(b, count, [row], fold)
    walk(b, count, [row], lambda some: own.scaled(b, some, own.every(b, scale), own.every(b, n)), to)
    b.ret_void()
    machine = binding.Target.from_triple(module.triple).create_target_machine(name, features, 3)
    return machine.emit_assembly(binding.parse_assembly(str(module)))


@pytest.mark.parametrize(
    ("name", "features", "rounding"),
    [("skylake-avx512", "+avx512f", r"vrndscaleps\W.*zmm"), ("haswell", "", r"vroundps\W.*ymm")],
)
def test_loops_are_of_vectors(
    name: str, features: str, rounding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For AVX-512 and for AVX2: exponents are rounded in vectors, and no exponential is called."""
    monkeypatch.setattr(config, "CPU_FEATURES", features)
    text = assembly(name, features)
    assert len(re.findall(rounding, text)) >= 4
    assert len(re.findall(r"vfn?m(?:add|sub)\w*ps", text)) >= 4 * 7
    assert ("vscalefps" in text) == (name != "haswell")
    assert not re.search(r"\bcall", text)
