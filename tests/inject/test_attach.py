"""optx.attach and its handle: targets, errors, and that everything comes off without a trace."""

from __future__ import annotations

import functools
import io
import itertools
import pickle
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from injections import ROWS, Row, assert_same, bert, clone, cnn, llama, move, public_injections, run, snapshot
from torch import Tensor, nn

import optx
from optx import LoRA

MERGING = [row for row in ROWS if row.merges]
each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.label)
each_merging = pytest.mark.parametrize("row", MERGING, ids=lambda row: row.label)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))


def test_the_table_has_every_injection() -> None:
    served = {type(row.injection()).__name__ for row in ROWS}
    assert set(public_injections()) - {"HiddenDelta"} == served


# ---- for every injection ----------------------------------------------------------------------------------


@each_row
def test_remove_leaves_no_trace(row: Row) -> None:
    model = row.model()
    before, output = snapshot(model), run(model)
    handle = row.attach(model)
    optx.trainable_only(model, handle)
    move(handle)
    assert not torch.equal(run(model), output)
    handle.remove()
    handle.remove()  # a second time does nothing
    assert_same(model, before)
    assert torch.equal(run(model), output)


@each_row
def test_an_exception_inside_with_leaves_no_trace(row: Row) -> None:
    model = row.model()
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError):
        train_and_fail(row, model)
    for p in model.parameters():
        p.grad = None
    assert_same(model, before)


def train_and_fail(row: Row, model: nn.Module) -> None:
    with row.attach(model) as handle:
        optx.trainable_only(model, handle)
        move(handle)
        run(model).sum().backward()
        raise ZeroDivisionError


@pytest.mark.parametrize("row", [row for row in ROWS if row.identity], ids=lambda row: row.label)
def test_the_start_is_the_identity_exactly(row: Row) -> None:
    model = row.model()
    output = run(model)
    row.attach(model)
    assert torch.equal(run(model), output)


@each_row
def test_base_checkpoint_loads_before_and_after(row: Row) -> None:
    model, fresh = row.model(), row.model()
    with torch.no_grad():
        for p in fresh.parameters():
            p.mul_(1.5)
    checkpoint = fresh.state_dict()
    handle = row.attach(model)
    move(handle)
    added = {key: t.clone() for key, t in handle.state_dict().items()}
    model.load_state_dict(checkpoint, strict=True)
    assert all(torch.equal(t, added[key]) for key, t in handle.state_dict().items())
    assert all(
        torch.equal(t, checkpoint[key]) for key, t in model.state_dict().items() if ".optx." not in key
    )
    twin, other = row.model(), None
    twin.load_state_dict(checkpoint, strict=True)
    other = row.attach(twin)
    other.load_state_dict(added)
    assert torch.equal(run(twin), run(model))


@each_row
def test_whole_checkpoint_carries_what_was_added(row: Row) -> None:
    model, _ = row.attached()
    twin, _ = row.attached(moved=False)
    assert not torch.equal(run(twin), run(model))
    twin.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(run(twin), run(model))


@each_row
def test_disable_and_enable(row: Row) -> None:
    model = row.model()
    output = run(model)
    handle = row.attach(model)
    move(handle)
    changed = run(model)
    with handle.disable():
        assert torch.equal(run(model), output)
    assert torch.equal(run(model), changed)
    handle.disable()
    assert torch.equal(run(model), output)
    handle.enable()
    assert torch.equal(run(model), changed)


@each_merging
def test_merge_equals_attached_and_unmerge_is_exact(row: Row) -> None:
    model, handle = row.attached()
    before, attached = snapshot(model), run(model)
    handle.merge(untie=True)
    torch.testing.assert_close(run(model), attached, rtol=1e-5, atol=1e-5)
    handle.unmerge()
    assert_same(model, before)
    assert torch.equal(run(model), attached)
    handle.merge(untie=True)
    handle.remove()
    assert torch.equal(run(model), run(row.model()))


