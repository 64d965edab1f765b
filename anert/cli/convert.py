"""`anert convert SRC DST --to FORMAT`: a model file in another format."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from anert.cli.parser import Parser, reader

ABOUT = """\
Write a model in another format. SRC: any model file that `anert inspect` knows, of a Llama-style decoder.

  v0, v1    llama2.c, float32 (its run.c reads v0)      v2     llama2.c, int8 in groups (its runq.c)
  hf        Hugging Face directory, with the tokenizer   anert  a run directory, to sample from or to --init with

--to anert --dtype fp16 starts to tell soonest: anert sample reads its weights in the file's own memory, without a copy.
"""


def main(argv: Sequence[str]) -> int:
    from anert.convert import convert
    from anert.formats import WRITABLE
    from anert.formats.blzt import ARCHITECTURES
    from anert.formats.tensor_file import ENCODINGS

    parser = Parser(prog="anert convert", description=ABOUT, usage="anert convert SRC DST --to FORMAT [options]")
    add = parser.add_argument
    add("source", metavar="SRC", type=Path, help="model file or directory")
    add("target", metavar="DST", type=Path, help="where the new one goes")
    add("--to", required=True, choices=tuple(WRITABLE), help=", ".join(WRITABLE))
    add("--tokenizer", default="", metavar="FILE", help="tokenizer to go with it [the source's own]")
    add(
        "--dtype",
        default="",
        choices=tuple(ENCODINGS),
        help="hf: fp32, fp16 or bf16 [the source's]; anert: fp32 or fp16 [fp32]",
    )
    add("--shard-mb", default=0.0, type=reader(float), metavar="X", help="hf: split weights over files of X MB [5000]")
    add("--group-size", default=0, type=reader(int), metavar="N", help="v2: weights that share a scale [64]")
    add("--plugin", default="", metavar="NAME", help="anert: the plugin that is to run it [stories]")
    add("--arch", default="", choices=ARCHITECTURES, help="how a BLZT checkpoint was trained [by its version]")
    add("--force", action="store_true", help="replace a DST that is there")
    add("--json", action="store_true", help="one JSON object as the last line of stdout")
    found = parser.parse(argv)
    done = convert(
        found.source, found.target, found.to, found.tokenizer, found.arch, found.force, dtype=found.dtype,
        shard_bytes=int(found.shard_mb * 1e6), group_size=found.group_size, plugin=found.plugin,
    )  # fmt: skip
    for note in done["notes"]:
        print(f"note: {note}", file=sys.stderr)
    if found.json:
        print(json.dumps(done))
    else:
        also = f" and {done['tokenizer']}" if done["tokenizer"] else ""
        print(f"wrote {found.target}: {done['parameters'] / 1e6:.3f} M parameters{also}, {done['bytes']:,} bytes")
    return 0
