"""Sums over images and pixels per channel, in blocks and in an order that depends only on the sizes.

A line of pixels has `LANES` running sums, of every `LANES`th pixel, which are added pairwise; a span is the sum of its
lines by the same rule. So within a span no number passes through more than 28 roundings, whatever the memory layout.
"""

from __future__ import annotations

from typing import NamedTuple

from numdcn._cpu.arrays import Outline, place
from numdcn._cpu.jit import block, kernel
from numdcn._cpu.layout import fill
from numdcn._cpu.parameters import Place, unpack
from numdcn._cpu.program import Recording
from numdcn._cpu.simd import at, full, load, load_scalar, next_task, pointer, store, width
from numdcn._cpu.threads import plan_threads
from numdcn._formulas.jit import helper

LANES = 16  # independent of the register width: the same order on all machines
LINE = 256  # pixels
LINES = 64  # lines per span
FEW, MANY = 16, 64  # channels per task; MANY where channels are adjacent in memory
WORKSPACE = max(FEW * (LINE + LINES) + LANES, MANY * (LANES + LINES))  # elements per thread


class SumsCall(NamedTuple):
    """Parameters of `sum_spans`."""

    shape: tuple[int, int, int, int]  # (images, channels, height, width)
    spans: int  # spans per image
    step: int  # channels per task: MANY if they are adjacent in memory
    source: Place
    target: Place  # (channels, images * spans)
    workspaces: int  # address of the threads' workspaces
    workspace_bytes: int  # per thread


@block
def sum_line(zero, line, count, lanes):
    """The sum of `count` adjacent elements; `lanes` has room for the running sums."""
    whole = count // LANES * LANES
    for lane in range(0, LANES, width(zero)):
        total = full(zero)
        for i in range(lane, whole, LANES):
            total = total + load(line, i)
        store(lanes, lane, total)
    for i in range(whole, count):
        store(lanes, i - whole, load_scalar(lanes, i - whole) + load_scalar(line, i))
    half = LANES // 2
    while half:
        for i in range(half):
            store(lanes, i, load_scalar(lanes, i) + load_scalar(lanes, i + half))
        half //= 2
    return load_scalar(lanes, 0)


@helper
def _add(target, source, count):
    """target += source."""
    step, i = width(load_scalar(target, 0)), 0
    while i + step <= count:
        store(target, i, load(target, i) + load(source, i))
        i += step
    for k in range(i, count):
        store(target, k, load_scalar(target, k) + load_scalar(source, k))


@block
def sum_lines(zero, source, strides, first, count, columns, channels, lanes):
    """lanes[c] = the result of `sum_line` for `count` pixels of channel c from `first` on, in reading order: for
    adjacent channels, all at once."""
    fill(lanes, 0, LANES * channels, zero)
    done, row, column = 0, first // columns, first % columns
    while done < count:
        run = min(columns - column, count - done)
        for i in range(run):
            pixel = at(source, row * strides[0] + (column + i) * strides[1])
            _add(at(lanes, (done + i) % LANES * channels), pixel, channels)
        done, row, column = done + run, row + 1, 0
    half = LANES // 2
    while half:
        _add(lanes, at(lanes, half * channels), half * channels)
        half //= 2


@block
def copy_line(source, strides, first, count, columns, line):
    """line = `count` pixels of a plane from `first` on, in reading order."""
    done, row, column = 0, first // columns, first % columns
    while done < count:
        start, run = row * strides[0] + column * strides[1], min(columns - column, count - done)
        for i in range(run):
            store(line, done + i, load_scalar(source, start + i * strides[1]))
        done, row, column = done + run, row + 1, 0


@helper
def _channel_by_channel(one, a, source, first, end, channels, workspace, target):
    """target = the sums of each of `channels` channels over the span of pixels `first` to `end`."""
    strides, columns = a.source.strides, a.shape[3]
    lines, sums, lanes = workspace, at(workspace, LINE), at(workspace, LINE + LINES)
    for c in range(channels):
        plane, number = at(source, c * strides[1]), 0
        for q in range(first, end, LINE):
            line, count = at(plane, q), min(LINE, end - q)
            if strides[3] != 1 or strides[2] != columns:
                copy_line(plane, strides[2:], q, count, columns, lines)
                line = lines
            store(sums, number, sum_line(one - one, line, count, lanes))
            number += 1
        store(target, c * a.target.strides[0], sum_line(one - one, sums, number, lanes))


@helper
def _all_channels(one, a, source, first, end, channels, workspace, target):
    """target = the sums of adjacent channels over the span of pixels `first` to `end`, all at once."""
    sums, lanes, number = workspace, at(workspace, LINES * MANY), 0
    for q in range(first, end, LINE):
        sum_lines(one - one, source, a.source.strides[2:], q, min(LINE, end - q), a.shape[3], channels, lanes)
        for c in range(channels):
            store(sums, number * channels + c, load_scalar(lanes, c))
        number += 1
    sum_lines(one - one, sums, (0, channels), 0, number, number, channels, lanes)
    for c in range(channels):
        store(target, c * a.target.strides[0], load_scalar(lanes, c))


@kernel
def sum_spans(one, params, counter, slot):
    """target = the sums of the spans of the planes. A task is a span of some channels of one image."""
    a = unpack(params, SumsCall)
    images, channels, height, columns = a.shape
    blocks = (channels + a.step - 1) // a.step
    workspace = pointer(a.workspaces + slot * a.workspace_bytes, one)
    while True:
        task = next_task(counter)
        if task >= images * a.spans * blocks:
            return
        channel, span = task % blocks * a.step, task // blocks
        n, first, owned = span // a.spans, span % a.spans * LINES * LINE, min(a.step, channels - channel)
        end = min(first + LINES * LINE, height * columns)
        source = at(pointer(a.source.address, one), n * a.source.strides[0] + channel * a.source.strides[1])
        spot = channel * a.target.strides[0] + span * a.target.strides[1]
        target = at(pointer(a.target.address, one), spot)
        if a.step == MANY:
            _all_channels(one, a, source, first, end, owned, workspace, target)
        else:
            _channel_by_channel(one, a, source, first, end, owned, workspace, target)


READ = 16.0  # cost of reading an element, in multiply-adds of a product


def sum_pixels(recording: Recording, values: Outline, target: Outline) -> None:
    """Record: target (C,) = the sums of a non-empty values (N, C, H, W), first of each span, then of the spans in the same
    way. The bits do not depend on where the elements are."""
    images, channels, height, width = values.shape
    source, dtype, spans = place(values), values.dtype, -(-height * width // (LINES * LINE))
    all_spans, step = images * spans, MANY if source.strides[1] == 1 and channels > 1 else FEW
    size, threads = dtype.itemsize, plan_threads(all_spans * -(-channels // step), READ * values.size)
    memory, workspaces = recording.scratch(channels * all_spans * size, threads * WORKSPACE * size)
    plane = all_spans * size
    sums = Outline(dtype, (1, channels, 1, all_spans), (channels * plane, plane, plane, size), memory)
    target_place = place(target) if all_spans == 1 else Place(memory, (all_spans, 1, 0, 0))
    call = SumsCall((images, channels, height, width), spans, step, source, target_place, workspaces, WORKSPACE * size)
    recording.launch(sum_spans, dtype.type(1), call, threads)
    if all_spans > 1:
        sum_pixels(recording, sums, target)
