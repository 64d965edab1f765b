"""The command line: reads argv, calls a verb, shows its events, exits with a code that a script can rely on.

Exit codes: 0 ok, 1 a check or a run failed, 2 usage or bad input, 3 backend unavailable, 130 interrupted and saved.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from anert import __version__
from anert.errors import AnertError, InputError

if TYPE_CHECKING:
    from anert.plugin import Plugin

ABOUT = """\
anert trains and runs models written as plugins, on Apple's Neural Engine or on the CPU, from the same MIL text.

  anert run plugins/stories.py                              train the default preset, then tell a story
  anert run plugins/stories.py --preset 15m --data a.txt    train another size on your own text
  anert run plugins/stories.py sample --checkpoint runs/x   tell a story with what a run has learned
  anert plugins plugins/                                    list the plugins of a folder
  anert new mymodel                                         write a plugin of your own, ready to train
"""

RUN_ABOUT = """\
Run a plugin: train it (the default), sample from it, or run a command of its own.
PLUGIN is a file, an installed plugin's name, or either with a preset: plugins/stories.py:110m.
"""


class Parser(argparse.ArgumentParser):
    """argparse that raises InputError: one line, exit code 2, and the nearest flag for a misspelt one."""

    def __init__(self, **settings: Any) -> None:
        settings["formatter_class"] = lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=28)
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} ({self.prog} --help lists what there is)")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        found, unknown = self.parse_known_args(_normalized(argv))
        if unknown:
            from anert.plugin import suggest

            name = unknown[0].partition("=")[0]
            flags = [f for action in self._actions for f in action.option_strings if f.startswith("--")]
            near = suggest(name, flags) if name.startswith("--") else "an option starts with --"
            self.error(f"no option {unknown[0]!r}: {near if near.startswith(('did', 'an')) else 'none is near'}")
        return found


def _normalized(argv: Iterable[str]) -> list[str]:
    """`--grad_accum=4` as `--grad-accum=4`: both spellings of every flag; what follows `--` stays."""
    out: list[str] = []
    rest = False
    for word in argv:
        rest = rest or word == "--"
        if word.startswith("--") and not rest:
            name, equals, value = word.partition("=")
            word = name.replace("_", "-") + equals + value
        out.append(word)
    return out


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
        # The reader of our output is gone: end quietly, and keep the interpreter from flushing into the closed pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _fail(text: str, code: int, as_json: bool) -> int:
    line = " ".join(text.split())
    print(f"anert: {line}", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": line, "exit_code": code}))
    return code


def _dispatch(argv: Sequence[str]) -> int:
    if argv and argv[0] == "run":
        return _run(argv[1:])
    parser = Parser(prog="anert", description=ABOUT, usage="anert COMMAND [options]")
    parser.add_argument("--version", action="version", version=f"anert {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    commands.add_parser("run", help="train a plugin's model, sample from it, or run a command of its own")
    listing = commands.add_parser("plugins", help="list plugins: those given by path, and the installed ones")
    listing.add_argument("paths", nargs="*", metavar="PATH", help="a plugin's file, or a folder of them; these are run")
    listing.add_argument("--json", action="store_true", help="one JSON object on stdout")
    making = commands.add_parser("new", help="write a model plugin that trains as it stands")
    making.add_argument("name", metavar="NAME", help="the plugin's name: letters, digits, _")
    making.add_argument("--out", default=".", metavar="DIR", help="folder to write NAME.py into [.]")
    making.add_argument("--json", action="store_true", help="one JSON object on stdout")
    if not argv:
        parser.print_help()
        return 2
    found = parser.parse(argv)
    return _plugins(found.paths, found.json) if found.command == "plugins" else _new(found.name, found.out, found.json)


def _run(argv: Sequence[str]) -> int:
    from anert.plugin import load, split_name, suggest

    if not argv or argv[0] in ("-h", "--help"):
        _train_parser("PLUGIN").print_help()
        return 0 if argv else 2
    if argv[0].startswith("-"):
        raise InputError(f"PLUGIN comes before the options: anert run PLUGIN [train|sample|...] {argv[0]} ...")
    target, preset = split_name(argv[0])
    plugin = load(target)
    plugin.preset(preset) if preset else None
    has_action = len(argv) > 1 and not argv[1].startswith("-")
    action, rest = (argv[1], argv[2:]) if has_action else ("train", argv[1:])
    if action == "train":
        return _train(plugin, argv[0], preset, rest)
    if action == "sample":
        return _sample(plugin, argv[0], rest)
    if action in plugin.commands:
        from anert.commands import runtime_factory

        return int(plugin.commands[action](list(rest), runtime_factory) or 0)
    raise InputError(f"plugin {plugin.name!r} has no command {action!r}: {suggest(action, _actions(plugin))}")


def _actions(plugin: Plugin) -> list[str]:
    return ["train", "sample", *plugin.commands]


def _train(plugin: Plugin, target: str, preset: str, argv: Sequence[str]) -> int:
    from anert import commands
    from anert.options import resolve

    found = _train_parser(target, plugin).parse(argv)
    if preset and found.preset not in (None, preset):
        raise InputError(f"{target} asks for preset {preset!r} and --preset for {found.preset!r}: leave one out")
    found.preset = found.preset or preset
    return commands.train(resolve(plugin, vars(found)), ui=found.ui, log=found.log, as_json=found.json)


def _sample(plugin: Plugin, target: str, argv: Sequence[str]) -> int:
    from anert import commands

    found = _sample_parser(target).parse(argv)
    settings = {k: v for k, v in vars(found).items() if k not in ("checkpoint", "prompt", "num_samples", "json")}
    return commands.sample(plugin, found.checkpoint, found.prompt, found.num_samples, settings, as_json=found.json)


def _train_parser(target: str, plugin: Plugin | None = None) -> Parser:
    from anert.options import duration, field_notes, fields, flag
    from anert.train import TrainOptions

    about = RUN_ABOUT
    if plugin is not None:
        about = f"Train {plugin.name}. Presets: {', '.join(plugin.presets)}. Commands: {', '.join(_actions(plugin))}."
    parser = Parser(prog=f"anert run {target}", description=about, usage=f"anert run {target} [train] [options]")
    run = parser.add_argument_group("the run")
    run.add_argument("--preset", metavar="NAME", help="the model's size [the plugin's first]")
    run.add_argument("--set", action="append", metavar="KEY=VALUE", help="replace a field of the model's config")
    run.add_argument("-c", "--config", metavar="FILE", help="TOML: the keys are these options, [config] the model's")
    run.add_argument("--resume", metavar="RUN_DIR", help="go on with a run: --init resume --out RUN_DIR")
    run.add_argument("--ui", choices=("rich", "plain", "json", "off"), help="[rich on a terminal, else plain]")
    run.add_argument("--log", metavar="FILE", type=Path, help="events as JSON lines [<out>/events.jsonl]")
    run.add_argument(
        "--json", action="store_true", help="one JSON object as the last line of stdout, the rest on stderr"
    )
    run.add_argument("--debug", action="store_true", help="an error keeps its traceback")
    options = parser.add_argument_group("training")
    notes = field_notes(TrainOptions)
    for f in fields().values():
        timed = f.name.endswith("_s")
        shown = f"{f.default:g} s" if timed else str(f.default)
        note = f"{notes.get(f.name, '')} [{shown}]" if shown else notes.get(f.name, "")
        read: Any = duration if timed else type(f.default)
        unit = {int: "N", float: "X", str: "TEXT", duration: "TIME"}[read]
        kept = argparse.SUPPRESS  # a flag that was not given leaves nothing: the preset or file may say it
        options.add_argument(
            flag(f.name), dest=f.name, type=_reader(read), metavar=unit, default=kept, help=note.strip()
        )
    return parser


def _sample_parser(target: str) -> Parser:
    parser = Parser(prog=f"anert run {target} sample", description="Write text with a trained model, as it comes.")
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="PATH", type=Path, help="a run's directory, a step's, or a model file")
    add("--prompt", default="Once upon a time", metavar="TEXT", help="what the text begins with [%(default)s]")
    add("-n", "--max-tokens", default=256, type=_reader(int, 1), metavar="N", help="tokens to write [%(default)s]")
    add("--temperature", default=0.8, type=_reader(float), metavar="X", help="0: always the likeliest [%(default)s]")
    add("--top-k", default=0, type=_reader(int), metavar="N", help="keep the N likeliest; 0: all [%(default)s]")
    add("--top-p", default=0.95, type=_reader(float), metavar="X", help="keep the likeliest of mass X [%(default)s]")
    add("--min-p", default=0.0, type=_reader(float), metavar="X", help="drop what is under X of the best [%(default)s]")
    add("--repetition-penalty", default=1.0, type=_reader(float), metavar="X", help="1: none [%(default)s]")
    add("--seed", default=1337, type=_reader(int), metavar="N", help="[%(default)s]; sample i uses seed + i")
    add("--num-samples", default=1, type=_reader(int, 1), metavar="N", help="how many texts [%(default)s]")
    add("--tokenizer", default="", metavar="FILE", help="tokenizer file [the checkpoint's own]")
    add("--backend", default="auto", metavar="NAME", help="auto, cpu, ane or reference [%(default)s]")
    add("--precision", default="fp32", metavar="NAME", help="auto, fp32, bf16 or fp16 [%(default)s]")
    add("--threads", default=0, type=_reader(int), metavar="N", help="0: what the machine grants [%(default)s]")
    add("--json", action="store_true", help="one JSON object as the last line of stdout, the text on stderr")
    return parser


def _reader(read: Any, low: float = 0) -> Any:
    """An argparse type: `read`, with what it expects in the message, and numbers no lower than `low`."""
    from anert.options import kind

    def checked(text: str) -> Any:
        try:
            value = read(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {kind(read)}, got {text!r}") from None
        if isinstance(value, (int, float)) and not value >= low:
            raise argparse.ArgumentTypeError(f"expected {kind(read)} of at least {low}, got {text}")
        return value

    return checked


def _plugins(paths: Sequence[str], as_json: bool) -> int:
    from anert.plugin import discover

    rows = discover(paths)
    if as_json:
        keys = ("name", "source", "status", "presets", "commands", "reason")
        print(json.dumps({"plugins": [{k: getattr(row, k) for k in keys} for row in rows]}))
    elif not rows:
        print("no plugin is installed; name a file or a folder of them: anert plugins plugins/")
    else:
        table = [("NAME", "STATUS", "PRESETS", "FROM")]
        table += [(r.name, r.status, ", ".join(r.presets) or "-", r.source) for r in rows]
        widths = [max(len(line[i]) for line in table) for i in range(3)]
        for line, row in zip(table, [None, *rows], strict=True):
            print("  ".join([*(cell.ljust(w) for cell, w in zip(line, widths, strict=False)), line[3]]).rstrip())
            if row is not None and row.reason:
                print(f"  {row.reason}")
    return 1 if any(row.status == "broken" for row in rows) else 0


def _new(name: str, folder: str, as_json: bool) -> int:
    from anert.scaffold import write_plugin

    path = write_plugin(name, Path(folder))
    if as_json:
        print(json.dumps({"plugin": name, "path": str(path)}))
    else:
        print(f"wrote {path}; train it: anert run {path}")
    return 0
