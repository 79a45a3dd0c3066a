"""Errors of numdcn on Dask arrays, which come while the graph is built; what its functions look like."""

import inspect
import pickle
import re

import numpy as np
import pytest

pytest.importorskip("dask.array", reason="dask is not installed: pip install 'dask[array,distributed]'")

import dask.array as da
from dask_cases import C_OUT, GEOMETRY, HO, NAMES, TAPS, WO, C, H, N, W, arrays, lazy, plain

import numdcn
from numdcn.adapters import _operators
from numdcn.adapters import dask as adapter

X, OFFSETS, WEIGHTS = (N, C, H, W), (N, 2 * TAPS, HO, WO), (C_OUT, C, 3, 3)
WRONG = [  # shapes of x, offsets, w, and other arguments
    (X, OFFSETS, WEIGHTS, {"padding": 1}),
    (X, OFFSETS, WEIGHTS, {"padding": -1}),
    (X, OFFSETS, WEIGHTS, {**GEOMETRY, "stride": 0.5}),
    (X, (N - 1, *OFFSETS[1:]), WEIGHTS, GEOMETRY),
    (X, (N, 17, HO, WO), WEIGHTS, GEOMETRY),
    (X[1:], OFFSETS, WEIGHTS, GEOMETRY),
    ((), OFFSETS, WEIGHTS, GEOMETRY),
    (X, OFFSETS, (C_OUT, 3, 3, 3), GEOMETRY),
    (X, WEIGHTS, OFFSETS, GEOMETRY),
    (X, OFFSETS, WEIGHTS, {**GEOMETRY, "mask": (N, TAPS, HO, WO + 1)}),
    (X, OFFSETS, WEIGHTS, {**GEOMETRY, "bias": (C_OUT + 1,)}),
]


@pytest.mark.parametrize("x, offsets, w, more", WRONG)
def test_errors_are_those_of_the_plain_function(x, offsets, w, more):
    given = {"x": x, "offsets": offsets, "w": w, **more}
    of_arrays = {"x", "offsets", "w", "mask", "bias"}
    plain_call = {key: np.zeros(value, np.float32) if key in of_arrays else value for key, value in given.items()}
    call = {
        key: da.zeros(value, dtype=np.float32, chunks=2) if key in of_arrays else value for key, value in given.items()
    }
    for way in ("forward", "backward"):
        grad_y = {"grad_y": np.zeros((N, C_OUT, HO, WO), np.float32)} if way == "backward" else {}
        with pytest.raises((TypeError, ValueError)) as right:
            plain("deform_conv", way, **grad_y, **plain_call)
        grad_y = {key: da.from_array(array) for key, array in grad_y.items()}
        with pytest.raises(type(right.value)) as made:
            getattr(adapter, {"forward": "deform_conv", "backward": "deform_conv_backward"}[way])(**grad_y, **call)
        assert str(made.value) == str(right.value)


@pytest.mark.parametrize("name", [op.name for op in _operators.operators()])
def test_the_checks_of_every_operator_need_no_numbers(name):
    from numdcn.warm import _small_calls

    op = _operators.operator(name)
    args, more = _small_calls(np.dtype(np.float32))[name]
    bound = inspect.signature(op.forward).bind(*args, **more)
    bound.apply_defaults()
    given = [bound.arguments[argument.name] for argument in op.arrays]
    shapes = [None if a is None else _operators.shaped(a.shape, a.dtype) for a in given]
    op.check(shapes, op.full_options(bound.arguments))
    for place, array in enumerate(shapes):
        if array is None:
            continue
        wrong = [*shapes]
        wrong[place] = _operators.shaped(array.shape[:-1], array.dtype)
        with pytest.raises(ValueError, match=f"`({'|'.join(argument.name for argument in op.arrays)})` has shape"):
            op.check(wrong, op.full_options(bound.arguments))


