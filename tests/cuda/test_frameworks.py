"""Arrays on a GPU at the door, without a GPU: what is read from them, which overlap, what is rejected. Stand-in modules
replace torch and CuPy; the tests stop where numdcn would launch a kernel."""

import re
import types
from collections import namedtuple

import ml_dtypes
import numpy as np
import pytest
from checks import run_python

import numdcn
from numdcn._call import frameworks
from numdcn._call.arguments import Argument, check_place, receive
from numdcn._call.arrays import check_array, check_out, received
from numdcn._call.device_array import BFLOAT16, DTYPES, DeviceArray, c_strides, collapsed, strides_of
from numdcn._call.frameworks import Cupy, Numba, Torch, framework_of
from numdcn._call.host_frameworks import host_framework_of
from numdcn._call.install import install
from numdcn._call.results import output_array


class Tensor:
    """A torch.Tensor, as far as numdcn uses it."""

    def __init__(self, shape=(2, 3), dtype="float32", index=0, address=0x7000, strides=None, grad=False, is_cuda=True):
        self.shape, self.dtype = shape, f"torch.{dtype}"
        self.device, self.requires_grad = types.SimpleNamespace(index=index), grad
        self.is_cuda, self.is_cpu, self.is_meta = is_cuda, not is_cuda, False
        self._address, self._strides = address, c_strides(shape) if strides is None else strides

    def data_ptr(self):
        return self._address

    def stride(self):
        return self._strides


class Array:
    """A cupy.ndarray, likewise; strides are in bytes."""

    def __init__(self, shape=(2, 3), dtype=np.float32, number=0, address=0x8000, strides=None):
        self.shape, self.dtype = shape, np.dtype(dtype)
        self.device, self.data = types.SimpleNamespace(id=number), types.SimpleNamespace(ptr=address)
        self.strides = tuple(s * self.dtype.itemsize for s in c_strides(shape)) if strides is None else strides


class Device:
    """cupy.cuda.Device: a context in which arrays are created."""

    current: list = []  # noqa: RUF012 - of the whole process

    def __init__(self, number):
        self.number = number

    def __enter__(self):
        self.current.append(self.number)

    def __exit__(self, *error):
        self.current.pop()


def module_of_torch():
    """The module torch, as far as numdcn uses it for tensors on a GPU."""
    empty = lambda shape, dtype, device: Tensor(shape, dtype, int(device.removeprefix("cuda:")), 0x9000)  # noqa: E731
    names = {name: name for name in ("float16", "float32", "float64", "bfloat16", "int32", "int64")}
    streams = types.SimpleNamespace(current_stream=lambda number: types.SimpleNamespace(cuda_stream=100 + number))
    autograd = types.SimpleNamespace(forward_ad=None)
    return types.SimpleNamespace(Tensor=Tensor, cuda=streams, empty=empty, from_numpy=None, autograd=autograd, **names)


@pytest.fixture
def torch(monkeypatch):
    monkeypatch.setitem(frameworks.sys.modules, "torch", module_of_torch())


@pytest.fixture
def cupy(monkeypatch):
    stream = types.SimpleNamespace(
        get_current_stream=lambda: types.SimpleNamespace(ptr=200 + Device.current[-1]), Device=Device
    )
    module = types.SimpleNamespace(
        ndarray=Array, cuda=stream, empty=lambda shape, dtype: Array(shape, dtype, Device.current[-1], 0xA000)
    )
    monkeypatch.setitem(frameworks.sys.modules, "cupy", module)
    return module


def receive_all(**arrays):
    """{name: array} as returned by `receive`, for an operator with these arguments."""
    table = tuple(Argument(name, "", None) for name in arrays)
    return receive(table, namedtuple("Arrays", arrays)(**arrays))._asdict()


