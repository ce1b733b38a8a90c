"""AdaWPT's half of the recipe ``skip``: deblurring images of which one or two cells are blurred.

A small network of window attention adds to an image what its windows make of it. Blurred cells are windows,
so the right answer is to compute one or two of sixteen and to leave the rest alone. Arms: dense; pruned, with
the pruning loss; and pruned without it, where nothing says that a window should be dropped.

Source: "Adaptive Window Pruning for Efficient Local Motion Deblurring", arXiv 2306.14268.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import optx

from ._report import Table, by_seed, ranged
from ._run import Run

ARMS = ("windows dense", "windows pruned", "windows without the loss")
SIDE, CELL, BATCH, SHOWN = 32, 8, 16, 3


def images(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Blurred images, the sharp ones, and which pixels are blurred: (count, 1, 32, 32) each."""

    def random(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator)

    y, x = torch.meshgrid(torch.arange(float(SIDE)), torch.arange(float(SIDE)), indexing="ij")
    across, down, phase = 0.6 + 0.4 * random(2, 1, 1), random(2, 1, 1) - 0.5, 6.28 * random(2, 1, 1)
    waves = (across * x + down * y + phase).sin().mean(1, keepdim=True)
    centre, radius = SIDE * random(4, 2, 1, 1), 2 + 6 * random(4, 1, 1)
    far = ((x - centre[:, :, 0]) ** 2 + (y - centre[:, :, 1]) ** 2).sqrt()
    discs = ((2 * random(4, 1, 1) - 1) * torch.sigmoid(2 * (radius - far))).sum(1, keepdim=True)
    sharp = (0.5 + 0.4 * waves + 0.2 * discs).clamp(0, 1)
    moved = F.avg_pool2d(F.pad(sharp, (2, 2, 0, 0), mode="replicate"), (1, 5), stride=1)
    cells = random(16).argsort(1) < 1 + (random(1) < 0.5).long()
    mask = cells.view(-1, 1, 4, 4).repeat_interleave(CELL, 2).repeat_interleave(CELL, 3)
    return torch.where(mask, moved, sharp), sharp, mask


