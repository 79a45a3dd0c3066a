"""Ray Data needs no adapter: its example runs on two local workers, with more data than one may hold."""

import re

import numpy as np
import pytest
from checks import run_python

pytest.importorskip("ray", reason="Ray is not installed: pip install 'ray[data]'")
pytest.importorskip("sklearn", reason="the examples need the demo extra")
pytest.importorskip("tqdm", reason="the examples need the demo extra")


@pytest.mark.full
def test_the_example(tmp_path):
    out = tmp_path / "strengths.npy"
    done = run_python(["examples/tiles_ray.py"], "--quick", "--out", out, timeout=180, PYTHONSAFEPATH=None)
    tiles, data, limit = map(int, re.search(r"(\d+) tiles, (\d+) MB; two workers of (\d+) MB", done.stdout).groups())
    peaks = [int(peak) for peak in re.findall(r"peak memory of process \d+: (\d+) MB", done.stdout)]
    assert peaks and max(peaks) < limit < data
    assert "all checks passed" in done.stdout
    assert f"{tiles}/{tiles}" in done.stderr, "no progress is shown"
    assert np.load(out).shape == (tiles, 4)
