"""The pages under docs/: their Python runs, and draws the pictures that they show; the site lists all of them; the README is short."""

import re

import numpy as np
import pytest
from checks import ROOT

from tools import draw_docs

PAGES = draw_docs.pages()
OPERATORS = {path.parent.name for path in (ROOT / "numdcn").glob("*/problem.py")}


def name_of(page):
    return page.relative_to(draw_docs.DOCS).as_posix()


def run(page, folder, monkeypatch):
    """What a page's Python leaves behind, run in a folder of its own."""
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="pages need the demo extra")
    pytest.importorskip("sklearn", reason="pages need the demo extra")
    pyplot.switch_backend("agg")
    (folder / "docs" / "pictures").mkdir(parents=True)
    monkeypatch.chdir(folder)
    try:
        return draw_docs.run(page)
    finally:
        pyplot.close("all")


def shown(page):
    """The pictures of a page."""
    links = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    return {(page.parent / link).resolve() for link in links}


@pytest.mark.parametrize("page", [page for page in PAGES if draw_docs.blocks(page)], ids=name_of)
def test_a_page_runs_and_draws(page, tmp_path, monkeypatch):
    run(page, tmp_path, monkeypatch)
    image = pytest.importorskip("PIL.Image", reason="pages need the demo extra")
    drawn = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png")}
    named = {name for block in draw_docs.blocks(page) for name in re.findall(r"docs/pictures/\w+\.png", block.code)}
    assert drawn == named
    for name in drawn:
        assert ROOT / name in shown(page), f"{name} is not shown"
        with image.open(tmp_path / name) as new, image.open(ROOT / name) as old:
            assert new.size == old.size, f"{name} was drawn by other code: python -m tools.draw_docs"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_pictures_are_there(page):
    for picture in shown(page):
        assert picture.is_file(), f"no {picture.relative_to(ROOT)}"


def test_every_operator_has_a_page_with_a_picture():
    assert {page.stem for page in PAGES if page.parent.name == "operators"} == OPERATORS
    for operator in OPERATORS:
        page = draw_docs.DOCS / "operators" / f"{operator}.md"
        text = page.read_text(encoding="utf-8")
        assert draw_docs.DOCS / "pictures" / f"{operator}.png" in shown(page)
        for name in ("forward", "backward"):
            assert f"\n::: numdcn.{operator}_{name}\n" in text, name


def test_the_site_lists_every_page():
    nav = set(re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE))
    elsewhere = {"changelog.md", "contributing.md"}  # added by tools/docs_site.py
    assert nav - elsewhere == {name_of(page) for page in PAGES}


def test_the_readme_is_short():
    assert (ROOT / "README.md").stat().st_size <= 8192


def test_the_function_for_torch(tmp_path, monkeypatch):
    """Its gradients are those of differences."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    function = run(draw_docs.DOCS / "migrating.md", tmp_path, monkeypatch)["DeformConv"]
    rng = np.random.default_rng(0)
    x, w, bias = (rng.standard_normal(shape) for shape in ((2, 3, 5, 6), (4, 3, 3, 3), (4,)))
    offsets = rng.uniform(0.1, 0.9, (2, 18, 5, 6))  # between pixels, where there is one slope
    tensors = [torch.tensor(a, requires_grad=True) for a in (x, offsets, w, bias, rng.random((2, 9, 5, 6)))]
    assert torch.autograd.gradcheck(lambda *given: function.apply({"padding": 1}, *given), tensors)
