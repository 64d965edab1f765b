"""Tokenizers beside tiktoken, Hugging Face tokenizers and SentencePiece: one text, one vocabulary, one thread.

Warm: every word has been seen before. Cold: the word cache is empty at the start of each run. Times are the
processor's, of the one thread that encodes: what else runs on the machine matters little.
"""

from __future__ import annotations

import importlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from anert.bench.measure import Case
from anert.bench.options import BenchOptions
from anert.errors import AnertError, InputError
from anert.tokenizer import ByteBPETokenizer, LlamaTokenizer, Tokenizer, load_tokenizer

VOCABULARY = 8192
TRAIN_CHARS = 1 << 20
LARGEST_TEXT = 8 << 20
"""Characters that are measured."""

PIECE = 1 << 16
"""Characters of a text that a run encodes at a time: documents of a book's chapter, for every tokenizer alike."""

Ids = list[list[int]]


def cases(_name: str, options: BenchOptions) -> list[Case]:
    """`anert bench tokenizer --text FILE`: tokenizers, or one of each kind learnt from the text, beside their peers.

    Raises InputError without a text or without a peer's package, AnertError where a peer's ids are others.
    """
    if not options.texts:
        raise InputError("bench tokenizer needs an English text of some megabytes: --text FILE")
    tokenizers = [load_tokenizer(path) for path in options.tokenizers]
    texts = english(options.texts)
    return [case for tokenizer in tokenizers or trained(texts) for case in beside_peers(tokenizer, texts)]


def english(paths: Sequence[Path | str]) -> list[str]:
    """The texts to measure on, in pieces."""
    from anert.data.corpus import checked
    from anert.data.text import Source

    sources = [checked(Source(str(path))) for path in paths]
    text = "".join(piece for source in sources for piece, _ in source.pieces())[:LARGEST_TEXT]
    if not text:
        raise InputError(f"{paths[0]}: no text in it, only whitespace")
    return [text[i : i + PIECE] for i in range(0, len(text), PIECE)]


def megabytes(texts: Sequence[str]) -> float:
    return sum(len(t.encode()) for t in texts) / 1e6


def trained(texts: Sequence[str]) -> list[Tokenizer]:
    """One of each kind, learnt from the text's beginning."""
    some = "".join(texts)[:TRAIN_CHARS].split("\n")
    return [ByteBPETokenizer.train(some, VOCABULARY), LlamaTokenizer.train(some, VOCABULARY)]


def beside_peers(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Case]:
    """A tokenizer warm and cold, each with its peers on the same vocabulary; ids are compared before and after."""
    if isinstance(tokenizer, ByteBPETokenizer):
        others = {"tiktoken": tiktoken_of(tokenizer), "hf-tokenizers": hugging_face_of(tokenizer)}
    elif isinstance(tokenizer, LlamaTokenizer):
        others = {"sentencepiece": sentencepiece_of(tokenizer)}
    else:
        raise InputError(f"a {tokenizer.kind} tokenizer has no peer to be measured beside")
    name, amount = f"{tokenizer.kind} {tokenizer.vocab_size}", megabytes(texts)

    def case(title: str, encode: Callable[[str], list[int]], cold: bool = False, **more: Any) -> Case:
        def run() -> float:
            if cold:
                tokenizer.forget()
            start = time.thread_time()
            encode_all(encode, texts)
            return time.thread_time() - start

        notes = {"threads": 1, "isa": "", "text_mb": round(amount, 3)}
        return Case(f"{name} {title}", run, "MB/s", amount, notes=notes, **more)

    found = []
    for peer, encode in others.items():

        def same(peer: str = peer, encode: Callable[[str], list[int]] = encode) -> None:
            if encode_all(encode, texts) != encode_all(tokenizer.encode, texts):
                raise AnertError(f"{peer} has other ids than {name} on this text: nothing to compare")

        found.append(case(peer, encode, verify=same))
        found.append(case(f"warm, to {peer}", tokenizer.encode, baseline=f"{name} {peer}"))
        found.append(case(f"cold, to {peer}", tokenizer.encode, cold=True, baseline=f"{name} {peer}"))
    return found


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