# What is read from arrays.


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "int64"])
def test_what_is_read_of_a_tensor_of_torch(torch, dtype):
    tensor = Tensor((2, 3, 4), dtype, 1, 0x7100, (1, 2, 6))
    seen = received(tensor)
    assert isinstance(seen, DeviceArray) and isinstance(seen.framework, Torch) and seen.owner is tensor
    assert (seen.device, seen.address, seen.shape, seen.strides, seen.stream) == (1, 0x7100, (2, 3, 4), (1, 2, 6), 101)
    assert seen.dtype is DTYPES[dtype] and seen.dtype.name == dtype
    assert (seen.ndim, seen.size, len(seen), seen.contiguous, seen.writable) == (3, 24, 2, False, True)
    made = seen.framework.empty((5, 2), seen.dtype, 1, seen.stream)
    assert (made.shape, made.strides, made.device, made.address, made.dtype) == ((5, 2), (2, 1), 1, 0x9000, seen.dtype)
    assert isinstance(made.owner, Tensor) and made.owner.dtype == f"torch.{dtype}" and made.stream == 101


def test_torch_tensors_that_require_grad(torch):
    with pytest.raises(TypeError, match="requires grad.*detach"):
        received(Tensor(grad=True))
    with pytest.raises(TypeError, match="`rois`.*requires grad.*detach"):
        numdcn.roi_align_forward(Tensor((1, 2, 4, 4)), Tensor((1, 5), grad=True), 2)


def test_torch_tensors_in_memory_are_no_arrays_of_a_gpu(torch):
    tensor = Tensor(is_cuda=False)
    assert received(tensor) is tensor and host_framework_of(tensor) is not None


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ml_dtypes.bfloat16])
def test_what_is_read_of_an_array_of_cupy(cupy, dtype):
    size = np.dtype(dtype).itemsize
    array = Array((2, 3), dtype, 1, 0x8100, (size, 2 * size))
    seen = received(array)
    assert isinstance(seen.framework, Cupy) and seen.owner is array
    assert (seen.device, seen.address, seen.shape, seen.strides, seen.stream) == (1, 0x8100, (2, 3), (1, 2), 201)
    assert seen.dtype is DTYPES[np.dtype(dtype).name]
    made = seen.framework.empty((4,), seen.dtype, 1, seen.stream)
    assert made.owner.dtype == np.dtype(dtype) and made.owner.device.id == 1 and made.stream == 201
    assert not Device.current, "the caller's device is as it was"


class Interface:
    """An object with `__cuda_array_interface__`."""

    def __init__(self, **more):
        self.__cuda_array_interface__ = {
            "shape": (2, 3), "typestr": "<f4", "data": (0x6000, False), "version": 3, **more,
        }  # fmt: skip

    __cuda_array_interface__ = None  # numdcn checks the type


@pytest.fixture
def one_gpu(monkeypatch):
    monkeypatch.setattr(frameworks, "_device_of", lambda address: 0)


@pytest.mark.parametrize("given, stream", [(None, 0), (1, 0), (2, 2), (77, 77)])
def test_what_is_read_of_an_array_interface(one_gpu, given, stream):
    more = {} if given is None else {"stream": given}
    seen = received(Interface(strides=(4, 8), data=(0x6000, True), **more))
    assert isinstance(seen.framework, Numba)
    assert (seen.address, seen.shape, seen.strides, seen.stream, seen.writable) == (
        0x6000,
        (2, 3),
        (1, 2),
        stream,
        False,
    )
    assert received(Interface()).strides == (3, 1) and received(Interface(strides=None)).contiguous


def test_dtypes_of_the_interface(one_gpu):
    for typestr, name in (("<f2", "float16"), ("<f8", "float64"), ("<i4", "int32"), ("<i8", "int64")):
        assert received(Interface(typestr=typestr)).dtype == np.dtype(name)
    bfloat = Interface(typestr="<V2")
    bfloat.dtype = np.dtype(ml_dtypes.bfloat16)
    assert received(bfloat).dtype is BFLOAT16
    with pytest.raises(TypeError, match="byte order"):
        received(Interface(typestr=">f4"))
    with pytest.raises(TypeError, match="dtype complex64, expected float16, bfloat16, float32 or float64"):
        check_array("x", received(Interface(typestr="<c8")), 2, "(N, C)")


def test_what_lies_between_elements(one_gpu, cupy):
    """A GPU cannot read elements that are not at multiples of their size."""
    for value in (
        Interface(strides=(10, 4)),
        Interface(data=(0x6001, False)),
        Array((2, 3), np.float32, 0, 0x8002),
        Array((2, 3), np.float32, 0, 0x8000, (6, 2)),
    ):
        with pytest.raises(ValueError, match="multiple"):
            received(value)


