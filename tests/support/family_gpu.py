"""What every operator must do on a GPU: tests written once, on small problems, for Numba's simulator and for a real
GPU.

Used like family.Family, by a class in the operator's test file:

    class TestGPU(family_gpu.GPU):
        operator, usual = OPERATOR, staticmethod(make_tiny)
        cases = {"groups": make_groups, ...}  # few and tiny: the simulator runs Python, thread by thread
        full = TestFamily.cases  # of any size, for a real GPU
        errors = TestErrors  # the family_errors.Errors whose rows must be rejected as on the CPU

float16 and bfloat16 are compared with the reference for the same numbers in float32, within the bounds of halves.py.
"""

import functools
import itertools

import device
import numpy as np
import pytest
from checks import LAYOUTS, assert_close, assert_same_bits, cpu
from device import Host
from family import DTYPES, Joined, assert_same, blank, expected, magnitudes, main, only, outputs
from halves import HALVES, expected_of_narrow, half_types, halved


def message(call):
    """(type, text) of the exception that a call raises, without the way out, which is in the words of the arrays' framework."""
    with pytest.raises((TypeError, ValueError)) as raised:
        call()
    return raised.type, str(raised.value).partition("; use ")[0]


class GPU(Joined):
    """Tests of one operator; `gpu` is the simulator or a GPU."""

    errors = None
    full: dict = {}  # noqa: RUF012 - problems of any size, for a real GPU
    others: dict = {}  # noqa: RUF012 - problems like `usual` that take other ways through the library
    tf32 = False  # whether float32 products may be rounded, with allow_tf32
    rounds_terms = False  # whether narrow products are rounded before they are multiplied and added

    def pytest_generate_tests(self, metafunc):
        super().pytest_generate_tests(metafunc)
        if "typed" in metafunc.fixturenames:
            metafunc.parametrize("typed", self.in_turn(metafunc.function.__name__ == "test_backward"))
        if "half" in metafunc.fixturenames:
            metafunc.parametrize("half, coordinates", half_types(self.operator), ids=lambda kind: str(kind))
        if "full_case" in metafunc.fixturenames:
            full = [pytest.param(make, id=name, marks=pytest.mark.cuda) for name, make in self.full.items()]
            if not device.count_gpus():
                full = [pytest.param(None, id="none")]
            metafunc.parametrize("full_case", full)
        if "small" in metafunc.fixturenames:
            metafunc.parametrize("small", [self.usual, *self.others.values()], ids=["usual", *self.others])

    def in_turn(self, backward):
        """Parameters: each case in each type, as a function without arguments. The quick tier takes a case forward in one
        type and backward in the other."""
        pairs = itertools.product(enumerate(self.cases.items()), enumerate(DTYPES))
        return [
            pytest.param(
                functools.partial(make, dtype),
                id=f"{name}-{dtype.__name__}",
                marks=[pytest.mark.full] * ((row + column + backward) % 2),
            )
            for (row, (name, make)), (column, dtype) in pairs
        ]

    def expected(self, gpu, p):
        """{name: (value, bound)}; an operator whose results determine which gradients are right asks `gpu` for them."""
        return expected(p)

    def expected_of_narrow(self, gpu, narrow, wide):
        """The same for a problem in a narrow type, whose numbers `wide` has as float32."""
        return expected_of_narrow(narrow, wide, self.rounds_terms)

    def against(self, want, p, result):
        """A result has the right dtypes and values; `want` is as `expected` returns it."""
        for name, array in outputs(result).items():
            assert array.dtype == (p.dtype if name == "y" else p[name].dtype), name
            assert_close(array.astype(np.float64), *want[name], name)

    def through_out(self, want, p, run, fresh, **more):
        """A second call, into arrays full of NaN."""
        out = blank(fresh)
        again = run(out=out, **more)
        assert all(array is outputs(out)[name] for name, array in outputs(again).items())
        self.against(want, p, again)

    def both(self, gpu, p):
        want = self.expected(gpu, p)
        self.against(want, p, p.forward(gpu))
        self.against(want, p, p.backward(gpu))

    def test_forward(self, gpu, typed):
        p = typed()
        want, y = self.expected(gpu, p), p.forward(gpu)
        self.against(want, p, y)
        self.through_out(want, p, functools.partial(p.forward, gpu), y)

    def test_backward(self, gpu, typed):
        p = typed()
        want, g = self.expected(gpu, p), p.backward(gpu)
        assert list(outputs(g)) == [name for name in g._fields if name in p.wanted()]
        self.against(want, p, g)
        self.through_out(want, p, functools.partial(p.backward, gpu), g)

    def test_forward_in_half_precision(self, gpu, small, half, coordinates):
        narrow, wide = halved(small(np.float32), half, coordinates)
        want = self.expected_of_narrow(gpu, narrow, wide)
        self.against(want, narrow, narrow.forward(gpu))

    @pytest.mark.full
    @pytest.mark.parametrize("deterministic", [False, True])
    def test_backward_in_half_precision(self, gpu, small, half, coordinates, deterministic):
        narrow, wide = halved(small(np.float32), half, coordinates)
        want = self.expected_of_narrow(gpu, narrow, wide)
        self.against(want, narrow, narrow.backward(gpu, deterministic=deterministic))

    def test_all_sizes_on_a_real_gpu(self, full_case, dtype):
        """The CPU's cases: many blocks, all tiles."""
        if full_case is None:
            pytest.skip(device.missing("cuda"))
        p, gpu = full_case(dtype), device.on("cuda", self.operator.name)
        self.both(gpu, p)
        first = p.backward(gpu, deterministic=True)
        self.against(self.expected(gpu, p), p, first)
        assert_same(p.backward(gpu, deterministic=True), first)

    @pytest.mark.full
    def test_tf32(self, gpu, small):
        """Two factors of each product may lose half a unit of tf32; in float64 the flag changes nothing."""
        if not self.tf32:
            pytest.skip("this operator has no products that may be rounded to tf32")
        p = small(np.float32)
        sizes = (self.operator.magnitudes or magnitudes)(p)
        want = {name: (value, bound + 2.0**-10 * sizes[name]) for name, (value, bound) in self.expected(gpu, p).items()}
        for run in (p.forward, p.backward):
            result = run(gpu, allow_tf32=True)
            self.against(want, p, result)
            self.through_out(want, p, functools.partial(run, gpu), result, allow_tf32=True)
        double = small(np.float64)
        assert_same(double.forward(gpu, allow_tf32=True), double.forward(gpu))

    @pytest.mark.full
    def test_deterministic(self, gpu, small, dtype):
        """The same bits in every run, and numbers within the bounds."""
        p = small(dtype)
        first = p.backward(gpu, deterministic=True)
        self.against(self.expected(gpu, p), p, first)
        assert_same(p.backward(gpu, deterministic=True), first)
        for name in p.wanted():
            assert_same(p.backward(gpu, deterministic=True, wrt=name), only(first, [name]))

    @pytest.mark.full
    def test_deterministic_cases(self, gpu, case):
        p = case(np.float32)
        self.against(self.expected(gpu, p), p, p.backward(gpu, deterministic=True))

    @pytest.mark.full
    @pytest.mark.parametrize("kind", ["fortran", "channels_last", "strided", "reversed", "shifted", "read_only"])
    def test_any_memory_layout(self, gpu, kind):
        """Inputs with any strides, which are not written to."""
        kept = self.usual(np.float32)
        p = kept.map(lambda _, array: LAYOUTS[kind](array))
        want = self.expected(gpu, p)
        self.against(want, p, p.forward(gpu))
        self.against(want, p, p.backward(gpu, deterministic=True))
        for name in ("grad_y", *p.given()):
            assert_same_bits(p[name], kept[name], name)

    @pytest.mark.full
    def test_numbers_that_are_not_finite(self, gpu, small, input_name):
        """One NaN affects exactly what the formulas say, whatever is computed alongside it: another group, padding."""
        p = small(np.float32)
        if input_name in self.operator.coordinates or p[input_name] is None or input_name == "rois":
            return
        for at in (p[input_name][0].size // 2 - 1, p[input_name].size - 1):  # between groups, and at the end
            array = p[input_name].copy()
            array.reshape(-1)[at] = np.nan
            spoilt = p.having(**{input_name: array})
            want = self.expected(gpu, spoilt)
            if input_name != "grad_y":
                self.against(want, spoilt, spoilt.forward(gpu))
                if self.tf32:
                    rounded = {key: (value, 2**14 * bound) for key, (value, bound) in want.items()}
                    self.against(rounded, spoilt, spoilt.forward(gpu, allow_tf32=True))
            for deterministic in (False, True):
                self.against(want, spoilt, spoilt.backward(gpu, deterministic=deterministic))

    @pytest.mark.full
    def test_broadcast_arrays(self, gpu):
        self.both(gpu, self.usual(np.float32).map(lambda _, a: np.broadcast_to(a[:1], a.shape)))

    @pytest.mark.full
    @pytest.mark.parametrize("kind", ["strided", "reversed", "channels_last", "shifted"])
    def test_out_of_any_layout(self, gpu, kind):
        p = self.usual(np.float32)
        want = self.expected(gpu, p)
        results = [p.forward(gpu), p.backward(gpu)]
        for run, right in zip((p.forward, p.backward), results, strict=True):
            out = blank(right, layout=LAYOUTS[kind])
            for name, array in outputs(run(gpu, out=out)).items():
                assert array is outputs(out)[name], name
                assert_close(array, *want[name], name)
                if kind == "strided":
                    gaps = np.ones(array.base.shape, bool)
                    gaps[(slice(None, None, 2),) * array.ndim] = False
                    assert np.isnan(array.base[gaps]).all(), f"written between the elements of {name}"

    @pytest.mark.full
    def test_wrt(self, gpu):
        p = self.usual(np.float32)
        want, whole = self.expected(gpu, p), p.backward(gpu)
        assert not outputs(p.backward(gpu, wrt=()))
        for name in p.wanted():
            got = outputs(p.backward(gpu, wrt=name))
            assert list(got) == [name]
            assert_close(got[name], *want[name], name)
            out = only(blank(whole), [name])
            assert getattr(p.backward(gpu, out=out), name) is getattr(out, name)
            assert_close(getattr(out, name), *want[name], name)

    @pytest.mark.full
    def test_absent_arrays(self, gpu):
        p = self.usual(np.float32)
        for name in self.operator.optional:
            self.both(gpu, p.having(**{name: None}))

    # What is rejected.

    def test_the_messages_of_the_cpu(self, gpu):
        """What a row of `errors` makes invalid is rejected on a GPU with the same message as on the CPU."""
        if self.errors is None:
            pytest.skip("this operator's wrong calls are not told by rows")
        host, plain = cpu(self.operator.name), self.errors.usual(np.float32)
        for row_name, value, *_ in self.errors.wrong:
            if row_name in self.operator.arrays:
                p = on_gpu = plain.holding(**{row_name: value})
            else:
                p = plain._replace(params={**plain.params, row_name: value})
                kept = Host(value) if isinstance(value, np.ndarray) else value
                on_gpu = plain._replace(params={**plain.params, row_name: kept})
            checked = {"check": True} if "rois" in self.operator.arrays else {}
            for direction in ("forward", "backward"):
                want = message(lambda: getattr(p, direction)(host))  # noqa: B023 - called at once
                assert message(lambda: getattr(on_gpu, direction)(gpu, **checked)) == want, (row_name, value)  # noqa: B023

    def test_wrong_shapes_of_the_output_gradient(self, gpu):
        host, plain = cpu(self.operator.name), self.usual(np.float32)
        for axis in range(plain.grad_y.ndim):
            p = plain.having(grad_y=plain.grad_y.repeat(2, axis=axis))
            assert message(lambda: p.backward(gpu)) == message(lambda: p.backward(host))  # noqa: B023

    @pytest.mark.full
    def test_mixtures(self, gpu):
        """Arrays in both places: an error that names one of each, whichever it is."""
        plain = self.usual(np.float32)
        names = plain.given()
        if len(names) > 1:
            for name in names:
                p = plain.holding(**{name: Host(plain[name])})
                for run in (p.forward, p.backward):
                    with pytest.raises(ValueError, match=f"`{name}` is .* but `.*` is .*in one place"):
                        run(gpu)
        p, first = plain._replace(grad_y=Host(plain.grad_y)), self.operator.arrays[0]
        with pytest.raises(ValueError, match=f"`grad_y` is .* but `{first}` is .*in one place"):
            p.backward(gpu)
        host = plain.holding(**{name: Host(plain[name]) for name in names})
        with pytest.raises(ValueError, match=f"`grad_y` is .* but `{first}` is .*in one place"):
            host.backward(gpu)
        y, g = main(plain.forward(gpu)), plain.backward(gpu)
        with pytest.raises(ValueError, match="`out(.y)?` is .* but `.*` is .*in one place"):
            plain.forward(gpu, out=Host(y))
        out = only(g, [plain.wanted()[0]])
        with pytest.raises(ValueError, match=r"`out\..*` is .* but `.*` is .*in one place"):
            plain.backward(gpu, out=type(g)(*(a if a is None else Host(a) for a in out)))

    @pytest.mark.full
    def test_out_overlapping_an_input(self, gpu):
        """Overlap is detected on the device as on the host."""
        p, first = self.usual(np.float32), self.operator.arrays[0]
        y, array = main(p.forward(gpu)), p[first]
        buffer = np.zeros(array.size + y.size - 1, np.float32)
        x, room = buffer[: array.size].reshape(array.shape), buffer[array.size - 1 :].reshape(y.shape)
        x[...] = array
        with pytest.raises(ValueError, match=f"`out` overlaps `{first}`"):
            p.holding(**{first: x}).forward(gpu, out=room)
        g = p.backward(gpu, wrt=first)
        with pytest.raises(ValueError, match=rf"`out.{first}` overlaps `{first}`"):
            p.backward(gpu, out=only(g._replace(**{first: array}), [first]))


class RoIs:
    """For the operators over boxes, in addition to GPU."""

    def bad_rows(self):
        """(row, column, value) of boxes that are rejected when checked."""
        batch = len(self.usual(np.float32)["x"])
        yield from ((1, 0, value) for value in (batch, -1, 0.5, np.nan, np.inf, 1e30))
        yield from ((1, column, value) for column in (1, 4) for value in (np.nan, -np.inf))

    def test_bad_boxes(self, gpu, dtype):
        """With check=True the error of the CPU. Without it, such a row gives NaN and no gradient; the others are
        unaffected."""
        host, plain = cpu(self.operator.name), self.usual(dtype)
        want = self.expected(gpu, plain)
        for row, column, value in self.bad_rows():
            rois = plain["rois"].copy()
            rois[row, column] = value
            p = plain.having(rois=rois)
            right = message(lambda: p.forward(host))  # noqa: B023 - called at once
            assert message(lambda: p.forward(gpu, check=True)) == right  # noqa: B023
            assert message(lambda: p.backward(gpu, check=True)) == right  # noqa: B023
            y = main(p.forward(gpu, check=False))
            assert np.isnan(y[row]).all(), (column, value)
            good = np.arange(len(rois)) != row
            assert_close(y[good], *(part[good] for part in map(np.asarray, want["y"])), "y")
        rest = plain.having(grad_y=np.where(good.reshape(-1, 1, 1, 1), plain.grad_y, 0))
        want = self.expected(gpu, rest)
        for deterministic in (False, True):
            g = p.backward(gpu, deterministic=deterministic)
            assert_close(g.x, *want["x"], "x")
            for name in set(p.wanted()) - {"x"}:
                array = getattr(g, name)
                assert_close(array[good], *(part[good] for part in map(np.asarray, want[name])), name)
                assert (np.isnan(array[row]) | (array[row] == 0)).all(), name

    def test_good_boxes_pass_the_check(self, gpu):
        p = self.usual(np.float32)
        assert_close(main(p.forward(gpu, check=True)), *self.expected(gpu, p)["y"], "y")
        assert_close(p.backward(gpu, check=True).x, *self.expected(gpu, p)["x"], "x")

    @pytest.mark.parametrize("order", ["contiguous", "fortran", "strided", "reversed"])
    def test_boxes_are_checked_in_any_layout_and_type(self, gpu, order):
        """The host checks the right numbers, in narrow types too."""
        usual = self.usual(np.float32)
        batch = len(usual["x"])
        for p in (usual, *(halved(usual, dtype, dtype)[0] for dtype in HALVES.values())):
            rois = np.array(p["rois"])
            p.holding(rois=LAYOUTS[order](rois)).forward(gpu, check=True)
            rois[1, 0] = batch
            with pytest.raises(ValueError, match=rf"batch index {batch}\.0 in row 1, expected a whole number"):
                p.holding(rois=LAYOUTS[order](rois)).forward(gpu, check=True)

    def test_no_rois(self, gpu):
        p = self.usual(np.float32)
        none = p.map(lambda name, array: array if name == "x" else array[:0])
        assert main(none.forward(gpu)).shape == (0, *p.grad_y.shape[1:])
        g = none.backward(gpu)
        assert g.x.shape == p["x"].shape and not g.x.any()
