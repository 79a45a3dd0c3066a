"""CPU kernel of the gradients of points and weights: query by query, like the forward."""

from __future__ import annotations

from typing import NamedTuple

from numdcn._cpu.attention.forward import (
    Sizes,
    corners_at,
    pixels_at,
    pixels_masked,
    plan_at,
    plan_of,
    weights_at,
    zero_pixel,
)
from numdcn._cpu.attention.plan import (
    BY_WEIGHT,
    BY_X,
    BY_Y,
    FRACTION_X,
    FRACTION_Y,
    SCALE_X,
    SCALE_Y,
    WEIGHT,
    Notes,
    PointsPlace,
    Table,
    begin_tile,
    note_query,
    write_pairs,
)
from numdcn._cpu.jit import block, kernel
from numdcn._cpu.lanes import sum3
from numdcn._cpu.parameters import Place, unpack
from numdcn._cpu.simd import at, first_lanes, full, load, load_masked, load_scalar, next_task, pointer, store, width
from numdcn._formulas.bilinear import slopes
from numdcn._formulas.bilinear import value as sample
from numdcn._formulas.jit import helper
from numdcn._formulas.vectors import fma, like


class PointsCall(NamedTuple):
    """Parameters of `point_gradients`."""

    sizes: Sizes
    notes: Notes
    table: Table
    value: Place
    points: PointsPlace
    weights: Place
    grad_y: Place  # (B, Q, M, D)
    grad_points: PointsPlace  # address 0: not wanted, like the next
    grad_weights: Place
    workspaces: int  # address of the threads' workspaces


@helper
def _clear_sums(plan, count):
    """Set the sums of all points to 0."""
    zero = full(like(0.0, load_scalar(plan.rows, 0)))
    for i in range(0, count, width(load_scalar(plan.rows, 0))):
        store(plan.rows, BY_Y * plan.pitch + i, zero)
        store(plan.rows, BY_X * plan.pitch + i, zero)
        store(plan.rows, BY_WEIGHT * plan.pitch + i, zero)


@helper
def fractions_at(plan, i, vector):
    """The fractions of point i along y and x and one minus each, in every lane."""
    rows, pitch, one = plan.rows, plan.pitch, like(1.0, vector)
    y = like(load_scalar(rows, FRACTION_Y * pitch + i), vector)
    x = like(load_scalar(rows, FRACTION_X * pitch + i), vector)
    return y, x, one - y, one - x


@helper
def _add_sums(plan, i, by_y, by_x, by_weight):
    """Add the lanes of three vectors to the sums of point i."""
    sum_y, sum_x, sum_weight = sum3(by_y, by_x, by_weight)
    rows, pitch = plan.rows, plan.pitch
    store(rows, BY_Y * pitch + i, load_scalar(rows, BY_Y * pitch + i) + sum_y)
    store(rows, BY_X * pitch + i, load_scalar(rows, BY_X * pitch + i) + sum_x)
    store(rows, BY_WEIGHT * pitch + i, load_scalar(rows, BY_WEIGHT * pitch + i) + sum_weight)


@block
def _products_two(value, gradient, plan, first, count, c):
    """Add the products of two registers of the gradient, from channel c, with samples and slopes of a head's points."""
    step = width(load_scalar(plan.rows, 0))
    low, high = load(gradient, c), load(gradient, c + step)
    for i in range(first, first + count):
        corners, weights, fractions = corners_at(plan, i), weights_at(plan, i, low), fractions_at(plan, i, low)
        pixels, more = pixels_at(value, corners, c), pixels_at(value, corners, c + step)
        along_y, along_x = slopes(fractions, pixels)
        more_y, more_x = slopes(fractions, more)
        by_weight = fma(high, sample(weights, more), low * sample(weights, pixels))
        _add_sums(plan, i, fma(high, more_y, low * along_y), fma(high, more_x, low * along_x), by_weight)


@block
def _products_one(value, gradient, plan, first, count, c):
    """The same for one register."""
    g = load(gradient, c)
    for i in range(first, first + count):
        pixels = pixels_at(value, corners_at(plan, i), c)
        along_y, along_x = slopes(fractions_at(plan, i, g), pixels)
        _add_sums(plan, i, g * along_y, g * along_x, g * sample(weights_at(plan, i, g), pixels))


