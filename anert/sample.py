"""Choosing the next token (temperature, top-k, top-p, min-p, repetition penalty; reproducible by seed), and telling a
text with a model: `generate` from a checkpoint, `continue_text` with networks that exist."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from anert.errors import InputError, NonFiniteError

if TYPE_CHECKING:
    from anert.network import Network
    from anert.plugin import Plugin
    from anert.tokenizer import Tokenizer

SHORTEST_WINDOW = 32
"""Positions of the smallest forward program that sampling compiles; each next one has twice as many."""


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

    def rng(self) -> np.random.Generator:
        """The generator that the seed stands for: Philox (Salmon et al. 2011), keyed by the seed."""
        return np.random.Generator(np.random.Philox(key=self.seed % (1 << 64)))

    def choose(self, logits: NDArray[np.float32], rng: np.random.Generator, recent: Sequence[int] = ()) -> int:
        """The next token. logits: (vocab,); recent: tokens so far. Raises NonFiniteError for NaN or +inf among them.

        One number is drawn from rng, none at temperature 0.
        """
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
    rng: np.random.Generator,
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


def continue_text(
    network: Callable[[int], Network],
    tokenizer: Tokenizer,
    prompt: str,
    settings: Sampler,
    max_tokens: int,
    seconds: float = math.inf,
) -> Iterator[str]:
    """Yield the prompt, then text token by token, until bos or eos, `max_tokens`, or `seconds` have passed.

    `network(length)`: a forward network of at least `length` positions, or the longest there is; past that the context
    slides, its oldest half forgotten. Raises InputError for a prompt that encodes to nothing in a vocabulary without
    bos.
    """
    ids = tokenizer.encode(prompt, bos=tokenizer.bos_id >= 0)
    if not ids:
        raise InputError("the prompt is empty and the tokenizer has no bos token to begin with: give a --prompt")
    rng, stream = settings.rng(), tokenizer.decode_stream()
    for token in ids:
        stream.push(token)
    yield prompt  # as it was written: bos has no text, and a decoder may not give the very characters back
    context, end = list(ids), time.monotonic() + seconds
    for _ in range(max_tokens):
        if time.monotonic() >= end:
            break
        net = network(len(context))
        if len(context) > net.n:
            context = context[len(context) - max(1, net.n // 2) :]
            net = network(len(context))
        tokens = np.zeros(net.n, np.int32)  # what stands behind the last token cannot reach it
        tokens[: len(context)] = context
        logits = net.head.logits(net.forward(tokens), np.array([len(context) - 1], np.int32))[0]
        token = settings.choose(logits, rng, ids)
        if token in (tokenizer.bos_id, tokenizer.eos_id):
            break
        context.append(token)
        ids.append(token)
        yield stream.push(token)
    yield stream.flush()


def generate(
    checkpoint: Path | str,
    prompt: str,
    plugin: Plugin,
    max_tokens: int = 256,
    tokenizer: str = "",
    backend: str = "auto",
    precision: str = "fp32",
    threads: int = 0,
    **settings: Any,
) -> Iterator[str]:
    """Continue `prompt` with the model of a run directory, a step of one, or a llama2.c file (which needs `tokenizer`).

    Yields the prompt and then text as it is chosen. `settings`: fields of Sampler. Raises InputError and its kin.
    """
    from anert.inputs import open_model
    from anert.network import Network
    from anert.param import ParamStore
    from anert.runtime import Runtime

    sampler = Sampler(**settings)
    model, tensors, vocabulary = open_model(plugin, Path(checkpoint), tokenizer)
    rt = Runtime(backend, precision, threads=threads)
    rt.check_memory(6 * sum(s.size for s in model.specs().values()), "the weights")
    store = ParamStore(rt.heap, rt.pool, model.specs(), train=False)
    store.load(tensors)
    networks: dict[int, Network] = {}

    def network(length: int) -> Network:
        window = SHORTEST_WINDOW
        while window < length:
            window *= 2
        window = min(window, model.config.seq_len)
        if window not in networks:
            networks[window] = Network(rt, model, store, window, 1, train=False)
            store.sync()
        return networks[window]

    yield from continue_text(network, vocabulary, prompt, sampler, max_tokens)
