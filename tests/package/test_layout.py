"""The rules of the architecture that a program can check: who imports whom, what mirrors what, how long things are."""

import ast
import inspect
import re
import subprocess
import typing

import pytest
from checks import ROOT, limit, run_python

import numdcn

PACKAGE = ROOT / "numdcn"
OPERATORS = sorted(path.parent.name for path in PACKAGE.glob("*/problem.py"))
SOURCES = sorted(path for path in PACKAGE.rglob("*.py"))
ALL = [
    path
    for top in ("numdcn", "tests", "benchmarks", "examples", "tools")
    for path in sorted((ROOT / top).rglob("*.py"))
]


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path):
    """Absolute names of every module that a file imports, anywhere in it; for `from a import b` both a and a.b."""
    package = list(path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def layer(module):
    """(layer, operator) of a module of numdcn; "part" is a module that an operator's kernels are split into."""
    parts = module.split(".")[1:]
    if not parts:
        return None
    if parts[0] == "_kernels":
        return "kernels", None
    if parts[0] == "_host":
        return "host", None
    if parts[0] == "adapters":
        return "adapters", None
    if parts[0] in OPERATORS:
        if len(parts) == 1 or not (PACKAGE / parts[0] / f"{parts[1]}.py").exists():
            return "door", parts[0]
        return parts[1] if parts[1] in ("problem", "cpu", "cuda") else "part", parts[0]
    return "top", None


MAY_IMPORT = {
    "kernels": {"kernels"},
    "host": {"host", "kernels"},
    "problem": {"host", "problem"},
    "part": {"kernels", "host", "problem", "part"},
    "cpu": {"kernels", "host", "problem", "part"},
    "cuda": {"kernels", "host", "problem", "part"},
    "door": {"host", "problem", "cpu", "cuda", "door"},
    "adapters": {"adapters", "door", "host", "top"},
    "top": {"top", "door", "host", "kernels", "problem", "cpu", "cuda", "part"},
}


def test_there_is_something_to_check():
    assert OPERATORS and len(SOURCES) > 8


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_point_down(path):
    own, operator = layer(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")) or (
        "top",
        None,
    )
    for module in imports(path):
        if module.split(".")[0] != "numdcn" or layer(module) is None:
            continue
        other, its_operator = layer(module)
        assert other in MAY_IMPORT[own], f"{own} imports {other}: {module}"
        if operator and its_operator and operator != its_operator:
            assert own == other == "door", f"{operator} imports {module}: only doors call other operators"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_only_cuda_files_import_cuda(path):
    if not path.stem.endswith("cuda"):
        assert not [m for m in imports(path) if m.startswith(("numba.cuda", "numba_cuda", "cupy"))]


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_numba_cuda_is_imported_in_one_place(path):
    """Where NumPy is made fit for it. (`numdcn._call.numba_cuda` is that place.)"""
    if name_of(path) != "numdcn/_kernels/numba_cuda.py":
        assert not [m for m in imports(path) if m.split(".")[0] == "numba_cuda" or m.startswith("numba.cuda")]


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_frameworks_are_imported_by_adapters_only(path):
    if "adapters" not in path.parts:
        outside = {m.split(".")[0] for m in imports(path)} & {
            "torch",
            "jax",
            "cupy",
            "dask",
            "onnx",
            "scipy",
            "matplotlib",
        }
        assert not outside


@pytest.mark.parametrize("operator", OPERATORS)
def test_everything_mirrors_the_operators(operator):
    for place in (f"numdcn/{operator}/__init__.py", f"tests/support/naive/{operator}.py", f"tests/test_{operator}.py"):
        assert (ROOT / place).exists(), place
    assert (ROOT / f"benchmarks/cases/{operator}.py").exists()
    assert (PACKAGE / operator / "cpu.py").exists() == (PACKAGE / operator / "cuda.py").exists()
    assert "class TestGPU(family_gpu." in (ROOT / f"tests/test_{operator}.py").read_text(encoding="utf-8")
    examples = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "examples").glob("*.py"))
    assert f"numdcn.{operator}_forward" in examples or f"{operator}_forward" in examples
    for suffix in ("forward", "backward"):
        assert hasattr(numdcn, f"{operator}_{suffix}")


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_backward_stands_under_its_forward(operator):
    """In the door, in cpu.py and cuda.py, and in the naive reference; twins have the same arguments, arrays of their own kind."""
    files = [PACKAGE / operator / f for f in ("cpu.py", "cuda.py")] + [ROOT / "tests" / "naive" / f"{operator}.py"]
    signatures = {}
    for path in filter(lambda path: path.exists(), files):
        functions = {node.name: node for node in tree(path).body if isinstance(node, ast.FunctionDef)}
        assert functions["forward"].lineno < functions["backward"].lineno, name_of(path)
        if PACKAGE in path.parents:
            plain = [
                re.sub("np.ndarray|DeviceArray", "Array", ast.unparse(functions[f].args))
                for f in ("forward", "backward")
            ]
            signatures[path.stem] = plain
    assert len({str(signature) for signature in signatures.values()}) <= 1, "cpu.py and cuda.py differ"
    door = {node.name: node.lineno for node in tree(PACKAGE / operator / "__init__.py").body if hasattr(node, "name")}
    assert door[f"{operator}_forward"] < door[f"{operator}_backward"]


