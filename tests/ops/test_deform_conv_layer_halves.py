"""deform_conv_layer in float16 and bfloat16."""

import family_halves
import numpy as np
import pytest
import test_deform_conv_layer as layer

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

    def expected(self, backend, narrow, wide):
        made = numdcn.DeformConvLayerResult(None, **self.predicted(narrow, wide))
        return family_halves.expected_of_narrow(narrow, wide, want=layer.expected(wide, made))

    def in_float32(self, backend, narrow, wide):
        made = self.predicted(narrow, wide)
        y = numdcn.deform_conv_forward(
            wide["x"], made["offsets"], wide["w"], wide["bias"], mask=made["mask"], **layer.geometry_of(wide)
        )
        return y, wide.backward(backend, **made)
