"""`Wrapped.release`: backward takes the step, tensor by tensor, to the bit as ``step()`` does."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import on_processes
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import optx


class Tied(nn.Module):
    """An embedding that is the head too, a weight that only some batches use, and one that none does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(12, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.rare = nn.Linear(6, 6)
        self.never = nn.Linear(2, 2)

    def forward(self, x: Tensor, rare: bool = False) -> Tensor:
        h = self.embed(x)
        for layer in self.layers:
            h = torch.tanh(layer(h))
        if rare:
            h = h + self.rare(h)
        return h @ self.embed.weight.t()


def loss_of(net: nn.Module, number: int, rare: bool = False) -> Tensor:
    x = torch.randint(12, (4, 5), generator=torch.Generator().manual_seed(number))
    return nn.functional.cross_entropy(net(x, rare).flatten(0, 1), x.flatten())


def adamw(net: nn.Module, *transforms: optx.Transform, **settings: Any) -> optx.Wrapped:
    named = list(net.named_parameters())
    groups = [{"params": named[:3]}, {"params": named[3:], "lr": 0.003, "weight_decay": 0.0}]
    return optx.wrap(torch.optim.AdamW(groups, lr=0.01), *transforms, **settings)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def trained(
    make: Callable[[], Sequence[optx.Transform]], released: bool, dtype: torch.dtype, micro: int
) -> tuple[dict[str, Tensor], Any, list[int]]:
    net = Tied().to(dtype)
    opt = adamw(net, *make(), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1.0 / (1 + step))
    counts: list[int] = []
    opt.register_step_post_hook(lambda *_: counts.append(1))
    handle = opt.release(net) if released else None
    for step in range(3):
        for i in range(micro - 1):
            (loss_of(net, 10 * step + i, rare=step == 1) / micro).backward()
        if handle is None:
            (loss_of(net, 10 * step + 9) / micro).backward()
        else:
            with handle:
                (loss_of(net, 10 * step + 9) / micro).backward()
        opt.step()
        schedule.step()
        assert handle is None or all(p.grad is None for p in net.parameters())
        opt.zero_grad()
    assert "never.weight" not in {n for n, p in net.named_parameters() if p in opt.state}
    return net.state_dict(), opt.state_dict(), counts


CHAINS: dict[str, Callable[[], Sequence[optx.Transform]]] = {
    "AdamW": list,
    "PerpGrad": lambda: [optx.PerpGrad()],
    "AdamR": lambda: [optx.AdamR(0.5, normalize=False)],
}
CASES = [
    *((name, torch.float32, 3) for name in CHAINS),
    ("AdamW", torch.float32, 1),
    ("AdamW", torch.bfloat16, 1),
]


@pytest.mark.parametrize(("chain", "dtype", "micro"), CASES)
def test_it_is_the_ordinary_step_to_the_bit(chain: str, dtype: torch.dtype, micro: int) -> None:
    """With a tied weight, a schedule, weights that only an earlier micro-batch reached, draws of rounding."""
    found = [trained(CHAINS[chain], released, dtype, micro) for released in (False, True)]
    assert same(*found)
    assert found[1][2] == [1, 1, 1]


def test_a_base_that_counts_in_its_groups_counts_once() -> None:
    lion = pytest.importorskip("pytorch_optimizer").Lion
    found = []
    for released in (False, True):
        net = Tied()
        opt = optx.wrap(lion(net.parameters(), lr=0.01), fused=True)
        handle = opt.release(net) if released else contextlib.nullcontext()
        for step in range(2):
            with handle:
                loss_of(net, step).backward()
            opt.step()
            opt.zero_grad()
        assert opt.param_groups[0]["step"] == 2
        found.append((dict(net.state_dict()), opt.state_dict()))
    assert same(*found)


def test_one_layers_gradients_are_there_at_once() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(20, 20) for _ in range(6)))
    opt = optx.wrap(torch.optim.AdamW(net.parameters(), lr=0.01), fused=True)
    handle = opt.release(net)
    alive: list[int] = []
    for p in net.parameters():  # after ours
        p.register_hook(
            lambda _: alive.append(sum(q.grad.nbytes for q in net.parameters() if q.grad is not None))
        )
    for _ in range(2):
        with handle:
            net(torch.randn(3, 20)).square().sum().backward()
        opt.step()
    assert len(alive) == 24
    assert max(alive) <= (20 * 20 + 20) * 4


def test_outside_of_the_block_nothing_is_stepped() -> None:
    net = Tied()
    opt = adamw(net, fused=True)
    handle = opt.release(net)
    assert opt.released is handle
    start = copy.deepcopy(net.state_dict())
    loss_of(net, 0).backward()
    assert same(dict(net.state_dict()), dict(start))
    with pytest.warns(UserWarning, match="no backward pass was run in `with released:`"):
        opt.step()
    assert not same(dict(net.state_dict()), dict(start))
    loss_of(net, 1).backward()
    opt.step()  # told once
    handle.remove()
    assert opt.released is None
    assert handle.removed
    loss_of(net, 2).backward()
    opt.step()
    with pytest.raises(optx.OptxError, match="it was removed"), handle:
        pass


