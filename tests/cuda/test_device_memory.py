"""Memory on a GPU: elements of all types, copies between layouts, channels-last images, sums without atomics.

Programs of memory_programs.py run in the device server; their results are compared with NumPy and ml_dtypes.
"""

import device
import ml_dtypes
import numpy as np
import pytest
from checks import LAYOUTS, assert_same_bits

KINDS = {name: np.dtype(name) for name in ("float32", "float64", "float16")} | {
    "bfloat16": np.dtype(ml_dtypes.bfloat16)
}
CONVERSIONS = [(a, b) for a in KINDS for b in KINDS if a == b or ("float32" in (a, b) and "float64" not in (a, b))]
SKIPPED = -(2**30)


@pytest.fixture(params=device.KINDS)
def run(request):
    reason = device.missing(request.param)
    if reason:
        pytest.skip(reason)
    return lambda name, *arguments: device.program(request.param, "memory_programs", name, *arguments)


def odd_floats():
    """float32 patterns that round differently: ties, their neighbours, subnormals, the largest, infinities, NaN."""
    rng = np.random.default_rng(0)
    high = rng.integers(0, 2**16, 200, dtype=np.uint32) << 16
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x1000, 0x0FFF, 0x1001], np.uint32)
    known = [
        0,
        0x80000000,
        0x7F7FFFFF,
        0xFF7FFFFF,
        0x7F7F8000,
        0x7F7F7FFF,
        0x7F800000,
        0xFF800000,
        0x7F800001,
        0x7FC00000,
    ]
    known += [
        0xFFFFFFFF,
        0x477FEFFF,
        0x477FF000,
        0x33000000,
        0x33000001,
        0x33800000,
        0x00000001,
        0x007FFFFF,
        0x38800000,
    ]
    return np.concatenate([(high[:, None] | low).ravel(), np.array(known, np.uint32)]).view(np.float32)


def same_numbers(a, b):
    """The same bits, except that any NaN matches any NaN."""
    assert a.dtype == b.dtype and a.shape == b.shape
    nan = b != b
    assert ((a != a) == nan).all()
    bits = f"u{a.dtype.itemsize}"
    wrong = (np.ascontiguousarray(a).view(bits) != np.ascontiguousarray(b).view(bits)) & ~nan
    assert not wrong.any(), (a[wrong][:5], b[wrong][:5])


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float32"])
def test_narrowing_rounds_as_numpy_does(run, kind):
    values = odd_floats()
    with np.errstate(over="ignore", invalid="ignore"):
        want = values.astype(KINDS[kind])
    same_numbers(run("converted", values, kind), want)


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_widening_every_pattern(run, kind):
    values = np.arange(0, 2**16, 1 if device.count_gpus() else 5).astype(np.uint16).view(KINDS[kind])
    same_numbers(run("converted", values, "float32"), values.astype(np.float32))


