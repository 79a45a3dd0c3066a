"""numdcn.adapters.torchvision: installing, uninstalling, and torchvision without its binary."""

import importlib.util
import sys
import textwrap
import threading

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
if importlib.util.find_spec("torchvision") is None:
    pytest.skip("torchvision is not installed", allow_module_level=True)

import torchvision_cases  # noqa: E402
from checks import limit, run_python  # noqa: E402
from torchvision.models import detection  # noqa: E402
from torchvision.ops import poolers  # noqa: E402
from torchvision_cases import BINARY, OPERATORS, arguments, numbers, ops  # noqa: E402

from numdcn.adapters import torchvision as adapter  # noqa: E402


@pytest.fixture(autouse=True)
def installed():
    with torchvision_cases.installed():
        yield


@pytest.fixture
def calls(monkeypatch):
    return torchvision_cases.count_calls(monkeypatch)


# Installing and uninstalling


def is_installed(calls):
    """Whether torchvision's operator runs numdcn's kernel: by its calls, and by what it does otherwise."""
    tensors, f = arguments("deform_conv2d")
    before = len(calls)
    try:
        f(*tensors)
    except RuntimeError as error:
        assert not BINARY and "install()" in str(error)
    else:
        assert BINARY or len(calls) == before + 1
    return len(calls) > before


def test_install_is_idempotent_and_reversible(calls):
    adapter.install()
    assert is_installed(calls)
    adapter.uninstall()
    assert not is_installed(calls)
    adapter.uninstall()
    assert not is_installed(calls)
    adapter.install()
    assert is_installed(calls)


def test_with_blocks(calls):
    """A block undoes what its install() did, and no more."""
    adapter.uninstall()
    with adapter.install():
        assert is_installed(calls)
        with adapter.install():
            assert is_installed(calls)
        assert is_installed(calls)
    assert not is_installed(calls)
    with pytest.raises(ZeroDivisionError), adapter.install():
        1 / 0  # noqa: B018
    assert not is_installed(calls)
    adapter.install()
    with adapter.install():
        pass
    assert is_installed(calls)


def test_uninstall_and_install_within_a_block(calls):
    adapter.uninstall()
    with adapter.install():
        adapter.uninstall()
        assert not is_installed(calls)
    assert not is_installed(calls)
    with adapter.install():
        adapter.install()
    assert is_installed(calls)


def test_a_block_may_be_entered_again(calls):
    adapter.uninstall()
    handle = adapter.install()
    for _ in range(2):
        with handle:
            assert is_installed(calls)
        assert not is_installed(calls)


def test_blocks_of_threads_may_overlap(calls):
    adapter.uninstall()
    entered, leave = threading.Event(), threading.Event()

    def hold():
        with adapter.install():
            entered.set()
            leave.wait(limit(60))

    thread = threading.Thread(target=hold)
    with adapter.install():
        thread.start()
        assert entered.wait(limit(60))
    assert is_installed(calls)
    leave.set()
    thread.join()
    assert not is_installed(calls)


def test_other_threads_see_it(calls):
    found = []
    for switch in (adapter.install, adapter.uninstall):
        switch()
        thread = threading.Thread(target=lambda: found.append(is_installed(calls)))
        thread.start()
        thread.join()
    assert found == [True, False]


@pytest.mark.parametrize("name", OPERATORS)
def test_gradients_after_uninstalling(name, calls):
    """The backward is that of the moment, whichever kernel ran the forward."""
    tensors, f = arguments(name)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    y = f(*leaves)
    grad = numbers(*y.shape, seed=9)
    expected = torch.autograd.grad(y, leaves, grad, retain_graph=True)
    adapter.uninstall()
    made = len(calls)
    if BINARY:
        for ours, theirs in zip(expected, torch.autograd.grad(y, leaves, grad, retain_graph=True)):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-4)  # rounding, as above
    else:
        with pytest.raises(RuntimeError, match=rf"_{name}_backward has no kernel.*install\(\)"):
            torch.autograd.grad(y, leaves, grad, retain_graph=True)
    assert len(calls) == made
    adapter.install()
    for first, again in zip(expected, torch.autograd.grad(y, leaves, grad)):
        assert torch.equal(first, again)


# Without torchvision's binary


def by_definition(boxes, scores, threshold):
    """Non-maximum suppression, box by box."""

    def overlap(a, b):
        width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
        common = max(width, 0) * max(height, 0)
        union = sum((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)) - common
        return common / union if union else 0

    kept = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if all(overlap(boxes[i], boxes[k]) <= threshold for k in kept):
            kept.append(i)
    return kept


@pytest.mark.parametrize("count", [0, 1, 200])
@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.5, 1.0])
def test_nms(threshold, count):
    generator = torch.Generator().manual_seed(0)
    corners = torch.randint(0, 12, (count, 2, 2), generator=generator).double().sort(1).values  # some without area
    boxes = corners.flatten(1)
    scores = torch.randint(0, 50, (count,), generator=generator).double() / 50  # with ties
    kept = adapter._nms(boxes, scores, threshold)
    assert kept.dtype == torch.int64 and kept.tolist() == by_definition(boxes.tolist(), scores.tolist(), threshold)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):  # boxes are exact; no quotient is near a threshold
        assert torch.equal(adapter._nms(boxes.to(dtype), scores, threshold), kept)
    assert torch.equal(ops.nms(boxes, scores, threshold), kept)


