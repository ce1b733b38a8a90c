"""optx.attach and its handle: for every injection and any stack, everything comes off without a trace."""

from __future__ import annotations

import functools
import io
import itertools
import pickle

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from injections import (
    ROWS,
    Row,
    assert_same,
    bert,
    clone,
    cnn,
    llama,
    move,
    pruned_bert,
    public_injections,
    rows_on,
    run,
    snapshot,
)
from plain_mlp import mlp, run_mlp
from torch import nn

import optx
from optx import LoRA

MERGING = [row for row in ROWS if row.merges]
each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.label)
each_merging = pytest.mark.parametrize("row", MERGING, ids=lambda row: row.label)


def test_the_table_has_every_injection() -> None:
    served = {type(row.injection()).__name__ for row in ROWS}
    trains_nothing = {
        "MuReadout",
        "MuAttention",
        "RF8Linear",
        "Softmax2",
        "SoftThinking",
        "LSSA",
        "LSSAR",
    }  # tests/scaling, attention and thinking, test_rf8_linear.py, test_softmax2_attach.py have theirs
    # In evaluation mode no gradient reaches them, or others compute: test_{window,ftwt,ewa,widenet}*.py.
    in_training_alone = {"WindowPrune", "FTWT", "EWA", "WideNet"}
    apart = {"HiddenDelta", "SphericalHead"}  # test_spherical_head.py
    assert set(public_injections()) - apart - trains_nothing - in_training_alone == served


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


@pytest.mark.long(keep=2)
@pytest.mark.filterwarnings("ignore:StableRPS. load_state_dict")  # that it takes no part
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
    added.update({key: t for key, t in checkpoint.items() if key in added})  # a head that is trained whole
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


@pytest.mark.long(keep=2)
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
    attached = run(model)  # a first call is looked at
    before = snapshot(model)
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


@pytest.mark.long(keep=2)
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


def put(stack: list[Row], model: nn.Module) -> list[optx.Handle]:
    """Attach these, without those that others rule out, by computing without the weight or with it."""
    handles = []
    for i, row in enumerate(stack):
        try:
            handles.append(row.attach(model, name=f"number{i}"))
        except optx.TargetError as error:
            if "takes no part while" not in str(error) and "out of work" not in str(error):
                raise
    return handles


@settings(max_examples=30, phases=[Phase.explicit, Phase.generate])
@given(st.data())
def test_any_stack_comes_off_in_any_order(data: st.DataObject) -> None:
    build = data.draw(st.sampled_from([llama, bert, pruned_bert, cnn]))
    rows = rows_on(build)
    stack = data.draw(st.lists(st.sampled_from(rows), min_size=1, max_size=4))
    frozen = data.draw(st.booleans())
    model = build()
    before, output = snapshot(model), run(model)
    handles = put(stack, model)
    if frozen:
        optx.trainable_only(model, *handles)
    for i, handle in enumerate(handles):
        move(handle, seed=i)
    run(model)
    merging = {type(row.injection()) for row in stack if row.merges}
    mergeable = itertools.takewhile(lambda handle: type(handle.injection) in merging, handles)
    for handle in itertools.islice(mergeable, data.draw(st.integers(0, len(stack)))):
        _done(handle, "merge")  # or refused: IA3's input scales wait for all that sees the input
    run(model)
    for handle in data.draw(st.permutations(handles)):
        handle.remove()
    assert_same(model, before)
    assert torch.equal(run(model), output)


@settings(max_examples=25, phases=[Phase.explicit, Phase.generate])  # shrinking builds models for minutes
@given(st.data())
def test_merges_of_a_stack_are_exact_or_refused(data: st.DataObject) -> None:
    build = data.draw(st.sampled_from([llama, bert, pruned_bert, cnn]))
    rows = rows_on(build, MERGING)
    stack = data.draw(st.lists(st.sampled_from(rows), min_size=2, max_size=3))
    model = build().double()
    handles = put(stack, model)
    for i, handle in enumerate(handles):
        move(handle, seed=i)
    attached, before = run(model), snapshot(model)  # after the first call, which looks for uncalled weights
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


# ---- in the weight's place --------------------------------------------------------------------------------

IN_PLACE = [optx.PSDFactor(init="fit"), optx.RF8Linear(), optx.StableRPS(compression=0.5)]


@pytest.mark.parametrize("replacing", IN_PLACE, ids=lambda injection: type(injection).__name__)
@pytest.mark.parametrize("first", [LoRA(rank=2), optx.IA3()], ids=lambda injection: type(injection).__name__)
def test_a_weight_in_the_place_of_another_keeps_what_was_attached_before(
    replacing: optx.Injection, first: optx.Injection
) -> None:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
    handles = [optx.attach(model, one, "0") for one in (first, replacing)]
    move(handles[0])
    attached = model(torch.eye(6))
    with pytest.raises(optx.MergeError, match=r"is not merged.*Merge that one first"):
        handles[0].merge()  # into a weight that takes no part
    for handle in reversed(handles):
        handle.merge()
        torch.testing.assert_close(model(torch.eye(6)), attached)
    with pytest.raises(optx.MergeError, match=r"is merged.*Unmerge that one first"):
        handles[1].unmerge()
    for handle in handles:
        handle.unmerge()
        torch.testing.assert_close(model(torch.eye(6)), attached)


@pytest.mark.parametrize("replacing", IN_PLACE, ids=lambda injection: type(injection).__name__)
def test_a_weight_that_another_works_with_is_not_put_out_of_work(replacing: optx.Injection) -> None:
    model = nn.Sequential(nn.Linear(6, 6))
    optx.attach(model, LoRA(rank=2, dora=True), "0")
    before = snapshot(model)
    with pytest.raises(optx.TargetError, match=r"out of work, with which 'lora' works.*Remove that first"):
        optx.attach(model, replacing, "0")
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
