"""Hub checkpoints -> `Params`: one table of names and shapes, strict, safetensors only.

Fused weights are stacks of hub tensors (q, k, v; gate, up). Each hub tensor is copied from the
memory-mapped file straight into its rows of the stack, so no second copy of the weights is held.
"""

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from minifuse.config import DTYPE_NAMES, QUANTIZE_GROUP, ModelConfig
from minifuse.errors import CheckpointError, ConfigError, one_line
from minifuse.files import (
    check_readable,
    check_unchanged,
    file_version,
    is_inside,
    list_names,
    read_json,
)
from minifuse.model import WEIGHT_FIELDS, LayerParams, Params
from minifuse.quantize import INT4_ROWS, KINDS, QuantizedTensor, dequantize, pack, quantize_weight

DTYPES = {name: getattr(torch, name) for name in DTYPE_NAMES}
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_EMBED = "model.embed_tokens.weight"
_FINAL_NORM = "model.norm.weight"
_LM_HEAD = "lm_head.weight"

# Buffers that older versions of transformers wrote; `rope.make_inv_freq` computes them anew.
_HARMLESS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")

# As safetensors spells them.
FILE_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
# What else a folder with quantized weights holds: the values of NAME.values, never another tensor.
STORED_DTYPES = FILE_DTYPES | {"U8": torch.uint8, "I8": torch.int8}
_VALUES, _SCALES = ".values", ".scales"

_COMPARED_ROWS = 4096
# Loading shows its progress from here on; less takes a moment.
PROGRESS_BYTES = 10**9


class StoredTensor(NamedTuple):
    """Where a tensor lies: its file, its shape, and its dtype as safetensors spells it.

    version: of the file when its header was read
    """

    path: Path
    shape: tuple[int, ...]
    dtype: str
    version: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * STORED_DTYPES[self.dtype].itemsize


def _layer_table(config: ModelConfig) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """LayerParams field -> the hub tensors stacked in it from the first row on, with shapes."""
    channels, mlp = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    qkv = [("q_proj", queries), ("k_proj", keys), ("v_proj", keys)]
    gate_up = [("gate_proj", mlp), ("up_proj", mlp)]
    table: dict[str, list[tuple[str, tuple[int, ...]]]] = {
        "attn_norm": [("input_layernorm.weight", (channels,))],
        "wqkv": [(f"self_attn.{name}.weight", (rows, channels)) for name, rows in qkv],
        "wo": [("self_attn.o_proj.weight", (channels, queries))],
        "mlp_norm": [("post_attention_layernorm.weight", (channels,))],
        "w_gate_up": [(f"mlp.{name}.weight", (rows, channels)) for name, rows in gate_up],
        "w_down": [("mlp.down_proj.weight", (channels, mlp))],
    }
    if config.attention_bias:
        table["bqkv"] = [(f"self_attn.{name}.bias", (rows,)) for name, rows in qkv]
    if config.attention_out_bias:
        table["bo"] = [("self_attn.o_proj.bias", (channels,))]
    if config.qk_norm:
        table["q_norm"] = [("self_attn.q_norm.weight", (config.head_dim,))]
        table["k_norm"] = [("self_attn.k_norm.weight", (config.head_dim,))]
    if config.mlp_bias:
        table["b_gate_up"] = [(f"mlp.{name}.bias", (rows,)) for name, rows in gate_up]
        table["b_down"] = [("mlp.down_proj.bias", (channels,))]
    return table


def weight_kinds(config: ModelConfig) -> dict[str, str]:
    """Hub name -> "int8" or "int4" of every tensor that the config's scheme quantizes.

    What is stacked in one weight is of one kind. Weights whose rows are no multiple of 64 are int8
    under int4, too; embedding and head always are: they are looked up by rows, and the head's
    rounding falls straight on the logits.
    """
    if config.quantize is None:
        return {}
    kinds = {_EMBED: "int8"} | ({} if config.tie_word_embeddings else {_LM_HEAD: "int8"})
    for field, parts in _layer_table(config).items():
        if field in WEIGHT_FIELDS:
            num_rows = sum(shape[0] for _, shape in parts)
            kind = "int8" if num_rows % INT4_ROWS else config.quantize
            for index in range(config.num_hidden_layers):
                kinds |= {f"model.layers.{index}.{name}": kind for name, _ in parts}
    return kinds


