"""What every operator must do, whatever it computes: tests written once, over a description of the operator.

How to add an operator. Its reference is naive/<name>.py with `forward` and `backward` (arguments as in the public ones;
`backward` may take `lower`, the sign of a lower tap's slope). Its test file describes it and derives a class:

    OPERATOR = family.Operator("roi_align", arrays=("x", "rois"), differentiable=("x",), linear=("x",), length=terms)

    class TestFamily(family.Family):
        operator = OPERATOR
        cases = {"one pixel": make_one_pixel, ...}  # dtype -> Problem; compared with the reference in both dtypes
        usual = staticmethod(make_usual)  # dtype -> Problem: small, every optional array given, all sizes above 1
        smooth = {...}  # dtype -> Problem: every coordinate further than STEP from a kink
        large = {...}  # dtype -> Problem: enough work for several threads; not compared with the reference
        wild = {...}  # dtype -> Problem: coordinates of every kind, run against guard pages, like the cases

The fixtures `backend` and `subject` of conftest.py use OPERATOR, so the file's other tests can use them too. Tests of
invalid calls common to all operators are in family_errors.py, added in the same way. Error bounds are those derived in
checks.py: eps * (ROUNDINGS + sqrt(number of terms)) * sum|terms|. The sum is what the reference gives for absolute
values of grad_y and of the arrays in which the operator is linear, with lower=+1 (slopes replaced by the sum of the
magnitudes), unless the operator has `magnitudes` of its own.
"""

import inspect
import math
import sys
from collections.abc import Callable
from typing import NamedTuple

import checks
import numpy as np
import pytest
from checks import LAYOUTS, ROUNDINGS, assert_close, assert_same_bits, dot, reference, run_python, threads_asked_for

DTYPES = [np.float32, np.float64]
STEP = 0.02  # for finite differences, in the units of the argument


class Operator(NamedTuple):
    name: str  # numdcn.<name>_forward and _backward, naive.<name>
    arrays: tuple  # the array arguments in call order, all positional, without grad_y
    differentiable: tuple  # those that have a gradient
    linear: tuple  # those in which y (without `added`) is linear: Euler and adjoint identities
    length: Callable  # Problem -> {name: number of terms in one element of "y" and of each gradient}
    added: tuple = ()  # those only added to y, such as a bias
    optional: tuple = ()  # those that may be None
    any_rank: tuple = ()  # those with any number of axes
    magnitudes: Callable | None = None  # Problem -> {name: sum|terms|}
    expected: Callable | None = None  # Problem -> {name: (value, bound)}, if the rules above give no bounds
    coordinates: tuple = ()  # those that may be float32 where the others are float16 or bfloat16
    keywords: tuple = ()  # those passed by keyword


class Problem(NamedTuple):
    operator: Operator
    arrays: dict  # by name; optional ones may be absent or None
    grad_y: np.ndarray
    params: dict  # the other arguments, by keyword

    @property
    def dtype(self):
        return self.grad_y.dtype

    def __getitem__(self, name):
        return self.grad_y if name == "grad_y" else self.arrays.get(name)

    def positional(self):
        return [self.arrays.get(name) for name in self.operator.arrays if name not in self.operator.keywords]

    def by_keyword(self):
        return {**{name: self.arrays.get(name) for name in self.operator.keywords}, **self.params}

    def forward(self, backend, **more):
        return backend.forward(*self.positional(), **self.by_keyword(), **more)

    def backward(self, backend, **more):
        return backend.backward(self.grad_y, *self.positional(), **self.by_keyword(), **more)

    def given(self):
        """The names of the arrays that are present."""
        return [name for name in self.operator.arrays if self.arrays.get(name) is not None]

    def wanted(self):
        """The names of the gradients that exist."""
        return [name for name in self.given() if name in self.operator.differentiable]

    def map(self, function):
        """The same problem with every array, grad_y included, replaced by function(name, array)."""
        arrays = {name: function(name, self.arrays[name]) for name in self.given()}
        return self._replace(arrays=arrays, grad_y=function("grad_y", self.grad_y))

    def holding(self, **values):
        """The same problem with arrays replaced by arbitrary values."""
        return self._replace(arrays={**self.arrays, **values})

    def having(self, **arrays):
        """The same problem with other arrays."""
        arrays = {name: np.asarray(a, self.dtype) if a is not None else None for name, a in arrays.items()}
        grad_y = arrays.pop("grad_y", self.grad_y)
        return self.holding(**arrays)._replace(grad_y=grad_y)


