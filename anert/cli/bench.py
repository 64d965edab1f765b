"""`anert bench NAME [PLUGIN]`: figures that were measured, side by side, with what they were measured on."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anert.cli.parser import Parser, reader
from anert.errors import InputError

if TYPE_CHECKING:
    from anert.bench.measure import Result


ABOUT = """\
Measure, side by side and interleaved: median and p10 to p90 of several rounds. Results are checked before and after
the timing; FLOPs and bytes come from what ran; a figure that cannot be is refused (exit code 3), and so is one that
other processes blurred.
"""


def about() -> str:
    from anert.bench import BENCHMARKS

    rows = "\n".join(f"  {name.ljust(12)}{text}" for name, (text, _) in BENCHMARKS.items())
    return f"{ABOUT}\n{rows}"


def main(argv: Sequence[str]) -> int:
    from anert.bench import BENCHMARKS, Result, fingerprint, measure
    from anert.bench.options import BenchOptions
    from anert.plugin import suggest

    found = _parser().parse(argv)
    if found.name not in BENCHMARKS:
        raise InputError(f"no benchmark {found.name!r}: {suggest(found.name, BENCHMARKS)}")
    peers = tuple((name, path) for name, _, path in (peer.partition("=") for peer in found.peer))
    options = BenchOptions(found.plugin or "", "", found.seq_len, found.batch, found.precision, found.backend,
                           found.layout, found.threads, found.isa, found.size, found.data, peers, found.steps,
                           found.seconds, found.axis, _values(found.values), found.compile_budget,
                           texts=tuple(found.text), tokenizers=tuple(found.tokenizer))  # fmt: skip
    baseline = _saved(found.compare) if found.compare else {}
    module: Any = importlib.import_module(f"anert.bench.{BENCHMARKS[found.name][1]}")
    if hasattr(module, "results"):
        items = module.results(options, found.rounds or module.ROUNDS)
    else:
        cases = module.cases(found.name, options)
        if not cases:  # another rank tells
            return 0
        items = measure(cases, found.rounds or 7, found.warmup, not found.no_wait, found.max_spread)
    results: list[Result] = []
    stream = sys.stderr if found.json else sys.stdout
    for item in items:
        if isinstance(item, Result):
            results.append(item)
            print(line(item), file=stream, flush=True)
    if close := getattr(module, "close", None):
        close()
    about_machine = fingerprint(*_threads(results))
    report = {"bench": found.name, "results": [r.as_dict() for r in results], "machine": about_machine}
    print(f"on {about_machine['cpu']}, {about_machine['threads']} threads {about_machine['isa']}", file=stream)
    if found.save:
        Path(found.save).write_text(json.dumps(report, indent=1) + "\n")
    slower = list(_slower(results, baseline, found.fail_over)) if baseline else []
    for text in slower:
        print(text, file=stream)
    if found.json:
        print(json.dumps({**report, "slower": slower}))
    return 1 if slower else 0


def _parser() -> Parser:
    parser = Parser(prog="anert bench", description=about(), usage="anert bench NAME [PLUGIN[:PRESET]] [options]")
    add = parser.add_argument
    add("name", metavar="NAME", help="what to measure")
    add("plugin", nargs="?", metavar="PLUGIN", help="the model, as plugins/stories.py:15m")
    add("--seq-len", default=0, type=reader(int, 1), metavar="N", help="positions [the preset's]")
    add("--batch", default=1, type=reader(int, 1), metavar="N", help="sequences [%(default)s]")
    add("--precision", default="auto", metavar="NAME", help="auto, fp32, bf16 or fp16 [%(default)s]")
    add("--backend", default="auto", metavar="NAME", help="auto, cpu, ane or reference [%(default)s]")
    add("--layout", default="auto", metavar="NAME", help="auto, ports or packed [%(default)s]")
    add("--threads", default=0, type=reader(int), metavar="N", help="0: what the machine grants [%(default)s]")
    add("--isa", default="auto", metavar="NAME", help="an instruction set of anert doctor's list [%(default)s]")
    add("--size", default=0, type=reader(int), metavar="N", help="elements of an array benchmark [past the caches]")
    add("--data", default="", metavar="FILE", help="a token file [drawn ids]")
    add("--text", action="append", default=[], metavar="FILE", help="English text for tokenizer; repeatable")
    add("--tokenizer", action="append", default=[], metavar="FILE", help="[one of each kind, learnt from the text]")
    add("--peer", action="append", default=[], metavar="NAME[=PATH]", help="measure beside: torch, ...; repeatable")
    add("--rounds", default=0, type=reader(int), metavar="N", help="timings a case [7; strategies: 1]")
    add("--steps", default=0, type=reader(int), metavar="N", help="length of a run [strategies: 12, soak: 20000]")
    add("--seconds", default=0.0, type=reader(float), metavar="X", help="end soak after so long [no limit]")
    add("--axis", default="", metavar="NAME", help="what scaling varies: seq_len, batch, n_layers, ...")
    add("--values", default="", metavar="N,N", help="points on that axis [its own]")
    add("--compile-budget", default=100, type=reader(int, 1), metavar="N", help="of strategies' runs [%(default)s]")
    add("--warmup", default=2, type=reader(int, 1), metavar="N", help="runs before [%(default)s]")
    add("--max-spread", default=0.6, type=reader(float), metavar="X",
        help="refuse beyond (p90 - p10) / median [%(default)s]")  # fmt: skip
    add("--no-wait", action="store_true", help="do not repeat what other processes disturbed")
    add("--save", metavar="FILE", help="write the results as JSON")
    add("--compare", metavar="FILE", help="results of an earlier --save to compare with")
    add("--fail-over", default="15%", metavar="P%", help="exit 1 if slower than those by more [%(default)s]")
    add("--json", action="store_true", help="one JSON object as the last line of stdout, the rest on stderr")
    return parser


def line(r: Result) -> str:
    """A result in a line: median, range, what it is of the peak and of its baseline."""
    parts = [f"{r.name.ljust(44)} {r.median:10.4g} {r.unit}  ({r.p10:.4g} to {r.p90:.4g}, n={r.n})"]
    parts += [f"{r.tflops * 1e3:.0f} GFLOP/s"] if r.flops and "FLOP" not in r.unit else []
    parts += [f"{r.peak_fraction:.0%} of the peak"] if r.peak_fraction is not None else []
    parts += [f"{r.ratio:.2f}x {r.baseline}"] if r.ratio is not None else []
    parts += [f"{r.disturbed} disturbed"] if r.disturbed else []
    parts += [str(r.notes["said"])] if "said" in r.notes else []
    return "  ".join(parts)


def _values(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        found = (0,)
    if any(n < 1 for n in found):
        raise InputError(f"--values takes whole numbers of at least 1, as 64,128,256, got {text!r}")
    return found


def _threads(results: Sequence[Result]) -> tuple[int, str]:
    """(threads, instruction set) that the results used."""
    from anert.ffi import Pool

    for r in results:
        if "isa" in r.notes:
            return int(r.notes["threads"]), str(r.notes["isa"])
    pool = Pool()
    return pool.threads, pool.isa


def _saved(path: str) -> dict[str, dict[str, Any]]:
    """name -> row of a saved report. Raises InputError."""
    try:
        rows = json.loads(Path(path).read_text("utf-8"))["results"]
        return {row["name"]: {"unit": str(row["unit"]), "median": float(row["median"])} for row in rows}
    except OSError as error:
        raise InputError(f"--compare {path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"--compare {path}: no results of anert bench --save in it") from None


def _slower(results: Sequence[Result], saved: dict[str, dict[str, Any]], allowed: str) -> Any:
    from anert.bench.measure import TIMES

    try:
        limit = float(allowed.rstrip("%")) / 100
    except ValueError:
        raise InputError(f"--fail-over takes a percentage, as 15%, got {allowed!r}") from None
    for r in results:
        before = saved.get(r.name)
        if before is None or before["unit"] != r.unit or not before["median"]:
            continue
        change = r.median / before["median"]
        loss = change - 1 if r.unit in TIMES else 1 / change - 1
        if loss > limit:
            yield f"{r.name}: {r.median:.4g} {r.unit}, before {before['median']:.4g}: slower by {loss:.0%}"
