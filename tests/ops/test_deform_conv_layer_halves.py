"""deform_conv_layer in float16 and bfloat16."""

import family_halves
import numpy as np
import pytest
import test_deform_conv_layer as layer
from family import assert_same
from halves import multiplies_pairs

import numdcn

OPERATOR = layer.OPERATOR


@pytest.fixture
def backend():
    return layer.of_y(layer.LIBRARY)


class TestHalfTypes(family_halves.HalfTypes):
    """Offsets and mask are results: they are rounded, once, before the second convolution reads them."""

    described = layer.TestFamily

    def predicted(self, narrow, wide):
        """The forward's offsets and mask as float32, which are compared with those of the forward in float32."""
        result, exact = narrow.forward(layer.LIBRARY), wide.forward(layer.LIBRARY)
        family_halves.assert_rounded(result._replace(y=None), exact._replace(y=None))
        return {
            name: None if a is None else a.astype(np.float32) for name, a in result._asdict().items() if name != "y"
        }

    def multiplies_pairs(self, narrow):
        predicted, _, *kernel = narrow["offset_w"].shape
        per_tap = 3 if narrow.params.get("modulated") else 2
        return multiplies_pairs(narrow, predicted // (per_tap * kernel[0] * kernel[1]))

    def expected(self, backend, narrow, wide):
        made = numdcn.DeformConvLayerResult(None, **self.predicted(narrow, wide))
        want = family_halves.expected_of_narrow(narrow, wide, want=layer.expected(wide, made))
        if self.multiplies_pairs(narrow):
            second = layer.second_convolution
            want["y"] = family_halves.expected_of_narrow(second(narrow, made), second(wide, made), rounds_terms=True)[
                "y"
            ]
        return want

    def in_float32(self, backend, narrow, wide):
        made = self.predicted(narrow, wide)
        y = numdcn.deform_conv_forward(
            wide["x"], made["offsets"], wide["w"], wide["bias"], mask=made["mask"], **layer.geometry_of(wide)
        )
        return y, wide.backward(backend, **made)

    def test_given_offsets_and_mask(self, half):
        """Those of the forward change no bit of the backward, and may be float32 beside the others, the mask not."""
        p = family_halves.halved(self.usual(np.float32), half, half)[0]
        result, g = p.forward(layer.LIBRARY), p.backward(layer.LIBRARY)
        assert result.offsets.dtype == result.mask.dtype == half
        assert_same(p.backward(layer.LIBRARY, offsets=result.offsets, mask=result.mask), g)
        finer = result.offsets.astype(np.float32)
        assert_same(p.backward(layer.LIBRARY, offsets=finer, mask=result.mask), g)
        with pytest.raises(TypeError, match=f"`mask` has dtype float32 but `x` has {half}"):
            p.backward(layer.LIBRARY, mask=result.mask.astype(np.float32))

    def test_a_new_layer(self, half):
        made = numdcn.deform_conv_layer_init(4, 6, 3, dtype=half, modulated=True, seed=1)
        same = numdcn.deform_conv_layer_init(4, 6, 3, modulated=True, seed=1)
        family_halves.assert_rounded(made, same)
        y = numdcn.deform_conv_layer_forward(np.ones((1, 4, 5, 5), half), *made, modulated=True).y
        assert y.dtype == half
