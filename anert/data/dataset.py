"""Batches for training and validation from a token file, in an order that a run can go on with to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anert.data.shards import open_shards, open_tokens
from anert.data.text import Progress
from anert.data.token_file import Tokens, check_ids
from anert.errors import InputError

Batch = tuple[NDArray[np.int32], NDArray[np.int32]]


class TokenDataset:
    """A token file, or shards, as aligned windows of seq_len + 1 ids; neighbours share one id, as in llama2.c.

    val: the fraction of the file's tail that is held out, or the path of another token file; shards that were made
    with a validation part have that, and val is not asked. Where a file is too short
    to hold out a window, nothing is held out and `note` says so. Raises InputError: fewer than seq_len + 2 ids, an id
    past the vocabulary (named with its position), or ids of another tokenizer.
    """

    def __init__(
        self,
        path: Path | str,
        seq_len: int,
        val: float | Path | str = 0.05,
        vocab_size: int = 0,
        tokenizer_hash: str = "",
        name: str = "",
        progress: Progress | None = None,
        dtype: str = "auto",
    ) -> None:
        """vocab_size 0: unchecked. name: what messages call the data (default: path). progress(ids checked, ids).
        dtype: of raw ids, as `token_file.open_tokens` takes it."""
        self.path, self.seq_len, self.name, self.held_out = Path(path), seq_len, name or str(path), val
        if seq_len < 1:
            raise InputError(f"seq_len {seq_len}: at least 1 is needed")
        file = open_tokens(path, dtype)
        self.dtype = dtype
        self.kind, self.bos_id, self.tokenizer_hash = file.kind, file.bos_id, file.tokenizer_hash
        check_tokenizer(self.name, self.tokenizer_hash, tokenizer_hash)
        self.note = file.note
        needs = seq_len + 2
        if len(file.tokens) < needs:
            too_short = f"needs {needs:,} tokens for seq_len {seq_len}, has {len(file.tokens):,}"
            raise InputError(f"{self.name}: {too_short}: give more text, or a smaller seq_len")
        if vocab_size:
            check_ids(file.tokens, vocab_size, self.name, progress)
        if file.kind == "shards" and len(own := open_shards(path, "val").tokens):
            if vocab_size:
                check_ids(own, vocab_size, self.name, progress)
            self._train, self._val = file.tokens, own
        elif isinstance(val, Path | str):
            held_out = TokenDataset(val, seq_len, 0.0, vocab_size, tokenizer_hash, dtype=dtype)
            self._train, self._val = file.tokens, held_out._train
        else:
            self._train, self._val = self._hold_out(file.tokens, val)
        self.train_tokens, self.val_tokens = len(self._train), len(self._val)
        self.n_windows = (self.train_tokens - 1) // seq_len
        self.n_val_windows = max(0, self.val_tokens - 1) // seq_len

    def _hold_out(self, tokens: Tokens, fraction: float) -> tuple[Tokens, Tokens]:
        if not 0 <= fraction < 1:
            raise InputError(f"validation fraction {fraction}: expected 0 or more and less than 1")
        n, seq_len = len(tokens), self.seq_len
        if not fraction:
            return tokens, tokens[n:]
        windows = max(1, round(fraction * ((n - 1) // seq_len)))
        at = n - (windows * seq_len + 1)
        if at < seq_len + 1:
            self.note = (
                f"{self.name}: {n:,} tokens are too few to hold out {fraction:.0%} "
                f"({2 * seq_len + 2:,} at least for seq_len {seq_len}): no validation"
            )
            return tokens, tokens[n:]
        return tokens[:at], tokens[at:]

    def train_batches(self, batch: int, seed: int, rank: int = 0, ranks: int = 1) -> TrainBatches:
        """Endless batches of `batch` windows, a new order every epoch; of `ranks` that take turns, those of `rank`."""
        return TrainBatches(self._train, self.n_windows, self.seq_len, batch, seed, rank, ranks)

    def val_windows(self, batch: int = 1, tokens: int = 0) -> Iterator[Batch]:
        """The same validation batches every time: (inputs, targets), int32 (batch * seq_len,), new arrays each.

        tokens: how many at most (0: all), spread evenly over what was held out. A last batch that is not full is
        dropped, but at least one comes (with windows repeated) unless nothing was held out.
        """
        n, limit = self.n_val_windows, tokens // self.seq_len if tokens else self.n_val_windows
        if not n:
            return
        count = max(batch, min(n, limit) // batch * batch)
        chosen = np.arange(count) % n if count >= n else np.arange(count) * n // count
        for i in range(0, count, batch):
            inputs, targets = (np.empty(batch * self.seq_len, np.int32) for _ in range(2))
            fill(self._val, chosen[i : i + batch].tolist(), self.seq_len, inputs, targets)
            yield inputs, targets

    def unigram_entropy(self) -> float:
        """Entropy of the training ids in nats: the loss of a model that knows only how frequent each is."""
        counts = np.zeros(0, np.int64)
        for at in range(0, self.train_tokens, 1 << 22):
            block = np.bincount(np.asarray(self._train[at : at + (1 << 22)]), minlength=len(counts))
            block[: len(counts)] += counts
            counts = block
        p = counts[counts > 0] / self.train_tokens
        return float(-(p * np.log(p)).sum())


class TrainBatches(Iterator[Batch]):
    """(inputs, targets), int32 (batch * seq_len,), sequence after sequence; two arrays that each step overwrites.

    Every window comes once an epoch, in an order that depends on seed and epoch only. `state_dict` is the cursor, of
    all ranks together: batch i of rank r is number i * ranks + r of the run.
    """

    def __init__(
        self, tokens: Tokens, n_windows: int, seq_len: int, batch: int, seed: int, rank: int = 0, ranks: int = 1
    ) -> None:
        if batch < 1:
            raise InputError(f"batch {batch}: at least 1 is needed")
        self._tokens, self._n, self._seq_len, self._batch, self._seed = tokens, n_windows, seq_len, batch, seed
        self._skip, self._stride = rank * batch, ranks * batch
        self.windows = 0  # served since the start of the run, to all ranks
        self._order = epoch_order(seed, 0, n_windows)
        self._order_epoch = 0
        self._inputs, self._targets = (np.empty(batch * seq_len, np.int32) for _ in range(2))

    @property
    def epoch(self) -> float:
        """How often the data have been seen."""
        return self.windows / self._n

    def __next__(self) -> Batch:
        chosen = [self._window(self.windows + self._skip + i) for i in range(self._batch)]
        fill(self._tokens, chosen, self._seq_len, self._inputs, self._targets)
        self.windows += self._stride
        return self._inputs, self._targets

    def _window(self, served: int) -> int:
        epoch, at = divmod(served, self._n)
        if epoch != self._order_epoch:
            self._order, self._order_epoch = epoch_order(self._seed, epoch, self._n), epoch
        return int(self._order[at])

    def state_dict(self) -> dict[str, int]:
        """The cursor: plain numbers for state.json."""
        return {"windows": self.windows, "seed": self._seed, "n_windows": self._n, "seq_len": self._seq_len}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another iterator stopped. Raises InputError where its data or seed were others."""
        mine = self.state_dict()
        for key in ("seed", "n_windows", "seq_len"):
            if state.get(key) != mine[key]:
                raise InputError(f"cannot resume: the run's data had {key} {state.get(key)}, these have {mine[key]}")
        self.windows = int(state["windows"])


def fill(
    tokens: Tokens, windows: list[int], seq_len: int, inputs: NDArray[np.int32], targets: NDArray[np.int32]
) -> None:
    """Copy windows into inputs and targets (len(windows) * seq_len,): targets are one id later."""
    for row, window in enumerate(windows):
        start, to = window * seq_len, slice(row * seq_len, (row + 1) * seq_len)
        inputs[to] = tokens[start : start + seq_len]
        targets[to] = tokens[start + 1 : start + seq_len + 1]


def epoch_order(seed: int, epoch: int, n: int) -> NDArray[np.uint32]:
    """A permutation of n windows from Philox (Salmon et al. 2011) keyed by seed and epoch: the same everywhere."""
    key = np.array([seed % (1 << 64), epoch], np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(n), kind="stable").astype(np.uint32)


def check_tokenizer(name: str, made_with: str, expected: str) -> None:
    """Raises InputError where a file's tokenizer hash is known and another than expected ("": anything goes)."""
    if made_with and expected and made_with != expected:
        raise InputError(
            f"{name}: tokens of tokenizer {made_with[:12]}, the model's is {expected[:12]}: tokenize the text again"
        )
