"""Errors of ms_deform_attn, dcnv3 and dcnv4 name the way out, where there is one."""

import numpy as np
import pytest

import numdcn


def zeros(*shape):
    return np.zeros(shape, np.float32)


# Arrays of each that fit: dcnv3 and dcnv4 with padding 1.
X, OFFSETS, MASK, PACKED = zeros(2, 6, 7, 8), zeros(2, 6, 7, 36), zeros(2, 6, 7, 18), zeros(2, 6, 7, 56)
VALUE, LEVELS, LOCATIONS, WEIGHTS = zeros(2, 15, 2, 4), ((3, 4), (1, 3)), zeros(2, 5, 2, 2, 3, 2), zeros(2, 5, 2, 2, 3)
PADDING = "; padding=1 would fit with this stride and dilation"
LAST = "; use x.transpose(0, 2, 3, 1) if x is channels-first"
LEVEL_STARTS = ": levels follow one another; leave it out"
TURNED = {
    "channels": zeros(2, 7, 6, 5),
    "masked": (zeros(2, 6, 5, 18), zeros(2, 6, 5, 9)),
    "packed": zeros(2, 6, 5, 27),
}


def three(x=X, offsets=OFFSETS, mask=MASK, **more):
    return numdcn.dcnv3_forward(x, offsets, mask, **{"padding": 1, **more})


def four(x=X, packed=PACKED, **more):
    return numdcn.dcnv4_forward(x, packed, **{"padding": 1, "groups": 2, **more})


def attend(value=VALUE, levels=LEVELS, locations=LOCATIONS, weights=WEIGHTS, **more):
    return numdcn.ms_deform_attn_forward(value, levels, locations, weights, **more)


class OnGPU:
    """An array on a GPU, as far as the protocol says."""

    __cuda_array_interface__ = {"shape": (2, 2), "typestr": "<i8", "data": (4096, False), "version": 3}  # noqa: RUF012


