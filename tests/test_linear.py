"""Products with floats and quantized weights, each way of them against the slow twin."""

import math
import os
import re
import subprocess
import sys

import pytest
import reference
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from minifuse.executor import CPU_OPTIONS, PREFILL_SIZES
from minifuse.linear import (
    HAS_ONEDNN,
    INT4_KERNEL_ROWS,
    INT8_KERNEL_ROWS,
    REDUCTION_ROWS,
    WIDENED_ROWS,
    PackedWeight,
    dequantize,
    embed,
    linear,
    product_rows,
)
from minifuse.model import rms_norm
from minifuse.quantize import QuantizedTensor, pack, quantize_weight

WIDTH = 96
BF16, F32 = torch.bfloat16, torch.float32
# On both sides of every threshold.
THRESHOLDS = (2, WIDENED_ROWS - 1, INT8_KERNEL_ROWS, INT4_KERNEL_ROWS)
COUNTS = sorted({1, *THRESHOLDS, *(count + 1 for count in THRESHOLDS)})


def make_weight(kind: str, rows: int = 192, dtype: torch.dtype = BF16) -> tuple:
    """A weight for `linear`, and the f64 matrix that it stands for by the slow twin."""
    weight = torch.randn(rows, WIDTH)
    if kind == "float":
        return weight.to(dtype), weight.to(dtype).double()
    stored = quantize_weight(weight, kind)
    exact = reference.dequantize(stored.values, stored.scales)
    return pack(QuantizedTensor(stored.values.clone(), stored.scales), dtype), exact


def check_product(
    y: Tensor, x: Tensor, exact: Tensor, bias: Tensor | None, is_rounded: bool
) -> None:
    """Within what rounding explains of x @ exact.T + bias.

    is_rounded: the weight may have been rounded to x's dtype on its way
    """
    product = x.double() @ exact.T
    wanted = product if bias is None else product + bias.double()
    eps = torch.finfo(x.dtype).eps
    magnitude = x.double().abs() @ exact.abs().T
    # The result is rounded once, twice with a bias; sums in f32 (or better) of WIDTH products; a
    # rounded weight is off by eps / 2 of itself, twice where scale and product are both rounded.
    allowed = eps * (product.abs() + wanted.abs()) / 2 + WIDTH * 2**-23 * magnitude
    if is_rounded:
        allowed = allowed + 2 * eps * magnitude
    assert ((y.double() - wanted).abs() <= allowed).all()


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("float", BF16), ("float", F32), ("int8", BF16), ("int8", F32), ("int4", BF16)],
)
def test_any_number_of_rows(kind, dtype, count, has_bias):
    weight, exact = make_weight(kind, dtype=dtype)
    x = torch.randn(1, count, WIDTH).to(dtype)
    bias = torch.randn(len(exact)).to(dtype) if has_bias else None
    y = linear(x, weight, bias)
    assert (y.dtype, y.shape) == (dtype, (1, count, len(exact)))
    # The kernels multiply by what the bits stand for; dequantized weights have x's dtype.
    limit = {"int4": INT4_KERNEL_ROWS, "int8": INT8_KERNEL_ROWS}.get(kind, 0)
    check_product(y, x, exact, bias, is_rounded=kind != "float" and count > limit)


@pytest.mark.parametrize("count", [1, 2, REDUCTION_ROWS, REDUCTION_ROWS + 1, INT4_KERNEL_ROWS + 1])
@pytest.mark.parametrize(
    ("kind", "dtype"), [("float", BF16), ("float", F32), ("int8", BF16), ("int4", BF16)]
)
def test_compiled(kind, dtype, count):
    weight, exact = make_weight(kind, dtype=dtype)
    x = torch.randn(1, count, WIDTH).to(dtype)
    bias = torch.randn(len(exact)).to(dtype)
    torch._dynamo.reset()  # graphs of other cases count against a limit

    @torch.compile(fullgraph=True, dynamic=False)
    def with_and_without_bias(x: Tensor) -> tuple[Tensor, Tensor]:
        return linear(x, weight, bias), linear(x, weight)

    limit = {"int4": INT4_KERNEL_ROWS, "int8": INT8_KERNEL_ROWS}.get(kind, 0)
    for y, added in zip(with_and_without_bias(x), (bias, None), strict=True):
        assert (y.dtype, y.shape) == (dtype, (1, count, len(exact)))
        check_product(y, x, exact, added, is_rounded=kind != "float" and count > limit)


