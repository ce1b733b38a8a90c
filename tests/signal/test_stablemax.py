"""StableMax: numbers of the paper, the independent form, edges, and what is refused."""

import gc

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peak import Peak
from reference.stablemax import composed

from optx._errors import OptxError, ShapeError
from optx.kernels.loss import stablemax_rows as rows
from optx.signal import stablemax
from optx.signal.stablemax import StableMaxCrossEntropy, stablemax_cross_entropy

# Relative to the largest value: rounding of the result, and of float32 mathematics.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture(params=["compiled", "torch"])
def path(request, monkeypatch):
    """Both ways to compute: the CPU kernel, and torch operations, in chunks of a few rows."""
    if request.param == "torch":
        monkeypatch.setattr(stablemax, "_path", lambda _: stablemax._TORCH)
    return request.param


def compare(logits, target, weight=None, **options):
    """Values and gradients against the independent form in float64."""
    exact = logits.detach().double().requires_grad_()
    ours = logits.detach().clone().requires_grad_()
    soft = target.is_floating_point()
    wanted = composed(exact, target.double() if soft else target, weight, **options)
    found = stablemax_cross_entropy(ours, target, weight, **options)
    assert (found.shape, found.dtype) == (wanted.shape, logits.dtype)
    grad = torch.linspace(0.5, 1.5, max(1, wanted.numel()), dtype=torch.float64)[: wanted.numel()]
    wanted.backward(grad.view_as(wanted))
    found.backward(grad.view_as(found).to(found.dtype))
    assert ours.grad.dtype == logits.dtype
    for a, b in ((found, wanted), (ours.grad, exact.grad)):
        scale = b.abs().max().clamp(min=0.01) if b.numel() else 1.0
        assert torch.allclose(
            a.double() / scale, b / scale, rtol=0, atol=TOLERANCE[logits.dtype], equal_nan=True
        )


# ---- numbers from the specification ---------------------------------------------------------------------


def test_example_by_hand(path):
    logits = torch.tensor([[2.0, -1.0, 0.0]], requires_grad=True)
    s, _ = rows.terms(logits, 1.0, torch.where)
    assert s.tolist() == [[3.0, 0.5, 1.0]]
    loss = stablemax_cross_entropy(logits, torch.tensor([0]))
    loss.backward()
    assert loss.item() == pytest.approx(0.40546511, abs=1e-7)
    assert torch.allclose(logits.grad, torch.tensor([[-1 / 9, 1 / 18, 2 / 9]]), atol=1e-7)


