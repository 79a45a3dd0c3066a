"""Arrays on a GPU: which framework owns them, where they are and on which stream, and memory for results in the same
framework.

No framework is imported here; one is consulted only for its own arrays. `numba.cuda` is needed only once a kernel runs.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from numdcn._call import device_scratch, products
from numdcn._call.device_array import BFLOAT16, DTYPES, DeviceArray, Framework, c_strides, name_of
from numdcn._call.install import install


class Torch(Framework):
    """torch.Tensor on a CUDA device."""

    name = "torch"

    def owns(self, value: Any) -> bool:
        torch = sys.modules.get("torch")
        return torch is not None and isinstance(value, torch.Tensor) and value.is_cuda

    def seen(self, value: Any) -> DeviceArray:
        return self._seen(value, None)

    def seen_beside(self, first: DeviceArray, value: Any) -> DeviceArray | None:
        if not self.owns(value) or value.device.index != first.device:
            return None
        return self._seen(value, first.own_stream)  # torch has one current stream for each device

    def _seen(self, value: Any, stream: int | None) -> DeviceArray:
        """A tensor; the current stream of its device is asked for if it is not known."""
        torch, device = sys.modules["torch"], value.device.index
        if value.requires_grad:
            raise TypeError(
                "a torch.Tensor that requires grad was given, expected tensor.detach(), as no gradients are recorded here; "
                "numdcn.adapters.torch records them"
            )
        dtype = _torch_dtype(value.dtype)
        if stream is None:
            stream = torch.cuda.current_stream(device).cuda_stream
        return DeviceArray(
            value, self, device, value.data_ptr(), dtype, tuple(value.shape), tuple(value.stride()), stream
        )  # fmt: skip

    def empty(self, shape: tuple[int, ...], dtype: Any, device: int, stream: int) -> DeviceArray:
        torch = sys.modules["torch"]
        # On torch's current stream of the device, the one that `seen` read; so `stream` is not used.
        made = torch.empty(shape, dtype=getattr(torch, name_of(dtype)), device=f"cuda:{device}")
        return DeviceArray(made, self, device, made.data_ptr(), dtype, shape, c_strides(shape), stream)

    def multiplies(self, dtype: Any, tf32: bool, device: int, stream: int) -> bool:
        return products.torch_multiplies(dtype, tf32)

    def multiply(self, left: DeviceArray, right: DeviceArray, target: DeviceArray, tf32: bool) -> None:
        products.torch_multiply(left, right, target)  # tf32 as torch's switch is: `multiplies` has compared


@functools.cache
def _torch_dtype(dtype: Any) -> Any:
    """A dtype of torch as the library's."""
    return _dtype(str(dtype).removeprefix("torch."))


class Cupy(Framework):
    """cupy.ndarray."""

    name = "cupy"

    def owns(self, value: Any) -> bool:
        cupy = sys.modules.get("cupy")
        return cupy is not None and isinstance(value, cupy.ndarray)

    def seen(self, value: Any) -> DeviceArray:
        cupy, device, size = sys.modules["cupy"], value.device.id, value.dtype.itemsize
        with cupy.cuda.Device(device):
            stream = cupy.cuda.get_current_stream().ptr
        strides = _in_elements(value.data.ptr, value.strides, size)
        return DeviceArray(value, self, device, value.data.ptr, _dtype(value.dtype.name), value.shape, strides, stream)

    def empty(self, shape: tuple[int, ...], dtype: Any, device: int, stream: int) -> DeviceArray:
        cupy = sys.modules["cupy"]
        with cupy.cuda.Device(device):
            made = cupy.empty(shape, _numpy_dtype(dtype))
        return DeviceArray(made, self, device, made.data.ptr, dtype, shape, c_strides(shape), stream)

    def multiplies(self, dtype: Any, tf32: bool, device: int, stream: int) -> bool:
        return products.cupy_multiplies(dtype, device, stream)

    def multiply(self, left: DeviceArray, right: DeviceArray, target: DeviceArray, tf32: bool) -> None:
        products.cupy_multiply(left, right, target, tf32)


