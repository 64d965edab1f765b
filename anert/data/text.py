"""Plain text as a stream of documents: UTF-8 checked, byte-order mark and CRLF cleaned, in bounded memory."""

from __future__ import annotations

import codecs
import io
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import regex

from anert.errors import InputError

END_OF_TEXT = "<|endoftext|>"
BLOCK = 1 << 18
"""Bytes read at a time."""

LONG = 1 << 20
"""Characters after which a document is passed on in pieces."""

SEPARATORS = {"endoftext": regex.escape(END_OF_TEXT), "blank": r"\n[^\S\n]*\n", "line": r"\n", "file": ""}
"""What lies between two documents: TinyStories' mark, a blank line, a line's end, nothing."""

Progress = Callable[[float, float], None]


def read_blocks(path: Path | str, progress: Progress | None = None) -> Iterator[str]:
    """Text of a UTF-8 file, block by block, with `\\n` line ends and without byte-order mark.

    progress(bytes read, bytes of the file). Raises InputError: missing, or not UTF-8 (with the byte's position).
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    done, started = 0, False
    try:
        size = Path(path).stat().st_size
        with open(path, "rb") as f:
            while True:
                block = f.read(BLOCK)
                held = len(decoder.getstate()[0])
                text = decoder.decode(block, final=not block)
                yield newlines.decode(text if started else text.removeprefix("\ufeff"), final=not block)
                started = started or bool(text)
                done += len(block)
                if progress:
                    progress(done, size)
                if not block:
                    return
    except UnicodeDecodeError as e:
        where = done - held + e.start
        raise InputError(
            f"{path}: not UTF-8 at byte {where:,}: convert it (iconv -t utf-8), or is it no text?"
        ) from None
    except OSError as e:
        raise InputError(f"{path}: cannot read the text: {e.strerror}") from None


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


def documents(path: Path | str, split: str = "auto", progress: Progress | None = None) -> Iterator[str]:
    """Whole documents of a text file, one at a time. Raises InputError as `read_blocks`."""
    held: list[str] = []
    how = detect_split(path) if split == "auto" else split
    for piece, last in document_pieces(read_blocks(path, progress), how):
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
