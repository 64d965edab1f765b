"""BLZT training checkpoints (magic 0x424C5A54), read: maderix/ANE versions 2 to 4, and Orion's version 2.

A header of 96 bytes (Orion: 88, no padding behind the counters), then float32 weights with their Adam moments, 12 bytes
a parameter. maderix (train_large.m, training_dynamic/train.m): for each layer its tensors, then m and v of each; then
final norm and embedding, each with m and v. Orion (core/checkpoint.m): all layers' weights, then their m's and v's
layer by layer, then embedding and final norm. The two versions 2 differ by size alone.

The version does not say what was trained: 2 had no RoPE; 3 first had none, then RoPE and a residual scale of
1/sqrt(2 n_layers); 4 has both. x + a W o = x + (a W) o, so the scale is folded into wo and w2 here.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from anert.errors import InputError
from anert.formats.base import LAYER, Array, Entry, LlamaConfig, Pretrained, Tensors, map_bytes, read_head

MAGIC = 0x424C5A54
HEADER = struct.Struct("<10i2f3d6i")
MADERIX_BYTES, ORION_BYTES = 96, 88
MADERIX_ORDER = ("wq", "wk", "wv", "wo", "w1", "w2", "w3", "attn_norm", "ffn_norm")
ORION_ORDER = ("attn_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w1", "w3", "w2")
ARCHITECTURES = ("norope", "rope", "rope+alpha")
"""What a checkpoint was trained as: without RoPE, with it, with it and the residual scale."""

BY_VERSION = {2: "norope", 4: "rope+alpha"}


def sniff(path: Path, head: bytes) -> bool:
    return head[:4] == MAGIC.to_bytes(4, "little")


def read(path: Path, arch: str = "") -> Pretrained:
    """arch: one of ARCHITECTURES; "": by the version, which version 3 does not settle. Raises InputError."""
    head, size = read_head(path, HEADER.size)
    if len(head) < HEADER.size:
        raise InputError(f"{path}: {size} bytes; a BLZT checkpoint starts with a header of {HEADER.size}: truncated")
    f = HEADER.unpack(head)
    version, n_layers, vocab, dim, hidden, heads, seq_len = f[1], *f[4:10]
    if version not in (2, 3, 4):
        raise InputError(f"{path}: BLZT version {version}; anert reads 2, 3 and 4")
    kv, head_dim = (f[18], f[19]) if version == 4 else (heads, 0)
    arch = arch or BY_VERSION.get(version, "")
    config = LlamaConfig(
        dim, hidden, n_layers, heads, kv, vocab, seq_len, rope_theta=0.0 if arch == "norope" else 1e4, head_dim=head_dim
    )
    if problem := config.problem():
        raise InputError(f"{path}: not a BLZT checkpoint: its header says {problem}")
    if arch not in ARCHITECTURES:
        what = (
            f"--arch {arch!r}: choose" if arch else "BLZT version 3 was written by trainers of three kinds: pass --arch"
        )
        raise InputError(f"{path}: {what} {', '.join(ARCHITECTURES)}")
    needs = 12 * config.n_params()
    orion = version == 2 and size == ORION_BYTES + needs
    if size != MADERIX_BYTES + needs and not orion:
        model = f"a model of its header ({config.summary()}) has {MADERIX_BYTES + needs:,} bytes"
        also = f" (Orion's: {ORION_BYTES + needs:,})" if version == 2 else ""
        raise InputError(f"{path}: {size:,} bytes, but {model}{also}: truncated, or not a BLZT checkpoint")
    alpha = 1 / math.sqrt(2 * n_layers) if arch == "rope+alpha" else 1.0
    offsets = _orion(config) if orion else _maderix(config)
    entries = _entries(path, config, dict(offsets), alpha)
    about: dict[str, Any] = {
        "writer": "orion" if orion else "maderix", "version": version, "trained_as": arch, "loss": f[11], "lr": f[10],
        "total_steps": f[3], "adam_t": f[17],
    }  # fmt: skip
    notes = [f"trained as {arch}" + (f"; residual scale {alpha:.4g} folded into wo and w2" if alpha != 1 else "")]
    return Pretrained("blzt", path, config.describe(), Tensors(entries), step=max(f[2], 0), about=about, notes=notes)


def _maderix(c: LlamaConfig) -> Iterator[tuple[str, int]]:
    """(tensor, byte where it begins); moments are passed over."""
    kinds, at = c.layer_shapes(), MADERIX_BYTES
    layer = sum(map(math.prod, kinds.values()))
    for i in range(c.n_layers):
        start = at
        for kind in MADERIX_ORDER:
            yield f"layers.{i}.{kind}", start
            start += 4 * math.prod(kinds[kind])
        at += 12 * layer
    yield "norm", at
    yield "tok_embeddings", at + 12 * c.dim


def _orion(c: LlamaConfig) -> Iterator[tuple[str, int]]:
    kinds, at = c.layer_shapes(), ORION_BYTES
    for i in range(c.n_layers):
        for kind in ORION_ORDER:
            yield f"layers.{i}.{kind}", at
            at += 4 * math.prod(kinds[kind])
    at = ORION_BYTES + 12 * c.n_layers * sum(map(math.prod, kinds.values()))
    yield "tok_embeddings", at
    yield "norm", at + 4 * c.vocab_size * c.dim


def _entries(path: Path, config: LlamaConfig, offsets: dict[str, int], alpha: float) -> dict[str, Entry]:
    data = map_bytes(path)

    def entry(name: str, shape: tuple[int, ...]) -> Entry:
        def read() -> Array:
            array = np.frombuffer(data, "<f4", math.prod(shape), offsets[name]).reshape(shape)
            folded = alpha != 1 and name.rpartition(".")[2] in ("wo", "w2")
            return array * np.float32(alpha) if folded else array

        return Entry(shape, "F32", read)

    return {name: entry(name, shape) for name, shape in config.shapes()}


assert set(MADERIX_ORDER) == set(ORION_ORDER) == set(LAYER)
