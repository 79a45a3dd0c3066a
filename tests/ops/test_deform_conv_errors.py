"""Every wrong call raises the right exception, whose message names the argument, what came and what was expected.

The table changes one thing in a call that is right; each row goes through the forward, the backward, or both. Nothing
is written before the error: `out` keeps its content.
"""

import numpy as np
import pytest
from checks import assert_message, rows, said

import numdcn

WRONG_TYPE, WRONG_VALUE = TypeError, ValueError
F32, F64 = np.float32, np.float64


def right():
    """The arguments of a right call: two groups, two offset groups, everything given."""
    rng = np.random.default_rng(0)
    shapes = {
        "grad_y": (2, 6, 6, 5),
        "x": (2, 4, 6, 5),
        "offsets": (2, 36, 6, 5),
        "w": (6, 2, 3, 3),
        "bias": (6,),
        "mask": (2, 18, 6, 5),
    }
    arrays = {name: rng.normal(size=shape).astype(F32) for name, shape in shapes.items()}
    return {**arrays, "stride": 1, "padding": 1, "dilation": 1}


def forward(call, **more):
    call = {**call, **more}
    call.pop("grad_y")
    return numdcn.deform_conv_forward(call.pop("x"), call.pop("offsets"), call.pop("w"), call.pop("bias"), **call)


def backward(call, **more):
    call = {**call, **more}
    first = [call.pop(name) for name in ("grad_y", "x", "offsets", "w", "bias")]
    return numdcn.deform_conv_backward(*first, **call)


def zeros(*shape, dtype=F32):
    return np.zeros(shape, dtype)


def swapped():
    return right()["x"].astype(">f4" if np.little_endian else "<f4")


