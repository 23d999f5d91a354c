"""Products with weights, and rows of the embedding: floats, int8 and int4.

Which way a product takes depends on the number of rows M, and on what the CPU can: a few rows are
bound by reading the weight, many by multiplying. The numbers behind each choice are in
docs/quantized.md; all ways give the same result but for rounding.

A graph has a fixed number of rows, and a call fills the first of them. Where the time goes by rows,
only those are multiplied, or a few more: their number is a value in a tensor, so that no other one
recompiles.

Letters: M rows of x, R rows of a weight whose nibbles are interleaved.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minifuse.config import QUANTIZE_GROUP

# Whether torch has oneDNN, and whether that finds instructions for bfloat16 (AVX-512, mostly).
# Without them it multiplies float32 several times as fast, which is worth to widen bfloat16 for.
HAS_ONEDNN = torch.backends.mkldnn.is_available()
HAS_BF16_PRODUCTS = HAS_ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()
# Up to so many rows a float product is a loop over the weight that Inductor makes.
REDUCTION_ROWS = 8
# From so many rows on bfloat16 is widened, where it has to be.
WIDENED_ROWS = 16
# Up to so many rows the kernels that multiply packed weights are faster than to dequantize the
# weight first; their time grows with every row.
INT4_KERNEL_ROWS = 64
INT8_KERNEL_ROWS = 8 if HAS_BF16_PRODUCTS else 64


class PackedWeight(NamedTuple):
    """A quantized weight as the kernels want it; the dtype of the values tells its kind.

    int8: values i8[out, in], scales float[out]; weight = value * scale
    int4: values u8[out/R, in, R/2], scales bf16[in/32, out, 2], a scale and a zero for each 32
          neighbours in a row; weight = (nibble - 8) * scale + zero. Byte j holds row j of its R
          rows in the low nibble and row j + R/2 in the high one. R is the CPU's, so this is never
          written to disk (see `quantize.pack`)
    """

    values: Tensor
    scales: Tensor


Weight = Tensor | PackedWeight


def linear(
    x: Tensor, weight: Weight, bias: Tensor | None = None, live: Tensor | None = None
) -> Tensor:
    """x @ weight.T + bias.

    x: float[..., in], weight: [out, in], bias: float[out] -> float[..., out], in x's dtype
    live: i64[] on the CPU, how many of the leading rows are wanted; the others come out as any
          finite numbers, if they are finite themselves. None for all

    Sums are taken in f32. An int4 weight wants bfloat16, an int8 one the dtype of its scales.
    """
    rows = x.reshape(-1, x.shape[-1])
    if isinstance(weight, PackedWeight):
        y = _packed_product(rows, weight, live)
        y = y if bias is None else y + bias
    elif _is_reduction(rows):
        # A sum for each row, not one over a third dimension: Inductor fuses them into one loop that
        # reads the weight once, and keeps an accumulator for each.
        y = torch.stack([(row * weight.float()).sum(-1) for row in rows.float()])
        y = (y if bias is None else y + bias.float()).to(x.dtype)
    else:
        y = _product(rows, weight, bias, live)
    return y.view(*x.shape[:-1], y.shape[-1])


def embed(tokens: Tensor, weight: Weight) -> Tensor:
    """Rows of the embedding: i64[...] -> float[..., in]; a quantized one is an int8 one."""
    if not isinstance(weight, PackedWeight):
        return F.embedding(tokens, weight)
    scales = weight.scales[tokens]
    return weight.values[tokens].to(scales.dtype) * scales[..., None]


def dequantize(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The matrix [out, in] that a weight stands for."""
    if not isinstance(weight, PackedWeight):
        return weight.to(dtype)
    if weight.values.dtype == torch.uint8:
        return _join_halves(_int4_halves(weight, dtype), weight)
    return weight.values.to(dtype) * weight.scales.to(dtype)[:, None]


def _is_reduction(rows: Tensor) -> bool:
    is_compiled = torch.compiler.is_compiling() and rows.device.type == "cpu"
    return is_compiled and rows.shape[0] <= REDUCTION_ROWS


