"""What was generated with mixtures of tokens: enough to replay it, and for a policy gradient."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optx._errors import FileError, OptxError, shown
from optx._files import written_aside
from optx._names import is_dtensor
from optx.thinking._embedding import embedding_of, mixed

_TENSORS: dict[str, torch.dtype] = {
    **{"prompts": torch.int64, "prompt_mask": torch.bool, "ids": torch.int64, "gprime": torch.float32},
    **{"weights": torch.float32, "kept": torch.float32, "entropy": torch.float32},
    **{"soft": torch.bool, "mask": torch.bool, "forced": torch.bool, "finished": torch.bool},
    "thought": torch.bool,
}
_META = "optx.rollout"


@dataclass(frozen=True, eq=False)
class Rollout:
    """Sequences that a model has generated with `optx.SoftThinking`: B rows, T steps, K tokens a step.

    A step is an action: what the logits at its place chose, and the input of the place after it. The logits
    that score step t are those at place P - 1 + t of ``sequences``. All tensors are on one device.

    Attributes:
        prompts: (B, P) int64, padded on the left.
        prompt_mask: (B, P) bool, False at padding.
        ids: (B, T, K) int64: the tokens of each step, the heaviest first. A step of one token has ``[t, 0,
            ..., 0]``, and padding zeros.
        gprime: (B, T, K) float32: the perturbed log-probabilities g' = l + kappa eps of those tokens, in
            their order, of which the weights are softmax(g' / tau). Without Gumbel noise: the logs of the
            weights. Steps of one token, and padding: ``[0, -inf, ..., -inf]``.
        weights: (B, T, K) float32: y, which sum to 1. Steps of one token, and padding: ``[1, 0, ..., 0]``.
        kept: (B, T, K) float32: pi, what the model gave those tokens, renormalised over the K, before the
            noise. Steps of one token: what it gave that one token, in slot 0; padding: zeros.
        entropy: (B, T) float32: of the whole unfiltered distribution, as the cold stop reads it (nats, or
            as a share of ln V).
        soft: (B, T) bool: steps whose input is a mixture.
        mask: (B, T) bool: steps that took place. Those that are not are padding, after a row's end.
        forced: (B, T) bool: steps that no draw decided, where the cold stop set the end of thinking.
        thought: (B, T) bool: steps that were chosen while the row thought: its mixtures, and the token that
            ended its thinking or the row.
        finished: (B,) bool: rows that came to a stop token; the others, to ``max_new_tokens``.
        group: rows in a row that share a prompt, G.
        policy: a fingerprint of the weights that generated it, its adapters too. Empty: not taken.
        options: the options of `optx.SoftThinking` in force, plain numbers by name: ``tau``,
            ``temperature``, ``noise``, ``noise_factor``, ``noise_clamp``, ``floor`` and so on.

    ``rollout.soft``, ``rollout.discrete`` and ``~rollout.mask`` say of each step which of the three it is;
    what a policy gradient counts is ``rollout.actions``.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.Sequential(torch.nn.Embedding(50, 8), torch.nn.Linear(8, 50))
        >>> thinking = optx.attach(model, optx.SoftThinking(top_k=5, max_topk=5))
        >>> rollout = thinking.rollout(torch.tensor([[3, 4]]), group=2, max_new_tokens=6)
        >>> tuple(rollout.ids.shape), tuple(rollout.inputs(model).shape)
        ((2, 6, 5), (2, 8, 8))
    """

    prompts: Tensor
    prompt_mask: Tensor
    ids: Tensor
    gprime: Tensor
    weights: Tensor
    kept: Tensor
    entropy: Tensor
    soft: Tensor
    mask: Tensor
    forced: Tensor
    thought: Tensor
    finished: Tensor
    group: int = 1
    policy: str = ""
    options: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        B, T, K = self.ids.shape if self.ids.ndim == 3 else (-1, -1, -1)
        P = self.prompts.shape[-1]
        shapes = {
            **{"prompts": (B, P), "prompt_mask": (B, P), "ids": (B, T, K), "gprime": (B, T, K)},
            **{"weights": (B, T, K), "kept": (B, T, K), "entropy": (B, T), "soft": (B, T), "mask": (B, T)},
            **{"forced": (B, T), "thought": (B, T), "finished": (B,)},
        }
        for name, shape in shapes.items():
            found = getattr(self, name)
            if tuple(found.shape) != shape or found.dtype != _TENSORS[name]:
                raise OptxError(
                    f"Rollout: {name} has shape {tuple(found.shape)} and dtype {found.dtype}; it must be "
                    f"{shape} and {_TENSORS[name]}, as ids are of shape {tuple(self.ids.shape)}."
                )
            if found.is_inference():  # a loss may keep it for its gradient, which autograd refuses of those
                with torch.inference_mode(False):
                    object.__setattr__(self, name, found.clone())
        if self.group < 1 or B % self.group:
            raise OptxError(f"Rollout: group is {self.group}; it must divide the {B} rows.")

    # ---- what it says -------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def discrete(self) -> Tensor:
        """(B, T) bool: steps that took place and whose input is one token."""
        return self.mask & ~self.soft

    @property
    def actions(self) -> Tensor:
        """(B, T) bool: steps that a draw decided, which are those that a policy gradient counts."""
        return self.mask & ~self.forced

    @property
    def tokens(self) -> Tensor:
        """(B, T) int64: the heaviest token of each step; 0 at padding."""
        return self.ids[..., 0]

    @property
    def sequences(self) -> Tensor:
        """(B, P + T) int64: the prompts, and the heaviest token of each step."""
        return torch.cat([self.prompts, self.tokens], 1)

    @property
    def attention_mask(self) -> Tensor:
        """(B, P + T) int64: 1 where there is something, for the model's call."""
        return torch.cat([self.prompt_mask, self.mask], 1).long()

    @property
    def position_ids(self) -> Tensor:
        """(B, P + T) int64: each place's number in its row, padding not counted."""
        return (self.attention_mask.cumsum(1) - 1).clamp_min(0)

    def inputs(self, source: nn.Module) -> Tensor:
        """The input embeddings of every place, (B, P + T, d), detached: what was fed, of the model as it is.

        ``model(inputs_embeds=rollout.inputs(model), attention_mask=rollout.attention_mask,
        position_ids=rollout.position_ids)`` is the training forward; what a model does to its embeddings
        after the look-up (Gemma's scale, GPT-2's positions) it does to these too.

        Args:
            source: the model, or its input embedding. It is called, so that adapters on it act.
        """
        embedding = embedding_of(source, "Rollout.inputs")[1]
        with torch.no_grad():
            return torch.cat([embedding(self.prompts), mixed(embedding, self.ids, self.weights)], 1)

    # ---- other forms --------------------------------------------------------------------------------

    def _with(self, change: Any, **others: Any) -> Rollout:
        return replace(self, **{name: change(getattr(self, name)) for name in _TENSORS}, **others)

    def to(self, device: torch.device | str) -> Rollout:
        """The same on another device."""
        return self._with(lambda tensor: tensor.to(device))

    def rows(self, index: Tensor | Sequence[int] | slice) -> Rollout:
        """Some of the rows, for a smaller batch; ``group`` stays if whole groups are taken in order.

        Args:
            index: numbers of rows, a mask of rows, or a slice.
        """
        where = index if isinstance(index, slice) else places_of(index, len(self), self.ids.device)
        chosen = torch.arange(len(self), device=self.ids.device)[where]
        G = self.group
        whole = len(chosen) % G == 0 and bool(
            (chosen.view(-1, G) == chosen.view(-1, G)[:, :1] + torch.arange(G, device=chosen.device)).all()
            and (chosen.view(-1, G)[:, 0] % G == 0).all()
        )
        return self._with(lambda tensor: tensor[chosen], group=G if whole else 1)

    def grouped(self, group: int) -> Rollout:
        """The same, said to be ``group`` rows of each prompt, one behind the other."""
        return replace(self, group=group)

    def followed_by(self, more: Rollout) -> Rollout:
        """These steps, and the further ones of the same rows.

        Args:
            more: the same prompts, and steps from where this ends.
        """
        if not torch.equal(self.prompts, more.prompts) or self.ids.shape[2] != more.ids.shape[2]:
            raise OptxError(
                "Rollout.followed_by: these are other prompts, or other numbers of tokens a step."
            )
        of_steps = [n for n in _TENSORS if n not in ("prompts", "prompt_mask", "finished")]
        joined = {name: torch.cat([getattr(self, name), getattr(more, name)], 1) for name in of_steps}
        check_alike(self.options, more.options, "Rollout.followed_by")
        policy = common_policy(self.policy, more.policy)
        return replace(self, **joined, finished=more.finished, policy=policy)

    # ---- files --------------------------------------------------------------------------------------

    def _meta(self) -> str:
        return json.dumps({"group": self.group, "policy": self.policy, "options": self.options})

    def state_dict(self) -> dict[str, Tensor]:
        """All of it as tensors; what is no tensor is JSON in one of bytes, ``optx.rollout``."""
        found: dict[str, Tensor] = {name: getattr(self, name) for name in _TENSORS}
        return found | {_META: torch.frombuffer(bytearray(self._meta().encode()), dtype=torch.uint8)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> Rollout:
        """What `state_dict` gave.

        Raises:
            FileError: an entry is missing or unknown.
            OptxError: an entry has another shape or type than the others say.
        """
        wanted = {*_TENSORS, _META}
        for key in wanted.symmetric_difference(state):
            raise FileError(f"Rollout: {key!r} is {'missing' if key in wanted else 'no entry of a rollout'}.")
        try:
            meta = json.loads(bytes(state[_META].cpu().tolist()))
            meta["options"] = _tuples(meta["options"])
            return cls(**{name: state[name] for name in _TENSORS}, **meta)
        except (UnicodeDecodeError, json.JSONDecodeError, TypeError, KeyError) as error:
            raise FileError(f"Rollout: {_META!r} is not what a rollout writes ({error}).") from None

    def save(self, path: str | PathLike[str]) -> None:
        """Write a safetensors file."""
        from safetensors.torch import save_file

        tensors = {name: tensor.cpu().contiguous().clone() for name, tensor in self.state_dict().items()}
        with written_aside(path) as aside:
            save_file(tensors, aside, metadata={"format": "pt"})

    @classmethod
    def load(cls, path: str | PathLike[str], device: torch.device | str = "cpu") -> Rollout:
        """Read what `save` wrote.

        Raises:
            FileError: it is no such file.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if not Path(path).is_file():
            raise FileError(f"Rollout.load: there is no file {str(path)!r}.")
        try:
            state = load_file(path, device=str(device))
        except SafetensorError as error:
            raise FileError(
                f"Rollout.load: {str(path)!r} is damaged or no safetensors file ({error})."
            ) from None
        return cls.from_state_dict(state)

    def __repr__(self) -> str:
        B, T, K = self.ids.shape
        counts = f"{int(self.soft.sum())} soft and {int(self.discrete.sum())} discrete steps"
        return f"<Rollout of {B} rows, {T} steps of {K} tokens: {counts}>"


def _tuples(options: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if options is None:
        return None
    return {name: tuple(v) if isinstance(v, list) else v for name, v in options.items()}


def places_of(index: Any, rows: int, device: torch.device) -> Tensor:
    """The numbers of rows that numbers, a number or a mask mean, (n,) int64.

    Raises:
        OptxError: a row that there is not, or a mask of other rows.
    """
    found = torch.as_tensor(index, device=device)
    found = found.long() if not found.numel() else found
    if found.dtype == torch.bool and found.shape == (rows,):
        return found.nonzero().squeeze(1)
    if found.dtype == torch.bool or found.is_floating_point() or found.ndim > 1:
        raise OptxError(
            f"rows: index has shape {tuple(found.shape)} and dtype {found.dtype}; it must be numbers of the "
            f"{rows} rows, or a mask ({rows},)."
        )
    found = found.reshape(-1)
    if bool(((found < -rows) | (found >= rows)).any()):
        raise OptxError(f"rows: index is {shown(index)}, and there are {rows} rows.")
    return found


def common_policy(one: str, other: str) -> str:
    """The fingerprint of steps of two policies: it is no model's if they differ, empty if one is unknown."""
    return one if one == other else "several" if one and other else ""


def check_alike(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None, doing: str) -> None:
    """Raise if steps of one record were made with other options than those of another."""
    for name in (one or {}).keys() & (other or {}).keys():
        a, b = (one or {})[name], (other or {})[name]
        if a != b:
            raise OptxError(
                f"{doing}: {name} is {b!r}, and the earlier steps were made with {a!r}; a record has one."
            )


def fingerprint(model: nn.Module) -> str:
    """A short text that another one of weights (adapters' too) would hardly have, of what a model has now.

    The bits of each row are combined by exclusive or: one read of the weights, a small part of one step. A
    row has an odd number of entries for it, so that what changes in all of them, as a sign, does not cancel.
    """
    found = hashlib.sha256()
    for name, p in model.named_parameters():
        own: Any = p.detach()
        own = own.to_local() if is_dtensor(p) else own
        found.update(f"{name} {tuple(own.shape)} {own.dtype}\n".encode())
        if own.numel():
            own = own.reshape(1, -1) if own.ndim < 2 else own
            for some in (own[..., :1], own[..., 1 - own.shape[-1] % 2 :]):
                if some.shape[-1]:
                    bits = torch.hash_tensor(some, -1).view(torch.int64)
                    found.update(bits.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


assert {f.name for f in fields(Rollout)} >= set(_TENSORS)
