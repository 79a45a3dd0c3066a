"""Memory: scratch does not grow with the image, little is kept between calls, and arrays beyond 2^31 elements work.

Each measurement runs in a new process with compiled kernels. Bounds, in bytes beyond inputs and results: one
channels-last copy of x (its pixels padded to whole vectors, hence the factor 1.3), the packed weights, 32 MB per
thread; for the backward also the same copies of the gradient of x and of grad_y, and the partial sums of the offset and
mask gradients, one per block of channels.
"""

import functools
import json
import os
import sys

import numpy as np
import pytest
from checks import cpu, run_python
from conv_cases import Case
from family import assert_same
from test_deform_conv import make

import numdcn
from numdcn._call.scratch import Scratch, kept_bytes
from numdcn._cpu import program
from numdcn._cpu.roi import run as pool

MB = 2**20
SLACK = 24 * MB  # for the interpreter, its allocator and compiled code
THREADS = 2
linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")

MEASURE = """
import gc, json, sys
import numpy as np
import numdcn
from checks import cpu
from conv_cases import Case
from test_deform_conv import make

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))

def reset_peak():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")

small, big = (Case(*case) for case in json.loads(sys.argv[2]))
direction = sys.argv[1]
backend = cpu("deform_conv")
warm = make(small, np.float32)
getattr(warm, direction)(backend)
problem = make(big, np.float32)
del warm
gc.collect()
reset_peak()
before = status("VmRSS")
result = getattr(problem, direction)(backend)
peak = status("VmHWM")
size = sum(a.nbytes for a in (result if isinstance(result, tuple) else [result]) if a is not None)
del result
gc.collect()
after = status("VmRSS")
print(json.dumps({"extra": peak - before - size, "kept": after - before, "threads": numdcn.get_num_threads()}))
"""


@functools.cache
def measure(direction, case, limit):
    """{extra, kept}: bytes beyond inputs and results at the peak of a call, and after it once its results are deleted;
    with a scratch limit; None: the default."""
    channels, c_out, size, groups, offset_groups, mask = case
    rest = [[3, 3], 1, 1, 1, groups, offset_groups, mask, True]
    cases = [[1, channels, c_out, hw, *rest] for hw in ([6, 7], size)]
    done = run_python(MEASURE, direction, json.dumps(cases), NUMDCN_NUM_THREADS=THREADS, NUMDCN_SCRATCH_LIMIT=limit)
    return json.loads(done.stdout.strip().splitlines()[-1])


# channels, c_out, size, groups, offset_groups, mask
LARGE_IMAGES = {
    "plain": (64, 64, (512, 960), 1, 1, False),
    "offset_groups": (64, 32, (300, 500), 1, 8, True),
    "depthwise": (64, 64, (512, 700), 64, 1, False),
}
SOME_IMAGES = [name if name == "plain" else pytest.param(name, marks=pytest.mark.full) for name in LARGE_IMAGES]


def copies(case, *channels):
    return sum(4 * c * case[2][0] * case[2][1] for c in channels)


@linux_only
@pytest.mark.parametrize("name", SOME_IMAGES)
def test_forward_scratch_does_not_grow_with_the_image(name):
    case = LARGE_IMAGES[name]
    channels, c_out, _, groups, _, _ = case
    weights = 4 * 9 * c_out * channels // groups
    extra = measure("forward", case, None)["extra"]
    bound = 1.3 * copies(case, channels) + 1.3 * weights + THREADS * 32 * MB + SLACK
    assert extra <= bound, f"{extra / MB:.0f} MB beyond inputs and output, allowed {bound / MB:.0f} MB"


