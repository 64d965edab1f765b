"""Files that hold a Llama tokenizer: llama2.c's tokenizer.bin and SentencePiece's .model.

tokenizer.bin: uint32 longest piece; then for every id float32 score, int32 length, the bytes (formats of llama2.c's
tokenizer.py). It has no types and no count: `<0x00>`..`<0xFF>` are the bytes, the first three ids unk, bos and eos.
.model: a protobuf, sentencepiece_model.proto; only the fields below are read.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from anert.errors import InputError
from anert.tokenizer.llama import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, Pieces, find_byte_ids

LONGEST_PIECE = 1 << 16
SPECIAL_TEXT = {1: "<s>", 2: "</s>"}
"""tokenizer.bin writes these two between newlines."""

BYTE_PIECES = {f"<0x{b:02X}>" for b in range(256)}

RECORD = struct.Struct("<fi")
Field = int | bytes


def read_bin(data: bytes, name: str) -> Pieces:
    """tokenizer.bin -> Pieces. Raises InputError for anything else."""
    pieces: list[str] = []
    scores: list[float] = []
    if len(data) < 4:
        raise InputError(f"{name}: {len(data)} bytes are no tokenizer")
    longest = struct.unpack_from("<I", data)[0]
    if not 0 < longest <= LONGEST_PIECE:
        raise InputError(f"{name}: not a tokenizer that anert knows (.model, tokenizer.bin, tokenizer.json, merges)")
    at, end, unpack = 4, len(data), RECORD.unpack_from
    try:
        while at < end:
            score, length = unpack(data, at)
            start, at = at + 8, at + 8 + length
            if not 0 <= length <= longest:
                raise InputError(
                    f"{name}: token {len(pieces)} at byte {start - 8} has length {length}, the header allows 0 to "
                    f"{longest}: not a tokenizer"
                )
            if at > end:
                raise struct.error
            pieces.append(data[start:at].decode())
            scores.append(score)
    except struct.error:
        raise InputError(f"{name}: truncated at byte {end}, inside token {len(pieces)}: get the file again") from None
    except UnicodeDecodeError:
        raise InputError(f"{name}: token {len(pieces)} is not UTF-8: not a tokenizer, or damaged") from None
    for i, text in SPECIAL_TEXT.items():
        if i < len(pieces) and pieces[i] == f"\n{text}\n":
            pieces[i] = text
    return _typed(pieces, scores, name)


def _typed(pieces: list[str], scores: list[float], name: str) -> Pieces:
    if len(pieces) < 4:
        raise InputError(f"{name}: {len(pieces)} tokens; a tokenizer.bin has unk, bos, eos and pieces")
    types = [UNKNOWN, CONTROL, CONTROL] + [NORMAL] * (len(pieces) - 3)
    if BYTE_PIECES.issubset(pieces):
        types = [BYTE if p in BYTE_PIECES else t for p, t in zip(pieces, types, strict=True)]
    return Pieces(tuple(pieces), tuple(scores), tuple(types), byte_fallback=BYTE in types)


def write_bin(model: Pieces) -> bytes:
    """Pieces -> tokenizer.bin, byte for byte what llama2.c's exporter writes."""
    texts = [p.encode() for p in model.pieces]
    for i, special in ((model.bos_id, b"<s>"), (model.eos_id, b"</s>")):
        if i >= 0:
            texts[i] = b"\n" + special + b"\n"
    out = [struct.pack("<I", max(map(len, texts)))]
    for score, text in zip(model.scores, texts, strict=True):
        out.append(struct.pack("<fi", score, len(text)) + text)
    return b"".join(out)


def write_model(model: Pieces) -> bytes:
    """Pieces -> SentencePiece .model (sentencepiece_model.proto)."""
    rows = zip(model.pieces, model.scores, model.types, strict=True)
    out = [_write_message(1, _write_piece(*row)) for row in rows]
    trainer = [(3, 2), (4, len(model.pieces)), (35, model.byte_fallback)]
    trainer += [(40, model.unk_id), (41, model.bos_id), (42, model.eos_id)]
    normalizer = [(3, model.add_dummy_prefix), (4, model.remove_extra_whitespaces), (5, True)]
    out.append(_write_message(2, b"".join(_write_number(*f) for f in trainer)))
    out.append(_write_message(3, _write_message(1, b"identity") + b"".join(_write_number(*f) for f in normalizer)))
    return b"".join(out)


def _write_piece(text: str, score: float, kind: int) -> bytes:
    text = text if kind in (BYTE, CONTROL, UNKNOWN) else text.replace(" ", "\u2581")
    return _write_message(1, text.encode()) + b"\x15" + struct.pack("<f", score) + _write_number(3, kind)


