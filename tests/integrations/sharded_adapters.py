"""Adapters under fully_shard in two gloo processes: trained, saved, and not merged (the whole weight is
nowhere)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from injections import bert, llama, move, tokens
from safetensors.torch import load_file
from torch import Tensor, nn

import optx

METHODS: dict[str, Callable[[], optx.Injection]] = {
    "LoRA": lambda: optx.LoRA(rank=3),  # 3 and 16 rows: one of them is not shared evenly
    "SVFit": lambda: optx.SVFit(rank=5),
    "PrefixTuning": lambda: optx.PrefixTuning(length=3),
}


def whole(t: Tensor) -> Tensor:
    full: Any = getattr(t, "full_tensor", None)
    return (t if full is None else full()).detach()


def shard(model: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers if hasattr(model, "model") else model.bert.encoder.layer:
        fully_shard(layer)
    fully_shard(model)


def attached(method: str) -> tuple[nn.Module, optx.Handle]:
    model = llama()
    handle = optx.attach(model, METHODS[method]())
    optx.trainable_only(model, handle)
    move(handle)
    return model, handle


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def trained(model: Any, handle: optx.Handle, rows: slice) -> None:
    """One step, the gradient being the mean over all rows."""
    opt = torch.optim.SGD(handle.parameters(), lr=0.5)
    ids = tokens()[rows]
    model(input_ids=ids, labels=ids).loss.backward()
    opt.step()


def refusal(call: Callable[[], Any]) -> str:
    try:
        call()
    except optx.MergeError as error:
        return str(error)
    return "none"


def train_save_and_merge(method: str, rank: int, folder: Path) -> None:
    """Beside one process: the call, a step, the file, and merge's one sentence on every rank."""
    alone, reference = attached(method)
    model, handle = attached(method)
    shard(model)
    close(model(tokens()).logits, alone(tokens()).logits)
    trained(alone, reference, slice(None))
    trained(model, handle, slice(rank, rank + 1))
    moved = False
    for (name, p), (_, want) in zip(handle.named_parameters(), reference.named_parameters(), strict=True):
        close(whole(p), want.detach())
        moved = moved or not torch.equal(want, dict(attached(method)[1].named_parameters())[name])
    assert moved
    handle.save(folder / method)  # both ranks, to one name
    reference.save(folder / f"{method} alone {rank}")
    dist.barrier()
    files = [next((folder / name).glob("*.safetensors")) for name in (method, f"{method} alone {rank}")]
    found, wanted = map(load_file, files)
    assert found.keys() == wanted.keys()
    for key, tensor in found.items():
        close(tensor, wanted[key])
    close(optx_from(folder / method), alone(tokens()).logits)
    says = "is sharded over a device mesh" if method != "PrefixTuning" else "is not a change of the module's"
    for merge in (handle.merge, handle.merge_and_unload):
        assert says in refusal(merge)
    assert not handle.merged
    close(model(tokens()).logits, alone(tokens()).logits)


@torch.no_grad()
def optx_from(folder: Path) -> Tensor:
    model: Any = llama()
    optx.attach(model, folder)
    return model(tokens()).logits


def switch_whole_heads() -> None:
    """Two adapters, each with a head of its own: whose acts, in one process and in two."""
    found: list[list[Tensor]] = []
    for sharded in (False, True):
        model: Any = bert()
        handles = [
            optx.attach(model, optx.LoRA(rank=2), name=name, modules_to_save=["classifier"])
            for name in ("one", "two")
        ]
        for seed, (name, handle) in enumerate(zip(("one", "two"), handles, strict=True)):
            optx.set_adapter(model, name)
            move(handle, seed)
        if sharded:
            shard(model)
        outputs: list[Tensor] = []
        for name in ("one", "two", None, "one"):
            optx.set_adapter(model, name)
            outputs.append(model(tokens()).logits.detach())
        with handles[0].disable():
            outputs.append(model(tokens()).logits.detach())
        outputs.append(model(tokens()).logits.detach())
        states = [{key: whole(t).clone() for key, t in handle.state_dict().items()} for handle in handles]
        outputs.extend(t for state in states for t in state.values())
        with torch.no_grad():
            for p in handles[0].parameters():
                p.mul_(0.5)
        handles[0].load_state_dict(states[0])
        outputs.append(model(tokens()).logits.detach())
        for handle in handles:
            handle.remove()
        outputs.append(model(tokens()).logits.detach())
        found.append(outputs)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def every_case(rank: int, folder: Path) -> None:
    """On each of two ranks."""
    for method in METHODS:
        train_save_and_merge(method, rank, folder)
    switch_whole_heads()
