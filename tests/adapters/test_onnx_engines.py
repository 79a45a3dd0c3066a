"""numdcn.adapters.onnx beside inference engines: random graphs, and models that PyTorch exports."""

import contextlib
import importlib

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install onnx")

from checks import ROOT, assert_same_bits  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402
from onnx_models import conv_arrays, graph, node, single  # noqa: E402

import numdcn  # noqa: E402
from numdcn.adapters import _operators  # noqa: E402
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


# Models that PyTorch exports.

WINDOW = "SymInt[2] stride, SymInt[4] padding, SymInt[2] dilation"
SCHEMAS = {
    "numdcn::conv": f"(Tensor x, Tensor w, Tensor? bias, {WINDOW}) -> Tensor",
    "numdcn::deform_conv": f"(Tensor x, Tensor offsets, Tensor w, Tensor? bias, Tensor? mask, {WINDOW}) -> Tensor",
    "numdcn::deform_conv_layer": "(Tensor x, Tensor w, Tensor offset_w, Tensor? offset_b, Tensor? bias, bool modulated, "
    f"int mask_scale, {WINDOW}) -> (Tensor, Tensor, Tensor)",
    "numdcn::roi_align": "(Tensor x, Tensor rois, SymInt[2] output_size, float spatial_scale, int sampling_ratio, bool aligned) "
    "-> Tensor",
    "torchvision::deform_conv2d": "(Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, SymInt stride_h, "
    "SymInt stride_w, SymInt pad_h, SymInt pad_w, SymInt dilation_h, SymInt dilation_w, SymInt groups, SymInt offset_groups, "
    "bool use_mask) -> Tensor",
    "torchvision::roi_align": "(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
    "int sampling_ratio, bool aligned) -> Tensor",
}


def shapes_of_numdcn(name, args):
    """The shapes of the results of one of its operators."""
    operator = _operators.operator(name)
    options = dict(zip((option.name for option in operator.options), args[len(operator.arrays) :]))
    if "padding" in options:
        top, bottom, left, right = options["padding"]
        options["padding"] = (top, bottom), (left, right)
    return [(0,) if shape is None else shape for shape in operator.shapes(args[: len(operator.arrays)], options)]


def fake(name):
    """A function that makes the results of an operator, without numbers."""
    space, short = name.split("::")

    def make(x, *args):
        if space == "numdcn":
            results = [x.new_empty(shape) for shape in shapes_of_numdcn(short, (x, *args))]
            return tuple(results) if len(results) > 1 else results[0]
        if short == "roi_align":
            return x.new_empty((args[0].shape[0], x.shape[1], args[2], args[3]))
        return x.new_empty((x.shape[0], args[0].shape[0], *args[1].shape[2:]))

    return make


@pytest.fixture(scope="module")
def torch():
    """torch, with the operators: those that exist, and stand-ins, which have a shape but no kernel, for the others."""
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install torch")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed: pip install onnxscript")
    with contextlib.suppress(ImportError):
        importlib.import_module("numdcn.adapters.torch")
    libraries = []
    for name, schema in SCHEMAS.items():
        space, short = name.split("::")
        if not hasattr(getattr(torch.ops, space), short):
            library = torch.library.Library(space, "FRAGMENT")
            library.define(short + schema)
            torch.library.register_fake(name, fake(name), lib=library)
            libraries.append(library)
    yield torch
    for library in libraries:
        library._destroy()


def exported(torch, function, arrays, opset, dynamic):
    """A function of tensors as a checked ONNX model, whose inputs are called a, b, c ...; `dynamic`: their axes of any size."""

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return function(*tensors)

    names = [chr(ord("a") + i) for i in range(len(arrays))]
    made = torch.onnx.export(
        Module().eval(),
        tuple(map(torch.from_numpy, arrays)),
        dynamo=True,
        opset_version=opset,
        custom_translation_table=translations(),
        dynamic_shapes=(tuple(dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for axes in dynamic),),
        input_names=names,
        verbose=False,
    )
    onnx.checker.check_model(made.model_proto, full_check=True)
    return made.model_proto


def assert_exact(model, arrays, want):
    """In ONNX's evaluator bit for bit; in onnxruntime, which sums in another order, to within 1e-5."""
    here, there = run_both(model, dict(zip("abcde", arrays)))
    assert_same_bits(here[0], want)
    np.testing.assert_allclose(there[0], want, rtol=0, atol=1e-5 * np.abs(want).max())


def nodes_of(model, op):
    return [made for made in model.graph.node if made.op_type == op]


