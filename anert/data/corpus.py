"""Texts -> token files: one file, or a directory of shards that goes on where it stopped; here, or on an executor."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from anert.data import shards
from anert.data.text import STDIN, Source
from anert.data.token_file import TokenWriter, dtype_of, open_tokens, sniff
from anert.errors import InputError
from anert.events import Event, Notice, Progress
from anert.files import sha256
from anert.tokenizer import Tokenizer
from anert.tokenizer.base import Shipped

ENDS = ("auto", "bos", "eos", "both", "none")
PART_BYTES = 8 << 20
"""Of a text that workers get at a time for one output file."""

SHARD_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Options:
    """What becomes of the texts. Where two runs' options and tokenizer are equal, so are their files.

    form: `auto` (by the name), `text` or `jsonl`, with the field to read. split: what divides a text into documents:
    `endoftext`, `blank`, `line`, `file`, or `auto` (endoftext where the mark is, else file). ends: around each document
    `bos`, `eos`, `both`, `none`, or `auto` (bos; eos where the vocabulary has no bos). val: share of the documents,
    chosen by their text, that go to a file of their own. dtype: `auto`, `uint16`, `uint32`. raw: ids without a header.
    """

    form: str = "auto"
    field: str = "text"
    split: str = "auto"
    ends: str = "auto"
    val: float = 0.0
    dtype: str = "auto"
    raw: bool = False


@dataclass(slots=True)
class Report:
    """What was written. bytes: of the inputs. skipped: shards that were finished before."""

    path: str
    files: list[str] = field(default_factory=list)
    documents: int = 0
    tokens: int = 0
    val_tokens: int = 0
    bytes: int = 0
    shards: int = 0
    skipped: int = 0
    complete: bool = True


@dataclass(frozen=True, slots=True)
class Task:
    """One input, or a part of one, on its way to a file (and one for validation)."""

    source: Source
    out: Path
    val_out: Path | None
    options: Options
    vocabulary: Shipped
    size: int


def tokenize(
    files: Sequence[Path | str],
    tokenizer: Tokenizer,
    out: Path | str,
    options: Options | None = None,
    executor: Executor | None = None,
    shard: tuple[int, int] = (0, 1),
    shard_bytes: int = SHARD_BYTES,
    force: bool = False,
) -> Generator[Event, None, Report]:
    """Tokenize texts (`-`: standard input; .gz unpacked) into `out`; yields Progress in bytes, returns a Report.

    out: a file `*.bin` (validation goes to `*.val.bin`), or a directory of shards of about shard_bytes of text each,
    where finished ones are skipped. executor: any of concurrent.futures. shard (i, n): only every n-th of a
    directory's shards, from i on, for as many machines. force: replace what is there. Memory does not grow with the
    texts. Raises InputError: an input missing, empty or damaged; output that is there; a full disk.
    """
    options, out = options or Options(), Path(out)
    check_options(options, tokenizer)
    sources = [checked(Source(str(f), options.form, options.split, options.field)) for f in files]
    if not sources:
        raise InputError("no texts to tokenize: name files, or - for standard input")
    if sum(s.path == STDIN for s in sources) > 1:
        raise InputError("standard input (-) is named twice: it can be read once")
    if any(s.path == STDIN for s in sources) and executor is not None:
        yield Notice("info", "standard input is tokenized by this process alone")
        executor = None
    if out.suffix == ".bin":
        if shard != (0, 1):
            raise InputError(f"{out}: a part i/n goes to a directory of shards: name one instead of a .bin file")
        return (yield from to_file(sources, tokenizer, out, options, executor, force))
    return (yield from to_shards(sources, tokenizer, out, options, executor, shard, shard_bytes, force))


def check_options(options: Options, tokenizer: Tokenizer) -> None:
    """Raises InputError for options that cannot be, alone or with this tokenizer."""
    if options.ends not in ENDS:
        raise InputError(f"ends {options.ends!r}: expected {', '.join(ENDS)}")
    for name, token in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id)):
        if options.ends in (name, "both") and token < 0:
            raise InputError(f"the tokenizer has no {name} token: ends {options.ends!r} cannot be; try auto")
    if not 0 <= options.val < 1:
        raise InputError(f"validation share {options.val}: expected 0 or more and less than 1")
    dtype_of(options.dtype, tokenizer.vocab_size)


def checked(source: Source) -> Source:
    """The source with its split found out. Raises InputError where it is no text, or its first line no JSON."""
    if source.path == STDIN:
        return source
    if (kind := sniff(source.path)) != "text":
        raise InputError(f"{source.path}: holds tokens ({kind}), not text")
    if source.is_jsonl:
        next(source.pieces(), None)
    return source.resolved()


def ends_of(options: Options, tokenizer: Tokenizer) -> tuple[bool, bool]:
    """(bos, eos) around each document."""
    if options.ends == "auto":
        return tokenizer.bos_id >= 0, tokenizer.bos_id < 0 <= tokenizer.eos_id
    return options.ends in ("bos", "both"), options.ends in ("eos", "both")


def writer(path: Path, tokenizer: Tokenizer, options: Options) -> TokenWriter:
    about = tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.hash
    return TokenWriter(path, *about, options.dtype, options.raw)


def held_out(text: str, share: float) -> bool:
    """Whether a document is for validation: by its (first) text alone, so that no copy of it is trained on."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") < share * 2.0**64


