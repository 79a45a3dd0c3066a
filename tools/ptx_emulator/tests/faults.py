"""Kernels with one fault each, and a few without: `python -m tools.ptx_emulator python -m
tools.ptx_emulator.tests.faults`.

Prints JSON: for each kernel what was raised or returned, and what the emulator reported.
"""

import json
import os

import numpy as np

np.row_stack = np.vstack  # noqa: NPY201 - numba-cuda 0.30 asks for it, NumPy 2.5 has none

from llvmlite import ir  # noqa: E402
from numba import cuda  # noqa: E402
from numba.cuda import cgutils, types  # noqa: E402
from numba.cuda.extending import intrinsic  # noqa: E402

FAULTS = {}  # name: a function that launches a kernel and returns what to print


def fault(function):
    FAULTS[function.__name__] = function
    return function


def inline(result, text, constraints, *kinds):
    """A device function made of PTX, with arguments of `kinds` and a result ("void", "u32" or "f32")."""
    numba = {"u32": types.uint32, "u64": types.uint64, "f32": types.float32, "void": types.void}
    llvm = {"u32": ir.IntType(32), "u64": ir.IntType(64), "f32": ir.FloatType(), "void": ir.VoidType()}

    def generate(context, builder, signature, arguments):
        function = ir.FunctionType(llvm[result], [llvm[kind] for kind in kinds])
        made = builder.call(ir.InlineAsm(function, text, constraints, side_effect=True), arguments)
        return context.get_dummy_value() if result == "void" else made

    def typed(context, *arguments):
        return numba[result](*(numba[kind] for kind in kinds)), generate

    names = ", ".join(f"a{i}" for i in range(len(kinds)))  # Numba requires as many names as there are arguments
    space = {"typed": typed}
    exec(f"def named(context{', ' * bool(names)}{names}):\n    return typed(context, {names})", space)
    return intrinsic(space["named"])


def addresses():
    """Two device functions: the shared-memory address of an array, and the address of an item of an array."""

    def pointer(context, builder, signature, arguments):
        return cgutils.create_struct_proxy(signature.args[0])(context, builder, value=arguments[0]).data

    @intrinsic
    def shared_address(context, array):
        def generate(context, builder, signature, arguments):
            data = pointer(context, builder, signature, arguments)
            near = builder.addrspacecast(data, data.type.pointee.as_pointer(3))
            return builder.trunc(builder.ptrtoint(near, ir.IntType(64)), ir.IntType(32))

        return types.uint32(array), generate

    @intrinsic
    def address(context, array, index):
        def generate(context, builder, signature, arguments):
            data = pointer(context, builder, signature, arguments)
            return builder.ptrtoint(builder.gep(data, [arguments[1]]), ir.IntType(64))

        return types.uint64(array, types.int64), generate

    return shared_address, address


def on_device(*shape, kind=np.float32):
    return cuda.to_device(np.ones(shape, kind))


@fault
def out_of_bounds():
    @cuda.jit
    def kernel(a):
        a[64 + cuda.threadIdx.x] = 1

    kernel[1, 32](on_device(64))


