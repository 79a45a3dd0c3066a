"""Models of one or a few nodes, and small arrays for them."""

import ml_dtypes
import numpy as np
import onnx
from onnx import helper
from onnx.reference import ReferenceEvaluator

from numdcn.adapters.onnx import OPS

OPSETS = (19, 20, 21, 22, onnx.defs.onnx_opset_version())
DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}
NAMES = {
    "DeformConv": ("X", "W", "offset", "B", "mask"),
    "RoiAlign": ("X", "rois", "batch_indices"),
    "MaxRoiPool": ("X", "rois"),
    "GridSample": ("X", "grid"),
}


def info(name, array):
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    return helper.make_tensor_value_info(name, kind, [None] * array.ndim)


def graph(nodes, inputs, outputs, opset):
    """A checked model of nodes; the outputs have the dtype, and the number of axes, of the first input."""
    first = next(iter(inputs.values()))
    made = helper.make_graph(
        nodes,
        "graph",
        [info(name, array) for name, array in inputs.items()],
        [info(name, first) for name in outputs],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.checker.check_model(model)
    return model


def node(op, arrays, y="y", **attributes):
    """A node of these arrays: the last may be missing, and others None."""
    given = [name if array is not None else "" for name, array in zip(NAMES[op], arrays)]
    return helper.make_node(op, given, [y], **attributes)


def single(op, arrays, opset, **attributes):
    """(a model of one operator, what it is fed)"""
    fed = {name: array for name, array in zip(NAMES[op], arrays) if array is not None}
    return graph([node(op, arrays, **attributes)], fed, ["y"], opset), fed


def run(op, arrays, opset=22, ops=OPS, **attributes):
    """The result of one operator in ONNX's evaluator."""
    model, fed = single(op, arrays, opset, **attributes)
    return ReferenceEvaluator(model, new_ops=ops).run(None, fed)[0]


def conv_arrays(dtype, rng, offset_groups=1, group=1, spread=1.0):
    """X, W, offset, B, mask; 3 x 2 kernels on 2 images of 4 channels, 6 x 7 pixels, where no attribute is set."""
    taps = 6 * offset_groups
    return [
        a.astype(dtype)
        for a in (
            rng.standard_normal((2, 4, 6, 7)),
            rng.standard_normal((6, 4 // group, 3, 2)),
            spread * rng.standard_normal((2, 2 * taps, 4, 6)),
            rng.standard_normal(6),
            rng.random((2, taps, 4, 6)),
        )
    ]
