"""Loss of a checkpoint on a text: cross-entropy, perplexity and bits per byte, with a confidence interval.

Windows of seq_len positions lie one after another, each predicting its positions from what stands before them in it;
the last one may be shorter. Every id but the first is predicted once.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from anert.errors import InputError
from anert.events import Evaluated, Event, Progress

if TYPE_CHECKING:
    from anert.plugin import Plugin
    from anert.tokenizer import Tokenizer

REPORT_S = 0.5


def evaluate(
    checkpoint: Path | str,
    data: Path | str,
    plugin: Plugin,
    tokenizer: str = "",
    tokens: int = 0,
    backend: str = "auto",
    precision: str = "fp32",
    threads: int = 0,
    data_dtype: str = "auto",
) -> Iterator[Event]:
    """Yield Progress, and at the end Evaluated, of the first `tokens` (0: all) predictions on a text or token file.

    Raises InputError: a file that is neither, too short, of another tokenizer, or with ids past the vocabulary.
    """
    from anert.inputs import open_model
    from anert.network import Network
    from anert.param import ParamStore
    from anert.runtime import Runtime, memory_available
    from anert.waiting import waited

    model, tensors, load_vocabulary = open_model(plugin, Path(checkpoint), tokenizer)
    vocabulary = load_vocabulary()
    with tempfile.TemporaryDirectory(prefix="anert-eval-") as cache:
        ids = yield from waited(
            "tokenize", "B", lambda report: token_ids(Path(data), vocabulary, Path(cache), report, data_dtype)
        )
        vocab = model.config.vocab_size
        if int(ids.max()) >= vocab:
            raise InputError(
                f"{data}: id {int(ids.max())} is past the model's vocabulary of {vocab}: another tokenizer's?"
            )
        rt = Runtime(backend, precision, threads=threads)
        store = ParamStore(rt.heap, rt.pool, model.specs(), False, tensors)
        rt.check_memory(store.copy_bytes, "the weights")
        net = Network(rt, model, store, model.config.seq_len, 1, train=False)
        store.sync()
        if rt.backend.any_memory:
            store.settle_ahead(memory_available())
        n = len(ids) - 1 if not tokens else min(tokens, len(ids) - 1)
        losses, counts, last = [], [], time.monotonic()
        for inputs, targets in windows(ids[: n + 1], model.config.seq_len):
            loss, count = net.loss(inputs, targets)
            losses.append(loss * count)
            counts.append(count)
            if time.monotonic() - last > REPORT_S:
                last = time.monotonic()
                yield Progress("evaluate", float(sum(counts)), float(n), "tokens")
        yield summary(np.array(losses), np.array(counts), text_bytes(ids[: n + 1], vocabulary))


def token_ids(
    data: Path,
    tokenizer: Tokenizer,
    cache: Path,
    report: Callable[[float, float], None],
    dtype: str = "auto",
) -> NDArray[np.int64]:
    """The ids of a text or token file, at least two of them."""
    from anert import data as files
    from anert.data.dataset import check_tokenizer

    if files.sniff(data) == "text":
        file = files.tokenize_file(data, tokenizer, cache / "tokens.bin", progress=report)
    else:
        file = files.open_tokens(data, dtype)
        check_tokenizer(str(data), file.tokenizer_hash, tokenizer.hash)
    if len(file.tokens) < 2:
        raise InputError(f"{data}: {len(file.tokens)} token, at least 2 are needed: one to see, one to predict")
    return np.asarray(file.tokens, np.int64)


def windows(ids: NDArray[np.int64], seq_len: int) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int32]]]:
    """(inputs, targets) of seq_len each; behind the end 0 and -1, which does not count."""
    for start in range(0, len(ids) - 1, seq_len):
        part = ids[start : start + seq_len + 1]
        inputs, targets = np.zeros(seq_len, np.int32), np.full(seq_len, -1, np.int32)
        inputs[: len(part) - 1], targets[: len(part) - 1] = part[:-1], part[1:]
        yield inputs, targets


def text_bytes(ids: NDArray[np.int64], tokenizer: Tokenizer) -> int:
    """Bytes of the text that the predicted ids stand for: none for control tokens, and behind bos without the space
    that a SentencePiece vocabulary puts there."""
    targets = ids[1:]
    used, counts = np.unique(targets, return_counts=True)
    total = sum(len(tokenizer.token_bytes(int(t))) * int(n) for t, n in zip(used, counts, strict=True))
    opening, openings = np.unique(targets[ids[:-1] == tokenizer.bos_id], return_counts=True)
    for t, n in zip(opening, openings, strict=True):
        spared = len(tokenizer.token_bytes(int(t))) - len(tokenizer.decode_stream().token_bytes(int(t)))
        total -= spared * int(n)
    return int(total)


def summary(losses: NDArray[np.float64], counts: NDArray[np.int64], nbytes: int) -> Evaluated:
    """Of the summed losses (nats) and predictions of each window. Windows are the sample: positions of one are not
    independent. The interval is Student's, of the ratio estimate (Cochran 1977, 6.4)."""
    n, total = len(counts), int(counts.sum())
    loss = float(losses.sum()) / total
    half = math.nan
    if n > 1:
        rest = losses - loss * counts
        half = student95(n - 1) * math.sqrt(float(rest @ rest) * n / (n - 1)) / total
    bits = float(losses.sum()) / math.log(2) / nbytes if nbytes else math.nan
    return Evaluated(loss, loss - half, loss + half, math.exp(loss), bits, total, nbytes, n)


def student95(freedom: int) -> float:
    """The 97.5 % point of Student's t: exact for 1 and 2 degrees of freedom, else by Cornish and Fisher, to 1 %."""
    if freedom <= 2:
        return (12.7062, 4.3027)[freedom - 1]
    z = 1.959964
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )
