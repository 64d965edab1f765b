"""Llama's tokenizer: BPE by piece scores with SentencePiece's rules.

Semantics: SentencePiece 0.2 (src/bpe_model.cc, src/sentencepiece_processor.cc). Where llama2.c's run.c differs (U+2581
in the input, unknown tokens on decoding) SentencePiece is followed. In here U+2581 is a space, as in tokenizer.bin.
"""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, compress, pairwise
from operator import methodcaller
from pathlib import Path

from anert.errors import InputError
from anert.tokenizer.base import END_OF_TEXT, StreamDecoder, Tokenizer, WordCache, replace_surrogates
from anert.tokenizer.merge import SHORT, Merges

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of pieces, numbered as in sentencepiece_model.proto."""

UNKNOWN_TEXT = " \u2047 ".encode()
CHARACTER = 1 << 24
"""A character without a piece of its own is the symbol CHARACTER + its code point."""

PLAIN_WORDS = 64
"""Words that are merged piece by piece before the table of all pairs, 0.1 s of work for 32,000 pieces, is made."""


@dataclass(frozen=True, slots=True)
class Pieces:
    """What a SentencePiece BPE model says. pieces: text of every id, a plain space for U+2581."""

    pieces: tuple[str, ...]
    scores: tuple[float, ...]
    types: tuple[int, ...]
    bos_id: int = 1
    eos_id: int = 2
    unk_id: int = 0
    byte_fallback: bool = True
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = False
    prefix_once: bool = False
    """The dummy prefix goes only before a text that does not begin with a space (Hugging Face's Metaspace)."""


class LlamaTokenizer(Tokenizer):
    """SentencePiece BPE with dummy prefix and byte fallback. Read one with `load_tokenizer`."""

    kind = "llama"
    _per_byte = True

    def __init__(self, model: Pieces, source: bytes = b"", suffix: str = ".bin") -> None:
        """source: the file it was read from, which `save` writes back byte for byte."""
        self.model, self._source, self.suffix = model, source, suffix
        self.vocab_size, self.bos_id, self.eos_id = len(model.pieces), model.bos_id, model.eos_id
        self._byte_ids = find_byte_ids(model) if model.byte_fallback else []
        ids = numbered(model, NORMAL)
        self._ids = {c: i for c, i in ids.items() if len(c) == 1}
        self._pieces, self._plain_words = ids, PLAIN_WORDS
        self._frozen = numbered(model, USER_DEFINED)
        self._frozen_pattern = any_of(self._frozen)
        self._words = word_pattern(piece for piece in ids if len(piece) > 1)
        self._cache = WordCache(self._encode_word)

    def __reduce__(self) -> tuple[type[LlamaTokenizer], tuple[Pieces, bytes, str]]:
        return type(self), (self.model, self._source, self.suffix)

    @functools.cached_property
    def _merges(self) -> Merges:
        return merge_table(self.model, self._pieces)

    @functools.cached_property
    def hash(self) -> str:  # type: ignore[override]
        import hashlib

        m, digest = self.model, hashlib.sha256(b"anert llama tokenizer 1\n")
        flags = (m.byte_fallback, m.add_dummy_prefix, m.remove_extra_whitespaces)
        digest.update(struct.pack("<4i3?", len(m.pieces), m.bos_id, m.eos_id, m.unk_id, *flags))
        for piece, score, kind in zip(m.pieces, m.scores, m.types, strict=True):
            text = piece.encode()
            digest.update(struct.pack("<fBi", score + 0.0, kind, len(text)) + text)
        if m.prefix_once:
            digest.update(b"prefix once")
        return digest.hexdigest()

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        specials: Sequence[str] = (END_OF_TEXT,),
        progress: Callable[[float, float], None] | None = None,
    ) -> LlamaTokenizer:
        """Learn pieces from texts, as SentencePiece's BPE with llama2.c's settings; fewer where no pair occurs twice.

        Ids: unk, bos, eos, 256 bytes, merged pieces in order, characters. specials: marks that separate texts and are
        not learned. progress(merges done, merges asked). Raises InputError for a vocab_size under 260.
        """
        from anert.tokenizer.bpe_train import LLAMA_SPLIT, count_words, learn_pieces

        fixed = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
        if vocab_size <= len(fixed):
            raise InputError(
                f"vocabulary of {vocab_size}: Llama's needs at least {len(fixed) + 1} (bytes and specials)"
            )
        texts = (replace_surrogates(t.replace("\u2581", " ")) for t in texts)
        words = count_words(texts, LLAMA_SPLIT, specials, " ")
        merged, characters = learn_pieces(words, vocab_size - len(fixed), progress)
        pieces = [p for p in (*merged, *characters) if p not in fixed]
        scores = [0.0] * len(fixed) + [-float(i) for i in range(len(pieces))]
        types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(pieces)
        return cls(Pieces((*fixed, *pieces), tuple(scores), tuple(types)))

    def token_bytes(self, token: int) -> bytes:
        return piece_bytes(self.model.pieces[self._check_id(token)], self.model.types[token])

    def forget(self) -> None:
        self._cache.clear()

    def save(self, path: Path | str) -> None:
        """Write the file it was read from, where the name's suffix is that file's; else SentencePiece's .model or
        llama2.c's tokenizer.bin by the suffix. Raises InputError for what only a tokenizer.json can say."""
        from anert.tokenizer.llama_files import write_bin, write_model

        suffix = Path(path).suffix
        if self._source and suffix == self.suffix:
            Path(path).write_bytes(self._source)
        elif self.model.prefix_once:
            raise InputError(f"{path}: this tokenizer's Metaspace is for tokenizer.json alone: save it as .json")
        else:
            Path(path).write_bytes(write_model(self.model) if suffix == ".model" else write_bin(self.model))

    def decode_stream(self) -> StreamDecoder:
        """As SentencePiece: the text loses the one leading space that the dummy prefix gave it."""
        model = self.model
        at_start = model.add_dummy_prefix or model.remove_extra_whitespaces

        def bytes_of(token: int) -> bytes:
            nonlocal at_start
            data = self.token_bytes(token)
            if at_start and model.types[token] != CONTROL:
                if model.types[token] in (NORMAL, USER_DEFINED):
                    data = data.removeprefix(b" ")
                at_start = model.remove_extra_whitespaces and not data
            return data

        return StreamDecoder(bytes_of, self._per_byte)

    def _encode(self, text: str, first: bool) -> list[int]:
        text = self._normalize(text, first)
        if self._frozen_pattern is None:
            return self._encode_span(text)
        ids: list[int] = []
        at = 0
        for match in self._frozen_pattern.finditer(text):
            ids += self._encode_span(text[at : match.start()])
            ids.append(self._frozen[match[0]])
            at = match.end()
        return ids + self._encode_span(text[at:])

    def _normalize(self, text: str, first: bool) -> str:
        if self.model.remove_extra_whitespaces:
            text = re.sub(" +", " ", text.strip(" ")).replace("\u2581", " ").rstrip(" ")
        else:
            text = text.replace("\u2581", " ")
        prefix = first and text and self.model.add_dummy_prefix and not (self.model.prefix_once and text[0] == " ")
        return " " + text if prefix else text

    def _encode_span(self, text: str) -> list[int]:
        words = [text] if self._words is None else self._words.findall(text)
        ids = list(chain.from_iterable(map(self._cache.__getitem__, words)))
        return ids if self._byte_ids else join_unknown(ids, self.model.unk_id)

    def _encode_word(self, word: str) -> list[int]:
        ids = self._ids
        symbols = [ids[c] if c in ids else CHARACTER + ord(c) for c in word]
        out: list[int] = []
        if self._plain_words and len(symbols) <= SHORT:
            self._plain_words -= 1
            symbols = merge_plainly(self.model, self._pieces, symbols)
        else:
            symbols = self._merges.apply(symbols)
        for symbol in symbols:
            if symbol < CHARACTER:
                out.append(symbol)
            elif self._byte_ids:
                out += [self._byte_ids[b] for b in replace_surrogates(chr(symbol - CHARACTER)).encode()]
            else:
                out.append(self.model.unk_id)
        return out

    def _cut(self, text: str) -> int:
        if self._words is None or self._frozen or self.model.remove_extra_whitespaces:
            return 0
        import regex

        match = regex.search("(?r)[^ \u2581][ \u2581]", text)
        return match.start() + 1 if match else 0


