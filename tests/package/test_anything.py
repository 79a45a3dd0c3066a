"""Whatever a caller may give for an argument is taken, or refused with an error that names the argument."""

import inspect
import re

import numpy as np
import pytest

import numdcn
from numdcn.warm import OPERATORS, _small_calls

SMALL_CALLS = _small_calls(np.dtype(np.float32))


class Broken:
    """What says that it is on a GPU, but not where."""

    __cuda_array_interface__ = {}  # noqa: RUF012


NOTHING = [
    *("", "x", b"x", None, True, np.True_, 1.5, np.nan, np.inf, 1j, -1, 0, 2**31, -(2**31) - 1, 2**63, 10**30, 10**5000),
    *((), [], {}, set(), [None], [[]], [1, [2]], (1, 1, 1), ((1, 1), 1), {"x": 1}, range(2), iter(()), object(), object),
    *(np.float32(1), np.int64(-1), np.float16(2), np.array(1), np.array(1.5), np.array("x"), np.array([]), np.array([1, 1])),
    *(np.array(None), np.array([None, "x"]), np.zeros((1, 1, 1, 1), object), np.zeros(2, "f4,i4"), np.zeros((2, 2), "M8[s]")),
    *(np.asmatrix(np.ones((2, 5), np.float32)), np.asmatrix(np.ones((2, 4), np.float32)), np.asmatrix([[0.5]])),
    *(np.ma.masked, np.ma.masked_array([1.0]), np.ndarray, np.dtype("f4"), Broken(), print, ...),
    *(np.empty((0, 0, 0, 0), np.float32), np.empty((0, 5), np.float32), np.full((1, 5), np.nan, np.float32)),
]  # fmt: skip
DIRECTIONS = [(name, way) for name in OPERATORS for way in ("forward", "backward")]


def arguments(operator, way):
    """The names of all arguments, and those of a small call."""
    names = list(inspect.signature(getattr(numdcn, f"{operator}_{way}")).parameters)
    arrays, more = SMALL_CALLS[operator]
    if way == "backward":
        y = getattr(numdcn, f"{operator}_forward")(*arrays, **more)
        arrays = (getattr(y, "y", y), *arrays)
    return names, {**dict(zip(names, arrays)), **more}


@pytest.mark.parametrize("operator, way", DIRECTIONS)
def test_anything_for_anything(operator, way):
    """It is taken, or refused by its name."""
    function = getattr(numdcn, f"{operator}_{way}")
    names, usual = arguments(operator, way)
    for name in names:
        for value in NOTHING:
            refused_by_name(function, name, value, usual)


OTHERS = {
    numdcn.prepare_weights: {"w": np.ones((2, 3, 1, 1), np.float32), "groups": 1},
    numdcn.set_num_threads: {"n": 2},
    numdcn.set_scratch_limit: {"nbytes": 2**26},
    numdcn.deform_conv_layer_init: {
        **dict.fromkeys(("in_channels", "out_channels", "kernel_size", "groups", "offset_groups"), 1),
        "modulated": False, "bias": True, "dtype": "f4", "seed": 0,
    },
    numdcn.warmup: {"dtype": "f4", "backward": False, "operators": ()},
}  # fmt: skip


@pytest.mark.parametrize("function", OTHERS, ids=lambda function: function.__name__)
def test_anything_for_other_functions(function):
    threads, limit = numdcn.get_num_threads(), numdcn.get_scratch_limit()
    try:
        for name in OTHERS[function]:
            for value in NOTHING:
                refused_by_name(function, name, value, OTHERS[function])
    finally:
        numdcn.set_num_threads(threads)
        numdcn.set_scratch_limit(limit)


def refused_by_name(function, name, value, usual):
    try:
        function(**{**usual, name: value})
    except (TypeError, ValueError) as error:  # of two arrays that do not fit each other it may name the other one
        names = inspect.signature(function).parameters if isinstance(value, np.ndarray) else [name]
        assert re.search(rf"`({'|'.join(names)})\b", str(error)), f"{name}={value!r:.40}: {error}"
    except Exception as error:
        raise AssertionError(f"{name}={value!r:.40} raised {error!r}") from error
