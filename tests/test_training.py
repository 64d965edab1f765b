"""Does it train as well? A run of the real loop on real text against PyTorch float32: same weights, same batches."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_run

from anert.data import TokenDataset
from anert.events import RunDone, RunStarted, StepDone
from anert.optim import warmup_cosine
from anert.plugin import load
from anert.train import Trainer, TrainOptions

ROOT = Path(__file__).resolve().parents[1]
SHAPE = {"dim": 64, "hidden_dim": 172, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 512, "seq_len": 128}


def trained_here(folder: Path, shared: Path, precision: str, steps: int) -> tuple[Trainer, dict[str, np.ndarray], Any]:
    """(trainer after the run, the weights that it began with, its summary)."""
    plugin = load(str(ROOT / "plugins" / "stories.py"))
    config = dataclasses.replace(plugin.preset("tiny").config, **SHAPE)
    options = TrainOptions(
        steps=steps, batch=4, lr=2e-3, warmup=steps // 10, precision=precision, threads=1,
        sample_every=0, save_every=0, eval_every=0, eval_tokens=32768,
        data=str(shared / "text" / "tinystories_10k.txt"), out=str(folder / precision),
        tokenizer=str(shared / "llama2c" / "tok512.bin"),
    )  # fmt: skip
    trainer = Trainer(plugin, "tiny", config, options, lambda: False)
    start: dict[str, np.ndarray] = {}
    summary = None
    for event in trainer.run():
        if isinstance(event, RunStarted):
            start = {name: np.array(a) for name, a in trainer.store.tensors().items()}
        elif isinstance(event, RunDone):
            summary = event.summary
    return trainer, start, summary


def trained_by_pytorch(trainer: Trainer, start: dict[str, np.ndarray], log: Any = None) -> float:
    """Validation loss of PyTorch float32 after the same batches, by torch.optim.AdamW."""
    import torch
    from torch_stories import TorchStories

    torch.set_num_threads(1)  # at this size more of them only wait for each other
    o, cfg = trainer.options, trainer.config
    oracle = TorchStories(cfg, start)
    decayed, plain = ([p for n, p in oracle.p.items() if trainer.store[n].spec.decay is yes] for yes in (True, False))
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": o.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps,
    )  # fmt: skip
    schedule, batches = (
        warmup_cosine(o.lr, o.min_lr, o.warmup, o.steps),
        trainer.data.dataset.train_batches(o.batch, o.seed),
    )
    for step in range(o.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule(step)
        tokens, targets = (a.reshape(o.batch, -1) for a in next(batches))
        optimizer.zero_grad()
        loss = oracle.loss(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(oracle.p.values()), o.clip)
        optimizer.step()
        if log and step % 100 == 99:
            log(f"pytorch step {step + 1}: {loss.item():.4f}")
    with torch.no_grad():
        losses = [
            oracle.loss(x.reshape(o.batch, -1), y.reshape(o.batch, -1)).item()
            for x, y in trainer.data.dataset.val_windows(o.batch, o.eval_tokens)
        ]
    return math.fsum(losses) / len(losses)


def compare(folder: Path, shared: Path, steps: int, log: Any = None) -> dict[str, float]:
    """Validation loss after `steps`: of PyTorch, and of every precision here."""
    found: dict[str, float] = {}
    for precision in ("fp32", "bf16", "fp16"):
        trainer, start, summary = trained_here(folder, shared, precision, steps)
        found[precision] = summary["val_loss"]
        if log:
            log(f"{precision}: {summary}")
        assert summary["steps"] == steps and summary["compiles"] == summary["kernels"]
        assert summary["skipped_steps"] == 0, "no gradient comes near the end of fp16 at the loss scale of 1,024"
    found["pytorch"] = trained_by_pytorch(trainer, start, log)
    found["unigram"] = trainer.data.dataset.unigram_entropy()
    return found


@pytest.mark.slow
def test_it_trains_as_well_as_pytorch(tmp_path: Path, shared_data: Path) -> None:
    pytest.importorskip("torch")
    found = compare(tmp_path, shared_data, 300)
    assert found["pytorch"] < found["unigram"] - 1.0, "a run that learns nothing proves nothing"
    assert found["fp32"] == pytest.approx(found["pytorch"], rel=0.02)
    assert found["bf16"] == pytest.approx(found["pytorch"], rel=0.03)
    assert found["fp16"] == pytest.approx(found["pytorch"], rel=0.03)


@pytest.mark.slow
def test_memory_and_compiles_stay_as_they_are(tmp_path: Path, shared_data: Path) -> None:
    """1,000 steps with validation, samples and checkpoints among them: not 1% more memory than after 100, not one
    compile more than there are kernels."""
    text = tmp_path / "some.txt"
    text.write_text((shared_data / "text" / "tinystories_10k.txt").read_text("utf-8")[:300_000], "utf-8")
    fields = {"dim": 32, "hidden_dim": 96, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "seq_len": 32}
    options = {"data": text, "tokenizer": shared_data / "llama2c" / "tok512.bin", "steps": 1000, "out": tmp_path / "r",
               "batch": 2, "time-budget": 0, "eval-every": 40, "sample-every": 40, "save-every": 45}  # fmt: skip
    command = [sys.executable, "-m", "anert", "run", str(ROOT / "plugins" / "stories.py"), "--ui", "json"]
    command += [w for k, v in fields.items() for w in ("--set", f"{k}={v}")]
    command += [w for k, v in options.items() for w in (f"--{k}", str(v))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    started = next(e for e in events if e["event"] == "RunStarted")
    steps = {e["step"]: e for e in events if e["event"] == "StepDone"}
    assert len(steps) == 1000
    assert started["kernels"] == steps[3]["compiles"] == steps[300]["compiles"] == steps[1000]["compiles"]
    assert steps[1000]["rss_bytes"] < 1.01 * steps[100]["rss_bytes"]


@pytest.mark.slow
def test_the_first_run_ends_in_a_story(tmp_path: Path) -> None:
    """With nothing given: corpus, tokenizer, `tiny`, and a story whose words follow each other as in the corpus, over
    1.5 nats below what the frequencies of tokens alone would give; with fewer steps than a user's 90 seconds."""
    command = [sys.executable, "-m", "anert", "run", str(ROOT / "plugins" / "stories.py"), "--json", "--ui", "plain"]
    command += ["--steps", "400", "--batch", "2", "--time-budget", "0", "--sample-every", "400", "--eval-every", "400"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    run = tmp_path / summary["out"]
    events = [json.loads(line) for line in (run / "events.jsonl").read_text("utf-8").splitlines()]
    story = [e["text"] for e in events if e["event"] == "Sampled"][-1]
    (corpus,) = (run / "data").glob("*.txt")
    known, words = (re.findall(r"[a-z']+", text.lower()) for text in (corpus.read_text("utf-8"), story))
    assert len(words) >= 40, story
    pairs, seen = list(pairwise(words)), set(pairwise(known))  # 0.73 to 0.81 by seed, after 60 steps 0.29 to 0.60
    assert sum(pair in seen for pair in pairs) > 0.65 * len(pairs), story
    (tokens,) = (run / "data").glob("*.bin")
    assert summary["val_loss"] < TokenDataset(tokens, 128).unigram_entropy() - 1.5


if __name__ == "__main__":  # python tests/test_training.py SHARED_DATA FOLDER [STEPS]
    print(compare(Path(sys.argv[2]), Path(sys.argv[1]), int(sys.argv[3]) if len(sys.argv) > 3 else 1000, print))


SGD = """
from anert.optim import Optimizer
from anert.plugin import Plugin
from dataclasses import dataclass
from anert import Decoder

plugin = Plugin("slope", api=1)


@dataclass(frozen=True)
class Config:
    dim: int = 16
    vocab_size: int = 300
    seq_len: int = 32
    n_layers: int = 0


@plugin.model("tiny", Config())
class Bigram(Decoder):
    tied = False
    final_norm = False


@plugin.optimizer("sgd")
class Sgd(Optimizer):
    def update(self, params):
        for p in params:
            p.master -= self.args.lr * self.args.grad_scale * p.grad
        self.write_copies(params)


@plugin.optimizer("forgetful")
class Forgetful(Optimizer):
    pass
"""


def test_a_plugins_optimizer_trains(tmp_path: Path) -> None:
    """Gradient descent: the loss falls, and copies and masters are those of the formula."""
    (tmp_path / "slope.py").write_text(SGD)
    plugin, data = load(str(tmp_path / "slope.py")), small_run.write_text(tmp_path / "text.txt")
    options = TrainOptions(
        steps=60, batch=2, lr=4.0, warmup=1, clip=0.0, threads=1, optimizer="sgd", data=str(data), eval_every=60,
        eval_tokens=512, sample_every=0, save_every=0, out=str(tmp_path / "run"), precision="fp32",
    )  # fmt: skip
    run = Trainer(plugin, "tiny", plugin.preset("tiny").config, options, lambda: False)
    losses: list[float] = []
    before: dict[str, np.ndarray] = {}
    for event in run.run():
        if isinstance(event, StepDone):
            if event.step == 1:
                before = {name: p.master.copy() for name, p in run.store.items()}
                lr = run.schedule(1)
            if event.step == 2:
                for name, p in run.store.items():
                    np.testing.assert_allclose(p.master, before[name] - lr * p.grad, rtol=1e-6, atol=1e-9)
                    for surface, slot in p.placements:
                        copy = surface.array(np.float16, (slot.rows, slot.cols), slot.offset * 2,
                                             (slot.row_stride * 2, slot.col_stride * 2))  # fmt: skip
                        np.testing.assert_array_equal(copy, p.master.astype(np.float16))
            losses.append(event.loss)
    assert np.mean(losses[-10:]) < losses[0] - 0.5, losses


def test_an_optimizer_that_the_plugin_does_not_have_or_that_does_nothing(tmp_path: Path) -> None:
    (tmp_path / "slope.py").write_text(SGD)
    data = small_run.write_text(tmp_path / "text.txt")
    argv = [sys.executable, "-m", "anert", "run", str(tmp_path / "slope.py"), "--data", str(data), "--steps", "2"]
    argv += ["--ui", "plain", "--out", str(tmp_path / "run")]
    unknown = subprocess.run([*argv, "--optimizer", "adam"], capture_output=True, text=True, cwd=ROOT)
    assert unknown.returncode == 2 and "choose adamw, lion, sgd, forgetful" in unknown.stderr
    empty = subprocess.run([*argv, "--optimizer", "forgetful"], capture_output=True, text=True, cwd=ROOT)
    assert empty.returncode == 2 and "Traceback" not in empty.stderr, empty.stderr
    assert "Forgetful" in empty.stderr and "update" in empty.stderr
