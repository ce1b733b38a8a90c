"""Numbers brought from a device by one copy, for what is told in plain floats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def values(tensors: Sequence[Tensor]) -> list[npt.NDArray[np.float64]]:
    """What flat tensors hold: those on one device come together, and so wait for it once."""
    found: dict[int, npt.NDArray[np.float64]] = {}
    for device in dict.fromkeys(t.device for t in tensors):
        here = [i for i, t in enumerate(tensors) if t.device == device]
        wide = torch.float32 if device.type == "mps" else torch.float64
        if len(here) == 1:
            found[here[0]] = np.array(tensors[here[0]].detach().to(wide).cpu().double().numpy())
            continue
        together: Any = torch.cat([tensors[i].detach().to(wide) for i in here]).cpu().double().numpy()
        ends = np.cumsum([tensors[i].numel() for i in here])
        found.update(zip(here, np.split(together, ends[:-1]), strict=True))
    return [found[i] for i in range(len(tensors))]
