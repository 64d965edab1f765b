"""Opens the stand-in as other versions of the framework would be: a class, a selector missing, or of another type.

    python tests/ane_variants.py FAKE.so < variants.json

Classes are registered once per process, so every (missing, changed) of stdin gets a child of this one. Where the shim
opens it, a program goes the whole way. Prints a list of [exception, message, selectors that are not as expected].
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

from fake_ane import FakeAne, library
from shim_run import Engine, inspect
from test_ane_shim import whole_way

from anert.errors import AnertError


def attempt(path: str, missing: str, changed: str) -> tuple[str, str, list[dict]]:
    fake = FakeAne(Path(os.environ["ANERT_ANE"]), Path(path), "plain", "fp32", 1)
    fake.install(missing, changed)
    fake.reset()
    odd = [row for row in inspect(path) if not row["ok"]]
    try:
        whole_way(Engine(path))
        fake.check()
    except AnertError as error:
        return type(error).__name__, str(error), odd
    return "", "", odd


def in_child(path: str, missing: str, changed: str) -> object:
    read, write = os.pipe()
    if os.fork() == 0:
        try:
            answer: tuple = attempt(path, missing, changed)
        except BaseException:
            answer = ("failed", traceback.format_exc(), [])
        os.write(write, json.dumps(answer).encode())
        os._exit(0)
    os.close(write)
    _, status = os.wait()
    with os.fdopen(read) as answer:
        return json.loads(answer.read() or f'["crash", "wait status {status}", []]')


def main(path: str) -> None:
    library(Path(path))
    print(json.dumps([in_child(path, *variant) for variant in json.load(sys.stdin)]))


if __name__ == "__main__":
    main(sys.argv[1])
