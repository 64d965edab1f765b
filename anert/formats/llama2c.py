"""llama2.c's model files: v0 (what run.c reads), v1, and v2 (Q8_0, what runq.c reads). Layouts: its export.py.

v0: seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len; a negative vocab_size means an
untied classifier), then float32 tensors, each kind for all layers before the next kind; behind the final norm lie two
tables of RoPE angles that nothing reads. No magic: header and size must agree to the byte.

v1, v2: 256 bytes of header (magic, version, the seven fields, a byte for tied, in v2 an unaligned int32 group size),
then all norms, then embedding and matrices: float32 in v1; in v2 each tensor as int8 values and float32 scales.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from anert.errors import InputError
from anert.formats.base import (
    LAYER,
    Array,
    Entry,
    LlamaConfig,
    Pretrained,
    Tensors,
    in_memory,
    map_bytes,
    read_head,
    writing,
)

MAGIC = 0x616B3432
HEADER, VERSIONED = struct.Struct("<7i"), struct.Struct("<Ii7iB")
VERSIONED_BYTES = 256
GROUP_SIZE = 64
THETA, NORM_EPS = 10000.0, 1e-5
"""What run.c computes with: the files cannot say anything else."""

TABLES = ("freqs_cos", "freqs_sin")
"""v0's RoPE tables: part of the file, dead weight in it."""

NORMS = ("attn_norm", "ffn_norm")


