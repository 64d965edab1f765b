"""Memory and disk are estimated before anything big is allocated; what cannot fit is refused with both figures."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from anert import inputs, runtime
from anert.errors import DoesNotFit
from anert.network import Network
from anert.param import ParamStore
from anert.plugin import load
from anert.runtime import Runtime
from anert.train import TrainOptions

ROOT = Path(__file__).resolve().parents[1]
STORIES = ROOT / "plugins" / "stories.py"
GIB = 1 << 30


@pytest.fixture(scope="module")
def stories():
    return load(str(STORIES))


def estimate(plugin, preset, tmp_path, **options):
    model = plugin.preset(preset).model(plugin.preset(preset).config)
    o = TrainOptions(out=str(tmp_path), **options)
    return inputs.estimate_run(Runtime("cpu", threads=1), model, model.specs(), o, tmp_path)


@pytest.mark.parametrize(("preset", "batch"), [("tiny", 4), ("260k", 2), ("15m", 1)])
def test_the_estimate_is_what_a_run_takes(stories, preset, batch, tmp_path):
    """Resident memory of a fresh process after a step, over what it had when it had imported all; pages of 2 MiB round
    up."""
    config = stories.preset(preset).config
    small = dataclasses.replace(config, vocab_size=min(config.vocab_size, 2000), n_layers=min(config.n_layers, 5))
    program = f"""
import dataclasses, json, numpy as np, tempfile
from pathlib import Path
from anert.inputs import estimate_run
from anert.network import Network
from anert.param import ParamStore
from anert.plugin import load
from anert.runtime import Runtime, rss_bytes
from anert.train import TrainOptions
preset = load({str(STORIES)!r}).preset({preset!r})
cfg = dataclasses.replace(preset.config, vocab_size={small.vocab_size}, n_layers={small.n_layers})
rt, model = Runtime("cpu", threads=1), preset.model(cfg)
before = rss_bytes()
out = Path(tempfile.gettempdir())
snapshot = 12 * sum(s.size for s in model.specs().values())
guess = estimate_run(rt, model, model.specs(), TrainOptions(batch={batch}), out) - snapshot
store = ParamStore(rt.heap, rt.pool, model.specs(), True)
store.initialise(1)
for flat in store.flats:
    flat += 1e-3
net = Network(rt, model, store, cfg.seq_len, {batch}, True)
store.sync()
net.zero_grad()
net.loss_backward(np.zeros(net.n, np.int32), np.zeros(net.n, np.int32), 16.0)
print(json.dumps([guess, rss_bytes() - before]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300)
    guess, took = json.loads(done.stdout)
    assert 0.6 * took < guess + (20 << 20) and guess < 1.6 * took, (guess >> 20, took >> 20)


def test_memory_that_is_not_there_is_refused(stories, tmp_path, monkeypatch):
    need = estimate(stories, "15m", tmp_path)
    monkeypatch.setattr(runtime, "memory_available", lambda: need // 4)
    with pytest.raises(DoesNotFit) as raised:
        estimate(stories, "15m", tmp_path)
    found = re.fullmatch(
        r"15\.2 M parameters .* need (\d+) MiB, this machine grants (\d+) MiB: take a smaller preset, batch or seq_len",
        str(raised.value),
    )
    assert found and int(found[1]) > int(found[2]) == round(need // 4 / 2**20)


def test_a_network_that_does_not_fit_allocates_nothing(stories, monkeypatch):
    preset = stories.preset("260k")
    rt, model = Runtime("cpu", threads=1), preset.model(preset.config)
    store = ParamStore(rt.heap, rt.pool, model.specs(), True)
    monkeypatch.setattr(runtime, "memory_available", lambda: 1 << 20)
    monkeypatch.setattr(Network, "_surface", lambda *a: pytest.fail("a surface was made"))
    with pytest.raises(DoesNotFit, match=r"activations need \d+ MiB, this machine grants 1 MiB"):
        Network(rt, model, store, 512, 1, True)


def test_a_full_disk_is_refused_before_the_run(stories, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=GIB, used=GIB, free=100 << 20))
    with pytest.raises(DoesNotFit, match=r"3 checkpoints and one being written need 869 MiB, .* has 100 MiB free"):
        estimate(stories, "15m", tmp_path)
    assert estimate(stories, "260k", tmp_path) > 0


def test_the_command_says_so_in_a_line(tmp_path):
    text = tmp_path / "t.txt"
    text.write_text("A fox and a hen went home. " * 4000)
    command = [sys.executable, "-m", "anert", "run", str(STORIES), "--data", str(text), "--batch", "10000000",
               "--out", str(tmp_path / "run")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.search(r"^anert: .* need \d+ MiB, this machine grants \d+ MiB", done.stderr.splitlines()[-1])
