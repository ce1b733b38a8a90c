"""SphericalHead in a loop: with an optimizer, saved and resumed, taken off, and what it refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import optx

D, WIDTH = 40, 5


def network(seed: int = 0, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, WIDTH), nn.Tanh(), nn.Linear(WIDTH, D, bias=bias))


def batch(number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(6, 3, generator=generator), torch.randint(D, (6,), generator=generator)


def attached(model: nn.Module, **options: Any) -> optx.SphericalHandle:
    loss = options.pop("loss", optx.ZLoss(0.5, 4.0))
    return optx.attach(model, optx.SphericalHead(loss, **{"lr": 0.5, **options}), targets="2")


def train(model: nn.Module, handle: Any, optimizer: Any, numbers: range) -> None:
    for number in numbers:
        x, y = batch(number)
        optimizer.zero_grad()
        handle.loss(model(x), y).backward()
        optimizer.step()


# ---- in a loop ------------------------------------------------------------------------------------------


def test_zero_grad_drops_the_heads_gradient_too() -> None:
    """A loop that skips a batch by it, whose loss is an outlier, must not step the head by that batch."""
    weights: list[Tensor] = []
    for skipped in (False, True):
        model = network()
        handle = attached(model)
        optimizer = optx.wrap(torch.optim.SGD(model.parameters(), lr=0.5), handle, fused=False)
        if skipped:
            x, y = batch(7)
            handle.loss(model(x), y).backward()
        train(model, handle, optimizer, range(1))  # begins with zero_grad()
        weights.append(handle.materialize().weight)
    assert torch.equal(*weights)


def test_it_learns_as_the_dense_model_and_leaves_a_plain_head() -> None:
    dense, model = network(), network()
    own: Any = model[2]
    keys, parameters = list(model.state_dict()), [id(p) for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)  # made before, and has the head's weight
    handle = attached(model)
    optimizer = optx.wrap(optimizer, handle, fused=False)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == set(parameters[:2])
    sgd, criterion = torch.optim.SGD(dense.parameters(), lr=0.5), optx.ZLoss(0.5, 4.0)
    for number in range(20):
        x, y = batch(number)
        sgd.zero_grad()
        criterion(dense(x), y).backward()
        sgd.step()
    train(model, handle, optimizer, range(20))
    assert handle.steps == 20
    x, y = batch(99)
    wanted = dense(x)
    torch.testing.assert_close(model.eval()(x), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(handle.loss(model[:2](x), y), criterion(wanted, y), rtol=1e-4, atol=0)
    torch.testing.assert_close(handle.materialize()(model[:2](x)), wanted, rtol=1e-4, atol=1e-5)
    handle.remove()
    assert model[2] is own
    assert type(own) is nn.Linear
    assert list(model.state_dict()) == keys
    assert [id(p) for p in model.parameters()] == parameters
    assert all(p.requires_grad for p in model.parameters())
    assert [id(p) for g in optimizer.param_groups for p in g["params"]] == parameters
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    optimizer.step()  # as before


def test_backward_passes_add_up_until_the_step() -> None:
    one, two = network(), network()
    first, second = attached(one), attached(two)
    (x, y), (x2, y2) = batch(0), batch(1)
    first.loss(one(torch.cat([x, x2])), torch.cat([y, y2])).backward()
    for part in ((x, y), (x2, y2)):
        (second.loss(two(part[0]), part[1]) / 2).backward()
    first.step()
    second.step()
    torch.testing.assert_close(first.materialize().weight, second.materialize().weight, rtol=0, atol=1e-6)
    before = two.state_dict()
    second.loss(two(x), y).backward()
    second.zero_grad()
    second.step()
    assert all(torch.equal(t, before[name]) for name, t in two.state_dict().items())


def test_a_skipped_step_leaves_nothing_behind() -> None:
    model = network()
    handle = attached(model)
    optimizer = optx.wrap(
        torch.optim.SGD(model.parameters(), lr=0.1), handle, fused=False, skip_nonfinite=True
    )
    x, y = batch(0)
    handle.loss(model(x), y).backward()
    next(model.parameters()).grad = torch.full((WIDTH, 3), torch.inf)
    before = handle.materialize().weight
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert torch.equal(handle.materialize().weight, before)
    handle.loss(model(x), y).backward()
    next(model.parameters()).grad = torch.zeros(WIDTH, 3)
    optimizer.step()
    assert handle.steps == 1
    other = network()
    one = attached(other)
    one.loss(other(x), y).backward()
    one.step()
    assert torch.equal(handle.materialize().weight, one.materialize().weight)  # of the second backward alone


def test_its_rate_is_scheduled_as_the_optimizers() -> None:
    moved: list[float] = []
    for factor in (1.0, 0.25):
        model = network()
        handle = attached(model, lr=0.2)
        optimizer = optx.wrap(torch.optim.AdamW(model.parameters(), lr=1e-3), handle, fused=False)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step, factor=factor: factor)
        before = handle.materialize().weight
        x, y = batch(0)
        handle.loss(model(x), y).backward()
        optimizer.step()
        scheduler.step()
        moved.append((handle.materialize().weight - before).norm().item())
    assert moved[1] == pytest.approx(moved[0] / 4, rel=1e-3)
    handle.lr = 0.0
    with pytest.raises(optx.OptxError, match="lr is -1"):
        handle.lr = -1


def test_labels_that_do_not_count_and_rows_one_by_one() -> None:
    model = network(bias=False)
    handle = attached(model, loss=optx.ZLoss(0.5, 4.0, reduction="none"))
    hidden = torch.randn(2, 3, WIDTH, requires_grad=True)
    y = torch.tensor([[1, -100, 7], [7, 39, -100]])
    losses = handle.loss(hidden, y)
    assert losses.dtype == torch.float32
    model.eval()
    wanted = optx.ZLoss(0.5, 4.0, reduction="none")(model[2](hidden).movedim(-1, 1), y)
    torch.testing.assert_close(losses, wanted)
    got, right = (torch.autograd.grad(one.sum(), hidden)[0] for one in (losses, wanted))
    torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-6)
    handle.zero_grad()
    handle.loss(hidden, y).sum().backward()  # in evaluation mode nothing is kept
    handle.step()
    assert handle.steps == 0


# ---- saved, copied, moved -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["model", "handle", "folder", "deepcopy"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(how: str, tmp_path: Path) -> None:
    options = {"stabilize_every": 3, "weight_decay": 0.1}
    model = network()
    handle = attached(model, **options)
    optimizer = optx.wrap(torch.optim.AdamW(model.parameters(), lr=0.01), handle, fused=False)
    train(model, handle, optimizer, range(5))
    other = network(1)
    if how == "deepcopy":
        other, again = copy.deepcopy((model, handle))
    else:
        again = attached(other, **options)
        if how == "model":
            torch.save(model.state_dict(), tmp_path / "model.pt")
            other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
        else:
            other[0].load_state_dict(model[0].state_dict())
        if how == "handle":
            again.load_state_dict(handle.state_dict())
        if how == "folder":
            again.remove()
            handle.save(tmp_path / "head")
            again = optx.attach(other, tmp_path / "head")
    resumed = optx.wrap(torch.optim.AdamW(other.parameters(), lr=0.01), again, fused=False)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch's shares tensors
    for one, its, by in ((model, handle, optimizer), (other, again, resumed)):
        train(one, its, by, range(5, 9))
    assert again.steps == 9
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def test_plain_checkpoints_go_both_ways() -> None:
    model, bare = network(), network(1)
    handle = attached(model)
    x, y = batch(0)
    model.load_state_dict(bare.state_dict())
    torch.testing.assert_close(model.eval()(x), bare(x), rtol=1e-5, atol=1e-6)
    handle.loss(model.train()(x), y).backward()
    handle.step()
    plain = {name: t for name, t in model.state_dict().items() if "optx" not in name}
    bare.load_state_dict(plain)
    torch.testing.assert_close(bare(x), model.eval()(x), rtol=1e-5, atol=1e-6)
    wrong = network()
    wrong[2] = nn.Linear(WIDTH, D + 1)
    with pytest.raises(RuntimeError, match=r"size mismatch for 2\.weight"):
        model.load_state_dict(wrong.state_dict())


def test_a_cast_of_the_model_leaves_the_factors_their_precision() -> None:
    model = network()
    handle = attached(model)
    model.bfloat16()
    part = handle._part
    assert (part.V.dtype, part.U.dtype, part.Q.dtype) == (torch.float32, torch.float64, torch.float64)
    x, y = batch(0)
    loss = handle.loss(model(x.bfloat16()), y)
    loss.backward()
    handle.step()
    assert loss.dtype == torch.float32
    assert model.eval()(x.bfloat16()).dtype == torch.bfloat16
    handle.remove()
    assert model[2].weight.dtype == torch.bfloat16


def test_removed_at_once_it_was_never_there() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    with attached(model) as handle:
        assert "40 classes" in str(handle.report())
        assert handle.merge_and_unload() is model
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


# ---- what is forgotten, and what is refused -------------------------------------------------------------


def test_an_output_that_nobody_makes_a_loss_of_is_told_once() -> None:
    model = network()
    attached(model)
    x, _ = batch(0)
    assert model(x).shape == (6, WIDTH)
    with pytest.warns(UserWarning, match=r"'2' hands on its input, for handle.loss"):
        model(x)
    model(x)


def test_steps_that_nobody_takes_are_told_once() -> None:
    model = network()
    handle = attached(model)
    x, y = batch(0)
    hidden = model(x).detach()
    losses = [handle.loss(hidden, y) for _ in range(33)]
    for loss in losses[:31]:
        loss.backward()
    with pytest.warns(UserWarning, match="32 backward passes and no step"):
        losses[31].backward()
    losses[32].backward()


def test_a_loss_of_weights_that_are_gone() -> None:
    model = network()
    handle = attached(model)
    x, y = batch(0)
    late, loss = handle.loss(model(x), y), handle.loss(model(x), y)
    loss.backward()
    handle.step()
    with pytest.raises(optx.OptxError, match="'2' was stepped between this loss and its backward pass"):
        late.backward()


@pytest.mark.parametrize(
    ("hidden", "labels", "error", "said"),
    [
        (
            torch.zeros(2, WIDTH),
            torch.tensor([0, D]),
            IndexError,
            r"label 40 \(number 1 of 2\) is out of range",
        ),
        (torch.zeros(2, WIDTH), torch.tensor([-1, 0]), IndexError, r"label -1 \(number 0 of 2\)"),
        (torch.zeros(2, WIDTH), torch.tensor([0]), optx.ShapeError, r"labels have shape \(1,\)"),
        (torch.zeros(2, D), torch.tensor([0, 1]), optx.ShapeError, r"it is the head's input, \(..., 5\)"),
        (torch.zeros(2, WIDTH), torch.zeros(2), TypeError, "labels have dtype torch.float32"),
        (torch.zeros(2, WIDTH).half(), torch.tensor([0, 1]), TypeError, "hidden has dtype torch.float16"),
        (
            torch.full((2, WIDTH), torch.inf),
            torch.tensor([0, 1]),
            optx.OptxError,
            "the loss of example 0 is nan",
        ),
        (
            torch.full((2, WIDTH), 1e200, dtype=torch.float64),
            torch.tensor([0, 1]),
            optx.OptxError,
            "scale has overflowed",
        ),
    ],
)
def test_inputs_that_do_not_fit(hidden: Tensor, labels: Tensor, error: Any, said: str) -> None:
    handle = attached(network())
    with pytest.raises(error, match=f"SphericalHead: .*{said}"):
        handle.loss(hidden, labels)
    assert not handle._part.pending


def test_a_step_that_overflows_changes_nothing() -> None:
    model = network()
    handle = attached(model, loss=optx.ZLoss(form="mse"))
    before = copy.deepcopy(model.state_dict())
    handle.lr = 1e300
    x, y = batch(0)
    handle.loss(model(x), y).backward()
    with pytest.raises(optx.OptxError, match="the step has a number that is not finite"):
        handle.step()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    with pytest.raises(optx.OptxError, match="the loss was multiplied by 65536"):
        (65536 * handle.loss(model(x), y)).backward()


def test_heads_that_it_can_not_serve() -> None:
    def refused(said: str, model: nn.Module, injection: Any = None, **options: Any) -> None:
        before = list(model.state_dict())
        with pytest.raises(optx.TargetError, match=said):
            optx.attach(model, injection or optx.SphericalHead(), **options)
        assert list(model.state_dict()) == before

    tied = nn.Sequential(nn.Embedding(D, WIDTH), nn.Linear(WIDTH, D, bias=False))
    tied[1].weight = tied[0].weight
    refused(r"the head '1' is tied \(0\.weight, 1\.weight are one tensor\)", tied, targets="1")
    refused("serves one head, and targets match 2", network(), targets="0|2")
    refused("'1' is a Tanh", network(), targets="1")
    refused("this Sequential says of no module that it is its output head", network())
    zeros = network()
    for p in zeros[2].parameters():
        nn.init.zeros_(p)
    refused("all rows of the weight of '2' are equal", zeros, targets="2")
    infinite = network()
    nn.init.constant_(infinite[2].weight, torch.inf)
    refused("its weight has inf or nan", infinite, targets="2")
    busy = network()
    optx.attach(busy, optx.LoRA(rank=1), targets="2")
    refused("'lora' is attached to '2' already", busy, targets="2")
    model = network()
    handle = attached(model)
    with pytest.raises(optx.TransformError, match="LBFGS evaluates the model several times"):
        optx.wrap(torch.optim.LBFGS(model.parameters()), handle, fused=False)
    for call, said in ((handle.merge, "the weight itself"), (handle.disable, "only weight")):
        with pytest.raises(optx.OptxError, match=said):
            call()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"loss": nn.CrossEntropyLoss()}, r"loss is CrossEntropyLoss\(\); it must be an optx.ZLoss"),
        ({"lr": 0.0}, "lr is 0.0; it must be a finite number above 0"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1; it must be at least 0"),
        ({"lr": 2.0, "weight_decay": 0.5}, r"lr \* weight_decay is 1, with which a step leaves nothing"),
        ({"stabilize_every": 0}, "stabilize_every is 0; it must be at least 1"),
        ({"recompute_every": 1.5}, "recompute_every is 1.5; it must be a whole number"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], said: str) -> None:
    with pytest.raises(optx.OptxError, match=f"SphericalHead: {said}"):
        optx.SphericalHead(**options)
