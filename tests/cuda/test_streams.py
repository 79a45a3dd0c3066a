"""What is kept and ordered between GPU calls: streams, scratch memory, prepared weights, launch parameters.

Nothing here needs a GPU: streams are handles whose commands are recorded instead of issued.
"""

import importlib.util
import threading
import types
from typing import NamedTuple

import device
import numpy as np
import pytest
from checks import assert_same_bits
from test_frameworks import Array, Interface, Tensor, cupy, receive_all  # noqa: F401 - a fixture

import numdcn
from numdcn._call import arguments, device_scratch, frameworks, results
from numdcn._call.device_array import DTYPES, DeviceArray, c_strides
from numdcn._call.results import given_back, output_array

NUMBA = next(f for f in frameworks.FRAMEWORKS if f.name == "numba")


@pytest.fixture
def orders(monkeypatch):
    """[(device, stream, stream it has to wait for), ...]"""
    told = []
    for module in (frameworks, arguments, results):
        monkeypatch.setattr(module, "follow", lambda *order: told.append(order))
    monkeypatch.setattr(frameworks, "_device_of", lambda address: 0)
    return told


def array(stream, address=0x1000, shape=(4, 3)):
    return DeviceArray(object(), NUMBA, 0, address, DTYPES["float32"], shape, c_strides(shape), stream)


def test_arrays_of_other_streams_are_waited_for(orders):
    seen = receive_all(x=Interface(stream=5), w=Interface(stream=7), bias=None, mask=Interface(stream=5))
    assert orders == [(0, 5, 7)]
    assert [seen[name].stream for name in ("x", "w", "mask")] == [5, 5, 5]


def test_one_stream_waits_for_nothing(orders):
    receive_all(x=Interface(stream=5), w=Interface(stream=5))
    given_back(array(5))
    assert orders == []


def test_the_stream_of_out_waits_for_the_result(orders):
    out = output_array("out", array(7, 0x2000), (4, 3), np.dtype(np.float32), {"x": array(5, 0x8000)})
    assert orders == [(0, 5, 7)] and out.stream == 5
    assert given_back(out) is out.owner
    assert orders == [(0, 5, 7), (0, 7, 5)]


def test_prepared_weights_keep_their_stream(orders):
    """Other threads may be using them on other streams."""
    made = object.__new__(numdcn.PreparedWeights)
    made._array = array(7)
    seen = receive_all(x=Interface(stream=5), w=made)
    assert orders == [(0, 5, 7)] and seen["w"].array.stream == 7


# Scratch memory.


@pytest.fixture
def nothing_kept(monkeypatch):
    monkeypatch.setattr(device_scratch, "_kept", {})
    before = numdcn.get_scratch_limit()
    yield
    numdcn.set_scratch_limit(before)


def block(nbytes):
    return device_scratch.Block(object(), 0x1000 * nbytes, nbytes)


def test_blocks_are_taken_on_their_stream_and_of_about_their_size(nothing_kept):
    small, middle, large = block(1000), block(5000), block(2**24)
    for one in (small, large, middle):
        device_scratch.give_back(0, 5, one)
    assert device_scratch.kept_bytes() == 6000 + 2**24
    assert device_scratch.take(0, 6, 1000) is None and device_scratch.take(1, 5, 1000) is None
    assert device_scratch.take(0, 5, 1001) == middle
    assert device_scratch.take(0, 5, 1001) is None  # the large one would be wasteful
    assert device_scratch.take(0, 5, 2**23) == large
    assert device_scratch.take(0, 5, 10) == small
    assert device_scratch.kept_bytes() == 0


def test_the_scratch_limit_is_for_all_devices_and_streams(nothing_kept):
    numdcn.set_scratch_limit(5000)
    for number, stream in ((0, 0), (0, 1), (1, 0)):
        device_scratch.give_back(number, stream, block(2000))
    assert device_scratch.kept_bytes() == 4000
    assert device_scratch.take(1, 0, 2000) is not None  # the newest
    numdcn.set_scratch_limit(0)
    device_scratch.give_back(0, 0, block(1))
    assert device_scratch.kept_bytes() == 0


def test_a_default_stream_of_each_thread(nothing_kept):
    """Handle 2 is a different stream in every thread."""
    there = []
    mine = block(1000)
    device_scratch.give_back(0, device_scratch.PER_THREAD, mine)
    thread = threading.Thread(target=lambda: there.append(device_scratch.take(0, device_scratch.PER_THREAD, 1000)))
    thread.start()
    thread.join()
    assert there == [None]
    assert device_scratch.take(0, device_scratch.PER_THREAD, 1000) is mine


def test_no_room_makes_room(nothing_kept, monkeypatch):
    monkeypatch.setattr(frameworks, "_on_device", lambda number, action: action())
    tries = []

    def action():
        tries.append(device_scratch.kept_bytes())
        if tries[-1]:
            raise MemoryError
        return "made"

    device_scratch.give_back(0, 0, block(1000))
    assert frameworks._with_memory(0, action) == "made" and tries == [1000, 0]

    def never():
        raise MemoryError("still")

    with pytest.raises(MemoryError, match="still"):
        frameworks._with_memory(0, never)


# Prepared weights.


