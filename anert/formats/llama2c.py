"""llama2.c's v0 model file ("legacy", export.py): what its run.c reads.

Header: int32 dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size (negative: untied classifier), seq_len. Then
float32 tensors, (out, in) row by row, each kind for all layers before the next kind; behind the final norm lie two
tables of RoPE angles that nothing reads, then an untied classifier. No magic: header and size must agree to the byte.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anert.errors import InputError

HEADER = struct.Struct("<7i")
MAGIC = 0x616B3432
"""First word of llama2.c's v1 and v2 files."""

THETA = 10000.0
LARGEST_FIELD = 1 << 24

TABLES = ("freqs_cos", "freqs_sin")
"""The RoPE tables: part of the file, dead weight in it."""

Tensors = dict[str, NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """The header's fields. tied: the classifier is the embedding."""

    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    seq_len: int
    tied: bool = True

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    def problem(self) -> str:
        """What no such model can have, or ""."""
        for f in fields(self):
            if f.name != "tied" and not 0 < getattr(self, f.name) <= LARGEST_FIELD:
                return f"{f.name} = {getattr(self, f.name)}"
        if self.dim % self.n_heads or self.head_dim % 2:
            return f"dim = {self.dim} for {self.n_heads} heads of an even size"
        if self.n_heads % self.n_kv_heads:
            return f"{self.n_heads} heads over {self.n_kv_heads} key-value heads"
        return ""


def layout(config: LlamaConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a model's tensors, in file order, RoPE tables included."""
    c = config
    q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    per_layer: dict[str, tuple[int, ...]] = {
        "attn_norm": (c.dim,),
        "wq": (q, c.dim),
        "wk": (kv, c.dim),
        "wv": (kv, c.dim),
        "wo": (c.dim, q),
        "ffn_norm": (c.dim,),
        "w1": (c.hidden_dim, c.dim),
        "w2": (c.dim, c.hidden_dim),
        "w3": (c.hidden_dim, c.dim),
    }
    yield "tok_embeddings", (c.vocab_size, c.dim)
    for kind, shape in per_layer.items():
        for i in range(c.n_layers):
            yield f"layers.{i}.{kind}", shape
    yield "norm", (c.dim,)
    yield "freqs_cos", (c.seq_len, c.head_dim // 2)
    yield "freqs_sin", (c.seq_len, c.head_dim // 2)
    if not c.tied:
        yield "output", (c.vocab_size, c.dim)


def file_size(config: LlamaConfig) -> int:
    """Bytes of a model's v0 file; by arithmetic, so that a lying header costs nothing."""
    c = config
    kv = c.n_kv_heads * c.head_dim
    layer = 2 * c.dim + 2 * c.dim * c.dim + 2 * kv * c.dim + 3 * c.dim * c.hidden_dim
    embeddings = c.vocab_size * c.dim * (1 if c.tied else 2)
    return HEADER.size + 4 * (embeddings + c.n_layers * layer + c.dim + c.seq_len * c.head_dim)


def sniff(path: Path | str) -> bool:
    """Whether a file is a llama2.c v0 model: a sound header and exactly the size that follows from it."""
    try:
        with open(path, "rb") as f:
            config = _config(f.read(HEADER.size))
            return config is not None and not config.problem() and os.fstat(f.fileno()).st_size == file_size(config)
    except OSError:
        return False


def read_config(path: Path | str) -> LlamaConfig:
    """The header, checked against the file's size. Raises InputError naming what is wrong."""
    try:
        with open(path, "rb") as f:
            head, size = f.read(HEADER.size), os.fstat(f.fileno()).st_size
    except OSError as e:
        raise InputError(f"{path}: cannot read the checkpoint: {e.strerror}") from None
    if head.startswith(b"version https://git-lfs"[: HEADER.size]):
        raise InputError(f"{path}: a git-lfs pointer of {size} bytes, not the checkpoint: run `git lfs pull` there")
    config = _config(head)
    if config is None:
        raise InputError(f"{path}: {size} bytes; a llama2.c checkpoint starts with a header of {HEADER.size}")
    if struct.unpack_from("<I", head)[0] == MAGIC:
        version = struct.unpack_from("<i", head, 4)[0]
        raise InputError(f"{path}: llama2.c version {version}; this reader is for version 0, which has no magic")
    if problem := config.problem():
        raise InputError(f"{path}: not a llama2.c v0 checkpoint: its header says {problem}")
    if size != file_size(config):
        needs = f"a model of its header ({_describe(config)}) has {file_size(config):,} bytes"
        raise InputError(f"{path}: {size:,} bytes, but {needs}: truncated, or not a llama2.c v0 checkpoint")
    return config


def read(path: Path | str, mmap: bool = True, tables: bool = False) -> tuple[LlamaConfig, Tensors]:
    """(config, name -> float32 tensor); read-only views of the mapped file, or with mmap=False arrays of their own.

    Names: `tok_embeddings`, `layers.{i}.` + `attn_norm wq wk wv wo ffn_norm w1 w2 w3`, `norm`, and `output` if untied.
    tables: `freqs_cos` and `freqs_sin` too, for a rewrite of the same bytes. q and k rows are in llama2.c's order
    (RoPE over adjacent pairs). Raises InputError.
    """
    config = read_config(path)
    data = (
        np.memmap(path, np.float32, "r", offset=HEADER.size) if mmap else np.fromfile(path, "<f4", offset=HEADER.size)
    )
    tensors: Tensors = {}
    at = 0
    for name, shape in layout(config):
        n = int(np.prod(shape))
        if tables or name not in TABLES:
            tensors[name] = np.asarray(data[at : at + n]).reshape(shape)
        at += n
    return config, tensors


def write(path: Path | str, config: LlamaConfig, tensors: Mapping[str, NDArray[Any]]) -> None:
    """Write a v0 file, atomically: a temporary name beside it, fsynced, then renamed.

    The RoPE tables may be among the tensors; else they are computed (PyTorch's, which llama2.c's own files have, differ
    by a unit in the last place here and there). Raises InputError for a missing, surplus or misshapen tensor, before
    anything is written.
    """
    _check_tensors(config, tensors)
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    vocab = config.vocab_size if config.tied else -config.vocab_size
    c = config
    tensors = dict(zip(TABLES, rope_tables(c.seq_len, c.head_dim), strict=True)) | dict(tensors)
    try:
        with open(temporary, "wb") as f:
            f.write(HEADER.pack(c.dim, c.hidden_dim, c.n_layers, c.n_heads, c.n_kv_heads, vocab, c.seq_len))
            f.writelines(np.ascontiguousarray(tensors[name], "<f4").data for name, _ in layout(config))
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot write the checkpoint: {e.strerror}") from None


def rope_tables(seq_len: int, head_dim: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """cos and sin of position * theta^(-2i/head_dim), (seq_len, head_dim / 2); llama2.c's precompute_freqs_cis."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    freqs = (1.0 / np.power(np.float32(THETA), exponents)).astype(np.float32)
    angles = np.outer(np.arange(seq_len, dtype=np.float32), freqs).astype(np.float64)  # rounded to float32 before
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _config(head: bytes) -> LlamaConfig | None:
    if len(head) < HEADER.size:
        return None
    dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab, seq_len = HEADER.unpack(head)
    return LlamaConfig(dim, hidden_dim, n_layers, n_heads, n_kv_heads, abs(vocab), seq_len, vocab > 0)


def _describe(c: LlamaConfig) -> str:
    heads = f"{c.n_heads}/{c.n_kv_heads} heads"
    return f"dim {c.dim}, hidden {c.hidden_dim}, {c.n_layers} layers, {heads}, vocabulary {c.vocab_size}"


def _check_tensors(config: LlamaConfig, tensors: Mapping[str, NDArray[Any]]) -> None:
    if problem := config.problem():
        raise InputError(f"no llama2.c checkpoint can have {problem}")
    shapes = dict(layout(config))
    if missing := shapes.keys() - tensors.keys() - set(TABLES):
        raise InputError(f"{len(missing)} tensors are missing, {min(missing)} among them")
    if surplus := tensors.keys() - shapes.keys():
        raise InputError(f"{len(surplus)} tensors have no place in a llama2.c checkpoint, {min(surplus)} among them")
    for name, tensor in tensors.items():
        if tensor.shape != shapes[name]:
            raise InputError(f"{name} is {tensor.shape}, a llama2.c checkpoint of this config has {shapes[name]}")
