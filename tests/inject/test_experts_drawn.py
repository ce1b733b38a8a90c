"""LoRA on experts of drawn sizes: every implementation gives what the merged weights give."""

from __future__ import annotations

import pytest
import torch
from adapter_models import shake
from expert_models import ONE_PARAMETER
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor, nn

import optx

pytestmark = ONE_PARAMETER


def block(kind: str, implementation: str, experts: int, width: int, dtype: torch.dtype) -> nn.Module:
    """A module of experts as transformers has them: (out, in) matrices, or (in, out) and with biases."""
    import transformers
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    sizes = {"num_local_experts": experts, "hidden_size": width, "intermediate_size": width + 8}
    config = getattr(transformers, f"{kind}Config")(**sizes)
    config._experts_implementation = implementation
    module = {"Mixtral": MixtralExperts, "GptOss": GptOssExperts}[kind](config).to(dtype)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=width**-0.5)
    return nn.Sequential(module)


@pytest.mark.parametrize("kind", ["Mixtral", "GptOss"])
@hypothesis_settings(max_examples=40)
@given(
    implementation=st.sampled_from(["eager", "batched_mm", "grouped_mm"]),
    experts=st.integers(1, 6),
    width=st.sampled_from([8, 16, 24]),
    rank=st.integers(1, 8),
    top=st.integers(1, 3),
    tokens=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_as_merged(
    kind: str,
    implementation: str,
    experts: int,
    width: int,
    rank: int,
    top: int,
    tokens: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Also where an expert gets no token, or all of them."""
    torch.manual_seed(seed)
    model = block(kind, implementation, experts, width, dtype)
    handle = optx.attach(model, optx.LoRA(rank=rank, alpha=rank), targets=["0"])
    shake(handle.parameters(), seed, by=0.3)
    x = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    chosen = torch.randint(0, experts, (tokens, top))
    shares = torch.rand(tokens, top).to(dtype)

    def run() -> tuple[Tensor, Tensor]:
        out = model[0](x, chosen, shares)  # type: ignore[operator]
        return out.detach(), torch.autograd.grad(out.float().square().sum(), x)[0]

    found = run()
    handle.merge()
    wanted = run()
    for own, theirs in zip(found, wanted, strict=True):
        size = float(theirs.abs().max()) + 1e-3
        assert float((own - theirs).abs().max()) < size * (1e-4 if dtype == torch.float32 else 0.06)
