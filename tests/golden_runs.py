"""Short trainings whose losses are kept: what golden/test_golden.py compares and golden/record.py records.

Every public transform, injection, loss and merge method has some, found by introspection; each runs on a tiny
causal language model and, all but losses and merges, on all-MiniLM-L6-v2, in float32 on one thread.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import json
import math
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import llvmlite.binding
import torch
from torch import Tensor, nn

import optx
from optx import _everything

FOLDER = Path(__file__).parent / "golden" / "losses"
STEPS = 20
TOLERANCE = 1e-6
"""Of losses on another platform, relative."""
SENTENCES = ["a quiet film, warm and funny", "it never finds its way out of the fog"]

# Options by method and variant. A method that is not here has one variant, its class called without any.
# Seeds are not 0: one that is not handed on would be.
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "AdamR": {"L2": {"weight": 0.05}, "L1": {"weight": 0.01, "norm": "l1"}},
    "Aside": {"highway": {}, "layerwise": {"variant": "layerwise"}, "bottleneck": {"variant": "bottleneck"}},
    "BackSlash": {
        "": {"kappa": 1.0, "until": 0.75, "total_steps": 20},
        "one pass": {"kappa": 1.0, "prox": True, "exact": False},
    },
    "Clip": {"": {"max_norm": 0.5}},
    "DARELinear": {"": {"seed": 5}},
    "DARETIES": {"": {"seed": 5}},
    "DSPReg": {"": {"domains": 2}, "coupled": {"domains": 2, "decoupled": False}},
    "FLoRA": {"": {}, "orthonormal": {"init": "orthonormal"}, "embedding": {}},
    "HFT": {"": {"rounds_every": 8, "seed": 5}},
    "LDLT": {"": {"L": 2.0, "activation": (-0.13, 1.13)}},
    "LossReweight": {"linupper": {}, "quadratic": {"strategy": "quadratic"}, "limited": {"max_weight": 1.5}},
    "LSSAR": {"": {"p": 3.0}},  # at 15 another processor's last digit is 0.003 after 20 steps
    "LoRA": {"LoRA": {}, "rsLoRA": {"rslora": True}, "DoRA": {"dora": True}, "embedding": {}},
    "ParallelAdapter": {"": {}, "as BERT": {"init": "bert"}},
    "MESA": {"": {"beta": 0.8, "start_epoch": 2}},
    "NormalizedGrad": {"": {}, "global": {"per": "global"}},
    "PSDFactor": {"": {"init": "fit"}},
    "VQLogits": {
        "": {"codes": 2, "init": "blocks"},
        "token bias": {"codes": 2, "init": "blocks", "token_bias": True},
    },
    # Of two classes, as MiniLM has here, the Z-loss knows which is larger alone, and has no gradient.
    "SphericalHead": {
        "spherical softmax": {"loss": optx.ZLoss(form="spherical"), "lr": 0.01},
        "Z-loss": {"loss": optx.ZLoss(1.0, 2.0), "lr": 0.1, "weight_decay": 0.01, "stabilize_every": 7},
    },
    "S4D": {
        "": {"d_state": 8},
        "beside": {"d_state": 8, "mode": "beside", "init": "lin", "disc": "bilinear"},
    },
    "SubGM": {"": {"eta0": 0.05, "rho": 0.9}},
    "SaRA": {
        "": {"fraction": 0.3, "reselect_at": 8},
        "compact": {"fraction": 0.3, "reselect_at": 8, "compact": True, "reset_state_on_reselect": True},
    },
    "SAF": {
        "": {"num_samples": 44, "start_epoch": 3},
        "top-k": {"num_samples": 44, "start_epoch": 3, "top_k": 5},
    },
    "STN": {"": {"hparams": optx.HParams(drop=optx.hp(0.2, (0, 0.9)))}},
    "Perp": {
        "": {},
        "MaskLoRA": {"adapter": "mask", "rank": 4},
        "ScaleLoRA": {"adapter": "scale", "rank": 4},
    },
    "PerpGrad": {"": {}, "as projected": {"rescale": False}, "along weights": {}},
}
LDLT_CHAIN = ("layers.0.mlp.up_proj", "layer.0.intermediate.dense", "layer.0.output.dense")
# What a variant has besides options: targets of an injection, or `Setup.shrink`.
AROUND: dict[tuple[str, str], dict[str, Any]] = {
    ("DSPReg", ""): {"domains": 2},
    ("DSPReg", "coupled"): {"domains": 2},
    ("FLoRA", "embedding"): {"targets": nn.Embedding},
    ("LoRA", "embedding"): {"targets": nn.Embedding},
    ("KeepMask", ""): {"pruned": 0.5},
    ("Perp", "MaskLoRA"): {"pruned": 0.5},
    ("Perp", "ScaleLoRA"): {"pruned": 0.5},
    ("LDLT", ""): {"targets": lambda name, _: name.endswith(LDLT_CHAIN)},
    ("PSDFactor", ""): {"targets": lambda name, _: name.endswith(("q_proj", "self.query"))},
    ("PerpGrad", "along weights"): {"shrink": 10.0},
    ("StableRPS", ""): {"lr": 3e-5},  # at 1e-3 the tiny model's twentieth loss tells processors apart
    ("SphericalHead", "spherical softmax"): {"targets": lambda name, _: name in ("lm_head", "classifier")},
    ("VQLogits", ""): {"targets": lambda name, _: name in ("lm_head", "classifier")},
    ("VQLogits", "token bias"): {"targets": lambda name, _: name in ("lm_head", "classifier")},
}


def methods() -> dict[str, type]:
    """All public methods that have golden runs, by name."""
    _everything.load()
    kinds = (optx.Transform, optx.Injection, optx.MergeMethod)
    return {
        name: thing
        for name, thing in vars(optx).items()
        if inspect.isclass(thing)
        and (issubclass(thing, kinds) or thing.__module__.startswith("optx.signal."))
        and thing
        not in (
            *kinds,
            optx.Composite,
            optx.FTWT,
            optx.PMOEHead,
            optx.RobustRecoveryLoss,
            optx.SoftThinking,
            optx.Softmax2,
            optx.WideNet,
            optx.WindowPrune,
        )  # nothing to serve here, or no loss of logits
    }


class Setup(NamedTuple):
    """A model and what it is trained on.

    Attributes:
        forward: logits, classes in the last dimension.
        shrink: so much of each weight is added to its gradient, which then is nearly along the weight.
        targets: of an injection, if not its own.
        inputs: what the model is called with.
        pruned: this share of each matrix goes before the method comes, which is given the masks.
        domains: so many equal parts of the sentences have a loss each, for ``opt.dsp_reg``.
    """

    model: Any
    forward: Callable[[Any], Tensor]
    target: Tensor
    lr: float
    shrink: float = 0.0
    targets: Any = None
    pruned: float = 0.0
    domains: int = 1
    inputs: Any = None


def tiny() -> Setup:
    """A Llama of two layers, with biases; next-token prediction."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        attention_bias=True,
        mlp_bias=True,
        initializer_range=0.2,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    tokens = torch.arange(48).mul(7).remainder(59).view(4, 12) + 3
    model = LlamaForCausalLM(config).eval()
    forward = lambda model: model(tokens[:, :-1]).logits  # noqa: E731
    return Setup(model, forward, tokens[:, 1:], lr=1e-3, inputs=tokens[:, :-1])


