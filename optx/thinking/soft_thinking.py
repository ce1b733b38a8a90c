"""SoftThinking: a language model that thinks in mixtures of tokens, with noise that spreads them.

Source: "LLMs are Single-threaded Reasoners: Demystifying the Working Mechanism of Soft Thinking",
arXiv 2508.03440, and its repository WJMacro/Randomized-Soft-Thinking.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from optx._errors import OptxError, TargetError, check_above_0, check_choice, check_range, check_whole
from optx.inject._injection import Injection, Site
from optx.inject._part import Part
from optx.inject._served import Served
from optx.inject._trained_whole import Saved
from optx.thinking._embedding import MixedEmbedding, embedding_of
from optx.thinking._handle import ThinkingHandle
from optx.thinking._mix import Limits


@dataclass(frozen=True)
class SoftThinking(Injection):
    """Feed a mixture of the likeliest tokens, in the place of one, while a model thinks.

    A step: p = softmax(z / T), filtered by top_k, top_p, min_p; of it the K likeliest, renormalised, are pi;
    with Gumbel noise g the weights are y = softmax((ln pi + g) / tau); the next input is sum_k y_k E[t_k].
    Without noise models mostly follow the heaviest token, as greedy decoding does; noise makes them explore.
    When the heaviest token is ``end_id``, it is fed alone, and the row goes on with tokens, sampled. No
    weight is changed.

    ``handle.generate(ids, max_new_tokens=...)`` does all of it; ``handle.rollout`` several of each prompt for
    a policy gradient; ``handle.step(logits)`` one step in a loop of one's own; and transformers' generate
    takes ``custom_generate=handle.custom_generate()``. All record what was fed (`optx.Rollout`).

    Args:
        noise: ``"gumbel"``; ``"dirichlet"``: weights ~ Dir(alpha p), before the K are chosen; None: y = pi.
        tau: of Gumbel noise: towards 0 an ordinary draw from pi, large an even mixture of the K.
        alpha: of Dirichlet noise: towards 0 a draw from p, large p itself.
        temperature: T, while thinking.
        top_k: tokens that stay, at most; 0: all.
        top_p: tokens stay before which less than this lies, of what top_k leaves, renormalised.
        min_p: the least that a token needs, as a share of the likeliest.
        max_topk: K, tokens in a mixture. None: 15 with noise, 10 without; never more than top_k.
        end_id: the token that ends thinking (``</think>``). None: rows think to their end.
        after_temperature: T afterwards. None: the same; so the next three.
        after_top_k: afterwards; 1 is greedy.
        after_top_p: afterwards.
        after_min_p: afterwards.
        cold_stop: steps in a row of an entropy below ``cold_entropy`` after which thinking is ended. None:
            never.
        cold_entropy: of the unfiltered p: as a share of ln V, or in nats.
        nats: whether it is in nats, as in the first Soft Thinking, whose values are 0.01 and 256 steps.
        noise_factor: what Gumbel noise is multiplied by.
        noise_clamp: the rails of Gumbel noise. None: (-1.5, 3) with ``record``, else none.
        floor: what is added to pi before its log. None: 1e-6 with ``record``, else 0.
        record: draw as SofT-GRPO's rollouts do, and take the weights' fingerprint along (`optx.Rollout`).

    Serves the model's input embedding.

    Paper values:
        ``noise="gumbel", tau=0.5``: best of all (the default); 0.6 for MATH and GPQA.
        ``noise="dirichlet", alpha=4.0``: of its scripts.
        ``temperature=0.6, top_k=30, top_p=0.95``: both phases (the default).
        ``end_id=2, cold_stop=32768, cold_entropy=0.1``: a cold stop that never comes.
        ``record=True, tau=0.1, temperature=1.0, top_k=5, max_topk=5``: of SofT-GRPO.

    Limits: What is reported as tokens is each step's heaviest, which does not replay it: keep the record.
        Small models (below 7B) lose most by inputs that are no token's. One beam; no encoder-decoder. Noise
        is drawn on the CPU, one generator a row. A step costs what a greedy one costs, and a look-up of K
        rows and a sort of top_k numbers.

    Keywords: latent reasoning, chain of thought, continuous thoughts, concept tokens, sampling, decoding,
        Gumbel-Softmax, Dirichlet, exploration, generate.

    Evidence: ``optx run think``; ``test_mix.py``, ``test_soft_thinking.py``, ``test_thinking_models.py``.

    Raises:
        OptxError: an option out of range, or two that don't go together.
        TargetError: at attach, no input embedding, an encoder-decoder, or an ``end_id`` that is no token.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.Sequential(torch.nn.Embedding(50, 8), torch.nn.Linear(8, 50))
        >>> thinking = optx.attach(model, optx.SoftThinking(noise="gumbel", tau=0.5, end_id=7))
        >>> out = thinking.generate(torch.tensor([[3, 4]]), max_new_tokens=5)
        >>> thinking.remove()

    Source: arXiv 2508.03440, section 4; noise, floor and clamp of records: arXiv 2511.06411, appendix C.
    """

    name: ClassVar[str] = "soft_thinking"
    role: ClassVar[str] = ""
    serves: ClassVar[str] = "a model's input embedding"
    serves_one: ClassVar[str] = "embedding"

    noise: Literal["gumbel", "dirichlet"] | None = "gumbel"
    tau: float = 0.5
    alpha: float = 4.0
    temperature: float = 0.6
    top_k: int = 30
    top_p: float = 0.95
    min_p: float = 0.0
    max_topk: int | None = None
    end_id: int | None = None
    after_temperature: float | None = None
    after_top_k: int | None = None
    after_top_p: float | None = None
    after_min_p: float | None = None
    cold_stop: int | None = None
    cold_entropy: float = 0.1
    nats: bool = False
    noise_factor: float = 1.0
    noise_clamp: tuple[float, float] | None = None
    floor: float | None = None
    record: bool = False

    def __post_init__(self) -> None:
        check_choice("SoftThinking", "noise", self.noise, ("gumbel", "dirichlet", None))
        for name in ("tau", "alpha", "temperature", "after_temperature", "top_p", "after_top_p"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, check_above_0("SoftThinking", name, value))
        for name in ("top_p", "after_top_p", "min_p", "after_min_p"):
            if (value := getattr(self, name)) is not None:
                check_range("SoftThinking", name, value, 0, 1)
        least = {"top_k": 0, "after_top_k": 0, "max_topk": 1, "end_id": 0, "cold_stop": 1}
        for name, low in least.items():
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, check_whole("SoftThinking", name, value, low))
        for name in ("cold_entropy", "noise_factor", "floor"):
            if (value := getattr(self, name)) is not None:
                check_range("SoftThinking", name, value, 0, math.nextafter(math.inf, 0))
        for name in ("nats", "record"):
            check_choice("SoftThinking", name, getattr(self, name), (True, False))
        self._check_clamp()
        self._check_together()

    def _check_clamp(self) -> None:
        given: Any = self.noise_clamp
        if given is None:
            return
        pair: Any = tuple(given) if isinstance(given, Sequence) else ()
        if len(pair) != 2 or not all(isinstance(one, int | float) for one in pair) or not pair[0] < pair[1]:
            raise OptxError(
                f"SoftThinking: noise_clamp is {given!r}; it must be two numbers, the lower first, as "
                "(-1.5, 3)."
            )
        object.__setattr__(self, "noise_clamp", (float(pair[0]), float(pair[1])))

    def _check_together(self) -> None:
        if self.cold_stop is not None and self.end_id is None:
            raise OptxError(
                f"SoftThinking: cold_stop is {self.cold_stop} and end_id None; it must say the token by "
                "which thinking is ended."
            )
        for name in ("noise_clamp", "floor"):
            if self.noise != "gumbel" and getattr(self, name) is not None:
                raise OptxError(
                    f"SoftThinking: {name} is {getattr(self, name)!r} and noise {self.noise!r}; it is of "
                    "noise='gumbel'. Leave it out."
                )
        if not self.record:
            return
        if self.noise != "gumbel":
            raise OptxError(
                f"SoftThinking: record is True and noise {self.noise!r}; only noise='gumbel' has the density "
                "that a policy gradient needs. Any generation's weights are recorded without it."
            )
        if not self.noise_factor:
            raise OptxError(
                "SoftThinking: record is True and noise_factor 0; without noise there is no density. It must "
                "be above 0."
            )
        if min(self.max_topk or 15, self.top_k or 15) < 2:
            raise OptxError(
                "SoftThinking: record is True and a mixture has one token; max_topk and top_k must be at "
                "least 2."
            )

    # ---- what a step asks ---------------------------------------------------------------------------

    @property
    def kind(self) -> str | None:
        """The noise."""
        return self.noise

    @property
    def clamp(self) -> tuple[float, float] | None:
        """The rails of Gumbel noise, if it has any."""
        return (-1.5, 3.0) if self.noise_clamp is None and self.record else self.noise_clamp

    @property
    def log_floor(self) -> float:
        """What is added to pi before its log is taken."""
        return (1e-6 if self.record else 0.0) if self.floor is None else self.floor

    @property
    def limits(self) -> Limits:
        """Which tokens stay while a row thinks."""
        return Limits(self.temperature, self.top_k, self.top_p, self.min_p)

    @property
    def after_limits(self) -> Limits:
        """Which tokens stay afterwards."""
        return Limits(
            self.temperature if self.after_temperature is None else self.after_temperature,
            self.top_k if self.after_top_k is None else self.after_top_k,
            self.top_p if self.after_top_p is None else self.after_top_p,
            self.min_p if self.after_min_p is None else self.after_min_p,
        )

    def width(self, vocabulary: int) -> int:
        """K, of a vocabulary."""
        wanted = (15 if self.noise else 10) if self.max_topk is None else self.max_topk
        return min(wanted, self.top_k or vocabulary, vocabulary)

    def in_force(self) -> dict[str, Any]:
        """The options as records have them: with what stands for None."""
        return {**self.options(), "noise_clamp": self.clamp, "floor": self.log_floor}

    # ---- where --------------------------------------------------------------------------------------

    def places(self, model: nn.Module) -> Collection[str]:
        """The input embedding.

        Raises:
            TargetError: there is none, or several.
        """
        config = getattr(model, "config", None)
        if getattr(config, "is_encoder_decoder", False):
            raise TargetError(
                f"attach: SoftThinking serves causal language models; this {type(model).__name__} is an "
                "encoder-decoder."
            )
        return {embedding_of(model, "attach: SoftThinking")[0]}

    def companions(self, model: nn.Module, sites: Sequence[Site]) -> list[tuple[Injection, list[Site]]]:
        """None; the sites are seen together with their model here.

        Raises:
            TargetError: the model has its tokens looked up by another module.
        """
        give: Any = getattr(model, "get_input_embeddings", None)
        if callable(give) and sites:
            path, own = embedding_of(model, "attach: SoftThinking")
            if sites[0].module is not own:
                raise TargetError(
                    f"attach: SoftThinking serves {self.serves}, which is {path!r} in this "
                    f"{type(model).__name__}, not {sites[0].path!r}. Leave out targets=."
                )
        return []

    def part(self, module: nn.Module, path: str) -> Part:
        """What makes one embedding take mixtures."""
        weight = getattr(module, "weight", None)
        linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # GPT-2's linear one
        if weight is None or weight.ndim != 2 or linear:
            raise TargetError(
                f"attach: SoftThinking serves {self.serves}; {path!r} is a {type(module).__name__}."
            )
        V = getattr(module, "num_embeddings", weight.shape[0])
        if self.end_id is not None and self.end_id >= V:
            raise TargetError(
                f"attach: SoftThinking has end_id={self.end_id}, and {path!r} has {V:,} tokens, "
                f"0 to {V - 1:,}."
            )
        return MixedEmbedding()

    def handle(
        self, model: nn.Module, injection: Any, served: Sequence[Served], saved: Sequence[Saved]
    ) -> ThinkingHandle:
        """What `optx.attach` returns."""
        return ThinkingHandle(model, injection, served, saved)