class Numba(Framework):
    """numba.cuda device arrays, and anything else with `__cuda_array_interface__` or DLPack; results are Numba device
    arrays. In the simulator: its arrays."""

    name = "numba"

    def owns(self, value: Any) -> bool:
        if _simulates(value):
            return True
        if isinstance(value, np.ndarray) or not hasattr(type(value), "__cuda_array_interface__"):
            return _on_gpu_by_dlpack(value)
        return getattr(value, "__cuda_array_interface__", None) is not None

    def seen(self, value: Any) -> DeviceArray:
        if _simulates(value):
            return _simulated(value, self)
        if not hasattr(type(value), "__cuda_array_interface__"):
            return _from_dlpack(value, self)
        return self._shown(value, value.__cuda_array_interface__)

    def seen_beside(self, first: DeviceArray, value: Any) -> DeviceArray | None:
        if type(value) is not type(first.owner) or not hasattr(type(value), "__cuda_array_interface__"):
            return super().seen_beside(first, value)
        interface = value.__cuda_array_interface__  # of Numba's arrays: costs 2 us
        if interface is None:
            return None
        made = self._shown(value, interface)
        return made if (made.device, made.stream) == (first.device, first.stream) else None

    def _shown(self, value: Any, interface: dict[str, Any]) -> DeviceArray:
        """An array that shows its memory by an interface."""
        typestr = interface["typestr"]
        dtype = _named(typestr) or _dtype(str(getattr(value, "dtype", typestr)))
        shape = tuple(interface["shape"])
        strides, size = interface.get("strides"), dtype.itemsize
        address, readonly = interface["data"]
        steps = _in_elements(address, tuple(size * s for s in c_strides(shape)) if strides is None else strides, size)
        return DeviceArray(
            value, self, _device_of(address), address, dtype, shape, steps, _stream(interface.get("stream")), not readonly
        )  # fmt: skip

    def empty(self, shape: tuple[int, ...], dtype: Any, device: int, stream: int) -> DeviceArray:
        cuda = numba_cuda()
        made = _with_memory(device, lambda: cuda.device_array(shape, _numpy_dtype(dtype), stream=_numba_stream(stream)))
        if _simulates(made):
            return _simulated(made, self)
        pointer = made.__cuda_array_interface__["data"][0]
        return DeviceArray(made, self, device, pointer, dtype, shape, c_strides(shape), stream)

    def scratch(self, shape: tuple[int, ...], dtype: Any, device: int, stream: int) -> DeviceArray:
        nbytes = math.prod(shape) * dtype.itemsize
        block = device_scratch.take(device, stream, nbytes)
        if block is None:
            made = self.empty((max(nbytes, 256),), np.dtype(np.uint8), device, stream)
            if _simulates(made.owner):
                return self.empty(shape, dtype, device, stream)  # the simulator checks accesses against its bounds
            block = device_scratch.Block(made.owner, made.address, made.size)
        return DeviceArray(block, self, device, block.address, dtype, shape, c_strides(shape), stream)

    def give_back(self, array: DeviceArray) -> None:
        if type(array.owner) is device_scratch.Block:
            device_scratch.give_back(array.device, array.stream, array.owner)


FRAMEWORKS: tuple[Framework, ...] = (Torch(), Cupy(), Numba())


def framework_of(value: Any) -> Framework | None:
    """The framework of an array on a GPU; None if `value` is not one."""
    return next((f for f in FRAMEWORKS if f.owns(value)), None)


def require_cuda() -> None:
    """Raise an error that names the extra if the package numba-cuda is not installed."""
    numba_cuda()


@functools.cache
def numba_cuda() -> Any:
    """The module `numba.cuda` of the package numba-cuda, which the extra installs."""
    if importlib.util.find_spec("numba_cuda") is None:
        raise ImportError(f"arrays on a GPU need the extra `cuda`: {install('cuda')}")
    from numdcn._call.numba_cuda import cuda

    return cuda


def _numpy_dtype(dtype: Any) -> np.dtype:
    """A dtype for NumPy; for bfloat16 that of ml_dtypes if it has been imported, else its bits."""
    if dtype is not BFLOAT16:
        return dtype
    return np.dtype(sys.modules["ml_dtypes"].bfloat16 if "ml_dtypes" in sys.modules else np.uint16)


def _on_device(device: int, action: Callable[[], Any]) -> Any:
    """The result of `action`, run with a device current."""
    from numdcn._call.driver import on_device

    return on_device(device, action)


def _numba_stream(stream: int) -> Any:
    """A stream as Numba's, which its arrays then export."""
    return numba_cuda().external_stream(stream) if stream else 0


def _with_memory(device: int, action: Callable[[], Any]) -> Any:
    """The result of `action`, run on a device; if it fails, tried once more after freeing the scratch memory that is
    kept."""
    try:
        return _on_device(device, action)
    except Exception:
        if not device_scratch.clear():
            raise
    return _on_device(device, action)


def join(array: DeviceArray, first: DeviceArray) -> None:
    """Move the use of an array to the stream of another one, after what was done to it on its own."""
    if array.stream != first.stream:
        follow(array.device, first.stream, array.stream)
        array.stream = first.stream


def follow(device: int, stream: int, other: int) -> None:
    """Make everything issued on a stream from now on wait for what was issued on another one."""
    from numdcn._call import driver

    driver.follow(device, stream, other)


def _simulates(value: Any) -> bool:
    """Whether this is an array of Numba's simulator."""
    return type(value).__name__ == "FakeCUDAArray"


