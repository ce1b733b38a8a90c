"""`optx.integrations.lightning`: checkpoints of adapters, metrics in loggers, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import optx

pytest.importorskip("lightning")

from accelerate_run import same, spoil
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning_run import trainer

from optx.integrations.lightning import OptxCallback, adapters_only

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
]
BATCHES = [torch.randn(4, 6, generator=torch.Generator().manual_seed(i)) for i in range(4)]


class Module(LightningModule):
    """Linear layers with an adapter, trained by one optimizer."""

    def __init__(self, keeps: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.Linear(8, 2))
        self.handle = optx.attach(self.net, optx.LoRA(rank=2), targets="0|3")
        optx.trainable_only(self.net, self.handle)
        if keeps:
            adapters_only(self, self.handle)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return optx.wrap(torch.optim.AdamW(self.handle.parameters(), lr=0.05), optx.PerpGrad())


class Manual(Module):
    """Two optimizers, each at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, index: int) -> None:  # type: ignore[override]
        for opt in self.optimizers():  # type: ignore[union-attr]
            opt.zero_grad()
            self.manual_backward(self.net(batch).square().mean())
            self.clip_gradients(opt, 0.1, "norm")
            opt.step()

    def configure_optimizers(self) -> Any:
        first, second = self.handle.parameters()[:2], self.handle.parameters()[2:]
        return [
            optx.wrap(torch.optim.AdamW(first, lr=0.05), optx.PerpGrad()),
            optx.wrap(torch.optim.SGD(second, lr=0.1), optx.PerpGrad()),
        ]


def loader() -> DataLoader[Any]:
    return DataLoader(BATCHES, batch_size=None)  # type: ignore[arg-type]


def fit(folder: Path, module: Module, *callbacks: Any, resume: Path | None = None, **options: Any) -> Trainer:
    made = trainer(folder, *callbacks, **{"accumulate_grad_batches": 1, **options})
    made.fit(module, loader(), ckpt_path=resume)
    return made


def saved(file: Path) -> dict[str, Any]:
    return torch.load(file, weights_only=True)


def adapter_names(module: Module) -> set[str]:
    return {f"net.{name}" for name, _ in module.handle.named_parameters()}


# ---- resumed ----------------------------------------------------------------------------------------------


@pytest.mark.long(keep=3)
@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"precision": "bf16-mixed", "accumulate_grad_batches": 2, "gradient_clip_val": 0.1}, 2),
        ({"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}, 4),
        ({"precision": "bf16-true"}, 4),
    ],
    ids=["bf16-mixed", "clipped by value", "bf16-true"],
)
def test_automatic_optimization_resumes(options: dict[str, Any], steps: int, tmp_path: Path) -> None:
    whole, again = Module(), Module()
    fit(tmp_path, whole, OptxCallback(whole.handle), **options)
    spoil(again)
    torch.manual_seed(0)
    resume = tmp_path / f"epoch=0-step={steps}.ckpt"
    fit(tmp_path / "b", again, OptxCallback(again.handle), resume=resume, **options)
    assert same(whole, again)
    statistics = {f"net.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    for last in (tmp_path / "last.ckpt", tmp_path / "b" / "last.ckpt"):
        held = saved(last)["state_dict"]
        assert set(held) == adapter_names(whole) | statistics | {"optx_adapters_only"}


def test_a_scaler_and_manual_optimization_of_two_optimizers(tmp_path: Path) -> None:
    from lightning.pytorch.plugins import MixedPrecision

    def options() -> dict[str, Any]:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=2)
        return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)], "gradient_clip_val": 0.1}

    for kind, more in ((Module, options), (Manual, lambda: {"gradient_clip_val": None})):
        folder = tmp_path / kind.__name__
        whole, again = kind(), kind()
        fit(folder, whole, OptxCallback(whole.handle), **more())
        spoil(again)
        torch.manual_seed(0)
        step = 8 if kind is Manual else 4
        fit(
            folder / "b",
            again,
            OptxCallback(again.handle),
            resume=folder / f"epoch=0-step={step}.ckpt",
            **more(),
        )
        assert same(whole, again)
        assert len(saved(folder / "last.ckpt")["optimizer_states"]) == (2 if kind is Manual else 1)


def test_a_module_is_loaded_from_what_was_saved(tmp_path: Path) -> None:
    module = Module(keeps=True)
    made = fit(tmp_path, module, OptxCallback(module.handle, folders=True))
    loaded = Module.load_from_checkpoint(tmp_path / "last.ckpt", keeps=True)
    assert same(loaded, module)
    assert all(map(torch.equal, loaded.net.state_dict().values(), module.net.state_dict().values()))
    made.save_checkpoint(tmp_path / "after.ckpt", weights_only=True)
    assert set(saved(tmp_path / "after.ckpt")["state_dict"]) == set(module.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key|optx_adapters_only"):
        Module.load_from_checkpoint(tmp_path / "last.ckpt")
    loose = Module.load_from_checkpoint(tmp_path / "last.ckpt", strict=False)
    assert all(map(torch.equal, loose.net.state_dict().values(), module.net.state_dict().values()))
    bare = Module()
    bare.handle.remove()
    read = optx.attach(bare.net, tmp_path / "last.adapter")
    assert all(map(torch.equal, read.parameters(), module.handle.parameters()))


def test_folders_go_with_their_checkpoints(tmp_path: Path) -> None:
    module = Module()
    keeps_one = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=1, monitor="optx/lr", mode="max")
    other = optx.attach(module.net, optx.IA3(), targets="3")
    held = OptxCallback([module.handle, other], folders=True)
    fit(tmp_path, module, keeps_one, held, saves=False, enable_checkpointing=True, log_every_n_steps=1)
    names = {path.stem for path in tmp_path.glob("*.ckpt")}
    assert len(names) == 1
    assert {path.stem for path in tmp_path.glob("*.adapter")} == names
    (folder,) = tmp_path.glob("*.adapter")
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"lora", "ia3"}
    assert "net.0.weight" not in module.state_dict()
    held.remove()
    assert "net.0.weight" in module.state_dict()


