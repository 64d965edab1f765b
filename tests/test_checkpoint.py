"""Checkpoints: whole or absent, whatever happens while they are written."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anert import checkpoint
from anert.errors import AnertError, InputError, NativeError, NonFiniteError
from anert.tokenizer import ByteBPETokenizer, load_tokenizer

ROOT = Path(__file__).resolve().parents[1]


def tensors(seed=0):
    rng = np.random.default_rng(seed)
    return {"wq": rng.standard_normal((3, 5), np.float32), "norm": rng.standard_normal(5).astype(np.float16)}


def save(run, step, seed=None, **more):
    model = tensors(step if seed is None else seed)
    return checkpoint.save(run, step, model, {"wq.m": model["wq"] * 2}, {"loss": 1.5, "step_ms": [1, 2]}, **more)


def names(run):
    return sorted(p.name for p in run.iterdir())


def test_what_is_saved_is_loaded(tmp_path):
    tokenizer = ByteBPETokenizer.train(["once upon a time"], 270)
    state = {
        "lr": 0.1 + 0.2,
        "nan": float("nan"),
        "n": np.int64(7),
        "cursor": {"windows": 5},
        "path": Path("x"),
        "list": (1, 2),
    }
    path = checkpoint.save(tmp_path / "run", 1000, tensors(), {"wq.m": tensors()["wq"]}, state, tokenizer, best=True)
    assert path == tmp_path / "run" / "step-00001000"
    assert names(path) == ["model.safetensors", "optim.safetensors", "state.json", "tokenizer.json"]
    assert names(tmp_path / "run") == ["best", "last", "step-00001000"]
    for where in (path, tmp_path / "run", tmp_path / "run" / "best", tmp_path / "run" / "last"):
        found = checkpoint.load(where)
        assert (found.step, found.path, found.skipped) == (1000, path, [])
        assert found.state == {
            "lr": 0.1 + 0.2,
            "nan": None,
            "n": 7,
            "cursor": {"windows": 5},
            "path": "x",
            "list": [1, 2],
        }
        assert found.model.keys() == tensors().keys() and found.optim.keys() == {"wq.m"}
        for name, tensor in tensors().items():
            assert found.model[name].dtype == tensor.dtype and (found.model[name] == tensor).all()
    assert load_tokenizer(found.tokenizer_path).hash == tokenizer.hash


def test_other_programs_can_read_the_tensors(tmp_path):
    torch = pytest.importorskip("torch")
    safetensors_torch = pytest.importorskip("safetensors.torch")
    found = safetensors_torch.load_file(save(tmp_path, 3) / "model.safetensors")
    assert torch.equal(found["wq"], torch.tensor(tensors(3)["wq"]))


def test_views_are_saved_by_value(tmp_path):
    wide = np.arange(40, dtype=np.float32).reshape(4, 10)
    checkpoint.save(tmp_path, 1, {"t": wide.T, "part": wide[:, 2:5]}, {}, {})
    found = checkpoint.load(tmp_path)
    assert (found.model["t"] == wide.T).all() and (found.model["part"] == wide[:, 2:5]).all() and found.optim == {}
    assert found.tokenizer_path is None


def test_a_llama_tokenizer_goes_along_as_it_was(shared_data, tmp_path):
    source = shared_data / "llama2c" / "tok512.bin"
    path = save(tmp_path, 1, tokenizer=load_tokenizer(source))
    assert (path / "tokenizer.bin").read_bytes() == source.read_bytes()


@settings(deadline=None, max_examples=30)
@given(st.lists(st.booleans(), min_size=1, max_size=8), st.integers(0, 4))
def test_the_newest_and_the_best_are_kept(tmp_path_factory, bests, keep):
    run = tmp_path_factory.mktemp("run")
    for step, best in enumerate(bests):
        save(run, step, best=best, keep=keep)
    steps = {int(n[5:]) for n in names(run) if n.startswith("step-")}
    best_step = max([i for i, b in enumerate(bests) if b], default=None)
    expected = set(range(len(bests))[-max(1, keep) :]) | ({best_step} - {None})
    assert steps == expected
    assert checkpoint.load(run).step == len(bests) - 1
    if best_step is not None:
        assert checkpoint.load(run / "best").step == best_step
    assert not [n for n in names(run) if n.startswith(".")]


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 5, seed=1)
    save(tmp_path, 5, seed=2)
    assert (checkpoint.load(tmp_path).model["wq"] == tensors(2)["wq"]).all() and names(tmp_path) == [
        "last",
        "step-00000005",
    ]


def test_killed_between_putting_aside_and_replacing(tmp_path):
    path = save(tmp_path, 5, seed=1)
    aside = path.with_name(f".{path.name}{checkpoint.ASIDE}")
    path.rename(aside)
    assert (checkpoint.load(tmp_path).model["wq"] == tensors(1)["wq"]).all()
    save(tmp_path, 6)
    assert names(tmp_path) == ["last", "step-00000005", "step-00000006"]
    assert checkpoint.load(path).step == 5


# ---- damage


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "flipped bit": (lambda p: flip(p / "model.safetensors", -3), "model.safetensors differs from its sha256"),
    "truncated": (
        lambda p: os.truncate(p / "optim.safetensors", 20),
        "optim.safetensors has 20 bytes, state.json says",
    ),
    "file gone": (lambda p: (p / "model.safetensors").unlink(), "model.safetensors: No such file"),
    "state gone": (lambda p: (p / "state.json").unlink(), "it was not finished"),
    "state cut": (lambda p: os.truncate(p / "state.json", 50), "state.json is damaged"),
    "state a list": (lambda p: (p / "state.json").write_text("[1]"), "state.json is damaged"),
    "size in words": (
        lambda p: (p / "state.json").write_text(
            (p / "state.json").read_text().replace('"size": ', '"size": "a" , "x": ')
        ),
        "state.json is damaged",
    ),
    "state empty": (lambda p: (p / "state.json").write_text("{}"), "state.json is damaged"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_and_the_newest_whole_one_taken(tmp_path, kind):
    harm, says = DAMAGE[kind]
    save(tmp_path, 1)
    save(tmp_path, 2)
    newest = save(tmp_path, 3)
    harm(newest)
    with pytest.raises(InputError, match=says):
        checkpoint.load(newest)
    found = checkpoint.load(tmp_path)
    assert found.step == 2 and [p for p, _ in found.skipped] == [newest] and says.split()[0] in found.skipped[0][1]
    for step in (1, 2):
        harm(tmp_path / f"step-{step:08d}")
    with pytest.raises(InputError, match="none of 3 checkpoints is whole; the newest, step-00000003"):
        checkpoint.load(tmp_path)


def test_a_file_outside_the_directory_is_not_followed(tmp_path):
    path = save(tmp_path, 1)
    state = json.loads((path / "state.json").read_text())
    state["files"]["../secret"] = {"size": 0, "sha256": ""}
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match="damaged"):
        checkpoint.load(path)


def test_a_newer_format_is_refused_by_name(tmp_path):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state | {"format_version": 2}))
    for where in (path, tmp_path):
        with pytest.raises(InputError, match="step-00000002: checkpoint format 2, this anert reads up to 1"):
            checkpoint.load(where)


def test_nothing_there(tmp_path):
    for where, says in (
        (tmp_path / "none", "no run directory"),
        (tmp_path, "no checkpoint"),
        (tmp_path / "step-1", "no such"),
    ):
        with pytest.raises(InputError, match=says):
            checkpoint.load(where)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_never_saved(tmp_path, bad):
    save(tmp_path, 1)
    model = tensors()
    model["wq"][1, 2] = bad
    with pytest.raises(NonFiniteError, match=r"wq\[1, 2\] is (nan|-?inf)"):
        checkpoint.save(tmp_path, 2, model, {}, {})
    with pytest.raises(NonFiniteError, match="optimizer state m"):
        checkpoint.save(tmp_path, 2, {}, {"m": model["wq"]}, {})
    both = np.array([np.inf, -np.inf, 1], np.float32)
    with pytest.raises(NonFiniteError, match=r"b\[0\]"):
        checkpoint.save(tmp_path, 2, {"b": both}, {}, {})
    assert names(tmp_path) == ["last", "step-00000001"]
    assert checkpoint.save(tmp_path, 3, {"big": np.full(9, 3e38, np.float32)}, {}, {}).name == "step-00000003"


def test_state_must_leave_our_keys_alone(tmp_path):
    with pytest.raises(ValueError, match="state has step"):
        checkpoint.save(tmp_path, 1, tensors(), {}, {"step": 3})


# ---- a disk that refuses, a process that dies


@pytest.mark.parametrize(
    ("code", "error", "says"),
    [
        (errno.ENOSPC, NativeError, "no space for a checkpoint of"),
        (errno.EACCES, InputError, "Permission denied; older checkpoints are untouched: choose another --out"),
        (errno.EIO, NativeError, "Input/output error"),
    ],
)
@pytest.mark.parametrize("call", ["fsync", "rename", "replace", "open"])
def test_a_disk_that_refuses_leaves_the_older_ones(tmp_path, monkeypatch, code, error, says, call):
    save(tmp_path, 1)
    real, calls = getattr(os, call), []

    for fail_at in range(1, 30):
        calls.clear()

        def refuse(*args, **kwargs):
            calls.append(args)
            if len(calls) == fail_at:  # noqa: B023
                raise OSError(code, os.strerror(code))
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.os, call, refuse)
            try:
                save(tmp_path, 2)
            except AnertError as e:
                assert type(e) is error and says in str(e)
            else:
                assert len(calls) < fail_at
                break
        assert checkpoint.load(tmp_path).step in (1, 2) and checkpoint.load(tmp_path / "step-00000001").step == 1
        assert not [n for n in names(tmp_path) if n.startswith(".step-00000002.") and checkpoint.ASIDE not in n]
    assert fail_at > 1 and checkpoint.load(tmp_path).step == 2


def test_safetensors_errors_are_sentences_too(tmp_path, monkeypatch):
    import safetensors.numpy

    def full(*_):
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    save(tmp_path, 1)
    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    with pytest.raises(NativeError, match="no space for a checkpoint"):
        save(tmp_path, 2)
    assert names(tmp_path) == ["last", "step-00000001"]


def test_a_run_directory_that_is_a_file(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(InputError, match="cannot write a checkpoint"):
        save(tmp_path / "run", 1)


CHILD = """
import sys, numpy as np
from anert import checkpoint
model = {f"w{i}": np.full((64, 256), 1.0, np.float32) for i in range(8)}
print("ready", flush=True)
for step in range(1, 10_000):
    for w in model.values():
        w[...] = step
    optim = {n: w * 2 for n, w in model.items()}
    checkpoint.save(sys.argv[1], step, model, optim, {"step_seen": step}, best=step % 3 == 0, keep=2)
    print(step, flush=True)
