"""Memory as CUDA kernels see it: arrays at addresses, elements of every type, vectors of 16 bytes.

Arrays are flat, contiguous and indexed by element. `widen` and `narrow` convert elements to the compute type and back;
bfloat16 is stored as its 16 bits, since Numba's own type for it needs a C++ compiler.

What Python cannot run is a compiler intrinsic. In the simulator, the function decorated with `compiled_as` runs
instead: there an address is that of a registered array, and every access is checked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir

from numdcn._call.numba_cuda import cgutils, intrinsic, types
from numdcn._call.simulator import SIMULATED_MEMORY, CheckedArray
from numdcn._cuda.jit import F16, F64, SIMULATED, cuda

I16, I32, I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
HALF, FLOAT, DOUBLE = ir.HalfType(), ir.FloatType(), ir.DoubleType()


def compiled_as(intrinsic: Any) -> Callable[[Any], Any]:
    """The decorated function in the simulator, otherwise an intrinsic."""
    return lambda function: function if SIMULATED else intrinsic


def asm(builder: Any, result: Any, text: str, constraints: str, values: Any, effect: bool) -> Any:
    """IR: inline PTX. What the lanes of a warp do together (`.sync`) is convergent: the compiler may not move it to where
    fewer of them come by."""
    kind = ir.FunctionType(result, [v.type for v in values])
    attributes = ("convergent",) if ".sync" in text else ()
    return builder.call(ir.InlineAsm(kind, text, constraints, side_effect=effect), list(values), attrs=attributes)


def place_of(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    """IR: pointer to an element."""
    data = cgutils.create_struct_proxy(kind)(context, builder, value=array).data
    return builder.gep(data, [index])


def shared_place(builder: Any, place: Any) -> Any:
    """IR: the shared-memory address of a pointer."""
    return builder.ptrtoint(builder.addrspacecast(place, place.type.pointee.as_pointer(3)), I32)


# Arrays.


@intrinsic
def _view(typingctx, address, kind):
    result = types.Array(kind.dtype, 1, "C")

    def codegen(context, builder, sig, args):
        made = cgutils.create_struct_proxy(result)(context, builder)
        made.data = builder.inttoptr(args[0], context.get_value_type(kind.dtype).as_pointer())
        size, most = context.get_abi_sizeof(context.get_data_type(kind.dtype)), 2**62
        made.itemsize, made.nitems = ir.Constant(I64, size), ir.Constant(I64, most)
        made.shape = cgutils.pack_array(builder, [ir.Constant(I64, most)])
        made.strides = cgutils.pack_array(builder, [ir.Constant(I64, size)])
        made.meminfo = ir.Constant(made.meminfo.type, None)
        made.parent = ir.Constant(made.parent.type, None)
        return made._getvalue()

    return result(address, kind), codegen


def _simulated(address: int) -> CheckedArray:
    """The registered array that starts at an address, or one that contains it, seen from there."""
    found = SIMULATED_MEMORY.get(address)
    if found is not None:
        return found
    for array in list(SIMULATED_MEMORY.values()):
        place = address - array.elements.ctypes.data
        if 0 <= place < array.elements.nbytes:
            return CheckedArray(array.elements, place // array.elements.itemsize)
    raise ValueError(f"address {address:#x} is in no array of the simulator")


@compiled_as(_view)
def view(address, dtype):
    """The array of elements of a type starting at an address; unusable if that is 0. Accessed with `at` and `put`."""
    return _simulated(int(address)) if address else None


@intrinsic
def _at(typingctx, array, index):
    def codegen(context, builder, sig, args):
        place = place_of(
            context, builder, sig.args[0], args[0], context.cast(builder, args[1], sig.args[1], types.int64)
        )
        return builder.load(place)

    return array.dtype(array, index), codegen


@compiled_as(_at)
def at(array, index):
    """The element at an index, which may be negative."""
    return array[index]


@intrinsic
def _put(typingctx, array, index, value):
    def codegen(context, builder, sig, args):
        place = place_of(
            context, builder, sig.args[0], args[0], context.cast(builder, args[1], sig.args[1], types.int64)
        )
        builder.store(context.cast(builder, args[2], sig.args[2], array.dtype), place)
        return context.get_dummy_value()

    return types.void(array, index, value), codegen


@compiled_as(_put)
def put(array, index, value):
    """Store an element at an index, which may be negative."""
    array[index] = value


# Elements.


@intrinsic
def _widen(typingctx, element):
    result = element if element in (types.float32, F64) else types.float32

    def codegen(context, builder, sig, args):
        if element == types.uint16:
            return builder.bitcast(builder.shl(builder.zext(args[0], I32), ir.Constant(I32, 16)), FLOAT)
        return context.cast(builder, args[0], element, result)

    return result(element), codegen


@compiled_as(_widen)
def widen(element):
    """An element in the compute type."""
    if isinstance(element, np.uint16):
        return np.uint32(int(element) << 16).view(np.float32)
    return element if isinstance(element, np.float64) else np.float32(element)


def narrowed(context: Any, builder: Any, value: Any, number: Any, target: Any) -> Any:
    """IR: a value of type `number` as an element of type `target`."""
    if target != types.uint16:
        return context.cast(builder, value, number, target)
    value = context.cast(builder, value, number, types.float32)
    pattern = builder.bitcast(value, I32)
    odd = builder.and_(builder.lshr(pattern, ir.Constant(I32, 16)), ir.Constant(I32, 1))
    rounded = builder.lshr(builder.add(builder.add(pattern, ir.Constant(I32, 0x7FFF)), odd), ir.Constant(I32, 16))
    unknown = builder.fcmp_unordered("uno", value, value)
    return builder.trunc(builder.select(unknown, ir.Constant(I32, 0x7FFF), rounded), I16)


@intrinsic
def _narrow(typingctx, number, kind):
    def codegen(context, builder, sig, args):
        return narrowed(context, builder, args[0], number, kind.dtype)

    return kind.dtype(number, kind), codegen


@compiled_as(_narrow)
def narrow(number, dtype):
    """A number as an element of a type, rounded to nearest even."""
    if dtype == types.uint16:
        pattern = int(np.float32(number).view(np.uint32))
        return np.uint16(0x7FFF if number != number else (pattern + 0x7FFF + ((pattern >> 16) & 1)) >> 16)
    with np.errstate(over="ignore"):
        return np.dtype(str(dtype)).type(number)


# Vectors of 16 bytes, at addresses that are multiples of 16.


def vector_length(dtype: Any) -> int:
    """Elements of a type per 16 bytes."""
    return 128 // dtype.bitwidth


def _vector_loader(count: int) -> Any:
    @intrinsic
    def load(typingctx, array, index, target, first):
        def codegen(context, builder, sig, args):
            source, _, wide, _ = sig.args
            place = builder.ptrtoint(place_of(context, builder, source, args[0], args[1]), I64)
            for i, value in enumerate(_loaded(builder, source.dtype, place, count)):
                position = builder.add(args[3], ir.Constant(args[3].type, i))
                builder.store(value, place_of(context, builder, wide, args[2], position))
            return context.get_dummy_value()

        return types.void(array, types.int64, target, types.int64), codegen

    return load


def _words(builder: Any, place: Any, count: int) -> list[Any]:
    """IR: four or two words of global memory that nothing writes."""
    results, target = ",".join(f"${i}" for i in range(count)), ",".join(["=r"] * count)
    text, constraints = f"ld.global.nc.v{count}.b32 {{{results}}}, [${count}];", f"{target},l"
    packed = asm(builder, ir.LiteralStructType([I32] * count), text, constraints, [place], False)
    return [builder.extract_value(packed, i) for i in range(count)]


def _unpacked(builder: Any, dtype: Any, word: Any) -> list[Any]:
    """IR: the elements of a word, widened."""
    if dtype == types.float32:
        return [builder.bitcast(word, FLOAT)]
    values = []
    for shift in (0, 16):
        half = builder.trunc(builder.lshr(word, ir.Constant(I32, shift)), I16)
        if dtype == F16:
            values.append(builder.fpext(builder.bitcast(half, HALF), FLOAT))
        else:
            values.append(builder.bitcast(builder.shl(builder.zext(half, I32), ir.Constant(I32, 16)), FLOAT))
    return values


def _loaded(builder: Any, dtype: Any, place: Any, count: int) -> list[Any]:
    """IR: the elements of `count` words of global memory that nothing writes, widened; float64: of four."""
    if dtype == F64:
        packed = asm(
            builder, ir.LiteralStructType([DOUBLE] * 2), "ld.global.nc.v2.f64 {$0,$1}, [$2];", "=d,=d,l", [place], False
        )
        return [builder.extract_value(packed, i) for i in range(2)]
    return [value for word in _words(builder, place, count) for value in _unpacked(builder, dtype, word)]


@compiled_as(_vector_loader(4))
def load_vector(array, index, target, first):
    """Read 16 bytes of memory that nothing writes in the meantime, widened into target[first], target[first + 1],
    ..."""
    _check_vector(array, index)
    for i in range(16 // array.elements.itemsize):
        target[first + i] = widen(array[index + i])


@compiled_as(_vector_loader(2))
def load_half_vector(array, index, target, first):
    """The same for 8 bytes, of a type narrower than float64."""
    for i, element in enumerate(_simulated_words(array, index, 8).view(array.elements.dtype)):
        target[first + i] = widen(element)


def _check_vector(array: CheckedArray, index: int, size: int = 16) -> None:
    if (array.elements.ctypes.data + (int(index) + array.origin) * array.elements.itemsize) % size:
        raise ValueError(f"a vector is used at element {index}, which is not at a multiple of {size} bytes")


def _words_loader(count: int) -> Any:
    @intrinsic
    def load(typingctx, array, index, words, first):
        def codegen(context, builder, sig, args):
            place = builder.ptrtoint(place_of(context, builder, sig.args[0], args[0], args[1]), I64)
            for i, word in enumerate(_words(builder, place, count)):
                position = builder.add(args[3], ir.Constant(args[3].type, i))
                builder.store(word, place_of(context, builder, sig.args[2], args[2], position))
            return context.get_dummy_value()

        return types.void(array, types.int64, words, types.int64), codegen

    return load


@compiled_as(_words_loader(4))
def load_words(array, index, words, first):
    """Read 16 bytes of memory that nothing writes in the meantime into words[first], ... words[first + 3],
    unconverted."""
    words[first : first + 4] = _simulated_words(array, index)


@compiled_as(_words_loader(2))
def load_pair(array, index, words, first):
    """The same for 8 bytes, at a multiple of 8."""
    words[first : first + 2] = _simulated_words(array, index, 8)


@intrinsic
def _unpack(typingctx, words, index, target, start, kind):
    def codegen(context, builder, sig, args):
        word = builder.load(place_of(context, builder, sig.args[0], args[0], args[1]))
        for i, value in enumerate(_unpacked(builder, kind.dtype, word)):
            position = builder.add(args[3], ir.Constant(args[3].type, i))
            builder.store(value, place_of(context, builder, sig.args[2], args[2], position))
        return context.get_dummy_value()

    return types.void(words, types.int64, target, types.int64, kind), codegen


@compiled_as(_unpack)
def unpack(words, index, target, start, dtype):
    """target[start], or for half types also target[start + 1], = the elements of a word, widened."""
    stored = np.dtype(np.uint16) if dtype == types.uint16 else np.dtype(str(dtype))
    for i, element in enumerate(np.array(words[index : index + 1]).view(stored)):
        target[start + i] = widen(element)


def _simulated_words(array: CheckedArray, index: int, size: int = 16) -> np.ndarray:
    _check_vector(array, index, size)
    return np.array([array[index + i] for i in range(size // array.elements.itemsize)]).view(np.uint32)


@intrinsic
def _add_vector(typingctx, array, index, values, first):
    def codegen(context, builder, sig, args):
        place = builder.ptrtoint(place_of(context, builder, sig.args[0], args[0], args[1]), I64)
        numbers = []
        for i in range(4):
            position = builder.add(args[3], ir.Constant(args[3].type, i))
            numbers.append(builder.load(place_of(context, builder, sig.args[2], args[2], position)))
        text = "red.global.add.v4.f32 [$0], {$1,$2,$3,$4};"
        asm(builder, ir.VoidType(), text, "l,f,f,f,f,~{memory}", [place, *numbers], True)
        return context.get_dummy_value()

    return types.void(array, types.int64, values, types.int64), codegen


def _simulated_add_vector(array, index, values, first):
    _check_vector(array, index)
    for i in range(4):
        cuda.atomic.add(array, index + i, values[first + i])


# Add values[first], ... values[first + 3] to four float32 in memory, each atomically. Needs compute capability 9.0.
add_vector = cuda.jit(device=True)(_simulated_add_vector) if SIMULATED else _add_vector


# Shared memory, four elements at once, at multiples of four.


@intrinsic
def _load_four(typingctx, tile, index, target, first):
    def codegen(context, builder, sig, args):
        kind, _, wide, _ = sig.args
        element = context.get_data_type(kind.dtype)
        place = place_of(context, builder, kind, args[0], args[1])
        vector = builder.bitcast(place, ir.VectorType(element, 4).as_pointer(place.type.addrspace))
        four = builder.load(vector)
        four.align = 16
        for i in range(4):
            position = builder.add(args[3], ir.Constant(args[3].type, i))
            builder.store(
                builder.extract_element(four, ir.Constant(I32, i)), place_of(context, builder, wide, args[2], position)
            )
        return context.get_dummy_value()

    return types.void(tile, types.int64, target, types.int64), codegen


@compiled_as(_load_four)
def load_four(tile, index, target, first):
    """Read tile[index], ... tile[index + 3] into target[first], ... target[first + 3]."""
    if index % 4:
        raise ValueError(f"four elements are read at {index}, which is no multiple of 4")
    for i in range(4):
        target[first + i] = tile[index + i]


# Asynchronous copies from global memory to words in shared memory (compute capability 8.0).


@intrinsic
def _copy_vector(typingctx, array, index, buffer, place, live):
    def codegen(context, builder, sig, args):
        source = builder.ptrtoint(place_of(context, builder, sig.args[0], args[0], args[1]), I64)
        target = shared_place(builder, place_of(context, builder, sig.args[2], args[2], args[3]))
        size = builder.select(args[4], ir.Constant(I32, 16), ir.Constant(I32, 0))
        text = "cp.async.cg.shared.global [$0], [$1], 16, $2;"
        asm(builder, ir.VoidType(), text, "r,l,r,~{memory}", [target, source, size], True)
        return context.get_dummy_value()

    return types.void(array, types.int64, buffer, types.int64, types.boolean), codegen


@compiled_as(_copy_vector)
def copy_vector(array, index, buffer, place, live):
    """Start copying 16 bytes from an element, or zeros unless `live`, to the four words at a place, a multiple of
    four."""
    if place % 4:
        raise ValueError(f"four words are copied to {place}, which is no multiple of 4")
    words = _simulated_words(array, index) if live else np.zeros(4, np.uint32)
    buffer[place], buffer[place + 1], buffer[place + 2], buffer[place + 3] = words


@intrinsic
def _wait_for_copies(typingctx):
    def codegen(context, builder, sig, args):
        asm(builder, ir.VoidType(), "cp.async.wait_all;", "~{memory}", [], True)
        return context.get_dummy_value()

    return types.void(), codegen


@compiled_as(_wait_for_copies)
def wait_for_copies():
    """Wait until this thread's own copies are done; those of other threads are done after the next barrier."""
