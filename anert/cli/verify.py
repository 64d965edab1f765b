"""`anert verify resume PLUGIN`: a run that is interrupted and resumed has the bits of the one that is not."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from anert.cli.parser import Parser
from anert.cli.run import train_parser
from anert.errors import InputError

ABOUT = """\
Train PLUGIN a few steps straight, interrupted at every kind of moment, and with two threads; compare every loss,
weight and moment bit for bit. The options are those of `anert run PLUGIN`.
"""
STEPS = 20


def main(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        parser = Parser(
            prog="anert verify", description=ABOUT, usage="anert verify resume PLUGIN [--steps N] [options]"
        )
        parser.print_help()
        return 0 if argv else 2
    if argv[0] != "resume" or len(argv) < 2 or argv[1].startswith("-"):
        raise InputError("expected: anert verify resume PLUGIN [--steps N] [options of anert run]")
    return _resume(argv[1], argv[2:])


def _resume(target: str, argv: Sequence[str]) -> int:
    from anert.events import Notice, Progress
    from anert.options import resolve
    from anert.plugin import load, split_name
    from anert.verify import Check, resume

    name, preset = split_name(target)
    plugin = load(name)
    found = train_parser(target, plugin, prog=f"anert verify resume {target}").parse(argv)
    found.preset = found.preset or preset
    found.steps = getattr(found, "steps", STEPS)
    if found.resume or getattr(found, "init", "scratch") != "scratch":
        raise InputError("a verified run starts from scratch: leave out --init and --resume")
    job = resolve(plugin, vars(found))
    run, checks = resume(plugin, job.preset, job.config, job.options), list[Check]()
    while True:
        try:
            event = next(run)
        except StopIteration as end:
            checks = end.value
            break
        if isinstance(event, Notice):
            print(event.text, file=sys.stderr)
        elif isinstance(event, Progress) and event.unit == "steps":
            print(f"{event.task}: step {event.done:.0f} of {event.total:.0f}", file=sys.stderr)
    ok = all(c.ok for c in checks)
    stream = sys.stderr if found.json else sys.stdout
    for c in checks:
        print(f"{'ok ' if c.ok else 'BAD'}  {c.id:<12} {c.value}", file=stream)
    if found.json:
        rows = [{"id": c.id, "ok": c.ok, "value": c.value} for c in checks]
        print(json.dumps({"ok": ok, "steps": job.options.steps, "checks": rows}))
    return 0 if ok else 1