def test_an_exception_leaves_a_checkpoint(tmp_path: Path) -> None:
    class Fails(Module):
        def on_train_batch_end(self, *_: Any) -> None:
            if self.global_step == 3:
                raise RuntimeError("on purpose")

    module = Fails()
    callbacks = (OptxCallback(module.handle), OnExceptionCheckpoint(tmp_path))
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(tmp_path, module, *callbacks, saves=False, enable_checkpointing=True)
    held = saved(tmp_path / "on_exception.ckpt")
    assert held["global_step"] == 3
    assert adapter_names(module) <= set(held["state_dict"])
    assert "net.0.weight" not in held["state_dict"]


# ---- metrics ----------------------------------------------------------------------------------------------


def test_tensorboard_has_what_optx_knows(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    module = Manual()
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    options = {"logger": logger, "log_every_n_steps": 2, "gradient_clip_val": None}
    made = fit(tmp_path, module, OptxCallback(module.handle), saves=False, **options)
    wanted = optx.integrations._metrics.collect_all(made.optimizers, [module.handle])  # type: ignore[attr-defined]
    read = EventAccumulator(str(tmp_path / "run"))
    read.Reload()
    assert {"optx/lr", "optx_2/lr", "lora/trainable"} <= set(wanted)
    for name, value in wanted.items():
        events = read.Scalars(name)
        assert events[-1].value == pytest.approx(value, rel=1e-6)
        assert len(events) == 4  # of eight batches
        assert made.callback_metrics[name] == pytest.approx(value, rel=1e-6)


# ---- told -------------------------------------------------------------------------------------------------


def test_what_is_wrong_is_told_before_anything_is_trained(tmp_path: Path) -> None:
    module, other = Module(), Module()
    before = [p.clone() for p in module.parameters()]

    def told(callback: Any, on: Any = module) -> str:
        with pytest.raises(optx.OptxError) as error:
            fit(tmp_path, on, callback, saves=False)
        return str(error.value)

    assert "is not in this Module, so its checkpoints would not have it" in told(OptxCallback(other.handle))
    assert "handle='adapter', and this Module has no such attribute" in told(OptxCallback("adapter"))
    kept = Module(keeps=True)
    second = optx.attach(kept.net, optx.IA3(), targets="3")
    assert "called for this module with other handles" in told(OptxCallback(second), kept)
    with pytest.raises(optx.OptxError, match="has been called for this Module already"):
        adapters_only(kept, kept.handle)
    with pytest.raises(optx.OptxError, match="folders=True is for adapters"):
        OptxCallback(folders=True)

    class Plain(Module):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.handle.parameters(), lr=0.1)

    assert "none of the module's optimizers was made by optx.wrap" in told(OptxCallback(), Plain())
    assert all(map(torch.equal, before, module.parameters()))


def test_strategies_are_refused_by_name() -> None:
    from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

    from optx.integrations.lightning import _check_strategy

    with pytest.raises(optx.OptxError, match=r"FSDPStrategy is FSDP1.*ModelParallelStrategy"):
        _check_strategy(FSDPStrategy(), [])
    whole_models = ModelParallelStrategy(save_distributed_checkpoint=False)
    _check_strategy(whole_models, [])
    with pytest.raises(optx.OptxError, match=r"save_distributed_checkpoint=False\) reads whole models alone"):
        _check_strategy(whole_models, [Module().handle])


def test_another_adapter_or_base_is_told(tmp_path: Path) -> None:
    module = Module(keeps=True)
    state = module.state_dict()
    more = Module()
    handles = [more.handle, optx.attach(more.net, optx.IA3(), targets="3")]
    adapters_only(more, *handles)
    with pytest.raises(optx.FileError, match=r"'net\.3\.optx\.ia3\.\w+' is missing.*other adapters"):
        more.load_state_dict(state)
    changed = Module()
    with torch.no_grad():
        changed.net[0].weight.mul_(2)
    adapters_only(changed, changed.handle)
    with pytest.warns(UserWarning, match=r"'net\.0\.weight' of the base model is not the one"):
        changed.load_state_dict(state)


def test_a_cast_is_no_change_and_what_was_loaded_is_one() -> None:
    from optx.integrations.lightning import keeper_of

    module, resumed = Module(keeps=True), Module(keeps=True)
    with torch.no_grad():
        module.net[1].running_mean.add_(1)
    resumed.load_state_dict(module.state_dict())
    for one in (module, resumed):
        one.to(torch.bfloat16)
        keeper = keeper_of(one)
        assert keeper is not None
        keeper.settle()
    assert "net.0.weight" not in resumed.state_dict()
    assert "net.1.running_mean" in resumed.state_dict()


def test_the_other_namespace(tmp_path: Path) -> None:
    """A callback of one of them is refused by a Trainer of the other."""
    pl = pytest.importorskip("pytorch_lightning")
    module = Module()

    class Theirs(pl.LightningModule):  # type: ignore[misc]
        net, handle = module.net, module.handle
        training_step, configure_optimizers = Module.training_step, Module.configure_optimizers

    quiet = {f"enable_{what}": False for what in ("progress_bar", "model_summary", "checkpointing")}
    made = pl.Trainer(callbacks=[OptxCallback()], max_steps=1, accelerator="cpu", logger=False, **quiet)
    with pytest.raises(
        optx.OptxError, match=r"callback of lightning\.pytorch, and this Trainer is of pytorch"
    ):
        made.fit(Theirs(), loader())
