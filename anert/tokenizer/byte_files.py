"""Files that hold a byte-level BPE: ours, Hugging Face's tokenizer.json, GPT-2's vocab and merges, tiktoken's."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

from anert.errors import InputError
from anert.tokenizer.base import END_OF_TEXT
from anert.tokenizer.byte_bpe import Vocabulary
from anert.tokenizer.split import PATTERNS

FORMAT = "anert byte-bpe tokenizer"
VERSION = 1


def byte_letters() -> list[str]:
    """GPT-2's visible letter for each byte (encoder.py, bytes_to_unicode): printable ones stand for themselves."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(others)) for b in range(256)]


def to_json(v: Vocabulary) -> str:
    """Our file. `merges` are pairs of tokens as written under `tokens`."""
    letters = byte_letters()
    special_text = {i: s for s, i in v.specials.items()}
    written = [special_text.get(i, "".join(letters[b] for b in t)) for i, t in enumerate(v.tokens)]
    content = {
        "format": FORMAT,
        "version": VERSION,
        "splits": list(v.splits),
        "specials": dict(v.specials),
        "bos_id": v.bos_id,
        "eos_id": v.eos_id,
        "whole_words": v.whole_words,
        "add_prefix_space": v.add_prefix_space,
        "tokens": written,
        "merges": [f"{written[a]} {written[b]}" for a, b in v.merges],
    }
    return json.dumps(content, ensure_ascii=False, indent=0) + "\n"


def from_json(content: Mapping[str, Any], name: str) -> Vocabulary:
    """Our file's content -> Vocabulary. Raises InputError for a newer version or damaged content."""
    version = content.get("version")
    if version != VERSION:
        raise InputError(f"{name}: tokenizer format version {version}, this anert reads {VERSION}: update anert")
    try:
        specials = _ids(content["specials"], name)
        ids = {t: i for i, t in enumerate(content["tokens"])} | specials
        if len(ids) != len(content["tokens"]):
            raise InputError(f"{name}: {len(content['tokens'])} tokens but {len(ids)} different ones: damaged file")
        tokens, merges = _tokens(ids, set(specials.values()), name), _merges(content["merges"], ids, name)
        bos, eos = int(content["bos_id"]), int(content["eos_id"])
        flags = bool(content["whole_words"]), bool(content["add_prefix_space"])
        splits = tuple(map(str, content["splits"]))
    except (KeyError, TypeError, ValueError) as e:
        raise InputError(f"{name}: damaged tokenizer file ({type(e).__name__}: {e})") from None
    return Vocabulary(tokens, merges, splits, specials, _in_range(bos, ids, name), _in_range(eos, ids, name), *flags)


def from_gpt2(vocab: Mapping[str, Any], merges_text: str, name: str) -> Vocabulary:
    """vocab.json and merges.txt -> Vocabulary. Its `<|endoftext|>` is bos and eos."""
    ids = _ids(vocab, name)
    specials = {END_OF_TEXT: ids[END_OF_TEXT]} if END_OF_TEXT in ids else {}
    lines = [line for line in merges_text.split("\n") if line and not line.startswith("#version")]
    end = specials.get(END_OF_TEXT, -1)
    tokens, merges = _tokens(ids, set(specials.values()), name), _merges(lines, ids, name)
    return Vocabulary(tokens, merges, (PATTERNS["gpt2"],), specials, end, end)


def from_hugging_face(content: Mapping[str, Any], config: Mapping[str, Any], name: str) -> Vocabulary:
    """tokenizer.json (byte-level BPE) -> Vocabulary. config: tokenizer_config.json, for bos and eos; may be empty."""
    try:
        model = content["model"]
        if model.get("type", "BPE") != "BPE" or content.get("normalizer"):
            what = model.get("type", "BPE")
            raise InputError(f"{name}: {what} model or a normalizer; anert reads byte-level BPE and Llama's BPE")
        splits, prefix_space = _pre_tokenizer(content.get("pre_tokenizer"), name)
        added = {t["content"]: t["id"] for t in content.get("added_tokens") or []}
        ids = _ids(model["vocab"] | added, name)
        specials = {t: ids[t] for t in added}
        merges = _merges(model["merges"], ids, name)
        whole = bool(model.get("ignore_merges"))
    except (KeyError, TypeError, AttributeError) as e:
        raise InputError(f"{name}: not a tokenizer.json ({type(e).__name__}: {e})") from None
    tokens = _tokens(ids, set(specials.values()), name)
    bos, eos = (_named(config.get(key), specials) for key in ("bos_token", "eos_token"))
    return Vocabulary(tokens, merges, splits, specials, bos, eos, whole, prefix_space)


