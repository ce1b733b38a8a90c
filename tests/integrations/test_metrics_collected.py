"""`optx.integrations._metrics`: what a callback logs, whatever the trainer put around the optimizer."""

import torch

import optx
from optx.integrations._metrics import collect


class Around:
    """As AcceleratedOptimizer and LightningOptimizer are: something that has an optimizer."""

    def __init__(self, name, inner):
        setattr(self, name, inner)


def test_the_wrapped_optimizer_is_found_inside_of_others_and_handles_are_told_apart():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    handles = [optx.attach(model, optx.LoRA(rank=rank), targets=str(i)) for i, rank in enumerate((1, 2))]
    opt = optx.wrap(torch.optim.AdamW(model.parameters(), lr=0.25), optx.PerpGrad())
    found = collect(Around("optimizer", Around("_optimizer", opt)), handles)
    assert found == {**opt.metrics(), **handles[0].metrics()} | {"lora_2/trainable": 16.0} | {
        name.replace("lora/", "lora_2/"): value for name, value in handles[1].metrics().items()
    }
    handles[0].remove()
    assert collect(None, handles) == handles[1].metrics()
    opt.remove()
    assert collect(opt, handles[1]) == handles[1].metrics()
    assert collect(torch.optim.SGD(model.parameters())) == {}
