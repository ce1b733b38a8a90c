"""A policy's log-densities of the steps that a rollout has, by one forward pass over all of them."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from optx._errors import OptxError
from optx._soft_density import Steps, soft_steps
from optx.thinking._calls import named
from optx.thinking._embedding import embedding_of
from optx.thinking._record import Rollout


class Density(NamedTuple):
    """How steps are scored, see `optx.functional.soft_logprob`."""

    reduce: str
    noise_clamp: tuple[float, float] | None


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of DDP's and torch.compile's wrappers."""
    inner: Any = model
    while True:
        if isinstance(inner, nn.parallel.DistributedDataParallel):
            inner = cast(Any, inner).module
        elif isinstance(found := getattr(inner, "_orig_mod", None), nn.Module):
            inner = found
        else:
            return inner


def scored(model: nn.Module, rollout: Rollout, density: Density, mask: Tensor | None = None) -> Steps:
    """Log-densities of all steps, (B, T), and the tokens that they are means over, (B, T, K).

    Args:
        model: the policy, in whatever wrapper.
        rollout: its steps; inputs are made of them anew, and detached.
        density: how.
        mask: (B, T, K), if the mean is over the tokens of an earlier policy.
    """
    logits = response_logits(model, rollout)
    V = logits.shape[-1]
    if bool((rollout.ids >= V).any()):
        raise OptxError(
            f"SofTGRPO: the rollout has token {int(rollout.ids.max())}, and this "
            f"{type(unwrapped(model)).__name__} has {V:,}. It is of another model."
        )
    options = rollout.options or {}
    # Tokens that a filter had dropped have a g' all the same, of log(0 + 1e-6); the shares were not theirs.
    drawn = rollout.gprime.where(rollout.kept > 0, -torch.inf)
    return soft_steps(
        logits,
        rollout.ids,
        drawn,
        ~rollout.soft,
        temperature=_temperatures(rollout),
        noise_factor=options.get("noise_factor", 1.0),
        reduce=density.reduce,
        mask=mask,
        noise_clamp=density.noise_clamp,
    )


def response_logits(model: nn.Module, rollout: Rollout) -> Tensor:
    """The logits that every step was chosen by, (B, T, V): those of the place before its own."""
    inner, T = unwrapped(model), rollout.ids.shape[1]
    takes = named(inner)
    embeds = rollout.inputs(inner)[:, :-1]  # what the last step fed led to no other
    checkpoints = any(getattr(module, "gradient_checkpointing", False) for module in inner.modules())
    if checkpoints and torch.is_grad_enabled():
        embeds.requires_grad_()  # reentrant checkpoints pass no gradient on whose inputs ask for none
    mask = rollout.attention_mask[:, :-1]
    options: dict[str, Any] = {}
    if "attention_mask" in takes:
        options["attention_mask"] = mask
    elif not bool(rollout.prompt_mask.all()):
        raise OptxError(
            f"SofTGRPO: prompts are padded, and the forward of {type(inner).__name__} has no attention_mask. "
            "Give prompts of one length."
        )
    if "position_ids" in takes:
        options["position_ids"] = rollout.position_ids[:, :-1]
    if "use_cache" in takes:
        options["use_cache"] = False
    if "logits_to_keep" in takes:
        options["logits_to_keep"] = T
    output = _called(model, inner, rollout, embeds, "inputs_embeds" in takes, options)
    logits = output if isinstance(output, Tensor) else output.logits
    return logits[:, -T:]


def _called(
    model: nn.Module,
    inner: nn.Module,
    rollout: Rollout,
    embeds: Tensor,
    by_name: bool,
    options: dict[str, Any],
) -> Any:
    """The model's output for these embeddings; one that takes none by name has its embedding give them."""
    if by_name:
        return model(inputs_embeds=embeds, **options)
    embedding = embedding_of(inner, "SofTGRPO")[1]

    def instead(module: nn.Module, args: Any, output: Any) -> Tensor:
        return embeds

    hook = embedding.register_forward_hook(instead)
    try:
        return model(rollout.sequences[:, :-1], **options)
    finally:
        hook.remove()


def _temperatures(rollout: Rollout) -> float | Tensor:
    """What the logits of each step were divided by."""
    options = rollout.options or {}
    while_thinking = float(options.get("temperature", 1.0))
    after = options.get("after_temperature")
    if after is None or after == while_thinking:
        return while_thinking
    return torch.where(rollout.thought, while_thinking, float(after)).to(torch.float32)


@contextmanager
def at_rest(model: nn.Module) -> Generator[None]:
    """Without gradients, and with every module in evaluation mode; then as before."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
