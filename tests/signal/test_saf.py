"""SAF: the numbers of its specification, the record, resuming, and what is refused."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import optx
from optx.kernels.loss.trajectory_rows import centred
from optx.signal._trajectory import mean_loss

Z, PAST = [[2.0, 0.0, -1.0]], [[1.0, 1.0, -1.0]]


def official(z: Tensor, past: Tensor, tau: float) -> Tensor:
    """The authors' form, in float64: KLDivLoss of log-softmax and softmax, by tau^2."""
    log_p, q = F.log_softmax(z.double() / tau, 1), F.softmax(past.double() / tau, 1)
    return F.kl_div(log_p, q, reduction="batchmean") * tau**2


def recorded(*pasts: Any, **options: Any) -> optx.SAF:
    """SAF that recorded these logits of samples 0, 1, ... in epochs 0, 1, ...; the next epoch has begun."""
    first = torch.as_tensor(pasts[0])
    usual = {"lookback": len(pasts), "start_epoch": len(pasts) - 1, "dtype": torch.float32}
    saf = optx.SAF(len(first), **usual | options)
    for epoch, past in enumerate(pasts):
        saf.set_epoch(epoch)
        saf(torch.as_tensor(past).clone().requires_grad_(), torch.arange(len(first)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saf.set_epoch(len(pasts))
    return saf


def loss_and_gradient(saf: optx.SAF, z: Any, **options: Any) -> tuple[Tensor, Tensor]:
    z = torch.as_tensor(z).clone().requires_grad_()
    loss = saf(z, torch.arange(len(z)), **options)
    (gradient,) = torch.autograd.grad(loss, z)
    return loss.detach(), gradient


# ---- the loss -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tau", "wanted"), [(1.0, 0.41122234), (5.0, 0.37294131)])
def test_value_by_hand(tau: float, wanted: float) -> None:
    loss, gradient = loss_and_gradient(recorded(PAST, tau=tau, weight=1.0), Z)
    assert loss.item() == pytest.approx(wanted, abs=1e-6)
    if tau == 5.0:
        expected = torch.tensor([[0.38069880, -0.36211416, -0.01858464]])
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("tau", [0.5, 1.0, 5.0, 40.0])
def test_at_the_reference_there_is_no_loss(tau: float) -> None:
    past = 3 * torch.randn(6, 9)
    loss, gradient = loss_and_gradient(recorded(past, tau=tau), past)
    assert loss == 0
    assert float(gradient.abs().max()) < 1e-7


def test_a_large_temperature_is_half_a_squared_distance() -> None:
    z, past = (torch.tensor(t, dtype=torch.float64, requires_grad=True) for t in (Z, PAST))
    loss = mean_loss(z, centred(z.detach()), centred(past.detach()), 1000.0, None, None)
    loss.backward()
    assert loss.item() == pytest.approx(0.33355545, abs=1e-8)
    assert z.grad is not None
    torch.testing.assert_close(z.grad, torch.tensor([[1 / 3, -1 / 3, 0.0]]).double(), rtol=0, atol=1e-3)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_equals_the_official_loss(data: st.DataObject) -> None:
    n, classes = data.draw(st.integers(1, 7)), data.draw(st.integers(2, 40))
    tau, weight = data.draw(st.sampled_from([0.7, 1.0, 5.0])), data.draw(st.sampled_from([0.3, 2.0]))
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    scale, shift = data.draw(st.sampled_from([0.1, 3.0, 50.0])), data.draw(st.sampled_from([0.0, 100.0]))
    z, past = (torch.randn(n, classes, generator=g) * scale + shift for _ in range(2))
    z = z.to(dtype)
    loss, gradient = loss_and_gradient(recorded(past, tau=tau, weight=weight), z)
    exact = z.double().requires_grad_()
    wanted = weight * official(exact, past, tau)
    wanted.backward()
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert gradient.dtype == dtype
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-3, abs=1e-4 * tau**2)
    assert exact.grad is not None
    slack = {torch.bfloat16: 4e-3, torch.float16: 1e-3}.get(dtype, 1e-4)
    torch.testing.assert_close(gradient.double(), exact.grad, rtol=slack, atol=slack * weight * tau / n)
    assert abs(float(gradient.double().sum())) < 1e-2 * weight * tau


def test_a_constant_changes_nothing() -> None:
    past, z = torch.randn(4, 5), torch.randn(4, 5)
    here = loss_and_gradient(recorded(past), z)
    for moved in (loss_and_gradient(recorded(past + 7), z), loss_and_gradient(recorded(past), z - 11)):
        torch.testing.assert_close(moved, here, rtol=0, atol=2e-6)


@pytest.mark.parametrize("top_k", [None, 2])
def test_masked_classes_have_no_nan(top_k: int | None) -> None:
    past, z = torch.randn(3, 6), torch.randn(3, 6)
    past[:, 4], z[:, 4] = -torch.inf, -torch.inf
    z[0, 1] = -torch.inf
    loss, gradient = loss_and_gradient(recorded(past, top_k=top_k, dtype=torch.float16), z)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert (gradient[:, 4] == 0).all()


def test_a_nan_sample_is_left_out_then_and_later() -> None:
    past, z = torch.randn(4, 5), torch.randn(4, 5)
    past[1], z[2, 0] = torch.nan, torch.nan
    loss, gradient = loss_and_gradient(recorded(past, weight=1.0), z)
    rest = [0, 3]
    assert loss.item() == pytest.approx(official(z[rest], past[rest], 5.0).item() / 2, rel=1e-4)
    assert (gradient[[1, 2]] == 0).all()
    assert (gradient[rest] != 0).any()


def test_under_autocast_it_is_float32() -> None:
    past, z = 9 * torch.randn(4, 5), 9 * torch.randn(4, 5)
    plain = loss_and_gradient(recorded(past), z)
    with torch.autocast("cpu", torch.bfloat16):
        saf = recorded(past)
        mixed = loss_and_gradient(saf, z)
    assert mixed[0].dtype == torch.float32
    assert torch.equal(mixed[0], plain[0])
    assert torch.equal(mixed[1], plain[1])


# ---- the record -----------------------------------------------------------------------------------------


def test_it_reads_what_was_written_three_epochs_ago() -> None:
    saf = optx.SAF(4, lookback=3, start_epoch=5, weight=1.0, dtype=torch.float32)
    rows = [torch.randn(4, 6) for _ in range(9)]
    for epoch in range(9):
        saf.set_epoch(epoch)
        z, order = rows[epoch], torch.randperm(4)
        losses = [saf(z[part].clone().requires_grad_(), part).item() for part in order.split(2)]
        if epoch <= 5:
            assert losses == [0.0, 0.0]
        else:
            wanted = [official(z[part], rows[epoch - 3][part], 5.0).item() for part in order.split(2)]
            assert losses == pytest.approx(wanted, rel=1e-4)


def test_what_was_not_seen_then_adds_nothing_and_counts() -> None:
    saf = optx.SAF(3, lookback=2, start_epoch=1, weight=1.0, dtype=torch.float32)
    past, z = torch.randn(3, 4), torch.randn(3, 4)
    saf.set_epoch(0)
    saf(past[:2].clone().requires_grad_(), [0, 1])
    saf.set_epoch(1)
    saf(z[1:].clone().requires_grad_(), [1, 2])
    saf.set_epoch(2)
    loss, gradient = loss_and_gradient(saf, z)
    assert loss.item() == pytest.approx(official(z[:2], past[:2], 5.0).item() * 2 / 3, rel=1e-4)
    assert (gradient[2] == 0).all()
    assert saf.report()["served"] == pytest.approx(2 / 3)
    with pytest.warns(UserWarning, match="in epoch 2, 2 of 3 samples had an output of 2 epochs before"):
        saf.set_epoch(3)
    assert loss_and_gradient(saf, 2 * z)[0] > 0  # samples 1 and 2 were seen in epoch 1


@pytest.mark.filterwarnings("ignore:SAF. in epoch 1 ")  # so it was made
@pytest.mark.parametrize("top_k", [None, 2])
def test_what_was_never_seen_is_of_no_epoch(top_k: int | None) -> None:
    """Nor of the one before the first, if a person sets the start lower than may be asked for."""
    saf = optx.SAF(3, lookback=3, weight=1.0, top_k=top_k)
    saf.start_epoch = 0
    for epoch in range(3):
        saf.set_epoch(epoch)
        assert saf(torch.randn(3, 4, requires_grad=True), [0, 1, 2]) == 0
    assert saf.report()["served"] == 0


@pytest.mark.parametrize(("start", "end", "on"), [(0, None, {1, 2, 3, 4}), (2, None, {3, 4}), (1, 3, {2})])
def test_epochs_that_have_the_loss(start: int, end: int | None, on: set[int]) -> None:
    saf = optx.SAF(2, lookback=1, start_epoch=start, end_epoch=end)
    found = set()
    for epoch in range(5):
        saf.set_epoch(epoch)
        assert saf.active == (epoch in on)
        if loss_and_saf(saf, epoch):
            found.add(epoch)
    assert found == on


def loss_and_saf(saf: optx.SAF, epoch: int) -> bool:
    return bool(saf(torch.tensor([[1.0 + epoch, 0.0], [0.0, 1.0]], requires_grad=True), [0, 1]) > 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("top_k", [None, 3, 200])
def test_memory_is_as_counted(dtype: torch.dtype, top_k: int | None) -> None:
    saf = recorded(torch.randn(6, 200), torch.randn(6, 200), dtype=dtype, top_k=top_k)
    values = 200 if top_k in (None, 200) else 4
    indices = 3 * 2 if top_k == 3 else 0
    assert saf.nbytes == 6 * 2 * (values * dtype.itemsize + indices + 4)
    assert saf.report()["bytes"] == saf.nbytes + 2 * 8 * 200 * 4


def test_half_precision_costs_what_the_report_says() -> None:
    torch.manual_seed(0)
    past, z = 4 * torch.randn(8, 50), 4 * torch.randn(8, 50)
    errors = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        saf = recorded(past, dtype=dtype, weight=1.0)
        loss, _ = loss_and_gradient(saf, z)
        said = saf.report()
        assert said["loss"] == pytest.approx(official(z, past, 5.0).item(), rel=1e-5)
        assert abs(loss.item() - said["loss"]) <= said["error"] + 1e-6
        errors[dtype] = said["error"] / said["loss"]
    assert errors[torch.float32] < 1e-6
    assert 1e-6 < errors[torch.float16] < 1e-4 < errors[torch.bfloat16] < 1e-3


# ---- large outputs --------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(0, 10**6), st.sampled_from([1.0, 5.0]), st.booleans())
def test_top_k_is_the_divergence_of_k_plus_one_bins(k: int, seed: int, tau: float, sequence: bool) -> None:
    g = torch.Generator().manual_seed(seed)
    shape = (3, 4, 12) if sequence else (3, 12)
    z, past = (3 * torch.randn(shape, generator=g) for _ in range(2))
    saf = recorded(past, top_k=k, tau=tau, weight=1.0)
    loss, gradient = loss_and_gradient(saf, z)
    exact = z.double().requires_grad_()
    p, q = (exact / tau).softmax(-1), (past.double() / tau).softmax(-1)
    classes = past.topk(k, -1).indices
    bins_p, bins_q = (
        torch.cat((t.gather(-1, classes), (1 - t.gather(-1, classes).sum(-1, True)).abs()), -1)
        for t in (p, q)
    )
    if k == 12:
        bins_p, bins_q = p, q
    wanted = tau**2 * (bins_q * (bins_q / bins_p).log()).sum(-1).mean()
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-3, abs=1e-5 * tau**2)
    assert exact.grad is not None
    torch.testing.assert_close(gradient.double(), exact.grad, rtol=1e-3, atol=1e-6 * tau)
    whole = official(z.flatten(0, -2), past.flatten(0, -2), tau).item()
    assert loss.item() <= whole + 1e-5 * tau**2  # merging bins can only lose divergence
    if not sequence:
        assert saf.report()["error"] == pytest.approx(whole - wanted.item(), abs=1e-5 * tau**2)


def test_sequences_of_any_length_and_padding() -> None:
    torch.manual_seed(0)
    saf = optx.SAF(2, lookback=1, start_epoch=0, weight=1.0, max_length=5, dtype=torch.float32)
    past, z = torch.randn(2, 4, 7), torch.randn(2, 5, 7)
    saf.set_epoch(0)
    saf(past.clone().requires_grad_(), [0, 1])
    saf.set_epoch(1)
    where = torch.tensor([[True] * 5, [True, True, False, False, False]])
    z[1, 3] = torch.nan  # padding may be anything
    loss, gradient = loss_and_gradient(saf, z, where=where)
    there = where[:, :4]  # position 4 was not there in epoch 0: it adds 0, and counts
    wanted = official(z[:, :4][there], past[there], 5.0) * there.sum() / where.sum()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)
    assert (gradient[~where] == 0).all()
    assert (gradient[0, 4] == 0).all()
    saf = optx.SAF(2, lookback=1, start_epoch=0, weight=1.0, top_k=3)
    for epoch in range(2):
        saf.set_epoch(epoch)
        loss, gradient = loss_and_gradient_if_any(saf, z, where)
    assert abs(loss.item()) < 1e-4  # the rest's logit is a float16
    assert gradient.isfinite().all()