# argument: what it becomes, the exception, what came, what was expected (regular expressions)
BOTH = [
    # not arrays, or not of a type that is computed with
    ("x", [[1.0]], WRONG_TYPE, "list", "ndarray|array"),
    ("x", None, WRONG_TYPE, "None", "ndarray|array"),
    ("offsets", (1.0, 2.0), WRONG_TYPE, "tuple", "ndarray|array"),
    ("w", 3.0, WRONG_TYPE, "float", "ndarray|array"),
    ("bias", [0.0] * 6, WRONG_TYPE, "list", "ndarray|array"),
    ("mask", 1.0, WRONG_TYPE, "float", "ndarray|array"),
    ("x", zeros(2, 4, 6, 5, dtype=np.float16), WRONG_TYPE, "float16", "float32"),
    ("x", zeros(2, 4, 6, 5, dtype=np.int64), WRONG_TYPE, "int64", "float32"),
    ("x", zeros(2, 4, 6, 5, dtype=np.complex64), WRONG_TYPE, "complex64", "float32"),
    ("x", zeros(2, 4, 6, 5, dtype=bool), WRONG_TYPE, "bool", "float32"),
    ("x", zeros(2, 4, 6, 5, dtype=object), WRONG_TYPE, "object", "float32"),
    ("x", swapped(), WRONG_TYPE, ">f4|<f4|byte", "float32|native"),
    ("offsets", zeros(2, 36, 6, 5, dtype=np.float16), WRONG_TYPE, "float16", "float32"),
    # a mixture of types
    ("x", zeros(2, 4, 6, 5, dtype=F64), WRONG_TYPE, "float64", "float32"),
    ("offsets", zeros(2, 36, 6, 5, dtype=F64), WRONG_TYPE, "float64", "float32"),
    ("w", zeros(6, 2, 3, 3, dtype=F64), WRONG_TYPE, "float64", "float32"),
    ("bias", zeros(6, dtype=F64), WRONG_TYPE, "float64", "float32"),
    ("mask", zeros(2, 18, 6, 5, dtype=F64), WRONG_TYPE, "float64", "float32"),
    # shapes
    ("x", zeros(4, 6, 5), WRONG_VALUE, said(4, 6, 5), r"4|\(n"),
    ("x", zeros(2, 4, 6, 5, 1), WRONG_VALUE, said(2, 4, 6, 5, 1), r"4|\(n"),
    ("w", zeros(6, 2, 3), WRONG_VALUE, said(6, 2, 3), r"4|\(c_out"),
    ("w", zeros(6, 3, 3, 3), WRONG_VALUE, "3", "4"),
    ("w", zeros(5, 2, 3, 3), WRONG_VALUE, "5", "2"),
    ("w", zeros(6, 2, 0, 3), WRONG_VALUE, said(6, 2, 0, 3), "1|positive|empty"),
    ("w", zeros(6, 0, 3, 3), WRONG_VALUE, said(6, 0, 3, 3), "1|positive|empty"),
    ("w", zeros(0, 2, 3, 3), WRONG_VALUE, said(0, 2, 3, 3), "1|positive|empty"),
    ("offsets", zeros(36, 6, 5), WRONG_VALUE, said(36, 6, 5), r"4|\(n"),
    ("offsets", zeros(2, 35, 6, 5), WRONG_VALUE, "35", "18"),
    ("offsets", zeros(2, 9, 6, 5), WRONG_VALUE, "9", "18"),
    ("offsets", zeros(2, 0, 6, 5), WRONG_VALUE, "0", "18"),
    ("offsets", zeros(2, 54, 6, 5), WRONG_VALUE, "54|3", "4"),
    ("offsets", zeros(1, 36, 6, 5), WRONG_VALUE, said(1, 36, 6, 5), "2"),
    ("offsets", zeros(2, 36, 6, 4), WRONG_VALUE, said(2, 36, 6, 4), r"6,\s*5"),
    ("offsets", zeros(2, 36, 4, 3), WRONG_VALUE, said(2, 36, 4, 3), r"6,\s*5"),
    ("bias", zeros(4), WRONG_VALUE, r"\(4,?\)", "6"),
    ("bias", zeros(6, 1), WRONG_VALUE, said(6, 1), r"\(6,?\)|1 ax"),
    ("mask", zeros(2, 9, 6, 5), WRONG_VALUE, said(2, 9, 6, 5), said(2, 18, 6, 5)),
    ("mask", zeros(2, 18, 6, 6), WRONG_VALUE, said(2, 18, 6, 6), said(2, 18, 6, 5)),
    ("mask", zeros(18, 6, 5), WRONG_VALUE, said(18, 6, 5), "4 axes|" + said(2, 18, 6, 5)),
    # parameters
    *((name, 1.0, WRONG_TYPE, r"1\.0", "int") for name in ("stride", "padding", "dilation")),
    *((name, True, WRONG_TYPE, "True|bool", "int") for name in ("stride", "padding", "dilation")),
    *((name, "1", WRONG_TYPE, "'1'|str", "int") for name in ("stride", "padding", "dilation")),
    *((name, None, WRONG_TYPE, "None", "int") for name in ("stride", "padding", "dilation")),
    *((name, (1, 1.5), WRONG_TYPE, r"1\.5", "int") for name in ("stride", "padding", "dilation")),
    *((name, (1, 1, 1), WRONG_VALUE, said(1, 1, 1), "2|two|axis") for name in ("stride", "padding", "dilation")),
    *((name, (), WRONG_VALUE, r"\(\)", "2|two|axis") for name in ("stride", "padding", "dilation")),
    *((name, 0, WRONG_VALUE, "0", "1|positive") for name in ("stride", "dilation")),
    *((name, (1, 0), WRONG_VALUE, "0", "1|positive") for name in ("stride", "dilation")),
    *((name, -2, WRONG_VALUE, "-2", "0|1|positive") for name in ("stride", "padding", "dilation")),
    ("padding", (1, -1), WRONG_VALUE, "-1", "0|negative"),
    ("padding", ((1, 1), (0, -1)), WRONG_VALUE, "-1", "0|negative"),
    ("padding", ((1, 1), (1, 1, 1)), WRONG_VALUE, said(1, 1, 1), "2|two|before"),
    ("padding", ((1, 1), (1, 2.5)), WRONG_TYPE, r"2\.5", "int"),
    ("padding", ((1, 1), (1, True)), WRONG_TYPE, "True", "int"),
    # no output pixel is left: the image is smaller than the kernel
    ("dilation", 9, WRONG_VALUE, "19|9", "8|1|output|fit"),
]
FORWARD = [
    ("out", [1.0], WRONG_TYPE, "list", "ndarray|array"),
    ("out", zeros(2, 6, 6, 4), WRONG_VALUE, said(2, 6, 6, 4), said(2, 6, 6, 5)),
    ("out", zeros(6, 6, 5), WRONG_VALUE, said(6, 6, 5), said(2, 6, 6, 5)),
    ("out", zeros(2, 6, 6, 5, dtype=F64), WRONG_TYPE, "float64", "float32"),
    ("out", np.broadcast_to(F32(0), (2, 6, 6, 5)), WRONG_VALUE, "read-only|readonly|not writ", "writ"),
    (
        "out",
        np.lib.stride_tricks.as_strided(zeros(90), (2, 6, 6, 5), (0, 4, 20, 4)),
        WRONG_VALUE,
        "share|overlap",
        "place|own",
    ),
]
BACKWARD = [
    ("grad_y", [1.0], WRONG_TYPE, "list", "ndarray|array"),
    ("grad_y", zeros(2, 6, 6, 5, dtype=F64), WRONG_TYPE, "float64", "float32"),
    ("grad_y", zeros(2, 6, 6, 4), WRONG_VALUE, said(2, 6, 6, 4), said(2, 6, 6, 5)),
    ("grad_y", zeros(2, 1, 6, 5), WRONG_VALUE, said(2, 1, 6, 5), said(2, 6, 6, 5)),
    ("grad_y", zeros(6, 6, 5), WRONG_VALUE, said(6, 6, 5), "4 axes|" + said(2, 6, 6, 5)),
    ("wrt", "weight", WRONG_VALUE, "weight", "offsets"),
    ("wrt", ("x", "y"), WRONG_VALUE, "y", "offsets"),
    ("wrt", "grad_y", WRONG_VALUE, "grad_y", "offsets"),
    ("wrt", 3, WRONG_TYPE, "3|int", "name|str"),
    ("wrt", ("x", 3), WRONG_TYPE, "3|int", "name|str"),
    ("out", zeros(2, 4, 6, 5), WRONG_TYPE, "ndarray", "DeformConvGradients"),
]


