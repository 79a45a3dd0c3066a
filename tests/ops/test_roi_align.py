"""roi_align computes what docs/semantics.md says (c.2): against the reference, published vectors, and single rules."""

import pathlib

import family
import family_errors
import family_gpu
import family_halves
import numpy as np
import pytest
import roi_cases
from family import DTYPES, check_against_naive, main, near
from hypothesis import given
from roi_cases import LARGE, SEEDS, SIZES, SMOOTH, TINY, TINY_USUAL, USUAL, Case, grid_samples, laid_out, length, table
from roi_family import ALIGN, RoIFamily, cell

VECTORS = pathlib.Path(__file__).parents[1] / "vectors"
OPERATOR = family.Operator(
    "roi_align",
    arrays=("x", "rois"),
    differentiable=("x",),
    linear=("x",),
    length=length(grid_samples),
    coordinates=("rois",),
)


def make(case, dtype=np.float64, seed=None):
    return roi_cases.make(OPERATOR, case, dtype, seed)


def usual(dtype):
    return make(USUAL._replace(params={"sampling_ratio": 2}), dtype)


PARAMS = [
    {},
    {"aligned": True},
    {"sampling_ratio": 2},
    {"sampling_ratio": 1, "aligned": True},
    {"sampling_ratio": 3, "aligned": True},
    {"sampling_ratio": 0, "aligned": False},
]


class TestFamily(family.Family, RoIFamily):
    operator, make, usual = OPERATOR, staticmethod(make), staticmethod(usual)
    cases = table(make, [case._replace(params=PARAMS[n % len(PARAMS)]) for n, case in enumerate(SIZES)])
    cases |= table(make, [case._replace(params=params) for case in SIZES[-10:] for params in PARAMS[1:4]])
    smooth = table(make, [case._replace(params=params) for case in SMOOTH for params in PARAMS[:3]])
    wild = table(make, roi_cases.WILD)
    large = table(make, [LARGE, LARGE._replace(params={"sampling_ratio": 2})])


class TestHalfTypes(family_halves.HalfTypes):
    described = TestFamily


class TestErrors(family_errors.Errors):
    operator, usual = OPERATOR, staticmethod(usual)
    wrong = (
        *roi_cases.wrong(usual),
        *roi_cases.wrong_parameters(ints=("sampling_ratio",)),
        *(
            ("aligned", value, TypeError, came, "True|bool")
            for value, came in ((1, "1"), (None, "None"), ("no", "'no'"))
        ),
    )


class TestGPU(family_gpu.RoIs, family_gpu.GPU):
    operator, errors = OPERATOR, TestErrors
    usual = staticmethod(lambda dtype: make(TINY_USUAL._replace(params={"sampling_ratio": 2}), dtype))
    full = TestFamily.cases | TestFamily.wild
    cases = table(make, [case._replace(params=PARAMS[n % len(PARAMS)]) for n, case in enumerate(TINY)])


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    case=roi_cases.cases(sampling_ratio=[-1, 0, 1, 2, 3], aligned=[False, True]),
    seed=SEEDS,
    layouts=roi_cases.LAYOUT_NAMES,
)
def test_boxes_of_all_kinds(backend, dtype, case, seed, layouts):
    check_against_naive(backend, laid_out(make(case, dtype, seed), layouts))


# One sample at (y, x) of a 4 x 4 image: with aligned=True and one sample in one bin, in a box of one pixel.


def one_sample(y, x, dtype=np.float64, channels=3):
    case = Case(channels=channels, size=(4, 4), output=1, count=1, params={"sampling_ratio": 1, "aligned": True})
    return make(case, dtype).having(rois=[[0, x, y, x + 1, y + 1]])


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("at", ALIGN)
def test_values_along_an_axis(subject, at, axis):
    p = one_sample(*((at, 1.0) if axis == 0 else (1.0, at)))
    lines = p["x"][0, :, :, 1] if axis == 0 else p["x"][0, :, 1, :]
    near(main(p.forward(subject)).ravel(), [ALIGN[at](line)[0] for line in lines])
    weights = [ALIGN[at](line)[0] for line in np.eye(4)]
    want = np.zeros((3, 4, 4))
    want[(slice(None), slice(None), 1) if axis == 0 else (slice(None), 1)] = np.outer(p.grad_y, weights)
    near(p.backward(subject).x[0], want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [0, 1])
