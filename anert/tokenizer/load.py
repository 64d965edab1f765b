"""One door for every tokenizer file: the content decides, not the name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from anert.errors import InputError
from anert.tokenizer import byte_files, hf_files, llama_files
from anert.tokenizer.base import Tokenizer
from anert.tokenizer.byte_bpe import ByteBPETokenizer, Vocabulary
from anert.tokenizer.llama import LlamaTokenizer
from anert.tokenizer.split import PATTERNS

IN_DIRECTORY = ("tokenizer.json", "tokenizer.model", "tokenizer.bin", "vocab.json")
LARGEST = 256 << 20
"""Bytes; the largest public vocabularies are under 40 MB."""


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Read a tokenizer: llama2.c tokenizer.bin, SentencePiece .model, our JSON, Hugging Face tokenizer.json (byte-level
    BPE or Llama's), GPT-2 vocab.json with merges.txt beside it, tiktoken ranks; or a directory with one of them.

    Raises InputError: missing, truncated, a git-lfs pointer, or of a kind that anert does not read.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / n for n in IN_DIRECTORY if (path / n).is_file()]
        if not found:
            raise InputError(f"{path}: no tokenizer in it; looked for {', '.join(IN_DIRECTORY)}")
        path = found[0]
    data = read_bytes(path)
    start = data[:64].lstrip()
    if start.startswith(b"{"):
        content = _json(data, path)
        if hf_files.is_llama(content):
            return LlamaTokenizer(*hf_files.read_llama(content, _beside(path), str(path)), ".json")
        return ByteBPETokenizer(_from_json(content, path))
    if start.startswith(b"#version"):
        return ByteBPETokenizer(_from_vocab_beside(data, path))
    if data[:1] == b"\x0a" and data[1:4] != bytes(3):  # field 1 of a protobuf: a piece; else a longest piece of 10
        return LlamaTokenizer(llama_files.read_model(data, str(path)), data, ".model")
    if _is_ranks(data):
        pattern = PATTERNS["gpt2" if "gpt2" in path.name or "50k" in path.name else "cl100k"]
        return ByteBPETokenizer(byte_files.from_tiktoken(_text(data, path), pattern, str(path)))
    return LlamaTokenizer(llama_files.read_bin(data, str(path)), data, ".bin")


def read_bytes(path: Path) -> bytes:
    """A whole file. Raises InputError: missing, unreadable, empty, too large, or a git-lfs pointer."""
    try:
        size = path.stat().st_size
        if size > LARGEST:
            raise InputError(f"{path}: {size:,} bytes are too many for a tokenizer (at most {LARGEST:,})")
        data = path.read_bytes()
    except OSError as e:
        raise InputError(f"{path}: cannot read the tokenizer: {e.strerror}") from None
    if data.startswith(b"version https://git-lfs"):
        raise InputError(f"{path}: a git-lfs pointer of {size} bytes, not the tokenizer: run `git lfs pull` there")
    if not data.strip():
        raise InputError(f"{path}: empty, not a tokenizer")
    return data


def _from_json(content: dict[str, Any], path: Path) -> Vocabulary:
    if content.get("format") == byte_files.FORMAT:
        return byte_files.from_json(content, str(path))
    if isinstance(content.get("model"), dict):
        return byte_files.from_hugging_face(content, _beside(path), str(path))
    merges = path.with_name(path.name.replace("vocab", "merges")).with_suffix(".txt")
    if not merges.is_file():
        raise InputError(f"{path}: a vocabulary needs its merges: no {merges.name} beside it")
    return byte_files.from_gpt2(content, _text(read_bytes(merges), merges), str(path))


def _beside(path: Path) -> dict[str, Any]:
    """tokenizer_config.json beside a tokenizer.json."""
    beside = path.with_name("tokenizer_config.json")
    return _json(read_bytes(beside), beside) if beside.is_file() else {}


def _from_vocab_beside(data: bytes, path: Path) -> Vocabulary:
    vocab = path.with_name(path.name.replace("merges", "vocab")).with_suffix(".json")
    if not vocab.is_file():
        raise InputError(f"{path}: merges need their vocabulary: no {vocab.name} beside it")
    return byte_files.from_gpt2(_json(read_bytes(vocab), vocab), _text(data, path), str(path))


def _json(data: bytes, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_text(data, path))
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path}: damaged JSON: {e}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: a JSON {type(content).__name__}, not a tokenizer")
    return content


def _text(data: bytes, path: Path) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: not UTF-8 at byte {e.start}: damaged tokenizer") from None


def _is_ranks(data: bytes) -> bool:
    first = data[:400].split(b"\n")[0].split()
    return len(first) == 2 and first[1].isdigit() and first[0].isascii() and len(first[0]) % 4 == 0
