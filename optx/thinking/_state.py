"""What soft thinking knows of each row while it is generated, and one step of all rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from optx._errors import FileError, OptxError
from optx.thinking import _mix
from optx.thinking._mix import Limits, Mixture, Noise


class Options(Noise, Protocol):
    """What a step asks of `optx.SoftThinking`."""

    end_id: int | None
    cold_stop: int | None
    cold_entropy: float
    nats: bool

    @property
    def limits(self) -> Limits:
        """While a row thinks."""
        ...

    @property
    def after_limits(self) -> Limits:
        """After it."""
        ...

    def width(self, vocabulary: int) -> int:
        """K."""
        ...


class Step(NamedTuple):
    """One step of B rows. Rows that have ended get padding: ``[0, ...]`` with the weights ``[1, 0, ...]``.

    Attributes:
        ids: (B, K), the heaviest token first.
        weights: (B, K) float32.
        gprime: (B, K) float32.
        kept: (B, K) float32.
        entropy: (B,) float32.
        soft: (B,) bool: a mixture is fed; else the first token.
        mask: (B,) bool: rows that had not ended before.
        forced: (B,) bool: the cold stop decided.
        thought: (B,) bool: chosen while the row thought, as its mixtures and the token that they end with.
    """

    ids: Tensor
    weights: Tensor
    gprime: Tensor
    kept: Tensor
    entropy: Tensor
    soft: Tensor
    mask: Tensor
    forced: Tensor
    thought: Tensor


class Sequences:
    """Mode, low-entropy counter and generator of each row. All of it lies on the CPU.

    Attributes:
        generators: one for each row.
        thinking: (B,) bool.
        low: (B,) int64: steps in a row whose entropy was low.
        running: (B,) bool: rows that have not come to a stop token.
        stop_ids: the stop tokens.
    """

    def __init__(
        self, generators: Sequence[torch.Generator], thinking: Tensor, stop_ids: Sequence[int] = ()
    ) -> None:
        self.generators = list(generators)
        self.thinking = thinking.detach().cpu().bool().clone()
        self.low = torch.zeros(len(self), dtype=torch.int64)
        self.running = torch.ones(len(self), dtype=torch.bool)
        self.stop_ids = tuple(int(one) for one in stop_ids)

    def __len__(self) -> int:
        return len(self.generators)

    # ---- a step -------------------------------------------------------------------------------------

    def step(self, logits: Tensor, options: Options) -> Step:
        """What each row does after these logits, (B, V) (the paper's steps 1 to 10).

        Raises:
            OptxError: other rows than it has begun with, or logits that are no numbers.
        """
        if logits.ndim != 2 or len(logits) != len(self):
            raise OptxError(
                f"SoftThinking: logits have shape {tuple(logits.shape)}, and {len(self)} rows have begun; "
                f"they must be ({len(self)}, V), those of the last place. begin() starts other rows."
            )
        z = logits.detach().float()
        V = z.shape[1]
        H = _mix.entropy_of(z / options.limits.temperature) / (1 if options.nats else math.log(V))
        entropies = H.cpu()
        self._check_numbers(entropies)
        made = _blank(len(self), options.width(V), z.device)
        thinks, speaks = self.running & self.thinking, self.running & ~self.thinking
        _fill(made, thinks, z, lambda rows: self._think(rows, thinks, options))
        _fill(made, speaks, z, lambda rows: self._speak(rows, speaks, options, made.ids.shape[1]))
        mask, forced = self.running.clone(), self._cold(entropies, thinks, options)
        tokens = made.ids[:, 0].cpu()
        if options.end_id is not None:
            tokens = tokens.where(~forced, torch.full_like(tokens, options.end_id))
        stops = torch.tensor([*self.stop_ids], dtype=torch.int64)
        ends = thinks & (tokens == options.end_id) if options.end_id is not None else torch.zeros_like(thinks)
        last = self.running & torch.isin(tokens, stops)
        soft = thinks & ~ends & ~last
        _make_one_hot(made, tokens, thinks & ~soft, forced)
        self.thinking = self.thinking & ~ends  # not in place: they may be tensors of inference mode
        self.running = self.running & ~last
        where = z.device
        return Step(*made, H, *(flags.to(where) for flags in (soft, mask, forced, thinks)))

    def _think(self, z: Tensor, rows: Tensor, options: Options) -> Mixture:
        ids, p = _mix.candidates(z, options.limits)
        return _mix.thought(p, ids, options.width(z.shape[1]), options, self._generators(rows))

    def _speak(self, z: Tensor, rows: Tensor, options: Options, K: int) -> Mixture:
        ids, p = _mix.candidates(z, options.after_limits)
        place = _mix.sampled(p, self._generators(rows)).unsqueeze(-1)
        made = _blank(len(z), K, z.device)
        made.ids[:, :1], made.kept[:, :1] = ids.gather(-1, place), p.gather(-1, place)
        return made

    def _generators(self, rows: Tensor) -> list[torch.Generator]:
        return [one for one, wanted in zip(self.generators, rows, strict=True) if wanted]

    def _cold(self, H: Tensor, thinks: Tensor, options: Options) -> Tensor:
        """The rows whose entropy has been low for long enough; counts (step 9)."""
        if options.cold_stop is None:
            return torch.zeros_like(thinks)
        low = (self.low + 1).where(options.cold_entropy > H, torch.zeros_like(self.low))
        self.low = low.where(thinks, self.low)
        return thinks & (self.low >= options.cold_stop)

    def _check_numbers(self, entropies: Tensor) -> None:
        wrong = (~entropies.isfinite() & self.running).nonzero()
        if len(wrong):
            raise OptxError(
                f"SoftThinking: the logits of row {int(wrong[0])} have nan, inf or nothing but -inf, so that "
                "no token can be drawn. Is a row of the attention mask empty, or the dtype too narrow?"
            )

    # ---- state --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """RNG and flags of each row."""
        return {
            "generators": torch.stack([one.get_state() for one in self.generators]),
            "thinking": self.thinking.clone(),
            "low": self.low.clone(),
            "running": self.running.clone(),
            "stop_ids": torch.tensor(self.stop_ids, dtype=torch.int64),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> Sequences:
        """What `state_dict` gave.

        Raises:
            FileError: an entry is missing, unknown or of another form.
        """
        wanted = {"generators", "thinking", "low", "running", "stop_ids"}
        for key in wanted.symmetric_difference(state):
            raise FileError(
                f"SoftThinking: {key!r} is {'missing' if key in wanted else 'unknown'} in the state."
            )
        B = len(state["thinking"])
        size = torch.Generator().get_state().shape
        if any(state[key].shape != (B,) for key in ("thinking", "low", "running")) or (
            state["generators"].shape != (B, *size)
        ):
            raise FileError(f"SoftThinking: the state's entries are not those of {B} rows.")
        kinds = {"generators": torch.uint8, "low": torch.int64, "stop_ids": torch.int64}
        for key in wanted:
            if state[key].dtype != (kind := kinds.get(key, torch.bool)):
                raise FileError(
                    f"SoftThinking: {key!r} of the state has dtype {state[key].dtype}; it must be {kind}."
                )
        generators = [torch.Generator() for _ in range(B)]
        for generator, saved in zip(generators, state["generators"].cpu(), strict=True):
            try:
                generator.set_state(saved.contiguous().clone())
            except RuntimeError as error:
                raise FileError(f"SoftThinking: 'generators' of the state is damaged ({error}).") from None
        found = cls(generators, state["thinking"], [int(one) for one in state["stop_ids"]])
        found.low, found.running = state["low"].cpu().clone(), state["running"].cpu().clone()
        return found


def _blank(B: int, K: int, device: torch.device) -> Mixture:
    """Of rows that have ended."""
    weights = torch.zeros(B, K, device=device)
    weights[:, 0] = 1
    ids, kept = torch.zeros(B, K, dtype=torch.int64, device=device), torch.zeros(B, K, device=device)
    return Mixture(ids, weights, weights.log(), kept)


def _fill(made: Mixture, rows: Tensor, z: Tensor, make: Callable[[Tensor], Mixture]) -> None:
    """Write what is made of some rows' logits to their places."""
    if not bool(rows.any()):
        return
    where = rows.to(z.device)
    for whole, part in zip(made, make(z if bool(rows.all()) else z[where]), strict=True):
        whole[where] = part


def _make_one_hot(made: Mixture, tokens: Tensor, rows: Tensor, forced: Tensor) -> None:
    """Feed the end of thinking, or a stop token, as itself.

    Its first entry of ``kept`` is what the model gave it; an argmax of perturbed log-probabilities is drawn
    with just that probability (Gumbel-max), so that the step is a discrete action as any other. What was
    forced was not drawn.
    """
    if not bool(rows.any()):
        return
    where = rows.to(made.ids.device)
    kept = made.kept[:, :1].where(~forced.to(where.device).unsqueeze(-1), torch.zeros_like(made.kept[:, :1]))
    B, K = made.ids.shape
    blank = _blank(B, K, made.ids.device)
    blank.ids[:, 0], blank.kept[:, :1] = tokens.to(where.device), kept
    for whole, part in zip(made, blank, strict=True):
        whole[where] = part[where]
