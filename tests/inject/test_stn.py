"""Self-tuning networks: ranges, the responding layer on every shape, and what it refuses."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

import optx
from optx.inject._hparams import inverse_softplus


def hparams(count: int = 1, **options: Any) -> optx.HParams:
    return optx.HParams(**{f"h{i}": optx.hp(0.5 * i, **options) for i in range(count)})


def attached(module: nn.Module, count: int = 1, **options: Any) -> tuple[nn.Sequential, Any]:
    """A model of one module, with everything that was added moved away from its start."""
    model = nn.Sequential(module)
    stn = optx.attach(model, optx.STN(hparams(count), **options))
    with torch.no_grad():
        for p in stn.parameters():
            p.normal_(std=0.5)
    return model, stn


def force(stn: Any, rows: Tensor) -> None:
    """These values, one row for each example, in the place of drawn ones."""
    with torch.no_grad():
        stn.hparams.draw.shift.copy_(rows - stn.hparams.raw)


# ---- ranges (property 4) --------------------------------------------------------------------------------


def test_the_papers_numbers() -> None:
    spec = optx.hp(0.05, (0, 0.9))
    assert spec.raw() == pytest.approx(-2.83321334, abs=1e-8)
    assert inverse_softplus(0.5) == pytest.approx(-0.43275213, abs=1e-8)
    assert inverse_softplus(1.0) == pytest.approx(0.54132485, abs=1e-8)
    assert inverse_softplus(1e4) == 1e4  # where exp() overflows
    assert math.log1p(math.exp(inverse_softplus(1e-12))) == pytest.approx(1e-12, rel=1e-3)


BOUNDS = st.one_of(st.none(), st.floats(-100, 100))


@settings(max_examples=200)
@given(
    low=BOUNDS,
    width=st.floats(0.01, 100),
    sides=st.sampled_from(["both", "low", "high", "none"]),
    at=st.floats(0.01, 0.99),
)
def test_the_map_and_its_inverse(low: float | None, width: float, sides: str, at: float) -> None:
    bottom = 0.0 if low is None else low
    value = bottom + at * width
    bounds = {
        "both": (bottom, bottom + width),
        "low": (bottom, None),
        "high": (None, bottom + width),
        "none": None,
    }
    spec = optx.hp(value, bounds[sides])
    back = spec.constrained(torch.tensor(spec.raw(), dtype=torch.float64))
    assert float(back) == pytest.approx(value, rel=1e-6, abs=1e-6 * width)


@given(
    low=st.integers(-5, 5),
    width=st.integers(1, 30),
    at=st.floats(0, 1),
    sides=st.sampled_from(["both", "low", "high", "none"]),
)
def test_whole_numbers_start_at_themselves_and_reach_their_bounds(
    low: int, width: int, at: float, sides: str
) -> None:
    """The official code starts cutout 4 at 3 and never reaches 24."""
    value = low + round(at * width)
    bounds = {"both": (low, low + width), "low": (low, None), "high": (None, low + width), "none": None}
    spec = optx.hp(value, bounds[sides], discrete=True)
    assert int(spec.constrained(torch.tensor(spec.raw(), dtype=torch.float32))) == value
    far = spec.constrained(torch.tensor([-60.0, 60.0]))
    assert far.dtype == torch.int64
    if sides in ("both", "low"):
        assert far[0] == low
    if sides in ("both", "high"):
        assert far.max() == low + width


def test_values_are_read_by_name() -> None:
    found = optx.HParams(
        drop=optx.hp(0.05, (0, 0.9)), cut=optx.hp(4, (0, 24), discrete=True), wd=optx.hp(1e-4, (0, None))
    )
    assert list(found) == ["drop", "cut", "wd"]
    assert found.values() == pytest.approx({"drop": 0.05, "cut": 4, "wd": 1e-4})
    assert found["cut"].value.dtype == torch.int64
    assert found["drop"].value.shape == ()
    assert found["drop"].sigma == pytest.approx(0.5)
    assert repr(found) == (
        "HParams(drop=hp(value=0.05, range=(0.0, 0.9)), cut=hp(value=4.0, range=(0.0, 24.0), discrete=True), "
        "wd=hp(value=0.0001, range=(0.0, None)))"
    )
    with pytest.raises(optx.OptxError, match=r"no hyperparameter is called 'dorp'\. Near: 'drop'"):
        found["dorp"]


def test_defaults() -> None:
    stn = optx.STN(hparams())
    assert (stn.lr, stn.sigma_lr, stn.tau) == (3e-3, 3e-3, 1e-3)
    assert (stn.warmup, stn.train_steps, stn.valid_steps, stn.seed) == (100, 2, 1, 0)
    assert (stn.delta, stn.dropout, stn.shared, stn.scale) == (False, None, False, False)
    assert optx.hp(1.0) == optx.hp(1.0, None, sigma=0.5, discrete=False, shared=False)


# ---- the layer ------------------------------------------------------------------------------------------


def test_the_worked_example() -> None:
    """Property 1."""
    module = nn.Linear(2, 2)
    model, stn = attached(module, scale=True)
    part: Any = module.optx.stn  # type: ignore[union-attr]
    values = {
        "W": [[1.0, 2], [0, -1]], "b": [0.5, 0], "W_h": [[0.5, 0], [1, 1]], "b_h": [1.0, -2],
        "V": [[0.1], [0.2], [0.3], [0.4]], "c": 1.0,
    }  # fmt: skip
    with torch.no_grad():
        for name, p in {"W": module.weight, "b": module.bias, **dict(part.named_parameters())}.items():
            p.copy_(torch.tensor(values[name]))
    x = torch.tensor([[1.0, 1], [2, -1]])
    with stn.train_batch(x):
        force(stn, torch.tensor([[2.0], [-1.0]]))
        torch.testing.assert_close(model(x), torch.tensor([[4.2, -1.8], [0.1, 1.6]]))


LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 3), (4,)),
    "linear, no bias": (lambda: nn.Linear(4, 3, bias=False), (4,)),
    "linear, sequence": (lambda: nn.Linear(4, 3), (5, 2, 4)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, dilation=2, padding=2, padding_mode="reflect"), (4, 7, 6)),
    "conv2d, groups": (lambda: nn.Conv2d(4, 8, (3, 1), padding="same", groups=4, bias=False), (4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 3, 4, 3)),
}  # fmt: skip


def gpt2s() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(3, 4)


LAYERS["GPT-2's Conv1D"] = gpt2s, (5, 4)
each_layer = pytest.mark.parametrize("name", LAYERS)


def by_hand(module: Any, raw: Tensor, x: Tensor, bare: nn.Module) -> Tensor:
    """Each example by itself, through the plain module with the weights of the paper's equation."""
    part = module.optx.stn
    rows: list[Tensor] = []
    for i in range(len(x)):
        s = part.V @ raw[i]
        out = part.out
        s_w = s[:out] if part.transposed else s[:out].view(-1, *(1,) * (module.weight.ndim - 1))
        c = 1 if part.c is None else part.c
        values = {"weight": c * module.weight + s_w * part.W_h}
        if module.bias is not None:
            values["bias"] = c * module.bias + s[out:] * part.b_h
        rows.append(functional_call(bare, values, (x[i : i + 1],)))
    return torch.cat(rows)


