"""numdcn.adapters.onnx: ONNX's own tests, random graphs against onnxruntime, and every rule of the operators' attributes."""

import warnings

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install onnx")

from checks import assert_same_bits  # noqa: E402
from onnx import helper  # noqa: E402
from onnx.inliner import inline_local_functions  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402
from onnx_models import DTYPES, NAMES, OPSETS, conv_arrays, graph, info, node, run, single  # noqa: E402

import numdcn  # noqa: E402
from numdcn.adapters.onnx import OPS  # noqa: E402


def node_tests():
    """ONNX's own tests of the operators, by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import _NodeTestCases, deformconv, gridsample, roialign

        assert deformconv and gridsample and roialign  # importing them adds their tests
    return {case.name: case for case in _NodeTestCases if case.model.graph.node[0].op_type in NAMES}


NODE_TESTS = node_tests()


# ONNX's own tests.


def test_the_tests_of_onnx_are_found():
    assert {case.model.graph.node[0].op_type for case in NODE_TESTS.values()} == set(NAMES) - {"MaxRoiPool"}


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("name", NODE_TESTS)
def test_onnx_itself(name, opset):
    """In every opset; GridSample's modes had other names before 20, and it had no volumes."""
    case = NODE_TESTS[name]
    model = onnx.ModelProto.FromString(case.model.SerializeToString())
    model.opset_import[0].version = opset
    if opset < 20 and model.graph.node[0].op_type == "GridSample":
        if "volumetric" in name:
            return
        for attribute in model.graph.node[0].attribute:
            if attribute.name == "mode":
                attribute.s = {b"linear": b"bilinear", b"cubic": b"bicubic"}.get(attribute.s, attribute.s)
    onnx.checker.check_model(model)
    evaluator = ReferenceEvaluator(model, new_ops=OPS)
    for inputs, outputs in case.data_sets:
        got = evaluator.run(None, dict(zip(evaluator.input_names, inputs)))
        for result, want in zip(got, outputs, strict=True):
            np.testing.assert_allclose(result, want, rtol=case.rtol, atol=case.atol)


# Values, attributes and their defaults, against the plain functions.


def plainly(function, arrays, *args, **options):
    """The plain function, in float32 for half types; the result in the type of the arrays."""
    dtype = arrays[0].dtype
    wide = np.float32 if dtype.itemsize == 2 else dtype
    arrays = [a if a is None else a.astype(wide) for a in arrays]
    options = {name: value.astype(wide) if isinstance(value, np.ndarray) else value for name, value in options.items()}
    return function(*arrays, *args, **options).astype(dtype)


