"""Several pixels in one register: where a group has fewer channels than a register has lanes, `lanes` lanes of it hold
the channels of one pixel, the next `lanes` those of the next pixel.

`lanes` is a literal that divides the lanes of a full register. All functions take as many pixels as fit.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from numdcn._cpu.lanes import shuffle
from numdcn._cpu.simd import load_value, store_value
from numdcn._formulas import jit
from numdcn._formulas.vectors import I64, Vec, fma_value, llvm_type, splat_value


def _joined(builder: Any, parts: list[Any]) -> Any:
    """IR: vectors of equal length, one after the other."""
    while len(parts) > 1:
        picks = list(range(2 * parts[0].type.count))
        parts = [shuffle(builder, a, b, picks) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _part(builder: Any, vector: Any, i: int, lanes: int) -> Any:
    """IR: the lanes of pixel i."""
    return shuffle(builder, vector, vector, list(range(i * lanes, (i + 1) * lanes)))


def _shape(vector: Any, lanes: Any) -> tuple[int, int, Any]:
    """Pixels in a register like `vector`, lanes of each, and the LLVM type of a pixel's lanes."""
    count = lanes.literal_value
    return vector.count // count, count, llvm_type(Vec(vector.element, count))


@intrinsic
def register_for(typingctx, scalar, lanes):
    """A full register with `scalar` in every lane. Where that has fewer than `lanes` lanes, it is one of `lanes` lanes,
    so that code for several pixels compiles there, too; it never runs."""
    if not isinstance(lanes, types.IntegerLiteral):
        return None
    vec = Vec(scalar, max(jit.lanes(scalar), lanes.literal_value))
    return vec(scalar, lanes), lambda context, builder, sig, args: splat_value(builder, args[0], vec.count)


@intrinsic
def load_at(typingctx, p, index, first, vector, lanes):
    """The elements of p from index[first] on, then those from index[first + 1] on, and so on; a vector like `vector`."""
    if not isinstance(lanes, types.IntegerLiteral):
        return None
    pixels, _, part = _shape(vector, lanes)

    def codegen(context, builder, sig, args):
        spots = [builder.load(builder.gep(args[1], [builder.add(args[2], ir.Constant(I64, i))])) for i in range(pixels)]
        return _joined(builder, [load_value(builder, args[0], spot, part) for spot in spots])

    return vector(p, index, types.intp, vector, lanes), codegen


@intrinsic
def load_rows(typingctx, p, pitch, vector, lanes):
    """The first elements of rows of p, `pitch` elements apart; a vector like `vector`."""
    if not isinstance(lanes, types.IntegerLiteral):
        return None
    pixels, _, part = _shape(vector, lanes)

    def codegen(context, builder, sig, args):
        spots = [builder.mul(args[1], ir.Constant(I64, i)) for i in range(pixels)]
        return _joined(builder, [load_value(builder, args[0], spot, part) for spot in spots])

    return vector(p, types.intp, vector, lanes), codegen


@intrinsic
def store_rows(typingctx, p, pitch, vector, lanes):
    """Write a vector to the first elements of rows of p, `pitch` elements apart."""
    if not isinstance(lanes, types.IntegerLiteral):
        return None
    pixels, count, _ = _shape(vector, lanes)

    def codegen(context, builder, sig, args):
        for i in range(pixels):
            spot = builder.mul(args[1], ir.Constant(I64, i))
            store_value(builder, _part(builder, args[2], i, count), args[0], spot)
        return context.get_dummy_value()

    return types.void(p, types.intp, vector, lanes), codegen


@intrinsic
def spread(typingctx, p, index, vector, lanes):
    """Elements of p from `index` on, one for each pixel, each in all lanes of its pixel."""
    if not isinstance(lanes, types.IntegerLiteral):
        return None
    pixels, count, _ = _shape(vector, lanes)

    def codegen(context, builder, sig, args):
        few = load_value(builder, args[0], args[1], llvm_type(Vec(vector.element, pixels)))
        return shuffle(builder, few, few, [i for i in range(pixels) for _ in range(count)])

    return vector(p, types.intp, vector, lanes), codegen


@intrinsic
def add_at_corners(typingctx, p, strides, spots, weights, pitch, first, gradient, lanes):
    """Add, for each pixel from `first` on, the gradient times its weight at each of the four corners of the cell at element
    spots[pixel] of p. `strides`: elements to the next pixel and to the pixel below; the weights of the corners are
    `pitch` elements apart. Pixels are added one after the other, as their cells may overlap."""
    if not isinstance(lanes, types.IntegerLiteral):
        return None
    pixels, count, part = _shape(gradient, lanes)

    def codegen(context, builder, sig, args):
        p, strides, spots, weights, pitch, first, gradient, _ = args
        right, down = cgutils.unpack_tuple(builder, strides, 2)
        corners = [ir.Constant(I64, 0), right, down, builder.add(right, down)]
        for i in range(pixels):
            pixel, own = builder.add(first, ir.Constant(I64, i)), _part(builder, gradient, i, count)
            spot = builder.load(builder.gep(spots, [pixel]))
            places = [builder.add(spot, corner) for corner in corners]
            before = [load_value(builder, p, place, part) for place in places]
            for k, place in enumerate(places):
                index = builder.add(pixel, builder.mul(pitch, ir.Constant(I64, k)))
                weight = splat_value(builder, builder.load(builder.gep(weights, [index])), count)
                store_value(builder, fma_value(builder, weight, own, before[k]), p, place)
        return context.get_dummy_value()

    return types.void(p, strides, spots, weights, types.intp, types.intp, gradient, lanes), codegen


@intrinsic
def sums_by_pixel(typingctx, a, b, c, lanes):
    """The sums of the lanes of each pixel of a, of b and of c: three vectors with a lane for each pixel."""
    if not isinstance(lanes, types.IntegerLiteral):
        return None
    pixels, count, _ = _shape(a, lanes)
    result = Vec(a.element, pixels)

    def codegen(context, builder, sig, args):
        vectors, spread_ = [*args[:3], ir.Constant(args[0].type, None)], count
        total = vectors[0].type.count
        even, odd = list(range(0, 2 * total, 2)), list(range(1, 2 * total, 2))
        while spread_ > 1:  # add neighbours; as long as there are several vectors, two become one
            if len(vectors) > 1:
                pairs = list(zip(vectors[::2], vectors[1::2], strict=True))
            else:
                pairs = [(vectors[0], vectors[0])]
            vectors = [builder.fadd(shuffle(builder, x, y, even), shuffle(builder, x, y, odd)) for x, y in pairs]
            spread_ //= 2
        per_vector = 4 // len(vectors)
        found = []
        for k in range(3):
            vector, first = vectors[k // per_vector], k % per_vector * pixels
            found.append(shuffle(builder, vector, vector, list(range(first, first + pixels))))
        return context.make_tuple(builder, sig.return_type, found)

    return types.UniTuple(result, 3)(a, b, c, lanes), codegen
