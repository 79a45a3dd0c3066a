"""Weights in the order the matrix products read them: panels for the forward, blocks of channels for the backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from numdcn._call.arrays import is_half
from numdcn._call.prepared import PreparedWeights
from numdcn._cpu.arrays import Outline, computed, place
from numdcn._cpu.gemm import panel_width
from numdcn._cpu.jit import kernel
from numdcn._cpu.lanes import transpose_some
from numdcn._cpu.pairs import load_pair, transpose_pairs
from numdcn._cpu.parameters import unpack
from numdcn._cpu.simd import OVERRUN, at, load_scalar, next_task, pointer, store, width
from numdcn._cpu.threads import launch, plan_threads
from numdcn._formulas.jit import helper

TASK_OUTPUTS = 64  # of a block of channels, packed per task


class Packing(NamedTuple):
    """The layout of packed weights: (groups, panels, taps * channels, panel), zero where a panel extends past the
    outputs.

    For a depthwise convolution (one channel and one output per group) it is (1, 1, taps, channels) instead.
    """

    groups: int
    outputs: int  # per group
    channels: int  # per group
    taps: int
    panel: int  # outputs per panel
    panels: int  # per group

    @property
    def size(self) -> int:
        """The number of elements, including padding."""
        return self.groups * self.panels * self.taps * self.channels * self.panel


class PackWeights(NamedTuple):
    """Parameters of `pack_weights`."""

    how: Packing
    kernel_width: int
    w: int  # address of the caller's weights
    strides: tuple[int, int, int, int]  # of the caller's weights, in elements
    packed: int  # address of the packed weights


class PackBlocks(NamedTuple):
    """Parameters of `pack_blocks`."""

    how: Packing
    kernel_width: int
    w: int  # address of the caller's weights
    strides: tuple[int, int, int, int]  # of the caller's weights, in elements
    packed: int  # address of the packed weights
    bounds: int  # address of the first channel of each block, then the end, int64
    blocks: int
    block: int  # elements per row: the maximum number of channels in a block
    depthwise: int  # 1 or 0


def is_depthwise(groups: int, shape: tuple[int, ...]) -> bool:
    """Whether each channel produces one output by itself."""
    return shape[1] == 1 and shape[0] == groups and groups > 1


def packing(shape: tuple[int, ...], groups: int, dtype: np.dtype) -> Packing:
    """How weights of shape (C_out, C/groups, kh, kw) are packed."""
    outputs, channels, taps = shape[0] // groups, shape[1], shape[2] * shape[3]
    if is_depthwise(groups, shape):
        return Packing(1, groups, 1, taps, groups, 1)
    panel = panel_width(outputs, dtype)
    return Packing(groups, outputs, channels, taps, panel, -(-outputs // panel))


@helper
def _number(source, index, distance):
    """Element `index`."""
    return load_scalar(source, index)


@helper
def _square(source, stride, distance, target, target_stride, count):
    """`transpose_some`."""
    transpose_some(source, stride, target, target_stride, count)


@helper
def _pack_panels(number, square, together, of_w, one, params, counter):
    """packed[group, panel, tap * channels + channel, output] from w (outputs, channels, kh, kw). A task is a panel.

    Each number in `packed` stands for `together` neighbouring channels of w, whose elements have the type of `of_w`;
    `number` reads one, `square` transposes as many outputs as a register has lanes and up to as many taps.
    """
    a = unpack(params, PackWeights)
    how, strides = a.how, a.strides
    source, target, step = pointer(a.w, of_w), pointer(a.packed, one), width(one)
    channel = how.taps * together  # elements of w, if it is dense
    end = how.groups * how.outputs * how.channels * channel
    dense = strides[3] == 1 and strides[2] == a.kernel_width and strides[1] == how.taps
    dense = dense and strides[0] == how.channels * channel
    while True:
        task = next_task(counter)
        if task >= how.groups * how.panels:
            return
        first, panel = task % how.panels * how.panel, at(target, task * how.taps * how.channels * how.panel)
        for o in range(0, how.panel, step):
            outputs = min(step, how.panel - o)
            present = min(outputs, how.outputs - first - o)
            rows = at(source, (task // how.panels * how.outputs + first + o) * strides[0])
            room = end - (task // how.panels * how.outputs + first + o + step - 1) * strides[0]  # from the last row on
            for c in range(how.channels):
                row, packed, tap = at(rows, c * together * strides[1]), at(panel, c * how.panel + o), 0
                pitch = how.channels * how.panel
                while tap < how.taps:
                    # a square is read whole
                    if dense and present == step and (c + 1) * channel - how.taps + tap + step <= room:
                        taps = min(step, how.taps - tap)
                        square(at(row, tap), strides[0], strides[1], at(packed, tap * pitch), pitch, taps)
                        tap += taps
                        continue
                    spot = tap // a.kernel_width * strides[2] + tap % a.kernel_width * strides[3]
                    for i in range(outputs):
                        w = number(row, spot + i * strides[0], strides[1]) if i < present else one - one
                        store(packed, tap * pitch + i, w)
                    tap += 1


@kernel
def pack_weights(one, params, counter, slot):
    """Pack w in its type."""
    _pack_panels(_number, _square, 1, one, one, params, counter)


@kernel
def pack_pairs(one, params, counter, slot):
    """Pack w in bfloat16 as pairs of channels."""
    _pack_panels(load_pair, transpose_pairs, 2, np.int16(0), one, params, counter)


@kernel
def pack_blocks(one, params, counter, slot):
    """packed[b, tap, output, channel of block b] from w, in rows of `block`, zero past the block. A task is some outputs of
    a block.

    A depthwise w gives packed[b, tap, channel].
    """
    a = unpack(params, PackBlocks)
    how, strides = a.how, a.strides
    source, target, limits = pointer(a.w, one), pointer(a.packed, one), pointer(a.bounds, np.int64(0))
    outputs, step = 1 if a.depthwise else how.outputs, width(one)
    parts = (outputs + TASK_OUTPUTS - 1) // TASK_OUTPUTS
    dense = strides[3] == 1 and strides[2] == a.kernel_width and strides[1] == how.taps
    dense = dense and strides[0] == how.channels * how.taps
    end = how.groups * how.outputs * how.channels * how.taps  # of w, if it is dense
    while True:
        task = next_task(counter)
        if task >= a.blocks * parts:
            return
        number, part = task // parts, task % parts
        first, count = load_scalar(limits, number), load_scalar(limits, number + 1) - load_scalar(limits, number)
        output = first if a.depthwise else first // how.channels * how.outputs
        channel, stride = (0, strides[0]) if a.depthwise else (first % how.channels, strides[1])
        for o in range(part * TASK_OUTPUTS, min((part + 1) * TASK_OUTPUTS, outputs)):
            start = (output + o) * strides[0] + channel * strides[1]
            for c in range(0, a.block, step):
                packed, tap = at(target, (number * how.taps * outputs + o) * a.block + c), 0
                while tap < how.taps:
                    spot, row = start + c * stride + tap, at(packed, tap * outputs * a.block)
                    # a square is read whole
                    if dense and not a.depthwise and c + step <= count and spot + (step - 1) * (stride + 1) < end:
                        taps = min(step, how.taps - tap)
                        transpose_some(at(source, spot), stride, row, outputs * a.block, taps)
                        tap += taps
                        continue
                    spot = start + tap // a.kernel_width * strides[2] + tap % a.kernel_width * strides[3]
                    for i in range(c, min(c + step, a.block)):
                        store(row, i - c, load_scalar(source, spot + i * stride) if i < count else one - one)
                    tap += 1


def pack(
    launch: Callable[[Any, Any, Any, int], None], w: np.ndarray | Outline, how: Packing, address: int, threads: int
) -> None:
    """Pack an addressable array into memory at `address`, by `launch`: one in bfloat16 as pairs, which begins at a multiple
    of 4 bytes."""
    pairs, one = is_half(w.dtype), computed(w.dtype).type(1)
    values = PackWeights(how, w.shape[3], *place(w), address)
    if how.taps == 1 and values.strides[:2] == (w.shape[1], 1):
        # the channels of an output are as near to each other as taps are elsewhere, and pairs are in order
        values = values._replace(
            how=how._replace(channels=1, taps=how.channels),
            kernel_width=how.channels,
            strides=(how.channels, how.channels, how.channels, 1),
        )
        pairs = False
    launch(pack_pairs if pairs else pack_weights, one, values, min(threads, how.groups * how.panels))


def packed_panels(w: PreparedWeights) -> int:
    """The address of prepared weights, packed when first needed, those in bfloat16 as pairs."""
    if "panels" not in w.layouts:
        outputs, channels, *kernel_size = w.shape
        channels = channels // 2 if is_half(w.dtype) else channels
        dtype = computed(w.dtype)
        how = packing((outputs, channels, *kernel_size), w.groups, dtype)
        array = w.array.copy() if is_half(w.dtype) and w.array.ctypes.data % 4 else w.array
        storage = np.empty((how.size + OVERRUN) * dtype.itemsize + 64, np.uint8)
        address = -(-storage.ctypes.data // 64) * 64
        pack(launch, array, how, address, plan_threads(how.groups * how.panels, how.size))
        w.layouts.setdefault("panels", (address, storage))  # another thread may have been first
    address, _ = w.layouts["panels"]
    return int(address)