def loss_and_gradient_if_any(saf: optx.SAF, z: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
    z = z.clone().requires_grad_()
    loss = saf(z, [0, 1], where)
    (loss + 0 * z.nan_to_num().sum()).backward()
    assert z.grad is not None
    return loss.detach(), z.grad


# ---- training and resuming ------------------------------------------------------------------------------


def digits(n: int = 24) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    return torch.randn(n, 5, generator=g), torch.randint(4, (n,), generator=g)


class Run:
    """A loop with dropout, a shuffled loader, accumulation over two batches."""

    def __init__(self, saf: optx.SAF | None) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 4))
        self.opt = torch.optim.SGD(self.model.parameters(), lr=0.3, momentum=0.9)
        self.saf, self.call = saf, self.model

    def epochs(self, which: range) -> None:
        data = optx.with_index(torch.utils.data.TensorDataset(*digits()))
        loader = torch.utils.data.DataLoader(data, batch_size=6, shuffle=True)
        for epoch in which:
            if self.saf is not None:
                self.saf.set_epoch(epoch)
            for number, (x, y, index) in enumerate(loader):
                logits = self.call(x)
                loss = F.cross_entropy(logits, y)
                if self.saf is not None:
                    loss = loss + self.saf(logits, index)
                (loss / 2).backward()
                if number % 2:
                    self.opt.step()
                    self.opt.zero_grad()

    def weights(self) -> Tensor:
        return nn.utils.parameters_to_vector(self.model.parameters()).detach()


