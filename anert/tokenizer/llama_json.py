"""Hugging Face's tokenizer.json of a Llama tokenizer: BPE over characters with byte fallback, U+2581 for spaces."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from anert.errors import InputError
from anert.tokenizer.llama import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Pieces, find_byte_ids
from anert.tokenizer.llama_files import BYTE_PIECES

SPACE = "\u2581"


FORMAT = "anert: a Hugging Face tokenizer and its ends"


def is_llama(content: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json is of this kind, by its byte fallback."""
    model = content.get("model")
    return content.get("format") == FORMAT or (isinstance(model, dict) and bool(model.get("byte_fallback")))


def from_hugging_face(content: Mapping[str, Any], config: Mapping[str, Any], name: str) -> tuple[Pieces, bytes]:
    """(Pieces, a file that holds them alone). config: tokenizer_config.json, may be empty.

    That file is the tokenizer.json itself, unless the config names other ends than <s> and </s>.

    Raises InputError for normalizers and pre-tokenizers other than Llama's, and for damaged content.
    """
    try:
        ends = content.get("ends", config)
        content = content.get("tokenizer", content)
        prefix, once = _prefix(content, name)
        added = {t["content"]: t for t in content.get("added_tokens") or []}
        vocab: dict[str, int] = content["model"]["vocab"] | {text: t["id"] for text, t in added.items()}
        texts = _in_order(vocab, name)
        unk = vocab.get(content["model"].get("unk_token") or "<unk>", -1)
        types = [_type(text, i == unk, added.get(text)) for i, text in enumerate(texts)]
        merges = _merges(content["model"]["merges"], vocab, types, name)
        bos, eos = _special(ends, "bos_token", "<s>", vocab), _special(ends, "eos_token", "</s>", vocab)
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise InputError(f"{name}: not a tokenizer.json ({type(e).__name__}: {e})") from None
    pieces = tuple(
        t.replace(SPACE, " ") if k in (NORMAL, USER_DEFINED) else t for t, k in zip(texts, types, strict=True)
    )
    model = Pieces(
        pieces, (0.0,) * len(pieces), tuple(types), bos, eos, unk, True, prefix, merges=merges, prefix_once=once
    )
    if not find_byte_ids(model):
        raise InputError(f"{name}: byte fallback without all 256 byte tokens: damaged tokenizer.json")
    stored: Mapping[str, Any] = content
    if (bos, eos) != (vocab.get("<s>", -1), vocab.get("</s>", -1)):
        named = {"bos_token": texts[bos] if bos >= 0 else None, "eos_token": texts[eos] if eos >= 0 else None}
        stored = {"format": FORMAT, "ends": named, "tokenizer": content}
    return model, json.dumps(stored, ensure_ascii=False, indent=0).encode()


def _prefix(content: Mapping[str, Any], name: str) -> tuple[bool, bool]:
    """(whether a space goes before a text, whether only where there is none)."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    normalizer, pre = content.get("normalizer"), content.get("pre_tokenizer")
    steps = normalizer["normalizers"] if normalizer and normalizer["type"] == "Sequence" else [normalizer]
    if not pre and steps in ([{"type": "Prepend", "prepend": SPACE}, replace], [replace]):
        return len(steps) == 2, False
    if not normalizer and pre and pre["type"] == "Metaspace" and pre["replacement"] == SPACE and not pre.get("split"):
        scheme = pre.get("prepend_scheme", "always" if pre.get("add_prefix_space", True) else "never")
        return scheme != "never", True
    kinds = [stage["type"] for stage in (normalizer, pre) if stage]
    raise InputError(
        f"{name}: {' and '.join(kinds) or 'no normalizer'}; anert reads Llama's (Prepend, Replace; Metaspace)"
    )


def _type(text: str, unknown: bool, added: Mapping[str, Any] | None) -> int:
    if unknown:
        return UNKNOWN
    if added is not None:
        return CONTROL if added.get("special") else USER_DEFINED
    return BYTE if text in BYTE_PIECES else NORMAL


def _in_order(vocab: Mapping[str, int], name: str) -> list[str]:
    texts = sorted(vocab, key=vocab.__getitem__)
    if [vocab[t] for t in texts] != list(range(len(texts))):
        raise InputError(f"{name}: {len(texts)} tokens whose ids are not 0 to {len(texts) - 1}: doubled or sparse ids")
    return texts


def _merges(lines: Any, vocab: Mapping[str, int], types: list[int], name: str) -> tuple[tuple[int, int], ...]:
    merges: list[tuple[int, int]] = []
    for number, line in enumerate(lines):
        pair = line.split(" ") if isinstance(line, str) else line
        if len(pair) != 2 or any(types[vocab.get(t, 0)] != NORMAL for t in (*pair, "".join(pair))):
            raise InputError(f"{name}: merge {number} is {line!r}, not two tokens of the vocabulary that make a third")
        merges.append((vocab[pair[0]], vocab[pair[1]]))
    return tuple(merges)


def _special(config: Mapping[str, Any], key: str, default: str, vocab: Mapping[str, int]) -> int:
    token = config.get(key, default)
    text = token.get("content") if isinstance(token, dict) else token
    return vocab.get(text, -1) if isinstance(text, str) else -1