def test_a_step_is_closed_once_and_before_the_next() -> None:
    net = Tied()
    opt = adamw(net, fused=True)
    handle = opt.release(net)
    with handle:
        loss_of(net, 0).backward()
    with pytest.raises(optx.OptxError, match="which closes it, was not called since"), handle:
        pass
    with pytest.raises(optx.OptxError, match="got another gradient after it was stepped"):
        loss_of(net, 1).backward()
    with pytest.raises(optx.OptxError, match=r"state_dict\(\) was called while a step is open"):
        opt.state_dict()
    with pytest.raises(optx.OptxError, match=r"remove\(\) was called while a step is open"):
        handle.remove()
    with pytest.raises(optx.OptxError, match=r"step\(closure\) can't close"):
        opt.step(lambda: 0.0)
    opt.zero_grad()
    opt.step()
    with pytest.warns(UserWarning, match="found no gradient on any parameter"):
        opt.step()  # again, without a backward pass
    with handle, pytest.raises(optx.OptxError, match="called inside the block"):
        opt.step()


class _Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError("out of memory")


def test_an_error_in_the_midst_is_told_until_it_is_settled() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    opt = optx.wrap(torch.optim.AdamW(net.parameters(), lr=0.01), fused=True)
    handle = opt.release(net)
    saved = opt.state_dict()
    for settle in (handle.discard, lambda: opt.load_state_dict(saved)):
        start = [p.detach().clone() for p in net.parameters()]
        with pytest.raises(RuntimeError, match="out of memory"), handle:
            net[2:](_Fails.apply(net[:2](torch.randn(3, 4)))).square().sum().backward()
        moved = [not torch.equal(p, s) for p, s in zip(net.parameters(), start, strict=True)]
        assert moved == [False] * 4 + [True] * 4
        for use in (opt.step, opt.state_dict, handle.__enter__):
            with pytest.raises(optx.OptxError, match="when 4 of 8 parameters had been stepped"):
                use()
        settle()
        with handle:
            net(torch.randn(3, 4)).square().sum().backward()
        opt.step()
    with pytest.raises(RuntimeError, match="before"), handle:  # nothing was stepped, so nothing is broken
        raise RuntimeError("before")
    with handle:
        net(torch.randn(3, 4)).square().sum().backward()
    opt.step()


def test_reentrant_segments_of_one_weight_are_noticed() -> None:
    layer = nn.Linear(4, 4)
    opt = optx.wrap(torch.optim.AdamW(layer.parameters()), fused=True)
    handle = opt.release(layer)
    x = torch.randn(2, 4, requires_grad=True)
    twice = checkpoint(layer, checkpoint(layer, x, use_reentrant=True), use_reentrant=True)
    with pytest.raises(optx.OptxError, match="use_reentrant=False"), handle:
        twice.sum().backward()
    handle.discard()
    with handle:
        checkpoint(layer, checkpoint(layer, x, use_reentrant=False), use_reentrant=False).sum().backward()
    opt.step()


def test_metrics_are_of_what_backward_stepped() -> None:
    found = []
    for released in (False, True):
        net = Tied()
        opt = adamw(net, optx.PerpGrad(), fused=True, metrics=True)
        if released:
            with opt.release(net):
                loss_of(net, 0).backward()
        else:
            loss_of(net, 0).backward()
        opt.step()
        found.append(opt.metrics())
    assert found[0] == pytest.approx(found[1], rel=1e-12)
    assert "perp_grad/removed" in found[0]


def test_a_copy_is_not_released_and_new_groups_are() -> None:
    net = Tied()
    opt = adamw(net, fused=True)
    handle = opt.release(net)
    other, copied = copy.deepcopy((net, opt))
    assert copied.released is None
    loss_of(other, 0).backward()
    copied.step()
    net.late = nn.Linear(1, 1)
    opt.add_param_group({"params": [(f"late.{name}", p) for name, p in net.late.named_parameters()]})
    with handle:
        (loss_of(net, 0) + net.late(torch.ones(1)).sum()).backward()
        assert net.late.weight.grad is None
    opt.step()


# ---- what is refused ---------------------------------------------------------------------------------------


def _hooked(opt: optx.Wrapped) -> None:
    opt.base.register_step_pre_hook(lambda *_: None)