def product_rows(live: int) -> int:
    """How many rows a product with floats takes where so many are wanted: up to an eighth more, or
    the next multiple of 4.

    oneDNN generates code for every number of rows, in a millisecond, and torch keeps what it made
    for the last 1,024 shapes, 0.7 MB each (docs/hardening.md). So there are few numbers: eight from
    one power of two to the next.
    """
    if not HAS_ONEDNN:
        return live
    step = max(4, (1 << max(live - 1, 0).bit_length()) // 16)
    return -(-live // step) * step


def fast_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What to compute in: float32 for bfloat16 on a CPU without instructions for it."""
    is_slow = dtype == torch.bfloat16 and device.type == "cpu" and not HAS_BF16_PRODUCTS
    return torch.float32 if is_slow else dtype


def _product_dtype(rows: Tensor) -> torch.dtype:
    is_widened = rows.shape[0] >= WIDENED_ROWS
    return fast_dtype(rows.dtype, rows.device) if is_widened else rows.dtype


def _product(
    rows: Tensor, weight: Tensor, bias: Tensor | None, live: Tensor | None = None
) -> Tensor:
    dtype = _product_dtype(rows)
    x, weight = rows.to(dtype), weight.to(dtype)
    if live is None:
        y = F.linear(x, weight, None if bias is None else bias.to(dtype))
    else:
        y = torch.ops.minifuse.live_linear(x, weight, live)
        y = y if bias is None else y + bias.to(dtype)
    return y.to(rows.dtype)


def _packed_product(rows: Tensor, weight: PackedWeight, live: Tensor | None) -> Tensor:
    dtype = _product_dtype(rows)
    if weight.values.dtype == torch.uint8:
        if rows.shape[0] <= INT4_KERNEL_ROWS:
            packed = weight.values.view(weight.scales.shape[1], -1)
            live = None if rows.shape[0] == 1 else live
            y: Tensor = torch.ops.minifuse.int4_linear(
                rows.contiguous(), packed, weight.scales, live
            )
            return y
        products = [_product(rows, half, None, live) for half in _int4_halves(weight, dtype)]
        return _join_halves([product.t() for product in products], weight).t()
    # In float32 the kernel takes one number at a time.
    if rows.shape[0] <= INT8_KERNEL_ROWS and rows.dtype == torch.bfloat16:
        if rows.shape[0] == 1 or live is None:  # an op of our own costs a call of Python
            y = torch.ops.aten._weight_int8pack_mm(rows.contiguous(), *weight)
        else:
            y = torch.ops.minifuse.int8_linear(rows.contiguous(), *weight, live)
        return y
    return _product(rows, dequantize(weight, dtype), None, live)


def _int4_halves(weight: PackedWeight, dtype: torch.dtype) -> list[Tensor]:
    """The rows of the weight that lie in low nibbles, and those that lie in high ones.

    Apart, because Inductor makes vector code for each, and none for one joined matrix.

    returns: two of dtype[out/2, in]
    """
    values, _ = weight
    blocks, width, half_rows = values.shape
    scales, zeros = torch.ops.minifuse.split_scales(weight.scales, half_rows)
    halves = []
    # A shift of integers would not become vector code.
    for half, nibbles in enumerate(((values & 15).float(), torch.floor(values.float() / 16))):
        rows = (nibbles - 8).to(dtype).transpose(1, 2).contiguous()
        grouped = rows.view(blocks, half_rows, -1, QUANTIZE_GROUP)
        scale, zero = (part[:, half, ..., None].to(dtype) for part in (scales, zeros))
        halves.append((grouped * scale + zero).view(-1, width))
    return halves


def _join_halves(halves: list[Tensor], weight: PackedWeight) -> Tensor:
    """Rows of both halves in the order of the weight's: [out/2, M] twice -> [out, M]."""
    half_rows = weight.values.shape[2]
    parts = [half.unflatten(0, (-1, half_rows)) for half in halves]
    return torch.stack(parts, dim=1).flatten(0, 2)


# Ops of our own: what a compiler cannot look into may read how many rows there are. And torch 2.13
# cannot trace the int4 kernel inside of a `nested_compile_region`.

_LIBRARY = torch.library.Library("minifuse", "DEF")
_LIBRARY.define("live_linear(Tensor x, Tensor weight, Tensor live) -> Tensor")
_LIBRARY.define("int4_linear(Tensor x, Tensor packed, Tensor scales, Tensor? live) -> Tensor")
_LIBRARY.define("int8_linear(Tensor x, Tensor values, Tensor scales, Tensor live) -> Tensor")
_LIBRARY.define("split_scales(Tensor scales, int half_rows) -> (Tensor, Tensor)")


@torch.library.impl(_LIBRARY, "live_linear", "CPU")
def _live_linear(x: Tensor, weight: Tensor, live: Tensor) -> Tensor:
    """float[M, in], float[out, in] -> float[M, out], zeros behind `product_rows` of `live`."""
    wanted = x[: product_rows(int(live))]
    if x.dtype == torch.float32 and HAS_ONEDNN:
        # oneDNN; a plain product is MKL's, which takes up to twice the time on AMD's processors.
        y = torch.ops.mkldnn._linear_pointwise(wanted, weight, None, "none", [], "")
    else:
        y = F.linear(wanted, weight).to(x.dtype)  # autocast may have its own
    return _pad_rows(y, x.shape[0])


def _pad_rows(x: Tensor, rows: int) -> Tensor:
    count = x.shape[0]
    if count == rows:
        return x
    padded = x.new_empty(rows, x.shape[1])
    padded[:count] = x
    padded[count:] = 0
    return padded


@torch.library.impl(_LIBRARY, "int4_linear", "CPU")
def _int4_linear(x: Tensor, packed: Tensor, scales: Tensor, live: Tensor | None) -> Tensor:
    """bf16[M, in], values as u8[out, in/2], and scales of an int4 `PackedWeight`
    -> bf16[M, out], zeros from row `live` on."""
    wanted = x if live is None else x[: int(live)]
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(wanted, packed, QUANTIZE_GROUP, scales)
    return _pad_rows(y, x.shape[0])


@torch.library.impl(_LIBRARY, "int8_linear", "CPU")
def _int8_linear(x: Tensor, values: Tensor, scales: Tensor, live: Tensor) -> Tensor:
    """bf16[M, in], an int8 `PackedWeight` -> bf16[M, out], zeros from row `live` on."""
    y = torch.ops.aten._weight_int8pack_mm(x[: int(live)], values, scales)
    return _pad_rows(y, x.shape[0])


@torch.library.impl(_LIBRARY, "split_scales", "CPU")
def _split_scales(scales: Tensor, half_rows: int) -> tuple[Tensor, Tensor]:
    """Scales bf16[in/32, out, 2] of an int4 `PackedWeight` -> scales and zeros of its halves,
    bf16[out/R, 2, R/2, in/32] each; a buffer of their own, since Inductor would read pairs for
    every weight anew, one number at a time."""
    parts = scales.view(scales.shape[0], -1, 2, half_rows, 2).permute(4, 1, 2, 3, 0).contiguous()
    return parts[0], parts[1].clone()


@torch.library.register_fake("minifuse::live_linear", lib=_LIBRARY)
def _live_shape(x: Tensor, weight: Tensor, live: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.register_fake("minifuse::int4_linear", lib=_LIBRARY)
def _int4_shape(x: Tensor, packed: Tensor, scales: Tensor, live: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], scales.shape[1])


@torch.library.register_fake("minifuse::int8_linear", lib=_LIBRARY)
def _int8_shape(x: Tensor, values: Tensor, scales: Tensor, live: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], values.shape[0])


@torch.library.register_fake("minifuse::split_scales", lib=_LIBRARY)
def _split_shapes(scales: Tensor, half_rows: int) -> tuple[Tensor, Tensor]:
    groups, rows, _ = scales.shape
    shape = (rows // (2 * half_rows), 2, half_rows, groups)
    return scales.new_empty(shape), scales.new_empty(shape)
