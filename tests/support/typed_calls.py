"""Calls for a type checker (test_types.py); they never run. Each `type: ignore` must be needed, or mypy reports it."""

from __future__ import annotations

from typing import assert_type

import numpy as np
from numpy.typing import NDArray

import numdcn

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]


class Tensor:
    """An array on a GPU, as far as its type counts: torch.Tensor, cupy.ndarray, a device array of Numba."""

    shape: tuple[int, ...]
    dtype: object
    ndim: int


def arrays_of_numpy(x: Floats, w: Floats, offsets: Floats, bias: Floats | None, rois: Floats, points: Floats) -> None:
    assert_type(numdcn.conv_forward(x, w, bias, padding=(1, 2), stride=2), Floats)
    assert_type(numdcn.deform_conv_forward(x, offsets, w, bias, mask=bias, padding=((1, 1), (2, 2)), out=x), Floats)
    assert_type(numdcn.deform_conv_forward(x, offsets, numdcn.prepare_weights(w, groups=2)), Floats)
    g = numdcn.deform_conv_backward(x, x, offsets, w, wrt=("offsets", "w"), out=numdcn.DeformConvGradients(w=w))
    assert_type(g, numdcn.DeformConvGradients[Floats])
    assert_type(g.offsets, Floats | None)
    assert_type(numdcn.bilinear_sample_forward(x, points), Floats)
    assert_type(numdcn.bilinear_sample_backward(x, x, points, wrt=["points"]).points, Floats | None)
    assert_type(numdcn.roi_align_forward(x, rois, 7, 0.25, 2, aligned=True), Floats)
    assert_type(numdcn.roi_align_backward(x, x, rois, (7, 6), wrt="x").x, Floats | None)
    assert_type(numdcn.deform_roi_pool_backward(x, x, rois, None, x, output_size=7, wrt={"mask"}).mask, Floats | None)
    assert_type(numdcn.deform_ps_roi_pool_forward(x, rois, output_size=7, group_size=7), Floats)
    assert_type(numdcn.dcnv3_forward(x, offsets, w, offset_scale=2.0, out=x), Floats)
    assert_type(numdcn.dcnv4_backward(x, x, w, groups=2, wrt="offset_mask").offset_mask, Floats | None)


def levels_of_numpy(x: Floats, w: Floats, sizes: NDArray[np.int64]) -> None:
    for shapes in (sizes, [(3, 4)], ((3, 4), (1, 2))):
        assert_type(numdcn.ms_deform_attn_forward(x, shapes, x, w, points_per_level=[1, 2]), Floats)
    g = numdcn.ms_deform_attn_backward(x, x, [(3, 4)], x, w, wrt=["value", "sampling_locations"])
    assert_type(g, numdcn.MSDeformAttnGradients[Floats])
    assert_type(g.sampling_locations, Floats | None)


def results_of_several_arrays(x: Floats, w: Floats, rois: Floats, asked: bool) -> None:
    assert_type(numdcn.roi_pool_forward(x, rois, 2), Floats)
    r = numdcn.roi_pool_forward(x, rois, 2, return_argmax=True)
    assert_type(r, numdcn.RoIPoolResult[Floats])
    assert_type(numdcn.roi_pool_backward(r.y, x, rois, 2, argmax=r.argmax).x, Floats | None)
    assert_type(numdcn.roi_pool_forward(x, rois, 2, return_argmax=asked), Floats | numdcn.RoIPoolResult[Floats])
    layer = numdcn.deform_conv_layer_forward(x, w, w, None, modulated=True)
    assert_type(layer.mask, Floats | None)
    back = numdcn.deform_conv_layer_backward(
        layer.y, x, w, w, None, offsets=layer.offsets, mask=layer.mask, wrt="offset_w"
    )
    assert_type(back.offset_w, Floats | None)


def arrays_of_a_gpu(x: Tensor, w: Tensor, rois: Tensor) -> None:
    assert_type(numdcn.conv_forward(x, w), Tensor)
    assert_type(numdcn.deform_conv_backward(x, x, x, w).w, Tensor | None)
    assert_type(numdcn.roi_align_forward(x, rois, 7), Tensor)


def boxes_of_another_type(x: Floats, rois: Doubles) -> None:
    assert_type(numdcn.roi_align_forward(x, rois, 7), Floats)
    assert_type(numdcn.deform_roi_pool_backward(x, x, rois, rois, output_size=7).offsets, Floats | None)


def no_arrays(x: Floats, w: Floats, rois: Floats) -> None:
    numdcn.conv_forward("x", w)  # type: ignore[type-var]
    numdcn.ms_deform_attn_forward(x, 3, x, w)  # type: ignore[arg-type]
    numdcn.dcnv4_forward(x, w)  # type: ignore[call-arg]
    numdcn.conv_forward([[1.0]], [[1.0]])  # type: ignore[type-var]
    numdcn.conv_forward(None, w)  # type: ignore[type-var]
    numdcn.conv_forward(x, 1.0)  # type: ignore[arg-type]
    numdcn.conv_forward(x, w, out=[])  # type: ignore[arg-type]
    numdcn.deform_conv_forward(x, "offsets", w)  # type: ignore[arg-type]
    numdcn.roi_align_forward(x, [rois], 7)  # type: ignore[arg-type]
    numdcn.roi_align_forward(x, None, 7)  # type: ignore[arg-type]
    numdcn.prepare_weights([1.0])  # type: ignore[arg-type]
    numdcn.conv_forward(numdcn.prepare_weights(w), w)  # type: ignore[type-var]


def names_that_are_none(x: Floats, w: Floats, rois: Floats) -> None:
    numdcn.conv_backward(x, x, w, wrt="weight")  # type: ignore[arg-type]
    numdcn.conv_backward(x, x, w, wrt=("x", "mask"))  # type: ignore[arg-type]
    numdcn.roi_align_backward(x, x, rois, 7, wrt="rois")  # type: ignore[arg-type]
    numdcn.conv_forward(x, w, groups=2)  # type: ignore[call-arg]
    numdcn.deform_conv_forward(x, x, w, None, w)  # type: ignore[call-arg]


def modules(x: Floats, w: Floats) -> None:
    numdcn.conv(x, w)  # type: ignore[operator]