def numbered(model: Pieces, kind: int) -> dict[str, int]:
    """Piece -> id for the pieces of a type; of equal ones the first."""
    chosen, last = list(map(kind.__eq__, reversed(model.types))), len(model.types) - 1
    return dict(zip(compress(reversed(model.pieces), chosen), compress(range(last, -1, -1), chosen), strict=True))


def piece_bytes(piece: str, kind: int) -> bytes:
    """What a piece decodes to, before the leading space is dropped."""
    if kind == BYTE:
        return bytes([int(piece[3:5], 16)])
    if kind == UNKNOWN:
        return UNKNOWN_TEXT
    return b"" if kind == CONTROL else piece.encode()


def find_byte_ids(model: Pieces) -> list[int]:
    """Ids of the 256 byte pieces in order of the byte; empty unless all are there."""
    found = {int(p[3:5], 16): i for i, (p, t) in enumerate(zip(model.pieces, model.types, strict=True)) if t == BYTE}
    return [found[b] for b in range(256)] if len(found) == 256 else []


def merge_table(model: Pieces, ids: dict[str, int]) -> Merges:
    """Every way to put a piece together from two symbols; the higher score first. ids: the pieces that may merge."""
    order = {score: r for r, score in enumerate(sorted({model.scores[i] for i in ids.values()}, reverse=True))}
    symbols = ids | {c: CHARACTER + ord(c) for c in set().union(*ids) - ids.keys()}
    rank: dict[tuple[int, int], int] = {}
    result: dict[tuple[int, int], int] = {}
    for piece, i in ids.items():
        r = order[model.scores[i]]
        for k in range(1, len(piece)):
            left, right = symbols.get(piece[:k]), symbols.get(piece[k:])
            if left is not None and right is not None:
                rank[left, right], result[left, right] = r, i
    return Merges(rank, result)


