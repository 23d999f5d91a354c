"""Conversion of every kind of source: exact values, files carried over, bad input refused."""

import json
import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_files import VOCAB, make_larger_model, make_model, write_gguf, write_hub_folder

from minifuse.chat import TEMPLATE_FOLDER, read_chat_template
from minifuse.checkpoint import count_parameters, load_params
from minifuse.config import ModelConfig
from minifuse.convert import BIN_FILE, BIN_INDEX_FILE, check, convert, open_source
from minifuse.errors import CheckpointError, MinifuseError, ModelNotFoundError, UsageError
from minifuse.files import format_bytes, read_json
from minifuse.loader import Origin, load_model

ROOT = Path(__file__).parents[1]
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def read_weights(folder):
    return {k: t for path in folder.glob("*.safetensors") for k, t in load_file(path).items()}


def write_bin(folder, state, *, num_shards=1, **options):
    """A hub folder with torch files instead of safetensors."""
    write_hub_folder(folder, make_model("llama"))
    (folder / "model.safetensors").unlink()
    if num_shards == 1:
        torch.save(state, folder / BIN_FILE, **options)
        return folder
    placed = {}
    for index in range(num_shards):
        name = f"pytorch_model-{index + 1:05}-of-{num_shards:05}.bin"
        part = dict(list(state.items())[index::num_shards])
        torch.save(part, folder / name, **options)
        placed |= dict.fromkeys(part, name)
    (folder / BIN_INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return folder


@pytest.fixture(scope="module")
def model():
    return make_model("llama")


@pytest.fixture(scope="module")
def hub(model, tmp_path_factory):
    folder = write_hub_folder(tmp_path_factory.mktemp("hub") / "llama", model)
    extra = {
        "LICENSE": "free",
        "LICENCE.md": "libre",
        "NOTICE.txt": "note",
        "USE_POLICY.md": "kind",
        "additional_chat_templates/default.jinja": "{{ messages[0] }}",
        "additional_chat_templates/tool_use.jinja": "{{ tools }}",
        "chat_template.jinja": "{{ messages }}",
        "chat_template.json": '{"chat_template": "{{ messages[1] }}"}',
        "special_tokens_map.json": "{}",
        "tokenizer_config.json": '{"eos_token": "<|end|>"}',
        "README.md": "about another dtype",
        "model.py": "raise SystemExit",
        "onnx.bin": "other weights",
    }
    (folder / TEMPLATE_FOLDER).mkdir()
    for name, text in extra.items():
        (folder / name).write_text(text)
    return folder


CARRIED = [
    "LICENCE.md",
    "LICENSE",
    "NOTICE.txt",
    "USE_POLICY.md",
    "additional_chat_templates/default.jinja",
    "additional_chat_templates/tool_use.jinja",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
]


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 50_000])
def test_folder_to_folder(tmp_path, model, hub, dtype, max_shard_bytes):
    target = tmp_path / "out"
    found = convert(hub, target, dtype=dtype, max_shard_bytes=max_shard_bytes)
    assert found == ("float32" if dtype == "auto" else dtype)
    wanted = {name: t.to(getattr(torch, found)) for name, t in model.state_dict().items()}
    torch.testing.assert_close(read_weights(target), wanted, rtol=0, atol=0)
    assert (len(list(target.glob("*.safetensors"))) == 1) == (max_shard_bytes == 10**9)
    files = sorted(str(p.relative_to(target)) for p in target.rglob("*") if p.is_file())
    assert [name for name in files if "model" not in name and name != "config.json"] == CARRIED
    for name in CARRIED:
        assert (target / name).read_bytes() == (hub / name).read_bytes()
    before, after = read_json(hub / "config.json"), read_json(target / "config.json")
    assert after == before | dict.fromkeys(("dtype", "torch_dtype"), found)
    assert check(hub, target).is_close
    assert load_model(target).dtype == getattr(torch, found)


