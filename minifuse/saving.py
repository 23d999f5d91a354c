"""A model -> a folder in hub layout, all or nothing.

The config tells every tensor's name and size beforehand, so its place in a file is known, too: the
headers are written first, then each tensor goes to its place as it comes, and none is held back.
"""

import contextlib
import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from minifuse.checkpoint import (
    DTYPES,
    INDEX_FILE,
    SINGLE_FILE,
    STORED_DTYPES,
    Ledger,
    check_range,
    expected_dtypes,
    expected_tensors,
    quantize_tensors,
    weight_bytes,
    weight_kinds,
)
from minifuse.config import ModelConfig, quantization_field
from minifuse.errors import MinifuseError, one_line
from minifuse.files import (
    DISK_FULL,
    format_bytes,
    new_folder,
    partial_prefix,
    remove_abandoned,
    rename_whole,
    write_json,
)
from minifuse.quantize import QuantizedTensor

DEFAULT_SHARD_BYTES = 5 * 10**9

# Numbers are cast and written in blocks of about this many.
_WRITTEN_NUMBERS = 2**20


class ModelSource(Protocol):
    """A model to be written as a folder in hub layout.

    config: what config.json holds
    """

    @property
    def config(self) -> dict: ...

    @property
    def own_dtype(self) -> str:
        """Name of the dtype that the weights are stored in."""
        ...

    def tensors(
        self, own_int4: Collection[str] = ()
    ) -> Iterator[tuple[str, Tensor | QuantizedTensor]]:
        """Name and tensor of every weight, one in memory at a time.

        own_int4: hub names of those that are wanted as they are stored, if they lie there in 4 bits
        """
        ...

    def save_files(self, folder: Path) -> None:
        """Write what belongs beside config and weights, the tokenizer above all."""
        ...


def plain_tensors(source: ModelSource) -> Iterator[tuple[str, Tensor]]:
    """A source's tensors, none of which is asked for as it is stored in 4 bits."""
    return cast("Iterator[tuple[str, Tensor]]", source.tensors())


@dataclass(frozen=True)
class QuantizedSource:
    """A model of floats, quantized on its way; what is 4 bits already keeps its scales.

    quantize: "int8" or "int4"
    """

    source: ModelSource
    quantize: str

    @property
    def config(self) -> dict:
        return self.source.config | {"quantization_config": quantization_field(self.quantize)}

    @property
    def own_dtype(self) -> str:
        return self.source.own_dtype

    def tensors(self, own_int4: Collection[str] = ()) -> Iterator[tuple[str, Tensor]]:
        """As `expected_tensors` of the quantized config lists them."""
        config = ModelConfig.from_hf(self.config)
        own_int4 = [name for name, kind in weight_kinds(config).items() if kind == "int4"]
        return quantize_tensors(self.source.tensors(own_int4), config)

    def save_files(self, folder: Path) -> None:
        self.source.save_files(folder)


def save_folder(
    target: Path | str,
    source: ModelSource,
    *,
    dtype: str,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Callable[[Iterable, int], Iterable] | None = None,
) -> bool:
    """Write a model as a folder in hub layout, all or nothing.

    The folder is made under a temporary name beside `target` and renamed at the end. Where
    another process was quicker, its folder stays and this one's is dropped.

    dtype:    name of the weights' dtype
    progress: wraps an iterable of one item a tensor, given their number; a progress bar, say
    returns:  whether `target` is this one's
    raises:   CheckpointError, ConfigError; MinifuseError where the folder cannot be written, the
              disk being full, for one
    """
    config = ModelConfig.from_hf(source.config)
    total = len(expected_tensors(config))
    needed = weight_bytes(config, DTYPES[dtype])
    # Closed before anybody reports an error, so that its line does not run on behind a bar.
    with (
        contextlib.closing(_count(total, progress)) as ticks,
        _new_folder(Path(target), needed) as folder,
    ):
        next(ticks, None)
        source.save_files(folder)
        save_checkpoint(
            folder,
            source.config,
            plain_tensors(source),
            DTYPES[dtype],
            max_shard_bytes,
            lambda: next(ticks, None),
        )
        return _rename(folder, Path(target))


def save_checkpoint(
    folder: Path | str,
    config_raw: dict,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    tick: Callable[[], object] = lambda: None,
) -> None:
    """Write config.json and safetensors, one file or shards with an index, into a folder.

    tensors: pairs of name and tensor, in any order; one of them is held at a time
    tick:    called after each of them
    raises:  CheckpointError, naming every missing, unexpected and misshapen tensor; OSError. By
             then the folder holds files, so write into a temporary one
    """
    folder = Path(folder)
    config = ModelConfig.from_hf(config_raw)
    name_of = {value: key for key, value in DTYPES.items()}
    # The older spelling is the one that every version of transformers reads; the newer one, where
    # it is there, must not contradict it.
    fields = {"torch_dtype"} | ({"dtype"} & config_raw.keys())
    write_json(folder / "config.json", config_raw | dict.fromkeys(fields, name_of[dtype]))
    ledger = Ledger(config)
    dtypes = expected_dtypes(config, dtype)
    places = _lay_out(folder, expected_tensors(config), dtypes, max_shard_bytes)
    for name, tensor in tensors:
        if ledger.admit(name, tuple(tensor.shape)):
            _write_tensor(places[name], name, tensor, dtypes[name])
        tick()
        # The next one is read before the loop lets go of this one.
        del tensor
    ledger.close("the weights")