def encode(
    source: Source, tokenizer: Tokenizer, options: Options, train: TokenWriter, val: TokenWriter | None
) -> Iterator[int]:
    """Write every document of a source; yields the bytes read so far, now and then."""
    bos, eos = ends_of(options, tokenizer)
    read = shown = source.start

    def position(done: float, _size: float) -> None:
        nonlocal read
        read = int(done)

    pieces = source.pieces(position)
    for piece, last in pieces:
        to = val if val is not None and held_out(piece, options.val) else train
        to.start_document()
        if last:
            to.write(tokenizer.encode(piece, bos, eos))
        else:
            for ids in tokenizer.encode_pieces(rest_of_document(piece, pieces), bos, eos):
                to.write(ids)
                yield read - source.start
        if read - shown >= 1 << 20:
            shown = read
            yield read - source.start
    yield read - source.start


def rest_of_document(piece: str, pieces: Iterable[tuple[str, bool]]) -> Iterator[str]:
    yield piece
    for text, last in pieces:
        yield text
        if last:
            return


def size_of(source: Source) -> int:
    if source.path == STDIN:
        return 0
    return source.end - source.start if source.end else os.stat(source.path).st_size


def val_path(path: Path) -> Path:
    """Where the validation tokens of a file go."""
    return path.with_suffix(".val.bin")


# ---- one file


def to_file(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    out: Path,
    options: Options,
    executor: Executor | None,
    force: bool,
) -> Generator[Event, None, Report]:
    """All texts into one file, whole or not at all."""
    outs = [out, val_path(out)] if options.val else [out]
    for path in outs:
        if path.exists() and not force:
            raise InputError(f"{path} is there already: choose another name, or --force to replace it")
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(writer(path, tokenizer, options)) for path in outs]
        if executor is None:
            read = yield from write_here(sources, tokenizer, options, writers)
        else:
            read = yield from write_from_parts(sources, tokenizer, options, writers, executor)
        train, documents = writers[0], sum(w.n_documents for w in writers)
        if not documents:
            raise InputError(f"{sources[0].path}: no text in it, only whitespace: there is nothing to train on")
    tokens = [w.n_tokens for w in writers]
    val = tokens[1] if len(tokens) > 1 else 0
    return Report(str(out), [str(p) for p in outs], documents, train.n_tokens, val, read, len(sources))


def write_here(
    sources: Sequence[Source], tokenizer: Tokenizer, options: Options, writers: Sequence[TokenWriter]
) -> Generator[Event, None, int]:
    total = sum(map(size_of, sources)) if all(s.path != STDIN for s in sources) else 0
    before = 0
    for source in sources:
        done = 0
        for done in encode(source, tokenizer, options, writers[0], writers[1] if options.val else None):
            yield Progress("tokenize", before + done, total, "B")
        before += size_of(source) or done
    return before


