"""Text and token files in, batches out: `prepare` takes either and gives a TokenDataset."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from anert.data.dataset import Batch, TokenDataset, TrainBatches
from anert.data.text import END_OF_TEXT, Progress, detect_split, document_pieces, documents, read_blocks
from anert.data.token_file import TokenFile, TokenWriter, open_tokens, sniff
from anert.errors import InputError
from anert.tokenizer import Tokenizer

__all__ = [
    "END_OF_TEXT",
    "Batch",
    "TokenDataset",
    "TokenFile",
    "TokenWriter",
    "TrainBatches",
    "open_tokens",
    "documents",
    "prepare",
    "sniff",
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
    """Tokenize plain text into our token file, streaming; the file appears when it is whole.

    split: how documents are told apart: `endoftext`, `blank`, `line`, `file`, or `auto` (endoftext where the mark is).
    Each one is stripped and has BOS before it (a vocabulary without BOS: EOS after it). progress(bytes read, bytes).
    Raises InputError: unreadable, not UTF-8, or no text in it.
    """
    how = detect_split(text_path) if split == "auto" else split
    bos, eos = bos and tokenizer.bos_id >= 0, (eos or (bos and tokenizer.bos_id < 0)) and tokenizer.eos_id >= 0
    about = tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.hash
    with TokenWriter(out_path, *about) as writer:
        pieces = document_pieces(read_blocks(text_path, progress), how)
        for piece, last in pieces:
            writer.start_document()
            if last:
                writer.write(tokenizer.encode(piece, bos, eos))
                continue
            for ids in tokenizer.encode_pieces(_rest_of_document(piece, pieces), bos, eos):
                writer.write(ids)
        if not writer.n_tokens:
            raise InputError(f"{text_path}: no text in it, only whitespace: there is nothing to train on")
    return open_tokens(out_path)


def _rest_of_document(piece: str, pieces: Iterator[tuple[str, bool]]) -> Iterator[str]:
    yield piece
    for text, last in pieces:
        yield text
        if last:
            return


def prepare(
    data_path: Path | str,
    tokenizer: Tokenizer | None,
    cache_dir: Path | str,
    seq_len: int,
    val: float | str | Path = 0.05,
    vocab_size: int = 0,
    progress: Progress | None = None,
) -> TokenDataset:
    """A TokenDataset of text or tokens, whichever the content is. Text is tokenized once, into cache_dir.

    val: a fraction of the tail (also as text, "0.05"), or a file of either kind. vocab_size: the model's, where it is
    not the tokenizer's. progress(done, total). Raises InputError, as `tokenize_file` and TokenDataset.
    """
    vocab_size = vocab_size or (tokenizer.vocab_size if tokenizer else 0)
    held_out = _fraction(val)
    tokens = _tokens_of(data_path, tokenizer, cache_dir, progress)
    rest = held_out if held_out is not None else _tokens_of(val, tokenizer, cache_dir, progress)
    digest = tokenizer.hash if tokenizer else ""
    return TokenDataset(tokens, seq_len, rest, vocab_size, digest, str(data_path), progress)


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
