"""Gumbel-softmax flow matching and score matching: sequences of tokens, generated on the simplex.

Source: Tang, Zhang, Tong, Chatterjee, "Gumbel-Softmax Flow Matching with Straight-Through Guidance for
Controllable Biological Sequence Generation", arXiv 2503.17361.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from optx._errors import OptxError, ShapeError, check_above_0, check_choice, check_whole
from optx.flow._batch import checked_mask, checked_shape, dropped, reduced
from optx.flow._draws import Draws, Generators
from optx.flow._network import Network, in_use
from optx.flow._path import GumbelPath, check_tokens
from optx.flow._sampler import (
    SOLVERS,
    Bar,
    Guide,
    Held,
    Sampler,
    Step,
    check_steps,
    euler,
    exponential,
    langevin,
)

FORMS = ("flow", "score")
REDUCTIONS = ("mean", "sum", "none")
PADDING = -100  # torch's cross_entropy ignores it too


@dataclass(frozen=True)
class GumbelFlow(GumbelPath):
    """Train a model to generate sequences of tokens by a flow on the simplex, and sample from it.

    A token k goes along x_t = softmax((e_k + g / beta) / tau(t)), g Gumbel noise, tau(t) = tau_max
    exp(-decay t): from near uniform at t = 0 to near a vertex at 1. The model, any ``(x, t) -> logits``, sees
    x_t of all positions and says which tokens they go to. Samples follow the mean of their velocities,
    lambda/tau(t) x (p - <p, x>), p the softmax of the logits.

    The object has no parameters, is not attached to the model, and holds no state: the loss is of
    the user's loop, and a sample is a function of model and generator. It computes in float32 (float64 for a
    model of that), also under autocast and for models of half precision, which are given x in their own
    dtype.

    Args:
        vocab: V, how many tokens there are.
        tau_max: the temperature at t = 0.
        decay: lambda; the temperature falls by exp(-lambda) on the way.
        beta: divides the noise. The noisy path ends at its own token with probability
            exp(beta) / (exp(beta) + V - 1) only; the model is what tells which token was meant.
        form: ``"flow"``: cross-entropy with the tokens, samples by the velocity. ``"score"``: the model's
            softmax p weights the scores of the tokens, f = sum_k p_k softmax(b e_k - T y) with y = ln x, and
            the loss is the squared distance of f from softmax(-g): score matching, weighted by 1 / (T V)^2.
            Samples are drawn by Langevin steps along T (V f - 1). A model of either form may be sampled by
            both.
        noise: ``"sharpened"``, the paper's path; ``"fixed"``: x_t = softmax(e_k (1/tau(t) - 1/tau(0)) + g/T),
            T = beta tau_max, whose noise stays as it was drawn. The velocity moves exactly this path.
        invalid: tokens that no sequence has, as that of padding: x is 0 there, always.

    Paper values:
        ``tau_max=10.0, decay=3.0, beta=2.0``: sections 6.2 and 6.3 (the defaults); ``decay=10.0``: the
        largest it speaks of. Steps: 100.

    Limits: With ``noise="sharpened"`` even the exact posterior does not give the data's law back: of tokens
        with probabilities 0.6, 0.3 and 0.1 the sampler makes 0.70, 0.28 and 0.02, since it begins at noise
        that has no target, where training never is. ``noise="fixed"`` gives 0.60, 0.30 and 0.10. Positions
        move together, but a step draws none of them: what has to be decided jointly takes steps. Score
        samples have the error of Langevin steps (``langevin=``).

    Keywords: flow matching, discrete diffusion, Gumbel softmax, Concrete distribution, simplex, DNA, protein,
        sequence generation, score matching, Langevin, inpainting, classifier-free guidance.

    Evidence: ``optx run flow``; ``test_gumbel_flow.py``, ``test_flow_oracle.py``.

    Raises:
        OptxError: an option out of range; tokens that are none; too few steps for Euler's.
        ShapeError: tokens, masks or the model's logits of another shape.

    Example:
        >>> import torch, optx
        >>> flow = optx.GumbelFlow(4)
        >>> round(flow.temperature(0.5), 4)
        2.2313
        >>> model = lambda x, t: 8 * torch.tensor([0.0, 0.0, 1.0, 0.0]).expand_as(x)
        >>> round(flow.loss(model, torch.tensor([[2, 2, 2]])).item(), 4)
        0.001
        >>> flow.sample(model, (2, 5), steps=20)
        tensor([[2, 2, 2, 2, 2],
                [2, 2, 2, 2, 2]])

    Source: arXiv 2503.17361, equations 8 to 13; Concrete variables, arXiv 1611.00712.
    """

    form: str = "flow"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("GumbelFlow", "form", self.form, FORMS)

    @property
    def config(self) -> dict[str, Any]:
        """The options, as plain data: ``GumbelFlow(**config)`` makes the same."""
        return asdict(self) | {"invalid": list(self.invalid)}

    def interpolate(self, tokens: Tensor, t: Tensor, generator: Generators = None) -> Tensor:
        """x_t of tokens (B, L) at times (B,): (B, L, V), float32, or float64 for times of that."""
        check_tokens("GumbelFlow", "tokens", tokens, self.vocab)
        dtype = torch.promote_types(t.dtype, torch.float32)
        draws = Draws("GumbelFlow", generator, len(tokens), dtype, tokens.device)
        return self.log_point(tokens, t.to(dtype), draws.gumbel(*tokens.shape, self.vocab)).exp()

    # ---- training ---------------------------------------------------------------------------------------

    def loss(
        self,
        model: Any,
        tokens: Tensor,
        mask: Tensor | None = None,
        condition: Tensor | None = None,
        *,
        weights: Tensor | None = None,
        drop_condition: float = 0.0,
        null: Any = None,
        generator: Generators = None,
        reduction: Literal["mean", "sum", "none"] = "mean",
    ) -> Tensor:
        """The loss of a batch at times drawn for each row.

        Args:
            model: ``(x, t) -> logits``, or ``(x, t, condition) -> logits``.
            tokens: (B, L), below V; -100 is padding.
            mask: True where there is a token, (B, L); elsewhere x is 0 and there is no loss.
            condition: what the model is told, one entry a row.
            weights: of rows (B,) or positions (B, L); the mean is divided by their sum.
            drop_condition: rows that are told ``null`` instead, by this chance: for ``guidance_scale``.
            null: the condition that stands for none, as a class of its own.
            generator: of times, noise and dropped conditions; a list has one for each row.
            reduction: ``"mean"`` over positions, ``"sum"``, or ``"none"``: (B, L).
        """
        who = "GumbelFlow.loss"
        check_choice(who, "reduction", reduction, REDUCTIONS)
        counts, tokens = self._counted(who, tokens, mask)
        net = Network(who, model, condition)
        draws = Draws(who, generator, len(tokens), net.wide, tokens.device)
        net.check_rows(len(tokens))
        net.condition = dropped(who, condition, drop_condition, null, draws)
        t, g = draws.uniform(len(tokens)), draws.gumbel(*tokens.shape, self.vocab)
        y = self.log_point(tokens, t, g)
        logits = self.forbid(net.logits(y.exp() * counts[..., None], t))
        losses = self._losses(logits, tokens, y, t, g).where(counts, 0)
        return reduced(who, losses, counts, weights, reduction)

    def _losses(self, logits: Tensor, tokens: Tensor, y: Tensor, t: Tensor, g: Tensor) -> Tensor:
        """Of every position, (B, L)."""
        if self.form == "flow":
            return -torch.log_softmax(logits, -1).gather(-1, tokens[..., None]).squeeze(-1)
        found = self.score_term(y, torch.softmax(logits, -1), t)
        target = torch.softmax(self.forbid(-g), -1)  # softmax(b e_k - T y) at the y that this noise made
        return (found - target).square().sum(-1)

    def _counted(self, who: str, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Where there are tokens, and the tokens with 0 elsewhere."""
        counts = tokens != PADDING if mask is None else checked_mask(who, "mask", mask, tokens.shape)
        counts = counts & (tokens != PADDING)
        check_tokens(who, "tokens", tokens, self.vocab, counts)
        for one in self.invalid if tokens.device.type == "cpu" else ():
            if bool((counts & (tokens == one)).any()):
                raise OptxError(f"{who}: tokens has {one}, which invalid= says that no sequence has.")
        return counts, tokens.where(counts, 0).long()

    # ---- sampling ---------------------------------------------------------------------------------------

    def sample(
        self,
        model: Any,
        shape: Sequence[int],
        steps: int = 100,
        *,
        guide: Guide | None = None,
        condition: Tensor | None = None,
        guidance_scale: float = 1.0,
        null: Any = None,
        given: Tensor | None = None,
        keep: Tensor | None = None,
        mask: Tensor | None = None,
        solver: str = "euler",
        langevin: float = 0.1,
        decode: str | None = None,
        generator: Generators = None,
        device: torch.device | str | None = None,
        return_path: bool = False,
        progress: bool | Bar = True,
    ) -> Any:
        """Token numbers of shape (B, L), int64; -100 where ``mask`` is False.

        The model is in eval mode meanwhile, each module is in its own mode afterwards, and no graph is kept.

        Args:
            model: as for ``loss``.
            shape: (B, L).
            steps: calls of the model; Euler's have to keep h lambda / tau(1) below 1.
            guide: an `optx.STGuide`, or another function of x, p and draws that gives a velocity to add.
            condition: one entry a row, as in training.
            guidance_scale: classifier-free guidance: logits are null's and so many times what the condition
                adds to them. 1 is without.
            null: the condition that stood for none in training.
            given: tokens that are known, (B, L), where ``keep`` is True; x goes along their own noisy path.
            keep: where.
            mask: where there are positions at all.
            solver: of the flow: ``"euler"``, the paper's; ``"exponential"``, exact for a posterior that stays
                as it is in a step, with which any number of steps will do.
            langevin: of the score: the size of a step, in units in which Gumbel noise is standard.
            decode: ``"argmax"`` of the last x, or ``"posterior"``: draws from the model's softmax there.
                None: the first for flow; the second for score, whose x keeps its noise.
            generator: of all draws; a list has one for each row, whose sample then is its own.
            device: None: the model's.
            return_path: also give x at all steps, (steps + 1, B, L, V), on the CPU.
            progress: True shows a bar on a terminal; or what wraps the steps, as ``tqdm.tqdm`` does.
        """
        who = "GumbelFlow.sample"
        rows, length = checked_shape(who, shape)
        check_whole(who, "steps", steps, 1)
        check_choice(who, "solver", solver, SOLVERS)
        check_choice(who, "decode", decode, (None, "argmax", "posterior"))
        check_above_0(who, "langevin", langevin)
        if self.form == "flow" and solver == "euler":
            check_steps(who, self, steps)
        self._check_own(who, solver, langevin)
        if guide is not None and (isinstance(guide, nn.Module) or not callable(guide)):
            raise OptxError(
                f"{who}: guide is a {type(guide).__name__}; it must be an optx.STGuide, as of a classifier: "
                "optx.STGuide(classifier)."
            )
        if null is not None and condition is None:
            raise OptxError(f"{who}: null= stands for a condition, and condition= is not given. Drop it.")
        net = Network(who, model, condition, null, guidance_scale)
        net.check_rows(rows)
        where = torch.device(device or net.device or "cpu")
        draws = Draws(who, generator, rows, net.wide, where)
        g = draws.gumbel(rows, length, self.vocab)
        held = self._held(who, given, keep, mask, (rows, length), where)
        if held.keep is not None:
            held.g = draws.gumbel(rows, length, self.vocab)
        run = Sampler(self, net, self._step(solver, langevin, draws), guide, held, draws)
        path: list[Tensor] = []
        title = f"{rows} samples"

        def see(y: Tensor) -> None:
            if return_path:
                path.append(y.exp().cpu())

        with in_use(model, getattr(guide, "classifier", None)):
            y = run.run(self.log_base(g), steps, see, title, progress)
            ids = self._decoded(run, y, decode or ("argmax" if self.form == "flow" else "posterior"))
        if held.mask is not None:
            ids = ids.where(held.mask, PADDING)
        return (ids, torch.stack(path)) if return_path else ids

    def _check_own(self, who: str, solver: str, size: float) -> None:
        """Raise for what the form has no use for."""
        if self.form == "score" and solver != "euler":
            raise OptxError(f"{who}: solver={solver!r} is of form='flow'; form='score' has langevin=.")
        if self.form == "flow" and size != 0.1:
            raise OptxError(f"{who}: langevin={size} is of form='score'; form='flow' has solver=.")

    def _step(self, solver: str, size: float, draws: Draws) -> Step:
        if self.form == "flow":
            return functools.partial(euler if solver == "euler" else exponential, self)
        return lambda y, p, t, end: langevin(self, y, p, t, end, size, draws.normal(*y.shape))

    def _decoded(self, run: Sampler, y: Tensor, decode: str) -> Tensor:
        ids = y.argmax(-1) if decode == "argmax" else run.decided(y)
        keep, tokens = run.held.keep, run.held.tokens
        return ids if keep is None or tokens is None else tokens.where(keep, ids)

    def _held(
        self,
        who: str,
        given: Tensor | None,
        keep: Tensor | None,
        mask: Tensor | None,
        shape: tuple[int, int],
        device: torch.device,
    ) -> Held:
        if (given is None) != (keep is None):
            raise OptxError(f"{who}: given= and keep= go together: tokens, and where they are to stay.")
        held = Held()
        if mask is not None:
            held.mask = checked_mask(who, "mask", mask, shape).to(device)
        if given is not None and keep is not None:
            held.keep = checked_mask(who, "keep", keep, shape).to(device)
            if not isinstance(given, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise OptxError(f"{who}: given is a {type(given).__name__}; it must be a tensor of tokens.")
            if given.shape != shape:
                raise ShapeError(f"{who}: given has shape {tuple(given.shape)}; it must be {shape}.")
            _, tokens = self._counted(who, given.to(device), held.keep)
            held.tokens = tokens
        return held
