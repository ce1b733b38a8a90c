"""muP passes the coordinate check and one learning rate for all does not: MLP, CNN, Llama, GPT-2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import optx
from optx.scaling import ABC, coordinate_check

pytestmark = pytest.mark.usefixtures("one_thread")  # tiny tensors

Made = Callable[[int], nn.Module]


def mlp(width: int) -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()),
        *(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3)),
    )


def cnn(width: int) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1, stride=2)),
        *(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, stride=2), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 5)),
    )


def llama(width: int, tied: bool = False) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "tie_word_embeddings": tied}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes, **heads))


def gpt2(width: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    ends = {"bos_token_id": 0, "eos_token_id": 0, "loss_type": "ForCausalLMLoss"}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=width, n_layer=1, n_head=4, n_positions=16, **ends)
    )


def pair(*shape: int, classes: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=g), torch.randint(classes, shape[:1], generator=g)


def tokens() -> dict[str, Tensor]:
    ids = torch.randint(64, (4, 12), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


MODELS: dict[str, tuple[Made, Any, list[int]]] = {
    "mlp": (mlp, pair(32, 8, classes=3), [64, 128, 256, 512]),
    "cnn": (cnn, pair(16, 1, 8, 8, classes=5), [16, 32, 64, 128]),
    "llama": (llama, tokens(), [32, 64, 128, 256]),
    "llama, tied": (lambda width: llama(width, tied=True), tokens(), [32, 64, 128, 256]),
    "gpt2": (gpt2, tokens(), [32, 64, 128, 256]),
}
CASES = [(name, "adam") for name in MODELS] + [("mlp", "sgd"), ("cnn", "sgd")]


@pytest.mark.long(keep=3)
@pytest.mark.parametrize(("name", "family"), CASES)
def test_mup_passes_and_one_learning_rate_for_all_does_not(name: str, family: str) -> None:
    make, batch, widths = MODELS[name]
    options: dict[str, Any] = {"optimizer": family, "lr": 1e-3 if family == "adam" else 0.1, "seeds": 2}
    mup = coordinate_check(make, widths, batch, parametrization="mup", **options)
    print(mup)
    assert mup.ok, mup
    assert not mup.later
    hidden = [n for n, layer in mup.layers.items() if layer.has_weights and not layer.finite_output]
    assert max(abs(slope) for n in hidden for slope in mup.slopes[n]) <= 0.15
    standard = coordinate_check(make, widths[::3], batch, **options)
    print(standard)
    assert not standard.ok, standard


def test_slopes_of_a_three_layer_mlp() -> None:
    """At a learning rate that matters: under muP hidden layers are flat, and the output starts at -0.5."""
    batch, widths = pair(64, 8, classes=3), [64, 128, 256, 512, 1024]

    def make(width: int) -> nn.Module:
        return nn.Sequential(
            nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3)
        )

    options: dict[str, Any] = {"optimizer": "adam", "lr": 1e-2, "seeds": 3}
    mup = coordinate_check(make, widths, batch, parametrization="mup", **options)
    assert all(abs(slope) <= 0.1 for name in ("0", "2") for slope in mup.slopes[name])
    assert -0.7 < mup.slopes["4"][0] < 0.0
    standard = coordinate_check(make, widths, batch, parametrization="standard", **options)
    assert max(standard.slopes["4"][1:]) >= 0.4
    assert list(standard.failures) == ["2", "4"]


@pytest.mark.parametrize(
    "name", ["model.layers.0.mlp.down_proj", "model.layers.0.self_attn.q_proj", "lm_head"]
)
def test_the_one_layer_of_a_transformer_that_is_out_of_scale_is_named(name: str) -> None:
    """Its learning rate is the width's ratio times what it should be."""

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        bad = model.get_parameter(f"{name}.weight")
        rest = [p for p in model.parameters() if p is not bad]
        ratio = model.config.hidden_size / 32
        return torch.optim.AdamW([{"params": rest}, {"params": [bad], "lr": 1e-3 * ratio}], lr=1e-3)

    make, batch, widths = MODELS["llama"]
    check = coordinate_check(make, widths[:3], batch, optimizer=optimizer, parametrization="mup", seeds=2)
    assert list(check.failures) == [name], check


