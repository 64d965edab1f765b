"""Choosing the next token: temperature, top-k, top-p, min-p, repetition penalty; reproducible by seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from anert.errors import InputError, NonFiniteError

RNGS = ("philox", "llama2c")


class Generator(Protocol):
    """Numbers in [0, 1)."""

    def random(self) -> float: ...


class Xorshift:
    """llama2.c's generator: xorshift64* (Vigna 2016), 24 bits of each draw. seed: 1 to 2^64 - 1."""

    def __init__(self, seed: int) -> None:
        self.state = seed

    def random(self) -> float:
        mask = (1 << 64) - 1
        s = self.state
        s ^= s >> 12
        s ^= (s << 25) & mask
        s ^= s >> 27
        self.state = s
        return ((s * 0x2545F4914F6CDD1D & mask) >> 40) / (1 << 24)


@dataclass(frozen=True, slots=True)
class Sampler:
    """How the next token is chosen. The filters apply in this order, each to what the one before left.

    repetition_penalty: logits of recent tokens are divided (negative: multiplied) by it (Keskar et al. 2019, CTRL).
    temperature: 0 takes the likeliest. top_k: the k likeliest (0: all). top_p: the fewest, likeliest first, that reach
    probability p (Holtzman et al. 2019). min_p: those with at least min_p times the likeliest's probability. Of equally
    likely tokens the one with the lower id comes first. Raises InputError for a value that makes no sense.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    repetition_window: int = 64
    """How many of the last tokens count as recent."""
    seed: int = 0
    rng: str = "philox"
    """`llama2c` draws and cuts as llama2.c's run.c does, in its float32, for its text of a seed: temperature and top-p
    alone."""

    def __post_init__(self) -> None:
        for name, fits, needs in (
            ("temperature", 0 <= self.temperature < math.inf, "0 (the likeliest token) or more"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0, at most 1 (all tokens)"),
            ("min_p", 0 <= self.min_p <= 1, "0 (all tokens) to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "more than 0 (1: none)"),
            ("repetition_window", self.repetition_window >= 0, "0 or more"),
        ):
            if not fits:
                raise InputError(f"{name} {getattr(self, name)}: expected {needs}")
        if self.rng not in RNGS:
            raise InputError(f"rng {self.rng!r}: expected {' or '.join(RNGS)}")
        if self.rng == "llama2c":
            if self.top_k or self.min_p or self.repetition_penalty != 1.0:
                raise InputError("rng llama2c: llama2.c has no top-k, min-p or repetition penalty: leave them out")
            if not 0 < self.seed < 1 << 64:
                raise InputError(f"rng llama2c: seed {self.seed}: expected 1 to 2^64 - 1, as llama2.c takes it")

    def generator(self) -> Generator:
        """What the seed stands for: Philox (Salmon et al. 2011) keyed by it, or llama2.c's xorshift; at temperature 0,
        where nobody draws, one that costs no import."""
        if self.rng == "llama2c" or self.temperature == 0:
            return Xorshift(self.seed)
        return np.random.Generator(np.random.Philox(key=self.seed % (1 << 64)))

    def choose(self, logits: NDArray[np.float32], rng: Generator, recent: Sequence[int] = ()) -> int:
        """The next token. logits: (vocab,); recent: tokens so far. Raises NonFiniteError for NaN or +inf among them.

        One number is drawn from rng, none at temperature 0.
        """
        if self.rng == "llama2c":
            return choose_llama2c(logits, rng, self.temperature, self.top_p)
        return choose(
            logits,
            rng,
            self.temperature,
            self.top_k,
            self.top_p,
            self.min_p,
            self.repetition_penalty,
            recent[-self.repetition_window :] if self.repetition_window else (),
        )


def choose(
    logits: NDArray[np.float32],
    rng: Generator,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    recent: Sequence[int] = (),
) -> int:
    """As Sampler.choose, with the settings as arguments (unchecked)."""
    _require_finite(logits)
    if repetition_penalty != 1.0 and len(recent):
        logits = penalise(logits, recent, repetition_penalty)
    if temperature == 0:
        return int(np.argmax(logits))
    ids, p = distribution(logits, temperature, top_k, top_p, min_p)
    cumulative = np.cumsum(p)
    # The draw is below the sum, so that rounding never reaches past the last id.
    at = int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))
    return int(ids[min(at, len(ids) - 1)])


def choose_llama2c(logits: NDArray[np.float32], rng: Generator, temperature: float, top_p: float) -> int:
    """run.c's `sample`: softmax, sums and cut in float32, candidates by probability, the crossing one included."""
    _require_finite(logits)
    if temperature == 0:
        return int(np.argmax(logits))
    scaled = logits / np.float32(temperature)
    p = np.exp(scaled - scaled.max())
    p /= np.cumsum(p)[-1]  # added one by one, as in C
    draw = np.float32(rng.random())
    ids = np.arange(len(p))
    if top_p < 1:
        ids = np.flatnonzero(p >= np.float32(1 - np.float32(top_p)) / np.float32(max(1, len(p) - 1)))
        ids = ids[np.argsort(-p[ids], kind="stable")]
        past = np.flatnonzero(np.cumsum(p[ids]) > np.float32(top_p))
        ids = ids[: past[0] + 1] if len(past) else ids
        draw = draw * np.cumsum(p[ids])[-1]
    at = int(np.searchsorted(np.cumsum(p[ids]), draw, side="right"))
    return int(ids[min(at, len(ids) - 1)])