def write_from_parts(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    options: Options,
    writers: Sequence[TokenWriter],
    executor: Executor,
) -> Generator[Event, None, int]:
    """Parts of the texts go to workers; what they write is put together in order as it comes."""
    parts = [part for source in sources for part in source.parts(PART_BYTES)]
    total, done, vocabulary = sum(map(size_of, parts)), 0, Shipped(tokenizer)
    folder = Path(tempfile.mkdtemp(prefix=f".{writers[0].path.name}.parts-", dir=writers[0].path.parent))
    whole = Options(**{**asdict(options), "raw": False})
    try:
        waiting = []
        for i, part in enumerate(parts):
            out = folder / f"{i:05}.bin"
            task = Task(part, out, val_path(out) if options.val else None, whole, vocabulary, size_of(part))
            waiting.append((task, executor.submit(run_task, task)))
        try:
            for task, future in waiting:
                future.result()
                for path, to in zip((task.out, task.val_out), writers, strict=False):
                    if path is not None:
                        to.append(open_tokens(path))
                        path.unlink()
                done += task.size
                yield Progress("tokenize", done, total, "B")
        finally:
            for _, future in waiting:
                future.cancel()
            for _, future in waiting:  # one that runs still writes into the folder
                with contextlib.suppress(BaseException):
                    future.result()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return done


def run_task(task: Task) -> dict[str, Any]:
    """Tokenize one part into its files; returns the shard's note. Runs in a worker."""
    run = run_here(task)
    while True:
        try:
            next(run)
        except StopIteration as end:
            return dict(end.value)


def run_here(task: Task, before: int = 0, total: int = 0) -> Generator[Event, None, dict[str, Any]]:
    """`run_task` that yields its Progress: bytes `before` it and its own, of `total`."""
    tokenizer = task.vocabulary.tokenizer()
    with contextlib.ExitStack() as stack:
        train = stack.enter_context(writer(task.out, tokenizer, task.options))
        val = stack.enter_context(writer(task.val_out, tokenizer, task.options)) if task.val_out else None
        read = 0
        for read in encode(task.source, tokenizer, task.options, train, val):
            yield Progress("tokenize", before + read, total, "B")
    both = [(train, "train"), (val, "val")]
    entries = [file_entry(w, part, task.options.raw) for w, part in both if w is not None]
    documents = sum(w.n_documents for w, _ in both if w is not None)
    counts = {"documents": documents, "tokens": train.n_tokens, "val_tokens": val.n_tokens if val else 0}
    return {**counts, "bytes": task.size or read, "files": entries}


def file_entry(written: TokenWriter, part: str, raw: bool) -> dict[str, Any]:
    """A file as a note and the manifest list it."""
    digest, size = sha256(written.path), written.path.stat().st_size
    about = {"name": written.path.name, "part": part, "tokens": written.n_tokens, "dtype": written.dtype.name}
    return {**about, "raw": raw, "bytes": size, "sha256": digest}


# ---- shards


