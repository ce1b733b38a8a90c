"""Whole steps of `TritonStep` against torch, against the CPU kernels, and against themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import Base, Bucket, Setup
from torch import Tensor

import optx
from optx.kernels.step.cpu import CpuStep
from optx.kernels.step.triton import TritonStep
from optx.step.transform import Transform
from optx.transforms.adamr import AdamR
from optx.transforms.backslash import BackSlash
from optx.transforms.normalized_grad import NormalizedGrad
from optx.transforms.perpgrad import PerpGrad

# By turns aligned and not: a block and a tail, a block, a tail, one element, none. Chunks of two blocks in
# the place of 65536 elements: the interpreter's time goes by blocks and operations.
SIZES, OFFSETS = [1025, 1025, 1024, 7, 0, 1, 4097], (0, 1)
CHUNKS = {"chunk": 2048, "block": 1024}


def adamw(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def triton(setup: Setup) -> Bucket:
    return Bucket(setup, lambda *args: TritonStep(*args, "cpu", **setup.options))


def cpu(setup: Setup) -> Bucket:
    return Bucket(setup, CpuStep)


def run(bucket: Bucket, steps: int, **options: Any) -> Bucket:
    for _ in range(steps):
        bucket.step(bucket.gradients(), **options)
    return bucket


def close(a: list[Tensor], b: list[Tensor], tolerance: float) -> None:
    torch.testing.assert_close(a, b, rtol=0.0, atol=tolerance)


def equal(a: Bucket, b: Bucket) -> None:
    for x, y in zip(a.weights, b.weights, strict=True):
        assert torch.equal(x, y)
    for x, y in zip(a.state, b.state, strict=True):
        assert all(torch.equal(x[k], y[k]) for k in x)


BASES: dict[str, Base] = {
    "adamw": adamw,
    "adamw amsgrad maximize": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True, maximize=True),
    "adam l2": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, weight_decay=0.1),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, dampening=0.2),
    "sgd nesterov": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.1),
}


@pytest.mark.parametrize("name", BASES)
def test_torchs_optimizers(name: str) -> None:
    large = name == "adamw"
    sizes, options = (SIZES, CHUNKS) if large else (SIZES[:-1], {})
    bucket = triton(Setup(BASES[name], sizes, offsets=OFFSETS, options=options))
    reference = [torch.nn.Parameter(w.clone()) for w in bucket.weights]
    base = BASES[name](reference)
    for _ in range(3):
        gradients = bucket.gradients()
        bucket.step(gradients)
        for p, g in zip(reference, gradients, strict=True):
            p.grad = g
        base.step()
    spans = [(len(rows), options["ALIGNED"]) for rows, options in bucket.runner._spans]
    assert spans == [(5 if large else 2, True), (3, False)]
    close(bucket.weights, [p.detach() for p in reference], 2e-6)
    assert bucket.band.intact()
    if "adam" in name:
        assert {float(s["step"]) for s in bucket.state} == {3.0}


CHAINS: dict[str, list[Transform]] = {
    "none": [],
    "perp": [PerpGrad()],
    "adamr": [AdamR()],
    "adamr plain": [AdamR(normalize=False)],
    "perp adamr": [PerpGrad(), AdamR()],
    "backslash": [BackSlash(100.0, until=1)],
    "normalized": [NormalizedGrad()],
    "normalized global": [NormalizedGrad("global")],
    "perp twice": [PerpGrad(rescale=False), AdamR(norm="l1")],
}


@pytest.mark.parametrize(
    "chain",
    [c if c in ("none", "perp adamr") else pytest.param(c, marks=pytest.mark.long) for c in CHAINS],
)
def test_cpu_kernels(chain: str) -> None:
    """The elementwise arithmetic is the same to the bit; sums differ by the order of float64 additions."""
    setup = Setup(adamw, SIZES, CHAINS[chain], offsets=(0, 3), options=CHUNKS)
    a, b = run(triton(setup), 2), run(cpu(setup), 2)
    close(a.weights, b.weights, 0.0 if chain in ("none", "adamr plain") else 1e-6)
    assert a.band.intact()
    assert b.band.intact()


@pytest.mark.long(keep=2)
@pytest.mark.parametrize(
    ("w", "g", "moments", "rounding"),
    [
        (torch.float64, torch.float64, None, "nearest"),
        (torch.float32, torch.bfloat16, None, "nearest"),
        (torch.float32, torch.float16, None, "nearest"),
        (torch.float16, torch.float16, torch.float32, "nearest"),
        (torch.bfloat16, torch.bfloat16, torch.float32, "nearest"),
        (torch.bfloat16, torch.bfloat16, torch.float32, "kahan"),
    ],
)
def test_dtypes(w: torch.dtype, g: torch.dtype, moments: torch.dtype | None, rounding: str) -> None:
    """Where nothing is random, every dtype gives what the CPU kernels give."""
    setup = Setup(adamw, [1000, 0, 1025], [AdamR(normalize=False)], w, g, moments, rounding)
    a, b = run(triton(setup), 2), run(cpu(setup), 2)
    equal(a, b)
    assert a.band.intact()


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
def test_every_low_precision_slot_in_band(rounding: str) -> None:
    sizes, both = [1025, 1025, 0, 1], CHAINS["perp adamr"]
    bucket = triton(Setup(adamw, sizes, both, torch.bfloat16, rounding=rounding, offsets=OFFSETS))
    run(bucket, 1)
    assert bucket.band.intact()
    assert all(w.isfinite().all() for w in bucket.weights)


# ---- splitting --------------------------------------------------------------------------------------

PARTS = [1024, 1100, 3, 1, 876]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_and_blocks_do_not_show(dtype: torch.dtype) -> None:
    """Two blocks and a tail of one chunk; one chunk a block; chunks of two small blocks; one large block."""
    setup = Setup(adamw, [2500], w=dtype, rounding="stochastic" if dtype == torch.bfloat16 else "nearest")
    plain = run(triton(setup), 2)
    for setup.options in ({"chunk": 1024}, {"chunk": 1024, "block": 512}, {"block": 4096}):
        equal(plain, run(triton(setup), 2))


def test_splitting_a_tensor_does_not_show() -> None:
    whole = torch.randn(sum(PARTS), generator=torch.Generator().manual_seed(1))
    one = triton(Setup(adamw, [], weights=[whole]))
    many = triton(Setup(adamw, [], weights=list(whole.split(PARTS))))
    for _ in range(2):
        gradients = one.gradients()
        one.step(gradients)
        many.step(gradients[0].split(PARTS))
    assert torch.equal(one.weights[0], torch.cat(many.weights))


def test_sums_do_not_depend_on_the_neighbours() -> None:
    """perpGrad's dots, and so its weights, are the same bits in any company and alignment of others."""
    w = torch.randn(4500, generator=torch.Generator().manual_seed(2))
    alone = triton(Setup(adamw, [], [PerpGrad()], weights=[w], options=CHUNKS))
    company = [torch.ones(2500), w, torch.ones(3)]
    among = triton(Setup(adamw, [], [PerpGrad()], weights=company, options=CHUNKS))
    g = alone.gradients()[0]
    alone.step([g])
    among.step([torch.ones(2500), g, torch.ones(3)])
    assert torch.equal(alone.weights[0], among.weights[1])
    effective = alone.state[0]["exp_avg"] / 0.1  # the gradient that the base saw
    assert abs(torch.dot(effective.double(), w.double())) < 1e-6 * effective.norm() * w.norm()


