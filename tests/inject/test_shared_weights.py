"""StableRPS: the numbered properties of its specification, what it refuses, and what it keeps where."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import on_processes
from torch import Tensor, nn
from torch.nn import functional as F

import optx

HIDDEN = "0|3"


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    first = (nn.Linear(64, 48), nn.LayerNorm(48), nn.ReLU())
    return nn.Sequential(*first, nn.Linear(48, 48), nn.LayerNorm(48), nn.ReLU(), nn.Linear(48, 10))


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(32, 64, generator=generator), torch.randint(0, 10, (32,), generator=generator)


def loss_of(model: nn.Module) -> Tensor:
    x, y = batch()
    return F.cross_entropy(model(x), y)


def shared(model: nn.Module | None = None, targets: Any = HIDDEN, **options: Any) -> tuple[Any, Any]:
    model = net() if model is None else model
    return model, optx.attach(model, optx.StableRPS(**{"compression": 0.1, **options}), targets)


def train(model: nn.Module, opt: Any, steps: int) -> None:
    for _ in range(steps):
        opt.zero_grad()
        loss_of(model).backward()
        opt.step()


def sgd(model: nn.Module, *transforms: Any, **options: Any) -> Any:
    return optx.wrap(
        torch.optim.SGD(model.parameters(), **{"lr": 0.05, "momentum": 0.9, **options}), *transforms
    )


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm())


# ---- the properties -------------------------------------------------------------------------------------


def test_at_compression_1_a_run_follows_the_dense_one() -> None:
    """Property 2: the fit is exact, and the step is the dense step up to the scaler's two epsilons."""
    dense = net()
    model, handle = shared(compression=1.0, init="fit")
    starts = {path: dense.get_submodule(path).weight.detach().clone() for path in ("0", "3")}  # type: ignore[operator]
    assert all(far(handle.weight(path), start) < 1e-7 for path, start in starts.items())
    opt, other = sgd(model, handle.grad_scale()), torch.optim.SGD(dense.parameters(), lr=0.05, momentum=0.9)
    for _ in range(5):
        train(model, opt, 1)
        train(dense, other, 1)
        for path, start in starts.items():
            moved = dense.get_submodule(path).weight.detach() - start
            assert far(handle.weight(path) - start, moved) < 2e-3


@pytest.mark.parametrize("mapping", ["fold", "roast", "hashed"])
def test_the_gradient_is_a_scatter_add(mapping: str) -> None:
    """Property 3; and 7: a merged model computes the same."""
    model, handle = shared(mapping=mapping)
    loss_of(model).backward()
    bare, copied = copy.deepcopy((model, handle))
    copied.merge_and_unload()
    bare.zero_grad()
    loss_of(bare).backward()
    wanted = torch.zeros_like(handle.psi)
    for one in handle.served:
        gradient = bare.get_submodule(one.path).weight.grad
        terms = one.part.at.scale * handle.signs(one.path) * gradient
        wanted.index_add_(0, handle.slots(one.path).view(-1), terms.view(-1))
    assert far(handle.psi.grad, wanted) < 1e-6
    torch.testing.assert_close(bare(batch()[0]), model(batch()[0]), rtol=0, atol=1e-6)
    rest = sum(p.numel() for name, p in net().named_parameters() if name not in ("0.weight", "3.weight"))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == rest + int(0.1 * (64 * 48 + 48 * 48))


def test_a_run_is_the_same_whatever_the_half_width() -> None:
    """Property 4: with the scaler; without it steps grow with the square of the scale."""

    def end(sigma: float, scaled: bool) -> Tensor:
        model, handle = shared(init_std=sigma)
        train(model, sgd(model, *([handle.grad_scale()] if scaled else []), momentum=0.0), 8)
        return torch.cat([handle.weight(path).detach().flatten() for path in ("0", "3")])

    with_scaler = [end(sigma, True) for sigma in (1e-3, 0.05, 1.0)]
    assert far(with_scaler[0], with_scaler[1]) < 1e-3
    assert far(with_scaler[2], with_scaler[1]) < 1e-3
    assert far(end(1.0, False), end(0.05, False)) > 1e-2


