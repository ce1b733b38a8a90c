"""The rows that every process recorded, to each of them: one all-gather a step."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from optx._errors import OptxError
from optx.signal._all_ranks import largest
from optx.signal._record import Rows


class Exchange:
    """Indices and rows as bytes of one tensor, filled up to the length that all processes agree on once.

    gloo ends the process, without a word, where lengths differ.

    Args:
        count: samples of this process's first batch; the largest of all processes is the length.
        device: of the rows.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self.length = largest(count, device)

    def __call__(self, places: Tensor, rows: Rows) -> list[tuple[Tensor, Rows]]:
        """Those of each process, in the order of ranks.

        Raises:
            OptxError: the batch is larger than any was at first.
        """
        count = len(places)
        if count > self.length:
            raise OptxError(
                f"SAF: a batch has {count} samples and no process's first one had more than {self.length}; "
                "with gather=True let the first batch be the largest."
            )
        given = [places.to(rows.values.device), *(t for t in rows if t is not None)]
        parts = [self._filled(part) for part in given]
        sent = torch.cat([part.contiguous().view(-1).view(torch.uint8) for part in parts])
        got = [torch.empty_like(sent) for _ in range(dist.get_world_size())]
        dist.all_gather(got, sent)
        sizes = [part.numel() * part.element_size() for part in parts]
        found: list[tuple[Tensor, Rows]] = []
        for one in got:
            pieces = [
                piece.clone().view(part.dtype).view(part.shape)
                for piece, part in zip(one.split(sizes), parts, strict=True)
            ]
            theirs = pieces[0].cpu()
            real = int((theirs >= 0).sum())  # what fills up is behind
            classes = pieces[2][:real] if len(pieces) > 2 else None
            found.append((theirs[:real], Rows(pieces[1][:real], classes)))
        return found

    def _filled(self, part: Tensor) -> Tensor:
        missing = self.length - len(part)
        return F.pad(part, (*[0, 0] * (part.ndim - 1), 0, missing), value=-1) if missing else part
