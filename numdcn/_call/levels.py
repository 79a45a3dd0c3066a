"""Arguments that say how the levels of an array follow one another: their sizes, and their numbers of points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from numdcn._call.arrays import AnyArray
from numdcn._call.checks import LIMIT, describe, integer
from numdcn._call.device_array import DeviceArray
from numdcn._call.frameworks import framework_of

LevelShapes = Sequence[Sequence[int]] | AnyArray
LevelPoints = Sequence[int] | None


def level_shapes(value: Any) -> Any:
    """`spatial_shapes` as a tuple of pairs (height, width)."""
    wanted = "a sequence of pairs (height, width), or an integer array (L, 2), in host memory"
    items = value if _is_sequence(value) else _listed("spatial_shapes", value, 2, wanted)
    made = tuple(tuple(item) if _is_sequence(item) or _is_row(item) else item for item in tuple(items))
    for n, pair in enumerate(made):
        if not isinstance(pair, tuple) or len(pair) != 2:
            wrong = ValueError if isinstance(pair, tuple) else TypeError
            raise wrong(f"`spatial_shapes[{n}]` is {describe(pair)}, expected a pair (height, width) in {wanted}")
    if all(type(size) is int and 0 < size < LIMIT for pair in made for size in pair) and made:  # the usual case
        return made
    if not made:
        raise ValueError(f"`spatial_shapes` is {describe(value)}, expected at least one level: {wanted}")
    return tuple(
        tuple(integer(f"spatial_shapes[{n}][{i}]", size, 1) for i, size in enumerate(pair))
        for n, pair in enumerate(made)
    )


def level_points(value: Any) -> Any:
    """`points_per_level` as a tuple, or None."""
    if value is None:
        return None
    wanted = "None, or one int for each level, in host memory"
    items = tuple(value if _is_sequence(value) else _listed("points_per_level", value, 1, wanted))
    return tuple(integer(f"points_per_level[{n}]", count, 1) for n, count in enumerate(items))


def _is_sequence(value: Any) -> bool:
    return isinstance(value, (tuple, list))


def _is_row(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.ndim == 1


def _listed(name: str, value: Any, ndim: int, wanted: str) -> Any:
    """An integer array in host memory, of any framework, as lists."""
    if isinstance(value, DeviceArray) or (not isinstance(value, np.ndarray) and framework_of(value) is not None):
        raise TypeError(
            f"`{name}` is {describe(value)} on a GPU, expected {wanted}: reading it would mean waiting for the GPU; use "
            f"{name}.tolist(), once"
        )
    if not isinstance(value, np.ndarray):
        if not hasattr(type(value), "__array__"):
            raise TypeError(f"`{name}` is {describe(value)}, expected {wanted}")
        value = np.asarray(value)
    if value.dtype.kind not in "iu":
        raise TypeError(f"`{name}` is {describe(value)}, expected {wanted}; use {name}.astype(np.int64)")
    if value.ndim != ndim:
        raise ValueError(f"`{name}` is {describe(value)}, expected {wanted}")
    return value.tolist()
