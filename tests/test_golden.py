"""The real stories260K checkpoint: its logits, its loss on real text, its greedy text; oracles made by other
programs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from anert.events import RunDone
from anert.inputs import open_model
from anert.network import Network
from anert.param import ParamStore
from anert.plugin import load
from anert.runtime import Runtime
from anert.sample import generate
from anert.tokenizer import load_tokenizer
from anert.train import Trainer, TrainOptions

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def stories():
    return load(str(ROOT / "plugins" / "stories.py"))


@pytest.fixture(scope="module")
def real(stories, shared_data):
    """(network of 512 positions, tokenizer) of the checkpoint."""
    folder = shared_data / "llama2c"
    model, tensors, load_tokenizer = open_model(stories, folder / "stories260K.bin", str(folder / "tok512.bin"))
    rt = Runtime("cpu", "fp32")
    store = ParamStore(rt.heap, rt.pool, model.specs(), train=False)
    store.load(tensors)
    net = Network(rt, model, store, 512, 1, train=False)
    store.sync()
    return net, load_tokenizer()


def test_logits_equal_transformers(real, shared_data):
    golden = np.load(shared_data / "golden" / "stories260K_hf_logits_greedy.npz")
    ids, want = golden["ids"].reshape(-1), golden["logits"].reshape(-1, 512)
    net, _ = real
    tokens = np.zeros(512, np.int32)
    tokens[: ids.size] = ids
    got = net.head.logits(net.forward(tokens), np.arange(ids.size, dtype=np.int32))
    # weights and residual stream are fp16 here, fp32 there: 9e-4 is what their rounding makes
    assert np.abs(got - want).max() / np.abs(want).max() < 2e-3


def test_loss_on_real_text(real, shared_data):
    """1.3332 nats by transformers over 48 windows of 512, BOS before each story (data/SOURCES.md)."""
    net, tokenizer = real
    text = (shared_data / "text" / "tinystories_10k.txt").read_text("utf-8")
    ids: list[int] = []
    for story in text.split("<|endoftext|>"):
        if story.strip():
            ids += tokenizer.encode(story.strip(), bos=True)
        if len(ids) > 48 * 512:
            break
    losses = [
        net.loss(np.array(ids[i : i + 512], np.int32), np.array(ids[i + 1 : i + 513], np.int32))[0]
        for i in range(0, 48 * 512, 512)
    ]
    assert np.mean(losses) == pytest.approx(1.3332, abs=0.02)


def test_greedy_text_equals_llama2c(stories, shared_data):
    folder = shared_data / "llama2c"
    want = (shared_data / "golden" / "stories260K_greedy_runc.txt").read_text("utf-8")
    pieces = generate(
        folder / "stories260K.bin", "", stories, max_tokens=60, tokenizer=str(folder / "tok512.bin"), temperature=0.0
    )
    text = "".join(pieces).strip()
    assert len(text) > 100 and want.strip().startswith(text)


@pytest.mark.slow
def test_training_goes_on_from_the_checkpoint(stories, shared_data, tmp_path):
    """The loop as a user starts it: `--init stories260K.bin` begins at transformers' loss on the text's first 48
    windows, and training on them gets below it."""
    folder, mark = shared_data / "llama2c", "<|endoftext|>"
    told = (shared_data / "text" / "tinystories_10k.txt").read_text("utf-8").split(mark)
    tokenizer = load_tokenizer(folder / "tok512.bin")
    count = first = 0
    while count <= 48 * 512:
        count += len(tokenizer.encode(told[first].strip(), bos=True))
        first += 1
    text = tmp_path / "first.txt"
    text.write_text(mark.join(told[:first]), "utf-8")
    options = TrainOptions(
        steps=30, warmup=10, lr=2e-4, batch=2, weight_decay=0.0, precision="fp32", init=str(folder / "stories260K.bin"),
        data=str(text), val=str(text), tokenizer=str(folder / "tok512.bin"),
        eval_every=0, eval_tokens=48 * 512, sample_every=0, save_every=0, out=str(tmp_path / "run"),
    )  # fmt: skip
    events = list(Trainer(stories, "260k", stories.preset("260k").config, options, lambda: False).run())
    summary = next(e.summary for e in events if isinstance(e, RunDone))
    assert summary["val_loss_first"] == pytest.approx(1.3332, abs=0.02)
    assert summary["val_loss"] < summary["val_loss_first"] - 5e-3