@each_layer
@pytest.mark.parametrize("scale", [False, True])
def test_each_example_has_weights_of_its_own(name: str, scale: bool) -> None:
    """The equivalent weight W + diag(s_w) W_h, for each example; and property 8."""
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    module = make().double()
    bare = copy.deepcopy(module)
    model, stn = attached(module, 2, scale=scale)
    x = torch.randn(3, *shape, dtype=torch.float64)
    raw = torch.randn(3, 2, dtype=torch.float64)
    with stn.train_batch(3):
        force(stn, raw)
        torch.testing.assert_close(model(x), by_hand(module, raw, x, bare))
        before = model(x)
        raw[1] += 1
        force(stn, raw)
        same = (model(x) == before).flatten(1).all(1)
        assert same.tolist() == [True, False, True]


@each_layer
@pytest.mark.parametrize("delta", [False, True])
def test_merge_is_the_model_at_the_values_in_force(name: str, delta: bool) -> None:
    """Property 3; and remove() leaves the module's own weights alone."""
    make, shape = LAYERS[name]
    torch.manual_seed(1)
    module = make().double()
    bare = copy.deepcopy(module)
    model, stn = attached(module, 2, scale=True, delta=delta)
    x = torch.randn(3, *shape, dtype=torch.float64)
    wanted = model(x)
    with stn.train_batch(3):
        force(stn, stn.hparams.raw.detach().expand(3, -1))
        torch.testing.assert_close(model(x), wanted)
    stn.merge()
    torch.testing.assert_close(model(x), wanted, rtol=0, atol=1e-6)
    with pytest.raises(optx.MergeError, match="merged at fixed values"), stn.train_batch(3):
        pass
    stn.unmerge()
    stn.remove()
    assert torch.equal(model(x), bare(x))


