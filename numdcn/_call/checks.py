"""Argument checks shared by all operators, and the wording of their errors.

Every message names the argument, what was given and what was expected.
"""

from __future__ import annotations

import numbers
import operator
from collections.abc import Iterable
from typing import Any

import numpy as np

AXES = ("y", "x")

IntPerAxis = int | tuple[int, int]
Padding = int | tuple[int, int] | tuple[tuple[int, int], tuple[int, int]]


def describe(value: Any) -> str:
    """A short description of an unexpected value."""
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if isinstance(shape, tuple) and dtype is not None:
        return f"{type(value).__name__} of shape {shape} and dtype {dtype}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def integer(name: str, value: Any, least: int, limit: int = 2**31) -> int:
    """`value` as an int from `least` to below `limit`; bools and floats are rejected."""
    if isinstance(value, bool):
        raise TypeError(f"`{name}` is {describe(value)}, expected an int of at least {least}")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"`{name}` is {describe(value)}, expected an int of at least {least}") from None
    if number < least:
        raise ValueError(f"`{name}` is {number}, expected at least {least}")
    if number >= limit:
        raise ValueError(f"`{name}` is {number}, expected less than {limit}")
    return number


def _is_sequence(value: Any) -> bool:
    return isinstance(value, (tuple, list))


def per_axis(name: str, value: Any, least: int) -> tuple[int, int]:
    """An int, or one per axis, as a tuple."""
    if type(value) is int and value >= least:  # the usual case, checked only once
        return integer(name, value, least), value
    if not _is_sequence(value):
        number = integer(name, value, least)
        return number, number
    value = tuple(value)  # a list could change meanwhile
    if len(value) != len(AXES):
        raise ValueError(f"`{name}` is {describe(value)}, expected an int or one int for each axis ({', '.join(AXES)})")
    first, second = (integer(f"{name}[{i}]", item, least) for i, item in enumerate(value))
    return first, second


def padding_per_axis(value: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    """Padding before and after each axis, from an int, an int per axis, or a (before, after) pair per axis."""
    if _is_sequence(value):
        value = tuple(tuple(item) if _is_sequence(item) else item for item in tuple(value))  # a list could change
    if _is_sequence(value) and any(_is_sequence(item) for item in value):
        if len(value) != len(AXES) or not all(_is_sequence(item) and len(item) == 2 for item in value):
            raise ValueError(
                f"`padding` is {describe(value)}, expected an int, one int for each axis, "
                "or one (before, after) pair for each axis"
            )
        pairs = [[integer(f"padding[{i}][{j}]", p, 0) for j, p in enumerate(item)] for i, item in enumerate(value)]
        return (pairs[0][0], pairs[1][0]), (pairs[0][1], pairs[1][1])
    both = per_axis("padding", value, 0)
    return both, both


def wanted_names(wrt: Any, present: tuple[str, ...], known: tuple[str, ...]) -> frozenset[str]:
    """The names whose gradients are requested; all that are present, if `wrt` is None."""
    if wrt is None:
        return frozenset(present)
    if isinstance(wrt, str):
        names: tuple[Any, ...] = (wrt,)
    elif isinstance(wrt, Iterable):
        names = tuple(wrt)
    else:
        raise TypeError(f"`wrt` is {describe(wrt)}, expected None, a name or names among {', '.join(known)}")
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"`wrt` holds {describe(name)}, expected names among {', '.join(known)}")
        if name not in known:
            raise ValueError(f"`wrt` holds {name!r}, expected names among {', '.join(known)}")
        if name not in present:
            raise ValueError(f"`wrt` holds {name!r}, which was not given; expected names among {', '.join(present)}")
    return frozenset(names)


def coordinate_dtype(dtype: Any) -> np.dtype:
    """The dtype in which coordinates are computed: float64 for float64, else float32."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def is_real(value: Any) -> bool:
    """Whether this is a real number. Bools are not, nor are durations, which NumPy counts as integers."""
    return isinstance(value, numbers.Real) and not isinstance(value, (bool, np.timedelta64))


def number(name: str, value: Any, dtype: Any, positive: bool = False) -> float:
    """`value` as a float that is finite in the dtype of coordinates, and above 0 if `positive`. Bools, strings and
    durations are rejected."""
    dtype = coordinate_dtype(dtype)
    wanted = f"a finite number{' above 0' if positive else ''}, in {dtype} too"
    if not is_real(value):
        raise TypeError(f"`{name}` is {describe(value)}, expected {wanted}")
    try:
        with np.errstate(all="ignore"):
            real = float(value)
            kept = dtype.type(real)
    except OverflowError:
        raise ValueError(f"`{name}` is {describe(value)}, expected {wanted}") from None
    if not np.isfinite(kept) or (positive and not kept > 0):
        raise ValueError(f"`{name}` is {describe(value)}, expected {wanted}")
    return real


def check_countable(name: str, size: int, dtype: Any) -> None:
    """Raise unless positions up to `size` are exact in the dtype of coordinates."""
    dtype = coordinate_dtype(dtype)
    if size > 2 ** (np.finfo(dtype).nmant + 1):
        raise ValueError(
            f"`{name}` is {size} pixels long along an axis, padding included, expected at most "
            f"{2 ** (np.finfo(dtype).nmant + 1)}: {dtype} counts no farther"
        )


def flag(name: str, value: Any) -> bool:
    """`value` as a bool; raises unless it is True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"`{name}` is {describe(value)}, expected True or False")
    return bool(value)