@each_merging
def test_merge_and_unload_leaves_a_bare_model(row: Row) -> None:
    model, handle = row.attached()
    attached, keys = run(model), list(row.model().state_dict())
    assert handle.merge_and_unload(untie=True) is model
    torch.testing.assert_close(run(model), attached, rtol=1e-5, atol=1e-5)
    assert list(model.state_dict()) == keys
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(optx.OptxError, match="has been removed"):
        handle.merge()


@pytest.mark.parametrize("row", [row for row in ROWS if not row.merges], ids=lambda row: row.label)
def test_what_cannot_merge_says_so(row: Row) -> None:
    model, handle = row.attached()
    before = snapshot(model)
    with pytest.raises(optx.MergeError, match="can't be merged"):
        handle.merge()
    assert_same(model, before)


@each_row
def test_report_counts_what_trains(row: Row) -> None:
    _, handle = row.attached()
    report = handle.report()
    assert report.trainable == sum(p.numel() for p in handle.parameters()) > 0
    assert report.stored == sum(t.numel() for t in handle.state_dict().values())
    assert all(line.module in str(report) for line in report.rows)


@each_row
def test_pickle_and_deepcopy(row: Row) -> None:
    model, handle = row.attached()
    expected = run(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [clone(model), torch.load(buffer, weights_only=False), pickle.loads(pickle.dumps(model))]
    for copied in copies:
        assert torch.equal(run(copied), expected)
    with torch.no_grad():
        for p in copies[0].parameters():
            p.zero_()
    assert torch.equal(run(model), expected)
    twin, copied_handle = pickle.loads(pickle.dumps((model, handle)))
    copied_handle.remove()
    assert torch.equal(run(twin), run(row.model()))
    assert torch.equal(run(model), expected)


# ---- stacks -----------------------------------------------------------------------------------------------


@settings(max_examples=30, phases=[Phase.explicit, Phase.generate])
@given(st.data())
def test_any_stack_comes_off_in_any_order(data: st.DataObject) -> None:
    build = data.draw(st.sampled_from([llama, bert, cnn]))
    rows = [row for row in ROWS if row.model is build]
    stack = data.draw(st.lists(st.sampled_from(rows), min_size=1, max_size=4))
    order = data.draw(st.permutations(range(len(stack))))
    frozen = data.draw(st.booleans())
    model = build()
    before, output = snapshot(model), run(model)
    handles = [row.attach(model, name=f"number{i}") for i, row in enumerate(stack)]
    if frozen:
        optx.trainable_only(model, *handles)
    for i, handle in enumerate(handles):
        move(handle, seed=i)
    run(model)
    mergeable = itertools.takewhile(lambda pair: pair[0].merges, zip(stack, handles, strict=True))
    for _, handle in itertools.islice(mergeable, data.draw(st.integers(0, len(stack)))):
        handle.merge(untie=True)
    run(model)
    for i in order:
        handles[i].remove()
    assert_same(model, before)
    assert torch.equal(run(model), output)


@settings(max_examples=25, phases=[Phase.explicit, Phase.generate])  # shrinking builds models for minutes
@given(st.data())
def test_merges_of_a_stack_are_exact_or_refused(data: st.DataObject) -> None:
    build = data.draw(st.sampled_from([llama, bert, cnn]))
    rows = [row for row in MERGING if row.model is build]
    stack = data.draw(st.lists(st.sampled_from(rows), min_size=2, max_size=3))
    model = build().double()
    handles = [row.attach(model, name=f"number{i}") for i, row in enumerate(stack)]
    for i, handle in enumerate(handles):
        move(handle, seed=i)
    before, attached = snapshot(model), run(model)
    for act in ("merge", "unmerge"):
        # One that must wait for others is refused, and nothing changes. (IA3 before others may wait for ever:
        # its output scales go in first, its input scales last.)
        waiting = data.draw(st.permutations([h for h in handles if h.merged == (act == "unmerge")]))
        left = len(waiting) + 1
        while len(waiting) < left:
            left = len(waiting)
            waiting = [handle for handle in waiting if not _done(handle, act)]
            torch.testing.assert_close(run(model), attached, rtol=1e-9, atol=1e-9)
    assert not any(handle.merged for handle in handles)
    assert_same(model, before)


def _done(handle: optx.Handle, act: str) -> bool:
    before = {name: t.clone() for name, t in handle.model.state_dict().items()}
    call = functools.partial(handle.merge, untie=True) if act == "merge" else handle.unmerge
    try:
        call()
    except optx.MergeError as error:
        if "the result depends on their order" not in str(error):
            raise
        now = handle.model.state_dict()
        return any(not torch.equal(t, before[name]) for name, t in now.items())
    return True


def test_what_scales_waits_for_what_was_attached_before() -> None:
    model = mlp()
    first, later = optx.attach(model, LoRA(rank=2), "0"), optx.attach(model, optx.IA3(), "0")
    move(first)
    move(later)
    attached = run_mlp(model)
    with pytest.raises(optx.MergeError, match=r"'lora' acts on '0' too and is not merged.*Merge that"):
        later.merge()
    first.merge()
    later.merge()
    torch.testing.assert_close(run_mlp(model), attached, rtol=1e-5, atol=1e-5)
    with pytest.raises(optx.MergeError, match=r"'ia3' is merged into '0' too.*Unmerge that one first"):
        first.unmerge()
    first.remove()
    later.remove()
    assert torch.equal(run_mlp(model), run_mlp(mlp()))


def test_two_of_one_kind_need_two_names() -> None:
    model = mlp()
    optx.attach(model, LoRA(rank=2), targets="0")
    before = snapshot(model)
    with pytest.raises(optx.OptxError, match=r"'0' has a 'lora' attached already.*name='lora2'"):
        optx.attach(model, LoRA(rank=2), targets="0|2")
    assert_same(model, before)
    optx.attach(model, LoRA(rank=2), targets="0|2", name="lora2")
    assert set(dict(model[0].named_parameters())) >= {"optx.lora.A", "optx.lora2.A"}


# ---- targets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "paths"),
    [
        ("0|2", ["0", "2"]),
        (nn.Linear, ["0", "2", "4"]),
        ((nn.Linear, nn.Conv2d), ["0", "2", "4"]),
        (["2", "4"], ["2", "4"]),
        (lambda path, module: getattr(module, "in_features", 0) == 6, ["0", "4"]),
    ],
    ids=["regex", "type", "types", "list", "predicate"],
)
def test_targets(targets: Any, paths: list[str]) -> None:
    handle = optx.attach(mlp(), LoRA(rank=2), targets=targets)
    assert [row.module for row in handle.report().rows] == paths


