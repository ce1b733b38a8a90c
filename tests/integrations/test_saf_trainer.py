"""SAF and MESA in transformers' Trainer: accumulation, and evaluation between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

import optx

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

pytestmark = pytest.mark.usefixtures("one_thread")
SAMPLES = 16


class Sentences(Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, i: int) -> dict[str, Any]:
        tokens = torch.randint(2, 20, (6,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": tokens, "labels": i % 3}


class Held(transformers.Trainer):
    """The lines that a Trainer needs; `loss_of` gets logits, index and the model's inputs."""

    def __init__(self, *args: Any, loss_of: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.loss_of, self.seen = loss_of, []

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **options: Any) -> Any:
        index = inputs.pop("index")
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **options)
        more = self.loss_of(outputs.logits, index, inputs)
        if model.training:
            self.seen.append(float(more.detach()))
        return (loss + more, outputs) if return_outputs else loss + more


class Epochs(transformers.TrainerCallback):
    """Epochs are told, and the loss's state lies beside the model's."""

    def __init__(self, loss: Any, resumed: Path | None = None) -> None:
        self.loss, self.resumed = loss, resumed

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.resumed is not None:  # the model has its weights by now
            self.loss.load_state_dict(torch.load(self.resumed / "loss.pt", weights_only=True))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.loss.set_epoch(int((state.epoch or 0) + 1e-6))  # a whole number but after a resumption

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        torch.save(self.loss.state_dict(), folder / "loss.pt")


def model() -> Any:
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=3,
        initializer_range=0.5,
    )
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config)


def train(
    kind: str, folder: Path, epochs: int, weight: float = 1.0, save: bool = False, resumed: Path | None = None
) -> tuple[Any, Any, list[float]]:
    net, data = model(), optx.with_index(Sentences())
    if kind == "neither":
        loss: Any = optx.SAF(len(data), start_epoch=99)
        loss_of: Any = lambda logits, *_: logits.sum() * 0  # noqa: E731
    elif kind == "saf":
        loss = optx.SAF(len(data), weight=weight, lookback=1, start_epoch=0)
        loss_of = lambda logits, index, _: loss(logits, index)  # noqa: E731
    else:
        loss = optx.MESA(net, weight=weight, beta=0.5, start_epoch=0)
        loss_of = lambda logits, _, inputs: loss(logits, inputs["input_ids"])  # noqa: E731
    arguments = transformers.TrainingArguments(
        str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        remove_unused_columns=False,  # else the index would be dropped
        eval_strategy="epoch",
        save_strategy="steps" if save else "no",
        save_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    held = Held(
        net,
        arguments,
        train_dataset=data,
        eval_dataset=optx.with_index(Sentences()),
        callbacks=[Epochs(loss, resumed)],
        loss_of=loss_of,
    )
    held.train(resume_from_checkpoint=None if resumed is None else str(resumed))
    return net, loss, held.seen


@pytest.mark.parametrize("kind", ["saf", "mesa"])
def test_a_trainer(kind: str, tmp_path: Path) -> None:
    """With transformers' own optimizer, which is torch's fused AdamW: it counts no writes to weights."""
    net, loss, seen = train(kind, tmp_path, 3)
    assert len(seen) == 12
    assert seen[:4] == [0.0] * 4
    assert min(seen[4:]) > 0
    if kind == "saf":
        assert loss.report()["served"] == loss.report()["recorded"] == 1  # evaluation recorded nothing
    else:
        assert loss.state_dict()["steps"] == 6  # of twelve micro-batches
        assert not torch.equal(loss.ema.classifier.weight, net.classifier.weight)


@pytest.mark.parametrize("kind", ["saf", "mesa"])
def test_at_weight_0_a_trainers_run_is_the_same(kind: str, tmp_path: Path) -> None:
    """Dropout's draws too."""
    plain, _, _ = train("neither", tmp_path / "a", 2)
    held, _, seen = train(kind, tmp_path / "b", 2, weight=0.0)
    assert not any(seen)
    assert all(map(torch.equal, plain.parameters(), held.parameters()))


@pytest.mark.parametrize("kind", ["saf", "mesa"])
def test_a_resumed_trainer_is_bit_identical(kind: str, tmp_path: Path) -> None:
    """From the middle of the second of three epochs, the first that has the loss."""
    whole, loss, seen = train(kind, tmp_path / "whole", 3, save=True)
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    again, resumed, rest = train(kind, tmp_path / "again", 3, resumed=checkpoint)
    assert rest == seen[6:]
    assert min(rest) > 0
    assert all(map(torch.equal, whole.state_dict().values(), again.state_dict().values()))
    for mine, other in zip(tensors(loss.state_dict()), tensors(resumed.state_dict()), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0, equal_nan=True)


def tensors(state: Any) -> list[Any]:
    if not isinstance(state, dict):
        return [state] if isinstance(state, torch.Tensor) else []
    return [t for one in state.values() for t in tensors(one)]
