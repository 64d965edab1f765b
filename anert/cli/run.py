"""`anert run PLUGIN [train|sample|COMMAND]`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anert.cli.parser import Parser, reader
from anert.errors import InputError

if TYPE_CHECKING:
    from anert.plugin import Plugin

RUN_ABOUT = """\
Run a plugin: train it (the default), sample from it, or run a command of its own.
PLUGIN is a file, an installed plugin's name, or either with a preset: plugins/stories.py:110m.
"""


def main(argv: Sequence[str]) -> int:
    from anert.plugin import load, split_name, suggest

    if not argv or argv[0] in ("-h", "--help"):
        train_parser("PLUGIN").print_help()
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

    found = train_parser(target, plugin).parse(argv)
    if preset and found.preset not in (None, preset):
        raise InputError(f"{target} asks for preset {preset!r} and --preset for {found.preset!r}: leave one out")
    found.preset = found.preset or preset

    def again(out: str) -> int:
        """A fresh process goes on in this one's place: what an engine's compiles have worn out is its process."""
        resume = [] if found.resume else ["--resume", out]
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(sys.executable, [sys.executable, "-m", "anert", "run", target, "train", *argv, *resume])

    job = resolve(plugin, vars(found))
    return commands.train(job, ui=found.ui, log=found.log, as_json=found.json, again=again)


def _sample(plugin: Plugin, target: str, argv: Sequence[str]) -> int:
    from anert.cli.sample import options, show

    parser = Parser(prog=f"anert run {target} sample", description="Write text with a trained model, as it comes.")
    parser.add_argument("--checkpoint", required=True, metavar="PATH", type=Path,
                        help="a run's directory, a step's, or a model file")  # fmt: skip
    return show(plugin, options(parser).parse(argv))


def train_parser(target: str, plugin: Plugin | None = None, prog: str = "") -> Parser:
    """The parser of a training run's options."""
    from anert.options import duration, field_notes, fields, flag
    from anert.train import TrainOptions

    about = RUN_ABOUT
    if plugin is not None:
        about = f"Train {plugin.name}. Presets: {', '.join(plugin.presets)}. Commands: {', '.join(_actions(plugin))}."
    prog = prog or f"anert run {target} [train]"
    parser = Parser(prog=prog.removesuffix(" [train]"), description=about, usage=f"{prog} [options]")
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
            flag(f.name), dest=f.name, type=reader(read), metavar=unit, default=kept, help=note.strip()
        )
    return parser
