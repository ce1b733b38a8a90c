"""`optx.analysis.attention_margins` on models of transformers and torch: what softmax is given is x W z."""

from __future__ import annotations

import copy
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import normalize

import optx
from optx.analysis import AttentionMargins, attention_margins, attention_svm, corr

sys.path.insert(0, str(Path(__file__).parents[1] / "attention"))

from attention_models import TOKENS, built, padded

F64 = torch.float64


def softmaxes(found: AttentionMargins) -> list[Tensor]:
    return [(X @ found.W @ z).softmax(0) for X, z in zip(found.X, found.z, strict=True)]


def check_rows(found: AttentionMargins, weights: Tensor, rows: list[tuple[int, int]]) -> None:
    """Against attention weights (B, T, S) as the model says them, row by row."""
    weights = weights.detach()
    got = softmaxes(found)
    assert len(got) == len(rows)
    largest = torch.tensor([float(weights[b, t].max()) for b, t in rows])
    for one, (b, t), choice in zip(got, rows, found.chosen, strict=True):
        wanted = weights[b, t][weights[b, t] > 0]
        assert torch.allclose(one, wanted, rtol=1e-6, atol=1e-9)
        assert int(wanted.argmax()) == int(choice)
    assert found.saturated == pytest.approx(float((largest > 0.99).double().mean()))
    logits = [one.log() for one in got]
    margins = torch.cat([(x.max() - x)[torch.arange(len(x)) != x.argmax()] for x in logits])
    assert found.minimum == pytest.approx(float(margins.min()), rel=1e-5)
    assert found.median == pytest.approx(float(margins.median()), rel=1e-5)


def check_spectrum(found: AttentionMargins, d: int) -> None:
    S = torch.linalg.svdvals(found.W[:, :d])
    assert found.effective_rank == pytest.approx(float(S.sum() ** 2 / S.square().sum()), rel=1e-9)
    assert found.nuclear_ratio == pytest.approx(math.sqrt(found.effective_rank))
    assert 0.0 < found.reach <= 1.0 + 1e-12
    assert found.corr == pytest.approx(found.corr_within * found.reach, abs=1e-9)
    assert found.corr == pytest.approx(corr(found.W, found.svm.W), abs=1e-12)


SHOWN = [(b, t) for b in range(2) for t in range(6)]


@pytest.mark.parametrize(("layer", "head"), [(0, 0), (1, 3), (-1, 2)])
@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_scores_of_w_are_those_of_the_model(kind: str, layer: int, head: int) -> None:
    """In packed matrices (GPT-2's) and single ones, with biases, masks of causes and of padding."""
    found = attention_margins(built(kind), padded(), layer, head, sample=100)
    weights = built(kind, "eager")(**padded(), output_attentions=True).attentions[layer][:, head]
    rows = [(b, t) for b, t in SHOWN if (b, t) not in ((0, 0), (0, 1))]  # padding
    if kind == "gpt2":
        rows = [(b, t) for b, t in rows if (b, t) not in ((0, 2), (1, 0))]  # which see themselves alone
    assert found.rows == len(rows)
    check_rows(found, weights, rows)
    check_spectrum(found, 16)


def test_of_an_encoder_and_decoder_by_path() -> None:
    batch = {**padded(), "decoder_input_ids": TOKENS.flip(1)[:, :4]}
    path = "model.decoder.layers.0.encoder_attn"
    found = attention_margins(built("bart"), batch, path, 1, sample=100)
    weights = built("bart", "eager")(**batch, output_attentions=True).cross_attentions[0][:, 1]
    check_rows(found, weights, [(b, t) for b in range(2) for t in range(4)])
    assert [len(X) for X in found.X] == [4] * 4 + [6] * 4  # of the first, two tokens are padding
    check_spectrum(found, 16)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("widths", [{}, {"kdim": 5, "vdim": 5}])
def test_of_torchs_module(batch_first: bool, widths: dict[str, int]) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(6, 2, batch_first=batch_first, dtype=F64, **widths)
    nn.init.normal_(attention.in_proj_bias)
    model = nn.ModuleDict({"attn": attention})
    q, k = torch.randn(3, 4, 6, dtype=F64), torch.randn(3, 7, widths.get("kdim", 6), dtype=F64)
    given = (q, k, k) if batch_first else tuple(x.transpose(0, 1) for x in (q, k, k))
    _, weights = attention(*given, average_attn_weights=False)
    model.forward = lambda *args: attention(*args, need_weights=False)  # type: ignore[assignment]
    found = attention_margins(model, given, "attn", 1, sample=100)
    check_rows(found, weights[:, 1], [(b, t) for b in range(3) for t in range(4)])
    assert found.W.shape == (widths.get("kdim", 6), 7)


