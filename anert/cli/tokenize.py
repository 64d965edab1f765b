"""`anert tokenize FILES... -o OUT`: texts to token files."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from anert.cli.meter import Meter, as_worker, end_workers, interrupts_end_workers
from anert.cli.parser import Parser, reader
from anert.errors import InputError

if TYPE_CHECKING:
    from anert.data.corpus import Report
    from anert.dist import World

ABOUT = """\
Tokenize texts for training: plain or JSON lines, .gz too; - is standard input.

  anert tokenize stories.txt --tokenizer tokenizer.model -o stories.bin
  anert tokenize a.jsonl.gz b.jsonl.gz --field story --tokenizer t.json -o shards/ --val 0.01 --workers 2
  anert tokenize corpus.txt --tokenizer tokenizer.bin -o raw.bin --raw        as llama2.c and maderix/ANE read it
  anert tokenize corpus.txt --tokenizer t.json -o shards/ --shard 3/16        machine 3 of 16
  mpiexec -n 16 python -m mpi4py -m anert tokenize corpus.txt --tokenizer t.json -o shards/     all 16 at once

OUT is one .bin file, or a directory of shards: run the same command again and it goes on where it stopped.
"""


def main(argv: Sequence[str]) -> int:
    from anert.data import TokenizeOptions, tokenize
    from anert.dist import world
    from anert.tokenizer import load_tokenizer

    found, ranks = _parser().parse(argv), world()
    if ranks.size > 1:
        found.shard = _shard_of_rank(ranks, found.shard, found.out)
    names = ("form", "field", "split", "ends", "val", "dtype", "raw")
    options = TokenizeOptions(**{n: getattr(found, n) for n in names})
    tokenizer, meter, start = load_tokenizer(found.tokenizer), Meter(), time.monotonic()
    with interrupts_end_workers(), _executor(found.workers) as executor:
        size = int(found.shard_mb * 1e6)
        run = tokenize(found.files, tokenizer, found.out, options, executor, found.shard, size, found.force)
        with closing(run):
            try:
                while True:
                    event = next(run)
                    if ranks.rank == 0:
                        meter.show(event)
            except StopIteration as end:
                report: Report = end.value
            finally:
                meter.clear()
    if ranks.size > 1:
        _add_up(report, ranks)
    seconds = time.monotonic() - start
    if ranks.rank:
        return 0
    if found.json:
        rate = report.bytes / 1e6 / seconds
        print(json.dumps({**asdict(report), "seconds": round(seconds, 3), "mb_per_s": round(rate, 3)}))
    else:
        print(_summary(report, seconds))
    return 0


def _shard_of_rank(ranks: World, asked: tuple[int, int], out: Path) -> tuple[int, int]:
    if asked != (0, 1):
        raise InputError("--shard I/N is for machines without a launcher: under mpiexec each rank takes its own")
    if out.suffix == ".bin":
        raise InputError(f"{out}: {ranks.size} ranks write shards: name a directory instead of a .bin file")
    return ranks.rank, ranks.size


def _add_up(report: Report, ranks: World) -> None:
    """Rank 0's report becomes all ranks'; it waits for the last of them."""
    keys = ("documents", "tokens", "val_tokens", "bytes", "shards", "skipped")
    ranks.wait_for_all()
    for key, total in zip(keys, ranks.sum([getattr(report, key) for key in keys]), strict=True):
        setattr(report, key, int(total))
    report.complete = bool(ranks.sum([report.complete])[0])  # it is to who comes last
    if report.complete and ranks.rank == 0:
        report.files = [str(f) for f in sorted(Path(report.path).glob("shard-*.bin"))]
    ranks.close()


def _parser() -> Parser:
    parser = Parser(prog="anert tokenize", description=ABOUT, usage="anert tokenize FILES... --tokenizer T -o OUT")
    add = parser.add_argument
    add("files", nargs="+", metavar="FILES", help="texts (UTF-8); - is standard input")
    add("--tokenizer", required=True, metavar="FILE", type=Path, help="any kind that anert reads")
    add("-o", "--out", required=True, metavar="OUT", type=Path, help="a .bin file, or a directory for shards")
    add("--format", dest="form", default="auto", choices=("auto", "text", "jsonl"), help="[auto: by the name]")
    add("--field", default="text", metavar="NAME", help="field of a JSON line that is the document [%(default)s]")
    add(
        "--split",
        default="auto",
        choices=("auto", "endoftext", "blank", "line", "file"),
        help="what lies between documents of a text [auto: <|endoftext|> where it is, else a file is one]",
    )
    add(
        "--ends",
        default="auto",
        choices=("auto", "bos", "eos", "both", "none"),
        help="tokens around a document [auto: bos; eos where there is no bos]",
    )
    add("--val", default=0.0, type=reader(float), metavar="X", help="share of the documents for *.val.bin [0]")
    add("--dtype", default="auto", choices=("auto", "uint16", "uint32"), help="[auto: what the vocabulary needs]")
    add("--raw", action="store_true", help="ids alone, without our header")
    add("--workers", default=1, type=reader(int, 1), metavar="N", help="processes [1]")
    add("--shard", default=(0, 1), type=_shard, metavar="I/N", help="only every N-th shard, from I on (0 to N - 1)")
    add("--shard-mb", default=64.0, type=reader(float, 1e-3), metavar="X", help="text of a shard [64]")
    add("--force", action="store_true", help="replace what is there")
    add("--json", action="store_true", help="one JSON object as the last line of stdout")
    return parser


def _shard(text: str) -> tuple[int, int]:
    i, slash, n = text.partition("/")
    if not (slash and i.isdigit() and n.isdigit() and int(i) < int(n)):
        raise argparse.ArgumentTypeError(f"expected I/N with I from 0 to N - 1, got {text!r}")
    return int(i), int(n)


@contextmanager
def _executor(workers: int) -> Iterator[Executor | None]:
    if workers == 1:
        yield None
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process that has touched the engine is not safe
    with ProcessPoolExecutor(workers, context, as_worker) as pool:
        try:
            yield pool
        except BaseException:
            end_workers()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _summary(report: Report, seconds: float) -> str:
    held = f" and {report.val_tokens:,} for validation" if report.val_tokens else ""
    speed = f"{report.bytes / 1e6:.1f} MB in {seconds:.1f} s, {report.bytes / 1e6 / seconds:.1f} MB/s"
    line = f"{report.path}: {report.tokens:,} tokens{held} of {report.documents:,} documents ({speed})"
    if not report.complete:
        line += "; other shards are not finished: manifest.json comes with the last one"
    return line
