"""Gradients of images by bands of rows: tasks enough, of like cost, and no bit depends on where bands begin."""

import ctypes
from functools import partial

import band_kernels
import numpy as np
import pytest
from family import assert_same

import numdcn
from benchmarks.cases.operators import operator
from numdcn._cpu import bands, program, threads
from numdcn._cpu.roi import run, survey

SIZE = (37, 29)
BOXES = {  # boxes (x1, y1, x2, y2) of two images of SIZE
    "anywhere": lambda rng: rng.uniform(-9, 45, (40, 4)),
    "upright": lambda rng: np.sort(rng.uniform(-4, 41, (40, 2, 2)), axis=1).reshape(40, 4),
    "clustered": lambda rng: rng.uniform(0, 2, (40, 4)) + [3, 20, 12, 23],
    "last row": lambda rng: rng.uniform(0, 1.5, (40, 4)) + [3, 34, 28, 36],
    "first row": lambda rng: rng.uniform(-1, 0.5, (40, 4)) + [0, -2, 20, 1],
    "outside": lambda rng: rng.uniform(50, 60, (40, 4)),
    "huge": lambda rng: rng.choice([-1e9, 1e9], (40, 4)) * rng.uniform(0.5, 1, (40, 4)),
    "one over all": lambda rng: np.array([[-1, -1, 30, 38.0]]),
}
DIVISIONS = [
    {"TASKS": 1, "SUMS_BYTES": 1 << 30},  # one band, added to as a whole: what the others are compared with
    {"TASKS": 1000, "LEAST_ROWS": 1},  # bands of one row
    {"TASKS": 30, "LEAST_ROWS": 3},
    {"TASKS": 64, "SUMS_BYTES": 1},  # one row at a time
    {"TASKS": 8, "SUMS_BYTES": 30 * 16 * 4 * 7},  # five rows at a time, from bands of more
]


def boxes_of(kind, rng):
    """Boxes, with the numbers of their images."""
    corners = BOXES[kind](rng)
    return np.column_stack([rng.integers(2, size=len(corners)), corners]).astype(np.float32)


def roi_align_gradient(kind, channels, dtype):
    rng = np.random.default_rng(1)
    x, rois = np.empty((2, channels, *SIZE), dtype), boxes_of(kind, rng).astype(dtype)
    grad_y = rng.standard_normal((len(rois), channels, 3, 5)).astype(dtype)
    return partial(numdcn.roi_align_backward, grad_y, x, rois, (3, 5), 1.0, -1, True)


def deform_roi_pool_gradients(kind, channels, dtype):
    rng = np.random.default_rng(2)
    x, rois = rng.standard_normal((2, channels, *SIZE)).astype(dtype), boxes_of(kind, rng).astype(dtype)
    offsets = rng.standard_normal((len(rois), 2, 3, 5)).astype(dtype)
    offsets[0, 1, 1, 2] = np.nan
    mask = rng.standard_normal((len(rois), 1, 3, 5)).astype(dtype)
    grad_y = rng.standard_normal((len(rois), channels, 3, 5)).astype(dtype)
    return partial(numdcn.deform_roi_pool_backward, grad_y, x, rois, offsets, mask, output_size=(3, 5), gamma=0.4)


def bilinear_sample_gradients(kind, channels, dtype):
    rng = np.random.default_rng(3)
    x = rng.standard_normal((2, channels, *SIZE)).astype(dtype)
    points = {
        "in order": lambda: np.moveaxis(np.indices(SIZE), 0, -1) + rng.normal(0, 2, (2, *SIZE, 2)),
        "shuffled": lambda: rng.uniform(-2, 38, (2, 900, 2)),
        "in one row": lambda: rng.uniform(0, 1, (2, 900, 2)) * [0.9, 30] + [36, -1],
        "rows and borders": lambda: rng.integers(-2, 39, (2, 900, 2)) * 1.0,
        "NaN": lambda: rng.choice([np.nan, np.inf, -1e30, 5.5], (2, 300, 2)),
    }[kind]().astype(dtype)
    grad_y = rng.standard_normal((2, channels, *points.shape[1:-1])).astype(dtype)
    return partial(numdcn.bilinear_sample_backward, grad_y, x, points)


CALLS = [
    *((roi_align_gradient, kind) for kind in BOXES),
    *((deform_roi_pool_gradients, kind) for kind in BOXES),
    *((bilinear_sample_gradients, kind) for kind in ("in order", "shuffled", "in one row", "rows and borders", "NaN")),
]


