"""One recipe on several processes, as torchrun starts them: whose part is which, one voice, one file.

Every process runs the same lines. `Team` is what differs: alone, its methods change nothing, so that a loop
reads the same. It starts no process: torchrun does, or whatever sets ``RANK`` and ``WORLD_SIZE`` as it does
(``accelerate launch``, Kubeflow, Ray); recipes/README.md says how.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from optx.integrations._metrics import begin

from ._report import console

T = TypeVar("T")

FSDP: dict[str, Any] = {"action": "store_true", "help": "under torchrun: share out the weights too (FSDP2)"}
"""The option of recipes that can share out their weights; without it every process has them all (DDP)."""

WEIGHTS = ("model", "optimizer")
"""Entries of a checkpoint that only the first process reads and holds whole."""


def processes() -> int:
    """How many processes torchrun, or another launcher, has started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


class Team:
    """The processes that run a recipe together.

    Args:
        rank: this process's number.
        size: how many there are.
        engine: what they train by: ``"DDP"`` or ``"FSDP2"``; None for a process that nobody joins.
    """

    def __init__(self, rank: int = 0, size: int = 1, engine: str | None = None) -> None:
        self.rank, self.size, self.engine = rank, size, engine

    @property
    def leads(self) -> bool:
        """Whether this is the process that prints and writes files."""
        return self.rank == 0

    @property
    def about(self) -> dict[str, Any]:
        """What results.json says of it."""
        return {"processes": self.size, "engine": self.engine} if self.engine else {}

    def spread(self, model: nn.Module, idle: bool = False) -> nn.Module:
        """The model as the training loop calls it: averaging gradients (DDP), or sharded in place (FSDP2).

        Optimizers are made after it, since sharding replaces the parameters. From here on each process draws
        random numbers of its own.

        Args:
            model: a whole one on every process; all get the weights of the first.
            idle: some weights will get no gradient in a step, as the half that HFT freezes; DDP has to look
                for them.
        """
        if self.engine:
            torch.manual_seed(torch.initial_seed() + self.rank)  # or all would drop out the same places
        if self.engine == "DDP":
            return nn.parallel.DistributedDataParallel(model, find_unused_parameters=idle)
        if self.engine == "FSDP2":
            from torch.distributed.fsdp import fully_shard

            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor.detach(), 0)  # DDP does; sharding would join parts of different models
            for block in blocks(model):
                fully_shard(block)
            fully_shard(model)
        return model

    def measured(self, optimizer: Optimizer) -> Optimizer:
        """An optimizer whose numbers the first process shows: sums over shards are taken by all together."""
        if self.engine == "FSDP2":
            begin([optimizer])
        return optimizer

    def divides(self, batch: int) -> None:
        """Raise unless every process gets as much of a batch as the others: means would not be the mean."""
        if batch % self.size:
            fits = -(-batch // self.size) * self.size
            raise SystemExit(
                f"--batch {batch}: it is all processes' together, and they are {self.size}. "
                f"Give a multiple of {self.size}, as --batch {fits}."
            )

    def share(self, batch: Tensor) -> Tensor:
        """This process's rows of a batch that all have."""
        return batch.chunk(self.size)[self.rank]

    def mean(self, loss: Tensor) -> float:
        """The mean of what every process has, as a number; each has as many rows."""
        if self.engine:
            loss = loss.detach().clone()
            dist.all_reduce(loss)
            loss /= self.size
        return loss.item()

    def agrees(self, wanted: bool) -> bool:
        """Whether any process wants it: a signal reaches them in different steps."""
        if not self.engine:
            return wanted
        found = torch.tensor(int(wanted), device="cuda" if torch.cuda.is_available() else "cpu")
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return bool(found)

    def together(self) -> None:
        """Wait for the others."""
        self.agrees(False)

    def told(self, work: Callable[[], T]) -> T:
        """What the first process finds out, on all of them; what it raises ends all of them."""
        if not self.engine:
            return work()
        found: list[Any] = [None, 1]
        try:
            if self.leads:
                found = [work(), 0]
        finally:
            dist.broadcast_object_list(found)
        if found[1]:
            raise SystemExit(1)  # the first process says why
        return found[0]

    def gathered(self, mine: T) -> list[T]:
        """What every process has, in their order."""
        found: list[Any] = [mine] * self.size
        if self.engine:
            dist.all_gather_object(found, mine)
        return found

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """One process of each machine first, which downloads what the others then find there."""
        leads_here = int(os.environ.get("LOCAL_RANK", "0")) == 0
        if not leads_here:
            self.together()
        yield
        if leads_here:
            self.together()

    @contextmanager
    def whole(self, model: nn.Module) -> Iterator[None]:
        """The model with all its weights on every process, to measure it: each measures everything.

        It takes the memory of the weights, and saves a gathering of them for each token of an answer.
        """
        if self.engine != "FSDP2":
            yield
            return
        from torch.distributed.fsdp import FSDPModule

        shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for shard in shards:
            shard.set_reshard_after_forward(False, recurse=False)
            shard.unshard()
        try:
            yield
        finally:
            for shard in shards:
                shard.reshard()
                shard.set_reshard_after_forward(shard is not model, recurse=False)

    def states(self, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        """What a checkpoint needs of both, whole, on the first process: any number of them can load it."""
        from torch.distributed.checkpoint import state_dict

        options = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)
        found = state_dict.get_state_dict(model, optimizer, options=options)
        return dict(zip(WEIGHTS, found, strict=True))

    def restore(self, model: nn.Module, optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
        """Load what `states` gave; the first process has it, and sends each of the others its part."""
        from torch.distributed.checkpoint import state_dict

        options = state_dict.StateDictOptions(
            full_state_dict=True, broadcast_from_rank0=self.engine is not None
        )
        weights, state = (saved.get(name, {}) for name in WEIGHTS)
        # Not by set_state_dict: without weights, as on all processes but the first, it leaves the model out.
        state_dict.set_model_state_dict(model, weights, options=options)
        state_dict.set_optimizer_state_dict(model, optimizer, state, options=options)


ALONE = Team()
"""The team of a process that nobody joins."""


def distance(weights: Iterable[Tensor], others: Iterable[Tensor]) -> float:
    """Between two lists of weights, in L2; sums over shards are completed, so that all have to take part."""
    pairs = zip(weights, others, strict=True)
    squares: list[Any] = [(a.detach() - b).square().sum() for a, b in pairs]
    return sum(float(s.full_tensor() if hasattr(s, "full_tensor") else s) for s in squares) ** 0.5


def blocks(model: nn.Module) -> list[nn.Module]:
    """What FSDP2 gathers and frees one after the other: a model's outermost lists' members, as its layers."""
    found: list[nn.Module] = []
    for child in model.children():
        found += list(child) if isinstance(child, nn.ModuleList) else blocks(child)
    return found


@contextmanager
def team(
    options: argparse.ArgumentParser, argv: Sequence[str] | None
) -> Iterator[tuple[Team, argparse.Namespace]]:
    """This process's team and its command line, for as long as the recipe runs.

    The first process speaks for all: the others print nothing of their own, and end without a word where it
    says what is wrong.
    """
    rank, size = int(os.environ.get("RANK", "0")), processes()
    _check_launcher(size)
    leads, quiet = rank == 0, console.quiet
    console.quiet = quiet or not leads
    try:
        with _silent(not leads):
            args = options.parse_args(argv)
        fsdp = getattr(args, "fsdp", False)
        if "RANK" not in os.environ:
            if fsdp:
                raise SystemExit(_how_to_start(options, argv))
            yield ALONE, args
            return
        # Accelerate's launcher asks for weights on the first process alone, for its own FSDP to send around.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        with _group():
            yield Team(rank, size, "FSDP2" if fsdp else "DDP"), args
    except SystemExit as stopped:
        if leads:
            raise
        time.sleep(1)  # torchrun ends all as soon as one has ended: let the first one speak
        raise SystemExit(stopped.code if isinstance(stopped.code, int) else 1) from None
    finally:
        console.quiet = quiet


@contextmanager
def _group() -> Iterator[None]:
    """The process group, and this process's GPU; a group that is there already is used and left."""
    if torch.cuda.is_available():
        local, found = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= found:
            raise SystemExit(
                f"torchrun started more processes on this machine than it has GPUs ({found}): give "
                f"--nproc-per-node {found}, or hide them with CUDA_VISIBLE_DEVICES= to train on the CPU."
            )
        torch.cuda.set_device(local)
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _silent(wanted: bool) -> Iterator[None]:
    """Without what argparse prints."""
    nowhere = io.StringIO()
    with contextlib.ExitStack() as redirected:
        if wanted:
            redirected.enter_context(contextlib.redirect_stdout(nowhere))
            redirected.enter_context(contextlib.redirect_stderr(nowhere))
        yield


def _how_to_start(options: argparse.ArgumentParser, argv: Sequence[str] | None) -> str:
    name = options.prog.split()[-1]
    given = " ".join(sys.argv[1:] if argv is None else argv)
    return (
        "--fsdp: it shares out the weights among processes, and this is one alone. Start them with\n"
        f"    torchrun --nproc-per-node 2 -m optx.recipes.{name} {given}"
    )


def _check_launcher(size: int) -> None:
    """Raise where a launcher started several processes that would all think they are alone."""
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        if size == 1 and int(os.environ.get(name, "1")) > 1:
            raise SystemExit(
                f"{name} is {os.environ[name]}, but nobody said who is who (RANK, WORLD_SIZE): start one "
                "torchrun on each machine, and let it start the processes, as in "
                "`srun --ntasks-per-node 1 torchrun --nnodes ... -m optx.recipes.finetune`."
            )
