"""CPU kernel of the forward: y, query by query, all heads of one before the next.

Value is read where it lies. A head's sum stays in registers over all its points.
"""

from __future__ import annotations

from typing import NamedTuple

from numdcn._cpu.attention.plan import (
    C00,
    C01,
    C10,
    C11,
    CORNER_ROWS,
    W00,
    W01,
    W10,
    W11,
    WEIGHT,
    Plan,
    PointsPlace,
    Table,
    plan_query,
    read_query,
)
from numdcn._cpu.jit import block, kernel
from numdcn._cpu.parameters import Place, unpack
from numdcn._cpu.simd import (
    at,
    first_lanes,
    full,
    load,
    load_masked,
    load_scalar,
    next_task,
    pointer,
    store,
    store_masked,
    width,
)
from numdcn._formulas.bilinear import value as sample
from numdcn._formulas.jit import helper
from numdcn._formulas.vectors import fma, like


class Sizes(NamedTuple):
    """The sizes of a call, and how its queries are divided."""

    batch: int
    queries: int
    heads: int
    channels: int  # of a head
    points: int  # of a query and head
    columns: int  # queries in a row of the grid of points
    stride: tuple[int, int]
    twice_origin: tuple[int, int]  # twice the grid's origin, which may be half a pixel
    tile: int  # queries per task
    tiles: int  # per image
    one_bytes: int  # of an element
    plan_bytes: int  # of a workspace: the plan, then a pixel of zeros
    workspace_bytes: int  # per thread


class ForwardCall(NamedTuple):
    """Parameters of `forward_queries`."""

    sizes: Sizes
    table: Table
    value: Place
    points: PointsPlace
    weights: Place
    y: Place  # (B, Q, M, D)
    workspaces: int  # address of the threads' workspaces


@helper
def plan_at(address, pitch, one):
    """The `Plan` in memory at `address`."""
    corners = pointer(address, 0)
    return Plan(pointer(address + CORNER_ROWS * pitch * 8, one), corners, pitch)


@helper
def base_of(s, q, one):
    """The base position of the points of query q, along y and x."""
    half = like(0.5, one)
    row, column = q // s.columns, q % s.columns
    return (
        like(2 * row * s.stride[0] + s.twice_origin[0], one) * half,
        like(2 * column * s.stride[1] + s.twice_origin[1], one) * half,
    )


@helper
def plan_of(one, a, n, q, nowhere, plan):
    """Read and plan query q of image n."""
    s, table, strides = a.sizes, a.table, a.points.strides
    points = at(pointer(a.points.address, one), n * strides[0] + q * strides[1])
    weights = at(pointer(a.weights.address, one), n * a.weights.strides[0] + q * a.weights.strides[1])
    read_query(points, strides[2:], weights, a.weights.strides[2:], s.heads, s.points, plan)
    floats, numbers = pointer(table.floats, one), pointer(table.numbers, 0)
    plan_query(floats, numbers, table, base_of(s, q, one), s.heads * s.points, nowhere, plan)


@helper
def zero_pixel(address, channels, one):
    """A pixel of zeros at `address`; vectors may overrun."""
    zeros = pointer(address, one)
    for i in range(0, channels, width(one)):
        store(zeros, i, full(one - one))
    return zeros


@helper
def weights_at(plan, i, vector):
    """The corner weights of point i, in every lane."""
    rows, pitch = plan.rows, plan.pitch
    return (
        like(load_scalar(rows, W00 * pitch + i), vector),
        like(load_scalar(rows, W01 * pitch + i), vector),
        like(load_scalar(rows, W10 * pitch + i), vector),
        like(load_scalar(rows, W11 * pitch + i), vector),
    )


@helper
def corners_at(plan, i):
    """The elements where the corners of point i begin."""
    rows, pitch = plan.corners, plan.pitch
    return (
        load_scalar(rows, C00 * pitch + i),
        load_scalar(rows, C01 * pitch + i),
        load_scalar(rows, C10 * pitch + i),
        load_scalar(rows, C11 * pitch + i),
    )


