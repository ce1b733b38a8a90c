"""The optimizer that a Trainer makes of ours: groups, arguments, refusals, stages, and what is logged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from injections import llama
from torch import nn

import optx

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import transformers
from trainer_runs import Tokens, adapted, arguments, state, trainer

from optx.integrations.transformers import OptxCallback, optimizer

pytestmark = pytest.mark.usefixtures("one_thread")


def unwrapped(made: Any) -> optx.Wrapped:
    return made.optimizer.optimizer


# ---- what is made -----------------------------------------------------------------------------------------


def test_three_ways_in_are_one(tmp_path: Path) -> None:
    """``optimizer_cls_and_kwargs``, ``optimizers`` and an overridden ``create_optimizer`` train alike."""
    options: dict[str, Any] = {"weight_decay": 0.1, "max_steps": 3, "adam_beta1": 0.8, "save_strategy": "no"}

    def factory() -> Any:
        return optimizer(torch.optim.AdamW, optx.PerpGrad(), wrap={"fused": False})

    class Overridden(transformers.Trainer):
        def create_optimizer(self, *_: Any) -> Any:
            self.optimizer = factory().on(self.model, self.args)
            return self.optimizer

    made = []
    for way in ("pair", "optimizers", "overridden"):
        model, args = llama(), arguments(tmp_path, **options)
        if way == "pair":
            one = transformers.Trainer(
                model, args, train_dataset=Tokens(), optimizer_cls_and_kwargs=factory()
            )
        elif way == "optimizers":
            opt = factory().on(model, args)
            one = transformers.Trainer(model, args, train_dataset=Tokens(), optimizers=(opt, None))
        else:
            one = Overridden(model, args, train_dataset=Tokens())
        one.train()
        made.append(one)
    first = state(made[0].model)
    for one in made:
        assert all(torch.equal(t, first[name]) for name, t in state(one.model).items())
        opt = unwrapped(one)
        assert [group["weight_decay"] for group in opt.param_groups] == [0.1, 0.0]
        assert all(group["betas"] == (0.8, 0.999) for group in opt.param_groups)
        assert all(group["initial_lr"] == 1e-2 for group in opt.param_groups)
        assert opt.settings() == ("fused=False",)
    decays, rest = (group["param_names"] for group in opt.param_groups)
    assert "model.layers.0.self_attn.q_proj.weight" in decays
    assert all("norm" in name for name in rest)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sorted([*decays, *rest]) == sorted(names)


def test_a_transform_that_needs_the_model_gets_it(tmp_path: Path) -> None:
    """HFT of each model that ``model_init`` makes; and the groups of MuAdamW."""
    seen: list[Any] = []

    def half(model: nn.Module) -> optx.HFT:
        seen.append(model)
        return optx.HFT(model, seed=1)

    made = trainer(
        tmp_path,
        None,  # type: ignore[arg-type]
        model_init=lambda: llama(),
        optimizer_cls_and_kwargs=optimizer(torch.optim.AdamW, half),
        max_steps=1,
        save_strategy="no",
    )
    made.train()
    made.train()
    assert len(seen) == 2
    assert seen[0] is not seen[1] is made.model
    fixed = trainer(
        tmp_path,
        None,  # type: ignore[arg-type]
        model_init=lambda: llama(),
        optimizer_cls_and_kwargs=optimizer(torch.optim.AdamW, optx.PerpGrad()),
        max_steps=1,
        save_strategy="no",
    )
    fixed.train()
    with pytest.raises(optx.TransformError, match=r"lambda model: optx.PerpGrad\(\.\.\.\)"):
        fixed.train()


def test_trained_twice_the_optimizer_goes_on(tmp_path: Path) -> None:
    made = trainer(tmp_path, *adapted(), max_steps=1)
    made.train()
    opt = unwrapped(made)
    made.train()
    assert unwrapped(made) is opt
    assert int(next(iter(opt.state.values()))["step"]) == 2


# ---- refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "given", "words"),
    [
        ({"optim": "adafactor"}, (torch.optim.AdamW,), "optim='adafactor', which would be without effect"),
        ({"adam_beta1": 0.8}, (torch.optim.SGD,), "adam_beta1=0.8, which would be without effect.*SGD"),
        ({"deepspeed": {}}, (torch.optim.AdamW,), "DeepSpeed steps flat pieces"),
        ({"weight_decay": 0.1}, (torch.optim.LBFGS,), "weight_decay is 0.1 and LBFGS has none"),
        ({}, (torch.optim.AdamW, lambda model: model), "returned .*it must return a transform"),
    ],
)
def test_what_would_be_without_effect_is_refused(
    options: dict[str, Any], given: tuple[Any, ...], words: str, tmp_path: Path
) -> None:
    engine = options.pop("deepspeed", None)
    args = arguments(tmp_path, **options)
    if engine is not None:
        args.deepspeed = {"zero_optimization": {"stage": 2}}
    with pytest.raises(optx.OptxError, match=words):
        optimizer(*given).on(llama(), args)


def test_what_is_no_transform_is_refused_at_once() -> None:
    with pytest.raises(optx.TransformError, match=r"HFT'> is neither.*lambda model: optx.HFT\(model\)"):
        optimizer(torch.optim.AdamW, optx.HFT)
    with pytest.raises(optx.OptxError, match=r"state is an option of optx.wrap .*wrap={'state': '8bit'}"):
        optimizer(torch.optim.AdamW, state="8bit")
    with pytest.raises(optx.OptxError, match="base_class is SGD"):
        optimizer(torch.optim.SGD([nn.Parameter(torch.ones(1))]))  # type: ignore[arg-type]
    with pytest.raises(optx.OptxError, match=r"elsewhere call its .on\(model, args\)"):
        optimizer(torch.optim.AdamW)[0]([])
    frozen = llama().requires_grad_(False)
    with pytest.raises(optx.OptxError, match="no trainable parameter"):
        optimizer(torch.optim.AdamW).on(frozen, arguments("unused"))


def test_fsdp1_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(tmp_path, llama())
    monkeypatch.setattr(made, "is_fsdp_enabled", True)
    monkeypatch.setitem(
        made.accelerator.state.__dict__, "fsdp_plugin", type("Plugin", (), {"fsdp_version": 1})
    )
    with pytest.raises(optx.TransformError, match=r"FSDP1 .*Set fsdp_config"):
        made.create_optimizer()
    model, handle = adapted()
    later = trainer(tmp_path, model)
    later.is_fsdp_enabled = True
    with pytest.raises(optx.OptxError, match=r"with FSDP the Trainer writes.*adapters_only=False"):
        OptxCallback(handle).serve(later)


# ---- stages of half fine-tuning ---------------------------------------------------------------------------


def halves(folder: Path, rounds: str, steps: int, **options: Any) -> Any:
    """Two steps an epoch."""
    return trainer(
        folder,
        llama(),
        optimizer_cls_and_kwargs=optimizer(torch.optim.AdamW, lambda model: optx.HFT(model, seed=1)),
        callback={"hft_rounds": rounds},
        train_dataset=Tokens(8),
        max_steps=steps,
        **options,
    )


def test_a_round_for_each_epoch_also_of_a_resumed_run(tmp_path: Path) -> None:
    """Resumed between two epochs, and inside of one."""
    whole = halves(tmp_path, "epoch", 5, save_steps=1)
    whole.train()
    assert unwrapped(whole).hft.round == 2
    wanted = state(whole.model)
    for step in (2, 3) if transformers.__version__ >= "5" else (2,):  # 4.56 reads other batches after 3
        made = halves(tmp_path, "epoch", 5, save_strategy="no")
        made.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert unwrapped(made).hft.round == 2
        assert all(torch.equal(t, wanted[name]) for name, t in state(made.model).items()), step


def test_a_round_for_each_training(tmp_path: Path) -> None:
    made = halves(tmp_path, "train", 1, save_strategy="no")
    made.train()
    assert unwrapped(made).hft.round == 0
    made.train()
    made.train()
    assert unwrapped(made).hft.round == 2
    with pytest.raises(optx.TransformError, match="hft_rounds='train', and the Trainer's optimizer has no"):
        trainer(tmp_path, llama(), callback={"hft_rounds": "train"}).train()


# ---- logs -------------------------------------------------------------------------------------------------


def test_tensorboard_has_what_optx_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written by the Trainer's own callback, and read by TensorBoard's own reader."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))  # transformers 5
    options = {"logging_dir": str(tmp_path / "board")} if transformers.__version__ < "5" else {}
    model, handle = adapted()
    made = trainer(
        tmp_path, model, handle, report_to=["tensorboard"], max_steps=3, save_strategy="no", **options
    )
    made.train()
    events = reader.EventAccumulator(str(next((tmp_path / "board").rglob("events*")).parent))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    metrics = {*unwrapped(made).metrics(), *handle.metrics()}
    assert {f"train/{name}" for name in metrics} <= tags
    for name in ("optx/lr", "lora/trainable"):
        assert [event.step for event in events.Scalars(f"train/{name}")] == [1, 2, 3]
    row = next(row for row in made.state.log_history if "loss" in row)
    assert metrics <= set(row)
    assert row["lora/trainable"] == sum(p.numel() for p in handle.parameters())
    assert "optx/lr" not in made.state.log_history[-1]  # the summary's
    assert not {*metrics} & set(made.evaluate(Tokens(4)))
