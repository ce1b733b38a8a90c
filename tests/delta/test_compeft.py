"""ComPEFT's laws (arXiv 2311.13171), the numbered properties of its specification first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compeft_cases import SIGMA, State, V, between, compressed, flat, random_state, reference
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import optx
from optx import ComPEFT, Compressed
from optx.delta import _golomb as golomb

# ---- 1 to 7: the specification's properties ------------------------------------------------------------


def test_1_worked_example() -> None:
    small = compressed(V, density=0.3, alpha=2)
    assert small.about.sigma == pytest.approx(SIGMA, abs=1e-6)
    assert small.scale == pytest.approx(0.996438, abs=1e-6)
    expected = torch.zeros(10)
    expected[[3, 7, 8]] = torch.tensor([-1.0, 1.0, -1.0]) * small.scale
    assert torch.equal(small.delta()["w"], expected)
    repo = compressed(V, density=0.2, alpha=2, compat="repo")
    assert torch.equal(repo.delta()["w"], expected)
    more = compressed(V, density=0.3, compat="repo").delta()["w"]
    assert more.nonzero().flatten().tolist() == [0, 3, 7, 8]


SHAPES = st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), min_size=1, max_size=5)


@settings(max_examples=60)
@given(
    SHAPES,
    st.floats(0.001, 1),
    st.floats(0, 10),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    st.booleans(),
    st.integers(0, 99),
)
def test_2_equals_the_algorithm(
    shapes: list[tuple[int, ...]], density: float, alpha: float, dtype: torch.dtype, coarse: bool, seed: int
) -> None:
    tuned = random_state(seed, shapes, dtype)
    if coarse:  # many equal magnitudes, and zeros
        tuned = {n: (2 * t).round() for n, t in tuned.items()}
    total = sum(t.numel() for t in tuned.values())
    if total < 2:
        return
    small = optx.compress(between(tuned), ComPEFT(density, alpha))
    got = flat(dict(small.delta().items()))
    torch.testing.assert_close(got, reference(tuned, density, alpha), rtol=2e-7, atol=0)
    assert set(got.tolist()) <= {-small.scale, 0.0, small.scale}
    wanted = min(max(1, int(density * total)), int((flat(tuned) != 0).sum()))
    assert small.nonzeros == wanted
    if int(density * total) < total:
        repo = optx.compress(between(tuned), ComPEFT(density, alpha, "repo"))
        expected = reference(tuned, density, alpha, repo=True)
        torch.testing.assert_close(flat(dict(repo.delta().items())), expected, rtol=2e-7, atol=0)


# Property 3 is in test_golomb.py.


@pytest.mark.parametrize("density", [0.05, 0.1, 0.2, 0.3, 0.35, 0.4, 0.5, 0.6])
def test_4_file_of_a_million_entries(density: float, tmp_path: Path) -> None:
    v = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(1))
    small = compressed(v, density=density)
    path = small.save(tmp_path / "w.cpft")
    bits = 8 * path.stat().st_size / v.numel()
    assert path.stat().st_size == small.nbytes_on_disk
    assert bits == small.bits_per_parameter
    assert golomb.entropy(density) <= bits <= 1.015 * golomb.entropy(density)
    back = Compressed.load(path)
    assert torch.equal(back.masks["w"], small.masks["w"])
    assert back.scale == small.scale
    assert back.about == small.about
    assert small.nbytes == 2 * v.numel() // 8


@settings(max_examples=30)
@given(
    SHAPES,
    SHAPES,
    st.floats(0.01, 1),
    st.floats(0.01, 1),
    st.floats(0, 5),
    st.floats(0, 5),
    st.integers(0, 99),
)
def test_5_dot_and_distance_equal_those_of_the_decoded(
    first: Any, second: Any, p: float, q: float, alpha: float, beta: float, seed: int
) -> None:
    shared = {"s": (7, 11)}
    one = {**random_state(seed, first), **{n: torch.randn(s) for n, s in shared.items()}}
    other = {f"{n}x": t for n, t in random_state(seed + 1, second).items()}
    other |= {n: torch.randn(s) for n, s in shared.items()}
    a, b = optx.compress(between(one), ComPEFT(p, alpha)), optx.compress(between(other), ComPEFT(q, beta))
    names = sorted({*one, *other})
    shapes = {**{n: t.shape for n, t in one.items()}, **{n: t.shape for n, t in other.items()}}
    x, y = (
        torch.cat([(d[n] if n in d.entries else torch.zeros(shapes[n])).double().flatten() for n in names])
        for d in (a.delta(), b.delta())
    )
    assert a.dot(b) == pytest.approx(float(x @ y), rel=1e-12, abs=1e-12)
    assert a.dot(b) == b.dot(a)
    assert a.distance(b) == pytest.approx(float((x - y).norm()), rel=1e-12, abs=1e-7)
    assert a.distance(a) == 0.0
    if min(alpha, beta) > 1e-3:
        assert a.cosine(b) == pytest.approx(float(F.cosine_similarity(x, y, dim=0)), abs=1e-6)


def test_5_the_specifications_formula_with_equal_scales() -> None:
    a, b = (
        compressed(torch.randn(777, generator=torch.Generator().manual_seed(s)), density=0.4) for s in (1, 2)
    )
    s = a.scale
    b = b.scaled(a.about.sigma / b.about.sigma)
    assert b.scale == pytest.approx(s, rel=1e-6)
    (p, n), (q, m) = (np.unpackbits(x.masks["w"].numpy().view(np.uint8), axis=1) for x in (a, b))
    square = s * s * ((p ^ q).sum() + (n ^ m).sum() + 2 * ((p & m) | (n & q)).sum())
    assert a.distance(b) ** 2 == pytest.approx(square, rel=1e-6)


def test_6_closest_alpha() -> None:
    v = torch.randn(200_000, generator=torch.Generator().manual_seed(3))
    small = compressed(v, density=0.05)
    assert small.closest_alpha == pytest.approx(2.34, abs=0.02)
    kept = v.abs() >= v.abs().topk(10_000).values[-1]
    assert small.about.kept_mean == pytest.approx(float(v[kept].abs().mean()), rel=1e-6)
    error = {a: float((v - small.scaled(a).delta()["w"]).square().mean()) for a in (1.0, 2.2, 2.34, 2.5)}
    assert error[2.34] < min(error[1.0], error[2.2], error[2.5])
    assert small.scaled(2.0).masks["w"] is small.masks["w"]


def test_7_everything_kept_and_nothing_changed() -> None:
    all_kept = compressed(V, density=1)
    assert torch.equal(all_kept.delta()["w"], V.sign() * all_kept.scale)
    base = random_state(0, [(3, 4), (5,)], torch.bfloat16)
    same = optx.compress(between(base, base))
    assert all(torch.equal(t, base[n]) for n, t in same.delta().apply(base).items())
    assert same.nonzeros == 0


# ---- what does not show --------------------------------------------------------------------------------


def test_order_and_threads_do_not_show() -> None:
    """Ties are cut by name; the sum of squares is the same to the bit."""
    tuned = random_state(5, [(70_001,), (300, 900), (11,)])
    tuned["t1"] = (4 * tuned["t1"]).round()
    made = []
    for threads, names in ((1, list(tuned)), (2, list(tuned)[::-1])):
        torch.set_num_threads(threads)
        made.append(optx.compress(between({n: tuned[n] for n in names}), ComPEFT(0.2)))
    one, other = made
    assert one.about.sigma == other.about.sigma
    assert one.about.kept_mean == other.about.kept_mean
    assert all(torch.equal(mask, other.masks[n]) for n, mask in one.masks.items())


def test_sigma_of_a_shifted_delta() -> None:
    """Means far above the spread cancel in sums of squares; not here."""
    tuned = {n: t * 1e-3 + 100 for n, t in random_state(1, [(100_000,), (50_000,)]).items()}
    small = optx.compress(between(tuned))
    assert small.about.sigma == pytest.approx(float(flat(tuned).double().std()), rel=1e-6)


def test_files_give_what_dicts_give(tmp_path: Path) -> None:
    base, tuned = (random_state(s, [(40, 30), (7,)], torch.bfloat16) for s in (1, 2))
    for name, state in (("base", base), ("tuned", tuned)):
        save_file(state, tmp_path / f"{name}.safetensors")
    delta = optx.Delta.between(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors")
    small, other = optx.compress(delta), optx.compress(optx.Delta.between(base, tuned))
    assert all(torch.equal(mask, other.masks[n]) for n, mask in small.masks.items())
    small.save(tmp_path / "new" / "d.cpft")
    back = Compressed.load(tmp_path / "new" / "d.cpft").delta()
    out = back.apply(tmp_path / "base.safetensors", tmp_path / "made.safetensors")
    made, expected = optx.delta._checkpoint_source.open_source(out, "out"), other.delta().apply(base)
    assert all(torch.equal(made.read(n), t) for n, t in expected.items())
    tuned["t1"] += 1
    with pytest.raises(optx.OptxError, match="not the base that the delta was taken from: 't0'"):
        back.apply(tuned)


def test_progress_sees_every_name_in_each_pass() -> None:
    seen: list[str] = []

    def progress(names: Any) -> Any:
        seen.extend(names)
        return names

    optx.compress(random_state(1, [(4,), (0, 3), (5,)]), progress=progress)
    assert seen == ["t0", "t2"] * 3


# ---- adapters, integer entries, ties -------------------------------------------------------------------


@pytest.mark.parametrize("start", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_adapters_own_tensors(dtype: torch.dtype, start: float, tmp_path: Path) -> None:
    adapter = {n: t + start for n, t in random_state(1, [(8, 64), (64, 8)], dtype).items()}
    small = optx.compress(adapter, ComPEFT(0.3, 2.0), start=start)
    small.save(tmp_path / "a.cpft")
    for blob in (small, Compressed.load(tmp_path / "a.cpft")):
        decoded = blob.decode()
        assert {n: (t.shape, t.dtype) for n, t in decoded.items()} == {
            n: (t.shape, t.dtype) for n, t in adapter.items()
        }
        v = {n: t.float() - start for n, t in adapter.items()}
        expected = (reference(v, 0.3, 2.0) + start).to(dtype)
        torch.testing.assert_close(
            torch.cat([decoded[n].flatten() for n in sorted(decoded)]), expected, rtol=1e-6, atol=0
        )
    with pytest.raises(optx.OptxError, match=r"start is 1\.0; a delta is the change itself"):
        optx.compress(between(adapter), start=1.0)


def test_integer_and_tied_entries(tmp_path: Path) -> None:
    w = torch.randn(6, 5)
    state = {"w": w, "steps": torch.tensor(7), "mask": torch.tensor([True, False]), "head": w}
    state["empty"] = torch.empty(0, 4)
    small = optx.compress(state)
    small.save(tmp_path / "d.cpft")
    buffer = tmp_path / "d.pt"
    torch.save(small.state_dict(), buffer)
    loaded = Compressed.from_state_dict(torch.load(buffer, weights_only=True))
    for blob in (small, Compressed.load(tmp_path / "d.cpft"), loaded):
        decoded = blob.decode()
        assert decoded["head"] is decoded["w"]
        assert decoded["steps"].equal(torch.tensor(7))
        assert decoded["mask"].tolist() == [True, False]
        assert decoded["empty"].shape == (0, 4)
        assert torch.equal(decoded["w"], small.decode()["w"])
        assert blob.delta().apply({**state, "head": w})["steps"] == 7
        assert blob.about == small.about


@pytest.mark.parametrize("bad", [{}, {"compeft": "{"}, {"compeft": "[]"}])
def test_a_state_that_is_none(bad: Any) -> None:
    with pytest.raises(optx.FileError, match="no compressed delta"):
        Compressed.from_state_dict(bad)


def test_a_state_with_masks_of_another_size() -> None:
    state = compressed(V).state_dict()
    state["masks"] = {"w": state["masks"]["w"][:, :0]}
    with pytest.raises(optx.FileError, match=r"masks of 'w' must be int64 \(2, 1\)"):
        Compressed.from_state_dict(state)


# ---- adding in place -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_add_to_equals_apply(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(33, 65), nn.Linear(65, 3, bias=False)).to(dtype)
    model[1].weight.data = model[1].weight.data.t().contiguous().t()  # not contiguous
    before = {n: t.clone() for n, t in model.state_dict().items()}
    tuned = {n: t + 0.01 * torch.randn_like(t) for n, t in before.items()}
    small = optx.compress(optx.Delta.between(before, tuned), ComPEFT(0.5, 1.5))
    expected = small.delta().apply(before)
    version = model[0].weight._version
    small.add_to(model)
    assert all(torch.equal(t, expected[n]) for n, t in model.state_dict().items())
    assert model[0].weight._version > version
    with pytest.raises(optx.OptxError, match=r"not the base .* '0\.weight'"):
        small.add_to(model)
    small.add_to(model, -1.0, check=False)
    unit = {torch.float32: 1e-6, torch.float64: 1e-15}.get(dtype, 2e-3)
    for n, t in model.state_dict().items():
        torch.testing.assert_close(t, before[n], rtol=0, atol=unit)


def test_add_to_refuses_before_it_changes_anything() -> None:
    state = random_state(1, [(3,), (4,)])
    small = optx.compress(state)
    wrong: State = {"t0": torch.zeros(3), "t1": torch.zeros(5)}
    with pytest.raises(optx.ShapeError, match="'t1' has shape"):
        small.add_to(wrong)
    assert not wrong["t0"].any()
    with pytest.raises(optx.OptxError, match="base has no 't1'"):
        small.add_to({"t0": wrong["t0"]})
    with pytest.raises(optx.OptxError, match=r"'t1' is torch\.int64 in the model"):
        small.add_to({"t0": wrong["t0"], "t1": torch.zeros(4, dtype=torch.int64)})
    assert not wrong["t0"].any()
    with pytest.raises(optx.OptxError, match="model is on the disk"):
        small.add_to("base.safetensors")


# ---- many ----------------------------------------------------------------------------------------------


def experts(count: int, n: int = 5000) -> list[Compressed]:
    shapes: list[tuple[int, ...]] = [(n,), (3, 50)]
    return [
        optx.compress(random_state(i, shapes), ComPEFT(0.1 + 0.15 * i, 1.0 + (i % 3))) for i in range(count)
    ]


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_average_and_ties_equal_the_float_computation(count: int) -> None:
    blobs = experts(count)
    weights = [0.5, -2.0, 1.0, 0.25, 3.0, 0.0][:count]
    mean, sum_, ties = Compressed.average(blobs), Compressed.average(blobs, weights), Compressed.ties(blobs)
    for name in ("t0", "t1"):
        stack = torch.stack([blob.delta()[name] for blob in blobs]).double()
        torch.testing.assert_close(mean[name].double(), stack.mean(0), rtol=1e-6, atol=1e-7)
        weighted = (stack * torch.tensor(weights).double().view(-1, *[1] * (stack.ndim - 1))).sum(0)
        torch.testing.assert_close(sum_[name].double(), weighted, rtol=1e-6, atol=2e-6)
        votes = torch.stack([blob.delta()[name] for blob in blobs])
        elected = torch.where(votes.sum(0) >= 0, 1.0, -1.0)
        match = votes.sign() == elected
        expected = (votes * match).sum(0) / match.sum(0).clamp_min(1)
        torch.testing.assert_close(ties[name], expected, rtol=1e-6, atol=0)
        assert ties[name].shape == stack.shape[1:]


def test_a_vote_that_cancels_goes_up() -> None:
    up, down = (compressed(torch.tensor([sign, 0.0, 0.0, 2.0]), density=0.5) for sign in (1.0, -1.0))
    down = Compressed(down.entries, down.masks, down.whole, up.about, ())
    assert Compressed.ties([up, down])["w"].tolist() == pytest.approx([up.scale, 0, 0, up.scale])
    assert Compressed.average([up, down])["w"].tolist() == pytest.approx([0, 0, 0, up.scale])


def test_many_with_other_names_and_errors() -> None:
    one, other = (
        optx.compress({"a": torch.ones(4), "n": torch.tensor(3)}),
        optx.compress({"b": -torch.eye(2)}),
    )
    mean = Compressed.average([one, other])
    assert set(mean.entries) == {"a", "n", "b"}
    assert mean["n"] == 3
    torch.testing.assert_close(mean["b"], other.delta()["b"] / 2)
    with pytest.raises(optx.OptxError, match="no delta to combine"):
        Compressed.ties([])
    with pytest.raises(optx.OptxError, match="1 weights for 2 deltas"):
        Compressed.average([one, other], [1.0])
    with pytest.raises(optx.ShapeError, match=r"'a' has shape \(4,\) in one delta and \(5,\)"):
        Compressed.average([one, optx.compress({"a": torch.ones(5)})])
    with pytest.raises(optx.ShapeError, match="'a' has shape"):
        one.dot(optx.compress({"a": torch.ones(5)}))
    bases: list[State] = [{"w": torch.zeros(3)}, {"w": torch.ones(3)}]
    two = [optx.compress(between({"w": torch.tensor([1.0, 3.0, 2.0])}, b)) for b in bases]
    with pytest.raises(optx.OptxError, match="different bases; they differ at 'w'"):
        Compressed.average(two)


def test_merge_takes_it() -> None:
    base = random_state(0, [(20, 20)])
    tuned = [{n: t + 0.1 * torch.randn_like(t) for n, t in base.items()} for _ in range(2)]
    blobs = [optx.compress(between(t, base)) for t in tuned]
    made = optx.merge(base, [blob.delta() for blob in blobs], optx.TaskArithmetic(normalize=True))
    expected = Compressed.average(blobs).apply(base)
    torch.testing.assert_close(made["t0"], expected["t0"])


# ---- the method ----------------------------------------------------------------------------------------


def _accuracy(model: nn.Module, weights: State, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        logits = torch.func.functional_call(model, weights, (x,))
    return float((logits.argmax(1) == y).double().mean())


def _train(model: nn.Module, x: Tensor, y: Tensor, epochs: int, lr: float) -> None:
    opt = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            opt.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            opt.step()


@pytest.mark.long
def test_experts_on_digits() -> None:
    """At a density of 0.2 with tuned alpha, three quarters of what fine-tuning gained are still there."""
    from sklearn.datasets import load_digits

    torch.set_num_threads(1)
    torch.manual_seed(0)
    digits: Any = load_digits()
    images, y = torch.tensor(digits.images, dtype=torch.float32) / 16, torch.tensor(digits.target)
    order = torch.randperm(len(images))
    train, test = order[:1200], order[1200:]
    views = [
        images.flatten(1),
        images.rot90(1, (1, 2)).flatten(1),
        images.rot90(3, (1, 2)).flatten(1),
        1 - images.flatten(1),
    ]
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    few = train[:300]
    _train(model, torch.cat([v[few] for v in views]), y[few].repeat(4), 15, 1e-3)
    base = {n: t.clone() for n, t in model.state_dict().items()}
    densities = (0.05, 0.1, 0.2)
    result = {"base": 0.0, "full": 0.0, "plain": 0.0, **{str(p): 0.0 for p in densities}}
    for view in views[2:]:
        model.load_state_dict(base)
        _train(model, view[train], y[train], 20, 3e-4)
        tuned = {n: t.clone() for n, t in model.state_dict().items()}
        result["base"] += _accuracy(model, base, view[test], y[test]) / 2
        result["full"] += _accuracy(model, tuned, view[test], y[test]) / 2
        for p in densities:
            small = optx.compress(optx.Delta.between(base, tuned), ComPEFT(p))
            scores = {
                a: _accuracy(model, dict(small.scaled(a).delta().apply(base)), view[test], y[test])
                for a in (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
            }
            result[str(p)] += max(scores.values()) / 2
            result["plain"] += scores[1.0] / 2 if p == 0.2 else 0.0
    gain = result["full"] - result["base"]
    assert gain > 0.04, result
    assert result["0.2"] - result["base"] >= 0.75 * gain, result
    assert result["0.05"] <= result["0.1"] + 0.005 <= result["0.2"] + 0.01, result
    assert result["0.2"] >= result["plain"], result
