"""StableMax under torch's machinery: threads, compile, autocast, fake tensors, copies."""

import copy
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from reference.stablemax import composed

from optx.signal.stablemax import StableMaxCrossEntropy, stablemax_cross_entropy


def test_threads_do_not_show_in_the_numbers():
    logits = torch.randn(300, 700, requires_grad=True)
    target = torch.randint(700, (300,))

    def run():
        loss = stablemax_cross_entropy(logits, target, label_smoothing=0.1)
        return loss.detach(), torch.autograd.grad(loss, logits)[0]

    wanted = run()
    results = []
    threads = [threading.Thread(target=lambda: results.append(run())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        results.append(run())
    finally:
        torch.set_num_threads(before)
    assert len(results) == 4
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, wanted, strict=True))


@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1, "weight": torch.rand(113)}], ids=["plain", "all"]
)
def test_compiles_to_one_graph(options):
    torch.manual_seed(0)
    logits, target = torch.randn(64, 113, requires_grad=True), torch.randint(113, (64,))
    criterion = StableMaxCrossEntropy(**options)
    # aot_eager traces forward and backward as inductor does, and needs no C++ compiler
    compiled = torch.compile(lambda z: criterion(z * 1.0, target), fullgraph=True, backend="aot_eager")
    losses = compiled(logits), criterion(logits, target)
    grads = [torch.autograd.grad(loss, logits)[0] for loss in losses]
    assert torch.allclose(*losses, rtol=1e-6)
    assert torch.allclose(*grads, atol=1e-8)


def test_autocast_gives_float32_without_a_copy_of_the_logits():
    logits = torch.randn(8, 30, dtype=torch.bfloat16, requires_grad=True)
    target = torch.randint(30, (8,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = stablemax_cross_entropy(logits, target)
    assert loss.dtype == torch.float32
    loss.backward()
    assert logits.grad.dtype == torch.bfloat16
    assert loss.item() == pytest.approx(composed(logits.double(), target).item(), rel=1e-5)


def test_fake_tensors_take_the_torch_path():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        logits = torch.randn(4, 9, requires_grad=True)
        loss = stablemax_cross_entropy(logits, torch.zeros(4, dtype=torch.long))
        loss.backward()
        assert logits.grad.shape == (4, 9)


def test_module_holds_its_options():
    weight = torch.rand(5)
    criterion = StableMaxCrossEntropy(weight, ignore_index=1, reduction="sum", label_smoothing=0.1)
    assert repr(criterion) == (
        "StableMaxCrossEntropy(weighted, ignore_index=1, reduction='sum', label_smoothing=0.1)"
    )
    assert repr(StableMaxCrossEntropy()) == "StableMaxCrossEntropy()"
    assert list(criterion.state_dict()) == ["weight"]
    assert criterion.double().weight.dtype == torch.float64
    logits, target = torch.randn(6, 5), torch.randint(5, (6,))
    wanted = stablemax_cross_entropy(logits, target, weight, 1, "sum", 0.1)
    for same in (criterion, copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert torch.allclose(same(logits, target), wanted)


def test_import_needs_torch_only():
    code = """
import sys
import torch
before = set(sys.modules)
import optx.analysis, optx.signal.stablemax
print({"numba", "triton"} & (set(sys.modules) - before))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "set()"
