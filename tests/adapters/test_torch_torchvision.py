"""numdcn.adapters.torch has torchvision's functions and modules: arguments, parameters, lists of boxes, errors."""

import copy
import inspect
import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import numdcn  # noqa: E402
import numdcn.adapters.torch as adapter  # noqa: E402

POOLS = {
    "roi_align": (adapter.RoIAlign, {"sampling_ratio": 2, "aligned": True}),
    "roi_pool": (adapter.RoIPool, {}),
    "ps_roi_align": (adapter.PSRoIAlign, {"sampling_ratio": 2}),
    "ps_roi_pool": (adapter.PSRoIPool, {}),
}
PARAMETERS = {  # torchvision's, in order, with the defaults
    "deform_conv2d": "input offset weight bias=None stride=(1, 1) padding=(0, 0) dilation=(1, 1) mask=None",
    "roi_align": "input boxes output_size spatial_scale=1.0 sampling_ratio=-1 aligned=False",
    "roi_pool": "input boxes output_size spatial_scale=1.0",
    "ps_roi_align": "input boxes output_size spatial_scale=1.0 sampling_ratio=-1",
    "ps_roi_pool": "input boxes output_size spatial_scale=1.0",
    "DeformConv2d": "in_channels out_channels kernel_size stride=1 padding=0 dilation=1 groups=1 bias=True",
    "RoIAlign": "output_size spatial_scale sampling_ratio aligned=False",
    "RoIPool": "output_size spatial_scale",
    "PSRoIAlign": "output_size spatial_scale sampling_ratio",
    "PSRoIPool": "output_size spatial_scale",
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_arguments(name):
    given = []
    for parameter in inspect.signature(getattr(adapter, name)).parameters.values():
        assert parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        given.append(parameter.name + (f"={parameter.default}" if parameter.default is not parameter.empty else ""))
    assert " ".join(given) == PARAMETERS[name]


@pytest.mark.parametrize("masked", [False, True])
def test_deform_conv2d(masked):
    rng = np.random.default_rng(0)
    x, w, bias = (rng.standard_normal(shape, dtype=np.float32) for shape in ((2, 4, 6, 7), (6, 2, 3, 2), (6,)))
    offset, mask = rng.standard_normal((2, 24, 4, 7), dtype=np.float32), rng.random((2, 12, 4, 7), dtype=np.float32)
    expected = numdcn.deform_conv_forward(
        x, offset, w, bias, mask=mask if masked else None, stride=(2, 1), padding=(2, 1), dilation=(1, 2)
    )
    tx, to, tw, tb, tm = map(torch.from_numpy, (x, offset, w, bias, mask))
    geometry = {"stride": (2, 1), "padding": (2, 1), "dilation": (1, 2)}
    y = adapter.deform_conv2d(tx, to, tw, tb, **geometry, mask=tm if masked else None)
    assert np.array_equal(y, expected)
    module = adapter.DeformConv2d(4, 6, (3, 2), **geometry, groups=2)
    module.load_state_dict({"weight": tw, "bias": tb})
    for same in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(same(tx, to, tm if masked else None), y)
        assert all(isinstance(p, torch.nn.Parameter) for p in same.parameters())


def test_the_convolutions_parameters():
    torch.manual_seed(0)
    module = adapter.DeformConv2d(32, 64, 3, groups=2)
    assert {key: tuple(p.shape) for key, p in module.state_dict().items()} == {"weight": (64, 16, 3, 3), "bias": (64,)}
    bound = (16 * 9) ** -0.5
    for parameter in module.parameters():
        assert 0.9 * bound < parameter.abs().max() <= bound  # of 64 numbers or more; all below 0.9: 0.1 % or less
        assert abs(parameter.mean()) < 0.3 * bound
    assert adapter.DeformConv2d(2, 2, 1, bias=False).bias is None
    with pytest.raises(ValueError, match="in_channels must be divisible by groups"):
        adapter.DeformConv2d(3, 4, 3, groups=2)
    with pytest.raises(ValueError, match="out_channels must be divisible by groups"):
        adapter.DeformConv2d(4, 3, 3, groups=2)


def test_reprs():
    assert repr(adapter.DeformConv2d(2, 4, 3)) == "DeformConv2d(2, 4, kernel_size=(3, 3), stride=(1, 1))"
    assert repr(adapter.DeformConv2d(2, 4, (3, 1), 2, 1, 3, 2, bias=False)) == (
        "DeformConv2d(2, 4, kernel_size=(3, 1), stride=(2, 2), padding=(1, 1), dilation=(3, 3), groups=2, bias=False)"
    )
    assert repr(adapter.RoIAlign((2, 3), 0.5, 2, True)) == (
        "RoIAlign(output_size=(2, 3), spatial_scale=0.5, sampling_ratio=2, aligned=True)"
    )
    assert repr(adapter.RoIPool(2, 0.5)) == "RoIPool(output_size=2, spatial_scale=0.5)"
    assert repr(adapter.PSRoIAlign(2, 0.5, 1)) == "PSRoIAlign(output_size=2, spatial_scale=0.5, sampling_ratio=1)"
    assert repr(adapter.PSRoIPool(2, 0.5)) == "PSRoIPool(output_size=2, spatial_scale=0.5)"


@pytest.mark.parametrize("name", POOLS)
def test_pools(name):
    """Boxes in one tensor, or in a list with those of each image, one of which has none."""
    kind, more = POOLS[name]
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 8, 7, 6), dtype=np.float32)
    rois = np.float32([[0, 0.5, 1, 8, 9], [0, 3, 1, 6, 5], [2, 1, 2, 9, 9]])
    expected = getattr(numdcn, f"{name}_forward")(x, rois, (2, 2), 0.5, **more)
    lists = [torch.from_numpy(rois[rois[:, 0] == n, 1:]) for n in range(3)]
    for boxes in (torch.from_numpy(rois), lists, tuple(lists)):
        for size in ((2, 2), [2, 2], 2):
            assert np.array_equal(getattr(adapter, name)(torch.from_numpy(x), boxes, size, 0.5, **more), expected)
        module = kind(2, 0.5, **more)
        for same in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert np.array_equal(same(torch.from_numpy(x), boxes), expected)
    none = getattr(adapter, name)(torch.from_numpy(x), [torch.empty(0, 4)] * 3, 2)
    assert none.shape == (0, expected.shape[1], 2, 2)


