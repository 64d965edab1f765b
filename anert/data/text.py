"""Plain text as a stream of documents: UTF-8 checked, byte-order mark and CRLF cleaned, in bounded memory."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import itertools
import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import regex

from anert.errors import InputError
from anert.tokenizer import END_OF_TEXT

LFS = b"version https://git-lfs"
BLOCK = 1 << 18
"""Bytes read at a time."""

LONG = 1 << 20
"""Characters after which a document is passed on in pieces."""

SEPARATORS = {"endoftext": regex.escape(END_OF_TEXT), "blank": r"\n[^\S\n]*\n", "line": r"\n", "file": ""}
"""What lies between two documents: TinyStories' mark, a blank line, a line's end, nothing."""

CUTS = {"endoftext": re.escape(END_OF_TEXT).encode(), "blank": rb"\n[ \t\r]*\n", "line": rb"\n"}
"""Where bytes may be cut: ends of some of the separators."""

Progress = Callable[[float, float], None]


STDIN = "-"
"""The path that stands for standard input."""

GZIP = b"\x1f\x8b"
LONGEST_LINE = 1 << 28
"""Bytes of one line of JSON at most."""


@contextlib.contextmanager
def open_input(path: Path | str, start: int = 0) -> Iterator[tuple[BinaryIO, Callable[[], int], int]]:
    """(bytes of a file or of standard input, unpacked where they are gzip; how many were read of the file; its size).

    start: byte to begin at, for files that are not packed. Raises InputError: missing, a git-lfs pointer, damaged gzip.
    """
    try:
        with contextlib.ExitStack() as stack:
            raw: io.BufferedReader[Any]
            if str(path) == STDIN:
                raw, size = io.BufferedReader(Counted(cast(io.BufferedIOBase, sys.stdin.buffer))), 0
            else:
                raw = stack.enter_context(open(path, "rb"))
                size = os.fstat(raw.fileno()).st_size
            raw.seek(start) if start else None
            first = raw.peek(len(LFS))[: len(LFS)] if not start else b""
            if first == LFS:
                raise InputError(f"{path}: a git-lfs pointer, not the text: run `git lfs pull` there")
            packed = first.startswith(GZIP)
            stream = stack.enter_context(gzip.open(raw)) if packed else raw
            yield cast(BinaryIO, stream), raw.tell, size
    except (gzip.BadGzipFile, zlib.error, EOFError) as e:
        raise InputError(f"{path}: damaged gzip ({e}): get the file again") from None
    except OSError as e:
        raise InputError(f"{path}: cannot read the text: {e.strerror}") from None


class Counted(io.RawIOBase):
    """A stream that cannot seek, with `tell`: bytes read so far."""

    def __init__(self, stream: io.BufferedIOBase) -> None:
        self._stream, self._read = stream, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        n = self._stream.readinto1(buffer)
        self._read += n
        return n

    def tell(self) -> int:
        return self._read


def read_blocks(path: Path | str, progress: Progress | None = None, start: int = 0, end: int = 0) -> Iterator[str]:
    """Text of a UTF-8 file, block by block, with `\\n` line ends and without byte-order mark.

    start, end: the bytes to read (end 0: all), where characters begin. progress(bytes read, bytes of the file).
    Raises InputError as `open_input`, or not UTF-8 (with the byte's position).
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    done, started = start, start > 0
    try:
        with open_input(path, start) as (f, position, size):
            while True:
                block = f.read(min(BLOCK, end - done) if end else BLOCK)
                held = len(decoder.getstate()[0])
                text = decoder.decode(block, final=not block)
                yield newlines.decode(text if started else text.removeprefix("\ufeff"), final=not block)
                started = started or bool(text)
                done += len(block)
                if progress:
                    progress(position(), size)
                if not block:
                    return
    except UnicodeDecodeError as e:
        where = done - held + e.start
        raise InputError(
            f"{path}: not UTF-8 at byte {where:,}: convert it (iconv -t utf-8), or is it no text?"
        ) from None


def json_documents(
    path: Path | str, field: str, progress: Progress | None = None, start: int = 0, end: int = 0
) -> Iterator[tuple[str, bool]]:
    """(text, True) of a field of every line of JSON, as `document_pieces`. start, end: bytes, at the ends of lines.

    Raises InputError, with the line's number: no JSON object, the field missing or no text.
    """
    number, done = 0, start
    with open_input(path, start) as (f, position, size):
        while not end or done < end:
            line = f.readline(LONGEST_LINE + 1)
            if not line:
                break
            number, done = number + 1, done + len(line)
            if progress:
                progress(position(), size)
            try:
                if text := field_of(line if done > len(line) else line.removeprefix(codecs.BOM_UTF8), field):
                    yield text, True
            except ValueError as e:
                before = count_lines(path, start) if start else 0
                raise InputError(f"{path}: line {before + number}: {e}") from None


def field_of(line: bytes, field: str) -> str:
    """A field's text without outer whitespace; "" for a blank line. ValueError says what is wrong."""
    if len(line) > LONGEST_LINE:
        raise ValueError(f"over {LONGEST_LINE >> 20} MiB: not one JSON object a line")
    if not line.strip():
        return ""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"not JSON ({str(e).split(':')[0]})") from None
    if not isinstance(row, dict):
        raise ValueError(f"a JSON {type(row).__name__}, expected an object with the field {field!r}")
    if field not in row:
        raise ValueError(f"no field {field!r}; there are {', '.join(map(repr, list(row)[:8])) or 'none'}")
    if not isinstance(row[field], str):
        raise ValueError(f"field {field!r} is {json.dumps(row[field])[:40]}, not text")
    return str(row[field]).strip()