def test_bfloat16_is_a_dtype_of_its_own():
    assert (BFLOAT16.name, BFLOAT16.itemsize, repr(BFLOAT16)) == ("bfloat16", 2, "bfloat16")
    assert np.float32 != BFLOAT16 and DTYPES["bfloat16"] is BFLOAT16


# Mixtures.


def test_frameworks_and_devices_are_not_mixed(torch, cupy, one_gpu):
    tensor, other, array = Tensor((1, 2, 3, 4)), Tensor((1, 5, 2), index=1), Array((1, 5, 2))
    for points, told in ((other, "torch on GPU 1"), (array, "cupy on GPU 0"), (Interface(), "numba on GPU 0")):
        with pytest.raises(
            ValueError,
            match=f"`points` is an array of {told}, but `x` is an array of torch on GPU 0; expected all arrays in one place",
        ):
            numdcn.bilinear_sample_forward(tensor, points)
    for x, points, wrong in ((tensor, np.zeros((1, 5, 2)), "points"), (np.zeros((1, 2, 3, 4)), array, "x")):
        with pytest.raises(
            ValueError,
            match=f"`{wrong}` is an ndarray of shape .* in host memory, but .* on GPU 0; expected all arrays in one place",
        ):
            numdcn.bilinear_sample_forward(x, points)
    with pytest.raises(TypeError, match="`points` is None, expected"):
        numdcn.bilinear_sample_forward(tensor, None)
    seen = receive_all(x=tensor, bias=None)
    assert seen["bias"] is None and seen["x"].owner is tensor
    check_place("y", received(Tensor()), "x", received(Tensor()))


def test_errors_come_before_any_kernel(torch):
    x = Tensor((1, 2, 3, 4), "float16")
    with pytest.raises(
        TypeError,
        match="`points` has dtype float64 but `x` has float16; expected one dtype for all arrays, or float32 here",
    ):
        numdcn.bilinear_sample_forward(x, Tensor((1, 5, 2), "float64"))
    with pytest.raises(TypeError, match="`x` has dtype int64, expected float16, bfloat16, float32 or float64"):
        numdcn.bilinear_sample_forward(Tensor((1, 2, 3, 4), "int64"), Tensor((1, 5, 2), "int64"))
    with pytest.raises(ValueError, match=r"`points` has shape \(2, 5, 2\)"):
        numdcn.bilinear_sample_forward(x, Tensor((2, 5, 2), "float32"))


def test_errors_name_the_way_out(torch, cupy, one_gpu):
    """In the words of the framework, whose arrays the others should be."""
    plain, box, w = np.zeros((1, 2, 3, 4), np.float32), np.zeros((1, 5), np.float32), np.zeros((1, 2, 1, 1), np.float32)
    prepared = numdcn.prepare_weights(w)

    def align(x, rois):
        return lambda: numdcn.roi_align_forward(x, rois, 2)

    x, row = (1, 2, 3, 4), (1, 5)
    for call, way in (
        (align(Tensor(x), box), "use torch.from_numpy(rois).cuda()"),
        (align(Array(x), box), "use cupy.asarray(rois)"),
        (align(Interface(), box), "use numba.cuda.to_device(rois)"),
        (lambda: numdcn.conv_forward(Tensor(x), prepared), "use prepare_weights(torch.from_numpy(w).cuda())"),
        (lambda: numdcn.conv_backward(Tensor(x), plain, w), "use grad_y.cpu().numpy()"),
        (lambda: numdcn.conv_backward(Array(x), plain, w), "use cupy.asnumpy(grad_y)"),
        (lambda: numdcn.conv_backward(Interface(shape=x), plain, w), "use grad_y.copy_to_host()"),
        (lambda: numdcn.conv_forward(plain, w, out=Tensor(x)), "expected all arrays in one place"),
        (align(Tensor(x, "int32"), Tensor(row)), "float32 or float64; use x.to(torch.float32)"),
        (align(Tensor(x, "bfloat16"), Tensor(row, "float64")), "or float32 here; use rois.to(torch.float32)"),
        (align(Tensor(x, "bfloat16"), Tensor(row, "float16")), "or float32 here; use rois.to(torch.float32)"),
        (align(Array(x), Array(row, np.float64)), "use rois.astype(cupy.float32)"),
        (align(Tensor(x[1:]), Tensor(row)),
         "use x[None] for an image (C, H, W), x[:, None] for a batch (N, H, W)"),
        (align(Tensor((9, 9, 3)), Tensor(row)), "use x.permute(2, 0, 1)[None] for an image (H, W, C)"),
        (align(Interface(), Interface(shape=row)), "expected 4 axes: (N, C, H, W)"),
        (align(Tensor(x), Tensor((3, 4))), "use torch.nn.functional.pad(rois, (1, 0), value=n) for boxes of image n"),
        (align(Array(x), Array((3, 4))), "batch index, x1, y1, x2, y2"),
        (align(Tensor(x), [Tensor((3, 4))]),
         "use torch.cat([torch.nn.functional.pad(b, (1, 0), value=n) for n, b in enumerate(rois)])"),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError)) as raised:
            call()
        assert str(raised.value).endswith(way), str(raised.value)


