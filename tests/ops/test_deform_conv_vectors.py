"""deform_conv reproduces the numbers that ONNX and mmcv publish, and differs from mmcv exactly where numdcn says so.

mmcv's vectors are whole layers: a plain convolution (naive.conv) predicts the offsets, and for the modulated one the
logits of the mask. Its modulated case has taps exactly at -1, where mmcv's slope is 0 and ours the right one.
"""

import pathlib

import numpy as np
import pytest
from naive import conv
from test_deform_conv import OPERATOR  # noqa: F401 - tells the fixtures what `subject` is

VECTORS = pathlib.Path(__file__).parents[1] / "vectors"
ONNX = sorted(path.stem for path in VECTORS.glob("onnx_*deform_conv*.npz"))


def load(name):
    with np.load(VECTORS / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


def test_the_four_of_onnx_are_here():
    assert len(ONNX) == 4


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ONNX)
def test_published_numbers_of_onnx(subject, name, dtype):
    v = load(name)
    top, left, bottom, right = v["pads"].tolist()
    x, offsets, w, bias, mask = (v[k].astype(dtype) if k in v else None for k in ("X", "offset", "W", "B", "mask"))
    y = subject.forward(
        x,
        offsets,
        w,
        bias,
        mask=mask,
        stride=tuple(v["strides"].tolist()),
        padding=((top, bottom), (left, right)),
        dilation=tuple(v["dilations"].tolist()),
    )
    np.testing.assert_allclose(y, v["Y"], rtol=1e-5, atol=1e-5)


def run_pack(subject, v, modulated):
    """Forward and backward of a pack layer; gradients named as in the files."""
    x, w, w_off, b_off = (v[k] for k in ("x", "weight", "conv_offset_weight", "conv_offset_bias"))
    geometry = {k: tuple(v[k].tolist()) for k in ("stride", "padding", "dilation")}
    z = conv.forward(x, w_off, b_off, **geometry)
    moves = 2 * w.shape[2] * w.shape[3] * int(v["deform_groups"])
    offsets, mask = z[:, :moves], None
    if modulated:
        mask = 1 / (1 + np.exp(-z[:, moves:]))
    out = subject.forward(x, offsets, w, mask=mask, **geometry)
    g = subject.backward(v["grad_out"], x, offsets, w, mask=mask, **geometry)
    g_z = g.offsets if mask is None else np.concatenate([g.offsets, g.mask * mask * (1 - mask)], axis=1)
    g_x, g_w_off, g_b_off = conv.backward(g_z, x, w_off, b_off, **geometry)
    return {
        "out": out,
        "grad_x": g.x + g_x,
        "grad_weight": g.w,
        "grad_conv_offset_weight": g_w_off,
        "grad_conv_offset_bias": g_b_off,
    }


def test_published_numbers_of_mmcv_pack(subject):
    v = load("mmcv_deform_conv_pack")
    for name, got in run_pack(subject, v, modulated=False).items():
        np.testing.assert_allclose(got, v[name], rtol=1e-12, atol=1e-12, err_msg=name)


# The gradient of the offset convolution's bias is the sum of the offset and mask gradients: four (y, x) pairs, four
# mask logits. Taps that reach above or left of the image by exactly one pixel make the difference.
OURS = [0, 0, 0, -1.5, -3, 0, -3, -1.5, 4.5, 4.5, 4.5, 4.5]


def test_published_numbers_of_mmcv_modulated_pack(subject):
    v = load("mmcv_modulated_deform_conv_pack")
    got = run_pack(subject, v, modulated=True)
    for name in ("out", "grad_x", "grad_weight"):
        np.testing.assert_allclose(got[name], v[name], rtol=1e-12, atol=1e-12, err_msg=name)
    bias, theirs = got["grad_conv_offset_bias"], v["grad_conv_offset_bias"]
    np.testing.assert_allclose(bias, OURS, rtol=1e-12, atol=1e-12)
    differ = ~np.isclose(OURS, theirs)
    assert differ.any() and not differ[8:].any()
    np.testing.assert_allclose(bias[~differ], theirs[~differ], rtol=1e-12, atol=1e-12)
    # The same channels of the weight gradient, and no others.
    weight, theirs = got["grad_conv_offset_weight"], v["grad_conv_offset_weight"]
    np.testing.assert_allclose(weight[~differ], theirs[~differ], rtol=1e-12, atol=1e-12)
    assert not np.isclose(weight[differ], theirs[differ]).all()


def test_the_modulated_difference_is_the_slope_at_minus_one(subject):
    """Without the slopes of the samples at exactly -1 our gradient is mmcv's, element by element."""
    v = load("mmcv_modulated_deform_conv_pack")
    offsets, mask = np.zeros((1, 8, 4, 4)), np.full((1, 4, 4, 4), 0.5)
    g = subject.backward(v["grad_out"], v["x"], offsets, v["weight"], mask=mask, padding=1)
    moved = g.offsets.reshape(4, 2, 4, 4).copy()
    for k in range(4):
        rows = np.arange(4) - 1 + k // 2
        cols = np.arange(4) - 1 + k % 2
        moved[k, :, rows == -1] = 0
        moved[k, :, :, cols == -1] = 0
    np.testing.assert_allclose(moved.sum(axis=(2, 3)).ravel(), v["grad_conv_offset_bias"][:8], rtol=1e-12, atol=1e-12)
    z = np.concatenate([moved.reshape(1, 8, 4, 4), g.mask / 4], axis=1)
    _, g_w, _ = conv.backward(z, v["x"], v["conv_offset_weight"], padding=(1, 1))
    np.testing.assert_allclose(g_w, v["grad_conv_offset_weight"], rtol=1e-12, atol=1e-12)
