"""What numdcn is compared with on a GPU: torchvision's operators, torch's grid_sample and compositions of it, the kernel
that transformers runs, and cuDNN's plain convolution as the floor.

Each is built from a problem's arguments as torch tensors; results have numdcn's names. Autograd is used only where there
is no other backward, that of compositions; their graph is recorded in the first call.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.cases.weighted import TorchOperations
from benchmarks.gpu.problems import CASES, Arrays, case_of


class Rival(NamedTuple):
    """Calls without arguments; backward is None if there is none."""

    name: str
    forward: Callable[[], dict[str, Any]]
    backward: Callable[[], dict[str, Any]] | None


def torchvision_ops(torch: Any) -> Any:
    """torchvision's compiled operators; None if absent."""
    if torch is None or importlib.util.find_spec("torchvision") is None:
        return None
    try:
        import torchvision

        return torch.ops.torchvision if torchvision.extension._has_ops() else None
    except (ImportError, RuntimeError, AttributeError, OSError):  # built for another torch
        return None


def rivals(torch: Any, operator: str, arrays: Arrays, keywords: dict[str, Any], grad_y: Any) -> list[Rival]:
    """The installed rivals of an operator."""
    if torch is None:
        return []
    if operator == "bilinear_sample":
        return [_grid_sample(torch, arrays, grad_y)]
    if operator == "conv":
        return [plain_convolution(torch, arrays, keywords, grad_y, last=False)]
    if operator in CASES:
        return _weighted(torch, operator, arrays, keywords, grad_y)
    ops = torchvision_ops(torch)
    if ops is None:
        return []
    if operator == "deform_conv":
        return [_deform_conv(torch, ops, arrays, keywords, grad_y)]
    return _boxes(ops, operator, arrays, keywords, grad_y)


def pair(value: Any) -> list[int]:
    return list(value) if isinstance(value, tuple) else [value, value]


def _geometry(keywords: dict[str, Any]) -> tuple[list[int], ...]:
    return tuple(
        pair(keywords.get(name, default)) for name, default in (("stride", 1), ("padding", 0), ("dilation", 1))
    )


def _deform_conv(torch: Any, ops: Any, arrays: Arrays, keywords: dict[str, Any], grad_y: Any) -> Rival:
    x, w, offsets, mask = (arrays[name] for name in ("x", "w", "offsets", "mask"))
    masked, bias = mask is not None, arrays.get("bias")
    mask = mask if masked else x.new_zeros(len(x), 1)
    bias = x.new_zeros(len(w)) if bias is None else bias
    groups, offset_groups = x.shape[1] // w.shape[1], offsets.shape[1] // (2 * w.shape[2] * w.shape[3])
    parameters = [number for two in _geometry(keywords) for number in two]
    rest = (x, w, offsets, mask, bias, *parameters, groups, offset_groups, masked)

    def backward() -> dict[str, Any]:
        names = ("x", "w", "offsets", "mask", "bias")
        grads = dict(zip(names, ops._deform_conv2d_backward(grad_y, *rest), strict=True))
        return {name: grad for name, grad in grads.items() if arrays.get(name) is not None}

    return Rival("torchvision", lambda: {"y": ops.deform_conv2d(*rest)}, backward)


def plain_convolution(torch: Any, arrays: Arrays, keywords: dict[str, Any], grad_y: Any, last: bool = True) -> Rival:
    """cuDNN's convolution of the same layer, channels-last if `last`."""
    memory = torch.channels_last if last else torch.contiguous_format
    x, w, grad = (a.contiguous(memory_format=memory) for a in (arrays["x"], arrays["w"], grad_y))
    stride, padding, dilation = _geometry(keywords)
    groups, bias = x.shape[1] // w.shape[1], None if last else arrays.get("bias")

    def backward() -> dict[str, Any]:
        mask = [True, True, bias is not None]
        grads = torch.ops.aten.convolution_backward(
            grad, x, w, None if bias is None else [len(w)], stride, padding, dilation, False, [0, 0], groups, mask
        )
        return {name: g for name, g in zip(("x", "w", "bias"), grads, strict=True) if g is not None}

    def forward() -> dict[str, Any]:
        return {"y": torch.conv2d(x, w, bias, stride, padding, dilation, groups)}

    return Rival("cuDNN conv", forward, backward)


def _grid_sample(torch: Any, arrays: Arrays, grad_y: Any) -> Rival:
    """grid_sample on points converted to a grid beforehand; its gradient of the grid as that of the points."""
    x = arrays["x"]
    size = x.new_tensor([x.shape[3], x.shape[2]])
    grid = ((2 * arrays["points"].flip(-1) + 1) / size - 1)[:, :, None]
    grad = None if grad_y is None else grad_y[..., None].contiguous()
    shape = (*x.shape[:2], arrays["points"].shape[1])

    def forward() -> dict[str, Any]:
        return {"y": torch.ops.aten.grid_sampler_2d(x, grid, 0, 0, False).reshape(shape)}

    def backward() -> dict[str, Any]:
        g = torch.ops.aten.grid_sampler_2d_backward(grad, x, grid, 0, 0, False, [True, True])
        return {"x": g[0], "grid": g[1]}

    return Rival("grid_sample", forward, backward)


