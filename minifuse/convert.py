"""Any model that minifuse can find -> a new folder in hub layout, in one dtype, whole or in shards.

The only place that opens a `pytorch_model.bin`, with torch's unpickler that makes nothing but
tensors. Weights are mapped and pass through one by one.
"""

import os
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minifuse.chat import (
    LEGACY_TEMPLATE_FILE,
    SPECIAL_TOKENS_FILE,
    TEMPLATE_FILE,
    TEMPLATE_FOLDER,
)
from minifuse.checkpoint import (
    DTYPES,
    FILE_DTYPES,
    INDEX_FILE,
    SINGLE_FILE,
    StoredTensor,
    check_stored,
    count_parameters,
    dequantize_tensors,
    find_tensors,
    params_from_tensors,
    read_index,
    read_tensors,
    stored_dtype,
)
from minifuse.config import ModelConfig, dtype_beside, parse_quantize
from minifuse.errors import CheckpointError, MinifuseError, UsageError
from minifuse.files import check_readable, file_version, format_bytes, list_names, read_json
from minifuse.gguf import GgufCheckpoint, read_gguf
from minifuse.loader import resolve_model
from minifuse.memory import free_memory
from minifuse.model import forward_plain
from minifuse.saving import (
    DEFAULT_SHARD_BYTES,
    ModelSource,
    QuantizedSource,
    plain_tensors,
    save_folder,
)
from minifuse.tokenizer import TOKENIZER_CONFIG_FILE

BIN_FILE = "pytorch_model.bin"
BIN_INDEX_FILE = "pytorch_model.bin.index.json"

# What is carried over into the new folder, where it is there, beside the licence and the templates
# in TEMPLATE_FOLDER.
CARRIED_FILES = (
    "added_tokens.json",
    "generation_config.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    LEGACY_TEMPLATE_FILE,
    SPECIAL_TOKENS_FILE,
    TEMPLATE_FILE,
    TOKENIZER_CONFIG_FILE,
)
_LICENCE = re.compile(r"(licen[cs]e|copying|notice|use_policy)([._-].*)?", re.IGNORECASE)

# Enough tokens that attention looks back, few enough for a large model on a CPU.
_CHECK_TOKENS = 32