def test_a_list_of_names_matches_as_in_peft() -> None:
    model = nn.ModuleDict({"a": nn.ModuleDict({"q_proj": nn.Linear(4, 4)}), "xq_proj": nn.Linear(4, 4)})
    model["q_proj"] = nn.Linear(4, 4)
    by_list = optx.attach(model, LoRA(rank=2), targets=["q_proj"])
    assert [row.module for row in by_list.report().rows] == ["a.q_proj", "q_proj"]
    by_regex = optx.attach(model, LoRA(rank=2), targets="q_proj", name="second")
    assert [row.module for row in by_regex.report().rows] == ["q_proj"]


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (r".*q_prj", r"no module matches targets='\.\*q_prj'\. Near: '[^']*q_proj'.* in all\)"),
        (nn.Conv2d, r"no module matches .*Conv2d.*The model has .*Linear"),
        ("(", r"targets='\(' is not a regular expression"),
        (3, r"targets is a int; it must be a regex, a module type, a list"),
        ([3], r"targets has 3 in its list"),
        (".*norm", r"LoRA serves .*; 'model.layers.0.input_layernorm' is a LlamaRMSNorm"),
        ({"a": "b"}, r"targets is a dict, but LoRA has no members"),
    ],
)
def test_bad_targets_change_nothing(targets: Any, says: str) -> None:
    model = llama()
    before = snapshot(model)
    with pytest.raises(optx.TargetError, match=says):
        optx.attach(model, LoRA(rank=2), targets=targets)
    assert_same(model, before)


