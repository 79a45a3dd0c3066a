"""Moving a tile's data between the caller's planes and a workspace: reading, writing, and packing for matrix
products."""

from __future__ import annotations

from typing import Any, NamedTuple

from numdcn._cpu.jit import block
from numdcn._cpu.lanes import transpose
from numdcn._cpu.simd import at, full, load, load_like, load_scalar, narrow, pointer, prefetch, store, width
from numdcn._cpu.tile import ROW
from numdcn._formulas.jit import helper

PACKING_ELEMENTS = 16 * ROW  # of workspace for `pack_gradient` or `write_tile`: one register of channels, and a square


class PackedGradient(NamedTuple):
    """grad_y at the pixels of a tile: panels of (rows, pitch), one row per pixel. They are the A of the columns' gradient,
    in `gemm`'s layout `panels`, and the B of the weights' gradient. What follows the last output in a row, and the last
    pixel in a panel, is undefined."""

    pointer: Any
    pitch: int  # elements from pixel to pixel: room for a panel's outputs, in whole registers
    rows: int  # of a panel: the tile's pixels, at least, in whole registers


@helper
def _copy_in(vector, lanes, count, source, target):
    """Copy `count` adjacent elements, at least `lanes`, in vectors like `vector`; the last overlaps the previous one."""
    for i in range(0, count - lanes, lanes):
        store(target, i, load_like(source, i, vector))
    store(target, count - lanes, load_like(source, count - lanes, vector))


@block
def _copy_run(count, source, source_stride, target, target_stride):
    """target[i * target_stride] = source[i * source_stride] for i < count, touching nothing else."""
    one = load_scalar(source, 0)
    if (source_stride != 1) | (target_stride != 1) | (count < 4):
        for i in range(count):
            store(target, i * target_stride, load_scalar(source, i * source_stride))
    elif count >= width(one):
        _copy_in(full(one), width(one), count, source, target)
    elif width(one) > 8 and count >= 8:
        _copy_in(narrow(one, 8), 8, count, source, target)
    elif width(one) > 4:
        _copy_in(narrow(one, 4), 4, count, source, target)


@block
def read_plane(plane, strides, ahead, tile, target):
    """Copy a tile's pixels of an (out_h, out_w) plane into target, in the tile's order.

    The plane that follows `ahead` elements later is read next: its pixels are prefetched.
    """
    for run in range(tile.run_count):
        first, y = load_scalar(tile.runs, 4 * run), load_scalar(tile.runs, 4 * run + 1)
        x, count = load_scalar(tile.runs, 4 * run + 2), load_scalar(tile.runs, 4 * run + 3)
        source = at(plane, y * strides[0] + x * strides[1])
        for i in range(0, count, 16):
            prefetch(source, ahead + i)
        _copy_run(count, source, strides[1], at(target, first), 1)


@block
def write_plane(plane, strides, tile, source):
    """Copy source, in a tile's order, to the tile's pixels of an (out_h, out_w) plane."""
    for run in range(tile.run_count):
        first, y = load_scalar(tile.runs, 4 * run), load_scalar(tile.runs, 4 * run + 1)
        x, count = load_scalar(tile.runs, 4 * run + 2), load_scalar(tile.runs, 4 * run + 3)
        _copy_run(count, at(source, first), 1, at(plane, y * strides[0] + x * strides[1]), strides[1])


@block
def write_tile(one, of_y, y, bias, n, first, count, tile, sums, buffer):
    """y[n, first : first + count] at the pixels of a tile = sums, one row per pixel, + bias if there is one.

    Elements of y have the type of `of_y`. `y` and `bias` are places. The lines for one register of channels start
    `step * step` elements into `buffer`.
    """
    step, strides, biased = width(one), y.strides, bias.address != 0
    line_pitch = (tile.pixels + step - 1) // step * step
    lines = at(buffer, step * step)
    for o in range(0, count, step):
        for p in range(0, tile.pixels, step):
            transpose(at(sums.pointer, p * sums.pitch + o), sums.pitch, at(lines, p), line_pitch)
        channels = min(step, count - o)
        for i in range(channels if biased else 0):
            added = full(load_scalar(pointer(bias.address, one), (first + o + i) * bias.strides[0]))
            for p in range(i * line_pitch, (i + 1) * line_pitch, step):
                store(lines, p, load(lines, p) + added)
        for run in range(tile.run_count):
            start, row = load_scalar(tile.runs, 4 * run), load_scalar(tile.runs, 4 * run + 1)
            x, length = load_scalar(tile.runs, 4 * run + 2), load_scalar(tile.runs, 4 * run + 3)
            target = at(pointer(y.address, of_y), n * strides[0] + (first + o) * strides[1])
            target = at(target, row * strides[2] + x * strides[3])
            for i in range(channels):
                _copy_run(length, at(lines, i * line_pitch + start), 1, at(target, i * strides[1]), strides[3])


@block
def pack_gradient(one, grad_y, n, first, outputs, tile, target, buffer):
    """Fill in `target`, a `PackedGradient`, with grad_y[n, first : first + outputs] at the pixels of a tile.

    `grad_y` is a place; `buffer` has room for `PACKING_ELEMENTS`.
    """
    step, pixels, pitch = width(one), tile.pixels, (tile.pixels + 15) // 16 * 16
    strides = grad_y.strides
    for o in range(0, outputs, step):
        for i in range(min(step, outputs - o)):
            plane = at(pointer(grad_y.address, one), n * strides[0] + (first + o + i) * strides[1])
            read_plane(plane, strides[2:], strides[1], tile, at(buffer, i * pitch))
        spot = at(target.pointer, o // target.pitch * target.rows * target.pitch + o % target.pitch)
        for p in range(0, pixels, step):
            transpose(at(buffer, p), pitch, at(spot, p * target.pitch), target.pitch)
