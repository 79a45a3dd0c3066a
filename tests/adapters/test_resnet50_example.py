"""examples/resnet50_dcn_torch.py, with small images."""

import importlib.util
import re

import pytest
from checks import run_python

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("matplotlib", reason="the examples need the demo extra")
if importlib.util.find_spec("torchvision") is None:
    pytest.skip("torchvision is not installed", allow_module_level=True)

from torchvision_cases import BINARY  # noqa: E402


def test_all_ways_agree_and_are_timed(tmp_path):
    """The program compares their results itself, and fails if they differ."""
    command = ["examples/resnet50_dcn_torch.py", "--quick", "--out", tmp_path]
    printed = run_python(command, MPLBACKEND="Agg", timeout=180).stdout
    checked = re.findall(r"^ +(\w+): (output|gradients), float\d\d +relative error \d", printed, re.MULTILINE)
    ways = {"numdcn"} | ({"torchvision"} if BINARY else set())
    assert {(way, result) for way in ways for result in ("output", "gradients")} <= {*checked}
    packages = ("onnx", "onnxscript", "onnxruntime")
    has_onnx = all(importlib.util.find_spec(package) for package in packages)
    assert has_onnx == (("onnxruntime", "output") in checked)
    assert ("without torchvision" not in printed) == BINARY and has_onnx == ("without onnxruntime" not in printed)
    timed = set(re.findall(r"^ +(\w+) +\d+ ms", printed, re.MULTILINE))
    assert timed == ways | ({"onnxruntime"} if has_onnx else set())
    assert (tmp_path / "resnet50_dcn_torch.png").stat().st_size > 1000
