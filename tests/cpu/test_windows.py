"""A convolution's backward in groups of taps and regions: what the windows of an image add up to, wherever samples are."""

import ctypes

import numpy as np
import pytest
from checks import assert_same_bits, with_threads

import numdcn
from numdcn._call.convolution import Convolution
from numdcn._cpu import program, threads
from numdcn._cpu.conv import backward_blocking, run
from numdcn._cpu.conv.windows import PlacingCall
from numdcn._cpu.parameters import _length

# batch, channels, height, width, outputs, offset groups, standard deviation of offsets, options
CASES = {
    "near": (1, 32, 40, 47, 16, 1, 0.5, {}),
    "offset groups of 8": (2, 32, 20, 17, 16, 4, 0.5, {}),
    "offset groups of 4": (1, 16, 23, 21, 8, 4, 0.5, {}),
    "anywhere": (1, 16, 25, 12, 8, 4, 30.0, {}),
    "one image anywhere": (2, 16, 41, 40, 8, 1, 0.5, {}),
    "far but together": (1, 16, 40, 41, 8, 1, 0.5, {}),
    "stride": (1, 8, 21, 21, 4, 1, 0.5, {"stride": 2, "dilation": 2}),
    "one column": (1, 4, 40, 1, 3, 1, 0.5, {}),
    "one row": (1, 4, 1, 300, 3, 1, 0.5, {}),
    "outside": (1, 8, 16, 16, 4, 1, 0.0, {"padding": 30}),
    "groups": (1, 24, 18, 19, 6, 1, 0.5, {"groups": 3}),
    "depthwise": (1, 20, 18, 19, 20, 1, 0.5, {"groups": 20}),
    "plain": (1, 20, 30, 11, 8, 0, 0.0, {"dilation": 2}),
}
CUTS = [(1, 3, 2), (3, 1, 1), (2, 2, 3), (9, 5, 1)]  # groups of taps, rows and columns of regions


