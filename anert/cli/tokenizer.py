"""`anert tokenizer train FILES --vocab N`, `anert tokenizer show FILE`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from anert.cli.meter import Meter
from anert.cli.parser import Parser, reader
from anert.errors import InputError
from anert.events import Progress

ABOUT = """\
Train a tokenizer on texts, or show what a tokenizer file is.

  anert tokenizer train stories.txt --vocab 4096                      byte-level BPE -> tokenizer.json
  anert tokenizer train stories.txt --vocab 4096 -o tokenizer.model   Llama's (SentencePiece BPE); .bin for llama2.c
  anert tokenizer show tokenizer.model

How fast they are: anert bench tokenizer --text english.txt
"""
KINDS = {".json": "byte", ".model": "llama", ".bin": "llama"}


def main(argv: Sequence[str]) -> int:
    actions = {"train": _train, "show": _show}
    if argv and argv[0] in actions:
        return actions[argv[0]](argv[1:])
    parser = Parser(prog="anert tokenizer", description=ABOUT, usage="anert tokenizer train|show ...")
    if not argv or argv[0] in ("-h", "--help"):
        parser.print_help()
        return 0 if argv else 2
    raise InputError(f"anert tokenizer {argv[0]}: expected train or show (bench: anert bench tokenizer)")


def _train(argv: Sequence[str]) -> int:
    from anert.tokenizer import PATTERNS, ByteBPETokenizer, LlamaTokenizer

    found = _train_parser().parse(argv)
    out = found.out or Path("tokenizer.model" if found.kind == "llama" else "tokenizer.json")
    suffix_kind = KINDS.get(out.suffix)
    kind = found.kind or suffix_kind
    if suffix_kind is None or kind != suffix_kind:
        named = f"a {kind} tokenizer cannot be a {out.suffix} file" if suffix_kind else f"what is {out.name}?"
        raise InputError(f"{out}: {named}: byte-level is .json, Llama's .model or .bin")
    if out.exists() and not found.force:
        raise InputError(f"{out} is there already: choose another name, or --force to replace it")
    meter, start = Meter(), time.monotonic()

    def learned(done: float, total: float) -> None:
        meter.show(Progress("train tokenizer", done, total, "merges"))

    texts = _documents(found, meter)
    common: dict[str, Any] = {"progress": learned}
    if found.special:
        common["specials"] = tuple(found.special)
    if kind == "llama":
        tokenizer: Any = LlamaTokenizer.train(texts, found.vocab, **common)
    else:
        tokenizer = ByteBPETokenizer.train(texts, found.vocab, PATTERNS.get(found.pattern, found.pattern), **common)
    meter.clear()
    _save(tokenizer, out)
    about = {"path": str(out), **_about(tokenizer), "seconds": round(time.monotonic() - start, 3)}
    if found.json:
        print(json.dumps(about))
    else:
        print(f"{out}: {tokenizer.kind}, {tokenizer.vocab_size:,} tokens, in {about['seconds']:.1f} s")
        if tokenizer.vocab_size < found.vocab:
            print(f"fewer than {found.vocab:,}: no other pair occurs twice in the text")
    return 0


def _train_parser() -> Parser:
    parser = Parser(prog="anert tokenizer train", description=ABOUT, usage="anert tokenizer train FILES --vocab N")
    add = parser.add_argument
    add("files", nargs="+", metavar="FILES", help="texts: plain, JSON lines, .gz; - is standard input")
    add("--vocab", required=True, type=reader(int, 1), metavar="N", help="tokens, bytes and specials included")
    add("--kind", choices=("byte", "llama"), help="[by the name of OUT; byte]")
    add("-o", "--out", type=Path, metavar="OUT", help="[tokenizer.json, or tokenizer.model]")
    add("--pattern", default="gpt2", metavar="NAME", help="gpt2, cl100k, or a pattern of your own [%(default)s]")
    add("--special", action="append", metavar="TEXT", help="a special token of a byte-level one [<|endoftext|>]")
    add("--format", dest="form", default="auto", choices=("auto", "text", "jsonl"), help="[auto: by the name]")
    add("--field", default="text", metavar="NAME", help="field of a JSON line that is the document [%(default)s]")
    add("--split", default="auto", choices=("auto", "endoftext", "blank", "line", "file"), help="[auto]")
    add("--force", action="store_true", help="replace OUT")
    add("--json", action="store_true", help="one JSON object as the last line of stdout")
    return parser


def _documents(found: Any, meter: Meter) -> Iterator[str]:
    """Pieces of the documents of all files."""
    from anert.data.corpus import checked, size_of
    from anert.data.text import Source

    sources = [checked(Source(f, found.form, found.split, found.field)) for f in found.files]
    total, before = sum(map(size_of, sources)), 0

    def read(done: float, _size: float) -> None:
        meter.show(Progress("count words", before + done, total, "B"))

    for source in sources:
        for piece, _ in source.pieces(read):
            yield piece
        before += size_of(source)


def _save(tokenizer: Any, out: Path) -> None:
    from anert.files import publish

    temporary = out.with_name(f".{out.name}.tmp{out.suffix}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        tokenizer.save(temporary)
        publish(temporary, out)
    except OSError as e:
        raise InputError(f"{out}: cannot write the tokenizer: {e.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)


def _about(tokenizer: Any) -> dict[str, Any]:
    names = ("kind", "vocab_size", "bos_id", "eos_id", "hash")
    return {name: getattr(tokenizer, name) for name in names}


def _show(argv: Sequence[str]) -> int:
    from anert.tokenizer import load_tokenizer

    parser = Parser(prog="anert tokenizer show", description="Show what a tokenizer file is, and the ids of a text.")
    parser.add_argument("file", metavar="FILE", type=Path, help="any kind that anert reads, or a directory of one")
    parser.add_argument("text", nargs="?", metavar="TEXT", help="a text to encode")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    found = parser.parse(argv)
    tokenizer = load_tokenizer(found.file)
    about = {"path": str(found.file), **_about(tokenizer)}
    if found.text is not None:
        ids = tokenizer.encode(found.text)
        about["ids"] = ids
        about["pieces"] = [tokenizer.token_bytes(i).decode("utf-8", "backslashreplace") for i in ids]
    if found.json:
        print(json.dumps(about))
    else:
        for name, value in about.items():
            print(f"{name:<11}{value}")
    return 0
