"""The rules of the architecture that a program can check: who imports whom, what mirrors what, how long things are."""

import ast
import inspect
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


def is_door(path):
    return path.parent.parent == PACKAGE and path.parent.name in OPERATORS


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in ALL}

# Layers from the bottom up: each may import itself and those before it, except the pairs in NEVER.
LAYERS = ("_cache", "_formulas", "_call", "_cpu", "_cuda", "_run", "problem", "door", "top", "adapters")
NEVER = {
    ("_call", "_cache"),
    ("_cuda", "_cpu"),
    ("problem", "_cpu"),
    ("problem", "_cuda"),
    ("door", "_cpu"),
    ("door", "_cuda"),
}


def layer(module):
    """(layer, operator or None) of a module of numdcn."""
    parts = module.split(".")[1:] or ["top"]
    if parts[0] in LAYERS:
        return parts[0], None
    if parts[0] in OPERATORS:
        return ("problem" if parts[1:] == ["problem"] else "door"), parts[0]
    return "top", None


def imported_modules(path):
    """The modules of this repository that a file imports, anywhere in it, without the packages passed through on the
    way."""
    names = {name for name in imports(path) if name in MODULES}
    return {name for name in names if not any(other.startswith(name + ".") for other in names)} - {module_of(path)}


def test_there_is_something_to_check():
    assert len(OPERATORS) >= 10 and len(SOURCES) > 60


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_point_down(path):
    own, operator = layer(module_of(path))
    for module in imported_modules(path):
        if module.split(".")[0] != "numdcn":
            continue
        other, its_operator = layer(module)
        below = LAYERS.index(other) <= LAYERS.index(own) and (own, other) not in NEVER
        assert below or module == "numdcn", f"{own} imports {other}: {module}"
        if operator and its_operator and operator != its_operator:
            assert own == other == "door", f"{operator} imports {module}: only doors call other operators"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_the_wings_never_meet(path):
    """Nor do rooms of one wing: what two of them need is placed next to them."""
    own = module_of(path).split(".")
    if len(own) < 2 or own[1] not in ("_cpu", "_cuda"):
        return
    for module in imported_modules(path):
        other = module.split(".")
        if other[0] != "numdcn" or len(other) < 2:
            continue
        assert other[1] == own[1] or other[1] in ("_call", "_formulas", "_cache"), module
        rooms = [parts[2] for parts in (own, other) if len(parts) > 2 and (PACKAGE / parts[1] / parts[2]).is_dir()]
        if other[1] == own[1]:
            assert len(set(rooms)) <= 1 or len(rooms) < 2, f"{'.'.join(own)} imports {module}"
            if len(own) == 3 and len(rooms) == 1:
                raise AssertionError(f"{'.'.join(own)} is shared by the rooms, but imports {module}")


def test_the_wings_have_the_same_rooms():
    rooms = [{p.name for p in (PACKAGE / wing).iterdir() if (p / "__init__.py").exists()} for wing in ("_cpu", "_cuda")]
    assert rooms[0] == rooms[1] == {"attention", "conv", "roi", "points"}
    for wing in ("_cpu", "_cuda"):
        for room in rooms[0]:
            functions = functions_of(PACKAGE / wing / room / "run.py")
            assert functions["forward"].lineno < functions["backward"].lineno


@pytest.mark.parametrize("top", ["numdcn", "benchmarks", "tools"])
def test_no_import_circle(top):
    """Imports in functions and under TYPE_CHECKING count too, and so do packages that only re-export."""
    graph = {name: imported_modules(path) for name, path in MODULES.items() if name.split(".")[0] == top}
    done, way = set(), []

    def visit(name):
        assert name not in way, " -> ".join([*way[way.index(name) :], name])
        if name in done or name not in graph:
            return
        way.append(name)
        for other in sorted(graph[name]):
            visit(other)
        way.pop()
        done.add(name)

    for name in sorted(graph):
        visit(name)


def test_no_module_is_imported_by_a_string():
    for path in SOURCES:
        calls = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
        assert not [c.lineno for c in calls if ast.unparse(c.func).endswith("import_module")], name_of(path)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_numba_cuda_is_imported_in_one_place(path):
    """Where NumPy is patched for it."""
    if name_of(path) != "numdcn/_call/numba_cuda.py":
        assert not [m for m in imports(path) if m.split(".")[0] in ("numba_cuda", "cupy") or m.startswith("numba.cuda")]


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_framework_is_imported(path):
    if path.is_relative_to(PACKAGE / "adapters"):
        return
    frameworks = {"torch", "jax", "cupy", "dask", "onnx", "scipy", "matplotlib"}
    assert not {m.split(".")[0] for m in imports(path)} & frameworks