def _write_message(field: int, content: bytes) -> bytes:
    return _write_varint(field << 3 | 2) + _write_varint(len(content)) + content


def _write_number(field: int, value: int) -> bytes:
    return _write_varint(field << 3) + _write_varint(value % (1 << 64))


def _write_varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def read_model(data: bytes, name: str) -> Pieces:
    """SentencePiece .model -> Pieces. Raises InputError for what is no BPE model with identity normalization."""
    try:
        return _read_model(data, name)
    except (ValueError, TypeError, struct.error):
        raise InputError(f"{name}: truncated or damaged SentencePiece model: get the file again") from None


def _read_model(data: bytes, name: str) -> Pieces:
    pieces: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    trainer: dict[int, Field] = {}
    normalizer: dict[int, Field] = {}
    for number, value in _fields(data):
        if number == 1:  # repeated SentencePiece {piece = 1, score = 2, type = 3}
            fields = dict(_fields(_message(value)))
            pieces.append(_text(_message(fields.get(1, b"")), name, len(pieces)))
            scores.append(struct.unpack("<f", _message(fields.get(2, bytes(4))))[0])
            types.append(_integer(fields.get(3), NORMAL))
        elif number == 2:
            trainer.update(_fields(_message(value)))
        elif number == 3:
            normalizer.update(_fields(_message(value)))
    if not pieces:
        raise InputError(f"{name}: a SentencePiece model without pieces")
    _require_plain_bpe(trainer, normalizer, types, name)
    return _pieces(pieces, scores, types, trainer, normalizer, name)


def _require_plain_bpe(trainer: dict[int, Field], normalizer: dict[int, Field], types: list[int], name: str) -> None:
    kind = _integer(trainer.get(3), 1)
    if kind != 2:
        kinds = {1: "unigram", 3: "word", 4: "char"}
        raise InputError(f"{name}: a SentencePiece {kinds.get(kind, kind)} model; anert reads BPE models")
    if normalizer.get(2):
        rule = _message(normalizer.get(1, b"")).decode("utf-8", "replace")
        raise InputError(f"{name}: normalization {rule or 'table'}; anert reads models with identity normalization")
    if _integer(trainer.get(24), 0) or not _integer(normalizer.get(5), 1):
        raise InputError(f"{name}: spaces as suffixes or unescaped; anert reads models with spaces as prefixes")
    if unknown := set(types) - {NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE}:
        what = "unused" if unknown == {UNUSED} else f"unknown (type {min(unknown)})"
        raise InputError(f"{name}: has {what} pieces, which anert does not encode with")


def _pieces(
    texts: list[str],
    scores: list[float],
    types: list[int],
    trainer: dict[int, Field],
    normalizer: dict[int, Field],
    name: str,
) -> Pieces:
    for i, (text, kind) in enumerate(zip(texts, types, strict=True)):
        if not text or (kind == BYTE and text not in BYTE_PIECES):
            raise InputError(f"{name}: piece {i} is {text!r} of type {kind}: damaged SentencePiece model")
    model = Pieces(
        tuple(t.replace("\u2581", " ") for t in texts),
        tuple(scores),
        tuple(types),
        bos_id=_special(trainer, 41, 1, len(texts)),
        eos_id=_special(trainer, 42, 2, len(texts)),
        unk_id=_special(trainer, 40, 0, len(texts)),
        byte_fallback=bool(_integer(trainer.get(35), 0)),
        add_dummy_prefix=bool(_integer(normalizer.get(3), 1)),
        remove_extra_whitespaces=bool(_integer(normalizer.get(4), 1)),
    )
    if model.byte_fallback and not find_byte_ids(model):
        raise InputError(f"{name}: byte fallback without all 256 byte pieces: damaged SentencePiece model")
    return model


def _special(trainer: dict[int, Field], field: int, default: int, n: int) -> int:
    value = _integer(trainer.get(field), default)
    return value if value < n else -1  # -1 is a varint of 2^64 - 1


def _text(data: bytes, name: str, token: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise InputError(f"{name}: token {token} is not UTF-8: not a tokenizer, or damaged") from None


def _message(value: Field) -> bytes:
    if not isinstance(value, bytes):
        raise TypeError("a number where a message belongs")
    return value


def _integer(value: Field | None, default: int) -> int:
    if isinstance(value, bytes):
        raise TypeError("a message where a number belongs")
    return default if value is None else value


def _fields(data: bytes) -> Iterator[tuple[int, Field]]:
    """(field number, value) of a protobuf message; ValueError where it is truncated."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        wire = tag & 7
        if wire == 0:
            number, at = _varint(data, at)
            yield tag >> 3, number
            continue
        if wire == 2:
            length, at = _varint(data, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + length > len(data):
            raise ValueError("truncated")
        yield tag >> 3, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    raise ValueError("truncated")