# A name: a wrong call, and how the error's message must end.
WAYS_OUT = {
    "no padding": (lambda: three(padding=0), PADDING),
    "no padding of dcnv4": (lambda: four(padding=0), PADDING),
    "no padding, of a small image": (
        lambda: three(zeros(2, 2, 2, 8), zeros(2, 2, 2, 36), zeros(2, 2, 2, 18), padding=0),
        f"which `kernel_size` 3 with dilation 1 spans{PADDING}",
    ),
    "padding of one side": (
        lambda: three(zeros(2, 6, 6, 8), stride=1),
        "; padding=((1, 1), (1, 2)) would fit with this stride and dilation",
    ),
    "channels first": (lambda: three(TURNED["channels"], *TURNED["masked"]), LAST),
    "channels first, of dcnv4": (lambda: four(TURNED["channels"], TURNED["packed"], groups=1), LAST),
    "offsets and mask swapped": (
        lambda: three(offsets=MASK, mask=OFFSETS),
        "; `offsets` and `mask` look swapped: the order is x, offsets, mask",
    ),
    "the centre": (
        lambda: three(offsets=zeros(2, 6, 7, 32), mask=zeros(2, 6, 7, 16)),
        "expected a multiple of the 9 points of kernel_size=(3, 3): groups*P; remove_center=True would fit",
    ),
    "no centre": (
        lambda: three(remove_center=True),
        "the 8 points of kernel_size=(3, 3), remove_center=True: groups*P; remove_center=False would fit",
    ),
    "pixels in one row": (
        lambda: four(zeros(2, 42, 8)),
        "; use x[None] for one image, x.reshape(N, H, W, C) for pixels in one row (N, H*W, C)",
    ),
    "another number of groups": (
        lambda: four(groups=4),
        "expected 108 = 3*groups*P with groups=4 and the 9 points of kernel_size=(3, 3), or that rounded up to a multiple of 8, 112; "
        "groups=2 would fit",
    ),
    "groups of dcnv3": (
        lambda: three(groups=2),
        "`groups` is not an argument of dcnv3_forward: it is inferred from the shapes: mask.shape[-1] / number of points; leave "
        "it out",
    ),
    "group": (lambda: four(group=2), "`group` is not an argument of dcnv4_forward, expected `groups`"),
    "channels of a group": (lambda: four(group_channels=4), "x.shape[-1] / groups; leave it out"),
    "kernel_h": (lambda: three(kernel_h=3), ", expected `kernel_size=(kernel_size_y, kernel_size_x)`"),
    "pad_w": (lambda: four(pad_w=1), ", expected `padding=(padding_y, padding_x)`"),
    "im2col_step": (lambda: three(im2col_step=256), ": batches of any size fit; leave it out"),
    "im2col_step of attention": (lambda: attend(im2col_step=64), ": batches of any size fit; leave it out"),
    "softmax": (lambda: four(softmax=False), ": none is applied; leave it out"),
    "level starts": (lambda: attend(level_start_index=[0, 12]), LEVEL_STARTS),
    "level starts of mmcv": (lambda: attend(value_level_start_index=[0, 12]), LEVEL_STARTS),
    "six by position": (
        lambda: numdcn.ms_deform_attn_forward(VALUE, LEVELS, [0, 12], LOCATIONS, WEIGHTS, 64),
        "pass by keyword: points_per_level, out; starts of levels and im2col_step are not needed",
    ),
    "names of mmcv": (
        lambda: numdcn.ms_deform_attn_forward(VALUE, value_spatial_shapes=LEVELS),
        "`value_spatial_shapes` is not an argument of ms_deform_attn_forward, expected `spatial_shapes`",
    ),
    "value of LW-DETR": (
        lambda: attend(zeros(2, 2, 4, 15)),
        "; use value.transpose(0, 3, 1, 2) if value is (N, M, D, S)",
    ),
    "value by heads": (
        lambda: attend(zeros(2, 2, 15, 4)),
        "; use value.transpose(0, 2, 1, 3) if value is (N, M, S, D)",
    ),
    "heads in one row": (
        lambda: attend(zeros(2, 15, 8)),
        "; use value[None] for one image, value.reshape(N, S, M, D) for heads in one row (N, S, M*D)",
    ),
    "locations and weights swapped": (
        lambda: attend(locations=WEIGHTS, weights=LOCATIONS),
        "; `sampling_locations` and `attention_weights` look swapped",
    ),
    "points given twice": (
        lambda: attend(points_per_level=(3, 3)),
        "; leave out `points_per_level`, which the shape tells",
    ),
    "points of one axis": (
        lambda: attend(locations=zeros(2, 5, 2, 6, 2), weights=zeros(2, 5, 2, 6)),
        "or 5 axes: (N, Q, M, T, 2) with `points_per_level`; x and y last",
    ),
    "levels that are floats": (
        lambda: attend(levels=np.ones((2, 2))),
        "in host memory; use spatial_shapes.astype(np.int64)",
    ),
    "levels on a GPU": (
        lambda: attend(levels=OnGPU()),
        "reading it would mean waiting for the GPU; use spatial_shapes.tolist(), once",
    ),
    "no gradient": (
        lambda: numdcn.ms_deform_attn_backward(VALUE, LEVELS, LOCATIONS, WEIGHTS),
        "; grad_y comes first: grad_y, value, spatial_shapes, sampling_locations, attention_weights",
    ),
    "the gradient last": (
        lambda: numdcn.ms_deform_attn_backward(VALUE, LEVELS, LOCATIONS, WEIGHTS, zeros(2, 5, 8)),
        "; grad_y comes first: grad_y, value, spatial_shapes, sampling_locations, attention_weights",
    ),
    "a gradient of another type": (
        lambda: numdcn.ms_deform_attn_backward(np.zeros((2, 5, 8)), VALUE, LEVELS, LOCATIONS, WEIGHTS),
        "but `value` has float32; expected one dtype for all arrays; use grad_y.astype(np.float32)",
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
    assert three().shape == four().shape == X.shape
    assert three(zeros(2, 6, 6, 8), padding=((1, 1), (1, 2))).shape == X.shape
    turned = TURNED["channels"].transpose(0, 2, 3, 1)
    assert three(turned, *TURNED["masked"]).shape == four(turned, TURNED["packed"], groups=1).shape == (2, 6, 5, 7)
    assert three(offsets=zeros(2, 6, 7, 32), mask=zeros(2, 6, 7, 16), remove_center=True).shape == X.shape
    for value in (zeros(2, 2, 4, 15).transpose(0, 3, 1, 2), zeros(2, 2, 15, 4).transpose(0, 2, 1, 3)):
        assert attend(value).shape == (2, 5, 8)
    assert attend(levels=np.array(LEVELS, float).astype(int)).shape == (2, 5, 8)


@pytest.mark.parametrize(
    "name, function",
    [
        ("DCNv3Function", "dcnv3_forward"),
        ("DCNv4Function", "dcnv4_forward"),
        ("MSDeformAttnFunction", "ms_deform_attn_forward"),
        ("MultiScaleDeformableAttnFunction", "ms_deform_attn_forward"),
        ("multi_scale_deformable_attn_pytorch", "ms_deform_attn_forward"),
    ],
)
def test_functions_of_others(name, function):
    with pytest.raises(AttributeError, match=f"{name}.*; expected numdcn.{function}"):
        getattr(numdcn, name)


def test_levels_that_are_changed_in_place():
    """A list is read once."""
    levels = [[3, 4], [1, 3]]
    y = attend(levels=levels)
    levels[0][0] = 7
    assert np.array_equal(attend(), y)
    with pytest.raises(ValueError, match="expected 31"):
        attend(levels=levels)