def test_weights_that_agree_move_by_their_own_gradient() -> None:
    """Property 5."""
    model = nn.Sequential(nn.Linear(16, 16, bias=False))
    handle = optx.attach(model, optx.StableRPS(compression=0.125, scale=3.0), "0")
    before = handle.weight("0").detach().clone()
    slot_gradient = torch.randn(handle.psi.numel())
    want = handle.signs("0") * slot_gradient[handle.slots("0")]
    opt = optx.wrap(torch.optim.SGD(model.parameters(), lr=0.1), handle.grad_scale())
    (handle.weight("0") * want).sum().backward()
    opt.step()
    torch.testing.assert_close(handle.weight("0") - before, -0.1 * want, rtol=1e-3, atol=1e-6)


def test_the_modes_of_gamma() -> None:
    _, handle = shared(compression=0.3)
    scales = torch.zeros(2, handle.psi.numel(), dtype=torch.float64)
    counts = torch.zeros_like(scales)
    for i, one in enumerate(handle.served):
        slots = handle.slots(one.path).view(-1)
        counts[i] = torch.bincount(slots, minlength=handle.psi.numel())
        scales[i] = one.part.at.scale
    first, square, count = (scales * counts).sum(0), (scales**2 * counts).sum(0), counts.sum(0)
    wanted = {"v1": first**2 / (count + 1e-3), "v2": first, "v3": first / count}
    wanted |= {"v4": square.sqrt(), "v5": square}
    for mode, one in wanted.items():
        torch.testing.assert_close(handle.gamma(mode), one)
    assert torch.equal(handle.loads(), count.long())


def test_weights_begin_as_spread_as_they_were() -> None:
    """Property 8."""
    model = nn.Sequential(nn.Linear(96, 200), nn.Linear(200, 64))
    nn.init.normal_(model[1].weight, std=0.3)  # type: ignore[arg-type]
    own = [float(layer.weight.detach().std()) for layer in model]  # type: ignore[union-attr, operator]
    for options, factor in (({}, 1 / math.sqrt(3)), ({"match_std": True}, 1.0)):
        with shared(model, "0|1", compression=0.5, **options)[1] as handle:
            found = [float(handle.weight(path).detach().std()) for path in ("0", "1")]
        assert found == pytest.approx([factor * one for one in own], rel=0.02)
    with optx.attach(model, optx.StableRPS(param_scale="unit"), "0|1") as handle:
        scales = torch.tensor([one.part.at.scale for one in handle.served])
        sizes = torch.tensor([96.0 * 200, 200 * 64])
        assert float((scales * sizes).sum() / sizes.sum()) == pytest.approx(1.0)
        assert handle.transforms() == []


# ---- the optimizer --------------------------------------------------------------------------------------


def test_the_optimizer_follows() -> None:
    model = net()
    kinds = [[p for p in model.parameters() if (p.ndim > 1) == matrix] for matrix in (True, False)]
    opt: Any = torch.optim.SGD([{"params": one} for one in kinds], lr=0.05, momentum=0.9)
    train(model, opt, 1)
    _, handle = shared(model)
    opt = optx.wrap(opt, handle)
    own = [model[0].weight, model[3].weight]
    first = opt.param_groups[0]["params"]
    assert any(p is handle.psi for p in first)
    assert not any(p is q for p in first for q in own)
    assert [t.name for t in opt.transforms] == ["grad_scale"]
    assert not any(p in opt.state for p in own)
    train(model, opt, 2)
    handle.remove()
    train(model, opt, 1)
    assert not opt.transforms
    assert all(any(p is q for p in opt.param_groups[0]["params"]) for q in own)


