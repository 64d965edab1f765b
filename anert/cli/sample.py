"""`anert sample CHECKPOINT`, and the options that it shares with `anert run PLUGIN sample`."""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from anert.cli.parser import Parser, reader
from anert.errors import InputError

if TYPE_CHECKING:
    from anert.plugin import Plugin

PROMPT = "Once upon a time"


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="anert sample", description="Write text with a trained model, as it comes.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path,
                        help="a run's directory, a step's, or a model file")  # fmt: skip
    parser.add_argument("--plugin", default="", metavar="PLUGIN",
                        help="a file or an installed name [the checkpoint's, else stories]")  # fmt: skip
    found = options(parser).parse(argv)
    if found.engine == "mil":  # NumPy, loaded below, multiplies nothing then: threads of its BLAS would only spin
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    gc.disable()  # as in commands.sample, which goes on with it: importing is most of a start
    try:
        return show(plugin_for(found.checkpoint, found.plugin), found)
    finally:
        gc.enable()


def plugin_for(checkpoint: Path, named: str) -> Plugin:
    """The plugin that --plugin names, else the installed one that trained the checkpoint."""
    from anert.errors import PluginError
    from anert.inputs import plugin_of
    from anert.plugin import installed, load, split_name

    if not checkpoint.exists():
        raise InputError(f"{checkpoint}: no checkpoint there; a training run leaves one in its --out directory")
    name = split_name(named)[0] if named else plugin_of(checkpoint)
    if not named and name not in {entry.name for entry in installed()}:
        raise PluginError(f"{checkpoint} is a model of plugin {name!r}, which is not installed: pass --plugin FILE")
    return load(name)


def options(parser: Parser) -> Parser:
    """Add what sampling takes beside a checkpoint and a plugin."""
    add = parser.add_argument
    add("--prompt", default=None, metavar="TEXT", help=f"what the text begins with; -: stdin [{PROMPT}]")
    add("--prompt-file", default=None, metavar="FILE", help="the prompt from a file, as it is; -: stdin")
    add("-n", "--max-tokens", default=256, type=reader(int, 1), metavar="N", help="tokens to write [%(default)s]")
    add("--temperature", default=0.8, type=reader(float), metavar="X", help="0: always the likeliest [%(default)s]")
    add("--top-k", default=0, type=reader(int), metavar="N", help="keep the N likeliest; 0: all [%(default)s]")
    add("--top-p", default=0.95, type=reader(float), metavar="X", help="keep the likeliest of mass X [%(default)s]")
    add("--min-p", default=0.0, type=reader(float), metavar="X", help="drop what is under X of the best [%(default)s]")
    add("--repetition-penalty", default=1.0, type=reader(float), metavar="X", help="1: none [%(default)s]")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given again")
    add("--seed", default=1337, type=reader(int), metavar="N", help="[%(default)s]; sample i uses seed + i")
    add(
        "--rng", default="philox", metavar="NAME", help="philox, or llama2c for llama2.c's text of a seed [%(default)s]"
    )
    add("--num-samples", default=1, type=reader(int, 1), metavar="N", help="how many texts [%(default)s]")
    add("--tokenizer", default="", metavar="FILE", help="tokenizer file [the checkpoint's own]")
    add("--engine", default="mil", metavar="NAME",
        help="mil: the model's programs on --backend; numpy: float32 NumPy, without them [%(default)s]")  # fmt: skip
    add("--backend", default="auto", metavar="NAME", help="auto, cpu, ane or reference [%(default)s]")
    add("--weights", default="fp16", metavar="NAME", help="fp16, or int8 in groups of 32 (cpu alone) [%(default)s]")
    add("--precision", default="fp32", metavar="NAME", help="auto, fp32, bf16 or fp16 [%(default)s]")
    add("--threads", default=0, type=reader(int), metavar="N", help="0: what the machine grants [%(default)s]")
    add("--json", action="store_true", help="one JSON object as the last line of stdout, the text on stderr")
    add("--debug", action="store_true", help="an error keeps its traceback")
    return parser


def show(plugin: Plugin, found: argparse.Namespace) -> int:
    """Sample as the parsed options say."""
    from anert import commands

    own = ("checkpoint", "plugin", "prompt", "prompt_file", "json", "debug")
    settings = {k: v for k, v in vars(found).items() if k not in own}
    return commands.sample(plugin, found.checkpoint, _prompt(found), settings, as_json=found.json)


def _prompt(found: argparse.Namespace) -> str:
    if found.prompt is not None and found.prompt_file is not None:
        raise InputError("--prompt and --prompt-file both say what the text begins with: leave one out")
    if found.prompt_file is None and found.prompt != "-":
        return PROMPT if found.prompt is None else str(found.prompt)
    source = found.prompt_file or "-"
    try:
        data = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
        return data.decode("utf-8")
    except OSError as error:
        raise InputError(f"--prompt-file {source}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"the prompt from {source} is not UTF-8: byte {error.start} is {data[error.start]:#04x}"
        ) from None
