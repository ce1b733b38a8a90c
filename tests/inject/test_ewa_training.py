"""EWA in training: which steps average, what an optimizer has, resuming, several processes."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ffn_models import Vit, patches, vit
from processes import on_processes
from test_ewa import attached
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import optx


def spread(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for name, p in model.named_parameters() if ".experts." in name]


def made(lr: float = 0.05, before: bool = True, **options: Any) -> tuple[Vit, optx.ExpertHandle, Any]:
    """A model with experts, and an optimizer that was there first or came later."""
    model = vit(depth=2)
    base = torch.optim.AdamW(model.parameters(), lr=lr) if before else None
    handle = attached(model, **{"schedule": "linear", "total_steps": 8, "beta": 0.6, **options})
    base = base or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    return model, handle, optx.wrap(base, handle)


def train(model: nn.Module, opt: Any, steps: range) -> None:
    for step in steps:
        torch.manual_seed(100 + step)
        opt.zero_grad()
        model(patches(seed=step)).square().mean().backward()
        opt.step()


def test_a_wrapped_optimizer_trains_experts_and_averages_them() -> None:
    model, handle, opt = made()
    groups = {id(p) for group in opt.param_groups for p in group["params"]}
    assert groups == {id(p) for p in model.parameters() if p.requires_grad}
    own = model.blocks[0].mlp.fc1.weight.clone()
    train(model, opt, range(3))
    assert (handle.steps, handle.beta) == (3, pytest.approx(0.6 * 3 / 8))
    alone, other, _ = made()
    by_hand = torch.optim.AdamW([p for p in alone.parameters() if p.requires_grad], lr=0.05)
    for step in range(3):
        train(alone, by_hand, range(step, step + 1))
        other.step()
    torch.testing.assert_close(spread(model), spread(alone))  # the step is fused in one of them
    mean = model.blocks[0].mlp.fc1.weight.clone()
    assert not torch.equal(mean, own)
    torch.testing.assert_close(model.state_dict()["blocks.0.mlp.fc1.weight"], mean, atol=1e-7, rtol=1e-6)
    handle.merge_and_unload()
    train(model, opt, range(3, 5))
    assert opt.transforms == ()
    assert id(model.blocks[0].mlp.fc1.weight) in {
        id(p) for group in opt.param_groups for p in group["params"]
    }


def test_a_resumed_run_is_the_uninterrupted_one() -> None:
    model, handle, opt = made()
    train(model, opt, range(3))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
    train(model, opt, range(3, 6))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    twin, again, other = made()
    twin.load_state_dict(saved["model"])
    other.load_state_dict(saved["opt"])
    assert again.steps == 3
    train(twin, other, range(3, 6))
    assert again.beta == handle.beta
    assert all(torch.equal(t, twin.state_dict()[name]) for name, t in model.state_dict().items())


def test_a_copy_of_model_and_optimizer_goes_on_by_itself() -> None:
    model, handle, opt = made()
    train(model, opt, range(2))
    twin, other = copy.deepcopy((model, opt))
    before = spread(model)
    train(twin, other, range(2, 4))
    assert handle.steps == 2
    assert all(map(torch.equal, spread(model), before))
    train(model, opt, range(2, 4))
    assert all(map(torch.equal, spread(model), spread(twin)))


# ---- steps that are none ---------------------------------------------------------------------------------


def test_accumulation_averages_once() -> None:
    model, handle, opt = made()
    for _ in range(3):
        model(patches()).square().mean().backward()
    opt.step()
    assert handle.steps == 1


def test_skipped_steps_do_not_average() -> None:
    model, handle, _ = made()
    base = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    opt: Any = optx.wrap(base, *handle.transforms(), skip_nonfinite=True)
    before = spread(model)
    (model(patches()).square().mean() * float("inf")).backward()
    opt.step()
    assert opt.skipped_steps == 1
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    opt.zero_grad()
    scaler.scale(model(patches()).sum() * float("nan")).backward()
    scaler.step(opt)
    scaler.update()
    assert handle.steps == 0
    assert all(map(torch.equal, spread(model), before))
    assert handle.metrics()["ewa/beta"] == handle.metrics()["ewa/spread"] == 0
    opt.zero_grad()
    scaler.scale(model(patches()).sum()).backward()
    scaler.step(opt)
    assert handle.steps == 1


def test_the_rehearsal_of_a_checkpoint_moves_nothing() -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model, handle, opt = made()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in handle.parameters():
            p.add_(torch.randn_like(p))
    before = spread(model)
    get_optimizer_state_dict(model, opt)
    assert handle.steps == 0
    assert all(map(torch.equal, spread(model), before))


def test_released_backward_passes_average_at_the_end_of_a_step() -> None:
    model, handle, opt = made()
    twin, its, other = made()
    released = opt.release(model)
    for step in range(2):
        torch.manual_seed(step)
        with released:
            model(patches(seed=step)).square().mean().backward()
        opt.step()
        torch.manual_seed(step)
        other.zero_grad()
        twin(patches(seed=step)).square().mean().backward()
        other.step()
    assert handle.steps == its.steps == 2
    torch.testing.assert_close(spread(model), spread(twin))


def test_two_handles_on_one_optimizer() -> None:
    model = vit(depth=2)
    first = optx.attach(model, optx.EWA(beta=0.5), "blocks.0.mlp")
    second = optx.attach(model, optx.EWA(beta=0.2, experts=2), "blocks.1.mlp", name="later")
    base = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    opt = optx.wrap(base, first, second)
    train(model, opt, range(2))
    assert (first.steps, second.steps) == (2, 2)


def test_half_precision_is_averaged_in_float32() -> None:
    model = vit(depth=1).to(torch.bfloat16)
    handle = attached(model, beta=0.3)
    weights = [expert.fc1.bias for expert in model.blocks[0].mlp.optx.ewa.experts]
    with torch.no_grad():
        for w, value in zip(weights, (1.0, 2.0, 3.0, 6.0), strict=True):
            w.fill_(value)
    handle.step()
    want = torch.tensor([1.8, 2.4, 3.0, 4.8]).bfloat16().tolist()
    assert [w[0].item() for w in weights] == want


def test_files_hold_experts_and_their_count(tmp_path: Any) -> None:
    model, handle, opt = made()
    train(model, opt, range(2))
    handle.save(tmp_path / "experts")
    other = vit(depth=2)
    again = optx.attach(other, tmp_path / "experts")
    assert again.injection == handle.injection
    assert again.steps == 2  # type: ignore[attr-defined]
    assert all(map(torch.equal, spread(other), spread(model)))


# ---- several processes -----------------------------------------------------------------------------------


def ranks_draw_their_own_orders_and_stay_together(rank: int) -> None:
    model, handle, opt = made()
    call = DistributedDataParallel(model)
    for step in range(3):
        torch.manual_seed(10 * step + rank)
        opt.zero_grad()
        call(patches(seed=10 * step + rank)).square().mean().backward()
        opt.step()
    assert handle.steps == 3
    mine = torch.cat([t.flatten() for t in spread(model)])
    both = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(both, mine)
    assert torch.equal(*both)


def sharded_experts_are_those_of_one_process(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    plain, own, base = made()
    model = vit(depth=2)
    handle = attached(model, schedule="linear", total_steps=8, beta=0.6)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    opt = optx.wrap(torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05), handle)
    train(plain, base, range(3))
    train(model, opt, range(3))
    assert handle.steps == own.steps == 3
    want = plain.eval().state_dict()
    for name, t in model.eval().state_dict().items():
        torch.testing.assert_close(t.full_tensor() if hasattr(t, "full_tensor") else t, want[name])
    with torch.no_grad():
        torch.testing.assert_close(model(patches()), plain(patches()))


CASES = [ranks_draw_their_own_orders_and_stay_together, sharded_experts_are_those_of_one_process]

if dist.is_gloo_available():
    test_on_two_processes = on_processes(2, *CASES)
