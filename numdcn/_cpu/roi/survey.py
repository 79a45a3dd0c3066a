"""What boxes reach, for tasks that own bands of rows: `survey_boxes` notes the rows of each box, the work there, and the
lists of its bins once for all tasks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from numdcn._cpu.bands import span_at, write_span
from numdcn._cpu.jit import kernel
from numdcn._cpu.parameters import unpack
from numdcn._cpu.roi.bins import Bin, Grid, bin_of, list_axis, lists_at, shift_of
from numdcn._cpu.simd import at, load_scalar, next_task, pointer, store
from numdcn._formulas.jit import helper

MOVED_ENTRIES = 24  # of the two lists of a bin that an offset moves, on average: room for them
BOXES = 4  # surveyed per task
HEAD = 3  # numbers of a list: its first entry, its length, its active samples
PACKING = 16  # cost of a bin's gradient, for each bin and band, in additions to a pixel


class Surveys(NamedTuple):
    """Where the notes are. For each box, in memory: its span; `HEAD` numbers for each of its lists, along y and then along
    x, of which the first is -1 if there was no room; the entries of the lists, their pixels in one array, their weights
    in another."""

    spans: int  # addresses
    heads: int
    index: int
    weight: int
    lists: int  # per box
    entries: int  # room for them, per box


def room_for_lists(size: tuple[int, int], bins: tuple[int, int], shifted: bool) -> tuple[int, int]:
    """The number of lists of a box, and how many entries to have room for. Without shifts that is enough unless
    positions of a million pixels are rounded."""
    if shifted:
        return 2 * bins[0] * bins[1], MOVED_ENTRIES * bins[0] * bins[1]
    return sum(bins), sum(size) + 2 * sum(bins)


class SurveyCall(NamedTuple):
    """Parameters of `survey_boxes`."""

    grid: Grid
    surveys: Surveys
    workspaces: int  # address of the threads' workspaces
    workspace_bytes: int  # per thread


class Noted(NamedTuple):
    """The lists of one box, as pointers."""

    heads: Any
    index: Any
    weight: Any


@helper
def noted_at(one, surveys, r):
    """The `Noted` lists of box r."""
    start = r * surveys.entries
    heads = at(pointer(surveys.heads, np.int64(0)), r * surveys.lists * HEAD)
    return Noted(heads, at(pointer(surveys.index, np.int64(0)), start), at(pointer(surveys.weight, one), start))


@helper
def noted_bin(noted, number):
    """List `number` of a box, as a `Bin` without slopes."""
    start = load_scalar(noted.heads, number * HEAD)
    length, active = load_scalar(noted.heads, number * HEAD + 1), load_scalar(noted.heads, number * HEAD + 2)
    weight = at(noted.weight, start)
    return Bin(at(noted.index, start), weight, weight, length, active)


@helper
def is_listed(noted):
    """Whether the lists of a box were noted."""
    return load_scalar(noted.heads, 0) >= 0


@helper
def numbers_of(grid, b):
    """The numbers of the lists along y and along x of bin number b: bins in a row or a column share a list, unless
    offsets move each."""
    if grid.shifts.address != 0:
        return b, grid.bins[0] * grid.bins[1] + b
    return b // grid.bins[1], grid.bins[0] + b % grid.bins[1]


@helper
def _note_list(one, grid, r, axis, b, lists, noted, number, count, entries):
    """Note the list of bin number b along an axis; returns the entries noted so far, more than `entries` if there is no
    room."""
    i, j = b // grid.bins[1], b % grid.bins[1]
    list_axis(one, grid, r, axis, j if axis else i, shift_of(one, grid, r, axis, 0, i, j), lists, 0)
    made = bin_of(lists, 0, grid.pitch)
    if count + made.length <= entries:
        store(noted.heads, number * HEAD, count)
        store(noted.heads, number * HEAD + 1, made.length)
        store(noted.heads, number * HEAD + 2, made.active)
        for i in range(made.length):
            store(noted.index, count + i, load_scalar(made.index, i))
            store(noted.weight, count + i, load_scalar(made.weight, i))
    return count + made.length


@helper
def _note_lists(one, grid, r, lists, noted, entries):
    """Note the lists of a box; returns whether there was room. If not, they are to be remade when needed."""
    bins, count = grid.bins[0] * grid.bins[1], 0
    shifted = grid.shifts.address != 0
    for b in range(0, bins, 1 if shifted else grid.bins[1]):
        number, _ = numbers_of(grid, b)
        count = _note_list(one, grid, r, 0, b, lists, noted, number, count, entries)
    for b in range(bins if shifted else grid.bins[1]):
        _, number = numbers_of(grid, b)
        count = _note_list(one, grid, r, 1, b, lists, noted, number, count, entries)
    return count <= entries


@helper
def _note_box(one, grid, surveys, r, lists):
    """Note all about box r."""
    bins, noted = grid.bins[0] * grid.bins[1], noted_at(one, surveys, r)
    first, end, cost = 0, grid.size[0], PACKING * bins + grid.size[0] * grid.size[1]
    if _note_lists(one, grid, r, lists, noted, surveys.entries):
        first, end, cost = grid.size[0], 0, PACKING * bins
        for b in range(bins):
            number_y, number_x = numbers_of(grid, b)
            y, x = noted_bin(noted, number_y), noted_bin(noted, number_x)
            if y.length > 0:
                first, end = min(first, load_scalar(y.index, 0)), max(end, load_scalar(y.index, y.length - 1) + 1)
            cost += y.length * x.length
    else:
        store(noted.heads, 0, -1)
    write_span(span_at(surveys.spans, r), load_scalar(pointer(grid.image_index, np.int64(0)), r), first, end, cost)


@kernel
def survey_boxes(one, params, counter, slot):
    """Note all about the boxes. A task is a few of them."""
    a = unpack(params, SurveyCall)
    lists, _ = lists_at(a.workspaces + slot * a.workspace_bytes, a.grid, one)
    while True:
        first = next_task(counter) * BOXES
        if first >= a.grid.rois:
            return
        for r in range(first, min(first + BOXES, a.grid.rois)):
            _note_box(one, a.grid, a.surveys, r, lists)