def test_errors_of_nms():
    with pytest.raises(RuntimeError, match="boxes should be a 2d tensor"):
        adapter._nms(torch.zeros(3, 5), torch.zeros(3), 0.5)
    with pytest.raises(RuntimeError, match="scores should be a 1d tensor"):
        adapter._nms(torch.zeros(3, 4), torch.zeros(2), 0.5)


def test_a_detector_trains(monkeypatch, calls):
    """Losses and gradients are those of torchvision's own roi_align in terms of torch's indexing."""
    torch.manual_seed(0)
    small = {"min_size": 96, "max_size": 128, "rpn_post_nms_top_n_train": 8}
    model = detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, **small).train()
    images = [torch.rand(3, 96, 128), torch.rand(3, 128, 96)]
    targets = [{"boxes": torch.tensor([[10.0, 10, 60, 70]]), "labels": torch.tensor([1])} for _ in images]
    indexed = sys.modules["torchvision.ops.roi_align"]._roi_align
    rois = lambda x, boxes, output_size, spatial_scale, sampling_ratio: indexed(  # noqa: E731
        x, ops._utils.convert_boxes_to_roi_format(boxes) if isinstance(boxes, list) else boxes, spatial_scale,
        *output_size, sampling_ratio, False,
    )  # fmt: skip
    found = []
    for function in (None, rois):
        if function:
            monkeypatch.setattr(poolers, "roi_align", function)
        torch.manual_seed(1)
        model.zero_grad()
        losses = model(images, targets)
        sum(losses.values()).backward()
        found.append([*losses.values(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        if not function:
            assert calls
    assert len(found[0]) == len(found[1]) > 50 and all(value.isfinite().all() for value in found[0])
    for one, other in zip(*found):
        assert torch.linalg.vector_norm(one - other) <= 1e-3 * torch.linalg.vector_norm(other) + 1e-6
    model.eval()
    assert {"boxes", "labels", "scores"} == set(model(images)[0])


def run(program):
    """Run a program in a process of its own, in which torchvision's binary does not load."""
    hidden = """
        import torch

        def load_library(path):
            raise OSError("hidden")

        torch.ops.load_library = load_library
        torch.set_num_threads(1)
        from numdcn.adapters import torchvision as adapter
    """
    run_python(textwrap.dedent(hidden) + textwrap.dedent(program))


def test_without_the_binary():
    """install() after an import that failed; then torchvision works, until uninstall()."""
    run("""
        def message(function, *given):
            try:
                function(*given)
            except RuntimeError as error:
                return str(error)

        def import_torchvision():
            import torchvision

        assert "torchvision::nms does not exist" in message(import_torchvision)
        adapter.install()
        import numpy as np
        import torchvision
        import numdcn
        from torchvision import ops

        x = torch.rand(1, 4, 6, 6, requires_grad=True)
        layer = ops.DeformConv2d(4, 2, 3, padding=1)
        layer(x, torch.zeros(1, 18, 6, 6)).sum().backward()
        assert torch.allclose(x.grad, torch.autograd.grad(torch.conv2d(x, layer.weight, padding=1).sum(), x)[0], atol=1e-5)
        boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 3], [2, 2, 5, 5]])
        assert ops.nms(boxes, torch.tensor([0.5, 0.9, 0.7]), 0.5).tolist() == [1, 2]
        assert torch.export.export(layer, (x, torch.zeros(1, 18, 6, 6)))
        with torch.device("meta"):
            assert ops.roi_align(torch.empty(1, 4, 6, 6), torch.empty(7, 5), 2).shape == (7, 4, 2, 2)
        assert torchvision.extension._check_cuda_version() == -1
        assert "qnms has no kernel" in message(torch.ops.torchvision.qnms, boxes, boxes[:, 0], 0.5)
        adapter.uninstall()
        for function in (lambda: layer(x, torch.zeros(1, 18, 6, 6)), lambda: ops.nms(boxes, boxes[:, 0], 0.5)):
            assert "call numdcn.adapters.torchvision.install()" in message(function)
        with adapter.install():
            assert layer(x, torch.zeros(1, 18, 6, 6)).shape == (1, 2, 6, 6)
    """)


def test_imported_without_its_operators():
    """Some programs declare nms, so that the import succeeds: then it is too late."""
    run("""
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision

        try:
            adapter.install()
        except RuntimeError as error:
            assert "before the first `import torchvision`" in str(error)
        else:
            raise AssertionError
    """)


def test_too_old_to_be_used_without_its_binary(tmp_path):
    """Before 0.28 its gradients were in the binary."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("from . import extension\n__version__ = '0.27.0'\n")
    (package / "extension.py").write_text("def _has_ops():\n    return False\n")
    run(f"""
        import sys

        sys.path.insert(0, {str(tmp_path)!r})
        for _ in range(2):
            try:
                adapter.install()
            except RuntimeError as error:
                assert "torchvision 0.27.0 has its gradients in its binary" in str(error)
            else:
                raise AssertionError
    """)
