"""Small calls of the operators that numdcn.adapters.dask has: arrays, their lazy counterparts, and the gradients to expect."""

import dask.array as da
import numpy as np

import numdcn
from numdcn.adapters import dask as adapter

NAMES = [op.name for op in adapter.OPERATORS]
CHUNKS = (2, 1, 3, 1)  # of a batch of 7
N, C, H, W, C_OUT = sum(CHUNKS), 4, 5, 6, 3
TAPS = 9
GEOMETRY = {"stride": (1, 2), "padding": ((1, 0), (2, 1)), "dilation": 1}
HO, WO = 4, 4  # of GEOMETRY


def arrays(name, dtype=np.float32):
    """The arrays of a call by name."""
    rng = np.random.default_rng(0)
    modulated = 3 * TAPS  # offset channels of a modulated layer
    shapes = {
        "bilinear_sample": {"x": (N, C, H, W), "points": (N, 8, 2)},
        "conv": {"x": (N, C, H, W), "w": (C_OUT, C, 3, 3), "bias": (C_OUT,)},
        "deform_conv": {
            "x": (N, C, H, W), "offsets": (N, 2 * TAPS, HO, WO), "w": (C_OUT, C, 3, 3), "bias": (C_OUT,), "mask": (N, TAPS, HO, WO),
        },
        "deform_conv_layer": {
            "x": (N, C, H, W), "w": (C_OUT, C, 3, 3), "offset_w": (modulated, C, 3, 3), "offset_b": (modulated,), "bias": (C_OUT,),
        },
        "dcnv3": {"x": (N, H, W, C), "offsets": (N, HO, WO, 36), "mask": (N, HO, WO, 18)},
        "dcnv4": {"x": (N, H, W, C), "offset_mask": (N, HO, WO, 56)},
        "ms_deform_attn": {
            "value": (N, 26, 2, 3), "sampling_locations": (N, 5, 2, 3, 2), "attention_weights": (N, 5, 2, 3),
        },
    }  # fmt: skip
    return {key: rng.standard_normal(shape).astype(dtype) for key, shape in shapes[name].items()}


def options(name):
    """The other arguments of a call."""
    more = {"modulated": True, "mask_scale": 2} if name == "deform_conv_layer" else {}
    if name == "ms_deform_attn":
        return {"spatial_shapes": ((4, 5), (2, 3)), "points_per_level": (1, 2)}
    if name == "dcnv4":
        more = {"groups": 2}
    return {} if name == "bilinear_sample" else {**GEOMETRY, **more}


def lazy(given):
    """Arrays as the adapter takes them. Those beside x have other chunks, along all axes."""
    made = {}
    for key, array in given.items():
        if array.shape[0] != N or key == "w":
            made[key] = array
        else:
            made[key] = da.from_array(array, chunks=(CHUNKS, 3, 2, 4)[: array.ndim] if key in ("x", "value") else 2)
    return made


def plain(name, way, *args, **keywords):
    return getattr(numdcn, f"{name}_{way}")(*args, **keywords)


def first(result):
    """y of a forward's result."""
    return getattr(result, "y", result)


def gradient_of_y(name, given):
    y = first(plain(name, "forward", **given, **options(name)))
    return np.random.default_rng(1).standard_normal(y.shape).astype(y.dtype)


def backward(name, given, grad_y, **more):
    """The lazy gradients."""
    return getattr(adapter, f"{name}_backward")(da.from_array(grad_y, chunks=3), **lazy(given), **options(name), **more)


def tree(parts):
    """A sum of neighbours, then of those sums, and so on."""
    while len(parts) > 1:
        parts = [a + b for a, b in zip(parts[::2], parts[1::2])] + parts[len(parts) - len(parts) % 2 :]
    return parts[0]


def expected_gradients(name, given, grad_y):
    """Those of the plain function, for each chunk: joined where there is a batch axis, else added up."""
    ends = np.cumsum(CHUNKS)
    split = {key for key, array in lazy(given).items() if isinstance(array, da.Array)}
    parts = []
    for start, end in zip(ends - CHUNKS, ends):
        block = {key: array[start:end] if key in split else array for key, array in given.items()}
        parts.append(plain(name, "backward", grad_y[start:end], **block, **options(name)))
    kind = type(parts[0])
    return kind(
        *(
            (np.concatenate if key in split else tree)([getattr(part, key) for part in parts]) for key in kind._fields
        )  # all are given
    )
