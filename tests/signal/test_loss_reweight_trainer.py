"""LossReweight in transformers' Trainer, resumed, and in what would go unnoticed."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import optx

pytestmark = pytest.mark.usefixtures("one_thread")

# ---- loops ------------------------------------------------------------------------------------------------


class Loop:
    """A classifier, AdamW and a reweighting whose temperature changes in every step."""

    def __init__(self, rw: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.rw = rw

    def run(self, steps: range, loss_of: Callable[[Tensor, Tensor], Tensor] | None = None) -> list[float]:
        found = []
        for step in steps:
            g = torch.Generator().manual_seed(step)
            x, y = torch.randn(12, 6, generator=g), torch.randint(4, (12,), generator=g)
            loss = (loss_of or self.loss)(x, y)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            found.append(loss.item())
        return found

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return self.rw(F.cross_entropy(self.model(x), y, reduction="none"))


def annealed() -> optx.LossReweight:
    return optx.LossReweight("quadratic", r=0.3, warmup=3, warmup_r=100, anneal=8, r_start=5.0, accumulate=2)


def test_resumed_in_mid_schedule_it_is_the_same_to_the_bit() -> None:
    whole = Loop(annealed())
    wanted = whole.run(range(24))
    first = Loop(annealed())
    found = first.run(range(11))
    file = io.BytesIO()
    parts = {"model": first.model, "optimizer": first.optimizer, "rw": first.rw}
    torch.save({name: part.state_dict() for name, part in parts.items()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    second = Loop(annealed())
    second.model.load_state_dict(state["model"])
    second.optimizer.load_state_dict(state["optimizer"])
    second.rw.load_state_dict(state["rw"])
    assert second.rw.temperature() == first.rw.temperature() != annealed().temperature()
    assert found + second.run(range(11, 24)) == wanted
    for a, b in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


# ---- transformers' Trainer --------------------------------------------------------------------------------


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, max_position_embeddings=16, **sizes))


def examples() -> list[dict[str, Tensor]]:
    """Sixteen sentences of ten tokens, of which a few to all have a label."""
    g = torch.Generator().manual_seed(3)
    found = []
    for i in range(16):
        tokens = torch.randint(40, (10,), generator=g)
        labels = tokens.clone()
        labels[2 + i % 8 :] = -100
        found.append({"input_ids": tokens, "labels": labels})
    return found


def trained(folder: Path, loss: Any, batch: int, accumulation: int, **more: Any) -> tuple[Any, list[float]]:
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(
        str(folder),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_steps=4,
        learning_rate=0.01,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        per_device_eval_batch_size=4,
        **more,
    )
    trainer = Trainer(
        llama(), args, train_dataset=examples(), eval_dataset=examples(), compute_loss_func=loss
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return trainer, losses


def apart(a: Any, b: Any) -> float:
    pairs = zip(a.model.parameters(), b.model.parameters(), strict=True)
    return max(float((x - y).detach().abs().max()) for x, y in pairs)


def test_trainer_accumulates_as_without(tmp_path: Path) -> None:
    """Uniform by length is Trainer's own loss, whatever is accumulated; evaluation is Trainer's too."""
    pytest.importorskip("transformers")
    own, losses = trained(tmp_path, None, 4, 2)
    rw = optx.LossReweight("uniform", length_weighting=True, accumulate=2)
    ours, found = trained(tmp_path, rw.from_outputs, 4, 2)
    assert apart(own, ours) < 1e-5
    assert found == pytest.approx(losses, rel=1e-4)
    assert ours.evaluate()["eval_loss"] == pytest.approx(own.evaluate()["eval_loss"], rel=1e-4)
    assert rw.step == 4  # evaluation is none


def test_trainer_weighs_each_batch_by_itself(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    rw = optx.LossReweight(r=0.4)
    trainer, losses = trained(tmp_path, rw.from_outputs, 4, 2)
    model = llama()
    batches = [examples()[i : i + 4] for i in range(0, 8, 4)]
    every = [torch.stack([e["labels"] for e in batch]) for batch in batches]
    total = sum(int((labels[:, 1:] != -100).sum()) for labels in every)
    wanted = 0.0
    for batch, labels in zip(batches, every, strict=True):
        logits = model(torch.stack([e["input_ids"] for e in batch])).logits
        weighed = optx.LossReweight(r=0.4).from_logits(logits, labels)
        wanted += float(weighed.detach() * (labels[:, 1:] != -100).sum() / total)
    assert losses[0] == pytest.approx(wanted, rel=1e-4)
    plain, _ = trained(tmp_path, None, 4, 2)
    assert apart(trainer, plain) > 1e-3


def test_evaluation_is_the_trainers_own() -> None:
    """Per token, whatever is trained on, so that eval_loss is comparable with a run without optx."""
    model, batch = llama().eval(), examples()[:4]
    inputs, labels = (torch.stack([e[name] for e in batch]) for name in ("input_ids", "labels"))
    items = (labels[:, 1:] != -100).sum()
    with torch.no_grad():
        outputs = model(inputs, labels=labels, num_items_in_batch=items)
        found = optx.LossReweight("extremes", r=0.1).from_outputs(outputs, labels, items)
    torch.testing.assert_close(found, outputs.loss)


def test_from_outputs_knows_whose_labels_are_shifted() -> None:
    from transformers.modeling_outputs import CausalLMOutputWithPast, MaskedLMOutput

    g = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(3, 4, 7, generator=g), torch.randint(7, (3, 4), generator=g)
    for shift, kind in ((True, CausalLMOutputWithPast), (False, MaskedLMOutput)):
        found = optx.LossReweight().from_outputs(kind(logits=logits), labels)
        assert found == optx.LossReweight().from_logits(logits, labels, shift=shift)
    with pytest.raises(optx.OptxError, match="dict does not say whether labels are those of the next token"):
        optx.LossReweight().from_outputs({"logits": logits}, labels)
    given_ = optx.LossReweight().from_outputs({"logits": logits}, labels, shift=False)
    assert given_ == optx.LossReweight().from_logits(logits, labels, shift=False)
    flat = optx.LossReweight().from_outputs({"logits": logits[:, 0]}, labels[:, 0])
    assert flat == optx.LossReweight().from_logits(logits[:, 0], labels[:, 0])
    with pytest.raises(optx.OptxError, match="num_items_in_batch has 2 numbers, as under DataParallel"):
        optx.LossReweight().from_outputs({"logits": logits}, labels, torch.tensor([3, 3]), shift=True)


# ---- cost -------------------------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Counts operations, and the largest tensor that one makes."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.numbers = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.count += 1
        if isinstance(result, Tensor) and not function.is_view:
            self.numbers += result.numel()
        return result


def test_operations_do_not_depend_on_the_batch() -> None:
    counts = []
    for size in (4, 512):
        losses = torch.rand(size, requires_grad=True)
        with Operations() as seen:
            optx.LossReweight()(losses)
        counts.append(seen.count)
    assert counts[0] == counts[1] < 60


# ---- what would go unnoticed ------------------------------------------------------------------------------


def test_batches_of_one_are_told_once_and_a_remainder_is_not() -> None:
    rw = optx.LossReweight()
    for size in (4, 1, 4, 1, 4):
        rw(torch.rand(size))
    rw(torch.rand(1))  # warnings are errors here
    with pytest.warns(UserWarning, match="each call has one sample.*'linupper' has no effect"):
        rw(torch.rand(1))
    rw(torch.rand(1))
    plain = optx.LossReweight("uniform")
    for _ in range(3):
        plain(torch.rand(1))


def test_zeros_of_ignored_labels_are_told_once() -> None:
    losses = F.cross_entropy(torch.randn(2, 5, 3), torch.tensor([[0, 1, -100], [4, 2, 3]]), reduction="none")
    rw = optx.LossReweight()
    rw(losses, losses != 0)
    with torch.no_grad():
        rw(losses)
    with pytest.warns(UserWarning, match=r"1 of 6 losses are exactly 0.*give a mask \(labels != -100\)"):
        rw(losses)
    rw(losses)


def test_one_token_has_no_next() -> None:
    rw = optx.LossReweight()
    with pytest.raises(optx.OptxError, match="so none counts; give shift=False"):
        rw.from_logits(torch.zeros(3, 1, 5), torch.zeros(3, 1).long())
    assert rw.from_logits(torch.rand(3, 1, 5), torch.zeros(3, 1).long(), shift=False) > 0


def test_the_temperature_can_be_set() -> None:
    losses = torch.tensor([1.0, 2.0, 3.0, 5.0])
    rw = optx.LossReweight(r=0.4)
    rw.r = 1.0
    assert rw.r == rw.temperature() == 1.0
    assert float(rw(losses)) == pytest.approx(3.22112299)
    with pytest.raises(optx.OptxError, match="r is -1"):
        rw.r = -1
    assert rw.r == 1.0


@pytest.mark.parametrize("most", [None, 50.0])
def test_many_weights_sum_to_1_too(most: float | None) -> None:
    """Flattened tokens, say, half of which are learnt."""
    losses = (torch.rand(100_003, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    for strategy in ("linupper", "quadratic", "extremes", "upper"):
        weights = optx.LossReweight(strategy, r=0.4, max_weight=most).weights(losses)
        assert abs(float(weights.double().sum()) - 1) < 1e-6


def test_losses_that_rounding_alone_tells_apart_are_equal() -> None:
    """Next to 10, float32's numbers are 9.5e-7 apart."""
    close = torch.tensor([10.0, 10.0 + 1e-6, 10.0])
    assert close[0] != close[1]
    assert optx.LossReweight(r=0.1).weights(close).tolist() == pytest.approx([1 / 3] * 3)
    apart = optx.LossReweight(r=0.1).weights(torch.tensor([10.0, 10.0001, 10.0]))
    assert apart[1] > 0.99


@pytest.mark.parametrize("r", [1e-5, 1e-7, 1e-40])
def test_the_smallest_temperatures_take_the_largest_loss(r: float) -> None:
    weights = optx.LossReweight("upper", r=r).weights(torch.tensor([1.0, 2.0, 5.0]))
    assert weights.tolist() == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_one_loss_that_is_not_finite_is_told_by_the_sum(bad: float) -> None:
    for losses in ([1.0, bad, 2.0], [bad, bad], [bad]):
        assert optx.LossReweight()(torch.tensor(losses)).isnan()
