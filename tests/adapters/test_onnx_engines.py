"""numdcn.adapters.onnx beside inference engines: random graphs, and models that PyTorch exports."""

import importlib
import pathlib

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install onnx")

from checks import ROOT, assert_same_bits  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402
from onnx_models import conv_arrays, graph, node, single  # noqa: E402

import numdcn  # noqa: E402
from numdcn.adapters.onnx import OPS, translations  # noqa: E402


def engine(model):
    """A session of onnxruntime on the CPU."""
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    return runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run_both(model, fed):
    """The results of a model in ONNX's evaluator, and in onnxruntime."""
    return ReferenceEvaluator(model, new_ops=OPS).run(None, fed), engine(model).run(None, fed)


# Random graphs. All numbers are small multiples of powers of two, so that float32 holds every product and sum exactly, and the
# order of sums does not matter: results are equal, not close.


def dyadic(rng, shape, denominator, most=2):
    """Random multiples of 1/denominator, at most `most`, as float32."""
    return (rng.integers(-most * denominator, most * denominator + 1, shape) / denominator).astype(np.float32)


def sometimes(rng, **attributes):
    """Some of these attributes."""
    return {name: value for name, value in attributes.items() if rng.random() < 0.7}


def random_conv(rng):
    """(its attributes, its arrays by name)"""
    groups, offset_groups = (int(rng.choice([1, 2])) for _ in range(2))
    n, (kh, kw) = int(rng.integers(1, 3)), rng.integers(1, 4, 2).tolist()
    attributes = sometimes(
        rng,
        pads=rng.integers(0, 3, 4).tolist(),
        strides=rng.integers(1, 3, 2).tolist(),
        dilations=rng.integers(1, 3, 2).tolist(),
        kernel_shape=[kh, kw],
    )
    attributes |= {"group": groups} if groups > 1 else {}
    attributes |= {"offset_group": offset_groups} if offset_groups > 1 else {}
    pads, strides, dilations = (
        attributes.get(k, d) for k, d in (("pads", [0] * 4), ("strides", [1] * 2), ("dilations", [1] * 2))
    )
    size = rng.integers(8, 13, 2).tolist()
    out = [(size[i] + pads[i] + pads[i + 2] - dilations[i] * ((kh, kw)[i] - 1) - 1) // strides[i] + 1 for i in range(2)]
    channels = offset_groups * kh * kw
    arrays = {
        "X": dyadic(rng, (n, 4, *size), 1),
        "W": dyadic(rng, (4, 4 // groups, kh, kw), 1),
        "offset": dyadic(rng, (n, 2 * channels, *out), 2, most=5),
        "B": dyadic(rng, 4, 2) if rng.random() < 0.5 else None,
        "mask": dyadic(rng, (n, channels, *out), 2, most=1) if rng.random() < 0.5 else None,
    }
    return attributes, arrays


def random_tail(rng, op, images, opset):
    """(its attributes, its arrays by name) for an operator on the result of the convolution"""
    if op == "GridSample":
        mode = "bilinear" if opset < 20 else "linear"
        attributes = sometimes(rng, mode=mode, padding_mode="zeros", align_corners=int(rng.integers(2)))
        return attributes, {"grid": dyadic(rng, (images, *rng.integers(1, 6, 2), 2), 8, most=1) * np.float32(1.25)}
    corner, size = rng.integers(-2, 12, (5, 2)) / 2, rng.integers(0, 12, (5, 2)) / 2
    rois = np.concatenate([corner, corner + size], axis=1).astype(np.float32)
    indices = rng.integers(0, images, 5)
    if op == "MaxRoiPool":
        rois = np.concatenate([indices[:, None], rois], axis=1, dtype=np.float32, casting="unsafe")
        return {"pooled_shape": rng.integers(1, 4, 2).tolist(), **sometimes(rng, spatial_scale=0.5)}, {"rois": rois}
    modes = ["half_pixel", "output_half_pixel"]
    attributes = sometimes(
        rng,
        output_height=int(rng.choice([1, 2, 4])),
        output_width=int(rng.choice([1, 2, 4])),
        sampling_ratio=int(rng.choice([1, 2, 4])),
        spatial_scale=0.5,
        coordinate_transformation_mode=str(rng.choice(modes)),
    )
    return attributes, {"rois": rois, "batch_indices": indices}


@pytest.mark.parametrize("seed", range(40))
def test_random_graphs(seed):
    """DeformConv, and another operator on its result. onnxruntime has RoiAlign and MaxRoiPool up to opset 21."""
    rng = np.random.default_rng(seed)
    op = ("GridSample", "RoiAlign", "MaxRoiPool")[seed % 3]
    opset = int(rng.integers(19, 24 if op == "GridSample" else 22))
    first, arrays = random_conv(rng)
    second, more = random_tail(rng, op, len(arrays["X"]), opset)
    fed = {name: array for name, array in {**arrays, **more}.items() if array is not None}
    given = list(arrays.values())
    while given[-1] is None:  # the last may be missing, others have an empty name
        given.pop()
    tail = onnx.helper.make_node(op, ["y", *more], ["z"], **second)
    model = graph([node("DeformConv", given, **first), tail], fed, ["y", "z"], opset)
    (y, z), (y_there, z_there) = run_both(model, fed)
    np.testing.assert_array_equal(y, y_there)
    if op == "RoiAlign" and not second.get("sampling_ratio"):
        # Bins are divided into any number of samples, and means by it. A coordinate below 16 has a few roundings of 8 eps each; along
        # either axis y changes by at most 2 max|y| a pixel. With the roundings of weights and sums, 200 eps max|y| is above all that.
        np.testing.assert_allclose(z, z_there, rtol=0, atol=200 * np.finfo(np.float32).eps * np.abs(y).max())
    else:
        np.testing.assert_array_equal(z, z_there)
