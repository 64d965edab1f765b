"""Hugging Face's tokenizer.json: written for both kinds, and read for Llama's (byte-level BPE is read in byte_files).

Theirs merges by rank of pairs, SentencePiece by score of the result: the same where the merges are all ways to put each
piece together, listed piece by piece, as transformers' converter writes them (convert_slow_tokenizer.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anert.errors import InputError
from anert.tokenizer.base import Tokenizer
from anert.tokenizer.byte_bpe import ByteBPETokenizer
from anert.tokenizer.byte_files import byte_letters
from anert.tokenizer.llama import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, LlamaTokenizer, Pieces
from anert.tokenizer.split import PATTERNS

SPACE = "\u2581"
"""Their space; ours is a space."""

ENDS = {"bos_token": "<s>", "eos_token": "</s>"}
COPY = "anert copy of a tokenizer.json"


def write_directory(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json; beside them tokenizer.model where the tokenizer was read from one.
    Raises InputError for a tokenizer that tokenizer.json cannot say."""
    if isinstance(tokenizer, ByteBPETokenizer):
        content, texts = _byte_level(tokenizer), {i: t for t, i in tokenizer.specials.items()}
    elif isinstance(tokenizer, LlamaTokenizer):
        content, texts = _llama(tokenizer.model), dict(enumerate(tokenizer.model.pieces))
        if tokenizer.suffix == ".model":
            tokenizer.save(folder / "tokenizer.model")
    else:
        raise InputError(f"a {tokenizer.kind} tokenizer has no tokenizer.json: convert without it")
    named = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # takes tokenizer.json as it stands; LlamaTokenizer rebuilds it
        **{key: texts[i] for key, i in named.items() if i in texts},
        "clean_up_tokenization_spaces": False,
    }
    for name, data in (("tokenizer.json", content), ("tokenizer_config.json", config)):
        (folder / name).write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _file(added: list[tuple[int, str]], model: dict[str, Any], **stages: Any) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": text, **flags} for i, text in sorted(added)],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        **stages,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            **model,
        },
    }


def _byte_level(tokenizer: ByteBPETokenizer) -> dict[str, Any]:
    v, letters = tokenizer.vocabulary, byte_letters()
    text = ["".join(letters[b] for b in t) for t in v.tokens]
    vocab = {t: i for i, t in enumerate(text) if t}
    splits, gpt2 = list(v.splits), bool(v.splits) and v.splits[-1] == PATTERNS["gpt2"]
    if gpt2:
        splits.pop()
    if splits and v.add_prefix_space:
        raise InputError("a byte-level BPE with a prefix space and its own split has no tokenizer.json")
    stages = [{"type": "Split", "pattern": {"Regex": s}, "behavior": "Isolated", "invert": False} for s in splits]
    byte_level = {"type": "ByteLevel", "trim_offsets": True}
    before = byte_level | {"add_prefix_space": v.add_prefix_space, "use_regex": gpt2}
    after = byte_level | {"add_prefix_space": True, "use_regex": True}
    return _file(
        [(i, t) for t, i in v.specials.items()],
        {"ignore_merges": v.whole_words, "vocab": vocab, "merges": [[text[a], text[b]] for a, b in v.merges]},
        pre_tokenizer={"type": "Sequence", "pretokenizers": [*stages, before]},
        decoder=after,
    )


def _llama(m: Pieces) -> dict[str, Any]:
    if m.remove_extra_whitespaces:
        raise InputError("a SentencePiece model that removes extra spaces has no tokenizer.json: convert without it")
    pieces = [p if m.types[i] == CONTROL else p.replace(" ", SPACE) for i, p in enumerate(m.pieces)]
    added = [(i, pieces[i]) for i, kind in enumerate(m.types) if kind in (CONTROL, UNKNOWN, USER_DEFINED)]
    prepend = [{"type": "Prepend", "prepend": SPACE}] if m.add_dummy_prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if m.add_dummy_prefix else []
    decoders = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        *strip,
    ]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    post = None
    if m.bos_id >= 0:
        bos = pieces[m.bos_id]
        first = {"SpecialToken": {"id": bos, "type_id": 0}}
        a, b = ({"Sequence": {"id": name, "type_id": n}} for n, name in enumerate("AB"))
        token = {"id": bos, "ids": [m.bos_id], "tokens": [bos]}
        post = {
            "type": "TemplateProcessing",
            "single": [first, a],
            "pair": [first, a, b],
            "special_tokens": {bos: token},
        }
    return _file(
        added,
        {
            "unk_token": pieces[m.unk_id] if m.unk_id >= 0 else None,
            "fuse_unk": True,
            "byte_fallback": m.byte_fallback,
            "vocab": {p: i for i, p in enumerate(pieces)},
            "merges": [[pieces[a], pieces[b]] for a, b in _merges(m, pieces)],
        },
        **(
            {"pre_tokenizer": {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}}
            if m.prefix_once
            else {"normalizer": {"type": "Sequence", "normalizers": [*prepend, replace]}}
        ),
        post_processor=post,
        decoder={"type": "Sequence", "decoders": decoders},
    )


def _merges(m: Pieces, pieces: list[str]) -> list[tuple[int, int]]:
    """All pairs of pieces that make a piece, the best score first, those of one piece together."""
    ids = {p: i for i, p in enumerate(pieces) if m.types[i] == NORMAL}
    best_first = sorted((i for p, i in ids.items() if len(p) > 1), key=lambda i: -m.scores[i])
    found: list[tuple[int, int]] = []
    for i in best_first:
        p = pieces[i]
        pairs = [(ids[p[:k]], ids[p[k:]]) for k in range(1, len(p)) if p[:k] in ids and p[k:] in ids]
        found += sorted(pairs)
    return found


