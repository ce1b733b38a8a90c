"""Heads of classification and question answering: found, trained, saved, and theirs to PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import attached, bert, config_in, ids, in_peft, llama, outputs, plain, shake
from torch import nn

import optx
from optx import LoRA
from optx.inject import _trained_whole


def of(name: str) -> Any:
    """A small model of a class of transformers."""
    import transformers

    if name.startswith("Bert"):
        return bert(name)
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"num_key_value_heads": 1, "intermediate_size": 24, "pad_token_id": 0}
    family = name[: name.index("For")]
    if family == "DistilBert":
        sizes, more = {"vocab_size": 64, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2}, {}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**sizes, **more)
    return getattr(transformers, name)(config).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out = model(ids())
    return out.logits if "logits" in out else out.start_logits


@pytest.mark.parametrize(
    ("name", "heads", "task"),
    [
        ("BertForSequenceClassification", ["classifier"], "SEQ_CLS"),
        ("BertForTokenClassification", ["classifier"], "TOKEN_CLS"),
        ("BertForQuestionAnswering", ["qa_outputs"], "QUESTION_ANS"),
        ("DistilBertForSequenceClassification", ["pre_classifier", "classifier"], "SEQ_CLS"),
        ("RobertaForSequenceClassification", ["classifier"], "SEQ_CLS"),
        ("LlamaForSequenceClassification", ["score"], "SEQ_CLS"),
        ("Qwen2ForTokenClassification", ["score"], "TOKEN_CLS"),
    ],
)
def test_heads_are_found_saved_and_read(name: str, heads: list[str], task: str, tmp_path: Path) -> None:
    model = of(name)
    before = {key: t.clone() for key, t in model.state_dict().items()}
    handle = optx.attach(model, LoRA(rank=2))
    assert [kept.path for kept in handle.saved] == heads
    assert [row.module for row in handle.report().rows if row.injection == "trained whole"] == heads
    own = {id(p) for p in handle.parameters()}
    assert all(id(p) in own for head in heads for p in model.get_submodule(head).parameters())
    start = logits(model)
    shake(handle.parameters(), by=0.3)
    handle.save(tmp_path)
    assert config_in(tmp_path)["task_type"] == task
    wanted = logits(model)
    assert (wanted - start).abs().max() > 0.01
    fresh = of(name)
    again = optx.attach(fresh, tmp_path)
    assert torch.equal(logits(fresh), wanted)
    assert [kept.path for kept in again.saved] == heads
    theirs = in_peft(of(name), tmp_path)
    assert task.lower().split("_")[0][:3] in type(theirs).__name__.lower() or task == "QUESTION_ANS"
    torch.testing.assert_close(logits(theirs), wanted, rtol=1e-5, atol=1e-5)
    handle.remove()
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


def test_it_is_left_where_something_else_is_asked_for() -> None:
    for options in ({"modules_to_save": ()}, {"targets": ["query", "classifier"]}, {"targets": nn.Linear}):
        handle = optx.attach(bert(), LoRA(rank=2), **options)  # type: ignore[arg-type]
        assert not handle.saved
    assert not optx.attach(llama(), LoRA(rank=2)).saved
    assert not optx.attach(bert("BertModel"), LoRA(rank=2)).saved
    assert not optx.attach(plain(), LoRA(rank=2), "fc").saved
    [kept] = optx.attach(bert(), LoRA(rank=2), ["query"], modules_to_save=["bert.pooler"]).saved
    assert kept.path == "bert.pooler"


def test_a_subclass_of_a_persons_own_has_its_parents_head() -> None:
    kind: Any = type(bert())

    class Mine(kind):
        pass

    model = Mine(bert().config)
    assert [kept.path for kept in optx.attach(model, optx.BitFit()).saved] == ["classifier"]


def test_without_it_a_head_has_its_own_values_and_autograd_the_right_ones() -> None:
    """A forward as without, between a forward and its backward: a reference's logits."""
    model = bert()
    start = outputs(model)
    handle = attached(model, LoRA(rank=2))
    twin = bert()
    optx.attach(twin, LoRA(rank=2)).load_state_dict(handle.state_dict())
    loss = model(ids()).logits.square().sum()
    with handle.disable():
        assert torch.equal(outputs(model), start)
    loss.backward()
    twin(ids()).logits.square().sum().backward()
    for (name, p), (_, q) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert torch.equal(p.detach(), q.detach()), name
        assert p.grad is None or torch.equal(p.grad, q.grad), name  # type: ignore[arg-type]
    handle.disable()
    assert torch.equal(outputs(model), start)
    assert torch.equal(handle.state_dict()["classifier.weight"], twin.classifier.weight)
    handle.enable()
    assert torch.equal(outputs(model), outputs(twin))