def test_naive_references_never_import_numdcn():
    files = sorted((ROOT / "tests" / "naive").glob("*.py"))
    assert files
    for path in files:
        assert not [m for m in imports(path) if m.split(".")[0] in ("numdcn", "checks")], name_of(path)


def test_the_emulator_stands_on_its_own():
    """It imports nothing of this repository but itself, and does not name numdcn."""
    own = {"numdcn", "benchmarks", "examples", "tests", *(path.stem for path in (ROOT / "tests").iterdir())}
    files = [path for path in sorted((ROOT / "tools" / "ptx_emulator").rglob("*.*")) if path.suffix != ".pyc"]
    assert {path.suffix for path in files} == {".py", ".cpp", ".h", ".md"}
    for path in files:
        assert "numdcn" not in path.read_text(encoding="utf-8").lower(), name_of(path)
        if path.suffix == ".py":
            assert not [m for m in imports(path) if m.split(".")[0] in own], name_of(path)


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_files_and_functions_are_short(path):
    """400 lines a file, 80 a function, or a `# length:` comment in it that gives the reason."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    assert len(lines) <= 400 or "# length:" in text, f"{len(lines)} lines"
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            own = lines[node.lineno - 1 : node.end_lineno]
            assert len(own) <= 80 or any("# length:" in line for line in own), f"{node.name}: {len(own)} lines"


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_every_file_says_what_it_is(path):
    assert path.stat().st_size == 0 or ast.get_docstring(tree(path)), "no docstring"


@pytest.mark.parametrize("name", sorted(numdcn.__all__))
def test_public_names_are_documented_and_annotated(name):
    thing = getattr(numdcn, name)
    if name.startswith("__"):
        return
    assert thing.__doc__ and len(thing.__doc__) > 40, "no docstring"
    if inspect.isfunction(thing):
        hints = typing.get_type_hints(thing)
        missing = [p for p in [*inspect.signature(thing).parameters, "return"] if p not in hints]
        assert not missing, f"not annotated: {missing}"
        for parameter in inspect.signature(thing).parameters:
            assert parameter in thing.__doc__, f"{parameter} is not documented"


def test_numba_is_configured_in_one_place():
    """Compiler flags and decorators live in _kernels/jit_*.py; nothing sets numba.config."""
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        assert ("nnan" not in text and "ninf" not in text) or path.stem.startswith("jit_"), name_of(path)
        if not path.stem.startswith("jit_"):
            assert "fastmath=" not in text and "error_model=" not in text, name_of(path)
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Assign):
                assert not any("numba.config" in ast.unparse(target) for target in node.targets), name_of(path)


def test_time_limits_follow_the_environment(monkeypatch):
    monkeypatch.delenv("NUMDCN_TEST_TIME", raising=False)
    assert limit(60) == 60
    monkeypatch.setenv("NUMDCN_TEST_TIME", "2.5")
    assert limit(60) == 150
    monkeypatch.setenv("NUMDCN_TEST_TIME", "0.001")
    with pytest.raises(subprocess.TimeoutExpired):
        run_python("import time; time.sleep(60)", timeout=100)


@pytest.mark.parametrize("path", [path for path in ALL if path.parts[-2] == "tests"], ids=name_of)
def test_no_time_limit_but_through_limit(path):
    """A number where something is waited for would be too short on a slow machine."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            waits = node.func.attr in ("alarm", "get", "join", "result", "wait") and len(node.args) == 1
            given = [*node.args * waits, *(k.value for k in node.keywords if k.arg == "timeout")]
            numbers = [a for a in given if isinstance(a, ast.Constant) and isinstance(a.value, (int, float))]
            assert not numbers, f"{name_of(path)}:{node.lineno}: {ast.unparse(node)}"
