"""Run in the device server by test_device_memory.py: small kernels that use the functions of `memory`, and the copies
and layouts of `Workspace`. Arrays are passed and returned as NumPy's."""

import contextlib
import ctypes
from typing import NamedTuple

import numpy as np
from numba import cuda

import numdcn
from numdcn._call.frameworks import FRAMEWORKS
from numdcn._cuda import jit, launch
from numdcn._cuda.conv import pack
from numdcn._cuda.jit import BF16, F16, F32, F64
from numdcn._cuda.jit import cuda as real
from numdcn._cuda.memory import at, load_vector, narrow, put, vector_length, view, widen
from numdcn._cuda.workspace import Images, Plans, Workspace, stored

KINDS = {"float32": F32, "float64": F64, "float16": F16, "bfloat16": BF16}


class There:
    """A copy of a NumPy array on a GPU, with its strides and type, which Numba need not support."""

    def __init__(self, array):
        self.array, (self.low, high) = array, np.lib.array_utils.byte_bounds(array)
        self.memory = cuda.to_device(np.frombuffer(ctypes.string_at(self.low, high - self.low), np.uint8))
        self.dtype = array.dtype

    @property
    def __cuda_array_interface__(self):
        start = self.memory.__cuda_array_interface__["data"][0] + self.array.ctypes.data - self.low
        told = {"shape": self.array.shape, "strides": self.array.strides, "typestr": self.dtype.str}
        return {**told, "data": (start, False), "version": 3}

    def copy_to_host(self):
        raw, start = self.memory.copy_to_host(), self.array.ctypes.data - self.low
        return np.ndarray(self.array.shape, self.dtype, raw, start, self.array.strides)


def on_device(array):
    """An array of the server, and the library's view of it."""
    if jit.SIMULATED:
        from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray

        made = FakeCUDAArray(array)
    else:
        made = There(array)
    return made, FRAMEWORKS[-1].seen(made)


class Convert(NamedTuple):
    """Parameters of `converting`."""

    source: int
    target: int
    count: int


def _converting(S, T):
    def run(c):
        source, target = view(c.source, S), view(c.target, T)
        for task in range(real.grid(1), c.count, real.gridsize(1)):
            put(target, task, narrow(widen(at(source, task)), T))

    return run


def converted(array, kind):
    """array as elements of another kind, by `widen` and `narrow` in a kernel."""
    _, seen = on_device(array)
    target, there = on_device(np.zeros(array.shape, array_kind(kind)))
    kernel = cuda.jit(_converting(stored(seen.dtype), KINDS[kind]))
    kernel[2, jit.THREADS](Convert(seen.address, there.address, array.size))
    return target.copy_to_host()


def array_kind(kind):
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16) if kind == "bfloat16" else np.dtype(kind)


def on_host(array):
    """A contiguous array of the library's, in its own type."""
    from numdcn._call.driver import read

    host = np.empty(array.shape, array_kind(array.dtype.name))
    read(array.device, array.stream, array.address, host)
    return host


def copied(array, target):
    """`Workspace.copy` of an array, into one with the strides of `target`."""
    _, source = on_device(array)
    made, there = on_device(target)
    Workspace(source).copy(source, there)
    return made.copy_to_host()


def contiguous(array):
    """`Workspace.contiguous` of an array."""
    _, source = on_device(array)
    made = Workspace(source).contiguous(source)
    return on_host(made)


def packed(x):
    """(images, pitch, pixels) of `Workspace.pack`."""
    _, source = on_device(x)
    images = Workspace(source).pack_images(source)
    return on_host(images.array), images.pitch, images.pixels


def unpacked(images, x):
    """`Workspace.unpack` of images into an array like x, in its layout."""
    _, source = on_device(images)
    made, target = on_device(x)
    Workspace(target).unpack_images(Images(source, images.shape[2], images.shape[1]), target)
    return made.copy_to_host()


def scattered(places, weights, values, images, shape, first_channel):
    """`Workspace.scatter`."""
    seen = [on_device(array) for array in (places, weights, values, images)]
    work = Workspace(seen[0][1])
    there = Images(seen[3][1], images.shape[2], images.shape[1])
    work.scatter(Plans(seen[0][1], seen[1][1]), seen[2][1], there, shape, first_channel)
    return seen[3][0].copy_to_host()


