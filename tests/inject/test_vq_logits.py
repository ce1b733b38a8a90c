"""`optx.VQLogits`: its numbers against a head with all its columns."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peak import Peak
from torch import Tensor, nn
from torch.nn import functional as F

import optx

V, D = 23, 5


def net(bias: bool = False, dtype: torch.dtype = torch.float64, rows: int = V) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, D), nn.Linear(D, rows, bias=bias)).to(dtype)


def served(model: Any, **options: Any) -> Any:
    return optx.attach(model, optx.VQLogits(**options), targets="1")


def moved(handle: Any, seed: int = 1) -> Any:
    """Everything that trains has other values, and a code has no token."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in handle.parameters():
            p.add_(torch.randn(p.shape, generator=draws).to(p))
        if handle.codebook.shape[0] > 2:
            handle.remap(torch.where(handle.mapping == 1, 2, handle.mapping))
    return handle


def batch(dtype: torch.dtype = torch.float64, tokens: int = V) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(2)
    labels = torch.randint(tokens, (2, 6), generator=draws)
    labels[0, 1] = labels[1, 3] = -100
    return torch.randn(2, 6, D, generator=draws, dtype=dtype), labels


def full(logits: Tensor, labels: Tensor, z_loss: float = 0.0, **options: Any) -> Tensor:
    """The same with all columns."""
    flat, target = logits.flatten(0, -2), labels.flatten()
    loss = F.cross_entropy(flat, target, **options)
    return loss + z_loss * flat.logsumexp(1)[target != -100].square().mean() if z_loss else loss


def test_as_many_codes_as_tokens_are_the_head_bit_for_bit() -> None:
    for bias, token_bias in ((False, False), (True, False), (True, True)):
        model = net(bias, torch.float32)
        x, labels = batch(torch.float32)
        before = model[1](x)
        handle = served(model, codes=V, token_bias=token_bias)
        assert torch.equal(model[1](x), before) or (token_bias and torch.allclose(model[1](x), before))
        assert handle.mapping.tolist() == list(range(V))
        if not token_bias:
            assert torch.equal(handle.loss(x, labels), full(before, labels))


