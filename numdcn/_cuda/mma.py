"""Tensor cores: 16 x 8 products by a warp, from float16, bfloat16 or tf32 operands with float32 sums.

Operands are 32-bit words along the depth of the product: two float16 or bfloat16, or one tf32. A step takes eight
words: lane 4*g + t holds words t and t + 4 of rows g and g + 8 of the left operand and of column g of the right one,
and the sums of rows g and g + 8, columns 2*t and 2*t + 1 (PTX ISA, mma.m16n8k16 and, for tf32, mma.m16n8k8).

Both operands are read from shared memory sixteen rows (columns, for the right one) at a time: `load_matrices` if words
are contiguous along the depth, `load_turned` if elements are contiguous along the rows. Each gives four words: of rows
g and g + 8 at word t, then at word t + 4. A left operand uses them in this order; for a right one the first and third
belong to eight columns, the second and fourth to the next eight. Eight rows are read at once, so 16-byte pieces are
permuted within a row (`piece_at`), or rows are padded, to put them in different banks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir

from numdcn._call.numba_cuda import cgutils, intrinsic, types
from numdcn._cuda.jit import F16, F32, SIMULATED, cuda, device
from numdcn._cuda.memory import FLOAT, I32, asm, at, compiled_as, narrow, place_of, shared_place

STEP = 8  # words per step
SHAPES = {"float16": "m16n8k16.row.col.f32.f16.f16.f32", "uint16": "m16n8k16.row.col.f32.bf16.bf16.f32"}
TF32 = "m16n8k8.row.col.f32.tf32.tf32.f32"


def per_word(dtype: Any) -> int:
    """Numbers per word."""
    return 1 if dtype == F32 else 2


@intrinsic
def _bits(typingctx, number):
    return types.uint32(types.float32), lambda context, builder, sig, args: builder.bitcast(args[0], I32)


@compiled_as(_bits)
def bits(number):
    """A float32 as a word."""
    return np.float32(number).view(np.uint32)


@intrinsic
def _from_bits(typingctx, word):
    if word != types.uint32:
        return word(word), lambda context, builder, sig, args: args[0]
    return types.float32(types.uint32), lambda context, builder, sig, args: builder.bitcast(args[0], FLOAT)


@compiled_as(_from_bits)
def from_bits(word):
    """The float32 in a word. A float is returned as it is."""
    return word.view(np.float32) if isinstance(word, np.uint32) else word


@intrinsic
def _word(typingctx, first, second, kind):
    target = kind.dtype

    def codegen(context, builder, sig, args):
        if target == F32:
            return asm(builder, I32, "cvt.rna.tf32.f32 $0, $1;", "=r,f", [args[0]], False)
        name = "f16x2" if target == F16 else "bf16x2"
        return asm(builder, I32, f"cvt.rn.{name}.f32 $0, $1, $2;", "=r,f,f", [args[1], args[0]], False)

    return types.uint32(types.float32, types.float32, kind), codegen


@compiled_as(_word)
def word(first, second, dtype):
    """Two numbers of a type as a word, rounded to nearest; for tf32 only the first, halves away from zero."""
    if dtype == F32:
        pattern = int(bits(first))
        if np.isfinite(first):
            pattern = (pattern + 0x1000) & 0xFFFFE000
        return np.uint32(pattern & 0xFFFFFFFF)
    low, high = (np.asarray(narrow(v, dtype)).view(np.uint16) for v in (first, second))
    return np.uint32(int(low) | int(high) << 16)


# Operands in shared memory.


def _matrices(turned: str) -> Any:
    @intrinsic
    def matrices(typingctx, buffer, index):
        """Four matrices of 8 x 16 bytes, whose rows start at the words given by the lanes (multiples of four)."""
        result = types.UniTuple(types.uint32, 4)

        def codegen(context, builder, sig, args):
            place = shared_place(builder, place_of(context, builder, sig.args[0], args[0], args[1]))
            text = f"ldmatrix.sync.aligned.m8n8.x4{turned}.shared.b16 {{$0,$1,$2,$3}}, [$4];"
            kind = ir.LiteralStructType([I32] * 4)
            made = asm(builder, kind, text, "=r,=r,=r,=r,r,~{memory}", [place], True)
            return cgutils.pack_array(builder, [builder.extract_value(made, i) for i in range(4)])

        return result(buffer, types.int64), codegen

    return matrices


_plain, _transposed = _matrices(""), _matrices(".trans")


@device
def piece_at(row, piece, PIECES):
    """The word at which a piece of a row of PIECES starts, in rows for `load_matrices`."""
    return (row * PIECES + (piece ^ (row * PIECES // 8 % PIECES))) * 4


@device
def _load_matrices(buffer, start, row, piece, lane, PIECES):
    return _plain(buffer, start + piece_at(row + lane % 16, piece + lane // 16, PIECES))


@compiled_as(_load_matrices)
def load_matrices(buffer, start, row, piece, lane, PIECES):
    """Words of sixteen rows starting at `row`, of `piece` and the next piece; the rows start at word `start`."""
    rows, pieces = (row + lane // 4, row + lane // 4 + 8), (piece, piece + 1)
    return tuple(buffer[start + piece_at(rows[m % 2], pieces[m // 2], PIECES) + lane % 4] for m in range(4))


@device
def _load_turned(buffer, first, pitch, lane, EACH):
    if EACH == 2:
        return _transposed(buffer, first + (lane % 8 + lane // 16 * 8) * pitch + lane // 8 % 2 * 4)
    start = first + lane % 4 * pitch + lane // 4
    lower = start + 4 * pitch
    return at(buffer, start), at(buffer, start + 8), at(buffer, lower), at(buffer, lower + 8)


@compiled_as(_load_turned)
def load_turned(buffer, first, pitch, lane, EACH):
    """Words of sixteen transposed rows: elements of a row are `pitch` words apart, the rows start at word `first`."""
    row, depth = int(lane) // 4, int(lane) % 4 * EACH

    def element(m: int, i: int) -> int:
        place = row + m % 2 * 8
        found = int(buffer[first + (depth + m // 2 * 4 * EACH + i) * pitch + place // EACH])
        return found if EACH == 1 else found >> 16 * (place % 2) & 0xFFFF

    return tuple(np.uint32(sum(element(m, i) << 16 * i for i in range(EACH))) for m in range(4))


@intrinsic
def _store_words(typingctx, buffer, index, w0, w1, w2, w3):
    def codegen(context, builder, sig, args):
        place = place_of(context, builder, sig.args[0], args[0], args[1])
        four = ir.Constant(ir.VectorType(I32, 4), ir.Undefined)
        for i in range(4):
            four = builder.insert_element(four, args[2 + i], ir.Constant(I32, i))
        builder.store(four, builder.bitcast(place, four.type.as_pointer(place.type.addrspace)), align=16)
        return context.get_dummy_value()

    return types.void(buffer, types.int64, *[types.uint32] * 4), codegen


@compiled_as(_store_words)
def store_words(buffer, index, w0, w1, w2, w3):
    """Store four words in shared memory, at a multiple of four."""
    if index % 4:
        raise ValueError(f"four words are stored at {index}, which is no multiple of 4")
    buffer[index], buffer[index + 1], buffer[index + 2], buffer[index + 3] = w0, w1, w2, w3


# Products.


@intrinsic
def _multiply_add(typingctx, left, right, sums, i, j, kind):
    target = kind.dtype

    def codegen(context, builder, sig, args):
        array = cgutils.create_struct_proxy(sums)(context, builder, value=args[2])
        shape = cgutils.unpack_tuple(builder, array.shape)
        row = builder.add(builder.mul(args[3], shape[1]), args[4])
        start = builder.mul(row, shape[2])  # a contiguous array (rows, columns, 4)
        places = [builder.gep(array.data, [builder.add(start, ir.Constant(start.type, k))]) for k in range(4)]
        text = f"mma.sync.aligned.{TF32 if target == F32 else SHAPES[str(target)]} "
        text += "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
        words = [*cgutils.unpack_tuple(builder, args[0]), *cgutils.unpack_tuple(builder, args[1])]
        values = [*words, *(builder.load(place) for place in places)]
        made = asm(
            builder, ir.LiteralStructType([FLOAT] * 4), text, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", values, True
        )  # fmt: skip
        for k, place in enumerate(places):
            builder.store(builder.extract_value(made, k), place)
        return context.get_dummy_value()

    words = types.UniTuple(types.uint32, 4), types.UniTuple(types.uint32, 2)
    return types.void(*words, sums, types.int64, types.int64, kind), codegen


EXCHANGED: dict[Any, Any] = {}  # in the simulator: data exchanged by the lanes of a warp


def _simulated_multiply_add(left, right, sums, i, j, dtype):
    thread = int(cuda.threadIdx.x)
    warp, lane = thread // 32 * 32, thread % 32
    EXCHANGED[thread] = (*left, *right)
    cuda.syncthreads()
    g, t = lane // 4, lane % 4
    for row in range(2):
        a = _numbers([EXCHANGED[warp + 4 * g + k % 4][row + 2 * (k // 4)] for k in range(STEP)], dtype)
        for column in range(2):
            owner = warp + 4 * (2 * t + column)
            b = _numbers([EXCHANGED[owner + k % 4][4 + k // 4] for k in range(STEP)], dtype)
            with np.errstate(all="ignore"):
                sums[i, j, 2 * row + column] += np.float32(np.dot(a, b))
    cuda.syncthreads()


def _numbers(words: list[Any], dtype: Any) -> np.ndarray:
    """The numbers in words, as float64. The last 13 bits of a tf32 are ignored."""
    raw = np.array(words, np.uint32)
    if dtype == F32:
        return (raw & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    if dtype == F16:
        return raw.view(np.float16).astype(np.float64)
    return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)


# multiply_add(left, right, sums, i, j, dtype): sums[i, j, :] += the warp's product of one step, of four words and two
multiply_add = cuda.jit(device=True)(_simulated_multiply_add) if SIMULATED else _multiply_add


class WarpTile(NamedTuple):
    """A block's part of a product: rows x columns, by `down` x `across` warps, from `words` words of depth at a
    time."""

    rows: int
    columns: int
    down: int
    across: int
    words: int

    @property
    def threads(self) -> int:
        """Threads per block."""
        return 32 * self.down * self.across

    @property
    def sixteens(self) -> int:
        """Groups of sixteen rows per warp."""
        return self.rows // (16 * self.down)

    @property
    def eights(self) -> int:
        """Groups of eight columns per warp; even."""
        return self.columns // (8 * self.across)


class Thread(NamedTuple):
    """A thread of a block, and where its warp's part of the product starts."""

    rank: Any  # in the block
    lane: Any  # in the warp
    warp: Any
    row: Any
    column: Any


