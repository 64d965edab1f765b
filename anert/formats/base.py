"""What every format is read into, whatever wrote it: config, tensors that are read when asked for, and a tokenizer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from anert.errors import InputError
from anert.files import publish
from anert.tokenizer import Tokenizer

LARGEST_FIELD = 1 << 24
LFS = b"version https://git-lfs"
LAYER = ("attn_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w1", "w2", "w3")
"""Parameters of a layer, as llama2.c lists them: w1 the gate, w2 down, w3 up."""

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """A Llama-style decoder. Fields as in llama2.c's header; head_dim 0: dim / n_heads; tied: the classifier is the
    embedding; rope_theta 0: no rotation (maderix's static trainer has none)."""

    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    seq_len: int
    tied: bool = True
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    head_dim: int = 0

    def __post_init__(self) -> None:
        if not self.head_dim and self.n_heads > 0:
            object.__setattr__(self, "head_dim", self.dim // self.n_heads)

    @classmethod
    def of(cls, config: Mapping[str, Any], where: Path | str) -> LlamaConfig:
        """From a model's config by field names. Raises InputError where it is no Llama-style decoder's."""
        names = {f.name for f in fields(cls)}
        needed = names - {"tied", "norm_eps", "rope_theta", "head_dim"}
        if odd := sorted(needed - config.keys()) or sorted(config.keys() - names):
            raise InputError(f"{where}: no Llama-style decoder ({', '.join(odd)} in its config): cannot be exported")
        made = cls(**config)
        if problem := made.problem():
            raise InputError(f"{where}: no model can have {problem}")
        return made

    def describe(self) -> dict[str, Any]:
        """Config as a model's own: head_dim 0 where it follows from dim."""
        return asdict(self) | ({"head_dim": 0} if self.head_dim * self.n_heads == self.dim else {})

    def problem(self) -> str:
        """What no such model can have, or ""."""
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type == "int" and not (isinstance(value, int) and 0 < value <= LARGEST_FIELD):
                return f"{f.name} = {value}"
        if self.head_dim * self.n_heads != self.dim and self.head_dim == self.dim // self.n_heads:
            return f"dim = {self.dim} for {self.n_heads} heads"
        if self.head_dim % 2:
            return f"heads of odd size {self.head_dim}"
        if self.n_heads % self.n_kv_heads:
            return f"{self.n_heads} heads over {self.n_kv_heads} key-value heads"
        if not 0 < self.norm_eps < 1 or not 0 <= self.rope_theta < float("inf"):
            return f"norm_eps = {self.norm_eps}, rope_theta = {self.rope_theta}"
        return ""

    def summary(self) -> str:
        """In words, for messages."""
        heads = f"{self.n_heads}/{self.n_kv_heads} heads"
        shape = f"dim {self.dim}, hidden {self.hidden_dim}, {self.n_layers} layers, {heads}"
        return f"{shape}, vocabulary {self.vocab_size}"

    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """LAYER -> shape, (out, in)."""
        q, kv = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        norm, up, down = (self.dim,), (self.hidden_dim, self.dim), (self.dim, self.hidden_dim)
        shapes = (norm, (q, self.dim), (kv, self.dim), (kv, self.dim), (self.dim, q), norm, up, down, up)
        return dict(zip(LAYER, shapes, strict=True))

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, shape) of every tensor: `tok_embeddings`, `layers.{i}.{kind}`, `norm`, and `output` if untied."""
        yield "tok_embeddings", (self.vocab_size, self.dim)
        for i in range(self.n_layers):
            yield from ((f"layers.{i}.{kind}", shape) for kind, shape in self.layer_shapes().items())
        yield "norm", (self.dim,)
        if not self.tied:
            yield "output", (self.vocab_size, self.dim)

    def n_params(self) -> int:
        """By arithmetic, so that a lying header costs nothing."""
        c, q, kv = self, self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        layer = 2 * c.dim + 2 * q * c.dim + 2 * kv * c.dim + 3 * c.dim * c.hidden_dim
        return c.vocab_size * c.dim * (1 if c.tied else 2) + c.n_layers * layer + c.dim


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor in a file: shape, encoding there (`F32`, `F16`, `BF16`, `Q8_0`, ...), and how to read it."""

    shape: tuple[int, ...]
    encoding: str
    read: Callable[[], Array]


def in_memory(array: Array, encoding: str) -> Entry:
    """The entry of an array that exists, or is a view of a mapped file."""
    return Entry(array.shape, encoding, lambda: array)


class Tensors(Mapping[str, Array]):
    """Name -> fp32 or fp16 array, read or decoded anew each time; a view of the file where it can be."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self.entries = dict(entries)

    @classmethod
    def of(cls, arrays: Mapping[str, Array]) -> Tensors:
        """Arrays that are in memory."""
        names = {"float32": "F32", "float16": "F16"}
        return cls({n: in_memory(a, names.get(a.dtype.name, a.dtype.name)) for n, a in arrays.items()})

    def __getitem__(self, name: str) -> Array:
        return self.entries[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def n_params(self) -> int:
        return sum(int(np.prod(e.shape, dtype=np.int64)) for e in self.entries.values())

    def encodings(self) -> dict[str, int]:
        """Encoding -> parameters stored so, the most used first."""
        count: dict[str, int] = {}
        for e in self.entries.values():
            count[e.encoding] = count.get(e.encoding, 0) + int(np.prod(e.shape, dtype=np.int64))
        return dict(sorted(count.items(), key=lambda item: -item[1]))


@dataclass(slots=True)
class Pretrained:
    """A model as read: the one form between all formats.

    Tensors are named as LlamaConfig.shapes says, (out, in), q and k rows in llama2.c's order (RoPE over adjacent
    pairs); those of a run directory as the plugin's model names them. config: fields of the model's config.
    """

    format: str
    path: Path
    config: dict[str, Any]
    tensors: Tensors
    tokenizer: Callable[[], Tokenizer] | None = None
    tokenizer_name: str = ""
    step: int = -1
    """Optimizer steps; -1: not recorded."""
    about: dict[str, Any] = field(default_factory=dict)
    """What else the file says, for `anert inspect`."""
    extra: dict[str, Array] = field(default_factory=dict)
    """Arrays of the file beside the model's, so that the same format can write the same bytes again."""
    notes: list[str] = field(default_factory=list)
    """What a user should know before using it."""

    def llama(self) -> LlamaConfig:
        """The config as LlamaConfig, the tensors checked against it. Raises InputError."""
        config = LlamaConfig.of(self.config, self.path)
        check_shapes(config, {n: e.shape for n, e in self.tensors.entries.items()}, self.path)
        return config


