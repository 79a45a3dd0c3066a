"""What calls remember by what it depends on. Problems are, so that a call like an earlier one checks nothing twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from numdcn._call.device_array import DeviceArray
from numdcn._call.prepared import PreparedWeights

Result = TypeVar("Result")
_PLAIN = {int, bool, float, type(None)}
MOST = 512  # of a kind; beyond, all are forgotten

_known: dict[tuple[Any, ...], Any] = {}


def keep(known: dict[Any, Any], key: Any, item: Any) -> None:
    """Remember an item among the `known`, which other threads may be reading and changing."""
    if len(known) >= MOST:
        known.clear()
    known[key] = item


def remembered(make: Callable[..., Result], arrays: Any, *options: Any) -> Result:
    """`make(arrays, *options)`, which may depend on nothing but the dtypes and shapes of the arrays, the groups that weights
    were prepared for, and the options.

    Only for arrays of NumPy or on a GPU, and options that are numbers, bools, None, or tuples of ints.
    """
    key: list[Any] = [make]
    for array in arrays:
        if array is None:
            key.append(None)
        elif type(array) is np.ndarray or type(array) is DeviceArray:
            key.append(array.dtype)
            key.append(array.shape)
        elif type(array) is PreparedWeights:
            key.append(array.dtype)
            key.append(array.shape)
            key.append(array.groups)
        else:
            return make(arrays, *options)
    for option in options:
        if type(option) not in _PLAIN and not _are_ints(option):
            return make(arrays, *options)
        key.append(type(option))  # True equals 1, but is no stride
    known = (*key, *options)
    result = _known.get(known)
    if result is None:
        result = make(arrays, *options)
        keep(_known, known, result)
    return result


def _are_ints(option: Any) -> bool:
    """Whether this is a tuple of ints, or of such tuples."""
    return type(option) is tuple and all(type(item) is int or _are_ints(item) for item in option)
