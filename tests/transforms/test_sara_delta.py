"""What SaRA trained, as a delta: exact on its base, refused on others, small as a file."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sara_runs import copies, net, train, wrapped
from torch import Tensor, nn

import optx
from optx.delta._selected import Trained, selected_delta


def bits(t: Tensor) -> Tensor:
    """As whole numbers."""
    return t.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


@pytest.mark.long(keep=3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("compact", [False, True])
def test_on_a_fresh_base_it_makes_the_weights_bit_for_bit(
    dtype: torch.dtype, compact: bool, tmp_path: Path
) -> None:
    model = net(dtype=dtype)
    opt = wrapped(model, compact=compact, reselect_at=5)
    train(model, opt, range(10))
    delta = opt.sara.delta(net(dtype=dtype))
    tuned = copies(model)
    train(model, opt, range(10, 12))  # it is of the weights as they were
    delta.save(tmp_path / "x.safetensors")
    for one in (delta, optx.Delta.load(tmp_path / "x.safetensors")):
        made: Any = one.apply(net(dtype=dtype))
        assert set(made) == set(tuned)
        assert all(torch.equal(bits(made[name]), bits(t)) for name, t in tuned.items())
    assert any(not torch.equal(p, tuned[name]) for name, p in model.named_parameters())


def test_it_takes_a_file_and_the_selected_entries_space(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    base = nn.Linear(256, 256)
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    opt = wrapped(base, fraction=0.1)
    for _ in range(3):
        base(torch.ones(2, 256)).sum().backward()
        opt.step()
    path = opt.sara.delta(tmp_path / "base.safetensors").save(tmp_path / "delta.safetensors")
    assert path.stat().st_size < 10 * opt.sara.density().selected + 2000  # 8 bytes, and a gap's one
    optx.Delta.load(path).apply(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors")
    from safetensors.torch import load_file

    assert torch.equal(load_file(tmp_path / "tuned.safetensors")["weight"], base.weight)


def test_another_base_is_refused(tmp_path: Path) -> None:
    model = net()
    opt = wrapped(model)
    train(model, opt, range(5))
    delta = opt.sara.delta(net())
    delta.save(tmp_path / "x.safetensors")
    loaded = optx.Delta.load(tmp_path / "x.safetensors")
    other = net()
    with torch.no_grad():
        other[3].weight[-1, -1] += 1.0  # beyond what a fingerprint of the first numbers sees
    for base in (other, net(seed=1), model):
        for one in (delta, loaded):
            with pytest.raises(optx.OptxError, match="not the base that the delta was taken from"):
                one.apply(base)
    for base in (other, net(seed=1)):
        with pytest.raises(optx.OptxError, match="this is not the base that was trained from"):
            opt.sara.delta(base)
    with pytest.raises(optx.OptxError, match=r"in base torch\.float64: no change makes one of the other"):
        opt.sara.delta(net(dtype=torch.float64))
    with pytest.raises(optx.ShapeError, match="in base"):
        opt.sara.delta(net(width=25))
    with pytest.raises(optx.OptxError, match=r"base has no '0\.weight'"):
        opt.sara.delta(nn.Sequential(nn.Tanh(), nn.Linear(3, 3)))


@pytest.mark.parametrize("options", [{"threshold": 0.05}, {"fraction": 0.2}], ids=str)
def test_a_selection_made_of_tuned_weights_is_noticed(options: dict[str, float]) -> None:
    model = net()
    opt = wrapped(model, **options)
    train(model, opt, range(30))
    saved, tuned = copy.deepcopy(opt.state_dict()), copies(model)
    for resumes in (False, True):
        model.load_state_dict(tuned)
        again = wrapped(model, **options)  # selects from weights that have moved
        if resumes:
            again.load_state_dict(saved)
        train(model, again, range(5))
        if resumes:
            made: Any = again.sara.delta(net()).apply(net())
            assert all(torch.equal(made[n], p) for n, p in model.named_parameters())
        else:
            with pytest.raises(optx.OptxError, match="was made of weights that had been trained"):
                again.sara.delta(net())


def test_groups_that_are_left_out_are_in_it_and_names_are_needed() -> None:
    model, head = net(), nn.Linear(24, 2)
    kept = {f"head.{name}": t.clone() for name, t in head.state_dict().items()}
    base = {**{f"body.{n}": t for n, t in copies(model).items()}, **kept}
    both = nn.ModuleDict({"body": model, "head": head})
    groups: list[Any] = [{"params": model.parameters()}, {"params": head.parameters(), "sara": False}]
    opt = optx.wrap(torch.optim.AdamW(groups, lr=1e-2), optx.SaRA(fraction=0.2))
    head(model(torch.ones(2, 16))).sum().backward()
    opt.step()
    with pytest.raises(optx.OptxError, match=r"delta\(\) needs the parameters' names; give model="):
        opt.sara.delta(base)
    made: Any = opt.sara.delta(base, both).apply(base)
    assert all(torch.equal(made[name], t) for name, t in copies(both).items())
    assert not torch.equal(made["head.weight"], kept["head.weight"])
    with pytest.raises(optx.OptxError, match="finds no name for"):
        opt.sara.delta(base, model)
    assert opt.sara.density(both).rows[0].name == "body.0.weight"


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.floats(width=32), st.floats(width=32)), min_size=1, max_size=20),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_two_numbers_have_an_exact_change(pairs: list[tuple[float, float]], dtype: torch.dtype) -> None:
    old, new = (torch.tensor(side).to(dtype) for side in zip(*pairs, strict=True))
    delta = selected_delta("test", {"w": old}, {"w": Trained(new)})
    made: Any = delta.apply({"w": old})
    same = (made["w"] == new) | (made["w"].isnan() & new.isnan())
    assert bool(same.all())


def test_a_number_that_no_float64_change_reaches_takes_the_tensor_as_it_is() -> None:
    old, new = torch.tensor([1.0, 2.0]), torch.tensor([2.0**-40 * 1.1, 2.0])
    delta = selected_delta("test", {"w": old}, {"w": Trained(new)})
    assert delta.whole == {"w"}
    assert torch.equal(delta.apply({"w": old})["w"], new)  # type: ignore[index]
