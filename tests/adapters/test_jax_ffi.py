"""The handler of XLA's FFI: structures of XLA's that do not fit, errors, interrupts."""

import ctypes
import signal

import numpy as np
import pytest
from checks import run_python

jax = pytest.importorskip("jax", reason="JAX is not installed")

import llvmlite.binding as llvm  # noqa: E402 - after the skip

from numdcn.adapters.jax import _ffi  # noqa: E402

ERROR = 4096  # the address of every error that the stand-in for XLA makes


class Xla:
    """A call as XLA makes it, of one array in and one out."""

    def __init__(self, run):
        self.messages, self.codes = [], []
        kind = dict(_ffi._Api._fields_)["new_error"]
        self.new_error = kind(self.note)
        self.api = _ffi._Api(new_error=self.new_error)
        self.arrays = [np.arange(6, dtype=np.float32).reshape(2, 3), np.zeros((2, 3), np.float32)]
        self.dims = (ctypes.c_int64 * 2)(2, 3)
        self.buffers = [
            _ffi._Buffer(dtype=11, address=a.ctypes.data, rank=2, dims=ctypes.addressof(self.dims)) for a in self.arrays
        ]
        self.text = ctypes.create_string_buffer(b"words")
        self.span = _ffi._Text(ctypes.addressof(self.text), 5)
        self.frame = _ffi._Frame(size=ctypes.sizeof(_ffi._Frame), api=ctypes.pointer(self.api), stage=3)
        for place, buffer in (("inputs", self.buffers[0]), ("outputs", self.buffers[1])):
            setattr(self, place, ctypes.pointer(ctypes.pointer(buffer)))
            made = _ffi._Buffers(size=ctypes.sizeof(_ffi._Buffers), count=1, items=getattr(self, place))
            setattr(self.frame, place, made)
        self.kinds = (ctypes.c_int * 1)(4)
        self.values = ctypes.pointer(ctypes.pointer(self.span))
        self.frame.attributes = _ffi._Attributes(
            size=ctypes.sizeof(_ffi._Attributes), count=1, kinds=self.kinds, values=self.values
        )
        self.address = _ffi.handler(run)

    def note(self, error):
        self.messages.append(error.contents.message.decode())
        self.codes.append(error.contents.code)
        return ERROR

    def call(self, address=None):
        """What the handler returns: 0 or an error."""
        return ctypes.CFUNCTYPE(ctypes.c_size_t, ctypes.c_void_p)(address or self.address)(ctypes.addressof(self.frame))


def double(text, inputs, outputs):
    assert text == "words"
    np.multiply(inputs[0], 2, out=outputs[0])


def test_arrays_are_seen_where_they_are():
    xla = Xla(double)
    assert xla.call() == 0 and not xla.messages
    np.testing.assert_array_equal(xla.arrays[1], 2 * xla.arrays[0])


@pytest.mark.parametrize("kind, code", [(ValueError, 3), (TypeError, 3), (MemoryError, 13), (SystemExit, 13)])
def test_errors_become_those_of_xla(kind, code):
    def run(text, inputs, outputs):
        raise kind("`w` is \0 odd")

    xla = Xla(run)
    assert xla.call() == ERROR
    assert (xla.messages, xla.codes) == ([f"{kind.__name__}: `w` is  odd"], [code])


@pytest.mark.parametrize("part", ["inputs", "outputs", "attributes", "frame"])
def test_another_layout_is_an_error(part):
    xla = Xla(double)
    struct = xla.frame if part == "frame" else getattr(xla.frame, part)
    struct.size -= 8
    assert xla.call() == ERROR and "another FFI" in xla.messages[0]
    struct.size += 8
    assert xla.call() == 0
    xla.frame.attributes.count = 0
    assert xla.call() == ERROR and "one attribute" in xla.messages[1]
    assert not np.array_equal(xla.arrays[1], xla.arrays[0])


def test_only_the_last_stage_runs():
    xla = Xla(double)
    xla.frame.stage = 1
    assert xla.call() == 0 and not xla.arrays[1].any()


def test_the_version_is_told():
    xla = Xla(double)
    metadata = _ffi._Metadata(version=_ffi._Version(size=ctypes.sizeof(_ffi._Version), major=9, minor=9))
    extension = _ffi._Extension(kind=1, metadata=ctypes.pointer(metadata))
    xla.frame.extension = ctypes.pointer(extension)
    assert xla.call() == 0
    assert (metadata.version.major, metadata.version.minor) == (0, 1)
    assert not xla.arrays[1].any()
    metadata.version = _ffi._Version(size=8, major=9, minor=9)  # unknown: nothing is written
    assert xla.call() == 0 and metadata.version.major == 9


def interrupting(address):
    """The address of code that asks for an interrupt, as a signal that came while XLA was working, and then calls the
    handler. Python raises KeyboardInterrupt before the first instruction that it runs there."""
    pending = ctypes.cast(ctypes.pythonapi.PyErr_SetInterrupt, ctypes.c_void_p).value
    code = f"""
    define i64 @both(i64 %frame) {{
      call void inttoptr (i64 {pending} to ptr)()
      %given = call i64 inttoptr (i64 {address} to ptr)(i64 %frame)
      ret i64 %given
    }}"""
    machine = llvm.Target.from_default_triple().create_target_machine()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(code), machine)
    engine.finalize_object()
    return engine, engine.get_function_address("both")


