import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import optx
from optx._errors import OptxError, ShapeError
from optx.analysis import grad_norms, nlm_alignment, softmax_collapse

# ---- softmax_collapse -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "gap"),
    [(torch.float64, 36.7), (torch.float32, 16.6), (torch.float16, 7.6), (torch.bfloat16, 5.5)],
)
def test_collapse_starts_at_half_an_ulp_of_the_working_dtype(dtype, gap):
    # 0.2 each side: more than the rounding of the gap itself in any of the dtypes
    def collapsed(g):
        return softmax_collapse(torch.tensor([[g, 0.0]], dtype=torch.float64).to(dtype), torch.tensor([0]))

    assert collapsed(gap - 0.2) == 0.0
    assert collapsed(gap + 0.2) == 1.0


def test_collapse_is_where_the_gradient_of_cross_entropy_is_zero():
    torch.manual_seed(0)
    logits = (torch.randn(200, 5) * 15).requires_grad_()
    target = logits.argmax(1)
    nn.functional.cross_entropy(logits, target, reduction="sum").backward()
    own = logits.grad.gather(1, target[:, None]).squeeze(1)
    assert 0.1 < softmax_collapse(logits, target) < 0.9
    assert softmax_collapse(logits, target) == pytest.approx((own == 0).float().mean().item())


def test_a_confident_mistake_has_not_collapsed():
    assert softmax_collapse(torch.tensor([[50.0, 0.0]]), torch.tensor([1])) == 0.0


def test_collapse_takes_the_shapes_of_cross_entropy():
    one = torch.tensor([20.0, 0.0, 0.0])
    assert softmax_collapse(one, torch.tensor(0)) == 1.0
    image = one[None, :, None, None].expand(2, 3, 4, 5)
    target = torch.zeros(2, 4, 5, dtype=torch.uint8)
    assert softmax_collapse(image, target) == 1.0
    target[0] = 1
    assert softmax_collapse(image, target) == 0.5


def test_ignored_samples_do_not_count():
    logits = torch.tensor([[20.0, 0.0], [0.0, 0.0], [20.0, 0.0]])
    assert softmax_collapse(logits, torch.tensor([0, -100, 0])) == 1.0
    assert softmax_collapse(logits, torch.tensor([1, 0, 1]), ignore_index=1) == 0.0
    assert math.isnan(softmax_collapse(logits, torch.full((3,), -100)))
    assert math.isnan(softmax_collapse(logits[:0], torch.zeros(0, dtype=torch.long)))


def test_collapse_is_judged_in_the_logits_dtype_inside_autocast_too():
    logits = torch.tensor([[10.0, 0.0]], dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert softmax_collapse(logits, torch.tensor([0])) == 1.0
    assert softmax_collapse(logits.float(), torch.tensor([0])) == 0.0


@pytest.mark.parametrize(
    ("logits", "target", "error", "words"),
    [
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.long), ShapeError, r"\(3,\).*must be \(2,\)"),
        (torch.zeros(2, 3), torch.zeros(2), OptxError, "torch.float32.*integer"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), IndexError, r"from 0 to 3.*0\.\.2.*ignore_index=-100"),
        (torch.zeros(2, 0), torch.zeros(2, dtype=torch.long), OptxError, "at least one class"),
        (torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, dtype=torch.long), OptxError, "floating"),
    ],
)
def test_collapse_says_what_is_wrong(logits, target, error, words):
    with pytest.raises(error, match=words):
        softmax_collapse(logits, target)


# ---- nlm_alignment --------------------------------------------------------------------------------------


def layer(weight, grad, dtype=torch.float32):
    module = nn.Linear(len(weight), 1, bias=False)
    module.weight.data = torch.tensor([weight], dtype=dtype)
    module.weight.grad = torch.tensor([grad], dtype=dtype)
    return module


@pytest.mark.parametrize(
    ("weight", "grad", "wanted"),
    [
        ([3.0, 4.0], [-3.0, -4.0], 1.0),
        ([3.0, 4.0], [6.0, 8.0], -1.0),
        ([3.0, 4.0], [-4.0, 3.0], 0.0),
        ([0.0, 0.0], [1.0, 1.0], 0.0),
        ([1.0, 1.0], [0.0, 0.0], 0.0),
        ([1.0, 2.0], [3.0, 1.0], -5 / math.sqrt(50)),
    ],
)
def test_alignment_by_hand(weight, grad, wanted):
    assert nlm_alignment(layer(weight, grad)) == {"weight": pytest.approx(wanted, abs=1e-6)}


