"""mmcv's extension as numdcn provides it: its functions, called as mmcv calls them, against the plain functions and mmcv's
published numbers; how it is installed; and mmcv.ops itself where mmcv is installed."""

import importlib
import pathlib

import numpy as np
import pytest
from naive import conv

import numdcn

torch = pytest.importorskip("torch", reason="torch is not installed")
from numdcn.adapters import mmcv as adapter  # noqa: E402 - needs torch

VECTORS = pathlib.Path(__file__).parents[1] / "vectors"
GEOMETRY = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}
FULL = [torch.float32, torch.float64]
HALVES = [torch.float16, torch.bfloat16]


@pytest.fixture
def ext():
    """The extension. Where mmcv has compiled operators, there is nothing to provide."""
    try:
        with adapter.install():
            yield importlib.import_module("mmcv._ext")
    except RuntimeError as error:
        pytest.skip(str(error))


def load(name):
    with np.load(VECTORS / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


def geometry(stride, padding, dilation, kernel, modulated):
    """The options of a convolution in mmcv's names."""
    if modulated:
        names = ("stride_h", "stride_w", "pad_h", "pad_w", "dilation_h", "dilation_w", "kernel_h", "kernel_w")
    else:
        names = ("dH", "dW", "padH", "padW", "dilationH", "dilationW", "kH", "kW")
    return dict(zip(names, (*stride, *padding, *dilation, *kernel), strict=True))


def deform(ext, x, offsets, w, grad_y, groups=1, offset_groups=1, scale=1, **more):
    """y and the gradients of x, offsets and w, as mmcv has them computed."""
    more = geometry(**more, kernel=w.shape[2:], modulated=False)
    more |= {"group": groups, "deformable_group": offset_groups, "im2col_step": 1}
    y, spare = torch.empty_like(grad_y), torch.empty(0)
    ext.deform_conv_forward(x, w, offsets, y, spare, spare, **more)
    g_x, g_offsets, g_w = map(torch.zeros_like, (x, offsets, w))
    ext.deform_conv_backward_input(x, offsets, grad_y, g_x, g_offsets, w, spare, **more)
    ext.deform_conv_backward_parameters(x, offsets, grad_y, g_w, spare, spare, scale=scale, **more)
    return y, g_x, g_offsets, g_w


def modulated_deform(ext, x, offsets, w, bias, mask, grad_y, groups=1, offset_groups=1, **more):
    """y and the gradients of x, offsets, w, bias and mask, as mmcv has them computed."""
    more = geometry(**more, kernel=w.shape[2:], modulated=True)
    more |= {"group": groups, "deformable_group": offset_groups, "with_bias": bias is not None}
    bias = x.new_empty(0) if bias is None else bias
    y, spare = torch.empty_like(grad_y), torch.empty(0)
    ext.modulated_deform_conv_forward(x, w, bias, spare, offsets, mask, y, spare, **more)
    g_x, g_offsets, g_w, g_bias, g_mask = grads = [*map(torch.zeros_like, (x, offsets, w, bias, mask))]
    ext.modulated_deform_conv_backward(
        x, w, bias, spare, offsets, mask, spare, g_x, g_w, g_bias, g_offsets, g_mask, grad_y, **more
    )
    return y, *grads


def pool(ext, name, x, rois, grad_y, size, offsets=None, **more):
    """y and the gradients of x and, of deform_roi_pool, offsets."""
    keys = ("aligned_height", "aligned_width") if name == "roi_align" else ("pooled_height", "pooled_width")
    more |= dict(zip(keys, size, strict=True))
    y, g_x = torch.zeros_like(grad_y), torch.zeros_like(x)
    forward, backward = getattr(ext, f"{name}_forward"), getattr(ext, f"{name}_backward")
    if name == "deform_roi_pool":
        offsets = x.new_zeros(0) if offsets is None else offsets
        g_offsets = torch.zeros_like(offsets)
        forward(x, rois, offsets, y, **more)
        backward(grad_y, x, rois, offsets, g_x, g_offsets, **more)
        return y, g_x, g_offsets
    if name == "roi_align":
        spare = [x.new_zeros(0), x.new_zeros(0)]
        more["pool_mode"] = 1
    else:
        spare = [torch.zeros(y.shape, dtype=torch.int)]
    forward(x, rois, y, *spare, **more)
    backward(grad_y, rois, *spare, g_x, **more)
    return y, g_x


def tensors(dtype, *shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def convolution(dtype):
    """x, offsets, w, bias, mask, grad_y, in two groups and two offset groups."""
    y = (2, 6, 5, 10)
    return tensors(dtype, (2, 8, 9, 10), (2, 36, *y[2:]), (6, 4, 3, 3), (6,), (2, 18, *y[2:]), y)


def boxes(dtype):
    """x, rois, offsets, grad_y of three bins by two."""
    x, offsets, grad_y = tensors(dtype, (2, 5, 9, 8), (3, 2, 3, 2), (3, 5, 3, 2))
    rois = torch.tensor([[1, 0.5, 1, 6, 7], [0, 2, 1.5, 3, 9], [1, -4, 0, 5, 6]], dtype=dtype)
    return x, rois, offsets, grad_y


def same(tensor, array):
    """Bit for bit, after one rounding if the tensor's type is narrower."""
    assert torch.equal(tensor, torch.from_numpy(array).to(tensor.dtype))


def wide(tensor):
    """What numdcn computes with."""
    return (tensor.float() if tensor.dtype in HALVES else tensor).numpy()


# The functions, against the plain ones. No sample is at exactly -1 here.


@pytest.mark.parametrize("dtype", FULL + HALVES)
def test_deform_conv(ext, dtype):
    x, offsets, w, _, _, grad_y = convolution(dtype)
    y, *grads = deform(ext, x, offsets, w, grad_y, groups=2, offset_groups=2, **GEOMETRY)
    arrays = wide(x), wide(offsets), wide(w)
    same(y, numdcn.deform_conv_forward(*arrays, **GEOMETRY))
    for got, value in zip(grads, numdcn.deform_conv_backward(wide(grad_y), *arrays, **GEOMETRY)):
        same(got, value)


def test_the_scale_of_the_gradient_of_the_weights(ext):
    x, offsets, w, _, _, grad_y = convolution(torch.float32)
    once, twice = (
        deform(ext, x, offsets, w, grad_y, groups=2, offset_groups=2, scale=scale, **GEOMETRY)[3] for scale in (1, 2)
    )
    assert once.any() and torch.equal(twice, 2 * once)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", FULL + HALVES)
def test_modulated_deform_conv(ext, dtype, biased):
    x, offsets, w, bias, mask, grad_y = convolution(dtype)
    bias = bias if biased else None
    y, *grads = modulated_deform(ext, x, offsets, w, bias, mask, grad_y, groups=2, offset_groups=2, **GEOMETRY)
    arrays = wide(x), wide(offsets), wide(w), None if bias is None else wide(bias)
    same(y, numdcn.deform_conv_forward(*arrays, mask=wide(mask), **GEOMETRY))
    g = numdcn.deform_conv_backward(wide(grad_y), *arrays, mask=wide(mask), **GEOMETRY)
    for got, value in zip(grads, g):
        if value is not None:
            same(got, value)


@pytest.mark.parametrize("dtype", FULL + HALVES)
@pytest.mark.parametrize("aligned", [False, True])
def test_roi_align(ext, aligned, dtype):
    x, rois, _, grad_y = boxes(dtype)
    more = {"spatial_scale": 0.75, "sampling_ratio": 0, "aligned": aligned}
    y, g_x = pool(ext, "roi_align", x, rois, grad_y, (3, 2), **more)
    same(y, numdcn.roi_align_forward(wide(x), wide(rois), (3, 2), **more))
    same(g_x, numdcn.roi_align_backward(wide(grad_y), wide(x), wide(rois), (3, 2), **more).x)


@pytest.mark.parametrize("dtype", FULL + HALVES)
def test_roi_pool(ext, dtype):
    x, rois, _, grad_y = boxes(dtype)
    y, g_x = pool(ext, "roi_pool", x, rois, grad_y, (3, 2), spatial_scale=0.75)
    same(y, numdcn.roi_pool_forward(wide(x), wide(rois), (3, 2), 0.75))
    same(g_x, numdcn.roi_pool_backward(wide(grad_y), wide(x), wide(rois), (3, 2), 0.75).x)


@pytest.mark.parametrize("dtype", FULL + HALVES)
@pytest.mark.parametrize("shifted", [False, True])
def test_deform_roi_pool(ext, shifted, dtype):
    x, rois, offsets, grad_y = boxes(dtype)
    offsets = offsets if shifted else None
    more = {"spatial_scale": 0.75, "sampling_ratio": 2, "gamma": 0.2}
    y, *grads = pool(ext, "deform_roi_pool", x, rois, grad_y, (3, 2), offsets, **more)
    arrays = wide(x), wide(rois), None if offsets is None else wide(offsets)
    same(y, numdcn.deform_roi_pool_forward(*arrays, output_size=(3, 2), **more))
    g = numdcn.deform_roi_pool_backward(wide(grad_y), *arrays, output_size=(3, 2), **more)
    same(grads[0], g.x)
    if shifted:
        same(grads[1], g.offsets)


def test_no_boxes(ext):
    x, rois, offsets, grad_y = (tensor[:0] if len(tensor) == 3 else tensor for tensor in boxes(torch.float32))
    for name, more in (
        ("roi_align", {"sampling_ratio": 0, "aligned": True}),
        ("roi_pool", {}),
        ("deform_roi_pool", {"offsets": offsets, "sampling_ratio": 0, "gamma": 0.1}),
    ):
        y, g_x, *_ = pool(ext, name, x, rois, grad_y, (3, 2), spatial_scale=1.0, **more)
        assert y.shape == (0, 5, 3, 2) and not g_x.any()


def test_results_of_other_layouts(ext):
    """`torch.zeros_like` keeps channels_last."""
    plain = convolution(torch.float32)
    last = [t.to(memory_format=torch.channels_last) if t.ndim == 4 else t for t in plain]
    assert not last[0].is_contiguous()
    results = (modulated_deform(ext, *given, groups=2, offset_groups=2, **GEOMETRY) for given in (plain, last))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


# The slope at exactly -1.


@pytest.mark.parametrize("dtype", FULL)
def test_the_slope_at_minus_one_is_that_of_mmcv(ext, dtype):
    """The gradient of both offsets is 0 if either coordinate is -1, and numdcn's everywhere else."""
    x, _, w, _, _, grad_y = convolution(dtype)
    offsets, mask = torch.zeros(2, 36, 5, 10, dtype=dtype), torch.ones(2, 18, 5, 10, dtype=dtype)
    offsets[1, 8, 2, 3] = -1 - (2 * 2 - 1 + 1 * 1)  # group 0, tap (1, 1): y moves to -1, far from its place
    offsets[1, 10, 2, 3] = -1.25 - (2 * 2 - 1 + 1 * 1)  # tap (1, 2), beyond it
    arrays = x.numpy(), offsets.numpy(), w.numpy()
    ours = numdcn.deform_conv_backward(grad_y.numpy(), *arrays, **GEOMETRY).offsets
    wanted, changed = ours.copy(), 0
    for n, group, ky, kx, i, j in np.ndindex(2, 2, 3, 3, 5, 10):
        at = group * 18 + (ky * 3 + kx) * 2
        y = i * 2 - 1 + ky + float(offsets[n, at, i, j])
        column = j - 2 + kx * 2 + float(offsets[n, at + 1, i, j])
        if y == -1 or column == -1:
            changed += bool(ours[n, at : at + 2, i, j].any())
            wanted[n, at : at + 2, i, j] = 0
    assert changed > 10
    same(deform(ext, x, offsets, w, grad_y, groups=2, offset_groups=2, **GEOMETRY)[2], wanted)
    same(modulated_deform(ext, x, offsets, w, None, mask, grad_y, groups=2, offset_groups=2, **GEOMETRY)[2], wanted)


# The numbers that mmcv publishes with its tests.


def pack(ext, v, modulated):
    """Forward and backward of a pack layer, whose offsets come from a plain convolution; gradients named as in the files."""
    x, w, w_off, b_off = (v[k] for k in ("x", "weight", "conv_offset_weight", "conv_offset_bias"))
    more = {k: tuple(v[k].tolist()) for k in ("stride", "padding", "dilation")}
    z = conv.forward(x, w_off, b_off, **more)
    moves = 2 * w.shape[2] * w.shape[3] * int(v["deform_groups"])
    given = [torch.from_numpy(a) for a in (x, np.ascontiguousarray(z[:, :moves]), w)]
    grad_y = torch.from_numpy(v["grad_out"])
    if modulated:
        mask = 1 / (1 + np.exp(-z[:, moves:]))
        out, g_x, g_offsets, g_w, _, g_mask = modulated_deform(
            ext, *given, None, torch.from_numpy(mask), grad_y, **more
        )
        g_z = np.concatenate([g_offsets, g_mask.numpy() * mask * (1 - mask)], axis=1)
    else:
        out, g_x, g_offsets, g_w = deform(ext, *given, grad_y, **more)
        g_z = g_offsets.numpy()
    g_x_off, g_w_off, g_b_off = conv.backward(g_z, x, w_off, b_off, **more)
    return {
        "out": out,
        "grad_x": g_x.numpy() + g_x_off,
        "grad_weight": g_w,
        "grad_conv_offset_weight": g_w_off,
        "grad_conv_offset_bias": g_b_off,
    }


@pytest.mark.parametrize("modulated", [False, True])
def test_published_numbers_of_the_layers(ext, modulated):
    """All of them, of the modulated layer too, whose taps are at exactly -1."""
    v = load("mmcv_modulated_deform_conv_pack" if modulated else "mmcv_deform_conv_pack")
    for name, got in pack(ext, v, modulated).items():
        np.testing.assert_allclose(got, v[name], rtol=1e-12, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("case", range(3))
@pytest.mark.parametrize("name", ["roi_align", "roi_pool", "deform_roi_pool"])
def test_published_numbers_of_boxes(ext, name, case):
    v = load(f"mmcv_{name}_case{case}")
    x, rois, grad_y = (torch.from_numpy(v[k]) for k in ("x", "rois", "grad_out"))
    kinds = {"spatial_scale": float, "sampling_ratio": int, "aligned": bool, "gamma": float}
    more = {key: kind(v[key]) for key, kind in kinds.items() if key in v}
    size = tuple(v["output_size"].tolist())
    if name == "deform_roi_pool":
        more["offsets"] = torch.zeros(len(rois), 2, *size, dtype=torch.float64)
    y, g_x, *_ = pool(ext, name, x, rois, grad_y, size, **more)
    np.testing.assert_allclose(y, v["out"], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(g_x, v["grad_x"], rtol=1e-12, atol=1e-12)


# What it does not do.


def test_other_operators_raise_when_called(ext):
    for name in ("nms", "ms_deform_attn_forward"):
        assert hasattr(ext, name)
        with pytest.raises(NotImplementedError, match=f"^{name} of mmcv"):
            getattr(ext, name)(torch.ones(1), iou_threshold=0.5)
    assert not hasattr(ext, "__file__")


def test_tensors_elsewhere(ext):
    """The device "meta" stands for a GPU."""
    x, rois, _, grad_y = (tensor.to("meta") for tensor in boxes(torch.float32))
    with pytest.raises(NotImplementedError, match="roi_pool_forward .* on the CPU, .* one is on meta"):
        pool(ext, "roi_pool", x, rois, grad_y, (3, 2), spatial_scale=1.0)


def test_the_maximum_of_samples(ext):
    x, rois, _, grad_y = boxes(torch.float32)
    more = {"aligned_height": 3, "aligned_width": 2, "spatial_scale": 1.0, "sampling_ratio": 2, "aligned": True}
    given = x, rois, torch.zeros_like(grad_y), torch.zeros_like(grad_y), torch.zeros_like(grad_y)
    with pytest.raises(NotImplementedError, match="roi_align_forward .* 'avg' only"):
        ext.roi_align_forward(*given, pool_mode=0, **more)


@pytest.mark.parametrize("groups, offset_groups, message", [(1, 2, "group is 1, but input"), (2, 1, "but offset")])
def test_groups_that_the_shapes_contradict(ext, groups, offset_groups, message):
    x, offsets, w, _, _, grad_y = convolution(torch.float32)
    with pytest.raises(ValueError, match=message):
        deform(ext, x, offsets, w, grad_y, groups=groups, offset_groups=offset_groups, **GEOMETRY)
