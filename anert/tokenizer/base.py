"""What every tokenizer offers, and streaming UTF-8 decoding."""

from __future__ import annotations

import abc
import codecs
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, groupby, repeat
from pathlib import Path
from typing import TYPE_CHECKING

from anert.errors import InputError

if TYPE_CHECKING:
    from concurrent.futures import Executor

END_OF_TEXT = "<|endoftext|>"
CACHE_WORDS = 1 << 18
CACHE_CHARS = 64
SEGMENT = 1 << 16
"""Characters of a long document that are encoded at a time."""

BATCH_CHARS = 1 << 18
"""Characters that one task of `encode_batch` gets at least."""


class WordCache(dict[str, tuple[int, ...]]):
    """Word -> ids, as tuples, which the garbage collector does not walk. Bounded: emptied when full; words over
    CACHE_CHARS are not kept."""

    def __init__(self, encode_word: Callable[[str], Sequence[int]]) -> None:
        super().__init__()
        self.encode_word = encode_word

    def __missing__(self, word: str) -> tuple[int, ...]:
        ids = tuple(self.encode_word(word))
        if len(word) <= CACHE_CHARS:
            if len(self) >= CACHE_WORDS:
                self.clear()
            self[word] = ids
        return ids


def replace_surrogates(text: str) -> str:
    """Lone surrogates, which UTF-8 cannot hold, as U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def utf8_prefix(data: bytes, final: bool, per_byte: bool) -> tuple[str, bytes]:
    """Decode what is decodable: (text, bytes of a character that is not complete yet).

    Invalid bytes become U+FFFD: one for each byte (SentencePiece) or one for each maximal part (WHATWG, Rust, Python).
    final: nothing follows, so the rest is invalid and comes as U+FFFD too.
    """
    out: list[str] = []
    view, at = memoryview(data), 0
    while at < len(data):
        try:
            text, used = codecs.utf_8_decode(view[at:], "strict", final)
        except UnicodeDecodeError as e:
            out += [str(view[at : at + e.start], "utf-8"), "\ufffd"]
            at += e.start + (1 if per_byte else e.end - e.start)
            continue
        out.append(text)
        return "".join(out), data[at + used :]
    return "".join(out), b""


class StreamDecoder:
    """Ids in, text out, one at a time; never half a character. `push` returns "" while a character is incomplete.

    The texts of all `push` calls and the last `flush` together equal `decode` of all ids.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], per_byte: bool) -> None:
        self.token_bytes, self._per_byte = token_bytes, per_byte
        self._pending = b""

    def push(self, token: int) -> str:
        data = self.token_bytes(token)
        if not data and self._per_byte:  # a control token ends a run of bytes
            return self.flush()
        text, self._pending = utf8_prefix(self._pending + data, False, self._per_byte)
        return text

    def flush(self) -> str:
        """Text of an unfinished character: U+FFFD."""
        text, self._pending = utf8_prefix(self._pending, True, self._per_byte)
        return text


