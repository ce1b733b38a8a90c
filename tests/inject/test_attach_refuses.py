"""What `optx.attach` refuses though it would seem to work: a list with a typo, and models sharded already."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from injections import assert_same, snapshot
from processes import on_processes
from torch import Tensor, nn

import optx
from optx import IA3, MAM, LoRA, OptxError, TargetError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.v_proj(torch.tanh(self.q_proj(x))))


def blocks() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block())


# ---- lists -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (["q_proj", "v_porj"], r"has 'v_porj' in its list, which matches no module\. Near: '[01]\.v_proj', "),
        (["v_porj"], r"has 'v_porj' in its list.* Near: '[01]\.v_proj'"),
        (("q_proj", "0.v_proj", "2.v_proj"), r"has '2\.v_proj' in its list"),
        (["q_proj", "v_proj."], r"has 'v_proj\.' in its list.* Near: '[01]\.v_proj'"),
        (["q_proj", ".v_proj"], r"has '\.v_proj' in its list"),
        (["q_proj", " v_proj"], r"has ' v_proj' in its list"),
        (["q_proj", "V_proj"], r"has 'V_proj' in its list.* Near: '[01]\.v_proj'"),
        (["q_proj", ""], r"has '' in its list"),
        (["q_proj", "roj"], r"has 'roj' in its list"),  # the end of a name is not the last part of a path
        (["q_proj", r".*\.v_proj"], r"has '\.\*\\\\\.v_proj' in its list.* A list holds names; pass a regex"),
        (["q_proj", lambda path, module: True], r"has <function .* in its list; it must hold names or mod"),
        (["q_proj", ["v_proj"]], r"has \['v_proj'\] in its list; it must hold names"),
        ([], r"no module matches targets=\[\]"),
        ({"q_proj", "v_proj"}, r"targets is a set; it must be a regex, a module type, a list"),
        (["q_proj", "norm"], r"LoRA serves .*'0\.norm' is a LayerNorm"),
        ([nn.Linear, "norm"], r"LoRA serves .*'0\.norm' is a LayerNorm"),
    ],
)  # fmt: skip
def test_every_one_of_a_list_matches(targets: Any, says: str) -> None:
    model = blocks()
    before = snapshot(model)
    with pytest.raises(TargetError, match=says):
        optx.attach(model, LoRA(rank=2), targets)
    assert_same(model, before)


def test_a_model_without_what_is_served_by_default() -> None:
    """In words, not as the function or the regex that optx looked with."""
    bare = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU())
    with pytest.raises(TargetError, match="no Linear, convolution or norm of this Sequential has one"):
        optx.attach(bare, optx.BitFit())
    with pytest.raises(
        TargetError, match=r"targets is a function that no module passes\. The model has Linear"
    ):
        optx.attach(bare, LoRA(rank=2), lambda path, module: False)


def test_a_list_may_say_it_twice() -> None:
    handle = optx.attach(blocks(), LoRA(rank=2), ["q_proj", "q_proj", "0.q_proj", nn.Linear, nn.Linear])
    assert [one.path for one in handle.served] == ["0.q_proj", "0.v_proj", "1.q_proj", "1.v_proj"]


def test_what_only_lives_in_what_was_attached_matches_nothing() -> None:
    model = blocks()
    optx.attach(model, optx.ParallelAdapter(rank=2), ["q_proj"])
    inside = next(name for name, m in model.named_modules() if ".optx." in name and not list(m.children()))
    with pytest.raises(TargetError, match="in its list, which matches no module"):
        optx.attach(model, LoRA(rank=2), ["q_proj", inside.rpartition(".")[2]])


def test_a_list_for_a_member_and_beside_it() -> None:
    from injections import bert

    model = bert()
    with pytest.raises(TargetError, match=r"has 'outptu' in its list.* Near: '.*output"):
        optx.attach(model, MAM(prefix=2, rank=2), {"ffn": ["0.output", "outptu"]})
    pair = blocks()
    handle = optx.attach(pair, LoRA(rank=2), ["q_proj"])
    with pytest.raises(
        TargetError, match=r"trainable_only: also has 'nrom' in its list.* Near: '[01]\.norm'"
    ):
        optx.trainable_only(pair, handle, also=["v_proj", "nrom"])
    with pytest.raises(
        TargetError, match=r"IA3's feedforward has 'q_porj' in its list.* Near: '[01]\.q_proj'"
    ):
        optx.attach(pair, IA3(feedforward=("v_proj", "q_porj")), ["q_proj", "v_proj"])


# ---- handles that can't be made --------------------------------------------------------------------------


class Failing(LoRA):
    """What its handle finds is found late: modules are served and trained whole by then."""

    def handle(self, *what: Any) -> optx.Handle:
        optx.Handle(*what)
        raise OptxError("no handle")


def test_what_a_handle_refuses_leaves_the_model_as_it_was() -> None:
    model = blocks()
    before = snapshot(model)
    with pytest.raises(OptxError, match="no handle"):
        optx.attach(model, Failing(rank=2), ["q_proj"], modules_to_save=["1.norm"])
    assert_same(model, before)


# ---- sharded already -------------------------------------------------------------------------------------

Wrap = Callable[[nn.Sequential], nn.Module]
ATTACH_FIRST = r"ranks would drift apart\. Attach (to the model )?first"


def fsdp2(module: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    return fully_shard(module, mesh=dist.init_device_mesh("cpu", (dist.get_world_size(),)))  # type: ignore[attr-defined]


def fsdp1(module: nn.Module, original: bool) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(module, use_orig_params=original, device_id=torch.device("cpu"))


def ddp(module: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(module)


class MyDDP(nn.parallel.DistributedDataParallel):
    """Lightning and others subclass it."""


def tensor_parallel(model: nn.Module) -> nn.Module:
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))  # type: ignore[attr-defined]
    return parallelize_module(model, mesh, {"1.q_proj": ColwiseParallel()})


def deepspeed_zero3(model: nn.Module) -> nn.Module:
    """What DeepSpeed's zero.Init leaves of a parameter: a number, and no elements."""
    for number, p in enumerate(model.parameters()):
        p.ds_id, p.ds_shape, p.data = number, p.shape, torch.empty(0)  # type: ignore[attr-defined]
    return model