@fault
def out_of_a_shared_array():
    @cuda.jit
    def kernel(a):
        s, r, t = cuda.shared.array(33, np.float32), cuda.shared.array(32, np.float32), cuda.threadIdx.x
        s[t + a.size // 32 - 2], r[t] = 1, a[t]
        cuda.syncthreads()
        a[t] = s[31 - t] + r[31 - t]

    kernel[1, 32](on_device(128))


@fault
def misaligned():
    load = inline("f32", "{ .reg .f32 x, y, z; ld.global.v4.f32 {$0, x, y, z}, [$1]; }", "=f,l", "u64")
    _, address = addresses()

    @cuda.jit
    def kernel(a):
        a[0] = load(address(a, 2))

    kernel[1, 1](on_device(64))


@fault
def freed():
    load = inline("f32", "ld.global.f32 $0, [$1];", "=f,l", "u64")

    @cuda.jit
    def kernel(where, a):
        a[0] = load(np.uint64(where[0]))

    gone = on_device(64)
    where = cuda.to_device(np.array([gone.__cuda_array_interface__["data"][0]]))
    del gone
    cuda.current_context().memory_manager.deallocations.clear()
    kernel[1, 1](where, on_device(1))


@fault
def missing_barrier():
    @cuda.jit
    def kernel(a):
        s, t = cuda.shared.array(64, np.float32), cuda.threadIdx.x
        s[t] = a[t]
        a[t] = s[63 - t]

    kernel[1, 64](on_device(64))


@fault
def same_place_from_two_blocks():
    @cuda.jit
    def kernel(a):
        a[0] = cuda.blockIdx.x

    kernel[2, 32](on_device(64))


@fault
def barrier_of_some():
    @cuda.jit
    def kernel(a):
        if cuda.threadIdx.x < 16:
            cuda.syncthreads()
            a[0] = 1
        else:
            cuda.syncwarp()
            a[1] = 2

    kernel[1, 32](on_device(64))


@fault
def too_many_threads():
    @cuda.jit(launch_bounds=64)
    def kernel(a):
        a[0] = 1

    kernel[1, 128](on_device(64))


@fault
def unknown_instruction():
    other = inline("u32", "bfind.u32 $0, 5;", "=r")

    @cuda.jit
    def kernel(a):
        a[0] = other()

    kernel[1, 32](on_device(64))


@fault
def copy_that_is_not_waited_for():
    copy = inline(
        "void", "cp.async.ca.shared.global [$0], [$1], 4; cp.async.commit_group;", "r,l,~{memory}", "u32", "u64"
    )
    shared_address, address = addresses()

    @cuda.jit
    def kernel(a):
        s, t = cuda.shared.array(32, np.float32), cuda.threadIdx.x
        copy(shared_address(s) + np.uint32(4 * t), address(a, np.int64(t)))
        cuda.syncthreads()
        a[t] = s[31 - t]

    a = on_device(32)
    kernel[1, 32](a)
    return f"{np.isnan(a.copy_to_host()).sum()} NaN"


@fault
def additions_of_four():
    """No fault: the numbers are right."""
    add = inline("void", "red.global.add.v4.f32 [$0], {$1, $1, $1, $1};", "l,f,~{memory}", "u64", "f32")
    _, address = addresses()

    @cuda.jit
    def kernel(a):
        add(address(a, 4 * (cuda.threadIdx.x % 2)), np.float32(1))

    a = cuda.to_device(np.zeros(12, np.float32))
    kernel[3, 32](a)
    return str(a.copy_to_host().tolist())


@fault
def shuffles():
    """No fault: the numbers are right."""

    @cuda.jit
    def kernel(a):
        t = cuda.threadIdx.x
        a[0, t] = cuda.shfl_xor_sync(0xFFFFFFFF, t, 5) == t ^ 5
        a[1, t] = cuda.shfl_up_sync(0xFFFFFFFF, t, 3) == (t if t < 3 else t - 3)
        a[2, t] = cuda.shfl_down_sync(0xFFFFFFFF, t, 3) == (t if t > 28 else t + 3)
        a[3, t] = cuda.shfl_sync(0xFFFFFFFF, t, 7) == 7
        a[4, t] = cuda.popc(np.uint32(cuda.ballot_sync(0xFFFFFFFF, t % 3 == 0))) == 11

    a = cuda.to_device(np.zeros((5, 32), np.int64))
    kernel[1, 32](a)
    return str(a.copy_to_host().sum())


@fault
def matrices():
    """No fault: cp.async, ldmatrix and mma give the product of a and b."""

    def part(name, count, i):
        q = ", ".join(f"q{k}" for k in range(count))
        return f"{{ .reg .b32 q<4>; ldmatrix.sync.aligned.m8n8.{name}.shared.b16 {{{q}}}, [$1]; mov.b32 $0, q{i}; }}"

    def product(i):
        zeros = ", ".join(["0f00000000"] * 4)
        mma = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {d0, d1, d2, d3}, {$1, $2, $3, $4}, {$5, $6}"
        return f"{{ .reg .f32 d<4>; {mma}, {{{zeros}}}; mov.f32 $0, d{i}; }}"

    a0, a1, a2, a3 = (inline("u32", part("x4", 4, i), "=r,r", "u32") for i in range(4))
    b0, b1 = (inline("u32", part("x2.trans", 2, i), "=r,r", "u32") for i in range(2))
    d0, d1, d2, d3 = (inline("f32", product(i), "=f,r,r,r,r,r,r", *["u32"] * 6) for i in range(4))
    copying = "cp.async.cg.shared.global [$0], [$1], 16; cp.async.commit_group; cp.async.wait_group 0;"
    copy = inline("void", copying, "r,l,~{memory}", "u32", "u64")
    shared_address, address = addresses()

    @cuda.jit
    def kernel(a, b, c):
        s = cuda.shared.array((16, 16), np.float16, alignment=16)
        u = cuda.shared.array((16, 8), np.float16, alignment=16)
        t = cuda.threadIdx.x
        copy(shared_address(s) + np.uint32(16 * t), address(a, 8 * t))
        if t < 16:
            copy(shared_address(u) + np.uint32(16 * t), address(b, 8 * t))
        cuda.syncthreads()
        p = shared_address(s) + np.uint32(32 * (t % 16) + 16 * (t // 16))
        q = shared_address(u) + np.uint32(16 * (t % 16))
        x0, x1, x2, x3, y0, y1 = a0(p), a1(p), a2(p), a3(p), b0(q), b1(q)
        row, column = t // 4, 2 * (t % 4)
        c[row, column] = d0(x0, x1, x2, x3, y0, y1)
        c[row, column + 1] = d1(x0, x1, x2, x3, y0, y1)
        c[row + 8, column] = d2(x0, x1, x2, x3, y0, y1)
        c[row + 8, column + 1] = d3(x0, x1, x2, x3, y0, y1)

    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(16, 16)).astype(np.float16), rng.normal(size=(16, 8)).astype(np.float16)
    c = on_device(16, 8)
    kernel[1, 32](cuda.to_device(a.ravel()), cuda.to_device(b.ravel()), c)
    return str(bool(np.abs(c.copy_to_host() - a.astype(float) @ b.astype(float)).max() < 1e-5))


def faults():
    """{name: what was raised, returned and reported}"""
    told, read = {}, 0
    for name, function in FAULTS.items():
        try:
            said = f"returned {function()}"
            cuda.synchronize()
        except Exception as error:
            said = f"raised {error}"
        with open(os.environ["PTX_EMULATOR_REPORTS"]) as reports:
            reports.seek(read)
            told[name] = f"{said}\n{reports.read()}"
            read = reports.tell()
    return told


if __name__ == "__main__":
    print(json.dumps(faults()))