@linux_only
@pytest.mark.parametrize("name", SOME_IMAGES)
def test_backward_scratch_does_not_grow_with_the_image(name):
    case = LARGE_IMAGES[name]
    channels, c_out, size, groups, offset_groups, mask = case
    weights = 4 * 9 * c_out * channels // groups
    sums = 4 * 9 * (2 + mask) * offset_groups * size[0] * size[1]
    blocks = max(1, channels // 32)
    extra = measure("backward", case, None)["extra"]
    bound = 1.3 * copies(case, channels, channels, c_out) + 2.6 * weights + blocks * sums + THREADS * 32 * MB + SLACK
    assert extra <= bound, f"{extra / MB:.0f} MB beyond inputs and gradients, allowed {bound / MB:.0f} MB"


SIZES = [(1, 2**20), (2**20, 1), (3, 70_000), (2, 2**18), (60, 50)]
BOXES = {
    **{name: {} for name in ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool")},
    "deform_roi_pool": {"gamma": 0.1},
    "deform_ps_roi_pool": {"group_size": 1},
}


@pytest.fixture
def slots(monkeypatch):
    """The last size, in bytes, of each call's scratch memory: a thread's workspace, as the calls use one thread."""
    before, taken = numdcn.get_num_threads(), []

    class Recorded(Scratch):
        def __init__(self, *sizes):
            taken.append(sizes[-1])
            super().__init__(*sizes)

    for module in (pool, program):
        monkeypatch.setattr(module, "Scratch", Recorded)
    numdcn.set_num_threads(1)
    yield taken
    numdcn.set_num_threads(before)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("output", [1, (1, 14), (14, 1)], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("operator", BOXES)
def test_scratch_of_a_thread_for_boxes(slots, operator, size, output, dtype):
    """At most 32 MB, or 80 bytes for each pixel of the longer side of an image: two lists of pixels with an index, a
    weight and a slope, (8 + 2*8)*2, and the columns of planes, 3*8, make 72."""
    cells = 14 if operator in ("ps_roi_align", "ps_roi_pool") and output != 1 else 1
    x = np.broadcast_to(dtype(1), (1, cells, *size))
    rois = np.array([[0, 0, 0, size[1], size[0]]], dtype)
    more = {"output_size": output, **BOXES[operator]}
    y = getattr(numdcn, f"{operator}_forward")(x, rois, **more)
    getattr(numdcn, f"{operator}_backward")(y, x, rois, **more)
    assert len(slots) >= 2, "nothing was measured"
    assert max(slots) <= max(32 * MB, 80 * max(size)), f"{max(slots) / MB:.0f} MB"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("sizes", [(4, 2**16), (2**16, 4), (3, 5)], ids=str)
@pytest.mark.parametrize("operator", ["conv", "deform_conv", "bilinear_sample"])
def test_scratch_of_a_thread_for_all_else(slots, operator, sizes, dtype):
    """At most 32 MB, up to unrealistically many outputs."""
    channels, outputs = sizes
    x = np.broadcast_to(dtype(1), (1, channels, 3, 5))
    w, still = np.ones((outputs, channels, 1, 1), dtype), np.zeros((1, 2, 3, 5), dtype)
    arrays = {"conv": (x, w), "deform_conv": (x, still, w), "bilinear_sample": (x, still.reshape(1, 15, 2))}[operator]
    y = getattr(numdcn, f"{operator}_forward")(*arrays)
    getattr(numdcn, f"{operator}_backward")(y, *arrays)
    assert len(slots) >= 2, "nothing was measured"
    assert max(slots) <= 32 * MB, f"{max(slots) / MB:.0f} MB"


@pytest.mark.parametrize("operator", ["roi_align", "deform_roi_pool"])
def test_lists_that_are_not_kept_are_made_again(monkeypatch, operator):
    """The same bits whether or not the lists of pixels of all columns of bins are kept."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 19, 30, 31)).astype(np.float32)
    rois = np.array([[0, 1, 2, 27, 25], [1, -3, 0, 40, 12], [0, 5, 5, 6, 9]], np.float32)
    forward, backward = (getattr(numdcn, f"{operator}_{way}") for way in ("forward", "backward"))
    y = forward(x, rois, output_size=(11, 13))
    g = backward(y, x, rois, output_size=(11, 13))
    monkeypatch.setattr(pool, "SHARED_BYTES", 0)
    monkeypatch.setattr(program, "_known", {})  # nothing is remembered
    assert (forward(x, rois, output_size=(11, 13)) == y).all()
    assert (backward(y, x, rois, output_size=(11, 13)).x == g.x).all()


@linux_only
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("limit", [None, *(pytest.param(limit, marks=pytest.mark.full) for limit in (0, 16 * MB))])
def test_little_is_kept_between_calls(direction, limit):
    """At most the scratch limit, by default 64 MiB and 2 for each CPU, of the hundreds of megabytes that this call uses."""
    kept = measure(direction, LARGE_IMAGES["plain"], limit)["kept"]
    allowed = ((64 + 2 * os.cpu_count()) * MB if limit is None else limit) + SLACK
    assert kept <= allowed, f"{kept / MB:.0f} MB kept, allowed {allowed / MB:.0f} MB"


@pytest.fixture
def scratch_limit():
    before = numdcn.get_scratch_limit()
    yield before
    numdcn.set_scratch_limit(before)


def test_scratch_limit_setting(scratch_limit):
    for limit in (0, 1, 10**6, np.int64(10**9)):
        numdcn.set_scratch_limit(limit)
        assert numdcn.get_scratch_limit() == limit


@pytest.mark.parametrize("value, error", [(-1, ValueError), (1.5, TypeError), (True, TypeError), ("1", TypeError)])
def test_scratch_limit_errors(scratch_limit, value, error):
    with pytest.raises(error, match="nbytes|scratch") as raised:
        numdcn.set_scratch_limit(value)
    assert str(value) in str(raised.value)
    assert numdcn.get_scratch_limit() == scratch_limit


def test_buffers_of_many_sizes_are_kept_up_to_the_limit_and_no_further(scratch_limit):
    limit = 4 * MB
    numdcn.set_scratch_limit(limit)
    most = 0
    for side in (40, 60, 80, 100, 120, 140):  # each fits the limit, all together do not, and none can replace another
        x, offsets = np.ones((1, 16, side, side), np.float32), np.zeros((1, 2, side, side), np.float32)
        numdcn.deform_conv_forward(x, offsets, np.ones((1, 16, 1, 1), np.float32))
        assert kept_bytes() <= limit
        most = max(most, kept_bytes())
    assert most > limit / 4, "nothing was kept"
    numdcn.set_scratch_limit(0)
    assert kept_bytes() == 0


SAY_LIMIT = "import numdcn; print('limit', numdcn.get_scratch_limit())"


def test_scratch_limit_from_the_environment():
    assert f"limit {(64 + 2 * os.cpu_count()) * MB}" in run_python(SAY_LIMIT, NUMDCN_SCRATCH_LIMIT=None).stdout
    assert "limit 12345" in run_python(SAY_LIMIT, NUMDCN_SCRATCH_LIMIT=12345).stdout


@pytest.mark.parametrize("value", ["much", "-1", "1.5"])
def test_bad_scratch_limit_in_the_environment(value):
    done = run_python(SAY_LIMIT, NUMDCN_SCRATCH_LIMIT=value, check=False)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "NUMDCN_SCRATCH_LIMIT" in last and value in last and last.startswith("ValueError"), done.stderr


def test_results_do_not_depend_on_the_scratch_limit(scratch_limit):
    problem, backend = make(Case(2, 33, 17, (9, 8), padding=1, mask=True, bias=True), np.float32), cpu("deform_conv")
    numdcn.set_scratch_limit(0)
    y, g = problem.forward(backend), problem.backward(backend)
    numdcn.set_scratch_limit(64 * MB)
    for _ in range(2):
        assert_same(problem.forward(backend), y)
        assert_same(problem.backward(backend), g)


# More than 2^31 elements: one array of 8.6 GB each, or its channels-last copy. Pages of a huge input that are never
# written map to the system's zero page at no cost. Measured peaks: the image 8.6 GB (its copy), the output 8.4 GB,
# the offsets 0.5 GB. The image gradient needs three such arrays, 26 GB.


def free_memory():
    """In bytes; 0 where the system does not tell (macOS has no such name, Windows no sysconf)."""
    if "SC_AVPHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return 0
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def near(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.large
def test_an_image_beyond_two_to_the_31():
    """x (1, 64, 5800, 5800), read every 58 pixels; only its last 60 rows are not zero. 8.6 GB for the copy of x."""
    side, step, out = 5800, 58, 100
    x = np.zeros((1, 64, side, side), np.float32)
    assert x.size > 2**31
    rng = np.random.default_rng(0)
    x[0, :, -60:] = rng.normal(size=(64, 60, side))
    w = rng.normal(size=(3, 64, 1, 1)).astype(np.float32)
    grad_y = rng.normal(size=(1, 3, out, out)).astype(np.float32)
    offsets = np.full((1, 2, out, out), 0.25, np.float32)
    y = numdcn.deform_conv_forward(x, offsets, w, stride=step)
    row = (out - 1) * step
    cols = np.arange(out) * step
    cell = [x[0, :, row + i][:, cols + j].astype(np.float64) for i in (0, 1) for j in (0, 1)]
    sample = np.einsum("a,acl->cl", [9 / 16, 3 / 16, 3 / 16, 1 / 16], cell)
    assert not y[0, :, :-1].any()
    near(y[0, :, -1], w[:, :, 0, 0] @ sample)
    g = numdcn.deform_conv_backward(grad_y, x, offsets, w, stride=step, wrt=("w", "offsets"))
    near(g.w[:, :, 0, 0], grad_y[0, :, -1] @ sample.T)
    slopes = np.array([[-0.75, -0.25, 0.75, 0.25], [-0.75, 0.75, -0.25, 0.25]])
    column = w[:, :, 0, 0].T.astype(np.float64) @ grad_y[0, :, -1]
    near(g.offsets[0, :, -1], np.einsum("sa,acl,cl->sl", slopes, cell, column))
    assert not g.offsets[0, :, :-1].any()


@pytest.mark.large
@pytest.mark.skipif(free_memory() < 28e9, reason="28 GB of free memory are needed")
def test_an_image_gradient_beyond_two_to_the_31():
    """The gradient of x (1, 64, 5800, 5800), 8.6 GB, and the channels-last copies of x and of it."""
    side, step, out = 5800, 58, 100
    x = np.zeros((1, 64, side, side), np.float32)
    rng = np.random.default_rng(0)
    w = rng.normal(size=(3, 64, 1, 1)).astype(np.float32)
    grad_y = rng.normal(size=(1, 3, out, out)).astype(np.float32)
    offsets = np.full((1, 2, out, out), 0.5, np.float32)
    g_x = numdcn.deform_conv_backward(grad_y, x, offsets, w, stride=step, wrt="x").x
    column = np.einsum("oc,ol->cl", w[:, :, 0, 0], grad_y[0, :, -1]) / 4
    for row in (-58, -57):
        near(g_x[0, :, row, 0::step], column)
        near(g_x[0, :, row, 1::step], column)
    assert not g_x[0, :, -56:].any() and not g_x[0, :, -58:, 2:step].any()
    near(g_x[0, :, 0, 0], w[:, :, 0, 0].T @ grad_y[0, :, 0, 0] / 4)


@pytest.mark.large
def test_an_output_beyond_two_to_the_31():
    """y (1, 64, 5800, 5800) from one channel: 8.6 GB for y; x and offsets are small in comparison."""
    side = 5800
    rng = np.random.default_rng(0)
    x = np.zeros((1, 1, side, side), np.float32)
    x[0, 0, -2:] = rng.normal(size=(2, side))
    w = rng.normal(size=(64, 1, 1, 1)).astype(np.float32)
    offsets = np.zeros((1, 2, side, side), np.float32)
    y = numdcn.deform_conv_forward(x, offsets, w)
    assert y.size > 2**31
    near(y[0, :, -2:], w[:, 0] * x[0, 0, -2:])
    assert not y[0, :, :-2:997].any()


@pytest.mark.large
def test_offsets_beyond_two_to_the_31():
    """offsets (1, 128, 4100, 4100) of an 8x8 kernel over one channel: 8.6 GB; the last tap moves one pixel."""
    side = 4100
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 1, side + 7, side + 7)).astype(np.float32)
    offsets = np.zeros((1, 128, side, side), np.float32)
    assert offsets.size > 2**31
    offsets[0, -2:] = -1
    w = np.zeros((1, 1, 8, 8), np.float32)
    w[0, 0, 0, 0], w[0, 0, 7, 7] = 2, 3
    y = numdcn.deform_conv_forward(x, offsets, w)
    near(y[0, 0], 2 * x[0, 0, :side, :side] + 3 * x[0, 0, 6 : side + 6, 6 : side + 6])
