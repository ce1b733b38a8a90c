"""What can't be pruned is said in one sentence, before anything is changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapter_models import llama
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune

import optx
from optx import OptxError


def ids(count: int = 2, length: int = 9) -> Tensor:
    return torch.randint(3, 64, (count, length), generator=torch.Generator().manual_seed(1))


def refused(model: nn.Module, match: str, data: Any = "ids", method: Any = None, **more: Any) -> None:
    """Raises, in one sentence, and changes nothing."""
    before = {name: t.clone() for name, t in model.state_dict().items() if not t.is_meta}
    modes = [module.training for module in model.modules()]
    with pytest.raises(OptxError, match=match) as error:
        optx.prune(model, method or optx.Wanda(), [ids()] if isinstance(data, str) else data, **more)
    assert str(error.value).count("\n") == 0
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items() if name in before)
    assert [module.training for module in model.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (None, "Wanda needs calibration data; give data="),
        ([], "data is empty, and Wanda needs"),
        (ids(), r"data is a tensor of shape \(2, 9\); it must be a list .* data=\[batch\]"),
        ({"input_ids": ids()}, "it must be a list of tensors"),
        ([3], "a batch is 3; data must be"),
        ([{"input_ids": ids(), "past_key_values": [1]}], "has past_key_values"),
    ],
)
def test_calibration_data_that_is_none(data: Any, match: str) -> None:
    refused(llama(), match, data)


def test_a_pattern_that_does_not_divide() -> None:
    for method in (optx.Wanda(pattern="2:5"), optx.SparseGPT(pattern="2:5"), optx.Magnitude(pattern="2:5")):
        refused(
            llama(),
            r"'model.layers.0.self_attn.q_proj.weight' has 16 inputs, which pattern '2:5'",
            method=method,
        )


def test_a_tied_head() -> None:
    tied = llama(tie_word_embeddings=True)
    refused(tied, r"the weight of 'lm_head' is that of 'model.embed_tokens' too \(tied\)", targets=nn.Linear)
    assert "lm_head.weight" not in optx.prune(tied, optx.Wanda(), [ids()])


def test_layers_that_share_a_weight() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    refused(model, r"'0' is that of '1' too \(tied\), .* other as well", [torch.randn(3, 4)])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"targets": "nothing"}, "targets='nothing' matches no module; pruned are"),
        ({"targets": ".*norm"}, "matches LlamaRMSNorm only"),
        ({"targets": ["q_prj"]}, r"targets has 'q_prj' in its list"),
        ({"exclude": ["q_prj"]}, r"exclude has 'q_prj' in its list"),
        ({"exclude": ".*"}, "leaves nothing to prune"),
        ({"exclude": "lm_head"}, "leaves nothing out"),
        ({"out": "x"}, "out= is for checkpoints"),
    ],
)
def test_targets_that_are_none(options: dict[str, Any], match: str) -> None:
    refused(llama(), match, **options)


def test_weights_that_are_not_there_or_not_numbers() -> None:
    broken, meta, made, coded = llama(), llama(), llama(), llama()
    broken.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(OptxError, match=r"'model.layers.1.mlp.up_proj.weight' has inf or nan"):
        optx.prune(broken, optx.Magnitude())
    meta.model.layers[0].mlp.up_proj.to("meta")
    refused(meta, "is on the meta device")
    parametrize.register_parametrization(made.model.layers[0].mlp.up_proj, "weight", nn.Identity())
    refused(made, "made by a parametrization")
    codes = torch.zeros(24, 16, dtype=torch.int8)
    coded.model.layers[0].mlp.up_proj.weight = nn.Parameter(codes, requires_grad=False)
    refused(coded, "int8 codes of a Linear; prune before it is quantised")


def test_a_model_with_an_adapter() -> None:
    model = llama()
    with (
        optx.attach(model, optx.LoRA(rank=2), targets=["q_proj"]),
        pytest.raises(OptxError, match="has an adapter"),
    ):
        optx.prune(model, optx.Magnitude())


def test_activations_that_are_inf_before_anything_is_pruned() -> None:
    model = llama()
    model.model.embed_tokens.weight.data[5] = float("inf")
    refused(
        model,
        r"'model.layers.0.self_attn.\w+_proj' is given in calibration is inf or nan",
        [torch.full((1, 4), 5)],
    )


def dropped(module: nn.Module) -> nn.Module:
    return torch_prune.random_unstructured(module, "weight", 0.3)


class Routed(nn.Module):
    """Two experts, by the sign of the first input."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            mine = (x[..., 0] > 0) == bool(i)
            if mine.any():
                out[mine] = expert(x[mine])
        return out


