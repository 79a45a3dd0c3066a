"""Packing weights once for repeated calls."""

from __future__ import annotations

import numpy as np

from numdcn._call.arrays import AnyArray, check_array, received
from numdcn._call.checks import integer
from numdcn._call.door import door
from numdcn._call.prepared import PreparedWeights
from numdcn._run import in_float32, on_gpu


@door
def prepare_weights(w: AnyArray, *, groups: int = 1) -> PreparedWeights:
    """Pack weights once, for repeated calls with them.

    `deform_conv`, `conv` and `deform_conv_layer` accept the result as `w`, forward and backward. It is a snapshot:
    later changes to w do not affect it. On the CPU it is packed for the forward; each backward packs w anew. On a GPU
    it is packed by the first forward and the first backward on each stream. If these are captured into a CUDA graph, the
    graph packs it whenever it runs. Keep it as long as such a graph, and call this function outside of a capture.

    Args:
        w: weights `(C_out, C/groups, kh, kw)`, float16, bfloat16, float32 or float64.
        groups: number of convolution groups, which cannot be inferred from w alone.

    Returns:
        The packed weights.

    Raises:
        TypeError: w is not an array or has an unsupported dtype, or groups is not an integer.
        ValueError: w is not 4-dimensional or has an empty axis, or C_out is not a multiple of groups.
    """
    seen = received(w, "w")
    check_array("w", seen, 4, "(C_out, C/groups, kh, kw)")
    groups = integer("groups", groups, 1)
    if min(seen.shape) < 1:
        raise ValueError(f"`w` has shape {seen.shape}, expected no empty axis")
    if seen.shape[0] % groups:
        raise ValueError(
            f"`w` has shape {seen.shape}: C_out = {seen.shape[0]}, expected a multiple of groups = {groups}"
        )
    if on_gpu(seen):
        from numdcn._cuda.workspace import copied

        return PreparedWeights(copied(seen), groups)
    from numdcn._cpu.conv.pack import packed_panels
    from numdcn._cpu.conv.pairs import multiplies_weights

    prepared = PreparedWeights(np.array(seen, order="C"), groups)
    as_pairs = multiplies_weights(prepared.shape, groups, prepared.dtype)
    packed_panels(prepared if as_pairs else in_float32(prepared))
    return prepared
