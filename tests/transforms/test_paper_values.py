"""Numbers that the specifications of perpGrad and AdamR give, on both paths."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import optx

both_paths = pytest.mark.parametrize("fused", [True, False], ids=["fused", "foreach"])


def d(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def p64(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


def effective_gradient(w: Tensor, g: Tensor, fused: bool, **options: Any) -> Tensor:
    """What SGD at rate 1 moves by."""
    p = nn.Parameter(w.clone())
    p.grad = g.clone()
    opt = optx.wrap(torch.optim.SGD([p], lr=1.0), optx.PerpGrad(**options), fused=fused)
    opt.step()
    return w - p.detach()


@both_paths
def test_perpgrad_by_hand(fused: bool) -> None:
    w, g = d(1.0, 2.0), d(3.0, 1.0)
    plain = effective_gradient(w, g, fused, rescale=False)
    torch.testing.assert_close(plain, d(2.0, -1.0))
    rescaled = effective_gradient(w, g, fused)
    torch.testing.assert_close(rescaled, d(2.82842712474619, -1.4142135623730951))
    assert rescaled.norm().item() == pytest.approx(math.sqrt(10.0))


@both_paths
@pytest.mark.parametrize("shape", [(2,), (33, 17), (300, 300)], ids=str)
def test_perpgrad_is_orthogonal_and_keeps_the_norm(fused: bool, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(len(shape))
    w, g = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    # The momentum buffer holds the effective gradient itself: no rounding of the weight hides it.
    p = nn.Parameter(w.clone())
    p.grad = g.clone()
    opt = optx.wrap(torch.optim.SGD([p], lr=1.0, momentum=0.5), optx.PerpGrad(), fused=fused)
    opt.step()
    effective = opt.state[p]["momentum_buffer"].double()
    cosine = (w.double() * effective).sum() / (w.double().norm() * effective.norm())
    assert abs(cosine) <= 1e-6
    assert effective.norm().item() == pytest.approx(g.double().norm().item(), rel=1e-5)
    assert torch.equal(p.grad, g)  # the person's own gradient is untouched


@both_paths
def test_perpgrad_changes_nothing_on_a_scale_invariant_layer(fused: bool) -> None:
    torch.manual_seed(0)
    layer, norm = nn.Linear(6, 5, bias=False), nn.LayerNorm(5, elementwise_affine=False, eps=0.0)
    norm(layer(torch.randn(32, 6))).sin().square().sum().backward()
    g = layer.weight.grad
    assert g is not None
    # A row's scale does not matter to LayerNorm together with the others': the whole matrix's does not.
    effective = effective_gradient(layer.weight.detach(), g, fused)
    assert (effective - g).norm() / g.norm() < 1e-5


@both_paths
def test_perpgrad_edge_cases(fused: bool) -> None:
    zero, g = torch.zeros(3), torch.tensor([1.0, -2.0, 3.0])
    assert torch.equal(effective_gradient(zero, g, fused), g)  # nothing to be orthogonal to
    assert torch.equal(effective_gradient(g, zero, fused), zero)
    assert torch.equal(
        effective_gradient(torch.tensor([2.0]), torch.tensor([3.0]), fused), torch.tensor([3.0])
    )
    parallel = effective_gradient(g, 2.0 * g, fused)
    assert parallel.norm() <= 1e-6 * g.norm()
    ones = torch.ones(3)
    reference = effective_gradient(ones, g, fused)
    for factor in (10.0, -10.0):
        scaled = effective_gradient(ones, factor * g, fused)
        torch.testing.assert_close(scaled, factor * reference)


def adamr(params: list[nn.Parameter], fused: bool, weight: float = 0.05, lr: float = 0.1, **more: Any) -> Any:
    base = torch.optim.AdamW(params, lr=lr, weight_decay=0.0)
    return optx.wrap(base, optx.AdamR(weight=weight, **more), fused=fused)


@both_paths
def test_adamr_by_hand(fused: bool) -> None:
    a, b = p64(0.9, 2.2), p64(0.5)
    opt = adamr([a, b], fused)
    with torch.no_grad():
        a.copy_(d(1.0, 2.0))
    a.grad, b.grad = d(0.3, -0.4), d(1.2)
    opt.step()
    r = math.sqrt(float(opt.totals["adamr.second"]) / float(opt.totals["numel"]))
    assert r == pytest.approx(0.75055535)
    torch.testing.assert_close(a.detach(), d(0.89933383, 2.10133234), rtol=0, atol=1e-8)
    torch.testing.assert_close(b.detach(), d(0.4), rtol=0, atol=1e-8)


@both_paths
def test_adamr_without_gradient_converges_to_the_anchor(fused: bool) -> None:
    w = p64(1.0, -2.0)
    opt = adamr([w], fused, weight=0.5)
    with torch.no_grad():
        w.add_(1.0)
    for step in range(1, 6):
        w.grad = torch.zeros_like(w)
        opt.step()
        expected = d(1.0, -2.0) + (1 - 0.1 * 0.5) ** step
        torch.testing.assert_close(w.detach(), expected)


@both_paths
def test_adamr_to_zero_is_weight_decay(fused: bool) -> None:
    a, b = p64(1.0, -2.0, 3.0), p64(1.0, -2.0, 3.0)
    opt = adamr([a], fused, weight=0.2, anchor="zero", normalize=False)
    reference = torch.optim.AdamW([b], lr=0.1, weight_decay=0.2)
    for step in range(4):
        a.grad = d(0.1, 0.2, -0.3) * (step + 1)
        b.grad = a.grad.clone()
        opt.step()
        reference.step()
    torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-12, atol=0)


@both_paths
def test_adamr_weight_zero_is_adam(fused: bool) -> None:
    a, b = p64(1.0, -2.0, 3.0), p64(1.0, -2.0, 3.0)
    opt, reference = adamr([a], fused, weight=0.0), torch.optim.AdamW([b], lr=0.1, weight_decay=0.0)
    for _ in range(3):
        a.grad, b.grad = torch.ones(3).double(), torch.ones(3).double()
        opt.step()
        reference.step()
    torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-12, atol=0)
    if not fused:
        assert torch.equal(a, b)


@both_paths
@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_adamr_pull_weakens_with_the_gradient_scale(fused: bool, norm: str) -> None:
    def decay(c: float) -> Tensor:
        """The part of a first step that is not Adam's."""
        steps: list[Tensor] = []
        for weight in (0.05, 0.0):
            w = p64(0.0, 0.0)
            opt = adamr([w], fused, weight=weight, norm=norm)
            opt.param_groups[0]["eps"] = 0.0
            with torch.no_grad():
                w.add_(d(1.0, -3.0))
            w.grad = c * d(0.3, -0.4)
            opt.step()
            steps.append(w.detach())
        return steps[0] - steps[1]

    torch.testing.assert_close(decay(1.0), 10.0 * decay(10.0), rtol=1e-9, atol=0)
    near, far = decay(1.0).abs().tolist()
    assert far / near == pytest.approx(3.0 if norm == "l2" else 1.0)