class Stacked(nn.Module):
    """Two experts in one tensor, of no family that optx knows."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.experts = nn.Parameter(torch.randn(2, 4, 4))


def test_experts_in_one_tensor_of_an_unknown_model_are_told_of() -> None:
    model = nn.Sequential(Stacked(), Stacked())
    with pytest.warns(
        UserWarning, match=r"'0.experts', of shape \(2, 4, 4\) \(2 such in all\), .* left dense"
    ):
        masks = optx.prune(model, optx.Magnitude())
    assert set(masks) == {"0.linear.weight", "1.linear.weight"}


@pytest.mark.parametrize("how", [nn.utils.weight_norm, nn.utils.spectral_norm, dropped])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_a_weight_that_is_made_at_every_call(how: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), how(nn.Linear(4, 4)))
    before = model[0].weight.clone()
    with pytest.raises(optx.TargetError, match=r"'1.weight' is no parameter but made of others"):
        optx.prune(model, optx.Magnitude())
    assert torch.equal(model[0].weight, before)


def test_an_expert_that_saw_no_token() -> None:
    x = torch.randn(2, 5, 4).abs()
    refused(Routed(), r"'experts.0' saw no token of the calibration data \(2 batches\)", [x, x])
    masks = optx.prune(Routed(), optx.Wanda(), [x, -x])
    assert set(masks) == {"experts.0.weight", "experts.1.weight"}


def test_padding_where_tokens_can_not_be_told() -> None:
    mask = torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
    batch = {"x": torch.randn(2, 5, 4), "attention_mask": mask}
    refused(Routed(), r"is given \(\d, 4\), of which optx can't tell what is padding", [batch])
    late = nn.Sequential(nn.Linear(4, 4), Routed())
    late.forward = lambda x, attention_mask=None: late[1](late[0](x))  # pyright: ignore[reportAttributeAccessIssue]
    plain = {"x": torch.cat([batch["x"], -batch["x"]])}
    refused(late, "can't tell what is padding", [plain, batch])


def test_layers_whose_weight_is_used_without_a_call() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    x = [torch.randn(2, 5, 8)]
    with pytest.warns(UserWarning, match="'self_attn.out_proj' .* MultiheadAttention, which uses its weight"):
        masks = optx.prune(model, optx.Wanda(), x)
    assert set(masks) == {"linear1.weight", "linear2.weight"}
    refused(model, "so that what it is given can't be seen", x, targets=nn.Linear)
    with pytest.warns(UserWarning, match="queries, keys and values of 'self_attn' .* left dense"):
        assert "self_attn.out_proj.weight" in optx.prune(model, optx.Magnitude())


def test_padding_of_torchs_own_encoder_makes_no_nested_tensors() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    padding = torch.tensor([[False] * 5, [False, False, False, True, True]])
    with pytest.warns(UserWarning, match="MultiheadAttention"):
        masks = optx.prune(
            model, optx.Wanda(), [{"src": torch.randn(2, 5, 8), "src_key_padding_mask": padding}]
        )
    assert len(masks) == 4
    assert torch.backends.mha.get_fastpath_enabled()


def test_methods_and_targets_that_are_none() -> None:
    refused(llama(), "method is 'wanda'; it must be one such as", method="wanda")
    refused(nn.Sequential(nn.Conv3d(1, 1, 3)), "is a Conv3d", [torch.randn(1, 1, 4, 4, 4)])
    refused(nn.Sequential(nn.ReLU()), "has no linear layer or convolution", [torch.randn(1)])
