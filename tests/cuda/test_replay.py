"""Calls that repeat the launches of an earlier one (numdcn/_cuda/replay.py), without a GPU: kernels are recorded with the
parameters that the driver would read. (The tests of all operators call twice, in the simulator and on the emulator.)"""

import ctypes
import gc
import importlib.util
import struct
import threading
import time
import types
import weakref
from typing import NamedTuple

import numpy as np
import pytest

from numdcn._call import remembered
from numdcn._call.device_array import DTYPES, DeviceArray, Framework, c_strides
from numdcn._call.options import DEFAULT, Options
from numdcn._call.prepared import PreparedWeights

if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed: pip install -e .[test]", allow_module_level=True)

from numba.cuda import types as numba_types

from numdcn._cuda import jit, launch, replay
from numdcn._cuda.workspace import Workspace

F32 = DTYPES["float32"]


class Pair(NamedTuple):
    """Parameters of `KERNEL`."""

    source: int
    inner: tuple[int, int]
    target: int


class Arrays(NamedTuple):
    x: object
    w: object = None


class Problem(NamedTuple):
    size: int


class Memory(Framework):
    """A framework whose scratch memory starts at ever new addresses."""

    name = "memory"

    def __init__(self):
        self.next, self.given_back = 2**40, 0

    def empty(self, shape, dtype, device, stream):
        self.next += 2**16
        return DeviceArray(object(), self, device, self.next, dtype, shape, c_strides(shape), stream)

    def give_back(self, array):
        self.given_back += 1


class Owner:
    """An array of the caller."""


MEMORY, USUAL = Memory(), Problem(3)


def array(address, shape=(4, 4), strides=None, dtype=F32, device=0, stream=5):
    strides = c_strides(shape) if strides is None else strides
    return DeviceArray(Owner(), MEMORY, device, address, dtype, shape, strides, stream)


@pytest.fixture
def launches(monkeypatch):
    """[(blocks, stream, (source, first, second, target)), ...] of all launches."""
    told = []

    def launched(handle, blocks, *sizes_stream_and_parameters):
        stream, parameters, _ = sizes_stream_and_parameters[-3:]
        time.sleep(0)  # as the driver lets other threads run
        places = (ctypes.c_void_p * 4).from_address(parameters)
        told.append((blocks, stream, tuple(ctypes.c_int64.from_address(place).value for place in places)))
        return (0,)

    monkeypatch.setattr(launch, "driver", types.SimpleNamespace(cuLaunchKernel=launched), raising=False)
    for module in (launch, replay):
        monkeypatch.setattr(module, "on_device", lambda device, action: action())
    monkeypatch.setattr(replay, "_known", {})
    return told


def kernel():
    made = launch.Kernel(None, (jit._numba_type(Pair, numba_types.float32),))
    made._handles = {0: "handle", 1: "handle"}
    return made


KERNEL = kernel()


class Room:
    """The `forward` of a room that counts how often it runs itself."""

    def __init__(self, run):
        self.runs, self.run = 0, run
        self.forward = replay.forward(self._forward)

    def _forward(self, p, arrays, y, options):
        self.runs += 1
        with Workspace(y) as work:
            self.run(work, p, arrays, y)

    def __call__(self, x, y, w=None, p=USUAL, options=DEFAULT):
        self.forward(p, Arrays(x, w), y, options)


def two_steps(work, p, arrays, y):
    middle, other = work.empty((p.size, 8), F32), work.empty((5,), F32)
    work.launch(KERNEL, Pair(arrays.x.address, (p.size, 7), middle.address), 2)
    work.launch(KERNEL, Pair(middle.address + 16, (other.address, 0), y.view((2,), (1,), 3).address), 3)


