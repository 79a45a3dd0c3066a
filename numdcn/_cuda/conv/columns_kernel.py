"""Around the product of two steps: the columns of a slab before it, and y after it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from numdcn._cuda.conv.columns import weigh
from numdcn._cuda.conv.slabs import IDLE, SPOTS, Slab, column_at, pair_planner, patch_of, tasks_of
from numdcn._cuda.jit import BF16, F16, F32, THREADS, cuda, device, kernels, scalar_type
from numdcn._cuda.lanes import split
from numdcn._cuda.memory import at, narrow, put, unpack, view, widen
from numdcn._cuda.mma import bits, per_word, word
from numdcn._cuda.words import word_mover

I32 = np.int32
TYPES = (F32, F16, BF16)


def lengths(dtype: Any) -> tuple[int, ...]:
    """The channels that a thread may take at a time: those of 16 bytes, or four."""
    return (8, 4) if per_word(dtype) == 2 else (4,)


@kernels(Slab, lambda: [(dtype, length) for dtype in TYPES for length in lengths(dtype)])
def make_columns(T, U):
    """What each tap of each pixel of a slab reads, U channels at a time; rounded to T, float32 also to tf32 if asked for.
    Channels past the last are zeros."""
    S, EACH, WORDS = scalar_type(T), per_word(T), U // per_word(T)
    RAW, CORNERS = 4 * WORDS, 4 * EACH
    (new_stage, plan_pairs), (load, store) = pair_planner(T), word_mover(WORDS)

    @device
    def weigh_word(c, raw, i, plan, corners, values, packed):
        """packed[i] = the i-th word of columns. (No loops: they may leave local arrays in memory.)"""
        unpack(raw, i, corners, 0, T)
        unpack(raw, WORDS + i, corners, EACH, T)
        unpack(raw, 2 * WORDS + i, corners, 2 * EACH, T)
        unpack(raw, 3 * WORDS + i, corners, 3 * EACH, T)
        weigh(corners, plan[0], plan[1], plan[2], values, S, EACH, True)
        if EACH == 1 and not c.tf32:
            packed[i] = bits(values[0])
        else:
            packed[i] = word(values[0], values[EACH - 1], T)

    @device
    def clear_from(packed, i, rest):
        """Clear what of the i-th word is past the last channel; rest: channels from the first word on."""
        if rest <= I32(i * EACH):
            packed[i] = np.uint32(0)
        elif rest < I32(i * EACH + EACH):
            packed[i] = np.uint32(packed[i] & np.uint32(0xFFFF))

    def run(c):
        images, columns, stage = view(c.images, T), view(c.columns, T), new_stage()
        raw, packed = cuda.local.array(RAW, np.uint32), cuda.local.array(WORDS, np.uint32)
        corners, values = cuda.local.array(CORNERS, S), cuda.local.array(EACH, S)
        p, rank = c.p, I32(cuda.threadIdx.x)
        row_step, last, ins = c.pitch * (p.in_size[1] + 1), I32(p.in_channels), I32(p.in_channels // p.groups)
        shared = I32(p.in_channels // p.offset_groups)
        vectors = I32((shared + I32(U - 1)) // I32(U))
        for task in range(I32(cuda.blockIdx.x), tasks_of(c), I32(cuda.gridDim.x)):
            patch = patch_of(c, task)
            cuda.syncthreads()
            plan_pairs(c, stage, patch, shared, rank)
            cuda.syncthreads()
            for unit in range(rank, I32(SPOTS) * I32(c.combos) * vectors, I32(THREADS)):
                rest, slot = split(unit, vectors)
                spot, combo = split(rest, I32(c.combos))
                pair = combo * I32(SPOTS) + spot
                place = stage.places[pair]
                if place != IDLE:
                    channel = I32(stage.channels[pair] + slot * I32(U))
                    start = (stage.image_index[pair] * c.pixels + place) * c.pitch + channel
                    load(images, start, raw, 0)
                    load(images, start + c.pitch, raw, WORDS)
                    load(images, start + row_step, raw, 2 * WORDS)
                    load(images, start + row_step + c.pitch, raw, 3 * WORDS)
                    plan = stage.fractions[0, pair], stage.fractions[1, pair], stage.fractions[2, pair]
                    weigh_word(c, raw, 0, plan, corners, values, packed)
                    weigh_word(c, raw, 1, plan, corners, values, packed)
                    if WORDS == 4:
                        weigh_word(c, raw, 2, plan, corners, values, packed)
                        weigh_word(c, raw, 3, plan, corners, values, packed)
                    if I32(channel + I32(U)) > last:
                        clear_from(packed, 0, I32(last - channel))
                        clear_from(packed, 1, I32(last - channel))
                        if WORDS == 4:
                            clear_from(packed, 2, I32(last - channel))
                            clear_from(packed, 3, I32(last - channel))
                    store(columns, column_at(c, stage.lines[pair], channel, ins), packed)

    return run


class Finish(NamedTuple):
    """Parameters of `write_outputs`."""

    source: int  # the product, float32 (C_out, pixels of the slab)
    bias: int  # (C_out,), or 0
    y: int  # (N, C_out, pixels)
    outs: int
    slab: int  # pixels
    first: int  # pixel of all images
    count: int  # pixels per image


@kernels(Finish, lambda: [(dtype,) for dtype in TYPES])
def write_outputs(T):
    """y of a slab: the product plus the bias, rounded once. A block takes BLOCK pixels of an output at a time."""
    BLOCK = 4 * THREADS

    def run(c):
        source, bias, y = view(c.source, F32), view(c.bias, T), view(c.y, T)
        parts, rank = (I32(c.slab) + I32(BLOCK - 1)) // I32(BLOCK), I32(cuda.threadIdx.x)
        image = c.first // c.count
        before = I32(c.first - image * c.count)
        for task in range(I32(cuda.blockIdx.x), I32(c.outs) * parts, I32(cuda.gridDim.x)):
            out, part = split(task, parts)
            added = np.float32(0)
            if c.bias:
                added = widen(at(bias, out))
            for place in range(part * I32(BLOCK) + rank, min((part + I32(1)) * I32(BLOCK), I32(c.slab)), I32(THREADS)):
                result = at(source, out * c.slab + place)
                if c.bias:
                    result += added
                n, pixel = split(before + place, I32(c.count))
                put(y, ((image + n) * c.outs + out) * c.count + pixel, narrow(result, T))

    return run
