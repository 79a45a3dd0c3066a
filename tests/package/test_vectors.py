"""The published numbers used by the operators' tests: the files of tests/vectors are those listed in its README."""

import re

from checks import ROOT

VECTORS = ROOT / "tests" / "vectors"


def test_the_files_are_those_of_the_tables():
    listed = re.findall(r"^\| (\w+) \|", (VECTORS / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(path.stem for path in VECTORS.glob("*.npz")) == sorted(set(listed) - {"file"})