@pytest.mark.parametrize("token_bias", [False, True])
@settings(max_examples=25)
@given(
    bias=st.booleans(),
    codes=st.integers(1, V),
    used=st.sampled_from([None, V, V - 4]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    smoothing=st.sampled_from([0.0, 0.3]),
    z_loss=st.sampled_from([0.0, 0.2]),
)
def test_value_and_gradients_are_those_of_all_columns(
    token_bias: bool, bias: bool, codes: int, used: Any, reduction: str, smoothing: float, z_loss: float
) -> None:
    model = net(bias)
    codes = min(codes, used or V)
    handle = moved(served(model, codes=codes, init="random", token_bias=token_bias, used=used))
    x, labels = batch(tokens=used or V)
    trained = [x.requires_grad_(), *handle.parameters()]
    # Of what has no chance, smoothing would give an infinite loss: it is over the tokens.
    logits = model[1](x)[..., : used or V]
    if z_loss:
        reduction = "mean"
    expected = full(logits, labels, z_loss, reduction=reduction, label_smoothing=smoothing)
    options = {"reduction": reduction, "label_smoothing": smoothing, "z_loss": z_loss}
    found = handle.loss(x, labels, **options)
    assert torch.allclose(found.flatten(), expected.flatten(), rtol=0, atol=1e-12)
    mine = torch.autograd.grad(found.sum(), trained)
    for one, other in zip(mine, torch.autograd.grad(expected.sum(), trained), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-12)


def test_float32_and_autocast() -> None:
    model = net(dtype=torch.float32)
    handle = moved(served(model, codes=6, init="random", token_bias=True))
    x, labels = batch(torch.float32)
    assert torch.allclose(handle.loss(x, labels), full(model[1](x), labels), atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model[1](x)
        found = handle.loss(x, labels)
    assert logits.dtype == torch.bfloat16
    assert found.dtype == torch.float32
    wide = handle.part.scores(x.bfloat16()).float() @ F.one_hot(handle.mapping.long()).float().t()
    assert torch.allclose(found, full(wide + handle.part.token_bias, labels), atol=1e-6)
    half = net(dtype=torch.bfloat16)
    handle = served(half, codes=6, init="random")
    assert handle.codebook.dtype == torch.float32
    assert half[1](x.bfloat16()).dtype == torch.bfloat16
    assert handle.loss(x.bfloat16(), labels).dtype == torch.float32


def test_tokens_of_a_code_have_one_chance() -> None:
    model = net()
    handle = moved(served(model, codes=4, init="random"))
    chances = model[1](batch()[0]).softmax(-1)
    for code in handle.mapping.unique():
        same = chances[..., handle.mapping == code]
        assert torch.equal(same, same[..., :1].expand_as(same))


def test_one_code_knows_nothing() -> None:
    model = net(dtype=torch.float32)
    handle = served(model, codes=1, init="random")
    x, labels = batch(torch.float32)
    loss = handle.loss(x.requires_grad_(), labels)
    assert float(loss.detach()) == pytest.approx(math.log(V), abs=1e-7)
    loss.backward()
    assert not x.grad.any()  # type: ignore[union-attr]
    assert torch.equal(handle.loss(x, labels, reduction="none")[labels < 0], torch.zeros(2))


@pytest.mark.parametrize("options", [{}, {"token_bias": True}, {"used": V - 3}])
@pytest.mark.parametrize("bias", [False, True])
def test_a_plain_head_and_a_merge(bias: bool, options: Any) -> None:
    model = net(bias)
    handle = moved(served(model, codes=4, init="random", **options))
    x = batch()[0]
    found = model[1](x)
    head = handle.materialize()
    assert torch.allclose(head(x), found, rtol=0, atol=1e-12)
    assert len(head.weight.unique(dim=0)) <= 4
    assert (head.bias is not None) == (bias or bool(options))
    if not bias and options:
        with pytest.raises(optx.MergeError, match="has no bias"):
            handle.merge()
        return
    handle.merge()
    assert torch.allclose(model[1](x), found, rtol=0, atol=1e-12)
    with pytest.raises(optx.OptxError, match="loss: VQLogits is merged into the head"):
        handle.loss(x, batch()[1])
    handle.unmerge()
    assert torch.equal(model[1](x), found)


def test_hidden_states_for_as_long_as_asked() -> None:
    model = net()
    handle = served(model, codes=4, init="random")
    x = batch()[0]
    logits = model[1](x)
    with handle.hidden():
        assert torch.equal(model[1](x), x)
    assert torch.equal(model[1](x), logits)
    with pytest.raises(RuntimeError), handle.hidden():
        model[1](x) @ torch.zeros(1)
    assert torch.equal(model[1](x), logits)
    with handle.disable():
        assert torch.equal(model[1](x), F.linear(x, model[1].weight))


def test_codes_have_no_order() -> None:
    model = net()
    handle = moved(served(model, codes=6, init="random"))
    x, labels = batch()
    before, loss = model[1](x), handle.loss(x, labels)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        handle.codebook.copy_(handle.codebook[order])
    handle.remap(order.argsort()[handle.mapping.long()])
    assert torch.allclose(model[1](x), before, rtol=0, atol=1e-12)
    assert torch.allclose(handle.loss(x, labels), loss, rtol=0, atol=1e-12)


# ---- the mapping ----------------------------------------------------------------------------------------


def test_k_means_finds_rows_of_few_kinds() -> None:
    kinds = torch.randn(6, D, generator=torch.Generator().manual_seed(4)).double()
    which = torch.arange(V) % 6
    model = net()
    with torch.no_grad():
        model[1].weight.copy_(kinds[which])
    x = batch()[0]
    before = model[1](x)
    handle = served(model, codes=8)
    assert torch.allclose(model[1](x), before, atol=1e-6)
    for kind in range(6):
        assert len(handle.mapping[which == kind].unique()) == 1


def test_k_means_finds_clusters_and_leaves_no_code_empty() -> None:
    draws = torch.Generator().manual_seed(5)
    which = torch.arange(400) % 8
    rows = 5 * torch.randn(8, D, generator=draws)[which] + 0.01 * torch.randn(400, D, generator=draws)
    model = net(dtype=torch.float32, rows=400)
    with torch.no_grad():
        model[1].weight.copy_(rows)
    random_state = torch.get_rng_state()
    handle = served(model, codes=8)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(len(handle.mapping[which == kind].unique()) == 1 for kind in range(8))
    assert torch.allclose(handle.codebook[handle.mapping[3]], rows[which == 3].mean(0), atol=1e-5)
    handle.remove()
    handle = served(model, codes=60, seed=7)
    assert torch.bincount(handle.mapping, minlength=60).min() >= 1
    mapping = handle.mapping.clone()
    handle.remove()
    handle = served(model, codes=60, seed=7)
    assert torch.equal(handle.mapping, mapping)
    # To the nearest of the centres as they are.
    distances = torch.cdist(model[1].weight, handle.codebook)
    assert handle.remap() == int((distances.argmin(1) != mapping).sum())
    assert torch.equal(handle.mapping.long(), distances.argmin(1))


def test_other_mappings() -> None:
    counts = torch.tensor([2.0**-i for i in range(V)])
    sizes = {
        init: torch.bincount(served(net(), codes=5, init=init, counts=counts).mapping, minlength=5).tolist()
        for init in ("random", "blocks", "frequency")
    }
    assert sizes == {"random": [5, 5, 5, 4, 4], "blocks": [5, 5, 5, 5, 3], "frequency": [1, 1, 1, 1, 19]}
    drawn = served(net(), codes=5, init="random")
    assert 0.01 < float(drawn.codebook.detach().std()) < 0.03
    blocks = served(model := net(), codes=5, init="blocks")
    assert torch.allclose(blocks.codebook[1], model[1].weight[5:10].mean(0))


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    model = net()
    with pytest.raises(optx.OptxError, match="python -m pip install scikit-learn"):
        served(model, codes=5)
    assert not hasattr(model[1], "optx")
    served(model, codes=5, init="random")


# ---- what it costs --------------------------------------------------------------------------------------


def test_the_start_of_token_bias_and_the_gap() -> None:
    counts = torch.arange(V).double() + 1
    model = net()
    x = batch()[0]
    plain = served(model, codes=4, init="blocks", counts=counts)
    of_codes = torch.zeros(4, dtype=torch.float64).index_add(0, plain.mapping, counts)
    p, sizes = counts / counts.sum(), torch.bincount(plain.mapping).double()
    entropy = torch.zeros(4, dtype=torch.float64)
    share = counts / of_codes[plain.mapping]
    entropy.index_add_(0, plain.mapping, -share * share.log())
    expected = float((of_codes / of_codes.sum() * (sizes.log() - entropy)).sum())
    assert plain.gap(counts) == pytest.approx(expected, abs=1e-12)
    assert f"gap: {expected:.3f} nats" in str(plain.report())
    chances = model[1](x).softmax(-1)
    plain.remove()
    handle = served(model, codes=4, init="blocks", counts=counts - 1, token_bias=True)
    assert handle.gap(counts) == pytest.approx(0, abs=1e-12)
    now = model[1](x).softmax(-1)
    for code in range(4):
        among = handle.mapping == code
        assert torch.allclose(now[..., among].sum(-1), chances[..., among].sum(-1))
        assert torch.allclose(now[0, 0, among] / now[0, 0, among].sum(), p[among] / p[among].sum())


def test_the_report_says_what_is_saved() -> None:
    model = net(True, torch.float32)
    handle = served(model, codes=4, init="random")
    report = handle.report()
    assert (report.head_numbers, report.code_numbers) == (V * D + V, 4 * D + 4)
    assert (report.index_bytes, report.code_bytes) == (4 * V, 4 * (4 * D + 4) + 4 * V)
    assert report.saved_bytes == report.head_bytes - report.code_bytes > 0
    assert "rests in memory" in str(report)
    assert report.trainable == 24
    tied: Any = nn.Sequential(nn.Embedding(V, D), nn.Linear(D, V, bias=False))
    tied[1].weight = tied[0].weight
    with pytest.raises(optx.TargetError, match=r"the weight of '1' is '0.weight' too \(tied\)"):
        served(tied, codes=4)
    assert tied[1].weight.requires_grad
    handle = served(tied, codes=4, untie=True, init="random")
    report = handle.report()
    assert report.saved_bytes == -report.code_bytes
    assert "nothing is saved: the weight is 0.weight too" in str(report)
    assert tied[0].weight.requires_grad
    loss = handle.loss(tied[0](torch.tensor([[1, 2]])), torch.tensor([[3, 4]]))
    loss.backward()
    assert tied[0].weight.grad.any()
    with pytest.raises(optx.MergeError, match="is tied"):
        handle.merge()
    x = torch.randn(3, D)
    logits, embedding = tied[1](x), tied[0].weight.detach().clone()
    handle.merge(untie=True)
    assert torch.allclose(tied[1](x), logits, atol=1e-6)
    assert torch.equal(tied[0].weight, embedding)
    handle.remove()
    assert tied[1].weight is tied[0].weight


def test_memory_does_not_grow_with_the_vocabulary() -> None:
    """And nothing of (positions, V) is made: 64 x 40,000 float32 are 10 MB."""
    found = []
    for rows in (400, 40_000):
        model = net(dtype=torch.float32, rows=rows)
        handle = served(model, codes=32, init="random")
        x = torch.randn(64, D, requires_grad=True)
        labels = torch.arange(64)
        handle.loss(x, labels).backward()  # counts the codes' tokens
        with Peak() as peak:
            handle.loss(x, labels).backward()
        found.append(peak.most)
    assert found[0] == found[1] < 100_000


# ---- what is wrong --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "options", "message"),
    [
        (V, {}, f"labels have {V}, which is no token: there are {V}, 0 to {V - 1}"),
        (-1, {}, "labels have -1"),
        (-100, {"ignore_index": -1}, "labels have -100"),
        (V - 2, {"used": V - 4}, r"labels have 21, .* \(4 more rows of the head are no tokens\)"),
    ],
)
def test_a_label_that_is_no_token(label: int, options: Any, message: str) -> None:
    used = {"used": options.pop("used")} if "used" in options else {}
    handle = served(net(), codes=4, init="random", **used)
    labels = torch.tensor([0, label])
    with pytest.raises(optx.OptxError, match=message):
        handle.loss(torch.randn(2, D).double(), labels, **options)


def test_what_else_is_on_the_head_is_not_left_out_in_silence() -> None:
    model = net()
    handle = served(model, codes=4)
    other = optx.attach(model, optx.LoRA(rank=1), targets="1")
    x, labels = batch()
    with pytest.raises(optx.OptxError, match="loss: 'lora' changes what '1' gives too"):
        handle.loss(x, labels)
    with pytest.raises(optx.OptxError, match="hidden: 'lora'"), handle.hidden():
        pass
    other.remove()
    with handle.hidden():
        with handle.hidden():
            pass
        assert model(torch.zeros(1, dtype=torch.int64)).shape == (1, D)
    options: Any = {"backend": "eager", "fullgraph": True}
    assert torch.equal(torch.compile(handle.loss, **options)(x, labels), handle.loss(x, labels))


def test_refusals() -> None:
    model = net()
    for options, message in (
        ({"codes": 0}, "codes is 0"),
        ({"init": "best"}, "init is 'best'"),
        ({"token_bias": 2}, "token_bias is 2"),
        ({"counts": [1.0, -1.0]}, "at least 0"),
        ({"counts": [0.0, 0.0]}, "counts are all 0"),
        ({"counts": "abc"}, "VQLogits: counts are 'abc'; they must be a row of numbers"),
        ({"counts": [1j, 0]}, r"counts are of shape \(2,\); they must be"),
    ):
        with pytest.raises(optx.OptxError, match=message):
            optx.VQLogits(**options)
    for options, message in (
        ({"codes": V + 1}, f"codes={V + 1}, and '1' has {V} tokens"),
        ({"used": V + 1}, f"used={V + 1}, and '1' has {V} tokens"),
        ({"codes": V, "used": V - 1}, f"codes={V}, and '1' has {V - 1} tokens"),
        ({"counts": [1.0]}, f"counts of 1 tokens, and '1' has {V} rows"),
        ({"init": "frequency"}, "needs counts="),
    ):
        with pytest.raises(optx.TargetError, match=message):
            served(model, **options)
    with pytest.raises(optx.TargetError, match="'0' is a Embedding"):
        optx.attach(model, optx.VQLogits(), targets="0")
    two = nn.Sequential(nn.Linear(2, 9), nn.Linear(9, 2))
    with pytest.raises(optx.TargetError, match="serves one head, and targets match 2"):
        optx.attach(two, optx.VQLogits(), targets="0|1")
    with pytest.raises(optx.TargetError, match="found no output heads"):
        optx.attach(model, optx.VQLogits())
    with torch.no_grad():
        two[0].weight[1, 1] = torch.nan
    with pytest.raises(optx.TargetError, match="have inf or nan"):
        optx.attach(two, optx.VQLogits(codes=2), targets="0")
    assert not hasattr(two[0], "optx")
    handle = served(model, codes=4, init="random")
    x, labels = batch()
    for given_, message in (
        ((x[..., :3], labels), "hidden has shape"),
        ((x, labels[:, :-1]), "labels \\(2, 5\\)"),
        ((x, labels.float()), "labels are torch.float32"),
    ):
        with pytest.raises(optx.OptxError, match=message):
            handle.loss(*given_)
    with pytest.raises(optx.OptxError, match="reduction is 'max'"):
        handle.loss(x, labels, reduction="max")
    with pytest.raises(optx.OptxError, match="mapping has code 4, and there are 4 codes"):
        handle.remap(torch.full((V,), 4))
    with pytest.raises(optx.OptxError, match="whole numbers of shape"):
        handle.remap(torch.zeros(3, dtype=torch.int64))
    state = handle.state_dict()
    with pytest.raises(optx.OptxError, match="mapping has code -1"):
        handle.load_state_dict({k: v - 1 if k.endswith("mapping") else v for k, v in state.items()})
    with handle.disable(), pytest.raises(optx.OptxError, match="switched off"):
        handle.loss(x, labels)
    handle.remove()
    with pytest.raises(optx.OptxError, match="has been removed"):
        handle.loss(x, labels)
