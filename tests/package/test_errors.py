"""Errors name the way out, where there is one."""

import ml_dtypes
import numpy as np
import pytest

import numdcn
from numdcn.warm import OPERATORS


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


IMAGE_OR_BATCH = "; use x[None] for an image (C, H, W), x[:, None] for a batch (N, H, W)"
BY_KEYWORD = "; stride, padding and dilation are given by keyword"
CHANNELS_LAST = "; use x.transpose(0, 3, 1, 2) if x is channels-last"
PIXELS = ": points are pixels: see docs/migrating.md"
FIRST, FIRST_OF_CONV = "; grad_y comes first: grad_y, x, offsets, w, bias", "; grad_y comes first: grad_y, x, w, bias"
POINTS = zeros(1, 5, 2)
deform_back, conv_back = numdcn.deform_conv_backward, numdcn.conv_backward


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
    "one padding for both axes": (
        lambda: deform(zeros(1, 4, 8, 7), zeros(1, 18, 4, 4), stride=3),
        "; padding=3 would fit with this stride and dilation",
    ),
    "channels last": (lambda: deform(zeros(2, 12, 14, 8), zeros(2, 36, 12, 14), zeros(6, 4, 3, 3)), CHANNELS_LAST),
    "channels last, with the padding given": (
        lambda: deform(zeros(2, 12, 14, 8), zeros(2, 36, 12, 14), zeros(6, 4, 3, 3), padding=1),
        CHANNELS_LAST,
    ),
    "channels last, and weights": (lambda: conv(zeros(2, 28, 28, 3), zeros(8, 3, 3, 3)), f"of `x`{CHANNELS_LAST}"),
    "padding of a gradient": (
        lambda: conv_back(zeros(1, 6, 8, 8), X, W),
        "= (N, C_out, Ho, Wo); padding=1 would fit with this stride and dilation",
    ),
    "no gradient": (lambda: deform_back(X, OFFSETS, W), f"missing 1 required positional argument: 'w'{FIRST}"),
    "no gradient, but a bias": (lambda: deform_back(X, OFFSETS, W, zeros(6)), FIRST),
    "no gradient, and no bias": (lambda: deform_back(X, OFFSETS, W, None), FIRST),
    "the gradient last": (lambda: deform_back(X, OFFSETS, W, zeros(1, 6, 6, 6)), FIRST),
    "the gradient behind the bias": (lambda: deform_back(X, OFFSETS, W, zeros(6), zeros(1, 6, 6, 6)), FIRST),
    "the gradient given twice": (lambda: deform_back(X, OFFSETS, W, grad_y=zeros(1, 6, 6, 6)), FIRST),
    "no gradient of conv": (lambda: conv_back(X, W), FIRST_OF_CONV),
    "the gradient of conv last": (lambda: conv_back(X, W, zeros(1, 6, 6, 6)), FIRST_OF_CONV),
    "a gradient in its place": (
        lambda: conv_back(zeros(1, 4, 8, 8), X, zeros(6, 3, 3, 3), padding=1),
        "expected a divisor of C = 4 of `x`",
    ),
    "a gradient of another shape": (
        lambda: deform_back(zeros(1, 6, 5, 5), X, OFFSETS, W),
        "expected (1, 6, 6, 6) = (N, C_out, Ho, Wo)",
    ),
    "a stride by position": (lambda: deform(bias=1), BY_KEYWORD),
    "strides by position": (lambda: conv(bias=(1, 1)), BY_KEYWORD),
    "no bias": (lambda: conv(bias=False), "; use None"),
    "a mask for a bias": (lambda: deform(bias=MASK), "; `bias` looks like a mask: pass it as mask="),
    "a name in wrt": (lambda: conv_back(zeros(1, 6, 6, 6), X, W, wrt="weight"), "; use 'w'"),
    "a name in wrt of deform": (
        lambda: deform_back(zeros(1, 6, 6, 6), X, OFFSETS, W, wrt=["x", "offset"]),
        "`wrt` holds 'offset', expected one or more of x, offsets, w, bias, mask; use 'offsets'",
    ),
    **{
        name: (
            lambda name=name: numdcn.roi_align_forward(X, ROIS, 2, **{name: "avg"}),
            f"`{name}` is not an argument of roi_align_forward: only the average exists; leave it out",
        )
        for name in ("pool_mode", "mode")
    },
    "mode of points": (
        lambda: numdcn.bilinear_sample_forward(X, POINTS, mode="bilinear"),
        ": only bilinear interpolation exists; leave it out",
    ),
    "corners": (lambda: numdcn.bilinear_sample_forward(X, POINTS, align_corners=False), PIXELS),
    "padding of points": (lambda: numdcn.bilinear_sample_forward(X, POINTS, padding_mode="zeros"), PIXELS),
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
        "`groups` is not an argument of conv_forward: it is inferred from the shapes: C / w.shape[1]; leave it out",
    ),
    **{
        name: (
            lambda name=name: deform(**{name: 2}),
            f"`{name}` is not an argument of deform_conv_forward: it is inferred from the shapes: "
            "offsets.shape[1] / (2*kh*kw); leave it out",
        )
        for name in ("offset_groups", "deformable_groups", "deform_groups")
    },
    "offset groups of a layer": (
        lambda: numdcn.deform_conv_layer_forward(X, W, zeros(18, 4, 3, 3), None, offset_groups=1),
        ": offset_w.shape[0] / (2*kh*kw), or / (3*kh*kw) if modulated; leave it out",
    ),
    "deformable groups of a new layer": (
        lambda: numdcn.deform_conv_layer_init(4, 6, 3, deformable_groups=2),
        "`deformable_groups` is not an argument of deform_conv_layer_init, expected `offset_groups`",
    ),
    "names of torchvision": (
        lambda: numdcn.deform_conv_forward(input=X, offset=OFFSETS, weight=W),
        "`input` is not an argument of deform_conv_forward, expected `x`",
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
    "a slip": (lambda: conv(paddding=1), "`paddding` is not an argument of conv_forward, expected `padding`"),
    "im2col_step": (lambda: deform(im2col_step=32), ": batches of any size fit; leave it out"),
    "an unknown name": (lambda: numdcn.prepare_weights(W, qqq=1), ", expected names among w, groups"),
    "by position": (
        lambda: numdcn.deform_conv_forward(X, OFFSETS, W, None, 1, 1),
        "deform_conv_forward takes 4 arguments by position (x, offsets, w, bias), 6 were given; pass by keyword: mask, stride, "
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
    "ints": (
        lambda: conv(X.astype(int)),
        "has dtype int64, expected float16, bfloat16, float32 or float64; use x.astype(np.float32)",
    ),
    "half": (lambda: conv(w=W.astype(np.float16)), "expected one dtype for all arrays; use w.astype(np.float32)"),
    "bits of a half type": (
        lambda: conv(X.astype(np.uint16)),
        "has dtype uint16, expected float16, bfloat16, float32 or float64; use x.astype(np.float32)",
    ),
    "to bfloat16": (
        lambda: conv(X.astype(ml_dtypes.bfloat16)),
        "expected one dtype for all arrays; use w.astype(ml_dtypes.bfloat16)",
    ),
    "byte order of a half type": (lambda: conv(X.astype(">f2")), "in native byte order; use x.astype(np.float16)"),
    "byte order": (lambda: conv(X.astype(">f8")), "in native byte order; use x.astype(np.float64)"),
    "complex": (lambda: conv(X.astype(complex)), "expected float16, bfloat16, float32 or float64"),
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
    "one image": (lambda: conv(X[0]), f"expected 4 axes: (N, C, H, W){IMAGE_OR_BATCH}"),
    "one image per row": (lambda: conv(zeros(16, 28, 28)), IMAGE_OR_BATCH),
    "a grey image file": (lambda: conv(zeros(28, 28, 1)), "; use x.transpose(2, 0, 1)[None] for an image (H, W, C)"),
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
        "; use np.concatenate([np.insert(np.reshape(b, (-1, 4)), 0, n, axis=1) for n, b in enumerate(rois)]).astype(x.dtype)",
    ),
    "lists without boxes": (lambda: align([[], []]), "; for no boxes use np.zeros((0, 5), np.float32)"),
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
    assert deform(random(1, 4, 8, 7), random(1, 18, 4, 4), w, stride=3, padding=3).shape == (1, 6, 4, 4)
    turned = random(2, 12, 14, 8).transpose(0, 3, 1, 2)
    assert deform(turned, random(2, 36, 12, 14), w, padding=1).shape == (2, 6, 12, 14)
    assert deform(x, random(1, 18, 8, 8), w, padding=1).shape == (1, 6, 8, 8)
    assert conv(x, w, padding=np.array([[1, 2], [0, 1]]).tolist()).shape == (1, 6, 9, 7)
    boxes = [ROIS[:, 1:], zeros(0, 4), ROIS[:, 1:]]
    x = random(3, 4, 8, 8)
    for rois in (boxes, [ROIS[:, 1:].tolist(), [], ROIS[:, 1:].tolist()]):
        with pytest.raises(TypeError) as raised:
            align(rois, x)
        joined = eval(str(raised.value).partition("; use ")[2], {"np": np, "rois": rois, "x": x})
        assert joined.dtype == x.dtype and joined[:, 0].tolist() == [0, 2] and align(joined, x).shape[0] == 2
    assert align(zeros(0, 5)).shape == (0, 4, 2, 2)


@pytest.mark.parametrize(
    "value", [X.tolist(), [list(range(9999))], [X] * 50, dict.fromkeys(range(99), X), ["a" * 999] * 9]
)
def test_long_values_are_cut(value):
    with pytest.raises(TypeError) as raised:
        conv(value)
    assert len(str(raised.value)) < 200 and "..." in str(raised.value)


@pytest.mark.parametrize("name", ["deform_conv2d", "modulated_deform_conv2d", "DeformConv2d", "grid_sample", "ops"])
def test_functions_of_others(name):
    """Are named where they are looked for, and do not exist."""
    with pytest.raises(AttributeError, match=f"{name}.*; expected .*numdcn[.](deform_conv|bilinear_sample)") as raised:
        getattr(numdcn, name)
    assert raised.value.name == name and not hasattr(numdcn, name) and name not in dir(numdcn)
    with pytest.raises(ImportError):
        exec(f"from numdcn import {name}")
    with pytest.raises(AttributeError, match="module 'numdcn' has no attribute '[a-zA-Z0-9_]+'$"):
        getattr(numdcn, f"{name}_")


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
    assert set(called) == {(name, way) for name in OPERATORS for way in ("forward", "backward")}