@dataclass(frozen=True)
class HubFolder:
    """A folder in hub layout, its weights as safetensors or, where there are none, torch files.

    config: what config.json holds
    """

    folder: Path
    config: dict
    _stored: dict[str, StoredTensor]
    _is_torch: bool

    @property
    def own_dtype(self) -> str:
        """Name of the dtype that the weights are stored in."""
        dtype = stored_dtype(self.folder, self._stored)
        return next(name for name, value in DTYPES.items() if value == dtype)

    def tensors(self, own_int4: Collection[str] = ()) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of every weight, in the files' order, one in memory at a time.

        own_int4: for sources that keep 4 bits under the hub's names; this one has none
        raises: CheckpointError
        """
        return (_read_torch_files if self._is_torch else read_tensors)(self._stored)

    def save_files(self, folder: Path) -> None:
        """Copy tokenizer, chat templates, generation config and licence into another folder."""
        for file in sorted(self.folder.iterdir()):
            if file.is_file() and (file.name in CARRIED_FILES or _LICENCE.fullmatch(file.name)):
                check_readable(file)
                shutil.copyfile(file, folder / file.name)
        for file in sorted((self.folder / TEMPLATE_FOLDER).glob("*.jinja")):
            (folder / TEMPLATE_FOLDER).mkdir(exist_ok=True)
            check_readable(file)
            shutil.copyfile(file, folder / TEMPLATE_FOLDER / file.name)


class Comparison(NamedTuple):
    """How far the logits of a converted model are from the original's.

    tolerance: what rounding to `dtype` explains
    """

    difference: float
    tolerance: float
    num_tokens: int
    dtype: str

    @property
    def is_close(self) -> bool:
        return self.difference <= self.tolerance


def open_source(source: Path | str, quantize: str | None = None) -> ModelSource:
    """Open a `.gguf` file, a folder in hub layout, or what the loader finds under a name.

    A name leads to the folder that minifuse itself would load, fetched and converted if need be.

    quantize: "int8" or "int4" for a source whose weights are so; they are made so on their way
              where they are not yet

    raises: ModelNotFoundError where it leads nowhere; UsageError for another kind of file;
            CheckpointError, ConfigError for a model that is damaged or not implemented
    """
    path = Path(os.path.expanduser(source))
    if not os.path.exists(path):
        check = partial(_check_scheme, quantize=quantize)
        path = resolve_model(source, check=check, quantize=quantize).folder
    model = _open_path(path)
    config = _check_scheme(model.config, quantize)
    if config.quantize is not None and "quantization_config" not in model.config:
        return QuantizedSource(model, config.quantize)
    return model


def _check_scheme(raw: dict, quantize: str | None) -> ModelConfig:
    return ModelConfig.from_hf(raw).quantized(quantize)


def _open_path(path: Path) -> GgufCheckpoint | HubFolder:
    if os.path.isdir(path):
        return _open_folder(path)
    if os.path.isfile(path):
        if path.suffix.lower() != ".gguf":
            raise UsageError(
                f"{path} is a file, but no .gguf; for safetensors and {BIN_FILE} give the folder"
            )
        return read_gguf(path)
    raise UsageError(f"{path} is neither a file nor a folder")


def convert(
    source: Path | str,
    target: Path | str,
    *,
    dtype: str = "auto",
    quantize: str | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Callable[[Iterable, int], Iterable] | None = None,
) -> str:
    """Write a model into a new folder in hub layout, all or nothing; returns the dtype's name.

    dtype:    name of the dtype to write; "auto" is the source's own, bfloat16 where it is quantised
    quantize: "int8" or "int4" weights; None or "none" leaves them as they are
    progress: wraps an iterable of one item a tensor, given their number; a progress bar, say
    raises:   UsageError where the target is there already, or comes from elsewhere meanwhile; what
              `open_source` raises; MinifuseError where the folder cannot be written
    """
    target = Path(target)
    if os.path.lexists(target):
        raise UsageError(f"{target} exists; choose a new folder or remove it first")
    quantize = parse_quantize(quantize)
    dtype = dtype_beside(quantize, dtype)
    model = open_source(source, quantize)
    dtype = model.own_dtype if dtype == "auto" else dtype
    dtype_beside(ModelConfig.from_hf(model.config).quantize, dtype)
    is_ours = save_folder(
        target, model, dtype=dtype, max_shard_bytes=max_shard_bytes, progress=progress
    )
    if not is_ours:
        raise UsageError(
            f"{target} was made by another process meanwhile and is left as it is; choose a new "
            "folder"
        )
    return dtype


def check(source: Path | str, target: Path | str) -> Comparison:
    """Compare the logits of a source in float32 with those of the folder it was converted to.

    Rounding the weights in memory to the folder's dtype, or to its 8 or 4 bits, shows how far the
    logits may move. The folder's may move twice as far, plus the rounding of float32 arithmetic,
    layer upon layer.

    raises: what `open_source` raises; MinifuseError where the weights do not fit into memory
    """
    written = _open_folder(Path(target))
    dtype, quantize = written.own_dtype, ModelConfig.from_hf(written.config).quantize
    rounding = open_source(source, quantize)
    original = rounding.source if isinstance(rounding, QuantizedSource) else rounding
    config = replace(ModelConfig.from_hf(original.config), quantize=None)
    _check_memory(config)
    rounded = (
        (name, tensor.to(DTYPES[dtype]) if tensor.is_floating_point() else tensor)
        for name, tensor in plain_tensors(rounding)
    )
    exact = _logits(config, dequantize_tensors(plain_tensors(original)))
    naive = _logits(config, dequantize_tensors(rounded))
    found = _logits(config, dequantize_tensors(written.tensors()))
    floor = torch.finfo(torch.float32).eps * config.num_hidden_layers * exact.abs().max().item()
    return Comparison(
        difference=(found - exact).abs().max().item(),
        tolerance=2 * (naive - exact).abs().max().item() + floor,
        num_tokens=_CHECK_TOKENS,
        dtype=dtype if quantize is None else quantize,
    )


def _check_memory(config: ModelConfig) -> None:
    needed = count_parameters(config) * torch.float32.itemsize
    free = free_memory(torch.device("cpu"))
    if needed > free:
        raise MinifuseError(
            f"the comparison takes {format_bytes(needed)} for the weights in float32, and "
            f"{format_bytes(free)} of memory are free; compare on a larger machine, or not at all"
        )


@torch.inference_mode()
def _logits(config: ModelConfig, tensors: Iterable[tuple[str, Tensor]]) -> Tensor:
    """f32[1, T, V] of tokens from all over the vocabulary; the weights are gone afterwards."""
    params = params_from_tensors(tensors, config, torch.float32)
    token_ids = torch.linspace(0, config.vocab_size - 1, _CHECK_TOKENS).long()[None]
    with warnings.catch_warnings():
        # Torch advises to compile what runs but once here.
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        return forward_plain(config, params, token_ids)


def _open_folder(folder: Path) -> HubFolder:
    raw = read_json(folder / "config.json")
    config = ModelConfig.from_hf(raw)
    is_torch = not any((folder / name).exists() for name in (SINGLE_FILE, INDEX_FILE))
    if is_torch:
        stored = _find_torch_tensors(folder)
        names = check_stored(folder, stored, config, _are_equal)
    else:
        stored = find_tensors(folder)
        names = check_stored(folder, stored, config)
    return HubFolder(folder, raw, {name: stored[name] for name in names}, is_torch)


def _find_torch_tensors(folder: Path) -> dict[str, StoredTensor]:
    """What `find_tensors` is for safetensors: names, shapes and dtypes of one file or of shards."""
    if (folder / BIN_FILE).exists():
        shards = [BIN_FILE]
    elif (folder / BIN_INDEX_FILE).exists():
        shards = sorted(set(read_index(folder / BIN_INDEX_FILE).values()))
    else:
        raise CheckpointError(
            f"{folder} holds no weights; wanted {SINGLE_FILE} or {BIN_FILE}, or the index of either"
        )
    spelled = {value: key for key, value in FILE_DTYPES.items()}
    found: dict[str, StoredTensor] = {}
    for shard in shards:
        path = folder / shard
        if not os.path.isfile(path):
            raise CheckpointError(
                f"{folder / BIN_INDEX_FILE} names the shard {list_names([shard])}, which is not "
                "there; fetch the checkpoint again"
            )
        version = file_version(path)
        for name, tensor in _load_torch_file(path).items():
            if name in found:
                raise CheckpointError(f"{folder}: more than one shard holds {list_names([name])}")
            found[name] = StoredTensor(path, tuple(tensor.shape), spelled[tensor.dtype], version)
    return found


def _read_torch_files(stored: dict[str, StoredTensor]) -> Iterator[tuple[str, Tensor]]:
    for path in dict.fromkeys(tensor.path for tensor in stored.values()):
        tensors = _load_torch_file(path)
        yield from ((name, tensors[name].detach()) for name in list(tensors) if name in stored)


def _load_torch_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that `torch.save` wrote, mapped; an old one, without zip, is read.

    raises: CheckpointError for one that is damaged, or asks for anything but tensors of floats
    """
    check_readable(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(
                str(path), map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except Exception as error:
        # Torch raises whatever its unpickler runs into, and advises to unpickle all the same.
        asked_for = re.search(r"GLOBAL (\S+)", str(error))
        if asked_for:
            raise CheckpointError(
                f"{path} asks for {list_names([asked_for[1]])}, which is no part of a tensor, and "
                "nothing else is unpickled; do not trust the file, use the model's safetensors"
            ) from None
        raise CheckpointError(
            f"{path} is not a readable torch file of tensors, or is cut short "
            f"({type(error).__name__}); fetch it again, or use the model's safetensors"
        ) from None
    if not isinstance(content, dict) or not content:
        found = type(content).__name__ if content else "nothing"
        raise CheckpointError(f"{path} holds {found}; wanted names and their tensors")
    odd = {
        str(name): getattr(value, "dtype", type(value).__name__)
        for name, value in content.items()
        if not _is_plain(name, value)
    }
    if odd:
        raise CheckpointError(
            f"{path} holds what is no dense tensor of floats: "
            f"{list_names(f'{name} is {kind}' for name, kind in odd.items())}"
        )
    return content


def _is_plain(name: object, value: object) -> bool:
    return (
        isinstance(name, str)
        and isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.dtype in FILE_DTYPES.values()
    )


def _are_equal(embed: StoredTensor, lm_head: StoredTensor) -> bool:
    names = "model.embed_tokens.weight", "lm_head.weight"
    pair = zip((embed, lm_head), names, strict=True)
    return torch.equal(*(_load_torch_file(stored.path)[name] for stored, name in pair))