def test_inactive_or_at_weight_0_the_training_is_the_same() -> None:
    plain = Run(None)
    plain.epochs(range(5))
    for off in (optx.SAF(24, start_epoch=4), optx.SAF(24, start_epoch=0, lookback=1, weight=0.0)):
        run = Run(off)
        run.epochs(range(5))
        assert torch.equal(run.weights(), plain.weights())
        assert off.report()["recorded"] == 1
    run = Run(optx.SAF(24, start_epoch=3))
    run.epochs(range(5))
    assert not torch.equal(run.weights(), plain.weights())


@pytest.mark.parametrize("options", [{}, {"top_k": 2, "dtype": torch.bfloat16}])
@pytest.mark.parametrize("at", [2, 4])
def test_resuming_is_bit_identical(options: dict[str, Any], at: int) -> None:
    whole = Run(optx.SAF(24, lookback=2, start_epoch=2, **options))
    whole.epochs(range(at))
    file = io.BytesIO()
    assert whole.saf is not None
    torch.save(
        [whole.model.state_dict(), whole.opt.state_dict(), whole.saf.state_dict(), torch.get_rng_state()],
        file,
    )
    whole.epochs(range(at, 6))
    again = Run(optx.SAF(24, lookback=2, start_epoch=2, **options))
    file.seek(0)
    model, opt, saf, rng = torch.load(file, weights_only=True)
    again.model.load_state_dict(model)
    again.opt.load_state_dict(opt)
    assert again.saf is not None
    again.saf.load_state_dict(saf)
    torch.set_rng_state(rng)
    again.epochs(range(at, 6))
    assert torch.equal(again.weights(), whole.weights())
    assert str(again.saf.report()) == str(whole.saf.report())