def test_adam_is_told_and_clipping_comes_after() -> None:
    model, handle = shared()
    with pytest.warns(UserWarning, match=r'Adam divides gradients.*param_scale="unit"'):
        optx.wrap(torch.optim.Adam(model.parameters()), handle.grad_scale())
    with pytest.raises(optx.TransformError, match=r"Clip comes before it"):
        sgd(model, optx.Clip(), handle.grad_scale())
    sgd(model, handle.grad_scale(), optx.Clip())
    with pytest.raises(optx.TransformError, match="not among the optimizer's parameters"):
        sgd(net(), handle.grad_scale())
    with pytest.raises(optx.OptxError, match=r"mode is 'v9'; it must be one of 'v1'"):
        handle.grad_scale("v9")
    with pytest.raises(optx.OptxError, match=r'mode is "none"'):
        shared(scaler="none")[1].grad_scale()


class Momentum(torch.optim.Optimizer):
    """One of another library, as far as anyone knows."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})


class AdamLike(Momentum):
    pass


def test_only_a_base_that_undoes_scales_is_warned_of() -> None:
    model, handle = shared()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        handle.grad_scale().check(Momentum(model.parameters()))
    for base in (AdamLike(model.parameters()), torch.optim.RMSprop(model.parameters())):
        with pytest.warns(UserWarning, match=f"{type(base).__name__} divides gradients"):
            handle.grad_scale().check(base)


def test_decay_is_that_of_every_weight_and_not_divided() -> None:
    model, handle = shared(init_std=0.01)
    before = handle.weight("3").detach().clone()
    opt = sgd(model, handle.grad_scale(), lr=0.1, momentum=0.0, weight_decay=0.5)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    opt.step()
    torch.testing.assert_close(handle.weight("3"), 0.95 * before)


def test_a_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    model, handle = shared()
    opt = sgd(model, handle.grad_scale())
    train(model, opt, 3)
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, tmp_path / "run.pt")
    train(model, opt, 3)
    again, other = shared(net(seed=1))  # other scales: those of the file come in their place
    resumed = sgd(again, other.grad_scale())
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["opt"])
    train(again, resumed, 3)
    assert torch.equal(other.psi, handle.psi)
    assert torch.equal(again(batch()[0]), model(batch()[0]))


# ---- memory ---------------------------------------------------------------------------------------------


@contextmanager
def allocated() -> Iterator[list[int]]:
    found: list[int] = []
    with torch.profiler.profile(profile_memory=True) as profile:
        yield found
    found.append(sum(e.self_cpu_memory_usage for e in profile.key_averages()))  # type: ignore[attr-defined]


def test_no_weight_waits_for_backward() -> None:
    """Between the passes there is the input, the output and what the module's own loss keeps."""
    convolution = nn.Conv2d(64, 64, 5), torch.randn(2, 64, 5, 5)
    for layer, x in ((nn.Linear(256, 512), torch.randn(8, 256)), convolution):
        model = nn.Sequential(layer)
        handle = optx.attach(model, optx.StableRPS(keep="none"), "0")
        model(x)
        with allocated() as taken:
            y = model(x)
        assert taken[0] <= 4 * y.numel() + 4096 < 4 * handle.served[0].part.at.numel
        y.sum().backward()
        assert handle.psi.grad is not None


@pytest.mark.parametrize("keep", ["file", "none"])
def test_the_own_weights_can_be_away(keep: str) -> None:
    model, handle = shared(keep=keep)
    x = batch()[0]
    output, own = model(x), net()
    assert "0.weight" not in model.state_dict()
    with pytest.raises(optx.OptxError, match="no weights of their own"):
        handle.disable()
    twin, same = copy.deepcopy((model, handle))
    handle.merge()
    assert model[0].weight.shape == (48, 64)
    torch.testing.assert_close(model(x), output)
    handle.unmerge()
    assert model[0].weight is None
    for one, gone in ((model, handle), (twin, same)):
        assert torch.equal(one(x), output)
        gone.remove()
        assert all(p.requires_grad for p in one.parameters())
        assert torch.equal(one(x), own(x)) == (keep == "file")
        torch.testing.assert_close(one(x), own(x) if keep == "file" else output)
    bare = net(1)
    bare.load_state_dict(model.state_dict(), strict=True)