@pytest.mark.parametrize("channels", [40, pytest.param(3, marks=pytest.mark.full)])
@pytest.mark.parametrize("dtype", [np.float32, pytest.param(np.float64, marks=pytest.mark.full)])
@pytest.mark.parametrize(("make", "kind"), CALLS, ids=lambda value: getattr(value, "__name__", value))
def test_no_bit_depends_on_the_bands(monkeypatch, make, kind, dtype, channels):
    call, want = make(kind, channels, dtype), None
    for division in DIVISIONS:
        monkeypatch.setattr(program, "_known", {})  # nothing is remembered
        for name, value in division.items():
            monkeypatch.setattr(bands, name, value)
        got = call()
        want = got if want is None else want
        assert_same(got, want)
    for count in (1, 2, 5):
        monkeypatch.setattr(program, "_known", {})
        monkeypatch.setattr(threads, "_threads", count)
        monkeypatch.setattr(threads, "_WORTH", 1.0)  # as many threads as tasks, however little there is to do
        assert_same(call(), want)


@pytest.mark.parametrize("make", [roi_align_gradient, deform_roi_pool_gradients])
def test_lists_that_do_not_fit_are_made_again(monkeypatch, make):
    call = make("upright", 5, np.float32)
    want, room = call(), survey.room_for_lists
    for entries in (8, 40, 0):  # for none, some of the boxes, none
        monkeypatch.setattr(program, "_known", {})
        monkeypatch.setattr(run, "room_for_lists", lambda *what, n=entries: (room(*what)[0], n))
        assert_same(call(), want)


def rows_of_bands(spans, image, size, count):
    """(bands, 2): where `count` bands of an image lie."""
    costs, result = np.empty(size[0] + 1, np.int64), np.empty((count, 2), np.int64)
    call = band_kernels.BandsCall(
        spans.ctypes.data, len(spans), image, size, count, costs.ctypes.data, result.ctypes.data
    )
    threads.launch(band_kernels.all_bands, np.float32(1), call, 1)
    return result


@pytest.mark.parametrize("count", [1, 2, 7, 16])
@pytest.mark.parametrize("rows", [(0, 100), (40, 45), (97, 100), (0, 1)])
def test_bands_share_the_cost(count, rows):
    """Each band has the cost of one of `count` equal parts, to within that of a row, and every row is in one band."""
    rng, height = np.random.default_rng(count), 100
    ends = np.sort(rng.integers(rows[0], rows[1] + 1, (300, 2)), axis=1)
    spans = np.column_stack([rng.integers(2, size=300), ends, rng.integers(1, 5000, 300)]).astype(np.int64)
    found = rows_of_bands(spans, 1, (height, 60), count)
    assert found[0, 0] == 0 and found[-1, 1] == height
    assert (found[1:, 0] == found[:-1, 1]).all()
    cost = np.full(height, bands.ROW_COST * 60)
    for image, first, end, each in spans:
        cost[first:end] += each * (image == 1)
    shares = np.array([cost[first:end].sum() for first, end in found])
    assert shares.max() <= cost.sum() / count + cost.max()


def tasks_of(name, case, direction):
    """The number of tasks of each launch of a call of the benchmark, by kernel."""
    one = operator(name)
    inputs = one.make_inputs(one.cases[case], 1, "float32", direction == "backward")
    contender = one.contender("numdcn")(1, False)
    contender.load(one.cases[case], None)
    given, found, real = contender.convert(inputs), {}, threads.run

    def counted(board, code, wide, values, counter, helpers):
        result = real(board, code, wide, values, counter, helpers)
        kernel = next(key[0].__name__ for key, value in threads._codes.items() if value[0] == code)
        found[kernel] = ctypes.c_int64.from_address(counter).value - 1
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threads, "run", counted)
        patch.setattr(threads, "_threads", 1)  # a helper that comes late takes no number
        getattr(contender, direction)(given)
    return found


TASKS = {  # of the kernels that take more than a twentieth of a call
    ("roi_align", "adaptive", "backward"): {"spread_bins": 64},
    ("deform_roi_pool", "boxes", "backward"): {"pack_images": 119, "bin_gradients": 512, "spread_bins": 64},
    ("roi_pool", "boxes", "backward"): {"add_at_maxima": 64},
    ("bilinear_sample", "N1", "backward"): {"pack_images": 128, "point_gradients": 586, "spread_points": 64},
    ("bilinear_sample", "N8", "backward"): {"pack_images": 256, "point_gradients": 296, "spread_points": 64},
    ("roi_align", "adaptive", "forward"): {"pack_images": 119, "pool_forward": 512},
    ("ps_roi_align", "adaptive", "forward"): {"planes_forward": 49},  # cells, which nothing divides for free
}


@pytest.mark.parametrize(("name", "case", "direction"), TASKS, ids=lambda value: value)
@pytest.mark.full
def test_the_benchmarks_have_tasks_for_many_cores(name, case, direction):
    found = tasks_of(name, case, direction)
    assert {kernel: found.get(kernel) for kernel in TASKS[name, case, direction]} == TASKS[name, case, direction]
