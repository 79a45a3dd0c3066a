"""Multi-scale deformable attention: forward and backward."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, Literal, NamedTuple

from numdcn._call.arguments import check_grad_y, receive
from numdcn._call.arrays import AnyArray, Array
from numdcn._call.attention import AttentionArrays
from numdcn._call.door import door, operator_module
from numdcn._call.levels import LevelPoints, LevelShapes, level_points, level_shapes
from numdcn._call.options import options
from numdcn._call.remembered import remembered
from numdcn._run import attentions, run_backward, run_forward
from numdcn.ms_deform_attn.problem import ARGUMENTS, problem

operator_module(__name__)
Name = Literal["value", "sampling_locations", "attention_weights"]  # what `wrt` may name


@door
def ms_deform_attn_forward(
    value: Array,
    spatial_shapes: LevelShapes,
    sampling_locations: AnyArray,
    attention_weights: Array,
    *,
    points_per_level: LevelPoints = None,
    out: Array | None = None,
) -> Array:
    """Multi-scale deformable attention: each query and head sums weighted samples of several levels of an image pyramid.

    With l the level of point t, (H_l, W_l) its size, value_l its pixels and S bilinear interpolation::

        y[n, q, m*D + d] = sum over t of attention_weights[n, q, m, t] * S(value_l[n, :, :, m, d]; py, px)
        py = H_l * sampling_locations[n, q, m, t, 1] - 0.5
        px = W_l * sampling_locations[n, q, m, t, 0] - 0.5

    Args:
        value: pixels of all levels, `(N, S, M, D)`: one level after the other, each row by row; M heads of D channels.
            float16, bfloat16, float32 or float64, any strides.
        spatial_shapes: (height, width) of each of the L levels, in host memory: a sequence of pairs, or an integer array
            `(L, 2)`. The sum of height*width is S.
        sampling_locations: `(N, Q, M, L, P, 2)`, x, then y, as fractions of the level: 0 and 1 are the outer edges of its
            first and last pixel. With `points_per_level`, `(N, Q, M, T, 2)`.
        attention_weights: `(N, Q, M, L, P)`, any numbers; no softmax is applied. With `points_per_level`, `(N, Q, M, T)`.
        points_per_level: the number of points of each level, if unequal; their sum is T, those of the first level come
            first. None for P points on each.
        out: array to fill, `(N, Q, M*D)`; must not overlap any input.

    A level is zero outside: S falls to 0 half a pixel beyond its edge and is exactly 0 farther out, for huge and
    infinite locations too. A NaN location makes y NaN at its query and head. A NaN in value affects only the samples
    that have its pixel as a corner.

    Returns:
        y, `(N, Q, M*D)`. Bit-identical for any number of threads.

    Raises:
        TypeError: an argument is not an array or has an unsupported dtype, dtypes differ, or spatial_shapes or
            points_per_level holds anything but integers, or is on a GPU.
        ValueError: shapes do not match, a level is empty, or `out` overlaps an input.

    Source: Zhu et al., Deformable DETR (2021).
    """
    arrays = receive(ARGUMENTS, AttentionArrays(value, sampling_locations, attention_weights))
    p = remembered(problem, arrays, level_shapes(spatial_shapes), level_points(points_per_level))
    return run_forward(attentions, ARGUMENTS, p, arrays, out)


class MSDeformAttnGradients(NamedTuple, Generic[Array]):
    """Gradients by argument of `ms_deform_attn_forward`; None where not requested."""

    value: Array | None = None
    sampling_locations: Array | None = None
    attention_weights: Array | None = None


@door
def ms_deform_attn_backward(
    grad_y: Array,
    value: Array,
    spatial_shapes: LevelShapes,
    sampling_locations: AnyArray,
    attention_weights: Array,
    *,
    points_per_level: LevelPoints = None,
    wrt: Name | Iterable[Name] | None = None,
    deterministic: bool = False,
    out: MSDeformAttnGradients[Array] | None = None,
) -> MSDeformAttnGradients[Array]:
    """Gradients of `ms_deform_attn_forward`, given the gradient of its result.

    For each point::

        value               attention_weights * grad_y, spread over the four corners with their interpolation weights
        sampling_locations  (W_l, H_l) * attention_weights * sum over d of grad_y * (slope of S)
        attention_weights   sum over d of grad_y * S

    Args:
        grad_y: gradient of y, `(N, Q, M*D)`, with the dtype of value.
        value: as in the forward.
        spatial_shapes: as in the forward.
        sampling_locations: as in the forward.
        attention_weights: as in the forward.
        points_per_level: as in the forward.
        wrt: name or names of the arguments whose gradients to compute; None for all.
        deterministic: on a GPU, accumulate the gradient of value in a fixed order, which is slower.
        out: `MSDeformAttnGradients` of arrays to fill, shaped like the arguments; they must not overlap an input or
            each other. Fields left as None are allocated if requested.

    At an integer coordinate the slope is the one to its right, at -1 too. Outside the level S and its slopes are 0, and
    so are all gradients; a NaN in grad_y or attention_weights times that 0 is NaN. A NaN location makes the gradients
    of both its coordinates and of its weight NaN, and adds nothing to that of value.

    Returns:
        An `MSDeformAttnGradients`. Reproducible bit for bit: on the CPU for any number of threads and any `wrt`; on a
            GPU from run to run, the gradient of value only if `deterministic`.

    Raises:
        TypeError: as in `ms_deform_attn_forward`.
        ValueError: as in `ms_deform_attn_forward`, or `wrt` names an argument that is unknown.

    Source: as in `ms_deform_attn_forward`.
    """
    arrays = receive(ARGUMENTS, AttentionArrays(value, sampling_locations, attention_weights))
    p = remembered(problem, arrays, level_shapes(spatial_shapes), level_points(points_per_level))
    grad_y = check_grad_y(grad_y, p.out_shape, "(N, Q, M*D)", arrays.value, "value")
    return run_backward(
        attentions, ARGUMENTS, p, grad_y, arrays, MSDeformAttnGradients, wrt, out, options(deterministic)
    )
