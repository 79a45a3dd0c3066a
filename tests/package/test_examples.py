"""Every example runs from the repository root without a display, writes its files where it is told, and succeeds; so
does the Python code in README.md."""

import re

import pytest
from checks import ROOT, run_python

LONG = {
    "train_digits.py",
    "resnet50_dcn_torch.py",
    "tiles_dask.py",
    "tiles_ray.py",
}  # other tests run shortened versions
EXAMPLES = sorted({path.name for path in (ROOT / "examples").glob("*.py") if path.name[0] != "_"} - LONG)


def test_there_are_examples():
    assert {"attend.py", "detect_boxes.py", "from_loops_to_simd.py", "quickstart.py"} <= {*EXAMPLES}


def arguments(name, folder):
    """Arguments with which an example draws something in a folder."""
    if name == "from_loops_to_simd.py":
        return "--size", 37, "--picture", folder / "times.png"  # not a multiple of the tiles
    if name == "attend.py":
        return "--quick", "--out", folder
    return "--out", folder


def files():
    return {*ROOT.glob("*"), *(path for path in ROOT.glob("examples/**/*") if "__pycache__" not in path.parts)}


@pytest.mark.full
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs_and_draws(name, tmp_path):
    pytest.importorskip("matplotlib", reason="the examples need the demo extra")
    pytest.importorskip("sklearn", reason="the examples need the demo extra")
    before = files()
    done = run_python([f"examples/{name}"], *arguments(name, tmp_path), MPLBACKEND="Agg", timeout=120)
    assert done.stdout.strip(), "it prints nothing"
    assert any(path.stat().st_size > 1000 for path in tmp_path.rglob("*.png")), "it draws nothing"
    after = files()
    assert after == before, f"it leaves {sorted(after - before)} in the repository"


@pytest.mark.full
def test_queries_that_did_not_learn_fail(tmp_path):
    """Eight steps are too few."""
    pytest.importorskip("matplotlib", reason="the examples need the demo extra")
    pytest.importorskip("sklearn", reason="the examples need the demo extra")
    done = run_python(["examples/attend.py"], "--steps", 8, "--out", tmp_path, MPLBACKEND="Agg", check=False)
    assert done.returncode == 1 and "FAILED: loss" in done.stderr, done.stderr


def test_the_readmes_python_runs():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert blocks
    run_python("\n".join(blocks), timeout=300)


def test_the_readme_lists_every_operator():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| \[`(\w+)`\]\(docs/operators/\1\.md\) \|", text, re.MULTILINE))
    assert listed == {path.parent.name for path in (ROOT / "numdcn").glob("*/problem.py")}