def layout(config: LlamaConfig, version: int = 0) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a file's tensors, in file order, v0's tables included."""
    c, kinds = config, config.layer_shapes()
    embedding, norm = ("tok_embeddings", (c.vocab_size, c.dim)), ("norm", (c.dim,))

    def layers(*names: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        return ((f"layers.{i}.{kind}", kinds[kind]) for kind in names for i in range(c.n_layers))

    if version == 0:
        yield embedding
        yield from layers(*LAYER)
        yield norm
        yield from ((table, (c.seq_len, c.head_dim // 2)) for table in TABLES)
    else:
        yield from layers(*NORMS)
        yield norm
        yield embedding
        yield from layers(*(kind for kind in LAYER if kind not in NORMS))
    if not c.tied:
        yield "output", (c.vocab_size, c.dim)


def file_size(config: LlamaConfig, version: int = 0, group_size: int = GROUP_SIZE) -> int:
    """Bytes of a model's file, by arithmetic."""
    if version == 0:
        return HEADER.size + 4 * (config.n_params() + config.seq_len * config.head_dim)
    if version == 1:
        return VERSIONED_BYTES + 4 * config.n_params()
    norms = (2 * config.n_layers + 1) * config.dim
    matrices = config.n_params() - norms
    return VERSIONED_BYTES + 4 * norms + matrices + 4 * (matrices // group_size)


def sniff(path: Path, head: bytes) -> bool:
    """Whether a file is a llama2.c model: by magic, or for v0 by a sound header and exactly the size that follows."""
    if head[:4] == MAGIC.to_bytes(4, "little"):
        return True
    if len(head) < HEADER.size:
        return False
    config = _legacy(head)
    return not config.problem() and path.stat().st_size == file_size(config)


def nearly(path: Path, head: bytes) -> str:
    """Why a file is no v0 checkpoint although its header could be one's; "" where the header is nothing like one."""
    if len(head) < HEADER.size:
        return ""
    config = _legacy(head)
    if config.problem() or config.n_layers > 1024 or config.seq_len > 1 << 20:
        return ""
    return _wrong_size(path, path.stat().st_size, config, 0, 1)


def read(path: Path) -> Pretrained:
    """A file of any version. Raises InputError naming what is wrong; nothing is allocated before the size is right."""
    head, size = read_head(path, VERSIONED_BYTES)
    if len(head) < HEADER.size:
        raise InputError(f"{path}: {size} bytes; a llama2.c checkpoint starts with a header of {HEADER.size}")
    version, group = 0, GROUP_SIZE
    if head[:4] == MAGIC.to_bytes(4, "little"):
        config, version, group = _versioned(path, head)
    else:
        config = _legacy(head)
    if problem := config.problem():
        raise InputError(f"{path}: not a llama2.c v{version} checkpoint: its header says {problem}")
    if version == 2 and (group < 1 or any(math.prod(shape) % group for _, shape in _matrices(config))):
        raise InputError(f"{path}: group size {group} does not divide the tensors: damaged llama2.c v2 checkpoint")
    if size != file_size(config, version, group):
        raise InputError(_wrong_size(path, size, config, version, group))
    entries, extra = _entries(path, config, version, group)
    about = {"version": version} | ({"group_size": group} if version == 2 else {})
    return Pretrained(f"v{version}", path, config.describe(), Tensors(entries), about=about, extra=extra)


def write(path: Path, model: Pretrained, version: int, group_size: int = 0) -> None:
    """Write a file of this version, atomically. group_size (v2): 0 takes the file's own, else 64 or a half of it that
    divides dim.

    v0's tables come with a model that was read from v0; else they are computed (PyTorch's, which llama2.c's own files
    have, differ by a unit in the last place here and there). Raises InputError, before anything is written, for a model
    that the format cannot say.
    """
    config = model.llama()
    if why := unsayable(config):
        raise InputError(f"{model.path}: llama2.c's files cannot say {why}: convert to hf or anert")
    group = group_size or int(model.about.get("group_size", 0)) or _group_size(config)
    if version == 2 and (group < 1 or any(math.prod(shape) % group for _, shape in _matrices(config))):
        raise InputError(f"group size {group} does not divide this model's tensors: leave it out to have one chosen")
    with writing(path) as f:
        f.write(_header(config, version, group))
        if version == 2:
            _write_quantized(f, model, config, group)
            return
        tables = dict(zip(TABLES, rope_tables(config.seq_len, config.head_dim), strict=True)) if version == 0 else {}
        for name, _ in layout(config, version):
            array = model.extra.get(name, tables.get(name)) if name in TABLES else model.tensors[name]
            f.write(np.ascontiguousarray(array, "<f4").data)


def unsayable(config: LlamaConfig) -> str:
    """What of a model llama2.c's header has no field for, or ""."""
    c = config
    if c.rope_theta != THETA:
        return f"rope_theta {c.rope_theta:g} (it is {THETA:g} there)"
    if not math.isclose(c.norm_eps, NORM_EPS, rel_tol=1e-6):
        return f"norm_eps {c.norm_eps:g} (it is {NORM_EPS:g} there)"
    return "" if c.head_dim * c.n_heads == c.dim else f"head_dim {c.head_dim} (it is dim / n_heads there)"


def rope_tables(seq_len: int, head_dim: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """cos and sin of position * theta^(-2i/head_dim), (seq_len, head_dim / 2); llama2.c's precompute_freqs_cis."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    freqs = (1.0 / np.power(np.float32(THETA), exponents)).astype(np.float32)
    angles = np.outer(np.arange(seq_len, dtype=np.float32), freqs).astype(np.float64)  # rounded to float32 before
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def quantize(values: Array, group_size: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Q8_0: (values, scales) of groups along the rows: scale = max|w| / 127, to nearest even; a group of zeros has
    scale 0."""
    groups = np.ascontiguousarray(values, np.float32).reshape(-1, group_size)
    scale = np.abs(groups).max(axis=1) / np.float32(127)
    q = np.rint(np.divide(groups, scale[:, None], out=np.zeros_like(groups), where=scale[:, None] > 0))
    return q.astype(np.int8).reshape(-1), scale


def dequantize(q: NDArray[np.int8], scale: NDArray[np.float32], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """q * scale of its group."""
    return (q.reshape(scale.size, -1).astype(np.float32) * scale[:, None]).reshape(shape)


def _wrong_size(path: Path, size: int, config: LlamaConfig, version: int, group: int) -> str:
    model = f"a model of its header ({config.summary()}) has {file_size(config, version, group):,} bytes"
    return f"{path}: {size:,} bytes, but {model}: truncated, or not a llama2.c v{version} checkpoint"


def _legacy(head: bytes) -> LlamaConfig:
    dim, hidden, layers, heads, kv, vocab, seq_len = HEADER.unpack_from(head)
    return LlamaConfig(dim, hidden, layers, heads, kv, abs(vocab), seq_len, vocab > 0)


def _versioned(path: Path, head: bytes) -> tuple[LlamaConfig, int, int]:
    if len(head) < VERSIONED_BYTES:
        raise InputError(f"{path}: {len(head)} bytes; a llama2.c v1 or v2 checkpoint has a header of {VERSIONED_BYTES}")
    _, version, dim, hidden, layers, heads, kv, vocab, seq_len, tied = VERSIONED.unpack_from(head)
    if version not in (1, 2):
        raise InputError(f"{path}: llama2.c version {version}; anert reads 0, 1 and 2")
    config = LlamaConfig(dim, hidden, layers, heads, kv, vocab, seq_len, bool(tied))
    return config, version, struct.unpack_from("<i", head, VERSIONED.size)[0]


def _header(c: LlamaConfig, version: int, group: int) -> bytes:
    fields = [c.dim, c.hidden_dim, c.n_layers, c.n_heads, c.n_kv_heads, c.vocab_size, c.seq_len]
    if version == 0:
        fields[5] *= 1 if c.tied else -1
        return HEADER.pack(*fields)
    head = VERSIONED.pack(MAGIC, version, *fields, c.tied) + (struct.pack("<i", group) if version == 2 else b"")
    return head.ljust(VERSIONED_BYTES, b"\0")


def _matrices(config: LlamaConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """A layer's matrices and the embedding: what v2 quantizes, one of each shape."""
    yield from ((kind, shape) for kind, shape in config.layer_shapes().items() if kind not in NORMS)
    yield "tok_embeddings", (config.vocab_size, config.dim)


def _group_size(config: LlamaConfig) -> int:
    group = GROUP_SIZE
    while config.dim % group:
        group //= 2
    return group


def _entries(path: Path, config: LlamaConfig, version: int, group: int) -> tuple[dict[str, Entry], dict[str, Array]]:
    data = map_bytes(path)
    entries: dict[str, Entry] = {}
    extra: dict[str, Array] = {}
    at = HEADER.size if version == 0 else VERSIONED_BYTES
    for name, shape in layout(config, version):
        n = math.prod(shape)
        if version == 2 and len(shape) == 2:
            scales = n // group
            q = extra[f"{name}.q"] = np.asarray(data[at : at + n]).view(np.int8)
            scale = extra[f"{name}.scale"] = np.frombuffer(data, "<f4", scales, at + n)
            entries[name] = Entry(shape, "Q8_0", partial(dequantize, q, scale, shape))
            at += n + 4 * scales
            continue
        array = np.frombuffer(data, "<f4", n, at).reshape(shape)
        if name in TABLES:
            extra[name] = array
        else:
            entries[name] = in_memory(array, "F32")
        at += 4 * n
    return entries, extra


def _write_quantized(f: BinaryIO, model: Pretrained, config: LlamaConfig, group: int) -> None:
    """Norms as float32, matrices as int8 and scales: those that the model was read with where the groups are the same,
    so that a rewrite has the same bytes (quantizing again moves a scale by a unit in the last place now and then)."""
    for name, shape in layout(config, 2):
        if len(shape) == 1:
            f.write(np.ascontiguousarray(model.tensors[name], "<f4").data)
            continue
        q, scale = model.extra.get(f"{name}.q"), model.extra.get(f"{name}.scale")
        if q is None or scale is None or q.size != scale.size * group:
            q, scale = quantize(model.tensors[name], group)
        f.write(np.ascontiguousarray(q).data)
        f.write(np.ascontiguousarray(scale, "<f4").data)