def test_totals_are_sums_over_all_tensors() -> None:
    setup = Setup(adamw, [5, 0, 300, 4097], [AdamR()], options=CHUNKS)
    bucket = triton(setup)
    gradients = bucket.gradients()
    for g, value in zip(bucket.grads, gradients, strict=True):
        g.copy_(value)
    bucket.runner.measure(0)
    totals = dict(zip(bucket.runner.columns.totals, bucket.runner.totals.tolist(), strict=True))
    squares = sum(float(g.double().square().sum()) for g in gradients)
    assert totals["numel"] == 4402.0
    assert totals["adamr.second"] == pytest.approx(squares, rel=1e-12)  # at step 1, v-hat is g * g


# ---- rounding ---------------------------------------------------------------------------------------


def sgd(lr: float) -> Base:
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


def test_stochastic_rounding_of_weights() -> None:
    """A fifth of a unit in the last place: unbiased within 4 sigma, and only the two neighbours occur."""
    n, unit, step = 20000, 2.0**-7, 0.2
    ones = torch.ones(n)
    setup = Setup(sgd(unit), [], w=torch.bfloat16, rounding="stochastic", weights=[ones])
    setup.options = {"block": 8192}
    bucket = triton(setup)
    bucket.step([torch.full((n,), -step)])
    up = (bucket.weights[0].float() - 1.0) / unit
    assert set(up.tolist()) == {0.0, 1.0}
    probability = float(torch.tensor(step, dtype=torch.bfloat16))
    assert abs(up.mean() - probability) < 4 * (probability * (1 - probability) / n) ** 0.5
    bucket.step([torch.zeros(n)], key=1)
    assert torch.equal((bucket.weights[0].float() - 1.0) / unit, up)  # representable: kept exactly


