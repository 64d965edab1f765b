"""argparse in our words: one line for a usage error, the nearest flag for a misspelt one."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from anert.errors import InputError


class Parser(argparse.ArgumentParser):
    """argparse that raises InputError: one line, exit code 2, and the nearest flag for a misspelt one."""

    def __init__(self, **settings: Any) -> None:
        settings["formatter_class"] = lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=28)
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message.removeprefix('argument ')} ({self.prog} --help lists what there is)")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        found, unknown = self.parse_known_args(normalized(argv))
        if unknown:
            from anert.plugin import suggest

            name = unknown[0].partition("=")[0]
            flags = [f for action in self._actions for f in action.option_strings if f.startswith("--")]
            near = suggest(name, flags) if name.startswith("--") else "an option starts with --"
            self.error(f"no option {unknown[0]!r}: {near if near.startswith(('did', 'an')) else 'none is near'}")
        return found


def normalized(argv: Iterable[str]) -> list[str]:
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


def reader(read: Any, low: float = 0) -> Any:
    """An argparse type: `read`, with what it expects in the message, and numbers no lower than `low`."""

    def checked(text: str) -> Any:
        try:
            value = read(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {_kind(read)}, got {text!r}") from None
        if isinstance(value, (int, float)) and not value >= low:
            raise argparse.ArgumentTypeError(f"expected {_kind(read)} of at least {low}, got {text}")
        return value

    return checked


def _kind(read: Any) -> str:
    from anert.options import kind

    return kind(read)
