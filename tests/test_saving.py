"""Folders in hub layout: exact, strict, whole or not there at all."""

import errno
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_files import make_model

from minifuse.checkpoint import load_params
from minifuse.config import ModelConfig
from minifuse.errors import CheckpointError, MinifuseError
from minifuse.files import read_json
from minifuse.saving import save_checkpoint, save_folder

EMBED = "model.embed_tokens.weight"


class Source:
    """A tiny model; `fault` is called before each of its tensors goes out."""

    def __init__(self, fault=lambda index: None):
        model = make_model("llama")
        self.config = model.config.to_dict()
        self.state = model.state_dict()
        self._fault = fault

    def tensors(self):
        for index, pair in enumerate(self.state.items()):
            self._fault(index)
            yield pair

    def save_files(self, folder):
        (folder / "tokenizer.json").write_text("{}")


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 100_000, 1])
def test_save_and_load_round_trip_is_exact(tmp_path, max_shard_bytes, dtype):
    source = Source()
    save_checkpoint(tmp_path, source.config, source.tensors(), dtype, max_shard_bytes)
    sizes = [path.stat().st_size for path in tmp_path.glob("*.safetensors")]
    largest_tensor = max(t.numel() * dtype.itemsize for t in source.state.values())
    assert max(sizes) <= max(max_shard_bytes, largest_tensor) + 10_000  # the header
    assert (len(sizes) == 1) == (max_shard_bytes == 10**9)
    config = ModelConfig.from_hf(read_json(tmp_path / "config.json"))
    params = load_params(tmp_path, config)
    assert params.embed.dtype == dtype
    state = {name: tensor.to(dtype) for name, tensor in source.state.items()}
    torch.testing.assert_close(params.embed, state[EMBED], rtol=0, atol=0)
    wanted = [state[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv"]
    torch.testing.assert_close(params.layers[1].wqkv, torch.cat(wanted), rtol=0, atol=0)


def test_files_are_what_safetensors_writes(tmp_path):
    """Metadata and all; data that start at a multiple of eight; nothing behind them."""
    source = Source()
    save_checkpoint(tmp_path, source.config, source.tensors(), torch.bfloat16, 50_000)
    found = {}
    for path in tmp_path.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            size = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
        header_len = struct.unpack("<Q", path.read_bytes()[:8])[0]
        assert header_len % 8 == 0
        assert path.stat().st_size == 8 + header_len + size
    wanted = {name: tensor.bfloat16() for name, tensor in source.state.items()}
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    index = read_json(tmp_path / "model.safetensors.index.json")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in wanted.values())
    assert index["weight_map"].keys() == wanted.keys()


def test_tensors_may_come_in_any_order_and_in_pieces_of_others(tmp_path):
    source = Source()
    turned = {
        name: t.t().contiguous().t() if t.ndim == 2 else t for name, t in source.state.items()
    }
    save_checkpoint(tmp_path, source.config, reversed(turned.items()), torch.float32, 10**9)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        found = {name: file.get_tensor(name) for name in source.state}
    torch.testing.assert_close(found, dict(source.state), rtol=0, atol=0)


@pytest.mark.parametrize("fields", [{"dtype": "float32"}, {"torch_dtype": "float32"}, {}])
def test_no_field_of_the_config_contradicts_the_weights(tmp_path, fields):
    source = Source()
    raw = {k: v for k, v in source.config.items() if k not in ("dtype", "torch_dtype")} | fields
    save_checkpoint(tmp_path, raw, source.tensors(), torch.float16)
    written, raw = read_json(tmp_path / "config.json"), json.loads(json.dumps(raw))
    assert written["torch_dtype"] == "float16"
    assert written.get("dtype", "float16") == "float16"
    assert {k: v for k, v in written.items() if "dtype" not in k} == {
        k: v for k, v in raw.items() if "dtype" not in k
    }


def test_saved_shards_open_in_transformers(tmp_path):
    from transformers import AutoModelForCausalLM

    source = Source()
    save_checkpoint(tmp_path, source.config, source.tensors(), torch.float32, 100_000)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    torch.testing.assert_close(dict(model.state_dict()), dict(source.state), rtol=0, atol=0)


def test_float16_overflow_is_refused(tmp_path):
    source = Source()
    source.state["model.norm.weight"][3] = 1e6
    with pytest.raises(CheckpointError, match=r"model.norm.weight has values beyond float16"):
        save_checkpoint(tmp_path, source.config, source.tensors(), torch.float16)


def test_saving_is_as_strict_as_loading(tmp_path):
    source = Source()
    state = source.state
    tensors = [*state.items(), ("surprise", torch.zeros(1)), (EMBED, state[EMBED])]
    tensors = [pair for pair in tensors if pair[0] != "model.norm.weight"]
    tensors = [(n, t[:3] if n == "lm_head.weight" else t) for n, t in tensors]
    with pytest.raises(CheckpointError) as caught:
        save_checkpoint(tmp_path, source.config, tensors, torch.float32)
    assert "missing: model.norm.weight" in str(caught.value)
    assert f"unexpected: {EMBED} (twice), surprise" in str(caught.value)
    assert "misshapen: lm_head.weight is [3, 64], wanted [320, 64]" in str(caught.value)


def test_progress_counts_every_tensor(tmp_path):
    seen = []

    def progress(items, total):
        seen.append(total)
        for item in items:
            yield item
            seen.append(item)

    source = Source()
    assert save_folder(tmp_path / "out", source, dtype="bfloat16", progress=progress)
    assert seen == [len(source.state), *range(len(source.state))]
    assert names(tmp_path / "out") == ["config.json", "model.safetensors", "tokenizer.json"]
    assert oct((tmp_path / "out").stat().st_mode & 0o777) == "0o755"


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt, CheckpointError("bad block"), OSError(5, "bad")]
)
def test_a_fault_half_way_leaves_nothing(tmp_path, error):
    def fault(index):
        if index == 7:
            raise error

    with pytest.raises((KeyboardInterrupt, MinifuseError)):
        save_folder(tmp_path / "new/deeper/out", Source(fault), dtype="float32")
    assert names(tmp_path) == []