def test_moments_and_weights_are_rounded_by_independent_bits() -> None:
    n = 8192
    setup = Setup(adamw, [], w=torch.bfloat16, rounding="stochastic", weights=[torch.ones(n)])
    setup.options = {"block": n}
    bucket = triton(setup)
    bucket.step([torch.full((n,), 0.3)])
    rounded = [bucket.weights[0], bucket.state[0]["exp_avg"], bucket.state[0]["exp_avg_sq"]]
    assert all(len(t.unique()) == 2 for t in rounded)
    correlation = torch.corrcoef(torch.stack([t.double() for t in rounded])).triu(1).abs().max()
    assert correlation < 4 / n**0.5


@pytest.mark.parametrize("base", [adamw, sgd(1e-3)], ids=["step count", "device counter"])
def test_draws(base: Base) -> None:
    """Same key and step: same bits. One key goes on from step to step without the host (graph replay)."""
    setup = Setup(base, [1000], w=torch.bfloat16, rounding="stochastic")

    def frozen(key: int | None, bucket: Bucket) -> Tensor:
        start = [bucket.weights[0].clone(), *(v.clone() for v in bucket.state[0].values())]
        bucket.step([torch.full((1000,), 0.01)], key=key)
        result = bucket.weights[0].clone()
        for t, old in zip((bucket.weights[0], *bucket.state[0].values()), start, strict=True):
            if t.ndim:
                t.copy_(old)
        return result

    a, b = triton(setup), triton(setup)
    first, second = frozen(5, a), frozen(5, a)
    assert not torch.equal(first, second)
    assert torch.equal(first, frozen(5, b))
    assert torch.equal(second, frozen(None, b))
    assert not torch.equal(first, frozen(6, triton(setup)))
    setup.ids = [1]
    assert not torch.equal(first, frozen(5, triton(setup)))


def test_a_resumed_run_draws_what_the_first_would_have() -> None:
    setup = Setup(sgd(1e-3), [300], w=torch.bfloat16, rounding="stochastic")
    through = run(triton(setup), 3, key=9)
    resumed = run(triton(setup), 2, key=9)
    assert int(resumed.runner.drawn) == 2
    setup.weights = [w.clone() for w in resumed.weights]
    second = triton(setup)
    second.steps = 2
    second.runner.set_key(9, drawn=2)
    second.step(second.gradients(), key=None)
    assert torch.equal(through.weights[0], second.weights[0])


def test_kahan_tracks_float32() -> None:
    """Updates of an eighth of a unit: within one of float32 after forty; plain bfloat16 stands still."""
    start = torch.linspace(1.0, 1.9, 16).bfloat16().float()
    buckets = {
        rounding: triton(Setup(sgd(1e-3), [], w=torch.bfloat16, rounding=rounding, weights=[start]))
        for rounding in ("kahan", "nearest")
    }
    expected = start.clone()
    for step in range(40):
        buckets["kahan"].step([torch.ones(16)])
        if step < 3:
            buckets["nearest"].step([torch.ones(16)])
        expected -= 1e-3
    unit = 2.0**-7
    assert (buckets["kahan"].weights[0].float() - expected).abs().max() <= unit
    assert torch.equal(buckets["nearest"].weights[0].float(), start)