def test_empty_results_need_no_gpu(torch):
    """Nor numba-cuda: y is allocated by the caller's framework, and there is nothing to compute."""
    y = numdcn.bilinear_sample_forward(Tensor((0, 2, 3, 4)), Tensor((0, 5, 2)))
    assert isinstance(y, Tensor) and y.shape == (0, 2, 5)


def test_without_numba_cuda(torch, monkeypatch):
    monkeypatch.setattr(frameworks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=re.escape(install("cuda"))):
        frameworks.numba_cuda.__wrapped__()  # not the cached result


def test_a_call_without_numba_cuda():
    """The whole call, in a process without numba-cuda."""
    code = """
import importlib.util, sys, types
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name.startswith("numba_cuda") else real(name, *more)
import test_frameworks as t
sys.modules["torch"] = t.module_of_torch()
import numdcn
try:
    numdcn.bilinear_sample_forward(t.Tensor((1, 2, 3, 4)), t.Tensor((1, 5, 2)))
except ImportError as error:
    print("told:", error)
"""
    assert install("cuda") in run_python(code).stdout.split("told:")[1]


def test_importing_numdcn_loads_nothing_of_cuda():
    code = "import numdcn, numpy as np, sys\n"
    code += "numdcn.roi_align_forward(np.zeros((1, 1, 3, 3)), np.zeros((1, 5)), 2)\n"
    code += "print([m for m in sys.modules if m.startswith(('numba.cuda', 'numba_cuda', 'cuda.', 'torch', 'cupy'))])"
    assert run_python(code).stdout.strip() == "[]"


# Places in memory.


def device_array(shape=(4, 3), strides=None, address=0x1000, dtype="float32", writable=True):
    strides = c_strides(shape) if strides is None else strides
    return DeviceArray(None, Torch(), 0, address, DTYPES[dtype], shape, strides, 0, writable)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_outs_that_overlap_an_input(dtype):
    size = DTYPES[dtype].itemsize
    out = device_array(dtype=dtype)
    check = lambda other: check_out("out", out, (4, 3), DTYPES[dtype], {"x": other})  # noqa: E731
    for shift in (-12, 12, 400):
        check(device_array(address=0x1000 + shift * size, dtype=dtype))
    for shift in (-11, -1, 0, 1, 11):
        with pytest.raises(ValueError, match="`out` overlaps `x`"):
            check(device_array(address=0x1000 + shift * size, dtype=dtype))
    spread = device_array(strides=(6, 2), dtype=dtype)
    check_out(
        "out", spread, (4, 3), DTYPES[dtype], {"x": device_array(strides=(6, 2), address=0x1000 + size, dtype=dtype)}
    )
    with pytest.raises(ValueError, match="overlaps"):
        check_out("out", spread, (4, 3), DTYPES[dtype], {"x": device_array((2, 2), (-3, 1), 0x1000 + 9 * size, dtype)})
    check(device_array((0, 3), dtype=dtype))
    assert out.ghost.shape == (4, 3) and out.ghost.dtype.itemsize == size and out.ghost.ctypes.data == 0x1000