def drawn(shape, kind, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(KINDS[kind])


@pytest.mark.parametrize("source, target", CONVERSIONS)
def test_copies_convert(run, source, target):
    array = drawn((3, 4, 2), source)
    same_numbers(run("copied", array, np.zeros(array.shape, KINDS[target])), array.astype(KINDS[target]))


@pytest.mark.parametrize("layout", ["fortran", "channels_last", "strided", "reversed", "shifted"])
@pytest.mark.parametrize("other", ["contiguous", "fortran", "strided", "reversed"])
def test_copies_between_layouts(run, layout, other):
    array = drawn((2, 3, 4, 2), "float32")
    got = run("copied", LAYOUTS[layout](array), LAYOUTS[other](np.zeros_like(array)))
    assert_same_bits(np.ascontiguousarray(got), array)


@pytest.mark.parametrize("shape", [(5,), (1, 1), (2, 1, 3), (2, 2, 2, 1, 2, 2), (0, 3)])
def test_copies_of_any_rank(run, shape):
    array = drawn(shape, "float64")
    assert_same_bits(run("contiguous", np.asfortranarray(array)), array)
    assert_same_bits(run("contiguous", np.broadcast_to(array[:1], array.shape)), np.repeat(array[:1], shape[0], axis=0))


def test_too_many_axes(run):
    array = np.zeros((3, 2) * 4, np.float32)[:, ::2][:, :, :, ::2]
    with pytest.raises(ValueError, match="axes that do not follow one another in memory, expected at most 6"):
        run("contiguous", np.zeros((2,) * 7, np.float32).transpose(6, 5, 4, 3, 2, 1, 0))
    assert_same_bits(run("contiguous", array), np.ascontiguousarray(array))


def images_of(x, vector):
    """(N, pixels, channels) with the border of zeros described in numdcn/_cuda/layout.py."""
    n, channels, height, width = x.shape
    pitch = -(-channels // vector) * vector
    rows = np.zeros((n, height + 2, width + 1, pitch), x.dtype)
    rows[:, 1:-1, 1:, :channels] = x.transpose(0, 2, 3, 1)
    return np.concatenate([rows.reshape(n, -1, pitch), np.zeros((n, 2, pitch), x.dtype)], axis=1)


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 5, 3, 4), (1, 9, 2, 7), (2, 4, 4, 1)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "reversed"])
def test_images_are_packed_and_unpacked(run, kind, shape, layout):
    x = drawn(shape, kind)
    want = images_of(x, max(4, 16 // x.itemsize))
    images, pitch, pixels = run("packed", LAYOUTS[layout](x))
    assert (pixels, pitch) == want.shape[1:]
    assert_same_bits(images.reshape(want.shape), want)
    back = run(
        "unpacked",
        spoilt_rim(want, shape, np.float64 if kind == "float64" else np.float32),
        LAYOUTS[layout](np.zeros_like(x)),
    )
    assert_same_bits(np.ascontiguousarray(back), x)


def spoilt_rim(images, shape, kind):
    """The images with NaN in everything that is not a pixel of x."""
    mine = images_of(np.ones(shape, np.float32), images.shape[2]) > 0
    return np.where(mine[:, :, : images.shape[2]], images.astype(kind), np.nan)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("n, samples, channels, size", [(1, 1, 1, (1, 1)), (2, 13, 5, (3, 2)), (1, 40, 9, (5, 4))])
def test_scatter_adds_as_numpy_does(run, kind, n, samples, channels, size):
    """Against np.add.at, with numbers whose sums are exact; twice, then into a subset of the channels."""
    rng = np.random.default_rng(samples)
    rows, row = size[0] + 2, size[1] + 1
    pixels, pitch = rows * row + 2, channels + 3
    places = rng.integers(0, (rows - 1) * row, (n, samples)).astype(np.int32)
    places[rng.random(places.shape) < 0.2] = SKIPPED
    weights = (rng.integers(-4, 5, (n, 4, samples)) / 4).astype(kind)
    values = rng.integers(-8, 9, (n, samples, channels)).astype(kind)
    images = rng.integers(-8, 9, (n, pixels, pitch)).astype(kind)
    want = images.copy()
    for image, sample in np.argwhere(places >= 0):
        for corner, step in enumerate((0, 1, row, row + 1)):
            at = (image, places[image, sample] + step, slice(2, 2 + channels))
            np.add.at(want, at, weights[image, corner, sample] * values[image, sample])
    shape = (n, channels, *size)
    assert_same_bits(run("scattered", places, weights, values, images, shape, 2), want)


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_clearing_leaves_zeros(run, layout):
    assert not run("cleared", LAYOUTS[layout](drawn((3, 5), "float32"))).any()
    assert not run("cleared", np.full(9, np.nan, KINDS["bfloat16"])).astype(np.float32).any()


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_are_read_whole(run, kind):
    array, length = drawn(64, kind), 16 // KINDS[kind].itemsize
    same_numbers(
        run("vectors", array, 2 * length),
        array[2 * length : 3 * length].astype(np.float64 if kind == "float64" else np.float32),
    )


@pytest.mark.parametrize("index", [-1, 7, 2**40])
def test_the_simulator_refuses_what_is_outside(index):
    """Every access in the simulator is checked, so its tests would notice a stray one."""
    reason = device.missing("simulator")
    if reason:
        pytest.skip(reason)
    with pytest.raises(IndexError, match="has elements 0 to 6"):
        device.program("simulator", "memory_programs", "outside", 7, index)
    with pytest.raises(ValueError, match="not at a multiple of 16 bytes"):
        device.program("simulator", "memory_programs", "vectors", np.zeros(64, np.float32), 3)
