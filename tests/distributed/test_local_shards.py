"""The fused step on local shards of DTensors, on four gloo processes: each way to lie over a mesh, each rule.

One start for all of it. Gradients are drawn whole and cut as their weights are, so that every process knows
what the same steps do in one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from bases import LooseAdam
from processes import on_processes
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import optx

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="gloo")

SHAPES = ((7, 16), (5, 3), (3,), (1, 8))  # four processes share none evenly; of the last, three have nothing
Transforms = Callable[[], Sequence[optx.Transform]]


@optx.rule(writes="size")
def _size(w: Any) -> Any:
    return w * w


@optx.rule(writes="share")
def _share(size: Any, total_size: Any, total_numel: Any) -> Any:
    return (1.0 + size / total_size) * total_numel / 138.0


@optx.rule(writes="way")
def _way(w: Any, w0: Any) -> Any:
    return (w - w0) * (w - w0)


@optx.rule(writes="w")
def _scaled(w: Any, share: Any, lr: Any, way: Any, total_way: Any, steps: Any) -> Any:
    return w - lr * share * w * (way / total_way + 0.1 * steps)


@optx.rule(writes="kept")
def _kept(w: Any) -> Any:
    return optx.ops.abs(w)


@optx.rule(writes="g")
def _by_kept(g: Any, kept: Any, numel: Any) -> Any:
    return g * (1.0 + kept / numel)


class Weighed(optx.Transform):
    """Rules of one's own: a sum, its total over the optimizer, and one of what a step left for the next."""

    name = "weighed"
    slots = {"kept": optx.per_tensor(torch.float64), "steps": optx.counter()}  # noqa: RUF012
    rules = {  # noqa: RUF012
        **{"sums": _size, "totals": ("size", "numel"), "finish": _share, "gradient": _by_kept},
        **{"after_sums": _way, "after_totals": ("way",), "after": _scaled, "observe": _kept},
    }


@optx.rule(writes="row")
def _across(w: Any, g: Any) -> Any:
    return w * g


@optx.rule(writes="column")
def _down(g: Any) -> Any:
    return g * g


@optx.rule(writes=("usual", "part"))
def _usual(row: Any, usual: Any, columns: Any) -> Any:
    usual = 0.5 * usual + row / columns
    return usual, 1.0 / (1.0 + optx.ops.abs(usual))


@optx.rule(writes="g")
def _by_both(g: Any, part: Any, column: Any, rows: Any) -> Any:
    return g * part / (1.0 + column / rows)


class Matrices(optx.Transform):
    """Sums over rows and columns, and what is kept of the rows."""

    name = "matrices"
    slots = {"usual": optx.per_row()}  # noqa: RUF012
    rules = {  # noqa: RUF012
        **{"row_sums": _across, "column_sums": _down, "rows": _usual, "gradient": _by_both},
    }


def weights() -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=g) for shape in SHAPES]


def gradient(step: int, number: int) -> Tensor:
    return torch.randn(SHAPES[number], generator=torch.Generator().manual_seed(100 * step + number))


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0)


def in_one_process(make: Transforms, base: Any = adamw, steps: int = 5, **settings: Any) -> list[Tensor]:
    alone = [nn.Parameter(w) for w in weights()]
    opt = optx.wrap(base(alone), *make(), fused=False, **settings)
    for step in range(steps):
        for i, p in enumerate(alone):
            p.grad = gradient(step, i)
        opt.step()
    return [p.detach() for p in alone]


def spread(mesh: DeviceMesh, places: Sequence[Any]) -> list[nn.Parameter]:
    return [nn.Parameter(distribute_tensor(w, mesh, places)) for w in weights()]


def take(opt: Any, parameters: Sequence[nn.Parameter], steps: range) -> None:
    for step in steps:
        for i, p in enumerate(parameters):
            g = gradient(step, i)
            p.grad = distribute_tensor(g, p.device_mesh, p.placements) if isinstance(p, DTensor) else g
        opt.step()


def whole(p: Tensor) -> Tensor:
    return (p.full_tensor() if isinstance(p, DTensor) else p).detach()


def assert_same(parameters: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    for p, w in zip(parameters, wanted, strict=True):
        torch.testing.assert_close(whole(p), w, rtol=0, atol=1e-6)


COMPOSITIONS: dict[str, Transforms] = {
    "none": lambda: [],
    "perp": lambda: [optx.PerpGrad()],
    "both": lambda: [optx.PerpGrad(), optx.AdamR(weight=0.05)],
    "L1": lambda: [optx.AdamR(weight=0.05, norm="l1", normalize=False)],
    "own": lambda: [Weighed()],
}


def four() -> DeviceMesh:
    return init_device_mesh("cpu", (4,))


def square() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))


