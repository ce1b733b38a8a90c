"""Top singular values during training, one power iteration every few steps."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from optx._errors import OptxError, check_whole, warn
from optx.scaling._singular import batches, named, sweep
from optx.scaling._sublayer_gain import SublayerGains, blocks_of


@dataclass(frozen=True)
class GainRecord:
    """At one step.

    Attributes:
        step: of the optimizer, counted from 1 since the monitor was made.
        value: by matrix, the top singular value: an estimate from below, one more iteration than at the
            last record.
        residual: by matrix, as in `optx.scaling.TopValue`; large right after the start.
    """

    step: int
    value: dict[str, float]
    residual: dict[str, float]


class GainMonitor:
    """Follows the top singular values of a model's matrices while it is trained.

    A hook on the optimizer's step makes one block power iteration on every matrix, every so many steps,
    and goes on from where the last one stopped: as weights change little from step to step, the estimates
    keep up. Neither weights nor random numbers are touched. An iteration reads each matrix three times and
    keeps ``vectors`` numbers a column; a device is waited for once a record.

    It is a context manager; at its end, or by `remove`, the hook is taken off. It is not part of a
    checkpoint: made anew after a resume, it needs some iterations to find the values again.

    Args:
        model: the model that is trained.
        optimizer: any `torch.optim.Optimizer`, wrapped by optx or not.
        every: steps from one record to the next.
        vectors: size of the block.
        warmup: iterations at the start, before any step, so that the first record is no blind guess.
        embeddings: whether tables of embeddings count.

    Attributes:
        records: a `GainRecord` for each time that it looked.
        seconds: spent in the hook, all together.
        left_out: why parameters of two dimensions or more are not looked at.

    Raises:
        OptxError: there is no matrix, or an option is out of range; at a record, a matrix is gone or has
            another shape.

    Example:
        >>> import torch, optx
        >>> model = torch.nn.Linear(4, 4)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> with optx.scaling.GainMonitor(model, optimizer, every=2) as monitor:
        ...     for _ in range(4):
        ...         model(torch.ones(1, 4)).sum().backward()
        ...         optimizer.step()
        >>> [record.step for record in monitor.records]
        [2, 4]
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        every: int = 10,
        vectors: int = 4,
        warmup: int = 20,
        embeddings: bool = False,
    ) -> None:
        for name, value, low in (("every", every, 1), ("vectors", vectors, 1), ("warmup", warmup, 0)):
            check_whole("GainMonitor", name, value, low)
        if not isinstance(optimizer, Optimizer):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise OptxError(
                f"GainMonitor: optimizer is a {type(optimizer).__name__}; it must be a torch optimizer."
            )
        self.every, self.records, self.seconds = every, list[GainRecord](), 0.0
        self._blocks, self.left_out = blocks_of("GainMonitor", model, embeddings, vectors)
        self._model = model
        _check_of_one(model, optimizer)
        self._steps, self._iterations = 0, 0
        self._warned = False
        for _ in range(warmup):
            self._iterate()
        self._hook: Any = _with_hooks(optimizer).register_step_post_hook(self._after_step)

    def _after_step(self, *_: Any) -> None:
        self._steps += 1
        if self._steps % self.every:
            return
        start = time.perf_counter()
        found = self._iterate()
        self.records.append(
            GainRecord(
                self._steps,
                {name: one.value for name, one in found.items()},
                {name: one.residual for name, one in found.items()},
            )
        )
        self.seconds += time.perf_counter() - start
        bad = next((name for name, one in found.items() if not math.isfinite(one.value)), None)
        if bad is not None and not self._warned:
            self._warned = True
            warn(
                f"GainMonitor: {bad!r} holds inf or nan after step {self._steps}; its values are nan from "
                "here on."
            )

    def _iterate(self) -> Any:
        self._iterations += 1
        self._follow()
        found: dict[str, Any] = {}
        with torch.no_grad():
            swept = [(batch, *sweep(batch)) for batch in batches(self._blocks)]
            for batch, sigma, residual in swept:
                found |= named(batch, sigma.tolist(), residual.tolist(), self._iterations, 1e-3)
        return {name: found[name] for block in self._blocks for name in block.matrices.names()}

    def _follow(self) -> None:
        """Weights may have been replaced since the last time: loaded with ``assign=True``, sharded, moved."""
        now = dict(self._model.named_parameters())
        for block in self._blocks:
            old, p = block.matrices, now.get(block.matrices.name)
            if p is None or p.shape != old.parameter.shape:
                found = "is gone" if p is None else f"has shape {tuple(p.shape)} now"
                raise OptxError(
                    f"GainMonitor: {old.name!r} {found}, where it had shape {tuple(old.parameter.shape)}. "
                    "Make another monitor when the model has changed."
                )
            if p is not old.parameter:
                block.matrices = replace(old, parameter=p)
            block.v = block.v.to(p.device, torch.promote_types(p.dtype, torch.float32))

    def gains(self) -> SublayerGains:
        """The values of now, by one more iteration: to compare, to fit, or to go on from."""
        return SublayerGains(self._iterate(), {}, self.left_out, {b.matrices.name: b.v for b in self._blocks})

    def remove(self) -> None:
        """Take the hook off; the records stay."""
        self._hook.remove()

    def __enter__(self) -> GainMonitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def _with_hooks(optimizer: Any) -> Optimizer:
    """Accelerate's wrapper is an Optimizer without hooks; that within it has them."""
    while not hasattr(optimizer, "_optimizer_step_post_hooks") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _check_of_one(model: nn.Module, optimizer: Optimizer) -> None:
    ids = {id(p) for p in model.parameters()}
    if not any(id(p) in ids for group in optimizer.param_groups for p in group["params"]):
        warn(
            "GainMonitor: none of the optimizer's parameters is the model's, so that its steps may be "
            "another model's. Pass the model that it trains."
        )
