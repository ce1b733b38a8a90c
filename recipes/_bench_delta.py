"""``optx bench delta``: time and memory of pruning a fine-tuned checkpoint on the disk, or of merging some.

Two sharded checkpoints of random weights, shaped like a Llama's, are written to a temporary folder. A process
of its own then does ``Delta.between(base, tuned).dare(p).apply(base, out)``: it reads both and writes one.
(Or what ``--operation`` says; merges take the tuned one three times.) Its time stands beside that of copying
the one checkpoint, in rounds that take turns: by ``shutil.copyfile`` alone, which returns before the disk has
the bytes, and with ``fsync``, which optx does too. Memory is the most that the process has held resident,
above what it had after its imports and a first use of the kernels.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import optx

from . import _bench
from ._report import Table, console, tell

SHARD = 500_000_000
VOCABULARY = 32_000
SUBJECTS = ("copy", "copy and fsync", "optx")
MERGES: dict[str, Callable[[float], optx.MergeMethod]] = {
    "arithmetic": lambda p: optx.TaskArithmetic(lam=0.3),
    "ties": lambda p: optx.TIES(density=1 - p),
    "dare-linear": lambda p: optx.DARELinear(p=p),
    "dare-ties": lambda p: optx.DARETIES(p=p),
    "pcb": lambda p: optx.PCB(ratio=1 - p),
}
OPERATIONS = ("dare", "compress", *MERGES)


def shapes(size: float, itemsize: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Llama of about ``size`` bytes."""
    hidden = 2048 if size >= 1e9 else 512
    wide = hidden * 11 // 4
    embedding, layer = VOCABULARY * hidden, 4 * hidden**2 + 3 * hidden * wide + 2 * hidden
    yield "model.embed_tokens.weight", (VOCABULARY, hidden)
    for number in range(max(1, round((size / itemsize - 2 * embedding) / layer))):
        block = f"model.layers.{number}."
        for name in "qkvo":
            yield f"{block}self_attn.{name}_proj.weight", (hidden, hidden)
        for name, shape in (("gate", (wide, hidden)), ("up", (wide, hidden)), ("down", (hidden, wide))):
            yield f"{block}mlp.{name}_proj.weight", shape
        yield f"{block}input_layernorm.weight", (hidden,)
        yield f"{block}post_attention_layernorm.weight", (hidden,)
    yield "lm_head.weight", (VOCABULARY, hidden)


def write_pair(folder: Path, size: float, dtype: torch.dtype) -> int:
    """Write the checkpoints ``base`` and ``tuned``; gives the bytes of the largest tensor."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    used = largest = 0
    for name, shape in shapes(size, dtype.itemsize):
        count = torch.Size(shape).numel() * dtype.itemsize
        if used + count > SHARD and shards[-1]:
            shards.append({})
            used = 0
        shards[-1][name] = shape
        used, largest = used + count, max(largest, count)
    noise = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0))
    for kind, change in (("base", 0.0), ("tuned", 1e-3)):
        (folder / kind).mkdir()
        weights = (0.02 * noise + change * noise.flip(0)).to(dtype)
        index: dict[str, str] = {}
        for number, content in enumerate(shards, 1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            save_file(
                {name: _repeat(weights, shape) for name, shape in content.items()}, folder / kind / file
            )
            index |= dict.fromkeys(content, file)
        text = json.dumps({"metadata": {}, "weight_map": index})
        (folder / kind / "model.safetensors.index.json").write_text(text)
    return largest


def _repeat(numbers: Tensor, shape: tuple[int, ...]) -> Tensor:
    count = torch.Size(shape).numel()
    return numbers.repeat(-(-count // numbers.numel()))[:count].view(shape)


def copy(source: Path, target: Path, safe: bool) -> float:
    """Seconds of copying a folder's files."""
    start = time.perf_counter()
    target.mkdir()
    for file in sorted(source.iterdir()):
        shutil.copyfile(file, target / file.name)
        if safe:
            with (target / file.name).open("rb+") as written:
                os.fsync(written.fileno())
    return time.perf_counter() - start


def _resident() -> int:
    """Bytes that this process holds resident. Linux only, as is what follows."""
    return _status("VmRSS")


def _most_resident() -> int:
    """The most since `_forget_peak`. Not getrusage's: that starts at what the parent process held."""
    return _status("VmHWM")


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _status(what: str) -> int:
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{what}:")[1].split()[0])


def operate(operation: str, base: Any, tuned: Any, out: Path, p: float) -> None:
    """What is measured."""
    if operation in MERGES:
        optx.merge(base, [tuned] * 3, MERGES[operation](p), out)
        return
    delta = optx.Delta.between(base, tuned)
    if operation == "dare":
        delta.dare(p).apply(base, out)
    else:
        out.mkdir()
        optx.compress(delta, optx.ComPEFT(density=1 - p)).save(out / "delta.compeft")


