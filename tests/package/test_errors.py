"""Errors name the way out, where there is one; and nothing that a caller may give raises an error that does not name it."""

import inspect
import logging
import re
import time

import numpy as np
import pytest
from checks import limit, run_python

import numdcn
from numdcn._call import notice
from numdcn.warm import OPERATORS, _small_calls

SMALL_CALLS = _small_calls(np.dtype(np.float32))


def zeros(*shape):
    return np.zeros(shape, np.float32)


def random(*shape):
    return np.random.default_rng(0).random(shape, np.float32)


X, W, OFFSETS, MASK = zeros(1, 4, 8, 8), zeros(6, 4, 3, 3), zeros(1, 18, 6, 6), zeros(1, 9, 6, 6)
ROIS = np.array([[0, 1, 1, 4, 3]], np.float32)


class Frame:
    """What has numbers, as pandas' frames and PIL's images do."""

    def __array__(self, dtype=None, copy=None):
        return np.asarray(X, dtype)


def conv(x=X, w=W, bias=None, **more):
    return numdcn.conv_forward(x, w, bias, **more)


def deform(x=X, offsets=OFFSETS, w=W, bias=None, **more):
    return numdcn.deform_conv_forward(x, offsets, w, bias, **more)


def align(rois, x=X):
    return numdcn.roi_align_forward(x, rois, 2)