def test_parents_that_were_there_stay(tmp_path):
    (tmp_path / "old").mkdir()

    def fault(index):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_folder(tmp_path / "old/new/out", Source(fault), dtype="float32")
    assert names(tmp_path) == ["old"]
    assert names(tmp_path / "old") == []


def test_folder_of_a_quicker_process_stays(tmp_path):
    def fault(index):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out/theirs").touch()

    assert not save_folder(tmp_path / "out", Source(fault), dtype="float32")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["theirs"]


Usage = namedtuple("Usage", "total used free")


def test_needed_and_free_bytes_are_compared_beforehand(tmp_path, monkeypatch):
    source = Source(lambda index: pytest.fail("nothing should be read"))
    numbers = sum(tensor.numel() for tensor in source.state.values())
    free = 2 * numbers - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, free))
    with pytest.raises(MinifuseError) as caught:
        save_folder(tmp_path / "new/out", source, dtype="bfloat16")
    assert str(caught.value) == (
        f"{tmp_path}/new/out cannot be written: its weights take {2 * numbers / 1e3:.1f} kB, but "
        f"{free / 1e3:.1f} kB are free there; make room or choose another disk"
    )
    assert names(tmp_path) == []
    free += 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, free))
    save_folder(tmp_path / "out", Source(), dtype="bfloat16")


def test_disk_that_fills_up_half_way(tmp_path):
    """A disk of 300 kB for a model of 400 kB, whose free bytes are misreported beforehand."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)]
    if os.name != "posix" or os.geteuid() or subprocess.run(mount, check=False).returncode:
        pytest.skip("a small disk needs a mount, and a mount needs root")
    try:
        real = shutil.disk_usage
        with pytest.MonkeyPatch.context() as patch:
            reports = iter([Usage(10**9, 0, 10**9)])
            patch.setattr(shutil, "disk_usage", lambda path: next(reports, None) or real(path))
            with pytest.raises(MinifuseError) as caught:
                save_folder(disk / "new/out", Source(), dtype="float32")
        message = str(caught.value)
        assert message.startswith(f"{disk}/new/out cannot be written: No space left on device; ")
        # Measured while what was written is still there.
        free = re.search(r"; its weights take 4\d\d\.\d kB, and ([\d.]+) k?B are free$", message)[1]
        assert float(free) < 10
        assert names(disk) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


LIMITED = """
import resource, signal, sys
from test_saving import Source
from minifuse.errors import MinifuseError
from minifuse.saving import save_folder
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_folder(sys.argv[1], Source(), dtype="float32")
except MinifuseError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits of POSIX")
def test_files_that_may_not_grow(tmp_path):
    """What a quota does, in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "out")],
        cwd=Path(__file__).parent,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    start = f"{tmp_path}/out cannot be written: {os.strerror(errno.EFBIG)}; its weights take "
    assert result.stdout.startswith(start)
    # A limit leaves less than the disk has.
    assert "free" not in result.stdout
    assert result.stdout.count("\n") == 1
    assert names(tmp_path) == []


def test_a_source_that_is_cut_short_while_it_is_written(tmp_path):
    """Weights go from a mapping to the disk, and where the mapping ends there is no address."""
    path = tmp_path / "source.safetensors"
    save_file(Source().state, path)

    class Mapped(Source):
        def tensors(self, own_int4=()):
            with safe_open(path, "pt") as file:
                for name in self.state:
                    tensor = file.get_tensor(name)
                    os.truncate(path, 0)
                    yield name, tensor

    with pytest.raises(MinifuseError, match=r"the weights that it is made of were cut short"):
        save_folder(tmp_path / "out", Mapped(), dtype="float32")
    assert names(tmp_path) == ["source.safetensors"]


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(MinifuseError, match=r"file/out cannot be written: .*/file is not a folder"):
        save_folder(tmp_path / "file/out", Source(), dtype="float32")
    assert names(tmp_path) == ["file"]


def test_a_folder_is_private_until_it_is_whole(tmp_path):
    seen = []

    def look(index):
        (folder,) = tmp_path.iterdir()
        seen.append(folder.stat().st_mode & 0o777)

    save_folder(tmp_path / "out", Source(look), dtype="float32")
    assert set(seen) == {0o700}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755
