"""A made-up training run with plausible figures, for tests of what shows a run and for looking at it."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

from anert import events as ev

STORY = (
    "Once upon a time, there was a little fox named Pip. Pip liked to play near the river with his friend, a small "
    'green frog. One day the frog found a shiny stone under the bridge. "Look!" said the frog. "It is warm." '
    "Pip wanted to take it home, but his mother said that it belonged to the old turtle, so they gave it back."
)


def started(steps: int = 1000, **changes: object) -> ev.RunStarted:
    """The first event of a tiny run on two threads."""
    values: dict[str, object] = dict(
        plugin="stories", preset="tiny", n_params=1_312_768, backend="cpu", precision="bf16", threads=2, isa="avx512",
        config={"dim": 128, "hidden_dim": 352, "n_layers": 4, "n_heads": 4, "n_kv_heads": 4, "vocab_size": 1024,
                "seq_len": 256, "norm_eps": 1e-5, "rope_theta": 10000.0},
        layout="ports", kernels=6, compiles=6, compile_budget=1000, compile_ms=212.0, dataset="tales",
        train_tokens=1_204_221, val_tokens=63_380, tokenizer="bpe 1024", tokens_per_step=2048,
        steps=steps, first_step=0,
        time_budget_s=90.0, out_dir="runs/stories-tiny-1", memory_bytes=61_000_000, peak_gflops=212.0, options={},
    )  # fmt: skip
    return ev.RunStarted(**{**values, **changes})  # type: ignore[arg-type]


def step(n: int, steps: int = 1000, seed: int = 0, **changes: object) -> ev.StepDone:
    """Step `n` of a run whose loss falls from 6.9 to about 1.6."""
    rng = random.Random(seed * 100_003 + n)
    loss = 1.45 + 5.5 * math.exp(-n / 120) + 0.9 * math.exp(-n / 700) + rng.gauss(0, 0.07)
    parts = {
        "data": 0.4, "forward": 18.2, "head": 11.4, "backward": 31.0, "weight_grads": 17.3, "optimizer": 4.9,
        "sync": 1.1, "dashboard": 0.3,
    }  # fmt: skip
    ms = {k: v * rng.uniform(0.94, 1.08) for k, v in parts.items()}
    whole = sum(ms.values()) + 1.2
    lr = 2e-3 * (n / 50 if n < 50 else 0.5 * (1 + math.cos(math.pi * (n - 50) / (steps - 50))))
    values: dict[str, object] = dict(
        step=n, loss=loss, lr=lr, grad_norm=0.4 + 2.5 * math.exp(-n / 60) + abs(rng.gauss(0, 0.1)),
        loss_scale=65536.0 if n > 3 else 32768.0, skipped=n in (1, 2), tokens=2048, step_ms=whole, ms=ms,
        flops=8_400_000_000, tokens_per_s=2048 / whole * 1e3, elapsed_s=n * 0.0865, eta_s=(steps - n) * 0.0865,
        rss_bytes=212_000_000, compiles=6, amax=11.7 + n / 400, clamped=0,
    )  # fmt: skip
    return ev.StepDone(**{**values, **changes})  # type: ignore[arg-type]


def run(steps: int = 1000, upto: int | None = None, reason: str = "steps") -> Iterator[ev.Event]:
    """All events of a run, or those up to a step without the end."""
    yield ev.Notice("info", "backend auto: cpu (avx512), 2 threads of 2 granted")
    for i in range(11):
        yield ev.Progress("writing the corpus", i * 0.5e6, 5e6, "B")
    for i in range(11):
        yield ev.Progress("training the tokenizer", i * 100, 1000, "merges")
    yield started(steps)
    last = steps if upto is None else upto
    for n in range(1, last + 1):
        yield step(n, steps)
        if n % 100 == 0:
            loss = 1.5 + 5.4 * math.exp(-n / 120) + 0.92 * math.exp(-n / 700)
            yield ev.Validated(n, loss, 16384, True, 310.0)
            yield ev.Sampled(n, STORY, 412.0)
        if n % 250 == 0:
            yield ev.Saved(n, f"runs/stories-tiny-1/step-{n:08}", True, 38.0)
    if upto is None:
        yield ev.RunDone(reason, summary(steps))


def summary(steps: int) -> dict[str, object]:
    """design.md section 11's keys."""
    return {
        "steps": steps, "train_loss": 1.61, "val_loss_first": 6.94, "val_loss": 1.66, "compiles": 6, "kernels": 6,
        "tokens_per_s": 23_700.0, "ms_per_step": 86.5, "skipped_steps": 2, "backend": "cpu", "precision": "bf16",
        "checkpoint": "runs/stories-tiny-1/step-00001000", "threads": 2, "rss_mb": 212.0,
    }  # fmt: skip