# A name: a wrong call, and how the error's message must end; then, for some, that the way out is one.
WAYS_OUT = {
    "padding": (lambda: deform(offsets=zeros(1, 18, 8, 8)), "; padding=1 would fit with this stride and dilation"),
    "padding with a stride": (
        lambda: deform(offsets=zeros(1, 18, 4, 5), stride=2, padding=0),
        "; padding=(1, 2) would fit with this stride and dilation",
    ),
    "padding of one side": (
        lambda: deform(offsets=zeros(1, 18, 7, 6)),
        "; padding=((0, 1), (0, 0)) would fit with this stride and dilation",
    ),
    "no padding": (lambda: deform(offsets=zeros(1, 18, 5, 5)), "kh=3, kw=3, offset_groups=1"),
    "padding of a layer": (
        lambda: numdcn.deform_conv_layer_backward(
            zeros(1, 6, 6, 6), X, W, zeros(18, 4, 3, 3), None, offsets=zeros(1, 18, 8, 8)
        ),
        "; padding=1 would fit with this stride and dilation",
    ),
    "modulated": (
        lambda: numdcn.deform_conv_layer_forward(X, W, zeros(27, 4, 3, 3), None),
        "with modulated=False; modulated=True would fit",
    ),
    "groups": (
        lambda: conv(groups=2),
        "`groups` is no argument of conv_forward: it is read off the shapes, as C over the second axis of `w`; leave it out",
    ),
    **{
        name: (
            lambda name=name: deform(**{name: 2}),
            f"`{name}` is no argument of deform_conv_forward: it is read off the shapes, as the channels of `offsets` over "
            "2*kh*kw; leave it out",
        )
        for name in ("offset_groups", "deformable_groups", "deform_groups")
    },
    "offset groups of a layer": (
        lambda: numdcn.deform_conv_layer_forward(X, W, zeros(18, 4, 3, 3), None, offset_groups=1),
        "as the outputs of `offset_w` over 2*kh*kw, or over 3*kh*kw if modulated; leave it out",
    ),
    "deformable groups of a new layer": (
        lambda: numdcn.deform_conv_layer_init(4, 6, 3, deformable_groups=2),
        "`deformable_groups` is no argument of deform_conv_layer_init, expected `offset_groups`",
    ),
    "names of torchvision": (
        lambda: numdcn.deform_conv_forward(input=X, offset=OFFSETS, weight=W),
        "`input` is no argument of deform_conv_forward, expected `x`",
    ),
    "offset": (lambda: numdcn.deform_conv_forward(X, offset=OFFSETS, w=W), ", expected `offsets`"),
    "weight": (lambda: numdcn.deform_conv_forward(X, OFFSETS, weight=W), ", expected `w`"),
    "boxes": (lambda: numdcn.roi_pool_forward(X, boxes=ROIS, output_size=2), ", expected `rois`"),
    "offset of ps": (
        lambda: numdcn.deform_ps_roi_pool_forward(X, ROIS, offset=None, output_size=2, group_size=2),
        ", expected `trans`",
    ),
    "output height": (
        lambda: numdcn.roi_align_forward(X, ROIS, output_height=2, output_width=2),
        ", expected `output_size=(height, width)`",
    ),
    "a slip": (lambda: conv(paddding=1), "`paddding` is no argument of conv_forward, expected `padding`"),
    "im2col_step": (lambda: deform(im2col_step=32), ": batches of any size fit; leave it out"),
    "an unknown name": (lambda: numdcn.prepare_weights(W, qqq=1), ", expected names among w, groups"),
    "by position": (
        lambda: numdcn.deform_conv_forward(X, OFFSETS, W, None, 1, 1),
        "deform_conv_forward takes 4 arguments by position (x, offsets, w, bias), 6 came; expected by keyword: mask, stride, "
        "padding, dilation, allow_tf32, out",
    ),
    "by position, swapped": (
        lambda: numdcn.deform_conv_forward(X, W, OFFSETS, MASK, None),
        "; `offsets` and `w` look swapped: the order is x, offsets, w, bias",
    ),
    "swapped": (lambda: deform(X, W, OFFSETS), "; `offsets` and `w` look swapped: the order is x, offsets, w, bias"),
    "mask by position": (
        lambda: deform(X, OFFSETS, MASK, W),
        "; `w` looks like a mask and `bias` like weights: the order is x, offsets, w, bias, with mask= by keyword",
    ),
    "four paddings": (
        lambda: conv(padding=(1, 2, 3, 4)),
        "; if these are top, left, bottom, right (ONNX), use ((1, 3), (2, 4)); if left, right, top, bottom (torch's pad), "
        "((3, 4), (1, 2))",
    ),
    "padding in a word": (lambda: conv(padding="same"), "; dilation*(kernel size - 1)//2 keeps the size at stride 1"),
    "no padding in a word": (lambda: conv(padding="valid"), "; use 0"),
    "padding in an array": (
        lambda: conv(padding=np.array([1, 1])),
        "expected an int of at least 0, a tuple of two: (y, x), or a tuple of two pairs: ((top, bottom), (left, right)); use "
        "padding.tolist()",
    ),
    "stride in an array": (
        lambda: conv(stride=np.array([1, 1])),
        "expected an int of at least 1, or a tuple of two: (y, x); use stride.tolist()",
    ),
    "ints": (lambda: conv(X.astype(int)), "has dtype int64, expected float32 or float64; use x.astype(np.float32)"),
    "half": (lambda: conv(w=W.astype(np.float16)), "expected float32 or float64; use w.astype(np.float32)"),
    "byte order": (lambda: conv(X.astype(">f8")), "in native byte order; use x.astype(np.float64)"),
    "complex": (lambda: conv(X.astype(complex)), "expected float32 or float64"),
    "a mixture": (
        lambda: deform(offsets=OFFSETS.astype(float)),
        "expected one dtype for all arrays; use offsets.astype(np.float32)",
    ),
    "a mixture with prepared weights": (
        lambda: conv(X.astype(float), numdcn.prepare_weights(W)),
        "; use prepare_weights(w.astype(np.float64))",
    ),
    "a gradient of another type": (
        lambda: numdcn.conv_backward(np.ones((1, 6, 6, 6)), X, W),
        "expected one dtype for all arrays; use grad_y.astype(np.float32)",
    ),
    "a list": (lambda: conv(X.tolist()), "of shape (N, C, H, W); use np.asarray(x, np.float32)"),
    "a frame": (lambda: conv(w=Frame()), "; use np.asarray(w, np.float32)"),
    "a masked array": (lambda: conv(np.ma.masked_array(X)), "; use x.filled(0)"),
    "a number": (lambda: conv(np.float32(1)), "of shape (N, C, H, W)"),
    "a list of maxima": (
        lambda: numdcn.roi_pool_backward(zeros(1, 4, 2, 2), X, ROIS, 2, argmax=[0]),
        "and dtype int32; use np.asarray(argmax, np.int32)",
    ),
    "one image": (lambda: conv(X[0]), "expected 4 axes: (N, C, H, W); use x[None]"),
    "one plane": (lambda: conv(X[0, 0]), "; use x[None, None]"),
    "an image file": (lambda: conv(zeros(8, 8, 3)), "; use x.transpose(2, 0, 1)[None] for an image (H, W, C)"),
    "offsets of one image": (lambda: deform(offsets=OFFSETS[0]), "; use offsets[None]"),
    "five axes": (lambda: conv(X[None]), "expected 4 axes: (N, C, H, W)"),
    "one box": (lambda: align(ROIS[0]), "; use rois[None]"),
    "no index": (
        lambda: align(ROIS[:, 1:]),
        "batch index, x1, y1, x2, y2; use np.insert(rois, 0, n, axis=1) for boxes of image n",
    ),
    "a list of boxes": (
        lambda: align([ROIS[:, 1:]]),
        "; use np.concatenate([np.insert(b, 0, n, axis=1) for n, b in enumerate(rois)])",
    ),
    "boxes in lists": (lambda: align([ROIS[0, 1:].tolist()]), "use np.asarray(rois, np.float32)"),
    "no boxes": (lambda: align([]), "; for no boxes use np.zeros((0, 5), np.float32)"),
    "no int": (
        lambda: numdcn.roi_align_forward(X, ROIS, 2, sampling_ratio=2.0),
        "`sampling_ratio` is 2.0 (float), expected an int",
    ),
    "no seed": (
        lambda: numdcn.deform_conv_layer_init(4, 6, 3, seed="0"),
        "`seed` is '0' (str), expected an int of at least 0, a NumPy Generator or None",
    ),
    "digits": (lambda: conv(stride=10**5000), "`stride` is a value too long to print, expected less than 2147483648"),
    "an array without axes in wrt": (
        lambda: numdcn.conv_backward(zeros(1, 6, 6, 6), X, W, wrt=np.array("x")),
        "expected None, or one or more of the names x, w, bias",
    ),
    "an unknown operator": (
        lambda: numdcn.warmup(operators="everything"),
        f'expected "all", or one or more of {", ".join(OPERATORS)}',
    ),
    "operators that are none": (lambda: numdcn.warmup(operators=np.array("conv")), ", ".join(OPERATORS)),
    "a far image": (
        lambda: conv(padding=2**23),
        "expected at most 16777216: float32 represents integers exactly only up to 2**24",
    ),
}


