"""Calls that are invalid for every operator: each must raise, naming the argument, what was given and what was
expected.

Used like family.Family: a class derived from Errors with `operator` and `usual`. What is specific to an operator
(its shapes, its parameters) goes into `wrong`, a table of (argument, replacement, exception, what was given,
what was expected); the last two are regular expressions. Its rows are tried on the forward and the backward.
"""

import numpy as np
import pytest
from checks import assert_message, read_only, rows, said
from family import Joined, blank, main, outputs


def swapped(array):
    return array.astype(array.dtype.newbyteorder("S"))


WRONG_KINDS = {  # for an array: replacement, exception, what was given, what was expected
    "list": (lambda a: a.tolist(), TypeError, "list", "array"),
    "tuple": (lambda a: (1.0, 2.0), TypeError, "tuple", "array"),
    "number": (lambda a: 3.0, TypeError, "float", "array"),
    "masked": (lambda a: np.ma.masked_array(a), TypeError, "MaskedArray", "array"),
    "uint16": (lambda a: a.astype(np.uint16), TypeError, "uint16", "float32"),  # the bits of a half type
    "int64": (lambda a: a.astype(np.int64), TypeError, "int64", "float32"),
    "complex64": (lambda a: a.astype(np.complex64), TypeError, "complex64", "float32"),
    "bool": (lambda a: a.astype(bool), TypeError, "bool", "float32"),
    "object": (lambda a: a.astype(object), TypeError, "object", "float32"),
    "byte order": (swapped, TypeError, ">f4|<f4|byte", "float32|native"),
    "float64 among float32": (lambda a: a.astype(np.float64), TypeError, "float64", "float32"),
}


