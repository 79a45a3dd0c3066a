"""numdcn.adapters.torch in what torch.export, torch.fx and TorchScript make of a program."""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402
from torch_cases import function, leaves  # noqa: E402

import numdcn.adapters.torch as adapter  # noqa: E402
from numdcn.adapters.torch._registered import REGISTERED  # noqa: E402


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = adapter.DeformConvLayer(3, 4, 3, padding=1, modulated=True)
        self.conv = adapter.DeformConv2d(4, 4, 3, padding=1)
        self.pool = adapter.RoIAlign(2, 1.0, 2, True)

    def forward(self, x, offset, boxes):
        x = self.layer(x)
        x = self.conv(x, offset)
        return self.pool(x, boxes)


NET = torch.randn(2, 3, 6, 6), torch.randn(2, 18, 6, 6), torch.tensor([[0, 1.0, 1, 4, 5], [1, 0, 2, 5, 4]])


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    net, batch = Net().eval(), torch.export.Dim("batch", min=2, max=64)
    boxes = torch.export.Dim("boxes", min=1, max=64)
    program = torch.export.export(net, NET, dynamic_shapes=({0: batch}, {0: batch}, {0: boxes}), strict=strict)
    targets = {str(node.target) for node in program.graph.nodes}
    assert {"numdcn.deform_conv_layer.default", "numdcn.deform_conv.default", "numdcn.roi_align.default"} <= targets
    x, offset, rois = NET
    for given in (NET, (torch.cat([x, x]), torch.cat([offset, offset]), rois[:1])):
        assert torch.equal(program.module()(*given), net(*given))


def test_make_fx():
    given, _, options = leaves("roi_pool")
    call = function("roi_pool", options)
    x, rois = (t.detach() for t in given)
    graph = make_fx(torch.func.grad(lambda x: call(x, rois).sum()))(x)
    assert any(node.target is REGISTERED["roi_pool"].backward for node in graph.graph.nodes)
    assert torch.equal(graph(2 * x), torch.func.grad(lambda x: call(x, rois).sum())(2 * x))


def test_symbolic_trace():
    """Modules, and functions wherever they are called from."""
    net = Net().eval()
    assert torch.equal(torch.fx.symbolic_trace(net)(*NET), net(*NET))
    x, offset, rois = NET
    programs = [
        (lambda x, r: adapter.roi_align(x, r, 2, 0.5, 2, True), (x, rois)),
        (lambda x, r: adapter.roi_align(x, [r[:1, 1:], r[1:, 1:]], output_size=2), (x, rois)),
        (lambda x, r: adapter.roi_pool(x, r, 2), (x, rois)),
        (lambda x, r: adapter.ps_roi_align(x, r, 1, sampling_ratio=2), (x, rois)),
        (lambda x, r: adapter.ps_roi_pool(x, r, (1, 1)), (x, rois)),
        (lambda x, p: adapter.bilinear_sample(x, points=p), (x, torch.rand(2, 5, 2))),
        (lambda x, o: adapter.deform_conv2d(x, o, x[:1, :, :3, :3], padding=(1, 1), mask=o[:, :9]), (x, offset)),
    ]
    for program, given in programs:
        assert torch.equal(torch.fx.symbolic_trace(program)(*given), program(*given))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript(tmp_path):
    net = Net().eval()
    for scripted in (torch.jit.script(net), torch.jit.trace(net, NET)):
        assert torch.equal(scripted(*NET), net(*NET))
        scripted.save(str(tmp_path / "net.pt"))
        assert torch.equal(torch.jit.load(str(tmp_path / "net.pt"))(*NET), net(*NET))
    x, offset, rois = NET
    boxes = [rois[:1, 1:], rois[1:, 1:]]
    for pool, more in (
        (adapter.roi_align, (2, 0.5, 2, True)),
        (adapter.roi_pool, ([2, 1], 0.5)),
        (adapter.ps_roi_align, (1, 0.5, 2)),
        (adapter.ps_roi_pool, (1, 0.5)),
    ):
        scripted = torch.jit.script(pool)
        for given in (rois, boxes):
            source = x.clone().requires_grad_()
            y, result = pool(source, given, *more), scripted(source, given, *more)
            assert torch.equal(y, result)
            assert torch.equal(*(torch.autograd.grad(t.sum(), source)[0] for t in (y, result)))
    scripted = torch.jit.script(adapter.deform_conv2d)
    w, mask = torch.randn(2, 3, 3, 3), torch.rand(2, 9, 3, 6)
    assert torch.equal(
        scripted(x, offset[:, :, :3], w, stride=(2, 1), padding=(1, 1), mask=mask),
        adapter.deform_conv2d(x, offset[:, :, :3], w, stride=(2, 1), padding=1, mask=mask),
    )