@pytest.mark.parametrize("name", WAYS_OUT)
def test_the_way_out(name):
    call, ending = WAYS_OUT[name]
    with pytest.raises((TypeError, ValueError)) as raised:
        call()
    assert str(raised.value).endswith(ending), str(raised.value)


def test_the_ways_out_are_right():
    """They do what their messages promise."""
    x, w, offsets = random(1, 4, 8, 8), random(6, 4, 3, 3), random(1, 18, 4, 5)
    assert deform(x, offsets, w, stride=2, padding=(1, 2)).shape == (1, 6, 4, 5)
    assert deform(x, random(1, 18, 7, 6), w, padding=((0, 1), (0, 0))).shape == (1, 6, 7, 6)
    assert deform(x, random(1, 18, 8, 8), w, padding=1).shape == (1, 6, 8, 8)
    assert conv(x, w, padding=np.array([[1, 2], [0, 1]]).tolist()).shape == (1, 6, 9, 7)
    boxes = [ROIS[:, 1:], zeros(0, 4), ROIS[:, 1:]]
    rois = np.concatenate([np.insert(b, 0, n, axis=1) for n, b in enumerate(boxes)])
    assert rois.dtype == np.float32 and rois[:, 0].tolist() == [0, 2] and align(rois, random(3, 4, 8, 8)).shape[0] == 2
    assert align(zeros(0, 5)).shape == (0, 4, 2, 2)


def test_ambiguous_weights_are_not_called_swapped():
    """Where the order given fits as well, an error is about something else."""
    square = zeros(1, 18, 3, 3)
    with pytest.raises(ValueError, match="`bias`") as raised:
        numdcn.deform_conv_forward(zeros(1, 18, 5, 5), square, zeros(1, 18, 3, 3), zeros(2))
    assert "swapped" not in str(raised.value)


