"""`optx.VQLogits` on language models, in loops, in files and on two processes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from injections import assert_same, llama, snapshot, tokens
from processes import on_processes
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import optx

SMALL: Any = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "attn_implementation": "sdpa",
}


def untied(dtype: torch.dtype = torch.float32) -> Any:
    model = llama(1)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    return model.to(dtype)


def masked() -> Any:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(intermediate_size=24, max_position_embeddings=32, **SMALL)).eval()
    with torch.no_grad():
        model.cls.predictions.bias.normal_()
    return model


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_inner=24, n_positions=32, **SMALL)).eval()


def served(model: Any, **options: Any) -> Any:
    given: dict[str, Any] = {"codes": 9, "init": "random", "token_bias": True, **options}
    handle = optx.attach(model, optx.VQLogits(**given))
    with torch.no_grad():
        for i, p in enumerate(handle.parameters()):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(p))
    return handle


# ---- families -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "head"),
    [(llama, "lm_head"), (masked, "cls.predictions.decoder"), (gpt2, "lm_head")],
    ids=["Llama", "BERT", "GPT-2"],
)
def test_the_loss_of_a_family_is_its_own(make: Any, head: str) -> None:
    """Shifted where the model's own is, of a tied head, and the embedding learns on."""
    model, ids = make(), tokens()
    before = snapshot(model)
    with pytest.raises(optx.TargetError, match=r"\(tied\)"):
        served(model)
    assert_same(model, before)
    handle = served(model, untie=True)
    assert [one.path for one in handle.served] == [head]
    labels = ids.clone()
    labels[:, 2] = -100
    expected = model(input_ids=ids, labels=labels)
    assert expected.logits.shape == (2, 7, 64)
    with handle.hidden():
        hidden = model(input_ids=ids).logits
    assert hidden.shape == (2, 7, 16)
    loss = handle.loss(hidden, labels)
    assert torch.allclose(loss, expected.loss, atol=1e-6)
    flat = handle.loss(hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert torch.equal(flat, handle.loss(hidden, labels, shift=True))
    assert torch.equal(flat, loss) == (make is not masked)
    loss.backward()
    assert model.get_input_embeddings().weight.grad.any()
    # What rests would be waited for by DDP.
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad and p.ndim > 1)
    tied = "transformer.wte" if make is gpt2 else "embed"
    assert any(tied in name for name in handle.report().tied)
    handle.remove()
    model.zero_grad()
    assert_same(model, before)


def test_what_changes_logits_after_the_head_is_refused() -> None:
    model = untied()
    handle = served(model)
    model.config.logit_scale = 0.5
    with pytest.raises(optx.OptxError, match=r"changes its logits after the head \(config.logit_scale=0.5\)"):
        handle.loss(torch.zeros(2, 16), torch.zeros(2, dtype=torch.int64))
    model.config.logit_scale = 1.0
    handle.loss(torch.zeros(2, 16), torch.zeros(2, dtype=torch.int64))


def test_a_loss_that_takes_the_weight_itself_is_noticed() -> None:
    """As TRL's does; of a tied head, of which an embedding's use is no fault."""
    for make in (llama, untied):
        model = make(1) if make is llama else untied()
        handle = served(model, untie=True)
        model.forward = lambda ids, model=model: model.model(ids).last_hidden_state @ model.lm_head.weight.t()
        with pytest.raises(optx.OptxError, match="did not act"):
            model(tokens())
        with handle.disable():
            model(tokens())


