"""Small calls of every operator, and what the plain functions make of them."""

import numpy as np

from numdcn.adapters._operators import operator, operators

BOXES = np.array([[0, 0.5, 1.2, 6.3, 5.1], [1, 2.1, 0.3, 7.7, 6.6], [1, 1.1, 2.2, 3.3, 7.9]])
OPTIONS = {
    "conv": {"padding": 1, "stride": (2, 1)},
    "deform_conv": {"padding": ((1, 0), (2, 1)), "dilation": (1, 2)},
    "deform_conv_layer": {"padding": 1, "modulated": True, "mask_scale": 2},
    "roi_align": {"output_size": (2, 3), "spatial_scale": 0.9, "aligned": True},
    "roi_pool": {"output_size": (2, 3), "spatial_scale": 0.9},
    "ps_roi_align": {"output_size": 2, "sampling_ratio": 2},
    "ps_roi_pool": {"output_size": 2},
    "deform_roi_pool": {"output_size": (2, 3), "gamma": 0.2},
    "deform_ps_roi_pool": {"output_size": 3, "group_size": 2, "trans_std": 0.3},
    "bilinear_sample": {},
    "dcnv3": {"padding": ((1, 0), (2, 1)), "kernel_size": (3, 2), "offset_scale": 0.5},
    "dcnv4": {"groups": 2, "padding": 1},
    "ms_deform_attn": {"spatial_shapes": ((4, 5), (2, 3)), "points_per_level": (1, 2)},
}
SHAPES = {
    "conv": {"x": (2, 4, 8, 9), "w": (6, 2, 3, 3), "bias": (6,)},
    "deform_conv": {
        "x": (2, 4, 8, 9),
        "offsets": (2, 36, 7, 8),
        "w": (6, 2, 3, 3),
        "bias": (6,),
        "mask": (2, 18, 7, 8),
    },
    "deform_conv_layer": {
        "x": (2, 4, 8, 9),
        "w": (6, 2, 3, 3),
        "offset_w": (27, 4, 3, 3),
        "offset_b": (27,),
        "bias": (6,),
    },
    "roi_align": {"x": (2, 3, 8, 9)},
    "roi_pool": {"x": (2, 3, 8, 9)},
    "ps_roi_align": {"x": (2, 8, 8, 9)},
    "ps_roi_pool": {"x": (2, 8, 8, 9)},
    "deform_roi_pool": {"x": (2, 3, 8, 9), "offsets": (3, 2, 2, 3), "mask": (3, 1, 2, 3)},
    "deform_ps_roi_pool": {"x": (2, 8, 8, 9), "trans": (3, 4, 2, 2)},
    "bilinear_sample": {"x": (2, 4, 8, 9), "points": (2, 5, 3, 2)},
    "dcnv3": {"x": (2, 8, 9, 4), "offsets": (2, 7, 11, 24), "mask": (2, 7, 11, 12)},
    "dcnv4": {"x": (2, 8, 9, 4), "offset_mask": (2, 8, 9, 56)},
    "ms_deform_attn": {
        "value": (2, 26, 2, 3),
        "sampling_locations": (2, 5, 2, 3, 2),
        "attention_weights": (2, 5, 2, 3),
    },
}
NAMES = [made.name for made in operators()]
CHANNELS_FIRST = [made.name for made in operators() if made.arrays[0].axes.startswith("(N, C")]


def arrays_of(name, dtype=np.float32, seed=0):
    """The arrays of a call by name, in the order of the operator's table."""
    rng = np.random.default_rng(seed)
    shapes = SHAPES[name]
    made = {argument.name: argument for argument in operator(name).arrays}
    arrays = {}
    for key in made:
        if key == "rois":
            arrays[key] = BOXES.astype(dtype)
        elif key == "points":
            arrays[key] = rng.uniform(-1, 9, shapes[key]).astype(dtype)
        elif key in shapes:
            arrays[key] = rng.standard_normal(shapes[key]).astype(dtype)
    return arrays


def plain(name, arrays, options=None):
    """y of the plain function."""
    options = OPTIONS[name] if options is None else options
    return (
        operator(name).forward(**arrays, **options)
        if name != "deform_conv_layer"
        else operator(name).forward(**{"offset_b": None, **arrays}, **options).y
    )


def plain_gradients(name, grad_y, arrays, options=None, wrt=None):
    """The gradients of the plain function by name, those that are not None."""
    options = OPTIONS[name] if options is None else options
    if name == "deform_conv_layer":
        arrays = {"offset_b": None, **arrays}
    gradients = operator(name).backward(grad_y, **arrays, **options, wrt=wrt)
    return {key: value for key, value in gradients._asdict().items() if value is not None}
