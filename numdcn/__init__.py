"""Deformable operators on plain arrays: Numba kernels, forward and backward, for NumPy arrays and arrays on a GPU."""

import typing as _typing

from numdcn._call.prepared import PreparedWeights
from numdcn._call.scratch import get_scratch_limit, set_scratch_limit
from numdcn._cpu.threads import get_num_threads, set_num_threads
from numdcn.bilinear_sample import BilinearSampleGradients, bilinear_sample_backward, bilinear_sample_forward
from numdcn.conv import ConvGradients, conv_backward, conv_forward
from numdcn.dcnv3 import DCNv3Gradients, dcnv3_backward, dcnv3_forward
from numdcn.dcnv4 import DCNv4Gradients, dcnv4_backward, dcnv4_forward
from numdcn.deform_conv import DeformConvGradients, deform_conv_backward, deform_conv_forward
from numdcn.deform_conv_layer import (
    DeformConvLayerGradients,
    DeformConvLayerParameters,
    DeformConvLayerResult,
    deform_conv_layer_backward,
    deform_conv_layer_forward,
    deform_conv_layer_init,
)
from numdcn.deform_ps_roi_pool import (
    DeformPSRoIPoolGradients,
    deform_ps_roi_pool_backward,
    deform_ps_roi_pool_forward,
)
from numdcn.deform_roi_pool import DeformRoIPoolGradients, deform_roi_pool_backward, deform_roi_pool_forward
from numdcn.ms_deform_attn import MSDeformAttnGradients, ms_deform_attn_backward, ms_deform_attn_forward
from numdcn.prepare import prepare_weights
from numdcn.ps_roi_align import PSRoIAlignGradients, ps_roi_align_backward, ps_roi_align_forward
from numdcn.ps_roi_pool import PSRoIPoolGradients, ps_roi_pool_backward, ps_roi_pool_forward
from numdcn.roi_align import RoIAlignGradients, roi_align_backward, roi_align_forward
from numdcn.roi_pool import RoIPoolGradients, RoIPoolResult, roi_pool_backward, roi_pool_forward
from numdcn.warm import warmup

if not _typing.TYPE_CHECKING:  # a type checker would take every name to exist
    from numdcn._call.hints import no_attribute as __getattr__  # noqa: F401

__version__ = "0.1.0"

__all__ = [
    "BilinearSampleGradients",
    "ConvGradients",
    "DCNv3Gradients",
    "DCNv4Gradients",
    "DeformConvGradients",
    "DeformConvLayerGradients",
    "DeformConvLayerParameters",
    "DeformConvLayerResult",
    "DeformPSRoIPoolGradients",
    "DeformRoIPoolGradients",
    "MSDeformAttnGradients",
    "PSRoIAlignGradients",
    "PSRoIPoolGradients",
    "PreparedWeights",
    "RoIAlignGradients",
    "RoIPoolGradients",
    "RoIPoolResult",
    "__version__",
    "bilinear_sample_backward",
    "bilinear_sample_forward",
    "conv_backward",
    "conv_forward",
    "dcnv3_backward",
    "dcnv3_forward",
    "dcnv4_backward",
    "dcnv4_forward",
    "deform_conv_backward",
    "deform_conv_forward",
    "deform_conv_layer_backward",
    "deform_conv_layer_forward",
    "deform_conv_layer_init",
    "deform_ps_roi_pool_backward",
    "deform_ps_roi_pool_forward",
    "deform_roi_pool_backward",
    "deform_roi_pool_forward",
    "get_num_threads",
    "get_scratch_limit",
    "ms_deform_attn_backward",
    "ms_deform_attn_forward",
    "prepare_weights",
    "ps_roi_align_backward",
    "ps_roi_align_forward",
    "ps_roi_pool_backward",
    "ps_roi_pool_forward",
    "roi_align_backward",
    "roi_align_forward",
    "roi_pool_backward",
    "roi_pool_forward",
    "set_num_threads",
    "set_scratch_limit",
    "warmup",
]
