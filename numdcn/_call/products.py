"""Matrix products by the framework that owns the arrays: cuBLAS, through torch or CuPy.

A product is float32 whatever its operands, so half types are summed in float32 and not rounded: numdcn adds the bias and
rounds, once. A product with a half result would round on the way wherever cuBLAS divides a sum (torch allows it to by
default, and CuPy does not say). No switch of a framework is set here, since other threads see those too.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any

from numdcn._call.device_array import BFLOAT16, DTYPES, DeviceArray

HALVES = (DTYPES["float16"], BFLOAT16)
SINGLE = DTYPES["float32"]


@functools.cache
def _torch_widens(torch: Any) -> bool:
    """Whether torch multiplies half types into float32, as it does since 2.8."""
    return "dtype_out" in torch.ops.aten.bmm.overloads()


def torch_multiplies(dtype: Any, tf32: bool) -> bool:
    """Whether torch computes a product as asked for, with its switches as they are."""
    torch = sys.modules["torch"]
    matmul = torch.backends.cuda.matmul
    if torch.are_deterministic_algorithms_enabled():  # it refuses cuBLAS unless the environment fixes its workspace
        return False
    if dtype == SINGLE:
        precision = getattr(matmul, "fp32_precision", None)  # since 2.9; then `allow_tf32` may not be read
        return tf32 == (matmul.allow_tf32 if precision is None else precision == "tf32")
    return dtype in HALVES and _torch_widens(torch) and not getattr(matmul, "allow_fp16_accumulation", False)


def torch_multiply(left: DeviceArray, right: DeviceArray, target: DeviceArray) -> None:
    """target = left @ right, for batches of matrices, on torch's current stream. (Nothing with `out` is subject to
    autocast.)"""
    torch = sys.modules["torch"]
    a, b, c = map(_tensor, (left, right, target))
    if left.dtype == SINGLE:
        torch.bmm(a, b, out=c)
    else:
        torch.bmm(a, b, out_dtype=torch.float32, out=c)


def _tensor(array: DeviceArray) -> Any:
    """An array, which may be part of its owner, as a tensor."""
    owner = array.owner
    first = owner.storage_offset() + (array.address - owner.data_ptr()) // array.dtype.itemsize
    return owner.as_strided(array.shape, array.strides, first)


# CuPy has no function for this, but hands cuBLAS's on. The constants are those of cuBLAS and of the CUDA runtime.

TYPES = {"float32": 0, "float16": 2, "bfloat16": 14}  # cudaDataType_t
COMPUTE_32F, COMPUTE_32F_FAST_TF32 = 68, 77  # cublasComputeType_t
PLAIN, TURNED = 0, 1  # cublasOperation_t
DEFAULT = -1  # cublasGemmAlgo_t
ONE, ZERO = ctypes.c_float(1), ctypes.c_float(0)


def cupy_multiplies(dtype: Any, device: int, stream: int) -> bool:
    """Whether CuPy can multiply this type now: it refuses cuBLAS while a graph is captured."""
    cupy = sys.modules["cupy"]
    if dtype != SINGLE and dtype not in HALVES:
        return False
    with cupy.cuda.Device(device):
        return not cupy.cuda.runtime.streamIsCapturing(stream)


def cupy_multiply(left: DeviceArray, right: DeviceArray, target: DeviceArray, tf32: bool) -> None:
    """target = left @ right, for batches of matrices, on CuPy's current stream. cuBLAS counts columns first, so to it
    all are transposed, and the operands change places."""
    cupy = sys.modules["cupy"]
    batch, rows, columns = target.shape
    kind, result = TYPES[left.dtype.name], TYPES["float32"]
    compute = COMPUTE_32F_FAST_TF32 if tf32 and left.dtype == SINGLE else COMPUTE_32F
    (turn_a, step_a), (turn_b, step_b) = _operation(right), _operation(left)
    with cupy.cuda.Device(target.device):
        cupy.cuda.cublas.gemmStridedBatchedEx(
            cupy.cuda.device.get_cublas_handle(), turn_a, turn_b, columns, rows, left.shape[2], ctypes.addressof(ONE),
            right.address, kind, step_a, right.strides[0], left.address, kind, step_b, left.strides[0],
            ctypes.addressof(ZERO), target.address, result, target.strides[1], target.strides[0], batch, compute, DEFAULT,
        )  # fmt: skip


def _operation(array: DeviceArray) -> tuple[int, int]:
    """How cuBLAS reads matrices, whose rows or columns are contiguous, and their leading dimension."""
    return (PLAIN, array.strides[1]) if array.strides[2] == 1 else (TURNED, array.strides[2])