def _named(token: Any, specials: Mapping[str, int]) -> int:
    """Id of a token that tokenizer_config.json names, as text or as {"content": text}; else that of <|endoftext|>."""
    text = token.get("content") if isinstance(token, dict) else token
    return specials.get(text if isinstance(text, str) else END_OF_TEXT, -1)


def _pre_tokenizer(pre: Any, name: str) -> tuple[tuple[str, ...], bool]:
    """Split patterns, in order, and whether a space goes before the text."""
    stages = pre["pretokenizers"] if pre and pre["type"] == "Sequence" else [pre] if pre else []
    splits: list[str] = []
    prefix_space = byte_level = False
    for stage in stages:
        if stage["type"] == "ByteLevel":
            byte_level, prefix_space = True, prefix_space or bool(stage.get("add_prefix_space"))
            splits += [PATTERNS["gpt2"]] if stage.get("use_regex", True) else []
        elif stage["type"] == "Digits":
            splits.append(r"\p{N}" if stage.get("individual_digits") else r"\p{N}+")
        elif stage["type"] == "Split" and stage["behavior"] == "Isolated" and not stage.get("invert"):
            splits.append(str(stage["pattern"]["Regex"]))
        else:
            raise InputError(
                f"{name}: pre-tokenizer {stage['type']}; anert reads ByteLevel, Digits and isolating Split"
            )
    if not byte_level:
        raise InputError(f"{name}: no ByteLevel pre-tokenizer; anert reads byte-level BPE from tokenizer.json")
    return tuple(splits), prefix_space


def from_tiktoken(text: str, pattern: str, name: str) -> Vocabulary:
    """tiktoken's ranks file (base64 and rank a line) -> Vocabulary without specials, which that file does not have."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if line:
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except ValueError:
                raise InputError(f"{name}: line {number} is no base64 token and rank: not a tiktoken file") from None
    return ranks_to_vocabulary(ranks, pattern, {})


def ranks_to_vocabulary(ranks: Mapping[bytes, int], pattern: str, specials: Mapping[str, int]) -> Vocabulary:
    """tiktoken's rule as pairs: every split of a token into two tokens merges at the token's rank."""
    size = max([*ranks.values(), *specials.values()], default=-1) + 1
    if size > 4 * (len(ranks) + len(specials)) or min([*ranks.values(), 0]) < 0:
        raise InputError(f"{len(ranks)} ranks reach up to {size - 1}: not a tiktoken vocabulary")
    tokens = [b""] * size
    for token, rank in ranks.items():
        tokens[rank] = token
    merges = [
        (ranks[t[:k]], ranks[t[k:]]) for t in tokens for k in range(1, len(t)) if t[:k] in ranks and t[k:] in ranks
    ]
    end = specials.get(END_OF_TEXT, -1)
    return Vocabulary(tuple(tokens), tuple(merges), (pattern,), dict(specials), end, end, whole_words=True)


def _ids(vocab: Mapping[str, Any], name: str) -> dict[str, int]:
    """token -> id, checked: ids are whole, different and not wildly sparse."""
    if not vocab or not all(isinstance(i, int) and i >= 0 for i in vocab.values()):
        raise InputError(f"{name}: a vocabulary maps tokens to ids of 0 and up")
    if len(set(vocab.values())) != len(vocab) or max(vocab.values()) >= 4 * len(vocab) + (1 << 16):
        raise InputError(f"{name}: {len(vocab)} tokens with ids up to {max(vocab.values())}: doubled or sparse ids")
    return dict(vocab)


def _tokens(ids: Mapping[str, int], special_ids: set[int], name: str) -> tuple[bytes, ...]:
    """Bytes of every id; b"" for specials and for ids that nothing has."""
    value = {letter: b for b, letter in enumerate(byte_letters())}
    tokens = [b""] * (max(ids.values()) + 1)
    for token, i in ids.items():
        if i not in special_ids:
            try:
                tokens[i] = bytes(value[c] for c in token)
            except KeyError:
                raise InputError(f"{name}: token {i} is {token!r}, not in GPT-2's byte alphabet") from None
    return tuple(tokens)


def _merges(lines: Any, ids: Mapping[str, int], name: str) -> tuple[tuple[int, int], ...]:
    """Merges as "a b" or [a, b] -> pairs of ids."""
    merges: list[tuple[int, int]] = []
    for number, line in enumerate(lines):
        pair = line.rstrip("\r").split(" ") if isinstance(line, str) else line
        if len(pair) != 2 or pair[0] not in ids or pair[1] not in ids:
            raise InputError(f"{name}: merge {number} is {line!r}, not two tokens of the vocabulary")
        merges.append((ids[pair[0]], ids[pair[1]]))
    return tuple(merges)


def _in_range(token: int, ids: Mapping[str, int], name: str) -> int:
    if not -1 <= token < len(ids):
        raise InputError(f"{name}: bos or eos is token {token} of {len(ids)}: damaged file")
    return token
