"""LoRA on experts that are one 3-D parameter, in models: outputs, merges, training, and what is refused."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from adapter_models import assert_close, ids, outputs, shake
from expert_models import BOTH, FAMILIES, ONE_PARAMETER, expected, experts_of, moe, updates
from torch import Tensor, nn

import optx

pytestmark = ONE_PARAMETER
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


def lora(model: Any, targets: Any = BOTH, **options: Any) -> optx.Handle:
    handle = optx.attach(model, optx.LoRA(**{"rank": 3, **options}), targets=targets)
    shake(handle.parameters(), by=0.3)
    return handle


def grads(loss: Tensor, handle: optx.Handle) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, handle.parameters())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_outputs_and_gradients(family: str, implementation: str) -> None:
    model = moe(family, implementation)
    base = outputs(model)
    handle = optx.attach(model, optx.LoRA(rank=3), targets=BOTH)
    assert torch.equal(outputs(model), base), "LoRA starts as the identity"
    shake(handle.parameters(), by=0.3)
    found, wanted = model(ids()).logits, expected(model, handle, ids())
    assert not torch.allclose(found, base, atol=1e-2)
    assert_close(found, wanted, 1e-6)
    for own, theirs in zip(
        grads(found.square().sum(), handle), grads(wanted.square().sum(), handle), strict=True
    ):
        torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_and_routers(family: str) -> None:
    """As modules: the experts and their router, by the ends of their paths."""
    model = moe(family)
    router = "router" if family in ("GptOss", "GraniteMoe") else "gate"
    before = {name: t.clone() for name, t in model.state_dict().items()}
    base = outputs(model)
    handle = lora(model, ["experts", router], rank=2)
    found = outputs(model)
    assert len(handle) == 4
    assert_close(found, expected(model, handle, ids()), 1e-5)
    handle.merge()
    assert_close(outputs(model), found, 1e-5)
    handle.unmerge()
    assert torch.equal(outputs(model), found)
    handle.remove()
    assert torch.equal(outputs(model), base)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_compiled_whole(implementation: str) -> None:
    """transformers' own loop over experts can't be: its length depends on the data."""
    model = moe("Mixtral", implementation, num_hidden_layers=1)
    handle = lora(model)
    block, x = model.model.layers[0].mlp, torch.randn(2, 5, 16)
    plain = block(x)
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)
    for a, b in zip(
        grads(compiled.square().mean(), handle), grads(plain.square().mean(), handle), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_stack_is_made(implementation: str) -> None:
    """What is kept for the backward pass: PEFT keeps W + s B A of every expert, in every layer."""
    model = moe("Mixtral", implementation)
    sizes = {experts_of(model).gate_up_proj.numel(), experts_of(model).down_proj.numel()}

    def saved(handle: optx.Handle) -> int:
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes() // t.element_size()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(ids()[:1, :3]).logits.sum().backward()
        return sum(size in sizes for size in kept.values())

    assert saved(lora(model, rank=2)) == 0


def test_an_implementation_that_is_not_known_gets_the_sum_as_a_tensor() -> None:
    """One with a kernel of its own would see neither factor, nor give them gradients."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, batched_mm_experts_forward

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, w: Tensor) -> Tensor:
            return w * 1

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad

    def custom(self: Any, *args: Any) -> Tensor:
        assert isinstance(self.gate_up_proj, Tensor)
        twin = copy.copy(self)
        twin.__dict__["gate_up_proj"] = Double.apply(self.gate_up_proj)
        return batched_mm_experts_forward(twin, *args)

    ALL_EXPERTS_FUNCTIONS.register("custom_of_this_test", custom)
    model = moe("Mixtral", "custom_of_this_test")
    handle = lora(model)
    found, wanted = model(ids()).logits, expected(model, handle, ids())
    assert_close(found, wanted, 1e-6)
    for a, b in zip(grads(found.square().sum(), handle), grads(wanted.square().sum(), handle), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_checkpointed_layers() -> None:
    model = moe()
    handle = lora(model)
    plain = grads(model.train()(ids()).logits.square().sum(), handle)
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    for a, b in zip(plain, grads(model(ids()).logits.square().sum(), handle), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_an_error_inside_leaves_the_module_as_it_was() -> None:
    model = moe()
    lora(model)
    experts = experts_of(model)
    before = dict(experts.__dict__)
    experts.act_fn.forward = None
    with pytest.raises(TypeError):
        model(ids())
    assert dict(experts.__dict__) == before
    assert isinstance(experts.gate_up_proj, nn.Parameter)


def test_two_threads_at_once() -> None:
    """The second one comes while the first is inside, and leaves after it."""
    model = moe("Mixtral", "eager", num_hidden_layers=1)
    base = outputs(model)
    handle = lora(model)
    wanted = outputs(model)
    arrived, go = threading.Semaphore(0), threading.Event()
    activation, first = experts_of(model).act_fn, threading.get_ident()
    plain = activation.forward

    def slow(x: Tensor) -> Tensor:
        if threading.get_ident() != first:
            arrived.release()
            go.wait(1)
        return plain(x)

    activation.forward = slow
    found: list[Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(outputs(model))) for _ in range(2)]
    for thread in threads:
        thread.start()
    arrived.acquire()
    arrived.acquire(timeout=0.2)  # both are inside, if nothing keeps the second out
    go.set()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert all(torch.equal(one, wanted) for one in found)
    handle.remove()
    assert torch.equal(outputs(model), base)


def test_two_handles_on_one_parameter() -> None:
    """They add up; either merges while the other is attached, in any order, and comes off."""
    model = moe()
    base = outputs(model)
    one = lora(model)
    alone = outputs(model)
    other = optx.attach(model, optx.LoRA(rank=2), targets=["experts.down_proj"], name="other")
    shake(other.parameters(), seed=4, by=0.3)
    both = outputs(model)
    assert not torch.allclose(both, alone, atol=1e-3)
    other.merge()
    assert_close(outputs(model), both, 1e-6)
    one.merge()
    assert_close(outputs(model), both, 1e-6)
    other.unmerge()
    assert_close(outputs(model), both, 1e-6)
    other.remove()
    assert_close(outputs(model), alone, 1e-6)
    one.remove()
    assert torch.equal(outputs(model), base)


def test_bfloat16_weights() -> None:
    """Factors are float32; a merge is one rounding of the float32 sum, and unmerging gives every bit back."""
    model = moe().to(torch.bfloat16)
    handle = lora(model, rank=2)
    assert {p.dtype for p in handle.parameters()} == {torch.float32}
    own = experts_of(model).down_proj.detach().clone()
    name = "model.layers.0.mlp.experts.down_proj"
    wanted = (own.float() + updates(handle)[name].detach()).to(torch.bfloat16)
    found = outputs(model)
    handle.merge()
    torch.testing.assert_close(experts_of(model).down_proj.detach(), wanted, rtol=2**-7, atol=1e-6)
    handle.unmerge()
    assert torch.equal(experts_of(model).down_proj, own)
    assert_close(found.float(), expected(model.float(), handle, ids()), 0.1)


def test_merged_for_good() -> None:
    model = moe()
    handle = lora(model)
    wanted = outputs(model)
    bare = handle.merge_and_unload()
    assert_close(outputs(bare), wanted, 1e-6)
    assert not any("optx" in key for key in bare.state_dict())
    again = moe()
    again.load_state_dict(bare.state_dict())
    assert torch.equal(outputs(again), outputs(bare))


def test_a_run_that_is_resumed(tmp_path: Any) -> None:
    """Adapter and optimizer from files: the next steps are bit-identical."""

    def steps(model: Any, opt: torch.optim.Optimizer, count: int) -> list[float]:
        losses = []
        for _ in range(count):
            loss = model(ids(), labels=ids()).loss
            loss.backward()
            opt.step()
            opt.zero_grad()
            losses.append(loss.item())
        return losses

    model = moe()
    handle = optx.attach(model, optx.LoRA(rank=2), targets=BOTH)
    optx.trainable_only(model, handle)
    opt = torch.optim.AdamW(handle.parameters(), lr=1e-2)
    before = steps(model, opt, 3)
    handle.save(tmp_path)
    state = copy.deepcopy(opt.state_dict())
    wanted = steps(model, opt, 3)
    assert wanted[-1] < before[0]
    other = moe()
    resumed = optx.attach(other, tmp_path)
    optx.trainable_only(other, resumed)
    opt = torch.optim.AdamW(resumed.parameters(), lr=1e-2)
    opt.load_state_dict(state)
    assert steps(other, opt, 3) == wanted
    assert all(p.grad is None for name, p in other.named_parameters() if "optx" not in name)


def test_copies_and_checkpoints() -> None:
    """A copy serves itself; a checkpoint of the bare model still loads strictly."""
    model = moe()
    bare = model.state_dict()
    bare = {key: t.clone() for key, t in bare.items()}
    handle = lora(model)
    wanted = outputs(model)
    twin = copy.deepcopy(model)
    handle.remove()
    assert torch.equal(outputs(twin), wanted)
    twin.load_state_dict(bare)
    assert torch.equal(outputs(twin), wanted)


def test_offloaded_weights() -> None:
    """Factors follow when the model is offloaded later; weights that are not here already are refused."""
    from accelerate import cpu_offload

    handle = lora(model := moe())
    wanted = outputs(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(outputs(model), wanted)
    assert handle.served[0].module.down_proj.is_meta
    cpu_offload(other := moe(), execution_device=torch.device("cpu"))
    with pytest.raises(optx.TargetError, match="gate_up_proj' is offloaded"):
        optx.attach(other, optx.LoRA(rank=2), targets=BOTH)


def test_the_report() -> None:
    model = moe()
    handle = lora(model, ["layers.0.mlp.experts", "layers.1.mlp.experts.down_proj"], rank=2, alpha=6)
    first, second = handle.report().rows
    assert first.note == "gate_up_proj: 4 experts, rank 2, scale 3; down_proj: 4 experts, rank 2, scale 3"
    assert second.note == "down_proj: 4 experts, rank 2, scale 3"
    assert second.trainable == 4 * 2 * (16 + 24)


# ---- targets ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "served"),
    [
        (r".*layers\.0\.mlp\.experts\.gate_up_proj", {"0.mlp.experts": ("gate_up_proj",)}),
        (r".*layers\.0\.mlp\.experts.*_proj", {"0.mlp.experts": ("gate_up_proj", "down_proj")}),
        (r".*0\.mlp\.experts\.(gate_up_proj|down_proj)", {"0.mlp.experts": BOTH}),
        (r".*layers\.0\.mlp\.experts", {"0.mlp.experts": ("gate_up_proj", "down_proj")}),
        (["0.mlp.experts.down_proj"], {"0.mlp.experts": ("down_proj",)}),
        (["0.mlp.experts", "0.self_attn.q_proj"], {"0.self_attn.q_proj": (), "0.mlp.experts": BOTH}),
        (lambda path, module: path.endswith("0.mlp.experts"), {"0.mlp.experts": BOTH}),
        (["0.mlp.gate"], {"0.mlp.gate": ("weight",)}),
        (["0.mlp.gate.weight"], {"0.mlp.gate": ("weight",)}),
        ("model.layers.0.self_attn.q_proj.*", {"0.self_attn.q_proj": ()}),
        (r".*0\.self_attn.*_proj", {f"0.self_attn.{x}_proj": () for x in "qkvo"}),
    ],
)
def test_what_targets_mean(targets: Any, served: dict[str, Any]) -> None:
    handle = optx.attach(moe(num_hidden_layers=1), optx.LoRA(rank=1), targets=targets)
    found = {one.path.removeprefix("model.layers."): one.part.parameter_names for one in handle.served}
    assert found == {path: tuple(name.rpartition(".")[2] for name in names) for path, names in served.items()}


class Held(nn.Module):
    """Experts as DBRX has them: the parent reads the weight, and gives it to the module that owns it."""

    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1 = nn.Parameter(torch.randn(4, 3, 3))

        def forward(self, x: Tensor, w: Tensor) -> Tensor:
            return x @ w

    def __init__(self) -> None:
        super().__init__()
        self.mlp = self.Owner()

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x, self.mlp.w1[0])