def to_shards(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    out: Path,
    options: Options,
    executor: Executor | None,
    shard: tuple[int, int],
    shard_bytes: int,
    force: bool,
) -> Generator[Event, None, Report]:
    """A shard for each part of the texts. A note says what a shard was made of: one that fits is not made again."""
    i, n = shard
    if not 0 <= i < n:
        raise InputError(f"shard {i}/{n}: expected i/n with i from 0 to n - 1")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: a file; shards go to a directory (or name a .bin file)")
    vocabulary = Shipped(tokenizer)
    plan: list[tuple[Task, dict[str, Any]]] = []
    for part in (p for source in sources for p in source.parts(shard_bytes)):
        path = out / f"shard-{len(plan):05}.bin"
        task = Task(part, path, val_path(path) if options.val else None, options, vocabulary, size_of(part))
        plan.append((task, identity(task, tokenizer)))
    check_directory(out, [of for _, of in plan], force)
    mine = plan[i::n]
    todo = []
    for task, of in mine:
        if not (yield from is_finished(task, of)):
            todo.append((task, of))
    if skipped := len(mine) - len(todo):
        yield Notice("info", f"{skipped} of {len(mine)} shards are finished already")
    yield from make_shards(todo, executor, sum(task.size for task, _ in mine))
    notes = [shards.read_note(task.out) for task, _ in plan]
    whole = [note for note in notes if note is not None]
    report = Report(str(out), shards=len(mine), skipped=skipped, complete=len(whole) == len(plan))
    for note in (note for note in notes[i::n] if note is not None):
        report.files += [str(out / f["name"]) for f in note["files"]]
        for key in ("documents", "tokens", "val_tokens", "bytes"):
            setattr(report, key, getattr(report, key) + note[key])
    if report.complete:
        if not sum(note["documents"] for note in whole):
            raise InputError(f"{sources[0].path}: no text in it, only whitespace: there is nothing to train on")
        ids = {"vocab_size": tokenizer.vocab_size, "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
        about = {**ids, "tokenizer_hash": tokenizer.hash, "tokenizer_kind": tokenizer.kind, "options": asdict(options)}
        shards.write_manifest(out, about, whole)
    return report


def make_shards(
    todo: Sequence[tuple[Task, dict[str, Any]]], executor: Executor | None, total: int
) -> Generator[Event, None, None]:
    done = total - sum(task.size for task, _ in todo)
    if executor is None:
        for task, of in todo:
            finish(task, of, (yield from run_here(task, done, total)))
            done += task.size
        return
    running = {executor.submit(run_task, task): (task, of) for task, of in todo}
    try:
        for future in as_completed(running):
            task, of = running[future]
            finish(task, of, future.result())
            done += task.size
            yield Progress("tokenize", done, total, "B")
    finally:
        for future in running:
            future.cancel()


def finish(task: Task, of: dict[str, Any], note: dict[str, Any]) -> None:
    """The note makes the shard finished."""
    shards.write_json(shards.note_path(task.out), {"of": of, **note})


def identity(task: Task, tokenizer: Tokenizer) -> dict[str, Any]:
    """What decides a shard's content."""
    source = {"path": task.source.path, "start": task.source.start, "end": task.source.end}
    if task.source.path != STDIN:
        stat = os.stat(task.source.path)
        source |= {"path": str(Path(task.source.path).resolve()), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    return {"source": source, "options": asdict(task.options), "tokenizer_hash": tokenizer.hash}


def is_finished(task: Task, of: dict[str, Any]) -> Generator[Event, None, bool]:
    """Whether a shard is there as its note says, to the last bit; a Notice where only the note is."""
    note = shards.read_note(task.out)
    if note is None or note.get("of") != of or task.source.path == STDIN:
        return False
    for entry in note["files"]:
        if wrong := shards.difference(task.out.parent, entry):
            yield Notice("warning", f"{task.out.parent / entry['name']}: {wrong}: it is made again")
            return False
    return True


def check_directory(out: Path, plan: Sequence[dict[str, Any]], force: bool) -> None:
    """Raises InputError where a directory holds shards of something else, unless `force` removes them."""
    if not out.is_dir():
        return
    for path in sorted(out.glob("shard-*.json")):
        number = int(path.stem.removeprefix("shard-")) if path.stem.removeprefix("shard-").isdigit() else len(plan)
        try:
            of = json.loads(path.read_text("utf-8"))["of"]
        except (OSError, ValueError, KeyError, TypeError):
            of = None
        if number < len(plan) and of == plan[number] and plan[number]["source"]["path"] != STDIN:
            continue
        if not force:
            raise InputError(f"{path}: made of other texts, options or tokenizer: another directory, or --force")
        for old in (path, path.with_suffix(".bin"), path.with_suffix(".val.bin"), out / shards.MANIFEST):
            old.unlink(missing_ok=True)
