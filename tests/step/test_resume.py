"""A resumed run is the uninterrupted run, bit for bit; and what becomes of files that break."""

from __future__ import annotations

import copy
import itertools
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import resume_cases
import torch
from bases import flat, make_net, train
from resume_cases import FILES, Case, cases
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import optx

HERE = Path(__file__).parent


def difference(a: Any, b: Any) -> list[str]:
    """The paths at which two state dicts are not the same, in bits, dtypes and types."""
    a, b = flat(a), flat(b)

    def same(x: Any, y: Any) -> bool:
        if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
            return x.dtype == y.dtype and torch.equal(x, y)
        return type(x) is type(y) and x == y

    return sorted(k for k in a.keys() | b.keys() if k not in a or k not in b or not same(a[k], b[k]))


@pytest.mark.parametrize("which", ["few", pytest.param("all", marks=pytest.mark.long)])
@pytest.mark.parametrize("path", ["fused", pytest.param("foreach", marks=pytest.mark.long)])
def test_every_run_resumed_in_a_new_process_is_the_uninterrupted_one(
    path: str, which: str, tmp_path: Path
) -> None:
    torch.set_num_threads(1)  # tensors are tiny, and two threads wait for each other on a busy machine
    mine = cases(path, which)
    whole = {case: resume_cases.start(case, tmp_path) for case in mine}
    command = [sys.executable, "-W", "error", str(HERE / "resume_cases.py"), str(tmp_path), path, which]
    subprocess.run(command, check=True, timeout=1200)
    resumed = torch.load(tmp_path / "ends.pt", weights_only=True)
    assert len(resumed) == 2 * len(mine) >= (30 if which == "all" else 8)
    for case in mine:
        for kind in FILES:
            assert difference(whole[case], resumed[f"{case}:{kind}"]) == [], f"{case} from {kind}"
    check_that_runs_differ({case: end["model"]["enter.weight"] for case, end in whole.items()})
    case = next(c for c in mine if str(c).startswith("AdamW-l2-fp32"))
    anchors = [entry["optx.adamr.anchor"] for _, entry in sorted(whole[case]["opt"]["state"].items())]
    start = dict(case.model().named_parameters())
    assert all(torch.equal(a, w) for a, w in zip(anchors, start.values(), strict=True))
    assert not torch.equal(whole[case]["model"]["enter.weight"], start["enter.weight"])


def check_that_runs_differ(weights: dict[Case, torch.Tensor]) -> None:
    """Else the comparison would compare nothing: every transform acts, and so does the rounding."""
    alike = [
        (str(a), str(b))
        for (a, x), (b, y) in itertools.combinations(weights.items(), 2)
        if x.dtype == y.dtype and torch.equal(x, y) and a.transforms != "hft" != b.transforms
    ]
    assert alike == []


def test_slots_keep_their_dtype_where_torch_would_cast_them() -> None:
    """torch's load_state_dict casts state to the weight's dtype: 1 + 2**-20 would come back as 1."""
    w = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    fine = torch.full((4,), 1 + 2.0**-20)

    class Keeps(optx.Transform):
        name = "keeps"
        slots: ClassVar = {"fine": optx.like_weight(torch.float32)}

        def init_slot(self, name: str, p: torch.Tensor, optimizer: optx.Wrapped) -> torch.Tensor:
            return fine.clone()

    opt = optx.wrap(torch.optim.Adam([w]), Keeps())
    opt.slot(w, opt.keeps, "fine")
    w.grad = torch.ones_like(w)
    opt.step()
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert opt.slot(w, opt.keeps, "fine").dtype == torch.float32
    assert torch.equal(opt.slot(w, opt.keeps, "fine"), fine)


def test_a_file_saved_before_the_first_step_keeps_the_anchors(tmp_path: Path) -> None:
    net = make_net()
    opt = optx.wrap(torch.optim.AdamW(net.parameters(), lr=0.01), optx.AdamR())
    optx.save_optimizer(opt, tmp_path / "opt.safetensors")
    other = make_net(seed=5)
    again = optx.wrap(torch.optim.AdamW(other.parameters(), lr=0.01), optx.AdamR())
    optx.load_optimizer(again, tmp_path / "opt.safetensors")
    pairs = zip(net.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(again.slot(q, again.adamr, "anchor"), p) for p, q in pairs)
    assert not any(again.state.values())  # the base must still find its state empty


def test_a_parameter_that_is_there_twice_keeps_its_number() -> None:
    """torch numbers by position; the parameter behind one that is listed twice has the number after it."""
    a, b, c = (nn.Parameter(torch.full((3,), float(i))) for i in range(3))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        base = torch.optim.SGD([a, a, b, c], lr=0.1)
    opt = optx.wrap(base, optx.AdamR(normalize=False))
    anchors = {p: opt.slot(p, opt.adamr, "anchor").clone() for p in (a, b, c)}
    saved = copy.deepcopy(opt.state_dict())
    for p in (a, b, c):
        opt.slot(p, opt.adamr, "anchor").zero_()
    opt.load_state_dict(saved)
    assert all(torch.equal(opt.slot(p, opt.adamr, "anchor"), anchors[p]) for p in anchors)
    assert set(saved["optx_pending"]) <= {n for g in saved["param_groups"] for n in g["params"]}


# ---- files that break -------------------------------------------------------------------------------------