def quantised() -> nn.Module:
    model = moe(num_hidden_layers=1)
    experts = experts_of(model)
    experts.down_proj = nn.Parameter(experts.down_proj.to(torch.float8_e4m3fn), requires_grad=False)
    return model


def shared() -> nn.Module:
    model = moe()
    experts_of(model, 1).down_proj = experts_of(model, 0).down_proj
    return model


def parallel() -> nn.Module:
    model = moe(num_hidden_layers=1)
    experts_of(model)._is_expert_parallel = True
    return model


REFUSED: dict[str, tuple[Any, optx.Injection, Any, str]] = {
    "dropout": (
        moe,
        optx.LoRA(dropout=0.1),
        BOTH,
        r"dropout=0\.1 is not for parameters such as .*gate_up_proj",
    ),
    "dora": (moe, optx.LoRA(dora=True), BOTH, "dora=True is not for parameters"),
    "lora_bias": (moe, optx.LoRA(lora_bias=True), BOTH, "lora_bias=True is not for parameters"),
    "biases": (lambda: moe("GptOss"), optx.LoRA(bias="all"), BOTH, "leave out .*gate_up_proj_bias"),
    "rank": (moe, optx.LoRA(rank=17), BOTH, r"rank=17 is larger than .*experts\.gate_up_proj', \(48, 16\)"),
    "the weight of a Linear": (
        moe,
        optx.LoRA(),
        ["q_proj.weight"],
        "weight of a Linear. Target the module, '",
    ),
    "a bias": (
        lambda: moe("GptOss"),
        optx.LoRA(),
        [*BOTH, "router.bias"],
        r"router\.bias' has shape \(4,\); LoRA serves matrices",
    ),
    "a misspelt name": (
        moe,
        optx.LoRA(),
        ["experts.down_prj"],
        "matches no module. Near: .*experts.down_proj'",
    ),
    "a misspelt regex": (moe, optx.LoRA(), ".*gate_upp_proj", "no module matches .* Near: .*gate_up_proj'"),
    "another injection": (moe, optx.IA3(), ["experts.down_proj"], "matches no module"),
    "quantised": (quantised, optx.LoRA(), BOTH, r"down_proj' is of torch\.float8_e4m3fn, a quantised stack"),
    "shared": (shared, optx.LoRA(), BOTH, r"0\.mlp\.experts\.down_proj' and .* are one parameter"),
    "parallel": (parallel, optx.LoRA(), BOTH, "spread over devices"),
    "read by the parent": (Held, optx.LoRA(rank=2), ["mlp.w1"], r"'mlp\.w1' is not read by Owner itself"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_a_sentence(case: str) -> None:
    make, injection, targets, message = REFUSED[case]
    model = make()
    with pytest.raises(optx.TargetError, match=message):
        optx.attach(model, injection, targets=targets)
    assert not any("optx" in name for name, _ in model.named_modules())


def test_experts_that_are_modules() -> None:
    """As in transformers 4: ordinary targets."""
    one = lambda: nn.ModuleDict({name: nn.Linear(6, 6, bias=False) for name in ("w1", "w2", "w3")})  # noqa: E731
    model = nn.ModuleDict({"experts": nn.ModuleList([one() for _ in range(3)])})
    handle = optx.attach(model, optx.LoRA(rank=2), targets=r"experts\.\d+\.w[123]")
    assert len(handle) == 9
    assert handle.served[0].part.suffixes()["A"] == "lora_A.weight"