class WarpProduct(NamedTuple):
    """A thread's part of a product."""

    sums: Any  # (sixteens, eights, 4) float32
    words: Any  # (sixteens, 4) uint32: of the left operand, of one step


def warp_multiplier(T: Any, tile: WarpTile, left_pitch: int = 0, right_pitch: int = 0) -> tuple[Any, ...]:
    """Make `thread_of()`, `new_product()`, `clear(sums)` and `multiply(buffer, left, right, thread, product)`, for
    operands that start at the words `left` and `right`. With pitches, these are transposed: rows of elements, that many
    words apart."""
    MINE_R, MINE_C, ACROSS, WORDS, EACH = tile.sixteens, tile.eights, tile.across, tile.words, per_word(T)
    LEFT_PITCH, RIGHT_PITCH = left_pitch, right_pitch

    @device
    def thread_of():
        thread = np.int32(cuda.threadIdx.x)
        lane, warp = thread % np.int32(32), thread // np.int32(32)
        row = warp // np.int32(ACROSS) * np.int32(16 * MINE_R)
        return Thread(thread, lane, warp, row, warp % np.int32(ACROSS) * np.int32(8 * MINE_C))

    @device
    def new_product():
        return WarpProduct(cuda.local.array((MINE_R, MINE_C, 4), np.float32), cuda.local.array((MINE_R, 4), np.uint32))

    @device
    def clear(sums):
        for i in range(MINE_R):
            for j in range(MINE_C):
                for k in range(4):
                    sums[i, j, k] = np.float32(0)

    @device
    def multiply_step(product, both, j):
        """One step for two groups of eight columns, the j-th and the next."""
        words = product.words
        for i in range(MINE_R):
            four = (words[i, 0], words[i, 1], words[i, 2], words[i, 3])
            multiply_add(four, (both[0], both[2]), product.sums, i, j, T)
            multiply_add(four, (both[1], both[3]), product.sums, i, j + 1, T)

    @device
    def multiply_matrices(buffer, left, right, thread, product):
        """product.sums += left times right, WORDS words deep, for the rows and columns of a warp."""
        words = product.words
        for step in range(0, WORDS, STEP):
            for i in range(MINE_R):
                four = load_matrices(buffer, left, thread.row + 16 * i, step // 4, thread.lane, WORDS // 4)
                words[i, 0], words[i, 1], words[i, 2], words[i, 3] = four
            for j in range(0, MINE_C, 2):
                both = load_matrices(buffer, right, thread.column + 8 * j, step // 4, thread.lane, WORDS // 4)
                multiply_step(product, both, j)

    @device
    def multiply_turned(buffer, left, right, thread, product):
        """The same for transposed operands."""
        words = product.words
        first, second = left + thread.row // EACH, right + thread.column // EACH
        for step in range(0, WORDS * EACH, STEP * EACH):
            for i in range(MINE_R):
                four = load_turned(buffer, first + step * LEFT_PITCH + 16 // EACH * i, LEFT_PITCH, thread.lane, EACH)
                words[i, 0], words[i, 1], words[i, 2], words[i, 3] = four
            for j in range(0, MINE_C, 2):
                both = load_turned(buffer, second + step * RIGHT_PITCH + 8 // EACH * j, RIGHT_PITCH, thread.lane, EACH)
                multiply_step(product, both, j)

    return thread_of, new_product, clear, multiply_turned if LEFT_PITCH else multiply_matrices
