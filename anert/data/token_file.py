"""Files of token ids, read by memory map: ours, llm.c's, and raw uint16 as llama2.c, maderix/ANE and nanoGPT write.

Ours, little-endian: a header of 256 bytes (HEADER, zeros behind), uint16 or uint32 ids, zeros up to a multiple of 8,
then if documents are recorded the index of each one's first token as uint64.
"""

from __future__ import annotations

import contextlib
import glob
import os
import platform
import shutil
import struct
import sys
import tempfile
from array import array
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from anert.data.text import GZIP, Progress, open_input
from anert.errors import InputError
from anert.files import publish

MAGIC = b"anertTOK"
VERSION = 1
HEADER = struct.Struct("<8sIIQQIiiI32s")
"""magic, version, bytes of an id, ids, documents, vocabulary, bos, eos (-1: none), zero, sha256 of the tokenizer."""

HEADER_BYTES = 256
LLMC = {20240520: (1, 2), 20240801: (7, 4)}
"""llm.c: magic -> version, bytes of an id (dev/data/data_common.py)."""

LLMC_HEADER_BYTES = 1024
SAMPLE = 1 << 16
OTHER_FILES = {
    b"version https://git-lfs": "a git-lfs pointer: run `git lfs pull` there",
    b"\xff\xfe": "UTF-16 text: convert it to UTF-8 (iconv -f utf-16 -t utf-8)",
    b"\xfe\xff": "UTF-16 text: convert it to UTF-8 (iconv -f utf-16 -t utf-8)",
    b"PK\x03\x04": "a zip archive: unpack it first",
    b"\x93NUMPY": "a NumPy array: write its ids with .astype('<u2').tofile()",
}

Tokens = NDArray[np.unsignedinteger[Any]]
"""Ids: an array, or shards.Joined, which is used as one."""


@dataclass(frozen=True, slots=True)
class TokenFile:
    """An open token file. kind: `anert`, `llm.c` or `raw`; what the kind does not record is 0, -1, "" or None."""

    path: Path
    kind: str
    tokens: Tokens
    """Read-only map of the ids."""
    vocab_size: int = 0
    bos_id: int = -1
    eos_id: int = -1
    tokenizer_hash: str = ""
    documents: NDArray[np.uint64] | None = None
    """Index of each document's first token."""
    note: str = ""
    """What was guessed."""


def sniff(path: Path | str) -> str:
    """`anert`, `llm.c`, `raw` or `text`, by content. Raises InputError: missing, empty, or a known other kind."""
    try:
        with open(path, "rb") as f:
            size = os.fstat(f.fileno()).st_size
            start = f.read(SAMPLE)
    except OSError as e:
        raise InputError(f"{path}: cannot read the data: {e.strerror}") from None
    if not start:
        raise InputError(f"{path}: empty: there is nothing to train on")
    if start.startswith(MAGIC):
        return "anert"
    if size >= LLMC_HEADER_BYTES and struct.unpack_from("<I", start)[0] in LLMC:
        return "llm.c"
    for prefix, what in OTHER_FILES.items():
        if start.startswith(prefix):
            raise InputError(f"{path}: {what}")
    if start.startswith(GZIP):
        with open_input(path) as (f, _, _):
            if _text_or_raw(f.read(SAMPLE), f"{path}") == "raw":
                raise InputError(f"{path}: packed tokens: unpack them (gunzip), they are read by memory map")
        return "text"
    return _text_or_raw(start, f"{path}")


def _text_or_raw(start: bytes, name: str) -> str:
    """Ids of any real vocabulary are no valid UTF-8 without zero bytes for long."""
    if 0 in start:
        return "raw"
    try:
        start.decode()
    except UnicodeDecodeError as e:
        if e.start >= len(start) - 3:
            return "text"
        printable = sum(32 <= b < 127 or b in b"\n\r\t" for b in start)
        if printable > 0.7 * len(start):
            raise InputError(
                f"{name}: text that is not UTF-8 at byte {e.start:,}: convert it (iconv -t utf-8)"
            ) from None
        return "raw"
    return "text"


