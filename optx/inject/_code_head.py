"""What `optx.VQLogits` puts on an output head: a codebook, the code of each token, and what follows."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optx._errors import OptxError
from optx.inject import _code_loss, _code_map
from optx.inject._code_map import Kind
from optx.inject._part import Part, Weights, hidden_of

_asking: ContextVar[tuple[CodeHead, ...]] = ContextVar("optx_hidden", default=())
"""Of which heads this thread or task has asked for what they are given."""
_counting = Lock()


class CodeHead(Part):
    """Scores of codes in the place of scores of tokens.

    Attributes:
        codebook: C, (K, d).
        mapping: M, (V,) int32: the code of each token.
        code_bias: (K,), in the place of the head's bias, if it has one.
        token_bias: b, (V,), if asked for.
        used: how many of the head's rows are tokens; the rest have a chance of 0.
        resting: which of the head's own parameters take no part.
        asked: how many threads and tasks have asked that the head give them what it got; see `passed_on`.
        answers: of a replica for a device (DataParallel): whether those asked who made it; else None.
    """

    mapping: Tensor

    def __init__(self, codebook: Tensor, mapping: Tensor, used: int) -> None:
        super().__init__()
        self.codebook = nn.Parameter(codebook)
        self.code_bias: nn.Parameter | None = None
        self.token_bias: nn.Parameter | None = None
        self.register_buffer("mapping", mapping.to(device=codebook.device, dtype=torch.int32))
        self.used = used
        self.asked = 0
        self.answers: bool | None = None
        self.resting: tuple[str, ...] = ()
        self.to_begin = False
        self.called = True
        self._known: tuple[Any, Tensor] | None = None  # log sizes, and of which mapping

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": None, "asked": 0}  # of a copy nobody has asked anything

    # ---- the start ----------------------------------------------------------------------------------

    @torch.no_grad()
    def begin(self, rows: Tensor, bias: Tensor | None, kind: Kind, counts: Tensor | None, seed: int) -> None:
        """Take the first values from the head that there is.

        Args:
            rows: its weight, (V, d).
            bias: its bias.
            kind: how tokens are mapped.
            counts: of tokens, (V,).
            seed: of what is random.
        """
        K, used = len(self.codebook), self.used
        counts = None if counts is None else counts[:used].double().cpu()
        mapping = _code_map.mapped(kind, rows[:used], K, counts, seed)
        self.mapping[:used] = mapping.to(self.mapping)
        if kind == "random" and used > K:
            draws = torch.Generator().manual_seed(seed % 2**63)
            self.codebook.copy_(0.02 * torch.randn(self.codebook.shape, generator=draws))
        else:
            self.codebook.copy_(_code_map.means(rows[:used], mapping, K))
        if self.code_bias is not None and bias is not None:
            self.code_bias.copy_(_code_map.means(bias[:used], mapping, K))
        if self.token_bias is not None and bias is not None:
            self.token_bias.copy_(bias)
        elif self.token_bias is not None and counts is not None:
            self.fit_bias(counts)

    @torch.no_grad()
    def fit_bias(self, counts: Tensor) -> None:
        """Take each token's bias from counts, (V,) or those of the tokens."""
        assert self.token_bias is not None
        mapping = self.mapping[: self.used].long().cpu()
        often = counts[: self.used].double().cpu() + 1
        shares = _code_map.log_shares(often, mapping, len(self.codebook))
        self.token_bias[: self.used] = shares.to(self.token_bias)

    # ---- the call -----------------------------------------------------------------------------------

    def around(
        self, call: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """Each token's logit: its code's score."""
        x = hidden_of(args, kwargs)
        if not torch.compiler.is_compiling():
            self.called = True
        # Compiled code has a guard on the number alone; who asked is seen outside of it, at each call.
        return x if self.asked and self._is_asked() else self.logits(self.scores(x))

    @contextmanager
    def passed_on(self) -> Generator[None]:
        """While it lasts, the head gives this thread or task what it is given."""
        before = _asking.get()
        _asking.set((*before, self))
        with _counting:
            self.asked += 1
        try:
            yield
        finally:
            with _counting:
                self.asked -= 1
            _asking.set(before)

    @torch._disable_dynamo  # pyright: ignore  # torch.compiler.disable would load the compiler with optx
    def _is_asked(self) -> bool:
        return any(head is self for head in _asking.get()) if self.answers is None else self.answers

    def _replicate_for_data_parallel(self) -> CodeHead:
        replica: Any = super()._replicate_for_data_parallel()  # called in a thread that has asked nothing
        replica.answers = self._is_asked()
        return replica

    def enter(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        """Before a call of the whole model."""
        if not torch.compiler.is_compiling():
            self.called = False

    def leave(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After it.

        Raises:
            OptxError: the head was not called: a trainer's own loss takes its weight (TRL's), and of one that
                is an embedding's too nobody would notice.
        """
        if not torch.compiler.is_compiling() and self.active and not self.called:
            raise OptxError(
                f"VQLogits did not act: this call of a {type(model).__name__} did not call the head. A loss "
                "that computes with the head's weight itself knows nothing of codes: use handle.loss, or the "
                "model's own."
            )

    def scores(self, x: Tensor) -> Tensor:
        """Of the codes, (..., K)."""
        bias = None if self.code_bias is None else self.code_bias.to(x.dtype)
        return F.linear(x, self.codebook.to(x.dtype), bias)

    def logits(self, scores: Tensor) -> Tensor:
        """Of the tokens, (..., V)."""
        found = scores.index_select(-1, self.mapping)
        if self.token_bias is not None:
            found = found + self.token_bias.to(found.dtype)
        unused = len(self.mapping) - self.used
        if unused:
            found.narrow(-1, self.used, unused).fill_(-torch.inf)
        return found

    def retired(self, module: nn.Module) -> Sequence[nn.Parameter]:
        """The head's own weight and bias, but for what is another module's too."""
        return [p for name in self.resting if isinstance(p := getattr(module, name), nn.Parameter)]

    # ---- the loss -----------------------------------------------------------------------------------

    def masses(self, dtype: torch.dtype) -> Tensor:
        """The log of each code's number of tokens, or with a bias of theirs, of the sum of its powers."""
        if self.token_bias is not None:
            tokens = self.mapping[: self.used]
            return _code_loss.log_masses(self.token_bias[: self.used].to(dtype), tokens, len(self.codebook))
        return self.log_sizes().to(dtype)

    def even(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Each code's share of the tokens, (K,), and their mean bias: what smoothing pulls to."""
        share = (self.log_sizes().exp() / self.used).to(dtype)
        bias = share.new_zeros(()) if self.token_bias is None else self.token_bias[: self.used].mean()
        return share, bias.to(dtype)

    def log_sizes(self) -> Tensor:
        """The log of how many tokens each code has, (K,) float64, counted once."""
        if torch.compiler.is_compiling():
            return self._counted()
        version = self.mapping._version  # pyright: ignore[reportPrivateUsage]
        key = (self.mapping.data_ptr(), version, self.mapping.device)
        if self._known is None or self._known[0] != key:
            self.check_mapping(self.mapping, "VQLogits")
            self._known = (key, self._counted())
        return self._known[1]

    def _counted(self) -> Tensor:
        return _code_loss.log_sizes(self.mapping[: self.used], len(self.codebook), torch.float64)

    def check_mapping(self, mapping: Tensor, doing: str) -> None:
        """Raise if a token has no code that there is."""
        low, high = (int(one) for one in mapping.aminmax())
        if low < 0 or high >= len(self.codebook):
            raise OptxError(
                f"{doing}: the mapping has code {low if low < 0 else high}, and there are "
                f"{len(self.codebook)} codes, 0 to {len(self.codebook) - 1}."
            )

    # ---- the rest -----------------------------------------------------------------------------------

    def fold(self, module: nn.Module, now: Weights, base: Weights) -> Weights:
        """C[M], and each token's bias if there is any."""
        weight, bias = self.as_weights()
        own = weight.to(now.weight.dtype)
        if now.weight is not base.weight:
            own = own + (now.weight - base.weight)
        return Weights(own, None if bias is None else bias.to(now.weight.dtype))

    @torch.no_grad()
    def as_weights(self) -> tuple[Tensor, Tensor | None]:
        """(V, d) and, if tokens differ in more than their code or some have no chance, (V,)."""
        weight, bias = self.codebook.index_select(0, self.mapping), None
        unused = len(self.mapping) - self.used
        if self.code_bias is not None or self.token_bias is not None or unused:
            bias = weight.new_zeros(len(weight))
            if self.code_bias is not None:
                bias += self.code_bias.index_select(0, self.mapping)
            if self.token_bias is not None:
                bias += self.token_bias
            bias[self.used :] = -torch.inf
        return weight, bias

    def note(self) -> str:
        """How many codes for how many tokens."""
        bias = ", a bias for each token" if self.token_bias is not None else ""
        return f"{len(self.codebook):,} codes for {self.used:,} tokens{bias}"