@pytest.mark.parametrize("first", ["one", "two"])
def test_two_with_one_head_come_off_in_any_order(first: str) -> None:
    model = bert()
    base = {key: t.clone() for key, t in model.state_dict().items()}
    handles = {name: attached(model, LoRA(rank=2), name=name) for name in ("one", "two")}
    shake(model.classifier.parameters(), seed=8)
    trained = model.classifier.weight.detach().clone()
    handles.pop(first).remove()
    [left] = handles.values()
    if first == "one":
        assert torch.equal(model.classifier.weight, trained)
    else:
        assert not torch.equal(model.classifier.weight, trained)
    assert not torch.equal(model.classifier.weight, base["classifier.weight"])
    assert torch.equal(left.state_dict()["classifier.weight"], model.classifier.weight)
    left.remove()
    assert all(torch.equal(t, base[key]) for key, t in model.state_dict().items())
    assert not any("optx" in key for key in model.classifier.__dict__)


def test_a_merge_for_good_keeps_the_head() -> None:
    model = bert()
    handle = attached(model, LoRA(rank=2))
    wanted = outputs(model)
    handle.merge_and_unload()
    torch.testing.assert_close(outputs(model), wanted, rtol=1e-4, atol=1e-4)
    assert not any("optx" in key for key in model.classifier.__dict__)


def test_heads_that_peft_has_no_name_for(tmp_path: Path) -> None:
    import transformers

    def make() -> Any:
        torch.manual_seed(0)
        sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 64, "eos_token_id": 3}
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
        config = transformers.BartConfig(encoder_ffn_dim=24, decoder_ffn_dim=24, **sizes, **heads)
        return transformers.BartForSequenceClassification(config).eval()

    x = torch.tensor([[5, 6, 3]])
    model = make()
    handle = attached(model, LoRA(rank=2))
    assert [kept.path for kept in handle.saved] == ["classification_head"]
    handle.save(tmp_path)
    with torch.no_grad():
        wanted, theirs = model(x).logits, in_peft(make(), tmp_path)(x).logits
    torch.testing.assert_close(theirs, wanted, rtol=1e-5, atol=1e-5)


