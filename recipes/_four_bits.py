"""A model whose linear modules are in 4 bits: loading, adapters on it, what a merge costs, and memory."""

from __future__ import annotations

import gc
import json
import math
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import optx

from . import _assets, _text
from ._run import SettingsError, device

TARGETS = r".*_proj"
"""All linear modules of the blocks, as in the paper."""


def load(name: str | None) -> tuple[nn.Module, Any]:
    """A causal language model with its linear modules in nf4, but for the head; and its tokenizer."""
    from transformers import BitsAndBytesConfig

    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise SettingsError("qlora: it needs bitsandbytes: pip install 'optx-torch[qlora]'") from None
    config: Any = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return _assets.language_model(name, quantization_config=config, device_map={"": device()})


def text(tokenizer: Any, args: Namespace) -> _text.TextData:
    """Blocks to train on and to measure with."""
    return _text.load(tokenizer, Namespace(**vars(args), general=args.data))


@torch.no_grad()
def loss_on(model: nn.Module, blocks: Tensor) -> float:
    """Mean loss per token, in training mode: in eval mode bitsandbytes repacks codes on some processors."""
    total = 0.0
    for tokens in blocks.to(device()).split(4):
        total += float(model(input_ids=tokens, labels=tokens).loss) * len(tokens)
    return total / len(blocks)


# ---- adapters --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Site:
    """One served module: its factors, and where its weight is."""

    A: Tensor
    B: Tensor
    scale: float
    owner: nn.Module

    def weight(self) -> Tensor:
        """What the codes stand for now, by bitsandbytes."""
        from bitsandbytes.functional import dequantize_4bit

        codes: Any = self.owner.weight
        return dequantize_4bit(codes.data, codes.quant_state).float()


@dataclass(frozen=True)
class Adapted:
    """A model with LoRA on it, whoever put it there."""

    model: nn.Module
    sites: Mapping[str, Site]
    parameters: list[nn.Parameter]
    merge: Callable[[], Any]
    save: Callable[[str], Any]

    def start(self, seed: int) -> None:
        """Give every A values that depend on its place and the seed alone, as LoRA's own, and every B "
        "zeros."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _, site in sorted(self.sites.items()):
                bound = site.A.shape[1] ** -0.5
                site.A.copy_(torch.empty(site.A.shape).uniform_(-bound, bound, generator=generator))
                site.B.zero_()

    @torch.no_grad()
    def merge_error(self) -> dict[str, float]:
        """Merge; how far the merged weights are from base plus change, in all and as the largest element."""
        changes = {path: site.scale * (site.B @ site.A) for path, site in self.sites.items()}
        exact = {path: site.weight() + changes[path] for path, site in self.sites.items()}
        self.merge()
        off = {path: site.weight() - exact[path] for path, site in self.sites.items()}
        return {
            "relative": _norm(off) / _norm(exact),
            "of_change": _norm(off) / _norm(changes),
            "largest": max(float(t.abs().max()) for t in off.values()),
        }

    def bytes_on_disk(self) -> int:
        """Of the adapter's file."""
        with tempfile.TemporaryDirectory() as folder:
            self.save(folder)
            return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


Arm = Callable[[nn.Module, Namespace], Adapted]
"""What puts an adapter on a model."""


def _norm(tensors: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors.values()))


def of_handle(model: nn.Module, handle: optx.Handle) -> Adapted:
    """What `optx.attach` returned."""
    sites: dict[str, Site] = {}
    for one in handle.served:
        part: Any = one.part
        sites[one.path] = Site(part.A, part.B, part.scale, one.module)
    return Adapted(model, sites, handle.parameters(), handle.merge, handle.save)


def of_peft(model: Any) -> Adapted:
    """A model of PEFT's."""
    sites: dict[str, Site] = {}
    for path, layer in model.base_model.model.named_modules():
        if hasattr(layer, "lora_A"):
            A, B = (factors["default"].weight for factors in (layer.lora_A, layer.lora_B))
            sites[path] = Site(A, B, layer.scaling["default"], layer.get_base_layer())
    trained = [p for p in model.parameters() if p.requires_grad]
    return Adapted(model, sites, trained, model.merge_adapter, model.save_pretrained)


# ---- memory ----------------------------------------------------------------------------------------------


def base_bytes(model: nn.Module) -> int:
    """Of a model's weights, scales and tables of its codes among them."""
    total = 0
    for p in model.parameters():
        total += p.numel() * p.element_size()
        if (state := getattr(p, "quant_state", None)) is not None:
            held = (t for t in state.as_dict(packed=True).values() if isinstance(t, Tensor))
            total += sum(t.numel() * t.element_size() for t in held)
    return total


def measured(arm: str, args: Namespace) -> dict[str, float]:
    """Bytes of the base, and the most that a process held while it trained; in a process of its own."""
    asked = {name: value for name, value in vars(args).items() if name not in ("out", "resume", "overwrite")}
    call = f"_four_bits.train_and_tell(qlora.ARMS, {arm!r}, {json.dumps(asked)!r})"
    code = f"from optx.recipes import _four_bits, qlora; {call}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SettingsError(f"qlora: memory of {arm} could not be measured: {done.stderr.strip()[-300:]}")
    return json.loads(done.stdout.splitlines()[-1])


def train_and_tell(arms: Mapping[str, Arm], arm: str, settings: str) -> None:
    """Three steps; ``peak`` and ``before`` are of the process, on Linux, and None elsewhere."""
    args = Namespace(**json.loads(settings))
    model, tokenizer = _assets.language_model(args.model) if arm == "float32" else load(args.model)
    for p in model.parameters():
        if p.is_floating_point():
            p.data = p.data.clone()  # else it is a view of the file, all of which would be counted
    base = base_bytes(model)
    adapted = arms["optx" if arm == "float32" else arm](model, args)
    data = text(tokenizer, args)
    optimizer = torch.optim.AdamW(adapted.parameters, lr=args.lr)
    gc.collect()
    before = _reset_peak()
    for step in range(3):
        tokens = data.batch(step, args.batch, 0)
        adapted.model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(json.dumps({"base": base, "before": before, "peak": _status("VmHWM")}))


def _reset_peak() -> int | None:
    """Give freed memory back and let the process's peak begin anew; what it holds now."""
    import ctypes

    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status("VmRSS")


def _status(name: str) -> int | None:
    """A line of the kernel's about this process, in bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
