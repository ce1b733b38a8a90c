"""Soft thinking inside of transformers' own generation loop.

``model.generate(custom_generate=...)`` prepares inputs and calls a function for the loop. This one calls the
loop that generate itself would, with one processor more: it turns the logits into a step, keeps the token
alone, and has the embedding put the step's mixture where that token is given next.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from optx._errors import OptxError
from optx.thinking._embedding import MixedEmbedding
from optx.thinking._state import Options, Sequences
from optx.thinking._trail import Trail

_SAMPLING = ("Temperature", "TopK", "TopP", "MinP", "Typical", "Epsilon", "Eta", "TopH", "PLess")
"""Of transformers' processors, those whose classes begin with this are settings of sampling."""


class Processor:
    """One of transformers' logits processors, for one call of generate."""

    def __init__(
        self, part: MixedEmbedding, rows: Sequences, options: Options, trail: Trail, caches: bool
    ) -> None:
        self.part, self.rows, self.options, self.trail = part, rows, options, trail
        self.caches = caches

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores that leave each row one token.

        Args:
            input_ids: (B, places), with what the steps so far have chosen.
            scores: (B, V).
        """
        done = self.trail.steps
        if input_ids.shape[1] != self.trail.prompts.shape[1] + len(done):
            raise OptxError(
                f"SoftThinking: after {len(done)} steps the rows have {input_ids.shape[1]} places, not "
                f"{self.trail.prompts.shape[1] + len(done)}. Loops that go back or ahead are not served."
            )
        if done:  # a stopping criterion of the user's may have ended a row: it was given padding
            same = (input_ids[:, -1] == done[-1].ids[:, 0]).cpu()
            self.rows.running = self.rows.running & same
        step = self.rows.step(scores, self.options)
        done.append(step)
        self.part.inputs = self.trail.inputs(every=not self.caches)
        return torch.full_like(scores, -torch.inf).scatter_(1, step.ids[:, :1], 0)


def check_served(own: nn.Module, model: Any, config: Any) -> None:
    """Raise if this call of generate is not one that soft thinking can serve.

    Args:
        own: the handle's model.
        model: the one that generates: that, or what is around or inside of it (PEFT's).
        config: transformers' settings of the call.
    """
    mine, its = ({id(one) for one in each.modules()} for each in (own, model))
    if not (mine <= its or its <= mine):
        raise OptxError("custom_generate: this handle is on another model than the one that generates.")
    beams = getattr(config, "num_beams", 1) or 1
    if beams != 1:
        raise OptxError(f"custom_generate: num_beams is {beams}; soft thinking has one beam a row.")
    if not hasattr(model, "_sample"):
        raise OptxError(
            f"custom_generate: this {type(model).__name__} has no loop of transformers' (_sample). Use "
            "handle.generate, which has its own."
        )


def through_transformers(
    part: MixedEmbedding,
    rows: Sequences,
    options: Options,
    model: Any,
    input_ids: Tensor,
    processors: Any,
    criteria: Any,
    config: Any,
    kwargs: dict[str, Any],
) -> tuple[Any, Trail]:
    """Run transformers' loop.

    Returns:
        What it returned, and the steps.
    """
    mask = kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask[:, -input_ids.shape[1] :]
    trail = Trail(input_ids, mask)
    own = Processor(part, rows, options, trail, caches=bool(kwargs.get("use_cache", True)))
    kept = [one for one in processors or () if not type(one).__name__.startswith(_SAMPLING)]
    config = copy.copy(config)
    config.do_sample = False
    before = part.inputs
    try:
        made = model._sample(
            input_ids,
            logits_processor=type(processors)([*kept, own]),
            stopping_criteria=criteria,
            generation_config=config,
            **kwargs,
        )
    finally:
        part.inputs = before
    sequences: Tensor = made if isinstance(made, Tensor) else made.sequences
    del trail.steps[sequences.shape[1] - input_ids.shape[1] :]  # a loop may run a step too far
    return made, trail
