"""Tokenizers beside tiktoken, Hugging Face tokenizers and SentencePiece: one text, one vocabulary, one thread.

Warm: every word has been seen before. Cold: the word cache is empty at the start of each run.
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from anert.bench.measure import Case as Timed
from anert.bench.options import BenchOptions
from anert.errors import AnertError, InputError
from anert.events import Event, Progress
from anert.tokenizer import ByteBPETokenizer, LlamaTokenizer, Tokenizer

VOCABULARY = 8192
TRAIN_CHARS = 1 << 20
LARGEST_TEXT = 8 << 20
"""Characters that are measured."""

PIECE = 1 << 16
"""Characters of a text that a run encodes at a time: documents of a book's chapter, for every tokenizer alike."""

Ids = list[list[int]]


def cases(_name: str, options: BenchOptions) -> list[Timed]:
    """`anert bench tokenizer --data TEXT`: one tokenizer of each kind, learnt from the text, beside its peers."""
    if not options.data:
        raise InputError("bench tokenizer needs an English text of some megabytes: --data FILE")
    texts = english(options.data)
    notes = {"threads": 1, "isa": "", "text_mb": round(megabytes(texts), 3)}
    return [
        Timed(case.name, case.run, "MB/s", megabytes(texts), baseline=case.baseline, notes=notes)
        for tokenizer in trained(texts)
        for case in beside_peers(tokenizer, texts)
    ]


def english(path: Path | str) -> list[str]:
    """The text to measure on, in pieces."""
    from anert.data.corpus import checked
    from anert.data.text import Source

    text = "".join(piece for piece, _ in checked(Source(str(path))).pieces())[:LARGEST_TEXT]
    if not text:
        raise InputError(f"{path}: no text in it, only whitespace")
    return [text[i : i + PIECE] for i in range(0, len(text), PIECE)]


def megabytes(texts: Sequence[str]) -> float:
    return sum(len(t.encode()) for t in texts) / 1e6


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to time. `run()` gives the ids of all texts; baseline: the case that it is compared with."""

    name: str
    run: Callable[[], Ids]
    baseline: str = ""


def benchmark(
    path: Path | str, tokenizers: Sequence[Tokenizer] = (), rounds: int = 7
) -> Generator[Event, None, list[dict[str, Any]]]:
    """Time every tokenizer (none: one of each kind, learnt from the text) beside its peers on an English text.

    Yields Progress; returns rows of `results`: MB/s of UTF-8 in processor time of this thread, cases interleaved, and
    the ratio of medians to the baseline's. Raises InputError without a text or without a peer's package, AnertError
    where a peer's ids are others.
    """
    texts = english(path)
    amount = megabytes(texts)
    cases = [case for tokenizer in tokenizers or trained(texts) for case in beside_peers(tokenizer, texts)]
    seconds: list[list[float]] = [[] for _ in cases]
    for turn in range(rounds):
        yield Progress("measure", turn, rounds, "rounds")
        for i in range(len(cases)):
            i = (i + turn) % len(cases)
            start = time.thread_time()
            cases[i].run()
            seconds[i].append(time.thread_time() - start)
    yield Progress("measure", rounds, rounds, "rounds")
    rates = {case.name: sorted(amount / s for s in times) for case, times in zip(cases, seconds, strict=True)}
    return [row(case, rates) for case in cases]


def row(case: Case, rates: dict[str, list[float]]) -> dict[str, Any]:
    """A case as `results` has it (design: name, unit, median, p10, p90, n, baseline, ratio)."""
    rate = rates[case.name]
    median, p10, p90 = (float(np.percentile(rate, q)) for q in (50, 10, 90))
    ratio = median / statistics.median(rates[case.baseline]) if case.baseline else None
    spread = {"median": median, "p10": p10, "p90": p90, "n": len(rate)}
    return {"name": case.name, "unit": "MB/s", **spread, "baseline": case.baseline, "ratio": ratio}


def trained(texts: Sequence[str]) -> list[Tokenizer]:
    """One of each kind, learnt from the text's beginning."""
    some = "".join(texts)[:TRAIN_CHARS].split("\n")
    return [ByteBPETokenizer.train(some, VOCABULARY), LlamaTokenizer.train(some, VOCABULARY)]


def beside_peers(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Case]:
    """A tokenizer warm and cold, each with its peers on the same vocabulary."""
    if isinstance(tokenizer, ByteBPETokenizer):
        others = {"tiktoken": tiktoken_of(tokenizer), "hf-tokenizers": hugging_face_of(tokenizer)}
    elif isinstance(tokenizer, LlamaTokenizer):
        others = {"sentencepiece": sentencepiece_of(tokenizer)}
    else:
        raise InputError(f"a {tokenizer.kind} tokenizer has no peer to be measured beside")
    name, expected = f"{tokenizer.kind} {tokenizer.vocab_size}", encode_all(tokenizer.encode, texts)

    def cold() -> Ids:
        tokenizer.forget()
        return encode_all(tokenizer.encode, texts)

    cases = []
    for peer, encode in others.items():
        if encode_all(encode, texts) != expected:
            raise AnertError(f"{peer} has other ids than {name} on this text: nothing to compare")
        cases.append(Case(f"{name} {peer}", partial(encode_all, encode, texts)))
        cases.append(Case(f"{name} warm, to {peer}", partial(encode_all, tokenizer.encode, texts), cases[-1].name))
        cases.append(Case(f"{name} cold, to {peer}", cold, f"{name} {peer}"))
    return cases


def encode_all(encode: Callable[[str], list[int]], texts: Sequence[str]) -> Ids:
    return [encode(t) for t in texts]


def peer_module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise InputError(f"the comparison is with {name}, which is not installed: pip install {name}") from None


def tiktoken_of(tokenizer: ByteBPETokenizer) -> Callable[[str], list[int]]:
    """tiktoken with the same ranks: only where merging by rank of the result is merging by rank of the pair."""
    v = tokenizer.vocabulary
    if len(v.splits) != 1:
        raise InputError("tiktoken has one split pattern, this tokenizer several: nothing to compare with")
    ranks = {t: i for i, t in enumerate(v.tokens) if t}
    made = peer_module("tiktoken").Encoding(
        "anert-bench", pat_str=v.splits[0], mergeable_ranks=ranks, special_tokens=dict(tokenizer.specials)
    )
    return made.encode_ordinary


def hugging_face_of(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    """Hugging Face tokenizers, of the tokenizer.json that we write."""
    from anert.tokenizer.hf_files import write_directory

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one thread each
    with tempfile.TemporaryDirectory() as folder:
        write_directory(tokenizer, Path(folder))
        content = json.loads((Path(folder) / "tokenizer.json").read_text("utf-8"))
    content["added_tokens"] = []  # looking for specials is not what is compared
    made = peer_module("tokenizers").Tokenizer.from_str(json.dumps(content))

    def encode(text: str) -> list[int]:
        ids: list[int] = made.encode(text, add_special_tokens=False).ids
        return ids

    return encode


def sentencepiece_of(tokenizer: LlamaTokenizer) -> Callable[[str], list[int]]:
    """SentencePiece, of the .model that we write."""
    from anert.tokenizer.llama_files import write_model

    made = peer_module("sentencepiece").SentencePieceProcessor(model_proto=write_model(tokenizer.model))
    return made.encode