@pytest.mark.parametrize("name, value, error, came, expected", rows(BOTH + FORWARD))
def test_wrong_forward(name, value, error, came, expected):
    out = np.full((2, 6, 6, 5), 7, F32)
    with pytest.raises(error) as raised:
        forward(right(), **{"out": out, name: value})
    assert_message(raised, name, came, expected)
    assert (out == 7).all(), "out was written before the error"


@pytest.mark.parametrize("name, value, error, came, expected", rows(BOTH + BACKWARD))
def test_wrong_backward(name, value, error, came, expected):
    call = right()
    out = numdcn.DeformConvGradients(
        *(np.full_like(call[field], 7) if name != "wrt" or field == "x" else None for field in FIELDS)
    )
    with pytest.raises(error) as raised:
        backward(call, **{"out": out, name: value})
    assert_message(raised, name, came, expected)
    for field, array in zip(FIELDS, out, strict=True):
        assert array is None or (array == 7).all(), f"out.{field} was written before the error"


FIELDS = ("x", "offsets", "w", "bias", "mask")


def test_the_right_call_is_right():
    """So that every row above fails for the one thing that it changes."""
    call = right()
    assert forward(call, out=zeros(2, 6, 6, 5)).shape == (2, 6, 6, 5)
    assert backward(call)._fields == FIELDS
    whole = {"stride": np.int64(1), "padding": (np.int32(1), (1, 1)), "dilation": [1, 1]}
    plain = forward(call)
    for name, value in whole.items():
        if name != "padding":
            assert np.array_equal(forward(call, **{name: value}), plain), name
    assert np.array_equal(forward(call, padding=[[1, 1], [np.int64(1), 1]]), plain)