def test_zero_logits_agree_with_softmax(path):
    zeros = [torch.zeros(3, 11, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    target = torch.tensor([0, 5, 10])
    losses = [f(z, target) for f, z in zip((stablemax_cross_entropy, F.cross_entropy), zeros, strict=True)]
    for loss in losses:
        assert loss.item() == pytest.approx(torch.tensor(11.0).double().log().item(), abs=1e-14)
        loss.backward()
    assert torch.allclose(zeros[0].grad, zeros[1].grad, atol=1e-16)


def test_gradient_survives_where_softmax_has_collapsed(path):
    logits = torch.tensor([[100.0, 0.0, 0.0]], requires_grad=True)
    cross_entropy = F.cross_entropy(logits, torch.tensor([0]))
    assert cross_entropy.item() == 0.0
    assert torch.autograd.grad(cross_entropy, logits)[0][0, 0] == 0.0
    loss = stablemax_cross_entropy(logits, torch.tensor([0]))
    assert loss.item() == pytest.approx(0.01960847, rel=1e-6)
    assert (torch.autograd.grad(loss, logits)[0] != 0).all()


@pytest.mark.parametrize("exponent", [3, 6, 9, 12])
def test_no_collapse_however_large_the_logit(path, exponent):
    # 1 + 1e9 terms of the sum lose the others' 2 in float32: loss and gradient must not be taken from it.
    logits = torch.tensor([[10.0**exponent, 0.0, 0.0]])
    found = logits.clone().requires_grad_()
    loss = stablemax_cross_entropy(found, torch.tensor([0]))
    loss.backward()
    s = 1 + logits[0, 0].double().item()
    assert loss.item() == pytest.approx(torch.tensor(2 / s).double().log1p().item(), rel=1e-6)
    assert found.grad[0, 0].item() == pytest.approx(-2 / (s + 2) / s, rel=1e-6)


# ---- against the independent form -----------------------------------------------------------------------

SHAPES = [(7,), (5, 1), (3, 113), (64, 1500), (2, 5, 3), (2, 5, 3, 2), (0, 4)]


@pytest.mark.long(keep=2)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_composed_form(path, shape, dtype):
    torch.manual_seed(0)
    class_dim = 0 if len(shape) == 1 else 1
    logits = (torch.randn(shape, dtype=torch.float64) * 5).to(dtype)
    labels = torch.randint(shape[class_dim], shape[:class_dim] + shape[class_dim + 1 :])
    if labels.numel() > 2:
        labels.view(-1)[::3] = -100
    weight = torch.rand(shape[class_dim], dtype=torch.float64)
    probs = torch.rand(shape, dtype=torch.float64).softmax(class_dim)
    for target in (labels, probs):
        compare(logits, target)
        compare(logits, target, weight, label_smoothing=0.1, reduction="none")
        compare(logits, target, label_smoothing=0.3, reduction="sum")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_equals_composed_form_for_any_options(data):
    dtype = data.draw(st.sampled_from(list(TOLERANCE)))
    n, classes = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 70))
    tail = data.draw(st.lists(st.integers(1, 3), max_size=2))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    scale = 10.0 ** data.draw(st.integers(-3, 3))
    logits = (torch.randn(n, classes, *tail, generator=generator, dtype=torch.float64) * scale).to(dtype)
    soft = data.draw(st.booleans())
    ignore = -100 if soft else data.draw(st.sampled_from([-100, 0, -1]))
    if soft:
        target = torch.rand(logits.shape, generator=generator, dtype=torch.float64).softmax(1)
    else:
        target = torch.randint(classes, (n, *tail), generator=generator)
        target[torch.rand(target.shape, generator=generator) < 0.2] = ignore
    weight = torch.rand(classes, generator=generator, dtype=torch.float64)
    compare(
        logits,
        target,
        weight if data.draw(st.booleans()) else None,
        ignore_index=ignore,
        label_smoothing=data.draw(st.sampled_from([0.0, 0.1, 1.0])),
        reduction=data.draw(st.sampled_from(["mean", "sum", "none"])),
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("magnitude", [1e-6, 1e5])
def test_many_classes_of_extreme_size(path, magnitude, smoothing):
    # At 1e5 a product of 64 terms leaves float64's range: their logarithms have to be taken one by one.
    torch.manual_seed(0)
    logits = torch.randn(40, 1000) * magnitude
    compare(logits, torch.randint(1000, (40,)), label_smoothing=smoothing)


def test_derivatives_at_zero_are_those_of_one_branch():
    # Logits of a zero-initialised head; the two branches of s meet there with slope 1.
    zeros = torch.zeros(2, 5, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 4])
    first = torch.autograd.grad(stablemax_cross_entropy(zeros, target), zeros)[0]
    (again,) = torch.autograd.grad(stablemax_cross_entropy(zeros, target), zeros, create_graph=True)
    assert torch.allclose(first, again, atol=1e-16)
    assert first[0, 0].item() == pytest.approx(-0.4)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_gradcheck_to_second_order(smoothing):
    torch.manual_seed(0)
    logits = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 3, -100, 6])
    weight = torch.rand(7, dtype=torch.float64)

    def loss(z):
        return stablemax_cross_entropy(z, target, weight, label_smoothing=smoothing)

    assert torch.autograd.gradcheck(loss, logits)
    assert torch.autograd.gradgradcheck(loss, logits)


def test_gradients_of_probabilities_and_weights():
    torch.manual_seed(0)
    inputs = [torch.rand(s, dtype=torch.float64, requires_grad=True) for s in ((4, 7), (4, 7), (7,))]
    assert torch.autograd.gradcheck(
        lambda z, p, w: stablemax_cross_entropy(z, p, w, label_smoothing=0.1), inputs
    )


# ---- edges ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_to_count_is_as_in_torch(path, reduction):
    some, none = torch.randn(3, 4), torch.randn(0, 4)
    compare(some, torch.full((3,), -100), reduction=reduction)
    compare(none, torch.zeros(0, dtype=torch.long), reduction=reduction)
    compare(none, torch.zeros(0, 4), reduction=reduction)


def test_ignored_rows_may_hold_anything(path):
    logits = torch.randn(3, 5)
    logits[1] = float("nan")
    logits.requires_grad_()
    for smoothing in (0.0, 0.1):
        loss = stablemax_cross_entropy(logits, torch.tensor([1, -100, 2]), label_smoothing=smoothing)
        (grad,) = torch.autograd.grad(loss, logits)
        assert loss.isfinite()
        assert (grad[1] == 0).all()
        assert (grad[[0, 2]] != 0).all()


def test_masked_classes(path):
    # A logit of -inf takes a class out, as with softmax; where its weight is 0, from soft targets too.
    logits = torch.tensor([[1.0, 2.0, float("-inf")]], requires_grad=True)
    target = torch.tensor([[0.25, 0.75, 0.0]])
    for t, few in ((torch.tensor([0]), torch.tensor([0])), (target, target[:, :2])):
        loss = stablemax_cross_entropy(logits, t)
        (grad,) = torch.autograd.grad(loss, logits)
        assert loss.item() == pytest.approx(stablemax_cross_entropy(logits[:, :2], few).item(), rel=1e-6)
        assert grad[0, 2] == 0.0
        assert grad.isfinite().all()


