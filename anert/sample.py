"""Telling a text with a model: the prompt in one go, then token by token. `sample` opens a checkpoint and yields
events, `tell` goes on with an Engine that exists."""

from __future__ import annotations

import functools
import math
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from anert.errors import InputError
from anert.events import Event, Notice, Text, Told
from anert.sampler import Sampler

if TYPE_CHECKING:
    from anert.model import Decoder
    from anert.plugin import Plugin
    from anert.tokenizer import Tokenizer

ENGINES = ("mil", "numpy")
LONG = 32
"""New tokens that pay for moving a file's weights to huge pages: about 100 ms of one thread."""


class Engine(Protocol):
    """What tells: decode.Session, or numpy_llama.NumpyLlama. `position` of `capacity` positions are seen."""

    @property
    def capacity(self) -> int: ...

    @property
    def position(self) -> int: ...

    def extend(self, tokens: Sequence[int]) -> np.ndarray:
        """See more tokens; logits (vocab,) of what comes next."""
        ...

    def rewind(self, position: int) -> None:
        """Forget the positions from this one on."""
        ...


@dataclass(frozen=True, slots=True)
class Limits:
    """When a text ends, beside bos and eos: after `max_tokens` new tokens, `seconds`, or before any of `stop`."""

    max_tokens: int = 256
    seconds: float = math.inf
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if "" in self.stop:
            raise InputError("a stop string is empty: it would stop every text before it begins")


class StopStrings:
    """Text through which no stop string comes: `push` holds back what may be the beginning of one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop, self._held = tuple(stop), ""
        self.found = ""

    def push(self, text: str) -> str:
        """What can be shown now; `found` is set, and nothing more comes, once a stop string is there."""
        if self.found:
            return ""
        text = self._held + text
        at, first = min(((text.find(s), s) for s in self.stop if s in text), default=(-1, ""))
        if at >= 0:
            self.found, self._held = first, ""
            return text[:at]
        hold = max((k for s in self.stop for k in range(1, len(s)) if text.endswith(s[:k])), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def flush(self) -> str:
        """What was held back, at the end."""
        text, self._held = self._held, ""
        return text


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Ids of a prompt, bos first where there is one. InputError if there is none and the prompt is empty."""
    ids = tokenizer.encode(prompt, bos=tokenizer.bos_id >= 0)
    if not ids:
        raise InputError("the prompt is empty and the tokenizer has no bos token to begin with: give a --prompt")
    return ids


def most_tokens(prompt: str) -> int:
    """How many tokens any tokenizer makes of a prompt at most, before one is read: one a byte of the text as it is or
    normalised, and a few around it."""
    forms = (prompt, *(unicodedata.normalize(form, prompt) for form in ("NFC", "NFD", "NFKC", "NFKD")))
    return max(len(form.encode("utf-8", "surrogatepass")) for form in forms) + 8


class Prefix:
    """The tokens that an engine saw first, and what came out: a text that begins with the same ones goes on from there,
    by the engine's cache."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._logits = np.zeros(0, np.float32)

    def read(self, engine: Engine, tokens: Sequence[int]) -> tuple[np.ndarray, float]:
        """(logits behind `tokens`, which alone the engine has seen then; ms that it took, 0: seen before)."""
        if self._tokens == list(tokens):
            engine.rewind(len(self._tokens))
            return self._logits.copy(), 0.0
        start = time.perf_counter()
        engine.rewind(0)
        self._logits, self._tokens = engine.extend(tokens).copy(), list(tokens)
        return self._logits.copy(), (time.perf_counter() - start) * 1e3

    def lose(self) -> None:
        """The engine's cache holds something else."""
        self._tokens = []


def tell(
    engine: Engine, tokenizer: Tokenizer, prompt: str, settings: Sampler, limits: Limits, index: int = 0,
    prefix: Prefix | None = None,
) -> Iterator[Event]:  # fmt: skip
    """Yield the prompt and what the model makes of it as Text, and at the end Told.

    Past the engine's capacity the context slides: bos and the newest half are read again, with a notice. prefix: of an
    engine that nothing else uses between texts, so that a prompt is read once for all of them.
    """
    prefix = prefix or Prefix()
    ids = encode_prompt(tokenizer, prompt)
    rng, stream, stops = settings.generator(), tokenizer.decode_stream(), StopStrings(limits.stop)
    for token in ids:
        stream.push(token)
    if prompt:
        yield Text(prompt, index)  # as it was written: a decoder may not give the very characters back
    context, n_prompt, slid, made, reason = list(ids), len(ids), 0, 0, "length"
    if len(context) > engine.capacity:
        context = _slide(context, engine.capacity, tokenizer.bos_id)
        slid += 1
        yield _slid_notice(engine.capacity)
    logits, prefill_ms = prefix.read(engine, context)
    now = time.perf_counter()
    end = now + limits.seconds
    while made < limits.max_tokens:
        if made and time.perf_counter() >= end:
            reason = "time"
            break
        token = settings.choose(logits, rng, ids)
        if token in (tokenizer.bos_id, tokenizer.eos_id):
            reason = "end"
            break
        made += 1
        ids.append(token)
        context.append(token)
        if piece := stops.push(stream.push(token)):
            yield Text(piece, index)
        if stops.found:
            reason = "stop"
            break
        if made == limits.max_tokens:
            break
        if engine.position == engine.capacity:
            if not slid:
                yield _slid_notice(engine.capacity)
            slid += 1
            context = _slide(context, engine.capacity, tokenizer.bos_id)
            prefix.lose()
            engine.rewind(0)
            logits = engine.extend(context)
        else:
            logits = engine.extend([token])
    decode_ms = (time.perf_counter() - now) * 1e3
    if rest := stops.push(stream.flush()) + stops.flush():
        yield Text(rest, index)
    yield Told(index, settings.seed, n_prompt, made, reason, slid, prefill_ms, decode_ms)


