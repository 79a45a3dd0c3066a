"""The forward of convolutions in bfloat16 by dot products of pairs: which it suits, and weights packed for it.

A convolution of pairs of neighbouring channels has half as many channels, whose elements are as large as float32
numbers, so tiles, chunks and packed weights are those of a float32 convolution with half the channels.
"""

from __future__ import annotations

import numpy as np

from numdcn._call.arrays import is_half
from numdcn._call.convolution import Convolution
from numdcn._call.prepared import PreparedWeights
from numdcn._cpu.arrays import place
from numdcn._cpu.conv.pack import Packing, PackWeights, is_depthwise, packed_once, packing
from numdcn._cpu.jit import kernel
from numdcn._cpu.pairs import has_dot_products, load_pair, transpose_pairs
from numdcn._cpu.parameters import unpack
from numdcn._cpu.simd import at, next_task, pointer, store, width
from numdcn._cpu.threads import launch

SINGLE = np.dtype(np.float32)


def multiplies_weights(shape: tuple[int, ...], groups: int, dtype: np.dtype) -> bool:
    """Whether weights are multiplied by dot products, as far as they decide it."""
    half = is_half(dtype) and dtype != np.float16
    return half and has_dot_products() and shape[1] % 2 == 0 and not is_depthwise(groups, shape)


def multiplies(p: Convolution, dtype: np.dtype) -> bool:
    """Whether a convolution's forward uses dot products. No pair may belong to two groups."""
    if not multiplies_weights(p.weights_shape, p.groups, dtype):
        return False
    return p.offset_groups == 0 or p.in_channels // p.offset_groups % 2 == 0


def paired(p: Convolution) -> Convolution:
    """The convolution of pairs."""
    return p._replace(in_channels=p.in_channels // 2)


def packing_of_pairs(shape: tuple[int, ...], groups: int) -> Packing:
    """How weights of shape (C_out, C/groups, kh, kw) are packed in pairs."""
    return packing((shape[0], shape[1] // 2, *shape[2:]), groups, SINGLE)


@kernel
def pack_weights_of_pairs(one, params, counter, slot):
    """`pack.pack_weights` of pairs of channels. A task is a panel."""
    a = unpack(params, PackWeights)
    how, strides = a.how, a.strides
    target, step, rows = pointer(a.packed, one), width(one), how.taps * how.channels
    source, end = pointer(a.w, np.int16(0)), how.groups * how.outputs * 2 * how.channels * how.taps
    dense = strides[3] == 1 and strides[2] == a.kernel_width and strides[1] == how.taps
    dense = dense and strides[0] == 2 * how.channels * how.taps
    while True:
        task = next_task(counter)
        if task >= how.groups * how.panels:
            return
        group, first = task // how.panels, task % how.panels * how.panel
        panel = at(target, task * rows * how.panel)
        for o in range(0, how.panel, step):
            outputs = min(how.panel - o, step)
            present = min(how.outputs - first - o, outputs)
            last = group * how.outputs + first + o + step - 1
            for c in range(how.channels):
                start = (group * how.outputs + first + o) * strides[0] + 2 * c * strides[1]
                tap = 0
                while tap < how.taps:
                    place_ = at(panel, (tap * how.channels + c) * how.panel + o)
                    # a square of `step` outputs and taps is read whole
                    reach = last * strides[0] + (2 * c + 1) * strides[1] + tap + step
                    if dense and present == step and reach <= end:
                        taps = min(how.taps - tap, step)
                        transpose_pairs(
                            at(source, start + tap), strides[0], strides[1], place_, how.channels * how.panel, taps
                        )
                        tap += taps
                        continue
                    spot = start + tap // a.kernel_width * strides[2] + tap % a.kernel_width * strides[3]
                    for i in range(outputs):
                        pair = load_pair(source, spot + i * strides[0], strides[1]) if i < present else one - one
                        store(place_, i, pair)
                    tap += 1


def pack_pairs(w: np.ndarray, how: Packing, address: int, threads: int) -> None:
    """Pack an addressable array of bfloat16 into memory at `address`."""
    values = PackWeights(how, w.shape[3], *place(w), address)
    launch(pack_weights_of_pairs, SINGLE.type(1), values, min(threads, how.groups * how.panels))


def packed_pairs(w: PreparedWeights) -> int:
    """The address of prepared weights in pairs, packed when first needed."""
    return packed_once(w, "pairs", packing_of_pairs(w.shape, w.groups), SINGLE, pack_pairs)
