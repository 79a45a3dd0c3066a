"""Register tiles of the matrix product that make columns aside, so that the loads of one overlap the multiply-adds of
the other: every few rows of B, one vector of the columns of the next pixels.

The vectors of a pixel have consecutive numbers, then come those of the next pixel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from numdcn._cpu.gemm import ROWS, VECTORS, column_pitch, multiply_add_row, rows_wide, write_sums
from numdcn._cpu.jit import block
from numdcn._cpu.layout import columns_from
from numdcn._cpu.simd import at, load_value, prefetch_value, store_value
from numdcn._cpu.tile import MASK, W00, W01, W10, W11
from numdcn._formulas.jit import helper, lanes
from numdcn._formulas.vectors import I64, fma_value, splat_value


class Aside(NamedTuple):
    """Columns to make aside."""

    image: Any  # as in `sample.sample_tap`
    tile: Any  # the pixels, planned
    columns: Any  # pointer to where they go, in `gemm`'s layout `rows`
    vectors: int  # of each pixel; the last one may overrun


def _number(n: int) -> Any:
    """IR: an integer."""
    return ir.Constant(I64, n)


def _sampled(builder: Any, image: Any, strides: tuple[Any, Any], rows: Any, pixel: Any, vector: Any) -> Any:
    """IR: one vector as `sample.sample_tap` computes it."""
    pixel_stride, row_stride = strides
    sample = None
    for weight, steps in ((W00, []), (W01, [pixel_stride]), (W10, [row_stride]), (W11, [pixel_stride, row_stride])):
        corner = image
        for step in steps:
            corner = builder.gep(corner, [step])
        x = load_value(builder, corner, _number(0), vector)
        w = builder.load(builder.gep(rows, [builder.add(pixel, _number(weight))]))
        spread = splat_value(builder, w, vector.count)
        sample = builder.fmul(spread, x) if sample is None else fma_value(builder, spread, x, sample)
    mask = builder.load(builder.gep(rows, [builder.add(pixel, _number(MASK))]))
    return builder.fmul(splat_value(builder, mask, vector.count), sample)


def _phis(builder: Any, block: Any, values: list[Any]) -> list[Any]:
    """IR: phis with values from one block."""
    phis = [builder.phi(v.type) for v in values]
    for phi, value in zip(phis, values, strict=True):
        phi.add_incoming(value, block)
    return phis


def _close(builder: Any, phis: list[Any], values: list[Any]) -> None:
    """IR: the values of phis from the current block."""
    for phi, value in zip(phis, values, strict=True):
        phi.add_incoming(value, builder.block)


def _tile(sampled: bool) -> Any:
    """A register tile, `rows_wide` of `gemm`, that makes vectors of columns aside: `numbers` are that of the first one
    and their count, at least 1 and at most `k_end`."""

    @intrinsic
    def tile(typingctx, a, b, prefetched, prefetch_step, c, k_end, overwrite, aside, numbers):
        element = a.dtype
        pitch = column_pitch(element.bitwidth // 8)

        def codegen(context, builder, sig, args):
            a, b, prefetched, prefetch_step, c, k_end, overwrite = args[:7]
            c, c_pitch = cgutils.unpack_tuple(builder, c)
            image, pixels, columns, vectors = cgutils.unpack_tuple(builder, args[7])
            image, pixel_stride, row_stride = cgutils.unpack_tuple(builder, image)
            _, index, _, rows, _, _ = cgutils.unpack_tuple(builder, pixels)
            start, count = cgutils.unpack_tuple(builder, args[8])
            vector = ir.VectorType(context.get_value_type(element), lanes(element))
            pixel = builder.sdiv(start, vectors)
            turn = builder.sub(start, builder.mul(pixel, vectors))
            steps = builder.sdiv(k_end, count)
            entry = builder.block
            busy, multiply, multiplied, done = (
                builder.append_basic_block(n) for n in ("aside", "multiply", "multiplied", "done")
            )
            builder.branch(busy)

            builder.position_at_end(busy)
            job = _phis(builder, entry, [_number(0), pixel, turn])
            state = _phis(builder, entry, [a, b, prefetched, *([ir.Constant(vector, None)] * (ROWS * VECTORS))])
            i, pixel_i, turn_i = job
            channel = builder.mul(turn_i, _number(vector.count))
            source = builder.gep(image, [builder.add(builder.load(builder.gep(index, [pixel_i])), channel)])
            later = builder.load(builder.gep(index, [builder.add(pixel_i, _number(2))]))
            later = builder.gep(image, [builder.add(later, channel)])
            for corner in [later, builder.gep(later, [row_stride])]:
                prefetch_value(builder, corner)
                if sampled:
                    prefetch_value(builder, builder.gep(corner, [pixel_stride]))
            if sampled:
                made = _sampled(builder, source, (pixel_stride, row_stride), rows, pixel_i, vector)
            else:
                made = load_value(builder, source, _number(0), vector)
            store_value(builder, made, columns, builder.add(builder.mul(pixel_i, _number(pitch)), channel))
            i_next, turn_next = builder.add(i, _number(1)), builder.add(turn_i, _number(1))
            wrap = builder.icmp_signed("==", turn_next, vectors)
            turn_next = builder.select(wrap, _number(0), turn_next)
            pixel_next = builder.add(pixel_i, builder.zext(wrap, I64))
            last = builder.icmp_signed("==", i_next, count)
            until = builder.select(last, builder.sub(k_end, builder.mul(i, steps)), steps)
            builder.branch(multiply)

            builder.position_at_end(multiply)
            k, *inner = _phis(builder, busy, [_number(0), *state])
            a_k, b_k, prefetched_k, *sums = inner
            prefetch_value(builder, prefetched_k)
            sums = multiply_add_row(builder, ROWS, vector, VECTORS, pitch, fma_value, a_k, b_k, sums)
            k_next = builder.add(k, _number(1))
            after = [builder.gep(a_k, [_number(1)]), builder.gep(b_k, [_number(VECTORS * vector.count)])]
            after += [builder.gep(prefetched_k, [prefetch_step]), *sums]
            _close(builder, [k, *inner], [k_next, *after])
            builder.cbranch(builder.icmp_signed("<", k_next, until), multiply, multiplied)

            builder.position_at_end(multiplied)
            _close(builder, [*job, *state], [i_next, pixel_next, turn_next, *after])
            builder.cbranch(last, done, busy)

            builder.position_at_end(done)
            write_sums(builder, sums, VECTORS, c, c_pitch, context.cast(builder, overwrite, sig.args[6], types.boolean))
            return context.get_dummy_value()

        i = types.intp
        return types.void(a, b, a, i, c, i, types.boolean, aside, types.UniTuple(i, 2)), codegen

    return tile


_sampling, _copying = _tile(True), _tile(False)


@helper
def _multiply(tile, a, k, b, ahead, ahead_step, c, overwrite, aside):
    """Multiply by a register tile; returns how many vectors it made aside."""
    total, made = aside.tile.pixels * aside.vectors, 0
    for j in range(b.count):
        b_j, c_j = at(b.pointer, j * b.step), columns_from(c, j * b.width)
        count = min(total * (j + 1) // b.count - made, k)
        if count == 0:
            rows_wide(a, 0, b_j, b.width, at(b_j, ahead), ahead_step, c_j.pointer, c.pitch, k, overwrite)
            continue
        tile(a, b_j, at(b_j, ahead), ahead_step, c_j, k, overwrite, aside, (made, count))
        made += count
    return made


@block
def multiply_sampling(a, k, b, ahead, ahead_step, c, overwrite, aside):
    """`gemm.multiply_rows` for up to `ROWS` rows at pointer a and panels of the largest width. Meanwhile makes columns
    as `sample.sample_tap` does; returns how many vectors."""
    return _multiply(_sampling, a, k, b, ahead, ahead_step, c, overwrite, aside)


@block
def multiply_copying(a, k, b, ahead, ahead_step, c, overwrite, aside):
    """`multiply_sampling`, but makes columns as `sample.copy_tap` does."""
    return _multiply(_copying, a, k, b, ahead, ahead_step, c, overwrite, aside)
