"""`anert new NAME`: a model plugin that trains as it stands."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from anert.cli.parser import Parser


def main(argv: Sequence[str]) -> int:
    from anert.scaffold import write_plugin

    parser = Parser(prog="anert new", description="Write a model plugin that trains as it stands.")
    parser.add_argument("name", metavar="NAME", help="the plugin's name: letters, digits, _")
    parser.add_argument("--out", default=".", metavar="DIR", help="folder to write NAME.py into [.]")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    found = parser.parse(argv)
    path = write_plugin(found.name, Path(found.out))
    if found.json:
        print(json.dumps({"plugin": found.name, "path": str(path)}))
    else:
        print(f"wrote {path}; train it: anert run {path}")
    return 0
