"""AdaWPT's properties, on a block of one's own: dropped windows pass through, kept ones are as they were."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from injections import assert_same, snapshot
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from window_models import Block, blocks, image, move, own

import optx
from optx.inject._window_grid import Grid, expand
from optx.inject._window_policy import draw, threshold


def attached(model: nn.Module, **options: Any) -> optx.WindowHandle:
    torch.manual_seed(2)
    return optx.attach(model, optx.WindowPrune(blocks=blocks, **options))


def tokens_of(handle: optx.WindowHandle, path: str) -> Tensor:
    return handle.maps()[path][:, 0]


# ---- windows ----------------------------------------------------------------------------------------------


@given(
    height=st.integers(1, 11),
    width=st.integers(1, 11),
    window=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    shift=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    roll_first=st.booleans(),
)
def test_windows_come_back_as_they_were(
    height: int, width: int, window: tuple[int, int], shift: tuple[int, int], roll_first: bool
) -> None:
    shift = shift[0] % window[0], shift[1] % window[1]
    grid = Grid(height, width, window, shift, roll_first)
    x = torch.randn(2, height, width, 3)
    cut = grid.split(x)
    assert torch.equal(grid.join(cut), x)
    assert cut.shape == (2 * grid.counts[0] * grid.counts[1], window[0] * window[1], 3)
    ones = torch.ones(2, height, width, 1)
    assert torch.equal(grid.means(ones), torch.ones(len(cut), 1))  # padding counts for nothing
    weights = grid.split(ones).sum(1)
    torch.testing.assert_close((grid.means(x) * weights).sum(0), x.sum((0, 1, 2)), rtol=1e-4, atol=1e-4)


def test_the_windows_of_the_papers_example() -> None:
    """Property 5: means of the tokens' logits, and what is kept by them."""
    y, x = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    logits = torch.stack([0.5 * torch.sin(y + 2 * x), 0.3 * torch.cos(2 * y - x)], dim=-1)[None]
    means = Grid(4, 4, (2, 2)).means(logits)
    want = [(0.236486, 0.124834), (-0.167269, 0.010062), (-0.083164, -0.029985), (0.222381, -0.113961)]
    torch.testing.assert_close(means, torch.tensor(want), atol=1e-6, rtol=0)
    assert threshold(means).tolist() == [1, 0, 0, 1]


def test_a_tie_is_dropped() -> None:
    assert threshold(torch.tensor([[0.25, 0.25], [0.25, 0.2490234375]])).tolist() == [0, 1]


# ---- the draw ---------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 10_000), tau=st.sampled_from([0.3, 1.0, 2.5]))
def test_the_draw_is_0_or_1_and_its_slope_the_softmaxs(seed: int, tau: float) -> None:
    """Property 4."""
    torch.manual_seed(seed)
    z = torch.randn(7, 2, requires_grad=True)
    torch.manual_seed(seed)
    d = draw(z, tau)
    assert set(d.tolist()) <= {0.0, 1.0}
    torch.manual_seed(seed)
    noise = -torch.empty(7, 2).exponential_().log()
    y = ((z.detach() + noise) / tau).softmax(-1)
    assert torch.equal(d.detach() == 1, y[:, 0] > y[:, 1])
    (slope,) = torch.autograd.grad(d.sum(), z)
    want = y[:, 0] * y[:, 1] / tau
    torch.testing.assert_close(slope, torch.stack([want, -want], -1))


