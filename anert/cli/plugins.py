"""`anert plugins [PATH...]`: what plugins there are, a broken one with its reason."""

from __future__ import annotations

import json
from collections.abc import Sequence

from anert.cli.parser import Parser


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="anert plugins", description="List plugins: those given by path, and the installed ones.")
    parser.add_argument("paths", nargs="*", metavar="PATH", help="a plugin's file, or a folder of them; these are run")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    found = parser.parse(argv)
    return _plugins(found.paths, found.json)


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