def table(make, cases):
    """{name: dtype -> Problem} of make(case, dtype) for each case, for the tables of a class derived from Family."""
    return {str(case): lambda dtype, case=case: make(case, dtype) for case in cases}


def outputs(result):
    """{name: array} of a forward's result: "y", or the fields of a tuple that are not None."""
    if isinstance(result, np.ndarray):
        return {"y": result}
    return {name: array for name, array in result._asdict().items() if array is not None}


def main(result):
    return outputs(result)["y"]


def blank(result, fill=np.nan, layout=np.ascontiguousarray):
    """An object shaped like a result, to be passed as `out`."""

    def like(array):
        return None if array is None else layout(np.full_like(array, fill))

    return like(result) if isinstance(result, np.ndarray) else type(result)(*map(like, result))


def expected(problem):
    """{name: (value, bound)} of every output and every gradient, from the reference; bounds as described above."""
    if problem.operator.expected is not None:
        return problem.operator.expected(problem)
    naive, operator = reference(problem.operator.name), problem.operator
    values = {**outputs(problem.forward(naive)), **outputs(problem.backward(naive))}
    sizes, length = (operator.magnitudes or magnitudes)(problem), operator.length(problem)
    info = np.finfo(problem.dtype)
    return {
        name: (value, info.eps * (ROUNDINGS + math.sqrt(length[name])) * np.abs(sizes[name]) + info.tiny)
        for name, value in values.items()
    }


def magnitudes(problem):
    operator, naive = problem.operator, reference(problem.operator.name)
    positive = problem.map(
        lambda name, array: np.abs(array) if name in (*operator.linear, *operator.added, "grad_y") else array
    )
    lower = {"lower": 1.0} if "lower" in inspect.signature(naive.backward).parameters else {}
    return {**outputs(positive.forward(naive)), **outputs(positive.backward(naive, **lower))}


def check_against_naive(backend, problem):
    """Forward and every gradient, into new memory and into arrays full of NaN; returns (result, gradients)."""
    want = expected(problem)
    result, g = problem.forward(backend), problem.backward(backend)
    for name, array in {**outputs(result), **outputs(g)}.items():
        assert array.dtype == problem.dtype, name
        assert_close(array, *want[name], name)
    assert list(outputs(g)) == [name for name in g._fields if name in problem.wanted()]
    for fresh, run in ((result, problem.forward), (g, problem.backward)):
        out = blank(fresh)
        again = run(backend, out=out)
        for name, array in outputs(again).items():
            assert array is outputs(out)[name], name
            if backend.gpu:
                assert_close(array, *want[name], f"{name} through out")
            else:
                assert_same_bits(array, outputs(fresh)[name], f"{name} through out")
    return result, g


def assert_same(a, b):
    """Two results or tuples of gradients have the same bits. A NaN's sign may differ: LLVM swaps operands at will."""
    a, b = outputs(a), outputs(b)
    assert a.keys() == b.keys()
    for name in a:
        assert_same_bits(*(np.where(np.isnan(c[name]), a[name].dtype.type("nan"), c[name]) for c in (a, b)), name)


def embedded(array, fill=None):
    """(a copy of array inside a buffer of 0xA5 bytes, a function that tells whether the rest is intact)"""
    raw = np.full(array.nbytes + 8192, 0xA5, np.uint8)
    start = 4096 + -raw.ctypes.data % array.itemsize
    view = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    view[...] = array if fill is None else fill
    return view, lambda: (raw[:start] == 0xA5).all() and (raw[start + array.nbytes :] == 0xA5).all()


class Joined:
    """Parametrises the tests of a derived class by its tables."""

    operator: Operator
    cases: dict = {}  # noqa: RUF012 - tables, never changed
    smooth: dict = {}  # noqa: RUF012
    large: dict = {}  # noqa: RUF012
    wild: dict = {}  # noqa: RUF012
    usual: Callable

    def pytest_generate_tests(self, metafunc):
        tables = {
            "case": self.cases,
            "smooth_case": self.smooth,
            "large_case": self.large,
            "odd_case": {"usual": type(self).usual, **self.wild},
            "layout": LAYOUTS,
            "dtype": {kind.__name__: kind for kind in DTYPES},
            "name": dict.fromkeys(self.operator.arrays),
            "input_name": dict.fromkeys(("grad_y", *self.operator.arrays)),
            "gradient": dict.fromkeys(self.operator.differentiable),
        }
        for argument in filter(tables.__contains__, metafunc.fixturenames):
            table = tables[argument]
            values = [key if value is None or argument == "layout" else value for key, value in table.items()]
            metafunc.parametrize(argument, values, ids=list(map(str, table)))