def inside(wrap: Callable[[nn.Module], nn.Module]) -> Wrap:
    """Only the second block is wrapped, which is served too."""

    def apply(model: nn.Sequential) -> nn.Module:
        model[1] = wrap(model[1])
        return model

    return apply


keep: list[Any] = []  # the wrappers of models that are given without them


def outside(wrap: Callable[[nn.Module], nn.Module]) -> Wrap:
    """The whole is wrapped, and attach gets what is in it."""

    def apply(model: nn.Sequential) -> nn.Module:
        keep.append(wrap(nn.Sequential(model)))
        return model

    return apply


WRAPS: dict[str, tuple[Wrap, str]] = {
    "fully_shard": (fsdp2, "this model is sharded by fully_shard"),
    "fully_shard inside": (inside(fsdp2), r"'1\.q_proj' is in '1', which is sharded by fully_shard already"),
    "fully_shard outside": (outside(fsdp2), "this model is in a FSDPSequential"),
    "tensor parallel": (tensor_parallel, r"'1\.q_proj\.weight' is a DTensor"),
    "FSDP1": (lambda m: fsdp1(m, False), "this model is a FullyShardedDataParallel"),
    "FSDP1, original": (lambda m: fsdp1(m, True), "this model is a FullyShardedDataParallel"),
    "FSDP1 inside": (
        inside(lambda m: fsdp1(m, False)),
        r"'1\._fsdp_wrapped_module\.q_proj' is in '1', which is a FullyShardedDataParallel already",
    ),
    "FSDP1 outside": (outside(lambda m: fsdp1(m, False)), "this model is in a FullyShardedDataParallel"),
    "FSDP1 outside, original": (
        outside(lambda m: fsdp1(m, True)),
        "this model is in a FullyShardedDataParallel",
    ),
    "DDP": (ddp, "this model is a DistributedDataParallel"),
    "DDP's subclass": (MyDDP, "this model is a DistributedDataParallel"),
    "DDP inside": (inside(ddp), r"'1\.module\.q_proj' is in '1', which is a DistributedDataParallel already"),
    "DDP outside": (outside(ddp), "this model is in a DistributedDataParallel"),
    "DDP's subclass outside": (outside(MyDDP), "this model is in a MyDDP"),
    "DataParallel inside": (inside(nn.DataParallel), r"in '1', which is a DataParallel"),
    "DeepSpeed ZeRO-3": (deepspeed_zero3, r"'0\.q_proj\.weight' is partitioned by DeepSpeed's ZeRO-3"),
}


