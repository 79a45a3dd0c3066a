"""Arrays of many kinds in host memory: of frameworks, and with DLPack or the array interface alone."""

import types

import numpy as np
import pytest

X, W, OFFSETS = (np.ones(shape, np.float32) for shape in ((1, 4, 8, 8), (6, 4, 3, 3), (1, 18, 6, 6)))
ROIS = np.array([[0, 1, 1, 4, 3]], np.float32)


class Lone:
    """An array with nothing but DLPack, and nobody knows how to make one."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class Exporter(Lone):
    """The same, with a module that makes them."""

    def __array_namespace__(self):
        return types.SimpleNamespace(from_dlpack=lambda array: Exporter(np.from_dlpack(array)))


class Shown:
    """An object with nothing but the array interface."""

    def __init__(self, array):
        self.array, self.__array_interface__ = array, array.__array_interface__


class Kind:
    """Arrays of one kind: how they are made, what their type is, and what NumPy sees of them."""

    def __init__(self, make, see, kind):
        self.make, self.see, self.kind = make, see, kind


def torch_kind():
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install torch")
    return Kind(torch.from_numpy, lambda tensor: tensor.numpy(), torch.Tensor)


def jax_kind():
    jax = pytest.importorskip("jax", reason="jax is not installed: pip install jax")
    return Kind(jax.numpy.asarray, np.asarray, jax.Array)


def strict_kind():
    strict = pytest.importorskip("array_api_strict", reason="array_api_strict is not installed")
    return Kind(strict.from_dlpack, np.from_dlpack, type(strict.zeros(1)))


KINDS = {
    "torch": torch_kind,
    "jax": jax_kind,
    "array_api_strict": strict_kind,
    "dlpack": lambda: Kind(Exporter, lambda exporter: exporter.array, Exporter),
    "dlpack alone": lambda: Kind(Lone, lambda array: array, np.ndarray),
    "array interface": lambda: Kind(Shown, lambda array: array, np.ndarray),
}


def tensors(torch):
    """X, OFFSETS and W."""
    return [torch.from_numpy(array.copy()) for array in (X, OFFSETS, W)]