class Attention(nn.Module):
    """Two heads within a window, with a bias for each pair of its places."""

    def __init__(self, dim: int, window: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.bias = nn.Parameter(torch.zeros(2, window**2, window**2))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(n, tokens, C)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        bias = self.bias if mask is None else self.bias + mask[:, None]
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A block as Swin's, whose parts optx knows by their names."""

    def __init__(self, dim: int, window: int) -> None:
        super().__init__()
        self.window_size, self.shift_size = window, 0
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(dim), Attention(dim, window), nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C)."""
        w = self.window_size
        cut = self.norm1(x).unflatten(1, (-1, w)).unflatten(3, (-1, w)).transpose(2, 3)
        out = self.attn(cut.flatten(0, 2).flatten(1, 2)).view(cut.shape)
        x = x + out.transpose(2, 3).reshape(x.shape)
        return x + self.mlp(self.norm2(x))


class Deblur(nn.Module):
    """Tokens of 2 x 2 pixels, two stages; what they have become, and not what they were, is added."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        stem = nn.Conv2d(1, dim, 5, padding=2), nn.GELU(), nn.Conv2d(dim, dim, 2, stride=2)
        self.embed = nn.Sequential(*stem)
        self.stages = nn.ModuleList(nn.ModuleList(Block(dim, 4) for _ in range(2)) for _ in range(2))
        self.head = nn.Linear(dim, 4, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 1, H, W), and so it comes out."""
        start = x = self.embed(4 * image - 2).permute(0, 2, 3, 1)
        for stage in self.stages:
            for block in stage:  # type: ignore[attr-defined]
                x = block(x)
        return image + F.pixel_shuffle(self.head(x - start).permute(0, 3, 1, 2), 2)


def train(arm: str, seed: int, args: Any, run: Run) -> dict[str, Any] | None:
    """One training run; None if interrupted."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = Deblur()
    handle = None if arm == "windows dense" else optx.attach(model, optx.WindowPrune())
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.window_steps)
    model.train()
    for _ in run.steps(f"{arm}, seed {seed}", 0, args.window_steps):
        blurred, sharp, mask = images(BATCH, generator)
        error = (model(blurred) - sharp).abs()
        loss = error.mean() + error[mask].mean()  # the paper too weights what is blurred
        if handle is not None:
            loss = loss + args.window_loss * (arm == "windows pruned") * handle.loss(mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return (
        None if run.interrupt.wanted else measured(model.eval(), handle, (arm, seed) == (ARMS[1], args.seed))
    )


@torch.no_grad()
def measured(model: nn.Module, handle: optx.WindowHandle | None, shown: bool) -> dict[str, Any]:
    """How a model does on 256 new images, what it computes of them, and how long it takes for one."""
    blurred, sharp, mask = images(256, torch.Generator().manual_seed(10**6))
    output = model(blurred)
    found: dict[str, Any] = {
        "blurred": _psnr(output, sharp, mask),
        "sharp": _psnr(output, sharp, ~mask),
        "input": _psnr(blurred, sharp, mask),
    }
    if handle is not None:
        kept = torch.cat(list(handle.decisions.values()), 1).float()
        true = F.max_pool2d(mask.float(), CELL).expand_as(kept)
        right = float((kept * true).sum())
        found["active"] = handle.active_ratio()
        found["precision"], found["recall"] = right / max(1.0, float(kept.sum())), right / float(true.sum())
        found["macs"] = handle.cost().share
        if shown:
            found["pictures"] = [_row(one[:SHOWN]) for one in (blurred, output, sharp)]
            found["kept"] = handle.decisions["stages.0.0"][:SHOWN].int().flatten(1).tolist()
    found["ms"] = 1e3 * median_time(lambda: model(blurred[:1]))
    return found


def _psnr(output: Tensor, sharp: Tensor, where: Tensor) -> float:
    """Of the pixels there, all images together; 100 where all are equal."""
    error = float((output - sharp)[where].square().mean())
    return min(100.0, float(-10 * torch.tensor(max(error, 1e-10)).log10()))


def _row(images: Tensor) -> list[str]:
    """Images beside one another, a line of bytes for each row of pixels."""
    row = (255 * torch.cat(list(images[:, 0]), dim=-1).clamp(0, 1)).round().byte()
    return [bytes(line.tolist()).hex() for line in row]


def median_time(call: Callable[[], Any], rounds: int = 25) -> float:
    """The median time of a call, after three."""
    times: list[float] = []
    for number in range(rounds + 3):
        begin = perf_counter()
        call()
        times += [perf_counter() - begin] * (number >= 3)
    return statistics.median(times)


@torch.no_grad()
def seconds(args: Any) -> dict[str, Any]:
    """transformers' Swin2SR (its lightweight form, two stages) on one image of 64 x 64, by the share kept."""
    from transformers import Swin2SRConfig, Swin2SRModel

    torch.manual_seed(0)
    config = Swin2SRConfig(image_size=64, embed_dim=60, depths=[6, 6], num_heads=[6, 6], patch_size=1)
    model, image = Swin2SRModel(config).eval(), torch.rand(1, 3, 64, 64)
    handle = optx.attach(model, optx.WindowPrune())
    model(image)
    shapes = {path: one.shape for path, one in handle.decisions.items()}
    times: dict[str, list[float]] = {}
    macs: dict[str, float] = {}
    for number in range(args.window_rounds + 1):
        for share in ("dense", "1.0", "0.5", "0.25"):
            if share == "dense":
                handle.disable()
            else:
                handle.enable()
                handle.force(_policy(shapes, float(share)))
            begin = perf_counter()
            model(image)
            times.setdefault(share, [])
            times[share] += [perf_counter() - begin] * bool(number)
            macs[share] = 1.0 if share == "dense" else handle.cost().share
    dense = statistics.median(times["dense"])
    return {
        "ms": dense * 1e3,
        "time": {share: statistics.median(all_) / dense for share, all_ in times.items()},
        "macs": macs,
    }


def _policy(shapes: Mapping[str, Any], share: float) -> dict[str, Tensor]:
    """Every block keeps this share of its windows, drawn."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Tensor] = {}
    for path, shape in shapes.items():
        order = torch.rand(shape, generator=generator).flatten().argsort()
        found[path] = (order < share * len(order)).view(shape)
    return found


def tables(results: dict[str, Any]) -> list[Table]:
    """How each arm ended, and what a large model gains."""
    logs = {arm: found for arm, found in by_seed(results["arms"]).items() if arm in ARMS}
    settings, timed = results["settings"], results["window_seconds"]
    first = next(iter(logs.values()), [{"input": 0.0}])[0]
    rows = [(arm.removeprefix("windows "), *_cells(found)) for arm, found in logs.items()]
    return [
        Table(
            ("", "PSNR, blurred", "PSNR, sharp", "kept", "precision", "recall", "multiply-adds", "ms"),
            rows,
            f"Deblurring one or two of 16 cells: {settings['window_steps']} steps of {BATCH} images",
            "Mean and, in brackets, range over seeds. PSNR in dB of 256 new images, "
            f"in blurred cells {first['input']:.1f} before. Kept: the share of windows computed, of all "
            "blocks; precision and recall: against the blurred cells. Multiply-adds: of the blocks, "
            "predictors included, as a share of dense. Pruned: with the pruning loss at "
            f"{settings['window_loss']}. Ms: one image.",
        ),
        Table(
            ("Swin2SR, windows kept", *timed["time"]),
            [
                ("time, to dense", *(f"{v:.2f}" for v in timed["time"].values())),
                ("multiply-adds, to dense", *(f"{v:.2f}" for v in timed["macs"].values())),
            ],
            f"transformers' Swin2SR, 12 blocks of 60 channels: an image of 64 x 64 in {timed['ms']:.0f} ms",
            "Medians, all in turn. Predictors run on every token, in four of the blocks.",
        ),
    ]


def _cells(logs: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    def each(name: str, form: str) -> str:
        return ranged([log[name] for log in logs], form) if name in logs[0] else ""

    forms = {"blurred": "{:.1f}", "sharp": "{:.1f}", "active": "{:.0%}", "precision": "{:.2f}"}
    return tuple(
        each(*one) for one in {**forms, "recall": "{:.2f}", "macs": "{:.0%}", "ms": "{:.2f}"}.items()
    )


def draw(axes: Any, results: dict[str, Any]) -> None:
    """Blurred images with the kept windows drawn, what came out, and the sharp ones, from above."""
    found = [log for log in results["arms"].values() if "pictures" in log and log["precision"]]
    axes.axis("off")
    if not found:
        return
    pictures = [bytes.fromhex(line) for picture in found[0]["pictures"] for line in picture]
    rows = [[grey & 0xF0 for grey in line] for line in pictures]  # the page's picture has 128 colours for all
    axes.imshow(rows, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    for number, kept in enumerate(found[0]["kept"]):
        for place in (place for place, one in enumerate(kept) if one):
            corner = SIDE * number + CELL * (place % 4) - 0.5, CELL * (place // 4) - 0.5
            axes.add_patch(_frame(corner))


def _frame(corner: tuple[float, float]) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(corner, CELL, CELL, fill=False, edgecolor="#D55E00", linewidth=1.4)