def _weighted(torch: Any, operator: str, arrays: Arrays, keywords: dict[str, Any], grad_y: Any) -> list[Rival]:
    """The composition of grid_sample, and of attention on a GPU the compiled kernel. None for what they cannot
    compute: unequal points, strides."""
    case = case_of(operator, arrays, keywords)
    if case is None:
        return []
    found = [composition(torch, case, [arrays[name] for name in case.differentiable], grad_y)]
    module = attention_module() if operator == "ms_deform_attn" and arrays["value"].is_cuda else None
    return found if module is None else [*found, compiled_attention(torch, module, arrays, case.layout.levels, grad_y)]


def composition(torch: Any, case: Any, given: list[Any], grad_y: Any) -> Rival:
    """The composition of a case of the CPU's benchmark, in the type of its first array and where that is."""
    ops, recorded = TorchOperations(torch, given[0]), []  # type: ignore[var-annotated]

    def backward() -> dict[str, Any]:
        if not recorded:
            with torch.enable_grad():
                leaves = [a.detach().requires_grad_() for a in given]
                recorded.extend((case.compose(ops, *leaves), leaves))
        y, leaves = recorded
        return dict(zip(case.differentiable, torch.autograd.grad(y, leaves, grad_y, retain_graph=True), strict=True))

    return Rival("grid_sample", lambda: {"y": case.compose(ops, *given)}, backward)


@functools.cache
def attention_module() -> Any:
    """The compiled kernel of Deformable DETR: built from its sources, or the one that transformers runs, which the package
    `kernels` downloads; None if there is neither."""
    if importlib.util.find_spec("MultiScaleDeformableAttention") is not None:
        return importlib.import_module("MultiScaleDeformableAttention")
    if importlib.util.find_spec("kernels") is None:
        return None
    try:
        from kernels import get_kernel  # type: ignore[import-not-found]

        return get_kernel("kernels-community/deformable-detr", version=1)
    except Exception:  # no network, no build for this torch, another version of the package
        return None


def compiled_attention(
    torch: Any, module: Any, arrays: Arrays, levels: tuple[tuple[int, int], ...], grad_y: Any
) -> Rival:
    """That kernel; the sizes and starts of levels are on the GPU beforehand."""
    value, *points = (arrays[name] for name in ("value", "sampling_locations", "attention_weights"))
    sizes = torch.tensor(levels, device=value.device)
    pixels = sizes.prod(1)
    given, step = (value, sizes, pixels.cumsum(0) - pixels, *points), 64  # images at a time, or all if they are fewer

    def backward() -> dict[str, Any]:
        names = ("value", "sampling_locations", "attention_weights")
        return dict(zip(names, module.ms_deform_attn_backward(*given, grad_y, step), strict=True))

    return Rival("transformers", lambda: {"y": module.ms_deform_attn_forward(*given, step)}, backward)


def as_numdcn(operator: str, results: dict[str, Any], arrays: Arrays) -> dict[str, Any]:
    """The results under numdcn's names, in its units."""
    if "grid" not in results:
        return results
    x = arrays["x"]
    size = x.new_tensor([x.shape[2], x.shape[3]])
    return {"x": results["x"], "points": results["grid"][:, :, 0].flip(-1) * (2 / size)}


def _boxes(ops: Any, operator: str, arrays: Arrays, keywords: dict[str, Any], grad_y: Any) -> list[Rival]:
    if operator not in ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool"):
        return []
    x, rois = arrays["x"], arrays["rois"]
    where, shape = (keywords["spatial_scale"], *pair(keywords["output_size"])), tuple(x.shape)
    sampling = [keywords["sampling_ratio"]] if "sampling_ratio" in keywords else []
    function, gradient = getattr(ops, operator), getattr(ops, f"_{operator}_backward")
    if operator == "roi_align":
        more = (*sampling, keywords["aligned"])
        return [
            Rival(
                "torchvision",
                lambda: {"y": function(x, rois, *where, *more)},
                lambda: {"x": gradient(grad_y, rois, *where, *shape, *more)},
            )
        ]
    # The positions of the maxima, or the channels read: input of the backward.
    kept = function(x, rois, *where, *sampling)[1]
    return [
        Rival(
            "torchvision",
            lambda: {"y": function(x, rois, *where, *sampling)[0]},
            lambda: {"x": gradient(grad_y, rois, kept, *where, *sampling, *shape)},
        )
    ]