def is_llama(content: Mapping[str, Any]) -> bool:
    """Whether a JSON is a tokenizer.json with byte fallback, or our copy of one."""
    model = content.get("model")
    return content.get("format") == COPY or (isinstance(model, dict) and bool(model.get("byte_fallback")))


def read_llama(content: Mapping[str, Any], config: Mapping[str, Any], name: str) -> tuple[Pieces, bytes]:
    """(`llama_pieces`, a file that holds them without another beside it).

    That is the tokenizer.json itself, unless tokenizer_config.json names other ends than <s> and </s>.
    """
    if content.get("format") == COPY:
        content, config = content.get("tokenizer", {}), content.get("config", {})
        if not (isinstance(content, dict) and isinstance(config, dict)):
            raise InputError(f"{name}: damaged copy of a tokenizer.json")
    pieces = llama_pieces(content, config, name)
    ends = {key: config[key] for key in ENDS if key in config}
    ids = content["model"]["vocab"] | {t["content"]: t["id"] for t in content.get("added_tokens") or []}
    if (pieces.bos_id, pieces.eos_id) == tuple(_named(text, ids) for text in ENDS.values()):
        return pieces, json.dumps(content, ensure_ascii=False, indent=0).encode()
    return pieces, json.dumps({"format": COPY, "config": ends, "tokenizer": content}, ensure_ascii=False).encode()


def llama_pieces(content: Mapping[str, Any], config: Mapping[str, Any], name: str) -> Pieces:
    """tokenizer.json of a Llama (BPE with byte fallback) -> Pieces. config: tokenizer_config.json; may be empty.

    Raises InputError where its merges or its normalizer are not SentencePiece's: the ids would differ.
    """
    try:
        model = content["model"]
        vocab = {**model["vocab"], **{t["content"]: t["id"] for t in content.get("added_tokens") or []}}
        special = {t["id"] for t in content.get("added_tokens") or [] if t.get("special")}
        merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
        prefix, once = _dummy_prefix(content, name)
        texts = [""] * len(vocab)
        for text, i in vocab.items():
            if not (isinstance(text, str) and isinstance(i, int) and 0 <= i < len(texts)) or texts[i]:
                raise InputError(f"{name}: {len(vocab)} tokens, but one has id {i!r}: doubled or sparse ids")
            texts[i] = text
        unk = vocab.get(model.get("unk_token"), -1)
        ranks = _ranks(merges, vocab, name)
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise InputError(f"{name}: not a tokenizer.json ({type(e).__name__}: {e})") from None
    types = [_type(i, text, special, unk, ranks) for i, text in enumerate(texts)]
    if types.count(BYTE) != 256:
        raise InputError(f"{name}: byte fallback without all 256 byte pieces: damaged tokenizer.json")
    pieces = Pieces(
        tuple(t.replace(SPACE, " ") for t in texts),
        tuple(-float(ranks.get(i, 0)) for i in range(len(texts))),
        tuple(types),
        bos_id=_named(config.get("bos_token", ENDS["bos_token"]), vocab),
        eos_id=_named(config.get("eos_token", ENDS["eos_token"]), vocab),
        unk_id=unk,
        add_dummy_prefix=prefix,
        prefix_once=once,
    )
    wanted = _merges(pieces, texts)
    if wanted != [(vocab[str(a)], vocab[str(b)]) for a, b in merges]:
        raise InputError(f"{name}: its merges are not those of a SentencePiece model: pass the tokenizer.model instead")
    return pieces


def _ranks(merges: list[Any], vocab: Mapping[str, int], name: str) -> dict[int, int]:
    """Piece -> the order in which the merges make it: 1, 2, ..."""
    ranks: dict[int, int] = {}
    for a, b in merges:
        if a not in vocab or b not in vocab or a + b not in vocab:
            raise InputError(f"{name}: merge {a!r} {b!r} is not of this vocabulary: damaged tokenizer.json")
        ranks.setdefault(vocab[a + b], len(ranks) + 1)
    return ranks


def _type(i: int, text: str, special: set[int], unk: int, ranks: Mapping[int, int]) -> int:
    if i == unk:
        return UNKNOWN
    if i in special:
        return CONTROL
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        return BYTE
    return NORMAL if len(text) == 1 or i in ranks else UNUSED  # no merge makes it, so that no text becomes it


def _named(token: Any, vocab: Mapping[str, int]) -> int:
    text = token.get("content") if isinstance(token, dict) else token
    return vocab.get(text, -1) if isinstance(text, str) else -1


def _dummy_prefix(content: Mapping[str, Any], name: str) -> tuple[bool, bool]:
    """(whether a space goes before the text, whether only where there is none); InputError for any other
    normalization."""

    def stages(key: str, many: str) -> list[Any]:
        stage = content.get(key)
        return stage[many] if stage and stage["type"] == "Sequence" else [stage] if stage else []

    prefix = replaced = once = False
    for stage in (*stages("normalizer", "normalizers"), *stages("pre_tokenizer", "pretokenizers")):
        if stage["type"] == "Prepend" and stage["prepend"] == SPACE:
            prefix = True
        elif stage["type"] == "Replace" and stage["pattern"] == {"String": " "} and stage["content"] == SPACE:
            replaced = True
        elif stage["type"] == "Metaspace" and stage.get("replacement") == SPACE and not stage.get("split"):
            replaced, prefix, once = True, stage.get("prepend_scheme", "always") != "never", True
        else:
            raise InputError(f"{name}: {stage['type']} before byte-fallback BPE; anert reads what SentencePiece does")
    if not replaced:
        raise InputError(f"{name}: byte-fallback BPE without SentencePiece's spaces: another kind of tokenizer")
    return prefix, once