def problem(name, dtype):
    """(a backward, its arrays, its options). Some samples are far from the others, or NaN."""
    n, channels, height, width, outputs, offset_groups, deviation, options = CASES[name]
    options = {"padding": 1, **options}
    rng = np.random.default_rng(5)

    def normal(*shape):
        return rng.standard_normal(shape).astype(dtype)

    groups = options.pop("groups", 1)
    x, w = normal(n, channels, height, width), normal(outputs, channels // groups, 3, 3)
    if not offset_groups:
        y = numdcn.conv_forward(x, w, **options)
        return numdcn.conv_backward, (normal(*y.shape), x, w), options
    room = [2 * options["padding"] - 2 * options.get("dilation", 1) + size - 1 for size in (height, width)]
    size = [extent // options.get("stride", 1) + 1 for extent in room]
    offsets = deviation * normal(n, 18 * offset_groups, *size)
    strays = rng.random(offsets.shape) < 0.002
    offsets[strays] = 10 * normal(*offsets.shape)[strays]
    if name == "one image anywhere":
        offsets[1] *= 60
    if name == "far but together":
        offsets += 9
    options["mask"] = rng.random((n, 9 * offset_groups, *size)).astype(dtype)
    offsets[0, 0, 0, 0], offsets[-1, 2, -1, -1] = np.nan, 1e30
    return numdcn.deform_conv_backward, (normal(n, outputs, *size), x, offsets.astype(dtype), w), options


@pytest.fixture
def divided(monkeypatch):
    """A function that makes calls of any size be divided, into tiles of 14 pixels and windows with little room around
    them. It returns the names of the kernels that ran, and for `place_windows` which images are not divided."""
    kernels, run_kernel = [], threads.run

    def noted(board, code, wide, parameters, counter, helpers):
        failed = run_kernel(board, code, wide, parameters, counter, helpers)
        kernels.append(next(key[0].__name__ for key, found in threads._codes.items() if found[0] == code))
        if kernels[-1] == "place_windows":
            call = (ctypes.c_int64 * _length(PlacingCall)).from_address(parameters)
            batch, rows, columns, address = call[0], *call[_length(Convolution) + 1 :][:2], call[-1]
            words = 1 + 2 * rows * columns
            placed = (ctypes.c_int64 * (batch * words)).from_address(address)
            kernels[-1] = (kernels[-1], list(placed[::words]))
        return failed

    def divide(cut, windows_bytes=2**30):
        backward_blocking.backward_blocking.cache_clear()
        kernels.clear()
        monkeypatch.setattr(backward_blocking, "_cut", lambda p, *_: backward_blocking.made_cut(p, *cut))
        monkeypatch.setattr(backward_blocking, "REACH", 3)
        monkeypatch.setattr(backward_blocking, "WINDOWS_BYTES", windows_bytes)
        monkeypatch.setattr(backward_blocking, "affordable", lambda _: 14)
        monkeypatch.setattr(program, "_known", {})
        monkeypatch.setattr(threads, "run", noted)
        monkeypatch.setattr(run, "plan_threads", lambda tasks, _: min(numdcn.get_num_threads(), tasks))
        return kernels

    yield divide
    monkeypatch.undo()
    backward_blocking.backward_blocking.cache_clear()


@pytest.mark.parametrize("dtype", [np.float32, pytest.param(np.float64, marks=pytest.mark.full)])
@pytest.mark.parametrize("name", CASES)
def test_windows_add_up(divided, name, dtype):
    """Sums of at most some 1,000 terms, in another order: two errors of 1,000 roundings of the sum of magnitudes."""
    backward, arrays, options = problem(name, dtype)
    whole = backward(*arrays, **options)
    magnitudes = backward(*map(np.abs, arrays[:2]), *arrays[2:-1], np.abs(arrays[-1]), **options)
    for cut in CUTS:
        divided(cut)
        in_parts = backward(*arrays, **options)
        for field in whole._fields:
            one, other = getattr(whole, field), getattr(in_parts, field)
            if one is None:
                continue
            if field not in ("x", "w"):  # those of offsets and mask are not sums over pixels or taps
                assert_same_bits(other, one, field)
                continue
            scale = np.nan_to_num(np.abs(getattr(magnitudes, field))) + np.abs(np.nan_to_num(one))
            assert (np.isnan(one) == np.isnan(other)).all(), field
            close = np.abs(np.nan_to_num(one - other)) <= 2000 * np.finfo(dtype).eps * scale
            assert close.all(), (field, cut)


@pytest.mark.parametrize("cut", [(1, 4, 2), (1, 4, 1)])
@pytest.mark.parametrize(
    ("name", "undivided", "strays"),
    [
        ("near", [0], True),
        ("one image anywhere", [0, 1], True),
        ("far but together", [0], True),
        ("anywhere", [1], False),
        ("plain", [0], False),
    ],
)
def test_where_strays_are(divided, name, undivided, strays, cut):
    """Samples beyond their window are added later; but an image with many of them is not divided."""
    backward, arrays, options = problem(name, np.float32)
    kernels = divided(cut)
    backward(*arrays, **options)
    assert ("place_windows", undivided) in kernels
    assert ("add_strays" in kernels) == strays


def test_without_strays(divided):
    """Offsets of 0 stay within windows up to the last column, and so do those of a flow."""
    backward, arrays, options = problem("far but together", np.float32)
    kernels = divided((1, 4, 1))
    for offset in (0, 9):
        backward(*arrays[:2], np.full_like(arrays[2], offset), *arrays[3:], **options)
        assert ("place_windows", [0]) in kernels
        assert "add_strays" not in kernels


@pytest.mark.parametrize("name", ["near", "offset groups of 8", "one image anywhere", "anywhere", "plain", "depthwise"])
def test_bits_do_not_depend_on_threads_or_on_what_else_is_wanted(divided, name):
    backward, arrays, options = problem(name, np.float32)
    divided((2, 4, 2))
    results = with_threads(lambda: backward(*arrays, **options), (1, 2, 7))
    alone = [backward(*arrays, **options, wrt=field) for field in ("x", "w")]
    for field in ("x", "w", "offsets", "mask"):
        expected = getattr(results[0], field, None)
        for result in (*results[1:], *(r for r, f in zip(alone, ("x", "w"), strict=True) if f == field)):
            if expected is not None:
                assert_same_bits(getattr(result, field), expected, field)


@pytest.mark.parametrize("order", [1, -1])
def test_the_gradients_of_an_image_do_not_depend_on_the_others(divided, order):
    """Nor on how many images are computed at a time. The divided image, which has strays, is the first or the last."""
    backward, (*images, w), options = problem("one image anywhere", np.float32)
    grad_y, x, offsets, mask = (array[::order] for array in (*images, options.pop("mask")))
    divided((2, 3, 2))
    both = backward(grad_y, x, offsets, w, mask=mask, **options)
    divided((2, 3, 2), windows_bytes=1)
    singly = backward(grad_y, x, offsets, w, mask=mask, **options)
    for n in (0, 1):
        alone = backward(grad_y[n:][:1], x[n:][:1], offsets[n:][:1], w, mask=mask[n:][:1], **options)
        for field in ("x", "offsets", "mask"):
            assert_same_bits(getattr(both, field)[n:][:1], getattr(alone, field), field)
            assert_same_bits(getattr(singly, field)[n:][:1], getattr(alone, field), field)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_types_round_the_sum_of_windows_once(divided, dtype):
    dtype = np.dtype(pytest.importorskip("ml_dtypes").bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    backward, arrays, options = problem("near", np.float32)
    halves = [array.astype(dtype) for array in arrays]
    options["mask"] = options["mask"].astype(dtype)
    divided((2, 3, 2))
    got = backward(*halves, **options)
    options["mask"] = options["mask"].astype(np.float32)
    wide = backward(*(array.astype(np.float32) for array in halves), **options)
    for field in ("x", "w"):
        assert_same_bits(getattr(got, field), getattr(wide, field).astype(dtype), field)


# batch, channels, height, width, outputs, stride, dilation, offset groups; then the least number of tasks: 64, or as
# many as pay where gradients of one image take less than 2 ms of a core, or where more would cost too much memory
LARGE = {
    "S1": ((1, 128, 100, 152, 128, 1, 1, 1), 64),
    "S2": ((1, 256, 50, 76, 256, 1, 1, 1), 64),
    "S3": ((1, 512, 25, 38, 512, 1, 2, 1), 64),
    "S4": ((8, 256, 14, 14, 256, 1, 1, 1), 64),
    "S5a": ((1, 64, 180, 320, 64, 1, 1, 8), 32),
    "S6": ((2, 256, 56, 56, 512, 2, 1, 1), 48),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_calls_have_many_tasks(monkeypatch, name):
    """Counted from the blocking that a call of these sizes gets."""
    (n, channels, height, width, outputs, stride, dilation, groups), wanted = LARGE[name]
    found = []
    inner = backward_blocking.backward_blocking

    def noted(p, dtype):
        found.append(inner(p, dtype)[0])
        raise StopIteration

    monkeypatch.setattr(program, "_known", {})
    monkeypatch.setattr(run, "backward_blocking", noted)
    x, w = np.zeros((n, channels, height, width), "f"), np.zeros((outputs, channels, 3, 3), "f")
    size = (height + stride - 1) // stride, (width + stride - 1) // stride
    offsets, y = np.zeros((n, 18 * groups, *size), "f"), np.zeros((n, outputs, *size), "f")
    with pytest.raises(StopIteration):
        numdcn.deform_conv_backward(y, x, offsets, w, stride=stride, padding=dilation, dilation=dilation)
    blocking, cut = found[0], found[0].cut
    assert blocking.blocks * blocking.image_bands * cut.tap_groups * cut.rows * cut.columns >= wanted