def test_no_defaults_for_an_unknown_model() -> None:
    with pytest.raises(
        optx.TargetError, match=r"default targets for Llama.*Sequential is none of them.*targets="
    ):
        optx.attach(mlp(), LoRA())


def test_composite_targets_by_member() -> None:
    model = bert()
    handle = optx.attach(model, optx.MAM(prefix=2, rank=2), targets={"ffn": r".*layer\.0\.output"})
    paths = [row.module for row in handle.report().rows]
    assert sum(path.endswith("output") for path in paths) == 1
    assert sum(path.endswith("self") for path in paths) == 2
    with pytest.raises(optx.TargetError, match=r"MAM has no member 'ffm'\. Near: 'ffn'"):
        optx.attach(model, optx.MAM(), targets={"ffm": ".*"}, name="other")
    with pytest.raises(optx.TargetError, match="MAM serves several kinds of modules"):
        optx.attach(model, optx.MAM(), targets=".*", name="other")


def test_rank_larger_than_the_matrix() -> None:
    with pytest.raises(
        optx.TargetError, match=r"rank=7 is larger than the weight of '0', \(8, 6\).*at most 6"
    ):
        optx.attach(mlp(), LoRA(rank=7), targets="0")


def test_inside_multihead_attention_nothing_would_act() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16)
    with pytest.raises(optx.TargetError, match=r"'self_attn.out_proj' is inside an nn.MultiheadAttention"):
        optx.attach(model, LoRA(rank=2), targets=r".*out_proj")


def test_a_sequential_would_run_what_is_added() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(optx.TargetError, match="'0' is a Sequential"):
        optx.attach(model, optx.ParallelAdapter(rank=2), targets="0")


@pytest.mark.filterwarnings("ignore:.*DataParallel:DeprecationWarning")
def test_wrapped_models_are_refused() -> None:
    with pytest.raises(optx.OptxError, match="a compiled model"):
        optx.attach(torch.compile(mlp(), backend="eager"), LoRA(rank=2), targets="0")  # type: ignore[arg-type]
    with pytest.raises(optx.OptxError, match="DataParallel, which has gathered"):
        optx.attach(nn.DataParallel(mlp()), LoRA(rank=2), targets="0")
    with pytest.raises(optx.OptxError, match="injection is 3; it must be"):
        optx.attach(mlp(), 3, targets="0")  # type: ignore[arg-type]


def test_an_attribute_called_optx_is_not_ours() -> None:
    model = mlp()
    model[0].optx = 3  # type: ignore[assignment]
    with pytest.raises(optx.OptxError, match="'0' has an attribute 'optx' of its own"):
        optx.attach(model, LoRA(rank=2), targets="0")


def test_a_bad_name() -> None:
    for name in ("not a name", "parts"):
        with pytest.raises(optx.OptxError, match="must be a Python identifier"):
            optx.attach(mlp(), LoRA(rank=2), targets="0", name=name)


def test_tied_weights_are_served_once() -> None:
    model = llama()
    handle = optx.attach(model, LoRA(rank=2), targets=(nn.Embedding, nn.Linear))
    paths = [row.module for row in handle.report().rows]
    assert "model.embed_tokens" in paths
    assert "lm_head" not in paths


def test_shared_modules_are_served_once() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleList([shared, shared])
    assert len(optx.attach(model, LoRA(rank=2), targets=nn.Linear)) == 1


@dataclass(frozen=True)
class Half(optx.Injection):
    """Fails at the second module."""

    name: ClassVar[str] = "halfway"
    role: ClassVar[str] = "linears"
    serves: ClassVar[str] = "Linear modules"

    def part(self, module: nn.Module, path: str) -> optx.Part:
        return Breaks() if path == "2" else optx.LoRA(rank=2).part(module, path)