@pytest.mark.parametrize("name", POOLS)
def test_what_is_wrong_with_boxes(name):
    pool, x = getattr(adapter, name), torch.ones(2, 4, 5, 5)
    for boxes, words in (
        (torch.ones(2, 4), r"not correct as Tensor\[K, 5\]"),
        ([torch.ones(2, 5), torch.ones(1, 5)], r"not correct as List\[Tensor\[L, 4\]\]"),
        (3, r"expected to be a Tensor\[L, 5\] or a List\[Tensor\[K, 4\]\]"),
    ):
        with pytest.raises(AssertionError, match=words):
            pool(x, boxes, 2)
    with pytest.raises(RuntimeError, match="`boxes` has batch index 2"):
        pool(x, torch.tensor([[2.0, 0, 0, 1, 1]]), 2)
    with pytest.raises(RuntimeError, match="`boxes` has dtype float64 but `input` has float32"):
        pool(x, torch.ones(1, 5).double(), 2)
    with pytest.raises(RuntimeError, match=r"`output_size\[0\]` is 0"):
        pool(x, torch.ones(1, 5), (0, 2))


def test_what_is_wrong_with_a_convolution():
    """The beginnings are torchvision's; the rest is numdcn's, with torchvision's names of arguments."""
    x, w = torch.ones(1, 2, 5, 5), torch.ones(3, 2, 3, 3)
    offset, mask = torch.ones(1, 18, 3, 3), torch.ones(1, 9, 3, 3)
    for arguments, words in (
        (
            (x, offset[:, :17], w),
            r"^the shape of the offset tensor at dimension 1 is not valid: `offset` has 17 channels",
        ),
        ((x, offset[:, :0], w), r"^the shape of the offset tensor at dimension 1 is not valid"),
        ((x, offset, w, None, 1, 0, 1, mask[:, :8]), r"^mask.shape\[1\] is not valid: got: 8 expected: 9: `mask` has"),
        ((x, offset[:, :, :2], w), r"^`offset` has shape \(1, 18, 2, 3\), expected \(1, 18, 3, 3\)"),
        ((x, offset, w.double()), r"^`weight` has dtype float64 but `input` has float32"),
        ((x[0], offset, w), r"^`input` has shape \(2, 5, 5\)"),
        ((x, offset, w, None, 0), r"^`stride\[0\]` is 0|^`stride` is 0"),
    ):
        with pytest.raises(RuntimeError, match=words):
            adapter.deform_conv2d(*arguments)
        with pytest.raises(RuntimeError, match=words):
            adapter.deform_conv2d(arguments[0].clone().requires_grad_(), *arguments[1:])


def test_the_values_are_torchvisions():
    """Where its operators are installed; gradients too."""
    ops = pytest.importorskip("torchvision.ops", reason="torchvision is not installed", exc_type=Exception)
    try:  # they may be declared, without kernels, where numdcn.adapters.torchvision was in use
        ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except (AttributeError, RuntimeError):
        pytest.skip("torchvision's operators cannot be loaded")
    torch.manual_seed(0)
    x, rois = (
        torch.randn(2, 8, 9, 9, dtype=torch.float64),
        torch.tensor([[0, 0.2, 1.3, 8.1, 7.4], [1, 2, 3, 5, 8]]).double(),
    )
    offset, mask = torch.randn(2, 36, 9, 9).double(), torch.rand(2, 18, 9, 9).double()
    w, bias = torch.randn(4, 4, 3, 3).double(), torch.randn(4).double()
    calls = [
        (getattr(adapter, name), getattr(ops, name), (x, rois, (2, 2), 0.7)) for name in POOLS if name != "ps_roi_pool"
    ]
    calls.append((adapter.deform_conv2d, ops.deform_conv2d, (x, offset, w, bias, (1, 1), (1, 1), (1, 1), mask)))
    for own, other, arguments in calls:
        results = []
        for call in (own, other):
            given = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
            wanted = [
                a.requires_grad_() for a in given if (isinstance(a, torch.Tensor) and a is not given[1]) or a is offset
            ]
            y = call(*given)
            results.append((y, *torch.autograd.grad((y**2).sum(), wanted)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)  # float64: sums of a few hundred terms below 100