def distribution(
    logits: NDArray[np.float32], temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """(ids, probabilities) of the tokens that the filters leave; the probabilities sum to 1. temperature > 0."""
    n = len(logits)
    with np.errstate(over="ignore"):  # to -inf, where the temperature is next to nothing
        p = np.exp((logits.astype(np.float64) - float(logits.max())) / temperature)
    p /= p.sum()
    ids = np.arange(n)
    if 0 < top_k < n:
        ids = largest(p, top_k)
        p = p[ids] / p[ids].sum()
    if top_p < 1:
        if len(ids) == n:
            # A token below (1 - top_p) / (n - 1) is never needed: all of these together leave top_p to the others.
            ids = np.flatnonzero(p >= (1 - top_p) / max(1, n - 1))
            ids, p = (ids, p[ids]) if len(ids) else (np.arange(n), p)
        order = np.argsort(-p, kind="stable")
        reached = int(np.searchsorted(np.cumsum(p[order]), top_p, side="left")) + 1
        ids, p = ids[order[:reached]], p[order[:reached]]
    if min_p > 0:
        left = p >= min_p * p.max()
        ids, p = ids[left], p[left]
    return ids, p / p.sum()


def largest(p: NDArray[np.float64], k: int) -> NDArray[np.intp]:
    """Ids of the k largest, in order of id; of equal ones at the edge the lower ids."""
    edge = np.partition(p, len(p) - k)[len(p) - k]
    above = np.flatnonzero(p > edge)
    at_edge = np.flatnonzero(p == edge)[: k - len(above)]
    return np.sort(np.concatenate([above, at_edge]))


def penalise(logits: NDArray[np.float32], recent: Sequence[int], penalty: float) -> NDArray[np.float32]:
    """A copy in which the logits of recent tokens are less likely (penalty > 1) or likelier (< 1)."""
    out = logits.copy()
    ids = np.unique(np.asarray(recent, np.intp))
    ids = ids[(ids >= 0) & (ids < len(out))]
    out[ids] = np.where(out[ids] > 0, out[ids] / penalty, out[ids] * penalty)
    return out


def _require_finite(logits: NDArray[np.float32]) -> None:
    top = float(logits.max())  # NaN if one of them is
    if not math.isfinite(top):
        what = "none is allowed" if top == -math.inf else f"token {int(np.argmax(~(logits < math.inf)))} has {top}"
        raise NonFiniteError(f"logits cannot be sampled: {what}")
