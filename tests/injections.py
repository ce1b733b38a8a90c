"""Every injection with a small real model that it serves: the rows of the tables in test_attach*.py."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import optx
from optx import _everything


def llama(layers: int = 2) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def eager() -> nn.Module:
    """With attention that is written out."""
    model: Any = llama()
    model.set_attn_implementation("eager")
    return model


def bert(layers: int = 2) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=32,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    return BertForSequenceClassification(config).eval()


def pruned_bert(layers: int = 2) -> nn.Module:
    """With half of each row of the encoder's matrices 0."""
    return pruned(bert(layers), "bert.encoder.")


def cnn() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, stride=2, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(54, 4),
    )
    return model.eval()


def pruned(model: nn.Module, within: str) -> nn.Module:
    rows = {n: p.detach().abs().flatten(1) for n, p in model.named_parameters() if p.ndim > 1 and within in n}
    kept = {
        n: (r > r.median(1, keepdim=True).values).view(model.get_parameter(n).shape) for n, r in rows.items()
    }
    optx.Masks.from_bool(kept).apply_(model)
    return model


class Policy(nn.Module):
    """A policy of tokens, whose output is a tensor, or the numbers of an `optx.policy.ActionMixture`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.trunk, self.out = nn.Embedding(64, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, ids: Tensor) -> Tensor:
        found = self.out(self.trunk(self.embed(ids).mean(1)).tanh())
        if isinstance(found, Tensor):
            return found
        return torch.cat([found.w.square(), found.means.flatten(1), found.log_stds.flatten(1)], 1)


def policy(layers: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return Policy().eval()


def tokens() -> Tensor:
    return torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(1))


def checkpoint_layers(model: Any) -> None:
    """transformers' activation checkpointing, by the name that its version has."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def no_dropout(model: nn.Module) -> None:
    """In training, too; BERT's attention in transformers 4 has a number instead of a module."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, optx.Part) and module.weightless:
            module.enabled = False  # at a rate that is tuned, whatever the module's own
        elif hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0  # type: ignore[assignment]


def images() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def run(model: nn.Module) -> Tensor:
    """The logits of a model of this file on its standard batch."""
    conv = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    output = model(tokens() if conv is None else images().to(conv.weight.dtype))
    return output if isinstance(output, Tensor) else output.logits


@dataclass(frozen=True)
class Row:
    """One way to use one injection.

    Attributes:
        identity: whether it promises to change nothing at the start.
        merges: whether it folds into weights.
        stacks: whether it goes with all others on one module: not what takes the module's weight away.
        idle: the last names of parameters that have no gradient outside of a loop of the method's own.
    """

    label: str
    model: Callable[..., nn.Module]
    injection: Callable[[], optx.Injection]
    targets: Any = None
    identity: bool = True
    merges: bool = True
    stacks: bool = True
    idle: tuple[str, ...] = ()

    def learning(self, handle: optx.Handle) -> dict[str, nn.Parameter]:
        """What has a gradient in any loop, by name."""
        return {n: p for n, p in handle.named_parameters() if n.split(".")[-1] not in self.idle}

    def attach(self, model: nn.Module, **options: Any) -> optx.Handle:
        torch.manual_seed(2)
        return optx.attach(model, self.injection(), self.targets, **options)

    def shortest(self) -> nn.Module:
        """Its model with one layer, where layers have nothing to do with one another."""
        ladder = isinstance(self.injection(), optx.Aside | optx.IAA)
        return self.model() if ladder or self.model is cnn else self.model(layers=1)

    def attached(self, moved: bool = True, model: nn.Module | None = None) -> tuple[nn.Module, optx.Handle]:
        """A model with it, moved away from its start."""
        model = self.model() if model is None else model
        handle = self.attach(model)
        if moved:
            move(handle)
        return model, handle


def move(handle: optx.Handle, seed: int = 3) -> None:
    """Give everything that is trained other values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in handle.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator).to(p))


def _rate() -> optx.HParams:
    return optx.HParams(drop=optx.hp(0.2, (0, 0.9)), strength=optx.hp(1.0, (0, None)))


ALL_LINEAR = r".*_proj"
CONV = nn.Conv2d

