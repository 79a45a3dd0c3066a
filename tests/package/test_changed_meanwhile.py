"""Another thread may write to an argument during a call: what was checked is what is used, and nothing crashes."""

import numpy as np
import pytest
import scribbles
from checks import assert_same_bits, run_python
from family import outputs

import numdcn
from numdcn import _run
from numdcn._call import results

BOXES = ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_roi_pool", "deform_ps_roi_pool")


SCRIBBLED = [
    *[(operator, "rois") for operator in BOXES],
    *[("roi_pool", "argmax"), ("deform_roi_pool", "offsets"), ("deform_ps_roi_pool", "trans")],
    ("deform_conv", "offsets"),
    ("dcnv3", "offsets"),
]


@pytest.mark.parametrize(
    "operator, name",
    [("bilinear_sample", "points"), *(pytest.param(*pair, marks=pytest.mark.full) for pair in SCRIBBLED)],
)
def test_a_thread_that_scribbles(operator, name):
    assert "no crash" in run_python(["-m", "scribbles"], operator, name).stdout


@pytest.fixture
def meanwhile(monkeypatch):
    """Calls a function between the checks of a call's arguments and their use, when memory for results is allocated."""
    new_output, happens = results.new_output, []

    def hooked(*arguments):
        for action in happens:
            action()
        return new_output(*arguments)

    for module in (_run, results):  # forwards, and backwards
        monkeypatch.setattr(module, "new_output", hooked)
    return happens


def both_ways(operator, arrays, more):
    """The results of forward and backward, as {name: array}; gradients of everything that has one."""
    y = getattr(numdcn, f"{operator}_forward")(*arrays.values(), **more)
    g = getattr(numdcn, f"{operator}_backward")(np.ones_like(y), *arrays.values(), **more)
    return {"y": y, **outputs(g)}


@pytest.mark.parametrize("operator", BOXES)
def test_the_boxes_that_were_checked_are_those_that_are_used(operator, meanwhile):
    arrays, more = scribbles.arguments(operator)
    right, rois = both_ways(operator, arrays, more), arrays["rois"].copy()

    def scribble():
        arrays["rois"][:, 0] = 1 - rois[:, 0]  # boxes in the other image, and elsewhere in it
        arrays["rois"][:, 1:] = rois[:, 4:0:-1]

    meanwhile.append(scribble)
    for way, names in (("forward", ("y",)), ("backward", tuple(right)[1:])):
        arrays["rois"][...] = rois
        call = getattr(numdcn, f"{operator}_{way}")
        result = call(*([np.ones_like(right["y"])] if way == "backward" else []), *arrays.values(), **more)
        assert (arrays["rois"] != rois).any(), "nothing was changed meanwhile"
        for name, array in outputs(result).items():
            assert name in names
            assert_same_bits(array, right[name], name)


@pytest.mark.parametrize("operator", [*BOXES, "bilinear_sample", "deform_conv", "dcnv3"])
def test_shapes_that_are_changed_in_place(operator, meanwhile):
    """The sizes that were checked hold for the memory that is read, whatever happens to the caller's arrays."""
    arrays, more = scribbles.arguments(operator)
    right, shapes = both_ways(operator, arrays, more), {name: array.shape for name, array in arrays.items()}

    def flatten():
        for array in arrays.values():
            array.shape = (array.size,)

    def restored():
        for name, array in arrays.items():
            array.shape = shapes[name]
        return arrays.values()

    meanwhile.append(flatten)
    y = getattr(numdcn, f"{operator}_forward")(*restored(), **more)
    assert_same_bits(y, right["y"], "y")
    g = getattr(numdcn, f"{operator}_backward")(np.ones_like(y), *restored(), **more)
    for name, array in outputs(g).items():
        assert_same_bits(array, right[name], name)


class Clearing:
    """A number that empties lists when it is read."""

    def __init__(self, number, *lists):
        self.number, self.lists = number, lists

    def __index__(self):
        for one in self.lists:
            one.clear()
        return self.number


def test_lists_that_are_changed_in_place():
    """A list of sizes is read once, whatever happens to it while its numbers are read."""
    x, w = np.ones((1, 1, 5, 5), np.float32), np.ones((1, 1, 1, 1), np.float32)
    stride, before, after = [], [], []
    stride += [Clearing(2, stride), 1]
    assert_same_bits(numdcn.conv_forward(x, w, stride=stride), numdcn.conv_forward(x, w, stride=(2, 1)))
    before += [Clearing(1, before, after), 2]
    after += [3, 0]
    want = numdcn.conv_forward(x, w, padding=((1, 2), (3, 0)))
    assert_same_bits(numdcn.conv_forward(x, w, padding=[before, after]), want)
