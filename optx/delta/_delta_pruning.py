"""`optx.Delta`'s pruning methods, by which a person calls `optx.delta.prune` and `optx.delta.search_q`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from optx._errors import OptxError
from optx.delta import prune, search_q
from optx.delta._difference import Difference
from optx.delta._input_stats import InputStats, linear_axes
from optx.delta._mixed_sum import AllOf
from optx.delta._name_filter import chooser
from optx.delta._random_mask import NOTHING
from optx.delta.prune import Rescale, check_p, dropouts

if TYPE_CHECKING:
    from typing_extensions import Self

HEADS = r".*(classifier|lm_head).*"
"""Names of output layers, which pruning leaves whole: a new one has no base (arXiv 2410.09344)."""


class Prunable(Difference):
    """A difference with what drops parts of it, and what tells how."""

    def dare(
        self,
        p: float,
        q: Rescale = None,
        *,
        seed: int = 0,
        include: str | None = None,
        exclude: str | None = HEADS,
    ) -> Self:
        """Drop each change with probability p and divide what is kept by q (DARE; DAREx-q with q > 1-p).

        Element by element: an `apply` or `save` after it streams by pieces. The mask depends on the seed,
        the tensor's name and the element's place only.

        Args:
            p: share DROPPED, in [0, 1).
            q: None is DARE's 1 - p, with which the expected change stays; a larger one, up to 1, lessens the
                noise. A number, or one by tensor name, as `find_q` gives them; a bias without its own has
                its weight's, other tensors the mean.
            seed: of the masks.
            include: regex of the names to prune; the others keep their whole change.
            exclude: regex of names not to prune; by default a fine-tuned model's new head.

        Paper values:
            ``p=0.9``: RoBERTa-base on GLUE, WizardMath-7B on GSM8K (DARE's README); up to ``p=0.99`` where
                changes are within 0.005.
            ``p=0.99``, with q of `find_q`: BERT and RoBERTa on GLUE (DAREx).
            ``p=0.95``, with q of `find_q`: 7B decoders on GSM8K (DAREx).

        Limits: Random: another seed is another model. Where changes are large, importance (`wanda`) keeps
        more.

        Keywords: DARE, DAREx-q, DPP, pruning, sparse, random, delta parameters.

        Evidence: ``optx run merge``; ``test_prune.py``.

        Raises:
            OptxError: p or q out of range, or nothing is left to prune.

        Example:
            >>> import torch, optx
            >>> base, tuned = {"w": torch.zeros(10_000)}, {"w": torch.ones(10_000)}
            >>> pruned = optx.Delta.between(base, tuned).dare(0.9)
            >>> pruned["w"].unique(), round(float(pruned["w"].mean()), 1)
            (tensor([ 0., 10.]), 1.0)

        Source: DARE, arXiv 2311.03099, section 3; DAREx-q, arXiv 2410.09344, section 4.
        """
        names = self._to_prune("dare", include, exclude)
        dropout, recipe = dropouts("Delta.dare", names, p, q, seed)

        def change(name: str, tensor: Tensor, begin: int) -> Tensor:
            return dropout(name).scale(tensor, begin) if name in names else tensor

        made = self._elementwise(change, ("dare", include, exclude, *recipe))
        if self._one_pass is not None:
            made._one_pass = self._one_pass.pruned(lambda n: dropout(n) if n in names else NOTHING)
        return made

    def magnitude(self, p: float, *, include: str | None = None, exclude: str | None = HEADS) -> Self:
        """Drop the int(n p) smallest changes of each tensor of n; what is kept stays as it is.

        Of equal changes those that come first are dropped, so that exactly as many go (the paper's code
        drops all that equal the threshold). A tensor and a copy of its sizes are in memory.

        Args:
            p: share DROPPED, in [0, 1).
            include: regex of the names to prune; the others keep their whole change.
            exclude: regex of names not to prune.

        Paper values:
            ``p=0.9``: RoBERTa-base on GLUE, where DARE's README compares it. DAREx recommends importance for
                changes that are large; it has no number but p.

        Limits: A tensor at a time is in memory. What is kept is not rescaled.

        Keywords: pruning, sparse, importance.

        Evidence: ``optx run merge``; ``test_prune.py``.

        Raises:
            OptxError: p out of range, or nothing is left to prune.

        Example:
            >>> import torch, optx
            >>> tuned = {"w": torch.tensor([0.5, -0.1, 0.3, -0.7])}
            >>> optx.Delta.between({"w": torch.zeros(4)}, tuned).magnitude(0.5)["w"]
            tensor([ 0.5000,  0.0000,  0.0000, -0.7000])

        Source: arXiv 2410.09344, section 5.
        """
        check_p("Delta.magnitude", p)
        return self._pruned(
            "magnitude", (p,), include, exclude, lambda _name, tensor: prune.magnitude(tensor, p)
        )

    def wanda(
        self,
        p: float,
        stats: Mapping[str, InputStats],
        *,
        include: str | None = None,
        exclude: str | None = HEADS,
    ) -> Self:
        """Drop, in each output row, the int(d_in p) changes with the lowest size times norm of their input.

        Tensors without statistics (embeddings, norms, biases) are pruned by `magnitude`.

        Args:
            p: share DROPPED, in [0, 1).
            stats: of `optx.analysis.input_stats`.
            include: regex of the names to prune; the others keep their whole change.
            exclude: regex of names not to prune.

        Paper values:
            ``p=0.5``: Wanda's README, LLaMA and Llama 2, of the weights themselves.
            ``p=0.9``: a drop rate for changes, as in DARE; DAREx recommends importance for changes that are
                large.

        Limits: It needs inputs, and a tensor at a time in memory. What is kept is not rescaled.

        Keywords: Wanda, pruning, sparse, importance.

        Evidence: ``optx run merge``; ``test_prune.py``.

        Example:
            >>> import torch, optx
            >>> base, tuned = torch.nn.Linear(3, 2, bias=False), torch.nn.Linear(3, 2, bias=False)
            >>> stats = optx.analysis.input_stats(tuned, [torch.randn(16, 3)])
            >>> pruned = optx.Delta.between(base, tuned).wanda(0.5, stats)
            >>> (pruned["weight"] != 0).sum(dim=1)  # int(3 * 0.5) go in each row
            tensor([2, 2])

        Raises:
            OptxError: p out of range, statistics of another model, or nothing is left to prune.
            ShapeError: statistics of other sizes; names the tensor.

        Source: arXiv 2306.11695, section 3, on differences: arXiv 2410.09344, section 5.
        """
        check_p("Delta.wanda", p)
        prune.check_stats(self.entries, stats, "Delta.wanda")
        prints = tuple((name, one.tokens, AllOf({"norm": one.norm})) for name, one in stats.items())

        def change(name: str, tensor: Tensor) -> Tensor:
            return prune.wanda(tensor, p, stats[name]) if name in stats else prune.magnitude(tensor, p)

        return self._pruned("wanda", (p, prints), include, exclude, change)

    def structural(
        self,
        p: float,
        q: float | None = None,
        *,
        seed: int = 0,
        model: nn.Module | None = None,
        include: str | None = None,
        exclude: str | None = HEADS,
    ) -> Self:
        """Keep round((1-p) d_in) random columns of each matrix, the same for all its rows, divided by q.

        How many columns the paper keeps could not be checked: this follows its idea. `save` stores the
        columns that are left. Tensors of one dimension keep their whole change.

        Args:
            p: share DROPPED, in [0, 1); one column at least is kept.
            q: None divides by the share that is kept in truth; up to 1.
            seed: of the choice of columns.
            model: a model with these weights, where some are of transformers' ``Conv1D`` (GPT-2): their
                inputs run along the rows, so that rows are kept. None: of `torch.nn.Linear` all.
            include: regex of the names to prune; the others keep their whole change.
            exclude: regex of names not to prune.

        Paper values:
            The paper says that DAREx-q serves here too (abstract); how many columns it keeps could not be
            checked.

        Limits: Much coarser than `dare` at the same p: whole inputs go.

        Keywords: pruning, sparse, structured, columns.

        Evidence: ``test_prune.py``; no recipe.

        Example:
            >>> import torch, optx
            >>> delta = optx.Delta.between({"w": torch.zeros(2, 4)}, {"w": torch.ones(2, 4)})
            >>> delta.structural(0.5)["w"].sum(dim=1)  # 2 columns of 4, each doubled
            tensor([4., 4.])

        Raises:
            OptxError: p or q out of range, nothing is left to prune, or ``model`` has none of the tensors.

        Source: arXiv 2410.09344, appendix (structural DPP).
        """
        check_p("Delta.structural", p, q)
        axes = linear_axes(model) if model is not None else {}
        if model is not None and not axes.keys() & self.entries.keys():
            raise OptxError("Delta.structural: model has no linear layer that the delta has a change of.")
        rows = tuple(sorted(name for name, axis in axes.items() if axis == 0))

        def change(name: str, tensor: Tensor) -> Tensor:
            return prune.structural(name, tensor, p, q, seed, axis=axes.get(name, 1))

        return self._pruned("structural", (p, q, seed, rows), include, exclude, change)

    def find_q(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        p: float,
        strategy: Literal["output", "val", "analytic", "learned", "mse"] = "output",
        *,
        score: Callable[[nn.Module], float] | None = None,
        distance: Callable[[Any, Any], float] | None = None,
        step: float | None = None,
        eta: float = 0.5,
        seeds: Sequence[int] = (0, 1, 2, 3),
        include: str | None = None,
        exclude: str | None = HEADS,
    ) -> float | dict[str, float]:
        """What `dare` should divide by for this model (DAREx-q).

        ``"output"`` (1/q_e) tries values on the model and keeps the one whose outputs are nearest to the
        full model's; no labels. ``"val"`` (1/q_v) keeps the one with the best score. Both give one q for
        all, a mean over ``seeds`` masks ("output" leaves out the mask farthest from the mean), and need the
        whole change in memory beside the model. ``"learned"`` gives each layer one of its own, by at most 200
        steps of AdamW on the distance of ``"output"`` over all batches and masks; it needs the memory of
        that, of the masked change and of gradients through the model. ``"analytic"`` takes each layer's
        from its inputs and the paper's bound; ``"mse"``, an extra of optx, the q with the least expected
        squared error.

        Args:
            model: the fine-tuned model; it is put back bit for bit.
            batches: some inputs, such as 50 sequences of 128 tokens; see `optx.analysis.input_stats`.
                ``"val"`` needs none.
            p: share DROPPED, in [0, 1).
            strategy: see above.
            score: for ``"val"``: validation score of a model, higher is better.
            distance: for ``"output"`` and ``"learned"`` (there a tensor with a gradient): of the full output
                and the pruned one. Default: mean squared difference at the full model's five largest logits
                for language models, else mean absolute difference of last hidden states, or of logits if
                the output has none (a classifier's has, where batches say ``output_hidden_states=True``).
            step: of the search from 1 - p to 1, followed by one in tenths of it. None: (1 - p) / 2, and the
                search ends at 16 (1 - p), where next to nothing of the change is left.
            eta: of ``"analytic"``.
            seeds: of the masks.
            include: regex of the names that will be pruned.
            exclude: regex of names that won't.

        Returns:
            q for `dare`: a number, or numbers by name of the weight.

        Paper values:
            ``strategy="output", seeds=(0, 1, 2, 3)``: encoders, 50 sequences of 128 tokens (the defaults).
            ``strategy="output", step=0.05``: 7B decoders at p of 0.95, on 100 sequences of 256 tokens
                (authors' code).
            ``strategy="analytic", eta=0.37``: BERT on CoLA at p of 0.99; SST-2 1.01, MRPC 0.27, STS-B 0.36
                (authors' code).

        Limits: ``"output"`` and ``"val"`` run the model for each value and mask. At moderate p the best q is
        1 - p: the search pays at extreme ones.

        Keywords: DAREx, DAREx-q, pruning, rescaling, sparse.

        Evidence: ``optx run merge``; ``test_prune.py``, ``test_learn_q.py``.

        Raises:
            OptxError: an argument out of range, no batches, or a model that the delta doesn't fit.

        Example:
            >>> import torch, optx
            >>> base, tuned = torch.nn.Linear(8, 4), torch.nn.Linear(8, 4)
            >>> delta, batch = optx.Delta.between(base, tuned), torch.randn(16, 8)
            >>> q = delta.find_q(tuned, [batch], p=0.9)
            >>> pruned = delta.dare(0.9, q=q)

        Source: arXiv 2410.09344, sections 3.2 and 4.
        """
        return search_q.find_q(
            self,
            model,
            batches,
            p,
            strategy,
            score=score,
            distance=distance,
            step=step,
            eta=eta,
            seeds=seeds,
            include=include,
            exclude=exclude,
        )

    def _pruned(
        self,
        method: str,
        options: tuple[Any, ...],
        include: str | None,
        exclude: str | None,
        change: Callable[[str, Tensor], Tensor],
    ) -> Self:
        names = self._to_prune(method, include, exclude)
        return self.map(
            lambda name, tensor: change(name, tensor) if name in names else tensor,
            (method, include, exclude, *options),
        )

    def _to_prune(self, method: str, include: str | None, exclude: str | None) -> set[str]:
        keep = chooser(include, exclude)
        names = {name for name in self.floating if keep(name)}
        if not names:
            raise OptxError(
                f"Delta.{method}: include={include!r} and exclude={exclude!r} leave nothing to prune."
            )
        return names