def test_just_inside_and_just_outside(subject, dtype, axis):
    for edge, beyond in ((-1, -2), (4, 5)):
        for at, inside in ((dtype(edge), True), (np.nextafter(dtype(edge), dtype(beyond)), False)):
            p = one_sample(*((at, 1) if axis == 0 else (1, at)), dtype)
            p["x"][...] = 3
            low = p["rois"][0, 2 - axis]  # where the sample is after rounding
            assert (low - dtype(0.5) + dtype(0.5) == edge) == inside, "the sample is not where this test wants it"
            assert (main(p.forward(subject)) == (3 if inside else 0)).all()
            assert p.backward(subject).x.any() == inside


@pytest.mark.parametrize("y", [-1.0, -0.5, 0.0, 1.0, 1.5, 3.0, 3.5, 4.0])
@pytest.mark.parametrize("x", [-0.25, 2.0, 3.75])
def test_only_the_pixels_of_the_cell_count(subject, y, x):
    """Pixels outside the cell may be NaN; a NaN in it counts, even with weight zero."""
    clean = one_sample(y, x)
    used = np.zeros((4, 4), bool)
    used[np.ix_(cell(y), cell(x))] = True
    others = clean.having(x=np.where(used, clean["x"], np.nan))
    near(main(others.forward(subject)), main(clean.forward(subject)))
    for row, col in np.argwhere(used):
        spoilt = clean["x"].copy()
        spoilt[:, :, row, col] = np.nan
        assert np.isnan(main(clean.having(x=spoilt).forward(subject))).all()
        near(clean.having(x=spoilt).backward(subject).x, clean.backward(subject).x)


def test_outside_is_zero_whatever_the_image_holds(subject):
    for y, x in ((-1.5, 1.0), (1.0, 4.5), (1e9, -1e9)):
        p = one_sample(y, x)
        p["x"][...] = np.nan
        assert not main(p.forward(subject)).any()


def test_samples_outside_count_in_the_divisor(subject):
    p = make(Case(channels=2, size=(4, 4), output=1, count=1, params={"sampling_ratio": 4, "aligned": True}))
    p["x"][...] = 1
    p = p.having(rois=[[0, -4, 0.5, 4, 4.5]])  # of four samples along x, at -3.5, -1.5, 0.5, 2.5, two are inside
    near(main(p.forward(subject)), np.full((1, 2, 1, 1), 0.5))
    near(p.backward(subject).x.sum(axis=(2, 3)), p.grad_y[:, :, 0, 0] / 2)


def test_adaptive_sampling_takes_a_sample_per_pixel(subject):
    """A box of 6 x 3 pixels in 2 x 3 bins: 3 x 1 samples each; one of 5 x 3 pixels too, at other positions."""
    for height in (6.0, 5.0):
        box, output = [[0, 1.0, 1.0, 4.0, 1.0 + height]], (2, 3)
        p = make(Case(channels=2, size=(9, 8), output=output, count=1)).having(rois=box)
        q = np.ceil(height / 2)
        rows = 1 + (np.arange(2)[:, None] + (np.arange(q) + 0.5) / q) * height / 2
        cols = 1 + np.arange(3) + 0.5
        low = np.floor(rows).astype(int)
        f = (rows - low)[:, :, None]
        left = np.floor(cols).astype(int)
        x = (p["x"][..., left] + p["x"][..., left + 1]) / 2
        want = ((1 - f) * x[:, :, low] + f * x[:, :, low + 1]).mean(axis=3)
        near(main(p.forward(subject)), want)