class Tokenizer(abc.ABC):
    """Text to ids and back.

    kind: `llama` or `byte-bpe`. bos_id, eos_id: -1 where the vocabulary has none. suffix: of the file that `save`
    writes. hash: sha256 (hex) of the canonical content, equal for files of different formats with the same vocabulary.
    """

    kind: str
    suffix: str
    vocab_size: int
    bos_id: int
    eos_id: int
    hash: str
    _per_byte: bool

    @abc.abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """Bytes that a token stands for (b"" for control tokens). Raises InputError past the vocabulary."""

    @abc.abstractmethod
    def save(self, path: Path | str) -> None:
        """Write the file that `load_tokenizer` reads back to an equal tokenizer."""

    @abc.abstractmethod
    def forget(self) -> None:
        """Empty the word cache."""

    @abc.abstractmethod
    def _encode(self, text: str, first: bool) -> list[int]:
        """Ids of a text, or (first False) of the continuation of one."""

    @abc.abstractmethod
    def _cut(self, text: str) -> int:
        """Rightmost position where text may be cut without changing its ids, whatever follows; 0: nowhere."""

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of a text. Text that looks like a special token is plain text here.

        Raises InputError where bos or eos is asked and the vocabulary has none."""
        if len(text) > 2 * SEGMENT:  # a part at a time stays in the processor's cache
            blocks = (text[i : i + SEGMENT] for i in range(0, len(text), SEGMENT))
            return list(chain.from_iterable(self.encode_pieces(blocks, bos, eos)))
        ids = self._encode(text, True)
        if bos:
            ids.insert(0, self._special("bos", self.bos_id))
        if eos:
            ids.append(self._special("eos", self.eos_id))
        return ids

    def encode_batch(
        self, texts: Sequence[str], bos: bool = False, eos: bool = False, executor: Executor | None = None
    ) -> list[list[int]]:
        """`encode` of every text, in order. executor: any of concurrent.futures; its workers keep the tokenizer."""
        if executor is None:
            return [self.encode(t, bos, eos) for t in texts]
        shipped, chunks = Shipped(self), list(chunked(texts, BATCH_CHARS))
        n = len(chunks)
        done = executor.map(encode_chunk, repeat(shipped, n), chunks, repeat(bos, n), repeat(eos, n))
        return list(chain.from_iterable(done))

    def encode_pieces(self, pieces: Iterable[str], bos: bool = False, eos: bool = False) -> Iterator[list[int]]:
        """`encode` of the pieces' concatenation, in parts and in bounded memory wherever the text can be cut."""
        if bos:
            yield [self._special("bos", self.bos_id)]
        held, first, limit = "", True, SEGMENT
        for piece in pieces:
            held += piece
            if len(held) < limit:
                continue
            if cut := self._cut(held):
                yield self._encode(held[:cut], first)
                held, first, limit = held[cut:], False, SEGMENT
            else:
                limit = 2 * len(held)
        if held:
            yield self._encode(held, first)
        if eos:
            yield [self._special("eos", self.eos_id)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; invalid UTF-8 comes as U+FFFD. Raises InputError for an id past the vocabulary."""
        stream = self.decode_stream()
        parts = map(stream.token_bytes, ids)
        runs = (run for some, run in groupby(parts, bool) if some) if self._per_byte else (parts,)
        return "".join(utf8_prefix(b"".join(run), True, self._per_byte)[0] for run in runs)

    def decode_stream(self) -> StreamDecoder:
        """A decoder that takes one id at a time. Push the prompt first to continue it."""
        return StreamDecoder(self.token_bytes, self._per_byte)

    def _special(self, name: str, token: int) -> int:
        if token < 0:
            raise InputError(f"this {self.kind} tokenizer has no {name} token: encode without {name}")
        return token

    def _check_id(self, token: int) -> int:
        if not 0 <= token < self.vocab_size:
            raise InputError(f"token id {token} is past the vocabulary of {self.vocab_size} tokens")
        return int(token)


class Shipped:
    """A tokenizer on its way to other processes: pickled once, rebuilt once in each worker, with its word cache."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        import pickle

        self.hash = tokenizer.hash
        self._pickled = pickle.dumps(tokenizer)

    def __hash__(self) -> int:
        return hash(self.hash)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Shipped) and self.hash == other.hash

    def tokenizer(self) -> Tokenizer:
        return unpacked(self)

    def build(self) -> Tokenizer:
        """A new tokenizer."""
        import pickle

        tokenizer: Tokenizer = pickle.loads(self._pickled)
        return tokenizer


@functools.lru_cache(maxsize=4)
def unpacked(shipped: Shipped) -> Tokenizer:
    """One tokenizer for all equal Shipped of a process."""
    return shipped.build()


def encode_chunk(shipped: Shipped, texts: Sequence[str], bos: bool, eos: bool) -> list[list[int]]:
    """A task of `encode_batch`."""
    return shipped.tokenizer().encode_batch(texts, bos, eos)


def chunked(texts: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """Runs of texts with at least `size` characters each, but for the last."""
    start = n = 0
    for i, text in enumerate(texts):
        n += len(text)
        if n >= size:
            yield texts[start : i + 1]
            start, n = i + 1, 0
    if start < len(texts):
        yield texts[start:]