@each_layer
def test_nothing_changes_where_nothing_is_gated(name: str) -> None:
    """Property 2: V = 0, or Delta-STN at the values in force."""
    make, shape = LAYERS[name]
    module = make()
    x = torch.randn(2, *shape)
    plain = module(x)
    model, stn = attached(module, delta=True)
    assert torch.equal(model(x), plain)
    with stn.train_batch(2, learn="general"):
        assert torch.equal(model(x), plain)
    with stn.train_batch(2):
        assert not torch.equal(model(x), plain)
    stn.remove()
    stn = optx.attach(model, optx.STN(hparams()))
    with torch.no_grad():
        module.optx.stn.V.zero_()
    with stn.train_batch(2):
        assert torch.equal(model(x), plain)


def test_delta_starts_as_the_plain_model_also_when_perturbed() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    x = torch.randn(5, 4)
    plain = model(x)
    stn = optx.attach(model, optx.STN(hparams(), delta=True))
    with stn.train_batch(x):
        assert torch.equal(model(x), plain)


def test_a_kernel_of_one_is_a_linear_layer() -> None:
    """Property 2."""
    torch.manual_seed(0)
    conv, linear = nn.Conv2d(4, 3, 1), nn.Linear(4, 3)
    (first, a), (second, b) = attached(conv, 2), attached(linear, 2)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.flatten(1))
        linear.bias.copy_(conv.bias)  # type: ignore[arg-type]
        for to, of in zip(b.parameters(), a.parameters(), strict=True):
            to.copy_(of.view(to.shape))
    x = torch.randn(2, 4, 5, 6)
    with a.train_batch(2), b.train_batch(2):
        torch.testing.assert_close(first(x), second(x.movedim(1, -1)).movedim(-1, 1))


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 5), middle=st.lists(st.integers(1, 4), max_size=3), into=st.integers(1, 6),
    out=st.integers(1, 6), count=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    bias=st.booleans(), shared=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape(
    batch: int,
    middle: list[int],
    into: int,
    out: int,
    count: int,
    dtype: torch.dtype,
    bias: bool,
    shared: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    module = nn.Linear(into, out, bias=bias).to(dtype)
    model, stn = attached(module, count, shared=shared, batch_axis=0)
    x = torch.randn(batch, *middle, into).to(dtype)
    with stn.train_batch(batch):
        got = model(x)
        shift = stn.hparams.draw.shift
        assert len(shift) == (1 if shared else batch)
        raw = (stn.hparams.raw.detach() + shift).expand(batch, -1)
    assert got.dtype == dtype
    assert {p.dtype for p in stn.parameters()} == {torch.float64 if dtype == torch.float64 else torch.float32}
    part: Any = module.optx.stn  # type: ignore[union-attr]
    wide = torch.float64
    s = (raw.to(wide) @ part.V.to(wide).t()).view(batch, *(1,) * len(middle), -1)
    wanted = x.to(wide) @ module.weight.to(wide).t() + s[..., :out] * (x.to(wide) @ part.W_h.to(wide).t())
    if bias:
        wanted = wanted + module.bias.to(wide) + s[..., out:] * part.b_h.to(wide)
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-10, torch.bfloat16: 0.06}[dtype]
    torch.testing.assert_close(
        got.to(wide), wanted, rtol=tolerance, atol=tolerance * (1 + float(wanted.detach().abs().max()))
    )


