"""Text and token files in, batches out: `prepare` takes either and gives a TokenDataset."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

from anert.data.corpus import Options as TokenizeOptions
from anert.data.corpus import tokenize
from anert.data.dataset import Batch, TokenDataset, TrainBatches
from anert.data.shards import open_tokens, sniff
from anert.data.text import Progress, detect_split, documents
from anert.data.token_file import TokenFile, TokenWriter
from anert.errors import InputError
from anert.events import Progress as ProgressEvent
from anert.tokenizer import END_OF_TEXT, Tokenizer

__all__ = [
    "END_OF_TEXT",
    "Batch",
    "TokenDataset",
    "TokenFile",
    "TokenWriter",
    "TokenizeOptions",
    "TrainBatches",
    "detect_split",
    "open_tokens",
    "documents",
    "prepare",
    "sniff",
    "tokenize",
    "tokenize_file",
]


def tokenize_file(
    text_path: Path | str,
    tokenizer: Tokenizer,
    out_path: Path | str,
    split: str = "auto",
    bos: bool = True,
    eos: bool = False,
    progress: Progress | None = None,
) -> TokenFile:
    """`tokenize` of one text into one token file, which is replaced. progress(bytes read, bytes).

    Each document has BOS before it (a vocabulary without BOS: EOS after it). Raises InputError as `tokenize`.
    """
    both = bos and eos and min(tokenizer.bos_id, tokenizer.eos_id) >= 0
    ends = "both" if both else "auto" if bos else "eos" if eos else "none"
    with contextlib.closing(
        tokenize([text_path], tokenizer, out_path, TokenizeOptions(split=split, ends=ends), force=True)
    ) as events:
        for event in events:
            if progress and isinstance(event, ProgressEvent):
                progress(event.done, event.total)
    return open_tokens(out_path)


def prepare(
    data_path: Path | str,
    tokenizer: Tokenizer | None,
    cache_dir: Path | str,
    seq_len: int,
    val: float | str | Path = 0.05,
    vocab_size: int = 0,
    progress: Progress | None = None,
    dtype: str = "auto",
) -> TokenDataset:
    """A TokenDataset of text or tokens, whichever the content is. Text is tokenized once, into cache_dir.

    val: a fraction of the tail (also as text, "0.05"), or a file of either kind. vocab_size: the model's, where it is
    not the tokenizer's. progress(done, total). dtype: of raw ids without a header. Raises InputError, as
    `tokenize_file` and TokenDataset.
    """
    vocab_size = vocab_size or (tokenizer.vocab_size if tokenizer else 0)
    held_out = _fraction(val)
    tokens = _tokens_of(data_path, tokenizer, cache_dir, progress)
    rest = held_out if held_out is not None else _tokens_of(val, tokenizer, cache_dir, progress)
    digest = tokenizer.hash if tokenizer else ""
    return TokenDataset(tokens, seq_len, rest, vocab_size, digest, str(data_path), progress, dtype)


def _fraction(val: float | str | Path) -> float | None:
    try:
        return float(val) if not isinstance(val, Path) else None
    except ValueError:
        return None


def _tokens_of(
    path: float | str | Path, tokenizer: Tokenizer | None, cache_dir: Path | str, progress: Progress | None
) -> Path:
    """A token file as it is; of a text the tokens in the cache, made now if need be."""
    path = Path(str(path))
    if sniff(path) != "text":
        return path
    if tokenizer is None:
        raise InputError(f"{path}: text needs a tokenizer: give one with --tokenizer")
    stat = path.stat()
    identity = f"{path.resolve()}\n{stat.st_size}\n{stat.st_mtime_ns}\n{tokenizer.hash}"
    cached = Path(cache_dir) / f"{path.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.bin"
    if not cached.is_file():
        tokenize_file(path, tokenizer, cached, progress=progress)
    return cached
