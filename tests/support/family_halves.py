"""What every operator must do with float16 and bfloat16 on the CPU: tests written once, over the problems of its family.

Used by a class in the operator's test file, after its TestFamily:

    class TestHalfTypes(family_halves.HalfTypes):
        described = TestFamily

All arithmetic is float32's, so a result must have the bits of the same call in float32, rounded once. The float32 call
is the library's own; both are compared with the naive reference as well. A convolution's y in bfloat16 may have other
bits, if it is computed by dot products (tests/cpu/test_dot_products.py).
"""

import numpy as np
import pytest
from checks import LAYOUTS, assert_close, assert_message, assert_same_bits, with_threads
from family import Family, Joined, assert_same, blank, outputs
from halves import HALVES, expected_of_narrow, half_types, halved, multiplies_pairs

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)


class HalfTypes(Joined):
    described: type[Family]

    def __init_subclass__(cls):
        for name in ("operator", "cases", "large"):
            setattr(cls, name, getattr(cls.described, name))
        cls.usual = staticmethod(cls.described.usual)

    def pytest_generate_tests(self, metafunc):
        super().pytest_generate_tests(metafunc)
        if "coordinates" in metafunc.fixturenames:
            metafunc.parametrize("half, coordinates", half_types(self.operator), ids=str)
        elif "half" in metafunc.fixturenames:
            metafunc.parametrize("half", HALVES.values(), ids=str)

    def multiplies_pairs(self, narrow):
        """Whether y is computed by dot products."""
        return multiplies_pairs(narrow)

    def expected(self, backend, narrow, wide):
        """{name: (value, bound)} from the reference."""
        want = expected_of_narrow(narrow, wide)
        if self.multiplies_pairs(narrow):
            want["y"] = expected_of_narrow(narrow, wide, rounds_terms=True)["y"]
        return want

    def in_float32(self, backend, narrow, wide):
        """(result, gradients) of the same calls in float32, before they are rounded."""
        return wide.forward(backend), wide.backward(backend)

    def check_against_naive(self, backend, narrow, wide):
        want = self.expected(backend, narrow, wide)
        for result in (narrow.forward(backend), narrow.backward(backend)):
            for name, array in outputs(result).items():
                assert array.dtype == (narrow.dtype if name == "y" else narrow[name].dtype), name
                assert_close(array.astype(np.float64), *want[name], name)

    def test_against_naive(self, backend, half, coordinates):
        self.check_against_naive(backend, *halved(self.usual(np.float32), half, coordinates))

    @pytest.mark.full
    def test_all_cases_against_naive(self, backend, case, half, coordinates):
        self.check_against_naive(backend, *halved(case(np.float32), half, coordinates))

    def test_the_bits_of_float32_rounded_once(self, backend, half, coordinates):
        """Into new memory and into arrays full of NaN."""
        narrow, wide = halved(self.usual(np.float32), half, coordinates)
        with np.errstate(all="raise"):
            wanted = self.in_float32(backend, narrow, wide)
            for direction, right in zip(("forward", "backward"), wanted, strict=True):
                run = getattr(narrow, direction)
                made = run(backend)
                if direction == "backward" or not self.multiplies_pairs(narrow):
                    assert_rounded(made, right)
                out = blank(made)
                again = run(backend, out=out)
                assert all(array is outputs(out)[name] for name, array in outputs(again).items())
                assert_same(again, made)

    @pytest.mark.parametrize("kind", list(HALVES))
    def test_any_memory_layout(self, backend, layout, kind):
        """The bits of contiguous arrays; nothing is written between the elements of a result."""
        p = halved(self.usual(np.float32), HALVES[kind], HALVES[kind])[0]
        laid = p.map(lambda _, array: LAYOUTS[layout](array))
        for run, other in ((p.forward, laid.forward), (p.backward, laid.backward)):
            right = run(backend)
            assert_same(other(backend), right)
            out = blank(right, layout=LAYOUTS[layout]) if layout != "read_only" else blank(right)
            for name, array in outputs(run(backend, out=out)).items():
                assert array is outputs(out)[name], name
                assert_same_bits(array, outputs(right)[name], name)
                if layout == "strided":
                    gaps = np.ones(array.base.shape, bool)
                    gaps[(slice(None, None, 2),) * array.ndim] = False
                    assert np.isnan(array.base[gaps].astype(F32)).all(), f"written between the elements of {name}"

    def test_broadcast_arrays(self, backend, half):
        """Zero strides, as of an array whose shape alone is read."""
        p = halved(self.usual(np.float32), half, half)[0]
        repeated = p.map(lambda _, array: np.broadcast_to(array[:1], array.shape))
        whole = repeated.map(lambda _, array: array.copy())
        assert_same(repeated.forward(backend), whole.forward(backend))
        assert_same(repeated.backward(backend), whole.backward(backend))

    @pytest.mark.full
    def test_the_same_bits_for_any_number_of_threads(self, backend, large_case, half):
        p = halved(large_case(np.float32), half, half)[0]
        first, *others = with_threads(lambda: (p.forward(backend), p.backward(backend)), (1, 2, 7))
        for y, g in others:
            assert_same(y, first[0])
            assert_same(g, first[1])

    def test_mixtures_of_types(self, backend, half):
        """An array in another type is named, with its type and the type that was expected."""
        plain = self.usual(np.float32)
        p, names = halved(plain, half, half)[0], plain.given()
        others = [F64, *(kind for kind in HALVES.values() if kind != half)]
        for name in (*names[1:], "grad_y"):
            for other in others if name in self.operator.coordinates else [*others, F32]:
                array = plain[name].astype(other)
                mixed = p._replace(grad_y=array) if name == "grad_y" else p.holding(**{name: array})
                with pytest.raises(TypeError) as raised:
                    mixed.backward(backend)
                assert_message(raised, name, str(other), str(half))
        for name in names[1:]:  # float32 is not to be rounded
            with pytest.raises(TypeError) as raised:
                plain.holding(**{name: plain[name].astype(half)}).forward(backend)
            assert_message(raised, name, str(half), "float32")


def assert_rounded(made, right):
    """Results have the bits of float32 ones, rounded by NumPy."""
    made, right = outputs(made), outputs(right)
    assert made.keys() == right.keys()
    for name, array in made.items():
        assert right[name].dtype == F32
        with np.errstate(all="ignore"):
            rounded = right[name].astype(array.dtype)
        assert_same_bits(array, rounded, name)
