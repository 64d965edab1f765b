"""Learning BPE merges: pair counts are kept up to date word by word, never recounted."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from heapq import heapify, heappop, heappush

import regex

from anert.tokenizer.base import replace_surrogates
from anert.tokenizer.split import splitter

Pair = tuple[int, int]


LLAMA_SPLIT = r" ?[\p{L}\p{M}]+| ?[^\s\p{L}\p{M}\p{N}]+|\p{N}| +(?!\S)| "
"""What a piece may lie in: a word, a digit, punctuation, spaces; other whitespace stays bytes (llama2.c's tokenizer:
split_digits, allow_whitespace_only_pieces)."""

LONGEST_PIECE = 16
"""Characters (SentencePiece's max_sentencepiece_length)."""


def count_words(texts: Iterable[str], split: str, specials: Sequence[str] = (), prefix: str = "") -> Counter[str]:
    """How often each part of the split occurs; specials in the texts separate and do not count. prefix: goes before
    every text."""
    parts, words = splitter(split), Counter[str]()
    apart = regex.compile("|".join(map(regex.escape, specials))) if specials else None
    for text in texts:
        for part in apart.split(text) if apart else [text]:
            words.update(parts(prefix + part if part else part))
    return words


def learn_byte_merges(
    words: Counter[str], n_merges: int, progress: Callable[[float, float], None] | None = None
) -> list[Pair]:
    """`learn_merges` over the UTF-8 bytes of words: symbols 0 to 255, results from 256 on."""
    symbols = [list(replace_surrogates(w).encode()) for w in words]
    return learn_merges(symbols, list(words.values()), n_merges, 256, progress)


def learn_pieces(
    words: Counter[str], n_pieces: int, progress: Callable[[float, float], None] | None = None
) -> tuple[list[str], list[str]]:
    """(merged pieces in order, characters from the most frequent), n_pieces together: SentencePiece's BPE.

    Every character of the words is a piece, as far as there is room; the space, which begins a text, is always one.
    """
    frequency: Counter[str] = Counter()
    for word, n in words.items():
        for c in word:
            frequency[c] += n
    characters = sorted(frequency, key=lambda c: (c != " ", -frequency[c], c))[:n_pieces]
    number = {c: i for i, c in enumerate(characters)}
    runs = Counter[str]()  # a character without a piece is bytes, which no piece reaches across
    for word, n in words.items():
        for known, run in itertools.groupby(word, number.__contains__):
            if known:
                runs["".join(run)] += n
    symbols = [[number[c] for c in run] for run in runs]
    merges = learn_merges(
        symbols, list(runs.values()), n_pieces - len(characters), len(characters), progress, LONGEST_PIECE
    )
    pieces = list(characters)
    for a, b in merges:
        pieces.append(pieces[a] + pieces[b])
    # Two merges can spell one piece; the first decides when it merges.
    return list(dict.fromkeys(pieces[len(characters) :])), characters


def learn_merges(
    symbols: list[list[int]],
    counts: Sequence[int],
    n_merges: int,
    first: int,
    progress: Callable[[float, float], None] | None = None,
    longest: int = 0,
) -> list[Pair]:
    """The n most useful merges in order; symbol first + i is the result of merge i. Fewer where no pair occurs twice.

    symbols: the different words, which are merged in place. counts: how often each occurs. longest: symbols that a
    merge may hold at most (0: any). The most frequent pair merges next; of equally frequent ones the pair of smaller
    ids.
    """
    pairs: Counter[Pair] = Counter()
    where: defaultdict[Pair, set[int]] = defaultdict(set)
    for i, word in enumerate(symbols):
        for pair in itertools.pairwise(word):
            pairs[pair] += counts[i]
            where[pair].add(i)
    heap = [(-n, pair) for pair, n in pairs.items()]
    heapify(heap)
    merges: list[Pair] = []
    lengths: dict[int, int] = {}
    while heap and len(merges) < n_merges:
        n, pair = heappop(heap)
        if pairs[pair] != -n:
            continue  # the count has changed since: its new value is in the heap too
        if n > -2:
            break
        length = lengths.get(pair[0], 1) + lengths.get(pair[1], 1)
        if longest and length > longest:
            continue
        merged = first + len(merges)
        lengths[merged] = length
        changed: set[Pair] = set()
        for i in where.pop(pair):
            changed |= merge_word(symbols, i, pair, merged, counts[i], pairs, where)
        merges.append(pair)
        for p in changed:
            if pairs[p] > 0:
                heappush(heap, (-pairs[p], p))
        if progress and len(merges) % 64 == 0:
            progress(len(merges), n_merges)
    if progress:
        progress(n_merges, n_merges)
    return merges


def merge_word(
    symbols: list[list[int]],
    index: int,
    pair: Pair,
    merged: int,
    count: int,
    pairs: Counter[Pair],
    where: defaultdict[Pair, set[int]],
) -> set[Pair]:
    """Merge a pair in one word and bring the counts up to date; returns the pairs whose count changed."""
    word, out, i = symbols[index], [], 0
    while i < len(word):
        if i + 1 < len(word) and (word[i], word[i + 1]) == pair:
            out.append(merged)
            i += 2
        else:
            out.append(word[i])
            i += 1
    symbols[index] = out
    delta: Counter[Pair] = Counter(itertools.pairwise(out))
    delta.subtract(itertools.pairwise(word))
    for p, n in delta.items():
        if n:
            pairs[p] += n * count
            if n > 0:
                where[p].add(index)
    return {p for p, n in delta.items() if n}
