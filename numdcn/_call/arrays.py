"""Which arrays are accepted, and whether a result can be written to one."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

import numpy as np

from numdcn._call import hints
from numdcn._call.checks import describe
from numdcn._call.device_array import BFLOAT16, DeviceArray, name_of
from numdcn._call.frameworks import framework_of


class AnyArray(Protocol):
    """An array: NumPy's, or one on a GPU."""

    @property
    def shape(self) -> Any: ...
    @property
    def dtype(self) -> Any: ...
    @property
    def ndim(self) -> int: ...


Array = TypeVar("Array", bound=AnyArray)  # one kind for all arrays and results of a call
FLOAT16 = np.dtype(np.float16)
FLOATS = (np.dtype(np.float32), np.dtype(np.float64))
GPU_FLOATS = (*FLOATS, FLOAT16, BFLOAT16)
WANTED = "float16, bfloat16, float32 or float64"


def received(value: Any, name: str = "") -> Any:
    """`value` as the library uses it: a plain view of a NumPy array, or a `DeviceArray` for an array on a GPU.

    The view is private: no subclass can interfere, and nobody else can change its shape after it was checked. An object
    with an array interface counts as a NumPy array. A masked array, or anything that is not an array, is returned
    unchanged, to be rejected later. `name` is for errors.
    """
    if type(value) is np.ndarray:
        return value.view()
    if issubclass(type(value), np.ndarray):
        return value if is_masked(value) else np.ndarray.view(value, type=np.ndarray)
    if isinstance(value, DeviceArray) or value is None:
        return value
    framework = framework_of(value)
    if framework is None and not has_interface(value):
        return value
    try:
        return np.asarray(value) if framework is None else framework.seen(value)
    except (AttributeError, KeyError) as error:  # of what only looks like one
        raise TypeError(
            f"`{name}` is {describe(value)}, expected an array whose array interface is complete"
        ) from error
    except (TypeError, ValueError) as error:
        if not name:
            raise
        raise (TypeError if isinstance(error, TypeError) else ValueError)(f"`{name}`: {error}") from error


def has_interface(value: Any) -> bool:
    """Whether an object that is no array of NumPy or a framework shows its memory by the array interface. (An image of
    PIL has the interface too, but shows a copy.)"""
    if isinstance(value, (np.ndarray, np.generic)) or hasattr(type(value), "__dlpack_device__"):
        return False
    try:
        interface = getattr(value, "__array_interface__", None)
    except Exception:  # of a property
        return False
    return isinstance(interface, dict) and isinstance(interface.get("data"), tuple)


def is_masked(value: Any) -> bool:
    """Whether this is a masked array."""
    return type(value) is not np.ndarray and isinstance(value, np.ma.MaskedArray)


def is_half(dtype: Any) -> bool:
    """Whether this is float16 or bfloat16, in native byte order. NumPy knows bfloat16 where a package has registered a
    dtype of that name, as ml_dtypes does."""
    return dtype.itemsize == 2 and (dtype == FLOAT16 or name_of(dtype) == "bfloat16")


def check_dtype(name: str, value: Any) -> np.dtype:
    """`value` as a dtype, if it is one that operators accept."""
    try:
        kind = np.dtype(value)
    except Exception:  # of several kinds, for a text or a dict
        kind = None
    if kind is None or not (kind in FLOATS or is_half(kind)):
        raise TypeError(f"`{name}` is {describe(value)}, expected {WANTED}")
    return kind


def check_array(name: str, value: Any, ndim: int | None, layout: str) -> None:
    """Raise unless `value` is a float16, bfloat16, float32 or float64 array, with `ndim` axes if given."""
    if isinstance(value, DeviceArray):
        if value.dtype not in GPU_FLOATS:
            raise TypeError(f"`{name}` has dtype {value.dtype}, expected {WANTED}{hints.cast(name, value, FLOATS[0])}")
    elif not isinstance(value, np.ndarray) or is_masked(value):
        raise TypeError(
            f"`{name}` is {describe(value)}, expected a NumPy array or one on a GPU, of shape {layout}"
            + hints.to_array(name, value)
        )
    elif value.dtype not in FLOATS and not is_half(value.dtype):
        native = value.dtype.newbyteorder("=")
        swapped = native in (*FLOATS, FLOAT16)
        came, wanted = (value.dtype.str, " in native byte order") if swapped else (value.dtype, "")
        usual = native if swapped else FLOATS[0]
        raise TypeError(f"`{name}` has dtype {came}, expected {WANTED}{wanted}{hints.cast(name, value, usual)}")
    if ndim is not None and value.ndim != ndim:
        raise ValueError(
            f"`{name}` has shape {value.shape}, expected {ndim} axes: {layout}{hints.axes(name, value, ndim, layout)}"
        )


def _overlaps_itself(array: np.ndarray) -> bool:
    if array.size == 0:
        return False
    reach = array.itemsize
    for stride, size in sorted((abs(s), n) for s, n in zip(array.strides, array.shape, strict=True) if n > 1):
        if stride < reach:
            return True
        reach += stride * (size - 1)
    return False


def _overlap(a: Any, b: Any) -> bool:
    if isinstance(a, DeviceArray) and isinstance(b, DeviceArray) and a.contiguous and b.contiguous:
        return a.address < b.end and b.address < a.end and a.size > 0 and b.size > 0
    a = a.ghost if isinstance(a, DeviceArray) else a
    b = b.ghost if isinstance(b, DeviceArray) else b
    if not np.may_share_memory(a, b):
        return False
    try:
        return bool(np.shares_memory(a, b, max_work=100_000))  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def check_out(name: str, out: Any, shape: tuple[int, ...], dtype: Any, inputs: dict[str, Any]) -> None:
    """Raise unless a result of this shape and dtype can be written to `out`."""
    if not isinstance(out, (np.ndarray, DeviceArray)) or is_masked(out):
        raise TypeError(
            f"`{name}` is {describe(out)}, expected a NumPy array, or one on a GPU, of shape {shape} and dtype {dtype}"
        )
    if out.dtype != dtype:
        raise TypeError(f"`{name}` has dtype {out.dtype}, expected {dtype}")
    if out.shape != shape:
        raise ValueError(f"`{name}` has shape {out.shape}, expected {shape}")
    if not (out.writable if isinstance(out, DeviceArray) else out.flags.writeable):
        raise ValueError(f"`{name}` is read-only, expected a writable array")
    if _overlaps_itself(out.ghost if isinstance(out, DeviceArray) else out):
        raise ValueError(
            f"`{name}` has elements that share memory (strides {out.strides}), expected a place of its own for each"
        )
    for other, array in inputs.items():
        if _overlap(out, array):
            raise ValueError(f"`{name}` overlaps `{other}` in memory, expected memory of its own")