# ---- refusals at attach and at a call -------------------------------------------------------------------


def test_a_sequence_folded_into_the_batch_is_refused() -> None:
    class Folds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.flatten(0, 1)).view(*x.shape[:2], 3)

    model, x = Folds(), torch.randn(2, 5, 4)
    stn = optx.attach(model, optx.STN(hparams()))
    model(x)  # all share the values in force
    says = r"the input of 'inner' has shape \(10, 4\), and the batch has 2 examples.*shared=True"
    with pytest.raises(optx.OptxError, match=says), stn.train_batch(x):
        model(x)
    with stn.train_batch(1), pytest.raises(optx.OptxError, match="has 1 examples"):
        model(x)
    stn.remove()
    stn = optx.attach(model, optx.STN(hparams(), shared=True))
    with stn.train_batch():
        assert model(x).shape == (2, 5, 3)
        assert stn.hparams["h0"].value.shape == ()


def test_an_image_without_a_batch_is_refused() -> None:
    model, stn = attached(nn.Conv2d(2, 3, 1))
    assert model(torch.randn(2, 5, 5)).shape == (3, 5, 5)
    with (
        stn.train_batch(2),
        pytest.raises(optx.OptxError, match=r"shape \(2, 5, 5\), and the batch has 2 ex"),
    ):
        model(torch.randn(2, 5, 5))


def test_the_default_is_every_linear_and_convolution() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3), nn.ReLU(), nn.Flatten(), nn.Linear(6, 2))
    stn = optx.attach(model, optx.STN(hparams()))
    assert [one.path for one in stn.served] == ["0", "4"]
    with pytest.raises(optx.TargetError, match="found nothing to serve by default"):
        optx.attach(nn.Sequential(nn.ReLU()), optx.STN(hparams()))
    with pytest.raises(
        optx.TargetError, match="STN serves Linear, Conv1D or Conv1d/2d/3d modules; '1' is a Batch"
    ):
        optx.attach(model, optx.STN(hparams()), nn.BatchNorm1d, name="more")


def test_one_set_of_hyperparameters_is_of_one_model() -> None:
    own = hparams()
    first = optx.attach(nn.Sequential(nn.Linear(2, 2)), optx.STN(own))
    model = nn.Sequential(nn.Linear(2, 2))
    keys = list(model.state_dict())
    with pytest.raises(optx.OptxError, match="these HParams are tuned on another model already"):
        optx.attach(model, optx.STN(own))
    assert list(model.state_dict()) == keys
    first.remove()
    optx.attach(model, optx.STN(own))


# ---- dropout ----------------------------------------------------------------------------------------------


def dropped() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 50), nn.Dropout(0.3), nn.ReLU(), nn.Dropout2d(0.2), nn.Linear(50, 2))


def rates(**options: Any) -> optx.HParams:
    return optx.HParams(drop=optx.hp(0.4, (0, 0.9), **options), early=optx.hp(0.1, (0, 0.5), **options))


