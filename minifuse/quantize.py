"""Weights of 4 and 8 bits: from floats and back, and from a file's layout to the kernels'.

In a file, and until it is packed, a matrix [out, in] is two tensors:

    int8: values i8[out, in], scales bf16[out]; weight = value * scale
    int4: values u8[out, in/2], scales bf16[out, in/32, 2]: a scale and a zero for each 32
          neighbours in a row; weight = (nibble - 8) * scale + zero. Of 32 neighbours the first 16
          are the low nibbles of 16 bytes, the last 16 the high ones, as in GGUF's Q4_0 and Q4_1
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from minifuse.config import QUANTIZE_GROUP
from minifuse.errors import MinifuseError
from minifuse.linear import PackedWeight

# Rows of an int4 weight come in such blocks: the most that any CPU's packing interleaves.
INT4_ROWS = 64
# dtype of the values -> kind
KINDS = {torch.uint8: "int4", torch.int8: "int8"}


class QuantizedTensor(NamedTuple):
    """A matrix in the layout of files."""

    values: Tensor
    scales: Tensor


def quantize_weight(weight: Tensor, kind: str) -> QuantizedTensor:
    """Round float[out, in] to "int8" or "int4"; `in` is a multiple of 32."""
    return (_quantize_int4 if kind == "int4" else _quantize_int8)(weight.float())


def join_groups(bytes_: Tensor, scale: Tensor, zero: Tensor) -> QuantizedTensor:
    """An int4 matrix of its groups: u8[out, in/32, 16], float[out, in/32] twice."""
    scales = torch.stack([scale, zero], dim=-1).bfloat16()
    return QuantizedTensor(bytes_.flatten(1).contiguous(), scales)


def read_nibbles(values: Tensor) -> Tensor:
    """u8[out, in/2] -> u8[out, in/32, 32], each from 0 to 15."""
    bytes_ = values.unflatten(1, (-1, QUANTIZE_GROUP // 2))
    return torch.cat([bytes_ & 15, bytes_ >> 4], dim=-1)


def dequantize(tensor: QuantizedTensor) -> Tensor:
    """The f32[out, in] that a quantized matrix stands for."""
    values, scales = tensor.values, tensor.scales.float()
    if values.dtype == torch.int8:
        return values.float() * scales[:, None]
    return ((read_nibbles(values).float() - 8) * scales[..., :1] + scales[..., 1:]).flatten(1)


def pack(tensor: QuantizedTensor, dtype: torch.dtype) -> PackedWeight:
    """The weight as the CPU's kernels want it; the values' memory is used again, in place.

    dtype:  of the activations; bfloat16 where the weight is int4
    raises: MinifuseError on a CPU whose packing of int4 is not known
    """
    values, scales = tensor
    if values.dtype == torch.int8:
        return PackedWeight(values, scales.to(dtype))
    nibbles = read_nibbles(values).flatten(1)
    rows = packed_rows()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles.int(), 1)
    values.copy_(packed)
    return PackedWeight(
        values.view(-1, nibbles.shape[1], rows // 2), scales.transpose(0, 1).contiguous()
    )


@cache
def packed_rows() -> int:
    """How many rows this CPU interleaves where it packs int4: R of `PackedWeight`.

    raises: MinifuseError where it packs in another order altogether
    """
    nibbles = torch.arange(INT4_ROWS * QUANTIZE_GROUP, dtype=torch.int32).view(
        INT4_ROWS, QUANTIZE_GROUP
    )
    nibbles = (nibbles * 7919 // 13) % 16
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles, 1).flatten()
    for rows in (INT4_ROWS, INT4_ROWS // 2):
        halves = nibbles.view(-1, 2, rows // 2, QUANTIZE_GROUP).transpose(2, 3)
        if torch.equal(packed, (halves[:, 0] | halves[:, 1] << 4).flatten().to(torch.uint8)):
            return rows
    raise MinifuseError(
        "torch packs int4 weights for this CPU in an order that minifuse does not know "
        f"({torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}); use int8"
    )


def _quantize_int4(weight: Tensor) -> QuantizedTensor:
    """The nibbles 0 and 15 are the least and the largest of each group."""
    grouped = weight.unflatten(1, (-1, QUANTIZE_GROUP))
    low, high = grouped.aminmax(dim=-1, keepdim=True)
    # What is kept is rounded first, so that the nibbles make up for it.
    scale = ((high - low) / 15).bfloat16().float()
    zero = (low + 8 * scale).bfloat16().float()
    steps = torch.where(scale > 0, (grouped - zero) / scale, 0)
    nibbles = (steps.round() + 8).clamp(0, 15).to(torch.uint8)
    first, last = nibbles.chunk(2, dim=-1)
    return join_groups(first | last << 4, scale[..., 0], zero[..., 0])


def _quantize_int8(weight: Tensor) -> QuantizedTensor:
    """The values -127 to 127 span each row; none is -128."""
    scale = (weight.abs().amax(dim=1, keepdim=True) / 127).bfloat16().float()
    steps = torch.where(scale > 0, weight / scale, 0)
    values = steps.round().clamp(-127, 127).to(torch.int8)
    return QuantizedTensor(values, scale[:, 0].bfloat16())
