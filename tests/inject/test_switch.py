"""`optx.set_adapter`: which of several adapters act, and what is trained then, as in PEFT."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import assert_close, attached, bert, by_peft, ids, llama, outputs, peft_talk, shake
from torch import nn

import optx
from optx import LoRA


def three() -> tuple[Any, dict[str, optx.Handle]]:
    """A model with adapters of three names, one of them of several injections."""
    model = llama()
    handles = {
        "poems": attached(model, LoRA(rank=2), name="poems"),
        "news": attached(model, LoRA(rank=3, dora=True), targets=["down_proj", "q_proj"], name="news"),
        "mam": attached(model, optx.MAM(prefix=2, rank=2)),
    }
    for number, handle in enumerate(handles.values()):
        shake(handle.parameters(), seed=number)
    return model, handles


def alone(*names: str) -> torch.Tensor:
    """What the model gives with some of the adapters only."""
    model, handles = three()
    for name, handle in handles.items():
        if name not in names:
            handle.remove()
    return outputs(model)


@pytest.mark.parametrize(
    "names", ["poems", "mam", ["news"], ("poems", "mam"), ["poems", "news", "mam"], None, []]
)
def test_those_of_a_name_act_and_are_trained(names: Any) -> None:
    model, handles = three()
    flags = {name: p.requires_grad for name, p in model.named_parameters() if ".optx." not in name}
    wanted = [names] if isinstance(names, str) else list(names or [])
    model(torch.zeros(1, 3, dtype=torch.long)).logits.sum().backward()
    optx.set_adapter(model, names)
    assert torch.equal(outputs(model), alone(*wanted))
    for name, handle in handles.items():
        assert all(p.requires_grad == (name in wanted) for p in handle.parameters())
        assert all((p.grad is None) == (name not in wanted) for p in handle.parameters())
    assert {name: p.requires_grad for name, p in model.named_parameters() if name in flags} == flags
    optx.set_adapter(model, list(handles))
    assert torch.equal(outputs(model), outputs(three()[0]))


def test_an_optimizer_moves_what_acts_alone() -> None:
    model, handles = three()
    opt = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    before = {key: t.clone() for key, t in handles["poems"].state_dict().items()}
    for p in model.parameters():
        p.requires_grad_(False)
    optx.set_adapter(model, "news")
    model(torch.zeros(1, 3, dtype=torch.long)).logits.square().sum().backward()
    opt.step()
    assert all(torch.equal(t, before[key]) for key, t in handles["poems"].state_dict().items())
    assert any(p.grad is not None for p in handles["news"].parameters())
    optx.set_adapter(model, "news", inference_mode=True)
    assert not any(p.requires_grad for p in model.parameters())


def test_it_is_pefts(tmp_path: Path) -> None:
    import peft

    for seed, (name, targets) in enumerate({"a": ["q_proj"], "b": ["q_proj", "down_proj"]}.items()):
        config = peft.LoraConfig(r=2, target_modules=targets)
        by_peft(
            llama(),
            config,
            tmp_path / name,
            lambda model, s=seed: shake((p for p in model.parameters() if p.requires_grad), seed=s),
        )
    with peft_talk():
        theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "a", adapter_name="a", is_trainable=True)
        theirs.load_adapter(tmp_path / "b", adapter_name="b", is_trainable=True)
    model = llama()
    for name in "ab":
        optx.attach(model, tmp_path / name, name=name)
    for name in "aba":
        theirs.set_adapter(name)
        optx.set_adapter(model, name)
        assert_close(outputs(model), outputs(theirs))
        trained = {
            key.split(".lora_")[0].rpartition("model.")[2]
            for key, p in theirs.named_parameters()
            if p.requires_grad
        }
        ours = {
            key.split(".optx.")[0].rpartition("model.")[2]
            for key, p in model.named_parameters()
            if p.requires_grad and ".optx." in key
        }
        assert trained == ours


def test_heads_that_are_trained_whole_change_too(tmp_path: Path) -> None:
    """Each of two adapters has a classifier of its own, as PEFT's have."""
    heads: dict[str, torch.Tensor] = {}
    wanted: dict[str, torch.Tensor] = {}
    for seed, name in enumerate(("a", "b")):
        model = bert()
        handle = optx.attach(model, LoRA(rank=2))
        shake(handle.parameters(), seed=seed)
        handle.save(tmp_path / name)
        heads[name], wanted[name] = model.classifier.weight.detach().clone(), outputs(model)
    model = bert()
    start = outputs(model)
    handles = {name: optx.attach(model, tmp_path / name, name=name) for name in heads}
    for name in ("a", "b", "a"):
        optx.set_adapter(model, name)
        assert torch.equal(outputs(model), wanted[name])
        assert model.classifier.weight.requires_grad
        assert all(torch.equal(h.state_dict()["classifier.weight"], heads[n]) for n, h in handles.items())
        handles[name].save(tmp_path / "again")
        fresh = bert()
        optx.attach(fresh, tmp_path / "again")
        assert torch.equal(outputs(fresh), wanted[name])
    twin = copy.deepcopy(model)
    optx.set_adapter(twin, "b")
    assert torch.equal(outputs(twin), wanted["b"])
    assert torch.equal(outputs(model), wanted["a"])
    optx.set_adapter(model, None)
    assert torch.equal(outputs(model), start)
    assert not model.classifier.weight.requires_grad
    with pytest.raises(optx.OptxError, match=r"'classifier' is trained whole with each of \['a', 'b'\]"):
        optx.set_adapter(model, ["a", "b"])
    assert torch.equal(outputs(model), start)
    handles["a"].remove()
    optx.set_adapter(model, "b")
    assert torch.equal(outputs(model), wanted["b"])
    handles["b"].remove()
    assert torch.equal(outputs(model), start)