@helper
def pixels_at(value, corners, c):
    """A full register of each corner, from channel c."""
    return (
        load(value, corners[0] + c),
        load(value, corners[1] + c),
        load(value, corners[2] + c),
        load(value, corners[3] + c),
    )


@helper
def pixels_masked(value, corners, c, mask):
    """The lanes of a mask of each corner, from channel c; 0 elsewhere."""
    return (
        load_masked(value, corners[0] + c, mask),
        load_masked(value, corners[1] + c, mask),
        load_masked(value, corners[2] + c, mask),
        load_masked(value, corners[3] + c, mask),
    )


@block
def _sum_two(value, plan, first, count, c, target):
    """Two registers of a head's sum, from channel c."""
    one = like(1.0, load_scalar(plan.rows, 0))
    step = width(one)
    low, high = full(one - one), full(one - one)
    for i in range(first, first + count):
        corners, weights = corners_at(plan, i), weights_at(plan, i, low)
        weight = like(load_scalar(plan.rows, WEIGHT * plan.pitch + i), low)
        low = fma(weight, sample(weights, pixels_at(value, corners, c)), low)
        high = fma(weight, sample(weights, pixels_at(value, corners, c + step)), high)
    store(target, c, low)
    store(target, c + step, high)


@block
def _sum_one(value, plan, first, count, c, target):
    """One register of a head's sum, from channel c."""
    total = full(like(0.0, load_scalar(plan.rows, 0)))
    for i in range(first, first + count):
        weights = weights_at(plan, i, total)
        weight = like(load_scalar(plan.rows, WEIGHT * plan.pitch + i), total)
        total = fma(weight, sample(weights, pixels_at(value, corners_at(plan, i), c)), total)
    store(target, c, total)


@block
def _sum_rest(value, plan, first, count, c, rest, target):
    """The last `rest` channels of a head's sum, fewer than a register, from channel c."""
    total = full(like(0.0, load_scalar(plan.rows, 0)))
    mask = first_lanes(rest, total)
    for i in range(first, first + count):
        weights = weights_at(plan, i, total)
        weight = like(load_scalar(plan.rows, WEIGHT * plan.pitch + i), total)
        total = fma(weight, sample(weights, pixels_masked(value, corners_at(plan, i), c, mask)), total)
    store_masked(target, c, total, mask)


@kernel
def forward_queries(one, params, counter, slot):
    """y. A task is a tile of the queries of an image."""
    a = unpack(params, ForwardCall)
    s, step = a.sizes, width(one)
    base = a.workspaces + slot * s.workspace_bytes
    plan = plan_at(base, a.table.pitch, one)
    zeros = base + s.plan_bytes
    zero_pixel(zeros, s.channels, one)
    size = s.one_bytes
    while True:
        task = next_task(counter)
        if task >= s.batch * s.tiles:
            return
        n, first = task // s.tiles, task % s.tiles * s.tile
        start = a.value.address + n * a.value.strides[0] * size
        value, nowhere = pointer(start, one), (zeros - start) // size
        for q in range(first, min(first + s.tile, s.queries)):
            plan_of(one, a, n, q, nowhere, plan)
            for m in range(s.heads):
                spot = n * a.y.strides[0] + q * a.y.strides[1] + m * a.y.strides[2]
                target, c = at(pointer(a.y.address, one), spot), 0
                while c + 2 * step <= s.channels:
                    _sum_two(value, plan, m * s.points, s.points, c, target)
                    c += 2 * step
                if c + step <= s.channels:
                    _sum_one(value, plan, m * s.points, s.points, c, target)
                    c += step
                if c < s.channels:
                    _sum_rest(value, plan, m * s.points, s.points, c, s.channels - c, target)