def reductions(talk: CommDebugMode) -> int:
    """How many all-reduces there were, but for those by which numbers are taken anew."""
    return talk.get_comm_counts().get(torch.ops.c10d.allreduce_, 0)


def every_composition_is_the_one_process(rank: int) -> None:
    mesh = four()
    for name, make in COMPOSITIONS.items():
        parameters = spread(mesh, [Shard(0)])
        opt = optx.wrap(adamw(parameters), *make(), fused=True)
        take(opt, parameters, range(5))
        assert str(opt.plan()).startswith("group 0: fused cpu on local shards (4 tensors, 138 numbers"), name
        assert_same(parameters, in_one_process(make))
        for state in opt.state.values():
            assert isinstance(state["exp_avg"], DTensor)
            assert not isinstance(state["step"], DTensor)


def every_mesh_is_the_one_process(rank: int) -> None:
    """Two dimensions that cut, one that repeats (HSDP), columns, both on the same dimension of a weight."""
    mesh = square()
    wanted = in_one_process(COMPOSITIONS["both"])
    for places in ([Shard(0), Shard(0)], [Replicate(), Shard(0)], [Shard(0), Replicate()]):
        parameters = spread(mesh, places)
        opt = optx.wrap(adamw(parameters), *COMPOSITIONS["both"](), fused=True)
        take(opt, parameters, range(5))
        assert_same(parameters, wanted)
    mixed = [
        nn.Parameter(distribute_tensor(w, mesh, places))
        for w, places in zip(weights()[:2], ([Shard(0), Shard(1)], [Shard(1), Replicate()]), strict=True)
    ]
    mixed += [nn.Parameter(distribute_tensor(weights()[2], mesh, [Replicate(), Replicate()]))]
    mixed += [nn.Parameter(weights()[3])]
    opt = optx.wrap(adamw(mixed), *COMPOSITIONS["both"](), fused=True)
    with CommDebugMode() as talk:
        take(opt, mixed, range(5))
    assert_same(mixed, wanted)
    assert reductions(talk) == 5 * 2 * 2  # the level and what is observed after it, over both dimensions


def gradients_that_lie_otherwise(rank: int) -> None:
    mesh = four()
    wanted = in_one_process(COMPOSITIONS["both"], steps=3)
    for place in (Partial(), Replicate()):
        parameters = spread(mesh, [Shard(0)])
        opt = optx.wrap(adamw(parameters), *COMPOSITIONS["both"](), fused=True)
        for step in range(3):
            for i, p in enumerate(parameters):
                g = gradient(step, i)
                part = g / 4 if isinstance(place, Partial) else g
                p.grad = DTensor.from_local(part, mesh, [place])
            opt.step()
        assert_same(parameters, wanted)


def loose_groups_are_completed_in_the_same_all_reduce(rank: int) -> None:
    """All of a base's that has no kernels; and one weight of AdamW's, which has gaps in its memory."""
    mesh = four()
    make = COMPOSITIONS["both"]
    for base in (LooseAdam, torch.optim.AdamW):
        loose = base is LooseAdam
        alone = [nn.Parameter(w) for w in weights()]
        parameters: list[Any] = spread(mesh, [Shard(0)])
        if not loose:
            parameters[1] = nn.Parameter(torch.zeros(10, 3)[::2].copy_(weights()[1]))
        opts: list[Any] = []
        for given in (alone, parameters):
            groups = [{"params": [given[1]]}, {"params": [given[0], *given[2:]]}]
            opts.append(optx.wrap(base(groups, lr=0.01, weight_decay=0), *make()))
        take(opts[0], alone, range(5))
        with CommDebugMode() as talk:
            take(opts[1], parameters, range(5))
        assert_same(parameters, [p.detach() for p in alone])
        kinds = {str(path).split(" (")[0].split(": ")[1] for path in opts[1].plan()}
        assert kinds == ({"foreach"} if loose else {"foreach", "fused cpu on local shards"})
        assert reductions(talk) == 5 * 2, kinds  # the level, and what is observed after it


def bases_with_numbers_and_sums_of_their_own(rank: int) -> None:
    """NAdam keeps a number per weight, NovoGrad sums a layer's gradient in its update."""
    import torch_optimizer

    mesh = four()
    for base in (torch.optim.NAdam, torch_optimizer.NovoGrad):
        alone = [nn.Parameter(w) for w in weights()]
        parameters = spread(mesh, [Shard(0)])
        opts = [optx.wrap(base(given, lr=0.01), fused=True) for given in (alone, parameters)]
        take(opts[0], alone, range(4))
        take(opts[1], parameters, range(4))
        assert_same(parameters, [p.detach() for p in alone])
        assert str(opts[1].plan()).startswith("group 0: fused cpu on local shards")