@both_paths
def test_adamr_scale_is_shared_by_groups_and_resumes_with_its_anchor(fused: bool) -> None:
    def make(split: bool) -> tuple[list[nn.Parameter], Any]:
        ps = [p64(1.0, 2.0), p64(-1.0)]
        groups = [{"params": [p]} for p in ps] if split else [{"params": ps}]
        base = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.0)
        return ps, optx.wrap(base, optx.AdamR(weight=0.3), fused=fused)

    def train(ps: list[nn.Parameter], opt: Any, steps: range) -> list[Tensor]:
        for step in steps:
            for i, p in enumerate(ps):
                p.grad = torch.full_like(p, 0.3 * (step + 1) * (i + 1))
            opt.step()
        return [p.detach().clone() for p in ps]

    one, two = make(split=False), make(split=True)
    for a, b in zip(train(*one, range(3)), train(*two, range(3)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    saved = copy.deepcopy(one[1].state_dict())
    ps, opt = make(split=False)
    with torch.no_grad():
        for p, trained in zip(ps, one[0], strict=True):
            p.copy_(trained)
    resumed = optx.wrap(opt.remove(), optx.AdamR(weight=0.3), fused=fused)  # anchors: the trained weights
    resumed.load_state_dict(saved)
    assert torch.equal(resumed.slot(ps[0], resumed.adamr, "anchor"), d(1.0, 2.0))
    assert all(map(torch.equal, train(ps, resumed, range(3, 6)), train(*one, range(3, 6))))


def test_adamr_anchors_stay_in_the_file(tmp_path: Any) -> None:
    from safetensors.torch import save_file

    model = nn.Linear(64, 64)
    save_file({k: v + 1.0 for k, v in model.state_dict().items()}, tmp_path / "base.safetensors")
    base = torch.optim.AdamW(model.named_parameters(), lr=0.1, weight_decay=0.0)
    opt = optx.wrap(base, optx.AdamR(anchor=tmp_path / "base.safetensors", save_anchor=False))
    anchor = opt.slot(model.weight, opt.adamr, "anchor")
    torch.testing.assert_close(anchor, model.weight.detach() + 1.0)
    with open("/proc/self/maps") as maps:
        mapped = [line.split() for line in maps if "base.safetensors" in line]
    spans = [tuple(int(x, 16) for x in fields[0].split("-")) for fields in mapped]
    assert any(low <= anchor.data_ptr() < high for low, high in spans)
    assert not [
        k for entry in opt.state_dict().get("optx_pending", {}).values() for k in entry if "anchor" in k
    ]


def test_adamr_warns_once_when_it_overshoots() -> None:
    w = p64(1.0)
    opt = adamr([w], True, weight=100.0)
    w.grad = d(1e-3)
    with pytest.warns(UserWarning, match="overshoots the anchor"):
        opt.step()
    opt.step()  # a second warning would be an error
