"""`anert lint FILE.mil|PLUGIN[:PRESET]`: what the engine's published constraints say of a program."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anert.cli.parser import Parser
from anert.errors import AnertError, InputError, Unpackable

if TYPE_CHECKING:
    from anert.mil.lint import Finding
    from anert.plugin import Preset

ABOUT = """\
Check MIL text against the published constraints of the Neural Engine: a file, or every kernel that a plugin's model
compiles (all presets, or one as PLUGIN:PRESET; training and inference, both layouts). No engine is needed or opened.
Exit code 1 if a finding is at least as grave as --fail-on says.
"""
GRAVITY = ("agreed", "error", "warning", "never")


def main(argv: Sequence[str]) -> int:
    from anert.mil.lint import as_json, as_sarif, as_text, measured
    from anert.mil.lint_rules import CHIPS, catalogue

    parser = Parser(prog="anert lint", description=ABOUT)
    add = parser.add_argument
    add("subject", nargs="?", metavar="FILE.mil|PLUGIN", help="MIL text, or a plugin")
    add("--target", default=",".join(CHIPS), metavar="CHIPS", help="chips to check for [%(default)s]")
    add("--here", action="store_true", help="check for this machine, as anert doctor has probed it")
    add("--format", choices=("text", "json", "sarif"), default="text", help="[%(default)s]")
    add("--fail-on", choices=GRAVITY, default="agreed", help="agreed: errors that no source disputes [%(default)s]")
    add("--rules", action="store_true", help="list the catalogue instead")
    add("--json", action="store_true", help="as --format json")
    found = parser.parse(argv)
    if found.rules:
        print("\n".join(f"{r.id}  {r.name}: {r.summary}. Fix: {r.fix}. (source: {r.source})" for r in catalogue()))
        return 0
    if not found.subject:
        raise InputError("nothing to check: name a MIL file or a plugin (anert lint --help)")
    target, rules = _here() if found.here else (found.target, {})
    results = [(path, measured(part, rules)) for path, part in _subjects(found.subject, target)]
    findings = [f for _, part in results for f in part]
    if found.json or found.format == "json":
        rows = [{"path": path, **row} for path, part in results for row in as_json(part)]
        print(json.dumps({"findings": rows, "programs": len(results), "target": target.split(",")}))
    elif found.format == "sarif":
        logs = [as_sarif(part, path) for path, part in results]
        log = logs[0]
        log["runs"][0]["results"] = [row for one in logs for row in one["runs"][0]["results"]]
        print(json.dumps(log))
    else:
        print("\n".join(as_text(part, path) for path, part in results if part))
        agreed, grave = (_failing(findings, level) for level in ("agreed", "error"))
        counts = f"{agreed} agreed errors, {grave - agreed} disputed errors, {len(findings) - grave} warnings and notes"
        print(f"{len(results)} programs checked for {target}: {counts}", file=sys.stderr)
    return 1 if _failing(findings, found.fail_on) else 0


def _here() -> tuple[str, Mapping[str, bool]]:
    """(chip, settled rules) of this machine. Raises InputError where doctor has not probed it."""
    from anert.capabilities import load_record, machine_key
    from anert.mil.lint_rules import CHIPS

    record, chip = load_record(), machine_key()["chip"].lower()
    known = [name for name in CHIPS if re.search(rf"\b{name}\b", chip)]
    if record is None or not known:
        raise InputError(
            f"--here needs the probes of this machine ({chip or 'unknown chip'}): run anert doctor on a Mac"
        )
    return known[0], record.rules


def _failing(findings: Sequence[Finding], level: str) -> int:
    """How many findings are as grave as `level` of GRAVITY."""
    wanted = {"agreed": ("error",), "error": ("error",), "warning": ("error", "warning"), "never": ()}[level]
    return sum(f.severity in wanted and (level != "agreed" or f.confidence != "disputed") for f in findings)


def _subjects(subject: str, target: str) -> Iterator[tuple[str, list[Finding]]]:
    """(name, findings) of each program."""
    from anert.mil.lint import lint_text
    from anert.plugin import load, split_name

    path = Path(subject)
    if path.suffix == ".mil" or (path.is_file() and path.suffix != ".py"):
        yield subject, lint_text(_read(path), target, subject)
        return
    name, preset = split_name(subject)
    plugin = load(name)
    for one in [plugin.preset(preset)] if preset else plugin.presets.values():
        for kernel, text, blobs in _kernels(one):
            where = f"{subject}:{one.name}/{kernel}" if not preset else f"{subject}/{kernel}"
            yield where, lint_text(text, target, where, blobs)


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: MIL text is UTF-8, byte {error.start} is not; is it a compiled model?") from None


def _kernels(preset: Preset) -> Iterator[tuple[str, str, dict[str, bytes]]]:
    """(name, text, weight files) of every distinct kernel of a preset, in the wire form of a Mac not yet probed: of
    both layouts, and of all boundaries that a run may choose there."""
    from anert.blocks import build_blocks
    from anert.boundaries import candidates
    from anert.capabilities import ANE
    from anert.stages import Boundaries

    model: Any = preset.model(preset.config)
    seen: set[str] = set()
    for bounds in (Boundaries("ports"), *candidates(ANE)):
        if bounds.group and model.config.n_layers % bounds.group:
            continue
        for train in (True, False):
            try:
                blocks = build_blocks(model, preset.config.seq_len, 1, train, bounds, ANE)
            except Unpackable:
                continue
            except AnertError as error:
                raise type(error)(f"preset {preset.name!r}: {error}") from None
            for kernel in (k for b in blocks for k in b.kernels):
                if kernel.text not in seen:
                    seen.add(kernel.text)
                    yield f"{bounds.layout}/{'train' if train else 'infer'}/{kernel.name}", kernel.text, kernel.blobs
