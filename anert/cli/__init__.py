"""The command line: reads argv, calls a verb, shows what it yields, exits with a code that a script can rely on.

Exit codes: 0 ok, 1 a check or a run failed, 2 usage or bad input, 3 backend unavailable or a figure above the roofline,
130 interrupted and saved. A verb is a row of VERBS and a module of this package with `main(argv) -> exit code`.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from typing import NoReturn

from anert import __version__
from anert.errors import AnertError, InputError

ABOUT = """\
anert trains and runs models written as plugins, on Apple's Neural Engine or on the CPU, from the same MIL text.

  anert run plugins/stories.py                              train the default preset, then tell a story
  anert run plugins/stories.py --preset 15m --data a.txt    train another size on your own text
  anert run plugins/stories.py sample --checkpoint runs/x   tell a story with what a run has learned
  anert plugins plugins/                                    list the plugins of a folder
  anert new mymodel                                         write a plugin of your own, ready to train
"""

VERBS = {
    "run": ("train a plugin's model, sample from it, or run a command of its own", "run"),
    "sample": ("write text with a trained model", "sample"),
    "eval": ("loss, perplexity and bits per byte of a trained model on a text", "evaluate"),
    "tokenize": ("texts to token files: JSON lines, gzip, shards, many processes", "tokenize"),
    "tokenizer": ("train a tokenizer, or show what one is", "tokenizer"),
    "plugins": ("list plugins: those given by path, and the installed ones", "plugins"),
    "inspect": ("tell what a model, token, tokenizer or weight file is", "inspect"),
    "convert": ("write a model file in another format", "convert"),
    "new": ("write a model plugin that trains as it stands", "new"),
    "verify": ("prove that an interrupted run goes on bit for bit, or that tokens are what was written", "verify"),
    "doctor": ("look at this machine, and probe its Neural Engine", "doctor"),
    "bench": ("measure, side by side, what this machine does", "bench"),
    "estimate": ("a training step on a Neural Engine, on paper, from the kernels that would run", "estimate"),
    "lint": ("check MIL text, or a plugin's kernels, against the Neural Engine's published constraints", "lint"),
}
"""verb -> (what it does, module of anert.cli), in the order that --help lists them."""


def entry() -> NoReturn:
    """The `anert` command."""
    sys.exit(main(sys.argv[1:]))


def main(argv: Sequence[str]) -> int:
    """Run one command and return its exit code. An AnertError becomes its one line; a bug keeps its traceback."""
    as_json, debug = "--json" in argv, "--debug" in argv
    try:
        return _dispatch([a for a in argv if a != "--debug"])
    except AnertError as error:
        if debug:
            raise
        return _fail(str(error), error.exit_code, as_json)
    except KeyboardInterrupt:
        return _fail("interrupted", 130, as_json)
    except BrokenPipeError:
        from anert.files import silence

        silence(sys.stdout)
        return 1


def _fail(text: str, code: int, as_json: bool) -> int:
    dist = sys.modules.get("anert.dist")  # loaded by what may run as one of several processes
    line = " ".join(text.split())
    print(f"anert: {dist.label() if dist else ''}{line}", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": line, "exit_code": code}))
    if dist:
        dist.leave(code)
    return code


def _dispatch(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"anert {__version__}")
        return 0
    if argv[0] not in VERBS:
        from anert.plugin import suggest

        raise InputError(f"no command {argv[0]!r}: {suggest(argv[0], list(VERBS))} (anert --help lists them)")
    module = importlib.import_module(f"anert.cli.{VERBS[argv[0]][1]}")
    return int(module.main(argv[1:]))


def _help() -> str:
    width = max(map(len, VERBS))
    rows = "\n".join(f"  {verb.ljust(width)}  {text}" for verb, (text, _) in VERBS.items())
    return f"usage: anert COMMAND [options]\n\n{ABOUT}\ncommands (anert COMMAND --help tells more):\n{rows}"
