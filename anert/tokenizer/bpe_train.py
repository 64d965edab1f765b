"""Learning BPE merges: pair counts are kept up to date word by word, never recounted."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from heapq import heapify, heappop, heappush

import regex

from anert.tokenizer.base import replace_surrogates

Pair = tuple[int, int]


def count_words(texts: Iterable[str], split: str, specials: Sequence[str]) -> Counter[str]:
    """How often each part of the split occurs; specials in the texts separate and do not count."""
    pattern, words = regex.compile(split), Counter[str]()
    apart = regex.compile("|".join(map(regex.escape, specials))) if specials else None
    for text in texts:
        for part in apart.split(text) if apart else [text]:
            words.update(pattern.findall(part))
    return words


def learn_merges(
    texts: Iterable[str],
    n_merges: int,
    split: str,
    specials: Sequence[str] = (),
    progress: Callable[[float, float], None] | None = None,
) -> list[Pair]:
    """The n most useful merges in order; symbol 256 + i is the result of merge i. Fewer where no pair occurs twice.

    The most frequent pair merges next; of equally frequent ones the pair of smaller ids.
    """
    words = count_words(texts, split, specials)
    symbols = [list(replace_surrogates(w).encode()) for w in words]
    counts = list(words.values())
    pairs: Counter[Pair] = Counter()
    where: defaultdict[Pair, set[int]] = defaultdict(set)
    for i, word in enumerate(symbols):
        for pair in itertools.pairwise(word):
            pairs[pair] += counts[i]
            where[pair].add(i)
    heap = [(-n, pair) for pair, n in pairs.items()]
    heapify(heap)
    merges: list[Pair] = []
    while heap and len(merges) < n_merges:
        n, pair = heappop(heap)
        if pairs[pair] != -n:
            continue  # the count has changed since: its new value is in the heap too
        if n > -2:
            break
        changed: set[Pair] = set()
        for i in where.pop(pair):
            changed |= merge_word(symbols, i, pair, 256 + len(merges), counts[i], pairs, where)
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