def test_grad_y_and_wrt_are_checked_at_once():
    given = arrays("deform_conv")
    call = {**lazy(given), **GEOMETRY}
    grad_y = da.zeros((N, C_OUT, HO, WO), dtype=np.float32)
    with pytest.raises(ValueError, match=r"`grad_y` has shape \(7, 3, 4, 3\), expected \(7, 3, 4, 4\)"):
        adapter.deform_conv_backward(grad_y[..., 1:], **call)
    with pytest.raises(TypeError, match="`grad_y` has dtype float64 but `x` has float32"):
        adapter.deform_conv_backward(grad_y.astype(float), **call)
    with pytest.raises(
        ValueError, match="`wrt` holds 'weight', expected one or more of x, offsets, w, bias, mask; use 'w'"
    ):
        adapter.deform_conv_backward(grad_y, **call, wrt="weight")
    with pytest.raises(ValueError, match="`wrt` holds 'bias', which was not given"):
        adapter.deform_conv_backward(grad_y, **{**call, "bias": None}, wrt="bias")


def test_unknown_sizes():
    given = lazy(arrays("conv"))
    some = given["x"][da.from_array(np.arange(N) % 2 == 0, chunks=2)]
    with pytest.raises(
        ValueError, match=r"`x` has shape \(nan, 4, 5, 6\), expected known sizes; use x.compute_chunk_sizes\(\)"
    ):
        adapter.conv(some, given["w"])
    some.compute_chunk_sizes()
    assert adapter.conv(some, given["w"]).shape[0] == 4


def test_arrays_of_the_wrong_kind():
    given = arrays("deform_conv")
    call = {**lazy(given), **GEOMETRY}
    with pytest.raises(
        TypeError, match=r"`offsets` is an ndarray .* expected a Dask array .* use dask.array.from_array\(offsets"
    ):
        adapter.deform_conv(**{**call, "offsets": given["offsets"]})
    with pytest.raises(TypeError, match=r"`w` is a PreparedWeights .* expected a NumPy or Dask array .*; use w.array"):
        adapter.deform_conv(**{**call, "w": numdcn.prepare_weights(given["w"])})
    with pytest.raises(TypeError, match="`w` is None, expected a NumPy or Dask array"):
        adapter.deform_conv(**{**call, "w": None})


@pytest.mark.parametrize("way", ["forward", "backward"])
def test_plain_functions_name_the_adapter(way):
    given = arrays("conv")
    x, w = lazy(given)["x"], given["w"]
    message = r"is a Dask array, which has no numbers yet; use numdcn.adapters.dask.conv, or array.compute\(\)"
    for args in ((x, w), (x, da.from_array(w)), (given["x"], da.from_array(w))):
        with pytest.raises(TypeError, match=rf"`(grad_y|x|w)` {message}"):
            plain("conv", way, *args[: way == "backward"], *args)


def test_plain_functions_over_boxes_have_no_adapter():
    with pytest.raises(TypeError, match=r"`x` is a Dask array, which has no numbers yet; use array.compute\(\)"):
        numdcn.roi_align_forward(lazy(arrays("conv"))["x"], np.zeros((1, 5), np.float32), 2)


def test_calls_that_do_not_fit():
    x, w = lazy(arrays("conv"))["x"], arrays("conv")["w"]
    with pytest.raises(TypeError, match="`groups` is not an argument of conv: it is inferred"):
        adapter.conv(x, w, groups=1)
    with pytest.raises(TypeError, match="`out` is not an argument of conv"):
        adapter.conv(x, w, out=None)
    with pytest.raises(TypeError, match="conv takes 3 arguments by position"):
        adapter.conv(x, w, None, 1)
    with pytest.raises(TypeError, match="conv: missing a required argument: 'w'"):
        adapter.conv(x)


@pytest.mark.parametrize("name", NAMES)
def test_functions_look_like_the_plain_ones(name):
    for function, own in ((getattr(adapter, name), "forward"), (getattr(adapter, f"{name}_backward"), "backward")):
        there = inspect.signature(getattr(numdcn, f"{name}_{own}")).parameters
        here = inspect.signature(function).parameters
        assert [(p.name, p.kind, p.default) for p in here.values()] == [
            (p.name, p.kind, p.default) for p in there.values() if p.name not in ("out", "allow_tf32", "deterministic")
        ]
        assert pickle.loads(pickle.dumps(function)) is function
        for parameter in here:
            assert re.search(rf"\b{parameter}\b.*: ", function.__doc__), f"{parameter} is not documented"
