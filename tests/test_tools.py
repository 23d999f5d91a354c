"""`python -m tools.convert_weights`: what it writes opens anywhere, and faults leave nothing."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_files import FAMILIES, make_model, write_gguf

from minifuse.checkpoint import read_json
from minifuse.gguf import read_gguf
from minifuse.loader import load_model
from tools.convert_weights import build_parser, check, main, parse_size

ROOT = Path(__file__).parents[1]
FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
]


@pytest.fixture
def source(tmp_path):
    return write_gguf(tmp_path / "tiny.gguf", make_model("llama"), "Q8_0")


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_written_opens_in_transformers(tmp_path, capsys, family, dtype):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = write_gguf(tmp_path / "tiny.gguf", make_model(family), "Q8_0")
    target = tmp_path / "out"
    assert main([str(source), str(target), "--dtype", dtype]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "converting" in captured.err
    assert "100%" in captured.err
    assert names(target) == FILES
    assert names(tmp_path) == ["out", "tiny.gguf"]
    model = AutoModelForCausalLM.from_pretrained(target, dtype="auto")
    assert model.dtype == getattr(torch, dtype)
    wanted = {name: tensor.to(model.dtype) for name, tensor in read_gguf(source).tensors()}
    torch.testing.assert_close(dict(model.state_dict()), wanted, rtol=0, atol=0)
    tokenizer = AutoTokenizer.from_pretrained(target)
    loaded = load_model(target)
    text = "a random model,  12 tokens\n\té 你好"
    assert tokenizer.encode(text) == loaded.tokenizer.encode(text, is_start=True)
    assert tokenizer.eos_token_id == loaded.eos_token_ids[0] == 0
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False) == text
    )


def test_weights_above_a_size_are_sharded(tmp_path, source):
    target = tmp_path / "out"
    assert main([str(source), str(target), "--max-shard-size", "50KB", "--dtype", "float32"]) == 0
    shards = sorted(target.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    assert {path.name for path in shards} == set(
        read_json(target / "model.safetensors.index.json")["weight_map"].values()
    )
    assert load_model(target).dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_check_passes_what_it_wrote(tmp_path, capsys, family, dtype):
    source = write_gguf(tmp_path / "tiny.gguf", make_model(family), "Q4_1")
    assert main([str(source), str(tmp_path / "out"), "--dtype", dtype, "--check"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("largest logit difference ")
    assert out.endswith("against float32): ok\n")


@pytest.mark.parametrize(
    "name", ["model.layers.1.self_attn.k_proj.weight", "model.layers.0.input_layernorm.weight"]
)
def test_check_finds_weights_that_differ(tmp_path, source, capsys, name):
    target = tmp_path / "out"
    assert main([str(source), str(target)]) == 0
    assert check(source, target, "bfloat16") == 0
    tensors = load_file(target / "model.safetensors")
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, target / "model.safetensors")
    assert check(source, target, "bfloat16") == 1
    assert capsys.readouterr().out.endswith("too far\n")


def test_existing_target_is_left_alone(tmp_path, source, capsys):
    target = tmp_path / "out"
    target.mkdir()
    (target / "precious").touch()
    assert main([str(source), str(target)]) == 2
    assert capsys.readouterr().err == (
        f"error: {target} exists; choose a new folder or remove it first\n"
    )
    assert names(target) == ["precious"]


@pytest.mark.parametrize("is_folder", [True, False])
def test_source_that_is_no_file(tmp_path, capsys, is_folder):
    source = tmp_path if is_folder else tmp_path / "nowhere.gguf"
    assert main([str(source), str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == f"error: {source} is not a file; wanted a .gguf\n"


def test_truncated_source_leaves_nothing(tmp_path, source, capsys):
    source.write_bytes(source.read_bytes()[:-1])
    assert main([str(source), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {source} is not a readable GGUF file")
    assert error.count("\n") == 1
    assert names(tmp_path) == ["tiny.gguf"]


def test_unsupported_pre_tokenizer_is_named(tmp_path, capsys):
    def change(metadata, _):
        metadata["tokenizer.ggml.pre"] = "tekken"

    source = write_gguf(tmp_path / "tiny.gguf", make_model("llama"), change=change)
    assert main([str(source), str(tmp_path / "out")]) == 1
    assert "error: " in (error := capsys.readouterr().err)
    assert "tokenizer.ggml.pre is 'tekken'" in error
    assert names(tmp_path) == ["tiny.gguf"]


def test_failure_half_way_leaves_nothing(tmp_path, capsys):
    def change(_, arrays):
        del arrays["output_norm.weight"]

    source = write_gguf(tmp_path / "tiny.gguf", make_model("llama"), change=change)
    assert main([str(source), str(tmp_path / "out")]) == 1
    assert "missing: model.norm.weight" in capsys.readouterr().err
    assert names(tmp_path) == ["tiny.gguf"]


def test_target_that_cannot_be_written(tmp_path, source, capsys):
    (tmp_path / "file").touch()
    assert main([str(source), str(tmp_path / "file" / "out")]) == 1
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["one"],
        ["a", "b", "--dtype", "int8"],
        ["a", "b", "--max-shard-size", "big"],
        ["a", "b", "--max-shard-size", "0"],
        ["a", "b", "--chek"],
    ],
)
def test_wrong_flags_exit_2(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        main(flags)
    assert caught.value.code == 2
    assert "usage: python -m tools.convert_weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("1.5GiB", 3 * 2**29), ("7", 7), ("2kb", 2000)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1TB", "1e9", "0MB", "nan"])
def test_sizes_that_are_none(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is no size"):
        parse_size(text)


def test_default_shard_size_is_parsed():
    assert build_parser().parse_args(["a", "b"]).max_shard_size == 5 * 10**9


def test_help_loads_no_torch():
    code = (
        "import sys, tools.convert_weights as c\n"
        "try: c.main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "sys.exit(bool({'torch', 'gguf', 'tokenizers'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "--max-shard-size SIZE" in result.stdout


@pytest.mark.model
@pytest.mark.slow
def test_default_model_converts_checks_and_opens(tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from minifuse.cards import DEFAULT_CARD, find_card
    from minifuse.loader import cache_dir

    load_model()
    card = find_card(DEFAULT_CARD).source
    source = cache_dir() / "gguf" / card.sha256 / Path(card.member).name
    target = tmp_path / "out"
    assert main([str(source), str(target), "--check", "--max-shard-size", "100MB"]) == 0
    assert capsys.readouterr().out.endswith("ok\n")
    assert len(list(target.glob("*.safetensors"))) == 3
    model = AutoModelForCausalLM.from_pretrained(target, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(target)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(answer[0]).endswith(" Paris")
