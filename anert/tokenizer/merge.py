"""Pair merging, the inner loop of both tokenizers: the best-ranked adjacent pair first, the leftmost of equals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from heapq import heappop, heappush
from itertools import pairwise, repeat
from operator import itemgetter

NO_MERGE = 1 << 62
NEVER = repeat(NO_MERGE)
SHORT = 48
"""Symbols up to which rescanning a list beats a heap."""

SYMBOL_BITS = 25
SYMBOL = (1 << SYMBOL_BITS) - 1
ATOM, UNKNOWN = -1, -2
"""Ranks of symbols that no merge makes, and of those of which it is not known."""


class Merges:
    """A table of pairs of symbols (under 2^25) that merge.

    rank: pair -> order of merging, lower first; pairs of equal rank merge from the left.
    result: pair -> the symbol that replaces it.
    """

    def __init__(self, rank: dict[tuple[int, int], int], result: dict[tuple[int, int], int]) -> None:
        table = {pair: r << SYMBOL_BITS | result[pair] for pair, r in rank.items()}
        self._table, self._find = table, table.get
        """pair -> rank and result in one number, ordered by rank."""
        ranks = Counter(m >> SYMBOL_BITS for m in set(table.values()))
        self._shared = {r for r, n in ranks.items() if n > 1}
        """Ranks with more than one result: where the smallest number is not the leftmost pair."""

    def apply(self, symbols: list[int]) -> list[int]:
        """Merge until no adjacent pair is in the table. O(n log n); short lists are changed in place."""
        return self.short(symbols) if len(symbols) <= SHORT else self.long(symbols)

    def short(self, symbols: list[int]) -> list[int]:
        """`apply` by rescanning, in place."""
        find, shared = self._find, self._shared
        merges = list(map(find, pairwise(symbols), NEVER))
        best = min(merges, default=NO_MERGE)
        while best != NO_MERGE:
            if shared and (rank := best >> SYMBOL_BITS) in shared:
                best = next(m for m in merges if m >> SYMBOL_BITS == rank)
            i = merges.index(best)
            symbols[i] = merged = best & SYMBOL
            del symbols[i + 1], merges[i]
            if not merges:
                break
            if i:
                merges[i - 1] = find((symbols[i - 1], merged), NO_MERGE)
            if i < len(merges):
                merges[i] = find((merged, symbols[i + 1]), NO_MERGE)
            best = min(merges)
        return symbols

    def long(self, symbols: list[int]) -> list[int]:
        """`apply` by a heap, in O(n log n)."""
        find, n = self._find, len(symbols)
        after = list(range(1, n + 1))  # position of the next live symbol, n: none
        before = list(range(-1, n - 1))
        symbols = symbols[:]
        heap: list[tuple[int, int, int, int, int, int]] = []  # rank, position, the next one, both symbols, result

        def offer(i: int, j: int) -> None:
            if (m := find((symbols[i], symbols[j]))) is not None:
                heappush(heap, (m >> SYMBOL_BITS, i, j, symbols[i], symbols[j], m & SYMBOL))

        for i in range(n - 1):
            offer(i, i + 1)
        while heap:
            _, i, j, a, b, merged = heappop(heap)
            if symbols[i] != a or symbols[j] != b or after[i] != j:
                continue  # one of the two has merged with another since
            symbols[i], symbols[j] = merged, -1
            after[i] = k = after[j]
            if k < n:
                before[k] = i
                offer(i, k)
            if before[i] >= 0:
                offer(before[i], i)
        return [s for s in symbols if s >= 0]

    def reached(self, atoms: Iterable[int], n: int) -> bytearray:
        """For each symbol under n, 1 where `apply` is proven to make it alone of the atoms that it consists of.

        By induction along the ranks: with both its parts reached, a symbol is unless some suffix of the left part and
        some prefix of the right one merge first. Those pairs are looked at backwards in time, from the whole parts to
        the atoms. It takes ranks that nothing shares and that grow from part to whole, as training gives them; where
        they do not, only atoms are proven.
        """
        rank, left, right = [UNKNOWN] * n, [0] * n, [0] * n
        for atom in atoms:
            rank[atom] = ATOM
        only_atoms, used, find = bytearray(r == ATOM for r in rank), set[int](), self._find
        for (a, b), made in sorted(self._table.items(), key=itemgetter(1)):
            symbol = made & SYMBOL
            if symbol in used or self._shared:
                return only_atoms
            used.update((a, b))
            x, y, limit = rank[a], rank[b], 0
            if rank[symbol] != UNKNOWN or x == UNKNOWN or y == UNKNOWN:
                continue
            i, j = a, b
            while x != ATOM or y != ATOM:
                if x > y:
                    limit, i = x, right[i]
                    x = rank[i]
                else:  # of equal ones the left merges first
                    limit, j = y + 1, left[j]
                    y = rank[j]
                if find((i, j), NO_MERGE) < limit:
                    break
            else:
                rank[symbol], left[symbol], right[symbol] = made, a, b
        return bytearray(r != UNKNOWN for r in rank)