def draws_of_bfloat16(rank: int) -> None:
    """Another draw in each shard, the same in its replicas; moments and weights alike."""
    mesh = square()
    for base, fused in ((adamw, True), (torch.optim.NAdam, False)):
        ones = torch.ones(8, 64, dtype=torch.bfloat16)
        p = nn.Parameter(distribute_tensor(ones, mesh, [Replicate(), Shard(0)]))
        opt = optx.wrap(base([p]), optx.AdamR(weight=0.05, anchor="zero"), fused=fused)
        opt.param_groups[0]["lr"] = 1e-3
        p.grad = distribute_tensor(ones * 1e-3, mesh, p.placements)
        opt.step()
        shards = [torch.empty(4, 64, dtype=torch.bfloat16) for _ in range(4)]
        dist.all_gather(shards, p.detach().to_local())
        assert torch.equal(shards[0], shards[2])
        assert torch.equal(shards[1], shards[3])
        assert not torch.equal(shards[0], shards[1])


def what_one_rank_alone_sees_is_told_by_name(rank: int) -> None:
    mesh = four()
    p, other = (nn.Parameter(distribute_tensor(torch.ones(8, 4), mesh, [Shard(0)])) for _ in range(2))
    grad = distribute_tensor(torch.ones(8, 4), mesh, [Shard(0)])
    opt = optx.wrap(
        torch.optim.AdamW([("layer.weight", p)], weight_decay=0), optx.AdamR(anchor="zero", normalize=False)
    )
    p.grad = grad
    local = p.detach().to_local() if rank == 1 else torch.zeros(2, 4)
    moments = [DTensor.from_local(t, mesh, [Shard(0)], run_check=False) for t in (local, torch.zeros(2, 4))]
    opt.state[p] = {"step": torch.zeros(()), "exp_avg": moments[0], "exp_avg_sq": moments[1]}
    if rank == 1:
        with pytest.raises(optx.OptxError, match=r"on rank 1 kernels can't serve.*share their memory"):
            opt.step()
    else:
        opt.step()
    opt = optx.wrap(torch.optim.AdamW([("layer.weight", other)]), optx.PerpGrad())
    other.grad = grad
    opt.state[other] = {"step": torch.zeros(()), "exp_avg": torch.ones(8, 4), "exp_avg_sq": torch.ones(8, 4)}
    with pytest.raises(optx.OptxError, match=r"'layer.weight' is a DTensor, its state 'exp_avg' is a Tensor"):
        opt.step()


def tensor_parallel_under_fsdp(rank: int) -> None:
    """Rows of a weight are cut twice: _StridedShard."""
    mesh = square()
    torch.manual_seed(0)
    alone, model = (nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3)) for _ in range(2))
    model.load_state_dict(alone.state_dict())
    parallelize_module(model, mesh["b"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(model, mesh=mesh["a"])
    opts = [optx.wrap(adamw(one.parameters()), *COMPOSITIONS["both"]()) for one in (model, alone)]
    assert "fused cpu on local shards" in str(opts[0].plan())
    for step in range(4):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        for one, opt in zip((model, alone), opts, strict=True):
            opt.zero_grad()
            ((step + 1) * one(x)).square().mean().backward()
            opt.step()
    assert_same(list(model.parameters()), [p.detach() for p in alone.parameters()])


def weights_that_have_no_gradient_in_a_step(rank: int) -> None:
    found: list[list[Any]] = []
    for parameters in (spread(four(), [Shard(0)]), [nn.Parameter(w) for w in weights()]):
        opt = optx.wrap(adamw(parameters), *COMPOSITIONS["both"]())
        for step in range(5):
            some = [p for i, p in enumerate(parameters) if (i + step) % 3]
            for i, p in enumerate(parameters):
                g = gradient(step, i)
                g = distribute_tensor(g, p.device_mesh, p.placements) if isinstance(p, DTensor) else g
                p.grad = g if any(p is one for one in some) else None
            opt.step()
        found.append(parameters)
    assert_same(found[0], [p.detach() for p in found[1]])


def metrics_are_asked_for_on_all_ranks_or_refused(rank: int) -> None:
    """A rank that asked alone would wait for the others in its next step."""
    mesh = four()
    found: list[dict[str, float]] = []
    for parameters in (spread(mesh, [Shard(0)]), [nn.Parameter(w) for w in weights()]):
        opt = optx.wrap(adamw(parameters), *COMPOSITIONS["both"](), metrics=True)
        take(opt, parameters, range(3))
        found.append(opt.metrics())
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert {"optx/grad_norm", "adamr/distance", "perp_grad/removed"} <= set(found[0])

    parameters = spread(mesh, [Shard(0)])
    opt = optx.wrap(adamw(parameters))
    with CommDebugMode() as talk:
        take(opt, parameters, range(2))
        if rank == 0:
            with pytest.raises(optx.OptxError, match=r"optx.wrap\(..., metrics=True\) on all ranks"):
                opt.metrics()
        take(opt, parameters, range(2))
    assert reductions(talk) == 0
    assert optx.wrap(opt, metrics=True) is opt
    with CommDebugMode() as talk:
        take(opt, parameters, range(3))
    assert reductions(talk) == 3
    norm = sum(float(gradient(2, i).double().square().sum()) for i in range(len(SHAPES))) ** 0.5
    assert opt.metrics()["optx/grad_norm"] == pytest.approx(norm, rel=1e-6)

    plain = [nn.Parameter(w) for w in weights()]
    opt = optx.wrap(adamw(plain), optx.PerpGrad())
    if rank == 0:
        opt.metrics()
    opt.param_groups[0]["params"] = parameters = spread(mesh, [Shard(0)])  # as Accelerate does
    take(opt, parameters, range(2))
    with pytest.raises(optx.OptxError, match="metrics=True"):
        opt.metrics()


@optx.rule(writes="g")
def _centred(g: Any, row: Any, columns: Any) -> Any:
    return g - row / columns


class Centred(optx.Transform):
    """Sums over rows that only their elements read."""

    name = "centred"
    rules = {"row_sums": _across, "gradient": _centred}  # noqa: RUF012


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in parameters if p.ndim > 1], lr=0.1)


