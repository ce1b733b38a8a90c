"""README's "With your trainer": each snippet runs as it is printed, on what a user has before it."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import optx

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "README.md").read_text().split("## With your trainer\n")[1].split("\n## ")[0]
BLOCKS = re.findall(r"```python\n(.*?)```", SECTION, flags=re.DOTALL)
TRAINER, TRL, ACCELERATE, LIGHTNING, TORCHRUN, CONFIG = BLOCKS


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def ran(block: str, **names: Any) -> dict[str, Any]:
    """What a snippet made."""
    found: dict[str, Any] = {"torch": torch, "optx": optx, **names}
    exec(block, found)
    return found


def trained(model: nn.Module, opt: Any) -> None:
    """One step moves what is to be trained."""
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    model(torch.ones(2, 4)).square().sum().backward()
    opt.step()
    assert any(
        not torch.equal(p, old) for p, old in zip(filter(wanted, model.parameters()), before, strict=True)
    )


def wanted(p: torch.Tensor) -> bool:
    return p.requires_grad


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes))


@pytest.mark.parametrize("library", ["transformers", "trl"])
def test_trainers(library: str, llama: nn.Module, tmp_path: Path) -> None:
    import transformers

    common = {
        "max_steps": 2,
        "save_steps": 2,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    model = copy.deepcopy(llama)
    handle = optx.attach(model, optx.LoRA(rank=2))
    optx.trainable_only(model, handle)
    rows = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}] * 16
    names: dict[str, Any] = {"model": model, "handle": handle, "data": rows}
    if library == "transformers":
        args = transformers.TrainingArguments(str(tmp_path), **common)
        made = ran(TRAINER, Trainer=transformers.Trainer, args=args, **names)
    else:
        trl = pytest.importorskip("trl")
        from datasets import Dataset

        args = trl.SFTConfig(str(tmp_path), bf16=False, **common)
        before = ran(TRAINER.partition("trainer =")[0], **names)
        rest = {"made": before["made"], "callback": before["callback"], "handle": handle}
        sft = lambda model, *a, **k: trl.SFTTrainer(model, *a, processing_class=tokenizer(), **k)  # noqa: E731
        made = ran(TRL, SFTTrainer=sft, args=args, model=model, data=Dataset.from_list(rows), **rest)
    made["trainer"].train()
    files = {file.name for file in (tmp_path / "checkpoint-2").iterdir()}
    assert "adapter_model.safetensors" in files
    assert "model.safetensors" not in files
    assert made["trainer"].optimizer.optimizer.transforms[0].name == "perp_grad"


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {word: n for n, word in enumerate(["<pad>", "</s>", *map(str, range(14))])}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>")


def test_accelerate(tmp_path: Path) -> None:
    from accelerate import Accelerator

    accelerator, model = Accelerator(cpu=True), net()
    handle = optx.attach(model, optx.LoRA(rank=1), targets="0")
    optx.trainable_only(model, handle)
    opt = optx.wrap(torch.optim.AdamW(handle.parameters()), optx.PerpGrad())
    made = ran(ACCELERATE, model=model, opt=opt, handle=handle, accelerator=accelerator)
    trained(made["model"], made["opt"])
    accelerator.save_state(str(tmp_path))
    assert (tmp_path / "optx_adapter.safetensors").exists() or (
        tmp_path / "adapter_model.safetensors"
    ).exists()
    assert not (tmp_path / "model.safetensors").exists()


def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = net()
            self.handle = optx.attach(self.net, optx.LoRA(rank=1), targets="0")
            optx.trainable_only(self.net, self.handle)

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            return self.net(batch).square().mean()

    class Quiet:
        LightningModule = lightning.LightningModule

        @staticmethod
        def Trainer(**given: Any) -> Any:
            quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
            return lightning.Trainer(accelerator="cpu", default_root_dir=tmp_path, **quiet, **given)

    made = ran(LIGHTNING, lightning=Quiet, Module=Module)
    module = made["Tuned"]()
    made["trainer"].fit(module, torch.ones(4, 2, 4))
    made["trainer"].save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"]
    assert any("lora" in name for name in saved)
    assert "net.2.weight" not in saved


@pytest.mark.usefixtures("group_of_one")
def test_torchrun() -> None:
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    made = ran(TORCHRUN, model=net(), fully_shard=lambda model: fully_shard(model, mesh=mesh))
    trained(made["model"], made["opt"])
    assert "on local shards" in str(made["opt"].plan())


def test_config() -> None:
    made = ran(CONFIG, model=(model := net()))
    trained(model, made["optimizer"])
    assert made["optimizer"].adamr.weight == 0.05