def test_dropout_modules_have_the_rate_of_each_example() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.3))
    stn = optx.attach(model, optx.STN(rates(sigma=2.0), dropout="drop", delta=True))
    x = torch.ones(8, 4000)
    with stn.train_batch(8):
        rate = stn.hparams["drop"].value
        y = model[1](x)
    assert rate.shape == (8,)
    assert rate.max() - rate.min() > 0.2
    torch.testing.assert_close((y == 0).float().mean(1), rate, rtol=0, atol=0.04)
    kept = [row[row != 0] for row in y]
    torch.testing.assert_close(torch.stack([row.mean() for row in kept]), 1 / (1 - rate))
    model.eval()
    assert torch.equal(model[1](x), x)
    stn.remove()
    assert repr(model[1]) == "Dropout(p=0.3, inplace=False)"


def test_outside_of_a_batch_dropout_is_torchs_at_the_rate_in_force() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.3))
    optx.attach(model, optx.STN(rates(), dropout="drop"))
    x = torch.randn(5, 6)
    torch.manual_seed(1)
    got = model[1](x)
    torch.manual_seed(1)
    torch.testing.assert_close(got, nn.functional.dropout(x, 0.4))


def test_whole_channels_are_dropped() -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 1), nn.Dropout2d())
    stn = optx.attach(model, optx.STN(rates(), dropout={"drop": "1"}))
    with stn.train_batch(2):
        zero = model[1](torch.ones(2, 64, 3, 3)) == 0
    assert torch.equal(zero.all(-1).all(-1), zero.any(-1).any(-1))
    assert zero.any()
    assert not zero.all()


def test_each_rate_has_its_modules() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(), nn.Linear(3, 3), nn.Dropout())
    stn = optx.attach(model, optx.STN(rates(), dropout={"early": "1", "drop": ["3"]}))
    notes = {row.module: row.note for row in stn.report().rows if "rate" in row.note}
    assert notes == {"1": "drops at the rate 'early'", "3": "drops at the rate 'drop'"}
    stn.remove()
    for wanted, says in (
        ({"early": "1", "drop": nn.Dropout}, "gives '1' two rates, 'early' and 'drop'"),
        ({"early": "7"}, r"'early', for which no module is found\..*\['1', '3'\]"),
        ({"early": "0"}, "dropout serves Dropout and Dropout1d/2d/3d modules; '0' is a Linear"),
    ):
        with pytest.raises(optx.TargetError, match=says):
            optx.attach(model, optx.STN(rates(), dropout=wanted))
    assert not any("optx" in key for key in model.state_dict())


def test_dropout_refuses_another_batch() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout())
    stn = optx.attach(model, optx.STN(rates(), dropout="drop"))
    with stn.train_batch(4), pytest.raises(optx.OptxError, match=r"'drop' has an input of shape \(8, 3\)"):
        model[1](torch.ones(8, 3))
    model.eval()
    with pytest.raises(optx.OptxError, match="dropout '1' is in evaluation mode"), stn.train_batch(4):
        pass


def test_a_loop_of_ones_own_drops_by_function() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    stn = optx.attach(model, optx.STN(rates()))
    x = torch.ones(6, 500)
    with stn.train_batch(6):
        torch.testing.assert_close(
            (stn.dropout(x, "drop") == 0).float().mean(1), stn.hparams["drop"].value, atol=0.1, rtol=0
        )
        assert stn.dropout(x, "drop", training=False) is x
    with stn.valid_batch(6):
        assert stn.dropout(x, "drop") is x


def test_merging_leaves_dropout_and_unloading_writes_its_rate() -> None:
    model = dropped()
    stn = optx.attach(model, optx.STN(rates(), dropout={"drop": nn.Dropout, "early": nn.Dropout2d}))
    stn.merge()
    assert stn.merged
    x = torch.ones(2, 2000)
    assert float((model[1](x) == 0).float().mean()) == pytest.approx(0.4, abs=0.05)
    stn.unmerge()
    stn.merge_and_unload()
    assert [model[1].p, model[3].p] == pytest.approx([0.4, 0.1])
    assert not any("optx" in key for key in model.state_dict())