def test_gradients_and_flags_of_a_head_that_two_adapters_have() -> None:
    """A gradient of one's values is none of the other's; what is not trained has none."""
    model = bert()
    for name in "ab":
        optx.attach(model, LoRA(rank=2), name=name)
    head = model.classifier.weight
    for name, inference, kept in (("a", False, False), ("a", False, True), ("a", True, False)):
        head.requires_grad_(True).grad = torch.ones_like(head)
        optx.set_adapter(model, name, inference_mode=inference)
        assert head.requires_grad == (not inference)
        assert (head.grad is not None) == kept


def test_a_head_changes_within_one_autocast() -> None:
    """Autocast keeps casts of weights that are trained."""
    model = bert()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        start = model(ids()).logits
    handle = optx.attach(model, LoRA(rank=2))
    shake(handle.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tuned = model(ids()).logits
        with handle.disable():
            assert torch.equal(model(ids()).logits, start)
        assert torch.equal(model(ids()).logits, tuned)


def test_what_cannot_be_switched() -> None:
    model, handles = three()
    with pytest.raises(optx.OptxError, match=r"no adapter is called 'poem'\. Near: 'poems'"):
        optx.set_adapter(model, ["news", "poem"])
    with pytest.raises(optx.OptxError, match=r"no adapter is called 'lora'\. There are none"):
        optx.set_adapter(nn.Linear(2, 2), "lora")
    names: Any = 1
    with pytest.raises(optx.OptxError, match=r"names is 1; it must be a name"):
        optx.set_adapter(model, names)
    handles["mam"].remove()
    handles["poems"].merge()
    wanted = outputs(model)
    with pytest.raises(
        optx.MergeError, match=r"'poems' is merged into the weights at 'model.layers.0.self_attn"
    ):
        optx.set_adapter(model, "news")
    assert torch.equal(outputs(model), wanted)
    optx.set_adapter(model, "poems")
    handles["poems"].unmerge()
    assert torch.equal(outputs(model), alone("poems"))
