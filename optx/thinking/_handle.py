"""The handle of `optx.SoftThinking`: steps, generation, rollouts, and the way into transformers' generate."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from optx._errors import FileError, OptxError, check_whole
from optx.inject._handle import Handle
from optx.inject._served import Served
from optx.inject._trained_whole import Saved
from optx.thinking import _generate
from optx.thinking._calls import Caller
from optx.thinking._embedding import Inputs, MixedEmbedding, check_tokens, mixed
from optx.thinking._prompts import Seeds, generators_of, prompts_of, stop_ids_of, thinking_of
from optx.thinking._record import Rollout, check_alike, common_policy, fingerprint
from optx.thinking._state import Sequences
from optx.thinking._trail import Trail


class Thought(NamedTuple):
    """What `ThinkingHandle.step` gives for B rows.

    Attributes:
        ids: (B, K) tokens, the heaviest first.
        weights: (B, K) float32: y. ``[1, 0, ...]`` where a row feeds one token.
        embeds: (B, 1, d): the next input, for ``inputs_embeds``.
        gprime: (B, K) float32: the perturbed log-probabilities, see `optx.Rollout`.
        kept: (B, K) float32: pi, before the noise.
        entropy: (B,) float32.
        soft: (B,) bool: whether a mixture is fed.
        mask: (B,) bool: rows that had not ended before.
        forced: (B,) bool: the cold stop decided.
        thought: (B,) bool: chosen while the row thought, as its mixtures and the token that they end with.
    """

    ids: Tensor
    weights: Tensor
    embeds: Tensor
    gprime: Tensor
    kept: Tensor
    entropy: Tensor
    soft: Tensor
    mask: Tensor
    forced: Tensor
    thought: Tensor


class ThinkingHandle(Handle):
    """What `optx.attach` returns for `optx.SoftThinking`.

    Attributes:
        last: the record of the last generation, by any way; None before the first.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.Sequential(torch.nn.Embedding(50, 8), torch.nn.Linear(8, 50))
        >>> thinking = optx.attach(model, optx.SoftThinking(tau=0.5, end_id=7))
        >>> out = thinking.generate(torch.tensor([[3, 4]]), max_new_tokens=5, seed=0)
        >>> tuple(out.sequences.shape), tuple(out.weights.shape)
        ((1, 7), (1, 5, 15))
    """

    injection: Any  # `optx.SoftThinking`, which this module does not know

    def __init__(
        self, model: nn.Module, injection: Any, served: Sequence[Served], saved: Sequence[Saved] = ()
    ) -> None:
        super().__init__(model, injection, served, saved)
        self.sequences: Sequences | None = None
        self.last: Rollout | None = None
        self._at: Rollout | None = None  # at whose end the rows stand, if that is known

    @property
    def part(self) -> MixedEmbedding:
        """What is on the embedding."""
        part = self.served[0].part
        assert isinstance(part, MixedEmbedding)
        return part

    # ---- step by step -------------------------------------------------------------------------------

    def begin(
        self,
        rows: int,
        *,
        seed: Seeds = 0,
        thinking: bool | Tensor = True,
        stop_ids: int | Sequence[int] | None = None,
    ) -> None:
        """Start new rows for `step`.

        Args:
            rows: how many, B.
            seed: of the noise. A number: row i has the i-th of a series that it begins, whatever the
                batch's size; or each row's own number, with which it draws the same in any batch and order;
                or a generator, or one for each row.
            thinking: whether rows think at first; (B,) bool: each its own.
            stop_ids: tokens that end a row. None: the model's ``eos_token_id``; ``()``: none.

        Raises:
            OptxError: an argument out of range.
        """
        rows = check_whole("begin", "rows", rows, 1)
        self.sequences = Sequences(
            generators_of(seed, rows, "begin"), thinking_of(thinking, rows, "begin"), self.stops(stop_ids)
        )
        self._at = None

    def stops(self, given: int | Sequence[int] | None) -> Sequence[int]:
        """The stop tokens that an argument ``stop_ids`` means."""
        if given is None:
            return stop_ids_of(self.model)
        found: Any = given if isinstance(given, Iterable) and getattr(given, "ndim", 1) else (given,)
        return [check_whole("SoftThinking", "stop_ids", one, 0) for one in found]

    @torch.no_grad()
    def step(self, logits: Tensor) -> Thought:
        """What each row feeds next; moves its mode, its counter and its generator on.

        Args:
            logits: (B, V), of the last place. Rows that have not begun do, as `begin` does by default.

        Raises:
            OptxError: other rows than have begun, logits of nan, or the handle is switched off or removed.
        """
        self.check_acts("step")
        if self.sequences is None:
            self.begin(len(logits))
        self._at = None
        made = self._begun().step(logits, self.injection)
        embeds = mixed(self.served[0].module, made.ids, made.weights).unsqueeze(1)
        return Thought(made.ids, made.weights, embeds, *made[2:])

    @contextmanager
    def mixed(self, ids: Tensor, weights: Tensor, soft: Tensor | None = None) -> Generator[None]:
        """While it lasts, the last places of what the model is given are mixtures of tokens.

        ``model(tokens)`` with ``tokens[:, -1] == ids[:, 0]``: the model does all else that it does with
        tokens. Where a token is not the first of its ids, it stays as it is.

        Args:
            ids: (B, K), or (B, S, K) for S places.
            weights: the same, which sum to 1.
            soft: (B,) or (B, S) bool: places that are mixtures. None: all.

        Raises:
            OptxError: shapes that don't go together, or the model was not called, or its embedding not.
        """
        self.check_acts("mixed")
        ids, weights = (one.unsqueeze(1) if one.ndim == 2 else one for one in (ids, weights))
        if ids.ndim != 3 or weights.shape != ids.shape:
            raise OptxError(
                f"mixed: ids have shape {tuple(ids.shape)}, weights {tuple(weights.shape)}; both must be "
                "(B, K) or (B, S, K)."
            )
        if soft is None:
            soft = torch.ones_like(ids[..., 0], dtype=torch.bool)
        if soft.numel() != ids[..., 0].numel() or soft.dtype != torch.bool:
            raise OptxError(
                f"mixed: soft has shape {tuple(soft.shape)} and dtype {soft.dtype}; it must be bool of shape "
                f"{tuple(ids.shape[:2])}."
            )
        soft = soft.reshape(ids.shape[:2])
        check_tokens(self.served[0].module, ids, "mixed")
        wrong = ((weights.sum(-1) - 1).abs() > 0.05) | ~weights.isfinite().all(-1)  # of bfloat16 too
        if bool((wrong & soft).any()):
            row = int((wrong & soft).any(1).nonzero()[0])
            raise OptxError(f"mixed: weights of row {row} are not finite, or do not sum to 1.")
        with self.feeding(Inputs(ids, weights, soft)):
            yield

    @contextmanager
    def feeding(self, inputs: Inputs | None) -> Generator[None]:
        """While it lasts, one or more calls of the model are fed with this; nothing, if that is None."""
        if inputs is None:
            yield
            return
        with self.part.feeding(inputs):
            yield
            if not self.part.fed:
                raise OptxError(
                    f"SoftThinking: {self.served[0].path!r} was not called with tokens in the place of which "
                    f"mixtures wait, so that this {type(self.model).__name__} was not fed with them."
                )

    # ---- all of it ----------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        input_ids: Any,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int,
        seed: Seeds = 0,
        thinking: bool | Tensor = True,
        stop_ids: int | Sequence[int] | None = None,
        use_cache: bool | None = None,
        progress: bool = False,
    ) -> Rollout:
        """Think and answer, all rows at once, with a KV cache.

        The model is called as it is: ``model.eval()`` before, or its dropout acts.

        Args:
            input_ids: prompts, (B, P) padded on the left; what a tokenizer returns; or lists of ids. Or a
                `Rollout` to go on from, after `load_state_dict` of what `state_dict` gave at its end.
            attention_mask: (B, P), 0 at padding.
            max_new_tokens: steps, at most.
            seed: as `begin` has it.
            thinking: as `begin` has it.
            stop_ids: as `begin` has it.
            use_cache: None: if the model has one. False: all of a row is computed at each step.
            progress: whether a bar shows how far it is, on a terminal.

        Returns:
            The record; ``.sequences`` are the token ids, each step's heaviest.

        Raises:
            OptxError: an argument out of range, prompts padded on the right, logits of nan, or the handle is
                switched off or removed.
        """
        self.check_acts("generate")
        steps = check_whole("generate", "max_new_tokens", max_new_tokens, 1)
        if isinstance(input_ids, Rollout):
            if (
                attention_mask is not None
                or not _is_default(seed)
                or thinking is not True
                or stop_ids is not None
            ):
                raise OptxError(
                    "generate: a rollout goes on with its own attention_mask, seed, thinking and stop_ids; "
                    "leave them out."
                )
            trail = self._resumed(input_ids)
            before = input_ids.policy if input_ids.ids.shape[1] else None
            group = input_ids.group
        else:
            prompts, mask = prompts_of(self.model, input_ids, attention_mask, "generate")
            embedding = self.served[0].module
            check_tokens(embedding, prompts, "generate")
            if stop_ids is not None:
                stops = torch.tensor(self.stops(stop_ids), dtype=torch.int64)
                check_tokens(embedding, stops, "generate: stop_ids")
            trail, group, before = Trail(prompts, mask), 1, None
            self.begin(len(prompts), seed=seed, thinking=thinking, stop_ids=stop_ids)
        return self._run(trail, steps, group, use_cache, progress, before)

    def _resumed(self, start: Rollout) -> Trail:
        rows, at = self.sequences, self._at
        elsewhere = at is not None and not _same(at.sequences, start.sequences)
        if (
            rows is None
            or elsewhere
            or len(rows) != len(start)
            or not torch.equal(rows.running, ~start.finished.cpu())
        ):
            raise OptxError(
                f"generate: this handle does not stand at the end of this rollout of {len(start)} rows. Load "
                "what state_dict() gave there: handle.load_state_dict(state)."
            )
        check_alike(start.options, self.injection.in_force(), "generate")
        return Trail(start.prompts, start.prompt_mask, start)

    def _run(
        self,
        trail: Trail,
        steps: int,
        group: int,
        use_cache: bool | None,
        progress: bool,
        before: str | None,
    ) -> Rollout:
        rows = self._begun()
        places = trail.mask.new_ones(len(rows), len(trail.steps))
        caller = Caller(self.model, torch.cat([trail.mask, places], 1), use_cache)
        new = trail.tokens()
        every = True
        for _ in _shown(range(steps), progress):
            if not bool(rows.running.any()):
                break
            with self.feeding(trail.inputs(every)):
                logits = caller(new)
            trail.steps.append(rows.step(logits, self.injection))
            every = not caller.caches
            new = trail.steps[-1].ids[:, :1] if caller.caches else trail.tokens()
            caller.grow()
        return self._keep(trail, group, before)

    def rollout(
        self,
        prompts: Any,
        group: int = 1,
        *,
        max_new_tokens: int,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Rollout:
        """``group`` sequences of each prompt, one behind the other, as policy gradients take them.

        Args:
            prompts: as `generate` takes them.
            group: G; prompt i has the rows i G to i G + G - 1.
            max_new_tokens: steps, at most.
            attention_mask: (prompts, P), 0 at padding.
            options: others of `generate`; ``seed`` and ``thinking`` are of the B = prompts * group rows.

        Raises:
            OptxError: as `generate`.
        """
        G = check_whole("rollout", "group", group, 1)
        ids, mask = prompts_of(self.model, prompts, attention_mask, "rollout")
        many = [one.repeat_interleave(G, 0) for one in (ids, mask)]
        made = self.generate(many[0], many[1], max_new_tokens=max_new_tokens, **options)
        self.last = made.grouped(G)
        return self.last

    def custom_generate(self, *, seed: Seeds = 0, thinking: bool | Tensor = True) -> Callable[..., Any]:
        """For transformers' loop: ``model.generate(ids, custom_generate=handle.custom_generate(seed=0))``.

        Caches of all kinds, processors, stopping criteria and outputs are transformers'; the tokens are the
        heaviest of each step, and ``handle.last`` has the record. Settings of sampling (``do_sample``,
        ``temperature``, ``top_k``, ...) are not used: this method's options take their place. A ``streamer``
        gets nothing, as transformers does not pass it on to such functions.

        Args:
            seed: as `begin` has it.
            thinking: as `begin` has it.

        Returns:
            The function. When it is called, several beams or another model than the handle's are an
            `optx.OptxError`.
        """

        def loop(
            model: Any,
            input_ids: Tensor,
            logits_processor: Any = None,
            stopping_criteria: Any = None,
            generation_config: Any = None,
            **kwargs: Any,
        ) -> Any:
            self.check_acts("custom_generate")
            _generate.check_served(self.model, model, generation_config)
            stops: Any = getattr(generation_config, "eos_token_id", None)
            own = () if stops is None else stops
            self.begin(len(input_ids), seed=seed, thinking=thinking, stop_ids=own)
            given = (logits_processor, stopping_criteria, generation_config, kwargs)
            made, trail = _generate.through_transformers(
                self.part, self._begun(), self.injection, model, input_ids, *given
            )
            self._keep(trail)
            return made

        return loop

    def _begun(self) -> Sequences:
        assert self.sequences is not None
        return self.sequences

    def _keep(self, trail: Trail, group: int = 1, before: str | None = None) -> Rollout:
        policy = fingerprint(self.model) if self.injection.record else ""
        policy = policy if before is None else common_policy(before, policy)
        self.last = self._at = trail.record(self._begun().running, group, policy, self.injection.in_force())
        return self.last

    # ---- state --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """RNG and flags of the rows that have begun; nothing before that, for nothing is trained."""
        prefix = f"{self.served[0].path}.{self.served[0].name}."
        own = {} if self.sequences is None else self.sequences.state_dict()
        return {f"{prefix}{name}": tensor for name, tensor in own.items()}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Go on with the rows of what `state_dict` gave.

        Raises:
            FileError: an entry is missing, unknown or of another form; nothing is changed.
        """
        prefix = f"{self.served[0].path}.{self.served[0].name}."
        for key in state_dict:
            if not key.startswith(prefix):
                raise FileError(f"load_state_dict: {key!r} is no entry of {prefix.removesuffix('.')!r}.")
        own = {key.removeprefix(prefix): tensor for key, tensor in state_dict.items()}
        self.sequences = Sequences.from_state_dict(own) if own else None
        self._at = None

    def check_acts(self, doing: str) -> None:
        """Raise if it has been removed or switched off."""
        self._check_alive(doing)
        if not self.part.active:
            raise OptxError(f"{doing}: this handle is switched off. Call enable().")


def _is_default(seed: Any) -> bool:
    return isinstance(seed, int) and seed == 0


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other.to(one.device))


def _shown(steps: range, progress: bool) -> Iterable[int]:
    if not progress:
        return steps
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(steps, "thinking", console=console, transient=True, disable=not sys.stderr.isatty())