def merge_plainly(model: Pieces, ids: dict[str, int], symbols: Sequence[int]) -> list[int]:
    """What merge_table's Merges make of a short word, looked up pair by pair."""
    parts = [model.pieces[s] if s < CHARACTER else chr(s - CHARACTER) for s in symbols]
    while True:
        found = [(-model.scores[ids[a + b]], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ids]
        if not found:
            return [ids[p] if p in ids else CHARACTER + ord(p) for p in parts]
        _, i = min(found)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def any_of(pieces: Iterable[str]) -> re.Pattern[str] | None:
    """Pattern of the longest of some pieces."""
    longest_first = sorted(pieces, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def word_pattern(pieces: Iterable[str]) -> re.Pattern[str] | None:
    """Words that no piece reaches across: spaces and what follows; None where some piece has a space after text."""
    joined = "\0".join(map(methodcaller("lstrip", " "), pieces))
    if " " in joined:
        return None
    alone = "".join(c for c in "\n\r\t" if c not in joined)
    return re.compile(f" *[^ {alone}]+| +|[{alone}]" if alone else " *[^ ]+| +")


def join_unknown(ids: Sequence[int], unk: int) -> list[int]:
    """Without byte fallback a run of unknown characters is one unknown token."""
    return [t for i, t in enumerate(ids) if t != unk or i == 0 or ids[i - 1] != unk]
