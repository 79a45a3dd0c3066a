"""deform_conv_layer expressed through its parts, mmcv's published numbers, non-finite numbers, and new layers.

mmcv's modulated vector has taps exactly at -1, where mmcv's slope is 0 and ours the right one: the gradients of the
offset convolution differ there, and tests say in which elements and by how much. Tests that take `subject` also run on
the naive reference.
"""

import pathlib

import numpy as np
import pytest
from checks import assert_message, rows, said
from naive import conv as naive_conv
from naive import deform_conv as naive_deform_conv
from test_deform_conv_layer import OPERATOR  # noqa: F401 - tells the fixtures what `subject` is

import numdcn

DTYPES = [np.float32, np.float64]
VECTORS = pathlib.Path(__file__).parents[1] / "vectors"


def near(got, want, tolerance=1e-11):
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=10 * tolerance)


def draw(channels=6, c_out=4, groups=2, offset_groups=3, modulated=True, size=(7, 6), batch=2, kernel=(3, 2)):
    """x, w, offset_w, offset_b, bias in float64, for offsets of about a pixel"""
    rng = np.random.default_rng(0)
    predicted = (3 if modulated else 2) * offset_groups * kernel[0] * kernel[1]
    return (
        rng.normal(size=(batch, channels, *size)),
        rng.normal(size=(c_out, channels // groups, *kernel)),
        rng.normal(size=(predicted, channels, *kernel)) / 6,
        rng.normal(size=predicted),
        rng.normal(size=c_out),
    )


def load(name):
    with np.load(VECTORS / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


# Expressed through its parts.


@pytest.mark.parametrize("groups, offset_groups", [(1, 1), (2, 3), (6, 2)])
@pytest.mark.parametrize("modulated, mask_scale, factor", [(False, 1, 1.0), (True, 1, 0.5), (True, 2, 1.0)])
def test_a_layer_that_predicts_nothing_is_a_convolution(subject, groups, offset_groups, modulated, mask_scale, factor):
    """With half the weights if the mask is the sigmoid of 0."""
    x, w, offset_w, _, bias = draw(6, 12, groups, offset_groups, modulated)
    geometry = {"stride": (1, 2), "padding": ((1, 2), (0, 1)), "dilation": (2, 1)}
    arrays = (x, w, 0 * offset_w, None, bias)
    result = subject.forward(*arrays, modulated=modulated, mask_scale=mask_scale, **geometry)
    near(result.y, naive_conv.forward(x, factor * w, bias, **geometry))
    assert not result.offsets.any()
    assert (result.mask == factor).all() if modulated else result.mask is None
    grad_y = np.random.default_rng(1).normal(size=result.y.shape)
    g = subject.backward(grad_y, *arrays, modulated=modulated, mask_scale=mask_scale, **geometry)
    plain = naive_conv.backward(grad_y, x, factor * w, bias, **geometry)
    near(g.x, plain.x)
    near(g.w, factor * plain.w)
    near(g.bias, plain.bias)
    assert g.offset_b is None and g.offset_w.any()


@pytest.mark.parametrize("mask_scale", [0, 1, 2])
def test_it_is_a_convolution_and_a_deformable_one(mask_scale):
    """Bit for bit. A scale of 0 means no mask."""
    x, w, offset_w, offset_b, bias = draw(modulated=mask_scale > 0)
    options = {"modulated": True, "mask_scale": mask_scale} if mask_scale else {}
    y, offsets, mask = numdcn.deform_conv_layer_forward(x, w, offset_w, offset_b, bias, padding=1, **options)
    z = numdcn.conv_forward(x, offset_w, offset_b, padding=1)
    assert np.array_equal(offsets, z[:, : offsets.shape[1]])
    if mask_scale:
        near(mask, mask_scale / (1 + np.exp(-z[:, offsets.shape[1] :])))
    assert np.array_equal(y, numdcn.deform_conv_forward(x, offsets, w, bias, mask=mask, padding=1))


def test_the_offset_bias_moves_all_pixels(subject):
    """An integer number of pixels in the bias, and no weights: the convolution of the shifted image."""
    x, w, offset_w, offset_b, bias = draw(modulated=False, size=(9, 8))
    offset_b[0::2], offset_b[1::2] = 2, -1
    y = subject.forward(x, w, 0 * offset_w, offset_b, bias).y
    wide = np.pad(x, [(0, 0), (0, 0), (2, 2), (2, 2)])
    near(y, naive_conv.forward(wide[:, :, 4:, 1:9], w, bias)[:, :, :7, :7])


# mmcv's numbers.


def run_pack(subject, v, modulated):
    """Forward and backward of a pack layer; results named as in the files."""
    arrays = [v[name] for name in ("x", "weight", "conv_offset_weight", "conv_offset_bias")]
    options = {k: tuple(v[k].tolist()) for k in ("stride", "padding", "dilation")}
    options["modulated"] = modulated
    result = subject.forward(*arrays, **options)
    assert result.offsets.shape[1] == 2 * v["weight"][0, 0].size * int(v["deform_groups"])
    g = subject.backward(v["grad_out"], *arrays, **options)
    names = ("grad_x", "grad_weight", "grad_conv_offset_weight", "grad_conv_offset_bias")
    return {"out": result.y, **dict(zip(names, g, strict=False))}


def test_published_numbers_of_mmcv_pack(subject):
    v = load("mmcv_deform_conv_pack")
    for name, got in run_pack(subject, v, modulated=False).items():
        np.testing.assert_allclose(got, v[name], rtol=1e-12, atol=1e-12, err_msg=name)


# The gradient of the offset convolution's bias is the sum of the offset and mask gradients: four (y, x) pairs, four
# mask logits. Taps that reach above or left of the image by exactly one pixel make the difference.
OURS = [0, 0, 0, -1.5, -3, 0, -3, -1.5, 4.5, 4.5, 4.5, 4.5]


def test_mmcv_modulated_pack(subject):
    v = load("mmcv_modulated_deform_conv_pack")
    got = run_pack(subject, v, modulated=True)
    for name in ("out", "grad_x", "grad_weight"):
        near(got[name], v[name], 1e-12)
    bias, theirs = got["grad_conv_offset_bias"], v["grad_conv_offset_bias"]
    near(bias, OURS, 1e-12)
    differ = ~np.isclose(OURS, theirs)
    assert differ.any() and not differ[8:].any()
    near(bias[~differ], theirs[~differ], 1e-12)
    # The same channels of the weight gradient, and no others.
    weight, theirs = got["grad_conv_offset_weight"], v["grad_conv_offset_weight"]
    near(weight[~differ], theirs[~differ], 1e-12)
    assert not np.isclose(weight[differ], theirs[differ]).all()


def test_the_modulated_difference_is_the_slope_at_minus_one(subject):
    """The contribution of slopes at exactly -1 to the gradients of the offset convolution is the only difference
    from mmcv."""
    v = load("mmcv_modulated_deform_conv_pack")
    got = run_pack(subject, v, modulated=True)
    offsets, mask = np.zeros((1, 8, 4, 4)), np.full((1, 4, 4, 4), 0.5)
    moved = naive_deform_conv.backward(v["grad_out"], v["x"], offsets, v["weight"], mask=mask, padding=1).offsets
    moved = moved.reshape(4, 2, 4, 4)
    at_minus_one = np.zeros(moved.shape, bool)
    for k in range(4):
        at_minus_one[k, :, np.arange(4) - 1 + k // 2 == -1] = True
        at_minus_one[k, :, :, np.arange(4) - 1 + k % 2 == -1] = True
    extra = np.concatenate([np.where(at_minus_one, moved, 0).reshape(1, 8, 4, 4), np.zeros((1, 4, 4, 4))], axis=1)
    g = naive_conv.backward(extra, v["x"], v["conv_offset_weight"], v["conv_offset_bias"], padding=1)
    assert g.w.any() and g.bias.any()
    near(got["grad_conv_offset_weight"] - v["grad_conv_offset_weight"], g.w, 1e-12)
    near(got["grad_conv_offset_bias"] - v["grad_conv_offset_bias"], g.bias, 1e-12)


# Masks and non-finite numbers.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask_scale", [1, 2])
@pytest.mark.parametrize("logit, share", [(0, 0.5), (-1e4, 0), (1e4, 1), (-np.inf, 0), (np.inf, 1), (np.nan, np.nan)])
@pytest.mark.filterwarnings("error")
def test_masks_of_any_logit(subject, dtype, mask_scale, logit, share):
    """From 0 to mask_scale, without a warning; where the sigmoid is flat its logits receive no gradient."""
    x, w, offset_w, offset_b, bias = (array.astype(dtype) for array in draw(3, 4, 1, 1))
    offset_w[...] = 0
    offset_b[:12], offset_b[12:] = 0.3, logit
    options = {"modulated": True, "mask_scale": mask_scale, "padding": 1}
    result = subject.forward(x, w, offset_w, offset_b, bias, **options)
    np.testing.assert_array_equal(result.mask, np.full_like(result.mask, mask_scale * share))
    if share == 0:
        np.testing.assert_array_equal(result.y, np.broadcast_to(bias[:, None, None], result.y.shape))
    g = subject.backward(np.ones(result.y.shape, dtype), x, w, offset_w, offset_b, bias, **options)
    logits = g.offset_b[12:]
    assert np.isnan(logits).all() if np.isnan(share) else (logits != 0).any() == (share == 0.5)


@pytest.mark.parametrize("modulated", [False, True])
def test_a_nan_pixel_spoils_the_outputs_whose_offsets_see_it(subject, modulated):
    x, w, offset_w, offset_b, bias = draw(3, 4, 1, 1, modulated, size=(20, 21))
    clean = subject.forward(x, w, offset_w / 9, offset_b / 9, bias, padding=1, modulated=modulated)
    x[1, 2, 10, 10] = np.nan
    spoilt = subject.forward(x, w, offset_w / 9, offset_b / 9, bias, padding=1, modulated=modulated)
    bad = np.isnan(spoilt.offsets[1]).any(axis=0)
    assert bad.sum() == 6 and bad[9:12, 10:12].all()
    assert np.isnan(spoilt.y[1][:, bad]).all()
    near(spoilt.y[0], clean.y[0])
    far = np.ones(bad.shape, bool)
    far[5:17, 5:17] = False  # nothing changes more than a few pixels away
    near(spoilt.y[1][:, far], clean.y[1][:, far])
    g = subject.backward(np.ones(clean.y.shape), x, w, offset_w / 9, offset_b / 9, bias, padding=1, modulated=modulated)
    assert np.isnan(g.offset_w).all() and np.isnan(g.offset_b).all() and np.isnan(g.w).any()
    assert np.isfinite(g.bias).all() and np.isfinite(g.x[0]).all()


@pytest.mark.parametrize("value", [np.inf, -np.inf, 1e30, -1e30])
def test_infinite_and_huge_offsets_are_outside(subject, value):
    x, w, offset_w, offset_b, bias = draw(modulated=False)
    offset_b[...] = value
    result = subject.forward(x, w, 0 * offset_w, offset_b, bias)
    np.testing.assert_array_equal(result.y, np.broadcast_to(bias[:, None, None], result.y.shape))
    g = subject.backward(np.ones(result.y.shape), x, w, 0 * offset_w, offset_b, bias)
    assert not any(getattr(g, name).any() for name in ("x", "w", "offset_w", "offset_b"))


# New layers.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("sizes", [(8, 6, 3, 1, 1), (12, 8, (3, 2), 4, 6), (5, 5, (1, 4), 5, 1)], ids=str)
def test_new_layers_have_the_right_shapes_and_reach(sizes, modulated, dtype):
    channels, c_out, kernel, groups, offset_groups = sizes
    options = {"groups": groups, "offset_groups": offset_groups, "modulated": modulated, "dtype": dtype, "seed": 3}
    p = numdcn.deform_conv_layer_init(channels, c_out, kernel, **options)
    assert p._fields == ("w", "offset_w", "offset_b", "bias") and isinstance(p, numdcn.DeformConvLayerParameters)
    kh, kw = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    predicted = (3 if modulated else 2) * offset_groups * kh * kw
    shapes = [(c_out, channels // groups, kh, kw), (predicted, channels, kh, kw), (predicted,), (c_out,)]
    assert [array.shape for array in p] == shapes
    assert {array.dtype for array in p} == {np.dtype(dtype)}
    assert not p.offset_w.any() and not p.offset_b.any()
    bound = 1 / np.sqrt(channels // groups * kh * kw)
    for array in (p.w, p.bias):
        assert np.abs(array).max() <= dtype(bound) and len(np.unique(array)) == array.size
    for again, array in zip(numdcn.deform_conv_layer_init(channels, c_out, kernel, **options), p, strict=True):
        assert np.array_equal(again, array)
    assert numdcn.deform_conv_layer_init(channels, c_out, kernel, **options, bias=False).bias is None
    options["seed"] = 4
    assert not np.array_equal(numdcn.deform_conv_layer_init(channels, c_out, kernel, **options).w, p.w)
    result = numdcn.deform_conv_layer_forward(np.ones((1, channels, 5, 6), dtype), *p, modulated=modulated)
    assert result.offsets.shape[1] == 2 * offset_groups * kh * kw


def test_new_weights_are_uniform():
    """Mean, variance and range of many weights; biases have the bound of the weights."""
    p = numdcn.deform_conv_layer_init(64, 400, 3, groups=2, seed=0)
    bound = 1 / np.sqrt(32 * 9)
    for array, slack in ((p.w, 0.01), (p.bias, 0.15)):
        scaled = array.astype(np.float64) / bound
        assert abs(scaled.mean()) < slack and abs(scaled.var() * 3 - 1) < slack
        assert 1 - slack < scaled.max() <= 1 + 1e-6 and -1 - 1e-6 <= scaled.min() < slack - 1


def test_init_takes_defaults_and_generators():
    p = numdcn.deform_conv_layer_init(4, 6, 3)
    assert p.w.dtype == np.float32 and p.bias is not None and p.offset_b.shape == (18,)
    assert not np.array_equal(p.w, numdcn.deform_conv_layer_init(4, 6, 3).w), "no seed: another layer each time"
    rngs = [np.random.default_rng(5) for _ in range(2)]
    first, again = (numdcn.deform_conv_layer_init(4, 6, 3, seed=rng) for rng in rngs)
    assert np.array_equal(first.w, again.w)
    assert not np.array_equal(first.w, numdcn.deform_conv_layer_init(4, 6, 3, seed=rngs[0]).w)


SIZES = ("in_channels", "out_channels", "groups", "offset_groups")
WRONG = (
    *((name, 0, ValueError, "0", "1|positive") for name in (*SIZES, "kernel_size")),
    *((name, -3, ValueError, "-3", "1|positive") for name in (*SIZES, "kernel_size")),
    *((name, 2.0, TypeError, r"2\.0", "int") for name in (*SIZES, "kernel_size")),
    *((name, True, TypeError, "True|bool", "int") for name in (*SIZES, "kernel_size")),
    *((name, None, TypeError, "None", "int") for name in (*SIZES, "kernel_size")),
    ("kernel_size", (3, 0), ValueError, "0", "1|positive"),
    ("kernel_size", (3, 3, 3), ValueError, said(3, 3, 3), "2|two|axis"),
    ("in_channels", 9, ValueError, "9", "groups.*2"),
    ("out_channels", 9, ValueError, "9", "groups.*2"),
    ("in_channels", 8, ValueError, "8", "offset_groups.*3"),
    ("modulated", 1, TypeError, "1", "True"),
    ("bias", None, TypeError, "None", "True"),
    ("bias", np.zeros(6), TypeError, "ndarray", "True"),
    *(("dtype", kind, TypeError, str(kind), "float32") for kind in (">f2", "int32", "complex64", "no dtype")),
    ("seed", "abc", TypeError, "abc", "int"),
    ("seed", 1.5, TypeError, r"1\.5", "int"),
    ("seed", -1, ValueError, "-1", "0|negative"),
)


@pytest.mark.parametrize("name, value, error, came, wanted", rows(WRONG))
def test_wrong_arguments_of_init(name, value, error, came, wanted):
    right = {"in_channels": 6, "out_channels": 4, "kernel_size": 3, "groups": 2, "offset_groups": 3}
    numdcn.deform_conv_layer_init(**right)
    with pytest.raises(error) as raised:
        numdcn.deform_conv_layer_init(**{**right, name: value})
    assert_message(raised, name, came, wanted)


@pytest.mark.parametrize("modulated, mask_scale", [(False, 1), (True, 1), (True, 2)])
def test_training_lowers_the_loss(modulated, mask_scale):
    """Against a layer that looks elsewhere: all gradients together get further than those of w and bias alone."""
    options = {"padding": 1, "modulated": modulated, "mask_scale": mask_scale}
    x = np.random.default_rng(0).normal(size=(4, 2, 12, 12)).astype(np.float32)
    for axis in (2, 3, 2, 3):
        x = (x + np.roll(x, 1, axis)) / 2  # smooth, so that slopes are informative
    teacher = numdcn.deform_conv_layer_init(2, 3, 3, modulated=modulated, seed=1)
    teacher.offset_b[:18] = np.random.default_rng(2).uniform(-0.8, 0.8, 18)
    target = numdcn.deform_conv_layer_forward(x, *teacher, **options).y

    def train(names):
        student = numdcn.deform_conv_layer_init(2, 3, 3, modulated=modulated, seed=3)
        losses = []
        for _ in range(150):
            y, offsets, mask = numdcn.deform_conv_layer_forward(x, *student, **options)
            losses.append(float(((y - target) ** 2).sum() / 2 / y.size))
            grad_y = (y - target) / y.size
            g = numdcn.deform_conv_layer_backward(grad_y, x, *student, offsets=offsets, mask=mask, **options)
            for name in names:
                getattr(student, name)[...] -= 5.0 * getattr(g, name)
        return losses

    everything, part = train(("w", "bias", "offset_w", "offset_b")), train(("w", "bias"))
    assert everything[1] < everything[0]
    assert everything[-1] < 0.8 * part[-1] and part[-1] < 0.5 * part[0]
