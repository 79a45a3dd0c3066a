"""Deformable operators for everyone who has arrays."""

from numdcn._host.scratch import get_scratch_limit, set_scratch_limit
from numdcn._host.threads import get_num_threads, set_num_threads
from numdcn._host.weights import PreparedWeights, prepare_weights
from numdcn.deform_conv import DeformConvGradients, deform_conv_backward, deform_conv_forward

__version__ = "0.1.0"