def test_generation_and_compile_see_tokens() -> None:
    model = untied()
    served(model)
    ids = model.generate(tokens()[:, :3], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(ids[:, 3], model(ids[:, :3]).logits[:, -1].argmax(-1))
    hidden = torch.randn(4, 16)
    torch._dynamo.reset()
    head = torch.compile(model.lm_head, backend="eager", fullgraph=True)
    assert torch.equal(head(hidden), model.lm_head(hidden))


def test_a_copy_has_its_own() -> None:
    model = untied()
    handle = served(model)
    handle.loss(torch.zeros(2, 16), torch.zeros(2, dtype=torch.int64))
    twin = copy.deepcopy(model)
    before = twin(tokens()).logits
    handle.remove()
    assert torch.equal(twin(tokens()).logits, before)
    assert not torch.equal(model(tokens()).logits, before)


# ---- loops ----------------------------------------------------------------------------------------------


def batches(count: int) -> list[Tensor]:
    draws = torch.Generator().manual_seed(5)
    return [torch.randint(3, 64, (4, 8), generator=draws) for _ in range(count)]


def steps(model: Any, handle: Any, opt: Any, some: list[Tensor]) -> None:
    for ids in some:
        with handle.hidden():
            hidden = model(ids).logits
        opt.zero_grad()
        handle.loss(hidden, ids, shift=True).backward()
        opt.step()


def test_the_optimizer_follows_and_a_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    def begun() -> tuple[Any, Any, Any]:
        model = untied()
        opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
        handle = optx.attach(model, optx.VQLogits(codes=9, token_bias=True))
        return model, handle, optx.wrap(opt, handle)

    model, handle, opt = begun()
    before = model.lm_head.weight.detach().clone()
    trained = {id(p) for p in opt.param_groups[0]["params"]}
    assert id(model.lm_head.weight) not in trained
    assert {id(p) for p in handle.parameters()} <= trained
    every = batches(6)
    steps(model, handle, opt, every[:3])
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, tmp_path / "x.pt")
    steps(model, handle, opt, every[3:])
    again, other, second = begun()
    saved = torch.load(tmp_path / "x.pt", weights_only=True)
    again.load_state_dict(saved["model"])
    second.load_state_dict(saved["opt"])
    steps(again, other, second, every[3:])
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in model.state_dict().items())
    assert torch.equal(model.lm_head.weight, before)
    handle.remove()
    assert id(model.lm_head.weight) in {id(p) for p in opt.param_groups[0]["params"]}


def test_files_have_the_codes(tmp_path: Path) -> None:
    model = untied()
    handle = served(model, init="kmeans", counts=torch.ones(64))
    handle.save(tmp_path)
    fresh = untied()
    read: Any = optx.attach(fresh, tmp_path)
    assert torch.equal(fresh(tokens()).logits, model(tokens()).logits)
    assert torch.equal(read.mapping, handle.mapping)
    assert {key: t.dtype for key, t in read.state_dict().items()} == {
        "lm_head.vq_logits.codebook": torch.float32,
        "lm_head.vq_logits.token_bias": torch.float32,
        "lm_head.vq_logits.mapping": torch.int32,
    }


def test_trainer(tmp_path: Path) -> None:
    """A Trainer with the loss by codes, or with the model's own, ends at the same numbers."""
    pytest.importorskip("accelerate")
    from trainer_runs import trainer
    from transformers import Trainer

    class ByCodes(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **more: Any) -> Any:
            labels = inputs.pop("labels")
            count = more["num_items_in_batch"]
            with handle.hidden():
                hidden = model(**inputs).logits
            return handle.loss(hidden, labels, reduction="sum") / count

    found = []
    for kind in (Trainer, ByCodes):
        model = untied()
        handle = served(model)
        trainer(tmp_path / kind.__name__, model, handle, kind=kind, save_strategy="no", max_steps=3).train()
        found.append({name: p.detach() for name, p in model.named_parameters()})
    for name, p in found[0].items():
        assert torch.allclose(p, found[1][name], atol=1e-5), name
    assert not torch.equal(found[0]["lm_head.optx.vq_logits.codebook"], served(untied()).codebook)


# ---- two processes --------------------------------------------------------------------------------------


def _trained(model: Any, call: Any, handle: Any, rows: slice) -> dict[str, Tensor]:
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for ids in batches(3):
        with handle.hidden():
            hidden = call(ids[rows]).logits
        opt.zero_grad()
        handle.loss(hidden, ids[rows], shift=True).backward()
        opt.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def two_processes_are_one(rank: int) -> None:
    model = untied(torch.float64)
    handle = served(model)
    by_two = _trained(model, DistributedDataParallel(model), handle, slice(2 * rank, 2 * rank + 2))
    again = untied(torch.float64)
    by_one = _trained(again, again, served(again), slice(None))
    for name, p in by_two.items():
        assert torch.allclose(p, by_one[name], rtol=0, atol=1e-12), name
    assert by_two["lm_head.optx.vq_logits.codebook"].any()
    assert dist.get_world_size() == 2


test_on_two_processes = on_processes(2, two_processes_are_one)