class Family(Joined):
    """Tests of arithmetic and of memory."""

    def test_against_naive(self, backend, case, dtype):
        check_against_naive(backend, case(dtype))

    def test_nan_in_the_output_gradient(self, backend, odd_case, dtype):
        """Ordinary arithmetic for all samples: outside, the value and its slopes are 0, and NaN times 0 is NaN."""
        p = odd_case(dtype)
        chosen = np.random.default_rng(3).random(p.grad_y.shape) < 0.1
        check_against_naive(backend, p.having(grad_y=np.where(chosen, np.nan, p.grad_y)))

    # Identities in float64, which hold to about 1e-12. They also run on the reference.

    def test_euler_identity(self, subject, smooth_case):
        """y is linear in each of `linear`, so <gradient, array> = <grad_y, y>, apart from the bias."""
        p = smooth_case(np.float64).having(**dict.fromkeys(self.operator.added))
        g, y = p.backward(subject), main(p.forward(subject))
        for name in set(self.operator.linear) & set(p.given()):
            near(dot(getattr(g, name), p[name]), dot(p.grad_y, y), np.abs(p.grad_y * y).sum())

    def test_adjoint_identity(self, subject, smooth_case):
        """For any u in place of a linear argument: <grad_y, forward(u)> = <gradient, u>."""
        p = smooth_case(np.float64).having(**dict.fromkeys(self.operator.added))
        g, rng = p.backward(subject), np.random.default_rng(1)
        for name in set(self.operator.linear) & set(p.given()):
            u = rng.normal(size=p[name].shape)
            y = main(p.having(**{name: u}).forward(subject))
            near(dot(p.grad_y, y), dot(getattr(g, name), u), np.abs(p.grad_y * y).sum())

    def test_finite_differences(self, subject, smooth_case):
        """Between kinks y is a polynomial of degree two at most in each array, so central differences are exact."""
        p, rng = smooth_case(np.float64), np.random.default_rng(2)
        g, scale = p.backward(subject), np.abs(p.grad_y).sum()

        def loss(name, moved):
            return dot(p.grad_y, main(p.having(**{name: p[name] + moved}).forward(subject)))

        for name in p.wanted():
            for direction in directions(rng, p[name].shape, 6):
                slope = (loss(name, STEP * direction) - loss(name, -STEP * direction)) / (2 * STEP)
                near(slope, dot(getattr(g, name), direction), 10 * scale)

    # Memory.

    def test_any_memory_layout(self, backend, layout):
        """The right numbers, with the bits of contiguous arrays."""
        p = self.usual(np.float32)
        laid = p.map(lambda _, array: LAYOUTS[layout](array))
        result, g = check_against_naive(backend, laid)
        assert_same(result, p.forward(backend))
        assert_same(g, p.backward(backend))

    def test_broadcast_arrays(self, backend):
        """Zero strides: the first entry of each array, repeated."""
        check_against_naive(backend, self.usual(np.float32).map(lambda _, a: np.broadcast_to(a[:1], a.shape)))

    def test_inputs_are_not_written(self, backend, layout):
        kept = self.usual(np.float32)
        p = kept.map(lambda _, array: LAYOUTS[layout](array))
        p.forward(backend)
        p.backward(backend)
        for name in ("grad_y", *p.given()):
            assert_same_bits(p[name], kept[name], name)

    @pytest.mark.parametrize("kind", ["strided", "reversed", "channels_last", "fortran", "shifted", "unaligned"])
    def test_out_of_any_layout(self, backend, kind):
        p = self.usual(np.float32)
        want = expected(p)
        for run in (p.forward, p.backward):
            out = blank(run(backend), layout=LAYOUTS[kind])
            for name, array in outputs(run(backend, out=out)).items():
                assert array is outputs(out)[name], name
                assert_close(array, *want[name], name)
                if kind == "strided":
                    gaps = np.ones(array.base.shape, bool)
                    gaps[(slice(None, None, 2),) * array.ndim] = False
                    assert np.isnan(array.base[gaps]).all(), f"written between the elements of {name}"

    def test_nothing_outside_the_arrays_is_written(self, backend, dtype):
        plain = self.usual(dtype)
        pairs = {name: embedded(plain[name]) for name in ("grad_y", *plain.given())}
        p, outs = plain.map(lambda name, _: pairs[name][0]), []
        for run in (p.forward, p.backward):
            out = blank(run(backend), layout=lambda array: outs.append(embedded(array)) or outs[-1][0])
            run(backend, out=out)
            assert not any(np.isnan(array).any() for array in outputs(out).values())
        assert all(intact() for _, intact in (*pairs.values(), *outs))

    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="protected pages are tested on Linux")
    @pytest.mark.full
    @pytest.mark.parametrize("end", ["before", "after"])
    def test_no_read_or_write_outside_the_arrays(self, end):
        """Every array touches an inaccessible page; a fault kills the process."""
        assert "all cases ran" in run_python(["-m", "guard_pages"], end, self.operator.name).stdout

    def test_wrt(self, backend):
        """Other requested gradients change no bit; those not requested are None, in `out` as well."""
        p = self.usual(np.float32)
        whole = p.backward(backend)
        names = p.wanted()
        assert_same(p.backward(backend, wrt=names), whole)
        assert not outputs(p.backward(backend, wrt=()))
        for first in names:
            assert_same(p.backward(backend, wrt=first), only(whole, [first]))
            for second in names:
                assert_same(p.backward(backend, wrt=(second, first)), only(whole, {first, second}))
        for name in names:
            out = only(blank(whole), [name])
            got = p.backward(backend, wrt=[name], out=out)
            assert getattr(got, name) is getattr(out, name)
            assert_same(got, only(whole, [name]))
            assert_same(p.backward(backend, out=out), whole)  # requested gradients not in out are allocated

    def test_absent_arrays_have_no_gradient(self, backend):
        p = self.usual(np.float32)
        for name in set(self.operator.optional) & set(self.operator.differentiable):
            check_against_naive(backend, p.having(**{name: None}))

    def test_the_large_cases_are_shared_out(self, backend, monkeypatch):
        """Some forward and some backward runs in several threads; otherwise the next test would prove nothing."""
        import numdcn

        asked, before = threads_asked_for(monkeypatch), numdcn.get_num_threads()
        problems = [make(np.float32) for make in self.large.values()]
        try:
            numdcn.set_num_threads(7)
            for direction in ("forward", "backward"):
                asked.clear()
                for p in problems:
                    getattr(p, direction)(backend)
                assert max(asked) >= 3, f"{direction}: {asked}"
        finally:
            numdcn.set_num_threads(before)

    def test_the_same_bits_for_any_number_of_threads(self, backend, large_case, dtype):
        """In every run."""
        p = large_case(dtype)
        first, *others = checks.with_threads(lambda: (p.forward(backend), p.backward(backend)), (1, 2, 7, 3, 2))
        for y, g in others:
            assert_same(y, first[0])
            assert_same(g, first[1])


