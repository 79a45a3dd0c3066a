"""The page on a framework of one's own: its tape against finite differences and the plain functions, its tables, TensorFlow."""

import inspect
import re

import numpy as np
import pytest

import numdcn
from numdcn.adapters._operators import operators
from numdcn.warm import _small_calls
from tools import draw_docs

pytestmark = pytest.mark.full  # the page trains a network, and all operators compile for float64
PAGE = draw_docs.DOCS / "adapters" / "your-own.md"


@pytest.fixture(scope="module")
def page():
    """What the page's Python leaves behind."""
    return draw_docs.run(PAGE)


def test_the_loss_falls_and_the_offsets_are_found(page):
    """The target is the input moved by one row and two columns."""
    assert page["losses"][-1] < page["losses"][0] / 1000
    np.testing.assert_allclose(page["parameters"]["offset_b"].data, [1, 2], atol=0.2)


def test_the_tape_against_finite_differences(page):
    """Along a random direction of each tensor. Of a central difference with step h the error is about h**2 = 1e-10, and what
    rounding adds eps / h = 2e-10, both relative to derivatives near 1; x has two paths to the loss."""
    rng = np.random.default_rng(0)
    shapes = {"x": (2, 3, 7, 6), "offset_w": (18, 3, 3, 3), "offset_b": (18,), "w": (4, 3, 3, 3), "bias": (4,)}
    data = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    data["offset_w"] *= 0.1
    target = rng.standard_normal((2, 4, 7, 6))

    def loss_of(data):
        """The tensors, and the loss."""
        t = {name: page["Tensor"](array) for name, array in data.items()}
        offsets = page["conv"](t["x"], t["offset_w"], t["offset_b"], padding=1)
        y = page["deform_conv"](t["x"], offsets, t["w"], t["bias"], padding=1)
        return t, page["mean_square"](page["relu"](y), target)

    def number(data):
        page["tape"].clear()
        return loss_of(data)[1].data

    tensors, loss = loss_of(data)
    page["backward"](loss)
    assert page["tape"] == []
    for name, array in data.items():
        direction, step = rng.standard_normal(array.shape), 1e-5
        ends = [number({**data, name: array + sign * step * direction}) for sign in (1, -1)]
        slope = (ends[0] - ends[1]) / (2 * step)
        assert abs(slope) > 0.01
        np.testing.assert_allclose(np.vdot(tensors[name].grad, direction), slope, rtol=1e-6, err_msg=name)


def test_what_the_loss_does_not_depend_on_has_no_gradient(page):
    x, unused = page["Tensor"](np.ones(3)), page["Tensor"](np.ones(3))
    page["relu"](unused)
    page["backward"](page["mean_square"](page["relu"](x), 0))
    assert unused.grad is None and x.grad.tolist() == [2 / 3] * 3


@pytest.mark.parametrize("op", operators(), ids=lambda op: op.name)
def test_all_operators_on_the_tape(page, op):
    """Their gradients are those of the plain backward."""
    rng = np.random.default_rng(0)
    small, more = _small_calls(np.dtype(np.float64))[op.name]
    given = dict(zip(inspect.signature(op.forward).parameters, small))
    names = {argument.name for argument in op.arrays}
    more = {key: value for key, value in (given | more).items() if key not in names}
    given |= {key: value for key, value in _small_calls(np.dtype(np.float64))[op.name][1].items() if key in names}
    arrays = [
        array
        if array is None or argument.name == "rois"
        else rng.uniform(0, 0.2, array.shape)  # few samples are outside
        for argument in op.arrays
        for array in [given.get(argument.name)]
    ]
    tensors = [None if array is None else page["Tensor"](array) for array in arrays]
    page["tape"].clear()
    y = page["taped"](op.name)(*tensors, **more)
    page["backward"](y)
    named = {argument.name: array for argument, array in zip(op.arrays, arrays)}
    g = op.backward(np.ones_like(y.data), **named, **more)
    for tensor, argument in zip(tensors, op.arrays):
        if tensor is not None and argument.name in op.differentiable:
            assert tensor.grad.any() and np.array_equal(tensor.grad, getattr(g, argument.name)), argument.name
    with pytest.raises(TypeError, match="`unknown` is not an argument"):
        page["taped"](op.name)(*tensors, **more, unknown=1)


def test_the_table_of_what_is_saved():
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    table = {name: [re.findall(r"\w+", cell) for cell in cells.split("|")] for name, cells in rows}
    assert table == {
        op.name: [
            list(op.differentiable),
            [argument.name for argument in op.arrays if argument.saved],
            [argument.name for argument in op.arrays if not argument.saved],
            [argument.name for argument in op.residuals],
        ]
        for op in operators()
    }


def test_the_tape_has_about_40_lines():
    code = next(block.code for block in draw_docs.blocks(PAGE) if "class Tensor" in block.code)
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 45


# TensorFlow.


@pytest.fixture
def tf(page):
    return pytest.importorskip("tensorflow", reason="tensorflow is not installed")


def arrays_for_tensorflow():
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape) for shape in ((2, 4, 9, 8), (2, 18, 9, 8), (6, 4, 3, 3), (6,))]


@pytest.mark.parametrize("traced", [False, True])
def test_tensorflow(page, tf, traced):
    arrays = arrays_for_tensorflow()
    function = tf.function(page["tf_deform_conv"]) if traced else page["tf_deform_conv"]
    tensors = [tf.constant(array) for array in arrays]
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        y = function(*tensors)
        loss = tf.reduce_sum(y * y)
    wanted = numdcn.deform_conv_forward(*arrays, padding=1)
    assert np.array_equal(y.numpy(), wanted)
    for got, value in zip(tape.gradient(loss, tensors), numdcn.deform_conv_backward(2 * wanted, *arrays, padding=1)):
        assert np.array_equal(got.numpy(), value)


def test_tensorflow_compiled_by_xla(page, tf):
    tensors = [tf.constant(array) for array in arrays_for_tensorflow()]
    with pytest.raises(tf.errors.InvalidArgumentError, match="PyFunc"):
        tf.function(page["tf_deform_conv"], jit_compile=True)(*tensors)