def _stored_parts(
    name: str, shape: tuple[int, ...], kind: str | None
) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
    """Names, shapes and dtypes of the tensors that a file holds for one of the hub's.

    None for the dtype that the file's floats have. See `quantize` for what they are.
    """
    if kind is None:
        return {name: (shape, None)}
    rows, width = shape
    if kind == "int8":
        return {name + _VALUES: (shape, torch.int8), name + _SCALES: ((rows,), torch.bfloat16)}
    return {
        name + _VALUES: ((rows, width // 2), torch.uint8),
        name + _SCALES: ((rows, width // QUANTIZE_GROUP, 2), torch.bfloat16),
    }


def _expected(config: ModelConfig) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
    """Name, shape and dtype of every tensor; None for a dtype that the config does not tell."""
    vocab = (config.vocab_size, config.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {_EMBED: vocab}
    for index in range(config.num_hidden_layers):
        for parts in _layer_table(config).values():
            shapes |= {f"model.layers.{index}.{name}": shape for name, shape in parts}
    shapes[_FINAL_NORM] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes[_LM_HEAD] = vocab
    kinds = weight_kinds(config)
    expected: dict[str, tuple[tuple[int, ...], torch.dtype | None]] = {}
    for name, shape in shapes.items():
        expected |= _stored_parts(name, shape, kinds.get(name))
    return expected


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this config holds.

    They are the hub's, but for quantized weights, which are two tensors each.
    """
    return {name: shape for name, (shape, _) in _expected(config).items()}


def expected_dtypes(config: ModelConfig, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype of every tensor in a checkpoint whose floats have `dtype`."""
    return {name: own or dtype for name, (_, own) in _expected(config).items()}


def count_parameters(config: ModelConfig) -> int:
    """Numbers in all weights; a tied head is counted once."""
    return sum(
        math.prod(shape) for shape in expected_tensors(replace(config, quantize=None)).values()
    )


def weight_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of all weights, in memory as on disk; a tied head is counted once."""
    dtypes = expected_dtypes(config, dtype)
    return sum(
        math.prod(shape) * dtypes[name].itemsize for name, shape in expected_tensors(config).items()
    )


def allocate_params(
    config: ModelConfig, dtype: torch.dtype, device: torch.device | str
) -> tuple[Params, dict[str, Tensor]]:
    """Uninitialised weights, and for every tensor of a checkpoint the rows of them that it fills.

    returns: Params of `dtype` on `device`, quantized ones in the layout of files (see
             `pack_params`); {name: view into those Params}
    """
    places: dict[str, Tensor] = {}
    kinds = weight_kinds(config)

    # A Tensor, or a QuantizedTensor, which no Params hold once they are packed.
    def allocate(prefix: str, parts: list[tuple[str, tuple[int, ...]]]) -> Any:
        names = [prefix + name for name, _ in parts]
        rows = [shape[0] for _, shape in parts]
        whole = (sum(rows), *parts[0][1][1:])
        stacks = []
        for stored, (shape, own) in _stored_parts("", whole, kinds.get(names[0])).items():
            stack = torch.empty(shape, dtype=own or dtype, device=device)
            places.update(zip((name + stored for name in names), stack.split(rows), strict=True))
            stacks.append(stack)
        return stacks[0] if len(stacks) == 1 else QuantizedTensor(*stacks)

    vocab = (config.vocab_size, config.hidden_size)
    embed = allocate("", [(_EMBED, vocab)])
    layers = tuple(
        LayerParams(
            **{
                field: allocate(f"model.layers.{index}.", parts)
                for field, parts in _layer_table(config).items()
            }
        )
        for index in range(config.num_hidden_layers)
    )
    final_norm = allocate("", [(_FINAL_NORM, (config.hidden_size,))])
    lm_head = embed if config.tie_word_embeddings else allocate("", [(_LM_HEAD, vocab)])
    return Params(embed, layers, final_norm, lm_head), places


def pack_params(params: Params, dtype: torch.dtype) -> Params:
    """Pack quantized weights for the kernels, in their own memory; `params` are used up.

    raises: MinifuseError where this CPU packs in an order that is not known
    """

    def packed(part: Any) -> Any:  # see `allocate_params`
        return pack(part, dtype) if isinstance(part, QuantizedTensor) else part

    embed = packed(params.embed)
    return Params(
        embed=embed,
        layers=tuple(LayerParams._make(map(packed, layer)) for layer in params.layers),
        final_norm=params.final_norm,
        lm_head=embed if params.lm_head is params.embed else packed(params.lm_head),
    )


def quantize_tensors(
    tensors: Iterable[tuple[str, Tensor | QuantizedTensor]], config: ModelConfig
) -> Iterator[tuple[str, Tensor]]:
    """Hub tensors, one by one, as a checkpoint of a quantized config holds them.

    tensors: pairs of hub name and float tensor, or one that is quantized as the config wants it
    """
    kinds = weight_kinds(config)
    for name, tensor in tensors:
        if isinstance(tensor, Tensor) and (name not in kinds or tensor.ndim != 2):
            yield name, tensor  # of another shape: to be named with all that do not fit
            continue
        if isinstance(tensor, Tensor):
            _check_finite(name, tensor)
            tensor = quantize_weight(tensor, kinds[name])
        assert KINDS[tensor.values.dtype] == kinds[name]
        yield name + _VALUES, tensor.values
        yield name + _SCALES, tensor.scales


def dequantize_tensors(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Undo `quantize_tensors`, but for the rounding: hub names and floats, quantized ones as f32.

    tensors: of a whole checkpoint, in any order
    """
    halves: dict[str, Tensor] = {}
    for name, tensor in tensors:
        stem, kind = name[: -len(_VALUES)], name[-len(_VALUES) :]
        if kind not in (_VALUES, _SCALES):
            yield name, tensor
            continue
        halves[name] = tensor
        if {stem + _VALUES, stem + _SCALES} <= halves.keys():
            yield (
                stem,
                dequantize(QuantizedTensor(halves.pop(stem + _VALUES), halves.pop(stem + _SCALES))),
            )


def params_from_tensors(
    tensors: Iterable[tuple[str, Tensor]],
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> Params:
    """Stack the tensors of a checkpoint into Params as they come; one of them is held at a time.

    tensors: pairs of name and tensor, as `expected_tensors` lists them
    raises:  CheckpointError, naming every missing, unexpected and misshapen tensor
    """
    params, places = allocate_params(config, dtype, device)
    ledger = Ledger(config)
    for name, tensor in tensors:
        if ledger.admit(name, tuple(tensor.shape)):
            places[name].copy_(tensor)
            check_range(name, tensor, places[name])
    ledger.close("the weights")
    return pack_params(params, dtype)


def load_params(
    folder: Path | str,
    config: ModelConfig,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    quantize: str | None = None,
) -> Params:
    """Read the safetensors of a folder in hub layout.

    config:   of the folder
    dtype:    of the Params; None is the checkpoint's own (`stored_dtype`)
    quantize: scheme by which to quantize floats as they are read
    returns: Params on `device`; when the head is tied, `lm_head` is the very `embed`
    raises:  CheckpointError for files that are missing, corrupt or unfit for the config, naming
             every missing, unexpected and misshapen tensor at once
    """
    folder = Path(folder)
    stored = find_tensors(folder)
    names = check_stored(folder, stored, config)
    # The largest first: what is mapped beside the finished weights shrinks as they grow.
    stored = {name: stored[name] for name in sorted(names, key=lambda n: -stored[n].num_bytes)}
    dtype = dtype or stored_dtype(folder, stored)
    tensors, wanted = _show_progress(stored), config.quantized(quantize)
    if wanted.quantize != config.quantize:
        tensors = quantize_tensors(tensors, wanted)
    return params_from_tensors(tensors, wanted, dtype, device)


def open_params(
    folder: Path | str, config: ModelConfig, dtype: torch.dtype, quantize: str | None = None
) -> Params:
    """Params that are read as they are asked for, a layer at a time; nothing is kept.

    As floats: a quantized weight comes as the f32 that it stands for, others have `dtype`. Beside
    `load_params` it goes another way from file to layer, so that one can check the other.

    arguments, raises: as in `load_params`
    """
    stored = find_tensors(folder)
    check_stored(Path(folder), stored, config)
    layers = _StoredLayers(stored, config, dtype, quantize)
    embed = layers.read(_EMBED)
    lm_head = embed if config.tie_word_embeddings else layers.read(_LM_HEAD)
    return Params(embed, layers, layers.read(_FINAL_NORM), lm_head)


class _StoredLayers(Sequence[LayerParams]):
    def __init__(
        self,
        stored: dict[str, StoredTensor],
        config: ModelConfig,
        dtype: torch.dtype,
        quantize: str | None,
    ):
        self._stored, self._config, self._dtype = stored, config, dtype
        self._wanted = config.quantized(quantize)
        self._stored_kinds, self._wanted_kinds = map(weight_kinds, (config, self._wanted))

    def __len__(self) -> int:
        return self._config.num_hidden_layers

    def __getitem__(self, index: int) -> LayerParams:  # type: ignore[override]  # no slices
        if not 0 <= index < len(self):
            raise IndexError(index)
        prefix = f"model.layers.{index}."
        return LayerParams(
            **{
                field: torch.cat([self.read(prefix + name) for name, _ in parts])
                for field, parts in _layer_table(self._config).items()
            }
        )

    def read(self, name: str) -> Tensor:
        """One of the hub's tensors as floats."""
        names = _stored_parts(name, (0, 0), self._stored_kinds.get(name))
        tensors = read_tensors({part: self._stored[part] for part in names})
        if self._wanted.quantize != self._config.quantize:
            tensors = quantize_tensors(tensors, self._wanted)
        ((_, tensor),) = dequantize_tensors(tensors)
        return tensor if name in self._wanted_kinds else tensor.to(self._dtype)


def stored_dtype(folder: Path | str, stored: dict[str, StoredTensor] | None = None) -> torch.dtype:
    """The dtype that config.json names, else the widest of the tensors' own.

    raises: CheckpointError; ConfigError where config.json names a dtype that minifuse does not run
    """
    raw = read_json(Path(folder) / "config.json")
    name = raw.get("dtype", raw.get("torch_dtype"))
    if name is not None:
        if not isinstance(name, str) or name not in DTYPES:
            raise ConfigError(
                f"config field dtype is {name!r}; minifuse runs {', '.join(DTYPE_NAMES)}: "
                "ask for one of them by name"
            )
        return DTYPES[name]
    found = {STORED_DTYPES[tensor.dtype] for tensor in (stored or find_tensors(folder)).values()}
    found = {dtype for dtype in found if dtype.is_floating_point}
    widest = found.pop()
    for dtype in found:
        widest = torch.promote_types(widest, dtype)
    return torch.float32 if widest == torch.float64 else widest


def find_tensors(folder: Path | str) -> dict[str, StoredTensor]:
    """Read the headers of a folder's safetensors: one file, or the shards of its index.

    raises: CheckpointError where a file is missing, corrupt, outside of the folder, or not floats
    """
    folder = Path(folder)
    if (folder / SINGLE_FILE).exists():
        return _read_header(folder / SINGLE_FILE)
    if not (folder / INDEX_FILE).exists():
        raise CheckpointError(
            f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}; wanted weights as safetensors"
        )
    placed = read_index(folder / INDEX_FILE)
    found: dict[str, StoredTensor] = {}
    for shard in sorted(set(placed.values())):
        # os.path answers no, and does not raise, for names that can be no file.
        if not os.path.isfile(folder / shard):
            raise CheckpointError(
                f"{folder / INDEX_FILE} names the shard {list_names([shard])}, which is not there; "
                "fetch the checkpoint again"
            )
        header = _read_header(folder / shard)
        twice = found.keys() & header.keys()
        if twice:
            raise CheckpointError(f"{folder}: more than one shard holds {list_names(twice)}")
        found |= header
    astray = [
        name
        for name, shard in placed.items()
        if name not in found or found[name].path != folder / shard
    ]
    if astray:
        raise CheckpointError(
            f"{folder / INDEX_FILE} names tensors that their shards do not hold: "
            f"{list_names(astray)}"
        )
    return found


def check_stored(
    folder: Path,
    stored: dict[str, StoredTensor],
    config: ModelConfig,
    are_equal: Callable[[StoredTensor, StoredTensor], bool] | None = None,
) -> list[str]:
    """Compare what a folder holds with what its config asks for; returns the names to read.

    Buffers of older checkpoints are passed over. A tied head may be stored a second time; other
    values would contradict the config.

    are_equal: compares the values of embedding and head; None is for safetensors
    raises:    CheckpointError, naming every missing, unexpected and misshapen tensor at once
    """
    ledger = Ledger(config)
    own = {name: dtype for name, (_, dtype) in _expected(config).items()}
    wanted, odd = [], []
    for name, tensor in stored.items():
        is_second_head = name == _LM_HEAD and config.tie_word_embeddings
        if not is_second_head and not _HARMLESS.fullmatch(name):
            ledger.admit(name, tensor.shape)
            wanted.append(name)
            if _is_other(tensor, own.get(name)):
                odd.append(f"{name} is {tensor.dtype}")
    ledger.close(f"the weights in {folder}")
    if odd:
        raise CheckpointError(f"{folder} holds quantized weights of other types: {list_names(odd)}")
    if config.tie_word_embeddings and _LM_HEAD in stored:
        pair = stored[_EMBED], stored[_LM_HEAD]
        if pair[0][1:] != pair[1][1:] or not (are_equal or _are_equal)(*pair):
            raise CheckpointError(
                f"the config of {folder} has tie_word_embeddings true, but {_LM_HEAD} differs from "
                f"{_EMBED}; set tie_word_embeddings to false if the head is meant to be its own"
            )
    return wanted


def weight_files(folder: Path | str) -> list[Path]:
    """The safetensors files that `load_params` reads, sorted."""
    return sorted({tensor.path for tensor in find_tensors(folder).values()})


class Ledger:
    """Ticks off the tensors that a config expects and remembers what is wrong with the others."""

    def __init__(self, config: ModelConfig):
        self._missing = expected_tensors(config)
        self._known = dict(self._missing)
        self._unexpected: list[str] = []
        self._misshapen: list[str] = []

    def admit(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of that name is wanted, has the right shape and came once."""
        wanted = self._missing.pop(name, None)
        if wanted is None:
            twice = " (twice)" if name in self._known else ""
            self._unexpected.append(name + twice)
        elif wanted != shape:
            self._misshapen.append(f"{name} is {list(shape)}, wanted {list(wanted)}")
        return wanted == shape

    def close(self, where: object) -> None:
        """Raise CheckpointError unless everything was admitted."""
        lists = {
            "missing": self._missing,
            "unexpected": self._unexpected,
            "misshapen": self._misshapen,
        }
        problems = [f"{kind}: {list_names(names)}" for kind, names in lists.items() if names]
        if problems:
            raise CheckpointError(f"{where} do not match the config; {'; '.join(problems)}")


def _are_equal(embed: StoredTensor, lm_head: StoredTensor) -> bool:
    with _open(embed.path) as embed_file, _open(lm_head.path) as head_file:
        embed_rows, head_rows = embed_file.get_slice(_EMBED), head_file.get_slice(_LM_HEAD)
        return all(
            torch.equal(
                embed_rows[start : start + _COMPARED_ROWS],
                head_rows[start : start + _COMPARED_ROWS],
            )
            for start in range(0, embed.shape[0], _COMPARED_ROWS)
        )


def check_range(name: str, source: Tensor, cast: Tensor) -> None:
    """float16 ends at 65504; a wider weight would turn into infinity without a word."""
    if cast.dtype == torch.float16 and source.dtype != torch.float16:
        is_lost = ~torch.isfinite(cast) & torch.isfinite(source).to(cast.device)
        if is_lost.any():
            raise CheckpointError(
                f"{name} has values beyond float16's range, 65504; use bfloat16 or float32"
            )


def _check_finite(name: str, tensor: Tensor) -> None:
    """One infinity would make a scale that takes its whole group along."""
    if not torch.isfinite(tensor).all():
        raise CheckpointError(f"{name} has values that are not finite; they cannot be quantized")


def _show_progress(stored: dict[str, StoredTensor]) -> Iterator[tuple[str, Tensor]]:
    """`read_tensors` with a bar on standard error, where there is much to read."""
    num_bytes = sum(tensor.num_bytes for tensor in stored.values())
    is_short = num_bytes < PROGRESS_BYTES
    with tqdm(desc="loading", total=num_bytes, unit="B", unit_scale=True, disable=is_short) as bar:
        for name, tensor in read_tensors(stored):
            yield name, tensor
            bar.update(stored[name].num_bytes)


def read_tensors(stored: dict[str, StoredTensor]) -> Iterator[tuple[str, Tensor]]:
    """Hub name and values of tensors in safetensors files, one at a time.

    raises: CheckpointError where a file is no longer what its header was read from
    """
    for name, tensor in stored.items():
        check_unchanged(tensor.path, tensor.version)
        # A mapping counts as memory for as long as it is open, so each tensor gets its own.
        with _open(tensor.path) as file:
            yield name, file.get_tensor(name)
        check_unchanged(tensor.path, tensor.version)


def _read_header(path: Path) -> dict[str, StoredTensor]:
    found = {}
    with _open(path) as file:
        version = file_version(path)
        for name in file.keys():  # noqa: SIM118 - a safe_open is no mapping
            part = file.get_slice(name)
            found[name] = StoredTensor(path, tuple(part.get_shape()), part.get_dtype(), version)
    odd = [f"{name} is {t.dtype}" for name, t in found.items() if not _is_storable(name, t.dtype)]
    if odd:
        raise CheckpointError(
            f"{path} holds tensors that are not plain floats: {list_names(odd)}; "
            f"wanted {', '.join(FILE_DTYPES)}"
        )
    if not found:
        raise CheckpointError(f"{path} holds no tensors")
    return found


def _is_storable(name: str, dtype: str) -> bool:
    return dtype in (STORED_DTYPES if name.endswith(_VALUES) else FILE_DTYPES)


def _is_other(tensor: StoredTensor, own: torch.dtype | None) -> bool:
    """Whether values are not of the integer type that they have to be; any float will do."""
    found = STORED_DTYPES[tensor.dtype]
    is_integer = own is not None and not own.is_floating_point
    return found != own if is_integer else not found.is_floating_point


def _open(path: Path) -> safe_open:
    check_readable(path)
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a readable safetensors file ({one_line(error)}); fetch it again"
        ) from error


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> shard, a path inside of the folder, from the index of a sharded checkpoint.

    raises: CheckpointError
    """
    placed = read_json(path).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise CheckpointError(f"{path} has no weight_map of tensor names to shard files")
    for shard in placed.values():
        if not isinstance(shard, str) or not is_inside(shard):
            raise CheckpointError(
                f"{path} names the shard {shard!r}; wanted a path inside of the folder"
            )
    return placed