def test_nan_shows(path):
    logits = torch.randn(2, 20)
    logits[1, 7] = float("nan")
    loss = stablemax_cross_entropy(logits, torch.tensor([0, 1]), reduction="none")
    assert loss.isfinite().tolist() == [True, False]


def test_layouts(path):
    torch.manual_seed(0)
    target = torch.randint(50, (6,))
    wide = torch.randn(6, 80)
    for logits in (
        wide[:, 10:60],
        torch.randn(50, 6).t(),
        wide[:1, :50].expand(6, 50),
        wide[:, :50][::2].repeat(2, 1),
    ):
        compare(logits, target)
    image = torch.randn(2, 5, 4, 4).to(memory_format=torch.channels_last)
    compare(image, torch.randint(5, (2, 4, 4)))
    compare(torch.randn(6, 50), torch.randint(50, (12,))[::2].to(torch.uint8))


# ---- bad input ------------------------------------------------------------------------------------------

LABELS = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("logits", "target", "options", "error", "words"),
    [
        (torch.zeros(()), LABELS, {}, ShapeError, r"logits is a scalar.*\(N, C\)"),
        (torch.zeros(2, 0), LABELS, {}, ShapeError, r"\(2, 0\) have no class"),
        (torch.zeros(2, 3), LABELS[:1], {}, ShapeError, r"class numbers.*\(1,\).*\(2, 3\).*must be \(2,\)"),
        (torch.zeros(2, 3), torch.zeros(2), {}, ShapeError, r"class probabilities.*must be \(2, 3\)"),
        (torch.zeros(2, 3).long(), LABELS, {}, TypeError, "logits have dtype torch.int64"),
        (torch.zeros(2, 3), LABELS.bool(), {}, TypeError, "target has dtype torch.bool"),
        (torch.zeros(2, 3), LABELS + 2, {}, IndexError, r"target 3 \(sample 1 of 2\).*3 classes.*0\.\.2"),
        (torch.zeros(2, 3), LABELS - 1, {}, IndexError, r"target -1 \(sample 0 of 2\).*ignore_index=-100"),
        (
            torch.zeros(2, 3),
            LABELS,
            {"weight": torch.ones(2)},
            ShapeError,
            r"weight has shape \(2,\).*\(3,\)",
        ),
        (torch.zeros(2, 3), LABELS, {"weight": torch.ones(3).long()}, ShapeError, "torch.int64.*floating"),
        (torch.zeros(2, 3), LABELS.to("meta"), {}, OptxError, "target is on meta and logits are on cpu"),
        (torch.zeros(2, 3), LABELS, {"reduction": "avg"}, OptxError, "reduction is 'avg'"),
        (
            torch.zeros(2, 3),
            LABELS,
            {"label_smoothing": 1.5},
            OptxError,
            "label_smoothing is 1.5.*between 0.0 and 1.0",
        ),
        (
            torch.zeros(2, 3),
            torch.zeros(2, 3),
            {"ignore_index": 0},
            OptxError,
            "ignore_index is 0.*probabilities",
        ),
    ],
)
def test_says_what_is_wrong(logits, target, options, error, words):
    with pytest.raises(error, match=words):
        stablemax_cross_entropy(logits, target, **options)


def test_module_says_what_is_wrong_at_once():
    with pytest.raises(OptxError, match=r"label_smoothing is -0\.1"):
        StableMaxCrossEntropy(label_smoothing=-0.1)


# ---- memory ---------------------------------------------------------------------------------------------


def memory(function, logits, target):
    """Bytes kept for backward besides the logits, and the peak of forward and backward, in logits."""
    kept = {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    gc.collect()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), Peak() as peak:
        loss = function(logits, target)
        kept.pop(logits.untyped_storage().data_ptr(), None)
        torch.autograd.grad(loss, logits)
    size = logits.untyped_storage().nbytes()
    return sum(kept.values()) / size, peak.most / size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeps_no_copy_of_the_logits(path, dtype):
    logits = torch.randn(400, 5000, dtype=dtype, requires_grad=True)
    target = torch.randint(5000, (400,))
    kept, peak = memory(stablemax_cross_entropy, logits, target)
    kept_torch, peak_torch = memory(F.cross_entropy, logits, target)
    assert kept_torch >= 1.0  # the log-softmax
    assert kept < 0.01
    if path == "compiled":
        assert peak < 1.01  # the gradient, and nothing else
    assert peak <= peak_torch