@pytest.mark.long(keep=2)
@pytest.mark.usefixtures("group_of_one")
@pytest.mark.filterwarnings("ignore:.*FSDP.*")
@pytest.mark.filterwarnings("ignore:.*NO_SHARD.*")
@pytest.mark.parametrize("name", WRAPS)
def test_what_is_wrapped_already_is_refused(name: str) -> None:
    wrap, says = WRAPS[name]
    model = wrap(blocks())
    names = list(dict(model.named_modules()))
    with pytest.raises(OptxError, match=says) as raised:
        optx.attach(model, LoRA(rank=2), r".*[qv]_proj")
    assert "ranks would drift apart" in str(raised.value)
    assert list(dict(model.named_modules())) == names
    keep.clear()


@pytest.mark.usefixtures("group_of_one")
def test_what_is_beside_or_below_is_served() -> None:
    """A block may be sharded later with what it has by then; and one that is not sharded at all is free."""
    model = inside(fsdp2)(blocks())
    handle = optx.attach(model, LoRA(rank=2), r"0\.[qv]_proj")
    fsdp2(model[0])
    fsdp2(model)
    model(torch.randn(2, 4)).sum().backward()
    assert all(p.grad is not None for p in handle.parameters())


@pytest.mark.usefixtures("group_of_one")
def test_a_ddp_that_is_gone_holds_nothing() -> None:
    model = blocks()
    wrapper = ddp(model)
    with pytest.raises(OptxError, match="this model is in a DistributedDataParallel"):
        optx.attach(model, LoRA(rank=2), ["q_proj"])
    del wrapper
    handle = optx.attach(model, LoRA(rank=2), ["q_proj"])
    handle.remove()
    handle = optx.attach(model, LoRA(rank=2), ["q_proj"])
    keep.append(ddp(model))
    handle.remove()  # and comes off
    keep.clear()


# ---- two processes ---------------------------------------------------------------------------------------


def refuse_alike(rank: int) -> None:
    for name in ("fully_shard", "fully_shard inside", "DDP", "DDP outside"):
        wrap, _ = WRAPS[name]
        with pytest.raises(OptxError, match="ranks would drift apart") as error:
            optx.attach(wrap(blocks()), LoRA(rank=2), r".*[qv]_proj")
        said: list[Any] = [None, None]
        dist.all_gather_object(said, str(error.value))
        assert said[0] == said[1]
    keep.clear()


def stay_together(rank: int) -> None:
    for order in (ddp, fsdp2):
        torch.manual_seed(rank)
        model = blocks()
        handle = optx.attach(model, LoRA(rank=2), r".*[qv]_proj")
        wrapped = order(model)
        opt = torch.optim.SGD(wrapped.parameters(), lr=0.1)
        for step in range(2):
            x = torch.randn(4, 4, generator=torch.Generator().manual_seed(10 * step + rank))
            wrapped(x).square().mean().backward()
            opt.step()
            opt.zero_grad()
        for p in handle.parameters():
            whole: Any = p.full_tensor() if hasattr(p, "full_tensor") else p.detach()
            both = [torch.zeros_like(whole) for _ in range(2)]
            dist.all_gather(both, whole)
            assert torch.equal(*both)
            assert whole.any()


test_on_two_processes = on_processes(2, refuse_alike, stay_together)
