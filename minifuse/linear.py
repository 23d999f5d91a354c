"""Products with weights, and rows of the embedding: floats, int8 and int4.

Which way a product takes depends on the number of rows M, and on what the CPU can: a few rows are
bound by reading the weight, many by multiplying. The numbers behind each choice are in
docs/quantized.md; all ways give the same result but for rounding.

Letters: M rows of x, R rows of a weight whose nibbles are interleaved.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minifuse.config import QUANTIZE_GROUP

# Whether the CPU's library has instructions for bfloat16 (AVX-512, mostly). Without them it
# multiplies float32 several times as fast, which is worth to widen bfloat16 for.
HAS_BF16_PRODUCTS = (
    torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
)
# Up to so many rows Inductor's reduction reads a float weight no slower than the library does.
REDUCTION_ROWS = 2
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


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias.

    x: float[..., in], weight: [out, in], bias: float[out] -> float[..., out], in x's dtype

    Sums are taken in f32. An int4 weight wants bfloat16, an int8 one the dtype of its scales.
    """
    rows = x.reshape(-1, x.shape[-1])
    if isinstance(weight, PackedWeight):
        y = _packed_product(rows, weight)
        y = y if bias is None else y + bias
    elif _is_reduction(rows):
        y = (rows[:, None].float() * weight.float()).sum(-1)
        y = (y if bias is None else y + bias.float()).to(x.dtype)
    else:
        y = _product(rows, weight, bias)
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
        return _join_halves(_int4_halves(weight, dtype), weight).t()
    return weight.values.to(dtype) * weight.scales.to(dtype)[:, None]


def _is_reduction(rows: Tensor) -> bool:
    is_compiled = torch.compiler.is_compiling() and rows.device.type == "cpu"
    return is_compiled and rows.shape[0] <= REDUCTION_ROWS


def _product_dtype(rows: Tensor) -> torch.dtype:
    is_slow = rows.dtype == torch.bfloat16 and rows.device.type == "cpu" and not HAS_BF16_PRODUCTS
    return torch.float32 if is_slow and rows.shape[0] >= WIDENED_ROWS else rows.dtype


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    dtype = _product_dtype(rows)
    bias = None if bias is None else bias.to(dtype)
    return F.linear(rows.to(dtype), weight.to(dtype), bias).to(rows.dtype)


def _packed_product(rows: Tensor, weight: PackedWeight) -> Tensor:
    dtype = _product_dtype(rows)
    if weight.values.dtype == torch.uint8:
        if rows.shape[0] <= INT4_KERNEL_ROWS:
            return torch.ops.minifuse.int4_linear(rows, *weight)
        x = rows.to(dtype)
        products = [x @ half for half in _int4_halves(weight, dtype)]
        return _join_halves(products, weight).to(rows.dtype)
    # In float32 the kernel takes one number at a time.
    if rows.shape[0] <= INT8_KERNEL_ROWS and rows.dtype == torch.bfloat16:
        return torch.ops.aten._weight_int8pack_mm(rows.contiguous(), *weight)
    return _product(rows, dequantize(weight, dtype), None)


def _int4_halves(weight: PackedWeight, dtype: torch.dtype) -> list[Tensor]:
    """The transposed weight of the rows in low nibbles, and that of those in high ones.

    Apart, because Inductor makes vector code for each, and none for one joined matrix.

    returns: two of dtype[in, out/2]
    """
    values, scales = weight
    blocks, width, half_rows = values.shape
    grouped = scales.view(-1, 1, blocks, 2, half_rows, 2).to(dtype)
    halves = []
    for half, nibbles in enumerate((values & 15, values >> 4)):
        columns = nibbles.to(dtype).permute(1, 0, 2).reshape(-1, QUANTIZE_GROUP, blocks, half_rows)
        scale, zero = grouped[:, :, :, half].unbind(-1)
        halves.append(((columns - 8) * scale + zero).reshape(width, -1))
    return halves


def _join_halves(halves: list[Tensor], weight: PackedWeight) -> Tensor:
    """Columns of both halves in the order of the weight's rows: [M, out/2] twice -> [M, out]."""
    half_rows = weight.values.shape[2]
    return torch.stack([half.unflatten(1, (-1, half_rows)) for half in halves], dim=2).flatten(1)


# An op of our own: torch 2.13 cannot trace the int4 kernel inside of a `nested_compile_region`.

_LIBRARY = torch.library.Library("minifuse", "DEF")
_LIBRARY.define("int4_linear(Tensor x, Tensor values, Tensor scales) -> Tensor")


@torch.library.impl(_LIBRARY, "int4_linear", "CPU")
def _int4_linear(x: Tensor, values: Tensor, scales: Tensor) -> Tensor:
    """bf16[M, in], an int4 `PackedWeight` -> bf16[M, out]."""
    x, packed = x.contiguous(), values.view(scales.shape[1], -1)
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, QUANTIZE_GROUP, scales)


@torch.library.register_fake("minifuse::int4_linear", lib=_LIBRARY)
def _int4_shape(x: Tensor, values: Tensor, scales: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], scales.shape[1])
