"""Questions to the CUDA driver about arrays: their device, their contents, and ordering of streams."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

from numdcn._call.numba_cuda import SIMULATED, cuda

if not SIMULATED:
    from numdcn._call.numba_cuda import driver


def check(error: Any, what: str) -> None:
    """Raise if the driver reported an error."""
    if error:
        _, name = driver.cuGetErrorName(error)
        _, text = driver.cuGetErrorString(error)
        raise RuntimeError(f"{what}: {name.decode()}: {text.decode()}")


_contexts: dict[int, int] = {}  # the primary context of each device


def on_device(device: int, action: Callable[[], Any]) -> Any:
    """The result of `action`, run with a device's primary context current; if none was current, it remains."""
    if SIMULATED:
        return action()
    known = _contexts.get(device)
    if known is None:
        with cuda.gpus[device]:
            known = _contexts[device] = int(driver.cuCtxGetCurrent()[1])
    now = int(driver.cuCtxGetCurrent()[1])
    if now == known:
        return action()
    if now == 0:
        check(driver.cuCtxSetCurrent(known)[0], f"GPU {device} could not be made the current one")
        return action()
    check(driver.cuCtxPushCurrent(known)[0], f"GPU {device} could not be made the current one")
    try:
        return action()
    finally:
        driver.cuCtxPopCurrent()


def device_of(address: int) -> int:
    """The index of the device that an address belongs to."""
    attribute = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    error, device = driver.cuPointerGetAttribute(attribute, address)
    if error:
        cuda.current_context()  # the driver needs one, or to be initialised
        error, device = driver.cuPointerGetAttribute(attribute, address)
    if error:
        raise ValueError(f"an array has address {address:#x}, expected memory of a GPU: {error}")
    return int(device)


def read(device: int, stream: int, address: int, host: np.ndarray) -> None:
    """Copy device memory to a contiguous NumPy array, after waiting for the stream."""
    if SIMULATED:
        ctypes.memmove(host.ctypes.data, address, host.nbytes)
        return

    def wait_and_copy() -> None:
        check(driver.cuStreamSynchronize(stream)[0], "the work on a stream failed")
        check(driver.cuMemcpyDtoH(host.ctypes.data, address, host.nbytes)[0], "memory of a GPU could not be read")

    on_device(device, wait_and_copy)


def follow(device: int, stream: int, other: int) -> None:
    """Make everything issued on a stream from now on wait for what was issued on another one. The host does not
    wait."""

    def record_and_wait() -> None:
        error, event = driver.cuEventCreate(driver.CUevent_flags.CU_EVENT_DISABLE_TIMING)
        check(error, "an event could not be made")
        check(driver.cuEventRecord(event, other)[0], "an event could not be recorded")
        check(driver.cuStreamWaitEvent(stream, event, 0)[0], "a stream could not be made to wait")
        check(driver.cuEventDestroy(event)[0], "an event could not be destroyed")

    on_device(device, record_and_wait)


def capturing(device: int, stream: int) -> bool:
    """Whether what is issued on a stream goes into a CUDA graph, to be run later."""
    if SIMULATED:
        return False
    error, status = on_device(device, lambda: driver.cuStreamIsCapturing(stream))
    check(error, "a stream did not tell whether it is captured")
    return bool(status != driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE)