def count_lines(path: Path | str, end: int) -> int:
    """Line ends in the first `end` bytes of a file."""
    n = done = 0
    with open(path, "rb") as f:
        while done < end and (block := f.read(min(BLOCK, end - done))):
            n, done = n + block.count(b"\n"), done + len(block)
    return n


def detect_split(path: Path | str) -> str:
    """How a text is divided: `endoftext` where its first megabytes hold the mark, else `file`."""
    seen = 0
    tail = ""
    for block in read_blocks(path):
        if END_OF_TEXT in tail + block:
            return "endoftext"
        tail, seen = (tail + block)[-len(END_OF_TEXT) :], seen + len(block)
        if seen > 16 * BLOCK:
            break
    return "file"


def document_pieces(blocks: Iterable[str], split: str) -> Iterator[tuple[str, bool]]:
    """(piece, whether it ends its document). A document's pieces together are stripped of outer whitespace; empty
    documents do not come. split: a key of SEPARATORS. Raises InputError for another."""
    if split not in SEPARATORS:
        raise InputError(f"split {split!r}: expected auto, {', '.join(SEPARATORS)}")
    return _strip(_split(blocks, split))


@dataclass(frozen=True, slots=True)
class Source:
    """A text, or a part of one (bytes start to end; end 0: all). form: `text` or `jsonl`; `auto` goes by the name."""

    path: str
    form: str = "auto"
    split: str = "auto"
    field: str = "text"
    start: int = 0
    end: int = 0

    @property
    def is_jsonl(self) -> bool:
        if self.form not in ("auto", "text", "jsonl"):
            raise InputError(f"format {self.form!r}: expected auto, text or jsonl")
        return self.form == "jsonl" or (
            self.form == "auto" and self.path.lower().removesuffix(".gz").endswith((".jsonl", ".ndjson"))
        )

    def pieces(self, progress: Progress | None = None) -> Iterator[tuple[str, bool]]:
        """`document_pieces` of it. Raises InputError as `read_blocks` and `json_documents`."""
        if self.is_jsonl:
            return json_documents(self.path, self.field, progress, self.start, self.end)
        how = self.split
        if how == "auto":  # standard input is read once: a text without the mark is one document either way
            how = "endoftext" if self.path == STDIN else detect_split(self.path)
        return document_pieces(read_blocks(self.path, progress, self.start, self.end), how)

    def resolved(self) -> Source:
        """The same with the split found out."""
        if self.split != "auto" or self.is_jsonl or self.path == STDIN:
            return self
        return replace(self, split=detect_split(self.path))

    def parts(self, size: int) -> list[Source]:
        """Cut where documents end, into parts of about `size` bytes; whole where it is packed or cannot be cut."""
        pattern = rb"\n" if self.is_jsonl else CUTS.get(self.split)
        if self.path == STDIN or pattern is None or is_gzip(self.path):
            return [self]
        total, cuts = os.stat(self.path).st_size, [0]
        while total - cuts[-1] > size and (at := find_end(self.path, cuts[-1] + size, pattern)) < total:
            cuts.append(at)
        return [replace(self, start=a, end=b) for a, b in itertools.pairwise([*cuts, total])]


def find_end(path: str, start: int, pattern: bytes) -> int:
    """Where the first match after byte `start` ends; the file's size if there is none."""
    separator, held, at = re.compile(pattern), b"", start
    with open(path, "rb") as f:
        f.seek(start)
        while block := f.read(BLOCK):
            held += block
            if match := separator.search(held):
                return at + match.end()
            keep = min(len(held), 1 << 16)
            at, held = at + len(held) - keep, held[-keep:]
        return f.tell()


def is_gzip(path: str) -> bool:
    with open(path, "rb") as f:
        return f.read(2) == GZIP


def documents(path: Path | str, split: str = "auto", progress: Progress | None = None) -> Iterator[str]:
    """Whole documents of a text file, one at a time. Raises InputError as `read_blocks`."""
    held: list[str] = []
    for piece, last in Source(str(path), split=split).pieces(progress):
        held.append(piece)
        if last:
            yield "".join(held)
            held.clear()


def _split(blocks: Iterable[str], split: str) -> Iterator[tuple[str, bool]]:
    separator = regex.compile(SEPARATORS[split]) if SEPARATORS[split] else None
    held = ""
    for block in blocks:
        held += block
        if separator:
            *whole, held = separator.split(held)
            for text in whole:
                yield text, True
        if len(held) > LONG:
            # What stays may be the start of a separator: of the mark, or whitespace of a blank line.
            keep = len(END_OF_TEXT) if split == "endoftext" else len(held) - len(held.rstrip())
            at = max(0, len(held) - keep)
            yield held[:at], False
            held = held[at:]
    yield held, True


def _strip(pieces: Iterable[tuple[str, bool]]) -> Iterator[tuple[str, bool]]:
    started, spaces = False, ""
    for text, last in pieces:
        body = spaces + text if started else text.lstrip()
        kept = body.rstrip()
        if last:
            if started or kept:
                yield kept, True
            started, spaces = False, ""
        elif kept:
            yield kept, False
            started, spaces = True, body[len(kept) :]
        else:
            spaces = body