def work(folder: Path, operation: str, p: float) -> dict[str, float]:
    """Measure in this process, after a first time with numbers enough for every kernel to be loaded."""
    draws = torch.Generator().manual_seed(0)
    few = {name: torch.randn(1 << 21, generator=draws).bfloat16() for name in ("w", "v")}
    operate(operation, few, {name: 2 * tensor for name, tensor in few.items()}, folder / "warm", p)
    _forget_peak()
    before, start, used = _resident(), time.perf_counter(), time.process_time()
    operate(operation, folder / "base", folder / "tuned", folder / "out", p)
    seconds = {"seconds": time.perf_counter() - start, "processor": time.process_time() - used}
    shutil.rmtree(folder / "warm")
    return {**seconds, "memory": _most_resident() - before}


def measure(folder: Path, operation: str, rounds: int, p: float) -> dict[str, list[float]]:
    """Seconds of each subject and bytes of ours, by round."""
    found: dict[str, list[float]] = {kind: [] for kind in (*SUBJECTS, "processor", "memory")}
    for number in range(rounds):
        first = number % len(SUBJECTS)  # one finds the memory that another freed
        for kind in SUBJECTS[first:] + SUBJECTS[:first]:
            os.sync()  # what the one before left to be written is not this one's
            if kind == "optx":
                ours = _in_its_own_process(folder, operation, p)
                found["optx"].append(ours["seconds"])
                found["processor"].append(ours["processor"])
                found["memory"].append(ours["memory"])
            else:
                found[kind].append(copy(folder / "tuned", folder / "out", kind != "copy"))
            shutil.rmtree(folder / "out")
    return found


def _in_its_own_process(folder: Path, operation: str, p: float) -> dict[str, float]:
    what = ["--work", str(folder), "--operation", operation, "--p", str(p)]
    command = [sys.executable, "-m", "optx.recipes._bench_delta", *what]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def tables(results: dict[str, Any]) -> list[Table]:
    """Time beside copying, and memory, one operation a row."""
    settings = results["settings"]
    rows: list[Sequence[str]] = []
    for operation, found in results["operations"].items():
        ratios = [
            statistics.median(a / b for a, b in zip(found["optx"], found[other], strict=True))
            for other in ("copy and fsync", "copy")
        ]
        times = [statistics.median(found[kind]) for kind in ("optx", "processor")]
        memory = f"{max(found['memory']) / 1e6:.0f} MB"
        rows.append((operation, *(f"{number:.2f}" for number in (*ratios, *times)), memory))
    return [
        Table(
            ("", "time / copy and fsync", "time / copy", "seconds", "processor", "peak memory"),
            rows,
            f"A {settings['dtype']} checkpoint of {results['size'] / 1e9:.2f} GB, p = {settings['p']}",
            f"Medians of {settings['rounds']} rounds: time as a share of copying the checkpoint, with and "
            "without waiting for the disk; seconds by the clock and of all threads. Memory: the most, above "
            f"the interpreter and its imports; the largest tensor: {results['largest'] / 1e6:.0f} MB. dare "
            "and compress change one checkpoint, the others merge three.",
        )
    ]


def options() -> ArgumentParser:
    """The benchmark's command line."""
    made = _bench.parser(
        "delta",
        __doc__,
        size={"type": float, "default": 2.0, "help": "GB of one checkpoint"},
        dtype={"choices": ("bfloat16", "float32"), "default": "bfloat16"},
        operation={"default": "dare", "help": f"comma-separated, of {', '.join(OPERATIONS)}"},
        p={"type": float, "default": 0.9, "help": "share dropped; the others keep a density of 1 - p"},
        rounds={"type": int, "default": 5},
        folder={"help": "where the temporary folder is made (default: the system's)"},
    )
    made.add_argument("--work", help=SUPPRESS)
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark; see ``optx bench delta --help``."""
    args = _bench.parsed(options(), arguments)
    if args.work:
        print(json.dumps(work(Path(args.work), args.operation, args.p)))
        return
    _refuse(args)
    with tempfile.TemporaryDirectory(prefix="optx-bench-", dir=args.folder) as name:
        folder = Path(name)
        largest = write_pair(folder, args.size * 1e9, getattr(torch, args.dtype))
        size = sum(file.stat().st_size for file in (folder / "base").iterdir())
        measured = {o: measure(folder, o, args.rounds, args.p) for o in args.operation.split(",")}
    found = _bench.results(options(), args, size=size, largest=largest, operations=measured)
    console.print(_bench.heading(found))
    tell(tables(found))


def _refuse(args: Namespace) -> None:
    """Stop before anything is written."""
    if unknown := [name for name in args.operation.split(",") if name not in OPERATIONS]:
        options().error(f"--operation: {unknown[0]!r} is not one of {', '.join(OPERATIONS)}")
    if sys.platform != "linux":
        options().error("it reads memory from /proc, so it needs Linux")
    free, needed = shutil.disk_usage(args.folder or tempfile.gettempdir()).free, 3.1e9 * args.size
    if free < needed:
        options().error(f"--size {args.size} needs {needed / 1e9:.1f} GB of disk; {free / 1e9:.1f} are free")


if __name__ == "__main__":
    main()
