"""Deformable convolution on NumPy arrays: forward and backward.

Forward: x is copied to channels-last with a rim of zeros; then, tile by tile of output pixels and chunk by chunk of
columns: plan (cells and weights), sample, multiply by the packed weights; the sums are turned into y.

Backward, for a block of input channels, tile by tile and tap by tap: the gradient of the tap's columns is a product of
grad_y and the weights; in one sweep over the pixels it is added to the image's gradient, yields the gradients of
offsets and mask, and is replaced by the columns themselves, whose product with grad_y is the gradient of the weights.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from numdcn._host.arrays import place
from numdcn._host.scratch import Scratch
from numdcn._host.threads import launch, plan_threads
from numdcn._host.weights import PreparedWeights, pack
from numdcn._kernels.gemm_cpu import ROWS
from numdcn._kernels.images_cpu import ClearCall, ImagesCall, clear, pack_images, unpack_images
from numdcn._kernels.jit_cpu import helper, kernel
from numdcn._kernels.layout_cpu import BLOCK, fill, rimmed_pixels
from numdcn._kernels.parameters_cpu import Place, unpack
from numdcn._kernels.sample_cpu import (
    GRAD_SCALE,
    GRAD_X,
    GRAD_Y,
    ROW,
    place_tile,
    plan_tap,
    sample_tap,
    sample_tap_backward,
    tile_at,
    write_plane,
)
from numdcn._kernels.simd_cpu import at, full, load, load_like, load_scalar, next_task, pointer, store, width
from numdcn._kernels.weights_cpu import PackBlocks, pack_blocks, packing
from numdcn.deform_conv.columns_cpu import (
    chunk_at,
    columns_gradient,
    multiply_chunk,
    pack_gradient,
    read_tap,
    sample_chunk,
    weights_gradient,
    write_tile,
)
from numdcn.deform_conv.cut import BackwardCut, ForwardCut, backward_cut, forward_cut
from numdcn.deform_conv.problem import Problem


class ForwardArrays(NamedTuple):
    """Where everything lies."""

    x: Place
    offsets: Place
    mask: Place
    bias: Place
    y: Place
    images: int  # addresses: rimmed images,
    weights: int  # packed weights,
    slots: int  # scratch of the threads


class ForwardCall(NamedTuple):
    """Parameters of `forward_tiles`."""

    p: Problem
    cut: ForwardCut
    a: ForwardArrays


@kernel
def forward_tiles(one, params, counter, slot):  # type: ignore[no-untyped-def]
    """y, tile by tile. A task is a tile and a block of groups, or of panels of outputs."""
    call = unpack(params, ForwardCall)
    p, cut, a, per_block = call.p, call.cut, call.a, call.cut.per_block
    base = a.slots + slot * cut.slot_bytes
    tile = tile_at(base, one)
    columns = pointer(base + cut.tile_bytes, one)
    sums = at(columns, cut.rows * cut.chunks.pitch)
    buffer = at(sums, cut.chunks.group_step * cut.rows * cut.sums_pitch)
    while True:
        task = next_task(counter)
        if task >= p.batch * cut.tiles * cut.parts:
            return
        unit, part = task // cut.parts, task % cut.parts
        n = unit // cut.tiles
        runs, pixels = place_tile(tile, cut, unit % cut.tiles, p.out_size, p.stride, p.before)
        image = at(pointer(a.images, one), n * cut.image_size)
        first_panel, block_ = 0, part
        if cut.chunks.groups == 1:
            first_panel, block_ = part * cut.panel_step, 0
        panels = min(cut.panel_step, cut.weights.panels - first_panel)
        for number in range(block_ * per_block, (block_ + 1) * per_block):
            chunk = chunk_at(cut.chunks, number)
            sample_chunk(one, p, a, n, tile, runs, pixels, image, chunk, cut.chunks, columns)
            multiply_chunk(one, p, cut, pointer(a.weights, one), chunk, columns, pixels, sums, first_panel, panels)
        outputs, o = cut.weights.outputs, first_panel * cut.weights.panel
        group = block_ * cut.chunks.group_step
        for g in range(group, min(group + cut.chunks.group_step, cut.chunks.groups)):
            done = at(sums, (g - group) * cut.rows * cut.sums_pitch)
            many = min(panels * cut.weights.panel, outputs - o)
            write_tile(one, a, n, g * outputs + o, many, tile, runs, pixels, done, cut.sums_pitch, buffer, p.biased)


def forward(p: Problem, arrays: dict[str, Any], y: np.ndarray) -> None:
    """Fill y. All arrays are addressable and checked."""
    if p.batch == 0:
        return
    x, w = arrays["x"], arrays["w"]
    dtype = x.dtype
    one, cut = dtype.type(1), forward_cut(p, dtype)
    tasks, blocks = p.batch * cut.tiles * cut.parts, p.batch * -(-p.in_size[0] * p.in_size[1] // BLOCK)
    threads = plan_threads(tasks, float(p.batch) * p.out_size[0] * p.out_size[1] * cut.weights.size)
    prepared = isinstance(w, PreparedWeights)
    weights_bytes = 0 if prepared else (cut.weights.size + 16) * dtype.itemsize  # vectors may run over
    with Scratch(p.batch * cut.image_size * dtype.itemsize, weights_bytes, threads * cut.slot_bytes) as memory:
        images, weights, slots = memory
        x_place, bounds = place(x), np.array((0, p.in_channels), np.int64)
        image_call = ImagesCall(
            p.batch, p.in_size, cut.image_size, x_place, images, bounds.ctypes.data, 1, slots, cut.slot_bytes
        )
        launch(pack_images, one, image_call, min(threads, blocks))
        if prepared:
            weights = w.packed
        else:
            pack(w, cut.weights, weights, threads)
        a = ForwardArrays(
            x_place,
            place(arrays["offsets"]),
            place(arrays["mask"]),
            place(arrays["bias"]),
            place(y),
            images,
            weights,
            slots,
        )
        launch(forward_tiles, one, ForwardCall(p, cut, a), threads)


class Parts(NamedTuple):
    """Where the partial sums of a gradient lie: strides of parts, images, channels, rows, columns."""

    address: int
    strides: tuple[int, int, int, int, int]


class BackwardArrays(NamedTuple):
    """Where everything lies. Gradients that are not wanted lie nowhere, at address 0."""

    grad_y: Place
    offsets: Place
    mask: Place
    grad_x: Place
    grad_offsets: Parts
    grad_mask: Parts
    grad_w: Place
    images: int  # addresses: rimmed images,
    grad_images: int  # their gradients,
    weights: int  # weights packed in blocks,
    sums: int  # partial sums of their gradient,
    bounds: int  # first channels of the blocks,
    firsts: int  # first and last blocks of the offset groups,
    slots: int  # scratch of the threads


class BackwardCall(NamedTuple):
    """Parameters of the kernels of the backward."""

    p: Problem
    cut: BackwardCut
    a: BackwardArrays


class SumCall(NamedTuple):
    """Parameters of `sum_parts`."""

    p: Problem
    firsts: int
    channels: int  # of an offset group
    partial: Parts
    target: Place


@helper
def sample_block(one, p, cut, a, n, number, first, count, tap, tile, runs, pixels, columns):  # type: ignore[no-untyped-def]
    """Turn the gradient of a tap's columns, for the channels of a block, into the columns; add to the other gradients."""
    shift = (tap // p.kernel[1] * p.dilation[0], tap % p.kernel[1] * p.dilation[1])
    per_offset_group, below = p.in_channels // p.offset_groups, (p.in_size[1] + 1) * count
    start = n * cut.image_size + first * rimmed_pixels(p.in_size)
    image, grad_image = at(pointer(a.images, one), start), at(pointer(a.grad_images, one), start)
    firsts = pointer(a.firsts, np.int64(0))
    for g in range(first // per_offset_group, (first + count - 1) // per_offset_group + 1):
        channel, part = g * p.taps + tap, number - load_scalar(firsts, 2 * g)
        read_tap(one, p, a.offsets, a.mask, n, channel, tile, runs)
        plan_tap(tile, pixels, shift, p.in_size, count)
        c = max(first, g * per_offset_group) - first
        c_end = min(first + count, (g + 1) * per_offset_group) - first
        target = at(columns, c)
        if not a.weights:
            sample_tap(at(image, c), tile, pixels, c_end - c, count, below, target, cut.block)
            continue
        sample_tap_backward(
            at(image, c), at(grad_image, c), a.grad_images != 0, tile, pixels, c_end - c, count, below, target, cut.block,
        )  # fmt: skip
        if a.grad_offsets.address:
            strides = a.grad_offsets.strides
            plane = at(
                pointer(a.grad_offsets.address, one), part * strides[0] + n * strides[1] + 2 * channel * strides[2]
            )
            write_plane(plane, strides[3:], tile, runs, at(tile.rows, GRAD_Y))
            write_plane(at(plane, strides[2]), strides[3:], tile, runs, at(tile.rows, GRAD_X))
        if a.grad_mask.address:
            strides = a.grad_mask.strides
            plane = at(pointer(a.grad_mask.address, one), part * strides[0] + n * strides[1] + channel * strides[2])
            write_plane(plane, strides[3:], tile, runs, at(tile.rows, GRAD_SCALE))


@kernel
def backward_blocks(one, params, counter, slot):  # type: ignore[no-untyped-def]
    """The gradients, block by block. A task is a block of channels for a band of images."""
    call = unpack(params, BackwardCall)
    p, cut, a = call.p, call.cut, call.a
    base = a.slots + slot * cut.slot_bytes
    tile = tile_at(base, one)
    lines = pointer(base + cut.tile_bytes, one)
    buffer = at(lines, 16 * ROW)
    packed = at(buffer, 256)
    panels = at(packed, cut.rows // ROWS * cut.packed_pitch)
    columns = at(panels, cut.panels * cut.rows * cut.panel)
    bounds, per_group = pointer(a.bounds, np.int64(0)), p.in_channels // p.groups
    while True:
        task = next_task(counter)
        if task >= cut.blocks * cut.image_bands:
            return
        number, image_band = task % cut.blocks, task // cut.blocks
        first, count = load_scalar(bounds, number), load_scalar(bounds, number + 1) - load_scalar(bounds, number)
        output, outputs = (first, count) if cut.depthwise else (first // per_group * cut.outputs, cut.outputs)
        weights, sums = (
            at(pointer(a.weights, one), number * cut.weights_size),
            at(pointer(a.sums, one), task * cut.sums_size),
        )
        if a.sums:
            fill(sums, 0, cut.sums_size, one - one)
        for n in range(image_band * cut.band_images, min((image_band + 1) * cut.band_images, p.batch)):
            for tile_number in range(cut.tiles):
                runs, pixels = place_tile(tile, cut, tile_number, p.out_size, p.stride, p.before)
                pack_gradient(one, a.grad_y, n, output, outputs, cut, tile, runs, pixels, lines, packed, panels, buffer)
                for tap in range(p.taps):
                    if a.weights:
                        w = at(weights, tap * (cut.weights_size // p.taps))
                        columns_gradient(one, cut, w, packed, panels, pixels, count, columns)
                    sample_block(one, p, cut, a, n, number, first, count, tap, tile, runs, pixels, columns)
                    if a.sums:
                        total = at(sums, tap * (cut.sums_size // p.taps))
                        weights_gradient(one, cut, panels, pixels, count, columns, total)


@helper
def sum_of_parts(first, parts, pitch, kind):  # type: ignore[no-untyped-def]
    """The sum of `parts` vectors of a kind, `pitch` apart."""
    total = load_like(first, 0, kind)
    for part in range(1, parts):
        total = total + load_like(first, part * pitch, kind)
    return total


@kernel
def sum_parts(one, params, counter, slot):  # type: ignore[no-untyped-def]
    """target (n, channel, h, w) = the sum of its parts. A task is a plane."""
    a = unpack(params, SumCall)
    p, channels, partial, target = a.p, a.channels, a.partial, a.target
    source, blocks, step = pointer(partial.address, one), pointer(a.firsts, np.int64(0)), width(one)
    while True:
        task = next_task(counter)
        if task >= p.batch * channels * p.offset_groups:
            return
        n, channel = task // (channels * p.offset_groups), task % (channels * p.offset_groups)
        parts = load_scalar(blocks, channel // channels * 2 + 1) - load_scalar(blocks, channel // channels * 2)
        plane = at(source, n * partial.strides[1] + channel * partial.strides[2])
        out = at(pointer(target.address, one), n * target.strides[0] + channel * target.strides[1])
        for y in range(p.out_size[0]):
            row, x = at(out, y * target.strides[2]), 0
            while target.strides[3] == 1 and x + step <= p.out_size[1]:
                store(row, x, sum_of_parts(at(plane, y * p.out_size[1] + x), parts, partial.strides[0], full(one)))
                x += step
            for i in range(x, p.out_size[1]):
                total = sum_of_parts(at(plane, y * p.out_size[1] + i), parts, partial.strides[0], one)
                store(row, i * target.strides[3], total)


@kernel
def finish_weights(one, params, counter, slot):  # type: ignore[no-untyped-def]
    """grad_w = the sums of the image bands. A task is a block of channels."""
    call = unpack(params, BackwardCall)
    p, cut, a = call.p, call.cut, call.a
    buffer = pointer(a.slots + slot * cut.slot_bytes, one)
    bounds, per_group, step = pointer(a.bounds, np.int64(0)), p.in_channels // p.groups, width(one)
    strides = a.grad_w.strides
    while True:
        number = next_task(counter)
        if number >= cut.blocks:
            return
        first, count = load_scalar(bounds, number), load_scalar(bounds, number + 1) - load_scalar(bounds, number)
        group = first if cut.depthwise else first // per_group
        outputs = 1 if cut.depthwise else cut.outputs
        grad_w = at(pointer(a.grad_w.address, one), group * outputs * strides[0] + first % per_group * strides[1])
        for o in range(0, outputs, step):
            for c in range(count):
                for tap in range(p.taps):
                    row = (tap * cut.block + c) * cut.sums_pitch + o
                    if cut.depthwise:
                        row = tap * cut.block + c
                    spot = tap // p.kernel[1] * strides[2] + tap % p.kernel[1] * strides[3]
                    spot += c * (strides[0] if cut.depthwise else strides[1])
                    total = full(one - one)
                    for image_band in range(cut.image_bands):
                        partial = at(pointer(a.sums, one), (image_band * cut.blocks + number) * cut.sums_size)
                        total = load(partial, row) if image_band == 0 else total + load(partial, row)
                    store(buffer, 0, total)
                    for i in range(min(step, outputs - o)):
                        store(grad_w, (o + i) * strides[0] + spot, load_scalar(buffer, i))


def backward(p: Problem, grad_y: np.ndarray, arrays: dict[str, Any], grads: dict[str, np.ndarray]) -> None:
    """Fill the gradients in `grads`, each by the name of its argument. All arrays are addressable and checked."""
    if "bias" in grads:
        np.sum(grad_y, axis=(0, 2, 3), out=grads["bias"])
    if not grads.keys() - {"bias"}:
        return
    if p.batch == 0:
        for grad in grads.values():
            grad[...] = 0
        return
    x, w = arrays["x"], arrays["w"]
    dtype = x.dtype
    one, (cut, bounds, firsts) = dtype.type(1), backward_cut(p, dtype)
    tasks, size = cut.blocks * cut.image_bands, dtype.itemsize
    taps_work = float(p.batch) * p.out_size[0] * p.out_size[1] * p.taps * cut.outputs
    threads = plan_threads(max(tasks, 2), 3 * taps_work * (1 if cut.depthwise else p.in_channels))
    images_size = p.batch * cut.image_size
    through = bool(grads.keys() & {"x", "offsets", "mask"})  # whether the gradient of the columns is needed
    plane = p.batch * p.offset_groups * p.taps * p.out_size[0] * p.out_size[1] if cut.parts > 1 else 0
    sizes = (
        images_size,
        images_size if "x" in grads else 0,
        cut.blocks * cut.weights_size + 64 if through else 0,
        tasks * cut.sums_size + 64 if "w" in grads else 0,
        2 * cut.parts * plane if "offsets" in grads else 0,
        cut.parts * plane if "mask" in grads else 0,
    )
    with Scratch(*(n * size for n in sizes), threads * cut.slot_bytes) as memory:
        images, grad_images, weights, sums, offset_parts, mask_parts, slots = memory
        a = BackwardArrays(
            place(grad_y), place(arrays["offsets"]), place(arrays["mask"]), place(grads.get("x")),
            _parts(grads.get("offsets"), offset_parts, plane), _parts(grads.get("mask"), mask_parts, plane),
            place(grads.get("w")), images, grad_images if "x" in grads else 0, weights if through else 0,
            sums if "w" in grads else 0, bounds.ctypes.data, firsts.ctypes.data, slots,
        )  # fmt: skip
        blocks = p.batch * -(-p.in_size[0] * p.in_size[1] // BLOCK)
        image_call = ImagesCall(
            p.batch, p.in_size, cut.image_size, place(x), images, a.bounds, cut.blocks, slots, cut.slot_bytes
        )
        launch(pack_images, one, image_call, min(threads, blocks))
        if a.grad_images:
            launch(clear, one, ClearCall(grad_images, images_size), threads)
        if through:
            plain = w.array if isinstance(w, PreparedWeights) else w
            how = packing(plain.shape, p.groups, dtype)
            packing_call = PackBlocks(
                how, p.kernel[1], *place(plain), weights, a.bounds, cut.blocks, cut.block, cut.depthwise
            )
            launch(pack_blocks, one, packing_call, min(threads, cut.blocks))
        call = BackwardCall(p, cut, a)
        launch(backward_blocks, one, call, min(threads, tasks))
        if a.grad_images:
            launch(unpack_images, one, image_call._replace(plain=a.grad_x, images=grad_images), min(threads, blocks))
        if a.sums:
            launch(finish_weights, one, call, min(threads, cut.blocks))
        for name, partial, channels in (("offsets", a.grad_offsets, 2 * p.taps), ("mask", a.grad_mask, p.taps)):
            if plane and name in grads:
                launch(sum_parts, one, SumCall(p, a.firsts, channels, partial, place(grads[name])), threads)


def _parts(grad: np.ndarray | None, address: int, plane: int) -> Parts:
    """Where the parts of a gradient of offsets or mask lie: in the gradient itself, if there is one part."""
    if grad is None:
        return Parts(0, (0, 0, 0, 0, 0))
    if not plane:
        whole = place(grad)
        return Parts(whole.address, (0, *whole.strides))
    _, channels, height, width_ = grad.shape
    image = channels * height * width_
    return Parts(address, (grad.shape[0] * image, image, height * width_, width_, 1))
