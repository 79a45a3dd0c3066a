"""What follows from the gradients of the columns of a slab: those of x, of offsets and of the mask."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from numdcn._cuda.conv.backward import put_sums
from numdcn._cuda.conv.columns_kernel import TYPES
from numdcn._cuda.conv.slabs import IDLE, SPOTS, Slab, column_at, pair_planner, patch_of, tasks_of
from numdcn._cuda.coordinates import coordinate_viewer
from numdcn._cuda.jit import F32, THREADS, cuda, device, kernels, scalar_type
from numdcn._cuda.lanes import add_lanes, split
from numdcn._cuda.memory import load_vector, unpack, view
from numdcn._cuda.mma import per_word
from numdcn._cuda.sample import corner_adder, outside
from numdcn._cuda.words import word_mover
from numdcn._formulas import bilinear

I32 = np.int32
U = 4  # channels of a thread at a time: 16 bytes of gradients


def word_adder(T: Any) -> Any:
    """Make `add_word(raw, i, fractions, corners, grads, sums)`."""
    S, EACH, WORDS = scalar_type(T), per_word(T), U // per_word(T)

    @device
    def add_word(raw, i, fractions, corners, grads, sums):
        """The sums, with the channels of the i-th word: times the value, and times the slopes. (No loops:
        they may leave local arrays in memory.)"""
        value, along_y, along_x = sums
        unpack(raw, i, corners, 0, T)
        unpack(raw, WORDS + i, corners, EACH, T)
        unpack(raw, 2 * WORDS + i, corners, 2 * EACH, T)
        unpack(raw, 3 * WORDS + i, corners, 3 * EACH, T)
        w00, w01, w10, w11 = bilinear.corner_weights(fractions[0], fractions[1])
        for j in range(EACH):
            read = (corners[j], corners[EACH + j], corners[2 * EACH + j], corners[3 * EACH + j])
            slope_y, slope_x = bilinear.slopes(fractions, read)
            grad = grads[i * EACH + j]
            value += grad * S(bilinear.value((S(w00), S(w01), S(w10), S(w11)), read))
            along_y += grad * S(slope_y)
            along_x += grad * S(slope_x)
        return value, along_y, along_x

    return add_word


class Targets(NamedTuple):
    """The arrays that the sums of a sample are written to."""

    grad_offsets: Any
    grad_mask: Any


@device
def put_planned(c, targets, stage, pair, og, sums, T):
    """Write the gradients of a planned sample's offsets and mask."""
    p = c.p
    line, tap = split(stage.lines[pair], I32(p.taps))
    i, j = split(line, I32(p.out_size[1]))
    n, scale = stage.image_index[pair], stage.fractions[2, pair]
    pixel = (c.first + i - n * p.out_size[0]) * p.out_size[1] + j
    put_sums(c, targets, n, pixel, og * p.taps + tap, scale, sums, T)


@kernels(Slab, lambda: [(dtype, vectors) for dtype in TYPES for vectors in (False, True)])
def scatter_columns(T, VECTORS):
    """A sample has `lanes` threads, each with every lanes-th vector of its channels. They add to the gradient of x
    atomically (VECTORS: 16 bytes at a time), and sum for offsets and mask in a fixed order."""
    S, EACH, WORDS = scalar_type(T), per_word(T), U // per_word(T)
    RAW, CORNERS = 4 * WORDS, 4 * EACH
    (new_stage, plan_pairs), (load, _) = pair_planner(T), word_mover(WORDS)
    add_corners, add_word, coordinates = corner_adder(T, U, VECTORS, True), word_adder(T), coordinate_viewer(T)

    def run(c):
        images, columns, grad_images = view(c.images, T), view(c.columns, F32), view(c.grad_images, F32)
        targets, stage = Targets(coordinates(c.grad_offsets), view(c.grad_mask, T)), new_stage()
        raw, corners = cuda.local.array(RAW, np.uint32), cuda.local.array(CORNERS, S)
        grads, products = cuda.local.array(U, S), cuda.local.array(U, S)
        p, rank, lanes = c.p, I32(cuda.threadIdx.x), I32(c.lanes)
        row_pixels, last, nowhere = p.in_size[1] + 1, I32(p.in_channels), outside(p.in_size[0], p.in_size[1])
        ins = I32(p.in_channels // p.groups)
        row_step, shared = c.pitch * row_pixels, I32(p.in_channels // p.offset_groups)
        vectors = I32((shared + I32(U - 1)) // I32(U))
        summed, total = c.grad_offsets or c.grad_mask, I32(SPOTS) * I32(c.combos) * lanes
        for task in range(I32(cuda.blockIdx.x), tasks_of(c), I32(cuda.gridDim.x)):
            patch = patch_of(c, task)
            cuda.syncthreads()
            plan_pairs(c, stage, patch, shared, rank)
            cuda.syncthreads()
            for base in range(I32(0), total, I32(THREADS)):  # all threads of a block together, for `add_lanes`
                rest, lane = split(base + rank, lanes)
                spot, combo = split(rest, I32(c.combos))
                pair = combo * I32(SPOTS) + spot
                place = stage.places[pair] if base + rank < total else I32(IDLE)
                sums = (S(0), S(0), S(0))
                if place != IDLE:
                    y, x, scale = stage.fractions[0, pair], stage.fractions[1, pair], stage.fractions[2, pair]
                    fractions = (y, x, S(1) - y, S(1) - x)
                    pixel = stage.image_index[pair] * c.pixels + place
                    for slot in range(lane, vectors, lanes):
                        channel = I32(stage.channels[pair] + slot * I32(U))
                        load_vector(columns, column_at(c, stage.lines[pair], channel, ins), grads, 0)
                        if I32(channel + I32(U)) > last:
                            for i in range(U):
                                grads[i] = grads[i] if I32(channel + I32(i)) < last else S(0)
                        if summed:
                            start = pixel * c.pitch + channel
                            load(images, start, raw, 0)
                            load(images, start + c.pitch, raw, WORDS)
                            load(images, start + row_step, raw, 2 * WORDS)
                            load(images, start + row_step + c.pitch, raw, 3 * WORDS)
                            sums = add_word(raw, 0, fractions, corners, grads, sums)
                            sums = add_word(raw, 1, fractions, corners, grads, sums)
                            if WORDS == 4:
                                sums = add_word(raw, 2, fractions, corners, grads, sums)
                                sums = add_word(raw, 3, fractions, corners, grads, sums)
                        if c.grad_images and place < nowhere:
                            for i in range(U):
                                grads[i] = scale * grads[i]
                            start = pixel * c.grad_pitch + channel
                            add_corners(
                                grad_images, start, c.grad_pitch, row_pixels * c.grad_pitch, y, x, grads, products
                            )
                if summed:
                    sums = add_lanes(sums[0], sums[1], sums[2], lanes)
                    if place != IDLE and lane == 0:
                        og = split(patch.combo + combo, I32(p.offset_groups))[1]
                        put_planned(c, targets, stage, pair, og, sums, T)

    return run