@given(
    st.floats(-30, 30).map(lambda e: 10.0**e), st.floats(-30, 30).map(lambda e: 10.0**e), st.integers(0, 1000)
)
def test_alignment_does_not_see_scale(a, b, seed):
    # 1e-30 squared is 0 in float32: collapsed gradients are that small.
    w, g = torch.randn(2, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    wanted = -torch.nn.functional.cosine_similarity(w, g, dim=0).item()
    found = nlm_alignment(layer((w * a).tolist(), (g * b).tolist()))["weight"]
    assert found == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_alignment_in_other_dtypes(dtype):
    assert nlm_alignment(layer([1.0, 2.0], [3.0, 1.0], dtype))["weight"] == pytest.approx(-0.70711, abs=1e-5)


def test_alignment_names_only_what_has_a_gradient_and_changes_nothing():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    model(torch.randn(5, 4)).square().sum().backward()
    before = [(p.clone(), None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    found = nlm_alignment(model)
    assert set(found) == {"1.weight", "1.bias"}
    assert all(-1.0 <= v <= 1.0 for v in found.values())
    for p, (w, g) in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, w)
        assert (p.grad is None) if g is None else torch.equal(p.grad, g)


def test_alignment_of_tied_sparse_empty_and_broken_parameters():
    model = nn.Module()
    model.table = nn.Embedding(5, 2, sparse=True)
    model.again = model.table
    model.empty = nn.Parameter(torch.zeros(0, 3))
    model.empty.grad = torch.zeros(0, 3)
    model.broken = nn.Parameter(torch.ones(2))
    model.broken.grad = torch.tensor([float("inf"), 1.0])
    (-model.table(torch.tensor([1]))).sum().backward()
    found = nlm_alignment(model)
    dense = model.table.weight.detach()
    assert set(found) == {"empty", "broken", "table.weight"}
    assert found["table.weight"] == pytest.approx(
        (dense[1].sum() / (dense.norm() * math.sqrt(2))).item(), abs=1e-6
    )
    assert found["empty"] == 0.0
    assert math.isnan(found["broken"])


def test_alignment_of_scaling_up_the_logits():
    # Weights that classify perfectly: the gradient of cross-entropy mostly scales them up.
    torch.manual_seed(0)
    model = nn.Linear(2, 2, bias=False)
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    model.weight.data = torch.tensor([[3.0, -3.0], [-3.0, 3.0]])
    nn.functional.cross_entropy(model(x), torch.tensor([0, 1])).backward()
    assert nlm_alignment(model)["weight"] > 0.999


def test_alignment_needs_gradients():
    with pytest.raises(OptxError, match=r"no parameter .* gradient; call it after loss.backward\(\)"):
        nlm_alignment(nn.Linear(2, 2))


# ---- grad_norms -----------------------------------------------------------------------------------------


class TwoTargets(optx.Composite):
    """LoRA and BitFit on the same modules, in an order that is not the model's."""

    name = "two"

    def members(self):
        return {"late": optx.LoRA(rank=2), "early": optx.BitFit()}


def deep(depth=3, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(4, 4, dtype=dtype) for _ in range(depth)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_grad_norms_are_those_of_torch_in_depth_order(dtype):
    model = deep(dtype=dtype)
    handle = optx.attach(model, TwoTargets(), {"late": "2|1", "early": "0|1"})
    with torch.no_grad():
        for p in handle.parameters():
            p.add_(torch.randn_like(p))
    model(torch.randn(5, 4, dtype=dtype)).square().sum().backward()
    found = grad_norms(handle)
    assert list(found) == ["0", "1", "2"]
    for path, norm in found.items():
        added = [p for name, p in model.named_parameters() if name.startswith(f"{path}.optx.")]
        assert norm == pytest.approx(nn.utils.get_total_norm([p.grad for p in added]).item(), rel=1e-6)
        assert isinstance(norm, float)


@given(st.integers(-30, 30), st.integers(0, 1000))
def test_grad_norms_do_not_underflow(exponent, seed):
    # 1e-30 squared is 0 in float32.
    model = deep(1)
    handle = optx.attach(model, optx.LoRA(rank=2), "0")
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in handle.parameters()]
    for p, g in zip(handle.parameters(), drawn, strict=True):
        p.grad = (g * 10.0**exponent).float()
    wanted = math.hypot(*(float(g.norm()) for g in drawn)) * 10.0**exponent
    assert grad_norms(handle)["0"] == pytest.approx(wanted, rel=1e-5)


def test_grad_norms_of_zero_missing_and_broken_gradients():
    model = deep(4)
    handle = optx.attach(model, optx.BitFit())
    for number, grad in enumerate([0.0, None, math.inf, 2.0]):
        delta = handle.parameters()[number]
        delta.grad = None if grad is None else torch.full_like(delta, grad)
    found = grad_norms(handle)
    assert list(found) == ["0", "2", "3"]
    assert found["0"] == 0.0
    assert math.isnan(found["2"])
    assert found["3"] == 4.0


def test_grad_norms_change_nothing_and_leave_out_the_base_and_what_is_trained_whole():
    model = deep()
    handle = optx.attach(model, optx.BitFit(), "0", modules_to_save=["2"])
    model(torch.randn(5, 4)).square().sum().backward()
    before = [(p.clone(), p.grad.clone()) for p in model.parameters()]
    assert list(grad_norms(handle)) == ["0"]
    for p, (value, grad) in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, value)
        assert torch.equal(p.grad, grad)


def test_grad_norms_need_gradients():
    model = deep()
    handle = optx.attach(model, optx.BitFit())
    with pytest.raises(OptxError, match=r"nothing .* has a gradient; call it after loss.backward\(\)"):
        grad_norms(handle)
    model(torch.ones(1, 4)).sum().backward()
    grad_norms(handle)
    handle.remove()
    with pytest.raises(OptxError, match="removed"):
        grad_norms(handle)