def open_tokens(path: Path | str, dtype: str = "auto") -> TokenFile:
    """Map a token file. dtype: of raw ids, which no header tells: `uint16`, `uint32`, or `auto`: uint32 where the
    numbers show it.

    Raises InputError: not a token file, a size that its header does not say, or raw ids that could be of either dtype.
    """
    path, width = Path(path), dtype_of(dtype, 0).itemsize if dtype != "auto" else 0
    kind = sniff(path)
    if kind == "text":
        raise InputError(f"{path}: text, not tokens: tokenize it first")
    size = path.stat().st_size
    if kind == "anert":
        return _open_ours(path, size)
    if kind == "llm.c":
        return _open_llmc(path, size)
    if size % 2:
        raise InputError(f"{path}: {size:,} bytes are no uint16 ids, and there is no header: not a token file")
    tokens = np.memmap(path, "<u2", "r")
    wide = width == 4 if width else _is_wide(tokens, path)
    if wide and len(tokens) % 2:
        raise InputError(f"{path}: {size:,} bytes are no uint32 ids: not a token file, or of uint16")
    note = f"{path}: no header, read as uint32 since every second half is small: --data-dtype uint16 says otherwise"
    return TokenFile(path, "raw", tokens.view("<u4") if wide else tokens, note=note if wide and not width else "")


def _is_wide(tokens: Tokens, path: Path) -> bool:
    """Whether uint16 numbers are halves of uint32 ids: every second one is then small, which no text's ids are.
    Raises InputError where so few numbers may be either."""
    low, high = tokens[0:SAMPLE:2], tokens[1:SAMPLE:2]
    if len(tokens) % 2 or int(high.max()) >= 16 or not low.any():
        return False
    if high.any() and int(low.max()) < 256:  # as halves: ids over 65,535 alone
        return False
    if len(high) < 64:
        what = f"{len(tokens)} raw uint16 ids or {len(high)} uint32 ones, and no header says which"
        raise InputError(f"{path}: {what}: give --data-dtype uint16 or uint32")
    return True


def _open_ours(path: Path, size: int) -> TokenFile:
    with open(path, "rb") as f:
        head = f.read(HEADER_BYTES)
    if len(head) < HEADER_BYTES:
        raise InputError(f"{path}: {size} bytes, the header alone has {HEADER_BYTES}: truncated token file")
    _, version, width, n, n_documents, vocab, bos, eos, _, digest = HEADER.unpack_from(head)
    if version != VERSION:
        raise InputError(f"{path}: token file version {version}, this anert reads {VERSION}: update anert")
    if width not in (2, 4):
        raise InputError(f"{path}: ids of {width} bytes; 2 or 4 expected: damaged token file")
    at = HEADER_BYTES + _padded(width * n)
    needs = at + 8 * n_documents if n_documents else HEADER_BYTES + width * n
    if size != needs:
        raise InputError(f"{path}: {size:,} bytes, its header says {needs:,}: truncated or damaged token file")
    tokens = np.memmap(path, f"<u{width}", "r", HEADER_BYTES, (n,)) if n else np.zeros(0, f"<u{width}")
    starts = np.memmap(path, "<u8", "r", at, (n_documents,)) if n_documents else None
    return TokenFile(path, "anert", tokens, vocab, bos, eos, digest.hex() if any(digest) else "", starts)


def _open_llmc(path: Path, size: int) -> TokenFile:
    magic, version, n = np.fromfile(path, "<u4", 3).tolist()
    expected, width = LLMC[magic]
    if version != expected:
        raise InputError(f"{path}: llm.c token file version {version}, expected {expected}")
    needs = LLMC_HEADER_BYTES + n * width
    if size != needs:
        raise InputError(f"{path}: {size:,} bytes, its llm.c header says {needs:,}: truncated or damaged")
    tokens = np.memmap(path, f"<u{width}", "r", LLMC_HEADER_BYTES, (n,)) if n else np.zeros(0, f"<u{width}")
    return TokenFile(path, "llm.c", tokens)