def test_shards_are_merged_and_a_second_conversion_is_equal(tmp_path, hub):
    convert(hub, tmp_path / "many", dtype="bfloat16", max_shard_bytes=50_000)
    assert convert(tmp_path / "many", tmp_path / "one") == "bfloat16"
    assert "model.safetensors" in names(tmp_path / "one")
    convert(hub, tmp_path / "direct", dtype="bfloat16")
    for path in (tmp_path / "direct").rglob("*"):
        if path.is_file():
            other = tmp_path / "one" / path.relative_to(tmp_path / "direct")
            assert other.read_bytes() == path.read_bytes()


def test_links_of_the_hubs_cache_are_followed(tmp_path, hub):
    linked = tmp_path / "snapshot"
    linked.mkdir()
    (linked / TEMPLATE_FOLDER).mkdir()
    for file in hub.rglob("*"):
        if file.is_file():
            (linked / file.relative_to(hub)).symlink_to(file)
    convert(linked, tmp_path / "out")
    assert not any(file.is_symlink() for file in (tmp_path / "out").rglob("*"))
    assert read_chat_template(tmp_path / "out").text == "{{ messages[0] }}"
    assert (tmp_path / "out/LICENSE").read_text() == "free"


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_torch_files(tmp_path, model, num_shards, options, dtype):
    state = model.state_dict()
    source = write_bin(tmp_path / "bin", state, num_shards=num_shards, **options)
    convert(source, tmp_path / "out", dtype=dtype)
    wanted = {name: tensor.to(getattr(torch, dtype)) for name, tensor in state.items()}
    torch.testing.assert_close(read_weights(tmp_path / "out"), wanted, rtol=0, atol=0)
    assert check(source, tmp_path / "out").is_close
    assert not list((tmp_path / "out").glob("*.bin"))


