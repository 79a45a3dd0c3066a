"""Every example runs from the repository root without a display, writes its files where it is told, and ends well."""

import pytest
from checks import ROOT, run_python

EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


def test_there_are_examples():
    assert "quickstart.py" in EXAMPLES


def files():
    return {*ROOT.glob("*"), *(path for path in ROOT.glob("examples/**/*") if "__pycache__" not in path.parts)}


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name, tmp_path):
    pytest.importorskip("matplotlib", reason="the examples need the demo extra")
    pytest.importorskip("sklearn", reason="the examples need the demo extra")
    before = files()
    done = run_python([f"examples/{name}"], "--out", tmp_path, MPLBACKEND="Agg", timeout=120)
    assert done.stdout.strip(), "it prints nothing"
    assert any(path.stat().st_size > 1000 for path in tmp_path.rglob("*.png")), "it draws nothing"
    after = files()
    assert after == before, f"it leaves {sorted(after - before)} in the repository"