def _padded(n: int) -> int:
    return -(-n // 8) * 8


def dtype_of(name: str, vocab_size: int) -> np.dtype[Any]:
    """Little-endian uint16 or uint32 by name; `auto`: the smaller that holds the vocabulary. Raises InputError."""
    if name not in ("auto", "uint16", "uint32"):
        raise InputError(f"dtype {name!r}: expected auto, uint16 or uint32")
    if name == "uint16" and vocab_size > 1 << 16:
        raise InputError(f"uint16 holds ids up to 65,535, the vocabulary has {vocab_size:,}: use uint32")
    return np.dtype("<u2" if name != "uint32" and vocab_size <= 1 << 16 else "<u4")


class TokenWriter:
    """Writes our file as ids come, under a temporary name; it appears when the `with` block ends well, or not at all.

    raw: ids alone, as llama2.c and maderix/ANE read them. Memory is bounded: document starts wait in a temporary file.
    Raises InputError where the disk refuses (full, no permission); nothing is left then.
    """

    def __init__(
        self,
        path: Path | str,
        vocab_size: int,
        bos_id: int = -1,
        eos_id: int = -1,
        tokenizer_hash: str = "",
        dtype: str = "auto",
        raw: bool = False,
    ) -> None:
        self.path, self.raw = Path(path), raw
        self._temporary = self.path.with_name(f".{self.path.name}.{platform.node()}-{os.getpid()}.tmp")
        self._about = vocab_size, bos_id, eos_id, tokenizer_hash
        self.dtype = dtype_of(dtype, vocab_size)
        self.n_tokens = self.n_documents = 0
        self._documents = array("Q")
        self._pending = array("H" if self.dtype.itemsize == 2 else "I")
        self._file: BinaryIO | None = None
        self._starts: BinaryIO | None = None

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            remove_abandoned(self.path)
            self._file = open(self._temporary, "wb")
            self._starts = tempfile.TemporaryFile(dir=self.path.parent)
            self._file.write(b"" if self.raw else bytes(HEADER_BYTES))
        except OSError as e:
            with contextlib.suppress(OSError):
                self._temporary.unlink(missing_ok=True)
            raise self._refused(e) from None
        return self

    def start_document(self) -> None:
        self.n_documents += 1
        self._documents.append(self.n_tokens)

    def write(self, ids: list[int]) -> None:
        """Append ids, each of 0 to vocab_size - 1."""
        self._pending.fromlist(ids)
        self.n_tokens += len(ids)
        if len(self._pending) >= SAMPLE:
            self._flush()

    def append(self, other: TokenFile) -> None:
        """Append all of another file, with its documents."""
        starts = other.documents if other.documents is not None else np.zeros(0, "<u8")
        for at in range(0, len(starts), SAMPLE):
            self._documents.frombytes((np.asarray(starts[at : at + SAMPLE], np.uint64) + self.n_tokens).tobytes())
            self._flush()
        for at in range(0, len(other.tokens), SAMPLE):
            self._pending.frombytes(np.asarray(other.tokens[at : at + SAMPLE]).astype(self.dtype).tobytes())
            self._flush()
        self.n_documents += len(starts)
        self.n_tokens += len(other.tokens)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None and self._starts is not None
        try:
            if kind is None:
                self._finish(self._file, self._starts)
        except OSError as e:
            raise self._refused(e) from None
        finally:
            self._starts.close()
            with contextlib.suppress(OSError):  # a full disk refuses what is buffered once more
                self._file.close()
            self._temporary.unlink(missing_ok=True)

    def _flush(self) -> None:
        assert self._file is not None and self._starts is not None
        try:
            self._file.write(little_endian(self._pending))
            self._starts.write(little_endian(self._documents))
        except OSError as e:
            raise self._refused(e) from None
        del self._pending[:], self._documents[:]

    def _finish(self, f: BinaryIO, starts: BinaryIO) -> None:
        self._flush()
        if not self.raw:
            vocab, bos, eos, digest = self._about
            n, width = self.n_tokens, self.dtype.itemsize
            if self.n_documents:
                f.write(bytes(_padded(n * width) - n * width))
                starts.seek(0)
                shutil.copyfileobj(starts, f)
            f.seek(0)
            sha = bytes.fromhex(digest) if digest else bytes(32)
            f.write(HEADER.pack(MAGIC, VERSION, width, n, self.n_documents, vocab, bos, eos, 0, sha))
        f.flush()
        publish(self._temporary, self.path)

    def _refused(self, e: OSError) -> InputError:
        return InputError(f"{self.path}: cannot write the tokens: {e.strerror}")


def little_endian(numbers: array[int]) -> bytes:
    """The bytes of an array as files hold them."""
    if sys.byteorder == "big":
        numbers = numbers[:]
        numbers.byteswap()
    return numbers.tobytes()


def remove_abandoned(path: Path) -> None:
    """Remove what a killed process of this machine left of its attempt to write a file."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.{glob.escape(platform.node())}-*.tmp"):
        pid = left.name.removesuffix(".tmp").rpartition("-")[2]
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            left.unlink(missing_ok=True)
        except (ValueError, PermissionError):
            continue


def check_ids(tokens: Tokens, vocab_size: int, name: Path | str, progress: Progress | None = None) -> None:
    """Raises InputError with id and position of the first id past the vocabulary. progress(ids seen, ids)."""
    step = 1 << 22
    for at in range(0, len(tokens), step):
        block = tokens[at : at + step]
        block = np.asarray(block)
        if int(block.max()) >= vocab_size:
            first = at + int(np.argmax(block >= vocab_size))
            what = f"token {int(tokens[first])} at position {first:,}"
            raise InputError(f"{name}: {what} is past the vocabulary of {vocab_size}: another tokenizer made it")
        if progress:
            progress(min(at + step, len(tokens)), len(tokens))