@block
def _products_rest(value, gradient, plan, first, count, c, rest):
    """The same for the last `rest` channels, fewer than a register."""
    one = like(1.0, load_scalar(plan.rows, 0))
    mask = first_lanes(rest, full(one))
    g = load_masked(gradient, c, mask)
    for i in range(first, first + count):
        pixels = pixels_masked(value, corners_at(plan, i), c, mask)
        along_y, along_x = slopes(fractions_at(plan, i, g), pixels)
        _add_sums(plan, i, g * along_y, g * along_x, g * sample(weights_at(plan, i, g), pixels))


@helper
def _write(a, floats, n, q, plan):
    """Write the gradients of a query's points and weights."""
    s, pitch, one = a.sizes, plan.pitch, load_scalar(plan.rows, 0)
    count, rows = s.heads * s.points, plan.rows
    if a.grad_weights.address:
        strides = a.grad_weights.strides
        target = at(pointer(a.grad_weights.address, one), n * strides[0] + q * strides[1])
        for m in range(s.heads):
            for t in range(s.points):
                sum_ = load_scalar(rows, BY_WEIGHT * pitch + m * s.points + t)
                store(target, m * strides[2] + t * strides[3], sum_)
    if not a.grad_points.address:
        return
    for i in range(0, count, width(one)):
        weight = load(rows, WEIGHT * pitch + i)
        by_y, by_x = load(floats, SCALE_Y * pitch + i) * weight, load(floats, SCALE_X * pitch + i) * weight
        store(rows, BY_Y * pitch + i, by_y * load(rows, BY_Y * pitch + i))
        store(rows, BY_X * pitch + i, by_x * load(rows, BY_X * pitch + i))
    strides = a.grad_points.strides
    target = at(pointer(a.grad_points.address, one), n * strides[0] + q * strides[1])
    if strides[2] == s.points * strides[3]:
        write_pairs(at(rows, BY_X * pitch), at(rows, BY_Y * pitch), count, target, strides[3:])
        return
    for m in range(s.heads):
        spot, i = at(target, m * strides[2]), m * s.points
        write_pairs(at(rows, BY_X * pitch + i), at(rows, BY_Y * pitch + i), s.points, spot, strides[3:])


@kernel
def point_gradients(one, params, counter, slot):
    """The gradients of points and weights; notes the points, if asked to. A task is a tile of the
    queries of an image."""
    a = unpack(params, PointsCall)
    s, step = a.sizes, width(one)
    base = a.workspaces + slot * s.workspace_bytes
    plan, floats = plan_at(base, a.table.pitch, one), pointer(a.table.floats, one)
    zeros = base + s.plan_bytes
    zero_pixel(zeros, s.channels, one)
    while True:
        task = next_task(counter)
        if task >= s.batch * s.tiles:
            return
        n, first = task // s.tiles, task % s.tiles * s.tile
        start = a.value.address + n * a.value.strides[0] * s.one_bytes
        value, nowhere = pointer(start, one), (zeros - start) // s.one_bytes
        if a.notes.rows:
            begin_tile(a.notes, task, s.heads)
        for q in range(first, min(first + s.tile, s.queries)):
            plan_of(one, a, n, q, nowhere, plan)
            if a.notes.rows:
                note_query(a.notes, s, n, task, q, plan)
            _clear_sums(plan, s.heads * s.points)
            for m in range(s.heads):
                spot = n * a.grad_y.strides[0] + q * a.grad_y.strides[1] + m * a.grad_y.strides[2]
                gradient, c, head = at(pointer(a.grad_y.address, one), spot), 0, m * s.points
                while c + 2 * step <= s.channels:
                    _products_two(value, gradient, plan, head, s.points, c)
                    c += 2 * step
                if c + step <= s.channels:
                    _products_one(value, gradient, plan, head, s.points, c)
                    c += step
                if c < s.channels:
                    _products_rest(value, gradient, plan, head, s.points, c, s.channels - c)
            _write(a, floats, n, q, plan)
