"""`optx bench hft` on a tiny random Llama: what it counts, how profiles are sorted, what the floor is."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import record_function

pytest.importorskip("transformers")

from typer.testing import CliRunner

from optx.cli import app
from optx.recipes import _bench_hft
from optx.recipes._bench_hft import PARTS, Subject
from optx.recipes._step_profile import Operation, quickest

TOKENS, HIDDEN, INNER, WORDS, HEADS, LAYERS = 20, 32, 48, 50, 4, 2
# One matrix of each kind and block, keys and values of half the width.
MATRICES = [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)]


@pytest.fixture(autouse=True)
def one_thread(_threads: None) -> None:
    """At this size, two threads mostly wait for each other."""
    torch.set_num_threads(1)


def llama(tied: bool) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def tokens() -> Tensor:
    return torch.randint(0, WORDS, (1, TOKENS))


def measured(tied: bool = True, **options: Any) -> list[Subject]:
    both = _bench_hft.subjects(llama(tied), options.pop("ratio", 0.5), options.pop("level", "category"), 0)
    _bench_hft.measure(both, tokens(), 2, 1, time.perf_counter, **options)
    return both


def product(*shape: int) -> int:
    return 2 * TOKENS * shape[0] * shape[1]


@pytest.mark.long(keep=2)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("level", ["category", "layer", "model"])
def test_autograd_leaves_out_what_it_can_and_no_more(tied: bool, level: str) -> None:
    both = measured(tied, level=level)
    adamw, hft = (_bench_hft.count(subject, tokens()) for subject in both)
    linear = LAYERS * sum(product(*shape) for shape in MATRICES) + product(WORDS, HIDDEN)
    attention = LAYERS * 2 * 2 * TOKENS * TOKENS * HIDDEN  # queries by keys, and those by values
    assert adamw.forward == hft.forward == linear + attention
    assert adamw.weight_gradients == linear
    # The gradient of the input of every layer, and 5 products of attention's, one of them computed again.
    assert adamw.backward == 2 * linear + attention * 5 // 2
    frozen = [p for p in both[1].model.parameters() if p.ndim == 2 and not p.requires_grad]
    needless = sum(product(*p.shape) for p in frozen)
    assert needless > 0
    assert hft.weight_gradients == linear - needless
    assert hft.backward == adamw.backward - needless
    assert (adamw.matrices, hft.matrices) == (7 * LAYERS + 1, 7 * LAYERS + 1 - len(frozen))


def test_bytes_are_those_of_the_trained() -> None:
    both = measured()
    for subject in both:
        work = _bench_hft.count(subject, tokens())
        given = [p for p in subject.model.parameters() if p.requires_grad]
        numbers = sum(p.numel() for p in given)
        assert work.gradient_bytes == 4 * numbers
        assert work.state_bytes == 8 * numbers + 4 * len(given)  # and a step count each
        assert work.step_bytes == 28 * numbers
    assert len(both[1].trained) < len(both[0].trained)


def test_profile_finds_each_weight_gradient_by_its_shape() -> None:
    for subject in measured(tied=False):
        looked_up = subject.model.get_input_embeddings().weight  # no product, though it has a gradient
        matrices = [p for p in subject.trained if p.ndim == 2 and p is not looked_up]
        expected = Counter((min(p.shape), max(p.shape)) for p in matrices)
        assert Counter(o.matrix for o in subject.operations if o.matrix) == expected


def test_profile_knows_parts_and_kinds() -> None:
    for subject in measured():
        kinds = Counter((o.kind, o.name) for o in subject.operations)
        assert {kind.partition(":")[0] for kind, _ in kinds} == set(PARTS)
        assert kinds["forward: products", "mm"] == kinds["backward: input gradients", "mm"] == 7 * LAYERS + 1
        assert kinds["backward: embedding", "embedding_dense_backward"] == 1
        assert kinds["backward: loss", "_log_softmax_backward_data"] == 1
        assert subject.kind("backward") > subject.kind("backward: embedding") > 0


def test_each_operation_is_as_quick_as_its_quickest() -> None:
    x = torch.ones(3)

    def step(sleep: float) -> None:
        with record_function("optx forward"):
            x.neg()
            time.sleep(sleep)
            x.abs()

    slow = quickest(lambda: step(0.05), 5)
    assert slow[0].name == "optx forward"
    assert {"neg", "abs"} <= {o.name for o in slow}
    assert slow[0].seconds > 0.05
    quick = quickest(lambda: step(0.0), 5, slow)
    assert quick[0].seconds < 0.05
    assert quickest(lambda: step(0.05), 5, quick)[0].seconds == quick[0].seconds
    with pytest.raises(RuntimeError, match="different operations"):
        quickest(x.exp, 5, quick)


def test_floor_takes_off_the_frozen_matrices_at_their_own_price() -> None:
    def subject(*trained: bool) -> Subject:
        sizes = ((3, 4), (4, 3), (2, 6))
        layers = nn.ModuleList(nn.Linear(*size, bias=False) for size in sizes)
        for layer, wanted in zip(layers, trained, strict=True):
            layer.requires_grad_(wanted)
        return Subject("", layers, torch.optim.AdamW(layers.parameters()))

    def gradient(seconds: float, *matrix: int) -> Operation:
        return Operation("backward: weight gradients", "mm", (matrix[0], matrix[1]), seconds)

    adamw, hft = subject(True, True, True), subject(False, False, True)
    adamw.operations = [gradient(0.5, 3, 4), gradient(0.7, 3, 4), gradient(2.0, 2, 6)]
    adamw.operations += [
        Operation("backward: other", "add", None, 0.8),
        Operation("step: all", "", None, 9.0),
    ]
    adamw.times = {"forward": [3.0, 2.0], "backward": [5.0, 6.0], "step": [1.0, 3.0]}
    assert _bench_hft.frozen_matrices(hft.model) == {(3, 4): 2}
    floor = _bench_hft.floors([adamw, hft])
    assert floor["forward"] == 1
    assert floor["backward"] == pytest.approx(1 - 2 * 0.6 / 4)
    assert floor["step"] == pytest.approx(1 / 3)
    assert floor["all"] == pytest.approx((2 + 5 * floor["backward"] + 1 / 3) / 8)


def test_gradients_stay_in_place_where_asked() -> None:
    for subject in measured(keep=True):
        assert all(p.grad is not None for p in subject.trained)
        before = [p.grad.data_ptr() for p in subject.trained if p.grad is not None]
        _bench_hft.measure([subject], tokens(), 1, 0, time.perf_counter, keep=True)
        assert before == [p.grad.data_ptr() for p in subject.trained if p.grad is not None]


def test_command(tiny_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "times.json"
    small = ["--model", str(tiny_folder), "--tokens", "20", "--threads", "1"]
    options = [*small, "--rounds", "2", "--profiled", "1", "--json", str(file)]
    shown = CliRunner().invoke(app, ["bench", "hft", *options])
    assert shown.exit_code == 0, shown.output
    assert "15 weight gradients for 15 trained matrices" in " ".join(shown.output.split())
    found = json.loads(file.read_text())
    assert [len(s["times"]["backward"]) for s in found["subjects"]] == [2, 2]
    assert set(found["floor"]) == {*PARTS, "all", "weight gradients"}
    refused = CliRunner().invoke(app, ["bench", "hft", *small, "--tokens", "48"])
    assert refused.exit_code == 2
    assert (
        "--tokens: 48 tokens a step is also a size of model.layers.0.mlp.gate_proj.weight" in refused.output
    )


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    """The tied Llama, with a tokenizer of single letters."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    letters = Tokenizer(models.BPE({chr(97 + i): i for i in range(26)}, []))
    PreTrainedTokenizerFast(tokenizer_object=letters).save_pretrained(tmp_path / "llama")
    llama(tied=True).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"
