"""SAF: sharpness-aware training for the price of a table of what the model said of each sample before.

Source: Du, Zhou, Feng, Tan, Zhou, "Sharpness-Aware Training for Free", NeurIPS 2022, arXiv 2205.14083,
algorithm 1 and equations 8 and 12.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from optx._errors import FileError, OptxError, ShapeError, check_choice, shown, warn
from optx.kernels.loss.trajectory_rows import centred
from optx.signal._audit import Audit
from optx.signal._exchange import Exchange
from optx.signal._record import NEVER, Record, Rows, binned
from optx.signal._trajectory import (
    Trajectory,
    check_logits,
    check_where,
    count_from,
    few,
    mean_loss,
    no_loss,
    with_gradient,
)

FEW = 0.9
"""Of the samples of an epoch, the share with a past under which a warning is due."""


class SAF(Trajectory):
    """A loss that keeps outputs near those of some epochs ago, for flatter minima at the price of a table.

    Per sample it is weight tau^2 KL(softmax(past / tau) || softmax(logits / tau)), past being the logits that
    the same sample had ``lookback`` epochs ago, from a table that each call also writes. It needs no second
    pass. A sample with no entry of exactly that epoch adds 0; the mean is over all of the batch. No random
    numbers are drawn. Without gradients (validation under ``torch.no_grad()``) a call gives 0 and records
    nothing.

    Args:
        num_samples: length of the training set, whose indices `optx.with_index` gives.
        weight: lambda; at 0 it records and does nothing else. An attribute that may be set at any time.
        tau: the temperature.
        lookback: how many epochs back the reference lies; the table holds so many.
        start_epoch: the loss begins after this epoch, the record with the first one; at least lookback - 1.
        end_epoch: the first epoch without the loss again.
        top_k: for many classes, a language model's: so many logits of each position are kept, and all others
            as one bin with their summed probability. `report` tells the error; from all classes on there is
            none.
        max_length: positions of a sequence that are kept, if batches are not all as long as the first.
        dtype: of the logits in the table: torch.float16, torch.bfloat16 or torch.float32.
        device: where the table lies: ``"cpu"``, which a GPU's outputs reach through pinned memory without
            waiting, or the GPU, where num_samples * lookback * classes * 2 bytes must fit.
        gather: with several processes, exchange outputs in one all-gather a step, so that each process has
            all samples: what shuffling by `torch.utils.data.DistributedSampler` needs. Each must take as
            many steps; the first batch must be one of the largest.

    Paper values:
        ``weight=0.3, tau=5.0, lookback=3, start_epoch=5``: all tasks (the defaults).
        ``lookback=2``: ImageNet in its script, 90 epochs, SGD, learning rate 1.4 at a batch of 4096.

    In transformers' Trainer a ``compute_loss_func`` sees no index: override ``compute_loss``, which takes the
    index out of ``inputs`` before the model's call, train on ``optx.with_index(data)`` with
    ``remove_unused_columns=False``, and let a ``TrainerCallback`` call
    ``set_epoch(int(state.epoch + 1e-6))`` in ``on_epoch_begin``. The Trainer does not save a loss: keep
    `state_dict` beside its checkpoints.

    Limits: `set_epoch` must be called each epoch, and the index must be on the CPU if steps are not to wait.
    Mixup and cutmix record a row for two samples: leave them out. A shuffling ``DistributedSampler`` gives
    each of W processes other samples in each epoch: without ``gather=True`` 1 / W of them have a past. A
    fixed part for each, ``Subset(data, range(rank, len(data), W))``, needs no exchange. A state is one
    process's: loaded by another, or for another number of them, rows miss for ``lookback`` epochs, and a
    warning says how many, at once. Classes must be last. Untested on a GPU.

    Keywords: SAF, SAM, sharpness-aware, flat minima, trajectory loss, self-distillation, label noise.

    Evidence: ``optx run flatness``; ``test_saf.py``.

    Source: "Sharpness-Aware Training for Free", arXiv 2205.14083, algorithm 1, equations 8 and 12; the factor
    tau^2 from the authors' code.

    Raises:
        OptxError: an option out of range; when called: an index that is out of range or twice in a batch, no
            epoch set, logits without a gradient.
        ShapeError: logits, index or ``where`` do not fit each other or what was recorded.

    Example:
        >>> import torch, optx
        >>> data = torch.utils.data.TensorDataset(torch.randn(8, 3), torch.arange(8))
        >>> loader = torch.utils.data.DataLoader(optx.with_index(data), batch_size=4, shuffle=True)
        >>> model, saf = torch.nn.Linear(3, 8), optx.SAF(len(data))
        >>> opt = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> for epoch in range(8):
        ...     saf.set_epoch(epoch)
        ...     for x, y, index in loader:
        ...         logits = model(x)
        ...         loss = torch.nn.functional.cross_entropy(logits, y) + saf(logits, index)
        ...         opt.zero_grad()
        ...         loss.backward()
        ...         opt.step()
        >>> saf.report()["recorded"], saf.nbytes  # 8 samples x 3 epochs x (8 classes x 2 bytes + 4)
        (1.0, 480)
    """

    _owner = "SAF"

    def __init__(
        self,
        num_samples: int,
        weight: float = 0.3,
        tau: float = 5.0,
        lookback: int = 3,
        start_epoch: int = 5,
        end_epoch: int | None = None,
        top_k: int | None = None,
        max_length: int | None = None,
        dtype: torch.dtype = torch.float16,
        device: torch.device | str = "cpu",
        gather: bool = False,
    ) -> None:
        super().__init__(weight, tau, start_epoch, end_epoch)
        check_choice("SAF", "dtype", dtype, (torch.float16, torch.bfloat16, torch.float32))
        self.gather = gather
        if self.start_epoch < count_from("SAF", "lookback", lookback, 1) - 1:
            raise OptxError(
                f"SAF: start_epoch is {start_epoch} with lookback={lookback}, so the loss would begin when "
                f"there is no epoch to look back to; start_epoch must be at least {lookback - 1}."
            )
        self._record = Record(
            count_from("SAF", "num_samples", num_samples, 1),
            lookback,
            None if top_k is None else count_from("SAF", "top_k", top_k, 1),
            self.tau,
            None if max_length is None else count_from("SAF", "max_length", max_length, 1),
            dtype,
            torch.device(device),
        )
        self._audit = Audit()
        self._served = self._asked = self._again = 0
        self._told: set[str] = set()
        self._exchange: Exchange | None = None

    @torch._disable_dynamo  # pyright: ignore  # torch.compiler.disable would load the compiler with optx
    def __call__(self, logits: Tensor, index: Tensor | Sequence[int], where: Tensor | None = None) -> Tensor:
        """The loss to add, weight included; and the batch is recorded.

        Args:
            logits: (B, C), or (B, T, V) of sequences, as the model gave them, any float dtype.
            index: (B,) whole numbers, each sample's place in the training set.
            where: which positions count, bool in logits' shape without the last dimension: not padding. The
                mean is over these.

        Returns:
            A scalar in float32 (float64 for such logits); exactly 0 while the loss is off.
        """
        if not torch.is_grad_enabled():
            return no_loss("SAF", logits)
        places, numbers = self._checked(logits, index, where)
        self._check_scores(logits)
        epoch, record = self._now(), self._record
        if record.tau != self.tau and record.top_k is not None:
            raise OptxError(
                f"SAF: tau is {self.tau} now and was {record.tau} when SAF was made, and a record with top_k "
                "holds for that one only; make another SAF."
            )
        record.tau = self.tau
        record.fit(logits)
        if (compiled := self._one_pass(logits)) is not None:
            return self._passed(compiled, logits, places, numbers, where)
        self._count_again(record.seen(places, epoch))
        past = record.read(places, record.past_of(epoch), logits.device) if self.active else None
        with torch.no_grad():
            z = centred(logits)
            self._audit.look(record, z, numbers, epoch, past, where)
            for theirs, part in self._everyones(places, record.encode(z)):
                record.write(theirs, epoch, part)
        if past is None:
            return no_loss("SAF", logits)
        (values, classes), serves, count = past
        self._served, self._asked = self._served + count, self._asked + len(places)
        if classes is not None:
            if where is not None:
                logits = logits.masked_fill(~where.unsqueeze(-1), 0.0)  # padding may be NaN
            logits = binned(centred(logits), classes, self.tau)
            z = logits.detach()
        return mean_loss(logits, z, values, self.tau, serves, where, self.weight)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch begins, counted from 0; call it at the start of each, as for a sampler.

        An earlier one than before forgets what was recorded from it on.
        """
        before, served, asked = self.epoch, self._served, self._asked
        super().set_epoch(epoch)
        if before is not None and epoch < before:  # what comes now is another course of the training
            self._record.forget_from(epoch)
        if epoch != before:
            self._served = self._asked = self._again = 0
            self._tell_of_few(before, served, asked)

    @property
    def nbytes(self) -> int:
        """Bytes of the record: samples * lookback * (numbers kept * their bytes + 4)."""
        return self._record.nbytes

    def report(self) -> dict[str, float]:
        """What the record is, and what its form costs.

        Returns:
            ``bytes`` held (`nbytes`, and the exact rows of eight samples that the error is measured on);
            ``recorded``, the share of samples with any entry; ``served``, the share of this epoch's samples
            that had a past; ``loss`` and ``error``, the exact divergence and by how much what was computed
            from the record differs, both means over the positions of those eight that were compared (nan:
            none yet).
        """
        audit = self._audit
        seen = (self._record.tags != NEVER).any(0).float().mean()
        return {
            "bytes": self.nbytes + audit.nbytes,
            "recorded": float(seen),
            "served": self._served / self._asked if self._asked else float("nan"),
            "loss": audit.exact / audit.count if audit.count else float("nan"),
            "error": audit.off / audit.count if audit.count else float("nan"),
        }

    def state_dict(self, table: bool = True) -> dict[str, Any]:
        """Tensors and plain numbers, copied: epoch, record, and what it was made for.

        Args:
            table: False leaves the record out, which is most of the size: the loss is then 0 for the first
                ``lookback`` epochs after loading, until there is a new one.
        """
        return {
            "epoch": self.epoch,
            "made_for": self._record.geometry(),
            "counts": [self._served, self._asked, self._again],
            "part": None if self.gather else _part(),
            "record": {**self._record.state(), "audit": self._audit.state()} if table else None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state.

        Raises:
            FileError: it is none of SAF's, or of a dataset of another length or another kind of record;
                nothing has changed then.
        """
        known: Any = state_dict  # of any type, if it comes from elsewhere
        if not isinstance(known, dict) or not {"epoch", "made_for", "counts", "record"} <= known.keys():
            raise FileError("SAF: this state is none of SAF's; give what state_dict() gave.")
        self._compare(state_dict["made_for"])
        if (kept := state_dict["record"]) is not None:
            self._record.check(kept)
        self._audit = Audit()
        if kept is None:
            self._record.clear()
        else:
            self._record.load(kept)
            self._audit.load(kept["audit"])
        self.epoch = state_dict["epoch"]
        self._served, self._asked, self._again = state_dict["counts"]
        self._tell_of_part(state_dict.get("part"))

    # ---- a small batch on a CPU --------------------------------------------------------------------------

    def _one_pass(self, logits: Tensor) -> Any:
        """Compiled code for few classes that are all kept, or None where it does not serve."""
        return few(logits) if logits.ndim == 2 and self._record.plain and not self._gathers else None

    def _passed(
        self, compiled: Any, logits: Tensor, places: Tensor, numbers: list[int], where: Tensor | None
    ) -> Tensor:
        """All that a call does, the record too, in one pass over the samples."""
        epoch, record, z = self._now(), self._record, logits.detach()
        made = compiled.recorded(
            z,
            cast("Tensor", record.values),
            record.tags,
            places.contiguous(),
            epoch % record.slots,
            (record.past_of(epoch), epoch),
            self.tau,
            None if where is None else where.contiguous(),
            self.active,
        )
        self._audit.look_at_few(record, z, numbers, epoch, made.losses)
        self._count_again(made.again)
        if made.gradient is None:
            return no_loss("SAF", logits)
        self._served, self._asked = self._served + made.served, self._asked + len(places)
        count = len(places) if where is None else int(where.sum())
        return with_gradient(logits, made.total, made.gradient, self.tau, self.weight / max(1, count))

    # ---- what is checked --------------------------------------------------------------------------------

    def _compare(self, theirs: dict[str, Any]) -> None:
        mine = self._record.geometry()
        if theirs.get("num_samples") != mine["num_samples"]:
            raise FileError(
                f"SAF: the state is of a dataset with {theirs.get('num_samples')} samples and this one has "
                f"{mine['num_samples']}, so its indices may mean others; begin with a new record, by "
                "state_dict(table=False) or a new SAF."
                if theirs
                else "SAF: the state does not say what it was made for."
            )
        for name in {**mine, **theirs}:
            if theirs.get(name) != mine.get(name):
                raise FileError(
                    f"SAF: the state's record has {name}={theirs.get(name)}, this one has "
                    f"{name}={mine.get(name)}; make SAF with the same."
                )

    def _checked(
        self, logits: Tensor, index: Tensor | Sequence[int], where: Tensor | None
    ) -> tuple[Tensor, list[int]]:
        """The index on the CPU as int64, and as a list, everything having been looked at."""
        check_logits("SAF", logits)
        if where is not None:
            check_where("SAF", where, logits)
        places = _places(index)
        if places.is_floating_point() or places.dtype == torch.bool or places.shape != logits.shape[:1]:
            raise ShapeError(
                f"SAF: index is {places.dtype} in shape {tuple(places.shape)}; it must be {len(logits)} "
                f"whole numbers, one for each row of logits {tuple(logits.shape)}."
            )
        places = places.to("cpu", torch.int64)
        numbers, samples = places.tolist(), self._record.samples
        for one in (min(numbers, default=0), max(numbers, default=0)):
            if not 0 <= one < samples:
                raise OptxError(
                    f"SAF: index {one} is out of range: num_samples is {samples}, so indices are 0 to "
                    f"{samples - 1}."
                )
        if len(set(numbers)) < len(numbers):
            twice = next(one for place, one in enumerate(numbers) if one in numbers[:place])
            raise OptxError(
                f"SAF: index {twice} is in the batch twice, and a sample has one entry an epoch; use a "
                "sampler without replacement and, if it pads the last batch, drop_last=True."
            )
        return places, numbers

    def _count_again(self, again: int) -> None:
        """Samples that this epoch has had already: more than half of all are no chance."""
        self._again += again
        if 2 * self._again > self._record.samples and "again" not in self._told:
            self._told.add("again")
            warn(
                f"SAF: {self._again} samples came again within epoch {self.epoch}, and only the last time is "
                "recorded. Is set_epoch called in each epoch?"
            )

    def _tell_of_few(self, epoch: int | None, served: int, asked: int) -> None:
        """Warn, once, of an epoch with few pasts; in the first of all there are none, counted from 0 or 1."""
        early = epoch is None or epoch < self._record.slots + (not served)
        if served < FEW * asked and not early and "few" not in self._told:
            self._told.add("few")
            warn(
                f"SAF: in epoch {epoch}, {served} of {asked} samples had an output of {self._record.slots} "
                "epochs before, and the others added 0. In a resumed run, is load_state_dict called? With a "
                "DistributedSampler give gather=True, or each process a fixed part of the data; after a "
                "state without its table, or of other processes, it passes."
            )

    @property
    def _gathers(self) -> bool:
        return self.gather and _part()[1] > 1

    def _tell_of_part(self, part: list[int] | None) -> None:
        """A record of one process's samples is less than whole to another, or to another number of them."""
        if part is not None and part[1] > 1 and (self.gather or part != _part()):
            here = _part()
            lost = int((self._record.tags == NEVER).all(0).sum())
            warn(
                f"SAF: this state is of process {part[0]} of {part[1]} without gather=True, and is loaded in "
                f"process {here[0]} of {here[1]}{' with it' * self.gather}: {lost} of "
                f"{self._record.samples} samples have no output in it, and add 0 for {self._record.slots} "
                "epochs."
            )

    def _everyones(self, places: Tensor, rows: Rows) -> list[tuple[Tensor, Rows]]:
        """This process's batch or, with ``gather``, that of each, in one exchange."""
        if not self._gathers:
            return [(places, rows)]
        if self._exchange is None:
            self._exchange = Exchange(len(places), rows.values.device)
        return self._exchange(places, rows)


def _places(index: Any) -> Tensor:
    if isinstance(index, Tensor):
        return index.detach()
    try:
        return torch.tensor([operator.index(i) for i in index], dtype=torch.int64)
    except (TypeError, ValueError):
        raise OptxError(
            f"SAF: index is {shown(index)}; it must be whole numbers, one a sample, as optx.with_index puts "
            "them into each batch (of transformers' Trainer with remove_unused_columns=False)."
        ) from None


def _part() -> list[int]:
    """This process's number, and of how many."""
    if not (dist.is_available() and dist.is_initialized()):
        return [0, 1]
    return [dist.get_rank(), dist.get_world_size()]
