"""Deformable convolutions in two steps, where the caller's framework has a matrix product: columns in memory, slab by slab,
then cuBLAS.

A slab has at most SLAB_BYTES of columns and products. Whatever it holds, the sums of the product are float32 and are
rounded once: for y after the bias has been added, for the gradient of w after all slabs have been added, in order. Columns
are rounded to the type of the arrays (float32 to tf32 if allowed) before they are multiplied, as they are for tensor cores
in the fused kernels; the gradients of columns stay float32.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from numdcn._call.convolution import ConvArrays, Convolution
from numdcn._call.device_array import BFLOAT16, DTYPES, DeviceArray
from numdcn._call.options import Options
from numdcn._cuda import replay
from numdcn._cuda.conv import pack
from numdcn._cuda.conv.column_gradients import U, scatter_columns
from numdcn._cuda.conv.columns_kernel import Finish, lengths, make_columns, write_outputs
from numdcn._cuda.conv.slabs import ACROSS, COMBOS, DOWN, Slab
from numdcn._cuda.conv.weights import Sums, sum_partials
from numdcn._cuda.coordinates import address_of
from numdcn._cuda.jit import F32
from numdcn._cuda.lanes import WARP
from numdcn._cuda.memory import vector_length
from numdcn._cuda.workspace import Images, Workspace, stored

SLAB_BYTES = 64 * 2**20
SINGLE = DTYPES["float32"]


class Rates(NamedTuple):
    """What is assumed of an H100: operations per second of the fused kernels and of cuBLAS, and the channels of a chunk of
    the fused ones."""

    fused: float
    library: float
    chunk: int


RATES = {
    "half": Rates(165e12, 640e12, 32),
    "tf32": Rates(82e12, 320e12, 16),
    "float32": Rates(43e12, 48e12, 16),
}
MEMORY = 3.0e12  # bytes per second that write or read columns; part of a slab stays in the L2 cache
CORNERS = 12e12  # bytes of corners per second: a quarter comes from L2 (see `slabs`), the rest from L1
LAUNCHES = 5e-6  # seconds that the further launches take


class Passes(NamedTuple):
    """What a direction computes. A backward counts as a whole, whichever gradients are wanted: so these do not change bits."""

    products: int
    columns: int  # 1 if columns are made
    gradients: int  # 1 if their gradients are


FORWARD, BACKWARD = Passes(1, 1, 0), Passes(2, 1, 1)


def choose(work: Workspace, p: Convolution, x: DeviceArray, options: Options, what: Passes) -> bool:
    """Whether to take two steps, for all frameworks, types and shapes: if the kernels can (`_possible`), if `saved` pays for
    the further launches, and if the framework multiplies as asked for, which may change from call to call."""
    if not _possible(work, p, x, options, what):
        return False
    kind = _kind(x, options)
    wanted = saved(p, kind, x.dtype.itemsize, what) > LAUNCHES if replay.forced is None else replay.forced
    if wanted:
        replay.unrepeatable()
    return wanted and work.framework.multiplies(x.dtype, kind == "tf32", work.device, work.stream)


def saved(p: Convolution, kind: str, size: int, what: Passes) -> float:
    """The seconds that two steps save, by this arithmetic for each number of the columns (pixels * taps * channels), with
    `outs` outputs per group:

        fused:      products * 2*outs / fused rate / live
        two steps:  products * 2*outs / rate of cuBLAS
                    + (2*size for columns + 2*4 for their gradients) / MEMORY
                    + size * 4 corners / CORNERS for each pass over the samples

    The fused kernels read corners, too, but while they multiply. `live`: the share of their chunks that is multiplied for a
    purpose, less if channels do not fill them.

    The rates are assumptions, until they are measured: 165 TFLOP/s for half types are the 16 mma among the 272 instructions of
    the loop, at three quarters of the issue rate; a tf32 mma does half as much; float32 has 72 % of its multiply-adds,
    cuBLAS 80 % of each.
    """
    rates, size_of_group = RATES[kind], p.in_channels // p.groups
    shared, outs = p.in_channels // p.offset_groups, p.out_channels // p.groups
    together = shared % 4 == 0 and (kind != "half" or shared >= 8 or outs <= 128)  # chunks span offset groups
    width = size_of_group if together else min(shared, size_of_group)
    live = width / (-(-width // rates.chunk) * rates.chunk)
    operations = what.products * 2 * (p.out_channels // p.groups)
    moved = 2 * size * what.columns + 2 * 4 * what.gradients
    added = moved / MEMORY + 4 * size * (what.columns + what.gradients) / CORNERS
    numbers = p.batch * math.prod(p.out_size) * p.taps * p.in_channels
    return numbers * (operations / rates.fused / live - operations / rates.library - added)


def _kind(x: DeviceArray, options: Options) -> str:
    if x.dtype in (DTYPES["float16"], BFLOAT16):
        return "half"
    return "tf32" if options.allow_tf32 else "float32"


def _possible(work: Workspace, p: Convolution, x: DeviceArray, options: Options, what: Passes) -> bool:
    """Offsets, vectors of channels that share group and offset group, and sizes that kernels count in 32 bits. Float64 and
    gradients of x in a fixed order are the fused kernels' alone."""
    if not p.offset_groups or options.deterministic or x.dtype == DTYPES["float64"]:
        return False
    if not work.has_mma or not length_of(p, x):
        return False
    return row_bytes(p, x.dtype.itemsize, what) <= SLAB_BYTES and p.batch * p.out_size[0] < 2**30