KILLED = """
import os, resource, signal, sys, torch, optx
net = torch.nn.Linear(300, 300)
opt = optx.wrap(torch.optim.AdamW(net.parameters(), lr=1.0), optx.AdamR())
optx.save_optimizer(opt, sys.argv[1])
opt.param_groups[0]["lr"] = 2.0
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # no file grows past this
try:
    optx.save_optimizer(opt, sys.argv[1])
except Exception as error:  # as on a full disk
    print(type(error).__name__, *sorted(os.listdir(os.path.dirname(sys.argv[1]))), flush=True)
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # from here on it kills, in the middle of the write
optx.save_optimizer(opt, sys.argv[1])
"""


def test_a_full_disk_or_a_kill_in_the_middle_of_a_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "opt.safetensors"
    command = [sys.executable, "-c", KILLED, str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -signal.SIGXFSZ
    told, *files = done.stdout.split()
    assert told.endswith("Error")
    assert files == [path.name]  # and no rubbish beside it
    assert any(p.is_file() and p != path for p in tmp_path.rglob("*"))  # it was in the middle
    net = nn.Linear(300, 300)
    opt = optx.wrap(torch.optim.AdamW(net.parameters()), optx.AdamR())
    optx.load_optimizer(opt, path)
    assert opt.param_groups[0]["lr"] == 1.0
    assert opt.slot(net.weight, opt.adamr, "anchor").shape == (300, 300)


def test_a_saved_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    optx.save_optimizer(torch.optim.SGD([nn.Parameter(torch.ones(2))]), tmp_path / "opt.safetensors")
    (tmp_path / "other").touch()
    modes = [stat.S_IMODE((tmp_path / n).stat().st_mode) for n in ("opt.safetensors", "other")]
    assert modes[0] == modes[1]


def _saved(path: Path) -> bytes:
    net = make_net()
    opt = optx.wrap(torch.optim.AdamW(net.parameters(), lr=0.01), optx.AdamR())
    train(net, opt, range(2))
    optx.save_optimizer(opt, path)
    return path.read_bytes()


def _truncated(path: Path) -> None:
    path.write_bytes(_saved(path)[:-100])


def _empty(path: Path) -> None:
    path.touch()


def _pickle(path: Path) -> None:
    torch.save({"state": {}}, path)


def _weights(path: Path) -> None:
    save_file({"weight": torch.ones(3)}, path)


def _other_metadata(path: Path) -> None:
    save_file({"weight": torch.ones(3)}, path, metadata={"optx": "no json"})


def _other_tree(path: Path) -> None:
    save_file({"weight": torch.ones(3)}, path, metadata={"optx": json.dumps([1, {"what": 2}])})


def _tensor_missing(path: Path) -> None:
    _saved(path)
    with safe_open(path, "pt") as file:
        names, metadata = list(file.keys()), file.metadata()
        tensors = {n: file.get_tensor(n).clone() for n in names[1:]}
    save_file(tensors, path, metadata=metadata)


BROKEN = [_truncated, _empty, _pickle, _weights, _other_metadata, _other_tree, _tensor_missing]


@pytest.mark.parametrize("spoil", BROKEN, ids=lambda f: f.__name__.strip("_"))
def test_a_broken_file_is_one_clear_sentence_and_changes_nothing(spoil: Any, tmp_path: Path) -> None:
    path = tmp_path / "opt.safetensors"
    spoil(path)
    net = make_net()
    opt = optx.wrap(torch.optim.AdamW(net.parameters(), lr=0.01), optx.AdamR())
    train(net, opt, range(3))
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(optx.OptxError) as caught:
        optx.load_optimizer(opt, path)
    message = str(caught.value)
    assert message.startswith(f"load_optimizer: {os.fspath(path)!r}")
    assert "\n" not in message
    assert "save_optimizer" in message
    assert difference(before, opt.state_dict()) == []


def test_a_missing_file_is_a_missing_file(tmp_path: Path) -> None:
    opt = torch.optim.SGD([nn.Parameter(torch.ones(2))])
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
        optx.load_optimizer(opt, tmp_path / "nowhere.safetensors")


def test_what_safetensors_cannot_hold_is_named_and_the_old_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "opt.safetensors"
    path.write_bytes(b"old")
    opt = torch.optim.SGD([nn.Parameter(torch.ones(2))])
    opt.param_groups[0]["schedule"] = lambda step: 1.0
    with pytest.raises(optx.OptxError, match=r"param_groups\.0\.schedule is a function"):
        optx.save_optimizer(opt, path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_another_number_of_groups_changes_nothing(tmp_path: Path) -> None:
    net = make_net()
    first, *rest = net.parameters()
    opt = optx.wrap(torch.optim.AdamW([{"params": [first]}, {"params": rest}]), optx.AdamR())
    train(net, opt, range(2))
    before = copy.deepcopy(opt.state_dict())
    _saved(tmp_path / "opt.safetensors")
    with pytest.raises(ValueError, match="parameter groups"):
        optx.load_optimizer(opt, tmp_path / "opt.safetensors")
    assert difference(before, opt.state_dict()) == []
    train(net, opt, range(2, 4))


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    opt = optx.wrap(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1))
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for path, kind, named in (
        ("missing/opt.safetensors", FileNotFoundError, "missing"),
        ("missing/deeper/opt.safetensors", FileNotFoundError, "missing/deeper"),
        ("file/opt.safetensors", NotADirectoryError, "file"),
        ("folder", IsADirectoryError, "folder"),
    ):
        with pytest.raises(kind) as raised:
            optx.save_optimizer(opt, tmp_path / path)
        assert raised.value.filename == str(tmp_path / named)
        assert str(raised.value).endswith(repr(str(tmp_path / named)))
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder"]
