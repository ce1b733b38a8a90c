"""First weights from a generalised Gaussian: their moments, whose they are, and what is refused."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import optx
from optx._generalised_gaussian import fit_shape, pooled_sums


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", [0.5, 1.0, 1.5, 2.0])
def test_of_every_shape_the_variance_is_xi_over_n(shape: float) -> None:
    w = optx.init.gg_(torch.empty(3000, 100), shape, xi=2.0, generator=seeded())
    assert w.std().item() == pytest.approx(0.14142136, rel=0.01)
    assert w.mean().item() == pytest.approx(0.0, abs=0.001)
    assert fit_shape(*pooled_sums([w])) == pytest.approx(shape, abs=0.02)
    assert (w > 0).double().mean().item() == pytest.approx(0.5, abs=0.01)


def test_the_scale() -> None:
    """E|w| = alpha Gamma(2 / nu) / Gamma(1 / nu), with the alphas that the paper's formula gives."""
    for shape, alpha in ((1.0, 0.1), (0.5, 0.01290994)):
        w = optx.init.gg_(torch.empty(10_000, 100), shape, generator=seeded(1)).double()
        mean = alpha * math.gamma(2 / shape) / math.gamma(1 / shape)
        assert w.abs().mean().item() == pytest.approx(mean, rel=0.005)
    w = optx.init.gg_(torch.empty(10_000, 100), 2.0, generator=seeded(1)).double() / 0.02**0.5
    # Normal: the share within one and two standard deviations.
    assert [(w.abs() < k).double().mean().item() for k in (1, 2)] == pytest.approx(
        [0.6827, 0.9545], abs=0.002
    )


def test_fans() -> None:
    for fan, n in (("in", 50), ("out", 2000)):
        w = optx.init.gg_(torch.empty(2000, 50), fan=fan, generator=seeded())  # type: ignore[arg-type]
        assert w.std().item() == pytest.approx(math.sqrt(2 / n), rel=0.03)
    kernel = nn.Conv2d(64, 32, 3)
    for fan, n in (("in", 64 * 9), ("out", 32 * 9)):
        optx.init.gg_(kernel, modules=nn.Conv2d, fan=fan, generator=seeded())  # type: ignore[arg-type]
        assert kernel.weight.std().item() == pytest.approx(math.sqrt(2 / n), rel=0.03)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.norm = nn.LayerNorm(8)
        self.hidden = nn.Linear(8, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight
        self.gain = nn.Parameter(torch.full((3,), 7.0))


def changed(net: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}


def test_whose_weights_are_drawn() -> None:
    net = Net()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    assert optx.init.gg_(net) is net
    assert changed(net, before) == {"hidden.weight", "embed.weight"}  # the head's, under its first name
    assert net.head.weight is net.embed.weight
    assert net.hidden.weight.requires_grad


def test_as_the_authors_code() -> None:
    """Every matrix by its first dimension; other weights 1, biases 0."""
    net = Net()
    optx.init.gg_(net, 2.0, 2.0, fan="out", modules=None, others="reset", generator=seeded())
    assert net.embed.weight.std().item() == pytest.approx(math.sqrt(2 / 20), rel=0.2)
    assert net.hidden.weight.std().item() == pytest.approx(math.sqrt(2 / 8), rel=0.3)
    assert (net.norm.weight == 1).all()
    assert (net.norm.bias == 0).all()
    assert (net.hidden.bias == 0).all()
    assert (net.gain == 7).all()


def test_a_generator_makes_the_same_weights_again() -> None:
    a, b, c = (optx.init.gg_(nn.Linear(30, 20), generator=seeded(s)).weight for s in (3, 3, 4))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    low = optx.init.gg_(nn.Linear(30, 20).bfloat16(), generator=seeded(3)).weight
    assert torch.equal(low, a.bfloat16())
    turned = optx.init.gg_(torch.empty(30, 20).t(), generator=seeded(3))  # laid out otherwise
    assert torch.equal(turned, a)
    large = optx.init.gg_(torch.empty(1 << 11, 1025), generator=seeded(5))  # of more than one piece
    assert large[-1, -1] != 0
    assert len(large.unique()) > 0.9 * large.numel()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"shape": 0.0}, "shape is 0.0; it must be a finite number above 0"),
        ({"shape": math.nan}, "shape is nan"),
        ({"xi": -1}, "xi is -1"),
        ({"xi": True}, "xi is True"),
        ({"fan": "both"}, "fan is 'both'"),
        ({"others": "zero"}, "others is 'zero'"),
        ({"modules": nn.Conv2d}, "Net has no weight that modules=.*Conv2d.* takes"),
        ({"modules": (nn.Linear, nn.LayerNorm)}, r"'norm.weight' has the shape \(8,\)"),
    ],
)
def test_refusals(given: dict[str, Any], says: str) -> None:
    net = Net()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(optx.OptxError, match=says):
        optx.init.gg_(net, **given)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))


def test_weights_that_can_not_be_drawn() -> None:
    mixed = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, device="meta"))
    before = mixed[0].weight.detach().clone()
    with pytest.raises(optx.TargetError, match=r"'1\.weight' is on the meta device"):
        optx.init.gg_(mixed)
    assert torch.equal(before, mixed[0].weight)
    with pytest.raises(optx.TargetError, match=r"of torch\.int8"):
        optx.init.gg_(torch.empty(3, 3, dtype=torch.int8))
    with pytest.raises(optx.TargetError, match=r"has the shape \(3,\)"):
        optx.init.gg_(torch.empty(3))


def test_weights_that_drawing_would_not_reach_are_refused() -> None:
    """Each was drawn in silence, and the model computed as before."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    handle = optx.attach(model, optx.StableRPS(compression=0.5))
    with pytest.raises(optx.TargetError, match=r"'0.weight' takes no part while 'stable_rps' is attached"):
        optx.init.gg_(model)
    handle.remove()
    nn.utils.parametrizations.weight_norm(model[1])
    for modules in (nn.Linear, None):
        with pytest.raises(optx.TargetError, match=r"'1.weight' is made by .*WeightNorm at each call"):
            optx.init.gg_(model, modules=modules)


def test_shapes_at_the_end() -> None:
    assert bool(optx.init.gg_(torch.empty(50, 50), shape=0.01).isfinite().all())
    with pytest.raises(optx.OptxError, match=r"at least 0\.01, or draws overflow"):
        optx.init.gg_(torch.empty(50, 50), shape=0.001)
