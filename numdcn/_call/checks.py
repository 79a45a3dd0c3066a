"""Argument checks shared by all operators, and the wording of their errors.

Every message names the argument, what was given and what was expected.
"""

from __future__ import annotations

import numbers
import operator
import reprlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from numdcn._call import hints

LIMIT = 2**31  # below which whole numbers must be

IntPerAxis = int | tuple[int, int]
Padding = int | tuple[int, int] | tuple[tuple[int, int], tuple[int, int]]

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = _LONGEST = 60
_short.maxlist = _short.maxset = _short.maxfrozenset = _short.maxdict = _short.maxdeque = _short.maxarray = 2
_short.maxlevel = 2


def describe(value: Any) -> str:
    """A short description of an unexpected value."""
    kind, shape, dtype = type(value).__name__, getattr(value, "shape", None), getattr(value, "dtype", None)
    if isinstance(shape, tuple) and dtype is not None and not isinstance(value, np.generic):
        article = "an" if kind[0].lower() in "aeiou" or kind == "ndarray" else "a"
        return f"{article} {kind} of shape {tuple(shape)} and dtype {_cut(str(dtype))}"
    return "None" if value is None else f"{_text(value)} ({kind})"


def _text(value: Any) -> str:
    """A value in at most some 60 characters of one line."""
    try:
        return _cut(" ".join(_short.repr(value).split()))
    except ValueError:  # an int of more digits than Python writes
        return "a value too long to print"


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def whole(value: Any) -> int | None:
    """A whole number as an int; None for what is none, as a bool or a float."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def integer(name: str, value: Any, least: int, limit: int = LIMIT) -> int:
    """A whole number of at least `least` and below `limit`; a bool or a float is none."""
    number = whole(value)
    if number is None:
        raise TypeError(f"`{name}` is {describe(value)}, expected an int" + f" of at least {least}" * (least > -LIMIT))
    if number < least:
        raise ValueError(f"`{name}` is {_text(number)}, expected at least {least}")
    if number >= limit:
        raise ValueError(f"`{name}` is {_text(number)}, expected less than {limit}")
    return number


def _is_sequence(value: Any) -> bool:
    return isinstance(value, (tuple, list))


def _is_plain_pair(value: Any, least: int) -> bool:
    """Whether this is a tuple of two ints in range, which needs no further look."""
    return type(value) is tuple and len(value) == 2 and all(type(n) is int and least <= n < LIMIT for n in value)


def per_axis(name: str, value: Any, least: int) -> tuple[int, int]:
    """An int, or one per axis, as a tuple."""
    if type(value) is int and least <= value < LIMIT:  # the usual case
        return value, value
    if _is_plain_pair(value, least):
        return value[0], value[1]
    if _is_sequence(value):
        value = tuple(value)  # a list could change meanwhile
        if len(value) == 2:
            first, second = (integer(f"{name}[{i}]", item, least) for i, item in enumerate(value))
            return first, second
    elif whole(value) is not None:
        number = integer(name, value, least)
        return number, number
    raise (ValueError if _is_sequence(value) else TypeError)(
        f"`{name}` is {describe(value)}, expected an int of at least {least}, or a tuple of two: (y, x)"
        + hints.numbers(name, value)
    )


def padding_per_axis(value: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    """Padding before and after each axis, from an int, an int per axis, or a (before, after) pair per axis."""
    if type(value) is int and 0 <= value < LIMIT:  # the usual case
        return (value, value), (value, value)
    if _is_plain_pair(value, 0):
        return value, value
    if _is_sequence(value):
        value = tuple(tuple(item) if _is_sequence(item) else item for item in tuple(value))  # a list could change
        if len(value) == 2:
            if all(_is_sequence(item) and len(item) == 2 for item in value):
                pairs = [
                    [integer(f"padding[{i}][{j}]", p, 0) for j, p in enumerate(item)] for i, item in enumerate(value)
                ]
                return (pairs[0][0], pairs[1][0]), (pairs[0][1], pairs[1][1])
            if not any(_is_sequence(item) for item in value):
                both = per_axis("padding", value, 0)
                return both, both
    elif whole(value) is not None:
        number = integer("padding", value, 0)
        return (number, number), (number, number)
    raise (ValueError if _is_sequence(value) else TypeError)(
        f"`padding` is {describe(value)}, expected an int of at least 0, a tuple of two: (y, x), or a tuple of two pairs: "
        f"((top, bottom), (left, right)){hints.other_padding(value)}"
    )


def wanted_names(wrt: Any, present: tuple[str, ...], known: tuple[str, ...]) -> frozenset[str]:
    """The names whose gradients are requested; all that are present, if `wrt` is None."""
    if wrt is None:
        return frozenset(present)
    if isinstance(wrt, str):
        names: tuple[Any, ...] = (wrt,)
    elif isinstance(wrt, Iterable) and getattr(wrt, "ndim", None) != 0:  # an array without axes cannot be iterated over
        names = tuple(wrt)
    else:
        raise TypeError(f"`wrt` is {describe(wrt)}, expected None, or one or more of the names {', '.join(known)}")
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"`wrt` holds {describe(name)}, expected one or more of the names {', '.join(known)}")
        if name not in known:
            here = hints.named_here(name, known)
            hint = f"; use {here!r}" if here else ""
            raise ValueError(f"`wrt` holds {_text(name)}, expected one or more of {', '.join(known)}{hint}")
        if name not in present:
            raise ValueError(f"`wrt` holds {name!r}, which was not given; expected one or more of {', '.join(present)}")
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
    wanted = f"a finite number{' above 0' if positive else ''}, also when rounded to {dtype}"
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
    digits = 53 if dtype == np.float64 else 24  # of the significand, in bits
    if size > 2**digits:
        raise ValueError(
            f"`{name}` is {size} pixels long along an axis, padding included, expected at most {2**digits}: "
            f"{coordinate_dtype(dtype)} represents integers exactly only up to 2**{digits}"
        )


def flag(name: str, value: Any) -> bool:
    """`value` as a bool; raises unless it is True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"`{name}` is {describe(value)}, expected True or False")
    return bool(value)
