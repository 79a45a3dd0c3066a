"""numdcn.adapters.torch under numdcn's own names: a function for each operator that torch has not, and the layer."""

import copy
import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch_cases import NAMES, case, plain, same, tensors  # noqa: E402

import numdcn  # noqa: E402
import numdcn.adapters.torch as adapter  # noqa: E402
from numdcn.adapters import _operators  # noqa: E402
from numdcn.adapters.torch._registered import REGISTERED  # noqa: E402


def test_every_operator_has_a_function():
    own = {name for name in NAMES if hasattr(adapter, name)}
    torchs = {"conv": torch.nn.functional.conv2d, "deform_conv": adapter.deform_conv2d}
    assert own | set(torchs) == set(NAMES) == set(_operators.NAMES)
    assert own <= set(adapter.__all__)


def test_a_new_operator_needs_no_line(monkeypatch):
    """It is registered, and has a function, as soon as it has a name."""
    from numdcn.adapters.torch._functions import function_of
    from numdcn.adapters.torch._registered import Registered

    newer = _operators.operator("bilinear_sample")._replace(name="newer_sample")
    monkeypatch.setitem(REGISTERED, "newer_sample", Registered(newer))
    (x, points), _ = case("bilinear_sample")
    y = function_of(REGISTERED["newer_sample"])(torch.from_numpy(x), points=torch.from_numpy(points))
    same(y, numdcn.bilinear_sample_forward(x, points))


@pytest.mark.parametrize("name", [name for name in NAMES if name in adapter.__all__ and "roi_" not in name[:7]])
def test_functions_take_numdcns_arguments(name):
    operator = _operators.operator(name)
    arrays, options = case(name, np.float32)
    y, *_ = plain(name, arrays, options)
    given = dict(zip(operator.names, tensors(arrays)))
    called = getattr(adapter, name)
    same(called(**given, **options), y)
    same(called(given.pop(operator.names[0]), **given, **options), y)
    text = called.__doc__
    assert all(f"\n    {key}: " in text for key in (*operator.names, *options))
    with pytest.raises(TypeError, match="missing a required argument: '"):
        called(torch.ones(1, 1, 2, 2))
    with pytest.raises(TypeError, match=f"`nonsense` is not an argument of {name}"):
        called(*tensors(arrays), **options, nonsense=1)
    with pytest.raises(TypeError, match="by position|multiple values"):
        called(*tensors(arrays), *[1] * 20)


def test_a_function_without_tensors_says_so():
    with pytest.raises((TypeError, RuntimeError), match=r"Tensor"):
        adapter.bilinear_sample(np.ones((1, 1, 2, 2)), torch.ones(1, 1, 2))


@pytest.mark.parametrize("modulated", [False, True])
def test_the_layer(modulated):
    torch.manual_seed(0)
    layer = adapter.DeformConvLayer(
        4, 6, (3, 2), 2, (1, 0), groups=2, offset_groups=2, modulated=modulated, mask_scale=2
    )
    predicted = (3 if modulated else 2) * 2 * 6
    shapes = {key: tuple(value.shape) for key, value in layer.state_dict().items()}
    assert shapes == {
        "weight": (6, 2, 3, 2), "bias": (6,), "offset_weight": (predicted, 4, 3, 2), "offset_bias": (predicted,),
    }  # fmt: skip
    w, offset_w, offset_b, bias = numdcn.deform_conv_layer_init(
        4, 6, (3, 2), groups=2, offset_groups=2, modulated=modulated, seed=0
    )
    assert shapes == {
        "weight": w.shape,
        "bias": bias.shape,
        "offset_weight": offset_w.shape,
        "offset_bias": offset_b.shape,
    }
    assert not layer.offset_weight.any() and not layer.offset_bias.any()
    for parameter in (layer.weight, layer.bias):
        bound = (2 * 3 * 2) ** -0.5
        assert 0.5 * bound < parameter.abs().max() <= bound and parameter.min() < 0 < parameter.max()
    x = torch.randn(2, 4, 7, 6)
    torch.testing.assert_close(
        layer(x), torch.nn.functional.conv2d(x, layer.weight, layer.bias, 2, (1, 0), groups=2), rtol=1e-5, atol=1e-5
    )  # offsets 0, and a mask of 2*sigmoid(0) = 1
    with torch.no_grad():
        layer.offset_weight.normal_(std=0.1)
    y = layer(x)
    p = {key: value.detach().numpy() for key, value in layer.named_parameters()}
    same(
        y,
        numdcn.deform_conv_layer_forward(
            x.numpy(), p["weight"], p["offset_weight"], p["offset_bias"], p["bias"], modulated=modulated, mask_scale=2,
            stride=2, padding=(1, 0),
        ).y,
    )  # fmt: skip
    y.sum().backward()
    assert all(parameter.grad.any() for parameter in layer.parameters())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.jit.script(layer)):
        assert torch.equal(other(x), y)
    assert repr(layer).startswith("DeformConvLayer(4, 6, kernel_size=(3, 2), stride=(2, 2), padding=(1, 0), groups=2, ")


def test_what_the_layer_refuses():
    for arguments, more, words in (
        ((3, 4, 3), {"groups": 2}, "in_channels must be divisible by groups"),
        ((4, 3, 3), {"groups": 2}, "out_channels must be divisible by groups"),
        ((4, 4, 3), {"offset_groups": 3}, "in_channels must be divisible by offset_groups"),
        ((4, 4, 3), {"mask_scale": 3}, "mask_scale must be 1 or 2"),
    ):
        with pytest.raises(ValueError, match=words):
            adapter.DeformConvLayer(*arguments, **more)
    assert adapter.DeformConvLayer(2, 2, 1, bias=False).bias is None
