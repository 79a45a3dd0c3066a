"""Weights packed for tensor cores: rows of channels, padded with zeros, that are copied to shared memory 16 bytes at a time.

A row begins where its first channel stands in a vector of 16 bytes of the images: a few zeros come first where that is in the
middle of one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from numdcn._kernels.jit_cuda import BF16, F16, F32, cuda, kernels
from numdcn._kernels.memory_cuda import at, put, vector_length, view
from numdcn._kernels.tensor_cuda import from_bits, per_word, word

DEPTH = 16  # words of which rows have a multiple


class Pack(NamedTuple):
    """Parameters of `pack_weights`. Parts are numbered through all groups."""

    source: int  # w, (C_out, C/groups, taps)
    target: int  # (parts, taps, rows, depth)
    parts: int
    parts_of_group: int
    taps: int
    rows: int
    depth: int
    width: int  # channels of a row
    group_step: int  # from group to group in w
    part_step: int  # from part to part of a group
    row_step: int
    step: int  # from channel to channel
    first: int  # where the channels of the first part stand: 0, or for each part where those before it end


@kernels(Pack, lambda: [(kind,) for kind in (F32, F16, BF16)])
def pack_weights(T):  # type: ignore[no-untyped-def]
    """Pack weights; float32 are rounded to tf32."""
    V, EACH = vector_length(T), per_word(T)

    def run(c):  # type: ignore[no-untyped-def]
        source, target = view(c.source, T), view(c.target, T)
        for task in range(cuda.grid(1), c.parts * c.taps * c.rows * c.depth, cuda.gridsize(1)):
            rest, place = task // c.depth, task % c.depth
            row, tap, part = rest % c.rows, rest // c.rows % c.taps, rest // (c.rows * c.taps)
            channel = place - part * c.first % V
            weight = T(0)
            if channel >= 0 and channel < c.width:
                start = part // c.parts_of_group * c.group_step + part % c.parts_of_group * c.part_step
                weight = at(source, start + row * c.row_step + channel * c.step + tap)
                if EACH == 1:
                    weight = from_bits(word(weight, np.float32(0), F32))
            put(target, task, weight)

    return run


def depth_of(width: int, kind: object, aligned: bool) -> int:
    """The elements of a packed row."""
    whole = DEPTH * per_word(kind)
    return -(-(width + (0 if aligned else vector_length(kind) - 1)) // whole) * whole
