"""Packing weights ahead of calls that repeat with them."""

from __future__ import annotations

import numpy as np

from numdcn._call.arrays import AnyArray, check_array, received
from numdcn._call.checks import integer
from numdcn._call.door import door
from numdcn._call.prepared import PreparedWeights
from numdcn._run import on_gpu


@door
def prepare_weights(w: AnyArray, *, groups: int = 1) -> PreparedWeights:
    """Pack weights once, for calls that repeat with them.

    w: array (C_out, C/groups, kh, kw) of float32 or float64, or one on a GPU. groups: the number of convolution groups, which w alone
    does not tell. Returns an object that `deform_conv`, `conv` and `deform_conv_layer` accept as `w`, forward and backward. It is a
    snapshot: later changes of `w` are not seen. On a CPU they are packed for the forward; each backward packs them anew.

    Raises `TypeError` or `ValueError` if w is no such array, or its outputs are no multiple of groups.
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

    prepared = PreparedWeights(np.array(seen, order="C"), groups)
    packed_panels(prepared)
    return prepared