ROWS = [
    Row("LoRA", llama, lambda: optx.LoRA(rank=2, alpha=4), ALL_LINEAR),
    Row("LoRA, BERT", bert, lambda: optx.LoRA(rank=2, rslora=True, bias="all")),
    Row("LoRA, conv", cnn, lambda: optx.LoRA(rank=2), CONV),
    Row("LoRA, embedding", llama, lambda: optx.LoRA(rank=2), nn.Embedding),
    Row("DoRA", llama, lambda: optx.LoRA(rank=2, dora=True)),
    Row("DoRA, conv", cnn, lambda: optx.LoRA(rank=2, dora=True), CONV),
    Row("BitFit", bert, optx.BitFit),
    Row("BitFit, conv", cnn, optx.BitFit),
    Row("IA3", bert, optx.IA3),
    Row("IA3, Llama", llama, optx.IA3),
    Row("SVFit", bert, optx.SVFit),
    Row("SVFit, conv", cnn, lambda: optx.SVFit(rank=3), CONV),
    Row("FLoRA", llama, lambda: optx.FLoRA(rank=2), ALL_LINEAR),
    Row("FLoRA, conv", cnn, lambda: optx.FLoRA(rank=2), CONV),
    Row("SequentialAdapter", bert, lambda: optx.SequentialAdapter(rank=3), merges=False),
    Row("SequentialAdapter, Llama", llama, lambda: optx.SequentialAdapter(rank=3), merges=False),
    Row("ParallelAdapter", llama, lambda: optx.ParallelAdapter(rank=3), merges=False),
    Row("ParallelAdapter, BERT", bert, lambda: optx.ParallelAdapter(rank=3), merges=False),
    Row("ScaledParallelAdapter", bert, lambda: optx.ScaledParallelAdapter(rank=3), merges=False),
    Row("PrefixTuning", llama, lambda: optx.PrefixTuning(length=3), identity=False, merges=False),
    Row("PrefixTuning, BERT", bert, lambda: optx.PrefixTuning(length=3), identity=False, merges=False),
    Row("MultiHeadParallelAdapter", llama, lambda: optx.MultiHeadParallelAdapter(rank=3), merges=False),
    Row("MAM", bert, lambda: optx.MAM(prefix=2, rank=3), identity=False, merges=False),
    Row("MAM, Llama", llama, lambda: optx.MAM(prefix=2, rank=3), identity=False, merges=False),
    Row("Aside", bert, lambda: optx.Aside(rank=3), merges=False),
    Row("Aside, layerwise", llama, lambda: optx.Aside(rank=3, variant="layerwise"), merges=False),
    Row("Aside, bottleneck", llama, lambda: optx.Aside(rank=3, variant="bottleneck"), merges=False),
    Row("STN", llama, lambda: optx.STN(_rate()), ALL_LINEAR, identity=False),
    Row("STN, dropout", bert, lambda: optx.STN(_rate(), dropout="drop", scale=True), identity=False),
    Row("STN, conv", cnn, lambda: optx.STN(_rate(), scale=True), CONV, identity=False),
    Row("ABMLL", llama, lambda: optx.ABMLL(rank=2), ALL_LINEAR, idle=("A_std", "B_std")),
    Row("Perp", pruned_bert, lambda: optx.Perp(adapter="mask", rank=4)),
    Row("PSDFactor", llama, lambda: optx.PSDFactor(init="fit"), r".*q_proj", identity=False),
    Row("VQLogits", bert, lambda: optx.VQLogits(codes=2), "classifier", stacks=False),
    Row("S4D", llama, lambda: optx.S4D("beside", d_state=4), merges=False),
    Row("S4D, in place", bert, lambda: optx.S4D(d_state=4), identity=False, merges=False, stacks=False),
    Row(
        *("PMOEHead", policy, lambda: optx.PMOEHead(k=3, init=0.1), "out"),
        identity=False,
        merges=False,
        stacks=False,
    ),
    Row("IAA", bert, lambda: optx.IAA(rank=3, aside=3), merges=False),
    Row("IAA, Llama", llama, lambda: optx.IAA(rank=3, aside=3), merges=False),
    Row("LDLT", cnn, lambda: optx.LDLT(2.0), ["3", "6"], identity=False, stacks=False),
    Row(
        *("StableRPS", cnn, lambda: optx.StableRPS(compression=0.4), (nn.Linear, nn.Conv2d), False),
        stacks=False,
    ),
]


TRANSFORMERS = (llama, bert, pruned_bert)


def rows_on(build: Callable[..., nn.Module], rows: Sequence[Row] = ROWS) -> list[Row]:
    """Rows that serve a model: a pruned one is also as good as any."""
    models = {build, bert} if build is pruned_bert else {build}
    return [row for row in rows if row.model in models and row.stacks]


def public_injections() -> list[str]:
    """The names of all injections that optx exports, without the protocol's own classes."""
    _everything.load()
    protocol = (optx.Injection, optx.Composite)
    return [
        name
        for name, thing in vars(optx).items()
        if inspect.isclass(thing) and issubclass(thing, optx.Injection) and thing not in protocol
    ]


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that `remove` promises to give back."""
    hooks = {
        f"{path}.{name}": list(value.values())
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if "hooks" in name and isinstance(value, dict)
    }
    return {
        "state": {name: t.clone() for name, t in model.state_dict().items()},
        "tensors": {name: id(p) for name, p in (*model.named_parameters(), *model.named_buffers())},
        "flags": {name: p.requires_grad for name, p in model.named_parameters()},
        "repr": repr(model),
        "hooks": hooks,
        "attributes": {path: sorted(vars(module)) for path, module in model.named_modules()},
        "training": {path: module.training for path, module in model.named_modules()},
    }


def assert_same(model: nn.Module, before: dict[str, Any]) -> None:
    """Nothing is left of what was attached."""
    now = snapshot(model)
    state, was = now.pop("state"), dict(before)
    old = was.pop("state")
    assert now == was
    assert list(state) == list(old)
    assert all(torch.equal(state[name], old[name]) for name in old)


def clone(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)