def length_of(p: Convolution, x: DeviceArray) -> int:
    """The channels that a thread makes columns of at a time; 0 if there is no such number."""
    dtype = stored(x.dtype)
    if p.groups == p.offset_groups == 1:
        return lengths(dtype)[0] if p.in_channels >= U else 0
    width = math.gcd(p.in_channels // p.groups, p.in_channels // p.offset_groups)
    return next((length for length in lengths(dtype) if width % length == 0), 0)


def depth_of(p: Convolution, x: DeviceArray) -> int:
    """The channels of a group in a row of columns: as many as `make_columns` writes."""
    length = length_of(p, x)
    return -(-(p.in_channels // p.groups) // length) * length


def row_bytes(p: Convolution, size: int, what: Passes) -> int:
    """What a row of output pixels takes in a slab: columns and their gradients, or the product."""
    numbers = p.taps * (p.in_channels + 16 // size)  # with padding, at most
    products = 4 * (numbers * what.gradients if what != FORWARD else p.out_channels)
    return p.out_size[1] * (numbers * size * what.columns + products)


def slabs(p: Convolution, size: int, what: Passes) -> list[tuple[int, int]]:
    """(first row, rows) of the slabs, of about the same size, in whole patches where that is possible."""
    total = p.batch * p.out_size[0]
    most = max(1, SLAB_BYTES // row_bytes(p, size, what))
    rows = -(-total // -(-total // most))
    if rows > DOWN:
        rows = min(most, -(-rows // DOWN) * DOWN) // DOWN * DOWN
    return [(first, min(rows, total - first)) for first in range(0, total, rows)]


class Steps(NamedTuple):
    """A call: where it runs, its sizes, and the parameters of its kernels."""

    work: Workspace
    p: Convolution
    x: DeviceArray
    dtype: object  # stored type of x
    slab: Slab
    tf32: bool

    @property
    def outs(self) -> int:
        """Output channels per group."""
        return self.p.out_channels // self.p.groups

    @property
    def row(self) -> int:
        """Numbers of a group in a row of the columns."""
        return self.p.taps * self.slab.depth


def _steps(work: Workspace, p: Convolution, arrays: ConvArrays, images: Images, options: Options) -> Steps:
    x, combos = arrays.x, p.taps * p.offset_groups
    offsets = work.contiguous(arrays.offsets)
    mask = 0 if arrays.mask is None else work.contiguous(arrays.mask).address
    tf32 = x.dtype == SINGLE and options.allow_tf32
    slab = Slab(
        p, images.array.address, images.pitch, images.pixels, address_of(offsets), mask, 0, 0, 0, depth_of(p, x),
        -(-combos // -(-combos // COMBOS)), int(tf32),
    )  # fmt: skip
    return Steps(work, p, x, stored(x.dtype), slab, tf32)


def forward(work: Workspace, p: Convolution, arrays: ConvArrays, y: DeviceArray, options: Options) -> None:
    """Fill y, which is contiguous."""
    s = _steps(work, p, arrays, work.pack_images(arrays.x), options)
    weights = pack.in_rows(work, p, arrays.w, s.slab.depth, s.tf32).reshaped(p.groups, s.outs, s.row)
    bias = 0 if arrays.bias is None else work.contiguous(arrays.bias).address
    parts, width = slabs(p, s.x.dtype.itemsize, FORWARD), p.out_size[1]
    most = max(rows for _, rows in parts) * width
    columns, products = work.empty((p.groups, most, s.row), s.x.dtype), work.empty((p.out_channels, most), SINGLE)
    for first, rows in parts:
        pixels = rows * width
        _make(s, first, rows, columns)
        turned = columns.view((p.groups, s.row, pixels), (pixels * s.row, 1, s.row))
        work.framework.multiply(weights, turned, products.reshaped(p.groups, s.outs, pixels), s.tf32)
        call = Finish(
            products.address, bias, y.address, p.out_channels, pixels, first * width, p.out_size[0] * width
        )  # fmt: skip
        work.spread(write_outputs(s.dtype), call, p.out_channels * pixels)


def _make(s: Steps, first: int, rows: int, columns: DeviceArray) -> None:
    """Fill the columns of a slab."""
    call = s.slab._replace(first=first, rows=rows, columns=columns.address)
    s.work.launch(make_columns(s.dtype, length_of(s.p, s.x)), call, _blocks(s, rows))


def _blocks(s: Steps, rows: int) -> int:
    """The tasks of the kernels over a slab."""
    combos = s.p.taps * s.p.offset_groups
    return -(-rows // DOWN) * -(-s.p.out_size[1] // ACROSS) * -(-combos // s.slab.combos)


def backward(
    work: Workspace, p: Convolution, grad_y: DeviceArray, arrays: ConvArrays, grads: ConvArrays, options: Options
) -> None:
    """Fill the gradients of x, offsets, mask and w in `grads`, contiguous arrays or None; grad_y is contiguous."""
    in_columns = any(g is not None for g in (grads.x, grads.offsets, grads.mask))
    reads = any(g is not None for g in (grads.w, grads.offsets, grads.mask))
    images = work.pack_images(arrays.x) if reads else work.image_sizes(arrays.x)
    s, dtype = _steps(work, p, arrays, images, options), arrays.x.dtype
    parts, width = slabs(p, dtype.itemsize, BACKWARD), p.out_size[1]
    most = max(rows for _, rows in parts) * width
    turned = _by_pixels(s, grad_y)
    pitch = turned.shape[-1]
    if in_columns:
        weights = pack.in_rows(work, p, arrays.w, s.slab.depth, s.tf32).reshaped(p.groups, s.outs, s.row)
        values, (slab, grad_images) = work.empty((p.groups, most, s.row), SINGLE), _targets(s, grads)
    if grads.w is not None:
        columns = work.empty((p.groups, most, s.row), dtype)
        sums = work.empty((2, p.groups, s.outs, s.row), SINGLE)
    for number, (first, rows) in enumerate(parts):
        pixels = rows * width
        left, start = (p.groups, pixels, s.outs), first * width * pitch
        if in_columns:
            target = values.reshaped(p.groups, pixels, s.row)
            work.framework.multiply(turned.view(left, (s.outs, pitch, 1), start), weights, target, s.tf32)
            call = slab._replace(first=first, rows=rows, columns=values.address)
            kernel = scatter_columns(s.dtype, grads.x is not None and work.vectors(dtype))
            work.launch(kernel, call, _blocks(s, rows))
        if grads.w is not None:
            _make(s, first, rows, columns)
            gradient = turned.view((p.groups, s.outs, pixels), (s.outs, 1, pitch), start)
            made = columns.reshaped(p.groups, pixels, s.row)
            _add_product(s, gradient, made, sums, number > 0)
    if grads.x is not None:
        work.unpack_images(grad_images, grads.x)
    if grads.w is not None:
        steps = (s.row, 1, p.kernel[1] * s.slab.depth, s.slab.depth)
        work.copy(sums.view(p.weights_shape, steps), grads.w)


def _by_pixels(s: Steps, grad_y: DeviceArray) -> DeviceArray:
    """grad_y as (N, pixels, channels), with channels padded to whole vectors; rounded to tf32 if the products are."""
    p, vector = s.p, vector_length(s.dtype)
    plain = grad_y.reshaped(p.batch, p.out_channels, p.out_size[0] * p.out_size[1])
    return s.work.pack_rows(plain, -(-p.out_channels // vector) * vector, s.tf32)


def _targets(s: Steps, grads: ConvArrays) -> tuple[Slab, Images]:
    """The parameters of `scatter_columns`, and the images that it adds to."""
    vectors = -(-s.p.in_channels // s.p.offset_groups // U)
    grad_offsets, grad_mask = address_of(grads.offsets), 0 if grads.mask is None else grads.mask.address
    lanes = min(WARP, 1 << (vectors - 1).bit_length())
    slab = s.slab._replace(grad_offsets=grad_offsets, grad_mask=grad_mask, lanes=lanes)
    if grads.x is None:
        return slab, s.work.image_sizes(s.x)
    images = s.work.zero_images(s.x.shape, s.x.dtype)
    return slab._replace(grad_images=images.array.address, grad_pitch=images.pitch), images


def _add_product(s: Steps, left: DeviceArray, right: DeviceArray, sums: DeviceArray, further: bool) -> None:
    """sums[0] = left @ right, or `further` that is added to it, by way of sums[1]."""
    size = sums.size // 2
    target = sums.slice(int(further), 2).reshaped(s.p.groups, s.outs, s.row)
    s.work.framework.multiply(left, right, target, s.tf32)
    if further:
        s.work.spread(sum_partials(F32), Sums(sums.address, sums.address, size, 2, 0), size)
