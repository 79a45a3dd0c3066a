"""What every RoI operator must do, in addition to what every operator must (family.py, family_errors.py).

The rules align and psroi are tabulated here along one axis of four pixels, for the tests of the operators that sample.
"""

import itertools

import numpy as np
import pytest
from checks import assert_close, threads_asked_for
from family import check_against_naive, expected, main, near, outputs
from roi_cases import Case

HUGE = [-3e38, -1e30, -(2.0**31), 0.0, 3.0, 2.0**31, 2.0**63, 1e30, 3e38]

# p -> (value, slope), by the tables of the rules align and psroi (docs/semantics.md, a.2).
ALIGN = {
    -1.25: lambda v: (0, 0),
    -1.0: lambda v: (v[0], 0),
    -0.5: lambda v: (v[0], 0),
    0.0: lambda v: (v[0], v[1] - v[0]),
    1.0: lambda v: (v[1], v[2] - v[1]),
    1.25: lambda v: (0.75 * v[1] + 0.25 * v[2], v[2] - v[1]),
    2.0: lambda v: (v[2], v[3] - v[2]),
    3.0: lambda v: (v[3], 0),
    3.5: lambda v: (v[3], 0),
    4.0: lambda v: (v[3], 0),
    4.25: lambda v: (0, 0),
}
PSROI = {
    -0.75: lambda v: (0, 0),
    -0.5: lambda v: (v[0], 0),
    -0.25: lambda v: (v[0], 0),
    **{p: ALIGN[p] for p in (0.0, 1.0, 1.25, 2.0, 3.0)},
    3.25: lambda v: (v[3], 0),
    3.5: lambda v: (v[3], 0),
    3.75: lambda v: (0, 0),
}


def cell(p):
    """The pixels of four that a sample at p uses, even with weight 0: one list for align and psroi."""
    low = max(int(np.floor(p)), 0)
    return [3] if low >= 3 else [low, low + 1]


class RoIFamily:
    """Used like family.Family; `make` is the file's function from a roi_cases.Case to a Problem."""

    make = None

    def given_rois(self, rois, dtype=np.float64, case=None):
        """A problem with these boxes."""
        case = Case(batch=2, channels=3, size=(6, 5), output=(2, 3)) if case is None else case
        return self.make(case._replace(count=len(rois)), dtype).having(rois=np.array(rois, dtype).reshape(-1, 5))

    def test_huge_boxes(self, backend, dtype):
        """Nothing crashes, hangs or overflows, and what is far away adds nothing."""
        corners = itertools.product(HUGE, repeat=2)
        boxes = [(1, *low, *high) for low in corners for high in itertools.product(HUGE[::2], repeat=2)]
        p = self.given_rois(boxes, dtype)
        for name, array in {**outputs(p.forward(backend)), **outputs(p.backward(backend))}.items():
            assert np.isfinite(array).all(), name
        outside = self.given_rois([(0, 1e30, 1e30, 2e30, 3e38), (1, -3e38, 2.0, -1e30, 3.0)], dtype)
        for name, array in {**outputs(outside.forward(backend)), **outputs(outside.backward(backend))}.items():
            assert not array.any(), name

    @pytest.mark.parametrize("scale", [1.0, 1 / 16, 1e3, 1e-30, 1e30])
    def test_huge_boxes_against_naive(self, backend, dtype, scale):
        """Corners of all magnitudes. Positions are rounded in the order the formulas are written, even where that
        matters."""
        rng, case = np.random.default_rng(0), Case(batch=2, channels=3, size=(6, 5), output=(2, 3), scale=scale)
        corners = rng.choice([*HUGE, -1e5, -1000, -7, -1, 0.5, 2, 4, 100, 1e4], (30, 4))
        check_against_naive(backend, self.given_rois(np.column_stack([rng.integers(0, 2, 30), corners]), dtype, case))

    def test_rois_are_independent(self, subject):
        p = self.make(Case(batch=3, channels=4, size=(7, 6), count=9, scale=0.5))
        y, g = main(p.forward(subject)), p.backward(subject)
        order = np.random.default_rng(0).permutation(9)
        per_roi = [name for name in p.given() if name != "x"]
        mixed = p.having(grad_y=p.grad_y[order], **{name: p[name][order] for name in per_roi})
        near(main(mixed.forward(subject)), y[order])
        near(mixed.backward(subject).x, g.x)
        for name in set(p.wanted()) - {"x"}:
            near(getattr(mixed.backward(subject), name), getattr(g, name)[order])

    def test_equal_rois_add_up(self, subject):
        p = self.make(Case(batch=2, channels=3, size=(7, 6), count=4))
        twice = p.map(lambda name, array: array if name == "x" else np.concatenate([array, array]))
        near(twice.backward(subject).x, 2 * p.backward(subject).x)

    def test_other_images_do_not_matter(self, subject):
        """NaN in images that no RoI uses affects nothing, and their gradient is 0."""
        p = self.make(Case(batch=4, channels=3, size=(7, 6), count=6))
        p["rois"][:, 0] = [0, 2, 2, 0, 2, 0]
        x = p["x"].copy()
        x[[1, 3]] = np.nan
        spoilt = p.having(x=x)
        near(main(spoilt.forward(subject)), main(p.forward(subject)))
        for name, array in outputs(spoilt.backward(subject)).items():
            near(array, getattr(p.backward(subject), name))
        assert not p.backward(subject).x[[1, 3]].any()

    def test_nan_pixels_and_gradients(self, backend, dtype):
        """They affect exactly the results that the formulas say."""
        rng = np.random.default_rng(3)
        p = self.make(Case(batch=2, channels=5, size=(7, 6), output=3, count=12, scale=0.5), dtype)
        x, grad_y = p["x"].copy(), p.grad_y.copy()
        x[rng.random(x.shape) < 0.03] = np.nan
        grad_y[rng.random(grad_y.shape) < 0.02] = np.nan
        assert_close(main(p.having(x=x).forward(backend)), *expected(p.having(x=x))["y"], "y")
        for spoilt in (p.having(x=x), p.having(grad_y=grad_y)):
            g, want = spoilt.backward(backend), expected(spoilt)
            assert_close(g.x, *want["x"], "x")

    def test_no_rois(self, subject):
        for batch in (0, 2):
            p = self.make(Case(batch=batch, channels=3, count=0))
            assert main(p.forward(subject)).shape == (0, 3, 2, 2)
            assert not p.backward(subject).x.any() and p.backward(subject).x.shape == p["x"].shape

    def test_forms_of_parameters(self, backend):
        """An int for both axes, NumPy numbers, lists: the same result."""
        p = self.make(Case(batch=2, channels=3, output=(2, 2), count=4))
        y = main(p.forward(backend))
        for output, scale in (
            (2, 1),
            ([2, 2], np.float32(1)),
            ((np.int64(2), 2), np.float64(1)),
            (np.int32(2), np.int64(1)),
        ):
            again = p._replace(params={**p.params, "output_size": output, "spatial_scale": scale})
            assert np.array_equal(main(again.forward(backend)), y)

    def test_large_problems_are_shared_out(self, backend, large_case, monkeypatch):
        """They are enough work for several threads in both directions; otherwise the test of threads would prove
        nothing."""
        import numdcn

        asked, before = threads_asked_for(monkeypatch), numdcn.get_num_threads()
        numdcn.set_num_threads(7)
        try:
            for direction in (large_case(np.float32).forward, large_case(np.float32).backward):
                asked.clear()
                direction(backend)
                assert max(asked) >= 2, f"{direction.__name__}: {asked}"
        finally:
            numdcn.set_num_threads(before)
