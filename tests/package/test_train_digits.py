"""The training example: right gradients, the same bits every time, even after a stop; checkpoints that are never
broken."""

import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from checks import ROOT, assert_same_bits, limit

import numdcn

for package in ("matplotlib", "sklearn", "scipy", "tqdm"):
    pytest.importorskip(package, reason="the examples need the demo extra")
sys.path.append(str(ROOT / "examples"))

import _digits_data as data  # noqa: E402 - after the path
import _digits_net as net  # noqa: E402
import train_digits  # noqa: E402

TINY = train_digits.Settings(epochs=1, seeds=1, train=96, test=8, copies=1)
FIGURES = ["train_digits_curves.png", "train_digits_points.png"]


@pytest.fixture(autouse=True)
def _handlers():
    """The program installs signal handlers."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def tiny(monkeypatch):
    """Makes --quick even quicker: three steps per network."""
    monkeypatch.setattr(train_digits, "QUICK", TINY)


@pytest.fixture
def main(tiny, tmp_path, capsys):
    """Runs the program; returns its exit code and output."""

    def run(*given):
        code = train_digits.main(["--quick", "--out", str(tmp_path / "out"), *map(str, given)])
        return code, capsys.readouterr().out

    return run


def assert_same_state(a, b, name="state"):
    """Equal bit for bit, except for times."""
    assert type(a) is type(b), name
    if isinstance(a, dict):
        assert a.keys() == b.keys(), name
        for key in a.keys() - {"seconds"}:
            assert_same_state(a[key], b[key], f"{name}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), name
        for k, pair in enumerate(zip(a, b, strict=True)):
            assert_same_state(*pair, f"{name}[{k}]")
    elif isinstance(a, np.ndarray):
        assert_same_bits(
            a.astype(np.uint8) if a.dtype == bool else a, b.astype(np.uint8) if b.dtype == bool else b, name
        )
    else:
        assert a == b, name


def loss_of(params, images, labels, layers):
    return net.cross_entropy(net.forward(params, images, layers)[0], labels)[0]


@pytest.mark.parametrize("name", net.NETWORKS)
def test_gradients_against_differences(name):
    """Every parameter's gradient along random directions, in float64, at random offsets and biases."""
    rng = np.random.default_rng(0)
    layers = tuple(layer if layer.name == "linear" else layer._replace(channels=3) for layer in net.NETWORKS[name])
    params = net.create(layers, 0, np.float64)
    for key, value in params.items():
        value += rng.normal(size=value.shape) * (0.3 if ".offset_" in key else 0.1)
    images, labels = rng.random((2, 1, 28, 28)), np.array([3, 7])
    logits, saved = net.forward(params, images, layers)
    grads = net.backward(params, net.cross_entropy(logits, labels)[1], saved, layers)
    assert grads.keys() == params.keys()
    for key, grad in grads.items():
        assert grad.shape == params[key].shape and grad.dtype == np.float64
        # so small a step that no sample crosses a pixel and no ReLU its kink
        direction, step = rng.normal(size=grad.shape), 1e-7
        ends = [loss_of({**params, key: params[key] + s * direction}, images, labels, layers) for s in (step, -step)]
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(np.vdot(grad, direction), rel=1e-5, abs=1e-8), key


def test_both_networks_of_a_seed_begin_as_the_same():
    plain, deformable = net.NETWORKS["plain"], net.NETWORKS["deformable"]
    images = data.posed(data.load()[1], 1).images[:3]
    params = net.create(deformable, 5)
    assert_same_state(net.create(plain, 5), {key: params[key] for key in params if ".offset_" not in key})
    np.testing.assert_allclose(
        net.forward(params, images, deformable)[0], net.forward(params, images, plain)[0], rtol=1e-4, atol=1e-5
    )


def test_the_loss_of_large_logits():
    """Even for logits whose exponentials overflow; its gradient sums to zero."""
    logits = np.array([[0, 0], [1000, -1000], [2, 1]], np.float64)
    loss, grad = net.cross_entropy(logits, np.array([0, 1, 0]))
    assert loss == pytest.approx((np.log(2) + 2000 + np.log1p(np.exp(-1))) / 3)
    np.testing.assert_allclose(grad.sum(axis=1), 0, atol=1e-12)


def test_adam_finds_the_bottom():
    params = {"a.w": np.array([3.0, -2.0]), "a.offset_w": np.array([1.0])}
    adam = net.Adam(params)
    for _ in range(600):
        adam.update(params, {name: 2 * value for name, value in params.items()}, 0.05)
    assert all(np.abs(value).max() < 1e-3 for value in params.values())


def test_train_and_test_digits_are_others():
    train, test = data.load()
    assert len(train.labels) + len(test.labels) == 1797
    known = {image.tobytes() for image in train.images}
    assert not [image for image in test.images if image.tobytes() in known]


def test_poses_move_images_as_they_say():
    """A zero pose keeps the middle; a quarter turn is one; a shift moves down and to the right."""
    images = data.load(2, 1)[0].images
    still = data.transform(images, np.array([[0, 1, 0, 0]] * 2, np.float32))
    np.testing.assert_allclose(still[:, :, 4:24, 4:24], images, atol=1e-5)
    turned = data.transform(images, np.array([[np.pi / 2, 1, 0, 0]] * 2, np.float32))
    np.testing.assert_allclose(turned, np.rot90(still, axes=(2, 3)), atol=1e-3)
    moved = data.transform(images, np.array([[0, 1, 3, 2]] * 2, np.float32))
    np.testing.assert_allclose(moved[:, :, 3:, 2:], still[:, :, :-3, :-2], atol=1e-5)