REFUSED: dict[str, tuple[Any, dict[str, Any], Any, str]] = {
    "a total": ([optx.AdamR, optx.Clip], {}, None, "group 0 .*AdamR and Clip waits for a total"),
    "not fused": ([], {"fused": False}, None, r"it is not fused \(fused=False\)"),
    "skipping": ([], {"skip_nonfinite": True}, None, "skip_nonfinite=True looks at all gradients"),
    "a look at all": ([lambda: optx.SaRA(threshold=0.1)], {}, None, "SaRA looks at all gradients before"),
    "a pre-hook": ([], {}, _hooked, "a step pre-hook is registered"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    makes, settings, change, words = REFUSED[case]
    net = Tied()
    opt = adamw(net, *(make() for make in makes), **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if change is not None:
            change(opt)
        with pytest.raises(optx.OptxError, match=f"release: .*{words}"):
            opt.release(net)
    assert opt.released is None
    assert not any(p._post_accumulate_grad_hooks for p in net.parameters())  # type: ignore[attr-defined]


def test_another_model_and_another_time() -> None:
    net = Tied()
    opt = adamw(net, fused=True)
    with pytest.raises(optx.OptxError, match="is no parameter of the model that was given"):
        opt.release(Tied())
    with pytest.raises(optx.OptxError, match="model is a int"):
        opt.release(3)  # type: ignore[arg-type]
    opt.release(net)
    with pytest.raises(optx.OptxError, match="released already"):
        opt.release(net)


def test_plan_says_what_waits() -> None:
    net = Tied()
    opt = adamw(net, optx.PerpGrad(), optx.Clip(), optx.AdamR(normalize=False), skip_nonfinite=True)
    assert opt.plan()[0].waits == ("Clip", "skip_nonfinite")
    assert "\n    waits for a total: Clip and skip_nonfinite (opt.release would refuse it)" in str(opt.plan())
    assert adamw(Tied(), optx.PerpGrad()).plan()[0].waits == ()


def test_a_transform_that_came_later_is_looked_at() -> None:
    net = Tied()
    opt = adamw(net, fused=True)
    handle = opt.release(net)
    optx.wrap(opt, optx.Clip())
    with pytest.raises(optx.OptxError, match="Clip waits for a total"), handle:
        pass


def test_a_grad_scaler_is_refused() -> None:
    net = Tied()
    opt = adamw(net, fused=True)
    handle = opt.release(net)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    with pytest.raises(optx.OptxError, match="a GradScaler is in use"), handle:
        pass
    del scaler
    with handle:
        loss_of(net, 0).backward()
    opt.step()
    late = torch.amp.GradScaler("cpu", init_scale=256.0)
    with handle:
        late.scale(loss_of(net, 0)).backward()
    with pytest.raises(optx.OptxError, match="a GradScaler is in use"):
        late.step(opt)
    assert not adamw(Tied())._step_supports_amp_scaling


# ---- several processes -------------------------------------------------------------------------------------


def shards_are_stepped_and_ddp_is_refused(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    for layer in nets[1]:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(nets[1], mesh=mesh)
    opts = [optx.wrap(torch.optim.AdamW(net.parameters(), lr=0.01), fused=True) for net in nets]
    handle = opts[1].release(nets[1])
    for step in range(4):
        xs = torch.randn(2, 2, 4, 6, generator=torch.Generator().manual_seed(step))  # process, micro-batch
        for x in xs.flatten(0, 1):
            (nets[0](x).square().mean() / 4).backward()
        (nets[1](xs[rank, 0]).square().mean() / 2).backward()
        with handle:
            (nets[1](xs[rank, 1]).square().mean() / 2).backward()
        assert all(p.grad is None for p in nets[1].parameters())
        for opt in opts:
            opt.step()
            opt.zero_grad()
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.full_tensor(), rtol=0, atol=1e-6)  # type: ignore[attr-defined]
    summed = optx.wrap(torch.optim.AdamW(nets[1].parameters()), optx.PerpGrad())
    with pytest.raises(optx.OptxError, match="its weights are DTensors, and sums over their shards"):
        summed.release(nets[1])

    plain = nn.Linear(6, 1, bias=False)
    with torch.no_grad():
        plain.weight.fill_(1.0)
    ddp = DistributedDataParallel(plain)
    seen: list[Tensor] = []
    plain.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    ddp(torch.full((1, 6), float(rank))).sum().backward()
    assert float(seen[0][0, 0]) == rank  # its own: why this can't be
    assert float(plain.weight.grad[0, 0]) == 0.5
    opt = optx.wrap(torch.optim.AdamW(plain.parameters()))
    for model in (ddp, plain):
        with pytest.raises(
            optx.OptxError, match=r"DistributedDataParallel averages.*fully_shard.*1 parameters"
        ):
            opt.release(model)


if dist.is_gloo_available():
    test_on_two_processes = on_processes(2, shards_are_stepped_and_ddp_is_refused)


def test_a_block_in_a_closure_is_refused_and_gradients_by_hand_are_seen() -> None:
    net = Tied()
    opt = adamw(net, optx.PerpGrad())
    released = opt.release(net)

    def closure() -> Tensor:
        with released:
            loss_of(net, 0).backward()
        return loss_of(net, 0)

    old = copy.deepcopy(net.state_dict())
    with pytest.raises(optx.OptxError, match="the block was entered in a closure"):
        opt.step(closure)
    assert same(net.state_dict(), old)
    weight = net.layers[0].weight
    with released:
        weight.grad = torch.autograd.grad(loss_of(net, 0), [weight])[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that there was no gradient
        opt.step()
    assert not torch.equal(weight, old["layers.0.weight"])