def test_a_head_of_an_unknown_name_is_said() -> None:
    class NewForSequenceClassification(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

    with pytest.warns(UserWarning, match=r"NewForSequenceClassification has no head of a name that is known"):
        assert not optx.attach(NewForSequenceClassification(), LoRA(rank=2), "fc").saved


def test_a_head_is_left_to_what_has_nothing_else() -> None:
    class OneForTokenClassification(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.score = nn.Linear(4, 4, bias=False), nn.Linear(4, 2)

    handle = optx.attach(OneForTokenClassification(), optx.BitFit())
    assert [one.path for one in handle.served] == ["score"]
    assert not handle.saved


@pytest.mark.parametrize("name", ["CLIPModel", "CLIPTextModel", "SiglipModel", "CLIPVisionModel"])
def test_models_that_pefts_class_for_features_cannot_call(name: str, tmp_path: Path) -> None:
    """They take no ``inputs_embeds``, which that class passes on; the plain one serves them."""
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 64, "max_position_embeddings": 16, "eos_token_id": 63, "bos_token_id": 0}
    image = {**sizes, "image_size": 8, "patch_size": 4}
    parts = {"text_config": {**text, "pad_token_id": 1}, "vision_config": image}

    def make() -> Any:
        torch.manual_seed(0)
        options = image if "Vision" in name else parts["text_config"] if "Text" in name else parts
        config: Any = getattr(transformers, name.replace("Model", "Config"))(**options)
        return getattr(transformers, name)(config).eval()

    inputs = {"pixel_values": torch.ones(2, 3, 8, 8), "input_ids": ids()}
    drop = "input_ids" if "Vision" in name else "pixel_values" if "Text" in name else ""
    inputs.pop(drop, None)
    model = make()
    attached(model, LoRA(rank=2), targets=["q_proj"]).save(tmp_path)
    assert config_in(tmp_path)["task_type"] is None
    with torch.no_grad():
        wanted, theirs = model(**inputs), in_peft(make(), tmp_path)(**inputs)
    pairs = zip(wanted.to_tuple()[:2], theirs.to_tuple()[:2], strict=True)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"modules_to_save": "classifier"}, r"modules_to_save is 'classifier'; it must be a list of paths"),
        ({"modules_to_save": [3]}, r"modules_to_save is \[3\]; it must be a list"),
        (
            {"modules_to_save": ["bert.pooler", "bert.pooler.dense"]},
            r"and 'bert\.pooler\.dense', which is inside",
        ),
        ({"name": 3}, r"name is 3; it must be a Python identifier"),
        ({"name": "training"}, r"name='training' must be a Python identifier that means nothing else"),
    ],
)
def test_what_is_no_list_of_modules_or_no_name(options: dict[str, Any], why: str) -> None:
    with pytest.raises(optx.OptxError, match=why):
        optx.attach(bert(), optx.LoRA(rank=2), ["query"], **options)


def test_a_module_that_is_named_twice_is_trained_once() -> None:
    handle = optx.attach(bert(), optx.LoRA(rank=2), ["query"], modules_to_save=["classifier"] * 2)
    assert len(handle.parameters()) == len(set(handle.parameters()))


def _two_of_one_head() -> tuple[nn.Linear, _trained_whole.Saved, _trained_whole.Saved]:
    head = nn.Linear(3, 2)
    one, two = (_trained_whole.Saved("head", head, _trained_whole.Values(n)) for n in ("one", "two"))
    return head, one, two


def _fill(head: nn.Linear, value: float) -> None:
    with torch.no_grad():
        head.weight.fill_(value)


def test_training_a_head_whose_own_values_are_in_it_keeps_them() -> None:
    head, one, two = _two_of_one_head()
    own = head.weight.detach().clone()
    _trained_whole.begin(one)
    _fill(head, 1)
    _trained_whole.rest(head)
    _trained_whole.begin(two)
    _fill(head, 2)
    _trained_whole.end(two, restore=True)
    assert bool((head.weight == 1).all())
    _trained_whole.rest(head)
    assert torch.equal(head.weight, own)


def test_values_that_a_head_keeps_for_good_are_its_own() -> None:
    head, one, two = _two_of_one_head()
    _trained_whole.begin(one)
    _fill(head, 1)
    _trained_whole.begin(two)
    _fill(head, 2)
    _trained_whole.end(two, restore=False)
    _trained_whole.act(head, one.values)
    assert bool((head.weight == 1).all())
    _trained_whole.rest(head)
    assert bool((head.weight == 2).all())


def test_a_head_that_was_resized_while_values_rested_stays_so() -> None:
    head, one, _ = _two_of_one_head()
    _trained_whole.begin(one)
    _trained_whole.rest(head)
    head.weight = nn.Parameter(torch.zeros(5, 3))
    _trained_whole.act(head, one.values)
    assert torch.equal(head.weight, torch.zeros(5, 3))
