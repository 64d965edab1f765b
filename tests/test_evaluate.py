"""Evaluating a checkpoint: against float32 NumPy, the coverage of the interval, and bad input."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from anert.cli import main
from anert.evaluate import evaluate, student95, summary, text_bytes
from anert.events import Evaluated
from anert.inputs import open_model
from anert.numpy_llama import NumpyLlama
from anert.plugin import load
from anert.tokenizer import load_tokenizer

STORIES = str(Path(__file__).resolve().parents[1] / "plugins" / "stories.py")
TEXT = """Once upon a time, there was a little dog named Max. He liked to play in the park.
<|endoftext|>
Lucy had a red ball. "Can I play with you?" asked Tom. Lucy said yes, and they were happy.
"""


@pytest.fixture
def paths(shared_data, tmp_path):
    folder = shared_data / "llama2c"
    text = tmp_path / "t.txt"
    text.write_text(TEXT * 9)
    return folder / "stories260K.bin", folder / "tok512.bin", text


def oracle(paths) -> tuple[float, int]:
    """Mean loss by NumPy, one position after another, in windows of 512."""
    model, tensors, load_tokenizer = open_model(load(STORIES), paths[0], str(paths[1]))
    tokenizer = load_tokenizer()
    ids = [
        t for part in (TEXT * 9).split("<|endoftext|>") if part.strip() for t in tokenizer.encode(part.strip(), True)
    ]
    engine, losses = NumpyLlama(model, tensors), []
    for start in range(0, len(ids) - 1, 512):
        engine.rewind(0)
        for i in range(start, min(start + 512, len(ids) - 1)):
            logits = engine.extend(ids[i : i + 1]).astype(np.float64)
            losses.append(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[ids[i + 1]])
    return float(np.mean(losses)), len(losses)


def test_numpy_agrees(paths):
    checkpoint, tokenizer, text = paths
    *_, found = evaluate(checkpoint, text, load(STORIES), str(tokenizer))
    assert isinstance(found, Evaluated)
    want, n = oracle(paths)
    assert found.tokens == n and found.windows == math.ceil(n / 512) > 1
    assert found.loss == pytest.approx(want, rel=5e-4) and found.perplexity == pytest.approx(math.exp(found.loss))
    shown = sum(len(part.strip().encode()) for part in (TEXT * 9).split("<|endoftext|>"))
    assert found.bytes == shown
    assert found.bits_per_byte == pytest.approx(found.loss * n / math.log(2) / shown)
    assert found.loss_low < found.loss < found.loss_high


def test_bytes_are_those_of_the_text(shared_data, tmp_path):
    llama = load_tokenizer(shared_data / "llama2c" / "tok512.bin")
    for text in ("a", "Tom is 12.", " space", "zwölf 雪 \n\nx"):
        ids = np.array(llama.encode(text, bos=True) * 2)
        assert text_bytes(ids, llama) == 2 * len(text.encode())


def test_the_interval_covers():
    """95 % of intervals of simulated runs hold the true loss; of windows that have one loss each, not one per token."""
    rng, covered, n = np.random.default_rng(1), 0, 600
    for _ in range(n):
        counts = np.append(np.full(7, 64), rng.integers(1, 64))
        losses = counts * (1.5 + 0.3 * rng.standard_normal(8))
        found = summary(losses, counts, 100)
        covered += found.loss_low <= 1.5 <= found.loss_high
    assert 0.92 < covered / n < 0.98
    alone = summary(np.array([3.0]), np.array([2]), 0)
    assert alone.loss == 1.5 and math.isnan(alone.loss_low) and math.isnan(alone.bits_per_byte)


@pytest.mark.parametrize(("freedom", "t"), [(1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (10, 2.228), (100, 1.984)])
def test_student(freedom, t):
    assert student95(freedom) == pytest.approx(t, rel=0.01)


def test_the_verb(paths, capsys, tmp_path):
    checkpoint, tokenizer, text = paths
    argv = ["eval", str(checkpoint), "--data", str(text), "--plugin", STORIES, "--tokenizer", str(tokenizer)]
    assert main([*argv, "--tokens", "300"]) == 0
    assert "loss " in (line := capsys.readouterr().out) and "300 tokens" in line and "bits/byte" in line
    assert main([*argv, "--tokens", "300", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {"loss", "perplexity", "bits_per_byte", "tokens"} <= result.keys() and result["loss_low"] is None
    empty, short, other = tmp_path / "e.txt", tmp_path / "s.bin", tmp_path / "o.bin"
    empty.write_text("  \n")
    np.array([5], "<u2").tofile(short)
    np.full(99, 700, "<u2").tofile(other)
    for bad, message in (
        (empty, "no text in it"),
        (short, "s.bin"),
        (other, "id 700 is past the model's vocabulary of 512"),
        (tmp_path / "no", "No such file"),
    ):
        assert main(["eval", str(checkpoint), "--data", str(bad), *argv[4:]]) == 2
        err = capsys.readouterr().err
        *progress, line = err.splitlines()
        assert message in line and all(p.startswith("tokenize  ") for p in progress)
    assert main(["eval", "nowhere", "--data", str(text)]) == 2
    assert "no checkpoint there" in capsys.readouterr().err