@pytest.mark.parametrize("given", ["", "B", "mask", "B mask"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_deform_conv_without_attributes(dtype, given):
    X, W, offset, B, mask = conv_arrays(DTYPES[dtype], np.random.default_rng(0))
    B, mask = (array if name in given.split() else None for name, array in (("B", B), ("mask", mask)))
    arrays = [X, W, offset] + [B, mask][: 2 if mask is not None else 1 if B is not None else 0]
    got = run("DeformConv", arrays)
    want = plainly(numdcn.deform_conv_forward, [X, offset, W, B], mask=mask)
    assert got.dtype == X.dtype
    assert_same_bits(got, want)


@pytest.mark.parametrize("opset", OPSETS)
def test_deform_conv_with_all_attributes(opset):
    rng = np.random.default_rng(1)
    X, W, _, B, _ = conv_arrays(np.float32, rng, group=2)
    offset, mask = (rng.standard_normal((2, n, 4, 6)).astype(np.float32) for n in (24, 12))
    attributes = {"pads": [2, 0, 1, 1], "strides": [2, 1], "dilations": [1, 2], "group": 2, "offset_group": 2}
    got = run("DeformConv", [X, W, offset, B, mask], opset, kernel_shape=[3, 2], **attributes)
    want = numdcn.deform_conv_forward(
        X, offset, W, B, mask=mask, padding=((2, 1), (0, 1)), stride=(2, 1), dilation=(1, 2)
    )
    assert_same_bits(got, want)


ROIS = np.array([[0, 0, 5, 4], [1, 2, 9, 8], [3, 3, 3, 3], [-2, -1, 3, 2]])
INDICES = np.array([0, 1, 1, 0])


@pytest.mark.parametrize(
    "opset, attributes, aligned",
    [
        (10, {}, False),
        (16, {}, True),
        (22, {}, True),
        (16, {"coordinate_transformation_mode": "output_half_pixel"}, False),
        (22, {"coordinate_transformation_mode": "half_pixel"}, True),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_roi_align_without_attributes(dtype, opset, attributes, aligned):
    """One bin, adaptive; the shift by half a pixel is the default since opset 16."""
    if dtype == "bfloat16" and opset < 22:
        return
    X, rois = conv_arrays(DTYPES[dtype], np.random.default_rng(2))[0], ROIS.astype(DTYPES[dtype])
    boxes = np.concatenate([INDICES[:, None], ROIS], axis=1).astype(X.dtype)
    assert_same_bits(
        run("RoiAlign", [X, rois, INDICES], opset, **attributes),
        plainly(numdcn.roi_align_forward, [X, boxes], (1, 1), aligned=aligned),
    )


def test_roi_align_with_all_attributes():
    X, rois = conv_arrays(np.float32, np.random.default_rng(3))[0], ROIS.astype(np.float32)
    boxes = np.concatenate([INDICES[:, None], ROIS], axis=1, dtype=np.float32, casting="unsafe")
    attributes = {"output_height": 3, "output_width": 2, "sampling_ratio": 2, "spatial_scale": 0.5, "mode": "avg"}
    got = run("RoiAlign", [X, rois, INDICES], **attributes)
    assert_same_bits(got, numdcn.roi_align_forward(X, boxes, (3, 2), 0.5, 2, aligned=True))


@pytest.mark.parametrize("opset", [1, 16, 22])
@pytest.mark.parametrize("attributes", [{}, {"spatial_scale": 0.5}])
@pytest.mark.parametrize("dtype", DTYPES)
def test_max_roi_pool(dtype, attributes, opset):
    if dtype == "bfloat16" and opset < 22:
        return
    X = conv_arrays(DTYPES[dtype], np.random.default_rng(4))[0]
    boxes = np.concatenate([INDICES[:, None], ROIS], axis=1).astype(X.dtype)
    got = run("MaxRoiPool", [X, boxes], opset, pooled_shape=[3, 2], **attributes)
    want = plainly(lambda *arrays, **more: numdcn.roi_pool_forward(*arrays, (3, 2), **more), [X, boxes], **attributes)
    assert_same_bits(got, want)


def pixels(grid, size, align_corners):
    """Section g.1 of docs/semantics.md, as it is written there."""
    x, y = grid[..., 0], grid[..., 1]
    axes = [(a + 1) * (n - 1) / 2 if align_corners else ((a + 1) * n - 1) / 2 for a, n in ((y, size[0]), (x, size[1]))]
    return np.stack(axes, axis=-1)


@pytest.mark.parametrize(
    "opset, attributes",
    [
        (16, {}),
        (16, {"mode": "bilinear"}),
        (20, {}),
        (22, {"mode": "linear", "padding_mode": "zeros", "align_corners": 0}),
        (22, {"align_corners": 1}),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_grid_sample(dtype, opset, attributes):
    """Bit for bit where coordinates are exact, as those of eighths are."""
    if dtype == "bfloat16" and opset < 22:
        return
    rng = np.random.default_rng(5)
    X = conv_arrays(DTYPES[dtype], rng)[0]
    grid = (rng.integers(-12, 13, (2, 3, 5, 2)) / 8).astype(X.dtype)
    points = pixels(grid.astype(np.float64), X.shape[2:], attributes.get("align_corners"))
    assert_same_bits(
        run("GridSample", [X, grid], opset, **attributes), plainly(numdcn.bilinear_sample_forward, [X, points])
    )


@pytest.mark.parametrize(
    "x_dtype, grid_dtype", [("float32", "float64"), ("float64", "float16"), ("bfloat16", "float32")]
)
def test_a_grid_of_another_type(x_dtype, grid_dtype):
    """It is computed in the wider of both, and the result has the type of X."""
    rng = np.random.default_rng(6)
    X = conv_arrays(DTYPES[x_dtype], rng)[0]
    grid = rng.uniform(-1, 1, (2, 3, 5, 2)).astype(DTYPES[grid_dtype])
    wide = np.float64 if "float64" in (x_dtype, grid_dtype) else np.float32
    got = run("GridSample", [X, grid])
    assert got.dtype == X.dtype
    assert_same_bits(got, run("GridSample", [X.astype(wide), grid.astype(wide)]).astype(X.dtype))


@pytest.mark.parametrize("op", NAMES)
def test_nothing_to_do(op):
    """No images, or no boxes."""
    x, empty = np.ones((0, 4, 6, 7), np.float32), np.ones((2, 4, 6, 7), np.float32)
    arrays, attributes, shape = {
        "DeformConv": ([x, np.ones((6, 4, 3, 2), np.float32), np.ones((0, 12, 4, 6), np.float32)], {}, (0, 6, 4, 6)),
        "GridSample": ([x, np.ones((0, 3, 5, 2), np.float32)], {}, (0, 4, 3, 5)),
        "RoiAlign": ([empty, np.ones((0, 4), np.float32), np.ones(0, np.int64)], {}, (0, 4, 1, 1)),
        "MaxRoiPool": ([empty, np.ones((0, 5), np.float32)], {"pooled_shape": [2, 3]}, (0, 4, 2, 3)),
    }[op]
    assert run(op, arrays, **attributes).shape == shape


# What is left to ONNX's own operators, and what is refused.


@pytest.mark.parametrize("align_corners", [0, 1])
@pytest.mark.parametrize("padding_mode", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_other_modes_of_grid_sample(mode, padding_mode, align_corners):
    """Are those of ONNX, under the names of either opset."""
    rng = np.random.default_rng(7)
    X = rng.standard_normal((1, 2, 4, 3)).astype(np.float32)
    grid = rng.uniform(-1.5, 1.5, (1, 2, 3, 2)).astype(np.float32)
    attributes = {"mode": mode, "padding_mode": padding_mode, "align_corners": align_corners}
    got, want = run("GridSample", [X, grid], **attributes), run("GridSample", [X, grid], ops=None, **attributes)
    if (mode, padding_mode) == ("linear", "zeros"):  # numdcn's: another order of sums
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    else:
        assert_same_bits(got, want)
    attributes["mode"] = {"linear": "bilinear", "cubic": "bicubic"}.get(mode, mode)
    assert_same_bits(run("GridSample", [X, grid], 16, **attributes), got)


@pytest.mark.parametrize("case", ["volumes", "integers"])
def test_other_arrays_of_grid_sample(case):
    rng = np.random.default_rng(8)
    if case == "volumes":
        arrays = [rng.standard_normal((1, 2, 3, 4, 5)), rng.uniform(-1, 1, (1, 2, 2, 2, 3))]
        arrays = [a.astype(np.float32) for a in arrays]
    else:
        arrays = [rng.integers(0, 255, (1, 2, 4, 5)), rng.uniform(-1, 1, (1, 2, 2, 2)).astype(np.float32)]
    assert_same_bits(run("GridSample", arrays), run("GridSample", arrays, ops=None))


@pytest.mark.parametrize("opset", [10, 16, 22])
def test_the_maximum_of_roi_align(opset):
    X, rois = conv_arrays(np.float32, np.random.default_rng(9))[0], ROIS.astype(np.float32)
    attributes = {"mode": "max", "output_height": 2, "output_width": 3}
    got = run("RoiAlign", [X, rois, INDICES], opset, **attributes)
    mode = "output_half_pixel" if opset == 10 else "half_pixel"
    arrays = [X, rois, INDICES]
    want = run("RoiAlign", arrays, 22, None, coordinate_transformation_mode=mode, **attributes)
    assert_same_bits(got, want)


WRONG = {
    "group": ({"group": 2}, "`group` is 2, expected group[*]4 = 4: X has shape"),
    "offset_group": ({"offset_group": 3}, "`offset_group` is 3, expected offset_group[*]2[*]kh[*]kw = .*12 = 12"),
    "kernel_shape": ({"kernel_shape": [2, 3]}, "`kernel_shape` is \\[2, 3\\], but W has shape"),
    "pads": ({"pads": [1, 1]}, "`pads` is \\[1, 1\\], expected \\[top, left, bottom, right\\]"),
    "size": ({"pads": [1, 1, 1, 1]}, "`offsets` has shape .*expected \\(2, 12, 6, 8\\)"),
    "strides": ({"strides": [0, 1]}, "`stride\\[0\\]` is 0, expected at least 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_attributes_that_do_not_fit(name):
    attributes, text = WRONG[name]
    arrays = conv_arrays(np.float32, np.random.default_rng(10))
    model, fed = single("DeformConv", arrays, 22, **attributes)
    with pytest.raises(ValueError, match=text):
        ReferenceEvaluator(model, new_ops=OPS).run(None, fed)


def test_deform_conv_of_volumes():
    """Neither has ONNX's own evaluator an operator for them."""
    arrays = [np.zeros(shape, np.float32) for shape in ((1, 1, 3, 3, 3), (1, 1, 2, 2, 2), (1, 24, 2, 2, 2))]
    with pytest.raises(ValueError, match="`x` has shape .*expected 4 axes"):
        run("DeformConv", arrays)
    with pytest.raises(RuntimeError):
        run("DeformConv", arrays, ops=None)


def test_boxes_that_do_not_fit():
    X = np.ones((2, 4, 6, 7), np.float32)
    rois = ROIS.astype(np.float32)
    for boxes, indices in ((rois, INDICES[:3]), (rois[:, :3], INDICES), (rois, INDICES[:, None])):
        with pytest.raises(
            ValueError, match="`rois` has shape .* and `batch_indices` .*, expected \\(R, 4\\) and \\(R,\\)"
        ):
            run("RoiAlign", [X, boxes, indices])
    with pytest.raises(ValueError, match="expected one of half_pixel, output_half_pixel"):
        run("RoiAlign", [X, rois, INDICES], coordinate_transformation_mode="pixel")
    with pytest.raises(ValueError, match="batch index"):
        run("RoiAlign", [X, rois, INDICES + 1])


def test_within_other_graphs():
    """The branches of an If use the operators; functions do once they are inlined."""
    X, W, offset, _, _ = conv_arrays(np.float32, np.random.default_rng(11))
    want = numdcn.deform_conv_forward(X, offset, W)
    branch = helper.make_graph([node("DeformConv", [X, W, offset])], "branch", [], [info("y", X)])
    both = helper.make_node("If", ["condition"], ["y"], then_branch=branch, else_branch=branch)
    fed = {"X": X, "W": W, "offset": offset, "condition": np.array(True)}
    model = graph([both], fed, ["y"], 22)
    assert_same_bits(ReferenceEvaluator(model, new_ops=OPS).run(None, fed)[0], want)

    opsets = [helper.make_opsetid("", 22), helper.make_opsetid("own", 1)]
    function = helper.make_function(
        "own", "F", ["X", "W", "offset"], ["y"], [node("DeformConv", [X, W, offset])], opsets
    )
    fed.pop("condition")
    model = graph([helper.make_node("Identity", ["X"], ["y"])], fed, ["y"], 22)
    model.graph.node[0].CopyFrom(helper.make_node("F", ["X", "W", "offset"], ["y"], domain="own"))
    model.functions.append(function)
    model.opset_import.append(opsets[1])
    inlined = inline_local_functions(model)
    assert_same_bits(ReferenceEvaluator(inlined, new_ops=OPS).run(None, fed)[0], want)
