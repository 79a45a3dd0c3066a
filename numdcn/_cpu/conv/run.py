"""Convolutions of NumPy arrays, deformable or not: copies, packing, scratch memory and threads around the kernels.
Options have no effect here."""

from __future__ import annotations

from array import array
from typing import Any, NamedTuple

import numpy as np

from numdcn._call.arrays import is_half
from numdcn._call.convolution import ConvArrays, Convolution
from numdcn._call.options import Options
from numdcn._call.prepared import PreparedWeights
from numdcn._cpu.arrays import (
    Outline,
    address_of,
    addressable,
    addressable_arrays,
    computed,
    output,
    outputs,
    place,
)
from numdcn._cpu.conv.backward import (
    BackwardArrays,
    BackwardCall,
    backward_copied,
    backward_sampled,
    finish_weights,
    pack_tiles,
)
from numdcn._cpu.conv.backward_blocking import BackwardBlocking, backward_blocking
from numdcn._cpu.conv.blocking import forward_blocking
from numdcn._cpu.conv.depthwise import depthwise_copied, depthwise_sampled
from numdcn._cpu.conv.forward import (
    ForwardArrays,
    ForwardCall,
    count_tasks,
    forward_copied,
    forward_copied_aside,
    forward_copied_pairs,
    forward_sampled,
    forward_sampled_aside,
    forward_sampled_pairs,
)
from numdcn._cpu.conv.pack import TASK_OUTPUTS, PackBlocks, pack, pack_blocks, packed_panels, packing
from numdcn._cpu.conv.pairs import multiplies_pairs, paired
from numdcn._cpu.conv.partials import Partials, SumCall, sum_partials
from numdcn._cpu.conv.strays import StraysCall, add_strays
from numdcn._cpu.conv.windows import (
    SEGMENT,
    AddingCall,
    PlacingCall,
    add_windows,
    add_windows_bfloat16,
    add_windows_float16,
    place_windows,
    regions_of,
)
from numdcn._cpu.images import ClearCall, PaddedImages, clear, suited
from numdcn._cpu.parameters import channel_bounds
from numdcn._cpu.program import Recording, run_recorded
from numdcn._cpu.simd import OVERRUN
from numdcn._cpu.sums import sum_pixels
from numdcn._cpu.threads import plan_threads

SAMPLING = 16  # cost of making or writing one element, in multiply-adds of the product


_KERNELS = {  # with offsets and without
    "aside": (forward_sampled_aside, forward_copied_aside),
    "chunks": (forward_sampled, forward_copied),
    "depthwise": (depthwise_sampled, depthwise_copied),
    "pairs": (forward_sampled_pairs, forward_copied_pairs),
}


def takes_half_images(p: Convolution) -> bool:
    """Whether x and its gradient may be of a half type."""
    return True


def computes_in_half(p: Convolution, dtype: np.dtype) -> bool:
    """Whether the forward takes weights of a half type too, and fills y."""
    return multiplies_pairs(p, dtype)


def forward(p: Convolution, arrays: ConvArrays, y: np.ndarray, options: Options) -> None:
    """Fill y."""
    x, w, offsets, bias, mask = addressable_arrays(arrays)
    if isinstance(w, PreparedWeights):
        w = packed_panels(w)
    elif is_half(w.dtype) and address_of(w) % 4:
        w = w.copy()  # pairs are read as numbers of 4 bytes
    with output(y) as target:
        run_recorded(_forward, p, x, w, offsets, bias, mask, target)


def _forward(
    recording: Recording,
    p: Convolution,
    x: Outline,
    w: Outline | int,
    offsets: Outline | None,
    bias: Outline | None,
    mask: Outline | None,
    y: Outline,
) -> None:
    """Record what fills y; `w` may be the address of packed weights. If y is in bfloat16, so are x and w, and the others are
    in float32."""
    dtype, pairs = computed(y.dtype), is_half(y.dtype)
    if pairs:
        p = paired(p)
    one, blocking = dtype.type(1), forward_blocking(p, dtype)
    tasks = count_tasks.py_func(p, blocking)
    # work per pixel, in multiply-adds: its product, and the cost of making its columns and writing its outputs
    made = SAMPLING * (p.in_channels * p.taps + p.out_channels)
    threads = plan_threads(tasks, float(p.batch) * p.out_size[0] * p.out_size[1] * (blocking.weights.size + made))
    weights_bytes = 0 if isinstance(w, int) else (blocking.weights.size + OVERRUN) * dtype.itemsize
    images_bytes = (p.batch * blocking.image_size + OVERRUN) * dtype.itemsize
    images, weights, workspaces = recording.scratch(images_bytes, weights_bytes, threads * blocking.workspace_bytes)
    bounds = recording.numbers(channel_bounds(p.in_channels, p.in_channels).memory)
    padded = PaddedImages(
        images, blocking.image_size, bounds, workspaces, blocking.workspace_bytes, threads, recording.launch
    )
    (padded.pack_pairs if pairs else padded.pack)(x)
    if isinstance(w, int):
        weights = w
    else:
        pack(recording.launch, w, blocking.weights, weights, threads)
    a = ForwardArrays(place(offsets), place(mask), place(bias), place(y), images, weights, workspaces)
    way = "pairs" if pairs else "depthwise" if blocking.depthwise else "aside" if blocking.aside else "chunks"
    recording.launch(_KERNELS[way][p.offset_groups == 0], one, ForwardCall(p, blocking, a), threads)