def adafactor(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adafactor([p for p in parameters if p.ndim > 1], lr=0.01, weight_decay=0.1)


def cut(mesh: DeviceMesh, places: Sequence[Any]) -> list[nn.Parameter]:
    """A vector has one dimension only to be cut along."""
    only = [Replicate() if place == Replicate() else Shard(0) for place in places]
    return [nn.Parameter(distribute_tensor(w, mesh, places if w.ndim > 1 else only)) for w in weights()]


def numbers_per_row_and_column(rank: int) -> None:
    """However weights are cut: one all-reduce of all that is summed; none of rows that lie in one process."""
    rows, columns, same = Shard(0), Shard(1), Replicate()
    # In the order of the other cases: torch keeps how tensors are spread, with the names of their groups.
    both, one = square(), four()
    for make, base, mesh, places, count in (
        (lambda: [Matrices()], adamw, one, [rows], 1),
        (lambda: [Matrices()], adamw, both, [same, rows], 1),
        (lambda: [Matrices()], adamw, one, [same], 0),
        (lambda: [Matrices()], adamw, both, [rows, columns], 2),  # along each
        (lambda: [Matrices()], adamw, one, [columns], 1),
        (list, adafactor, one, [rows], 2),
        (list, adafactor, one, [columns], 2),
        (lambda: [Centred()], sgd, one, [rows], 0),
        (lambda: [Centred()], sgd, one, [columns], 1),
    ):
        wanted, parameters = in_one_process(make, base, steps=2), cut(mesh, places)
        opt = optx.wrap(base(parameters), *make())
        assert str(opt.plan()).startswith("group 0: fused cpu on local shards"), opt.plan()
        with CommDebugMode() as talk:
            take(opt, parameters, range(2))
        assert reductions(talk) == 2 * count, (base, places)
        assert_same(parameters, wanted)
        if base is adamw:  # of all rows, everywhere
            usual = opt.slot(parameters[0], opt.matrices, "usual")  # type: ignore[attr-defined]
            assert usual.shape == (7,)
            assert usual.all()


def what_is_not_some_rows_and_columns_goes_the_other_way(rank: int) -> None:
    """Of a kernel of three and more dimensions, say, cut along the third."""
    start = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
    p, q = nn.Parameter(distribute_tensor(start, four(), [Shard(2)])), nn.Parameter(start)
    opt, one = (optx.wrap(sgd([w]), Centred(), fused=fused) for w, fused in ((p, "auto"), (q, False)))
    assert "sums over rows or columns of parameters that are sharded as" in str(opt.plan())
    p.grad, q.grad = distribute_tensor(start, four(), [Shard(2)]), start.clone()
    opt.step()
    one.step()
    assert_same([p], [q.detach()])


test_axes_on_four_processes = pytest.mark.long(on_processes(4, numbers_per_row_and_column))
test_on_four_processes = on_processes(
    4,
    what_is_not_some_rows_and_columns_goes_the_other_way,
    every_composition_is_the_one_process,
    every_mesh_is_the_one_process,
    gradients_that_lie_otherwise,
    loose_groups_are_completed_in_the_same_all_reduce,
    bases_with_numbers_and_sums_of_their_own,
    draws_of_bfloat16,
    what_one_rank_alone_sees_is_told_by_name,
    tensor_parallel_under_fsdp,
    weights_that_have_no_gradient_in_a_step,
    metrics_are_asked_for_on_all_ranks_or_refused,
)