def _slide(context: Sequence[int], capacity: int, bos: int) -> list[int]:
    """The newest half of what fits, behind bos where the context begins with it."""
    head = [bos] if bos >= 0 and context[0] == bos and capacity > 2 else []
    keep = max(1, capacity // 2 - len(head))
    return [*head, *context[len(context) - keep :]]


def _slid_notice(capacity: int) -> Notice:
    return Notice(
        "warning", f"the text is longer than the model's {capacity} positions: it goes on from the newest half of them"
    )


# ---- From a checkpoint


def open_engine(
    model: Decoder, tensors: Mapping[str, np.ndarray], engine: str = "mil", backend: str = "auto",
    precision: str = "fp32", threads: int = 0, prompt: Callable[[], int] | None = None, weights: str = "fp16",
    positions: int = 0,
) -> Engine:  # fmt: skip
    """The engine that runs a model: `mil` on a backend, `numpy` in float32 beside it. prompt: counts the tokens of the
    longest prompt, so that no wider program is compiled than will run; called while the weights are on their way.
    positions: what a text takes at most, 0: the model's context."""
    if engine == "numpy":
        if weights != "fp16":
            raise InputError(f"weights {weights!r}: engine numpy has the checkpoint's own, in float32")
        from anert.numpy_llama import NumpyLlama

        return NumpyLlama(model, tensors)
    if engine != "mil":
        raise InputError(f"engine {engine!r}: expected {' or '.join(ENGINES)}")
    from anert.decode import Session, open_session, widths_for
    from anert.param import ParamStore
    from anert.runtime import Runtime

    rt = Runtime(backend, precision, threads=threads)
    store = ParamStore(rt.heap, rt.pool, model.specs(), train=False, tensors=tensors)
    rt.check_memory(store.copy_bytes, "the weights")
    session = open_session(rt, model, store, widths_for(1), weights, positions=positions)
    if rt.engine is None:  # an engine of its own may bind programs to surfaces that a thread has locked
        store.sync_ahead()
    try:
        if isinstance(session, Session):
            session.add_widths(widths_for(prompt() if prompt else model.config.seq_len // 2))
    finally:
        store.sync()
    return session


def sample(
    checkpoint: Path | str,
    prompt: str,
    plugin: Plugin,
    tokenizer: str = "",
    num_samples: int = 1,
    max_tokens: int = 256,
    stop: Sequence[str] = (),
    engine: str = "mil",
    backend: str = "auto",
    precision: str = "fp32",
    threads: int = 0,
    weights: str = "fp16",
    **settings: Any,
) -> Iterator[Event]:
    """Continue `prompt` `num_samples` times with the model of a run directory, a step of one, or a model file (which
    may need `tokenizer`); sample i draws with seed + i.

    Yields Notice, Text and, after each text, Told. `settings`: fields of Sampler. Raises InputError and its kin.
    """
    from anert.inputs import open_model

    samplers = [Sampler(**{**settings, "seed": settings.get("seed", 0) + i}) for i in range(num_samples)]
    limits = Limits(max_tokens, stop=tuple(stop))
    model, tensors, load_vocabulary = open_model(plugin, Path(checkpoint), tokenizer, hashed=False)
    vocabulary = functools.cache(load_vocabulary)

    def n_prompt() -> int:
        return min(len(encode_prompt(vocabulary(), prompt)), model.config.seq_len)

    told = open_engine(model, tensors, engine, backend, precision, threads, n_prompt, weights,
                       most_tokens(prompt) + max_tokens)  # fmt: skip
    if getattr(told, "networks", None):
        yield Notice("info", "this model mixes positions outside attention: every token runs the whole window again")
    settle = getattr(told, "settle", None) if max_tokens * num_samples >= LONG else None
    prefix = Prefix()
    for i, sampler in enumerate(samplers):
        for event in tell(told, vocabulary(), prompt, sampler, limits, i, prefix):
            yield event
            if settle and told.position:  # the first new text is shown
                settle()
                settle = None


def generate(checkpoint: Path | str, prompt: str, plugin: Plugin, **options: Any) -> Iterator[str]:
    """The text of `sample` with the same arguments, piece by piece."""
    for event in sample(checkpoint, prompt, plugin, **options):
        if isinstance(event, Text):
            yield event.text