def test_parameters_are_recorded_and_addresses_replaced(launches):
    room = Room(two_steps)
    room(array(0x1000), array(0x9000))
    first = list(launches)
    launches.clear()
    room(array(0x2000), array(0xA000, stream=6))
    assert room.runs == 1
    (blocks, stream, one), (_, _, two) = launches
    assert (blocks, stream) == (2, 6) and launches[1][:2] == (3, 6)
    assert one[:3] == (0x2000, 3, 7) and two[0] == one[3] + 16 and two[3] == 0xA000 + 12
    assert one[3] % 256 == 0 and two[1] - one[3] >= 3 * 8 * 4, "scratch arrays do not overlap"
    assert one[3] != first[0][2][3], "the scratch memory is the second call's own"
    for (b, s, numbers), (other_b, _, others) in zip(first, launches, strict=True):
        assert b == other_b and s == 5 and numbers[2] == others[2]
    assert MEMORY.given_back >= 3


@pytest.mark.parametrize(
    "change",
    [
        {"strides": (1, 4)}, {"address": 0x1004}, {"shape": (4, 5)}, {"dtype": DTYPES["float16"]}, {"device": 1},
        {"p": Problem(4)}, {"options": Options(deterministic=True)}, {"w": 0x3000},
    ],
    ids=str,
)  # fmt: skip
def test_another_kind_of_call_is_computed_anew(launches, change):
    room = Room(two_steps)
    room(array(0x1000), array(0x9000))
    device, w = change.pop("device", 0), change.pop("w", None)
    more = {key: change.pop(key) for key in ("p", "options") if key in change}
    x = array(**{"address": 0x1000, "device": device, **change})
    launches.clear()
    room(x, array(0x9000, device=device), w and array(w), **more)
    assert room.runs == 2
    assert launches[0][2][1] == more.get("p", USUAL).size


@pytest.mark.parametrize("lost", ["as int", "divided", "of scratch"])
def test_an_address_that_lost_its_array_is_not_repeated(launches, lost):
    def run(work, p, arrays, y):
        made = work.empty((9,), F32)
        address = {
            "as int": int(arrays.x.address),
            "divided": arrays.x.address // 1,
            "of scratch": int(made.address) + 8,
        }
        work.launch(KERNEL, Pair(address[lost], (0, 0), y.address), 1)

    room = Room(run)
    for x in (0x100000, 0x200000):
        room(array(x), array(0x900000))
    assert room.runs == 2 and launches[0][2][0] != launches[1][2][0]


def test_what_goes_another_way_is_not_repeated(launches):
    def run(work, p, arrays, y):
        two_steps(work, p, arrays, y)
        replay.unrepeatable()

    room = Room(run)
    for _ in range(3):
        room(array(0x1000), array(0x9000))
    assert room.runs == 3 and len(launches) == 6


def test_a_failure_leaves_nothing(launches):
    def run(work, p, arrays, y):
        two_steps(work, p, arrays, y)
        if room.runs == 1:
            raise MemoryError

    room = Room(run)
    with pytest.raises(MemoryError):
        room(array(0x1000), array(0x9000))
    assert not replay._known and replay.current.recording is None
    room(array(0x1000), array(0x9000))
    room(array(0x1000), array(0x9000))
    assert room.runs == 2


def test_nothing_of_the_caller_is_kept(launches):
    room = Room(two_steps)
    x, y = array(0x1000), array(0x9000)
    owners = [weakref.ref(x.owner), weakref.ref(y.owner)]
    room(x, y)
    assert replay._known
    del x, y
    gc.collect()
    assert [owner() for owner in owners] == [None, None]


def test_as_many_kinds_as_fit(launches, monkeypatch):
    monkeypatch.setattr(remembered, "MOST", 3)
    room = Room(two_steps)
    for size in range(1, 9):
        room(array(0x1000), array(0x9000), p=Problem(size))
        assert len(replay._known) <= 3
    room(array(0x1000), array(0x9000), p=Problem(8))
    assert room.runs == 8