class Breaks(optx.Part):
    @classmethod
    def overrides(cls, moment: str) -> bool:
        raise ZeroDivisionError


def test_failing_half_way_leaves_nothing() -> None:
    model = mlp()
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError):
        optx.attach(model, Half(), targets=nn.Linear)
    assert_same(model, before)


# ---- merging ----------------------------------------------------------------------------------------------


def test_a_weight_changed_after_the_merge_is_not_overwritten() -> None:
    model = mlp()
    handle = optx.attach(model, LoRA(rank=2), targets="0|2")
    move(handle)
    handle.merge()
    with torch.no_grad():
        model[2].weight.add_(1)  # type: ignore[operator]
    merged = {name: t.clone() for name, t in model.state_dict().items()}
    for undo in (handle.unmerge, handle.remove):
        with pytest.raises(optx.MergeError, match=r"2\.weight was changed after the merge"):
            undo()
    assert all(torch.equal(t, merged[name]) for name, t in model.state_dict().items())
    handle.merge_and_unload()
    assert torch.equal(model[2].weight, merged["2.weight"])  # type: ignore[arg-type]


def test_merging_keeps_one_copy_of_the_served_weights() -> None:
    model = mlp()
    handle = optx.attach(model, LoRA(rank=2), targets="0")
    handle.merge()
    kept = model[0].optx.originals  # type: ignore[union-attr]
    assert {name: t.numel() for name, t in kept.items()} == {"weight": 48, "bias": 8}  # type: ignore[union-attr]
    handle.unmerge()
    assert not model[0].optx.originals  # type: ignore[union-attr]


def test_a_tied_weight_is_merged_only_when_untied() -> None:
    model = llama()
    before, embedding = snapshot(model), model.get_input_embeddings().weight.clone()  # type: ignore[operator]
    handle = optx.attach(model, LoRA(rank=2), targets="lm_head")
    move(handle)
    attached = run(model)
    with pytest.raises(
        optx.MergeError, match=r"lm_head\.weight is tied: model\.embed_tokens\.weight, lm_head"
    ):
        handle.merge()
    handle.merge(untie=True)
    torch.testing.assert_close(run(model), attached, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.get_input_embeddings().weight, embedding)  # type: ignore[operator]
    handle.unmerge()
    assert model.lm_head.weight is model.get_input_embeddings().weight  # type: ignore[union-attr, operator]
    handle.remove()
    assert_same(model, before)


def test_no_bias_to_merge_into() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    handle = optx.attach(model, LoRA(rank=2, lora_bias=True), targets="0")
    weight = model[0].weight.clone()  # type: ignore[operator]
    with pytest.raises(optx.MergeError, match="'0' has no bias"):
        handle.merge()
    assert torch.equal(model[0].weight, weight)  # type: ignore[arg-type]
    assert not handle.merged


def test_loading_into_a_merged_adapter_is_refused() -> None:
    model = mlp()
    handle = optx.attach(model, LoRA(rank=2), targets="0")
    state = handle.state_dict()
    handle.merge()
    with pytest.raises(optx.MergeError, match="Call unmerge"):
        handle.load_state_dict(state)


# ---- training ---------------------------------------------------------------------------------------------


def test_trainable_only() -> None:
    model = mlp()
    model[4].weight.requires_grad_(False)  # type: ignore[union-attr]
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    first = optx.attach(model, LoRA(rank=2), targets="0")
    second = optx.attach(model, optx.BitFit(), targets="2")
    optx.trainable_only(model, first, second, also="4")
    on = {name for name, p in model.named_parameters() if p.requires_grad}
    assert on == {"0.optx.lora.A", "0.optx.lora.B", "2.optx.bitfit.delta", "4.weight", "4.bias"}
    first.remove()
    assert not model[0].weight.requires_grad  # type: ignore[union-attr]
    second.remove()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


