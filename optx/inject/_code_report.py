"""What a head of codes costs beside the head that it replaces, and what its codes can't tell apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from optx.inject._code_head import CodeHead
from optx.inject._report import Report


@dataclass(frozen=True)
class CodeReport(Report):
    """What `optx.attach` with `optx.VQLogits` added, and what that saves; ``print(report)`` shows both.

    Attributes:
        head_numbers: numbers of the head before, weight and bias.
        head_bytes: their bytes.
        code_numbers: numbers of the codebook and its biases.
        index_bytes: bytes of the mapping, which is whole numbers and is not trained.
        code_bytes: all that the head needs now, the mapping too.
        tied: other names of the head's old weight, which those modules go on using.
        gap: nats a token that sharing a score costs at least, if contexts said nothing about which of a
            code's tokens comes; None without counts.
    """

    head_numbers: int
    head_bytes: int
    code_numbers: int
    index_bytes: int
    code_bytes: int
    tied: tuple[str, ...]
    gap: float | None

    @property
    def saved_bytes(self) -> int:
        """What a file of the model without the old weight is smaller by; below 0 if it grows."""
        return (0 if self.tied else self.head_bytes) - self.code_bytes

    def __str__(self) -> str:
        share = 100 * self.code_bytes / self.head_bytes
        lines = [
            super().__str__(),
            f"head: {self.head_numbers:,} numbers ({self.head_bytes:,} bytes) before; {self.code_numbers:,} "
            f"and the mapping ({self.code_bytes:,} bytes, {share:.3g} %) now",
        ]
        if self.tied:
            lines.append(
                f"nothing is saved: the weight is {', '.join(self.tied)} too and stays; "
                f"{self.code_bytes:,} bytes are added"
            )
        else:
            lines.append(
                f"saved: {self.saved_bytes:,} bytes of a file without the old weight, which rests in memory "
                "as long as this is attached"
            )
        if self.gap is not None:
            lines.append(f"gap: {self.gap:.3f} nats a token at least, by the counts of single tokens")
        return "\n".join(lines)


@torch.no_grad()
def gap(part: CodeHead, counts: Tensor) -> float:
    """The mean over tokens of how much worse a code's spread is than the tokens' own shares, in nats.

    Sum over codes of p_k KL(q_k || r_k), q_k the tokens' shares of their code by the counts, and r_k those
    that the head gives them: even ones, or by their biases.
    """
    used = part.used
    counts = counts.double().cpu()[:used]
    codes = part.mapping[:used].long().cpu()
    p = counts / counts.sum()
    of_code = torch.zeros(len(part.codebook), dtype=torch.float64).index_add_(0, codes, p)
    b = torch.zeros(used, dtype=torch.float64) if part.token_bias is None else part.token_bias[:used].double()
    log_r = b.cpu() - part.masses(torch.float64).cpu()[codes]
    return float((torch.xlogy(p, p / of_code[codes].clamp_min(1e-300)) - p * log_r).sum())