@pytest.mark.parametrize("operator", OPERATORS)
def test_an_operator_is_a_door_and_a_problem(operator):
    """And its name leads to everything else: law, reference, tests, benchmark, example."""
    assert {path.name for path in (PACKAGE / operator).glob("*.py")} == {"__init__.py", "problem.py"}
    for place in (
        f"tests/support/naive/{operator}.py",
        f"tests/ops/test_{operator}.py",
        f"benchmarks/cases/{operator}.py",
    ):
        assert (ROOT / place).exists(), place
    assert "class TestGPU(family_gpu." in (ROOT / f"tests/ops/test_{operator}.py").read_text(encoding="utf-8")
    assert f"`{operator}`" in (ROOT / "docs" / "semantics.md").read_text(encoding="utf-8")
    examples = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "examples").glob("*.py"))
    assert f"numdcn.{operator}_forward" in examples or f"{operator}_forward" in examples
    for suffix in ("forward", "backward"):
        assert hasattr(numdcn, f"{operator}_{suffix}")


@pytest.mark.parametrize("path", [p for p in SOURCES if is_door(p)], ids=name_of)
def test_nothing_compiled_in_an_operators_folder(path):
    for module in imports(path):
        assert module.split(".")[0] != "numba" and not module.startswith(("numdcn._formulas", "numdcn._cache")), module
    assert not [
        n for n in ast.walk(tree(path)) if isinstance(n, ast.FunctionDef) and decorated(n) - {"door", "overload"}
    ]


def decorated(function):
    return {ast.unparse(d).split("(")[0] for d in function.decorator_list}


def functions_of(path):
    return {node.name: node for node in tree(path).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_backward_stands_under_its_forward(operator):
    """In the door and in the naive reference."""
    reference = functions_of(ROOT / "tests" / "support" / "naive" / f"{operator}.py")
    assert reference["forward"].lineno < reference["backward"].lineno
    door = functions_of(PACKAGE / operator / "__init__.py")
    assert door[f"{operator}_forward"].lineno < door[f"{operator}_backward"].lineno


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_few_parameters(path):
    """Ten at most. Doors have as many as their operator, and their references; others say why, after `# parameters:`."""
    if "naive" in path.parts:
        return
    lines, public = path.read_text(encoding="utf-8").splitlines(), is_door(path)
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            a = node.args
            count = len([*a.posonlyargs, *a.args, *a.kwonlyargs])
            if count <= 10 or (public and getattr(node, "name", "_")[0] != "_"):
                continue
            around = lines[node.lineno - 2 : node.body[0].end_lineno] if isinstance(node, ast.FunctionDef) else []
            assert any("# parameters:" in line for line in around), f"{name_of(path)}:{node.lineno}: {count} parameters"


def test_naive_references_never_import_numdcn():
    files = sorted((ROOT / "tests" / "support" / "naive").glob("*.py"))
    assert files
    for path in files:
        assert not [m for m in imports(path) if m.split(".")[0] in ("numdcn", "checks")], name_of(path)


def test_the_emulator_stands_on_its_own():
    """It imports nothing from this repository but itself, and does not mention numdcn."""
    own = {"numdcn", "benchmarks", "examples", "tests", *(path.stem for path in (ROOT / "tests").rglob("*.py"))}
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
    """Compiler flags and decorators live in jit.py; nothing sets numba.config."""
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        assert ("nnan" not in text and "ninf" not in text) or path.stem == "jit", name_of(path)
        if path.stem != "jit":
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


@pytest.mark.parametrize("path", [path for path in ALL if "tests" in path.parts], ids=name_of)
def test_no_time_limit_but_through_limit(path):
    """A literal timeout would be too short on a slow machine."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            waits = node.func.attr in ("alarm", "get", "join", "result", "wait") and len(node.args) == 1
            given = [*node.args * waits, *(k.value for k in node.keywords if k.arg == "timeout")]
            numbers = [a for a in given if isinstance(a, ast.Constant) and isinstance(a.value, (int, float))]
            assert not numbers, f"{name_of(path)}:{node.lineno}: {ast.unparse(node)}"
