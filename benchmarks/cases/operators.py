"""The operators known to the benchmark, and the groups whose results share a file."""

from __future__ import annotations

from benchmarks.cases import (
    bilinear_sample,
    conv,
    dcnv3,
    dcnv4,
    deform_conv,
    deform_conv_layer,
    deform_ps_roi_pool,
    deform_roi_pool,
    ms_deform_attn,
    ps_roi_align,
    ps_roi_pool,
    roi_align,
    roi_pool,
)
from benchmarks.cases.interface import Operator

# results file -> its operators
GROUPS = {
    "roi": ("roi_pool", "roi_align", "ps_roi_pool", "ps_roi_align", "deform_roi_pool", "deform_ps_roi_pool"),
    "sampling": ("bilinear_sample",),
    "attention": ("ms_deform_attn", "dcnv3", "dcnv4"),
    "convolution": ("conv", "deform_conv_layer"),
}
OPERATORS = ("deform_conv", *(name for group in GROUPS.values() for name in group))
FILES = (
    bilinear_sample,
    conv,
    dcnv3,
    dcnv4,
    deform_conv,
    deform_conv_layer,
    deform_ps_roi_pool,
    deform_roi_pool,
    ms_deform_attn,
    ps_roi_align,
    ps_roi_pool,
    roi_align,
    roi_pool,
)
KNOWN: dict[str, Operator] = {file.OPERATOR.name: file.OPERATOR for file in FILES}


def operator(name: str) -> Operator:
    """The operator of this name."""
    return KNOWN[name]