def test_empty_and_inverted_boxes(subject):
    """Adaptive and aligned: no samples, 0. Without alignment a box is at least one pixel long."""
    boxes = [[0, 2.0, 2.0, 2.0, 2.0], [0, 3.0, 1.0, 1.0, 4.0], [0, 4.0, 4.0, 1.0, 1.0]]
    p = make(Case(channels=2, count=3, params={"aligned": True})).having(rois=boxes)
    assert not main(p.forward(subject)).any() and not p.backward(subject).x.any()
    least = p._replace(params={**p.params, "aligned": False})
    grown = least.having(rois=[[0, 2, 2, 3, 3], [0, 3, 1, 4, 4], [0, 4, 4, 5, 5]])
    near(main(least.forward(subject)), main(grown.forward(subject)))
    near(least.backward(subject).x, grown.backward(subject).x)


def test_an_inverted_box_with_a_sampling_ratio_is_mirrored(subject):
    p = make(Case(channels=2, output=(1, 2), count=1, params={"sampling_ratio": 3, "aligned": True}))
    y = main(p.having(rois=[[0, 1.25, 1.5, 4.5, 5.25]]).forward(subject))
    mirrored = main(p.having(rois=[[0, 4.5, 1.5, 1.25, 5.25]]).forward(subject))
    near(mirrored, y[..., ::-1])


def test_affine_images_give_their_value_at_the_centre(subject):
    p = make(Case(size=(9, 10), output=(2, 3), count=1, params={"aligned": True})).having(
        rois=[[0, 1.25, 2.0, 8.5, 7.75]]
    )
    p["x"][0, 0] = np.add.outer(3 * np.arange(9), 5 * np.arange(10)) + 2.0
    rows = 2.0 - 0.5 + 5.75 * (np.arange(2) + 0.5) / 2
    cols = 1.25 - 0.5 + 7.25 * (np.arange(3) + 0.5) / 3
    near(main(p.forward(subject))[0, 0], np.add.outer(3 * rows, 5 * cols) + 2, 100)


def test_alignment_is_half_a_pixel(subject):
    p = make(Case(channels=2, boxes="inside", params={"sampling_ratio": 2}))
    rois = p["rois"].copy()
    rois[:, 3:] = rois[:, 1:3] + 2 + rois[:, 3:] / 2  # larger than a pixel, so that the minimum size does not matter
    shifted = rois + [0, 0.5, 0.5, 0.5, 0.5]
    aligned = p._replace(params={**p.params, "aligned": True}).having(rois=shifted)
    near(main(aligned.forward(subject)), main(p.having(rois=rois).forward(subject)))


# Published vectors.


def load(name):
    with np.load(VECTORS / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("aligned", [False, True])
def test_published_numbers_of_onnx(subject, aligned, dtype):
    """Printed to four digits."""
    v = load(f"onnx_roialign_aligned_{str(aligned).lower()}")
    rois = np.column_stack([v["batch_indices"], v["rois"]]).astype(dtype)
    output = int(v["output_height"]), int(v["output_width"])
    y = subject.forward(
        v["X"].astype(dtype), rois, output, float(v["spatial_scale"]), int(v["sampling_ratio"]), aligned
    )
    np.testing.assert_allclose(y, v["Y"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", range(3))
def test_published_numbers_of_mmcv(subject, case):
    v = load(f"mmcv_roi_align_case{case}")
    output = tuple(v["output_size"].tolist())
    more = output, float(v["spatial_scale"]), int(v["sampling_ratio"]), bool(v["aligned"])
    near(subject.forward(v["x"], v["rois"], *more), v["out"])
    near(subject.backward(v["grad_out"], v["x"], v["rois"], *more).x, v["grad_x"])


@pytest.mark.parametrize("channels", [1, 5, 17, 70])
def test_the_mean_of_a_whole_image_is_summed_row_by_row(backend, channels):
    """Once a running float32 sum has reached 2**24, adding 1 changes nothing: only the first row's ones may be lost."""
    side = 300
    x, rois = np.ones((1, channels, side, side), np.float32), np.array([[0, 0, 0, side, side]], np.float32)
    x[:, :, 0, 0] = 2.0**24
    y = backend.forward(x, rois, 1, aligned=True)  # a sample on each pixel
    total = 2.0**24 + side**2 - 1
    assert (np.abs(y * side**2 - total) <= side + 8 * np.finfo(np.float32).eps * total).all()