class _Place(NamedTuple):
    path: Path
    offset: int  # of the first byte, from the start of the file


def _lay_out(
    folder: Path,
    shapes: dict[str, tuple[int, ...]],
    dtypes: dict[str, torch.dtype],
    max_shard_bytes: int,
) -> dict[str, _Place]:
    """Write headers, and an index where there are shards; returns where each tensor goes."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = total = 0
    for name, shape in shapes.items():
        nbytes = math.prod(shape) * dtypes[name].itemsize
        if shards[-1] and size + nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += nbytes
        total += nbytes
    places: dict[str, _Place] = {}
    for index, shard in enumerate(shards, 1):
        is_whole = len(shards) == 1
        file = SINGLE_FILE if is_whole else f"model-{index:05}-of-{len(shards):05}.safetensors"
        places |= _write_header(folder / file, shard, dtypes)
    if len(shards) > 1:
        weight_map = {name: places[name].path.name for name in sorted(places)}
        index_content = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / INDEX_FILE, index_content)
    return places


def _write_header(
    path: Path, shapes: dict[str, tuple[int, ...]], dtypes: dict[str, torch.dtype]
) -> dict[str, _Place]:
    """Begin a safetensors file: the header's length as u64, the header, then room for the data."""
    spelled = {dtype: name for name, dtype in STORED_DTYPES.items()}
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    starts: dict[str, int] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtypes[name].itemsize
        header[name] = {
            "dtype": spelled[dtypes[name]],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
        starts[name] = start
    text = json.dumps(header, separators=(",", ":")).encode()
    # Spaces fill it up, so that the data are aligned.
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    return {name: _Place(path, 8 + len(text) + start) for name, start in starts.items()}


def _write_tensor(place: _Place, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    rows_len = max(1, _WRITTEN_NUMBERS // math.prod(tensor.shape[1:]))
    with place.path.open("r+b") as file:
        file.seek(place.offset)
        for rows in tensor.split(rows_len):
            cast = rows.to(dtype).contiguous()
            check_range(name, rows, cast)
            file.write(cast.view(torch.uint8).numpy())


def _count(total: int, progress: Callable[[Iterable, int], Iterable] | None) -> Generator:
    yield from progress(range(total), total) if progress else ()


@contextlib.contextmanager
def _new_folder(target: Path, needed: int) -> Iterator[Path]:
    """A folder beside `target` to write into, which is removed at the end unless it was renamed.

    needed: bytes that will be written
    """
    parents = [folder for folder in target.parents if not os.path.lexists(folder)]
    prefix = partial_prefix(target.name)
    try:
        remove_abandoned(target.parent, prefix)  # it takes room
        _check_space(target, needed)
        target.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(target.parent, prefix) as temporary:
            try:
                yield temporary
            except OSError as error:
                # Before the folder goes, and leaves free what was not.
                raise _explain(target, needed, error) from error
    except OSError as error:
        raise _explain(target, needed, error) from error
    finally:
        if not os.path.isdir(target):
            with contextlib.suppress(OSError):
                for folder in parents:
                    folder.rmdir()


def _explain(target: Path, needed: int, error: OSError) -> MinifuseError:
    reason = error.strerror or one_line(error)
    if error.errno == errno.EFAULT:  # weights are written out of the file that they are mapped from
        reason = "the weights that it is made of were cut short meanwhile; start again"
    if error.errno in DISK_FULL:
        reason += f"; its weights take {format_bytes(needed)}"
    # What a quota or a limit leaves is not what the disk has.
    if error.errno == errno.ENOSPC:
        reason += f", and {format_bytes(_free_bytes(target))} are free"
    return MinifuseError(f"{target} cannot be written: {reason}")


def _rename(temporary: Path, target: Path) -> bool:
    """Give a folder its name, and others the right to read it; whether it was still to be had."""
    try:
        temporary.chmod(0o755)
        rename_whole(temporary, target)
    except OSError:
        if not target.is_dir():
            raise
        return False
    return True


def _check_space(target: Path, needed: int) -> None:
    free = _free_bytes(target)
    if needed > free:
        raise MinifuseError(
            f"{target} cannot be written: its weights take {format_bytes(needed)}, but "
            f"{format_bytes(free)} are free there; make room or choose another disk"
        )


def _free_bytes(target: Path) -> int:
    """Free on the disk that a path is on, or would be."""
    there = next(folder for folder in target.absolute().parents if os.path.lexists(folder))
    if not there.is_dir():
        raise OSError(errno.ENOTDIR, f"{there} is not a folder")
    return shutil.disk_usage(there).free