def test_errors_of_a_function_pass_as_they_are():
    """Those with which Python refuses a call, where nothing is known beyond them; and those from within."""
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'w'"):
        numdcn.conv_forward(X)
    with pytest.raises(TypeError, match="multiple values for argument 'x'"):
        numdcn.conv_forward(X, W, x=X)

    class Odd:
        def __index__(self):
            raise TypeError("unexpected keyword argument")

    with pytest.raises(TypeError, match="`stride` is .*Odd.*expected an int"):
        conv(stride=Odd())


@pytest.mark.parametrize("operator", OPERATORS)
def test_modules_that_are_called(operator):
    with pytest.raises(TypeError) as raised:
        getattr(numdcn, operator)(X, OFFSETS, W)
    functions = f"numdcn.{operator}_forward or numdcn.{operator}_backward"
    assert str(raised.value) == f"numdcn.{operator} is a module, expected a call of {functions}"


def test_all_operators_are_warmed_up(monkeypatch):
    called = []
    for name in OPERATORS:
        ways = [lambda *args, name=name, way=way, **more: called.append((name, way)) for way in ("forward", "backward")]
        monkeypatch.setitem(OPERATORS, name, tuple(ways))
    numdcn.warmup(operators="all")
    assert called == [(name, way) for name in OPERATORS for way in ("forward", "backward")]


# Anything for anything.


class Broken:
    """What says that it is on a GPU, but not where."""

    __cuda_array_interface__ = {}  # noqa: RUF012


NOTHING = [
    *("", "x", b"x", None, True, np.True_, 1.5, np.nan, np.inf, 1j, -1, 0, 2**31, -(2**31) - 1, 2**63, 10**30, 10**5000),
    *((), [], {}, set(), [None], [[]], [1, [2]], (1, 1, 1), ((1, 1), 1), {"x": 1}, range(2), iter(()), object(), object),
    *(np.float32(1), np.int64(-1), np.float16(2), np.array(1), np.array(1.5), np.array("x"), np.array([]), np.array([1, 1])),
    *(np.array(None), np.array([None, "x"]), np.zeros((1, 1, 1, 1), object), np.zeros(2, "f4,i4"), np.zeros((2, 2), "M8[s]")),
    *(np.asmatrix(np.ones((2, 5), np.float32)), np.asmatrix(np.ones((2, 4), np.float32)), np.asmatrix([[0.5]])),
    *(np.ma.masked, np.ma.masked_array([1.0]), np.ndarray, np.dtype("f4"), Broken(), print, ...),
    *(np.empty((0, 0, 0, 0), np.float32), np.empty((0, 5), np.float32), np.full((1, 5), np.nan, np.float32)),
]  # fmt: skip
DIRECTIONS = [(name, way) for name in OPERATORS for way in ("forward", "backward")]


def arguments(operator, way):
    """The names of all arguments, and those of a small call."""
    names = list(inspect.signature(getattr(numdcn, f"{operator}_{way}")).parameters)
    arrays, more = SMALL_CALLS[operator]
    if way == "backward":
        y = getattr(numdcn, f"{operator}_forward")(*arrays, **more)
        arrays = (getattr(y, "y", y), *arrays)
    return names, {**dict(zip(names, arrays)), **more}


@pytest.mark.parametrize("operator, way", DIRECTIONS)
def test_anything_for_anything(operator, way):
    """It is taken, or refused by its name."""
    function = getattr(numdcn, f"{operator}_{way}")
    names, usual = arguments(operator, way)
    for name in names:
        for value in NOTHING:
            refused_by_name(function, name, value, usual)


OTHERS = {
    numdcn.prepare_weights: {"w": W, "groups": 1},
    numdcn.set_num_threads: {"n": 2},
    numdcn.set_scratch_limit: {"nbytes": 2**26},
    numdcn.deform_conv_layer_init: {
        **dict.fromkeys(("in_channels", "out_channels", "kernel_size", "groups", "offset_groups"), 1),
        "modulated": False, "bias": True, "dtype": "f4", "seed": 0,
    },
    numdcn.warmup: {"dtype": "f4", "backward": False, "operators": ()},
}  # fmt: skip


