"""LossReweight in loops: bad samples, the spec's regression, autocast, accumulation, compile, the Trainer."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import optx

NAMES = ("uniform", "linupper", "quadratic", "extremes")
pytestmark = pytest.mark.usefixtures("one_thread")


def net(outputs: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, outputs))


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


# ---- samples whose loss is not finite ---------------------------------------------------------------------


def target_is_nan(logits: Tensor, rw: optx.LossReweight, bad: list[int]) -> Tensor:
    target = rows(8, logits.shape[1])[: len(logits)].clone()
    target[bad] = torch.nan
    return rw((logits - target).square())


def logits_overflow(logits: Tensor, rw: optx.LossReweight, bad: list[int]) -> Tensor:
    much = torch.zeros(len(logits), 1)
    much[bad] = torch.inf
    return rw.from_logits(logits + much, torch.arange(len(logits)) % logits.shape[1])


def tokens_overflow(logits: Tensor, rw: optx.LossReweight, bad: list[int]) -> Tensor:
    scale = torch.ones(len(logits), 1, 1)
    scale[bad] = torch.inf
    tokens = logits.view(len(logits), 2, -1) * scale
    return rw.from_logits(tokens, torch.arange(2 * len(logits)).view(-1, 2) % tokens.shape[2])


def log_of_nothing(logits: Tensor, rw: optx.LossReweight, bad: list[int]) -> Tensor:
    share = logits.softmax(1)[:, 0].clone()
    share[bad] = 0.0
    return rw(-share.log())


def mean_of_no_token(logits: Tensor, rw: optx.LossReweight, bad: list[int]) -> Tensor:
    mask = torch.ones_like(logits)
    mask[bad] = 0
    return rw((logits.square() * mask).sum(1) / mask.sum(1))


Case = Callable[[Tensor, optx.LossReweight, list[int]], Tensor]
CASES: list[Case] = [target_is_nan, logits_overflow, tokens_overflow, log_of_nothing, mean_of_no_token]


def gradients(case: Case, rw: optx.LossReweight, kept: list[int] | None, bad: list[int]) -> list[Tensor]:
    model, x = net(), rows(8, 4)
    logits = model(x)
    case(logits if kept is None else logits[kept], rw, bad).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("options", [{}, {"strategy": "uniform"}, {"max_weight": 1.5}])
def test_a_bad_sample_is_left_out_of_the_models_gradients(case: Case, options: dict[str, Any]) -> None:
    """The last one is bad: the gradients are those of the other seven alone."""
    rw = optx.LossReweight(**options, skip_nonfinite=True)
    with pytest.warns(UserWarning, match="1 of 8 samples is not finite; left out, 1 so far"):
        got = gradients(case, rw, None, [7])
    reference = optx.LossReweight(**options)
    wanted = gradients(case, reference, list(range(7)), [])
    for a, b in zip(got, wanted, strict=True):
        assert bool(a.isfinite().all())
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert rw.last_weights is not None
    assert reference.last_mean is not None
    assert float(rw.last_weights[7]) == 0
    assert float(rw.last_weights.sum()) == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(rw.last_mean, reference.last_mean)


@pytest.mark.parametrize("case", CASES)
def test_unless_asked_for_a_bad_sample_makes_the_loss_nan(case: Case) -> None:
    rw = optx.LossReweight()
    assert not bool(case(net()(rows(8, 4)), rw, [2]).isfinite())
    assert rw.skipped == 0


def test_bad_samples_are_counted_and_warned_of_at_powers_of_ten() -> None:
    rw = optx.LossReweight(skip_nonfinite=True)
    losses = torch.tensor([1.0, torch.nan, 2.0, torch.inf])
    told: list[str] = []
    for _ in range(6):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            assert bool(rw(losses.clone().requires_grad_()).isfinite())
        told += [str(one.message) for one in found]
    assert told == [
        "LossReweight: the loss of 2 of 4 samples is not finite; left out, 2 so far.",
        "LossReweight: the loss of 2 of 4 samples is not finite; left out, 10 so far.",
    ]
    assert rw.skipped == rw.state_dict()["skipped"] == 12


def test_a_batch_of_bad_samples_has_no_loss_and_no_gradient() -> None:
    rw = optx.LossReweight(skip_nonfinite=True)
    with pytest.warns(UserWarning, match="8 of 8"):
        got = gradients(target_is_nan, rw, None, list(range(8)))
    assert all(bool((g == 0).all()) for g in got)


def test_where_activations_are_nan_gradients_say_so() -> None:
    """What can't be cut out is not hidden: a weight's gradient has the bad activation as a factor."""
    model, x = net(), rows(8, 4)
    x[7] = torch.nan
    with pytest.warns(UserWarning, match="1 of 8"):
        optx.LossReweight(skip_nonfinite=True)(model(x).square()).backward()
    assert not bool(model[0].weight.grad.isfinite().all())  # type: ignore[union-attr]


# ---- the spec's regression --------------------------------------------------------------------------------


def squared_error(strategy: str, seed: int) -> float:
    """How far weights are off in the end: of 20 coordinates, four are there in 15 % of the samples only."""
    g = torch.Generator().manual_seed(seed)
    true, w = torch.randn(20, generator=g), torch.zeros(20, requires_grad=True)
    rw = optx.LossReweight(strategy, r=0.4)
    for _ in range(500):
        x = torch.randn(32, 20, generator=g)
        x[:, :4] *= (torch.rand(32, 1, generator=g) < 0.15).float()
        w.grad = None
        rw(0.5 * (x @ w - x @ true).square()).backward()
        assert w.grad is not None
        with torch.no_grad():
            w -= 0.02 * w.grad
    return float((w.detach() - true).square().sum())


def test_rare_features_are_learnt_in_the_order_of_the_spec() -> None:
    """LinUpper far ahead of Quadratic, that of uniform weights, and Extremes behind."""
    found = {name: sum(squared_error(name, s) for s in range(2)) / 2 for name in NAMES}
    assert found["linupper"] < 1e-4 < 1e-2 < found["uniform"] < found["extremes"]
    assert 10 * found["linupper"] < found["quadratic"] < found["uniform"] / 5


# ---- autocast, accumulation, compile, memory --------------------------------------------------------------


def test_autocast_weights_are_float32_and_sum_to_1() -> None:
    model, x, y = net(), rows(64, 4), torch.arange(64) % 8
    rw = optx.LossReweight()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(x)
        assert logits.dtype == torch.bfloat16
        loss = rw.from_logits(logits, y)
        assert rw.last_weights is not None
        assert loss.dtype == rw.last_weights.dtype == torch.float32
    assert abs(float(rw.last_weights.double().sum()) - 1) < 1e-6
    exact = F.cross_entropy(logits.detach().double(), y, reduction="none")
    torch.testing.assert_close(rw.last_weights.double(), rw.weights(exact), rtol=1e-5, atol=0)
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_accumulated_calls_are_one_step() -> None:
    """Each call has weights of its own; the sum of their halves is the step's gradient."""
    model, reference, x = net(), net(), rows(8, 4)
    rw = optx.LossReweight(accumulate=2, warmup=1)
    for step in range(2):
        for part in x.chunk(2):
            (rw(model(part).square()) / 2).backward()
        assert rw.step == step + 1
        for part in x.chunk(2):
            losses = reference(part).square().mean(1)
            weights = rw.weights(losses) if step else torch.full((4,), 0.25)
            ((weights * losses).sum() / 2).backward()
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_compiled_steps_are_not_compiled_anew() -> None:
    rw, eager = optx.LossReweight(warmup=2), optx.LossReweight(warmup=2)
    compiled = torch.compile(lambda logits, labels: rw.from_logits(logits, labels), backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    for step in range(12):
        logits = torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(step))
        labels = torch.arange(20).view(4, 5) % 7
        a, b = (logits.clone().requires_grad_() for _ in range(2))
        one, other = compiled(a, labels), eager.from_logits(b, labels)
        one.backward()
        other.backward()
        torch.testing.assert_close(one, other)
        torch.testing.assert_close(a.grad, b.grad)
    assert rw.step == 12
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


