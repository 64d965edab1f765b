"""Byte-level BPE as GPT-2 and tiktoken do it: split by a pattern, then merge bytes by rank within each part."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from anert.errors import InputError
from anert.tokenizer.base import END_OF_TEXT, Tokenizer, WordCache, replace_surrogates
from anert.tokenizer.merge import SHORT, Merges
from anert.tokenizer.split import PATTERNS, splitter

PLAIN_WORDS = 1024
"""Words that are merged before it is worth finding out, in 0.05 s for GPT-2, which words need no merging."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Everything that decides the ids.

    tokens: bytes of every id, b"" for the ids of specials. merges: pairs of ids in order of rank. splits: patterns,
    each applied to the parts that the one before left. whole_words: a part that is itself a token is not merged at all.
    """

    tokens: tuple[bytes, ...]
    merges: tuple[tuple[int, int], ...]
    splits: tuple[str, ...]
    specials: Mapping[str, int] = field(default_factory=dict)
    bos_id: int = -1
    eos_id: int = -1
    whole_words: bool = False
    add_prefix_space: bool = False


class ByteBPETokenizer(Tokenizer):
    """Byte-level BPE. Read one with `load_tokenizer`, or `train` one."""

    kind = "byte-bpe"
    suffix = ".json"
    _per_byte = False

    def __init__(self, vocabulary: Vocabulary) -> None:
        """Raises InputError where a printable ASCII byte or the result of a merge has no id. Other bytes without one
        (SmolLM2 lacks 21 that hardly occur) are dropped from a text, as Hugging Face's tokenizers drop them."""
        v = self.vocabulary = vocabulary
        self.vocab_size, self.bos_id, self.eos_id = len(v.tokens), v.bos_id, v.eos_id
        self.specials = dict(v.specials)
        special_ids = set(self.specials.values())
        self._ids = {t: i for i, t in reversed(list(enumerate(v.tokens))) if t and i not in special_ids}
        self._absent = bytes(b for b in range(256) if bytes([b]) not in self._ids)
        if missing := [b for b in self._absent if 32 <= b < 127]:
            raise InputError(f"vocabulary has no token for byte 0x{missing[0]:02X}: not a byte-level BPE")
        self._byte_id = [self._ids.get(bytes([b]), -1) for b in range(256)].__getitem__
        self._bytes = list(v.tokens)
        for text, i in self.specials.items():
            self._bytes[i] = text.encode()
        self._merges = merge_table(v, self._ids)
        self._short = self._merges.short
        self._alone = self._ids if v.whole_words else dict[bytes, int]()
        """Words that are one token, because whole_words says so or merging them is proven to give it."""
        self._plain_words = 0 if v.whole_words else PLAIN_WORDS
        self._splits = [splitter(s) for s in v.splits]
        self._special_pattern = any_special(self.specials)
        self._cache = WordCache(self._encode_word)

    def __reduce__(self) -> tuple[type[ByteBPETokenizer], tuple[Vocabulary]]:
        return type(self), (self.vocabulary,)

    @functools.cached_property
    def hash(self) -> str:  # type: ignore[override]
        v = self.vocabulary
        import hashlib

        content = [
            [t.hex() for t in v.tokens],
            v.merges,
            v.splits,
            sorted(v.specials.items()),
            [v.bos_id, v.eos_id, v.whole_words, v.add_prefix_space],
        ]
        return hashlib.sha256(b"anert byte-bpe 1\n" + json.dumps(content).encode()).hexdigest()

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        pattern: str = "gpt2",
        specials: Sequence[str] = (END_OF_TEXT,),
        progress: Callable[[float, float], None] | None = None,
    ) -> ByteBPETokenizer:
        """Learn merges from texts; fewer tokens than asked where no pair occurs twice.

        pattern: a name of PATTERNS, or a pattern. Ids: bytes, merges in order, specials last; the first special is bos
        and eos. progress(merges done, merges asked). Raises InputError for a vocab_size under 256 + len(specials).
        """
        from anert.tokenizer.bpe_train import count_words, learn_byte_merges

        n = vocab_size - 256 - len(specials)
        if n < 0:
            least = 256 + len(specials)
            raise InputError(f"vocabulary of {vocab_size}: byte-level BPE needs at least {least} (bytes and specials)")
        split = PATTERNS.get(pattern, pattern)
        merges = learn_byte_merges(count_words(texts, split, specials), n, progress)
        tokens = [bytes([b]) for b in range(256)]
        for a, b in merges:
            tokens.append(tokens[a] + tokens[b])
        ids = {s: len(tokens) + i for i, s in enumerate(specials)}
        end = len(tokens) if specials else -1
        return cls(Vocabulary((*tokens, *(b"" for _ in specials)), tuple(merges), (split,), ids, end, end))

    @classmethod
    def from_ranks(
        cls, ranks: Mapping[bytes, int], pattern: str = "cl100k", specials: Mapping[str, int] | None = None
    ) -> ByteBPETokenizer:
        """tiktoken's form: bytes -> rank, where any two neighbours merge whose concatenation has a rank."""
        from anert.tokenizer.byte_files import ranks_to_vocabulary

        return cls(ranks_to_vocabulary(ranks, PATTERNS.get(pattern, pattern), specials or {}))

    def token_bytes(self, token: int) -> bytes:
        return self._bytes[self._check_id(token)]

    def forget(self) -> None:
        self._cache.clear()

    def save(self, path: Path | str) -> None:
        """Write our JSON: one token a line, in GPT-2's visible alphabet."""
        from anert.tokenizer.byte_files import to_json

        Path(path).write_text(to_json(self.vocabulary), encoding="utf-8")

    def encode_with_specials(self, text: str) -> list[int]:
        """Ids of a text in which special tokens count as such. For text that a program wrote, never a user's."""
        if self._special_pattern is None:
            return self._encode(text, True)
        ids: list[int] = []
        at = 0
        for match in self._special_pattern.finditer(text):
            ids += self._encode(text[at : match.start()], True)
            ids.append(self.specials[match[0]])
            at = match.end()
        return ids + self._encode(text[at:], True)

    def _encode(self, text: str, first: bool) -> list[int]:
        if first and text and self.vocabulary.add_prefix_space and text[0] != " ":
            text = " " + text
        parts = [text]
        for split in self._splits:
            parts = split(parts[0]) if len(parts) == 1 else list(chain.from_iterable(map(split, parts)))
        return list(chain.from_iterable(map(self._cache.__getitem__, parts)))

    def _encode_word(self, word: str) -> Sequence[int]:
        try:
            data = word.encode()
        except UnicodeEncodeError:
            data = replace_surrogates(word).encode()
        if self._absent:
            data = data.translate(None, self._absent)
        if (whole := self._alone.get(data)) is not None:
            return (whole,)
        if self._plain_words:
            self._plain_words -= 1
            if not self._plain_words:
                self._alone = self._merged_alone()
        symbols = list(map(self._byte_id, data))
        return self._short(symbols) if len(symbols) <= SHORT else self._merges.long(symbols)

    def _merged_alone(self) -> dict[bytes, int]:
        """Tokens that merging makes of their own bytes, as far as that is proven: of GPT-2's all."""
        atoms = (i for i in map(self._byte_id, range(256)) if i >= 0)
        reached = self._merges.reached(atoms, self.vocab_size)
        return {t: i for t, i in self._ids.items() if reached[i]}

    def _cut(self, text: str) -> int:
        if self._splits and self.vocabulary.splits[-1] in PATTERNS.values():
            import regex

            # A letter ends its part before a space in both patterns, and no lookahead follows a letter.
            match = regex.search(r"(?r)\p{L} ", text)
            return match.start() + 1 if match else 0
        return 0


def merge_table(v: Vocabulary, ids: Mapping[bytes, int]) -> Merges:
    """Pairs with their ranks and results. Raises InputError for a merge into bytes without an id."""
    rank: dict[tuple[int, int], int] = {}
    result: dict[tuple[int, int], int] = {}
    for r, (a, b) in enumerate(v.merges):
        merged = ids.get(v.tokens[a] + v.tokens[b])
        if merged is None:
            raise InputError(f"merge {r} makes {(v.tokens[a] + v.tokens[b])!r}, which has no id in the vocabulary")
        rank.setdefault((a, b), r)
        result[a, b] = merged
    return Merges(rank, result)


def any_special(specials: Iterable[str]) -> re.Pattern[str] | None:
    """Pattern of the specials, the longest first."""
    longest_first = sorted(filter(None, specials), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