@pytest.mark.parametrize("function", OTHERS, ids=lambda function: function.__name__)
def test_anything_for_other_functions(function):
    threads, limit = numdcn.get_num_threads(), numdcn.get_scratch_limit()
    try:
        for name in OTHERS[function]:
            for value in NOTHING:
                refused_by_name(function, name, value, OTHERS[function])
    finally:
        numdcn.set_num_threads(threads)
        numdcn.set_scratch_limit(limit)


def refused_by_name(function, name, value, usual):
    try:
        function(**{**usual, name: value})
    except (TypeError, ValueError) as error:
        assert re.search(rf"`{name}\b", str(error)), f"{name}={value!r:.40}: {error}"
    except Exception as error:
        raise AssertionError(f"{name}={value!r:.40} raised {error!r}") from error


# Without a compiler, and while it works.

EVERY_OPERATOR = """
import numpy as np
import numdcn
from numdcn.warm import OPERATORS, _small_calls
for name, (arrays, more) in _small_calls(np.dtype(np.float32)).items():
    try:
        OPERATORS[name][0](*arrays, **more)
    except RuntimeError as error:
        assert "NUMBA_DISABLE_JIT is set" in str(error) and "unset NUMBA_DISABLE_JIT" in str(error), error
    else:
        raise AssertionError(name)
"""


def test_numba_without_its_compiler():
    run_python(EVERY_OPERATOR, NUMBA_DISABLE_JIT=1)


FIRST_CALL = """
import logging, sys
import numpy as np
import numdcn
from numdcn._call import notice
notice.PATIENCE = 0.1
if "configured" in sys.argv:
    logging.basicConfig(format="told by %(name)s: %(message)s", stream=sys.stdout)
for _ in range(2):
    numdcn.conv_forward(np.ones((1, 1, 2, 2)), np.ones((1, 1, 1, 1)))
"""


def test_a_first_call_that_compiles_says_so(tmp_path):
    """Once, on stderr; not when the code is found."""
    told = run_python(FIRST_CALL, NUMBA_CACHE_DIR=tmp_path, NUMDCN_QUIET=None).stderr
    assert re.fullmatch(r"numdcn: conv_forward is being compiled for this CPU, once: the code is kept in \S+\n", told)
    assert str(tmp_path) in told
    assert run_python(FIRST_CALL, NUMBA_CACHE_DIR=tmp_path, NUMDCN_QUIET=None).stderr == ""


def test_an_application_decides_where_it_is_said(tmp_path):
    done = run_python(FIRST_CALL, "configured", NUMBA_CACHE_DIR=tmp_path, NUMDCN_QUIET=None)
    assert done.stdout.startswith("told by numdcn: numdcn: conv_forward is being compiled") and done.stderr == ""


class Cache:
    missed, cache_path = True, None


@pytest.fixture
def said(monkeypatch, caplog):
    monkeypatch.setattr(notice, "_waited", {})
    monkeypatch.delenv("NUMDCN_QUIET", raising=False)
    caplog.set_level(logging.WARNING, "numdcn")
    return caplog.messages


def test_what_is_said_of_compiling(said, monkeypatch):
    for caller in ("conv_forward", "", "conv_forward", "roi_pool_forward"):
        notice.waited(caller, 0.6, "CPU", Cache)
    assert said == ["numdcn: conv_forward is being compiled for this CPU, and not kept: no folder is writable"]
    notice.waited("conv_forward", 9.0, "CPU", Cache)
    found = type("Found", (), {"missed": False})
    notice.waited("conv_backward", 9.0, "CPU", found)
    assert len(said) == 1
    monkeypatch.setenv("NUMDCN_QUIET", "1")
    notice.waited("roi_pool_backward", 9.0, "CPU", Cache)
    assert len(said) == 1


def test_a_timer_waits_for_a_kernel_of_a_gpu(said, monkeypatch):
    monkeypatch.setattr(notice, "public_caller", lambda: "conv_forward")
    with notice.waiting("GPU", Cache):
        pass
    assert said == []
    monkeypatch.setattr(notice, "PATIENCE", 0.0)
    with notice.waiting("GPU", Cache):
        waited_for(lambda: said)
    assert said == ["numdcn: conv_forward is being compiled for this GPU, and not kept: no folder is writable"]


def waited_for(condition):
    end = time.monotonic() + limit(20)
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
