"""Modules replaced, resized, dropped or copied after attach: right, or one sentence; remove() works."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import bert, ids, llama, move, outputs
from injections import assert_same, snapshot
from torch import nn

import optx


def pair() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))


def moved(model: nn.Module, targets: Any = "[012]", **more: Any) -> optx.Handle:
    handle = optx.attach(model, optx.LoRA(rank=2), targets=targets, **more)
    move(handle)
    return handle


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def test_a_dropped_layer(tmp_path: Path) -> None:
    """The case layers_dropped.py: what is left computes; files and merges of the whole are refused."""
    model = pair()
    handle = moved(model)
    first, second = model[0], model[1]
    wanted = second(first(X))
    del model[2]
    assert torch.equal(model(X), wanted)
    says = r"'2' is not in the model any more: it was deleted or replaced since attach\. .*handle\.remove\(\)"
    for name, call in (
        ("save", lambda: handle.save(tmp_path / "it")),
        ("merge", handle.merge),
        ("merge", handle.merge_and_unload),
        ("state_dict", handle.state_dict),
    ):
        with pytest.raises(optx.OptxError, match=f"{name}: {says}"):
            call()
    assert [row.note for row in handle.report().rows if "gone" in row.note] == [
        "rank 2, scale 8, gone from the model"
    ]
    assert not (tmp_path / "it").exists()
    handle.unmerge()
    handle.remove()
    assert torch.equal(model(X), pair()[:2](X))


def test_layers_that_move_up_are_saved_by_the_name_that_they_have(tmp_path: Path) -> None:
    model = pair()
    handle = moved(model, targets="[12]")
    del model[0]
    handle.save(tmp_path / "it")
    assert {key.split(".")[0] for key in handle.state_dict()} == {"0", "1"}
    fresh = nn.Sequential(*list(pair())[1:])
    optx.attach(fresh, tmp_path / "it")
    assert torch.equal(fresh(X), model(X))


def test_fewer_layers_of_a_model_of_transformers() -> None:
    model = llama()
    handle = moved(model, targets=None)
    model.model.layers = model.model.layers[:1]
    kept = [one for one in handle.served if one.path.startswith("model.layers.0")]
    assert len(kept) == 2
    assert not torch.equal(outputs(model), outputs(llama(num_hidden_layers=1)))
    with pytest.raises(
        optx.OptxError, match=r"merge: 'model\.layers\.1\.self_attn\.q_proj' and 1 more is not"
    ):
        handle.merge()
    handle.remove()
    assert not [name for name, _ in model.named_modules() if "optx" in name]


def test_a_replaced_module_is_said_at_the_next_call(tmp_path: Path) -> None:
    model = bert()
    handle = moved(model, targets=["query", "classifier"])
    old, model.classifier = model.classifier, nn.Linear(16, 3)
    with pytest.raises(optx.OptxError, match=r"'classifier' was replaced since 'lora' .*a Linear without it"):
        model(ids())
    with pytest.raises(optx.OptxError, match="save: 'classifier' is not in the model any more"):
        handle.save(tmp_path / "it")
    new, model.classifier = model.classifier, old
    model(ids())
    handle.save(tmp_path / "it")
    model.classifier = new
    handle.remove()
    assert model.classifier is new
    model(ids())


def test_a_module_that_is_trained_whole_and_replaced(tmp_path: Path) -> None:
    model = bert()
    handle = moved(model, targets=["query"], modules_to_save=["classifier"])
    model.classifier = nn.Linear(16, 3)
    with pytest.raises(optx.OptxError, match="save: 'classifier' is not in the model any more"):
        handle.save(tmp_path / "it")
    assert handle.report().rows[-1].note == "Linear, gone from the model"
    handle.remove()


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"]])
def test_resized_embeddings(targets: list[str]) -> None:
    model = llama()
    handle = moved(model, targets=targets)
    model.resize_token_embeddings(70)
    with pytest.raises(optx.OptxError, match=r"was replaced since 'lora'|weight has shape \(70, 16\), and"):
        model(ids())
    with pytest.raises(optx.OptxError, match=rf"{targets[0]}"):
        handle.merge()
    handle.remove()
    assert outputs(model).shape[-1] == 70


def test_a_weight_of_another_shape() -> None:
    model = pair()
    handle = moved(model)
    model[2].weight = nn.Parameter(torch.zeros(5, 4))
    model[2].bias = nn.Parameter(torch.zeros(5))
    says = r"2\.weight has shape \(5, 4\), and had \(4, 4\) when 'lora' was attached to it\. Call handle\.re"
    with pytest.raises(optx.OptxError, match=says):
        model(X)
    with pytest.raises(optx.OptxError, match=says):
        handle.merge()
    handle.remove()
    assert model(X).shape == (3, 5)


def test_an_embedding_that_is_trained_whole_and_resized() -> None:
    model = llama()
    before = model.get_input_embeddings().weight.clone()
    handle = optx.attach(model, optx.LoRA(rank=2), modules_to_save=["model.embed_tokens"])
    model.resize_token_embeddings(70)
    same = model.get_submodule("model.embed_tokens") is handle.saved[0].module
    if same:
        with pytest.warns(
            UserWarning, match=r"model\.embed_tokens\.weight was resized while it was trained whole"
        ):
            handle.remove()
    else:
        handle.remove()
    assert torch.equal(model.get_input_embeddings().weight[: len(before)], before)
    model(ids())


class Wrapper(nn.Module):
    """Another library's, around a module."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x)


