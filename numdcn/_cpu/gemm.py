"""The matrix product, register tile by register tile: C (rows, columns) = or += A (rows, k) B (k, columns).

B comes in panels as wide as a register tile. A comes in one of three layouts with strides known to the compiler, so
that each broadcast is one load at a constant offset from a single pointer:

* rows: element (r, k) at r * column_pitch + k: rows of sampled columns;
* panels as wide as the widest register tile: element (r, k) at r * width + k % width of panel k // width; so it can be the
  B of another product, too;
* block: element (r, k) at k * block_size(itemsize) + r: a block of channels, one row per pixel (tiles of `BLOCK_ROWS` rows).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from numdcn._cpu.jit import block, has_32_registers, register_tile
from numdcn._cpu.pairs import dot_value
from numdcn._cpu.simd import at, load_scalar, load_value, prefetch_value, store_value, width
from numdcn._formulas.jit import helper, lanes
from numdcn._formulas.vectors import I64, fma_value, splat_value

CHUNK_BYTES = 768  # of one row of A: then a chunk of B's panel and of A's rows fit in L1 together
BLOCK_BYTES = 128  # of a pixel's channels that a backward's task owns


class Panels(NamedTuple):
    """B, packed in panels of `width` columns, with a row for each k; the first is at `pointer`."""

    pointer: Any
    width: int  # elements per row of a panel
    count: int
    step: int  # elements from one panel to the next


class Strides(NamedTuple):
    """Elements of A from row to row and from k to k, and how many k a panel has, a power of two; 0: there are no panels."""

    row: int
    k: int
    panel: int


ROWS, VECTORS = register_tile()
BLOCK_ROWS = 8 if has_32_registers() else 4  # for the layout `block`: divides a block of either type


def chunk_size(itemsize: int) -> int:
    """The maximum number of columns of A multiplied at once."""
    return CHUNK_BYTES // itemsize


def column_pitch(itemsize: int) -> int:
    """Elements from one row of A to the next in the layout `rows`: a cache line more than a chunk, to spread over
    cache sets."""
    return (CHUNK_BYTES + 64) // itemsize


def block_size(itemsize: int) -> int:
    """Channels in a block."""
    return BLOCK_BYTES // itemsize


def panel_widths(dtype: Any) -> tuple[int, ...]:
    """The widths, in columns, that a register tile can have, widest first."""
    full = VECTORS * lanes(dtype)
    return (full, lanes(dtype), 4) if lanes(dtype) > 4 else (full, lanes(dtype))


def panel_width(columns: int, dtype: Any) -> int:
    """The narrowest register tile that holds all `columns`, or else the widest."""
    return min((w for w in panel_widths(dtype) if w >= columns), default=panel_widths(dtype)[0])


def multiply_add_row(
    builder: Any,
    rows: int,
    vector: Any,
    vectors: int,
    row_stride: int,
    multiply_add: Any,
    a_k: Any,
    b_k: Any,
    sums: list[Any],
) -> list[Any]:
    """IR: the accumulators after one step over k. `multiply_add` is `fma_value`, or `dot_value` for pairs of bfloat16."""
    b_row = [load_value(builder, b_k, ir.Constant(I64, v * vector.count), vector) for v in range(vectors)]
    new = []
    for r in range(rows):
        scalar = builder.load(builder.gep(a_k, [ir.Constant(I64, r * row_stride)]))
        broadcast = splat_value(builder, scalar, vector.count)
        new += [multiply_add(builder, broadcast, b_row[v], sums[r * vectors + v]) for v in range(vectors)]
    return new


def _product(
    builder: Any, rows: int, vector: Any, vectors: int, strides: Strides, multiply_add: Any, args: Any
) -> list[Any]:
    """IR: the loop over k. Leaves the builder after it; returns the accumulators, row by row."""
    a, a_step, b, b_pitch, prefetched, prefetch_step, k_end = args
    zero = ir.Constant(vector, None)
    entry, loop, done = builder.block, builder.append_basic_block("multiply"), builder.append_basic_block("multiplied")
    builder.branch(loop)
    builder.position_at_end(loop)
    k, a_k, b_k, prefetched_k = builder.phi(I64), builder.phi(a.type), builder.phi(b.type), builder.phi(prefetched.type)
    sums = [builder.phi(vector) for _ in range(rows * vectors)]
    for phi, start in [
        (k, ir.Constant(I64, 0)),
        (a_k, a),
        (b_k, b),
        (prefetched_k, prefetched),
        *((s, zero) for s in sums),
    ]:
        phi.add_incoming(start, entry)
    prefetch_value(builder, prefetched_k)
    new = multiply_add_row(builder, rows, vector, vectors, strides.row, multiply_add, a_k, b_k, sums)
    k_next = builder.add(k, ir.Constant(I64, 1))
    a_next = builder.gep(a_k, [ir.Constant(I64, strides.k)])
    if strides.panel:
        ends = builder.icmp_signed("==", builder.and_(k_next, ir.Constant(I64, strides.panel - 1)), ir.Constant(I64, 0))
        to_next = builder.sub(a_step, ir.Constant(I64, strides.panel))  # from the end of a row in a panel
        a_next = builder.gep(a_next, [builder.select(ends, to_next, ir.Constant(I64, 0))])
    steps = [(k, k_next), (a_k, a_next), (b_k, builder.gep(b_k, [b_pitch]))]
    steps.append((prefetched_k, builder.gep(prefetched_k, [prefetch_step])))
    for phi, following in [*steps, *zip(sums, new, strict=True)]:
        phi.add_incoming(following, loop)
    builder.cbranch(builder.icmp_signed("<", k_next, k_end), loop, done)
    builder.position_at_end(done)
    return new


def write_sums(builder: Any, sums: list[Any], vectors: int, c: Any, c_pitch: Any, overwrite: Any) -> None:
    """IR: C = sums if `overwrite`, else C += sums."""
    spots = []
    for i in range(len(sums)):
        row = builder.mul(c_pitch, ir.Constant(I64, i // vectors))
        spots.append(builder.add(row, ir.Constant(I64, (i % vectors) * sums[i].type.count)))
    with builder.if_else(overwrite) as (then, otherwise):
        with then:
            for i, spot in enumerate(spots):
                store_value(builder, sums[i], c, spot)
        with otherwise:
            for i, spot in enumerate(spots):
                store_value(builder, builder.fadd(load_value(builder, c, spot, sums[i].type), sums[i]), c, spot)


def _layout(layout: str, element: Any) -> tuple[int, Strides]:
    """Rows of the tile, and the strides of A."""
    itemsize = element.bitwidth // 8
    if layout == "rows":
        return ROWS, Strides(column_pitch(itemsize), 1, 0)
    if layout == "panels":
        widest = panel_widths(element)[0]
        return ROWS, Strides(widest, 1, widest)
    return BLOCK_ROWS, Strides(1, block_size(itemsize), 0)


def _tile(layout: str, width_index: int, multiply_add: Any = fma_value) -> Any:
    """A register tile of width `panel_widths(...)[width_index]`, for A in `layout`.

    `multiply_add` is `fma_value`, or `dot_value` where the elements of A and B are pairs of bfloat16; k counts elements.
    `a_step`: elements from one panel of A to the next. `prefetched` is memory needed soon: each step over k prefetches one
    line of it and advances by `prefetch_step` elements.
    """

    @intrinsic
    def tile(typingctx, a, a_step, b, b_pitch, prefetched, prefetch_step, c, c_pitch, k_end, overwrite):
        # parameters: of three matrices, and of what to prefetch
        element = a.dtype
        rows, strides = _layout(layout, element)
        columns = panel_widths(element)[width_index]
        count = min(columns, lanes(element))

        def codegen(context, builder, sig, args):
            a, a_step, b, b_pitch, prefetched, prefetch_step, c, c_pitch, k_end, overwrite = args
            vector = ir.VectorType(context.get_value_type(element), count)
            inner = a, a_step, b, b_pitch, prefetched, prefetch_step, k_end
            sums = _product(builder, rows, vector, columns // count, strides, multiply_add, inner)
            write_sums(
                builder,
                sums,
                columns // count,
                c,
                c_pitch,
                context.cast(builder, overwrite, sig.args[9], types.boolean),
            )
            return context.get_dummy_value()

        integers = types.intp
        arguments = a, integers, b, integers, prefetched, integers, c, integers, integers, types.boolean
        return types.void(*arguments), codegen

    return tile


rows_wide, _rows_single, _rows_narrow = (_tile("rows", i) for i in (0, 1, -1))
_pairs_wide, _pairs_single, _pairs_narrow = (_tile("rows", i, dot_value) for i in (0, 1, -1))
_panels_wide, _panels_single, _panels_narrow = (_tile("panels", i) for i in (0, 1, -1))
_block_wide, _block_single, _block_narrow = (_tile("block", i) for i in (0, 1, -1))


@helper
def _multiply(wide, single, narrow, a, rows, k, b, prefetching, c, overwrite):
    """`multiply_rows` by register tiles of the three widths. `prefetching`: `ahead` and `ahead_step`."""
    ahead, ahead_step = prefetching
    step, panel = width(load_scalar(a.pointer, 0)), b.width
    for r in range(0, rows, ROWS):
        a_r = at(a.pointer, r * a.pitch)
        for j in range(b.count):
            b_j, c_r = at(b.pointer, j * b.step), at(c.pointer, r * c.pitch + j * panel)
            prefetched = at(b_j, ahead + r // ROWS * ahead_step * k)
            if panel == VECTORS * step:
                wide(a_r, 0, b_j, panel, prefetched, ahead_step, c_r, c.pitch, k, overwrite)
            elif panel == step:
                single(a_r, 0, b_j, panel, prefetched, ahead_step, c_r, c.pitch, k, overwrite)
            else:
                narrow(a_r, 0, b_j, panel, prefetched, ahead_step, c_r, c.pitch, k, overwrite)


@block
def multiply_rows(a, rows, k, b, ahead, ahead_step, c, overwrite):
    """C (rows, columns of the panels) = A (rows, k) B if `overwrite`, else +=; A is a matrix in the layout `rows`.

    Rows are rounded up to whole register tiles of `ROWS`: A must be readable, and C writable, that far. What is `ahead`
    elements after each panel is needed soon: each row of the panel prefetches one line of it and advances by
    `ahead_step` elements, on to the next register tile.
    """
    _multiply(rows_wide, _rows_single, _rows_narrow, a, rows, k, b, (ahead, ahead_step), c, overwrite)


@block
def multiply_pairs(a, rows, k, b, ahead, ahead_step, c, overwrite):
    """`multiply_rows` where the elements of A and B are pairs of bfloat16, two rows of B side by side."""
    _multiply(_pairs_wide, _pairs_single, _pairs_narrow, a, rows, k, b, (ahead, ahead_step), c, overwrite)


@block
def multiply_panels(a, a_step, rows, k, b, columns, c):
    """C (rows, columns) = A (rows, k) B (k, columns), for A in the layout `panels`, `a_step` elements from panel to
    panel. C has the pitch of B, a matrix.

    Rows are rounded up as in `multiply_rows`, columns to whole register tiles: B must be readable, and C writable, that
    far.
    """
    step, b_pitch = width(load_scalar(a, 0)), b.pitch
    panel = VECTORS * step if columns > step else (step if columns > 4 else 4)
    prefetch_step = b_pitch * ROWS // max(rows, ROWS)
    for j in range(0, columns, panel):
        b_j, prefetched = at(b.pointer, j), at(b.pointer, k * b_pitch)
        for r in range(0, rows, ROWS):
            a_r, c_r = at(a, r * VECTORS * step), at(c, r * b_pitch + j)
            if panel == VECTORS * step:
                _panels_wide(a_r, a_step, b_j, b_pitch, prefetched, prefetch_step, c_r, b_pitch, k, True)
            elif panel == step:
                _panels_single(a_r, a_step, b_j, b_pitch, prefetched, prefetch_step, c_r, b_pitch, k, True)
            else:
                _panels_narrow(a_r, a_step, b_j, b_pitch, prefetched, prefetch_step, c_r, b_pitch, k, True)
            prefetched = at(prefetched, prefetch_step * k)


@block
def multiply_block(a, rows, k, b, b_pitch, c, c_pitch, c_step):
    """C (rows, columns of the panels) += A (rows, k) B, for A in the layout `block`; rows are rounded up to
    BLOCK_ROWS. Rows of B's panels are `b_pitch` elements apart. C is in panels as wide as B's: `c_pitch` elements from row
    to row, `c_step` from panel to panel."""
    step, panel = width(load_scalar(a, 0)), b.width
    for j in range(b.count):
        b_j = at(b.pointer, j * b.step)
        for r in range(0, rows, BLOCK_ROWS):
            a_r, c_r = at(a, r), at(c, r * c_pitch + j * c_step)
            if panel == VECTORS * step:
                _block_wide(a_r, 0, b_j, b_pitch, c_r, 0, c_r, c_pitch, k, False)
            elif panel == step:
                _block_single(a_r, 0, b_j, b_pitch, c_r, 0, c_r, c_pitch, k, False)
            else:
                _block_narrow(a_r, 0, b_j, b_pitch, c_r, 0, c_r, c_pitch, k, False)
