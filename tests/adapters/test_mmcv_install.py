"""How mmcv's extension is installed: where mmcv is absent, lacks its compiled operators, or has them; then mmcv.ops itself."""

import importlib
import importlib.util
import sys

import numpy as np
import pytest

import numdcn

torch = pytest.importorskip("torch", reason="torch is not installed")
from numdcn.adapters import mmcv as adapter  # noqa: E402 - needs torch

NAME = "mmcv._ext"
COMPILED = f"""
def theirs(*tensors, **options):
    return "theirs"

nms = {" = ".join(adapter.SIGNATURES)} = theirs
"""


@pytest.fixture
def without_mmcv(monkeypatch):
    """No mmcv was imported; what the test imports is forgotten."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "mmcv"]:
        monkeypatch.delitem(sys.modules, name)
    yield
    adapter.uninstall()
    for name in [name for name in sys.modules if name.partition(".")[0] == "mmcv"]:
        del sys.modules[name]


@pytest.fixture
def fake(without_mmcv, monkeypatch, tmp_path):
    """Writes a package mmcv, with compiled operators or without, and puts it first on the path."""

    def write(compiled):
        (tmp_path / "mmcv").mkdir()
        (tmp_path / "mmcv" / "__init__.py").write_text("")
        if compiled:
            (tmp_path / "mmcv" / "_ext.py").write_text(COMPILED)
        monkeypatch.syspath_prepend(tmp_path)
        importlib.invalidate_caches()

    return write


def roi_pool(ext, device="cpu"):
    x, rois = torch.arange(4.0, device=device).reshape(1, 1, 2, 2), torch.zeros(1, 5, device=device)
    y, argmax = torch.zeros(1, 1, 1, 1, device=device), torch.zeros(1, 1, 1, 1, dtype=torch.int, device=device)
    rois[0, 1:] = 1
    return ext.roi_pool_forward(x, rois, y, argmax, pooled_height=1, pooled_width=1, spatial_scale=1.0), y


def test_without_compiled_operators(fake):
    fake(compiled=False)
    adapter.install()
    assert "mmcv" not in sys.modules
    ext = importlib.import_module(NAME)
    assert roi_pool(ext)[1].item() == 3
    assert importlib.util.find_spec(NAME).loader is not None  # by which mmcv tells
    adapter.uninstall()
    with pytest.raises(ModuleNotFoundError, match="mmcv._ext"):
        importlib.import_module(NAME)


def test_what_was_imported_meanwhile_works_again_after_another_install(fake):
    fake(compiled=False)
    adapter.install()
    ext = importlib.import_module(NAME)
    adapter.uninstall()
    with pytest.raises(NotImplementedError, match=r"roi_pool_forward .* call numdcn\.adapters\.mmcv\.install\(\)"):
        roi_pool(ext)
    adapter.install()
    assert importlib.import_module(NAME) is ext and roi_pool(ext)[1].item() == 3


def test_twice_is_once(fake):
    fake(compiled=False)
    with adapter.install():
        with adapter.install():
            pass
        assert NAME in sys.modules  # of the outer one
        adapter.install()
    assert NAME not in sys.modules
    adapter.uninstall()
    assert NAME not in sys.modules


def test_compiled_operators_stay_unless_asked(fake):
    fake(compiled=True)
    with pytest.raises(RuntimeError, match=r"has its compiled operators; install\(replace=True\)"):
        adapter.install()
    ext = importlib.import_module(NAME)
    assert roi_pool(ext)[0] == "theirs"
    with pytest.raises(RuntimeError, match="has its compiled operators"):  # now that they are imported, too
        adapter.install()


def test_replaced_operators(fake):
    """On the CPU; anything else is still the compiled ones' work."""
    fake(compiled=True)
    ext = importlib.import_module(NAME)
    before = dict(vars(ext))
    with adapter.install(replace=True):
        assert importlib.import_module(NAME) is ext
        result, y = roi_pool(ext)
        assert result is None and y.item() == 3
        assert roi_pool(ext, "meta")[0] == "theirs"
        assert ext.roi_align_forward(torch.zeros(1), pool_mode=0) == "theirs"
        assert ext.nms is before["nms"]
    assert vars(ext) == before


