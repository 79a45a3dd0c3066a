"""Compiled kernels on disk: never those of another source, another kernel or a damaged file, and no disk is an error.

Tests of sources edit a copy of the package; tests of files that need no code use only `_cache.Store`."""

import hashlib
import os
import pathlib
import shutil
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numba
import pytest
from checks import run_python

import numdcn
from numdcn import _cache
from numdcn._cpu import images, jit

PACKAGE = pathlib.Path(numdcn.__file__).parent
SAMPLE = """
import numpy as np, numdcn
x = np.arange(9, dtype=np.float32).reshape(1, 1, 3, 3)
print("y", numdcn.bilinear_sample_forward(x, np.array([[[0.25, 0.5]]], np.float32)).item())
"""
CLEAR = """
import numpy as np; from numdcn._cpu.threads import launch
from numdcn._cpu.images import ClearCall, clear
def zeroed(dtype):
    a = np.ones(7, dtype)
    launch(clear, a.dtype.type(1), ClearCall(a.ctypes.data, a.size), 1)
    return float(a.sum())
"""


@pytest.fixture
def site(tmp_path):
    """A folder with a copy of the package."""
    shutil.copytree(PACKAGE, tmp_path / "site" / "numdcn", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "site"


def run_copy(site, code):
    """The output of a program that imports the copy; compiled code is stored next to it."""
    environment = {"NUMBA_CACHE_DIR": site.parent / "cache", "PYTHONDONTWRITEBYTECODE": 1}
    done = run_python(f"import sys; sys.path.insert(0, {str(site)!r})\n{code}\nprint(numdcn.__file__)", **environment)
    assert str(site) in done.stdout, done.stdout
    return done.stdout


def edit(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{path} has {text.count(old)} times {old!r}"
    path.write_text(text.replace(old, new), encoding="utf-8")


def kept(folder, kernel=""):
    """The files of compiled code, of one kernel if named, and when each was written."""
    return {path: path.stat().st_mtime_ns for path in pathlib.Path(folder).rglob(f"*{kernel}-*.nbc")}


# Sources.


@pytest.mark.full
def test_an_edited_formula_is_compiled(site):
    """The formula is in a different file than the kernel."""
    assert "y 1.25" in run_copy(site, SAMPLE)
    formula = "rest_y * fraction_x, fraction_y * rest_x"
    edit(site / "numdcn/_formulas/bilinear.py", formula, "fraction_y * rest_x, rest_y * fraction_x")
    assert "y 1.75" in run_copy(site, SAMPLE)


@pytest.mark.full
def test_a_tuple_that_gets_a_field(site):
    """Old code would mix up the fields of the new tuple, and use numbers as addresses."""
    code = """
import numpy as np
import numdcn
x, rois = np.ones((1, 8, 9, 9), np.float32), np.array([[0, 0, 0, 8, 8]], np.float32)
print("y", numdcn.ps_roi_align_forward(x, rois, output_size=2).tolist())
"""
    right = f"y {[[[[1.0] * 2] * 2] * 2]}"
    assert right in run_copy(site, code)
    edit(site / "numdcn/_cpu/roi/bins.py", "    pitch: int  #", "    spare: int\n    pitch: int  #")
    edit(site / "numdcn/_cpu/roi/run.py", "columns, _pitch(p)", "columns, 0, _pitch(p)")
    assert right in run_copy(site, code)


@pytest.mark.full
def test_a_source_that_changes_after_it_was_imported(site):
    """What this process compiles comes from the old text, and is not stored as code of the new one."""
    formula = "rest_y * fraction_x, fraction_y * rest_x"
    change = f"""
import numdcn, pathlib
path = pathlib.Path({str(site)!r}, "numdcn/_formulas/bilinear.py")
path.write_text(path.read_text().replace({formula!r}, "fraction_y * rest_x, rest_y * fraction_x"))
"""
    assert "y 1.25" in run_copy(site, change + SAMPLE)
    assert not kept(site.parent)
    assert "y 1.75" in run_copy(site, SAMPLE)


def test_folders_of_other_sources_are_removed(monkeypatch, tmp_path):
    """All but the few most recently used, and nothing that does not belong to the cache."""
    store = _cache.Store("cpu", "1")
    monkeypatch.setattr(_cache, "_places", lambda: [str(tmp_path)])
    others = [f"numdcn-cpu-{number:016x}" for number in range(9)]
    foreign = ["numdcn-cpu-notes", "numdcn-cuda-0123456789abcdef", "other"]
    for age, name in enumerate([*foreign, *others]):
        (tmp_path / name).mkdir()
        (tmp_path / name / "kernel.nbc").write_bytes(b"")
        if name == others[8]:
            (tmp_path / name / "letter").write_text("of somebody else")
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    store.write("a.nbc", b"content")
    assert store.read("a.nbc") == b"content"
    own = pathlib.Path(store.folders()[0]).name
    assert {path.name for path in tmp_path.iterdir()} == {own, *foreign, *others[: _cache.KEPT - 1], others[8]}
    assert [path.name for path in (tmp_path / others[8]).iterdir()] == ["letter"]


def test_what_killed_processes_left_is_removed(monkeypatch, tmp_path):
    monkeypatch.setattr(_cache, "_places", lambda: [str(tmp_path)])
    folder = pathlib.Path(_cache.Store("cpu").folders()[0])
    folder.mkdir()
    for name, age in ("old.nbc.0.tmp", 2 * _cache.ABANDONED), ("new.nbc.0.tmp", 0), ("old.nbc", 2 * _cache.ABANDONED):
        (folder / name).write_bytes(b"")
        os.utime(folder / name, (time.time() - age,) * 2)
    _cache.Store("cpu").write("a.nbc", b"")
    assert {path.name for path in folder.iterdir()} == {"new.nbc.0.tmp", "old.nbc", "a.nbc"}


def test_the_versions_that_compile_belong_to_the_name():
    names = {_cache.Store("cpu", *versions).folders()[0] for versions in [(), ("1",), ("2",), ("1", "2")]}
    assert len(names) == 4


def test_the_report_tells_the_folder(tmp_path):
    code = CLEAR + "zeroed('f4'); from numdcn.__main__ import report; print(dict(report())['cache folder'])"
    told = run_python(code, NUMBA_CACHE_DIR=tmp_path).stdout.strip()
    assert {str(path.parent) for path in kept(tmp_path)} == {told} and "numdcn-cpu-" in told


# One file per kernel.


@pytest.mark.full
def test_builds_with_other_options_or_settings_share_nothing(tmp_path):
    """Division by zero is an error or infinity, as each process requests; Numba's optimisation level counts too."""
    code = """
import sys
import numba
from numdcn import _cache
from numdcn._cpu import jit
def divide(a, b):
    return a / b
divide.__module__ = "numdcn.divide"
sys.modules["numdcn.divide"] = sys.modules["__main__"]
dispatcher = numba.njit(error_model=sys.argv[1])(divide)
_cache.attach(jit.STORE, dispatcher, jit._pack, jit._unpack)
try:
    print(dispatcher(1.0, 0.0))
except ZeroDivisionError:
    print("error")
print("hits", sum(dispatcher.stats.cache_hits.values()))
"""

    def run(model, **environment):
        return run_python(code, model, NUMBA_CACHE_DIR=tmp_path, **environment).stdout.split()

    assert run("numpy") == ["inf", "hits", "0"]
    assert run("python") == ["error", "hits", "0"]
    assert run("numpy", NUMBA_OPT=0) == ["inf", "hits", "0"]
    for model, result in ("numpy", "inf"), ("python", "error"):
        assert run(model) == [result, "hits", "1"]


def test_constants_that_have_a_name():
    from numba import types

    constants = [True, 1, 0, False, types.int64, types.float32, float, int]
    assert len({_cache._constant(constant) for constant in constants}) == len(constants)
    for constant in (1.5, "word", object(), lambda: None):
        with pytest.raises(TypeError, match="expected ints"):
            _cache._constant(constant)


def test_code_of_other_packages_is_not_kept():
    """The folder is not named after its sources."""

    def function():
        pass

    assert type(jit.kernel(function)._cache).__name__ == "NullCache"
    function.__module__ = "numdcn.part"
    assert isinstance(jit.kernel(function)._cache, _cache.KernelCache)


def test_code_that_holds_addresses_is_not_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(_cache, "_places", lambda: [str(tmp_path)])
    images.clear._cache.save_overload((), SimpleNamespace(library=SimpleNamespace(has_dynamic_globals=True)))
    assert not list(tmp_path.iterdir())


@pytest.mark.full
def test_the_cache_of_a_dispatcher_can_be_emptied_and_disabled(tmp_path):
    """`recompile` empties it, for this kernel only."""
    code = CLEAR + "import numdcn; numdcn.conv_forward(np.ones((1, 1, 2, 2)), np.ones((1, 1, 1, 1)))\n"
    run_python(code + "zeroed('f4')", NUMBA_CACHE_DIR=tmp_path)
    before = kept(tmp_path)
    run_python(code + "zeroed('f4'); clear.recompile(); clear._cache.disable(); zeroed('f8')", NUMBA_CACHE_DIR=tmp_path)
    after = kept(tmp_path)
    assert before.keys() == after.keys() and len(before) > 2
    assert [path.name.partition("-")[0] for path in before if before[path] != after[path]] == ["_cpu.images.clear"]


def test_numba_without_its_compiler():
    run_python("import numdcn", NUMBA_DISABLE_JIT=1)


@pytest.mark.full
def test_processes_that_compile_at_once(tmp_path):
    """Each gets its own kernel, and so does one that comes later."""
    code = CLEAR + "print(zeroed('f4'), zeroed('f8'), sum(clear.stats.cache_hits.values()))"
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(run_python, code, NUMBA_CACHE_DIR=tmp_path) for _ in range(4)]
        assert all(job.result().stdout.startswith("0.0 0.0") for job in jobs)
    assert len(kept(tmp_path, "clear")) == 2
    assert run_python(code, NUMBA_CACHE_DIR=tmp_path).stdout == "0.0 0.0 2\n"


def test_processes_that_write_the_same_files(tmp_path):
    """A reader finds a whole file or none."""
    code = """
import random, sys, time
from numdcn import _cache
_cache._places = lambda: [sys.argv[1]]
store, chance = _cache.Store("cpu"), random.Random(int(sys.argv[2]))
end = time.monotonic() + 0.4
while time.monotonic() < end:
    name = chance.choice("abc")
    store.write(name, name.encode() * chance.choice([1, 10, 100_000]))
    content = store.read(name)
    assert content and set(content.decode()) == {name}
assert not _cache._warned
"""
    with ThreadPoolExecutor(4) as pool:
        for job in [pool.submit(run_python, code, tmp_path, seed) for seed in range(4)]:
            job.result()
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["a", "b", "c"]


# Disks.


def told_once(done):
    """The single warning of a process."""
    assert done.stderr.count("Warning: numdcn") == 1, done.stderr
    return done.stderr


def damages(content):
    """Truncated, empty, with a flipped bit."""
    middle = len(content) // 2
    yield from (content[:middle], b"", content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


def test_damaged_files_are_seen(monkeypatch, tmp_path):
    store = _cache.Store("cpu")
    monkeypatch.setattr(_cache, "_places", lambda: [str(tmp_path)])
    monkeypatch.setattr(_cache, "_warned", True)
    store.write("a.nbc", b"content")
    path = pathlib.Path(store.folders()[0], "a.nbc")
    for damaged in damages(path.read_bytes()):
        path.write_bytes(damaged)
        assert store.read("a.nbc") is None
    store.write("a.nbc", b"content")
    assert store.read("a.nbc") == b"content"


@pytest.mark.full
def test_damaged_kernels_are_replaced(tmp_path):
    """They are recompiled, with one warning per process, and the next process finds them intact."""
    code = CLEAR + "print(zeroed('f4'), zeroed('f8'))"
    run_python(code, NUMBA_CACHE_DIR=tmp_path)
    kernels = sorted(kept(tmp_path, "clear"))
    for path, damaged in zip(kernels, damages(kernels[0].read_bytes())):
        path.write_bytes(damaged)
    damaged = kept(tmp_path, "clear")
    done = run_python(code, NUMBA_CACHE_DIR=tmp_path)
    assert "is damaged" in told_once(done) and done.stdout == "0.0 0.0\n"
    whole = kept(tmp_path, "clear")
    assert whole.keys() == damaged.keys() and not whole.items() & damaged.items()
    done = run_python(code, NUMBA_CACHE_DIR=tmp_path)
    assert done.stdout == "0.0 0.0\n" and not done.stderr and kept(tmp_path, "clear") == whole


def test_a_file_that_is_something_else(tmp_path):
    """Its checksum is right, but it does not contain a kernel."""
    code = CLEAR + "print(zeroed('f4'))"
    run_python(code, NUMBA_CACHE_DIR=tmp_path)
    (path,) = kept(tmp_path, "clear")
    _cache._write(str(path), hashlib.sha256(b"else").digest() + b"else")
    done = run_python(code, NUMBA_CACHE_DIR=tmp_path)
    assert "cannot be loaded" in told_once(done) and done.stdout == "0.0\n"


@pytest.mark.skipif(
    sys.platform == "win32", reason="a limit on the size of files stands for a full disk, as Unix has it"
)
def test_a_full_disk(tmp_path):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
    code = limit + CLEAR + "print(zeroed('f4'), zeroed('f8'))"
    done = run_python(code, NUMBA_CACHE_DIR=tmp_path, PYTHONDONTWRITEBYTECODE=1)
    assert done.stdout == "0.0 0.0\n" and "NUMBA_CACHE_DIR" in told_once(done)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    done = run_python(CLEAR + "print(zeroed('f4'), zeroed('f8'))", NUMBA_CACHE_DIR=tmp_path / "file" / "below")
    assert done.stdout == "0.0 0.0\n" and "NUMBA_CACHE_DIR" in told_once(done)


def test_a_folder_that_is_removed_meanwhile(tmp_path):
    code = CLEAR + "import shutil, sys; print(zeroed('f4')); shutil.rmtree(sys.argv[1]); print(zeroed('f8'))"
    done = run_python(code, tmp_path / "cache", NUMBA_CACHE_DIR=tmp_path / "cache")
    assert done.stdout == "0.0\n0.0\n" and not done.stderr and len(kept(tmp_path)) == 1


def test_the_next_place_is_taken(monkeypatch, tmp_path):
    """Kernels shipped with the package, in a read-only folder, are read; others go to the user's folder."""
    store = _cache.Store("cpu")
    (tmp_path / "first").mkdir()
    monkeypatch.setattr(_cache, "_places", lambda: [str(tmp_path / "first"), str(tmp_path / "second")])
    store.write("a.nbc", b"a")
    monkeypatch.setattr(
        _cache, "_places", lambda: [str(tmp_path / "file"), str(tmp_path / "first"), str(tmp_path / "second")]
    )
    (tmp_path / "file").write_text("")
    store.write("b.nbc", b"b")
    assert (store.read("a.nbc"), store.read("b.nbc"), store.read("c.nbc")) == (b"a", b"b", None)
    assert store.writable() == store.folders()[1]


def test_a_file_that_cannot_be_replaced(monkeypatch, tmp_path):
    """As on Windows, while another process reads it: nothing is stored and nothing is left behind."""
    store = _cache.Store("cpu")
    monkeypatch.setattr(_cache, "_places", lambda: [str(tmp_path)])
    monkeypatch.setattr(_cache, "_warned", True)
    store.write("a.nbc", b"a")
    with monkeypatch.context() as context:
        context.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(PermissionError("in use")))
        store.write("a.nbc", b"b")
    assert [path.name for path in pathlib.Path(store.folders()[0]).iterdir()] == ["a.nbc"]
    assert store.read("a.nbc") == b"a"


@pytest.mark.full
def test_a_package_in_an_archive(site):
    code = (
        SAMPLE
        + "from numdcn._cpu.points.kernels import forward_tiles as f; print('hits', sum(f.stats.cache_hits.values()))"
    )
    archive = pathlib.Path(shutil.make_archive(str(site.parent / "archive"), "zip", site))
    for hits in 0, 1:
        told = run_copy(archive, code)
        assert "y 1.25" in told and f"hits {hits}" in told


def test_a_package_without_sources(monkeypatch, tmp_path):
    """Nothing is stored, as nothing distinguishes versions."""
    monkeypatch.setattr(_cache, "_AT_IMPORT", {})
    monkeypatch.setattr(_cache, "_places", lambda: [str(tmp_path)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _cache.Store("cpu").write("a.nbc", b"a")
    assert _cache.Store("cpu").read("a.nbc") is None and not list(tmp_path.iterdir())


def test_helpers_are_named_with_their_constants():
    """Kernels may contain functions made for their constants, and these may contain others."""

    def helper(constant, package="numdcn"):
        def function():
            return constant

        function.__module__ = f"{package}.helpers"
        return numba.njit(function)

    names = [_cache._constant(helper(constant)) for constant in (1, 2, True, numba.float32, helper(1), helper(2))]
    assert len(set(names)) == len(names) and _cache._constant(helper(helper(2))) == names[-1]
    assert "0x" not in "".join(names)
    for function in (helper(1.5), helper(helper(1.5)), helper(1, package="elsewhere")):
        with pytest.raises(TypeError, match="expected ints"):
            _cache._constant(function)