@functools.cache
def _minilm() -> tuple[Any, dict[str, Tensor]]:
    from optx.recipes import _assets

    torch.manual_seed(0)  # of the head
    model, tokenizer = _assets.classifier(None, 2)
    model.bert.encoder.layer = model.bert.encoder.layer[:3]
    model.bert.embeddings.requires_grad_(False)  # half of the numbers, and most of a step's time
    return model.eval(), dict(tokenizer(SENTENCES, padding=True, return_tensors="pt"))


def minilm() -> Setup:
    """The first three of its layers, over frozen embeddings; two sentences.

    Their states are still so alike there that they are of one class: told apart, they have hardly a gradient.
    """
    model, batch = _minilm()
    return Setup(copy.deepcopy(model), lambda model: model(**batch).logits, torch.tensor([1, 1]), lr=3e-5)


MODELS = {"tiny": tiny, "minilm": minilm}


def train(setup: Setup, optimizer: torch.optim.Optimizer, criterion: Callable[..., Tensor]) -> list[float]:
    """The loss of each step."""
    losses: list[float] = []
    for _ in range(STEPS):
        loss = criterion(setup.forward(setup.model).flatten(0, -2), setup.target.flatten())
        optimizer.zero_grad()
        if setup.domains > 1:
            by_domain(setup, optimizer, criterion)
        else:
            loss.backward()
        if setup.shrink:
            for p in setup.model.parameters():
                p.grad = p.grad + setup.shrink * p.detach()
        optimizer.step()
        losses.append(loss.item())
    return losses