@pytest.mark.parametrize("opset", [19, 20, 21, 22])
@pytest.mark.parametrize("modulated", [False, True])
def test_export_of_numdcn(torch, modulated, opset):
    """Unequal padding, groups inferred, any number of images and any size."""
    rng = np.random.default_rng(0)

    def arrays(n, h, w):
        shapes = [(n, 4, h, w), (n, 24, (h + 1) // 2, w), (6, 2, 3, 2), (6,), (n, 12, (h + 1) // 2, w)]
        return [rng.standard_normal(shape).astype(np.float32) for shape in shapes[: 5 if modulated else 4]]

    def function(x, offsets, w, bias, mask=None):
        return torch.ops.numdcn.deform_conv(x, offsets, w, bias, mask, [2, 1], [0, 2, 1, 0], [1, 1])

    dynamic = [(0, 2, 3), (0, 2, 3), (), (), (0, 2, 3)][: 5 if modulated else 4]
    model = exported(torch, function, arrays(2, 7, 8), opset, dynamic)
    assert model.opset_import[0].version == opset and [made.op_type for made in model.graph.node] == ["DeformConv"]
    for sizes in ((2, 7, 8), (1, 9, 5), (3, 3, 4)):
        given = arrays(*sizes)
        mask = given[4] if modulated else None
        want = numdcn.deform_conv_forward(*given[:4], mask=mask, stride=(2, 1), padding=((0, 2), (1, 0)))
        assert_exact(model, given, want)


@pytest.mark.parametrize("given", ["", "bias", "mask"])
def test_export_of_numdcn_without_what_is_absent(torch, given):
    x, w, offset, bias, mask = conv_arrays(np.float32, np.random.default_rng(1))
    more = {"bias": [bias], "mask": [mask], "": []}[given]

    def function(x, offset, w, *more):
        arrays = {"bias": None, "mask": None, **dict(zip([given], more))}
        return torch.ops.numdcn.deform_conv(x, offset, w, arrays["bias"], arrays["mask"], [1, 1], [0] * 4, [1, 1])

    model = exported(torch, function, [x, offset, w, *more], 20, [()] * (3 + len(more)))
    assert len(nodes_of(model, "DeformConv")[0].input) == {"": 3, "bias": 4, "mask": 5}[given]
    options = {given: more[0]} if given else {}
    assert_exact(model, [x, offset, w, *more], numdcn.deform_conv_forward(x, offset, w, **options))


@pytest.mark.parametrize("opset, modulated", [(19, False), (22, True)])
def test_export_of_torchvision(torch, opset, modulated):
    """Its mask is a placeholder where there is none."""
    x, w, offset, bias, mask = conv_arrays(np.float32, np.random.default_rng(2), group=2)
    arrays = [x, offset, w, bias, mask][: 5 if modulated else 4]

    def function(x, offset, w, bias, mask=None):
        mask = x.new_empty((x.shape[0], 1)) if mask is None else mask
        return torch.ops.torchvision.deform_conv2d(x, w, offset, mask, bias, 1, 1, 0, 0, 1, 1, 2, 1, modulated)

    dynamic = [(0, 2, 3), (0, 2, 3), (), (), (0, 2, 3)][: len(arrays)]
    model = exported(torch, function, arrays, opset, dynamic)
    assert [made.op_type for made in model.graph.node] == ["DeformConv"]
    want = numdcn.deform_conv_forward(x, offset, w, bias, mask=mask if modulated else None)
    assert_exact(model, arrays, want)


@pytest.mark.parametrize(
    "opset, space, sampling_ratio, aligned",
    [(18, "torchvision", -1, False), (19, "numdcn", -1, True), (20, "torchvision", 0, True), (21, "numdcn", 2, False)],
)
def test_export_of_roi_align(torch, opset, space, sampling_ratio, aligned):
    """For any number of boxes."""
    x = np.random.default_rng(3).standard_normal((2, 3, 8, 9)).astype(np.float32)
    rois = np.array([[0, 0, 1, 9, 8], [1, 2, 3, 17, 9], [1, 3, 3, 2, 2]], np.float32)

    def function(x, rois):
        if space == "numdcn":
            return torch.ops.numdcn.roi_align(x, rois, [3, 2], 0.5, sampling_ratio, aligned)
        return torch.ops.torchvision.roi_align(x, rois, 0.5, 3, 2, sampling_ratio, aligned)

    model = exported(torch, function, [x, rois], opset, [(0, 2, 3), (0,)])
    for boxes in (rois, rois[:1], rois[[2, 1, 0, 1]]):
        assert_exact(model, [x, boxes], numdcn.roi_align_forward(x, boxes, (3, 2), 0.5, sampling_ratio, aligned))


@pytest.mark.parametrize("modulated, mask_scale", [(False, 1), (True, 1), (True, 2)])
def test_export_of_the_layer(torch, modulated, mask_scale):
    """As an ordinary convolution, whose sums ONNX takes in another order, and a deformable one."""
    rng, window = np.random.default_rng(4), ([2, 1], [1, 0, 0, 2], [1, 1])
    x, w, bias = (rng.standard_normal(s).astype(np.float32) for s in ((2, 4, 7, 8), (6, 2, 3, 2), (6,)))
    predicted = (18 if modulated else 12) * 2
    offset_w = rng.standard_normal((predicted, 4, 3, 2)).astype(np.float32) / 5
    offset_b = rng.standard_normal(predicted).astype(np.float32)

    def function(x, w, offset_w, offset_b, bias):
        return torch.ops.numdcn.deform_conv_layer(x, w, offset_w, offset_b, bias, modulated, mask_scale, *window)

    model = exported(torch, function, [x, w, offset_w, offset_b, bias], 20, [(0, 2, 3), (), (), (), ()])
    options = {"modulated": modulated, "mask_scale": mask_scale, "stride": (2, 1), "padding": ((1, 0), (0, 2))}
    for images in (x, x[:1, :, :5, 1:]):
        fed = dict(zip("abcde", (images, w, offset_w, offset_b, bias)))
        want = numdcn.deform_conv_layer_forward(images, w, offset_w, offset_b, bias, **options)
        # Offsets are sums of 24 terms, off by some 1e-6; for each pixel of offset y changes by sums of 12 terms w*(x - x), below 40.
        for results in run_both(model, fed):
            for got, wanted in zip(results, want, strict=True):
                wanted = np.empty(0, np.float32) if wanted is None else wanted
                np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4)


def test_export_of_conv(torch):
    rng = np.random.default_rng(5)
    x, w, bias = (rng.standard_normal(s).astype(np.float32) for s in ((2, 4, 7, 8), (6, 2, 3, 2), (6,)))

    def function(x, w, bias):
        return torch.ops.numdcn.conv(x, w, bias, [2, 1], [1, 0, 0, 2], [1, 2])

    model = exported(torch, function, [x, w, bias], 18, [(0, 2, 3), (), ()])
    want = numdcn.conv_forward(x, w, bias, stride=(2, 1), padding=((1, 0), (0, 2)), dilation=(1, 2))
    for results in run_both(model, dict(zip("abc", (x, w, bias)))):
        np.testing.assert_allclose(results[0], want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_export_needs_fixed_channels(torch):
    """DeformConv has the number of groups as an attribute."""
    x, w, offset, _, _ = conv_arrays(np.float32, np.random.default_rng(4))

    def function(x, offset, w):
        return torch.ops.numdcn.deform_conv(x, offset, w, None, None, [1, 1], [0] * 4, [1, 1])

    with pytest.raises(
        torch.onnx.errors.OnnxExporterError, match="expected fixed ones: groups are attributes in ONNX"
    ) as raised:
        exported(torch, function, [x, offset, w], 20, [(1,), (), (1,)])
    assert raised


def test_only_what_is_registered_is_translated(torch):
    known = {name.name() for name in translations()}
    assert known == set(SCHEMAS)


# OpenVINO, as the page has it.


def openvino_block():
    """The Python on the page that teaches OpenVINO to read DeformConv."""
    page = (ROOT / "docs" / "adapters" / "onnx.md").read_text(encoding="utf-8")
    return page.partition("<!-- needs openvino -->\n```python\n")[2].partition("```\n")[0]


@pytest.mark.parametrize("given", ["", "B", "mask", "B mask"])
def test_openvino(given, tmp_path, monkeypatch):
    pytest.importorskip("openvino", reason="openvino is not installed: pip install openvino")
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(5)
    x, w, _, bias, _ = conv_arrays(np.float32, rng, group=2)
    offset, mask = (rng.standard_normal((2, n, 4, 6)).astype(np.float32) for n in (24, 12))
    bias, mask = bias if "B" in given else None, mask if "mask" in given else None
    arrays = [x, w, offset, bias, mask][: 5 if mask is not None else 4 if bias is not None else 3]
    attributes = {"pads": [2, 0, 1, 1], "strides": [2, 1], "dilations": [1, 2], "group": 2, "offset_group": 2}
    model, fed = single("DeformConv", arrays, 22, **attributes)
    onnx.save(model, "model.onnx")
    names = {}
    exec(openvino_block(), names)
    got = names["model"](fed)[0]
    want = numdcn.deform_conv_forward(
        x, offset, w, bias, mask=mask, padding=((2, 1), (0, 1)), stride=(2, 1), dilation=(1, 2)
    )
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