def test_with_a_parametrization_too_nothing_is_left_on_the_models() -> None:
    made: list[tuple[nn.Module, dict[str, Tensor]]] = []

    def make(width: int) -> nn.Module:
        model = llama(width)
        made.append((model, {k: v.clone() for k, v in model.state_dict().items()}))
        return model

    coordinate_check(make, [32, 64], tokens(), optimizer="adamw", parametrization="mup", seeds=1, steps=1)
    assert len(made) == 4  # two to tell which dimensions are width
    for model, state in made:
        assert model.state_dict().keys() == state.keys()
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert not any("forward" in m.__dict__ for m in model.modules())


def test_exponents_for_sgd_have_factors_too() -> None:
    """Which are those of a model at its start, and no optimizer's."""
    batch = pair(4, 8, classes=3)
    options: dict[str, Any] = {"optimizer": "sgd", "lr": 0.1, "seeds": 1, "steps": 1}
    named = coordinate_check(mlp, [8, 16], batch, parametrization="ntk", **options)
    written = coordinate_check(mlp, [8, 16], batch, parametrization=ABC.named("ntk", 3, "sgd"), **options)
    assert written.slopes.keys() == named.slopes.keys()
    assert all(slopes == pytest.approx(named.slopes[name]) for name, slopes in written.slopes.items())


def test_what_a_parametrization_cannot_be_given_with() -> None:
    batch = pair(4, 8, classes=3)
    with pytest.raises(optx.OptxError, match="the optimizer is made here; give optimizer='adamw'"):
        coordinate_check(mlp, [8, 16], batch, parametrization="mup")
    with pytest.raises(optx.OptxError, match="muq"):
        coordinate_check(mlp, [8, 16], batch, optimizer="adam", parametrization="muq")


@pytest.mark.long
def test_queries_and_keys_under_sgd_where_heads_get_wider_and_where_they_get_more() -> None:
    """A logit's gradient sums over a head's values, which at first are independent of it: width^-0.5."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def more(width: int) -> nn.Module:
        heads = {"num_attention_heads": width // 8, "num_key_value_heads": width // 8}
        sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 1}
        return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes, **heads))

    options: dict[str, Any] = {"optimizer": "sgd", "lr": 0.1, "seeds": 2, "parametrization": "mup"}
    found: dict[str, list[float]] = {}
    for name, make in {"more": more, "wider": llama}.items():
        check = coordinate_check(make, [32, 64, 128, 256], tokens(), **options)
        slopes = check.updates.items()
        found[name] = [s for module, each in slopes if module.endswith(("q_proj", "k_proj")) for s in each]
    print(found)
    assert min(found["more"]) > -0.3
    assert max(found["wider"]) < -0.45


def test_a_model_of_the_package_mup_is_read() -> None:
    mup = pytest.importorskip("mup")

    def make(width: int) -> nn.Module:
        made = [
            nn.Sequential(nn.Linear(8, w), nn.ReLU(), nn.Linear(w, w), nn.ReLU(), mup.MuReadout(w, 3))
            for w in (width, 32, 64)
        ]
        return mup.set_base_shapes(made[0], made[1], delta=made[2])

    def adam(model: nn.Module) -> torch.optim.Optimizer:
        return mup.MuAdam(model.parameters(), lr=1e-3)

    check = coordinate_check(make, [32, 64, 128, 256], pair(32, 8, classes=3), optimizer=adam, seeds=2)
    assert check.ok, check
    assert (check.layers["4"].update[:, :, 1:] > 0).all()


def test_a_multiplier_of_ones_own_may_have_nothing_to_do_at_the_base_width() -> None:
    def narrow(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(8, width), nn.Linear(width, width), nn.Linear(width, 3))

    def make(width: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = narrow(width)
        shapes = optx.scaling.shapes(model, base=narrow(64), delta=narrow(32))
        optx.scaling.init_(model, shapes, "ntk")
        optx.attach(model, optx.MuReadout(shapes, parametrization="ntk"))
        opt = torch.optim.SGD(model.parameters(), lr=0.05)
        return model, optx.scaling.mup(opt, shapes, parametrization="ntk")

    batch = (torch.randn(4, 8), torch.randn(4, 3))
    check = optx.scaling.coordinate_check(make, [64, 256], batch, seeds=1, steps=1)
    assert set(check.layers) == {"0", "1", "2", ""}
