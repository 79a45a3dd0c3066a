"""A stand-in for torch with tensors on a GPU, as far as numdcn uses it: memory of numba.cuda or of its simulator, and a matrix
product by NumPy.

It behaves as badly as torch may. Memory is NaN at first. With tf32 allowed, factors lose their last 13 bits, as on tensor
cores; without, they keep them. Operands of a product must have rows or columns without gaps, and only `out` is written.
"""

import contextlib
import sys
import types

import ml_dtypes
import numpy as np

KINDS = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "int32": np.dtype(np.int32),
    "int64": np.dtype(np.int64),
    "uint8": np.dtype(np.uint8),
}


class Memory:
    """Bytes on the device, NaN in any type."""

    def __init__(self, nbytes, kind):
        from numba import cuda

        from numdcn._call.numba_cuda import SIMULATED

        content = np.full(-(-max(nbytes, 1) // 256) * 256, 0xFF, np.uint8)
        self.cuda = cuda
        if SIMULATED:
            from numdcn._call.simulator import SIMULATED_MEMORY, CheckedArray

            room = np.full(len(content) + 256, 0xFF, np.uint8)
            start = -room.ctypes.data % 256
            self.host = room[start : start + nbytes]
            self.address = self.host.ctypes.data
            stored = np.dtype(np.uint16) if kind.name == "bfloat16" else kind
            self.seen = SIMULATED_MEMORY[self.address] = CheckedArray(self.host.view(stored))
        else:
            self.host = None
            self.array = cuda.to_device(content)
            self.address = self.array.__cuda_array_interface__["data"][0]

    def read(self):
        if self.host is not None:
            return self.host.copy()
        self.cuda.synchronize()
        return self.array.copy_to_host()

    def write(self, content):
        if self.host is not None:
            self.host[...] = content[: len(self.host)]
        else:
            self.array.copy_to_device(content)
            self.cuda.synchronize()


class Tensor:
    is_cuda, is_cpu, is_meta, requires_grad = True, False, False, False
    device = types.SimpleNamespace(index=0)

    def __init__(self, memory, kind, shape, strides, first=0):
        self.memory, self.kind, self.shape, self.strides, self.first = memory, kind, tuple(shape), tuple(strides), first

    @property
    def dtype(self):
        return f"torch.{self.kind.name}"

    def data_ptr(self):
        return self.memory.address + self.first * self.kind.itemsize

    def stride(self):
        return self.strides

    def storage_offset(self):
        return self.first

    def as_strided(self, size, stride, storage_offset):
        return Tensor(self.memory, self.kind, size, stride, storage_offset)

    def within(self, content):
        """The tensor within the content of its memory."""
        whole = content[: len(content) // self.kind.itemsize * self.kind.itemsize].view(self.kind)
        steps = [step * self.kind.itemsize for step in self.strides]
        return np.lib.stride_tricks.as_strided(whole[self.first :], self.shape, steps)

    def numpy(self):
        return self.within(self.memory.read()).copy() if 0 not in self.shape else np.zeros(self.shape, self.kind)

    def fill(self, values):
        content = self.memory.read()
        self.within(content)[...] = values
        self.memory.write(content)


def empty(shape, dtype, device="cuda:0", strides=None, first=0):
    kind = KINDS[dtype.removeprefix("torch.")]
    if strides is None:
        strides = [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]
    reach = first + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1 if 0 not in shape else 0
    return Tensor(Memory(reach * kind.itemsize, kind), kind, shape, strides, first)


def tensor(array, gap=1):
    """A tensor with the numbers of a NumPy array; `gap`: its elements are so far apart."""
    strides = [int(np.prod(array.shape[i + 1 :])) * gap for i in range(array.ndim)]
    made = empty(array.shape, array.dtype.name, strides=strides, first=int(gap > 1))
    if array.size:
        made.fill(array)
    return made


class Matmul:
    """torch.backends.cuda.matmul: one switch under two names."""

    def __init__(self, tf32):
        self.fp32_precision, self.allow_fp16_accumulation = "tf32" if tf32 else "none", False

    @property
    def allow_tf32(self):
        return self.fp32_precision == "tf32"

    @allow_tf32.setter
    def allow_tf32(self, value):
        self.fp32_precision = "tf32" if value else "none"


class Module(types.SimpleNamespace):
    """The module torch."""

    def __init__(self, tf32=False, widens=True, **more):
        overloads = ["default", "out", "dtype", "dtype_out"][: 4 if widens else 2]
        stream = types.SimpleNamespace(cuda_stream=0)
        super().__init__(
            Tensor=Tensor, empty=empty, bmm=self.bmm, from_numpy=None, __name__="torch", products=[],
            cuda=types.SimpleNamespace(current_stream=lambda number: stream),
            autograd=types.SimpleNamespace(forward_ad=None),
            backends=types.SimpleNamespace(cuda=types.SimpleNamespace(matmul=Matmul(tf32))),
            ops=types.SimpleNamespace(aten=types.SimpleNamespace(bmm=types.SimpleNamespace(overloads=lambda: overloads))),
            are_deterministic_algorithms_enabled=lambda: False,
            **{name: f"torch.{name}" for name in KINDS}, **more,
        )  # fmt: skip

    __hash__ = object.__hash__

    def bmm(self, left, right, *, out, **more):
        half = left.kind != np.float32
        assert left.kind == right.kind and out.kind == np.float32, "sums are float32"
        assert more == ({"out_dtype": "torch.float32"} if half else {}), "as torch takes it"
        for operand in (left, right):
            _, rows, columns = operand.shape
            _, down, across = operand.strides
            assert (across == 1 and down >= columns) or (down == 1 and across >= rows), "or torch would copy it"
        assert out.strides == (out.shape[1] * out.shape[2], out.shape[2], 1)
        assert out.memory not in (left.memory, right.memory)
        a, b = (self.factors(operand) for operand in (left, right))
        with np.errstate(all="ignore"):
            out.fill(np.matmul(a, b))
        self.products.append((left.shape, right.shape))

    def factors(self, operand):
        values = operand.numpy().astype(np.float32)
        if operand.kind == np.float32 and self.backends.cuda.matmul.fp32_precision == "tf32":
            values = (values.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
        return values


@contextlib.contextmanager
def installed(**more):
    """The stand-in in the place of torch."""
    before, module = sys.modules.get("torch"), Module(**more)
    sys.modules["torch"] = module
    try:
        yield module
    finally:
        if before is None:
            del sys.modules["torch"]
        else:
            sys.modules["torch"] = before
