"""What goes with a model's weights: tokenizers, templates, code, the folders of sentence-transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import bert, llama
from delta_cases import normal
from safetensors.torch import save_file
from typer.testing import CliRunner

import optx
from optx import Delta, cli
from optx.delta._side_files import side_files

CARRIED = (
    *(
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
    ),
    *("merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "special_tokens_map.json"),
    *(
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "additional_chat_templates/tool_use.jinja",
    ),
    *(
        "preprocessor_config.json",
        "processor_config.json",
        "video_preprocessor_config.json",
        "image_processor.json",
    ),
    *("modeling_custom.py", "configuration_custom.py", "helpers/tools.py", "README.md", "LICENSE", "NOTICE"),
    *("qwen.tiktoken", "vocab.bpe", "tokenizer.model.v3", "tekken.json", "bpe.codes", "emoji.tsv"),
    *(
        "modules.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
        "1_Pooling/config.json",
    ),
    *("2_Dense/config.json", "2_Dense/model.safetensors", "3_Normalize/config.json", "params.yaml"),
)
LEFT = (
    *(
        "pytorch_model.bin",
        "tf_model.h5",
        "flax_model.msgpack",
        "model.onnx",
        "onnx/model.onnx",
        "onnx/config.json",
    ),
    *(
        "consolidated.safetensors",
        "consolidated.00.pth",
        "training_args.bin",
        "optimizer.pt",
        "rng_state.pth",
    ),
    *("openvino/openvino_model.xml", "checkpoint-500/config.json", ".git/config", ".cache/x.json", "x.gguf"),
    *("pytorch_model.bin.index.json", "runs/events.txt", "__pycache__/modeling_custom.cpython-311.pyc"),
)


def folder_with(folder: Path, names: tuple[str, ...]) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"this is {name}")
    (folder / "config.json").write_text("{}")
    modules = [{"idx": 0, "path": ""}, *({"path": n} for n in ("1_Pooling", "2_Dense", "3_Normalize"))]
    (folder / "modules.json").write_text(json.dumps(modules))
    save_file({"w": torch.zeros(3)}, folder / "model.safetensors")
    return folder


def test_all_that_is_needed_is_carried_over(tmp_path: Path) -> None:
    base = folder_with(tmp_path / "base", CARRIED + LEFT)
    with pytest.warns(UserWarning, match="'2_Dense/model.safetensors' is copied from .* as it is"):
        out = Delta.between(base, {"w": torch.ones(3)}).apply(base, tmp_path / "out")
    made = {str(p.relative_to(str(out))) for p in Path(str(out)).rglob("*") if p.is_file()}
    assert made == {*CARRIED, "model.safetensors"}
    for name in CARRIED:
        assert (Path(str(out)) / name).read_bytes() == (base / name).read_bytes()


def test_links_to_folders_are_not_followed(tmp_path: Path) -> None:
    base = folder_with(tmp_path / "base", ("vocab.txt",))
    (base / "loop").symlink_to(base, target_is_directory=True)
    (base / "linked.txt").symlink_to(base / "vocab.txt")
    assert set(side_files(base)) == {"config.json", "linked.txt", "modules.json", "vocab.txt"}


@pytest.mark.parametrize("text", ["[", "[" * 50_000, "{}", '[{"path": 3}]', '[{"path": "../x"}]', "[1]"])
def test_odd_lists_of_modules_change_nothing(text: str, tmp_path: Path) -> None:
    base = folder_with(tmp_path / "base", ("vocab.txt", "2_Dense/model.safetensors"))
    (base / "modules.json").write_text(text)
    assert "2_Dense/model.safetensors" not in set(side_files(base))


def test_a_folder_with_folders_may_be_overwritten(tmp_path: Path) -> None:
    """What optx copied there can be made again; what somebody changed or added can't."""
    base = folder_with(tmp_path / "base", ("1_Pooling/config.json", "vocab.txt"))
    tuned = folder_with(tmp_path / "tuned", ())
    command = ["delta", "dare", str(base), str(tuned), str(tmp_path / "out")]
    assert CliRunner().invoke(cli.app, command).exit_code == 0
    assert CliRunner().invoke(cli.app, [*command, "--overwrite"]).exit_code == 0
    (tmp_path / "out" / "1_Pooling" / "mine.txt").write_text("x")
    told = CliRunner().invoke(cli.app, [*command, "--overwrite"])
    assert "it holds '1_Pooling/mine.txt', which neither" in " ".join(told.output.split())


def test_a_transformers_folder_loads(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

    base, tuned = llama(), llama()
    with torch.no_grad():
        for number, p in enumerate(tuned.parameters()):
            p.add_(0.1 * normal(*p.shape, seed=number))
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    for name, model in (("base", base), ("tuned", tuned)):
        model.save_pretrained(tmp_path / name, max_shard_size="10KB")
        tokenizer.save_pretrained(tmp_path / name)
    assert (tmp_path / "base" / "additional_chat_templates" / "tool_use.jinja").exists()
    out = optx.merge(tmp_path / "base", [tmp_path / "tuned"], optx.TaskArithmetic(), tmp_path / "out")
    loaded: Any = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(loaded.lm_head.weight, tuned.lm_head.weight)
    again: Any = AutoTokenizer.from_pretrained(out)
    assert again.chat_template == tokenizer.chat_template
    assert again.get_vocab() == tokenizer.get_vocab()


def test_a_sentence_transformers_folder_loads(tmp_path: Path) -> None:
    """By its own package where that is there; else its files are those of the base."""
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    for number, place in enumerate((base, tuned)):
        model = bert()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * number)
        model.save_pretrained(place)
        (place / "modules.json").write_text(
            json.dumps(
                [
                    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
                    {
                        "idx": 1,
                        "name": "1",
                        "path": "1_Pooling",
                        "type": "sentence_transformers.models.Pooling",
                    },
                ]
            )
        )
        (place / "1_Pooling").mkdir()
        (place / "1_Pooling" / "config.json").write_text(
            '{"word_embedding_dimension": 16, "pooling_mode": "mean"}'
        )
        (place / "sentence_bert_config.json").write_text('{"max_seq_length": 32, "do_lower_case": false}')
    out = Path(str(optx.merge(base, [tuned], optx.TaskArithmetic(), tmp_path / "out")))
    for name in ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    package: Any = pytest.importorskip("sentence_transformers")
    assert len(package.SentenceTransformer(str(out))) == 2