"""


@pytest.mark.parametrize("seed", range(5))
def test_kill_at_any_moment(tmp_path, seed):
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                             env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    try:
        for _ in range(4):  # ready and three steps
            child.stdout.readline()
        time.sleep(random.Random(seed).uniform(0, 0.15))
    finally:
        child.send_signal(signal.SIGKILL)
        rest = child.communicate()[0].split()
    done = int(rest[-1]) if rest else 3
    found = checkpoint.load(tmp_path)
    assert found.skipped == [] and found.step in (done, done + 1)
    assert found.state["step_seen"] == found.step
    assert all((w == found.step).all() for w in found.model.values()) and (found.optim["w0"] == 2 * found.step).all()
    assert checkpoint.load(tmp_path / "best").step % 3 == 0
    save(tmp_path, found.step + 1)
    assert not [n for n in names(tmp_path) if n.startswith(".")]


def test_a_checkpoint_for_its_weights_alone_is_measured_not_hashed(tmp_path):
    """Sampling takes the newest step whose files have their sizes: a sha256 of the weights takes longer than to read
    them."""
    old, new = save(tmp_path, 1), save(tmp_path, 2)
    flip(new / "model.safetensors", -3)
    assert checkpoint.load(tmp_path).path == old
    assert checkpoint.load(tmp_path, hashed=False).path == new
    os.truncate(new / "model.safetensors", 100)
    found = checkpoint.load(tmp_path, hashed=False)
    assert found.path == old and "truncated" in found.skipped[0][1]
