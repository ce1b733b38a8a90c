"""How much memory tensors take at most."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Peak(TorchDispatchMode):
    """Bytes of storage made inside and alive at once, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.most = 0
        self.seen: dict[int, bool] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        for t in result if isinstance(result, tuple | list) else (result,):
            storage = t.untyped_storage() if isinstance(t, torch.Tensor) else None
            if storage is None or storage.data_ptr() in known or storage.data_ptr() in self.seen:
                continue
            address, size = storage.data_ptr(), storage.nbytes()
            self.seen[address] = True
            self.alive += size
            self.most = max(self.most, self.alive)
            weakref.finalize(storage, self.freed, address, size)
        return result

    def freed(self, address: int, size: int) -> None:
        del self.seen[address]
        self.alive -= size
