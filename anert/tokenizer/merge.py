"""Pair merging, the inner loop of both tokenizers: the best-ranked adjacent pair first, the leftmost of equals."""

from __future__ import annotations

import itertools
from heapq import heapify, heappop, heappush

NO_MERGE = 1 << 62
SHORT = 48
"""Symbols up to which rescanning a list beats a heap."""


class Merges:
    """A table of pairs of symbols that merge.

    rank: pair -> order of merging, lower first; pairs of equal rank merge from the left.
    result: pair -> the symbol that replaces it.
    """

    def __init__(self, rank: dict[tuple[int, int], int], result: dict[tuple[int, int], int]) -> None:
        self.rank, self.result = rank, result

    def apply(self, symbols: list[int]) -> list[int]:
        """Merge until no adjacent pair is in the table. O(n log n); short lists are changed in place."""
        if len(symbols) < 2:
            return symbols
        return self._short(symbols) if len(symbols) <= SHORT else self._long(symbols)

    def _short(self, symbols: list[int]) -> list[int]:
        rank = self.rank
        ranks = [rank.get(pair, NO_MERGE) for pair in itertools.pairwise(symbols)]
        while (best := min(ranks)) != NO_MERGE:
            i = ranks.index(best)
            symbols[i] = self.result[symbols[i], symbols[i + 1]]
            del symbols[i + 1], ranks[i]
            if not ranks:
                break
            if i:
                ranks[i - 1] = rank.get((symbols[i - 1], symbols[i]), NO_MERGE)
            if i < len(ranks):
                ranks[i] = rank.get((symbols[i], symbols[i + 1]), NO_MERGE)
        return symbols

    def _long(self, symbols: list[int]) -> list[int]:
        rank, result, n = self.rank, self.result, len(symbols)
        after = list(range(1, n + 1))  # position of the next live symbol, n: none
        before = list(range(-1, n - 1))
        symbols = symbols[:]
        heap = [(rank[pair], i, i + 1, *pair) for i, pair in enumerate(itertools.pairwise(symbols)) if pair in rank]
        heapify(heap)
        while heap:
            _, i, j, a, b = heappop(heap)
            if symbols[i] != a or symbols[j] != b or after[i] != j:
                continue  # one of the two has merged with another since
            symbols[i], symbols[j] = result[a, b], -1
            after[i] = k = after[j]
            if k < n:
                before[k] = i
                if (r := rank.get((symbols[i], symbols[k]))) is not None:
                    heappush(heap, (r, i, k, symbols[i], symbols[k]))
            if (h := before[i]) >= 0 and (r := rank.get((symbols[h], symbols[i]))) is not None:
                heappush(heap, (r, h, i, symbols[h], symbols[i]))
        return [s for s in symbols if s >= 0]
