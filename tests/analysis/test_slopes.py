"""What is known of each activation's slopes: on a fine grid none is outside, and each end is come near to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optx._errors import OptxError
from optx.analysis.bounds import _slopes
from optx.analysis.bounds._system import Slopes
from optx.lipschitz._slopes import FUNCTIONS, SLOPES, Absolute

ELEMENTWISE: list[nn.Module] = [
    *(nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.1), nn.LeakyReLU(-0.5), nn.LeakyReLU(2.0), nn.RReLU().eval()),
    *(nn.Hardtanh(), nn.Hardtanh(-2, 3), nn.Tanh(), nn.Tanhshrink(), nn.Softshrink(0.3), nn.Softsign()),
    *(nn.Sigmoid(), nn.LogSigmoid(), nn.Hardsigmoid(), nn.Softplus(), nn.Softplus(beta=3.0)),
    *(nn.ELU(), nn.ELU(2.0), nn.ELU(-0.5), nn.CELU(0.3), nn.SELU(), nn.SiLU(), nn.GELU(), nn.GELU("tanh")),
    *(nn.Mish(), nn.Hardswish(), Absolute(), nn.PReLU()),
]


def quotients(module: nn.Module) -> Tensor:
    """Of neighbours on a fine grid; of any two points it is a mean of these."""
    x = torch.linspace(-30, 30, 600_001, dtype=torch.float64)
    y = x.abs() if isinstance(module, Absolute) else module.double()(x)
    return y.detach().diff() / x.diff()


def known(module: nn.Module, shape: tuple[int, ...] = (1,)) -> Slopes:
    found = _slopes.activation(module, shape, {})
    assert isinstance(found, Slopes)
    return found


@pytest.mark.parametrize("module", ELEMENTWISE, ids=repr)
def test_no_slope_is_outside_and_each_end_is_near(module: nn.Module) -> None:
    low, high = (float(end) for end in (known(module).low, known(module).high))
    slopes = quotients(module)
    assert low - 1e-8 <= float(slopes.min()) <= low + 2e-3  # differences round; Softsign's ends are far out
    assert high - 2e-3 <= float(slopes.max()) <= high + 1e-8


def test_the_table_is_the_whole_table() -> None:
    assert {type(module) for module in ELEMENTWISE} == {*SLOPES, nn.PReLU}


@pytest.mark.parametrize("module", [nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.Mish()], ids=repr)
def test_ends_are_rounded_outwards_in_the_eighth_digit(module: nn.Module) -> None:
    x = torch.linspace(-8, 8, 200_001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(module(x).sum(), x)
    low, high = (float(end) for end in (known(module).low, known(module).high))
    assert low <= float(slope.min()) <= low + 2e-8
    assert high - 2e-8 <= float(slope.max()) <= high


def test_prelus_slopes_are_its_channels() -> None:
    module = nn.PReLU(2)
    module.weight.data = torch.tensor([-0.5, 3.0])
    found = known(module, (2, 3))
    assert found.low.tolist() == [-0.5] * 3 + [1.0] * 3
    assert found.high.tolist() == [1.0] * 3 + [3.0] * 3


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        *((F.relu, {}), (torch.relu, {}), (F.leaky_relu, {"negative_slope": 0.3}), (F.elu, {"alpha": 2.0})),
        *((F.gelu, {"approximate": "tanh"}), (F.softplus, {"beta": 2.0}), (F.hardtanh, {"max_val": 2.0})),
        *((torch.tanh, {}), (torch.sigmoid, {}), (F.silu, {}), (F.mish, {}), (F.softshrink, {"lambd": 0.2})),
    ],
)
def test_a_call_is_the_module_with_its_arguments(call: Any, arguments: dict[str, Any]) -> None:
    module = FUNCTIONS[call](**arguments)
    x = torch.linspace(-5, 5, 101)
    torch.testing.assert_close(call(x, **arguments), module(x))


def test_what_jumps_or_draws_is_refused() -> None:
    with pytest.raises(OptxError, match="Softplus has threshold=1, where it jumps"):
        known(nn.Softplus(threshold=1))
    with pytest.raises(OptxError, match="RReLU draws its slopes in training mode"):
        known(nn.RReLU())
