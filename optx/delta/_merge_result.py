"""The files of a merged model besides its tensors: configuration, tokenizer, chat template."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from optx.delta._merge_config_json import (
    depth_is_told,
    read_json,
    relayered,
    with_vocabulary,
    write_json,
)
from optx.delta._merge_file import ModelRef
from optx.delta._merge_plan import Plan
from optx.delta._merge_settings import Table
from optx.delta._merge_tokenizer import has_tokenizer, template_of, write_template, write_tokenizer
from optx.delta._model_layers import is_head, tied_to


@dataclass(frozen=True)
class Result:
    """What a folder of the result holds besides tensors and copies of the donor's files.

    Attributes:
        plan: of the merge.
        template: a chat template of its own.
        untied: whether the configuration must say that the head is no longer the embeddings.
        needs_folder: whether a single file can't hold it.
    """

    plan: Plan
    template: str | None
    untied: bool
    needs_folder: bool

    @classmethod
    def of(cls, plan: Plan) -> Result:
        """Look at all that is needed, before any work is done.

        Raises:
            OptxError: it can't be made; says why.
        """
        file, template = plan.file, None
        if file.chat_template is not None:
            template = template_of(file.chat_template, file.models)
            if template is not None and not has_tokenizer(plan.donor):
                plan.notes.append(f"chat_template is ignored: {plan.donor.text!r} has no tokenizer.")
                template = None
        untied = _is_untied(plan)
        if untied:
            plan.notes.append(
                "one model's head is its embeddings, and another's is not: the result has both, and its "
                "config.json says tie_word_embeddings: false."
            )
        new = plan.vocabulary is not None and plan.vocabulary.is_new
        made = cls(plan, template, untied, template is not None or new)
        made.config(read_json(plan.donor.path / "config.json"))
        return made

    def config(self, config: Table) -> Table:
        """What is made of the donor's configuration."""
        plan = self.plan
        if plan.origins and config:
            depth = next(iter(plan.models.layers(plan.donor).counts.values()))
            if not depth_is_told(config, depth):
                plan.notes.append(
                    f"config.json of {plan.donor.text!r} does not say that it has {depth} layers; the result "
                    f"has {len(plan.origins)}."
                )
            models = dict.fromkeys(model for model, _ in plan.origins)
            tables = {model: read_json(model.path / "config.json") for model in models}
            each = [tables[model] for model, _ in plan.origins]
            config = relayered(config, each, [number for _, number in plan.origins], depth)
        if plan.vocabulary is not None and config:
            config = with_vocabulary(renumbered(config, plan), plan.vocabulary.size)
        if self.untied and config:
            config = config | {"tie_word_embeddings": False}
        return config

    def finish(self, folder: Path) -> None:
        """Change what was copied from the donor."""
        for name, change in (("config.json", self.config), ("generation_config.json", self._generation)):
            if (folder / name).exists():
                before = read_json(folder / name)
                if (after := change(before)) != before:
                    write_json(folder / name, after)
        vocabulary = self.plan.vocabulary
        if vocabulary is not None and vocabulary.is_new:
            write_tokenizer(folder, vocabulary.tokenizer)
        if self.template is not None:
            write_template(folder, self.template)

    def _generation(self, table: Table) -> Table:
        return renumbered(table, self.plan)


def renumbered(table: Table, plan: Plan) -> Table:
    """A configuration whose special tokens have the numbers of the result's vocabulary."""
    vocabulary = plan.vocabulary
    if vocabulary is None:
        return table
    moved = {int(old): new for new, old in enumerate(vocabulary.places[plan.donor].tolist()) if old >= 0}

    def number(value: Any) -> Any:
        return moved.get(value, value) if isinstance(value, int) and not isinstance(value, bool) else value

    made = dict(table)
    for key, value in table.items():
        if key.endswith("_token_id"):
            made[key] = (
                [number(v) for v in cast(list[Any], value)] if isinstance(value, list) else number(value)
            )
        elif isinstance(value, dict):
            made[key] = renumbered(cast(Table, value), plan)
    return made


def _is_untied(plan: Plan) -> bool:
    """Whether the donor has no head of its own, and another model's differs from its embeddings."""
    for name in plan.outputs:
        if not is_head(name) or name in plan.models[plan.donor].entries:
            continue
        owners = {one.model for one in plan.outputs[name].inputs if one.name == name}
        if any(not _is_its_embeddings(plan, model, name) for model in owners):
            return True
    return False


def _is_its_embeddings(plan: Plan, model: ModelRef, head: str) -> bool:
    source = plan.models[model]
    other = tied_to(head, source.entries)
    if other is None or source.entries[other] != source.entries[head]:
        return False
    return all(torch.equal(a, b) for a, b in zip(source.pieces(head), source.pieces(other), strict=True))