def test_trainable_only_restores_at_once() -> None:
    model = mlp()
    handle = optx.attach(model, LoRA(rank=2), targets="0")
    with optx.trainable_only(model, handle):
        assert not model[4].weight.requires_grad  # type: ignore[union-attr]
    assert model[4].weight.requires_grad  # type: ignore[union-attr]


def test_trainable_only_refuses() -> None:
    model = mlp()
    handle = optx.attach(model, LoRA(rank=2), targets="0")
    with pytest.raises(optx.OptxError, match="no handle is given"):
        optx.trainable_only(model)
    with pytest.raises(optx.OptxError, match=r"also='5' matches no module\. Near"):
        optx.trainable_only(model, handle, also="5")
    with pytest.raises(optx.OptxError, match="is not attached to this model"):
        optx.trainable_only(mlp(), handle)
    handle.remove()
    with pytest.raises(optx.OptxError, match="removed> is not attached"):
        optx.trainable_only(model, handle)


def test_modules_to_save_are_trained_whole_and_given_back() -> None:
    model = mlp()
    before = snapshot(model)
    handle = optx.attach(model, LoRA(rank=2), targets="0", modules_to_save=["4"])
    optx.trainable_only(model, handle)
    opt = torch.optim.SGD(handle.parameters(), lr=0.1)
    model(torch.ones(3, 6)).sum().backward()
    opt.step()
    opt.zero_grad()
    trained = run_mlp(model)
    assert not torch.equal(model[4].weight, before["state"]["4.weight"])  # type: ignore[arg-type]
    state = {key: t.clone() for key, t in handle.state_dict().items()}
    assert {"4.weight", "4.bias"} < set(state)
    handle.remove()
    assert_same(model, before)
    again = optx.attach(model, LoRA(rank=2), targets="0", modules_to_save=["4"])
    again.load_state_dict(state)
    assert torch.equal(run_mlp(model), trained)
    with pytest.raises(optx.TargetError, match=r"modules_to_save has '7', no module\. Near"):
        optx.attach(mlp(), LoRA(rank=2), targets="0", modules_to_save=["7"])
    with pytest.raises(optx.TargetError, match="every target is in modules_to_save"):
        optx.attach(mlp(), LoRA(rank=2), targets="0", modules_to_save=["0"])


def run_mlp(model: nn.Module) -> Tensor:
    return model(torch.ones(3, 6))


def test_half_precision_bases_get_float32_adapters() -> None:
    model = mlp().to(torch.bfloat16)
    handle = optx.attach(model, LoRA(rank=2), targets="0")
    assert {p.dtype for p in handle.parameters()} == {torch.float32}
    output = model(torch.ones(3, 6, dtype=torch.bfloat16))
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in handle.parameters())


# ---- state dicts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: state.pop("0.lora_A.weight"), r"'0\.lora_A\.weight' is missing"),
        (
            lambda state: state.update({"0.lora_C": torch.ones(1)}),
            r"'0\.lora_C' has no place in this model\. Near",
        ),
        (
            lambda state: state.update({"0.lora_A.weight": torch.ones(3, 6)}),
            r"'0\.lora_A\.weight' has shape \(3, 6\), the model needs \(2, 6\)",
        ),
    ],
)
def test_a_wrong_state_dict_changes_nothing(change: Any, says: str) -> None:
    model = mlp()
    handle = optx.attach(model, LoRA(rank=2), targets="0")
    move(handle)
    state = {key: t.clone() + 1 for key, t in handle.state_dict().items()}
    before = snapshot(model)
    change(state)
    with pytest.raises(optx.FileError, match=says):
        handle.load_state_dict(state)
    assert_same(model, before)


def test_part_of_an_adapter_in_a_checkpoint_is_an_error() -> None:
    model = mlp()
    optx.attach(model, LoRA(rank=2), targets="0")
    state = model.state_dict()
    del state["0.optx.lora.A"]
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.optx\.lora\.A"):
        model.load_state_dict(state)