def test_a_state_without_its_table_starts_a_new_record() -> None:
    run = Run(optx.SAF(24, lookback=2, start_epoch=2, weight=3.0))
    run.epochs(range(5))
    assert run.saf is not None
    small = run.saf.state_dict(table=False)
    assert small["record"] is None
    assert run.saf.state_dict()["record"]["values"].shape == (2, 24, 4)
    saf = optx.SAF(24, lookback=2, start_epoch=2)
    saf.load_state_dict(small)
    assert saf.epoch == 4
    run.saf = saf
    with pytest.warns(UserWarning, match="0 of 24 samples had an output of 2 epochs before"):
        run.epochs(range(5, 8))
    assert saf.report()["served"] == 1


def test_a_state_is_a_copy() -> None:
    saf = recorded(PAST)
    state = saf.state_dict()
    before = copy.deepcopy(state)
    saf(torch.tensor(Z, requires_grad=True), [0])
    for name in ("values", "tags"):
        assert torch.equal(state["record"][name], before["record"][name])


def test_a_compiled_model_gives_the_same_training() -> None:
    runs = [Run(optx.SAF(24, lookback=1, start_epoch=0)) for _ in range(2)]
    runs[1].call = torch.compile(runs[1].model, backend="eager")  # type: ignore[assignment]
    for run in runs:
        torch.manual_seed(1)
        run.epochs(range(3))
    assert torch.equal(runs[0].weights(), runs[1].weights())


def test_without_gradients_nothing_is_recorded() -> None:
    saf = recorded(PAST)
    before = saf.state_dict()
    with torch.no_grad():
        assert saf(torch.tensor(Z), [0]) == 0
    assert torch.equal(saf.state_dict()["record"]["values"], before["record"]["values"])