class Grouped(nn.Module):
    """Four heads of queries, two of keys, no position; a scale of its own, and values of nothing."""

    def __init__(self, bias: bool = False, scale: float | None = 0.7) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(6, 12, bias=bias), nn.Linear(6, 6, bias=bias)
        self.v_proj, self.scale = nn.Linear(6, 6), scale
        self.fail = False

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            p(x).unflatten(-1, (-1, 3)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.fail:
            raise RuntimeError("on purpose")
        return F.scaled_dot_product_attention(q, k, v, scale=self.scale, enable_gqa=True)


@pytest.mark.parametrize("scale", [0.7, None])
@pytest.mark.parametrize("head", range(4))
def test_heads_that_share_keys(head: int, scale: float | None) -> None:
    torch.manual_seed(0)
    net = Grouped(scale=scale).double()
    x = torch.randn(2, 5, 6, dtype=F64)
    found = attention_margins(net, x, "", head, sample=100)
    q = net.q_proj.weight[3 * head : 3 * head + 3]
    k = net.k_proj.weight[3 * (head // 2) : 3 * (head // 2) + 3]
    assert torch.allclose(found.W, (scale or 3**-0.5) * k.T @ q)  # W_Kᵀ W_Q, without a bias no column
    assert found.rows == 10


def test_a_querys_bias_is_a_column_and_a_keys_is_nothing() -> None:
    torch.manual_seed(0)
    net = Grouped(bias=True).double()
    x = torch.randn(2, 5, 6, dtype=F64)
    found = attention_margins(net, x, 0, 0)
    q, k = net.q_proj, net.k_proj
    assert torch.allclose(found.W[:, 6], 0.7 * k.weight[:3].T @ q.bias[:3])
    assert torch.equal(found.z[:, 6], torch.ones(10, dtype=F64))
    nn.init.zeros_(q.bias)
    assert not attention_margins(net, x, 0, 0).W[:, 6].any()  # it is there whatever its value
    torch.manual_seed(0)
    net.load_state_dict(Grouped(bias=True).double().state_dict())
    nn.init.normal_(k.bias)
    again = attention_margins(net, x, 0, 0)
    assert torch.allclose(again.svm.W, found.svm.W)
    assert again.minimum == pytest.approx(found.minimum)


def test_copies_of_the_chosen_token_are_left_out_and_counted() -> None:
    torch.manual_seed(0)
    net = Grouped().double()
    x = torch.randn(1, 4, 6, dtype=F64).repeat(1, 2, 1)  # each token twice
    found = attention_margins(net, x, 0, 0)
    assert found.duplicates == 8
    assert found.minimum == pytest.approx(0.0, abs=1e-12)
    assert [len(X) for X in found.X] == [7] * 8
    assert found.svm.sequence.tolist() == sorted([*range(8)] * 6)


def test_a_sample_is_of_rows_from_first_to_last() -> None:
    torch.manual_seed(0)
    net, x = Grouped().double(), torch.randn(3, 5, 6, dtype=F64)
    whole, some, one = (attention_margins(net, x, 0, 1, sample=n) for n in (15, 4, 1))
    assert torch.equal(some.z, whole.z[[0, 5, 9, 14]])
    assert len(one.z) == 1
    assert (some.rows, some.minimum, some.median) == (whole.rows, whole.minimum, whole.median)
    assert some.reach < whole.reach


def test_a_head_that_was_trained_so_points_where_the_svm_does() -> None:
    """K and Q of one layer, by normalised gradients: the nuclear norm's direction, and saturation."""
    g = torch.Generator().manual_seed(1)
    X = normalize(torch.randn(6, 8, 10, generator=g, dtype=F64), dim=-1)
    v, Y = torch.randn(10, generator=g, dtype=F64), torch.tensor([1, -1, 1, -1, 1, 1], dtype=F64)

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(10, 10, bias=False, dtype=F64) for _ in "qkv")
            nn.init.zeros_(self.q_proj.weight)
            self.k_proj.weight.data = 0.1 * torch.randn(10, 10, generator=g, dtype=F64)

        def forward(self, x: Tensor) -> Tensor:
            q, k, value = (p(x)[:, None] for p in (self.q_proj, self.k_proj, self.v_proj))
            return F.scaled_dot_product_attention(q[:, :, :1], k, value, scale=1.0)[:, 0, 0]

    net = One()
    factors = [net.q_proj.weight, net.k_proj.weight]
    opt = optx.wrap(torch.optim.SGD(factors, lr=0.1), optx.NormalizedGrad(floor=1e-250))
    for _ in range(300):
        opt.zero_grad()
        W = net.k_proj.weight.T @ net.q_proj.weight
        logits, heads = X @ W @ X[:, 0, :, None], X @ v
        own = heads.gather(1, logits[..., 0].argmax(1, keepdim=True))
        F.softplus(-Y * (own[:, 0] + (logits[..., 0].softmax(1) * (heads - own)).sum(1))).mean().backward()
        opt.step()

    # the module's queries are of the first token alone, as its attention is
    class Queries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj = net.q_proj, net.k_proj

        def forward(self, x: Tensor) -> Tensor:
            q, k = self.q_proj(x[:, :1])[:, None], self.k_proj(x)[:, None]
            return F.scaled_dot_product_attention(q, k, k, scale=1.0)

    found = attention_margins(Queries(), X, 0, 0)
    assert found.rows == 6
    assert found.saturated == 1.0
    nuclear = attention_svm(found.X, found.z, found.chosen, "nuc")
    assert corr(found.W, nuclear.W) > 0.9
    assert corr(found.W, nuclear.W) > found.corr > 0.5
    assert "100.0% saturated" in str(found)


# ---- no trace ----------------------------------------------------------------------------------------------


def hooks_of(model: nn.Module) -> int:
    kinds = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_forward_hooks_always_called",
        "_forward_hooks_with_kwargs",
    )
    return sum(len(getattr(m, kind)) for m in model.modules() for kind in kinds)


@pytest.mark.parametrize("fail", [False, True])
def test_the_model_is_as_it_was(fail: bool) -> None:
    net = Grouped()
    net.v_proj.eval()
    net.fail = fail
    hooks, state, keys = hooks_of(net), torch.get_rng_state(), list(net.state_dict())
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
    if fail:
        with pytest.raises(RuntimeError, match="on purpose"):
            attention_margins(net, x, 0, 0)
    else:
        attention_margins(net, x, 0, 0)
    assert hooks_of(net) == hooks
    assert (net.training, net.q_proj.training, net.v_proj.training) == (True, True, False)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(net.state_dict()) == keys
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    net.fail = False
    assert net(x).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_of_fewer_digits(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net = Grouped().to(dtype)
    x = torch.randn(2, 5, 6).to(dtype)
    found, wide = (
        attention_margins(n, y, 0, 2) for n, y in ((net, x), (copy.deepcopy(net).double(), x.double()))
    )
    assert torch.allclose(found.W, wide.W)  # of the weights as they are, in float64
    assert found.minimum == pytest.approx(wide.minimum)
    assert found.W.dtype == F64


# ---- what is refused ---------------------------------------------------------------------------------------


def test_rotary_positions_are_refused_with_the_reason() -> None:
    with pytest.raises(optx.TargetError, match=r"queries of 'model.layers.0.self_attn'.*rotary positions"):
        attention_margins(built("llama"), TOKENS, 0, 0)


def test_biases_by_position_are_refused() -> None:
    batch = {"input_ids": TOKENS, "decoder_input_ids": TOKENS}
    with pytest.raises(optx.TargetError, match="adds numbers to its scores"):
        attention_margins(built("t5"), batch, 0, 0)


def test_attention_that_cannot_be_seen_is_refused() -> None:
    with pytest.raises(optx.TargetError, match=r"attn_implementation='eager'\. Load the model with"):
        attention_margins(built("gpt2", "eager"), TOKENS, 0, 0)


def test_an_adapter_is_refused_until_it_is_merged() -> None:
    model = built("bert")
    handle = optx.attach(model, optx.LoRA(rank=2), targets=r".*\.query")
    for p in handle.parameters():
        nn.init.normal_(p)
    with pytest.raises(optx.TargetError, match=r"queries of .* an adapter or a hook adds to it. Merge it"):
        attention_margins(model, TOKENS, 0, 0)
    handle.merge()
    assert attention_margins(model, TOKENS, 0, 0).rows == 12


NET, X5 = Grouped(), torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "layer": ({"layer": 1}, "layer is 1; it must be the path of an attention module or a whole number"),
    "path": ({"layer": "attn"}, "layer is 'attn', which is no attention module"),
    "head": ({"head": 4}, "head is 4; '' has 4 heads, so it must be a whole number between 0 and 3"),
    "sample": ({"sample": 0}, "sample is 0; it must be at least 1"),
    "one token": ({"batch": X5[:, :1]}, "no query of '' sees two tokens"),
    "no attention": ({"model": nn.Linear(6, 6)}, "Linear has no attention module that optx knows"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case: str) -> None:
    changed, words = MISTAKES[case]
    with pytest.raises(optx.OptxError, match=f"attention_margins: {words}"):
        attention_margins(**{"model": NET, "batch": X5, "layer": 0, "head": 0, **changed})