def backward(p: Convolution, grad_y: np.ndarray, arrays: ConvArrays, grads: ConvArrays, options: Options) -> None:
    """Fill the gradients in `grads`."""
    x, w, offsets, _, mask = addressable_arrays(arrays)
    if isinstance(w, PreparedWeights):
        w = w.array
    with outputs(grads) as targets:
        run_recorded(_backward, p, addressable(grad_y), x, w, offsets, mask, *targets)


def _backward(recording: Recording, p: Convolution, grad_y: Outline, *outlines: Any) -> None:
    """Record what fills the gradients: `outlines` are those of x, w, offsets and mask, then those of the gradients."""
    x, w, offsets, mask = outlines[:4]
    grads = ConvArrays(*outlines[4:])
    if grads.bias is not None:
        sum_pixels(recording, grad_y, grads.bias)
    if grads.w is None and not _through_columns(grads):
        return
    dtype = grad_y.dtype
    one, (blocking, bounds, block_ranges) = dtype.type(1), backward_blocking(p, dtype)
    bounds, block_ranges = recording.numbers(bounds.memory), recording.numbers(block_ranges.memory)
    cut, images_at_once = blocking.cut, blocking.images
    tasks = blocking.blocks * regions_of.py_func(cut) * blocking.image_bands * cut.tap_groups
    products = 0 if blocking.depthwise else blocking.outputs
    work = float(p.batch) * p.out_size[0] * p.out_size[1] * p.taps * p.in_channels * (products + SAMPLING)
    threads = plan_threads(max(tasks, 2), work)  # even with one task, threads can share the copies of images
    memory = _memory(recording, p, blocking, grads, dtype, threads)
    images, workspaces, partial_size = memory.images, memory.workspaces, _partial_size(p, blocking)
    a = BackwardArrays(
        place(grad_y), place(offsets), place(mask),
        _partials(grads.offsets, memory.offset_partials, partial_size),
        _partials(grads.mask, memory.mask_partials, partial_size),
        place(grads.w), memory.packed, images, memory.windows, memory.placed, memory.flags, 0, memory.weights,
        memory.sums, bounds.address, block_ranges.address, workspaces,
    )  # fmt: skip
    launch = recording.launch
    PaddedImages(images, blocking.image_size, bounds, workspaces, blocking.workspace_bytes, threads, launch).pack(x)
    if regions_of.py_func(cut) > 1:
        launch(place_windows, one, PlacingCall(p, cut, a.offsets, a.placed), min(threads, p.batch))
    if a.weights:
        how = packing(w.shape, p.groups, dtype)
        packing_call = PackBlocks(
            how, p.kernel[1], *place(w), a.weights, a.bounds, blocking.blocks, blocking.block, blocking.depthwise
        )
        parts = 1 if blocking.depthwise else -(-blocking.outputs // TASK_OUTPUTS)
        launch(pack_blocks, one, packing_call, min(threads, blocking.blocks * parts))
    kernel = backward_sampled if p.offset_groups else backward_copied
    for first in range(0, p.batch, images_at_once):
        found = recording.numbers(array("q", [0])).address  # whether a sample was beyond its window
        call = BackwardCall(p, blocking, first, min(first + images_at_once, p.batch), a._replace(strays=found))
        if a.packed:
            launch(pack_tiles, one, call, min(threads, _packed_tiles(p, blocking)))
        launch(kernel, one, call, min(threads, tasks))
        if grads.x is not None:
            _add_windows(recording, call, grads.x, one, threads)
    if a.sums:
        launch(finish_weights, one, call, min(threads, blocking.blocks * blocking.panels))
    for grad, partials, channels in (
        (grads.offsets, a.grad_offsets, 2 * p.taps),
        (grads.mask, a.grad_mask, p.taps),
    ):
        if partial_size and grad is not None:
            launch(sum_partials, one, SumCall(p, a.block_ranges, channels, partials, place(grad)), threads)


class _Memory(NamedTuple):
    """Symbols of a backward's scratch memory; 0 for what it does not need."""

    images: int
    packed: int
    windows: int
    weights: int
    sums: int
    offset_partials: int
    mask_partials: int
    placed: int
    flags: int
    workspaces: int


def _through_columns(grads: ConvArrays) -> bool:
    """Whether a gradient is wanted that needs the gradient of the columns."""
    return any(g is not None for g in (grads.x, grads.offsets, grads.mask))


def _partial_size(p: Convolution, blocking: BackwardBlocking) -> int:
    """Elements of a partial sum of the mask's gradient, half as many as of the offsets'; 0 if there is only one each."""
    return p.batch * p.offset_groups * p.taps * p.out_size[0] * p.out_size[1] if blocking.partials > 1 else 0


def _packed_tiles(p: Convolution, blocking: BackwardBlocking) -> int:
    """Tiles of grad_y that `pack_tiles` packs at a time."""
    return blocking.images * p.groups * regions_of.py_func(blocking.cut) * blocking.tiling.tiles * blocking.prepacked


def _memory(
    recording: Recording, p: Convolution, blocking: BackwardBlocking, grads: ConvArrays, dtype: np.dtype, threads: int
) -> _Memory:
    """The scratch memory of a backward."""
    regions = regions_of.py_func(blocking.cut)
    images_at_once = blocking.images
    partial_size = _partial_size(p, blocking)
    bands = regions * blocking.image_bands  # each block of channels has its own sums for each
    sizes = (
        p.batch * blocking.image_size,
        _packed_tiles(p, blocking) * blocking.packed_size,
        images_at_once * blocking.cut.size if grads.x is not None else 0,
        blocking.blocks * blocking.weights_size + 64 if _through_columns(grads) else 0,
        blocking.blocks * bands * blocking.sums_size + 64 if grads.w is not None else 0,
        2 * blocking.partials * partial_size if grads.offsets is not None else 0,
        blocking.partials * partial_size if grads.mask is not None else 0,
    )
    words = (  # of `place_windows`, and the flags of strays
        p.batch * (1 + 2 * regions) if regions > 1 else 0,
        images_at_once * blocking.blocks * regions * blocking.tiling.tiles * p.taps if regions > 1 else 0,
    )
    in_bytes = (*(n * dtype.itemsize for n in sizes), *(n * 8 for n in words), threads * blocking.workspace_bytes)
    return _Memory(
        *(symbol if size else 0 for symbol, size in zip(recording.scratch(*in_bytes), in_bytes, strict=True))
    )


def _add_windows(recording: Recording, call: BackwardCall, grad_x: Outline, one: Any, threads: int) -> None:
    """Record what fills grad_x, for the images of a call, with the sum of their windows, and of the strays beyond these if
    there were any."""
    p, blocking, a = call.p, call.blocking, call.a
    count, size = call.end - call.first, blocking.image_size
    strays = a.images + call.first * size * one.nbytes  # in place of the images themselves
    kernel = suited(grad_x.dtype, add_windows, add_windows_float16, add_windows_bfloat16)
    most = min(threads, count * p.in_size[0] * -(-p.in_size[1] // SEGMENT))
    adding = AddingCall(
        p, blocking.cut, call.first, count, blocking.blocks, a.bounds, a.placed, a.windows, 0, size, place(grad_x),
        a.workspaces, blocking.workspace_bytes,
    )  # fmt: skip
    if regions_of.py_func(blocking.cut) == 1:  # nothing is beyond a window of the whole image
        recording.launch(kernel, one, adding, most)
        return
    recording.launch(kernel, one, adding, most, (a.strays, False))
    recording.launch(clear, one, ClearCall(strays, count * size), threads, (a.strays, True))
    recording.launch(add_strays, one, StraysCall(call, strays), min(threads, count * blocking.blocks), (a.strays, True))
    recording.launch(kernel, one, adding._replace(strays=strays), most, (a.strays, True))


def _partials(grad: Outline | None, address: int, partial_size: int) -> Partials:
    """Where the partial sums of a gradient are: in the gradient itself, if there is only one."""
    if grad is None:
        return Partials(0, (0, 0, 0, 0, 0))
    if not partial_size:
        whole = place(grad)
        return Partials(whole.address, (0, *whole.strides))
    _, channels, height, width_ = grad.shape
    image = channels * height * width_
    return Partials(address, (grad.shape[0] * image, image, height * width_, width_, 1))