class Large(TorchDispatchMode):
    """Counts what is made: operations, and new tensors of a size and more."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.operations, self.made, self.known = size, 0, 0, set[int]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.operations += 1
        for one in tree_leaves(result):
            if isinstance(one, Tensor) and one.numel() >= self.size:
                place = one.untyped_storage().data_ptr()
                self.made += place not in self.known
                self.known.add(place)
        return result


def test_logits_are_copied_as_often_as_by_cross_entropy() -> None:
    logits, labels = rows(4, 64, 100), torch.arange(256).view(4, 64) % 100
    counted: list[Large] = []
    for loss in (
        lambda z: F.cross_entropy(z.flatten(0, 1), labels.flatten()),
        lambda z: optx.LossReweight().from_logits(z, labels),
    ):
        z = logits.clone().requires_grad_()
        with Large(4 * 63 * 100) as mode:
            mode.known.add(z.untyped_storage().data_ptr())
            loss(z).backward()
        counted.append(mode)
    plain, weighted = counted
    assert weighted.made == plain.made
    assert weighted.operations - plain.operations < 130  # all but two or three of them on B numbers


# ---- the transformers Trainer -----------------------------------------------------------------------------


def llama() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
    )
    return transformers.LlamaForCausalLM(config)


def examples() -> list[dict[str, Tensor]]:
    tokens = torch.randint(32, (24, 9), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": t, "labels": t} for t in tokens]


def trained(rw: optx.LossReweight | None, folder: Any, accumulate: int = 1) -> tuple[Any, list[float], float]:
    """Weights after an epoch by the Trainer, its logged losses, and the loss of its evaluation."""
    transformers = pytest.importorskip("transformers")
    args = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=accumulate,
        num_train_epochs=1,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        seed=5,
    )
    trainer = transformers.Trainer(
        llama(),
        args,
        train_dataset=examples(),
        eval_dataset=examples(),
        compute_loss_func=None if rw is None else rw.from_outputs,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return trainer.model, losses, float(trainer.evaluate()["eval_loss"])


@pytest.fixture(scope="module")
def without(tmp_path_factory: Any) -> Any:
    """The Trainer's own runs, by the number of batches accumulated; each is made once."""
    return functools.cache(lambda accumulate: trained(None, tmp_path_factory.mktemp("plain"), accumulate))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_trainer_off_trains_as_without(accumulate: int, without: Any, tmp_path: Any) -> None:
    """Same losses, same weights, same evaluation: sequences of one length have the mean per token."""
    rw = optx.LossReweight("uniform", accumulate=accumulate)
    model, losses, evaluated = trained(rw, tmp_path, accumulate)
    plain, wanted, expected = without(accumulate)
    assert losses == pytest.approx(wanted, abs=2e-4)
    assert evaluated == pytest.approx(expected, abs=2e-4)
    assert rw.step == 6 // accumulate
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_the_trainer_trains_on_weighted_losses(without: Any, tmp_path: Any) -> None:
    rw = optx.LossReweight("linupper", r=0.4)
    _, losses, _ = trained(rw, tmp_path)
    _, plain, _ = without(1)
    assert all(a > b for a, b in zip(losses[:2], plain[:2], strict=True))  # the upper half weighs more
    assert rw.last_weights is not None
    assert abs(float(rw.last_weights.sum()) - 1) < 1e-6
    assert float(rw.last_weights.max()) > 2 * float(rw.last_weights.min())