def test_a_call_within_a_call_belongs_to_it(launches):
    inner = Room(two_steps)

    def run(work, p, arrays, y):
        inner(arrays.x, y)
        work.launch(KERNEL, Pair(y.address, (1, 2), arrays.x.address), 1)

    inner(array(0x1000), array(0x9000))
    outer = Room(run)
    outer(array(0x1000), array(0x9000))
    launches.clear()
    outer(array(0x2000), array(0xA000))
    assert (outer.runs, inner.runs) == (1, 2) and len(launches) == 3
    assert launches[0][2][0] == 0x2000 and launches[2][2] == (0xA000, 1, 2, 0x2000)


def prepared(address, key):
    made = PreparedWeights(array(address), 1)
    made.layouts[("rows", *key)] = array(address + 0x100)
    return made


def test_prepared_weights_are_those_of_the_call(launches):
    """Packed for the call's stream; a call whose weights are not packed yet packs them."""

    def run(work, p, arrays, y):
        key = ("rows", *replay.stream_key(work.stream))
        if key not in arrays.w.layouts:
            arrays.w.layouts[key] = array(0x70000 + 0x1000 * room.runs)
            work.launch(KERNEL, Pair(arrays.w.array.address, (8, 8), arrays.w.layouts[key].address), 9)
            replay.only_now()
        packed = work.layout(("rows",), arrays.w.layouts[key])
        work.launch(KERNEL, Pair(packed, (0, 0), y.address), 1)

    room = Room(run)
    first, second = prepared(0x3000, (5, 0)), prepared(0x4000, (5, 0))
    for w in (first, second):
        room(array(0x1000), array(0x9000), w)
    assert room.runs == 1 and [numbers[0] for _, _, numbers in launches] == [0x3100, 0x4100]
    launches.clear()
    for _ in range(3):
        room(array(0x1000, stream=6), array(0x9000, stream=6), second)
    assert room.runs == 2 and [numbers[0] for _, _, numbers in launches] == [0x4000, 0x72000, 0x72000, 0x72000]
    replay._known.clear()
    launches.clear()
    for _ in range(3):
        room(array(0x1000, stream=7), array(0x9000, stream=7), second)
    assert room.runs == 4 and [blocks for blocks, _, _ in launches] == [9, 1, 1, 1], "packing is not repeated"


def test_many_threads_at_once(launches):
    """Each with arrays of its own: no launch mixes them."""
    room, wrong = Room(two_steps), []

    def many(number):
        for i in range(200):
            x, y = 0x100000 * (number + 1) + 0x100 * i, 0x9000000 * (number + 1)
            room(array(x, stream=number), array(y, stream=number))

    threads = [threading.Thread(target=many, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(launches) == 6 * 200 * 2
    for number in range(6):
        mine = [numbers for _, stream, numbers in launches if stream == number]
        for i in range(200):
            one, two = mine[2 * i], mine[2 * i + 1]
            if one[0] != 0x100000 * (number + 1) + 0x100 * i or two[0] != one[3] + 16:
                wrong.append((number, i, one, two))
            if two[3] != 0x9000000 * (number + 1) + 12:
                wrong.append((number, i, two))
    assert not wrong


def test_a_tag_follows_the_address():
    address = replay.tagged(0x1000, 2)
    for moved in (address + 8, 8 + address):
        assert isinstance(moved, replay.Tagged) and (moved, moved.slot, moved.delta) == (0x1008, 2, 8)
    assert not isinstance(address + replay.tagged(1, 0), replay.Tagged)
    assert struct.pack("q", address + 1) == struct.pack("q", 0x1001)


def test_arrays_read_backwards_are_known_from_their_first_byte():
    recording = replay.Recording(1, 0)
    recording.array(array(0x1000, (4, 4), (-4, 1)), 0)
    assert recording.spans == [(0x1000 - 48, 0x1000 + 16)]
    assert np.dtype(F32).itemsize == 4