def by_domain(setup: Setup, optimizer: Any, criterion: Callable[..., Tensor]) -> None:
    """A loss of each part of the sentences, every domain's logits from the one forward pass."""
    parts = zip(
        setup.forward(setup.model).chunk(setup.domains), setup.target.chunk(setup.domains), strict=True
    )
    losses = {d: criterion(out.flatten(0, -2), target.flatten()) for d, (out, target) in enumerate(parts)}
    optimizer.dsp_reg.backward(losses)


def needed(cls: type, setup: Setup) -> dict[str, Any]:
    """What a method can't be made without: the model, its shapes beside a model of half the width."""
    asked = {name for name, one in inspect.signature(cls).parameters.items() if one.default is one.empty}
    given: dict[str, Any] = {"model": setup.model} if "model" in asked else {}
    if "shapes" in asked:
        given["shapes"] = optx.scaling.shapes(setup.model, base=lambda: half_as_wide(setup.model))
    return given


def half_as_wide(model: Any) -> Any:
    """A model of the same depth, of half the hidden size, with as many heads."""
    config = copy.deepcopy(model.config)
    for size in ("hidden_size", "intermediate_size", "head_dim"):
        if getattr(config, size, None):
            setattr(config, size, getattr(config, size) // 2)
    numbers = [int(part) for name, _ in model.named_modules() for part in name.split(".") if part.isdigit()]
    config.num_hidden_layers = 1 + max(numbers)
    return type(model)(config)


def transformed(cls: type, options: dict[str, Any], setup: Setup, fused: bool) -> list[float]:
    """Everything is trained, by AdamW within `optx.wrap`."""
    given = needed(cls, setup)
    if setup.pruned:
        given["masks"] = optx.prune(setup.model, optx.Magnitude(setup.pruned))
    trained = [p for p in setup.model.parameters() if p.requires_grad]
    base = torch.optim.AdamW(trained, lr=setup.lr, weight_decay=0.0)
    if cls is optx.MuAdamW:  # its learning rates count on them
        optx.attach(setup.model, optx.MuReadout(given["shapes"]))
        optx.attach(setup.model, optx.MuAttention(given["shapes"]))
    optimizer = optx.wrap(base, cls(**given, **options), fused=fused)
    return train(setup, optimizer, nn.functional.cross_entropy)


def injected(cls: type, options: dict[str, Any], setup: Setup) -> list[float]:
    """What is added is trained, by AdamW, at ten times the rate of a whole model."""
    torch.manual_seed(1)
    given = {**needed(cls, setup), **options}
    if setup.pruned:
        given["masks"] = optx.prune(setup.model, optx.Magnitude(setup.pruned))
    handle = optx.attach(setup.model, cls(**given), setup.targets, modules_to_save=())
    if isinstance(handle, optx.SphericalHandle):  # which has the loss, and steps the head with the rest
        handle.served[0].module.train()
        trained = [p for p in setup.model.parameters() if p.requires_grad]
        return train(setup, optx.wrap(torch.optim.AdamW(trained, lr=setup.lr), handle), handle.loss)
    if not list(handle.parameters()):  # it adds none
        trained = [p for p in setup.model.parameters() if p.requires_grad]
        return train(setup, torch.optim.AdamW(trained, lr=setup.lr), nn.functional.cross_entropy)
    optx.trainable_only(setup.model, handle)
    optimizer = torch.optim.AdamW(handle.parameters(), lr=10 * setup.lr)
    return train(setup, optimizer, nn.functional.cross_entropy)


def along(cls: type, options: dict[str, Any], setup: Setup) -> Callable[..., Tensor]:
    """A trajectory loss beside the usual one; each step is an epoch, each token a sample."""
    given = (
        {"model": setup.model, "output": lambda out: out.logits.flatten(0, -2)} if cls is optx.MESA else {}
    )
    loss, epochs = cls(**given, **options), itertools.count()

    def criterion(logits: Tensor, target: Tensor) -> Tensor:
        loss.set_epoch(next(epochs))
        more = torch.arange(len(logits)) if cls is optx.SAF else setup.inputs
        return nn.functional.cross_entropy(logits, target) + loss(logits, more)

    return criterion


def guided(cls: type, options: dict[str, Any], setup: Setup) -> list[float]:
    """Everything is trained, by AdamW, on a loss of optx's."""
    if cls in (optx.SAF, optx.MESA):
        return train(
            setup, torch.optim.AdamW(setup.model.parameters(), lr=setup.lr), along(cls, options, setup)
        )
    loss = cls(**options)
    if cls is optx.LossReweight:  # it takes losses; here every token is a sample
        criterion: Callable[..., Tensor] = lambda logits, target: loss.from_logits(logits, target)  # noqa: E731
    else:
        criterion = loss
    return train(setup, torch.optim.AdamW(setup.model.parameters(), lr=setup.lr), criterion)


def merged(cls: type, options: dict[str, Any], setup: Setup) -> list[float]:
    """The loss of a merge of two to five models that lie around the base."""
    generator = torch.Generator().manual_seed(1)
    base = {name: t.clone() for name, t in setup.model.state_dict().items()}
    models = [
        {name: t + 0.05 * torch.randn(t.shape, generator=generator) for name, t in base.items()}
        for _ in range(5)
    ]
    losses: list[float] = []
    for count in range(2, 6):
        setup.model.load_state_dict(optx.merge(base, models[:count], cls(**options)))
        with torch.no_grad():
            logits = setup.forward(setup.model).flatten(0, -2)
            losses.append(nn.functional.cross_entropy(logits, setup.target.flatten()).item())
    return losses


def runs(name: str) -> dict[str, Callable[[], list[float]]]:
    """A method's runs by label."""
    cls = methods()[name]
    found: dict[str, Callable[[], list[float]]] = {}

    def add(label: str, run: Callable[..., list[float]], options: Any, model: str, *more: Any) -> None:
        around = AROUND.get((name, variant), {})
        found[", ".join(filter(None, (model, label)))] = lambda: run(
            cls, options, MODELS[model]()._replace(**around), *more
        )

    for variant, options in OPTIONS.get(name, {"": {}}).items():
        models = ["tiny", "minilm"] if not found else ["tiny"]  # the larger one for the first variant alone
        if issubclass(cls, optx.Transform):
            add(f"{variant} foreach".strip(), transformed, options, "tiny", False)
            for model in models:
                add(variant, transformed, options, model, True)
        elif issubclass(cls, optx.Injection):
            for model in models:
                add(variant, injected, options, model)
        else:
            add(variant, merged if issubclass(cls, optx.MergeMethod) else guided, options, "tiny")
    return found


def platform_here() -> dict[str, str]:
    """What the last bits of a run depend on."""
    libraries = {name: version(name) for name in ("torch", "numba", "transformers")}
    return {
        **libraries,
        "machine": f"{platform.system()} {platform.machine()}",
        "processor": llvmlite.binding.get_host_cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def recorded(name: str) -> dict[str, Any]:
    """The file of a method: ``optx``, ``platform`` and ``losses`` by run."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def first_difference(old: Sequence[float], new: Sequence[float], allowed: float) -> int | None:
    """The first step at which two runs are further apart than is allowed, if there is one."""
    steps = enumerate(itertools.zip_longest(old, new, fillvalue=math.nan))
    return next((step for step, (before, now) in steps if not _apart(before, now) <= allowed), None)


def apart(old: Sequence[float], new: Sequence[float]) -> float:
    """How far two runs are apart at most, relative; a nan is as far as it gets."""
    if len(old) != len(new):
        return math.inf
    return max(_apart(before, now) for before, now in zip(old, new, strict=True))


def _apart(before: float, now: float) -> float:
    relative = abs(now - before) / abs(before)
    return math.inf if math.isnan(relative) else relative


def one_thread() -> None:
    """Sums over threads have another order."""
    torch.set_num_threads(1)