def cleared(array):
    """`Workspace.clear`."""
    made, seen = on_device(array)
    Workspace(seen).clear(seen)
    return made.copy_to_host()


def vectors(array, index):
    """What `load_vector` reads at an index."""
    kind = stored(on_device(array)[1].dtype)
    length, T = vector_length(kind), kind

    def kernel(c):
        wide = real.local.array(8, np.float64 if T == F64 else np.float32)
        load_vector(view(c.source, T), c.count, wide, 0)
        for i in range(length):
            put(view(c.target, F64 if T == F64 else F32), i, wide[i])

    _, seen = on_device(array)
    target, there = on_device(np.zeros(length, np.float64 if T == F64 else np.float32))
    cuda.jit(kernel)[1, 1](Convert(seen.address, there.address, index))
    return target.copy_to_host()


def outside(count, index):
    """Reads an element outside an array of `count` numbers."""
    made, seen = on_device(np.zeros(count, np.float32))

    def kernel(c):
        put(view(c.source, F32), c.count, np.float32(1))

    cuda.jit(kernel)[1, 1](Convert(seen.address, 0, index))
    return made.copy_to_host()


def prepared(arrays):
    """(with plain weights, with prepared ones, once more, how many layouts were kept after each): forward and
    backward."""
    x, offsets, w, grad_y = (on_device(arrays[name])[0] for name in ("x", "offsets", "w", "grad_y"))
    ready = numdcn.prepare_weights(w, groups=2)

    def both(weights):
        y = numdcn.deform_conv_forward(x, offsets, weights, padding=1)
        g = numdcn.deform_conv_backward(grad_y, x, offsets, weights, padding=1, deterministic=True)
        results = {"y": y, "x": g.x, "offsets": g.offsets, "w": g.w}
        return {name: result.copy_to_host() for name, result in results.items()}

    plain, first, kept = both(w), both(ready), [len(ready.layouts)]
    return plain, first, both(ready), [*kept, len(ready.layouts)]


@contextlib.contextmanager
def capture():
    """What calls do on streams that are captured into a CUDA graph: (its launches, the memory that it keeps)."""
    numba, graph, memory = FRAMEWORKS[-1], [], []

    def keep(array):
        memory.append(array)
        return array

    before = launch.Kernel.run, launch.Launch.run, pack.capturing
    launch.Kernel.run = lambda *told: graph.append((before[0], told))
    launch.Launch.run = lambda *told: graph.append((before[1], told))
    pack.capturing = lambda device, stream: True
    numba.empty, numba.give_back = lambda *told: keep(type(numba).empty(numba, *told)), keep
    try:
        yield graph, memory
    finally:
        launch.Kernel.run, launch.Launch.run, pack.capturing = before
        del numba.empty, numba.give_back


def captured(arrays):
    """Prepared weights in a graph that packs them, and in one captured when they are packed: (with plain weights, by a call
    between the captures, by each graph, run last; the layouts kept after each step; the launches of both graphs)."""
    given = {name: on_device(a) for name, a in arrays.items()}
    x, offsets, w, grad_y = (given[name][0] for name in ("x", "offsets", "w", "grad_y"))
    other, ready, kept = numdcn.prepare_weights(w), numdcn.prepare_weights(w), []

    def both(weights):
        y = numdcn.deform_conv_forward(x, offsets, weights)
        g = numdcn.deform_conv_backward(grad_y, x, offsets, weights, wrt="x")
        kept.append(len(ready.layouts))
        return {"y": y, "x": g.x}

    def on_host(results):
        return {name: result.copy_to_host() for name, result in results.items()}

    plain = on_host(both(w))
    for _ in range(2):
        both(other)  # what the second does is repeated below
    with capture() as (first, _memory):
        results = [both(ready)]
    eager = on_host(both(ready))
    with capture() as (second, _more):
        results.append(both(ready))
    for run, told in (*first, *second):
        run(*told)
    return plain, [eager, *map(on_host, results)], kept[3:], [len(first), len(second)]
