"""The tokenizer that a GGUF file carries: byte-level BPE (`gpt2`) or SentencePiece BPE (`llama`), by its keys."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anert.errors import InputError
from anert.tokenizer import ByteBPETokenizer, LlamaTokenizer, Tokenizer
from anert.tokenizer.byte_files import from_hugging_face
from anert.tokenizer.llama import BYTE, CONTROL, USER_DEFINED, Pieces, find_byte_ids
from anert.tokenizer.llama_files import BYTE_PIECES
from anert.tokenizer.split import PATTERNS

DIGITS = {"type": "Digits", "individual_digits": True}
QWEN = PATTERNS["cl100k"].replace(r"\p{N}{1,3}", r"\p{N}")
SPLITS: dict[str, tuple[dict[str, Any], ...]] = {
    "gpt-2": (),
    "smollm": (DIGITS,),
    "starcoder": (DIGITS,),
    "llama-bpe": ({"type": "Split", "behavior": "Isolated", "pattern": {"Regex": PATTERNS["cl100k"]}},),
    "qwen2": ({"type": "Split", "behavior": "Isolated", "pattern": {"Regex": QWEN}},),
}
"""`tokenizer.ggml.pre` -> what goes before the byte-level split, in tokenizer.json's words (llama.cpp)."""

WHOLE_WORDS = ("llama-bpe",)
OWN_SPLIT = ("llama-bpe", "qwen2")
"""Those whose pattern replaces GPT-2's."""


def tokenizer(keys: Mapping[str, Any], path: Path) -> Tokenizer:
    """Raises InputError for a kind, a pre-tokenizer or a content that anert cannot follow to the id."""
    kind = keys["tokenizer.ggml.model"]
    tokens, types = keys.get("tokenizer.ggml.tokens"), keys.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list) or types is None or len(types) != len(tokens):
        raise InputError(f"{path}: its tokenizer has no tokens, or not a type for each: damaged")
    if kind == "gpt2":
        return _byte_level(keys, tokens, types, path)
    if kind == "llama":
        return _llama(keys, tokens, types, path)
    raise InputError(f"{path}: a {kind!r} tokenizer; anert reads 'gpt2' and 'llama': pass --tokenizer FILE")


def _id(keys: Mapping[str, Any], name: str, n: int) -> int:
    """bos or eos; -1 where there is none, or texts do not begin with it."""
    token = keys.get(f"tokenizer.ggml.{name}_token_id", -1)
    used = name == "eos" or keys.get(f"tokenizer.ggml.add_{name}_token", True)
    return int(token) if used and isinstance(token, int) and 0 <= token < n else -1


def _byte_level(keys: Mapping[str, Any], tokens: list[str], types: Any, path: Path) -> Tokenizer:
    """The keys said as a tokenizer.json, so that one reader knows what such a file means."""
    pre = keys.get("tokenizer.ggml.pre", "gpt-2")
    if pre not in SPLITS:
        raise InputError(f"{path}: pre-tokenizer {pre!r}; anert follows {', '.join(SPLITS)}: pass --tokenizer FILE")
    special = [i for i, kind in enumerate(types) if kind in (CONTROL, USER_DEFINED)]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": bool(keys.get("tokenizer.ggml.add_space_prefix", False)),
        "use_regex": pre not in OWN_SPLIT,
    }
    content = {
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": keys.get("tokenizer.ggml.merges") or [],
            "ignore_merges": pre in WHOLE_WORDS,
        },
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*SPLITS[pre], byte_level]},
        "added_tokens": [{"id": i, "content": tokens[i]} for i in special],
    }
    ends = {f"{n}_token": tokens[i] if (i := _id(keys, n, len(tokens))) >= 0 else "" for n in ("bos", "eos")}
    return ByteBPETokenizer(from_hugging_face(content, ends, str(path)))


def _llama(keys: Mapping[str, Any], tokens: list[str], types: Any, path: Path) -> Tokenizer:
    scores = keys.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise InputError(f"{path}: its tokenizer has no score for each token: damaged")
    pieces = Pieces(
        tuple(t.replace("\u2581", " ") for t in tokens),
        tuple(map(float, scores)),
        tuple(map(int, types)),
        bos_id=_id(keys, "bos", len(tokens)),
        eos_id=_id(keys, "eos", len(tokens)),
        unk_id=int(keys.get("tokenizer.ggml.unknown_token_id", 0)),
        add_dummy_prefix=bool(keys.get("tokenizer.ggml.add_space_prefix", True)),
        byte_fallback=BYTE in types,
    )
    for token, kind in zip(tokens, types, strict=True):
        if not 0 < kind <= BYTE or (kind == BYTE and token not in BYTE_PIECES):
            raise InputError(f"{path}: token {token!r} of its tokenizer has type {kind}: damaged")
    if pieces.byte_fallback and not find_byte_ids(pieces):
        raise InputError(f"{path}: its tokenizer falls back to bytes without all 256 of them: damaged")
    return LlamaTokenizer(pieces)
