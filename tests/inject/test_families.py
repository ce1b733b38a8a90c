"""Defaults over families and methods: all is served and right, or it is refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import transformers
from family_models import BY_LABEL
from injections import public_injections

from optx.recipes import _bench_families

if int(transformers.__version__.split(".")[0]) < 5:
    pytest.skip("experts and ViT are built otherwise in transformers 4", allow_module_level=True)

RESULTS = Path(__file__).parents[2] / "recipes/results/bench-families.json"

NO_BIASES = "Llama Mistral Qwen3 Gemma Gemma2 Gemma3 Phi-3 T5 Mixtral Qwen3-MoE DeepSeek-V2 DeepSeek-V3"
NO_SDPA = "Gemma2 GPT-Neo Bloom DeBERTa-v2 DeepSeek-V2 DeepSeek-V3 Mamba"
NO_FFN_MODULE = "OPT BART Whisper Mamba"
EXPERTS = "Mixtral Qwen2-MoE Qwen3-MoE DeepSeek-V2 DeepSeek-V3"

# The families that a method refuses.
REFUSED = {
    "LoRA": "Mamba",
    "SVFit": "Mamba",
    "IA3": f"{EXPERTS} Mamba",
    "FLoRA": f"{EXPERTS} Mamba",
    "BitFit": f"{NO_BIASES} Mamba",
    "SequentialAdapter": "Mamba",
    "ParallelAdapter": NO_FFN_MODULE,
    "ScaledParallelAdapter": NO_FFN_MODULE,
    "MultiHeadParallelAdapter": NO_SDPA,
    "PrefixTuning": NO_SDPA,
    "MAM": f"{NO_SDPA} {NO_FFN_MODULE}",
    "Aside": "",
    "IAA": "Mamba",
    "Perp": "",
    "STN": f"{EXPERTS} Mamba",
}

# Each of these has two blocks; of an encoder and a decoder, two each.
SERVED = {
    ("Phi-3", "IA3"): {"self_attn.qkv_proj", "mlp.down_proj"},
    ("DeBERTa-v2", "IA3"): {"attention.self.key_proj", "attention.self.value_proj", "output.dense"},
    ("Mixtral", "SequentialAdapter"): {"self_attn.o_proj", "mlp"},
    ("DeepSeek-V3", "SequentialAdapter"): {"self_attn.o_proj", "mlp.down_proj", "mlp"},
    ("DeepSeek-V3", "LoRA"): {"self_attn.q_b_proj", "self_attn.kv_b_proj"},
    ("GPT-Neo", "LoRA"): {"attn.attention.q_proj", "attn.attention.v_proj"},
    ("CLIP", "LoRA"): {"self_attn.q_proj", "self_attn.v_proj"},
}


Rows = dict[tuple[str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def rows() -> Rows:
    return _bench_families.pairs(_bench_families.measure())


def test_every_injection_is_measured_on_every_family(rows: Rows) -> None:
    assert len(rows) == len(BY_LABEL) * len(_bench_families.METHODS)
    missing = set(public_injections()) - set(_bench_families.METHODS)
    of_width = {"MuReadout", "MuAttention"}  # fixed factors; their families: tests/scaling
    of_images = {"FTWT", "WindowPrune"}  # test_ftwt_chains.py, test_window_models.py
    from_scratch = {"StableRPS"}  # its weights are drawn: test_shared_weights.py
    of_experts = {"EWA", "WideNet"}  # test_ewa_models.py, test_widenet_models.py
    # They serve what is named: test_psd_factor.py, test_softmax2_attach.py, lipschitz.
    named = {"PSDFactor", "Softmax2", "LDLT"}
    of_mixers = {"S4D"}  # test_s4d_models.py
    of_length = {"LSSA", "LSSAR"}  # in attention's place, without parameters: tests/attention
    of_inference = {"RF8Linear"}  # trains nothing: test_rf8_linear.py
    of_policies = {"PMOEHead"}  # tests/policy
    of_generation = {"SoftThinking"}  # trains nothing: test_thinking_models.py
    of_heads = {"VQLogits"}  # of language models: test_vq_logits_models.py
    # The others are HiddenDelta's choices; ABMLL serves what LoRA serves, of modules.
    assert missing == {
        "HiddenDelta",
        "ABMLL",
        "SphericalHead",  # of no block: test_spherical_head.py
        *of_width,
        *of_images,
        *from_scratch,
        *of_inference,
        *of_length,
        *named,
        *of_experts,
        *of_heads,
        *of_policies,
        *of_mixers,
        *of_generation,
    }


def test_what_is_refused_and_nothing_else(rows: Rows) -> None:
    refused: dict[str, set[str]] = {method: set() for method in _bench_families.METHODS}
    for (family, method), row in rows.items():
        if "refused" in row:
            refused[method].add(family)
            assert row["refused"].startswith("attach: ")
            assert any(way in row["refused"] for way in ("Pass ", "pass ", "Attach ", "Load ")), row
    assert refused == {method: set(families.split()) for method, families in REFUSED.items()}


def test_what_is_served_starts_as_nothing_learns_everywhere_and_comes_off(rows: Rows) -> None:
    served = {key: row for key, row in rows.items() if "served" in row}
    prefixes = {name for name, method in _bench_families.METHODS.items() if method.prefix}
    assert [key for key, row in served.items() if row["identity"] == (key[1] in prefixes)] == []
    assert [key for key, row in served.items() if row["unreached"]] == []
    assert [key for key, row in served.items() if not row["removed"]] == []


@pytest.mark.parametrize("pair", SERVED, ids=" ".join)
def test_served_modules(rows: Rows, pair: tuple[str, str]) -> None:
    """The case defaults_serve_a_part.py, and others of its kind."""
    served = rows[pair]["served"]
    places = [_bench_families.in_block(path) for path in served]
    assert set(places) == SERVED[pair]
    if pair[0] == "CLIP":  # two towers
        assert len(served) == 4 * len(SERVED[pair])
    if "mlp.down_proj" not in places:
        assert {places.count(place) for place in places} == {4 if pair[0] == "CLIP" else 2}


def test_the_table_on_the_page_is_todays(rows: Rows) -> None:
    """If not: ``optx bench families --json bench-families.json`` and ``_pages add`` make it anew."""
    kept = json.loads(RESULTS.read_text())
    if kept["transformers"] != transformers.__version__:
        pytest.skip("made with another version of transformers")
    page = _bench_families.pairs(kept["rows"])
    assert list(page) == list(rows)
    assert [key for key in rows if page[key] != rows[key]] == []
