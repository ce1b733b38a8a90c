"""A merge as a YAML file describes it, planned and written.

Source: mergekit, arXiv 2403.13257, whose format it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from optx._errors import OptxError
from optx.delta._adapted_source import Adapted
from optx.delta._checkpoint_output import new_layout, plan_of, write_checkpoint
from optx.delta._checkpoint_source import Files, Source
from optx.delta._merge_file import MergeFile
from optx.delta._merge_method import Progress
from optx.delta._merge_methods import METHODS
from optx.delta._merge_plan import Plan
from optx.delta._merge_result import Result


@dataclass(frozen=True)
class Job:
    """A merge that is ready to be run.

    Attributes:
        file: what was asked for.
        plan: every tensor of the result.
        result: its other files.
        notes: what of the file has no effect, and what a person should know, in sentences.
    """

    file: MergeFile
    plan: Plan
    result: Result
    notes: list[str]

    @property
    def passes(self) -> int:
        """Each tensor is gone over when it is written."""
        return 1

    @property
    def models(self) -> int:
        """How many are merged into the base, or into one another."""
        method = METHODS[self.file.method]
        known = method.base != "none" and method.models != (2, 2)  # of two, the base is one that is merged
        return len([model for model in self.plan.models.sources if not known or model != self.file.base])

    @property
    def inputs(self) -> list[Path]:
        """What is read."""
        models = self.plan.models.sources
        return [model.path for model in models] + [model.adapter for model in models if model.adapter]

    def run(self, out: Path, progress: Progress) -> Path:
        """Write the result."""
        plan, file = self.plan, self.file
        like = _files(plan.models[plan.donor])
        if out.suffix == ".safetensors" and self.result.needs_folder:
            raise OptxError(f"out: {str(out)!r} is a file; a tokenizer or a chat template needs a folder.")
        layout = None if set(plan.entries) == set(like.entries) else new_layout(plan.entries)
        states = [source.state for source in plan.models.sources.values()]
        vocabulary = plan.vocabulary.mark if plan.vocabulary else None
        return write_checkpoint(
            out,
            like,
            plan.entries,
            plan.make,
            plan=plan_of("merge yaml", repr(plan.file), plan.seed, states, vocabulary),
            dtype=file.out_dtype or file.dtype,
            progress=progress,
            layout=layout,
            finish=self.result.finish,
        )


def job_of(file: MergeFile, seed: int, notes: list[str]) -> Job:
    """Plan a merge.

    Args:
        file: what is asked for.
        seed: of random masks.
        notes: what of it has no effect.

    Raises:
        OptxError: it can't be done; says why.
    """
    plan = Plan(file, seed)
    result = Result.of(plan)
    return Job(file, plan, result, [*notes, *plan.notes])


def _files(source: Source) -> Files:
    inner = source.base if isinstance(source, Adapted) else source
    assert isinstance(inner, Files)
    return inner