@pytest.mark.parametrize("name", FIELDS)
def test_backward_out_of_a_wrong_kind(name):
    call = right()
    shape = call[name].shape
    locked = zeros(*shape)
    locked.flags.writeable = False
    for array, error, came, expected in (
        (zeros(*shape[:-1], shape[-1] + 1), ValueError, said(*shape[:-1], shape[-1] + 1), said(*shape)),
        (zeros(*shape, dtype=F64), TypeError, "float64", "float32"),
        ([1.0], TypeError, "list", "ndarray|array"),
        (locked, ValueError, "read-only|readonly|not writ", "writ"),
    ):
        empty = numdcn.DeformConvGradients(None, None, None, None, None)
        with pytest.raises(error) as raised:
            backward(call, out=empty._replace(**{name: array}))
        assert_message(raised, rf"out\.{name}|{name}", came, expected)


@pytest.mark.parametrize("name", ["bias", "mask"])
def test_a_gradient_of_something_absent(name):
    for wrt in (name, ("x", name), [name]):
        with pytest.raises(ValueError, match="wrt") as raised:
            backward(right(), **{name: None}, wrt=wrt)
        assert_message(raised, name, name, f"no {name} was given|absent|not given|missing")


@pytest.mark.parametrize("name", FIELDS)
def test_an_out_for_something_not_wanted(name):
    call = right()
    other = "w" if name == "x" else "x"
    out = numdcn.DeformConvGradients(None, None, None, None, None)._replace(**{name: np.full_like(call[name], 7)})
    with pytest.raises(ValueError, match="out") as raised:
        backward(call, wrt=other, out=out)
    assert_message(raised, name, name, "wrt|wanted|asked")
    assert (getattr(out, name) == 7).all()


@pytest.mark.parametrize("name", FIELDS)
def test_forward_out_overlapping_an_input(name):
    """Also where only one element is shared, and where the two are interleaved views of one buffer."""
    call = right()
    y, array = zeros(2, 6, 6, 5), call[name]
    buffer = zeros(array.size + y.size - 1)
    for start in (0, array.size - 1):
        call[name] = buffer[: array.size].reshape(array.shape)
        out = buffer[start:][: y.size].reshape(y.shape)
        with pytest.raises(ValueError, match="overlap|share") as raised:
            forward(call, out=out)
        assert_message(raised, "out", name, "overlap|share")
    buffer = zeros(2 * max(array.size, y.size))
    call[name] = buffer[::2][: array.size].reshape(array.shape)
    forward(call, out=buffer[1::2][: y.size].reshape(y.shape))  # interleaved, yet no byte in common


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("field", FIELDS)
def test_backward_out_overlapping_an_input_or_another_out(name, field):
    call = right()
    empty = numdcn.DeformConvGradients(None, None, None, None, None)
    buffer = zeros(call[name].size + call[field].size - 1)
    first = buffer[: call[name].size].reshape(call[name].shape)
    last = buffer[-call[field].size :].reshape(call[field].shape)
    with pytest.raises(ValueError, match="overlap|share") as raised:
        backward({**call, name: first}, out=empty._replace(**{field: last}))
    assert_message(raised, "out", field, name)
    if name != field:
        with pytest.raises(ValueError, match="overlap|share") as raised:
            backward(call, out=empty._replace(**{name: first, field: last}))
        assert_message(raised, "out", field, name)


def test_backward_out_overlapping_the_output_gradient():
    call = right()
    empty = numdcn.DeformConvGradients(None, None, None, None, None)
    call["grad_y"] = zeros(2, 6, 6, 5)
    with pytest.raises(ValueError, match="overlap|share"):
        backward(call, out=empty._replace(x=call["grad_y"].reshape(-1)[:240].reshape(2, 4, 6, 5)))


def test_no_output_pixel_says_so():
    with pytest.raises(ValueError, match="output|fit|kernel"):
        numdcn.deform_conv_forward(zeros(1, 1, 2, 5), zeros(1, 18, 0, 3), zeros(1, 1, 3, 3))
