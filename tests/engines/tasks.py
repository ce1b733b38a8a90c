"""Rows of the table of engines: every public method, and the tasks of those that need a loop of their own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import injections
import torch
from conv_models import vgg
from engines.task import BATCH, Batch, Kind, Row, Small, Task
from inject.ffn_models import layers
from torch import Tensor, nn
from torch.nn import functional as F

import optx

# ---- rows that need a loop or a loss of their own ----------------------------------------------------------


class Domains(Task):
    """DSPReg: a backward pass for each domain."""

    def backward(
        self,
        call: nn.Module,
        batch: Batch,
        opt: Any,
        differentiate: Callable[[Tensor], Any] = Tensor.backward,
    ) -> None:
        for domain in range(2):
            mine = self.domains(batch) == domain
            with opt.dsp_reg.domain(domain):
                differentiate(call(**{key: value[mine] for key, value in batch.items()})["loss"])

    def domains(self, batch: Batch) -> Tensor:
        """The samples'; each process has both."""
        return batch["index"] % 2


class OwnLoss(Task):
    """An injection whose handle has a loss."""

    def loss(self, logits: Tensor, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        return super().loss(logits, x, y, index) + self.handle.loss()


class Windows(Task):
    """WindowPrune: draws are each process's own, so decisions are given; predictors learn by their loss."""

    def __init__(self, row: Row) -> None:
        super().__init__(row)
        self.handle.force({path: torch.tensor([[1, 0], [1, 1]]).view(1, 1, 2, 2) for path in ("0", "1")})

    def first(self) -> Any:
        return (8, 8, 8)

    def loss(self, logits: Tensor, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        blurred = (torch.arange(64).view(1, 1, 8, 8) % 5 == index.view(-1, 1, 1, 1)).float()
        return logits.square().mean() + self.handle.loss(blurred)


class Tuning(Task):
    """STN: batches of training and of validation in turn."""

    def backward(
        self,
        call: nn.Module,
        batch: Batch,
        opt: Any,
        differentiate: Callable[[Tensor], Any] = Tensor.backward,
    ) -> None:
        with self.handle.train_batch(batch["x"]):
            noisy = batch["x"] * (1 + self.handle.hparams["noise"].value.view(-1, 1))
            differentiate(call(**{**batch, "x": noisy})["loss"])

    def end(self, step: int, rank: int, world: int) -> None:
        batch = self.batch(100 + step, rank, world)
        with self.handle.valid_batch(batch["x"]):
            self(**batch)["loss"].backward()
        self.handle.step_hparams()

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in super().trained() if ".raw" not in name]

    def extra(self) -> Any:
        return self.handle.state_dict()

    def load_extra(self, state: Any) -> None:
        self.handle.load_state_dict(state)


class Meta(Task):
    """ABMLL: every process adapts to the same samples, and learns from its share of the step's."""

    def backward(
        self,
        call: nn.Module,
        batch: Batch,
        opt: Any,
        differentiate: Callable[[Tensor], Any] = Tensor.backward,
    ) -> None:
        with self.handle.task(inner_steps=2, inner_lr=0.1, sample=False) as task:
            task.adapt(lambda: self(**self.batch(100))["loss"])
            differentiate(task.outer(call(**batch)["loss"]))

    def extra(self) -> Any:
        return self.handle.state_dict()

    def load_extra(self, state: Any) -> None:
        self.handle.load_state_dict(state)


class Followed(Task):
    """EWA: the optimizer follows its handle. Experts are one after each step, whatever tokens each had."""

    def optimizer(self, *given: Any, **named: Any) -> torch.optim.Optimizer:
        return optx.wrap(super().optimizer(*given, **named), self.handle)

    def begin(self, step: int) -> None:
        torch.manual_seed(step)  # tokens are dealt out as they were before a run was resumed


class PerSample(Task):
    """LossReweight: it takes the samples' losses."""

    def loss(self, logits: Tensor, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        return self.signal(F.cross_entropy(logits, y, reduction="none") * (1 + index))


class Past(Task):
    """SAF: it takes outputs and the samples' numbers."""

    def loss(self, logits: Tensor, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        return super().loss(logits, x, y, index) + self.signal(logits, index)


class Averaged(Task):
    """MESA: it takes outputs and inputs."""

    def loss(self, logits: Tensor, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        return super().loss(logits, x, y, index) + self.signal(logits, x)


class Instead(Task):
    """A loss that takes cross-entropy's place."""

    def loss(self, logits: Tensor, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        if logits.ndim == 3:
            return self.signal(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
        return self.signal(logits, y)


# ---- the rows ----------------------------------------------------------------------------------------------


def _masks(task: Task) -> optx.Masks:
    g = torch.Generator().manual_seed(1)
    shapes = {name: p.shape for name, p in task.net.named_parameters() if p.ndim == 2}
    return optx.Masks.from_bool(
        {name: torch.rand(shape, generator=g) > 0.5 for name, shape in shapes.items()}
    )


def _keep_mask(task: Task, _: nn.Module) -> optx.Transform:
    masks = _masks(task)
    masks.apply_(task.net)
    return optx.KeepMask(masks)


def shapes_of(make: Callable[[int], nn.Module], width: int, base: int) -> Any:
    return optx.scaling.shapes(make(width), base=make(base))


def _hft(task: Task, call: nn.Module) -> optx.Transform:
    return optx.HFT(call, seed=1, rounds_every=2, blocks=r"(.*\.)?blocks\.\d+")


def small_llama(width: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=3 * width // 2,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def _vgg() -> nn.Module:
    torch.manual_seed(0)
    return vgg(norm=False)


def _windows() -> nn.Module:
    from inject.window_models import own

    return own(2)


def _attach_windows(net: nn.Module) -> Any:
    from inject.window_models import blocks

    torch.manual_seed(2)
    return optx.attach(net, optx.WindowPrune(blocks=blocks))


def _attached(injection: Callable[[], Any], targets: Any = None) -> Callable[[nn.Module], Any]:
    def attach(net: nn.Module) -> Any:
        torch.manual_seed(2)
        return optx.attach(net, injection(), targets)

    return attach


def _tuned(net: nn.Module) -> Any:
    torch.manual_seed(2)
    hparams = optx.HParams(noise=optx.hp(0.1, (0, None)))
    return optx.attach(net, optx.STN(hparams, warmup=0, train_steps=1), r"blocks\.\d\.[13]|head|enter")


def _meta(net: nn.Module) -> Any:
    torch.manual_seed(2)
    handle = optx.attach(net, optx.ABMLL(rank=2, c=0.1, beta=1e-2, gamma=0.0), r"blocks\.\d\.[13]|enter")
    injections.move(handle)
    return handle


def of_table(label: str, **more: Any) -> Row:
    """A row of `injections.ROWS`, moved away from its start."""
    row = next(row for row in injections.ROWS if row.label == label)

    def attach(net: nn.Module) -> Any:
        handle = row.attach(net)
        injections.move(handle)
        return handle

    return Row(type(row.injection()).__name__, "injection", row.model, attach=attach, **more)


ROWS = [
    Row("AdamR", "transform", transform=lambda *_: optx.AdamR(weight=0.05)),
    Row("PerpGrad", "transform", transform=lambda *_: optx.PerpGrad()),
    Row("BackSlash", "transform", transform=lambda *_: optx.BackSlash(0.3, until=4)),
    Row("Clip", "transform", transform=lambda *_: optx.Clip(0.1)),
    Row("NormalizedGrad", "transform", transform=lambda *_: optx.NormalizedGrad("global")),
    Row("SubGM", "transform", transform=lambda *_: optx.SubGM(0.1, 0.9)),
    Row("HFT", "transform", transform=_hft, unused=True),
    Row("KeepMask", "transform", transform=_keep_mask),
    Row("SaRA", "transform", transform=lambda *_: optx.SaRA(fraction=0.5, reselect_at=3)),
    Row("DSPReg", "transform", transform=lambda *_: optx.DSPReg(2, weight=2.0), task=Domains),
    Row("MuAdamW", "transform", transform=lambda *_: optx.MuAdamW(shapes_of(Small, 7, 3))),
    *map(of_table, ("LoRA", "BitFit", "IA3", "SVFit", "SequentialAdapter", "ParallelAdapter")),
    *map(of_table, ("ScaledParallelAdapter", "PSDFactor", "PrefixTuning", "MultiHeadParallelAdapter")),
    *map(of_table, ("MAM", "Aside", "S4D", "IAA")),
    # Their products of factors have gradients of any size, and small ones' noise is a step of Adam's too.
    *(of_table(label, adamw={"eps": 1e-1, "lr": 2e-2}) for label in ("FLoRA", "Perp")),
    Row("HiddenDelta", "injection", injections.llama, attach=_attached(lambda: optx.HiddenDelta(rank=3))),
    Row("FTWT", "injection", _vgg, attach=_attached(optx.FTWT), task=OwnLoss, apart=True),
    Row("WindowPrune", "injection", _windows, attach=_attach_windows, task=Windows, apart=True),
    Row("ABMLL", "injection", Small, attach=_meta, task=Meta),
    Row(
        *("VQLogits", "injection", injections.llama),
        attach=_attached(lambda: optx.VQLogits(codes=9, init="blocks", untie=True)),
    ),
    Row("StableRPS", "injection", injections.llama, attach=_attached(optx.StableRPS, r".*_proj")),
    # Adam is linear with such an eps, so that the mean of experts' steps is the step of the mean.
    Row(
        *("EWA", "injection", Small),
        attach=_attached(lambda: optx.EWA(experts=2, beta=0.5), r"blocks\.\d"),
        task=Followed,
        adamw={"eps": 1e3, "lr": 50.0, "weight_decay": 0.0},
        apart=True,
    ),
    # What is of a batch as a whole, a queue's length and the balance of loads, is each process's own.
    Row(
        *("WideNet", "injection", layers),
        attach=_attached(lambda: optx.WideNet(ffn="ffn", capacity=None, noise=0, balance=0), r"1\.\d"),
        apart=True,
    ),
    Row("STN", "injection", Small, attach=_tuned, task=Tuning, apart=True),
    Row("RF8Linear", "injection", injections.llama, attach=_attached(optx.RF8Linear), apart=True),
    Row("Softmax2", "injection", injections.eager, attach=_attached(optx.Softmax2, r".*attn"), apart=True),
    Row(
        *("MuAttention", "injection", lambda: small_llama(16)),
        attach=_attached(lambda: optx.MuAttention(shapes_of(small_llama, 16, 8))),
        apart=True,
    ),
    Row("LSSA", "injection", injections.llama, attach=_attached(optx.LSSA), apart=True),
    Row("LSSAR", "injection", injections.llama, attach=_attached(lambda: optx.LSSAR(p=3)), apart=True),
    Row(
        *("MuReadout", "injection", lambda: Small(7)),
        attach=_attached(lambda: optx.MuReadout(shapes_of(Small, 7, 3))),
        apart=True,
    ),
    Row(
        *("SAF", "loss"),
        signal=lambda _: optx.SAF(BATCH, weight=2.0, lookback=1, start_epoch=0, gather=True),
        task=Past,
    ),
    Row("MESA", "loss", signal=lambda task: optx.MESA(task.net, beta=0.5, start_epoch=0), task=Averaged),
    Row("LossReweight", "loss", signal=lambda _: optx.LossReweight(max_batch=BATCH), task=PerSample),
    Row("StableMaxCrossEntropy", "loss", signal=lambda _: optx.StableMaxCrossEntropy(), task=Instead),
    Row("ZLoss", "loss", signal=lambda _: optx.ZLoss(1.0, 2.0), task=Instead),
]
BY_NAME: Mapping[str, Row] = {row.name: row for row in ROWS}


def public() -> dict[str, Kind]:
    """All that optx exports of these kinds, without the protocols' own classes."""
    found: dict[str, Kind] = dict.fromkeys(injections.public_injections(), "injection")
    del found["SphericalHead"], found["PMOEHead"]  # tests/inject/test_spherical_head.py, tests/policy
    del found["LDLT"]  # its layers need one another whole: tests/lipschitz
    del found["SoftThinking"]  # trains nothing, and generates: tests/thinking
    for name, thing in vars(optx).items():
        if not inspect.isclass(thing):
            continue
        if issubclass(thing, optx.Transform) and thing is not optx.Transform:
            found[name] = "transform"
        elif thing.__module__.startswith("optx.signal") and thing is not optx.RobustRecoveryLoss:
            found[name] = "loss"
    return found