@pytest.fixture
def python_handles_interrupts():
    """Other libraries may have replaced the handler."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("python_handles_interrupts")
def test_an_interrupt_before_the_first_instruction(monkeypatch):
    """XLA gets an error, never an undefined result, and the caller its KeyboardInterrupt."""
    xla, results = Xla(double), []
    kept, address = interrupting(xla.address)
    monkeypatch.setattr("sys.unraisablehook", lambda *_: None)
    for _ in range(20):
        with pytest.raises(KeyboardInterrupt):
            results.append(xla.call(address))
            for _ in range(1000):  # it comes between two of these instructions
                pass
        assert xla.messages.pop() == "KeyboardInterrupt: "
    assert not results or set(results) == {ERROR}
    assert not xla.arrays[1].any() and kept


@pytest.mark.usefixtures("python_handles_interrupts")
def test_an_interrupt_within():
    def run(text, inputs, outputs):
        raise KeyboardInterrupt

    xla = Xla(run)
    with pytest.raises(KeyboardInterrupt):
        xla.call()
        for _ in range(1000):
            pass
    assert xla.messages == ["KeyboardInterrupt: "]


INTERRUPTED = """
import os, random, signal, threading, time
import numpy as np, jax
import numdcn.adapters.jax as adapter

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have told its background to ignore it
rng = np.random.default_rng(0)
x, w = rng.standard_normal((1, 4, 9, 9)).astype(np.float32), rng.standard_normal((4, 4, 3, 3)).astype(np.float32) / 6
f = jax.jit(lambda x: jax.lax.fori_loop(0, 20, lambda i, x: adapter.conv(x, w, padding=1), x))
expected = np.asarray(f(x))
wanted, done = threading.Event(), threading.Event()


def send():
    random.seed(0)
    while True:
        wanted.wait()
        wanted.clear()
        while not done.is_set():  # again, should a destructor have swallowed it
            time.sleep(random.random() * 0.003)
            os.kill(os.getpid(), signal.SIGINT)
            done.wait(1)


threading.Thread(target=send, daemon=True).start()
right, caught, errors, lost = 0, 0, [], 0
for _ in range(200):
    done.clear()
    wanted.set()
    try:
        try:
            while True:
                assert np.array_equal(f(x), expected)
                right += 1
        except (RuntimeError, ValueError) as error:  # of the call, or of reading its result
            errors.append(str(error))
            time.sleep(0.5)  # the interrupt comes here at the latest
            lost += 1
    except KeyboardInterrupt:
        done.set()
        caught += 1
assert all("KeyboardInterrupt" in error for error in errors), errors
assert (caught, lost) == (200, 0) and right, (caught, lost, right)
assert np.array_equal(f(x), expected)
print("right", len(errors))
"""


def test_interrupts_in_a_program():
    """Signals at any moment: results are right or there is an exception, and the process lives."""
    done = run_python(INTERRUPTED)
    assert done.stdout.startswith("right"), done.stderr


def test_leaving_while_programs_run():
    """Python may end while programs that were dispatched are running."""
    done = run_python(
        """
        import numpy as np, jax
        import numdcn.adapters.jax as adapter
        f = jax.jit(lambda x, w: jax.lax.fori_loop(0, 300, lambda i, x: adapter.conv(x, w, padding=1), x))
        x, w = np.ones((1, 4, 40, 40), np.float32), np.ones((4, 4, 3, 3), np.float32) / 36
        results = [f(x, w) for _ in range(3)]
        print("left", flush=True)
    """.replace("\n        ", "\n")
    )
    assert done.stdout.split() == ["left"]


def test_without_the_ffi():
    """By the environment variable, or because registering fails."""
    done = run_python(
        """
        import jax, numpy as np, sys
        if sys.argv[1]:
            def fail(*args, **keywords):
                raise RuntimeError("another version")
            jax.ffi.register_ffi_target = fail
        import numdcn.adapters.jax as adapter
        x = np.ones((1, 1, 3, 3), np.float32)
        f = jax.jit(lambda x: adapter.conv(x, x))
        assert "ffi_call" not in str(jax.make_jaxpr(f)(x)) and "pure_callback" in str(jax.make_jaxpr(f)(x))
        assert f(x) == 9 and jax.grad(lambda x: f(x).sum())(x)[0, 0, 0, 0] == 2
    """.replace("\n        ", "\n"),
        "fail",
        NUMDCN_JAX_CALLBACK=None,
    )
    assert not done.stderr.strip() or "Error" not in done.stderr
    run_python(
        """
        import numdcn.adapters.jax as adapter
        assert not adapter._traced.FFI
    """.replace("\n        ", "\n"),
        NUMDCN_JAX_CALLBACK=1,
    )