def test_copies_watch_themselves() -> None:
    model = pair()
    handle = moved(model)
    other = copy.deepcopy(model)
    again = pickle.loads(pickle.dumps(model))
    model[1] = nn.Linear(4, 4)
    for alike in (other, again):
        alike[0] = Wrapper(alike[0])  # its part is still there, and so no loss
        alike(X)
        alike[2] = nn.Linear(4, 4)
        with pytest.raises(optx.OptxError, match="'2' was replaced"):
            alike(X)
    with pytest.raises(optx.OptxError, match="'1' was replaced"):
        model(X)
    handle.remove()
    model(X)


def test_a_copy_of_model_and_handle_is_a_pair_of_its_own() -> None:
    model = pair()
    handle = moved(model)
    twin, twins = copy.deepcopy((model, handle))
    assert twins.model is twin
    wanted = model(X)
    move(twins)
    assert torch.equal(model(X), wanted)
    assert not torch.equal(twin(X), wanted)
    twins.remove()
    assert torch.equal(twin(X), pair()(X))
    assert torch.equal(model(X), wanted)
    handle.remove()
    assert torch.equal(model(X), pair()(X))


def test_data_parallel_computes_on_one_device_and_says_so_on_several() -> None:
    model = pair()
    moved(model)
    assert torch.equal(nn.DataParallel(model)(X), model(X))
    replica = model._replicate_for_data_parallel()  # what torch makes for each further device
    with pytest.raises(
        optx.OptxError, match=r"a copy that DataParallel made, .* Use DistributedDataParallel"
    ):
        replica(X)


def test_a_module_that_another_library_wraps_is_no_loss() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = pair()
    moved(model)
    wanted = model(X)
    model[0] = Wrapper(model[0])
    model[1] = checkpoint_wrapper(model[1])
    assert torch.equal(model(X), wanted)
    model[2] = nn.Linear(4, 4)
    with pytest.raises(optx.OptxError, match="'2' was replaced"):
        model(X)


def test_nothing_is_left_on_the_model() -> None:
    model = pair()
    before = snapshot(model)
    first, second = moved(model, targets="0"), moved(model, targets="1", name="second")
    first.remove()
    model[1] = nn.Linear(4, 4)
    with pytest.raises(optx.OptxError, match="'1' was replaced since 'second'"):
        model(X)
    model[1] = second.served[0].module
    second.remove()
    assert_same(model, before)


def test_compiled_whole() -> None:
    model = pair()
    moved(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(X), model(X))
