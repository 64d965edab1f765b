"""`anert inspect PATH...`: format, architecture, step and sizes of a file or directory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anert.cli.parser import Parser

ABOUT = """\
Tell what a file or directory is: a model (llama2.c v0, v1, v2; a Hugging Face directory; GGUF; BLZT of maderix/ANE and
Orion; a run of anert), tokens, a tokenizer, a weight blob, or text. Nothing is loaded that the answer does not need.
"""


def main(argv: Sequence[str]) -> int:
    from anert.formats.blzt import ARCHITECTURES
    from anert.inspect import inspect

    parser = Parser(prog="anert inspect", description=ABOUT)
    parser.add_argument("path", metavar="PATH", type=Path, help="file or directory")
    parser.add_argument("--arch", default="", choices=ARCHITECTURES, help="how a BLZT checkpoint was trained")
    parser.add_argument("--data-dtype", default="auto", metavar="NAME", help="of raw token ids: uint16 or uint32")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    found = parser.parse(argv)
    facts = inspect(found.path, found.arch, found.data_dtype)
    if found.json:
        print(json.dumps(facts))
    else:
        _show(facts)
    return 0


def _show(facts: Mapping[str, Any]) -> None:
    listed = facts.get("list", ())
    rows = [(key.replace("_", " "), _words(value)) for key, value in facts.items() if key != "list"]
    width = max(len(key) for key, _ in rows)
    for key, value in rows:
        print(f"{key.ljust(width)}  {value}")
    if isinstance(listed, Mapping):
        for name, value in listed.items():
            print(f"  {name}  {_words(value)}")
    for row in listed if isinstance(listed, list) else ():
        print("  " + _words(row))


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_words(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_words, value))
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 99_999:
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else str(value)