def assert_images_are_independent(backend, problem, per_image):
    """The bits of an image's results do not depend on the contents or presence of other images.

    `per_image` names the arrays, besides the first and grad_y, whose first axis is that of the images.
    """
    x, result, g = problem.operator.arrays[0], main(problem.forward(backend)), outputs(problem.backward(backend))
    for n in (0, len(problem[x]) - 1):

        def others_spoilt(array, n=n):
            return np.where(
                np.arange(len(array)).reshape(-1, *[1] * (array.ndim - 1)) == n, array, array.dtype.type("nan")
            )

        for change, at in ((others_spoilt, n), (lambda array, n=n: array[n : n + 1], 0)):
            p = problem.map(lambda name, a, change=change: change(a) if name in (x, "grad_y", *per_image) else a)
            assert_same_bits(main(p.forward(backend))[at], result[n], "y")
            other = outputs(p.backward(backend))
            for name in (x, *per_image):
                assert_same_bits(other[name][at], g[name][n], f"gradient of {name}")


def near(a, b, scale=1.0):
    np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12 * scale)


def only(g, names):
    return type(g)(*(array if name in names else None for name, array in g._asdict().items()))


def directions(rng, shape, count):
    """A random direction, and `count` along single elements."""
    yield rng.uniform(-1, 1, shape)
    for at in rng.integers(0, math.prod(shape), count):
        direction = np.zeros(math.prod(shape))
        direction[at] = 1
        yield direction.reshape(shape)
