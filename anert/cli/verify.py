"""`anert verify resume PLUGIN`: a run that is interrupted and resumed has the bits of the one that is not.
`anert verify tokens PATH`: token files are what was written."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from anert.cli.parser import Parser
from anert.cli.run import train_parser
from anert.errors import InputError

if TYPE_CHECKING:
    from anert.verify import Check

ABOUT = """\
resume PLUGIN: train a few steps straight, interrupted at every kind of moment, and with two threads; compare every
loss, weight and moment bit for bit. The options are those of `anert run PLUGIN`.

tokens PATH: read every byte of a directory of token shards (or its manifest.json) and compare checksums, or every id of
a token file; name each file that is not what was written. Opening tokens checks sizes and headers alone.
"""
STEPS = 20


def main(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        parser = Parser(
            prog="anert verify",
            description=ABOUT,
            usage="anert verify resume PLUGIN [--steps N] [options] | tokens PATH",
        )
        parser.print_help()
        return 0 if argv else 2
    if argv[0] == "tokens":
        return _tokens(argv[1:])
    if argv[0] != "resume" or len(argv) < 2 or argv[1].startswith("-"):
        raise InputError("expected: anert verify resume PLUGIN [options of anert run], or anert verify tokens PATH")
    return _resume(argv[1], argv[2:])


def _resume(target: str, argv: Sequence[str]) -> int:
    from anert.events import Notice, Progress
    from anert.options import resolve
    from anert.plugin import load, split_name
    from anert.verify import resume

    name, preset = split_name(target)
    plugin = load(name)
    found = train_parser(target, plugin, prog=f"anert verify resume {target}").parse(argv)
    found.preset = found.preset or preset
    found.steps = getattr(found, "steps", STEPS)
    if found.resume or getattr(found, "init", "scratch") != "scratch":
        raise InputError("a verified run starts from scratch: leave out --init and --resume")
    job = resolve(plugin, vars(found))
    run = resume(plugin, job.preset, job.config, job.options)
    while True:
        try:
            event = next(run)
        except StopIteration as end:
            checks: list[Check] = end.value
            break
        if isinstance(event, Notice):
            print(event.text, file=sys.stderr)
        elif isinstance(event, Progress) and event.unit == "steps":
            print(f"{event.task}: step {event.done:.0f} of {event.total:.0f}", file=sys.stderr)
    return _tell(checks, found.json, steps=job.options.steps)


def _tokens(argv: Sequence[str]) -> int:
    from anert.cli.meter import Meter
    from anert.verify import tokens

    parser = Parser(
        prog="anert verify tokens", description="Read all of some tokens and compare with what was written."
    )
    parser.add_argument("path", metavar="PATH", type=Path, help="a directory of shards, its manifest.json, or a .bin")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line of stdout")
    found = parser.parse(argv)
    meter, run = Meter(), tokens(found.path)
    try:
        while True:
            meter.show(next(run))
    except StopIteration as end:
        checks: list[Check] = end.value
    finally:
        meter.clear()
    return _tell(checks, found.json)


def _tell(checks: Sequence[Check], as_json: bool, **more: int) -> int:
    ok = all(c.ok for c in checks)
    stream = sys.stderr if as_json else sys.stdout
    for c in checks:
        print(f"{'ok ' if c.ok else 'BAD'}  {c.id:<12} {c.value}", file=stream)
    if as_json:
        rows = [{"id": c.id, "ok": c.ok, "value": c.value} for c in checks]
        print(json.dumps({"ok": ok, **more, "checks": rows}))
    return 0 if ok else 1