def test_torch_files_in_the_shapes_they_come_in(tmp_path, model):
    """Old buffers, parameters, views of one storage, transposed views, an ordered mapping."""
    state = OrderedDict(model.state_dict())
    stack = torch.cat([state["model.layers.0.mlp.gate_proj.weight"], state["lm_head.weight"]])
    changed = OrderedDict(state)
    changed["model.layers.0.mlp.gate_proj.weight"], changed[HEAD] = stack.split([96, VOCAB])
    changed["model.norm.weight"] = torch.nn.Parameter(state["model.norm.weight"])
    down = "model.layers.1.mlp.down_proj.weight"
    changed[down] = state[down].t().contiguous().t()
    changed["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    changed._metadata = OrderedDict(version=1)
    convert(write_bin(tmp_path / "bin", changed), tmp_path / "out")
    torch.testing.assert_close(read_weights(tmp_path / "out"), dict(state), rtol=0, atol=0)


def test_safetensors_come_before_torch_files(tmp_path, model):
    source = write_bin(tmp_path / "bin", {"other": torch.zeros(1)})
    model.save_pretrained(source)
    convert(source, tmp_path / "out")
    assert read_weights(tmp_path / "out").keys() == model.state_dict().keys()


@pytest.mark.parametrize("is_bin", [True, False])
def test_tied_head_may_be_stored_again_but_not_contradict(tmp_path, is_bin):
    tied = make_model("llama", tie_word_embeddings=True)
    folder = tmp_path / "tied"
    tied.save_pretrained(folder)
    state = tied.state_dict()

    def write(head):
        content = {**state, HEAD: head}
        (folder / "model.safetensors").unlink(missing_ok=True)
        if is_bin:
            torch.save(content, folder / BIN_FILE)
        else:
            save_file({k: t.clone() for k, t in content.items()}, folder / "model.safetensors")

    write(state[EMBED])
    convert(folder, tmp_path / "out")
    assert read_weights(tmp_path / "out").keys() == state.keys() - {HEAD}
    for head in (state[EMBED] + 1, state[EMBED][:3], state[EMBED].half()):
        write(head)
        with pytest.raises(CheckpointError, match=r"tie_word_embeddings true, but lm_head.weight"):
            convert(folder, tmp_path / "new")
    assert names(tmp_path) == ["out", "tied"]


def test_untied_weights_that_share_their_storage(tmp_path, model):
    state = model.state_dict()
    state[HEAD] = state[EMBED]
    source = write_bin(tmp_path / "bin", state)
    convert(source, tmp_path / "out", dtype="float32")
    found = read_weights(tmp_path / "out")
    torch.testing.assert_close(found[HEAD], found[EMBED], rtol=0, atol=0)


class Malicious:
    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
def test_malicious_pickle_is_refused_and_not_run(tmp_path, monkeypatch, model, options):
    monkeypatch.chdir(tmp_path)
    source = write_bin(tmp_path / "bin", model.state_dict() | {"x": Malicious()}, **options)
    with pytest.raises(CheckpointError) as caught:
        convert(source, tmp_path / "out")
    assert str(caught.value) == (
        f"{source / BIN_FILE} asks for posix.system, which is no part of a tensor, and nothing "
        "else is unpickled; do not trust the file, use the model's safetensors"
    )
    assert names(tmp_path) == ["bin"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": torch.zeros(3), "step": 7, "args": {"b": 1}}, "floats: args is dict, step is int"),
        ({"a": torch.zeros(3).int()}, r"no dense tensor of floats: a is torch.int32"),
        ({"a": torch.zeros(3, 3).to_sparse()}, "no dense tensor of floats: a is"),
        ({7: torch.zeros(3)}, "no dense tensor of floats: 7 is"),
        ([torch.zeros(3)], "holds list; wanted names and their tensors"),
        ({}, "holds nothing; wanted names and their tensors"),
        ({"state_dict": {"a": torch.zeros(3)}}, "floats: state_dict is dict"),
        ({"a": torch.zeros(3)}, "missing: lm_head.weight.*; unexpected: a"),
    ],
)
def test_torch_files_that_hold_something_else(tmp_path, content, message):
    source = write_bin(tmp_path / "bin", content)
    with pytest.raises(CheckpointError, match=message) as caught:
        convert(source, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["bin"]


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
@pytest.mark.parametrize("kept", [0, 2, 30, 1000, -5000, -300, -20])
def test_truncated_torch_file(tmp_path, model, kept, options):
    source = write_bin(tmp_path / "bin", model.state_dict(), **options)
    data = (source / BIN_FILE).read_bytes()
    (source / BIN_FILE).write_bytes(data[:kept])
    with pytest.raises(CheckpointError, match=r"not a readable torch file .* cut short") as caught:
        convert(source, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["bin"]


@pytest.mark.parametrize("content", [b"PK\x03\x04 not a zip", b"\x80\x04K\x07.", b"<html>"])
def test_what_is_no_torch_file(tmp_path, content):
    source = write_bin(tmp_path / "bin", {})
    (source / BIN_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match="not a readable torch file"):
        convert(source, tmp_path / "out")


@pytest.fixture(scope="module", params=[{}, {"_use_new_zipfile_serialization": False}])
def torch_folder(model, request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "bin"
    write_bin(folder, model.state_dict(), **request.param)
    return folder, (folder / BIN_FILE).read_bytes()


@settings(max_examples=60)
@given(at=st.integers(-4000, 4000), value=st.integers(0, 255))
def test_a_corrupt_byte_never_raises_anything_else(torch_folder, at, value):
    folder, content = torch_folder
    data = bytearray(content)
    data[at] = value
    (folder / BIN_FILE).write_bytes(data)
    message = ""
    try:
        dict(open_source(folder).tensors())
    except MinifuseError as error:
        message = str(error)
    assert "\n" not in message


def test_nothing_else_of_the_package_unpickles():
    users = [
        path.name for path in ROOT.glob("minifuse/**/*.py") if "torch.load" in path.read_text()
    ]
    assert users == ["convert.py"]


def test_missing_shard_and_shards_that_repeat(tmp_path, model):
    source = write_bin(tmp_path / "bin", model.state_dict(), num_shards=3)
    second = source / "pytorch_model-00002-of-00003.bin"
    second.rename(source / "kept")
    with pytest.raises(CheckpointError, match=f"names the shard {second.name}, which is not there"):
        convert(source, tmp_path / "out")
    (source / "pytorch_model-00001-of-00003.bin").rename(second)
    (source / "pytorch_model-00001-of-00003.bin").write_bytes(second.read_bytes())
    with pytest.raises(CheckpointError, match="more than one shard holds"):
        convert(source, tmp_path / "out")


def test_folder_without_weights_and_folder_without_config(tmp_path, hub):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"empty/config.json is missing"):
        convert(tmp_path / "empty", tmp_path / "out")
    (tmp_path / "empty/config.json").write_bytes((hub / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"no weights; wanted model.safetensors or pytorch_"):
        convert(tmp_path / "empty", tmp_path / "out")


def test_weights_that_contradict_the_config_are_named_before_anything_is_written(tmp_path, model):
    folder = write_hub_folder(tmp_path / "hub", model)
    raw = read_json(folder / "config.json") | {"num_hidden_layers": 1, "vocab_size": 300}
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError) as caught:
        convert(folder, tmp_path / "out", progress=lambda *_: pytest.fail("too late"))
    assert "unexpected: model.layers.1.input_layernorm.weight, " in str(caught.value)
    assert "lm_head.weight is [320, 64], wanted [300, 64]" in str(caught.value)
    assert names(tmp_path) == ["hub"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_of_a_folder_is_no_source(hub, tmp_path, name):
    with pytest.raises(UsageError, match=f"{name} is a file, but no .gguf; for safetensors and"):
        convert(hub / name, tmp_path / "out")


def test_names_go_to_the_loader(tmp_path, hub, monkeypatch):
    asked = []

    def resolve(name, check, quantize):
        assert quantize is None
        asked.append(name)
        return Origin(hub, "tiny", "somewhere")

    monkeypatch.setattr("minifuse.convert.resolve_model", resolve)
    convert("someone/tiny", tmp_path / "out", dtype="bfloat16")
    assert check("someone/tiny", tmp_path / "out").is_close
    assert asked == ["someone/tiny"] * 2


def test_names_that_lead_nowhere(tmp_path):
    with pytest.raises(ModelNotFoundError, match="no-such-model"):
        convert("no-such-model", tmp_path / "out")


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda path: path.symlink_to("nowhere")])
def test_existing_target_is_left_alone(tmp_path, hub, make):
    make(tmp_path / "out")
    with pytest.raises(UsageError, match="exists; choose a new folder or remove it first"):
        convert(hub, tmp_path / "out")
    assert names(tmp_path) == ["out"]


def test_target_that_another_process_made_meanwhile_is_no_success(tmp_path, hub):
    def progress(items, total):
        (tmp_path / "out").mkdir()
        (tmp_path / "out/theirs").touch()
        yield from items

    with pytest.raises(UsageError, match="out was made by another process meanwhile"):
        convert(hub, tmp_path / "out", progress=progress)
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["theirs"]


def test_check_beyond_memory_is_refused_with_both_numbers(tmp_path, hub, monkeypatch):
    convert(hub, tmp_path / "out")
    needed = 4 * count_parameters(ModelConfig.from_hf(read_json(hub / "config.json")))
    monkeypatch.setattr("minifuse.convert.free_memory", lambda device: needed)
    assert check(hub, tmp_path / "out").is_close
    monkeypatch.setattr("minifuse.convert.free_memory", lambda device: 999)
    monkeypatch.setattr("minifuse.convert.params_from_tensors", lambda *_: pytest.fail("too late"))
    with pytest.raises(MinifuseError) as caught:
        check(hub, tmp_path / "out")
    assert str(caught.value) == (
        f"the comparison takes {format_bytes(needed)} for the weights in float32, and 999 B of "
        "memory are free; compare on a larger machine, or not at all"
    )


def test_check_of_a_quantised_file(tmp_path):
    source = write_gguf(tmp_path / "m.gguf", make_model("qwen2"), "Q5_0")
    assert convert(source, tmp_path / "out") == "bfloat16"
    found = check(source, tmp_path / "out")
    assert found.is_close
    assert found.dtype == "bfloat16"
    assert 0 < found.difference <= found.tolerance


@pytest.mark.parametrize("kind", ["hub", "bin", "gguf"])
def test_check_finds_weights_that_differ(tmp_path, model, kind):
    if kind == "gguf":
        source = write_gguf(tmp_path / "m.gguf", model)
    elif kind == "bin":
        source = write_bin(tmp_path / "bin", model.state_dict())
    else:
        source = write_hub_folder(tmp_path / "hub", model)
    convert(source, tmp_path / "out")
    assert check(source, tmp_path / "out").difference == 0
    tensors = load_file(tmp_path / "out/model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"] += 0.01
    save_file(tensors, tmp_path / "out/model.safetensors")
    assert not check(source, tmp_path / "out").is_close


def test_source_is_read_twice_with_the_same_outcome(hub):
    source = open_source(hub)
    torch.testing.assert_close(dict(source.tensors()), dict(source.tensors()), rtol=0, atol=0)
    config = ModelConfig.from_hf(source.config)
    assert load_params(hub, config).embed.equal(dict(source.tensors())[EMBED])


# Anonymous memory, which mapped files are no part of, is looked at every millisecond.
PEAK = """
import sys, threading, time
from pathlib import Path
from minifuse.convert import convert

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024

def watch():
    while not done.wait(0.001):
        seen.append(anonymous())

source, target, dtype, shard_bytes = sys.argv[1:]
done, before = threading.Event(), anonymous()
seen = [before]
thread = threading.Thread(target=watch)
thread.start()
convert(source, target, dtype=dtype, max_shard_bytes=int(shard_bytes))
done.set()
thread.join()
print(max(seen) - before)
"""
SHARD_BYTES = 10**7
# What parsers, threads and the blocks that are cast and decoded take.
BASELINE = 30 * 10**6


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """One model in three kinds; the bytes of all its weights, and of the largest, as f32."""
    folder = tmp_path_factory.mktemp("larger")
    model = make_larger_model()
    write_gguf(folder / "gguf", model, "Q8_0").rename(folder / "m.gguf")
    write_hub_folder(folder / "hub", model)
    write_hub_folder(folder / "bin", model)
    (folder / "bin/model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "bin" / BIN_FILE)
    sizes = [parameter.nbytes for parameter in model.parameters()]
    return folder, sum(sizes), max(sizes)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["m.gguf", "hub", "bin"])
def test_peak_is_near_one_tensor_above_a_shard(tmp_path, larger, name, dtype):
    folder, size, largest = larger
    assert SHARD_BYTES + largest + BASELINE < size / 2
    arguments = [str(folder / name), str(tmp_path / "out"), dtype, str(SHARD_BYTES)]
    result = subprocess.run(
        [sys.executable, "-c", PEAK, *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(result.stdout) <= SHARD_BYTES + largest + BASELINE


def test_every_k_type_converts_and_passes_its_check(tmp_path):
    model = make_model("llama", hidden_size=256, intermediate_size=512, head_dim=64)
    for kind in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"):
        source = write_gguf(tmp_path / f"{kind}.gguf", model, kind)
        convert(source, tmp_path / kind)
        assert check(source, tmp_path / kind).is_close