@pytest.mark.parametrize("count", [1, REDUCTION_ROWS])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_a_few_rows_are_one_loop_over_the_weight(dtype, count):
    """Behind a norm, as in a layer: neither is the norm computed anew for each output, nor do the
    products of a row and the weight go through memory."""
    weight, norm = torch.randn(192, WIDTH).to(dtype), torch.randn(WIDTH).to(dtype)

    def layer(x: Tensor) -> Tensor:
        return linear(rms_norm(x, norm, 1e-5), weight)

    x = torch.randn(1, count, WIDTH).to(dtype)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=False, options=CPU_OPTIONS)
    y, (code,) = run_and_get_code(compiled, x)
    check_product(y, rms_norm(x, norm, 1e-5), weight.double(), None, is_rounded=True)
    buffers = re.findall(r"empty_strided_cpu\(\(([\d, ]+)\)", code)
    sizes = [math.prod(int(n) for n in shape.split(",") if n.strip()) for shape in buffers]
    assert count * WIDTH in sizes, "the norm has no buffer of its own"
    assert max(sizes) == count * len(weight), "products are kept in memory"


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("count", [8, WIDENED_ROWS + 4, INT4_KERNEL_ROWS + 8])
@pytest.mark.parametrize(
    ("kind", "dtype"), [("float", BF16), ("float", F32), ("int8", BF16), ("int4", BF16)]
)
def test_live_rows_alone(kind, dtype, count, is_compiled):
    """Padding is not multiplied, NaN in it would come out again; but for a reduction, which takes
    no longer with it, and for the few rows that make a number of rows a round one."""
    weight, exact = make_weight(kind, dtype=dtype)
    bias = torch.randn(len(exact)).to(dtype)
    run = linear
    if is_compiled:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        run = torch.compile(linear, fullgraph=True, dynamic=False)
    for live in (1, count - 3, count):
        x = torch.randn(1, count, WIDTH).to(dtype)
        is_reduction = kind == "float" and is_compiled and count <= REDUCTION_ROWS
        limit = {"int4": INT4_KERNEL_ROWS, "int8": INT8_KERNEL_ROWS}.get(kind, 0)
        is_kernel = count <= limit
        x[:, live:] = 1e30
        if not is_reduction:
            x[:, live if is_kernel else product_rows(live) :] = torch.nan
        y = run(x, weight, bias, torch.tensor(live))
        assert y.shape == (1, count, len(exact))
        is_rounded = kind != "float" and not is_kernel
        check_product(y[:, :live], x[:, :live], exact, bias, is_rounded)
        assert y.isfinite().all()
    if is_compiled:
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_numbers_of_rows():
    """Few, since each stays in memory; and not many more than wanted."""
    counts = [product_rows(live) for live in range(PREFILL_SIZES[-1] + 1)]
    if not HAS_ONEDNN:
        assert counts == list(range(len(counts)))
        return
    assert len(set(counts)) == 41
    assert counts == sorted(counts)
    assert set(PREFILL_SIZES) <= set(counts)
    assert all(live <= count < max(live + 4, live * 1.125) for live, count in enumerate(counts))


# Run alone, since what other tests made would be kept as well.
GROWS = """
import torch
from minifuse.linear import linear
from minifuse.soak.watch import resident_bytes

x, weight = torch.randn(512, 64), torch.randn(256, 64)
linear(x, weight, None, torch.tensor(512))
before = resident_bytes()
for live in range(1, 513):
    linear(x, weight, None, torch.tensor(live))
print(resident_bytes() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_products():
    """All numbers of rows took 336 MB where each had a shape of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", GROWS]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    assert int(done.stdout) < 64 << 20


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_compiled_in_a_region(kind):
    """Where a layer is compiled: the kernel alone, called there, would fail."""
    weight, exact = make_weight(kind)

    @torch.compiler.nested_compile_region
    def region(x: Tensor, values: Tensor, scales: Tensor) -> Tensor:
        return linear(x, PackedWeight(values, scales))

    def twice(x: Tensor) -> Tensor:
        return region(x, *weight) + region(-x, *weight)

    x = torch.randn(1, 3, WIDTH).to(BF16)
    with torch.inference_mode():
        y = torch.compile(twice, fullgraph=True, dynamic=False)(x)
    assert torch.equal(y, torch.zeros(1, 3, len(exact), dtype=BF16))


@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 4), ()])
@pytest.mark.parametrize("kind", ["float", "int8", "int4"])
def test_any_shape_of_rows(kind, shape):
    weight, _ = make_weight(kind)
    x = torch.randn(*shape, WIDTH).to(BF16)
    y = linear(x, weight)
    assert y.shape == (*shape, 192)
    flat = linear(x.reshape(1, -1, WIDTH), weight)
    torch.testing.assert_close(y.reshape(1, -1, 192), flat, rtol=0, atol=0)


def test_rows_that_are_not_contiguous():
    x = torch.randn(WIDTH, 7).to(BF16).T
    for kind in ("float", "int8", "int4"):
        weight, exact = make_weight(kind)
        check_product(linear(x, weight), x, exact, None, is_rounded=False)


@pytest.mark.parametrize("rows", [64, 128, 192, 960])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_packed_weights_stand_for_the_same_matrix(kind, rows):
    weight, exact = make_weight(kind, rows)
    # Products of 8 bits with a nibble, and a sum: f32 is off by its last bits.
    torch.testing.assert_close(dequantize(weight, F32).double(), exact, rtol=2**-20, atol=2**-20)
    bits = 8 if kind == "int8" else 4
    assert weight.values.nbytes == rows * WIDTH * bits // 8


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_embedding(dtype):
    tokens = torch.tensor([[3, 0], [191, 3]])
    weight, exact = make_weight("float", dtype=dtype)
    assert torch.equal(embed(tokens, weight), exact[tokens].to(dtype))
    weight, exact = make_weight("int8", dtype=dtype)
    rows = embed(tokens, weight)
    assert rows.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(rows.double(), exact[tokens], rtol=eps / 2, atol=0)


def test_no_rows_give_no_rows():
    assert linear(torch.ones(0, 3, 32), torch.ones(16, 32)).shape == (0, 3, 16)
