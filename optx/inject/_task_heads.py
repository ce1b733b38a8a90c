"""The heads of models for a task, which are new and so are trained whole beside an adapter, as in PEFT."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from optx._errors import warn
from optx._module_paths import paths_of
from optx.inject._injection import Site
from optx.inject._peft_match import kept_whole

# PEFT's names of the tasks that have such heads, by the ends of transformers' class names.
_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}

# What some families call them, which PEFT does not look for.
_MORE = ("classification_head", "logits_proj")


def heads_of(
    model: nn.Module, targeted: Sequence[Iterable[Site]], found: Sequence[Iterable[Site]]
) -> list[str]:
    """Paths of the heads that PEFT would train whole for the model's task, and nobody has asked for else.

    Args:
        model: what is attached to.
        targeted: what was targeted by name, by member: a head with some of it inside is left to that.
        found: what is served, by member: a head is left to a member that would have nothing else.
    """
    names = (one.__name__ for one in type(model).__mro__)
    task = next((task for name in names for end, task in _TASKS.items() if name.endswith(end)), None)
    if task is None:
        return []
    here = paths_of(model).here
    heads = [here[path] for path in kept_whole({"task_type": task}, model) if path in here]
    heads = heads or [path for path, _ in model.named_children() if path in _MORE]
    if not heads:
        warn(
            f"attach: this {type(model).__name__} has no head of a name that is known, so none is trained. "
            "Pass modules_to_save=[its path], or () if that is meant."
        )
    inside = [path for sites in targeted for path in _inside(sites, heads)]
    heads = [head for head in heads if not any(f"{path}.".startswith(f"{head}.") for path in inside)]
    alone = any(len(_inside(sites, heads)) == len(list(sites)) for sites in found)
    return [] if alone else heads


def _inside(sites: Iterable[Site], heads: Iterable[str]) -> list[str]:
    """Paths of the sites that are in one of the heads."""
    begins = tuple(f"{head}." for head in heads)
    return [site.path for site in sites if f"{site.path}.".startswith(begins)] if begins else []