class Errors(Joined):
    """Tests of invalid calls."""

    wrong = ()

    def pytest_generate_tests(self, metafunc):
        super().pytest_generate_tests(metafunc)
        if "row_value" in metafunc.fixturenames:
            metafunc.parametrize("row_name, row_value, error, came, wanted", rows(self.wrong))

    def raises(self, problem, backend, error, name, came, wanted, directions=("forward", "backward"), **more):
        """Both directions raise the right message, before anything is written."""
        right = self.usual(np.float32)
        for direction in directions:
            out = blank(getattr(right, direction)(backend), fill=7)
            with pytest.raises(error) as raised:
                getattr(problem, direction)(backend, **{"out": out, **more})
            assert_message(raised, name, came, wanted)
            for array in outputs(out).values():
                assert (array == 7).all(), "out was written before the error"

    def test_wrong_arguments(self, backend, row_name, row_value, error, came, wanted):
        p = self.usual(np.float32)
        if row_name in self.operator.arrays:
            p = p.holding(**{row_name: row_value})
        else:
            p = p._replace(params={**p.params, row_name: row_value})
        self.raises(p, backend, error, row_name, came, wanted)

    @pytest.mark.parametrize("kind", WRONG_KINDS)
    def test_wrong_kinds_of_arrays(self, backend, input_name, kind):
        p = self.usual(np.float32)
        change, error, came, wanted = WRONG_KINDS[kind]
        name, array = input_name, change(p[input_name])
        p = p._replace(grad_y=array) if name == "grad_y" else p.holding(**{name: array})
        self.raises(
            p, backend, error, name, came, wanted, ("backward",) if name == "grad_y" else ("forward", "backward")
        )

    def test_missing_arrays(self, backend, name):
        if name not in self.operator.optional:
            p = self.usual(np.float32).holding(**{name: None})
            self.raises(p, backend, TypeError, name, "None", "array")

    def test_wrong_numbers_of_axes(self, backend, input_name):
        if input_name in self.operator.any_rank:
            return
        plain = self.usual(np.float32)
        directions = ("backward",) if input_name == "grad_y" else ("forward", "backward")
        for array in (plain[input_name][0], plain[input_name][..., None]):
            p = plain.having(**{input_name: array})
            axes = rf"{plain[input_name].ndim} ax|{said(*plain[input_name].shape)}|\([A-Za-z]"
            self.raises(p, backend, ValueError, input_name, said(*array.shape), axes, directions)

    def test_wrong_shapes_of_the_output_gradient(self, backend):
        plain = self.usual(np.float32)
        for a in range(plain.grad_y.ndim):
            for array in (plain.grad_y.repeat(2, axis=a), plain.grad_y.take(range(plain.grad_y.shape[a] - 1), axis=a)):
                shapes = said(*array.shape), said(*plain.grad_y.shape)
                self.raises(plain.having(grad_y=array), backend, ValueError, "grad_y", *shapes, ("backward",))

    # wrt

    @pytest.mark.parametrize(
        "wrt, error, came",
        [("weight", ValueError, "weight"), ("grad_y", ValueError, "grad_y"), (("x", "y"), ValueError, "y")]
        + [(3, TypeError, "3|int"), (("x", 3), TypeError, "3|int"), (1.5, TypeError, r"1\.5|float")],
    )
    def test_wrong_wrt(self, backend, wrt, error, came):
        if isinstance(wrt, tuple):  # where x stands for the first array
            wrt = tuple(self.operator.differentiable[0] if name == "x" else name for name in wrt)
        wanted = rf"\b{self.operator.differentiable[-1]}\b" if error is ValueError else "name|str"
        self.raises(self.usual(np.float32), backend, error, "wrt", came, wanted, ("backward",), wrt=wrt)

    def test_arrays_without_gradient_in_wrt(self, backend):
        for name in set(self.operator.arrays) - set(self.operator.differentiable):
            first = self.operator.differentiable[0]
            self.raises(self.usual(np.float32), backend, ValueError, "wrt", name, first, ("backward",), wrt=name)

    def test_a_gradient_of_something_absent(self, backend):
        p = self.usual(np.float32)
        for name in set(self.operator.optional) & set(self.operator.differentiable):
            for wrt in (name, ("x", name), [name]):
                with pytest.raises(ValueError, match="wrt") as raised:
                    p.having(**{name: None}).backward(backend, wrt=wrt)
                assert_message(raised, "wrt", name, f"no {name} was given|absent|not given|missing")

    # out

    def test_wrong_out_of_the_forward(self, backend):
        p = self.usual(np.float32)
        right = p.forward(backend)
        for array, error, came, wanted in wrong_outs(main(right)):
            out = array if isinstance(right, np.ndarray) else blank(right)._replace(y=array)
            with pytest.raises(error) as raised:
                p.forward(backend, out=out)
            assert_message(raised, r"out(\.y)?", came, wanted)

    def test_wrong_out_of_the_backward(self, backend, gradient):
        p = self.usual(np.float32)
        right = p.backward(backend)
        with pytest.raises(TypeError) as raised:
            p.backward(backend, out=getattr(right, gradient))
        assert_message(raised, "out", "ndarray", type(right).__name__)
        for array, error, came, wanted in wrong_outs(getattr(right, gradient)):
            with pytest.raises(error) as raised:
                p.backward(backend, out=empty(right)._replace(**{gradient: array}))
            assert_message(raised, rf"out\.{gradient}", came, wanted)

    def test_an_out_for_something_not_wanted(self, backend, gradient):
        p = self.usual(np.float32)
        right = p.backward(backend)
        out = empty(right)._replace(**{gradient: np.full_like(getattr(right, gradient), 7)})
        others = tuple(name for name in self.operator.differentiable if name != gradient)
        with pytest.raises(ValueError, match="out") as raised:
            p.backward(backend, wrt=others, out=out)
        assert_message(raised, "out", gradient, "wrt|wanted|asked")
        assert (getattr(out, gradient) == 7).all()

    def test_forward_out_overlapping_an_input(self, backend, name):
        """Even by a single element; interleaved views of one buffer have no byte in common and are fine."""
        p = self.usual(np.float32)
        right = p.forward(backend)
        for shared in SHARED:
            array, out = overlapping(p[name], main(right), shared)
            moved = p.having(**{name: array})
            with pytest.raises(ValueError, match="overlap|share") as raised:
                moved.forward(backend, out=out if isinstance(right, np.ndarray) else blank(right)._replace(y=out))
            assert_message(raised, "out", name, "overlap|share")
            assert (array == p[name]).all()
        buffer = np.zeros(2 * max(p[name].size, main(right).size), np.float32)
        array, out = (buffer[k::2][: a.size].reshape(a.shape) for k, a in enumerate((p[name], main(right))))
        array[...] = p[name]
        p.having(**{name: array}).forward(
            backend, out=out if isinstance(right, np.ndarray) else blank(right)._replace(y=out)
        )
        assert (array == p[name]).all() and (out == main(right)).all()

    def test_backward_out_overlapping_an_input(self, backend, input_name, gradient):
        p = self.usual(np.float32)
        right = p.backward(backend)
        for shared in SHARED:
            array, out = overlapping(p[input_name], getattr(right, gradient), shared)
            with pytest.raises(ValueError, match="overlap|share") as raised:
                p.having(**{input_name: array}).backward(backend, out=empty(right)._replace(**{gradient: out}))
            assert_message(raised, "out", gradient, input_name)
            assert (array == p[input_name]).all()

    def test_backward_outs_overlapping_each_other(self, backend, gradient):
        p = self.usual(np.float32)
        right = p.backward(backend)
        for other in self.operator.differentiable:
            for shared in SHARED if other != gradient else ():
                a, b = overlapping(getattr(right, gradient), getattr(right, other), shared)
                with pytest.raises(ValueError, match="overlap|share") as raised:
                    p.backward(backend, out=empty(right)._replace(**{gradient: a, other: b}))
                assert_message(raised, "out", gradient, other)


def empty(g):
    return type(g)(*(None for _ in g))


def wrong_outs(right):
    """(an array that cannot be used in place of `right`, exception, what was given, what was expected)"""
    shape = right.shape
    for a in range(right.ndim):
        for other in (right.repeat(2, axis=a), right.take(range(shape[a] - 1), axis=a)):
            yield other, ValueError, said(*other.shape), said(*shape)
    yield right[..., 0], ValueError, said(*shape[:-1]), said(*shape)
    yield right.astype(np.float64), TypeError, "float64", "float32"
    yield [1.0], TypeError, "list", "array"
    for locked in (read_only(right), np.broadcast_to(np.float32(0), shape)):
        yield locked, ValueError, "read-only|readonly|not writ", "writ"
    one_place = np.lib.stride_tricks.as_strided(np.zeros(right.size, np.float32), shape, (0,) + right.strides[1:])
    yield one_place, ValueError, "share|overlap", "place|own"


SHARED = ("first", "last", "all")


def overlapping(array, out, shared):
    """A copy of `array` and room for `out` in one buffer, which share its first element, its last, or all of it."""
    buffer = np.zeros(array.size + out.size, np.float32)
    start, of_out = {"first": (out.size - 1, 0), "last": (0, array.size - 1), "all": (0, 0)}[shared]
    copy, room = buffer[start:][: array.size].reshape(array.shape), buffer[of_out:][: out.size]
    copy[...] = array
    return copy, room.reshape(out.shape)