def check_shapes(config: LlamaConfig, found: Mapping[str, tuple[int, ...]], where: Path | str) -> None:
    """InputError for a missing, surplus or misshapen tensor. Costs no more than `found` is long."""
    n = 2 + (not config.tied) + len(LAYER) * config.n_layers
    if len(found) > n:
        names = {"tok_embeddings", "norm", *(() if config.tied else ("output",))}
        kinds = {f"layers.{i}.{kind}" for i in range(config.n_layers) for kind in LAYER}
        surplus = sorted(found.keys() - names - kinds)
        raise InputError(f"{where}: {len(surplus)} tensors have no place in this architecture, {surplus[0]} among them")
    for name, shape in config.shapes():
        if name not in found:
            raise InputError(f"{where}: tensor {name} is missing ({len(found)} of {n} are there)")
        if tuple(found[name]) != shape:
            raise InputError(f"{where}: {name} is {tuple(found[name])}, its config says {shape}")


def read_head(path: Path, n: int) -> tuple[bytes, int]:
    """(first n bytes, size) of a file. Raises InputError: unreadable, empty, or a git-lfs pointer."""
    try:
        with open(path, "rb") as f:
            head, size = f.read(max(n, len(LFS))), os.fstat(f.fileno()).st_size
    except OSError as e:
        raise InputError(f"{path}: cannot read the model: {e.strerror}") from None
    if head.startswith(LFS):
        raise InputError(f"{path}: a git-lfs pointer of {size} bytes, not the model: run `git lfs pull` there")
    if not size:
        raise InputError(f"{path}: empty, not a model")
    return head[:n], size


def map_bytes(path: Path) -> NDArray[Any]:
    """A file, mapped read-only."""
    try:
        return np.memmap(path, np.uint8, "r")
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: cannot map the model: {e}") from None


def widen_bf16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """bfloat16 bit patterns -> the same values in fp32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow_bf16(values: Array) -> NDArray[np.uint16]:
    """fp32 -> bfloat16 bit patterns, to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A file that appears whole or not at all: a temporary name beside it first. InputError where the
    disk refuses."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            yield f
        publish(temporary, path)
    except OSError as e:
        raise InputError(f"{path}: cannot write the model: {e.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a directory."""
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