# ---- skipping, tables -------------------------------------------------------------------------------


def test_a_skipped_step_changes_nothing() -> None:
    setup = Setup(adamw, [100, 0, 1030], CHAINS["perp adamr"], torch.bfloat16, rounding="stochastic")
    bucket, other = run(triton(setup), 1), run(triton(setup), 1)
    bucket.runner.skip.fill_(1)
    bucket.step([torch.full_like(w, float("inf"), dtype=torch.float32) for w in bucket.weights])
    equal(bucket, other)
    assert int(bucket.runner.drawn) == 1
    bucket.runner.skip.zero_()
    bucket.steps -= 1
    equal(run(bucket, 1), run(other, 1))


def test_tables_travel_only_when_they_change() -> None:
    bucket = run(triton(Setup(adamw, [100, 600])), 2)
    before = bucket.runner.uploads
    run(bucket, 1)
    assert bucket.runner.uploads == before
    for _ in range(2):  # zero_grad(set_to_none=True) makes new gradients
        bucket.grads = [bucket.band.like(g) for g in bucket.grads]
        bucket.point()
        run(bucket, 1)
    assert bucket.runner.uploads == before + 2
    bucket.runner.hypers[bucket.runner.columns.hypers.index("lr")] *= 0.5
    run(bucket, 2)
    assert bucket.runner.uploads == before + 3
    reference = triton(Setup(adamw, [100, 600]))
    run(reference, 5)
    reference.runner.hypers[reference.runner.columns.hypers.index("lr")] *= 0.5
    equal(run(reference, 2), bucket)


def test_a_tensor_may_lose_its_alignment() -> None:
    """The chunks of misaligned tensors move to a kernel of their own, and back, with the same result."""
    a, b = (run(triton(Setup(adamw, [1500, 300, 0, 1025], [PerpGrad()])), 1) for _ in range(2))
    a.band.offsets = (1,)
    a.grads[0] = a.band.like(a.grads[0])
    a.point()
    run(a, 2)
    spans = [(len(rows), options["ALIGNED"]) for rows, options in a.runner._spans]
    assert spans == [(2, True), (1, False)]
    equal(a, run(b, 2))


def test_buckets_without_elements() -> None:
    for sizes in ([0], [0, 0], [1]):
        bucket = run(triton(Setup(adamw, sizes, [PerpGrad()])), 2)
        assert all(float(s["step"]) == 2.0 for s in bucket.state)
    TritonStep(bucket.program, bucket.layout, [], [], "cpu").step()


def test_changed_tables_are_refused_during_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = run(triton(Setup(adamw, [10])), 1)
    monkeypatch.setattr(bucket.runner._hypers, "_cuda", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    bucket.runner.upload()  # nothing changed: fine
    bucket.runner.hypers[0] += 1.0
    with pytest.raises(RuntimeError, match="while a CUDA graph was being captured"):
        bucket.runner.upload()


def test_groups_of_one_program_each_take_their_own_numbers() -> None:
    """The CPU's kernels serve such groups together; these serve them one by one."""
    params: list[list[torch.nn.Parameter]] = []
    for fused in ("triton", "cpu"):
        params.append([torch.nn.Parameter(torch.linspace(-1, 1, n)) for n in (700, 3, 40)])
        groups = [
            {"params": [p], "lr": 0.1 * (i + 1), "weight_decay": 0.2 / (i + 1)}
            for i, p in enumerate(params[-1])
        ]
        opt = optx.wrap(torch.optim.AdamW(groups), optx.PerpGrad(), fused=fused)
        for _ in range(2):
            for p in params[-1]:
                p.grad = torch.sin(3 * p.detach()) + 0.1
            opt.step()
    for ours, cpu in zip(*params, strict=True):
        torch.testing.assert_close(ours, cpu, rtol=1e-6, atol=1e-7)
