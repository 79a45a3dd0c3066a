"""A call like an earlier one is not checked again: what is no such call is."""

import numpy as np
import pytest

import numdcn
from numdcn._call import remembered
from numdcn._call.device_array import DTYPES, DeviceArray, c_strides
from numdcn._call.prepared import PreparedWeights

x, w, offsets = np.ones((1, 2, 5, 5), "f"), np.ones((3, 2, 3, 3), "f"), np.zeros((1, 18, 3, 3), "f")
layer = {"offset_w": np.zeros((18, 2, 3, 3), "f"), "offset_b": None}


@pytest.fixture(autouse=True)
def good_calls():
    """The calls that the wrong ones below equal, by the rules of Python's dict: 1 == True == 1.0."""
    numdcn.deform_conv_forward(x, offsets, w, stride=1, padding=0, dilation=1)
    numdcn.deform_conv_forward(x, offsets, w, stride=(1, 1), padding=((0, 0), (0, 0)), dilation=1)
    numdcn.conv_forward(x, w, stride=1)
    numdcn.bilinear_sample_forward(x, np.zeros((1, 4, 2), "f"))
    numdcn.deform_conv_layer_forward(x, w, **layer, modulated=False, mask_scale=1)


@pytest.mark.parametrize("stride", [True, 1.0, np.float32(1), np.True_, (True, 1), (1, 1.0), [1.0, 1]], ids=repr)
def test_what_equals_1_is_no_stride(stride):
    with pytest.raises(TypeError, match="`stride"):
        numdcn.deform_conv_forward(x, offsets, w, stride=stride)
    with pytest.raises(TypeError, match="`stride"):
        numdcn.conv_forward(x, w, stride=stride)


@pytest.mark.parametrize("padding", [False, 0.0, ((0, 0), (0, False)), ((0, 0.0), (0, 0)), ((0, 0), 0.0)], ids=repr)
def test_what_equals_0_is_no_padding(padding):
    with pytest.raises((TypeError, ValueError), match="`padding"):
        numdcn.deform_conv_forward(x, offsets, w, padding=padding)


def test_options_of_the_layer():
    with pytest.raises(TypeError, match="`modulated`"):
        numdcn.deform_conv_layer_forward(x, w, **layer, modulated=0)
    with pytest.raises(ValueError, match="`mask_scale`"):
        numdcn.deform_conv_layer_forward(x, w, **layer, mask_scale=1.0)


def test_arrays_of_another_kind():
    for wrong in (w.astype(np.float64), w.astype(">f4"), w.astype(np.int32), w.tolist()):
        with pytest.raises(TypeError, match="`w`"):
            numdcn.deform_conv_forward(x, offsets, wrong)
    with pytest.raises(ValueError, match="`offsets`"):
        numdcn.deform_conv_forward(x, offsets, w[:, :, :2])
    with pytest.raises(TypeError, match="`points`"):
        numdcn.bilinear_sample_forward(x, np.zeros((1, 4, 2)))


def test_weights_prepared_for_other_groups():
    two = np.ones((2, 1, 3, 3), "f")
    numdcn.conv_forward(x, numdcn.prepare_weights(two, groups=2))
    numdcn.conv_forward(x, two)
    with pytest.raises(ValueError, match="groups"):
        numdcn.conv_forward(x, numdcn.prepare_weights(two, groups=1))


def test_problems_of_arrays_on_a_gpu():
    """Remembered too, by shapes, types and the groups of prepared weights."""
    made = []

    def problem(arrays, stride):
        made.append((arrays, stride))
        return len(made)

    def seen(shape, dtype="float32", address=0x1000):
        return DeviceArray(None, None, 0, address, DTYPES[dtype], shape, c_strides(shape), 0)

    def prepared(groups):
        return PreparedWeights(seen((2, 1)), groups)

    calls = [
        ((seen((4, 2)), seen((2, 1))), 1), ((seen((4, 2)), prepared(1)), 1), ((seen((4, 2)), prepared(2)), 1),
        ((seen((4, 2), "float16"), seen((2, 1))), 1), ((seen((4, 3)), seen((2, 1))), 1), ((seen((4, 2)), seen((2, 1))), 2),
    ]  # fmt: skip
    first = [remembered.remembered(problem, *call) for call in calls]
    assert first == [1, 2, 3, 4, 5, 6]
    moved = (seen((4, 2), address=0x9000), prepared(2))
    assert [remembered.remembered(problem, *call) for call in calls] == first
    assert remembered.remembered(problem, moved, 1) == 3 and len(made) == 6


def test_little_is_remembered():
    for size in range(3, 3 + 2 * remembered.MOST):
        numdcn.bilinear_sample_forward(x, np.zeros((1, size, 2), "f"))
        assert len(remembered._known) <= remembered.MOST


def test_an_error_is_not_remembered():
    for _ in range(2):
        with pytest.raises(ValueError, match="`offsets`"):
            numdcn.deform_conv_forward(x, offsets, w, padding=1)


def test_options_of_dcnv3_and_levels():
    """Floats are remembered too, and None."""
    last, moved, mask = np.ones((1, 3, 3, 2), "f"), np.zeros((1, 3, 3, 2), "f"), np.ones((1, 3, 3, 1), "f")
    numdcn.dcnv3_forward(last, moved, mask, kernel_size=1, offset_scale=1.0, remove_center=False)
    for name, value in (("offset_scale", True), ("remove_center", 0), ("kernel_size", 1.0)):
        with pytest.raises(TypeError, match=f"`{name}`"):
            numdcn.dcnv3_forward(last, moved, mask, **{"kernel_size": 1, name: value})
    moved[...] = 1
    near, far = (numdcn.dcnv3_forward(last, moved, mask, kernel_size=1, offset_scale=s) for s in (1.0, 3.0))
    assert near.any() and not far.any()
    value, points, weights = (
        np.ones((1, 6, 1, 2), "f"),
        np.zeros((1, 1, 1, 2, 1, 2), "f"),
        np.ones((1, 1, 1, 2, 1), "f"),
    )
    numdcn.ms_deform_attn_forward(value, ((1, 2), (2, 2)), points, weights)
    for levels in ([[1, 2], [2, 2]], np.array([[1, 2], [2, 2]])):
        numdcn.ms_deform_attn_forward(value, levels, points, weights)
        with pytest.raises(ValueError, match="points_per_level"):
            numdcn.ms_deform_attn_forward(value, levels, points, weights, points_per_level=(1, 1))
    for size in (True, 1.0):
        with pytest.raises(TypeError, match="spatial_shapes"):
            numdcn.ms_deform_attn_forward(value, ((size, 2), (2, 2)), points, weights)