# ---- refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"compression": 0.0}, r"compression is 0\.0; it must be above 0"),
        ({"compression": 1.5}, "between 0 and 1"),
        ({"compression": 1e-6}, "makes 0 slots"),
        ({"compression": 0.01, "mapping": "roast"}, r"53 slots, and a block of '0' needs 256"),
        ({"mapping": "pareto"}, "'fold', 'roast', 'hashed'"),
        ({"init_std": 0.1, "param_scale": "unit"}, "Give one"),
        ({"scale": 2.0, "param_scale": "unit"}, "Give one"),
        ({"init_std": 0.0}, "above 0"),
        ({"keep": "disk"}, "'memory', 'file', 'none'"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], says: str) -> None:
    model = net()
    with pytest.raises(optx.OptxError, match=says):
        shared(model, **options)
    assert not hasattr(model[0], "optx")


def test_modules_that_cannot_be_served() -> None:
    zero = net()
    nn.init.zeros_(zero[0].weight)  # type: ignore[arg-type]
    with pytest.raises(optx.TargetError, match=r"0\.weight has a standard deviation of 0"):
        shared(zero)
    tied = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    tied[1].weight = tied[0].weight
    with pytest.raises(optx.TargetError, match=r"0\.weight is tied to 1\.weight, which is not served"):
        shared(tied, "0")
    handle = shared(tied, "0|1", compression=1.0)[1]
    assert handle.psi.numel() == 64
    assert torch.equal(handle.weight("0"), handle.weight("1"))
    model, _ = shared()
    with pytest.raises(optx.TargetError, match="which takes no part while 'stable_rps'"):
        optx.attach(model, optx.LoRA(rank=2, dora=True), "0")
    other = net()
    optx.attach(other, optx.LoRA(rank=2, dora=True), "0|3")
    with pytest.raises(optx.TargetError, match="with which 'lora' works"):
        shared(other)


def test_a_bare_checkpoint_that_takes_no_part_is_told() -> None:
    model, _ = shared()
    with pytest.warns(UserWarning, match=r"'0\.weight' and no shared array"):
        model.load_state_dict(net(1).state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(shared()[0].state_dict())


def test_a_state_of_another_length_is_refused() -> None:
    _, handle = shared()
    before = handle.psi.detach().clone()
    state = {key: t.clone() for key, t in handle.state_dict().items()}
    other = shared(net(), "0")[1].state_dict()
    with pytest.raises(optx.FileError):
        handle.load_state_dict(other)
    state["3.stable_rps.place"][1] += 1
    with pytest.raises(optx.FileError, match="slots"):
        handle.load_state_dict(state)
    assert torch.equal(handle.psi, before)


def test_a_step_between_the_passes_is_refused() -> None:
    for layer, x in ((nn.Linear(4, 4), torch.randn(2, 4)), (nn.Conv1d(4, 4, 1), torch.randn(2, 4, 3))):
        model = nn.Sequential(layer)
        handle = optx.attach(model, optx.StableRPS(compression=0.5), "0")
        loss = model(x.requires_grad_()).square().sum()
        with torch.no_grad():
            handle.psi.add_(1.0)
        with pytest.raises((RuntimeError, optx.OptxError), match=r"changed|modified"):
            loss.backward()


def test_second_derivatives() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double()
    handle = optx.attach(model, optx.StableRPS(compression=0.5), "0")
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor, psi: Tensor) -> Tensor:
        return model(x)

    assert torch.autograd.gradcheck(call, (x, handle.psi))
    assert torch.autograd.gradgradcheck(call, (x, handle.psi))


# ---- two processes -----------------------------------------------------------------------------------------


def a_sharded_run_is_that_of_one_process(_rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    alone, handle = shared(compression=0.3)
    model, sharded = shared(compression=0.3)
    fully_shard(model)
    train(alone, optx.wrap(torch.optim.SGD(alone.parameters(), lr=0.05), handle), 3)
    train(model, optx.wrap(torch.optim.SGD(model.parameters(), lr=0.05), sharded), 3)
    torch.testing.assert_close(sharded.psi.full_tensor(), handle.psi, rtol=1e-4, atol=1e-6)


if dist.is_gloo_available():
    test_on_two_processes = on_processes(2, a_sharded_run_is_that_of_one_process)