@pytest.mark.full
@pytest.mark.parametrize("kind", device.KINDS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_prepared_weights_are_packed_once(kind, dtype):
    reason = device.missing(kind)
    if reason:
        pytest.skip(reason)
    rng = np.random.default_rng(0)
    shapes = {"x": (1, 16, 4, 3), "offsets": (1, 36, 4, 3), "w": (6, 8, 3, 3), "grad_y": (1, 6, 4, 3)}
    arrays = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    plain, first, again, layouts = device.program(kind, "memory_programs", "prepared", arrays)
    for name, want in plain.items():
        assert_same_bits(first[name], want, name)
        assert_same_bits(again[name], want, name)
    assert layouts == [2, 2]  # one each for forward and backward, after the first and the second round


@pytest.mark.parametrize("kind", device.KINDS)
def test_prepared_weights_that_a_graph_packs_are_not_remembered(kind):
    """A capture fills nothing, and the graph packs for itself. One captured later finds what an ordinary call has packed."""
    reason = device.missing(kind)
    if reason:
        pytest.skip(reason)
    rng = np.random.default_rng(0)
    shapes = {"x": (1, 8, 2, 2), "offsets": (1, 2, 2, 2), "w": (3, 8, 1, 1), "grad_y": (1, 3, 2, 2)}
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    plain, others, layouts, launches = device.program(kind, "memory_programs", "captured", arrays)
    for other in others:
        for name, want in plain.items():
            assert_same_bits(other[name], want, name)
    assert layouts == [0, 2, 2] and launches[0] == launches[1] + 2


def test_whether_a_stream_is_captured(monkeypatch):
    if importlib.util.find_spec("numba_cuda") is None:
        pytest.skip("numba-cuda is not installed: pip install -e .[test]")
    from numdcn._call import driver

    status = types.SimpleNamespace(CU_STREAM_CAPTURE_STATUS_NONE=0)
    told = {5: (0, 0), 6: (0, 1), 7: (0, 2), 8: (900, 0)}
    names = {
        f"cuGetError{what}": lambda error, what=what: (0, f"{what} {error}".encode()) for what in ("Name", "String")
    }
    fake = types.SimpleNamespace(CUstreamCaptureStatus=status, cuStreamIsCapturing=told.get, **names)
    monkeypatch.setattr(driver, "driver", fake)
    monkeypatch.setattr(driver, "on_device", lambda number, action: action())
    assert [driver.capturing(0, stream) for stream in (5, 6, 7)] == [False, True, True]
    with pytest.raises(RuntimeError, match="captured: Name 900: String 900"):
        driver.capturing(0, 8)


# Launches.


class Inner(NamedTuple):
    sizes: tuple[int, int]
    count: int


def test_parameters_are_flat():
    """As Numba passes them: every scalar is a parameter."""
    if importlib.util.find_spec("numba_cuda") is None:
        pytest.skip("numba-cuda is not installed: pip install -e .[test]")
    from numba.cuda.types import float32, float64

    from numdcn._cuda.jit import Scalar, _numba_type
    from numdcn._cuda.launch import Kernel

    class Outer(NamedTuple):
        first: int
        inner: Inner
        scale: Scalar
        pair: tuple[int, int]
        last: int

    Outer.__annotations__ = {"first": int, "inner": Inner, "scale": Scalar, "pair": tuple[int, int], "last": int}
    kernel = Kernel(None, (_numba_type(Outer, float32),))
    call = Outer(1, Inner((2, 3), 4), 0.5, (6, 7), 8)
    assert kernel._flatten(call) == (1, 2, 3, 4, 0.5, 6, 7, 8)
    assert kernel._packing.format == "@qqqqfqqq"
    assert kernel.offsets == [0, 8, 16, 24, 32, 40, 48, 56]
    assert Kernel(None, (_numba_type(Inner, float64),))._flatten(Inner((2, 3), 4)) == (2, 3, 4)


def test_tensors_of_torch_keep_one_stream(orders, monkeypatch):
    """torch reports one stream, the current one."""
    streams = types.SimpleNamespace(current_stream=lambda number: types.SimpleNamespace(cuda_stream=9))
    monkeypatch.setitem(
        frameworks.sys.modules, "torch", types.SimpleNamespace(Tensor=Tensor, cuda=streams, float32="float32")
    )
    seen = receive_all(x=Tensor(), w=Tensor())
    assert orders == [] and seen["w"].stream == 9


def test_devices_of_one_framework_are_not_mixed(cupy):  # noqa: F811
    """Where arrays are looked at one by one."""
    with pytest.raises(ValueError, match="`points` is an array of cupy on GPU 1, but `x` is an array of cupy on GPU 0"):
        numdcn.bilinear_sample_forward(Array((1, 2, 3, 4)), Array((1, 5, 2), number=1))


def test_the_padding_that_fits_is_told_of_arrays_that_only_show_their_memory(monkeypatch):
    """They have no attribute `shape`."""
    monkeypatch.setattr(frameworks, "_device_of", lambda address: 0)
    grad_y, x, w = (Interface(shape=(1, 1, n, n)) for n in (4, 4, 3))
    with pytest.raises(ValueError, match=r"expected \(1, 1, 2, 2\) = .*; padding=1 would fit"):
        numdcn.conv_backward(grad_y, x, w)
