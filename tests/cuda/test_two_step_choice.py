"""Which convolutions on a GPU take two steps, in which slabs, and what torch and CuPy are asked for. No GPU: numba-cuda is
needed for its types, and stand-ins replace the frameworks."""

import ctypes
import importlib.util
import types

import numpy as np
import pytest

from numdcn._call import frameworks, products
from numdcn._call.convolution import Convolution
from numdcn._call.device_array import BFLOAT16, DTYPES, DeviceArray, c_strides
from numdcn._call.options import Options

if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed: pip install -e .[test]", allow_module_level=True)

from numdcn._cuda import replay
from numdcn._cuda.conv import two_step

HALF, SINGLE, DOUBLE = DTYPES["float16"], DTYPES["float32"], DTYPES["float64"]


def convolution(channels, outs, batch=16, size=(50, 76), groups=1, offset_groups=1, taps=9):
    return Convolution(
        batch, channels, outs, size, size, (3, taps // 3), (1, 1), (1, 1), (1, 1), groups, offset_groups, taps, 0
    )  # fmt: skip


def work(multiplies=True, has_mma=True):
    framework = types.SimpleNamespace(multiplies=lambda dtype, tf32, device, stream: multiplies)
    return types.SimpleNamespace(framework=framework, has_mma=has_mma, device=0, stream=0)


def takes(p, dtype, what=two_step.FORWARD, tf32=False, deterministic=False, **more):
    x = DeviceArray(None, frameworks.FRAMEWORKS[0], 0, 0, dtype, (p.batch, p.in_channels, *p.in_size), (1,) * 4, 0)
    return two_step.choose(work(**more), p, x, Options(deterministic, tf32), what)


BACKWARD = two_step.BACKWARD
ROWS = {  # S1 to S7 at batch 16: (float32, tf32, float16) forward, then backward
    "S1": (convolution(128, 128, size=(100, 152)), (0, 0, 0), (0, 0, 0)),
    "S2": (convolution(256, 256), (0, 1, 1), (0, 1, 0)),
    "S3": (convolution(512, 512, size=(25, 38)), (0, 1, 1), (0, 1, 1)),
    "S4": (convolution(256, 256, 128, (14, 14)), (0, 1, 1), (0, 1, 0)),
    "S5a": (convolution(64, 64, size=(180, 320), offset_groups=8), (0, 0, 0), (0, 0, 0)),
    "S5b": (convolution(64, 64, size=(180, 320), offset_groups=16), (0, 0, 0), (0, 0, 0)),
    "S7": (convolution(256, 256, size=(56, 56), groups=256), (0, 0, 0), (0, 0, 0)),
}


@pytest.mark.parametrize("name", ROWS)
def test_the_rows_of_the_benchmark(name):
    p, forward, backward = ROWS[name]
    for what, wanted in ((two_step.FORWARD, forward), (BACKWARD, backward)):
        found = [takes(p, dtype, what, tf32) for dtype, tf32 in ((SINGLE, False), (SINGLE, True), (HALF, True))]
        assert found == [bool(one) for one in wanted]
    assert takes(p, BFLOAT16) == takes(p, HALF)


def test_from_how_many_outputs():
    """As `saved` tells."""
    for offset_groups, kinds in (
        (1, {"half": 223, "tf32": 221, "float32": 826}),
        (64, {"half": 129, "tf32": 221, "float32": 826}),
        (128, {"half": 11, "tf32": 22, "float32": 13}),
    ):
        for kind, least in kinds.items():
            size = 2 if kind == "half" else 4
            saved = [
                two_step.saved(convolution(256, outs, offset_groups=offset_groups), kind, size, two_step.FORWARD)
                for outs in (least - 1, least)
            ]
            assert saved[0] <= 0 < saved[1], (offset_groups, kind)


def test_what_is_impossible():
    p = ROWS["S3"][0]
    assert takes(p, HALF) and not takes(p, DOUBLE)
    assert not takes(p, HALF, deterministic=True)
    assert not takes(p, HALF, multiplies=False) and not takes(p, HALF, has_mma=False)
    assert not takes(p._replace(offset_groups=0), HALF), "an ordinary convolution"
    assert takes(convolution(510, 512), HALF), "its last vector of channels is padded"
    assert not takes(convolution(510, 512, offset_groups=2), HALF), "a vector would be of two offset groups"
    assert takes(convolution(512, 512, size=(1, 4000)), HALF)
    assert not takes(convolution(512, 512, size=(1, 80000)), HALF), "a row of pixels fits no slab"


def test_small_problems_do_not_pay_for_the_launches():
    assert not takes(convolution(256, 256, 1, (14, 14)), HALF)


def test_the_form_may_be_forced(monkeypatch):
    small, large = convolution(256, 256, 1, (14, 14)), ROWS["S3"][0]
    monkeypatch.setattr(replay, "forced", True)
    assert takes(small, HALF) and not takes(small, HALF, multiplies=False)
    monkeypatch.setattr(replay, "forced", False)
    assert not takes(large, HALF)


def test_no_framework_is_asked_without_need(monkeypatch):
    p = ROWS["S3"][0]._replace(offset_groups=0)
    asked = work()
    asked.framework.multiplies = None
    x = types.SimpleNamespace(dtype=HALF)
    assert not two_step.choose(asked, p, x, Options(), two_step.FORWARD)


@pytest.mark.parametrize("what", [two_step.FORWARD, BACKWARD])
@pytest.mark.parametrize("name", ROWS)
def test_slabs_hold_all_rows_in_bounded_memory(name, what, monkeypatch):
    p = ROWS[name][0]
    for limit in (2**22, 2**26):
        monkeypatch.setattr(two_step, "SLAB_BYTES", limit)
        for size in (2, 4):
            found = two_step.slabs(p, size, what)
            assert [first for first, _ in found] == list(np.cumsum([0, *(rows for _, rows in found)])[:-1])
            assert sum(rows for _, rows in found) == p.batch * p.out_size[0]
            assert all(rows > 0 for _, rows in found)
            most = max(rows for _, rows in found)
            columns = most * p.out_size[1] * p.taps * p.in_channels
            taken = columns * (size * what.columns + 4 * what.gradients)
            assert taken <= limit or most == 1
            assert most < two_step.DOWN or all(rows % two_step.DOWN == 0 for _, rows in found[:-1]), "whole patches"


# What torch is asked for.

WIDENS = products._torch_widens.__wrapped__  # not remembered


def torch(monkeypatch, overloads=("out", "dtype_out"), deterministic=False, **matmul):
    module = types.SimpleNamespace(
        are_deterministic_algorithms_enabled=lambda: deterministic,
        backends=types.SimpleNamespace(cuda=types.SimpleNamespace(matmul=types.SimpleNamespace(**matmul))),
        ops=types.SimpleNamespace(aten=types.SimpleNamespace(bmm=types.SimpleNamespace(overloads=lambda: list(overloads)))),
    )  # fmt: skip
    monkeypatch.setattr(products, "_torch_widens", WIDENS)
    monkeypatch.setitem(products.sys.modules, "torch", module)


NEW, OLD = "fp32_precision", "allow_tf32"


@pytest.mark.parametrize(
    "switches, allowed",
    [({NEW: "ieee"}, False), ({NEW: "none"}, False), ({NEW: "tf32"}, True), ({OLD: False}, False), ({OLD: True}, True)],
)
def test_tf32_as_torch_is_set(monkeypatch, switches, allowed):
    """Never more digits lost than asked for, and no switch set."""
    torch(monkeypatch, **switches)
    assert [products.torch_multiplies(SINGLE, tf32) for tf32 in (False, True)] == [not allowed, allowed]
    assert products.torch_multiplies(HALF, False) and products.torch_multiplies(BFLOAT16, False)
    assert not products.torch_multiplies(DOUBLE, False)


def test_other_switches_of_torch(monkeypatch):
    torch(monkeypatch, fp32_precision="ieee", allow_fp16_accumulation=True)
    assert not products.torch_multiplies(HALF, False) and products.torch_multiplies(SINGLE, False)
    torch(monkeypatch, fp32_precision="ieee", deterministic=True)
    assert not products.torch_multiplies(SINGLE, False) and not products.torch_multiplies(HALF, False)
    torch(monkeypatch, fp32_precision="ieee", overloads=("out",))
    assert not products.torch_multiplies(HALF, False), "before 2.8 the product would be rounded"


def test_the_real_torch_has_what_is_asked_for():
    real = pytest.importorskip("torch", reason="torch is not installed: pip install torch")
    assert products._torch_widens(real)
    assert products.torch_multiplies(SINGLE, False) and not products.torch_multiplies(SINGLE, True)
    a = real.empty(2, 3, 8, dtype=real.float16, device="meta")
    b = real.empty(2, 8, 5, dtype=real.float16, device="meta")
    c = real.empty(2, 3, 5, dtype=real.float32, device="meta")
    assert real.bmm(a, b, out_dtype=real.float32, out=c) is c
    owner = real.arange(24.0)
    array = DeviceArray(owner, frameworks.FRAMEWORKS[0], 0, owner.data_ptr(), SINGLE, (24,), (1,), 0)
    part = array.view((2, 3), (1, 4), 5)
    assert products._tensor(part).tolist() == [[5, 9, 13], [6, 10, 14]]
    assert products._tensor(array.slice(1, 2).reshaped(3, 4)).tolist() == owner[12:].reshape(3, 4).tolist()
    inner = DeviceArray(owner[4:], frameworks.FRAMEWORKS[0], 0, owner[4:].data_ptr(), SINGLE, (20,), (1,), 0)
    assert products._tensor(inner.view((2,), (1,), 1)).tolist() == [5, 6]


# What CuPy is asked for.


def memory(address, dtype, lead, count, step, batch):
    """Matrices as cuBLAS sees them: columns of `lead` elements, `count` of them."""
    total = (batch - 1) * step + lead * count
    raw = (ctypes.c_char * (total * dtype.itemsize)).from_address(address)
    steps = (step, 1, lead)
    flat = np.frombuffer(raw, dtype)
    return np.lib.stride_tricks.as_strided(flat, (batch, lead, count), [s * dtype.itemsize for s in steps])


class Blas:
    """cupy.cuda.cublas, for host memory: column-major products, float32 sums."""

    kinds = {0: np.dtype(np.float32), 2: np.dtype(np.float16)}  # noqa: RUF012

    def gemmStridedBatchedEx(  # noqa: N802  # parameters: those of cuBLAS
        self, handle, turn_a, turn_b, m, n, k, alpha, a, a_kind, lda, a_step, b, b_kind, ldb, b_step, beta, c, c_kind, ldc,
        c_step, batch, compute, algorithm,
    ):  # fmt: skip
        assert handle == "handle" and algorithm == -1 and c_kind == 0
        assert [ctypes.c_float.from_address(p).value for p in (alpha, beta)] == [1, 0]
        left = memory(a, self.kinds[a_kind], lda, m if turn_a else k, a_step, batch)
        right = memory(b, self.kinds[b_kind], ldb, k if turn_b else n, b_step, batch)
        target = memory(c, np.dtype(np.float32), ldc, n, c_step, batch)
        left = left[:, :k].transpose(0, 2, 1) if turn_a else left[:, :m]
        right = right[:, :n].transpose(0, 2, 1) if turn_b else right[:, :k]
        target[:, :m] = np.matmul(left.astype(np.float32), right.astype(np.float32))
        self.compute = compute


class Device:
    def __init__(self, number):
        self.number = number

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


@pytest.fixture
def cupy(monkeypatch):
    device = types.SimpleNamespace(get_cublas_handle=lambda: "handle")
    runtime = types.SimpleNamespace(streamIsCapturing=lambda stream: stream == 7)
    cuda = types.SimpleNamespace(Device=Device, device=device, runtime=runtime, cublas=Blas())
    module = types.SimpleNamespace(cuda=cuda)
    monkeypatch.setitem(products.sys.modules, "cupy", module)
    return module


def placed(array):
    """A NumPy array as one on a device."""
    strides = tuple(s // array.itemsize for s in array.strides)
    kind = HALF if array.dtype == np.float16 else SINGLE
    return DeviceArray(array, frameworks.FRAMEWORKS[1], 0, array.ctypes.data, kind, array.shape, strides, 0)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("left_turned", [False, True])
@pytest.mark.parametrize("right_turned", [False, True])
@pytest.mark.parametrize("pad", [0, 3])
def test_products_of_cupy(cupy, dtype, left_turned, right_turned, pad):
    """For operands whose rows or columns are contiguous, with gaps between them."""
    rng = np.random.default_rng(0)

    def operand(rows, columns, turned):
        shape = (2, columns, rows + pad) if turned else (2, rows, columns + pad)
        made = rng.normal(size=shape).astype(dtype)
        return made.transpose(0, 2, 1)[:, :rows] if turned else made[:, :, :columns]

    left, right = operand(5, 4, left_turned), operand(4, 6, right_turned)
    target = np.full((2, 5, 6), np.nan, np.float32)
    arrays = [placed(a) for a in (left, right, target)]
    assert arrays[2].strides == c_strides((2, 5, 6))
    for tf32 in (False, True):
        products.cupy_multiply(*arrays, tf32)
        want = np.matmul(left.astype(np.float32), right.astype(np.float32))
        np.testing.assert_allclose(target, want, rtol=1e-6, atol=1e-6)
        assert cupy.cuda.cublas.compute == (77 if tf32 and dtype == np.float32 else 68)
        target[...] = np.nan


def test_cupy_multiplies_all_but_float64_and_captured_graphs(cupy):
    assert all(products.cupy_multiplies(kind, 0, 0) for kind in (HALF, BFLOAT16, SINGLE))
    assert not products.cupy_multiplies(DOUBLE, 0, 0)
    assert not products.cupy_multiplies(HALF, 0, 7), "CuPy refuses cuBLAS there"


def test_other_arrays_have_no_product():
    numba = next(f for f in frameworks.FRAMEWORKS if f.name == "numba")
    assert not any(numba.multiplies(kind, False, 0, 0) for kind in (HALF, BFLOAT16, SINGLE, DOUBLE))