@functools.cache
def _named(typestr: str) -> Any:
    """The dtype of an array interface; None if it gives only a size."""
    dtype = np.dtype(typestr)
    if dtype.newbyteorder("=") != dtype:
        raise TypeError(f"an array on a GPU has dtype {dtype.str}, expected native byte order")
    return None if dtype.kind == "V" else _dtype(dtype.name)


def _dtype(name: str) -> Any:
    """The dtype of this name; NumPy's, for use in errors, if the library does not support it."""
    if name in DTYPES:
        return DTYPES[name]
    try:
        return np.dtype(name)
    except TypeError:
        raise TypeError(f"an array on a GPU has dtype {name}, expected float16, bfloat16, float32 or float64") from None


def _in_elements(address: int, strides: tuple[int, ...], size: int) -> tuple[int, ...]:
    """Strides converted from bytes to elements. Raises for misaligned elements, which a GPU cannot read."""
    if address % size or any(s % size for s in strides):
        raise ValueError(
            f"an array on a GPU has address {address:#x} and strides {strides}, expected multiples of {size} bytes"
        )
    return tuple(s // size for s in strides)


def _device_of(address: int) -> int:
    """The index of the device of an address; of the current one for an empty array without an address."""
    cuda = numba_cuda()
    if not address:
        return int(cuda.get_current_device().id)
    from numdcn._call.driver import device_of

    return device_of(address)


def _stream(stream: int | None) -> int:
    """A stream of `__cuda_array_interface__` as a handle: 1 is the legacy default stream, which the driver calls 0."""
    return 0 if stream in (None, 1) else int(stream or 0)


def _simulated(value: Any, framework: Framework) -> DeviceArray:
    """An array of Numba's simulator, registered for the kernels."""
    from numdcn._call.simulator import SIMULATED_MEMORY, CheckedArray

    host = np.asarray(value._ary)
    dtype, size = _dtype(host.dtype.name), host.dtype.itemsize
    address = host.ctypes.data
    strides = _in_elements(address, host.strides, size)
    low, high = _reach(host.shape, strides)
    made = DeviceArray(value, framework, 0, address, dtype, host.shape, strides, 0, host.flags.writeable)
    if host.size:
        stored = np.dtype(np.uint16) if dtype is BFLOAT16 else host.dtype
        raw = (ctypes.c_char * ((high - low + 1) * size)).from_address(address + low * size)
        seen, known = CheckedArray(np.frombuffer(raw, stored), -low), SIMULATED_MEMORY.get(address)
        if known is None or len(known.elements) - known.origin < len(seen.elements) - seen.origin:
            SIMULATED_MEMORY[address] = seen  # else a larger array begins there
        made.keep = (SIMULATED_MEMORY[address], host)
    return made


def host_copy(array: DeviceArray) -> np.ndarray:
    """A NumPy copy of an array on a GPU, after waiting for it; float16 and bfloat16 become float32."""
    require_cuda()
    from numdcn._call.driver import read

    stored = np.dtype(np.uint16) if array.dtype is BFLOAT16 else array.dtype
    if not array.size:
        return np.empty(array.shape, np.float32 if stored.itemsize == 2 else stored)
    low, high = _reach(array.shape, array.strides)
    memory = np.empty(high - low + 1, stored)
    read(array.device, array.stream, array.address + low * stored.itemsize, memory)
    strides = tuple(s * stored.itemsize for s in array.strides)
    host = np.lib.stride_tricks.as_strided(memory[-low:], array.shape, strides)
    if array.dtype is BFLOAT16:
        return (host.astype(np.uint32) << 16).view(np.float32)
    return host.astype(np.float32) if stored.itemsize == 2 else host


def _reach(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, int]:
    """How far an array extends before and after its first element, in elements."""
    ends = [(n - 1) * s for n, s in zip(shape, strides, strict=True)]
    return sum(min(0, end) for end in ends), sum(max(0, end) for end in ends)


# DLPack, for arrays with no other interface.


def _on_gpu_by_dlpack(value: Any) -> bool:
    if not hasattr(type(value), "__dlpack_device__") or isinstance(value, np.ndarray):
        return False
    return int(value.__dlpack_device__()[0]) in (2, 13)  # CUDA, CUDA managed


def _from_dlpack(value: Any, framework: Framework) -> DeviceArray:
    require_cuda()
    from cuda.core.utils import StridedMemoryView

    seen = StridedMemoryView.from_dlpack(value, stream_ptr=1)  # 1: the legacy default stream waits for its producer
    strides = seen.strides or c_strides(tuple(seen.shape))
    made = DeviceArray(
        value, framework, seen.device_id, seen.ptr, _dtype(str(seen.dtype)), tuple(seen.shape), tuple(strides), 0, not seen.readonly
    )  # fmt: skip
    made.keep = seen
    return made
