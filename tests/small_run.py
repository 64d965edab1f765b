"""A training run of a few thousand weights through everything that a large one goes through."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from anert import checkpoint
from anert import events as ev
from anert.plugin import load
from anert.train import Trainer, TrainOptions

ROOT = Path(__file__).resolve().parents[1]
STORIES = ROOT / "plugins" / "stories.py"
SHAPE = dict(dim=32, hidden_dim=64, n_layers=1, n_heads=2, n_kv_heads=2, vocab_size=300, seq_len=32)
OPTIONS = dict(
    batch=2, grad_accum=2, lr=2e-3, warmup=5, threads=1, eval_every=25, eval_tokens=512, sample_every=0, save_every=2,
    scale_window=20,
)  # fmt: skip


def write_text(path: Path, characters: int = 40_000) -> Path:
    """Some words in random order."""
    rng = random.Random(5)
    words = [*"abcdefghij", "the", "little", "fox", "went", "home", "and", "saw", "river", "then", "said", "good"]
    path.write_text(" ".join(rng.choice(words) for _ in range(characters // 4))[:characters])
    return path


def flags(data: Path, out: Path, **more: Any) -> list[str]:
    """What follows `anert run` for such a run."""
    found = [f"{STORIES}:tiny", "--ui", "plain", "--time-budget", "0"]
    for name, value in {**OPTIONS, "data": data, "out": out, **more}.items():
        found += ["--" + name.replace("_", "-"), str(value)]
    for name, value in SHAPE.items():
        found += ["--set", f"{name}={value}"]
    return found


def trainer(data: Path, out: Path, stop: Any = lambda: False, **more: Any) -> Trainer:
    plugin = load(str(STORIES))
    options = TrainOptions(**{**OPTIONS, "data": str(data), "out": str(out), **more})
    config = dataclasses.replace(plugin.preset("tiny").config, **SHAPE)
    return Trainer(plugin, "tiny", config, options, stop)


def events(run: Trainer, kind: type) -> list[Any]:
    return [e for e in run.run() if isinstance(e, kind)]


def notices(found: list[ev.Event] | Iterator[ev.Event]) -> list[str]:
    return [e.text for e in found if isinstance(e, ev.Notice)]


def bits(run: Path) -> dict[str, str]:
    """sha256 of every tensor of the last checkpoint, and the figures that a resumed run carries on."""
    found = checkpoint.load(run)
    tensors = {**found.model, **found.optim}
    hashes = {name: hashlib.sha256(t.tobytes()).hexdigest() for name, t in tensors.items()}
    names = ("optimizer_t", "scaler", "health", "data", "skipped", "train_loss", "val_first", "val_loss", "best_val")
    return {"step": str(found.step), **hashes, **{name: repr(found.state[name]) for name in names}}
