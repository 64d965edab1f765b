"""`anert doctor`: what this machine can do with anert."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from anert.cli.parser import Parser

ABOUT = """\
Look at this machine: platform, native core, measured speed, tools, plugins. On a Mac it also probes the Neural Engine,
each question in a process of its own, and keeps the answers for this machine. Exit code 1 if something is wrong.
"""
MARKS = {True: "ok", False: "WRONG", None: "-"}


def main(argv: Sequence[str]) -> int:
    from anert.doctor import examine

    parser = Parser(prog="anert doctor", description=ABOUT)
    add = parser.add_argument
    add("plugins", nargs="*", metavar="PLUGIN", help="plugins, or folders of them, to load; these are run")
    add("--no-probes", action="store_true", help="leave the Neural Engine alone")
    add("--exhaust", action="store_true", help="also count how many programs a process can compile (minutes)")
    add("--json", action="store_true", help="one JSON object on stdout")
    found = parser.parse(argv)
    checks = []
    for check in examine(False if found.no_probes else None, found.exhaust, found.plugins):
        checks.append(check)
        stream = sys.stderr if found.json else sys.stdout
        print(f"{MARKS[check.ok]:>5}  {check.id.ljust(22)} {check.value}", file=stream, flush=True)
        if check.remedy:
            print(f"{'':31}{check.remedy}", file=stream)
    if found.json:
        print(json.dumps({"checks": [asdict(check) for check in checks]}))
    return 1 if any(check.ok is False for check in checks) else 0