def test_without_mmcv(without_mmcv, monkeypatch):
    """The functions can be called all the same."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with adapter.install():
        assert roi_pool(importlib.import_module(NAME))[1].item() == 3


# mmcv itself.


@pytest.fixture(scope="module")
def ops():
    """mmcv.ops with numdcn's operators."""
    pytest.importorskip("mmcv", reason="mmcv is not installed")
    with adapter.install(replace=True):
        yield importlib.import_module("mmcv.ops")


def layer(kind, **more):
    torch.manual_seed(0)
    made = kind(4, 6, 3, padding=1, deform_groups=2, **more).double()
    torch.nn.init.normal_(made.conv_offset.weight, std=0.1)
    return made


@pytest.mark.parametrize("name", ["DeformConv2dPack", "ModulatedDeformConv2dPack"])
def test_layers_of_mmcv(ops, name):
    """The layer is deform_conv_layer, with its gradients."""
    made = layer(getattr(ops, name))
    x = torch.randn(2, 4, 6, 7, dtype=torch.float64, requires_grad=True)
    y = made(x)
    grad_y = torch.randn_like(y)
    y.backward(grad_y)
    bias = made.bias.detach().numpy() if name == "ModulatedDeformConv2dPack" else None  # the other has none
    arrays = [p.detach().numpy() for p in (x, made.weight, made.conv_offset.weight, made.conv_offset.bias)]
    more = {"padding": 1, "modulated": name == "ModulatedDeformConv2dPack"}
    wanted = numdcn.deform_conv_layer_forward(*arrays, bias, **more)
    np.testing.assert_allclose(y.detach(), wanted.y, rtol=1e-10, atol=1e-10)
    g = numdcn.deform_conv_layer_backward(grad_y.numpy(), *arrays, bias, **more)
    for got, value in (
        (x.grad, g.x),
        (made.weight.grad, g.w),
        (made.conv_offset.weight.grad, g.offset_w),
        (made.conv_offset.bias.grad, g.offset_b),
    ):
        np.testing.assert_allclose(got, value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["roi_align", "roi_pool", "deform_roi_pool"])
def test_boxes_of_mmcv(ops, name):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor([[0, 0.5, 1, 5.2, 4.3], [1, 2.1, 0.3, 6.2, 5.4]], dtype=torch.float64)
    offsets = torch.rand(2, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    given = (x, rois, offsets, 2) if name == "deform_roi_pool" else (x, rois, 2)
    assert torch.autograd.gradcheck(getattr(ops, name), given)


def test_autocast(ops):
    """mmcv converts all to the type of the offsets; numdcn computes in float32 and rounds once."""
    made = layer(ops.ModulatedDeformConv2dPack).float()
    x = torch.randn(1, 4, 6, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = made(x)
        z = made.conv_offset(x)
        mask = torch.sigmoid(z[:, 36:])
    x, offsets, w, bias, mask = (
        t.detach().bfloat16().float().numpy() for t in (x, z[:, :36], made.weight, made.bias, mask)
    )
    wanted = numdcn.deform_conv_forward(x, offsets, w, bias, mask=mask, padding=1)
    assert torch.equal(y, torch.from_numpy(wanted).bfloat16())
    y.float().sum().backward()
    assert made.weight.grad.dtype == torch.float32 and made.weight.grad.any()


def test_operators_of_mmcv_that_numdcn_does_not_have(ops):
    if sys.modules[NAME] is not adapter.EXTENSION:
        pytest.skip("this mmcv has its compiled operators")
    with pytest.raises(NotImplementedError, match="^nms of mmcv is not available"):
        ops.nms(torch.rand(3, 4), torch.rand(3), 0.5)
    assert "numdcn" in ops.get_compiler_version() and ops.get_compiling_cuda_version() == "not available"
