"""What a transform does in a step, as rules, moment by moment."""

from __future__ import annotations

from dataclasses import dataclass

from optx._rules import Rule


@dataclass(frozen=True)
class Moments:
    """What a transform does in a step, as rules. Each is optional.

    The names of a rule's arguments bind it. What a name means depends on the moment, never on the path
    (fused or not) that a step takes:

    ============ =================== ================== ==================== ================== ==============
    name         sums                scalars, finish    gradient             weight             after, observe
    ============ =================== ================== ==================== ================== ==============
    ``w``        when the step began --                 when the step began  as it stands       as it stands
    ``w0``       when the step began --                 when the step began  when the step      when the step
                                                                             began              began
    ``g``        as it stands        --                 as it stands, before what the base is   what the base
                                                        and after this rule  given              was given
    own slot     before the step     --                 as it stands         as it stands       as it stands
    base's state before the step     --                 before the step      before the step    after the step
    own cell     before the step     as it stands       as scalars left it   as scalars left it as scalars
                                                                                                left it
    ``grad_sq``  --                  sum of ``g * g``   the same number      the same number    the same
                                     as sums see ``g``
    a sum        --                  of this step       of this step         of this step       of this step
    a scalar     --                  once computed      of this step         of this step       of this step
    ``total_x``  --                  finish only        of this step         of this step       of this step
    a number     of the group        of the group       of the group         of the group       of the group
    may write    new names           new names, cells;  ``g``, own slots     ``w``, own slots   after: as
                                     scalars: grad_sq                                           weight;
                                                                                                observe: cells
    ============ =================== ================== ==================== ================== ==============

    ``after_sums`` see what ``after`` sees, and write new names. What they and everything before computed is
    there for ``after_scalars`` and ``after_finish``, which are to them what ``scalars`` and ``finish`` are to
    ``sums``; none of the three writes again what those wrote, as rules before the base's update read it.

    *As it stands*: as the rules before this one, in the order of the moments and of the transforms, left it;
    ``w`` in ``after`` is what the base made of it. ``g`` never shows what a base's own update does to its
    gradient (momentum, coupled weight decay, ``maximize``). In ``observe``, ``w`` and all state are as they
    were stored, rounded to their dtypes (a ``"kahan"`` weight with its compensation): what the next step
    will read. Before, what a rule wrote in this step is not rounded yet, but see `Slot`; only what a base
    without a fused form wrote is.

    A *slot* is a `like_weight` of the transform, a *cell* a `per_tensor`. What ``scalars`` and ``finish``
    write into a cell, and what ``observe`` sums for it, is kept once the step is done: a step that is skipped
    keeps nothing. Where ``scalars`` did not write it, a rule reads the cell as it was before the step, in
    ``observe`` too. Numbers of the group are the transform's options, and what is in the base's param group:
    ``lr``, ``weight_decay``, ``eps``, ``beta1``, ``beta2``; everywhere ``numel``, ``ndim``, ``rows`` and
    ``columns`` (the weight's), and ``step`` (1 in the
    first step) where the base counts. The base's state goes by its names (``exp_avg_sq``) and is zero before
    a parameter's first step. A number in a rule per element is rounded to float32 (float64 where the weight
    is), in ``scalars`` and ``finish`` all is float64. A name of the transform hides one of the base.

    Whatever is not in the table is refused by `optx.wrap`, with the names of transform, rule and argument.

    Args:
        sums: per element; what it returns is summed over the tensor (in float64).
        row_sums: as ``sums``, but summed over each row of the weight (`per_row` says what that is): in later
            rules per element it is the number of the element's row.
        column_sums: the same over columns.
        scalars: per tensor, from sums, options and cells. If it returns ``grad_sq``, it promises that this
            will be the sum of squares after its ``gradient`` rule, and saves later ones a pass.
        rows: per row, after ``scalars``: from sums over rows, `per_row` slots and numbers of the tensor;
            writes such slots and new names, which rules per element read as numbers of the element's row.
        columns: the same per column, after ``rows``.
        totals: names of sums and scalars to be added over the whole optimizer; ``finish`` and the rules
            after it read them as ``total_<name>``. ``numel`` may be among them.
        finish: per tensor, after the totals.
        gradient: per element, writes ``g`` (and own slots). All gradient rules run, in order, before
            any weight is touched.
        weight: per element, writes ``w`` (and own slots) before the base update.
        after_sums: as ``sums``, of what the base update and the ``after`` rules before this one make of the
            weight. It takes a pass that reads what the update reads.
        after_scalars: as ``scalars``, from these sums too, and from all that was computed before.
        after_totals: names of ``after_sums`` and ``after_scalars`` to be added over the whole optimizer.
        after_finish: per tensor, after these totals.
        after: per element, writes ``w`` (and own slots) after the base update.
        observe: per element, after everything; what it returns is summed into cells of that name.
        meter: per element, as ``observe``, but it reads no ``g`` and writes new names; summed once
            `Wrapped.metrics` are asked for, and kept nowhere: `Transform.metrics` finds it in
            ``optimizer.measured``.

    Example:
        A cautious update (Liang et al. 2024, arXiv 2411.16085, algorithm 1): what goes against the gradient
        is left out, and the rest makes up for it.

        >>> import torch, optx
        >>> @optx.rule(writes="agreeing")
        ... def agree(w, w0, g):
        ...     return optx.ops.where((w0 - w) * g > 0.0, 1.0, 0.0)
        >>> @optx.rule(writes="rescale")
        ... def make_up(agreeing, numel):
        ...     return numel / (agreeing + 1.0)
        >>> @optx.rule(writes="w")
        ... def only_agreeing(w, w0, g, rescale):
        ...     return optx.ops.where((w0 - w) * g > 0.0, w0 + rescale * (w - w0), w0)
        >>> class Cautious(optx.Transform):
        ...     name = "cautious"
        ...     rules = dict(after_sums=agree, after_scalars=make_up, after=only_agreeing)
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        >>> opt = optx.wrap(torch.optim.SGD([w], lr=1.0, momentum=0.5), Cautious())
        >>> for g in ([4.0, 4.0, 4.0], [4.0, -1.0, -1.0]):
        ...     w.grad = torch.tensor(g)
        ...     opt.step()
        ...     print(w.detach())
        tensor([-2., -1.,  0.])
        tensor([-11.,  -1.,   0.])
    """

    sums: Rule | None = None
    row_sums: Rule | None = None
    column_sums: Rule | None = None
    scalars: Rule | None = None
    rows: Rule | None = None
    columns: Rule | None = None
    totals: tuple[str, ...] = ()
    finish: Rule | None = None
    gradient: Rule | None = None
    weight: Rule | None = None
    after_sums: Rule | None = None
    after_scalars: Rule | None = None
    after_totals: tuple[str, ...] = ()
    after_finish: Rule | None = None
    after: Rule | None = None
    observe: Rule | None = None
    meter: Rule | None = None