def test_quick_run_ends_well(tiny, tmp_path, capsys):
    assert train_digits.main(["--quick", "--out", str(tmp_path / "a" / "b")]) == 0
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == FIGURES
    out = capsys.readouterr().out
    for name in net.NETWORKS:
        assert re.search(rf"^\| {name} \| \d+ \| [\d.]+ \| [\d.]+ %", out, re.M), name


def test_quick_says_that_it_is_a_smoke_test_and_leaves_docs_alone(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_digits, "DOCS", tmp_path / "docs")
    assert train_digits.main(["--quick"]) == 0
    assert "smoke test" in capsys.readouterr().out
    assert not (tmp_path / "docs").exists()
    with pytest.raises(SystemExit):
        train_digits.main(["--quick", "--out", str(tmp_path / "docs" / "pictures")])
    assert "smoke test" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train_digits.main(["--help"])
    assert "smoke test" in capsys.readouterr().out
    assert train_digits.arguments([])[0].out == tmp_path / "docs"


@pytest.mark.full
def test_two_runs_and_any_number_of_threads_give_the_same_bits(main, tmp_path):
    threads = numdcn.get_num_threads()
    try:
        for k, count in enumerate((1, 2, 2)):
            numdcn.set_num_threads(count)
            assert main("--checkpoint", tmp_path / f"{k}.npz")[0] == 0
    finally:
        numdcn.set_num_threads(threads)
    states = [train_digits.load(tmp_path / f"{k}.npz") for k in range(3)]
    assert len(states[0]["done"]) == len(net.NETWORKS)
    assert_same_state(states[0], states[1])
    assert_same_state(states[1], states[2])


@pytest.mark.full
def test_stop_and_resume_give_the_same_bits(main, tmp_path):
    """Stopped in the middle of an epoch, at the end of one, repeatedly, and when nothing is left to do."""
    assert main("--epochs", 2, "--checkpoint", tmp_path / "whole.npz")[0] == 0
    parts = ("--epochs", 2, "--checkpoint", tmp_path / "parts.npz")
    code, out = main(*parts, "--stop-after", 2)
    assert code == 130 and "--resume" in out
    for steps in (1, 4, 13):
        assert main(*parts, "--resume", "--stop-after", steps)[0] == 130
    assert train_digits.load(tmp_path / "parts.npz")["run"]["batch"] == (2 + 1 + 4 + 13) % 3
    assert main(*parts, "--resume")[0] == 0
    whole, done = (train_digits.load(tmp_path / f"{name}.npz") for name in ("whole", "parts"))
    assert_same_state(whole, done)
    code, out = main(*parts, "--resume")
    assert code == 0 and "| deformable |" in out


def test_resuming_with_other_settings_is_refused(main, tmp_path):
    path = tmp_path / "c.npz"
    assert main("--checkpoint", path, "--stop-after", 1)[0] == 130
    with pytest.raises(SystemExit, match="was written with"):
        main("--checkpoint", path, "--resume", "--epochs", 3)


@pytest.mark.parametrize(
    "given", [["--resume"], ["--checkpoint", "no such file", "--resume"], ["--epochs", "0"], ["--stop-after", "3"]]
)
def test_wrong_options_are_named(given, capsys):
    with pytest.raises(SystemExit):
        train_digits.main(given)
    assert given[-1 if given[-1].startswith("--") else -2] in capsys.readouterr().err


@pytest.mark.parametrize("broken", ["savez", "fsync", "replace"])
def test_an_interrupted_checkpoint_leaves_the_old_one(broken, tmp_path, monkeypatch):
    path = tmp_path / "c.npz"
    state = {"done": [{"params": {"a": np.arange(3.0)}, "n": 2**100}], "run": None}
    train_digits.save(path, state)

    def savez(file, **_):
        file.write(b"half of it")
        raise KeyboardInterrupt

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(*{"savez": (np, "savez", savez)}.get(broken, (os, broken, fail)))
    with pytest.raises(KeyboardInterrupt):
        train_digits.save(path, {"done": []})
    monkeypatch.undo()
    assert_same_state(train_digits.load(path), state)
    train_digits.save(path, {"done": []})
    assert train_digits.load(path) == {"done": []}


@pytest.mark.full
@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent otherwise there")
def test_killed_at_any_time_it_goes_on_from_a_whole_checkpoint(tmp_path):
    """Ctrl-C ends it cleanly; a kill leaves the last checkpoint."""
    path = tmp_path / "c.npz"
    command = [sys.executable, str(ROOT / "examples" / "train_digits.py"), "--quick", "--epochs", "500"]
    command += ["--checkpoint", str(path), "--out", str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    for more, number, code in (([], signal.SIGINT, 130), (["--resume"], signal.SIGKILL, -signal.SIGKILL)):
        before = path.stat().st_mtime_ns if path.exists() else 0
        process = subprocess.Popen([*command, *more], env=env, stdout=subprocess.DEVNULL)
        try:
            until = time.monotonic() + limit(90)
            while not path.exists() or path.stat().st_mtime_ns == before:
                assert process.poll() is None and time.monotonic() < until
                time.sleep(0.02)
            process.send_signal(number)
            assert process.wait(limit(60)) == code
        finally:
            process.kill()
            process.wait()
        assert train_digits.load(path)["run"]["adam"]["steps"] > 0
