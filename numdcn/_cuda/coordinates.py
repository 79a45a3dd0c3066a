"""Arrays of coordinates on the GPU: points, offsets, boxes, and the weights beside them. With half types they may be float32
or as narrow as the images; one kernel reads both, and finds out by the address.

(Copying narrow ones to float32 first would cost more than deciding at each read: with 16 offset groups they are as many
bytes as the rest of the call.)
"""

from __future__ import annotations

from typing import Any, NamedTuple

from numdcn._call.device_array import BFLOAT16, DTYPES, DeviceArray
from numdcn._cuda.jit import compute_type, device
from numdcn._cuda.memory import at, narrow, put, view, widen

NARROW = 2**62  # added to the address of elements narrower than float32


class Coordinates(NamedTuple):
    """An array of one of two types."""

    wide: Any  # seen as one of the compute type
    narrow: Any  # seen as one of the stored type
    is_narrow: Any


def address_of(array: DeviceArray | None) -> int:
    """The address of coordinates as kernels take it; 0 for None."""
    if array is None:
        return 0
    return array.address + (NARROW if array.dtype in (DTYPES["float16"], BFLOAT16) else 0)


def coordinate_viewer(T: Any) -> Any:
    """Make `coordinates(address)`; T: the stored type of the images."""
    A = compute_type(T)
    HALF = A != T

    @device
    def coordinates(address):
        """The array of coordinates at an address; unusable if that is 0."""
        if HALF:
            is_narrow = address >= NARROW
            plain = address - NARROW if is_narrow else address
            return Coordinates(view(plain, A), view(plain, T), is_narrow)
        return Coordinates(view(address, A), view(address, A), False)

    return coordinates


@device
def coordinate(array, index):
    """The element at an index, widened."""
    if array.is_narrow:
        return widen(at(array.narrow, index))
    return at(array.wide, index)


@device
def put_coordinate(array, index, value, T):
    """Store an element; T: the narrow type."""
    if array.is_narrow:
        put(array.narrow, index, narrow(value, T))
    else:
        put(array.wide, index, value)
