"""Weights in the order the matrix products read them: panels for the forward, blocks of channels for the backward."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from numdcn._call.prepared import PreparedWeights
from numdcn._cpu.arrays import place
from numdcn._cpu.gemm import panel_width
from numdcn._cpu.jit import kernel
from numdcn._cpu.lanes import room, transpose
from numdcn._cpu.parameters import unpack
from numdcn._cpu.simd import OVERRUN, at, load, load_scalar, next_task, pointer, store, width
from numdcn._cpu.threads import launch, plan_threads


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


@kernel
def pack_weights(one, params, counter, slot):
    """packed[group, panel, tap * channels + channel, output] from w (outputs, channels, kh, kw). A task is a panel."""
    a = unpack(params, PackWeights)
    how, strides = a.how, a.strides
    rows, step, square = how.taps * how.channels, width(one), room(one)
    while True:
        task = next_task(counter)
        if task >= how.groups * how.panels:
            return
        group, first = task // how.panels, task % how.panels * how.panel
        outputs = min(how.panel, how.outputs - first)
        source = at(pointer(a.w, one), (group * how.outputs + first) * strides[0])
        target = at(pointer(a.packed, one), task * rows * how.panel)
        # whole squares, if each output's weights are contiguous
        contiguous = (strides[3] == 1) & (strides[2] == a.kernel_width) & (strides[1] == how.taps)
        done = outputs // step * step if contiguous else 0
        for o in range(0, done, step):
            for i in range(0, rows // step * step, step):
                transpose(at(source, o * strides[0] + i), strides[0], square, step)
                c, tap = i // how.taps, i % how.taps
                for j in range(step):
                    store(target, (tap * how.channels + c) * how.panel + o, load(square, j * step))
                    tap += 1
                    if tap == how.taps:
                        c, tap = c + 1, 0
        for c in range(how.channels):
            for tap in range(how.taps):
                spot = tap // a.kernel_width * strides[2] + tap % a.kernel_width * strides[3]
                row, column = at(target, (tap * how.channels + c) * how.panel), at(source, c * strides[1] + spot)
                left = done if c * how.taps + tap < rows // step * step else 0
                for o in range(left, outputs):
                    store(row, o, load_scalar(column, o * strides[0]))
                for o in range(outputs, how.panel):
                    store(row, o, one - one)


@kernel
def pack_blocks(one, params, counter, slot):
    """packed[b, tap, output, channel of block b] from w, in rows of `block`, zero past the block. A task is a block.

    A depthwise w gives packed[b, tap, channel].
    """
    a = unpack(params, PackBlocks)
    how, strides = a.how, a.strides
    source, target, limits = pointer(a.w, one), pointer(a.packed, one), pointer(a.bounds, np.int64(0))
    outputs = 1 if a.depthwise else how.outputs
    while True:
        task = next_task(counter)
        if task >= a.blocks:
            return
        first, count = load_scalar(limits, task), load_scalar(limits, task + 1) - load_scalar(limits, task)
        output = first if a.depthwise else first // how.channels * how.outputs
        channel, stride = (0, strides[0]) if a.depthwise else (first % how.channels, strides[1])
        for o in range(outputs):
            for tap in range(how.taps):
                row = at(target, ((task * how.taps + tap) * outputs + o) * a.block)
                spot = tap // a.kernel_width * strides[2] + tap % a.kernel_width * strides[3]
                column = at(source, (output + o) * strides[0] + channel * strides[1] + spot)
                for c in range(a.block):
                    store(row, c, load_scalar(column, c * stride) if c < count else one - one)


def pack(w: np.ndarray, how: Packing, address: int, threads: int) -> None:
    """Pack an addressable array into memory at `address`."""
    values = PackWeights(how, w.shape[3], *place(w), address)
    launch(pack_weights, w.dtype.type(1), values, min(threads, how.groups * how.panels))


def packed_panels(w: PreparedWeights) -> int:
    """The address of prepared weights, packed when first needed."""
    if "panels" not in w.layouts:
        how = packing(w.shape, w.groups, w.dtype)
        storage = np.empty((how.size + OVERRUN) * w.dtype.itemsize + 64, np.uint8)
        address = -(-storage.ctypes.data // 64) * 64
        pack(w.array, how, address, plan_threads(how.groups * how.panels, how.size))
        w.layouts.setdefault("panels", (address, storage))  # another thread may have been first
    address, _ = w.layouts["panels"]
    return int(address)
