"""`anert convert`: a model file of any format into another. What the target cannot say is refused, not dropped."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path
from typing import Any

from anert.errors import InputError

RESERVED = ("path", "model", "version")


def convert(source: Path, target: Path, to: str, tokenizer: str = "", arch: str = "", force: bool = False,
            **options: Any) -> dict[str, Any]:  # fmt: skip
    """Write the model of `source` to `target` in the format `to` (a name of formats.WRITABLE); returns what was done.

    tokenizer: a file to go with it instead of the source's own. arch: how a BLZT checkpoint was trained. options: what
    the target's writer takes (`dtype`, `shard_bytes`, `group_size`, `plugin`); empty ones are left out. Raises
    InputError; what was at `target` stays unless `force`.
    """
    from anert.formats import WRITABLE, open_model_file
    from anert.formats.base import size_of
    from anert.tokenizer import load_tokenizer

    if to not in WRITABLE:
        raise InputError(f"--to {to!r}: choose {', '.join(WRITABLE)}")
    given = {name: value for name, value in options.items() if value}
    takes = [p for p in inspect.signature(WRITABLE[to]).parameters if p not in RESERVED]
    if surplus := sorted(given.keys() - set(takes)):
        raise InputError(f"--to {to} has no use for --{surplus[0].replace('_', '-')}: leave it out")
    chosen: dict[str, Any] = {"arch": arch} if arch else {}
    model = open_model_file(source, **chosen)
    if tokenizer:
        vocabulary, vocab_size = load_tokenizer(tokenizer), model.config.get("vocab_size", 0)
        if vocabulary.vocab_size > vocab_size:
            raise InputError(f"{tokenizer} has {vocabulary.vocab_size} tokens, {source} {vocab_size}: another's?")
        model.tokenizer, model.tokenizer_name = lambda: vocabulary, Path(tokenizer).name
    _make_way(source, target, force)
    WRITABLE[to](target, model, **given)
    written = open_model_file(target)
    carried = written.tokenizer_name if written.tokenizer else ""
    notes = list(model.notes)
    if model.tokenizer and not carried:
        notes.append(f"{to} has no place for a tokenizer: keep {model.tokenizer_name} beside it")
    return {
        "source": str(source), "from": model.format, "target": str(target), "to": to, "tensors": len(written.tensors),
        "parameters": written.tensors.n_params, "bytes": size_of(target), "tokenizer": carried, "notes": notes,
    }  # fmt: skip


def _make_way(source: Path, target: Path, force: bool) -> None:
    if not target.parent.is_dir():
        raise InputError(f"{target}: no directory {target.parent} to write into")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not force:
        raise InputError(f"{target} is there already: choose another name, or --force to replace it")
    inside, outside = source.resolve(), target.resolve()
    if inside == outside or outside in inside.parents:
        raise InputError(f"{target} is, or holds, the model that is to be converted: choose another name")
    if target.is_dir():
        from anert.formats import find

        if find(target) is None:
            raise InputError(f"{target} is a directory of something else: it is not replaced")
        shutil.rmtree(target)