def test_outs_on_a_gpu():
    check_out("out", device_array(strides=(-3, 1), address=0x2000), (4, 3), np.dtype(np.float32), {})
    for out, error, told in (
        (device_array(writable=False), ValueError, "read-only"),
        (device_array(strides=(0, 1)), ValueError, "share memory"),
        (device_array(strides=(1, 1)), ValueError, "share memory"),
        (device_array((3, 4)), ValueError, r"shape \(3, 4\), expected \(4, 3\)"),
        (device_array(dtype="float64"), TypeError, "dtype float64, expected float32"),
        (device_array(dtype="bfloat16"), TypeError, "dtype bfloat16, expected float32"),
    ):
        with pytest.raises(error, match=told):
            check_out("out", out, (4, 3), np.dtype(np.float32), {})
    with pytest.raises(ValueError, match="`out` is an ndarray .* in host memory, but `x` is an array of torch"):
        output_array("out", np.zeros((4, 3), np.float32), (4, 3), np.dtype(np.float32), {"x": device_array()})


@pytest.mark.parametrize(
    "shape, strides, whole",
    [
        ((2, 3), (3, 1), True), ((2, 3), (4, 1), False), ((2, 3), (1, 2), False), ((1, 3), (77, 1), True), ((2, 1), (1, 5), True),
        ((0, 3), (9, 9), True), ((), (), True), ((2, 3), (-3, 1), False),
    ],
)  # fmt: skip
def test_which_strides_are_contiguous(shape, strides, whole):
    assert strides_of(shape, strides) is whole and device_array(shape, strides).contiguous is whole
    assert not device_array(shape, strides, 0x1002).contiguous
    assert c_strides((2, 3, 4)) == (12, 4, 1) and c_strides(()) == ()


def test_reshaped_arrays_stay_where_they_are():
    array = device_array((4, 3))
    again = array.reshaped(2, 6)
    assert (again.shape, again.strides, again.address, again.dtype) == ((2, 6), (6, 1), array.address, array.dtype)


@pytest.mark.parametrize("seed", range(20))
def test_collapsed_axes_walk_through_the_same_places(seed):
    """The collapsed axes visit the same elements in the same order."""
    rng = np.random.default_rng(seed)
    shape = tuple(rng.choice([1, 2, 3], rng.integers(0, 5)).tolist())
    base = np.arange(4**5).reshape((4,) * 5)[tuple(slice(0, n) for n in shape)]
    views = [base.transpose(*rng.permutation(5)) if seed % 3 == 0 else base for _ in range(2)]
    views = [v[(0,) * (v.ndim - len(shape))] if v.ndim > len(shape) else v for v in views]
    shape = np.broadcast_shapes(*(v.shape for v in views)) if views[0].shape == views[1].shape else None
    if shape is None:
        return
    strides = [tuple(s // v.itemsize for s in v.strides) for v in views]
    axes = list(collapsed(shape, *strides))
    assert len(axes) <= sum(n > 1 for n in shape)
    for k, v in enumerate(views):
        places = np.zeros(1, int)
        for size, *steps in axes:
            places = (places[:, None] + np.arange(size) * steps[k]).ravel()
        assert (places == (v - v.min()).ravel()).all() if v.size else True


def test_collapsed_makes_neighbours_one():
    assert list(collapsed((2, 3, 4), (12, 4, 1))) == [(24, 1)]
    assert list(collapsed((2, 3, 4), (12, 4, 1), (1, 2, 6))) == [(2, 12, 1), (3, 4, 2), (4, 1, 6)]
    assert list(collapsed((2, 1, 4), (4, 99, 1), (8, 0, 2))) == [(8, 1, 2)]
    assert list(collapsed((2, 3), (0, 0))) == [(6, 0)]
    assert list(collapsed((1, 1), (5, 7))) == []


def test_what_is_no_array_on_a_gpu():
    for value in (None, 3, [1.0], np.zeros(3), "x", object()):
        assert framework_of(value) is None
