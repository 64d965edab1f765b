"""GGUF (llama.cpp's container), read: Llama-architecture models with their tokenizer.

Layout (ggml's docs/gguf.md): magic, u32 version, u64 tensors, u64 keys; keys as (string, u32 type, value), tensors as
(string, u32 dims, u64 sizes innermost first, u32 type, u64 offset); then aligned data. Parsed here, because every count
in it must be held against the file's size before it is believed; blocks of quantized types are decoded by the `gguf`
package. q and k are stored in llama2.c's row order already.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from anert.errors import InputError, UnsupportedError
from anert.formats.base import (
    Array,
    Entry,
    LlamaConfig,
    Pretrained,
    Tensors,
    check_shapes,
    map_bytes,
    read_head,
    widen_bf16,
)

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
"""Value types: SCALARS as struct codes, and these two."""

FLOATS = {0: ("F32", "<f4"), 1: ("F16", "<f2"), 30: ("BF16", "<u2")}
LARGEST_DIMS = 4

TOP = {"tok_embeddings": "token_embd.weight", "norm": "output_norm.weight", "output": "output.weight"}
KINDS = {
    "attn_norm": "attn_norm", "wq": "attn_q", "wk": "attn_k", "wv": "attn_v", "wo": "attn_output",
    "ffn_norm": "ffn_norm", "w1": "ffn_gate", "w2": "ffn_down", "w3": "ffn_up",
}  # fmt: skip


def sniff(path: Path, head: bytes) -> bool:
    return head[:4] == MAGIC


def read(path: Path) -> Pretrained:
    """Raises InputError: truncated, damaged, or an architecture that is not plain Llama; UnsupportedError for quantized
    types without the `gguf` package, or that it cannot decode."""
    read_head(path, 4)
    keys, found = _parse(path)
    config = _config(keys, found, path)
    back = {theirs: ours for ours, theirs in islice(_names(config), len(found) + 1)}
    entries = {back.get(name, name): entry for name, entry in found.items()}
    check_shapes(config, {n: e.shape for n, e in entries.items()}, path)
    about = {key.removeprefix("general."): keys[key] for key in ("general.name", "general.license") if key in keys}
    model = Pretrained("gguf", path, config.describe(), Tensors(entries), about=about)
    if "tokenizer.ggml.model" in keys:
        from anert.formats.gguf_tokenizer import tokenizer

        model.tokenizer, model.tokenizer_name = lambda: tokenizer(keys, path), str(keys["tokenizer.ggml.model"])
    return model


class _Cursor:
    """Reads from a mapped file; whatever reaches past the end is an InputError, before anything is allocated."""

    def __init__(self, path: Path) -> None:
        self.path, self.at = path, 0
        self.data = map_bytes(path).data

    def take(self, n: int) -> memoryview:
        if n > len(self.data) - self.at:
            raise InputError(f"{self.path}: truncated or damaged at byte {self.at:,} of {len(self.data):,}")
        self.at += n
        return self.data[self.at - n : self.at]

    def number(self, code: str) -> Any:
        form = struct.Struct("<" + code)
        return form.unpack(self.take(form.size))[0]

    def string(self) -> str:
        start = self.at
        try:
            return str(self.take(self.number("Q")), "utf-8")
        except UnicodeDecodeError:
            raise InputError(f"{self.path}: no UTF-8 text at byte {start:,}: damaged") from None

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            return self._array()
        raise InputError(f"{self.path}: value of unknown type {kind} at byte {self.at:,}: damaged")

    def _array(self) -> Any:
        kind, n = self.number("I"), self.number("Q")
        if kind in SCALARS:
            code = SCALARS[kind]
            return np.frombuffer(self.take(n * struct.calcsize("<" + code)), "<" + code)
        if kind != STRING or n > len(self.data) // 8:
            raise InputError(f"{self.path}: array of {n:,} values of type {kind} at byte {self.at:,}: damaged")
        return [self.string() for _ in range(n)]


def _parse(path: Path) -> tuple[dict[str, Any], dict[str, Entry]]:
    """(keys, tensors by GGUF's names)."""
    cursor = _Cursor(path)
    cursor.take(len(MAGIC))
    version = cursor.number("I")
    if version not in VERSIONS:
        order = "big-endian, or " if version & 0xFFFF == 0 else ""
        raise InputError(f"{path}: GGUF version {version}; anert reads little-endian 2 and 3 ({order}another version)")
    n_tensors, n_keys = cursor.number("Q"), cursor.number("Q")
    keys: dict[str, Any] = {}
    for _ in range(n_keys):
        name = cursor.string()
        keys[name] = cursor.value(cursor.number("I"))
    listed: list[tuple[str, tuple[int, ...], int, int]] = []
    for _ in range(n_tensors):
        name, n_dims = cursor.string(), cursor.number("I")
        if not 0 < n_dims <= LARGEST_DIMS:
            raise InputError(f"{path}: tensor {name!r} of {n_dims} dimensions: damaged")
        sizes = tuple(cursor.number("Q") for _ in range(n_dims))
        listed.append((name, sizes[::-1], cursor.number("I"), cursor.number("Q")))
    alignment = keys.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
        raise InputError(f"{path}: alignment {alignment!r}: damaged")
    base = -(-cursor.at // alignment) * alignment
    return keys, {name: _entry(cursor, name, shape, kind, base + at) for name, shape, kind, at in listed}


def _entry(cursor: _Cursor, name: str, shape: tuple[int, ...], kind: int, start: int) -> Entry:
    encoding, block, width = _type(kind, cursor.path)
    n = math.prod(shape)
    size = n // block * width
    if shape[-1] % block or n < 1 or start + size > len(cursor.data):
        end = f"ends at byte {start + size:,} of {len(cursor.data):,}"
        raise InputError(f"{cursor.path}: {name} {shape} of {encoding} {end}: truncated or damaged, get it again")

    def array() -> Array:
        raw = cursor.data[start : start + size]
        if kind not in FLOATS:
            return _decode(np.frombuffer(raw, np.uint8).reshape(*shape[:-1], -1), kind, cursor.path).reshape(shape)
        found = np.frombuffer(raw, FLOATS[kind][1]).reshape(shape)
        return widen_bf16(found) if encoding == "BF16" else found

    return Entry(shape, encoding, array)


def _type(kind: int, path: Path) -> tuple[str, int, int]:
    """(name, values of a block, bytes of a block) of a tensor type."""
    if kind in FLOATS:
        name, code = FLOATS[kind]
        return name, 1, np.dtype(code).itemsize
    gguf = _package(path)
    try:
        known = gguf.GGMLQuantizationType(kind)
    except ValueError:
        raise InputError(f"{path}: tensor type {kind} is not known: damaged, or newer than the gguf package") from None
    block, width = gguf.GGML_QUANT_SIZES[known]
    return known.name, block, width


def _decode(blocks: Array, kind: int, path: Path) -> Array:
    gguf = _package(path)
    try:
        return gguf.dequantize(blocks, gguf.GGMLQuantizationType(kind))
    except NotImplementedError:
        raise UnsupportedError(
            f"{path}: the gguf package cannot decode {gguf.GGMLQuantizationType(kind).name}"
        ) from None


def _package(path: Path) -> Any:
    try:
        import gguf
    except ImportError:
        raise UnsupportedError(f"{path}: its weights are quantized, which needs: pip install 'anert[gguf]'") from None
    return gguf


def _names(config: LlamaConfig) -> Any:
    """(ours, GGUF's) of every tensor."""
    for name, _ in config.shapes():
        if name in TOP:
            yield name, TOP[name]
        else:
            _, layer, kind = name.split(".")
            yield name, f"blk.{layer}.{KINDS[kind]}.weight"


def _config(keys: dict[str, Any], found: dict[str, Entry], path: Path) -> LlamaConfig:
    kind = keys.get("general.architecture")
    if kind != "llama":
        raise InputError(f"{path}: architecture {kind!r}; anert reads GGUF files of architecture 'llama'")
    if TOP["tok_embeddings"] not in found:
        raise InputError(f"{path}: no tensor {TOP['tok_embeddings']} among {len(found)}: not a whole model")

    def get(name: str, read: Callable[[Any], Any], default: Any = None) -> Any:
        value = keys.get(f"llama.{name}", default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise InputError(f"{path}: llama.{name} is {value!r}, a number was expected")
        return read(value)

    scaling = keys.get("llama.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in found:
        what = scaling if scaling != "none" else "by rope_freqs.weight"
        raise InputError(f"{path}: RoPE scaling {what}: not a plain Llama, which is what anert reads")
    if keys.get("llama.expert_count"):
        raise InputError(f"{path}: a mixture of {keys['llama.expert_count']} experts: not a plain Llama")
    dim, heads = get("embedding_length", int), get("attention.head_count", int)
    head_dim = get("attention.key_length", int, dim // heads if heads > 0 else 0)
    config = LlamaConfig(
        dim, get("feed_forward_length", int), get("block_count", int), heads,
        get("attention.head_count_kv", int, heads), found[TOP["tok_embeddings"]].shape[0], get("context_length", int),
        TOP["output"] not in found,
        float(str(get("attention.layer_norm_rms_epsilon", np.float32))),  # the shortest: 1e-5, not 9.9999997e-06
        get("rope.freq_base", float, 10000.0), head_dim,
    )  # fmt: skip
    if problem := config.problem():
        raise InputError(f"{path}: no model can have {problem}: damaged")
    if get("rope.dimension_count", int, head_dim) != head_dim:
        raise InputError(f"{path}: RoPE over {keys['llama.rope.dimension_count']} of {head_dim} channels is not read")
    return config