# ---- blocks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(12, 8), (10, 7)], ids=["whole", "padded"])
def test_with_all_kept_it_is_the_dense_block(shape: tuple[int, int]) -> None:
    """Property 1, in both modes."""
    model, x = own().eval(), image(3, *shape)
    want = model(x)
    handle = attached(model)
    with handle.force(keep_all=True):
        torch.testing.assert_close(model(x), want, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(model.train()(x), want, atol=1e-6, rtol=1e-6)
    assert handle.active_ratio() == 1


@pytest.mark.parametrize("shape", [(12, 8), (10, 7)], ids=["whole", "padded"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("shift", [0, 2])
def test_masked_is_gathered(batch: int, shift: int, shape: tuple[int, int]) -> None:
    """Properties 2 and 3: one policy in both modes, and what it drops is what came in."""
    torch.manual_seed(0)
    model, x = nn.Sequential(Block(shift=shift)), image(batch, *shape)
    handle = attached(model)
    policy = torch.rand(batch, 1, 3, 2, generator=torch.Generator().manual_seed(4)) < 0.5
    with handle.force({"0": policy}):
        masked = model.train()(x)
        gathered = model.eval()(x)
    torch.testing.assert_close(gathered, masked, atol=1e-5, rtol=1e-5)
    kept = tokens_of(handle, "0")
    assert 0 < kept.float().mean() < 1
    assert torch.equal(masked[~kept], x[~kept])
    assert torch.equal(gathered[~kept], x[~kept])
    assert (gathered != x).any(-1)[kept].all()


def test_one_image_has_nothing_of_another() -> None:
    """The masks of shifted windows are one image's; gathered windows are of several."""
    model, x = own().eval(), image(3)
    handle = attached(model)
    policies = {str(i): torch.rand(3, 1, 3, 2) < 0.6 for i in range(4)}
    with handle.force(policies):
        together = model(x)
    for i in range(3):
        with handle.force({path: one[i : i + 1] for path, one in policies.items()}):
            torch.testing.assert_close(model(x[i : i + 1])[0], together[i], atol=1e-6, rtol=1e-6)


def test_with_none_kept_the_input_itself_comes_back() -> None:
    model, x = own(), image()
    handle = attached(model)
    with torch.no_grad():
        for _, part in handle._parts():
            if part.predictor is not None:
                part.predictor.score[-1].bias.copy_(torch.tensor([-10.0, 10.0]))
    assert model.eval()(x) is x
    assert torch.equal(model.train()(x), x)
    assert handle.active_ratio() == 0
    assert handle.cost().active == 0
    with torch.no_grad():
        for _, part in handle._parts():
            if part.predictor is not None:
                part.predictor.score[-1].bias.copy_(torch.tensor([10.0, -10.0]))
    model.eval()(x)
    assert handle.active_ratio() == 1  # property 7


def test_drop_path_is_of_whole_images() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(Block(drop=0.5)).train()
    x = image(8)
    torch.manual_seed(6)
    want = dense(x)
    handle = attached(dense)
    handle.force(keep_all=True)
    for _, part in handle._parts():
        part.predictor = None  # whose noise would come before
        part.place.chain.policy, part.place.chain.grid = torch.ones(8 * 6), Grid(12, 8, (4, 4))
        part.place.chain.clear = lambda: None  # type: ignore[method-assign]
    torch.manual_seed(6)
    torch.testing.assert_close(dense(x), want, atol=1e-6, rtol=1e-6)


# ---- policies ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_once_dropped_is_dropped_and_chains_are_apart(training: bool) -> None:
    """Property 6."""
    model = own(6).train(training)
    handle = attached(model, share_policy="block")
    for _, part in handle._parts():  # each keeps about a half by itself
        part.predictor.register_forward_hook(lambda module, args, z: 50 * (z - z.mean((0, 1, 2))))
    model(image(8))
    found = list(handle.decisions.values())
    for chain in (found[0::2], found[1::2]):
        for earlier, later in itertools.pairwise(chain):
            assert not (later & ~earlier).any()
        assert (chain[0] & ~chain[-1]).any()
    assert (found[1] & ~found[0]).any()


def test_a_stage_shares_the_policy_of_its_first_blocks() -> None:
    model = nn.ModuleDict({"a": own(4), "b": own(2, seed=1)})
    handle = attached(model, share_policy="stage")
    predicting = [path for path, part in handle._parts() if part.predictor is not None]
    assert predicting == ["a.0", "a.1", "b.0", "b.1"]
    model["a"].eval()(image())
    found = handle.decisions
    assert torch.equal(found["a.0"], found["a.2"])
    assert torch.equal(found["a.1"], found["a.3"])
    assert list(found) == ["a.0", "a.1", "a.2", "a.3"]


@pytest.mark.parametrize("source", ["task", "mask"])
def test_predictors_learn_from_either_loss_alone(source: str) -> None:
    """Property 8; the input's gradient goes through the predictor too, which is not detached."""
    model, x = own(2).train(), image().requires_grad_()
    handle = attached(model)
    output = model(x)
    own_loss = handle.loss(torch.rand(3, 12, 8) < 0.3)
    (output.square().mean() if source == "task" else own_loss).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in handle.parameters())
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


# ---- life -------------------------------------------------------------------------------------------------


def test_remove_gives_the_dense_model_back() -> None:
    model, x = own().eval(), image()
    before, want = snapshot(model), model(x)
    handle = attached(model)
    model(x)
    handle.remove()
    assert_same(model, before)
    assert torch.equal(model(x), want)


def test_a_saved_predictor_decides_as_before(tmp_path: Any) -> None:
    model, x = own().eval(), image(8)
    handle = attached(model)
    move(handle)
    want, decided = model(x), handle.decisions
    handle.save(tmp_path / "a")
    handle.remove()
    again = attached(model)
    assert not torch.equal(model(x), want)
    again.load(tmp_path / "a")
    assert torch.equal(model(x), want)
    assert all(torch.equal(one, again.decisions[path]) for path, one in decided.items())


def test_a_copy_decides_by_itself() -> None:
    model, x = own().train(), image()
    handle = attached(model)
    model(x).sum()
    twin, other = copy.deepcopy((model, handle))
    other.force(keep_all=True)
    twin(x)
    model.eval()(x)
    assert other.active_ratio() == 1 > handle.active_ratio()
    chains = {id(part.place.chain) for _, part in other._parts()}
    assert len(chains) == 2
    assert not chains & {id(part.place.chain) for _, part in handle._parts()}


def gradients(model: nn.Module, handle: optx.WindowHandle, x: Tensor, between: bool = False) -> list[Tensor]:
    torch.manual_seed(7)
    loss = model(x).square().mean() + handle.loss(torch.ones(len(x), 12, 8))
    if between:  # another forward, whose policies are no longer these
        model(image(2, seed=9)).sum()
        handle.loss(torch.ones(2, 12, 8))
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("between", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_checkpoints_change_no_gradient(whole: bool, between: bool) -> None:
    model = own(drop=0.3).train()
    handle = attached(model)
    want = gradients(model, handle, image())

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            if whole:
                return checkpoint(model, x, use_reentrant=False)
            for block in model:
                x = checkpoint(block, x, use_reentrant=False)
            return x

    got = gradients(Checkpointed(), handle, image(), between)
    assert all(map(torch.equal, got, want))


def test_a_run_is_seeded_by_torch_and_resumes() -> None:
    def steps(model: nn.Module, handle: optx.WindowHandle, count: int) -> list[float]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses: list[float] = []
        for _ in range(count):
            loss = model(image()).square().mean() + handle.loss(torch.ones(3, 12, 8))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    model = own(2).train()
    handle = attached(model)
    torch.manual_seed(3)
    steps(model, handle, 2)
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    want = steps(model, handle, 2)
    fresh = own(2, seed=5).train()
    other = attached(fresh)
    fresh.load_state_dict(state)
    torch.set_rng_state(random)
    assert steps(fresh, other, 2) == want


@pytest.mark.parametrize("how", ["bf16", "autocast"])
def test_half_precision(how: str) -> None:
    model, x = own().train(), image()
    if how == "bf16":
        model, x = model.bfloat16(), x.bfloat16()
    handle = attached(model)
    assert all(p.dtype == torch.float32 for p in handle.parameters())  # scores near a tie decide
    policies = {str(i): torch.rand(3, 1, 3, 2) < 0.6 for i in range(4)}
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        with handle.force(policies):
            masked = model(x)
            assert handle.loss(torch.ones(3, 12, 8)).dtype == torch.float32
            torch.testing.assert_close(model.eval()(x), masked, atol=0.03, rtol=0.03)
        model.train()(x).float().square().mean().backward()
    kept = tokens_of(handle, "3") | tokens_of(handle, "2") | tokens_of(handle, "1") | tokens_of(handle, "0")
    assert masked.dtype == x.dtype
    assert F.mse_loss(masked.float(), x.float()) > 0
    assert kept.any()


def test_shifted_maps_lie_where_the_image_is() -> None:
    grid = Grid(8, 8, (4, 4), (2, 2))
    first = torch.zeros(1, 1, 2, 2, dtype=torch.bool)
    first[0, 0, 0, 0] = True
    want = torch.zeros(8, 8, dtype=torch.bool)
    want[2:6, 2:6] = True
    assert torch.equal(expand(first, grid)[0, 0], want)
